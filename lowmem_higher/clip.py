"""Differentiable gradient clipping, as callbacks for `grad_callback`."""

from __future__ import annotations

import functools
import math
from collections.abc import Sequence

import torch
from torch import Tensor

from lowmem_higher.optim.base import GradCallback

_MARGIN = 1e-6  # that torch.nn.utils.clip_grad_norm_ adds to the norm it divides by


def clip_grad_norm(max_norm: float | Tensor, norm_type: float = 2.0) -> GradCallback:
    """A callback that scales the inner gradients of a step down, together, to a norm of at most `max_norm`.

    The values are those of `torch.nn.utils.clip_grad_norm_`. The meta-gradient goes through the norm, and is finite
    where all inner gradients are zero.

    Args:
        max_norm: The largest norm; a tensor of one element gets a gradient.
        norm_type: p of the p-norm, at least 1; `math.inf` for the largest element.

    Returns:
        A function for `diffopt.step(loss, grad_callback=...)`.

    Raises:
        ValueError: `max_norm` is negative or NaN, or `norm_type` below 1.

    Memory:
        In each step's graph, while it is differentiated, one more copy of the gradients. No pass.

    Example:
        >>> import torch, lowmem_higher as higher
        >>> net, clip = torch.nn.Linear(2, 1), higher.clip_grad_norm(1.0)
        >>> opt = torch.optim.SGD(net.parameters(), lr=1.0)
        >>> with higher.innerloop_ctx(net, opt, checkpoint_every=2) as (fnet, diffopt):
        ...     before = fnet.fast_params
        ...     after = diffopt.step(9 * fnet(torch.ones(1, 2)).sum(), grad_callback=clip)
        >>> round(sum((a - b).square().sum().item() for a, b in zip(after, before)) ** 0.5, 4)
        1.0

    References:
        Pascanu, Mikolov and Bengio, On the difficulty of training recurrent neural networks, ICML 2013.
    """
    _check("max_norm", max_norm)
    p = float(norm_type)
    if not p >= 1:
        raise ValueError(f"norm_type={norm_type} is no norm; it must be at least 1, as in norm_type=2.0, or math.inf.")
    return functools.partial(_scaled, max_norm=max_norm, p=p)


def clip_grad_value(clip_value: float | Tensor) -> GradCallback:
    """A callback that clamps each element of the inner gradients to [-clip_value, clip_value].

    The values are those of `torch.nn.utils.clip_grad_value_`; a clamped element passes no gradient on.

    Args:
        clip_value: The largest absolute value; a tensor of one element gets a gradient.

    Returns:
        A function for `diffopt.step(loss, grad_callback=...)`.

    Raises:
        ValueError: `clip_value` is negative or NaN.

    Memory:
        In each step's graph, while it is differentiated, one more copy of the gradients. No pass.

    Example:
        >>> import torch, lowmem_higher as higher
        >>> higher.clip_grad_value(0.5)([torch.tensor([-2.0, 0.1]), None])
        [tensor([-0.5000,  0.1000]), None]
    """
    _check("clip_value", clip_value)
    return functools.partial(_clamped, limit=clip_value)


def _check(name: str, value: float | Tensor) -> None:
    if isinstance(value, Tensor) and value.numel() != 1:
        raise ValueError(
            f"{name} has shape {tuple(value.shape)}; it must be a number or a tensor of one element, as in "
            f"{name}=torch.tensor(1.0)."
        )
    if not value >= 0:
        raise ValueError(f"{name}={float(value)} must be at least 0, as in {name}=1.0.")


def _scaled(grads: Sequence[Tensor | None], *, max_norm: float | Tensor, p: float) -> list[Tensor | None]:
    found = [grad for grad in grads if grad is not None]
    if not found:
        return list(grads)
    norm = _norm(found, p)
    limit = max_norm.reshape(()).to(norm) if isinstance(max_norm, Tensor) else max_norm
    factor = (limit / (norm + _MARGIN)).clamp(max=1.0)
    return [None if grad is None else grad * factor.to(grad) for grad in grads]


def _norm(grads: Sequence[Tensor], p: float) -> Tensor:
    """The p-norm of all elements, with derivative 0 at 0; of half precision in float32, which holds the squares."""
    home = grads[0].device
    parts = [(grad.float() if grad.dtype in (torch.float16, torch.bfloat16) else grad).abs() for grad in grads]
    if math.isinf(p):
        return torch.stack([part.amax().to(home) for part in parts if part.numel()]).amax()
    total = torch.stack([part.pow(p).sum().to(home) for part in parts]).sum()
    positive = total > 0
    root: Tensor = torch.where(positive, total, 1.0).pow(1 / p) * positive
    return root


def _clamped(grads: Sequence[Tensor | None], *, limit: float | Tensor) -> list[Tensor | None]:
    return [None if grad is None else _clamp(grad, limit) for grad in grads]


def _clamp(grad: Tensor, limit: float | Tensor) -> Tensor:
    if isinstance(limit, Tensor):
        limit = limit.reshape(()).to(grad)
        return grad.clamp(-limit, limit)
    return grad.clamp(-limit, limit)
