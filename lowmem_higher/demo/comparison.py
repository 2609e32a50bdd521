"""Checkpointed against fully unrolled, on the demo's own inner loop: live memory, seconds, and the gradient itself."""

from __future__ import annotations

import statistics
from dataclasses import dataclass

import torch

from lowmem_higher.demo.data import Digits
from lowmem_higher.demo.metalearning import MetaGradient, MetaParameters, draw_seed, meta_gradient
from lowmem_higher.demo.options import Options
from lowmem_higher.demo.progress import CHECKPOINTED_PASSES, Progress
from lowmem_higher.testing import live_bytes

UNROLL_LIMIT = 2 * 10**9
"""The full unroll is measured up to the number of steps that fits in these bytes: a long demo must be safe to run."""

_SHARES_OF_STEPS = (0.1, 0.25, 0.5, 0.75, 1.0)
_REPEATS = 3
_DRAW = 30_000


@dataclass(frozen=True)
class Comparison:
    """Both ways to the same gradient, at the learned meta-parameters.

    Attributes:
        memory_steps: Numbers of inner steps at which memory was measured; the last is `--steps`.
        checkpointed_peaks: Peak live bytes of each, with checkpoints.
        unrolled_peaks: Peak live bytes of each, fully unrolled; shorter where the full unroll would not fit.
        steps: Inner steps for all that follows: `--steps`, or as many as the full unroll has room for.
        checkpointed_peak: Peak live bytes at `steps`, with checkpoints.
        unrolled_peak: The same, fully unrolled.
        checkpointed_seconds: Median of three runs, forward and backward, in turns with the other.
        unrolled_seconds: The same, fully unrolled.
        relative_difference: By group of meta-parameters: norm of the difference over norm of the unroll's gradient.
        checkpointed_report: `diffopt.report` of the run with checkpoints.
        unrolled_report: The same, fully unrolled.
    """

    memory_steps: list[int]
    checkpointed_peaks: list[int]
    unrolled_peaks: list[int]
    steps: int
    checkpointed_peak: int
    unrolled_peak: int
    checkpointed_seconds: float
    unrolled_seconds: float
    relative_difference: dict[str, float]
    checkpointed_report: dict[str, object]
    unrolled_report: dict[str, object]


def compare(digits: Digits, meta: MetaParameters, options: Options, progress: Progress) -> Comparison:
    """Takes the same meta-gradient both ways, for several numbers of steps under `live_bytes` and then against time."""

    def run(steps: int, checkpoint_every: int | None) -> MetaGradient:
        before = progress.passes
        outcome = meta_gradient(
            digits, meta, steps=steps, checkpoint_every=checkpoint_every, draw=draw_seed(options.seed, _DRAW)
        )
        progress.reach(before + steps * (1 if checkpoint_every is None else CHECKPOINTED_PASSES))
        return outcome

    def peak(steps: int, checkpoint_every: int | None) -> int:
        with live_bytes() as memory:
            run(steps, checkpoint_every)
        highest: int = memory.peak
        return highest

    every = options.checkpoint_every
    points = sorted({max(1, round(share * options.steps)) for share in _SHARES_OF_STEPS})
    checkpointed_peaks: list[int] = []
    unrolled_peaks: list[int] = []
    room = options.steps
    with progress.phase("measuring memory", sum(points) * (1 + CHECKPOINTED_PASSES)):
        for steps in points:
            checkpointed_peaks.append(peak(steps, every))
            if steps <= room:
                unrolled_peaks.append(peak(steps, None))
                room = min(options.steps, max(steps, UNROLL_LIMIT * steps // unrolled_peaks[-1]))
    if room == options.steps:
        checkpointed_peak, unrolled_peak = checkpointed_peaks[-1], unrolled_peaks[-1]
    else:
        checkpointed_peak, unrolled_peak = peak(room, every), peak(room, None)

    with progress.phase("measuring time", _REPEATS * room * (1 + CHECKPOINTED_PASSES)):
        pairs = [(run(room, every), run(room, None)) for _ in range(_REPEATS)]
    checkpointed, unrolled = pairs[-1]
    return Comparison(
        memory_steps=points,
        checkpointed_peaks=checkpointed_peaks,
        unrolled_peaks=unrolled_peaks,
        steps=room,
        checkpointed_peak=checkpointed_peak,
        unrolled_peak=unrolled_peak,
        checkpointed_seconds=statistics.median(pair[0].seconds for pair in pairs),
        unrolled_seconds=statistics.median(pair[1].seconds for pair in pairs),
        relative_difference={
            name: _relative_difference(checkpointed.gradients[name], tensors)
            for name, tensors in unrolled.gradients.items()
        },
        checkpointed_report=checkpointed.report,
        unrolled_report=unrolled.report,
    )


def _relative_difference(have: list[torch.Tensor], want: list[torch.Tensor]) -> float:
    """|have - want| / |want| over all the tensors; infinite where `want` is zero, which would prove nothing."""
    difference = sum((a - b).pow(2).sum().item() for a, b in zip(have, want, strict=True)) ** 0.5
    norm = sum(b.pow(2).sum().item() for b in want) ** 0.5
    return float(difference / norm) if norm > 0 else float("inf")
