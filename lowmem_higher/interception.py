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
    """An attribute that is replaced while there are handlers.

    Args:
        owner: The module or class.
        name: The attribute.
        replacement: Given what was there (None if nothing), makes what takes its place; that calls `handlers()`.
    """

    def __init__(self, owner: Any, name: str, replacement: Callable[[Any], Any]) -> None:
        self._owner, self._name, self._replacement = owner, name, replacement
        self._lock = threading.Lock()
        self._count = 0
        self._before: Any = _MISSING
        self._local = threading.local()

    def handlers(self) -> list[Handler]:
        """The handlers of this thread, the newest last."""
        found: list[Handler] = self._local.__dict__.setdefault("handlers", [])
        return found

    def push(self, handler: Handler) -> None:
        """Add a handler for this thread."""
        with self._lock:
            if self._count == 0:
                self._before = vars(self._owner).get(self._name, _MISSING)
                found = None if self._before is _MISSING else self._before
                setattr(self._owner, self._name, self._replacement(found))
            self._count += 1
        self.handlers().append(handler)

    def remove(self, handler: Handler) -> None:
        """Take a handler of this thread away; the last one of all threads puts the attribute back."""
        self.handlers().remove(handler)
        with self._lock:
            self._count -= 1
            if self._count == 0 and self._before is _MISSING:
                delattr(self._owner, self._name)
            elif self._count == 0:
                setattr(self._owner, self._name, self._before)

    @contextmanager
    def by(self, handler: Handler) -> Iterator[None]:
        """Have the handler inside the block."""
        self.push(handler)
        try:
            yield
        finally:
            self.remove(handler)
