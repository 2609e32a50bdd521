"""A carry, or what else is stored, as spans of bytes, and put together again from them bit for bit.

NOTE [ Spans ]

A store keeps bytes and knows no tensor. The tensors of a carry may share storages (the parts of a joined update are
views of one vector), may be of any dtype and of any strides. So what is stored of a storage is one span of bytes, from
the first to the last that the carry's tensors lie on, and of each tensor how it lies there. A restored tensor has the
strides of the original, and its distance from a multiple of 64 bytes: kernels take the same path for both.

Two kinds of tensors are not taken apart. One that all kept carries have in common (a frozen weight, a buffer that
nothing writes to) is alive in any case, so it stays where it is, by reference, and has its version checked (rule R4).
One that is more than a strided tensor (sparse, quantized, a subclass) is copied where it is. Of a DTensor the part of
this process is packed.
"""

from __future__ import annotations

import weakref
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Generic, Protocol, TypeVar

import torch
from torch import Tensor, nn

from lowmem_higher.errors import ExternalModifiedError
from lowmem_higher.record import version_of
from lowmem_higher.step import Carry, plain_state, state_keys
from lowmem_higher.structure import local

_ALIGNMENT = 64  # bytes; torch's allocators give no less

Key = tuple[object, ...]
Kind = TypeVar("Kind", bound="Content")


class Content(Protocol):
    """What can be stored: a carry, a journal, externals."""

    @property
    def nbytes(self) -> int:
        """Bytes of the distinct storages."""

    @property
    def modified(self) -> Tensor | None:
        """A tensor that was modified in place since this was made."""

    @staticmethod
    def modified_error(tensor: Tensor, time: int) -> ExternalModifiedError:
        """Rule R4."""

    def taken_apart(self: Kind) -> tuple[list[Tensor], Callable[[list[Tensor]], Kind]]:
        """The tensors, and the function that makes the same of such tensors; it holds none of them."""

    def described(self, time: int) -> str:
        """What it is, for a message."""

    @property
    def advice(self) -> str:
        """How to store less, for a message."""


@dataclass(frozen=True)
class Place:
    """How a tensor lies in a span; `offset` counts elements."""

    span: int
    dtype: torch.dtype
    size: tuple[int, ...]
    stride: tuple[int, ...]
    offset: int
    conjugated: bool
    negated: bool

    def tensor(self, span: Tensor) -> Tensor:
        """The tensor, from its span's bytes."""
        whole = span.numel() // self.dtype.itemsize * self.dtype.itemsize
        found = span[:whole].view(self.dtype).as_strided(self.size, self.stride, self.offset)
        found = torch._neg_view(found) if self.negated else found
        return found.conj() if self.conjugated else found


@dataclass(frozen=True)
class Sharded:
    """How a DTensor is made from the part of it that this process holds."""

    part: Place
    mesh: Any
    placements: Any
    size: torch.Size
    stride: tuple[int, ...]

    @property
    def span(self) -> int:
        """Of the part."""
        return self.part.span

    def tensor(self, span: Tensor) -> Tensor:
        """The tensor, from the bytes of this process."""
        from torch.distributed.tensor import DTensor

        found: Tensor = DTensor.from_local(
            self.part.tensor(span), self.mesh, self.placements, shape=self.size, stride=self.stride
        )
        return found


@dataclass(frozen=True)
class Unpacked:
    """A tensor that stayed where it is, and its version."""

    tensor: Tensor
    version: int


@dataclass(frozen=True)
class Packed(Generic[Kind]):
    """What is stored, without its bytes.

    Attributes:
        time: The step that it is for.
        what: What it is, for messages.
        places: How each tensor is found again.
        sizes: The bytes of each span.
        devices: Where each span was.
        fill: Makes it from its tensors.
        modified_error: Says that a tensor of it was modified.
    """

    time: int
    what: str
    places: tuple[Place | Sharded | Unpacked, ...]
    sizes: tuple[int, ...]
    devices: tuple[torch.device, ...]
    fill: Callable[[list[Tensor]], Kind]
    modified_error: Callable[[Tensor, int], ExternalModifiedError]

    def check_unpacked(self) -> None:
        """Rule R4, for the tensors that stayed where they are."""
        for place in self.places:
            if isinstance(place, Unpacked) and version_of(place.tensor) != place.version:
                raise self.modified_error(place.tensor, self.time)

    def unpacked(self, spans: list[Tensor]) -> Kind:
        """What was stored, from new spans, each on its device."""
        with torch.no_grad():
            return self.fill([
                place.tensor if isinstance(place, Unpacked) else place.tensor(spans[place.span])
                for place in self.places
            ])  # fmt: skip


class Constants:
    """The tensors that all carries so far have in common."""

    def __init__(self) -> None:
        self._tensors: dict[Key, weakref.ref[Tensor]] | None = None

    def narrow(self, carry: Carry) -> None:
        """One more carry, while the one before it is held."""
        now = {_key(tensor): weakref.ref(tensor) for tensor in carry.tensors() if is_strided(tensor)}
        self._tensors = {key: now[key] for key in now if self._tensors is None or self._has(key)}

    def __contains__(self, tensor: Tensor) -> bool:
        return is_strided(tensor) and self._has(_key(tensor))

    def _has(self, key: Key) -> bool:
        found = (self._tensors or {}).get(key)
        return found is not None and found() is not None  # else another storage may be at that address


def pack(content: Kind, time: int, constants: Constants) -> tuple[Packed[Kind], list[Tensor]]:
    """Take a carry or the like apart: what is needed to put it together, and views of its spans as bytes."""
    with torch.no_grad():
        places: dict[int, Place | Sharded | Unpacked] = {}
        sharing: dict[Key, dict[int, Tensor]] = {}
        wholes, fill = content.taken_apart()
        tensors = list(map(local, wholes))
        for index, tensor in enumerate(tensors):
            if tensor in constants:
                places[index] = Unpacked(tensor, version_of(tensor))
            elif not is_strided(tensor):
                copy = tensor.clone()
                places[index] = Unpacked(copy, version_of(copy))
            else:
                storage = tensor.untyped_storage()
                key = (tensor.device, storage.data_ptr() if tensor.numel() else ("empty", index))
                sharing.setdefault(key, {})[index] = _physical(tensor)
        spans = []
        for span, group in enumerate(sharing.values()):
            start = min(map(_start, group.values())) // _ALIGNMENT * _ALIGNMENT
            narrowest = min(group.values(), key=Tensor.element_size)
            item = narrowest.element_size()
            length = (max(map(_end, group.values())) - start) // item
            spans.append(narrowest.as_strided((length,), (1,), start // item).view(torch.uint8))
            for index, inside in group.items():
                place = Place(
                    span,
                    inside.dtype,
                    tuple(inside.shape),
                    inside.stride(),
                    (_start(inside) - start) // inside.element_size(),
                    tensors[index].is_conj(),
                    tensors[index].is_neg(),
                )
                places[index] = place if tensors[index] is wholes[index] else _sharded(place, wholes[index])
    ordered = tuple([places[index] for index in range(len(tensors))])
    sizes, devices = tuple([span.numel() for span in spans]), tuple([span.device for span in spans])
    what = content.described(time)
    return Packed(time, what, ordered, sizes, devices, fill, content.modified_error), spans


def _sharded(part: Place, whole: Any) -> Sharded:
    return Sharded(part, whole.device_mesh, whole.placements, whole.shape, whole.stride())


def blank(size: int, *, pinned: bool = False) -> Tensor:
    """Host memory for a span."""
    return torch.empty(size, dtype=torch.uint8, device="cpu", pin_memory=pinned)


def same_tensors(one: Carry, other: Carry) -> bool:
    """Whether two carries that are alive hold the same values at the same places."""
    tensors, others = one.tensors(), other.tensors()
    return (
        one.versions == other.versions
        and state_keys(one.state) == state_keys(other.state)
        and plain_state(one.state) == plain_state(other.state)
        and all(map(is_strided, (*tensors, *others)))
        and list(map(_key, tensors)) == list(map(_key, others))
    )


def is_strided(tensor: Tensor) -> bool:
    """Whether a tensor is no more than a strided view of its storage's bytes."""
    return (
        type(tensor) in (Tensor, nn.Parameter)
        and tensor.layout is torch.strided
        and tensor.device.type != "meta"
        and not tensor.is_quantized
    )


def _key(tensor: Tensor) -> Key:
    address = tensor.untyped_storage().data_ptr()
    layout = (tensor.storage_offset(), tuple(tensor.shape), tensor.stride(), tensor.is_conj(), tensor.is_neg())
    return (tensor.device, address, tensor.dtype, version_of(tensor), *layout)


def _physical(tensor: Tensor) -> Tensor:
    """Without the marks that its values are to be conjugated or negated."""
    tensor = tensor.detach()
    tensor = tensor.conj() if tensor.is_conj() else tensor
    return torch._neg_view(tensor) if tensor.is_neg() else tensor


def _start(tensor: Tensor) -> int:
    return int(tensor.storage_offset()) * tensor.element_size()


def _end(tensor: Tensor) -> int:
    if tensor.numel() == 0:
        return _start(tensor)
    last = sum((size - 1) * stride for size, stride in zip(tensor.shape, tensor.stride(), strict=True))
    return _start(tensor) + (last + 1) * tensor.element_size()
