"""The schedules, by simulation: integers only, no tensor."""

from __future__ import annotations

import math
import subprocess
import sys
from pathlib import Path
from typing import NamedTuple

import pytest
from hypothesis import given
from hypothesis import strategies as st

import lowmem_higher
from lowmem_higher.schedule import Periodic


class Simulated(NamedTuple):
    """What a run did: which carries were kept, the replays in order, the most carries that were held at once."""

    kept: list[int]
    replayed: list[int]
    held_at_most: int


def simulate(schedule: Periodic, steps: int) -> Simulated:
    """A loop and its backward, as the trajectory does them; fails if a carry is read that is not held."""
    kept = [step for step in range(steps) if schedule.keeps(step)]
    held, replayed, most = set(kept), [], len(kept)
    for step in reversed(range(steps)):
        start = max(checkpoint for checkpoint in kept if checkpoint <= step)
        assert start in held, f"the carry of step {start} was dropped before step {step} was pulled back"
        at = start
        while at + 1 in held and at < step:  # from the nearest carry that is held
            at += 1
        for advanced in range(at, step):
            replayed.append(advanced)
            held.add(advanced + 1)
        most = max(most, len(held))
        assert step in held
        held.discard(step)  # also the checkpoint, when the first step of its segment is done
    assert not held
    return Simulated(kept, replayed, most)


@given(every=st.integers(1, 60), steps=st.integers(1, 300))
def test_periodic_obeys_its_law(every: int, steps: int) -> None:
    run = simulate(Periodic(every), steps)
    checkpoints = math.ceil(steps / every)
    assert run.kept == list(range(0, steps, every))
    assert len(run.kept) == checkpoints
    assert len(run.replayed) == steps - checkpoints
    assert len(set(run.replayed)) == len(run.replayed), "a step was replayed twice"
    assert run.held_at_most <= checkpoints + min(every, steps)


@given(every=st.integers(1, 60), since=st.integers(0, 1000), ahead=st.integers(0, 300))
def test_periodic_counts_from_a_carry_that_is_kept_anyway(every: int, since: int, ahead: int) -> None:
    """After `update_params` a carry is kept off the grid; the distance to the next one must not exceed `every`."""
    schedule = Periodic(every)
    assert schedule.keeps(since, since)
    assert schedule.keeps(since + ahead, since) == (ahead % every == 0)
    assert any(schedule.keeps(step, since) for step in range(since + 1, since + every + 1))


def test_periodic_at_the_root_of_the_steps_holds_least() -> None:
    peaks = {every: simulate(Periodic(every), 400).held_at_most for every in range(1, 401)}
    best = min(peaks, key=lambda every: peaks[every])
    assert 15 <= best <= 25
    assert peaks[20] <= 2 * math.isqrt(400)


@pytest.mark.parametrize(
    ("every", "steps", "kept", "replayed"),
    [
        (1, 3, [0, 1, 2], []),
        (3, 7, [0, 3, 6], [3, 4, 0, 1]),
        (3, 6, [0, 3], [3, 4, 0, 1]),
        (10, 4, [0], [0, 1, 2]),
        (4, 9, [0, 4, 8], [4, 5, 6, 0, 1, 2]),
    ],
)
def test_periodic_replays_in_this_order(every: int, steps: int, kept: list[int], replayed: list[int]) -> None:
    run = simulate(Periodic(every), steps)
    assert (run.kept, run.replayed) == (kept, replayed)


def test_a_schedule_is_a_plain_value() -> None:
    assert Periodic(3) == Periodic(3) != Periodic(4)
    assert repr(Periodic(3)) == "Periodic(every=3)"
    assert hash(Periodic(3)) == hash(Periodic(3))


def test_schedules_import_no_torch() -> None:
    path = Path(lowmem_higher.__file__).parent / "schedule.py"
    code = f"""
import importlib.util, sys
spec = importlib.util.spec_from_file_location("schedule", {str(path)!r})
module = importlib.util.module_from_spec(spec)
sys.modules["schedule"] = module
spec.loader.exec_module(module)
sys.exit(int("torch" in sys.modules))
"""
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0
