"""`memory_budget`: the same gradient, within so many bytes, and no replay where all graphs fit."""

from __future__ import annotations

import gc
import weakref
from collections.abc import Callable, Iterator
from contextlib import nullcontext
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

import lowmem_higher as higher
from lowmem_higher import budget, budgeted
from lowmem_higher.budget import Allotment, Sizes, allot
from lowmem_higher.schedule import optimal_runs
from lowmem_higher.testing import live_bytes

pytestmark = pytest.mark.usefixtures("float64")

X = torch.sin(torch.arange(60, dtype=torch.float64)).reshape(20, 3)
Y = torch.cos(2 * torch.arange(20, dtype=torch.float64)).reshape(20, 1)
AMPLE = "1TiB"
Force = Callable[[int, int], None]


@pytest.fixture
def force(monkeypatch: pytest.MonkeyPatch) -> Iterator[Force]:
    """So many unrolled steps and slots, whatever fits."""

    def set_to(unrolled: int, checkpoints: int) -> None:
        found = Allotment(unrolled, checkpoints, spare=0)
        monkeypatch.setattr(budgeted, "allot", lambda *args, **keywords: found)

    return set_to


def net(width: int = 4, dropout: float = 0.3) -> nn.Sequential:
    torch.manual_seed(3)
    layers = [nn.Linear(3, width), nn.BatchNorm1d(width), nn.Tanh(), nn.Dropout(dropout), nn.Linear(width, 1)]
    return nn.Sequential(*layers)


def momentum(params: Any) -> torch.optim.Optimizer:
    return torch.optim.SGD(params, lr=0.05, momentum=0.8)


def close(found: list[Tensor], expected: list[Tensor]) -> bool:
    return all((a - b).norm() <= 1e-9 * b.norm() + 1e-300 for a, b in zip(found, expected, strict=True))


def inner_loss(fnet: Any, weight: Tensor, rows: Tensor) -> Tensor:
    loss: Tensor = (weight[rows, None] * (fnet(X[rows]) - Y[rows]).square()).mean()
    return loss


def story(steps: int, make: Callable[..., torch.optim.Optimizer] = momentum, /, **setting: Any) -> list[Tensor]:
    """All that may meet the change from one stretch to the next: a hidden state, terms on the way, set weights, calls
    of submodules, steps by a function, past weights, edited hyperparameters."""
    model = net()
    rate = torch.tensor(0.05, requires_grad=True)
    weight = torch.linspace(0.5, 1.5, 20).requires_grad_()
    torch.manual_seed(7)
    total, hidden = torch.zeros(()), torch.zeros(8, 1)
    context = higher.innerloop_ctx(
        model, make(model.parameters()), copy_initial_weights=False, override={"lr": [rate]}, **setting
    )
    with context as (fnet, diffopt):
        for step in range(steps):
            rows = torch.arange(step, step + 8) % 20
            if step % 4 == 3:
                diffopt.step(inner_loss, weight, rows)
            else:
                out = fnet(X[rows]) + 0.1 * hidden
                hidden = out.tanh()
                diffopt.step((weight[rows, None] * (out - Y[rows]).square()).mean() + fnet[0](X[:2]).square().mean())
            total = total + diffopt.outer((fnet(X[rows]) - Y[rows]).square().mean())
            if step == 6:
                fnet.update_params([0.9 * param for param in fnet.parameters()])
            if step == 7:
                total = total + torch.stack([p.square().sum() for p in fnet.parameters(time=3)]).sum()
                diffopt.param_groups[0]["momentum"] = 0.6
        outer = total + (fnet.eval()(X) - Y).square().mean()
        inputs = [*model.parameters(), rate, weight]
        first = torch.autograd.grad(outer, inputs, retain_graph=True)
        second = torch.autograd.grad(outer, inputs)
        assert all(map(torch.equal, first, second))
        return [*first, outer.detach()]


@pytest.mark.parametrize("make", [momentum, torch.optim.Adam], ids=["SGD", "Adam"])
@pytest.mark.parametrize(("unrolled", "slots"), [(0, 1), (1, 2), (3, 1), (5, 3), (9, 2), (100, 1)])
@pytest.mark.parametrize("told", [False, True])
def test_the_gradient_of_the_full_unroll_through_all_stretches(
    force: Force, unrolled: int, slots: int, told: bool, make: Callable[..., torch.optim.Optimizer]
) -> None:
    force(unrolled, slots)
    expected = story(13, make)
    assert close(story(13, make, memory_budget=AMPLE, **({"steps": 13} if told else {})), expected)


@pytest.mark.parametrize("steps", [1, 2, 3, 4])
@pytest.mark.parametrize("setting", [{}, {"replay": "torch"}, {"verify": "all"}], ids=str)
def test_short_loops_and_other_settings(force: Force, steps: int, setting: dict[str, Any]) -> None:
    force(1, 1)
    assert close(story(steps, memory_budget=AMPLE, **setting), story(steps))


def test_first_order(force: Force) -> None:
    force(2, 1)
    _, expected, _ = run(wide(True), momentum, 8, 8, first_order=True)
    _, found, report = run(wide(True), momentum, 8, 8, first_order=True, memory_budget=AMPLE)
    assert close(found, expected)
    assert report.second_order_runs == 0


def test_known_sizes_are_used_after_the_first_step() -> None:
    model, x = net(dropout=0.0), X
    reports = []
    for width in (20, 20, 10):
        with higher.innerloop_ctx(model, momentum(model.parameters()), memory_budget=AMPLE, steps=9) as (fnet, dopt):
            for _ in range(9):
                dopt.step(fnet(x[:width]).square().mean())
            torch.autograd.grad(fnet(x).sum(), list(fnet.parameters(time=0)))
        reports.append(dopt.report)
    assert [report.unrolled_steps for report in reports] == [7, 8, 7]  # another batch size is measured anew
    assert [report.second_order_runs for report in reports] == [10, 9, 10]
    assert [report.first_order_runs for report in reports] == [2, 1, 2]
    assert "9 steps, 7 of them unrolled" in repr(reports[0])


def run(
    model: nn.Module, make: Any, steps: int, size: int, /, **setting: Any
) -> tuple[int, list[Tensor], higher.Report]:
    torch.manual_seed(0)
    x, y = torch.randn(40, 16), torch.randn(40, 1)
    rate = torch.tensor(0.01, requires_grad=True)
    context = higher.innerloop_ctx(
        model, make(model.parameters()), copy_initial_weights=False, override={"lr": [rate]}, **setting
    )
    with live_bytes() as memory, context as (fnet, diffopt):
        for step in range(steps):
            rows = torch.arange(step, step + size) % 40
            diffopt.step((fnet(x[rows]) - y[rows]).square().mean())
        outer = (fnet(x[:size]) - y[:size]).square().mean()
        grads = torch.autograd.grad(outer, [*model.parameters(), rate])
        del outer
    return memory.peak, list(grads), diffopt.report


def wide(normalized: bool) -> nn.Module:
    torch.manual_seed(1)
    between = [nn.BatchNorm1d(48)] if normalized else []
    return nn.Sequential(nn.Linear(16, 48), *between, nn.Tanh(), nn.Linear(48, 48), nn.Tanh(), nn.Linear(48, 1))


@pytest.mark.parametrize("told", [True, False])
@pytest.mark.parametrize(
    ("make", "normalized"),
    [(momentum, False), (torch.optim.Adam, True), (lambda params: torch.optim.SGD(params, lr=0.01), False)],
    ids=["SGD with momentum", "Adam", "SGD"],
)
def test_live_bytes_stay_within_the_budget(make: Any, normalized: bool, told: bool) -> None:
    steps, size, model = 40, 8, wide(normalized)
    unrolled_peak, expected, _ = run(model, make, steps, size)
    least, _, _ = run(model, make, steps, size, checkpoints=1)
    runs = []
    for share in (0.3, 0.6, 1.3):
        limit = int(share * unrolled_peak)
        assert limit > 2 * least
        peak, found, report = run(model, make, steps, size, memory_budget=limit, **({"steps": steps} if told else {}))
        assert peak <= limit
        assert close(found, expected)
        runs.append(report.first_order_runs)
    assert runs == sorted(runs, reverse=True)
    assert runs[0] > runs[-1]
    if told:
        assert runs[-1] <= 2  # all graphs fit: nothing is replayed
        assert peak > 0.75 * unrolled_peak


def test_with_enough_memory_the_runs_are_those_of_the_full_unroll() -> None:
    model = wide(False)
    for attempt in range(2):
        _, _, report = run(model, momentum, 30, 8, memory_budget=AMPLE)
        assert report.first_order_runs == 2 - attempt
        assert report.second_order_runs == 31 - attempt
        assert report.unrolled_steps == 28 + attempt


def test_a_fraction_is_one_of_the_free_memory(monkeypatch: pytest.MonkeyPatch) -> None:
    model = wide(False)
    unrolled_peak, _, _ = run(model, momentum, 40, 8)
    monkeypatch.setattr(budget, "free_bytes", lambda module: unrolled_peak)
    peak, _, report = run(model, momentum, 40, 8, memory_budget=0.5)
    assert 0.2 * unrolled_peak < peak <= 0.5 * unrolled_peak
    assert 0 < report.unrolled_steps < 30
    monkeypatch.setattr(budget, "free_bytes", lambda module: None)
    with pytest.raises(ValueError, match=r"fraction of the free memory, which is not known.*memory_budget='2GiB'"):
        run(model, momentum, 2, 8, memory_budget=0.5)


@pytest.mark.parametrize("told", [True, False])
def test_batches_from_outside_take_slots_away_and_leave_half(told: bool) -> None:
    steps, model = 120, nn.Linear(100, 4)
    sizes = {}
    for limit in (900_000, 250_000):
        with (
            live_bytes() as memory,
            higher.innerloop_ctx(
                model, momentum(model.parameters()), memory_budget=limit, **({"steps": steps} if told else {})
            ) as (fnet, diffopt),
        ):
            kept = []
            for _ in range(steps):
                with torch._C.DisableTorchFunction():
                    batch = torch.randn(4, 100)
                diffopt.step(fnet(batch).square().mean())
                kept.append(diffopt.report.checkpoints_held)
            torch.autograd.grad(fnet(torch.ones(1, 100)).sum(), list(fnet.parameters(time=0)))
        sizes[limit] = memory.peak, kept
    peak, kept = sizes[900_000]
    assert peak <= 900_000
    if not told:
        assert max(kept) > kept[-1]
    peak, kept = sizes[250_000]
    assert peak > 250_000  # batches alone take 384,000
    assert kept[-1] >= max(kept) // 2 >= 2


class Seeing(TorchFunctionMode):
    def __init__(self) -> None:
        super().__init__()
        self.calls = 0

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.calls += 1
        return func(*args, **(kwargs or {}))


@pytest.mark.parametrize("around", ["each step", "the loop", "nothing"])
def test_modes_of_the_user_around_a_change_of_stretch(force: Force, around: str) -> None:
    """The recorder goes and comes below a mode that was opened after it, and takes its place again."""
    force(3, 2)
    model, seen = net(dropout=0.0), Seeing()

    def gradients(**setting: Any) -> list[Tensor]:
        with higher.innerloop_ctx(
            model, momentum(model.parameters()), copy_initial_weights=False, **setting
        ) as (fnet, diffopt):  # fmt: skip
            with seen if around == "the loop" else nullcontext():
                for _ in range(9):
                    with seen if around == "each step" else nullcontext():
                        diffopt.step((fnet(X) - Y).square().mean())
            return list(torch.autograd.grad(fnet(X).sum(), list(model.parameters())))

    expected = gradients()
    counted, seen.calls = seen.calls, 0
    assert close(gradients(memory_budget=AMPLE), expected)
    assert (counted > 0) == (seen.calls > 0) == (around != "nothing")
    assert torch._C._len_torch_function_stack() == 0


@pytest.mark.parametrize("last", [1, 2, 4, 7])
def test_an_exception_in_any_stretch_leaves_no_mode(force: Force, last: int) -> None:
    force(3, 1)
    model = net()
    before = [param.clone() for param in model.parameters()]
    with (
        pytest.raises(ZeroDivisionError),
        higher.innerloop_ctx(model, momentum(model.parameters()), memory_budget=AMPLE) as (fnet, diffopt),
    ):
        for step in range(9):
            diffopt.step((fnet(X) - Y).square().mean())
            if step == last:
                raise ZeroDivisionError
    assert torch._C._len_torch_function_stack() == 0
    assert all(map(torch.equal, before, model.parameters()))
    assert close(story(8, memory_budget=AMPLE), story(8))


@pytest.mark.parametrize("inner", [{"memory_budget": AMPLE}, {"checkpoint_every": 2}, {}], ids=str)
@pytest.mark.parametrize("outer", [{"memory_budget": AMPLE}, {"checkpoint_every": 2}], ids=str)
def test_loops_in_loops(force: Force, outer: dict[str, Any], inner: dict[str, Any]) -> None:
    force(2, 1)

    def gradients(outer: dict[str, Any], inner: dict[str, Any]) -> list[Tensor]:
        model, other = net(dropout=0.0), net(3, dropout=0.0)
        with higher.innerloop_ctx(model, momentum(model.parameters()), copy_initial_weights=False, **outer) as (f, d):
            for _ in range(7):
                d.step((f(X) - Y).square().mean())
                with higher.innerloop_ctx(
                    other, momentum(other.parameters()), copy_initial_weights=False, **inner
                ) as (g, e):  # fmt: skip
                    for _ in range(6):
                        e.step((g(X) - Y).square().mean())
                    torch.autograd.grad(g(X).sum(), list(other.parameters()))
            return list(torch.autograd.grad(f(X).sum(), list(model.parameters())))

    assert close(gradients(outer, inner), gradients({}, {}))


@pytest.mark.parametrize("steps", [2, 4, 8])
def test_a_loop_that_nobody_needs_is_freed_at_once(force: Force, steps: int) -> None:
    force(3, 1)
    model = net()
    gc.collect()
    gc.disable()
    try:
        with higher.innerloop_ctx(model, momentum(model.parameters()), memory_budget=AMPLE) as (fnet, diffopt):
            for _ in range(steps):
                diffopt.step((fnet(X) - Y).square().mean())
        alive = [weakref.ref(fnet), weakref.ref(diffopt), weakref.ref(diffopt._run)]
        del fnet, diffopt
        assert [reference() for reference in alive] == [None] * 3
    finally:
        gc.enable()


def test_steps_after_the_context_was_left(force: Force) -> None:
    force(3, 1)
    model, rows, weight = net(dropout=0.0), torch.arange(8), torch.ones(20)

    def gradients(**setting: Any) -> list[Tensor]:
        with higher.innerloop_ctx(
            model, momentum(model.parameters()), copy_initial_weights=False, **setting
        ) as (fnet, diffopt):  # fmt: skip
            for _ in range(3):
                diffopt.step(inner_loss, weight, rows)
        for _ in range(5):
            diffopt.step(inner_loss, weight, rows)
        return list(torch.autograd.grad(fnet(X).sum(), list(model.parameters())))

    assert close(gradients(memory_budget=AMPLE), gradients())


def test_a_budget_too_small_says_what_is_needed() -> None:
    model = wide(False)
    run(model, momentum, 3, 8, memory_budget=AMPLE)  # measures
    with pytest.raises(higher.MemoryBudgetError, match=r"takes at least .*KiB.*memory_budget=(\d+)") as raised:
        run(model, momentum, 40, 8, memory_budget="20KiB")
    needed = int(str(raised.value).split("memory_budget=")[-1].split(",")[0])
    peak, _, _ = run(model, momentum, 40, 8, memory_budget=needed)
    assert peak <= needed
    with pytest.raises(higher.MemoryBudgetError):
        run(model, momentum, 40, 8, memory_budget=needed - 1)


@pytest.mark.parametrize(
    ("keywords", "match"),
    [
        ({"checkpoints": 3}, r"memory_budget='1GiB' and checkpoints=3 were both given"),
        ({"checkpoint_every": 3}, r"and checkpoint_every=3 were both given"),
        ({"truncate": 3}, r"give checkpoint_every=10 with truncate"),
        ({"journal": True}, r"give checkpoints=10 with journal"),
        ({"store": "host"}, r"With a store say how many to keep: checkpoints=100"),
        ({"memory_budget": "much"}, r"memory_budget='much' is no amount of memory.*memory_budget=0\.5"),
        ({"memory_budget": 0}, r"is no amount of memory"),
        ({"memory_budget": -0.5}, r"is no amount of memory"),
    ],
)
def test_what_does_not_go_together_is_refused(keywords: dict[str, Any], match: str) -> None:
    model = net()
    with (
        pytest.raises(ValueError, match=match),
        higher.innerloop_ctx(model, momentum(model.parameters()), **{"memory_budget": "1GiB", **keywords}),
    ):
        pass


def test_a_second_optimizer_is_refused() -> None:
    model = net()
    opt = momentum(model.parameters())
    with (
        higher.innerloop_ctx(model, opt, memory_budget=AMPLE) as (fnet, _),
        pytest.raises(ValueError, match="second optimizer joined a context with memory_budget"),
    ):
        higher.get_diff_optim(opt, model.parameters(), fmodel=fnet)


sizes = st.builds(
    Sizes,
    carry=st.integers(1, 1000),
    graph=st.integers(1, 5000),
    pullback=st.integers(0, 9000),
    batch=st.integers(0, 500),
)


@given(st.integers(1, 10**6), sizes, st.one_of(st.none(), st.integers(1, 3000)), st.integers(0, 2))
def test_what_is_allotted_fits(limit: int, found: Sizes, steps: int | None, held: int) -> None:
    if limit < found.least + held * found.carry:
        with pytest.raises(higher.MemoryBudgetError):
            allot(limit, found, steps, held)
        return
    allotment = allot(limit, found, steps, held)
    graphs = allotment.unrolled * (found.graph + found.batch) + (allotment.graphs - 1) * found.graph
    carries = (held + 3 + allotment.checkpoints) * found.carry
    assert graphs + carries + allotment.spare + found.pullback <= limit
    assert allotment.checkpoints >= 1
    if steps is None:
        return
    assert 0 <= allotment.unrolled <= steps
    rest = steps - allotment.unrolled
    room = limit - found.least - held * found.carry
    if room >= steps * (found.graph + found.batch):
        assert rest == 0
    elif found.batch == 0:
        only_carries = optimal_runs(steps, 1 + room // found.carry)
        assert rest == 0 or optimal_runs(rest, allotment.checkpoints, allotment.graphs) <= only_carries


@given(st.integers(0, 10**5), st.integers(1, 300), st.integers(0, 1000), st.integers(1, 1000))
def test_carries_give_way_to_batches_one_by_one(batches: int, checkpoints: int, spare: int, carry: int) -> None:
    allotment = Allotment(0, checkpoints, spare=spare)
    left = allotment.give_way(batches, carry)
    assert checkpoints / 2 <= left <= checkpoints
    if left > (checkpoints + 1) // 2:
        assert (checkpoints - left) * carry + spare >= batches
    if left < checkpoints:
        assert (checkpoints - left - 1) * carry + spare < batches
