"""Clipping callbacks: torch's values, exact meta-gradients, finite where the inner gradient is zero."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from loops import Run, mlp, rows, sgd_for
from torch import Tensor, nn

import lowmem_higher
from lowmem_higher import clip_grad_norm, clip_grad_value
from lowmem_higher.testing import assert_matches_unrolled, taylor_test

NORMS = [1.0, 2.0, 3.5, math.inf]


def inner_gradients(seed: int, dtype: torch.dtype = torch.float64) -> list[Tensor | None]:
    generator = torch.Generator().manual_seed(seed)
    shapes: list[tuple[int, ...]] = [(3, 4), (4,), ()]
    found: list[Tensor | None] = [torch.randn(shape, generator=generator, dtype=torch.float64) for shape in shapes]
    return [grad if grad is None else grad.to(dtype) for grad in (*found[:1], None, *found[1:])]


def of_torch(grads: list[Tensor | None], clip: Any, *args: Any, **options: Any) -> list[Tensor | None]:
    params = [torch.zeros_like(grad) for grad in grads if grad is not None]
    for param, grad in zip(params, (grad for grad in grads if grad is not None), strict=True):
        param.grad = grad.clone()
    clip(params, *args, **options)
    clipped = iter(param.grad for param in params)
    return [None if grad is None else next(clipped) for grad in grads]


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
@pytest.mark.parametrize("p", NORMS)
@pytest.mark.parametrize("limit", [0.0, 0.3, 1e6])
def test_values_are_those_of_torch(limit: float, p: float, dtype: torch.dtype) -> None:
    grads = inner_gradients(1, dtype)
    pairs = [
        (clip_grad_norm(limit, p), torch.nn.utils.clip_grad_norm_, {"norm_type": p}),
        (clip_grad_value(limit), torch.nn.utils.clip_grad_value_, {}),
    ]
    for clip, theirs, options in pairs:
        for ours, expected in zip(clip(list(grads)), of_torch(grads, theirs, limit, **options), strict=True):
            assert (ours is None) == (expected is None)
            if ours is not None:
                torch.testing.assert_close(
                    ours,
                    expected,
                    rtol=1e-12 if dtype == torch.float64 else None,
                    atol=None if dtype != torch.float64 else 0,
                )


def trained(run: Run, limit: Any, p: float | None) -> Tensor:
    net, x, y = run.net(mlp()), run.data(12, 3), run.data(12, 1)
    clip = clip_grad_value(limit) if p is None else clip_grad_norm(limit, p)
    with run.context(net, sgd_for(net)) as (fnet, diffopt):
        for t in range(run.steps):
            loss = (1 + t) * (fnet(x[rows(t)]) - y[rows(t)]).square().mean()
            diffopt.step(loss, grad_callback=clip)
        return fnet(x).tanh().sum()


@pytest.mark.parametrize("p", [*NORMS, None], ids=lambda p: "value" if p is None else f"norm {p}")
def test_checkpointed_gradients_equal_the_full_unroll(p: float | None) -> None:
    """With a learned limit, which binds at some steps and not at others."""

    def loop(**settings: Any) -> list[Tensor]:
        run = Run(6, **settings)
        limit = run.leaf("limit", 0.5 if p is None else 2.0)
        outer = trained(run, limit, p)
        return list(torch.autograd.grad(outer, list(run.inputs.values())))

    assert_matches_unrolled(loop, checkpoint_every=(1, 3, 10))


@pytest.mark.parametrize("p", [1.0, 2.0, 3.5])
def test_the_derivative_by_the_limit_is_that_of_finite_differences(p: float) -> None:
    assert taylor_test(lambda limit: trained(Run(5, checkpoint_every=2), limit, p), torch.tensor(1.3).double()) > 1.9


@pytest.mark.parametrize("p", [*NORMS, None], ids=lambda p: "value" if p is None else f"norm {p}")
@pytest.mark.parametrize("N", [None, 2])
def test_no_nan_where_all_inner_gradients_are_zero(p: float | None, N: int | None) -> None:
    """The first inner gradient is exactly zero, and depends on a learned tensor: a dead start."""
    net = nn.Linear(2, 1, bias=False).double()
    clip = clip_grad_value(1.0) if p is None else clip_grad_norm(1.0, p)
    gain = torch.ones((), dtype=torch.float64, requires_grad=True)
    zero = torch.zeros(2, dtype=torch.float64, requires_grad=True)
    opt = torch.optim.SGD(net.parameters(), lr=0.1)
    with lowmem_higher.innerloop_ctx(net, opt, copy_initial_weights=False, checkpoint_every=N) as (fnet, diffopt):
        diffopt.step((fnet(zero) * gain).sum(), grad_callback=clip)
        diffopt.step((fnet(zero + 1) * gain).sin().sum(), grad_callback=clip)
        outer = fnet(torch.ones(2, dtype=torch.float64)).square().sum()
    found = torch.autograd.grad(outer, [gain, zero, net.weight])
    assert all(gradient.isfinite().all() for gradient in found)
    assert found[0].norm() > 0
    assert found[2].norm() > 0


def test_nothing_to_clip_and_other_dtypes() -> None:
    assert clip_grad_norm(1.0)([None, None]) == [None, None]
    large = torch.full((4,), 6e4, dtype=torch.float16)  # its squares overflow in half precision
    (clipped,) = clip_grad_norm(1.0)([large])
    assert clipped is not None
    assert clipped.dtype == torch.float16
    assert clipped.float().norm().item() == pytest.approx(1.0, rel=1e-3)


@pytest.mark.parametrize("limit", [-1.0, math.nan, torch.tensor(-1.0), torch.ones(2)])
def test_a_limit_that_is_none_is_refused(limit: Any) -> None:
    with pytest.raises(ValueError, match="max_norm"):
        clip_grad_norm(limit)
    with pytest.raises(ValueError, match="clip_value"):
        clip_grad_value(limit)


def test_what_is_no_norm_is_refused() -> None:
    with pytest.raises(ValueError, match=r"norm_type=0.5 is no norm"):
        clip_grad_norm(1.0, 0.5)
