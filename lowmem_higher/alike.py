"""What one use of a trace has in common with another: forms of tensors, equal numbers, functions that do the same."""

from __future__ import annotations

import math
import types
import weakref
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from lowmem_higher.optim.base import State

_SAME = {torch.float64: (1e-9, 1e-4), torch.float32: (1e-4, 1e-2)}  # relative to an output, and to the largest one
_SAME_COARSE = (3e-2, 1e-1)


def state_positions(state: State) -> list[tuple[int, int, str]]:
    """Where the optimizer state holds what is no tensor, in the order of `plain_state`."""
    return [
        (place, index, name)
        for place, entries in enumerate(state)
        for index, entry in entries.items()
        for name, value in entry.items()
        if not isinstance(value, Tensor)
    ]


def form_of(tensor: Tensor) -> Any:
    """What a trace depends on besides a tensor's values."""
    if tensor.layout is not torch.strided:
        return None
    return _keys(tensor).raw_repr(), tensor.dtype, tensor.shape, tensor.stride(), tensor.device


def traceable(tensor: Tensor) -> bool:
    """Whether a tensor is of a kind that can be traced."""
    return (
        type(tensor) in (Tensor, nn.Parameter)
        and tensor.layout is torch.strided
        and not (tensor.is_complex() or tensor.is_neg() or tensor.is_quantized or tensor.is_inference())
        and not tensor._is_zerotensor()
    )


_keys = torch._C._dispatch_keys  # say of a tensor whether it is sparse, a subclass, a lazy negative, and so on
PLAIN = (int, float, bool, str, type(None))


def same_number(one: Any, other: Any) -> bool:
    """Whether two arguments are one object, or equal numbers (or strings) of one type."""
    if one is other:
        return True
    return type(one) is type(other) and isinstance(one, PLAIN) and bool(one == other)


def same_attributes(one: list[dict[str, Any]] | None, other: list[dict[str, Any]] | None) -> bool:
    """Whether all submodules have the same plain attributes."""
    if one is None or other is None:
        return one is other
    return len(one) == len(other) and all(
        a.keys() == b.keys() and all(same_number(a[key], b[key]) for key in a) for a, b in zip(one, other, strict=True)
    )


def standing_for(target: Any) -> Any:
    """Equal for functions that do the same: those of one definition, with the same objects in their closures."""
    if isinstance(target, types.MethodType):
        return standing_for(target.__func__), _Same(target.__self__)
    if not isinstance(target, types.FunctionType):
        return _Same(target)
    closure = [cell.cell_contents for cell in target.__closure__ or ()]
    values = (*(target.__defaults__ or ()), *(target.__kwdefaults__ or {}).values(), *closure)
    return target.__code__, id(target.__globals__), tuple(map(_standing_for_value, values))


def _standing_for_value(value: Any) -> Any:
    return (type(value), value) if isinstance(value, PLAIN) else _Same(value)


class _Same:
    """Equal where it stands for the same object, which it does not keep alive."""

    def __init__(self, target: Any) -> None:
        self._id = id(target)
        self._target: Callable[[], Any]
        try:
            self._target = weakref.ref(target)
        except TypeError:
            self._target = _nothing

    def __eq__(self, other: object) -> bool:
        target = self._target()
        return isinstance(other, _Same) and target is not None and target is other._target()

    def __hash__(self) -> int:
        return self._id


def _nothing() -> None:
    return None


def agree(
    expected: Sequence[Tensor | None],
    found: Sequence[Tensor | None],
    again: Callable[[bool], Sequence[Tensor | None]] | None = None,
) -> bool:
    """Whether two results differ by rounding only.

    Some differ by more where rounding decides between two branches (ReLU), or is all that there is of a gradient (that
    of a bias before BatchNorm, which Adam divides by its size). How much shows when what was `expected` is computed
    `again`, from inputs that differ in their last bit (if True is given): two results that are ten times as far apart
    are still the same. From the same inputs the same has to come.
    """
    if _close(expected, found, None):
        return True
    return again is not None and _close(expected, again(False), None) and _close(expected, found, again(True))


def _close(
    expected: Sequence[Tensor | None], found: Sequence[Tensor | None], elsewhere: Sequence[Tensor | None] | None
) -> bool:
    if [tensor is None for tensor in expected] != [tensor is None for tensor in found]:
        return False
    pairs = [(one, other) for one, other in zip(expected, found, strict=True) if one is not None and other is not None]
    near = [one for one in (elsewhere or ()) if one is not None]
    if elsewhere is not None and len(near) != len(pairs):
        return False
    if any(one.shape != other.shape or one.dtype != other.dtype or one.device != other.device for one, other in pairs):
        return False
    with torch.no_grad():
        norms = [_norm(one) for one, _ in pairs]
        largest = max((norm for norm in norms if math.isfinite(norm)), default=0.0)
        spread = [0.0] * len(pairs)
        if elsewhere is not None:
            spread = [10 * _norm(one - moved) for (one, _), moved in zip(pairs, near, strict=True)]
        for (one, other), norm, apart in zip(pairs, norms, spread, strict=True):
            own, of_largest = _SAME.get(one.dtype, _SAME_COARSE)
            if not math.isfinite(norm):
                if not torch.allclose(one, other, own, equal_nan=True):
                    return False
            elif not _norm(one - other) <= own * (norm + of_largest * largest) + apart:
                return False
    return True


def nudged(weights: Sequence[Tensor]) -> list[Tensor]:
    """The same weights but for the last bit of about half of their elements. Draws from no generator of the user's."""
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        up = [torch.rand(weight.shape, generator=generator).to(weight.device) < 0.5 for weight in weights]
        return [
            torch.where(more, weight * (1 + 2 * torch.finfo(weight.dtype).eps), weight).to(weight.dtype)
            if weight.is_floating_point()
            else weight
            for weight, more in zip(weights, up, strict=True)
        ]


def _norm(tensor: Tensor) -> float:
    return float(torch.linalg.vector_norm(tensor if tensor.is_floating_point() else tensor.double()))
