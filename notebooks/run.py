"""Run the notebooks, each in a kernel of its own, and compare what they give with the outputs that they hold.

    python notebooks/run.py            fails on an exception, on a warning and on a stored output that is out of date
    python notebooks/run.py --write    stores what they give instead
    python notebooks/run.py 02 05      these only

A text has to be the stored one, but for its numbers, which may differ by 2 % or by one in the last place shown: sums
come out in another order on other machines. Cells that print numbers of a clock, or of a chaotic loop, have the tag
"varies": there only the lines are counted. Of a picture it is asked that there is one where one is stored.

Needs `pip install -c .ci/constraints.txt -e ".[notebooks]"`.
"""

from __future__ import annotations

import argparse
import json
import math
import os
import re
import sys
import tempfile
import time
from collections.abc import Sequence
from itertools import zip_longest
from pathlib import Path
from typing import Any

HERE = Path(__file__).resolve().parent
VARIES = "varies"
_NUMBER = re.compile(r"(?<![\w.])[-+]?\d[\d,]*(?:\.\d+)?(?:e[-+]?\d+)?")
_RELATIVE = 0.02
_CELL_SECONDS = 300

Notebook = dict[str, Any]


def code_cells(notebook: Notebook) -> list[dict[str, Any]]:
    """The cells that run."""
    return [cell for cell in notebook["cells"] if cell["cell_type"] == "code"]


def text_of(cell: dict[str, Any]) -> str:
    """All text that a cell gave, in order."""
    parts = [output.get("text") or output.get("data", {}).get("text/plain", "") for output in cell["outputs"]]
    return "".join("".join(part).rstrip("\n") + "\n" for part in parts if part)


def pictures_of(cell: dict[str, Any]) -> int:
    """How many pictures a cell gave."""
    return sum("image/png" in output.get("data", {}) for output in cell["outputs"])


def same_number(stored: str, found: str) -> bool:
    """Whether two numbers, as they are printed, agree."""
    a, b = (float(text.replace(",", "")) for text in (stored, found))
    mantissa, _, exponent = stored.partition("e")
    last_place = 10.0 ** (int(exponent or 0) - len(mantissa.partition(".")[2]))
    return math.isclose(a, b, rel_tol=_RELATIVE, abs_tol=1.001 * last_place)


def same_text(stored: str, found: str) -> bool:
    """Whether two texts agree, up to what numbers may differ by."""

    def words(text: str) -> list[str]:
        return _NUMBER.sub("0", text).split()  # columns are as wide as their numbers

    numbers = zip_longest(_NUMBER.findall(stored), _NUMBER.findall(found), fillvalue="nan")
    return words(stored) == words(found) and all(same_number(a, b) for a, b in numbers)


def differences(stored: Notebook, found: Notebook) -> list[str]:
    """What is out of date in a notebook, given the same notebook after a run; and what it warned of."""
    problems = []
    for number, (old, new) in enumerate(zip(code_cells(stored), code_cells(found), strict=True), 1):
        varies = VARIES in old["metadata"].get("tags", ())
        texts = text_of(old), text_of(new)
        if warned := [output for output in new["outputs"] if output.get("name") == "stderr"]:
            problems.append(f"code cell {number} wrote to stderr: {''.join(warned[0]['text'])}")
        if len({text.count("\n") for text in texts}) > 1 or not (varies or same_text(*texts)):
            problems.append(f"code cell {number} holds\n{texts[0]}and gives\n{texts[1]}")
        if pictures_of(old) != pictures_of(new):
            problems.append(f"code cell {number} holds {pictures_of(old)} pictures and gives {pictures_of(new)}")
    return problems


def run(path: Path, write: bool) -> list[str]:
    """Run one notebook; returns what is wrong with it."""
    import nbformat
    from nbclient import NotebookClient
    from nbclient.exceptions import CellExecutionError

    text = path.read_text(encoding="utf-8")
    stored, notebook = json.loads(text), nbformat.reads(text, as_version=4)
    client = NotebookClient(
        notebook,
        timeout=_CELL_SECONDS,
        record_timing=False,
        resources={"metadata": {"path": str(HERE)}},
        extra_arguments=["--log-level=ERROR"],  # the kernel's own, not the notebook's
    )
    try:
        client.execute()
    except CellExecutionError as error:
        return [str(error)]
    found = json.loads(nbformat.writes(notebook))
    if not write:
        return differences(stored, found)
    path.write_text(json.dumps(found, indent=1, ensure_ascii=False) + "\n", encoding="utf-8")
    return []


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the notebooks that are asked for; returns the exit code."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("names", nargs="*", help="beginnings of file names (default: all)")
    parser.add_argument("--write", action="store_true", help="store the outputs instead of comparing them")
    options = parser.parse_args(arguments)
    paths = sorted(HERE.glob("*.ipynb"))
    if options.names:
        paths = [path for path in paths if path.name.startswith(tuple(options.names))]
    if not paths:
        parser.error(f"there is no notebook whose name begins with {' or '.join(options.names)}")
    failed = False
    with tempfile.TemporaryDirectory() as folder:
        # Nothing of the user's IPython takes part; the debugger, which nobody uses here, warns of nothing.
        os.environ.update(IPYTHONDIR=folder, PYDEVD_DISABLE_FILE_VALIDATION="1")
        for path in paths:
            started = time.perf_counter()
            problems = run(path, options.write)
            outcome = "FAILED" if problems else "stored" if options.write else "as stored"
            print(f"{path.name}: {time.perf_counter() - started:.0f} s, {outcome}", flush=True)
            for problem in problems:
                print(problem, file=sys.stderr)
            failed |= bool(problems)
    return int(failed)


if __name__ == "__main__":
    sys.exit(main())
