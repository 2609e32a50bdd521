"""`diffopt.scan`: the gradients of single steps, by traces in one node; what cannot be traced is a loop of steps."""

from __future__ import annotations

import shutil
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from loops import Loop, Run, gradients, mlp
from torch import Tensor, nn

import lowmem_higher
from lowmem_higher import CompileFallbackWarning, ExternalModifiedError, HistoryFreedError, ReplayMismatchError
from lowmem_higher.scan import Scan
from lowmem_higher.schedule import optimal_runs
from lowmem_higher.testing import live_bytes


@pytest.fixture
def scanned(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """How many steps each scan took by traces."""
    found: list[int] = []
    steps = Scan.steps

    def counted(self: Scan, *args: Any) -> Any:
        result = steps(self, *args)
        found.append(len(self.batches))
        return result

    monkeypatch.setattr(Scan, "steps", counted)
    return found


def compare(loop: Loop, count: int, /, **settings: Any) -> None:
    """With the full unroll."""
    torch.manual_seed(0)
    expected = gradients(loop, count, **expected_settings(settings))
    torch.manual_seed(0)
    found = gradients(loop, count, **{"checkpoint_every": 3, "compile": "trace", **settings})
    for name, gradient in expected.items():
        other = found[name]
        if gradient is None and "first_order" in settings:  # what acts through inner gradients only
            assert other is None
            continue
        assert gradient is not None
        assert other is not None
        assert gradient.norm() > 1e-7
        assert (gradient - other).norm() <= 1e-9 * gradient.norm(), name


def expected_settings(settings: dict[str, Any]) -> dict[str, Any]:
    """What changes the gradient, and not only how it is computed."""
    return {key: value for key, value in settings.items() if key == "first_order"}


def inner_loss(fmodel: Any, index: Tensor, x: Tensor, y: Tensor, logits: Tensor) -> Tensor:
    """Learned weights of examples, cut inside the function."""
    errors = (fmodel(x[index]) - y[index]).square().mean(1)
    return (torch.sigmoid(logits[index]) * errors).mean() + 0.01 * logits.square().sum() * errors.sum()


def tensors_of(run: Run) -> tuple[Tensor, Tensor, Tensor]:
    return run.data(12, 3), run.data(12, 1), run.leaf("logits", run.data(12))


def indices(steps: int, size: int = 5) -> list[Tensor]:
    return [(torch.arange(size) * 5 + 7 * step) % 12 for step in range(steps)]


OPTIMIZERS: dict[str, Any] = {
    "sgd": lambda p: torch.optim.SGD(p, lr=0.1),
    "momentum": lambda p: torch.optim.SGD(p, lr=0.1, momentum=0.8, nesterov=True, weight_decay=0.01),
    "adam": lambda p: torch.optim.Adam(p, lr=0.03, amsgrad=True),
    "adamw": lambda p: torch.optim.AdamW(p, lr=0.03),
    "rmsprop": lambda p: torch.optim.RMSprop(p, lr=0.03, momentum=0.5, centered=True),
    "adagrad": lambda p: torch.optim.Adagrad(p, lr=0.1),
    "groups": lambda p: torch.optim.SGD([{"params": p[:2]}, {"params": p[2:], "lr": 0.02}], lr=0.1, momentum=0.7),
}


def scan_with(kind: str) -> Loop:
    def loop(run: Run) -> Tensor:
        net = run.net(mlp())
        x, y, logits = tensors_of(run)
        rate = run.leaf("rate", 0.05)
        optimizer = OPTIMIZERS[kind](list(net.parameters()))
        with run.context(net, optimizer) as (fnet, diffopt):
            diffopt.param_groups[0]["lr"] = rate
            diffopt.scan(inner_loss, indices(run.steps), x, y, logits)
            return fnet(x).tanh().sum()

    return loop


@pytest.mark.parametrize("kind", OPTIMIZERS)
def test_a_scan_equals_the_full_unroll(kind: str, scanned: list[int]) -> None:
    compare(scan_with(kind), 8)
    assert scanned == [8]


SETTINGS: list[dict[str, Any]] = [
    {"checkpoint_every": 1},
    {"checkpoint_every": 50},
    {"checkpoint_every": None, "checkpoints": 1},
    {"checkpoint_every": None, "checkpoints": 2},
    {"checkpoint_every": None, "checkpoints": 3, "steps": 9},
    {"checkpoint_every": 4, "graphs": 2},
    {"store": "host"},
    {"verify": "all"},
    {"verify": "off"},
    {"first_order": True},
]


@pytest.mark.parametrize("settings", SETTINGS, ids=str)
def test_under_each_setting(settings: dict[str, Any], scanned: list[int]) -> None:
    loop = scan_with("adam" if "first_order" not in settings else "sgd")
    compare(loop, 9, **settings)
    assert scanned == [9]


def test_statistics_and_frozen_weights(scanned: list[int]) -> None:
    """BatchNorm's buffers are carried; weights that no step updates get the sum of what all steps give them."""

    def loop(run: Run) -> Tensor:
        net = run.net(nn.Sequential(nn.Linear(3, 4), nn.BatchNorm1d(4), nn.Tanh(), nn.Linear(4, 1)))
        x, y, logits = tensors_of(run)
        optimizer = torch.optim.SGD([*net[1].parameters(), *net[3].parameters()], lr=0.1, momentum=0.8)
        with run.context(net, optimizer) as (fnet, diffopt):
            diffopt.scan(inner_loss, indices(run.steps), x, y, logits)
            assert fnet[1].num_batches_tracked == run.steps
            fnet.eval()
            return fnet(x).tanh().sum()

    compare(loop, 7)
    assert scanned == [7]


def test_batches_of_several_shapes_and_structures(scanned: list[int]) -> None:
    def weighted(fmodel: Any, batch: dict[str, Any], logits: Tensor) -> Tensor:
        loss: Tensor = (
            batch["scale"] * (fmodel(batch["x"]).squeeze(1) * torch.sigmoid(logits[batch["at"]])).square().mean()
        )
        return loss

    def loop(run: Run) -> Tensor:
        net = run.net(mlp())
        x, _, logits = tensors_of(run)
        batches = [
            {"x": x[i], "at": i, "scale": 0.5 + step % 2}
            for step, i in enumerate([*indices(run.steps - 1), *indices(1, 2)])
        ]
        with run.context(net, OPTIMIZERS["momentum"](list(net.parameters()))) as (fnet, diffopt):
            diffopt.scan(weighted, batches, logits)
            return fnet(x).tanh().sum()

    compare(loop, 7)
    assert scanned == [7]


def test_among_single_steps_and_outer_terms(scanned: list[int]) -> None:
    def loop(run: Run) -> Tensor:
        net = run.net(mlp())
        x, y, logits = tensors_of(run)
        total = torch.zeros(())
        with run.context(net, OPTIMIZERS["adam"](list(net.parameters()))) as (fnet, diffopt):
            for _ in range(2):
                diffopt.step(inner_loss(fnet, torch.arange(4), x, y, logits))
                diffopt.scan(inner_loss, indices(run.steps), x, y, logits)
                total = total + diffopt.outer(fnet(x).square().mean())
                diffopt.scan(inner_loss, indices(2, 3), x, y, logits)
            diffopt.step(inner_loss(fnet, torch.arange(3), x, y, logits))
        diffopt.scan(inner_loss, indices(3), x, y, logits)  # after the context was left
        return total + fnet(x).tanh().sum()

    compare(loop, 5)
    compare(loop, 5, checkpoint_every=None, checkpoints=2)
    assert scanned == [5, 2, 5, 2, 3] * 2


def test_the_weights_after_a_scan_have_a_time_and_those_inside_do_not() -> None:
    def loop(run: Run) -> Tensor:
        net = run.net(mlp())
        x, y, logits = tensors_of(run)
        with run.context(net, OPTIMIZERS["momentum"](list(net.parameters()))) as (fnet, diffopt):
            diffopt.scan(inner_loss, indices(run.steps), x, y, logits)
            for t in range(3):
                diffopt.step(inner_loss(fnet, torch.arange(3 + t), x, y, logits))
            after = list(fnet.parameters(time=run.steps))
            if fnet._view.caller is not None:
                with pytest.raises(HistoryFreedError, match="inside a scan"):
                    fnet.parameters(time=2)
            before = sum(weight.square().sum() for weight in fnet.parameters(time=0))
            return before + sum(weight.pow(3).sum() for weight in after) + fnet(x).tanh().sum()

    compare(loop, 5)


@pytest.mark.parametrize("settings", [{"checkpoint_every": 3}, {"checkpoints": 2}], ids=str)
def test_a_second_backward_and_no_second_derivative(settings: dict[str, Any]) -> None:
    torch.manual_seed(0)
    run = Run(9, compile="trace", **settings)
    outer = scan_with("adam")(run)
    leaves = list(run.inputs.values())
    first = torch.autograd.grad(outer, leaves, retain_graph=True)
    second = torch.autograd.grad(outer, leaves, retain_graph=True)
    assert all(map(torch.equal, first, second))
    with pytest.raises(lowmem_higher.HigherOrderError):
        torch.autograd.grad(outer, leaves, create_graph=True)


def opened(count: int, /, **settings: Any) -> tuple[Any, ...]:
    torch.manual_seed(0)
    net = mlp()
    x, y, logits = torch.randn(12, 3), torch.randn(12, 1), torch.randn(12, requires_grad=True)
    optimizer = torch.optim.SGD(net.parameters(), lr=0.1, momentum=0.8)
    keywords = {"copy_initial_weights": False, "compile": "trace", **settings}
    return net, x, y, logits, indices(count), lowmem_higher.innerloop_ctx(net, optimizer, **keywords)


def test_passes_are_those_of_single_steps() -> None:
    for settings, runs in (
        ({"checkpoint_every": 4}, 30 + 30 - 8),
        ({"checkpoints": 3, "steps": 30}, optimal_runs(30, 3)),
    ):
        _, x, y, logits, batches, context = opened(30, **settings)
        with context as (fnet, diffopt):
            diffopt.scan(inner_loss, batches, x, y, logits)
            assert diffopt.report.first_order_runs == diffopt.report.steps == 30
            fnet(x).sum().backward()
        assert (diffopt.report.first_order_runs, diffopt.report.second_order_runs) == (runs, 30)


def test_the_time_spent_tracing_is_reported_where_it_is_spent() -> None:
    found = []
    net, batches = mlp().double(), [torch.randn(4, 3, dtype=torch.float64) for _ in range(4)]
    for _ in range(2):
        opt = torch.optim.SGD(net.parameters(), lr=0.1)
        context = lowmem_higher.innerloop_ctx(net, opt, copy_initial_weights=False, checkpoint_every=2, compile="trace")
        with context as (fnet, diffopt):
            diffopt.scan(lambda fnet, x: fnet(x).square().mean(), batches)
            in_loop = diffopt.report.compile_seconds
            fnet(batches[0]).sum().backward()
        found.append((in_loop, diffopt.report.compile_seconds - in_loop))
    (loop, backward), again = found
    assert loop > 0.0 < backward
    assert again == (0.0, 0.0)  # the traces are those of the model


def test_memory_does_not_grow_and_is_freed() -> None:
    peaks = {}
    for steps in (20, 200):
        with live_bytes() as memory:
            net, x, y, logits, batches, context = opened(steps, checkpoints=3)
            own = memory.current
            with context as (fnet, diffopt):
                diffopt.scan(inner_loss, batches, x, y, logits)
                outer = fnet(x).sum()
            gradients = torch.autograd.grad(outer, [*net.parameters(), logits])
            peaks[steps] = memory.peak - own
            held = sum(gradient.nbytes for gradient in gradients) + 2 * diffopt.report.carry_bytes
            del outer
            assert memory.current - own <= held  # the current weights and state
            del fnet, diffopt, context, gradients
            assert memory.current == own
    assert peaks[200] <= 1.02 * peaks[20]


class Lazy:
    """Batches that are made when they are asked for."""

    def __init__(self, count: int) -> None:
        self.count, self.asked, self.shift = count, 0, 0

    def __len__(self) -> int:
        return self.count

    def __getitem__(self, index: int) -> Tensor:
        self.asked += 1
        return (torch.arange(5) * 5 + 7 * index + self.shift) % 12


def test_batches_are_read_again() -> None:
    _, x, y, logits, _, context = opened(0, checkpoint_every=3)
    batches = Lazy(7)
    with context as (fnet, diffopt):
        diffopt.scan(inner_loss, batches, x, y, logits)
        assert batches.asked == 7
        fnet(x).sum().backward()
    assert batches.asked == 7 + 4 + 7


def test_R10_a_batch_that_is_another_one_raises() -> None:
    _, x, y, logits, _, context = opened(0, checkpoint_every=3)
    batches = Lazy(7)
    with context as (fnet, diffopt):
        diffopt.scan(inner_loss, batches, x, y, logits)
        batches.shift = 1
        with pytest.raises(ReplayMismatchError, match=r"batches\[\d\] be the same when it is read again"):
            fnet(x).sum().backward()


@pytest.mark.parametrize("which", ["batch", "argument"])
def test_R4_a_tensor_that_was_modified_raises(which: str) -> None:
    _, x, y, logits, batches, context = opened(7, checkpoint_every=3)
    with context as (fnet, diffopt):
        diffopt.scan(inner_loss, batches, x, y, logits)
        (batches[2] if which == "batch" else y).add_(1)
        with pytest.raises(ExternalModifiedError, match="modified in place"):
            fnet(x).sum().backward()


def test_R10_a_function_that_reads_what_changes_raises() -> None:
    calls = []

    def changing(fmodel: Any, index: Tensor, x: Tensor, y: Tensor, logits: Tensor) -> Tensor:
        calls.append(0)
        return inner_loss(fmodel, index, x, y, logits) * (1 + len(calls) % 3)

    _, x, y, logits, batches, context = opened(20, checkpoint_every=3)
    with context as (_, diffopt), pytest.raises(ReplayMismatchError, match="reads something in Python that changes"):
        diffopt.scan(changing, batches, x, y, logits)


def test_a_number_that_differs_in_the_next_context_is_another_function(scanned: list[int]) -> None:
    """Traces are shared by the contexts of a model: what was baked in is compared."""
    net, x = mlp().double(), torch.randn(6, 3, dtype=torch.float64)

    def gradient(scale: float, **settings: Any) -> Tensor:
        def scaled(fmodel: Any, batch: Tensor) -> Tensor:
            return scale * fmodel(batch).square().mean()

        rate = torch.tensor(0.1, dtype=torch.float64, requires_grad=True)
        optimizer = torch.optim.SGD(net.parameters(), lr=0.1)
        with lowmem_higher.innerloop_ctx(net, optimizer, override={"lr": [rate]}, **settings) as (fnet, diffopt):
            diffopt.scan(scaled, [x] * 6)
            return torch.autograd.grad(fnet(x).sum(), rate)[0]

    for scale in (1.0, 2.0, 1.0):
        assert torch.allclose(gradient(scale, checkpoint_every=3, compile="trace"), gradient(scale), rtol=1e-9)
    assert scanned == [6] * 3


class Scaled(nn.Module):
    """Reads a plain attribute."""

    def __init__(self) -> None:
        super().__init__()
        self.layer, self.scale = nn.Linear(3, 1), 1.0

    def forward(self, x: Tensor) -> Tensor:
        return torch.tanh(self.layer(x) * self.scale)


def test_an_attribute_or_a_step_count_that_differs_in_the_next_context(scanned: list[int]) -> None:
    torch.manual_seed(0)
    net, x = Scaled().double(), torch.randn(6, 3, dtype=torch.float64)

    def gradient(count: int, **settings: Any) -> Tensor:
        optimizer, rate = torch.optim.Adam(net.parameters()), torch.tensor(0.1, dtype=torch.float64, requires_grad=True)
        with lowmem_higher.innerloop_ctx(net, optimizer, override={"lr": [rate]}, **settings) as (fnet, diffopt):
            diffopt.step(fnet(x).square().mean())
            diffopt.state[0][1]["step"] = count  # of the bias, 1 of the weight
            diffopt.scan(lambda fmodel, batch: fmodel(batch).square().mean(), [x] * 4)
            return torch.autograd.grad(fnet(x).sum(), rate)[0]

    for scale, count in ((1.0, 1), (1.0, 5), (2.0, 5), (2.0, 1)):
        net.scale = scale
        found = gradient(count, checkpoint_every=3, compile="trace", verify="off")
        assert torch.allclose(found, gradient(count), rtol=1e-9)
    assert scanned == [4] * 4


# What cannot be traced is a loop of single steps


def draws(run: Run) -> Tensor:
    net = run.net(nn.Sequential(nn.Linear(3, 8), nn.Dropout(0.3), nn.Tanh(), nn.Linear(8, 1)))
    x, y, logits = tensors_of(run)
    with run.context(net, OPTIMIZERS["momentum"](list(net.parameters()))) as (fnet, diffopt):
        diffopt.scan(inner_loss, indices(run.steps), x, y, logits)
        return fnet(x).tanh().sum()


def closes_over_tensors(run: Run) -> Tensor:
    net = run.net(mlp())
    x, y, logits = tensors_of(run)
    with run.context(net, OPTIMIZERS["momentum"](list(net.parameters()))) as (fnet, diffopt):
        diffopt.scan(lambda fmodel, index: inner_loss(fmodel, index, x, y, logits), indices(run.steps))
        return fnet(x).tanh().sum()


def learned_batches(run: Run) -> Tensor:
    net = run.net(mlp())
    batches = [run.leaf(f"batch {step}", run.data(4, 3)) for step in range(run.steps)]
    x = run.data(12, 3)
    with run.context(net, OPTIMIZERS["momentum"](list(net.parameters()))) as (fnet, diffopt):
        diffopt.scan(lambda fmodel, batch: fmodel(batch).square().mean() + batch.sum() * 0.1, batches)
        return fnet(x).tanh().sum()


def branches(run: Run) -> Tensor:
    def by_value(fmodel: Any, index: Tensor, x: Tensor, y: Tensor, logits: Tensor) -> Tensor:
        loss = inner_loss(fmodel, index, x, y, logits)
        return loss if loss > 0.5 else 2 * loss

    net = run.net(mlp())
    x, y, logits = tensors_of(run)
    with run.context(net, OPTIMIZERS["momentum"](list(net.parameters()))) as (fnet, diffopt):
        diffopt.scan(by_value, indices(run.steps), x, y, logits)
        return fnet(x).tanh().sum()


def late(run: Run) -> Tensor:
    """What rules a trace out comes with the fourth batch: the steps before it are taken again."""
    net = run.net(mlp())
    batches = [run.data(4, 3), run.data(4, 3), run.data(4, 3), run.leaf("batch", run.data(4, 3)), run.data(4, 3)]
    x = run.data(12, 3)
    with run.context(net, OPTIMIZERS["adam"](list(net.parameters()))) as (fnet, diffopt):
        diffopt.scan(lambda fmodel, batch: fmodel(batch).square().mean(), batches)
        assert diffopt.report.steps == 5
        return fnet(x).tanh().sum()


class Annealed(nn.Module):
    """Counts its calls in an attribute that the next call reads."""

    def __init__(self) -> None:
        super().__init__()
        self.layer, self.calls = nn.Linear(3, 1), 0

    def forward(self, x: Tensor) -> Tensor:
        self.calls += 1
        return torch.tanh(self.layer(x) / self.calls)


class Remembering(nn.Module):
    """Leaves a tensor on itself that the next call reads."""

    def __init__(self) -> None:
        super().__init__()
        self.layer, self.last = nn.Linear(3, 1), None

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = torch.tanh(self.layer(x))
        found = out if self.last is None else out + self.last
        self.last = out.detach()
        return found


def changes_itself(kind: type[nn.Module]) -> Loop:
    def loop(run: Run) -> Tensor:
        net = run.net(kind())
        x = run.data(4, 3)
        with run.context(net, OPTIMIZERS["momentum"](list(net.parameters()))) as (fnet, diffopt):
            diffopt.scan(lambda fmodel, batch: fmodel(batch).square().mean(), [x] * run.steps)
            return sum(weight.tanh().sum() for weight in fnet.parameters())

    return loop


annealed, remembering = changes_itself(Annealed), changes_itself(Remembering)


def near_the_start(run: Run) -> Tensor:
    """The initial weights are an argument as well, and get gradients both ways."""

    def proximal(fmodel: Any, batch: Tensor, start: list[Tensor]) -> Tensor:
        apart = sum((now - then).square().sum() for now, then in zip(fmodel.parameters(), start, strict=True))
        return fmodel(batch).square().mean() + 0.1 * apart

    net = run.net(mlp())
    batches = [run.data(4, 3) for _ in range(run.steps)]
    with run.context(net, OPTIMIZERS["adam"](list(net.parameters()))) as (fnet, diffopt):
        diffopt.scan(proximal, batches, list(fnet.parameters(time=0)))
        return fnet(batches[0]).tanh().sum()


def test_the_initial_weights_may_be_an_argument(scanned: list[int]) -> None:
    compare(near_the_start, 6)
    assert scanned == [6]


@pytest.mark.parametrize("loop", [annealed, remembering, draws, closes_over_tensors, learned_batches, branches, late])
def test_what_cannot_be_traced_is_a_loop_of_steps(loop: Loop, scanned: list[int]) -> None:
    with pytest.warns(CompileFallbackWarning, match="A scan is run as a loop of steps, since") as caught:
        compare(loop, 6)
    assert scanned == []
    assert {warning.filename for warning in caught} == {__file__}


@pytest.mark.parametrize("settings", [{"checkpoint_every": 3, "truncate": 4}, {"checkpoint_every": 3, "journal": True}])
def test_settings_that_are_for_single_steps(settings: dict[str, Any], scanned: list[int]) -> None:
    _, x, y, logits, batches, context = opened(6, **settings)
    with context as (_, diffopt), pytest.warns(CompileFallbackWarning, match="truncate and journal"):
        diffopt.scan(inner_loss, batches, x, y, logits)
    assert (scanned, diffopt.report.steps) == ([], 6)


def test_a_diverged_loop_raises_and_changes_nothing() -> None:
    _, x, y, logits, batches, context = opened(6, checkpoint_every=3)
    with context as (fnet, diffopt):
        weights = list(fnet.parameters())
        with pytest.raises(ValueError, match="The loss of step 0 of a scan is inf"):
            diffopt.scan(inner_loss, batches, x, y * 1e200, logits)
        assert all(one is other for one, other in zip(weights, fnet.parameters(), strict=True))
        assert (diffopt.state, diffopt.report.steps) == ([{}], 0)


def test_a_scan_inside_a_step_is_refused() -> None:
    _, x, y, logits, batches, context = opened(3, checkpoint_every=3)

    def nested(fmodel: Any) -> Tensor:
        diffopt.scan(inner_loss, batches, x, y, logits)
        return inner_loss(fmodel, batches[0], x, y, logits)

    with context as (_, diffopt), pytest.raises(lowmem_higher.RecordError, match="inside a function that the engine"):
        diffopt.step(nested)


def test_R9_a_submodule_that_was_replaced_inside_the_context_raises() -> None:
    _, x, y, logits, batches, context = opened(3, checkpoint_every=3)
    with context as (fnet, diffopt):
        fnet[1] = nn.ReLU()
        with pytest.raises(lowmem_higher.RecordError, match="A submodule was added, replaced or removed"):
            diffopt.scan(inner_loss, batches, x, y, logits)


def test_no_batches_no_steps() -> None:
    _, x, y, logits, _, context = opened(0, checkpoint_every=3)
    with context as (fnet, diffopt):
        assert diffopt.scan(inner_loss, [], x, y, logits) == list(fnet.parameters())


@pytest.mark.slow
@pytest.mark.skipif(shutil.which("c++") is None, reason="torch's inductor needs a C++ compiler on a CPU")
def test_a_compiled_scan_equals_the_full_unroll(scanned: list[int]) -> None:
    compare(scan_with("adam"), 9, compile=True)
    assert scanned == [9]


def test_float32_nets_with_branches_are_not_refused(scanned: list[int]) -> None:
    """A rounding error of compiled or traced code may flip a ReLU: compared by how far the last bit of inputs goes."""
    torch.manual_seed(0)
    net = nn.Sequential(
        nn.Conv2d(1, 8, 3), nn.BatchNorm2d(8), nn.ReLU(), nn.MaxPool2d(2), nn.Flatten(), nn.LazyLinear(3)
    )
    net(torch.randn(1, 1, 8, 8))
    net.float()
    optimizer = torch.optim.Adam(net.parameters(), lr=0.01)
    batches = [(torch.randn(6, 1, 8, 8).float(), torch.randint(3, (6,))) for _ in range(8)]
    with lowmem_higher.innerloop_ctx(
        net, optimizer, copy_initial_weights=False, checkpoint_every=3, compile="trace", verify="all"
    ) as (fnet, diffopt):
        diffopt.scan(lambda fmodel, batch: F.cross_entropy(fmodel(batch[0]), batch[1]), batches)
        F.cross_entropy(fnet(batches[0][0]), batches[0][1]).backward()
    assert scanned == [8]
