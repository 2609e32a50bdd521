"""`diffopt.commit(model, opt)`: torch goes on from our loop as it would have from its own."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import pytest
import torch
from loops import TiedAutoencoder, mlp
from torch import Tensor, nn

import lowmem_higher
from lowmem_higher import get_diff_optim

pytestmark = pytest.mark.usefixtures("float64")

Pair = tuple[nn.Module, torch.optim.Optimizer]
SETTINGS: list[dict[str, Any]] = [{}, {"checkpoint_every": 2}, {"track_higher_grads": False}]


class Normed(nn.Module):
    """Statistics, a frozen and an unused parameter, groups of unequal options."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.norm, self.last = nn.Linear(3, 4, bias=False), nn.BatchNorm1d(4), nn.Linear(4, 3)
        self.idle, self.frozen = nn.Parameter(torch.ones(2)), nn.Parameter(torch.ones(4), requires_grad=False)
        self.register_buffer("nothing", None)

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = self.last((self.norm(self.first(x)) * self.frozen).tanh())
        return out


def sgd(net: nn.Module) -> torch.optim.Optimizer:
    return torch.optim.SGD(net.parameters(), lr=0.1, momentum=0.9, nesterov=True)


def plain(net: nn.Module) -> torch.optim.Optimizer:
    return torch.optim.SGD(net.parameters(), lr=0.1)


def adam_groups(net: nn.Module) -> torch.optim.Optimizer:
    params = list(net.parameters())
    groups = [{"params": params[1:], "lr": 0.02}, {"params": params[:1], "weight_decay": 0.1}]
    return torch.optim.Adam(groups, lr=0.05, amsgrad=True)


def adamw(net: nn.Module) -> torch.optim.Optimizer:
    return torch.optim.AdamW(net.parameters(), lr=0.05)


def loss_of(net: Any, step: int) -> Tensor:
    x = torch.linspace(-1, 2, 24).reshape(8, 3) * (1 + step / 7)
    return (net(x) - x.cos()).square().mean()


def steps_of_torch(pair: Pair, steps: range) -> None:
    net, opt = pair
    for step in steps:
        opt.zero_grad()
        loss_of(net, step).backward()
        opt.step()


def pair_of(make: Callable[[], nn.Module], opt: Callable[[nn.Module], torch.optim.Optimizer]) -> Pair:
    net = make()
    generator = torch.Generator().manual_seed(2)
    with torch.no_grad():
        for param in net.parameters():
            param.copy_(torch.randn(param.shape, generator=generator) * 0.5)
    return net, opt(net)


def assert_same_state(ours: Pair, theirs: Pair) -> None:
    for (name, a), b in zip(ours[0].state_dict().items(), theirs[0].state_dict().values(), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-9, atol=1e-12, msg=lambda m, n=name: f"{n}: {m}")
    found, expected = ours[1].state_dict(), theirs[1].state_dict()
    assert found["param_groups"] == expected["param_groups"]
    assert found["state"].keys() == expected["state"].keys()
    for index, entry in expected["state"].items():
        assert {k for k, v in found["state"][index].items() if v is not None} == {
            k for k, v in entry.items() if v is not None
        }
        for key, value in entry.items():
            if value is not None:
                mine = found["state"][index][key]
                assert type(mine) is type(value)
                assert not mine.requires_grad
                torch.testing.assert_close(mine, value, rtol=1e-9, atol=1e-12)  # dtype and device too


@pytest.mark.parametrize("setting", SETTINGS, ids=str)
@pytest.mark.parametrize("warm", [0, 2])
@pytest.mark.parametrize("make", [Normed, lambda: TiedAutoencoder().double()], ids=["normed", "shared weights"])
@pytest.mark.parametrize("opt", [sgd, plain, adam_groups, adamw])
def test_torch_goes_on_as_if_it_had_trained(
    opt: Callable[[nn.Module], torch.optim.Optimizer],
    make: Callable[[], nn.Module],
    warm: int,
    setting: dict[str, Any],
) -> None:
    ours, theirs = pair_of(make, opt), pair_of(make, opt)
    for pair in (ours, theirs):
        steps_of_torch(pair, range(warm))
    objects = [*ours[0].parameters(), *ours[0].buffers()]
    with lowmem_higher.innerloop_ctx(*ours, **setting) as (fnet, diffopt):
        for step in range(warm, warm + 5):
            diffopt.step(loss_of(fnet, step))
    diffopt.commit(*ours)
    steps_of_torch(theirs, range(warm, warm + 5))
    assert all(a is b for a, b in zip(objects, [*ours[0].parameters(), *ours[0].buffers()], strict=True))
    assert_same_state(ours, theirs)
    for pair in (ours, theirs):
        steps_of_torch(pair, range(warm + 5, warm + 8))
    assert_same_state(ours, theirs)


OTHERS = ["Adadelta", "Adagrad", "Adamax", "ASGD", "NAdam", "RAdam", "RMSprop", "Rprop"]


@pytest.mark.parametrize("warm", [0, 2])
@pytest.mark.parametrize("name", OTHERS)
def test_the_state_of_every_optimizer_goes_on(name: str, warm: int) -> None:
    def opt(net: nn.Module) -> torch.optim.Optimizer:
        made: torch.optim.Optimizer = getattr(torch.optim, name)(net.parameters(), lr=0.02)
        return made

    test_torch_goes_on_as_if_it_had_trained(opt, Normed, warm, {"checkpoint_every": 2})


def test_what_is_written_shares_nothing_with_the_loop() -> None:
    net, opt = pair_of(Normed, sgd)
    with lowmem_higher.innerloop_ctx(net, opt, copy_initial_weights=False, checkpoint_every=2) as (fnet, diffopt):
        for step in range(5):
            diffopt.step(loss_of(fnet, step))
        outer, first = loss_of(fnet, 9), fnet.init_fast_params[2]
        (expected,) = torch.autograd.grad(outer, first, retain_graph=True)
        momentum = diffopt.state[0][2]["momentum_buffer"].detach().clone()
        diffopt.commit(net, opt)
        steps_of_torch((net, opt), range(5, 8))
        assert torch.equal(diffopt.state[0][2]["momentum_buffer"], momentum)
        (found,) = torch.autograd.grad(outer, first)
    assert expected.norm() > 0
    assert torch.equal(found, expected)


def test_the_model_alone() -> None:
    net, opt = pair_of(Normed, sgd)
    with lowmem_higher.innerloop_ctx(net, opt) as (fnet, diffopt):
        diffopt.step(loss_of(fnet, 0))
    diffopt.commit(net)
    assert torch.equal(net.first.weight, fnet.first.weight)
    assert torch.equal(net.norm.running_mean, fnet.norm.running_mean)
    assert not opt.state


def test_a_buffer_set_inside_the_loop() -> None:
    net, opt = pair_of(Normed, sgd)
    with lowmem_higher.innerloop_ctx(net, opt) as (fnet, diffopt):
        diffopt.step(loss_of(fnet, 0))
        fnet.nothing = torch.ones(2)
    diffopt.commit(net, opt)
    assert torch.equal(net.nothing, torch.ones(2))
    assert net.nothing is not fnet.nothing


def another_model(net: nn.Module, opt: torch.optim.Optimizer, diffopt: Any) -> None:
    other = mlp()
    diffopt.commit(other, sgd(other))


def another_shape(net: nn.Module, opt: torch.optim.Optimizer, diffopt: Any) -> None:
    other = copy.deepcopy(net)
    other.idle = nn.Parameter(torch.ones(3))
    diffopt.commit(other)


def another_dtype(net: nn.Module, opt: torch.optim.Optimizer, diffopt: Any) -> None:
    diffopt.commit(copy.deepcopy(net).float())


def other_buffers(net: nn.Module, opt: torch.optim.Optimizer, diffopt: Any) -> None:
    other = copy.deepcopy(net)
    other.register_buffer("more", torch.ones(1))
    diffopt.commit(other)


def another_optimizer(net: nn.Module, opt: torch.optim.Optimizer, diffopt: Any) -> None:
    diffopt.commit(net, adam_groups(net))


def optimizer_of_another_model(net: nn.Module, opt: torch.optim.Optimizer, diffopt: Any) -> None:
    diffopt.commit(net, sgd(Normed()))


@pytest.mark.parametrize(
    ("mistake", "match"),
    [
        (another_model, "has 4 parameters"),
        (another_shape, r"idle is torch.float64 of shape \(3,\) in the model"),
        (another_dtype, "is torch.float32 of shape"),
        (other_buffers, "differ in their buffers: more"),
        (another_optimizer, "does not hold the model's parameters in the groups"),
        (optimizer_of_another_model, "does not hold the model's parameters"),
    ],
)
def test_a_mistake_raises_before_anything_is_written(mistake: Callable[..., None], match: str) -> None:
    net, opt = pair_of(Normed, sgd)
    before = copy.deepcopy(net.state_dict())
    with lowmem_higher.innerloop_ctx(net, opt) as (fnet, diffopt):
        diffopt.step(loss_of(fnet, 0))
    with pytest.raises(ValueError, match=match):
        mistake(net, opt, diffopt)
    assert all(torch.equal(a, b) for a, b in zip(before.values(), net.state_dict().values(), strict=True))
    assert not opt.state


def test_without_a_functional_model_there_is_nothing_to_write() -> None:
    y = torch.ones(2, requires_grad=True)
    opt = torch.optim.SGD([y], lr=0.1)
    with pytest.raises(ValueError, match="without a functional model"):
        get_diff_optim(opt, [y]).commit(nn.Linear(1, 1), opt)
