"""The highest-scoring class of each label pixel, counted against its label in one pass.

Scores smaller or larger than the labels are resized bilinearly first (half-pixel centres), in registers. Nothing of
the labels' size is written but, where asked for, the predictions themselves.
"""

import torch
import torch.nn.functional as F

from fastseg.kernels.launch import operator


def torch_confusion(
    counts_CC: torch.Tensor,
    scores_BChw: torch.Tensor,
    labels_BHW: torch.Tensor,
    predictions_BHW: torch.Tensor | None = None,
) -> None:
    """With PyTorch's operations: as `confusion`."""
    scores, classes = scores_BChw, len(counts_CC)
    if scores.shape[-2:] != labels_BHW.shape[-2:]:
        scores = F.interpolate(scores.float(), labels_BHW.shape[-2:], mode="bilinear", align_corners=False)
    prediction = scores.argmax(1)
    if predictions_BHW is not None:
        predictions_BHW.copy_(prediction)
    # Labels that do not count meet in a bin beyond the matrix.
    pairs = torch.where(labels_BHW < classes, labels_BHW.long() * classes + prediction, classes**2)
    counts_CC += torch.bincount(pairs.flatten(), minlength=classes**2 + 1)[:-1].view_as(counts_CC)


@operator(
    "confusion(Tensor(a!) counts, Tensor scores, Tensor labels, Tensor(b!)? predictions=None) -> ()",
    fake=lambda *_: None,
    leading=1,
)
def confusion(
    counts_CC: torch.Tensor,
    scores_BChw: torch.Tensor,
    labels_BHW: torch.Tensor,
    predictions_BHW: torch.Tensor | None = None,
) -> None:
    """Count in place: counts[i, j] += pixels labelled i whose highest score, after resizing, is class j's.

    The first of equal scores wins and NaN is higher than any number, as in torch.argmax; labels >= C count nowhere.

    Args:
        counts_CC: int64[C, C], contiguous.
        scores_BChw: a floating-point type, resized in fp32 where (h, w) is not (H, W).
        labels_BHW: uint8.
        predictions_BHW: uint8, contiguous, filled with the classes where given.
    """
    torch_confusion(counts_CC, scores_BChw, labels_BHW, predictions_BHW)
