"""The update rules: step by step equal to `torch.optim`, and right in the derivative by every float hyperparameter."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import lowmem_higher
from lowmem_higher.optim import DifferentiableAdam, DifferentiableOptimizer, DifferentiableSGD
from lowmem_higher.testing import taylor_test

pytestmark = pytest.mark.usefixtures("float64")

Option = dict[str, Any]


def combinations(**options: tuple[Any, ...]) -> Iterator[Option]:
    for values in itertools.product(*options.values()):
        yield dict(zip(options, values, strict=True))


SGD: list[Option] = [
    {"opt": torch.optim.SGD, "lr": 0.1, **option}
    for option in combinations(
        momentum=(0.0, 0.9),
        dampening=(0.0, 0.3),
        nesterov=(False, True),
        weight_decay=(0.0, 0.1),
        maximize=(False, True),
    )
    if not option["nesterov"] or (option["momentum"] > 0 and option["dampening"] == 0)
]
ADAM: list[Option] = [
    {"opt": torch.optim.Adam, "lr": 0.05, "betas": (0.8, 0.95), "eps": 1e-3, **option}
    for option in combinations(
        weight_decay=(0.0, 0.1), amsgrad=(False, True), maximize=(False, True), decoupled_weight_decay=(False, True)
    )
]
ADAMW: list[Option] = [
    {"opt": torch.optim.AdamW, "lr": 0.05, "betas": (0.8, 0.95), "eps": 1e-3, **option}
    for option in combinations(weight_decay=(0.0, 0.1), amsgrad=(False, True), maximize=(False, True))
]
RULES = [*SGD, *ADAM, *ADAMW]


def label(option: Option) -> str:
    parts = [f"{key}={value}" for key, value in option.items() if key not in ("opt", "lr", "betas", "eps") and value]
    return "-".join([option["opt"].__name__, *parts])


class Net(nn.Module):
    """Parameters of several shapes and sizes; one frozen, one unused at first, one whose gradient is exactly zero."""

    def __init__(self, wide: int = 2) -> None:
        super().__init__()
        self.inner, self.outer = nn.Linear(3, 4), nn.Linear(4, 2)
        self.wide = nn.Parameter(torch.zeros(3, wide))
        self.late = nn.Parameter(torch.zeros(2))
        self.idle = nn.Parameter(torch.zeros(2, 3))
        self.scale = nn.Parameter(torch.tensor(1.3))
        self.frozen = nn.Parameter(torch.ones(4), requires_grad=False)
        generator = torch.Generator().manual_seed(1)
        with torch.no_grad():
            for param in (*self.inner.parameters(), *self.outer.parameters(), self.wide, self.late, self.idle):
                param.copy_(torch.randn(param.shape, generator=generator) * 0.5)

    def forward(self, x: Tensor, late: bool) -> Tensor:
        hidden = torch.tanh(self.inner(x) * self.frozen + (x @ self.wide).mean(1, keepdim=True)) * self.scale
        out = self.outer(hidden).tanh() + 0.0 * self.idle.sum()
        return out + self.late.sin() if late else out


def groups_of(net: Net, several: bool) -> list[Option]:
    if not several:
        return [{"params": list(net.parameters())}]
    return [
        {"params": [net.inner.weight, net.late, net.frozen], "lr": 0.02},
        {"params": [net.inner.bias, *net.outer.parameters(), net.wide], "weight_decay": 0.2},
        {"params": [net.idle]},  # and `scale` in no group
    ]


def inner_loss(net: Any, step: int) -> Tensor:
    x = torch.linspace(-1, 2, 24).reshape(8, 3) * (1 + step / 7)
    return (net(x, late=step >= 3) - x[:, :2].cos()).square().mean()


def torch_steps(opt: torch.optim.Optimizer, net: nn.Module, steps: range) -> Iterator[int]:
    for step in steps:
        opt.zero_grad()
        inner_loss(net, step).backward()
        opt.step()
        yield step


@pytest.mark.parametrize(
    ("several", "warm", "N"),
    [(False, False, None), (True, True, None), (True, False, 2), (False, True, 2)],
    ids=[
        "one group, cold",
        "several groups, warm",
        "several groups, cold, checkpointed",
        "one group, warm, checkpointed",
    ],
)
@pytest.mark.parametrize("option", RULES, ids=label)
def test_steps_equal_those_of_torch_optim(option: Option, several: bool, warm: bool, N: int | None) -> None:
    net = Net(wide=6000)  # too large to be joined with the other parameters
    opt = option["opt"](groups_of(net, several), **{key: value for key, value in option.items() if key != "opt"})
    first = 4 if warm else 0
    for _ in torch_steps(opt, net, range(first)):
        pass
    for param in net.parameters():
        param.grad = None
    with lowmem_higher.innerloop_ctx(net, opt, checkpoint_every=N) as (fnet, diffopt):
        for step in torch_steps(opt, net, range(first, first + 6)):
            returned = diffopt.step(inner_loss(fnet, step))
            assert_equal_to(opt, net, fnet, diffopt)
            assert len(returned) == len(list(net.parameters()))
            assert all(a is b for a, b in zip(returned, fnet.parameters(), strict=True))
    assert (net.inner.weight - Net(wide=6000).inner.weight).norm() > 0.01
    assert torch.equal(net.frozen, torch.ones(4))


def assert_equal_to(opt: torch.optim.Optimizer, net: nn.Module, fnet: Any, diffopt: DifferentiableOptimizer) -> None:
    for (name, theirs), ours in zip(net.named_parameters(), fnet.parameters(), strict=True):
        torch.testing.assert_close(
            ours.detach(), theirs.detach(), rtol=1e-12, atol=1e-14, msg=lambda m, n=name: f"{n}: {m}"
        )
    for group, entries in zip(opt.param_groups, diffopt.state, strict=True):
        for index, param in enumerate(group["params"]):
            expected = {key: value for key, value in opt.state.get(param, {}).items() if value is not None}
            found = entries.get(index, {})
            assert expected.keys() == {key for key, value in found.items() if value is not None}
            for key, value in expected.items():
                ours = torch.as_tensor(found[key]).detach().to(value.dtype)
                torch.testing.assert_close(ours, value, rtol=1e-12, atol=1e-14, msg=lambda m, k=key: f"{k}: {m}")


# ------------------------------------------------------------------------------------------------------- derivatives

HYPERPARAMETERS = {
    torch.optim.SGD: ("lr", "momentum", "dampening", "weight_decay"),
    torch.optim.Adam: ("lr", "betas[0]", "betas[1]", "eps", "weight_decay"),
    torch.optim.AdamW: ("lr", "betas[0]", "betas[1]", "eps", "weight_decay"),
}
START = {
    "lr": 0.07,
    "momentum": 0.7,
    "dampening": 0.2,
    "weight_decay": 0.15,
    "betas[0]": 0.8,
    "betas[1]": 0.9,
    "eps": 0.02,
}


def with_tensor(name: str, value: Tensor) -> Option:
    """The override that puts a tensor in the place of one hyperparameter."""
    if name == "betas[0]":
        return {"betas": [(value, START["betas[1]"])]}
    if name == "betas[1]":
        return {"betas": [(START["betas[0]"], value)]}
    return {name: [value]}


def options_for(option: Option, name: str) -> Option | None:
    """All hyperparameters away from zero; None where the option forbids this one."""
    if name == "dampening" and (option["nesterov"] or not option["momentum"]):
        return None
    if name == "momentum" and not option["momentum"]:
        return None
    found = {**option}
    if option["opt"] is torch.optim.SGD:
        found["momentum"] = START["momentum"] if option["momentum"] else 0.0
    return found


CASES = [
    (option, name, warm)
    for option in RULES
    for name, warm in zip(HYPERPARAMETERS[option["opt"]], itertools.cycle((False, True)), strict=False)
    if options_for(option, name) is not None and not (option["maximize"] and option["weight_decay"] == 0.0)
]


def outer_loss(option: Option, name: str, warm: bool, **keywords: Any) -> Callable[[Tensor], Tensor]:
    """The outer loss as a function of one hyperparameter."""

    def outer(value: Tensor) -> Tensor:
        net = Net()
        settings = {key: value for key, value in (options_for(option, name) or {}).items() if key != "opt"}
        opt = option["opt"](groups_of(net, several=False), **settings)
        for _ in torch_steps(opt, net, range(3 if warm else 0)):
            pass
        override = with_tensor(name, value)
        with lowmem_higher.innerloop_ctx(net, opt, override=override, **keywords) as (fnet, diffopt):
            for step in range(5):
                diffopt.step(inner_loss(fnet, step + 2))
            return (fnet(torch.ones(4, 3), late=True) + torch.arange(2)).square().sum()

    return outer


@pytest.mark.parametrize(("option", "name", "warm"), CASES, ids=lambda v: label(v) if isinstance(v, dict) else str(v))
def test_derivative_by_every_hyperparameter(option: Option, name: str, warm: bool) -> None:
    point = torch.tensor(START[name])
    gradient = derivative(outer_loss(option, name, warm, checkpoint_every=2), point)
    values = outer_loss(option, name, warm, track_higher_grads=False)
    assert taylor_test(lambda value: values(value).detach(), point, gradient=gradient, step=0.05) > 1.9


def derivative(outer: Callable[[Tensor], Tensor], at: Tensor) -> Tensor:
    value = at.clone().requires_grad_()
    (found,) = torch.autograd.grad(outer(value), value)
    assert found.isfinite().all()
    assert found.shape == at.shape
    assert found.norm() > 0
    return found


@pytest.mark.parametrize("shape", [(1,), (1, 1)])
@pytest.mark.parametrize(
    ("opt", "name"),
    [(opt, name) for opt, names in HYPERPARAMETERS.items() for name in names],
    ids=lambda v: getattr(v, "__name__", v),
)
def test_hyperparameters_with_dimensions(opt: type[torch.optim.Optimizer], name: str, shape: tuple[int, ...]) -> None:
    option = next(
        o for o in RULES if o["opt"] is opt and o["weight_decay"] and o.get("momentum", 1) and not o.get("nesterov")
    )
    outer = outer_loss(option, name, warm=False, checkpoint_every=2)
    plain = derivative(outer, torch.tensor(START[name]))
    shaped = derivative(outer, torch.full(shape, START[name]))
    torch.testing.assert_close(shaped.reshape(()), plain, rtol=1e-12, atol=0)


@pytest.mark.parametrize("N", [None, 1, 3])
@pytest.mark.parametrize("option", [*ADAM, *ADAMW], ids=label)
def test_no_nan_where_the_second_moment_is_zero(option: Option, N: int | None) -> None:
    """`idle` has a gradient that is exactly zero, at every step; its root has an infinite derivative."""
    net = Net()
    opt = option["opt"](net.parameters(), **{key: value for key, value in option.items() if key not in ("opt", "eps")})
    leaves = {name: torch.tensor(START[name], requires_grad=True) for name in HYPERPARAMETERS[option["opt"]]}
    override = {name: [leaf] for name, leaf in leaves.items() if "[" not in name}
    override["betas"] = [(leaves["betas[0]"], leaves["betas[1]"])]
    with lowmem_higher.innerloop_ctx(net, opt, override=override, checkpoint_every=N, copy_initial_weights=False) as (
        fnet,
        diffopt,
    ):
        for step in range(4):
            diffopt.step(inner_loss(fnet, step))
        outer = fnet(torch.ones(4, 3), late=True).square().sum() + fnet.idle.square().sum()
    inputs = [*leaves.values(), *(param for param in net.parameters() if param.requires_grad)]
    for gradient in torch.autograd.grad(outer, inputs):
        assert gradient.isfinite().all()
        assert gradient.norm() > 0


def test_the_gradient_through_a_zero_second_moment_is_right() -> None:
    """A parameter that gets its first gradient later: exact zero before, then not."""

    def outer(start: Tensor) -> Tensor:
        net = nn.Linear(2, 1)
        with torch.no_grad():
            net.weight.copy_(start)
            net.bias.fill_(0.3)
        opt = torch.optim.Adam(net.parameters(), lr=0.1, eps=0.1)
        with lowmem_higher.innerloop_ctx(net, opt, checkpoint_every=2, copy_initial_weights=False) as (fnet, diffopt):
            for step in range(5):
                x = torch.tensor([[1.0, 0.0]]) if step < 2 else torch.tensor([[1.0, 2.0]])
                diffopt.step((fnet(x) - 1).square().sum())
            value = fnet(torch.tensor([[0.5, 1.5]])).exp().sum()
        seen.append(torch.autograd.grad(value, net.weight)[0])
        return value.detach()

    seen: list[Tensor] = []
    point = torch.tensor([[0.4, -0.7]])
    outer(point)
    assert seen[0].isfinite().all()
    assert taylor_test(outer, point, gradient=seen[0], step=0.05) > 1.9


# ------------------------------------------------------------------------------------- several groups, tensors per
# group


@pytest.mark.parametrize("N", [None, 2])
def test_a_tensor_for_each_group(N: int | None) -> None:
    """Each group's own learning rate has the derivative of that group alone; together they have the common one's."""

    def gradients(values: list[Tensor]) -> list[Tensor]:
        net = Net()
        opt = torch.optim.Adam(groups_of(net, several=True), lr=0.1)
        with lowmem_higher.innerloop_ctx(net, opt, override={"lr": values}, checkpoint_every=N) as (fnet, diffopt):
            for step in range(5):
                diffopt.step(inner_loss(fnet, step))
            outer = fnet(torch.ones(4, 3), late=True).square().sum() + fnet.idle.sum()
        return list(torch.autograd.grad(outer, values, allow_unused=True))

    shared = gradients([torch.tensor(0.1, requires_grad=True)])[0]
    apart = gradients([torch.tensor(0.1, requires_grad=True) for _ in range(3)])
    assert apart[0].norm() > 1e-3
    assert apart[1].norm() > 1e-3
    torch.testing.assert_close(apart[0] + apart[1] + (0 if apart[2] is None else apart[2]), shared, rtol=1e-10, atol=0)


@pytest.mark.parametrize("N", [None, 2])
def test_a_learning_rate_for_each_element(N: int | None) -> None:
    """Meta-SGD, as in `higher`: one group for each parameter, and a learning rate of its shape."""
    net = nn.Linear(2, 3)
    with torch.no_grad():
        net.weight.copy_(torch.arange(6).reshape(3, 2) / 5 - 0.4)
        net.bias.fill_(0.1)
    opt = torch.optim.SGD([{"params": [param]} for param in net.parameters()], lr=0.1)
    rates = [torch.full_like(param, 0.1).requires_grad_() for param in net.parameters()]
    x = torch.tensor([[1.0, 2.0]])
    with lowmem_higher.innerloop_ctx(net, opt, override={"lr": rates}, checkpoint_every=N) as (fnet, diffopt):
        diffopt.step(fnet(x).sin().sum())
        outer = fnet.weight.sum() + 2 * fnet.bias.sum()
    by_weight, by_bias = torch.autograd.grad(outer, rates)
    cosine = net(x).cos().detach().T
    torch.testing.assert_close(by_weight, -cosine @ x, rtol=1e-12, atol=0)
    torch.testing.assert_close(by_bias, -2 * cosine[:, 0], rtol=1e-12, atol=0)


# --------------------------------------------------------------------------------------------------- rules of your own


class Signed(torch.optim.Optimizer):
    """An optimizer that torch does not have."""

    def __init__(self, params: Any, lr: float = 0.1, decay: float = 0.5) -> None:
        super().__init__(params, {"lr": lr, "decay": decay})


class DifferentiableSigned(DifferentiableOptimizer):
    def update(self, param: Tensor, grad: Tensor, state: Any, group: Any) -> tuple[Tensor, dict[str, Any]]:
        average = group["decay"] * state["average"] + grad if "average" in state else grad
        return param - group["lr"] * torch.tanh(average), {"average": average, "count": state.get("count", 0) + 1}


@pytest.fixture
def registered() -> Iterator[None]:
    from lowmem_higher import optim

    before = dict(optim._rules)
    lowmem_higher.register_optim(Signed, DifferentiableSigned)
    yield
    optim._rules.clear()
    optim._rules.update(before)


@pytest.mark.usefixtures("registered")
def test_a_registered_rule_is_checkpointed_as_exactly() -> None:
    def loop(**settings: Any) -> dict[str, Tensor]:
        net, decay = Net(), torch.tensor(0.6, requires_grad=True)
        inputs = {"decay": decay, "inner": net.inner.weight, "late": net.late}
        with lowmem_higher.innerloop_ctx(
            net, Signed(net.parameters()), override={"decay": [decay]}, copy_initial_weights=False, **settings
        ) as (fnet, diffopt):
            for step in range(8):
                diffopt.step(inner_loss(fnet, step))
            outer = fnet(torch.ones(4, 3), late=True).square().sum()
        assert diffopt.state[0][0]["count"] == 8
        assert diffopt.state[0][5]["count"] == 5 or diffopt.state[0][5]["count"] == 8
        return dict(zip(inputs, torch.autograd.grad(outer, list(inputs.values())), strict=True))

    lowmem_higher.testing.assert_matches_unrolled(loop)


def test_an_unknown_optimizer_is_refused_with_the_way_out() -> None:
    net = Net()
    with pytest.raises(ValueError, match=r"Signed has no differentiable.*Adam, AdamW.*SGD.*register_optim\(Signed"):
        lowmem_higher.get_diff_optim(Signed(net.parameters()), net.parameters())


@pytest.mark.parametrize(
    "pair",
    [(Net, DifferentiableSGD), (Signed, Net), (Signed, 3), (Signed(nn.Linear(1, 1).parameters()), DifferentiableSGD)],
)
def test_register_optim_refuses_what_is_no_optimizer(pair: tuple[Any, Any]) -> None:
    with pytest.raises(TypeError, match="register_optim needs"):
        lowmem_higher.register_optim(*pair)


def test_a_rule_without_update_says_so() -> None:
    net = Net()
    opt = torch.optim.SGD(net.parameters(), lr=0.1)

    class Empty(DifferentiableOptimizer):
        pass

    with lowmem_higher.innerloop_ctx(net, opt) as (fnet, _):
        diffopt = Empty(opt, net.parameters(), fmodel=fnet)
        with pytest.raises(NotImplementedError, match="Empty has no update rule"):
            diffopt.step(inner_loss(fnet, 0))


def test_override_needs_one_value_or_one_for_each_group() -> None:
    net = Net()
    opt = torch.optim.Adam(groups_of(net, several=True))
    with pytest.raises(ValueError, match="2 values; it needs 1, or one for each of the 3 parameter groups"):
        lowmem_higher.get_diff_optim(opt, net.parameters(), override={"lr": [0.1, 0.2]})


def test_the_torch_optimizer_and_its_state_stay_as_they_were() -> None:
    net = Net()
    opt = torch.optim.Adam(net.parameters(), lr=0.1)
    for _ in torch_steps(opt, net, range(3)):
        pass
    before = {(id(p), key): value.clone() for p, entry in opt.state.items() for key, value in entry.items()}
    weights = [param.detach().clone() for param in net.parameters()]
    with lowmem_higher.innerloop_ctx(net, opt, override={"lr": [torch.tensor(1.0)]}, checkpoint_every=2) as (
        fnet,
        diffopt,
    ):
        for step in range(4):
            diffopt.step(inner_loss(fnet, step))
    assert isinstance(diffopt, DifferentiableAdam)
    after = {(id(p), key): value for p, entry in opt.state.items() for key, value in entry.items()}
    assert before.keys() == after.keys()
    assert all(torch.equal(before[key], after[key]) for key in before)
    assert all(torch.equal(a, b) for a, b in zip(weights, net.parameters(), strict=True))
    assert opt.param_groups[0]["lr"] == 0.1
