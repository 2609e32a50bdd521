"""Which step a `grad_callback` is called for in this thread: what a callback cannot see by itself."""

from __future__ import annotations

import threading
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass

from torch import Tensor


@dataclass(frozen=True)
class CurrentStep:
    """A step whose gradients a callback was given.

    Attributes:
        time: Which step.
        weights: The fast weights that it starts from.
        replayed: Whether this is a replay of it.
    """

    time: int
    weights: Sequence[Tensor]
    replayed: bool = False

    def __str__(self) -> str:
        return f"the replay of step {self.time}" if self.replayed else f"step {self.time} of the loop"


class _Local(threading.local):
    step: CurrentStep | None = None


_local = _Local()


def current_step() -> CurrentStep | None:
    """The step whose callback runs now; None outside of one."""
    return _local.step


@contextmanager
def during(step: CurrentStep) -> Iterator[None]:
    """Its callback runs inside the block."""
    before, _local.step = _local.step, step
    try:
        yield
    finally:
        _local.step = before
