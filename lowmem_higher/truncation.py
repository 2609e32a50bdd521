"""Where gradients end: truncated backpropagation through time, and the inner gradient.

NOTE [ What truncation cuts ]

With T steps taken when a backward runs, what a step before step T - K has made (weights, optimizer state) is a constant
to it: no gradient passes through that step, neither to earlier weights nor to what the step read from outside. The
initial weights were made by no step: they get their gradient as long as T <= K.

A checkpointed context lets go of a step's record as soon as it is out of reach, and so of the carries before it. In
the full unroll the results of a step pass through a `Reach`, whose backward ends there.

NOTE [ The inner gradient is the partial derivative ]

Where an optimizer holds a part of the weights, its step makes them from others that stay as they are, and that another
optimizer, or a later step, may differentiate by. A callback can do the same to a weight that a step did not use. Such
weights are then ancestors of the weights beside them, and autograd would give the total derivative, through the steps
in between; torch's optimizers take the partial one. So while an inner gradient is taken, what steps have made passes no
gradient on. (`higher` takes the total derivative here.)

Williams and Peng, An efficient gradient-based algorithm for on-line training of recurrent network trajectories, Neural
Computation 2(4), 1990; Shaban et al., Truncated back-propagation for bilevel optimization, AISTATS 2019.
"""

from __future__ import annotations

import weakref
from collections import deque
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, cast

import torch
from torch import Tensor


class LastSteps:
    """The steps of one functional model, as far as gradients pass through them; `count` is None for all."""

    def __init__(self) -> None:
        self.count: int | None = None
        self.taken = 0
        self.inner = False  # whether an inner gradient is being taken
        self._nodes: deque[weakref.ref[Any]] = deque()

    @contextmanager
    def inner_gradient(self) -> Iterator[None]:
        """An inner gradient is taken inside the block."""
        self.inner = True
        try:
            yield
        finally:
            self.inner = False

    def passes(self, time: int) -> bool:
        """Whether gradients pass through what the step of that time has made."""
        return not self.inner and (self.count is None or self.taken - time <= self.count)

    def reached(self, made: Tensor) -> Tensor:
        """A result of the step being taken, in the full unroll."""
        return cast(Tensor, Reach.apply(made, self, self.taken)) if made.requires_grad else made  # type: ignore[no-untyped-call]

    def left(self, node: weakref.ref[Any]) -> None:
        """A checkpointed step was taken and left this node; the one that is now out of reach lets go of its record."""
        if self.count is not None:
            self._nodes.append(node)
            out_of_reach = self._nodes.popleft()() if len(self._nodes) > self.count else None
            if out_of_reach is not None:
                out_of_reach.truncated, out_of_reach.record = True, None


class Reach(torch.autograd.Function):
    """The identity; its backward gives nothing where gradients end."""

    @staticmethod
    def forward(ctx: Any, made: Tensor, last: LastSteps, time: int) -> Tensor:
        """A tensor of its own, which may be edited in place."""
        ctx.last, ctx.time = last, time
        return made.clone()

    @staticmethod
    def backward(ctx: Any, cotangent: Tensor) -> tuple[Tensor | None, None, None]:
        """See the notes above."""
        return cotangent if ctx.last.passes(ctx.time) else None, None, None
