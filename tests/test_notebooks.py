"""The notebooks as they are stored, and the comparison that `notebooks/run.py` makes after it has run them."""

from __future__ import annotations

import copy
import importlib.util
import json
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest

NOTEBOOKS = Path(__file__).resolve().parent.parent / "notebooks"
NAMES = [
    "01_quickstart",
    "02_exact_truncated_checkpointed",
    "03_memory_and_time",
    "04_how_it_works",
    "05_limits",
]


def load(name: str) -> dict[str, Any]:
    notebook: dict[str, Any] = json.loads((NOTEBOOKS / f"{name}.ipynb").read_text(encoding="utf-8"))
    return notebook


@pytest.fixture(scope="module")
def run() -> ModuleType:
    spec = importlib.util.spec_from_file_location("run_notebooks", NOTEBOOKS / "run.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_there_are_no_others():
    assert sorted(path.stem for path in NOTEBOOKS.glob("*.ipynb")) == NAMES


@pytest.mark.parametrize("name", NAMES)
def test_outputs_of_one_run_from_top_to_bottom_are_stored(name: str, run: ModuleType) -> None:
    notebook = load(name)
    cells = run.code_cells(notebook)
    assert [cell["execution_count"] for cell in cells] == list(range(1, len(cells) + 1))
    outputs = [output for cell in cells for output in cell["outputs"]]
    assert not [output for output in outputs if output["output_type"] == "error" or output.get("name") == "stderr"]
    assert sum(map(run.pictures_of, cells)) >= 2
    assert sum("assert " in "".join(cell["source"]) for cell in cells) >= 4
    assert "".join(notebook["cells"][0]["source"]).startswith("# ")


@pytest.mark.parametrize(
    ("stored", "found", "same"),
    [
        ("loss 0.198, rate 0.67", "loss 0.199, rate 0.68", True),
        ("loss 0.198", "loss 0.298", False),
        ("loss 0.198", "loss -0.198", False),
        ("loss 0.198", "cost 0.198", False),
        ("1,234 runs", "1,240 runs", True),
        ("1,234 runs", "2,234 runs", False),
        ("3e+27", "3.1e+27", True),
        ("3e+27", "9e+27", False),
        ("a   9.9\nb 10.0", "a  10.0\nb  10.0", True),
        ("5 terms", "5 terms 6", False),
        ("v0 = add(v1)", "v0 = add(v2)", False),
    ],
)
def test_texts_are_compared_word_by_word_and_numbers_up_to_rounding(
    stored: str, found: str, same: bool, run: ModuleType
) -> None:
    assert run.same_text(stored, found) is same


def test_what_is_out_of_date_is_found(run: ModuleType) -> None:
    stored = load("03_memory_and_time")
    assert run.differences(stored, copy.deepcopy(stored)) == []

    cells = run.code_cells(stored)
    prints = [i for i, cell in enumerate(cells) if any("text" in output for output in cell["outputs"])]
    varies = ["varies" in cells[i]["metadata"].get("tags", []) for i in prints]
    text, varying = prints[varies.index(False)], prints[varies.index(True)]
    picture = next(i for i, cell in enumerate(cells) if run.pictures_of(cell))
    found = copy.deepcopy(stored)
    of_text, of_varying, of_picture = (run.code_cells(found)[i]["outputs"] for i in (text, varying, picture))
    printed = next(output for output in of_text if "text" in output)
    printed["text"] = ["something else\n"]
    next(output for output in of_varying if "text" in output)["text"] = ["one\n", "two\n"] * 20
    of_picture[:] = [output for output in of_picture if "image/png" not in output.get("data", {})]
    of_picture.append({"output_type": "stream", "name": "stderr", "text": ["UserWarning: beware\n"]})
    problems = "\n".join(run.differences(stored, found))
    assert "something else" in problems
    assert f"code cell {varying + 1} holds" in problems
    assert f"code cell {picture + 1} holds 1 pictures and gives 0" in problems
    assert "beware" in problems
