"""Pictures from the JSON of the benchmarks.

python benchmarks/plot.py            # draw every picture of benchmarks/results/ again, without measuring
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import matplotlib

matplotlib.use("Agg")

from matplotlib import pyplot as plt
from matplotlib.axes import Axes
from matplotlib.ticker import FixedLocator, FuncFormatter, NullFormatter, NullLocator

COLORS = {
    "higher": "#c0392b",
    "full unroll": "#e08e0b",
    "ample budget": "#6b6b6b",
    "ten graphs": "#58a7e0",
    "native": "#1f6fb4",
    "native sqrt": "#14876b",
    "torch": "#7d5ba6",
}
LEGEND = {
    "ten graphs": "native, N=10, 10 graphs",
    "native": "native, N=10",
    "native sqrt": "native, N=sqrt(T)",
    "torch": "torch, N=10",
}
INK, GRID = "#222222", "#dddddd"


def _bytes(value: float, _: object = None) -> str:
    for unit in ("B", "KiB", "MiB"):
        if value < 1024:
            return f"{value:.3g} {unit}"
        value /= 1024
    return f"{value:.3g} GiB"


def _clean(axes: Axes, ticks: list[int]) -> None:
    """Only the lines that carry information, and the step counts that were run."""
    for side in ("top", "right"):
        axes.spines[side].set_visible(False)
    axes.grid(True, which="major", color=GRID, linewidth=0.7)
    axes.set_axisbelow(True)
    axes.set_xscale("log")
    axes.xaxis.set_major_locator(FixedLocator(ticks))
    axes.xaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}"))
    axes.xaxis.set_minor_locator(NullLocator())


def _byte_axis(axes: Axes) -> None:
    axes.set_yscale("log", base=2)
    low, high = axes.get_ylim()
    powers = [2.0**power for power in range(50) if low <= 2.0**power <= high]
    axes.yaxis.set_major_locator(FixedLocator(powers[:: max(1, round(len(powers) / 6))]))
    axes.yaxis.set_major_formatter(FuncFormatter(_bytes))
    axes.yaxis.set_minor_formatter(NullFormatter())
    axes.yaxis.set_minor_locator(NullLocator())


def vs_higher(result: dict[str, Any], path: Path) -> None:
    """Above: time over higher's, with the target. Below: peak live bytes. One column per net."""
    rows = result["rows"]
    nets = list(dict.fromkeys(row["net"] for row in rows))
    figure, grid = plt.subplots(2, len(nets), figsize=(4.2 * len(nets), 6.6), squeeze=False, sharex="col")
    for column, net in enumerate(nets):
        above, below = grid[0][column], grid[1][column]
        mine = [row for row in rows if row["net"] == net]
        ticks = sorted({row["steps"] for row in mine})
        for rival, color in COLORS.items():
            line = [row for row in mine if row["rival"] == rival]
            timed = [row for row in line if row["times_higher"] is not None]
            above.plot(
                [row["steps"] for row in timed],
                [row["times_higher"] for row in timed],
                color=color, marker="o", markersize=4, label=LEGEND.get(rival, rival),
            )  # fmt: skip
            known = [row for row in line if row["peak_bytes"] is not None]
            below.plot([row["steps"] for row in known], [row["peak_bytes"] for row in known], color=color)
            for computed in (False, True):
                some = [row for row in known if row["peak_is_computed"] is computed]
                below.plot(
                    [row["steps"] for row in some],
                    [row["peak_bytes"] for row in some],
                    linestyle="none", marker="o", markersize=4.5, color=color,
                    markerfacecolor="white" if computed else color,
                )  # fmt: skip
        target = next((row["target"] for row in mine if row["rival"] == "native"), None)
        if target is not None:
            above.axhline(target, color=INK, linewidth=0.9, linestyle=(0, (4, 3)), label="target for native, N=10")
        above.set_ylim(bottom=0)
        above.set_title(
            net if target is None else f"{net} (target {target:g})",
            loc="left",
            fontsize=12,
            fontweight="bold",
            color=INK,
        )
        for axes in (above, below):
            _clean(axes, ticks)
        _byte_axis(below)
        below.set_xlabel("inner steps T")
    grid[0][0].set_ylabel("time / higher's time")
    grid[1][0].set_ylabel("peak live bytes (hollow: computed)")
    figure.legend(*grid[0][0].get_legend_handles_labels(), loc="lower center", ncols=6, frameon=False)
    figure.tight_layout(rect=(0, 0.05, 1, 1))
    figure.savefig(path, dpi=140)
    plt.close(figure)


def field(result: dict[str, Any], path: Path) -> None:
    """Seconds against peak memory, a point for each rival, one panel for each net and T."""
    cells = list(dict.fromkeys((row["net"], row["steps"]) for row in result["rows"]))
    columns = min(3, len(cells))
    lines = -(-len(cells) // columns)
    height = 4.2 * lines + 1.0  # the last inch is the legend's
    figure, grid = plt.subplots(lines, columns, figsize=(5.4 * columns, height), squeeze=False)
    for axes in grid.flat[len(cells) :]:
        axes.set_visible(False)
    names = list(dict.fromkeys(row["rival"] for row in result["rows"]))
    colors = dict(zip(names, plt.get_cmap("tab20").colors, strict=False))  # type: ignore[attr-defined]
    for axes, (net, steps) in zip(grid.flat, cells, strict=False):
        for row in result["rows"]:
            if (row["net"], row["steps"]) == (net, steps) and row["median"] and row["peak_bytes"]:
                axes.plot(
                    row["peak_bytes"], row["median"], linestyle="none", marker="o", markersize=8,
                    color=colors[row["rival"]], label=row["rival"],
                )  # fmt: skip
        axes.set_xscale("log", base=2)
        axes.set_yscale("log")
        axes.xaxis.set_major_formatter(FuncFormatter(_bytes))
        axes.xaxis.set_minor_formatter(NullFormatter())
        axes.grid(color=GRID, linewidth=0.7)
        axes.set_title(f"{net}, T={steps}", loc="left", fontsize=12, fontweight="bold", color=INK)
        axes.set_xlabel("peak memory")
        axes.set_ylabel("seconds")
    handles = {
        label: handle for axes in grid.flat for handle, label in zip(*axes.get_legend_handles_labels(), strict=True)
    }
    figure.legend(handles.values(), handles.keys(), loc="lower center", ncols=5, frameon=False)
    figure.tight_layout(rect=(0, 1.0 / height, 1, 1))
    figure.savefig(path, dpi=140)
    plt.close(figure)


def memory_scaling(result: dict[str, Any], path: Path) -> None:
    """Peak memory against inner steps: what grows with every step, and what does not."""
    figure, axes = plt.subplots(figsize=(8.6, 4.8))
    largest = max(point["steps"] for point in result["points"])
    ends: dict[str, dict[str, Any]] = {}
    for rival, color in COLORS.items():
        points = [point for point in result["points"] if point["rival"] == rival]
        if not points:
            continue
        dashed = rival == "full unroll"  # it lies on higher's line: both must stay visible
        axes.plot(
            [point["steps"] for point in points],
            [point["peak_bytes"] for point in points],
            color=color, linewidth=2.4, linestyle=(0, (3, 2)) if dashed else "-", zorder=4 if dashed else 3,
        )  # fmt: skip
        for computed in (False, True):
            some = [point for point in points if point["computed"] is computed]
            axes.plot(
                [point["steps"] for point in some],
                [point["peak_bytes"] for point in some],
                linestyle="none", marker="o", markersize=6, color=color,
                markerfacecolor="white" if computed else color, zorder=4,
            )  # fmt: skip
        ends[rival] = points[-1]
    _clean(axes, sorted({point["steps"] for point in result["points"]}))
    _byte_axis(axes)
    # name and final value stand at the end of each line, pushed apart downwards where two ends are close
    names = {
        "higher": "higher",
        "full unroll": "checkpoint_every=None",
        "native": "checkpoint_every=10",
        "native sqrt": "checkpoint_every=sqrt(T)",
        "torch": 'checkpoint_every=10, replay="torch"',
    }
    placed: list[float] = []
    for rival in sorted(ends, key=lambda name: -float(ends[name]["peak_bytes"])):
        point = ends[rival]
        pixel = float(axes.transData.transform((largest, point["peak_bytes"]))[1])
        pixel = min([pixel, *[other - 26 for other in placed]])
        placed.append(pixel)
        height = float(axes.transData.inverted().transform((0, pixel))[1])
        axes.annotate(
            f"{names[rival]}: {'~' if point['computed'] else ''}{_bytes(point['peak_bytes'])}",
            (largest, height), xytext=(10, 0), textcoords="offset points",
            va="center", color=COLORS[rival], fontsize=10, fontweight="bold", annotation_clip=False,
        )  # fmt: skip
    axes.set_xlabel("inner steps T")
    axes.set_ylabel("peak memory of loop and backward (live bytes)")
    low = ends["native sqrt"]
    ratio = ends["higher"]["peak_bytes"] / low["peak_bytes"]
    axes.set_title(
        f"The same meta-gradient over {largest} inner steps in {ratio:.0f}x less memory than higher",
        loc="left", fontsize=12, fontweight="bold", color=INK, pad=14,
    )  # fmt: skip
    figure.tight_layout()
    figure.savefig(path, dpi=150, bbox_inches="tight")
    plt.close(figure)


SCALING = {
    "higher": "#c0392b",
    "by hand, not re-entrant": "#8a8a8a",
    "by hand": "#444444",
    "N=10": "#1f6fb4",
    "N=sqrt(T)": "#14876b",
    "s=10": "#7d5ba6",
    "s=30": "#a64d79",
    "s=100": "#e08e0b",
    "disk, s=100": "#6aa84f",
    "journal, N=sqrt(T)": "#00a0b0",
}
SCALING_LEGEND = {
    "by hand": "torch.utils.checkpoint by hand",
    "by hand, not re-entrant": "the same, use_reentrant=False",
    "N=10": "checkpoint_every=10",
    "N=sqrt(T)": "checkpoint_every=sqrt(T)",
    "s=10": "checkpoints=10",
    "s=30": "checkpoints=30",
    "s=100": "checkpoints=100",
    "disk, s=100": "checkpoints=100 on disk",
    "journal, N=sqrt(T)": "the same, journal=True",
}


def scaling(result: dict[str, Any], path: Path) -> None:
    """Peak bytes and passes per step against inner steps, a line for each setting whose T is not told."""
    figure, (left, right) = plt.subplots(1, 2, figsize=(12, 5))
    cells = result["cells"]
    for setting, color in SCALING.items():
        mine = [cell for cell in cells if cell["setting"] == setting]
        if not mine:
            continue
        label = SCALING_LEGEND.get(setting, setting)
        left.plot([cell["steps"] for cell in mine], [cell["peak_bytes"] for cell in mine], color=color, label=label)
        for computed in (False, True):
            some = [cell for cell in mine if cell["computed"] is computed]
            left.plot(
                [cell["steps"] for cell in some],
                [cell["peak_bytes"] for cell in some],
                linestyle="none", marker="o", markersize=5, color=color, markerfacecolor="white" if computed else color,
            )  # fmt: skip
        done = [cell for cell in mine if not cell["computed"]]
        counts = [
            cell["first_order_runs"] + cell["second_order_runs"] if cell["first_order_runs"] else cell["model_calls"]
            for cell in done
        ]
        right.plot(
            [cell["steps"] for cell in done],
            [count / cell["steps"] for count, cell in zip(counts, done, strict=True)],
            color=color, marker="o", markersize=5,
        )  # fmt: skip
    for axes in (left, right):
        _clean(axes, sorted({cell["steps"] for cell in cells}))
        axes.set_xlabel("inner steps T")
    _byte_axis(left)
    left.set_ylabel("peak live bytes (hollow: computed)")
    right.set_ylim(bottom=0)
    right.set_ylabel("passes per inner step, the loop's included")
    figure.legend(*left.get_legend_handles_labels(), loc="lower center", ncols=4, frameon=False)
    figure.tight_layout(rect=(0, 0.13, 1, 1))
    figure.savefig(path, dpi=140)
    plt.close(figure)


def profile_memory(result: dict[str, Any], path: Path) -> None:
    """A pair of dots for each setting: the peak in the loop and in the backward."""
    rows = [row for row in result["rows"] if row["peak"] is not None]
    figure, axes = plt.subplots(figsize=(8.6, 0.45 * len(rows) + 1.6))
    for offset, phase, color in ((-0.16, "loop", "#1f6fb4"), (0.16, "backward", "#e08e0b")):
        places = [place + offset for place in range(len(rows))]
        peaks = [row["peak"][phase] for row in rows]
        axes.plot(peaks, places, linestyle="none", marker="o", markersize=6, color=color, label=phase)
        for peak, place in zip(peaks, places, strict=True):
            axes.annotate(
                _bytes(peak),
                (peak, place),
                xytext=(7, 0),
                textcoords="offset points",
                va="center",
                fontsize=8,
                color=INK,
            )
    axes.set_yticks(range(len(rows)), [row["setting"] for row in rows])
    axes.invert_yaxis()
    axes.set_xscale("log", base=2)
    axes.xaxis.set_major_formatter(FuncFormatter(_bytes))
    axes.margins(x=0.12)
    axes.grid(True, color=GRID, linewidth=0.7)
    axes.set_axisbelow(True)
    for side in ("top", "right"):
        axes.spines[side].set_visible(False)
    axes.set_xlabel(f"peak, {result['meter']}")
    axes.legend(frameon=False, loc="lower right")
    figure.tight_layout()
    figure.savefig(path, dpi=140)
    plt.close(figure)


def mixed(result: dict[str, Any], path: Path) -> None:
    """Left: the peak of one step. Right: its time over reverse mode's, with the target. A group of bars per net."""
    rows = result["rows"]
    rivals = list(dict.fromkeys(row["rival"] for row in rows))
    nets = list(dict.fromkeys((row["depth"], row["optimizer"]) for row in rows))
    figure, (left, right) = plt.subplots(1, 2, figsize=(10, 4.2))
    colors = dict(zip(rivals, ("#c0392b", "#e08e0b", "#1f6fb4", "#14876b", "#7d5ba6"), strict=False))
    width = 0.8 / len(rivals)
    for axes, key in ((left, "peak_bytes"), (right, "time_ratio")):
        for position, rival in enumerate(rivals):
            mine = {(row["depth"], row["optimizer"]): row for row in rows if row["rival"] == rival}
            offset = (position - (len(rivals) - 1) / 2) * width
            places = [index + offset for index, net in enumerate(nets) if net in mine]
            unit = 2**20 if key == "peak_bytes" else 1
            heights = [row[key] / unit for row in mine.values()]
            bars = axes.bar(places, heights, width, color=colors[rival], label=rival)
            if key == "peak_bytes" and position:
                labels = [f"1/{row['memory_ratio']:.1f}" for row in mine.values()]
                axes.bar_label(bars, labels, fontsize=7, color=INK)
        for side in ("top", "right"):
            axes.spines[side].set_visible(False)
        axes.grid(True, axis="y", color=GRID, linewidth=0.7)
        axes.set_axisbelow(True)
        axes.set_xticks(range(len(nets)), [f"{depth} blocks\n{optimizer}" for depth, optimizer in nets])
    left.set_ylabel("peak of one step (MiB, live bytes)")
    right.axhline(1.6, color=INK, linewidth=0.9, linestyle=(0, (4, 3)))
    right.set_ylabel("time / reverse mode's (dashed: target)")
    figure.legend(*left.get_legend_handles_labels(), loc="lower center", ncols=len(rivals), frameon=False)
    figure.tight_layout(rect=(0, 0.07, 1, 1))
    figure.savefig(path, dpi=140)
    plt.close(figure)


def main() -> None:
    """Draw again what was measured."""
    results = Path(__file__).resolve().parent / "results"
    for path in sorted(results.glob("*.json")):
        result = json.loads(path.read_text())
        drawn = (vs_higher, memory_scaling, scaling, profile_memory, mixed)
        function = {function.__name__: function for function in drawn}.get(result["benchmark"])
        if function is not None:
            function(result, path.with_suffix(".png"))
            print(f"drew results/{path.stem}.png")


if __name__ == "__main__":
    main()
