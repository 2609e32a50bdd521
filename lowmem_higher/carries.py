"""The carries of a trajectory: holds those that the schedule names, and replays the others from them.

A `Segment` is a run of steps and the carries of it that are kept. With a periodic schedule each kept carry begins a new
one. With a bounded schedule kept carries are dropped again, and a segment ends only where weights were set by hand.
Who needs what holds it: the graph's nodes hold the records of their steps; a record holds its segment and the record
before it in the segment. So everything is freed by reference counting, as soon as no gradient can need it.
"""

from __future__ import annotations

import weakref
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

from torch import Tensor

from lowmem_higher.ledger import Ledger
from lowmem_higher.schedule import Schedule
from lowmem_higher.step import Carry, StepRecord, advance_carry


@dataclass(eq=False)
class Segment:
    """A run of steps: its kept carries in the order of time, and what is held besides while its steps are worked on.

    `marks` has a few numbers of carries that the loop went on with, which replays have to arrive at (rule R10).
    """

    kept: dict[int, Carry]
    marks: dict[int, Tensor] = field(default_factory=dict)
    replayed: dict[int, Carry] = field(default_factory=dict)
    graphs: dict[int, Any] = field(default_factory=dict)  # of steps, by replay="torch"


class Carries:
    """Holds carries as a schedule says.

    Args:
        schedule: Which carries are held.
        ledger: Counts carries and runs.
    """

    def __init__(self, schedule: Schedule, ledger: Ledger) -> None:
        self._schedule = schedule
        self._ledger = ledger
        self._worked_on: weakref.ref[Segment] | None = None  # the only one that holds replayed carries

    # While the loop runs

    def segment_of(self, time: int, before: StepRecord | None, carry: Callable[[], Carry]) -> Segment:
        """The segment of the step about to be taken: that of the step before it, or a new one that `carry` begins."""
        if before is not None:
            segment: Segment = before.segment
            if self._schedule.bounded or not self._schedule.offered(time, list(segment.kept))[0]:
                return segment
        return Segment({time: self.keep(carry(), checkpoint=True)})

    def taken(self, record: StepRecord, carry: Callable[[], Carry]) -> bool:
        """A step was taken from `carry`: hold that for as long as the schedule says. Returns whether it is kept."""
        segment, time = record.segment, record.time
        if self._schedule.bounded and time not in segment.kept:
            self._work_on(segment)
            segment.replayed.clear()
            keep, dropped = self._schedule.offered(time, list(segment.kept))
            if dropped is not None:
                del segment.kept[dropped]
                segment.marks.pop(dropped, None)
            (segment.kept if keep else segment.replayed)[time] = self.keep(carry(), checkpoint=keep)
        return time in segment.kept

    def keep(self, carry: Carry, *, checkpoint: bool = False) -> Carry:
        """Count a carry for as long as it is held."""
        return self._ledger.keep(carry, checkpoint=checkpoint)

    # Going back

    def before(self, record: StepRecord) -> Carry:
        """The carry that a step started from, replayed from the nearest one that is held."""
        segment: Segment = record.segment
        self._work_on(segment)
        missing: list[StepRecord] = []
        current = record
        while current.time not in segment.kept and current.time not in segment.replayed:
            assert current.previous is not None
            current = current.previous
            missing.append(current)
        if current.time in segment.kept:
            segment.kept[current.time].check_unmodified(current.time)
            segment.replayed.clear()  # of another stretch
            carry = segment.kept[current.time]
        else:
            carry = segment.replayed[current.time]
        if not missing:
            return carry
        held = len(segment.kept) + len(segment.replayed)
        stops = {*self._schedule.on_the_way(current.time, record.time, held), record.time}
        for step in reversed(missing):
            carry = self._advance(step, carry)
            if step.time + 1 in stops:
                segment.replayed[step.time + 1] = carry
        return carry

    def after(self, record: StepRecord) -> Carry:
        """The carry that a step ended with; held until others are replayed."""
        segment: Segment = record.segment
        self._work_on(segment)
        time = record.time + 1
        if time in segment.kept:
            return segment.kept[time]
        if time not in segment.replayed:
            segment.replayed[time] = self._advance(record, self.before(record))
        return segment.replayed[time]

    def begin_backward(self, newest: StepRecord) -> None:
        """The number of steps is known: give up what was held in case there came more."""
        segment: Segment = newest.segment
        surplus = self._schedule.surplus(newest.time + 1, list(segment.kept))
        if surplus is not None:
            carry = segment.kept.pop(surplus)
            if surplus == newest.time:
                segment.replayed[surplus] = carry

    def runs_back(self, newest: StepRecord, steps: int) -> int:
        """The first-order runs of a backward from `newest` over `steps` steps; an estimate if weights were set."""
        return self._schedule.runs_back(steps, [time for time in newest.segment.kept if time < steps])

    def passed(self, record: StepRecord) -> None:
        """A step was pulled back: its carry is not needed for the steps before it."""
        segment: Segment = record.segment
        for time in (record.time, record.time + 1):
            segment.replayed.pop(time, None)
        if self._schedule.bounded and record.previous is not None:  # can be replayed from an earlier one
            segment.kept.pop(record.time, None)

    def rebuilt_with(self, last: StepRecord) -> list[StepRecord]:
        """The steps whose graphs are held together with that of `last` by replay="torch", in order."""
        records = [last]
        while not self._schedule.bounded and records[-1].previous is not None:
            records.append(records[-1].previous)
        return records[::-1]

    def _work_on(self, segment: Segment) -> None:
        """Replayed carries are held of one segment at a time."""
        before = None if self._worked_on is None else self._worked_on()
        if before is not None and before is not segment:
            before.replayed.clear()
            before.graphs.clear()
        self._worked_on = weakref.ref(segment)

    def _advance(self, record: StepRecord, carry: Carry) -> Carry:
        if record.journal is None:
            self._ledger.count_first_order()
        else:
            self._ledger.count_update()
        return self.keep(advance_carry(record, carry))
