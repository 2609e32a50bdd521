"""pullback="mixed": the same gradients as the full unroll, without second-order graphs; or reverse mode and a warning.

The gradients are compared in float64 to a relative 1e-9. A warning is an error in these tests, so a loop that passes
without `pytest.warns` was pulled back by mixed mode.
"""

from __future__ import annotations

import functools
import math
import warnings
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from loops import (
    LOOPS,
    Loop,
    Run,
    adam,
    adamw_warm,
    batch_norm,
    callback,
    checkpoint_in_model,
    custom_function,
    example_weights,
    gradient_penalty,
    gradients,
    hidden_state,
    in_place,
    mlp,
    nested_checkpoint_in_model,
    rows,
    sgd,
    sgd_for,
    sgd_nesterov_groups,
    submodules,
    transformer,
)
from torch import Tensor, nn

import lowmem_higher
from lowmem_higher import MixedFallbackWarning, ReplayMismatchError
from lowmem_higher.forward_over_reverse import gradient_and_derivative
from lowmem_higher.testing import live_bytes

# What `torch.func` refuses: saved-tensor hooks, and custom functions without `setup_context`.
NOT_MIXED = (checkpoint_in_model, nested_checkpoint_in_model, custom_function)
BLOCKS = (nn.Linear, nn.BatchNorm1d, nn.TransformerEncoderLayer, nn.Conv2d)


@functools.cache
def unrolled(loop: Loop, steps: int) -> dict[str, Tensor | None]:
    torch.manual_seed(0)
    return gradients(loop, steps, checkpoint_every=None)


def mixed(loop: Loop, steps: int, **settings: Any) -> dict[str, Tensor | None]:
    torch.manual_seed(0)
    return gradients(loop, steps, **{"checkpoint_every": 2, "pullback": "mixed", **settings})


def assert_same(found: dict[str, Tensor | None], expected: dict[str, Tensor | None]) -> None:
    assert found.keys() == expected.keys()
    for name, tensor in expected.items():
        other = found[name]
        assert tensor is not None
        assert other is not None, f"no gradient {name}"
        assert tensor.norm() > 1e-7, f"the unroll's gradient {name} proves nothing"
        assert (other - tensor).norm() <= 1e-9 * tensor.norm(), f"gradient {name}"


# ---------------------------------------------------------------------------------------------------- the same gradient


@pytest.mark.parametrize("settings", [{}, {"verify": "off"}, {"verify": "off", "blocks": BLOCKS}], ids=str)
@pytest.mark.parametrize("loop", [loop for loop in LOOPS if loop not in NOT_MIXED], ids=lambda loop: loop.__name__)
def test_mixed_mode_equals_the_full_unroll(loop: Loop, settings: dict[str, Any]) -> None:
    if "blocks" in settings and loop is gradient_penalty:
        with pytest.warns(MixedFallbackWarning, match="an inner derivative, create_graph=True, passes through a block"):
            found = mixed(loop, 5, **settings)
    else:
        found = mixed(loop, 5, **settings)
    assert_same(found, unrolled(loop, 5))


@pytest.mark.parametrize("loop", [sgd, adam, adamw_warm, example_weights, submodules], ids=lambda loop: loop.__name__)
@pytest.mark.parametrize("count", [2, 3, 8])
def test_micro_batches_equal_the_full_unroll(loop: Loop, count: int) -> None:
    assert_same(mixed(loop, 5, microbatches=count), unrolled(loop, 5))
    assert_same(mixed(loop, 5, microbatches=count, blocks=BLOCKS, verify="off"), unrolled(loop, 5))


@pytest.mark.parametrize(
    "settings",
    [
        {"checkpoint_every": 1},
        {"checkpoint_every": 50},
        {"checkpoint_every": None, "checkpoints": 2},
        {"journal": True},
        {"store": "host"},
        {"store": "host", "journal": True},
        {"verify": "all"},
    ],
    ids=str,
)
@pytest.mark.parametrize("loop", [sgd, callback, adam], ids=lambda loop: loop.__name__)
def test_with_other_settings(loop: Loop, settings: dict[str, Any]) -> None:
    assert_same(mixed(loop, 7, **settings), unrolled(loop, 7))


def test_truncated_gradients_are_those_of_reverse_mode() -> None:
    found, expected = mixed(sgd, 7, truncate=3), mixed(sgd, 7, truncate=3, pullback="reverse")
    reached = [name for name, gradient in expected.items() if gradient is not None]
    assert "lr" in reached
    assert [name for name, gradient in found.items() if gradient is not None] == reached
    assert_same({name: found[name] for name in reached}, {name: expected[name] for name in reached})


class Block(nn.Module):
    """A transformer block, pre-norm, causal."""

    def __init__(self, width: int, dropout: float = 0.0) -> None:
        super().__init__()
        self.norm1, self.norm2 = nn.LayerNorm(width), nn.LayerNorm(width)
        self.qkv, self.out = nn.Linear(width, 3 * width), nn.Linear(width, width)
        self.up, self.down = nn.Linear(width, 4 * width), nn.Linear(4 * width, width)
        self.dropout = dropout

    def forward(self, x: Tensor, *, scale: float = 1.0) -> Tensor:
        batch, length, width = x.shape
        q, k, v = self.qkv(self.norm1(x)).view(batch, length, 3, 2, width // 2).permute(2, 0, 3, 1, 4)
        attended = F.scaled_dot_product_attention(q, k, v, is_causal=True)
        x = x + scale * self.out(attended.transpose(1, 2).reshape(batch, length, width))
        return x + F.dropout(self.down(F.gelu(self.up(self.norm2(x)))), self.dropout, self.training)


class Transformer(nn.Module):
    def __init__(self, blocks: int, width: int = 4, words: int = 5, length: int = 3, dropout: float = 0.0) -> None:
        super().__init__()
        self.embed, self.place = nn.Embedding(words, width), nn.Parameter(torch.zeros(length, width))
        self.blocks = nn.ModuleList(Block(width, dropout) for _ in range(blocks))
        self.norm, self.head = nn.LayerNorm(width), nn.Linear(width, words)

    def forward(self, tokens: Tensor) -> Tensor:
        x = self.embed(tokens) + self.place
        for block in self.blocks:
            x = block(x, scale=0.9)
        return self.head(self.norm(x))


def language_model(run: Run, dropout: float = 0.0, optimizer: type[torch.optim.Optimizer] = torch.optim.SGD) -> Tensor:
    """A small GPT whose examples are weighted, and taken by their indices."""
    net = run.net(Transformer(2, dropout=dropout))
    tokens = torch.arange(4 * 12).reshape(12, 4).mul(7).remainder(11) % 5
    weight, lr = run.leaf("weight", torch.linspace(0.5, 1.5, 12)), run.leaf("lr", 0.05)
    with run.context(net, optimizer(net.parameters(), lr=0.1), {"lr": [lr]}) as (fnet, diffopt):
        for t in range(run.steps):
            index = (torch.arange(4) * 5 + t) % 12
            batch = tokens[index]
            logits = fnet(batch[:, :-1])
            losses = F.cross_entropy(logits.flatten(0, 1), batch[:, 1:].reshape(-1), reduction="none")
            diffopt.step((weight[index] * losses.view(-1, 3).mean(1)).mean())
        return fnet(tokens[:, :-1]).tanh().sum()


@pytest.mark.parametrize("optimizer", [torch.optim.SGD, torch.optim.AdamW])
@pytest.mark.parametrize(
    "settings",
    [
        {"blocks": (Block,)},
        {"blocks": lambda module: isinstance(module, Block), "microbatches": 2},
        {"blocks": Block, "microbatches": 4, "verify": "off", "journal": True},
        {"microbatches": 3, "checkpoint_every": 1},
    ],
    ids=["classes", "predicate", "class", "parts"],
)
def test_a_language_model(settings: dict[str, Any], optimizer: type[torch.optim.Optimizer]) -> None:
    loop = functools.partial(language_model, optimizer=optimizer)
    torch.manual_seed(0)
    assert_same(mixed(loop, 3, **settings), gradients(loop, 3, checkpoint_every=None))


@pytest.mark.parametrize("loop", [sgd, adam, sgd_nesterov_groups], ids=lambda loop: loop.__name__)
def test_parameters_updated_a_few_at_a_time(loop: Loop, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(lowmem_higher.mixed, "_SMALL", 0)
    assert_same(mixed(loop, 5), unrolled(loop, 5))


@pytest.mark.parametrize("verify", ["new", "off"])
def test_blocks_draw_the_same_dropout_again(verify: str) -> None:
    loop = functools.partial(language_model, dropout=0.3)
    torch.manual_seed(0)
    expected = gradients(loop, 3, checkpoint_every=None)
    assert_same(mixed(loop, 3, blocks=Block, verify=verify), expected)


class Picture(nn.Module):
    """Convolutions with each normalization, and places where reverse mode stops and tangents must."""

    def __init__(self) -> None:
        super().__init__()
        self.body = nn.Sequential(nn.Conv2d(1, 4, 3), nn.BatchNorm2d(4), nn.Tanh(), nn.Conv2d(4, 4, 3))
        self.norms = nn.Sequential(nn.InstanceNorm2d(4, affine=True), nn.Sigmoid(), nn.GroupNorm(2, 4), nn.Flatten())
        self.head = nn.Linear(16, 3)

    def forward(self, x: Tensor) -> Tensor:
        hidden = self.norms(self.body(x).sin())
        with torch.no_grad():
            gate = (hidden * 2).tanh()
        out = self.head(hidden * gate + hidden.data.sin())
        if torch.is_grad_enabled():
            (constant,) = torch.autograd.grad(out.square().sum(), self.head.weight, retain_graph=True)
            out = out + 0.01 * constant.mean(1)
        return out


def picture(run: Run) -> Tensor:
    """In train and in eval mode, by turns; a target that is no function of the weights."""
    net, x, y = run.net(Picture()), run.data(6, 1, 6, 6), run.data(6, 3)
    with run.context(net, sgd_for(net, lr=0.001)) as (fnet, diffopt):
        for t in range(run.steps):
            fnet.train(t % 3 != 2)
            out = fnet(x)
            with torch.no_grad():
                target = fnet(x.flip(0)).tanh()
            diffopt.step(F.mse_loss(out, y) + F.mse_loss(out, target, reduction="sum") - (out.detach() * out).mean())
        return fnet(x).tanh().sum()


@pytest.mark.parametrize("settings", [{}, {"verify": "off"}], ids=str)
def test_convolutions_normalizations_and_stops(settings: dict[str, Any]) -> None:
    assert_same(mixed(picture, 4, **settings), unrolled(picture, 4))
    assert_same(mixed(picture, 4, **settings, blocks=nn.Sequential), unrolled(picture, 4))


def test_retained_graphs_and_a_loop_whose_model_is_gone() -> None:
    run = Run(4, checkpoint_every=3, pullback="mixed", blocks=nn.Linear)
    outer = sgd(run)
    inputs = list(run.inputs.values())
    first = torch.autograd.grad(outer, inputs, retain_graph=True)
    second = torch.autograd.grad(outer, inputs)
    expected = unrolled(sgd, 4)
    assert_same(dict(zip(run.inputs, first, strict=True)), expected)
    assert_same(dict(zip(run.inputs, second, strict=True)), expected)


def test_terms_of_the_outer_loss_run_blocks_too() -> None:
    def loop(run: Run) -> Tensor:
        net, x, y = run.net(mlp()), run.data(12, 3), run.data(12, 1)
        outer = torch.zeros((), dtype=torch.float64)
        with run.context(net, sgd_for(net)) as (fnet, diffopt):
            for t in range(run.steps):
                diffopt.step((fnet(x[rows(t)]) - y[rows(t)]).square().mean())
                outer = outer + diffopt.outer(fnet(x).sin().mean())
            return outer

    assert_same(mixed(loop, 4, blocks=nn.Linear), unrolled(loop, 4))


def test_the_derivative_of_a_gradient() -> None:
    x, y, v = (torch.randn(4, dtype=torch.float64) for _ in range(3))
    value, (by_x, by_y), (along_x, along_y) = gradient_and_derivative(
        lambda x, y: (x.exp() * y.sin()).sum(), [x, y], [v, None]
    )
    assert value == (x.exp() * y.sin()).sum()
    assert along_x is not None
    assert along_y is not None
    torch.testing.assert_close([by_x, by_y], [x.exp() * y.sin(), x.exp() * y.cos()])
    torch.testing.assert_close([along_x, along_y], [v * x.exp() * y.sin(), v * x.exp() * y.cos()])


# -------------------------------------------------------------------------------------------------------------- passes


def report_of(loop_optimizer: type[torch.optim.Optimizer], steps: int, **settings: Any) -> Any:
    net, x = mlp().double(), torch.linspace(-1, 1, 24, dtype=torch.float64).reshape(8, 3)
    opt = loop_optimizer(net.parameters(), lr=0.1)
    with lowmem_higher.innerloop_ctx(
        net, opt, copy_initial_weights=False, pullback="mixed", **{"checkpoint_every": 1, **settings}
    ) as (fnet, diffopt):
        for _ in range(steps):
            diffopt.step((fnet(x) - 1).square().mean())
        fnet(x).square().mean().backward()
    return diffopt.report


def test_passes_are_as_documented() -> None:
    T = 6
    sgd_report = report_of(torch.optim.SGD, T)
    assert sgd_report.second_order_runs == T + 1  # one of them compares
    assert sgd_report.first_order_runs == T + 1  # the inner gradient, until v is seen not to depend on it
    assert report_of(torch.optim.SGD, T, verify="all").second_order_runs == 2 * T
    assert report_of(torch.optim.SGD, T, verify="off").second_order_runs == T
    adam_report = report_of(torch.optim.Adam, T)
    assert adam_report.first_order_runs == 2 * T
    assert report_of(torch.optim.Adam, T, journal=True).first_order_runs == T


# ------------------------------------------------------------------------------------------------------------ fallbacks


class RightTangent(torch.autograd.Function):
    """A square with derivatives of its own, in both modes."""

    @staticmethod
    def forward(x: Tensor) -> Tensor:
        return x.square()

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
        ctx.save_for_backward(inputs[0])
        ctx.save_for_forward(inputs[0])

    @staticmethod
    def backward(ctx: Any, cotangent: Tensor) -> Tensor:
        return 2 * ctx.saved_tensors[0] * cotangent

    @staticmethod
    def jvp(ctx: Any, tangent: Tensor) -> Tensor:
        return 2 * ctx.saved_tensors[0] * tangent


def applied(function: type[torch.autograd.Function]) -> Loop:
    def loop(run: Run) -> Tensor:
        net, x, y = run.net(mlp()), run.data(12, 3), run.data(12, 1)
        with run.context(net, sgd_for(net)) as (fnet, diffopt):
            for t in range(run.steps):
                diffopt.step((function.apply(fnet(x[rows(t)])) - y[rows(t)]).square().mean())  # type: ignore[no-untyped-call]
            return fnet(x).tanh().sum()

    return loop


class NoTangent(RightTangent):
    jvp = torch.autograd.Function.jvp  # type: ignore[assignment]


def test_a_custom_function_with_both_modes_is_mixed() -> None:
    loop = applied(RightTangent)
    assert_same(mixed(loop, 5), unrolled(loop, 5))


@pytest.mark.parametrize(
    ("loop", "why"),
    [
        (applied(NoTangent), "jvp"),
        (custom_function, "must override the setup_context"),
        (checkpoint_in_model, "saved tensor hooks"),
    ],
    ids=["no jvp", "no setup_context", "checkpoint"],
)
def test_what_cannot_be_mixed_falls_back_with_one_warning_for_each_program(loop: Loop, why: str) -> None:
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        found = mixed(loop, 9)
    assert [warning.category for warning in caught] == [MixedFallbackWarning] * (
        2 if loop is checkpoint_in_model else 1
    )
    assert why in str(caught[0].message)
    assert "They are pulled back by reverse mode instead" in str(caught[0].message)
    assert_same(found, unrolled(loop, 9))


class SlightlyWrong(RightTangent):
    @staticmethod
    def jvp(ctx: Any, tangent: Tensor) -> Tensor:
        return 2.0001 * ctx.saved_tensors[0] * tangent


def test_a_wrong_derivative_is_found_by_the_comparison() -> None:
    loop = applied(SlightlyWrong)
    with pytest.warns(MixedFallbackWarning, match=r"for weight 0\.weight it gives a derivative") as caught:
        found = mixed(loop, 5)
    assert len(caught) == 1
    assert_same(found, unrolled(loop, 5))
    unchecked, expected = mixed(loop, 5, verify="off")["0.weight"], unrolled(loop, 5)["0.weight"]
    assert unchecked is not None
    assert expected is not None
    assert (unchecked - expected).norm() > 1e-6 * expected.norm()


class Reader(nn.Module):
    """A block that reads another part's weight."""

    def __init__(self, other: nn.Linear) -> None:
        super().__init__()
        self.own, self.others = nn.Linear(3, 3), [other]

    def forward(self, x: Tensor) -> Tensor:
        return self.own(x) @ self.others[0].weight


class Reading(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Linear(3, 3)
        self.reader = Reader(self.first)

    def forward(self, x: Tensor) -> Tensor:
        return self.reader(self.first(x).tanh())


def test_a_block_that_reads_another_parts_weight_falls_back() -> None:
    def loop(run: Run) -> Tensor:
        net, x = run.net(Reading()), run.data(12, 3)
        with run.context(net, sgd_for(net, lr=0.01)) as (fnet, diffopt):
            for t in range(run.steps):
                diffopt.step((fnet(x[rows(t)]) - 1).square().mean())
            return fnet(x).tanh().sum()

    with pytest.warns(MixedFallbackWarning, match="a block of class Reader reads a tensor that is neither"):
        found = mixed(loop, 4, blocks=Reader)
    assert_same(found, unrolled(loop, 4))


# ------------------------------------------------------------------------------------------------------- micro-batches


def with_loss(loss: Callable[[Tensor, Tensor], Tensor], net: Callable[[], nn.Module] = lambda: mlp(3, 3)) -> Loop:
    def loop(run: Run) -> Tensor:
        model, x, y = run.net(net()), run.data(12, 3), run.data(12, 3)
        with run.context(model, sgd_for(model, lr=0.02)) as (fnet, diffopt):
            for t in range(run.steps):
                diffopt.step(loss(fnet(x[rows(t)]), y[rows(t)]))
            return fnet(x).tanh().sum()

    return loop


@pytest.mark.parametrize(
    "loss",
    [
        lambda out, y: F.mse_loss(out, y, reduction="sum"),
        lambda out, y: F.cross_entropy(out, y.argmax(1)),
        lambda out, y: (out - y).square().mean(1).mean() + 0.3,
    ],
    ids=["sum", "cross entropy", "mean"],
)
@pytest.mark.parametrize("verify", ["new", "off"])
def test_sums_and_means_are_cut(loss: Callable[[Tensor, Tensor], Tensor], verify: str) -> None:
    loop = with_loss(loss)
    assert_same(mixed(loop, 4, microbatches=3, verify=verify), gradients(loop, 4, checkpoint_every=None))


@pytest.mark.parametrize(
    ("loop", "why"),
    [
        (batch_norm, "writes into its buffers"),
        (transformer, "random numbers are drawn"),
        (in_place, "written in place"),
        (hidden_state, "a part of the batch gives an error"),
        (with_loss(lambda out, y: (out - y).square().mean().sqrt()), "the average over the parts"),
        (
            with_loss(
                lambda out, y: (out - y).square().mean(),
                lambda: nn.Sequential(nn.Linear(3, 3), nn.BatchNorm1d(3, track_running_stats=False)),
            ),
            "the average over the parts",
        ),
        (with_loss(lambda out, y: F.cross_entropy(out, y.argmax(1), ignore_index=0)), "the parts"),
    ],
    ids=["batch norm", "dropout", "in place", "shape", "root", "statistics", "ignored"],
)
@pytest.mark.parametrize("verify", ["new", "off"])
def test_what_cannot_be_cut_is_refused(loop: Loop, why: str, verify: str) -> None:
    with pytest.raises(ReplayMismatchError, match=f"(?s)microbatches=2 cuts the batch.*{why}.*Leave microbatches out"):
        mixed(loop, 4, microbatches=2, verify=verify)


def test_each_step_is_checked_to_be_the_sum_of_its_parts() -> None:
    def loop(run: Run) -> Tensor:
        net, x, y = run.net(mlp(3, 3)), run.data(12, 3), torch.arange(12) % 3
        with run.context(net, sgd_for(net, lr=0.02)) as (fnet, diffopt):
            for t in range(run.steps):
                target = y[rows(t)].clone()
                if t == 0:
                    target[0] = -100  # one example less, at the step that is pulled back last
                diffopt.step(F.cross_entropy(fnet(x[rows(t)]), target))
            return fnet(x).tanh().sum()

    with pytest.raises(ReplayMismatchError, match="the loss of step 0 is no mean or sum over its batch"):
        mixed(loop, 4, microbatches=2)


def test_a_batch_smaller_than_the_parts_is_refused() -> None:
    with pytest.raises(ReplayMismatchError, match="its batch has 8 examples"):
        mixed(with_loss(F.mse_loss), 2, microbatches=9)


# -------------------------------------------------------------------------------------------------------------- memory


def peak_of_one_step(depth: int, **settings: Any) -> int:
    """The most bytes that pulling one step back makes, beyond what the loop held."""
    torch.manual_seed(0)
    net = Transformer(depth, width=16, words=16, length=32)
    tokens = torch.randint(0, 16, (8, 33))
    vectors = [torch.randn_like(param) for param in net.parameters()]
    opt = torch.optim.SGD(net.parameters(), lr=0.1)
    with lowmem_higher.innerloop_ctx(
        net, opt, copy_initial_weights=False, checkpoint_every=1, verify="off", **settings
    ) as (fnet, diffopt):
        logits = fnet(tokens[:, :-1])
        diffopt.step(F.cross_entropy(logits.flatten(0, 1), tokens[:, 1:].reshape(-1)))
        del logits
        outer = sum((param * vector).sum() for param, vector in zip(fnet.parameters(), vectors, strict=True))
        with live_bytes() as memory:
            found = torch.autograd.grad(outer, list(net.parameters()))
    assert all(math.isfinite(tensor.norm().item()) for tensor in found)
    return memory.peak


def test_peak_of_one_step() -> None:
    reverse = peak_of_one_step(6, pullback="reverse")
    six = peak_of_one_step(6, pullback="mixed", blocks=Block)
    twelve = peak_of_one_step(12, pullback="mixed", blocks=Block)
    assert six <= reverse / 3
    assert twelve <= six + 6 * (2 * 8 * 32 * 16 * 4 + 8 * 13_000)  # a block's input, value and tangent, and weights
    assert peak_of_one_step(6, pullback="mixed", blocks=Block, microbatches=4) <= six / 1.6
    assert peak_of_one_step(6, pullback="mixed") < reverse


def test_blocks_save_memory_in_the_loop() -> None:
    def peak(**settings: Any) -> int:
        net, tokens = Transformer(6, width=16, words=16, length=32), torch.randint(0, 16, (8, 32))
        with (
            lowmem_higher.innerloop_ctx(
                net, torch.optim.SGD(net.parameters(), lr=0.1), checkpoint_every=1, pullback="mixed", **settings
            ) as (fnet, _),
            live_bytes() as memory,
        ):
            fnet(tokens)
        return memory.peak

    assert peak(blocks=Block) < peak() / 2


# ---------------------------------------------------------------------------------------------------------- bad input


@pytest.mark.parametrize(
    ("settings", "error", "match"),
    [
        ({"checkpoint_every": None}, ValueError, "the full unroll differentiates all steps as one"),
        ({"replay": "torch"}, ValueError, "replay='torch' builds the second-order graphs"),
        ({"first_order": True}, ValueError, "with first_order=True they are constants"),
        ({"pullback": "reverse", "blocks": nn.Linear}, ValueError, "blocks saves memory in mixed mode only"),
        ({"pullback": "reverse", "microbatches": 2}, ValueError, "microbatches saves memory in mixed mode only"),
        ({"checkpoint_every": None, "memory_budget": "1 GB"}, ValueError, "reckons with the graphs of reverse mode"),
        ({"graphs": 2}, ValueError, "graphs=2 holds the second-order graphs"),
        ({"microbatches": 0}, ValueError, "must be at least 1"),
        ({"microbatches": 2.0}, TypeError, "must be a whole number"),
        ({"microbatches": True}, TypeError, "must be a whole number"),
        ({"blocks": nn.LSTM}, ValueError, "no submodule"),
        ({"blocks": nn.Sequential}, ValueError, "the model itself"),
        ({"blocks": "Linear"}, TypeError, "must be a tuple of module classes"),
        ({"blocks": ()}, TypeError, "must be a tuple of module classes"),
    ],
    ids=str,
)
def test_bad_settings(settings: dict[str, Any], error: type[Exception], match: str) -> None:
    net = mlp()
    keywords = {"checkpoint_every": 2, "pullback": "mixed", **settings}
    with pytest.raises(error, match=match), lowmem_higher.innerloop_ctx(net, sgd_for(net), **keywords):
        pass
