"""Which carries are kept, which are computed again, and in which order. A schedule knows step numbers, never a tensor.

NOTE [ Going back with few carries ]

To pull back step t its carry is needed. It is either held or advanced to from the nearest earlier one that is held, by
first-order runs of the steps between. To go back over `l` steps from a held carry, with `s` slots (that carry's
included), one advances some steps, holds the carry there, goes back over the right part with one slot less, and then
over the left part with all slots again. With the best choice this takes

    reversal_runs(l, s) = r l - C(s + r, r - 1),   r the least number with C(s + r, r) >= l

runs (Griewank and Walther 2000). While the user's loop runs, the carries are placed on the way, and the carry of the
newest step is at hand when the backward begins; so over T steps, the loop included, the optimum is
`reversal_runs(T, s) + 1` first-order runs.

NOTE [ When the number of steps is unknown ]

The held carries cut the past into gaps. If the loop ended now, gap i (counted from 0) would be gone back over with
`s - i` slots, since those after it are free by then: the cost of a set of carries is known exactly, at any moment. So
when all slots are full and a new carry is offered, the one is dropped whose loss makes the best ending cheapest; or
the new one is not kept, if that is cheaper still. While the loop runs one carry more than `s` is held, and which one
is given up is decided when the backward begins. That one choice made with knowledge is enough for the optimum up to
(s + 1)(s + 2) / 2 steps, and to stay near it beyond (`benchmarks/schedules.py`).
"""

from __future__ import annotations

import functools
import itertools
import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Protocol

_FINENESS = 1024  # a carry is placed to within this part of the way so far


@dataclass(frozen=True)
class Keep:
    """Hold the carry at the start of step `time`."""

    time: int

    def __str__(self) -> str:
        return f"keep carry {self.time}"


@dataclass(frozen=True)
class Drop:
    """Hold it no more."""

    time: int

    def __str__(self) -> str:
        return f"drop carry {self.time}"


@dataclass(frozen=True)
class Advance:
    """First-order runs of the steps from `start` up to `stop`, which is not run."""

    start: int
    stop: int

    def __str__(self) -> str:
        runs = self.stop - self.start
        return f"advance from carry {self.start} to carry {self.stop} ({runs} run{'s' if runs > 1 else ''})"


@dataclass(frozen=True)
class PullBack:
    """The second-order run of one step, and its vector-Jacobian product."""

    step: int

    def __str__(self) -> str:
        return f"pull back step {self.step}"


Action = Keep | Drop | Advance | PullBack


class Schedule(Protocol):
    """Decides from step numbers which carries are held."""

    @property
    def graphs(self) -> int:
        """How many steps' graphs the backward may hold at once: it builds them from one carry, with no other runs."""

    @property
    def bounded(self) -> bool:
        """Whether slots are few: a carry that was passed gives way, and that of the newest step is held besides."""

    def offered(self, time: int, held: Sequence[int]) -> tuple[bool, int | None]:
        """In the loop, before step `time`: whether its carry is kept, and which of those `held` is dropped for it."""

    def excess(self, steps: int, held: Sequence[int]) -> list[int]:
        """After `steps` steps, where the carries `held` are more than the slots: which are given up, in order."""

    def surplus(self, steps: int, held: Sequence[int]) -> int | None:
        """When the backward begins after `steps` steps: which of the carries `held` is given up."""

    def on_the_way(self, start: int, stop: int, held: int) -> list[int]:
        """In the backward, with `held` carries held: which are held on the way from carry `start` to carry `stop`."""

    def runs_back(self, steps: int, held: Sequence[int]) -> int:
        """When the backward begins after `steps` steps with the carries `held`: the first-order runs it will take."""


@dataclass(frozen=True)
class Periodic:
    """Keep the carry of every `every`-th step.

    Over T steps this keeps ceil(T / every) carries while the loop runs, and up to `every` more while the backward
    works through one segment; the replays are T - ceil(T / every) first-order runs. Memory is least near
    `every = sqrt(T)`.

    Example:
        >>> schedule = Periodic(3)
        >>> [step for step in range(10) if schedule.offered(step, range(0, step, 3))[0]]
        [0, 3, 6, 9]
    """

    every: int
    graphs: int = 1
    bounded = False

    def offered(self, time: int, held: Sequence[int]) -> tuple[bool, int | None]:
        """Keep it at the distance; drop none."""
        return not held or time - held[-1] >= self.every, None

    def excess(self, steps: int, held: Sequence[int]) -> list[int]:
        """None."""
        return []

    def surplus(self, steps: int, held: Sequence[int]) -> int | None:
        """None."""
        return None

    def on_the_way(self, start: int, stop: int, held: int) -> list[int]:
        """All of them."""
        return list(range(start + 1, stop))

    def runs_back(self, steps: int, held: Sequence[int]) -> int:
        """One for each step but the first ones of each segment, as many as there may be graphs."""
        whole, rest = divmod(steps, self.every)
        return whole * max(0, self.every - self.graphs) + max(0, rest - self.graphs)


@dataclass(frozen=True)
class Bounded:
    """Hold at most `checkpoints` carries in the backward, whatever the number of steps turns out to be.

    While the loop runs there are up to two more: one to give up when the number of steps is known, and the carry of the
    newest step. The first-order runs, the loop included, are the optimum for known T up to (s + 1)(s + 2) / 2 steps,
    with s = `checkpoints`; beyond see NOTE [ When the number of steps is unknown ].

    Example:
        >>> first_order_runs(Bounded(3), 10), optimal_runs(10, 3)
        (16, 16)

    References:
        Heuveline and Walther, Online checkpointing for parallel adjoint computation in PDEs, Euro-Par 2006.
        Wang, Moin and Iaccarino, Minimal repetition dynamic checkpointing algorithm for unsteady adjoint calculation,
        SIAM J. Sci. Comput. 31(4), 2009.
    """

    checkpoints: int
    graphs: int = 1
    bounded = True

    def offered(self, time: int, held: Sequence[int]) -> tuple[bool, int | None]:
        """Keep it while slots are free; then if an ending with it is no dearer than one without."""
        if len(held) <= self.checkpoints:
            return True, None
        gaps = _gaps(held, time)
        if gaps[-1] % max(1, (time - held[0]) // _FINENESS):
            return False, None  # deciding at every step of a long way would cost time and save nothing
        longer = [*gaps[:-1], gaps[-1] + 1]
        if self.graphs == 1:
            without, _ = _best_merge(longer, self)
            with_it, merged = _best_two_merges([*gaps, 1], self)
        else:
            without = _Costs(longer, self).before()[-1]
            with_it, merged = min(_merges([*gaps, 1], self)[:-1])
        return (True, held[merged + 1]) if with_it <= without else (False, None)

    def surplus(self, steps: int, held: Sequence[int]) -> int | None:
        """The one whose loss costs least."""
        if len(held) <= self.checkpoints + (self.graphs > 1):
            return None
        return held[_best_merge(_gaps(held, steps), self)[1] + 1]

    def excess(self, steps: int, held: Sequence[int]) -> list[int]:
        """Those whose loss costs least, beyond the slots and the spare one.

        Example:
            >>> Bounded(2).excess(6, range(6))
            [5, 1, 2]
        """
        held, gone = list(held), list[int]()
        while len(held) > self.checkpoints + 1:
            more = Bounded(len(held) - 1, self.graphs)
            gone.append(held[_best_merge(_gaps(held, steps), more)[1] + 1])
            held.remove(gone[-1])
        return gone

    def on_the_way(self, start: int, stop: int, held: int) -> list[int]:
        """Those of the optimal reversal with the slots that are free."""
        return _splits(start, stop + self.graphs, self.checkpoints - held + 1, self.graphs)

    def runs_back(self, steps: int, held: Sequence[int]) -> int:
        """Those of the gaps between the carries, with the slots that are free by then."""
        costs = _Costs(_gaps(held, steps), self)
        return sum(costs.of(at, at, 0) for at in range(len(costs.gaps)))


@dataclass(frozen=True)
class Revolve:
    """The optimum for a known number of `steps`; after them it goes on like `Bounded`.

    Example:
        >>> first_order_runs(Revolve(10, steps=1000), 1000) == optimal_runs(1000, 10)
        True

    References:
        Griewank and Walther, Algorithm 799: revolve, ACM Trans. Math. Softw. 26(1), 2000.
    """

    checkpoints: int
    steps: int
    graphs: int = 1
    bounded = True

    def offered(self, time: int, held: Sequence[int]) -> tuple[bool, int | None]:
        """Keep it where the optimal reversal of all steps begins."""
        start = held[0] if held else time
        if time - start >= self.steps:
            return self._beyond.offered(time, held)
        return time - start in _first_sweep(self.steps, self.checkpoints, self.graphs), None

    def excess(self, steps: int, held: Sequence[int]) -> list[int]:
        """As for an unknown length."""
        return self._beyond.excess(steps, held)

    def surplus(self, steps: int, held: Sequence[int]) -> int | None:
        """None, unless the loop went on for longer."""
        return self._beyond.surplus(steps, held)

    def on_the_way(self, start: int, stop: int, held: int) -> list[int]:
        """Those of the optimal reversal with the slots that are free."""
        return self._beyond.on_the_way(start, stop, held)

    def runs_back(self, steps: int, held: Sequence[int]) -> int:
        """Those of the gaps between the carries, with the slots that are free by then."""
        return self._beyond.runs_back(steps, held)

    @property
    def _beyond(self) -> Bounded:
        return Bounded(self.checkpoints, self.graphs)


def reversal_runs(steps: int, checkpoints: int) -> int:
    """The fewest first-order runs to go back over `steps` steps with `checkpoints` slots, the first carry's included.

    Example:
        >>> reversal_runs(4, 1), reversal_runs(4, 2), reversal_runs(4, 4)
        (6, 4, 3)
    """
    if steps <= 1:
        return 0
    if checkpoints < 1:
        return _NEVER
    if checkpoints == 1:
        return steps * (steps - 1) // 2
    repetitions, reach = 1, checkpoints + 1  # reach = C(s + r, r)
    while reach < steps:
        repetitions += 1
        reach = reach * (checkpoints + repetitions) // repetitions
    return repetitions * steps - reach * repetitions // (checkpoints + 1)


_NEVER = 1 << 60  # runs; without a slot no carry can be got back


def optimal_runs(steps: int, checkpoints: int, graphs: int = 1) -> int:
    """The fewest first-order runs of a whole inner loop and its backward, for a known number of steps.

    With several graphs that is a bound: what `Revolve(checkpoints, steps, graphs)` takes at most, since the first steps
    may be fewer than are built at once.

    Example:
        >>> optimal_runs(1000, 10) / 1000 - 1  # per step, beyond the loop
        2.637
        >>> optimal_runs(1000, 10, graphs=8), first_order_runs(Revolve(10, 1000, graphs=8), 1000)
        (2384, 2384)
    """
    units = -(-steps // graphs)
    return steps + graphs * (reversal_runs(units, checkpoints) - (units - 1))


def actions(schedule: Schedule, steps: int) -> Iterator[Action]:
    """What a schedule does in a loop of `steps` steps and one backward through it, in order.

    Example:
        >>> for action in actions(Periodic(2), 3):
        ...     print(action)
        keep carry 0
        advance from carry 0 to carry 1 (1 run)
        advance from carry 1 to carry 2 (1 run)
        keep carry 2
        advance from carry 2 to carry 3 (1 run)
        pull back step 2
        drop carry 2
        advance from carry 0 to carry 1 (1 run)
        pull back step 1
        pull back step 0
        drop carry 0
    """
    held: list[int] = []
    for time in range(steps):
        keep, dropped = schedule.offered(time, held)
        if dropped is not None:
            held.remove(dropped)
            yield Drop(dropped)
        if keep:
            held.append(time)
            yield Keep(time)
        yield Advance(time, time + 1)
    surplus = schedule.surplus(steps, held)
    if surplus is not None:
        held.remove(surplus)
        yield Drop(surplus)
    ready = steps  # the first step whose graph is there
    for step in reversed(range(steps)):
        if step < ready:
            if step == steps - 1 and schedule.bounded and schedule.graphs == 1:
                ready = step  # the newest carry is at hand
            else:
                ready = max(held[-1], step + 1 - schedule.graphs)
                for time in schedule.on_the_way(held[-1], ready, len(held)):
                    yield Advance(held[-1], time)
                    yield Keep(time)
                    held.append(time)
                if held[-1] < ready:
                    yield Advance(held[-1], ready)
        yield PullBack(step)
        if held[-1] == step:
            yield Drop(held.pop())


def first_order_runs(schedule: Schedule, steps: int) -> int:
    """The first-order runs of a loop of `steps` steps and one backward through it; the loop's own count too.

    Example:
        >>> first_order_runs(Periodic(10), 100), first_order_runs(Bounded(10), 100)
        (190, 223)
    """
    return sum(action.stop - action.start for action in actions(schedule, steps) if isinstance(action, Advance))


def explain(T: int, checkpoints: int | None = None, every: int | None = None, known: bool = False) -> None:  # noqa: N803  (as papers write it)
    """Print what happens in a loop of `T` steps and the backward through it, one action a line.

    Args:
        T: The number of inner steps.
        checkpoints: Slots, as in `innerloop_ctx(..., checkpoints=...)`.
        every: Distance, as in `innerloop_ctx(..., checkpoint_every=...)`.
        known: Whether the number of steps is told beforehand, as in `innerloop_ctx(..., checkpoints=..., steps=T)`.

    Raises:
        ValueError: Neither `checkpoints` nor `every` was given, or both.

    Example:
        >>> explain(T=4, checkpoints=2, known=True)
        keep carry 0
        advance from carry 0 to carry 1 (1 run)
        advance from carry 1 to carry 2 (1 run)
        keep carry 2
        advance from carry 2 to carry 3 (1 run)
        advance from carry 3 to carry 4 (1 run)
        pull back step 3
        pull back step 2
        drop carry 2
        advance from carry 0 to carry 1 (1 run)
        pull back step 1
        pull back step 0
        drop carry 0
        5 first-order runs (optimum 5), 4 second-order runs, at most 2 carries held
    """
    if (checkpoints is None) == (every is None):
        raise ValueError("Give either checkpoints=s or every=N: explain(T=12, checkpoints=3).")
    schedule: Schedule
    if every is not None:
        schedule = Periodic(every)
    else:
        assert checkpoints is not None
        schedule = Revolve(checkpoints, T) if known else Bounded(checkpoints)
    held = most = 0
    for action in actions(schedule, T):
        print(action)
        held += isinstance(action, Keep) - isinstance(action, Drop)
        most = max(most, held)
    optimum = "" if checkpoints is None else f" (optimum {optimal_runs(T, checkpoints)})"
    print(
        f"{first_order_runs(schedule, T)} first-order runs{optimum}, {T} second-order runs, at most {most} carries held"
    )


def _splits(start: int, stop: int, slots: int, graphs: int) -> list[int]:
    """Where to hold carries, to go back over the steps up to `stop` from a held carry, which takes one of the slots.

    Steps whose graphs are built together count as one; counted from the end, since that is where the backward begins.
    """
    found, place, length = [], 0, -(-(stop - start) // graphs)
    last = length
    while slots > 1:
        part = _left_part(length, slots)
        place, length, slots = place + part, length - part, slots - 1
        if length <= 1:
            break
        found.append(stop - graphs * (last - place))
    return found


def _left_part(length: int, slots: int) -> int:
    """How many of `length` steps to go back over last, in an optimal reversal."""
    if length <= 1:
        return length
    repetitions, reach = 1, slots + 1
    while reach < length:
        repetitions += 1
        reach = reach * (slots + repetitions) // repetitions
    longest = math.comb(slots + repetitions - 1, repetitions - 1)
    return min(longest, length - math.comb(slots + repetitions - 2, repetitions - 1))


@functools.lru_cache(maxsize=64)
def _first_sweep(steps: int, checkpoints: int, graphs: int) -> frozenset[int]:
    newest = [max(0, steps - graphs)] if graphs > 1 else []  # of one graph the newest carry is at hand
    return frozenset([0, *_splits(0, steps, checkpoints, graphs), *newest])


def _gaps(held: Sequence[int], end: int) -> list[int]:
    return [after - before for before, after in zip(held, [*held[1:], end], strict=True)]


class _Costs:
    """What it costs to go back over gaps of which some are merged, so that those after them have more slots."""

    def __init__(self, gaps: list[int], schedule: Bounded) -> None:
        self.gaps, self.graphs = gaps, schedule.graphs
        self.slots = schedule.checkpoints + (self.graphs > 1)

    def of(self, first: int, last: int, merged: int) -> int:
        """The gaps `first` to `last` as one, after `merged` merges before them. The newest carry is at hand."""
        steps = sum(self.gaps[first : last + 1]) - (self.graphs == 1 and last == len(self.gaps) - 1)
        return self.graphs * reversal_runs(-(-steps // self.graphs), self.slots - first + merged)

    def before(self) -> list[int]:
        """At i: of all gaps before gap i, none merged."""
        singles = (self.of(place, place, 0) for place in range(len(self.gaps)))
        return list(itertools.accumulate(singles, initial=0))

    def after(self, merged: int) -> list[int]:
        """At i: of all gaps from gap i on, after so many merges."""
        places = range(len(self.gaps) - 1, merged - 1, -1)
        sums = itertools.accumulate((self.of(place, place, merged) for place in places), initial=0)
        return [0] * merged + list(sums)[::-1]


def _best_merge(gaps: list[int], schedule: Bounded) -> tuple[int, int]:
    """The least cost after the merge of a gap with the next one, and which gap that is."""
    return min(_merges(gaps, schedule))


def _merges(gaps: list[int], schedule: Bounded) -> list[tuple[int, int]]:
    """The costs after the merge of each gap with the next one."""
    costs = _Costs(gaps, schedule)
    before, after = costs.before(), costs.after(1)
    return [(before[i] + costs.of(i, i + 1, 0) + after[i + 2], i) for i in range(len(gaps) - 1)]


def _best_two_merges(gaps: list[int], schedule: Bounded) -> tuple[int, int]:
    """The least cost after two merges, and the first gap that takes part."""
    costs = _Costs(gaps, schedule)
    before, between, after = costs.before(), costs.after(1), costs.after(2)
    best = first = (_NEVER, 0)
    for j in range(len(gaps) - 1):
        if j + 2 < len(gaps):  # three gaps become one
            best = min(best, (before[j] + costs.of(j, j + 2, 0) + after[j + 3], j))
        if j >= 2:  # two pairs, the first of which ends before gap j
            i = j - 2
            first = min(first, (before[i] + costs.of(i, i + 1, 0) + between[i + 2], i))
            best = min(best, (first[0] - between[j] + costs.of(j, j + 1, 1) + after[j + 2], first[1]))
    return best
