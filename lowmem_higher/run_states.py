"""Where a run stands, in its loop and in its backward, and both as named tensors and numbers for a file."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from lowmem_higher.errors import StoreError
from lowmem_higher.innerloop import Start
from lowmem_higher.optim.base import State
from lowmem_higher.replay_state import RngState
from lowmem_higher.step import StateKey

_NUMBERS = (int, float, bool, str, type(None))


@dataclass(frozen=True)
class Point:
    """What step `time` starts from.

    Attributes:
        time: The step.
        start: Weights, optimizer state, buffers, attributes; None where a run begins: those that it was given.
        rng: The states of the random number generators.
        outer: The sum of the terms of the outer loss so far.
    """

    time: int
    start: Start | None
    rng: RngState
    outer: Tensor | None = None

    def packed(self, names: Sequence[str]) -> tuple[dict[str, Tensor], dict[str, Any]]:
        """As named tensors and numbers; `names` are those of the weights."""
        assert self.start is not None
        start = self.start
        tensors = {f"weight/{names[index]}": weight for index, weight in start.weights.items()}
        state, more = _packed_state(start.state)
        tensors |= more
        tensors |= {f"buffer/{index}": buffer for index, buffer in enumerate(start.buffers) if buffer is not None}
        tensors |= {f"random/{device}": value for device, value in self.rng}
        if self.outer is not None:
            tensors["outer"] = self.outer
        for _, name, value in start.attributes:
            if type(value) not in _NUMBERS:
                raise StoreError(
                    f"A forward sets the attribute {name!r} of a module to {value!r}, of which run_dir keeps no copy. "
                    "Set a plain number, or register a buffer: register_buffer(name, tensor)."
                )
        facts = {
            "state": state,
            "groups": len(start.state),
            "followed": [list(key) for key in start.followed],
            "buffers": len(start.buffers),
            "attributes": [list(entry) for entry in start.attributes],
        }
        return tensors, facts

    @staticmethod
    def unpacked(time: int, tensors: Mapping[str, Tensor], facts: Mapping[str, Any], names: Sequence[str]) -> Point:
        """The same, from a file."""
        place = {name: index for index, name in enumerate(names)}
        state: State = [{} for _ in range(facts["groups"])]
        for group, position, entry in facts["state"]:
            state[group][position] = {
                key: tensors[f"state/{group}/{position}/{key}"] if number is None else number[0]
                for key, number in entry
            }
        start = Start(
            time,
            {place[name]: tensor for name, tensor in _under(tensors, "weight").items()},
            state,
            tuple([(group, position, key) for group, position, key in facts["followed"]]),
            tuple([tensors.get(f"buffer/{index}") for index in range(facts["buffers"])]),
            tuple([(module, name, value) for module, name, value in facts["attributes"]]),
        )
        return Point(time, start, _rng_in(tensors), tensors.get("outer"))


@dataclass(frozen=True)
class Adjoint:
    """The cotangents of what step `time` starts from, and the gradients of `meta` gathered in the steps after it."""

    time: int
    weights: Mapping[int, Tensor]
    state: Mapping[StateKey, Tensor]
    meta: Mapping[int, Tensor]

    def packed(self) -> tuple[dict[str, Tensor], dict[str, Any]]:
        """As named tensors and numbers."""
        tensors = {f"weight/{index}": tensor for index, tensor in self.weights.items()}
        keys = list(self.state)
        tensors |= {f"state/{at}": self.state[key] for at, key in enumerate(keys)}
        tensors |= {f"meta/{index}": tensor for index, tensor in self.meta.items()}
        return tensors, {"state": [list(key) for key in keys]}

    @staticmethod
    def unpacked(time: int, tensors: Mapping[str, Tensor], facts: Mapping[str, Any]) -> Adjoint:
        """The same, from a file."""
        return Adjoint(
            time,
            {int(index): tensor for index, tensor in _under(tensors, "weight").items()},
            {
                (group, position, name): tensors[f"state/{at}"]
                for at, (group, position, name) in enumerate(facts["state"])
            },
            {int(index): tensor for index, tensor in _under(tensors, "meta").items()},
        )


@dataclass(frozen=True)
class Final:
    """What the loop ended with."""

    weights: dict[str, Tensor]
    buffers: dict[str, Tensor]
    outer: Tensor
    rng: RngState

    def packed(self) -> dict[str, Tensor]:
        """As named tensors."""
        tensors = {f"weight/{name}": tensor for name, tensor in self.weights.items()}
        tensors |= {f"buffer/{name}": tensor for name, tensor in self.buffers.items()}
        tensors |= {f"random/{device}": value for device, value in self.rng}
        return {**tensors, "outer": self.outer}

    @staticmethod
    def unpacked(tensors: Mapping[str, Tensor]) -> Final:
        """The same, from a file."""
        return Final(_under(tensors, "weight"), _under(tensors, "buffer"), tensors["outer"], _rng_in(tensors))


def _packed_state(state: State) -> tuple[list[Any], dict[str, Tensor]]:
    """The order of the entries with their numbers, and the tensors."""
    tensors, order = {}, []
    for group, entries in enumerate(state):
        for position, entry in entries.items():
            items: list[Any] = []
            for key, value in entry.items():
                if isinstance(value, Tensor):
                    tensors[f"state/{group}/{position}/{key}"] = value
                elif type(value) not in _NUMBERS:
                    raise StoreError(
                        f"The optimizer keeps {key!r} as a {type(value).__name__}, of which run_dir keeps no copy. Let "
                        "the rule keep tensors and plain numbers: return new_param, dict(step=3, average=tensor)."
                    )
                items.append([key, None if isinstance(value, Tensor) else [value]])
            order.append([group, position, items])
    return order, tensors


def _under(tensors: Mapping[str, Tensor], kind: str) -> dict[str, Tensor]:
    return {name.removeprefix(f"{kind}/"): tensor for name, tensor in tensors.items() if name.startswith(f"{kind}/")}


def _rng_in(tensors: Mapping[str, Tensor]) -> RngState:
    return tuple([(torch.device(device), value) for device, value in _under(tensors, "random").items()])
