"""What does one inner step leave behind until the outer backward, beyond carries?

    python benchmarks/residue.py            # 20,000 steps of a 2-parameter model, N=141; prints JSON
    python benchmarks/residue.py --quick    # a smoke test with 1,000 steps; writes nothing

Two fresh processes do the same loop. One asks tracemalloc, which sees every Python object and nothing else; the other
asks the operating system for the resident size, which also sees autograd's nodes and tensors' storages (and
tracemalloc's own tables, were it on: hence two). Growth is read when the loop has ended and at its largest during the
backward, and divided by the steps, so the carries of 283 tiny steps are counted as residue too. That the backward
through a chain of this length ends without a recursion error is part of the answer.
"""

from __future__ import annotations

import argparse
import gc
import json
import multiprocessing
import sys
import threading
import time
import tracemalloc
from pathlib import Path
from typing import Any

import common
import psutil
import torch
from torch import nn

TARGET = 6_000  # bytes per step, of Python by tracemalloc and of the process by its resident size
KEYS = ("bytes_per_step_after_loop", "bytes_per_step_peak_in_backward")


class Watch:
    """Largest resident size (or traced memory) while a block runs, sampled every 10 ms."""

    def __init__(self, how: str) -> None:
        self.how, self.peak, self.process = how, 0, psutil.Process()
        self.stop = threading.Event()
        self.thread = threading.Thread(target=self._sample, daemon=True)

    def read(self) -> int:
        """The size now."""
        if self.how == "tracemalloc":
            return tracemalloc.get_traced_memory()[0]
        return int(self.process.memory_info().rss)

    def _sample(self) -> None:
        while not self.stop.wait(0.01):
            self.peak = max(self.peak, self.read())

    def __enter__(self) -> Watch:
        self.peak = self.read()
        self.thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self.stop.set()
        self.thread.join()
        self.peak = max(self.peak, self.read())


def loop(steps: int, spacing: int, watch: Watch | None) -> dict[str, Any]:
    """Train a line of two parameters and differentiate with respect to its start and the learning rate."""
    import lowmem_higher

    torch.manual_seed(0)
    model = nn.Linear(1, 1)
    inputs, targets = torch.randn(4, 1), torch.randn(4, 1)
    optimizer = torch.optim.SGD(model.parameters(), lr=1e-5, momentum=0.5)  # far from converged after all steps
    learning_rate = torch.tensor(1e-5, requires_grad=True)
    gc.collect()
    before = watch.read() if watch else 0
    start = time.perf_counter()
    with lowmem_higher.innerloop_ctx(
        model,
        optimizer,
        copy_initial_weights=False,
        override={"lr": [learning_rate]},
        checkpoint_every=spacing,
    ) as (fmodel, diffopt):
        for _ in range(steps):
            diffopt.step(nn.functional.mse_loss(fmodel(inputs), targets))
        outer_loss = nn.functional.mse_loss(fmodel(inputs), targets)
        loop_seconds = time.perf_counter() - start
        gc.collect()
        after_loop = watch.read() if watch else 0
        start = time.perf_counter()
        if watch:
            with watch:
                gradients = torch.autograd.grad(outer_loss, [*model.parameters(), learning_rate])
        else:
            gradients = torch.autograd.grad(outer_loss, [*model.parameters(), learning_rate])
    backward_seconds = time.perf_counter() - start
    report = diffopt.report.as_dict()
    del fmodel, diffopt, outer_loss
    gc.collect()
    norm = float(torch.cat([gradient.flatten() for gradient in gradients]).norm())
    if not norm > 0.0:
        raise RuntimeError(f"the gradient's norm is {norm}: nothing was differentiated")
    return {
        "bytes_per_step_after_loop": (after_loop - before) / steps,
        "bytes_per_step_peak_in_backward": ((watch.peak if watch else 0) - before) / steps,
        "bytes_left_after_freeing": (watch.read() if watch else 0) - before,
        "loop_seconds": loop_seconds,
        "backward_seconds": backward_seconds,
        "gradient_norm": norm,
        "first_order_runs": report["first_order_runs"],
        "second_order_runs": report["second_order_runs"],
        "checkpoints_peak": report["checkpoints_peak"],
        "carry_bytes": report["carry_bytes"],
    }


def measure(how: str, steps: int, spacing: int) -> dict[str, Any]:
    """What one process does: a short loop for everything that is made once, then the measured one."""
    torch.set_num_threads(1)
    loop(min(300, steps), spacing, None)  # a trace is made too
    if how == "tracemalloc":
        tracemalloc.start()
    return loop(steps, spacing, Watch(how))


def section(result: dict[str, Any]) -> str:
    """What the README shows."""
    lines = [
        "| bytes per step | after the loop | peak in the backward |",
        "|---|---|---|",
    ]
    for how, name in (("tracemalloc", "Python objects (tracemalloc)"), ("resident", "process (resident size)")):
        after, peak = (result[how][key] for key in KEYS)
        lines.append(f"| {name} | {after:,.0f} | {peak:,.0f} |")
    resident = result["resident"]
    return "\n\n".join(
        [
            f"`{result['command']}`: {result['steps']:,} steps of a 2-parameter model, N={result['checkpoint_every']}.",
            f"Measured with {common.describe_environment(result['environment'])}.",
            "\n".join(lines),
            f"At most {TARGET:,} bytes per step: {result['target'].replace('missed', '**missed**')}. Backward without "
            f"a recursion error, {resident['first_order_runs']:,} first-order runs (loop included), "
            f"{resident['second_order_runs']:,} second-order runs, {resident['loop_seconds']:.0f} s for the loop and "
            f"{resident['backward_seconds']:.0f} s for the backward.",
        ]
    )


def parse(argv: list[str] | None) -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(
        description="memory that one inner step leaves behind", formatter_class=argparse.ArgumentDefaultsHelpFormatter
    )
    parser.add_argument("--steps", type=int, default=20_000)
    parser.add_argument("--checkpoint-every", type=int, default=141)
    parser.add_argument("--quick", action="store_true", help="smoke test: 1,000 steps, N=31, writes only with --out")
    parser.add_argument("--out", type=Path, help="folder for the JSON; benchmarks/results when not --quick")
    parser.add_argument("--no-readme", action="store_true", help="leave the table of benchmarks/README.md as it is")
    arguments = parser.parse_args(argv)
    if arguments.quick:
        arguments.steps, arguments.checkpoint_every, arguments.no_readme = 1000, 31, True
    elif arguments.out is None:
        arguments.out = common.RESULTS
    if arguments.steps < 1 or arguments.checkpoint_every < 1:
        parser.error("--steps and --checkpoint-every are at least 1")
    return arguments


def main(argv: list[str] | None = None) -> int:
    """Measure in fresh processes, print, save."""
    arguments = parse(argv)
    result: dict[str, Any] = {
        "benchmark": "residue",
        "command": ("python benchmarks/residue.py " + " ".join(sys.argv[1:] if argv is None else argv)).strip(),
        "environment": common.environment(torch.device("cpu")),
        "steps": arguments.steps,
        "checkpoint_every": arguments.checkpoint_every,
    }
    context = multiprocessing.get_context("spawn")
    for how in ("tracemalloc", "resident"):
        with context.Pool(1) as pool:
            result[how] = pool.apply(measure, (how, arguments.steps, arguments.checkpoint_every))
    worst = max(result[how][key] for how in ("tracemalloc", "resident") for key in KEYS)
    result["worst_bytes_per_step"] = worst
    result["target_bytes_per_step"] = TARGET
    result["target"] = "met" if worst <= TARGET else "missed"
    print(json.dumps(result, indent=1))
    if arguments.out is not None:
        common.write_json(arguments.out / "residue.json", result)
    if not arguments.no_readme:
        common.write_section("residue", section(result))
    return 0


if __name__ == "__main__":
    sys.exit(main())
