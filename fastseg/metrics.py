"""Scores from one integer confusion matrix, summed over the whole split and never averaged per image."""

from dataclasses import dataclass

import numpy as np


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
        rows = zip(names, self.iou, self.accuracy, self.pixels, strict=True)
        return {
            "miou": null_if_nan(self.miou),
            "global_accuracy": null_if_nan(self.global_accuracy),
            "mean_accuracy": null_if_nan(self.mean_accuracy),
            "fw_iou": null_if_nan(self.fw_iou),
            "absent": self.absent(names),
            "classes": [
                {"name": name, "iou": null_if_nan(iou), "accuracy": null_if_nan(accuracy), "pixels": int(pixels)}
                for name, iou, accuracy, pixels in rows
            ],
        }


def null_if_nan(value: float) -> float | None:
    """A float that JSON can hold: None for NaN."""
    return None if np.isnan(value) else float(value)


def _ratio(part: np.ndarray, whole: np.ndarray) -> np.ndarray:
    part = np.asarray(part, np.float64)
    return np.divide(part, whole, out=np.full(part.shape, np.nan), where=np.asarray(whole) > 0)


def _mean(values: np.ndarray) -> float:
    present = values[~np.isnan(values)]
    return float(present.mean()) if len(present) else float("nan")
