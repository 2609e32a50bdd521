"""Does a run that is killed at any moment, or whose disk fills up, return the bits of one that is not?

    python benchmarks/survive.py            # kill -9 at 50 random moments in the loop and in the backward; full disks
    python benchmarks/survive.py --quick    # 4 and 4, and disks at 3 moments; writes nothing
    python benchmarks/survive.py --only disk
    python benchmarks/survive.py --only ranks  # kill -9 of one of two processes

`tests/survivor.py` does it: a run with BatchNorm, dropout, Adam with a learnable rate, noisy batches and three terms of
the outer loss, cut into pieces of five steps. A run is killed up to eight times, each at a moment drawn evenly over its
time, and then left to end. What it returns, gradients, weights, buffers, and where the random numbers stand, must be to
the bit that of a run without files, and nothing may be left in the directory.

`tests/full_disk.py` fills disks: small ones of their own (a tmpfs, which needs the right to mount), filled by another
file while the run reads its batches, up to the last byte, the last pages, or the last name. Then the same call is made
again, on the disk that is still full and on one with room.

`tests/rank_survivor.py` kills one of two processes (gloo) that share a run_dir, drawn by chance; the other one has to
see that and end, and both are started again.
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
ROOT = common.HERE.parent
READS = 46  # batches that a run of full_disk.py reads
TORN = 342  # the batch after which the log passes the end of a page
DISKS = {
    "foreseen": "`run_dir`",
    "unforeseen": "`run_dir`, free space not known before",
    "log": "`run_dir`, 345 steps, full in the middle of a record of its log",
    "store": "`store=` a directory",
    "both": "both, free space not known before",
}


def kill(quick: bool, kills: int, seed: int) -> dict[str, Any]:
    """Kill runs."""
    count = 4 if quick else kills
    with tempfile.TemporaryDirectory() as folder:
        command = [sys.executable, "tests/survivor.py", folder, *map(str, (STEPS, count, count, seed))]
        environment = {**os.environ, "PYTHONPATH": str(ROOT)}
        done = subprocess.run(command, cwd=ROOT, env=environment, stdout=subprocess.PIPE, text=True, check=True)
    return {"steps": STEPS, **json.loads(done.stdout.splitlines()[-1])}


def of_kills(result: dict[str, Any]) -> str:
    """What the README shows of them."""
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


def fill(quick: bool, kills: int, seed: int) -> dict[str, Any]:
    """Fill disks.

    Raises:
        RuntimeError: None can be mounted.
    """
    sys.path.insert(0, str(ROOT / "tests"))
    from full_disk import on_a_disk, spaces

    if not spaces()[0]:
        raise RuntimeError(f"{spaces()[1]}. Run it as a user who may, or without full disks: --only kills.")
    moments = [0, 4, 20] if quick else [0, *range(1, READS, 2)]
    given = {kind: [TORN] if kind == "log" else moments for kind in DISKS}
    with tempfile.TemporaryDirectory() as folder:
        found = on_a_disk(Path(folder), *(f"{kind}={','.join(map(str, at))}" for kind, at in given.items()))
    wrong = sum(one["not the same bits"] + one["odd files"] + one["files left"] for one in found.values())
    return {"disks": found, "not_the_same_bits": wrong}


def of_disks(result: dict[str, Any]) -> str:
    """What the README shows of them."""
    rows = ["| files of | disks filled | `StoreError` | had all they needed | other bits | half or lost files |"]
    rows.append("|---|---|---|---|---|---|")
    for kind, name in DISKS.items():
        found = result["disks"][kind]
        odd = found["odd files"] + found["files left"]
        through = found["attempts"] - found["refused"]
        counts = (found["attempts"], found["refused"], through, found["not the same bits"], odd)
        rows.append(f"| {name} | " + " | ".join(map(str, counts)) + " |")
    measured = f"Measured with {common.describe_environment(result['environment'])}."
    return "\n\n".join([f"`{result['command']}`", measured, "\n".join(rows)])


def kill_ranks(quick: bool, kills: int, seed: int) -> dict[str, Any]:
    """Kill one of two processes; a sixth of the kills, since each takes two processes that start."""
    found = {}
    for form in ("data-parallel", "sharded"):
        with tempfile.TemporaryDirectory() as folder:
            count = 1 if quick else max(1, kills // 6)
            command = [sys.executable, "tests/rank_survivor.py", "kills", folder, form, str(count), str(seed)]
            environment = {**os.environ, "PYTHONPATH": str(ROOT), "QUIET": "1"}
            done = subprocess.run(command, cwd=ROOT, env=environment, stdout=subprocess.PIPE, text=True, check=True)
        found[form] = json.loads(done.stdout.splitlines()[-1])
    return {"forms": found, "not_the_same_bits": sum(one["not_the_same_bits"] for one in found.values())}


def of_ranks(result: dict[str, Any]) -> str:
    """What the README shows of them."""
    rows = ["| model | kills in the loop | in the backward | before a file | runs | not the same bits | slowest end |"]
    rows.append("|---|---|---|---|---|---|---|")
    for form, one in result["forms"].items():
        kills = " | ".join(str(one["kills"][phase]) for phase in ("loop", "backward", "outside"))
        rows.append(f"| {form} | {kills} | {one['runs']} | {one['not_the_same_bits']} | {one['slowest_end']:.2f} s |")
    measured = f"Measured with {common.describe_environment(result['environment'])}."
    end = "The slowest end is how long the other process took at most to see that, and to end."
    return "\n\n".join([f"`{result['command']}`", measured, "\n".join(rows), end])


SECTIONS = {
    "kills": ("survive", kill, of_kills),
    "disk": ("disk", fill, of_disks),
    "ranks": ("survive_ranks", kill_ranks, of_ranks),
}


def main() -> int:
    """Kill, fill, print, save."""
    parser = argparse.ArgumentParser(description="runs that are killed, or whose disk is full")
    parser.add_argument("--only", choices=SECTIONS, help="one of them")
    parser.add_argument("--kills", type=int, default=50, help="in each phase")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--quick", action="store_true", help="smoke test: a few of each, writes nothing")
    parser.add_argument("--out", type=Path, default=common.RESULTS, help="folder for the JSON")
    parser.add_argument("--no-readme", action="store_true", help="leave benchmarks/README.md as it is")
    arguments = parser.parse_args()
    environment, wrong = common.environment(torch.device("cpu")), 0
    for section in [arguments.only] if arguments.only else SECTIONS:
        name, measure, shown = SECTIONS[section]
        result = {
            "benchmark": name,
            "command": ("python benchmarks/survive.py " + " ".join(sys.argv[1:])).strip(),
            "environment": environment,
            **measure(arguments.quick, arguments.kills, arguments.seed),
        }
        print(json.dumps(result, indent=1))
        print(shown(result))
        wrong += result["not_the_same_bits"]
        if not arguments.quick:
            common.write_json(arguments.out / f"{name}.json", result)
            if not arguments.no_readme:
                common.write_section(name, shown(result))
    return int(wrong > 0)


if __name__ == "__main__":
    sys.exit(main())
