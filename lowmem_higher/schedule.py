"""Which carries are kept. A schedule knows step numbers only, never a tensor."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Periodic:
    """Keep the carry of every `every`-th step.

    Over T steps this keeps ceil(T / every) carries while the loop runs, and up to `every` more while the backward
    works through one segment; the replays are T - ceil(T / every) first-order runs. Memory is least near
    `every = sqrt(T)`.

    Example:
        >>> schedule = Periodic(3)
        >>> [step for step in range(10) if schedule.keeps(step)]
        [0, 3, 6, 9]
    """

    every: int

    def keeps(self, step: int, since: int = 0) -> bool:
        """Whether the carry at the start of a step is kept; `since` is a step whose carry is kept anyway."""
        return (step - since) % self.every == 0
