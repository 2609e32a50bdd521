"""`store=` for what is no carry of a schedule: batches from outside, journals, the carries of outer terms."""

from __future__ import annotations

import functools
import gc
import warnings
import weakref
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from test_store import DAMAGES, DTYPES, aspects, bits_of, files, folder, full_disk
from torch import Tensor, nn

import lowmem_higher as higher
from lowmem_higher import BatchesHeldWarning, ExternalModifiedError, StoreError
from lowmem_higher.disk_store import InFile
from lowmem_higher.holdings import Hint, Holdings
from lowmem_higher.ledger import Ledger
from lowmem_higher.report import format_bytes
from lowmem_higher.store import HostStore, make_store
from lowmem_higher.testing import live_bytes

__all__ = ["folder"]  # the fixture
pytestmark = pytest.mark.usefixtures("float64")

Where = str | Path
ROWS, WIDTH = 32, 16  # a batch of 4 KiB
BATCH = ROWS * WIDTH * 8


@pytest.fixture(autouse=True)
def host_takes_from_a_cpu(monkeypatch: pytest.MonkeyPatch) -> None:
    """Else externals would stay where they are, being in host memory already."""
    monkeypatch.setattr(HostStore, "takes", lambda self, tensor: True)


def batch(step: int, rows: int = ROWS, width: int = WIDTH) -> Tensor:
    """A batch as a loader would make it, whose making the recorder does not see."""
    return torch.from_numpy(np.sin(np.arange(rows * width) * (step + 1.0) + step).reshape(rows, width))


def net() -> nn.Module:
    torch.manual_seed(3)
    return nn.Sequential(
        nn.Linear(WIDTH, 4, bias=False), nn.BatchNorm1d(4), nn.Dropout(0.3), nn.Tanh(), nn.Linear(4, 1)
    )


def momentum(params: Any) -> torch.optim.Optimizer:
    return torch.optim.SGD(params, lr=0.05, momentum=0.8)


def meta_gradients(
    length: int, meet: Callable[[int], None] = lambda _: None, twice: bool = False, **setting: Any
) -> list[Tensor]:
    """Fresh batches, some read again some steps later, one by random rows, one through a view; weights set by hand."""
    model, rate = net(), torch.tensor(0.05, requires_grad=True)
    scale = torch.ones(WIDTH, requires_grad=True)
    opt = torch.optim.Adam(model.parameters(), lr=0.05)
    torch.manual_seed(7)
    keywords = {"copy_initial_weights": False, "override": {"lr": [rate]}, **setting}
    total, again = torch.zeros(()), batch(100)
    with higher.innerloop_ctx(model, opt, **keywords) as (fnet, diffopt):
        total = total + diffopt.outer(fnet(again).square().mean())
        for step in range(length):
            meet(step)
            x = batch(step)
            if step % 4 == 1:
                again = x
            fnet.train(step % 3 != 2)
            loss = (fnet(x * scale) - x[:, :1]).square().mean()
            if step % 3 == 0:
                loss = loss + fnet(again[torch.randint(ROWS, (8,))]).square().mean()
            if step == 5:
                fnet.update_params([w * 0.9 for w in fnet.parameters()])
                total = total + diffopt.outer(fnet(x).square().mean())
                continue
            diffopt.step(loss)
            if step % 2:
                total = total + diffopt.outer(fnet(again).square().mean())
        outer = total + (fnet.eval()(batch(-1)) - 0.3).square().mean()
        inputs = [*model.parameters(), rate, scale]
        meet(length)
        found = list(torch.autograd.grad(outer, inputs, retain_graph=True)) if twice else []
        return found + list(torch.autograd.grad(outer, inputs))


SETTINGS: list[dict[str, Any]] = [
    {"checkpoint_every": 1},
    {"checkpoint_every": 4},
    {"checkpoints": 1},
    {"checkpoints": 3},
    {"checkpoint_every": 4, "journal": True},
    {"checkpoints": 2, "journal": True},
    {"checkpoint_every": 4, "truncate": 6},
    {"checkpoint_every": 4, "replay": "torch"},
    {"checkpoints": 3, "verify": "all"},
]


@functools.cache
def unrolled(truncate: int | None) -> list[Tensor]:
    return meta_gradients(9, truncate=truncate)


@pytest.mark.parametrize("setting", SETTINGS, ids=str)
def test_the_same_bits_with_every_store_and_schedule(setting: dict[str, Any], folder: Path) -> None:
    twice = "checkpoints" in setting
    expected = meta_gradients(9, twice=twice, **setting)
    assert all(grad.norm() > 1e-9 for grad in expected)
    for store in ("host", folder):
        found = meta_gradients(9, twice=twice, store=store, **setting)
        assert all(torch.equal(one, other) for one, other in zip(found, expected, strict=True)), store
    for one, other in zip(expected, unrolled(setting.get("truncate")) * (1 + twice), strict=True):
        assert (one - other).norm() <= 1e-9 * other.norm()


@pytest.mark.parametrize("store", ["device", "host", "disk"])
def test_two_optimizers_that_read_one_batch(store: str, folder: Path) -> None:
    """Each has a record of its own, and neither takes the other's for somebody else's."""

    def grads(**setting: Any) -> tuple[list[Tensor], int]:
        model = nn.Sequential(nn.Linear(WIDTH, 4), nn.Tanh(), nn.Linear(4, 1))
        with torch.no_grad():
            for index, param in enumerate(model.parameters()):
                param.copy_(torch.sin(torch.arange(param.numel()) + index).reshape(param.shape))
        first, second = momentum(model[0].parameters()), momentum(model[2].parameters())
        with higher.innerloop_ctx(model, first, copy_initial_weights=False, **setting) as (fnet, one):
            two = higher.get_diff_optim(second, list(model[2].parameters()), fmodel=fnet)
            for step in range(9):
                x = batch(step)
                one.step(fnet(x).square().mean())
                two.step((fnet(x) - 1).square().mean())
            held = one.report.externals_bytes, two.report.externals_bytes
            found = torch.autograd.grad(fnet(batch(-1)).square().mean(), list(model.parameters()))
        assert max(held) <= 2 * BATCH or store == "device" or not setting
        return list(found), max(held)

    expected, _ = grads()
    found, _ = grads(checkpoint_every=3, store=folder if store == "disk" else store)
    for one, other in zip(found, expected, strict=True):
        assert (one - other).norm() <= 1e-9 * other.norm() > 0


# ------------------------------------------------------------------------------------------------ bytes and strides


LAYOUTS = st.lists(
    st.tuples(
        st.lists(st.tuples(st.integers(0, 4), st.integers(0, 9)), max_size=3), st.integers(0, 300), st.integers(0, 2)
    ),
    min_size=1,
    max_size=4,
)


def views(dtype: torch.dtype, seed: int, layouts: list[Any]) -> list[Tensor]:
    """Of one storage of 8 KiB with any bits; of any strides and marks."""
    generator = torch.Generator().manual_seed(seed)
    bits = torch.randint(0, 2 if dtype is torch.bool else 256, (8192,), generator=generator, dtype=torch.uint8)
    found: list[Tensor] = []
    for dims, offset, mark in layouts:
        tensor = bits.view(dtype).as_strided([size for size, _ in dims], [stride for _, stride in dims], offset)
        if dtype.is_complex:
            tensor = [tensor, tensor.conj(), tensor.conj().imag][mark]
        found.append(tensor)
    return found


@pytest.mark.parametrize("kind", ["host", "disk"])
def test_any_tensors_come_back_bit_for_bit_and_share_one_copy(kind: str, folder: Path) -> None:
    @given(dtype=st.sampled_from(DTYPES), seed=st.integers(0, 99), layouts=LAYOUTS)
    @settings(max_examples=40, deadline=None)
    def check(dtype: torch.dtype, seed: int, layouts: list[Any]) -> None:
        ledger, originals = Ledger(), views(dtype, seed, layouts)
        store = make_store(kind if kind == "host" else folder, ledger)
        holdings = Holdings(store, ledger, Hint())
        held = [external for external in holdings.hold(originals, 0) if not isinstance(external, Tensor)]
        expected = [(aspects(tensor), bits_of(tensor), tensor._version) for tensor in originals]
        assert (len(held), ledger.externals_bytes, ledger.stored_bytes) == (len(expected), 8192, 0)
        originals.clear()
        holdings.use([])
        assert ledger.externals_bytes == 0
        for _ in range(2):
            found = [external.read() for external in held]
            assert [(aspects(tensor), bits_of(tensor)) for tensor in found] == [entry[:2] for entry in expected]
            assert [external.version for external in held] == [entry[2] for entry in expected]
            assert len({tensor.untyped_storage().data_ptr() for tensor in found if tensor.numel()}) <= 1
            assert ledger.stored_bytes == ledger.externals_bytes <= 8192
            holdings.use([held[0].storage])  # type: ignore[attr-defined]
            assert [external.read() is tensor for external, tensor in zip(held, found, strict=True)] == [True] * len(
                held
            )
            del found
            holdings.use([])
            assert ledger.externals_bytes == 0
        held.clear()
        assert ledger.stored_bytes == 0
        if store is not None:
            store.close()

    check()


# ------------------------------------------------------------------------------------------------ bytes, and counts


class Seen:
    """What a loop takes: live bytes at its end and at most, files, and the report then."""

    def __init__(self, live: live_bytes, folder: Path, report: higher.Report) -> None:
        self.loop, self.files, self.report = live.current, len(files(folder)), report
        self.peak = 0


def measured(length: int, store: Where, folder: Path, **setting: Any) -> Seen:
    """Each batch takes 64 KiB, and the model 5 KiB."""
    model = nn.Sequential(nn.Linear(64, 10), nn.Tanh(), nn.Linear(10, 1))
    opt = torch.optim.SGD(model.parameters(), lr=1e-3, momentum=0.9)
    context = higher.innerloop_ctx(model, opt, copy_initial_weights=False, store=store, **setting)
    with live_bytes() as live, context as (fnet, diffopt):
        for step in range(length):
            diffopt.step(fnet(batch(step, 128, 64)).square().mean())
        seen = Seen(live, folder, diffopt.report)
        torch.autograd.grad(fnet(batch(-1, 128, 64)).mean(), list(model.parameters()))
    seen.peak = live.peak
    return seen


@pytest.mark.parametrize("setting", [{"checkpoint_every": 8}, {"checkpoints": 2, "journal": True}], ids=str)
def test_the_device_does_not_feel_the_length_of_the_loop(setting: dict[str, Any], folder: Path) -> None:
    large = 128 * 64 * 8
    few, many = [measured(length, folder, folder, **setting) for length in (12, 36)]
    carry, journal = many.report.carry_bytes, many.report.carry_bytes // 2
    assert many.loop <= few.loop + 1024  # a few numbers that replays are compared with
    assert many.peak <= few.peak + carry
    assert few.loop < 3 * large + 6 * carry
    assert many.report.externals_bytes == few.report.externals_bytes <= 2 * large
    assert many.report.journal_bytes == few.report.journal_bytes <= journal
    assert many.report.stored_bytes - few.report.stored_bytes >= 24 * large
    held = measured(36, "device", folder, **setting)
    assert held.loop > many.loop + 32 * large
    assert held.report.stored_bytes == 0
    assert list(folder.iterdir()) == []


def test_journals_are_counted_where_they_are(folder: Path) -> None:
    few, many = [measured(length, folder, folder, checkpoint_every=100, journal=True) for length in (10, 20)]
    weights = few.report.carry_bytes  # of the only carry, before there is a momentum
    assert few.report.journal_bytes == many.report.journal_bytes == weights
    large = 128 * 64 * 8
    assert many.report.stored_bytes - few.report.stored_bytes == 10 * (weights + large)
    device = measured(10, "device", folder, checkpoint_every=100, journal=True).report
    assert (device.journal_bytes, device.externals_bytes) == (10 * weights, 10 * large)


def test_what_others_hold_is_not_copied(folder: Path) -> None:
    """A dataset, a list of batches, and parts of what is held; once it is let go it is stored, once."""
    data, batches, whole = batch(0, 500), [batch(step) for step in range(8)], batch(9, 8 * ROWS)
    parts = iter([whole[step * ROWS : (step + 1) * ROWS] for step in range(8)])
    model = net()
    with higher.innerloop_ctx(
        model, momentum(model.parameters()), copy_initial_weights=False, checkpoint_every=100, store=folder
    ) as (fnet, diffopt):
        for step in range(8):
            part = next(parts)
            loss = fnet(data).mean() * fnet(data[step : step + 2]).mean()
            diffopt.step(loss + fnet(batches[step]).mean() * fnet(part).mean())
        sizes = data.nbytes, 8 * BATCH, whole.nbytes
        assert diffopt.report.stored_bytes == 0
        assert diffopt.report.externals_bytes == sum(sizes)
        del batches, loss, part, parts
        diffopt.step(fnet(data).mean())
        assert diffopt.report.stored_bytes == sizes[1]
        assert diffopt.report.externals_bytes == sizes[0] + sizes[2]
        del whole
        for _ in range(2):
            diffopt.step(fnet(data).mean())
        assert diffopt.report.stored_bytes == sizes[1] + sizes[2]
        assert len(files(folder)) == 9
        del data
        outer = fnet(batch(-1)).mean()
        before = diffopt.report.externals_bytes
        assert before == sizes[0]
        seen: list[higher.Report] = []
        report = functools.partial(getattr, diffopt, "report")
        next(fnet.parameters(time=3)).register_hook(functools.partial(_noted, seen, report))
        torch.autograd.grad(outer, list(model.parameters()))
    del report
    assert seen[0].stored_peak_bytes == sizes[1] + sizes[2]  # each step reads the dataset, so it was never let go
    assert sizes[0] < seen[0].externals_bytes <= sizes[0] + sizes[2] + 2 * BATCH
    assert diffopt.report.externals_bytes == diffopt.report.stored_bytes == 0
    del fnet, diffopt, outer


def _noted(seen: list[higher.Report], report: Callable[[], higher.Report], _: Tensor) -> None:
    seen.append(report())


def test_small_ones_and_those_with_a_gradient_stay(folder: Path) -> None:
    model = net()
    with higher.innerloop_ctx(
        model, momentum(model.parameters()), copy_initial_weights=False, checkpoint_every=100, store=folder
    ) as (fnet, diffopt):
        for step in range(5):
            leaf = batch(step).requires_grad_()
            diffopt.step(fnet(leaf).mean() * fnet(batch(step, ROWS - 1)).mean())
        assert diffopt.report.stored_bytes == 0
        assert diffopt.report.externals_bytes == 5 * (2 * BATCH - WIDTH * 8)
    del fnet, diffopt


@pytest.mark.parametrize("store", ["device", "host", "disk"])
def test_R6_a_large_tensor_of_a_closure_gets_its_gradient(store: str, folder: Path) -> None:
    """It is known by its identity, so no alias may stand for it."""

    def grads(**setting: Any) -> Tensor:
        mask, model = batch(7).requires_grad_(), net().eval()
        with higher.innerloop_ctx(model, momentum(model.parameters()), **setting) as (fnet, diffopt):
            for step in range(4):
                diffopt.step(lambda fmodel, x: fmodel(x * mask).square().mean(), batch(step))
            return torch.autograd.grad(fnet(batch(-1)).square().mean(), [mask])[0]

    expected = grads()
    found = grads(checkpoint_every=2, store=folder if store == "disk" else store)
    assert (found - expected).norm() <= 1e-9 * expected.norm() > 0


def test_the_host_takes_nothing_that_it_has(monkeypatch: pytest.MonkeyPatch, folder: Path) -> None:
    monkeypatch.undo()
    report = measured(10, "host", folder, checkpoint_every=100, journal=True).report
    assert report.externals_bytes == 10 * 128 * 64 * 8
    assert report.stored_bytes == 9 * report.journal_bytes


def test_everything_is_freed_with_the_loop_and_with_the_backward(folder: Path) -> None:
    gc.disable()
    try:
        for backward in (False, True):
            model = net()
            with higher.innerloop_ctx(
                model, momentum(model.parameters()), checkpoint_every=3, store=folder, journal=True
            ) as (fnet, diffopt):
                refs = []
                for step in range(7):
                    x = batch(step)
                    refs.append(weakref.ref(x))
                    diffopt.step(fnet(x).square().mean())
                assert [ref() is None for ref in refs] == [True] * 6 + [False]
                assert len(files(folder)) == 6 + 6 + 2
                del x
                outer = fnet(batch(-1)).mean()
                if backward:
                    outer.backward(inputs=list(fnet.parameters(time=0)))
                    assert files(folder) == []
            del fnet, diffopt, outer
            assert list(folder.iterdir()) == []
    finally:
        gc.enable()


def test_the_carries_of_terms_leave_the_device(folder: Path) -> None:
    """A term after weights were set by hand holds the carry itself."""

    def peak(length: int, store: Where) -> tuple[int, int]:
        model = net()
        with higher.innerloop_ctx(
            model, momentum(model.parameters()), copy_initial_weights=False, checkpoints=2, store=store
        ) as (fnet, diffopt):
            total = torch.zeros(())
            for step in range(length):
                fnet.update_params([w * 0.9 for w in fnet.parameters()])
                total = total + diffopt.outer(fnet(batch(step)).square().mean())
            report = diffopt.report
            assert report.checkpoints_held == length
            torch.autograd.grad(total, list(model.parameters()), retain_graph=True)
            report = diffopt.report
        return report.carries_peak_bytes // report.carry_bytes, report.stored_bytes

    assert peak(12, "device") == (12, 0)
    (few, stored), (many, more) = peak(12, folder), peak(24, folder)
    assert few == many <= 2
    assert more > 1.9 * stored


def test_a_replay_of_updates_reads_no_batch(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Each batch is read once, for the second-order run of its step; each journal too, but the newest not at all."""
    asked: list[str] = []
    get = InFile.get

    def counted(self: InFile[Any]) -> Any:
        asked.append(self._packed.what[:14])
        return get(self)

    monkeypatch.setattr(InFile, "get", counted)
    report = measured(10, folder, folder, checkpoint_every=100, journal=True).report
    assert report.steps == 10
    assert Counter(asked) == {"what step 0 re": 1, **{f"what step {k} re": 1 for k in range(9)}, "the inner grad": 9}


def test_what_was_read_back_is_read_again_if_it_was_written_into(folder: Path) -> None:
    ledger = Ledger()
    holdings = Holdings(make_store(folder, ledger), ledger, Hint())
    (held,) = holdings.hold([batch(3)], 0)
    holdings.use([])
    assert not isinstance(held, Tensor)
    held.read().zero_()
    assert torch.equal(held.read(), batch(3))
    del held


def test_a_carry_held_for_several_terms_is_stored_once(folder: Path) -> None:
    model = net()
    with higher.innerloop_ctx(
        model, momentum(model.parameters()), copy_initial_weights=False, checkpoint_every=3, store=folder
    ) as (fnet, diffopt):
        diffopt.step(fnet(batch(0)).square().mean())
        fnet.update_params([w * 0.9 for w in fnet.parameters()])
        terms = [diffopt.outer((fnet(batch(1, ROWS - 1)) - k).square().mean()) for k in range(3)]
        assert 0 <= diffopt.report.externals_bytes - 3 * (BATCH - WIDTH * 8) < 200  # small ones stay; and statistics
        assert diffopt.report.checkpoints_held == 2
        fnet.update_params([w * 0.9 for w in fnet.parameters()])
        terms.append(diffopt.outer(fnet(batch(1)).square().mean()))
        assert diffopt.report.checkpoints_held == 3
        grads = torch.autograd.grad(sum(terms), list(model.parameters()))
        assert grads[0].norm() > 0
        del terms
        diffopt.step(fnet(batch(0)).square().mean())
        assert diffopt.report.checkpoints_held == 1  # the first step is freed
    del fnet, diffopt


# ---------------------------------------------------------------------------------------------- modified in place


@pytest.mark.parametrize("store", ["device", "host", "disk"])
@pytest.mark.parametrize("by", ["itself", "a view", "its base", "an alias"])
def test_R4_a_batch_modified_in_place_while_somebody_holds_it(by: str, store: str, folder: Path) -> None:
    model = net()
    with higher.innerloop_ctx(
        model,
        momentum(model.parameters()),
        copy_initial_weights=False,
        checkpoint_every=3,
        store=folder if store == "disk" else store,
    ) as (fnet, diffopt):
        base = batch(0, 2 * ROWS)
        with torch._C.DisableTorchFunction():
            x = base[:ROWS]
            left = {"itself": x, "a view": x[3], "its base": base, "an alias": x.detach()}[by]
        for step in range(8):
            diffopt.step(fnet(x if step == 2 else batch(step)).square().mean())
            if step == 4:
                del x, base
        left.mul_(2)
        del left
        diffopt.step(fnet(batch(0)).square().mean())
        outer = fnet(batch(-1)).mean()
    with pytest.raises(ExternalModifiedError, match=r"shape \(32, 16\).*modified in place after step 2"):
        torch.autograd.grad(outer, list(model.parameters()))
    del outer, fnet, diffopt


def test_R4_one_buffer_for_all_batches(folder: Path) -> None:
    """The loader writes each batch into the same tensor: only the last step can be replayed, stored or not."""
    for store in ("device", folder):
        model, x = net(), batch(0)
        with higher.innerloop_ctx(
            model, momentum(model.parameters()), copy_initial_weights=False, checkpoint_every=100, store=store
        ) as (fnet, diffopt):
            for step in range(4):
                with torch._C.DisableTorchFunction():  # as a loader's own thread or C++ would
                    x.copy_(batch(step))
                diffopt.step(fnet(x).square().mean())
            del x
            diffopt.step(fnet(batch(5)).mean())  # now it is stored
            assert len(files(folder)) == (store == folder)
            outer = fnet(batch(-1)).mean()
        with pytest.raises(ExternalModifiedError, match=r"after step 0 \(version 1 was read, it is now at 4\)"):
            torch.autograd.grad(outer, list(model.parameters()))
        del outer, fnet, diffopt


@pytest.mark.parametrize("when", ["hot", "stored"])
def test_R4_an_inner_gradient_modified_in_place(when: str, folder: Path) -> None:
    """While it is on the device it raises; once it is stored it does no harm."""

    def grads(store: Where, modify: bool) -> list[Tensor]:
        model, seen = nn.Linear(WIDTH, 1, bias=False), list[Tensor]()
        with torch.no_grad():
            model.weight.copy_(torch.ones(WIDTH))

        def remembers(gradients: list[Tensor]) -> list[Tensor]:
            seen[:] = gradients
            return gradients

        with higher.innerloop_ctx(
            model, momentum(model.parameters()), copy_initial_weights=False, checkpoints=1, journal=True, store=store
        ) as (fnet, diffopt):
            for step in range(6):
                diffopt.step(fnet(batch(step)).square().mean(), grad_callback=remembers if step == 2 else None)
                if modify and step == (2 if when == "hot" else 3):
                    seen[0].zero_()
            return list(torch.autograd.grad(fnet(batch(-1)).square().mean(), [model.weight]))

    for store in ("host", folder):
        if when == "hot":
            with pytest.raises(ExternalModifiedError, match=r"inner gradient of step 2, .*shape \(1, 16\)"):
                grads(store, modify=True)
        else:
            assert torch.equal(grads(store, modify=True)[0], grads("device", modify=False)[0])
    gc.collect()  # of the frames that the errors hold


# ----------------------------------------------------------------------------------------------------------- faults


def outcome(folder: Path, meet: Callable[[int], None] = lambda _: None, **setting: Any) -> list[Tensor]:
    return meta_gradients(9, meet, store=folder, checkpoint_every=100, **setting)


def unharmed(folder: Path) -> bool:
    """Nothing is left, and a second run works."""
    torch.ones((), requires_grad=True).backward()  # torch holds the nodes of a backward that failed until the next one
    left = list(folder.iterdir())
    expected = meta_gradients(9, checkpoint_every=100)
    again = all(torch.equal(one, other) for one, other in zip(outcome(folder), expected, strict=True))
    return not left and again and not list(folder.iterdir())


@pytest.mark.parametrize("what", ["what step 0 reads from outside", "the inner gradient of step 3"])
@pytest.mark.parametrize("damage", ["removed", "truncated", "flipped in the weights", "flipped in the checksum"])
def test_a_damaged_file_never_becomes_a_gradient(damage: str, what: str, folder: Path) -> None:
    hurt, said = DAMAGES[damage]

    def meet(step: int) -> None:
        if step == 9:
            hurt(next(path for path in files(folder) if what.encode() in path.read_bytes()))

    with pytest.raises(StoreError, match=f"{what}.*{said.split('step .*')[-1].strip()}"):
        outcome(folder, meet, journal=True)
    assert unharmed(folder)


@pytest.mark.parametrize("step", [5, 9])
def test_a_directory_that_is_removed(step: int, folder: Path) -> None:
    def meet(now: int) -> None:
        if now == step:
            for path in files(folder):
                path.unlink()
            next(folder.iterdir()).rmdir()

    with pytest.raises(StoreError, match="written to .* No such file" if step == 5 else "Cannot read .* No such file"):
        outcome(folder, meet)
    assert unharmed(folder)


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="/dev/full is the full disk of this test")
@pytest.mark.parametrize("journal", [False, True])
def test_a_full_disk_raises_at_the_step_which_can_be_taken_again(journal: bool, folder: Path) -> None:
    refused, found = [], []
    for store in ("device", folder):
        model = net()
        torch.manual_seed(1)
        with higher.innerloop_ctx(
            model,
            momentum(model.parameters()),
            copy_initial_weights=False,
            store=store,
            checkpoint_every=100,
            journal=journal,
        ) as (fnet, diffopt):
            for step in range(6):
                loss = fnet(batch(step, ROWS - (1 if journal else 0))).square().mean()
                if store == folder:
                    before = set(files(folder)), list(fnet.parameters())
                    with pytest.MonkeyPatch.context() as monkeypatch:
                        full_disk(monkeypatch)
                        try:
                            diffopt.step(loss)
                        except StoreError as error:
                            refused.append(f"{error} {type(error.__cause__).__name__}")
                            assert set(files(folder)) <= before[0]
                            assert all(one is other for one, other in zip(fnet.parameters(), before[1], strict=True))
                if diffopt.report.steps == step:
                    diffopt.step(loss)
            outer = fnet.eval()(batch(-1)).square().mean()
        found.append(torch.autograd.grad(outer, list(model.parameters())))
    assert all(torch.equal(one, other) for one, other in zip(*found, strict=True))
    assert len(refused) == 5
    for step, said in enumerate(refused):
        if journal:
            assert said.startswith(f"The inner gradient of step {step}, ")
            assert "journal=False" in said
        else:
            assert said.startswith(
                f"What step {step} reads from outside (a tensor of shape (32, 16)), 4.0 KiB, could not"
            )
            assert "x[idx], or let the step fetch them, diffopt.step(fn, idx)" in said
        assert said.endswith("OSError")
    assert list(folder.iterdir()) == []


# ------------------------------------------------------------------------------------------------------ the warning


LARGE = 17 * 2**20  # bytes of a batch: four of them are worth a word


def large() -> Tensor:
    return torch.from_numpy(np.zeros(LARGE // 8))  # memory that is not touched is not taken


def weighs(fmodel: Any, x: Tensor) -> Tensor:
    return (fmodel(torch.ones(1)) * x).sum()


def loop(step: Callable[[Any, Any], object], length: int = 6, optimizers: int = 1, **setting: Any) -> list[str]:
    """What is said in a loop whose steps are taken by `step(fmodel, diffopt)`."""
    model = nn.Linear(1, 1)
    opts = [torch.optim.SGD(model.parameters(), lr=1e-3) for _ in range(optimizers)]
    with (
        warnings.catch_warnings(record=True) as caught,
        higher.innerloop_ctx(model, opts[0], copy_initial_weights=False, **setting) as (fnet, diffopt),
    ):
        warnings.simplefilter("always")
        all_opts = [diffopt, *(higher.get_diff_optim(opt, list(model.parameters()), fmodel=fnet) for opt in opts[1:])]
        for _ in range(length):
            for each in all_opts:
                step(fnet, each)
    assert all(warning.category is BatchesHeldWarning and warning.filename == __file__ for warning in caught)
    return [str(warning.message) for warning in caught]


@pytest.mark.parametrize("optimizers", [1, 2])
def test_one_warning_when_batches_outgrow_the_carries(optimizers: int) -> None:
    said = loop(lambda fnet, opt: opt.step(weighs(fnet, large())), optimizers=optimizers, checkpoint_every=2)
    assert len(said) == 1
    assert format_bytes(4 * LARGE) in said[0]
    for part in ("handed to 4 inner steps", "fmodel(x[idx])", "diffopt.step(fn, idx)", "store='a/directory'"):
        assert part in said[0]


def test_no_warning_where_nothing_is_to_be_gained(folder: Path) -> None:
    data, batches = large(), [large() for _ in range(6)]
    following, by_index = iter(batches), iter(batches)
    assert loop(lambda fnet, opt: opt.step(weighs(fnet, data)), checkpoint_every=2) == []  # resident, read by all
    assert loop(lambda fnet, opt: opt.step(weighs(fnet, next(following))), checkpoint_every=2) == []  # a list of them
    assert loop(lambda fnet, opt: opt.step(weighs(fnet, data[torch.arange(9)])), checkpoint_every=2) == []
    assert loop(lambda fnet, opt: opt.step(lambda net: weighs(net, next(by_index))), checkpoint_every=2) == []
    for setting in ({}, {"checkpoint_every": 2, "store": folder}, {"checkpoint_every": 2, "truncate": 2}):
        assert loop(lambda fnet, opt: opt.step(weighs(fnet, large())), **setting) == []
    assert loop(lambda fnet, opt: opt.step(weighs(fnet, batch(0))), 30, checkpoint_every=40) == []  # kilobytes


def test_no_warning_while_the_carries_take_more() -> None:
    model = nn.Linear(1, 2 * LARGE // 8, bias=False)
    opt = torch.optim.SGD(model.parameters(), lr=1e-3)
    with higher.innerloop_ctx(model, opt, checkpoint_every=1) as (fnet, diffopt):
        for _ in range(6):
            diffopt.step((next(fnet.parameters())[:1] * large()).sum())
        assert diffopt.report.externals_bytes == 6 * LARGE


def test_as_an_error_it_leaves_the_step_to_be_taken_again() -> None:
    model = nn.Linear(1, 1)
    opt = torch.optim.SGD(model.parameters(), lr=1e-3)
    with higher.innerloop_ctx(model, opt, copy_initial_weights=False, checkpoint_every=2) as (fnet, diffopt):
        for _ in range(4):
            diffopt.step(weighs(fnet, large()))
        loss = weighs(fnet, large())
        with pytest.raises(BatchesHeldWarning, match="handed to 4 inner steps"):
            diffopt.step(loss)
        assert diffopt.report.steps == 4
        diffopt.step(loss)
        assert diffopt.report.steps == 5


# ------------------------------------------------------------------------------------------------------------ CUDA


@pytest.mark.cuda
def test_cuda_batches_and_journals_leave_the_device(folder: Path) -> None:
    def run(store: Where) -> tuple[list[Tensor], int]:
        model = nn.Sequential(nn.Linear(512, 16), nn.Tanh(), nn.Linear(16, 1)).cuda()
        with torch.no_grad():
            for index, param in enumerate(model.parameters()):
                param.copy_(torch.sin(torch.arange(param.numel()) + index).reshape(param.shape) / 8)
        opt = torch.optim.SGD(model.parameters(), lr=1e-3)
        torch.cuda.synchronize()
        before = torch.cuda.memory_allocated()
        context = higher.innerloop_ctx(
            model, opt, copy_initial_weights=False, checkpoint_every=10, journal=True, store=store
        )
        with context as (fnet, diffopt):
            for step in range(40):
                with torch._C.DisableTorchFunction():
                    x = batch(step, 256, 512).cuda()
                diffopt.step(fnet(x).square().mean())
            torch.cuda.synchronize()
            taken = torch.cuda.memory_allocated() - before
            return list(torch.autograd.grad(fnet(x).mean(), list(model.parameters()))), taken

    expected, most = run("device")
    for store in ("host", folder):
        for _ in range(3):  # a race would not lose every time
            found, taken = run(store)
            assert all(torch.equal(one, other) for one, other in zip(found, expected, strict=True))
            assert taken < most - 30 * 256 * 512 * 8
