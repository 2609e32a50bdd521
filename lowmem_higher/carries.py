"""The carries of a trajectory: holds those that the schedule names, and replays the others from them.

A `Segment` is a run of steps and the carries of it that are kept. With a periodic schedule each kept carry begins a new
one. With a bounded schedule kept carries are dropped again, and a segment ends only where weights were set by hand.
Who needs what holds it: the graph's nodes hold the records of their steps; a record holds its segment and the record
before it in the segment. So everything is freed by reference counting, as soon as no gradient can need it.

NOTE [ Hot and cold ]

With `store="host"` or a directory, of all carries that a schedule holds for later one is on the device: the hot one,
which was kept or asked for last. It is put into the store when another becomes the hot one, so the newest carry, which
the backward needs first, is not moved at all. Carries that are replayed to be used at once stay on the device. One that
was modified in place while it was hot stays there as well, and raises when it is asked for (rule R4).
"""

from __future__ import annotations

import os
import weakref
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any, Protocol

from lowmem_higher.ledger import Ledger
from lowmem_higher.packing import Constants, same_tensors
from lowmem_higher.schedule import Schedule
from lowmem_higher.step import Carry, Mark, StepRecord, advance_carry
from lowmem_higher.store import Store, Stored, make_store


@dataclass(eq=False)
class Held:
    """The carry that step `time` starts from, on the device or in a store."""

    time: int
    carry: Carry | None
    may_cool: bool = True
    stored: Stored[Carry] | None = None

    def get(self) -> Carry:
        """The carry, on the device from now on."""
        if self.carry is None:
            assert self.stored is not None
            self.carry = self.stored.get()
        self.carry.check_unmodified(self.time)
        return self.carry

    def cool(self, store: Store, constants: Constants) -> None:
        """Leave it to the store alone."""
        if self.stored is None and self.carry is not None:
            if self.carry.modified is not None:
                return
            self.stored = store.put(self.carry, self.time, constants)
        self.carry = None


@dataclass(eq=False)
class Segment:
    """A run of steps: its kept carries in the order of time, and what is held besides while its steps are worked on.

    `marks` has a few numbers of carries that the loop went on with, which replays have to arrive at (rule R10).
    """

    kept: dict[int, Held]
    marks: dict[int, Mark] = field(default_factory=dict)
    replayed: dict[int, Held] = field(default_factory=dict)
    graphs: dict[int, Any] = field(default_factory=dict)  # of steps, by replay="torch"
    earlier: weakref.ref[Segment] | None = None

    def held_before(self, time: int) -> Held | None:
        """The newest carry that is held of an earlier time, in this segment or in the one before it."""
        inside = [held for held in (*self.kept.values(), *self.replayed.values()) if held.time < time]
        if inside:
            return max(inside, key=lambda held: held.time)
        earlier = None if self.earlier is None else self.earlier()
        return None if earlier is None or not earlier.kept else earlier.kept[max(earlier.kept)]


class Link(Protocol):
    """A step, in the run of steps that its carry can be replayed by."""

    @property
    def time(self) -> int:
        """Of the carry that it starts from."""

    @property
    def segment(self) -> Any:
        """Where that carry is held, or an earlier one."""

    @property
    def previous(self) -> Link | None:
        """The step before it in the segment."""

    @property
    def journal(self) -> object | None:
        """What the update alone can be run again from."""


class Carries:
    """Holds carries as a schedule says.

    Args:
        schedule: Which carries are held.
        ledger: Counts carries and runs.
        store: "device", "host" or a directory.
        advance: Makes the next carry.
    """

    def __init__(
        self,
        schedule: Schedule,
        ledger: Ledger,
        store: str | os.PathLike[str],
        advance: Callable[[Any, Carry], Carry] = advance_carry,
    ) -> None:
        self._next = advance
        self._schedule = schedule
        self._ledger = ledger
        self.store = make_store(store, ledger)
        self.constants = Constants()
        self._hot: weakref.ref[Held] | None = None
        self._newest: weakref.ref[Segment] | None = None
        self._worked_on: weakref.ref[Segment] | None = None  # the only one that holds replayed carries

    def schedule(self, schedule: Schedule, newest: Link) -> None:
        """From now on, hold carries as this one says; those that it has no slots for go."""
        self._schedule = schedule
        for time in schedule.excess(newest.time + 1, list(newest.segment.kept)):
            self._give_up(time, newest)

    # While the loop runs

    def segment_of(self, time: int, before: Link | None, carry: Callable[[], Carry]) -> Segment:
        """The segment of the step about to be taken: that of the step before it, or a new one that `carry` begins."""
        if self.store is not None:
            self.store.let_go()
        if before is not None:
            segment: Segment = before.segment
            if self._schedule.bounded or not self._schedule.offered(time, list(segment.kept))[0]:
                return segment
        segment = Segment({time: self._kept(time, carry())}, earlier=self._newest)
        self._newest = weakref.ref(segment)
        return segment

    def taken(self, record: Link, carry: Callable[[], Carry]) -> bool:
        """A step was taken from `carry`: hold that for as long as the schedule says. Returns whether it is kept."""
        segment, time = record.segment, record.time
        if self._schedule.bounded and time not in segment.kept:
            self._work_on(segment)
            segment.replayed.clear()
            keep, dropped = self._schedule.offered(time, list(segment.kept))
            if dropped is not None:
                del segment.kept[dropped]
                segment.marks.pop(dropped, None)
            if keep:
                segment.kept[time] = self._kept(time, carry())
            else:
                segment.replayed[time] = Held(time, self.keep(carry()), may_cool=False)
        return time in segment.kept

    def keep(self, carry: Carry) -> Carry:
        """Count a carry for as long as it is on the device."""
        return self._ledger.keep(carry)

    def hold(self, time: int, carry: Carry) -> Held:
        """Hold a carry for as long as what is returned is held; the hot one, if it is of the same tensors."""
        hot = None if self._hot is None else self._hot()
        if hot is not None and hot.carry is not None and same_tensors(hot.carry, carry):
            return hot
        return self._kept(time, carry)

    def read(self, held: Held) -> Carry:
        """A carry that is held, on the device."""
        self._make_hot(held)
        return held.get()

    def close(self) -> None:
        """The context is left. What is held stays."""
        if self.store is not None:
            self.store.close()

    def _kept(self, time: int, carry: Carry) -> Held:
        if self.store is not None:
            self.constants.narrow(carry)
        held = Held(time, self.keep(carry))
        self._make_hot(held)
        self._ledger.count_checkpoint(held)
        return held

    def _make_hot(self, held: Held) -> None:
        """See NOTE [ Hot and cold ]."""
        if self.store is None or not held.may_cool:
            return
        hot = None if self._hot is None else self._hot()
        if hot is not None and hot is not held:
            hot.cool(self.store, self.constants)
        self._hot = weakref.ref(held)

    # Going back

    def before(self, record: Link) -> Carry:
        """The carry that a step started from, replayed from the nearest one that is held."""
        segment: Segment = record.segment
        self._work_on(segment)
        missing: list[Link] = []
        current = record
        while current.time not in segment.kept and current.time not in segment.replayed:
            assert current.previous is not None
            current = current.previous
            missing.append(current)
        if current.time in segment.kept:
            segment.replayed.clear()  # of another stretch
            carry = self._read(segment, segment.kept[current.time])
        else:
            carry = self._read(segment, segment.replayed[current.time])
        if not missing:
            return carry
        count = len(segment.kept) + len(segment.replayed)
        stops = {*self._schedule.on_the_way(current.time, record.time, count), record.time}
        for step in reversed(missing):
            carry, time = self._advance(step, carry), step.time + 1
            if time in stops:
                held = Held(time, carry, may_cool=self._schedule.bounded and time != record.time)
                self._make_hot(held)
                segment.replayed[time] = held
        return carry

    def after(self, record: Link) -> Carry:
        """The carry that a step ended with; held until others are replayed."""
        segment: Segment = record.segment
        self._work_on(segment)
        time = record.time + 1
        if time not in segment.kept and time not in segment.replayed:
            segment.replayed[time] = Held(time, self._advance(record, self.before(record)), may_cool=False)
        return self._read(segment, segment.kept[time] if time in segment.kept else segment.replayed[time])

    def begin_backward(self, newest: Link) -> None:
        """The number of steps is known: give up what was held in case there came more."""
        surplus = self._schedule.surplus(newest.time + 1, list(newest.segment.kept))
        if surplus is not None:
            self._give_up(surplus, newest)
        if self._schedule.graphs > 1:  # the newest step's graph is built with those before it
            newest.segment.replayed.clear()

    def _give_up(self, time: int, newest: Link) -> None:
        segment: Segment = newest.segment
        held = segment.kept.pop(time)
        segment.marks.pop(time, None)
        if time == newest.time:
            segment.replayed[time] = held

    def runs_back(self, newest: Link, steps: int) -> int:
        """The first-order runs of a backward from `newest` over `steps` steps; an estimate if weights were set."""
        return self._schedule.runs_back(steps, [time for time in newest.segment.kept if time < steps])

    def passed(self, record: Link) -> None:
        """A step was pulled back: its carry is not needed for the steps before it."""
        segment: Segment = record.segment
        for time in (record.time, record.time + 1):
            segment.replayed.pop(time, None)
        if self._schedule.bounded and record.previous is not None:  # can be replayed from an earlier one
            segment.kept.pop(record.time, None)

    def built_with(self, last: StepRecord) -> list[StepRecord]:
        """The steps whose graphs are built together with that of `last`, in order: they need one carry."""
        segment: Segment = last.segment
        self._work_on(segment)
        records = [last]
        while len(records) < self._schedule.graphs:
            first = records[-1]
            if first.time in segment.kept or first.time in segment.replayed or first.previous is None:
                break
            records.append(first.previous)
        return records[::-1]

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

    def _read(self, segment: Segment, held: Held) -> Carry:
        """A carry that is held. The one that will be asked for next starts on its way to the device."""
        if self.store is not None:
            self.store.let_go()
        self._make_hot(held)
        carry = held.get()
        if self.store is not None and held.may_cool:
            following = segment.held_before(held.time)
            if following is not None and following.carry is None and following.stored is not None:
                self.store.prefetch(following.stored)
        return carry

    def _advance(self, record: Link, carry: Carry) -> Carry:
        if record.journal is None:
            self._ledger.count_first_order()
        else:
            self._ledger.count_update()
        return self.keep(self._next(record, carry))
