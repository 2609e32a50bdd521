"""How far a run is, on stderr: a bar by tqdm if that is installed, else a line that counts."""

from __future__ import annotations

import sys
import time
from collections.abc import Callable
from typing import Any

_REFRESH_SECONDS = 0.2


class Progress:
    """Shows the steps of a loop, then the runs of a backward: recomputed and differentiated steps.

    Args:
        asked: False for silence; True for bars where stderr is a terminal; "always" also elsewhere, in a log say.
        steps: How many steps the loop will take, if that is known.
    """

    def __init__(self, asked: bool | str = False, steps: int | None = None) -> None:
        self._asked, self._steps = asked, steps
        self._bar: Any = None  # a tqdm or a Line
        self._backward = False
        self.after_step: list[Callable[[], None]] = []  # called after each step of the loop, shown or not

    def step(self, number: int) -> None:
        """The loop took step `number`, counted from 1."""
        for call in self.after_step:
            call()
        if not self._shown:
            return
        if self._bar is None or self._backward:
            self._open("inner loop", "step", self._steps, number - 1)
            self._backward = False
        self._one_more()

    def begin_backward(self, runs: Callable[[], int]) -> bool:
        """A backward begins that will take about `runs()` runs; False if it began before, or nothing is shown."""
        if not self._shown or (self._backward and self._bar is not None):
            return False
        self._open("outer backward", "run", runs(), 0)
        self._backward = True
        return True

    def run(self) -> None:
        """A step was run; counted in a backward."""
        if self._backward:
            self._one_more()

    def begin(self, name: str, unit: str, total: int) -> None:
        """A phase begins that is counted by `count`."""
        if self._shown:
            self._open(name, unit, total, 0, smoothing=0.0)

    def count(self, number: int) -> None:
        """So many more."""
        if self._bar is not None:
            self._bar.update(number)

    def close(self) -> None:
        """The phase is over, or was broken off."""
        if self._bar is not None:
            self._bar.close()
        self._bar = None

    @property
    def _shown(self) -> bool:
        return self._asked == "always" or (self._asked is True and sys.stderr.isatty())

    def _one_more(self) -> None:
        bar = self._bar
        if bar is not None:
            if bar.total is not None and bar.n >= bar.total:
                bar.total = bar.n + 1  # the loop is longer than was said
            bar.update()

    def _open(self, name: str, unit: str, total: int | None, done: int, smoothing: float = 0.3) -> None:
        self.close()
        try:
            from tqdm import tqdm
        except ImportError:
            self._bar = Line(name, unit, total, done)
        else:
            self._bar = tqdm(
                desc=name,
                unit=unit,
                total=total,
                initial=done,
                mininterval=_REFRESH_SECONDS,
                file=sys.stderr,
                dynamic_ncols=True,
                smoothing=smoothing,  # 0: the average speed foretells the rest
            )


class Work:
    """Shows how much of the work of a run is done, in which one kind of run takes longer than another.

    It is counted in steps of ways; a run of a leaf counts for as many as it takes the time of.

    Args:
        asked: As for `Progress`.
    """

    def __init__(self, asked: bool | str) -> None:
        self._progress = Progress(asked)
        self._weight = 1.0

    @property
    def shown(self) -> bool:
        """Whether anybody looks."""
        return self._progress._shown

    def begin(self, way: int, leaves: int, weight: float = 1.0) -> None:
        """So many steps of ways and runs of leaves are ahead, of which one takes `weight` times the other's time."""
        self._weight = weight
        self._progress.begin("metagradient", "step", round(way + weight * leaves))

    def ran(self, way: int, leaves: int) -> None:
        """So many are done."""
        self._progress.count(round(way + self._weight * leaves))

    def close(self) -> None:
        """The run is over, or was broken off."""
        self._progress.close()


class Line:
    """One line on stderr that is written again and again."""

    def __init__(self, name: str, unit: str, total: int | None, done: int) -> None:
        self.n, self.total = done, total
        self._name, self._unit, self._done = name, unit, done
        self._started = time.monotonic()
        self._written = -_REFRESH_SECONDS
        self._width = 0

    def update(self, n: int = 1) -> None:
        """So many more."""
        self.n += n
        elapsed = time.monotonic() - self._started
        if elapsed - self._written >= _REFRESH_SECONDS:
            self._written = elapsed
            self._write(elapsed, "")

    def close(self) -> None:
        """Leave it as it stands."""
        self._write(time.monotonic() - self._started, "\n")

    def _write(self, elapsed: float, end: str) -> None:
        of = "" if self.total is None else f"/{self.total}"
        text = f"{self._name}: {self.n}{of} {self._unit}s, {_clock(elapsed)} elapsed"
        if self.total is not None and self.n > self._done:
            text += f", {_clock(elapsed / (self.n - self._done) * (self.total - self.n))} to go"
        self._width = max(self._width, len(text))
        sys.stderr.write(f"\r{text:<{self._width}}{end}")
        sys.stderr.flush()


def _clock(seconds: float) -> str:
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02}:{rest:02}" if hours else f"{minutes}:{rest:02}"
