"""A data-parallel inner loop of which any process may die: learn a weight for each example, 40 % of them wrong.

    export TORCH_DISABLE_SHARE_RDZV_TCP_STORE=1  # so that processes that are started again find each other
    torchrun --standalone --nproc-per-node=2 --max-restarts=3 -m lowmem_higher.examples.surviving --run-dir runs/a

Kill a process, or all of them: what is started again goes on, to the same bits. `metagradient` keeps the inner loop and
its backward in `run_dir`; what the outer loop has, this program saves after each outer step.

Ren et al., Learning to reweight examples for robust deep learning, ICML 2018.
"""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

import lowmem_higher as higher
from lowmem_higher.distributed import average
from lowmem_higher.examples.processes import process_group

EXAMPLES, WRONG, BATCH = 200, 80, 32


def main(arguments: Sequence[str] | None = None) -> tuple[float, float]:
    """Train and print; returns the mean of the learned weights of wrong and of right examples, before the sigmoid."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--steps", type=int, default=200, help="inner steps (default 200)")
    parser.add_argument("--updates", type=int, default=10, help="outer steps (default 10)")
    parser.add_argument("--run-dir", type=Path, required=True, help="a directory that all processes see")
    options = parser.parse_args(arguments)
    with process_group() as (rank, world, device):
        torch.manual_seed(0)  # the same data and initial weights everywhere
        x = torch.randn(EXAMPLES, 8, dtype=torch.float64).to(device)
        y = x.sum(1, keepdim=True).tanh()
        y[:WRONG] = -y[:WRONG]
        fresh = torch.randn(128, 8, dtype=torch.float64).to(device).chunk(world)[rank]
        model = nn.Sequential(nn.Linear(8, 32), nn.Tanh(), nn.Linear(32, 1)).double().to(device)
        weights = torch.zeros(EXAMPLES, dtype=torch.float64, device=device, requires_grad=True)
        outer = torch.optim.Adam([weights], lr=0.3)

        def batch(step: int) -> Tensor:
            drawn = torch.randint(EXAMPLES, (BATCH,), generator=torch.Generator().manual_seed(step))
            mine: Tensor = drawn.chunk(world)[rank]
            return mine.to(device)

        def loss(fmodel: Any, mine: Tensor, weights: Tensor) -> Tensor:
            errors: Tensor = (fmodel(x[mine]) - y[mine]).square().mean(1)
            return (torch.sigmoid(weights[mine]) * errors).mean()

        def validate(fmodel: Any) -> Tensor:
            out: Tensor = fmodel(fresh)
            return (out - fresh.sum(1, keepdim=True).tanh()).square().mean()

        saved, done = options.run_dir / "outer.pt", 0
        if saved.exists():
            done, values, state = torch.load(saved, map_location=device)
            weights.data.copy_(values)
            outer.load_state_dict(state)
        for update in range(done, options.updates):
            inner = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9)
            found = higher.metagradient(
                loss,
                model,
                inner,
                batch,
                steps=options.steps,
                outer=validate,
                meta={"weights": weights},
                grad_callback=average,
                run_dir=options.run_dir / "inner",
            )
            grads: Any = found.meta
            weights.grad = average(grads["weights"])
            outer.step()
            if rank == 0:
                torch.save((update + 1, weights.data, outer.state_dict()), saved.with_suffix(".part"))
                saved.with_suffix(".part").replace(saved)
                print(f"outer step {update + 1} of {options.updates}, {world} processes: loss {found.outer:.4f} on 0")
            if world > 1:
                dist.barrier()
        wrong, right = weights[:WRONG].mean().item(), weights[WRONG:].mean().item()
        if rank == 0:
            print(f"mean weight, before the sigmoid: {wrong:.3f} of wrong examples, {right:.3f} of right ones")
    return wrong, right


if __name__ == "__main__":
    main()
