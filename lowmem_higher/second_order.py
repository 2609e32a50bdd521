"""Calls whose second derivative torch lacks or gets wrong, run in a form that has it.

NOTE [ Second derivatives ]

An inner loop is differentiated twice. While gradients are recorded in it, three kinds of calls take another form:

* Attention. The fused kernels have no second derivative, so every model that attends would fail. The math back end
  is used instead; the user's choice is back after the call, and stands where nothing is recorded (an evaluation under
  `no_grad`). The loop uses the form that its replays use: fused kernels round differently and draw other dropout masks.
* LSTM, GRU and RNN layers. cuDNN's have no second derivative on a GPU; torch's own kernels do.
* `torch._weight_norm`, under both of torch's `weight_norm`. Its kernel's second derivative is wrong without a word
  (torch 2.13 on a CPU: `gradgradcheck` fails). The formula of Salimans and Kingma (arXiv 1602.07868) is right.

* Collectives of `torch.distributed` that write in place. Autograd does not see them, so the gradient of what they wrote
  would be that of one process, without a word. On a tensor with a graph they are refused.

The calls are found by their place in torch. A model that imported one of them by name, `from torch.nn.functional import
scaled_dot_product_attention`, keeps torch's own, whose error is loud.
"""

from __future__ import annotations

import functools
import importlib
import threading
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel

from lowmem_higher.errors import RecordError
from lowmem_higher.interception import Interception
from lowmem_higher.structure import tensors_in

_switching = threading.RLock()  # the switches of back ends are those of all threads


def _math_attention(original: Any, *args: Any, **kwargs: Any) -> Any:
    with _switching, sdpa_kernel(SDPBackend.MATH):
        return original(*args, **kwargs)


def _without_cudnn(original: Any, *args: Any, **kwargs: Any) -> Any:
    with _switching:
        before = torch.backends.cudnn.enabled
        torch._C._set_cudnn_enabled(False)
        try:
            return original(*args, **kwargs)
        finally:
            torch._C._set_cudnn_enabled(before)


def _weight_norm(original: Any, v: Tensor, g: Tensor, dim: int = 0) -> Tensor:
    return v * (g / torch.norm_except_dim(v, 2, dim))


def _refused_on_graphs(original: Any, *args: Any, **kwargs: Any) -> Any:
    if any(tensor.requires_grad for tensor in tensors_in([args, kwargs])):
        raise RecordError(
            f"torch.distributed.{original.__name__} was called on a tensor with a graph, inside an inner loop or a "
            "backward that is differentiated (SyncBatchNorm does that). It writes in place, unseen by autograd, so "
            "gradients would miss what comes from other processes. For a mean over processes with the right gradient "
            "use lowmem_higher.distributed.average(tensor); to look at a value, tensor.detach().clone()."
        )
    return original(*args, **kwargs)


def _instead(form: Callable[..., Any], usual: Any = None) -> Callable[[Any], Any]:
    @functools.cache
    def replacement(found: Any) -> Any:
        original = found or usual

        @functools.wraps(original)
        def call(*args: Any, **kwargs: Any) -> Any:
            if _interception.handlers() and torch.is_grad_enabled():
                return form(original, *args, **kwargs)
            return original(*args, **kwargs)

        return call

    return replacement


_COLLECTIVES = [
    name
    for name in (
        "all_reduce", "broadcast", "reduce", "all_gather", "all_gather_into_tensor", "gather", "scatter",
        "reduce_scatter", "reduce_scatter_tensor", "all_to_all", "all_to_all_single", "send", "recv",
    )
    if hasattr(torch.distributed, name)
]  # fmt: skip

_interception: Interception[object] = Interception(
    (F, "scaled_dot_product_attention", _instead(_math_attention)),
    *(
        (torch._VF, name, _instead(_without_cudnn, getattr(torch._VF, name)))
        for name in ("lstm", "gru", "rnn_tanh", "rnn_relu")
    ),
    (torch, "_weight_norm", _instead(_weight_norm)),
    *((torch.distributed, name, _instead(_refused_on_graphs)) for name in _COLLECTIVES),
    (importlib.import_module("torch.nn.utils.weight_norm"), "_weight_norm", _instead(_weight_norm)),
)


def second_order() -> AbstractContextManager[None]:
    """Run the calls of this thread in a form that can be differentiated twice, inside the block.

    Example:
        >>> q = torch.randn(1, 2, 3, 4, requires_grad=True)
        >>> with second_order():
        ...     attended = F.scaled_dot_product_attention(q, q, q)
        >>> (first,) = torch.autograd.grad(attended.square().sum(), q, create_graph=True)
        >>> torch.autograd.grad(first.sum(), q)[0].shape
        torch.Size([1, 2, 3, 4])
    """
    return _interception.by(object())


def second_order_here() -> AbstractContextManager[None]:
    """The same for a block that ends before one that it may stand in: there it does nothing."""
    return nullcontext() if _interception.handlers() else second_order()
