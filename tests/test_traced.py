"""Traced and compiled steps: the same gradients as the unroll's, and a refusal or a complaint where they cannot be."""

from __future__ import annotations

import math
import shutil
from collections.abc import Callable
from typing import Any

import loops
import pytest
import torch
import torch.nn.functional as F
from loops import Loop, Run, gradients, mlp, rows, sgd_for
from torch import Tensor, nn

import lowmem_higher
from lowmem_higher import ReplayMismatchError, flat, traced
from lowmem_higher.errors import CompileFallbackWarning
from lowmem_higher.flat import FlatGraph, NotTraceableError
from lowmem_higher.testing import live_bytes


class Seen:
    """How often flat graphs ran, and why something was not traced."""

    def __init__(self) -> None:
        self.runs = 0
        self.reasons: list[str] = []


@pytest.fixture
def seen(monkeypatch: pytest.MonkeyPatch) -> Seen:
    """Trace from the second use on."""
    found = Seen()
    run, refuse = traced.Trace.__call__, NotTraceableError.__init__

    def counted(self: Any, *args: Any, **kwargs: Any) -> Any:
        found.runs += 1
        return run(self, *args, **kwargs)

    def noted(self: Any, reason: str) -> None:
        found.reasons.append(reason)
        refuse(self, reason)

    monkeypatch.setattr(traced, "TRACE_AFTER", 0)
    monkeypatch.setattr(traced, "OF_ONE_SHAPE", 2)
    monkeypatch.setattr(traced, "WORTH", math.inf)  # what it gives is tested here, not how fast
    monkeypatch.setattr(traced.Trace, "__call__", counted)
    monkeypatch.setattr(NotTraceableError, "__init__", noted)
    return found


def compare(loop: Loop, T: int, rtol: float = 1e-9, **settings: Any) -> None:
    """Compare with the full unroll."""
    unroll = {} if "truncate" not in settings else {"truncate": settings["truncate"]}
    if "first_order" in settings:
        unroll["first_order"] = settings["first_order"]
    torch.manual_seed(0)
    expected = gradients(loop, T, **unroll)
    torch.manual_seed(0)
    found = gradients(loop, T, **{"compile": "trace", **settings})
    assert any(gradient is not None and gradient.norm() > 1e-7 for gradient in expected.values())
    for name, gradient in expected.items():
        other = found[name]
        assert (gradient is None) == (other is None), name
        if gradient is not None and other is not None:
            assert (gradient - other).norm() <= rtol * gradient.norm(), name


# -------------------------------------------------------------------------------------------- against the full unroll


TRACED: list[Loop] = [
    loops.sgd,
    loops.sgd_nesterov_groups,
    loops.adam,
    loops.adam_warm_amsgrad,
    loops.adamw_warm,
    loops.edited_hyperparameters,
    loops.callback,
    loops.captured,
    loops.returned_from_forward,
    loops.leaf_made_in_the_loop,
    loops.times,
    loops.from_past_weights,
    loops.manual_steps,
    loops.shared_weights,
    loops.custom_function,
    loops.gradient_penalty,
]


@pytest.mark.parametrize("loop", TRACED, ids=[loop.__name__ for loop in TRACED])
def test_traced_steps_equal_the_full_unroll(loop: Loop, seen: Seen) -> None:
    compare(loop, 9, checkpoint_every=3)
    assert seen.runs >= 2


@pytest.mark.parametrize("loop", [loops.dropout, loops.checkpoint_in_model, loops.in_place, loops.batch_norm])
def test_what_is_not_traced_is_as_right(loop: Loop, seen: Seen) -> None:
    compare(loop, 7, checkpoint_every=3)
    assert seen.runs == 0


def example_weights_by_slices(run: Run) -> Tensor:
    """Learned weights of examples, cut by numbers that differ at each step."""
    net, x, y, logits = run.net(mlp()), run.data(12, 3), run.data(12, 1), run.leaf("logits", run.data(12))
    with run.context(net, sgd_for(net)) as (fnet, diffopt):
        for t in range(run.steps):
            errors = (fnet(x[rows(t)]) - y[rows(t)]).square().squeeze(1)
            diffopt.step((torch.sigmoid(logits[rows(t)]) * errors).mean() + 0.01 * logits.sum() * errors.sum())
        return fnet(x).tanh().sum()


def schedule(run: Run) -> Tensor:
    """A learning rate and a factor in the loss that are other numbers at each step."""
    net, x, y = run.net(mlp()), run.data(12, 3), run.data(12, 1)
    with run.context(net, sgd_for(net)) as (fnet, diffopt):
        for t in range(run.steps):
            diffopt.param_groups[0]["lr"] = 0.1 * 0.9**t
            diffopt.step((fnet(x[rows(t)]) - y[rows(t)]).square().mean() * (1 + 0.5 * t))
        return fnet(x).tanh().sum()


def shapes(run: Run) -> Tensor:
    """Batches of two sizes."""
    net, x, y = run.net(mlp()), run.data(12, 3), run.data(12, 1)
    with run.context(net, sgd_for(net)) as (fnet, diffopt):
        for t in range(run.steps):
            size = 5 if t % 3 else 8
            diffopt.step((fnet(x[t % 4 : t % 4 + size]) - y[t % 4 : t % 4 + size]).square().mean())
        return fnet(x).tanh().sum()


def adam_from_nothing(run: Run) -> Tensor:
    """After one step Adam's second moment and its maximum are one tensor, and from then on they are not."""
    net, x, y = run.net(mlp()), run.data(12, 3), run.data(12, 1)
    with run.context(net, torch.optim.Adam(net.parameters(), lr=0.03, amsgrad=True)) as (fnet, diffopt):
        for t in range(run.steps):
            diffopt.step((fnet(x[rows(t)]) - y[rows(t)]).square().mean())
        return fnet(x).tanh().sum()


def statistics(run: Run) -> Tensor:
    """BatchNorm, whose running statistics are carried, and are read by the outer loss in eval mode."""
    net = run.net(nn.Sequential(nn.Linear(3, 4), nn.BatchNorm1d(4), nn.Tanh(), nn.Linear(4, 1)))
    x, y = run.data(12, 3), run.data(12, 1)
    with run.context(net, sgd_for(net)) as (fnet, diffopt):
        for t in range(run.steps):
            diffopt.step((fnet(x[rows(t)]) - y[rows(t)]).square().mean())
        fnet.eval()
        return fnet(x).tanh().sum()


def function_with_default(run: Run) -> Tensor:
    """A new function at each step, which differs in a default argument only."""
    net, x, y = run.net(mlp()), run.data(12, 3), run.data(12, 1)
    with run.context(net, sgd_for(net)) as (fnet, diffopt):
        for t in range(run.steps):

            def loss(fmodel: Any, x: Tensor, y: Tensor, factor: float = 1 + 0.3 * t) -> Tensor:
                return factor * F.mse_loss(fmodel(x), y)

            diffopt.step(loss, x[rows(t)], y[rows(t)])
        return fnet(x).tanh().sum()


def function(run: Run) -> Tensor:
    """The same function at each step."""
    net, x, y = run.net(mlp()), run.data(12, 3), run.data(12, 1)
    with run.context(net, sgd_for(net)) as (fnet, diffopt):
        for t in range(run.steps):
            diffopt.step(_inner_loss, x[rows(t)], y[rows(t)])
        return fnet(x).tanh().sum()


def _inner_loss(fmodel: Any, x: Tensor, y: Tensor) -> Tensor:
    return F.mse_loss(fmodel(x), y)


class Scaled(nn.Module):
    """Reads a plain attribute."""

    def __init__(self) -> None:
        super().__init__()
        self.layer, self.scale = nn.Linear(3, 1), 1.0

    def forward(self, x: Tensor) -> Tensor:
        return torch.tanh(self.layer(x) * self.scale)


def attribute(run: Run) -> Tensor:
    """A plain attribute of the model that is another number at each step."""
    net, x, y = run.net(Scaled()), run.data(12, 3), run.data(12, 1)
    with run.context(net, sgd_for(net)) as (fnet, diffopt):
        for t in range(run.steps):
            fnet.scale = 1 + 0.2 * t
            diffopt.step((fnet(x[rows(t)]) - y[rows(t)]).square().mean())
        return fnet(x).tanh().sum()


def radam(run: Run) -> Tensor:
    """A rule that branches on its step count."""
    net, x, y = run.net(mlp()), run.data(12, 3), run.data(12, 1)
    with run.context(net, torch.optim.RAdam(net.parameters(), lr=0.05)) as (fnet, diffopt):
        for t in range(run.steps):
            diffopt.step((fnet(x[rows(t)]) - y[rows(t)]).square().mean())
        return fnet(x).tanh().sum()


def schedules_that_part(run: Run) -> Tensor:
    """The learning rates of two groups, which are equal in late steps (traced first) and differ in early ones."""
    net, x, y = run.net(mlp()), run.data(12, 3), run.data(12, 1)
    groups = [{"params": net[0].parameters()}, {"params": net[2].parameters()}]
    with run.context(net, torch.optim.SGD(groups, lr=0.1)) as (fnet, diffopt):
        for t in range(run.steps):
            diffopt.param_groups[0]["lr"] = 0.02 * (1 + t)
            diffopt.param_groups[1]["lr"] = 0.02 * (1 + max(t, 6))
            diffopt.step((fnet(x[rows(t)]) - y[rows(t)]).square().mean())
        return fnet(x).tanh().sum()


HERE = [example_weights_by_slices, schedule, schedules_that_part, shapes, adam_from_nothing, statistics, function]


@pytest.mark.parametrize("loop", HERE, ids=[loop.__name__ for loop in HERE])
def test_numbers_shapes_statistics_and_functions(loop: Loop, seen: Seen) -> None:
    compare(loop, 12, checkpoint_every=4)
    assert seen.runs >= 4


@pytest.mark.parametrize("loop", [function_with_default, attribute, radam])
def test_what_differs_in_python_is_replayed(loop: Loop, seen: Seen) -> None:
    compare(loop, 12, checkpoint_every=4)
    assert seen.reasons


@pytest.mark.parametrize(
    "settings",
    [
        {"checkpoints": 3},
        {"checkpoint_every": 3, "journal": True},
        {"checkpoint_every": 3, "truncate": 5},
        {"checkpoint_every": 3, "first_order": True},
        {"checkpoint_every": 3, "verify": "off"},
        {"checkpoint_every": 20, "verify": "all"},
    ],
    ids=str,
)
def test_with_every_other_setting(settings: dict[str, Any], seen: Seen) -> None:
    compare(loops.sgd, 9, **settings)
    assert (seen.runs >= 2) == (settings.get("verify") != "all")


def test_a_trace_that_is_no_faster_is_not_used(seen: Seen, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(traced, "WORTH", 0.0)
    compare(loops.sgd, 25, checkpoint_every=50)
    assert seen.runs == 4  # compared twice each, the replay and the pullback


def test_a_second_backward(seen: Seen) -> None:
    def twice(run: Run) -> Tensor:
        outer = loops.adam(run)
        torch.autograd.grad(outer, list(run.inputs.values()), retain_graph=True, allow_unused=True)
        return outer

    compare(twice, 9, checkpoint_every=3)
    assert seen.runs > 8


def test_what_is_used_often_is_traced_and_gives_the_same_bits() -> None:
    torch.manual_seed(0)
    net, x = nn.Sequential(nn.Linear(3, 8), nn.Tanh(), nn.Linear(8, 1)), torch.randn(5, 3)
    opt = torch.optim.SGD(net.parameters(), lr=0.1, momentum=0.9)

    def run(**settings: Any) -> tuple[Tensor, ...]:
        with lowmem_higher.innerloop_ctx(net, opt, copy_initial_weights=False, checkpoint_every=20, **settings) as (
            fnet,
            diffopt,
        ):
            for _ in range(traced.TRACE_AFTER + 20):
                diffopt.step(fnet(x).square().mean())
            return torch.autograd.grad(fnet(x).sum(), list(net.parameters()))

    calls: list[int] = []
    original = FlatGraph.__call__

    def counted(self: FlatGraph, inputs: Any) -> list[Any]:
        calls.append(1)
        return original(self, inputs)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(FlatGraph, "__call__", counted)
        replayed = run(compile=False)
        assert not calls
        found = run(compile="trace")
        assert calls
    assert all(map(torch.equal, replayed, found))


# ------------------------------------------------------------------------------------------------ a trace that is wrong


def corrupted(when: Callable[[int], bool]) -> Callable[[Any, Any], list[Any]]:
    """A flat graph whose gradients are off by 1e-6 in some calls, and whose loss is right."""
    original, count = FlatGraph.__call__, [0]

    def call(self: FlatGraph, inputs: Any) -> list[Any]:
        count[0] += 1
        loss, *others = original(self, inputs)
        return [loss, *((other if other is None or not when(count[0]) else other * (1 + 1e-6)) for other in others)]

    return call


def test_a_wrong_trace_is_found_at_its_first_use(seen: Seen, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(FlatGraph, "__call__", corrupted(lambda count: True))
    with pytest.warns(RuntimeWarning, match="another result than its replay"):
        compare(loops.sgd, 9, checkpoint_every=9)
    assert seen.runs == 2  # of the replay and of the pullback, once each


def test_a_trace_that_becomes_wrong_is_found(seen: Seen, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(FlatGraph, "__call__", corrupted(lambda count: count > 12))
    with pytest.raises(ReplayMismatchError, match="used since they were compared last"):
        compare(loops.sgd, 25, checkpoint_every=50, verify="off")


class Configured(nn.Module):
    """Reads a number from a dictionary, which nothing restores; `hidden` does not show in the loss."""

    def __init__(self) -> None:
        super().__init__()
        self.layer, self.config = nn.Linear(3, 1), {"scale": 1.0, "hidden": 1.0}

    def forward(self, x: Tensor) -> Tensor:
        out = torch.tanh(self.layer(x) * self.config["scale"])
        return out + self.config["hidden"] * (out - out.detach())


@pytest.mark.parametrize("name", ["scale", "hidden"])
def test_what_changes_between_two_contexts_is_found(name: str, seen: Seen) -> None:
    net = Configured().double()
    x, y = torch.randn(8, 3, dtype=torch.float64), torch.randn(8, 1, dtype=torch.float64)
    opt = sgd_for(net)

    def run(**settings: Any) -> tuple[Tensor, ...]:
        with lowmem_higher.innerloop_ctx(net, opt, copy_initial_weights=False, **settings) as (fnet, diffopt):
            for _ in range(6):
                diffopt.step((fnet(x) - y).square().mean())
            return torch.autograd.grad(fnet(x).sum(), list(net.parameters()))

    run(checkpoint_every=3, compile="trace")
    before = seen.runs
    assert before
    net.config[name] = 2.0
    with pytest.warns(RuntimeWarning, match="another result than its replay"):
        found = run(checkpoint_every=3, compile="trace")
    assert seen.runs > before
    assert all((a - b).norm() <= 1e-9 * b.norm() for a, b in zip(found, run(), strict=True))


# --------------------------------------------------------------------------------------------------------- flat graphs


OUTSIDE = torch.randn(3)


@pytest.mark.parametrize(
    ("function", "reason"),
    [
        (lambda x: [x * float(x.sum())], "data-dependent|DataDependent"),
        (lambda x: [x if x.sum() > 0 else -x], "DataDependent|data-dependent"),
        (lambda x: [x * x.numpy().sum()], "numpy"),
        (lambda x: [x * sum(x.tolist())], "reads the value"),
        (lambda x: [x + OUTSIDE], "FakeTensor"),
        (lambda x: [x + torch.tensor([1.0, 2.0, 3.0])], "constant"),
        (lambda x: [x * torch.rand(3)], "random"),
        (lambda x: [F.dropout(x)], "random"),
        (lambda x: [x.mul_(2)], "writes"),
        (lambda x: [x.view(3, 1)[0].zero_()], "writes"),
        (lambda x: [x.split(1)[1].zero_()], "writes"),
        (lambda x: [torch.exp(torch.ones(3), out=x)], "writes"),
    ],
)
def test_a_function_that_is_none_of_its_inputs_alone_is_refused(function: Callable[..., Any], reason: str) -> None:
    with pytest.raises(NotTraceableError, match=reason):
        flat.traced(function, [torch.ones(3)])


def test_a_flat_graph_has_neither_dead_calls_nor_needless_views() -> None:
    def function(x: Tensor, y: Tensor) -> list[Any]:
        x = x.detach().requires_grad_()
        (grad,) = torch.autograd.grad((x.t().t() @ y).sum(), x)
        return [grad, None, x.exp(), x]

    x, y = torch.randn(2, 3), torch.randn(3, 4)
    graph = flat.traced(function, [x, y])
    whole, lean = FlatGraph(graph), FlatGraph(graph, [0, 1])
    assert not any(node.target is torch.ops.aten.detach.default for node in whole.graph.nodes)
    assert not any(node.target is torch.ops.aten.exp.default for node in lean.graph.nodes)
    assert len(lean) < len(whole)
    expected = torch.ones(2, 4) @ y.t()
    assert torch.equal(whole([x, y])[0], expected)
    assert torch.equal(lean([x, y])[0], expected)
    assert lean([x, y])[1] is None
    assert whole([x, y])[3] is x
    fresh = FlatGraph(graph, fresh=[3])([x, y])[3]
    assert torch.equal(fresh, x)
    assert fresh.data_ptr() != x.data_ptr()


def test_traced_steps_take_no_more_memory(seen: Seen) -> None:
    """Values are let go after their last use, and a comparison holds one result more for a moment."""
    net = nn.Sequential(nn.Linear(16, 64), nn.Tanh(), nn.Linear(64, 64), nn.Tanh(), nn.Linear(64, 1))
    opt, x = torch.optim.SGD(net.parameters(), lr=0.01, momentum=0.9), torch.randn(128, 16)

    def run(**settings: Any) -> None:
        with lowmem_higher.innerloop_ctx(net, opt, copy_initial_weights=False, checkpoint_every=4, **settings) as (
            fnet,
            diffopt,
        ):
            for _ in range(12):
                diffopt.step(fnet(x).square().mean())
            torch.autograd.grad(fnet(x).sum(), list(net.parameters()))

    def peak(**settings: Any) -> int:
        with live_bytes() as memory:
            run(**settings)
        return int(memory.peak)

    size = sum(param.nbytes for param in net.parameters())
    replayed = peak(compile=False)
    assert peak(compile="trace") <= replayed + 2 * size
    before = seen.runs
    assert before
    assert peak(compile="trace") <= replayed + 2 * size
    assert seen.runs > before


# ------------------------------------------------------------------------------------------------------------ compiled

needs_compiler = pytest.mark.skipif(
    shutil.which("g++") is None and shutil.which("clang++") is None, reason="inductor needs a C++ compiler for the CPU"
)


@needs_compiler
@pytest.mark.parametrize("loop", [loops.adam], ids=["adam"])
def test_compiled_steps_equal_the_full_unroll(loop: Loop, seen: Seen) -> None:
    compare(loop, 9, checkpoint_every=3, compile=True)
    assert seen.runs >= 2


@pytest.mark.cuda
@pytest.mark.parametrize("optimizer", [torch.optim.SGD, torch.optim.Adam])
def test_cuda_graphs(optimizer: type[torch.optim.Optimizer]) -> None:
    """What one launch gave is still there after the next ones: carries are, until the backward."""

    def gradients(**settings: Any) -> list[Tensor]:
        torch.manual_seed(0)
        net = nn.Sequential(nn.Linear(8, 16), nn.Tanh(), nn.Linear(16, 1)).double().cuda()
        x, w = torch.randn(12, 8).double().cuda(), torch.ones(12, 1).double().cuda().requires_grad_()
        opt = optimizer(net.parameters(), lr=0.01)
        with lowmem_higher.innerloop_ctx(net, opt, copy_initial_weights=False, **settings) as (fnet, diffopt):
            for _ in range(24):
                diffopt.step((w * fnet(x).sin()).mean())
            return list(torch.autograd.grad(fnet(x).square().sum(), [w, *net.parameters()]))

    expected = gradients()
    for _ in range(2):
        for found, tensor in zip(gradients(checkpoint_every=5, compile=True), expected, strict=True):
            assert (found - tensor).norm() <= 1e-9 * tensor.norm()


def test_what_is_not_compiled_warns_once_and_is_as_right(seen: Seen) -> None:
    with pytest.warns(CompileFallbackWarning, match="it draws random numbers") as warned:
        compare(loops.dropout, 9, checkpoint_every=3, compile=True)
    assert len(warned) == 1
    assert seen.runs == 0


@pytest.mark.parametrize("settings", [{}, {"checkpoint_every": 2, "replay": "torch"}], ids=str)
def test_compiling_what_is_not_compiled_is_refused(settings: dict[str, Any]) -> None:
    net = mlp()
    with (
        pytest.raises(ValueError, match="compile=True is for the pullbacks"),
        lowmem_higher.innerloop_ctx(net, sgd_for(net), compile=True, **settings),
    ):
        pass


def test_replays_have_the_bits_of_the_loop_also_where_numbers_differ(seen: Seen) -> None:
    """Over a segment in float32 other rounding would grow, and the check of its end would see it."""
    torch.manual_seed(0)
    net, x = nn.Sequential(nn.Linear(3, 8), nn.Tanh(), nn.Linear(8, 1)), torch.randn(5, 3)
    opt = torch.optim.Adam(net.parameters(), lr=0.03)

    def run(**settings: Any) -> list[Tensor]:
        with lowmem_higher.innerloop_ctx(net, opt, copy_initial_weights=False, **settings) as (fnet, diffopt):
            for t in range(20):
                diffopt.param_groups[0]["lr"] = 0.03 * 0.9**t
                diffopt.step(fnet(x).square().mean() * (1 + 0.1 * t))
            (fnet(x).sum() * 0).backward(retain_graph=True)
            return [weight.detach() for t in range(21) for weight in fnet.parameters(time=t)]

    assert all(map(torch.equal, run(checkpoint_every=20, compile="trace"), run()))
    assert seen.runs > 20


@pytest.mark.parametrize("value", ["yes", None, 1])
def test_other_values_of_compile_are_refused(value: Any) -> None:
    net = mlp()
    with (
        pytest.raises(ValueError, match="compile="),
        lowmem_higher.innerloop_ctx(net, sgd_for(net), checkpoint_every=2, compile=value),
    ):
        pass
