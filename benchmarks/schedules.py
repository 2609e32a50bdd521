"""How many runs of a step does a schedule cost, against the optimum and against other rules with as many slots?

    python benchmarks/schedules.py            # the tables of benchmarks/README.md; about 10 minutes
    python benchmarks/schedules.py --quick    # a smoke test; writes nothing

Integers only: nothing is trained. Counted are first-order runs of a step, the loop's own included, per inner step
beyond the loop (0 would be a carry kept at every step). The second-order runs are one a step for all.
"""

from __future__ import annotations

import argparse
import functools
import json
import math
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import common
import torch

from lowmem_higher.schedule import Bounded, optimal_runs, reversal_runs

SLOTS = (*range(1, 21), 30, 100)
COMPARED = ((100, 10), (1000, 10), (1000, 30), (1000, 100), (10_000, 10), (10_000, 30), (10_000, 100))


def ended(held: list[int], steps: int, slots: int) -> int:
    """All first-order runs if the loop ended after `steps` steps with these carries held."""
    held = list(held)
    surplus = Bounded(slots).surplus(steps, held)
    if surplus is not None:
        held.remove(surplus)
    ends = [*held[1:], steps]
    gaps = [end - start for start, end in zip(held, ends, strict=True)]
    gaps[-1] -= 1  # the carry of the newest step is at hand
    return steps + sum(reversal_runs(gap, slots - place) for place, gap in enumerate(gaps))


def online(slots: int, longest: int) -> dict[str, Any]:
    """The worst number of steps for a loop of unknown length, over all up to `longest`."""
    schedule, held = Bounded(slots), list[int]()
    optimal_until = (slots + 1) * (slots + 2) // 2
    worst, worst_steps, worst_short = 1.0, 1, 1.0
    for steps in range(1, longest + 1):
        keep, dropped = schedule.offered(steps - 1, held)
        if dropped is not None:
            held.remove(dropped)
        if keep:
            held.append(steps - 1)
        ratio = ended(held, steps, slots) / optimal_runs(steps, slots)
        if ratio > worst:
            worst, worst_steps = ratio, steps
        if steps <= optimal_until:
            worst_short = max(worst_short, ratio)
    return {"slots": slots, "worst": worst, "at_steps": worst_steps, "worst_short": worst_short, "short": optimal_until}


def doubling(steps: int, slots: int) -> int:
    """A known rule for unknown length: keep every d-th carry; when all slots are full drop every other one."""
    distance, held = 1, list[int]()
    for step in range(steps):
        if step % distance == 0:
            if len(held) == slots:
                distance *= 2
                held = [time for time in held if time % distance == 0]
            if step % distance == 0:
                held.append(step)
    return ended(held, steps, slots)


def splitting(part_of: Callable[[int, int], int]) -> Callable[[int, int], int]:
    """A rule for known length: advance `part_of(steps, slots)`, hold a carry, go on with the rest and one slot less."""

    @functools.cache
    def runs(steps: int, slots: int) -> int:
        if steps <= 1:
            return 0
        if slots == 1:
            return steps * (steps - 1) // 2
        part = min(max(part_of(steps, slots), 1), steps - 1)
        return part + runs(steps - part, slots - 1) + runs(part, slots)

    return lambda steps, slots: runs(steps, slots) + 1


RULES: dict[str, Callable[[int, int], int]] = {
    "optimum, T known (`checkpoints=s, steps=T`)": optimal_runs,
    "T unknown (`checkpoints=s`)": lambda steps, slots: _online_runs(steps, slots),
    "equal gaps (the sqrt rule, at s = sqrt(T))": splitting(lambda steps, slots: math.ceil(steps / slots)),
    "halving": splitting(lambda steps, slots: steps // 2),
    "thirds (3-ary)": splitting(lambda steps, slots: steps // 3),
    "T unknown, doubling the gap": doubling,
}


def _online_runs(steps: int, slots: int) -> int:
    schedule, held = Bounded(slots), list[int]()
    for time_ in range(steps):
        keep, dropped = schedule.offered(time_, held)
        if dropped is not None:
            held.remove(dropped)
        if keep:
            held.append(time_)
    return ended(held, steps, slots)


def section(result: dict[str, Any]) -> str:
    """What the README shows."""
    cases = " | ".join(f"T={steps:,}, s={slots}" for steps, slots in COMPARED)
    rules = [f"| rule | {cases} |", "|---" * (1 + len(COMPARED)) + "|"]
    for name, row in result["rules"].items():
        rules.append(f"| {name} | " + " | ".join(f"{value:.3f}" for value in row) + " |")
    rows = [
        f"| {row['slots']} | {row['at_steps']:,} | {row['worst']:.4f} "
        f"| {row['worst_short']:.4f} (T <= {row['short']:,}) |"
        for row in result["online"]
    ]
    head = ["| s | worst T | times the optimum | up to (s + 1)(s + 2) / 2 steps |", "|---|---|---|---|"]
    worst = max(row["worst"] for row in result["online"])
    return "\n\n".join(
        [
            f"`{result['command']}`: {result['seconds']:.0f} s. First-order runs per step, beyond the loop:",
            "\n".join(rules),
            f"A loop of unknown length (`checkpoints=s`), over all T up to {result['longest']:,}, against the optimum "
            f"for known T: at most {worst:.4f} times as many first-order runs.",
            "\n".join([*head, *rows]),
        ]
    )


def main(argv: list[str] | None = None) -> int:
    """Count, print, save."""
    parser = argparse.ArgumentParser(
        description="runs that a schedule costs", formatter_class=argparse.ArgumentDefaultsHelpFormatter
    )
    parser.add_argument("--longest", type=int, default=100_000, help="loops of unknown length: all T up to this")
    parser.add_argument("--quick", action="store_true", help="smoke test: T up to 500, writes only with --out")
    parser.add_argument("--out", type=Path, help="folder for the JSON; benchmarks/results when not --quick")
    parser.add_argument("--no-readme", action="store_true", help="leave the table of benchmarks/README.md as it is")
    arguments = parser.parse_args(argv)
    if arguments.longest < 1:
        parser.error("--longest is at least 1")
    if arguments.quick:
        arguments.longest, arguments.no_readme = 500, True
    elif arguments.out is None:
        arguments.out = common.RESULTS
    sys.setrecursionlimit(20_000)
    start = time.perf_counter()
    result: dict[str, Any] = {
        "benchmark": "schedules",
        "command": ("python benchmarks/schedules.py " + " ".join(sys.argv[1:] if argv is None else argv)).strip(),
        "environment": common.environment(torch.device("cpu")),
        "longest": arguments.longest,
        "rules": {name: [rule(steps, slots) / steps - 1 for steps, slots in COMPARED] for name, rule in RULES.items()},
        "online": [],
    }
    for slots in SLOTS:
        result["online"].append(online(slots, arguments.longest))
        print(json.dumps(result["online"][-1]), flush=True)
    result["seconds"] = time.perf_counter() - start
    print(json.dumps(result["rules"], indent=1))
    if arguments.out is not None:
        common.write_json(arguments.out / "schedules.json", result)
    if not arguments.no_readme:
        common.write_section("schedules", section(result))
    return 0


if __name__ == "__main__":
    sys.exit(main())
