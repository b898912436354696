"""Sphinx: ``make docs`` writes build/docs/index.html. No network is needed."""

from __future__ import annotations

import re
import sys
from pathlib import Path

from sphinx.application import Sphinx

ROOT = Path(__file__).parent.parent
sys.path.insert(0, str(ROOT))

import senet_kernels  # noqa: E402

project = "senet_kernels"
author = "The senet_kernels authors"
copyright = author
version = release = senet_kernels.__version__

extensions = ["myst_parser", "sphinx.ext.autodoc", "sphinx.ext.napoleon"]
html_theme = "furo"
html_static_path = ["_static"]
html_css_files = ["pages.css"]
html_title = f"senet_kernels {version}"
myst_heading_anchors = 3
autodoc_member_order = "bysource"
autodoc_typehints = "signature"
autodoc_preserve_defaults = True
napoleon_use_ivar = True
nitpicky = False

# Pages link to files of the repository beside docs/, which the pages are built without.
_OUTSIDE = re.compile(r"(?<!!)\[([^\]]+)\]\(\.\./([^)]+)\)")


def _name_outside_files(app: Sphinx, name: str, source: list[str]) -> None:
    def named(match: re.Match[str]) -> str:
        text, path = match[1], match[2]
        return f"`{path}`" if text.strip("`") == path else f"{text} (`{path}`)"

    source[0] = _OUTSIDE.sub(named, source[0])


def setup(app: Sphinx) -> None:
    """Sphinx calls this."""
    app.connect("source-read", _name_outside_files)
