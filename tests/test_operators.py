"""Every operator of torch that can be differentiated twice: a replayed step gives the full unroll's gradient.

One sample of each here; all samples and forms in `benchmarks/operators.py`, which both use. It runs in a process of its
own, since torch's database of operators switches off, for good, some of the flags that other tests set.
"""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

ROOT = Path(__file__).resolve().parent.parent

# torch itself has no second derivative for these, or no kernel in a build for CPUs.
BEYOND_TORCH = {
    "_segment_reduce.lengths",
    "_segment_reduce.offsets",
    "nn.functional.ctc_loss",
    "nn.functional.embedding_bag",
    "nn.functional.multi_margin_loss",
    "nn.functional.multilabel_margin_loss",
    "sparse.mm.reduce",
    "sparse.sampled_addmm",
}


@pytest.mark.slow
def test_every_operator_is_exact() -> None:
    """Over five hundred operators, few of which are piecewise linear or constant at each of the samples tried."""
    done = subprocess.run(
        [sys.executable, str(ROOT / "benchmarks" / "operators.py"), "--quick"],
        capture_output=True,
        text=True,
        check=False,
        cwd=ROOT,
    )
    assert done.returncode == 0, done.stderr
    result: dict[str, Any] = json.loads(done.stdout)
    assert result["wrong"] == {}
    assert result["refused"] == {}
    assert set(result["beyond_torch"]) <= BEYOND_TORCH
    assert result["operators"] > 500
    assert result["exact"] == result["operators"] - len(result["beyond_torch"])
    assert result["with_second_derivative"] > 0.9 * result["operators"]
