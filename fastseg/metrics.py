"""Scores from one integer confusion matrix, summed over the whole split and never averaged per image.

The images' own matrices say which of them are worst, and how sure a score is.
"""

from collections.abc import Iterator
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np

RESAMPLES = 2000
DRAWN = 1 << 21  # images of samples that are in memory at a time, 8 bytes each


@dataclass(frozen=True)
class Scores:
    """All scores of a confusion matrix int64[C, C] (rows: label, columns: prediction).

    A class that is in neither labels nor predictions has IoU NaN and is left out of the means; a class without labels
    has accuracy NaN.
    """

    confusion: np.ndarray

    @property
    def pixels(self) -> np.ndarray:
        """int64[C]: labelled pixels of each class."""
        return self.confusion.sum(axis=1)

    @property
    def iou(self) -> np.ndarray:
        """float64[C]: true positives / (labelled + predicted - true positives)."""
        hits = np.diag(self.confusion)
        return _ratio(hits, self.pixels + self.confusion.sum(axis=0) - hits)

    @property
    def accuracy(self) -> np.ndarray:
        """float64[C]: the share of a class's pixels that is found (recall)."""
        return _ratio(np.diag(self.confusion), self.pixels)

    @property
    def precision(self) -> np.ndarray:
        """float64[C]: the share of the pixels predicted as a class that are of it."""
        return _ratio(np.diag(self.confusion), self.confusion.sum(axis=0))

    @property
    def dice(self) -> np.ndarray:
        """float64[C]: 2 x true positives / (labelled + predicted), which is the F1 score of pixels."""
        return _ratio(2 * np.diag(self.confusion), self.pixels + self.confusion.sum(axis=0))

    @property
    def normalised(self) -> np.ndarray:
        """float64[C, C]: where the labelled pixels of each class went, as shares; NaN in the row of an absent class."""
        return _ratio(self.confusion, np.broadcast_to(self.pixels[:, None], self.confusion.shape))

    @property
    def miou(self) -> float:
        return _mean(self.iou)

    @property
    def mean_accuracy(self) -> float:
        return _mean(self.accuracy)

    @property
    def global_accuracy(self) -> float:
        return float(_ratio(np.diag(self.confusion).sum(), self.pixels.sum()))

    @property
    def fw_iou(self) -> float:
        """IoU weighted by the classes' labelled pixels (Long, Shelhamer, Darrell 2015)."""
        share = _ratio(self.pixels, self.pixels.sum())
        return float(np.nansum(share * self.iou)) if self.pixels.sum() else float("nan")

    def absent(self, names: tuple[str, ...]) -> list[str]:
        """Classes in neither labels nor predictions."""
        return [name for name, iou in zip(names, self.iou, strict=True) if np.isnan(iou)]

    def summary(self, names: tuple[str, ...]) -> dict:
        """The scores as a JSON document: null where a score is undefined."""
        columns = {name: getattr(self, name) for name in ("iou", "accuracy", "precision", "dice")}
        return {
            "miou": null_if_nan(self.miou),
            "global_accuracy": null_if_nan(self.global_accuracy),
            "mean_accuracy": null_if_nan(self.mean_accuracy),
            "fw_iou": null_if_nan(self.fw_iou),
            "absent": self.absent(names),
            "classes": [
                {"name": name, **{key: null_if_nan(column[c]) for key, column in columns.items()}}
                | {"pixels": int(self.pixels[c])}
                for c, name in enumerate(names)
            ],
        }


class Interval(NamedTuple):
    """A figure and where it lies with 95 % confidence."""

    value: float
    low: float
    high: float


def miou_of(confusions_NCC: np.ndarray) -> np.ndarray:
    """float64[N]: mIoU of each matrix; NaN where nothing was labelled."""
    hits = np.diagonal(confusions_NCC, axis1=-2, axis2=-1)
    ious = _ratio(hits, confusions_NCC.sum(-1) + confusions_NCC.sum(-2) - hits)
    present = ~np.isnan(ious)
    return _ratio(np.where(present, ious, 0).sum(-1), present.sum(-1))


def resampled(images: int) -> Iterator[np.ndarray]:
    """int64[n, images], of all RESAMPLES samples with replacement a few at a time: how often each image is in each.

    Always the same ones.
    """
    rng, shares = np.random.default_rng(0), np.full(images, 1 / images)
    for start in range(0, RESAMPLES, few := max(1, DRAWN // images)):
        yield rng.multinomial(images, shares, size=min(few, RESAMPLES - start))


def bootstrap(*confusions_NCC: np.ndarray) -> np.ndarray:
    """float64[K, RESAMPLES]: mIoU of K networks over each sample of images, as `resampled` gives them."""
    images, classes, _ = confusions_NCC[0].shape
    flat = [each.reshape(images, -1) for each in confusions_NCC]
    parts = [
        [miou_of((weights @ each).reshape(-1, classes, classes)) for each in flat] for weights in resampled(images)
    ]
    return np.concatenate(parts, axis=1)


def interval(value: float, samples: np.ndarray) -> Interval:
    """The percentile interval of bootstrap samples (Efron and Tibshirani 1993, chapter 13)."""
    low, high = np.nanquantile(samples, [0.025, 0.975])
    return Interval(value, float(low), float(high))


class Comparison(NamedTuple):
    """What B changed against A, on the same images.

    Attributes:
        difference: of mIoU, B less A, by a paired bootstrap over images.
        chance: how often the samples say the opposite, doubled: a two-sided p-value.
        better, worse: images whose own mIoU rose or fell.
    """

    difference: Interval
    chance: float
    better: int
    worse: int


def compare(a_NCC: np.ndarray, b_NCC: np.ndarray) -> Comparison:
    """Two networks on the same images, in the same order."""
    before, now = bootstrap(a_NCC, b_NCC)
    samples = now - before
    value = Scores(b_NCC.sum(0)).miou - Scores(a_NCC.sum(0)).miou
    each = miou_of(b_NCC) - miou_of(a_NCC)
    chance = 2 * min((samples <= 0).mean(), (samples >= 0).mean())
    return Comparison(interval(value, samples), min(1.0, float(chance)), int((each > 0).sum()), int((each < 0).sum()))


def null_if_nan(value: float) -> float | None:
    """A float that JSON can hold: None for NaN."""
    return None if np.isnan(value) else float(value)


def _ratio(part: np.ndarray, whole: np.ndarray) -> np.ndarray:
    part = np.asarray(part, np.float64)
    return np.divide(part, whole, out=np.full(part.shape, np.nan), where=np.asarray(whole) > 0)


def _mean(values: np.ndarray) -> float:
    present = values[~np.isnan(values)]
    return float(present.mean()) if len(present) else float("nan")
