"""The laws of memory and of passes (DESIGN.md section 6), in live bytes: exact, and the same in every run.

Data that a test makes before `live_bytes()` do not count, nor do the original model's weights; everything that the
inner loop makes does. The collector is off throughout: what is not freed by reference counting counts as held.
"""

from __future__ import annotations

import gc
import json
import math
import os
import subprocess
import sys
import textwrap
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NamedTuple

import pytest
import torch
from torch import Tensor, nn

import lowmem_higher as higher
from lowmem_higher.testing import live_bytes

pytestmark = pytest.mark.usefixtures("float64", "no_collector")

FEATURES, WIDTH, BATCH = 8, 32, 64
WEIGHTS = FEATURES * WIDTH + WIDTH
CARRY = 2 * 8 * WEIGHTS  # weights and momentum, float64
MARK = 2 * 4 * 8 + 2  # a segment's end: sum and norm of each of a carry's four tensors, a bool of each gradient


@pytest.fixture
def no_collector() -> Iterator[None]:
    """Reference counting alone must free everything: cycles hold tensors until the collector happens to run."""
    gc.collect()
    gc.disable()
    try:
        yield
    finally:
        gc.enable()


class Problem(NamedTuple):
    """A small net with a warm optimizer (so that all carries are alike) and resident data."""

    model: nn.Module
    optimizer: torch.optim.Optimizer
    x: Tensor
    y: Tensor

    def loss(self, fmodel: Callable[[Tensor], Tensor]) -> Tensor:
        return (fmodel(self.x) - self.y).square().mean()


def make_problem() -> Problem:
    model = nn.Sequential(nn.Linear(FEATURES, WIDTH, bias=False), nn.Tanh(), nn.Linear(WIDTH, 1, bias=False))
    optimizer = torch.optim.SGD(model.parameters(), lr=0.01, momentum=0.9)
    problem = Problem(model, optimizer, torch.randn(BATCH, FEATURES), torch.randn(BATCH, 1))
    problem.loss(model).backward()
    optimizer.step()
    optimizer.zero_grad()
    return problem


@contextmanager
def opened(problem: Problem, checkpoint_every: int | None, **settings: Any) -> Iterator[tuple[Any, Any]]:
    with higher.innerloop_ctx(
        problem.model, problem.optimizer, copy_initial_weights=False, checkpoint_every=checkpoint_every, **settings
    ) as pair:
        yield pair


class Measured(NamedTuple):
    peak: int
    held: int  # when the loop has ended, before the backward
    report: higher.Report
    gradients: tuple[Tensor, ...]


def measure(
    steps: int, checkpoint_every: int | None, body: Callable[..., Tensor] | None = None, **settings: Any
) -> Measured:
    """The live bytes of a loop and of its outer backward; `body(fmodel, t)` gives the inner loss of step t."""
    torch.manual_seed(1)
    problem = make_problem()
    with live_bytes() as memory:
        with opened(problem, checkpoint_every, **settings) as (fmodel, diffopt):
            for t in range(steps):
                diffopt.step(problem.loss(fmodel) if body is None else body(fmodel, t))
            outer = problem.loss(fmodel)
        held = memory.current
        externals = diffopt.report.externals_bytes
        gradients = torch.autograd.grad(outer, list(problem.model.parameters()))
        report = diffopt.report
    assert all(gradient.norm() > 0 for gradient in gradients)
    return Measured(memory.peak, held, higher.Report(**{**report.as_dict(), "externals_bytes": externals}), gradients)


def carries_at_most(steps: int, checkpoint_every: int) -> int:
    """`(ceil(T/c) + c) |carry|`, where no segment is longer than the loop."""
    return (math.ceil(steps / checkpoint_every) + min(checkpoint_every, steps)) * CARRY


@pytest.fixture(scope="module")
def one_step() -> int:
    """G: peak live bytes of one step of the full unroll, its outer backward included."""
    torch.set_default_dtype(torch.float64)
    try:
        return measure(1, None).peak
    finally:
        torch.set_default_dtype(torch.float32)


@pytest.fixture(scope="module")
def long_runs() -> dict[tuple[int, int], Measured]:
    """T=100 and T=1000, at N=sqrt(T) and at fixed N: three runs; the long one takes most of this file's time."""
    torch.set_default_dtype(torch.float64)
    try:
        return {(steps, every): measure(steps, every) for steps, every in ((100, 10), (100, 31), (1000, 31))}
    finally:
        torch.set_default_dtype(torch.float32)


# How the peak grows


def test_peak_grows_with_the_root_of_the_steps(long_runs: dict[tuple[int, int], Measured]) -> None:
    own = 8 * WEIGHTS  # the fast weights are a copy of the model's
    short, long = long_runs[100, 10].peak - own, long_runs[1000, 31].peak - own
    assert short < long <= 4 * short


def test_peak_without_carries_is_flat_at_fixed_spacing(long_runs: dict[tuple[int, int], Measured]) -> None:
    short, long = long_runs[100, 31], long_runs[1000, 31]
    rest = [run.peak - run.report.carries_peak_bytes for run in (short, long)]
    assert rest[1] == pytest.approx(rest[0], rel=0.05)


def test_the_loop_itself_holds_the_checkpoints_and_nothing_that_grows(
    long_runs: dict[tuple[int, int], Measured],
) -> None:
    rest = [long_runs[steps, 31].held - math.ceil(steps / 31) * CARRY for steps in (100, 1000)]
    assert rest[1] - rest[0] <= math.ceil(1000 / 31) * MARK + 4 * 64  # four more powers of two are checked


@pytest.mark.parametrize("replay", ["native", "torch"])
@pytest.mark.parametrize(("steps", "every"), [(1, 1), (10, 3), (37, 10), (37, 50), (60, 1)])
def test_peak_obeys_the_law(steps: int, every: int, replay: str, one_step: int) -> None:
    def body(fmodel: Any, t: int) -> Tensor:
        x, y = torch.randn(BATCH, FEATURES), torch.randn(BATCH, 1)
        return (fmodel(x) - y).square().mean()

    run = measure(steps, every, body if replay == "native" else None, replay=replay)
    flat = CARRY + math.ceil(steps / every) * MARK  # a replay makes the next carry while the last one is held
    assert run.peak <= carries_at_most(steps, every) + one_step + run.report.externals_bytes + flat


@pytest.mark.parametrize("steps", [1, 2, 9, 10, 11, 37])
@pytest.mark.parametrize("every", [1, 3, 10, 50])
def test_carries_and_passes_obey_the_law(steps: int, every: int) -> None:
    problem = make_problem()
    with opened(problem, every) as (fmodel, diffopt):
        for t in range(steps):
            diffopt.step(problem.loss(fmodel))
            assert diffopt.report.first_order_runs == t + 1
        problem.loss(fmodel).backward()
    report = diffopt.report
    checkpoints = math.ceil(steps / every)
    assert report.first_order_runs == steps + (steps - checkpoints) <= 2 * steps
    assert report.second_order_runs == steps
    assert report.checkpoints_peak == checkpoints
    assert report.carry_bytes == CARRY
    assert report.carries_peak_bytes <= carries_at_most(steps, every)


class Heads(nn.Module):
    """A trunk and four heads, of which a call uses one."""

    def __init__(self) -> None:
        super().__init__()
        self.trunk = nn.Linear(FEATURES, 5)
        self.heads = nn.ModuleList(nn.Linear(5, 1) for _ in range(4))

    def forward(self, x: Tensor, head: int) -> Tensor:
        return self.heads[head](torch.tanh(self.trunk(x)))


def test_passes_where_a_step_uses_a_part_of_the_model() -> None:
    """A head that waits for its turn must not make the inner gradient run through the steps in between."""
    model, x = Heads(), torch.randn(6, FEATURES)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9)
    with higher.innerloop_ctx(model, optimizer, copy_initial_weights=False, checkpoint_every=5) as (fmodel, diffopt):
        for t in range(16):
            diffopt.step(fmodel(x, t % 4).square().mean())
        assert (diffopt.report.first_order_runs, diffopt.report.second_order_runs) == (16, 0)
        sum(fmodel(x, head).square().mean() for head in range(4)).backward()
    assert (diffopt.report.first_order_runs, diffopt.report.second_order_runs) == (16 + 12, 16)
    assert all(param.grad is not None and param.grad.norm() > 0 for param in model.parameters())


@pytest.mark.parametrize("replay", ["native", "torch"])
def test_carries_peak_counts_what_a_segment_replays(replay: str) -> None:
    """T=20, N=10: two checkpoints, and nine or ten replayed carries of the last segment at once."""
    run = measure(20, 10, replay=replay)
    assert 11 * CARRY <= run.report.carries_peak_bytes <= 12 * CARRY


def test_backwards_that_end_inside_a_segment_leave_no_leftovers() -> None:
    """Gradients for the weights of many times, one after another, take no more than one backward through all."""

    def peak(times: Sequence[int]) -> int:
        problem = make_problem()
        with live_bytes() as memory:
            with opened(problem, 10) as (fmodel, diffopt):
                for _ in range(60):
                    diffopt.step(problem.loss(fmodel))
                outer = problem.loss(fmodel)
            for time in times:
                gradients = torch.autograd.grad(outer, fmodel.gradient_edges(time), retain_graph=True)
                assert all(gradient.norm() > 0 for gradient in gradients)
        return memory.peak

    assert peak((55, 45, 35, 25, 15, 5)) <= peak((0,)) + CARRY


def test_requests_of_past_times_hold_one_segment_at_most() -> None:
    problem = make_problem()
    with live_bytes() as memory, opened(problem, 10) as (fmodel, diffopt):
        for _ in range(50):
            diffopt.step(problem.loss(fmodel))
        before = memory.current
        norms = [float(next(fmodel.parameters(time=time)).detach().norm()) for time in range(50)]
        fmodel.gradient_edges(25)
        assert len(set(norms)) == 50
        assert memory.current - before <= 10 * CARRY
        assert diffopt.report.carries_peak_bytes <= carries_at_most(50, 10)


def test_past_weights_that_are_asked_for_and_dropped_do_not_hold_the_run() -> None:
    problem = make_problem()
    with live_bytes() as memory:
        with opened(problem, 5) as (fmodel, diffopt):
            for _ in range(12):
                diffopt.step(problem.loss(fmodel))
            past = list(fmodel.parameters(time=7))
        del fmodel, diffopt
        assert memory.current > 0
        del past
        assert memory.current == 0


# Batches


def growth(body: Callable[[Any, int], Tensor]) -> float:
    """Bytes that one more step leaves behind in the loop; one segment, and no fingerprints."""
    problem = make_problem()
    with live_bytes() as memory, opened(problem, 1000, verify="off") as (fmodel, diffopt):
        sizes = []
        for t in range(40):
            diffopt.step(body(fmodel, t))
            if t in (19, 39):
                sizes.append(memory.current)
        return (sizes[1] - sizes[0]) / 20


def test_a_batch_cut_by_index_costs_its_index() -> None:
    data, target = torch.randn(500, FEATURES), torch.randn(500, 1)

    def body(fmodel: Any, t: int) -> Tensor:
        index = torch.randint(0, 500, (BATCH,))
        return (fmodel(data[index]) - target[index]).square().mean()

    assert growth(body) == 8 * BATCH


def test_a_batch_cut_by_slice_or_permutation_costs_next_to_nothing() -> None:
    data, target = torch.randn(500, FEATURES), torch.randn(500, 1)
    order = torch.randperm(500)

    def sliced(fmodel: Any, t: int) -> Tensor:
        return (fmodel(data[t : t + BATCH]) - target[t : t + BATCH]).square().mean()

    def permuted(fmodel: Any, t: int) -> Tensor:
        index = order[t : t + BATCH]  # a view: an epoch's permutation is held once
        return (fmodel(data[index]) - target.index_select(0, index)).square().mean()

    assert growth(sliced) == 0
    assert growth(permuted) == 0


def test_a_batch_moved_and_augmented_costs_its_index() -> None:
    """And what is so small that holding it is cheaper than a recipe: here the mean and the deviation, 64 bytes each."""
    data, target = torch.randn(500, FEATURES).float(), torch.randn(500, 1)

    def body(fmodel: Any, t: int) -> Tensor:
        index = torch.randint(0, 500, (BATCH,))
        x = data[index].to(torch.float64).flip(1)
        x = (x - x.mean(0)) / x.std(0) * 1.5 + 0.1
        return (fmodel(x.clamp(-2, 2)) - target[index]).square().mean()

    assert growth(body) == 8 * BATCH + 2 * 64


def test_a_large_random_augmentation_is_drawn_again() -> None:
    data, target = torch.randn(500, FEATURES), torch.randn(500, 1)
    size = 400  # 25,600 bytes, more than the generator's state

    def body(fmodel: Any, t: int) -> Tensor:
        x = data[:size] + 0.1 * torch.randn(size, FEATURES)
        return (fmodel(x) - target[:size]).square().mean()

    assert growth(body) <= 5056


def test_a_batch_from_outside_is_held_once() -> None:
    batches = [torch.randn(BATCH, FEATURES) for _ in range(40)]  # handed in, as a DataLoader does
    target = torch.randn(BATCH, 1)

    def handed_in(fmodel: Any, t: int) -> Tensor:
        x = torch.from_numpy(batches[t].numpy().copy())
        return (fmodel(x) - target).square().mean() + fmodel(x[: BATCH // 2]).square().mean()

    assert growth(handed_in) == 8 * BATCH * FEATURES


def test_a_batch_that_is_a_view_from_outside_is_held_by_reference() -> None:
    """A dataset cut into batches before the loop, or one part of it used at each step: nothing new to hold."""
    data, target = torch.randn(500, FEATURES), torch.randn(500, 1)
    batches, targets = data.split(BATCH), target.split(BATCH)

    def cut_before(fmodel: Any, t: int) -> Tensor:
        return (fmodel(batches[t % 7]) - targets[t % 7]).square().mean()

    def always_the_same(fmodel: Any, t: int) -> Tensor:
        return (fmodel(batches[0]) - targets[0]).square().mean()

    assert growth(cut_before) == 0
    assert growth(always_the_same) == 0


def test_externals_are_counted_once_per_storage() -> None:
    problem = make_problem()
    data, other = torch.randn(500, FEATURES), torch.randn(3, FEATURES)
    with opened(problem, 4) as (fmodel, diffopt):
        for t in range(6):
            diffopt.step(fmodel(data[t : t + 5]).square().mean())
            assert diffopt.report.externals_bytes == data.nbytes
        views = data.view(250, 2 * FEATURES), data[100:200]
        diffopt.step(fmodel(views[0][:, :FEATURES]).mean() + fmodel(views[1]).square().mean() + fmodel(other).mean())
        assert diffopt.report.externals_bytes == data.nbytes + other.nbytes
        fmodel(other).mean().backward()
    assert diffopt.report.externals_bytes == 0


def test_step_of_a_function_that_fetches_its_data_holds_nothing_of_them() -> None:
    problem = make_problem()

    def inner_loss(fmodel: Any, seed: int) -> Tensor:
        generator = torch.Generator().manual_seed(seed)
        x = torch.randn(BATCH, FEATURES, generator=generator)
        return (fmodel(x) - 1.0).square().mean()

    with live_bytes() as memory, opened(problem, 1000, verify="off") as (_, diffopt):
        sizes = []
        for t in range(20):
            diffopt.step(inner_loss, t)
            sizes.append(memory.current)
        assert sizes[1:] == sizes[:1] * 19
        assert diffopt.report.externals_bytes == 0


# In-place writes, evaluations


def in_place_cases() -> dict[str, Callable[[Any, int], Tensor]]:
    data, target = torch.randn(60, FEATURES), torch.randn(60, 1)

    def part(fmodel: Any, i: int) -> Tensor:
        return (fmodel(data[i * 10 : i * 10 + 10]) - target[i * 10 : i * 10 + 10]).square().mean()

    def accumulated(fmodel: Any, t: int) -> Tensor:
        loss: Any = 0.0
        for i in range(3):
            loss += part(fmodel, i)
        return loss

    def filled(fmodel: Any, t: int) -> Tensor:
        out = torch.zeros(3)
        for i in range(3):
            out[i] = part(fmodel, i)
        return out.mean()

    def masked(fmodel: Any, t: int) -> Tensor:
        out = fmodel(data)
        out[target > 0] = 0.0
        return (out - target).square().mean()

    def through_a_view(fmodel: Any, t: int) -> Tensor:
        out = fmodel(data)
        out[:10].mul_(2.0)
        out.view(-1)[3] = 0.5
        return (out - target).square().mean()

    return {case.__name__: case for case in (accumulated, filled, masked, through_a_view)}


@pytest.mark.parametrize("name", ["accumulated", "filled", "masked", "through_a_view"])
def test_in_place_writes_leave_nothing_in_the_next_steps(name: str) -> None:
    assert growth(in_place_cases()[name]) <= 64  # the three zeros that a replay starts from; the mask of 60 bytes


def test_evaluations_between_steps_leave_nothing() -> None:
    """Also with gradients enabled, written in place, and summed up in numbers."""
    problem = make_problem()
    data, target = torch.randn(500, FEATURES), torch.randn(500, 1)
    with live_bytes() as memory, opened(problem, 5) as (fmodel, diffopt):
        diffopt.step(problem.loss(fmodel))
        sizes, total = [], 0.0
        for i in range(200):
            with torch.set_grad_enabled(i % 2 == 0):
                out = fmodel(data[i : i + 50])
                out += 1
                out[0] = 0.0
                total += (out.argmax() + (out - target[i : i + 50]).abs().mean()).item()
            del out
            sizes.append(memory.current)
        assert set(sizes[10:]) == {sizes[10]}
        diffopt.step(problem.loss(fmodel))


def test_results_collected_in_an_evaluation_cost_their_own_bytes() -> None:
    problem = make_problem()
    data = torch.randn(500, FEATURES)
    with live_bytes() as memory, opened(problem, 5) as (fmodel, diffopt):
        diffopt.step(problem.loss(fmodel))
        before = memory.current
        kept = []
        for i in range(50):
            kept.append(fmodel(data[i : i + 50]).detach().flatten())
            kept.append(data[i : i + 50].mean(0))
            with torch.no_grad():
                kept.append(fmodel(data[i : i + 50]).argmax(0))
        assert memory.current - before <= sum(tensor.nbytes for tensor in kept) + 50 * 64
        diffopt.step(problem.loss(fmodel))


# What is freed, and when


@pytest.mark.parametrize("replay", ["native", "torch"])
@pytest.mark.parametrize("verify", ["new", "all"])
def test_R11_everything_is_freed_after_the_backward(replay: str, verify: str) -> None:
    problem = make_problem()
    with live_bytes() as memory:
        with opened(problem, 5, replay=replay, verify=verify) as (fmodel, diffopt):
            for _ in range(23):
                diffopt.step((fmodel(torch.randn(BATCH, FEATURES)) - problem.y).square().mean())
            outer = problem.loss(fmodel)
        assert diffopt.report.checkpoints_held == 5
        assert diffopt.report.externals_bytes > 0
        gradients = torch.autograd.grad(outer, list(problem.model.parameters()))
        assert all(gradient.norm() > 0 for gradient in gradients)
        assert diffopt.report.checkpoints_held == 0
        assert diffopt.report.externals_bytes == 0
        del outer
        own = CARRY + sum(gradient.nbytes for gradient in gradients)
        assert memory.current <= own + 8 * WEIGHTS  # current weights and state; the initial weights are fmodel's too
        del fmodel, diffopt, gradients
        assert memory.current == 0


def test_R11_retain_graph_keeps_it_and_a_second_backward_is_as_exact() -> None:
    problem = make_problem()
    params = list(problem.model.parameters())
    with live_bytes() as memory:
        with opened(problem, 5) as (fmodel, diffopt):
            for _ in range(23):
                diffopt.step(problem.loss(fmodel))
            outer = problem.loss(fmodel)
        held = memory.current
        first = torch.autograd.grad(outer, params, retain_graph=True)
        assert diffopt.report.checkpoints_held == 5
        assert memory.current <= held + sum(gradient.nbytes for gradient in first) + 256  # one mark of the last carry
        second = torch.autograd.grad(outer, params, retain_graph=True)
        third = torch.autograd.grad(outer, params)
        assert diffopt.report.checkpoints_held == 0
        assert diffopt.report.second_order_runs == 3 * 23
    for one, two, three in zip(first, second, third, strict=True):
        assert torch.equal(one, two)
        assert torch.equal(one, three)


@pytest.mark.parametrize("every", [1, 5, 100])
def test_dropping_the_outer_loss_without_backward_frees_everything(every: int) -> None:
    problem = make_problem()
    with live_bytes() as memory:
        with opened(problem, every) as (fmodel, diffopt):
            for _ in range(12):
                diffopt.step((fmodel(torch.randn(BATCH, FEATURES)) - problem.y).square().mean())
            outer = problem.loss(fmodel)
        report = diffopt.report
        del fmodel, diffopt
        assert memory.current > math.ceil(12 / every) * CARRY  # the outer loss holds the run
        del outer
        assert memory.current == 0
    assert report.steps == 12


def test_an_exception_in_the_loop_frees_everything() -> None:
    problem = make_problem()
    with live_bytes() as memory:
        try:
            with opened(problem, 5) as (fmodel, diffopt):
                for t in range(12):
                    loss = (fmodel(torch.randn(BATCH, FEATURES)) - problem.y).square().mean()
                    if t == 11:
                        raise KeyboardInterrupt
                    diffopt.step(loss)
        except KeyboardInterrupt:
            del fmodel, diffopt, loss
        assert memory.current == 0


def test_an_exception_in_the_backward_frees_everything() -> None:
    problem = make_problem()
    x = torch.randn(BATCH, FEATURES)
    with live_bytes() as memory:
        with opened(problem, 5) as (fmodel, diffopt):
            for t in range(12):
                diffopt.step((fmodel(x if t == 3 else x + t) - problem.y).square().mean())
            outer = problem.loss(fmodel)
        x.add_(1.0)
        with pytest.raises(higher.ExternalModifiedError):
            torch.autograd.grad(outer, list(problem.model.parameters()))
        del fmodel, diffopt, outer
        assert memory.current == 0


@pytest.mark.parametrize("replay", ["native", "torch"])
def test_the_backward_frees_step_by_step(replay: str) -> None:
    """Each step has a meta-parameter of its own, whose gradient comes when the step was pulled back."""
    problem = make_problem()
    scales = [torch.ones((), requires_grad=True) for _ in range(24)]
    sizes: dict[int, int] = {}
    with live_bytes() as memory:
        for t, scale in enumerate(scales):
            scale.register_hook(lambda _, t=t: sizes.__setitem__(t, memory.current))
        with opened(problem, 12, replay=replay) as (fmodel, diffopt):
            for scale in scales:
                diffopt.step(problem.loss(fmodel) * scale)
            outer = problem.loss(fmodel)
        outer.backward()
    assert list(sizes) == list(reversed(range(24)))
    for start in (0, 12):  # within a segment each step gives one replayed carry back
        assert sizes[start + 10] - sizes[start] >= 9 * CARRY
        assert all(sizes[t] < sizes[t + 1] for t in range(start, start + 10))
    assert sizes[0] < sizes[12] < sizes[22]


def test_truncated_history_is_freed_while_the_loop_goes_on() -> None:
    """Detaching the weights cuts the graph: what came before dies with nobody asking."""
    problem = make_problem()
    with live_bytes() as memory, opened(problem, 5) as (fmodel, diffopt):
        sizes = []
        for t in range(60):
            diffopt.step(problem.loss(fmodel))
            if t % 10 == 9:
                fmodel.update_params([p.detach().requires_grad_() for p in fmodel.parameters()])
                for entry in diffopt.state[0].values():
                    entry["momentum_buffer"] = entry["momentum_buffer"].detach()
                sizes.append(diffopt.report.checkpoints_held)
        assert memory.current <= 7 * 8 * WEIGHTS + 4 * CARRY  # fmodel's history has each of the six lists
        assert max(sizes) <= 2


def test_repeated_contexts_leave_nothing() -> None:
    problem = make_problem()
    params = list(problem.model.parameters())

    def use(i: int) -> None:
        with opened(problem, 2) as (fmodel, diffopt):
            for t in range(3):
                out = fmodel(torch.randn(4, FEATURES))
                out[0] = 0.0
                if t == 1:
                    diffopt.step(lambda fmodel, x: fmodel(x).square().mean(), problem.x)
                else:
                    diffopt.step((out - 1.0).square().mean(), grad_callback=lambda grads: [2 * g for g in grads])
            outer = problem.loss(fmodel)
            if i % 3 == 0:
                list(fmodel.parameters(time=1))
        if i % 2 == 0:
            torch.autograd.grad(outer, params, retain_graph=i % 4 == 0)

    with live_bytes() as memory:
        for i in range(12):
            use(i)
        assert memory.current == 0
        gc.collect()
        objects = len(gc.get_objects())
        for i in range(48):
            use(i)
        assert memory.current == 0
    grown = len(gc.get_objects()) - objects
    assert gc.collect() == 0  # no cycles, not even small ones
    assert grown <= 48


def test_contexts_side_by_side_leave_nothing() -> None:
    """While another context stays open the recorder stays on; the maps of the closed ones must go with them."""
    problem = make_problem()
    with live_bytes() as memory, opened(problem, 3) as (outer_model, outer_opt):
        outer_opt.step(problem.loss(outer_model))
        sizes = []
        for _ in range(20):
            with opened(problem, 2) as (fmodel, diffopt):
                for _ in range(3):
                    out = fmodel(problem.x)
                    out[0] = 0.0
                    diffopt.step((out - problem.y).square().mean())
                torch.autograd.grad(problem.loss(fmodel), list(problem.model.parameters()))
            del fmodel, diffopt, out
            sizes.append(memory.current)
        assert set(sizes[1:]) == {sizes[1]}
        outer_opt.step(problem.loss(outer_model))


def test_what_the_full_unroll_holds_is_freed_too() -> None:
    problem = make_problem()
    with live_bytes() as memory:
        with opened(problem, None) as (fmodel, diffopt):
            for _ in range(5):
                diffopt.step(problem.loss(fmodel))
            outer = problem.loss(fmodel)
        torch.autograd.grad(outer, list(problem.model.parameters()))
        del fmodel, diffopt, outer
        assert memory.current == 0


def test_no_tracking_holds_one_carry() -> None:
    problem = make_problem()
    sizes = []
    with live_bytes() as memory, opened(problem, 5, track_higher_grads=False) as (fmodel, diffopt):
        for _ in range(20):
            diffopt.step(problem.loss(fmodel))
            sizes.append(memory.current)
    assert set(sizes[1:]) == {sizes[1]}
    assert sizes[1] <= 2 * CARRY
    assert diffopt.report.checkpoints_peak == 0


# The residue of a step, and the depth of the graph: in fresh processes, one figure each


def in_fresh_process(code: str, *arguments: object) -> dict[str, Any]:
    """Run code in a new process, in a thread with a stack of 128 KiB; the dictionary `found` that it leaves.

    Whatever recurses once a step (or once an operation) when a graph is differentiated or freed takes 170 bytes or
    more a level: it would overflow so small a stack here, and the usual 8 MiB a little later on a user's machine.
    """
    program = f"""
import gc, json, sys, threading, tracemalloc
import psutil, torch
from torch import nn
import lowmem_higher as higher
torch.set_num_threads(1)
arguments, found = {arguments!r}, {{}}
def main():
{textwrap.indent(textwrap.dedent(code), "    ")}
threading.stack_size(128 * 1024)
thread = threading.Thread(target=main)
thread.start()
thread.join()
print(json.dumps(found))
"""
    root = Path(higher.__file__).parent.parent
    done = subprocess.run(
        [sys.executable, "-c", program], capture_output=True, text=True, cwd=root, timeout=900, check=False
    )
    assert done.returncode == 0, f"exit code {done.returncode} (-11: stack overflow)\n{done.stdout}\n{done.stderr}"
    found: dict[str, Any] = json.loads(done.stdout.splitlines()[-1])
    assert found, done.stderr
    return found


RESIDUE = """
how, steps, every = arguments
model = nn.Linear(1, 1)
x, y = torch.randn(4, 1), torch.randn(4, 1)
lr = torch.tensor(1e-5, requires_grad=True)
optimizer = torch.optim.SGD(model.parameters(), lr=1e-5, momentum=0.5)

def loop(steps):
    with higher.innerloop_ctx(
        model, optimizer, copy_initial_weights=False, override={"lr": [lr]}, checkpoint_every=every
    ) as (fmodel, diffopt):
        for _ in range(steps):
            diffopt.step(nn.functional.mse_loss(fmodel(x), y))
        return nn.functional.mse_loss(fmodel(x), y), diffopt

for _ in range(6):
    loop(50)[0].backward()  # what is made once, a trace too
gc.collect()
rss = psutil.Process().memory_info().rss
if how == "python":
    tracemalloc.start()
outer, diffopt = loop(steps)
if how == "python":
    found["after_loop"] = tracemalloc.get_traced_memory()[0] / steps
else:
    found["after_loop"] = (psutil.Process().memory_info().rss - rss) / steps
lr.grad = None
peak, done = [0], threading.Event()

def watch():
    while not done.wait(0.01):
        peak[0] = max(peak[0], psutil.Process().memory_info().rss)

watcher = threading.Thread(target=watch)
watcher.start()
outer.backward(retain_graph=how == "process")
done.set()
watcher.join()
if how == "python":
    found["peak"] = tracemalloc.get_traced_memory()[1] / steps
else:
    found["peak"] = (peak[0] - rss) / steps
found["gradient"] = lr.grad.item()
found["runs"] = diffopt.report.second_order_runs
del outer, diffopt
gc.collect()  # clears the free lists of tuples and lists
if how == "python":
    found["left"] = tracemalloc.get_traced_memory()[0]
"""


@pytest.mark.slow
@pytest.mark.parametrize("how", ["python", "process"])
def test_residue_per_step(how: str) -> None:
    """At most 6 KB a step, of Python objects and of the process, and no recursion in backward or in dropping the graph.

    The issue's figure is for 20,000 steps: LOWMEM_HIGHER_RESIDUE_STEPS=20000 runs just that (minutes). The residue is
    the same at any number of steps, so few are run by default; `benchmarks/residue.py` always runs 20,000.
    """
    steps = int(os.environ.get("LOWMEM_HIGHER_RESIDUE_STEPS", "500" if how == "python" else "1500"))
    found = in_fresh_process(RESIDUE, how, steps, 141)
    assert found["runs"] == steps
    assert found["gradient"] != 0
    assert 1_000 < found["after_loop"] <= 6_000
    assert found["peak"] <= 6_000
    assert found.get("left", 0) <= 400_000  # caches, once; at any number of steps


def test_long_chains_of_operations_are_freed_without_recursion() -> None:
    """An outer loss summed up over the loop, a hidden state: their graphs run through every step."""
    code = """
    model = nn.Linear(1, 1)
    optimizer = torch.optim.SGD(model.parameters(), lr=1e-3)
    x = torch.ones(1, 1)
    for backward in (False, True):
        with higher.innerloop_ctx(model, optimizer, checkpoint_every=10) as (fmodel, diffopt):
            total = hidden = fmodel(x).sum()
            for _ in range(60):
                for _ in range(50):
                    total = total + 1.0
                hidden = torch.tanh(fmodel(x).sum() * 0.5 + hidden)
                diffopt.step(hidden.square())
            outer = total + hidden
            if backward:
                outer.backward()
        del total, hidden, outer, fmodel, diffopt
        found[str(backward)] = True
    """
    assert in_fresh_process(code) == {"False": True, "True": True}
