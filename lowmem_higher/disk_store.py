"""Carries, journals and externals in files.

NOTE [ Files ]

A file goes with the last reference to what was stored in it. A run's files lie in a directory of their own, which goes
with the last of them, at the latest when Python ends. So nothing has to be cleaned up, also after an exception; only a
process that is killed leaves its directory behind.

A file is written under another name and then renamed, so it is whole or absent. Its checksum is remembered, and what is
read is compared with it before any tensor is made: what was written comes back bit for bit, or the read raises.
"""

from __future__ import annotations

import itertools
import json
import os
import shutil
import tempfile
import weakref
from contextlib import suppress
from pathlib import Path
from typing import Any, Generic

from torch import Tensor

from lowmem_higher.errors import StoreError
from lowmem_higher.ledger import Ledger
from lowmem_higher.packing import Constants, Kind, Packed, Place, pack
from lowmem_higher.report import format_bytes
from lowmem_higher.span_files import described, read_file, write_file


class RunDirectory:
    """A directory for the files of one run, that goes when nobody needs it.

    Raises:
        StoreError: It cannot be made.
    """

    def __init__(self, parent: Path) -> None:
        self._numbers = itertools.count()
        try:
            self.path = Path(tempfile.mkdtemp(prefix="lowmem_higher_", dir=parent)).absolute()
        except OSError as error:
            raise StoreError(
                f"No directory for this run's carries can be made in {parent}: {error.strerror}. Give one that can be "
                "written to: innerloop_ctx(..., store='a/directory')."
            ) from error
        weakref.finalize(self, _remove_directory, self.path, os.getpid())

    def new_file(self) -> Path:
        """A path that was not given before."""
        return self.path / f"{next(self._numbers)}.carry"


class DiskStore:
    """Files, in a directory of this run's own."""

    def __init__(self, parent: Path, ledger: Ledger) -> None:
        self._parent, self._ledger = parent.absolute(), ledger
        self._directory: RunDirectory | None = RunDirectory(self._parent)
        self._latest = weakref.ref(self._directory)

    def put(self, content: Kind, time: int, constants: Constants) -> InFile[Kind]:
        """Write a carry or the like to a file.

        Raises:
            StoreError: It cannot be written, for example because the disk is full.
        """
        directory = self._latest() or RunDirectory(self._parent)
        self._latest = weakref.ref(directory)
        return InFile(directory, *pack(content, time, constants), content.advice, self._ledger)

    def takes(self, tensor: Tensor) -> bool:
        """No tensor is on disk already."""
        return True

    def beside(self) -> DiskStore:
        """The same: a file is written when `put` returns."""
        return self

    def prefetch(self, stored: object) -> None:
        """Files are read when they are asked for."""

    def let_go(self) -> None:
        """Nothing is on its way."""

    def close(self) -> None:
        """From now on the directory lasts as long as a file in it."""
        self._directory = None


class InFile(Generic[Kind]):
    """A carry or the like in a file: a line of JSON, the bytes of the spans, and a checksum of both."""

    def __init__(
        self, directory: RunDirectory, packed: Packed[Kind], spans: list[Tensor], advice: str, ledger: Ledger
    ) -> None:
        self._directory = directory  # lasts as long
        self._path = path = directory.new_file()
        self._packed, self._ledger = packed, ledger
        header = _header(packed)
        self._header_size = len(header)
        try:
            self._checksum = write_file(path, header, spans)
        except OSError as error:
            what = packed.what[0].upper() + packed.what[1:]
            raise StoreError(
                f"{what}, {format_bytes(self.nbytes)}, could not be written to {path}: {error.strerror}. No "
                "gradient can be had without it. Make room there, or give another directory, "
                f"innerloop_ctx(..., store='a/directory'), or {advice}."
            ) from error
        weakref.finalize(self, _remove_file, path, os.getpid()).atexit = False
        ledger.count_stored(self, self.nbytes)

    @property
    def nbytes(self) -> int:
        """The bytes of the spans."""
        return sum(self._packed.sizes)

    def get(self) -> Kind:
        """A new copy from the file, on the device where the original was.

        Raises:
            StoreError: The file is gone, or does not hold what was written.
        """
        self._packed.check_unpacked()
        what = f"{self._packed.what} from {self._path}"
        try:
            spans, fault = read_file(self._path, self._header_size, self._packed.sizes, self._checksum)
        except OSError as error:
            raise StoreError(
                f"Cannot read {what}: {error.strerror}. It was there: the directory must be left alone until the outer "
                "backward is done. Run the inner loop again, in a directory of its own: "
                "innerloop_ctx(..., store=tempfile.mkdtemp())."
            ) from error
        if fault is not None:
            raise StoreError(
                f"Cannot use {what}: {fault}. Something else wrote to the file, or the disk is failing; nothing was "
                "computed from it. Run the inner loop again; if this comes back, on another disk, "
                "innerloop_ctx(..., store='another/directory')."
            )
        moved = [span.to(device) for span, device in zip(spans, self._packed.devices, strict=True)]
        return self._ledger.keep(self._packed.unpacked(moved))


def _header(packed: Packed[Any]) -> bytes:
    """For whoever finds the file: what is in it."""
    places = [place for place in packed.places if isinstance(place, Place)]
    header = {
        "magic": "lowmem_higher carry",
        "version": 1,
        "what": packed.what,
        "span_bytes": packed.sizes,
        "tensors": described(places),
    }
    return json.dumps(header).encode() + b"\n"


# A forked process has copies of these objects; the files stay the first one's.


def _remove_file(path: Path, owner: int) -> None:
    if os.getpid() == owner:
        with suppress(OSError):
            path.unlink()


def _remove_directory(path: Path, owner: int) -> None:
    if os.getpid() == owner:
        shutil.rmtree(path, ignore_errors=True)
