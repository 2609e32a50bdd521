"""Averaged stochastic gradient descent."""

from __future__ import annotations

from typing import Any

from torch import Tensor

from lowmem_higher.optim.arithmetic import at_least, kept, regularized
from lowmem_higher.optim.base import DifferentiableOptimizer, Group, ParamState, descend


class DifferentiableASGD(DifferentiableOptimizer):
    """`torch.optim.ASGD` as a pure rule.

    The average is `state[group][index]["ax"]`; the fast weights do not depend on it, nor on `t0`.

    Example:
        >>> import torch, lowmem_higher as higher
        >>> net, t0 = torch.nn.Linear(1, 1), torch.tensor(1.5, requires_grad=True)
        >>> opt = torch.optim.ASGD(net.parameters())
        >>> with higher.innerloop_ctx(net, opt, override={"t0": [t0]}, checkpoint_every=2) as (fnet, diffopt):
        ...     for _ in range(5):
        ...         _ = diffopt.step(fnet(torch.ones(1, 1)).sum())
        >>> torch.autograd.grad(diffopt.state[0][0]["ax"].sum(), t0)[0] < 0  # a later start averages less
        tensor(True)

    References:
        Polyak and Juditsky, Acceleration of stochastic approximation by averaging, SIAM J. Control Optim. 30(4), 1992.
    """

    elementwise = True
    scalars = ("step", "eta", "mu")

    def update(self, param: Tensor, grad: Tensor, state: ParamState, group: Group) -> tuple[Tensor, dict[str, Any]]:
        """One step; keeps the average, and the rates that the next step uses."""
        lr, lambd = group["lr"], group["lambd"]
        step = state.get("step", 0) + 1
        eta, mu = state.get("eta", lr), state.get("mu", 1.0)
        new = descend(param * (1 - lambd * eta), regularized(param, grad, group), eta)
        average = kept(state, "ax", param)
        new_state = {
            **state,
            "step": step,
            "ax": average + (new - average) * mu,
            "eta": lr / (1 + lambd * lr * step) ** group["alpha"],
            "mu": 1 / at_least(step - group["t0"], 1.0),
        }
        return new, new_state

    def _joins(self, group: Group, state: dict[int, dict[str, Any]]) -> bool:
        """Not where the rates are tensors: each parameter has its own."""
        made_of = [group[name] for name in ("lr", "lambd", "alpha", "t0")]
        made_of += [entry[name] for entry in state.values() for name in ("eta", "mu") if name in entry]
        return super()._joins(group, state) and not any(isinstance(value, Tensor) for value in made_of)
