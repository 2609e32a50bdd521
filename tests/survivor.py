"""A run that is made to die: what the tests of `run_dir` share, and a program that they kill."""

from __future__ import annotations

import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

import lowmem_higher as higher
from lowmem_higher import pieces, resumable

CUT = {"LEAF_STEPS": 5, "FEWEST_STEPS": 2, "SAVE_SECONDS": 0.0}  # many pieces, and a save after each step of a way


class Net(nn.Module):
    """BatchNorm's buffers, dropout's draws, and a weight that is not trained."""

    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Linear(3, 5)
        self.norm = nn.BatchNorm1d(5)
        self.drop = nn.Dropout(0.2)
        self.last = nn.Linear(5, 1)
        self.last.bias.requires_grad_(False)

    def forward(self, x: Tensor) -> Tensor:
        """Of shape (batch, 3)."""
        found: Tensor = self.last(self.drop(torch.tanh(self.norm(self.first(x)))))
        return found


class Problem:
    """One call of `metagradient`, made anew in each process from the same seed."""

    def __init__(self, optimizer: str = "adam", dtype: torch.dtype = torch.float64, seed: int = 0) -> None:
        torch.manual_seed(seed)
        self.net = Net().to(dtype)
        self.x, self.y = torch.randn(12, 8, 3, dtype=dtype), torch.randn(12, 8, 1, dtype=dtype)
        self.weights = torch.zeros(12, dtype=dtype, requires_grad=True)
        self.rate = torch.tensor(0.03, dtype=dtype, requires_grad=True)
        make: Callable[..., torch.optim.Optimizer] = {
            "adam": torch.optim.Adam,
            "sgd": lambda params: torch.optim.SGD(params, lr=0.1, momentum=0.9),
        }[optimizer]
        self.opt = make(self.net.parameters())
        self.reads = 0
        self.at_read: Callable[[int], None] = lambda read: None

    def loss(self, fnet: Any, batch: Any, weights: Tensor, rate: Tensor) -> Tensor:
        """A weighed error, and a hyperparameter that is used twice."""
        index, x, y = batch
        return (weights[index].sigmoid() * (fnet(x) - y).square()).mean() + rate * fnet.last.weight.square().mean()

    def batches(self, step: int) -> tuple[int, Tensor, Tensor]:
        """Noise is drawn anew, from torch's generator."""
        self.reads += 1
        self.at_read(self.reads)
        x = self.x[step % 12]
        return step % 12, x + 0.1 * torch.randn_like(x), self.y[step % 12]

    def outer(self, fnet: Any) -> Tensor:
        """In training mode, so it draws and writes buffers, too."""
        return (fnet(self.x[0]) - self.y[0]).square().mean()

    def arguments(self, steps: int, **settings: Any) -> dict[str, Any]:
        """Those of the call, but for run_dir."""
        return {
            "steps": steps,
            "outer": {0: self.outer, steps // 2: self.outer, steps: self.outer},
            "meta": (self.weights, self.rate),
            "override": {"lr": [self.rate]},
            **settings,
        }

    def run(self, steps: int, run_dir: Path | str | None = None, **settings: Any) -> list[Tensor]:
        """All that must be the same: the result, and where the random numbers stand after it."""
        torch.manual_seed(5)
        given = self.arguments(steps, **settings)
        return bits(higher.metagradient(self.loss, self.net, self.opt, self.batches, run_dir=run_dir, **given))


def bits(found: higher.MetaGradient) -> list[Tensor]:
    """All tensors of a result in one order, and the state of the generator."""
    of_meta = found.meta.values() if isinstance(found.meta, dict) else found.meta
    grads = [*found.weights.values(), *of_meta]
    given = [torch.tensor(float("nan")) if grad is None else grad for grad in grads]
    return [found.outer, *given, *found.final_weights.values(), *found.final_buffers.values(), torch.get_rng_state()]


def same(one: list[Tensor], other: list[Tensor]) -> bool:
    """Whether two results are equal to the bit."""
    return len(one) == len(other) and all(
        a.dtype == b.dtype and torch.equal(a.nan_to_num(7.0), b.nan_to_num(7.0))
        for a, b in zip(one, other, strict=True)
    )


def main() -> None:
    """`survivor.py run_dir result steps`: say when it begins, run, save the result."""
    run_dir, result, steps = sys.argv[1], sys.argv[2], int(sys.argv[3])
    for name, value in CUT.items():
        setattr(resumable, name, value)
    pieces.WAY_STEPS = 4
    torch.set_num_threads(1)
    problem = Problem()
    print("begins", flush=True)
    torch.save(problem.run(steps, None if run_dir == "none" else run_dir, checkpoints=3), result)


if __name__ == "__main__":
    main()
