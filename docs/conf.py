"""Sphinx's settings. Build with: sphinx-build -W -b html docs build/docs, where fastseg is installed with [docs]."""

import dataclasses
import re
from typing import Any

import fastseg

project = "fastseg"
release = fastseg.__version__
extensions = ["myst_parser", "sphinx.ext.autodoc", "sphinx.ext.napoleon", "sphinx_click"]
exclude_patterns = ["faults.md"]  # a part of troubleshooting.md
myst_heading_anchors = 3
smartquotes = False  # they make a dash of --
default_role = "code"  # docstrings have code in single backquotes
autodoc_member_order = "bysource"
html_theme = "furo"
html_title = f"fastseg {release}"
html_show_copyright = False


def link_files(app: Any, page: str, source: list[str]) -> None:
    """Pages link to files of the repository by their relative paths, which serve where no page was built, too."""
    source[0] = source[0].replace("](../", "](path:../")


def complete(app: Any, what: str, name: str, obj: Any, options: Any, lines: list[str]) -> None:
    """Docstrings as Sphinx wants them, and the meaning of each key of a configuration, which its field has."""
    lines[:] = [re.sub(r"(`[^`]+`)(?=\w)", r"\1\\ ", line) for line in lines]  # a plural after code
    if what == "class" and obj.__module__ == "fastseg.config":
        lines[:] = [line for line in lines if not line.startswith(f"{obj.__name__}(")]  # dataclass's own: a signature
        for field in dataclasses.fields(obj):
            if text := field.metadata.get("help"):
                choices = f" ({', '.join(field.metadata['choices'])})" if field.metadata["choices"] else ""
                lines += ["", f":param {field.name}: {text}{choices}"]


def setup(app: Any) -> None:
    app.connect("source-read", link_files)
    app.connect("autodoc-process-docstring", complete)
