"""Small helpers that `higher.utils` made public, and those with an underscore that code in the wild imports."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import Tensor, nn


def flatten(x: Any) -> list[Any]:
    """The leaves of nested dictionaries, lists, tuples and sets, in order.

    Example:
        >>> flatten({"a": [1, (2, 3)], "b": 4})
        [1, 2, 3, 4]
    """
    if not _is_container(x):
        return [x]
    return [leaf for item in (x.values() if isinstance(x, dict) else x) for leaf in flatten(item)]


def get_func_params(
    module: nn.Module, device: torch.device | str | None = None, safe_copy: bool = True
) -> list[Tensor]:
    """Leaves with the values of a module's parameters, which require grad where those do.

    Args:
        module: The module; it is not changed.
        device: Where they go; `None` leaves them where they are.
        safe_copy: False shares the memory of the parameters where no move is needed.

    Returns:
        One tensor for each distinct parameter, in the order of `module.parameters()`.

    Memory:
        A copy of the parameters; none with `safe_copy=False`.

    Example:
        >>> [p.is_leaf for p in get_func_params(torch.nn.Linear(2, 1))]
        [True, True]
    """
    return [_copy_tensor(param, safe_copy, device) for param in module.parameters()]


def _copy_tensor(t: Tensor, safe_copy: bool, device: torch.device | str | None = None) -> Tensor:
    """A detached leaf with the same `requires_grad`."""
    copy = t.detach().clone() if safe_copy else t.detach()
    return copy.to(device).requires_grad_(t.requires_grad)


def _recursive_copy_and_cast(target: Any, device: torch.device | str | None) -> Any:
    """The same nested containers, with copies of their tensors."""
    return _recursive_map(target, lambda x: _copy_tensor(x, True, device) if isinstance(x, Tensor) else x)


def _recursive_map(target: Any, map_fn: Callable[[Any], Any]) -> Any:
    """The same nested containers, with `map_fn` of each leaf."""
    if not _is_container(target):
        return map_fn(target)
    if isinstance(target, dict):
        return type(target)({key: _recursive_map(item, map_fn) for key, item in target.items()})
    items = [_recursive_map(item, map_fn) for item in target]
    return type(target)(*items) if hasattr(target, "_fields") else type(target)(items)


def _is_container(target: Any) -> bool:
    return isinstance(target, (list, tuple, dict, set))


def _find_param_in_list(param: Tensor, tensors: Iterable[Tensor]) -> int | None:
    """The position of this very tensor, None if it is not there."""
    return next((index for index, other in enumerate(tensors) if other is param), None)


def _get_param_mapping(module: nn.Module, seen: list[Tensor], mapping: list[int]) -> list[int]:
    """For each place of a parameter in the module, the number of that parameter; `seen` receives the distinct ones."""
    for part in _with_repetitions(module):
        for param in part._parameters.values():
            if param is not None:
                found = _find_param_in_list(param, seen)
                mapping.append(len(seen) if found is None else found)
                if found is None:
                    seen.append(param)
    return mapping


def _with_repetitions(module: nn.Module) -> Iterable[nn.Module]:
    """A module and all below it, one that sits in two places twice."""
    yield module
    for child in module._modules.values():
        if child is not None:
            yield from _with_repetitions(child)
