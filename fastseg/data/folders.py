"""Which pictures of a folder are images and which are their masks, by what they are called and by what they hold.

A folder's words (`masks`, `JPEGImages`) and a name's (`_mask`, `leftImg8bit`) say what a picture is; what is left when
they are taken away says which picture it belongs to. `train/images/a.jpg` and `train/masks/a_mask.png` both leave
(`train`, `a`). Pictures with the same words are of one kind; two kinds with places in common may be images and masks.
"""

import re
from collections import Counter, defaultdict
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from itertools import combinations
from pathlib import Path

import numpy as np

from fastseg.data.decode import READING_ERRORS, opened
from fastseg.data.pairs import IMAGE_SUFFIXES, SPLIT_NAMES, is_companion, walk
from fastseg.errors import UsageError
from fastseg.texts import is_plain, shown

# Words in small letters, by what a picture is; the last are pictures that tools put beside their masks.
_MASKS = """
mask masks label labels labelids labeltrainids annotation annotations ann anns annot annots gt gtfine gtcoarse ground
truth groundtruth seg segs segmentation segmentations semantic target targets segmentationclass segmentationclasspng
"""
_IMAGES = "image images img imgs photo photos picture pictures jpegimages rgb input inputs leftimg8bit sat"
_OTHERS = """
instance instances instanceids object objects segmentationobject segmentationobjectpng visualization visualisation viz
vis overlay overlays color colour colors colours preview depth disparity segmentationclassvisualization
"""
MASK_WORDS, IMAGE_WORDS, OTHER_WORDS = _MASKS.split(), _IMAGES.split(), _OTHERS.split()
# What a folder's name says of a split: also the words that nobody writes into dataset.toml.
SPLIT_WORDS = {word: split for split, words in SPLIT_NAMES.items() for word in words}
SPLIT_WORDS |= {"training": "train", "testing": "test"}

MAX_DEPTH = 8  # of folders in folders, which also ends loops of links
SAMPLE = 6  # pictures of a kind that are looked into
MANY = 256  # colours: what has more is a photo, or a mask that was blurred
FEW = 64  # colours that a mask may have without further proof

_WORD = "|".join(sorted((*MASK_WORDS, *IMAGE_WORDS, *OTHER_WORDS), key=len, reverse=True))
_END = re.compile(rf"(?:[_\-. ](?:(?i:{_WORD}|jpg|jpeg|png)|[LP]))+$")
_START = re.compile(rf"^(?i:(?:{_WORD})(?:[_\-. ]|(?=\d)))+")
_JOINED = re.compile(rf"(?i)({'|'.join(SPLIT_WORDS)})(annot|masks?|labels?|images?)")

Place = tuple[tuple[str, ...], str]  # (what is left of the folders, what is left of the name)
Parts = list[tuple[str, str]]  # of each folder on the way: (what is left of it, its words)


@dataclass(frozen=True)
class Kind:
    """The words of pictures: of each folder on the way, and of their names; `suffix` where it tells two kinds apart."""

    folders: tuple[str, ...]
    before: str
    after: str
    suffix: str = ""

    def has(self, words: Iterable[str]) -> bool:
        tokens = re.split(r"[_\-. /]+", "/".join((*self.folders, self.before, self.after)).lower())
        return not set(tokens).isdisjoint(words)


@dataclass
class Sides:
    """The images and masks of a folder, by place, relative to it.

    Attributes:
        parts_of: how a folder's path was taken apart.
        left_out: pictures that are neither.
        rivals: a mask of each other kind that fitted as well.
    """

    images: dict[Place, Path]
    masks: dict[Place, Path]
    parts_of: Callable[[tuple[str, ...]], Parts]
    left_out: list[Path] = field(default_factory=list)
    rivals: list[Path] = field(default_factory=list)

    @property
    def places(self) -> list[Place]:
        """Of the images that have a mask, in order."""
        return sorted(self.images.keys() & self.masks.keys())


def files_below(root: Path, suffixes: Iterable[str]) -> list[Path]:
    """Files of these suffixes in a folder and those in it, relative to it, in order; none that is hidden or a run's."""
    wanted, found = set(suffixes), []
    for folder, folders, names in walk(root):
        here = folder.relative_to(root)
        folders[:] = [f for f in folders if is_plain(f)] if len(here.parts) < MAX_DEPTH else []
        for name in names:
            if Path(name).suffix.lower() in wanted and not is_companion(name) and is_plain(name):
                found.append(here / name)
    return sorted(found)


def by_words(folders: tuple[str, ...]) -> Parts:
    """Each folder of a path as (what is left without its words, its words)."""
    parts = []
    for folder in folders:
        if joined := _JOINED.fullmatch(folder):
            parts.append((joined[1], joined[2]))
            continue
        tokens = re.split(r"([_\-. ])", folder)
        words = [token for token in tokens[::2] if re.fullmatch(f"(?i){_WORD}", token)]
        rest = [token for token in tokens[::2] if token not in words]
        parts.append(("_".join(rest), "_".join(words)))
    return parts


def _without(position: int) -> Callable[[tuple[str, ...]], Parts]:
    """As `by_words`, where the folder at one depth says what a picture is, by a word that nobody knows."""
    return lambda folders: [("", f) if depth == position else (f, "") for depth, f in enumerate(folders)]


def left_of(parts: Parts) -> tuple[str, ...]:
    """What is left of the folders on the way: the first half of a place."""
    return tuple(rest for rest, _ in parts if rest)


def affixes(stem: str) -> tuple[str, str, str]:
    """(words before, what is left, words after) of a name without suffix."""
    end = _END.search(stem)
    after = end[0] if end and end.start() else ""
    inner = stem.removesuffix(after) if after else stem
    start = _START.match(inner)
    before = start[0] if start and start.end() < len(inner) else ""
    return before, inner[len(before) :], after


def _kinds(files: Sequence[Path], parts_of: Callable[[tuple[str, ...]], Parts]) -> dict[Kind, dict[Place, Path]]:
    """Files by kind and place; a.jpg and a.png of one folder are two kinds where that is the rule."""
    found: dict[Kind, dict[Place, list[Path]]] = defaultdict(lambda: defaultdict(list))
    for path in files:
        parts = parts_of(path.parts[:-1])
        before, key, after = affixes(path.stem)
        found[Kind(tuple(words for _, words in parts), before, after)][left_of(parts), key].append(path)
    kinds: dict[Kind, dict[Place, Path]] = defaultdict(dict)
    for kind, places in found.items():
        several = 2 * sum(len(paths) > 1 for paths in places.values()) >= len(places)
        for place, paths in places.items():
            for path in paths if several else paths[:1]:
                suffix = path.suffix.lower() if several else ""
                kinds[Kind(kind.folders, kind.before, kind.after, suffix)][place] = path
    return kinds


def evenly(items: Sequence[Path], count: int) -> list[Path]:
    """At most `count` of the items, evenly from the first to the last."""
    if len(items) <= count:
        return list(items)
    return [items[i * (len(items) - 1) // (count - 1)] for i in range(count)]


def _colors(root: Path, paths: Sequence[Path]) -> int | None:
    """The median number of colours (at most MANY + 1) in a few pictures; None where none can be read."""
    counts = []
    for path in evenly(paths, SAMPLE):
        try:
            with opened(str(root / path)) as file:
                if file.mode.startswith("I;16"):
                    counts.append(min(len(np.unique(np.array(file))), MANY + 1))
                else:
                    counts.append(len(file.convert("RGB").getcolors(MANY) or range(MANY + 1)))
        except READING_ERRORS:
            continue  # `data check` names it
    return sorted(counts)[len(counts) // 2] if counts else None


def _score(image: Kind, mask: Kind, image_colors: int, mask_colors: int) -> int:
    """How well two kinds are images and their masks; 0 where they cannot be."""
    named = mask.has(MASK_WORDS) and not image.has(MASK_WORDS)
    if (mask_colors >= image_colors and not named) or (image_colors <= FEW and image.has(OTHER_WORDS)):
        return 0
    names = 2 * mask.has(MASK_WORDS) - mask.has(IMAGE_WORDS) - 3 * mask.has(OTHER_WORDS)
    names += image.has(IMAGE_WORDS) - 2 * image.has(MASK_WORDS) - 3 * image.has(OTHER_WORDS)
    return 4 + names + 2 * (mask_colors <= FEW) + (image_colors > mask_colors) + (image_colors > FEW)


def find_sides(root: Path) -> Sides:
    """The images and masks of a folder.

    Raises:
        UsageError: no pictures, or none that are images and masks of the same names; what was looked for, and the cure.
    """
    files = files_below(root, IMAGE_SUFFIXES)
    if not files:
        raise UsageError(f"{shown(root)}: no pictures here{_cure(root)}")
    depth = max(len(path.parts) for path in files) - 1
    for parts_of in (by_words, *(_without(position) for position in range(depth))):
        kinds = _kinds(files, parts_of)
        if sides := _best(root, kinds, parts_of):
            used = {*sides.images.values(), *sides.masks.values()}
            sides.left_out = [path for path in files if path not in used]
            return sides
    folders = sorted({f"{shown(path.parent)}/" for path in files})
    raise UsageError(
        f"{shown(root)}: no images with masks found: looked for two kinds of the same names, in folders such as "
        f"images/ and masks/ or with endings such as a.jpg and a_mask.png, of which one holds few colours; found "
        f"{len(files)} pictures in {', '.join(folders[:3])}{' and more' * (len(folders) > 3)}{_cure(root)}"
    )


def _cure(root: Path) -> str:
    if files_below(root, (".json", ".xml")):
        return "; annotations in .json or .xml become masks by `fastseg data rasterise FOLDER FOLDER/masks`"
    return "; rename them so, or write dataset.toml by hand"


def _best(
    root: Path, kinds: dict[Kind, dict[Place, Path]], parts_of: Callable[[tuple[str, ...]], Parts]
) -> Sides | None:
    by_place: dict[Place, list[Kind]] = defaultdict(list)
    for kind, places in kinds.items():
        for place in places:
            by_place[place].append(kind)
    common: Counter[tuple[Kind, Kind]] = Counter()
    for together in by_place.values():
        common.update(combinations(together, 2))
    colors = {kind: _colors(root, list(kinds[kind].values())) for kind in {kind for pair in common for kind in pair}}
    found = []
    for pair, count in common.items():
        for image, mask in (pair, pair[::-1]):
            image_colors, mask_colors = colors[image], colors[mask]
            if image_colors is not None and mask_colors is not None:
                score = _score(image, mask, image_colors, mask_colors)
                found.append((score, count, image, mask))
    most = max(common.values(), default=0)
    found = [row for row in found if row[0] > 0 and 10 * row[1] >= most]  # not a few strays with telling names
    if not found:
        return None
    best = max(found, key=lambda row: row[:2])
    _, _, image, mask = best
    rivals = [next(iter(kinds[row[3]].values())) for row in found if row[:3] == best[:3] and row[3] != mask]
    return Sides(kinds[image], kinds[mask], parts_of, rivals=rivals)
