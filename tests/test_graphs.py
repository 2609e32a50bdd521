"""`graphs=K`: graphs of several steps built from one kept carry, in place of replays."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor, nn

import lowmem_higher as higher
from lowmem_higher.schedule import (
    Bounded,
    Drop,
    Keep,
    Periodic,
    Revolve,
    Schedule,
    actions,
    first_order_runs,
    optimal_runs,
)
from lowmem_higher.testing import live_bytes

pytestmark = pytest.mark.usefixtures("float64")

X = torch.sin(torch.arange(60, dtype=torch.float64)).reshape(20, 3)
Y = torch.cos(2 * torch.arange(20, dtype=torch.float64)).reshape(20, 1)


def meta_gradients(steps: int, adam: bool = False, width: int = 4, /, **setting: Any) -> tuple[list[Tensor], Any]:
    torch.manual_seed(3)
    layers = [nn.Linear(3, width), nn.BatchNorm1d(width), nn.Tanh(), nn.Dropout(0.3), nn.Linear(width, 1)]
    model = nn.Sequential(*layers)
    rate = torch.tensor(0.05, requires_grad=True)
    weight = torch.linspace(0.5, 1.5, 20).requires_grad_()
    params = model.parameters()
    opt = torch.optim.Adam(params, lr=0.05, eps=0.01) if adam else torch.optim.SGD(params, lr=0.05, momentum=0.8)
    torch.manual_seed(7)
    with higher.innerloop_ctx(model, opt, copy_initial_weights=False, override={"lr": [rate]}, **setting) as (f, d):
        total = torch.zeros(())
        for step in range(steps):
            rows = torch.arange(step, step + 8) % 20
            d.step((weight[rows, None] * (f(X[rows]) - Y[rows]).square()).mean())
            if step == 4:
                total = total + f(X).square().mean() + torch.stack([p.sum() for p in f.parameters(time=2)]).sum()
        outer = total + (f.eval()(X) - Y).square().mean()
        inputs = [*model.parameters(), rate, weight]
        first = torch.autograd.grad(outer, inputs, retain_graph=True)
        report = d.report
        second = torch.autograd.grad(outer, inputs)
        assert all(map(torch.equal, first, second))
    return list(first), report


def schedule_of(setting: dict[str, int]) -> Schedule:
    graphs = setting["graphs"]
    if "checkpoint_every" in setting:
        return Periodic(setting["checkpoint_every"], graphs)
    if "steps" in setting:
        return Revolve(setting["checkpoints"], setting["steps"], graphs)
    return Bounded(setting["checkpoints"], graphs)


@pytest.mark.parametrize("adam", [False, True], ids=["SGD", "Adam"])
@pytest.mark.parametrize(
    "kept", [{"checkpoint_every": 4}, {"checkpoints": 2}, {"checkpoints": 2, "steps": 13}], ids=str
)
@pytest.mark.parametrize("graphs", [2, 3, 20])
def test_the_gradient_of_the_full_unroll_twice(kept: dict[str, int], graphs: int, adam: bool) -> None:
    steps, setting = 13, {**kept, "graphs": graphs}
    expected, _ = meta_gradients(steps, adam)
    found, _ = meta_gradients(steps, adam, **setting)
    for one, other in zip(found, expected, strict=True):
        assert (one - other).norm() <= 1e-9 * other.norm() + 1e-300


@pytest.mark.parametrize(
    "kept", [{"checkpoint_every": 4}, {"checkpoints": 2}, {"checkpoints": 2, "steps": 30}], ids=str
)
@pytest.mark.parametrize("graphs", [1, 2, 3, 7, 40])
def test_runs_are_those_of_the_simulation(kept: dict[str, int], graphs: int) -> None:
    model, steps = nn.Linear(3, 1), 30
    setting = {**kept, "graphs": graphs}
    opt = torch.optim.SGD(model.parameters(), lr=0.05)
    with higher.innerloop_ctx(model, opt, **setting) as (fnet, diffopt):  # type: ignore[arg-type]
        for _ in range(steps):
            diffopt.step((fnet(X) - Y).square().mean())
        torch.autograd.grad(fnet(X).sum(), list(fnet.parameters(time=0)))
    assert diffopt.report.first_order_runs == first_order_runs(schedule_of(setting), steps)
    assert diffopt.report.second_order_runs == steps
    if graphs == 40 or (graphs == 7 and "checkpoint_every" in kept):
        assert diffopt.report.first_order_runs == steps


def test_memory_is_that_of_so_many_graphs() -> None:
    peaks = {}
    for graphs in (1, 2, 4, 8):
        with live_bytes() as memory:
            meta_gradients(24, False, 400, checkpoint_every=8, graphs=graphs)
        peaks[graphs] = memory.peak
    one_more = peaks[2] - peaks[1]
    assert one_more > 0
    assert peaks[4] - peaks[2] == pytest.approx(2 * one_more, rel=0.3)
    assert peaks[8] - peaks[4] == pytest.approx(4 * one_more, rel=0.3)
    with live_bytes() as memory:
        meta_gradients(24, False, 400)
    assert peaks[8] < 0.75 * memory.peak


def test_what_graphs_does_not_go_with() -> None:
    model = nn.Linear(2, 1)
    opt = torch.optim.SGD(model.parameters(), lr=0.1)
    for keywords in ({}, {"memory_budget": "1GiB"}, {"checkpoint_every": 3, "replay": "torch"}):
        with (
            pytest.raises(ValueError, match=r"checkpoint_every=3, graphs=3\)"),
            higher.innerloop_ctx(model, opt, graphs=3, **keywords),  # type: ignore[arg-type]
        ):
            pass
    for wrong, error in ((0, ValueError), (1.5, TypeError), (None, TypeError), (True, TypeError)):
        with (
            pytest.raises(error, match=r"graphs=.*Use graphs=10, or 1 for the least memory"),
            higher.innerloop_ctx(model, opt, checkpoint_every=3, graphs=wrong),  # type: ignore[arg-type]
        ):
            pass


def most_held(schedule: Schedule, steps: int) -> int:
    held = most = 0
    for action in actions(schedule, steps):
        held += isinstance(action, Keep) - isinstance(action, Drop)
        most = max(most, held)
    return most


@given(st.integers(1, 150), st.integers(1, 9), st.integers(2, 12))
def test_schedules_with_several_graphs(steps: int, checkpoints: int, graphs: int) -> None:
    """At most one carry more than slots, in place of the newest one; for known length never more runs than promised."""
    known, unknown = Revolve(checkpoints, steps, graphs), Bounded(checkpoints, graphs)
    assert steps <= first_order_runs(known, steps) <= optimal_runs(steps, checkpoints, graphs)
    assert first_order_runs(known, steps) <= optimal_runs(steps, checkpoints)
    assert first_order_runs(unknown, steps) >= steps
    assert max(most_held(known, steps), most_held(unknown, steps)) <= checkpoints + 1
    if steps <= (checkpoints + 1) * graphs:
        assert first_order_runs(known, steps) == steps


def test_periodic_replays_what_is_no_graph() -> None:
    for every in range(1, 12):
        for graphs in range(1, 14):
            for steps in range(1, 40):
                rule = Periodic(every, graphs)
                runs = first_order_runs(rule, steps)
                assert runs == steps + rule.runs_back(steps, range(0, steps, every))
                assert graphs < every or runs == steps
