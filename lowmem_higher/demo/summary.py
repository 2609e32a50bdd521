"""What the job found: a page to read, and a JSON with every number."""

from __future__ import annotations

import json
import math
import platform
from dataclasses import asdict, dataclass
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

from lowmem_higher.demo import data
from lowmem_higher.demo.accuracy import Accuracy
from lowmem_higher.demo.comparison import Comparison
from lowmem_higher.demo.detection import Detection
from lowmem_higher.demo.metalearning import FIRST_LEARNING_RATE, FIRST_MOMENTUM, OuterStep
from lowmem_higher.demo.options import DTYPE, Options


@dataclass(frozen=True)
class Result:
    """All that the job found."""

    options: Options
    accuracy: Accuracy
    detection: Detection
    history: list[OuterStep]
    comparison: Comparison
    test_examples: int
    seconds: float


def introduction(options: Options) -> str:
    """What is about to happen."""
    return (
        f"{data.TRAIN_EXAMPLES} handwritten digits, {100 * data.CORRUPTED_SHARE:.0f} % of them with a wrong label. "
        "Which ones?\n"
        f"Outer steps: {options.outer_steps}. Each trains a net for {options.steps:,} steps and differentiates its "
        f"loss on {data.VALIDATION_EXAMPLES} clean digits\n"
        "through all of them, exactly. Instead of every step's graph it keeps the state of the training every "
        f"{options.checkpoint_every} steps.\n"
    )


def page(result: Result, picture: Path, numbers: Path) -> str:
    """The result for a reader who sees it for the first time."""
    accuracy, detection, comparison = result.accuracy, result.detection, result.comparison
    last, validation = result.history[-1], data.VALIDATION_EXAMPLES
    lines = [
        "",
        f"Accuracy on {result.test_examples} test digits (mean of 3 runs)",
        _row("before: trained on the noisy labels", _percent(accuracy.noisy)),
        _row("after:  the same, with all that was learned", _percent(accuracy.meta_learned)),
        _row(f"for comparison: noisy labels and the {validation} clean ones", _percent(accuracy.noisy_and_validation)),
        _row(f"for comparison: the {validation} clean ones alone", _percent(accuracy.validation)),
        _row("for comparison: only the right training labels", _percent(accuracy.clean)),
        "",
        "Which labels are wrong, told by their weight",
        _row("AUC (0.5 is guessing, 1 is perfect)", f"{detection.auc:.3f}"),
        _row("wrong labels whose weight fell", f"{detection.corrupted_lowered} of {detection.corrupted}"),
        _row("right labels whose weight fell", f"{detection.clean_lowered} of {detection.clean}"),
        _row("mean weight, wrong and right labels", f"{detection.corrupted_mean:.2f} and {detection.clean_mean:.2f}"),
        _row("learning rate, first and learned", f"{FIRST_LEARNING_RATE:.3g} and {last.learning_rate:.3g}"),
        _row("momentum, first and learned", f"{FIRST_MOMENTUM:.3g} and {last.momentum:.3g}"),
        "",
        *_comparison_lines(comparison, result.options),
        "",
        f"Picture  {picture}",
        f"Numbers  {numbers}",
        f"{result.seconds:.0f} seconds in all.",
    ]
    return "\n".join(lines)


def _comparison_lines(comparison: Comparison, options: Options) -> list[str]:
    unrolled, checkpointed = comparison.unrolled_report, comparison.checkpointed_report
    slower = comparison.checkpointed_seconds / comparison.unrolled_seconds
    smaller = comparison.unrolled_peak / comparison.checkpointed_peak
    lines = [
        f"One meta-gradient through {comparison.steps:,} steps",
        _columns("", "full unroll", "checkpointed"),
        _columns(
            "peak live memory", _megabytes(comparison.unrolled_peak), _megabytes(comparison.checkpointed_peak),
            f"{smaller:.1f} times less",
        ),
        _columns(
            "seconds", f"{comparison.unrolled_seconds:.2f}", f"{comparison.checkpointed_seconds:.2f}",
            f"{slower:.1f} times as long",
        ),
        _columns("first-order runs of a step", f"{unrolled['first_order_runs']:,}",
                 f"{checkpointed['first_order_runs']:,}", f"at most 2 x {comparison.steps:,}"),
        _columns("second-order runs of a step", f"{unrolled['second_order_runs']:,}",
                 f"{checkpointed['second_order_runs']:,}"),
        _row("largest relative difference of the gradients (float64)", _difference(comparison)),
    ]  # fmt: skip
    if comparison.steps < options.steps:
        lines.append(
            f"  (the full unroll was stopped at {comparison.steps:,} steps to spare memory; "
            f"checkpoints went on to {options.steps:,} with {_megabytes(comparison.checkpointed_peaks[-1])})"
        )
    return lines


def largest_difference(comparison: Comparison) -> float:
    """The worst group of meta-parameters."""
    return max(comparison.relative_difference.values())


def as_dict(result: Result, device_name: str) -> dict[str, object]:
    """Everything, for the JSON. Bytes are bytes, times are seconds."""
    options = asdict(result.options) | {"device": str(result.options.device), "out": str(result.options.out)}
    return {
        "environment": {
            "python": platform.python_version(),
            "platform": platform.platform(),
            "device": device_name,
            "dtype": str(DTYPE).removeprefix("torch."),
            "threads": 1,
            **{name: _version(name) for name in ("lowmem_higher", "torch", "scikit-learn", "numpy", "matplotlib")},
        },
        "options": options,
        "data": {
            "train": data.TRAIN_EXAMPLES,
            "validation": data.VALIDATION_EXAMPLES,
            "test": result.test_examples,
            "corrupted": result.detection.corrupted,
        },
        "accuracy": asdict(result.accuracy),
        "detection": asdict(result.detection),
        "outer_steps": [asdict(step) for step in result.history],
        "comparison": asdict(result.comparison)
        | {"largest_relative_difference": largest_difference(result.comparison)},
        "seconds": result.seconds,
    }


def save(path: Path, content: dict[str, object]) -> None:
    """Writes JSON that every reader takes: no NaN or infinity."""
    path.write_text(json.dumps(_finite(content), indent=2, allow_nan=False) + "\n", encoding="utf-8")


def _finite(value: object) -> object:
    if isinstance(value, dict):
        return {key: _finite(item) for key, item in value.items()}
    if isinstance(value, list):
        return [_finite(item) for item in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value


def _version(name: str) -> str | None:
    try:
        return version(name)
    except PackageNotFoundError:  # run from a checkout that is not installed
        return None


def _difference(comparison: Comparison) -> str:
    largest = largest_difference(comparison)
    return f"{largest:.1e}" if largest else "0 (same bits)"


def _row(label: str, value: str) -> str:
    return f"  {label:<58}{value:>14}"


def _columns(label: str, left: str, right: str, remark: str = "") -> str:
    return f"  {label:<30}{left:>14}{right:>14}{remark:>20}".rstrip()


def _percent(share: float) -> str:
    return f"{100 * share:.1f} %"


def _megabytes(count: int) -> str:
    return f"{count / 10**6:,.1f} MB"
