"""Triton kernel of `fastseg.kernels.confusion`.

A program holds a tile of pixels x all classes, counts its pixels in a histogram of its own, and adds that to the
matrix with one atomic per entry that occurs. Integers, so the order of the additions does not matter.
"""

import torch
import triton
import triton.language as tl

from fastseg.kernels import plan
from fastseg.kernels.launch import channels_last

# A histogram of more bins than this is slower than one atomic per pixel, and soon larger than shared memory.
MOST_BINS = 4096


@triton.jit
def source(position, scale, size):
    """The two neighbours of an output position in the input and the weight of the second; as torch's bilinear."""
    place = tl.maximum((position.to(tl.float32) + 0.5) * scale - 0.5, 0.0)
    first = tl.minimum(place.to(tl.int32), size - 1)
    return first, tl.minimum(first + 1, size - 1), place - first.to(tl.float32)


@triton.jit
def scores_at(scores_ptr, image, row, column, C, h, w, classes, exists):
    """fp32 scores of one input pixel per output pixel, -inf beyond C."""
    offset = ((image * h + row) * w + column).to(tl.int64)[:, None] * C + classes
    return tl.load(scores_ptr + offset, exists, -float("inf")).to(tl.float32)


@triton.jit
def confusion_kernel(
    scores_ptr,
    labels_ptr,
    counts_ptr,
    predictions_ptr,
    pixels,
    C,
    H,
    W,
    h,
    w,
    scale_y,
    scale_x,
    PIXELS: tl.constexpr,
    CLASSES: tl.constexpr,
    BINS: tl.constexpr,
    RESIZE: tl.constexpr,
    KEEP: tl.constexpr,
):
    pixel = tl.program_id(0) * PIXELS + tl.arange(0, PIXELS)
    image, row, column = pixel // W // H, pixel // W % H, pixel % W
    classes = tl.arange(0, CLASSES)[None, :]
    exists = (pixel < pixels)[:, None] & (classes < C)
    if RESIZE:
        top, bottom, down = source(row, scale_y, h)
        left, right, across = source(column, scale_x, w)
        down, across = down[:, None], across[:, None]
        a = scores_at(scores_ptr, image, top, left, C, h, w, classes, exists)
        b = scores_at(scores_ptr, image, top, right, C, h, w, classes, exists)
        c = scores_at(scores_ptr, image, bottom, left, C, h, w, classes, exists)
        d = scores_at(scores_ptr, image, bottom, right, C, h, w, classes, exists)
        scores = (1 - down) * ((1 - across) * a + across * b) + down * ((1 - across) * c + across * d)
        scores = tl.where(exists, scores, -float("inf"))
    else:
        scores = scores_at(scores_ptr, image, row, column, C, h, w, classes, exists)

    nan = scores != scores
    has_nan = tl.max(nan.to(tl.int32), 1) > 0
    highest = tl.where(has_nan[:, None], nan, scores == tl.max(scores, 1)[:, None])
    prediction = tl.min(tl.where(highest, classes, CLASSES), 1)
    if KEEP:
        tl.store(predictions_ptr + pixel, prediction.to(tl.uint8), pixel < pixels)

    label = tl.load(labels_ptr + pixel, pixel < pixels, 255).to(tl.int32)
    counted = (label < C) & (pixel < pixels)
    pair = label * C + prediction
    if BINS > 0:
        counts = tl.histogram(tl.where(counted, pair, 0), BINS, counted)
        entry = tl.arange(0, BINS)
        tl.atomic_add(counts_ptr + entry, counts.to(tl.int64), (entry < C * C) & (counts > 0), sem="relaxed")
    else:
        one = tl.full([PIXELS], 1, tl.int64)
        tl.atomic_add(counts_ptr + pair, one, counted, sem="relaxed")


def confusion(
    counts_CC: torch.Tensor,
    scores_BChw: torch.Tensor,
    labels_BHW: torch.Tensor,
    predictions_BHW: torch.Tensor | None = None,
) -> None:
    """See `fastseg.kernels.confusion.confusion`."""
    if not counts_CC.is_contiguous() or not (predictions_BHW is None or predictions_BHW.is_contiguous()):
        raise ValueError("confusion: counts and predictions are written in place and have to be contiguous")
    scores_BChw, labels_BHW = channels_last(scores_BChw), labels_BHW.contiguous()
    classes, small, large = scores_BChw.shape[1], scores_BChw.shape[-2:], labels_BHW.shape[-2:]
    (rows, width), bins = plan.score_tile(classes), triton.next_power_of_2(classes**2)
    confusion_kernel[(plan.cdiv(labels_BHW.numel(), rows),)](
        scores_BChw,
        labels_BHW,
        counts_CC,
        labels_BHW if predictions_BHW is None else predictions_BHW,
        labels_BHW.numel(),
        classes,
        *large,
        *small,
        small[0] / large[0],
        small[1] / large[1],
        PIXELS=rows,
        CLASSES=width,
        BINS=bins if bins <= MOST_BINS else 0,
        RESIZE=small != large,
        KEEP=predictions_BHW is not None,
        num_warps=plan.STREAM_WARPS,
    )
