"""Triton kernels of `fastseg.kernels.cross_entropy`: a program holds a tile of pixels x all classes, in fp32."""

import functools
from collections.abc import Callable

import torch
import triton
import triton.language as tl

from fastseg.kernels.launch import cdiv, channels_last

ELEMENTS, WARPS = 2048, 4
LABELS = 1024  # labels per program of the weight sum
PARTS = 1024  # parts that are added at once


@triton.jit
def tile_of_scores(logits_ptr, labels_ptr, pixels, C, PIXELS: tl.constexpr, CLASSES: tl.constexpr):
    """Scores fp32[PIXELS, CLASSES] (-inf beyond C), labels and where they count, and the scores' offsets and mask."""
    pixel = tl.program_id(0) * PIXELS + tl.arange(0, PIXELS)
    column = tl.arange(0, CLASSES)[None, :]
    exists = (pixel < pixels)[:, None] & (column < C)
    offset = pixel.to(tl.int64)[:, None] * C + column
    scores = tl.load(logits_ptr + offset, exists, -float("inf")).to(tl.float32)
    label = tl.load(labels_ptr + pixel, pixel < pixels, 255).to(tl.int32)
    return scores, label, (label < C) & (pixel < pixels), column, offset, exists


@triton.jit
def forward_kernel(
    logits_ptr, labels_ptr, weights_ptr, parts_ptr, pixels, C, PIXELS: tl.constexpr, CLASSES: tl.constexpr
):
    scores, label, counted, column, _, _ = tile_of_scores(logits_ptr, labels_ptr, pixels, C, PIXELS, CLASSES)
    top = tl.max(scores, 1)
    # -log softmax = log(sum(exp(s - top))) + top - s[label]
    log_sum = tl.log(tl.sum(tl.exp(scores - top[:, None]), 1)) + top
    chosen = tl.sum(tl.where(column == label[:, None], scores, 0.0), 1)
    weight = tl.load(weights_ptr + label, counted, 0.0)
    loss = tl.where(counted, weight * (log_sum - chosen), 0.0)
    tl.store(parts_ptr + tl.program_id(0), tl.sum(loss, 0))


@triton.jit
def backward_kernel(
    upstream_ptr, logits_ptr, labels_ptr, weights_ptr, out_ptr, pixels, C, PIXELS: tl.constexpr, CLASSES: tl.constexpr
):
    scores, label, counted, column, offset, exists = tile_of_scores(logits_ptr, labels_ptr, pixels, C, PIXELS, CLASSES)
    powers = tl.exp(scores - tl.max(scores, 1)[:, None])
    softmax = powers / tl.sum(powers, 1)[:, None]
    scale = tl.load(weights_ptr + label, counted, 0.0) * tl.load(upstream_ptr)
    # weight * (softmax - one_hot(label))
    out = (softmax - tl.where(column == label[:, None], 1.0, 0.0)) * scale[:, None]
    out = tl.where(counted[:, None], out, 0.0)
    tl.store(out_ptr + offset, out.to(out_ptr.dtype.element_ty), exists)


@triton.jit
def weight_sum_kernel(labels_ptr, weights_ptr, parts_ptr, pixels, C, PIXELS: tl.constexpr):
    pixel = tl.program_id(0).to(tl.int64) * PIXELS + tl.arange(0, PIXELS)
    label = tl.load(labels_ptr + pixel, pixel < pixels, 255).to(tl.int32)
    weight = tl.load(weights_ptr + label, (label < C) & (pixel < pixels), 0.0)
    tl.store(parts_ptr + tl.program_id(0), tl.sum(weight, 0))


@triton.jit
def sum_kernel(parts_ptr, sum_ptr, parts, PARTS: tl.constexpr):
    """The sum of parts, in a fixed order."""
    total = tl.zeros([PARTS], tl.float32)
    for start in range(0, parts, PARTS):
        part = start + tl.arange(0, PARTS)
        total += tl.load(parts_ptr + part, part < parts, 0.0)
    tl.store(sum_ptr, tl.sum(total, 0))


@functools.cache
def _over(kernel, pixels: int, classes: int) -> tuple[Callable[..., None], int]:
    """A kernel's launcher over tiles of pixels with all classes, and how many of them there are."""
    width = triton.next_power_of_2(classes)
    rows = max(1, ELEMENTS // width)
    tiles = cdiv(pixels, rows)
    return functools.partial(kernel[(tiles,)], PIXELS=rows, CLASSES=width, num_warps=WARPS), tiles


def _sum(parts: torch.Tensor) -> torch.Tensor:
    total = parts.new_empty(())
    sum_kernel[(1,)](parts, total, len(parts), PARTS=PARTS, num_warps=WARPS)
    return total


def weight_sum(labels: torch.Tensor, weights_C: torch.Tensor) -> torch.Tensor:
    """See `fastseg.kernels.cross_entropy.weight_sum`."""
    labels, weights_C = labels.contiguous(), weights_C.contiguous()
    pixels = labels.numel()
    parts = weights_C.new_empty(cdiv(pixels, LABELS), dtype=torch.float32)
    weight_sum_kernel[(len(parts),)](labels, weights_C, parts, pixels, len(weights_C), PIXELS=LABELS, num_warps=WARPS)
    return _sum(parts)


def cross_entropy_sum(logits_BCHW: torch.Tensor, labels_BHW: torch.Tensor, weights_C: torch.Tensor) -> torch.Tensor:
    """See `fastseg.kernels.cross_entropy.cross_entropy_sum`."""
    logits_BCHW, labels_BHW, weights_C = channels_last(logits_BCHW), labels_BHW.contiguous(), weights_C.contiguous()
    pixels, classes = labels_BHW.numel(), logits_BCHW.shape[1]
    launch, tiles = _over(forward_kernel, pixels, classes)
    parts = weights_C.new_empty(tiles, dtype=torch.float32)
    launch(logits_BCHW, labels_BHW, weights_C, parts, pixels, classes)
    return _sum(parts)


def cross_entropy_backward(
    logits_BCHW: torch.Tensor, labels_BHW: torch.Tensor, weights_C: torch.Tensor, gradient: torch.Tensor
) -> torch.Tensor:
    """See `fastseg.kernels.cross_entropy.cross_entropy_backward`."""
    logits_BCHW, labels_BHW, weights_C = channels_last(logits_BCHW), labels_BHW.contiguous(), weights_C.contiguous()
    pixels, classes = labels_BHW.numel(), logits_BCHW.shape[1]
    out = torch.empty_like(logits_BCHW)
    launch, _ = _over(backward_kernel, pixels, classes)
    launch(gradient, logits_BCHW, labels_BHW, weights_C, out, pixels, classes)
    return out
