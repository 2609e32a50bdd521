"""Errors as a new user meets them: each says what to do, as code."""

from __future__ import annotations

import ast
import re
import warnings
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import lowmem_higher as higher
from lowmem_higher.testing import assert_matches_unrolled, taylor_test

PACKAGE = Path(higher.__file__).parent
CODE = re.compile(r"\w\(|\w=|`|\w\[|--\w|->")
# Raised and caught inside the engine, or one line of the command line.
INTERNAL = {"NotTraceableError", "_UnableError", "OptionError", "DivergedError", "ArgumentTypeError"}
# Their fix is a part of the message that is filled in.
FILLED_IN = {
    "The model {}is wrapped in {}, which {}. Hand over what is inside, {}, with an optimizer over its parameters, "
    "and {}.",
    "Another process is gone, or waits for something else, while this one (rank {}) came to collective {}, {}. {}",
    "{}={} is a {}; it must be a whole number: {}. {}",
    "{}={} must be at least 1: {}. {}",
    "{} has no differentiable update rule: {}.",
    "{}={} must be at least 0, as in {}=1.0.",
    "{}={} is unknown; it can be {}.",
    "{}={} is a {}; it must be True or False.",
}


def text(node: ast.expr) -> str:
    match node:
        case ast.Constant(value=str(value)):
            return value
        case ast.JoinedStr(values=values):
            return "".join(text(value) for value in values)
        case ast.BinOp(left=left, right=right):
            return text(left) + text(right)
    return "{}"


def messages() -> Iterator[tuple[str, str]]:
    for path in sorted(PACKAGE.rglob("*.py")):
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if isinstance(node, ast.Call) and isinstance(node.func, ast.Name) and node.args:
                name, message = node.func.id, text(node.args[0])
                if name.endswith(("Error", "Warning")) and name not in INTERNAL and re.search(r"\w", message):
                    yield f"{path.relative_to(PACKAGE)}:{node.lineno}: {name}", message


def test_every_message_has_its_fix_as_code() -> None:
    found = list(messages())
    assert len(found) > 100
    assert {message for _, message in found} >= FILLED_IN
    without = [f"{where}: {message}" for where, message in found if not CODE.search(message)]
    assert not [line for line in without if not line.endswith(tuple(FILLED_IN))], "\n".join(without)


def test_the_fixes_of_keywords_are_filled_in() -> None:
    net = nn.Linear(1, 1)
    opt = torch.optim.SGD(net.parameters(), lr=0.1)
    for bad, said in [
        ({"checkpoint_every": 0}, "checkpoint_every=10"),
        ({"checkpoints": 2.5}, "checkpoints=10"),
        ({"truncate": 0}, "truncate="),
        ({"first_order": 1}, "it must be True or False"),
        ({"replay": "natve"}, "'native'"),
    ]:
        with pytest.raises((TypeError, ValueError)) as raised, higher.innerloop_ctx(net, opt, **bad):
            pass
        assert said in str(raised.value)


# What a new user does wrong, and a part of what the message says to do.
Slip = Callable[[], Any]
SLIPS: dict[str, tuple[type[BaseException], str, Slip]] = {}


def slip(error: type[BaseException], fix: str) -> Callable[[Slip], Slip]:
    def added(act: Slip) -> Slip:
        SLIPS[act.__name__] = error, fix, act
        return act

    return added


def opened(**settings: Any) -> tuple[Any, Any]:
    """A small loop of two steps, as a user leaves it."""
    net = nn.Linear(2, 1)
    opt = torch.optim.SGD(net.parameters(), lr=0.1)
    with higher.innerloop_ctx(net, opt, **settings) as (fnet, diffopt):
        for _ in range(2):
            diffopt.step(fnet(torch.ones(3, 2)).square().mean())
    return fnet, diffopt


@slip(ValueError, "fmodel.update_params([f(w) for w in fmodel.parameters()])")
def too_few_weights() -> None:
    fnet, _ = opened()
    fnet.update_params([torch.zeros(1, 2)])


@slip(ValueError, "new.reshape(old.shape)")
def weights_of_another_shape() -> None:
    fnet, _ = opened()
    fnet.update_params([torch.zeros(2), torch.zeros(1)])


@slip(ValueError, "innerloop_ctx(..., track_higher_grads=True)")
def the_past_of_an_untracked_loop() -> None:
    fnet, _ = opened(track_higher_grads=False)
    list(fnet.parameters(time=1 - 2 - 1))


@slip(RuntimeError, "fmodel.fast_params before the first step")
def the_start_of_an_untracked_loop() -> None:
    fnet, _ = opened(track_higher_grads=False)
    _ = fnet.init_fast_params


@slip(IndexError, "fmodel.parameters()")
def a_time_that_is_not_there() -> None:
    fnet, _ = opened()
    list(fnet.parameters(time=7))


@slip(AttributeError, "fmodel.named_parameters()")
def a_parameter_that_is_not_there() -> None:
    opened()[0].get_parameter("wieght")


@slip(TypeError, "diffopt.step(loss, override=..., grad_callback=...)")
def an_argument_twice() -> None:
    fnet, diffopt = opened()
    diffopt.step(fnet(torch.ones(3, 2)).mean(), None, {"lr": [0.1]}, override={"lr": [0.1]})


@slip(TypeError, "without .item() or .backward()")
def a_number_as_loss() -> None:
    fnet, diffopt = opened()
    diffopt.step(fnet(torch.ones(3, 2)).mean().item())


@slip(ValueError, "override={'lr': [value]}")
def a_hyperparameter_that_is_not_there() -> None:
    opened(override={"learning_rate": [0.1]})


@slip(TypeError, "torch.optim.SGD(model.parameters(), lr=0.1)")
def no_optimizer() -> None:
    net = nn.Linear(1, 1)
    with higher.innerloop_ctx(net, 0.1):  # type: ignore[arg-type]
        pass


@slip(TypeError, "innerloop_ctx(model, opt)")
def no_module() -> None:
    net = nn.Linear(1, 1)
    opt = torch.optim.SGD(net.parameters(), lr=0.1)
    with higher.innerloop_ctx(net.forward, opt):  # type: ignore[arg-type]
        pass


@slip(ValueError, "diffopt.commit(model, opt)")
def a_commit_to_another_model() -> None:
    _, diffopt = opened()
    diffopt.commit(nn.Linear(2, 1, bias=False))


@slip(TypeError, "register_optim(type(opt), rule)")
def an_instance_instead_of_a_class() -> None:
    higher.register_optim(torch.optim.SGD([torch.zeros(1)], lr=0.1), lambda p, g, s, group: (p, {}))  # type: ignore[arg-type]


@slip(TypeError, "def rule(param, grad, state, group): return")
def no_rule() -> None:
    higher.register_optim(torch.optim.SGD, 3)  # type: ignore[arg-type]


@slip(ValueError, "max_norm=torch.tensor(1.0)")
def a_norm_for_each_parameter() -> None:
    higher.clip_grad_norm(torch.ones(3))


@slip(ValueError, "microbatches=4")
def no_parts() -> None:
    opened(checkpoint_every=1, pullback="mixed", microbatches=0)


@slip(higher.HistoryFreedError, "innerloop_ctx(..., truncate=K)")
def weights_from_before_the_truncation() -> None:
    net = nn.Linear(2, 1)
    opt = torch.optim.SGD(net.parameters(), lr=0.1)
    with higher.innerloop_ctx(net, opt, checkpoint_every=1, truncate=1) as (fnet, diffopt):
        for _ in range(6):
            diffopt.step(fnet(torch.ones(3, 2)).square().mean())
        list(fnet.parameters(time=1))


@slip(higher.RecordError, "Take it in the loop: diffopt.step(loss)")
def a_step_inside_a_step() -> None:
    net = nn.Linear(2, 1)
    opt = torch.optim.SGD(net.parameters(), lr=0.1)
    with higher.innerloop_ctx(net, opt, checkpoint_every=1) as (_, diffopt):

        def inner(fmodel: nn.Module) -> Tensor:
            diffopt.step(fmodel(torch.ones(3, 2)).mean())
            return fmodel(torch.ones(3, 2)).mean()

        diffopt.step(inner)


@slip(higher.HigherOrderError, "checkpoint_every=None")
def a_derivative_of_the_outer_derivative() -> None:
    net = nn.Linear(2, 1)
    opt = torch.optim.SGD(net.parameters(), lr=0.1)
    with higher.innerloop_ctx(net, opt, copy_initial_weights=False, checkpoint_every=1) as (fnet, diffopt):
        diffopt.step(fnet(torch.ones(3, 2)).square().mean())
        torch.autograd.grad(fnet(torch.ones(3, 2)).mean(), list(net.parameters()), create_graph=True)


@slip(ReferenceError, "`with innerloop_ctx(...) as (fmodel, diffopt):`")
def a_model_that_was_dropped() -> None:
    def layer() -> Any:
        net = nn.Sequential(nn.Linear(2, 1), nn.Tanh())
        opt = torch.optim.SGD(net.parameters(), lr=0.1)
        with higher.innerloop_ctx(net, opt, checkpoint_every=2) as (fnet, diffopt):
            diffopt.step(fnet(torch.ones(3, 2)).mean())
            return fnet[0]

    layer()(torch.ones(3, 2))


@slip(TypeError, "return loss.mean()")
def a_vector_to_test() -> None:
    taylor_test(lambda x: x, torch.ones(2, dtype=torch.float64))


@slip(ValueError, "taylor_test(f, point, gradient=...)")
def a_value_without_a_path() -> None:
    taylor_test(lambda x: x.detach().sum(), torch.ones(2, dtype=torch.float64))


@slip(ValueError, "taylor_test(f, torch.randn_like(point))")
def a_test_at_an_optimum() -> None:
    taylor_test(lambda x: (x - x.detach()).square().sum(), torch.ones(2, dtype=torch.float64))


@slip(TypeError, "return torch.autograd.grad(outer_loss, [w])")
def a_loop_that_returns_a_number() -> None:
    assert_matches_unrolled(lambda **settings: 1.0)


@slip(AssertionError, "copy_initial_weights=False")
def a_loop_without_a_gradient() -> None:
    assert_matches_unrolled(lambda **settings: [None])


@slip(ValueError, "checkpoint_every=(1, 3, 10)")
def a_comparison_with_nothing() -> None:
    assert_matches_unrolled(lambda **settings: [torch.ones(1, dtype=torch.float64)], checkpoint_every=())


@pytest.mark.parametrize("name", SLIPS)
def test_what_to_do_is_in_the_message(name: str) -> None:
    error, fix, act = SLIPS[name]
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        with pytest.raises(error) as raised:
            act()
    assert fix in str(raised.value), str(raised.value)
    assert type(raised.value) is error


# ------------------------------------------------------------------------------------------------------------- reprs


def test_what_is_printed_of_public_objects_says_what_they_are() -> None:
    net = nn.Sequential(nn.Linear(2, 3), nn.Tanh(), nn.Linear(3, 1))
    opt = torch.optim.Adam(net.parameters(), lr=0.1)
    with higher.innerloop_ctx(net, opt, copy_initial_weights=False, checkpoint_every=2) as (fnet, diffopt):
        for _ in range(3):
            diffopt.step(fnet(torch.ones(3, 2)).square().mean())
    assert "(0): Linear(in_features=2, out_features=3, bias=True)" in repr(fnet)
    assert repr(diffopt).startswith("DifferentiableAdam(1 parameter group(s), ")
    assert "'lr': 0.1" in repr(diffopt)
    assert str(diffopt.report).startswith("Report: 3 steps; ")
    assert "step" in str(diffopt.program)
    planned = higher.plan(net, opt, steps=3, batch=torch.ones(3, 2), loss=lambda f, x: f(x).square().mean())
    assert str(planned).startswith("Plan: 3 steps; ")
    for shown in (fnet, diffopt, diffopt.report, diffopt.program, planned):
        assert " object at 0x" not in repr(shown)
