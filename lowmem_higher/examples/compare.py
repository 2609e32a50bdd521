"""An example on this package and on `higher`, from the same seed: peak memory, seconds, and what it printed last.

    python -m lowmem_higher.examples.compare reweight --updates 1

What follows the name goes to the example; one outer step tells the peak. On `higher`, and here a second time, the loop
is a full unroll. `pip install higher` first. Bytes are those of all tensors alive; to count them slows the runs down.
"""

from __future__ import annotations

import argparse
import importlib
import io
import time
from collections.abc import Sequence
from contextlib import redirect_stdout
from unittest.mock import patch

import lowmem_higher
from lowmem_higher.report import format_bytes
from lowmem_higher.testing import live_bytes

EXAMPLES = ("distill", "energy", "few_shot", "learned_loss", "learned_optimizer", "rates", "reweight")


def main(arguments: Sequence[str] | None = None) -> dict[str, tuple[int, str]]:
    """Run and print; returns for each run the peak in bytes and what the example printed."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("example", choices=EXAMPLES)
    options, rest = parser.parse_known_args(arguments)
    example = importlib.import_module(f"lowmem_higher.examples.{options.example}")
    unrolled = [] if options.example == "energy" else ["--checkpoint-every", "0"]
    runs = {
        "lowmem_higher": (lowmem_higher, []),
        "lowmem_higher, full unroll": (lowmem_higher, unrolled),
        "higher": (importlib.import_module("higher"), unrolled),
    }
    found = {}
    for name, (library, more) in runs.items():
        started, printed = time.perf_counter(), io.StringIO()
        with patch.object(example, "higher", library), live_bytes() as memory, redirect_stdout(printed):
            example.main([*rest, *more])
        found[name] = (memory.peak, printed.getvalue())
        last = printed.getvalue().strip().splitlines()[-1]
        print(f"{name}: peak {format_bytes(memory.peak)}, {time.perf_counter() - started:.1f} s; {last}")
    return found


if __name__ == "__main__":
    main()
