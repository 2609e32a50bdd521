"""The model under `checkpoint_every`: its calls while the user's loop runs, and its twin that replays use.

The fmodel is the user's: it holds the current weights and whatever the user sets on it. Replays run on a *twin*, a
second copy of the structure, which holds weights only while a replay runs. So a replay never touches what the user
sees (rules R3, R12), and nothing that is kept for the backward leads back to the fmodel.
"""

from __future__ import annotations

import functools
import weakref
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from lowmem_higher.errors import RecordError, ReplayMismatchError
from lowmem_higher.fast_weights import ParameterSlots, copied, rerunning
from lowmem_higher.patch import (
    FunctionalModule,
    copy_structure,
    functional_class,
    refuse_originals,
    renew_buffers,
)
from lowmem_higher.recompute import FixedWeights, follow, follow_view
from lowmem_higher.record import BufferState, Inside, Node, Recorder, version_of
from lowmem_higher.replay_state import ModuleState, capture_rng, same_rng, structure_of
from lowmem_higher.second_order import second_order_here
from lowmem_higher.structure import flatten, tensors_in
from lowmem_higher.watch import Watcher, refuse_hidden


class Twin:
    """A copy of the model's structure in which replays run."""

    def __init__(self, model: nn.Module) -> None:
        self.root = copy_structure(model)
        self.root.__class__ = functional_class(type(self.root))  # a function given to `step` finds the same methods
        self.slots = ParameterSlots(self.root)
        self.modules = list(self.root.modules())
        self.slots.install([None] * len(self.slots))
        self.slots.install_buffers([None] * len(self.slots.buffers))

    def run(
        self,
        target: str | Callable[..., Any],
        args: tuple[Any, ...],
        kwargs: dict[str, Any],
        *,
        weights: Sequence[Tensor],
        buffers: Sequence[Tensor | None],
        state: ModuleState,
        stand_ins: dict[int, Tensor],
        leaves: list[Any],
    ) -> tuple[Any, tuple[Tensor | None, ...]]:
        """Call a submodule, or a function of the model, as it was called then; returns also the new buffers."""
        own_buffers = copied(buffers)
        given = [*weights, *(leaf for leaf in leaves if isinstance(leaf, Tensor))]
        watcher = Watcher(given, stand_ins)
        around = functools.partial(_watched, given, stand_ins)
        with (
            self.slots.installed(weights, own_buffers),
            state.applied(self.modules),
            follow(FixedWeights(self.slots, weights, around)),
            watcher.on() if stand_ins else nullcontext(),  # a tensor read anew shows in the loss, which is checked
        ):
            module = self.root.get_submodule(target) if isinstance(target, str) else None
            out = module(*args, **kwargs) if module is not None else target(self.root, *args, **kwargs)  # type: ignore[operator]
            new_buffers = tuple(self.slots.read_buffers())
        if watcher.found:
            shapes = [tuple(tensor.shape) for tensor in watcher.found]
            raise ReplayMismatchError(
                f"The replay of {describe(target)} read {len(shapes)} tensor(s) that require grad and that it did not "
                f"read while your loop ran, of shapes {shapes}. A global or an attribute of another object was "
                "probably set to a new tensor in between. Pass the tensor as an argument: fmodel(x, tensor)."
            )
        return out, new_buffers


def _watched(given: list[Tensor], stand_ins: dict[int, Tensor]) -> AbstractContextManager[None]:
    return Watcher(given, stand_ins).on() if stand_ins else nullcontext()


@dataclass(frozen=True)
class ModuleCall:
    """The call of a submodule by its path ("" is the model itself), or of a function of the model."""

    twin: Twin
    target: str | Any

    @property
    def __name__(self) -> str:
        return describe(self.target)


def describe(target: str | Callable[..., Any]) -> str:
    """How a call of the model reads in a printed program."""
    if isinstance(target, str):
        return f"fmodel.{target}" if target else "fmodel"
    return getattr(target, "__qualname__", type(target).__name__)


class LiveModule:
    """Runs and records the calls of one fmodel."""

    def __init__(self, model: nn.Module, fmodel: FunctionalModule, recorder: Recorder) -> None:
        self.twin = Twin(model)
        self.recorder = recorder
        self._model = model  # keeps the ids below valid
        self._originals = {id(param) for param in model.parameters()}
        self._structure = structure_of(list(fmodel.modules()))
        self._state: ModuleState | None = None
        self._visible: list[tuple[int, int]] = []
        self.buffers = BufferState(())
        self._freeze(fmodel._view.slots, None)

    @property
    def inside(self) -> bool:
        """Whether a recorded call is running now."""
        return self.recorder.inside

    def call_module(
        self,
        fmodel: FunctionalModule,
        path: str,
        run: Callable[..., Any],
        args: tuple[Any, ...],
        kwargs: dict[str, Any],
    ) -> Any:
        """Run a submodule of the fmodel and record the call as one node, unless it is part of such a call."""
        if self.recorder.inside or rerunning():
            return run(*args, **kwargs)
        out, _ = self.call(fmodel, path, run, args, kwargs)
        return out

    def call(
        self,
        fmodel: FunctionalModule,
        target: str | Callable[..., Any],
        run: Callable[..., Any],
        args: tuple[Any, ...],
        kwargs: dict[str, Any],
    ) -> tuple[Any, Node]:
        """Run `run(*args, **kwargs)` with the current weights in place; returns the result and the node."""
        recorder, view = self.recorder, fmodel._view
        with torch._C.DisableTorchFunction():  # our own reading of tensors is not to be seen
            leaves: list[Any] = []
            structure = flatten((args, kwargs), leaves)
            buffers = self.current_buffers(fmodel)
            view.take_assigned()
            modules = list(fmodel.modules())
            self.check_structure(modules)
            self._state = ModuleState.capture(modules, self._state)
            given = [*view.current, *(leaf for leaf in leaves if isinstance(leaf, Tensor))]
            rng = capture_rng(recorder.devices)
            renew_buffers(fmodel, view.slots)
            watcher = Watcher(
                given,
                inner_leaves=recorder.inner_leaves,
                candidates=self._state.candidates(),
                own={id(buffer) for buffer in view.slots.read_buffers()},
            )
            inside = Inside(view.current, buffers, self._state, watcher.found, [])
            node = recorder.new_node(ModuleCall(self.twin, target), structure, leaves, inside)
        with refuse_hidden(watcher), recorder.watching(watcher), follow_view(view), second_order_here():
            out = run(*args, **kwargs)
        with torch._C.DisableTorchFunction():
            if isinstance(target, str):
                refuse_originals(watcher.found, self._originals, describe(target))
            if watcher.foreign_writes and torch.is_grad_enabled():
                raise RecordError(
                    f"{describe(target)} writes into a tensor that is no buffer of the model "
                    f"({watcher.foreign_writes[0]}), and a replay would write again. Register it as a buffer, "
                    "self.register_buffer(name, tensor); put another module in eval mode, teacher.eval(); or call "
                    "it in the loop and pass its result, fmodel(x, teacher(x))."
                )
            if not same_rng(rng, capture_rng(recorder.devices)):
                node.rng = rng
            inside.state = self._state = self._state.read_only(watcher.read)
            inside.found_versions = [version_of(tensor) for tensor in watcher.found]
            if self._visible_changed(view.slots):
                self._freeze(view.slots, node)
            if recorder.active:
                outputs = tensors_in(out)
                recorder.add(node, outputs, older=watcher.passed_on(outputs))
        return out, node

    def check_structure(self, modules: list[nn.Module]) -> None:
        """Raise if the fmodel is built of other submodules, or has other hooks, than its twin."""
        if structure_of(modules) != self._structure:
            raise RecordError(
                "A submodule was added, replaced or removed, or a hook was registered, after the context was entered, "
                "and a replay would not have it. Do it on the model, before innerloop_ctx(...)."
            )

    def current_buffers(self, fmodel: FunctionalModule) -> BufferState:
        """The buffers as they are now, as a state that nothing writes into."""
        slots = fmodel._view.slots
        if self._visible_changed(slots):  # by the user, between two calls
            self._freeze(slots, None)
        return self.buffers

    def _freeze(self, slots: ParameterSlots, producer: Node | None) -> None:
        visible = slots.read_buffers()
        if any(buffer is not None and buffer.requires_grad for buffer in visible):
            raise RecordError(
                "A buffer of the model requires grad after a forward, so a gradient would flow from step to step "
                "through it, which a checkpointed context does not follow. Return the tensor from forward and pass it "
                "to the next call, or use checkpoint_every=None."
            )
        self._visible = _identities(visible)
        self.buffers = BufferState(tuple(copied(visible)), None if producer is None else weakref.ref(producer))

    def _visible_changed(self, slots: ParameterSlots) -> bool:
        return _identities(slots.read_buffers()) != self._visible


def _identities(buffers: Sequence[Tensor | None]) -> list[tuple[int, int]]:
    return [(id(buffer), 0 if buffer is None else version_of(buffer)) for buffer in buffers]
