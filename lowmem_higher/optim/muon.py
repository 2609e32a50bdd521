"""Muon: momentum, made orthogonal."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from lowmem_higher.optim.arithmetic import at_least, check_real, decayed, kept
from lowmem_higher.optim.base import DifferentiableOptimizer, Group, ParamState, descend, safe_sqrt


class DifferentiableMuon(DifferentiableOptimizer):
    """`torch.optim.Muon` (torch 2.9 and later) as a rule for matrices.

    torch makes the momentum orthogonal in bfloat16, and so do these values, bit by bit. Taken literally, the derivative
    of a rounded number is 0; what is differentiated is the same iteration in the parameter's own precision. So the
    gradient is exact for that, and differs from the finite differences of the rounded loop by bfloat16's 3 digits.
    Set `working_dtype` to None in a subclass to compute the values in the parameter's precision as well.

    Memory:
        Differentiating a step runs the iteration twice, and keeps 3 `ns_steps` matrices while it does.

    Example:
        >>> import torch, lowmem_higher as higher
        >>> net, momentum = torch.nn.Linear(3, 2, bias=False), torch.tensor(0.9, requires_grad=True)
        >>> opt, override = torch.optim.Muon(net.parameters()), {"momentum": [momentum]}
        >>> with higher.innerloop_ctx(net, opt, override=override, checkpoint_every=2) as (fnet, diffopt):
        ...     for x in torch.eye(3):
        ...         _ = diffopt.step(fnet(x).square().sum())
        >>> torch.autograd.grad(fnet(torch.ones(1, 3)).sum(), momentum)[0].isfinite().item()
        True

    References:
        Jordan et al., Muon: an optimizer for hidden layers in neural networks, 2024, kellerjordan.github.io/posts/muon.
    """

    working_dtype: torch.dtype | None = torch.bfloat16

    def update(self, param: Tensor, grad: Tensor, state: ParamState, group: Group) -> tuple[Tensor, dict[str, Any]]:
        """One step; keeps the momentum."""
        check_real(param, "Muon")
        momentum, lr = group["momentum"], group["lr"]
        buffer = _towards(kept(state, "momentum_buffer", grad), grad, 1 - momentum)
        direction = _towards(grad, buffer, momentum) if group["nesterov"] else buffer
        direction = self._orthogonal(direction, group)
        param, _ = decayed(param, grad, group, decoupled=True)
        rows, columns = param.shape
        scale = {
            "original": max(1.0, rows / columns) ** 0.5,
            "match_rms_adamw": 0.2 * max(rows, columns) ** 0.5,
        }[group["adjust_lr_fn"] or "original"]
        return descend(param, direction, lr * scale), {**state, "momentum_buffer": buffer}

    def _orthogonal(self, matrix: Tensor, group: Group) -> Tensor:
        coefficients, steps, eps = group["ns_coefficients"], int(group["ns_steps"]), group["eps"]
        with torch.autocast(matrix.device.type, enabled=False):
            if self.working_dtype is None:
                return newton_schulz(matrix, coefficients, steps, eps)
            with torch.no_grad():
                numbers = [float(value) for value in (*coefficients, eps)]
                rounded = _rounded_newton_schulz(matrix.to(self.working_dtype), numbers[:3], steps, numbers[3])
                rounded = rounded.to(matrix.dtype)
            if not torch.is_grad_enabled():
                return rounded
            smooth = newton_schulz(matrix, coefficients, steps, eps)
            return rounded + (smooth - smooth.detach())  # adds exactly 0, and the derivative


def _towards(start: Tensor, end: Tensor, weight: Any) -> Tensor:
    """A moving average with torch's own kernel: another order of rounding could tip a number in bfloat16."""
    if isinstance(weight, Tensor):
        return start + (end - start) * weight
    return start.lerp(end, weight)


def newton_schulz(matrix: Tensor, coefficients: Any, steps: int, eps: Any) -> Tensor:
    """The orthogonal factor of a matrix, roughly: its singular values come near 1.

    Args:
        matrix: Of any two-dimensional shape.
        coefficients: Of the polynomial `a x + b x^3 + c x^5` that every iteration applies to the singular values.
        steps: How many iterations.
        eps: The least norm that the matrix is divided by.
    """
    a, b, c = coefficients
    wide = matrix.T if matrix.shape[0] > matrix.shape[1] else matrix
    x: Tensor = wide / at_least(safe_sqrt((wide * wide).sum()), eps)
    for _ in range(steps):
        gram = x @ x.T
        x = a * x + (b * gram + c * (gram @ gram)) @ x
    return x.T if wide is not matrix else x


def _rounded_newton_schulz(matrix: Tensor, coefficients: list[float], steps: int, eps: float) -> Tensor:
    """The same with the kernels that torch.optim uses, since in bfloat16 each rounds in its own way."""
    a, b, c = coefficients
    wide = matrix.T if matrix.shape[0] > matrix.shape[1] else matrix
    x: Tensor = wide / torch.linalg.vector_norm(wide).clamp(min=eps)
    for _ in range(steps):
        gram = x @ x.T
        x = torch.addmm(x, torch.addmm(gram, gram, gram, beta=b, alpha=c), x, beta=a)
    return x.T if wide is not matrix else x
