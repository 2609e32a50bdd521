"""`metagradient`: the function form of a loop gives what the loop gives, with and without files, to the bit."""

from __future__ import annotations

import copy
import gc
import weakref
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from survivor import CUT, Problem, bits, same
from torch import Tensor, nn

import lowmem_higher as higher
from lowmem_higher import pieces, resumable
from lowmem_higher.scan import Scan
from lowmem_higher.schedule import optimal_runs
from lowmem_higher.testing import live_bytes, taylor_test

X = torch.sin(torch.arange(144, dtype=torch.float64)).reshape(6, 8, 3)
Y = torch.cos(3 * torch.arange(48, dtype=torch.float64)).reshape(6, 8, 1)


@pytest.fixture
def cut(monkeypatch: pytest.MonkeyPatch) -> None:
    """Many small pieces."""
    for name, value in {**CUT, "SAVE_SECONDS": 60.0}.items():
        monkeypatch.setattr(resumable, name, value)
    monkeypatch.setattr(pieces, "WAY_STEPS", 4)


def free_form(problem: Problem, count: int, **settings: Any) -> list[Tensor]:
    """The same loop in plain Python."""
    torch.manual_seed(5)
    meta = (problem.weights, problem.rate)
    with higher.innerloop_ctx(problem.net, problem.opt, override={"lr": [problem.rate]}, **settings) as (fnet, diffopt):
        initial = {name: weight for name, weight in fnet.named_parameters() if weight.requires_grad}
        total = diffopt.outer(problem.outer(fnet))
        for step in range(count):
            diffopt.step(problem.loss(fnet, problem.batches(step), *meta))
            if step + 1 == count // 2:
                total = total + diffopt.outer(problem.outer(fnet))
        total = total + problem.outer(fnet)
        found = torch.autograd.grad(total, [*initial.values(), *meta])
    weights, buffers = dict(fnet.named_parameters()), dict(fnet.named_buffers())
    grads = dict(zip(initial, found, strict=False))
    return bits(higher.MetaGradient(total.detach(), grads, found[len(initial) :], weights, buffers, diffopt.report))


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
@pytest.mark.parametrize("optimizer", ["sgd", "adam"])
def test_the_free_form_loop_and_files_give_the_same_bits(
    optimizer: str, dtype: torch.dtype, tmp_path: Path, cut: None
) -> None:
    expected = free_form(Problem(optimizer, dtype), 23, checkpoints=3, steps=23)
    assert all(tensor.isfinite().all() for tensor in expected)
    assert same(Problem(optimizer, dtype).run(23, checkpoints=3), expected)
    assert same(Problem(optimizer, dtype).run(23, tmp_path / "run", checkpoints=3), expected)
    assert not (tmp_path / "run").exists()


SETTINGS: list[dict[str, Any]] = [
    {"checkpoints": 1},
    {"checkpoints": 4, "graphs": 2},
    {"checkpoint_every": 7},
    {"checkpoint_every": 7, "graphs": 3},
    {"checkpoints": 3, "first_order": True},
    {"checkpoints": 3, "journal": True},
    {"checkpoints": 3, "verify": "off"},
    {"checkpoints": 3, "store": "host"},
    {"checkpoint_every": 3, "truncate": 10},
    {"checkpoint_every": 3, "truncate": 40},
    {"checkpoint_every": 5, "replay": "torch"},
    {"checkpoints": 3, "pullback": "mixed"},
    {},
]


@pytest.mark.parametrize("settings", SETTINGS, ids=lambda settings: "-".join(map(str, settings.values())) or "default")
def test_with_files_every_setting_gives_the_same_bits(settings: dict[str, Any], tmp_path: Path, cut: None) -> None:
    problem = Problem("sgd")
    if settings.get("truncate", 20) < 20:
        settings = {**settings, "outer": problem.outer}
    expected = problem.run(20, **settings)
    assert same(problem.run(20, tmp_path / "run", **settings), expected)


def test_against_the_full_unroll(tmp_path: Path, cut: None) -> None:
    whole = Problem("adam").run(20, checkpoint_every=None)
    pieced = Problem("adam").run(20, tmp_path / "run", checkpoints=2)
    for one, other in zip(whole, pieced, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-9, atol=1e-12)


def test_against_finite_differences(tmp_path: Path, cut: None) -> None:
    problem = Problem("adam")
    problem.net.drop.p = 0.0

    def outer(weights: Tensor) -> Tensor:
        torch.manual_seed(5)
        given = {**problem.arguments(9, checkpoints=2), "meta": (weights, problem.rate)}
        found = higher.metagradient(
            problem.loss, problem.net, problem.opt, problem.batches, run_dir=tmp_path / "run", **given
        )
        return Connected.apply(weights, found.outer, found.meta[0])

    taylor_test(outer, problem.weights.detach() + 0.1)


class Connected(torch.autograd.Function):
    """A value with a gradient that was found elsewhere."""

    @staticmethod
    def forward(ctx: Any, point: Tensor, value: Tensor, grad: Tensor) -> Tensor:
        ctx.save_for_backward(grad)
        return value.clone()

    @staticmethod
    def backward(ctx: Any, cotangent: Tensor) -> tuple[Tensor, None, None]:
        return cotangent * ctx.saved_tensors[0], None, None


# ------------------------------------------------------------------------------------------------ traced steps


class Traceable(Problem):
    """Without random draws, and with what a batch holds as tensors."""

    def __init__(self, optimizer: str = "adam") -> None:
        super().__init__(optimizer)
        self.net.drop = nn.Dropout(0.0).eval()
        self.alive, self.most = weakref.WeakSet[Tensor](), 0

    def batches(self, step: int) -> tuple[Any, Tensor, Tensor]:
        self.reads += 1
        self.at_read(self.reads)
        x = self.x[step % 12] + 0.0
        self.alive.add(x)
        self.most = max(self.most, len(self.alive))
        return torch.tensor([step % 12]), x, self.y[step % 12]


@pytest.fixture
def scanned(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """How many steps went by traces, scan by scan."""
    found: list[int] = []
    steps = Scan.steps

    def counted(self: Scan, *args: Any) -> Any:
        result = steps(self, *args)
        found.append(len(self.batches))
        return result

    monkeypatch.setattr(Scan, "steps", counted)
    return found


@pytest.mark.parametrize(
    ("optimizer", "settings"),
    [
        ("adam", {"compile": "trace"}),
        ("sgd", {"compile": "trace", "checkpoint_every": 3, "checkpoints": None}),
    ],
    ids=str,
)
def test_compiled_steps_go_by_scans_from_term_to_term(
    optimizer: str, settings: dict[str, Any], scanned: list[int]
) -> None:
    expected = free_form(Traceable(optimizer), 17, checkpoint_every=None)
    problem = Traceable(optimizer)
    found = problem.run(17, **{"checkpoints": 3, **settings})
    assert scanned == [8, 9]
    assert problem.most <= 2
    for one, other in zip(found, expected, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-9, atol=1e-12)


def test_compiled_with_named_meta_and_a_list(scanned: list[int]) -> None:
    def loss(fnet: Any, batch: Any, scale: Tensor, idle: Tensor) -> Tensor:
        return plain_loss(fnet, batch, scale)

    def named(**settings: Any) -> list[Tensor]:
        torch.manual_seed(0)
        meta = {"scale": torch.tensor(0.3, dtype=torch.float64, requires_grad=True), "idle": tensor_of(1.0)}
        return bits(call(loss_fn=loss, meta=meta, outer={2: plain_outer}, **settings))

    assert same(named(compile="trace", checkpoints=2), named(checkpoints=2))
    assert scanned == [2, 4]


def test_a_callback_goes_step_by_step_under_compile(scanned: list[int]) -> None:
    clipped = {"grad_callback": higher.clip_grad_norm(0.1), "checkpoints": 2}
    expected = Traceable("sgd").run(12, **clipped)
    with pytest.warns(higher.CompileFallbackWarning, match="loop of steps, since it has a grad_callback"):
        assert same(Traceable("sgd").run(12, compile="trace", **clipped), expected)
    assert not same(Traceable("sgd").run(12, checkpoints=2), expected)
    assert scanned == []


def test_draws_of_a_batch_or_of_the_model_go_step_by_step(scanned: list[int]) -> None:
    for problem, reason in ((Problem("sgd"), "a batch draws"), (Traceable("sgd"), "it draws")):
        if isinstance(problem, Traceable):
            problem.net.drop = nn.Dropout(0.2)
        expected = problem.run(12, checkpoints=2)
        with pytest.warns(higher.CompileFallbackWarning, match=f"loop of steps, since .*{reason}"):
            assert same(problem.run(12, checkpoints=2, compile="trace"), expected)
    assert scanned == []


def test_a_changed_batch_is_noticed_in_a_scan(scanned: list[int]) -> None:
    problem = Traceable("sgd")
    x = problem.x

    def change(read: int) -> None:
        if read == 23:
            problem.x = x + 1e-12

    problem.at_read = change
    with pytest.raises(higher.ReplayMismatchError, match=r"The batch of step \d+ is not what it was"):
        problem.run(20, checkpoints=2, compile="trace")
    assert scanned == [10, 10]


def test_an_error_in_a_scan_says_from_where_steps_are_counted() -> None:
    problem = Traceable("sgd")

    def loss(fnet: Any, batch: Any, weights: Tensor, rate: Tensor) -> Tensor:
        return Problem.loss(problem, fnet, batch, weights, rate) / (1 - (batch[0] == 8).double())

    problem.loss = loss  # type: ignore[method-assign]
    with pytest.raises(ValueError, match="The loss of step 2 of a scan") as caught:
        problem.run(12, checkpoints=2, compile="trace")
    assert "the scan begins at step 6" in caught.value.__notes__[0]


# ------------------------------------------------------------------------------------------------ what goes in and out


def plain_loss(fnet: Any, batch: Any, *meta: Tensor, **named: Tensor) -> Tensor:
    x, y = batch
    weight = sum(tensor.sum() for tensor in (*meta, *named.values()))
    return ((1 + weight) * (fnet(x) - y).square()).mean()


def plain_outer(fnet: Any) -> Tensor:
    return (fnet(X[0]) - Y[0]).square().mean()


def line() -> tuple[nn.Module, torch.optim.Optimizer]:
    net = nn.Linear(3, 1).double()
    return net, torch.optim.SGD(net.parameters(), lr=0.1)


def call(**changes: Any) -> higher.MetaGradient:
    net, opt = line()
    given: dict[str, Any] = {
        "steps": 6,
        "outer": plain_outer,
        "batches": list(zip(X, Y, strict=True)),
        "loss_fn": plain_loss,
    }
    given |= changes
    return higher.metagradient(given.pop("loss_fn"), net, opt, given.pop("batches"), **given)


@pytest.mark.parametrize("files", [False, True])
def test_meta_comes_back_in_its_form(files: bool, tmp_path: Path) -> None:
    one, idle = torch.zeros(2, dtype=torch.float64, requires_grad=True), torch.zeros(3, requires_grad=True)
    run_dir = tmp_path / "run" if files else None

    def loss(fnet: Any, batch: Any, override: Tensor, idle: Tensor) -> Tensor:
        return plain_loss(fnet, batch, override)

    named = call(meta={"override": one, "idle": idle}, loss_fn=loss, run_dir=run_dir)
    assert isinstance(named.meta, dict)
    assert list(named.meta) == ["override", "idle"]
    assert named.meta["idle"] is None
    listed = call(meta=[one], run_dir=run_dir)
    assert isinstance(listed.meta, tuple)
    assert listed.meta[0] is not None
    assert listed.meta[0].norm() > 0
    assert call(run_dir=run_dir).meta == ()
    assert list(named.weights) == list(named.final_weights) == ["weight", "bias"]
    text = repr(named)
    assert "meta['override']: shape (2,), norm" in text
    assert "meta['idle']: none" in text
    assert "6 steps" in text


def test_batches_may_be_a_tensor_a_list_or_a_function() -> None:
    def loss(fnet: Any, x: Tensor) -> Tensor:
        return fnet(x).square().mean()

    torch.manual_seed(1)
    found = []
    for batches in (X, list(X), X.__getitem__):
        torch.manual_seed(1)
        found.append(bits(call(batches=batches, loss_fn=loss)))
    assert same(found[0], found[1])
    assert same(found[0], found[2])


def tensor_of(*values: float, grad: bool = True) -> Tensor:
    return torch.tensor(values, requires_grad=grad)


@pytest.mark.parametrize(
    ("changes", "error", "message"),
    [
        ({"loss_fn": 3}, TypeError, "loss_fn is a int"),
        ({"steps": 2.0}, TypeError, "whole number of inner steps"),
        ({"steps": 0}, ValueError, "must be at least 1"),
        ({"batches": iter([])}, TypeError, r"list\(loader\)"),
        ({"steps": 7}, ValueError, r"6 batches for steps=7.*batches\[t % len\(batches\)\]"),
        ({"outer": None}, TypeError, "outer must be a function"),
        ({"outer": {}}, TypeError, "outer must be a function"),
        ({"outer": {7: plain_outer}}, ValueError, "after 7 steps"),
        ({"outer": lambda fnet: 3.0}, TypeError, "returned float"),
        ({"outer": lambda fnet: fnet(X[0])}, ValueError, "scalar"),
        ({"outer": lambda fnet: X.sum()}, ValueError, "depends on no fast weight"),
        ({"outer": lambda fnet: fnet(X[0]).sum() * torch.inf}, ValueError, "outer loss is"),
        ({"outer": lambda fnet: fnet.update_params([w * 1 for w in fnet.parameters()]) or plain_outer(fnet)},
         higher.RecordError, "changed the fast weights"),
        ({"meta": tensor_of(1.0)}, TypeError, r"meta=\(w,\)"),
        ({"meta": [3.0]}, TypeError, r"meta\[0\] is a float"),
        ({"meta": {"w": tensor_of(1.0, grad=False)}}, ValueError, r"meta\['w'\] does not require grad"),
        ({"meta": [tensor_of(1.0) * 2]}, ValueError, "computed from other tensors"),
        ({"meta": [X.requires_grad_(False)]}, ValueError, "does not require grad"),
        ({"copy_initial_weights": False}, TypeError, "takes no copy_initial_weights"),
        ({"checkpoint": 3}, TypeError, "takes no 'checkpoint'.*checkpoints"),
        ({"checkpoints": 3, "checkpoint_every": 2}, ValueError, "Give one of them"),
        ({"checkpoint_every": None, "run_dir": "run"}, ValueError, "The full unroll keeps whole graphs"),
        ({"checkpoint_every": 2, "truncate": 3, "outer": {3: plain_outer}, "run_dir": "run"}, ValueError,
         "outer has a term after 3 steps"),
        ({"memory_budget": 0.5, "run_dir": "run"}, ValueError, "memory_budget=0.5 keeps whole graphs"),
        ({"compile": "trace", "run_dir": "run"}, ValueError, "compile='trace' and run_dir were both given"),
        ({"compile": True, "run_dir": "run"}, ValueError, "would not return the bits of one that was never ended"),
    ],
)  # fmt: skip
def test_bad_arguments(changes: dict[str, Any], error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        call(**changes)


def test_one_tensor_twice_is_refused() -> None:
    weight = tensor_of(1.0)
    with pytest.raises(ValueError, match="twice"):
        call(meta=[weight, weight])


@pytest.mark.parametrize("files", [False, True])
def test_nothing_is_changed_outside(files: bool, tmp_path: Path, cut: None) -> None:
    problem = Problem()
    weights, state = copy.deepcopy(problem.net.state_dict()), copy.deepcopy(problem.opt.state_dict())
    problem.run(12, tmp_path / "run" if files else None, checkpoints=2)
    assert all(torch.equal(value, weights[name]) for name, value in problem.net.state_dict().items())
    assert state == problem.opt.state_dict()
    assert problem.weights.grad is None


def test_a_warm_optimizer_and_a_part_of_the_weights(tmp_path: Path, cut: None) -> None:
    problem = Problem("sgd")
    problem.opt = torch.optim.Adam([problem.net.first.weight, problem.net.last.weight])
    problem.loss(problem.net, problem.batches(0), problem.weights, problem.rate).backward()
    problem.opt.step()
    problem.net.zero_grad()
    expected = problem.run(13, checkpoints=2)
    assert same(problem.run(13, tmp_path / "run", checkpoints=2), expected)


# ------------------------------------------------------------------------------------------------ replays are checked


@pytest.mark.parametrize("files", [False, True])
def test_a_changed_batch_is_noticed(files: bool, tmp_path: Path, cut: None) -> None:
    problem = Problem()
    x = problem.x

    def change(read: int) -> None:
        if read == 30:
            problem.x = x + 1e-12

    problem.at_read = change
    with pytest.raises(higher.ReplayMismatchError, match=r"The batch of step \d+ is not what it was"):
        problem.run(20, tmp_path / "run" if files else None, checkpoints=2)


def test_a_changed_loss_is_noticed_between_pieces(tmp_path: Path, cut: None) -> None:
    problem, reads = Problem(), 0
    loss = problem.loss

    def changed(fnet: Any, batch: Any, weights: Tensor, rate: Tensor) -> Tensor:
        nonlocal reads
        reads += 1
        return loss(fnet, batch, weights, rate) * (1.0 if reads < 30 else 1.0001)

    problem.loss = changed  # type: ignore[method-assign]
    with pytest.raises(higher.ReplayMismatchError) as caught:
        problem.run(20, tmp_path / "run", checkpoints=2)
    assert "counted from step" in caught.value.__notes__[0]


class Counts(nn.Module):
    """A forward that leaves numbers, or a tensor, on its module."""

    def __init__(self, leaves: Callable[[nn.Module, Tensor], Any]) -> None:
        super().__init__()
        self.line, self.calls, self.leaves, self.seen = nn.Linear(3, 1).double(), 0, leaves, None

    def forward(self, x: Tensor) -> Tensor:
        self.calls += 1
        factor = self.leaves(self, x)
        found: Tensor = self.line(x) * factor
        return found


def of_calls(module: Any, x: Tensor) -> float:
    return 1.0 / module.calls


def of_what_was_seen(module: Any, x: Tensor) -> Tensor:
    before, module.seen = module.seen, x.mean()
    return x.mean() if before is None else before


def run_counts(leaves: Callable[[nn.Module, Tensor], Any], run_dir: Path | None) -> list[Tensor]:
    torch.manual_seed(0)
    net = Counts(leaves)
    opt = torch.optim.SGD(net.parameters(), lr=0.1)
    batches = [(X[t % 6], Y[t % 6]) for t in range(14)]
    return bits(
        higher.metagradient(plain_loss, net, opt, batches, steps=14, outer=plain_outer, checkpoints=2, run_dir=run_dir)
    )


def test_numbers_that_a_forward_leaves_go_from_piece_to_piece(tmp_path: Path, cut: None) -> None:
    expected = run_counts(of_calls, None)
    assert same(run_counts(of_calls, tmp_path / "run"), expected)


def test_a_tensor_that_a_forward_leaves_and_reads_is_refused(tmp_path: Path, cut: None) -> None:
    with pytest.raises(higher.RecordError, match="register_buffer"):
        run_counts(of_what_was_seen, tmp_path / "run")


def test_past_weights_cannot_be_asked_for_with_files(tmp_path: Path, cut: None) -> None:
    def outer(fnet: Any) -> Tensor:
        return (next(iter(fnet.parameters(time=0))) - fnet.weight).square().sum()

    assert call(outer=outer, checkpoints=1).outer > 0
    with pytest.raises(IndexError, match="time=0 is out of range: this fmodel has the times"):
        call(outer=outer, checkpoints=2, run_dir=tmp_path / "run")


# ------------------------------------------------------------------------------------------------ memory and passes


@pytest.mark.parametrize("files", [False, True])
def test_no_batch_is_held_but_the_current_one(files: bool, tmp_path: Path, cut: None) -> None:
    alive, most = weakref.WeakSet[Tensor](), 0

    def batches(step: int) -> tuple[Tensor, Tensor]:
        nonlocal most
        x, y = X[step % 6] + 0.0, Y[step % 6]
        alive.add(x)
        most = max(most, len(alive))
        return x, y

    call(batches=batches, steps=40, checkpoints=3, run_dir=tmp_path / "run" if files else None)
    assert most <= 2


def test_live_bytes_with_files_do_not_grow(tmp_path: Path, cut: None) -> None:
    def peak(steps: int) -> int:
        with live_bytes() as memory:
            call(batches=lambda t: (X[t % 6], Y[t % 6]), steps=steps, checkpoints=3, run_dir=tmp_path / "run")
        gc.collect()
        return memory.peak

    peak(10)
    assert peak(120) <= peak(40)


@pytest.mark.parametrize(("steps", "slots"), [(4, 2), (30, 3), (60, 4)])
def test_passes_are_the_optimum_and_one_for_each_leaf(steps: int, slots: int, tmp_path: Path, cut: None) -> None:
    def batches(step: int) -> tuple[Tensor, Tensor]:
        return X[step % 6], Y[step % 6]

    found = call(batches=batches, steps=steps, checkpoints=slots, run_dir=tmp_path / "run").report
    leaves = found.first_order_runs - optimal_runs(steps, slots) + 1
    assert found.second_order_runs == steps
    assert steps / 5 <= leaves <= steps / 2 + 1
    assert found.checkpoints_peak <= slots


def test_a_leaf_that_turns_out_to_be_slow_is_cut(tmp_path: Path, cut: None, monkeypatch: pytest.MonkeyPatch) -> None:
    expected = Problem("sgd").run(20, checkpoints=3)
    monkeypatch.setattr(resumable, "LEAF_STEPS", 512)
    monkeypatch.setattr(resumable, "LEAF_SECONDS", 0.0)
    problem = Problem("sgd")
    assert same(problem.run(20, tmp_path / "run", checkpoints=3), expected)


def test_the_bar_counts_the_work_to_its_end(
    tmp_path: Path, cut: None, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setitem(__import__("sys").modules, "tqdm", None)
    problem = Problem("sgd")
    monkeypatch.setattr(resumable.Resumable, "_run_weight", lambda self, steps: 2.0)
    monkeypatch.setattr(resumable, "_TRIAL", 10)
    problem.run(60, tmp_path / "run", checkpoints=4, progress="always", outer=problem.outer)
    shown = capsys.readouterr().err.replace("\r", "\n").strip().splitlines()[-1]
    done, total = shown.split()[1].split("/")
    assert done == total


def test_the_trial_changes_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(resumable, "_TRIAL", 4)
    problem = Problem("sgd")
    expected = problem.run(40, checkpoints=4)
    assert same(problem.run(40, tmp_path / "run", checkpoints=4, progress="always"), expected)
