"""Watching code whose inside is not recorded: which tensors does it read without being given them?

A model's forward may use a tensor from a closure, a global or an attribute. If that tensor requires grad it is an input
of the step like any other (rule R6). A `Watcher` sees every torch call made inside and notes such tensors while the
user's loop runs; in a replay it puts stand-ins in their place, whose gradients the pullback collects, and reports
tensors that were not read the first time.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Container, Iterable, Iterator, Mapping, Set
from contextlib import contextmanager
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.function import BackwardCFunction, Function, _SingleLevelFunction
from torch.overrides import TorchFunctionMode

from lowmem_higher.errors import RecordError
from lowmem_higher.interception import Interception
from lowmem_higher.structure import flatten, tensors_in, unflatten
from lowmem_higher.tensor_map import TensorMap

ApplyHandler = Callable[[type, Callable[..., Any], tuple[Any, ...]], Any]


class Watcher(TorchFunctionMode):
    """Notes every tensor that requires grad and is read inside, but was neither given nor made inside.

    Args:
        given: The tensors that the watched code was given: arguments, weights, buffers.
        stand_ins: By `id` of the tensor they stand for; used in replays.
        inner_leaves: Receives the leaves that require grad and are made inside.
        candidates: Ids of tensors; which of them are read is noted in `read`.
        own: Ids of the tensors that may be written into; other writes are noted in `foreign_writes`. None: not watched.
    """

    def __init__(
        self,
        given: Iterable[Tensor],
        stand_ins: Mapping[int, Tensor] | None = None,
        inner_leaves: TensorMap[bool] | None = None,
        candidates: Container[int] = (),
        own: Set[int] | None = None,
    ) -> None:
        super().__init__()
        self.foreign_writes: list[str] = []
        self._own = own
        self.read: set[int] = set()
        self._candidates = candidates
        self._inner_leaves = inner_leaves
        self.found: list[Tensor] = []
        self._given = list(given)  # held, so that no id is used twice
        self._stand_ins = stand_ins or {}
        self._known = {id(tensor) for tensor in self._given}
        self._known.update(id(tensor) for tensor in self._stand_ins.values())
        self._made: TensorMap[bool] = TensorMap()
        self._made_from = torch._C._autograd._get_sequence_nr()

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        """Look at the arguments of one torch call, then run it."""
        args, kwargs = self.look(args, kwargs or {})
        if self._own is not None:
            name = getattr(func, "__name__", "")
            if may_write(name, kwargs):
                self._note_write(func, kwargs.get("out", args[0] if args else None))
            for tensor in written_statistics(func, args, kwargs):
                self._note_write(func, tensor)
        out = func(*args, **kwargs)
        for tensor in (out,) if isinstance(out, Tensor) else tensors_in(out):
            if tensor.requires_grad or self._own is not None:
                self._made.set(tensor, True)
                if self._inner_leaves is not None and tensor.is_leaf:
                    self._inner_leaves.set(tensor, True)
        return out

    def look(self, args: Any, kwargs: Any) -> tuple[Any, Any]:
        """Note what is unknown among the arguments; give them back with stand-ins in place."""
        unknown = [self._unknown(value) for value in (*args, *kwargs.values())]
        if not any(unknown):
            return args, kwargs
        leaves: list[Any] = []
        structure = flatten((args, kwargs), leaves)
        for position, leaf in enumerate(leaves):
            if self._unknown(leaf):
                if id(leaf) in self._stand_ins:
                    leaves[position] = self._stand_ins[id(leaf)]
                else:
                    self._known.add(id(leaf))
                    self.found.append(leaf)
        known: tuple[Any, Any] = unflatten(structure, iter(leaves))
        return known

    def passed_on(self, outputs: list[Tensor]) -> set[int]:
        """The ids of those outputs that existed before the watched code ran."""
        return {id(tensor) for tensor in outputs if not tensor.is_leaf and _made_before(tensor, self._made_from)}

    def _note_write(self, func: Any, target: Any) -> None:
        if isinstance(target, Tensor) and self._own is not None:
            base = target if target._base is None else target._base
            if not {id(target), id(base)} & self._own and not self._made.get(target) and not self._made.get(base):
                self.foreign_writes.append(str(torch.overrides.resolve_name(func)))

    def _unknown(self, value: Any) -> bool:
        if isinstance(value, Tensor):
            if self._candidates and id(value) in self._candidates:
                self.read.add(id(value))
            if not value.requires_grad or id(value) in self._known or self._made.get(value):
                return False
            return id(value) in self._stand_ins or _made_before(value, self._made_from)
        if isinstance(value, (tuple, list)):
            unknown = [self._unknown(item) for item in value]  # each is looked at: reads are noted on the way
            return any(unknown)
        return isinstance(value, dict) and self._unknown(list(value.values()))

    @contextmanager
    def on(self) -> Iterator[None]:
        """Watch this thread inside the block."""

        def apply(function: type, original: Callable[..., Any], args: tuple[Any, ...]) -> Any:
            return original(*self.look(args, {})[0])

        with self, intercepted_apply.by(apply):
            yield


def may_write(name: str, kwargs: Mapping[str, Any]) -> bool:
    """Whether a call may write into its first tensor, by its name and arguments."""
    if name.startswith("__"):
        return name == "__setitem__" or (name.startswith("__i") and name not in ("__invert__", "__index__", "__int__"))
    return (
        (name.endswith("_") and name != "requires_grad_")
        or kwargs.get("out") is not None
        or bool(kwargs.get("inplace"))
    )


def written_statistics(func: Any, args: Any, kwargs: Mapping[str, Any]) -> list[Tensor]:
    """The running statistics that a normalization in training mode writes; no version counts most of these writes."""
    if func not in _NORMALIZATIONS:
        return []
    first, switch, usually = _NORMALIZATIONS[func]
    if not kwargs.get(switch, args[5] if len(args) > 5 else usually):
        return []
    given = [args[first + k] if len(args) > first + k else kwargs.get(name) for k, name in enumerate(_STATISTICS)]
    return [tensor for tensor in given if tensor is not None]


_STATISTICS = ("running_mean", "running_var")
_NORMALIZATIONS = {  # where the statistics stand; the switch, their sixth argument; what it is by default
    F.batch_norm: (1, "training", False),
    F.instance_norm: (1, "use_input_stats", True),
    torch.batch_norm: (3, "training", False),
    torch.native_batch_norm: (3, "training", False),
    torch.instance_norm: (3, "use_input_stats", True),
}


def _made_before(tensor: Tensor, sequence_number: int) -> bool:
    """Whether a tensor's graph is older than a point in time. A leaf has no graph and may be of any age."""
    node = tensor.grad_fn
    return node is None or node._sequence_nr() < sequence_number


def _replacement(before: Any) -> Any:
    def apply(cls: type, *args: Any, **kwargs: Any) -> Any:
        original = super(_SingleLevelFunction, cls).apply if before is None else before.__get__(None, cls)  # type: ignore[misc]  # a class made in C
        handlers = intercepted_apply.handlers()
        _applied.seen += 1
        try:
            if kwargs or not handlers:
                return original(*args, **kwargs)
            return handlers[-1](cls, original, args)
        finally:
            _applied.seen -= 1

    return classmethod(apply)


class _Applied(threading.local):
    """How many calls of `apply` that were seen are under way in this thread; who wants to know of the others."""

    seen = 0
    hidden: list[str] | None = None


_applied = _Applied()


def _noticing(before: Any) -> Any:
    def __init__(self: Any, *args: Any) -> None:  # noqa: N807  (takes the place of one)
        if _applied.seen == 0 and _applied.hidden is not None:
            _applied.hidden.append(type(self)._forward_cls.__name__)

    return __init__


# `TorchFunctionMode` does not see `autograd.Function.apply`. Where that is Python (torch 2.13), all ways to call it end
# in the base class, also through an alias made earlier. Where it is C (2.14), such an alias, `cube = Cube.apply` made
# outside of any context, stays in C. That it runs is seen by the node that it makes; its arguments are not.
_WHERE_APPLY_IS_FOUND = _SingleLevelFunction if hasattr(vars(Function)["apply"], "__func__") else Function
intercepted_apply: Interception[ApplyHandler] = Interception(
    (_WHERE_APPLY_IS_FOUND, "apply", _replacement), (BackwardCFunction, "__init__", _noticing)
)


@contextmanager
def refuse_hidden(watcher: Watcher) -> Iterator[None]:
    """Refuse watched code in which nobody can put stand-ins in place.

    Raises:
        RecordError: It reads tensors that it was not given, and calls a custom function in a way that hides arguments.
    """
    hidden: list[str] = []
    before, _applied.hidden = _applied.hidden, hidden
    try:
        yield
    finally:
        _applied.hidden = before
    if hidden and watcher.found:
        name, shapes = hidden[0], ", ".join(str(tuple(tensor.shape)) for tensor in watcher.found)
        raise RecordError(
            f"{name}.apply was called by another name, as made by f = {name}.apply, which this version of torch "
            f"hides from the recorder, next to tensors that require grad and are no arguments of the call (shape "
            f"{shapes}). Write {name}.apply(...) where it is called, or pass those tensors: fmodel(x, tensor)."
        )
