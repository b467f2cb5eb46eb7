"""The same picture in two splits, by its file, its content, its label or its name."""

import contextlib
import hashlib
import json
import os
from collections import Counter
from collections.abc import Hashable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np

from fastseg.data import home
from fastseg.data.pairs import Pair, Problem
from fastseg.data.split import Splits, contents
from fastseg.data.stats import UNUSABLE, keep

PEEK = 4096  # bytes in the middle of a file, read before all of it is


def pixel_digest(pixels: np.ndarray) -> str:
    """16 hex digits of uint8[H, W, 3]: equal for a picture and its copy in another lossless format."""
    state = hashlib.sha256(repr(pixels.shape).encode())
    state.update(np.ascontiguousarray(pixels).data)
    return state.hexdigest()[:16]


class Remembered:
    """Digests of decoded images that are kept in `home()`, each while its file has the size and time that it had.

    Where nothing can be kept, nothing is remembered.
    """

    def __init__(self, root: Path) -> None:
        self.path: Path | None = None
        self.used = 0  # how often it knew an image
        self._known: dict[str, list] = {}
        with contextlib.suppress(*UNUSABLE):
            name = hashlib.sha256(os.path.abspath(root).encode()).hexdigest()[:16]
            self.path = home() / "digests" / f"{name}.json"
            known = json.loads(self.path.read_text("utf-8"))
            self._known = {p: k for p, k in dict(known).items() if isinstance(k, list) and len(k) == 3}

    def of(self, image: str) -> str:
        """The digest of an image that is as it was, or ""."""
        size, changed, digest = self._known.get(os.path.abspath(image), (None, None, None))
        if isinstance(digest, str):
            with contextlib.suppress(OSError):
                file = os.stat(image)
                if (file.st_size, file.st_mtime_ns) == (size, changed):
                    self.used += 1
                    return digest
        return ""

    def keep(self, digests: Mapping[str, str]) -> None:
        """Remember these, by image, in place of all from before."""
        known = {}
        for image, digest in digests.items():
            with contextlib.suppress(OSError):
                file = os.stat(image)
                known[os.path.abspath(image)] = [file.st_size, file.st_mtime_ns, digest]
        if self.path and known != self._known:
            keep(self.path, known)


def byte_keys(images: Sequence[str], threads: int) -> dict[str, Hashable]:
    """What is equal for images whose files have the same bytes, and for no others; an image like no other has none.

    A file is read only as far as others are like it: not at all where no other has its size.
    """
    keys: dict[str, Hashable] = {}
    for image in images:
        with contextlib.suppress(OSError):  # whose look at it says so
            keys[image] = os.path.getsize(image)
    with ThreadPoolExecutor(threads) as pool:
        for look in (_peek, _file_digest):
            number = Counter(keys.values())
            left = [image for image, key in keys.items() if number[key] > 1]
            keys = {image: (keys[image], found) for image, found in zip(left, pool.map(look, left), strict=True)}
    return keys


def _peek(image: str) -> bytes | str:
    try:
        with open(image, "rb") as file:
            file.seek(max(0, os.fstat(file.fileno()).st_size - PEEK) // 2)
            return file.read(PEEK)
    except OSError:
        return image  # like no other


def _file_digest(image: str) -> str:
    try:
        with open(image, "rb") as file:
            return hashlib.file_digest(file, "sha256").hexdigest()
    except OSError:
        return image


def in_two_splits(splits: Splits, content: Mapping[str, Hashable]) -> tuple[list[Problem], list[Problem]]:
    """Images of which an earlier split has the same picture (errors), or perhaps the same (warnings).

    It is the same by its file, its content, its label file, or its name beside it in the same folder (`a.png` and
    `a.jpg`). A name alone says little, since names begin anew in each folder (train/1.png, test/1.png); where only few
    names do, the photo may have been stored anew.

    Args:
        content: of each image, what is equal for equal pictures; an image that is not there equals none.
    """
    errors, warnings = [], []
    seen: dict[Hashable, tuple[str, Pair]] = {}  # what a picture is known by -> the first split and pair that has it
    names: dict[str, tuple[str, Pair]] = {}
    for split, pairs in splits.items():
        known = [(pair, _known_by(pair, content)) for pair in pairs]
        namesakes = []
        for pair, ways in known:
            again = [(how, *seen[key]) for how, key in ways if key in seen]
            if again:
                how, other_split, other = again[0]
                detail = f"{other_split} has {how}" + (f", {other.image}" if other.image != pair.image else "")
                told = f"is in the split {split}, and {detail}: take it out of one of the two"
                errors.append(Problem(pair.image, told, "twice", detail))
            elif pair.stem in names:
                namesakes.append((pair, *names[pair.stem]))
        if 2 * len(namesakes) < len(pairs):
            for pair, other_split, other in namesakes:
                detail = f"{other_split} has {other.image}"
                told = f"{detail}, of the same name and other content: if it is the same photo, take one of them out"
                warnings.append(Problem(pair.image, told, "namesakes", detail))
        for pair, ways in known:
            names.setdefault(pair.stem, (split, pair))
            for _, key in ways:
                seen.setdefault(key, (split, pair))
    return errors, warnings


def _known_by(pair: Pair, content: Mapping[str, Hashable]) -> list[tuple[str, Hashable]]:
    """How a picture would be called the same, and what is equal then; the most certain first."""
    ways: list[tuple[str, Hashable]] = []
    with contextlib.suppress(OSError):
        file = os.stat(pair.image)  # links, and folders of two names, lead to one file
        ways.append(("the same file", ("file", file.st_dev, file.st_ino)))
    if pair.image in content:
        ways.append(("the same content", ("content", content[pair.image])))
    # By its path alone: stores that keep equal files once link many labels of nothing but background to one.
    ways.append(("the same label", ("label", pair.label)))
    return [*ways, ("the same name in its folder", ("name", os.path.dirname(pair.image), pair.stem))]


def validated_too(root: Path, train: Sequence[Pair], found: Sequence[str], val: Sequence[Pair], threads: int) -> int:
    """How many images to validate are trained on too, as far as that is cheap to tell at a run's start.

    That is by the file, by the bytes of those files that have the size of one to train, and by the decoded content
    where `data check` has left it.

    Args:
        root: of the data set.
        found: the digests of the training images' files, as `split.contents` gives them.
    """
    known = Remembered(root)
    files = [os.stat(pair.image) for pair in train]
    same = {(file.st_dev, file.st_ino) for file in files} | {known.of(pair.image) for pair in train} - {""}
    sizes = {file.st_size for file in files}
    again, left = 0, []
    for pair in val:
        file = os.stat(pair.image)
        if (file.st_dev, file.st_ino) in same or known.of(pair.image) in same:
            again += 1
        elif file.st_size in sizes:
            left.append(pair)
    trained = set(found)
    return again + sum(content in trained for content in contents(left, threads))
