"""Sphinx's settings. Build with: sphinx-build -W -b html docs build/docs, where fastseg is installed with [docs]."""

import dataclasses
import os
import re
from pathlib import Path
from typing import Any

import fastseg

DOCS = Path(__file__).parent
ROOT = DOCS.parent
# Files of the repository that are pages too -> the page; its own text says no more than which file it is.
REPOSITORY = {
    "README.md": "readme",
    "CONTRIBUTING.md": "contributing",
    "CHANGELOG.md": "changelog",
    "bench/LOG.md": "log",
}

project = "fastseg"
release = fastseg.__version__
extensions = ["myst_parser", "sphinx.ext.autodoc", "sphinx.ext.napoleon", "sphinx_click"]
INCLUDED = {"faults.md": "troubleshooting.md"}  # a part of another page
exclude_patterns = [*INCLUDED]
myst_heading_anchors = 3
smartquotes = False  # they make a dash of --
default_role = "code"  # docstrings have code in single backquotes
autodoc_member_order = "bysource"
html_theme = "furo"
html_title = f"fastseg {release}"
html_show_copyright = False


def resolve(target: str, folder: Path) -> str | None:
    """A relative link to a file of the repository, as the built pages have it: a page where there is one, or the file.

    None for a folder, which is neither.
    """
    path, hash_sign, anchor = target.partition("#")
    file = Path(os.path.normpath(folder / path))
    if file.is_dir():
        return None
    if file.is_relative_to(DOCS):
        page = str(file.relative_to(DOCS))
        return f"{INCLUDED.get(page, page)}{hash_sign}{anchor}"
    name = str(file.relative_to(ROOT))
    return f"{REPOSITORY[name]}.md{hash_sign}{anchor}" if name in REPOSITORY else f"path:{os.path.relpath(file, DOCS)}"


def read_files(app: Any, page: str, source: list[str]) -> None:
    """Pages that stand for a file of the repository get its text; links go to pages, not to raw Markdown."""
    file = next((ROOT / name for name, stem in REPOSITORY.items() if stem == page), None)
    text, folder = (file.read_text(encoding="utf-8"), file.parent) if file else (source[0], DOCS)

    def link(match: re.Match) -> str:
        mark, label, target = match.groups()
        if "://" in target or target.startswith("#"):
            return match[0]
        found = resolve(target, folder)
        if mark and found:  # a picture is no link: MyST takes its path as it is
            found = found.removeprefix("path:")
        return label if found is None else f"{mark}[{label}]({found})"

    source[0] = re.sub(r"(!?)\[([^\]]*)\]\(([^)\s]+)\)", link, text)


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
    app.connect("source-read", read_files)
    app.connect("autodoc-process-docstring", complete)
