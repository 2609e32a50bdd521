"""What is known to be odd in some builds of torch, found by measuring and not by a table of versions."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterator
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from lowmem_higher.second_order import second_order

_INTERNALS = (
    "_autograd._get_current_graph_task_keep_graph",
    "_autograd._get_sequence_nr",
    "_are_functorch_transforms_active",
    "_AutoDispatchBelowAutograd",
    "_EnableTorchFunction",
    "_is_fwd_grad_enabled",
    "_set_fwd_grad_enabled",
    "_storage_Use_Count",
    "_will_engine_execute_node",
)


def missing_internals() -> list[str]:
    """The parts of torch that have no public name, that the engine calls and that this torch lacks."""
    missing = []
    for name in _INTERNALS:
        part: Any = torch._C
        for attribute in name.split("."):
            part = getattr(part, attribute, None)
        if part is None:
            missing.append(f"torch._C.{name}")
    return missing


def second_derivatives(device: torch.device) -> Iterator[tuple[str, float | str, float | str]]:
    """Calls whose second derivative torch lacks or gets wrong: by themselves, and as a context runs them.

    Yields:
        The name of the call; how far the second derivative is off, relative to finite differences of the first one, or
        torch's error; and the same inside of a context.
    """
    for name, call, inputs in _calls(device):
        yield name, _deviation(call, inputs), _deviation(_in_context(call), inputs)


def _calls(device: torch.device) -> Iterator[tuple[str, Callable[..., Tensor], list[Tensor]]]:
    generator = torch.Generator().manual_seed(0)

    def drawn(*shape: int) -> Tensor:
        return torch.randn(*shape, dtype=torch.float64, generator=generator).to(device)

    yield "weight_norm", lambda v, g: torch._weight_norm(v, g, 0).square().sum(), [drawn(3, 4), drawn(3, 1)]
    q, k, v = (drawn(1, 2, 5, 4) for _ in range(3))
    yield "attention", lambda q, k, v: F.scaled_dot_product_attention(q, k, v).square().sum(), [q, k, v]
    gates = torch.nn.LSTM(3, 4, dtype=torch.float64)
    with torch.no_grad():
        for param in gates.parameters():
            param.copy_(drawn(*param.shape))
    gates = gates.to(device)
    weights: list[Tensor] = [param.detach() for param in gates.parameters()]
    start = (torch.zeros(1, 2, 4, dtype=torch.float64, device=device),) * 2

    def lstm(x: Tensor, *weights: Tensor) -> Tensor:
        out: Tensor = torch._VF.lstm(x, start, list(weights), True, 1, 0.0, True, False, False)[0]
        return out.square().sum()

    yield "recurrent layers", lstm, [drawn(5, 2, 3), *weights]


def _in_context(call: Callable[..., Tensor]) -> Callable[..., Tensor]:
    def replaced(*inputs: Tensor) -> Tensor:
        with second_order():
            return call(*inputs)

    return replaced


def _deviation(call: Callable[..., Tensor], inputs: list[Tensor]) -> float | str:
    """Of the second derivative along one direction, from a central difference of the first one."""
    generator = torch.Generator().manual_seed(1)
    along = [torch.randn(x.shape, dtype=x.dtype, generator=generator).to(x.device) for x in inputs]

    def slope(by: float, create_graph: bool) -> tuple[Tensor, list[Tensor]]:
        moved = [(x + by * direction).requires_grad_() for x, direction in zip(inputs, along, strict=True)]
        grads = torch.autograd.grad(call(*moved), moved, create_graph=create_graph)
        return torch.cat([grad.flatten() for grad in grads]), moved

    step = 1e-5
    with warnings.catch_warnings(), torch.enable_grad():
        warnings.simplefilter("ignore")
        expected = (slope(step, False)[0] - slope(-step, False)[0]) / (2 * step)
        try:
            first, moved = slope(0.0, True)
            # The Hessian is symmetric: its product with the direction is the gradient of <first derivative, direction>.
            product = torch.autograd.grad(first @ torch.cat([d.flatten() for d in along]), moved)
        except RuntimeError as error:
            return str(error).splitlines()[0]
    found = torch.cat([part.flatten() for part in product])
    return float((found - expected).norm() / expected.norm())
