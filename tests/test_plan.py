"""What `plan` says before a run against what the run takes: live bytes and counted passes; and nothing else changes."""

from __future__ import annotations

import copy
import json
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import lowmem_higher as higher
from lowmem_higher import Plan
from lowmem_higher.budget import parse_budget
from lowmem_higher.plan import PlannedSetting, carries_in_backward
from lowmem_higher.schedule import Drop, Keep, Periodic, PullBack, Revolve, Schedule, actions, first_order_runs
from lowmem_higher.testing import live_bytes

PLANNING = sys.modules["lowmem_higher.plan"]  # the name in the package is that of the function


class Problem(NamedTuple):
    model: nn.Module
    optimizer: torch.optim.Optimizer
    loss: Callable[..., Tensor]
    fresh: Callable[[], tuple[Tensor, ...]]  # the batch of one step


def squared(fmodel: Any, x: Tensor, y: Tensor) -> Tensor:
    return (fmodel(x) - y).square().mean()


def mlp_with_momentum() -> Problem:
    """Batches handed in, as by a loader; a fifth of what the full unroll holds of a step."""
    model = nn.Sequential(nn.Linear(24, 32), nn.Tanh(), nn.Linear(32, 1))
    optimizer = torch.optim.SGD(model.parameters(), lr=0.01, momentum=0.9)
    return Problem(model, optimizer, squared, lambda: (torch.randn(64, 24), torch.randn(64, 1)))


def mlp_with_adam() -> Problem:
    """Carries are large here, a fifth of a step's graph; the batch is cut from data in memory."""
    model = nn.Sequential(nn.Linear(16, 64), nn.Tanh(), nn.Linear(64, 64), nn.Tanh(), nn.Linear(64, 1))
    x, y = torch.randn(500, 16), torch.randn(500, 1)
    optimizer = torch.optim.Adam(model.parameters(), lr=0.01)
    return Problem(model, optimizer, lambda f, i: squared(f, x[i], y[i]), lambda: (torch.randint(0, 500, (16,)),))


class ConvNet(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.conv, self.norm, self.head = nn.Conv2d(1, 4, 3, padding=1), nn.BatchNorm2d(4), nn.Linear(4 * 36, 3)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(torch.tanh(self.norm(self.conv(x))).flatten(1))


def conv_with_batch_norm() -> Problem:
    model = ConvNet()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.01, momentum=0.9)
    return Problem(
        model,
        optimizer,
        lambda f, x, y: F.cross_entropy(f(x), y),
        lambda: (torch.randn(8, 1, 6, 6), torch.randint(0, 3, (8,))),
    )


def frozen_with_dropout() -> Problem:
    """All carries share the frozen weights, and each step keeps its noise, which is smaller than a random state."""
    model = nn.Sequential(nn.Linear(32, 256), nn.Tanh(), nn.Dropout(0.5), nn.Linear(256, 8), nn.Linear(8, 1))
    model[0].requires_grad_(False)
    optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=0.01)
    x, y = torch.randn(32, 32), torch.randn(32, 1)
    return Problem(model, optimizer, lambda f: squared(f, x + 0.1 * torch.randn(32, 32), y), lambda: ())


def keywords(row: PlannedSetting, steps: int) -> dict[str, int]:
    if row.checkpoint_every is not None:
        return {"checkpoint_every": row.checkpoint_every}
    return {} if row.checkpoints is None else {"checkpoints": row.checkpoints, "steps": steps}


def run(
    problem: Problem, count: int, outer: Callable[[Any], Tensor] | None = None, /, **settings: Any
) -> tuple[int, higher.Report]:
    context = higher.innerloop_ctx(problem.model, problem.optimizer, **settings)
    with live_bytes() as memory, context as (fmodel, diffopt):
        for _ in range(count):
            with torch._C.DisableTorchFunction():  # as from outside of the loop
                batch = problem.fresh()
            diffopt.step(problem.loss(fmodel, *batch))
        first = [weight for weight in fmodel.parameters(time=0) if weight.requires_grad]
        grads = torch.autograd.grad(outer(fmodel) if outer else problem.loss(fmodel, *batch), first)
    assert all(grad.norm() > 0 for grad in grads)
    return memory.peak, diffopt.report


@pytest.mark.parametrize("make", [mlp_with_momentum, mlp_with_adam, conv_with_batch_norm, frozen_with_dropout])
def test_peak_is_predicted_to_a_tenth_and_passes_exactly(make: Callable[[], Problem]) -> None:
    problem, steps = make(), 33
    found = higher.plan(
        problem.model, problem.optimizer, steps=steps, batch=problem.fresh(), loss=problem.loss, memory_budget="1GiB"
    )
    labels = [row.label for row in found.settings]
    assert labels == [
        "full unroll",
        *(f"checkpoint_every={every}" for every in (1, 6, 10)),
        *(f"checkpoints={slots}" for slots in (3, 10, 30)),
    ]
    for row in found.settings:
        peak, report = run(problem, steps, **keywords(row, steps))
        assert row.peak_bytes == pytest.approx(peak, rel=0.1), row.label
        assert row.first_order_runs == report.first_order_runs, row.label
        assert row.second_order_runs == report.second_order_runs == steps, row.label
        if row.label != "full unroll":
            assert found.carry_bytes == report.carry_bytes


@pytest.mark.parametrize(
    ("make", "share"),
    [(mlp_with_adam, 0.3), (mlp_with_adam, 0.95), (conv_with_batch_norm, 0.5), (frozen_with_dropout, 0.7)],
)
def test_what_a_budget_will_do_is_predicted_too(make: Callable[[], Problem], share: float) -> None:
    problem, steps = make(), 33

    def planned(budget: int) -> PlannedSetting:
        arguments: dict[str, Any] = {"steps": steps, "batch": problem.fresh(), "loss": problem.loss}
        found = higher.plan(problem.model, problem.optimizer, **arguments, memory_budget=budget)
        return found.settings[-1] if budget < found.settings[0].peak_bytes else found.settings[0]

    whole = planned(1 << 40).peak_bytes
    row = planned(int(share * whole))
    assert row.memory_budget == int(share * whole)
    assert row.code == f"innerloop_ctx(model, opt, memory_budget={row.memory_budget}, steps=33)"
    peak, report = run(problem, steps, memory_budget=row.memory_budget, steps=steps)
    assert peak <= row.memory_budget
    assert row.peak_bytes == pytest.approx(peak, rel=0.1)
    assert row.first_order_runs == report.first_order_runs
    assert row.second_order_runs == report.second_order_runs == steps


@pytest.mark.parametrize("steps", [4, 7])
def test_peak_of_short_loops(steps: int) -> None:
    problem = mlp_with_adam()
    found = higher.plan(problem.model, problem.optimizer, steps=steps, batch=problem.fresh(), loss=problem.loss)
    for row in found.settings:
        assert row.peak_bytes == pytest.approx(run(problem, steps, **keywords(row, steps))[0], rel=0.1), row.label


class Averaging(nn.Module):
    """Its buffer, which outweighs all else, changes at each call, and no cotangent has its size."""

    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Linear(4, 1)
        self.register_buffer("average", torch.zeros(40_000))

    def forward(self, x: Tensor) -> Tensor:
        self.average.mul_(0.9).add_(x.mean())
        return self.layer(x)


def test_peak_where_the_newest_pullback_begins_with_one_more_carry_than_any_later_one() -> None:
    model, x = Averaging(), torch.ones(2, 4)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.01)
    problem = Problem(model, optimizer, lambda f: f(x).square().mean(), lambda: ())
    found = higher.plan(model, optimizer, steps=3, batch=(), loss=problem.loss)
    every_one = found.settings[1]
    assert every_one.label == "checkpoint_every=1"
    assert every_one.peak_bytes == pytest.approx(run(problem, 3, checkpoint_every=1)[0], rel=0.1)


def test_an_outer_loss_on_more_data_counts() -> None:
    problem, x = mlp_with_momentum(), torch.randn(2000, 24)

    def outer(fmodel: Any) -> Tensor:
        return fmodel(x).square().mean()

    arguments: dict[str, Any] = {"steps": 20, "batch": problem.fresh(), "loss": problem.loss}
    small = higher.plan(problem.model, problem.optimizer, **arguments)
    large = higher.plan(problem.model, problem.optimizer, **arguments, outer=outer)
    row = small.settings[2]
    assert row.label == "checkpoint_every=5"
    assert large.settings[2].peak_bytes > row.peak_bytes + 4 * 2000 * 32
    peak, _ = run(problem, 20, outer, checkpoint_every=5)
    assert large.settings[2].peak_bytes == pytest.approx(peak, rel=0.1)


def held_in_backward(schedule: Schedule, steps: int) -> tuple[int, int]:
    held: set[int] = set()
    counts = []
    for action in actions(schedule, steps):
        if isinstance(action, Keep):
            held.add(action.time)
        elif isinstance(action, Drop):
            held.remove(action.time)
        elif isinstance(action, PullBack):
            counts.append(len(held | {action.step}))
    return counts[0], max(counts[1:], default=0)


def test_carries_in_the_backward_are_those_of_the_schedule() -> None:
    for steps in range(1, 61):
        for number in (1, 2, 3, 5, 10, 29):
            assert carries_in_backward(steps, every=number) == held_in_backward(Periodic(number), steps)
            first, later = held_in_backward(Revolve(number, steps), steps)
            assert carries_in_backward(steps, checkpoints=number) == (first, later), (steps, number)


@pytest.mark.parametrize("steps", [1, 2, 10, 11, 100, 1000])
def test_passes_are_those_of_the_schedule(steps: int) -> None:
    model = nn.Linear(2, 1)
    found = higher.plan(
        model, torch.optim.SGD(model.parameters(), lr=0.1), steps=steps, batch=torch.ones(3, 2), loss=mean_square
    )
    for row in found.settings[1:]:
        schedule = Periodic(row.checkpoint_every) if row.checkpoint_every else Revolve(row.checkpoints or 0, steps)
        assert row.first_order_runs == first_order_runs(schedule, steps), row.label
    assert len({row.label for row in found.settings}) == len(found.settings)


def mean_square(fmodel: Any, x: Tensor) -> Tensor:
    return fmodel(x).square().mean()


class Clocked(nn.Module):
    """Its clock goes by one second at each forward."""

    def __init__(self) -> None:
        super().__init__()
        self.layer, self.clock = nn.Linear(3, 1), [0.0]

    def forward(self, x: Tensor) -> Tensor:
        self.clock[0] += 1.0
        return self.layer(x)


def test_seconds_of_each_kind_of_run(monkeypatch: pytest.MonkeyPatch) -> None:
    model = Clocked()
    monkeypatch.setattr(PLANNING.time, "perf_counter", lambda: model.clock[0])
    found = higher.plan(
        model,
        torch.optim.SGD(model.parameters(), lr=0.1),
        steps=100,
        batch=torch.ones(2, 3),
        loss=lambda f, x: (f(x) + f(2 * x)).square().mean(),
    )
    assert (found.first_order_seconds, found.replay_seconds) == (2, 2)
    assert (found.second_order_seconds, found.unrolled_seconds) == (2, 2)
    assert {row.label: row.seconds for row in found.settings} == {
        "full unroll": 200,
        "checkpoint_every=1": 400,
        "checkpoint_every=10": 2 * (190 + 100),
        "checkpoints=3": 2 * (first_order_runs(Revolve(3, 100), 100) + 100),
        "checkpoints=10": 2 * (223 + 100),
        "checkpoints=30": 2 * (first_order_runs(Revolve(30, 100), 100) + 100),
    }


@pytest.mark.parametrize("fails_at", [None, 2, 5])
def test_nothing_of_the_users_changes(fails_at: int | None) -> None:
    problem = conv_with_batch_norm()
    problem.model.conv.eval()
    weight, log_rate = torch.ones((), requires_grad=True), torch.zeros((), requires_grad=True)
    rate, calls = log_rate.exp(), []

    def loss(fmodel: Any, x: Tensor, y: Tensor) -> Tensor:
        calls.append(torch.rand(()))
        if len(calls) == fails_at:
            raise RuntimeError("mine")
        return weight * problem.loss(fmodel, x, y)

    batch = problem.fresh()
    problem.loss(problem.model, *batch).backward()
    problem.optimizer.step()
    model, state = copy.deepcopy(problem.model.state_dict()), copy.deepcopy(problem.optimizer.state_dict())
    grads = [param.grad.clone() for param in problem.model.parameters()]
    attributes = {name: set(vars(module)) for name, module in problem.model.named_modules()}
    random = torch.get_rng_state()

    def make() -> None:
        higher.plan(problem.model, problem.optimizer, steps=50, batch=batch, loss=loss, override={"lr": [0.01 * rate]})

    if fails_at is None:
        with torch.no_grad():
            make()
    else:
        with pytest.raises(RuntimeError, match="mine"):
            make()
    assert torch.equal(torch.get_rng_state(), random)
    assert all(torch.equal(new, model[key]) for key, new in problem.model.state_dict().items())
    now = problem.optimizer.state_dict()
    assert now["param_groups"] == state["param_groups"]
    for key, entry in state["state"].items():
        assert torch.equal(now["state"][key]["momentum_buffer"], entry["momentum_buffer"])
    assert all(torch.equal(p.grad, grad) for p, grad in zip(problem.model.parameters(), grads, strict=True))
    assert {name: set(vars(module)) for name, module in problem.model.named_modules()} == attributes
    assert problem.model.training
    assert not problem.model.conv.training
    assert weight.grad is None
    assert log_rate.grad is None
    rate.backward()  # its graph is still there


class Heads(nn.Module):
    """A trunk and two heads, of which a step uses one."""

    def __init__(self) -> None:
        super().__init__()
        self.heads, self.trunk = nn.ModuleList(nn.Linear(5, 1) for _ in range(2)), nn.Linear(3, 5)
        self.calls = [0]

    def forward(self, x: Tensor, head: int) -> Tensor:
        return self.heads[head](torch.tanh(self.trunk(x)))


def test_a_model_of_which_steps_use_parts_by_turns() -> None:
    model, calls = Heads(), [0]

    def loss(fmodel: Any, x: Tensor) -> Tensor:
        calls[0] += 1
        return fmodel(x, calls[0] % 2).square().mean()

    found = higher.plan(
        model,
        torch.optim.SGD(model.parameters(), lr=0.1),
        steps=9,
        batch={"x": torch.ones(4, 3)},
        loss=lambda f, b: loss(f, **b),
    )
    assert found.batch_bytes == 48
    assert all(row.peak_bytes > 0 for row in found.settings)


def test_steps_that_no_gradient_links() -> None:
    """A step of one head passes nothing on to a step of another; and the outer loss may use neither's last weights."""
    model = nn.ModuleList(nn.Linear(3, 1) for _ in range(30))
    calls, x = [0], torch.ones(4, 3)

    def loss(fmodel: Any) -> Tensor:
        calls[0] += 1
        return fmodel[calls[0] % 30](x).square().mean()

    found = higher.plan(
        model,
        torch.optim.SGD(model.parameters(), lr=0.1),
        steps=9,
        batch=(),
        loss=loss,
        outer=lambda f: sum(p.square().sum() for p in f[29].parameters()),
    )
    assert all(row.peak_bytes > 0 and row.seconds > 0 for row in found.settings)


def made_up(budget: int | None) -> Plan:
    rows = (
        PlannedSetting(None, None, 9_000_000, 0, 1000, 2.0, "innerloop_ctx(model, opt)"),
        PlannedSetting(10, None, 2_000_000, 1900, 1000, 4.0, "innerloop_ctx(model, opt, checkpoint_every=10)"),
        PlannedSetting(None, 10, 500_000, 3637, 1000, 6.5, "innerloop_ctx(model, opt, checkpoints=10, steps=1000)"),
    )
    return Plan(1000, 4096, 300_000, 512, 0.001, 0.001, 0.002, 0.0021, budget, rows)


@pytest.mark.parametrize(
    ("budget", "code"),
    [
        (None, "innerloop_ctx(model, opt)"),
        (9_000_000, "innerloop_ctx(model, opt)"),
        (8_999_999, "innerloop_ctx(model, opt, checkpoint_every=10)"),
        (600_000, "innerloop_ctx(model, opt, checkpoints=10, steps=1000)"),
        (499_999, None),
    ],
)
def test_the_fastest_that_fits_is_recommended(budget: int | None, code: str | None) -> None:
    assert made_up(budget).recommended == code


def test_the_recommendation_runs() -> None:
    problem = mlp_with_momentum()
    batch = problem.fresh()
    found = higher.plan(
        problem.model, problem.optimizer, steps=40, batch=batch, loss=problem.loss, memory_budget=600_000
    )
    names = {"innerloop_ctx": higher.innerloop_ctx, "model": problem.model, "opt": problem.optimizer}
    with live_bytes() as memory, eval(found.recommended or "", names) as (fmodel, diffopt):
        for _ in range(40):
            diffopt.step(problem.loss(fmodel, *batch))
        torch.autograd.grad(problem.loss(fmodel, *batch), list(fmodel.parameters(time=0)))
    assert found.best is not None
    assert found.settings[0].peak_bytes > 600_000 > memory.peak
    assert diffopt.report.first_order_runs == found.best.first_order_runs > 0


def test_repr_is_a_table() -> None:
    assert repr(made_up(2_500_000)) == (
        "Plan: 1,000 steps; carry 4.0 KiB, one step's graph 293.0 KiB, batch 512 B\n"
        "  milliseconds of a step: 1 first-order, 1 replayed, 2 second-order, 2.1 unrolled\n"
        "  setting                    peak  first-order  second-order    seconds\n"
        "  full unroll             8.6 MiB            0         1,000          2\n"
        "> checkpoint_every=10     1.9 MiB        1,900         1,000          4\n"
        "  checkpoints=10        488.3 KiB        3,637         1,000        6.5\n"
        "  budget 2.4 MiB; recommended: innerloop_ctx(model, opt, checkpoint_every=10)"
    )
    assert "nothing fits, the least is 488.3 KiB with checkpoints=10" in repr(made_up(1000))


def test_as_dict_goes_through_json() -> None:
    found = json.loads(json.dumps(made_up(2_500_000).as_dict()))
    assert found["recommended"] == "innerloop_ctx(model, opt, checkpoint_every=10)"
    rows = tuple(PlannedSetting(**row) for row in found.pop("settings"))
    del found["recommended"]
    assert Plan(**found, settings=rows) == made_up(2_500_000)


@pytest.mark.parametrize("budget", [None, 499_999, 600_000])
def test_plot_saves_a_picture(tmp_path: Path, budget: int | None) -> None:
    made_up(budget).plot(tmp_path / "plan.png")
    made_up(budget).plot(str(tmp_path / "plan.svg"))
    assert (tmp_path / "plan.png").read_bytes().startswith(b"\x89PNG")
    assert "<svg" in (tmp_path / "plan.svg").read_text()


def test_plot_without_matplotlib_says_what_to_install(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "matplotlib.figure", None)
    with pytest.raises(ImportError, match=r'pip install "lowmem_higher\[plot\]"'):
        made_up(None).plot(tmp_path / "plan.png")


@pytest.mark.parametrize(
    ("text", "size"),
    [
        ("2GiB", 2 * 1024**3),
        ("1.5 gb", 1_500_000_000),
        ("3MiB", 3 * 1024**2),
        (7, 7),
        ("7", 7),
        ("8B", 8),
        (1e6, 10**6),
    ],
)
def test_amounts_of_memory(text: Any, size: int) -> None:
    assert parse_budget(text) == size


@pytest.mark.parametrize("text", ["", "GiB", "2 GiBs", "-1GiB", 0, "two", "1.2.3MB", True])
def test_what_is_no_amount_of_memory_is_refused_before_anything_runs(text: Any) -> None:
    model = nn.Linear(2, 1)
    with pytest.raises(ValueError, match=r"memory_budget=.* is no amount of memory; give bytes.*2GiB"):
        higher.plan(
            model, torch.optim.SGD(model.parameters(), lr=0.1), steps=3, batch=(), loss=lambda f: 0, memory_budget=text
        )


@pytest.mark.parametrize(
    ("steps", "error", "match"),
    [(0, ValueError, "at least 1"), (2.0, TypeError, "whole number"), (True, TypeError, "whole number")],
)
def test_numbers_of_steps_that_make_no_sense(steps: Any, error: type[Exception], match: str) -> None:
    model = nn.Linear(2, 1)
    with pytest.raises(error, match=match):
        higher.plan(model, torch.optim.SGD(model.parameters(), lr=0.1), steps=steps, batch=(), loss=lambda f: 0)


def test_without_a_budget_a_share_of_the_free_memory_is_one() -> None:
    model = nn.Linear(2, 1)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    found = higher.plan(model, optimizer, steps=3, batch=torch.ones(3, 2), loss=mean_square)
    if sys.platform == "linux":
        table = Path("/proc/meminfo").read_text()
        (total,) = [int(line.split()[1]) for line in table.splitlines() if line.startswith("MemTotal:")]
        assert found.budget_bytes is not None
        assert 0 < found.budget_bytes <= 0.8 * 1024 * total
    assert found.recommended is not None
