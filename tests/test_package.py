"""The package as a newcomer meets it: what the wheel carries, what an import costs, whether the README is true."""

from __future__ import annotations

import importlib.metadata
import re
import shutil
import subprocess
import sys
import zipfile
from configparser import ConfigParser
from pathlib import Path

from packaging.requirements import Requirement
from packaging.specifiers import SpecifierSet
from packaging.version import Version

import lowmem_higher

ROOT = Path(__file__).resolve().parent.parent
README = (ROOT / "README.md").read_text(encoding="utf-8")
CONSTRAINTS = ROOT / ".ci" / "constraints.txt"


def setup_cfg() -> ConfigParser:
    parser = ConfigParser(interpolation=None)
    parser.read(ROOT / "setup.cfg", encoding="utf-8")
    return parser


def declared_requirements() -> list[Requirement]:
    """Of the package and of all its extras; `%(test)s` stands for another extra and is there on its own."""
    parser = setup_cfg()
    blocks = [parser["options"]["install_requires"], *parser["options.extras_require"].values()]
    lines = [line.strip() for block in blocks for line in block.splitlines()]
    return [Requirement(line) for line in lines if line and not line.startswith("%")]


def pinned_versions() -> dict[str, Version]:
    lines = [line.strip() for line in CONSTRAINTS.read_text(encoding="utf-8").splitlines()]
    pins = [line.split("==") for line in lines if line and not line.startswith("#")]
    return {name.lower().replace("_", "-"): Version(version) for name, version in pins}


def readme_blocks(language: str) -> list[str]:
    return re.findall(rf"^```{language}\n(.*?)^```", README, flags=re.DOTALL | re.MULTILINE)


def text_files() -> list[Path]:
    """What the repository holds and people read, without what tools leave in a checkout."""
    suffixes = {".py", ".md", ".cff", ".cfg", ".toml", ".txt", ".json", ".ipynb"}
    folders = [ROOT / name for name in ("lowmem_higher", "tests", "benchmarks", "notebooks", ".ci")]
    found = [path for folder in folders for path in folder.rglob("*") if path.suffix in suffixes]
    found += [ROOT / ".ci" / "run", ROOT / ".ci" / "matrix"]
    found += [path for path in (ROOT / ".docs").iterdir() if path.suffix in suffixes]
    return [*found, *(path for path in ROOT.iterdir() if path.suffix in suffixes)]


# ---------------------------------------------------------------------------------------------------------- package


def test_version_is_the_same_everywhere():
    declared = setup_cfg()["metadata"]["version"]
    assert lowmem_higher.__version__ == declared
    assert importlib.metadata.version("lowmem_higher") == declared, "install again: the metadata are of another version"
    headings = re.findall(r"^## \[(\d[^\]]*)\]", (ROOT / "CHANGELOG.md").read_text(encoding="utf-8"), re.MULTILINE)
    assert headings[0] == declared


def test_wheel_carries_every_module_and_the_type_marker(tmp_path):
    source = tmp_path / "source"
    source.mkdir()
    for name in ("setup.py", "setup.cfg", "README.md", "LICENSE"):
        shutil.copy(ROOT / name, source / name)
    for name in ("lowmem_higher", "tests", "benchmarks"):
        shutil.copytree(ROOT / name, source / name, ignore=shutil.ignore_patterns("__pycache__"))
    build = "import sys; from setuptools import build_meta; print(build_meta.build_wheel(sys.argv[1]))"
    built = subprocess.run(
        [sys.executable, "-c", build, str(tmp_path)], cwd=source, capture_output=True, text=True, check=False
    )
    assert built.returncode == 0, built.stderr
    (wheel,) = tmp_path.glob("*.whl")
    carried = set(zipfile.ZipFile(wheel).namelist())
    package = ROOT / "lowmem_higher"
    wanted = {path.relative_to(ROOT).as_posix() for path in package.rglob("*.py")}
    wanted |= {"lowmem_higher/py.typed", "lowmem_higher/README.md"}
    assert wanted <= carried, f"not in the wheel: {sorted(wanted - carried)}"
    assert any(name.endswith("/LICENSE") for name in carried)
    strangers = {name.split("/")[0] for name in carried} - {"lowmem_higher"}
    assert all(name.endswith(".dist-info") for name in strangers), strangers


def test_import_needs_nothing_but_torch():
    """Progress bars, pictures and data are imported where they are used."""
    listing = "import sys; print(*sorted({name.split('.')[0] for name in sys.modules}))"
    modules = [
        set(
            subprocess.run(
                [sys.executable, "-c", f"import {name}; {listing}"], capture_output=True, text=True, check=True
            ).stdout.split()
        )
        for name in ("torch", "lowmem_higher")
    ]
    allowed = modules[0] | set(sys.stdlib_module_names) | {"lowmem_higher"}
    assert "lowmem_higher" in modules[1]
    assert modules[1] <= allowed, f"imported as well: {sorted(modules[1] - allowed)}"


# ------------------------------------------------------------------------------------------------ tested versions


def test_every_requirement_is_pinned_inside_its_range():
    pins = pinned_versions()
    requirements = declared_requirements()
    assert {"torch", "pytest", "higher", "mypy"} <= {requirement.name for requirement in requirements}
    for requirement in requirements:
        name = requirement.name.lower().replace("_", "-")
        assert name in pins, f"{name} is not in {CONSTRAINTS.name}"
        assert pins[name] in requirement.specifier, f"{name} {pins[name]} is outside of {requirement.specifier}"


def test_the_torch_range_is_closed_and_runs_here():
    """An open end would claim versions that do not exist yet."""
    (torch_range,) = [requirement.specifier for requirement in declared_requirements() if requirement.name == "torch"]
    assert {specifier.operator for specifier in torch_range} == {">=", "<"}
    assert Version(importlib.metadata.version("torch")) in SpecifierSet(str(torch_range), prereleases=True)


# ---------------------------------------------------------------------------------------------------------- README


def test_readme_has_two_set_up_commands_and_ci_runs_them():
    commands = [line for block in readme_blocks("bash") for line in block.splitlines()]
    assert len(commands) == 2
    ci = subprocess.run(["bash", str(ROOT / ".ci" / "run"), "--list"], capture_output=True, text=True, check=True)
    assert set(commands) <= set(ci.stdout.splitlines())
    for command, extra in zip(commands, ("demo", "test"), strict=True):
        assert command.startswith("python3 -m venv .venv && ")
        assert f'.venv/bin/pip install -c .ci/constraints.txt -e ".[{extra}]"' in command
    assert commands[0].endswith(" && .venv/bin/python -m lowmem_higher demo")
    assert commands[1].endswith(" && .venv/bin/python -m pytest")


def test_readme_example_runs_and_tells_wrong_examples_from_right_ones():
    (example,) = readme_blocks("python")
    namespace: dict[str, object] = {}
    exec(compile(example, "README.md", "exec"), namespace)
    gradient = namespace["example_weights"].grad
    assert gradient.norm() > 0
    assert gradient[:128].mean() > 0 > gradient[128:].mean()
    assert namespace["diffopt"].report.second_order_runs == 400


def test_no_page_is_unfinished_and_no_file_names_a_path_of_one_machine():
    """Results and notebooks write down their environment; a path of it is of no use to anybody else."""
    of_one_machine = re.compile(r"(?<![A-Za-z0-9_.])/(?:home|root|tmp|work|Users)/\w")
    unfinished = re.compile("TO" + r"DO\b")
    files = text_files()
    assert {"README.md", "setup.cfg", "run", "conftest.py"} <= {path.name for path in files}
    offending = [
        f"{path.relative_to(ROOT)}:{number}: {line.strip()[:80]}"
        for path in files
        for number, line in enumerate(path.read_text(encoding="utf-8").splitlines(), 1)
        if of_one_machine.search(line) or unfinished.search(line)
    ]
    assert not offending, "\n".join(offending)
