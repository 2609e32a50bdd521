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
"""About the most bytes that the full unroll is given. It is measured with fewer steps where all would take more."""

_SHARES_OF_STEPS = (0.1, 0.25, 0.5, 0.75, 1.0)
_PROBE_STEPS = 20
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
        gradient_norm: By group of meta-parameters, of the unroll's gradient.
        relative_difference: By group of meta-parameters: norm of the difference over `gradient_norm`.
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
    gradient_norm: dict[str, float]
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
    probe = min(options.steps, _PROBE_STEPS)
    room = max(1, min(options.steps, UNROLL_LIMIT * probe // peak(probe, None)))
    checkpointed_points = sorted({*points, room})
    unrolled_points = [steps for steps in checkpointed_points if steps <= room]
    with progress.phase("measuring memory", sum(unrolled_points) + CHECKPOINTED_PASSES * sum(checkpointed_points)):
        unrolled_peaks = [peak(steps, None) for steps in unrolled_points]
        checkpointed_peaks = [peak(steps, every) for steps in checkpointed_points]
    with progress.phase("measuring time", _REPEATS * room * (1 + CHECKPOINTED_PASSES)):
        pairs = [(run(room, every), run(room, None)) for _ in range(_REPEATS)]
    checkpointed, unrolled = pairs[-1]
    return Comparison(
        memory_steps=checkpointed_points,
        checkpointed_peaks=checkpointed_peaks,
        unrolled_peaks=unrolled_peaks,
        steps=room,
        checkpointed_peak=checkpointed_peaks[checkpointed_points.index(room)],
        unrolled_peak=unrolled_peaks[-1],
        checkpointed_seconds=statistics.median(pair[0].seconds for pair in pairs),
        unrolled_seconds=statistics.median(pair[1].seconds for pair in pairs),
        gradient_norm={name: _norm(tensors) for name, tensors in unrolled.gradients.items()},
        relative_difference={
            name: _relative_difference(checkpointed.gradients[name], tensors)
            for name, tensors in unrolled.gradients.items()
        },
        checkpointed_report=checkpointed.report,
        unrolled_report=unrolled.report,
    )


def _relative_difference(have: list[torch.Tensor], want: list[torch.Tensor]) -> float:
    """|have - want| / |want| over all the tensors."""
    difference = _norm([a - b for a, b in zip(have, want, strict=True)])
    if difference == 0:
        return 0.0
    norm = _norm(want)
    return difference / norm if norm > 0 else float("inf")


def _norm(tensors: list[torch.Tensor]) -> float:
    return float(torch.cat([tensor.flatten() for tensor in tensors]).norm())
