"""A data-parallel inner loop: learn a weight for each example where 40 % of the targets are wrong.

    torchrun --standalone --nproc-per-node=2 -m lowmem_higher.examples.data_parallel

Each process takes its part of every inner batch, and `grad_callback=average` gives all of them the mean of the inner
gradients, through which the meta-gradient passes. So any number of processes learns the same, one included.

Ren et al., Learning to reweight examples for robust deep learning, ICML 2018.
"""

from __future__ import annotations

import argparse
from collections.abc import Sequence

import torch
from torch import nn

import lowmem_higher as higher
from lowmem_higher.distributed import average, average_gradients
from lowmem_higher.examples.processes import process_group

EXAMPLES, WRONG, BATCH = 200, 80, 32


def main(arguments: Sequence[str] | None = None) -> tuple[float, float]:
    """Train and print; returns the mean of the learned weights of wrong and of right examples, before the sigmoid."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--steps", type=int, default=60, help="inner steps (default 60)")
    parser.add_argument("--updates", type=int, default=10, help="outer steps (default 10)")
    options = parser.parse_args(arguments)
    with process_group() as (rank, world, device):
        torch.manual_seed(0)  # the same data, batches and initial weights everywhere
        x = torch.randn(EXAMPLES, 8, dtype=torch.float64).to(device)
        y = x.sum(1, keepdim=True).tanh()
        y[:WRONG] = -y[:WRONG]
        fresh = torch.randn(128, 8, dtype=torch.float64).to(device)
        model = nn.Sequential(nn.Linear(8, 32), nn.Tanh(), nn.Linear(32, 1)).double().to(device)
        weights = torch.zeros(EXAMPLES, dtype=torch.float64, device=device, requires_grad=True)
        outer = torch.optim.Adam([weights], lr=0.3)
        for update in range(options.updates):
            inner = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9)
            with higher.innerloop_ctx(model, inner, checkpoint_every=8) as (fmodel, diffopt):
                for _ in range(options.steps):
                    mine = torch.randint(EXAMPLES, (BATCH,)).chunk(world)[rank].to(device)
                    errors = (fmodel(x[mine]) - y[mine]).square().mean(1)
                    diffopt.step((torch.sigmoid(weights[mine]) * errors).mean(), grad_callback=average)
                of_mine = fresh.chunk(world)[rank]
                loss = (fmodel(of_mine) - of_mine.sum(1, keepdim=True).tanh()).square().mean()
            outer.zero_grad()
            loss.backward()
            average_gradients([weights])
            outer.step()
            if rank == 0:
                print(f"outer step {update + 1} of {options.updates}, {world} processes: loss {loss.item():.4f} on 0")
        wrong, right = weights[:WRONG].mean().item(), weights[WRONG:].mean().item()
        if rank == 0:
            print(f"mean weight, before the sigmoid: {wrong:.3f} of wrong examples, {right:.3f} of right ones")
    return wrong, right


if __name__ == "__main__":
    main()
