"""Steps within a budget of memory: measured on the first ones, then unrolled or checkpointed as the budget allows.

NOTE [ Three stretches ]

1. The first step or two are checkpointed steps. The second has the optimizer's state, and is run and pulled back once
   more to see what that takes. The sizes are remembered with the model: a later loop knows them after its first step.
2. Then as many steps as the budget has graphs for are steps of the full unroll: nothing is recorded, replayed or
   checked, and autograd differentiates them as it would without this package.
3. The steps after them are checkpointed, in as many slots as the rest of the budget holds. What they hold of your
   batches takes slots away again.

The results of each stretch are where the next one starts, so the stretches are chained by autograd like the steps.
"""

from __future__ import annotations

import weakref
from collections.abc import Callable, Hashable, Sequence
from typing import Any

from torch import Tensor, nn

from lowmem_higher.budget import Allotment, Sizes, allot
from lowmem_higher.optim.base import DifferentiableOptimizer, GradCallback
from lowmem_higher.report import Report
from lowmem_higher.schedule import Bounded, Revolve
from lowmem_higher.trajectory import Trajectory

_KINDS = 16  # of steps, whose sizes are remembered with a model
_known: weakref.WeakKeyDictionary[nn.Module, dict[Hashable, Sizes]] = weakref.WeakKeyDictionary()


class Budgeted:
    """Takes the steps of one inner loop within so many bytes.

    Args:
        optimizer: Whose steps these are.
        trajectory: Takes the checkpointed ones.
        model: The model; sizes are remembered with it.
        limit: Bytes for carries and graphs.
        steps: How many steps there will be, if that is known.
    """

    def __init__(
        self,
        optimizer: DifferentiableOptimizer,
        trajectory: Trajectory,
        model: nn.Module,
        limit: int,
        steps: int | None,
    ) -> None:
        self._optimizer = weakref.ref(optimizer)
        self._trajectory = trajectory
        self._model = model
        self._limit, self._steps = limit, steps
        self._key: Hashable = None  # of the first step
        self._to_unroll = 0
        self._allotment: Allotment | None = None
        self._externals = 0  # bytes of them at that time

    @property
    def sizes(self) -> Sizes | None:
        """What was measured; None before the second step."""
        return _known.get(self._model, {}).get(self._key)

    def step(
        self,
        optimizer: DifferentiableOptimizer,
        loss: Any,
        args: tuple[Any, ...],
        kwargs: dict[str, Any],
        callback: GradCallback | None,
    ) -> None:
        """Take a checkpointed step; as soon as the sizes are known, share out the budget."""
        self._trajectory.step(optimizer, loss, args, kwargs, callback)
        if self._allotment is not None:
            self._give_way(self._allotment)
            return
        known = _known.setdefault(self._model, {})
        if self._key is None:
            self._key = self._trajectory.kind_of_step()
        elif self._key not in known:
            if len(known) == _KINDS:
                del known[next(iter(known))]
            known[self._key] = self._trajectory.measure_step()
        if self.sizes is not None:
            self._share_out(self.sizes, optimizer)

    def outer(self, optimizer: DifferentiableOptimizer, loss: Tensor) -> Tensor:
        """The same value and gradient as `loss`, without its graph."""
        return self._trajectory.outer(optimizer, loss)

    def scan(
        self,
        optimizer: DifferentiableOptimizer,
        fn: Callable[..., Tensor],
        batches: Sequence[Any],
        args: tuple[Any, ...],
    ) -> bool:
        """Steps are measured one by one."""
        return False

    def count_step(self) -> None:
        """A step of the full unroll was taken."""
        self._trajectory.count_step()
        self._to_unroll -= 1
        optimizer = self._optimizer()
        if self._to_unroll == 0 and optimizer is not None:
            self._trajectory.resume(optimizer._fmodel)
            optimizer.follow(self, self)

    @property
    def report(self) -> Report:
        """What the run has cost so far."""
        return self._trajectory.report

    @property
    def program(self) -> object | None:
        """The last recorded step."""
        return self._trajectory.program

    def _share_out(self, sizes: Sizes, optimizer: DifferentiableOptimizer) -> None:
        trajectory = self._trajectory
        taken = trajectory.ledger.steps
        to_come = None if self._steps is None else max(1, self._steps - taken)
        found = allot(self._limit, sizes, to_come, held=taken)
        self._allotment, self._to_unroll = found, found.unrolled
        if to_come is None:
            trajectory.schedule(Bounded(found.checkpoints, found.graphs))
        else:
            before = taken if found.unrolled == 0 else 0  # with those to come, one stretch of checkpointed steps
            stretch = before + max(1, to_come - found.unrolled)
            trajectory.schedule(Revolve(found.checkpoints, stretch, found.graphs))
        self._externals = trajectory.ledger.externals_bytes
        if self._to_unroll:
            trajectory.pause(optimizer._fmodel)
            optimizer.follow(None, self)

    def _give_way(self, allotment: Allotment) -> None:
        """Hold fewer carries as the batches that steps hold grow."""
        assert self.sizes is not None
        grown = self._trajectory.ledger.externals_bytes - self._externals
        fewer = allotment.give_way(grown, self.sizes.carry)
        if fewer < allotment.checkpoints:
            self._trajectory.schedule(Bounded(fewer, allotment.graphs))
