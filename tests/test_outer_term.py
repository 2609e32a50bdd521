"""`diffopt.outer(loss)`: terms of the outer loss on the way, without their graphs."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn

import lowmem_higher as higher
from lowmem_higher.errors import ExternalModifiedError, HigherOrderError, HistoryFreedError, RecordError
from lowmem_higher.testing import assert_matches_unrolled, live_bytes

pytestmark = pytest.mark.usefixtures("float64")

X = torch.sin(torch.arange(60, dtype=torch.float64)).reshape(20, 3)
Y = torch.cos(2 * torch.arange(20, dtype=torch.float64)).reshape(20, 1)
SETTINGS: list[dict[str, Any]] = [
    {"checkpoint_every": 1},
    {"checkpoint_every": 4},
    {"checkpoint_every": 50},
    {"checkpoint_every": 4, "replay": "torch"},
    {"checkpoints": 1},
    {"checkpoints": 3},
    {"checkpoints": 2, "journal": True},
]


def net() -> nn.Module:
    torch.manual_seed(3)
    return nn.Sequential(nn.Linear(3, 4, bias=False), nn.BatchNorm1d(4), nn.Dropout(0.3), nn.Tanh(), nn.Linear(4, 1))


def loop(steps: int = 11, handed_in: bool = True, **setting: Any) -> list[Tensor]:
    """Terms before the first step, in both modes, several at one time, after weights were set by hand."""
    model = net()
    rate, scale = torch.tensor(0.05, requires_grad=True), torch.tensor(0.7, requires_grad=True)
    opt = torch.optim.Adam(model.parameters(), lr=0.05)
    torch.manual_seed(7)
    with higher.innerloop_ctx(model, opt, copy_initial_weights=False, override={"lr": [rate]}, **setting) as (
        fnet,
        dopt,
    ):
        outer = dopt.outer if handed_in else lambda loss: loss
        terms = [outer((fnet.eval()(X) * scale - Y).square().mean())]
        for step in range(steps):
            rows = torch.arange(step, step + 8) % 20
            dopt.step((fnet.train()(X[rows]) - Y[rows]).square().mean())
            terms.append(outer((fnet(X[rows]) - scale).square().mean()))
            if step % 3 == 0:
                terms.append((1 + step) * outer((fnet.eval()(X) * scale.exp() - Y).square().mean()))
            if step == 6:
                fnet.update_params([w * 0.9 for w in fnet.parameters()])
                terms.append(outer(sum(w.square().sum() for w in fnet.parameters()).sqrt()))
        total = torch.stack(terms).sum()
        return [total.detach(), *torch.autograd.grad(total, [*model.parameters(), rate, scale])]


@pytest.mark.parametrize("setting", SETTINGS, ids=str)
def test_the_value_and_the_gradient_are_those_of_the_terms_themselves(setting: dict[str, Any]) -> None:
    expected = loop(handed_in=False)
    for one, other in zip(loop(**setting), expected, strict=True):
        assert (one - other).norm() <= 1e-9 * other.norm()
    for one, other in zip(loop(), expected, strict=True):  # the full unroll
        assert torch.equal(one, other)


def test_alone_with_retained_graphs_and_one_by_one() -> None:
    def one_by_one(**setting: Any) -> list[Tensor]:
        model = net().eval()
        opt = torch.optim.SGD(model.parameters(), lr=0.05, momentum=0.8)
        found: list[Tensor] = []
        with higher.innerloop_ctx(model, opt, copy_initial_weights=False, **setting) as (fnet, dopt):
            for step in range(7):
                dopt.step((fnet(X) - Y).square().mean())
                term = dopt.outer((fnet(X[:5]) - Y[:5]).square().mean())
                if step % 2:
                    found += torch.autograd.grad(term, list(model.parameters()), retain_graph=True)
                    found += torch.autograd.grad(2 * term, list(fnet.parameters()), retain_graph=True)
        return found

    assert_matches_unrolled(one_by_one, checkpoint_every=(1, 3))


def test_memory_does_not_grow_with_the_terms() -> None:
    """Beside a few bytes of bookkeeping: kept graphs would hold the activations of 2,000 rows for each term."""
    rows = torch.randn(2000, 3)

    def peak(steps: int) -> int:
        model = nn.Sequential(nn.Linear(3, 16), nn.Tanh(), nn.Linear(16, 1))
        opt = torch.optim.SGD(model.parameters(), lr=0.01)
        context = higher.innerloop_ctx(model, opt, copy_initial_weights=False, checkpoints=3)
        with live_bytes() as live, context as (fnet, dopt):
            total = torch.zeros(())
            for _ in range(steps):
                dopt.step((fnet(X) - Y).square().mean())
                total = total + dopt.outer(fnet(rows).square().mean())
            total.backward()
        return live.peak

    assert peak(40) <= 1.05 * peak(10)


def test_what_cannot_be_is_said() -> None:
    model = net()
    opt = torch.optim.SGD(model.parameters(), lr=0.05)
    with higher.innerloop_ctx(model, opt, copy_initial_weights=False, checkpoint_every=3) as (fnet, dopt):
        earlier = fnet(X).mean()
        dopt.step((fnet(X) - Y).square().mean())
        with pytest.raises(ValueError, match="needs a scalar"):
            dopt.outer(fnet(X))
        with pytest.raises(RecordError, match="before the last step"):
            dopt.outer(earlier)


def test_a_term_is_pulled_back_once_and_not_differentiated_again() -> None:
    model, batch = nn.Linear(3, 1), X.clone()
    opt = torch.optim.SGD(model.parameters(), lr=0.05)
    with higher.innerloop_ctx(model, opt, copy_initial_weights=False, checkpoint_every=3) as (fnet, dopt):
        dopt.step((fnet(X) - Y).square().mean())
        term, other = dopt.outer(fnet(batch).square().mean()), dopt.outer(fnet(batch).mean())
    with pytest.raises(RecordError, match="after the context was left"):
        dopt.outer(fnet(batch).square().mean())
    with pytest.raises(HigherOrderError, match="checkpoint_every=None"):
        torch.autograd.grad(term, list(model.parameters()), create_graph=True)
    term.backward(retain_graph=True)
    term.backward()
    with pytest.raises(HistoryFreedError, match="retain_graph=True"):
        term.backward()
    batch.zero_()
    with pytest.raises(ExternalModifiedError, match="after the term of time 1"):
        other.backward()
