"""Where kept carries, and what else a backward needs, live while no step needs them; what is in host memory.

NOTE [ Copies beside the loop ]

From a CUDA device copies go over a side stream, from and to pinned memory. What is being copied is held, with its
versions, until the copy is known to be done: freed memory would be used again, and a write in place would tear it.
One copy is under way at a time, so a loop that is faster than the copies waits for them, and its memory stays bounded;
carries, journals and externals have a way of their own each.
"""

from __future__ import annotations

import functools
import os
import weakref
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Generic, Protocol, TypeVar

import torch
from torch import Tensor

from lowmem_higher.disk_store import DiskStore
from lowmem_higher.errors import StoreError
from lowmem_higher.ledger import Ledger
from lowmem_higher.packing import Constants, Content, Kind, Packed, blank, pack
from lowmem_higher.report import format_bytes

Found = TypeVar("Found", covariant=True)


class Stored(Protocol[Found]):
    """A carry, a journal or externals in a store; freed with the last reference."""

    @property
    def nbytes(self) -> int:
        """The bytes that it takes there."""

    def get(self) -> Found:
        """The same, on its device, with the bits that it had."""


class Store(Protocol):
    """Where carries, journals and externals can be put."""

    def put(self, content: Kind, time: int, constants: Constants) -> Stored[Kind]:
        """Store what step `time` starts from or reads. Tensors in `constants` stay where they are."""

    def takes(self, tensor: Tensor) -> bool:
        """Whether the store is another place than where a tensor is."""

    def beside(self) -> Store:
        """The same store, with copies under way beside those of this one."""

    def prefetch(self, stored: Stored[Content]) -> None:
        """This one will be asked for next."""

    def let_go(self) -> None:
        """Let go of what has been copied since the last look."""

    def close(self) -> None:
        """The loop is over; what is stored stays."""


def make_store(where: str | os.PathLike[str], ledger: Ledger) -> Store | None:
    """The store that the keyword `store` names; None for the device.

    Raises:
        StoreError: No directory can be made there.
    """
    if where == "device":
        return None
    return HostStore(ledger) if where == "host" else DiskStore(Path(where), ledger)


class HostStore:
    """Host memory, pinned for what comes from a CUDA device."""

    def __init__(self, ledger: Ledger) -> None:
        self._ledger = ledger
        self._sending: weakref.ref[InHostMemory[Any]] | None = None  # the newest, whose copy may be on its way
        self._coming: weakref.ref[InHostMemory[Any]] | None = None  # whose copy was begun before it was asked for

    def put(self, content: Kind, time: int, constants: Constants) -> Stored[Kind]:
        """Store a carry or the like; on CUDA its copy is on its way when this returns, one at a time."""
        self._settle(wait=True)
        stored = InHostMemory(content, *pack(content, time, constants), self._ledger)
        self._sending = weakref.ref(stored)
        self._settle(wait=False)
        return stored

    def takes(self, tensor: Tensor) -> bool:
        """What is in host memory is there already."""
        return tensor.device.type != "cpu"

    def beside(self) -> Store:
        """Another one, for which nothing has to be waited for."""
        return HostStore(self._ledger)

    def prefetch(self, stored: Stored[Content]) -> None:
        """Begin to copy it to its CUDA device, one at a time. For a CPU there is nothing to be gained."""
        before = None if self._coming is None else self._coming()
        if before is not stored and before is not None:
            before.cancel()
        if isinstance(stored, InHostMemory) and stored.begin():
            self._coming = weakref.ref(stored)

    def let_go(self) -> None:
        """Let go of a device's copy, if the host has it by now."""
        self._settle(wait=False)

    def close(self) -> None:
        """Nothing is held but by what is stored."""

    def _settle(self, *, wait: bool) -> None:
        stored = None if self._sending is None else self._sending()
        if stored is None or stored.settled(wait=wait):
            self._sending = None


class InHostMemory(Generic[Kind]):
    """A carry or the like in host memory."""

    def __init__(self, content: Kind, packed: Packed[Kind], spans: list[Tensor], ledger: Ledger) -> None:
        self._packed, self._ledger = packed, ledger
        self._copies, self._sent = _to_host(spans, packed.what, content.advice)
        self._source: Kind | None = content
        self._source_modified: Tensor | None = None
        self._coming: tuple[Kind, list[Tensor], dict[torch.device, torch.cuda.Event]] | None = None
        ledger.count_stored(self, self.nbytes)

    @property
    def nbytes(self) -> int:
        """The bytes of host memory."""
        return sum(self._packed.sizes)

    def settled(self, *, wait: bool) -> bool:
        """Whether the copy is done; then the original is let go."""
        if self._source is not None:
            for event in self._sent:
                if wait:
                    event.synchronize()
                elif not event.query():
                    return False
            self._source_modified = self._source.modified
            self._source = None
        return True

    def begin(self) -> bool:
        """Copy it to its CUDA device, if it is from one."""
        if self._coming is None and any(device.type == "cuda" for device in self._packed.devices):
            self._coming = self._begin()
        return self._coming is not None

    def cancel(self) -> None:
        """It is not needed so soon."""
        self._coming = None

    def get(self) -> Kind:
        """A new copy, on the device where the original was."""
        self.settled(wait=True)
        if self._source_modified is not None:
            raise self._packed.modified_error(self._source_modified, self._packed.time)
        self._packed.check_unpacked()
        content, spans, events = self._coming or self._begin()
        self._coming = None
        for span in spans:
            if span.is_cuda:
                stream = torch.cuda.current_stream(span.device)
                stream.wait_event(events[span.device])
                span.record_stream(stream)
        return content

    def _begin(self) -> tuple[Kind, list[Tensor], dict[torch.device, torch.cuda.Event]]:
        spans, used = [], set[torch.device]()
        for copy, device in zip(self._copies, self._packed.devices, strict=True):
            if device.type == "cuda":
                used.add(device)
                with torch.cuda.stream(_side_stream(device)):
                    spans.append(copy.to(device, non_blocking=True))
            else:
                spans.append(copy.to(device, copy=True))
        events = {device: _side_stream(device).record_event() for device in used}
        return self._ledger.keep(self._packed.unpacked(spans)), spans, events


@functools.cache
def _side_stream(device: torch.device) -> torch.cuda.Stream:
    return torch.cuda.Stream(device)


def _to_host(spans: Sequence[Tensor], what: str, advice: str) -> tuple[list[Tensor], list[torch.cuda.Event]]:
    """Copies of spans in host memory, and what tells when they are done."""
    copies, used = [], set[torch.device]()
    for span in spans:
        try:
            copy = blank(span.numel(), pinned=span.is_cuda)
        except RuntimeError as error:
            raise StoreError(
                f"There is no host memory for {what}, {format_bytes(sum(map(len, spans)))}: {error}\n"
                f"Put it on disk, innerloop_ctx(..., store='a/directory'), or {advice}."
            ) from error
        copies.append(copy)
        if not span.is_cuda:
            copy.copy_(span)
            continue
        stream = _side_stream(span.device)
        if span.device not in used:
            stream.wait_stream(torch.cuda.current_stream(span.device))
            used.add(span.device)
        with torch.cuda.stream(stream):
            copy.copy_(span, non_blocking=True)
        span.record_stream(stream)  # should it be freed before
    return copies, [_side_stream(device).record_event() for device in used]
