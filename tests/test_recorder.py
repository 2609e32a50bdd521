"""The recorder: what it sees, what it keeps, what it lets go, and the programs that come out of it."""

from __future__ import annotations

import collections
import dataclasses
import gc
import textwrap
import weakref
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import lowmem_higher as higher
from lowmem_higher.record import recorder, version_of
from lowmem_higher.tensor_map import TensorMap
from lowmem_higher.testing import assert_matches_unrolled, live_bytes

pytestmark = pytest.mark.usefixtures("float64")

ROWS, FEATURES = 12, 4


@pytest.fixture(autouse=True)
def no_collector() -> Iterator[None]:
    """What dies here dies by reference counting."""
    gc.collect()
    gc.disable()
    try:
        yield
    finally:
        gc.enable()


class ModelOutput(collections.OrderedDict[str, Any]):
    """As in transformers: a mapping with attributes, indexed by number too."""

    def __getattr__(self, name: str) -> Any:
        if name in self:
            return self[name]
        raise AttributeError(name)

    def __getitem__(self, key: Any) -> Any:
        return super().__getitem__(key) if isinstance(key, str) else tuple(self.values())[key]


@dataclasses.dataclass
class Pair:
    out: Tensor
    hidden: Tensor


class NamedPair(NamedTuple):
    out: Tensor
    hidden: Tensor


class Net(nn.Module):
    """Two layers; `kind` says in what its results come."""

    def __init__(self, kind: str = "tensor") -> None:
        super().__init__()
        self.body, self.head, self.kind = nn.Linear(FEATURES, 5), nn.Linear(5, 1), kind

    def forward(self, x: Tensor, scale: float = 1.0, extra: dict[str, list[Tensor]] | None = None) -> Any:
        hidden = torch.tanh(self.body(x))
        out = self.head(hidden) * scale
        if extra is not None:
            out = out + extra["shift"][0]
        results: dict[str, Callable[[], Any]] = {
            "tensor": lambda: out,
            "dictionary": lambda: {"out": out, "hidden": hidden},
            "list": lambda: [out, [hidden]],
            "dataclass": lambda: Pair(out, hidden),
            "named tuple": lambda: NamedPair(out, hidden),
            "model output": lambda: ModelOutput(loss=None, out=out, hidden=hidden),
        }
        return results[self.kind]()


class Data(NamedTuple):
    x: Tensor
    y: Tensor
    w: Tensor  # a meta-parameter

    def loss(self, out: Tensor) -> Tensor:
        return (out - self.y).square().mean()


@pytest.fixture
def data(float64: None) -> Data:
    return Data(torch.randn(ROWS, FEATURES), torch.randn(ROWS, 1), torch.full((), 0.7, requires_grad=True))


def sgd(model: nn.Module) -> torch.optim.Optimizer:
    return torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9)


# Loops that a recorder must follow: each must give the gradients of the full unroll

Body = Callable[[Any, Any, Data, int], None]  # takes step t
loops: dict[str, Body] = {}


def loop(body: Body) -> Body:
    loops[body.__name__] = body
    return body


@loop
def sum_in_place(fmodel: Any, diffopt: Any, data: Data, t: int) -> None:
    loss: Any = 0.0
    for i in range(3):
        loss += (fmodel(data.x[4 * i : 4 * i + 4]) - data.y[4 * i : 4 * i + 4]).square().mean() * data.w
    diffopt.step(loss)


@loop
def sum_in_place_from_a_tensor(fmodel: Any, diffopt: Any, data: Data, t: int) -> None:
    loss = torch.zeros(())
    for i in range(3):
        loss += (fmodel(data.x[4 * i : 4 * i + 4]) - data.y[4 * i : 4 * i + 4]).square().mean() * data.w
    diffopt.step(loss)


@loop
def results_written_into_a_tensor(fmodel: Any, diffopt: Any, data: Data, t: int) -> None:
    out = torch.zeros(3)
    for i in range(3):
        out[i] = (fmodel(data.x[4 * i : 4 * i + 4]) - data.y[4 * i : 4 * i + 4]).square().mean() * data.w
    diffopt.step(out.mean() + out[0] * out[1])


@loop
def results_written_into_a_column(fmodel: Any, diffopt: Any, data: Data, t: int) -> None:
    table = torch.ones(ROWS, 3)
    table[:, 1] = fmodel(data.x).flatten()
    table[:, 2].copy_(fmodel(data.x * data.w)[:, 0])
    diffopt.step(table.prod(1).square().mean() + table.mean())


@loop
def writes_through_views(fmodel: Any, diffopt: Any, data: Data, t: int) -> None:
    out = fmodel(data.x)
    part = out[:6]
    part.mul_(data.w)
    out.view(-1)[3] = data.w * 2
    out[6:].view(2, 3).t().add_(0.1 * t)
    diffopt.step(data.loss(out) + part.sum() * 0.01)


@loop
def a_view_read_after_its_base_was_written(fmodel: Any, diffopt: Any, data: Data, t: int) -> None:
    out = fmodel(data.x).clone()
    part, last = out[2:8], out[-1]
    out.mul_(data.w)
    last += 1
    diffopt.step(part.square().mean() + out.mean() + last.sum())


@loop
def masked_assignment(fmodel: Any, diffopt: Any, data: Data, t: int) -> None:
    out = fmodel(data.x)
    out[data.y > 0] = data.w
    out[out < -0.1] = 0.3
    out.masked_fill_(data.y < -1, 0.5)
    diffopt.step(data.loss(out) * data.w)


@loop
def gradient_penalty(fmodel: Any, diffopt: Any, data: Data, t: int) -> None:
    x = data.x[t : t + 6].clone().requires_grad_()
    out = fmodel(x).sum()
    (grad,) = torch.autograd.grad(out, x, create_graph=True)
    diffopt.step((grad.norm() - data.w).square() + 0.1 * out.square())


@loop
def gradient_penalty_between_batches(fmodel: Any, diffopt: Any, data: Data, t: int) -> None:
    mix = torch.rand(6, 1)
    x = mix * data.x[:6] + (1 - mix) * data.x[6:]
    x.requires_grad = True
    out = fmodel(x)
    (grad,) = torch.autograd.grad(out, x, torch.ones_like(out), create_graph=True, retain_graph=True)
    diffopt.step(((grad.norm(dim=1) - 1) ** 2).mean() * data.w + out.mean().square())


@loop
def accumulators_without_a_gradient(fmodel: Any, diffopt: Any, data: Data, t: int) -> None:
    total, count = torch.zeros(ROWS, 1), 0
    for _ in range(4):
        with torch.no_grad():
            total += fmodel(data.x) * 0.1
        count += 1
    diffopt.step((fmodel(data.x) - total / count).square().mean() * data.w)


@loop
def attributes_of_tensors(fmodel: Any, diffopt: Any, data: Data, t: int) -> None:
    out = fmodel(data.x)
    scale = out.shape[0] + out.ndim + out.numel()
    diffopt.step((out.T - data.y.mT).square().mean() * data.w * scale / 26 + (out.data * out).mean() + out.real.mean())


@loop
def out_keyword(fmodel: Any, diffopt: Any, data: Data, t: int) -> None:
    with torch.no_grad():
        target = torch.empty(ROWS, 1)
        torch.mul(data.y, 2.0, out=target)
        target.add_(t)
    diffopt.step((fmodel(data.x) - target).square().mean() * data.w)


@loop
def keyword_arguments_and_nested_ones(fmodel: Any, diffopt: Any, data: Data, t: int) -> None:
    diffopt.step(data.loss(fmodel(data.x, scale=0.5 + t, extra={"shift": [data.w]})))


@loop
def submodules_called_apart(fmodel: Any, diffopt: Any, data: Data, t: int) -> None:
    hidden = torch.tanh(fmodel.body(data.x))
    diffopt.step(data.loss(fmodel.head(hidden)) * data.w)


@loop
def several_forwards(fmodel: Any, diffopt: Any, data: Data, t: int) -> None:
    one, two = fmodel(data.x), fmodel(data.x.flip(0))
    with torch.no_grad():
        teacher = fmodel(data.x + 0.1)
    diffopt.step(data.loss(one) * data.w + (one - two).square().mean() + (two - teacher).square().mean())


@loop
def weights_used_directly(fmodel: Any, diffopt: Any, data: Data, t: int) -> None:
    flat = torch.cat([weight.flatten() for weight in fmodel.parameters()])
    first = F.linear(data.x, fmodel.body.weight).square().mean()
    diffopt.step(data.loss(fmodel(data.x)) + data.w * (flat.square().sum() + first))


@loop
def results_with_several_tensors(fmodel: Any, diffopt: Any, data: Data, t: int) -> None:
    errors = (fmodel(data.x) - data.y).square().flatten()
    hardest, order = torch.sort(errors, descending=True)
    one, two, three = errors.chunk(3)
    largest = errors.view(3, 4).max(1)
    diffopt.step(hardest[:5].mean() * data.w + (one * two - three).mean() + (largest.values * largest.indices).sum() / 9
                 + errors[order[:3]].sum() * 0.1)  # fmt: skip


@loop
def iteration_over_rows(fmodel: Any, diffopt: Any, data: Data, t: int) -> None:
    loss: Any = 0
    for row, label in zip(fmodel(data.x), data.y, strict=True):
        loss = loss + (row - label).square().sum()
    diffopt.step(loss * data.w / ROWS)


@loop
def numbers_that_were_read_from_tensors(fmodel: Any, diffopt: Any, data: Data, t: int) -> None:
    out = fmodel(data.x)
    scale = 1 + float(out.detach().abs().mean()) if out.mean() > 0 else out.detach().std().item()
    worst = int((out - data.y).abs().argmax())
    diffopt.step(data.loss(out) * data.w * scale + out[worst].square().sum())


@loop
def stacked_and_reduced(fmodel: Any, diffopt: Any, data: Data, t: int) -> None:
    losses = [data.loss(fmodel(data.x * scale)) for scale in (0.5, 1.0, 2.0)]
    diffopt.step(torch.stack(losses).logsumexp(0) * data.w + sum(losses) / 10)


@loop
def random_augmentation_and_a_generator(fmodel: Any, diffopt: Any, data: Data, t: int) -> None:
    generator = torch.Generator().manual_seed(t)
    x = data.x + 0.1 * torch.randn(data.x.shape, generator=generator)
    x = x[torch.randperm(ROWS, generator=generator)] * torch.rand_like(x)
    x = F.dropout(x, 0.3)
    diffopt.step(fmodel(x).square().mean() * data.w + fmodel(torch.bernoulli(torch.sigmoid(data.x))).mean())


@loop
def arrays(fmodel: Any, diffopt: Any, data: Data, t: int) -> None:
    index = np.array([1, 3, 5 + t])
    x = data.x[index] * np.float64(0.5)
    index[:] = 0  # the loader goes on to use its memory
    diffopt.step((fmodel(x) - torch.from_numpy(data.y.numpy()[:3].copy())).square().mean() * data.w)


@loop
def in_place_activations(fmodel: Any, diffopt: Any, data: Data, t: int) -> None:
    out = fmodel(data.x).clone()
    F.relu(out, inplace=True)
    out = out + 0.1
    torch.sigmoid_(out)
    diffopt.step(data.loss(out) * data.w)


@loop
def a_leaf_made_in_the_loop(fmodel: Any, diffopt: Any, data: Data, t: int) -> None:
    bonus = torch.zeros(ROWS, 1, requires_grad=True)
    out = fmodel(data.x) + bonus
    (grad,) = torch.autograd.grad(data.loss(out), bonus, create_graph=True)
    diffopt.step((data.loss(out) + grad.square().sum()) * data.w)


@loop
def detach_in_place_and_by_copy(fmodel: Any, diffopt: Any, data: Data, t: int) -> None:
    target = fmodel(data.x).clone()
    target.detach_()
    other = fmodel(data.x).detach()
    out = fmodel(data.x)
    diffopt.step((out * 1.1 - target).square().mean() + (out * other).mean() * data.w)


state: dict[str, Any] = {}


@loop
def hidden_state_from_step_to_step(fmodel: Any, diffopt: Any, data: Data, t: int) -> None:
    hidden = torch.zeros(1) if t == 0 else state["hidden"]
    out = fmodel(data.x) + hidden
    state["hidden"] = torch.tanh(out.mean() * data.w + hidden)
    diffopt.step(data.loss(out))


@loop
def the_last_output_as_a_constant(fmodel: Any, diffopt: Any, data: Data, t: int) -> None:
    out = fmodel(data.x)
    loss = data.loss(out) * data.w
    if t:
        loss = loss + (out - state["last"].detach()).square().mean() + (out * state["last"][:6].sum()).mean() * 0.1
    state["last"] = out
    diffopt.step(loss)


@loop
def all_earlier_losses(fmodel: Any, diffopt: Any, data: Data, t: int) -> None:
    losses = state["losses"] = [*(state["losses"] if t else []), data.loss(fmodel(data.x)) * data.w]
    diffopt.step(losses[-1] + 0.1 * sum(losses[:-1]))


@loop
def a_moving_average_over_the_steps(fmodel: Any, diffopt: Any, data: Data, t: int) -> None:
    out = fmodel(data.x)
    before = torch.zeros(ROWS, 1) if t == 0 else state["average"]
    state["average"] = 0.9 * before + 0.1 * out.detach()
    diffopt.step(data.loss(out) * data.w + (out - state["average"]).square().mean())


@pytest.mark.parametrize("name", loops)
def test_a_loop_is_followed(name: str, data: Data) -> None:
    def run(**settings: Any) -> tuple[Tensor, ...]:
        state.clear()
        torch.manual_seed(1)
        model = Net()
        with higher.innerloop_ctx(model, sgd(model), copy_initial_weights=False, **settings) as (fmodel, diffopt):
            for t in range(5):
                loops[name](fmodel, diffopt, data, t)
            outer = data.loss(fmodel(data.x))
        state.clear()
        return torch.autograd.grad(outer, [*model.parameters(), data.w])

    differences = assert_matches_unrolled(run, checkpoint_every=(2,), verify=("all",), rtol=1e-11)
    assert len(differences) == 2


@pytest.mark.parametrize("kind", ["dictionary", "list", "dataclass", "named tuple", "model output"])
def test_results_of_any_kind_are_followed(kind: str, data: Data) -> None:
    def read(result: Any) -> tuple[Tensor, Tensor]:
        if kind == "list":
            return result[0], result[1][0]
        return (result["out"], result["hidden"]) if kind == "dictionary" else (result.out, result.hidden)

    def run(**settings: Any) -> tuple[Tensor, ...]:
        torch.manual_seed(1)
        model = Net(kind)
        with higher.innerloop_ctx(model, sgd(model), copy_initial_weights=False, **settings) as (fmodel, diffopt):
            for _ in range(4):
                out, hidden = read(fmodel(data.x))
                diffopt.step(data.loss(out) + data.w * hidden.square().mean())
            outer = data.loss(read(fmodel(data.x))[0])
        return torch.autograd.grad(outer, [*model.parameters(), data.w])

    assert_matches_unrolled(run, checkpoint_every=(2,), verify=("all",), rtol=1e-11)


# What is kept, and what dies


def opened(every: int = 2) -> Any:
    model = Net()
    return higher.innerloop_ctx(model, sgd(model), copy_initial_weights=False, checkpoint_every=every)


def test_a_tensor_is_kept_for_as_long_as_its_readers_and_no_longer(data: Data) -> None:
    with opened():
        one = data.x * 2.0
        two = one + 1.0
        alive = weakref.ref(one)
        del one
        assert alive() is not None  # `two` may be needed, and is made from it
        del two
        assert alive() is None


def test_what_is_read_from_the_model_without_a_gradient_is_held_by_value(data: Data) -> None:
    with opened() as (fmodel, _):
        out = fmodel(data.x)
        value = out.detach() * 1.0
        alive = weakref.ref(out)
        del out
        assert alive() is None
        assert value.shape == (ROWS, 1)


def test_in_place_writes_do_not_keep_a_tensor_alive(data: Data) -> None:
    with opened() as (fmodel, _):
        out = fmodel(data.x)
        out += 1
        out[0] = 0.0
        part = out[2:4]
        part.mul_(data.w)
        alive = weakref.ref(out), weakref.ref(part)
        del out, part
        assert [reference() for reference in alive] == [None, None]


def test_a_step_lets_go_of_what_was_made_before_it(data: Data) -> None:
    with opened() as (fmodel, diffopt):
        big = data.x.repeat(10, 1)
        out = fmodel(big)
        loss = out.square().mean()
        alive = [weakref.ref(tensor) for tensor in (big, out, loss)]
        diffopt.step(loss)
        del big, out, loss
        assert [reference() for reference in alive] == [None] * 3


def test_a_step_lets_go_of_how_older_tensors_were_made(data: Data) -> None:
    """A loop that collects its batches or outputs keeps these, and not what they were made from."""
    with opened() as (fmodel, diffopt):
        kept = data.x.repeat(2, 1)
        wide = torch.cat([kept, kept], 1)
        alive = weakref.ref(kept)
        del kept
        assert alive() is not None
        diffopt.step(data.loss(fmodel(data.x)))
        assert alive() is None
        assert wide.shape == (2 * ROWS, 2 * FEATURES)


def test_a_recorder_that_nobody_uses_keeps_nothing(data: Data) -> None:
    with opened() as (fmodel, diffopt):
        diffopt.step(data.loss(fmodel(data.x)))
        kept = fmodel(data.x)
        kept += 1
        assert len(recorder()._made) > 0
    assert not recorder().active
    assert len(recorder()._made) == len(recorder()._written) == 0
    alive = weakref.ref(kept)
    del kept
    assert alive() is None


def test_nothing_is_recorded_outside_a_context(data: Data) -> None:
    with opened() as (fmodel, diffopt):
        diffopt.step(data.loss(fmodel(data.x)))
    made = data.x * 2
    assert recorder().link(made) == (None, None)
    assert len(recorder()._made) == 0


def test_long_recipes_without_a_gradient_are_cut(data: Data) -> None:
    """A thousand operations on a batch: the program repeats some of them at most, and starts from a value."""
    with live_bytes() as memory, opened() as (fmodel, diffopt):
        x, sizes = data.x, []
        for i in range(1000):
            x = x * 1.0001 + 0.001
            if i >= 900:
                sizes.append(memory.current)
        assert max(sizes) <= 80 * data.x.nbytes
        diffopt.step(data.loss(fmodel(x)))
        assert len(str(diffopt.program).splitlines()) <= 40
        fmodel(data.x).mean().backward()


def test_small_values_are_held_rather_than_made_again(data: Data) -> None:
    with opened() as (fmodel, diffopt):
        scale = torch.ones(3).mean().sqrt().exp()
        diffopt.step(data.loss(fmodel(data.x)) * scale)
        assert "exp" not in str(diffopt.program)


def test_a_buffer_that_the_loop_writes_into_is_held_by_value(data: Data) -> None:
    """A batch read from memory that is written again: the replay must not read what stands there later."""

    def run(**settings: Any) -> tuple[Tensor, ...]:
        torch.manual_seed(1)
        model, memory = Net(), torch.zeros(ROWS, FEATURES)
        with higher.innerloop_ctx(model, sgd(model), copy_initial_weights=False, **settings) as (fmodel, diffopt):
            for t in range(5):
                memory.copy_(data.x * (t + 1))
                diffopt.step(data.loss(fmodel(memory * 0.5)))
            outer = data.loss(fmodel(data.x))
        return torch.autograd.grad(outer, list(model.parameters()))

    assert_matches_unrolled(run, checkpoint_every=(2,), verify=("all",), rtol=1e-11)


@pytest.mark.parametrize("checkpoint_every", [1, 2, 10])
def test_a_buffer_that_the_model_reads_and_the_loop_writes_is_read_as_it_was(data: Data, checkpoint_every: int) -> None:
    """A replay buffer: what a step read of it is copied, since the next step writes there."""

    def gradient(memory: torch.Tensor | None) -> torch.Tensor:
        torch.manual_seed(0)  # the same model for both
        with opened(checkpoint_every) as (fmodel, diffopt):
            for t in range(3):
                batch = data.x * (t + 1)
                diffopt.step(data.loss(fmodel(batch if memory is None else memory.copy_(batch))))
            outer = data.loss(fmodel(data.x))
        return torch.autograd.grad(outer, fmodel.init_fast_params[0])[0]

    expected = gradient(None)
    assert expected.norm() > 0
    assert torch.equal(gradient(torch.zeros(ROWS, FEATURES)), expected)


def test_R9_a_hook_on_what_leads_to_the_loss_is_refused(data: Data) -> None:
    """A replay would not call it, at any step, also at one that is not compared."""
    with opened() as (fmodel, diffopt):
        for t in range(6):
            out = fmodel(data.x)
            if t == 4:
                out.register_hook(lambda grad: 3 * grad)
                with pytest.raises(higher.RecordError, match=r"register_hook.*diffopt\.step\(fn"):
                    diffopt.step(data.loss(out))
            else:
                diffopt.step(data.loss(out))


@pytest.mark.parametrize("name", ["vmap", "func.grad"])
def test_R9_function_transforms_in_the_glue_are_refused(name: str, data: Data) -> None:
    with opened() as (fmodel, diffopt):
        out = fmodel(data.x)
        if name == "vmap":
            loss = torch.vmap(lambda row: row.square().sum())(out).mean()
        else:
            loss = torch.func.grad(lambda z: z.pow(3).sum())(out).mean()
        with pytest.raises(higher.RecordError, match=r"torch\.func or vmap.*diffopt\.step\(inner_loss"):
            diffopt.step(loss)
        diffopt.step(data.loss(fmodel(data.x)))


# Windows: a step's program starts after the step before


def test_what_was_made_before_the_last_step_is_an_external(data: Data) -> None:
    with opened() as (fmodel, diffopt):
        diffopt.step(data.loss(fmodel(data.x)))
        early = data.x * 3.0
        first = fmodel(data.x)
        diffopt.step(data.loss(fmodel(data.x)))
        assert "mul" not in str(diffopt.program)
        late = data.x * 3.0
        diffopt.step(data.loss(fmodel(early + late)) + (first * fmodel(data.x)).mean())
        lines = str(diffopt.program).splitlines()
    assert sum("torch.Tensor.mul(" in line for line in lines) == 2  # `late`, and `first * ...`; not `early`
    assert sum("= fmodel(" in line for line in lines) == 2  # not `first`


def test_windows_of_two_contexts_do_not_disturb_each_other(data: Data) -> None:
    def run(**settings: Any) -> tuple[Tensor, ...]:
        torch.manual_seed(1)
        one, two = Net(), Net()
        with (
            higher.innerloop_ctx(one, sgd(one), copy_initial_weights=False, **settings) as (fone, opt_one),
            higher.innerloop_ctx(two, sgd(two), copy_initial_weights=False, **settings) as (ftwo, opt_two),
        ):
            for t in range(6):
                out_one, out_two = fone(data.x), ftwo(data.x)
                opt_one.step(data.loss(out_one) + (out_one - out_two).square().mean())
                if t % 3 == 0:  # out_two was made before the other's step
                    opt_two.step(data.loss(out_two) * data.w + (out_two - out_one.detach()).square().mean())
            outer = data.loss(fone(data.x)) + data.loss(ftwo(data.x))
        return torch.autograd.grad(outer, [*one.parameters(), *two.parameters(), data.w])

    assert_matches_unrolled(run, checkpoint_every=(1, 2), verify=("all",), rtol=1e-11)


# Programs


def programs_of(body: Body, data: Data, steps: int = 8) -> list[object]:
    state.clear()
    with opened(3) as (fmodel, diffopt):
        found = []
        for t in range(steps):
            body(fmodel, diffopt, data, t)
            found.append(diffopt.program)
    state.clear()
    return found


def test_steps_that_differ_in_values_share_one_program(data: Data) -> None:
    def body(fmodel: Any, diffopt: Any, data: Data, t: int) -> None:
        index = torch.randint(0, ROWS, (3 + t,))
        x = data.x[index] * (0.5 + t) + torch.randn(3 + t, FEATURES)
        diffopt.param_groups[0]["lr"] = 0.1 / (t + 1)
        loss = (fmodel(x[t % 2 :], scale=1.0 + t)).square().mean() * data.w
        diffopt.step(loss + fmodel(data.x[t : t + 2]).sum() * t)

    assert len({id(program) for program in programs_of(body, data)}) == 1


def test_a_function_made_anew_at_each_step_shares_one_program(data: Data) -> None:
    def body(fmodel: Any, diffopt: Any, data: Data, t: int) -> None:
        diffopt.step(lambda fmodel, scale: data.loss(fmodel(data.x)) * scale, 1.0 + t)

    assert len({id(program) for program in programs_of(body, data)}) == 1


def test_steps_that_differ_in_calls_have_their_own_program(data: Data) -> None:
    def body(fmodel: Any, diffopt: Any, data: Data, t: int) -> None:
        out = fmodel(data.x)
        diffopt.step(data.loss(out) if t % 2 else out.abs().mean())

    found = programs_of(body, data)
    assert len({id(program) for program in found}) == 2
    assert found[0] is found[2] is found[4]
    assert found[1] is found[3]


def test_switches_and_flags_are_part_of_a_program(data: Data) -> None:
    def body(fmodel: Any, diffopt: Any, data: Data, t: int) -> None:
        with torch.set_grad_enabled(t % 2 == 0):
            x = data.x * 2.0
        diffopt.step(fmodel(x).mean(0, keepdim=t % 4 < 2).sum())

    assert len({id(program) for program in programs_of(body, data)}) == 4


PRINTED: dict[str, tuple[Body, str]] = {}


def printed(text: str) -> Callable[[Body], Body]:
    def add(body: Body) -> Body:
        PRINTED[body.__name__] = body, textwrap.dedent(text).strip()
        return body

    return add


@printed("""
    def step_program(weights, externals, numbers):
        v0 = torch.Tensor.__getitem__(externals[0], externals[1])
        v1 = torch.Tensor.mul(v0, numbers[0])
        v2 = fmodel(v1, scale=numbers[1], extra={'shift': [externals[2]]})
        v3 = torch.nn.functional.mse_loss(v2, externals[3], reduction='mean')
        v4 = torch.Tensor.square(weights[0])
        v5 = torch.Tensor.sum(v4)
        v6 = torch.Tensor.mul(externals[2], v5)
        v7 = torch.Tensor.add(v3, v6)
        return v7
""")
def batch_by_index_and_weight_decay(fmodel: Any, diffopt: Any, data: Data, t: int) -> None:
    index = torch.arange(8)  # 64 bytes, as are the targets: held, not made again
    out = fmodel(data.x[index] * 2.0, scale=0.5, extra={"shift": [data.w]})
    loss = F.mse_loss(out, data.y[index])
    diffopt.step(loss + data.w * fmodel.body.weight.square().sum())


@printed("""
    def step_program(weights, externals, numbers):
        v0 = torch.Tensor.flip(externals[0], numbers[0])  # no_grad
        v1 = fmodel.body(v0)
        v2 = torch.tanh(v1)
        v3 = fmodel.head(v2)
        v4 = fmodel.body(externals[0])
        v5 = torch.cat([v3, v4], dim=numbers[1])
        v6 = torch.Tensor.mT.__get__(v5)
        v7 = torch.Tensor.mean(v6)
        return v7
""")
def submodules_and_a_view_made_without_gradients(fmodel: Any, diffopt: Any, data: Data, t: int) -> None:
    with torch.no_grad():
        x = data.x.flip(0)
    out = fmodel.head(torch.tanh(fmodel.body(x)))
    diffopt.step(torch.cat([out, fmodel.body(data.x)], dim=1).mT.mean())


@printed("""
    def step_program(weights, externals, numbers):
        v0 = inner_loss(externals[0], numbers[0], power=numbers[1])  # also reads externals[1]
        return v0
""")
def a_function_of_the_step(fmodel: Any, diffopt: Any, data: Data, t: int) -> None:
    def inner_loss(fmodel: Any, x: Tensor, scale: float, power: int) -> Tensor:
        return (fmodel(x) * scale).pow(power).mean() * data.w

    diffopt.step(inner_loss, data.x, 0.5, power=2)


@pytest.mark.parametrize("name", PRINTED)
def test_a_program_prints_as_readable_code(name: str, data: Data) -> None:
    body, text = PRINTED[name]
    for program in programs_of(body, data, 2):
        assert str(program) == text


def test_a_printed_program_says_which_result_is_meant(data: Data) -> None:
    """`v1 = torch.sort(v0)` and then `v1` alone would read as the pair of values and indices."""

    def body(fmodel: Any, diffopt: Any, data: Data, t: int) -> None:
        values, _ = torch.sort(fmodel(data.x).flatten())
        diffopt.step(values.exp().mean())

    lines = str(programs_of(body, data, 1)[0]).splitlines()
    sort = next(line for line in lines if "sort(" in line).split(" = ")[0].strip()
    exp = next(line for line in lines if ".exp(" in line)
    assert f"({sort}[0])" in exp


def test_a_printed_program_shows_writes_in_order(data: Data) -> None:
    """What was written into keeps its name, as in Python; `v1[-1]` would read as the last result of `v1`."""

    def body(fmodel: Any, diffopt: Any, data: Data, t: int) -> None:
        out = fmodel(data.x)
        out.mul_(2.0)
        diffopt.step(out.square().mean())

    text = str(programs_of(body, data, 1)[0])
    assert text.index("fmodel(") < text.index("mul_(") < text.index("square(")
    assert "[-1]" not in text


def test_there_is_no_program_before_the_first_step_nor_in_the_full_unroll(data: Data) -> None:
    with opened() as (fmodel, diffopt):
        assert diffopt.program is None
    model = Net()
    with higher.innerloop_ctx(model, sgd(model)) as (fmodel, diffopt):
        diffopt.step(data.loss(fmodel(data.x)))
        assert diffopt.program is None


# The parts


def test_tensor_map_follows_the_lives_of_its_tensors() -> None:
    entries: TensorMap[str] = TensorMap()
    one, two = torch.zeros(1), torch.zeros(1)  # equal in value: identity is what counts
    entries.set(one, "one")
    entries.set(two, "two")
    assert (entries.get(one), entries.get(two), len(entries)) == ("one", "two", 2)
    assert entries.get(torch.zeros(1)) is None
    entries.set(one, "again")
    assert (entries.get(one), len(entries)) == ("again", 2)
    del one
    assert len(entries) == 1
    entries.keep(lambda value: value != "two")
    assert entries.get(two) is None
    entries.set(two, "two")
    entries.pop(two)
    entries.pop(two)
    assert len(entries) == 0


def test_tensor_map_does_not_mistake_a_new_tensor_for_a_dead_one() -> None:
    """Addresses are used again: thousands of short lives at the same one."""
    entries: TensorMap[int] = TensorMap()
    for i in range(2000):
        tensor = torch.empty(0)
        assert entries.get(tensor) is None
        entries.set(tensor, i)
    del tensor
    assert len(entries) == 0


def test_tensor_map_is_freed_by_counting_references() -> None:
    class Value:
        pass

    entries: TensorMap[Value] = TensorMap()
    tensor, value = torch.zeros(1), Value()
    alive = weakref.ref(value)
    entries.set(tensor, value)
    del value
    assert alive() is not None
    entries.clear()
    assert alive() is None


def test_versions() -> None:
    tensor = torch.zeros(3)
    before = version_of(tensor)
    tensor[0] = 1
    assert version_of(tensor) > before
    with torch.inference_mode():
        assert version_of(torch.zeros(3)) == 0


def test_the_recorder_is_one_per_thread() -> None:
    assert recorder() is recorder()


# ------------------------------------------------------------------------------- views of tensors without a gradient


def write_into_a_view(x: Tensor, base: Tensor) -> Tensor:
    base[:2][0] = x[0]
    return base


def write_into_the_end(x: Tensor, base: Tensor) -> Tensor:
    base[2:][1] = x[0]
    return base


def write_into_a_view_of_what_was_changed(x: Tensor, base: Tensor) -> Tensor:
    top = base[:2]
    base.mul_(0.5)
    top[0] = x[0]
    return base + top.sum()


def read_an_older_view_after_the_write(x: Tensor, base: Tensor) -> Tensor:
    top, left = base[:2], base[:, :2]
    top[0] = x[0]
    return base + left.sum()


def write_through_two_views_in_turn(x: Tensor, base: Tensor) -> Tensor:
    rows, columns = base.view(-1).view(base.shape), base.t()
    columns[0] = x[:, 0]
    rows[1].add_(x[1])
    return base * 2


@pytest.mark.parametrize(
    "make",
    [
        write_into_a_view,
        write_into_the_end,
        write_into_a_view_of_what_was_changed,
        read_an_older_view_after_the_write,
        write_through_two_views_in_turn,
    ],
)
def test_a_view_that_is_given_a_gradient_is_followed_to_its_base(make: Callable[[Tensor, Tensor], Tensor]) -> None:
    start = torch.cos(torch.arange(12.0)).reshape(4, 3)

    def loop(**settings: Any) -> list[Tensor]:
        torch.manual_seed(0)
        net = nn.Linear(3, 3)
        opt = torch.optim.SGD(net.parameters(), lr=0.1)
        with higher.innerloop_ctx(net, opt, copy_initial_weights=False, **settings) as (fnet, diffopt):
            for _ in range(5):
                diffopt.step(make(fnet(start), start * 1.0).square().mean())
            outer = fnet(start).square().sum()
            return list(torch.autograd.grad(outer, list(net.parameters())))

    assert_matches_unrolled(loop, checkpoint_every=(1, 3))
