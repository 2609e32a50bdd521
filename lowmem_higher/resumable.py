"""A known number of steps, differentiated piece by piece, with all that a resume needs in files.

NOTE [ Pieces ]

The steps are gone back over as the schedule says (`schedule.py`), with carries in files. Where a stretch is short, it is
a *leaf*: a context of the ordinary engine that begins at a carry, takes the steps, and is differentiated at once,

    torch.autograd.grad([weights, state, meta], [weights before, state before, meta], [cotangents, gathered so far])

The gradients of `meta` gathered in later steps go in as cotangents of `meta` itself, so autograd adds the new shares to
them, one by one, in the order of one whole backward: the result is the same to the bit, wherever the pieces are cut. A
longer way from carry to carry is taken by contexts that are dropped. So at most one leaf's records are held.

A leaf takes the first-order runs that the schedule has for its stretch and one more, since its loop ends with the last
step; over T steps that is the optimum and one run for each leaf but the first.

NOTE [ What is on disk when ]

Before anything is removed, what makes it needless is on the disk: a carry goes once the adjoint before it is saved. The
adjoint before that one stays too, as something to fall back on. On a long way the carry where the run stands is saved
every minute or so, and when a signal comes.
"""

from __future__ import annotations

import dataclasses
import shlex
import sys
import time
from base64 import b64decode, b64encode
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any, NoReturn

import torch
from torch import Tensor, nn

from lowmem_higher.custom_rules import is_custom
from lowmem_higher.errors import RecordError, RunDirectoryError
from lowmem_higher.fingerprint import Fingerprint, differences
from lowmem_higher.innerloop import Start, inner_loop
from lowmem_higher.interrupts import Interrupts
from lowmem_higher.loop_function import LoopFunction
from lowmem_higher.optim.base import DifferentiableOptimizer
from lowmem_higher.replay_state import ModuleState, RngState, capture_rng, write_rng
from lowmem_higher.report import Report
from lowmem_higher.run_directory import RunFiles, Saved
from lowmem_higher.run_states import Adjoint, Final, Point
from lowmem_higher.schedule import Periodic, Revolve
from lowmem_higher.settings import Settings
from lowmem_higher.step import StateKey, state_keys, state_leaf, state_tensors
from lowmem_higher.step_log import RECORD

LEAF_STEPS = 512  # at most; a record takes 5 KB
LEAF_SECONDS = 30.0  # about; a signal waits for the end of a leaf's backward
FEWEST_STEPS = 8  # of a leaf, if there are so many: each one costs one first-order run
LEAF_COST = 5  # first-order runs in the time that a leaf takes for each of its steps, about
WAY_STEPS = 256  # of a context that is dropped
SAVE_SECONDS = 60.0  # between two carries saved on the way; a save may take a 20th of the time
_ADDED_UP = (
    "first_order_runs",
    "second_order_runs",
    "update_runs",
    "forward_seconds",
    "backward_seconds",
    "compile_seconds",
)
_LARGEST = ("checkpoints_peak", "carry_bytes", "carries_peak_bytes", "journal_bytes", "stored_peak_bytes")
_OVERHEAD = 1 << 16  # bytes of a file beside its tensors: names, random states


class Resumable:
    """One run with its files.

    Args:
        function: The loop.
        model, opt, override, device: What a context is opened with.
        settings: How leaves are differentiated, and which carries are held.
        steps: The number of inner steps.
        files: Where the run is kept.
        fingerprint: Of this call.
        interrupts: Whether a signal came.
    """

    def __init__(
        self,
        function: LoopFunction,
        model: nn.Module,
        opt: torch.optim.Optimizer,
        override: Mapping[str, Sequence[Any]] | None,
        device: torch.device | str | None,
        settings: Settings,
        steps: int,
        files: RunFiles,
        fingerprint: Fingerprint,
        interrupts: Interrupts,
    ) -> None:
        self._function, self._files, self._interrupts = function, files, interrupts
        self._model, self._opt, self._override, self._device = model, opt, override, device
        self._settings, self._steps = settings, steps
        self._fingerprint = fingerprint
        self._names = [name for name, _ in model.named_parameters()]
        self._devices = _cuda_devices([*model.parameters(), *function.tensors], device)
        own = [ModuleState.capture([module]).candidates() for module in model.modules()]
        self._own_attributes = set[int]().union(*own)
        self._plain = ModuleState.capture(list(model.modules())).plain
        self._end = max(0, steps - settings.truncate) if settings.truncate is not None else 0
        self._schedule = settings.schedule
        self._rng: RngState = ()  # where the run began
        self._adjoint: Adjoint | None = None
        self._here: Point | None = None  # where the way that is being gone has come to
        self._runs = dict[str, float]()
        self._peaks = dict[str, int]()
        self._step_seconds: float | None = None
        self._saved = time.monotonic()
        self._save_seconds = 0.0

    def run(self) -> tuple[Final, Adjoint, Report]:
        """Go on from what there is, to the end. The files are removed.

        Raises:
            RunDirectoryError: What there is is of another run.
            StoreError: A file could not be written.
            KeyboardInterrupt, SystemExit: A signal came; all is saved.
        """
        before = capture_rng(self._devices)
        try:
            self._resume(before)
            final = self._finished()
        except BaseException:
            write_rng(before)
            raise
        self._files.remove_run()
        write_rng(final.rng)
        assert self._adjoint is not None
        return final, self._adjoint, self._report()

    def _finished(self) -> Final:
        while True:
            while self._position > self._end:
                self._piece()
                if self._interrupts.received is not None:
                    self._stop()
            saved = self._files.load("final", self._steps, self._function.log)
            if saved is not None:
                return Final.unpacked(saved.tensors)
            self._back_to_the_loop()

    # Where it stands

    @property
    def _position(self) -> int:
        """The steps that are still to be pulled back."""
        return self._steps if self._adjoint is None else self._adjoint.time

    def _resume(self, rng: RngState) -> None:
        files, log = self._files, self._function.log
        manifest = files.read_manifest()
        if manifest is None:
            files.remove_leftovers()
            self._rng = rng
            files.check_space(self._bytes_needed())
            files.write_manifest(self._fingerprint, _encoded(rng))
            return
        other = differences(manifest["fingerprint"], self._fingerprint)
        if other:
            listed = "\n  ".join(other)
            raise RunDirectoryError(
                f"The run in {files.path} is another one, and a gradient of two would be wrong. What differs:\n  "
                f"{listed}\nMake the call that was broken off, or give this one another run_dir, or give that one up: "
                f"shutil.rmtree({str(files.path)!r})."
            )
        self._rng = _decoded(manifest["random_states"])
        files.load_log(log)
        files.check_space(self._bytes_needed())
        for position in files.times("adjoint"):  # the least is the newest
            saved = files.load("adjoint", position, log)
            if saved is not None:
                self._take_over(saved)
                final = files.load("final", self._steps, log) if files.times("final") else None
                if final is not None:
                    self._adjoint = Adjoint.unpacked(position, saved.tensors, saved.facts)
                    files.cut_log(log, saved.logged)
                    return
        self._back_to_the_loop()

    def _back_to_the_loop(self) -> None:
        """There is no adjoint to go on from: go on from the newest carry, in the loop."""
        files, log = self._files, self._function.log
        self._adjoint = self._here = None
        for position in files.times("adjoint"):
            files.remove("adjoint", position)
        files.remove("final", self._steps)
        there = [(at, kind) for kind in ("carry", "newest") for at in files.times(kind)]
        for at, kind in sorted(there, reverse=True):
            saved = files.load(kind, at, log)
            if saved is not None:
                self._here = self._unpacked(saved)
                files.cut_log(log, saved.logged)
                return
        files.cut_log(log, 0)

    def _held(self) -> list[int]:
        """The carries that are held for later, in order; that of step 0 needs no file."""
        return [0, *(at for at in self._files.times("carry") if 0 < at < self._position)]

    # Going on

    def _piece(self) -> None:
        """Go on to the next carry to be held, or differentiate a leaf."""
        held = self._held()
        stop, slots, kept = self._plan(held)
        point = self._point(held[-1], stop)
        if point is None:
            return  # its file was damaged; the carry before it is taken
        try:
            if point.time == stop:
                self._leaf(point, slots)
                return
            self._here = self._way(point, stop)
        except Exception as error:
            error.add_note(
                f"(metagradient: the steps in this message are counted from step {point.time} of {self._steps})"
            )
            raise
        if self._here.time == stop and kept:
            self._save("carry", self._here)
            self._remove("newest", 0)
        elif self._interrupts.received is not None:
            self._save("newest", self._here)

    def _plan(self, held: Sequence[int]) -> tuple[int, int, bool]:
        """Where to go from the newest carry that is held, the slots that are free there, and whether it is to be held.

        Where to go is where it stands if a leaf begins there.
        """
        base, position, schedule = held[-1], self._position, self._schedule
        if base < self._end:
            return self._end, 0, True
        if isinstance(schedule, Periodic):
            following = base + schedule.every
            return (following, 0, True) if following < position else (base, 0, False)
        assert isinstance(schedule, Revolve)
        slots = schedule.checkpoints - len(held) + 1
        longest = self._longest_leaf()
        if position - base <= longest:
            return base, slots, False
        way = schedule.on_the_way(base, position - schedule.graphs, len(held)) if slots > 1 else []
        return (way[0], slots, True) if way else (position - longest, slots, False)

    def _longest_leaf(self) -> int:
        if self._step_seconds is None:
            return LEAF_STEPS
        return min(LEAF_STEPS, max(FEWEST_STEPS, int(LEAF_SECONDS / LEAF_COST / self._step_seconds)))

    def _point(self, base: int, stop: int) -> Point | None:
        """The last point that is known on the way from a carry that is held; None if its file was damaged."""
        if self._here is not None and base <= self._here.time <= stop:
            return self._here
        log = self._function.log
        for at in reversed([at for at in self._files.times("newest") if base < at <= stop]):
            saved = self._files.load("newest", at, log)
            if saved is not None:
                return self._unpacked(saved)
        if base == 0:
            return Point(0, None, self._rng)
        saved = self._files.load("carry", base, log)
        return None if saved is None else self._unpacked(saved)

    def _way(self, point: Point, stop: int) -> Point:
        """Take steps, with no record of them; until a signal comes."""
        while point.time < stop and self._interrupts.received is None:
            point = self._stretch(point, min(stop, point.time + WAY_STEPS))
            if point.time < stop and self._overdue():
                self._save("newest", point)
        return point

    def _stretch(self, point: Point, stop: int) -> Point:
        function, outer = self._function, point.outer
        started, begun, at = time.perf_counter(), point.time, point.time
        with self._context(point, self._settings_of_way(stop - at)) as (fmodel, diffopt):
            while at < stop:
                outer = _added(outer, function.term(fmodel, 0) if at == 0 else None)
                function.take(diffopt, at)
                at += 1
                outer = _added(outer, function.term(fmodel, at))
                if self._interrupts.received is not None or self._overdue():
                    break
            self._timed((time.perf_counter() - started) / (at - begun))
            self._count(diffopt.report)
            return self._point_of(fmodel, diffopt, at, outer)

    def _leaf(self, point: Point, slots: int) -> None:
        """Take the steps from a point to where the adjoint is, and pull it back to there."""
        function, stop, adjoint = self._function, self._position, self._adjoint
        started, at = time.perf_counter(), point.time
        with self._context(point, self._settings_of_leaf(stop - at, slots)) as (fmodel, diffopt):
            view, total = fmodel._view, point.outer
            weights, state = list(view.current), diffopt.state
            followed = [key for key in state_keys(state) if state_leaf(state, key).requires_grad]
            inputs: dict[str, Mapping[Any, Tensor]] = {
                "weight": {index: weight for index, weight in enumerate(weights) if weight.requires_grad},
                "state": {key: state_leaf(state, key) for key in followed},
                "meta": dict(enumerate(function.tensors)),
            }
            while at < stop:
                if at == 0:
                    total = _sum(total, self._term(fmodel, diffopt, 0))
                function.take(diffopt, at)
                at += 1
                if at == self._steps and adjoint is None:
                    total = _sum(total, function.term(fmodel, at))
                else:
                    total = _sum(total, self._term(fmodel, diffopt, at))
                if at < stop and self._breaks_off(point, at, stop, started):
                    self._count(diffopt.report)
                    self._here = self._point_of(fmodel, diffopt, at, None if total is None else total.detach())
                    if self._interrupts.received is not None:
                        self._save("newest", self._here)
                    return
            final = None
            if adjoint is None:
                assert total is not None
                final = self._final(fmodel, total)
            found = _pulled_back(fmodel, diffopt, inputs, function.tensors, total, adjoint)
            self._count(diffopt.report)
        self._here = None
        if final is not None:
            self._files.save("final", self._steps, final.packed(), {}, function.log)
        self._adjoint = Adjoint(point.time, *found)
        self._save_adjoint(self._adjoint)

    def _breaks_off(self, point: Point, at: int, stop: int, started: float) -> bool:
        """Whether the leaf is too long after all, or a signal came: then it becomes a part of the way."""
        if self._interrupts.received is not None:
            return True
        if self._step_seconds is None and at - point.time == 2:
            self._timed((time.perf_counter() - started) / 2)
            return isinstance(self._schedule, Revolve) and stop - point.time > self._longest_leaf()
        return False

    def _term(self, fmodel: Any, diffopt: DifferentiableOptimizer, at: int) -> Tensor | None:
        term = self._function.term(fmodel, at)
        return None if term is None else diffopt.outer(term)

    # Contexts

    @contextmanager
    def _context(self, point: Point, settings: Settings) -> Iterator[tuple[Any, DifferentiableOptimizer]]:
        write_rng(point.rng)
        with inner_loop(self._model, self._opt, settings, self._device, override=self._override, start=point.start) as (
            fmodel,
            diffopt,
        ):
            yield fmodel, diffopt

    def _settings_of_way(self, steps: int) -> Settings:
        return dataclasses.replace(
            self._settings,
            checkpoint_every=steps,
            checkpoints=None,
            steps=None,
            verify="off",
            truncate=None,
            journal=False,
            store="device",
            graphs=1,
            replay="native",
            compile=False,
            progress=False,
        )

    def _settings_of_leaf(self, steps: int, slots: int) -> Settings:
        settings = dataclasses.replace(self._settings, truncate=None, progress=False)
        if isinstance(self._schedule, Periodic):  # its loop makes all carries that a replay would hold
            return dataclasses.replace(settings, checkpoint_every=1, graphs=1)
        return dataclasses.replace(settings, checkpoints=max(1, slots), steps=steps)

    def _point_of(self, fmodel: Any, diffopt: DifferentiableOptimizer, at: int, outer: Tensor | None) -> Point:
        read = diffopt._executor.attributes_read()  # type: ignore[union-attr]
        foreign = [tensor for tensor in read if id(tensor) not in self._own_attributes]
        if foreign:
            raise RecordError(
                f"The model's forward reads a tensor of shape {tuple(foreign[0].shape)} that an earlier step left on a "
                "submodule as a plain attribute, of which run_dir keeps no copy. Register it as a buffer: "
                "register_buffer(name, tensor)."
            )
        plain = ModuleState.capture(list(fmodel.modules())).plain
        attributes = [
            (module, name, value)
            for module, (now, before) in enumerate(zip(plain, self._plain, strict=True))
            for name, value in now.items()
            if name not in before or before[name] != value
        ]
        return Point(at, Start.of(fmodel, diffopt, at, attributes), capture_rng(self._devices), outer)

    def _final(self, fmodel: Any, outer: Tensor) -> Final:
        return Final(
            {name: weight.detach() for name, weight in zip(self._names, fmodel._view.current, strict=True)},
            {name: buffer.detach() for name, buffer in fmodel.named_buffers()},
            outer.detach(),
            capture_rng(self._devices),
        )

    # Saving

    def _save(self, kind: str, point: Point) -> None:
        started = time.monotonic()
        tensors, facts = point.packed(self._names)
        self._files.save(kind, point.time, tensors, {**facts, "runs": self._runs}, self._function.log)
        if kind == "newest":
            self._remove("newest", 0, but=point.time)
        self._saved = time.monotonic()
        self._save_seconds = self._saved - started

    def _save_adjoint(self, adjoint: Adjoint) -> None:
        tensors, facts = adjoint.packed()
        self._files.save("adjoint", adjoint.time, tensors, {**facts, "runs": self._runs}, self._function.log)
        for old in self._files.times("adjoint")[2:]:
            self._files.remove("adjoint", old)
        self._remove("carry", adjoint.time)
        self._remove("newest", adjoint.time)
        self._saved = time.monotonic()

    def _remove(self, kind: str, first: int, but: int | None = None) -> None:
        for at in self._files.times(kind):
            if at >= first and at != but:
                self._files.remove(kind, at)

    def _overdue(self) -> bool:
        return time.monotonic() - self._saved > max(SAVE_SECONDS, 20 * self._save_seconds)

    def _unpacked(self, saved: Saved) -> Point:
        self._take_over(saved)
        return Point.unpacked(saved.time, saved.tensors, saved.facts, self._names)

    def _bytes_needed(self) -> int:
        """At most, of all files."""
        with inner_loop(self._model, self._opt, self._settings_of_way(1), self._device, override=self._override) as (
            fmodel,
            diffopt,
        ):
            weights, state = fmodel._view.current, diffopt.state
            trained = [weights[index] for index in sorted(diffopt.held) if weights[index].requires_grad]
            if not is_custom(diffopt):
                grads = [
                    torch.zeros_like(weight) if weight.requires_grad and index in diffopt.held else None
                    for index, weight in enumerate(weights)
                ]
                with torch.no_grad():
                    _, state = diffopt.advance(weights, grads, state, diffopt.param_groups)
            buffers = sum(buffer.nbytes for buffer in fmodel.buffers())
            of_state = sum(tensor.nbytes for tensor in state_tensors(state))
            carry = sum(weight.nbytes for weight in trained) + of_state + buffers + _OVERHEAD
            whole = sum(weight.nbytes for weight in weights)
        adjoint = whole + of_state + sum(tensor.nbytes for tensor in self._function.tensors) + _OVERHEAD
        schedule = self._schedule
        assert schedule is not None
        most = -(-self._steps // schedule.every) if isinstance(schedule, Periodic) else self._settings.checkpoints or 0
        files = min(most, self._steps) + 2
        return files * carry + 3 * adjoint + whole + buffers + RECORD * self._steps + _OVERHEAD

    # Counting

    def _count(self, report: Report) -> None:
        """A context has ended."""
        for name in _ADDED_UP:
            self._runs[name] = self._runs.get(name, 0) + getattr(report, name)
        for name in _LARGEST:
            self._peaks[name] = max(self._peaks.get(name, 0), getattr(report, name))

    def _take_over(self, saved: Saved) -> None:
        """Count what an earlier process has run."""
        for name, count in saved.facts["runs"].items():
            self._runs[name] = max(self._runs.get(name, 0), count)

    def _timed(self, seconds: float) -> None:
        before = self._step_seconds
        self._step_seconds = seconds if before is None else 0.7 * before + 0.3 * seconds

    def _report(self) -> Report:
        return dataclasses.replace(Report(steps=self._steps), **self._runs, **self._peaks)

    # Signals

    def _stop(self) -> NoReturn:
        where = f"at step {self._here.time}" if self._here is not None else "between two pieces"
        phase = "loop" if self._adjoint is None else f"backward, {self._position} steps of which are left,"
        command = shlex.join([sys.executable, *sys.orig_argv[1:]])
        sys.stderr.write(
            f"\nmetagradient was stopped in the {phase} {where} of {self._steps}. All that it needs is saved in "
            f"{self._files.path}; the same call goes on from there:\n  {command}\n"
        )
        raise self._interrupts.error()


def _pulled_back(
    fmodel: Any,
    diffopt: DifferentiableOptimizer,
    inputs: Mapping[str, Mapping[Any, Tensor]],
    meta: Sequence[Tensor],
    total: Tensor | None,
    adjoint: Adjoint | None,
) -> tuple[dict[int, Tensor], dict[StateKey, Tensor], dict[int, Tensor]]:
    """The cotangents before a leaf, from those after it and the terms of the outer loss in it."""
    pairs: list[tuple[Tensor, Tensor]] = []
    if adjoint is not None:
        current = fmodel._view.current
        pairs += [(current[index], cotangent) for index, cotangent in adjoint.weights.items()]
        pairs += [(state_leaf(diffopt.state, key), cotangent) for key, cotangent in adjoint.state.items()]
        pairs += [(meta[index], gathered) for index, gathered in adjoint.meta.items()]
    if total is not None:
        pairs.append((total, torch.ones_like(total)))
    pairs = [(output, cotangent) for output, cotangent in pairs if output.requires_grad]
    if not pairs:
        return {}, {}, {}
    outputs, cotangents = zip(*pairs, strict=True)
    wanted = [tensor for named in inputs.values() for tensor in named.values()]
    found = iter(torch.autograd.grad(outputs, wanted, cotangents, allow_unused=True))
    gathered = [
        {key: grad for key, grad in [(key, next(found)) for key in inputs[kind]] if grad is not None}
        for kind in ("weight", "state", "meta")
    ]
    return gathered[0], gathered[1], gathered[2]


def _sum(total: Tensor | None, term: Tensor | None) -> Tensor | None:
    return total if term is None else term if total is None else total + term


def _added(total: Tensor | None, term: Tensor | None) -> Tensor | None:
    return _sum(total, None if term is None else term.detach())


def _cuda_devices(tensors: Sequence[Tensor], device: torch.device | str | None) -> list[torch.device]:
    found = [tensor.device for tensor in tensors] + ([] if device is None else [torch.device(device)])
    return list({str(place): place for place in found if place.type == "cuda"}.values())


def _encoded(rng: RngState) -> dict[str, str]:
    return {str(device): b64encode(bytes(state.tolist())).decode() for device, state in rng}


def _decoded(states: Mapping[str, str]) -> RngState:
    return tuple([
        (torch.device(device), torch.tensor(list(b64decode(text)), dtype=torch.uint8)) for device, text in states.items()
    ])  # fmt: skip
