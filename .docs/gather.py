"""Brings pages, notebooks and pictures of the repository below the site's own folder, where Sphinx finds them.

A page that the repository has already, such as the tour in `lowmem_higher/README.md`, is a page of the site as it is,
but for its links: one to another page of the site leads there, one to any other file becomes the file's name.
"""

from __future__ import annotations

import os
import re
import shutil
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
HERE = Path(__file__).resolve().parent
GATHERED = HERE / "gathered"
PAGES = {
    "README.md": "index.md",
    "lowmem_higher/README.md": "gathered/tour.md",
    "lowmem_higher/MIGRATION.md": "gathered/migration.md",
    "benchmarks/README.md": "gathered/benchmarks.md",
    "CHANGELOG.md": "gathered/changelog.md",
    "CONTRIBUTING.md": "gathered/contributing.md",
}
_NOTEBOOKS = """# Notebooks

Run from top to bottom by the checks, and shown here with the outputs that they were committed with.
"""
LINK = re.compile(r"(!?)\[([^\]]*)\]\(([^)\s]+)\)")
FENCE = re.compile(r"^```.*?^```", re.DOTALL | re.MULTILINE)


def gather() -> None:
    """Writes `gathered/` and `notebooks/` anew, from the repository as it is on disk."""
    for folder in (GATHERED, HERE / "notebooks"):
        shutil.rmtree(folder, ignore_errors=True)
        folder.mkdir()
    for source, target in PAGES.items():
        if target.startswith("gathered/"):
            (HERE / target).write_text(relinked(source, target), encoding="utf-8")
    notebooks = sorted((ROOT / "notebooks").glob("*.ipynb"))
    for notebook in notebooks:
        shutil.copy(notebook, HERE / "notebooks")
    listed = "\n".join(notebook.stem for notebook in notebooks)
    toctree = f"```{{toctree}}\n:maxdepth: 1\n\n{listed}\n```\n" if notebooks else "There are none yet.\n"
    (HERE / "notebooks" / "index.md").write_text(f"{_NOTEBOOKS}\n{toctree}", encoding="utf-8")


def relinked(source: str, target: str) -> str:
    """The text of a page of the repository, with links as they are right where it stands in the site."""
    text = (ROOT / source).read_text(encoding="utf-8")

    def new_link(match: re.Match[str]) -> str:
        picture, label, address = match.groups()
        file, hash_, anchor = address.partition("#")
        if "://" in address or not file:
            return match.group()
        path = Path(os.path.normpath(Path(source).parent / file))
        if picture:
            (GATHERED / "pictures").mkdir(exist_ok=True)
            shutil.copy(ROOT / path, GATHERED / "pictures")
            return f"![{label}](pictures/{path.name})"
        if path.as_posix() in PAGES:
            page = os.path.relpath(PAGES[path.as_posix()], Path(target).parent)
            return f"[{label}]({page}{hash_}{anchor})"
        if path.parts[0] == "notebooks" and (ROOT / path).suffix == ".ipynb" and (ROOT / path).exists():
            return f"[{label}](../{path.as_posix()})"
        if path.parts[0] == ".docs":
            page = os.path.relpath(Path(*path.parts[1:]), Path(target).parent)
            return f"[{label}]({page}{hash_}{anchor})"
        name = f"`{path.as_posix()}`"
        return name if label.strip("`") == path.as_posix() else f"{label} ({name})"

    outside = FENCE.split(text)
    fences = FENCE.findall(text)
    parts = [LINK.sub(new_link, part) for part in outside]
    return "".join(part + fence for part, fence in zip(parts, [*fences, ""], strict=True))
