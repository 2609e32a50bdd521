"""Random inner loops: whatever the user's loop does between two steps, the checkpointed gradient is the unroll's.

A loop is drawn as a list of small operations on a pool of tensors, all of shape (4, 3), so that any operation can
follow any other. What plain autograd refuses (an in-place write into something it saved) is drawn again. More
examples, not the same ones each time: `RANDOM_LOOPS=2000 pytest tests/test_random_loops.py`.
"""

from __future__ import annotations

import dataclasses
import os
from collections.abc import Callable
from typing import Any
from unittest import mock

import torch
import torch.nn.functional as F
from hypothesis import HealthCheck, assume, example, given, note, settings
from hypothesis import strategies as st
from loops import Cube, Run
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from lowmem_higher import LowmemError, budgeted
from lowmem_higher.budget import Allotment

EXAMPLES = int(os.environ.get("RANDOM_LOOPS", "0"))
SIZE = (4, 3)

# ------------------------------------------------------------------------------------------------------------- the net


@dataclasses.dataclass(frozen=True)
class NetSpec:
    norm: str
    dropout: float
    tied: bool
    recompute: bool  # torch.utils.checkpoint inside
    shifted: bool  # by a tensor that forward reaches through an attribute
    stateful: bool  # stores its last activation as an attribute, and reads it in the next call


class Net(nn.Module):
    def __init__(self, spec: NetSpec, shift: Tensor) -> None:
        super().__init__()
        self.first, self.last = nn.Linear(3, 3), nn.Linear(3, 3)
        if spec.tied:
            self.last.weight = self.first.weight
        self.norm: nn.Module = {"batch": nn.BatchNorm1d, "layer": nn.LayerNorm, "none": nn.Identity}[spec.norm](3)
        self.dropout = nn.Dropout(spec.dropout)
        self.spec, self.shift, self.kept = spec, shift if spec.shifted else None, torch.zeros(SIZE, dtype=torch.float64)

    def forward(self, x: Tensor) -> Tensor:
        hidden = self.norm(self.first(x))
        if self.shift is not None:
            hidden = hidden + self.shift
        if self.spec.stateful:
            hidden = hidden + 0.1 * self.kept
            self.kept = hidden.detach()
        if self.spec.recompute:
            return checkpoint(self.tail, hidden, use_reentrant=False)
        return self.tail(hidden)

    def tail(self, hidden: Tensor) -> Tensor:
        return self.last(self.dropout(hidden.tanh()))


# ---------------------------------------------------------------------------------------------------------- operations


class World:
    """What the operations of one loop work on."""

    def __init__(
        self, run: Run, fnet: Any, diffopt: Any, leaves: dict[str, Tensor], data: Tensor, recomputes: bool
    ) -> None:
        self.run, self.fnet, self.diffopt, self.leaves, self.data = run, fnet, diffopt, leaves, data
        self.outside = torch.sigmoid(leaves["outside"])  # not a leaf, made before the first step
        self.hidden = torch.zeros(SIZE, dtype=torch.float64)  # carried from step to step
        self.kept: list[Tensor] = [data[0]]  # tensors of earlier steps
        self.outer = torch.zeros((), dtype=torch.float64)
        self.pool: list[Tensor] = []
        self.penalty: list[Tensor] = []
        self.t = 0
        self.recomputes = recomputes

    def trained(self) -> list[Tensor]:
        """Those weights that the optimizer holds: by another the derivative would go through all earlier steps."""
        params = list(self.fnet.parameters())
        return [params[index] for group in self.diffopt._group_to_param_list for index in group]

    def pick(self, k: int) -> Tensor:
        return self.pool[k % len(self.pool)]


Operation = Callable[[World, int, int], Tensor | None]
OPERATIONS: list[Operation] = []


def operation(function: Operation) -> Operation:
    OPERATIONS.append(function)
    return function


@operation
def forward_of_data(w: World, a: int, b: int) -> Tensor:
    return w.fnet(w.data[(w.t + a) % len(w.data)])


@operation
def forward_of_pool(w: World, a: int, b: int) -> Tensor:
    return w.fnet(w.pick(a))


@operation
def forward_of_submodules(w: World, a: int, b: int) -> Tensor:
    return w.fnet.last(w.fnet.first(w.pick(a)).sin())


@operation
def arithmetic(w: World, a: int, b: int) -> Tensor:
    x, y = w.pick(a), w.pick(b)
    return [x + y, x * y, x - 2 * y, torch.where(x > y, x, 0.5 * y), x / (1 + y.square())][(a + b) % 5]


@operation
def functions(w: World, a: int, b: int) -> Tensor:
    x = w.pick(a)
    return [
        x.sin(),
        F.softplus(x),
        x.softmax(1),
        x.cumsum(0),
        x.abs().sqrt().tanh(),
        F.layer_norm(x, (3,)),
        x.logsumexp(1, keepdim=True) + x,
    ][b % 7]


@operation
def shapes(w: World, a: int, b: int) -> Tensor:
    x = w.pick(a)
    parts = x.unbind(1)
    return [
        x.T.contiguous().T,
        x.mT.reshape(4, 3),
        torch.cat([x[2:], x[:2]]),
        torch.stack([parts[2], parts[0], parts[1]], 1),
        x.flip(0).roll(1, 1),
        x[[1, 0, 3, 2]],
        x.flatten().view(3, 4).T,
        torch.einsum("ij,kj->ik", x, x) @ x / 10,
    ][b % 8]


@operation
def by_value(w: World, a: int, b: int) -> Tensor:
    """What is chosen depends on the values."""
    x, y = w.pick(a), w.pick(b)
    if b % 3 == 0:
        return x * y.mean().tanh().item()
    if b % 3 == 1:
        return torch.where((y.sum(1, keepdim=True) > 0), x, -x)
    return x.gather(0, y.argsort(0)) + x[y.argmax() // 3]


@operation
def write_all(w: World, a: int, b: int) -> Tensor:
    x = w.pick(a).clone() if b % 2 else w.pick(a)
    return [x.add_(1.0), x.mul_(0.5), x.add_(w.pick(b), alpha=0.3), x.tanh_(), x.sub_(w.pick(b))][b % 5]


@operation
def write_through_a_view(w: World, a: int, b: int) -> Tensor:
    x = w.pick(a) + 0.0
    if b % 2:
        w.pool.append(x)
    view = [x[1:3], x[:, 0], x.T[1], x.view(-1)[::5], x.reshape(2, 2, 3)[0]][b % 5]
    view *= 0.5
    if b % 3 == 0:
        view += 0.1 * view.detach()
    if b % 7 == 0:
        x[0] += view.sum()
    return x


@operation
def write_items(w: World, a: int, b: int) -> Tensor:
    out = torch.zeros(SIZE, dtype=torch.float64) if b % 2 else torch.empty_like(w.pick(b)).fill_(0.3)
    out[a % 4] = w.pick(a)[b % 4]
    out[:, b % 3] = out[:, b % 3] + w.pick(b)[:, a % 3]
    if a % 3 == 0:
        out[out > 0.5] = w.leaves["outside"].sum()
    return out


@operation
def write_with_fill_and_copy(w: World, a: int, b: int) -> Tensor:
    out = w.pick(a).detach().clone()
    out[1:].copy_(w.pick(b)[1:])
    out[0].fill_(a / 5)
    return out.masked_fill_(out.abs() > 2, 2.0) if b % 2 else out.clamp_(-2, 2)


@operation
def detached(w: World, a: int, b: int) -> Tensor:
    x = w.pick(a)
    return [x.detach(), x.detach().clone(), x + w.pick(b).detach().mul(0.3)][b % 3]


@operation
def without_grad(w: World, a: int, b: int) -> Tensor:
    with torch.no_grad():
        value = w.fnet(w.data[a % len(w.data)]) if b % 2 else w.pick(a).sin()
        value = value * 0.5
    return value + w.pick(b) if a % 2 else value


@operation
def evaluation(w: World, a: int, b: int) -> None:
    """An evaluation in the middle, some in eval mode."""
    was = w.fnet.training
    with torch.no_grad():
        w.fnet.train(mode=bool(b % 2))
        for batch in w.data[: a % 3]:
            w.fnet(batch)
    w.fnet.train(mode=was)


@operation
def switch_mode(w: World, a: int, b: int) -> None:
    if not w.recomputes:  # a checkpoint recomputes in the mode of then: plain torch is at fault as well
        w.fnet.train(mode=bool(a % 2))


@operation
def noise(w: World, a: int, b: int) -> Tensor:
    x = w.pick(a)
    if b % 5 == 4:
        torch.manual_seed(a)
    return [
        F.dropout(x, 0.4),
        x + w.leaves["outside"] * torch.randn_like(x),
        x * torch.rand(SIZE, dtype=torch.float64),
        x * (torch.rand_like(x) < 0.5),
        x.detach().clone().normal_() + x,
    ][b % 5]


@operation
def from_outside(w: World, a: int, b: int) -> Tensor:
    x = w.pick(a)
    return [
        x * w.outside,
        x + w.leaves["outside"].exp() * 0.1,
        x + torch.sigmoid(w.leaves["outside"]),
        x * w.kept[b % len(w.kept)],
    ][b % 4]


@operation
def leaf_in_the_loop(w: World, a: int, b: int) -> Tensor:
    leaf = (
        torch.full(SIZE, 0.3, dtype=torch.float64, requires_grad=True)
        if b % 2
        else torch.zeros_like(w.pick(a)).requires_grad_()
    )
    w.run.inputs[f"leaf {len(w.run.inputs)}"] = leaf
    return w.pick(a) * leaf.cos() + leaf


@operation
def decay_of_parameters(w: World, a: int, b: int) -> None:
    params = list(w.fnet.parameters())
    start = list(w.fnet.parameters(time=0))
    terms = (
        [p.square().sum() for p in params]
        if b % 2
        else [(p - q).square().sum() for p, q in zip(params, start, strict=True)]
    )
    w.penalty.append(0.05 * torch.stack(terms).sum())
    if a % 3 == 0:
        w.penalty.append(w.fnet.first.weight.sin().sum() * 0.05)


@operation
def gradient_penalty(w: World, a: int, b: int) -> Tensor | None:
    if b % 3 == 0:
        x = w.data[a % len(w.data)].clone().requires_grad_()
        (grad,) = torch.autograd.grad(w.fnet(x).sin().sum(), x, create_graph=True)
        return grad
    if b % 3 == 1:
        x = w.pick(a)
        if not x.requires_grad:
            return None
        here = x * 1.0
        (grad,) = torch.autograd.grad((here.sin() * w.fnet(here)).sum(), here, create_graph=True)
        return grad
    loss = w.fnet(w.data[a % len(w.data)]).square().mean()
    grads = torch.autograd.grad(loss, w.trained(), create_graph=True, allow_unused=True)
    w.penalty.append(0.1 * torch.stack([g.square().sum() for g in grads if g is not None]).sum())
    return None


@operation
def carry_hidden(w: World, a: int, b: int) -> Tensor:
    w.hidden = (0.5 * w.hidden + 0.5 * w.pick(a)).tanh()
    if b % 3 == 0:
        w.hidden = w.hidden.detach()
    return w.hidden


@operation
def keep(w: World, a: int, b: int) -> None:
    w.kept.append(w.pick(a) if b % 2 else w.pick(a).detach())
    w.kept = w.kept[-3:]


@operation
def outer_term(w: World, a: int, b: int) -> None:
    """The outer loss touches the trajectory here."""
    terms = [
        lambda: w.pick(a).sin().mean(),
        lambda: w.fnet(w.data[a % len(w.data)]).tanh().mean(),
        lambda: torch.stack([p.sin().sum() for p in w.fnet.parameters()]).sum(),
        lambda: next(iter(w.fnet.parameters(time=a % (w.t + 1)))).cos().sum(),
        lambda: w.hidden.sum(),
    ]
    w.outer = w.outer + (1 + a % 3) * terms[b % 5]()


@operation
def custom_function(w: World, a: int, b: int) -> Tensor:
    return Cube.apply(w.pick(a).tanh(), w.leaves["outside"].sum() if b % 2 else w.pick(b).mean())


@operation
def recompute_in_the_loop(w: World, a: int, b: int) -> Tensor | None:
    fnet = w.fnet
    if fnet.spec.stateful:
        return None

    def block(x: Tensor) -> Tensor:
        return fnet(x).sin() if b % 2 else fnet.last(x.tanh())

    out: Tensor = checkpoint(block, w.pick(a), use_reentrant=False)
    return out


@operation
def edit_learning_rate(w: World, a: int, b: int) -> None:
    group = w.diffopt.param_groups[0]
    group["lr"] = [0.03 * (1 + a % 3), w.leaves["log_lr"].exp(), w.leaves["log_lr"].exp() * 0.8**w.t][b % 3]


@operation
def attribute(w: World, a: int, b: int) -> None:
    if w.recomputes:
        return
    if w.fnet.shift is not None:
        w.fnet.shift = [w.leaves["shift"], w.leaves["shift"].sin(), w.leaves["shift"].detach(), w.outside[0]][a % 4]
    w.fnet.dropout.p = 0.2 + 0.1 * (b % 3)


@operation
def update_by_hand(w: World, a: int, b: int) -> None:
    params = list(w.fnet.parameters())
    if b % 4 == 0:
        w.fnet.update_params([0.9 * p for p in params])
    elif b % 4 == 1:
        past = list(w.fnet.parameters(time=a % (w.t + 1)))
        w.fnet.fast_params = [0.5 * p + 0.5 * q for p, q in zip(params, past, strict=True)]
    elif b % 4 == 2:
        loss = w.fnet(w.data[a % len(w.data)]).square().mean()
        trained = w.trained()
        grads = torch.autograd.grad(loss, trained, create_graph=True, allow_unused=True)
        steps = {id(p): g for p, g in zip(trained, grads, strict=True) if g is not None}
        rate = w.leaves["log_lr"].exp()
        w.fnet.update_params([p - rate * steps[id(p)] if id(p) in steps else p + 0.0 for p in params])
    else:
        w.pool.append(w.fnet(w.pick(a), params=[p + 0.0 for p in params]))


@operation
def chained_views(w: World, a: int, b: int) -> Tensor:
    """Several views of one tensor, written in turn and read in between."""
    base = w.pick(a) * 1.0
    top, left = base[:2], base[:, :2]
    top.mul_(0.5)
    seen = left.sum(0, keepdim=True) if b % 2 else left.detach().sum(0, keepdim=True)
    left.add_(0.1)
    top[0] = w.pick(b)[0]
    return base + F.pad(seen, (0, 1)).expand(SIZE)


# --------------------------------------------------------------------------------------------------------------- loops


@dataclasses.dataclass(frozen=True)
class Spec:
    """A drawn loop; `__repr__` is what to paste into `@example`."""

    net: NetSpec
    optimizer: str
    learned: bool
    steps: int
    every: int
    replay: str
    patterns: tuple[tuple[tuple[int, int, int], ...], ...]
    by_function: bool
    edges: bool
    copied: bool = False
    schedule: str = "periodic"

    @property
    def setting(self) -> dict[str, Any]:
        """The keywords of `innerloop_ctx`."""
        kept = {
            "periodic": {"checkpoint_every": self.every},
            "bounded": {"checkpoints": min(self.every, 3)},
            "graphs": {"checkpoint_every": self.every, "graphs": 1 + self.every // 2},
            "known": {"checkpoints": min(self.every, 3), "steps": self.steps},
            "journal": {"checkpoints": min(self.every, 3), "journal": True},
            "budget": {"memory_budget": 1 << 40},
        }[self.schedule]
        return {**kept, "replay": "native" if self.schedule == "graphs" else self.replay}


OPTIMIZERS: dict[str, Callable[[list[Any]], torch.optim.Optimizer]] = {
    "sgd": lambda params: torch.optim.SGD(params, lr=0.05),
    "momentum": lambda params: torch.optim.SGD(params, lr=0.03, momentum=0.8, weight_decay=0.05),
    "nesterov": lambda params: torch.optim.SGD(
        [{"params": params[:2]}, {"params": params[2:], "lr": 0.06}], lr=0.03, momentum=0.8, nesterov=True
    ),
    "part": lambda params: torch.optim.SGD(params[:1], lr=0.05, momentum=0.5),
    "adam": lambda params: torch.optim.Adam(params, lr=0.03, eps=0.01),
    "amsgrad": lambda params: torch.optim.Adam(params, lr=0.03, eps=0.01, amsgrad=True, weight_decay=0.05),
    "adamw": lambda params: torch.optim.AdamW(params, lr=0.03, eps=0.01),
    "rmsprop": lambda params: torch.optim.RMSprop(params, lr=0.02, eps=0.05, momentum=0.5),
    "adagrad": lambda params: torch.optim.Adagrad(params, lr=0.05, eps=0.05),
    "adadelta": lambda params: torch.optim.Adadelta(params, lr=0.5, eps=0.01),
    "nadam": lambda params: torch.optim.NAdam(params, lr=0.02, eps=0.05),
    "asgd": lambda params: torch.optim.ASGD(params, lr=0.03, weight_decay=0.05),
}


def loop(spec: Spec, run: Run) -> Tensor:
    leaves = {
        "outside": run.leaf("outside", 0.3 * run.data(*SIZE)),
        "shift": run.leaf("shift", 0.3 * run.data(3)),
        "log_lr": run.leaf("log_lr", -3.0),
    }
    net = run.net(Net(spec.net, leaves["shift"]))
    if run.settings.get("copy_initial_weights"):
        for name, _ in net.named_parameters():
            del run.inputs[name]
    opt = OPTIMIZERS[spec.optimizer](list(net.parameters()))
    override: dict[str, Any] = {}
    if spec.learned:
        override["weight_decay"] = [run.leaf("weight_decay", 0.1)]
        if "momentum" in opt.param_groups[0] and opt.param_groups[0]["momentum"]:
            override["momentum"] = [run.leaf("momentum", 0.7)]
        if "betas" in opt.param_groups[0]:
            override["betas"] = [(run.leaf("beta1", 0.8), run.leaf("beta2", 0.9))]
            override["eps"] = [run.leaf("eps", 0.02)]
    data = run.data(5, *SIZE)
    with run.context(net, opt, override) as (fnet, diffopt):
        if run.settings.get("copy_initial_weights"):
            run.inputs.update(
                zip([f"initial {name}" for name, _ in net.named_parameters()], fnet.parameters(), strict=True)
            )
        recomputes = spec.net.recompute or any(
            "recompute" in OPERATIONS[code].__name__ for p in spec.patterns for code, _, _ in p
        )
        world = World(run, fnet, diffopt, leaves, data, recomputes)
        for t in range(spec.steps):
            world.t, world.penalty = t, []
            world.pool = [data[t % 5].clone(), fnet(data[(t + 1) % 5])]
            for code, a, b in spec.patterns[t % len(spec.patterns)]:
                made = OPERATIONS[code](world, a, b)
                if made is not None:
                    world.pool.append(made)
            world.pool.append(fnet(world.pool[-1]))
            losses = [part.tanh().square().mean() for part in world.pool[-3:]] + world.penalty
            if spec.by_function and t % 2:
                extra = torch.stack(losses).sum().detach() if t % 4 == 1 else leaves["outside"].sum()
                diffopt.step(_by_function, data[t % 5], extra)
            else:
                diffopt.step(torch.stack(losses).sum())
            if spec.edges and t == spec.steps // 2:
                run.inputs.update({f"weight {k} of step {t}": p for k, p in enumerate(fnet.parameters())})
        final = fnet(data[0]).tanh().sum() + torch.stack([p.sin().sum() for p in fnet.parameters()]).sum()
        return world.outer + final


def _by_function(fnet: Any, x: Tensor, extra: Tensor) -> Tensor:
    out = F.dropout(fnet(x), 0.3)
    out[0] *= 0.5
    loss: Tensor = (out * extra.tanh()).square().mean() + 0.1 * fnet.last.bias.square().sum()
    return loss


def gradients(spec: Spec, **settings: Any) -> dict[str, Tensor | None]:
    run = Run(spec.steps, copy_initial_weights=spec.copied, **settings)
    torch.manual_seed(3)
    outer = loop(spec, run)
    found = torch.autograd.grad(outer, list(run.inputs.values()), allow_unused=True)
    return dict(zip(run.inputs, found, strict=True))


nets = st.builds(
    NetSpec,
    norm=st.sampled_from(["none", "batch", "layer"]),
    dropout=st.sampled_from([0.0, 0.3]),
    tied=st.booleans(),
    recompute=st.booleans(),
    shifted=st.booleans(),
    stateful=st.booleans(),
)
calls = st.tuples(st.integers(0, len(OPERATIONS) - 1), st.integers(0, 6), st.integers(0, 29))
specs = st.builds(
    Spec,
    net=nets,
    optimizer=st.sampled_from(list(OPTIMIZERS)),
    learned=st.booleans(),
    steps=st.integers(1, 7),
    every=st.integers(1, 8),
    replay=st.sampled_from(["native", "native", "torch"]),
    patterns=st.lists(st.lists(calls, max_size=6).map(tuple), min_size=1, max_size=3).map(tuple),
    by_function=st.booleans(),
    edges=st.booleans(),
    copied=st.booleans(),
    schedule=st.sampled_from(["periodic", "periodic", "bounded", "known", "journal", "budget", "graphs"]),
)


def check(spec: Spec) -> None:
    try:
        expected = gradients(spec)
    except RuntimeError as error:  # what plain autograd refuses
        assert not isinstance(error, LowmemError)
        assume(
            "modified by an inplace operation" not in str(error)
            and "a view" not in str(error)
            and "leaf" not in str(error)
        )
        raise
    except ValueError as error:
        assume("does not depend on" not in str(error))
        raise
    scale = max(g.norm().item() for g in expected.values() if g is not None)
    assume(scale < 1e6)
    assert scale > 0
    names = [OPERATIONS[code].__name__ for pattern in spec.patterns for code, _, _ in pattern]
    note(f"{names}")
    shared = Allotment(unrolled=min(spec.every, 3), checkpoints=min(spec.every, 3), spare=0)
    with mock.patch.object(budgeted, "allot", return_value=shared):
        found = gradients(spec, **spec.setting)
    assert found.keys() == expected.keys()
    for name, reference in expected.items():
        gradient = found[name]
        zero = torch.zeros((), dtype=torch.float64)
        a, b = (zero if g is None else g for g in (gradient, reference))
        assert (a - b).norm() <= 1e-9 * b.norm() + 1e-13 * scale, f"{name}: {a} is not {b}"


PLAIN = NetSpec("none", 0.0, tied=False, recompute=False, shifted=False, stateful=False)


@settings(
    max_examples=EXAMPLES or 500,
    derandomize=not EXAMPLES,
    database=None,
    suppress_health_check=[HealthCheck.too_slow, HealthCheck.filter_too_much, HealthCheck.data_too_large],
)
@given(specs)
@example(Spec(PLAIN, "sgd", False, 3, 2, "native", (((1, 0, 0),),), False, False))
def test_random_loops(spec: Spec) -> None:
    check(spec)
