"""The few operations that the update rules share, each for hyperparameters that are numbers or tensors."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from lowmem_higher.optim.base import Group, ParamState, is_zero


def ascended(grad: Tensor, group: Group) -> Tensor:
    """The gradient to descend: its negative under `maximize`."""
    return -grad if group.get("maximize", False) else grad


def regularized(param: Tensor, grad: Tensor, group: Group) -> Tensor:
    """The gradient to descend, with weight decay added to it."""
    grad, decay = ascended(grad, group), group["weight_decay"]
    return grad if is_zero(decay) else grad + decay * param


def decayed(param: Tensor, grad: Tensor, group: Group, decoupled: bool) -> tuple[Tensor, Tensor]:
    """Parameter and gradient after weight decay, which shrinks the one (decoupled) or adds to the other."""
    if not decoupled:
        return param, regularized(param, grad, group)
    decay = group["weight_decay"]
    return (param if is_zero(decay) else param * (1 - group["lr"] * decay)), ascended(grad, group)


def check_real(param: Tensor, name: str) -> None:
    """Refuse complex parameters, as torch's optimizer of that name does."""
    if param.is_complex():
        raise ValueError(
            f"{name} has no rule for complex parameters (one is {param.dtype}), in torch.optim neither. Hold real and "
            "imaginary part as two parameters, torch.view_as_real(w), or give this one to torch.optim.SGD."
        )


def kept(state: ParamState, key: str, like: Tensor) -> Tensor:
    """What the state keeps under a name; zeros before the first step."""
    return state[key] if key in state else torch.zeros_like(like)


def at_least(value: Any, bound: Any) -> Any:
    """The larger of two, each a number or a tensor; differentiable where they differ."""
    if isinstance(value, Tensor):
        return value.clamp(min=bound)
    return bound.clamp(min=value) if isinstance(bound, Tensor) else max(value, bound)


def at_most(value: Any, bound: Any) -> Any:
    """The smaller of two, each a number or a tensor; differentiable where they differ."""
    if isinstance(value, Tensor):
        return value.clamp(max=bound)
    return bound.clamp(max=value) if isinstance(bound, Tensor) else min(value, bound)
