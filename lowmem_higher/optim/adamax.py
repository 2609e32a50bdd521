"""Adamax, the variant of Adam with the infinity norm."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from lowmem_higher.optim.arithmetic import kept, regularized
from lowmem_higher.optim.base import DifferentiableOptimizer, Group, ParamState, descend, lerp


class DifferentiableAdamax(DifferentiableOptimizer):
    """`torch.optim.Adamax` as a pure rule, differentiable where the two sides of its maximum differ.

    Example:
        >>> import torch, lowmem_higher as higher
        >>> net = torch.nn.Linear(1, 1)
        >>> with higher.innerloop_ctx(net, torch.optim.Adamax(net.parameters())) as (fnet, diffopt):
        ...     _ = diffopt.step(fnet(torch.ones(1, 1)).sum())
        >>> sorted(diffopt.state[0][0])
        ['exp_avg', 'exp_inf', 'step']

    References:
        Kingma and Ba, Adam: a method for stochastic optimization, ICLR 2015 (arXiv 1412.6980), section 7.1.
    """

    elementwise = True

    def update(self, param: Tensor, grad: Tensor, state: ParamState, group: Group) -> tuple[Tensor, dict[str, Any]]:
        """One step; keeps the first moment and the decaying maximum of gradients."""
        beta1, beta2 = group["betas"]
        step = state.get("step", 0) + 1
        grad = regularized(param, grad, group)
        first = lerp(kept(state, "exp_avg", grad), grad, beta1)
        largest = torch.maximum(kept(state, "exp_inf", grad) * beta2, grad.abs() + group["eps"])
        new_state = {**state, "step": step, "exp_avg": first, "exp_inf": largest}
        return descend(param, first / largest, group["lr"] / (1 - beta1**step)), new_state
