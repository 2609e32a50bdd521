"""What a run cost, in passes, bytes and seconds."""

from __future__ import annotations

import dataclasses
import itertools
import math
import operator
from collections.abc import Sequence
from pathlib import Path
from typing import Any

Sample = tuple[str, int, int]  # phase, step, bytes


@dataclasses.dataclass(frozen=True)
class Report:
    """What a context has cost so far; `diffopt.report` gives a new one at each reading.

    Attributes:
        steps: Steps taken.
        first_order_runs: Times a step's forward and backward ran without a graph of the backward; the user's own loop
            counts too. At most `2 * steps` after one outer backward with `replay="native"`.
        second_order_runs: Times a step ran with the graph that is differentiated. `steps` after one outer backward.
            The full unroll runs every step this way, in the loop.
        checkpoints_held: Carries kept now at the starts of segments.
        checkpoints_peak: The most that were kept at once.
        carry_bytes: Bytes of one carry (fast weights, optimizer state, buffers): the largest so far.
        carries_peak_bytes: The most that carries took at once on the device, those of the segment being replayed
            included.
        externals_bytes: Bytes of the distinct storages that recorded steps and outer terms hold on the device now; a
            resident dataset that steps index counts in full, once. What is in the store does not count.
        forward_seconds: From entering the context to the end of the last step.
        backward_seconds: Spent in replays and pullbacks.
        update_runs: Carries got by the update rule alone, from a step's journal.
        journal_bytes: Bytes of the journals on the device: inner gradients, and buffers.
        stored_bytes: Bytes in host memory or on disk now, by `store`: kept carries, externals, journals.
        stored_peak_bytes: The most that were there at once.
        unrolled_steps: Steps whose graphs were kept, by `memory_budget` or in a full unroll.
        compile_seconds: Spent tracing and compiling, by `compile`; part of `backward_seconds`, or of the loop's.
        timeline: What was held when, as `(phase, step, bytes)`: carries alive and externals, after each step of the
            loop ("forward") and while it is differentiated ("backward"). At most 1,000 samples: of a longer run each
            is the largest of a stretch. Empty for the full unroll.

    Example:
        >>> import torch, lowmem_higher as higher
        >>> net = torch.nn.Linear(2, 1)
        >>> opt = torch.optim.SGD(net.parameters(), lr=0.1)
        >>> with higher.innerloop_ctx(net, opt, copy_initial_weights=False, checkpoint_every=4) as (fnet, diffopt):
        ...     for _ in range(10):
        ...         _ = diffopt.step(fnet(torch.ones(3, 2)).square().mean())
        ...     fnet(torch.ones(1, 2)).sum().backward()
        >>> report = diffopt.report
        >>> report.steps, report.first_order_runs, report.second_order_runs, report.checkpoints_peak
        (10, 17, 10, 3)
        >>> report.timeline[0], report.timeline[-1]  # 12 bytes of weights and a batch of 24
        (('forward', 0, 36), ('backward', 0, 36))
    """

    steps: int = 0
    first_order_runs: int = 0
    second_order_runs: int = 0
    checkpoints_held: int = 0
    checkpoints_peak: int = 0
    carry_bytes: int = 0
    carries_peak_bytes: int = 0
    externals_bytes: int = 0
    forward_seconds: float = 0.0
    backward_seconds: float = 0.0
    update_runs: int = 0
    journal_bytes: int = 0
    stored_bytes: int = 0
    stored_peak_bytes: int = 0
    unrolled_steps: int = 0
    compile_seconds: float = 0.0
    timeline: Sequence[Sample] = ()

    def __post_init__(self) -> None:
        if isinstance(self.timeline, list):  # out of JSON
            object.__setattr__(self, "timeline", tuple(map(tuple, self.timeline)))

    def as_dict(self) -> dict[str, Any]:
        """The report as a plain dictionary, for JSON.

        Example:
            >>> Report(steps=3).as_dict()["steps"]
            3
        """
        return {**dataclasses.asdict(self), "timeline": [list(sample) for sample in self.timeline]}

    def plot(self, path: str | Path) -> None:
        """Save a picture of the timeline: bytes held, against the steps of the loop and of the backward.

        Args:
            path: Where to; the ending says the format, for example `run.png` or `run.svg`.

        Raises:
            ImportError: matplotlib is not installed; it comes with `lowmem_higher[plot]`.
            ValueError: There is no timeline: the full unroll has none.
        """
        if not self.timeline:
            raise ValueError(
                "This report has no timeline to draw: no step was taken yet, or the context is a full unroll, whose "
                "graphs nobody counts. Use innerloop_ctx(..., checkpoint_every=10)."
            )
        from lowmem_higher.pictures import draw_timeline

        draw_timeline(Path(path), self.timeline)

    def __repr__(self) -> str:
        journal = f"\n  journal: {format_bytes(self.journal_bytes)}; {self.update_runs} update runs"
        stored = f"\n  stored: {format_bytes(self.stored_bytes)}, {format_bytes(self.stored_peak_bytes)} at most"
        unrolled = f", {self.unrolled_steps} of them unrolled" if 0 < self.unrolled_steps < self.steps else ""
        return (
            f"Report: {self.steps} steps{unrolled}; {self.first_order_runs} first-order and {self.second_order_runs} "
            f"second-order runs\n  checkpoints: {self.checkpoints_held} held, {self.checkpoints_peak} at most, "
            f"{format_bytes(self.carry_bytes)} each; carries took {format_bytes(self.carries_peak_bytes)} at most\n"
            f"  externals: {format_bytes(self.externals_bytes)}\n"
            f"  seconds: {self.forward_seconds:.3f} in the loop, {self.backward_seconds:.3f} in replays and pullbacks"
            f"{journal if self.update_runs or self.journal_bytes else ''}{stored if self.stored_peak_bytes else ''}"
        )


_SAMPLES = 1000


class Timeline:
    """Collects samples; when there are too many, two neighbours become one, the larger.

    Example:
        >>> timeline = Timeline()
        >>> for step in range(3000):
        ...     timeline.add("forward", step, step % 7)
        >>> timeline.samples()[:2], len(timeline.samples())
        ((('forward', 3, 3), ('forward', 6, 6)), 750)
    """

    def __init__(self) -> None:
        self._samples: list[Sample] = []
        self._stretch = 1  # samples that become one
        self._taken = 0  # of the last stretch

    def add(self, phase: str, step: int, size: int) -> None:
        """Add one sample."""
        samples = self._samples
        if 0 < self._taken < self._stretch and samples[-1][0] == phase:
            self._taken += 1
            if size > samples[-1][2]:
                samples[-1] = (phase, step, size)
            return
        self._taken = 1
        samples.append((phase, step, size))
        if len(samples) > _SAMPLES:
            self._thin()

    def samples(self) -> tuple[Sample, ...]:
        """What was collected, in order."""
        return tuple(self._samples)

    def _thin(self) -> None:
        last = self._samples.pop()
        found: list[Sample] = []
        for _, group in itertools.groupby(self._samples, key=operator.itemgetter(0)):
            same = list(group)
            found += [max(same[at : at + 2], key=operator.itemgetter(2)) for at in range(0, len(same), 2)]
        self._samples = [*found, last]
        self._stretch *= 2


def format_bytes(count: float) -> str:
    """A number of bytes as a person reads it.

    Example:
        >>> format_bytes(1536)
        '1.5 KiB'
    """
    if count < 1024:
        return f"{count:.0f} B"
    exponent = min(int(math.log(count, 1024)), 3)
    return f"{count / 1024**exponent:.1f} {('KiB', 'MiB', 'GiB')[exponent - 1]}"
