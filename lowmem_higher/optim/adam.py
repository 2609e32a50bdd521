"""Adam, and AdamW as its variant with decoupled weight decay."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from lowmem_higher.optim.arithmetic import decayed, kept
from lowmem_higher.optim.base import DifferentiableOptimizer, Group, ParamState, descend, lerp, safe_sqrt


class DifferentiableAdam(DifferentiableOptimizer):
    """`torch.optim.Adam` as a pure rule, with AMSGrad.

    Where a second moment is 0 its square root has derivative 0, so meta-gradients are finite from the first step on.

    Example:
        >>> import torch, lowmem_higher as higher
        >>> net, beta2 = torch.nn.Linear(1, 1), torch.tensor(0.99, requires_grad=True)
        >>> opt, betas = torch.optim.Adam(net.parameters()), {"betas": [(0.9, beta2)]}
        >>> with higher.innerloop_ctx(net, opt, override=betas, checkpoint_every=2) as (fnet, diffopt):
        ...     for x in (1.0, 2.0, 3.0):
        ...         _ = diffopt.step(fnet(torch.tensor([[x]])).square().sum())
        >>> torch.autograd.grad(fnet(torch.ones(1, 1)).sum(), beta2)[0].isfinite().item()
        True

    References:
        Kingma and Ba, Adam: a method for stochastic optimization, ICLR 2015 (arXiv 1412.6980).
        Reddi, Kale and Kumar, On the convergence of Adam and beyond, ICLR 2018 (AMSGrad).
    """

    elementwise = True

    def update(self, param: Tensor, grad: Tensor, state: ParamState, group: Group) -> tuple[Tensor, dict[str, Any]]:
        """One step; keeps both moments, the step count and, with amsgrad, the largest second moment."""
        beta1, beta2 = group["betas"]
        step = state.get("step", 0) + 1
        param, grad = decayed(param, grad, group, self._decoupled(group))
        first = lerp(kept(state, "exp_avg", grad), grad, beta1)
        second = lerp(kept(state, "exp_avg_sq", grad), grad * grad, beta2)
        new_state = {**state, "step": step, "exp_avg": first, "exp_avg_sq": second}
        if group["amsgrad"]:
            largest = state.get("max_exp_avg_sq")
            second = new_state["max_exp_avg_sq"] = second if largest is None else torch.maximum(largest, second)
        correction1, correction2 = 1 - beta1**step, 1 - beta2**step
        denominator = safe_sqrt(second) / correction2**0.5 + group["eps"]
        return descend(param, first / denominator, group["lr"] / correction1), new_state

    def _decoupled(self, group: Group) -> bool:
        return bool(group.get("decoupled_weight_decay", False))


class DifferentiableAdamW(DifferentiableAdam):
    """`torch.optim.AdamW` as a pure rule: Adam whose weight decay does not pass through the moments.

    Example:
        >>> import torch, lowmem_higher as higher
        >>> net = torch.nn.Linear(1, 1)
        >>> with higher.innerloop_ctx(net, torch.optim.AdamW(net.parameters())) as (fnet, diffopt):
        ...     type(diffopt).__name__
        'DifferentiableAdamW'

    References:
        Loshchilov and Hutter, Decoupled weight decay regularization, ICLR 2019 (arXiv 1711.05101).
    """

    def _decoupled(self, group: Group) -> bool:
        return True
