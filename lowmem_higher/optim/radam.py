"""RAdam: Adam with a rectified second moment."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from lowmem_higher.optim.arithmetic import decayed, kept
from lowmem_higher.optim.base import DifferentiableOptimizer, Group, ParamState, descend, lerp, safe_sqrt


class DifferentiableRAdam(DifferentiableOptimizer):
    """`torch.optim.RAdam` as a pure rule, with coupled or decoupled weight decay.

    Its first steps, in which the second moment has seen too little, are those of momentum alone. When they end depends
    on beta2; at that switch the rule is not differentiable by beta2.

    Example:
        >>> import torch, lowmem_higher as higher
        >>> net, beta2 = torch.nn.Linear(1, 1), torch.tensor(0.99, requires_grad=True)
        >>> opt, betas = torch.optim.RAdam(net.parameters()), {"betas": [(0.9, beta2)]}
        >>> with higher.innerloop_ctx(net, opt, override=betas, checkpoint_every=3) as (fnet, diffopt):
        ...     for _ in range(8):
        ...         _ = diffopt.step(fnet(torch.ones(1, 1)).square().sum())
        >>> torch.autograd.grad(fnet(torch.ones(1, 1)).sum(), beta2)[0].isfinite().item()
        True

    References:
        Liu et al., On the variance of the adaptive learning rate and beyond, ICLR 2020 (arXiv 1908.03265).
    """

    elementwise = True

    def update(self, param: Tensor, grad: Tensor, state: ParamState, group: Group) -> tuple[Tensor, dict[str, Any]]:
        """One step; keeps both moments."""
        beta1, beta2 = group["betas"]
        step = state.get("step", 0) + 1
        param, grad = decayed(param, grad, group, bool(group.get("decoupled_weight_decay", False)))
        first = lerp(kept(state, "exp_avg", grad), grad, beta1)
        second = lerp(kept(state, "exp_avg_sq", grad), grad * grad, beta2)
        new_state = {**state, "step": step, "exp_avg": first, "exp_avg_sq": second}
        direction, rate = first, group["lr"] / (1 - beta1**step)
        longest = 2 / (1 - beta2) - 1
        length = longest - 2 * step * beta2**step / (1 - beta2**step)
        if isinstance(length, Tensor) and length.ndim:
            known = length > 5  # so that no branch that is not taken has a square root of a negative number
            length, longest = torch.where(known, length, 6.0), torch.where(known, longest, 7.0)
            adapted = first * (_rectification(length, longest) * _adapted_rate(second, beta2, step, group["eps"]))
            direction = torch.where(known, adapted, first)
        elif length > 5:
            direction = first * (_rectification(length, longest) * _adapted_rate(second, beta2, step, group["eps"]))
        return descend(param, direction, rate), new_state


def _rectification(length: Any, longest: Any) -> Any:
    return ((length - 4) * (length - 2) * longest / ((longest - 4) * (longest - 2) * length)) ** 0.5


def _adapted_rate(second: Tensor, beta2: Any, step: int, eps: Any) -> Tensor:
    rate: Tensor = (1 - beta2**step) ** 0.5 / (safe_sqrt(second) + eps)
    return rate
