"""`higher`'s way to write an optimizer: `_update` puts new parameters and state in the place of the old ones.

Here it runs on a throw-away copy of the optimizer whose `param_groups` and `state` are filled in for one step. So it
is a function of its inputs like a pure rule, and can be replayed from any step, in any order. What it leaves behind
besides parameters and state, such as a counter on the optimizer or a decayed learning rate, is taken over where it is a
plain value; under `checkpoint_every` the rest is refused, since no gradient could follow it.
"""

from __future__ import annotations

import copy
from collections import defaultdict, deque
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from lowmem_higher.errors import RecordError
from lowmem_higher.structure import tensors_in

State = list[dict[int, dict[str, Any]]]
Groups = Sequence[dict[str, Any]]


def run_update(
    optimizer: Any, params: Sequence[Tensor], grads: Sequence[Tensor | None], state: State, groups: Groups
) -> tuple[list[Tensor], State]:
    """One update of all parameters by an overridden `_update`."""
    indices: list[list[int]] = optimizer._group_to_param_list
    worker = copy.copy(optimizer)
    worker.param_groups = [
        {**group, "params": [params[index] for index in members]}
        for group, members in zip(groups, indices, strict=True)
    ]
    worker.state = [_with_defaults(entries) for entries in state]
    attributes, contents = dict(vars(worker)), _contents(worker)
    worker._update([[grads[index] for index in members] for members in indices])

    new_params = list(params)
    for group, members in zip(worker.param_groups, indices, strict=True):
        for index, param in zip(members, group["params"], strict=True):
            new_params[index] = param
    _check_results(optimizer, params, new_params, worker.state)
    if groups is optimizer.param_groups:  # the user's own step, not a replay
        written = {
            name: value
            for name, value in vars(worker).items()
            if name not in ("param_groups", "state") and attributes.get(name, _MISSING) is not value
        }
        changed = [_changed(group, new) for group, new in zip(groups, worker.param_groups, strict=True)]
        if optimizer._executor is not None:
            _check_written(optimizer, written, changed, _mutated(contents, _contents(worker)))
        vars(optimizer).update(written)
        for group, new in zip(groups, changed, strict=True):
            group.update(new)
    return new_params, [{key: dict(entry) for key, entry in entries.items() if entry} for entries in worker.state]


def apply_rule_in_place(optimizer: Any, grouped_grads: Sequence[Sequence[Tensor | None]]) -> None:
    """The pure rule as an `_update`, for subclasses that call that of their base class."""
    params: dict[int, Tensor] = {}
    grads: dict[int, Tensor | None] = {}
    for group, members, found in zip(
        optimizer.param_groups, optimizer._group_to_param_list, grouped_grads, strict=True
    ):
        params.update(zip(members, group["params"], strict=True))
        grads.update(zip(members, found, strict=True))
    size = max(params, default=-1) + 1
    groups = [{key: value for key, value in group.items() if key != "params"} for group in optimizer.param_groups]
    new_params, new_state = optimizer.apply_rule(
        [params.get(index) for index in range(size)],
        [grads.get(index) for index in range(size)],
        optimizer.state,
        groups,
    )
    for group, members in zip(optimizer.param_groups, optimizer._group_to_param_list, strict=True):
        group["params"] = [new_params[index] for index in members]
    optimizer.state = [_with_defaults(entries) for entries in new_state]


def _with_defaults(entries: Mapping[int, dict[str, Any]]) -> dict[int, dict[str, Any]]:
    return defaultdict(dict, {key: _unshared(entry) for key, entry in entries.items()})


def _unshared(entry: Mapping[str, Any]) -> dict[str, Any]:
    """A copy in which collections may be written to, for instance a list of past losses."""
    return {name: copy.copy(value) if isinstance(value, _COLLECTIONS) else value for name, value in entry.items()}


def _check_results(optimizer: Any, params: Sequence[Tensor], new_params: Sequence[Any], state: Any) -> None:
    for old, new in zip(params, new_params, strict=True):
        if not isinstance(new, Tensor) or new.shape != old.shape:
            found = f"of shape {tuple(new.shape)}" if isinstance(new, Tensor) else type(new).__name__
            raise ValueError(
                f"{type(optimizer).__name__}._update put a parameter {found} in the place of one of shape "
                f"{tuple(old.shape)}. Keep the shape: self.param_groups[i]['params'][j] = p - lr * g, where lr has no "
                "dimension: lr.reshape(())."
            )
    if not all(isinstance(entry, Mapping) for entries in state for entry in entries.values()):
        raise TypeError(
            f"{type(optimizer).__name__}._update put something else than a dictionary into self.state[i][j], where j "
            "is the position of a parameter in group i. Write self.state[i][j]['name'] = value."
        )


_MISSING = object()
_PLAIN = (bool, int, float, complex, str, type(None))
_COLLECTIONS = (list, dict, set, deque)


def _contents(worker: Any) -> dict[str, list[Any]]:
    """What the optimizer's own lists, dictionaries and sets hold."""
    return {
        name: [*value, *value.values()] if isinstance(value, dict) else list(value)
        for name, value in vars(worker).items()
        if isinstance(value, _COLLECTIONS) and name not in ("param_groups", "state")
    }


def _mutated(before: dict[str, list[Any]], after: dict[str, list[Any]]) -> list[str]:
    return [name for name in before if list(map(id, before[name])) != list(map(id, after.get(name, before[name])))]


def _changed(old: dict[str, Any], new: dict[str, Any]) -> dict[str, Any]:
    return {key: value for key, value in new.items() if key != "params" and old.get(key, _MISSING) is not value}


def _check_written(optimizer: Any, written: dict[str, Any], changed: list[dict[str, Any]], mutated: list[str]) -> None:
    """Refuse what a replay could not find again, or no gradient could follow."""
    names = [f"self.{name}" for name, value in written.items() if not isinstance(value, _PLAIN)]
    names += [f"self.{name}" for name in mutated]
    names += [
        f"self.param_groups[{i}][{key!r}]" for i, new in enumerate(changed) for key in new if tensors_in(new[key])
    ]
    if names:
        raise RecordError(
            f"{type(optimizer).__name__}._update wrote into {', '.join(names)}, which no replay can follow. Keep what "
            "changes from step to step in the state of a parameter: self.state[i][j]['name'] = tensor; or use "
            "checkpoint_every=None."
        )


# Names that optimizers written for `higher` import.


def _get_mask_closure(mask: Tensor) -> Callable[[Tensor], Tensor]:
    """A hook that sets a gradient to zero where `mask` is true, and the gradient of that as well."""

    def masked(grad: Tensor) -> Tensor:
        kept = torch.where(mask, torch.zeros_like(grad), grad)
        if kept.requires_grad:
            kept.register_hook(_get_mask_closure(mask))
        return kept

    return masked


def _maybe_mask(tensor: Tensor, mask: Tensor) -> None:
    """Hook a mask to a tensor that has a gradient."""
    if tensor.requires_grad:
        tensor.register_hook(_get_mask_closure(mask))


def _add(tensor: Tensor, factor: Any, other: Any = None) -> Tensor:
    """`tensor + factor * other`; `tensor + factor` without `other`."""
    total: Tensor = tensor + (factor if other is None else factor * other)
    return total


def _addcmul(tensor: Tensor, factor: Any, one: Any, other: Any = None) -> Tensor:
    """`tensor + factor * one * other`; without `factor`, `tensor + one * other`."""
    product: Tensor = tensor + (factor * one if other is None else factor * one * other)
    return product


def _addcdiv(tensor: Tensor, factor: Any, one: Any, other: Any = None) -> Tensor:
    """`tensor + factor * one / other`; without `factor`, `tensor + one / other`."""
    quotient: Tensor = tensor + (factor / one if other is None else factor * (one / other))
    return quotient
