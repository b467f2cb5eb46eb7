"""Class frequencies of a split, and the loss weights that follow from them."""

from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass

import numpy as np

from fastseg.data.classes import UNKNOWN, VOID, ClassMap
from fastseg.data.decode import decode_label
from fastseg.data.layouts import Pair
from fastseg.errors import FastsegError

WEIGHTINGS = ("median-frequency", "sqrt-median-frequency", "none")


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
