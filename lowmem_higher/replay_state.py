"""What a replay puts back before it runs, and takes away after it: rule R2 of the replay contract.

Three kinds of state decide what a piece of code computes besides its arguments, and each has its own capture here:

* `Ambient`: the switches of the thread (grad mode, autocast, back-end flags). Cheap to read: every call has one.
* random number generators: read around calls that may draw from them, kept only if they did.
* `ModuleState`: the plain attributes of every submodule (`training`, a dropout rate, an adapter switched off).

Each is restored in a `with` block, so an exception leaves everything as it was (rule R12).
"""

from __future__ import annotations

from collections.abc import Callable, Container, Iterable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.overrides import _get_current_function_mode_stack
from torch.utils._device import DeviceContext

from lowmem_higher.errors import ExternalModifiedError

_AUTOCAST_DEVICES = ("cpu", "cuda")


def _set_deterministic(value: tuple[bool, bool]) -> None:
    torch.use_deterministic_algorithms(value[0], warn_only=value[1])


def _autocast_switches(device: str) -> list[tuple[Callable[[], Any], Callable[[Any], None]]]:
    return [
        (lambda: torch.is_autocast_enabled(device), lambda value: torch.set_autocast_enabled(device, value)),
        (lambda: torch.get_autocast_dtype(device), lambda value: torch.set_autocast_dtype(device, value)),
    ]


def _set_matmul(name: str) -> Callable[[Any], None]:
    return lambda value: setattr(torch.backends.cuda.matmul, name, value)


def _default_device() -> torch.device | None:
    """The device of the innermost `with torch.device(...)`, None outside of any."""
    for mode in reversed(_get_current_function_mode_stack()):
        if isinstance(mode, DeviceContext):
            return mode.device
    return None


# Every switch that changes what a call computes: (read, write).
_SWITCHES: list[tuple[Callable[[], Any], Callable[[Any], Any]]] = [
    (torch.is_grad_enabled, torch._C._set_grad_enabled),
    (torch.get_default_dtype, torch.set_default_dtype),
    *(switch for device in _AUTOCAST_DEVICES for switch in _autocast_switches(device)),
    (torch._C._get_cudnn_enabled, torch._C._set_cudnn_enabled),
    (torch._C._get_cudnn_benchmark, torch._C._set_cudnn_benchmark),
    (torch._C._get_cudnn_deterministic, torch._C._set_cudnn_deterministic),
    (torch._C._get_cudnn_allow_tf32, torch._C._set_cudnn_allow_tf32),
    (torch._C._get_flash_sdp_enabled, torch._C._set_sdp_use_flash),
    (torch._C._get_mem_efficient_sdp_enabled, torch._C._set_sdp_use_mem_efficient),
    (torch._C._get_math_sdp_enabled, torch._C._set_sdp_use_math),
    (torch._C._get_cudnn_sdp_enabled, torch._C._set_sdp_use_cudnn),
    (torch.get_float32_matmul_precision, torch.set_float32_matmul_precision),
    *(
        (getattr(torch._C, f"_get_cublas_{name}"), _set_matmul(name))
        for name in ("allow_fp16_reduced_precision_reduction", "allow_bf16_reduced_precision_reduction")
    ),
    (_default_device, lambda device: None),  # a context, entered by `_restored`
    (
        lambda: (torch.are_deterministic_algorithms_enabled(), torch.is_deterministic_algorithms_warn_only_enabled()),
        _set_deterministic,
    ),
]
_DEVICE = [read for read, _ in _SWITCHES].index(_default_device)
_READERS = [read for read, _ in _SWITCHES]


def _read_switches() -> tuple[Any, ...]:
    return tuple([read() for read in _READERS])


@dataclass(frozen=True, eq=False)
class Ambient:
    """The switches of this thread at one moment. Equal moments share one object, so that identity is equality."""

    switches: tuple[Any, ...]

    @staticmethod
    def capture() -> Ambient:
        """Read the switches now (about 2 microseconds)."""
        switches = _read_switches()
        ambient = _ambients.get(switches)
        if ambient is None:
            ambient = _ambients[switches] = Ambient(switches)
        return ambient

    @property
    def grad_enabled(self) -> bool:
        """Whether gradients were being recorded."""
        return bool(self.switches[0])

    @property
    def autocast_enabled(self) -> bool:
        """Whether autocast was on for any device."""
        return any(self.switches[2 : 2 + 2 * len(_AUTOCAST_DEVICES) : 2])

    def restored(self, now: Ambient) -> AbstractContextManager[None]:
        """Set the switches to this moment inside the block; `now` is how they stand."""
        return _UNCHANGED if now is self and not self.autocast_enabled else self._restored()

    @contextmanager
    def _restored(self) -> Iterator[None]:
        # Autocast's cache of cast weights is kept out: a weight cast for one replay must not serve another.
        now = _read_switches()
        cache = torch.is_autocast_cache_enabled()
        try:
            torch.set_autocast_cache_enabled(False)
            _write_differences(now, self.switches)
            wanted, present = self.switches[_DEVICE], now[_DEVICE]
            with nullcontext() if wanted == present else torch.device(wanted or "cpu"):
                yield
        finally:
            _write_differences(_read_switches(), now)
            torch.set_autocast_cache_enabled(cache)


_ambients: dict[tuple[Any, ...], Ambient] = {}
_UNCHANGED = nullcontext()


def _write_differences(now: tuple[Any, ...], wanted: tuple[Any, ...]) -> None:
    if now != wanted:
        for (_, write), before, after in zip(_SWITCHES, now, wanted, strict=True):
            if before != after:
                write(after)


RngState = tuple[tuple[torch.device, Tensor], ...]
_CPU = torch.device("cpu")


def capture_rng(devices: Iterable[torch.device]) -> RngState:
    """The states of the default generators of the CPU and of `devices` (5 KB for the CPU, 16 bytes for a GPU)."""
    cpu = (_CPU, torch.default_generator.get_state())
    return (cpu, *((device, torch.get_device_module(device).get_rng_state(device)) for device in devices))


def same_rng(one: RngState, other: RngState) -> bool:
    """Whether nothing was drawn between two captures."""
    return len(one) == len(other) and all(torch.equal(a, b) for (_, a), (_, b) in zip(one, other, strict=True))


def write_rng(state: RngState) -> None:
    """Let the default generators go on from such states."""
    for device, value in state:
        if device.type == "cpu":
            torch.default_generator.set_state(value)
        else:
            torch.get_device_module(device).set_rng_state(value, device)


def rng_restored(state: RngState | None) -> AbstractContextManager[None]:
    """Draw from `state` inside the block (None: do nothing); afterwards the generators are as they were."""
    return _UNCHANGED if state is None else _rng_restored(state)


@contextmanager
def _rng_restored(state: RngState) -> Iterator[None]:
    before = capture_rng(device for device, _ in state if device.type != "cpu")
    try:
        write_rng(state)
        yield
    finally:
        write_rng(before)


_MACHINERY = frozenset(nn.Module().__dict__) - {"training"}  # the tables that every module has


_PLAIN = frozenset([bool, int, float, str, type(None)])


def _kind(value: Any) -> str:
    if type(value) in _PLAIN:
        return "plain"
    if isinstance(value, Tensor):
        return "tensor"
    return "plain" if isinstance(value, (int, float, str)) else "other"


@dataclass(frozen=True, eq=False)
class ModuleState:
    """The plain attributes of every submodule, and the tensors set as attributes, by reference.

    What is not plain (lists, dictionaries, other objects) is shared with the live module and not restored; a replay
    that reads such a thing after it changed is found by the check of rule R10.
    """

    plain: list[dict[str, Any]]
    tensors: list[dict[str, Tensor]]
    versions: list[int]

    @staticmethod
    def capture(modules: list[nn.Module], previous: ModuleState | None = None) -> ModuleState:
        """Read the attributes of all `modules`; gives back `previous` if nothing differs from it."""
        plain, tensors = [], []
        for module in modules:
            plain_here, tensors_here = {}, {}
            for key, value in module.__dict__.items():
                if key not in _MACHINERY:
                    kind = _kind(value)
                    if kind == "plain":
                        plain_here[key] = value
                    elif kind == "tensor":
                        tensors_here[key] = value
            plain.append(plain_here)
            tensors.append(tensors_here)
        versions = _versions(tensors)
        if (
            previous is not None
            and previous.plain == plain
            and previous.versions == versions
            and _same_tensors(previous.tensors, tensors)
        ):
            return previous
        return ModuleState(plain, tensors, versions)

    def candidates(self) -> set[int]:
        """The ids of the tensors."""
        return {id(tensor) for attributes in self.tensors for tensor in attributes.values()}

    def read_only(self, read: Container[int]) -> ModuleState:
        """The same state with those tensors only that were read, by id.

        What a forward leaves on its module for others to look at (an attention map, the last features) leads to the
        whole graph of its step: the next step must not hold it.
        """
        if all(id(tensor) in read for attributes in self.tensors for tensor in attributes.values()):
            return self
        tensors = [
            {name: tensor for name, tensor in attributes.items() if id(tensor) in read} for attributes in self.tensors
        ]
        return ModuleState(self.plain, tensors, _versions(tensors))

    @contextmanager
    def applied(self, modules: list[nn.Module]) -> Iterator[None]:
        """Give `modules` these attributes inside the block; whatever the block sets on them is taken away again."""
        if self.versions != _versions(self.tensors):
            names = ", ".join(sorted({name for attributes in self.tensors for name in attributes}))
            raise ExternalModifiedError(
                f"A tensor that the model holds as a plain attribute (one of: {names}) was modified in place after a "
                "recorded step read it. Register it as a buffer, self.register_buffer(name, tensor), or set a new "
                "tensor: self.name = self.name + 1."
            )
        before = [module.__dict__ for module in modules]
        try:
            for module, plain, tensors in zip(modules, self.plain, self.tensors, strict=True):
                object.__setattr__(module, "__dict__", {**module.__dict__, **plain, **tensors})
            yield
        finally:
            for module, attributes in zip(modules, before, strict=True):
                object.__setattr__(module, "__dict__", attributes)


def _versions(tensors: list[dict[str, Tensor]]) -> list[int]:
    return [tensor._version for attributes in tensors for tensor in attributes.values()]


def structure_of(modules: list[nn.Module]) -> list[tuple[int, int]]:
    """What a model is built of: which submodules, and how many hooks each has."""
    return [
        (
            id(module),
            len(module._forward_hooks)
            + len(module._forward_pre_hooks)
            + len(module._backward_hooks)
            + len(module._backward_pre_hooks),
        )
        for module in modules
    ]


def _same_tensors(one: list[dict[str, Tensor]], other: list[dict[str, Tensor]]) -> bool:
    return len(one) == len(other) and all(
        a.keys() == b.keys() and all(a[key] is b[key] for key in a) for a, b in zip(one, other, strict=True)
    )
