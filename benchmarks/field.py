"""How do the field's libraries compare, each run as well as it can be?

    python benchmarks/field.py                                  # about an hour on an idle core
    python benchmarks/field.py --nets tiny gpt --steps 20 200   # a part of it; --resume adds to what is saved
    python benchmarks/field.py --quick                          # a smoke test; writes nothing

The same work for all: T steps of SGD with momentum 0.9 from the same weights on the same batches, and the gradient of a
held-out loss with respect to the initial weights and the learning rate.

    higher        full unroll, as its users write it
    TorchOpt      full unroll, MetaSGD with the learning rate as a tensor
    by hand       `torch.utils.checkpoint` around sqrt(T) segments of pure steps, re-entrant (see scaling.py)
    JAX           scan in scan, both checkpointed, one compiled function (see in_jax.py)
    lowmem_higher under the settings named

Every rival is called once first (JAX compiles, allocators fill): "first" is what that took beyond a median run. Then
all rivals in turn, as often as --repeats says, or once where a run takes over --long seconds. Peak memory is that of
live tensor storages in a run of its own, not measured where a run is long or compiled by inductor; of JAX the compiled
program's own account (temporary and output buffers). One thread for all: the process is bound to one core.
"""

from __future__ import annotations

import argparse
import gc
import json
import os
import statistics
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass, field
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import common
import problems
import torch
from common import AMPLE, GRAPHS_TEN, HIGHER, NATIVE_ROOT, NATIVE_TEN, Rival, Setting
from problems import CountedModel, Problem
from scaling import by_hand
from torch import Tensor

from lowmem_higher.testing import live_bytes

NETS = {"tiny": problems.tiny, "mlp512": problems.mlp, "conv4": problems.conv4, "gpt": problems.gpt}
LONGEST = {"conv4": 200, "gpt": 200}  # of the default run: longer ones take hours
MIXED = Setting("N=10, mixed", lambda steps: {"checkpoint_every": 10, "pullback": "mixed"})
COMPILED = Setting("N=10, compiled", lambda steps: {"checkpoint_every": 10, "compile": True})
TRACED = Setting("N=10, traced", lambda steps: {"checkpoint_every": 10, "compile": "trace"})
SCAN_TRACED = Setting("N=10, scan traced", lambda steps: {"checkpoint_every": 10, "compile": "trace"}, scan=True)
SCAN_COMPILED = Setting("N=10, scan compiled", lambda steps: {"checkpoint_every": 10, "compile": True}, scan=True)
SCAN_HELD = Setting("N=1, scan compiled", lambda steps: {"checkpoint_every": 1, "compile": True}, scan=True)
UNSEEN = (COMPILED, SCAN_COMPILED, SCAN_HELD)  # live bytes do not see what inductor's code allocates
SLOTS = Setting("s=30", lambda steps: {"checkpoints": 30})
OURS: tuple[Rival | Setting, ...] = (
    AMPLE, GRAPHS_TEN, NATIVE_TEN, NATIVE_ROOT, SLOTS, MIXED, TRACED, COMPILED, SCAN_TRACED, SCAN_COMPILED,
    SCAN_HELD,
)  # fmt: skip


@dataclass
class Row:
    """One rival at one net and T."""

    net: str
    steps: int
    rival: str
    seconds: list[float] = field(default_factory=list)
    median: float | None = None
    first_seconds: float | None = None
    times_higher: float | None = None
    peak_bytes: int | None = None
    model_calls: int | None = None
    difference: float | None = None
    left_out: str = ""


@dataclass
class Prepared:
    """A rival ready to run: a call gives the seconds that it took, and the gradient, flat."""

    call: Callable[[], tuple[float, Tensor]]
    before: float = 0.0  # seconds that it took to prepare
    peak_bytes: int | None = None  # where live bytes do not see it


def with_torchopt(problem: Problem, steps: int) -> Tensor:
    """The loop in TorchOpt; its optimizer replaces the parameters of the model, which are put back."""
    import torchopt

    model = problem.model
    state = torchopt.extract_state_dict(model, by="reference")
    rate = torch.tensor(problem.learning_rate, requires_grad=True)
    initial = list(model.parameters())
    optimizer = torchopt.MetaSGD(model, lr=rate, momentum=0.9, moment_requires_grad=True)
    try:
        for step in range(steps):
            inputs, targets = problem.batches[step % problems.NUMBER_OF_BATCHES]
            optimizer.step(problem.loss(model(inputs), targets))
        outer = problem.loss(model(problem.held_out[0]), problem.held_out[1])
        gradients = torch.autograd.grad(outer, [*initial, rate])
    finally:
        torchopt.recover_state_dict(model, state)
    return torch.cat([gradient.flatten() for gradient in gradients])


def prepare(name: str, problem: Problem, steps: int) -> Prepared:
    """A rival by name."""
    if name == "JAX":
        import in_jax

        compiled = in_jax.compiled(problem, steps)
        call = timed(compiled.gradient)
        return Prepared(call, compiled.compile_seconds, compiled.peak_bytes)
    if name == "TorchOpt":
        return Prepared(timed(lambda: with_torchopt(problem, steps)))
    if name == "by hand":
        return Prepared(timed(lambda: by_hand(problem, steps, reentrant=True)))
    setting = next(rival for rival in (HIGHER, *OURS) if rival.name == name)

    def run() -> tuple[float, Tensor]:
        done = common.run(setting, problem, steps)  # has its own clock, which leaves the collection of garbage out
        return done.seconds, done.gradient

    return Prepared(run)


def timed(call: Callable[[], Tensor]) -> Callable[[], tuple[float, Tensor]]:
    """The same with its seconds."""

    def run() -> tuple[float, Tensor]:
        gc.collect()
        start = time.perf_counter()
        found = call()
        return time.perf_counter() - start, found

    return run


def measure(problem: Problem, steps: int, names: list[str], arguments: argparse.Namespace) -> list[Row]:
    """All rivals at one net and T; `higher` comes first, since it is the reference."""
    rows = {name: Row(problem.name, steps, name) for name in names}
    ready: dict[str, Prepared] = {}
    reference: Tensor | None = None
    for name, row in rows.items():
        if row.left_out:
            continue
        try:
            prepared = prepare(name, problem, steps)
            calls = CountedModel.calls
            seconds, gradient = prepared.call()
        except (RuntimeError, MemoryError, TypeError, NotImplementedError) as error:
            row.left_out = f"{type(error).__name__}: {str(error).splitlines()[0][:90]}"
            continue
        row.model_calls = CountedModel.calls - calls if prepared.peak_bytes is None else None
        row.first_seconds = seconds + prepared.before
        reference = gradient if reference is None else reference
        row.difference = common.relative_difference(gradient, reference)
        row.peak_bytes = prepared.peak_bytes
        seen = name not in {setting.name for setting in UNSEEN}
        if row.peak_bytes is None and seen and seconds <= arguments.long:
            with live_bytes() as memory:
                prepared.call()
            row.peak_bytes = memory.peak
        ready[name] = prepared
        print(f"{problem.name} T={steps} {name}: first {row.first_seconds:.3g} s", file=sys.stderr)
    for turn in range(arguments.repeats):
        for name, prepared in ready.items():
            if turn == 0 or rows[name].seconds[0] <= arguments.long:
                rows[name].seconds.append(prepared.call()[0])
    for row in rows.values():
        if row.seconds:
            row.median = statistics.median(row.seconds)
            assert row.first_seconds is not None
            row.first_seconds = max(0.0, row.first_seconds - row.median)
    base = rows[names[0]].median
    for row in rows.values():
        row.times_higher = row.median / base if row.median and base else None
    return list(rows.values())


def table(rows: list[Row]) -> str:
    """Nets and steps down, one row a rival."""
    columns = ["net", "T", "rival", "seconds: median (min to max)", "first call beyond it", "time / higher", "peak"]
    columns += ["model calls", "gradient vs higher"]
    lines = [f"| {' | '.join(columns)} |", "|---" * len(columns) + "|"]
    for row in rows:
        start = f"| {row.net} | {row.steps} | {row.rival} |"
        if row.median is None:
            lines.append(f"{start} not run: {row.left_out} ||||||")
            continue
        spread = f"{row.median:.3g} ({min(row.seconds):.3g} to {max(row.seconds):.3g})"
        peak = "" if row.peak_bytes is None else common.format_bytes(row.peak_bytes)
        times = "" if row.times_higher is None else f"{row.times_higher:.2f}"
        cost = f"{spread} | {row.first_seconds:.2g} | {times} | {peak} | {row.model_calls or ''}"
        lines.append(f"{start} {cost} | {row.difference:.0e} |")
    return "\n".join(lines)


def cells(arguments: argparse.Namespace) -> Iterator[tuple[str, int]]:
    """Nets and steps."""
    for net in arguments.nets:
        for steps in arguments.steps:
            if arguments.full or steps <= LONGEST.get(net, steps):
                yield net, steps


def parse(argv: list[str] | None) -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(description="the field", formatter_class=argparse.ArgumentDefaultsHelpFormatter)
    parser.add_argument("--nets", nargs="+", choices=list(NETS), default=list(NETS))
    parser.add_argument("--steps", nargs="+", type=int, default=[20, 200, 1000], help="inner steps T")
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--long", type=float, default=20.0, help="seconds of a run that is repeated no more")
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--full", action="store_true", help="every T for every net: hours")
    parser.add_argument("--resume", action="store_true", help="add to what is saved; a cell measured again is replaced")
    parser.add_argument("--quick", action="store_true", help="smoke test: tiny net, T=4, writes only with --out")
    parser.add_argument("--out", type=Path, help="folder for the JSON; benchmarks/results when not --quick")
    parser.add_argument("--no-readme", action="store_true", help="leave the table of benchmarks/README.md as it is")
    arguments = parser.parse_args(argv)
    if arguments.quick:
        arguments.nets, arguments.steps, arguments.repeats = ["tiny"], [4], 1
    return arguments


def main(argv: list[str] | None = None) -> int:
    """Measure, print, save."""
    arguments = parse(argv)
    device = torch.device(arguments.device)
    if device.type == "cpu":
        os.sched_setaffinity(0, {max(os.sched_getaffinity(0))})  # also for JAX, which is imported later
        torch.set_num_threads(1)
    environment = common.environment(device)
    common.warn_if_busy(environment)
    names = [HIGHER.name, *(name for name, module in (("TorchOpt", "torchopt"), ("JAX", "jax")) if find_spec(module))]
    names += ["by hand", *(rival.name for rival in OURS)]
    out = arguments.out or (None if arguments.quick else common.RESULTS)
    saved = None if out is None else out / "field.json"
    rows: list[Row] = []
    if arguments.resume and saved is not None and saved.exists():
        rows = [Row(**row) for row in json.loads(saved.read_text(encoding="utf-8"))["rows"]]
    command = " ".join(["python benchmarks/field.py", *(sys.argv[1:] if argv is None else argv)])
    for net, steps in cells(arguments):
        found = measure(NETS[net]().to(device), steps, names, arguments)
        rows = [row for row in rows if (row.net, row.steps) != (net, steps)] + found
        print(table(found), flush=True)
        if out is not None:
            result: dict[str, Any] = {
                "benchmark": "field",
                "command": command,
                "environment": environment,
                "rows": [asdict(row) for row in rows],
            }
            common.write_json(out / "field.json", result)
            common.draw("field", result, out / "field.png")
    if out is not None and not arguments.no_readme:
        measured = f"Measured with {common.describe_environment(environment)}."
        common.write_section("field", "\n\n".join([f"`{command}`", measured, table(rows)]))
    return 0


if __name__ == "__main__":
    sys.exit(main())
