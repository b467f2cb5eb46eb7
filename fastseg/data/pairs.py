"""Pairs of an image and its label: what a data set is made of, and how two folders' files become it.

Nothing here opens an image. Pairs are matched by name, never by position, and are ordered by stem, so that the same
data in two layouts gives the same samples.
"""

import contextlib
import os
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from fractions import Fraction
from pathlib import Path

from fastseg.data.classes import ClassMap
from fastseg.errors import FastsegError
from fastseg.texts import is_plain, shown

# Split -> the names that folders, lists and [splits.NAME] have for it, in any case.
SPLIT_NAMES = {"train": ("train",), "val": ("val", "valid", "validation"), "test": ("test",)}
SPLITS = tuple(SPLIT_NAMES)

# What Pillow registers as an image, less documents, films, icons, and formats of which it knows the name alone. Written
# down, since to ask Pillow takes 0.1 s: `tests/fastseg/data/test_pairs.py` compares.
_SUFFIXES = (
    ".apng .avif .avifs .blp .bmp .bw .dcx .dds .dib .ftc .ftu .gbr .gif .icb .iim .im .j2c .j2k .jfif .jp2 .jpc .jpe "
    ".jpeg .jpf .jpg .jpx .mpo .msp .palm .pbm .pcd .pcx .pfm .pgm .png .pnm .ppm .psd .pxr .qoi .ras .rgb .rgba .sgi "
    ".tga .tif .tiff .vda .vst .webp .xbm .xpm"
)
IMAGE_SUFFIXES = frozenset(_SUFFIXES.split())
NO_LABEL, NO_IMAGE = "no label of that name", "no image of that name"
RESULTS = ".predicted"  # in an output folder of `fastseg predict`: the names of the folders that it has made there
_COMPANIONS = {"__macosx", "thumbs.db", "desktop.ini"}


@dataclass(frozen=True)
class Pair:
    """An image file and its label file; `stem` is the image's name without suffix."""

    stem: str
    image: str
    label: str


@dataclass(frozen=True)
class Problem:
    """Something wrong with one file of a data set.

    Attributes:
        kind: what `data check` counts together, of `fastseg.data.findings.KINDS`; without one, what begins alike.
        detail: what differs from file to file, where one line names several.
    """

    file: str
    problem: str
    kind: str = ""
    detail: str = ""


@dataclass(frozen=True)
class HoldOut:
    """Which part of the training images validates: from `start` to `end` of their groups in the order of a seed.

    `said` is how the data set's description says it, such as "val=0.2".
    """

    said: str
    start: Fraction
    end: Fraction


@dataclass(frozen=True)
class Dataset:
    """What was found in a folder: all its pairs as `pool`, and its own `splits` (none where it defines none).

    Attributes:
        problems: of files, whatever they mean for training.
        missing: split -> those of `problems` by which its list names what is not there.
        hold_out: what part of `splits["train"]` validates, where the data set says so (see `fastseg.data.split`).
        groups: image file -> the group that it belongs to and is not parted from, where the data set says so.
        note: what else to say of its splits, for the line that names them.
    """

    root: Path
    layout: str
    classes: ClassMap
    pool: tuple[Pair, ...]
    splits: dict[str, tuple[Pair, ...]] = field(default_factory=dict)
    problems: tuple[Problem, ...] = ()
    missing: Mapping[str, tuple[Problem, ...]] = field(default_factory=dict)
    hold_out: HoldOut | None = None
    groups: Mapping[str, str] = field(default_factory=dict)
    note: str = ""


# What names a sample on both sides; and the files that claim it: one, unless names differ in what the key leaves out.
Key = tuple[str, ...]
Files = dict[Key, list[os.DirEntry[str]]]


def key_text(key: Key) -> str:
    """A key as one text."""
    return "/".join(part for part in key if part)


def split_of(name: str) -> str:
    """The split that a name stands for ("Valid" -> "val"), or the name itself."""
    return next((split for split, names in SPLIT_NAMES.items() if name.lower() in names), name)


def is_image(name: str) -> bool:
    """Whether a file name has the suffix of an image."""
    return os.path.splitext(name)[1].lower() in IMAGE_SUFFIXES


def is_companion(name: str) -> bool:
    """Whether a file or folder is what an operating system or a notebook leaves beside data: hidden, or known."""
    return name.startswith(".") or name.lower() in _COMPANIONS


def data_folders(folder: str | Path, names: Iterable[str]) -> list[str]:
    """Those folders in `folder`, of these names, that may hold data: no companions, and nothing that fastseg made.

    That are the folders that `fastseg predict` has noted in `RESULTS`, and runs.
    """
    made: set[str] = set()
    with contextlib.suppress(OSError):
        made = set((Path(folder) / RESULTS).read_text(encoding="utf-8", errors="replace").splitlines())
    return sorted(
        name
        for name in names
        if not is_companion(name)
        and name not in made
        and not all(os.path.isfile(os.path.join(folder, name, file)) for file in ("config.toml", "log.jsonl"))
    )


def walk(root: Path) -> Iterator[tuple[Path, list[str], list[str]]]:
    """`os.walk` through folders that may hold data and links to such, but not back into one that it is in already."""
    inside = {str(root): {os.path.realpath(root)}}
    for folder, folders, names in os.walk(root, followlinks=True):
        above, kept = inside.pop(folder), []
        for name in data_folders(folder, folders):
            path = os.path.join(folder, name)
            if (real := os.path.realpath(path)) not in above:
                inside[path] = above | {real}
                kept.append(name)
        folders[:] = kept
        yield Path(folder), folders, names


def entries(folder: str | Path) -> list[os.DirEntry[str]]:
    """What is in a folder, by name, without companions and what fastseg made."""
    with os.scandir(folder) as found:
        inside = sorted((entry for entry in found if not is_companion(entry.name)), key=lambda entry: entry.name)
    # A link to itself is no folder, where `entry.is_dir()` raises.
    folders = {e.name for e in inside if (os.path.isdir(e.path) if e.is_symlink() else e.is_dir())}
    theirs = folders - set(data_folders(folder, folders))
    return [entry for entry in inside if entry.name not in theirs]


def images_in(folder: Path, suffix: str = "") -> Files:
    """A folder's images by stem, without the `suffix` that labels have."""
    found: Files = {}
    for entry in entries(folder):
        if is_image(entry.name):
            found.setdefault((Path(entry.name).stem.removesuffix(suffix),), []).append(entry)
    return found


def named_splits(root: Path, ending: str = "") -> dict[str, str]:
    """Split -> the name of its folder in `root`, or of its file where an `ending` such as ".txt" is given.

    Raises:
        FastsegError: two names for one split.
    """
    found: dict[str, str] = {}
    for entry in entries(root):
        split = split_of(entry.name.removesuffix(ending))
        if split not in SPLITS or not entry.name.endswith(ending) or entry.is_dir() == bool(ending):
            continue
        if split in found:
            raise FastsegError(f"{root}: {found[split]} and {entry.name} are both for `{split}`: keep one of them")
        found[split] = entry.name
    return found


def fault(entry: os.DirEntry[str]) -> str | None:
    """Why an entry cannot be used as an image or label file, whatever it holds."""
    if not is_plain(entry.name):
        return "has a name that is not UTF-8, or has control characters: rename it"
    if entry.is_symlink() and not os.path.exists(entry.path):
        return f"is a broken link to {shown(os.readlink(entry.path))}: mend or remove it"
    if entry.is_dir():
        return "is a folder with the name of an image: rename or remove it"
    return None if entry.is_file() else "is a pipe or a device, no image: remove it"


def pair_up(images: Files, labels: Files) -> tuple[dict[Key, Pair], list[Problem]]:
    """Match images and labels by key; what cannot be used, or stands on one side only, is a problem.

    Where two files claim a key, nothing says which is meant, and neither is used.
    """
    problems, bad = [], set()
    for here, there, missing in ((images, labels, NO_LABEL), (labels, images, NO_IMAGE)):
        for key, (first, *others) in here.items():
            found = [(entry, wrong) for entry in (first, *others) if (wrong := fault(entry))]
            if others and not found:
                names = ", ".join(entry.name for entry in others)
                found = [(first, f"stands for the same sample as {names} beside it: keep one of them")]
            elif key not in there and not found:
                found = [(first, missing)]
            if found:
                bad.add(key)
                problems += [Problem(shown(entry.path), wrong) for entry, wrong in found]
    both = {key: (images[key][0], labels[key][0]) for key in images.keys() & labels.keys() - bad}
    pairs = {key: Pair(Path(image.name).stem, image.path, label.path) for key, (image, label) in both.items()}
    return dict(sorted(pairs.items(), key=lambda item: order(item[1]))), sorted(problems, key=lambda p: p.file)


def order(pair: Pair) -> tuple[bytes, str]:
    """What pairs are sorted by."""
    return pair.stem.encode(), pair.image


def pooled(splits: Mapping[str, tuple[Pair, ...]]) -> tuple[Pair, ...]:
    """All pairs of some splits, each once, in order."""
    return tuple(sorted({pair for pairs in splits.values() for pair in pairs}, key=order))
