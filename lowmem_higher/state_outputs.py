"""Optimizer state among the outputs of a flat graph, which knows tensors only."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from torch import Tensor

from lowmem_higher.optim.base import State


@dataclass(frozen=True)
class _Output:
    """In place of a value of the state: it is this output; a number of that type, if given."""

    at: int
    number: type | None


def put_state(state: State, numbers: Mapping[tuple[int, int, str], type], outputs: list[Any]) -> State:
    """Append the tensors of the state to the outputs; returns where each is, with the rest as it is.

    `numbers` are of these types outside of the graph: they were made tensors to be its inputs.
    """
    placed: State = [{index: dict(entry) for index, entry in entries.items()} for entries in state]
    for group, entries in enumerate(placed):
        for index, entry in entries.items():
            for name, value in entry.items():
                if isinstance(value, Tensor):
                    entry[name] = _Output(len(outputs), numbers.get((group, index, name)))
                    outputs.append(value)
    return placed


def taken_state(placed: State, outputs: Sequence[Any]) -> State:
    """The state, given the outputs."""
    return [
        {index: {name: _taken(value, outputs) for name, value in entry.items()} for index, entry in entries.items()}
        for entries in placed
    ]


def _taken(value: Any, outputs: Sequence[Any]) -> Any:
    if not isinstance(value, _Output):
        return value
    found = outputs[value.at]
    return found if value.number is None else value.number(found.item())
