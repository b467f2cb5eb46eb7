"""What `data check` found, counted: one line for each kind of fault, however many files have it."""

import os
from collections.abc import Sequence
from pathlib import Path

from fastseg.data.pairs import Problem

SHOWN = 3  # files of a kind that are named

# Kind -> what several files of it are said to be, and the cure.
KINDS = {
    "listed": ("lines of lists name nothing that is here", "add the files, or take the names out of the lists"),
    "unreadable": ("files cannot be read", "mend or remove them"),
    "undecodable": ("files cannot be decoded", "mend or remove them"),
    "lossy": ("labels are of formats that need not keep values as they are", "save labels as PNG"),
    "sizes": ("labels have another size than their images (width x height)", "they must be equal"),
    "unlisted": (
        "labels have values outside the class map",
        "correct them, or --unknown-colours void to ignore such pixels",
    ),
    "ignored": ("labels have values outside the class map, which are ignored", ""),
    "twice": (
        "images are in two splits",
        "a network would be scored on what it was trained on; take them out of one of the two",
    ),
    "namesakes": (
        "images have the name of one in another split, but other content",
        "if they are the same photos, stored anew, take them out of one of the two",
    ),
    "turned": (
        "files have an EXIF orientation, which is not applied",
        "--exif apply turns photos as it says; or save photo and label upright",
    ),
    "aspects": (
        "images have another aspect ratio than the middle one",
        "--size squeezes all into one shape; data.fit = letterbox keeps theirs",
    ),
    "void": ("labels are all void", ""),
}


def lines(problems: Sequence[Problem], root: Path) -> list[str]:
    """One line for each kind, in the order of their first files; a file that is alone with its fault is told in full.

    Args:
        root: of the data set, which several names of files are told without.
    """
    kinds: dict[str, list[Problem]] = {}
    for problem in problems:
        kinds.setdefault(problem.kind or " ".join(problem.problem.split()[:3]), []).append(problem)
    return [_line(kind, found, root) for kind, found in kinds.items()]


def _line(kind: str, found: list[Problem], root: Path) -> str:
    if len(found) == 1:
        return f"{found[0].file}: {found[0].problem}"
    same = len({problem.problem for problem in found}) == 1
    what, cure = KINDS.get(kind) or (f"files: {found[0].problem}" if same else "files", "")
    named = []
    for problem in found[:SHOWN]:
        detail = problem.detail or ("" if same else problem.problem)
        named.append(problem.file.removeprefix(f"{root}{os.sep}") + (f": {detail}" if detail else ""))
    more = f"; and {len(found) - SHOWN:,} more" if len(found) > SHOWN else ""
    return f"{len(found):,} {what} ({'; '.join(named)}{more}){f': {cure}' if cure else ''}"
