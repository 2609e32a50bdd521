"""`checkpoints=s`: the gradient, bit for bit, with carries that are dropped, replaced and placed anew."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

import lowmem_higher as higher
from lowmem_higher import schedule
from lowmem_higher.schedule import Bounded, Revolve, first_order_runs
from lowmem_higher.testing import live_bytes

pytestmark = pytest.mark.usefixtures("float64")

BOUNDED: list[dict[str, Any]] = [
    {"checkpoints": 1},
    {"checkpoints": 2},
    {"checkpoints": 4},
    {"checkpoints": 100},
    {"checkpoints": 3, "steps": 23},
    {"checkpoints": 3, "steps": 9},
    {"checkpoints": 3, "steps": 200},
]
X = torch.sin(torch.arange(60, dtype=torch.float64)).reshape(20, 3)
Y = torch.cos(2 * torch.arange(20, dtype=torch.float64)).reshape(20, 1)


def net(width: int = 4) -> nn.Module:
    torch.manual_seed(3)
    return nn.Sequential(nn.Linear(3, width), nn.BatchNorm1d(width), nn.Tanh(), nn.Dropout(0.3), nn.Linear(width, 1))


def momentum(params: Any) -> torch.optim.Optimizer:
    return torch.optim.SGD(params, lr=0.05, momentum=0.8)


def meta_gradients(length: int, optimizer: Callable[..., torch.optim.Optimizer], **setting: Any) -> list[Tensor]:
    """Of initial weights, learning rate and example weights, through statistics, random masks and optimizer state."""
    model = net()
    rate = torch.tensor(0.05, requires_grad=True)
    weight = torch.linspace(0.5, 1.5, 20).requires_grad_()
    torch.manual_seed(7)
    opt = optimizer(model.parameters())
    with higher.innerloop_ctx(model, opt, copy_initial_weights=False, override={"lr": [rate]}, **setting) as (
        fnet,
        dopt,
    ):
        for step in range(length):
            rows = torch.arange(step, step + 8) % 20
            dopt.step((weight[rows, None] * (fnet(X[rows]) - Y[rows]).square()).mean())
        outer = (fnet.eval()(X) - Y).square().mean()
        grads = torch.autograd.grad(outer, [*model.parameters(), rate, weight])
    if "checkpoints" in setting and setting.get("replay", "native") == "native":
        slots, told = setting["checkpoints"], setting.get("steps")
        rule = Bounded(slots) if told is None else Revolve(slots, told)
        assert dopt.report.first_order_runs == first_order_runs(rule, length)
        assert dopt.report.second_order_runs == length
    return list(grads)


@pytest.mark.parametrize("setting", BOUNDED, ids=str)
@pytest.mark.parametrize("length", [1, 2, 9, 23])
@pytest.mark.parametrize("optimizer", [momentum, torch.optim.Adam], ids=["SGD", "Adam"])
def test_the_same_bits_as_with_every_carry_kept(
    optimizer: Callable[..., torch.optim.Optimizer], length: int, setting: dict[str, Any]
) -> None:
    """And exactly the first-order runs of the schedule's simulation."""
    expected = meta_gradients(length, optimizer, checkpoint_every=1)
    found = meta_gradients(length, optimizer, **setting)
    assert all(torch.equal(one, other) for one, other in zip(found, expected, strict=True))
    unrolled = meta_gradients(length, optimizer)
    for one, other in zip(found, unrolled, strict=True):
        assert (one - other).norm() <= 1e-9 * other.norm() + 1e-300


@pytest.mark.parametrize("slots", [1, 2, 4])
def test_a_carry_that_is_not_the_newest_is_given_up_at_the_end(slots: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """As in loops of thousands of steps, where not every step decides anew; the runs are those of the simulation."""
    monkeypatch.setattr(schedule, "_FINENESS", 4)
    expected = meta_gradients(30, momentum, checkpoint_every=1)
    for length, reference in ((29, None), (30, expected)):
        found = meta_gradients(length, momentum, checkpoints=slots)
        assert reference is None or all(torch.equal(a, b) for a, b in zip(found, reference, strict=True))


def test_the_other_replay_too() -> None:
    expected = meta_gradients(11, momentum)
    found = meta_gradients(11, momentum, checkpoints=3, replay="torch")
    for one, other in zip(found, expected, strict=True):
        assert (one - other).norm() <= 1e-9 * other.norm()


EVENTS = st.lists(
    st.one_of(
        st.tuples(st.just("steps"), st.integers(1, 9)),
        st.tuples(st.just("outer"), st.booleans()),
        st.tuples(st.just("look"), st.integers(0, 40)),
        st.tuples(st.just("set"), st.booleans()),
        st.tuples(st.just("all"), st.just(0)),
    ),
    min_size=1,
    max_size=9,
)


def gradients(outer: Tensor, inputs: list[Tensor], retain_graph: bool = True) -> list[Tensor]:
    found = torch.autograd.grad(outer, inputs, retain_graph=retain_graph, allow_unused=True)
    return [torch.zeros_like(x) if grad is None else grad for x, grad in zip(inputs, found, strict=True)]


def story(events: list[tuple[str, Any]], **setting: Any) -> list[Tensor]:
    """A loop in which outer gradients are taken on the way, past weights looked at, weights set by hand."""
    model = net()
    rate = torch.tensor(0.05, requires_grad=True)
    opt = torch.optim.SGD(model.parameters(), lr=0.05, momentum=0.8)
    torch.manual_seed(7)
    found: list[Tensor] = []
    with higher.innerloop_ctx(model, opt, copy_initial_weights=False, override={"lr": [rate]}, **setting) as (
        fnet,
        dopt,
    ):
        total = torch.zeros(())
        taken = 0
        for what, value in [*events, ("steps", 2)]:
            if what == "steps":
                for _ in range(value):
                    rows = torch.arange(taken, taken + 8) % 20
                    dopt.step((fnet(X[rows]) - Y[rows]).square().mean())
                    taken += 1
            elif what == "outer":
                outer = (fnet(X[:6]) - Y[:6]).square().mean()
                found += gradients(outer, [*model.parameters(), rate])
                if value:
                    total = total + outer
            elif what == "look":
                times = len(fnet._view.history)
                total = total + sum(w.square().sum() for w in fnet.parameters(time=value % times))
            elif what == "set":
                fnet.update_params([w.detach().requires_grad_() if value else w * 0.9 for w in fnet.parameters()])
            else:
                for time in range(len(fnet._view.history)):
                    found += [w.detach().clone() for w in fnet.parameters(time=time)]
        total = total + (fnet.eval()(X) - Y).square().mean()
        found += gradients(total, [*model.parameters(), rate])
        found += gradients(total, [*model.parameters(), rate], retain_graph=False)
    return found


@given(events=EVENTS, slots=st.integers(1, 5), told=st.none() | st.integers(1, 30))
@settings(max_examples=40, deadline=None)
def test_any_story_gives_the_gradients_of_the_full_unroll(
    events: list[tuple[str, Any]], slots: int, told: int | None
) -> None:
    expected = story(events)
    found = story(events, checkpoints=slots, steps=told)
    assert len(found) == len(expected)
    for one, other in zip(found, expected, strict=True):
        assert (one - other).norm() <= 1e-9 * other.norm() + 1e-12


def wide() -> nn.Module:
    return nn.Sequential(nn.Linear(3, 64), nn.Tanh(), nn.Linear(64, 64), nn.Tanh(), nn.Linear(64, 1))


def peak_above_the_model(length: int, slots: int) -> tuple[int, int]:
    """The peak of live bytes of a loop with its backward, and the bytes of a carry. Batches are made beforehand."""
    model = wide()
    opt = torch.optim.SGD(model.parameters(), lr=1e-3, momentum=0.9)
    with live_bytes() as live:
        with higher.innerloop_ctx(model, opt, copy_initial_weights=False, checkpoints=slots) as (fnet, dopt):
            for _ in range(length):
                dopt.step((fnet(X) - Y).square().mean())
            outer = (fnet(X) - Y).square().mean()
            torch.autograd.grad(outer, list(model.parameters()))
        carry = dopt.report.carry_bytes
    return live.peak, carry


def graph_bytes(model: nn.Module, x: Tensor) -> int:
    """What one second-order step takes, written by hand: results and cotangents of the inputs included."""
    weights = [w.detach().requires_grad_() for w in model.parameters()]
    buffers = [torch.zeros_like(w, requires_grad=True) for w in weights]
    vectors = [torch.ones_like(w) for w in weights] * 2
    with live_bytes() as live:
        out = torch.func.functional_call(model, dict(zip(dict(model.named_parameters()), weights, strict=True)), x)
        grads = torch.autograd.grad((out - 1).square().mean(), weights, create_graph=True)
        new_buffers = [0.9 * b + g for b, g in zip(buffers, grads, strict=True)]
        new = [w - 1e-3 * b for w, b in zip(weights, new_buffers, strict=True)]
        torch.autograd.grad([*new, *new_buffers], [*weights, *buffers], vectors)
    return live.peak


def test_memory_does_not_grow_with_the_steps() -> None:
    """At most s + 3 carries and one step's graph."""
    graph = graph_bytes(wide(), X)
    for length, slots in ((60, 4), (200, 4), (60, 10)):
        peak, carry = peak_above_the_model(length, slots)
        assert peak <= (slots + 3) * carry + 1.1 * graph, (length, slots)
    assert peak_above_the_model(200, 4)[0] <= 1.1 * peak_above_the_model(60, 4)[0]


def line() -> nn.Module:
    return nn.Linear(64, 1, bias=False)


def test_ten_carries_serve_ten_times_the_steps_in_the_same_memory() -> None:
    """A tenth of what `benchmarks/scaling.py` runs; here each step has a batch of its own, which is held."""

    def measure(steps: int, fresh: bool) -> tuple[int, int, int]:
        torch.manual_seed(0)
        model = line()
        opt = torch.optim.SGD(model.parameters(), lr=1e-3, momentum=0.9)
        resident = torch.randn(4, 64)
        with (
            live_bytes() as live,
            higher.innerloop_ctx(model, opt, copy_initial_weights=False, checkpoints=10) as (fnet, dopt),
        ):
            for _ in range(steps):
                dopt.step((fnet(torch.randn(4, 64) if fresh else resident) - 1).square().mean())
            externals = dopt.report.externals_bytes
            grads = torch.autograd.grad(fnet(resident).square().mean(), list(model.parameters()))
        assert all(grad.norm() > 0 for grad in grads)
        assert dopt.report.first_order_runs == first_order_runs(Bounded(10), steps)
        assert dopt.report.second_order_runs == steps
        return live.peak, dopt.report.carry_bytes, externals

    short, carry, _ = measure(200, fresh=False)
    assert short <= 13 * carry + 1.1 * graph_bytes(line(), torch.randn(4, 64))
    assert measure(2000, fresh=False)[0] <= 1.1 * short
    peak, _, externals = measure(200, fresh=True)
    assert externals >= 200 * 4 * 64 * 8
    assert peak <= 13 * carry + 1.1 * graph_bytes(line(), torch.randn(4, 64)) + externals


@pytest.mark.parametrize(
    ("wrong", "error", "message"),
    [
        ({"checkpoints": 0}, ValueError, "checkpoints=0 must be at least 1"),
        ({"checkpoints": 2.5}, TypeError, "checkpoints=2.5 is a float"),
        ({"checkpoints": True}, TypeError, "checkpoints=True is a bool"),
        ({"checkpoints": 3, "checkpoint_every": 2}, ValueError, "Give one of them"),
        ({"steps": 5}, ValueError, r"checkpoints=10, steps=5"),
        ({"checkpoints": 3, "steps": -1}, ValueError, "steps=-1 must be at least 1"),
    ],
)
def test_bad_settings(wrong: dict[str, Any], error: type[Exception], message: str) -> None:
    model = net()
    opt = torch.optim.SGD(model.parameters(), lr=0.1)
    with pytest.raises(error, match=message), higher.innerloop_ctx(model, opt, **wrong):
        pass
