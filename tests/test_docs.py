"""The pages that people read: their code runs, their links lead somewhere, their numbers are those of the JSON."""

from __future__ import annotations

import json
import re
import sys
from configparser import ConfigParser
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import lowmem_higher
import lowmem_higher.scale

ROOT = Path(__file__).resolve().parent.parent
SITE = ROOT / ".docs"
WRITTEN = sorted(SITE.glob("*.md"))
RUN = ["tutorial.md", "howto.md", "faq.md"]
PAGES = [ROOT / "README.md", ROOT / "CONTRIBUTING.md", *sorted((ROOT / "lowmem_higher").glob("*.md")), *WRITTEN]


def blocks(page: Path, language: str) -> list[str]:
    return re.findall(rf"^```{language}\n(.*?)^```", page.read_text(encoding="utf-8"), flags=re.DOTALL | re.MULTILINE)


def relative(page: Path) -> str:
    return page.relative_to(ROOT).as_posix()


# ------------------------------------------------------------------------------------------------------------- code


@pytest.mark.parametrize("page", [*(SITE / name for name in RUN), ROOT / "lowmem_higher" / "README.md"], ids=relative)
def test_the_blocks_of_a_page_run_one_after_the_other(page: Path, capsys: pytest.CaptureFixture[str]) -> None:
    namespace: dict[str, Any] = {}
    found = blocks(page, "python")
    assert found
    for number, block in enumerate(found, 1):
        try:
            exec(compile(block, f"{page.name}, block {number}", "exec"), namespace)
        except Exception as error:
            error.add_note(f"{page.name}, block {number}:\n{block}")
            raise


def test_no_page_has_code_that_nothing_runs() -> None:
    """That of README.md and of the migration guide has tests of its own."""
    run = {"README.md", "lowmem_higher/README.md", "lowmem_higher/MIGRATION.md", *(f".docs/{name}" for name in RUN)}
    assert {relative(page) for page in PAGES if blocks(page, "python")} == run
    languages = {
        language for page in PAGES for language in re.findall(r"^```(\S+)$", page.read_text("utf-8"), re.MULTILINE)
    }
    assert languages <= {"python", "bash", "diff", "text", "{toctree}", "{eval-rst}"}


def migrated(diff: str) -> tuple[str, str]:
    """What a unified diff without line numbers starts from, and what it leads to."""
    lines = diff.splitlines()
    return tuple("\n".join(line[1:] for line in lines if line[:1] in kept) for kept in (" -", " +"))  # type: ignore[return-value]


@pytest.mark.parametrize("page", [ROOT / "README.md", SITE / "index.md"], ids=relative)
def test_the_diff_leads_from_the_gradient_of_higher_to_the_same(page: Path) -> None:
    pytest.importorskip("higher")
    (diff,) = blocks(page, "diff")
    before, after = migrated(diff)
    assert before.startswith("import higher\n")
    assert "checkpoint_every" in after
    assert "checkpoint_every" not in before
    gradients: list[list[Tensor]] = []
    for code in (before, after):
        torch.manual_seed(3)
        model = nn.Sequential(nn.Linear(4, 6), nn.Tanh(), nn.Linear(6, 1)).double()
        data = torch.randn(14, 8, 5, dtype=torch.float64)
        namespace: dict[str, Any] = {
            "model": model,
            "opt": torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9),
            "criterion": F.mse_loss,
            "batches": [(rows[:, :4], rows[:, 4:]) for rows in data[:13]],
            "x_val": data[13, :, :4],
            "y_val": data[13, :, 4:],
        }
        exec(compile(code, f"{page.name}, diff", "exec"), namespace)
        gradients.append([param.grad for param in model.parameters() if param.grad is not None])
    assert len(gradients[0]) == 4
    for old, new in zip(*gradients, strict=True):
        assert old.norm() > 0
        assert (old - new).norm() <= 1e-9 * old.norm()


# --------------------------------------------------------------------------------------------------- commands, links


def test_commands_name_what_there_is(capsys: pytest.CaptureFixture[str]) -> None:
    from lowmem_higher.__main__ import main

    pages = [*PAGES, ROOT / "benchmarks" / "README.md"]
    text = "\n".join(page.read_text(encoding="utf-8") for page in pages)
    commands = set(re.findall(r"-m lowmem_higher (\w+)", text))
    assert {"demo", "doctor", "profile"} <= commands
    for command in commands:
        with pytest.raises(SystemExit, match="0"):
            main([command, "--help"])
    scripts = set(re.findall(r"\bpython (?:-m pytest )?((?:benchmarks|tests)/\S+?\.py)", text))
    named = set(re.findall(r"`((?:tests|benchmarks|lowmem_higher)/[\w/]+\.(?:py|md))`", text))
    assert scripts
    assert named
    assert not [file for file in scripts | named if not (ROOT / file).exists()]
    extras = set(re.findall(r"\[([a-z,]+)\]\"", text))
    known = ConfigParser(interpolation=None)
    known.read(ROOT / "setup.cfg", encoding="utf-8")
    assert {part for extra in extras for part in extra.split(",")} <= set(known["options.extras_require"])


def test_tests_that_the_laws_name_are_there() -> None:
    code = "\n".join(path.read_text(encoding="utf-8") for path in (ROOT / "tests").glob("*.py"))
    named = re.findall(r"`(test_\w+)`", (SITE / "laws.md").read_text(encoding="utf-8"))
    assert len(named) > 2
    assert not [name for name in named if f"def {name}(" not in code]


# The links of gathered pages are checked by the build of the site, with warnings as errors.
@pytest.mark.parametrize(
    "page", [*(page for page in PAGES if page.parent != SITE), ROOT / "benchmarks" / "README.md"], ids=relative
)
def test_links_lead_to_files_and_headings(page: Path) -> None:
    links = re.findall(r"\]\(([^)\s]+)\)", page.read_text(encoding="utf-8"))
    for link in (link for link in links if "://" not in link):
        file, _, anchor = link.partition("#")
        target = page.parent / file if file else page
        assert target.exists(), f"{relative(page)}: {link}"
        if anchor:
            headings = re.findall(r"^#+ (.*)$", target.read_text(encoding="utf-8"), re.MULTILINE)
            anchors = [re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-") for heading in headings]
            assert anchor in anchors, f"{relative(page)}: {link}"


# --------------------------------------------------------------------------------------------------------- reference


def test_the_reference_has_every_public_name() -> None:
    """One that is missing gets a line there: `.. autofunction:: NAME`, or `.. autoclass:: NAME`."""
    text = (SITE / "reference.md").read_text(encoding="utf-8")
    named = set(re.findall(r"auto(?:function|class):: (\w+)", text))
    modules = set(re.findall(r"(?:automodule|currentmodule):: lowmem_higher\.(\w+)", text))
    errors = {name for name in vars(lowmem_higher.errors) if not name.startswith("_")}
    public = {*lowmem_higher.__all__, *lowmem_higher.testing.__all__}
    public |= {name for name in lowmem_higher.optim.__all__ if not name.startswith("_")}
    assert public - named - errors - modules == set()
    holders = [lowmem_higher, lowmem_higher.patch, lowmem_higher.optim, lowmem_higher.utils, lowmem_higher.testing]
    holders += [sys.modules[f"lowmem_higher.{name}"] for name in ("schedule", "distributed", "scale")]
    assert not [name for name in named if not any(hasattr(holder, name) for holder in holders)]


def test_every_public_name_has_help_of_its_own() -> None:
    for name in lowmem_higher.__all__:
        text = getattr(lowmem_higher, name).__doc__
        assert text, name
        assert text.strip().splitlines()[0].rstrip().endswith((".", ":")), name


# ---------------------------------------------------------------------------------------------------------- numbers


def size(value: float) -> str:
    for unit in ("B", "KiB", "MiB"):
        if value < 1024:
            return f"{value:.3g} {unit}"
        value /= 1024
    return f"{value:.3g} GiB"


def test_the_table_of_the_field_is_what_was_measured() -> None:
    """After a new measurement: put the table that this prints into README.md."""
    measured = json.loads((ROOT / "benchmarks" / "results" / "field.json").read_text(encoding="utf-8"))["rows"]
    rows = {(row["net"], row["rival"]): row for row in measured if row["steps"] == 20}
    rivals = {
        "higher": "`higher`",
        "TorchOpt": "TorchOpt",
        "by hand": "`torch.utils.checkpoint` by hand",
        "JAX": "JAX",
        "ample budget": "here, `memory_budget` ample",
        "ten graphs": "here, N=10, `graphs=10`",
        "native": "here, N=10",
    }
    lines = []
    for rival, label in rivals.items():
        cells = [rows[net, rival] for net in ("tiny", "mlp512", "gpt", "conv4")]
        shown = [f"{cell['times_higher']:.2f}, {size(cell['peak_bytes'])}" for cell in cells]
        lines.append(f"| {' | '.join([label, *shown])} |")
    table = "\n".join(lines)
    assert table in (ROOT / "README.md").read_text(encoding="utf-8"), f"\n{table}"


def test_the_picture_shows_what_the_readme_says() -> None:
    points = json.loads((ROOT / "benchmarks" / "results" / "memory_scaling.json").read_text(encoding="utf-8"))["points"]
    text = (ROOT / "README.md").read_text(encoding="utf-8")
    (row,) = [line for line in text.splitlines() if line.startswith("| peak memory, 1,000 steps")]
    assert points
    largest = [point for point in points if point["steps"] == 1000]
    assert len(largest) == 4
    assert {size(point["peak_bytes"]) for point in largest} == set(re.findall(r"[\d.]+ [KMG]iB", row))


def test_the_badges_are_true() -> None:
    text = (ROOT / "README.md").read_text(encoding="utf-8")
    shown = re.findall(r"^\[!\[(.*?)\]\(https://img\.shields\.io/badge/(.*?)\)\]\((.*?)\)$", text, re.MULTILINE)
    assert len(shown) == 4
    parser = ConfigParser(interpolation=None)
    parser.read(ROOT / "setup.cfg", encoding="utf-8")
    (oldest, above) = re.findall(r"torch>=([\d.]+),<2\.(\d+)", parser["options"]["install_requires"])[0]
    wanted = [
        ("checks: bash .ci/run", ".ci/run"),
        (f"Python: {parser['options']['python_requires'].removeprefix('>=')} or newer", "setup.cfg"),
        (f"PyTorch: {oldest} to 2.{int(above) - 1}", "CHANGELOG.md#tried-with"),
        (f"license: {parser['metadata']['license']}", "LICENSE"),
    ]
    assert [(label, link) for label, _, link in shown] == wanted
    for label, picture, _ in shown:
        spelled = re.sub("-[0-9a-f]{6}$", "", picture).replace("--", "-").replace("_", " ").replace("%2F", "/")
        assert spelled in (label.replace(": ", "-"), label.replace(": ", " ")), label
