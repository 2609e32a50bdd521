"""The same loops on the real `higher`: the same gradients, times, types of errors. Its known bugs are left out.

Left out of the comparison (see the notes on `higher`): derivatives by Adam's beta2 and its place of eps, checkpoints
inside the model, direct calls of submodules after a step.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import loops
import pytest
import torch
from loops import Loop, Run, gradients, mlp, rows, sgd_for
from torch import Tensor, nn

import lowmem_higher

higher = pytest.importorskip("higher")

LIBRARIES = [pytest.param(higher, id="higher"), pytest.param(lowmem_higher, id="lowmem_higher")]


def adam_without_eps(run: Run, **options: Any) -> Tensor:
    """`higher` adds eps before the bias correction, torch after it: equal where eps is nothing."""
    net, x, y = run.net(mlp()), run.data(12, 3), run.data(12, 1)
    opt = torch.optim.Adam(net.parameters(), lr=0.05, betas=(0.8, 0.95), eps=1e-20, **options)
    override = {"lr": [run.leaf("lr", 0.05)], "weight_decay": [run.leaf("weight_decay", 0.1)]}
    with run.context(net, opt, override) as (fnet, diffopt):
        for t in range(run.steps):
            diffopt.step((fnet(x[rows(t)]) - y[rows(t)]).square().mean())
        return fnet(x).tanh().sum()


def adam_amsgrad(run: Run) -> Tensor:
    return adam_without_eps(run, amsgrad=True)


def sgd_groups(run: Run) -> Tensor:
    """Groups with their own tensors, Nesterov and plain, warm; a frozen parameter; per-step overrides that persist."""
    net, x, y = mlp(), run.data(12, 3), run.data(12, 1)
    net[0].bias.requires_grad_(False)
    run.net(net)
    opt = torch.optim.SGD(
        [
            {"params": net[0].parameters(), "nesterov": True, "weight_decay": 0.1},
            {"params": net[2].parameters(), "lr": 0.05, "momentum": 0.5, "dampening": 0.2},
        ],
        lr=0.1,
        momentum=0.9,
    )
    (net(x) - y).square().mean().backward()
    opt.step()
    rates = [run.leaf("lr of group 0", 0.1), run.leaf("lr of group 1", 0.2)]
    late = run.leaf("late momentum", 0.6)
    with run.context(net, opt, {"lr": rates}) as (fnet, diffopt):
        for t in range(run.steps):
            loss = (fnet(x[rows(t)]) - y[rows(t)]).square().mean()
            diffopt.step(loss, override={"momentum": [late]} if t == 2 else None)
        return fnet(x).tanh().sum()


def learning_rate_for_each_element(run: Run) -> Tensor:
    net, x, y = run.net(mlp()), run.data(12, 3), run.data(12, 1)
    rates = [run.leaf(f"lr of {name}", 0.1 + 0.05 * run.data(*param.shape)) for name, param in net.named_parameters()]
    opt = torch.optim.SGD([{"params": [param]} for param in net.parameters()], lr=0.1, momentum=0.7)
    with run.context(net, opt, {"lr": rates}) as (fnet, diffopt):
        for t in range(run.steps):
            diffopt.step((fnet(x[rows(t)]) - y[rows(t)]).square().mean())
        return fnet(x).tanh().sum()


def assigned_weight(run: Run) -> Tensor:
    """`fmodel.weight = tensor` on the model itself is an update."""
    net, x, y = run.net(nn.Linear(3, 1)), run.data(12, 3), run.data(12, 1)
    with run.context(net, sgd_for(net)) as (fnet, diffopt):
        for t in range(run.steps):
            if t % 3 == 1:
                fnet.weight = fnet.weight * 0.5
            diffopt.step((fnet(x[rows(t)]) - y[rows(t)]).sin().square().mean())
        return fnet(x).tanh().sum()


def on_a_device(run: Run) -> Tensor:
    net, x, y = run.net(mlp()), run.data(12, 3), run.data(12, 1)
    opt = sgd_for(net)
    (net(x) - y).square().mean().backward()
    opt.step()
    with run.context(net, opt, device=torch.device("cpu")) as (fnet, diffopt):
        for t in range(run.steps):
            diffopt.step((fnet(x[rows(t)]) - y[rows(t)]).square().mean())
        return fnet(x).tanh().sum()


SAME: list[Loop] = [
    loops.sgd,
    sgd_groups,
    adam_without_eps,
    adam_amsgrad,
    learning_rate_for_each_element,
    assigned_weight,
    on_a_device,
    loops.edited_hyperparameters,
    loops.callback,
    loops.example_weights,
    loops.captured,
    loops.leaf_made_in_the_loop,
    loops.times,
    loops.from_past_weights,
    loops.manual_steps,
    loops.batch_norm,
    loops.dropout,
    loops.shared_weights,
    loops.hidden_state,
    loops.transformer,
    loops.custom_function,
    loops.gradient_penalty,
    loops.in_place,
]


@pytest.mark.parametrize("loop", SAME, ids=[loop.__name__ for loop in SAME])
def test_the_same_gradients(loop: Loop) -> None:
    steps = 7
    with torch.random.fork_rng():
        expected = gradients(loop, steps, library=higher)
    for settings in ({}, {"checkpoint_every": 3}):
        with torch.random.fork_rng():
            found = gradients(loop, steps, **settings)
        assert found.keys() == expected.keys()
        for name, gradient in found.items():
            reference = expected[name]
            assert gradient is not None, name
            assert reference is not None, name
            assert reference.norm() > 1e-7, name
            assert (gradient - reference).norm() <= 1e-9 * reference.norm(), (name, settings)


@pytest.mark.parametrize("settings", [{}, {"checkpoint_every": 2}], ids=["unrolled", "checkpointed"])
def test_batch_norm_statistics_are_those_of_higher(settings: dict[str, Any]) -> None:
    def statistics(library: Any, **settings: Any) -> dict[str, Tensor]:
        run = Run(5, library, **settings)
        net = run.net(nn.Sequential(nn.Linear(3, 4), nn.BatchNorm1d(4), nn.Linear(4, 1)))
        before = {name: buffer.clone() for name, buffer in net.named_buffers()}
        x = run.data(12, 3)
        with run.context(net, sgd_for(net)) as (fnet, diffopt):
            for t in range(run.steps):
                diffopt.step(fnet(x[rows(t)]).square().mean())
            fnet(x).sum().backward()
        assert all(torch.equal(before[name], buffer) for name, buffer in net.named_buffers())
        found: dict[str, Tensor] = fnet.state_dict()
        assert found.keys() == net.state_dict().keys()
        assert not any(value.requires_grad for value in found.values())
        return found

    for (name, expected), found in zip(
        statistics(higher).items(), statistics(lowmem_higher, **settings).values(), strict=True
    ):
        torch.testing.assert_close(found, expected, rtol=1e-12, atol=0, msg=name)


@pytest.mark.parametrize("settings", [{}, {"checkpoint_every": 2}], ids=["unrolled", "checkpointed"])
@pytest.mark.parametrize("copy_initial_weights", [True, False])
def test_where_the_gradient_of_the_initial_weights_goes(copy_initial_weights: bool, settings: dict[str, Any]) -> None:
    def gradients_of(library: Any, **settings: Any) -> tuple[list[Tensor | None], list[Tensor | None]]:
        run = Run(4, library, copy_initial_weights=copy_initial_weights, **settings)
        net, x = run.net(mlp()), run.data(12, 3)
        with run.context(net, sgd_for(net)) as (fnet, diffopt):
            first = list(fnet.parameters(time=0))
            for t in range(run.steps):
                diffopt.step(fnet(x[rows(t)]).sin().mean())
            if not copy_initial_weights:
                for param in first:
                    param.retain_grad()
            fnet(x).sin().sum().backward()
        assert [param.is_leaf for param in first] == [copy_initial_weights] * 4
        return [param.grad for param in net.parameters()], [param.grad for param in first]

    for ours, theirs in zip(gradients_of(lowmem_higher, **settings), gradients_of(higher), strict=True):
        assert [g is None for g in ours] == [g is None for g in theirs]
        for a, b in zip(ours, theirs, strict=True):
            if a is not None and b is not None:
                assert b.norm() > 0
                assert (a - b).norm() <= 1e-9 * b.norm()


@pytest.mark.parametrize("settings", [{}, {"checkpoint_every": 2}], ids=["unrolled", "checkpointed"])
@pytest.mark.parametrize("track", [True, False])
def test_history(track: bool, settings: dict[str, Any]) -> None:
    """Which times there are after each kind of update, what is a leaf, and what the steps return."""

    def history(library: Any, **settings: Any) -> list[Any]:
        run = Run(0, library, track_higher_grads=track, **settings)
        net, x = run.net(mlp()), run.data(12, 3)
        seen: list[Any] = []

        def look() -> None:
            current = list(fnet.parameters())
            times = 0
            while True:
                try:
                    list(fnet.parameters(time=times))
                except (IndexError, ValueError):
                    break
                times += 1
            seen.append((times, [p.is_leaf for p in current], [p.requires_grad for p in current], fnet(x).sum().item()))
            assert all(a is b for a, b in zip(current, fnet.parameters(time=-1), strict=True))
            assert all(a is b for a, b in zip(current, fnet.fast_params, strict=True))

        with run.context(net, sgd_for(net)) as (fnet, diffopt):
            look()
            returned = diffopt.step(fnet(x).square().mean())
            assert all(a is b for a, b in zip(returned, fnet.parameters(), strict=True))
            look()
            fnet.update_params([param * 0.9 for param in fnet.parameters()])
            look()
            fnet.fast_params = [param * 0.9 for param in fnet.fast_params]
            look()
            fnet(x, params=[param * 0.9 for param in fnet.parameters()])
            look()
            diffopt.step(fnet(x).square().mean())
            look()
        assert isinstance(fnet, type(net))
        assert [name for name, _ in fnet.named_parameters()] == [name for name, _ in net.named_parameters()]
        return seen

    ours, theirs = history(lowmem_higher, **settings), history(higher)
    assert [entry[:3] for entry in ours] == [entry[:3] for entry in theirs]
    assert [entry[3] for entry in ours] == pytest.approx([entry[3] for entry in theirs], rel=1e-12)


def test_the_callback_gets_what_it_gets_in_higher() -> None:
    """Gradients in the order of the parameters, None for frozen and for unused ones; the step's own callback wins."""

    class Net(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.frozen, self.idle = nn.Parameter(torch.ones(3), requires_grad=False), nn.Parameter(torch.ones(2))
            self.layer = nn.Linear(3, 1)

        def forward(self, x: Tensor) -> Tensor:
            return self.layer(x * self.frozen)

    def seen_by(library: Any, **settings: Any) -> list[Tensor | None]:
        run = Run(1, library, **settings)
        net, x, seen = run.net(Net()), run.data(5, 3), []

        def look(grads: Any) -> Any:
            seen.extend(grads)
            return grads

        with run.context(net, sgd_for(net)) as (fnet, diffopt):
            diffopt.step(fnet(x).square().mean(), grad_callback=look)
            assert fnet.idle is list(fnet.parameters(time=0))[1]
        return seen

    expected = seen_by(higher)
    for ours in (seen_by(lowmem_higher), seen_by(lowmem_higher, checkpoint_every=2)):
        assert [g is None for g in ours] == [g is None for g in expected] == [True, True, False, False]
        for a, b in zip(ours[2:], expected[2:], strict=True):
            torch.testing.assert_close(a.detach(), b.detach(), rtol=1e-12, atol=0)


def test_no_tracking_trains_the_same_and_leaves_no_graph() -> None:
    def trained(library: Any, **settings: Any) -> list[Tensor]:
        run = Run(6, library, track_higher_grads=False, **settings)
        net, x, y = run.net(mlp()), run.data(12, 3), run.data(12, 1)
        with run.context(net, torch.optim.SGD(net.parameters(), lr=0.2, momentum=0.9, nesterov=True)) as (
            fnet,
            diffopt,
        ):
            for t in range(run.steps):
                diffopt.step((fnet(x[rows(t)]) - y[rows(t)]).square().mean())
                assert all(param.is_leaf and param.requires_grad for param in fnet.parameters())
        return [param.detach() for param in fnet.parameters()]

    expected = trained(higher)
    for ours in (trained(lowmem_higher), trained(lowmem_higher, checkpoint_every=2)):
        for a, b in zip(ours, expected, strict=True):
            torch.testing.assert_close(a, b, rtol=1e-12, atol=0)


# ---------------------------------------------------------------------------------------------------- types of errors


def foreign_optimizer(library: Any) -> None:
    library.innerloop_ctx(nn.Linear(1, 1), sgd_for(nn.Linear(1, 1))).__enter__()


def override_of_wrong_length(library: Any) -> None:
    net = nn.Linear(1, 1)
    library.innerloop_ctx(net, sgd_for(net), override={"lr": [0.1, 0.2]}).__enter__()


def time_out_of_range(library: Any) -> None:
    net = nn.Linear(1, 1)
    with library.innerloop_ctx(net, sgd_for(net)) as (fnet, _):
        list(fnet.parameters(time=3))


def negative_time_out_of_range(library: Any) -> None:
    net = nn.Linear(1, 1)
    with library.innerloop_ctx(net, sgd_for(net)) as (fnet, _):
        list(fnet.parameters(time=-3))


def time_without_tracking(library: Any) -> None:
    net = nn.Linear(1, 1)
    with library.innerloop_ctx(net, sgd_for(net), track_higher_grads=False) as (fnet, _):
        list(fnet.parameters(time=1))


def unknown_optimizer(library: Any) -> None:
    class Mine(torch.optim.SGD):
        pass

    net = nn.Linear(1, 1)
    library.innerloop_ctx(net, Mine(net.parameters(), lr=0.1)).__enter__()


def init_without_tracking(library: Any) -> None:
    net = nn.Linear(1, 1)
    with library.innerloop_ctx(net, sgd_for(net), track_higher_grads=False) as (fnet, _):
        fnet.init_fast_params  # noqa: B018  # a property


@pytest.mark.parametrize("library", LIBRARIES)
@pytest.mark.parametrize(
    ("mistake", "error"),
    [
        (foreign_optimizer, ValueError),
        (override_of_wrong_length, ValueError),
        (time_out_of_range, IndexError),
        (negative_time_out_of_range, IndexError),
        (time_without_tracking, ValueError),
        (unknown_optimizer, ValueError),
        (init_without_tracking, Exception),
    ],
)
def test_mistakes_raise_errors_of_the_same_type(
    mistake: Callable[[Any], None], error: type[Exception], library: Any
) -> None:
    with pytest.raises(error) as raised:
        mistake(library)
    assert error is Exception or type(raised.value) is error
