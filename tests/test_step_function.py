"""`step(fn, *args, **kwargs)`: the engine calls the function itself, in the loop and again in each replay."""

from __future__ import annotations

import dataclasses
import functools
from collections import Counter, OrderedDict, namedtuple
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import lowmem_higher as higher
from lowmem_higher.testing import assert_matches_unrolled, live_bytes

pytestmark = pytest.mark.usefixtures("float64")

STEPS = 7
SETTINGS: list[dict[str, Any]] = [
    {"checkpoint_every": 1, "replay": "native"},
    {"checkpoint_every": 3, "replay": "native"},
    {"checkpoint_every": 3, "replay": "torch"},
]
X = torch.sin(torch.arange(48, dtype=torch.float64)).reshape(16, 3)
Y = torch.cos(3 * torch.arange(16, dtype=torch.float64)).reshape(16, 1)


class Net(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.encoder = nn.Sequential(nn.Linear(3, 4), nn.Tanh())
        self.norm = nn.BatchNorm1d(4)
        self.drop = nn.Dropout(0.2)
        self.head = nn.Linear(4, 1)
        self.gain = 1.0

    def forward(self, x: Tensor) -> Tensor:
        return self.gain * self.head(self.drop(self.norm(self.encoder(x))))

    def loss(self, x: Tensor, y: Tensor) -> Tensor:
        return (self(x) - y).square().mean()


def net() -> nn.Module:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(3)
        return Net()


def rows(t: int) -> slice:
    return slice(t % 8, t % 8 + 8)


Body = Callable[[Any, Any], Sequence[Tensor] | None]


def loop_of(body: Body) -> Callable[..., Any]:
    def loop(**settings: Any) -> tuple[Tensor | None, ...]:
        torch.manual_seed(0)
        model = net()
        opt = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.6)
        with higher.innerloop_ctx(model, opt, copy_initial_weights=False, **settings) as (fmodel, diffopt):
            more = body(fmodel, diffopt) or ()
        outer = (fmodel.eval()(X) - Y).square().mean()
        return torch.autograd.grad(outer, [*model.parameters(), *more], allow_unused=True)

    return loop


def assert_exact(body: Body, **more: Any) -> None:
    assert_matches_unrolled(loop_of(body), **{"checkpoint_every": (1, 3), **more})


def assert_exact_or_refused(body: Body) -> None:
    expected = loop_of(body)()
    for setting in SETTINGS:
        try:
            found = loop_of(body)(**setting)
        except higher.LowmemError:
            continue
        for ours, theirs in zip(found, expected, strict=True):
            assert ours is theirs or torch.allclose(ours, theirs, rtol=1e-8, atol=1e-12), (
                f"silently wrong with {setting}"
            )


def squared_error(fmodel: Any, x: Tensor, y: Tensor) -> Tensor:
    return (fmodel(x) - y).square().mean()


def plain(fmodel: Any, diffopt: Any) -> None:
    for t in range(STEPS):
        diffopt.step(squared_error, X[rows(t)], Y[rows(t)])


def test_a_function_gives_what_its_loss_gives() -> None:
    """The same gradient as `step(loss)`, whose full unroll is the reference."""

    def by_loss(fmodel: Any, diffopt: Any) -> None:
        for t in range(STEPS):
            diffopt.step(squared_error(fmodel, X[rows(t)], Y[rows(t)]))

    expected = loop_of(by_loss)()
    for setting in [{}, *SETTINGS]:
        for ours, theirs in zip(loop_of(plain)(**setting), expected, strict=True):
            torch.testing.assert_close(ours, theirs, rtol=1e-9, atol=1e-12)


def test_functions_and_losses_in_turn() -> None:
    def body(fmodel: Any, diffopt: Any) -> None:
        for t in range(STEPS):
            x, y = X[rows(t)], Y[rows(t)]
            if t % 3 == 0:
                diffopt.step(squared_error, x, y=y)
            elif t % 3 == 1:
                diffopt.step(squared_error(fmodel, x, y))
            else:
                diffopt.step(lambda fmodel: fmodel.loss(X, Y))

    assert_exact(body)


Pair = namedtuple("Pair", "x y")


@dataclasses.dataclass
class Data:
    x: Tensor
    y: Tensor


class Opaque:
    def __init__(self, x: Tensor, y: Tensor) -> None:
        self.x, self.y = x, y


@pytest.mark.parametrize(
    ("pack", "unpack"),
    [
        (lambda x, y: [x, {"y": y}], lambda given: (given[0], given[1]["y"])),
        (lambda x, y: (x, (y, None, "text", 3)), lambda given: (given[0], given[1][0])),
        (Pair, lambda given: (given.x, given.y)),
        (Data, lambda given: (given.x, given.y)),
        (Opaque, lambda given: (given.x, given.y)),
        (lambda x, y: OrderedDict(x=x, y=y), lambda given: (given["x"], given["y"])),
        (lambda x, y: Counter({"x": x, "y": y}), lambda given: (given["x"], given["y"])),
    ],
    ids=["list and dictionary", "tuple", "named tuple", "dataclass", "object", "ordered dictionary", "own mapping"],
)
def test_R6_tensors_inside_arguments_of_any_kind_get_their_gradient(
    pack: Callable[..., Any], unpack: Callable[..., Any]
) -> None:
    def inner_loss(fmodel: Any, given: Any, *, scale: float) -> Tensor:
        x, y = unpack(given)
        return scale * squared_error(fmodel, x, y)

    def body(fmodel: Any, diffopt: Any) -> list[Tensor]:
        shift, target = torch.zeros(3, requires_grad=True), torch.ones(1, requires_grad=True)
        for t in range(STEPS):
            diffopt.step(inner_loss, pack(X[rows(t)] + shift, target), scale=0.5 + t / 10)
        return [shift, target]

    assert_exact(body)


def test_arguments_made_from_the_current_weights() -> None:
    """What the loop computes with the model before the step is part of the step."""

    def inner_loss(fmodel: Any, hidden: Tensor, penalty: Tensor, y: Tensor) -> Tensor:
        return (fmodel.head(hidden) - y).square().mean() + 0.1 * penalty

    def body(fmodel: Any, diffopt: Any) -> None:
        for t in range(STEPS):
            hidden = F.dropout(fmodel.encoder(X[rows(t)]), 0.3) * 2
            penalty = sum(param.square().sum() for param in fmodel.parameters())
            diffopt.step(inner_loss, hidden, penalty, Y[rows(t)])

    assert_exact(body)


def test_R6_tensors_that_the_function_captures_get_their_gradient() -> None:
    def body(fmodel: Any, diffopt: Any) -> list[Tensor]:
        weight, other = torch.tensor(1.5, requires_grad=True), torch.tensor(0.3, requires_grad=True)
        made = other.exp()

        def inner_loss(fmodel: Any, x: Tensor, y: Tensor) -> Tensor:
            return weight * squared_error(fmodel, x * made, y)

        for t in range(STEPS):
            diffopt.step(inner_loss, X[rows(t)], Y[rows(t)])
        return [weight, other]

    assert_exact(body)


def test_the_function_runs_once_in_the_loop_and_once_for_each_replay() -> None:
    """Passes are what the report says, and data can be fetched again instead of being kept."""
    for setting in SETTINGS:
        calls: Counter[int] = Counter()

        def fetch(fmodel: Any, t: int, calls: Counter[int] = calls) -> Tensor:
            calls[t] += 1
            x = torch.full((1000, 3), 0.1 * t)  # as if read from disk
            return squared_error(fmodel, x, x.mean(1, keepdim=True))

        model = net()
        opt = torch.optim.SGD(model.parameters(), lr=0.1)
        with (
            higher.innerloop_ctx(model, opt, copy_initial_weights=False, **setting) as (fmodel, diffopt),
            live_bytes() as memory,
        ):
            diffopt.step(fetch, 0)
            start = memory.current
            for t in range(1, STEPS):
                diffopt.step(fetch, t)
            assert diffopt.report.externals_bytes == 0
            assert memory.current - start < 24_000  # of one batch
            assert calls == Counter(range(STEPS))
            fmodel(X).mean().backward()
        report = diffopt.report
        assert sum(calls.values()) == report.first_order_runs + report.second_order_runs
        assert report.first_order_runs <= 2 * STEPS
        assert report.second_order_runs == STEPS or setting["replay"] == "torch"


def test_everything_that_a_function_may_do() -> None:
    """Random numbers, switches, inner derivatives, in-place writes, torch.func; modes set for the call."""

    def inner_loss(fmodel: Any, x: Tensor, y: Tensor, generator: torch.Generator) -> Tensor:
        noisy = x + 0.1 * torch.randn_like(x) + 0.1 * torch.rand(x.shape, generator=generator)
        noisy = noisy[torch.randperm(len(x))].requires_grad_()
        out = F.dropout(fmodel(noisy), 0.2)
        (slope,) = torch.autograd.grad(out.sum(), noisy, create_graph=True)
        with torch.no_grad():
            weights = torch.softmax(fmodel(x), 0)
        errors = (out - y).square()
        errors[0] *= 2
        total = torch.zeros(())
        total += (weights * errors).sum() + 0.1 * slope.square().mean()
        was = fmodel.training
        fmodel.eval()
        fmodel.gain = 0.5
        total = (
            total
            + torch.func.vmap(lambda a: fmodel.head(fmodel.encoder(a)).square().sum())(x).mean()
            + fmodel(x).mean()
        )
        fmodel.train(was)
        fmodel.gain = 1.0
        return total

    def body(fmodel: Any, diffopt: Any) -> None:
        generator = torch.Generator().manual_seed(5)
        for t in range(STEPS):
            diffopt.step(inner_loss, X[rows(t)], Y[rows(t)], generator)

    assert_exact(body)


def test_modes_and_attributes_that_a_function_leaves_behind() -> None:
    """They stay in the loop, and a replay starts from those of its own step."""

    def inner_loss(fmodel: Any, x: Tensor, y: Tensor) -> Tensor:
        loss = fmodel.loss(x, y)
        fmodel.drop.train(not fmodel.drop.training)
        fmodel.gain *= 0.9
        return loss

    def body(fmodel: Any, diffopt: Any) -> None:
        for t in range(STEPS):
            diffopt.step(inner_loss, X[rows(t)], Y[rows(t)])
        assert abs(fmodel.gain - 0.9**STEPS) < 1e-12
        assert fmodel.drop.training == (STEPS % 2 == 0)
        fmodel.gain = 1.0

    assert_exact(body)


def test_the_weights_are_those_of_the_step() -> None:
    """However the function reads them. Past ones are asked for in the loop and passed."""

    def inner_loss(fmodel: Any, start: list[Tensor], x: Tensor, y: Tensor) -> Tensor:
        loss = squared_error(fmodel, x, y)
        loss = loss + sum((now - then).square().sum() for now, then in zip(fmodel.parameters(), start, strict=True))
        loss = loss + 0.1 * sum(weight.sin().sum() for weight in fmodel.fast_params)
        loss = loss + 0.1 * dict(fmodel.named_parameters())["head.weight"].square().sum()
        return loss + 0.1 * fmodel.encoder[0].weight.square().sum() + 0.1 * fmodel.encoder[:1](x).mean()

    def body(fmodel: Any, diffopt: Any) -> None:
        for t in range(STEPS):
            diffopt.step(inner_loss, list(fmodel.parameters(time=0)), X[rows(t)], Y[rows(t)])

    assert_exact(body)


@pytest.mark.parametrize(
    "wrong",
    [
        lambda fmodel: sum(weight.sum() for weight in fmodel.parameters(time=0)),
        lambda fmodel: sum(weight.sum() for weight in fmodel.init_fast_params),
        lambda fmodel: fmodel.update_params([2 * weight for weight in fmodel.parameters()]),
        lambda fmodel: setattr(fmodel, "fast_params", [2 * weight for weight in fmodel.parameters()]),
        lambda fmodel: fmodel(X, params=[2 * weight for weight in fmodel.parameters()]).sum(),
    ],
    ids=["parameters(time=0)", "init_fast_params", "update_params", "fast_params =", "params="],
)
def test_past_weights_and_updates_inside_a_function_are_refused_in_the_loop(wrong: Callable[[Any], Any]) -> None:
    """Not first in the backward, hours later."""
    for setting in SETTINGS:
        model = net()
        with higher.innerloop_ctx(model, torch.optim.SGD(model.parameters(), lr=0.1), **setting) as (fmodel, diffopt):
            plain(fmodel, diffopt)
            times = len(fmodel._view.history)
            with pytest.raises(higher.RecordError, match=r"argument|inside"):
                diffopt.step(lambda fmodel: fmodel(X).mean() + (wrong(fmodel) or 0.0))
            assert len(fmodel._view.history) == times


# --------------------------------------------------------------------------------------------------- kinds of functions


class AddsWeight(nn.Module):
    """A loss with parameters of its own."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.tensor(0.7))

    def forward(self, fmodel: Any, x: Tensor, y: Tensor) -> Tensor:
        return self.weight * squared_error(fmodel, x, y)


@dataclasses.dataclass
class Scaled:
    """Callable, mutable, not hashable."""

    scale: float

    def __call__(self, fmodel: Any, x: Tensor, y: Tensor) -> Tensor:
        return self.scale * squared_error(fmodel, x, y)

    def method(self, fmodel: Any, x: Tensor, y: Tensor) -> Tensor:
        return self(fmodel, x, y)


def test_anything_callable_is_a_function() -> None:
    def body(fmodel: Any, diffopt: Any) -> list[Tensor]:
        learned = AddsWeight()
        for t in range(STEPS):
            x, y = X[rows(t)], Y[rows(t)]
            diffopt.step(learned, x, y)
            diffopt.step(Scaled(1.0 + t / 10), x, y)
            diffopt.step(Scaled(1.0 + t / 10).method, x, y)
            diffopt.step(functools.partial(squared_error, y=y), x)
            diffopt.step(lambda fmodel, t=t: (1.0 + t / 10) * fmodel.loss(X, Y))
            diffopt.step(Net.loss, x, y)
        return list(learned.parameters())

    assert_exact(body, checkpoint_every=(1, 4))


@pytest.mark.parametrize("when", range(STEPS))
def test_R10_a_late_bound_closure_is_refused(when: int) -> None:
    """The trap of a lambda in a loop: in a replay it sees the variable's last value. One odd step is enough."""

    def body(fmodel: Any, diffopt: Any) -> None:
        for t in range(STEPS):
            scale = 2.0 if t == when else 1.0
            diffopt.step(lambda fmodel: scale * squared_error(fmodel, X, Y))  # noqa: B023  # the trap
        scale = 1.0 if when < STEPS - 1 else 3.0

    for setting in SETTINGS:
        with pytest.raises(higher.ReplayMismatchError, match="differs from what your code computed"):
            loop_of(body)(**setting)


def test_R10_a_late_bound_tensor_with_a_gradient_is_refused() -> None:
    """The replay reads a tensor that the loop did not."""

    def body(fmodel: Any, diffopt: Any) -> list[Tensor]:
        leaf = torch.tensor(1.0, requires_grad=True)
        for _t in range(STEPS):
            scale = leaf * 1.0  # the same value each time
            diffopt.step(lambda fmodel: scale * squared_error(fmodel, X, Y))  # noqa: B023  # the trap
        return [leaf]

    for setting in SETTINGS:
        with pytest.raises(higher.ReplayMismatchError, match="did not read while your loop ran"):
            loop_of(body)(**setting)


def test_R4_arguments_that_change_after_the_step() -> None:
    """Lists, dictionaries and arrays are copied, tensors watched; an object of the user is the user's."""

    def inner_loss(fmodel: Any, index: list[int], options: dict[str, float], array: Any, at: Any = None) -> Tensor:
        index = index if at is None else at.index
        return options["scale"] * squared_error(fmodel, X[index], Y[index] * float(array.sum()))

    def copied(fmodel: Any, diffopt: Any) -> None:
        index, options, array = [0, 1, 2], {"scale": 1.0}, np.ones(1)
        for t in range(STEPS):
            index[:] = [t, t + 1, t + 2, t + 5]
            options["scale"] = 1.0 + t / 5
            array[0] = t
            diffopt.step(inner_loss, index, options, array)

    def an_object(fmodel: Any, diffopt: Any) -> None:
        at = Opaque(X, Y)
        for t in range(STEPS):
            at.index = [t, t + 1, t + 5]
            diffopt.step(inner_loss, [0], {"scale": 1.0}, np.ones(1), at=at)

    assert_exact(copied)
    assert_exact_or_refused(an_object)


def test_R4_a_tensor_argument_modified_in_place_is_refused() -> None:
    for setting in SETTINGS:
        x = X.clone()  # from outside; what the loop itself makes is made again

        def body(fmodel: Any, diffopt: Any, x: Tensor = x) -> None:
            for _ in range(STEPS):
                diffopt.step(squared_error, x, Y)
                x.mul_(0.9)

        with pytest.raises(higher.ExternalModifiedError, match="modified in place"):
            loop_of(body)(**setting)


def test_R3_another_module_inside_the_function_counts_its_statistics_once() -> None:
    """A teacher with BatchNorm, given as an argument: what a replay runs again must not count again, or be refused."""
    for setting in SETTINGS:
        teacher = nn.Sequential(nn.Linear(3, 1), nn.BatchNorm1d(1))

        def distill(fmodel: Any, teacher: nn.Module, x: Tensor) -> Tensor:
            with torch.no_grad():
                target = teacher(x)
            return squared_error(fmodel, x, target)

        model = net()
        opt = torch.optim.SGD(model.parameters(), lr=0.1)
        with higher.innerloop_ctx(model, opt, copy_initial_weights=False, **setting) as (fmodel, diffopt):
            try:
                for t in range(STEPS):
                    diffopt.step(distill, teacher, X[rows(t)])
                fmodel(X).mean().backward()
            except higher.LowmemError:
                continue
        assert teacher[1].num_batches_tracked == STEPS, setting


def test_another_fmodel_inside_the_function_is_right_or_refused() -> None:
    """In a replay it has the weights of a later time."""

    def body(fmodel: Any, diffopt: Any) -> None:
        other = net()
        with higher.innerloop_ctx(other, torch.optim.SGD(other.parameters(), lr=0.3), checkpoint_every=2) as (
            fother,
            opt_other,
        ):
            for t in range(STEPS):
                x = X[rows(t)]
                diffopt.step(lambda fmodel, fother, x: squared_error(fmodel, x, fother(x).detach()), fother, x)
                opt_other.step(squared_error, x, Y[rows(t)])

    assert_exact_or_refused(body)


# ---------------------------------------------------------------------------------------------- around the engine's
# call


def test_a_function_works_after_the_context() -> None:
    def body(fmodel: Any, diffopt: Any) -> None:
        plain(fmodel, diffopt)

    def loop(**settings: Any) -> tuple[Tensor, ...]:
        torch.manual_seed(0)
        model = net()
        opt = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.6)
        with higher.innerloop_ctx(model, opt, copy_initial_weights=False, **settings) as (fmodel, diffopt):
            for t in range(3):
                diffopt.step(squared_error, X[rows(t)], Y[rows(t)])
        for t in range(3, STEPS):
            diffopt.step(squared_error, X[rows(t)], Y[rows(t)])
            fmodel(X)
        outer = (fmodel.eval()(X) - Y).square().mean()
        return torch.autograd.grad(outer, list(model.parameters()))

    assert_matches_unrolled(loop, checkpoint_every=(1, 3))
    within = loop_of(body)
    assert within is not None


def test_override_and_grad_callback_are_not_passed_to_the_function() -> None:
    def inner_loss(fmodel: Any, x: Tensor, **kwargs: Any) -> Tensor:
        assert set(kwargs) == {"y"}
        return squared_error(fmodel, x, kwargs["y"])

    def body(fmodel: Any, diffopt: Any) -> list[Tensor]:
        rate, scale = torch.tensor(0.2, requires_grad=True), torch.tensor(0.8, requires_grad=True)

        def callback(grads: list[Tensor]) -> list[Tensor]:
            return [scale * grad for grad in grads]

        for t in range(STEPS):
            diffopt.step(inner_loss, X[rows(t)], override={"lr": [rate]}, grad_callback=callback, y=Y[rows(t)])
        return [rate, scale]

    assert_exact(body)


def test_a_full_unroll_inside_the_function() -> None:
    """A second inner loop inside of the step, with the weights of the first in its loss; and a checkpointed one is
    refused."""

    def inner_loss(fmodel: Any, small: nn.Module, x: Tensor, y: Tensor, settings: dict[str, Any]) -> Tensor:
        opt = torch.optim.SGD(small.parameters(), lr=0.3)
        with higher.innerloop_ctx(small, opt, copy_initial_weights=False, **settings) as (fsmall, opt_small):
            for _ in range(2):
                opt_small.step((fsmall(x) - fmodel(x)).square().mean())
            return (fsmall(x) - y).square().mean()

    def body(fmodel: Any, diffopt: Any, settings: dict[str, Any]) -> list[Tensor]:
        small = nn.Linear(3, 1)
        with torch.no_grad():
            small.weight.fill_(0.3)
            small.bias.fill_(-0.2)
        for t in range(3):
            diffopt.step(inner_loss, small, X[rows(t)], Y[rows(t)], settings)
        return list(small.parameters())

    assert_exact(functools.partial(body, settings={}), checkpoint_every=(1, 2))
    for setting in SETTINGS:
        with pytest.raises(higher.LowmemError):
            loop_of(functools.partial(body, settings={"checkpoint_every": 2}))(**setting)


def test_the_program_shows_the_function() -> None:
    model = net()
    with higher.innerloop_ctx(model, torch.optim.SGD(model.parameters(), lr=0.1), checkpoint_every=2) as (
        fmodel,
        diffopt,
    ):
        diffopt.step(squared_error, X, y=Y)
        shown = str(diffopt.program)
        plain(fmodel, diffopt)
    assert shown.splitlines() == [
        "def step_program(weights, externals, numbers):",
        "    v0 = squared_error(externals[0], y=externals[1])",
        "    return v0",
    ]


def test_one_program_for_functions_that_differ_in_values_only() -> None:
    """New closures of the same code, as a loop makes them, are one program; its checks would else never thin out."""
    model = net()
    programs = set()
    with higher.innerloop_ctx(model, torch.optim.SGD(model.parameters(), lr=0.1), checkpoint_every=2) as (_, diffopt):
        for t in range(STEPS):
            diffopt.step(lambda fmodel, t: (1 + t) * fmodel(X).square().mean(), t)
            programs.add(diffopt.program)
    assert len(programs) == 1


def test_a_function_frees_its_intermediate_values() -> None:
    def grows_by(steps: int) -> int:
        model = nn.Sequential(nn.Linear(50, 50), nn.Tanh(), nn.Linear(50, 1))
        x, y = torch.ones(64, 50), torch.ones(64, 1)
        with (
            higher.innerloop_ctx(model, torch.optim.SGD(model.parameters(), lr=0.1), checkpoint_every=50) as (
                _,
                diffopt,
            ),
            live_bytes() as memory,
        ):
            for _ in range(steps):
                diffopt.step(squared_error, x, y)
            return memory.current

    assert grows_by(20) <= grows_by(5) + 15 * 200  # bytes: no activation, which takes 25,600
