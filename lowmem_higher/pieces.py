"""Pieces of a loop that is a function, each in a context of the ordinary engine: ways, and leaves.

NOTE [ Pieces ]

A *leaf* is a context that begins at a point of the loop, takes steps, and is differentiated at once,

    torch.autograd.grad([weights, state, meta], [weights before, state before, meta], [cotangents, gathered so far])

The gradients of `meta` gathered in later steps go in as cotangents of `meta` itself, so autograd adds the new shares to
them, one by one, in the order of one whole backward: the result is the same to the bit, wherever the pieces are cut.

A *way* leads from one point to a later one. Its contexts are dropped, so at most one leaf's records are held.
"""

from __future__ import annotations

import dataclasses
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any, cast

import torch
from torch import Tensor, nn

from lowmem_higher.custom_rules import is_custom
from lowmem_higher.errors import RecordError
from lowmem_higher.innerloop import Start, inner_loop
from lowmem_higher.loop_function import LoopFunction
from lowmem_higher.optim.base import DifferentiableOptimizer
from lowmem_higher.replay_state import ModuleState, capture_rng, write_rng
from lowmem_higher.report import Report
from lowmem_higher.run_states import Adjoint, Final, Point
from lowmem_higher.schedule import Periodic
from lowmem_higher.settings import Settings
from lowmem_higher.step import StateKey, state_keys, state_leaf, state_tensors
from lowmem_higher.structure import bytes_of, is_dtensor
from lowmem_higher.trajectory import Trajectory

WAY_STEPS = 256  # of a context that is dropped
_ADDED_UP = (
    "first_order_runs",
    "second_order_runs",
    "update_runs",
    "forward_seconds",
    "backward_seconds",
    "compile_seconds",
)
_LARGEST = ("checkpoints_peak", "carry_bytes", "carries_peak_bytes", "journal_bytes", "stored_peak_bytes")


class Pieces:
    """Takes the steps of a loop, and pulls them back, piece by piece.

    Args:
        function: The loop.
        model, opt: What a context is opened with.
        settings: How leaves are differentiated.
        context: The other keywords of a context.
        steps: The steps of the whole loop.
        ran: Is told of the runs of a piece: steps of a way, runs of a leaf.

    Attributes:
        made: The weights that steps make, by index.
        counts: Runs and seconds so far, by their names in the report.
        step_seconds: What a step of the loop takes, about; None before the first ones.
    """

    def __init__(
        self,
        function: LoopFunction,
        model: nn.Module,
        opt: torch.optim.Optimizer,
        settings: Settings,
        context: Mapping[str, Any],
        steps: int,
        ran: Callable[[int, int], None],
    ) -> None:
        self._function, self._settings, self._steps = function, settings, steps
        self._model, self._opt, self._given = model, opt, context
        self._ran = ran
        self.names = [name for name, _ in model.named_parameters()]
        self.devices = _cuda_devices([*model.parameters(), *function.tensors], context["device"])
        held = {id(param) for group in opt.param_groups for param in group["params"]}
        self.made = [index for index, param in enumerate(model.parameters()) if id(param) in held]
        attributes = ModuleState.capture(list(model.modules()))
        self._plain, self._own = attributes.plain, attributes.candidates()
        self.counts: dict[str, float] = {}
        self._peaks: dict[str, int] = {}
        self.step_seconds: float | None = None

    @property
    def report(self) -> Report:
        """What all pieces have cost."""
        found: dict[str, Any] = {**self.counts, **self._peaks}
        return Report(steps=self._steps, **found)

    def way(self, point: Point, stop: int, stops: Callable[[], bool]) -> Point:
        """Take some of the steps from a point to `stop`, with no record of them; it `stops` early or takes them all.

        Of a long way it takes the first ones only.
        """
        function, outer, at = self._function, point.outer, point.time
        stop = min(stop, at + WAY_STEPS)
        started = time.perf_counter()
        with self._context(point, self._settings_of_way(stop - at)) as (fmodel, diffopt):
            while at < stop and not (at > point.time and stops()):
                outer = _detached_sum(outer, function.term(fmodel, 0) if at == 0 else None)
                function.take(diffopt, at)
                at += 1
                outer = _detached_sum(outer, function.term(fmodel, at))
                self._ran(1, 0)
            self._timed((time.perf_counter() - started) / (at - point.time))
            self._count(diffopt.report)
            return self._point(fmodel, diffopt, at, outer)

    def leaf(
        self,
        point: Point,
        adjoint: Adjoint | None,
        slots: int,
        stops: Callable[[], bool],
        too_long: Callable[[], bool],
    ) -> Point | tuple[Adjoint, Final | None]:
        """Take the steps from a point to where the adjoint is (None: all), and pull it back to there.

        Returns:
            The adjoint, and with the last step what the loop ended with. Or, if it has to stop or was found to be too
            long for a leaf, the point that it has come to.
        """
        function, at = self._function, point.time
        stop = self._steps if adjoint is None else adjoint.time
        started = time.perf_counter()
        with self._context(point, self._settings_of_leaf(stop - at, slots)) as (fmodel, diffopt):
            followed = [key for key in state_keys(diffopt.state) if state_leaf(diffopt.state, key).requires_grad]
            inputs: list[dict[Any, Tensor]] = [
                {index: weight for index, weight in enumerate(fmodel._view.current) if weight.requires_grad},
                {key: state_leaf(diffopt.state, key) for key in followed},
                dict(enumerate(function.tensors)),
            ]
            total = point.outer
            while at < stop:
                if at == 0:
                    total = _sum(total, self._term(fmodel, diffopt, 0))
                function.take(diffopt, at)
                at += 1
                last = at == self._steps and adjoint is None
                total = _sum(total, function.term(fmodel, at) if last else self._term(fmodel, diffopt, at))
                if at == point.time + 2 and self.step_seconds is None:
                    self._timed((time.perf_counter() - started) / 2)
                if at < stop and (stops() or (at == point.time + 2 and too_long())):
                    self._count(diffopt.report)
                    return self._point(fmodel, diffopt, at, None if total is None else total.detach())
            final = None
            if adjoint is None:
                assert total is not None
                final = self._final(fmodel, total)
            gathered = _pulled_back(fmodel, diffopt, inputs, function.tensors, total, adjoint)
            report = diffopt.report
            self._count(report)
            self._ran(0, report.first_order_runs + report.second_order_runs)
        return Adjoint(point.time, *gathered), final

    def trial_adjoint(self, point: Point) -> Adjoint:
        """Ones for the weights, to see what a leaf takes that ends there."""
        assert point.start is not None
        return Adjoint(
            point.time, {index: torch.ones_like(weight) for index, weight in point.start.weights.items()}, {}, {}
        )

    def sizes(self, common: bool = True) -> tuple[int, int, int]:
        """The bytes of a carry, of an adjoint and of the end of the loop, in their files, about.

        Of several processes those of this one's part; what all have in `common` is in the carry of one of them.
        """
        with self._context(None, self._settings_of_way(1)) as (fmodel, diffopt):
            weights, state = fmodel._view.current, diffopt.state
            trained = [index in diffopt.held and weight.requires_grad for index, weight in enumerate(weights)]
            if not is_custom(diffopt):
                grads = [torch.zeros_like(w) if moves else None for w, moves in zip(weights, trained, strict=True)]
                with torch.no_grad():
                    _, state = diffopt.advance(weights, grads, state, diffopt.param_groups)
            moving = [weight for weight, moves in zip(weights, trained, strict=True) if moves]
            of_state: int = sum(map(bytes_of, state_tensors(state)))
            whole: int = sum(map(bytes_of, weights))
            buffers: int = sum(map(bytes_of, fmodel.buffers()))
            carried = [tensor for tensor in (*moving, *state_tensors(state)) if common or is_dtensor(tensor)]
        of_meta = sum(map(bytes_of, self._function.tensors))
        return sum(map(bytes_of, carried)) + buffers, whole + of_state + of_meta, whole + buffers

    # Contexts

    @contextmanager
    def _context(self, point: Point | None, settings: Settings) -> Iterator[tuple[Any, DifferentiableOptimizer]]:
        start = None if point is None else point.start
        if point is not None:
            write_rng(point.rng)
        with inner_loop(self._model, self._opt, settings, start=start, **self._given) as parts:
            yield parts

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
        if isinstance(settings.schedule, Periodic):  # its loop makes all carries that a replay would hold
            return dataclasses.replace(settings, checkpoint_every=1, graphs=1)
        return dataclasses.replace(settings, checkpoints=max(1, slots), steps=steps)

    def _term(self, fmodel: Any, diffopt: DifferentiableOptimizer, at: int) -> Tensor | None:
        term = self._function.term(fmodel, at)
        return None if term is None else diffopt.outer(term)

    def _point(self, fmodel: Any, diffopt: DifferentiableOptimizer, at: int, outer: Tensor | None) -> Point:
        read: list[Tensor] = cast(Trajectory, diffopt._executor).attributes_read()
        foreign = [tensor for tensor in read if id(tensor) not in self._own]
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
        return Point(at, Start.of(fmodel, diffopt, at, attributes), capture_rng(self.devices), outer)

    def _final(self, fmodel: Any, outer: Tensor) -> Final:
        return Final(
            {name: weight.detach() for name, weight in zip(self.names, fmodel._view.current, strict=True)},
            {name: buffer.detach() for name, buffer in fmodel.named_buffers()},
            outer.detach(),
            capture_rng(self.devices),
        )

    # Counting

    def take_over(self, counts: Mapping[str, float]) -> None:
        """Count what an earlier process has run."""
        for name, count in counts.items():
            self.counts[name] = max(self.counts.get(name, 0), count)

    def _count(self, report: Report) -> None:
        for name in _ADDED_UP:
            self.counts[name] = self.counts.get(name, 0) + getattr(report, name)
        for name in _LARGEST:
            self._peaks[name] = max(self._peaks.get(name, 0), getattr(report, name))

    def _timed(self, seconds: float) -> None:
        before = self.step_seconds
        self.step_seconds = seconds if before is None else 0.7 * before + 0.3 * seconds


def _pulled_back(
    fmodel: Any,
    diffopt: DifferentiableOptimizer,
    inputs: Sequence[Mapping[Any, Tensor]],
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
    wanted = [tensor for named in inputs for tensor in named.values()]
    grads = iter(torch.autograd.grad(outputs, wanted, cotangents, allow_unused=True))
    found = [{key: grad for key, grad in zip(named, grads, strict=False) if grad is not None} for named in inputs]
    return found[0], found[1], found[2]


def _sum(total: Tensor | None, term: Tensor | None) -> Tensor | None:
    return total if term is None else term if total is None else total + term


def _detached_sum(total: Tensor | None, term: Tensor | None) -> Tensor | None:
    return _sum(total, None if term is None else term.detach())


def _cuda_devices(tensors: Sequence[Tensor], device: torch.device | str | None) -> list[torch.device]:
    found = [tensor.device for tensor in tensors] + ([] if device is None else [torch.device(device)])
    return list({str(place): place for place in found if place.type == "cuda"}.values())
