"""Lists of names: which of a folder's pairs a text file means, or, in two columns, which files are a pair.

Names may hold blanks, commas, dots and brackets. A line is one name where there is such a name; else it is two, cut at
its tab, or at the first blank or comma where both sides are there.
"""

import itertools
import os
import re
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import NamedTuple

from fastseg.data.pairs import Key, Pair, Problem, entries, fault, is_image, key_text, order
from fastseg.texts import brief, read_text, shown

# No path has more parts, and no pair of paths more blanks and commas.
CUTS = PARTS = 100


class _Called(NamedTuple):
    """One of the things that a pair is called: folders, and the pair."""

    folders: tuple[str, ...]
    pair: Pair


def _split(text: str) -> tuple[tuple[str, ...], str]:
    *folders, name = text.split("/")
    return tuple(folder for folder in folders if folder not in ("", ".")), name


class Names:
    """What the pairs of a data set are called: by path, with and without suffix, and by key."""

    def __init__(self, root: Path, pairs: Mapping[Key, Pair], *, anywhere: bool) -> None:
        """
        Args:
            root: the data set's folder, which paths are told from.
            anywhere: a name counts whatever folder a list claims it to be in, as of lists from other machines.
        """
        self.anywhere = anywhere
        # The most exact come first.
        self.images: tuple[dict[str, list[_Called]], ...] = ({}, {}, {})
        self.labels: tuple[dict[str, list[_Called]], ...] = ({}, {})
        start = f"{root}/"
        for key, pair in pairs.items():
            for side, path in ((self.images, pair.image), (self.labels, pair.label)):
                folders, name = _split(path.removeprefix(start))
                side[0].setdefault(name, []).append(_Called(folders, pair))
                side[1].setdefault(os.path.splitext(name)[0], []).append(_Called(folders, pair))
            folders, name = _split(key_text(key))
            self.images[2].setdefault(name, []).append(_Called(folders, pair))

    def find(self, text: str, label: bool = False) -> set[Pair]:
        """The pairs whose image (or label) a text may name: one, unless it leaves open which."""
        for form in (text, text.replace("\\", "/")):
            folders, name = _split(form)
            stem = os.path.splitext(name)[0] if is_image(name) else name
            for names in self.labels if label else self.images:
                for called in (name, stem):
                    known = names.get(called, [])
                    # As far as both say where it is, they must agree: the folders nearest to the file.
                    near = {
                        pair
                        for own, pair in known
                        if all(a == b for a, b in zip(reversed(own), reversed(folders), strict=False))
                    }
                    if near or (known and self.anywhere):
                        return near or {pair for _, pair in known}
        return set()


def _lines(path: Path) -> list[str]:
    return [line.strip() for line in read_text(path).splitlines() if line.strip()]


def _cuts(line: str) -> Iterator[tuple[str, str]]:
    """The two names that a line may be, the likeliest first."""
    left, tab, right = line.partition("\t")
    if tab:
        yield left.strip(), right.strip()
    for cut in itertools.islice(re.finditer(r"\s*,\s*|\s+", line), CUTS):
        yield line[: cut.start()], line[cut.end() :]


def choose(pairs: Mapping[Key, Pair], path: Path, root: Path, *, anywhere: bool) -> tuple[list[Pair], list[Problem]]:
    """The pairs that a list names, in order; names without a pair are problems of the list.

    Args:
        root, anywhere: see `Names`.

    Raises:
        FastsegError: the list cannot be read.
    """
    names = Names(root, pairs, anywhere=anywhere)

    def both(left: str, right: str) -> set[Pair]:
        return names.find(left) & names.find(right, label=True)

    chosen: set[Pair] = set()
    problems = {}
    for line in _lines(path):
        found = names.find(line) or next(filter(None, (both(*cut) for cut in _cuts(line))), set())
        if len(found) == 1:
            chosen |= found
        elif found:
            problems[line] = f"names {_quoted(line)}, which stands for {len(found)} images here: write more of its path"
        else:
            problems[line] = f"names {_quoted(line)}, which has no image and label here"
    return sorted(chosen, key=order), [Problem(shown(path), problems[line], "listed") for line in sorted(problems)]


def pairs_in(path: Path, root: Path) -> tuple[dict[Key, Pair], list[Problem]]:
    """The pairs that a list of two columns, image and label, says by itself; lines that name no two files are problems.

    Paths are told from the data set's folder `root` or the list's own; of paths from another machine the end counts.

    Raises:
        FastsegError: the list cannot be read.
    """
    folders: dict[str, dict[str, os.DirEntry[str]]] = {}

    def entry_of(text: str) -> os.DirEntry[str] | None:
        for form in dict.fromkeys((text, text.replace("\\", "/"))):
            parts = form.split("/", PARTS)
            for base, first in itertools.product(dict.fromkeys((root, path.parent)), range(len(parts))):
                whole = os.path.join(base, *parts[first:]) if first else os.path.join(base, form)
                folder, name = os.path.split(os.path.normpath(whole))
                if folder not in folders:
                    folders[folder] = {entry.name: entry for entry in entries(folder)} if os.path.isdir(folder) else {}
                if name in folders[folder]:
                    return folders[folder][name]
        return None

    pairs: dict[Key, Pair] = {}
    problems = []
    for line in _lines(path):
        image, label = next(filter(all, (tuple(map(entry_of, cut)) for cut in _cuts(line))), (None, None))
        if image is None or label is None:
            told = f"has the line {_quoted(line)}, which is no image and label here"
            problems.append(Problem(shown(path), told, "listed"))
        elif wrong := [(entry, said) for entry in (image, label) if (said := fault(entry))]:
            problems += [Problem(shown(entry.path), said) for entry, said in wrong]
        else:
            stem, _ = os.path.splitext(image.path.removeprefix(f"{root}/"))
            pairs[(stem,)] = Pair(os.path.splitext(image.name)[0], image.path, label.path)
    return dict(sorted(pairs.items(), key=lambda item: order(item[1]))), problems


def _quoted(line: str) -> str:
    return shown(line) if len(line) <= 200 else brief(line)
