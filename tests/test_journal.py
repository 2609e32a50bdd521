"""`journal=True`: carries recomputed from kept inner gradients, by the update rule alone."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import lowmem_higher as higher
from lowmem_higher.errors import ExternalModifiedError

pytestmark = pytest.mark.usefixtures("float64")

X = torch.sin(torch.arange(60, dtype=torch.float64)).reshape(20, 3)
Y = torch.cos(2 * torch.arange(20, dtype=torch.float64)).reshape(20, 1)


class Counted(nn.Module):
    """Counts its calls, draws masks, keeps statistics."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(3)
        self.layers = nn.Sequential(
            nn.Linear(3, 4, bias=False), nn.BatchNorm1d(4), nn.Dropout(0.3), nn.Tanh(), nn.Linear(4, 1)
        )
        self.calls = [0]

    def forward(self, x: Tensor) -> Tensor:
        self.calls[0] += 1
        out: Tensor = self.layers(x)
        return out


def clipped(grads: list[Tensor | None]) -> list[Tensor | None]:
    return [None if grad is None else grad.clamp(-0.05, 0.05) for grad in grads]


def meta_gradients(
    optimizer: Callable[..., torch.optim.Optimizer], callback: Any = None, steps: int = 14, **setting: Any
) -> tuple[list[Tensor], Any, int]:
    model, rate = Counted(), torch.tensor(0.05, requires_grad=True)
    opt = optimizer(model.parameters(), lr=0.05)
    torch.manual_seed(7)
    with higher.innerloop_ctx(model, opt, copy_initial_weights=False, override={"lr": [rate]}, **setting) as (
        fnet,
        dopt,
    ):
        for step in range(steps):
            rows = torch.arange(step, step + 8) % 20
            fnet.train(step % 3 != 2)  # in evaluation a step reads the statistics that earlier ones have left
            dopt.step((fnet(X[rows]) - Y[rows]).square().mean(), grad_callback=callback)
        outer = (fnet.eval()(X) - Y).square().mean() + sum(w.square().sum() for w in fnet.parameters(time=5))
        grads = torch.autograd.grad(outer, [*model.parameters(), rate])
    return list(grads), dopt.report, model.calls[0]


@pytest.mark.parametrize("setting", [{"checkpoint_every": 4}, {"checkpoints": 3}, {"checkpoints": 1}], ids=str)
@pytest.mark.parametrize("callback", [None, clipped])
@pytest.mark.parametrize("optimizer", [torch.optim.SGD, torch.optim.AdamW, torch.optim.NAdam])
def test_the_same_bits_and_no_model_runs_in_replays(
    optimizer: Callable[..., torch.optim.Optimizer], callback: Any, setting: dict[str, Any]
) -> None:
    expected, report, calls = meta_gradients(optimizer, callback, **setting)
    assert report.update_runs == 0
    found, journaled, fewer_calls = meta_gradients(optimizer, callback, journal=True, **setting)
    assert all(torch.equal(one, other) for one, other in zip(found, expected, strict=True))
    assert journaled.first_order_runs == 14
    assert journaled.second_order_runs == 14
    assert journaled.update_runs == report.first_order_runs - 14
    assert fewer_calls == calls - journaled.update_runs
    unrolled, _, _ = meta_gradients(optimizer, callback)
    for one, other in zip(found, unrolled, strict=True):
        assert (one - other).norm() <= 1e-9 * other.norm()


def test_its_bytes_are_those_of_the_weights_at_each_step_and_are_freed() -> None:
    model = Counted()
    opt = torch.optim.SGD(model.parameters(), lr=0.05)
    weights = sum(param.nbytes for param in model.parameters())
    statistics = sum(buffer.nbytes for buffer in model.buffers())
    with higher.innerloop_ctx(model, opt, copy_initial_weights=False, checkpoints=2, journal=True) as (fnet, diffopt):
        for step in range(1, 6):
            diffopt.step((fnet(X) - Y).square().mean())
            assert diffopt.report.journal_bytes == step * (weights + statistics)
        assert "journal" in repr(diffopt.report)
        (fnet(X) - Y).square().mean().backward()
    assert diffopt.report.journal_bytes == 0


def test_a_gradient_changed_afterwards_is_noticed() -> None:
    model, seen = nn.Linear(3, 1), list[Tensor]()

    def remembers(grads: list[Tensor]) -> list[Tensor]:
        seen.extend(grads)
        return grads

    opt = torch.optim.SGD(model.parameters(), lr=0.05)
    with higher.innerloop_ctx(model, opt, copy_initial_weights=False, checkpoints=1, journal=True) as (fnet, diffopt):
        for _ in range(4):
            diffopt.step((fnet(X) - Y).square().mean(), grad_callback=remembers)
        seen[0].zero_()
        with pytest.raises(ExternalModifiedError, match="inner gradient of step 0"):
            (fnet(X) - Y).square().mean().backward()


def test_bad_settings() -> None:
    model = nn.Linear(3, 1)
    opt = torch.optim.SGD(model.parameters(), lr=0.1)
    with (
        pytest.raises(ValueError, match="checkpoints=10, journal=True"),
        higher.innerloop_ctx(model, opt, journal=True),
    ):
        pass
    with pytest.raises(TypeError, match="journal=1 is a int"), higher.innerloop_ctx(model, opt, journal=1):  # type: ignore[arg-type]
        pass
