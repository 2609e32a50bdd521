"""How do peak memory and passes grow with the number of inner steps, up to 100,000, under every setting?

    python benchmarks/scaling.py                      # all settings; about 40 minutes on an idle core
    python benchmarks/scaling.py --settings s=10 --steps 200 10000 --resume    # some cells, added to those saved
    python benchmarks/scaling.py --quick              # a smoke test; writes nothing

Peak live bytes (`lowmem_higher.testing.live_bytes`) of loop and outer backward of a net so small that 100,000 steps
end; weights of the model and data are made before and do not count. Counted as well: runs of a step, by the library,
and calls of the model, replays included, by the model itself.

The rival besides `higher` is what one writes by hand: pure steps by `torch.func.functional_call` and
`torch.autograd.grad(create_graph=True)`, sqrt(T) segments of them under `torch.utils.checkpoint`. Its form
without re-entrance recomputes a segment for each inner gradient in it, already in the loop, and holds what it
recomputed: more memory than no checkpoint at all. The older re-entrant form works, with `.backward()` only.

Rules. A setting runs to T=10,000; to T=100,000 where its memory grows no faster than sqrt(T), with at most three
first-order runs per step, and T is not told (told, it is the same to 2 %). The form without re-entrance takes time like
T^1.5 and ends at T=1,000. `higher`, N=10 and the journal grow with T: their last point lies on the line through the two
before and is drawn hollow.

Each cell is saved when it is done, and `--resume` goes on from there.

Checked against the laws: `peak(T=10,000) <= 1.1 peak(T=200)` at ten carries; `(s + 3) |carry| + 1.1 G` for any T; of
stored carries `5 |carry| + 1.1 G` on the device; for N=sqrt(T) `(ceil(T/N) + N) |carry| + 1.1 G`, with 32 B beside each
carry. First-order runs as `lowmem_higher.schedule.optimal_runs` says where T is told, at most 1.14 times as many where
not; T second-order runs.
"""

from __future__ import annotations

import argparse
import gc
import json
import math
import sys
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import common
import problems
import torch
from common import Setting
from problems import CountedModel, Problem
from torch import Tensor
from torch.func import functional_call
from torch.utils.checkpoint import checkpoint

from lowmem_higher.schedule import optimal_runs
from lowmem_higher.testing import live_bytes

HIGHER = "higher"
BY_HAND, NOT_REENTRANT = "by hand", "by hand, not re-entrant"
GROWS = (HIGHER, "N=10", "journal, N=sqrt(T)")  # in proportion to T
TO_THE_END = (BY_HAND, "N=sqrt(T)", "s=100", "disk, s=100")
MOMENTUM = 0.9
MARK = 32  # bytes beside a kept carry, for the check of its segment: float64 sum and norm of weights and momentum


@dataclass
class Cell:
    """One setting at one T."""

    setting: str
    steps: int
    peak_bytes: int
    computed: bool
    seconds: float | None = None
    model_calls: int | None = None
    gradient_norm: float | None = None
    difference: float | None = None  # relative, to the gradient of the first setting that was run at this T
    first_order_runs: int | None = None
    second_order_runs: int | None = None
    carry_bytes: int | None = None
    stored_peak_bytes: int | None = None


def by_hand(problem: Problem, steps: int, *, reentrant: bool) -> Tensor:
    """The gradient of the outer loss with respect to initial weights and learning rate, flat."""
    model = problem.model
    names, initial = zip(*model.named_parameters(), strict=True)
    length = common.square_root(steps)

    def segment(start: int, rate: Tensor, *state: Tensor) -> tuple[Tensor, ...]:
        with torch.enable_grad():  # the re-entrant form runs without
            if not state[0].requires_grad:
                state = tuple(tensor.detach().requires_grad_() for tensor in state)
            weights, momenta = list(state[: len(names)]), list(state[len(names) :])
            for step in range(start, min(start + length, steps)):
                inputs, targets = problem.batches[step % problems.NUMBER_OF_BATCHES]
                outputs = functional_call(model, dict(zip(names, weights, strict=True)), (inputs,))
                grads = torch.autograd.grad(problem.loss(outputs, targets), weights, create_graph=True)
                momenta = [MOMENTUM * old + grad for old, grad in zip(momenta, grads, strict=True)]
                weights = [old - rate * momentum for old, momentum in zip(weights, momenta, strict=True)]
        return (*weights, *momenta)

    rate = torch.tensor(problem.learning_rate, requires_grad=True)
    state = (*initial, *(torch.zeros_like(weight) for weight in initial))
    for start in range(0, steps, length):
        state = checkpoint(segment, start, rate, *state, use_reentrant=reentrant)
    outputs = functional_call(model, dict(zip(names, state[: len(names)], strict=True)), (problem.held_out[0],))
    problem.loss(outputs, problem.held_out[1]).backward()
    gradients = [tensor.grad for tensor in (*initial, rate)]
    for weight in initial:
        weight.grad = None
    return torch.cat([torch.zeros(0) if gradient is None else gradient.flatten() for gradient in gradients])


def one_step(problem: Problem) -> int:
    """G: the peak live bytes of one step with its graph and the gradient through it, by hand."""
    names, initial = zip(*problem.model.named_parameters(), strict=True)
    weights = [weight.detach().requires_grad_() for weight in initial]
    momenta = [torch.zeros_like(weight, requires_grad=True) for weight in weights]
    rate = torch.tensor(problem.learning_rate, requires_grad=True)
    cotangents = [torch.ones_like(weight) for weight in weights] * 2
    inputs, targets = problem.batches[0]
    with live_bytes() as memory:
        outputs = functional_call(problem.model, dict(zip(names, weights, strict=True)), (inputs,))
        grads = torch.autograd.grad(problem.loss(outputs, targets), weights, create_graph=True)
        after = [MOMENTUM * old + grad for old, grad in zip(momenta, grads, strict=True)]
        new = [old - rate * momentum for old, momentum in zip(weights, after, strict=True)]
        torch.autograd.grad([*new, *after], [*weights, *momenta, rate], cotangents)
    return memory.peak


def measure(setting: Setting | str, problem: Problem, steps: int, references: dict[int, Tensor]) -> Cell:
    """A measured cell; its gradient becomes the reference of this T, or is compared with it."""
    gc.collect()
    if isinstance(setting, str):
        calls, start = CountedModel.calls, time.perf_counter()
        with live_bytes() as memory:
            gradient = by_hand(problem, steps, reentrant=setting == BY_HAND)
        seconds = time.perf_counter() - start
        cell = Cell(setting, steps, memory.peak, False, seconds, CountedModel.calls - calls)
    else:
        peak, done = common.measure_peak(setting, problem, steps)
        gradient = done.gradient
        cell = Cell(
            setting.name, steps, peak, False, done.seconds, done.model_calls, None, None,
            *(done.report.get(key) for key in (
                "first_order_runs", "second_order_runs", "carry_bytes", "stored_peak_bytes"
            )),
        )  # fmt: skip
    cell.gradient_norm = float(gradient.norm())
    if not (math.isfinite(cell.gradient_norm) and cell.gradient_norm > 0):
        raise RuntimeError(f"the gradient's norm is {cell.gradient_norm}: nothing was differentiated")
    cell.difference = common.relative_difference(gradient, references.setdefault(steps, gradient))
    return cell


def longest(setting: str) -> int:
    """The largest T that is run; see the rules."""
    return 1000 if setting == NOT_REENTRANT else 100_000 if setting in TO_THE_END else 10_000


def computed(setting: str, steps: int, cells: list[Cell]) -> Cell | None:
    """A cell on the line through the two before, for a setting that grows with T."""
    known = {cell.steps: cell.peak_bytes for cell in cells if cell.setting == setting and not cell.computed}
    if setting not in GROWS or len(known) < 2:
        return None
    return Cell(setting, steps, common.extrapolate(known, steps), computed=True)


def laws(cells: list[Cell], graph: int) -> dict[str, dict[str, float]]:
    """What the design promises, next to what was found; ratios, so that the largest is the worst."""
    found: dict[str, dict[str, float]] = {}

    def law(name: str, values: list[float], most: float) -> None:
        if values:
            found[name] = {"found": max(values), "at most": most}

    done = {(cell.setting, cell.steps): cell for cell in cells if not cell.computed and cell.carry_bytes}
    ten = {steps: cell.peak_bytes for (name, steps), cell in done.items() if name == "s=10"}
    if {200, 10_000} <= ten.keys():
        law("s=10: peak(T=10,000) / peak(T=200)", [ten[10_000] / ten[200]], 1.1)
    for slots in (10, 30, 100):
        for name, told in ((f"s={slots}", False), (f"s={slots}, T known", True)):
            mine = [cell for (setting, _), cell in done.items() if setting == name]
            peaks = [cell.peak_bytes / ((slots + 3) * (cell.carry_bytes or 0) + 1.1 * graph) for cell in mine]
            law(f"{name}: peak / ((s + 3) |carry| + 1.1 G)", peaks, 1.0)
            runs = [(cell.first_order_runs or 0) / optimal_runs(cell.steps, slots) for cell in mine]
            law(f"{name}: first-order runs / optimum", runs, 1.0 if told else 1.14)
    for name in ("host, s=100", "disk, s=100"):
        # On a CPU the host's memory is the device's: what is stored there is live, and taken off.
        peaks = [
            (cell.peak_bytes - (cell.stored_peak_bytes or 0) * name.startswith("host"))
            / (5 * (cell.carry_bytes or 0) + 1.1 * graph)
            for (setting, _), cell in done.items() if setting == name
        ]  # fmt: skip
        law(f"{name}: peak on the device / (5 |carry| + 1.1 G)", peaks, 1.0)
    root = [cell for (setting, _), cell in done.items() if setting == "N=sqrt(T)"]
    carries = [common.carries_of(cell.steps, common.square_root(cell.steps)) for cell in root]
    law(
        f"N=sqrt(T): peak / ((ceil(T/N) + N) (|carry| + {MARK} B) + 1.1 G)",
        [
            cell.peak_bytes / (count * ((cell.carry_bytes or 0) + MARK) + 1.1 * graph)
            for cell, count in zip(root, carries, strict=True)
        ],
        1.0,
    )
    law(
        "all settings: second-order runs / T", [(cell.second_order_runs or 0) / cell.steps for cell in done.values()], 1
    )
    return found


def passes(cell: Cell) -> float:
    """First-order runs and second-order runs, or calls of the model where nobody counts runs; per step."""
    if cell.first_order_runs is not None and cell.second_order_runs is not None:
        return (cell.first_order_runs + cell.second_order_runs) / cell.steps
    return (cell.model_calls or 0) / cell.steps


def table(cells: list[Cell], show: Callable[[Cell], str]) -> str:
    """Settings down, T across."""
    columns = sorted({cell.steps for cell in cells})
    lines = ["| | " + " | ".join(f"T={steps:,}" for steps in columns) + " |", "|---|" + "---|" * len(columns)]
    for setting in dict.fromkeys(cell.setting for cell in cells):
        mine = {cell.steps: show(cell) for cell in cells if cell.setting == setting}
        lines.append(f"| {setting} | " + " | ".join(mine.get(steps, "") for steps in columns) + " |")
    return "\n".join(lines)


def section(result: dict[str, Any], cells: list[Cell]) -> str:
    """What the README shows."""
    differences = [cell.difference for cell in cells if cell.difference is not None]
    worst = f"differ by at most {max(differences):.0e} of their norm" if differences else "were not compared"
    verdicts = "\n".join(
        f"- {name}: {law['found']:.4g}, at most {law['at most']:g}: "
        f"{'met' if law['found'] <= law['at most'] else '**missed**'}"
        for name, law in result["laws"].items()
    )
    return "\n\n".join(
        [
            f"`{result['command']}`: {result['net']}, float32, SGD with momentum 0.9; one step's graph G "
            f"{common.format_bytes(result['graph_bytes'])}, a carry {common.format_bytes(result['carry_bytes'])}.",
            f"Measured with {common.describe_environment(result['environment'])}.",
            "Peak live bytes (~: computed):",
            table(cells, lambda cell: f"{'~' if cell.computed else ''}{common.format_bytes(cell.peak_bytes)}"),
            "Passes per inner step, first-order and second-order together, the loop's included:",
            table(cells, lambda cell: "" if cell.computed else f"{passes(cell):.2f}"),
            f"Gradients of settings with the same T {worst}, in float32.",
            "Seconds, slowed down by the counting of live bytes:",
            table(cells, lambda cell: "" if cell.seconds is None else f"{cell.seconds:.1f}"),
            verdicts,
        ]
    )


def parse(argv: list[str] | None, names: list[str]) -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(
        description="peak memory and passes against inner steps", formatter_class=argparse.ArgumentDefaultsHelpFormatter
    )
    parser.add_argument("--steps", nargs="+", type=int, default=[100, 200, 1000, 10_000, 100_000], help="inner steps T")
    parser.add_argument("--settings", nargs="+", choices=names, default=names, metavar="NAME", help=", ".join(names))
    parser.add_argument("--resume", action="store_true", help="keep the cells that are saved, run the others")
    parser.add_argument("--quick", action="store_true", help="smoke test: T up to 50, writes only with --out")
    parser.add_argument("--out", type=Path, help="folder for JSON and picture; benchmarks/results when not --quick")
    parser.add_argument("--no-readme", action="store_true", help="leave the tables of benchmarks/README.md as they are")
    arguments = parser.parse_args(argv)
    if arguments.quick:
        arguments.steps, arguments.no_readme = [25, 50], True
    elif arguments.out is None:
        arguments.out = common.RESULTS
    if min(arguments.steps) < 1:
        parser.error("--steps are at least 1")
    return arguments


def main(argv: list[str] | None = None) -> int:
    """Measure, print, save."""
    ways: dict[str, Setting | str] = {HIGHER: Setting(HIGHER, lambda steps: {}, library="higher")}
    if find_spec("higher") is None:
        del ways[HIGHER]
        print("higher is not installed: left out (pip install higher)", file=sys.stderr)
    ways |= {NOT_REENTRANT: NOT_REENTRANT, BY_HAND: BY_HAND}
    ways |= {setting.name: setting for setting in common.SETTINGS if setting.name != "full unroll"}
    arguments = parse(argv, list(ways))
    problem = problems.one_layer()
    saved = None if arguments.out is None else arguments.out / "scaling.json"
    cells: list[Cell] = []
    references: dict[int, Tensor] = {}
    if arguments.resume and saved is not None and saved.exists():
        cells = [Cell(**cell) for cell in json.loads(saved.read_text())["cells"] if not cell["computed"]]
    result: dict[str, Any] = {
        "benchmark": "scaling",
        "command": ("python benchmarks/scaling.py " + " ".join(sys.argv[1:] if argv is None else argv)).strip(),
        "environment": common.environment(torch.device("cpu")),
        "net": problem.description,
        "graph_bytes": one_step(problem),
        "carry_bytes": 2 * sum(weight.nbytes for weight in problem.model.parameters()),
    }
    start = time.perf_counter()
    for steps in sorted(set(arguments.steps)):  # all settings at few steps first: what is broken off is worth most
        for name in arguments.settings:
            if any((cell.setting, cell.steps) == (name, steps) for cell in cells):
                continue
            cell = (
                measure(ways[name], problem, steps, references)
                if steps <= longest(name)
                else computed(name, steps, cells)
            )
            if cell is None:
                continue
            cells.append(cell)
            order = list(ways)
            cells.sort(key=lambda cell: (order.index(cell.setting) if cell.setting in ways else -1, cell.steps))
            print(
                f"[{time.perf_counter() - start:.0f} s] {name}, T={steps}: {'~' if cell.computed else ''}"
                f"{common.format_bytes(cell.peak_bytes)}, {passes(cell):.2f} passes per step",
                flush=True,
            )
            result |= {
                "wall_seconds": time.perf_counter() - start,
                "laws": laws(cells, result["graph_bytes"]),
                "cells": [asdict(cell) for cell in cells],
            }
            if saved is not None:
                common.write_json(saved, result)
    print("\n" + section(result, cells))
    if saved is not None:
        common.draw("scaling", result, saved.with_suffix(".png"))
    if not arguments.no_readme:
        common.write_section("scaling", section(result, cells))
    return 0


if __name__ == "__main__":
    sys.exit(main())
