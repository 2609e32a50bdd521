"""How far from the gradient in float64 is a float32 one, and how far is that of code that rounds otherwise?

    python benchmarks/rounding.py            # the 4-conv net, 20 steps; ten minutes, most of them of the compiler
    python benchmarks/rounding.py --quick    # a smoke test with the tiny net, 4 steps; writes nothing

A net with ReLU and max pooling has kinks. Where rounding moves a step across one, the gradient of what follows is
another one, so two correct programs that round otherwise differ by much more than rounding. Each rival runs on the same
weights and batches in float64 and in float32; the reference is the full unroll in float64. How far rounding can lead is
measured by full unrolls whose convolutions and products are off by a last bit of float32, up, down or not, at random.
"""

from __future__ import annotations

import argparse
import copy
import itertools
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
from torch import Tensor, nn

DRAWS = 8
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


def gradient(rival: Rival | Setting, problem: Problem, steps: int, *, warm: bool = True) -> Tensor:
    """The outer gradient; if `warm`, of a second run: the first one has traced and compiled."""
    before = torch.get_default_dtype()
    torch.set_default_dtype(problem.held_out[0].dtype)  # that of the learning rate
    try:
        if warm:
            common.run(rival, problem, steps)
        return common.run(rival, problem, steps).gradient.double()
    finally:
        torch.set_default_dtype(before)


class LastBit(nn.Module):
    """Moves each number by the last bit of float32, or not, at random."""

    def forward(self, inputs: Tensor) -> Tensor:
        return inputs * (1 + torch.randint(-1, 2, inputs.shape) * torch.finfo(torch.float32).eps)


def rounded_otherwise(problem: Problem, steps: int, draw: int) -> Tensor:
    """The gradient of a full unroll whose layers with weights round otherwise."""
    model = copy.deepcopy(problem.model)
    parts = [[part, LastBit()] if isinstance(part, (nn.Conv2d, nn.Linear)) else [part] for part in model.body]
    model.body = nn.Sequential(*itertools.chain.from_iterable(parts))
    torch.manual_seed(draw)
    return gradient(UNROLL, replace(problem, model=model), steps, warm=False)


def table(rows: list[dict[str, Any]]) -> str:
    """A row a rival."""
    lines = ["| rival | float64, to the unroll in float64 | float32, to the unroll in float64 |", "|---|---|---|"]
    for row in rows:
        cells = [
            f"{min(row[name]):.1e} to {max(row[name]):.1e}" if len(row[name]) > 1 else f"{row[name][0]:.0e}"
            for name in ("float64", "float32")
        ]
        lines.append(f"| {row['rival']} | {' | '.join(cells)} |")
    return "\n".join(lines)


def row_of(rival: str, found: dict[str, list[Tensor]], reference: Tensor) -> dict[str, Any]:
    """The relative differences of gradients."""
    row: dict[str, Any] = {"rival": rival}
    for name, gradients in found.items():
        row[name] = [common.relative_difference(one, reference) for one in gradients]
    print(row, file=sys.stderr, flush=True)
    return row


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
    inputs = {"float64": double, "float32": single}
    for rival in RIVALS:
        found = {name: [gradient(rival, problem, steps)] for name, problem in inputs.items()}
        rows.append(row_of(rival.name, found, reference))
    draws = {
        name: [rounded_otherwise(problem, steps, draw) for draw in range(DRAWS)] for name, problem in inputs.items()
    }
    rows.append(row_of(f"full unroll, off by last bits, {DRAWS} draws", draws, reference))
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
