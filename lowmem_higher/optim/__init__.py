"""Differentiable optimizers: a pure update rule for each torch optimizer, and the table that pairs them."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from lowmem_higher.optim.adam import DifferentiableAdam, DifferentiableAdamW
from lowmem_higher.optim.base import DifferentiableOptimizer
from lowmem_higher.optim.sgd import DifferentiableSGD

__all__ = [
    "DifferentiableAdam",
    "DifferentiableAdamW",
    "DifferentiableOptimizer",
    "DifferentiableSGD",
    "get_diff_optim",
    "register_optim",
]

_rules: dict[type[torch.optim.Optimizer], type[DifferentiableOptimizer]] = {
    torch.optim.SGD: DifferentiableSGD,
    torch.optim.Adam: DifferentiableAdam,
    torch.optim.AdamW: DifferentiableAdamW,
}


def register_optim(optim_type: type[torch.optim.Optimizer], diff_type: type[DifferentiableOptimizer]) -> None:
    """Say which differentiable optimizer stands for a torch optimizer.

    Args:
        optim_type: The torch optimizer's class.
        diff_type: A subclass of `DifferentiableOptimizer` with a pure `update`.

    Example:
        >>> import torch, lowmem_higher as higher
        >>> class MySGD(torch.optim.SGD):
        ...     pass
        >>> higher.register_optim(MySGD, higher.optim.DifferentiableSGD)
    """
    if not (isinstance(optim_type, type) and issubclass(optim_type, torch.optim.Optimizer)):
        raise TypeError(f"register_optim needs a class of torch optimizers first, and got {optim_type!r}.")
    if not (isinstance(diff_type, type) and issubclass(diff_type, DifferentiableOptimizer)):
        raise TypeError(f"register_optim needs a subclass of DifferentiableOptimizer second, and got {diff_type!r}.")
    _rules[optim_type] = diff_type


def get_diff_optim(
    opt: torch.optim.Optimizer,
    reference_params: Iterable[Tensor],
    fmodel: Any = None,
    device: torch.device | None = None,
    override: Mapping[str, Sequence[Any]] | None = None,
    track_higher_grads: bool = True,
    **kwargs: Any,
) -> DifferentiableOptimizer:
    """The differentiable optimizer that stands for `opt`; the arguments are those of `DifferentiableOptimizer`.

    Raises:
        TypeError: `opt` is no torch optimizer.
        ValueError: No rule is registered for its class.

    Example:
        >>> import torch, lowmem_higher as higher
        >>> net = torch.nn.Linear(1, 1)
        >>> higher.get_diff_optim(torch.optim.SGD(net.parameters(), lr=0.1), net.parameters()).param_groups[0]["lr"]
        0.1
    """
    if not isinstance(opt, torch.optim.Optimizer):
        raise TypeError(f"The optimizer must be a torch.optim.Optimizer, and is {type(opt).__name__}.")
    if type(opt) not in _rules:
        supported = ", ".join(sorted(cls.__name__ for cls in _rules))
        raise ValueError(
            f"{type(opt).__name__} has no differentiable update rule here; there is one for {supported}. Add yours: "
            f"lowmem_higher.register_optim({type(opt).__name__}, YourDifferentiableOptimizer)."
        )
    return _rules[type(opt)](
        opt,
        reference_params,
        fmodel=fmodel,
        device=device,
        override=override,
        track_higher_grads=track_higher_grads,
        **kwargs,
    )
