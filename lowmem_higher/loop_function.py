"""An inner loop that is a function: batches, loss, terms of the outer loss, and what it is differentiated by."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from lowmem_higher.errors import RecordError
from lowmem_higher.flat import NotTraceableError
from lowmem_higher.optim.base import DifferentiableOptimizer, GradCallback
from lowmem_higher.replay_state import capture_rng, same_rng, write_rng
from lowmem_higher.scan import warn_of_loop
from lowmem_higher.step_log import StepLog

Meta = Mapping[str, Tensor] | Sequence[Tensor]
Outer = Callable[[Any], Tensor]


@dataclass(eq=False)
class LoopFunction:
    """Takes the steps of a loop, and says what they add to the outer loss.

    It is the function that `diffopt.step` is given, so a step holds its number in place of its batch.

    Attributes:
        loss_fn: The inner loss, of an fmodel, a batch and `meta`.
        batches: A sequence, or a function of the step number.
        terms: The outer loss: after how many steps which function of an fmodel is added.
        meta: What it is differentiated by, besides the initial weights.
        log: What batches and losses of earlier runs are compared with.
        verify: Whether they are.
        grad_callback: That of every step.
    """

    loss_fn: Callable[..., Tensor]
    batches: Any
    terms: Mapping[int, Outer]
    meta: Meta
    log: StepLog
    verify: bool
    grad_callback: GradCallback | None = None
    _taken: Tensor | None = None
    _taking: bool = False

    def __call__(self, fmodel: Any, step: int, *meta: Any) -> Tensor:
        """The inner loss of a step."""
        batch = self.batch(step)
        if isinstance(self.meta, Mapping):
            loss = self.loss_fn(fmodel, batch, **dict(zip(self.meta, meta, strict=True)))
        else:
            loss = self.loss_fn(fmodel, batch, *meta)
        if self._taking and isinstance(loss, Tensor):
            self._taken = loss.detach()
        return loss

    def batch(self, step: int) -> Any:
        """What a step reads; the same whenever it is read, or that raises."""
        batch = self.batches[step] if hasattr(self.batches, "__getitem__") else self.batches(step)
        if self.verify:
            self.log.check_batch(step, batch)
        return batch

    @property
    def tensors(self) -> list[Tensor]:
        """The tensors of `meta`."""
        return list(self.meta.values() if isinstance(self.meta, Mapping) else self.meta)

    @property
    def names(self) -> list[str]:
        """Their names; numbers, if it is a sequence."""
        return list(self.meta) if isinstance(self.meta, Mapping) else [str(at) for at in range(len(self.meta))]

    def in_the_form_of_meta(
        self, grads: Sequence[Tensor | None]
    ) -> dict[str, Tensor | None] | tuple[Tensor | None, ...]:
        """A dictionary, if `meta` is one, else a tuple."""
        return dict(zip(self.meta, grads, strict=True)) if isinstance(self.meta, Mapping) else tuple(grads)

    def take(self, diffopt: DifferentiableOptimizer, step: int) -> None:
        """Take a step."""
        self._taking = True
        try:
            diffopt.step(self, step, *self.tensors, grad_callback=self.grad_callback)
        finally:
            self._taking = False
        taken, self._taken = self._taken, None
        if self.verify and taken is not None:
            self.log.check_loss(step, taken)

    def scan(self, diffopt: DifferentiableOptimizer, start: int, stop: int) -> bool:
        """Take the steps from `start` to `stop` by traces; False, and nothing is changed, where that can't be."""
        executor = diffopt._executor
        if executor is None or start == stop:
            return False
        if self.grad_callback is not None:
            warn_of_loop("it has a grad_callback", stacklevel=5)
            return False
        devices = {tensor.device for tensor in diffopt._fmodel._view.current if tensor.is_cuda}
        before = capture_rng(devices)
        fn, args = self.loss_fn, tuple[Any, ...](self.tensors)
        if isinstance(self.meta, Mapping):
            fn, args = _by_name(fn), (dict(self.meta),)
        try:
            taken = executor.scan(diffopt, fn, _Stretch(self, start, stop, devices), args)
        except Exception as error:
            error.add_note(f"(metagradient: the scan begins at step {start})")
            raise
        if taken:
            self.log.count = stop
        else:
            write_rng(before)
        return taken

    def term(self, fmodel: Any, steps: int) -> Tensor | None:
        """What the outer loss gains after so many steps."""
        fn = self.terms.get(steps)
        if fn is None:
            return None
        before = list(fmodel._view.current)
        found = fn(fmodel)
        check_outer(found)
        fmodel._view.take_assigned()
        if any(one is not other for one, other in zip(before, fmodel._view.current, strict=True)):
            raise RecordError(
                f"outer changed the fast weights after {steps} steps, with which no step of the loop could go on. Let "
                "it compute with them only, or write this loop yourself: innerloop_ctx(model, opt, ...)."
            )
        return found


def _by_name(loss_fn: Callable[..., Tensor]) -> Callable[..., Tensor]:
    def inner_loss(fmodel: Any, batch: Any, meta: Mapping[str, Tensor]) -> Tensor:
        return loss_fn(fmodel, batch, **meta)

    return inner_loss


class _Stretch(Sequence[Any]):
    """The batches of some steps, each read when it is asked for."""

    def __init__(self, function: LoopFunction, start: int, stop: int, devices: Iterable[torch.device]) -> None:
        self._function, self._start, self._stop, self._devices = function, start, stop, devices

    def __len__(self) -> int:
        return self._stop - self._start

    def __getitem__(self, index: Any) -> Any:
        step = self._start + index
        if step < self._function.log.count:  # it was taken: this is a replay
            return self._function.batch(step)
        before = capture_rng(self._devices)
        batch = self._function.batch(step)
        if not same_rng(before, capture_rng(self._devices)):
            raise NotTraceableError("reading a batch draws random numbers, which a replay would have to draw again")
        return batch


def check_outer(found: object) -> None:
    """Refuse what no gradient can be asked of."""
    if not isinstance(found, Tensor):
        raise TypeError(
            f"outer must return a scalar tensor, and returned {type(found).__name__}: "
            "outer=lambda fmodel: criterion(fmodel(x_val), y_val)."
        )
    if found.numel() != 1:
        raise ValueError(f"outer must return a scalar tensor, and returned shape {tuple(found.shape)}: use .mean().")
    if not found.requires_grad:
        raise ValueError(
            "outer returned a tensor that depends on no fast weight, so there is no gradient. Compute it from the "
            "model that it is given, outer=lambda fmodel: criterion(fmodel(x_val), y_val), without torch.no_grad()."
        )
    if not found.isfinite().all():
        raise ValueError(
            f"The outer loss is {found.detach().item()}, of which no gradient is worth the backward. Training has "
            "diverged: lower the inner learning rate, or clip in loss_fn, loss.clamp(max=...)."
        )
