"""The files of a run that survives: what is in a `run_dir`, how it is written, and what is done about damage.

NOTE [ Format, version 1 ]

    lock                 empty, held by `flock` while a process works here
    manifest.json        the run's id and fingerprint, and the random states it began with; a checksum of all that
    steps.log            12 bytes a step: the checksum of its batch (CRC-32) and its loss (float64), little-endian
    carry-T.tensors      what step T starts from, where the schedule holds it
    newest-T.tensors     the same where the run stood last, on its way between two of these
    final.tensors        weights and buffers after the last step, the outer loss
    adjoint-T.tensors    the cotangents of what step T starts from, and the gradients gathered so far: the last two

A file of tensors is a line of JSON, the bytes of the spans that its tensors lie on (NOTE [ Spans ]), and the CRC-32 of
both, big-endian. The line says kind, time, run id, the dtype, shape, strides and place of each tensor under its name,
numbers, and the checksum of `steps.log` up to that time. Files are written under another name, synced and renamed, so
each is whole or absent. Whatever order a crash leaves them in, each is either true or recognized as damaged:
a damaged one is removed, with a warning, and the run goes on from an earlier one. Step 0 needs no file.
"""

from __future__ import annotations

import errno
import json
import os
import re
import shutil
import socket
import warnings
import zlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from lowmem_higher.errors import DamagedFileWarning, ExternalModifiedError, RunDirectoryError, StoreError
from lowmem_higher.packing import Constants, Packed, Place, Unpacked, pack
from lowmem_higher.report import format_bytes
from lowmem_higher.span_files import described, read_file, sync_directory, write_file
from lowmem_higher.step_log import RECORD, StepLog

VERSION = 1
MAGIC = "lowmem_higher run"
_NAME = re.compile(r"(carry|newest|adjoint|final)(?:-(\d+))?\.tensors")
_OURS = re.compile(r"(carry|newest|adjoint|final)(-\d+)?(\.(tensors|part))?|manifest\.(json|part)|steps(-\d+)?\.log")


@dataclass(frozen=True)
class Saved:
    """What a file of tensors held; `logged` steps of the log go with it."""

    time: int
    logged: int
    tensors: dict[str, Tensor]
    facts: dict[str, Any]


class RunFiles:
    """The files of one run. Use it inside `with opened(path)`.

    Attributes:
        path: The directory.
        run: The id of the run whose files are read and written.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        self.run = ""
        self._log_path = path / "steps.log"
        self._log_checksums: dict[int, int] = {0: 0}
        self._written = 0  # steps of the log that are in the file

    # The manifest

    def read_manifest(self) -> dict[str, Any] | None:
        """The run that is here, if there is one.

        Raises:
            RunDirectoryError: It is damaged, or of another version.
        """
        path = self.path / "manifest.json"
        try:
            text = path.read_text()
        except FileNotFoundError:
            return None
        except (OSError, UnicodeDecodeError) as error:
            raise self._lost(f"manifest.json cannot be read: {error}") from error
        try:
            manifest: dict[str, Any] = json.loads(text)
            checksum, version = manifest.pop("checksum"), manifest["version"]
            whole = checksum == checksum_of_json(manifest) and manifest["magic"] == MAGIC
        except (ValueError, KeyError, TypeError, AttributeError):
            whole = False
        if not whole:
            raise self._lost("manifest.json is damaged")
        if version != VERSION:
            raise self._lost(f"it was written in version {version} of the format, and this is version {VERSION}")
        self.run = manifest["run"]
        return manifest

    def write_manifest(self, fingerprint: Mapping[str, Any], rng: Mapping[str, str], **more: Any) -> None:
        """Begin a run."""
        self.run = os.urandom(8).hex()
        manifest = {
            "magic": MAGIC,
            "version": VERSION,
            "run": self.run,
            "fingerprint": dict(fingerprint),
            "random_states": dict(rng),
            **more,
        }
        manifest["checksum"] = checksum_of_json(manifest)
        path = self.path / "manifest.json"
        with self._writing("The manifest", path):
            write_whole(path, (json.dumps(manifest, indent=1) + "\n").encode())

    def _lost(self, what: str) -> RunDirectoryError:
        return RunDirectoryError(
            f"The run in {self.path} cannot be gone on from: {what}. Nothing was computed from it. Remove the "
            f"directory and begin anew: shutil.rmtree({str(self.path)!r})."
        )

    # Files of tensors

    def times(self, kind: str) -> list[int]:
        """The times of which there is a file of a kind, in order."""
        found = [_NAME.fullmatch(entry.name) for entry in self.path.iterdir()]
        return sorted(int(match[2] or 0) for match in found if match is not None and match[1] == kind)

    def save(self, kind: str, time: int, tensors: Mapping[str, Tensor], facts: Mapping[str, Any], log: StepLog) -> None:
        """Write a file of tensors, which goes with the log as it is now, and let it reach the disk.

        Raises:
            StoreError: It cannot be written; what was there before is as it was.
        """
        self._save_log(log, log.count)
        path = self._file(kind, time)
        packed, spans = pack(Tensors(list(tensors.values())), time, Constants())
        places = [place for place in packed.places if isinstance(place, Place)]
        if len(places) < len(tensors):
            raise odd_tensor(tensors, packed.places)
        header = {**self._header(kind, time, tensors, facts, log, packed), "tensors": described(places)}
        with self._writing(f"{kind}-{time}", path):
            write_file(path, json.dumps(header).encode() + b"\n", spans, durable=True)

    def _header(
        self,
        kind: str,
        time: int,
        tensors: Mapping[str, Tensor],
        facts: Mapping[str, Any],
        log: StepLog,
        packed: Packed[Tensors],
    ) -> dict[str, Any]:
        return {
            "magic": MAGIC,
            "version": VERSION,
            "run": self.run,
            "kind": kind,
            "time": time,
            "log": [log.count, self._log_checksums[log.count]],
            "facts": dict(facts),
            "names": list(tensors),
            "span_bytes": packed.sizes,
            "devices": list(map(str, packed.devices)),
        }

    def load(self, kind: str, time: int, log: StepLog) -> Saved | None:
        """What a file holds; None, with a warning, if it is damaged: then it is gone."""
        path = self._file(kind, time)
        try:
            saved, fault = self._read(path, kind, time, log)
        except OSError as error:
            saved, fault = None, f"it cannot be read: {error.strerror}"
        if saved is None:
            self._give_up(kind, time, fault)
        return saved

    def _give_up(self, kind: str, time: int, fault: str) -> None:
        warnings.warn(
            DamagedFileWarning(
                f"{self._file(kind, time)} is damaged, {fault}. It was removed, and nothing was computed from it: the "
                "run goes on from an earlier state, which takes more passes for the same gradient. See to the disk, "
                "or give another one: run_dir=..."
            ),
            stacklevel=3,
        )
        self.remove(kind, time)

    def _read(self, path: Path, kind: str, time: int, log: StepLog) -> tuple[Saved | None, str]:
        with path.open("rb") as file:
            line = file.readline()
        try:
            header = json.loads(line)
            sizes, devices, names = header["span_bytes"], header["devices"], header["names"]
            spans, fault = read_file(path, len(line), sizes, None)
        except (ValueError, KeyError, TypeError, AttributeError, RuntimeError):
            return None, "its first line is not what was written"
        if fault is not None:
            return None, fault
        if stray := self._stray(header, kind, time, log):
            return None, stray
        moved = [span.to(device) for span, device in zip(spans, devices, strict=True)]
        with torch.no_grad():
            tensors = [place_of(entry).tensor(moved[entry["span"]]) for entry in header["tensors"]]
        return Saved(time, header["log"][0], dict(zip(names, tensors, strict=True)), header["facts"]), ""

    def _stray(self, header: Mapping[str, Any], kind: str, time: int, log: StepLog) -> str:
        """Why a file that is whole does not belong here; empty if it does."""
        if (header["magic"], header["version"]) != (MAGIC, VERSION) or header["run"] != self.run:
            return "it is of another run"
        if (header["kind"], header["time"]) != (kind, time):
            return f"it was {header['kind']}-{header['time']} and has been renamed"
        count, checksum = header["log"]
        if count > log.count or self._checksum_until(log, count) != checksum:
            return f"the {count} steps of {self._log_path.name} that it goes with are not there as they were written"
        return ""

    def remove(self, kind: str, time: int) -> None:
        """Remove a file, if it is there."""
        with suppress(FileNotFoundError):
            self._file(kind, time).unlink()

    def _file(self, kind: str, time: int) -> Path:
        return self.path / ("final.tensors" if kind == "final" else f"{kind}-{time}.tensors")

    # The log

    def load_log(self, log: StepLog) -> None:
        """Read what there is of the log; how much of it is true shows when files are loaded."""
        with suppress(FileNotFoundError):
            log.fill(self._log_path.read_bytes())
        self._written = log.count

    def cut_log(self, log: StepLog, count: int) -> None:
        """Let the log end after `count` steps, of which it is known that they are true."""
        log.count = count
        self._written = min(self._written, count)
        self._log_checksums = {0: 0, count: self._checksum_until(log, count)}

    def _save_log(self, log: StepLog, count: int) -> None:
        if count not in self._log_checksums:
            self._log_checksums[count] = self._checksum_until(log, count)
        if count <= self._written:
            return
        path = self._log_path
        with self._writing("The log of the steps", path), path.open("r+b" if path.exists() else "xb") as file:
            file.seek(self._written * RECORD)
            file.write(log[self._written : count])
            file.truncate()
            file.flush()
            os.fsync(file.fileno())
        self._written = count

    def _checksum_until(self, log: StepLog, count: int) -> int:
        known = max((at for at in self._log_checksums if at <= count), default=0)
        return zlib.crc32(log[known:count], self._log_checksums[known])

    # The end

    def remove_run(self) -> None:
        """Remove all files of the run: the manifest after what needs it, before what is no use without it."""
        for kind in ("carry", "newest"):
            for time in self.times(kind):
                self.remove(kind, time)
        with suppress(FileNotFoundError):
            (self.path / "manifest.json").unlink()
        self._remove_ours()

    def remove_leftovers(self) -> None:
        """Remove whatever belongs to no run any more; files that are not ours stay."""
        self._remove_ours()

    def _remove_ours(self) -> None:
        for entry in list(self.path.iterdir()):
            if _OURS.fullmatch(entry.name):
                discard(entry)

    def remove_parts(self) -> None:
        """Remove what a killed process was writing."""
        for entry in self.path.glob("*.part"):
            if _OURS.fullmatch(entry.name):
                discard(entry)

    def check_space(self, needed: int) -> None:
        """Refuse to begin what will not fit.

        Raises:
            StoreError: There is too little room.
        """
        ours = [entry for entry in self.path.iterdir() if _OURS.fullmatch(entry.name)]
        there = sum(part.stat().st_size for entry in ours for part in (entry, *entry.rglob("*")))
        free = shutil.disk_usage(self.path).free
        if needed - there > free:
            raise StoreError(
                f"This run will take up to {format_bytes(needed)} in {self.path}, where {format_bytes(free)} are free "
                "besides what it has there. Make room, give another run_dir, or keep fewer carries: checkpoints=10."
            )

    @contextmanager
    def _writing(self, what: str, path: Path) -> Iterator[None]:
        try:
            yield
        except OSError as error:
            raise StoreError(
                f"{what} could not be written to {path}: {error.strerror}. The run is as it was last saved: make room "
                "there and make the same call again, metagradient(..., run_dir=...), which goes on from there."
            ) from error


@contextmanager
def opened(path: Path) -> Iterator[RunFiles]:
    """The files in a directory, which is made if it is not there, and is locked inside the block.

    Raises:
        RunDirectoryError: Another process has it, or it cannot be made.
        StoreError: The disk is full.
    """
    made = False
    try:
        made = not path.exists()
        path.mkdir(parents=True, exist_ok=True)
        lock = _locked(path)
    except OSError as error:
        if made:
            with suppress(OSError):
                path.rmdir()
        if error.errno in (errno.ENOSPC, errno.EDQUOT):
            raise StoreError(
                f"run_dir={str(path)!r} cannot be used: {error.strerror}. Make room there and make the same call "
                "again, or give another directory: metagradient(..., run_dir=...)."
            ) from error
        raise RunDirectoryError(
            f"run_dir={str(path)!r} cannot be used: {error.strerror}. Give a directory that can be written to."
        ) from error
    files = RunFiles(path)
    try:
        files.remove_parts()
        yield files
    finally:
        if not (path / "manifest.json").exists():  # nothing to go on from
            with suppress(OSError):
                (path / "lock").unlink()
                if made or not any(path.iterdir()):
                    path.rmdir()
        os.close(lock)


def _locked(path: Path) -> int:
    import fcntl

    while True:
        handle = os.open(path / "lock", os.O_RDWR | os.O_CREAT, 0o644)
        try:
            fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError as error:
            holder = os.pread(handle, 200, 0).decode(errors="replace").strip()
            os.close(handle)
            raise RunDirectoryError(
                f"run_dir={str(path)!r} is in use by {holder or 'another process'}. Wait until that has ended, or give "
                "each run a directory of its own."
            ) from error
        with suppress(OSError):
            if os.fstat(handle).st_ino == (path / "lock").stat().st_ino:  # else its last holder has removed it
                with suppress(OSError):  # a full disk: the lock is held without its holder's name
                    os.truncate(handle, 0)
                    os.pwrite(handle, f"process {os.getpid()} on {socket.gethostname()}\n".encode(), 0)
                return handle
        os.close(handle)


def discard(entry: Path) -> None:
    """Remove a file, or a directory with what is in it."""
    if entry.is_dir():
        shutil.rmtree(entry)
    else:
        entry.unlink()


def write_whole(path: Path, content: bytes) -> None:
    """Write a small file so that it is whole or absent, on the disk when this returns."""
    part = path.with_suffix(".part")
    try:
        with part.open("wb") as file:
            file.write(content)
            file.flush()
            os.fsync(file.fileno())
        part.replace(path)
        sync_directory(path.parent)
    finally:
        with suppress(OSError):
            part.unlink(missing_ok=True)


def checksum_of_json(manifest: Mapping[str, Any]) -> int:
    """The CRC-32 of what JSON holds."""
    return zlib.crc32(json.dumps(manifest, sort_keys=True).encode())


def odd_tensor(tensors: Mapping[str, Tensor], places: Sequence[object]) -> StoreError:
    """Says which of the tensors could not be packed."""
    odd = next(name for name, place in zip(tensors, places, strict=True) if isinstance(place, Unpacked))
    return StoreError(
        f"{odd} is more than a strided tensor (sparse, quantized, a subclass), of which run_dir keeps no copy. Leave "
        "run_dir out, or use dense tensors: tensor.to_dense()."
    )


def place_of(entry: Mapping[str, Any]) -> Place:
    """How a tensor lies in its span, by its description."""
    dtype = getattr(torch, entry["dtype"])
    shape, stride = tuple(entry["shape"]), tuple(entry["stride"])
    return Place(entry["span"], dtype, shape, stride, entry["offset"], entry["conjugated"], entry["negated"])


class Tensors:
    """Tensors with names, as `pack` wants them."""

    modified = None
    advice = "keep fewer carries, checkpoints=10"

    def __init__(self, tensors: list[Tensor]) -> None:
        self._tensors = tensors

    @property
    def nbytes(self) -> int:
        """Bytes of them all."""
        return sum(tensor.nbytes for tensor in self._tensors)

    @staticmethod
    def modified_error(tensor: Tensor, time: int) -> ExternalModifiedError:
        """They are written at once."""
        return ExternalModifiedError(
            f"A tensor of time {time} was modified while it was written. Let loss_fn and outer compute with copies: "
            "tensor.clone()."
        )

    def described(self, time: int) -> str:
        """What it is."""
        return f"what step {time} starts from"

    def taken_apart(self) -> tuple[list[Tensor], Callable[[list[Tensor]], Tensors]]:
        """The tensors, and the function that would make it from them."""
        return self._tensors, Tensors
