"""Micro-batches: a step's loss as a sum over parts of its batch, each with a graph of its own.

NOTE [ How a program is cut into parts ]

The batch has the length of the first tensor with a dimension that is handed to a call which reads the weights. What
else has that length along its first dimension, an external or a value made from other tensors (a batch taken out of
a data set), is cut along it; other tensors are whole in each part. So the calls that need no cut tensor and no weight
run once, and the rest once for each part. The losses of the parts are averaged by their lengths, or added up, whichever
gives the loss of the step. That this is so is checked at every step; so a loss that is neither is refused, as is one
that uses statistics of its batch.
"""

from __future__ import annotations

import dataclasses
import itertools
from collections.abc import Callable, Iterable, Sequence
from typing import Any, Protocol

import torch
from torch import Tensor

from lowmem_higher.errors import LowmemError, ReplayMismatchError
from lowmem_higher.live_module import ModuleCall
from lowmem_higher.program import Instruction, Ref, StepInputs, StepProgram
from lowmem_higher.second_order import second_order_here
from lowmem_higher.step import Carry, StepRecord, tolerance_of


class Parts(Protocol):
    """The loss of one step as a sum of functions of its weights and of tensors that may get gradients."""

    leaves: list[Tensor]
    count: int

    def loss(self, part: int, weights: Sequence[Tensor], leaves: Sequence[Tensor]) -> Tensor:
        """What one part adds to the loss."""

    def to_externals(self, cotangents: dict[int, Tensor]) -> dict[int, Tensor]:
        """The cotangents of the step's externals from those of the leaves."""


class Whole:
    """The loss of a step as one part."""

    count = 1

    def __init__(self, record: StepRecord, carry: Carry, externals: list[Tensor]) -> None:
        self._record, self._carry = record, carry
        self.leaves = externals

    def loss(self, part: int, weights: Sequence[Tensor], leaves: Sequence[Tensor]) -> Tensor:
        """The loss of the step."""
        return self._record.loss_again(weights, self._carry.buffers, list(leaves))[0]

    def to_externals(self, cotangents: dict[int, Tensor]) -> dict[int, Tensor]:
        """The same: the leaves are the externals."""
        return cotangents


class MicroBatches:
    """Cuts the losses of steps into `count` parts, and remembers of each program how its loss is made of them."""

    def __init__(self, count: int) -> None:
        self.count = count
        self._cuts: dict[StepProgram, _Cut] = {}
        self._means: dict[StepProgram, bool] = {}

    def parts(self, record: StepRecord, carry: Carry, externals: list[Tensor]) -> _Parts:
        """The parts of a step.

        Raises:
            ReplayMismatchError: The loss cannot be cut.
        """
        program = record.program
        cut = self._cuts.get(program)
        if cut is None:
            cut = self._cuts[program] = _Cut(record, carry, externals, self.count)
        cut.refuse(record, self.count)
        parts = _Parts(record, carry, externals, cut, self.count)
        if program not in self._means:
            self._means[program] = _is_mean(record, carry, parts)
        parts.is_mean, parts.checked = self._means[program], True
        return parts


class _Cut:
    """A program in two: what runs once, and the rest, whose arguments are further externals, cut or whole."""

    def __init__(self, record: StepRecord, carry: Carry, externals: list[Tensor], count: int) -> None:
        self.program = program = record.program
        calls = program.instructions
        reads = _reaching(calls, lambda call: isinstance(call.call, ModuleCall) or _refs(call, "weight") != [])
        values = self._values_without(reads, record, carry, externals)

        def length(ref: Ref) -> int | None:
            value = externals[ref.at] if ref.kind == "external" else values.get(ref)
            return value.shape[0] if isinstance(value, Tensor) and value.ndim else None

        lengths = [size for index in sorted(reads) for ref in calls[index].refs if (size := length(ref)) is not None]
        if not lengths:
            raise cannot_cut(record, count, "no tensor with a dimension enters it")
        self.rest = sorted(_reaching(calls, lambda call: any(length(ref) == lengths[0] for ref in call.refs), reads))
        self.before = [index for index in range(len(calls)) if index not in self.rest]
        self.writes = any(ref.output < 0 for call in calls for ref in _refs(call, "made"))
        place = {old: new for new, old in enumerate(self.rest)}
        self.arguments: list[Ref] = []

        def renamed(ref: Ref) -> Ref:
            if ref.kind in ("made", "buffers") and ref.at in place:
                return Ref(ref.kind, place[ref.at], ref.output)
            if ref.kind not in ("made", "external"):
                return ref
            if ref not in self.arguments:
                self.arguments.append(ref)
            return Ref("external", len(externals) + self.arguments.index(ref))

        def moved(refs: tuple[Ref, ...] | None) -> tuple[Ref, ...] | None:
            return None if refs is None else tuple([_at(ref, place) for ref in refs])

        rest = [
            dataclasses.replace(
                call, refs=tuple(map(renamed, call.refs)), weights=moved(call.weights), buffers=moved(call.buffers)
            )
            for call in (calls[index] for index in self.rest)
        ]
        self.of_batch = [length(ref) == lengths[0] for ref in self.arguments]
        self.loss_of_part = StepProgram(tuple(rest), _at(program.loss, place), None)
        place_before = {old: new for new, old in enumerate(self.before)}
        self.made_before = [_at(ref, place_before) for ref in self.arguments if ref.kind == "made"]
        self.run_once = StepProgram(
            tuple([
                dataclasses.replace(calls[index], refs=tuple([_at(ref, place_before) for ref in calls[index].refs]))
                for index in self.before
            ]),
            Ref("none", 0),
            None,
        )  # fmt: skip

    @staticmethod
    def _values_without(reads: set[int], record: StepRecord, carry: Carry, externals: list[Tensor]) -> dict[Ref, Any]:
        """What the calls that read no weight make."""
        calls = record.program.instructions
        indices = [index for index in range(len(calls)) if index not in reads]
        place = {old: new for new, old in enumerate(indices)}
        refs = [Ref("made", index, output) for index in indices for output in range(calls[index].outputs)]
        moved = tuple([
            dataclasses.replace(calls[index], refs=tuple([_at(ref, place) for ref in calls[index].refs]))
            for index in indices
        ])  # fmt: skip
        inputs = _selected(record.inputs([external.detach() for external in externals]), indices)
        wanted = [_at(ref, place) for ref in refs]
        found = StepProgram(moved, Ref("none", 0), None).evaluate(carry.weights, carry.buffers, inputs, wanted)
        return dict(zip(refs, found, strict=True))

    def refuse(self, record: StepRecord, count: int) -> None:
        """Raise if the parts could not know what the whole does."""
        if self.program.buffers is not None:
            raise cannot_cut(record, count, "the model writes into its buffers (statistics of the batch)")
        if any(record.rng[index] is not None for index in self.rest):
            raise cannot_cut(record, count, "random numbers are drawn (dropout), which parts would draw otherwise")
        if self.writes:
            raise cannot_cut(record, count, "a tensor is written in place on the way to the loss")


class _Parts:
    """One step's loss, cut."""

    def __init__(self, record: StepRecord, carry: Carry, externals: list[Tensor], cut: _Cut, count: int) -> None:
        self._record, self._carry, self._cut, self.count = record, carry, cut, count
        self._externals, self.is_mean, self.checked = externals, True, False
        made = iter(
            cut.run_once.evaluate(
                carry.weights, carry.buffers, _selected(record.inputs(externals), cut.before), cut.made_before
            )
        )
        self._values = [externals[ref.at] if ref.kind == "external" else next(made) for ref in cut.arguments]
        lengths = {value.shape[0] for value, of_batch in zip(self._values, cut.of_batch, strict=True) if of_batch}
        self.length = min(lengths)
        if len(lengths) > 1 or self.length < count:
            raise cannot_cut(record, count, f"its batch has {' or '.join(map(str, sorted(lengths)))} examples")
        self._bounds = list(itertools.pairwise([self.length * part // count for part in range(count + 1)]))
        self.leaves = [*externals, *(value.detach().requires_grad_(value.requires_grad) for value in self._values)]

    def loss(self, part: int, weights: Sequence[Tensor], leaves: Sequence[Tensor]) -> Tensor:
        """What one part adds to the loss."""
        first, last = self._bounds[part]
        externals = list(leaves)
        for index, of_batch in enumerate(self._cut.of_batch, len(self._externals)):
            if of_batch:
                externals[index] = externals[index][first:last]
        inputs = _selected(self._record.inputs(externals), self._cut.rest)
        try:
            with second_order_here():
                loss = self._cut.loss_of_part.run(weights, self._carry.buffers, inputs)[0]
        except (LowmemError, NotImplementedError, torch.OutOfMemoryError):
            raise
        except (RuntimeError, ValueError, IndexError) as error:
            if self.checked:
                raise
            raise cannot_cut(
                self._record,
                self.count,
                f"a part of the batch gives an error ({error}; where a shape names the batch, write x.view(-1, n))",
            ) from error
        return loss * ((last - first) / self.length) if self.is_mean else loss

    def to_externals(self, cotangents: dict[int, Tensor]) -> dict[int, Tensor]:
        """The cotangents of the externals: their own, and what comes through the arguments made from them."""
        count = len(self._externals)
        found = {index: cotangent for index, cotangent in cotangents.items() if index < count}
        pairs = [(self._values[index - count], cotangent) for index, cotangent in cotangents.items() if index >= count]
        if pairs:
            wanted = [index for index, external in enumerate(self._externals) if external.requires_grad]
            outputs, vectors = zip(*pairs, strict=True)
            grads = torch.autograd.grad(outputs, [self._externals[i] for i in wanted], vectors, allow_unused=True)
            for index, grad in zip(wanted, grads, strict=True):
                if grad is not None:
                    found[index] = found[index] + grad if index in found else grad
        return found


def _is_mean(record: StepRecord, carry: Carry, parts: _Parts) -> bool:
    weights = [
        weight.detach().requires_grad_(trainable)
        for weight, trainable in zip(carry.weights, record.layout.trainable, strict=True)
    ]
    count, whole = len(record.externals), record.loss
    if whole is None:
        whole = record.loss_again(weights, carry.buffers, parts.leaves[:count])[0].item()
    found = []
    for parts.is_mean in (True, False):
        losses = [parts.loss(part, weights, parts.leaves).detach() for part in range(parts.count)]
        found.append(torch.stack(losses).sum().item())
        tolerance = tolerance_of(record, losses)
    mean, total = [abs(value - whole) <= tolerance * abs(whole) for value in found]
    if mean == total:
        raise cannot_cut(
            record,
            parts.count,
            f"it is {whole:.9g}, the average over the parts {found[0]:.9g}, and their sum {found[1]:.9g}",
        )
    return mean


def cannot_cut(record: StepRecord, count: int, why: str) -> ReplayMismatchError:
    """The loss of a step is not the sum of its parts."""
    return ReplayMismatchError(
        f"microbatches={count} cuts the batch of a step into parts, and the loss of step {record.time} is no mean or "
        f"sum over its batch that parts give as well: {why}. Leave microbatches out: "
        'innerloop_ctx(..., pullback="mixed", blocks=...).'
    )


def _refs(call: Instruction, *kinds: str) -> list[Ref]:
    refs = [*call.refs, *(call.weights or ()), *(call.buffers or ()), *call.found]
    return [ref for ref in refs if ref.kind in kinds]


def _reaching(
    calls: Sequence[Instruction], starts: Callable[[Instruction], bool], more: Iterable[int] = ()
) -> set[int]:
    """The calls that `starts` names, those in `more`, and all that read what one of them makes."""
    found = set(more)
    for index, call in enumerate(calls):
        if starts(call) or any(ref.at in found for ref in _refs(call, "made", "buffers")):
            found.add(index)
    return found


def _at(ref: Ref, place: dict[int, int]) -> Ref:
    return Ref(ref.kind, place[ref.at], ref.output) if ref.kind in ("made", "buffers") else ref


def _selected(inputs: StepInputs, indices: list[int]) -> StepInputs:
    """The inputs of these instructions only."""
    return dataclasses.replace(
        inputs,
        rng=[inputs.rng[index] for index in indices],
        states=[inputs.states[index] for index in indices],
        targets={new: inputs.targets[old] for new, old in enumerate(indices) if old in inputs.targets},
    )
