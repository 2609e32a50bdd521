"""A gradient that nobody asked for is not computed: the first step's, with respect to the initial weights."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode

import lowmem_higher as higher

pytestmark = pytest.mark.usefixtures("float64")


def gradients(steps: int, wanted: str, copied: bool, **setting: Any) -> tuple[int, dict[str, Tensor]]:
    """The multiply-adds of the backward, and the gradients."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(16, 32), nn.Tanh(), nn.Linear(32, 32), nn.Tanh(), nn.Linear(32, 1))
    x, y = torch.randn(24, 16), torch.randn(24, 1)
    weight = torch.linspace(0.5, 1.5, 24).requires_grad_()
    opt = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.5)
    with higher.innerloop_ctx(model, opt, copy_initial_weights=copied, **setting) as (fnet, diffopt):
        initial = list(fnet.parameters())
        for _ in range(steps):
            diffopt.step((weight * (fnet(x) - y).square().mean(1)).mean())
        outer = (fnet(x) - y).square().mean()
        counter = FlopCounterMode(display=False)
        with counter:
            if wanted == "backward":
                outer.backward()
                first = (initial if copied else list(model.parameters()))[0].grad
                assert weight.grad is not None
                assert first is not None
                found = {"weight": weight.grad, "first": first}
            else:
                inputs = {"weight": weight, "first": initial[0]}
                asked = {name: inputs[name] for name in wanted.split()}
                found = dict(zip(asked, torch.autograd.grad(outer, list(asked.values())), strict=True))
    return counter.get_total_flops(), found


@pytest.mark.parametrize("copied", [True, False], ids=["copies", "clones"])
@pytest.mark.parametrize("steps", [1, 2, 5])
@pytest.mark.parametrize("setting", [{"checkpoint_every": 2}, {"checkpoint_every": 2, "replay": "torch"}], ids=str)
def test_only_what_is_asked_for_is_computed(steps: int, copied: bool, setting: dict[str, Any]) -> None:
    _, expected = gradients(steps, "weight first", copied)
    flops = {}
    for wanted in ("weight first", "weight", "first", "backward"):
        flops[wanted], found = gradients(steps, wanted, copied, **setting)
        for name, gradient in found.items():
            assert (gradient - expected[name]).norm() <= 1e-9 * expected[name].norm()
    assert flops["weight"] < flops["weight first"] < flops["backward"]  # one of the parameters, all of them
    if steps == 1 and "replay" not in setting:
        assert flops["weight"] < 0.75 * flops["backward"]
