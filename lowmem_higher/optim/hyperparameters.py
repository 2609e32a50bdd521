"""Hyperparameters made trainable, and put back."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

_COUNTS = frozenset(["ns_steps"])  # numbers that no derivative can be taken by


def get_trainable_opt_params(
    opt: torch.optim.Optimizer, device: torch.device | str | None = None
) -> dict[str, list[Any]]:
    """The hyperparameters of an optimizer as tensors that require grad, in the form that `override=` takes.

    Args:
        opt: A torch optimizer.
        device: Where the tensors go.

    Returns:
        `{name: [value of each parameter group]}`. Tuples are kept; in them None stays None. Switches and what is no
        number are left out. Some values may have no part in a run (`t0` of ASGD), so differentiate with
        `allow_unused=True`.

    Example:
        >>> import torch, lowmem_higher as higher
        >>> opt = torch.optim.Adam(torch.nn.Linear(1, 1).parameters(), lr=0.5)
        >>> override = higher.optim.get_trainable_opt_params(opt)
        >>> override["lr"]
        [tensor(0.5000, requires_grad=True)]
        >>> sorted(override)
        ['betas', 'eps', 'lr', 'weight_decay']
    """
    return {
        name: [_trainable(group[name], device) for group in opt.param_groups]
        for name in opt.param_groups[0]
        if name != "params" and name not in _COUNTS and all(_holds_numbers(group[name]) for group in opt.param_groups)
    }


def apply_trainable_opt_params(opt: torch.optim.Optimizer, override: Mapping[str, Sequence[Any]]) -> None:
    """Write learned hyperparameters into a torch optimizer; numbers stay numbers, tensors keep their place.

    Args:
        opt: The optimizer, whose parameter groups are changed.
        override: `{name: [value]}` or one value for each parameter group.

    Raises:
        ValueError: A name is unknown, or a list has another length, or a tuple another one.

    Example:
        >>> import torch, lowmem_higher as higher
        >>> opt = torch.optim.Adam(torch.nn.Linear(1, 1).parameters())
        >>> higher.optim.apply_trainable_opt_params(opt, {"betas": [(torch.tensor(0.5), torch.tensor(0.75))]})
        >>> opt.param_groups[0]["betas"]
        (0.5, 0.75)
    """
    groups = opt.param_groups
    for name, values in override.items():
        if len(values) not in (1, len(groups)):
            raise ValueError(
                f"override[{name!r}] has {len(values)} values; it needs 1, or one for each of the {len(groups)} "
                f"parameter groups, as in {{{name!r}: [value]}}."
            )
        if any(name not in group for group in groups):
            known = ", ".join(repr(key) for key in groups[0] if key != "params")
            raise ValueError(
                f"override[{name!r}] names no hyperparameter of this optimizer; it has {known}. Write one of them, as "
                "in {'lr': [value]}."
            )
    learned = [
        {name: _like(group[name], values[0 if len(values) == 1 else index], name) for name, values in override.items()}
        for index, group in enumerate(groups)
    ]
    for group, new in zip(groups, learned, strict=True):
        for name, value in new.items():
            if isinstance(group[name], Tensor):
                group[name].detach().copy_(value)
            else:
                group[name] = value


def _holds_numbers(value: Any) -> bool:
    if isinstance(value, (tuple, list)):
        return any(map(_holds_numbers, value)) and all(item is None or _holds_numbers(item) for item in value)
    if isinstance(value, Tensor):
        return value.is_floating_point()
    return isinstance(value, (int, float)) and not isinstance(value, bool)


def _trainable(value: Any, device: torch.device | str | None) -> Any:
    if isinstance(value, (tuple, list)):
        return type(value)(_trainable(item, device) for item in value)
    if isinstance(value, Tensor):
        return value.detach().clone().to(device or value.device).requires_grad_()
    return None if value is None else torch.tensor(float(value), device=device, requires_grad=True)


def _like(old: Any, new: Any, name: str) -> Any:
    """A learned value in the form of the one that it replaces."""
    if isinstance(old, (tuple, list)):
        if not isinstance(new, (tuple, list)) or len(new) != len(old):
            raise ValueError(f"override[{name!r}] needs {len(old)} values for each group, as in {old!r}; got {new!r}.")
        return type(old)(_like(*pair, name) for pair in zip(old, new, strict=True))
    if isinstance(old, Tensor):
        return torch.as_tensor(new).detach().to(old).reshape(old.shape)
    if isinstance(new, Tensor) and isinstance(old, (bool, int, float)):
        number = new.item()
        # A default such as weight_decay=0 is an int; what was learned in its place need not be a whole number.
        return type(old)(number) if isinstance(old, bool) or number == int(number) else float(number)
    return new
