"""Resilient backpropagation."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from lowmem_higher.optim.arithmetic import ascended, at_least, at_most, kept
from lowmem_higher.optim.base import DifferentiableOptimizer, Group, ParamState


class DifferentiableRprop(DifferentiableOptimizer):
    """`torch.optim.Rprop` as a pure rule.

    It uses the signs of gradients only. The derivative of a sign is 0, so the way from the weights to the new weights
    is the identity; the step sizes depend on `lr`, `etas` and `step_sizes`.

    Example:
        >>> import torch, lowmem_higher as higher
        >>> net, lr = torch.nn.Linear(1, 1), torch.tensor(0.1, requires_grad=True)
        >>> opt = torch.optim.Rprop(net.parameters())
        >>> with higher.innerloop_ctx(net, opt, override={"lr": [lr]}) as (fnet, diffopt):
        ...     for _ in range(2):  # steps of lr and 1.2 lr
        ...         _ = diffopt.step(fnet(torch.ones(1, 1)).sum())
        >>> torch.autograd.grad(fnet(torch.ones(1, 1)).sum(), lr)  # two parameters
        (tensor(-4.4000),)

    References:
        Riedmiller and Braun, A direct adaptive method for faster backpropagation learning: the RPROP algorithm,
        IEEE International Conference on Neural Networks, 1993.
    """

    elementwise = True

    def update(self, param: Tensor, grad: Tensor, state: ParamState, group: Group) -> tuple[Tensor, dict[str, Any]]:
        """One step; keeps the step size and the last gradient of each element."""
        (shrink, grow), (smallest, largest) = group["etas"], group["step_sizes"]
        grad = ascended(grad, group)
        size = state["step_size"] if "step_size" in state else torch.zeros_like(grad) + group["lr"]
        agreement = grad * kept(state, "prev", grad)
        turned = agreement < 0
        size = torch.where(turned, size * shrink, torch.where(agreement > 0, size * grow, size))
        size = at_most(at_least(size, smallest), largest)
        grad = grad.masked_fill(turned, 0)
        new_state = {**state, "step": state.get("step", 0) + 1, "prev": grad, "step_size": size}
        return param - grad.sign() * size, new_state
