"""What the command line can ask of the demo. A bad value gives one line that names the option and what fits."""

from __future__ import annotations

import argparse
import math
import tempfile
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import torch

DTYPE = torch.float64
"""Everything runs in float64, so that 'the same gradient' can mean nine digits and more."""

_MOST_STEPS = 1_000_000
_MOST_OUTER_STEPS = 10_000
_MOST_SEED = 2**32 - 1


class OptionError(ValueError):
    """An option has a value with which the demo cannot run."""


@dataclass(frozen=True)
class Options:
    """The options of one run.

    Attributes:
        steps: Inner steps T, through all of which the meta-gradient is taken.
        checkpoint_every: Steps between two stored carries.
        outer_steps: How often the meta-parameters are updated.
        seed: Of the split, the wrong labels, the first weights and the minibatches.
        device: Where all tensors live.
        out: Folder for the picture and the JSON; it exists and can be written to.
    """

    steps: int
    checkpoint_every: int
    outer_steps: int
    seed: int
    device: torch.device
    out: Path


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Adds the demo's options to a parser."""
    add = parser.add_argument
    add(
        "--steps",
        type=_whole_number(1, _MOST_STEPS),
        default=500,
        metavar="T",
        help="inner training steps that the meta-gradient goes through (default: %(default)s)",
    )
    add(
        "--checkpoint-every",
        type=_whole_number(1, _MOST_STEPS),
        metavar="N",
        help="keep the state of the inner training every N steps; memory is about T/N + N states, "
        "least at the square root of T (default: that, rounded: 22 for 500 steps)",
    )
    add(
        "--outer-steps",
        type=_whole_number(1, _MOST_OUTER_STEPS),
        default=10,
        metavar="K",
        help="updates of the example weights, learning rate, momentum and initial weights (default: %(default)s)",
    )
    add(
        "--seed",
        type=_whole_number(0, _MOST_SEED),
        default=0,
        help="of the split, the wrong labels, the first weights and the minibatches (default: %(default)s)",
    )
    add("--device", default="cpu", help="where to compute, in float64: cpu, cuda, cuda:1, ... (default: %(default)s)")
    add(
        "--out",
        default="runs/demo",
        metavar="FOLDER",
        help="folder for demo.png and demo.json, made if need be; older ones are replaced (default: %(default)s)",
    )


def options_from(arguments: argparse.Namespace) -> Options:
    """Checks what the parser alone cannot, and makes the output folder.

    Raises:
        OptionError: The device cannot compute in float64 here, or the folder cannot be written to.
    """
    device = _usable_device(arguments.device)
    return Options(
        steps=arguments.steps,
        checkpoint_every=arguments.checkpoint_every or default_checkpoint_every(arguments.steps),
        outer_steps=arguments.outer_steps,
        seed=arguments.seed,
        device=device,
        out=_writable_folder(arguments.out),  # last, so that another bad option leaves no folder behind
    )


def default_checkpoint_every(steps: int) -> int:
    """The N that makes T/N + N least: the square root of T."""
    return max(1, round(math.sqrt(steps)))


def _whole_number(least: int, most: int) -> Callable[[str], int]:
    def convert(text: str) -> int:
        try:
            value = int(text)
        except ValueError:
            value = least - 1
        if not least <= value <= most:
            raise argparse.ArgumentTypeError(f"{text!r} is not a whole number from {least} to {most}")
        return value

    return convert


def _usable_device(name: str) -> torch.device:
    try:
        device = torch.device(name)
        torch.ones(1, dtype=DTYPE, device=device).item()  # meta has no values, mps no float64
    except Exception as error:  # each backend has its own way to say no: RuntimeError, AssertionError, TypeError, ...
        have = ["cpu", *(f"cuda:{index}" for index in range(torch.cuda.device_count()))]
        raise OptionError(
            f"argument --device: {name!r} cannot compute in float64 here; choose from {', '.join(have)}"
        ) from error
    return device


def _writable_folder(name: str) -> Path:
    if not name.strip():
        raise OptionError("argument --out: an empty name is no folder")
    folder = Path(name)
    try:
        folder.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=folder):
            pass
    except (OSError, ValueError) as error:
        reason = getattr(error, "strerror", None) or "not a valid name"
        raise OptionError(f"argument --out: cannot write to {name!r}: {reason}") from error
    return folder
