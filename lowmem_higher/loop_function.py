"""An inner loop that is a function: batches, loss, terms of the outer loss, and what it is differentiated by."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from torch import Tensor

from lowmem_higher.errors import RecordError
from lowmem_higher.optim.base import DifferentiableOptimizer
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
    """

    loss_fn: Callable[..., Tensor]
    batches: Any
    terms: Mapping[int, Outer]
    meta: Meta
    log: StepLog
    verify: bool
    _taken: Tensor | None = None
    _taking: bool = False

    def __call__(self, fmodel: Any, step: int, *meta: Any) -> Tensor:
        """The inner loss of a step."""
        batch = self.batches[step] if hasattr(self.batches, "__getitem__") else self.batches(step)
        if self.verify:
            self.log.check_batch(step, batch)
        if isinstance(self.meta, Mapping):
            loss = self.loss_fn(fmodel, batch, **dict(zip(self.meta, meta, strict=True)))
        else:
            loss = self.loss_fn(fmodel, batch, *meta)
        if self._taking and isinstance(loss, Tensor):
            self._taken = loss.detach()
        return loss

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
            diffopt.step(self, step, *self.tensors)
        finally:
            self._taking = False
        taken, self._taken = self._taken, None
        if self.verify and taken is not None:
            self.log.check_loss(step, taken)

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
