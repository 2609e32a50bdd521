"""The fast weights of a functional model: where they sit in it, the current ones, and those of earlier times.

The weights are counted by *time*, the number of updates so far; a `Past` entry stands for weights that are recomputed
on request.
"""

from __future__ import annotations

import operator
import threading
import weakref
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, Protocol, TypeVar, cast

import torch
from torch import Tensor, nn

from lowmem_higher.errors import HistoryFreedError, RecordError
from lowmem_higher.truncation import LastSteps

own_tables = {name for name, value in vars(nn.Module()).items() if isinstance(value, dict)}
AnyModule = TypeVar("AnyModule", bound=nn.Module)
Slots = list[tuple[weakref.ref[nn.Module], str]]


class Past(Protocol):
    """Weights of an earlier time that are not held: they are recomputed when asked for."""

    @property
    def updated(self) -> tuple[int, ...]:
        """The weights that changed at that time; the others are those of the time before."""

    def weights(self) -> dict[int, Tensor]:
        """Those weights by index, connected to the graph."""


class _InsideScan:
    """In the place of weights between two steps of a scan."""

    updated: tuple[int, ...] = ()

    def weights(self) -> dict[int, Tensor]:
        """None of them."""
        return {}


_INSIDE = _InsideScan()


class ModuleCaller(Protocol):
    """Who runs a call of the fmodel or of one of its submodules under `checkpoint_every` (the recorder)."""

    @property
    def inside(self) -> bool:
        """Whether a recorded call is running now."""

    def call_module(
        self,
        fmodel: Any,
        path: str,
        run: Callable[..., Any],
        args: tuple[Any, ...],
        kwargs: dict[str, Any],
    ) -> Any:
        """Run the submodule at `path` of `fmodel` and record the call as one node."""


@dataclass
class StartOfHistory:
    """What became of the initial weights; see `slip.py`."""

    asked: bool = False  # somebody got them
    judged: bool = False  # a backward has reached them
    slipped: bool = False  # and nothing else


class FunctionalView:
    """The weights of one fmodel: where they sit in the module, the current ones, and those of earlier times."""

    def __init__(self, root: nn.Module, weights: Sequence[Tensor] | None, track: bool) -> None:
        self.slots = ParameterSlots(root)
        self.token = object()
        self.originals: list[Tensor] | None = None  # the model's own parameters, until the first call was watched
        self.track = track
        self.caller: ModuleCaller | None = None
        self.last = LastSteps()
        self.start = StartOfHistory()
        self.joined: Callable[[Any], None] = _nothing_to_do  # called with each further optimizer of these weights
        self.first = 0  # the time that the history begins with
        self.history: list[list[Tensor] | Past] = []
        self.current: list[Tensor] = []
        if weights is not None:
            self.append(weights)

    def begin(self, time: int, weights: Sequence[Tensor]) -> None:
        """Make `weights` those of `time`, and know of no earlier ones."""
        self.history.clear()
        self.append(weights)
        self.first = time

    def append(self, weights: Sequence[Tensor], entry: Past | None = None, inside: int = 0) -> None:
        """Make `weights` the current ones, one time later; `entry` stands for them in the history if given.

        With `inside`, so many times lie between, whose weights cannot be had.
        """
        if len(weights) != len(self.slots):
            raise ValueError(
                f"The model has {len(self.slots)} parameters, and {len(weights)} new ones were given. Give all, in the "
                "order of fmodel.parameters(), the old one where nothing is new: "
                "fmodel.update_params([f(w) for w in fmodel.parameters()])."
            )
        for name, new, old in zip(self.slots.names, weights, self.current, strict=False):
            if new.shape != old.shape:
                raise ValueError(
                    f"{name} has shape {tuple(old.shape)}, and its new value {tuple(new.shape)}. New weights come in "
                    "the order of fmodel.named_parameters(), and keep their shapes: new.reshape(old.shape)."
                )
        self.current = list(weights)
        self.slots.install(self.current)
        if not self.track:
            self.history.clear()
        self.history += [_INSIDE] * inside
        self.history.append(self.current if entry is None else entry)

    def need_weights(self) -> None:
        """Raise if there are none yet."""
        if not self.history:
            raise ValueError(
                "This functional model has no weights of its own yet: it was made by make_functional. Give it some, "
                "fmodel(x, params=[...]), or make it with monkeypatch(module)."
            )

    def refuse_inside(self, what: str, instead: str) -> None:
        """Raise if code is running that a replay runs again."""
        if self.caller is not None and self.caller.inside:
            raise RecordError(
                f"{what} inside forward, grad_callback or a function given to step, which a replay runs again. "
                f"{instead} in the loop, and pass what is needed as an argument: fmodel(x, tensor)."
            )

    def take_assigned(self) -> None:
        """A weight that was assigned by name (`fmodel.layer.weight = ...`) becomes current, one time later."""
        found = [cast(Tensor, alive(slots[0][0])._parameters[slots[0][1]]) for slots in self.slots.params]
        if not all(map(operator.is_, found, self.current)):
            self.append(found)

    def at(self, time: int | None) -> list[Tensor]:
        """The weights of a time, counted from the start or, if negative, from the end."""
        self.need_weights()
        self.start.asked |= time is not None or len(self.history) == 1
        if time is None:
            return replayed.weights.get(self.token, self.current)
        self.refuse_inside(f"The weights of time={time} were asked for", "Ask for them")
        if not self.track:
            if time not in (-1, 0):
                raise ValueError(
                    f"time={time} was asked for, but track_higher_grads=False keeps only the current weights. Open the "
                    "context with innerloop_ctx(..., track_higher_grads=True), or ask for fmodel.parameters()."
                )
            return self.current
        times = len(self.history)
        place = time - self.first if time >= 0 else time + times
        if not 0 <= place < times:
            last = self.first + times - 1
            raise IndexError(
                f"time={time} is out of range: this fmodel has the times {self.first} to {last} (or -{times} to -1), "
                "one more with each step and each update_params. The current weights are fmodel.parameters()."
            )
        if place == times - 1:
            return self.current
        if self.history[place] is _INSIDE:
            raise HistoryFreedError(
                f"The weights of time={time} lie inside a scan, which leaves those after its last step. Where you need "
                "the weights in between, take single steps: diffopt.step(fn, batch)."
            )
        found: dict[int, Tensor] = {}
        for entry in reversed(self.history[: place + 1]):
            if isinstance(entry, list):
                return [found.get(index, weight) for index, weight in enumerate(entry)]
            if not found.keys() >= set(entry.updated):
                found = entry.weights() | found
            if len(found) == len(self.slots):
                break
        return [found[index] for index in range(len(self.slots))]


def _nothing_to_do(optimizer: Any) -> None:
    pass


class ParameterSlots:
    """Where the distinct parameters and the buffers of a module sit, so that other tensors can take their place.

    Modules are held weakly. An fmodel leads to its view and its weights, and weights lead through the graph to all
    that a step keeps: a way back to the fmodel would be a cycle, and free nothing until the garbage collector ran.
    """

    def __init__(self, root: nn.Module) -> None:
        named = dict(root.named_parameters())
        place = {id(param): index for index, param in enumerate(named.values())}
        self.names = list(named)
        self.params: list[Slots] = [[] for _ in named]
        self.buffers: list[Slots] = []
        buffer_place: dict[int, int] = {}
        self.containers: list[tuple[weakref.ref[nn.Module], str, dict[Any, int]]] = []  # lists of parameters, and such
        self.recurrent: list[weakref.ref[nn.RNNBase]] = []
        for module in root.modules():
            here = weakref.ref(module)
            for name, param in module._parameters.items():
                if param is not None:
                    self.params[place[id(param)]].append((here, name))
            for name, buffer in module._buffers.items():
                index = len(self.buffers) if buffer is None else buffer_place.setdefault(id(buffer), len(self.buffers))
                if index == len(self.buffers):
                    self.buffers.append([])
                self.buffers[index].append((here, name))
            if isinstance(module, nn.RNNBase):
                self.recurrent.append(weakref.ref(module))
                continue
            for name, value in vars(module).items():
                if type(value) in (list, tuple, dict) and name not in own_tables:
                    items = value.items() if type(value) is dict else enumerate(value)
                    held = {key: place[id(item)] for key, item in items if id(item) in place}
                    if held:
                        self.containers.append((here, name, held))

    def __len__(self) -> int:
        return len(self.params)

    def install(self, weights: Sequence[Tensor | None]) -> None:
        """Put one tensor in the place of each parameter (shared ones in all their places)."""
        for slots, weight in zip(self.params, weights, strict=True):
            for module, name in slots:
                alive(module)._parameters[name] = cast(nn.Parameter, weight)
        for here, name, held in self.containers:
            value = vars(alive(here))[name]
            filled = dict(value) if type(value) is dict else list(value)
            for key, index in held.items():
                filled[key] = weights[index]
            vars(alive(here))[name] = tuple(filled) if type(value) is tuple else filled
        for recurrent in map(alive, self.recurrent):  # RNNs read their weights through a list of their own
            recurrent._flat_weights = [getattr(recurrent, name, None) for name in recurrent._flat_weights_names]

    def read_buffers(self) -> list[Tensor | None]:
        """The buffers that sit in the module now; None where one is registered but not set."""
        return [alive(slots[0][0])._buffers[slots[0][1]] for slots in self.buffers]

    def install_buffers(self, buffers: Sequence[Tensor | None]) -> None:
        """Put one tensor in the place of each buffer (shared ones in all their places)."""
        for slots, buffer in zip(self.buffers, buffers, strict=True):
            for module, name in slots:
                alive(module)._buffers[name] = buffer

    @contextmanager
    def installed(self, weights: Sequence[Tensor], buffers: Sequence[Tensor | None]) -> Iterator[None]:
        """Put these tensors in place inside the block, and what was there back after it."""
        weights_before = [alive(slots[0][0])._parameters[slots[0][1]] for slots in self.params]
        buffers_before = self.read_buffers()
        try:
            self.install(weights)
            self.install_buffers(buffers)
            yield
        finally:
            self.install(weights_before)
            self.install_buffers(buffers_before)


def alive(module: weakref.ref[AnyModule]) -> AnyModule:
    """The module of a weak reference."""
    found = module()
    if found is None:
        raise ReferenceError(
            "The functional model of this context was deleted while a part of it is in use. Keep a reference to it: "
            "`with innerloop_ctx(...) as (fmodel, diffopt):`, and return fmodel, not fmodel.layer alone."
        )
    return found


class _Replayed(threading.local):
    """The weights of the step being replayed in this thread, by the token of their view."""

    def __init__(self) -> None:
        self.weights: dict[object, list[Tensor]] = {}
        self.reruns = 0


replayed = _Replayed()


def rerunning() -> bool:
    """Whether a `torch.utils.checkpoint` recomputes in this thread: the weights in place are those of another time."""
    return replayed.reruns > 0


@contextmanager
def marked_as_rerun() -> Iterator[None]:
    """Such a recomputation goes on inside the block."""
    replayed.reruns += 1
    try:
        yield
    finally:
        replayed.reruns -= 1


@contextmanager
def replayed_weights(token: object, weights: list[Tensor]) -> Iterator[None]:
    """Let `fmodel.parameters()` give these weights inside the block: a replayed callback reads those of its step."""
    before = dict(replayed.weights)
    replayed.weights[token] = weights
    try:
        yield
    finally:
        replayed.weights = before


def copied(buffers: Sequence[Tensor | None], device: torch.device | None = None) -> list[Tensor | None]:
    """Detached copies of buffers."""
    return [None if buffer is None else buffer.detach().clone().to(device or buffer.device) for buffer in buffers]
