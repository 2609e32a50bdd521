"""How does peak memory grow with the number of inner steps?

    python benchmarks/memory_scaling.py            # the picture of the top README; a few minutes on 2 cores
    python benchmarks/memory_scaling.py --quick    # a smoke test; writes nothing

Peak live bytes of loop and outer backward, counted storage by storage (`lowmem_higher.testing.live_bytes`), so the
figures are the same in every run; weights of the model and data are made before and do not count. A rival whose peak
would be above 0.7 of the available memory is not run there: its point is extrapolated and drawn hollow.

Checked against the laws: at N=sqrt(T) ten times the steps cost at most 4 times the memory, and at N=10 what is left
after taking away `(ceil(T/N) + N) |carry|` is the same for every T, within 5 %.
"""

from __future__ import annotations

import argparse
import sys
import time
from dataclasses import asdict, dataclass
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import common
import problems
import torch
from common import HIGHER, NATIVE_ROOT, NATIVE_TEN, TORCH_TEN, UNROLL, Rival
from problems import Problem

LAW_FROM = 5  # segments: with fewer of them one segment's transients differ from the law


@dataclass
class Point:
    """One rival at one T."""

    rival: str
    steps: int
    spacing: int | None
    peak_bytes: int
    computed: bool
    carry_bytes: int | None = None
    first_order_runs: int | None = None
    second_order_runs: int | None = None
    checkpoints_peak: int | None = None
    carries_peak_bytes: int | None = None


def measure(rival: Rival, problem: Problem, steps: int, known: dict[int, int], memory: int) -> Point:
    """A measured point, or an extrapolated one where the rival does not fit."""
    spacing = rival.checkpoint_every(steps)
    if rival.grows_with_steps and len(known) >= 2:
        expected = common.extrapolate(known, steps)
        if expected > common.MEMORY_FRACTION * memory:
            return Point(rival.name, steps, spacing, expected, computed=True)
    peak, done = common.measure_peak(rival, problem, steps)
    report = done.report
    return Point(
        rival.name, steps, spacing, peak, False,
        *(report.get(key) for key in (
            "carry_bytes", "first_order_runs", "second_order_runs", "checkpoints_peak", "carries_peak_bytes"
        )),
    )  # fmt: skip


def laws(points: list[Point]) -> dict[str, Any]:
    """What the design promises, next to what was found."""
    found: dict[str, Any] = {}
    root = {point.steps: point.peak_bytes for point in points if point.rival == NATIVE_ROOT.name}
    for steps in sorted(root):
        if 10 * steps in root:
            found[f"sqrt: peak({10 * steps}) / peak({steps})"] = {
                "found": root[10 * steps] / root[steps], "at most": 4.0
            }  # fmt: skip
    rest = {
        point.steps: point.peak_bytes - common.carries_of(point.steps, point.spacing) * point.carry_bytes
        for point in points
        if point.rival == NATIVE_TEN.name and point.spacing and point.carry_bytes
        and point.steps >= LAW_FROM * point.spacing
    }  # fmt: skip
    if len(rest) >= 2:
        found["N=10: peak minus carries, largest / smallest"] = {
            "found": max(rest.values()) / min(rest.values()), "at most": 1.05
        }  # fmt: skip
    for rival in (NATIVE_TEN, NATIVE_ROOT):
        mine = [point for point in points if point.rival == rival.name and point.first_order_runs is not None]
        if mine:
            found[f"{rival.name}: first-order runs / T"] = {
                "found": max((point.first_order_runs or 0) / point.steps for point in mine), "at most": 2.0
            }  # fmt: skip
    return found


def table(points: list[Point]) -> str:
    """T down, rivals across."""
    rivals = list(dict.fromkeys(point.rival for point in points))
    lines = ["| T | " + " | ".join(rivals) + " |", "|---|" + "---|" * len(rivals)]
    for steps in sorted({point.steps for point in points}):
        cells = []
        for rival in rivals:
            point = next(point for point in points if point.rival == rival and point.steps == steps)
            spacing = f" (N={point.spacing})" if point.spacing else ""
            cells.append(f"{'~' if point.computed else ''}{common.format_bytes(point.peak_bytes)}{spacing}")
        lines.append(f"| {steps} | " + " | ".join(cells) + " |")
    return "\n".join(lines)


def parse(argv: list[str] | None) -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(
        description="peak memory against inner steps", formatter_class=argparse.ArgumentDefaultsHelpFormatter
    )
    parser.add_argument("--steps", nargs="+", type=int, default=[10, 20, 50, 100, 200, 500, 1000], help="inner steps T")
    parser.add_argument("--width", type=int, default=256, help="units of the 3-layer net")
    parser.add_argument("--batch", type=int, default=256)
    parser.add_argument("--torch-replay", action="store_true", help='also measure replay="torch"')
    parser.add_argument("--device", default="cpu")
    parser.add_argument(
        "--quick", action="store_true", help="smoke test: small net, T up to 20, writes only with --out"
    )
    parser.add_argument("--out", type=Path, help="folder for JSON and picture; benchmarks/results when not --quick")
    parser.add_argument("--no-readme", action="store_true", help="leave the table of benchmarks/README.md as it is")
    arguments = parser.parse_args(argv)
    if arguments.quick:
        arguments.steps, arguments.width, arguments.batch, arguments.no_readme = [5, 10, 20], 16, 8, True
    elif arguments.out is None:
        arguments.out = common.RESULTS
    if min(arguments.steps) < 1:
        parser.error("--steps are at least 1")
    return arguments


def main(argv: list[str] | None = None) -> int:
    """Measure, print, save."""
    arguments = parse(argv)
    rivals = [UNROLL, NATIVE_TEN, NATIVE_ROOT]
    if find_spec("higher") is not None:
        rivals.insert(0, HIGHER)
    else:
        print("higher is not installed: left out (pip install higher)", file=sys.stderr)
    if arguments.torch_replay:
        rivals.append(TORCH_TEN)
    device = torch.device(arguments.device)
    environment = common.environment(device)
    memory = common.available_bytes(device)
    problem = problems.mlp(width=arguments.width, batch=arguments.batch, name="mlp").to(device)
    command = ("python benchmarks/memory_scaling.py " + " ".join(sys.argv[1:] if argv is None else argv)).strip()
    start = time.perf_counter()
    points: list[Point] = []
    for rival in rivals:
        known: dict[int, int] = {}
        for steps in sorted(set(arguments.steps)):
            point = measure(rival, problem, steps, known, memory)
            if not point.computed:
                known[steps] = point.peak_bytes
            points.append(point)
            print(
                f"[{time.perf_counter() - start:.0f} s] {rival.describe(steps)}, T={steps}: "
                f"{'~' if point.computed else ''}{common.format_bytes(point.peak_bytes)}",
                flush=True,
            )

    found = laws(points)
    verdicts = "\n".join(
        f"- {name}: {law['found']:.2f}, at most {law['at most']:g}: "
        f"{'met' if law['found'] <= law['at most'] else '**missed**'}"
        for name, law in found.items()
    )
    text = "\n\n".join(
        [
            f"`{command}`: {problem.description}, float32, SGD with momentum 0.9, native replay.",
            f"Measured with {common.describe_environment(environment)}.",
            table(points),
            verdicts,
        ]
    )
    print("\n" + text)
    result: dict[str, Any] = {
        "benchmark": "memory_scaling",
        "command": command,
        "environment": environment,
        "net": problem.description,
        "available_bytes": memory,
        "wall_seconds": time.perf_counter() - start,
        "laws": found,
        "points": [asdict(point) for point in points],
    }
    if arguments.out is not None:
        common.write_json(arguments.out / "memory_scaling.json", result)
        common.draw("memory_scaling", result, arguments.out / "memory_scaling.png")
    if not arguments.no_readme:
        common.write_section("memory_scaling", text)
    return 0


if __name__ == "__main__":
    sys.exit(main())
