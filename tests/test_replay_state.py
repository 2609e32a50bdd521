"""Rule R2: what a replay puts back before it runs, and takes away after it, also when it fails (rule R12)."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import lowmem_higher as higher
from lowmem_higher.replay_state import Ambient, ModuleState, capture_rng, rng_restored, same_rng

pytestmark = pytest.mark.usefixtures("float64")

Read, Write = Callable[[], Any], Callable[[Any], Any]


def attribute(owner: Any, name: str) -> tuple[Read, Write]:
    return lambda: getattr(owner, name), lambda value: setattr(owner, name, value)


def deterministic() -> tuple[bool, bool]:
    return torch.are_deterministic_algorithms_enabled(), torch.is_deterministic_algorithms_warn_only_enabled()


backends = torch.backends
# Every switch, by its public interface: how to read it, how to set it, and a value that is not the usual one.
SWITCHES: dict[str, tuple[Read, Write, Any]] = {
    "grad mode": (torch.is_grad_enabled, torch._C._set_grad_enabled, False),
    "default dtype": (torch.get_default_dtype, torch.set_default_dtype, torch.float32),
    "cudnn.enabled": (*attribute(backends.cudnn, "enabled"), False),
    "cudnn.benchmark": (*attribute(backends.cudnn, "benchmark"), True),
    "cudnn.deterministic": (*attribute(backends.cudnn, "deterministic"), True),
    "cudnn.allow_tf32": (*attribute(backends.cudnn, "allow_tf32"), False),
    "flash attention": (backends.cuda.flash_sdp_enabled, backends.cuda.enable_flash_sdp, False),
    "memory-efficient attention": (
        backends.cuda.mem_efficient_sdp_enabled,
        backends.cuda.enable_mem_efficient_sdp,
        False,
    ),
    "math attention": (backends.cuda.math_sdp_enabled, backends.cuda.enable_math_sdp, False),
    "cudnn attention": (backends.cuda.cudnn_sdp_enabled, backends.cuda.enable_cudnn_sdp, False),
    "matmul precision": (torch.get_float32_matmul_precision, torch.set_float32_matmul_precision, "high"),
    "fp16 reduction": (*attribute(backends.cuda.matmul, "allow_fp16_reduced_precision_reduction"), False),
    "bf16 reduction": (*attribute(backends.cuda.matmul, "allow_bf16_reduced_precision_reduction"), False),
    "deterministic algorithms": (
        deterministic,
        lambda value: torch.use_deterministic_algorithms(value[0], warn_only=value[1]),
        (True, True),
    ),
    "default device": (lambda: torch.empty(0).device, torch.set_default_device, torch.device("meta")),
}
for device in ("cpu", "cuda"):
    SWITCHES[f"autocast on {device}"] = (
        lambda device=device: torch.is_autocast_enabled(device),
        lambda value, device=device: torch.set_autocast_enabled(device, value),
        True,
    )
    SWITCHES[f"autocast dtype on {device}"] = (
        lambda device=device: torch.get_autocast_dtype(device),
        lambda value, device=device: torch.set_autocast_dtype(device, value),
        torch.float32,
    )
every_switch = pytest.mark.parametrize("name", SWITCHES)


class BlockError(Exception):
    """What goes wrong inside a block."""


def fail_unless(condition: bool) -> None:
    assert condition
    raise BlockError


class Flipped:
    """A switch set to its unusual value inside the block."""

    def __init__(self, name: str) -> None:
        self.read, self.write, self.value = SWITCHES[name]

    def __enter__(self) -> Flipped:
        self.before = self.read()
        assert self.before != self.value
        self.write(self.value)
        return self

    def __exit__(self, *_: object) -> None:
        # The default device reads "cpu" when none was set: None takes the mode away again.
        self.write(None if isinstance(self.before, torch.device) else self.before)


# Ambient


@every_switch
def test_a_switch_is_captured_and_restored(name: str) -> None:
    with Flipped(name) as switch:
        then = Ambient.capture()
    now = Ambient.capture()
    with then.restored(now):
        assert switch.read() == switch.value
    assert switch.read() == switch.before
    with Flipped(name), now.restored(then):
        assert switch.read() == switch.before


@every_switch
def test_a_switch_is_put_back_after_an_exception(name: str) -> None:
    with Flipped(name) as switch:
        then = Ambient.capture()
    restored = then.restored(Ambient.capture())
    with pytest.raises(BlockError), restored:
        fail_unless(switch.read() == switch.value)
    assert switch.read() == switch.before


@pytest.mark.parametrize("name", [name for name in SWITCHES if name != "default device"])  # a mode, not a switch
def test_a_switch_that_the_block_leaves_changed_is_put_back(name: str) -> None:
    with torch.no_grad():
        then = Ambient.capture()
    read, write, value = SWITCHES[name]
    before = read()
    with then.restored(Ambient.capture()):
        write(value)
    try:
        assert read() == before
    finally:
        write(before)


def test_equal_moments_are_one_object() -> None:
    here = Ambient.capture()
    with torch.no_grad():
        without_grad = Ambient.capture()
        assert without_grad is not here
    assert Ambient.capture() is here
    with torch.no_grad():
        assert Ambient.capture() is without_grad
    assert here.grad_enabled
    assert not without_grad.grad_enabled
    assert not here.autocast_enabled
    with torch.autocast("cpu", torch.bfloat16):
        assert Ambient.capture().autocast_enabled


def test_casts_cached_by_autocast_stay_out_of_a_replay() -> None:
    """A weight cast under autocast is cached until the outermost block ends: a replay must cast its own weight."""
    layer, x = nn.Linear(2, 2).float(), torch.ones(1, 2, dtype=torch.float32)
    with torch.autocast("cpu", torch.bfloat16):
        then = Ambient.capture()
        before = layer(x)
        with torch.no_grad():
            layer.weight.data = layer.weight.data + 1  # same tensor object, same place in the cache
        with then.restored(Ambient.capture()):
            assert torch.is_autocast_enabled("cpu")
            assert not torch.is_autocast_cache_enabled()
            assert not torch.equal(layer(x), before)
        assert torch.is_autocast_cache_enabled()


class Probe(nn.Module):
    """Notes how a switch stands whenever it is called."""

    def __init__(self, read: Read, seen: list[tuple[int, Any]]) -> None:
        super().__init__()
        self.layer, self.watch = nn.Linear(3, 3), [read, seen]

    def forward(self, x: Tensor, t: int) -> Tensor:
        read, seen = self.watch
        seen.append((t, read()))
        return self.layer(x)


@pytest.mark.parametrize("replay", ["native", "torch"])
@every_switch
def test_a_replay_runs_forward_under_the_switches_of_its_step(name: str, replay: str) -> None:
    read, _, value = SWITCHES[name]
    usual, seen = read(), []
    probe, x = Probe(read, seen), torch.randn(4, 3)
    model = nn.ModuleDict({"probe": probe, "head": nn.Linear(3, 1)})
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    with higher.innerloop_ctx(model, optimizer, copy_initial_weights=False, checkpoint_every=3, replay=replay) as (
        fmodel,
        diffopt,
    ):
        for t in range(5):
            if t in (1, 4):
                with Flipped(name):
                    features = fmodel["probe"](x, t)
            else:
                features = fmodel["probe"](x, t)
            diffopt.step(fmodel["head"](features).square().mean())
        outer = fmodel["head"](x).mean()
    in_loop = len(seen)
    with Flipped(name) if name != "default device" else torch.no_grad():  # as it happens to stand later
        torch.autograd.grad(outer, list(model["head"].parameters()))
    assert in_loop == 5
    # What was made without a graph, by a model call, is held by value: there is nothing to run again.
    assert {t for t, _ in seen[in_loop:]} == ({0, 2, 3} if name == "grad mode" else {0, 1, 2, 3, 4})
    assert all(found == (value if t in (1, 4) else usual) for t, found in seen), seen


# Random numbers


def test_random_states_are_captured_compared_and_restored() -> None:
    then = capture_rng([])
    drawn = torch.rand(3)
    assert not same_rng(then, capture_rng([]))
    later = capture_rng([])
    with rng_restored(then):
        assert torch.equal(torch.rand(3), drawn)
        torch.rand(100)
    assert same_rng(later, capture_rng([]))


def test_random_states_are_put_back_after_an_exception() -> None:
    then = capture_rng([])
    torch.rand(3)
    later = capture_rng([])
    with pytest.raises(BlockError), rng_restored(then):
        fail_unless(torch.rand(5).shape == (5,))
    assert same_rng(later, capture_rng([]))


def test_no_random_state_means_hands_off() -> None:
    before = capture_rng([])
    with rng_restored(None):
        torch.rand(3)
    assert not same_rng(before, capture_rng([]))


def test_a_captured_state_does_not_follow_the_generator() -> None:
    then = capture_rng([])
    copy = [(device, state.clone()) for device, state in then]
    torch.rand(1000)
    assert same_rng(then, tuple(copy))


@pytest.mark.cuda
def test_random_states_of_a_gpu_are_restored() -> None:
    gpu = torch.device("cuda", 0)
    then = capture_rng([gpu])
    drawn = torch.rand(3, device=gpu)
    later = capture_rng([gpu])
    assert not same_rng(then, later)
    with rng_restored(then):
        assert torch.equal(torch.rand(3, device=gpu), drawn)
    assert same_rng(later, capture_rng([gpu]))


# Modules


def make_module() -> nn.Module:
    module = nn.Sequential(nn.Dropout(0.3), nn.Linear(2, 2), nn.BatchNorm1d(2))
    module.scale, module.mode, module.mask, module.extra = 2.0, "mean", torch.ones(2), {"k": 1}
    return module


def test_attributes_are_captured_and_applied() -> None:
    module = make_module()
    then = ModuleState.capture(list(module.modules()))
    mask = module.mask
    module.eval()
    module[0].p, module.scale, module.mode, module.mask = 0.9, 3.0, "sum", torch.zeros(2)
    new = module.mask
    with then.applied(list(module.modules())):
        assert module.training
        assert all(part.training for part in module)
        assert (module[0].p, module.scale, module.mode) == (0.3, 2.0, "mean")
        assert module.mask is mask
    assert not any(part.training for part in module.modules())
    assert (module[0].p, module.scale, module.mode) == (0.9, 3.0, "sum")
    assert module.mask is new


def test_attributes_are_put_back_after_an_exception() -> None:
    module = make_module()
    then = ModuleState.capture(list(module.modules()))
    module.eval()

    def block() -> None:
        module.left_behind = torch.ones(3)
        module.scale = 7.0
        raise BlockError

    with pytest.raises(BlockError), then.applied(list(module.modules())):
        block()
    assert not module.training
    assert module.scale == 2.0
    assert not hasattr(module, "left_behind")


def test_what_a_block_sets_is_taken_away() -> None:
    """A forward that stores its last features must not leave them on the module that replays run on."""
    module = make_module()
    then = ModuleState.capture(list(module.modules()))
    with then.applied(list(module.modules())):
        module.features = torch.ones(3)
        module.count = 5
        module[1].features = torch.ones(3)
    assert not hasattr(module, "features")
    assert not hasattr(module, "count")
    assert not hasattr(module[1], "features")


def test_parameters_and_buffers_are_not_part_of_it() -> None:
    module = make_module()
    then = ModuleState.capture(list(module.modules()))
    with then.applied(list(module.modules())):
        module[1]._parameters["weight"] = nn.Parameter(torch.zeros(2, 2))
        module[2].register_buffer("running_mean", torch.ones(2))
    assert module[1].weight.abs().sum() == 0
    assert module[2].running_mean.sum() == 2


def test_an_unchanged_state_is_shared() -> None:
    """A thousand steps keep one object."""
    module = make_module()
    first = ModuleState.capture(list(module.modules()))
    assert ModuleState.capture(list(module.modules()), first) is first
    module[0].p = 0.4
    second = ModuleState.capture(list(module.modules()), first)
    assert second is not first
    module.mask = module.mask.clone()
    third = ModuleState.capture(list(module.modules()), second)
    assert third is not second
    module.mask.add_(1)
    assert ModuleState.capture(list(module.modules()), third) is not third


def test_R4_a_tensor_attribute_that_was_modified_is_refused() -> None:
    module = make_module()
    then = ModuleState.capture(list(module.modules()))
    module.mask.add_(1)
    applied = then.applied(list(module.modules()))
    with pytest.raises(higher.ExternalModifiedError, match=r"plain attribute.*mask.*register_buffer"), applied:
        pass
    assert module.mask.sum() == 4


def test_steps_share_their_module_state() -> None:
    model, x = nn.Sequential(nn.Linear(3, 3), nn.Dropout(0.5)), torch.randn(4, 3)
    with higher.innerloop_ctx(model, torch.optim.SGD(model.parameters(), lr=0.1), checkpoint_every=10) as (
        fmodel,
        diffopt,
    ):
        for t in range(6):
            fmodel.train(t != 3)
            diffopt.step(fmodel(x).square().mean())
        records = []
        record = diffopt._run._tail
        while record is not None:
            records.append(record)
            record = record.previous
    states = [record.states[0] for record in reversed(records)]
    assert states[0] is states[1] is states[2]
    assert states[4] is states[5]
    assert states[3] is not states[2]
