"""fmodel: the functional view of a module. All of it in the full unroll and under `checkpoint_every`."""

from __future__ import annotations

import abc
import copy
import io
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.utils import parametrizations

import lowmem_higher as higher
from lowmem_higher.testing import assert_matches_unrolled

pytestmark = pytest.mark.usefixtures("float64")

STEPS = 5
SETTINGS: list[dict[str, Any]] = [
    {},
    {"checkpoint_every": 2},
    {"checkpoint_every": 2, "replay": "torch"},
    {"checkpoint_every": 10},
]
X = torch.sin(torch.arange(24, dtype=torch.float64)).reshape(8, 3)
every_setting = pytest.mark.parametrize("setting", SETTINGS, ids=str)


def seeded(build: Callable[[], nn.Module]) -> nn.Module:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(4)
        return build()


class Net(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.encoder = nn.Sequential(nn.Linear(3, 4), nn.Tanh())
        self.norm = nn.BatchNorm1d(4)
        self.layers = nn.ModuleList(nn.Linear(4, 4) for _ in range(3))
        self.heads = nn.ModuleDict({"one": nn.Linear(4, 1), "other": nn.Linear(4, 1)})
        self.scale = nn.Parameter(torch.tensor(0.9))
        self.register_parameter("nothing", None)
        self.register_buffer("unset", None)
        self.register_buffer("shift", torch.full((4,), 0.1), persistent=False)

    def forward(self, x: Tensor, head: str = "one") -> Tensor:
        return self.predict(x, head) * self.scale

    def predict(self, x: Tensor, head: str = "one") -> Tensor:
        hidden = self.norm(self.encoder(x)) + self.shift
        for layer in self.layers[:2]:
            hidden = hidden + layer(hidden).tanh()
        return self.heads[head](self.layers[-1](hidden))


def sgd(model: nn.Module) -> torch.optim.Optimizer:
    return torch.optim.SGD(model.parameters(), lr=0.05, momentum=0.5)


def opened(model: nn.Module, setting: dict[str, Any], **more: Any) -> Any:
    return higher.innerloop_ctx(model, sgd(model), copy_initial_weights=False, **more, **setting)


def loss_of(fmodel: Any) -> Tensor:
    return (fmodel(X) - X.sum(1, keepdim=True)).square().mean()


# ------------------------------------------------------------------------------------------ what it looks like, and
# times


@every_setting
def test_it_is_a_model_of_the_same_class_and_the_original_stays_as_it_was(setting: dict[str, Any]) -> None:
    model = seeded(Net)
    before = {name: value.clone() for name, value in model.state_dict().items()}
    parts = {name: (type(part), part.training, id(part)) for name, part in model.named_modules()}
    with opened(model, setting) as (fmodel, diffopt):
        assert isinstance(fmodel, Net)
        assert isinstance(fmodel.encoder, nn.Sequential)
        assert isinstance(fmodel.layers[0], nn.Linear)
        fmodel.eval()
        fmodel.train()
        for _ in range(STEPS):
            diffopt.step(loss_of(fmodel))
        fmodel.encoder.eval()
        fmodel.flag = True
        assert [name for name, _ in fmodel.named_modules()] == list(parts)
        assert "Net" in repr(fmodel)
        loss_of(fmodel).backward()
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
    assert parts == {name: (type(part), part.training, id(part)) for name, part in model.named_modules()}
    assert not hasattr(model, "flag")


@every_setting
def test_times(setting: dict[str, Any]) -> None:
    """A time for each update: steps, update_params, fast_params =, params=. Negative ones count from the end."""
    model = seeded(Net)
    seen: list[list[Tensor]] = []
    with opened(model, setting) as (fmodel, diffopt):

        def note() -> None:
            seen.append([weight.detach().clone() for weight in fmodel.parameters()])

        note()
        for t in range(3):
            new = diffopt.step(loss_of(fmodel))
            assert all(a is b for a, b in zip(new, fmodel.parameters(), strict=True))
            note()
            if t == 1:
                fmodel.update_params([0.9 * weight for weight in fmodel.parameters()])
                note()
                fmodel.fast_params = [1.1 * weight for weight in fmodel.fast_params]
                note()
        fmodel(X, params=[weight.cos() for weight in fmodel.parameters()])
        note()
        assert isinstance(fmodel.fast_params, list)
        for time, expected in enumerate(seen):
            for asked in (time, time - len(seen)):
                for weight, value in zip(fmodel.parameters(time=asked), expected, strict=True):
                    assert torch.equal(weight, value)
                    assert weight.requires_grad
        for weight, value in zip(fmodel.init_fast_params, seen[0], strict=True):
            assert torch.equal(weight, value)
        for time in (len(seen), -len(seen) - 1):
            with pytest.raises(IndexError, match=f"time={time} is out of range"):
                fmodel.parameters(time=time)
        assert fmodel.track_higher_grads is True


@every_setting
def test_names_and_state_dict(setting: dict[str, Any]) -> None:
    model = seeded(Net)
    with opened(model, setting) as (fmodel, diffopt):
        for _ in range(2):
            diffopt.step(loss_of(fmodel))
        assert [name for name, _ in fmodel.named_parameters()] == [name for name, _ in model.named_parameters()]
        assert all(a is b for (_, a), b in zip(fmodel.named_parameters(), fmodel.parameters(), strict=True))
        assert [name for name, _ in fmodel.named_buffers()] == [name for name, _ in model.named_buffers()]
        assert [name for name, _ in fmodel.layers.named_parameters(prefix="l")] == [
            name for name, _ in model.layers.named_parameters(prefix="l")
        ]
        assert len(list(fmodel.parameters(recurse=False))) == 1
        state = fmodel.state_dict()
        assert list(state) == list(model.state_dict())
        assert not any(value.requires_grad for value in state.values())
        assert torch.equal(state["scale"], fmodel.scale)
        loaded = seeded(Net)
        loaded.load_state_dict(state)
        assert torch.equal(loaded.eval()(X), fmodel.eval()(X))
        file = io.BytesIO()
        torch.save(state, file)


@every_setting
def test_copy_initial_weights(setting: dict[str, Any]) -> None:
    """True (the default): detached leaf copies, which get the gradient. False: the model's parameters get it."""
    model = seeded(Net)
    with higher.innerloop_ctx(model, sgd(model), **setting) as (fmodel, diffopt):
        first = list(fmodel.parameters(time=0))
        assert all(weight.is_leaf and weight.requires_grad for weight in first)
        assert all(weight is not param for weight, param in zip(first, model.parameters(), strict=True))
        for _ in range(2):
            diffopt.step(loss_of(fmodel))
        loss_of(fmodel).backward()
    assert all(param.grad is None for param in model.parameters())
    assert sum(weight.grad is not None for weight in first) == len(first) - 2  # heads["other"] is not used


@pytest.mark.parametrize("every", [None, 2])
def test_without_tracking(every: int | None) -> None:
    """No graph, one time, and the weights that plain training gives."""
    model, plain = seeded(Net), seeded(Net)
    with higher.innerloop_ctx(model, sgd(model), track_higher_grads=False, checkpoint_every=every) as (fmodel, diffopt):
        opt = sgd(plain)
        for _ in range(STEPS):
            diffopt.step(loss_of(fmodel))
            opt.zero_grad()
            loss_of(plain).backward()
            opt.step()
        assert all(weight.is_leaf and weight.requires_grad for weight in fmodel.parameters())
        assert len(fmodel._view.history) == 1
        assert fmodel.track_higher_grads is False
    for (name, ours), theirs in zip(fmodel.state_dict().items(), plain.state_dict().values(), strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-12, atol=1e-12, msg=name)


@every_setting
def test_training_is_that_of_torch(setting: dict[str, Any]) -> None:
    """Weights and buffers after the loop are those of plain training."""
    model, plain = seeded(Net), seeded(Net)
    with opened(model, setting) as (fmodel, diffopt):
        opt = sgd(plain)
        for _ in range(STEPS):
            diffopt.step(loss_of(fmodel))
            opt.zero_grad()
            loss_of(plain).backward()
            opt.step()
    for (name, ours), theirs in zip(fmodel.state_dict().items(), plain.state_dict().values(), strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-12, atol=1e-12, msg=name)


@every_setting
def test_gradients_at_past_times(setting: dict[str, Any]) -> None:
    """Through the tensors of a past time, used in a forward or differentiated by, and through graph edges."""
    model = seeded(Net)
    weights: list[list[Tensor]] = []
    with opened(model, setting) as (fmodel, diffopt):
        for _ in range(STEPS):
            weights.append(list(fmodel.parameters()))
            diffopt.step(loss_of(fmodel))
        outer = loss_of(fmodel.eval())
        for time in (1, 3, 4):
            expected = torch.autograd.grad(outer, weights[time], retain_graph=True, allow_unused=True)
            asked = list(fmodel.parameters(time=time))
            for found in (
                torch.autograd.grad(outer, asked, retain_graph=True, allow_unused=True),
                torch.autograd.grad(outer, fmodel.gradient_edges(time=time), retain_graph=True, allow_unused=True),
            ):
                for ours, theirs in zip(found, expected, strict=True):
                    assert ours is theirs or torch.equal(ours, theirs)
        past = list(fmodel.parameters(time=2))
        distance = sum((a - b).square().sum() for a, b in zip(past, fmodel.parameters(time=4), strict=True))
        by_hand = sum((a - b).square().sum() for a, b in zip(weights[2], weights[4], strict=True))
        params = [param for name, param in model.named_parameters() if "other" not in name]
        for ours, theirs in zip(
            torch.autograd.grad(distance, params, retain_graph=True), torch.autograd.grad(by_hand, params), strict=True
        ):
            assert torch.equal(ours, theirs)


# ---------------------------------------------------------------------------------------------- calling parts of a
# model


def gradients(
    model: Callable[[], nn.Module], inner: Callable[[Any], Tensor], setting: dict[str, Any]
) -> list[Tensor | None]:
    torch.manual_seed(0)
    net = seeded(model)
    with opened(net, setting) as (fmodel, diffopt):
        for _ in range(STEPS):
            diffopt.step(inner(fmodel))
        outer = inner(fmodel)
    return list(torch.autograd.grad(outer, list(net.parameters()), allow_unused=True))


def assert_as(
    model: Callable[[], nn.Module], inner: Callable[[Any], Tensor], reference: Callable[[Any], Tensor]
) -> None:
    """`inner` gives what `reference` gives in the full unroll."""
    expected = gradients(model, reference, {})
    assert any(grad is not None and grad.norm() > 0 for grad in expected)
    for setting in SETTINGS:
        for ours, theirs in zip(gradients(model, inner, setting), expected, strict=True):
            assert ours is theirs or torch.allclose(ours, theirs, rtol=1e-9, atol=1e-12), setting


def by_parts(fmodel: Any) -> Tensor:
    hidden = fmodel.encoder[1](fmodel.encoder[0](X))
    hidden = fmodel.norm(hidden) + fmodel.shift
    for layer in list(fmodel.layers)[:2]:
        hidden = hidden + layer(hidden).tanh()
    return (fmodel.heads["one"](fmodel.layers[2](hidden)) * fmodel.scale - X.sum(1, keepdim=True)).square().mean()


def by_weights(fmodel: Any) -> Tensor:
    hidden = F.linear(X, fmodel.encoder[0].weight, fmodel.encoder[0].bias).tanh()
    hidden = F.batch_norm(hidden, None, None, fmodel.norm.weight, fmodel.norm.bias, training=True) + fmodel.shift
    weights = dict(fmodel.named_parameters())
    for index in range(2):
        hidden = hidden + F.linear(hidden, weights[f"layers.{index}.weight"], fmodel.layers[index].bias).tanh()
    hidden = hidden @ fmodel.layers[2].weight.T + fmodel.layers.get_submodule("2").bias
    out = F.linear(hidden, *fmodel.heads.one.parameters()) * fmodel.scale
    return (out - X.sum(1, keepdim=True)).square().mean()


def by_method(fmodel: Any) -> Tensor:
    return (fmodel.predict(X) * fmodel.scale - X.sum(1, keepdim=True)).square().mean()


def by_class(fmodel: Any) -> Tensor:
    return (Net.predict(fmodel, X, head="one") * fmodel.scale - X.sum(1, keepdim=True)).square().mean()


def by_forward(fmodel: Any) -> Tensor:
    return (fmodel.forward(X) - X.sum(1, keepdim=True)).square().mean()


@pytest.mark.parametrize("inner", [loss_of, by_parts, by_weights, by_method, by_class, by_forward])
def test_every_way_to_reach_a_weight_reads_the_current_one(inner: Callable[[Any], Tensor]) -> None:
    assert_as(Net, inner, loss_of)


class Stack(nn.Sequential):
    def __init__(self, *parts: nn.Module) -> None:
        super().__init__(*(parts or (nn.Linear(3, 4), nn.Tanh(), nn.Linear(4, 4), nn.Tanh(), nn.Linear(4, 1))))


@pytest.mark.parametrize(
    "run",
    [
        lambda stack: stack[4](stack[3](stack[:3](X))),
        lambda stack: stack[1:](stack[0](X)),
        lambda stack: stack[-2:](stack[:-2](X)),
        lambda stack: [value := X, *(value := part(value) for part in stack)][-1],
        lambda stack: stack[::1](X),
        lambda stack: nn.Sequential(*stack[:2], *stack[2:])(X),
        lambda stack: stack.get_submodule("4")(stack[:4](X)),
    ],
)
@pytest.mark.parametrize("kind", [Stack, lambda: nn.Sequential(*Stack())], ids=["own", "Sequential"])
def test_slices_and_items_of_a_sequential(run: Callable[[Any], Tensor], kind: Callable[[], nn.Module]) -> None:
    assert_as(kind, lambda stack: run(stack).square().mean(), lambda stack: stack(X).square().mean())


@every_setting
def test_slices_have_a_repr_and_parameters(setting: dict[str, Any]) -> None:
    model = seeded(Stack)
    with opened(model, setting) as (fmodel, diffopt):
        diffopt.step(fmodel(X).square().mean())
        assert "Linear" in repr(fmodel[:2])
        assert "Linear" in repr(fmodel[0])
        assert all(a is b for a, b in zip(fmodel[:1].parameters(), list(fmodel.parameters())[:2], strict=True))
        assert len(fmodel[1:]) == 4


class Powers(nn.Module):
    """Parameters in lists and dictionaries."""

    def __init__(self, how: str) -> None:
        super().__init__()
        self.powers = nn.ParameterList([nn.Parameter(torch.full((3,), 0.2 + index)) for index in range(3)])
        self.named = nn.ParameterDict(
            {"gain": nn.Parameter(torch.tensor(1.1)), "shift": nn.Parameter(torch.tensor(0.2))}
        )
        self.how = how

    def forward(self, x: Tensor) -> Tensor:
        if self.how == "slice":
            powers = [*list(self.powers[:2]), self.powers[-1]]
        elif self.how == "index":
            powers = [self.powers[index] for index in range(3)]
        else:
            powers = list(self.powers)
        total = sum((x * power).sin().sum(1, keepdim=True) for power in powers)
        return total * self.named["gain"] + self.named.shift


@pytest.mark.parametrize("how", ["index", "slice", "iterate"])
def test_lists_and_dictionaries_of_parameters(how: str) -> None:
    """torch wraps what a slice of a ParameterList holds in new Parameters, which would cut the graph."""
    assert_as(lambda: Powers(how), loss_of, loss_of)
    by_hand = gradients(lambda: Powers("index"), loss_of, {})
    for ours, theirs in zip(gradients(lambda: Powers(how), loss_of, {}), by_hand, strict=True):
        assert ours is not None
        assert torch.equal(ours, theirs)


class Tied(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.first, self.second, self.last = nn.Linear(3, 3), nn.Linear(3, 3), nn.Linear(3, 1)
        self.second.weight = self.first.weight
        self.alias = self.first.bias

    def forward(self, x: Tensor) -> Tensor:
        return self.last(self.second(self.first(x).tanh()).tanh() + self.alias)


class Untied(Tied):
    """The same, sharing nothing: the gradient of a shared parameter is the sum over its places."""

    def forward(self, x: Tensor) -> Tensor:
        weight, bias = self.first.weight, self.first.bias
        hidden = F.linear(F.linear(x, weight, bias).tanh(), weight, self.second.bias).tanh()
        return self.last(hidden + bias)


def test_shared_parameters_are_one() -> None:
    for setting in SETTINGS:
        model = seeded(Tied)
        with opened(model, setting) as (fmodel, diffopt):
            assert len(list(fmodel.parameters())) == len(list(model.parameters())) == 5
            for _ in range(2):
                diffopt.step(loss_of(fmodel))
                assert fmodel.second.weight is fmodel.first.weight
                assert fmodel.alias is fmodel.first.bias
    for setting in SETTINGS:
        for ours, theirs in zip(gradients(Tied, loss_of, setting), gradients(Untied, loss_of, {}), strict=True):
            torch.testing.assert_close(ours, theirs, rtol=1e-9, atol=1e-12)


class Helper:
    def __init__(self, layer: nn.Module) -> None:
        self.weight = layer.weight


class LeadsToItself(nn.Module):
    """Holds its own layers or weights in other ways than as submodules; in the loop they must be the current ones."""

    def __init__(self, how: str) -> None:
        super().__init__()
        self.first, self.last = nn.Linear(3, 3), nn.Linear(3, 1)
        self.how = how
        self.weights = [self.first.weight, self.last.weight]
        self.table = {"first": self.first.weight}
        self.nested = {"all": [self.first.weight, (self.last.weight,)]}
        self.layers = [self.first, self.last]
        self.method = self.first.forward
        self.function = lambda x: self.first(x)
        self.helper = Helper(self.first)

    def forward(self, x: Tensor) -> Tensor:
        bias = self.first.bias
        hidden = {
            "directly": lambda: self.first(x),
            "a list of weights": lambda: F.linear(x, self.weights[0], bias),
            "a dictionary of weights": lambda: F.linear(x, self.table["first"], bias),
            "a nested list of weights": lambda: F.linear(x, self.nested["all"][0], bias),
            "a list of layers": lambda: self.layers[0](x),
            "a bound method": lambda: self.method(x),
            "a lambda": lambda: self.function(x),
            "an object": lambda: F.linear(x, self.helper.weight, bias),
        }[self.how]()
        return self.last(hidden.tanh())


@every_setting
@pytest.mark.parametrize("how", ["a list of weights", "a dictionary of weights", "a list of layers", "a bound method"])
def test_a_model_that_holds_its_parts_twice_is_right(how: str, setting: dict[str, Any]) -> None:
    expected = gradients(lambda: LeadsToItself("directly"), loss_of, {})
    for ours, theirs in zip(gradients(lambda: LeadsToItself(how), loss_of, setting), expected, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-9, atol=1e-12)


@every_setting
@pytest.mark.parametrize("how", ["a nested list of weights", "a lambda", "an object"])
def test_a_model_that_leads_to_the_original_weights_is_right_or_refused(how: str, setting: dict[str, Any]) -> None:
    """What cannot be made to follow the fast weights would train something else, without a word."""
    expected = gradients(lambda: LeadsToItself("directly"), loss_of, {})
    try:
        found = gradients(lambda: LeadsToItself(how), loss_of, setting)
    except (higher.LowmemError, ValueError):
        return
    for ours, theirs in zip(found, expected, strict=True):
        assert torch.allclose(ours, theirs, rtol=1e-9), "trained something else, without a word"


@every_setting
def test_frozen_and_unused_parameters_stay_as_they_were(setting: dict[str, Any]) -> None:
    model = seeded(Net)
    model.layers[0].weight.requires_grad_(False)
    opt = torch.optim.SGD(model.parameters(), lr=0.1, weight_decay=0.3)
    with higher.innerloop_ctx(model, opt, **setting) as (fmodel, diffopt):
        frozen, unused = fmodel.layers[0].weight, fmodel.heads["other"].weight
        seen = []
        for _ in range(3):
            diffopt.step(
                loss_of(fmodel), grad_callback=lambda grads: seen.append([grad is None for grad in grads]) or grads
            )
        assert fmodel.layers[0].weight is frozen
        assert torch.equal(fmodel.heads["other"].weight, unused)  # no weight decay either
        assert not frozen.requires_grad
        assert [name for name, none in zip(dict(model.named_parameters()), seen[0], strict=True) if none] == [
            "layers.0.weight", "heads.other.weight", "heads.other.bias",
        ]  # fmt: skip


@pytest.mark.parametrize("first", ["frozen", "trainable"])
def test_requires_grad_edited_in_the_loop(first: str) -> None:
    """Gradual unfreezing, and freezing, while the weight still is a leaf."""

    def loop(**settings: Any) -> tuple[Tensor, ...]:
        model = seeded(lambda: nn.Sequential(nn.Linear(3, 4), nn.Tanh(), nn.Linear(4, 1)))
        rate = torch.tensor(0.2, requires_grad=True)
        with higher.innerloop_ctx(model, sgd(model), override={"lr": [rate]}, **settings) as (fmodel, diffopt):
            start = fmodel.fast_params
            fmodel[0].weight.requires_grad_(first == "trainable")
            if first == "trainable":
                fmodel.requires_grad_(False)
                fmodel[2].requires_grad_(True)
            for t in range(STEPS):
                if t == 3:
                    start[0].requires_grad_(True)
                diffopt.step(loss_of(fmodel))
            outer = loss_of(fmodel)
        return torch.autograd.grad(outer, [rate, *(weight for weight in start if weight.requires_grad)])

    assert_matches_unrolled(loop, checkpoint_every=(1, 2, 10))


# ------------------------------------------------------------------------------------------------- modes and attributes


@every_setting
def test_train_and_eval(setting: dict[str, Any]) -> None:
    model = seeded(Net)
    with opened(model, setting) as (fmodel, diffopt):
        assert fmodel.eval() is fmodel
        assert not any(part.training for part in fmodel.modules())
        before = fmodel.norm.running_mean.clone()
        fmodel(X)
        assert torch.equal(fmodel.norm.running_mean, before)
        fmodel.train()
        diffopt.step(loss_of(fmodel))
        assert fmodel.norm.num_batches_tracked == 1
        assert all(part.training for part in model.modules())
    assert model.norm.num_batches_tracked == 0


@every_setting
def test_attributes_set_on_it(setting: dict[str, Any]) -> None:
    model = seeded(Net)
    with opened(model, setting) as (fmodel, diffopt):
        fmodel.flag, fmodel.encoder.table = 3, {"a": 1}
        diffopt.step(loss_of(fmodel))
        assert fmodel.flag == 3
        assert fmodel.encoder.table == {"a": 1}
        fmodel.shift = torch.zeros(4)
        assert torch.equal(dict(fmodel.named_buffers())["shift"], torch.zeros(4))
        del fmodel.flag
        with pytest.raises(AttributeError, match="flag"):
            _ = fmodel.flag
        with pytest.raises(AttributeError, match="no_such"):
            _ = fmodel.no_such


@every_setting
def test_methods_of_modules(setting: dict[str, Any]) -> None:
    """What loops call besides forward."""
    model = seeded(Net)
    with opened(model, setting) as (fmodel, diffopt):
        diffopt.step(loss_of(fmodel))
        assert fmodel.get_submodule("layers.1") is fmodel.layers[1]
        assert fmodel.get_buffer("shift") is fmodel.shift
        assert [name for name, _ in fmodel.named_children()] == [name for name, _ in model.named_children()]
        seen = []
        fmodel.apply(lambda part: seen.append(part))
        assert len(seen) == len(list(model.modules()))
        assert sum(weight.numel() for weight in fmodel.parameters()) == sum(
            param.numel() for param in model.parameters()
        )
        assert torch.cat([weight.flatten() for weight in fmodel.parameters()]).requires_grad
        assert nn.utils.parameters_to_vector(fmodel.parameters()).requires_grad
        diffopt.step(loss_of(fmodel))


@every_setting
def test_zero_grad(setting: dict[str, Any]) -> None:
    """A habit of training loops; torch's own warns of weights that are no leaves."""
    model = seeded(Net)
    with opened(model, setting) as (fmodel, diffopt):
        for _ in range(2):
            fmodel.zero_grad()
            diffopt.step(loss_of(fmodel))


@every_setting
def test_get_parameter(setting: dict[str, Any]) -> None:
    model = seeded(Net)
    with opened(model, setting) as (fmodel, diffopt):
        diffopt.step(loss_of(fmodel))
        assert fmodel.get_parameter("layers.2.bias") is fmodel.layers[2].bias


@every_setting
@pytest.mark.parametrize("value", [nn.Parameter, lambda weight: weight], ids=["parameter", "tensor"])
def test_a_weight_assigned_by_name_is_right_or_refused(
    value: Callable[[Tensor], Tensor], setting: dict[str, Any]
) -> None:
    """`fmodel.layer.weight = ...` in the loop; what is right is `update_params` with that weight replaced."""

    def run(setting: dict[str, Any], assign: bool) -> list[Tensor]:
        model = seeded(Net)
        with opened(model, setting) as (fmodel, diffopt):
            for t in range(STEPS):
                if t == 2:
                    new = value(2 * fmodel.encoder[0].weight.detach())
                    new.requires_grad_()
                    if assign:
                        fmodel.encoder[0].weight = new
                        assert fmodel.encoder[0].weight is new
                    else:
                        fmodel.update_params(
                            [
                                new if name == "encoder.0.weight" else weight
                                for name, weight in fmodel.named_parameters()
                            ]
                        )
                diffopt.step(loss_of(fmodel))
            assert fmodel.encoder[0].weight is next(
                weight for name, weight in fmodel.named_parameters() if name == "encoder.0.weight"
            )
            outer = loss_of(fmodel.eval())
        names = [name for name, _ in model.named_parameters() if "other" not in name and name != "encoder.0.weight"]
        return list(torch.autograd.grad(outer, [model.get_parameter(name) for name in names]))

    expected = run({}, assign=False)
    try:
        found = run(setting, assign=True)
    except (higher.LowmemError, TypeError, ValueError, AttributeError):
        return
    for ours, theirs in zip(found, expected, strict=True):
        assert torch.allclose(ours, theirs, rtol=1e-9, atol=1e-12), "silently wrong"


# ------------------------------------------------------------------------------------------------------ kinds of
# modules


class Meta(type):
    def __call__(cls, *args: Any, **kwargs: Any) -> Any:
        made = super().__call__(*args, **kwargs)
        made.finished = True
        return made


class Odd(nn.Module, metaclass=Meta):
    """A metaclass, arguments without defaults, a property, a `__getattr__`, a `__call__` of its own."""

    def __init__(self, width: int, *, out: int) -> None:
        super().__init__()
        self.first, self.last = nn.Linear(3, width), nn.Linear(width, out)

    @property
    def width(self) -> int:
        return self.first.weight.shape[0]

    @property
    def norm(self) -> Tensor:
        return self.first.weight.norm()

    def __getattr__(self, name: str) -> Any:
        if name == "invented":
            return self.last.bias
        return super().__getattr__(name)

    def __call__(self, x: Tensor) -> Tensor:
        return super().__call__(x) + 0.1 * self.norm

    def forward(self, x: Tensor) -> Tensor:
        assert self.finished
        return self.last(self.first(x).tanh()) * self.width + self.invented


class Abstract(nn.Module, abc.ABC):
    @abc.abstractmethod
    def features(self, x: Tensor) -> Tensor: ...

    def forward(self, x: Tensor) -> Tensor:
        return self.features(x).sum(1, keepdim=True)


class Concrete(Abstract):
    __slots__ = ("extra",)

    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Linear(3, 4)

    def features(self, x: Tensor) -> Tensor:
        return self.layer(x).tanh()


class Functions(nn.Module):
    """Callables as attributes: a lambda, a bound method, an activation function."""

    def __init__(self) -> None:
        super().__init__()
        self.layer, self.head = nn.Linear(3, 4), nn.Linear(4, 1)
        self.activation = torch.tanh
        self.run_head = self.head.forward
        self.run_layer = lambda x: self.layer(x)

    def forward(self, x: Tensor) -> Tensor:
        return self.run_head(self.activation(self.layer(x)))


class Attention(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.up, self.attention, self.head = (
            nn.Linear(3, 4),
            nn.MultiheadAttention(4, 2, batch_first=True),
            nn.Linear(4, 1),
        )

    def forward(self, x: Tensor) -> Tensor:
        x = self.up(x).view(2, 4, 4)
        return self.head(self.attention(x, x, x, need_weights=True)[0]).view(8, 1)


class Recurrent(nn.Module):
    def __init__(self, kind: Callable[..., nn.Module]) -> None:
        super().__init__()
        self.cell, self.head = kind(3, 4, num_layers=2, batch_first=True, bidirectional=True), nn.Linear(8, 1)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.cell(x.view(2, 4, 3))[0]).view(8, 1)


def old_weight_norm() -> nn.Module:
    import warnings

    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return nn.utils.weight_norm(nn.Linear(3, 1))


KINDS: dict[str, Callable[[], nn.Module]] = {
    "metaclass": lambda: Odd(4, out=1),
    "abstract": Concrete,
    "functions": Functions,
    "attention": Attention,
    "LSTM": lambda: Recurrent(nn.LSTM),
    "GRU": lambda: Recurrent(nn.GRU),
    "weight_norm": lambda: parametrizations.weight_norm(nn.Linear(3, 1)),
    "old weight_norm": old_weight_norm,
    "spectral_norm": lambda: nn.Sequential(parametrizations.spectral_norm(nn.Linear(3, 4)), nn.Linear(4, 1)),
    "old spectral_norm": lambda: nn.Sequential(nn.utils.spectral_norm(nn.Linear(3, 4)), nn.Linear(4, 1)),
    "orthogonal": lambda: nn.Sequential(parametrizations.orthogonal(nn.Linear(3, 3)), nn.Linear(3, 1)),
    "embedding": lambda: nn.Sequential(Tokens(), nn.Embedding(7, 4), nn.Flatten(), nn.Linear(12, 1)),
    "bilinear": lambda: Twice(nn.Bilinear(3, 3, 1)),
    "group norm": lambda: nn.Sequential(nn.Linear(3, 4), nn.GroupNorm(2, 4), nn.Linear(4, 1)),
    "instance norm": lambda: nn.Sequential(
        nn.Unflatten(1, (1, 3)),
        nn.InstanceNorm1d(1, affine=True, track_running_stats=True),
        nn.Flatten(),
        nn.Tanh(),
        nn.Linear(3, 1),
    ),
    "convolutions": lambda: nn.Sequential(nn.Unflatten(1, (1, 3)), nn.Conv1d(1, 4, 2), nn.Tanh(),
    nn.ConvTranspose1d(4, 2, 2), nn.MaxPool1d(2), nn.Flatten(), nn.Linear(2, 1)),
    "lazy": lambda: _materialized(nn.Sequential(nn.LazyLinear(4), nn.Tanh(), nn.LazyLinear(1))),
    "prelu": lambda: nn.Sequential(nn.Linear(3, 4), nn.PReLU(4), nn.Linear(4, 1)),
}  # fmt: skip


class Tokens(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return (10 * x).abs().long() % 7


class Twice(nn.Module):
    def __init__(self, layer: nn.Module) -> None:
        super().__init__()
        self.layer = layer

    def forward(self, x: Tensor) -> Tensor:
        return self.layer(x, x.sin()).tanh()


def _materialized(net: nn.Module) -> nn.Module:
    net(X)
    return net


@pytest.mark.parametrize("kind", KINDS)
def test_modules_of_all_kinds(kind: str) -> None:
    """The same gradient for every setting, none missing, and the training of plain torch."""
    for setting in SETTINGS:
        model, plain = seeded(KINDS[kind]), seeded(KINDS[kind])
        with opened(model, setting) as (fmodel, diffopt):
            opt = sgd(plain)
            for _ in range(STEPS):
                diffopt.step(loss_of(fmodel))
                opt.zero_grad()
                loss_of(plain).backward()
                opt.step()
            for ours, theirs in zip(fmodel.parameters(), plain.parameters(), strict=True):
                torch.testing.assert_close(ours, theirs, rtol=1e-9, atol=1e-11)
    expected = gradients(KINDS[kind], loss_of, {})
    assert all(grad is not None and grad.isfinite().all() for grad in expected)
    for setting in SETTINGS[1:]:
        for ours, theirs in zip(gradients(KINDS[kind], loss_of, setting), expected, strict=True):
            torch.testing.assert_close(ours, theirs, rtol=1e-8, atol=1e-11)


def test_weight_norm_of_the_old_style_and_of_the_new_agree() -> None:
    """The old one recomputes a plain attribute in a hook. (torch 2.13 differentiates both wrongly to second order.)"""
    expected = gradients(KINDS["weight_norm"], loss_of, {})
    for setting in SETTINGS:
        for ours, theirs in zip(gradients(KINDS["old weight_norm"], loss_of, setting), expected, strict=True):
            torch.testing.assert_close(ours, theirs, rtol=1e-9, atol=1e-12)


def test_a_model_defined_in_a_function_is_freed() -> None:
    """The classes that are made for it lead to its closures, and must not be kept for ever."""
    import gc
    import weakref

    def run() -> weakref.ref[Tensor]:
        captured = torch.ones(3)

        class Local(nn.Module):
            def __init__(self) -> None:
                super().__init__()
                self.layer = nn.Linear(3, 1)

            def forward(self, x: Tensor) -> Tensor:
                return self.layer(x * captured)

        model = Local()
        with opened(model, {"checkpoint_every": 2}) as (fmodel, diffopt):
            diffopt.step(loss_of(fmodel))
        return weakref.ref(captured)

    reference = run()
    gc.collect()
    assert reference() is None


@every_setting
def test_deepcopy_of_the_weights_and_of_the_model(setting: dict[str, Any]) -> None:
    """Copies of the original are independent of the loop; a detached copy of the weights loads into a plain model."""
    model = seeded(Net)
    with opened(model, setting) as (fmodel, diffopt):
        diffopt.step(loss_of(fmodel))
        plain = copy.deepcopy(model)
        plain.load_state_dict(fmodel.state_dict())
        assert type(plain) is Net
        assert torch.equal(plain.eval()(X), fmodel.eval()(X))


def test_models_named_like_our_own_methods() -> None:
    """A submodule or a method called like something of FunctionalModule."""

    class Clash(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.history, self.current, self.slots = nn.Linear(3, 4), nn.Tanh(), nn.Linear(4, 1)

        def forward(self, x: Tensor) -> Tensor:
            return self.slots(self.current(self.history(x)))

        def view(self) -> Iterator[str]:
            yield "view"

    assert_as(Clash, loss_of, loss_of)
