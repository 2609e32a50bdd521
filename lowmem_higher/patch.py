"""fmodel: a functional view of a module, whose parameters are the fast weights of the inner loop.

The view is a copy of the module's *structure*: the submodules are new objects, and where they held parameters they
now hold the current fast weights, plain tensors with a graph. Every way to reach a weight (`fmodel(x)`,
`fmodel.encoder(x)`, `fmodel.encoder.weight`) therefore reads the current one. The view keeps the history of the
weights by *time*, the number of updates so far; a `Past` entry stands for weights that are recomputed on request.

`FunctionalView` is the book-keeping behind an fmodel; `make_functional_copy` builds both.
"""

from __future__ import annotations

import contextlib
import functools
import operator
import threading
import types
import weakref
from collections.abc import Callable, Container, Iterable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager
from typing import Any, Protocol, TypeVar, cast

import torch
from torch import Tensor, nn
from torch.autograd.graph import GradientEdge, get_gradient_edge

from lowmem_higher.errors import RecordError
from lowmem_higher.watch import Watcher

_OWN_TABLES = {name for name, value in vars(nn.Module()).items() if isinstance(value, dict)}
AnyModule = TypeVar("AnyModule", bound=nn.Module)
Slots = list[tuple[weakref.ref[nn.Module], str]]


class Past(Protocol):
    """Weights of an earlier time that are not held: they are recomputed when asked for."""

    @property
    def updated(self) -> tuple[int, ...]:
        """The weights that changed at that time; the others are those of the time before."""

    def weights(self) -> dict[int, Tensor]:
        """Those weights by index, connected to the graph."""


class ModuleCaller(Protocol):
    """Who runs a call of the fmodel or of one of its submodules under `checkpoint_every` (the recorder)."""

    @property
    def inside(self) -> bool:
        """Whether a recorded call is running now."""

    def call_module(
        self,
        fmodel: FunctionalModule,
        path: str,
        run: Callable[..., Any],
        args: tuple[Any, ...],
        kwargs: dict[str, Any],
    ) -> Any:
        """Run the submodule at `path` of `fmodel` and record the call as one node."""


class FunctionalView:
    """The weights of one fmodel: where they sit in the module, the current ones, and those of earlier times."""

    def __init__(self, root: nn.Module, weights: Sequence[Tensor], track: bool) -> None:
        self.slots = ParameterSlots(root)
        self.token = object()
        self.originals: list[Tensor] | None = None  # the model's own parameters, until the first call was watched
        self.reads = 0  # how often the current weights were asked for
        self.track = track
        self.caller: ModuleCaller | None = None
        self.around_call: Callable[[FunctionalView], AbstractContextManager[None]] = _nothing_around
        self.history: list[list[Tensor] | Past] = []
        self.current: list[Tensor] = []
        self.append(weights)

    def append(self, weights: Sequence[Tensor], entry: Past | None = None) -> None:
        """Make `weights` the current ones, one time later; `entry` stands for them in the history if given."""
        if len(weights) != len(self.slots):
            raise ValueError(f"The model has {len(self.slots)} parameters, and {len(weights)} new ones were given.")
        for name, new, old in zip(self.slots.names, weights, self.current, strict=False):
            if new.shape != old.shape:
                raise ValueError(f"{name} has shape {tuple(old.shape)}, and its new value {tuple(new.shape)}.")
        self.current = list(weights)
        self.slots.install(self.current)
        if not self.track:
            self.history.clear()
        self.history.append(self.current if entry is None else entry)

    def refuse_inside(self, what: str, instead: str) -> None:
        """Raise if code is running that a replay runs again."""
        if self.caller is not None and self.caller.inside:
            raise RecordError(
                f"{what} inside forward, grad_callback or a function given to step, which a replay runs again. "
                f"{instead} in the loop, and pass what is needed as an argument."
            )

    def take_assigned(self) -> None:
        """A weight that was assigned by name (`fmodel.layer.weight = ...`) becomes current, one time later."""
        found = [cast(Tensor, _alive(slots[0][0])._parameters[slots[0][1]]) for slots in self.slots.params]
        if not all(map(operator.is_, found, self.current)):
            self.append(found)

    def at(self, time: int | None) -> list[Tensor]:
        """The weights of a time, counted from the start or, if negative, from the end."""
        if time is None:
            self.reads += 1
            return _replayed.weights.get(self.token, self.current)
        self.refuse_inside(f"The weights of time={time} were asked for", "Ask for them")
        if not self.track:
            if time not in (-1, 0):
                raise ValueError(
                    f"time={time} was asked for, but track_higher_grads=False keeps only the current weights."
                )
            return self.current
        times = len(self.history)
        if not -times <= time < times:
            raise IndexError(
                f"time={time} is out of range: this fmodel has the times 0 to {times - 1} (or -{times} to -1)."
            )
        if time % times == times - 1:
            return self.current
        found: dict[int, Tensor] = {}
        for entry in reversed(self.history[: time % times + 1]):
            if isinstance(entry, list):
                return [found.get(index, weight) for index, weight in enumerate(entry)]
            if not found.keys() >= set(entry.updated):
                found = entry.weights() | found
            if len(found) == len(self.slots):
                break
        return [found[index] for index in range(len(self.slots))]


def _nothing_around(view: FunctionalView) -> AbstractContextManager[None]:
    return contextlib.nullcontext()


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
                if type(value) in (list, tuple, dict) and name not in _OWN_TABLES:
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
                _alive(module)._parameters[name] = cast(nn.Parameter, weight)
        for here, name, held in self.containers:
            value = vars(_alive(here))[name]
            filled = dict(value) if type(value) is dict else list(value)
            for key, index in held.items():
                filled[key] = weights[index]
            vars(_alive(here))[name] = tuple(filled) if type(value) is tuple else filled
        for recurrent in map(_alive, self.recurrent):  # RNNs read their weights through a list of their own
            recurrent._flat_weights = [getattr(recurrent, name, None) for name in recurrent._flat_weights_names]

    def read_buffers(self) -> list[Tensor | None]:
        """The buffers that sit in the module now; None where one is registered but not set."""
        return [_alive(slots[0][0])._buffers[slots[0][1]] for slots in self.buffers]

    def install_buffers(self, buffers: Sequence[Tensor | None]) -> None:
        """Put one tensor in the place of each buffer (shared ones in all their places)."""
        for slots, buffer in zip(self.buffers, buffers, strict=True):
            for module, name in slots:
                _alive(module)._buffers[name] = buffer

    @contextmanager
    def installed(self, weights: Sequence[Tensor], buffers: Sequence[Tensor | None]) -> Iterator[None]:
        """Put these tensors in place inside the block, and what was there back after it."""
        weights_before = [_alive(slots[0][0])._parameters[slots[0][1]] for slots in self.params]
        buffers_before = self.read_buffers()
        try:
            self.install(weights)
            self.install_buffers(buffers)
            yield
        finally:
            self.install(weights_before)
            self.install_buffers(buffers_before)


def _alive(module: weakref.ref[AnyModule]) -> AnyModule:
    found = module()
    if found is None:
        raise ReferenceError("The functional model of this context was deleted; keep a reference to fmodel.")
    return found


class _Replayed(threading.local):
    """The weights of the step being replayed in this thread, by the token of their view."""

    def __init__(self) -> None:
        self.weights: dict[object, list[Tensor]] = {}
        self.reruns = 0


_replayed = _Replayed()


def rerunning() -> bool:
    """Whether a `torch.utils.checkpoint` recomputes in this thread: the weights in place are those of another time."""
    return _replayed.reruns > 0


@contextmanager
def marked_as_rerun() -> Iterator[None]:
    """Such a recomputation goes on inside the block."""
    _replayed.reruns += 1
    try:
        yield
    finally:
        _replayed.reruns -= 1


@contextmanager
def replayed_weights(token: object, weights: list[Tensor]) -> Iterator[None]:
    """Let `fmodel.parameters()` give these weights inside the block: a replayed callback reads those of its step."""
    before = dict(_replayed.weights)
    _replayed.weights[token] = weights
    try:
        yield
    finally:
        _replayed.weights = before


class FunctionalModule(nn.Module):
    """What an fmodel can do beyond its model: it keeps the fast weights of the inner loop, by time.

    `time` counts weight updates (steps, `update_params`, `fast_params = ...`, `fmodel(x, params=...)`), from 0 for the
    initial weights; -1 is the current one. Under `checkpoint_every` the weights of a past time are recomputed on
    request (at most `checkpoint_every` first-order runs) and are connected to the graph: use them in a forward, or ask
    for the gradient with respect to them.

    Example:
        >>> import torch, lowmem_higher as higher
        >>> net = torch.nn.Linear(2, 1)
        >>> opt = torch.optim.SGD(net.parameters(), lr=0.1)
        >>> with higher.innerloop_ctx(net, opt, checkpoint_every=2) as (fnet, diffopt):
        ...     for _ in range(5):
        ...         _ = diffopt.step(fnet(torch.ones(3, 2)).square().mean())
        ...     outer = fnet(torch.ones(1, 2)).sum()
        >>> [g.shape for g in torch.autograd.grad(outer, list(fnet.parameters(time=3)))]
        [torch.Size([1, 2]), torch.Size([1])]
        >>> isinstance(fnet, torch.nn.Linear)
        True
    """

    _view: FunctionalView

    def __call__(self, *args: Any, params: Sequence[Tensor] | None = None, **kwargs: Any) -> Any:
        """Run the model with the current fast weights; `params` become the current ones first."""
        if params is not None:
            self.update_params(params)
        view = self.__dict__.get("_view")
        if view is None or rerunning():  # a slice of a container is built without a view
            return super().__call__(*args, **kwargs)
        if view.caller is not None:
            return view.caller.call_module(self, "", super().__call__, args, kwargs)
        view.take_assigned()
        renew_buffers(self, view.slots)
        if view.originals is None:
            with view.around_call(view):
                return super().__call__(*args, **kwargs)
        watcher = Watcher(view.current)
        with view.around_call(view), watcher.on():
            out = super().__call__(*args, **kwargs)
        refuse_originals(watcher.found, {id(param) for param in view.originals}, "The model's forward")
        view.originals = None
        return out

    def parameters(self, recurse: bool = True, time: int | None = None) -> Iterator[Tensor]:  # type: ignore[override]
        # The override adds `time`, and gives tensors with a graph instead of leaf Parameters, as in `higher`.
        """The fast weights, those of `time` if given.

        Raises:
            IndexError: There is no such time.
            ValueError: A past time was asked for with `track_higher_grads=False`.
            HistoryFreedError: A backward pass without `retain_graph=True` has freed that time.
        """
        view = self.__dict__.get("_view")
        if view is None and time is not None:
            raise RecordError(
                "Past weights cannot be asked for in a replay: ask in the loop, and pass them as an argument."
            )
        return super().parameters(recurse) if view is None or not recurse else iter(view.at(time))

    def named_parameters(self, *args: Any, **kwargs: Any) -> Iterator[tuple[str, Tensor]]:  # type: ignore[override]
        # As for `parameters`: tensors with a graph.
        """The current fast weights with their names in the model."""
        view = self.__dict__.get("_view")
        replayed = None if view is None else _replayed.weights.get(view.token)
        if view is None or replayed is None:
            return super().named_parameters(*args, **kwargs)
        return iter(zip(view.slots.names, replayed, strict=True))

    def gradient_edges(self, time: int) -> list[GradientEdge]:
        """Where the graph passes through the fast weights of a time, for `torch.autograd.grad(outer, edges)`.

        Example:
            >>> import torch, lowmem_higher as higher
            >>> net = torch.nn.Linear(2, 1)
            >>> opt = torch.optim.SGD(net.parameters(), lr=0.1)
            >>> with higher.innerloop_ctx(net, opt, checkpoint_every=2) as (fnet, diffopt):
            ...     for _ in range(5):
            ...         _ = diffopt.step(fnet(torch.ones(3, 2)).square().mean())
            ...     grads = torch.autograd.grad(fnet(torch.ones(1, 2)).sum(), fnet.gradient_edges(time=3))
            >>> [g.shape for g in grads]
            [torch.Size([1, 2]), torch.Size([1])]
        """
        return [get_gradient_edge(weight) for weight in self._view.at(time)]

    @property
    def fast_params(self) -> list[Tensor]:
        """The current fast weights. Assigning a list makes it current, one time later."""
        return list(self.parameters())

    @fast_params.setter
    def fast_params(self, params: Iterable[Tensor]) -> None:
        self.update_params(params)

    @property
    def init_fast_params(self) -> list[Tensor]:
        """The fast weights of time 0."""
        if not self._view.track:
            raise RuntimeError("init_fast_params needs the history, which track_higher_grads=False does not keep.")
        return list(self._view.at(0))

    def update_params(self, params: Iterable[Tensor]) -> None:
        """Make `params`, in the order of `parameters()`, the current fast weights, one time later."""
        self._view.refuse_inside("Weights were set", "Set them")
        self._view.append(list(params))

    def get_parameter(self, target: str) -> Tensor:  # type: ignore[override]
        # As for `parameters`: a tensor with a graph.
        """The current fast weight of that name."""
        found = dict(self.named_parameters(remove_duplicate=False)).get(target)
        if found is None:
            raise AttributeError(f"The model has no parameter {target!r}.")
        return found

    def zero_grad(self, set_to_none: bool = True) -> None:
        """Clear the gradients of the fast weights that can have one: those of time 0."""
        for weight in self.parameters():
            if weight.is_leaf and weight.grad is not None:
                weight.grad = None if set_to_none else torch.zeros_like(weight)

    @property
    def track_higher_grads(self) -> bool:
        """Whether the history of the weights and its graph are kept."""
        return self._view.track

    def __setattr__(self, name: str, value: Any) -> None:
        view = self.__dict__.get("_view")
        if view is not None and isinstance(value, Tensor) and self._parameters.get(name) is not None:
            old = self._parameters[name]
            self.update_params([value if weight is old else weight for weight in view.current])
            return
        descriptor = getattr(type(self), name, None)
        if isinstance(descriptor, property):  # nn.Module would store a list of tensors as a plain attribute
            object.__setattr__(self, name, value)
        else:
            super().__setattr__(name, value)

    def __repr__(self) -> str:
        view = self.__dict__.get("_view")
        if view is None:
            return super().__repr__()
        times = len(view.history)
        return f"fmodel at time {times - 1} of\n{super().__repr__()}"


def refuse_originals(found: list[Tensor], originals: Container[int], what: str) -> None:
    """Raise if code read a parameter of the original model, where the fast weight should have been."""
    if any(id(tensor) in originals for tensor in found):
        raise RecordError(
            f"{what} reads a parameter of the original model, not the fast weight in its place: an attribute, closure "
            "or another object leads to it. Reach it through self, as a submodule."
        )


def renew_buffers(root: nn.Module, slots: ParameterSlots) -> None:
    """Put copies of the buffers in place before a call that may write into them.

    The graph of an earlier call may have kept the old ones (batch_norm in eval mode does, and its backward would read
    the newer statistics without a word), and a change shows by identity.
    """
    if slots.buffers and any(module.training for module in root.modules()):
        slots.install_buffers(copied(slots.read_buffers()))


def make_functional_copy(
    module: nn.Module, device: torch.device | None, copy_initial_weights: bool, track: bool
) -> FunctionalModule:
    """A functional view of `module`, whose weights are copies of its parameters.

    Args:
        module: Any module; it is not changed.
        device: Where weights and buffers go; `None` leaves them where they are.
        copy_initial_weights: True for detached leaf copies; False for clones, through which gradients reach
            `module.parameters()`.
        track: Whether the history of the weights is kept.

    Raises:
        TypeError: `module` is no plain Python module (a compiled TorchScript module cannot be copied this way).
    """
    if not isinstance(module, nn.Module) or isinstance(module, torch.jit.ScriptModule):
        raise TypeError(f"The model must be a torch.nn.Module in Python, and is {type(module).__name__}.")
    with torch.no_grad():
        buffers = copied(ParameterSlots(module).read_buffers(), device)
    weights = []
    for param in module.parameters():
        source = param.detach() if copy_initial_weights else param
        weight = source.clone().to(device or param.device)
        weights.append(weight.requires_grad_(param.requires_grad) if copy_initial_weights else weight)
    root = copy_structure(module)
    view = FunctionalView(root, weights, track)
    view.slots.install_buffers(buffers)
    view.originals = list(module.parameters())
    root.__dict__["_view"] = view
    root.__class__ = functional_class(type(module))
    return cast(FunctionalModule, root)


def copied(buffers: Sequence[Tensor | None], device: torch.device | None = None) -> list[Tensor | None]:
    """Detached copies of buffers."""
    return [None if buffer is None else buffer.detach().clone().to(device or buffer.device) for buffer in buffers]


def copy_structure(module: nn.Module) -> nn.Module:
    """New module objects in the same arrangement, which share tensors and all other attributes with the original.

    An attribute that leads to a submodule (a list of layers, a bound method, a partial function) leads to its copy.
    """
    copies: dict[int, Any] = {}
    for part in module.modules():
        twin = copies[id(part)] = type(part).__new__(type(part))
        object.__setattr__(twin, "__dict__", dict(part.__dict__))
    for part in module.modules():
        for name, value in part.__dict__.items():
            copies[id(part)].__dict__[name] = _led_to_copies(value, copies)
        for table in _OWN_TABLES & part.__dict__.keys():
            found = part.__dict__[table]
            copies[id(part)].__dict__[table] = type(found)(
                (name, _led_to_copies(value, copies)) for name, value in found.items()
            )
        if type(part) is nn.ParameterList:
            copies[id(part)].__class__ = _ParameterList
    root: nn.Module = copies[id(module)]
    return root


class _ParameterList(nn.ParameterList):
    """A slice of torch's own wraps each tensor into a new Parameter, which cuts its graph."""

    def __getitem__(self, index: Any) -> Any:
        return [self[i] for i in range(len(self))[index]] if isinstance(index, slice) else super().__getitem__(index)


def _led_to_copies(value: Any, copies: dict[int, Any]) -> Any:
    """The same value if it leads to no module that is copied, else one that leads to the copies."""
    if id(value) in copies:
        return copies[id(value)]
    kind = type(value)
    if kind in (list, tuple):
        items = [_led_to_copies(item, copies) for item in value]
        return value if all(map(operator.is_, items, value)) else kind(items)
    if kind is dict:
        entries = {key: _led_to_copies(item, copies) for key, item in value.items()}
        return value if all(entries[key] is item for key, item in value.items()) else entries
    if isinstance(value, types.MethodType) and id(value.__self__) in copies:
        return types.MethodType(value.__func__, copies[id(value.__self__)])
    if kind is functools.partial:
        parts = [_led_to_copies(part, copies) for part in (value.func, value.args, value.keywords)]
        unchanged = all(map(operator.is_, parts, (value.func, value.args, value.keywords)))
        return value if unchanged else functools.partial(parts[0], *parts[1], **parts[2])
    return value


def call_submodules_through(fmodel: FunctionalModule, caller: ModuleCaller) -> None:
    """Let calls of an fmodel, and direct calls of its submodules, go through `caller`."""
    fmodel._view.caller = caller
    for path, module in fmodel.named_modules():
        if path:
            module.__dict__["_call_through"] = (weakref.ref(fmodel), path)
            module.__class__ = _routed_class(type(module))


def _class_of(kind: str, base: type[nn.Module], make: Callable[[type[nn.Module]], type[nn.Module]]) -> type[nn.Module]:
    """The class made from `base`, once. A user's class holds what is made from it, so that both can be freed."""
    name = f"_lowmem_higher_{kind}"
    if base.__module__.startswith("torch."):
        if (base, kind) not in _from_torch:
            _from_torch[base, kind] = make(base)
        return _from_torch[base, kind]
    if name not in vars(base):
        setattr(base, name, make(base))
    found: type[nn.Module] = vars(base)[name]
    return found


_from_torch: dict[tuple[type[nn.Module], str], type[nn.Module]] = {}


def functional_class(model_type: type[nn.Module]) -> type[nn.Module]:
    """The class of the fmodels of a class of models: a subclass of it, and of `FunctionalModule`."""
    return _class_of("functional", model_type, _make_functional_class)


def _make_functional_class(model_type: type[nn.Module]) -> type[nn.Module]:
    names = {"__module__": model_type.__module__}
    return type(f"Functional{model_type.__name__}", (FunctionalModule, model_type), names)


def _routed_class(module_type: type[nn.Module]) -> type[nn.Module]:
    return _class_of("routed", module_type, _make_routed_class)


def _make_routed_class(module_type: type[nn.Module]) -> type[nn.Module]:
    def call(self: nn.Module, *args: Any, **kwargs: Any) -> Any:
        run = functools.partial(module_type.__call__, self)
        fmodel, path = self.__dict__.get("_call_through", (None, ""))  # a slice of a container is built without it
        if fmodel is None:
            return run(*args, **kwargs)
        owner = _alive(fmodel)
        return owner._view.caller.call_module(owner, path, run, args, kwargs)

    names = {"__call__": call, "__module__": module_type.__module__, "__qualname__": module_type.__qualname__}
    return type(module_type.__name__, (module_type,), names)
