"""A disk that is full, and not by a trick: what the tests share, and a program that runs on a small disk of its own."""

from __future__ import annotations

import functools
import gc
import json
import os
import re
import subprocess
import sys
import warnings
from collections import Counter
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import Any

import pytest
import torch
from survivor import CUT, Problem, same

import lowmem_higher as higher
from lowmem_higher import pieces, resumable
from lowmem_higher.run_directory import RunFiles

BYTES, NODES = 2 << 20, 64  # of the disk
PAGE = 4096  # what it hands out
STEPS = 14
ROOT = Path(__file__).resolve().parent.parent
_MOUNT = f'mount -t tmpfs -o size={BYTES},nr_inodes={NODES} tmpfs "$0" && exec "$@"'


@functools.cache
def spaces() -> tuple[list[str], str]:
    """The command that gives a process a space of its own for mounts; none, and why, if this one may not have it."""
    said = ""
    for command in (["unshare", "-m"], ["unshare", "-rm"]):
        try:
            tried = subprocess.run(
                [*command, "sh", "-c", _MOUNT, "/mnt", "true"], stderr=subprocess.PIPE, text=True, check=False
            )
        except OSError as error:
            return [], f"{error}"
        if tried.returncode == 0:
            return command, ""
        said = tried.stderr.strip()
    return [], f"no disk can be mounted here: {said}"


def on_a_disk(folder: Path, *arguments: str) -> dict[str, Any]:
    """Run this program on a small disk, which is mounted on `folder` and goes with it."""
    command = [*spaces()[0], "sh", "-c", _MOUNT, str(folder), sys.executable, __file__, str(folder), *arguments]
    done = subprocess.run(
        command, cwd=ROOT, env={**os.environ, "PYTHONPATH": str(ROOT)}, stdout=subprocess.PIPE, text=True, check=True
    )
    found: dict[str, Any] = json.loads(done.stdout.splitlines()[-1])
    return found


class Disk:
    """It can be filled by somebody else's files, to the last byte but `spare`, or to the last name."""

    def __init__(self, path: Path) -> None:
        self.path, self._filler = path, path / "filler"

    def fill(self, spare: int | str) -> None:
        """Nothing is left but so many bytes; "names": no more files."""
        if spare == "names":
            self._filler.mkdir(exist_ok=True)
            for number in range(NODES):
                try:
                    (self._filler / str(number)).touch()
                except OSError:
                    return
            raise RuntimeError("the disk has more names than it should have")
        assert isinstance(spare, int)
        stat = os.statvfs(self.path)
        more = stat.f_bavail * stat.f_frsize - spare
        with self._filler.open("ab") as file:
            if more > 0:
                file.write(bytes(more))
            else:
                file.truncate(max(0, file.tell() + more))

    def free(self) -> None:
        """Make room."""
        if self._filler.is_dir():
            for entry in list(self._filler.iterdir()):
                entry.unlink()
            self._filler.rmdir()
        self._filler.unlink(missing_ok=True)

    def left(self) -> list[str]:
        """What is on it besides."""
        return sorted(str(entry.relative_to(self.path)) for entry in self.path.rglob("*") if self._filler not in
                      (entry, *entry.parents))  # fmt: skip


class Call:
    """`metagradient` with files on the disk.

    Args:
        disk: Where they are.
        steps: Of the loop.
        settings: Of the call.
        files: Which: `run_dir`, that the same call goes on from, `store`, or both.
    """

    def __init__(self, disk: Disk, steps: int, settings: dict[str, Any], files: tuple[str, ...]) -> None:
        self.disk, self._steps, self._problem = disk, steps, Problem()
        self._settings = {"outer": self._problem.outer, **settings} if "truncate" in settings else settings
        self.expected = self._problem.run(steps, **self._settings)
        self._run_dir = disk.path / "run" if "run_dir" in files else None
        self._store = {"store": str(disk.path)} if "store" in files else {}

    def run(self, at_read: Callable[[int], None]) -> list[torch.Tensor]:
        """The call; `at_read` is told how many batches were read."""
        self._problem.reads, self._problem.at_read = 0, at_read
        return self._problem.run(self._steps, self._run_dir, **self._settings, **self._store)

    def odd(self) -> list[str]:
        """What should not be there after an error."""
        ours = [] if self._run_dir is None else [entry.name for entry in self._run_dir.glob("*.[!p]*")]
        return [name for name in self.disk.left() if Path(name).name not in {"run", "lock", *ours}]


def refused(call: Call, at_read: Callable[[int], None], said: Counter[str]) -> list[torch.Tensor] | None:
    """What a call gives; None if it raises what it should."""
    try:
        return call.run(at_read)
    except higher.StoreError as error:
        text = f"{error}".replace(str(call.disk.path), "DISK")
        said[re.sub(r"\d[\d.]*( [KM]?i?B)?", "#", re.sub(r"lowmem_higher_\w+", "OWN", text))] += 1
        return None


class Killed(BaseException):
    """Ends a run as a kill would, as far as the files go."""


def end_soon(read: int) -> None:
    """Let a run that went on not come far: what it wrote is read again."""
    if read == 4:
        raise Killed


def attempt(call: Call, moment: int, spare: int | str, outcome: Counter[str], said: Counter[str]) -> None:
    """Fill the disk at a moment, and go on when there is room; count what came of it."""

    def fill(read: int) -> None:
        if read >= moment:
            call.disk.fill(spare)

    fill(0)
    found = refused(call, fill, said)
    if found is None:
        # After an error torch's queue holds the nodes that it has not run, until the next backward.
        torch.ones((), requires_grad=True).backward()
        gc.collect()
        outcome["refused"] += 1
        outcome["odd files"] += bool(call.odd())
        found = refused(call, lambda read: None, said)  # nobody has made room yet
    call.disk.free()
    if found is None:
        with suppress(Killed):
            call.run(end_soon)
        found = call.run(lambda read: None)
    gc.collect()
    outcome["attempts"] += 1
    outcome["not the same bits"] += not same(found, call.expected)
    outcome["files left"] += bool(call.disk.left())


SPARES = (0, PAGE, 2 * PAGE, 4 * PAGE, "names")
LOG = 345  # steps whose log takes more than a page


def filled(disk: Disk, kind: str, moments: list[int]) -> dict[str, Any]:
    """Fill the disk when so many batches were read, each time with another remainder of what was free.

    Kinds: "foreseen", a run with files; "unforeseen", the same where nobody knows how much is free, as under a quota;
    "log", one of so many steps that its log is torn; "store", carries in files; "both".
    """
    with pytest.MonkeyPatch.context() as patch:
        if kind in ("unforeseen", "log", "both"):
            patch.setattr(RunFiles, "check_space", lambda self, needed: None)
        settings = {"checkpoint_every": 3, "truncate": 6} if kind == "log" else {"checkpoints": 3}
        files = {"store": ("store",), "both": ("store", "run_dir")}.get(kind, ("run_dir",))
        call = Call(disk, LOG if kind == "log" else STEPS, settings, files)
        outcome: Counter[str] = Counter()
        said: Counter[str] = Counter()
        for moment in moments:
            for spare in SPARES[:1] if kind == "log" else SPARES:
                attempt(call, moment, spare, outcome, said)
    counts = ("attempts", "refused", "not the same bits", "odd files", "files left")
    return {**{name: outcome[name] for name in counts}, "said": dict(said)}


def main() -> None:
    """`full_disk.py disk kind=0,4,8 ...`: fill it at these moments, and print what came of it as JSON."""
    disk, kinds = Disk(Path(sys.argv[1])), [argument.split("=") for argument in sys.argv[2:]]
    torch.set_num_threads(1)
    warnings.simplefilter("error", higher.DamagedFileWarning)  # nothing that was written may be half a file
    with pytest.MonkeyPatch.context() as patch:
        for name, value in CUT.items():
            patch.setattr(resumable, name, value)
        patch.setattr(resumable.Resumable, "_overdue", lambda self: True)  # a save after each step of a way
        patch.setattr(pieces, "WAY_STEPS", 4)
        print(json.dumps({kind: filled(disk, kind, [*map(int, moments.split(","))]) for kind, moments in kinds}))


if __name__ == "__main__":
    main()
