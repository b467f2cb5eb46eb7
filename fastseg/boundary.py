"""The boundary F1 score: how well the contours of classes are met, which IoU hardly sees.

Csurka, Larlus, Perronnin, "What is a good evaluation measure for semantic segmentation?", BMVC 2013: per image and
class, precision is the share of the prediction's contour within a tolerance of the label's, recall the reverse, and the
score is their harmonic mean. The tolerance is 0.75 % of the image's diagonal, as in MATLAB's `bfscore`.
"""

import math

import torch
import torch.nn.functional as F

TOLERANCE = 0.0075


def contours(classes_HW: torch.Tensor, num_classes: int) -> torch.Tensor:
    """bool[C, H, W]: pixels of each class beside a pixel of another class, in any of the four directions.

    Neither the image's edge nor void (any value that is no class) is a contour.
    """
    edges = torch.zeros_like(classes_HW, dtype=torch.bool)
    known = classes_HW < num_classes
    for dim in (0, 1):
        size = classes_HW.shape[dim] - 1
        first, second = (classes_HW.narrow(dim, start, size) for start in (0, 1))
        differ = (first != second) & known.narrow(dim, 0, size) & known.narrow(dim, 1, size)
        for start in (0, 1):
            edges.narrow(dim, start, size).logical_or_(differ)
    classes = torch.arange(num_classes, dtype=classes_HW.dtype, device=classes_HW.device)
    return (classes_HW == classes[:, None, None]) & edges


def near(contours_CHW: torch.Tensor, radius: float) -> torch.Tensor:
    """bool[C, H, W]: pixels whose centre is within `radius` of a contour pixel's."""
    reach, (height, width) = math.floor(radius), contours_CHW.shape[1:]
    # Contour pixels in each stretch of a row are a difference of two running sums; a disk has a stretch per row.
    sums = F.pad(contours_CHW.int(), (reach + 1, reach, reach, reach)).cumsum(2, dtype=torch.int32)
    count = torch.zeros_like(contours_CHW, dtype=torch.int32)
    for row in range(-reach, reach + 1):
        half = math.floor(math.sqrt(radius**2 - row**2))
        line = sums[:, reach + row : reach + row + height]
        count += line[..., reach + 1 + half : reach + 1 + half + width]
        count -= line[..., reach - half : reach - half + width]
    return count > 0


def boundary_f1(label_HW: torch.Tensor, prediction_HW: torch.Tensor, num_classes: int) -> torch.Tensor:
    """float64[C] of one image: NaN for a class whose contour is in neither, 0 where it is in one alone.

    Void pixels of the label (any value that is no class) are void in the prediction too.
    """
    prediction = torch.where(label_HW < num_classes, prediction_HW, label_HW)
    radius = TOLERANCE * math.hypot(*label_HW.shape)
    wanted, found = contours(label_HW, num_classes), contours(prediction, num_classes)

    def share(of: torch.Tensor, by: torch.Tensor) -> torch.Tensor:
        return (of & by).sum((1, 2)).double() / of.sum((1, 2))  # NaN where there is none

    precision, recall = share(found, near(wanted, radius)), share(wanted, near(found, radius))
    score = 2 * precision * recall / (precision + recall)
    # Both there and nowhere near each other: 0, not 0 / 0. One of them there alone: 0.
    both, either = (found.any(2).any(1) & wanted.any(2).any(1)), (found.any(2).any(1) | wanted.any(2).any(1))
    return torch.where(both, score.nan_to_num(0.0), torch.where(either, 0.0, torch.nan).double())
