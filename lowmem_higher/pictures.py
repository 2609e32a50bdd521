"""Pictures of plans and reports. matplotlib is imported when one is drawn, and its global state is not touched."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from matplotlib.figure import Figure

_BLUE, _ORANGE, _GREY = "#0072b2", "#d55e00", "#666666"  # told apart also by colour-blind readers


def draw_plan(
    path: Path, points: Sequence[tuple[str, int, float]], budget: int | None, best: str | None, steps: int
) -> None:
    """Seconds against peak bytes, for points `(label, peak, seconds)`; the best one and the budget are marked."""
    figure = _new_figure()
    axes = figure.subplots()
    scale, unit = _unit(max(peak for _, peak, _ in points))
    for label, peak, seconds in points:
        axes.plot(peak / scale, seconds, "o", label=label)
        if label == best:
            axes.plot(peak / scale, seconds, "o", color=_GREY, fillstyle="none", markersize=12, label="recommended")
    if budget is not None and budget / scale < 10 * axes.get_xlim()[1]:
        axes.axvline(budget / scale, color=_GREY, linestyle=":", label="budget")
    axes.set_xscale("log")
    axes.set_ylim(bottom=0)
    axes.set_title(f"{steps:,} inner steps")
    figure.legend(frameon=False, loc="outside right upper", fontsize=8)
    _finish(figure, axes, path, f"peak memory ({unit})", "seconds")


def draw_timeline(path: Path, timeline: Sequence[tuple[str, int, int]]) -> None:
    """Bytes that are held, against the steps of the loop and then of the backward."""
    figure = _new_figure()
    axes = figure.subplots()
    scale, unit = _unit(max((size for _, _, size in timeline), default=0))
    for phase, color in (("forward", _BLUE), ("backward", _ORANGE)):
        chosen = [(at, size / scale) for at, (name, _, size) in enumerate(timeline) if name == phase]
        if chosen:
            axes.plot(*zip(*chosen, strict=True), ".-", color=color, label=phase, markersize=3)
    marks = [round(part * (len(timeline) - 1) / 8) for part in range(9)] if len(timeline) > 9 else range(len(timeline))
    axes.set_xticks(list(marks), [f"{timeline[at][1]:,}" for at in marks])
    if timeline:
        axes.legend(frameon=False)
    axes.set_ylim(bottom=0)
    _finish(figure, axes, path, "step", f"carries and externals held ({unit})")


def draw_profile(
    path: Path, names: Sequence[str], samples: Sequence[tuple[float, Sequence[int]]], spans: Sequence[Sequence[float]]
) -> None:
    """Bytes against seconds, one panel for each of `names`; `spans` are a loop's beginning, last step and end."""
    figure = _new_figure()
    panels = figure.subplots(len(names), sharex=True, squeeze=False)[:, 0]
    for at, (name, axes) in enumerate(zip(names, panels, strict=True)):
        scale, unit = _unit(max((sizes[at] for _, sizes in samples), default=0))
        axes.plot([seconds for seconds, _ in samples], [sizes[at] / scale for _, sizes in samples], color=_GREY)
        for number, (begin, last, end) in enumerate(spans):
            axes.axvspan(begin, last, color=_BLUE, alpha=0.2, linewidth=0, label=None if number else "loop")
            axes.axvspan(last, end, color=_ORANGE, alpha=0.2, linewidth=0, label=None if number else "backward")
        axes.set_ylim(bottom=0)
        _dress(axes, "seconds" if axes is panels[-1] else "", f"{name} ({unit})")
    if spans and names:
        figure.legend(*panels[0].get_legend_handles_labels(), frameon=False, loc="outside upper right", ncols=2)
    figure.savefig(path)


def _new_figure() -> Figure:
    try:
        from matplotlib.figure import Figure
    except ImportError as error:
        raise ImportError(
            'plot() draws with matplotlib, which is not installed: pip install "lowmem_higher[plot]"'
        ) from error
    return Figure(figsize=(7, 4.4), dpi=130, layout="constrained")


def _finish(figure: Figure, axes: Any, path: Path, x: str, y: str) -> None:
    _dress(axes, x, y)
    figure.savefig(path)


def _dress(axes: Any, x: str, y: str) -> None:
    axes.set_xlabel(x)
    axes.set_ylabel(y)
    axes.grid(alpha=0.25)
    axes.spines[["top", "right"]].set_visible(False)


def _unit(size: float) -> tuple[float, str]:
    for exponent, name in ((3, "GiB"), (2, "MiB"), (1, "KiB")):
        if size >= 1024**exponent:
            return 1024**exponent, name
    return 1, "bytes"
