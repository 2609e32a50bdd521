"""How large an inner loop fits on one device: a language model with Adam, and a dataset distilled through 200 steps.

    python benchmarks/gpu_scale.py --device cuda       # full size; needs one GPU of 80 GB
    python benchmarks/gpu_scale.py                     # reduced on a CPU; some minutes
    python benchmarks/gpu_scale.py --quick             # a smoke test; writes nothing

Random data of the right shape, since only memory and time are asked for. The gradient is taken of a held-out loss, for
the language model with respect to one learning rate per step, for the distillation with respect to the images.

    gpt2       12 blocks of 768 units, 12 heads, 1,024 tokens of 50,257, batch 1; reduced: 4 blocks of 128, 64 tokens
    distill    3 convolutions of 128 channels on 100 learned images of 32 x 32 x 3; reduced: 32 channels, 20 images

To beat (their papers' figures, not measured here): JAX needs 52 GB for T=16 of GPT-2 small with Adam on an 80 GB card,
and runs out of memory at T=32; a truncated window of RaT-BPTT on CIFAR-10 takes 16.7 GB.

Peak: of the allocator on CUDA, all of it; of live tensor storages on a CPU, model and data included. Each cell is saved
when it is done.
"""

from __future__ import annotations

import argparse
import gc
import sys
import time
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import common
import torch
from problems import GptBlock, token_loss
from torch import Tensor, nn
from torch.nn import functional as F

import lowmem_higher as higher
from lowmem_higher.testing import live_bytes

SETTINGS: dict[str, dict[str, Any]] = {
    "s=10": {"checkpoints": 10},
    "host, s=30": {"checkpoints": 30, "store": "host"},
    "s=10, mixed, blocks": {"checkpoints": 10, "pullback": "mixed", "blocks": (GptBlock,)},
}
STEPS = {"gpt2": [16, 32, 100, 1000], "distill": [200]}
REDUCED_STEPS = {"gpt2": [16, 32, 100], "distill": [20, 60]}


@dataclass
class Cell:
    """One task under one setting."""

    task: str
    steps: int
    setting: str
    peak_bytes: int | None = None
    carry_bytes: int | None = None
    seconds: float | None = None
    first_order_runs: int | None = None
    failed: str = ""


def gpt2(steps: int, setting: dict[str, Any], device: torch.device, *, reduced: bool) -> higher.Report:
    """Trains a GPT-2 with Adam, and differentiates by the learning rate of each step."""
    width, blocks, heads, length, vocabulary = (128, 4, 4, 64, 512) if reduced else (768, 12, 12, 1024, 50257)
    torch.manual_seed(0)
    layers = [GptBlock(width, heads) for _ in range(blocks)]
    model = nn.Sequential(nn.Embedding(vocabulary, width), *layers, nn.LayerNorm(width), nn.Linear(width, vocabulary))
    model = model.to(device)
    rates = torch.full((steps,), 3e-4, device=device, requires_grad=True)
    tokens = torch.randint(0, vocabulary, (32, length + 1), device=device)
    with higher.innerloop_ctx(model, torch.optim.Adam(model.parameters(), lr=3e-4), **setting) as (fmodel, diffopt):
        for step in range(steps):
            batch = tokens[step % 31 : step % 31 + 1]
            loss = token_loss(fmodel(batch[:, :-1]), batch[:, 1:])
            diffopt.step(loss, override={"lr": [rates[step]]})
        outer = token_loss(fmodel(tokens[31:, :-1]), tokens[31:, 1:])
        (gradient,) = torch.autograd.grad(outer, [rates])
    check(gradient)
    return diffopt.report


def distill(steps: int, setting: dict[str, Any], device: torch.device, *, reduced: bool) -> higher.Report:
    """Trains a convolutional net on learned images, and differentiates by the images."""
    channels, images = (32, 20) if reduced else (128, 100)
    torch.manual_seed(0)
    layers: list[nn.Module] = []
    for before in (3, channels, channels):
        layers += [
            nn.Conv2d(before, channels, 3, padding=1),
            nn.GroupNorm(channels, channels),
            nn.ReLU(),
            nn.AvgPool2d(2),
        ]
    model = nn.Sequential(*layers, nn.Flatten(), nn.Linear(16 * channels, 10)).to(device)
    learned = torch.randn(images, 3, 32, 32, device=device, requires_grad=True)
    labels = torch.arange(images, device=device) % 10
    real, targets = torch.randn(2 * images, 3, 32, 32, device=device), torch.arange(2 * images, device=device) % 10
    optimizer = torch.optim.SGD(model.parameters(), lr=0.01, momentum=0.9)
    with higher.innerloop_ctx(model, optimizer, **setting) as (fmodel, diffopt):
        for _ in range(steps):
            diffopt.step(F.cross_entropy(fmodel(learned), labels))
        (gradient,) = torch.autograd.grad(F.cross_entropy(fmodel(real), targets), [learned])
    check(gradient)
    return diffopt.report


def check(gradient: Tensor) -> None:
    """A gradient that is zero or not finite would be no result."""
    if not (bool(gradient.isfinite().all()) and bool(gradient.norm() > 0)):
        raise RuntimeError(f"the gradient's norm is {float(gradient.norm())}")


TASKS = {"gpt2": gpt2, "distill": distill}


def measure(cell: Cell, setting: dict[str, Any], device: torch.device, *, reduced: bool) -> None:
    """Run one cell; what goes wrong is part of the result."""
    gc.collect()
    common.synchronize(device)
    start = time.perf_counter()
    try:
        if device.type == "cuda":
            torch.cuda.empty_cache()
            torch.cuda.reset_peak_memory_stats(device)
            report = TASKS[cell.task](cell.steps, setting, device, reduced=reduced)
            common.synchronize(device)
            cell.peak_bytes = torch.cuda.max_memory_allocated(device)
        else:
            with live_bytes() as memory:
                report = TASKS[cell.task](cell.steps, setting, device, reduced=reduced)
            cell.peak_bytes = memory.peak
    except (RuntimeError, MemoryError) as error:
        cell.failed = f"{type(error).__name__}: {str(error).splitlines()[0][:90]}"
        return
    cell.seconds = time.perf_counter() - start
    cell.carry_bytes, cell.first_order_runs = report.carry_bytes, report.first_order_runs


def table(cells: list[Cell]) -> str:
    """A line each."""
    lines = ["| task | T | setting | peak | one carry | seconds | first-order runs |", "|---|---|---|---|---|---|---|"]
    for cell in cells:
        start = f"| {cell.task} | {cell.steps} | {cell.setting} |"
        if cell.failed or cell.peak_bytes is None or cell.carry_bytes is None:
            lines.append(f"{start} {cell.failed} ||||")
            continue
        peak, carry = common.format_bytes(cell.peak_bytes), common.format_bytes(cell.carry_bytes)
        lines.append(f"{start} {peak} | {carry} | {cell.seconds:.3g} | {cell.first_order_runs} |")
    return "\n".join(lines)


def main(argv: list[str] | None = None) -> int:
    """Measure, print, save."""
    parser = argparse.ArgumentParser(
        description="scale on one device", formatter_class=argparse.ArgumentDefaultsHelpFormatter
    )
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--tasks", nargs="+", choices=list(TASKS), default=list(TASKS))
    parser.add_argument("--settings", nargs="+", choices=list(SETTINGS), default=list(SETTINGS))
    parser.add_argument("--steps", nargs="+", type=int, help="instead of those of the task")
    parser.add_argument("--reduced", action="store_true", help="small nets; always so on a CPU")
    parser.add_argument("--quick", action="store_true", help="smoke test: T=3, writes only with --out")
    parser.add_argument("--out", type=Path, help="folder for the JSON; benchmarks/results when not --quick")
    parser.add_argument("--no-readme", action="store_true", help="leave the table of benchmarks/README.md as it is")
    arguments = parser.parse_args(argv)
    device = torch.device(arguments.device)
    reduced = arguments.reduced or device.type == "cpu"
    out = arguments.out or (None if arguments.quick else common.RESULTS)
    environment = common.environment(device)
    command = " ".join(["python benchmarks/gpu_scale.py", *(sys.argv[1:] if argv is None else argv)])
    cells: list[Cell] = []
    for task in arguments.tasks:
        for steps in arguments.steps or ([3] if arguments.quick else (REDUCED_STEPS if reduced else STEPS)[task]):
            for name in arguments.settings:
                setting = SETTINGS[name]
                if task == "distill" and "blocks" in setting:
                    setting = {key: value for key, value in setting.items() if key != "blocks"}
                cell = Cell(task, steps, name)
                measure(cell, setting, device, reduced=reduced)
                cells.append(cell)
                print(table([cell]).splitlines()[-1], flush=True)
                result = {
                    "benchmark": "gpu_scale",
                    "command": command,
                    "environment": environment,
                    "reduced": reduced,
                    "cells": [asdict(cell) for cell in cells],
                }
                if out is not None:
                    common.write_json(out / f"gpu_scale_{device.type}.json", result)
    if out is not None and not arguments.no_readme:
        size = "reduced nets" if reduced else "full size"
        measured = f"`{command}`, {size}, measured with {common.describe_environment(environment)}."
        common.write_section("gpu_scale", "\n\n".join([measured, table(cells)]))
    return 0


if __name__ == "__main__":
    sys.exit(main())
