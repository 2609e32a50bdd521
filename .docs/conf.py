"""The documentation site: `.venv/bin/sphinx-build -W --keep-going .docs .docs/site`."""

from __future__ import annotations

import re
import sys
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parent))

import gather
from docutils.nodes import SkipNode, math_block
from docutils.utils.math.latex2mathml import tex2mathml

import lowmem_higher

gather.gather()

project = "lowmem_higher"
author = copyright = "The lowmem_higher developers"  # noqa: A001  (Sphinx's word for it)
version = release = lowmem_higher.__version__

extensions = ["myst_nb", "sphinx.ext.autodoc", "sphinx.ext.napoleon"]
exclude_patterns = ["site"]
html_math_renderer = "mathml"
html_theme = "furo"
html_title = f"lowmem_higher {release}"
html_static_path = ["static"]
html_css_files = ["wide.css"]
pygments_style = "friendly"
html_show_sourcelink = False
html_copy_source = False

# The notebooks are executed by a stage of .ci/run of their own, and keep their outputs.
nb_execution_mode = "off"
myst_enable_extensions = ["dollarmath"]
myst_heading_anchors = 3

autodoc_member_order = "bysource"
autodoc_preserve_defaults = True
autodoc_typehints_format = "short"
python_maximum_signature_line_length = 100
add_module_names = False
napoleon_custom_sections = ["Memory", "Passes"]
napoleon_use_ivar = True
default_role = "literal"


def as_rst(_app: Any, _what: str, _name: str, _of: Any, _options: Any, lines: list[str]) -> None:
    """Docstrings are written as Markdown is: `code` in one pair of backticks, and nothing else means markup."""
    in_doctest = False
    for number, line in enumerate(lines):
        in_doctest = bool(line.strip()) and (in_doctest or line.lstrip().startswith(">>>"))
        if not in_doctest:
            spans = re.split(r"`([^`]+)`", line)
            escaped = [re.sub(r"([|*]|_\b)", r"\\\1", span) for span in spans[::2]]
            code = [f"``{span}``" for span in spans[1::2]]
            lines[number] = "".join(text + span for text, span in zip(escaped, [*code, ""], strict=True))


def as_mathml(translator: Any, node: Any) -> None:
    """Formulas that browsers show by themselves: the site loads nothing from elsewhere."""
    display = "block" if isinstance(node, math_block) else "inline"
    formula = tex2mathml(node.astext(), as_block=display == "block")
    translator.body.append(f"<p>{formula}</p>" if display == "block" else formula)
    raise SkipNode


def setup(app: Any) -> None:
    """Docstrings are read before napoleon, which has the priority 500, adds markup of its own."""
    app.connect("autodoc-process-docstring", as_rst, priority=100)
    app.add_html_math_renderer("mathml", (as_mathml, None), (as_mathml, None))
