"""pullback="mixed" where nobody wants the first weights' cotangent: one JVP of the model's outputs is all it takes."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from test_mixed import SlightlyWrong
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode

import lowmem_higher as higher
from lowmem_higher.forward_over_reverse import values_and_derivatives
from lowmem_higher.testing import live_bytes

pytestmark = pytest.mark.usefixtures("float64")

N = 12
Meta = dict[str, Tensor]
Loss = Callable[[Any, Tensor, Tensor, Meta], Tensor]
MIXED = {"checkpoint_every": 1, "pullback": "mixed"}


def weighed(fnet: Any, x: Tensor, y: Tensor, meta: Meta) -> Tensor:
    """Weights of examples, and a learned L2."""
    errors = (fnet(x) - y).square().mean(1)
    penalty = torch.stack([param.square().sum() for param in fnet.parameters()]).sum()
    return (meta["w"].sigmoid() * errors).mean() + meta["b"].exp() * penalty


def weighed_by_a_net(fnet: Any, x: Tensor, y: Tensor, meta: Meta) -> Tensor:
    """Weights that are a function of the losses, not detached."""
    errors = (fnet(x) - y).square().mean(1)
    return (torch.tanh(errors[:, None] * meta["w"] + meta["b"]).sum(1) * errors).mean()


def learned(fnet: Any, x: Tensor, y: Tensor, meta: Meta) -> Tensor:
    """A learned loss of outputs and targets, with a part that is cut off."""
    out = fnet(x)
    return (torch.tanh(out + meta["w"][:, None]) * y).square().mean() + (out.detach() * meta["b"] * out).mean()


def in_two_calls(fnet: Any, x: Tensor, y: Tensor, meta: Meta) -> Tensor:
    """Two calls of the model, one of them detached on the way, one without a gradient."""
    with torch.no_grad():
        level = fnet(x).sigmoid()
    return (meta["w"][:, None] * fnet(x + 1) * level).mean() + (fnet(x).detach() * meta["b"] * fnet(-x)).square().mean()


def through_no_grad(fnet: Any, x: Tensor, y: Tensor, meta: Meta) -> Tensor:
    """What the meta-parameters multiply is partly constant."""
    out = fnet(x)
    with torch.no_grad():
        constant = out * meta["b"]
    return (out * constant * meta["w"][:, None]).sum() + (meta["b"] * out).square().sum()


class Drawing(nn.Module):
    """Dropout, batch statistics, a complex intermediate, and a factor that is a constant for reverse mode."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.norm, self.last = nn.Linear(5, 8), nn.BatchNorm1d(8), nn.Linear(8, 3)

    def forward(self, x: Tensor) -> Tensor:
        hidden = F.dropout(self.norm(self.first(x)).relu(), 0.3, self.training)
        with torch.no_grad():
            scale = hidden.square().mean()
        return self.last(torch.fft.ifft(torch.fft.fft(hidden) * 1.5).real * scale)


class Attentive(nn.Module):
    """A kernel of its own, which has no derivative in forward mode."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.last = nn.Linear(5, 24), nn.Linear(8, 3)

    def forward(self, x: Tensor) -> Tensor:
        query, key, value = self.first(x).reshape(1, 4, -1, 24).chunk(3, dim=-1)
        return self.last(F.scaled_dot_product_attention(query, key, value).reshape(len(x), 8))


LOSSES = [weighed, weighed_by_a_net, learned, in_two_calls, through_no_grad]
OPTIMIZERS: dict[str, tuple[type[torch.optim.Optimizer], dict[str, Any]]] = {
    "sgd": (torch.optim.SGD, {"lr": 0.1, "momentum": 0.9, "nesterov": True, "weight_decay": 0.01}),
    "adam": (torch.optim.Adam, {"lr": 0.01, "eps": 1e-4}),
    "without state": (torch.optim.SGD, {"lr": 0.1}),
}


def plain() -> nn.Module:
    return nn.Sequential(nn.Linear(5, 8), nn.Tanh(), nn.Linear(8, 3))


def run(
    loss: Loss,
    steps: int,
    *,
    optimizer: str = "sgd",
    net: Callable[[], nn.Module] = plain,
    asked: tuple[str, ...] = ("w", "b"),
    lr: bool = False,
    **settings: Any,
) -> tuple[dict[str, Tensor], Any]:
    """The gradients that are asked for, and the report."""
    torch.manual_seed(0)
    model, x, y = net(), torch.randn(N, 5), torch.randn(N, 3)
    meta = {"w": torch.randn(N).requires_grad_(), "b": torch.tensor(-1.5, requires_grad=True)}
    rate = torch.tensor(0.05, requires_grad=True)
    kind, options = OPTIMIZERS[optimizer]
    opt = kind(model.parameters(), **options)
    override = {"lr": [rate]} if lr else None
    with higher.innerloop_ctx(model, opt, override=override, **settings) as (fnet, diffopt):
        for _ in range(steps):
            diffopt.step(loss(fnet, x, y, meta))
        outer = fnet(x).sin().sum()
        known = {**meta, "lr": rate, "first": next(fnet.parameters(time=0))}
    inputs = {name: known[name] for name in (*asked, *(["lr"] if lr else []))}
    found = torch.autograd.grad(outer, list(inputs.values()))
    return dict(zip(inputs, found, strict=True)), getattr(diffopt, "report", None)


def assert_same(found: dict[str, Tensor], expected: dict[str, Tensor]) -> None:
    for name, tensor in expected.items():
        assert tensor.norm() > 1e-7
        assert (found[name] - tensor).norm() <= 1e-9 * tensor.norm(), name


@pytest.mark.parametrize("verify", ["new", "all", "off"])
@pytest.mark.parametrize("steps", [1, 3])
@pytest.mark.parametrize("optimizer", ["sgd", "adam"])
@pytest.mark.parametrize("loss", LOSSES, ids=lambda loss: loss.__name__)
def test_equals_the_full_unroll(loss: Loss, optimizer: str, steps: int, verify: str) -> None:
    for lr in (True, False):
        found, _ = run(loss, steps, optimizer=optimizer, lr=lr, verify=verify, **MIXED)
        assert_same(found, run(loss, steps, optimizer=optimizer, lr=lr)[0])


@pytest.mark.parametrize("net", [Drawing, Attentive])
@pytest.mark.parametrize("loss", LOSSES, ids=lambda loss: loss.__name__)
def test_draws_statistics_of_the_batch_and_attention(loss: Loss, net: Callable[[], nn.Module]) -> None:
    found, report = run(loss, 2, net=net, verify="off", **MIXED)
    assert report.second_order_runs == 1
    assert_same(found, run(loss, 2, net=net)[0])


@pytest.mark.parametrize("asked", [("w",), ("b",), ("w", "b")], ids=str)
@pytest.mark.parametrize("loss", LOSSES, ids=lambda loss: loss.__name__)
def test_the_first_step_takes_one_jvp(loss: Loss, asked: tuple[str, ...]) -> None:
    found, report = run(loss, 1, asked=asked, verify="off", **MIXED)
    assert (report.first_order_runs, report.second_order_runs) == (2, 0)  # the loop, the JVP
    assert_same(found, run(loss, 1, asked=asked)[0])
    compared = run(loss, 1, asked=asked, **MIXED)[1]
    assert (compared.first_order_runs, compared.second_order_runs) == (3, 1)  # the gradient; reverse mode
    longer = run(loss, 3, asked=asked, optimizer="without state", **MIXED)[1]
    assert longer.second_order_runs == 4  # two whole ones, and both ways compared


def test_what_the_jvp_is_not_for() -> None:
    def whole(asked: tuple[str, ...], steps: int = 1, **settings: Any) -> int:
        found, report = run(weighed, steps, asked=asked, verify="off", **MIXED, **settings)
        assert_same(found, run(weighed, steps, asked=asked, optimizer=settings.get("optimizer", "sgd"))[0])
        return int(report.second_order_runs)

    assert whole(("w", "first")) == 1  # the first weights' cotangent is wanted
    assert whole(("w",), steps=4) == 3  # as it is of all steps but the first
    assert whole(("w",), microbatches=2) == 1
    assert run(weighed, 1, optimizer="adam", verify="off", **MIXED)[1].first_order_runs == 3  # v depends on g
    assert run(weighed, 1, lr=True, verify="off", **MIXED)[1].first_order_runs == 3  # so does the rate's cotangent


def image_learned(fnet: Any, x: Tensor, y: Tensor, meta: Meta) -> Tensor:
    return (fnet(x + meta["b"]) - y * meta["w"][:, None]).square().mean()


def penalized(fnet: Any, x: Tensor, y: Tensor, meta: Meta) -> Tensor:
    """A gradient by the weights, taken inside the loss."""
    loss = (meta["w"][:, None] * (fnet(x) - y)).square().mean()
    grads = torch.autograd.grad(loss, list(fnet.parameters()), create_graph=True)
    return loss + meta["b"] * torch.stack([grad.square().sum() for grad in grads]).sum()


def reading_weights(fnet: Any, x: Tensor, y: Tensor, meta: Meta) -> Tensor:
    first = next(iter(fnet.parameters()))
    return (meta["w"][:, None] * (fnet(x) - y)).square().mean() + (meta["b"] * first).square().sum()


def writing(fnet: Any, x: Tensor, y: Tensor, meta: Meta) -> Tensor:
    errors = (fnet(x) - y).square().mean(1)
    errors *= meta["w"]
    return errors.mean() + meta["b"] * errors.square().sum()


def penalized_by_inputs(fnet: Any, x: Tensor, y: Tensor, meta: Meta) -> Tensor:
    x = x.clone().requires_grad_()
    (slope,) = torch.autograd.grad(fnet(x).sum(), x, create_graph=True)
    return (meta["w"] * slope.square().mean(1)).mean() + meta["b"] * slope.mean()


def by_closure(fnet: Any, x: Tensor, y: Tensor, meta: Meta) -> Tensor:
    fnet.shift = meta["b"]
    return (meta["w"][:, None] * (fnet(x) - y)).square().mean()


class Shifted(nn.Module):
    """It reads `shift` without being given it."""

    def __init__(self) -> None:
        super().__init__()
        self.layer, self.shift = nn.Linear(5, 3), torch.zeros(())

    def forward(self, x: Tensor) -> Tensor:
        return torch.tanh(self.layer(x) + self.shift)


@pytest.mark.parametrize(
    "loss", [image_learned, penalized, penalized_by_inputs, reading_weights, writing], ids=lambda loss: loss.__name__
)
def test_what_cannot_be_cut_is_pulled_back_whole(loss: Loss) -> None:
    found, report = run(loss, 1, verify="off", **MIXED)
    assert report.second_order_runs == 1
    assert_same(found, run(loss, 1)[0])


def test_a_forward_that_reads_the_meta_parameter_is_pulled_back_whole() -> None:
    found, report = run(by_closure, 1, net=Shifted, verify="off", **MIXED)
    assert report.second_order_runs == 1
    assert_same(found, run(by_closure, 1, net=Shifted)[0])


@pytest.mark.parametrize("settings", [{}, {"verify": "off"}], ids=str)
def test_state_that_outlives_the_weights_gets_its_cotangent(settings: dict[str, Any]) -> None:
    """The weights are set anew at each step, the momentum is not."""

    def gradients(**settings: Any) -> Tensor:
        torch.manual_seed(0)
        model, x, w = plain(), torch.randn(N, 5), torch.ones(N, requires_grad=True)
        opt = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9)
        with higher.innerloop_ctx(model, opt, **settings) as (fnet, diffopt):
            for _ in range(4):
                diffopt.step((w * fnet(x).sin().mean(1)).mean())
                last = list(fnet.parameters())
                fnet.update_params([param.detach().requires_grad_() for param in last])
            return torch.autograd.grad(torch.stack([param.sin().sum() for param in last]).sum(), w)[0]

    expected = gradients()
    assert (gradients(**MIXED, **settings) - expected).norm() <= 1e-9 * expected.norm()


@pytest.mark.parametrize("settings", [{}, {"verify": "off"}], ids=str)
def test_a_callback_makes_v_depend_on_the_gradient(settings: dict[str, Any]) -> None:
    def gradients(**settings: Any) -> Tensor:
        torch.manual_seed(0)
        model, x, w = plain(), torch.randn(N, 5), torch.ones(N, requires_grad=True)
        opt = torch.optim.SGD(model.parameters(), lr=0.1)
        with higher.innerloop_ctx(model, opt, **settings) as (fnet, diffopt):
            diffopt.step((w * fnet(x).sin().mean(1)).mean(), grad_callback=lambda grads: [grad**3 for grad in grads])
            return torch.autograd.grad(fnet(x).sin().sum(), w)[0]

    expected = gradients()
    assert (gradients(**MIXED, **settings) - expected).norm() <= 1e-9 * expected.norm()


def test_a_loss_that_changed_is_found() -> None:
    """At the third use of a program its gradient is not compared, and none is computed."""
    factor = 1.0

    class Net(nn.Linear):
        def forward(self, x: Tensor) -> Tensor:
            return factor * super().forward(x)

    x, w = torch.randn(N, 5), torch.ones(N, requires_grad=True)
    model = Net(5, 3)
    opt = torch.optim.SGD(model.parameters(), lr=0.1)
    with higher.innerloop_ctx(model, opt, **MIXED) as (fnet, diffopt):
        for _ in range(3):
            fnet.update_params([param.detach().requires_grad_() for param in fnet.parameters()])
            diffopt.step((w * fnet(x).sin().mean(1)).mean())
        factor = 1.01
        with pytest.raises(higher.ReplayMismatchError, match="the loss was"), pytest.warns(higher.MixedFallbackWarning):
            torch.autograd.grad(fnet.fast_params[0].sum(), w)


def test_a_wrong_jvp_is_found_by_the_comparison() -> None:
    def loss(fnet: Any, x: Tensor, y: Tensor, meta: Meta) -> Tensor:
        errors = SlightlyWrong.apply(fnet(x) - y).mean(1)  # type: ignore[no-untyped-call]
        return (meta["w"] * errors).mean() + meta["b"] * errors.square().sum()

    with pytest.warns(higher.MixedFallbackWarning, match=r"for a tensor of shape \(12,\) it gives a derivative"):
        found, _ = run(loss, 1, **MIXED)
    assert_same(found, run(loss, 1)[0])
    unchecked, expected = run(loss, 1, verify="off", **MIXED)[0], run(loss, 1)[0]
    assert (unchecked["w"] - expected["w"]).norm() > 1e-6 * expected["w"].norm()


def deep() -> nn.Module:
    return nn.Sequential(
        nn.Linear(5, 64), *[part for _ in range(12) for part in (nn.Linear(64, 64), nn.Tanh())], nn.Linear(64, 3)
    )


def test_it_takes_less_time_and_hardly_memory() -> None:
    flops, peaks = {}, {}
    for pullback in ("reverse", "mixed"):
        torch.manual_seed(0)
        net, x, y, w = deep(), torch.randn(256, 5), torch.randn(256, 3), torch.ones(256, requires_grad=True)
        opt = torch.optim.SGD(net.parameters(), lr=0.1)
        setting = {"checkpoint_every": 1, "verify": "off", "pullback": pullback}
        with higher.innerloop_ctx(net, opt, **setting) as (fnet, diffopt):
            diffopt.step((w * (fnet(x) - y).square().mean(1)).mean())
            outer = sum(param.sum() for param in fnet.parameters())
            assert isinstance(outer, Tensor)
        with FlopCounterMode(display=False) as counter, live_bytes() as memory:
            outer.backward(inputs=[w])
        flops[pullback], peaks[pullback] = counter.get_total_flops(), memory.peak
    assert flops["mixed"] < 0.61 * flops["reverse"]  # 3 forwards against 5
    assert peaks["mixed"] < 0.35 * peaks["reverse"]


def test_affine_rules_are() -> None:
    """v, the derivative by the gradient along a cotangent, is the same for all gradients."""
    for options in OPTIMIZERS["sgd"][1], {"lr": 0.1, "momentum": 0.5, "dampening": 0.3, "maximize": True}, {"lr": 1.0}:
        param = nn.Parameter(torch.randn(4))
        rule = higher.get_diff_optim(torch.optim.SGD([param], **options), [param])
        assert rule.affine
        group = {name: value for name, value in rule.param_groups[0].items() if name != "params"}

        def update(grad: Tensor, param: Tensor = param, rule: Any = rule, group: Any = group) -> Tensor:
            new, state = rule.update(param.detach(), grad, {"momentum_buffer": torch.ones(4)}, group)
            return torch.cat([new, state["momentum_buffer"]])

        jacobians = [torch.autograd.functional.jacobian(update, grad) for grad in (torch.zeros(4), torch.randn(4))]
        assert torch.equal(*jacobians)
        assert jacobians[0].any()
    assert not higher.get_diff_optim(torch.optim.Adam([param]), [param]).affine


def test_values_and_derivatives() -> None:
    x, v = torch.randn(4), torch.randn(4)
    (exp, same, number), (along, none, other) = values_and_derivatives(lambda x, y: [x.exp(), y, 3], [x, x], [v, None])
    torch.testing.assert_close([exp, along], [x.exp(), v * x.exp()])
    assert torch.equal(same, x)
    assert (none, number, other) == (None, 3, None)
