"""`truncate=K` equals detaching by hand K steps before the end, `first_order=True` detaching every inner gradient.

Both cost the passes and the memory that they promise.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from loops import Loop, Run, gradients, mlp, rows, sgd_for
from torch import Tensor, nn

import lowmem_higher
from lowmem_higher import HistoryFreedError
from lowmem_higher.testing import live_bytes

Optimizers = Callable[[nn.Module], torch.optim.Optimizer]
BOUNDED: dict[str, Any] = {"checkpoints": 2}
SETTINGS: list[dict[str, Any]] = [
    {},
    {"checkpoint_every": 1},
    {"checkpoint_every": 3},
    {"checkpoint_every": 10},
    {"checkpoint_every": 3, "replay": "torch"},
]


def label(setting: dict[str, Any]) -> str:
    return ", ".join(f"{key}={value}" for key, value in setting.items()) or "unrolled"


def adam_for(net: nn.Module) -> torch.optim.Optimizer:
    return torch.optim.Adam(net.parameters(), lr=0.1)


def normed(inputs: int = 3) -> nn.Module:
    return nn.Sequential(
        nn.Linear(inputs, 4, bias=False), nn.BatchNorm1d(4), nn.Tanh(), nn.Dropout(0.2), nn.Linear(4, 1)
    )


NETS: list[tuple[Callable[[], nn.Module], Optimizers]] = [(mlp, adam_for), (normed, sgd_for)]


def assert_same(found: dict[str, Tensor | None], expected: dict[str, Tensor | None]) -> None:
    assert found.keys() == expected.keys()
    assert any(gradient is not None for gradient in expected.values())
    for name, reference in expected.items():
        gradient = found[name]
        assert (gradient is None) == (reference is None), name
        if gradient is not None and reference is not None:
            assert reference.norm() > 1e-7, name
            assert (gradient - reference).norm() <= 1e-9 * reference.norm(), name


def train(run: Run, net: nn.Module, opt: Optimizers, cut_at: int | None = None, **more: Any) -> Tensor:
    """Learned example weights, one for each step, and a learned rate; `cut_at` detaches by hand before that step."""
    run.net(net)
    x, y, lr = run.data(12, 3), run.data(12, 1), run.leaf("lr", 0.1)
    weights = [run.leaf(f"weights of step {t}", run.data(12)) for t in range(run.steps)]
    with run.context(net, opt(net), {"lr": [lr]}) as (fnet, diffopt):
        for t in range(run.steps):
            if t == cut_at:
                fnet.update_params([weight.detach().requires_grad_() for weight in fnet.parameters()])
                for entry in diffopt.state[0].values():
                    entry.update({k: v.detach() for k, v in entry.items() if isinstance(v, Tensor)})
            errors = (fnet(x[rows(t)]) - y[rows(t)]).square().squeeze(1)
            diffopt.step((errors * weights[t][rows(t)].sigmoid()).mean(), **more)
        return fnet(x).tanh().sum()


# ---------------------------------------------------------------------------------------------------------- truncation


@pytest.mark.parametrize("K", [1, 4, 9])
@pytest.mark.parametrize("setting", SETTINGS, ids=label)
@pytest.mark.parametrize(("net", "opt"), NETS)
def test_truncation_equals_detaching_by_hand(
    net: Callable[[], nn.Module], opt: Optimizers, setting: dict[str, Any], K: int
) -> None:
    steps = 9
    with torch.random.fork_rng():
        expected = gradients(lambda run: train(run, net(), opt, steps - K if steps > K else None), steps)
    with torch.random.fork_rng():
        found = gradients(lambda run: train(run, net(), opt), steps, truncate=K, **setting)
    assert sum(gradient is not None for gradient in expected.values()) >= min(K, steps)
    assert_same(found, expected)


@pytest.mark.parametrize("setting", SETTINGS, ids=label)
def test_several_outer_losses_end_at_the_same_step(setting: dict[str, Any]) -> None:
    """The window is counted from the last step taken when the backward runs, for outer losses of any time."""

    def loop(run: Run, cut_by_hand: bool) -> Tensor:
        net, x, y, rate = run.net(mlp()), run.data(12, 3), run.data(12, 1), run.leaf("rate", 0.3)
        outer = torch.zeros((), dtype=torch.float64)
        with run.context(net, sgd_for(net)) as (fnet, diffopt):
            for t in range(run.steps):
                fnet.update_params([rate * weight for weight in fnet.parameters()])
                diffopt.step((fnet(x[rows(t)]) - y[rows(t)]).square().mean())
                if cut_by_hand and t < run.steps - 3:
                    fnet.update_params([weight.detach().requires_grad_() for weight in fnet.parameters()])
                    for entry in diffopt.state[0].values():
                        entry["momentum_buffer"] = entry["momentum_buffer"].detach()
                outer = outer + (fnet(x) * (t + 1)).tanh().sum()
        return outer + fnet.init_fast_params[0].sin().sum()

    expected = gradients(lambda run: loop(run, True), 7)
    found = gradients(lambda run: loop(run, False), 7, truncate=3, **setting)
    assert found["2.bias"] is None
    assert expected["rate"] is not None
    assert_same({"rate": found["rate"], "0.weight": found["0.weight"]}, {k: expected[k] for k in ("rate", "0.weight")})


@pytest.mark.parametrize("setting", SETTINGS, ids=label)
def test_backward_again_and_again_with_a_sliding_window(setting: dict[str, Any]) -> None:
    """Truncated backpropagation through time: a backward after each step, through the last two."""

    def collected(run: Run) -> list[Tensor]:
        net, x, y, lr = run.net(mlp()), run.data(12, 3), run.data(12, 1), run.leaf("lr", 0.2)
        found = []
        with run.context(net, sgd_for(net), {"lr": [lr]}) as (fnet, diffopt):
            for t in range(run.steps):
                diffopt.step((fnet(x[rows(t)]) - y[rows(t)]).square().mean())
                found.append(torch.autograd.grad(fnet(x).tanh().sum(), lr, retain_graph=True)[0])
        return found

    found = collected(Run(5, truncate=2, **setting))
    for t, gradient in enumerate(found):

        def loop(run: Run, t: int = t) -> Tensor:
            net, x, y, lr = run.net(mlp()), run.data(12, 3), run.data(12, 1), run.leaf("lr", 0.2)
            with run.context(net, sgd_for(net), {"lr": [lr]}) as (fnet, diffopt):
                for s in range(t + 1):
                    if s == t - 1:
                        fnet.update_params([weight.detach().requires_grad_() for weight in fnet.parameters()])
                        for entry in diffopt.state[0].values():
                            entry["momentum_buffer"] = entry["momentum_buffer"].detach()
                    diffopt.step((fnet(x[rows(s)]) - y[rows(s)]).square().mean())
                return fnet(x).tanh().sum()

        assert_same({"lr": gradient}, {"lr": gradients(loop, t + 1)["lr"]})


@pytest.mark.parametrize(("T", "N", "K"), [(23, 1, 5), (23, 4, 5), (23, 4, 1), (40, 7, 10), (10, 30, 3)])
def test_passes_of_a_truncated_run(T: int, N: int, K: int) -> None:
    run = Run(T, checkpoint_every=N, truncate=K)
    net, x = run.net(mlp()), run.data(12, 3)
    with run.context(net, sgd_for(net)) as (fnet, diffopt):
        for t in range(T):
            diffopt.step(fnet(x[rows(t)]).sin().mean())
        held = diffopt.report.checkpoints_held
        fnet(x).sum().backward()
    assert held <= -(-K // N) + 1
    assert diffopt.report.second_order_runs == K
    assert diffopt.report.first_order_runs <= T + K + N
    assert all(param.grad is None for param in net.parameters())


def peak(T: int, **settings: Any) -> int:
    net = nn.Sequential(nn.Linear(20, 50), nn.Tanh(), nn.Linear(50, 1)).double()
    opt = torch.optim.SGD(net.parameters(), lr=0.1, momentum=0.9)
    context = lowmem_higher.innerloop_ctx(net, opt, copy_initial_weights=False, **settings)
    with live_bytes() as memory, context as (fnet, diffopt):
        for t in range(T):
            diffopt.step((fnet(torch.full((30, 20), 0.1 * (t % 7), dtype=torch.float64)) - 1).square().mean())
        fnet(torch.ones(3, 20, dtype=torch.float64)).sum().backward()
    return memory.peak


@pytest.mark.parametrize("N", [1, 5])
def test_memory_of_a_truncated_run_does_not_grow(N: int) -> None:
    short, long = peak(15, checkpoint_every=N, truncate=5), peak(60, checkpoint_every=N, truncate=5)
    assert long <= 1.02 * short
    assert peak(60, checkpoint_every=N) > 1.5 * long  # each step brings a batch of its own, which is held otherwise


def test_weights_out_of_reach_are_gone_and_say_so() -> None:
    run = Run(9, checkpoint_every=2, truncate=3)
    net, x = run.net(mlp()), run.data(12, 3)
    with run.context(net, sgd_for(net)) as (fnet, diffopt):
        for t in range(run.steps):
            diffopt.step(fnet(x[rows(t)]).sin().mean())
        assert len(list(fnet.parameters(time=7))) == 4
        with pytest.raises(HistoryFreedError, match="truncate=K"):
            list(fnet.parameters(time=4))
        grads = torch.autograd.grad(fnet(x).sum(), list(fnet.parameters(time=7)))
    assert all(grad.norm() > 0 for grad in grads[:2])


def test_an_untracked_loop_may_be_truncated() -> None:
    run = Run(3, track_higher_grads=False, truncate=1, checkpoint_every=2)
    net, x = run.net(mlp()), run.data(12, 3)
    with run.context(net, sgd_for(net)) as (fnet, diffopt):
        for t in range(run.steps):
            assert all(weight.is_leaf for weight in diffopt.step(fnet(x[rows(t)]).sin().mean()))


@pytest.mark.parametrize(
    ("value", "error"), [(0, ValueError), (-1, ValueError), (2.0, TypeError), (True, TypeError), ("3", TypeError)]
)
def test_what_truncate_may_be(value: Any, error: type[Exception]) -> None:
    net = nn.Linear(1, 1)
    with pytest.raises(error, match="truncate="):
        lowmem_higher.innerloop_ctx(net, sgd_for(net), truncate=value).__enter__()


def test_a_number_of_checkpoints_does_not_go_with_truncation() -> None:
    net = nn.Linear(1, 1)
    with pytest.raises(ValueError, match="checkpoint_every=10, truncate=3"):
        lowmem_higher.innerloop_ctx(net, sgd_for(net), checkpoints=4, truncate=3).__enter__()


# --------------------------------------------------------------------------------------------------------- first order


def first_order_by_hand(grads: list[Tensor | None]) -> list[Tensor | None]:
    return [None if grad is None else grad.detach() for grad in grads]


@pytest.mark.parametrize("setting", SETTINGS, ids=label)
@pytest.mark.parametrize(("net", "opt"), NETS)
def test_first_order_equals_detaching_each_inner_gradient(
    net: Callable[[], nn.Module], opt: Optimizers, setting: dict[str, Any]
) -> None:
    with torch.random.fork_rng():
        expected = gradients(lambda run: train(run, net(), opt, grad_callback=first_order_by_hand), 7)
    with torch.random.fork_rng():
        found = gradients(lambda run: train(run, net(), opt), 7, first_order=True, **setting)
    assert expected["lr"] is not None
    assert expected["0.weight"] is not None
    assert expected["weights of step 3"] is None  # it feeds inner losses only
    assert_same(found, expected)


def test_first_order_equals_that_of_higher() -> None:
    higher = pytest.importorskip("higher")

    def loop(run: Run) -> Tensor:
        net, x, y, lr = run.net(mlp()), run.data(12, 3), run.data(12, 1), run.leaf("lr", 0.1)
        callback = {"grad_callback": first_order_by_hand} if run.library is higher else {}
        with run.context(net, sgd_for(net), {"lr": [lr]}) as (fnet, diffopt):
            for t in range(run.steps):
                diffopt.step((fnet(x[rows(t)]) - y[rows(t)]).square().mean(), **callback)
            return fnet(x).tanh().sum()

    expected = gradients(loop, 6, library=higher)
    for setting in (*SETTINGS, BOUNDED):
        assert_same(gradients(loop, 6, first_order=True, **setting), expected)


@pytest.mark.parametrize("setting", SETTINGS, ids=label)
def test_a_callback_gets_the_gradients_as_constants_and_its_own_tensors_are_learned(setting: dict[str, Any]) -> None:
    def loop(run: Run, detach: bool) -> Tensor:
        net, x, scale = run.net(mlp()), run.data(12, 3), run.leaf("scale", 0.7)

        def scaled(grads: list[Tensor]) -> list[Tensor]:
            return [scale * (grad.detach() if detach else grad).tanh() for grad in grads]

        with run.context(net, sgd_for(net)) as (fnet, diffopt):
            for t in range(run.steps):
                diffopt.step(fnet(x[rows(t)]).sin().mean(), grad_callback=scaled)
            return fnet(x).tanh().sum()

    assert_same(
        gradients(lambda run: loop(run, False), 5, first_order=True, **setting),
        gradients(lambda run: loop(run, True), 5),
    )


@pytest.mark.parametrize(("T", "N"), [(12, 1), (12, 5), (12, 40)])
@pytest.mark.parametrize("replay", ["native", "torch"])
def test_first_order_takes_no_second_order_run(T: int, N: int, replay: str) -> None:
    run = Run(T, checkpoint_every=N, first_order=True, replay=replay)
    with run.context(net := run.net(mlp()), sgd_for(net)) as (fnet, diffopt):
        x = run.data(12, 3)
        for t in range(T):
            diffopt.step(fnet(x[rows(t)]).sin().mean())
        fnet(x).sum().backward()
    assert diffopt.report.second_order_runs == 0
    assert 2 * T <= diffopt.report.first_order_runs <= (3 if replay == "native" else 4) * T


def test_a_first_order_unroll_keeps_no_graph_of_a_loss() -> None:
    batch = 30 * 20 * 8
    assert peak(40, first_order=True) < peak(40) / 3
    growth = (peak(60, first_order=True) - peak(20, first_order=True)) / 40
    assert growth < 4 * 8 * (20 * 50 + 50 + 50 + 1) + batch  # gradient, momentum, weights: no activation


def test_a_first_order_unroll_counts_no_second_order_run() -> None:
    run = Run(4, first_order=True)
    with run.context(net := run.net(mlp()), sgd_for(net)) as (fnet, diffopt):
        x = run.data(12, 3)
        for t in range(4):
            diffopt.step(fnet(x[rows(t)]).sin().mean())
    assert (diffopt.report.first_order_runs, diffopt.report.second_order_runs) == (4, 0)


def test_both_at_once() -> None:
    def by_hand(run: Run) -> Tensor:
        return train(run, mlp(), sgd_for, 4, grad_callback=first_order_by_hand)

    loop: Loop = lambda run: train(run, mlp(), sgd_for)  # noqa: E731
    expected = gradients(by_hand, 7)
    for setting in SETTINGS:
        assert_same(gradients(loop, 7, first_order=True, truncate=3, **setting), expected)


def test_first_order_is_a_switch() -> None:
    net = nn.Linear(1, 1)
    with pytest.raises(TypeError, match="first_order=1 is a int"):
        lowmem_higher.innerloop_ctx(net, sgd_for(net), first_order=1).__enter__()  # type: ignore[arg-type]
