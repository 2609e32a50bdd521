"""The hazards of a replay. Each test names the protection that it guards: take that away, and the test goes red.

A replay runs a step again, later: after other random numbers were drawn, other switches set, other modes chosen, other
tensors written into. The gradient must be the one of the full unroll all the same, or an error must say why not. A
wrong gradient without an error is what every test here looks for.
"""

from __future__ import annotations

import contextlib
import functools
import gc
import random
import threading
import weakref
from collections import OrderedDict
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

import lowmem_higher as higher
from lowmem_higher import testing
from lowmem_higher.testing import live_bytes

pytestmark = pytest.mark.usefixtures("float64")

STEPS = 7
# Every carry kept; segments of several steps, by both replays; one segment for all. More of them: test_exactness.py.
SETTINGS: list[dict[str, Any]] = [
    {"checkpoint_every": 1, "replay": "native"},
    {"checkpoint_every": 3, "replay": "native"},
    {"checkpoint_every": 3, "replay": "torch"},
    {"checkpoint_every": 10, "replay": "native"},
]
Body = Callable[[Any, Any], Sequence[Tensor] | None]

_generator = torch.Generator().manual_seed(1)
X = torch.randn(16, 3, generator=_generator, dtype=torch.float64)
Y = torch.randn(16, 1, generator=_generator, dtype=torch.float64)


def batch(t: int) -> tuple[Tensor, Tensor]:
    """The data of step t: half of all, never the same half twice running."""
    rows = slice(t % 8, t % 8 + 8)
    return X[rows], Y[rows]


def seeded(build: Callable[[], nn.Module]) -> nn.Module:
    """The same module at every call, whatever the generators' state, which stays as it is."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(2)
        return build()


def mlp() -> nn.Module:
    return nn.Sequential(nn.Linear(3, 4), nn.Tanh(), nn.Linear(4, 1))


def sgd(net: nn.Module) -> torch.optim.Optimizer:
    return torch.optim.SGD(net.parameters(), lr=0.2, momentum=0.7)


def squared_error(fnet: Any, t: int) -> Tensor:
    x, y = batch(t)
    return (fnet(x) - y).square().mean()


def plain(fnet: Any, diffopt: Any) -> None:
    for t in range(STEPS):
        diffopt.step(squared_error(fnet, t))


def outer_loss(fnet: Any) -> Tensor:
    return (fnet(X) - Y).square().mean()


def loop_of(
    body: Body, model: Callable[[], nn.Module] = mlp, outer: Callable[[Any], Tensor] = outer_loss
) -> Callable[..., Any]:
    """A whole loop as `assert_matches_unrolled` wants it: `body` between entering and leaving, the gradient after
    it."""

    def loop(**settings: Any) -> tuple[Tensor | None, ...]:
        net = seeded(model)
        with higher.innerloop_ctx(net, sgd(net), copy_initial_weights=False, **settings) as (fnet, diffopt):
            more = body(fnet, diffopt) or ()
        wanted = [*net.parameters(), *more]
        return torch.autograd.grad(outer(fnet), wanted, allow_unused=True)

    return loop


def assert_matches_unrolled(loop: Callable[..., Any], **more: Any) -> None:
    """The public one, over `SETTINGS`."""
    more = {"checkpoint_every": (3,), **more}
    testing.assert_matches_unrolled(loop, **more)
    if more["checkpoint_every"] == (3,):
        testing.assert_matches_unrolled(loop, **{**more, "checkpoint_every": (1, 10), "replay": ("native",)})


def assert_exact(
    body: Body, model: Callable[[], nn.Module] = mlp, outer: Callable[[Any], Tensor] = outer_loss, rtol: float = 1e-9
) -> None:
    """The gradient is the full unroll's, for short, long and unbroken segments, with both replays."""
    assert_matches_unrolled(loop_of(body, model, outer), rtol=rtol)


def assert_exact_or_refused(loop: Callable[..., Any], **more: Any) -> list[str]:
    """Every setting gives the unroll's gradient or raises one of this package's errors; returns what each did."""

    def run(**settings: Any) -> list[Tensor | None]:
        torch.manual_seed(0)
        return list(loop(**settings))

    reference, outcomes = run(), []
    for setting in SETTINGS:
        try:
            found = run(**setting, **more)
        except higher.LowmemError as error:
            outcomes.append(type(error).__name__)
            continue
        for ours, theirs in zip(found, reference, strict=True):
            same = (
                ours is theirs
                if theirs is None or ours is None
                else torch.allclose(ours, theirs, rtol=1e-8, atol=1e-12)
            )
            assert same, f"silently wrong with {setting}: {ours} instead of {theirs}"
        outcomes.append("exact")
    return outcomes


def assert_refused(
    body: Body,
    model: Callable[[], nn.Module] = mlp,
    match: str | None = None,
    error: Any = higher.LowmemError,
    **more: Any,
) -> None:
    """Every setting raises, in the loop or in the backward."""
    for setting in SETTINGS:
        torch.manual_seed(0)
        with pytest.raises(error, match=match):
            loop_of(body, model)(**setting, **more)


# ------------------------------------------------------------------------------------------------ 1 random numbers


def dropout_net() -> nn.Module:
    return nn.Sequential(nn.Linear(3, 8), nn.Dropout(0.4), nn.Tanh(), nn.Linear(8, 1))


def test_R2_dropout_in_the_model_draws_again_what_it_drew() -> None:
    """Guards: `LiveModule.call` keeps the generators' state of a call that draws."""
    assert_exact(plain, dropout_net)


def test_R2_augmentation_in_the_loop_draws_again_what_it_drew() -> None:
    """Guards: `Recorder._record` keeps the generators' state, and `StepProgram.run` restores it."""

    def body(fnet: Any, diffopt: Any) -> None:
        for t in range(STEPS):
            x, y = batch(t)
            wide = x.repeat(1, 40) + torch.randn(8, 120)  # larger than a generator's state, so it is drawn again
            x = wide.view(8, 40, 3).mean(1) + torch.rand_like(x)
            x = x[torch.randperm(8)] * torch.empty(8, 1).uniform_(0.5, 1.5)
            diffopt.step((F.dropout(fnet(x), 0.3) - y + F.dropout(fnet(x).tanh(), 0.3)).square().mean())

    assert_exact(body)


class Noisy(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.inner = nn.Linear(3, 1)

    def forward(self, x: Tensor, generator: torch.Generator | None = None) -> Tensor:
        noise = torch.rand(x.shape[0], 1, generator=generator)
        return torch.tanh(self.inner(x) * (0.5 + noise))


def test_R2_a_generator_given_to_the_model_or_to_a_call_draws_again_what_it_drew() -> None:
    """Guards: `Recorder._read_inputs` keeps a copy of a generator's state, and each run draws from a copy of that."""

    def body(fnet: Any, diffopt: Any) -> None:
        one, other = torch.Generator().manual_seed(3), torch.Generator().manual_seed(4)
        for t in range(STEPS):
            x, y = batch(t)
            out = fnet(x, one)
            noise = (0 * out).normal_(generator=other)
            diffopt.step((out - y + 0.3 * noise * out).square().mean() + fnet(x, generator=one).square().mean())
        one.manual_seed(9)  # and what happens to it later does not matter

    assert_exact(body, Noisy)


def test_R2_manual_seed_in_the_loop_and_in_the_model() -> None:
    """Guards: states are kept per call, not per step."""

    class Seeds(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.inner, self.outer = nn.Linear(3, 4), nn.Linear(4, 1)

        def forward(self, x: Tensor, seed: int) -> Tensor:
            hidden = F.dropout(self.inner(x).tanh(), 0.5)
            torch.manual_seed(seed)
            return self.outer(F.dropout(hidden, 0.3))

    def body(fnet: Any, diffopt: Any) -> None:
        for t in range(STEPS):
            x, y = batch(t)
            first = F.dropout(fnet(x, t), 0.2)
            torch.manual_seed(7)
            diffopt.step((first - y).square().mean() + F.dropout(fnet(x, 3), 0.2).square().mean())
            torch.manual_seed(t % 2)

    assert_exact(body, Seeds, outer=lambda fnet: fnet(X, 0).square().mean())


def test_R2_R12_a_backward_leaves_the_generators_where_they_were() -> None:
    """Guards: `_rng_restored` puts the state back after a replay."""
    net = seeded(dropout_net)
    for setting in SETTINGS:
        with higher.innerloop_ctx(net, sgd(net), copy_initial_weights=False, **setting) as (fnet, diffopt):
            plain(fnet, diffopt)
            outer = outer_loss(fnet)
            before = torch.get_rng_state()
            outer.backward()
        assert torch.equal(torch.get_rng_state(), before)


def test_R2_random_numbers_in_grad_callback() -> None:
    """Guards: `callback_rng`; and the gradient of a tensor that the callback captures."""

    def body(fnet: Any, diffopt: Any) -> list[Tensor]:
        scale = torch.tensor(0.5, requires_grad=True)

        def noisy(grads: list[Tensor]) -> list[Tensor]:
            return [scale * grad + 0.1 * torch.randn_like(grad) for grad in grads]

        for t in range(STEPS):
            diffopt.step(squared_error(fnet, t), grad_callback=noisy)
            torch.rand(3)
        return [scale]

    assert_exact(body)


class DrawsElsewhere(nn.Module):
    """Draws from a generator that no replay restores."""

    def __init__(self, draw: Callable[[], float]) -> None:
        super().__init__()
        self.inner = nn.Linear(3, 1)
        self.draw = draw

    def forward(self, x: Tensor) -> Tensor:
        return torch.tanh(self.inner(x) * (0.5 + self.draw()))


@pytest.mark.parametrize("draw", [random.random, np.random.random_sample, np.random.default_rng(0).random])
def test_R10_random_numbers_of_python_and_numpy_are_refused(draw: Callable[[], float]) -> None:
    """Guards: `check_fingerprint`. A replay cannot restore these generators, and must notice."""
    assert_refused(plain, lambda: DrawsElsewhere(draw), match="differs from what your code computed|does not end at")


def test_R10_random_numbers_of_python_in_grad_callback_are_refused() -> None:
    """Guards: the check covers what follows the gradient too, also where every carry is kept."""

    def body(fnet: Any, diffopt: Any) -> None:
        for t in range(STEPS):
            diffopt.step(squared_error(fnet, t), grad_callback=lambda grads: [grad * random.random() for grad in grads])

    assert_refused(body, error=higher.ReplayMismatchError)


def test_R2_a_generator_held_by_the_model_is_right_or_refused() -> None:
    class Holds(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.inner, self.generator = nn.Linear(3, 1), torch.Generator().manual_seed(5)

        def forward(self, x: Tensor) -> Tensor:
            return self.inner(x).tanh() * torch.rand(x.shape[0], 1, generator=self.generator)

    assert_exact_or_refused(loop_of(plain, Holds))


# ------------------------------------------------------------------------------------------------------ 2 autocast


def autocast_loop(inside_model: bool, toggled: bool, backward_inside: bool) -> Callable[..., Any]:
    class Net(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.inner, self.outer = nn.Linear(3, 16), nn.Linear(16, 1)

        def forward(self, x: Tensor) -> Tensor:
            with torch.autocast("cpu", torch.bfloat16) if inside_model else contextlib.nullcontext():
                return self.outer(self.inner(x).tanh()).float()

    def loop(**settings: Any) -> tuple[Tensor, ...]:
        net = seeded(Net).float()
        x, y = X.float(), Y.float()
        with contextlib.ExitStack() as stack:
            fnet, diffopt = stack.enter_context(
                higher.innerloop_ctx(net, sgd(net), copy_initial_weights=False, **settings)
            )
            for t in range(STEPS):
                with torch.autocast("cpu", torch.bfloat16, enabled=not inside_model and (not toggled or t % 2 == 0)):
                    out = fnet(x[t : t + 8])
                    scores = out @ x.new_ones(1, 4)
                diffopt.step((scores.float() - y[t : t + 8]).square().mean())
            outer = fnet(x).square().mean()
            if backward_inside:
                stack.enter_context(torch.autocast("cpu", torch.bfloat16))
                return torch.autograd.grad(outer, list(net.parameters()))
        return torch.autograd.grad(outer, list(net.parameters()))

    return loop


@pytest.mark.parametrize("toggled", [False, True], ids=["always", "toggled"])
@pytest.mark.parametrize("inside_model", [False, True], ids=["loop", "model"])
@pytest.mark.parametrize("backward_inside", [False, True], ids=["backward outside", "backward inside"])
def test_R2_autocast_around_the_loop(inside_model: bool, toggled: bool, backward_inside: bool) -> None:
    """Guards: autocast's switches in `Ambient`. In bfloat16 the gradient differs by a percent, exact replays by
    nothing."""
    assert_matches_unrolled(autocast_loop(inside_model, toggled, backward_inside), rtol=1e-5)


# --------------------------------------------------------------------------------------------------- 3 train and eval


class BatchNormNet(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.first, self.norm, self.drop, self.last = (
            nn.Linear(3, 4),
            nn.BatchNorm1d(4),
            nn.Dropout(0.3),
            nn.Linear(4, 1),
        )

    def forward(self, x: Tensor) -> Tensor:
        return self.last(self.drop(self.norm(self.first(x)).tanh()))


def test_R2_eval_after_the_loop() -> None:
    """Guards: `ModuleState` keeps `training` of every submodule, and `applied` restores it."""

    def body(fnet: Any, diffopt: Any) -> None:
        plain(fnet, diffopt)
        fnet.eval()

    assert_exact(body, BatchNormNet)


def test_R2_modes_of_the_original_model_play_no_part() -> None:
    nets = []

    def model() -> nn.Module:
        nets.append(BatchNormNet())
        return nets[-1]

    def body(fnet: Any, diffopt: Any) -> None:
        for t in range(STEPS):
            nets[-1].train(t % 2 == 0)
            diffopt.step(squared_error(fnet, t))
            assert fnet.training
            assert fnet.drop.training

    assert_exact(body, model)


# ---------------------------------------------------------------------------------------------------------- 4 buffers


class PureBatchNorm(nn.BatchNorm1d):
    """BatchNorm by hand, which writes into nothing: what later forwards do to the statistics cannot reach a graph."""

    def forward(self, x: Tensor) -> Tensor:
        mean, variance = self.running_mean, self.running_var
        if self.training:
            mean, variance, count = x.mean(0), x.var(0, unbiased=False), len(x)
            self.running_mean = (0.9 * self.running_mean + 0.1 * mean).detach()
            self.running_var = (0.9 * self.running_var + 0.1 * variance * count / (count - 1)).detach()
            self.num_batches_tracked = self.num_batches_tracked + 1
        return (x - mean) / (variance + self.eps).sqrt() * self.weight + self.bias


class PureNet(BatchNormNet):
    def __init__(self) -> None:
        super().__init__()
        self.norm = PureBatchNorm(4)


def assert_as_if_pure(body: Body) -> None:
    """The gradient of a net with torch's BatchNorm is that of `PureNet`, in the full unroll and with checkpoints."""

    def run(model: Callable[[], nn.Module], **settings: Any) -> Any:
        torch.manual_seed(0)
        return loop_of(body, model)(**settings)

    expected = run(PureNet)
    for setting in [*SETTINGS, {}]:
        for ours, theirs in zip(run(BatchNormNet, **setting), expected, strict=True):
            assert torch.allclose(ours, theirs, rtol=1e-9, atol=1e-12), setting


class CheckpointedNorm(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.first, self.norm, self.last = nn.Linear(3, 4), nn.BatchNorm1d(4), nn.Linear(4, 1)

    def forward(self, x: Tensor) -> Tensor:
        return self.last(checkpoint(lambda h: self.norm(h).tanh(), self.first(x), use_reentrant=False))


@pytest.mark.parametrize("model", [BatchNormNet, CheckpointedNorm])
@pytest.mark.parametrize("setting", SETTINGS)
def test_R3_buffers_count_once(model: Callable[[], nn.Module], setting: dict[str, Any]) -> None:
    """Guards: replays run on the twin with copies of the buffers; so do recomputations of `torch.utils.checkpoint`."""
    net = seeded(model)
    start = {name: buffer.clone() for name, buffer in net.named_buffers()}
    with higher.innerloop_ctx(net, sgd(net), copy_initial_weights=False, **setting) as (fnet, diffopt):
        for t in range(STEPS):
            with torch.no_grad():
                fnet(X)  # an evaluation in training mode counts as well
            diffopt.step(squared_error(fnet, t))
        outer = outer_loss(fnet)
        before = {name: buffer.clone() for name, buffer in fnet.named_buffers()}
        outer.backward(retain_graph=True)
        outer.backward()
    assert fnet.norm.num_batches_tracked == 2 * STEPS + 1
    for name, buffer in fnet.named_buffers():
        assert torch.equal(buffer, before[name]), name
    for name, buffer in net.named_buffers():
        assert torch.equal(buffer, start[name]), name


@pytest.mark.parametrize("which", ["norm", "drop"])
def test_R2_a_submodule_in_eval_between_steps(which: str) -> None:
    """Guards: the modes of every submodule, and that a call of the model has its own, not the step's."""

    def body(fnet: Any, diffopt: Any) -> None:
        for t in range(STEPS):
            getattr(fnet, which).train(t % 3 != 1)
            x, y = batch(t)
            first = fnet(x)
            fnet.drop.train(t % 2 == 0)
            diffopt.step((first - y).square().mean() + fnet(2 * x).square().mean())
        fnet.train()

    assert_as_if_pure(body)


def test_R3_training_mode_evaluations_and_edits_of_buffers_between_steps() -> None:
    """Guards: buffers are carry, also where something else than a step changed them (`current_buffers`)."""

    def body(fnet: Any, diffopt: Any) -> None:
        for t in range(STEPS):
            fnet.norm.train(t % 2 == 0)  # in eval mode the values of the buffers matter
            diffopt.step(squared_error(fnet, t))
            fnet.norm.train()
            with torch.no_grad():
                fnet(X * (1 + t))
            if t % 3 == 1:
                fnet.norm.running_mean.zero_()
            if t % 3 == 2:
                fnet.norm.running_var = torch.full((4,), 2.0)
        fnet.norm.eval()

    assert_as_if_pure(body)


def test_R3_buffers_of_a_checkpointed_block() -> None:
    """Guards: `torch.utils.checkpoint` inside the model recomputes with the buffers of then."""

    def body(fnet: Any, diffopt: Any) -> None:
        for t in range(STEPS):
            diffopt.step(squared_error(fnet, t) + fnet(X).square().mean())
            with torch.no_grad():
                fnet(X * (1 + t))

    assert_exact(body, CheckpointedNorm)


def test_R3_a_hidden_module_counts_its_statistics_once() -> None:
    """A teacher in a list of the model, in training mode: a replay must not count again, or be refused in the loop."""
    for setting in SETTINGS:
        teacher = nn.Sequential(nn.Linear(3, 1), nn.BatchNorm1d(1))

        class Student(nn.Module):
            def __init__(self, teacher: nn.Module = teacher) -> None:
                super().__init__()
                self.inner, self.hidden = nn.Linear(3, 1), [teacher]

            def forward(self, x: Tensor) -> Tensor:
                return self.inner(x).tanh() + self.hidden[0](x).detach()

        with contextlib.suppress(higher.LowmemError):
            loop_of(plain, Student)(**setting)
        assert teacher[1].num_batches_tracked in (0, 1, STEPS + 1), (
            setting
        )  # not at all, refused at once, or the loop's


_running = [torch.zeros(1, dtype=torch.float64), torch.ones(1, dtype=torch.float64)]


def test_R3_statistics_that_are_no_buffers_count_once() -> None:
    """`F.batch_norm` writes into the tensors that it is given, and no name tells."""

    class Net(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.inner = nn.Linear(3, 1)

        def forward(self, x: Tensor) -> Tensor:
            return F.batch_norm(self.inner(x), *_running, training=True).tanh()

    def body(fnet: Any, diffopt: Any) -> None:
        plain(fnet, diffopt)
        levels.append(_running[0].clone())

    for setting in SETTINGS:
        levels: list[Tensor] = []
        _running[0].zero_()
        with contextlib.suppress(higher.LowmemError):
            loop_of(body, Net, outer=lambda fnet: fnet.inner(X).square().mean())(**setting)
        assert not levels or torch.equal(levels[0], _running[0]), setting


def test_submodules_that_write_into_their_argument() -> None:
    """`relu = nn.ReLU(inplace=True)`, called in the loop."""

    def model() -> nn.Module:
        return nn.Sequential(nn.Linear(3, 4), nn.ReLU(inplace=True), nn.Dropout(0.2), nn.Linear(4, 1))

    def body(fnet: Any, diffopt: Any) -> None:
        for t in range(STEPS):
            x, y = batch(t)
            out = fnet[3](fnet[2](fnet[1](fnet[0](x) + 0.3)))
            diffopt.step((out - y).square().mean())

    assert_exact_or_refused(loop_of(body, model))
    assert_exact(plain, model)


class MovingCenter(nn.Module):
    """Subtracts a moving average that it makes at the first call."""

    def __init__(self) -> None:
        super().__init__()
        self.inner = nn.Linear(3, 1)
        self.register_buffer("center", None)

    def forward(self, x: Tensor) -> Tensor:
        out = self.inner(x)
        mean = out.detach().mean(0)
        self.center = mean if self.center is None else 0.5 * self.center + 0.5 * mean
        return torch.tanh(out - self.center)


def test_R3_a_buffer_that_the_first_forward_makes_is_right_or_refused() -> None:
    assert_exact_or_refused(loop_of(plain, MovingCenter))


class TwoCounters(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.inner, self.one, self.other = nn.Linear(3, 1), nn.Module(), nn.Module()
        shared = torch.ones(())
        self.one.register_buffer("count", shared)
        self.other.register_buffer("count", shared)

    def forward(self, x: Tensor) -> Tensor:
        self.one.count += 1
        return torch.tanh(self.inner(x) / self.other.count.item())


def test_R3_a_buffer_shared_by_two_modules_stays_shared() -> None:
    """Guards: the functional copy and the twin keep one tensor in both places."""
    net = seeded(TwoCounters)
    with higher.innerloop_ctx(net, sgd(net)) as (fnet, _):
        fnet(X)
        assert fnet.one.count == 2
        assert fnet.other.count == 2
    assert_exact(plain, TwoCounters)


# -------------------------------------------------------------------------------------------------- 5 hyperparameters


def test_R2_hyperparameters_edited_between_steps() -> None:
    """Guards: `Trajectory._configured` keeps each step's own hyperparameters."""

    def body(fnet: Any, diffopt: Any) -> list[Tensor]:
        rate, momentum = torch.tensor(0.2, requires_grad=True), torch.tensor(0.5, requires_grad=True)
        for t in range(STEPS):
            group = diffopt.param_groups[0]
            group["lr"] = rate * 0.9**t if t % 2 else 0.1 + 0.02 * t
            group["weight_decay"] = 0.1 * (t % 3)
            group["maximize"] = t == 4
            override = {"momentum": [momentum / (1 + t)]} if t % 3 == 1 else None
            diffopt.step(squared_error(fnet, t), override=override)
        diffopt.param_groups[0].update(lr=100.0, momentum=0.0, nesterov=True)
        return [rate, momentum]

    assert_exact(body)


def test_R4_a_hyperparameter_tensor_edited_in_place_is_refused() -> None:
    """Guards: hyperparameters are externals with a version."""

    def body(fnet: Any, diffopt: Any) -> None:
        rate = torch.tensor(0.2)
        diffopt.param_groups[0]["lr"] = rate
        for t in range(STEPS):
            diffopt.step(squared_error(fnet, t))
            rate.mul_(0.9)

    assert_refused(body, error=higher.ExternalModifiedError, match="modified in place")


@pytest.mark.parametrize("how", ["in place", "replaced", "number", "cleared"])
def test_optimizer_state_edited_between_steps(how: str) -> None:
    """Guards: `_check_weights` compares the state with what the last step left, tensors and numbers."""

    def edit(state: list[dict[int, dict[str, Any]]]) -> None:
        for entries in state:
            for entry in entries.values():
                for name, value in list(entry.items()):
                    if how == "in place" and isinstance(value, Tensor):
                        value.detach().mul_(0.1)
                    elif how == "replaced" and isinstance(value, Tensor):
                        entry[name] = 0.1 * value
                    elif how == "number" and not isinstance(value, Tensor):
                        entry[name] = 0
            if how == "cleared":
                entries.clear()

    def loop(**settings: Any) -> tuple[Tensor, ...]:
        net = seeded(mlp)
        opt = sgd(net) if how == "in place" else torch.optim.Adam(net.parameters(), lr=0.1)
        with higher.innerloop_ctx(net, opt, copy_initial_weights=False, **settings) as (fnet, diffopt):
            for t in range(STEPS):
                if t == 2:
                    edit(diffopt.state)
                diffopt.step(squared_error(fnet, t))
        return torch.autograd.grad(outer_loss(fnet), list(net.parameters()))

    outcomes = assert_exact_or_refused(loop)
    if how != "in place":
        assert set(outcomes) == {"exact"}


# ---------------------------------------------------------------------------------------- 6 externals modified in place


def test_R4_an_external_modified_in_place_is_refused() -> None:
    """Guards: `StepRecord.stand_ins` compares versions."""

    def after_all_steps(fnet: Any, diffopt: Any) -> None:
        x = X.clone()
        for _ in range(STEPS):
            diffopt.step((fnet(x) - Y).square().mean())
        x.add_(1)

    def through_a_view(fnet: Any, diffopt: Any) -> None:
        data = X.clone()
        rows = data[2:5]
        for t in range(STEPS):
            diffopt.step((fnet(data[t : t + 8]) - Y[t : t + 8]).square().mean())
            if t == 2:
                rows.mul_(2)

    def the_whole_of_a_view(fnet: Any, diffopt: Any) -> None:
        data = X.clone()
        for t in range(STEPS):
            diffopt.step((fnet(data[t : t + 8].T.T) - Y[t : t + 8]).square().mean())
        data[0, 0] = 7.0

    def a_meta_parameter(fnet: Any, diffopt: Any) -> list[Tensor]:
        weight = torch.ones(8, 1, requires_grad=True)
        for t in range(STEPS):
            x, y = batch(t)
            diffopt.step((weight * (fnet(x) - y).square()).mean())
        with torch.no_grad():
            weight.sub_(0.1)
        return [weight]

    for body in (after_all_steps, through_a_view, the_whole_of_a_view, a_meta_parameter):
        assert_refused(body, error=higher.ExternalModifiedError, match="modified in place after step")


def test_R4_an_external_modified_between_the_forward_and_the_step_is_refused() -> None:
    """Guards: `Externals.ref` compares versions."""

    def body(fnet: Any, diffopt: Any) -> None:
        for t in range(STEPS):
            x, y = X.clone(), target if when == "outside" else Y.clone()
            loss = (fnet(x) - y).square().mean()
            if t == 2:
                y.zero_()
            diffopt.step(loss)

    target = Y.clone()
    when = "outside"
    assert_refused(body, error=higher.ExternalModifiedError, match="modified in place between its use")
    when = "inside"  # made in the loop, so made again in the replay: nothing is lost
    assert_exact(body)


def test_R4_a_tensor_may_be_modified_before_it_is_read() -> None:
    """Refilling a buffer is right where each step takes its own copy, and augmenting a fresh batch in place always
    is."""

    def body(fnet: Any, diffopt: Any) -> None:
        buffer = torch.empty(8, 3)
        for t in range(STEPS):
            x, y = batch(t)
            buffer.copy_(x)
            mine = buffer.clone()
            fresh = X[torch.arange(t, t + 8)]
            fresh.mul_(2)
            fresh[:, 0] += 1
            diffopt.step((fnet(mine) - y).square().mean() + (fnet(fresh) - y).square().mean())

    assert_exact(body)


def test_R4_a_tensor_attribute_of_the_model_modified_in_place_is_refused() -> None:
    """Guards: `ModuleState.versions`."""

    def body(fnet: Any, diffopt: Any) -> None:
        for t in range(STEPS):
            diffopt.step(squared_error(fnet, t))
            if t == 3:
                fnet.mask.mul_(0.5)

    def replaced(fnet: Any, diffopt: Any) -> None:
        for t in range(STEPS):
            fnet.mask = torch.full((3,), 1.0 + t)
            diffopt.step(squared_error(fnet, t))

    assert_refused(body, Masked, error=higher.ExternalModifiedError, match="modified in place")
    assert_exact(replaced, Masked)


def test_R4_fast_weights_modified_in_place_are_refused() -> None:
    """Guards: versions of weights in `_check_weights`, and of carries in `Carry.check_unmodified`."""

    def between_steps(fnet: Any, diffopt: Any) -> None:
        for t in range(STEPS):
            diffopt.step(squared_error(fnet, t))
            if t == 2:
                with torch.no_grad():
                    fnet[0].weight.clamp_(-0.1, 0.1)

    def kept_for_the_backward(fnet: Any, diffopt: Any) -> None:
        first = fnet[0].weight
        plain(fnet, diffopt)
        with torch.no_grad():
            first.zero_()

    assert_refused(between_steps, match="modified in place")
    assert_refused(kept_for_the_backward, error=higher.ExternalModifiedError, match="modified in place")


@pytest.mark.parametrize("how", ["data.clamp_", "data =", "detach().clamp_", "load_state_dict"])
def test_R4_projecting_the_fast_weights_behind_the_graph_is_right_or_refused(how: str) -> None:
    """A common idiom, `p.data.clamp_(...)` after a step, that leaves no trace in any version."""

    def body(fnet: Any, diffopt: Any) -> None:
        for t in range(STEPS):
            diffopt.step(squared_error(fnet, t))
            if t == 1:
                weight = fnet[0].weight
                if how == "data.clamp_":
                    weight.data.clamp_(-0.1, 0.1)
                elif how == "data =":
                    weight.data = 0.5 * weight.data
                elif how == "detach().clamp_":
                    weight.detach().clamp_(-0.1, 0.1)
                else:
                    fnet.load_state_dict({name: 0.5 * value for name, value in fnet.state_dict().items()})

    def loop(**settings: Any) -> Any:
        if not settings and how in ("detach().clamp_", "load_state_dict"):  # autograd refuses them in the full unroll
            return [None] * 4
        return loop_of(body)(**settings)

    assert_exact_or_refused(loop)


@pytest.mark.parametrize("how", ["data", "numpy", "inference", "data of what the loop made"])
@pytest.mark.parametrize("when", [0, 2, 4, 6])
def test_R4_R10_an_external_modified_without_a_trace_is_found_at_any_step(how: str, when: int) -> None:
    """Guards: the loss is compared at every replay. No version counts these writes."""

    def body(fnet: Any, diffopt: Any, modified: bool = True) -> None:
        for t in range(STEPS):
            array = prepared[t]
            array[:] = batch(t)[0].numpy()
            x, y = torch.from_numpy(array), batch(t)[1]
            if how == "inference":
                with torch.inference_mode():
                    x = x.clone()
            elif how == "data of what the loop made":
                x = x.clone()
            diffopt.step((fnet(x + 0.0) - y).square().mean())
            if t == when and modified:
                if how == "numpy":
                    array *= 3
                else:
                    with torch.inference_mode():
                        (x if how == "inference" else x.data).mul_(3)

    prepared = [np.zeros((8, 3)) for _ in range(STEPS)]
    expected = loop_of(functools.partial(body, modified=False))()
    outcomes = assert_exact_or_refused(lambda **settings: loop_of(body)(**settings) if settings else expected)
    assert how == "data of what the loop made" or "exact" not in outcomes


class Masked(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.inner, self.outer = nn.Linear(3, 4), nn.Linear(4, 1)
        self.mask = torch.tensor([1.0, 0.5, 2.0])
        self.scale, self.adapter, self.power, self.name = 1.0, True, 2, "tanh"
        self.drop = nn.Dropout(0.0)
        self.config = {"gain": 1.0}
        self.active = ["outer"]

    def forward(self, x: Tensor) -> Tensor:
        hidden = self.drop(self.inner(x * self.mask)) * self.scale * self.config["gain"]
        hidden = getattr(torch, self.name)(hidden)
        if self.adapter:
            hidden = hidden + 0.1 * hidden**self.power
        return self.outer(hidden) if "outer" in self.active else hidden[:, :1]


# ------------------------------------------------------------------------------------------ 7 custom autograd.Function


class StraightThrough(torch.autograd.Function):
    """Rounds, and passes the gradient as if it had not; the factor is wrong on purpose, so that no other rule gives
    it."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, step: Tensor) -> Tensor:
        ctx.save_for_backward(x, step)
        return torch.round(x / step) * step

    @staticmethod
    def backward(ctx: Any, cotangent: Tensor) -> tuple[Tensor, Tensor]:
        x, step = ctx.saved_tensors
        return cotangent * (1.5 + x.tanh()), (cotangent * x * step).sum()


class NewStyle(torch.autograd.Function):
    """The same with `setup_context`, and with two outputs of which one is no tensor."""

    @staticmethod
    def forward(x: Tensor, factor: float) -> tuple[Tensor, str]:
        return x.sin(), "sine"

    @staticmethod
    def setup_context(ctx: Any, inputs: Any, output: Any) -> None:
        ctx.save_for_backward(inputs[0])
        ctx.factor = inputs[1]

    @staticmethod
    def backward(ctx: Any, cotangent: Tensor, _: None) -> tuple[Tensor, None]:
        return cotangent * ctx.saved_tensors[0].square() * ctx.factor, None


straight_through = StraightThrough.apply


class Quantized(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.inner, self.step = nn.Linear(3, 1), nn.Parameter(torch.tensor(0.1))
        self.quantize = StraightThrough.apply

    def forward(self, x: Tensor) -> Tensor:
        return StraightThrough.apply(x, self.step) @ self.inner.weight.T + self.quantize(self.inner(x), self.step)


@pytest.mark.parametrize("apply", [StraightThrough.apply, straight_through, lambda *args: StraightThrough.apply(*args)])
def test_R8_a_custom_function_in_the_loop_keeps_its_own_backward(apply: Callable[..., Tensor]) -> None:
    """Guards: `intercepted_apply`, also for an alias made before the context."""

    def body(fnet: Any, diffopt: Any) -> list[Tensor]:
        step = torch.tensor(0.1, requires_grad=True)
        for t in range(STEPS):
            x, y = batch(t)
            out = apply(fnet(x), step * 1.0)
            sine, kind = NewStyle.apply(out, 0.5 + t)
            assert kind == "sine"
            diffopt.step((out + sine - y).square().mean())
        return [step]

    assert_exact(body)


def test_R8_a_custom_function_in_the_model_keeps_its_own_backward() -> None:
    """Guards: the model's forward is run again, not taken apart; captured inputs of `apply` are found (R6)."""
    assert_exact(plain, Quantized)
    captured = torch.tensor(0.2, requires_grad=True)

    class Captures(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.inner = nn.Linear(3, 1)

        def forward(self, x: Tensor) -> Tensor:
            return straight_through(self.inner(x), captured)

    def body(fnet: Any, diffopt: Any) -> list[Tensor]:
        plain(fnet, diffopt)
        return [captured]

    assert_exact(body, Captures)


def test_R8_a_custom_function_is_found_by_its_wrong_gradient_not_by_its_forward() -> None:
    """The rule of the test itself: taking the function apart would give another gradient."""
    x = torch.tensor([0.3, -0.7], requires_grad=True)
    (ours,) = torch.autograd.grad(straight_through(x, torch.tensor(0.1)).sum(), x)
    assert not torch.allclose(ours, torch.zeros(2))
    assert not torch.allclose(ours, torch.ones(2))


# ------------------------------------------------------------------------------------------------- 8 unseen dependence


def vmap_loss(fnet: Any, x: Tensor, y: Tensor) -> Tensor:
    return torch.func.vmap(lambda a, b: (a - b).square().sum())(fnet(x), y).mean()


def vmap_of_the_model(fnet: Any, x: Tensor, y: Tensor) -> Tensor:
    return (torch.func.vmap(fnet)(x) - y).square().mean()


def jacobian_loss(fnet: Any, x: Tensor, y: Tensor) -> Tensor:
    slopes = torch.func.vmap(torch.func.grad(lambda a: fnet(a).sum()))(x)
    return (fnet(x) - y).square().mean() + slopes.square().mean()


def functional_call_loss(fnet: Any, x: Tensor, y: Tensor) -> Tensor:
    doubled = {name: 2 * weight for name, weight in fnet.named_parameters()}
    return (torch.func.functional_call(fnet, doubled, (x,)) - y).square().mean()


def stashed_loss(fnet: Any, x: Tensor, y: Tensor) -> Tensor:
    return (fnet(x) - y).square().mean() + fnet.hidden.square().mean()


class Stashes(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.inner, self.outer = nn.Linear(3, 4), nn.Linear(4, 1)

    def forward(self, x: Tensor) -> Tensor:
        self.hidden = self.inner(x).tanh()
        return self.outer(self.hidden)


UNSEEN = [vmap_loss, vmap_of_the_model, jacobian_loss, functional_call_loss, stashed_loss]


@pytest.mark.parametrize("inner_loss", UNSEEN)
def test_R9_what_the_recorder_cannot_follow_is_refused_at_the_step(inner_loss: Callable[..., Tensor]) -> None:
    """Guards: `check_dependence`. The error names an operation and the way out."""
    net = seeded(Stashes)
    for setting in SETTINGS:
        with higher.innerloop_ctx(net, sgd(net), **setting) as (fnet, diffopt):
            before = list(fnet.parameters())
            with pytest.raises(higher.RecordError, match=r"made by \w+Backward0?.*diffopt.step\(inner_loss, \*args\)"):
                diffopt.step(inner_loss(fnet, *batch(0)))
            assert all(a is b for a, b in zip(fnet.parameters(), before, strict=True))
            assert diffopt.report.steps == 0


@pytest.mark.parametrize("inner_loss", UNSEEN)
def test_R9_the_way_out_works(inner_loss: Callable[..., Tensor]) -> None:
    """Guards: `step(fn, *args)` runs the function itself."""

    def body(fnet: Any, diffopt: Any) -> None:
        for t in range(STEPS):
            diffopt.step(inner_loss, *batch(t))

    if inner_loss is not jacobian_loss:
        assert_exact(body, Stashes)
        return
    assert_matches_unrolled(loop_of(body, Stashes), replay=("native",))
    with pytest.raises(RuntimeError, match=r"saved tensor hooks|native"):  # torch.func inside torch.utils.checkpoint
        loop_of(body, Stashes)(checkpoint_every=3, replay="torch")


@pytest.mark.parametrize("when", [0, 2, 4])
def test_R9_unseen_dependence_in_a_single_step_is_refused(when: int) -> None:
    """Guards: the check at every step, not only at the first of a program."""
    for inner_loss in UNSEEN:

        def body(fnet: Any, diffopt: Any, inner_loss: Any = inner_loss) -> None:
            for t in range(STEPS):
                x, y = batch(t)
                diffopt.step(inner_loss(fnet, x, y) if t == when else (fnet(x) - y).square().mean())

        assert_refused(body, Stashes)


def test_R9_an_activation_stashed_by_one_call_and_read_by_the_next_is_refused() -> None:
    """Guards: the watcher finds it as an external, and `check_dependence` walks its graph to the fast weights."""

    class Remembers(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.inner, self.memory = nn.Linear(3, 1), None

        def forward(self, x: Tensor) -> Tensor:
            out = self.inner(x).tanh() + (0.0 if self.memory is None else 0.5 * self.memory.mean())
            self.memory = out
            return out

    def twice_a_step(fnet: Any, diffopt: Any) -> None:
        for t in range(STEPS):
            x, y = batch(t)
            diffopt.step((fnet(x) - y).square().mean() + (fnet(2 * x) - y).square().mean())

    assert_refused(twice_a_step, Remembers, match=r"did not see|modified")
    assert_exact(plain, Remembers)  # once a step it is a hidden state, as any other


@pytest.mark.parametrize(
    "op",
    [
        lambda out: torch.ops.aten.mul.Tensor(out, 2.0),
        lambda out: torch._C._nn.gelu(out),
        lambda out: torch.stack(list(out)),
        lambda out: torch.cat(list(out)).view(-1, 1),
        lambda out: torch.utils.checkpoint.checkpoint(torch.tanh, out, use_reentrant=False),
        lambda out: out.to(torch.complex128).real,
        lambda out: nn.utils.parameters_to_vector([out, out])[:8].view(-1, 1),
        lambda out: torch.einsum("ij,kj->ik", out.tanh(), out.tanh()).mean(1, keepdim=True),
        lambda out: float(out.numpy(force=True).mean()) * out,
    ],
)
def test_R9_unusual_operations_are_followed_or_refused(op: Callable[[Tensor], Tensor]) -> None:
    def body(fnet: Any, diffopt: Any) -> None:
        for t in range(STEPS):
            x, y = batch(t)
            diffopt.step((op(fnet(x)) - y).square().mean())

    assert_exact_or_refused(loop_of(body))


# --------------------------------------------------------------------------------------------- 9 exception in the
# middle


class Boom(Exception):  # noqa: N818  # raised on purpose
    pass


class Fuse(nn.Module):
    """A model that raises when told to."""

    blown: bool | str = False
    draws = False

    def __init__(self) -> None:
        super().__init__()
        self.first, self.norm, self.last = nn.Linear(3, 4), nn.BatchNorm1d(4), nn.Linear(4, 1)

    def forward(self, x: Tensor) -> Tensor:
        hidden = checkpoint(self.first_block, x, use_reentrant=False)
        if Fuse.draws:
            hidden = F.dropout(hidden, 0.3)
        if Fuse.blown:
            raise Boom
        return self.last(self.norm(hidden).tanh())

    def first_block(self, x: Tensor) -> Tensor:
        if Fuse.blown == "recompute":
            raise Boom
        return self.first(x)


class Bang(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        return x.clone()

    @staticmethod
    def backward(ctx: Any, cotangent: Tensor) -> Tensor:
        raise Boom


@contextlib.contextmanager
def blown(how: bool | str = True) -> Iterator[None]:
    Fuse.blown = how
    try:
        yield
    finally:
        Fuse.blown = False


def _raises(*_: Any, **__: Any) -> Any:
    raise Boom


def fail_in_forward(fnet: Any, diffopt: Any) -> None:
    with blown():
        diffopt.step(squared_error(fnet, 0))


def fail_in_loss_code(fnet: Any, diffopt: Any) -> None:
    loss = squared_error(fnet, 0)
    _raises(loss)


def fail_in_an_operation(fnet: Any, diffopt: Any) -> None:
    fnet.last(torch.zeros(2, 3))


def fail_in_an_operation_of_the_loop(fnet: Any, diffopt: Any) -> None:
    fnet.last(torch.ones(1, 4)) @ torch.ones(3, 3)


def fail_in_a_submodule(fnet: Any, diffopt: Any) -> None:
    fnet.first("not a tensor")


def fail_in_grad_callback(fnet: Any, diffopt: Any) -> None:
    fnet.eval()  # an evaluation leaves no trace in the buffers
    try:
        diffopt.step(squared_error(fnet, 0), grad_callback=_raises)
    finally:
        fnet.train()


def fail_in_fn(fnet: Any, diffopt: Any) -> None:
    diffopt.step(_raises, X)


def fail_in_forward_of_fn(fnet: Any, diffopt: Any) -> None:
    with blown():
        diffopt.step(lambda fnet, x: fnet(x).sum(), X)


def fail_in_inner_backward(fnet: Any, diffopt: Any) -> None:
    diffopt.step(Bang.apply(fnet.last(torch.ones(1, 4)).sum()))


def fail_with_override(fnet: Any, diffopt: Any) -> None:
    try:
        diffopt.step(fnet.last(torch.full((1, 4), float("nan"))).sum(), override={"lr": [100.0]})
    except ValueError as error:
        raise Boom from error


FAILURES = [
    fail_in_forward,
    fail_in_loss_code,
    fail_in_an_operation,
    fail_in_an_operation_of_the_loop,
    fail_in_a_submodule,
    fail_in_grad_callback,
    fail_in_fn,
    fail_in_forward_of_fn,
    fail_in_inner_backward,
    fail_with_override,
]


def everything(net: nn.Module, opt: Any, fnet: Any, diffopt: Any) -> dict[str, Any]:
    """All that an exception must leave alone, except the statistics of a forward that ran."""
    return {
        "model": {name: value.clone() for name, value in net.state_dict().items()},
        "model's grads": [param.grad for param in net.parameters()],
        "modes": [module.training for module in [*net.modules(), *fnet.modules()]],
        "optimizer": opt.state_dict(),
        "weights": [weight.detach().clone() for weight in fnet.parameters()],
        "objects": [id(weight) for weight in fnet.parameters()],
        "groups": [{key: value for key, value in group.items() if key != "params"} for group in diffopt.param_groups],
        "state": [{index: dict(entry) for index, entry in entries.items()} for entries in diffopt.state],
        "steps": diffopt.report.steps,
        "times": len(fnet._view.history),
    }


def same(one: Any, other: Any) -> bool:
    if isinstance(one, Tensor):
        return one is other or torch.equal(one, other)
    if isinstance(one, dict):
        return one.keys() == other.keys() and all(same(one[key], other[key]) for key in one)
    if isinstance(one, (list, tuple)):
        return len(one) == len(other) and all(map(same, one, other))
    return bool(one == other)


@pytest.mark.parametrize("fail", FAILURES)
@pytest.mark.parametrize("setting", [{}, *SETTINGS[1:3]], ids=str)
def test_R12_an_exception_in_the_loop_changes_nothing(
    fail: Callable[[Any, Any], None], setting: dict[str, Any], global_state: Callable[[], Any]
) -> None:
    """Guards: every `finally` between the user's call and the engine's state; results are set when nothing can fail."""
    net = seeded(Fuse)
    opt = sgd(net)
    net(X).sum().backward()
    opt.step()
    opt.zero_grad()
    with higher.innerloop_ctx(net, opt, copy_initial_weights=False, **setting) as (fnet, diffopt):
        for t in range(3):
            diffopt.step(squared_error(fnet, t))
        before, flags, rng = everything(net, opt, fnet, diffopt), global_state(), torch.get_rng_state()
        with pytest.raises((Boom, RuntimeError, TypeError)):
            fail(fnet, diffopt)
        after = everything(net, opt, fnet, diffopt)
        for name, value in before.items():
            assert same(value, after[name]), name
        assert global_state() == flags
        assert torch.equal(torch.get_rng_state(), rng)


@pytest.mark.parametrize("fail", FAILURES)
def test_R12_the_loop_goes_on_after_an_exception(fail: Callable[[Any, Any], None]) -> None:
    """Guards: nothing of a failed attempt is left in the recorder, the trajectory or the twin."""

    def body(fnet: Any, diffopt: Any) -> None:
        for t in range(STEPS):
            if t % 3 == 1:
                with contextlib.suppress(Boom, RuntimeError, TypeError):
                    fail(fnet, diffopt)
            diffopt.step(squared_error(fnet, t))

    assert_exact(body, Fuse)


@contextlib.contextmanager
def other_switches() -> Iterator[None]:
    """Some of what a replay restores, set for the loop only; and the model draws random numbers."""
    precision = torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision("medium")
    Fuse.draws = True
    try:
        with torch.backends.cudnn.flags(enabled=False, deterministic=True), torch.autocast("cuda", enabled=False):
            yield
    finally:
        torch.set_float32_matmul_precision(precision)
        Fuse.draws = False


@pytest.mark.parametrize("setting", SETTINGS, ids=str)
def test_R12_an_exception_in_a_replay_changes_nothing_and_the_loop_goes_on(
    setting: dict[str, Any], global_state: Callable[[], Any]
) -> None:
    """Guards: the twin, the switches and the generators are restored in `finally`; the user's fmodel is never
    touched."""

    def train(fnet: Any, diffopt: Any, steps: range) -> None:
        with other_switches():
            for t in steps:
                diffopt.step(squared_error(fnet, t))

    def all_steps(fnet: Any, diffopt: Any) -> None:
        train(fnet, diffopt, range(STEPS))

    torch.manual_seed(0)
    expected = loop_of(all_steps, Fuse)()
    torch.manual_seed(0)
    net = seeded(Fuse)
    opt = sgd(net)
    with higher.innerloop_ctx(net, opt, copy_initial_weights=False, **setting) as (fnet, diffopt):
        train(fnet, diffopt, range(3))
        outer = fnet.last.weight.sum()
        before, flags, rng = everything(net, opt, fnet, diffopt), global_state(), torch.get_rng_state()
        Fuse.draws = True
        with pytest.raises(Boom), blown():
            outer.backward(retain_graph=True)
        Fuse.draws = False
        after = everything(net, opt, fnet, diffopt)
        for name, value in before.items():
            assert same(value, after[name]), name
        assert global_state() == flags
        assert torch.equal(torch.get_rng_state(), rng)
        train(fnet, diffopt, range(3, STEPS))
    Fuse.draws = True  # a replay cannot know of this global
    found = torch.autograd.grad(outer_loss_without(fnet), list(net.parameters()))
    Fuse.draws = False
    for ours, theirs in zip(found, expected, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-9, atol=1e-12)


def outer_loss_without(fnet: Any) -> Tensor:
    """The outer loss, computed by a forward that draws nothing."""
    Fuse.draws = False
    try:
        return outer_loss(fnet)
    finally:
        Fuse.draws = True


@pytest.mark.parametrize("setting", [{}, *SETTINGS], ids=str)
def test_R12_an_exception_in_a_recomputation_leaves_the_current_weights(setting: dict[str, Any]) -> None:
    """Guards: the `finally` of `ParameterSlots.installed`, where a checkpointed block of an earlier time runs again."""
    net = seeded(Fuse)
    opt = sgd(net)
    with higher.innerloop_ctx(net, opt, copy_initial_weights=False, **setting) as (fnet, diffopt):
        diffopt.step(squared_error(fnet, 0))
        outer = outer_loss(fnet)
        for t in range(3):
            diffopt.step(squared_error(fnet, t))
        before = everything(net, opt, fnet, diffopt)
        prediction = fnet.eval()(X)
        with pytest.raises(Boom), blown("recompute"):
            outer.backward(retain_graph=True)
        fnet.train()
        after = everything(net, opt, fnet, diffopt)
        for name, value in before.items():
            assert same(value, after[name]), name
        assert torch.equal(fnet.eval()(X), prediction)


@pytest.mark.parametrize("where", ["model", "loop"])
@pytest.mark.parametrize("setting", [{}, *SETTINGS], ids=str)
def test_R7_a_recomputation_of_an_earlier_time_leaves_the_loop_alone(setting: dict[str, Any], where: str) -> None:
    """Guards: what runs again with the weights of then is no call of the loop: nothing is recorded, nothing
    assigned."""
    net = seeded(Fuse if where == "model" else BatchNormNet).requires_grad_()
    opt = sgd(net)
    with higher.innerloop_ctx(net, opt, copy_initial_weights=False, **setting) as (fnet, diffopt):
        fnet.eval()
        diffopt.step(squared_error(fnet, 0))
        out = fnet(X) if where == "model" else checkpoint(fnet, X, use_reentrant=False)
        outer = (out - Y).square().mean()
        for t in range(3):
            diffopt.step(squared_error(fnet, t))
        before = everything(net, opt, fnet, diffopt)
        prediction = fnet(X)
        for backward in (torch.autograd.backward, torch.autograd.grad):
            inputs = list(net.parameters())
            backward(outer, inputs=inputs, retain_graph=True)
            net.zero_grad()
            after = everything(net, opt, fnet, diffopt)
            for name, value in before.items():
                assert same(value, after[name]), name
            assert torch.equal(fnet(X), prediction)


@pytest.mark.parametrize("setting", [{}, *SETTINGS[1:3]], ids=str)
def test_R12_an_exception_leaves_the_context(setting: dict[str, Any], global_state: Callable[[], Any]) -> None:
    """Guards: the `finally` around the context's body. The next context starts afresh."""
    net = seeded(Fuse)
    flags = global_state()
    with pytest.raises(Boom), higher.innerloop_ctx(net, sgd(net), **setting) as (fnet, diffopt):
        diffopt.step(squared_error(fnet, 0))
        with blown():
            fnet(X)
    assert global_state() == flags
    assert_exact(plain, Fuse)


# ---------------------------------------------------------------------------------------- 10 nested and interleaved


@pytest.mark.parametrize("closing", ["first opened first", "last opened first"])
def test_two_contexts_open_at_once_and_closed_in_either_order(closing: str) -> None:
    """Guards: one recorder per thread with a window per trajectory, and `_remove_mode`."""

    def loop(**settings: Any) -> tuple[Tensor, ...]:
        nets = [seeded(mlp), seeded(dropout_net)]
        stacks = [contextlib.ExitStack(), contextlib.ExitStack()]
        pairs = [
            stack.enter_context(higher.innerloop_ctx(net, sgd(net), copy_initial_weights=False, **settings))
            for stack, net in zip(stacks, nets, strict=True)
        ]
        noise = torch.rand(8, 1)
        for t in range(STEPS):
            x, y = batch(t)
            for index, (fnet, diffopt) in enumerate(pairs):
                if t % 3 != index:  # not in lockstep
                    diffopt.step((fnet(x) * noise - y).square().mean())
        first, second = (0, 1) if closing == "first opened first" else (1, 0)
        stacks[first].close()
        fnet, diffopt = pairs[second]
        for t in range(3):  # the other one goes on recording
            diffopt.step((F.dropout(fnet(batch(t)[0]), 0.3) - batch(t)[1]).square().mean())
        stacks[second].close()
        outer = sum(outer_loss(fnet) for fnet, _ in pairs)
        return torch.autograd.grad(outer, [param for net in nets for param in net.parameters()])

    assert_matches_unrolled(loop)


def test_one_model_feeds_the_loss_of_another_and_back() -> None:
    """Guards: weights of the other trajectory are externals with a gradient; its steps do not end our window."""

    def loop(**settings: Any) -> tuple[Tensor, ...]:
        student, teacher = seeded(mlp), seeded(mlp)
        with (
            higher.innerloop_ctx(student, sgd(student), copy_initial_weights=False, **settings) as (
                fstudent,
                opt_student,
            ),
            higher.innerloop_ctx(teacher, sgd(teacher), copy_initial_weights=False, **settings) as (
                fteacher,
                opt_teacher,
            ),
        ):
            for t in range(STEPS):
                x, y = batch(t)
                target = fteacher(x).tanh()
                guess = fstudent(x)
                opt_student.step((guess - target).square().mean())
                opt_teacher.step((target - y).square().mean() + 0.1 * (fstudent(x).detach() - target).square().mean())
                if t % 2:
                    opt_student.step((fstudent(x) - fteacher(x).detach()).square().mean())
            outer = outer_loss(fstudent)
        return torch.autograd.grad(outer, [*student.parameters(), *teacher.parameters()])

    assert_matches_unrolled(loop)


def test_a_loss_that_depends_on_another_models_weights_of_before_its_step() -> None:
    """A loss built before the other's step and stepped on after it."""

    def loop(**settings: Any) -> tuple[Tensor, ...]:
        one, other = seeded(mlp), seeded(mlp)
        with (
            higher.innerloop_ctx(one, sgd(one), copy_initial_weights=False, **settings) as (fone, opt_one),
            higher.innerloop_ctx(other, sgd(other), copy_initial_weights=False, **settings) as (fother, opt_other),
        ):
            for t in range(STEPS):
                x, y = batch(t)
                loss = (fone(x) - 0.5 * fother(x)).square().mean()
                opt_other.step((fother(x) - y).square().mean())
                opt_one.step(loss)
            outer = outer_loss(fone)
        return torch.autograd.grad(outer, [*one.parameters(), *other.parameters()])

    assert_matches_unrolled(loop)


def test_contexts_held_by_generators_are_interleaved() -> None:
    """Guards: the recorder's mode leaves the stack also from below others."""

    def train(settings: dict[str, Any]) -> Iterator[tuple[Any, nn.Module]]:
        net = seeded(mlp)
        with higher.innerloop_ctx(net, sgd(net), copy_initial_weights=False, **settings) as (fnet, diffopt):
            for t in range(STEPS):
                diffopt.step(squared_error(fnet, t))
                yield fnet, net

    def loop(**settings: Any) -> tuple[Tensor, ...]:
        first, second = train(settings), train(settings)
        for _ in range(2):
            one = next(first)
        two = next(second)
        for latest in first:
            one = latest
            with contextlib.suppress(StopIteration):
                two = next(second)
        for latest in second:
            two = latest
        outer = outer_loss(one[0]) + outer_loss(two[0]).sin()
        return torch.autograd.grad(outer, [*one[1].parameters(), *two[1].parameters()])

    assert_matches_unrolled(loop)


def test_a_context_inside_another_with_its_own_data() -> None:
    """One inner loop per outer step, as a meta-training loop inside a checkpointed one."""

    def loop(**settings: Any) -> tuple[Tensor, ...]:
        net, small = seeded(mlp), seeded(mlp)
        with higher.innerloop_ctx(net, sgd(net), copy_initial_weights=False, **settings) as (fnet, diffopt):
            for t in range(STEPS):
                with higher.innerloop_ctx(small, sgd(small), copy_initial_weights=False, **settings) as (
                    fsmall,
                    opt_small,
                ):
                    for s in range(3):
                        opt_small.step(squared_error(fsmall, s))
                    target = fsmall(batch(t)[0])
                diffopt.step((fnet(batch(t)[0]) - target).square().mean())
        return torch.autograd.grad(outer_loss(fnet), [*net.parameters(), *small.parameters()])

    assert_matches_unrolled(loop)


def test_R9_a_checkpointed_context_inside_a_step_of_another_is_refused_and_an_unrolled_one_is_not() -> None:
    """The inner loop's result depends on the outer one's weights: a derivative of a derivative."""

    def loop(inner: dict[str, Any], **settings: Any) -> tuple[Tensor, ...]:
        net, small = seeded(mlp), seeded(mlp)
        with higher.innerloop_ctx(net, sgd(net), copy_initial_weights=False, **settings) as (fnet, diffopt):
            for t in range(3):
                x, y = batch(t)
                with higher.innerloop_ctx(small, sgd(small), copy_initial_weights=False, **inner) as (
                    fsmall,
                    opt_small,
                ):
                    for _ in range(2):
                        opt_small.step((fsmall(x) - fnet(x)).square().mean())
                    loss = (fsmall(x) - y).square().mean()
                diffopt.step(loss)
        return torch.autograd.grad(outer_loss(fnet), [*net.parameters(), *small.parameters()])

    assert_exact_or_refused(functools.partial(loop, {}))
    for setting in SETTINGS:
        with pytest.raises(higher.LowmemError):
            loop(setting, **setting)


def test_recording_stops_with_the_last_context(global_state: Callable[[], Any]) -> None:
    """Guards: `Recorder.leave`."""
    flags = global_state()
    stacks = [contextlib.ExitStack() for _ in range(3)]
    for stack in stacks:
        net = mlp()
        stack.enter_context(higher.innerloop_ctx(net, sgd(net), checkpoint_every=2))
    assert global_state() != flags
    for index in (1, 0, 2):
        stacks[index].close()
    assert global_state() == flags


def test_a_mode_of_the_user_may_overlap_the_context(global_state: Callable[[], Any]) -> None:
    """Guards: `_remove_mode` takes the recorder off from below another mode, and leaves that one in place."""

    class Mine(torch.overrides.TorchFunctionMode):
        calls = 0

        def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
            Mine.calls += 1
            return func(*args, **(kwargs or {}))

    def body(fnet: Any, diffopt: Any) -> None:
        mode = Mine()
        for t in range(STEPS):
            if t == 1:
                mode.__enter__()
            diffopt.step(squared_error(fnet, t))
            if t == 4:
                mode.__exit__(None, None, None)

    assert_exact(body)
    net, flags = mlp(), global_state()
    stack = contextlib.ExitStack()
    stack.enter_context(higher.innerloop_ctx(net, sgd(net), checkpoint_every=2))
    with Mine():
        stack.close()
        Mine.calls = 0
        torch.ones(2).sum()
        assert Mine.calls > 0
    assert global_state() == flags


# ------------------------------------------------------------------------- 11, 12 backward twice, inside, after the
# context


@pytest.mark.parametrize("setting", SETTINGS, ids=str)
def test_R11_backward_twice_with_retain_graph_is_as_exact(setting: dict[str, Any]) -> None:
    """Guards: records are freed only by a backward that does not retain the graph."""
    expected = loop_of(plain, BatchNormNet)()
    torch.manual_seed(0)
    expected = loop_of(plain, BatchNormNet)()
    torch.manual_seed(0)
    net = seeded(BatchNormNet)
    with higher.innerloop_ctx(net, sgd(net), copy_initial_weights=False, **setting) as (fnet, diffopt):
        plain(fnet, diffopt)
    outer = outer_loss(fnet)
    for retain in (True, True, False):
        found = torch.autograd.grad(outer, list(net.parameters()), retain_graph=retain)
        for ours, theirs in zip(found, expected, strict=True):
            torch.testing.assert_close(ours, theirs, rtol=1e-9, atol=1e-12)


@pytest.mark.parametrize("setting", SETTINGS, ids=str)
def test_R11_backward_twice_without_retain_graph_is_refused(setting: dict[str, Any]) -> None:
    """Guards: `freed_error`. Also where only the steps, not the outer loss, were gone through before."""
    net = seeded(mlp)
    with higher.innerloop_ctx(net, sgd(net), copy_initial_weights=False, **setting) as (fnet, diffopt):
        plain(fnet, diffopt)
    one, other = outer_loss(fnet), outer_loss(fnet).sin()
    one.backward()
    with pytest.raises(higher.HistoryFreedError, match="retain_graph=True"):
        other.backward()
    with pytest.raises(higher.HistoryFreedError, match="retain_graph=True"):
        list(fnet.parameters(time=3))


@pytest.mark.parametrize("setting", SETTINGS, ids=str)
def test_several_outer_losses_one_by_one_or_summed(setting: dict[str, Any]) -> None:
    """Guards: pulling back a prefix of the steps again and again, with the graph retained."""

    def gradients(one_by_one: bool, **setting: Any) -> list[Tensor]:
        net = seeded(mlp)
        losses = []
        with higher.innerloop_ctx(net, sgd(net), copy_initial_weights=False, **setting) as (fnet, diffopt):
            for t in range(STEPS):
                diffopt.step(squared_error(fnet, t))
                losses.append(outer_loss(fnet) * (1 + t))
                if one_by_one:
                    losses[-1].backward(retain_graph=True)
        if not one_by_one:
            torch.stack(losses).sum().backward()
        return [param.grad for param in net.parameters()]

    expected = gradients(one_by_one=False)
    for one_by_one in (False, True):
        for ours, theirs in zip(gradients(one_by_one, **setting), expected, strict=True):
            torch.testing.assert_close(ours, theirs, rtol=1e-9, atol=1e-12)


def test_backward_inside_the_context_and_the_loop_goes_on() -> None:
    """Guards: a backward records nothing, and ends no window (truncated backpropagation)."""

    def loop(**settings: Any) -> list[Tensor | None]:
        net = seeded(BatchNormNet)
        rate = torch.tensor(0.2, requires_grad=True)
        grads: list[Tensor | None] = []
        with higher.innerloop_ctx(net, sgd(net), copy_initial_weights=False, override={"lr": [rate]}, **settings) as (
            fnet,
            diffopt,
        ):
            for t in range(2 * STEPS):
                x, y = batch(t)
                out = fnet(x)
                if t in (4, 9):
                    grads += torch.autograd.grad(
                        outer_loss(fnet), [*fnet.parameters(time=1 if t == 4 else 6), rate], retain_graph=True
                    )
                diffopt.step((out - y).square().mean())
                if t in (4, 9):  # cut: what went before gets no gradient any more
                    grads += torch.autograd.grad(outer_loss(fnet), [rate])
                    fnet.update_params([weight.detach().requires_grad_() for weight in fnet.parameters()])
                    for entries in diffopt.state:
                        for entry in entries.values():
                            entry.update({name: value.detach() for name, value in entry.items()})
            inside = torch.autograd.grad(outer_loss(fnet), [rate], retain_graph=True)
        after = torch.autograd.grad(outer_loss(fnet), [rate])
        return [*grads, *inside, *after]

    assert_matches_unrolled(loop)


# ------------------------------------------------------------------------------------------------------ 13 hidden state


class Recurrent(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.cell, self.head = nn.GRUCell(3, 5), nn.Linear(5, 1)

    def forward(self, x: Tensor, hidden: Tensor) -> tuple[Tensor, Tensor]:
        hidden = self.cell(x, hidden)
        return self.head(hidden), hidden


@pytest.mark.parametrize("detached", [True, False])
@pytest.mark.parametrize("by_function", [True, False])
def test_a_hidden_state_is_carried_from_step_to_step(detached: bool, by_function: bool) -> None:
    """Guards: `retain_graph=True` in the first-order gradient; a tensor of an earlier step is an external with a
    gradient."""

    def loop(**settings: Any) -> tuple[Tensor | None, ...]:
        net = seeded(Recurrent)
        start = torch.zeros(8, 5, requires_grad=True)
        hidden: list[Tensor] = [start]

        def inner_loss(fnet: Any, x: Tensor, y: Tensor, before: Tensor) -> Tensor:
            out, _ = fnet(x, before)
            return (out - y).square().mean()

        with higher.innerloop_ctx(net, sgd(net), copy_initial_weights=False, **settings) as (fnet, diffopt):
            for t in range(STEPS):
                x, y = batch(t)
                before = hidden[-1].detach() if detached and t else hidden[-1]
                out, after = fnet(x, before)
                hidden.append(after)
                if by_function:
                    diffopt.step(inner_loss, x, y, before)
                else:
                    diffopt.step((out - y).square().mean())
            outer = fnet(X[:8], hidden[-1])[0].square().mean() + sum(h.sin().mean() for h in hidden)
        return torch.autograd.grad(outer, [*net.parameters(), start])

    assert_matches_unrolled(loop)


# -------------------------------------------------------------------------------------------------------- 14 switches

SWITCHES: dict[str, tuple[Callable[[], Any], Callable[[Any], Any], Any]] = {
    "grad mode": (torch.is_grad_enabled, torch._C._set_grad_enabled, False),
    "default dtype": (torch.get_default_dtype, torch.set_default_dtype, torch.float32),
    "cudnn.enabled": (torch._C._get_cudnn_enabled, torch._C._set_cudnn_enabled, False),
    "cudnn.benchmark": (torch._C._get_cudnn_benchmark, torch._C._set_cudnn_benchmark, True),
    "cudnn.deterministic": (torch._C._get_cudnn_deterministic, torch._C._set_cudnn_deterministic, True),
    "cudnn.allow_tf32": (torch._C._get_cudnn_allow_tf32, torch._C._set_cudnn_allow_tf32, False),
    "sdpa.flash": (torch.backends.cuda.flash_sdp_enabled, torch.backends.cuda.enable_flash_sdp, False),
    "sdpa.mem_efficient": (torch.backends.cuda.mem_efficient_sdp_enabled,
    torch.backends.cuda.enable_mem_efficient_sdp, False),
    "sdpa.math": (torch.backends.cuda.math_sdp_enabled, torch.backends.cuda.enable_math_sdp, False),
    "sdpa.cudnn": (torch.backends.cuda.cudnn_sdp_enabled, torch.backends.cuda.enable_cudnn_sdp, False),
    "matmul precision": (torch.get_float32_matmul_precision, torch.set_float32_matmul_precision, "high"),
    "deterministic": (torch.are_deterministic_algorithms_enabled, torch.use_deterministic_algorithms, True),
    "warn only": (
        torch.is_deterministic_algorithms_warn_only_enabled,
        lambda value: torch.use_deterministic_algorithms(torch.are_deterministic_algorithms_enabled(), warn_only=value),
        True,
    ),
    "autocast cpu": (lambda: torch.is_autocast_enabled("cpu"), lambda value: torch.set_autocast_enabled("cpu",
    value), True),
    "autocast cpu dtype": (lambda: torch.get_autocast_dtype("cpu"), lambda value: torch.set_autocast_dtype("cpu",
    value), torch.float16),
    "autocast cuda": (lambda: torch.is_autocast_enabled("cuda"), lambda value: torch.set_autocast_enabled("cuda",
    value), True),
    "autocast cuda dtype": (lambda: torch.get_autocast_dtype("cuda"), lambda value: torch.set_autocast_dtype("cuda",
    value), torch.bfloat16),
}  # fmt: skip


@pytest.mark.parametrize("name", [name for name in SWITCHES if name != "grad mode"])
@pytest.mark.parametrize("where", ["fmodel", "fn"])
def test_R2_switches_are_restored_in_replays(name: str, where: str) -> None:
    """Guards: each entry of `_SWITCHES`. The model reads the switch, as kernels do, and computes something else."""
    read, write, other = SWITCHES[name]
    usual = read()

    class Reads(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.inner = nn.Linear(3, 1)

        def forward(self, x: Tensor) -> Tensor:
            return torch.tanh(self.inner(x)) * (2.0 if read() == other else 1.0)

    def inner_loss(fnet: Any, x: Tensor, y: Tensor) -> Tensor:
        return (fnet(x) - y).square().mean()

    def body(fnet: Any, diffopt: Any) -> None:
        for t in range(STEPS):
            try:
                write(other if t % 2 else usual)
                if where == "fn":
                    diffopt.step(inner_loss, *batch(t))
                else:
                    loss = inner_loss(fnet, *batch(t))
                    write(usual)
                    diffopt.step(loss)
            finally:
                write(usual)

    assert_exact(body, Reads)
    assert read() == usual


def test_R2_grad_mode_is_restored_in_replays() -> None:
    """Guards: the first entry of `_SWITCHES`. With a gradient the weights below would pass one on."""

    def body(fnet: Any, diffopt: Any) -> None:
        for t in range(STEPS):
            with torch.no_grad():
                weights = torch.softmax(fnet(X), 0)
                with torch.enable_grad():
                    loss = (weights * (fnet(X) - Y).square()).sum()
            diffopt.step(loss * (t + 1) / STEPS)

    assert_exact(body)
    for setting in SETTINGS:
        net = seeded(mlp)
        with higher.innerloop_ctx(net, sgd(net), copy_initial_weights=False, **setting) as (fnet, diffopt):
            for t in range(STEPS):
                loss = squared_error(fnet, t)
                with torch.no_grad():
                    diffopt.step(loss)
        with torch.enable_grad():
            found = torch.autograd.grad(outer_loss(fnet), list(net.parameters()))
        for ours, theirs in zip(found, loop_of(plain)(), strict=True):
            torch.testing.assert_close(ours, theirs, rtol=1e-9, atol=1e-12)


def test_R2_default_device_is_restored_or_refused() -> None:
    class Reads(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.inner = nn.Linear(3, 1)

        def forward(self, x: Tensor) -> Tensor:
            return torch.tanh(self.inner(x)) * (2.0 if torch.empty(1).device.type == "meta" else 1.0)

    def body(fnet: Any, diffopt: Any) -> None:
        for t in range(STEPS):
            x, y = batch(t)
            with torch.device("meta") if t % 3 == 2 else contextlib.nullcontext():
                out = fnet(x)
            diffopt.step((out - y).square().mean())

    assert_exact_or_refused(loop_of(body, Reads))


# ----------------------------------------------------------------------- what forward does besides its arguments


def test_control_flow_that_depends_on_data_and_weights() -> None:
    """Forward is run again from the same carry, so it takes the same branch; the loop's own branches are recorded."""

    class Branches(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.inner, self.outer = nn.Linear(3, 4), nn.Linear(4, 1)

        def forward(self, x: Tensor) -> Tensor:
            hidden = self.inner(x)
            for _ in range(int(hidden.detach().abs().sum()) % 3):
                hidden = hidden.sin()
            return self.outer(hidden if x.sum() > 0 else hidden.tanh())

    def body(fnet: Any, diffopt: Any) -> None:
        for t in range(STEPS):
            x, y = batch(t)
            out = fnet(x)
            loss = (out - y).square().mean() if out.mean().item() > 0 else (out - y).abs().mean()
            diffopt.step(loss * float(loss.detach()))

    assert_exact(body, Branches)


@pytest.mark.parametrize(
    "edit",
    [
        lambda fnet, t: setattr(fnet, "scale", 1.0 + t / 5),
        lambda fnet, t: setattr(fnet, "adapter", t % 2 == 0),
        lambda fnet, t: setattr(fnet, "power", 2 + t % 2),
        lambda fnet, t: setattr(fnet, "name", ["tanh", "sin", "relu"][t % 3]),
        lambda fnet, t: setattr(fnet.drop, "p", min(0.1 * t, 0.6)),
        lambda fnet, t: setattr(fnet, "mask", torch.full((3,), 0.3 + t)),
        lambda fnet, t: setattr(fnet, "mask", 1.0 + t),
    ],
)
def test_R2_attributes_of_the_model_changed_between_steps(edit: Callable[[Any, int], None]) -> None:
    """Guards: `ModuleState` keeps plain attributes and tensors of every submodule."""

    def body(fnet: Any, diffopt: Any) -> None:
        for t in range(STEPS):
            edit(fnet, t)
            diffopt.step(squared_error(fnet, t))
        edit(fnet, 20)

    assert_exact(body, Masked)


RARE = [
    ("an entry of a dictionary", lambda fnet: fnet.config.update(gain=2.0)),
    ("a new dictionary", lambda fnet: setattr(fnet, "config", {"gain": 2.0})),
    ("a list", lambda fnet: fnet.active.clear()),
    ("a new list", lambda fnet: setattr(fnet, "active", [])),
    ("a submodule", lambda fnet: setattr(fnet, "drop", nn.Tanh())),
    ("a forward hook", lambda fnet: fnet.inner.register_forward_hook(lambda module, args, out: 2 * out)),
    ("a forward pre-hook", lambda fnet: fnet.register_forward_pre_hook(lambda module, args: (2 * args[0],))),
    ("a backward hook", lambda fnet: fnet.outer.register_full_backward_hook(lambda module, grads, _: (2 * grads[0],))),
    ("a method", lambda fnet: setattr(fnet.drop, "forward", torch.sin)),
    ("a weight", lambda fnet: setattr(fnet.inner, "weight", nn.Parameter(2 * fnet.inner.weight.detach()))),
    ("a hook on a weight", lambda fnet: fnet.inner.weight.register_hook(lambda grad: 2 * grad)),
]  # fmt: skip


@pytest.mark.parametrize("change", [change for _, change in RARE], ids=[name for name, _ in RARE])
@pytest.mark.parametrize("when", [2, 5])
def test_R10_any_other_change_of_the_model_is_right_or_refused(change: Callable[[Any], Any], when: int) -> None:
    """From some step on; every step must be looked at, since checks of the 1st, 2nd, 4th and 8th use alone miss it."""

    def body(fnet: Any, diffopt: Any) -> None:
        for t in range(STEPS):
            if t == when:
                change(fnet)
            diffopt.step(squared_error(fnet, t))

    assert_exact_or_refused(loop_of(body, Masked))


@pytest.mark.parametrize(
    "change", [change for name, change in RARE if name in ("a submodule", "a forward hook", "a backward hook")]
)
def test_R9_a_changed_structure_is_refused_in_the_loop(change: Callable[[Any], Any]) -> None:
    """Guards: `structure_of`. What a replay cannot follow is said at once, not hours later."""
    net = seeded(Masked)
    with higher.innerloop_ctx(net, sgd(net), checkpoint_every=3) as (fnet, diffopt):
        plain(fnet, diffopt)
        change(fnet)
        with pytest.raises(higher.RecordError, match=r"submodule was added.*before innerloop_ctx"):
            diffopt.step(squared_error(fnet, 0))


def test_R9_a_hook_on_a_tensor_is_refused_in_the_loop() -> None:
    """Guards: `Recorder.hooked`."""
    net = seeded(mlp)
    with higher.innerloop_ctx(net, sgd(net), checkpoint_every=3) as (fnet, diffopt):
        plain(fnet, diffopt)
        handle = fnet[0].weight.register_hook(lambda grad: 2 * grad)
        with pytest.raises(higher.RecordError, match="hook"):
            diffopt.step(squared_error(fnet, 0))
        handle.remove()
        out = fnet(X)
        out.register_hook(lambda grad: 2 * grad)
        with pytest.raises(higher.RecordError, match="hook"):
            diffopt.step((out - Y).square().mean())


_gain = [1.0]
_learned = [torch.ones(())]


class ReadsGlobals(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.inner = nn.Linear(3, 1)

    def forward(self, x: Tensor) -> Tensor:
        return torch.tanh(self.inner(x) * _gain[0] * _learned[0])


@pytest.mark.parametrize("when", [0, 2, 5])
@pytest.mark.parametrize("restored", [True, False])
@pytest.mark.parametrize("what", ["number", "tensor", "tensor with gradient"])
def test_R10_globals_that_forward_reads_are_right_or_refused(what: str, restored: bool, when: int) -> None:
    """Guards: the check of every step, and of tensors that a replay reads and the loop did not."""

    def body(fnet: Any, diffopt: Any) -> list[Tensor]:
        leaf = torch.tensor(1.5, requires_grad=True)
        _gain[0], _learned[0] = 1.0, torch.ones(())
        for t in range(STEPS):
            changed = t == when or (t > when and not restored)
            _gain[0] = 2.0 if what == "number" and changed else 1.0
            _learned[0] = torch.ones(())
            if what != "number" and changed:
                _learned[0] = 2 * leaf if what == "tensor with gradient" else torch.full((), 2.0)
            diffopt.step(squared_error(fnet, t))
        return [leaf] if what == "tensor with gradient" else []

    assert_exact_or_refused(loop_of(body, ReadsGlobals))


@pytest.mark.parametrize("when", [0, 2, 6])
def test_R10_a_hook_on_a_tensor_of_the_loop_is_right_or_refused(when: int) -> None:
    """`register_hook` changes the gradient but not the loss."""

    def body(fnet: Any, diffopt: Any) -> None:
        for t in range(STEPS):
            x, y = batch(t)
            out = fnet(x)
            if t == when:
                out.register_hook(lambda grad: 3 * grad)
            diffopt.step((out - y).square().mean())

    assert_exact_or_refused(loop_of(body))


def test_R6_grad_callback_with_a_rebound_tensor_is_right_or_refused() -> None:
    """Guards: a replayed callback that reads a tensor which the loop's did not; all values agree, the gradient is
    lost."""

    def body(fnet: Any, diffopt: Any) -> list[Tensor]:
        leaf = torch.tensor(0.5, requires_grad=True)
        for t in range(STEPS):
            scale = leaf * 1.0
            diffopt.step(squared_error(fnet, t), grad_callback=lambda grads: [scale * grad for grad in grads])  # noqa: B023
        return [leaf]

    assert_exact_or_refused(loop_of(body))


@pytest.mark.parametrize("what", ["number", "tensor with gradient", "weights by closure"])
def test_R10_what_grad_callback_reads_is_right_or_refused(what: str) -> None:
    """Guards: the gradients are checked after the callback; a replayed callback gets the weights of its own step."""

    def body(fnet: Any, diffopt: Any) -> list[Tensor]:
        leaf, gain = torch.tensor(0.5, requires_grad=True), [1.0, torch.ones(())]

        def callback(grads: list[Tensor]) -> list[Tensor]:
            if what == "weights by closure":
                return [grad + leaf * weight for grad, weight in zip(grads, fnet.parameters(), strict=True)]
            return [grad * (gain[0] if what == "number" else gain[1]) for grad in grads]

        for t in range(STEPS):
            gain[:] = [1.0 + t, leaf * (1 + t)]
            diffopt.step(squared_error(fnet, t), grad_callback=callback)
        return [] if what == "number" else [leaf]

    outcomes = assert_exact_or_refused(loop_of(body))
    if what == "weights by closure":
        assert set(outcomes) == {"exact"}


def test_R6_grad_callback_with_weights_and_learned_tensors() -> None:
    """A learned optimizer: a network applied to gradients and weights."""

    def body(fnet: Any, diffopt: Any) -> list[Tensor]:
        rule = seeded(lambda: nn.Linear(2, 1))

        def callback(grads: list[Tensor]) -> list[Tensor]:
            return [
                grad + rule(torch.stack([grad, weight], -1)).squeeze(-1)
                for grad, weight in zip(grads, fnet.parameters(), strict=True)
            ]

        for t in range(STEPS):
            diffopt.step(squared_error(fnet, t), grad_callback=callback)
        return list(rule.parameters())

    assert_exact(body)


class TwoHeads(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.body, self.heads = nn.Linear(3, 4), nn.ModuleList([nn.Linear(4, 1), nn.Linear(4, 1)])

    def forward(self, x: Tensor, head: int = 0) -> Tensor:
        return self.heads[head](self.body(x).tanh())


@pytest.mark.parametrize("what", ["fills in zeros", "reads all weights", "leaves it"])
def test_R6_grad_callback_and_a_weight_without_a_gradient(what: str) -> None:
    """A head that is idle for some steps: the callback may move it (weight decay acts on it then), or read it."""

    def body(fnet: Any, diffopt: Any) -> None:
        diffopt.param_groups[0]["weight_decay"] = 0.3

        def callback(grads: list[Tensor | None]) -> list[Tensor | None]:
            weights = list(fnet.parameters())
            if what == "fills in zeros":
                return [torch.zeros_like(w) if grad is None else grad for grad, w in zip(grads, weights, strict=True)]
            if what == "reads all weights":
                total = sum(weight.sin().sum() for weight in weights)
                return [None if grad is None else grad + 0.1 * total for grad in grads]
            return grads

        for t in range(STEPS):
            x, y = batch(t)
            diffopt.step((fnet(x, int(t > 3)) - y).square().mean(), grad_callback=callback)

    loop = loop_of(body, TwoHeads, outer=lambda fnet: (fnet(X) + fnet(X, 1)).square().mean())
    with contextlib.suppress(ValueError):  # to fill in what is None may be refused, in the full unroll too
        assert_matches_unrolled(loop)


class Record(nn.Module):
    """Takes its batch as an object, and returns one."""

    def __init__(self) -> None:
        super().__init__()
        self.encoder, self.decoder = Encoder(), Decoder()

    def forward(self, given: Any) -> Tensor:
        if isinstance(given, Tensor):
            given = OrderedDict(x=given)
        return self.decoder(self.encoder(given))


class Encoder(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.inner = nn.Linear(3, 4)

    def forward(self, given: OrderedDict[str, Tensor]) -> OrderedDict[str, Tensor]:
        return OrderedDict(hidden=self.inner(given["x"]).tanh())


class Decoder(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.outer = nn.Linear(4, 1)

    def forward(self, given: OrderedDict[str, Tensor]) -> Tensor:
        return self.outer(given["hidden"])


def test_R6_tensors_inside_an_ordered_dictionary_get_their_gradient() -> None:
    """What Hugging Face models take and return. Guards: the same tensors are found in the loop and in the replay."""

    def body(fnet: Any, diffopt: Any) -> list[Tensor]:
        shift = torch.zeros(3, requires_grad=True)
        for t in range(STEPS):
            x, y = batch(t)
            diffopt.step((fnet(OrderedDict(x=x + shift)) - y).square().mean())
        return [shift]

    assert_exact(body, Record)


def test_R9_an_ordered_dictionary_between_submodules_is_followed() -> None:
    def body(fnet: Any, diffopt: Any) -> None:
        for t in range(STEPS):
            x, y = batch(t)
            diffopt.step((fnet.decoder(fnet.encoder(OrderedDict(x=x))) - y).square().mean())

    assert_exact(body, Record)


def test_R4_a_batch_object_reused_for_the_next_step_is_right_or_refused() -> None:
    class Batch:
        x: Tensor

    class Takes(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.inner = nn.Linear(3, 1)

        def forward(self, given: Any) -> Tensor:
            return self.inner(given if isinstance(given, Tensor) else given.x).tanh()

    def body(fnet: Any, diffopt: Any, kept: bool) -> None:
        given: Any = Batch()
        for t in range(STEPS):
            given = Batch() if kept and t not in (2, 3, 5) else given
            given.x, y = batch(t)
            diffopt.step((fnet(given) - y).square().mean())

    for kept in (True, False):
        assert_exact_or_refused(loop_of(functools.partial(body, kept=kept), Takes))


# ------------------------------------------------------------------------------------------- attributes kept by
# reference


class Holds(nn.Module):
    """Multiplies by what `get` finds in an attribute that is no tensor."""

    def __init__(self, held: Any, get: Callable[[Any], Tensor]) -> None:
        super().__init__()
        self.inner = nn.Linear(3, 1)
        self.held, self.get = held, get

    def forward(self, x: Tensor) -> Tensor:
        return torch.tanh(self.inner(x) * self.get(self.held))


class Namespace:
    def __init__(self, tensor: Tensor) -> None:
        self.tensor = tensor


@pytest.mark.parametrize("leaf", [True, False], ids=["leaf", "not a leaf"])
@pytest.mark.parametrize(
    ("hold", "get"),
    [
        (lambda tensor: [tensor], lambda held: held[0]),
        (lambda tensor: {"gain": (tensor, 1)}, lambda held: held["gain"][0]),
        (Namespace, lambda held: held.tensor),
        (lambda tensor: functools.partial(torch.mul, tensor), lambda held: held(2.0)),
        (lambda tensor: lambda: tensor, lambda held: held()),
    ],
    ids=["list", "dictionary", "object", "partial", "closure"],
)
def test_R6_a_learned_tensor_inside_an_attribute_gets_its_gradient(
    hold: Callable[[Tensor], Any], get: Callable[[Any], Tensor], leaf: bool
) -> None:
    """Guards: the copy of the structure shares what it does not own. `higher` shares every attribute by reference."""
    source = torch.tensor(0.7, requires_grad=True)
    tensor = source if leaf else source.exp()

    def body(fnet: Any, diffopt: Any) -> list[Tensor]:
        plain(fnet, diffopt)
        return [source]

    def model() -> nn.Module:
        return Holds(hold(source if leaf else source.exp()), get)

    del tensor
    gradients = loop_of(body, model)()
    assert gradients[-1] is not None
    assert gradients[-1] != 0
    assert_exact(body, model)


def test_R6_a_module_hidden_in_a_list_gets_its_gradient() -> None:
    """`self.teacher = [teacher]` keeps it out of `parameters()`; it is the user's, not a part to copy."""
    teacher = seeded(lambda: nn.Linear(3, 1))

    class Student(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.inner, self.hidden = nn.Linear(3, 1), [teacher]

        def forward(self, x: Tensor) -> Tensor:
            return self.inner(x).tanh() + self.hidden[0](x)

    def body(fnet: Any, diffopt: Any) -> list[Tensor]:
        plain(fnet, diffopt)
        return list(teacher.parameters())

    assert all(grad is not None for grad in loop_of(body, Student)())
    assert_exact(body, Student)


def test_a_model_may_hold_what_cannot_be_copied() -> None:
    def model() -> nn.Module:
        net = mlp()
        net.lock, net.thread_local, net.generator = threading.Lock(), threading.local(), torch.Generator()
        return net

    assert_exact(plain, model)


# ------------------------------------------------------------------------------------------------------------- verify


@pytest.mark.parametrize("when", [0, 2, 6])
def test_R10_verify_all_finds_a_change_at_any_step(when: int) -> None:
    """Guards: `verify="all"` checks every replay."""

    def body(fnet: Any, diffopt: Any) -> None:
        for t in range(STEPS):
            _gain[0] = 2.0 if t == when else 1.0
            _learned[0] = torch.ones(())
            diffopt.step(squared_error(fnet, t))
        _gain[0] = 1.0

    assert_refused(
        body, ReadsGlobals, error=higher.ReplayMismatchError, match=f"step {when}.*Likely causes", verify="all"
    )


def test_R10_verify_new_checks_each_new_program() -> None:
    """Guards: the first use of a program is checked, whenever it comes."""

    def body(fnet: Any, diffopt: Any) -> None:
        for t in range(STEPS):
            _gain[0], _learned[0] = (2.0, torch.ones(())) if t == 4 else (1.0, torch.ones(()))
            loss = squared_error(fnet, t)
            diffopt.step(loss.sqrt() if t == 4 else loss)  # another program
        _gain[0] = 1.0

    assert_refused(body, ReadsGlobals, error=higher.ReplayMismatchError, match="step 4")


def test_R10_the_error_names_step_tensor_values_and_causes() -> None:
    def body(fnet: Any, diffopt: Any) -> None:
        for t in range(STEPS):
            _gain[0], _learned[0] = 1.0 + t, torch.ones(())
            diffopt.step(squared_error(fnet, t))

    assert_refused(
        body,
        ReadsGlobals,
        error=higher.ReplayMismatchError,
        match=r"step \d differs .*: the (loss|sum of the gradient of inner.weight) was -?[\d.e-]+ in your loop and is "
        r"-?[\d.e-]+ now. Likely causes: ",
        verify="all",
    )


class GainBackward(torch.autograd.Function):
    """The identity, whose backward reads a global."""

    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        return x.clone()

    @staticmethod
    def backward(ctx: Any, cotangent: Tensor) -> Tensor:
        return _gain[0] * cotangent


@pytest.mark.parametrize("verify", ["new", "all"])
def test_R10_gradients_are_compared_where_the_loss_is_the_same(verify: str) -> None:
    """Guards: the fingerprint of gradients. The global changes after the loop, the loss does not depend on it."""
    net = nn.Linear(3, 1).double()
    x = torch.sin(torch.arange(12.0, dtype=torch.float64)).reshape(4, 3)
    opt = torch.optim.SGD(net.parameters(), lr=0.1)
    _gain[0] = 1.0
    try:
        with higher.innerloop_ctx(net, opt, checkpoint_every=1, verify=verify) as (fnet, diffopt):
            for _ in range(4):  # the fourth use of the program is compared, also by verify="new"
                diffopt.step(GainBackward.apply(fnet(x)).square().mean())
            outer = fnet(x).sum()
            _gain[0] = 1.5
            with pytest.raises(higher.ReplayMismatchError, match=r"the (sum|norm) of the gradient of weight was"):
                torch.autograd.grad(outer, list(fnet.parameters(time=0)))
    finally:
        _gain[0] = 1.0


@pytest.mark.parametrize("gain", [0.0, 1e-20, 0.5])
@pytest.mark.parametrize("which", ["every weight", "one weight"])
@pytest.mark.parametrize("setting", [{"checkpoint_every": 1}, {"checkpoint_every": 3, "graphs": 3}], ids=str)
def test_R10_a_gradient_that_vanishes_in_the_replay_alone_is_found(
    setting: dict[str, Any], which: str, gain: float
) -> None:
    """Guards: the norms of the loop's gradients in a mark. The third use of a program has no fingerprint, its loss is
    the same, and a replayed gradient of zero looks like one that is nothing but rounding."""
    net = nn.Sequential(nn.Linear(3, 2), nn.Tanh(), nn.Linear(2, 1)).double()
    x = torch.sin(torch.arange(12.0, dtype=torch.float64)).reshape(4, 3)
    opt = torch.optim.SGD(net.parameters(), lr=0.1)

    def loss(fnet: Any) -> Tensor:
        if which == "every weight":
            return GainBackward.apply(fnet(x)).square().mean()
        return (fnet(x) + 0 * fnet[0].weight.sum() + GainBackward.apply(fnet[2].bias)).square().mean()

    _gain[0] = 1.0
    try:
        with higher.innerloop_ctx(net, opt, **setting) as (fnet, diffopt):
            for _ in range(3):
                diffopt.step(loss(fnet))
            outer, newest = fnet(x).sum(), list(fnet.parameters(time=2))
            _gain[0] = gain
            with pytest.raises(higher.ReplayMismatchError, match=r"The replay (up to|of) step"):
                torch.autograd.grad(outer, newest)
    finally:
        _gain[0] = 1.0


def test_verify_off_checks_nothing_and_is_exact() -> None:
    def body(fnet: Any, diffopt: Any) -> None:
        for t in range(STEPS):
            _gain[0], _learned[0] = 1.0 + t, torch.ones(())
            diffopt.step(squared_error(fnet, t))

    for setting in SETTINGS:
        loop_of(body, ReadsGlobals)(**setting, verify="off")  # wrong, as ordered
    for verify in ("off", "all", "new"):
        assert_matches_unrolled(loop_of(plain, BatchNormNet), checkpoint_every=(2,), verify=(verify,))


# -------------------------------------------------------------------------------------------------- memory and garbage


@pytest.mark.parametrize("backward", [True, False])
@pytest.mark.parametrize("setting", [{}, *SETTINGS], ids=str)
def test_R11_everything_is_freed_without_the_garbage_collector(setting: dict[str, Any], backward: bool) -> None:
    """Guards: no reference leads from what a step keeps back to the fmodel, the optimizer or a later tensor."""
    net = seeded(BatchNormNet)
    opt = sgd(net)

    def run() -> list[weakref.ref[Any]]:
        with higher.innerloop_ctx(net, opt, copy_initial_weights=False, **setting) as (fnet, diffopt):
            for t in range(STEPS):
                if t % 2:
                    diffopt.step(lambda fnet, t: squared_error(fnet, t), t)
                else:
                    diffopt.step(squared_error(fnet, t), grad_callback=list)
                fnet(X)
        outer = outer_loss(fnet)
        list(fnet.parameters(time=2))
        if backward:
            outer.backward()
        return [weakref.ref(thing) for thing in (fnet, fnet.norm, diffopt, outer, *fnet.parameters())]

    run()  # caches of torch and of classes
    gc.collect()
    gc.disable()
    try:
        assert [reference() for reference in run()] == [None] * 10
    finally:
        gc.enable()


@pytest.mark.parametrize("setting", SETTINGS, ids=str)
def test_R11_memory_is_back_after_the_backward(setting: dict[str, Any]) -> None:
    """Guards: `spent` and the weak history: only the current weights, state and buffers stay."""
    net = seeded(BatchNormNet)

    def cut(fnet: Any, diffopt: Any) -> None:
        fnet.update_params([weight.detach().requires_grad_() for weight in fnet.parameters()])
        for entries in diffopt.state:
            for entry in entries.values():
                entry.update({name: value.detach() for name, value in entry.items()})

    with (
        higher.innerloop_ctx(net, sgd(net), copy_initial_weights=False, **setting) as (fnet, diffopt),
        live_bytes() as memory,
    ):
        levels = []
        for _ in range(4):
            start = list(fnet.parameters())
            plain(fnet, diffopt)
            before = memory.current
            torch.autograd.grad(outer_loss(fnet), start)
            assert memory.current < before
            cut(fnet, diffopt)
            levels.append(memory.current)
    # A truncation leaves the weights that were handed to `update_params`, as times of the history; nothing else.
    assert levels[3] <= levels[1] + 2 * sum(param.nbytes for param in net.parameters())


def big_net() -> nn.Module:
    return nn.Sequential(nn.Linear(50, 50), nn.Tanh(), nn.Linear(50, 10))


EVALUATIONS: dict[str, Callable[[Any, Tensor, list[Any]], None]] = {
    "without gradient": lambda fnet, x, kept: _no_grad(fnet, x),
    "with gradient": lambda fnet, x, kept: fnet(x).sum(),
    "counted in place": lambda fnet, x, kept: kept[0].add_((fnet(x).argmax(1) == 0).sum()),
    "counted": lambda fnet, x, kept: kept.__setitem__(0, kept[0] + (fnet(x).argmax(1) == 0).sum()),
    "summed": lambda fnet, x, kept: kept.__setitem__(1, kept[1] + fnet(x).mean().detach()),
    "averaged": lambda fnet, x, kept: kept.__setitem__(2, 0.9 * kept[2] + 0.1 * fnet(x).detach()),
    "averaged in place": lambda fnet, x, kept: kept[2].mul_(0.9).add_(fnet(x).detach(), alpha=0.1),
}


def _no_grad(fnet: Any, x: Tensor) -> None:
    with torch.no_grad():
        fnet(x).argmax(1)


def nodes_alive() -> int:
    return sum(type(thing) is higher.record.Node for thing in gc.get_objects())


@pytest.mark.parametrize("evaluate", EVALUATIONS.values(), ids=EVALUATIONS.keys())
def test_evaluations_between_two_steps_leave_nothing(evaluate: Callable[[Any, Tensor, list[Any]], None]) -> None:
    """Guards: the shadow graph is held by the tensors of the user alone. 10,000 batches in all."""
    net = seeded(big_net)
    with (
        higher.innerloop_ctx(net, sgd(net), copy_initial_weights=False, checkpoint_every=3) as (fnet, diffopt),
        live_bytes() as memory,
    ):
        for _ in range(2):
            diffopt.step(fnet(torch.ones(4, 50)).square().mean())
        kept: list[Any] = [torch.zeros((), dtype=torch.long), torch.zeros(()), torch.zeros(16, 10)]

        def batches(count: int, kept: list[Any]) -> None:
            for _ in range(count):
                evaluate(fnet, torch.full((16, 50), 0.1), kept)

        batches(3, kept)
        bytes_before, nodes_before = memory.current, nodes_alive()
        batches(10_000 // len(EVALUATIONS), kept)
        assert memory.current <= bytes_before
        assert nodes_alive() <= nodes_before
        diffopt.step(fnet(torch.ones(4, 50)).square().mean())
        outer = fnet(torch.ones(1, 50)).sum()
        del kept
    outer.backward()


APPENDED: dict[str, Callable[[Any, Tensor], Tensor]] = {
    "losses": lambda fnet, x: fnet(x).mean().detach(),
    "predictions": lambda fnet, x: fnet(x).argmax(1),
    "logits": lambda fnet, x: fnet(x).detach(),
    "statistics of the batch": lambda fnet, x: x.mean(0),
}


@pytest.mark.parametrize("mode", [torch.no_grad, torch.enable_grad])
@pytest.mark.parametrize("what", APPENDED)
def test_results_of_evaluations_that_are_kept_cost_their_own_bytes_only(what: str, mode: Any) -> None:
    """Guards: a result without gradient must not hold the batch and the graph that it was made from."""
    net = seeded(big_net)
    with higher.innerloop_ctx(net, sgd(net), checkpoint_every=3) as (fnet, diffopt), live_bytes() as memory:
        diffopt.step(fnet(torch.ones(4, 50)).square().mean())
        kept = []

        def batches(count: int) -> int:
            start = memory.current
            for _ in range(count):
                with mode():
                    kept.append(APPENDED[what](fnet, torch.from_numpy(np.full((16, 50), 0.1))))
            return memory.current - start

        batches(3)
        assert batches(40) <= 40 * (kept[0].nbytes + 64)


@pytest.mark.parametrize("detached", [True, False])
def test_activations_that_the_model_keeps_on_itself_do_not_pile_up(detached: bool) -> None:
    """Guards: the state of the model that a step records does not hold the graph of the step before."""

    class Remembers(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.inner, self.outer = nn.Linear(50, 50), nn.Linear(50, 1)

        def forward(self, x: Tensor) -> Tensor:
            self.last = self.inner(x).tanh()
            if detached:
                self.last = self.last.detach()
                return self.outer(self.inner(x).tanh())
            return self.outer(self.last)

    def grows_by(steps: int) -> int:
        net = seeded(Remembers)
        x = torch.ones(16, 50)
        with higher.innerloop_ctx(net, sgd(net), checkpoint_every=5) as (fnet, diffopt), live_bytes() as memory:
            for _ in range(steps):
                diffopt.step(fnet(x).square().mean())
            return memory.current - diffopt.report.carries_peak_bytes

    assert grows_by(25) <= grows_by(10) + 2000


# ------------------------------------------------------------------------------------------------------------ threads


def in_thread(work: Callable[[], None]) -> None:
    errors: list[BaseException] = []

    def run() -> None:
        try:
            work()
        except BaseException as error:  # noqa: BLE001  # handed to the test
            errors.append(error)

    thread = threading.Thread(target=run)
    thread.start()
    thread.join(30)
    assert not thread.is_alive()
    if errors:
        raise errors[0]


class Waits(nn.Module):
    """Runs something in the middle of its forward, once."""

    def __init__(self, work: Callable[[], None] | None = None) -> None:
        super().__init__()
        self.inner, self.norm, self.work = nn.Linear(3, 1), nn.BatchNorm1d(1), work

    def forward(self, x: Tensor) -> Tensor:
        work, self.work = self.work, None
        if work is not None:
            work()
        return self.norm(self.inner(x))


def plain_torch() -> list[Tensor]:
    """A few lines of torch that use all that the engine patches."""
    net = seeded(lambda: nn.Sequential(nn.Linear(3, 4), nn.Tanh(), nn.Linear(4, 1))).double()
    x = X[:5].clone().requires_grad_()
    out = checkpoint(net, x, use_reentrant=False)
    out = straight_through(out, torch.tensor(0.1, dtype=torch.float64))
    return [out.detach(), *torch.autograd.grad(out.sum(), [x, *net.parameters()])]


@pytest.mark.parametrize("where", ["in the loop", "in forward", "in a replay"])
def test_another_thread_that_runs_plain_torch_is_unaffected(where: str) -> None:
    """Guards: the recorder's mode is the thread's own, and so must be the patched `apply` and `checkpoint`."""
    expected, found = plain_torch(), []

    def work() -> None:
        in_thread(lambda: found.extend(plain_torch()))

    net = seeded(Waits)
    with higher.innerloop_ctx(net, sgd(net), copy_initial_weights=False, checkpoint_every=2) as (fnet, diffopt):
        diffopt.step(squared_error(fnet, 0))
        if where == "in the loop":
            work()
        elif where == "in forward":
            fnet.work = work
            fnet(X)
        else:
            diffopt.step(lambda fnet, x: work() or fnet(x).square().mean(), X)
        diffopt.step(squared_error(fnet, 1))
        outer_loss(fnet).backward()
    assert len(found) >= len(expected)
    for ours, theirs in zip(found, expected, strict=False):
        assert torch.equal(ours, theirs)


def test_a_checkpoint_begun_in_another_thread_keeps_clear_of_our_weights() -> None:
    """Guards: `weights_follow_recompute` wraps the calls of its own thread only."""
    begun: list[Tensor] = []
    lin = nn.Linear(3, 3).double()

    def work() -> None:
        in_thread(lambda: begun.append(checkpoint(lambda x: lin(x).tanh(), X, use_reentrant=False).sum()))

    def run() -> None:
        net = seeded(Waits)
        with higher.innerloop_ctx(net, sgd(net), checkpoint_every=2) as (fnet, _):
            fnet.work = work
            fnet(X)

    run()
    begun[0].backward()
    assert lin.weight.grad is not None


@pytest.mark.parametrize("inside", ["context", "forward"])
def test_contexts_of_two_threads_overlap_and_leave_torch_as_it_was(
    inside: str, global_state: Callable[[], Any]
) -> None:
    """Guards: what is patched for the process is counted by thread. conftest would see what is left behind, too."""
    flags = global_state()
    entered = [threading.Event(), threading.Event()]
    left = threading.Event()
    errors: list[BaseException] = []

    def wait(index: int) -> None:
        entered[index].set()
        assert (entered[1] if index == 0 else left).wait(20)

    def train(index: int) -> None:
        try:
            torch.set_default_dtype(torch.float64)
            if index == 1:
                assert entered[0].wait(20)
            net = Waits((lambda: wait(index)) if inside == "forward" else None)
            with higher.innerloop_ctx(net, sgd(net), copy_initial_weights=False, checkpoint_every=2) as (fnet, diffopt):
                if inside == "context":
                    wait(index)
                x = straight_through(X, torch.tensor(0.1))
                for _ in range(3):
                    diffopt.step(straight_through(fnet(x), torch.tensor(0.01)).square().mean())
            outer_loss(fnet).backward()
        except BaseException as error:  # noqa: BLE001  # handed to the test
            errors.append(error)
        finally:
            entered[index].set()
            if index == 0:
                left.set()

    threads = [threading.Thread(target=train, args=(index,)) for index in range(2)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(30)
    after = global_state()
    function = torch.autograd.function._SingleLevelFunction
    if "apply" in vars(function) and not flags["custom functions' apply"]:
        del function.apply
    torch.utils.checkpoint._checkpoint_without_reentrant_generator = _original_generator
    assert not errors, errors
    assert after == flags


_original_generator = torch.utils.checkpoint._checkpoint_without_reentrant_generator


def test_an_outer_backward_may_run_in_another_thread() -> None:
    def loop(**settings: Any) -> list[Tensor]:
        net = seeded(BatchNormNet)
        with higher.innerloop_ctx(net, sgd(net), copy_initial_weights=False, **settings) as (fnet, diffopt):
            plain(fnet, diffopt)
            outer, found = outer_loss(fnet), []
            in_thread(lambda: found.extend(torch.autograd.grad(outer, list(net.parameters()))))
        return found

    assert_matches_unrolled(loop)
