"""Where is the peak, in the loop or in the outer backward, and how much of it is seen from outside?

    python benchmarks/profile_memory.py                    # every setting; about 5 minutes on 2 idle cores
    python benchmarks/profile_memory.py --device cuda      # allocator peaks, and a snapshot for each setting
    python benchmarks/profile_memory.py --quick            # a smoke test; writes nothing

Peaks by phase of the 3-layer net of `memory_scaling.py`, for the full unroll, periodic and bounded checkpoints, carries
on the host and on disk, and journals. Each figure comes from a process of its own, which runs a few steps first, for
all that is made once. On a CPU there are two processes for each setting. One counts live bytes, and is slow. The other
samples the resident size (psutil), which has autograd's nodes, Python's objects and what the allocator keeps as well,
though not pages that the first steps left free; it gives the seconds. With `--device cuda` it is the allocator's peak
(`torch.cuda.max_memory_allocated`), and a file `profile_memory_SETTING.pickle` beside the JSON has the history of each
allocation, for pytorch.org/memory_viz.

All figures are above what was there before the run: the model's weights and the data do not count.
A full unroll whose peak would be above 0.7 of the available memory is not run; two short ones tell.
"""

from __future__ import annotations

import argparse
import json
import multiprocessing
import re
import sys
import time
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import common
import problems
import torch
from common import Setting

from lowmem_higher.meters import AllocatedBytes, LiveBytes, ResidentBytes, cuda_snapshot
from lowmem_higher.profile import Profile

WARM_UP = 3  # steps
PHASES = ("loop", "backward")


def measure(
    name: str, how: str, steps: int, width: int, batch: int, device: str, snapshot: Path | None
) -> dict[str, Any]:
    """What one process does: `how` is one of "live bytes", "resident size" and "CUDA allocator"."""
    torch.set_num_threads(1)
    setting = next(setting for setting in common.SETTINGS if setting.name == name)
    problem = problems.mlp(width=width, batch=batch, name="mlp").to(torch.device(device))
    common.run(setting, problem, WARM_UP)
    meter = {"live bytes": LiveBytes, "resident size": ResidentBytes, "CUDA allocator": AllocatedBytes}[how]()
    profile = Profile([meter])
    begun = meter.now()
    mode = meter if isinstance(meter, LiveBytes) else nullcontext()
    with cuda_snapshot(snapshot), mode, profile.watching():
        done = common.run(setting, problem, steps)
    inner = profile.last
    if inner is None or not done.gradient.norm() > 0:
        raise RuntimeError("nothing was differentiated")
    report = inner.report
    return {
        "peak": {phase: getattr(inner, phase).peaks[how] - begun for phase in PHASES},
        "seconds": {"loop": done.forward_seconds, "backward": done.seconds - done.forward_seconds},
        "report": {key: value for key, value in report.as_dict().items() if key != "timeline"},
    }


def in_a_process(*arguments: Any) -> dict[str, Any]:
    """`measure` in a new process."""
    with multiprocessing.get_context("spawn").Pool(1) as pool:
        return pool.apply(measure, arguments)


def row_of(setting: Setting, arguments: argparse.Namespace, folder: Path | None, memory: int) -> dict[str, Any]:
    """The figures of one setting."""
    size = (arguments.width, arguments.batch, arguments.device)
    row: dict[str, Any] = {"setting": setting.name, "peak": None, "resident": None, "seconds": None, "report": None}
    how = "CUDA allocator" if torch.device(arguments.device).type == "cuda" else "live bytes"
    if setting.name == "full unroll" and arguments.steps > 20:
        short = {steps: max(in_a_process(setting.name, how, steps, *size, None)["peak"].values()) for steps in (10, 20)}
        expected = common.extrapolate(short, arguments.steps)
        if expected > common.MEMORY_FRACTION * memory:
            return {**row, "needs_bytes": expected}
    snapshot = None
    if how == "CUDA allocator" and folder is not None:
        snapshot = folder / f"profile_memory_{re.sub('[^a-z0-9]+', '_', setting.name.lower()).strip('_')}.pickle"
    first = in_a_process(setting.name, how, arguments.steps, *size, snapshot)
    row |= {"peak": first["peak"], "seconds": first["seconds"], "report": first["report"]}
    if how == "live bytes":
        second = in_a_process(setting.name, "resident size", arguments.steps, *size, None)
        row |= {"resident": second["peak"], "seconds": second["seconds"]}
    return row


def section(result: dict[str, Any]) -> str:
    """What the README shows."""
    meter, resident = result["meter"], result["rows"][0]["resident"] is not None
    head = ["setting", f"{meter}: loop", "backward", *(["resident size: loop", "backward"] if resident else [])]
    head += ["first-order runs", "second-order runs", "stored at most", "seconds: loop", "backward"]
    lines = ["| " + " | ".join(head) + " |", "|---" * len(head) + "|"]
    for row in result["rows"]:
        if row["peak"] is None:
            lines.append(f"| {row['setting']} | not run: needs ~{common.format_bytes(row['needs_bytes'])} |")
            continue
        report = row["report"]
        sizes = [row["peak"], *([row["resident"]] if resident else [])]
        stored = common.format_bytes(report["stored_peak_bytes"]) if report["stored_peak_bytes"] else ""
        cells = [row["setting"], *(common.format_bytes(size[phase]) for size in sizes for phase in PHASES)]
        cells += [str(report["first_order_runs"]), str(report["second_order_runs"]), stored]
        cells += [f"{row['seconds'][phase]:.2f}" for phase in PHASES]
        lines.append("| " + " | ".join(cells) + " |")
    return "\n\n".join(
        [
            f"`{result['command']}`: {result['net']}, T={result['steps']}, float32, SGD with momentum 0.9.",
            f"Measured with {common.describe_environment(result['environment'])}.",
            "\n".join(lines),
        ]
    )


def parse(argv: list[str] | None) -> argparse.Namespace:
    """The command line."""
    names = [setting.name for setting in common.SETTINGS]
    parser = argparse.ArgumentParser(
        description="peak memory by phase", formatter_class=argparse.ArgumentDefaultsHelpFormatter
    )
    parser.add_argument("--steps", type=int, default=200, help="inner steps T")
    parser.add_argument("--settings", nargs="+", choices=names, default=names, metavar="NAME", help=", ".join(names))
    parser.add_argument("--width", type=int, default=256, help="units of the 3-layer net")
    parser.add_argument("--batch", type=int, default=256)
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--quick", action="store_true", help="smoke test: small net, T=20, 3 settings, no file")
    parser.add_argument("--out", type=Path, help="folder for the files; benchmarks/results when not --quick")
    parser.add_argument("--no-readme", action="store_true", help="leave the table of benchmarks/README.md as it is")
    arguments = parser.parse_args(argv)
    if arguments.quick:
        arguments.steps, arguments.width, arguments.batch, arguments.no_readme = 20, 16, 8, True
        arguments.settings = ["full unroll", "N=sqrt(T)", "disk, s=100"]
    elif arguments.out is None:
        arguments.out = common.RESULTS
    if arguments.steps < 1:
        parser.error("--steps is at least 1")
    return arguments


def main(argv: list[str] | None = None) -> int:
    """Measure in fresh processes, print, save."""
    arguments = parse(argv)
    device = torch.device(arguments.device)
    if arguments.out is not None:
        arguments.out.mkdir(parents=True, exist_ok=True)
    environment = common.environment(device)
    common.warn_if_busy(environment)
    start = time.perf_counter()
    result: dict[str, Any] = {
        "benchmark": "profile_memory",
        "command": ("python benchmarks/profile_memory.py " + " ".join(sys.argv[1:] if argv is None else argv)).strip(),
        "environment": environment,
        "net": problems.mlp(width=arguments.width, batch=arguments.batch).description,
        "steps": arguments.steps,
        "meter": "CUDA allocator" if device.type == "cuda" else "live bytes",
        "rows": [],
    }
    for setting in common.SETTINGS:
        if setting.name in arguments.settings:
            row = row_of(setting, arguments, arguments.out, common.available_bytes(device))
            result["rows"].append(row)
            shown = {key: row[key] for key in ("setting", "peak", "resident", "seconds")}
            print(f"[{time.perf_counter() - start:.0f} s] {json.dumps(shown)}", flush=True)
    result["wall_seconds"] = time.perf_counter() - start
    print("\n" + section(result))
    if arguments.out is not None:
        common.write_json(arguments.out / "profile_memory.json", result)
        common.draw("profile_memory", result, arguments.out / "profile_memory.png")
    if not arguments.no_readme:
        common.write_section("profile_memory", section(result))
    return 0


if __name__ == "__main__":
    sys.exit(main())
