"""Dtypes, devices and precision modes: half precision, mixed dtypes, complex weights, autocast, scaled losses."""

from __future__ import annotations

import contextlib
import functools
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import lowmem_higher as higher
from lowmem_higher.testing import assert_matches_unrolled

STEPS = 5
_generator = torch.Generator().manual_seed(1)
X = torch.randn(8, 3, generator=_generator, dtype=torch.float64)
Optimizer = Callable[..., torch.optim.Optimizer]


def built(build: Callable[[], nn.Module]) -> nn.Module:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(2)
        return build()


def gradients(
    build: Callable[[], nn.Module],
    optimizer: Optimizer,
    dtype: torch.dtype,
    around: Callable[[], contextlib.AbstractContextManager[Any]] = contextlib.nullcontext,
    device: str = "cpu",
    **settings: Any,
) -> list[Tensor]:
    """By the initial weights and a learned shift of the inputs; the loop is in `around`, the outer backward is not."""
    net = built(build)
    x = X.to(device, dtype)
    shift = torch.full((3,), 0.1, dtype=dtype, device=device, requires_grad=True)
    opt = optimizer(net.parameters())
    with around(), higher.innerloop_ctx(net, opt, copy_initial_weights=False, **settings) as (fnet, diffopt):
        for t in range(STEPS):
            diffopt.step((fnet(x[t % 4 : t % 4 + 4] + shift).abs() - 1).square().mean())
        outer = fnet(x).abs().sin().mean()
    return list(torch.autograd.grad(outer, [*net.parameters(), shift]))


def sgd(params: Any) -> torch.optim.Optimizer:
    return torch.optim.SGD(params, lr=0.1, momentum=0.7)


def adam(params: Any) -> torch.optim.Optimizer:
    return torch.optim.Adam(params, lr=0.05, eps=1e-4)


def mlp(dtype: torch.dtype = torch.float32, device: str = "cpu") -> nn.Module:
    return nn.Sequential(nn.Linear(3, 16), nn.Tanh(), nn.Linear(16, 2)).to(device, dtype)


class MixedDtypes(nn.Module):
    """bfloat16, float32 and float64 weights, joined in one parameter group."""

    def __init__(self) -> None:
        super().__init__()
        self.coarse = nn.Linear(3, 4).bfloat16()
        self.middle = nn.Linear(4, 4).float()
        self.fine = nn.Linear(4, 2).double()

    def forward(self, x: Tensor) -> Tensor:
        hidden = self.coarse(x.bfloat16()).float().tanh()
        return self.fine(self.middle(hidden).double().tanh())


class Spectral(nn.Module):
    """A complex weight between real ones."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.last = nn.Linear(3, 4).double(), nn.Linear(3, 2).double()
        self.weight = nn.Parameter(torch.randn(3, 3, dtype=torch.complex128))

    def forward(self, x: Tensor) -> Tensor:
        modes = torch.fft.rfft(self.first(x)) @ self.weight
        return self.last(torch.fft.irfft(modes, 3))


@pytest.mark.parametrize("optimizer", [sgd, adam])
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32], ids=str)
def test_models_of_one_precision(dtype: torch.dtype, optimizer: Optimizer) -> None:
    """On a CPU a replay rounds as the loop did, so that the gradient has the same bits nearly always."""
    loop = functools.partial(gradients, functools.partial(mlp, dtype), optimizer, dtype)
    assert all(grad.dtype == dtype for grad in loop())
    assert_matches_unrolled(loop, rtol=1e-5)


@pytest.mark.parametrize("optimizer", [sgd, adam])
def test_dtypes_mixed_in_one_model(optimizer: Optimizer) -> None:
    assert_matches_unrolled(functools.partial(gradients, MixedDtypes, optimizer, torch.float32), rtol=1e-5)


@pytest.mark.parametrize("optimizer", [sgd, adam])
def test_complex_weights(optimizer: Optimizer) -> None:
    """The training of torch.optim, which takes a complex number for two real ones; and the unroll's gradient."""
    net, plain = built(Spectral), built(Spectral)
    opt = optimizer(plain.parameters())
    with higher.innerloop_ctx(net, optimizer(net.parameters()), checkpoint_every=2) as (fnet, diffopt):
        for _ in range(STEPS):
            diffopt.step((fnet(X) - 1).square().mean())
            opt.zero_grad()
            (plain(X) - 1).square().mean().backward()
            opt.step()
    for ours, theirs in zip(fnet.parameters(), plain.parameters(), strict=True):
        torch.testing.assert_close(ours, theirs.detach(), rtol=1e-9, atol=1e-12)
    assert_matches_unrolled(functools.partial(gradients, Spectral, optimizer, torch.float64))


class Attends(nn.Module):
    """What autocast treats in different ways: products, a norm, attention, a softmax."""

    def __init__(self) -> None:
        super().__init__()
        self.up, self.norm, self.head = nn.Linear(3, 8), nn.LayerNorm(8), nn.Linear(8, 2)
        self.layer = nn.TransformerEncoderLayer(8, 2, 8, dropout=0.1, batch_first=True)

    def forward(self, x: Tensor) -> Tensor:
        hidden = self.layer(self.norm(self.up(x))[:, None])[:, 0]
        return self.head(hidden).softmax(-1).float() * 2


def test_autocast_of_a_transformer_on_a_cpu() -> None:
    """bfloat16 in the loop, the outer backward outside; float32 weights and gradients."""
    loop = functools.partial(
        gradients, Attends, adam, torch.float32, functools.partial(torch.autocast, "cpu", torch.bfloat16)
    )
    plain = gradients(Attends, adam, torch.float32)
    torch.manual_seed(0)
    assert any(not torch.allclose(a, b, rtol=1e-4) for a, b in zip(loop(), plain, strict=True))  # autocast acts
    assert_matches_unrolled(loop, rtol=1e-5)


def test_deterministic_algorithms() -> None:
    """Two runs have the same bits, and the mode need not be on in the backward: replays have the loop's."""

    class Scatters(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.embed, self.head = nn.Embedding(5, 3), nn.Linear(3, 2)

        def forward(self, x: Tensor) -> Tensor:
            index = (10 * x.detach()).long().abs().sum(1) % 5
            summed = torch.zeros(5, 3, dtype=x.dtype, device=x.device).index_add(0, index, self.embed(index) * x)
            return self.head(summed.index_put((index,), x, accumulate=True).tanh())

    @contextlib.contextmanager
    def deterministic() -> Any:
        torch.use_deterministic_algorithms(True)
        try:
            yield
        finally:
            torch.use_deterministic_algorithms(False)

    def build() -> nn.Module:
        return Scatters().double()

    loop = functools.partial(gradients, build, adam, torch.float64, deterministic)
    assert_matches_unrolled(loop)
    for one, other in zip(loop(checkpoint_every=2), loop(checkpoint_every=2), strict=True):
        assert torch.equal(one, other)


# ------------------------------------------------------------------------------------------------------- GradScaler


@pytest.mark.parametrize("every", [None, 1, 3])
def test_a_grad_scaler_belongs_to_the_outer_loop(every: int | None) -> None:
    """The recipe of the README: inner steps unscaled, the outer loss scaled, unscaled by the outer step."""
    expected = gradients(mlp, sgd, torch.float32, checkpoint_every=every)
    net = built(mlp)
    x, shift = X.float(), torch.full((3,), 0.1, requires_grad=True)
    outer_optimizer = torch.optim.SGD([*net.parameters(), shift], lr=1.0)
    before = [param.detach().clone() for param in [*net.parameters(), shift]]
    scaler = torch.amp.GradScaler("cpu", init_scale=2.0**10)
    with higher.innerloop_ctx(net, sgd(net.parameters()), copy_initial_weights=False, checkpoint_every=every) as (
        fnet,
        diffopt,
    ):
        for t in range(STEPS):
            diffopt.step((fnet(x[t % 4 : t % 4 + 4] + shift).abs() - 1).square().mean())
        outer = fnet(x).abs().sin().mean()
    scaler.scale(outer).backward()
    scaler.step(outer_optimizer)
    scaler.update()
    for old, new, grad in zip(before, [*net.parameters(), shift], expected, strict=True):
        torch.testing.assert_close(new.detach(), old - grad, rtol=1e-6, atol=1e-7)


@pytest.mark.parametrize("every", [None, 1, 3])
def test_a_scale_in_the_inner_loop_is_taken_off_by_a_callback(every: int | None) -> None:
    """float16 kernels that underflow need one: a fixed scale, since a scaler's own would be a function of the data."""

    def run(scale: float) -> list[Tensor]:
        net = built(mlp)
        with higher.innerloop_ctx(net, sgd(net.parameters()), copy_initial_weights=False, checkpoint_every=every) as (
            fnet,
            diffopt,
        ):
            for t in range(STEPS):
                loss = (fnet(X.float()[t % 4 : t % 4 + 4]) - 1).square().mean()
                diffopt.step(scale * loss, grad_callback=lambda grads: [grad / scale for grad in grads])
            return list(torch.autograd.grad(fnet(X.float()).sin().mean(), list(net.parameters())))

    for ours, theirs in zip(run(2.0**10), run(1.0), strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-6, atol=0)


# --------------------------------------------------------------------------------------------------------------- CUDA


class TwoDevices(nn.Module):
    """The first half on the CPU, the second on the GPU."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.last = nn.Linear(3, 4).double(), nn.Linear(4, 2).double().cuda()

    def forward(self, x: Tensor) -> Tensor:
        return self.last(self.first(x).tanh().cuda())


class RecurrentOnCuda(nn.Module):
    """cuDNN's layer has no second derivative."""

    def __init__(self) -> None:
        super().__init__()
        self.cell, self.head = nn.LSTM(3, 4, batch_first=True).double().cuda(), nn.Linear(4, 2).double().cuda()

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.cell(x[None])[0][0])


@pytest.mark.cuda
@pytest.mark.parametrize("build", [TwoDevices, RecurrentOnCuda])
def test_devices(build: Callable[[], nn.Module]) -> None:
    device = "cpu" if build is TwoDevices else "cuda"
    assert_matches_unrolled(functools.partial(gradients, build, adam, torch.float64, device=device), rtol=1e-9)


@pytest.mark.cuda
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
def test_autocast_on_cuda(dtype: torch.dtype) -> None:
    """Attention and dropout in half precision; the kernels of a replay are those of the loop."""
    around = functools.partial(torch.autocast, "cuda", dtype)
    loop = functools.partial(gradients, lambda: Attends().cuda(), adam, torch.float32, around, "cuda")
    assert_matches_unrolled(loop, rtol=1e-3)


@pytest.mark.parametrize("adam", [False, True], ids=["SGD", "Adam"])
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32], ids=str)
@pytest.mark.parametrize("setting", [{"checkpoint_every": 2}, {"checkpoint_every": 3, "verify": "all"}], ids=str)
def test_a_gradient_that_is_rounding_alone_is_no_mismatch(
    setting: dict[str, Any], dtype: torch.dtype, adam: bool
) -> None:
    """A bias before a normalization of each channel. Where a second derivative may follow, torch's group_norm has
    another backward, which rounds in another way; and Adam makes whole steps of rounding."""

    def gradient(**keywords: Any) -> Tensor:
        torch.manual_seed(0)
        layers = [nn.Conv2d(2, 4, 3, padding=1), nn.GroupNorm(4, 4), nn.Tanh(), nn.Flatten(), nn.Linear(4 * 36, 3)]
        model = nn.Sequential(*layers).to(dtype)
        images = torch.randn(6, 2, 6, 6, dtype=dtype, requires_grad=True)
        targets = torch.arange(6) % 3
        params = model.parameters()
        opt = torch.optim.Adam(params, lr=0.01) if adam else torch.optim.SGD(params, lr=0.05, momentum=0.9)
        with higher.innerloop_ctx(model, opt, **keywords) as (fmodel, diffopt):
            for _ in range(5):
                diffopt.step(F.cross_entropy(fmodel(images), targets))
            (found,) = torch.autograd.grad(F.cross_entropy(fmodel(images.detach()), targets), [images])
        return found

    expected, found = gradient(), gradient(**setting)
    if not adam:  # an Adam step on rounding is rounding still, but of the size of the learning rate
        assert (found - expected).norm() <= (1e-9 if dtype is torch.float64 else 1e-4) * expected.norm()
    assert (found - expected).norm() <= 0.05 * expected.norm()
