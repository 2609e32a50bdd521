"""Ctrl-C and SIGTERM, put off until a run has saved what it has."""

from __future__ import annotations

import signal
import threading
from typing import Any

_SIGNALS = (signal.SIGINT, signal.SIGTERM)


class Interrupts:
    """Inside the block the first signal is noted, and the second one ends the process's work at once.

    Outside of the main thread, which alone may handle signals, nothing is changed.

    Attributes:
        received: The signal that came.
    """

    def __init__(self) -> None:
        self.received: signal.Signals | None = None
        self._before: dict[signal.Signals, Any] = {}

    def __enter__(self) -> Interrupts:
        if threading.current_thread() is threading.main_thread():
            for number in _SIGNALS:
                before = signal.getsignal(number)
                if before is not signal.SIG_IGN and before is not None:  # None: not set from Python
                    self._before[number] = before
                    signal.signal(number, self._note)
        return self

    def __exit__(self, kind: object, *_: object) -> None:
        for number, before in self._before.items():
            signal.signal(number, before)
        if kind is None and self.received is not None:  # it came too late to be acted on
            signal.raise_signal(self.received)

    def _note(self, number: int, frame: object) -> None:
        if self.received is not None:
            raise self.error()
        self.received = signal.Signals(number)

    def error(self) -> BaseException:
        """What the signal would have raised."""
        if self.received is signal.SIGTERM:
            return SystemExit(128 + signal.SIGTERM)
        return KeyboardInterrupt()
