"""Class frequencies of a split, and the loss weights that follow from them."""

import contextlib
import dataclasses
import hashlib
import json
import os
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from fastseg.data import home
from fastseg.data.classes import UNKNOWN, VOID, ClassMap
from fastseg.data.decode import decode_label
from fastseg.data.layouts import Pair
from fastseg.errors import FastsegError, UsageError

WEIGHTINGS = ("median-frequency", "sqrt-median-frequency", "none")
REMEMBERED = 100  # files of a kind that are kept at most; the counts of several processes' shares are as many
# What reading a file of any content may raise, or a user without a home folder.
UNUSABLE = (OSError, ValueError, TypeError, KeyError, RecursionError, UsageError)


@dataclass(frozen=True)
class Counts:
    """Pixel counts of a split, at the labels' own resolution.

    `pixels[c]`: pixels of class c. `image_pixels[c]`: all pixels, void too, of the images in which c appears, as
    MATLAB's `countEachLabel` has it.
    """

    images: int
    pixels: np.ndarray
    image_pixels: np.ndarray
    void_pixels: int

    @property
    def frequency(self) -> np.ndarray:
        """float64[C] = pixels / image_pixels; 0 for a class that never appears."""
        return np.divide(self.pixels, self.image_pixels, out=np.zeros(len(self.pixels)), where=self.image_pixels > 0)


def count(pairs: Sequence[Pair], classes: ClassMap, threads: int, *, unknown: int = UNKNOWN) -> Counts:
    """Count the classes of all labels.

    Raises:
        FastsegError: a label holds a value outside the class map (unless `unknown` is VOID).
    """
    from fastseg.data.check import off_map

    def one(pair: Pair) -> np.ndarray:
        return np.bincount(decode_label(pair.label, classes, unknown).ravel(), minlength=256)

    num_classes = len(classes.names)
    pixels, image_pixels, void = np.zeros(num_classes, np.int64), np.zeros(num_classes, np.int64), 0
    with ThreadPoolExecutor(threads) as pool:
        for pair, histogram in zip(pairs, pool.map(one, pairs), strict=True):
            if histogram[UNKNOWN]:
                raise FastsegError(f"{pair.label}: {off_map(pair.label, classes)}")
            pixels += histogram[:num_classes]
            image_pixels += np.where(histogram[:num_classes] > 0, histogram.sum(), 0)
            void += int(histogram[VOID])
    return Counts(len(pairs), pixels, image_pixels, void)


def count_once(pairs: Sequence[Pair], classes: ClassMap, threads: int, *, unknown: int = UNKNOWN) -> Counts:
    """`count`, or what it has found before, while each label has the path, size and time of change that it had.

    What was found is kept in `home()`, where that can be written to.

    Raises:
        FastsegError: as `count`.
    """
    path = None
    with contextlib.suppress(OSError, UsageError):  # a label that is gone, which `count` names; nobody's home
        path = home() / "counts" / f"{_digest(pairs, classes, unknown)}.json"
    if path and (known := _recall(path, len(pairs), len(classes.names))):
        return known
    found = count(pairs, classes, threads, unknown=unknown)
    if path:
        arrays = {"pixels": found.pixels.tolist(), "image_pixels": found.image_pixels.tolist()}
        keep(path, dataclasses.asdict(found) | arrays)
    return found


def keep(path: Path, document: object) -> None:
    """Write what was found to a file in `home()`, if that can be written to, in place of the oldest of its folder."""
    from fastseg.runs import write_json

    with contextlib.suppress(OSError):
        write_json(path, document)
        for old in sorted(path.parent.glob("*.json*"), key=os.path.getmtime)[:-REMEMBERED]:
            old.unlink(missing_ok=True)


def _digest(pairs: Sequence[Pair], classes: ClassMap, unknown: int) -> str:
    """Changes with everything that counts hang on."""
    maps = [sorted((table or {}).items()) for table in (classes.from_index, classes.from_color)]
    state = hashlib.sha256(repr((classes.names, maps, unknown)).encode())
    for pair in pairs:
        file = os.stat(pair.label)
        state.update(repr((os.path.abspath(pair.label), file.st_size, file.st_mtime_ns)).encode())
    return state.hexdigest()


def _recall(path: Path, images: int, num_classes: int) -> Counts | None:
    """What was kept there; None where that is nothing, or cannot be counts of so many images and classes."""
    try:
        kept = json.loads(path.read_text("utf-8"))
        numbers = [kept["images"], kept["void_pixels"], *kept["pixels"], *kept["image_pixels"]]
        sizes = [kept["images"], len(kept["pixels"]), len(kept["image_pixels"])]
        if sizes != [images, num_classes, num_classes] or not all(type(n) is int and 0 <= n < 2**63 for n in numbers):
            return None
        os.utime(path)  # what is used stays
    except UNUSABLE:
        return None
    return Counts(images, np.array(kept["pixels"]), np.array(kept["image_pixels"]), kept["void_pixels"])


def all_void(split: str, images: int, classes: ClassMap) -> str:
    """What to say of a split whose labels have no pixel of any class: there is nothing to learn from or to score."""
    return (
        f"all pixels of the {images} labels of {split} are void, so that none has a class to learn or to score: "
        f"a class map that fits them is wanted (this one is {classes.allowed}), or other labels"
    )


def has_classes(pairs: Sequence[Pair], classes: ClassMap, *, unknown: int = UNKNOWN) -> bool:
    """Whether any label has a pixel that is not void; mostly the first one tells."""
    return any((decode_label(pair.label, classes, unknown) != VOID).any() for pair in pairs)


def class_weights(counts: Counts, weighting: str) -> np.ndarray:
    """float64[C] loss weights; a class that never appears gets 0 and stays out of the median.

    median-frequency: median of the frequencies / frequency (SegNet, section 3.1, after Eigen and Fergus 2015).
    sqrt-median-frequency: its square root, which trades rare classes' recall for their precision.
    """
    present = counts.frequency > 0
    if weighting == "none":
        return present.astype(np.float64)
    median = np.median(counts.frequency[present]) if present.any() else 0.0
    weights = np.divide(median, counts.frequency, out=np.zeros(len(present)), where=present)
    return np.sqrt(weights) if weighting == "sqrt-median-frequency" else weights
