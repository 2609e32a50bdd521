"""Watching code whose inside is not recorded: which tensors does it read without being given them?

A model's forward may use a tensor from a closure, a global or an attribute. If that tensor requires grad it is an input
of the step like any other (rule R6). A `Watcher` sees every torch call made inside and notes such tensors while the
user's loop runs; in a replay it puts stand-ins in their place, whose gradients the pullback collects, and reports
tensors that were not read the first time.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import _SingleLevelFunction
from torch.overrides import TorchFunctionMode

from lowmem_higher.structure import flatten, tensors_in, unflatten
from lowmem_higher.tensor_map import TensorMap

ApplyHandler = Callable[[type, Callable[..., Any], tuple[Any, ...]], Any]


class Watcher(TorchFunctionMode):
    """Notes every tensor that requires grad and is read inside, but was neither given nor made inside.

    Args:
        given: The tensors that the watched code was given: arguments, weights, buffers.
        stand_ins: By `id` of the tensor they stand for; used in replays.
        inner_leaves: Receives the leaves that require grad and are made inside.
    """

    def __init__(
        self,
        given: Iterable[Tensor],
        stand_ins: Mapping[int, Tensor] | None = None,
        inner_leaves: TensorMap[bool] | None = None,
    ) -> None:
        super().__init__()
        self._inner_leaves = inner_leaves
        self.found: list[Tensor] = []
        self._given = list(given)  # held, so that no id is used twice
        self._stand_ins = stand_ins or {}
        self._known = {id(tensor) for tensor in self._given}
        self._known.update(id(tensor) for tensor in self._stand_ins.values())
        self._made_from = torch._C._autograd._get_sequence_nr()

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        """Look at the arguments of one torch call, then run it."""
        args, kwargs = self.look(args, kwargs or {})
        out = func(*args, **kwargs)
        for tensor in (out,) if isinstance(out, Tensor) else tensors_in(out):
            if tensor.requires_grad and tensor.grad_fn is None:
                self._known.add(id(tensor))
                if self._inner_leaves is not None:
                    self._inner_leaves.set(tensor, True)
        return out

    def look(self, args: Any, kwargs: Any) -> tuple[Any, Any]:
        """Note what is unknown among the arguments; give them back with stand-ins in place."""
        if not any(map(self._unknown, args)) and not (kwargs and any(map(self._unknown, kwargs.values()))):
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
        return unflatten(structure, iter(leaves))

    def _unknown(self, value: Any) -> bool:
        if isinstance(value, Tensor):
            return value.requires_grad and id(value) not in self._known and (
                id(value) in self._stand_ins or _made_before(value, self._made_from)
            )
        if isinstance(value, (tuple, list)):
            return any(map(self._unknown, value))
        return isinstance(value, dict) and any(map(self._unknown, value.values()))

    @contextmanager
    def on(self) -> Iterator[None]:
        """Watch this thread inside the block."""

        def apply(function: type, original: Callable[..., Any], args: tuple[Any, ...]) -> Any:
            return original(*self.look(args, {})[0])

        with self, intercepted_apply(apply):
            yield


def _made_before(tensor: Tensor, sequence_number: int) -> bool:
    """Whether a tensor's graph is older than a point in time. A leaf has no graph and may be of any age."""
    node = tensor.grad_fn
    return node is None or node._sequence_nr() < sequence_number


@contextmanager
def intercepted_apply(handler: ApplyHandler) -> Iterator[None]:
    """Give `handler(function_class, original_apply, args)` every `autograd.Function.apply` of this thread.

    `TorchFunctionMode` does not see `apply`. All ways to call it, also through an alias made earlier, end in the base
    class `_SingleLevelFunction`, whose attribute is set inside the block and put back after it.
    """
    thread = threading.get_ident()
    before = _SingleLevelFunction.__dict__.get("apply")

    def apply(cls: type, *args: Any, **kwargs: Any) -> Any:
        if before is not None:
            original = before.__get__(None, cls)
        else:
            original = super(_SingleLevelFunction, cls).apply  # type: ignore[misc]  # found at run time
        if threading.get_ident() != thread or kwargs:
            return original(*args, **kwargs)
        return handler(cls, original, args)

    _SingleLevelFunction.apply = classmethod(apply)  # type: ignore[assignment]  # put back below
    try:
        yield
    finally:
        if before is None:
            del _SingleLevelFunction.apply
        else:
            _SingleLevelFunction.apply = before
