"""Modules as people use them: recurrence, attention, norms, reparametrized weights, hooks, odd results, real models.

Each loop is compared three ways: every spacing and replay with the full unroll; the full unroll with the same loop in
plain torch (`torch.func.functional_call`), or, where torch itself is wrong, with finite differences.
"""

from __future__ import annotations

import functools
import warnings
from collections import namedtuple
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.nn.utils import parametrizations, parametrize
from torch.overrides import TorchFunctionMode
from torch.utils.checkpoint import checkpoint

import lowmem_higher as higher
from lowmem_higher.testing import assert_matches_unrolled, taylor_test

pytestmark = pytest.mark.usefixtures("float64")

STEPS, RATE, MOMENTUM = 5, 0.05, 0.7
Build = Callable[[], nn.Module]

_generator = torch.Generator().manual_seed(1)
X = torch.randn(8, 5, 4, generator=_generator, dtype=torch.float64)  # batch, length, features
TOKENS = torch.arange(8 * 5).reshape(8, 5) * 3 % 11


def built(build: Build) -> nn.Module:
    with torch.random.fork_rng(devices=[]), warnings.catch_warnings():
        warnings.simplefilter("ignore")  # nn.utils.weight_norm is deprecated, and still in use
        torch.manual_seed(2)
        return build()


def tensors(out: Any) -> list[Tensor]:
    if isinstance(out, Tensor) or out is None or isinstance(out, str):
        return [out] if isinstance(out, Tensor) else []
    values = out.values() if isinstance(out, dict) else vars(out).values() if hasattr(out, "__dict__") else out
    return [tensor for value in values for tensor in tensors(value)]


def loss_of(out: Any) -> Tensor:
    parts = [(tensor.sin() - 0.3).square().mean() for tensor in tensors(out) if tensor.is_floating_point()]
    return torch.stack(parts).sum()


def batch(t: int, shift: Tensor) -> Tensor:
    return X[t % 4 : t % 4 + 4] + shift


Call = Callable[[Any, Tensor], Any]


def whole(fnet: Any, x: Tensor) -> Any:
    return fnet(x)


def loop(build: Build, call: Call = whole, start: list[Tensor] | None = None, **settings: Any) -> list[Tensor | None]:
    """The gradients by the initial weights and by a shift of the inputs; with `start`, the outer loss from there."""
    net, shift = built(build), torch.full((4,), 0.1, requires_grad=True)
    params = [param for param in net.parameters() if param.requires_grad]
    if start is not None:
        with torch.no_grad():
            for param, value in zip(params, start, strict=True):
                param.copy_(value)
    opt = torch.optim.SGD(net.parameters(), lr=RATE, momentum=MOMENTUM)
    with higher.innerloop_ctx(net, opt, copy_initial_weights=False, **settings) as (fnet, diffopt):
        for t in range(STEPS):
            diffopt.step(loss_of(call(fnet, batch(t, shift))))
        outer = loss_of(call(fnet, X))
    if start is not None:
        return [outer]
    return list(torch.autograd.grad(outer, [*params, shift], allow_unused=True))


class Called(nn.Module):
    """Lets `functional_call` reach a call that is not the module's forward."""

    def __init__(self, net: nn.Module, call: Call) -> None:
        super().__init__()
        self.net, self.call = net, call

    def forward(self, x: Tensor) -> Any:
        return self.call(self.net, x)


def plain_loop(build: Build, call: Call = whole) -> list[Tensor | None]:
    """The same in plain torch."""
    net, shift = Called(built(build), call), torch.full((4,), 0.1, requires_grad=True)
    start = {name: param for name, param in net.named_parameters() if param.requires_grad}
    params: dict[str, Tensor] = dict(start)
    momenta: dict[str, Tensor] = {}
    with sdpa_kernel(SDPBackend.MATH):
        for t in range(STEPS):
            loss = loss_of(torch.func.functional_call(net, params, (batch(t, shift),)))
            grads = torch.autograd.grad(loss, list(params.values()), create_graph=True, allow_unused=True)
            for (name, param), grad in zip(list(params.items()), grads, strict=True):
                if grad is not None:
                    momenta[name] = MOMENTUM * momenta[name] + grad if name in momenta else grad
                    params[name] = param - RATE * momenta[name]
        outer = loss_of(torch.func.functional_call(net, params, (X,)))
    return list(torch.autograd.grad(outer, [*start.values(), shift], allow_unused=True))


def assert_as_plain_torch(build: Build, call: Call = whole) -> None:
    torch.manual_seed(0)
    expected = plain_loop(build, call)
    torch.manual_seed(0)
    for ours, theirs in zip(loop(build, call), expected, strict=True):
        if theirs is None or ours is None:
            assert ours is theirs
        else:
            assert (ours - theirs).norm() <= 1e-9 * theirs.norm()


def assert_exact(build: Build, call: Call = whole) -> None:
    assert_matches_unrolled(functools.partial(loop, build, call))


# ---------------------------------------------------------------------------------------------------- kinds of modules


class Recurrent(nn.Module):
    """A recurrent layer between others; gives the last state as well."""

    def __init__(self, kind: type[nn.RNNBase], **options: Any) -> None:
        super().__init__()
        self.cell = kind(4, 3, batch_first=True, **options)

    def forward(self, x: Tensor) -> Any:
        out, state = self.cell(x)
        return {"out": out, "state": state}


class Cells(nn.Module):
    """Cells that are stepped by hand."""

    def __init__(self) -> None:
        super().__init__()
        self.cells = nn.ModuleList([nn.LSTMCell(4, 3), nn.GRUCell(3, 3), nn.RNNCell(3, 2)])

    def forward(self, x: Tensor) -> Tensor:
        carry, hidden, last = None, None, None
        for t in range(x.shape[1]):
            carry = self.cells[0](x[:, t], carry)
            hidden = self.cells[1](carry[0], hidden)
            last = self.cells[2](hidden, last)
        return last


class SelfAttention(nn.Module):
    """nn.MultiheadAttention without weights, which takes the fused path; with masks of both sorts."""

    def __init__(self, **options: Any) -> None:
        super().__init__()
        self.attention = nn.MultiheadAttention(4, 2, batch_first=True, **options)

    def forward(self, x: Tensor) -> Tensor:
        causal = torch.ones(5, 5, dtype=torch.bool).triu(1)
        hidden = torch.zeros(len(x), 5, dtype=torch.bool)
        hidden[:, -1] = True
        return self.attention(x, x, x, attn_mask=causal, key_padding_mask=hidden, need_weights=False)[0]


class Transformer(nn.Module):
    """Encoder and decoder, with dropout."""

    def __init__(self) -> None:
        super().__init__()
        self.whole = nn.Transformer(4, 2, 1, 1, 6, dropout=0.1, batch_first=True, norm_first=True)

    def forward(self, x: Tensor) -> Tensor:
        return self.whole(x, x.flip(1), tgt_mask=nn.Transformer.generate_square_subsequent_mask(5))


class FusedAttention(nn.Module):
    """`scaled_dot_product_attention` itself: causal, dropout, fewer heads of keys than of queries, a scale."""

    def __init__(self) -> None:
        super().__init__()
        self.queries, self.keys = nn.Linear(4, 8), nn.Linear(4, 4)

    def forward(self, x: Tensor) -> Tensor:
        q = self.queries(x).unflatten(-1, (4, 2)).transpose(1, 2)
        k = self.keys(x).unflatten(-1, (2, 2)).transpose(1, 2)
        return F.scaled_dot_product_attention(q, k, k, is_causal=True, dropout_p=0.1, scale=0.8, enable_gqa=True)


class Checkpointed(nn.Module):
    """Attention that runs again in the backward, or, `plainly`, does not."""

    def __init__(self, plainly: bool = False) -> None:
        super().__init__()
        self.plainly = plainly
        self.layer = nn.TransformerEncoderLayer(4, 2, 6, dropout=0.1, batch_first=True)

    def forward(self, x: Tensor) -> Tensor:
        return self.layer(x) if self.plainly else checkpoint(self.layer, x, use_reentrant=False)


class Embedded(nn.Module):
    """Tokens by an embedding; its output head may be tied to it."""

    def __init__(self, tied: bool = False, **options: Any) -> None:
        super().__init__()
        self.embed, self.head = nn.Embedding(11, 4, **options), nn.Linear(4, 11)
        if tied:
            self.head.weight = self.embed.weight

    def forward(self, x: Tensor) -> Tensor:
        return self.head(torch.tanh(self.embed(TOKENS[: len(x)]) + x))


class Bag(nn.Module):
    """Means of embeddings."""

    def __init__(self, **options: Any) -> None:
        super().__init__()
        self.bag, self.head = nn.EmbeddingBag(11, 4, mode="mean", padding_idx=3, **options), nn.Linear(4, 2)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(torch.tanh(self.bag(TOKENS[: len(x)]) + x.sum(1)))


class Channels(nn.Module):
    """Lets a layer for (batch, channels, length) see the features as channels."""

    def __init__(self, layer: nn.Module) -> None:
        super().__init__()
        self.first, self.layer, self.last = nn.Linear(4, 4), layer, nn.Linear(4, 2)

    def forward(self, x: Tensor) -> Tensor:
        return self.last(self.layer(self.first(x).sin().transpose(1, 2)).transpose(1, 2).tanh())


class Symmetric(nn.Module):
    """A parametrization written by a user."""

    def forward(self, x: Tensor) -> Tensor:
        return x.triu() + x.triu(1).T


class Doubled(nn.Module):
    """Another, stacked on the first."""

    def forward(self, x: Tensor) -> Tensor:
        return 2 * x.tanh()


def parametrized() -> nn.Module:
    layer = nn.Linear(4, 4)
    parametrize.register_parametrization(layer, "weight", Symmetric())
    parametrize.register_parametrization(layer, "weight", Doubled())
    return nn.Sequential(layer, nn.Tanh(), nn.Linear(4, 2))


class Cached(nn.Module):
    """A parametrized weight that is computed once a forward and read twice."""

    def __init__(self) -> None:
        super().__init__()
        self.layer = parametrizations.orthogonal(nn.Linear(4, 4))

    def forward(self, x: Tensor) -> Tensor:
        with parametrize.cached():
            return self.layer(self.layer(x).sin())


class Graph(nn.Module):
    """A graph network: a sparse matrix, as a buffer, times what the layers give."""

    def __init__(self, layout: torch.layout) -> None:
        super().__init__()
        self.first, self.last = nn.Linear(4, 3), nn.Linear(3, 2)
        dense = torch.eye(20) + torch.diag(torch.full((19,), 0.5), 1)
        self.register_buffer("adjacency", dense.to_sparse(layout=layout))

    def forward(self, x: Tensor) -> Tensor:
        nodes = torch.sparse.mm(self.adjacency, self.first(x[:4].reshape(20, 4)))
        return self.last(torch.sparse.mm(self.adjacency, nodes.tanh()))


def norms() -> nn.Module:
    return nn.Sequential(
        nn.Linear(4, 6), nn.LayerNorm(6), nn.Tanh(), nn.RMSNorm(6), nn.Linear(6, 4), nn.LocalResponseNorm(2)
    )


Result = namedtuple("Result", "first second")


@dataclass
class Record:
    """What a forward may return."""

    first: Tensor
    second: Tensor | None


class Returns(nn.Module):
    """The same two tensors, packed in some way."""

    def __init__(self, pack: Callable[[Tensor, Tensor], Any]) -> None:
        super().__init__()
        self.first, self.second, self.pack = nn.Linear(4, 3), nn.Linear(3, 2), pack

    def forward(self, x: Tensor) -> Any:
        hidden = self.first(x).tanh()
        return self.pack(hidden, self.second(hidden))


def hooked() -> nn.Module:
    """Hooks before and after forwards, with and without keywords; one keeps a view of what it saw."""
    net = nn.Sequential(nn.Linear(4, 4), nn.Tanh(), nn.Linear(4, 2))
    net[0].register_forward_pre_hook(lambda module, args: (args[0] * 1.5,))
    net[0].register_forward_hook(lambda module, args, out: out + args[0].cos())
    net[2].register_forward_hook(lambda module, args, kwargs, out: out * module.weight.norm(), with_kwargs=True)
    net.register_forward_hook(lambda module, args, out: out.sin())
    return net


class PlainList(nn.Module):
    """Submodules that a plain list and a dictionary lead to as well, and forwards that go that way."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.last = nn.Linear(4, 4), nn.Linear(4, 2)
        self.order, self.by_name = [self.first, torch.tanh], {"last": [self.last]}

    def forward(self, x: Tensor) -> Tensor:
        for part in self.order:
            x = part(x)
        return self.by_name["last"][0](x)


KINDS: dict[str, Build] = {
    "RNN": lambda: Recurrent(nn.RNN, nonlinearity="tanh", bias=False),
    "LSTM": lambda: Recurrent(nn.LSTM, num_layers=2, bidirectional=True, dropout=0.2),
    "LSTM with projections": lambda: Recurrent(nn.LSTM, proj_size=2),
    "GRU": lambda: Recurrent(nn.GRU, num_layers=2, dropout=0.2),
    "cells": Cells,
    "multi-head attention": SelfAttention,
    "multi-head attention, more": lambda: SelfAttention(dropout=0.1, add_bias_kv=True, add_zero_attn=True),
    "transformer encoder": lambda: nn.TransformerEncoder(
        nn.TransformerEncoderLayer(4, 2, 6, dropout=0.1, batch_first=True), 2, enable_nested_tensor=False
    ),
    "transformer": Transformer,
    "fused attention": FusedAttention,
    "embedding": Embedded,
    "embedding with padding": lambda: Embedded(padding_idx=3, scale_grad_by_freq=True),
    "tied embedding": lambda: Embedded(tied=True),
    "layer norms": norms,
    "group norm": lambda: Channels(nn.GroupNorm(2, 4)),
    "batch norm": lambda: Channels(nn.BatchNorm1d(4)),
    "batch norm without statistics": lambda: Channels(nn.BatchNorm1d(4, track_running_stats=False)),
    "instance norm": lambda: Channels(nn.InstanceNorm1d(4, affine=True)),
    "instance norm with statistics": lambda: Channels(nn.InstanceNorm1d(4, affine=True, track_running_stats=True)),
    "spectral norm": lambda: nn.Sequential(parametrizations.spectral_norm(nn.Linear(4, 4)), nn.Linear(4, 2)),
    "old spectral norm": lambda: nn.Sequential(nn.utils.spectral_norm(nn.Linear(4, 4)), nn.Linear(4, 2)),
    "orthogonal": lambda: nn.Sequential(
        parametrizations.orthogonal(nn.Linear(4, 4), orthogonal_map="cayley"), nn.Linear(4, 2)
    ),
    "own parametrizations": parametrized,
    "cached parametrization": Cached,
    "sparse COO": lambda: Graph(torch.sparse_coo),
    "sparse CSR": lambda: Graph(torch.sparse_csr),
    "named tuple": lambda: Returns(Result),
    "dataclass": lambda: Returns(Record),
    "dictionary": lambda: Returns(lambda first, second: {"first": first, "more": [second, None, "text"]}),
    "hooks": hooked,
    "plain list": PlainList,
}


@pytest.mark.parametrize("kind", KINDS)
def test_modules(kind: str) -> None:
    assert_exact(KINDS[kind])
    assert_as_plain_torch(KINDS[kind])


def test_attention_under_a_checkpoint() -> None:
    """Recomputed in a backward outside the context. (Plain torch would recompute with the weights of the module.)"""
    assert_exact(Checkpointed)
    torch.manual_seed(0)
    expected = loop(functools.partial(Checkpointed, plainly=True))
    torch.manual_seed(0)
    for ours, theirs in zip(loop(Checkpointed), expected, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-9, atol=1e-12)


class Named(nn.Module):
    """A layer under a name, so that it may be replaced."""

    def __init__(self, layer: nn.Module) -> None:
        super().__init__()
        self.layer, self.head = layer, nn.Linear(4, 2)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.layer(x).tanh())


WEIGHT_NORMS: dict[str, Callable[..., nn.Module]] = {"old": nn.utils.weight_norm, "new": parametrizations.weight_norm}


@pytest.mark.parametrize("dim", [0, 1, None])
@pytest.mark.parametrize("kind", WEIGHT_NORMS)
def test_weight_norm_is_right_where_torch_is_wrong(kind: str, dim: int | None) -> None:
    """The second derivative of torch's kernel fails gradgradcheck on a CPU; ours passes finite differences."""

    def build() -> nn.Module:
        return Named(WEIGHT_NORMS[kind](nn.Linear(4, 4), dim=dim))

    assert_exact(build)
    start = [param.detach() for param in built(build).parameters() if param.requires_grad]
    for every in (None, 3):
        *gradient, _ = loop(build, checkpoint_every=every)
        value = functools.partial(
            lambda every, *point: loop(build, start=list(point), checkpoint_every=every)[0], every
        )
        assert taylor_test(value, start, gradient=gradient) > 1.9


# ------------------------------------------------------------------------------------------------ attention's kernels

FLAGS = ("flash", "mem_efficient", "math", "cudnn")


def attention_flags() -> list[bool]:
    return [getattr(torch.backends.cuda, f"{name}_sdp_enabled")() for name in FLAGS]


def fused(x: Tensor) -> bool:
    """Whether attention runs in a kernel that has no second derivative."""
    x = x.detach()[None].requires_grad_()
    return "ScaledDotProduct" in F.scaled_dot_product_attention(x, x, x).grad_fn.name()


@pytest.mark.parametrize("every", [None, 1, 3])
def test_the_choice_of_attention_kernels_stays_the_users(every: int | None) -> None:
    """Outside the context, around a call inside it, after an exception, and for what records no gradient."""
    before, original = attention_flags(), F.scaled_dot_product_attention
    net = built(FusedAttention)
    assert fused(X)
    with higher.innerloop_ctx(net, torch.optim.SGD(net.parameters(), lr=0.1), checkpoint_every=every) as (
        fnet,
        diffopt,
    ):
        assert not fused(X)
        diffopt.step(loss_of(fnet(X)))
        assert attention_flags() == before
        with pytest.raises(RuntimeError):
            fnet(X[..., :3])
        assert attention_flags() == before
        outer = loss_of(fnet(X))
    assert F.scaled_dot_product_attention is original
    assert fused(X)
    torch.autograd.grad(outer, list(fnet.parameters(time=0)))
    assert attention_flags() == before


def test_a_choice_of_kernels_by_the_user_gives_way() -> None:
    def call(fnet: Any, x: Tensor) -> Any:
        with sdpa_kernel(SDPBackend.FLASH_ATTENTION):
            return fnet(x)

    assert_exact(SelfAttention, call)


def test_an_evaluation_attends_as_the_user_chose() -> None:
    """No gradient, no need: neither under no_grad, nor in a context that tracks nothing."""
    net = built(FusedAttention)
    with higher.innerloop_ctx(net, torch.optim.SGD(net.parameters(), lr=0.1), track_higher_grads=False) as (fnet, _):
        assert fused(X)
        assert fnet(X).requires_grad
    names: set[str] = set()

    class Asks(FusedAttention):
        def forward(self, x: Tensor) -> Tensor:
            with sdpa_kernel(SDPBackend.FLASH_ATTENTION), torch.no_grad(), torch.profiler.profile() as profile:
                F.scaled_dot_product_attention(x[None], x[None], x[None])
            names.update(event.key for event in profile.key_averages())
            return super().forward(x)

    assert_exact(Asks)
    assert "aten::_scaled_dot_product_flash_attention_for_cpu" in names
    assert "aten::_scaled_dot_product_attention_math" not in names


class SeesCudnn(TorchFunctionMode):
    """Notes whether a recurrent layer may take cuDNN's kernels, which have no second derivative on a GPU."""

    def __init__(self) -> None:
        super().__init__()
        self.seen: list[bool] = []

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func.__name__ in ("lstm", "gru", "rnn_tanh"):
            self.seen.append(torch.backends.cudnn.enabled)
        return func(*args, **(kwargs or {}))


@pytest.mark.parametrize("every", [None, 1, 3])
@pytest.mark.parametrize("kind", ["RNN", "LSTM", "GRU"])
def test_recurrent_layers_do_without_cudnn(kind: str, every: int | None) -> None:
    mode = SeesCudnn()

    def call(fnet: Any, x: Tensor) -> Any:
        with mode:
            return fnet(x)

    loop(KINDS[kind], call, checkpoint_every=every)
    assert mode.seen == [False] * (STEPS + 1)
    net = built(KINDS[kind])
    with mode:
        net(X)
    assert mode.seen[-1]
    assert "lstm" not in vars(torch._VF)


def attention_in_the_loop(fnet: Any, x: Tensor) -> Tensor:
    hidden = fnet.layer(x).unflatten(-1, (2, 2)).transpose(1, 2)
    return fnet.head(F.scaled_dot_product_attention(hidden, hidden, hidden).transpose(1, 2).flatten(2))


def normalized_in_the_loop(fnet: Any, x: Tensor) -> Tensor:
    return fnet.head(fnet.layer(x).tanh()) * torch._weight_norm(fnet.layer.weight, fnet.layer.bias[:, None], 0).sum()


@pytest.mark.parametrize("call", [attention_in_the_loop, normalized_in_the_loop])
def test_attention_and_weight_norm_in_the_loop(call: Call) -> None:
    assert_exact(lambda: Named(nn.Linear(4, 4)), call)


# ------------------------------------------------------------------------------------- what is refused, or done by hand


@pytest.mark.parametrize("own", [False, True], ids=["training", "evaluation too"])
def test_statistics_that_the_loop_gives_to_a_norm_are_written_once(own: bool) -> None:
    """A replay leaves them alone; a step that reads them gets what it read, which plain torch gets wrong (it keeps no
    copy, and no version of them)."""

    def run(copied: bool, **settings: Any) -> tuple[list[Tensor], Tensor]:
        net, mean, variance = built(lambda: nn.Linear(4, 2)), torch.zeros(2), torch.ones(2)
        others = torch.zeros(2), torch.ones(2)
        opt = torch.optim.SGD(net.parameters(), lr=0.3)
        with higher.innerloop_ctx(net, opt, copy_initial_weights=False, **settings) as (fnet, diffopt):
            for t in range(STEPS):
                hidden = fnet(X[t % 4 : t % 4 + 4].flatten(0, 1))
                out = F.batch_norm(hidden, mean, variance, training=True)
                out = out * F.instance_norm(hidden[None].mT, *others)[0].mT
                if own:
                    read = (mean.clone(), variance.clone()) if copied else (mean, variance)
                    out = out + F.batch_norm(hidden, *read, training=False)
                diffopt.step(loss_of(out))
            outer = loss_of(fnet(X))
        return list(torch.autograd.grad(outer, list(net.parameters()))), torch.cat([mean, variance, *others])

    expected, statistics = run(copied=True)
    for every in (1, 3, 10):
        for replay in ("native", "torch"):
            found, now = run(copied=False, checkpoint_every=every, replay=replay)
            assert torch.equal(now, statistics)
            for ours, theirs in zip(found, expected, strict=True):
                torch.testing.assert_close(ours, theirs, rtol=1e-9, atol=0)


PECULIAR: dict[str, Build] = {
    "max_norm": lambda: Embedded(max_norm=0.5),
    "sparse": lambda: Embedded(sparse=True),
    "bag": Bag,
    "sparse bag": lambda: Bag(sparse=True),
}


@pytest.mark.parametrize("every", [1, 3])
def test_a_forward_that_writes_into_a_weight_is_refused(every: int) -> None:
    """`max_norm` scales the rows that it reads."""
    with pytest.raises(higher.ExternalModifiedError, match="update_params"):
        loop(PECULIAR["max_norm"], checkpoint_every=every)


@pytest.mark.parametrize("every", [None, 1, 3])
def test_sparse_gradients_are_refused(every: int | None) -> None:
    for kind in ("sparse", "sparse bag"):
        with pytest.raises(ValueError, match="sparse=False"):
            loop(PECULIAR[kind], checkpoint_every=every)


@pytest.mark.parametrize("every", [None, 1, 3])
def test_torch_has_no_second_derivative_of_a_bag(every: int | None) -> None:
    with pytest.raises(NotImplementedError, match="_embedding_bag_backward"):
        loop(PECULIAR["bag"], checkpoint_every=every)


# ------------------------------------------------------------------------------------------------ ways to use a model


class Parts(nn.Module):
    """Containers of modules and of parameters."""

    def __init__(self) -> None:
        super().__init__()
        self.stack = nn.ModuleList([nn.Linear(4, 4) for _ in range(4)])
        self.heads = nn.ModuleDict({"a": nn.Linear(4, 2), "b": nn.Linear(4, 2)})
        self.scales = nn.ParameterList([nn.Parameter(torch.full((4,), 0.5 + k)) for k in range(3)])
        self.shifts = nn.ParameterDict({"in": nn.Parameter(torch.ones(4)), "out": nn.Parameter(torch.ones(2))})

    def features(self, x: Tensor) -> Tensor:
        for layer, scale in zip(self.stack[:2], self.scales, strict=False):
            x = (layer(x + self.shifts["in"]) * scale).tanh()
        return x

    def forward(self, x: Tensor) -> Tensor:
        for layer in self.stack[::-1]:
            x = layer(x).tanh()
        return self.heads["a"](x)


def by_parts(fnet: Any, x: Tensor) -> list[Tensor]:
    """Methods, submodules, slices, and single weights."""
    first = fnet.heads["b"](fnet.features(x)) + fnet.shifts["out"]
    second = fnet(fnet.stack[-1](x) * fnet.scales[-1])
    for layer in fnet.stack[1:3]:
        x = F.linear(x, layer.weight, layer.bias)
    return [first, second, x]


def test_parts_of_a_model_called_directly() -> None:
    assert_exact(Parts, by_parts)
    assert_as_plain_torch(Parts, by_parts)


def test_modules_that_only_a_plain_list_holds_are_never_stale() -> None:
    """They are no part of the model: their weights stay what they are, and get a gradient like any learned tensor."""
    hidden = [nn.Linear(4, 4), nn.Linear(4, 4)]

    class Hides(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.parts, self.last = list(hidden), nn.Linear(4, 2)

        def forward(self, x: Tensor) -> Tensor:
            return self.last(self.parts[1](self.parts[0](x).tanh()))

    def run(**settings: Any) -> list[Tensor]:
        net = built(Hides)
        opt = torch.optim.SGD(net.parameters(), lr=RATE)
        with higher.innerloop_ctx(net, opt, copy_initial_weights=False, **settings) as (fnet, diffopt):
            for t in range(STEPS):
                diffopt.step(loss_of(fnet(X[t % 4 : t % 4 + 4])))
            outer = loss_of(fnet(X))
        return list(torch.autograd.grad(outer, [*net.parameters(), *hidden[0].parameters(), *hidden[1].parameters()]))

    assert_matches_unrolled(run)


# -------------------------------------------------------------------------------------------------------- real models


def gpt2() -> nn.Module:
    from transformers import GPT2Config, GPT2LMHeadModel

    return GPT2LMHeadModel(
        GPT2Config(
            vocab_size=11,
            n_positions=8,
            n_embd=8,
            n_layer=2,
            n_head=2,
            bos_token_id=0,
            eos_token_id=0,
            loss_type="ForCausalLM",
        )
    )


def bert() -> nn.Module:
    from transformers import BertConfig, BertForSequenceClassification

    return BertForSequenceClassification(
        BertConfig(
            vocab_size=11, hidden_size=8, num_hidden_layers=2, num_attention_heads=2, intermediate_size=12, num_labels=3
        )
    )


def llama() -> nn.Module:
    from transformers import LlamaConfig, LlamaForCausalLM

    return LlamaForCausalLM(
        LlamaConfig(
            vocab_size=11,
            hidden_size=8,
            intermediate_size=12,
            num_hidden_layers=2,
            num_attention_heads=4,
            num_key_value_heads=2,
            attention_dropout=0.1,
            tie_word_embeddings=True,
        )
    )


@pytest.fixture(scope="module")
def transformers_loaded() -> None:
    """The first model that it builds adds a method to nn.Module, for good."""
    built(bert)


@pytest.mark.usefixtures("transformers_loaded")
@pytest.mark.parametrize("model", [gpt2, bert, llama])
def test_models_of_transformers(model: Build) -> None:
    """From a configuration, dropout on; a learned weight for each example, the model's own loss every other step."""
    net = built(model).train()
    assert {param.dtype for param in net.parameters()} == {torch.float64}
    assert net.config._attn_implementation == "sdpa"
    targets = torch.arange(8) % 3 if model is bert else TOKENS
    mask = torch.ones_like(TOKENS)
    mask[:, -1] = 0

    def run(**settings: Any) -> dict[str, Tensor | None]:
        logits = torch.zeros(8, requires_grad=True)
        opt = torch.optim.AdamW(net.parameters(), lr=1e-2)
        with higher.innerloop_ctx(net, opt, copy_initial_weights=False, **settings) as (fnet, diffopt):
            for t in range(4):
                rows = slice(t % 4, t % 4 + 4)
                out = fnet(input_ids=TOKENS[rows], attention_mask=mask[rows], labels=targets[rows])
                scores = out.logits.flatten(1).square().mean(1)
                weighted = (torch.sigmoid(logits[rows]) * scores).mean()
                diffopt.step(out.loss + weighted if t % 2 else weighted)
            fnet.eval()
            outer = fnet(input_ids=TOKENS, attention_mask=mask, labels=targets).loss
        names, params = zip(*net.named_parameters(), strict=True)
        found = torch.autograd.grad(outer, [*params, logits], allow_unused=True)
        return dict(zip([*names, "logits"], found, strict=True))

    assert_matches_unrolled(run, checkpoint_every=(1, 3), replay=("native",))
