"""Micro-batches: a step's loss as a sum over parts of its batch, each with a graph of its own.

NOTE [ How a program is cut into parts ]

What a step program computes before it meets the weights (a batch taken by its indices, say) is computed once. What the
rest of the program is handed from there and from outside are its arguments; the batch has the length of the first
argument that is a tensor with a dimension. Arguments of that length are cut along their first dimension, the others are
whole in each part. The losses of the parts are then averaged by their lengths, or added up, whichever gives the loss of
the step. That this is so is checked at every step; so a loss that is neither is refused, as is one that uses
statistics of its batch.
"""

from __future__ import annotations

import dataclasses
import itertools
from collections.abc import Sequence
from typing import Any, Protocol

import torch
from torch import Tensor

from lowmem_higher.errors import ReplayMismatchError
from lowmem_higher.live_module import ModuleCall
from lowmem_higher.program import Instruction, Ref, StepInputs, StepProgram
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
            cut = self._cuts[program] = _Cut(program)
        cut.refuse(record, self.count)
        parts = _Parts(record, carry, externals, cut, self.count)
        if program not in self._means:
            self._means[program] = _is_mean(record, carry, parts)
        parts.is_mean = self._means[program]
        return parts


class _Cut:
    """A program in two: what it computes without the weights, and the rest, whose arguments are new externals."""

    def __init__(self, program: StepProgram) -> None:
        reads: set[int] = set()
        for index, instruction in enumerate(program.instructions):
            if isinstance(instruction.call, ModuleCall) or any(
                ref.kind == "weight" or (ref.kind in ("made", "buffers") and ref.at in reads)
                for ref in _all_refs(instruction)
            ):
                reads.add(index)
        self.program = program
        self.writes = any(ref.kind == "made" and ref.output < 0 for i in program.instructions for ref in i.refs)
        self.before = [index for index in range(len(program.instructions)) if index not in reads]
        self.after = sorted(reads)
        place = {old: new for new, old in enumerate(self.after)}
        self.arguments: list[Ref] = []

        def argument(ref: Ref) -> Ref:
            if ref.kind in ("made", "buffers") and ref.at in place:
                return Ref(ref.kind, place[ref.at], ref.output)
            if ref.kind not in ("made", "external"):
                return ref
            if ref not in self.arguments:
                self.arguments.append(ref)
            return Ref("argument", self.arguments.index(ref))

        def moved(ref: Ref) -> Ref:
            return Ref(ref.kind, place[ref.at], ref.output) if ref.kind in ("made", "buffers") else ref

        self.rest = [
            dataclasses.replace(
                instruction,
                refs=tuple(map(argument, instruction.refs)),
                weights=None if instruction.weights is None else tuple(map(moved, instruction.weights)),
                buffers=None if instruction.buffers is None else tuple(map(moved, instruction.buffers)),
            )
            for instruction in (program.instructions[index] for index in self.after)
        ]
        self.loss = moved(program.loss)

    def refuse(self, record: StepRecord, count: int) -> None:
        """Raise if the parts could not know what the whole does."""
        if self.program.buffers is not None:
            raise cannot_cut(record, count, "the model writes into its buffers (statistics of the batch)")
        if any(record.rng[index] is not None for index in self.after):
            raise cannot_cut(record, count, "random numbers are drawn (dropout), which parts would draw otherwise")
        if self.writes:
            raise cannot_cut(record, count, "a tensor is written in place on the way to the loss")


class _Parts:
    """One step's loss, cut."""

    def __init__(self, record: StepRecord, carry: Carry, externals: list[Tensor], cut: _Cut, count: int) -> None:
        self._record, self._carry, self._cut, self.count = record, carry, cut, count
        self._externals, self.is_mean = externals, True
        self._values = self._arguments(externals)
        given = [value for value in self._values if isinstance(value, Tensor)]
        lengths = [value.shape[0] for value in given if value.ndim]
        if not lengths or lengths[0] < count:
            raise cannot_cut(record, count, f"its batch has {lengths[0] if lengths else 'no'} examples")
        self.length = lengths[0]
        bounds = [self.length * part // count for part in range(count + 1)]
        self._bounds = list(itertools.pairwise(bounds))
        self.leaves = [
            *externals,
            *(value.detach().requires_grad_(value.requires_grad) for value in given),
        ]

    def _arguments(self, externals: list[Tensor]) -> list[Any]:
        cut, record = self._cut, self._record
        wanted = [ref for ref in cut.arguments if ref.kind == "made"]
        made: dict[Ref, Any] = {}
        if wanted:
            place = {old: new for new, old in enumerate(cut.before)}
            before = StepProgram(
                tuple([_moved(cut.program.instructions[index], place) for index in cut.before]), Ref("none", 0), None
            )
            inputs = _selected(record.inputs(externals), cut.before)
            refs = [Ref("made", place[ref.at], ref.output) for ref in wanted]
            made = dict(
                zip(wanted, before.evaluate(self._carry.weights, self._carry.buffers, inputs, refs), strict=True)
            )
        return [externals[ref.at] if ref.kind == "external" else made[ref] for ref in cut.arguments]

    def loss(self, part: int, weights: Sequence[Tensor], leaves: Sequence[Tensor]) -> Tensor:
        """What one part adds to the loss."""
        first, last = self._bounds[part]
        count = len(self._externals)
        given = iter(leaves[count:])
        externals = list(leaves[:count])
        for value in self._values:
            tensor = next(given) if isinstance(value, Tensor) else value
            of_batch = isinstance(tensor, Tensor) and tensor.ndim > 0 and tensor.shape[0] == self.length
            externals.append(tensor[first:last] if of_batch else tensor)
        rest = tuple([
            dataclasses.replace(
                instruction,
                refs=tuple([Ref("external", count + r.at) if r.kind == "argument" else r for r in instruction.refs]),
            )
            for instruction in self._cut.rest
        ])  # fmt: skip
        inputs = _selected(self._record.inputs(externals), self._cut.after)
        try:
            loss = StepProgram(rest, self._cut.loss, None).run(weights, self._carry.buffers, inputs)[0]
        except (ReplayMismatchError, torch.OutOfMemoryError):
            raise
        except (RuntimeError, ValueError, IndexError) as error:
            raise cannot_cut(self._record, self.count, f"a part of the batch gives an error ({error})") from error
        return loss * ((last - first) / self.length) if self.is_mean else loss

    def to_externals(self, cotangents: dict[int, Tensor]) -> dict[int, Tensor]:
        """The cotangents of the externals: their own, and what comes through the arguments made from them."""
        count = len(self._externals)
        found = {index: cotangent for index, cotangent in cotangents.items() if index < count}
        values = [value for value in self._values if isinstance(value, Tensor)]
        pairs = [(values[index - count], cotangent) for index, cotangent in cotangents.items() if index >= count]
        if pairs:
            wanted = [index for index, external in enumerate(self._externals) if external.requires_grad]
            outputs, vectors = zip(*pairs, strict=True)
            grads = torch.autograd.grad(outputs, [self._externals[i] for i in wanted], vectors, allow_unused=True)
            for index, grad in zip(wanted, grads, strict=True):
                if grad is not None:
                    found[index] = found[index] + grad if index in found else grad
        return found


def _is_mean(record: StepRecord, carry: Carry, parts: _Parts) -> bool:
    weights, leaves = [w.detach() for w in carry.weights], [leaf.detach() for leaf in parts.leaves]
    count = len(record.externals)
    whole = record.loss_again(weights, carry.buffers, leaves[:count])[0] if record.loss is None else record.loss
    found = []
    for parts.is_mean in (True, False):
        losses = [parts.loss(part, weights, leaves) for part in range(parts.count)]
        found.append(torch.stack(losses).sum().item())
        tolerance = tolerance_of(record, losses)
    mean, total = [abs(value - float(whole)) <= tolerance * abs(float(whole)) for value in found]
    if mean == total:
        raise cannot_cut(
            record,
            parts.count,
            f"it is {float(whole):.9g}, the average over the parts {found[0]:.9g}, and their sum {found[1]:.9g}",
        )
    return mean


def cannot_cut(record: StepRecord, count: int, why: str) -> ReplayMismatchError:
    """The loss of a step is not the sum of its parts."""
    return ReplayMismatchError(
        f"microbatches={count} cuts the batch of a step into parts, and the loss of step {record.time} is no mean or "
        f"sum over its batch that parts give as well: {why}. Leave microbatches out: "
        'innerloop_ctx(..., pullback="mixed", blocks=...).'
    )


def _all_refs(instruction: Instruction) -> list[Ref]:
    return [*instruction.refs, *(instruction.weights or ()), *(instruction.buffers or ()), *instruction.found]


def _moved(instruction: Instruction, place: dict[int, int]) -> Instruction:
    refs = tuple([Ref(ref.kind, place[ref.at], ref.output) if ref.kind == "made" else ref for ref in instruction.refs])
    return dataclasses.replace(instruction, refs=refs)


def _selected(inputs: StepInputs, indices: list[int]) -> StepInputs:
    """The inputs of these instructions only."""
    return dataclasses.replace(
        inputs,
        rng=[inputs.rng[index] for index in indices],
        states=[inputs.states[index] for index in indices],
        targets={new: inputs.targets[old] for new, old in enumerate(indices) if old in inputs.targets},
    )
