"""Lists of names: which of a folder's pairs a text file means, or, in two columns, which files are a pair.

Names may hold blanks, commas, dots and brackets. A line is one name where there is such a name; else it is two, cut at
its tab, or at the first blank or comma where both sides are there.
"""

import functools
import itertools
import os
import re
from collections.abc import Iterator, Mapping
from pathlib import Path

from fastseg.data.pairs import IMAGE_SUFFIXES, Key, Pair, Problem, entries, fault, key_text, order
from fastseg.texts import brief, read_text, shown

# No path has more parts, and no pair of paths more blanks and commas.
CUTS = PARTS = 100

# What the last part of a path or key is -> all of it, and its pair.
_Called = dict[str, list[tuple[str, Pair]]]


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
        self.images: tuple[_Called, ...] = ({}, {}, {})
        self.labels: tuple[_Called, ...] = ({}, {})
        start = f"{root}/"
        for key, pair in pairs.items():
            for side, path in ((self.images, pair.image), (self.labels, pair.label)):
                below = path.removeprefix(start)
                name = below.rpartition("/")[2]
                side[0].setdefault(name, []).append((below, pair))
                side[1].setdefault(os.path.splitext(name)[0], []).append((below, pair))
            text = key_text(key)
            self.images[2].setdefault(text.rpartition("/")[2], []).append((text, pair))

    def find(self, text: str, label: bool = False) -> set[Pair]:
        """The pairs whose image (or label) a text may name: one, unless it leaves open which."""
        for form in _forms(text):
            folder, _, name = form.rpartition("/")
            stem, suffix = os.path.splitext(name)
            ways = (name, stem) if suffix.lower() in IMAGE_SUFFIXES else (name,)
            for names, way in itertools.product(self.labels if label else self.images, ways):
                known = names.get(way, ())
                is_key = names is self.images[2]  # which lies in no folder that a list could tell
                near = {pair for own, pair in known if not folder or _agree(folder, own.rpartition("/")[0], is_key)}
                if near or (known and self.anywhere):
                    return near or {pair for _, pair in known}
        return set()


def _forms(text: str) -> tuple[str, ...]:
    """A path as it stands, and as Windows means it."""
    return (text, text.replace("\\", "/")) if "\\" in text else (text,)


def _agree(told: str, own: str, whole: bool) -> bool:
    """Whether two folders may be the same, as far as both are told: the longer ends in the shorter.

    Args:
        whole: `own` is told whole, so that no longer one is meant.
    """
    told, own = f"/{told}".removesuffix("/."), f"/{own}"
    return told in ("", "/") or own.endswith(told) or (not whole and (own == "/" or told.endswith(own)))


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
        found = names.find(left)
        return found & names.find(right, label=True) if found else found

    chosen: set[Pair] = set()
    problems = {}
    for line in _lines(path):
        found = names.find(line) or next(filter(None, itertools.starmap(both, _cuts(line))), set())
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

    @functools.cache
    def inside(folder: str) -> dict[str, os.DirEntry[str]]:
        return {entry.name: entry for entry in entries(folder)} if os.path.isdir(folder) else {}

    @functools.cache
    def folders(told: str) -> list[dict[str, os.DirEntry[str]]]:
        """What is in the folders that a told one may be, the likeliest first."""
        parts = told.split("/", PARTS)
        ends = [told, *("/".join(parts[first:]) for first in range(1, len(parts) + 1))]
        found = [os.path.normpath(os.path.join(base, end)) for end in ends for base in (root, path.parent)]
        return [inside(folder) for folder in dict.fromkeys(found)]

    def entry_of(text: str) -> os.DirEntry[str] | None:
        for form in _forms(text):
            told, _, name = form.rpartition("/")
            for folder in folders(told):
                if name in folder:
                    return folder[name]
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
