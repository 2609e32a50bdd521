"""fmodel: a functional view of a module, whose parameters are the fast weights of the inner loop.

The view is a copy of the module's *structure*: the submodules are new objects, and where they held parameters they
now hold the current fast weights, plain tensors with a graph. Every way to reach a weight (`fmodel(x)`,
`fmodel.encoder(x)`, `fmodel.encoder.weight`) therefore reads the current one. A `FunctionalView` (`fast_weights.py`)
keeps the books; `monkeypatch` and `make_functional` build both.
"""

from __future__ import annotations

import functools
import operator
import types
import weakref
from collections.abc import Callable, Container, Iterable, Iterator, Sequence
from contextlib import contextmanager, nullcontext
from typing import Any, cast

import torch
from torch import Tensor, nn
from torch.autograd.graph import GradientEdge, get_gradient_edge

from lowmem_higher.errors import RecordError
from lowmem_higher.fast_weights import (
    FunctionalView,
    ModuleCaller,
    ParameterSlots,
    alive,
    copied,
    own_tables,
    replayed,
    rerunning,
)
from lowmem_higher.recompute import follow_view
from lowmem_higher.second_order import second_order_here
from lowmem_higher.sharded import gather_at_calls, own_class, reshard
from lowmem_higher.utils import get_func_params
from lowmem_higher.watch import Watcher


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
        view.need_weights()
        view.take_assigned()
        renew_buffers(self, view.slots)
        if view.originals is None:
            with _around_call(view):
                return super().__call__(*args, **kwargs)
        watcher = Watcher(view.current)
        with _around_call(view), watcher.on():
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
                "Past weights were asked for inside forward, which a replay runs again. Ask in the loop, and pass them "
                "as an argument: fmodel(x, list(fmodel.parameters(time=k)))."
            )
        return super().parameters(recurse) if view is None or not recurse else iter(view.at(time))

    def named_parameters(self, *args: Any, **kwargs: Any) -> Iterator[tuple[str, Tensor]]:  # type: ignore[override]
        # As for `parameters`: tensors with a graph.
        """The current fast weights with their names in the model."""
        view = self.__dict__.get("_view")
        if view is not None:
            view.start.asked |= len(view.history) == 1
        weights = None if view is None else replayed.weights.get(view.token)
        if view is None or weights is None:
            return super().named_parameters(*args, **kwargs)
        return iter(zip(view.slots.names, weights, strict=True))

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
            raise RuntimeError(
                "init_fast_params needs the history, which track_higher_grads=False does not keep. Open the context "
                "with innerloop_ctx(..., track_higher_grads=True), or copy fmodel.fast_params before the first step."
            )
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
            raise AttributeError(
                f"The model has no parameter {target!r}. They are [name for name, _ in fmodel.named_parameters()]; a "
                "tensor that is no parameter is an attribute: fmodel.name."
            )
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
        return f"fmodel at time {view.first + len(view.history) - 1} of\n{super().__repr__()}"


@contextmanager
def _around_call(view: FunctionalView) -> Iterator[None]:
    with follow_view(view), second_order_here() if view.track else nullcontext():
        yield


def refuse_originals(found: list[Tensor], originals: Container[int], what: str) -> None:
    """Raise if code read a parameter of the original model, where the fast weight should have been."""
    if any(id(tensor) in originals for tensor in found):
        raise RecordError(
            f"{what} reads a parameter of the original model, not the fast weight in its place: an attribute, closure "
            "or another object leads to it. Reach it through self, as a submodule: self.layer(x), not model.layer(x)."
        )


def renew_buffers(root: nn.Module, slots: ParameterSlots) -> None:
    """Put copies of the buffers in place before a call that may write into them.

    The graph of an earlier call may have kept the old ones (batch_norm in eval mode does, and its backward would read
    the newer statistics without a word), and a change shows by identity.
    """
    if slots.buffers and any(module.training for module in root.modules()):
        slots.install_buffers(copied(slots.read_buffers()))


def monkeypatch(
    module: nn.Module,
    device: torch.device | str | None = None,
    copy_initial_weights: bool = True,
    track_higher_grads: bool = True,
) -> FunctionalModule:
    """A functional view of `module`, whose fast weights start as copies of its parameters.

    `innerloop_ctx` makes one for its optimizer. Alone it keeps every graph, as the full unroll does.

    Args:
        module: Any module; it is not changed.
        device: Where weights and buffers go; `None` leaves them where they are.
        copy_initial_weights: True for detached leaf copies; False for clones, through which gradients reach
            `module.parameters()`.
        track_higher_grads: Whether the history of the weights is kept.

    Raises:
        TypeError: `module` is no plain Python module (a compiled TorchScript module cannot be copied this way).

    Memory:
        A copy of the weights and buffers, and of each update as long as the history is kept.

    Example:
        >>> import torch, lowmem_higher as higher
        >>> fnet = higher.monkeypatch(torch.nn.Linear(2, 1))
        >>> out = fnet(torch.ones(3, 2), params=[2 * p for p in fnet.parameters()])
        >>> len(list(fnet.parameters(time=0))), out.shape
        (2, torch.Size([3, 1]))
    """
    where = None if device is None else torch.device(device)
    params = _params(module)
    weights = get_func_params(module, where) if copy_initial_weights else [param.clone().to(where) for param in params]
    return _functional(module, where, weights, track_higher_grads)


def make_functional(
    module: nn.Module, encapsulator: Callable[[FunctionalModule, nn.Module], None] | None = None
) -> FunctionalModule:
    """A functional view of `module` without weights of its own: the first `params=` become its fast weights.

    Args:
        module: Any module; it is not changed.
        encapsulator: Called with the new functional module and `module`, to add what is wanted.

    Raises:
        TypeError: `module` is no plain Python module.
        ValueError: Later, at a call without `params=` before any were given.

    Memory:
        A copy of the buffers.

    Example:
        >>> import torch, lowmem_higher as higher
        >>> fnet = higher.patch.make_functional(torch.nn.Linear(2, 1))
        >>> fnet(torch.ones(3, 2), params=[torch.ones(1, 2), torch.zeros(1)]).tolist()
        [[2.0], [2.0], [2.0]]
    """
    fmodel = _functional(module, None, None, True)
    if encapsulator is not None:
        encapsulator(fmodel, module)
    return fmodel


def buffer_sync(module: nn.Module, fmodule: nn.Module, device: torch.device | str | None = None) -> None:
    """Give `fmodule` copies of the buffers that `module` has now.

    Args:
        module: The model.
        fmodule: A functional view of it; it gets new tensors, and `module` stays as it is.
        device: Where they go; `None` leaves them where they are.

    Raises:
        ValueError: The two are not built alike.

    Example:
        >>> import torch, lowmem_higher as higher
        >>> net = torch.nn.BatchNorm1d(2)
        >>> fnet = higher.monkeypatch(net)
        >>> _ = net(torch.ones(3, 2))
        >>> higher.patch.buffer_sync(net, fnet)
        >>> fnet.num_batches_tracked.item()
        1
    """
    where = None if device is None else torch.device(device)
    source, target = ParameterSlots(module), ParameterSlots(fmodule)
    if [[name for _, name in slots] for slots in source.buffers] != [[name for _, name in s] for s in target.buffers]:
        raise ValueError(
            "The modules differ in their buffers. Make the second from the first: fmodel = monkeypatch(module)."
        )
    with torch.no_grad():
        target.install_buffers(copied(source.read_buffers(), where))


def refuse_parallel(module: nn.Module) -> None:
    """Refuse wrappers that run or synchronize a model behind autograd's back.

    Raises:
        TypeError: There is one; the message names the way.
    """
    for path, part in module.named_modules():
        kind = next((name for name in _PARALLEL if any(base.__name__ == name for base in type(part).__mro__)), None)
        if kind is not None:
            inner = f"model.{path}.module" if path else "model.module"
            raise TypeError(
                f"The model {f'has a part, {path!r}, that ' if path else ''}is wrapped in {kind}, which "
                f"{_PARALLEL[kind][0]}. Hand over what is inside, {inner}, with an optimizer over its parameters, and "
                f"{_PARALLEL[kind][1]}."
            )


_AVERAGED = (
    "average the inner gradients in each step, so that the average is differentiated too: "
    "diffopt.step(loss, grad_callback=lowmem_higher.distributed.average)"
)
_PARALLEL = {
    "DistributedDataParallel": ("averages gradients by hooks that a meta-gradient does not pass through", _AVERAGED),
    "DataParallel": (
        "copies the weights to several devices of one process at each call",
        f"start one process for each device with torchrun; there {_AVERAGED}",
    ),
    "FullyShardedDataParallel": (
        "swaps the weights by hooks, where fast weights cannot take their place",
        "shard it by torch.distributed.fsdp.fully_shard(model)",
    ),
}


def _params(module: nn.Module) -> list[nn.Parameter]:
    if not isinstance(module, nn.Module) or isinstance(module, torch.jit.ScriptModule):
        raise TypeError(
            f"The model must be a torch.nn.Module in Python, and is {type(module).__name__}. Give the module itself, "
            "before torch.jit.script or torch.jit.trace: innerloop_ctx(model, opt). A function of tensors can be put "
            "into the forward of an nn.Module."
        )
    refuse_parallel(module)
    reshard(module)
    return list(module.parameters())


def _functional(
    module: nn.Module, device: torch.device | None, weights: list[Tensor] | None, track: bool
) -> FunctionalModule:
    originals = _params(module)
    with torch.no_grad():
        buffers = copied(ParameterSlots(module).read_buffers(), device)
    root = copy_structure(module)
    view = FunctionalView(root, weights, track)
    view.slots.install_buffers(buffers)
    view.originals = list(originals)
    root.__dict__["_view"] = view
    root.__class__ = functional_class(type(root))
    return cast(FunctionalModule, root)


def copy_structure(module: nn.Module) -> nn.Module:
    """New module objects in the same arrangement, which share tensors and all other attributes with the original.

    An attribute that leads to a submodule (a list of layers, a bound method, a partial function) leads to its copy.
    """
    copies: dict[int, Any] = {}
    for part in module.modules():
        twin = copies[id(part)] = own_class(part).__new__(own_class(part))
        object.__setattr__(twin, "__dict__", dict(part.__dict__))
    for part in module.modules():
        for name, value in part.__dict__.items():
            copies[id(part)].__dict__[name] = _led_to_copies(value, copies)
        for table in own_tables & part.__dict__.keys():
            found = part.__dict__[table]
            copies[id(part)].__dict__[table] = type(found)(
                (name, _led_to_copies(value, copies)) for name, value in found.items()
            )
        if type(part) is nn.ParameterList:
            copies[id(part)].__class__ = _ParameterList
    gather_at_calls(module, copies)
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


def class_of(kind: str, base: type[nn.Module], make: Callable[[type[nn.Module]], type[nn.Module]]) -> type[nn.Module]:
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
    return class_of("functional", model_type, _make_functional_class)


def _make_functional_class(model_type: type[nn.Module]) -> type[nn.Module]:
    names = {"__module__": model_type.__module__}
    return type(f"Functional{model_type.__name__}", (FunctionalModule, model_type), names)


def _routed_class(module_type: type[nn.Module]) -> type[nn.Module]:
    return class_of("routed", module_type, _make_routed_class)


def _make_routed_class(module_type: type[nn.Module]) -> type[nn.Module]:
    def call(self: nn.Module, *args: Any, **kwargs: Any) -> Any:
        run = functools.partial(module_type.__call__, self)
        fmodel, path = self.__dict__.get("_call_through", (None, ""))  # a slice of a container is built without it
        if fmodel is None:
            return run(*args, **kwargs)
        owner = alive(fmodel)
        caller = owner._view.caller
        return run(*args, **kwargs) if caller is None else caller.call_module(owner, path, run, args, kwargs)

    names = {"__call__": call, "__module__": module_type.__module__, "__qualname__": module_type.__qualname__}
    return type(module_type.__name__, (module_type,), names)
