"""The files of a run of several processes: one `run_dir` for all of them, through `torch.distributed.checkpoint`.

NOTE [ Format, several processes ]

    lock, manifest.json    rank 0's, as in one process; the manifest has fingerprints and random states of all ranks
    steps-R.log            the log of rank R
    carry-T/  newest-T/  adjoint-T/  final/
                           states: checkpoints of `torch.distributed.checkpoint`, `.metadata` and a `__R_0.distcp` of
                           each rank, and `rank-R.json`

What a state holds is in `run_directory.py`. In its checkpoint are

* each DTensor that is sharded and no more, as it is, by its name: a rank writes its shard, a tool can read it whole;
* of other tensors the spans of bytes that they lie on (NOTE [ Spans ]), by the BLAKE2 of these bytes: what ranks have
  in common is written once, what differs (random states, buffers, cotangents) by each, without a list of what is what.

`rank-R.json` says how rank R puts its tensors together, and has the size and the CRC-32 of each file that it wrote
(rank 0: of `.metadata` too), of its log, and of itself. A state is written as `carry-T.part`, and renamed by rank 0
when the parts of all ranks are on the disk: it is whole or absent. Before it is loaded each rank looks at what it has
written, and if one rank's part is damaged none takes it. Which states there are is read once, by rank 0, and kept
count of: no rank ever looks at a directory that another one changes.
"""

from __future__ import annotations

import hashlib
import json
import os
import shutil
import warnings
import zlib
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager, suppress
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from lowmem_higher.agreement import Ranks
from lowmem_higher.distributed import unless_gone
from lowmem_higher.errors import RunDirectoryError, StoreError
from lowmem_higher.packing import Constants, Place, Sharded, pack
from lowmem_higher.run_directory import (
    RunFiles,
    Saved,
    Tensors,
    checksum_of_json,
    discard,
    odd_tensor,
    opened,
    place_of,
    write_whole,
)
from lowmem_higher.span_files import described, memory_of, sync_directory
from lowmem_higher.step_log import StepLog
from lowmem_higher.structure import is_dtensor, local

_READ = 1 << 20  # bytes at once


class RankFiles(RunFiles):
    """The files of one run of several processes. Use it inside `with opened_together(...)`.

    Args:
        path: The directory.
        ranks: The processes.
        tensors: Some tensors that have the meshes of all DTensors of the run.
    """

    def __init__(self, path: Path, ranks: Ranks, tensors: Sequence[Tensor]) -> None:
        super().__init__(path)
        self._ranks = ranks
        self._log_path = path / f"steps-{ranks.rank}.log"
        meshes = [tensor.device_mesh for tensor in tensors if is_dtensor(tensor)]  # type: ignore[attr-defined]
        self._meshes = {_mesh_key(mesh): mesh for mesh in meshes}
        there = [entry.name for entry in path.iterdir() if entry.is_dir()] if ranks.rank == 0 else []
        self._there: set[str] = set(ranks.told("the states in run_dir", there)[0])

    # The manifest

    def read_manifest(self) -> dict[str, Any] | None:
        """The run that is here, as this rank knows it."""
        manifest = None
        with self._ranks.together("reading the manifest"):
            if self._ranks.rank == 0:
                manifest = super().read_manifest()
        manifest = self._ranks.told("the manifest", manifest)[0]
        if manifest is None:
            return None
        self.run = manifest["run"]
        mine: dict[str, Any] = {str(self._ranks.rank): {}, **manifest.get("ranks", {})}[str(self._ranks.rank)]
        return {**manifest, **mine}

    def write_manifest(self, fingerprint: Mapping[str, Any], rng: Mapping[str, str], **more: Any) -> None:
        """Begin a run."""
        said = self._ranks.told("a new manifest", {"fingerprint": dict(fingerprint), "random_states": dict(rng)})
        with self._ranks.together("writing the manifest"):
            if self._ranks.rank == 0:
                super().write_manifest(fingerprint, rng, ranks={str(rank): one for rank, one in enumerate(said)})
        self.run = self._ranks.told("the id of the run", self.run)[0]

    # States

    def times(self, kind: str) -> list[int]:
        """The times of which there is a state of a kind, in order."""
        named = [name.partition("-") for name in self._there]
        return sorted(int(time or 0) for name, _, time in named if name == kind and (time.isdigit() or kind == "final"))

    def save(self, kind: str, time: int, tensors: Mapping[str, Tensor], facts: Mapping[str, Any], log: StepLog) -> None:
        """Write a state, of which each rank has a part.

        Raises:
            StoreError: One of the ranks cannot write; what was there before is as it was.
        """
        path = self._file(kind, time)
        part = path.with_name(f"{path.name}.part")
        try:
            with self._ranks.together(f"preparing {path.name}"):
                self._save_log(log, log.count)
                tensors = {name: _waited_for(tensor) for name, tensor in tensors.items()}
                packed, spans = pack(Tensors(list(tensors.values())), time, Constants())
                if any(not isinstance(place, (Place, Sharded)) for place in packed.places):
                    raise odd_tensor(tensors, packed.places)
                places = [place for place in packed.places if isinstance(place, (Place, Sharded))]
                whole = self._whole(tensors, places)
                keys = [
                    None if all(name in whole for name, place in _on(tensors, places, at)) else _digest(span)
                    for at, span in enumerate(spans)
                ]
                state = {name: tensors[name] for name in whole}
                state |= {key: span for key, span in zip(keys, spans, strict=True) if key is not None and span.numel()}
                if self._ranks.rank == 0:
                    with self._writing(path.name, path):
                        part.mkdir()
            self._checkpoint(part, path, state)
            with self._ranks.together(f"the checksums of {path.name}"), self._writing(path.name, path):
                header = {
                    **self._header(kind, time, tensors, facts, log, packed),
                    "keys": keys,
                    "tensors": described([place.part if isinstance(place, Sharded) else place for place in places]),
                    "sharded": [_sharding(place) if isinstance(place, Sharded) else None for place in places],
                    "whole": whole,
                    "files": {file.name: _checked(file) for file in self._own_files(part)},
                }
                header["checksum"] = checksum_of_json(header)
                write_whole(part / f"rank-{self._ranks.rank}.json", json.dumps(header).encode())
            with self._ranks.together(f"the name of {path.name}"), self._writing(path.name, path):
                if self._ranks.rank == 0:
                    if path.exists():
                        discard(path)
                    part.rename(path)
                    sync_directory(self.path)
        except StoreError:
            if self._ranks.rank == 0:
                shutil.rmtree(part, ignore_errors=True)
            raise
        self._there.add(path.name)

    def load(self, kind: str, time: int, log: StepLog) -> Saved | None:
        """What a state holds; None, with a warning, on all ranks, if a part of it is damaged: then it is gone."""
        path, header, fault = self._file(kind, time), {}, ""
        try:
            header = self._read_header(path)
            fault = self._stray(header, kind, time, log) or _damage(path, header["files"])
        except OSError as error:
            fault = f"it cannot be read: {error.strerror}"
        except (ValueError, KeyError, TypeError, AttributeError):
            fault = f"rank-{self._ranks.rank}.json is not what was written"
        faults = self._ranks.told(f"looking at {path.name}", fault)
        tensors: dict[str, Tensor] = {}
        if not any(faults):
            tensors, fault = self._filled(path, header)
            faults = self._ranks.told(f"loading {path.name}", fault)
        if any(faults):
            self._give_up(kind, time, "; ".join(f"rank {rank}: {said}" for rank, said in enumerate(faults) if said))
            return None
        return Saved(time, header["log"][0], tensors, header["facts"])

    def remove(self, kind: str, time: int) -> None:
        """Remove a state, if it is there."""
        path = self._file(kind, time)
        self._there.discard(path.name)
        if self._ranks.rank == 0:
            with suppress(OSError):  # what stays is true, or is recognized as damaged
                discard(path.rename(path.with_name(f"{path.name}.part")))

    def remove_run(self) -> None:
        """Remove all files of the run."""
        with self._ranks.together("the end of the run"):
            if self._ranks.rank == 0:
                super().remove_run()

    def remove_leftovers(self) -> None:
        """Remove whatever belongs to no run any more; files that are not ours stay."""
        self._there.clear()
        with self._ranks.together("removing what is left over"):
            if self._ranks.rank == 0:
                super().remove_leftovers()

    def check_space(self, needed: int) -> None:
        """Refuse to begin what will not fit, with the parts of all ranks."""
        needed = sum(self._ranks.told("the room that is needed", needed))
        with self._ranks.together("looking for room"):
            if self._ranks.rank == 0:
                super().check_space(needed)

    # Parts of the above

    def _file(self, kind: str, time: int) -> Path:
        return self.path / ("final" if kind == "final" else f"{kind}-{time}")

    def _own_files(self, part: Path) -> list[Path]:
        found = sorted(part.glob(f"__{self._ranks.rank}_*"))
        return [*found, part / ".metadata"] if self._ranks.rank == 0 else found

    def _whole(self, tensors: Mapping[str, Tensor], places: Sequence[Place | Sharded]) -> list[str]:
        """The names of what goes in as the DTensor that it is."""
        from torch.distributed.tensor import Shard

        found = []
        for name, place in zip(tensors, places, strict=True):
            if isinstance(place, Sharded):
                if _mesh_key(place.mesh) not in self._meshes:
                    raise StoreError(
                        f"{name} is a DTensor over a mesh that no parameter has, so it could not be put together again "
                        "from run_dir. Make it on theirs: distribute_tensor(tensor, parameter.device_mesh, placements)."
                    )
                _sharding(place)
                if all(type(placement) is Shard for placement in place.placements):
                    found.append(name)
        return found

    def _checkpoint(self, part: Path, path: Path, state: dict[str, Tensor]) -> None:
        from torch.distributed.checkpoint.api import CheckpointException
        from torch.distributed.checkpoint.filesystem import FileSystemWriter
        from torch.distributed.checkpoint.state_dict_saver import save

        try:
            with unless_gone(self._ranks.group, f"writing {path.name}"), _quietly():
                save(
                    state,
                    storage_writer=FileSystemWriter(part),
                    process_group=self._ranks.group,
                )
        except CheckpointException as error:  # on all ranks
            raise StoreError(
                f"{path.name} could not be written to {path}: {_first(error)}. The run is as it was last saved: make "
                "room there and start the same processes again, metagradient(..., run_dir=...), which go on from there."
            ) from error

    def _read_header(self, path: Path) -> dict[str, Any]:
        header: dict[str, Any] = json.loads((path / f"rank-{self._ranks.rank}.json").read_bytes())
        if header.pop("checksum") != checksum_of_json(header):
            raise ValueError
        return header

    def _filled(self, path: Path, header: Mapping[str, Any]) -> tuple[dict[str, Tensor], str]:
        """The tensors of a state, on new spans, and what is wrong with it if something is."""
        from torch.distributed.checkpoint.api import CheckpointException
        from torch.distributed.checkpoint.filesystem import FileSystemReader
        from torch.distributed.checkpoint.state_dict_loader import load

        sizes = zip(header["span_bytes"], header["devices"], strict=True)
        spans = [torch.empty(size, dtype=torch.uint8, device=device) for size, device in sizes]
        tensors = {}
        with torch.no_grad():
            described = zip(header["names"], header["tensors"], header["sharded"], strict=True)
            for name, entry, sharding in described:
                place = place_of(entry)
                kind = place if sharding is None else self._dtensor(place, sharding)
                tensors[name] = kind.tensor(spans[place.span])
        state = {name: tensors[name] for name in header["whole"]}
        keyed = zip(header["keys"], spans, strict=True)
        several = [(key, span) for key, span in keyed if key is not None and span.numel()]
        state |= dict(several)
        try:
            with unless_gone(self._ranks.group, f"reading {path.name}"), _quietly():
                load(state, storage_reader=FileSystemReader(path), process_group=self._ranks.group)
        except CheckpointException as error:  # on all ranks
            return {}, f"torch.distributed.checkpoint cannot read it: {_first(error)}"
        for key, span in several:  # two spans of the same bytes have one key
            if span is not state[key]:
                span.copy_(state[key])
        return tensors, ""

    def _dtensor(self, place: Place, sharding: Mapping[str, Any]) -> Sharded:
        from torch.distributed.tensor import Partial, Replicate, Shard

        makers: dict[str, Any] = {"Shard": Shard, "Replicate": Replicate, "Partial": Partial}
        placements = tuple([makers[name](*given) for name, *given in sharding["placements"]])
        mesh = self._meshes[json.dumps(sharding["mesh"])]
        return Sharded(place, mesh, placements, torch.Size(sharding["size"]), tuple(sharding["stride"]))


@contextmanager
def opened_together(path: Path, ranks: Ranks, tensors: Sequence[Tensor]) -> Iterator[RankFiles]:
    """The files in a directory that all ranks see, which is made if it is not there; rank 0 locks it.

    Raises:
        RunDirectoryError: Another job has it, it cannot be made, or a rank does not see it.
    """
    with ExitStack() as stack:
        with ranks.together("opening run_dir"):
            if ranks.rank == 0:
                stack.enter_context(opened(path))
                _sync(path / "lock")
        holder = ranks.told("who works in run_dir", (path / "lock").read_text() if ranks.rank == 0 else "")[0]
        with ranks.together("seeing run_dir"):
            seen = (path / "lock").read_text() if (path / "lock").exists() else None
            if seen != holder:
                raise RunDirectoryError(
                    f"run_dir={str(path)!r} of rank {ranks.rank} is not the directory that rank 0 has made. All "
                    "processes of one loop share one: run_dir='/a/shared/disk/run'. For a loop of each process alone, "
                    "with a run_dir of its own, say so: group, _ = torch.distributed.new_subgroups(1) and "
                    "metagradient(..., group=group)."
                )
        yield RankFiles(path, ranks, tensors)


def _sync(path: Path) -> None:
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


@contextmanager
def _quietly() -> Iterator[None]:
    """Without what torch.distributed.checkpoint warns of in its own code."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        yield


def _first(error: Any) -> str:
    """What the first rank that failed says."""
    (raised, _), *_ = error.failures.values()
    return getattr(raised, "strerror", None) or f"{type(raised).__name__}: {raised}"


def _waited_for(tensor: Any) -> Tensor:
    """A DTensor whose part has arrived."""
    part: Any = local(tensor)
    if part is not tensor and hasattr(part, "wait"):
        from torch.distributed.tensor import DTensor

        found: Tensor = DTensor.from_local(
            part.wait(), tensor.device_mesh, tensor.placements, shape=tensor.shape, stride=tensor.stride()
        )
        return found
    return tensor  # type: ignore[no-any-return]


def _on(names: Mapping[str, Tensor], places: Sequence[Place | Sharded], span: int) -> list[tuple[str, Place | Sharded]]:
    return [(name, place) for name, place in zip(names, places, strict=True) if place.span == span]


def _digest(span: Tensor) -> str:
    return hashlib.blake2b(memory_of(span.cpu()), digest_size=16).hexdigest()


def _mesh_key(mesh: Any) -> str:
    names = mesh.mesh_dim_names
    return json.dumps([mesh.device_type, mesh.mesh.tolist(), None if names is None else list(names)])


def _sharding(place: Sharded) -> dict[str, Any]:
    """How a DTensor lies, for a header."""
    from torch.distributed.tensor import Partial, Replicate, Shard

    placements: list[list[Any]] = []
    for placement in place.placements:
        kind = type(placement)
        if kind is Shard:
            placements.append(["Shard", placement.dim])
        elif kind is Replicate:
            placements.append(["Replicate"])
        elif kind is Partial:
            placements.append(["Partial", placement.reduce_op])
        else:
            raise StoreError(
                f"A DTensor is placed as {placement}, of which run_dir keeps no copy. Place it as one of Shard, "
                "Replicate and Partial: tensor.redistribute(mesh, [Replicate()])."
            )
    return {
        "mesh": json.loads(_mesh_key(place.mesh)),
        "placements": placements,
        "size": list(place.size),
        "stride": list(place.stride),
    }


def _checked(path: Path) -> list[int]:
    """The size of a file and its CRC-32."""
    size = checksum = 0
    with path.open("rb") as file:
        while piece := file.read(_READ):
            size, checksum = size + len(piece), zlib.crc32(piece, checksum)
    return [size, checksum]


def _damage(path: Path, files: Mapping[str, list[int]]) -> str:
    """What is wrong with the files that a rank has written; empty if nothing is."""
    for name, (size, checksum) in files.items():
        found_size, found = _checked(path / name)
        if found_size != size:
            return f"{name} has {found_size} bytes instead of {size}"
        if found != checksum:
            return f"the checksum of {name} is {found:08x} instead of {checksum:08x}"
    return ""
