"""Optimizers of your own: a function, an `update`, or an `_update` as written for `higher`."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterator
from typing import Any

import higher
import pytest
import torch
from torch import Tensor, nn

import lowmem_higher
from lowmem_higher import optim
from lowmem_higher.errors import RecordError
from lowmem_higher.optim import DifferentiableAdam, DifferentiableOptimizer, DifferentiableSGD, registry
from lowmem_higher.testing import assert_matches_unrolled, taylor_test

pytestmark = pytest.mark.usefixtures("float64")

Loop = Callable[..., Any]


class Heavy(torch.optim.Optimizer):
    """Heavy ball with decay, which torch does not have under this name; `scale` is for what a rule may like to read."""

    def __init__(self, params: Any, lr: float = 0.1, momentum: float = 0.5, scale: Any = 1.0) -> None:
        super().__init__(params, {"lr": lr, "momentum": momentum, "scale": scale})


def heavy_rule(param: Tensor, grad: Tensor, state: Any, group: Any) -> tuple[Tensor, dict[str, Any]]:
    average = group["momentum"] * state["average"] + grad if "average" in state else grad
    step = state.get("step", 0) + 1
    return param - group["lr"] / step * torch.tanh(average), {"average": average, "step": step}


class WithUpdate(DifferentiableOptimizer):
    def update(self, param: Tensor, grad: Tensor, state: Any, group: Any) -> tuple[Tensor, dict[str, Any]]:
        return heavy_rule(param, grad, state, group)


def heavy_update(self: Any, grouped_grads: Any, **kwargs: Any) -> None:
    """As for `higher`: state that comes to be when it is asked for, masked gradients, `_add`."""
    for index, (group, grads) in enumerate(zip(self.param_groups, grouped_grads, strict=True)):
        for position, (param, grad) in enumerate(zip(group["params"], grads, strict=True)):
            if grad is None:
                continue
            state = self.state[index][position]
            if len(state) == 0:
                state["step"] = 0
                state["average"] = torch.zeros_like(param.data)
            state["step"] += 1
            state["average"] = optim._add(state["average"] * group["momentum"], grad)
            optim._maybe_mask(state["average"], state["average"] == 0.0)
            rate = group["lr"] / state["step"]
            group["params"][position] = optim._add(param, -rate, torch.tanh(state["average"]))


class WithInPlaceUpdate(DifferentiableOptimizer):
    _update = heavy_update


@pytest.fixture(autouse=True)
def rules() -> Iterator[None]:
    before = dict(registry._rules)
    yield
    registry._rules.clear()
    registry._rules.update(before)


class Net(nn.Module):
    """With a parameter that is used late, one whose gradient is zero, and a frozen one."""

    def __init__(self) -> None:
        super().__init__()
        self.inner, self.outer = nn.Linear(3, 4), nn.Linear(4, 2)
        self.late, self.idle = nn.Parameter(torch.tensor(0.3)), nn.Parameter(torch.ones(2))
        self.frozen = nn.Parameter(torch.ones(4), requires_grad=False)
        generator = torch.Generator().manual_seed(3)
        with torch.no_grad():
            for param in (*self.inner.parameters(), *self.outer.parameters()):
                param.copy_(torch.randn(param.shape, generator=generator) * 0.5)

    def forward(self, x: Tensor, late: bool = True) -> Tensor:
        out = self.outer(torch.tanh(self.inner(x) * self.frozen)) + 0.0 * self.idle
        return out + self.late.sin() if late else out


def inner_loss(fnet: Any, step: int) -> Tensor:
    x = torch.linspace(-1, 2, 24).reshape(8, 3) * (1 + step / 7)
    return (fnet(x, late=step >= 2) - x[:, :2].cos()).square().mean()


def loop_over(
    make: Callable[[Net], torch.optim.Optimizer],
    inputs: dict[str, Tensor],
    override: dict[str, Any] | None = None,
    steps: int = 7,
    context: Any = lowmem_higher.innerloop_ctx,
) -> Loop:
    """A loop that returns the gradients by `inputs` and by the initial weights."""

    def loop(**settings: Any) -> dict[str, Tensor]:
        net = Net()
        with context(net, make(net), override=override, copy_initial_weights=False, **settings) as (fnet, diffopt):
            for step in range(steps):
                diffopt.step(inner_loss(fnet, step))
            average = sum(e["average"].sin().sum() for e in diffopt.state[0].values() if "average" in e)
            outer = fnet(torch.ones(4, 3)).square().sum() + fnet.idle.sum() + average
        weights = {name: param for name, param in net.named_parameters() if param.requires_grad}
        asked = {**inputs, **weights}
        return dict(zip(asked, torch.autograd.grad(outer, list(asked.values())), strict=True))

    return loop


def hyperparameters() -> dict[str, Tensor]:
    return {"lr": torch.tensor(0.3, requires_grad=True), "momentum": torch.tensor(0.6, requires_grad=True)}


def heavy_loop(**keywords: Any) -> Loop:
    values = hyperparameters()
    return loop_over(
        lambda net: Heavy(net.parameters()), values, {name: [value] for name, value in values.items()}, **keywords
    )


RULES = {"function": heavy_rule, "update": WithUpdate, "_update": WithInPlaceUpdate}


@pytest.mark.parametrize("kind", RULES)
def test_a_rule_of_your_own_is_checkpointed_exactly(kind: str) -> None:
    lowmem_higher.register_optim(Heavy, RULES[kind])
    assert_matches_unrolled(heavy_loop(), checkpoint_every=(1, 3, 10) if kind == "_update" else (3,))


def test_three_ways_to_write_a_rule_give_the_same() -> None:
    found = []
    for rule, options in ((heavy_rule, {"elementwise": True}), (heavy_rule, {}), *((r, {}) for r in RULES.values())):
        lowmem_higher.register_optim(Heavy, rule, **options)
        found.append(heavy_loop()(checkpoint_every=3))
    for other in found[1:]:
        for name, gradient in found[0].items():
            torch.testing.assert_close(other[name], gradient, rtol=1e-12, atol=1e-15)


@pytest.mark.parametrize(("elementwise", "calls"), [(True, 1), (False, 5)])
def test_small_parameters_are_joined_for_an_elementwise_function(elementwise: bool, calls: int) -> None:
    seen = []

    def rule(param: Tensor, grad: Tensor, state: Any, group: Any) -> tuple[Tensor, dict[str, Any]]:
        seen.append(param.shape)
        return param - group["lr"] * grad, state

    lowmem_higher.register_optim(Heavy, rule, elementwise=elementwise)
    net = Net()
    with lowmem_higher.innerloop_ctx(net, Heavy(net.parameters())) as (fnet, diffopt):
        diffopt.step(inner_loss(fnet, 0))
    assert len(seen) == calls


def test_an_update_written_for_higher_gives_what_it_gives_there() -> None:
    """The same function in a subclass of `higher`'s class, and in one of ours."""
    theirs = type("Theirs", (higher.optim.DifferentiableOptimizer,), {"_update": heavy_update})
    before = dict(higher.optim._opt_mapping)
    higher.register_optim(Heavy, theirs)
    try:
        expected = heavy_loop(context=higher.innerloop_ctx)()
    finally:
        higher.optim._opt_mapping.clear()
        higher.optim._opt_mapping.update(before)
    lowmem_higher.register_optim(Heavy, WithInPlaceUpdate)
    for settings in ({}, {"checkpoint_every": 3}):
        found = heavy_loop()(**settings)
        for name, gradient in expected.items():
            assert gradient.norm() > 0
            torch.testing.assert_close(found[name], gradient, rtol=1e-10, atol=1e-13)


def test_derivative_by_the_hyperparameters_of_an_update_in_place() -> None:
    lowmem_higher.register_optim(Heavy, WithInPlaceUpdate)

    def outer(lr: Tensor, momentum: Tensor, **settings: Any) -> Tensor:
        net, override = Net(), {"lr": [lr], "momentum": [momentum]}
        opt = Heavy(net.parameters())
        with lowmem_higher.innerloop_ctx(net, opt, override=override, **settings) as (fnet, diffopt):
            for step in range(5):
                diffopt.step(inner_loss(fnet, step))
            return fnet(torch.ones(4, 3)).square().sum()

    point = list(hyperparameters().values())
    gradient = torch.autograd.grad(outer(*point, checkpoint_every=2), point)
    assert taylor_test(lambda *at: outer(*at).detach(), [p.detach() for p in point], gradient=list(gradient)) > 1.9


class Coupled(DifferentiableOptimizer):
    """Changes parameters that have no gradient, and reads one parameter for another."""

    def _update(self, grouped_grads: Any, **kwargs: Any) -> None:
        params = self.param_groups[0]["params"]
        pull = params[0] + params[1].sum()
        self.param_groups[0]["params"] = [
            param if not param.requires_grad else param - 0.1 * (param.sin() * pull + (0 if grad is None else grad))
            for param, grad in zip(params, grouped_grads[0], strict=True)
        ]


def test_an_update_may_change_and_read_every_parameter() -> None:
    lowmem_higher.register_optim(Heavy, Coupled)
    assert_matches_unrolled(loop_over(lambda net: Heavy(net.parameters()), {}, steps=6), checkpoint_every=(1, 3))


class Clipped(DifferentiableAdam):
    """Changes gradients, then leaves the update to the class it derives from."""

    def _update(self, grouped_grads: Any, **kwargs: Any) -> None:
        super()._update([[None if g is None else g.clamp(-0.05, 0.05) for g in grads] for grads in grouped_grads])


def test_an_update_may_call_that_of_its_base_class() -> None:
    class Mine(torch.optim.Adam):
        pass

    lowmem_higher.register_optim(Mine, Clipped)
    values = {"lr": torch.tensor(0.03, requires_grad=True)}
    loop = loop_over(lambda net: Mine(net.parameters(), eps=0.01), values, {"lr": [values["lr"]]})
    assert_matches_unrolled(loop, checkpoint_every=(3,))

    def clip(grads: list[Tensor | None]) -> list[Tensor | None]:
        return [None if grad is None else grad.clamp(-0.05, 0.05) for grad in grads]

    nets = Net(), Net()
    with (
        lowmem_higher.innerloop_ctx(nets[0], Mine(nets[0].parameters())) as (mine, own),
        lowmem_higher.innerloop_ctx(nets[1], torch.optim.Adam(nets[1].parameters())) as (plain, adam),
    ):
        for step in range(4):
            own.step(inner_loss(mine, step))
            adam.step(inner_loss(plain, step), grad_callback=clip)
    assert all(torch.equal(a, b) for a, b in zip(mine.parameters(), plain.parameters(), strict=True))
    assert not torch.equal(mine.inner.weight, nets[0].inner.weight)


class Counting(DifferentiableSGD):
    """Keeps plain values on itself and in a group, and a list of numbers in its state."""

    count = 0

    def _update(self, grouped_grads: Any, **kwargs: Any) -> None:
        self.count += 1
        past = self.state[0][3].setdefault("past", deque(maxlen=3))
        past.append(float(grouped_grads[0][3].detach().norm()))
        factor = 1 + self.count / 10 + sum(past) / 10
        self.param_groups[0]["lr"] *= 0.9
        super()._update([[None if grad is None else grad * factor for grad in grads] for grads in grouped_grads])


def test_plain_values_that_an_update_leaves_behind_are_those_of_their_step() -> None:
    class Mine(torch.optim.SGD):
        pass

    lowmem_higher.register_optim(Mine, Counting)
    seen = []

    def loop(**settings: Any) -> Any:
        net = Net()
        opt = Mine(net.parameters(), lr=0.2)
        with lowmem_higher.innerloop_ctx(net, opt, copy_initial_weights=False, **settings) as (fnet, diffopt):
            for step in range(7):
                diffopt.step(inner_loss(fnet, step))
            outer = fnet(torch.ones(4, 3)).square().sum()
        found = torch.autograd.grad(outer, net.inner.weight)
        seen.append((diffopt.count, diffopt.param_groups[0]["lr"], list(diffopt.state[0][3]["past"])))
        return found

    assert_matches_unrolled(loop)
    assert all(values == seen[0] for values in seen)
    assert seen[0][0] == 7
    assert seen[0][1] == pytest.approx(0.2 * 0.9**7)


class CountingUpdate(DifferentiableOptimizer):
    """Counts the calls of its rule on itself."""

    count = 0

    def update(self, param: Tensor, grad: Tensor, state: Any, group: Any) -> tuple[Tensor, dict[str, Any]]:
        self.count += 1
        return param - 0.2 / (1 + self.count / 10) * grad, {}


def test_a_count_that_a_rule_keeps_on_its_optimizer_is_that_of_its_step() -> None:
    lowmem_higher.register_optim(Heavy, CountingUpdate)
    assert_matches_unrolled(loop_over(lambda net: Heavy(net.parameters()), {}, steps=5), checkpoint_every=(1, 3))


# ---------------------------------------------------------------------------------- tensors that a rule reads by itself


class Learned(nn.Module):
    """A learned optimizer: a small net that maps gradients to steps."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second = nn.Linear(1, 3), nn.Linear(3, 1)
        generator = torch.Generator().manual_seed(5)
        with torch.no_grad():
            for param in self.parameters():
                param.copy_(torch.randn(param.shape, generator=generator) * 0.4)

    def forward(self, grad: Tensor) -> Tensor:
        return self.second(torch.tanh(self.first(grad.reshape(-1, 1)))).reshape(grad.shape)


@pytest.mark.parametrize("kind", RULES)
def test_a_learned_optimizer_gets_its_gradient(kind: str) -> None:
    learned = Learned()

    def rule(param: Tensor, grad: Tensor, state: Any, group: Any) -> tuple[Tensor, dict[str, Any]]:
        return param - 0.1 * learned(grad), {}

    class Update(DifferentiableOptimizer):
        def update(self, param: Tensor, grad: Tensor, state: Any, group: Any) -> tuple[Tensor, dict[str, Any]]:
            return rule(param, grad, state, group)

    class InPlace(DifferentiableOptimizer):
        def __init__(self, *args: Any, **kwargs: Any) -> None:
            super().__init__(*args, **kwargs)
            self.net = learned

        def _update(self, grouped_grads: Any, **kwargs: Any) -> None:
            for group, grads in zip(self.param_groups, grouped_grads, strict=True):
                group["params"] = [
                    param if grad is None else param - 0.1 * self.net(grad)
                    for param, grad in zip(group["params"], grads, strict=True)
                ]

    lowmem_higher.register_optim(Heavy, {"function": rule, "update": Update, "_update": InPlace}[kind])
    loop = loop_over(lambda net: Heavy(net.parameters()), dict(learned.named_parameters()), steps=5)
    assert_matches_unrolled(loop, checkpoint_every=(3,), journal=(False, True))


@pytest.mark.parametrize("kind", RULES)
def test_noise_in_a_rule_is_that_of_its_step(kind: str) -> None:
    """Langevin dynamics: a replay draws the same numbers and leaves the generator as it was."""

    def rule(param: Tensor, grad: Tensor, state: Any, group: Any) -> tuple[Tensor, dict[str, Any]]:
        return param - group["lr"] * (grad + group["momentum"] * torch.randn_like(param)), {}

    class Update(DifferentiableOptimizer):
        def update(self, param: Tensor, grad: Tensor, state: Any, group: Any) -> tuple[Tensor, dict[str, Any]]:
            return rule(param, grad, state, group)

    class InPlace(DifferentiableOptimizer):
        def _update(self, grouped_grads: Any, **kwargs: Any) -> None:
            for group, grads in zip(self.param_groups, grouped_grads, strict=True):
                for i, grad in enumerate(grads):
                    if grad is not None:
                        group["params"][i] = rule(group["params"][i], grad, {}, group)[0]

    lowmem_higher.register_optim(Heavy, {"function": rule, "update": Update, "_update": InPlace}[kind])
    assert_matches_unrolled(heavy_loop(), checkpoint_every=(3,), journal=(False, True))


# ------------------------------------------------------------------------------------------------------------- refusals


def changing_state_in_place(self: Any, state: Any, grad: Tensor) -> Tensor:
    state.setdefault("average", grad)
    return state["average"].mul_(0.9)


def changing_grads_in_place(self: Any, state: Any, grad: Tensor) -> Tensor:
    grad *= 0.9
    return grad


def keeping_a_list_of_tensors(self: Any, state: Any, grad: Tensor) -> Tensor:
    state["past"] = [*state.get("past", []), grad]
    return state["past"][0] + grad


def keeping_a_tensor_on_itself(self: Any, state: Any, grad: Tensor) -> Tensor:
    self.last = grad
    return grad


def appending_to_a_list_of_its_own(self: Any, state: Any, grad: Tensor) -> Tensor:
    self.history.append(grad)
    return grad


def putting_a_tensor_into_a_group(self: Any, state: Any, grad: Tensor) -> Tensor:
    self.param_groups[0]["lr"] = self.param_groups[0]["lr"] * 0.9 + 0 * grad.sum()
    return grad


REFUSED = {
    changing_state_in_place: r"changed a tensor that it was given, in place \(.*mul_.*Make a new one",
    changing_grads_in_place: r"changed a tensor that it was given, in place",
    keeping_a_list_of_tensors: r"collection of tensors as state\['past'\].*under a name of its own",
    keeping_a_tensor_on_itself: r"wrote into self\.last, which no replay can follow.*self\.state.*every=None",
    appending_to_a_list_of_its_own: r"wrote into self\.history",
    putting_a_tensor_into_a_group: r"wrote into self\.param_groups\[0\]\['lr'\]",
}


@pytest.mark.parametrize("change", REFUSED, ids=lambda f: f.__name__)
def test_what_no_replay_could_follow_is_refused(change: Any) -> None:
    class Mine(DifferentiableOptimizer):
        def __init__(self, *args: Any, **kwargs: Any) -> None:
            super().__init__(*args, **kwargs)
            self.history: list[Tensor] = []

        def _update(self, grouped_grads: Any, **kwargs: Any) -> None:
            for i, grad in enumerate(grouped_grads[0]):
                if grad is not None:
                    step = change(self, self.state[0][i], grad)
                    self.param_groups[0]["params"][i] = self.param_groups[0]["params"][i] - 0.1 * step

    lowmem_higher.register_optim(Heavy, Mine)
    net = Net()
    with lowmem_higher.innerloop_ctx(net, Heavy(net.parameters()), checkpoint_every=2) as (fnet, diffopt):
        weights, groups, state = fnet.fast_params, [dict(g) for g in diffopt.param_groups], diffopt.state
        with pytest.raises(RecordError, match=REFUSED[change]):
            for step in range(2):
                diffopt.step(inner_loss(fnet, step))
                weights, state = fnet.fast_params, diffopt.state
        assert all(a is b for a, b in zip(fnet.fast_params, weights, strict=True))
        assert diffopt.state is state
        assert diffopt.param_groups == groups
        assert diffopt.history == [] or change is appending_to_a_list_of_its_own


@pytest.mark.parametrize("N", [None, 2])
def test_results_of_the_wrong_kind_are_refused(N: int | None) -> None:
    def shape(self: Any, grads: Any) -> None:
        self.param_groups[0]["params"][3] = self.param_groups[0]["params"][3].sum()

    def kind(self: Any, grads: Any) -> None:
        self.param_groups[0]["params"][3] = None

    def state(self: Any, grads: Any) -> None:
        self.state[0]["all"] = grads[0][3]

    cases = [
        (ValueError, shape, r"_update put a parameter of shape \(\) in the place of one of shape \(4, 3\)"),
        (ValueError, kind, r"_update put a parameter NoneType in the place"),
        (TypeError, state, r"something else than a dictionary into self\.state.*self\.state\[i\]\[j\]\['name'\]"),
    ]
    for error, update, match in cases:
        lowmem_higher.register_optim(Heavy, type("Mine", (DifferentiableOptimizer,), {"_update": update}))
        net = Net()
        with lowmem_higher.innerloop_ctx(net, Heavy(net.parameters()), checkpoint_every=N) as (fnet, diffopt):
            with pytest.raises(error, match=match):
                diffopt.step(inner_loss(fnet, 0))
            assert diffopt.param_groups[0]["params"] == [None] * 7


@pytest.mark.parametrize(
    "wrong",
    [
        lambda p, g, s, group: p - g,
        lambda p, g, s, group: (p - g, None),
        lambda p, g, s, group: (p.sum(), {}),
        lambda p, g, s, group: (0.0, {}),
    ],
)
def test_a_function_that_returns_something_else_is_refused(wrong: Any) -> None:
    lowmem_higher.register_optim(Heavy, wrong)
    net = Net()
    with (
        lowmem_higher.innerloop_ctx(net, Heavy(net.parameters())) as (fnet, diffopt),
        pytest.raises(TypeError, match=r"rule of Heavy must return the new parameter, of shape \(2,\).*\{\*\*state\}"),
    ):
        diffopt.step(inner_loss(fnet, 0))


def test_an_unknown_optimizer_is_refused_with_the_way_out() -> None:
    net = Net()
    with pytest.raises(ValueError, match=r"Heavy has no differentiable.*Adam, AdamW.*SGD.*register_optim\(Heavy, rule"):
        lowmem_higher.get_diff_optim(Heavy(net.parameters()), net.parameters())


@pytest.mark.parametrize(
    "pair",
    [(Net, DifferentiableSGD), (Heavy, Net), (Heavy, 3), (Heavy(nn.Linear(1, 1).parameters()), DifferentiableSGD)],
)
def test_register_optim_refuses_what_is_no_optimizer(pair: tuple[Any, Any]) -> None:
    with pytest.raises(TypeError, match="register_optim needs"):
        lowmem_higher.register_optim(*pair)
    with pytest.raises(TypeError, match="in a class, `elementwise` is an attribute"):
        lowmem_higher.register_optim(Heavy, DifferentiableSGD, elementwise=True)


def test_a_rule_without_update_says_so() -> None:
    net = Net()
    opt = torch.optim.SGD(net.parameters(), lr=0.1)

    class Empty(DifferentiableOptimizer):
        pass

    with lowmem_higher.innerloop_ctx(net, opt) as (fnet, _):
        diffopt = Empty(opt, net.parameters(), fmodel=fnet)
        with pytest.raises(NotImplementedError, match="Empty has no update rule"):
            diffopt.step(inner_loss(fnet, 0))


# ------------------------------------------------------------------------------------------- trainable hyperparameters


@pytest.mark.parametrize("opt_type", list(registry._rules), ids=lambda t: t.__name__)
def test_trainable_hyperparameters_are_every_float_and_go_back(opt_type: type[torch.optim.Optimizer]) -> None:
    net = nn.Linear(3, 2, bias=False)
    opt = opt_type([{"params": [net.weight], "lr": 0.25}])
    before = {key: value for key, value in opt.param_groups[0].items() if key != "params"}
    override = optim.get_trainable_opt_params(opt)
    for key, value in before.items():
        numbers = [v for v in (value if isinstance(value, (tuple, list)) else [value]) if v is not None]
        is_float = bool(numbers) and all(type(v) in (int, float) for v in numbers) and key != "ns_steps"
        assert (key in override) == is_float, key
    leaves = [v for values in override.values() for v in (values[0] if isinstance(values[0], tuple) else values)]
    leaves = [leaf for leaf in leaves if leaf is not None]
    with lowmem_higher.innerloop_ctx(net, opt, override=override, checkpoint_every=2) as (fnet, diffopt):
        for scale in (1.0, -0.7, 0.4):
            diffopt.step((fnet(torch.linspace(-1, scale, 12).reshape(4, 3)) - 1).square().mean())
        gradients = torch.autograd.grad(fnet(torch.ones(1, 3)).sum(), leaves, allow_unused=True)
    assert gradients[list(override).index("lr")].norm() > 0
    with torch.no_grad():
        for leaf in leaves:
            leaf += 0.0625
    optim.apply_trainable_opt_params(opt, override)
    after = opt.param_groups[0]
    assert after["lr"] == 0.3125
    for key, value in before.items():
        if key not in override:
            assert after[key] == value
        for old, new in zip(*((v if isinstance(v, tuple) else (v,)) for v in (value, after[key])), strict=True):
            assert type(new) is (float if type(old) is int and key in override else type(old))
            if key in override and old is not None:
                assert new == pytest.approx(old + 0.0625)


def test_apply_trainable_writes_into_tensors_and_each_group() -> None:
    net = nn.Linear(3, 2)
    rate = torch.tensor([0.5])
    opt = torch.optim.Adam([{"params": [net.weight]}, {"params": [net.bias], "lr": 0.2}], lr=rate)
    override = optim.get_trainable_opt_params(opt)
    assert override["lr"][0].shape == (1,)
    assert override["lr"][0] is not rate
    with torch.no_grad():
        override["lr"][0].fill_(0.7)
        override["lr"][1].fill_(0.3)
    optim.apply_trainable_opt_params(opt, {"lr": override["lr"], "weight_decay": [torch.tensor(2.0)]})
    assert opt.param_groups[0]["lr"] is rate
    assert rate.item() == 0.7
    assert opt.param_groups[1]["lr"] == pytest.approx(0.3)
    assert [group["weight_decay"] for group in opt.param_groups] == [2, 2]
    for wrong, match in (
        ({"lr": [1.0, 2.0, 3.0]}, "has 3 values; it needs 1, or one for each of the 2"),
        ({"momentum": [1.0]}, "names no hyperparameter"),
        ({"lr": [0.9], "betas": [(0.9,)]}, "needs 2 values for each group"),
    ):
        with pytest.raises(ValueError, match=match):
            optim.apply_trainable_opt_params(opt, wrong)
    assert rate.item() == 0.7


# -------------------------------------------------------------------------------------------------- create_diff_optim


def test_create_diff_optim_takes_the_place_of_an_optimizer() -> None:
    net = Net()
    lr = torch.tensor(0.1, requires_grad=True)
    with lowmem_higher.innerloop_ctx(net, torch.optim.SGD(net.parameters(), lr=0.5)) as (fnet, _):
        made = optim.create_diff_optim(torch.optim.Adam, {"eps": 0.1}, fmodel=fnet, override={"lr": [lr]})
        for step in range(3):
            made.step(inner_loss(fnet, step))
        (found,) = torch.autograd.grad(fnet(torch.ones(4, 3)).sum(), lr)
    opt = torch.optim.Adam(net.parameters(), eps=0.1)
    with lowmem_higher.innerloop_ctx(net, opt, override={"lr": [lr]}) as (other, diffopt):
        for step in range(3):
            diffopt.step(inner_loss(other, step))
        (expected,) = torch.autograd.grad(other(torch.ones(4, 3)).sum(), lr)
    assert expected.norm() > 0
    torch.testing.assert_close(found, expected, rtol=1e-12, atol=0)


def test_create_diff_optim_with_some_weights_in_groups() -> None:
    net = Net()
    with lowmem_higher.innerloop_ctx(net, torch.optim.SGD(net.parameters(), lr=0.5)) as (fnet, _):
        groups = [{"params": fnet.outer.bias, "lr": 0.25}, {"params": [fnet.inner.weight]}]
        made = optim.create_diff_optim(torch.optim.SGD, {"lr": 0.5}, params=groups, fmodel=fnet)
        old = dict(fnet.named_parameters())
        loss = inner_loss(fnet, 3)
        grads = torch.autograd.grad(loss, [fnet.outer.bias, fnet.inner.weight], retain_graph=True)
        made.step(loss)
        new = dict(fnet.named_parameters())
    torch.testing.assert_close(new["outer.bias"], old["outer.bias"] - 0.25 * grads[0], rtol=1e-13, atol=0)
    torch.testing.assert_close(new["inner.weight"], old["inner.weight"] - 0.5 * grads[1], rtol=1e-13, atol=0)
    assert all(new[name] is old[name] for name in new if name not in ("outer.bias", "inner.weight"))
    same_shapes = optim.create_diff_optim(torch.optim.SGD, {"lr": 0.5}, params=list(net.parameters()), fmodel=fnet)
    assert same_shapes._group_to_param_list == [list(range(7))]
    with pytest.raises(ValueError, match="params that are not the current weights of fmodel"):
        optim.create_diff_optim(torch.optim.SGD, {"lr": 0.5}, params=[net.inner.weight], fmodel=fnet)
    with pytest.raises(ValueError, match=r"needs the weights.*fmodel=fmodel"):
        optim.create_diff_optim(torch.optim.SGD, {"lr": 0.5})
    with pytest.raises(TypeError, match="needs a class of torch optimizers first"):
        optim.create_diff_optim(torch.optim.SGD(net.parameters(), lr=0.1), fmodel=fnet)
    with pytest.raises(ValueError, match="LBFGS has no differentiable"):
        optim.create_diff_optim(torch.optim.LBFGS, fmodel=fnet)
