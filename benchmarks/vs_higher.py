"""How do time, memory and passes compare with `higher`, on one tiny, one dense and one convolutional net?

    python benchmarks/vs_higher.py            # the table of benchmarks/README.md; about an hour
    python benchmarks/vs_higher.py --quick    # a smoke test; writes nothing

One round runs every rival once; rounds are repeated and the starting rival rotates, so that a slow minute of the
machine hits all of them. Shown are the median and the least and largest of the repeats.

NOTE [ What is left out, and how the table says so ]
1. Tiers. A light cell runs all rivals `--repeats` times. The heavy cells (mlp512 and conv4 at T=200) run the rivals of
   the target that often (higher; native, N=10) and the others once. The long cells (mlp512 and conv4 at T=1000) run
   the rivals of the target once and the others not at all. `--full` makes every cell light: hours, not minutes.
2. Memory. A rival that keeps every step's graph is measured at small T, where its peak is affine in T. It is not run
   where the extrapolated peak is above 0.7 of the memory available at the start.
3. A peak marked ~ is not measured but computed: for those rivals from that line (checked on a third point), for the
   checkpointed ones from the law `(ceil(T/N) + N) |carry| + constant` and the largest T measured.
"""

from __future__ import annotations

import argparse
import cProfile
import gc
import pstats
import statistics
import sys
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import common
import problems
import torch
from common import AMPLE, GRAPHS_TEN, HIGHER, NATIVE_ROOT, NATIVE_TEN, TORCH_TEN, UNROLL, Rival
from problems import Problem
from torch import Tensor

RIVALS = (HIGHER, UNROLL, AMPLE, GRAPHS_TEN, NATIVE_TEN, NATIVE_ROOT, TORCH_TEN)
TARGET_RIVALS = (HIGHER, AMPLE, GRAPHS_TEN, NATIVE_TEN)
TARGETS = {  # time over higher's
    GRAPHS_TEN: {"tiny": 1.5, "mlp512": 1.35, "conv4": 1.35},
    NATIVE_TEN: {"tiny": 1.5, "mlp512": 1.35, "conv4": 1.35},
    AMPLE: {"tiny": 1.0, "mlp512": 1.0, "conv4": 1.3},
}
NETS = {"tiny": problems.tiny, "mlp512": problems.mlp, "conv4": problems.conv4}
PROBE_STEPS = (4, 8, 12)  # two for the line, one to check it
MEASURED_MEMORY_STEPS = 50  # above it, the memory of the dense and the convolutional net is computed


@dataclass
class Row:
    """One rival at one net and T."""

    net: str
    steps: int
    rival: str
    label: str
    seconds: list[float] = field(default_factory=list)
    cpu_seconds: list[float] = field(default_factory=list)
    median: float | None = None
    times_higher: float | None = None
    target: float | None = None
    peak_bytes: int | None = None
    peak_is_computed: bool = False
    first_order_runs: int | None = None
    second_order_runs: int | None = None
    model_calls: int | None = None
    difference: float | None = None
    cuda_peak_bytes: int | None = None
    skipped: str = ""

    def by_arithmetic(self) -> float | None:
        """Time over higher's if only multiply-adds took time: a first-order run is 3 forwards, a second-order run 9.

        Known for native replay; the recomputations inside `torch.utils.checkpoint` are no whole runs.
        """
        if not self.rival.startswith("native") or self.first_order_runs is None or self.second_order_runs is None:
            return None
        return (3 * self.first_order_runs + 9 * self.second_order_runs) / (9 * self.steps)

    def verdict(self) -> str:
        """Against the target, where the row has one."""
        if self.target is None or self.times_higher is None:
            return ""
        word = "met" if self.times_higher <= self.target else "**missed**"
        few = f" ({len(self.seconds)} of 5 repeats)" if len(self.seconds) < 5 else ""
        return f"<= {self.target:g}: {word}{few}"


class MemoryBook:
    """Peaks that were measured, and the computed ones that follow from them."""

    def __init__(self, problem: Problem, optimizer: str) -> None:
        self.problem, self.optimizer = problem, optimizer
        self.points: dict[str, dict[int, int]] = {}
        self.carry_bytes = 0
        self.line_error = 0.0

    def probe(self, rivals: Sequence[Rival], few: Sequence[int]) -> None:
        """Measure the growing rivals at three small T and keep the largest error of the line at the third."""
        for rival in rivals:
            if rival.grows_with_steps:
                for steps in few:
                    self.measure(rival, steps)
                known = self.points[rival.name]
                line = common.extrapolate({steps: known[steps] for steps in few[:2]}, few[2])
                self.line_error = max(self.line_error, abs(line / known[few[2]] - 1.0))

    def measure(self, rival: Rival, steps: int) -> int:
        """Peak of a real run."""
        peak, done = common.measure_peak(rival, self.problem, steps, self.optimizer)
        self.points.setdefault(rival.name, {})[steps] = peak
        self.carry_bytes = max(self.carry_bytes, int(done.report.get("carry_bytes") or 0))
        return peak

    def computed(self, rival: Rival, steps: int) -> int | None:
        """Peak by the line or by the law, None without a measured point."""
        known = self.points.get(rival.name)
        if not known:
            return None
        if rival.grows_with_steps:
            return common.extrapolate(known, steps)
        largest = max(known)
        here, there = rival.checkpoint_every(steps), rival.checkpoint_every(largest)
        assert here is not None
        assert there is not None
        more = common.carries_of(steps, here) - common.carries_of(largest, there)
        return known[largest] + more * self.carry_bytes


def repeats_of(net: str, steps: int, rival: Rival, repeats: int, full: bool) -> int:
    """The tiers of the note above."""
    if full or net == "tiny" or steps < 200:
        return repeats
    if rival in TARGET_RIVALS:
        return repeats if steps < 1000 else 1
    return 1 if steps < 1000 else 0


def measure_cell(problem: Problem, steps: int, book: MemoryBook, arguments: argparse.Namespace) -> list[Row]:
    """All rivals at one net and T."""
    net, device = problem.name, problem.held_out[0].device
    rows: dict[Rival, Row] = {}
    left: dict[Rival, int] = {}
    gradients: dict[Rival, Tensor] = {}
    measured = arguments.full or net == "tiny" or steps <= MEASURED_MEMORY_STEPS
    for rival in RIVALS:
        row = rows[rival] = Row(net, steps, rival.name, rival.describe(steps))
        row.target = TARGETS.get(rival, {}).get(net)
        row.peak_bytes, row.peak_is_computed = book.computed(rival, steps), True
        left[rival] = repeats_of(net, steps, rival, arguments.repeats, arguments.full)
        if rival.grows_with_steps and (row.peak_bytes or 0) > common.MEMORY_FRACTION * arguments.memory:
            row.skipped = f"not run: needs ~{common.format_bytes(row.peak_bytes or 0)}"
        elif left[rival] == 0:
            row.skipped = "not timed: long cell"
        if row.skipped:
            left[rival] = 0
        elif measured:
            row.peak_bytes, row.peak_is_computed = book.measure(rival, steps), False

    first = 0
    while any(left.values()):
        for rival in (*RIVALS[first:], *RIVALS[:first]):
            if left[rival] == 0:
                continue
            left[rival] -= 1
            done = common.run(rival, problem, steps, arguments.inner_optimizer)
            row = rows[rival]
            row.seconds.append(done.seconds)
            row.cpu_seconds.append(done.cpu_seconds)
            row.model_calls = done.model_calls
            # higher reports nothing; by construction it runs every step once, with create_graph=True
            row.first_order_runs = int(done.report.get("first_order_runs", 0))
            row.second_order_runs = int(done.report.get("second_order_runs", steps))
            row.cuda_peak_bytes = done.cuda_peak
            gradients[rival] = done.gradient
        first = (first + 1) % len(RIVALS)

    for row in rows.values():
        row.median = statistics.median(row.seconds) if row.seconds else None
    for rival, row in rows.items():
        base = rows[HIGHER].median
        if base is not None and row.median is not None:
            row.times_higher = row.median / base
            row.difference = common.relative_difference(gradients[rival], gradients[HIGHER])
    if device.type == "cuda":
        torch.cuda.empty_cache()
    return list(rows.values())


COLUMNS = (
    "net", "T", "rival", "seconds: median (min to max)", "repeats", "time / higher", "by multiply-adds",
    "target",
    "peak live bytes", "higher / peak", "first-order runs", "second-order runs", "model calls", "gradient vs higher",
)  # fmt: skip


def table(rows: list[Row]) -> str:
    """The rows in Markdown."""
    cuda = any(row.cuda_peak_bytes is not None for row in rows)
    columns = (*COLUMNS, "CUDA peak allocated") if cuda else COLUMNS
    lines = ["| " + " | ".join(columns) + " |", "|" + "---|" * len(columns)]
    higher_peak = {(row.net, row.steps): row.peak_bytes for row in rows if row.rival == HIGHER.name}
    for row in rows:
        base = higher_peak[row.net, row.steps]
        time_text = row.skipped
        if row.median is not None:
            time_text = f"{row.median:.3g} ({min(row.seconds):.3g} to {max(row.seconds):.3g})"
        mark = "~" if row.peak_is_computed else ""
        cells = [
            row.net,
            str(row.steps),
            row.label,
            time_text,
            str(len(row.seconds) or ""),
            f"{row.times_higher:.2f}" if row.times_higher is not None else "",
            f"{arithmetic:.2f}" if (arithmetic := row.by_arithmetic()) is not None else "",
            row.verdict(),
            f"{mark}{common.format_bytes(row.peak_bytes)}" if row.peak_bytes is not None else "",
            f"{base / row.peak_bytes:.1f}x" if base and row.peak_bytes else "",
            str(row.first_order_runs if row.first_order_runs is not None else ""),
            str(row.second_order_runs if row.second_order_runs is not None else ""),
            str(row.model_calls if row.model_calls is not None else ""),
            f"{row.difference:.0e}" if row.difference is not None and row.rival != HIGHER.name else "",
        ]
        if cuda:
            cells.append(common.format_bytes(row.cuda_peak_bytes) if row.cuda_peak_bytes is not None else "")
        lines.append("| " + " | ".join(cells) + " |")
    return "\n".join(lines)


def profile(problem: Problem, steps: int, optimizer: str) -> None:
    """Print the 15 functions in which native replay, N=10, spends most time of its own."""
    common.run(NATIVE_TEN, problem, min(steps, 20), optimizer)
    profiler = cProfile.Profile()
    gc.freeze()  # else the collections around each run, which are not timed in the table, would head the list
    profiler.enable()
    common.run(NATIVE_TEN, problem, steps, optimizer)
    profiler.disable()
    gc.unfreeze()
    pstats.Stats(profiler).strip_dirs().sort_stats("tottime").print_stats(15)


def parse(argv: list[str] | None) -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(
        description="time, live bytes and passes against higher", formatter_class=argparse.ArgumentDefaultsHelpFormatter
    )
    parser.add_argument("--nets", nargs="+", choices=list(NETS), default=list(NETS))
    parser.add_argument("--steps", nargs="+", type=int, default=[20, 50, 200, 1000], help="inner steps T")
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--inner-optimizer", choices=["sgd", "adam"], default="sgd", help="sgd has momentum 0.9")
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--full", action="store_true", help="every rival in every cell, all repeats: hours")
    parser.add_argument("--quick", action="store_true", help="smoke test: T=4, one repeat, writes only with --out")
    parser.add_argument("--profile", action="store_true", help="only print where native replay spends its time")
    parser.add_argument("--out", type=Path, help="folder for JSON and picture; benchmarks/results when not --quick")
    parser.add_argument("--no-readme", action="store_true", help="leave the table of benchmarks/README.md as it is")
    arguments = parser.parse_args(argv)
    if arguments.quick:
        arguments.steps, arguments.repeats, arguments.no_readme = [4], 1, True
    elif arguments.out is None:
        arguments.out = common.RESULTS
    if min(arguments.steps) < 1 or arguments.repeats < 1:
        parser.error("--steps and --repeats are at least 1")
    return arguments


def main(argv: list[str] | None = None) -> int:
    """Measure, print, save."""
    arguments = parse(argv)
    if find_spec("higher") is None:
        print("this benchmark compares with higher: pip install higher", file=sys.stderr)
        return 2
    device = torch.device(arguments.device)
    if arguments.profile:
        for net in arguments.nets:
            profile(NETS[net]().to(device), max(arguments.steps), arguments.inner_optimizer)
        return 0
    environment = common.environment(device)
    common.warn_if_busy(environment)
    arguments.memory = common.available_bytes(device)
    command = "python benchmarks/vs_higher.py " + " ".join(sys.argv[1:] if argv is None else argv)
    start = time.perf_counter()
    rows: list[Row] = []
    line_error = 0.0
    for net in arguments.nets:
        problem = NETS[net]().to(device)
        book = MemoryBook(problem, arguments.inner_optimizer)
        book.probe(RIVALS, (1, 2, 3) if arguments.quick else PROBE_STEPS)  # and the warm-up of the process
        line_error = max(line_error, book.line_error)
        for steps in sorted(arguments.steps):
            cell = measure_cell(problem, steps, book, arguments)
            rows += cell
            print(f"[{time.perf_counter() - start:.0f} s] {problem.description}, T={steps}", flush=True)
            for row in cell:
                timing = row.skipped if row.median is None else f"{row.median:.3f} s"
                ratio = "" if row.times_higher is None else f"{row.times_higher:.2f} x higher {row.verdict()}"
                peak = "" if row.peak_bytes is None else common.format_bytes(row.peak_bytes)
                print(f"    {row.label:20} {timing:>12}  {peak:>10}  {ratio}", flush=True)

    optimizer = "SGD with momentum 0.9" if arguments.inner_optimizer == "sgd" else "Adam"
    text = "\n\n".join(
        [
            f"`{command.strip()}`: {time.perf_counter() - start:.0f} s in all, float32, inner optimizer {optimizer}.",
            f"Measured with {common.describe_environment(environment)}. Memory available at the start: "
            f"{common.format_bytes(arguments.memory)}.",
            table(rows),
            f"A peak marked ~ is computed, not measured; the line through two points missed the third by at most "
            f"{line_error:.1%}.",
        ]
    )
    print("\n" + text)
    result: dict[str, Any] = {
        "benchmark": "vs_higher",
        "command": command.strip(),
        "environment": environment,
        "inner_optimizer": optimizer,
        "available_bytes": arguments.memory,
        "line_error": line_error,
        "wall_seconds": time.perf_counter() - start,
        "rows": [asdict(row) for row in rows],
    }
    if arguments.out is not None:
        common.write_json(arguments.out / "vs_higher.json", result)
        common.draw("vs_higher", result, arguments.out / "vs_higher.png")
    if not arguments.no_readme:
        common.write_section("vs_higher", text)
    return 0


if __name__ == "__main__":
    sys.exit(main())
