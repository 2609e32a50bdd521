"""The table that pairs torch's optimizers with differentiable ones."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from lowmem_higher.optim.adadelta import DifferentiableAdadelta
from lowmem_higher.optim.adafactor import DifferentiableAdafactor
from lowmem_higher.optim.adagrad import DifferentiableAdagrad
from lowmem_higher.optim.adam import DifferentiableAdam, DifferentiableAdamW
from lowmem_higher.optim.adamax import DifferentiableAdamax
from lowmem_higher.optim.asgd import DifferentiableASGD
from lowmem_higher.optim.base import DifferentiableOptimizer, Group, ParamState
from lowmem_higher.optim.muon import DifferentiableMuon
from lowmem_higher.optim.nadam import DifferentiableNAdam
from lowmem_higher.optim.radam import DifferentiableRAdam
from lowmem_higher.optim.rmsprop import DifferentiableRMSprop
from lowmem_higher.optim.rprop import DifferentiableRprop
from lowmem_higher.optim.sgd import DifferentiableSGD

Rule = Callable[[Tensor, Tensor, ParamState, Group], tuple[Tensor, dict[str, Any]]]

_rules: dict[type[torch.optim.Optimizer], type[DifferentiableOptimizer]] = {
    torch.optim.SGD: DifferentiableSGD,
    torch.optim.Adam: DifferentiableAdam,
    torch.optim.AdamW: DifferentiableAdamW,
    torch.optim.Adadelta: DifferentiableAdadelta,
    torch.optim.Adagrad: DifferentiableAdagrad,
    torch.optim.Adamax: DifferentiableAdamax,
    torch.optim.ASGD: DifferentiableASGD,
    torch.optim.NAdam: DifferentiableNAdam,
    torch.optim.RAdam: DifferentiableRAdam,
    torch.optim.RMSprop: DifferentiableRMSprop,
    torch.optim.Rprop: DifferentiableRprop,
}
for _name, _rule in (("Adafactor", DifferentiableAdafactor), ("Muon", DifferentiableMuon)):
    if hasattr(torch.optim, _name):  # not in all versions
        _rules[getattr(torch.optim, _name)] = _rule

_refused: dict[type[torch.optim.Optimizer], str] = {
    torch.optim.LBFGS: (
        "its line search evaluates the loss as often as it likes and at other weights, while diffopt.step(loss) is "
        "given one evaluation. Use torch.optim.Adam or SGD, with more steps; where LBFGS only finds a starting point, "
        "run it on the model before the context"
    ),
    torch.optim.SparseAdam: (
        "it needs sparse gradients, and autograd cannot differentiate those once more. Use torch.optim.Adam, with "
        "nn.Embedding(..., sparse=False)"
    ),
}


def register_optim(
    optim_type: type[torch.optim.Optimizer],
    rule: type[DifferentiableOptimizer] | Rule,
    *,
    elementwise: bool = False,
) -> None:
    """Say how the steps of a torch optimizer are differentiated.

    Args:
        optim_type: The torch optimizer's class.
        rule: A function `rule(param, grad, state, group)` that returns the new parameter and its new state (a
            dictionary, empty at first) and changes nothing in place; `group` holds the hyperparameters. Or a subclass
            of `DifferentiableOptimizer`: with such a function as method `update`, or, as in `higher`, with
            `_update(self, grouped_grads, **kwargs)`.
        elementwise: Of a function: whether it treats each element alone, so that many small parameters can be
            joined into one vector for it, which is faster.

    Raises:
        TypeError: An argument is something else.

    Example:
        >>> import torch, lowmem_higher as higher
        >>> class SignSGD(torch.optim.Optimizer):
        ...     def __init__(self, params, lr):
        ...         super().__init__(params, {"lr": lr})
        >>> def sign_sgd(param, grad, state, group):
        ...     return param - group["lr"] * grad.sign(), {"step": state.get("step", 0) + 1}
        >>> higher.register_optim(SignSGD, sign_sgd, elementwise=True)
        >>> net = torch.nn.Linear(1, 1)
        >>> with higher.innerloop_ctx(net, SignSGD(net.parameters(), lr=0.1)) as (fnet, diffopt):
        ...     _ = diffopt.step(fnet(torch.ones(1, 1)).sum())
        >>> diffopt.state[0][0]
        {'step': 1}
    """
    if not (isinstance(optim_type, type) and issubclass(optim_type, torch.optim.Optimizer)):
        raise TypeError(
            f"register_optim needs a class of torch optimizers first, and got {optim_type!r}. Give the class, no "
            "instance: register_optim(type(opt), rule)."
        )
    if isinstance(rule, type):
        if not issubclass(rule, DifferentiableOptimizer) or elementwise:
            raise TypeError(
                "register_optim needs a subclass of DifferentiableOptimizer second, or a function "
                f"rule(param, grad, state, group), and got {rule!r}; in a class, `elementwise` is an attribute."
            )
        _rules[optim_type] = rule
    elif callable(rule):
        _rules[optim_type] = _made_of(rule, optim_type.__name__, elementwise)
    else:
        raise TypeError(
            "register_optim needs a subclass of DifferentiableOptimizer second, or a function "
            f"rule(param, grad, state, group), and got {rule!r}. The simplest: def rule(param, grad, state, group): "
            'return param - group["lr"] * grad, {**state}.'
        )


def _made_of(rule: Rule, name: str, elementwise: bool) -> type[DifferentiableOptimizer]:
    def update(
        self: DifferentiableOptimizer, param: Tensor, grad: Tensor, state: ParamState, group: Group
    ) -> tuple[Tensor, dict[str, Any]]:
        result: Any = rule(param, grad, state, group)
        if (
            not isinstance(result, tuple)
            or len(result) != 2
            or not isinstance(result[0], Tensor)
            or result[0].shape != param.shape
            or not isinstance(result[1], dict)
        ):
            raise TypeError(
                f"The update rule of {name} must return the new parameter, of shape {tuple(param.shape)}, and a "
                'dictionary with its new state: return param - group["lr"] * grad, {**state}.'
            )
        return result

    members = {"update": update, "elementwise": elementwise, "__module__": "register_optim", "__doc__": rule.__doc__}
    return type(f"Differentiable{name}", (DifferentiableOptimizer,), members)


def _rule_for(optim_type: type[torch.optim.Optimizer]) -> type[DifferentiableOptimizer]:
    if optim_type in _rules:
        return _rules[optim_type]
    if optim_type in _refused:
        raise ValueError(f"{optim_type.__name__} has no differentiable update rule: {_refused[optim_type]}.")
    supported = ", ".join(sorted(cls.__name__ for cls in _rules))
    raise ValueError(
        f"{optim_type.__name__} has no differentiable update rule here; there is one for {supported}. Add yours: "
        f"lowmem_higher.register_optim({optim_type.__name__}, rule), with a function rule(param, grad, state, group) "
        "that returns the new parameter and the new state."
    )


def get_diff_optim(
    opt: torch.optim.Optimizer,
    reference_params: Iterable[Tensor],
    fmodel: Any = None,
    device: torch.device | None = None,
    override: Mapping[str, Sequence[Any]] | None = None,
    track_higher_grads: bool = True,
    **kwargs: Any,
) -> DifferentiableOptimizer:
    """The differentiable optimizer that stands for `opt`; the arguments are those of `DifferentiableOptimizer`.

    Raises:
        TypeError: `opt` is no torch optimizer.
        ValueError: No rule is registered for its class.

    Example:
        >>> import torch, lowmem_higher as higher
        >>> net = torch.nn.Linear(1, 1)
        >>> higher.get_diff_optim(torch.optim.SGD(net.parameters(), lr=0.1), net.parameters()).param_groups[0]["lr"]
        0.1
    """
    if not isinstance(opt, torch.optim.Optimizer):
        raise TypeError(
            f"The optimizer must be a torch.optim.Optimizer, and is {type(opt).__name__}. Build one over the model's "
            "parameters: torch.optim.SGD(model.parameters(), lr=0.1)."
        )
    return _rule_for(type(opt))(
        opt,
        reference_params,
        fmodel=fmodel,
        device=device,
        override=override,
        track_higher_grads=track_higher_grads,
        **kwargs,
    )


def create_diff_optim(
    opt_type: type[torch.optim.Optimizer],
    opt_kwargs: Mapping[str, Any] | None = None,
    params: Iterable[Any] | None = None,
    fmodel: Any = None,
    device: torch.device | None = None,
    override: Mapping[str, Sequence[Any]] | None = None,
    track_higher_grads: bool = True,
    **kwargs: Any,
) -> DifferentiableOptimizer:
    """A differentiable optimizer made from a class of torch optimizers, without one that exists.

    Args:
        opt_type: The class.
        opt_kwargs: What it is built with.
        params: The fast weights that will be optimized, or parameter groups of them; only their shapes are used.
        fmodel: The functional model whose fast weights are optimized; all of them, unless `params` is given.
        device: Where the state goes.
        override: `{hyperparameter: [value]}` or one value per parameter group; tensors get gradients.
        track_higher_grads: Whether steps record the graph that differentiates through them.
        kwargs: Passed to the differentiable optimizer.

    Raises:
        TypeError: `opt_type` is no class of torch optimizers.
        ValueError: Neither `params` nor `fmodel` is given, or no rule is registered for the class.

    Example:
        >>> import torch, lowmem_higher as higher
        >>> weights = [torch.zeros(2, requires_grad=True)]
        >>> higher.optim.create_diff_optim(torch.optim.SGD, {"lr": 0.5}, params=weights).param_groups[0]["lr"]
        0.5
    """
    if not (isinstance(opt_type, type) and issubclass(opt_type, torch.optim.Optimizer)):
        raise TypeError(
            f"create_diff_optim needs a class of torch optimizers first, and got {opt_type!r}; an optimizer that "
            "exists goes to get_diff_optim(opt, fmodel.parameters(), fmodel=fmodel)."
        )
    rule = _rule_for(opt_type)
    if params is None and fmodel is None:
        raise ValueError(
            "create_diff_optim needs the weights that will be optimized: "
            "create_diff_optim(torch.optim.SGD, {'lr': 0.1}, fmodel=fmodel), or params=[w] without an fmodel."
        )
    groups = _groups(fmodel.parameters() if params is None else params)
    given = [param for group in groups for param in group["params"]]
    weights = given if fmodel is None else list(fmodel.parameters())
    stand_ins = [torch.zeros_like(weight, requires_grad=True) for weight in weights]
    chosen = iter(_positions(given, weights))
    opt = opt_type(
        [{**group, "params": [stand_ins[next(chosen)] for _ in group["params"]]} for group in groups],
        **(opt_kwargs or {}),
    )
    return rule(
        opt,
        stand_ins,
        fmodel=fmodel,
        device=device,
        override=override,
        track_higher_grads=track_higher_grads,
        **kwargs,
    )


def _groups(params: Iterable[Any]) -> list[dict[str, Any]]:
    items = list(params)
    if not any(isinstance(item, Mapping) for item in items):
        return [{"params": items}]
    listed = [[item["params"]] if isinstance(item["params"], Tensor) else list(item["params"]) for item in items]
    return [{**item, "params": members} for item, members in zip(items, listed, strict=True)]


def _positions(given: Sequence[Tensor], weights: Sequence[Tensor]) -> list[int]:
    """Where the given tensors stand among the weights; others of the same shapes stand for them in order."""
    position = {id(weight): index for index, weight in enumerate(weights)}
    if all(id(param) in position for param in given):
        return [position[id(param)] for param in given]
    if [param.shape for param in given] == [weight.shape for weight in weights]:
        return list(range(len(weights)))
    raise ValueError(
        "create_diff_optim got params that are not the current weights of fmodel. Choose among those: "
        "params=[fmodel.weight], or leave `params` out to optimize all."
    )
