"""The gradient of a loss and its derivative along a direction, in one pass: forward over reverse mode.

NOTE [ Forward over reverse ]

The weights become dual tensors (a value and a tangent), and the gradient is taken of them as of any others: what comes
out are dual tensors too, whose tangents are the derivative of the gradient along the direction. Nothing is
differentiated twice in reverse mode, so nothing is kept for that.

F1  The gradient is taken by an explicit `torch.func.vjp` over the dual tensors of `torch.autograd.forward_ad`. A graph
    of autograd's own over dual tensors would also record how the tangents are made, and in torch 2.13 what `exp` and
    `softmax` save of their outputs lives until the dual level ends: 1.35 times the memory of reverse over reverse.
F2  Reverse mode stops at `torch.no_grad()`, `.data` and inner gradients without `create_graph`. Tangents do not:
    `_AsReverseMode` switches them off there, so that both modes differentiate the same function.
F3  Forms of three calls that torch 2.13 cannot do so: `F.mse_loss` (its backward writes into a zero tensor without
    memory), `F.group_norm` (no rule), and `F.dropout` of a transposed tensor (it draws another mask in `torch.func`).
"""

from __future__ import annotations

import functools
import threading
import warnings
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any, cast

import torch
import torch.autograd.forward_ad as forward_ad
import torch.nn.functional as F
from torch import Tensor
from torch.overrides import TorchFunctionMode

_one_level = threading.RLock()  # torch's dual levels are those of all threads


def gradient_and_derivative(
    function: Callable[..., Tensor], inputs: Sequence[Tensor], tangents: Sequence[Tensor | None]
) -> tuple[Tensor, list[Tensor], list[Tensor | None]]:
    """The value of `function(*inputs)`, its gradient, and the derivative of the gradient along `tangents`.

    Args:
        function: Gives a scalar.
        inputs: Tensors without a graph.
        tangents: Shaped like the inputs; None is zero.

    Returns:
        The value, the gradient for each input, and its derivative for each input, None where that is zero.

    Memory:
        The values and the tangents that one backward saves, and inputs and outputs three times over. One pass.

    Example:
        >>> x, v = torch.tensor([1.0, 2.0]), torch.tensor([1.0, 0.0])
        >>> gradient_and_derivative(lambda x: (x**3).sum(), [x], [v])
        (tensor(9.), [tensor([ 3., 12.])], [tensor([6., 0.])])

    References:
        Pearlmutter, Fast exact multiplication by the Hessian, Neural Computation 6(1), 1994.
    """
    with _duals(inputs, tangents) as duals:
        value, pull_back = cast(Any, torch.func.vjp(as_reverse_mode(function), *duals))
        plain = forward_ad.unpack_dual(value).primal
        gradients = pull_back(torch.ones_like(plain), retain_graph=False, create_graph=False)
        parts = [forward_ad.unpack_dual(gradient) for gradient in gradients]
        return (
            plain.detach(),
            [part.primal.detach() for part in parts],
            [None if part.tangent is None or part.tangent._is_zerotensor() else part.tangent for part in parts],
        )


def values_and_derivatives(
    function: Callable[..., Sequence[Any]], inputs: Sequence[Tensor], tangents: Sequence[Tensor | None]
) -> tuple[list[Any], list[Tensor | None]]:
    """What `function(*inputs)` gives, and the derivatives of that along `tangents`, None where they are zero.

    Args:
        function: Gives any number of tensors of any shape.
        inputs: Tensors without a graph.
        tangents: Shaped like the inputs; None is zero.

    Memory:
        Nothing is kept for a backward: two layers' activations and their tangents at a time. One pass, of three
        times the multiply-adds of a forward.

    Example:
        >>> x, v = torch.tensor([1.0, 2.0]), torch.tensor([1.0, 0.0])
        >>> values_and_derivatives(lambda x: [x**3, x.sum()], [x], [v])
        ([tensor([1., 8.]), tensor(3.)], [tensor([3., 0.]), tensor(1.)])
    """
    with _duals(inputs, tangents) as duals:
        parts = [
            forward_ad.unpack_dual(value) if isinstance(value, Tensor) else (value, None)
            for value in as_reverse_mode(function)(*duals)
        ]
        return [value for value, _ in parts], [
            None if tangent is None or tangent._is_zerotensor() else tangent for _, tangent in parts
        ]


@contextmanager
def _duals(inputs: Sequence[Tensor], tangents: Sequence[Tensor | None]) -> Iterator[list[Tensor]]:
    with _one_level, forward_ad.dual_level():
        _load_rules()
        yield [
            tensor if tangent is None else forward_ad.make_dual(_alone(tensor), tangent)
            for tensor, tangent in zip(inputs, tangents, strict=True)
        ]


def _alone(tensor: Tensor) -> Tensor:
    """The tensor in a storage of its own: for one that is a part of a storage, torch makes a tangent of it all."""
    return tensor if tensor.untyped_storage().nbytes() == tensor.nbytes else tensor.clone()


@functools.cache
def _load_rules() -> None:
    """Make a first dual tensor, for which torch loads rules by means that it has deprecated itself."""
    with warnings.catch_warnings():
        for category in (DeprecationWarning, FutureWarning):
            warnings.simplefilter("ignore", category)
        forward_ad.make_dual(torch.zeros(()), torch.zeros(()))


def as_reverse_mode(function: Callable[..., Any]) -> Callable[..., Any]:
    """The same function, whose tangents stop where reverse mode stops; see F2 and F3."""

    def run(*args: Any) -> Any:
        before = torch._C._is_fwd_grad_enabled()
        try:
            with _AsReverseMode():
                return function(*args)
        finally:
            torch._C._set_fwd_grad_enabled(before)

    return run


class _AsReverseMode(TorchFunctionMode):
    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        form = _FORMS.get(func)
        if form is None:
            return func(*args, **kwargs)
        if "input" in kwargs:
            args, kwargs = (kwargs["input"],), {key: value for key, value in kwargs.items() if key != "input"}
        return form(func, *args, **kwargs)


def _set_grad_enabled(call: Any, enabled: bool) -> Any:
    torch._C._set_fwd_grad_enabled(enabled)
    return call(enabled)


def _inner_gradient(call: Any, *args: Any, **kwargs: Any) -> Any:
    if kwargs.get("create_graph", args[4] if len(args) > 4 else False):
        return call(*args, **kwargs)
    with forward_ad._set_fwd_grad_enabled(False):
        return call(*args, **kwargs)


def _data(call: Any, tensor: Tensor, *rest: Any) -> Any:
    return tensor.detach()


def _mse_loss(call: Any, tensor: Tensor, target: Tensor, *args: Any, **kwargs: Any) -> Any:
    kwargs = {key: value for key, value in kwargs.items() if value is not None}
    reduction = kwargs.get("reduction", "mean")
    if args or kwargs.keys() - {"reduction"} or reduction not in _REDUCTIONS or tensor.shape != target.shape:
        return call(tensor, target, *args, **kwargs)
    return _REDUCTIONS[reduction]((tensor - target).square())


_REDUCTIONS: dict[Any, Callable[[Tensor], Tensor]] = {"mean": torch.mean, "sum": torch.sum, "none": lambda error: error}


def _group_norm(
    call: Any,
    tensor: Tensor,
    num_groups: int,
    weight: Tensor | None = None,
    bias: Tensor | None = None,
    eps: float = 1e-5,
) -> Tensor:
    groups = tensor.reshape(tensor.shape[0], num_groups, -1)
    normed = F.layer_norm(groups, groups.shape[-1:], eps=eps).reshape(tensor.shape)
    channels = [1, tensor.shape[1]] + [1] * (tensor.ndim - 2)
    normed = normed if weight is None else normed * weight.reshape(channels)
    return normed if bias is None else normed + bias.reshape(channels)


def _dropout(call: Any, tensor: Tensor, p: float = 0.5, training: bool = True, inplace: bool = False) -> Tensor:
    if not training or p == 0:
        return tensor
    # A mask is drawn in the order of the memory; for a transposed tensor `torch.func` draws it in that of the index.
    strides = tensor.stride()
    order = sorted(range(tensor.ndim), key=lambda dim: -strides[dim])
    ones = torch.ones([tensor.shape[dim] for dim in order], dtype=tensor.dtype, device=tensor.device)
    mask = call(ones, p, True).permute([order.index(dim) for dim in range(tensor.ndim)])
    return tensor.mul_(mask) if inplace else tensor * mask


_FORMS: dict[Any, Callable[..., Any]] = {
    torch._C._set_grad_enabled: _set_grad_enabled,
    torch.autograd.grad: _inner_gradient,
    torch.Tensor.data.__get__: _data,  # type: ignore[attr-defined]
    F.mse_loss: _mse_loss,
    F.group_norm: _group_norm,
    F.dropout: _dropout,
}
