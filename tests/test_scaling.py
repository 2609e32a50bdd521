"""`benchmarks/scaling.py` on few steps: its laws are met, and loops written by hand give the library's gradient."""

from __future__ import annotations

import importlib
import json
from pathlib import Path
from typing import Any

import pytest

BENCHMARKS = Path(__file__).resolve().parent.parent / "benchmarks"


def run(folder: Path, *options: str) -> dict[str, Any]:
    assert importlib.import_module("scaling").main(["--quick", "--out", str(folder), *options]) == 0
    result: dict[str, Any] = json.loads((folder / "scaling.json").read_text(encoding="utf-8"))
    return result


def test_laws_are_met_and_cells_are_kept(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(str(BENCHMARKS))
    first = run(tmp_path, "--settings", "by hand", "s=10, T known")
    result = run(
        tmp_path, "--resume", "--settings", "by hand, not re-entrant", "disk, s=100", "N=sqrt(T)", "s=10, T known"
    )
    assert len(result["cells"]) == 10
    assert [cell for cell in result["cells"] if cell["setting"] in ("by hand", "s=10, T known")] == first["cells"]
    assert len(result["laws"]) == 5
    assert all(0.5 < law["found"] <= law["at most"] for law in result["laws"].values()), result["laws"]
    assert 0 < max(cell["difference"] for cell in first["cells"]) < 1e-5
    assert 0 < max(cell["difference"] for cell in result["cells"]) < 1e-5
    assert (tmp_path / "scaling.png").exists()
