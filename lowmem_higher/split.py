"""A step program in two: what comes before the fast weights, and the rest.

A loop cuts a batch, `x[i : i + 10]`, adds noise to it, weighs examples. Such calls depend on no fast weight, and on
numbers that differ at each step. They are run as they were recorded; the rest, the *body*, takes their results as
further externals and is the same from step to step.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from lowmem_higher.live_module import ModuleCall
from lowmem_higher.program import Instruction, Ref, StepInputs, StepProgram
from lowmem_higher.step import External, Mark, StepRecord, Update


@dataclass(frozen=True)
class Parts:
    """A program split in two.

    Attributes:
        prologue: The calls before.
        body: The rest. Its externals are those of the record at `externals`, then what the prologue `made`.
        update: The update, which reads the same externals as the body.
        numbers: Which numbers of the record the body and the update read.
    """

    prologue: StepProgram
    prologue_at: tuple[int, ...]
    made: tuple[Ref, ...]
    body: StepProgram
    body_at: tuple[int, ...]
    update: Update
    externals: tuple[int, ...]
    numbers: tuple[int, ...]

    def before(self, record: StepRecord, externals: Sequence[Tensor]) -> list[Tensor]:
        """Run the prologue."""
        if not self.made:
            return []
        at = self.prologue_at
        inputs = StepInputs(
            externals,
            record.externals,
            record.numbers,
            [record.rng[position] for position in at],
            [record.states[position] for position in at],
            {},
        )
        return self.prologue.evaluate((), (), inputs, self.made)

    def bodied(self, record: StepRecord, numbers: Sequence[Any], trainable: Sequence[bool]) -> StepRecord:
        """The record of the body alone, which checks nothing and leads to no carry.

        Args:
            record: The step's.
            numbers: What stands for its numbers.
            trainable: Which externals of the body require grad.
        """
        at = self.body_at
        return dataclasses.replace(
            record,
            program=self.body,
            layout=dataclasses.replace(
                record.layout, externals_in=tuple([index for index, train in enumerate(trainable) if train])
            ),
            update=self.update,
            externals=[record.externals[index] for index in self.externals],
            numbers=tuple(numbers),
            rng=tuple([record.rng[position] for position in at]),
            states=tuple([record.states[position] for position in at]),
            targets={at.index(position): target for position, target in record.targets.items()},
            loss=None,
            fingerprint=None,
            segment=_Nowhere(),
            previous=None,
            journal=None,
            release=_nothing,
        )


class _Nowhere:
    """In place of a segment."""

    def __init__(self) -> None:
        self.marks: dict[int, Mark] = {}


def _nothing(externals: list[External]) -> None:
    pass


def split(program: StepProgram, update: Update, taken: Sequence[int]) -> Parts:
    """Split a program, and let its update read the body's externals; those `taken` require grad.

    A program that takes a derivative (a gradient penalty) may take it by what is made from such an external, through
    all that is made from it: nothing of that may be cut off.
    """
    whole = set(taken) if any(one.call is torch.autograd.grad for one in program.instructions) else set()
    depends: list[bool] = []
    for one in program.instructions:
        depends.append(
            isinstance(one.call, ModuleCall)
            or any(
                ref.kind == "weight" or (ref.kind == "made" and depends[ref.at]) or (
                    ref.kind == "external" and ref.at in whole
                )
                for ref in one.refs
            )
        )  # fmt: skip
    before = [index for index, inside in enumerate(depends) if not inside]
    after = [index for index, inside in enumerate(depends) if inside]
    before_at, after_at = ({index: place for place, index in enumerate(part)} for part in (before, after))
    externals: dict[int, int] = {}
    made: dict[Ref, int] = {}
    read: list[Ref] = [*update.refs, *update.found, program.loss, *(program.buffers or ())]
    for index in after:
        one = program.instructions[index]
        read += [*one.refs, *(one.weights or ()), *(one.buffers or ()), *one.found]
    for ref in read:
        if ref.kind == "external":
            externals.setdefault(ref.at, len(externals))
        elif ref.kind == "made" and ref.at in before_at:
            made.setdefault(ref, len(made))

    def moved(ref: Ref) -> Ref:
        if ref.kind == "external":
            return Ref("external", externals[ref.at])
        if ref in made:
            return Ref("external", len(externals) + made[ref])
        if ref.kind in ("made", "buffers"):
            return Ref(ref.kind, after_at[ref.at], ref.output)
        return ref

    def moved_all(refs: tuple[Ref, ...] | None) -> tuple[Ref, ...] | None:
        return None if refs is None else tuple(map(moved, refs))

    def moved_call(one: Instruction) -> Instruction:
        return dataclasses.replace(
            one,
            refs=tuple(map(moved, one.refs)),
            weights=moved_all(one.weights),
            buffers=moved_all(one.buffers),
            found=tuple(map(moved, one.found)),
        )

    def within(ref: Ref) -> Ref:
        return Ref("made", before_at[ref.at], ref.output) if ref.kind == "made" else ref

    prologue = tuple([
        dataclasses.replace(program.instructions[index], refs=tuple(map(within, program.instructions[index].refs)))
        for index in before
    ])  # fmt: skip
    return Parts(
        StepProgram(prologue, Ref("none", 0), None),
        tuple(before),
        tuple(map(within, made)),
        StepProgram(
            tuple([moved_call(program.instructions[index]) for index in after]),
            moved(program.loss),
            moved_all(program.buffers),
        ),
        tuple(after),
        dataclasses.replace(update, refs=tuple(map(moved, update.refs)), found=tuple(map(moved, update.found))),
        tuple(externals),
        tuple(dict.fromkeys(ref.at for ref in read if ref.kind == "number")),
    )
