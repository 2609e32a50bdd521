"""The sixteen kinds of loops that exist in the wild, by number: the full unroll, checkpoints, and `higher` where it is
right.

What `higher` gets wrong, or cannot do, has `higher=False` and a word on why.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable
from typing import Any, NamedTuple

import loops
import pytest
import torch
import torch.nn.functional as F
from loops import Run, gradients, mlp, rows, sgd_for
from torch import Tensor, nn

import lowmem_higher
from lowmem_higher import HigherOrderError
from lowmem_higher.testing import assert_matches_unrolled

higher = pytest.importorskip("higher")

STEPS = 11


def squared(fnet: Any, x: Tensor, y: Tensor, t: int) -> Tensor:
    loss: Tensor = (fnet(x[rows(t)]) - y[rows(t)]).square().mean()
    return loss


def problem(run: Run, net: nn.Module | None = None) -> tuple[Any, Tensor, Tensor]:
    return run.net(net or mlp()), run.data(12, 3), run.data(12, 1)


# ------------------------------------------------------------------------------------------------------- 1. to 5.


def meta_loss_at_every_step(run: Run) -> Tensor:
    """MAML++: every step has its own learned rate, and its own weight in the sum of the outer losses."""
    net, x, y = problem(run)
    outer = torch.zeros((), dtype=torch.float64)
    with run.context(net, sgd_for(net)) as (fnet, diffopt):
        for t in range(run.steps):
            diffopt.step(squared(fnet, x, y, t), override={"lr": [run.leaf(f"lr of step {t}", 0.05 + 0.01 * t)]})
            outer = outer + (1 + t) / run.steps * squared(fnet, x, y, t + 1)
    return outer


def several_contexts_and_one_backward(run: Run) -> Tensor:
    """A meta-batch: contexts one after the other and two open at once; one sum, after all have exited."""
    net, x, y = problem(run)
    lr, outer = run.leaf("lr", 0.1), []
    for task in (1.0, -0.5):
        with run.context(net, sgd_for(net), {"lr": [lr]}) as (fnet, diffopt):
            for t in range(run.steps // 2):
                diffopt.step(squared(fnet, x, task * y, t))
            outer.append(fnet(x).tanh().sum())
    first, second = (run.context(net, sgd_for(net), {"lr": [lr]}) for _ in range(2))
    with first as (fnet, diffopt), second as (other, other_diffopt):
        for t in range(run.steps // 2):
            diffopt.step(squared(fnet, x, y, t))
            other_diffopt.step(squared(other, 2 * x, y, t))
        outer += [fnet(x).sin().sum(), other(x).cos().sum()]
    return torch.stack(outer).sum()


def external_that_is_no_leaf(run: Run) -> Tensor:
    """Edge weights of a graph, made once; a learned augmentation and a learned loss net, called at every step."""
    net, x, y = problem(run)
    adjacency = torch.softmax(run.leaf("edges", run.data(12, 12)), 1)
    scale, shift = run.leaf("scale", run.data(3)), run.leaf("shift", run.data(3))
    judge = [run.leaf(f"judge {index}", run.data(*shape) * 0.5) for index, shape in enumerate([(4, 2), (1, 4)])]
    with run.context(net, sgd_for(net)) as (fnet, diffopt):
        for t in range(run.steps):
            smoothed = (adjacency @ x)[rows(t)]
            prediction = fnet(smoothed * scale.exp() + shift.tanh())
            pair = torch.cat([prediction, y[rows(t)]], 1)
            diffopt.step(F.linear(F.linear(pair, judge[0]).tanh(), judge[1]).square().mean())
        return fnet(x).tanh().sum()


def gradients_at_all_times(run: Run) -> Tensor:
    """NAS: weights of all times listed, some used again in a forward."""
    net, x, y = problem(run)
    with run.context(net, sgd_for(net)) as (fnet, diffopt):
        for t in range(run.steps):
            diffopt.step(squared(fnet, x, y, t))
        outer: Tensor = fnet(x).tanh().sum()
        for time in range(run.steps + 1):
            for name, weight in zip(("w0", "b0", "w1", "b1"), fnet.parameters(time=time), strict=True):
                outer = outer + (weight * (time + 1)).sin().sum() / 20
                run.inputs[f"{name} of time {time}"] = weight
        for time in (0, run.steps // 2, -2):
            outer = outer + fnet(x, params=list(fnet.parameters(time=time))).square().mean()
    return outer


def steps_by_hand(run: Run) -> Tensor:
    """`autograd.grad` and `update_params`, `fast_params =`, truncation by detaching, between the optimizer's steps."""
    net, x, y = problem(run)
    rate = run.leaf("rate", 0.1)
    with run.context(net, sgd_for(net)) as (fnet, diffopt):
        for t in range(run.steps):
            if t % 3 == 2:
                diffopt.step(squared(fnet, x, y, t))
                continue
            params = fnet.fast_params
            grads = torch.autograd.grad(squared(fnet, x, y, t), params, create_graph=True)
            new = [param - rate * grad for param, grad in zip(params, grads, strict=True)]
            if t % 3:
                fnet.update_params(new)
            else:
                fnet.fast_params = new
            if t == 3:  # all but the rate is forgotten
                fnet.update_params([param.detach().requires_grad_() for param in fnet.parameters()])
        start = next(iter(fnet.parameters(time=0)))
        biases = torch.stack([param.sin().sum() for param in net.parameters()]).sum()
        return fnet(x).tanh().sum() + start.sin().sum() + biases


# --------------------------------------------------------------------------------------------------------------- 6.


class Held(nn.Module):
    """A tensor that is optimized, as the only parameter of a module: what the inner loop of an energy model trains."""

    def __init__(self, start: Tensor) -> None:
        super().__init__()
        self.y = nn.Parameter(start)


def energy_of(run: Run) -> tuple[Callable[[Tensor], Tensor], Tensor, Tensor]:
    weights = [run.leaf(f"energy {index}", run.data(*shape) * 0.5) for index, shape in enumerate([(8, 5), (1, 8)])]
    x = run.data(6, 3)

    def energy(y: Tensor) -> Tensor:
        hidden = F.softplus(F.linear(torch.cat([x, y], 1), weights[0]))
        return F.linear(hidden, weights[1]).square().sum() + (y * y).sum() / 10

    return energy, torch.zeros(6, 2, dtype=torch.float64), run.leaf("lr", 0.2)


def energy_model_without_a_model(run: Run) -> Tensor:
    """`y, = diffopt.step(energy, params=[y])` and a projection between the steps; always a full unroll."""
    energy, start, lr = energy_of(run)
    y = start.requires_grad_()
    opt = torch.optim.SGD([y], lr=0.1, momentum=0.5)
    diffopt = run.library.get_diff_optim(opt, [y], override={"lr": [lr]})
    for _ in range(run.steps):
        (y,) = diffopt.step(energy(y), params=[y])
        y = y.clamp(-0.4, 0.4)
    return (y - 0.3).square().sum()


def energy_model_as_a_module(run: Run) -> Tensor:
    """The same loop with the optimized tensor in a module: this one can be checkpointed."""
    energy, start, lr = energy_of(run)
    held = Held(start)
    opt = torch.optim.SGD(held.parameters(), lr=0.1, momentum=0.5)
    with run.context(held, opt, {"lr": [lr]}) as (fheld, diffopt):
        for _ in range(run.steps):
            (y,) = diffopt.step(energy(fheld.y))
            fheld.update_params([y.clamp(-0.4, 0.4)])
        return (fheld.y - 0.3).square().sum()


# ------------------------------------------------------------------------------------------------------- 7. to 11.


def parameters_outside_forward(run: Run) -> Tensor:
    """L2, proximity to the start (iMAML), and a weight by its name in the loss."""
    net, x, y = problem(run, nn.Linear(3, 1))
    decay, pull = run.leaf("decay", 0.1), run.leaf("pull", 0.2)
    with run.context(net, sgd_for(net)) as (fnet, diffopt):
        start = list(fnet.parameters(time=0))
        for t in range(run.steps):
            ridge = torch.stack([param.square().sum() for param in fnet.parameters()]).sum()
            proximity = [(p - q).square().sum() for p, q in zip(fnet.parameters(), start, strict=True)]
            loss = (fnet(x[rows(t)]).sin() - y[rows(t)]).square().mean() + fnet.weight.abs().sqrt().sum() / 50
            diffopt.step(loss + decay * ridge + pull * torch.stack(proximity).sum())
        return fnet(x).tanh().sum() + fnet.bias.sin().sum()


def several_forwards_and_accumulation(run: Run) -> Tensor:
    """Several forwards and losses a step, evaluations in between, gradients accumulated over micro-batches."""
    net, x, y = problem(run)
    mix = run.leaf("mix", 0.3)
    with run.context(net, sgd_for(net)) as (fnet, diffopt):
        for t in range(run.steps):
            with torch.no_grad():
                best = fnet(x).square().mean()
            parts = [squared(fnet, x, y, t + shift) / 3 for shift in range(3)]
            consistency = (fnet(x[rows(t)]) - fnet(x[rows(t)] + 0.1)).square().mean()
            diffopt.step(torch.stack(parts).sum() + mix * consistency * best)
        return fnet(x).tanh().sum()


def two_optimizers(run: Run, one_loss: bool) -> Tensor:
    net, x, y = problem(run)
    weights = run.leaf("weights", run.data(12))
    body = torch.optim.SGD(net[0].parameters(), lr=0.1, momentum=0.8)
    head = torch.optim.Adam(net[2].parameters(), lr=0.05, eps=1e-20)
    with run.context(net, body) as (fnet, diffopt):
        other = run.library.get_diff_optim(head, net.parameters(), fmodel=fnet)
        for t in range(run.steps):
            loss = (weights[rows(t)].sigmoid() * (fnet(x[rows(t)]) - y[rows(t)]).square().squeeze(1)).mean()
            diffopt.step(loss)
            other.step(loss if one_loss else squared(fnet, x, y, t))
        return fnet(x).tanh().sum()


def two_optimizers_of_one_loss(run: Run) -> Tensor:
    return two_optimizers(run, one_loss=True)


def two_optimizers_in_turn(run: Run) -> Tensor:
    """`higher` takes the second inner gradient through the first step as well, and trains otherwise than torch."""
    return two_optimizers(run, one_loss=False)


def rates_of_a_scheduler(run: Run) -> Tensor:
    """A torch scheduler drives a clock, an optimizer of nothing, whose rate is copied; a learned factor on top."""
    net, x, y = problem(run)
    factor = run.leaf("factor", 0.8)
    clock = torch.optim.SGD([torch.zeros(1)], lr=0.2)
    scheduler = torch.optim.lr_scheduler.CosineAnnealingLR(clock, T_max=run.steps)
    with run.context(net, sgd_for(net)) as (fnet, diffopt):
        for t in range(run.steps):
            diffopt.param_groups[0]["lr"] = factor * clock.param_groups[0]["lr"]
            diffopt.step(squared(fnet, x, y, t))
            clock.step()
            scheduler.step()
    assert clock.param_groups[0]["lr"] < 0.03
    return fnet(x).tanh().sum()


def state_read_after_the_loop(run: Run) -> Tensor:
    """The optimizer's state in the outer loss: momentum has a gradient; statistics and `state_dict` have none."""
    net, x, y = problem(run, nn.Sequential(nn.Linear(3, 4, bias=False), nn.BatchNorm1d(4), nn.Linear(4, 1)))
    with run.context(net, sgd_for(net)) as (fnet, diffopt):
        for t in range(run.steps):
            diffopt.step(squared(fnet, x, y, t))
    found = fnet.state_dict()
    assert not any(value.requires_grad for value in found.values())
    assert found["1.num_batches_tracked"] == run.steps
    momentum = [entry["momentum_buffer"] for entry in diffopt.state[0].values()]
    return torch.stack([buffer.sin().sum() for buffer in momentum]).sum() + found["1.running_mean"].sum() * 0


class Signed(torch.optim.SGD):
    pass


def update_rule_of_ones_own(run: Run) -> Tensor:
    """A subclass with `_update`, which writes the new tensors into `param_groups`, as `higher` wants it."""

    class DifferentiableSigned(run.library.optim.DifferentiableOptimizer):  # type: ignore[name-defined]
        def _update(self, grouped_grads: Any, **kwargs: Any) -> None:
            for group, grads in zip(self.param_groups, grouped_grads, strict=True):
                for index, (param, grad) in enumerate(zip(group["params"], grads, strict=True)):
                    if grad is not None:
                        group["params"][index] = param - group["lr"] * (3 * grad).tanh()

    net, x, y = problem(run)
    run.library.register_optim(Signed, DifferentiableSigned)
    opt = Signed(net.parameters(), lr=1.0)
    with run.context(net, opt, {"lr": [run.leaf("lr", 0.05)]}) as (fnet, diffopt):
        for t in range(run.steps):
            diffopt.step(squared(fnet, x, y, t))
        return fnet(x).tanh().sum()


def step_replaced_from_outside(run: Run) -> Tensor:
    """Other libraries wrap `DifferentiableOptimizer.step`."""
    net, x, y = problem(run)
    optimizer = run.library.optim.DifferentiableOptimizer
    original, calls = optimizer.step, []

    def step(self: Any, loss: Tensor, *args: Any, **kwargs: Any) -> Any:
        calls.append(loss.item())
        return original(self, 0.5 * loss, *args, **kwargs)

    optimizer.step = step
    try:
        with run.context(net, sgd_for(net)) as (fnet, diffopt):
            for t in range(run.steps):
                diffopt.step(squared(fnet, x, y, t))
    finally:
        optimizer.step = original
    assert len(calls) == run.steps
    return fnet(x).tanh().sum()


# ------------------------------------------------------------------------------------------------------ 12. to 15.


class Block(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.layer, self.adapter, self.adapted = nn.Linear(4, 4), nn.Linear(4, 4, bias=False), True

    def forward(self, x: Tensor) -> Tensor:
        hidden: Tensor = self.layer(x).tanh()
        return x + (hidden + self.adapter(x) if self.adapted else hidden)


class Encoder(nn.Module):
    """Hugging Face's ways: submodules and methods called from outside, slices of layers, adapters on and off."""

    def __init__(self) -> None:
        super().__init__()
        self.embed, self.head = nn.Linear(3, 4), nn.Linear(4, 1)
        self.layers = nn.ModuleList(Block() for _ in range(3))
        self.depth = 3

    def forward(self, x: Tensor) -> Tensor:
        return self.predict({"x": self.embed(x)})["y"]

    def predict(self, batch: dict[str, Tensor]) -> dict[str, Tensor]:
        hidden = batch["x"]
        for layer in self.layers[: self.depth]:
            hidden = layer(hidden)
        return {"y": self.head(hidden)}


def submodules_methods_and_slices(run: Run) -> Tensor:
    """`higher` reads stale weights here."""
    net, x, y = problem(run, Encoder())
    with run.context(net, sgd_for(net, lr=0.003)) as (fnet, diffopt):
        for t in range(run.steps):
            for layer in fnet.layers:
                layer.adapted = t % 2 == 0
            fnet.depth = 2 + t % 2
            hidden = fnet.embed(x[rows(t)])
            if t % 3:
                hidden = fnet.layers[0](hidden)
            diffopt.step((fnet.predict({"x": hidden})["y"] - y[rows(t)]).square().mean())
        return fnet(x).tanh().sum()


def modes_and_flags_in_the_loop(run: Run) -> Tensor:
    """train() and eval(), dropout, a layer frozen for some steps and a head that is thawed."""
    net, x, y = problem(run, nn.Sequential(nn.Linear(3, 4), nn.Tanh(), nn.Dropout(0.3), nn.Linear(4, 1)))
    with run.context(net, sgd_for(net)) as (fnet, diffopt):
        for t in range(run.steps):
            fnet.train(t % 3 != 1)
            if t % 4 == 2:
                fnet.update_params([p if k > 1 else p.detach() for k, p in enumerate(fnet.parameters())])
            if t % 4 == 3:
                thawed = [p if k > 1 else p.requires_grad_() for k, p in enumerate(fnet.parameters())]
                fnet.update_params(thawed)
            diffopt.step((F.dropout(fnet(x[rows(t)]), 0.2, fnet.training) - y[rows(t)]).square().mean())
        fnet.eval()
        start = torch.stack([p.sin().sum() for p in fnet.parameters(time=0)]).sum()
        return fnet(x).tanh().sum() + start


def ends_on_data(run: Run) -> Tensor:
    """A loader, a replay buffer that is written into, a seed set in the loop, an end that depends on a loss."""
    net, x, y = problem(run)
    weight = run.leaf("weight", run.data(3))
    loader = itertools.cycle([(x[rows(t)], y[rows(t)]) for t in range(3)])
    memory, filled, losses = torch.zeros(20, 3, dtype=torch.float64), 0, []
    with run.context(net, sgd_for(net, lr=0.15)) as (fnet, diffopt):
        while True:
            batch, target = next(loader)
            torch.manual_seed(len(losses))
            memory[filled % 20] = batch[0]
            filled += 1
            noisy = batch + 0.1 * torch.randn(batch.shape, dtype=torch.float64)
            replayed = memory[torch.randint(0, filled, (4,)) % 20]
            loss = (fnet(noisy * weight) - target).square().mean() + 0.1 * fnet(replayed).square().mean()
            losses.append(loss.item())
            if len(losses) > run.steps or (len(losses) > 4 and losses[-1] < 0.3 * losses[0]):
                break
            diffopt.step(loss)
        assert len(losses) > 4
        return fnet(x).tanh().sum()


def switches_around_the_loop(run: Run) -> Tensor:
    """cuDNN switched off and autocast on in the loop (in float64 it changes nothing), the outer backward outside."""
    net, x, y = problem(run, loops.Recurrent(nn.GRU))
    sequence = x.reshape(4, 3, 3)
    with (
        torch.backends.cudnn.flags(enabled=False),
        torch.autocast("cpu", dtype=torch.bfloat16),
        run.context(net, sgd_for(net)) as (fnet, diffopt),
    ):
        for t in range(run.steps):
            prediction, _ = fnet(sequence * (1 + t / 10))
            diffopt.step((prediction.reshape(12, 1) - y).square().mean())
        outer = fnet(sequence)[0]
    return outer.tanh().sum()


class Wild(NamedTuple):
    number: int
    loop: Callable[[Run], Tensor]
    higher: bool = True
    checkpointed: bool = True


WILD = [
    Wild(1, meta_loss_at_every_step),
    Wild(2, several_contexts_and_one_backward),
    Wild(3, external_that_is_no_leaf),
    Wild(3, loops.leaf_made_in_the_loop),
    Wild(4, gradients_at_all_times),
    Wild(4, loops.from_past_weights),
    Wild(5, steps_by_hand),
    Wild(6, energy_model_without_a_model, checkpointed=False),
    Wild(6, energy_model_as_a_module),
    Wild(7, parameters_outside_forward),
    Wild(8, several_forwards_and_accumulation),
    Wild(8, two_optimizers_of_one_loss),
    Wild(8, two_optimizers_in_turn, higher=False),
    Wild(9, loops.edited_hyperparameters),
    Wild(9, rates_of_a_scheduler),
    Wild(10, state_read_after_the_loop),
    Wild(11, update_rule_of_ones_own),
    Wild(11, step_replaced_from_outside),
    Wild(12, submodules_methods_and_slices, higher=False),
    Wild(13, modes_and_flags_in_the_loop),
    Wild(14, ends_on_data),
    Wild(15, switches_around_the_loop),
]


def label(wild: Wild) -> str:
    return f"loop_{wild.number:02d}_{wild.loop.__name__}"


def test_all_numbers_are_there() -> None:
    assert sorted({wild.number for wild in WILD} | {16}) == list(range(1, 17))


@pytest.mark.parametrize("wild", [wild for wild in WILD if wild.checkpointed], ids=label)
def test_checkpointed_as_the_full_unroll(wild: Wild) -> None:
    def checked(**settings: Any) -> dict[str, Tensor | None]:
        found = gradients(wild.loop, STEPS, **settings)
        for name, gradient in found.items() if settings["checkpoint_every"] is None else ():
            assert gradient is None or gradient.norm() > 1e-7, f"the unroll's gradient {name} proves nothing"
        return found

    assert_matches_unrolled(checked, checkpoint_every=(1, 3, 10), replay=("native",))
    assert_matches_unrolled(checked, checkpoint_every=(3,), replay=("torch",))


@pytest.mark.parametrize("wild", [wild for wild in WILD if wild.higher], ids=label)
def test_the_full_unroll_as_higher(wild: Wild) -> None:
    with torch.random.fork_rng():
        expected = gradients(wild.loop, 6, library=higher)
    with torch.random.fork_rng():
        found = gradients(wild.loop, 6)
    assert found.keys() == expected.keys()
    for name, reference in expected.items():
        gradient = found[name]
        if reference is None or reference.norm() == 0:  # where we give None, `higher` may give zeros
            assert gradient is None or gradient.norm() == 0, name
        else:
            assert gradient is not None, name
            assert (gradient - reference).norm() <= 1e-9 * reference.norm(), name


@pytest.mark.parametrize("every", [None, 1, 3])
def test_loop_01_a_backward_at_every_step(every: int | None) -> None:
    """`backward(retain_graph=True)` in the loop: the gradients add up to that of the sum."""

    def gradient(summed: bool) -> Tensor:
        run = Run(5, checkpoint_every=every)
        (net, x, y), outer = problem(run), []
        with run.context(net, sgd_for(net)) as (fnet, diffopt):
            for t in range(run.steps):
                diffopt.step(squared(fnet, x, y, t))
                outer.append((t + 1) * fnet(x).tanh().sum())
                if not summed:
                    outer[-1].backward(retain_graph=True)
        if summed:
            torch.stack(outer).sum().backward()
        found: Tensor = net[0].weight.grad
        return found

    expected = gradient(summed=True)
    assert expected.norm() > 0
    assert (gradient(summed=False) - expected).norm() <= 1e-9 * expected.norm()


def test_loop_08_two_optimizers_train_as_in_torch() -> None:
    """And not as `higher` does, whose second inner gradient goes through the first optimizer's step."""

    def trained(library: Any, **settings: Any) -> list[Tensor]:
        run = Run(4, library, **settings)
        net, x, y = problem(run)
        parts = [torch.optim.SGD(net[0].parameters(), lr=0.1), torch.optim.SGD(net[2].parameters(), lr=0.05)]
        if library is torch:
            for t, opt in itertools.product(range(4), parts):
                net.zero_grad()
                squared(net, x, y, t).backward()
                opt.step()
            return list(net.parameters())
        with run.context(net, parts[0]) as (fnet, diffopt):
            other = library.get_diff_optim(parts[1], net.parameters(), fmodel=fnet)
            for t, optimizer in itertools.product(range(4), (diffopt, other)):
                optimizer.step(squared(fnet, x, y, t))
        return list(fnet.parameters())

    expected = trained(torch)
    for setting in ({}, {"checkpoint_every": 2}, {"track_higher_grads": False}):
        for ours, theirs in zip(trained(lowmem_higher, **setting), expected, strict=True):
            torch.testing.assert_close(ours, theirs, rtol=1e-12, atol=0)
    assert (trained(higher)[0] - expected[0]).norm() > 1e-3


@pytest.mark.parametrize("every", [None, 1, 3])
def test_loop_09_an_override_of_a_step_persists(every: int | None) -> None:
    """As in `higher`: it holds for the later steps too, until it is overridden or `param_groups` is edited."""
    run = Run(0, checkpoint_every=every)
    (net, x, y), rates = problem(run), []
    with run.context(net, torch.optim.SGD(net.parameters(), lr=0.5)) as (fnet, diffopt):
        groups = diffopt.param_groups
        for override in (None, {"lr": [0.25]}, None, {"lr": [0.125]}, None):
            before = fnet.fast_params
            loss = squared(fnet, x, y, 0)
            grad = torch.autograd.grad(loss, before[0], retain_graph=True)[0]
            after = diffopt.step(loss, override=override)
            rates.append(((before[0] - after[0]) / grad).mean().item())
        assert diffopt.param_groups is groups
        groups[0]["lr"] = 0.0625
        grad = torch.autograd.grad(loss := squared(fnet, x, y, 0), fnet.fast_params[0], retain_graph=True)[0]
        before = fnet.fast_params
        rates.append(((before[0] - diffopt.step(loss)[0]) / grad).mean().item())
    assert rates == pytest.approx([0.5, 0.25, 0.25, 0.125, 0.125, 0.0625])


@pytest.mark.parametrize("every", [1, 3])
def test_loop_16_a_second_derivative_is_refused_and_the_way_is_named(every: int) -> None:
    run = Run(4, checkpoint_every=every)
    net, x, y = problem(run)
    with run.context(net, sgd_for(net)) as (fnet, diffopt):
        for t in range(run.steps):
            diffopt.step(squared(fnet, x, y, t))
        with pytest.raises(HigherOrderError, match="checkpoint_every=None"):
            torch.autograd.grad(fnet(x).tanh().sum(), net[0].weight, create_graph=True)


@pytest.mark.parametrize("through", ["outer Hessian-vector product", "Neumann series at the end"])
def test_loop_16_what_the_full_unroll_does(through: str) -> None:
    """Hessian-vector products of the outer loss, and an implicit gradient by a Neumann series at the final weights."""

    def second(library: Any, **settings: Any) -> Tensor:
        run = Run(4, library, **settings)
        net, x, y = problem(run)
        decay = run.leaf("decay", 0.3)
        whole = settings.get("checkpoint_every") is None
        with run.context(net, sgd_for(net)) as (fnet, diffopt):
            for t in range(run.steps):
                diffopt.step(squared(fnet, x, y, t) + decay * fnet.fast_params[0].square().sum())
            if through == "outer Hessian-vector product":
                assert whole
                grad = torch.autograd.grad(fnet(x).tanh().sum(), net[0].weight, create_graph=True)[0]
                return torch.autograd.grad(grad.square().sum(), decay)[0]
            last = [param.detach().requires_grad_() for param in fnet.parameters()]
            fnet.update_params(last)
            inner = squared(fnet, x, y, 0) + decay * last[0].square().sum()
            grads = torch.autograd.grad(inner, last, create_graph=True)
            vector = list(torch.autograd.grad(fnet(x).tanh().sum(), last))
            total = list(vector)
            for _ in range(5):
                product = torch.autograd.grad(grads, last, vector, retain_graph=True)
                vector = [v - 0.1 * p for v, p in zip(vector, product, strict=True)]
                total = [a + b for a, b in zip(total, vector, strict=True)]
            return -0.1 * torch.autograd.grad(grads, decay, total)[0]

    expected = second(higher)
    assert expected.norm() > 1e-6
    every = (None,) if through == "outer Hessian-vector product" else (None, 1, 3)
    for setting in every:
        assert (second(lowmem_higher, checkpoint_every=setting) - expected).norm() <= 1e-9 * expected.norm()
