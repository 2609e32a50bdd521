"""Into which pieces a run that survives is cut: ways from carry to carry, and leaves. It knows step numbers only."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from lowmem_higher.schedule import Periodic, Revolve, optimal_runs


@dataclass(frozen=True)
class Piece:
    """What is done next.

    Attributes:
        start: The newest carry that is held.
        stop: Where the way from there leads; if that is `start`, a leaf begins there, or where the last way led.
        slots: Of carries, for a leaf that begins at `stop`.
        kept: Whether the carry at `stop` is to be held.
    """

    start: int
    stop: int
    slots: int
    kept: bool


@dataclass(frozen=True)
class Ahead:
    """What is still to be done: steps of ways, and the runs of leaves."""

    way: int
    first_order: int
    second_order: int


@dataclass(frozen=True)
class PiecePlan:
    """Cuts the steps from `end` to `steps` into pieces.

    A leaf takes the first-order runs that the schedule has for its stretch and one more, since its loop ends with the
    last step. So over all steps that is the optimum and one run for each leaf but the first.

    Attributes:
        schedule: Which carries are held.
        steps: The steps of the loop.
        end: The step that the backward ends with.

    Example:
        >>> PiecePlan(Revolve(3, 1000), 1000).next([0], 1000, longest=100)
        Piece(start=0, stop=847, slots=3, kept=True)
        >>> PiecePlan(Revolve(3, 1000), 1000).ahead([0], 1000, longest=100)
        Ahead(way=5199, first_order=6978, second_order=1000)
    """

    schedule: Periodic | Revolve
    steps: int
    end: int = 0

    def next(self, held: Sequence[int], position: int, longest: int) -> Piece:
        """What to do with the carries `held`, of step 0 and later ones, when the steps up to `position` are left."""
        base, schedule = held[-1], self.schedule
        if base < self.end:
            return Piece(base, self.end, 0, kept=True)
        if isinstance(schedule, Periodic):
            following = base + schedule.every
            return Piece(base, following, 0, kept=True) if following < position else Piece(base, base, 0, kept=False)
        slots = schedule.checkpoints - len(held) + 1
        if position - base <= longest:
            return Piece(base, base, slots, kept=False)
        way = schedule.on_the_way(base, position - schedule.graphs, len(held)) if slots > 1 else []
        return Piece(base, way[0], slots, kept=True) if way else Piece(base, position - longest, slots, kept=False)

    def ahead(self, held: Sequence[int], position: int, longest: int, here: int | None = None) -> Ahead:
        """What is to be done from there on; `here` is how far the first way has been gone."""
        held, way, first_order = list(held), 0, 0
        left = position - self.end
        while position > self.end:
            piece = self.next(held, position, longest)
            begun = here if here is not None and piece.start <= here <= piece.stop else piece.start
            way, here = way + piece.stop - begun, None
            if piece.kept:
                held.append(piece.stop)
                continue
            first_order += self.runs_of_leaf(position - piece.stop, piece.slots)
            position = piece.stop
            held = [0, *(at for at in held if 0 < at < position)]
        return Ahead(way, first_order, left)

    def runs_of_leaf(self, steps: int, slots: int) -> int:
        """The first-order runs of a leaf."""
        if isinstance(self.schedule, Periodic):
            return steps
        return optimal_runs(steps, max(1, slots), self.schedule.graphs)
