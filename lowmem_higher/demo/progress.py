"""Progress bars on stderr that count passes through the model, so that they also move during the backward.

A pass is also where Ctrl-C takes effect. Python drops an exception that a signal raises inside a callback of a weak
reference, with a traceback on stderr, and the engine and `live_bytes` have many such callbacks.
"""

from __future__ import annotations

import signal
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Never

from tqdm import tqdm

CHECKPOINTED_PASSES = 3
"""Passes a step with checkpoints, at most: the user's loop, one first-order replay, the step that is differentiated."""


@dataclass
class Progress:
    """The bar of the current phase. The model calls `tick` in its forward, which the replays call as well."""

    silent: bool = False
    _bar: tqdm[Never] | None = field(default=None, repr=False)
    _interrupted: bool = field(default=False, repr=False)

    @contextmanager
    def interruptible(self) -> Iterator[None]:
        """Lets Ctrl-C take effect at the next model pass; a second one takes effect at once. For the main thread."""

        def note(*_: object) -> None:
            if self._interrupted:
                raise KeyboardInterrupt
            self._interrupted = True

        before = signal.getsignal(signal.SIGINT)
        if before is not signal.default_int_handler:  # ignored, under nohup, or someone else's
            yield
            return
        signal.signal(signal.SIGINT, note)
        try:
            yield
        finally:
            signal.signal(signal.SIGINT, before)

    @contextmanager
    def phase(self, name: str, passes: int) -> Iterator[None]:
        """Shows a bar for a part of the job that takes about `passes` model passes."""
        with tqdm(
            total=passes,
            desc=name,
            unit="pass",
            unit_scale=True,
            mininterval=0.2,
            bar_format="{desc:<28} {percentage:3.0f}% |{bar:30}| {elapsed} elapsed, {remaining} to go",
            disable=self.silent,
        ) as self._bar:
            yield
            self.reach(passes)
        self._bar = None

    def tick(self) -> None:
        """One more model pass.

        Raises:
            KeyboardInterrupt: Ctrl-C was pressed.
        """
        if self._interrupted:
            raise KeyboardInterrupt
        if self._bar is not None and self._bar.n < (self._bar.total or 0):
            self._bar.update()

    @property
    def passes(self) -> int:
        """Where the bar stands."""
        return 0 if self._bar is None else int(self._bar.n)

    def reach(self, passes: int) -> None:
        """Moves the bar to `passes`: the number of passes is known only as an upper bound beforehand."""
        if self._bar is not None:
            self._bar.update(passes - self._bar.n)
