"""The options that all examples read in the same way."""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from typing import Any

HELP = {
    "steps": "inner steps",
    "updates": "outer steps",
    "tasks": "tasks of one outer step",
    "digits": "learn from tasks of the first so many digits, and judge by the others; 10 for the same ones",
    "batch": "images of one outer step",
    "checkpoint_every": "distance of checkpoints, 0 for the full unroll",
    "truncate": "differentiate so many of the last steps only, 0 for all",
    "seed": "of all random numbers",
}


def parse(doc: str | None, arguments: Sequence[str] | None, **defaults: int) -> argparse.Namespace:
    """Read the options that are named, `--checkpoint-every 10` and the like, all of them whole numbers.

    Args:
        doc: What `--help` shows.
        arguments: Those after the program's name; None for the command line's.
        **defaults: The options with their defaults; `seed=0` is always one.

    Returns:
        Their values, and `settings`: those that are keywords of `innerloop_ctx`. It is empty for a full unroll, so
        that `higher`, which has no such keywords, can take it as well.
    """
    parser = argparse.ArgumentParser(description=doc, formatter_class=argparse.RawDescriptionHelpFormatter)
    for name, default in {**defaults, "seed": 0}.items():
        parser.add_argument(f"--{name.replace('_', '-')}", type=int, default=default, help=f"{HELP[name]} ({default})")
    options = parser.parse_args(arguments)
    settings: dict[str, Any] = {}
    for name in ("checkpoint_every", "truncate"):
        if getattr(options, name, 0):
            settings[name] = getattr(options, name)
    options.settings = settings
    return options


def tell(update: int, options: argparse.Namespace, text: str) -> None:
    """Print how far it is, at five outer steps or so, the last one among them."""
    if (update + 1) % max(1, options.updates // 5) == 0 or update == options.updates - 1:
        print(f"outer step {update + 1} of {options.updates}: {text}")
