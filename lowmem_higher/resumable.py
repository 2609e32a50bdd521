"""A run that survives its process: what is saved when, and how it goes on from there.

NOTE [ What is on the disk when ]

Carries are held in files as the schedule says. After each leaf the adjoint before it is saved; only then does the carry
that the leaf began with go, and only with the next one the adjoint before that. On a way the point where the run stands
is saved every minute or so, and when a signal comes. So a kill at any moment costs the work since the last save, and a
damaged file what lies between it and an earlier one.
"""

from __future__ import annotations

import functools
import shlex
import signal
import sys
import time
from base64 import b64decode, b64encode
from collections.abc import Mapping
from typing import NoReturn

import torch

from lowmem_higher.agreement import Alone
from lowmem_higher.errors import RunDirectoryError
from lowmem_higher.fingerprint import Fingerprint, differences
from lowmem_higher.interrupts import Interrupts
from lowmem_higher.piece_plan import PiecePlan
from lowmem_higher.pieces import Pieces
from lowmem_higher.progress import Work
from lowmem_higher.replay_state import RngState, capture_rng, write_rng
from lowmem_higher.report import Report
from lowmem_higher.run_directory import RunFiles, Saved
from lowmem_higher.run_states import Adjoint, Final, Point
from lowmem_higher.schedule import Periodic
from lowmem_higher.step_log import RECORD, StepLog

LEAF_STEPS = 512  # at most; a record takes 5 KB
LEAF_SECONDS = 30.0  # about; a signal waits for the end of a leaf's backward
LEAF_COST = 5  # first-order runs in the time that a leaf takes for each of its steps, about
FEWEST_STEPS = 8  # of a leaf, if there are so many: each one costs one first-order run
SAVE_SECONDS = 60.0  # between two points saved on a way; saving takes at most a 20th of the time
_TRIAL = 100  # a trial of one step in so many tells what pieces take, for the time to go
_OVERHEAD = 1 << 16  # bytes of a file beside its tensors: names, random states


class Resumable:
    """One run with its files.

    Args:
        pieces: Takes the steps and pulls them back.
        plan: Cuts them into pieces.
        log: Of the steps.
        files: Where the run is kept.
        fingerprint: Of this call.
        interrupts: Whether a signal came.
        work: Is told how far the run is.
        ranks: The processes that run this loop together. Whatever depends on time or on signals they decide together.
    """

    def __init__(
        self,
        pieces: Pieces,
        plan: PiecePlan,
        log: StepLog,
        files: RunFiles,
        fingerprint: Fingerprint,
        interrupts: Interrupts,
        work: Work,
        ranks: Alone,
    ) -> None:
        self._pieces, self._plan, self._log, self._files = pieces, plan, log, files
        self._fingerprint, self._interrupts, self._work = fingerprint, interrupts, work
        self._ranks = ranks
        self._rng: RngState = ()  # where the run began
        self._adjoint: Adjoint | None = None
        self._here: Point | None = None  # where the run stands on a way
        self._saved = time.monotonic()
        self._save_seconds = 0.0

    def run(self) -> tuple[Final, Adjoint, Report]:
        """Go on from what there is, to the end.

        Raises:
            RunDirectoryError: What there is is of another run.
            StoreError: A file could not be written.
            KeyboardInterrupt, SystemExit: A signal came; all is saved.
        """
        before = capture_rng(self._pieces.devices)
        try:
            self._resume(before)
            self._foresee()
            final = self._finished()
        except BaseException:
            write_rng(before)
            raise
        finally:
            self._work.close()
        write_rng(final.rng)
        assert self._adjoint is not None
        return final, self._adjoint, self._pieces.report

    def _signalled(self) -> bool:
        return self._asked("a look for signals", overdue=False)

    def _stops(self) -> bool:
        return self._asked("a look for signals and at the clock", self._overdue())

    def _asked(self, what: str, overdue: bool) -> bool:
        """Whether a signal came to any of the ranks, or one of them is overdue."""
        number, late = self._ranks.most(what, self._interrupts.received or 0, overdue)
        if number:
            self._interrupts.received = signal.Signals(int(number))
        return bool(number or late)

    def _finished(self) -> Final:
        while True:
            while self._position > self._plan.end:
                self._piece()
                if self._signalled():
                    self._stop()
            saved = self._files.load("final", self._plan.steps, self._log)
            if saved is not None:
                return Final.unpacked(saved.tensors)
            self._back_to_the_loop()

    # Where it stands

    @property
    def _position(self) -> int:
        """The steps that are still to be pulled back."""
        return self._plan.steps if self._adjoint is None else self._adjoint.time

    def _held(self) -> list[int]:
        """The carries that are held for later, in order; that of step 0 needs no file."""
        return [0, *(at for at in self._files.times("carry") if 0 < at < self._position)]

    def _resume(self, rng: RngState) -> None:
        files, log = self._files, self._log
        manifest = files.read_manifest()
        if manifest is None:
            files.remove_leftovers()
            self._rng = rng
            files.check_space(self._bytes_needed())
            files.write_manifest(self._fingerprint, _encoded(rng))
            return
        with self._ranks.together("comparing this run with that in run_dir"):
            other = differences(manifest["fingerprint"], self._fingerprint)
            if other:
                listed = "\n  ".join(other)
                raise RunDirectoryError(
                    f"The run in {files.path} is another one, and a gradient of two would be wrong. What differs:\n  "
                    f"{listed}\nMake the call that was broken off, or give this one another run_dir, or give that one "
                    f"up: shutil.rmtree({str(files.path)!r})."
                )
        self._rng = _decoded(manifest["random_states"])
        files.load_log(log)
        files.check_space(self._bytes_needed())
        for position in files.times("adjoint"):  # the least is the newest
            saved = files.load("adjoint", position, log)
            if saved is None:
                continue
            self._pieces.take_over(saved.facts["runs"])
            if files.times("final") and files.load("final", self._plan.steps, log) is not None:
                self._adjoint = Adjoint.unpacked(position, saved.tensors, saved.facts)
                files.cut_log(log, saved.logged)
                return
        self._back_to_the_loop()

    def _back_to_the_loop(self) -> None:
        """There is no adjoint to go on from: go on from the newest point, in the loop."""
        files, log = self._files, self._log
        self._adjoint = self._here = None
        for position in files.times("adjoint"):
            files.remove("adjoint", position)
        files.remove("final", self._plan.steps)
        there = [(at, kind) for kind in ("carry", "newest") for at in files.times(kind)]
        for at, kind in sorted(there, reverse=True):
            saved = files.load(kind, at, log)
            if saved is not None:
                self._here = self._unpacked(saved)
                files.cut_log(log, saved.logged)
                return
        files.cut_log(log, 0)

    # Going on

    def _piece(self) -> None:
        """Go on to the next carry to be held, or differentiate a leaf."""
        piece = self._plan.next(self._held(), self._position, self._longest_leaf())
        point = self._point(piece.start, piece.stop)
        if point is None:
            return  # its file was damaged; the carry before it is taken
        try:
            if point.time == piece.stop:
                self._leaf(point, piece.slots)
            else:
                self._here = self._pieces.way(point, piece.stop, self._stops)
        except Exception as error:
            error.add_note(
                f"(metagradient: steps in this message are counted from step {point.time} of {self._plan.steps})"
            )
            raise
        if self._here is None:
            return
        if self._here.time == piece.stop and piece.kept:
            self._save("carry", self._here)
            self._remove("newest")
        elif self._stops():
            self._save("newest", self._here)

    def _leaf(self, point: Point, slots: int) -> None:
        too_long = functools.partial(self._too_long, point.time)
        found = self._pieces.leaf(point, self._adjoint, slots, self._signalled, too_long)
        if isinstance(found, Point):
            self._here = found
            return
        self._here = None
        self._adjoint, final = found
        if final is not None:
            self._files.save("final", self._plan.steps, final.packed(), {}, self._log)
        self._save_adjoint(self._adjoint)

    def _too_long(self, start: int) -> bool:
        """Whether a leaf is one no more, now that it is known what a step takes."""
        return self._plan.next(self._held(), self._position, self._longest_leaf()).stop > start

    def _longest_leaf(self) -> int:
        seconds, _ = self._ranks.most("the length of a leaf", self._pieces.step_seconds or 0.0)
        if seconds == 0.0:
            return LEAF_STEPS
        return min(LEAF_STEPS, max(FEWEST_STEPS, int(LEAF_SECONDS / LEAF_COST / seconds)))

    def _point(self, start: int, stop: int) -> Point | None:
        """The last point that is known on the way from a carry that is held; None if its file was damaged."""
        if self._here is not None and start <= self._here.time <= stop:
            return self._here
        for at in reversed([at for at in self._files.times("newest") if start < at <= stop]):
            saved = self._files.load("newest", at, self._log)
            if saved is not None:
                return self._unpacked(saved)
        if start == 0:
            return Point(0, None, self._rng)
        saved = self._files.load("carry", start, self._log)
        return None if saved is None else self._unpacked(saved)

    # Saving

    def _save(self, kind: str, point: Point) -> None:
        started = time.monotonic()
        tensors, facts = point.packed(self._pieces.names)
        self._files.save(kind, point.time, tensors, {**facts, "runs": self._pieces.counts}, self._log)
        if kind == "newest":
            self._remove("newest", but=point.time)
        self._saved = time.monotonic()
        self._save_seconds = self._saved - started

    def _save_adjoint(self, adjoint: Adjoint) -> None:
        tensors, facts = adjoint.packed()
        self._files.save("adjoint", adjoint.time, tensors, {**facts, "runs": self._pieces.counts}, self._log)
        for old in self._files.times("adjoint")[2:]:
            self._files.remove("adjoint", old)
        self._remove("carry", adjoint.time)
        self._remove("newest", adjoint.time)
        self._saved = time.monotonic()

    def _remove(self, kind: str, first: int = 0, but: int | None = None) -> None:
        for at in self._files.times(kind):
            if at >= first and at != but:
                self._files.remove(kind, at)

    def _overdue(self) -> bool:
        return time.monotonic() - self._saved > max(SAVE_SECONDS, 20 * self._save_seconds)

    def _unpacked(self, saved: Saved) -> Point:
        self._pieces.take_over(saved.facts["runs"])
        return Point.unpacked(saved.time, saved.tensors, saved.facts, self._pieces.names)

    def _bytes_needed(self) -> int:
        """At most, of all files."""
        carry, adjoint, final = self._pieces.sizes(common=self._ranks.rank == 0)
        schedule, steps = self._plan.schedule, self._plan.steps
        held = -(-steps // schedule.every) if isinstance(schedule, Periodic) else min(schedule.checkpoints, steps)
        files = held + 6
        return (held + 2) * carry + 3 * adjoint + final + RECORD * steps + files * _OVERHEAD

    # Progress and signals

    def _foresee(self) -> None:
        """Tell how much is to be done; of a long run, after a trial of a way and of a leaf."""
        if not any(self._ranks.most("whether there is a bar", self._work.shown)):
            return
        weight, steps = 1.0, min(LEAF_STEPS, self._plan.steps // _TRIAL)
        if steps >= FEWEST_STEPS:
            weight = self._run_weight(steps)
        here = None if self._here is None else self._here.time
        ahead = self._plan.ahead(self._held(), self._position, self._longest_leaf(), here)
        self._work.begin(ahead.way, ahead.first_order + ahead.second_order, weight)

    def _run_weight(self, steps: int) -> float:
        """How many steps of a way a run of a leaf takes the time of."""
        pieces, begin, counts = self._pieces, Point(0, None, self._rng), dict(self._pieces.counts)
        schedule = self._plan.schedule
        slots = 1 if isinstance(schedule, Periodic) else (schedule.checkpoints + 1) // 2
        pieces.way(begin, FEWEST_STEPS, self._signalled)
        started = time.perf_counter()
        gone = pieces.way(begin, steps, self._signalled)
        between = time.perf_counter()
        back = pieces.leaf(begin, pieces.trial_adjoint(gone), slots, self._signalled, lambda: False)
        ended = time.perf_counter()
        runs = self._plan.runs_of_leaf(gone.time, slots) + gone.time
        pieces.counts = counts
        if isinstance(back, Point):
            return 1.0
        return (ended - between) / runs / ((between - started) / gone.time)

    def _stop(self) -> NoReturn:
        steps, at = self._plan.steps, "" if self._here is None else f" before step {self._here.time}"
        phase = "loop" if self._adjoint is None else f"backward, with {self._position} steps to go,"
        command = shlex.join([sys.executable, *sys.orig_argv[1:]])
        processes = f", in {self._ranks.world} processes" if self._ranks.world > 1 else ""
        if self._ranks.rank == 0:
            sys.stderr.write(
                f"\nmetagradient was stopped in the {phase}{at} of {steps}. All that it needs is saved in "
                f"{self._files.path}, and the same call goes on from there{processes}:\n  {command}\n"
            )
        raise self._interrupts.error()


def _encoded(rng: RngState) -> dict[str, str]:
    return {str(device): b64encode(bytes(state.tolist())).decode() for device, state in rng}


def _decoded(states: Mapping[str, str]) -> RngState:
    decoded = {device: torch.tensor(list(b64decode(text)), dtype=torch.uint8) for device, text in states.items()}
    return tuple([(torch.device(device), state) for device, state in decoded.items()])
