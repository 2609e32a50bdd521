"""The figure: memory against steps, and the learned weights of wrong and right labels."""

from __future__ import annotations

from pathlib import Path

import torch
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from lowmem_higher.demo.comparison import Comparison
from lowmem_higher.demo.detection import Detection
from lowmem_higher.demo.metalearning import FIRST_WEIGHT

_BLUE, _ORANGE, _GREY = "#0072b2", "#d55e00", "#666666"  # told apart also by colour-blind readers
_MEGABYTE = 10**6


def draw(
    path: Path,
    comparison: Comparison,
    weights: torch.Tensor,
    corrupted: torch.Tensor,
    detection: Detection,
    checkpoint_every: int,
) -> None:
    """Saves the picture as PNG, without touching matplotlib's global state."""
    figure = Figure(figsize=(11, 4.4), dpi=130, layout="constrained")
    memory, histogram = figure.subplots(1, 2)
    _draw_memory(memory, comparison, checkpoint_every)
    _draw_weights(histogram, weights.detach().cpu(), corrupted.cpu(), detection)
    for axes in (memory, histogram):
        axes.spines[["top", "right"]].set_visible(False)
    figure.savefig(path)


def _draw_memory(axes: Axes, comparison: Comparison, checkpoint_every: int) -> None:
    unrolled = [peak / _MEGABYTE for peak in comparison.unrolled_peaks]
    checkpointed = [peak / _MEGABYTE for peak in comparison.checkpointed_peaks]
    steps = comparison.memory_steps
    axes.plot(steps[: len(unrolled)], unrolled, "o-", color=_ORANGE, label="full unroll")
    axes.plot(steps, checkpointed, "s-", color=_BLUE, label=f"checkpoint_every={checkpoint_every}")
    ends = [(steps[len(unrolled) - 1], unrolled[-1], _ORANGE), (steps[-1], checkpointed[-1], _BLUE)]
    if comparison.steps < steps[-1]:
        ahead = unrolled[-1] / comparison.steps * steps[-1]
        axes.plot([comparison.steps, steps[-1]], [unrolled[-1], ahead], "--", color=_ORANGE, label="extrapolated")
    for x, y, color in ends:
        axes.annotate(
            f"{y:,.1f} MB", (x, y), xytext=(-8, 6), textcoords="offset points", ha="right", color=color, fontsize=10
        )
    times = comparison.unrolled_peak / comparison.checkpointed_peak
    axes.set_title(f"The same gradient in {times:.0f} times less memory ({comparison.steps:,} steps)", fontsize=11)
    axes.set_xlabel("inner steps")
    axes.set_ylabel("peak live memory (MB)")
    axes.set_xlim(left=0)
    axes.set_ylim(0, 1.12 * axes.get_ylim()[1])
    axes.grid(alpha=0.25)
    axes.legend(frameon=False, loc="upper left")


def _draw_weights(axes: Axes, weights: torch.Tensor, corrupted: torch.Tensor, detection: Detection) -> None:
    top = max(2 * FIRST_WEIGHT, weights.max().item())
    edges = torch.linspace(0.0, top, 41).tolist()
    for group, color, label in (
        (weights[~corrupted], _BLUE, f"{detection.clean} right labels"),
        (weights[corrupted], _ORANGE, f"{detection.corrupted} wrong labels"),
    ):
        axes.hist(group.tolist(), bins=edges, histtype="stepfilled", alpha=0.55, color=color, label=label)
    axes.axvline(FIRST_WEIGHT, color=_GREY, linestyle=":", linewidth=1.2)
    axes.annotate(
        "all begin here", (FIRST_WEIGHT, 0.96), xycoords=("data", "axes fraction"), xytext=(-5, 0),
        textcoords="offset points", ha="right", va="top", color=_GREY, fontsize=9,
    )  # fmt: skip
    axes.set_title(f"Learned example weights find the wrong labels (AUC {detection.auc:.3f})", fontsize=11)
    axes.set_xlabel("weight of the training example")
    axes.set_ylabel("examples")
    axes.set_xlim(0, top)
    axes.legend(frameon=False, loc="upper right")
