"""Measures every inner loop that begins while it is watching: memory by phase, passes, seconds.

NOTE [ Phases ]
A mark is set when an inner loop begins and after each of its steps, and meters are read at marks. What was between two
marks belongs to the loop, if the second one is a step; else to the *backward* of the loop that had the first one. So
"backward" reaches from a loop's last step until the next loop begins or the script ends. Which step was the last is
known only then; hence a reading at every step. Seconds are those of the thread that runs the loop, which on a GPU runs
ahead of the device.

A profile holds no tensor and no trajectory: what it measures lives exactly as long as without it.
"""

from __future__ import annotations

import dataclasses
import functools
import threading
import time
import weakref
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from lowmem_higher.innerloop import OBSERVERS, Unrolled
from lowmem_higher.ledger import Ledger
from lowmem_higher.meters import Meter, Sampler
from lowmem_higher.report import Report, format_bytes
from lowmem_higher.settings import Settings
from lowmem_higher.trajectory import Trajectory

_COUNTS = ("steps", "first_order_runs", "second_order_runs", "update_runs", "unrolled_steps")
_SPANS = 200  # loops that a picture shows; with more of them it shows none


@dataclasses.dataclass
class Phase:
    """Seconds, and the most that each meter has shown.

    Example:
        >>> phase = Phase()
        >>> phase.add(1.0, {"live bytes": 7})
        >>> phase.add(0.5, {"live bytes": 5})
        >>> phase
        Phase(seconds=1.5, peaks={'live bytes': 7})
    """

    seconds: float = 0.0
    peaks: dict[str, int] = dataclasses.field(default_factory=dict)

    def add(self, seconds: float, peaks: dict[str, int]) -> None:
        """One stretch between two marks."""
        self.seconds += seconds
        for name, peak in peaks.items():
            self.peaks[name] = max(peak, self.peaks.get(name, 0))


class InnerLoop:
    """What was measured of one inner loop.

    Attributes:
        number: Counted from 1, in the order of their beginnings.
        settings: The keywords of `innerloop_ctx` that say how gradients are computed, as code.
        begun: Bytes when it began, by meter.
        loop: From the beginning to the last step.
        backward: From the last step on.
        span: Seconds of the beginning, the last step and the end.
    """

    def __init__(self, number: int, settings: str, ledger: Ledger, begun: dict[str, int], at: float) -> None:
        self.number, self.settings, self.begun = number, settings, begun
        self.loop, self.backward = Phase(), Phase()
        self.span = [at, at, at]
        self._ledger: Ledger | None = ledger
        self._report = Report()

    @property
    def report(self) -> Report:
        """What the run has cost so far."""
        return self._report if self._ledger is None else self._ledger.report()

    def end(self) -> None:
        """Nothing more will be counted."""
        self._report, self._ledger = self.report, None

    def peak(self, name: str) -> int:
        """The most that a meter has shown."""
        return max(phase.peaks.get(name, 0) for phase in (self.loop, self.backward))

    def as_dict(self) -> dict[str, Any]:
        """For JSON."""
        return {
            "number": self.number,
            "settings": self.settings,
            "begun": self.begun,
            "loop": dataclasses.asdict(self.loop),
            "backward": dataclasses.asdict(self.backward),
            "report": self.report.as_dict(),
        }


class Profile:
    """Measures the inner loops that begin while it is watching.

    Attributes:
        loops: How many have begun.
        largest: The one with the highest peak, by the last of the meters that has shown anything.
        last: The newest.
        before: The phase before the first one.
        loop, backward: Of all together: sums of seconds, highest peaks.
        counts: Of all together: steps and runs.
        seconds: In all.
        samples: `(seconds, bytes of each meter)`, what the picture shows.

    Args:
        meters: What is measured, in the order of tables.

    Memory:
        Some KB for the largest and the last loop, their timelines included, and for 2,000 samples.

    Example:
        >>> import torch, lowmem_higher as higher
        >>> from lowmem_higher.meters import LiveBytes
        >>> net = torch.nn.Linear(100, 1)
        >>> with LiveBytes() as live:
        ...     profile = Profile([live])
        ...     with profile.watching():
        ...         for _ in range(3):
        ...             with higher.innerloop_ctx(net, torch.optim.SGD(net.parameters(), 0.1)) as (fnet, diffopt):
        ...                 new = diffopt.step(fnet(torch.ones(5, 100)).mean())
        >>> profile.loops, profile.counts["steps"], profile.last.number, profile.loop.peaks["live bytes"] > 2000
        (3, 3, 3, True)
    """

    def __init__(self, meters: Sequence[Meter]) -> None:
        self.loops = 0
        self.largest: InnerLoop | None = None
        self.last: InnerLoop | None = None
        self.before, self.loop, self.backward = Phase(), Phase(), Phase()
        self.counts = dict.fromkeys(_COUNTS, 0)
        self.seconds = 0.0
        self.samples: list[tuple[float, list[int]]] = []
        self.meters = meters
        self.spans: list[list[float]] = []
        self._open: dict[int, weakref.finalize[..., Any]] = {}
        self._began = self._marked = time.perf_counter()
        self._touched: InnerLoop | None = None  # who had the newest mark
        self._lock = threading.RLock()  # loops in several threads; finalizers run anywhere

    @contextmanager
    def watching(self) -> Iterator[None]:
        """Measure the inner loops that begin in the block."""
        self._began = self._marked = time.perf_counter()
        for meter in self.meters:
            meter.take()
        OBSERVERS.append(self._begin)
        try:
            with Sampler(self.meters) as sampler:
                yield
        finally:
            OBSERVERS.remove(self._begin)
            self._mark(None)
            self.seconds = self._marked - self._began
            self.samples = sampler.samples
            for finish in list(self._open.values()):
                finish()

    def _begin(self, settings: Settings, run: Trajectory | Unrolled) -> functools.partial[None]:
        with self._lock:
            self._mark(None)
            self.loops += 1
            begun = {meter.name: meter.now() for meter in self.meters}
            inner = InnerLoop(self.loops, _as_code(settings), run.ledger, begun, self._marked - self._began)
            if len(self.spans) <= _SPANS:
                self.spans.append(inner.span)
            self.last = self._touched = inner
            self._open[inner.number] = finish = weakref.finalize(run, self._end, inner, run.ledger)
            finish.atexit = False
            return functools.partial(self._mark, inner)

    def _mark(self, stepped: InnerLoop | None) -> None:
        with self._lock:
            now = time.perf_counter()
            seconds, self._marked = now - self._marked, now
            peaks = {meter.name: meter.take() for meter in self.meters}
            inner = stepped or self._touched
            if inner is None:
                self.before.add(seconds, peaks)
                return
            inner.span[2] = now - self._began
            if stepped is None:
                inner.backward.add(seconds, peaks)
                self.backward.add(seconds, peaks)
            else:
                inner.span[1] = inner.span[2]
                inner.loop.add(seconds, peaks)
                self.loop.add(seconds, peaks)
            self._touched = inner
            if self.largest is None or self._size(inner) > self._size(self.largest):
                self.largest = inner

    def _size(self, inner: InnerLoop) -> tuple[int, ...]:
        return tuple(inner.peak(meter.name) for meter in reversed(self.meters))

    def _end(self, inner: InnerLoop, ledger: Ledger) -> None:
        with self._lock:
            inner.end()
            del self._open[inner.number]
            for name in _COUNTS:
                self.counts[name] += getattr(ledger, name)

    def as_dict(self) -> dict[str, Any]:
        """For JSON: the totals, the largest and the last loop in full, the samples."""
        return {
            "seconds": self.seconds,
            "meters": [meter.name for meter in self.meters],
            "loops": self.loops,
            **self.counts,
            "before": dataclasses.asdict(self.before),
            "loop": dataclasses.asdict(self.loop),
            "backward": dataclasses.asdict(self.backward),
            "largest": None if self.largest is None else self.largest.as_dict(),
            "last": None if self.last is None else self.last.as_dict(),
            "samples": [[seconds, *sizes] for seconds, sizes in self.samples],
        }

    def plot(self, path: Path) -> None:
        """Save a picture: bytes against seconds, for each meter, with the phases of the loops.

        Raises:
            ImportError: matplotlib is not installed.
        """
        from lowmem_higher.pictures import draw_profile

        names = [meter.name for meter in self.meters]
        draw_profile(path, names, self.samples, self.spans if self.loops <= _SPANS else [])

    def __str__(self) -> str:
        if self.last is None or self.largest is None:
            return (
                f"no inner loop began in {self.seconds:.2f} s. What is measured is lowmem_higher.innerloop_ctx; a "
                "script that says `import higher` needs the option --as-higher."
            )
        parts = []
        if self.loops > 1:
            parts.append(
                f"{self.loops:,} inner loops in {self.seconds:.2f} s: {self.counts['steps']:,} steps, "
                f"{self.counts['first_order_runs']:,} first-order and {self.counts['second_order_runs']:,} "
                f"second-order runs\n{self._table(self.loop, self.backward)}"
            )
        shown = {self.largest.number: "the largest", self.last.number: "the last"}
        if len(shown) == 1:
            shown = {self.last.number: "the only one" if self.loops == 1 else "the largest and the last"}
        for number, what in shown.items():
            inner = self.largest if number == self.largest.number else self.last
            parts.append(
                f"loop {number}, {what}: {inner.settings}\n{self._table(inner.loop, inner.backward, inner.begun)}"
                f"\n{inner.report!r}"
            )
        return "\n\n".join(parts)

    def _table(self, loop: Phase, backward: Phase, begun: dict[str, int] | None = None) -> str:
        rows = [("at most", "seconds", *(meter.name for meter in self.meters))]
        if begun is not None:
            rows.append(("when it began", "", *(format_bytes(begun[meter.name]) for meter in self.meters)))
        for name, phase in (("in the loop", loop), ("in the backward", backward)):
            sizes = (format_bytes(phase.peaks[meter.name]) if phase.peaks else "" for meter in self.meters)
            rows.append((name, f"{phase.seconds:.2f}", *sizes))
        return "\n".join(f"  {row[0]:<18}" + "".join(f"{cell:>16}" for cell in row[1:]) for row in rows)


def _as_code(settings: Settings) -> str:
    """The keywords that differ from the defaults.

    Example:
        >>> _as_code(Settings(checkpoints=3, journal=True)), _as_code(Settings())
        ('checkpoints=3, journal=True', 'full unroll')
    """
    words = ["full unroll"] if settings.schedule is None else []
    fields = ((field, getattr(settings, field.name)) for field in dataclasses.fields(settings))
    return ", ".join([*words, *(f"{field.name}={value!r}" for field, value in fields if value != field.default)])
