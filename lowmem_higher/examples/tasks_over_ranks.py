"""Tasks spread over processes: learn initial weights that fit any sine wave in 5 steps (MAML), each process its tasks.

    torchrun --standalone --nproc-per-node=2 -m lowmem_higher.examples.tasks_over_ranks

The only lines that know of processes: each takes its share of the tasks, and `average_gradients` stands before the
outer step. Any number of processes learns the same weights, one included.

Finn et al., Model-agnostic meta-learning for fast adaptation of deep networks, ICML 2017, section 5.1.
"""

from __future__ import annotations

import argparse
import math
from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn

import lowmem_higher as higher
from lowmem_higher.examples.processes import process_group

SHOTS = 10


def wave(task: int) -> tuple[Tensor, Tensor]:
    """Points of the sine wave of that number, the first half to adapt to, (20, 1) each."""
    generator = torch.Generator().manual_seed(task)
    amplitude, phase = torch.rand(2, generator=generator, dtype=torch.float64)
    x = 10 * torch.rand(2 * SHOTS, 1, generator=generator, dtype=torch.float64) - 5
    return x, (0.1 + 4.9 * amplitude) * torch.sin(x + math.pi * phase)


def loss_after(model: nn.Module, task: int) -> Tensor:
    """The loss on the second half of a task after 5 steps on the first half."""
    device = next(model.parameters()).device
    x, y = (part.to(device) for part in wave(task))
    inner = torch.optim.SGD(model.parameters(), lr=0.01)
    with higher.innerloop_ctx(model, inner, copy_initial_weights=False, checkpoint_every=2) as (fmodel, diffopt):
        for _ in range(5):
            diffopt.step(F.mse_loss(fmodel(x[:SHOTS]), y[:SHOTS]))
        return F.mse_loss(fmodel(x[SHOTS:]), y[SHOTS:])


def main(arguments: Sequence[str] | None = None) -> list[float]:
    """Train and print; returns the mean loss of all processes at each outer step."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--updates", type=int, default=50, help="outer steps (default 50)")
    parser.add_argument("--tasks", type=int, default=8, help="tasks of an outer step, of all processes (default 8)")
    options = parser.parse_args(arguments)
    losses = []
    with process_group() as (rank, world, device):
        torch.manual_seed(0)  # the same initial weights everywhere
        model = nn.Sequential(nn.Linear(1, 40), nn.Tanh(), nn.Linear(40, 40), nn.Tanh(), nn.Linear(40, 1))
        model.double().to(device)
        outer = torch.optim.Adam(model.parameters(), lr=0.003)
        for update in range(options.updates):
            mine = range(update * options.tasks + rank, (update + 1) * options.tasks, world)
            outer.zero_grad()
            total = torch.zeros((), dtype=torch.float64, device=device)
            for task in mine:
                loss = loss_after(model, task) / len(mine)
                loss.backward()
                total += loss.detach()
            higher.distributed.average_gradients(model)
            outer.step()
            losses.append(higher.distributed.average(total).item())
            if rank == 0 and (update % 10 == 9 or update == options.updates - 1):
                print(f"outer step {update + 1} of {options.updates}, {world} processes: loss {losses[-1]:.4f}")
    return losses


if __name__ == "__main__":
    main()
