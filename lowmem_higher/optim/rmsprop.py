"""RMSprop, plain or centered, with or without momentum."""

from __future__ import annotations

from typing import Any

from torch import Tensor

from lowmem_higher.optim.arithmetic import kept, regularized
from lowmem_higher.optim.base import DifferentiableOptimizer, Group, ParamState, descend, is_zero, lerp, safe_sqrt


class DifferentiableRMSprop(DifferentiableOptimizer):
    """`torch.optim.RMSprop` as a pure rule.

    The centered variance of a constant gradient is 0, and may come out below 0 by rounding, for which torch gives NaN;
    here it is 0 then.

    Example:
        >>> import torch, lowmem_higher as higher
        >>> net, alpha = torch.nn.Linear(1, 1), torch.tensor(0.9, requires_grad=True)
        >>> opt = torch.optim.RMSprop(net.parameters(), centered=True)
        >>> with higher.innerloop_ctx(net, opt, override={"alpha": [alpha]}, checkpoint_every=2) as (fnet, diffopt):
        ...     for x in (1.0, 2.0, 3.0):
        ...         _ = diffopt.step(fnet(torch.tensor([[x]])).square().sum())
        >>> torch.autograd.grad(fnet(torch.ones(1, 1)).sum(), alpha)[0].isfinite().item()
        True

    References:
        Tieleman and Hinton, Lecture 6.5 of Neural networks for machine learning, 2012.
        Graves, Generating sequences with recurrent neural networks, 2013 (arXiv 1308.0850; the centered variant).
    """

    elementwise = True

    def update(self, param: Tensor, grad: Tensor, state: ParamState, group: Group) -> tuple[Tensor, dict[str, Any]]:
        """One step; keeps the moving average of squares, with `centered` that of gradients, and the momentum."""
        alpha, momentum = group["alpha"], group["momentum"]
        grad = regularized(param, grad, group)
        variance = squares = lerp(kept(state, "square_avg", grad), grad * grad, alpha)
        new_state = {**state, "step": state.get("step", 0) + 1, "square_avg": squares}
        if group["centered"]:
            mean = new_state["grad_avg"] = lerp(kept(state, "grad_avg", grad), grad, alpha)
            variance = (squares - mean * mean).clamp(min=0)
        direction = grad / (safe_sqrt(variance) + group["eps"])
        if not is_zero(momentum):
            direction = kept(state, "momentum_buffer", grad) * momentum + direction
            new_state["momentum_buffer"] = direction
        return descend(param, direction, group["lr"]), new_state
