"""Sharded fast weights: tune the learning rate of a model under FSDP2, whose checkpoints are sharded as it is.

    torchrun --standalone --nproc-per-node=2 -m lowmem_higher.examples.sharded

`fully_shard` is all that is done to the model. Each process holds its part of the weights, of Adam's state and of every
checkpoint, and takes its part of the batch; FSDP2 defines the gradient as the mean over processes.
"""

from __future__ import annotations

import argparse
from collections.abc import Sequence

import torch
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard

import lowmem_higher as higher
from lowmem_higher.distributed import average, average_gradients
from lowmem_higher.examples.processes import process_group
from lowmem_higher.report import format_bytes


def main(arguments: Sequence[str] | None = None) -> tuple[float, int]:
    """Tune and print; returns the learning rate found and the bytes of a checkpoint in this process."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--steps", type=int, default=20, help="inner steps (default 20)")
    parser.add_argument("--updates", type=int, default=5, help="outer steps (default 5)")
    options = parser.parse_args(arguments)
    with process_group() as (rank, world, device):
        torch.manual_seed(0)  # the same data and initial weights everywhere
        x, fresh = torch.randn(2, 64, 16, dtype=torch.float64).to(device)
        mine, of_mine = (part.chunk(world)[rank] for part in (x, fresh))
        model = nn.Sequential(nn.Linear(16, 64), nn.Tanh(), nn.Linear(64, 16)).double().to(device)
        if world > 1:
            mesh = init_device_mesh(device.type, (world,))
            fully_shard(model[0], mesh=mesh)
            fully_shard(model, mesh=mesh)
        log_rate = torch.tensor(-7.0, dtype=torch.float64, device=device, requires_grad=True)
        outer = torch.optim.Adam([log_rate], lr=0.5)
        for update in range(options.updates):
            inner = torch.optim.Adam(model.parameters())
            rate = {"lr": [log_rate.exp()]}
            with higher.innerloop_ctx(model, inner, override=rate, checkpoint_every=5) as (fmodel, diffopt):
                for _ in range(options.steps):
                    loss = (fmodel(mine) - mine.flip(1)).square().mean()
                    diffopt.step(loss, grad_callback=average)
                loss = (fmodel(of_mine) - of_mine.flip(1)).square().mean()
            outer.zero_grad()
            loss.backward()
            average_gradients([log_rate])
            outer.step()
            if rank == 0:
                size = format_bytes(diffopt.report.carry_bytes)
                print(
                    f"outer step {update + 1} of {options.updates}, {world} processes: loss {loss.item():.4f} on 0, "
                    f"learning rate {log_rate.exp().item():.5f}, a checkpoint takes {size} of each process"
                )
    return log_rate.exp().item(), diffopt.report.carry_bytes


if __name__ == "__main__":
    main()
