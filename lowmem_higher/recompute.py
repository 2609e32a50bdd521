"""Rule R7: `torch.utils.checkpoint` in the user's code recomputes with the weights of then, not of now.

A checkpointed block runs again during backward. The fmodel then holds the weights of another time, and a replay's
twin holds none. So every function handed to `checkpoint` while a model is bound here is wrapped: its recomputation
first puts the weights of then in place, and copies of the buffers of then, so that no statistic is counted twice.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, ExitStack, nullcontext
from typing import Any

import torch.utils.checkpoint
from torch import Tensor

from lowmem_higher.fast_weights import FunctionalView, ParameterSlots, copied, marked_as_rerun
from lowmem_higher.interception import Interception
from lowmem_higher.second_order import second_order_here

Rerun = Callable[..., Any]
Bind = Callable[[Rerun], Rerun]


def _replacement(original: Any) -> Any:
    def generator(function: Rerun, *args: Any, **kwargs: Any) -> Any:
        for bind in _interception.handlers():
            function = bind(function)
        return original(function, *args, **kwargs)

    return generator


_GENERATOR = "_checkpoint_without_reentrant_generator"
if hasattr(torch.utils.checkpoint, f"{_GENERATOR}_impl"):  # torch 2.14
    _GENERATOR = f"{_GENERATOR}_impl"
_interception: Interception[Bind] = Interception((torch.utils.checkpoint, _GENERATOR, _replacement))


class FixedWeights:
    """Binds recomputations to these weights.

    Args:
        slots: The places of the model.
        weights: The weights.
        around: Makes a further context manager to enter for a recomputation.
    """

    def __init__(
        self,
        slots: ParameterSlots,
        weights: Sequence[Tensor],
        around: Callable[[], AbstractContextManager[Any]] | None = None,
    ) -> None:
        self._slots, self._weights, self._around = slots, weights, around

    def __call__(self, function: Rerun) -> Rerun:
        """Wrap a function that will be run again."""
        buffers = copied(self._slots.read_buffers())

        def rerun(*args: Any, **kwargs: Any) -> Any:
            with ExitStack() as stack:
                stack.enter_context(marked_as_rerun())
                stack.enter_context(second_order_here())
                stack.enter_context(self._slots.installed(self._weights, copied(buffers)))
                stack.enter_context(_interception.by(self))  # for a checkpoint inside this one
                if self._around is not None:
                    stack.enter_context(self._around())
                return function(*args, **kwargs)

        return rerun


class CurrentWeights:
    """Binds recomputations to the weights that an fmodel has when `checkpoint` is called."""

    def __init__(self, view: FunctionalView) -> None:
        self.view = view

    def __call__(self, function: Rerun) -> Rerun:
        """Wrap a function that will be run again."""
        return FixedWeights(self.view.slots, self.view.current)(function)


def follow(bind: Bind) -> AbstractContextManager[None]:
    """Bind the recomputations of every `checkpoint` called inside the block, in this thread."""
    return _interception.by(bind)


def follow_view(view: FunctionalView) -> AbstractContextManager[None]:
    """The same for an fmodel's current weights; does nothing where they are bound already."""
    if any(isinstance(bind, CurrentWeights) and bind.view is view for bind in _interception.handlers()):
        return nullcontext()
    return _interception.by(CurrentWeights(view))
