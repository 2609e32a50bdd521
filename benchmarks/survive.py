"""Does a run that is killed at any moment, or whose disk fills up, return the bits of one that is not?

    python benchmarks/survive.py            # kill -9 at 50 random moments in the loop and 50 in the backward; full disks
    python benchmarks/survive.py --quick    # 4 and 4, and disks at 3 moments; writes nothing
    python benchmarks/survive.py --only disk

`tests/survivor.py` does it: a run with BatchNorm, dropout, Adam with a learnable rate, noisy batches and three terms of
the outer loss, cut into pieces of five steps. A run is killed up to eight times, each at a moment drawn evenly over its
time, and then left to end. What it returns, gradients, weights, buffers, and where the random numbers stand, must be to
the bit that of a run without files, and nothing may be left in the directory.

`tests/full_disk.py` fills disks: small ones of their own (a tmpfs, which needs the right to mount), filled by another
file while the run reads its batches, up to the last byte, the last pages, or the last name. Then the same call is made
again, on the disk that is still full and on one with room.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

import common
import torch

STEPS = 40
READS = 46  # batches that a run with 14 steps reads
DISKS = {
    "foreseen": "`run_dir`",
    "unforeseen": "`run_dir`, free space not known before",
    "log": "`run_dir`, 345 steps, in the middle of a record of the log",
    "store": "`store=` a directory",
    "both": "both",
}


def section_of_disks(result: dict[str, Any]) -> str:
    """What the README shows of full disks."""
    rows = [
        "| files of | disks filled | refused with `StoreError` | needed no more room | other bits | half or lost files |",
        "|---|---|---|---|---|---|",
    ]
    for kind, name in DISKS.items():
        found = result["disk"][kind]
        through = found["attempts"] - found["refused"]
        odd = found["odd files"] + found["files left"]
        counts = (found["attempts"], found["refused"], through, found["not the same bits"], odd)
        rows.append(f"| {name} | " + " | ".join(map(str, counts)) + " |")
    return "\n".join(rows)


def section(result: dict[str, Any]) -> str:
    """What the README shows of kills."""
    kills = result["kills"]
    return "\n\n".join(
        [
            f"`{result['command']}`: {sum(kills.values())} kills (-9) in {result['runs']} runs of {STEPS} steps.",
            f"Measured with {common.describe_environment(result['environment'])}.",
            f"{kills['loop']} kills in the loop, {kills['backward']} in the backward, {kills['outside']} before the "
            f"first file was written. Runs that did not return the bits of one that nobody kills, or that left a file "
            f"behind: {result['not_the_same_bits']}.",
        ]
    )


def main() -> int:
    """Kill, print, save."""
    parser = argparse.ArgumentParser(description="runs that are killed")
    parser.add_argument("--kills", type=int, default=50, help="in each phase")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--quick", action="store_true", help="smoke test: a few kills and disks, writes nothing")
    parser.add_argument("--out", type=Path, default=common.RESULTS, help="folder for the JSON")
    parser.add_argument("--no-readme", action="store_true", help="leave benchmarks/README.md as it is")
    arguments = parser.parse_args()
    results = {}
    if arguments.only != "disk":
        results["survive"] = kill(4 if arguments.quick else arguments.kills, arguments.seed)
    if arguments.only != "kills":
        results["disk"] = fill(quick=arguments.quick)
    environment = common.environment(torch.device("cpu"))
    command = ("python benchmarks/survive.py " + " ".join(sys.argv[1:])).strip()
    wrong = 0
    for name, found in results.items():
        result = {"benchmark": f"{name}", "command": command, "environment": environment, **found}
        text = section(result) if name == "survive" else described(result)
        print(json.dumps(result, indent=1))
        print(text)
        if not arguments.quick:
            common.write_json(arguments.out / f"{FILES[name]}.json", result)
            if not arguments.no_readme:
                common.write_section(FILES[name], text)
        wrong += result["wrong"]
    return int(wrong > 0)


if __name__ == "__main__":
    sys.exit(main())
