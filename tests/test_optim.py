"""The update rules: step by step equal to `torch.optim`, and right in the derivative by every float hyperparameter."""

from __future__ import annotations

import inspect
import itertools
import warnings
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import Any

import higher
import pytest
import torch
from torch import Tensor, nn

import lowmem_higher
from lowmem_higher.optim import (
    DifferentiableAdam,
    DifferentiableMuon,
    DifferentiableOptimizer,
    base,
    registry,
)
from lowmem_higher.testing import assert_matches_unrolled, taylor_test

pytestmark = pytest.mark.usefixtures("float64")

Option = dict[str, Any]


def combinations(**options: tuple[Any, ...]) -> list[Option]:
    return [dict(zip(options, values, strict=True)) for values in itertools.product(*options.values())]


@dataclass(frozen=True)
class Rule:
    """What is tested of one optimizer.

    Args:
        name: In torch.optim.
        options: What its steps are compared under.
        variants: What its derivatives are tested under: between them they reach every line of the rule.
        floats: Every float hyperparameter by its place, and where its derivative is tested.
        steps: Of a loop that is differentiated.
    """

    name: str
    options: list[Option]
    variants: list[Option]
    floats: dict[str, float]
    steps: int = 5
    fixed: Option = field(default_factory=dict)

    @property
    def opt(self) -> type[torch.optim.Optimizer]:
        found: type[torch.optim.Optimizer] = getattr(torch.optim, self.name)
        return found

    def build(self, net: Net, several: bool = False, **option: Any) -> torch.optim.Optimizer:
        return self.opt(groups_of(net, several, matrices=self.name == "Muon"), **{**self.fixed, **option})


MAXIMIZE = {"maximize": (False, True)}
ADAM = {"lr": 0.07, "betas[0]": 0.8, "betas[1]": 0.9, "eps": 0.02, "weight_decay": 0.15}
ADAM_FIXED = {"lr": 0.05, "betas": (0.8, 0.95), "eps": 1e-3}
RULES = [
    Rule(
        "SGD",
        [
            option
            for option in combinations(
                momentum=(0.0, 0.9), dampening=(0.0, 0.3), nesterov=(False, True), weight_decay=(0.0, 0.1), **MAXIMIZE
            )
            if not option["nesterov"] or (option["momentum"] > 0 and option["dampening"] == 0)
        ],
        [{"momentum": 0.9, "dampening": 0.3}, {"momentum": 0.9, "nesterov": True, "maximize": True}, {}],
        {"lr": 0.07, "momentum": 0.7, "dampening": 0.2, "weight_decay": 0.15},
        fixed={"lr": 0.1},
    ),
    Rule(
        "Adam",
        combinations(weight_decay=(0.0, 0.1), amsgrad=(False, True), decoupled_weight_decay=(False, True), **MAXIMIZE),
        [{"amsgrad": True, "weight_decay": 0.1}, {"decoupled_weight_decay": True, "maximize": True}],
        ADAM,
        fixed=ADAM_FIXED,
    ),
    Rule(
        "AdamW",
        combinations(weight_decay=(0.0, 0.1), amsgrad=(False, True), **MAXIMIZE),
        [{"amsgrad": True}, {"maximize": True}],
        ADAM,
        fixed=ADAM_FIXED,
    ),
    Rule(
        "Adadelta",
        combinations(weight_decay=(0.0, 0.1), rho=(0.8, 1.0), **MAXIMIZE),
        [{}, {"maximize": True, "weight_decay": 0.1}],
        {"lr": 0.8, "rho": 0.8, "eps": 0.02, "weight_decay": 0.15},
        fixed={"lr": 0.9, "eps": 1e-2},
    ),
    Rule(
        "Adagrad",
        combinations(weight_decay=(0.0, 0.1), lr_decay=(0.0, 0.2), initial_accumulator_value=(0.0, 0.3), **MAXIMIZE),
        [{}, {"maximize": True, "lr_decay": 0.1, "initial_accumulator_value": 0.1}],
        {"lr": 0.07, "lr_decay": 0.3, "weight_decay": 0.15, "initial_accumulator_value": 0.2, "eps": 0.02},
        fixed={"lr": 0.1},
    ),
    Rule(
        "Adamax",
        combinations(weight_decay=(0.0, 0.1), betas=((0.8, 0.95), (0.8, 0.5)), **MAXIMIZE),
        [{}, {"maximize": True, "weight_decay": 0.1}],
        ADAM,
        fixed={"lr": 0.05, "eps": 1e-3},
    ),
    Rule(
        "ASGD",
        combinations(weight_decay=(0.0, 0.1), t0=(1e6, 2.0), lambd=(1e-4, 0.3), **MAXIMIZE),
        [{"t0": 1.5, "lambd": 0.2}, {"t0": 2.5, "lambd": 0.1, "maximize": True, "weight_decay": 0.1}],
        {"lr": 0.07, "lambd": 0.3, "alpha": 0.6, "t0": 1.3, "weight_decay": 0.15},
        fixed={"lr": 0.1},
    ),
    Rule(
        "NAdam",
        combinations(weight_decay=(0.0, 0.1), decoupled_weight_decay=(False, True), **MAXIMIZE),
        [{"weight_decay": 0.1}, {"decoupled_weight_decay": True, "maximize": True}],
        {**ADAM, "momentum_decay": 0.5},
        fixed={**ADAM_FIXED, "momentum_decay": 0.1},
    ),
    Rule(
        "RAdam",
        combinations(
            weight_decay=(0.0, 0.1),
            decoupled_weight_decay=(False, True),
            betas=((0.8, 0.95), (0.8, 0.5)),  # the second moment comes into play after 6 steps, and never
            **MAXIMIZE,
        ),
        [{"weight_decay": 0.1}, {"decoupled_weight_decay": True, "maximize": True}],
        ADAM,
        steps=8,
        fixed=ADAM_FIXED,
    ),
    Rule(
        "RMSprop",
        combinations(weight_decay=(0.0, 0.1), momentum=(0.0, 0.8), centered=(False, True), **MAXIMIZE),
        [{"momentum": 0.8}, {"centered": True, "maximize": True}],
        {"lr": 0.02, "alpha": 0.8, "eps": 0.05, "weight_decay": 0.15, "momentum": 0.7},
        fixed={"lr": 0.02, "alpha": 0.9, "eps": 1e-3},
    ),
    Rule(
        "Rprop",
        combinations(etas=((0.5, 1.2), (0.3, 1.6)), step_sizes=((1e-6, 50), (0.03, 0.05)), **MAXIMIZE),
        [{}, {"maximize": True, "lr": 0.05}],
        {"lr": 0.04, "etas[0]": 0.6, "etas[1]": 1.3, "step_sizes[0]": 0.033, "step_sizes[1]": 0.06},
        steps=6,
        fixed={"lr": 0.04},
    ),
    Rule(
        "Adafactor",
        [  # a rate of 0.5 is cut to 1 / sqrt(step) from step 5 on
            *combinations(weight_decay=(0.0, 0.1), d=(1.0, 1.4), eps=((None, 1e-3), (0.05, 0.4)), **MAXIMIZE),
            {"lr": 0.5},
        ],
        [{}, {"maximize": True, "weight_decay": 0.1}],
        {"lr": 0.07, "beta2_decay": -0.6, "eps[0]": 0.05, "eps[1]": 0.4, "d": 0.7, "weight_decay": 0.15},
        fixed={"lr": 0.1},
    ),
    Rule(
        "Muon",
        combinations(
            weight_decay=(0.0, 0.1), nesterov=(False, True), adjust_lr_fn=(None, "original", "match_rms_adamw")
        ),
        [{"nesterov": True}, {"nesterov": False, "adjust_lr_fn": "match_rms_adamw", "ns_steps": 3}],
        {
            "lr": 0.03,
            "weight_decay": 0.15,
            "momentum": 0.8,
            "ns_coefficients[0]": 3.2,
            "ns_coefficients[1]": -4.2,
            "ns_coefficients[2]": 1.9,
            "eps": 0.5,
        },
        steps=4,
        fixed={"lr": 0.02},
    ),
]
RULES = [rule for rule in RULES if hasattr(torch.optim, rule.name)]  # Muon and Adafactor are not in all versions
BY_NAME = {rule.name: rule for rule in RULES}


def label(value: Any) -> str:
    if isinstance(value, Rule):
        return value.name
    if isinstance(value, dict):
        return "-".join(f"{key}={item}" for key, item in value.items() if item) or "plain"
    return str(value)


def cases(which: Callable[[Rule], list[Option]]) -> list[tuple[Rule, Option]]:
    """Each rule under each option that the optimizer has in this version of torch."""
    return [
        (rule, option)
        for rule in RULES
        for option in which(rule)
        if option.keys() <= inspect.signature(rule.opt).parameters.keys()
    ]


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


def groups_of(net: Net, several: bool, matrices: bool = False) -> list[Option]:
    groups: list[Option] = [{"params": list(net.parameters())}]
    if several:
        groups = [
            {"params": [net.inner.weight, net.late, net.frozen]},
            {"params": [net.inner.bias, *net.outer.parameters(), net.wide]},
            {"params": [net.idle]},  # and `scale` in no group
        ]
    if matrices:
        groups = [{**group, "params": [param for param in group["params"] if param.ndim == 2]} for group in groups]
    return groups


def inner_loss(net: Any, step: int) -> Tensor:
    x = torch.linspace(-1, 2, 24).reshape(8, 3) * (1 + step / 7)
    return (net(x, late=step >= 3) - x[:, :2].cos()).square().mean()


def torch_steps(opt: torch.optim.Optimizer, net: nn.Module, steps: range) -> Iterator[int]:
    for step in steps:
        opt.zero_grad()
        inner_loss(net, step).backward()
        opt.step()
        yield step


def without_gradients(net: Net) -> Net:
    for param in net.parameters():
        param.grad = None
    return net


# ------------------------------------------------------------------------------------------------------------- values


@pytest.mark.parametrize(
    ("several", "warm", "N"), [(False, False, 2), (True, True, None)], ids=["cold, one group, N=2", "warm, groups"]
)
@pytest.mark.parametrize(("rule", "option"), cases(lambda rule: rule.options), ids=label)
def test_steps_equal_those_of_torch_optim(rule: Rule, option: Option, several: bool, warm: bool, N: int | None) -> None:
    # Too large to be joined with the other parameters; a sum over so many would be rounded in torch's own order.
    wide = 6000 if registry._rules[rule.opt].elementwise else 40
    net = Net(wide)
    opt = rule.build(net, several, **option)
    if several:
        opt.param_groups[0]["lr"] *= 0.7
    if several and "weight_decay" in opt.param_groups[1]:
        opt.param_groups[1]["weight_decay"] = 0.2
    first = 4 if warm else 0
    for _ in torch_steps(opt, net, range(first)):
        pass
    without_gradients(net)
    with lowmem_higher.innerloop_ctx(net, opt, checkpoint_every=N) as (fnet, diffopt):
        for step in torch_steps(opt, net, range(first, first + (8 if rule.name == "RAdam" else 5))):
            returned = diffopt.step(inner_loss(fnet, step))
            assert_equal_to(opt, net, fnet, diffopt)
            assert len(returned) == len(list(net.parameters()))
            assert all(a is b for a, b in zip(returned, fnet.parameters(), strict=True))
    assert (net.inner.weight - Net(wide).inner.weight).norm() > 0.01
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


@pytest.mark.parametrize("rule", RULES, ids=label)
def test_flags_that_choose_a_kernel_change_nothing(rule: Rule) -> None:
    """`foreach`, `fused`, `capturable` and `differentiable`: torch's other kernels have the same state and steps."""
    known = inspect.signature(rule.opt).parameters
    for flag in ("foreach", "fused", "capturable", "differentiable"):
        if flag not in known:
            continue
        theirs = Net()
        runs = flag in ("foreach", "fused")  # the others do not run on a CPU, or not on leaves
        opt = rule.build(theirs, **({flag: True} if runs else {}))
        for _ in torch_steps(opt, theirs, range(2)):
            pass
        without_gradients(theirs)
        if not runs:
            opt.param_groups[0][flag] = True
        with lowmem_higher.innerloop_ctx(theirs, opt) as (fnet, diffopt):
            opt.param_groups[0][flag] = runs
            for step in torch_steps(opt, theirs, range(2, 6)):
                diffopt.step(inner_loss(fnet, step))
                assert_equal_to(opt, theirs, fnet, diffopt)


@pytest.mark.parametrize(("rule", "option"), cases(lambda rule: rule.variants[:1]), ids=label)
def test_torch_goes_on_from_a_committed_state(rule: Rule, option: Option) -> None:
    """Three steps of ours and three of torch's are six of torch's, with state of every kind handed over."""
    net, other = Net(), Net()
    opt, reference = rule.build(net, **option), rule.build(other, **option)
    for _ in torch_steps(reference, other, range(6)):
        pass
    with lowmem_higher.innerloop_ctx(net, opt, checkpoint_every=2) as (fnet, diffopt):
        for step in range(3):
            diffopt.step(inner_loss(fnet, step))
    diffopt.commit(net, opt)
    for _ in torch_steps(opt, net, range(3, 6)):
        pass
    for ours, theirs in zip(net.parameters(), other.parameters(), strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-12, atol=1e-14)


# -------------------------------------------------------------------------------------------------------- derivatives


class SmoothMuon(DifferentiableMuon):
    """Muon without the rounding to bfloat16, which finite differences would see as steps."""

    working_dtype = None


@pytest.fixture
def smooth_muon(monkeypatch: pytest.MonkeyPatch) -> None:
    if "Muon" in BY_NAME:
        monkeypatch.setitem(registry._rules, torch.optim.Muon, SmoothMuon)


def place(name: str) -> tuple[str, int | None]:
    key, _, index = name.partition("[")
    return key, int(index[:-1]) if index else None


def override_of(rule: Rule, values: dict[str, Any]) -> Option:
    """The override that puts these in the place of hyperparameters, with all others of their tuples."""
    found: Option = {}
    for name, value in values.items():
        key, index = place(name)
        found[key] = [
            value if index is None else tuple(values.get(n, v) for n, v in rule.floats.items() if place(n)[0] == key)
        ]
    return found


def differentiated(
    rule: Rule, option: Option, values: dict[str, Any], warm: bool, weights: Tensor | None = None, **keywords: Any
) -> tuple[Tensor, Net]:
    """The outer loss, of the weights and of the optimizer's state, after a loop; and the net it started from."""
    net = Net()
    opt = rule.build(net, **option)
    for _ in torch_steps(opt, net, range(3 if warm else 0)):
        pass
    without_gradients(net)
    if weights is not None:
        nn.utils.vector_to_parameters(weights.detach().clone(), trainable(net))
    override = override_of(rule, values)
    with lowmem_higher.innerloop_ctx(net, opt, override=override, **{"copy_initial_weights": False, **keywords}) as (
        fnet,
        diffopt,
    ):
        for step in range(rule.steps):
            diffopt.step(inner_loss(fnet, step + 2))
        outer = (fnet(torch.ones(4, 3), late=True) + torch.arange(2)).square().sum() + fnet.idle.square().sum()
        state = [value for entry in diffopt.state[0].values() for value in entry.values() if isinstance(value, Tensor)]
        return outer + 0.1 * sum((value + 0.3).sin().sum() for value in state), net


def trainable(net: Net) -> list[nn.Parameter]:
    return [param for param in net.parameters() if param.requires_grad]


def flat(tensors: Any) -> Tensor:
    return torch.cat([tensor.reshape(-1) for tensor in tensors]).detach()


def forbidden(rule: Rule, option: Option, name: str) -> bool:
    if rule.name == "SGD":
        return name in ("momentum", "dampening") and (not option or (name == "dampening" and "nesterov" in option))
    return False


@pytest.mark.usefixtures("smooth_muon")
@pytest.mark.parametrize(
    ("rule", "option", "name", "warm"),
    [
        (rule, option, name, option is not rule.variants[0] and name != "initial_accumulator_value")
        for rule, option in cases(lambda rule: rule.variants)
        for name in rule.floats
        if not forbidden(rule, option, name)
    ],
    ids=label,
)
def test_derivative_by_every_hyperparameter(rule: Rule, option: Option, name: str, warm: bool) -> None:
    point = torch.tensor(rule.floats[name])
    leaf = point.clone().requires_grad_()
    outer, _ = differentiated(rule, option, {name: leaf}, warm, checkpoint_every=3)
    (gradient,) = torch.autograd.grad(outer, leaf)
    assert gradient.isfinite()
    assert gradient.abs() > 1e-6

    def value(at: Tensor) -> Tensor:
        return differentiated(rule, option, {name: at}, warm, track_higher_grads=False)[0].detach()

    assert taylor_test(value, point, gradient=gradient, step=STEP.get(rule.name, 0.05)) > 1.9


STEP = {"Rprop": 1e-3, "Adafactor": 0.01, "Adamax": 0.01, "Muon": 0.01}  # to stay on one side of each kink


@pytest.mark.usefixtures("smooth_muon")
@pytest.mark.parametrize("warm", [False, True], ids=["cold", "warm"])
@pytest.mark.parametrize(("rule", "option"), cases(lambda rule: rule.variants), ids=label)
def test_derivative_by_the_initial_weights(rule: Rule, option: Option, warm: bool) -> None:
    outer, net = differentiated(rule, option, {}, warm, checkpoint_every=3)
    gradient, point = flat(torch.autograd.grad(outer, trainable(net))), flat(trainable(net))
    assert gradient.norm() > 0.1

    def value(weights: Tensor) -> Tensor:
        return differentiated(rule, option, {}, warm, weights, track_higher_grads=False)[0].detach()

    assert taylor_test(value, point, gradient=gradient, step=STEP_OF_WEIGHTS.get(rule.name, 0.01)) > 1.9


STEP_OF_WEIGHTS = {"Rprop": 1e-4, "Adamax": 1e-3, "Adafactor": 1e-3}


def all_gradients(rule: Rule, option: Option, shape: tuple[int, ...] = (), warm: bool = False, **settings: Any) -> Any:
    """By every hyperparameter at once and by the initial weights."""
    names = [name for name in rule.floats if not forbidden(rule, option, name)]
    leaves = {name: torch.full(shape, rule.floats[name], requires_grad=True) for name in names}
    outer, net = differentiated(rule, option, leaves, warm, **settings)
    weights = dict(net.named_parameters())
    weights = {name: weight for name, weight in weights.items() if weight.requires_grad}
    inputs = {**leaves, **weights}
    return dict(zip(inputs, torch.autograd.grad(outer, list(inputs.values()), allow_unused=True), strict=True))


@pytest.mark.parametrize(("rule", "option"), cases(lambda rule: rule.variants), ids=label)
def test_checkpointed_gradients_equal_those_of_the_full_unroll(rule: Rule, option: Option) -> None:
    every = (1, 3, 10) if option is rule.variants[0] and rule.name in ("SGD", "Adam", "Adagrad", "Muon") else (3,)
    assert_matches_unrolled(lambda **settings: all_gradients(rule, option, **settings), checkpoint_every=every)


@pytest.mark.parametrize("rule", RULES, ids=label)
def test_hyperparameters_with_dimensions(rule: Rule) -> None:
    """A tensor of one element counts as a number: it must not broadcast parameters to another shape."""
    plain = all_gradients(rule, rule.variants[0], checkpoint_every=2)
    shaped = all_gradients(rule, rule.variants[0], shape=(1, 1), checkpoint_every=2)
    for name, gradient in plain.items():
        assert gradient.norm() > 0
        torch.testing.assert_close(shaped[name].reshape(gradient.shape), gradient, rtol=1e-11, atol=1e-13)


@pytest.mark.parametrize("name", ["Adadelta", "Adagrad", "Adamax", "RMSprop", "Rprop"])
@pytest.mark.parametrize("warm", [0, 3], ids=["cold", "warm"])
def test_gradients_equal_those_of_higher(name: str, warm: int) -> None:
    """Where those are right: its ASGD gives no gradient to lr, its centered RMSprop NaN."""
    rule = BY_NAME[name]
    found = []
    for library in (higher, lowmem_higher):
        net = Net()
        opt = rule.build(net, **{key: value for key, value in rule.variants[0].items() if key != "maximize"})
        for _ in torch_steps(opt, net, range(warm)):
            pass
        without_gradients(net)
        lr = torch.tensor(rule.floats["lr"], requires_grad=True)
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", "Differentiable R", UserWarning)  # higher's advice on RMSprop and Rprop
            with library.innerloop_ctx(net, opt, override={"lr": [lr]}, copy_initial_weights=False) as (fnet, diffopt):
                for step in range(5):
                    diffopt.step(inner_loss(fnet, step + 2))
                outer = fnet(torch.ones(4, 3), late=True).square().sum() + fnet.idle.square().sum()
        found.append(torch.autograd.grad(outer, [lr, *trainable(net)], allow_unused=True, materialize_grads=True))
    assert found[0][0].norm() > 0 or (warm and name == "Rprop")  # which takes lr for its first step only
    for theirs, ours in zip(*found, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-10, atol=1e-13)


class Separate(nn.Module):
    """Two numbers that have nothing to do with each other."""

    def __init__(self, *which: int) -> None:
        super().__init__()
        self.which = list(which)
        self.weight = nn.Parameter(torch.tensor([0.7, -0.4])[self.which])

    def forward(self, step: int) -> Tensor:
        return (
            (self.weight * torch.tensor([1.3, 0.8])[self.which] + 0.1 * step).sin() + 0.2 * self.weight.square()
        ).sum()


@pytest.mark.parametrize("rule", [rule for rule in RULES if registry._rules[rule.opt].elementwise], ids=label)
def test_a_hyperparameter_for_each_element(rule: Rule) -> None:
    """A tensor of the parameter's shape in the place of each hyperparameter: every element goes its own way."""
    names = [name for name in rule.floats if not forbidden(rule, rule.variants[0], name)]
    values = {name: torch.tensor([1.0, 0.97]) * rule.floats[name] for name in names}
    if rule.name == "RAdam":
        values["betas[1]"] = torch.tensor([0.9, 0.5])  # the second is never rectified

    def run(*which: int) -> list[Tensor]:
        net = Separate(*which)
        leaves = {name: value[list(which)].requires_grad_() for name, value in values.items()}
        opt = rule.opt(net.parameters(), **{**rule.fixed, **rule.variants[0]})
        override = override_of(rule, leaves)
        with lowmem_higher.innerloop_ctx(
            net, opt, override=override, checkpoint_every=3, copy_initial_weights=False
        ) as (fnet, diffopt):
            for step in range(8):
                diffopt.step(fnet(step))
            outer = fnet.weight.exp().sum()
        # Not every one has a part in the weights: t0 of ASGD, eps of RAdam before it is rectified.
        inputs = [*leaves.values(), net.weight]
        return [fnet.weight.detach(), *torch.autograd.grad(outer, inputs, allow_unused=True, materialize_grads=True)]

    for both, one, other in zip(run(0, 1), run(0), run(1), strict=True):
        torch.testing.assert_close(both, torch.cat([one, other]), rtol=1e-12, atol=1e-15)


def test_parameters_that_share_a_rate_for_each_element_are_not_joined() -> None:
    """Two of the same shape in one group get what they get in a group each."""

    def run(*groups: list[str]) -> list[Tensor]:
        net = nn.Module()
        net.one, net.other = nn.Parameter(torch.tensor([0.7, -0.4])), nn.Parameter(torch.tensor([0.2, 0.9]))
        opt = torch.optim.Adam([{"params": [getattr(net, name) for name in names]} for names in groups])
        values = [torch.tensor(v, requires_grad=True) for v in ([0.1, 0.05], [0.9, 0.8])]
        override = {"lr": [values[0]], "betas": [(0.8, values[1])]}
        with lowmem_higher.innerloop_ctx(net, opt, override=override, checkpoint_every=2) as (fnet, diffopt):
            for step in range(4):
                diffopt.step((fnet.one.sin() * fnet.other + step * fnet.other.square()).sum())
            outer = (fnet.one.exp() * fnet.other).sum()
        return [fnet.one.detach(), fnet.other.detach(), *torch.autograd.grad(outer, values)]

    for together, apart in zip(run(["one", "other"]), run(["one"], ["other"]), strict=True):
        torch.testing.assert_close(together, apart, rtol=1e-12, atol=0)


@pytest.mark.parametrize("numbers", [True, False], ids=["numbers", "tensors"])
@pytest.mark.parametrize(
    ("rule", "option"),
    [case for case in cases(lambda rule: rule.variants[-1:]) if registry._rules[case[0].opt].elementwise],
    ids=label,
)
def test_joined_parameters_get_the_same_numbers(
    rule: Rule, option: Option, numbers: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    def run() -> list[Tensor]:
        if not numbers:
            return list(all_gradients(rule, option, warm=True, checkpoint_every=2).values())
        outer, net = differentiated(rule, option, {}, warm=True, checkpoint_every=2)
        return [outer.detach(), *torch.autograd.grad(outer, trainable(net))]

    joined = run()
    monkeypatch.setattr(base, "_JOINED_UP_TO", -1)
    for one, other in zip(joined, run(), strict=True):
        torch.testing.assert_close(one, other, rtol=1e-12, atol=1e-14)


@pytest.mark.parametrize(("rule", "option"), cases(lambda rule: rule.variants), ids=label)
def test_no_nan_where_the_second_moment_is_zero(rule: Rule, option: Option) -> None:
    """`idle` has a gradient that is exactly zero, at every step; its root has an infinite derivative.

    With torch's own default of every hyperparameter: eps is so small that it does not help.
    """
    defaults = inspect.signature(rule.opt).parameters
    leaves = {}
    for name in rule.floats:
        if not forbidden(rule, option, name):
            key, index = place(name)
            value = defaults[key].default if index is None else defaults[key].default[index]
            leaves[name] = torch.tensor(1e-16 if value is None else float(value), requires_grad=True)
    outer, net = differentiated(rule, option, leaves, warm=False, checkpoint_every=3)
    inputs = [*leaves.values(), *trainable(net)]
    gradients = torch.autograd.grad(outer, inputs)
    assert all(gradient.isfinite().all() for gradient in gradients)
    assert all(gradient.norm() > 0 for gradient in gradients[len(leaves) :])


class Complex(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        generator = torch.Generator().manual_seed(2)
        self.weight = nn.Parameter(torch.randn(3, 2, dtype=torch.complex128, generator=generator))
        self.bias = nn.Parameter(torch.randn(2, dtype=torch.complex128, generator=generator))

    def forward(self, step: int) -> Tensor:
        x = torch.linspace(-1, 1, 12).reshape(4, 3) * (1 + 0.2j * step)
        return (x @ self.weight + self.bias - 1j).abs().square().mean()


@pytest.mark.parametrize("rule", [rule for rule in RULES if registry._rules[rule.opt].elementwise], ids=label)
def test_complex_parameters(rule: Rule) -> None:
    """Their real and imaginary parts count as elements."""
    net = Complex()
    opt = rule.opt(net.parameters(), **{**rule.fixed, **rule.variants[0]})
    with lowmem_higher.innerloop_ctx(net, opt, checkpoint_every=2) as (fnet, diffopt):
        for step in range(4):
            opt.zero_grad()
            net(step).backward()
            opt.step()
            diffopt.step(fnet(step))
            assert_equal_to(opt, net, fnet, diffopt)

    def loop(**settings: Any) -> Any:
        net, lr = Complex(), torch.tensor(0.05, requires_grad=True)
        opt = rule.opt(net.parameters(), **{**rule.fixed, **rule.variants[0]})
        with lowmem_higher.innerloop_ctx(net, opt, override={"lr": [lr]}, copy_initial_weights=False, **settings) as (
            fnet,
            diffopt,
        ):
            for step in range(4):
                diffopt.step(fnet(step))
            return torch.autograd.grad(fnet(5), [lr, *net.parameters()])

    assert_matches_unrolled(loop, checkpoint_every=(3,), replay=("native",))


@pytest.mark.parametrize("name", [name for name in ("Adafactor", "Muon") if name in BY_NAME])
def test_complex_parameters_are_refused_where_torch_refuses_them(name: str) -> None:
    net = Complex()
    opt = BY_NAME[name].opt([net.weight])
    with (
        lowmem_higher.innerloop_ctx(net, opt) as (fnet, diffopt),
        pytest.raises(ValueError, match=rf"{name} has no rule for complex parameters.*as two parameters"),
    ):
        diffopt.step(fnet(0))


def test_a_centered_variance_below_zero_by_rounding_is_zero() -> None:
    """A constant gradient has none; torch's own RMSprop gives NaN for it."""
    net = nn.Linear(3, 1, bias=False)
    x = torch.tensor([[0.1, 0.3, 0.7]])
    opt = torch.optim.RMSprop(net.parameters(), centered=True, alpha=0.5, eps=0.1)
    with lowmem_higher.innerloop_ctx(net, opt, checkpoint_every=10, copy_initial_weights=False) as (fnet, diffopt):
        for _ in range(60):
            diffopt.step(fnet(x).sum())
        squares, mean = diffopt.state[0][0]["square_avg"], diffopt.state[0][0]["grad_avg"]
        assert (squares - mean * mean).min() <= 0
        (gradient,) = torch.autograd.grad(fnet(x).sum(), net.weight)
    torch.testing.assert_close(gradient, x)


@pytest.mark.skipif("Muon" not in BY_NAME, reason="this torch has no Muon")
@pytest.mark.parametrize("shape", [(4, 3), (2, 5)], ids=str)
def test_muon_is_differentiated_without_its_rounding(shape: tuple[int, int]) -> None:
    """One step has the values of bfloat16, and the derivative of the same iteration in float64."""
    values = torch.randn(3, *shape, generator=torch.Generator().manual_seed(0))
    net = nn.Linear(*reversed(shape), bias=False)
    opt = torch.optim.Muon(net.parameters(), lr=0.1)
    group = {key: value for key, value in opt.param_groups[0].items() if key != "params"}
    results = []
    for kind in (DifferentiableMuon, SmoothMuon):
        param, grad, buffer = (value.clone().requires_grad_() for value in values)
        momentum = torch.tensor(0.9, requires_grad=True)
        rule = kind(opt, net.parameters())
        new, _ = rule.update(param, grad, {"momentum_buffer": buffer}, {**group, "momentum": momentum})
        vector = torch.linspace(-1, 1, new.numel()).reshape(shape)
        results.append((new.detach(), torch.autograd.grad(new, (param, grad, buffer, momentum), vector)))
    (rounded, found), (smooth, expected) = results
    assert 1e-5 < (rounded - smooth).abs().max() < 0.1 * 2**-5
    torch.testing.assert_close(found, expected, rtol=1e-12, atol=1e-14)


def test_an_initial_accumulator_is_overridden_before_the_first_step_only() -> None:
    net = Net()
    opt = torch.optim.Adagrad(net.parameters(), initial_accumulator_value=0.1)
    for _ in torch_steps(opt, net, range(1)):
        pass
    with lowmem_higher.innerloop_ctx(net, opt, override={"initial_accumulator_value": [5.0]}) as (fnet, diffopt):
        diffopt.step(inner_loss(fnet, 0))
        assert diffopt.state[0][0]["sum"].max() < 5
        late = [name for name, _ in net.named_parameters()].index("late")
        assert "sum" not in diffopt.state[0][late]
        diffopt.step(inner_loss(fnet, 4))
        assert diffopt.state[0][late]["sum"].min() > 5


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


# --------------------------------------------------------------------------------------------------------- taking over


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
