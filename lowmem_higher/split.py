"""A step program in two, cut anywhere; or cut where the fast weights come in.

A loop cuts a batch, `x[i : i + 10]`, adds noise to it, weighs examples. Such calls depend on no fast weight, and on
numbers that differ at each step. They are run as they were recorded; the rest, the *body*, takes their results as
further externals and is the same from step to step.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from lowmem_higher.live_module import ModuleCall
from lowmem_higher.program import Instruction, Ref, StepInputs, StepProgram
from lowmem_higher.step import External, Mark, StepRecord, Update


@dataclass(frozen=True)
class Halves:
    """A program cut in two, `first` and `second`; these are its calls at `first_at` and `second_at`.

    The first reads what the program reads. The externals of the second are the program's at `externals`, then what the
    first `made`; `moved` says where it finds what the program finds at a `Ref`.
    """

    first: StepProgram
    first_at: tuple[int, ...]
    made: tuple[Ref, ...]
    second: StepProgram
    second_at: tuple[int, ...]
    externals: tuple[int, ...]
    moved: Callable[[Ref], Ref]


def halved(program: StepProgram, in_second: Sequence[bool], also_read: Iterable[Ref] = ()) -> Halves:
    """Cut a program in two.

    Args:
        program: The program.
        in_second: Of each call, whether it is in the second half; a call that reads one of those must be.
        also_read: What else has to be found in the second half.
    """
    calls = program.instructions
    first_at, second_at = (tuple([i for i, inside in enumerate(in_second) if inside is half]) for half in (False, True))
    first_place, second_place = ({index: place for place, index in enumerate(at)} for at in (first_at, second_at))
    read = [*also_read, program.loss, *(program.buffers or ())]
    for index in second_at:
        one = calls[index]
        read += [*one.refs, *(one.weights or ()), *(one.buffers or ()), *one.found]
    externals = tuple(dict.fromkeys(ref.at for ref in read if ref.kind == "external"))
    made = tuple(dict.fromkeys(ref for ref in read if ref.kind == "made" and ref.at in first_place))
    places = {Ref("external", at): place for place, at in enumerate(externals)}
    places |= {ref: len(externals) + place for place, ref in enumerate(made)}

    def within(ref: Ref) -> Ref:
        return Ref(ref.kind, first_place[ref.at], ref.output) if ref.kind in ("made", "buffers") else ref

    def moved(ref: Ref) -> Ref:
        if ref in places:
            return Ref("external", places[ref])
        return Ref(ref.kind, second_place[ref.at], ref.output) if ref.kind in ("made", "buffers") else ref

    return Halves(
        StepProgram(tuple([_renamed(calls[index], within) for index in first_at]), Ref("none", 0), None),
        first_at,
        tuple(map(within, made)),
        StepProgram(
            tuple([_renamed(calls[index], moved) for index in second_at]),
            moved(program.loss),
            None if program.buffers is None else tuple(map(moved, program.buffers)),
        ),
        second_at,
        externals,
        moved,
    )


def _renamed(call: Instruction, name: Callable[[Ref], Ref]) -> Instruction:
    def all_of(refs: tuple[Ref, ...] | None) -> tuple[Ref, ...] | None:
        return None if refs is None else tuple(map(name, refs))

    return dataclasses.replace(
        call,
        refs=tuple(map(name, call.refs)),
        weights=all_of(call.weights),
        buffers=all_of(call.buffers),
        found=tuple(map(name, call.found)),
    )


def inputs_at(record: StepRecord, externals: Sequence[Tensor], at: Sequence[int]) -> StepInputs:
    """What calls of a record's program read besides the carry: those `at` these places, no function given to `step`."""
    return StepInputs(
        externals,
        record.externals,
        record.numbers,
        [record.rng[position] for position in at],
        [record.states[position] for position in at],
        {},
    )


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
        return self.prologue.evaluate((), (), inputs_at(record, externals, self.prologue_at), self.made)

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
    halves = halved(program, depends, [*update.refs, *update.found])
    read = [*update.refs, *update.found, *(ref for one in halves.second.instructions for ref in one.refs)]
    return Parts(
        halves.first,
        halves.first_at,
        halves.made,
        halves.second,
        halves.second_at,
        dataclasses.replace(
            update, refs=tuple(map(halves.moved, update.refs)), found=tuple(map(halves.moved, update.found))
        ),
        halves.externals,
        tuple(dict.fromkeys(ref.at for ref in read if ref.kind == "number")),
    )
