"""A run that is made to die: what the tests of `run_dir` share, and a program that they kill."""

from __future__ import annotations

import json
import os
import random
import signal
import sys
import time
import traceback
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

import lowmem_higher as higher
from lowmem_higher import pieces, resumable

CUT = {"LEAF_STEPS": 5, "FEWEST_STEPS": 2, "SAVE_SECONDS": 0.05}  # many pieces, and saves on each way


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


def forked(work: Callable[[], None]) -> int:
    """Do some work in a fork of this process."""
    process = os.fork()
    if process == 0:
        code = 1
        try:
            work()
            code = 0
        except BaseException:  # noqa: BLE001  (whatever it is, this process must not go on)
            traceback.print_exc()
        finally:
            os._exit(code)
    return process


def finished(process: int) -> float:
    """Wait for a fork that must succeed; returns the seconds of the processor that it took."""
    _, status, usage = os.wait4(process, 0)
    if status != 0:
        raise RuntimeError(f"the run ended with status {status}")
    return usage.ru_utime + usage.ru_stime


def used(process: int) -> float:
    """The seconds of the processor that a fork has taken so far: moments that no other load shifts."""
    fields = Path(f"/proc/{process}/stat").read_text().rpartition(")")[2].split()
    return (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK")


def phase_of(run_dir: Path) -> str:
    """Where a run that was killed stands, by its files."""
    names = [entry.name for entry in run_dir.iterdir()] if run_dir.exists() else []
    if "manifest.json" not in names:
        return "outside"
    return "backward" if any(name.startswith("adjoint") for name in names) else "loop"


def survive(folder: Path, steps: int, kills: dict[str, int], seed: int, a_run: int) -> dict[str, Any]:
    """Kill runs until there were so many kills in each phase, up to `a_run` of them in one run; then let it end.

    Returns:
        How many kills there were, by phase, how many runs, and how many of these did not give the same bits.
    """
    chosen, result, run_dir = random.Random(seed), folder / "result.pt", folder / "run"

    def run(where: Path | None) -> None:
        torch.save(Problem().run(steps, where, checkpoints=3), result)

    run(None)  # here, so that the forks find imported what a first run imports
    expected, began = torch.load(result), time.monotonic()
    took = finished(forked(lambda: run(run_dir)))
    counts, runs, wrong = {"loop": 0, "backward": 0, "outside": 0}, 0, 0
    while any(counts[phase] < count for phase, count in kills.items()):
        result.unlink(missing_ok=True)
        for _ in range(a_run):
            process = forked(lambda: run(run_dir))
            in_loop = counts["loop"] < kills["loop"] and phase_of(run_dir) != "backward"
            moment = chosen.uniform(0, took * (0.5 if in_loop else 1.0))
            while used(process) < moment and not result.exists():
                time.sleep(0.001)
            time.sleep(chosen.uniform(0, 0.01))  # the clock above ticks that slowly
            if result.exists():
                finished(process)
                break
            os.kill(process, signal.SIGKILL)
            os.waitpid(process, 0)
            counts[phase_of(run_dir)] += 1
        if not result.exists():
            finished(forked(lambda: run(run_dir)))
        runs += 1
        if os.environ.get("VERBOSE"):
            print(counts, runs, time.monotonic() - began, flush=True)
        wrong += not same(torch.load(result), expected) or run_dir.exists()
    return {"kills": counts, "runs": runs, "not_the_same_bits": wrong, "seconds_of_a_run": round(took, 2)}


def main() -> None:
    """`survivor.py folder steps kills_in_loop kills_in_backward seed`: kill, and print what came of it as JSON."""
    folder, steps, in_loop, in_backward, seed = Path(sys.argv[1]), *map(int, sys.argv[2:])
    for name, value in CUT.items():
        setattr(resumable, name, value)
    pieces.WAY_STEPS = 4
    torch.set_num_threads(1)
    print(json.dumps(survive(folder, steps, {"loop": in_loop, "backward": in_backward}, seed, a_run=8)))


if __name__ == "__main__":
    main()
