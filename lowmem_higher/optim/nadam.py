"""NAdam: Adam with Nesterov momentum."""

from __future__ import annotations

from typing import Any

from torch import Tensor

from lowmem_higher.optim.arithmetic import decayed, kept
from lowmem_higher.optim.base import DifferentiableOptimizer, Group, ParamState, descend, lerp, safe_sqrt


class DifferentiableNAdam(DifferentiableOptimizer):
    """`torch.optim.NAdam` as a pure rule, with coupled or decoupled weight decay.

    Example:
        >>> import torch, lowmem_higher as higher
        >>> net, decay = torch.nn.Linear(1, 1), torch.tensor(0.1, requires_grad=True)
        >>> opt, override = torch.optim.NAdam(net.parameters()), {"momentum_decay": [decay]}
        >>> with higher.innerloop_ctx(net, opt, override=override, checkpoint_every=2) as (fnet, diffopt):
        ...     for x in (1.0, 2.0, 3.0):
        ...         _ = diffopt.step(fnet(torch.tensor([[x]])).square().sum())
        >>> torch.autograd.grad(fnet(torch.ones(1, 1)).sum(), decay)[0].isfinite().item()
        True

    References:
        Dozat, Incorporating Nesterov momentum into Adam, ICLR 2016 workshop.
    """

    elementwise = True
    scalars = ("step", "mu_product")

    def update(self, param: Tensor, grad: Tensor, state: ParamState, group: Group) -> tuple[Tensor, dict[str, Any]]:
        """One step; keeps both moments, and the product of all momentum factors so far."""
        (beta1, beta2), psi, lr = group["betas"], group["momentum_decay"], group["lr"]
        step = state.get("step", 0) + 1
        param, grad = decayed(param, grad, group, bool(group.get("decoupled_weight_decay", False)))
        mu, next_mu = (beta1 * (1 - 0.5 * 0.96 ** (time * psi)) for time in (step, step + 1))
        product = state.get("mu_product", 1.0) * mu
        first = lerp(kept(state, "exp_avg", grad), grad, beta1)
        second = lerp(kept(state, "exp_avg_sq", grad), grad * grad, beta2)
        denominator = safe_sqrt(second) / (1 - beta2**step) ** 0.5 + group["eps"]
        direction = grad * ((1 - mu) / (1 - product)) + first * (next_mu / (1 - product * next_mu))
        new_state = {**state, "step": step, "mu_product": product, "exp_avg": first, "exp_avg_sq": second}
        return descend(param, direction / denominator, lr), new_state

    def _joins(self, group: Group, state: dict[int, dict[str, Any]]) -> bool:
        """Not where the product is a tensor: each parameter has its own."""
        made_of = [group["betas"][0], group["momentum_decay"], *(entry.get("mu_product") for entry in state.values())]
        return super()._joins(group, state) and not any(isinstance(value, Tensor) for value in made_of)
