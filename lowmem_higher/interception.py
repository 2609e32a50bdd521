"""Stepping in where torch offers no hook: an attribute of torch is replaced while somebody needs it, then put back.

The replacement is process-wide, so it asks the handlers of the calling thread only, and stays while any thread has one.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any, Generic, TypeVar

Handler = TypeVar("Handler")
_MISSING = object()


class Interception(Generic[Handler]):
    """Attributes that are replaced while there are handlers.

    Args:
        places: For each: the module or class, the attribute's name, and a function that, given what was there (None if
            nothing), makes what takes its place; that calls `handlers()`.
    """

    def __init__(self, *places: tuple[Any, str, Callable[[Any], Any]]) -> None:
        self._places = places
        self._lock = threading.Lock()
        self._count = 0
        self._before: list[Any] = []
        self._local = threading.local()

    def handlers(self) -> list[Handler]:
        """The handlers of this thread, the newest last."""
        found: list[Handler] = self._local.__dict__.setdefault("handlers", [])
        return found

    def push(self, handler: Handler) -> None:
        """Add a handler for this thread."""
        with self._lock:
            if self._count == 0:
                self._before = [vars(owner).get(name, _MISSING) for owner, name, _ in self._places]
                for (owner, name, replacement), before in zip(self._places, self._before, strict=True):
                    setattr(owner, name, replacement(None if before is _MISSING else before))
            self._count += 1
        self.handlers().append(handler)

    def remove(self, handler: Handler) -> None:
        """Take a handler of this thread away; the last one of all threads puts the attributes back."""
        self.handlers().remove(handler)
        with self._lock:
            self._count -= 1
            for (owner, name, _), before in zip(self._places, self._before, strict=True) if self._count == 0 else ():
                if before is _MISSING:
                    delattr(owner, name)
                else:
                    setattr(owner, name, before)

    @contextmanager
    def by(self, handler: Handler) -> Iterator[None]:
        """Have the handler inside the block."""
        self.push(handler)
        try:
            yield
        finally:
            self.remove(handler)
