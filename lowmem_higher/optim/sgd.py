"""Stochastic gradient descent with momentum, dampening, Nesterov's variant and weight decay."""

from __future__ import annotations

from typing import Any

from torch import Tensor

from lowmem_higher.optim.arithmetic import regularized
from lowmem_higher.optim.base import DifferentiableOptimizer, Group, ParamState, descend, is_zero


class DifferentiableSGD(DifferentiableOptimizer):
    """`torch.optim.SGD` as a pure rule.

    Example:
        >>> import torch, lowmem_higher as higher
        >>> net, lr = torch.nn.Linear(1, 1), torch.tensor(0.1, requires_grad=True)
        >>> opt = torch.optim.SGD(net.parameters(), lr=0.1, momentum=0.9)
        >>> with higher.innerloop_ctx(net, opt, override={"lr": [lr]}) as (fnet, diffopt):
        ...     _ = diffopt.step(fnet(torch.ones(1, 1)).sum())
        >>> torch.autograd.grad(fnet(torch.ones(1, 1)).sum(), lr)  # two parameters, each with gradient 1
        (tensor(-2.),)

    References:
        Sutskever et al., On the importance of initialization and momentum in deep learning, ICML 2013.
    """

    affine = True
    elementwise = True

    def update(self, param: Tensor, grad: Tensor, state: ParamState, group: Group) -> tuple[Tensor, dict[str, Any]]:
        """One step; keeps a momentum buffer if there is momentum."""
        momentum, dampening = group["momentum"], group["dampening"]
        grad = regularized(param, grad, group)
        if is_zero(momentum):
            return descend(param, grad, group["lr"]), dict(state)
        old = state.get("momentum_buffer")
        # torch starts the buffer at the first gradient, undampened.
        buffer = grad if old is None else momentum * old + (grad if is_zero(dampening) else (1 - dampening) * grad)
        direction = grad + momentum * buffer if group["nesterov"] else buffer
        return descend(param, direction, group["lr"]), {**state, "momentum_buffer": buffer}
