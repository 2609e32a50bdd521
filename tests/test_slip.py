"""The warning for a forgotten `copy_initial_weights=False`: given for the slip, never for a loop that is right."""

from __future__ import annotations

import gc
import warnings
from collections.abc import Callable
from typing import Any

import pytest
import torch
from loops import mlp, rows, sgd_for
from torch import Tensor, nn

import lowmem_higher
from lowmem_higher import NothingTrainedWarning, innerloop_ctx

X, Y = torch.linspace(-1, 1, 36).reshape(12, 3), torch.linspace(0, 1, 12).reshape(12, 1)
SETTINGS: list[dict[str, Any]] = [{}, {"checkpoint_every": 2}]


def inner_steps(fnet: Any, diffopt: Any, weight: Tensor | float = 1.0) -> None:
    for t in range(4):
        diffopt.step(weight * (fnet(X[rows(t)]) - Y[rows(t)]).square().mean())


def warned(loop: Callable[..., None], **settings: Any) -> list[str]:
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        loop(mlp(), **settings)
        gc.collect()
    assert all(warning.category is NothingTrainedWarning for warning in caught)
    return [str(warning.message) for warning in caught]


def maml_that_forgot(net: nn.Module, **settings: Any) -> None:
    meta = torch.optim.SGD(net.parameters(), lr=0.1)
    for _ in range(2):
        meta.zero_grad()
        with innerloop_ctx(net, sgd_for(net), **settings) as (fnet, diffopt):
            inner_steps(fnet, diffopt)
            (fnet(X) - Y).square().mean().backward()
        meta.step()


def losses_summed_over_tasks(net: nn.Module, **settings: Any) -> None:
    outer = []
    for _ in range(2):
        with innerloop_ctx(net, sgd_for(net), **settings) as (fnet, diffopt):
            inner_steps(fnet, diffopt)
            outer.append((fnet(X) - Y).square().mean())
            penalty = torch.stack([p.square().sum() for p in fnet.parameters()]).sum()
    (torch.stack(outer).sum() + penalty).backward()


@pytest.mark.parametrize("setting", SETTINGS, ids=str)
@pytest.mark.parametrize("slip", [maml_that_forgot, losses_summed_over_tasks])
def test_the_slip_is_named_once_for_each_loop(slip: Callable[..., None], setting: dict[str, Any]) -> None:
    messages = warned(slip, **setting)
    # Of the summed loop only the last functional model is alive in the backward; for the others nothing is known.
    assert len(messages) == (2 if slip is maml_that_forgot else 1)
    assert "copy_initial_weights=False" in messages[0]
    assert "track_higher_grads=False" in messages[0]


def with_the_keyword(net: nn.Module, **settings: Any) -> None:
    with innerloop_ctx(net, sgd_for(net), copy_initial_weights=False, **settings) as (fnet, diffopt):
        inner_steps(fnet, diffopt)
        fnet(X).sum().backward()


def learned_weight(net: nn.Module, **settings: Any) -> None:
    weight = torch.ones((), requires_grad=True)
    with innerloop_ctx(net, sgd_for(net), **settings) as (fnet, diffopt):
        inner_steps(fnet, diffopt, weight)
        fnet(X).sum().backward()


def learned_rate(net: nn.Module, **settings: Any) -> None:
    lr = torch.tensor(0.1, requires_grad=True)
    with innerloop_ctx(net, sgd_for(net), override={"lr": [lr]}, **settings) as (fnet, diffopt):
        inner_steps(fnet, diffopt)
        fnet(X).sum().backward()


def grads_of_the_copies_read_after_the_backward(net: nn.Module, **settings: Any) -> None:
    with innerloop_ctx(net, sgd_for(net), **settings) as (fnet, diffopt):
        inner_steps(fnet, diffopt)
        fnet(X).sum().backward()
    for param, copy in zip(net.parameters(), fnet.parameters(time=0), strict=True):
        param.grad = copy.grad


def copies_taken_before_the_loop(net: nn.Module, **settings: Any) -> None:
    with innerloop_ctx(net, sgd_for(net), **settings) as (fnet, diffopt):
        start = dict(fnet.named_parameters())
        inner_steps(fnet, diffopt)
        fnet(X).sum().backward()
    assert all(copy.grad is not None for copy in start.values())


def autograd_grad(net: nn.Module, **settings: Any) -> None:
    with innerloop_ctx(net, sgd_for(net), **settings) as (fnet, diffopt):
        inner_steps(fnet, diffopt)
        torch.autograd.grad(fnet(X).sum(), list(fnet.parameters(time=0)))


def no_backward(net: nn.Module, **settings: Any) -> None:
    with innerloop_ctx(net, sgd_for(net), **settings) as (fnet, diffopt):
        inner_steps(fnet, diffopt)


def a_backward_before_any_step(net: nn.Module, **settings: Any) -> None:
    with innerloop_ctx(net, sgd_for(net), **settings) as (fnet, _):
        fnet(X).sum().backward()


def untracked(net: nn.Module, **settings: Any) -> None:
    with innerloop_ctx(net, sgd_for(net), track_higher_grads=False, **settings) as (fnet, diffopt):
        inner_steps(fnet, diffopt)
        fnet(X).sum().backward()


def features_learned_outside(net: nn.Module, **settings: Any) -> None:
    body = nn.Linear(3, 3)
    with innerloop_ctx(net, sgd_for(net), **settings) as (fnet, diffopt):
        for t in range(4):
            diffopt.step((fnet(body(X[rows(t)])) - Y[rows(t)]).square().mean())
        fnet(body(X)).sum().backward()


RIGHT = [
    with_the_keyword,
    learned_weight,
    learned_rate,
    grads_of_the_copies_read_after_the_backward,
    copies_taken_before_the_loop,
    autograd_grad,
    no_backward,
    a_backward_before_any_step,
    untracked,
    features_learned_outside,
]


@pytest.mark.parametrize("setting", SETTINGS, ids=str)
@pytest.mark.parametrize("loop", RIGHT)
def test_no_loop_that_is_right_is_warned_of(loop: Callable[..., None], setting: dict[str, Any]) -> None:
    assert warned(loop, **setting) == []


def test_it_can_be_turned_off_by_its_class() -> None:
    assert issubclass(lowmem_higher.errors.NothingTrainedWarning, UserWarning)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        warnings.simplefilter("ignore", NothingTrainedWarning)
        maml_that_forgot(mlp())
        gc.collect()
