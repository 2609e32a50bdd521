"""`store=`: carries on the host or on disk come back bit for bit, or the run raises; nothing is left behind."""

from __future__ import annotations

import os
import re
import signal
import subprocess
import sys
import textwrap
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from test_bounded import EVENTS, X, Y, graph_bytes, net, story
from test_bounded import wide as any_wide
from torch import Tensor, nn

import lowmem_higher as higher
from lowmem_higher import ExternalModifiedError, StoreError
from lowmem_higher.carries import Carries, Held, Segment
from lowmem_higher.ledger import Ledger
from lowmem_higher.packing import Constants
from lowmem_higher.report import format_bytes
from lowmem_higher.step import Carry
from lowmem_higher.store import HostStore, Store, make_store
from lowmem_higher.testing import live_bytes

pytestmark = pytest.mark.usefixtures("float64")

Where = str | Path


def wide() -> nn.Module:
    torch.manual_seed(3)
    return any_wide()


@pytest.fixture
def folder(tmp_path: Path) -> Iterator[Path]:
    """A directory that has to be empty in the end."""
    path = tmp_path / "carries"
    path.mkdir()
    yield path
    assert not path.exists() or list(path.iterdir()) == []


def files(folder: Path) -> list[Path]:
    return sorted(folder.glob("*/*"))


# ------------------------------------------------------------------------------------------------- bytes and tensors


DTYPES = [
    torch.float64,
    torch.float32,
    torch.bfloat16,
    torch.float16,
    torch.float8_e4m3fn,
    torch.complex64,
    torch.complex128,
    torch.int64,
    torch.int16,
    torch.uint8,
    torch.bool,
]


@st.composite
def tensors(draw: st.DrawFn) -> list[Tensor]:
    """Of any dtype and strides, with any bits; some are views of one storage."""
    found: list[Tensor] = []
    for _ in range(draw(st.integers(1, 3))):
        dtype = draw(st.sampled_from(DTYPES))
        generator = torch.Generator().manual_seed(draw(st.integers(0, 99)))
        bits = torch.randint(0, 2 if dtype is torch.bool else 256, (512,), generator=generator, dtype=torch.uint8)
        storage = bits.view(dtype)
        for _ in range(draw(st.integers(1, 3))):
            size = tuple(draw(st.lists(st.integers(0, 3), max_size=3)))
            stride = tuple([draw(st.integers(0, 4)) for _ in size])
            tensor = storage.as_strided(size, stride, draw(st.integers(0, 4)))
            if dtype.is_complex:
                tensor = draw(st.sampled_from([tensor, tensor.conj(), tensor.conj().imag]))
            found.append(tensor)
    return found


def bits_of(tensor: Tensor) -> list[int]:
    if tensor.numel() == 0:
        return []
    whole = tensor.detach().resolve_conj().resolve_neg().clone(memory_format=torch.contiguous_format).flatten()
    return [int(byte) for byte in whole.view(torch.uint8)]


def aspects(tensor: Tensor) -> tuple[Any, ...]:
    marks = (tensor.is_conj(), tensor.is_neg(), tensor.requires_grad)
    return (tensor.dtype, tensor.device, tensor.shape, tensor.stride(), tensor.data_ptr() % 64, *marks)


@pytest.mark.parametrize("kind", ["host", "disk"])
def test_any_carry_comes_back_bit_for_bit(kind: str, folder: Path) -> None:
    @given(weights=tensors(), state=tensors(), buffers=tensors())
    @settings(max_examples=50, deadline=None)
    def check(weights: list[Tensor], state: list[Tensor], buffers: list[Tensor]) -> None:
        store = make_store(kind if kind == "host" else folder, Ledger())
        assert store is not None
        entry = {"step": 3, "none": None, **{str(index): tensor for index, tensor in enumerate(state)}, "end": 0.5}
        carry = Carry(weights, [{0: dict(entry)}, {1: {}}], (None, *buffers))
        stored = store.put(carry, 0, Constants())
        for _ in range(2):
            found = stored.get()
            assert list(found.state[0][0]) == list(entry)
            assert (found.state[0][0]["step"], found.state[0][0]["end"], found.state[1]) == (3, 0.5, {1: {}})
            assert found.buffers[0] is None
            assert len(found.tensors()) == len(carry.tensors())
            for one, other in zip(found.tensors(), carry.tensors(), strict=True):
                assert aspects(one) == aspects(other)
                assert bits_of(one) == bits_of(other)
                assert one.untyped_storage().data_ptr() != other.untyped_storage().data_ptr() or not one.numel()
            for tensor in found.tensors():
                tensor.untyped_storage().fill_(0)  # what was given out is not what is stored

    check()


def test_only_the_bytes_in_use_are_stored_and_shared_ones_once() -> None:
    huge, vector = torch.randn(100_000), torch.randn(64)
    store = make_store("host", Ledger())
    assert store is not None
    carry = Carry([huge[800:900], vector[:40].view(4, 10), vector[40:]], [], ())
    assert store.put(carry, 0, Constants()).nbytes == 8 * (100 + 64)


def test_what_is_more_than_a_strided_tensor_is_copied_where_it_is() -> None:
    sparse = torch.eye(3).to_sparse()
    store = make_store("host", Ledger())
    assert store is not None
    stored = store.put(Carry([], [], (sparse, torch.ones(2))), 0, Constants())
    expected = sparse.to_dense()
    sparse.mul_(2)
    found = stored.get().buffers[0]
    assert found is not None
    assert found.is_sparse
    assert torch.equal(found.to_dense(), expected)


# -------------------------------------------------------------------------------------------------------- gradients


def momentum(params: Any) -> torch.optim.Optimizer:
    return torch.optim.SGD(params, lr=0.05, momentum=0.8)


def meta_gradients(
    length: int,
    store: Where = "device",
    optimizer: Callable[..., torch.optim.Optimizer] = momentum,
    meet: Callable[[int], None] = lambda _: None,
    **setting: Any,
) -> list[Tensor]:
    """Of two outer losses, one of which looks at a past time too; through statistics, random masks, a frozen weight."""
    model = net()
    model[4].bias.requires_grad_(False)
    rate = torch.tensor(0.05, requires_grad=True)
    weight = torch.linspace(0.5, 1.5, 20).requires_grad_()
    torch.manual_seed(7)
    keywords = {"copy_initial_weights": False, "override": {"lr": [rate]}, "store": store, **setting}
    with higher.innerloop_ctx(model, optimizer(model.parameters()), **keywords) as (fnet, diffopt):
        for step in range(length):
            meet(step)
            rows = torch.arange(step, step + 8) % 20
            diffopt.step((weight[rows, None] * (fnet(X[rows]) - Y[rows]).square()).mean())
        outer = (fnet.eval()(X) - Y).square().mean()
        inputs = [*(param for param in model.parameters() if param.requires_grad), rate, weight]
        found = list(torch.autograd.grad(outer, inputs, retain_graph=True))
        past = fnet.parameters(time=length // 2)
        outer = outer + torch.stack([param.sum() for param in past]).square().sum()
        meet(length)
        return found + list(torch.autograd.grad(outer, inputs))


SETTINGS: list[dict[str, Any]] = [
    {"checkpoint_every": 1},
    {"checkpoint_every": 4},
    {"checkpoint_every": 100},
    {"checkpoints": 1},
    {"checkpoints": 3},
    {"checkpoints": 3, "steps": 13},
    {"checkpoint_every": 4, "journal": True},
    {"checkpoint_every": 4, "replay": "torch"},
    {"checkpoints": 3, "replay": "torch"},
]


@pytest.mark.parametrize("optimizer", [momentum, torch.optim.Adam], ids=["SGD", "Adam"])
def test_the_same_bits_with_every_store_and_schedule(
    optimizer: Callable[..., torch.optim.Optimizer], folder: Path
) -> None:
    found: dict[str, list[Tensor]] = {}
    for setting in SETTINGS if optimizer is torch.optim.Adam else SETTINGS[1:5:3]:
        expected = found.setdefault(setting.get("replay", "native"), meta_gradients(13, optimizer=optimizer, **setting))
        assert all(grad.norm() > 1e-6 for grad in expected)
        for store in ("device", "host", folder):
            grads = meta_gradients(13, store, optimizer, **setting)
            assert all(torch.equal(one, other) for one, other in zip(grads, expected, strict=True)), (setting, store)
    for one, other in zip(found["native"], meta_gradients(13, optimizer=optimizer), strict=True):
        assert (one - other).norm() <= 1e-9 * other.norm()


@pytest.mark.parametrize("setting", [{"checkpoint_every": 3}, {"checkpoints": 2}], ids=str)
def test_any_story_gives_the_same_bits(setting: dict[str, Any], folder: Path) -> None:
    """Outer gradients on the way, past weights looked at, weights set by hand."""

    @given(events=EVENTS)
    @settings(max_examples=10, deadline=None)
    def check(events: list[tuple[str, Any]]) -> None:
        expected = story(events, **setting)
        for store in ("host", folder):
            found = story(events, store=store, **setting)
            assert all(torch.equal(one, other) for one, other in zip(found, expected, strict=True))

    check()


def test_outer_terms_in_the_loop(folder: Path) -> None:
    def grads(store: Where) -> list[Tensor]:
        model = wide()
        total = torch.zeros(())
        with higher.innerloop_ctx(
            model, momentum(model.parameters()), copy_initial_weights=False, checkpoint_every=2, store=store
        ) as (fnet, diffopt):
            for _ in range(7):
                total = total + diffopt.outer(fnet(X[:5]).square().mean())
                diffopt.step((fnet(X) - Y).square().mean())
        return list(torch.autograd.grad(total, list(model.parameters())))

    expected = grads("device")
    for store in ("host", folder):
        assert all(torch.equal(one, other) for one, other in zip(grads(store), expected, strict=True))


def test_a_constant_is_not_stored_and_may_change_later(folder: Path) -> None:
    """A frozen layer costs nothing, until it is set by hand."""
    written: dict[str, list[int]] = {}
    found = {}
    for name, store in (("device", "device"), ("disk", folder)):
        model = wide()
        for param in model[2].parameters():
            param.requires_grad_(False)
        with higher.innerloop_ctx(
            model, momentum(model.parameters()), copy_initial_weights=False, checkpoint_every=2, store=store
        ) as (fnet, diffopt):
            for step in range(12):
                if step == 7:
                    fnet.update_params([param * 1.1 for param in fnet.parameters()])
                diffopt.step((fnet(X) - Y).square().mean())
                written.setdefault(name, []).append(sum(path.stat().st_size for path in files(folder)))
            outer = (fnet(X) - Y).square().mean()
            found[name] = torch.autograd.grad(outer, [p for p in model.parameters() if p.requires_grad])
    frozen = model[2].weight.nbytes
    assert 0 < written["disk"][6] < frozen < written["disk"][-1]
    assert all(torch.equal(one, other) for one, other in zip(found["device"], found["disk"], strict=True))


# ------------------------------------------------------------------------------------------------ bytes, and counts


def measured(length: int, store: Where, **setting: Any) -> tuple[int, int, higher.Report]:
    """Live bytes after the loop, the peak with the backward, and the report. Batches are made beforehand."""
    model = wide()
    opt = torch.optim.SGD(model.parameters(), lr=1e-3, momentum=0.9)
    context = higher.innerloop_ctx(model, opt, copy_initial_weights=False, store=store, **setting)
    with live_bytes() as live, context as (fnet, diffopt):
        for _ in range(length):
            diffopt.step((fnet(X) - Y).square().mean())
        loop = live.current
        torch.autograd.grad((fnet(X) - Y).square().mean(), list(model.parameters()))
    return loop, live.peak, diffopt.report


def test_carries_on_disk_take_no_live_bytes(folder: Path) -> None:
    device, _, there = measured(40, "device", checkpoint_every=4)
    disk, _, report = measured(40, folder, checkpoint_every=4)
    carry = report.carry_bytes
    assert device - disk > 7 * carry  # of the 10 kept ones the newest and the constant first weights are there anyway
    assert disk < 4 * carry
    assert report.checkpoints_peak == there.checkpoints_peak == 10
    assert report.first_order_runs == there.first_order_runs


@pytest.mark.parametrize("setting", [{"checkpoint_every": 5}, {"checkpoints": 20}, {"checkpoints": 4}], ids=str)
def test_the_laws_of_memory(setting: dict[str, Any], folder: Path) -> None:
    """On the device c + 3 or 5 carries and one step's graph, whatever is stored; of them c or 3 count as carries."""
    graph = graph_bytes(wide(), X)
    for length in (40, 120):
        _, peak, report = measured(length, folder, **setting)
        every, slots = setting.get("checkpoint_every"), setting.get("checkpoints")
        assert peak <= (every + 3 if every else 5) * report.carry_bytes + 1.1 * graph, length
        assert report.carries_peak_bytes <= (every or 3) * report.carry_bytes
        assert report.stored_peak_bytes <= (-(-length // every) if every else slots + 1) * report.carry_bytes


def test_the_report_tells_device_and_store_apart() -> None:
    _, _, device = measured(24, "device", checkpoint_every=4)
    _, _, host = measured(24, "host", checkpoint_every=4)
    carry = host.carry_bytes
    assert (device.stored_bytes, device.stored_peak_bytes, host.stored_bytes) == (0, 0, 0)
    assert device.carries_peak_bytes > 8 * carry
    assert host.carries_peak_bytes <= 5 * carry
    assert 4 * carry < host.stored_peak_bytes <= 5 * carry  # of 6 kept ones the newest stays; the first has no momentum
    assert "stored" not in repr(device)
    assert repr(host).endswith(f"\n  stored: 0 B, {format_bytes(host.stored_peak_bytes)} at most")


def test_the_carry_before_is_fetched_ahead(monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[tuple[str, int]] = []
    read, fetch = Carries._read, HostStore.prefetch

    def reading(self: Carries, segment: Segment, held: Held) -> Carry:
        if held.may_cool:
            asked.append(("read", held.time))
        return read(self, segment, held)

    def fetching(self: HostStore, stored: Any) -> None:
        asked.append(("fetch", stored._packed.time))
        fetch(self, stored)

    monkeypatch.setattr(Carries, "_read", reading)
    monkeypatch.setattr(HostStore, "prefetch", fetching)
    measured(11, "host", checkpoint_every=4)
    whole = [("read", 8), ("fetch", 4), ("read", 4), ("fetch", 0), ("read", 0)]
    assert list(dict.fromkeys(asked)) == whole


# ---------------------------------------------------------------------------------------------- modified in place


@pytest.mark.parametrize("when", [1, 5])
def test_R4_a_weight_modified_in_place_after_it_was_kept(when: int, folder: Path) -> None:
    """While it is hot, the newest that was kept, it raises as on the device; once it is stored it does no harm."""
    for store in ("device", "host", folder):
        model = net()
        with higher.innerloop_ctx(
            model, momentum(model.parameters()), copy_initial_weights=False, checkpoint_every=3, store=store
        ) as (fnet, diffopt):
            first = list(fnet.parameters())
            for step in range(8):
                if step == when:
                    with torch.no_grad():
                        first[0].add_(1)
                diffopt.step((fnet(X) - Y).square().mean())
            outer = (fnet(X) - Y).square().mean()
            if store == "device" or when == 1:
                with pytest.raises(ExternalModifiedError, match=r"time 0 \(shape \(4, 3\)\) was modified in place"):
                    torch.autograd.grad(outer, list(model.parameters()))
            else:
                torch.manual_seed(0)
                assert torch.autograd.grad(outer, list(model.parameters()))[0].isfinite().all()
        del outer, fnet, diffopt, first


def test_a_stored_weight_may_be_modified_in_place(folder: Path) -> None:
    def grads(store: Where, modify: bool) -> list[Tensor]:
        model = wide()
        with higher.innerloop_ctx(model, momentum(model.parameters()), checkpoint_every=3, store=store) as (fnet, dopt):
            scale = torch.ones((), requires_grad=True)
            for step in range(8):
                dopt.step((fnet(X * scale) - Y).square().mean())
                if step == 2:
                    kept = [param.detach() for param in fnet.parameters()]
                if step == 6 and modify:
                    for tensor in kept:
                        tensor.add_(1)
            return list(torch.autograd.grad((fnet(X) - Y).square().mean(), [scale]))

    expected = grads("device", modify=False)
    for store in ("host", folder):
        assert torch.equal(grads(store, modify=True)[0], expected[0])


def test_R4_a_constant_modified_in_place_raises(folder: Path) -> None:
    for store in ("device", "host", folder):
        model = wide()
        model[0].bias.requires_grad_(False)
        with higher.innerloop_ctx(
            model, momentum(model.parameters()), copy_initial_weights=False, checkpoint_every=3, store=store
        ) as (fnet, diffopt):
            for _ in range(8):
                diffopt.step((fnet(X) - Y).square().mean())
            outer = (fnet(X) - Y).square().mean()
        with torch.no_grad():
            list(fnet.parameters())[1].add_(1)
        with pytest.raises(ExternalModifiedError, match=r"\(shape \(64,\)\) was modified in place"):
            torch.autograd.grad(outer, [model[0].weight])
        del outer, fnet, diffopt


def test_what_changes_now_and_then_is_no_constant() -> None:
    """Else weights that take turns would stay on the device, one copy for each turn."""
    constants, one, two = Constants(), torch.ones(2), torch.ones(3)
    held = [Carry(weights, [], ()) for weights in ([one, two], [one + 1, two])]
    held.append(Carry([held[1].weights[0], two + 1], [], ()))
    seen = []
    for carry in held:
        constants.narrow(carry)
        seen.append([weight in constants for weight in carry.weights])
    assert seen == [[True, True], [False, True], [False, False]]


def test_R4_for_a_constant_of_a_stored_carry(folder: Path) -> None:
    for where in ("host", folder):
        store, constants = make_store(where, Ledger()), Constants()
        assert store is not None
        frozen, moving = torch.ones(3), torch.ones(2)
        for weights in ([frozen, moving], [frozen, moving + 1]):
            carry = Carry(weights, [], ())
            constants.narrow(carry)
        stored = store.put(carry, 7, constants)
        assert stored.nbytes == moving.nbytes
        assert stored.get().weights[0].data_ptr() == frozen.data_ptr()
        frozen.add_(1)
        with pytest.raises(ExternalModifiedError, match=r"time 7 \(shape \(3,\)\) was modified in place"):
            stored.get()


# --------------------------------------------------------------------------------------------------------- faults


def run(folder: Path, meet: Callable[[int], None] = lambda _: None) -> list[Tensor]:
    return meta_gradients(13, folder, meet=meet, checkpoint_every=3)


def unharmed(folder: Path) -> bool:
    """Nothing is left, and a second run works."""
    left = list(folder.iterdir())
    expected = meta_gradients(13, "device", checkpoint_every=3)
    again = all(torch.equal(one, other) for one, other in zip(run(folder), expected, strict=True))
    return not left and again and not list(folder.iterdir())


def raised(folder: Path, error: type[BaseException], meet: Callable[[int], None], message: str | None) -> None:
    with pytest.raises(error, match=message):
        run(folder, meet)


def full_disk(monkeypatch: pytest.MonkeyPatch) -> None:
    """Files that are made from now on are on a device that is full."""
    real = Path.open

    def opened(self: Path, mode: str = "r", *args: Any, **kwargs: Any) -> Any:
        return real(Path("/dev/full"), "wb") if "x" in mode else real(self, mode, *args, **kwargs)

    monkeypatch.setattr(Path, "open", opened)


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="/dev/full is the full disk of this test")
@pytest.mark.parametrize("setting", [{"checkpoint_every": 3}, {"checkpoints": 2}], ids=str)
def test_a_full_disk_raises_at_the_step_which_can_be_taken_again(setting: dict[str, Any], folder: Path) -> None:
    refused, found = [], []
    for store in ("device", folder):
        model = wide()
        with higher.innerloop_ctx(
            model, momentum(model.parameters()), copy_initial_weights=False, store=store, **setting
        ) as (fnet, diffopt):
            for step in range(10):
                loss = (fnet(X) - Y).square().mean()
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
            outer = (fnet(X) - Y).square().mean()
        found.append(torch.autograd.grad(outer, list(model.parameters())))
    assert all(torch.equal(one, other) for one, other in zip(*found, strict=True))
    assert len(refused) >= 3
    for said in refused:
        assert re.match(r"The carry of step \d+, .*No space left on device\. .*checkpoints=10\. OSError", said)


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="/dev/full is the full disk of this test")
def test_a_disk_that_is_full_in_the_backward(folder: Path) -> None:
    """A retained graph needs the newest kept carry again, so it goes to the disk when another is read."""
    model = wide()
    with higher.innerloop_ctx(
        model, momentum(model.parameters()), copy_initial_weights=False, checkpoint_every=3, store=folder
    ) as (fnet, diffopt):
        for _ in range(8):
            diffopt.step((fnet(X) - Y).square().mean())
        outer = (fnet(X) - Y).square().mean()
    with pytest.MonkeyPatch.context() as monkeypatch:
        full_disk(monkeypatch)
        with pytest.raises(StoreError, match=r"carry of step 6.*No space left"):
            torch.autograd.grad(outer, list(model.parameters()), retain_graph=True)
    again = torch.autograd.grad(outer, list(model.parameters()))
    assert all(grad.isfinite().all() for grad in again)
    assert list(folder.iterdir()) == []
    del outer, fnet, diffopt


def truncate(path: Path) -> None:
    path.write_bytes(path.read_bytes()[:-100])


def lengthen(path: Path) -> None:
    path.write_bytes(path.read_bytes() + b"\0")


def flip(place: int) -> Callable[[Path], None]:
    def flipped(path: Path) -> None:
        data = bytearray(path.read_bytes())
        data[place] ^= 4
        path.write_bytes(data)

    return flipped


def exchange(path: Path) -> None:
    """With a whole file of the same size, of another step."""
    others = [other for other in files(path.parent.parent) if other.stat().st_size == path.stat().st_size]
    path.write_bytes(next(other for other in others if other.read_bytes() != path.read_bytes()).read_bytes())


DAMAGES: dict[str, tuple[Callable[[Path], None], str]] = {
    "removed": (Path.unlink, "Cannot read the carry of step .* No such file.*Run the inner loop again"),
    "truncated": (truncate, r"it has \d+ bytes instead of \d+"),
    "longer": (lengthen, r"it has \d+ bytes instead of \d+"),
    "empty": (lambda path: path.write_bytes(b"") and None, "it has 0 bytes"),
    "flipped in the header": (flip(30), "its checksum is"),
    "flipped in the weights": (flip(-100), "its checksum is"),
    "flipped in the checksum": (flip(-1), "its checksum is"),
    "another carry": (exchange, "its checksum is"),
}


@pytest.mark.parametrize("damage", DAMAGES)
def test_a_damaged_file_never_becomes_a_gradient(damage: str, folder: Path) -> None:
    def meet(step: int) -> None:
        if step == 12:
            DAMAGES[damage][0](files(folder)[2])

    raised(folder, StoreError, meet, DAMAGES[damage][1])
    assert unharmed(folder)


def test_a_read_that_ends_early(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The length that the file system tells is right, and not all of it can be read."""
    real = os.fstat

    def longer(fd: int) -> os.stat_result:
        return os.stat_result([*real(fd)[:6], real(fd).st_size + 100, 0, 0, 0])

    def meet(step: int) -> None:
        if step == 13:
            for path in files(folder):
                truncate(path)
            monkeypatch.setattr(os, "fstat", longer)

    try:
        raised(folder, StoreError, meet, "ended while it was read")
    finally:
        monkeypatch.setattr(os, "fstat", real)
    assert unharmed(folder)


@pytest.mark.parametrize("step", [5, 13])
def test_a_directory_that_is_removed(step: int, folder: Path) -> None:
    """In the loop it is missed by the next write, else by the backward."""

    def meet(now: int) -> None:
        if now == step:
            for path in files(folder):
                path.unlink()
            next(folder.iterdir()).rmdir()

    raised(folder, StoreError, meet, "written to .* No such file" if step == 5 else "Cannot read .* No such file")
    assert unharmed(folder)


class BoomError(Exception):
    pass


@pytest.mark.parametrize("error", [BoomError, KeyboardInterrupt])
def test_an_exception_in_the_loop_and_in_the_backward(error: type[BaseException], folder: Path) -> None:
    def in_the_loop(step: int) -> None:
        if step == 11:
            assert len(files(folder)) == 3
            raise error

    raised(folder, error, in_the_loop, None)
    assert unharmed(folder)

    def fail(_: Tensor) -> None:
        assert files(folder)
        raise error

    model = net()
    with (
        pytest.raises(error),
        higher.innerloop_ctx(
            model, momentum(model.parameters()), copy_initial_weights=False, checkpoint_every=3, store=folder
        ) as (fnet, diffopt),
    ):
        for _ in range(11):
            diffopt.step((fnet(X) - Y).square().mean())
        next(fnet.parameters(time=4)).register_hook(fail)
        (fnet(X) - Y).square().mean().backward()
    del fnet, diffopt
    assert unharmed(folder)


def test_ctrl_c_while_a_carry_is_written(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def interrupted(self: Path, target: Path) -> None:
        assert self.exists()
        raise KeyboardInterrupt

    monkeypatch.setattr(Path, "replace", interrupted)
    model = wide()
    with higher.innerloop_ctx(
        model, momentum(model.parameters()), copy_initial_weights=False, checkpoint_every=1, store=folder
    ) as (fnet, diffopt):
        diffopt.step((fnet(X) - Y).square().mean())
        with pytest.raises(KeyboardInterrupt):
            diffopt.step((fnet(X) - Y).square().mean())
        assert files(folder) == []
        monkeypatch.undo()
        diffopt.step((fnet(X) - Y).square().mean())
        assert len(files(folder)) == 1
    del fnet, diffopt
    assert unharmed(folder)


def test_files_go_as_soon_as_no_gradient_can_need_them(folder: Path) -> None:
    model = net()
    with higher.innerloop_ctx(
        model, momentum(model.parameters()), copy_initial_weights=False, checkpoint_every=2, store=folder
    ) as (fnet, diffopt):
        seen = []
        for _ in range(8):
            diffopt.step((fnet(X) - Y).square().mean())
            seen.append(len(files(folder)))
        next(fnet.parameters(time=2)).register_hook(lambda _: seen.append(len(files(folder))))
        outer = (fnet(X) - Y).square().mean()
        (grad,) = torch.autograd.grad(outer, [model[0].weight])
        assert seen == [0, 0, 1, 1, 2, 2, 3, 3, 1]
        assert len(list(folder.iterdir())) == 1  # the empty directory, for further steps
    assert list(folder.iterdir()) == []
    assert grad.norm() > 0
    x = X.clone()
    for _ in range(6):  # steps after the context, which make files again
        diffopt.step(lambda fmodel, x: (fmodel(x) - Y).square().mean(), x)
    assert len(files(folder)) == 2
    (fnet(X) - Y).square().mean().backward(inputs=list(fnet.parameters(time=9)))
    assert files(folder) == []
    del fnet, diffopt, outer


SCRIPT = """
import os, signal, sys, time, torch
import lowmem_higher as higher
signal.signal(signal.SIGINT, signal.default_int_handler)  # a job in the background is started with it ignored
model = torch.nn.Linear(3, 1)
opt = torch.optim.SGD(model.parameters(), lr=0.1)
with higher.innerloop_ctx(model, opt, checkpoint_every=1, store=sys.argv[1]) as (fnet, diffopt):
    for step in range(10**6):
        diffopt.step(fnet(torch.ones(2, 3)).square().mean())
        if step == 5:
            if os.fork() == 0:
                del fnet, diffopt
                sys.exit()  # a child that ends as Python ends, not by os._exit
            os.wait()
            print("ready", flush=True)
        time.sleep(0.01)
"""


def test_ctrl_c_and_a_forked_process(folder: Path) -> None:
    """The end of a forked process takes no file away; the interrupted one takes all."""
    command = [sys.executable, "-W", "ignore::DeprecationWarning", "-c", textwrap.dedent(SCRIPT), str(folder)]
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True) as process:
        assert process.stdout is not None
        assert process.stderr is not None
        try:
            assert process.stdout.readline() == "ready\n", process.stderr.read()
            assert len(files(folder)) >= 5
            process.send_signal(signal.SIGINT)
            _, said = process.communicate(timeout=60)
        finally:
            process.kill()
    assert said.strip().endswith("KeyboardInterrupt")
    assert process.returncode != 0
    assert list(folder.iterdir()) == []


def test_two_runs_share_a_directory(folder: Path) -> None:
    expected = meta_gradients(13, "device", checkpoint_every=3)
    inner: list[list[Tensor]] = []

    def meet(step: int) -> None:
        if step == 8:
            state = torch.get_rng_state()
            inner.append(run(folder))
            torch.set_rng_state(state)

    for found in (run(folder, meet), inner[0]):
        assert all(torch.equal(one, other) for one, other in zip(found, expected, strict=True))


def test_no_host_memory(monkeypatch: pytest.MonkeyPatch) -> None:
    def failing(*args: Any, **kwargs: Any) -> Tensor:
        raise RuntimeError("cannot allocate")

    monkeypatch.setattr("lowmem_higher.store.blank", failing)
    with pytest.raises(StoreError, match=r"no host memory for the carry of step 0, .*cannot allocate\n.*on disk"):
        measured(8, "host", checkpoint_every=2)


@pytest.mark.parametrize(
    ("store", "setting", "error", "message"),
    [
        (3, {"checkpoint_every": 2}, TypeError, "store=3 is a int; it must be 'device', 'host' or the path"),
        (None, {"checkpoint_every": 2}, TypeError, "store=None is a NoneType"),
        (b"carries", {"checkpoint_every": 2}, TypeError, "is a bytes"),
        ("", {"checkpoint_every": 2}, ValueError, "store='' is neither"),
        ("hots", {"checkpoint_every": 2}, ValueError, r"neither 'device' nor 'host' nor .* os.makedirs\('hots'\)"),
        (Path("/dev/null"), {"checkpoint_every": 2}, ValueError, "directory that exists"),
        ("host", {}, ValueError, "the full unroll keeps none.*checkpoint_every=10, store="),
        ("/proc", {"checkpoints": 2}, StoreError, "No directory for this run's carries can be made in /proc"),
    ],
)
def test_bad_settings(store: Any, setting: dict[str, Any], error: type[Exception], message: str) -> None:
    model = net()
    opt = momentum(model.parameters())
    with pytest.raises(error, match=message), higher.innerloop_ctx(model, opt, store=store, **setting):
        pass


# ------------------------------------------------------------------------------------------------------------ CUDA


def on_cuda(length: int, store: Where, **setting: Any) -> tuple[list[Tensor], int, higher.Report]:
    """Gradients, and the bytes of the device that the loop has added."""
    model = nn.Sequential(nn.Linear(64, 512), nn.Tanh(), nn.Linear(512, 1)).cuda()
    with torch.no_grad():
        for index, param in enumerate(model.parameters()):
            param.copy_(torch.sin(torch.arange(param.numel()) + index).reshape(param.shape) / 8)
    x = torch.cos(torch.arange(64 * 8.0)).reshape(8, 64).cuda()
    torch.cuda.synchronize()
    before = torch.cuda.memory_allocated()
    opt = torch.optim.Adam(model.parameters(), lr=1e-3)
    with higher.innerloop_ctx(model, opt, copy_initial_weights=False, store=store, **setting) as (fnet, diffopt):
        for _ in range(length):
            diffopt.step(fnet(x).square().mean())
        torch.cuda.synchronize()
        taken = torch.cuda.memory_allocated() - before
        grads = torch.autograd.grad(fnet(x).mean(), list(model.parameters()))
    return list(grads), taken, diffopt.report


@pytest.mark.cuda
@pytest.mark.parametrize("setting", [{"checkpoint_every": 4}, {"checkpoints": 5}], ids=str)
def test_cuda_the_same_bits_and_less_on_the_device(setting: dict[str, Any], folder: Path) -> None:
    expected, most, _ = on_cuda(40, "device", **setting)
    for store in ("host", folder):
        for _ in range(3):  # a race would not lose every time
            found, taken, report = on_cuda(40, store, **setting)
            assert all(torch.equal(one, other) for one, other in zip(found, expected, strict=True))
            assert taken < most - 2 * report.carry_bytes


@pytest.mark.cuda
def test_cuda_a_write_in_place_during_the_copy_is_noticed() -> None:
    weight = torch.ones(1 << 26, device="cuda")
    store: Store | None = make_store("host", Ledger())
    assert store is not None
    stored = store.put(Carry([weight], [], ()), 3, Constants())
    weight.add_(1)  # on the main stream, which does not wait for the copy
    with pytest.raises(ExternalModifiedError, match="time 3"):
        stored.get()


@pytest.mark.cuda
def test_cuda_pinned_memory_and_a_prefetch() -> None:
    ledger = Ledger()
    store = HostStore(ledger)
    weights = [torch.randn(1 << 16, device="cuda") for _ in range(2)]
    first, second = [store.put(Carry([weight], [], ()), time, Constants()) for time, weight in enumerate(weights)]
    store.prefetch(first)
    assert ledger.carries_bytes == weights[0].nbytes
    store.prefetch(second)
    assert ledger.carries_bytes == weights[1].nbytes  # the other was given up
    for stored, weight in ((first, weights[0]), (second, weights[1])):
        assert torch.equal(stored.get().weights[0], weight)
