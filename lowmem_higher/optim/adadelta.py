"""Adadelta."""

from __future__ import annotations

from typing import Any

from torch import Tensor

from lowmem_higher.optim.arithmetic import kept, regularized
from lowmem_higher.optim.base import DifferentiableOptimizer, Group, ParamState, descend, lerp, safe_sqrt


class DifferentiableAdadelta(DifferentiableOptimizer):
    """`torch.optim.Adadelta` as a pure rule.

    Example:
        >>> import torch, lowmem_higher as higher
        >>> net, rho = torch.nn.Linear(1, 1), torch.tensor(0.9, requires_grad=True)
        >>> opt = torch.optim.Adadelta(net.parameters())
        >>> with higher.innerloop_ctx(net, opt, override={"rho": [rho]}, checkpoint_every=2) as (fnet, diffopt):
        ...     for x in (1.0, 2.0, 3.0):
        ...         _ = diffopt.step(fnet(torch.tensor([[x]])).square().sum())
        >>> torch.autograd.grad(fnet(torch.ones(1, 1)).sum(), rho)[0].isfinite().item()
        True

    References:
        Zeiler, ADADELTA: an adaptive learning rate method, 2012 (arXiv 1212.5701).
    """

    elementwise = True

    def update(self, param: Tensor, grad: Tensor, state: ParamState, group: Group) -> tuple[Tensor, dict[str, Any]]:
        """One step; keeps the moving averages of squared gradients and of squared updates."""
        rho, eps = group["rho"], group["eps"]
        grad = regularized(param, grad, group)
        squares = lerp(kept(state, "square_avg", grad), grad * grad, rho)
        updates = kept(state, "acc_delta", grad)
        delta = safe_sqrt(updates + eps) / safe_sqrt(squares + eps) * grad
        new_state = {
            **state,
            "step": state.get("step", 0) + 1,
            "square_avg": squares,
            "acc_delta": lerp(updates, delta * delta, rho),
        }
        return descend(param, delta, group["lr"]), new_state
