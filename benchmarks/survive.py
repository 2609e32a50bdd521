"""Does a run that is killed at any moment return the bits of one that is not?

    python benchmarks/survive.py            # kill -9 at 50 random moments in the loop and 50 in the backward
    python benchmarks/survive.py --quick    # 4 and 4; writes nothing

`tests/survivor.py` does it: a run with BatchNorm, dropout, Adam with a learnable rate, noisy batches and three terms of
the outer loss, cut into pieces of five steps. A run is killed up to eight times, each at a moment drawn evenly over its
time, and then left to end. What it returns, gradients, weights, buffers, and where the random numbers stand, must be to
the bit that of a run without files, and nothing may be left in the directory.
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


def section(result: dict[str, Any]) -> str:
    """What the README shows."""
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
    parser.add_argument("--quick", action="store_true", help="smoke test: 4 kills in each phase, writes nothing")
    parser.add_argument("--out", type=Path, default=common.RESULTS, help="folder for the JSON")
    parser.add_argument("--no-readme", action="store_true", help="leave benchmarks/README.md as it is")
    arguments = parser.parse_args()
    kills = 4 if arguments.quick else arguments.kills
    root = common.HERE.parent
    with tempfile.TemporaryDirectory() as folder:
        command = [sys.executable, "tests/survivor.py", folder, *map(str, (STEPS, kills, kills, arguments.seed))]
        environment = {**os.environ, "PYTHONPATH": str(root)}
        done = subprocess.run(command, cwd=root, env=environment, stdout=subprocess.PIPE, text=True, check=True)
    result = {
        "benchmark": "survive",
        "command": ("python benchmarks/survive.py " + " ".join(sys.argv[1:])).strip(),
        "environment": common.environment(torch.device("cpu")),
        "steps": STEPS,
        **json.loads(done.stdout.splitlines()[-1]),
    }
    print(json.dumps(result, indent=1))
    print(section(result))
    if not arguments.quick:
        common.write_json(arguments.out / "survive.json", result)
        if not arguments.no_readme:
            common.write_section("survive", section(result))
    return int(result["not_the_same_bits"] > 0)


if __name__ == "__main__":
    sys.exit(main())
