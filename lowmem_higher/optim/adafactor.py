"""Adafactor: the second moment as a product of rows and columns."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from lowmem_higher.optim.arithmetic import at_least, at_most, check_real, decayed, kept
from lowmem_higher.optim.base import DifferentiableOptimizer, Group, ParamState, descend, lerp, safe_sqrt


class DifferentiableAdafactor(DifferentiableOptimizer):
    """`torch.optim.Adafactor` (torch 2.5 and later) as a pure rule, differentiable off the kinks of its bounds.

    Example:
        >>> import torch, lowmem_higher as higher
        >>> net = torch.nn.Linear(3, 2)
        >>> with higher.innerloop_ctx(net, torch.optim.Adafactor(net.parameters())) as (fnet, diffopt):
        ...     _ = diffopt.step(fnet(torch.ones(1, 3)).square().sum())
        >>> {name: tuple(value.shape) for name, value in diffopt.state[0][0].items() if name != "step"}
        {'row_var': (2, 1), 'col_var': (1, 3)}

    References:
        Shazeer and Stern, Adafactor: adaptive learning rates with sublinear memory cost, ICML 2018 (arXiv 1804.04235).
    """

    def update(self, param: Tensor, grad: Tensor, state: ParamState, group: Group) -> tuple[Tensor, dict[str, Any]]:
        """One step; keeps row and column factors of the second moment, or the moment itself for a vector."""
        check_real(param, "Adafactor")
        step = state.get("step", 0) + 1
        weight_of_old = 1 - step ** group["beta2_decay"]
        eps, smallest_scale = group["eps"]
        eps = torch.finfo(param.dtype).eps if eps is None else eps
        rate = at_least(_root_mean_square(param), smallest_scale) * at_most(group["lr"], step**-0.5)
        param, grad = decayed(param, grad, group, decoupled=True)
        squares, new_state = grad * grad, {**state, "step": step}
        if grad.ndim > 1:
            for name, dim in (("row_var", -1), ("col_var", -2)):
                means = squares.mean(dim, keepdim=True)
                new_state[name] = lerp(kept(state, name, means), means, weight_of_old)
            rows, columns = new_state["row_var"], new_state["col_var"]
            second = rows * columns / at_least(rows.mean(-2, keepdim=True), eps)
        else:
            second = new_state["variance"] = lerp(kept(state, "variance", grad), squares, weight_of_old)
        direction = grad * at_least(second, eps * eps).rsqrt()
        too_long = at_least(_root_mean_square(direction) / group["d"], 1.0)
        return descend(param, direction, rate / too_long), new_state


def _root_mean_square(tensor: Tensor) -> Tensor:
    return safe_sqrt((tensor * tensor).mean())
