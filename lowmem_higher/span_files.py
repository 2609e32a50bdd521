"""Files of tensors: a line of JSON, the bytes of the spans, and a checksum of both. Whole or absent.

A file is written under another name and then renamed. With `durable` the file and its name have reached the disk when
the write returns, so it survives the machine, too.
"""

from __future__ import annotations

import ctypes
import os
import zlib
from collections.abc import Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any

from torch import Tensor

from lowmem_higher.packing import Place, blank


def described(places: Sequence[Place]) -> list[dict[str, Any]]:
    """How tensors lie in their spans, for a header."""
    return [
        {
            "dtype": str(place.dtype).removeprefix("torch."),
            "shape": place.size,
            "stride": place.stride,
            "span": place.span,
            "offset": place.offset,
            "conjugated": place.conjugated,
            "negated": place.negated,
        }
        for place in places
    ]


def write_file(path: Path, header: bytes, spans: Sequence[Tensor], *, durable: bool = False) -> int:
    """Write a file; returns its checksum."""
    part, checksum = path.with_suffix(".part"), 0
    try:
        with part.open("xb") as file:
            file.write(header)
            checksum = zlib.crc32(header)
            for span in spans:
                on_host = span.cpu()
                memory = memory_of(on_host)
                file.write(memory)
                checksum = zlib.crc32(memory, checksum)
            file.write(checksum.to_bytes(4, "big"))
            if durable:
                file.flush()
                os.fsync(file.fileno())
        part.replace(path)
        if durable:
            sync_directory(path.parent)
    finally:
        with suppress(OSError):
            part.unlink(missing_ok=True)
    return checksum


def read_file(
    path: Path, header_size: int, sizes: Sequence[int], checksum: int | None
) -> tuple[list[Tensor], str | None]:
    """The spans, and what is wrong with the file if something is; without a checksum the file's own has to do."""
    expected = header_size + sum(sizes) + 4
    spans, found = [], 0
    with path.open("rb") as file:
        length = os.fstat(file.fileno()).st_size
        if length != expected:
            return [], f"it has {length} bytes instead of {expected}"
        found = zlib.crc32(file.read(header_size))
        for size in sizes:
            span = blank(size)
            if file.readinto(memory_of(span)) != size:
                return [], "it ended while it was read"
            found = zlib.crc32(memory_of(span), found)
            spans.append(span)
        ending = int.from_bytes(file.read(), "big")
    checksum = ending if checksum is None else checksum
    if not found == checksum == ending:
        return [], f"its checksum is {found:08x} instead of {checksum:08x}"
    return spans, None


def sync_directory(path: Path) -> None:
    """Let the names in a directory reach the disk."""
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def memory_of(span: Tensor) -> Any:
    """The bytes of a tensor in host memory, as a buffer. It does not hold the tensor."""
    return (ctypes.c_char * span.numel()).from_address(span.data_ptr()) if span.numel() else bytearray()
