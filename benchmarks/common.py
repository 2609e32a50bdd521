"""What the benchmarks share: the loop, the rivals, one measured run, and how results are written down.

NOTE [ One loop for everybody ]
The rivals differ in the module that is called `higher` and in keywords of `innerloop_ctx`, in nothing else. All of them
start from the same weights and read the same batches, which lie in memory (on the device) before the clock starts.

NOTE [ Time and memory are different runs ]
`live_bytes()` sits in the dispatcher and slows every operation down, so peak bytes come from a separate, untimed pass.
That pass runs first and is the warm-up of the timed ones.
"""

from __future__ import annotations

import functools
import gc
import importlib
import json
import math
import os
import platform
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import psutil
import torch
from problems import NUMBER_OF_BATCHES, CountedModel, Problem
from torch import Tensor

HERE = Path(__file__).resolve().parent
RESULTS = HERE / "results"
README = HERE / "README.md"
MIB = 2**20

MEMORY_FRACTION = 0.7  # of what is available: live bytes leave out the interpreter, autograd's nodes and fragmentation


# ------------------------------------------------------------------------------------------------------------ rivals


@dataclass(frozen=True)
class Rival:
    """A library and how it is asked; without a spacing or a budget it unrolls in full."""

    name: str
    library: str
    spacing: Callable[[int], int] | None = None
    replay: str = "native"
    budget: str | None = None
    graphs: int = 1

    @property
    def grows_with_steps(self) -> bool:
        """Whether every step's graph is kept."""
        return self.spacing is None

    def checkpoint_every(self, steps: int) -> int | None:
        """The spacing for that many steps."""
        return None if self.spacing is None else self.spacing(steps)

    def keywords(self, steps: int) -> dict[str, Any]:
        """What `innerloop_ctx` gets beyond higher's own arguments."""
        if self.library == "higher":
            return {}
        if self.budget is not None:
            return {"memory_budget": self.budget, "steps": steps}
        return {"checkpoint_every": self.checkpoint_every(steps), "replay": self.replay, "graphs": self.graphs}

    def describe(self, steps: int) -> str:
        """Name with the spacing of this run, as tables show it."""
        spacing = self.checkpoint_every(steps)
        return self.name if spacing is None else f"{self.name}, N={spacing}"


def ten(steps: int) -> int:
    """Fixed spacing."""
    return 10


def square_root(steps: int) -> int:
    """The spacing of least memory: `ceil(T/N) + N` carries."""
    return math.ceil(math.sqrt(steps))


@functools.cache
def scratch() -> tempfile.TemporaryDirectory[str]:
    """A folder for carries on disk, which goes when Python ends."""
    return tempfile.TemporaryDirectory()


@dataclass(frozen=True)
class Setting:
    """The library under some keywords of `innerloop_ctx`."""

    name: str
    keywords: Callable[[int], dict[str, Any]]  # of the number of steps
    library: str = "lowmem_higher"
    scan: bool = False  # hand all steps to `diffopt.scan` at once


SETTINGS = (
    Setting("full unroll", lambda steps: {}),
    Setting("N=10", lambda steps: {"checkpoint_every": 10}),
    Setting("N=sqrt(T)", lambda steps: {"checkpoint_every": square_root(steps)}),
    Setting("s=10", lambda steps: {"checkpoints": 10}),
    Setting("s=30", lambda steps: {"checkpoints": 30}),
    Setting("s=100", lambda steps: {"checkpoints": 100}),
    Setting("s=10, T known", lambda steps: {"checkpoints": 10, "steps": steps}),
    Setting("s=30, T known", lambda steps: {"checkpoints": 30, "steps": steps}),
    Setting("s=100, T known", lambda steps: {"checkpoints": 100, "steps": steps}),
    Setting("host, s=100", lambda steps: {"checkpoints": 100, "store": "host"}),
    Setting("disk, s=100", lambda steps: {"checkpoints": 100, "store": scratch().name}),
    Setting("journal, N=sqrt(T)", lambda steps: {"checkpoint_every": square_root(steps), "journal": True}),
)

HIGHER = Rival("higher", "higher")
UNROLL = Rival("full unroll", "lowmem_higher")
NATIVE_TEN = Rival("native", "lowmem_higher", ten)
GRAPHS_TEN = Rival("ten graphs", "lowmem_higher", ten, graphs=10)
NATIVE_ROOT = Rival("native sqrt", "lowmem_higher", square_root)
TORCH_TEN = Rival("torch", "lowmem_higher", ten, replay="torch")
AMPLE = Rival("ample budget", "lowmem_higher", budget="1TiB")


# --------------------------------------------------------------------------------------------------------------- run


@dataclass(frozen=True)
class Run:
    """One whole inner loop with its outer gradient."""

    seconds: float
    cpu_seconds: float  # of all threads: under a busy machine it tells waiting from working
    forward_seconds: float
    gradient: Tensor  # all of it, flat: initial weights, then the learning rate
    model_calls: int
    report: dict[str, Any]  # diffopt.report.as_dict(); empty for higher
    cuda_peak: int | None


def make_optimizer(problem: Problem, kind: str) -> torch.optim.Optimizer:
    """The inner optimizer, `"sgd"` (momentum 0.9) or `"adam"`."""
    if kind == "sgd":
        return torch.optim.SGD(problem.model.parameters(), lr=problem.learning_rate, momentum=0.9)
    return torch.optim.Adam(problem.model.parameters(), lr=0.1 * problem.learning_rate)


def synchronize(device: torch.device) -> None:
    """Wait for the device, where that means anything."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def inner_loss_of(loss: Callable[[Tensor, Tensor], Tensor]) -> Callable[[Any, tuple[Tensor, Tensor]], Tensor]:
    """The same loss as a function of the model and a batch."""

    def inner_loss(fmodel: Any, batch: tuple[Tensor, Tensor]) -> Tensor:
        return loss(fmodel(batch[0]), batch[1])

    return inner_loss


def run(rival: Rival | Setting, problem: Problem, steps: int, inner_optimizer: str = "sgd") -> Run:
    """Train for `steps` inner steps and differentiate the outer loss: the one loop of all rivals.

    The outer gradient is taken with respect to the initial weights and a learnable learning rate.
    """
    library: Any = importlib.import_module(rival.library)
    device = problem.held_out[0].device
    optimizer = make_optimizer(problem, inner_optimizer)
    learning_rate = torch.tensor(float(optimizer.param_groups[0]["lr"]), device=device, requires_grad=True)
    calls_before = CountedModel.calls
    gc.collect()
    base = 0
    if device.type == "cuda":
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats(device)
        base = torch.cuda.memory_allocated(device)
    synchronize(device)

    start, cpu_start = time.perf_counter(), time.process_time()
    with library.innerloop_ctx(
        problem.model, optimizer, copy_initial_weights=False, override={"lr": [learning_rate]}, **rival.keywords(steps)
    ) as (fmodel, diffopt):
        batches = [problem.batches[step % NUMBER_OF_BATCHES] for step in range(steps)]
        if isinstance(rival, Setting) and rival.scan:
            diffopt.scan(inner_loss_of(problem.loss), batches)
        else:
            for inputs, targets in batches:
                diffopt.step(problem.loss(fmodel(inputs), targets))
        outer_loss = problem.loss(fmodel(problem.held_out[0]), problem.held_out[1])
        forward_end = time.perf_counter()
        gradients = torch.autograd.grad(outer_loss, [*problem.model.parameters(), learning_rate])
    synchronize(device)
    end, cpu_end = time.perf_counter(), time.process_time()

    report = getattr(diffopt, "report", None)
    result = Run(
        seconds=end - start,
        cpu_seconds=cpu_end - cpu_start,
        forward_seconds=forward_end - start,
        gradient=torch.cat([gradient.detach().flatten() for gradient in gradients]).cpu(),
        model_calls=CountedModel.calls - calls_before,
        report=dict(report.as_dict()) if report is not None else {},
        cuda_peak=torch.cuda.max_memory_allocated(device) - base if device.type == "cuda" else None,
    )
    del fmodel, diffopt, outer_loss, gradients
    gc.collect()  # higher's patched modules refer to themselves; their memory must not reach into the next run
    return result


def measure_peak(rival: Rival, problem: Problem, steps: int, inner_optimizer: str = "sgd") -> tuple[int, Run]:
    """Peak live bytes of one run: storages created inside it, so neither the model's own weights nor the data."""
    from lowmem_higher.testing import live_bytes

    with live_bytes() as memory:
        result = run(rival, problem, steps, inner_optimizer)
    return int(memory.peak), result


def relative_difference(gradient: Tensor, reference: Tensor) -> float:
    """`|gradient - reference| / |reference|` over everything at once; refuses a reference of zero or not finite."""
    norm = float(reference.norm())
    if not (math.isfinite(norm) and norm > 0.0):
        raise RuntimeError(f"the reference gradient has norm {norm}: nothing can be compared with it")
    return float((gradient - reference).norm()) / norm


# ------------------------------------------------------------------------------------------------------- memory rule


def available_bytes(device: torch.device) -> int:
    """Bytes that a run may still take: of the device, or of this machine within its control group."""
    if device.type == "cuda":
        return int(torch.cuda.mem_get_info(device)[0])
    available = int(psutil.virtual_memory().available)
    try:
        limit = Path("/sys/fs/cgroup/memory.max").read_text().strip()
        used = Path("/sys/fs/cgroup/memory.current").read_text().strip()
        if limit != "max":
            available = min(available, int(limit) - int(used))
    except (OSError, ValueError):
        pass  # no control group, or none that says: the machine's own figure stands
    return available


def extrapolate(points: dict[int, int], steps: int) -> int:
    """Peak of a rival that keeps every step, through the two largest measured step counts (it is affine in them)."""
    (few, low), (many, high) = sorted(points.items())[-2:]
    return round(high + (high - low) * (steps - many) / (many - few))


def carries_of(steps: int, spacing: int) -> int:
    """The law's count of carries at the peak."""
    return math.ceil(steps / spacing) + min(spacing, steps)


# ----------------------------------------------------------------------------------------------------------- writing


def environment(device: torch.device) -> dict[str, Any]:
    """What a reader needs to judge the figures. No paths and no host names."""

    def git(*arguments: str) -> str:
        try:
            done = subprocess.run(["git", *arguments], cwd=HERE, capture_output=True, text=True, check=True)
        except (OSError, subprocess.CalledProcessError):
            return ""
        return done.stdout.strip()

    commit = git("rev-parse", "--short", "HEAD") or "unknown"
    if git("status", "--porcelain", "--", str(HERE.parent / "lowmem_higher")):
        commit += " with uncommitted changes"
    processor = platform.processor() or platform.machine()
    try:
        for line in Path("/proc/cpuinfo").read_text().splitlines():
            if line.startswith("model name"):
                processor = line.split(":", 1)[1].strip()
                break
    except OSError:
        pass  # not Linux: the platform's own word stands
    return {
        "date": datetime.now(UTC).strftime("%Y-%m-%d %H:%M UTC"),
        "commit": commit,
        "torch": torch.__version__,
        "python": platform.python_version(),
        "system": platform.system(),
        "processor": processor,
        "device": torch.cuda.get_device_name(device) if device.type == "cuda" else "cpu",
        "cpu_count": os.cpu_count(),
        "threads": torch.get_num_threads(),
        "load_average_at_start": round(os.getloadavg()[0], 2) if hasattr(os, "getloadavg") else None,
        "memory_bytes": int(psutil.virtual_memory().total),
    }


def warn_if_busy(values: dict[str, Any]) -> None:
    """Two OpenMP programs on the same cores slow each other down ten times and more, not two times."""
    load = values["load_average_at_start"]
    if load is not None and load > 0.5:
        print(f"warning: the load average is {load}; times taken beside other work say little", file=sys.stderr)


def describe_environment(values: dict[str, Any]) -> str:
    """One line for tables."""
    return (
        f"torch {values['torch']}, Python {values['python']}, {values['processor']}, {values['cpu_count']} CPUs, "
        f"{values['threads']} threads, device {values['device']}, load at start {values['load_average_at_start']}, "
        f"commit {values['commit']}, {values['date']}"
    )


def format_bytes(count: float) -> str:
    """Binary units with three digits."""
    for unit in ("B", "KiB", "MiB"):
        if abs(count) < 1024:
            return f"{count:.3g} {unit}"
        count /= 1024
    return f"{count:.3g} GiB" if count < 1024 else f"{count:.0f} GiB"


def write_json(path: Path, values: dict[str, Any]) -> None:
    """Save a result, with a final newline."""
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(values, indent=1) + "\n")


def write_section(name: str, text: str, path: Path = README) -> None:
    """Replace what stands between `<!-- name:begin -->` and `<!-- name:end -->` in the README."""
    begin, end = f"<!-- {name}:begin -->", f"<!-- {name}:end -->"
    old = path.read_text()
    if old.count(begin) != 1 or old.count(end) != 1:
        raise RuntimeError(f"{path.name} must hold the markers {begin} and {end} exactly once")
    head, rest = old.split(begin)
    path.write_text(f"{head}{begin}\n{text.strip()}\n{end}{rest.split(end)[1]}")


def draw(function: str, result: dict[str, Any], path: Path) -> None:
    """Draw a picture with `plot.py`, if matplotlib is there; say how to get it if not."""
    try:
        import plot
    except ImportError:
        print("no picture: matplotlib is missing (pip install matplotlib)")
        return
    path.parent.mkdir(parents=True, exist_ok=True)
    getattr(plot, function)(result, path)
