"""Adagrad."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from torch import Tensor

from lowmem_higher.optim.arithmetic import regularized
from lowmem_higher.optim.base import DifferentiableOptimizer, Group, ParamState, descend, safe_sqrt


class DifferentiableAdagrad(DifferentiableOptimizer):
    """`torch.optim.Adagrad` as a pure rule.

    An override of `initial_accumulator_value` takes effect where no step was taken yet.

    Example:
        >>> import torch, lowmem_higher as higher
        >>> net, start = torch.nn.Linear(1, 1), torch.tensor(0.5, requires_grad=True)
        >>> opt, override = torch.optim.Adagrad(net.parameters()), {"initial_accumulator_value": [start]}
        >>> with higher.innerloop_ctx(net, opt, override=override) as (fnet, diffopt):
        ...     _ = diffopt.step(fnet(torch.ones(1, 1)).sum())
        >>> torch.autograd.grad(fnet(torch.ones(1, 1)).sum(), start)[0] > 0  # the larger, the smaller the step
        tensor(True)

    References:
        Duchi, Hazan and Singer, Adaptive subgradient methods for online learning and stochastic optimization,
        JMLR 12, 2011.
    """

    elementwise = True

    def update(self, param: Tensor, grad: Tensor, state: ParamState, group: Group) -> tuple[Tensor, dict[str, Any]]:
        """One step; keeps the sum of squared gradients."""
        step = state.get("step", 0) + 1
        grad = regularized(param, grad, group)
        if "sum" in state:
            total = state["sum"] + grad * grad
        else:
            total = grad * grad + group.get("initial_accumulator_value", 0)
        rate = group["lr"] / (1 + (step - 1) * group["lr_decay"])
        direction = grad / (safe_sqrt(total) + group["eps"])
        return descend(param, direction, rate), {**state, "step": step, "sum": total}

    def _apply_override(self, override: Mapping[str, Sequence[Any]]) -> None:
        super()._apply_override(override)
        if "initial_accumulator_value" in override:  # torch has filled the sums with the one it was built with
            self.state = [
                {position: _without_unused_sum(entry) for position, entry in entries.items()} for entries in self.state
            ]


def _without_unused_sum(entry: dict[str, Any]) -> dict[str, Any]:
    return entry if entry["step"] else {key: value for key, value in entry.items() if key != "sum"}
