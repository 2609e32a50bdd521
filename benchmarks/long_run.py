"""Does a very long run with files stay flat, at the optimum of passes, and does it know when it will end?

    python benchmarks/long_run.py                   # 100,000 steps of a 3-parameter model in 30 slots, with a run_dir
    python benchmarks/long_run.py --steps 20000
    python benchmarks/long_run.py --quick           # a smoke test with 1,500 steps; writes nothing

One process runs `metagradient`; this one reads the time to go off its bar, samples its resident size and counts its
files, a few times a second. Live bytes are counted in two shorter runs of their own, since counting takes time: they
must not grow with the steps. A short run is compared with the same one without files, to the bit.
"""

from __future__ import annotations

import argparse
import json
import multiprocessing
import os
import re
import subprocess
import sys
import tempfile
import threading
import time
from pathlib import Path
from typing import Any

import common
import psutil
import torch
from torch import Tensor, nn

import lowmem_higher as higher
from lowmem_higher.piece_plan import PiecePlan
from lowmem_higher.schedule import Revolve, optimal_runs
from lowmem_higher.testing import live_bytes

SLOTS = 30
SHORT = 2_000  # steps of the run that is compared with one without files
CLOCK = re.compile(r"\[([\d:]+)<([\d:]+)|, ([\d:]+) elapsed, ([\d:]+) to go")


def measured(steps: int, run_dir: str | None, progress: bool | str = False) -> higher.MetaGradient:
    """A line of three parameters, trained on weighed examples far from convergence."""
    torch.set_num_threads(1)
    torch.manual_seed(0)
    model = nn.Linear(2, 1)
    inputs, targets = torch.randn(64, 8, 2), torch.randn(64, 8, 1)
    weight = torch.zeros(8, 1, requires_grad=True)
    optimizer = torch.optim.SGD(model.parameters(), lr=1e-5, momentum=0.9)

    def loss(fmodel: Any, batch: tuple[Tensor, Tensor], weight: Tensor) -> Tensor:
        x, y = batch
        return (weight.sigmoid() * (fmodel(x) - y).square()).mean()

    return higher.metagradient(
        loss,
        model,
        optimizer,
        lambda t: (inputs[t % 64], targets[t % 64]),
        steps=steps,
        outer=lambda fmodel: (fmodel(inputs[0]) - targets[0]).square().mean(),
        meta=(weight,),
        run_dir=run_dir,
        progress=progress,
        checkpoints=SLOTS,
    )


def child(steps: int, run_dir: str, result: str) -> None:
    """The long run itself."""
    found = measured(steps, run_dir, progress="always")
    values = {**found.report.as_dict(), "gradient": found.meta[0].tolist(), "outer": found.outer.item()}
    Path(result).write_text(json.dumps(values))


def peak_live_bytes(steps: int) -> int:
    """Of a run with files."""
    with tempfile.TemporaryDirectory() as folder:
        measured(50, str(Path(folder, "warm")))
        with live_bytes() as memory:
            measured(steps, str(Path(folder, "run")))
    return memory.peak


def same_bits(steps: int) -> bool:
    """Whether a run with files gives what one without gives."""
    with tempfile.TemporaryDirectory() as folder:
        one, other = measured(steps, None), measured(steps, str(Path(folder, "run")))
    pairs = [(one.outer, other.outer), (one.meta[0], other.meta[0])]
    pairs += [(one.weights[name], other.weights[name]) for name in one.weights]
    pairs += [(one.final_weights[name], other.final_weights[name]) for name in one.final_weights]
    return all(torch.equal(a, b) for a, b in pairs)


def seconds(clock: str) -> int:
    """Of h:mm:ss."""
    total = 0
    for part in clock.split(":"):
        total = 60 * total + int(part)
    return total


def watched(steps: int) -> dict[str, Any]:
    """The long run in a process of its own, watched from here."""
    with tempfile.TemporaryDirectory() as folder:
        run_dir, result = Path(folder, "run"), Path(folder, "result.json")
        arguments = [sys.executable, __file__, "--child", str(steps), str(run_dir), str(result)]
        started = time.monotonic()
        process = subprocess.Popen(arguments, stderr=subprocess.PIPE, cwd=common.HERE.parent)
        shown: list[tuple[float, int]] = []  # when, and the time to go
        reader = threading.Thread(target=read_clock, args=(process, started, shown), daemon=True)
        reader.start()
        samples, of_process = [], psutil.Process(process.pid)
        while process.poll() is None:
            time.sleep(0.25)
            try:
                files = [entry.stat().st_size for entry in run_dir.iterdir()] if run_dir.exists() else []
                samples.append((time.monotonic() - started, of_process.memory_info().rss, len(files), sum(files)))
            except (OSError, psutil.Error):
                continue  # a file went, or the process
        total = time.monotonic() - started
        reader.join()
        if process.returncode != 0:
            raise RuntimeError(f"the run ended with {process.returncode}")
        values = json.loads(result.read_text())
        values["left_behind"] = sorted(entry.name for entry in Path(folder).iterdir() if entry != result)
    begun = shown[0][0] - seconds("0:00")
    errors = [(when, (when + to_go) / total - 1) for when, to_go in shown if when >= total / 10]
    tenths = [
        max(rss for when, rss, *_ in samples if total * k / 10 <= when <= total * (k + 1) / 10) for k in range(10)
    ]
    return {
        "seconds": total,
        "bar_shown_after_seconds": begun,
        "time_to_go_error_after_a_tenth": errors[0][1],
        "time_to_go_error_by_tenth": [
            next((error for when, error in errors if when >= total * k / 10), None) for k in range(1, 10)
        ],
        "resident_bytes_by_tenth": tenths,
        "files_most": max(sample[2] for sample in samples),
        "files_bytes_most": max(sample[3] for sample in samples),
        "files_by_tenth": [
            max(files for when, _, files, _ in samples if total * k / 10 <= when <= total * (k + 1) / 10)
            for k in range(10)
        ],
        **{key: values[key] for key in ("first_order_runs", "second_order_runs", "gradient", "outer", "left_behind")},
    }


def read_clock(process: subprocess.Popen[bytes], started: float, shown: list[tuple[float, int]]) -> None:
    """Note what the bar says."""
    assert process.stderr is not None
    text = ""
    while chunk := os.read(process.stderr.fileno(), 4096):
        text += chunk.decode(errors="replace")
        *lines, text = re.split(r"[\r\n]", text)
        for line in lines:
            match = CLOCK.search(line)
            if match is not None:
                shown.append((time.monotonic() - started, seconds(match[2] or match[4])))
            elif line.strip() and "metagradient" not in line:
                sys.stderr.write(line + "\n")


def section(result: dict[str, Any]) -> str:
    """What the README shows."""
    run, mib = result["run"], 2**20
    resident = [size / mib for size in run["resident_bytes_by_tenth"]]
    off = [100 * abs(error) for error in run["time_to_go_error_by_tenth"] if error is not None]
    live, over = result["peak_live_bytes"], run["first_order_runs"] / result["optimum"] - 1
    (few, few_bytes), (many, many_bytes) = live
    return "\n\n".join(
        [
            f"`{result['command']}`: {result['steps']:,} steps of a 3-parameter model in {SLOTS} slots, with a "
            f"run_dir: {run['seconds'] / 60:.0f} minutes.",
            f"Measured with {common.describe_environment(result['environment'])}.",
            "\n".join(
                [
                    "| what | measured |",
                    "|---|---|",
                    f"| first-order runs, the loop included | {run['first_order_runs']:,}; the optimum of {SLOTS} "
                    f"slots is {result['optimum']:,} ({100 * over:+.2f} %) |",
                    f"| second-order runs | {run['second_order_runs']:,} |",
                    f"| resident size, by tenth of the time | {min(resident):.0f} to {max(resident):.0f} MiB |",
                    f"| peak live bytes, T={few:,} and T={many:,} | {few_bytes:,} and {many_bytes:,} |",
                    f"| files | at most {run['files_most']}, {run['files_bytes_most'] / mib:.2f} MiB; none after it |",
                    f"| end foreseen after a tenth of the time | {100 * run['time_to_go_error_after_a_tenth']:+.0f} %; "
                    f"{max(off):.0f} % off at most at the tenths after it |",
                    f"| the same bits as without files | {result['same_bits']} (T={result['same_bits_steps']:,}) |",
                ]
            ),
        ]
    )


def main() -> int:
    """Measure, print, save."""
    if sys.argv[1:2] == ["--child"]:
        child(int(sys.argv[2]), sys.argv[3], sys.argv[4])
        return 0
    parser = argparse.ArgumentParser(description="a very long run with files")
    parser.add_argument("--steps", type=int, default=100_000)
    parser.add_argument("--quick", action="store_true", help="smoke test: 1,500 steps, writes nothing")
    parser.add_argument("--out", type=Path, default=common.RESULTS, help="folder for the JSON")
    parser.add_argument("--no-readme", action="store_true", help="leave the table of benchmarks/README.md as it is")
    arguments = parser.parse_args()
    steps = 1_500 if arguments.quick else arguments.steps
    short = 300 if arguments.quick else SHORT
    result: dict[str, Any] = {
        "benchmark": "long_run",
        "command": ("python benchmarks/long_run.py " + " ".join(sys.argv[1:])).strip(),
        "environment": common.environment(torch.device("cpu")),
        "steps": steps,
        "slots": SLOTS,
        "optimum": optimal_runs(steps, SLOTS),
        "planned": vars(PiecePlan(Revolve(SLOTS, steps), steps).ahead([0], steps, 512)),
        "run": watched(steps),
        "same_bits": same_bits(short),
        "same_bits_steps": short,
    }
    with multiprocessing.get_context("spawn").Pool(1) as pool:
        result["peak_live_bytes"] = [(count, pool.apply(peak_live_bytes, (count,))) for count in (short, 4 * short)]
    print(json.dumps(result, indent=1))
    if not arguments.quick:
        common.write_json(arguments.out / "long_run.json", result)
        if not arguments.no_readme:
            common.write_section("long_run", section(result))
    else:
        print(section(result))
    return 0


if __name__ == "__main__":
    sys.exit(main())
