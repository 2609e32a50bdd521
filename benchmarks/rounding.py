"""How far from the gradient in float64 is a float32 one, and how far is that of code that rounds otherwise?

    python benchmarks/rounding.py            # the 4-conv net, 20 steps; ten minutes, most of them of the compiler
    python benchmarks/rounding.py --quick    # a smoke test with the tiny net, 4 steps; writes nothing

A net with ReLU and max pooling has kinks. Where rounding moves a step across one, the gradient of what follows is
another one, so two correct programs that round otherwise differ by much more than rounding. Each rival runs on the same
weights and batches in float64 and in float32; the reference is the full unroll in float64.
"""

from __future__ import annotations

import argparse
import copy
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import common
import problems
import torch
from common import HIGHER, NATIVE_TEN, UNROLL, Rival, Setting
from field import SCAN_COMPILED, SCAN_HELD, SCAN_TRACED
from problems import Problem
from torch import Tensor

RIVALS: tuple[Rival | Setting, ...] = (UNROLL, HIGHER, NATIVE_TEN, SCAN_TRACED, SCAN_COMPILED, SCAN_HELD)


def in_double(problem: Problem) -> Problem:
    """The same weights and batches in float64."""

    def double(batch: tuple[Tensor, Tensor]) -> tuple[Tensor, Tensor]:
        inputs, targets = batch
        return inputs.double(), targets.double() if targets.is_floating_point() else targets

    return replace(
        problem,
        model=copy.deepcopy(problem.model).double(),
        batches=list(map(double, problem.batches)),
        held_out=double(problem.held_out),
    )


def gradient(rival: Rival | Setting, problem: Problem, steps: int) -> Tensor:
    """The outer gradient, of a second run: the first one has traced and compiled."""
    before = torch.get_default_dtype()
    torch.set_default_dtype(problem.held_out[0].dtype)  # that of the learning rate
    try:
        common.run(rival, problem, steps)
        return common.run(rival, problem, steps).gradient.double()
    finally:
        torch.set_default_dtype(before)


def table(rows: list[dict[str, Any]]) -> str:
    """A row a rival."""
    lines = ["| rival | float64, to the unroll in float64 | float32, to the unroll in float64 |", "|---|---|---|"]
    lines += [f"| {row['rival']} | {row['float64']:.0e} | {row['float32']:.1e} |" for row in rows]
    return "\n".join(lines)


def main(argv: list[str] | None = None) -> int:
    """Measure, print, save."""
    parser = argparse.ArgumentParser(description="gradients in float32 against float64")
    parser.add_argument("--steps", type=int, default=20)
    parser.add_argument("--quick", action="store_true", help="smoke test: tiny net, T=4, writes nothing")
    parser.add_argument("--out", type=Path, default=common.RESULTS, help="folder for the JSON")
    parser.add_argument("--no-readme", action="store_true", help="leave the table of benchmarks/README.md as it is")
    arguments = parser.parse_args(argv)
    steps = 4 if arguments.quick else arguments.steps
    torch.set_num_threads(1)
    environment = common.environment(torch.device("cpu"))
    single = problems.tiny() if arguments.quick else problems.conv4()
    double = in_double(single)
    reference = gradient(UNROLL, double, steps)
    rows = []
    for rival in RIVALS:
        found = {"float64": gradient(rival, double, steps), "float32": gradient(rival, single, steps)}
        differences = {name: common.relative_difference(one, reference) for name, one in found.items()}
        rows.append({"rival": rival.name, **differences})
        print(rows[-1], file=sys.stderr, flush=True)
    command = " ".join(["python benchmarks/rounding.py", *(sys.argv[1:] if argv is None else argv)])
    text = f"`{command}`: {single.description}, T={steps}.\n\nMeasured with {common.describe_environment(environment)}."
    print(f"{text}\n\n{table(rows)}")
    if not arguments.quick:
        result = {"benchmark": "rounding", "command": command, "environment": environment, "steps": steps, "rows": rows}
        common.write_json(arguments.out / "rounding.json", result)
        if not arguments.no_readme:
            common.write_section("rounding", f"{text}\n\n{table(rows)}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
