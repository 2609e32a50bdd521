"""Update rules that this package did not write, run so that their replays are exact.

A rule of your own may read a tensor that it is not given (the weights of a learned optimizer) and may draw random
numbers (Langevin dynamics). Both are noted when the user's step runs it, and put in place for a replay, as for a
`grad_callback`. Writing into a tensor that it was given is refused: the next step, or the carry, still holds it.
"""

from __future__ import annotations

import copy
from collections.abc import Iterable, Mapping, Sequence

import torch
from torch import Tensor

from lowmem_higher.errors import RecordError, ReplayMismatchError
from lowmem_higher.optim.base import DifferentiableOptimizer, Gradients, Group, State
from lowmem_higher.replay_state import RngState, capture_rng, rng_restored, same_rng
from lowmem_higher.structure import tensors_in
from lowmem_higher.watch import Watcher, refuse_hidden


def is_custom(optimizer: DifferentiableOptimizer) -> bool:
    """Whether the rule is not one of this package's."""
    return not type(optimizer).__module__.startswith("lowmem_higher.optim.")


def advance_first(
    optimizer: DifferentiableOptimizer, weights: Sequence[Tensor], grads: Gradients, devices: Iterable[torch.device]
) -> tuple[tuple[list[Tensor], State], list[Tensor], RngState | None]:
    """The update of the user's step; and what it read besides its arguments, and where the random numbers stood."""
    devices = list(devices)
    rng = capture_rng(devices)
    given = _given(weights, grads, optimizer.state, optimizer.param_groups)
    watcher = Watcher(given, own=frozenset())
    with torch.no_grad(), torch._C._EnableTorchFunction(), refuse_hidden(watcher), watcher.on():
        result = optimizer.advance(weights, grads, optimizer.state, optimizer.param_groups)
    name = type(optimizer).__name__
    if watcher.foreign_writes:
        raise RecordError(
            f"The update rule of {name} changed a tensor that it was given, in place ({watcher.foreign_writes[0]}), "
            "which would change steps that were recorded. Make a new one: buf = 0.9 * buf + grad, not buf.mul_(0.9)."
        )
    nested = [
        key
        for entries in result[1]
        for entry in entries.values()
        for key, value in entry.items()
        if not isinstance(value, Tensor) and tensors_in(value)
    ]
    if nested:
        raise RecordError(
            f"The update rule of {name} keeps a collection of tensors as state[{nested[0]!r}], through which no "
            "gradient is carried from step to step. Keep each tensor under a name of its own: "
            'return new_param, {**state, "first": a, "second": b}.'
        )
    drawn = None if same_rng(rng, capture_rng(devices)) else rng
    return result, watcher.found, drawn


def advance_again(
    rules: DifferentiableOptimizer,
    weights: Sequence[Tensor],
    grads: Gradients,
    state: State,
    groups: Sequence[Group],
    stand_ins: Mapping[int, Tensor],
    rng: RngState | None,
) -> tuple[list[Tensor], State]:
    """The same update in a replay, with stand-ins for what it read."""
    watcher = Watcher(_given(weights, grads, state, groups), stand_ins)
    with rng_restored(rng), watcher.on():
        result = copy.copy(rules).advance(weights, grads, state, groups)
    if watcher.found:
        raise ReplayMismatchError(
            f"In a replay the update rule of {type(rules).__name__} read {len(watcher.found)} tensor(s) that require "
            "grad and that it did not read while your loop ran. Hand in what changes from step to step as a "
            "hyperparameter: diffopt.step(loss, override={'name': [tensor]})."
        )
    return result


def _given(weights: Sequence[Tensor], grads: Gradients, state: State, groups: Sequence[Group]) -> list[Tensor]:
    others = [{key: value for key, value in group.items() if key != "params"} for group in groups]
    return [*weights, *(grad for grad in grads if grad is not None), *tensors_in([state, others])]
