"""A dictionary from living tensors to values."""

from __future__ import annotations

import functools
import weakref
from collections.abc import Callable
from typing import Generic, TypeVar

from torch import Tensor

Value = TypeVar("Value")


class TensorMap(Generic[Value]):
    """A dictionary from living tensors to values; an entry goes when its tensor does."""

    def __init__(self) -> None:
        self._entries: dict[int, tuple[weakref.ref[Tensor], Value]] = {}

    def get(self, tensor: Tensor) -> Value | None:
        """The value of a tensor, None if it has none."""
        entry = self._entries.get(id(tensor))
        return entry[1] if entry is not None and entry[0]() is tensor else None

    def set(self, tensor: Tensor, value: Value) -> None:
        """Give a tensor its value."""
        # The callback runs no Python code of its own, in which a Ctrl-C would be lost.
        forget = functools.partial(self._entries.pop, id(tensor))
        self._entries[id(tensor)] = (weakref.ref(tensor, forget), value)

    def pop(self, tensor: Tensor) -> None:
        """Forget a tensor."""
        self._entries.pop(id(tensor), None)

    def keep(self, wanted: Callable[[Value], bool]) -> None:
        """Forget the tensors whose value is not wanted."""
        for key in [key for key, (_, value) in self._entries.items() if not wanted(value)]:
            del self._entries[key]

    def clear(self) -> None:
        """Forget all tensors."""
        self._entries.clear()

    def __len__(self) -> int:
        return len(self._entries)
