"""A custom function under another name, `cube = Cube.apply`, made before any context: right, or refused.

Where torch's `apply` is Python the recorder sees it; where it is C (torch 2.14) nobody sees its arguments.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.autograd.function import Function

import lowmem_higher as higher
from lowmem_higher import watch

pytestmark = pytest.mark.usefixtures("float64")

SEEN = hasattr(vars(Function)["apply"], "__func__")


class Cube(Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, w: Tensor) -> Tensor:
        ctx.save_for_backward(x, w)
        return x**3 * w

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, Tensor]:
        x, w = ctx.saved_tensors
        return 3 * x**2 * grads[0] * w, (x**3 * grads[0]).sum_to_size(w.shape)


cube = Cube.apply
Call = Callable[[Tensor, Tensor], Tensor]


class Net(nn.Module):
    """Reads a tensor from outside that is no argument."""

    def __init__(self, call: Call, outside: Tensor) -> None:
        super().__init__()
        self.layer = nn.Linear(3, 1)
        self.call = call
        self.outside = lambda: outside

    def forward(self, x: Tensor) -> Tensor:
        return self.call(self.layer(x), self.outside())


class Passed(Net):
    def forward(self, x: Tensor, w: Tensor) -> Tensor:  # type: ignore[override]
        return self.call(self.layer(x), w)


def gradients(kind: str, call: Call, callback: Any = None, **settings: Any) -> list[Tensor]:
    torch.manual_seed(1)
    w = torch.tensor(0.7, requires_grad=True)
    net = (Passed if kind == "passed" else Net)(call, w)
    x = torch.linspace(-1, 1, 12).reshape(4, 3)
    opt = torch.optim.SGD(net.parameters(), lr=0.1)
    with higher.innerloop_ctx(net, opt, copy_initial_weights=False, **settings) as (fnet, diffopt):
        for _ in range(5):
            match kind:
                case "in the model":
                    out = fnet(x)
                case "passed":
                    out = fnet(x, w)
                case "in the loop":
                    out = call(fnet.layer(x), w)
                case _:
                    out = fnet.layer(x)
            if kind == "in a callback":
                diffopt.step((out - 1).square().mean(), grad_callback=lambda grads: [call(g, w) for g in grads])
            else:
                diffopt.step((out - 1).square().mean())
        outer = fnet.layer(x).square().mean() + w**2  # w has a gradient in any case
        return list(torch.autograd.grad(outer, [w, *net.parameters()]))


@pytest.mark.parametrize("kind", ["in the model", "passed", "in the loop", "in a callback"])
def test_right_or_refused(kind: str) -> None:
    reference = gradients(kind, cube)
    try:
        found = gradients(kind, cube, checkpoint_every=2)
    except higher.RecordError as error:
        assert not SEEN
        assert kind != "passed"
        assert "step(" in str(error) or "Cube.apply(...)" in str(error)
    else:
        assert SEEN or kind == "passed"
        for a, b in zip(found, reference, strict=True):
            assert b.norm() > 0
            assert (a - b).norm() <= 1e-9 * b.norm()


@pytest.mark.parametrize("kind", ["in the model", "passed", "in the loop", "in a callback"])
def test_called_in_place_it_is_right_everywhere(kind: str) -> None:
    reference = gradients(kind, lambda *args: Cube.apply(*args))
    for a, b in zip(gradients(kind, lambda *args: Cube.apply(*args), checkpoint_every=2), reference, strict=True):
        assert b.norm() > 0
        assert (a - b).norm() <= 1e-9 * b.norm()


def test_what_nobody_sees_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    """As in a torch whose `apply` is C: the alias goes past the recorder."""
    in_c = Function.__mro__[2].__dict__["apply"]  # of the base class that is made in C

    def hidden(x: Tensor, w: Tensor) -> Tensor:
        result: Tensor = in_c.__get__(None, Cube)(x, w)
        return result

    for kind in ("in the model", "in a callback"):
        assert gradients(kind, hidden)[0].norm() > 0
        with pytest.raises(higher.RecordError, match=r"Write Cube\.apply\(\.\.\.\) where it is called"):
            gradients(kind, hidden, checkpoint_every=2)
    with pytest.raises(higher.RecordError, match="did not see"):
        gradients("in the loop", hidden, checkpoint_every=2)
    reference, found = gradients("passed", hidden), gradients("passed", hidden, checkpoint_every=2)
    assert all((a - b).norm() <= 1e-9 * b.norm() for a, b in zip(found, reference, strict=True))
    assert watch._applied.seen == 0
    assert watch._applied.hidden is None
