"""The schedules, by simulation: integers only, no tensor."""

from __future__ import annotations

import functools
import math
import subprocess
import sys
from pathlib import Path
from typing import NamedTuple

import pytest
from checkpoint_schedules import Forward, MultistageCheckpointSchedule
from hypothesis import given, settings
from hypothesis import strategies as st

import lowmem_higher
from lowmem_higher.schedule import (
    Advance,
    Bounded,
    Drop,
    Keep,
    Periodic,
    PullBack,
    Revolve,
    Schedule,
    actions,
    explain,
    first_order_runs,
    optimal_runs,
    reversal_runs,
)


class Executed(NamedTuple):
    """What a run did: the loop's kept carries, all first-order runs in order, the most carries held at once."""

    kept: list[int]
    runs: list[int]
    held_in_loop: int
    held_going_back: int


def execute(schedule: Schedule, steps: int) -> Executed:
    """Carry the actions out on a machine that has the carries it holds and one at hand; fails where one is missing."""
    held: set[int] = set()
    at_hand: int | None = 0
    kept: list[int] = []
    runs: list[int] = []
    pulled: list[int] = []
    in_loop = going_back = 0
    newest = steps - 1 if schedule.bounded else None  # the carry of the newest step is held besides
    for action in actions(schedule, steps):
        if isinstance(action, Keep):
            assert action.time in (at_hand, 0)
            assert action.time not in held
            held.add(action.time)
            if not pulled and len(runs) < steps:
                kept.append(action.time)
        elif isinstance(action, Drop):
            held.remove(action.time)
        elif isinstance(action, Advance):
            assert action.start in held or action.start == at_hand, f"carry {action.start} is not held"
            runs += range(action.start, action.stop)
            at_hand = action.stop
        else:
            assert isinstance(action, PullBack)
            assert action.step in held or action.step in (at_hand, newest), f"no carry for step {action.step}"
            pulled.append(action.step)
            at_hand = newest = None
        if pulled or len(runs) >= steps:
            going_back = max(going_back, len(held))
        else:
            in_loop = max(in_loop, len(held))
    assert pulled == list(reversed(range(steps)))
    assert runs[:steps] == list(range(steps))
    assert not held
    return Executed(kept, runs, in_loop, going_back)


@functools.cache
def fewest_runs(steps: int, slots: int) -> int:
    """The optimum by exhaustive search: the recursion that the closed form solves."""
    if steps <= 1:
        return 0
    if slots == 1:
        return steps * (steps - 1) // 2
    return min(part + fewest_runs(steps - part, slots - 1) + fewest_runs(part, slots) for part in range(1, steps))


@given(every=st.integers(1, 60), steps=st.integers(1, 300))
def test_periodic_obeys_its_law(every: int, steps: int) -> None:
    run = execute(Periodic(every), steps)
    checkpoints = math.ceil(steps / every)
    assert run.kept == list(range(0, steps, every))
    assert len(run.runs) == 2 * steps - checkpoints
    assert len(set(run.runs[steps:])) == steps - checkpoints, "a step was replayed twice"
    assert run.held_going_back <= checkpoints + min(every, steps)


@given(every=st.integers(1, 60), since=st.integers(0, 1000), ahead=st.integers(1, 300))
def test_periodic_counts_from_the_last_kept_carry(every: int, since: int, ahead: int) -> None:
    """After `update_params` a carry is kept off the grid; the distance to the next one must not exceed `every`."""
    schedule = Periodic(every)
    assert schedule.offered(since, []) == (True, None)
    assert schedule.offered(since + ahead, [since]) == (ahead >= every, None)


def test_periodic_at_the_root_of_the_steps_holds_least() -> None:
    peaks = {every: execute(Periodic(every), 400).held_going_back for every in range(1, 401)}
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
    run = execute(Periodic(every), steps)
    assert (run.kept, run.runs[steps:]) == (kept, replayed)


@pytest.mark.parametrize("slots", range(1, 9))
def test_the_closed_form_is_the_best_of_all_ways_to_go_back(slots: int) -> None:
    assert [reversal_runs(steps, slots) for steps in range(60)] == [fewest_runs(steps, slots) for steps in range(60)]


@pytest.mark.parametrize("slots", range(1, 21))
def test_revolve_reaches_the_optimum(slots: int) -> None:
    """Counted action by action, for all T up to 60 and every seventh one up to 300."""
    for steps in [*range(1, 60), *range(60, 301, 7), 300]:
        run = execute(Revolve(slots, steps), steps)
        assert len(run.runs) == optimal_runs(steps, slots), steps
        assert max(run.held_in_loop, run.held_going_back) <= slots


@pytest.mark.parametrize("slots", range(1, 21))
def test_the_closed_form_is_the_one_of_the_paper(slots: int) -> None:
    """r T - C(s + r, r - 1) + 1 with r least so that C(s + r, r) >= T; for all T up to 300."""
    for steps in range(2, 301):
        r = next(r for r in range(steps) if math.comb(slots + r, r) >= steps)
        assert optimal_runs(steps, slots) == r * steps - math.comb(slots + r, r - 1) + 1


@pytest.mark.parametrize(
    ("steps", "slots", "beyond_the_loop"),
    [(100, 10, 1.230), (1000, 10, 2.637), (1000, 30, 1.473), (10_000, 10, 4.763), (10_000, 30, 2.402),
     (10_000, 100, 1.475)],
)  # fmt: skip
def test_revolve_over_many_steps(steps: int, slots: int, beyond_the_loop: float) -> None:
    found = first_order_runs(Revolve(slots, steps), steps)
    assert found == optimal_runs(steps, slots)
    assert round(found / steps - 1, 3) == beyond_the_loop


@given(steps=st.integers(2, 150), slots=st.integers(1, 12))
@settings(max_examples=60)
def test_revolve_needs_no_more_than_another_implementation(steps: int, slots: int) -> None:
    """There the last step of the forward is part of the adjoint; here the user's loop has run it like the others."""
    if slots >= steps:
        slots = steps - 1  # its own limit
    other = MultistageCheckpointSchedule(steps, slots, 0)
    theirs = sum(action.n1 - action.n0 for action in other if isinstance(action, Forward) and not action.write_adj_deps)
    assert first_order_runs(Revolve(slots, steps), steps) == theirs + 1


@pytest.mark.parametrize("slots", [1, 2, 3, 4, 7, 12])
def test_unknown_length_is_optimal_up_to_two_sweeps(slots: int) -> None:
    """Up to (s + 1)(s + 2) / 2 steps no knowledge of their number is needed."""
    for steps in range(1, (slots + 1) * (slots + 2) // 2 + 1):
        run = execute(Bounded(slots), steps)
        assert len(run.runs) == optimal_runs(steps, slots), steps
        assert run.held_in_loop <= slots + 1
        assert run.held_going_back <= slots + 1  # at its first action, which gives one up


@given(steps=st.integers(1, 2500), slots=st.integers(1, 25))
@settings(max_examples=60, deadline=None)
def test_unknown_length_stays_near_the_optimum(steps: int, slots: int) -> None:
    assert first_order_runs(Bounded(slots), steps) <= 1.15 * optimal_runs(steps, slots)


@given(told=st.integers(1, 200), steps=st.integers(1, 300), slots=st.integers(1, 12))
@settings(max_examples=60, deadline=None)
def test_a_wrong_number_of_steps_costs_runs_and_nothing_else(told: int, steps: int, slots: int) -> None:
    run = execute(Revolve(slots, told), steps)
    assert len(run.runs) >= optimal_runs(steps, slots)
    assert run.held_in_loop <= slots + 1


def test_explain_prints_every_action(capsys: pytest.CaptureFixture[str]) -> None:
    explain(T=12, checkpoints=3)
    printed = capsys.readouterr().out.splitlines()
    assert printed[:-1] == [str(action) for action in actions(Bounded(3), 12)]
    assert printed[-1].startswith(
        f"{first_order_runs(Bounded(3), 12)} first-order runs (optimum {optimal_runs(12, 3)})"
    )
    with pytest.raises(ValueError, match="checkpoints=s or every=N"):
        explain(T=12)


def test_a_schedule_is_a_plain_value() -> None:
    assert Periodic(3) == Periodic(3) != Periodic(4)
    assert repr(Bounded(3)) == "Bounded(checkpoints=3, graphs=1)"
    assert hash(Revolve(3, 9)) == hash(Revolve(3, 9))


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
