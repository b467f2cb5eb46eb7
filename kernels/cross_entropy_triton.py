"""Triton kernels of `fastseg.kernels.cross_entropy`: a program holds tiles of pixels x all classes, in fp32.

Sums are one launch each: the last program to arrive adds up what all have left, in the order of the programs.
"""

import functools
from collections.abc import Callable
from typing import Any

import torch
import triton
import triton.language as tl

from fastseg.kernels import plan
from fastseg.kernels.cross_entropy import SMALLEST
from fastseg.kernels.launch import channels_last, scratch
from fastseg.kernels.reduce_triton import is_last


@triton.jit
def tile_of_scores(logits_ptr, labels_ptr, first, pixels, C, step, PIXELS: tl.constexpr, CLASSES: tl.constexpr):
    """Scores fp32[CLASSES, PIXELS] (-inf beyond C), labels and where they count, classes, pixels and which exist.

    `step`, 1, is how far a pixel's scores are from each other. The compiler must not know it: it would then give the
    classes of a pixel to neighbouring threads, whose maximum and sums take thrice the instructions. (Triton 3.6 does.)
    """
    pixel = first + tl.arange(0, PIXELS)
    row = tl.arange(0, CLASSES)[:, None]
    exists = (row < C) & (pixel < pixels)[None, :]
    scores = tl.load(logits_ptr + pixel.to(tl.int64)[None, :] * C + row * step, exists, -float("inf")).to(tl.float32)
    label = tl.load(labels_ptr + pixel, pixel < pixels, 255).to(tl.int32)
    return scores, label, (label < C) & (pixel < pixels), row, pixel, exists


@triton.jit
def divisor(total_ptr, SMALLEST: tl.constexpr):
    """The sum of weights, unless that is 0: so is the sum of losses then."""
    return tl.maximum(tl.load(total_ptr), SMALLEST)


@triton.jit
def sum_of_parts(parts_ptr, arrived_ptr, part, PARTS: tl.constexpr):
    """Leave this program's part; in the last program the sum of all, where `is_last`, which it gives too."""
    tl.store(parts_ptr + tl.program_id(0), part)
    last = is_last(arrived_ptr)
    total = 0.0
    if last:
        sums = tl.zeros([PARTS], tl.float32)
        for start in range(0, tl.num_programs(0), PARTS):
            place = start + tl.arange(0, PARTS)
            sums += tl.load(parts_ptr + place, place < tl.num_programs(0), 0.0, cache_modifier=".cg")
        total = tl.sum(sums, 0)
    return last, total


@triton.jit(do_not_specialize=["step"])
def forward_kernel(
    logits_ptr,
    labels_ptr,
    weights_ptr,
    total_ptr,
    loss_ptr,
    parts_ptr,
    arrived_ptr,
    pixels,
    C,
    step,
    share,
    PIXELS: tl.constexpr,
    CLASSES: tl.constexpr,
    PARTS: tl.constexpr,
    SMALLEST: tl.constexpr,
):
    losses = tl.zeros([PIXELS], tl.float32)
    first = tl.program_id(0) * share
    end = tl.minimum(first + share, pixels)
    for start in range(first, end, PIXELS):
        scores, label, counted, row, _, _ = tile_of_scores(logits_ptr, labels_ptr, start, end, C, step, PIXELS, CLASSES)
        top = tl.max(scores, 0)
        # -log softmax = log(sum(exp(s - top))) + top - s[label]
        log_sum = tl.log(tl.sum(tl.exp(scores - top[None, :]), 0)) + top
        chosen = tl.sum(tl.where(row == label[None, :], scores, 0.0), 0)
        weight = tl.load(weights_ptr + label, counted, 0.0)
        losses += tl.where(counted, weight * (log_sum - chosen), 0.0)
    last, loss = sum_of_parts(parts_ptr, arrived_ptr, tl.sum(losses, 0), PARTS)
    if last:
        tl.store(loss_ptr, tl.div_rn(loss, divisor(total_ptr, SMALLEST)))


@triton.jit(do_not_specialize=["step"])
def backward_kernel(
    upstream_ptr,
    logits_ptr,
    labels_ptr,
    weights_ptr,
    total_ptr,
    out_ptr,
    pixels,
    C,
    step,
    PIXELS: tl.constexpr,
    CLASSES: tl.constexpr,
    SMALLEST: tl.constexpr,
):
    first = tl.program_id(0) * PIXELS
    scores, label, counted, row, pixel, exists = tile_of_scores(
        logits_ptr, labels_ptr, first, pixels, C, step, PIXELS, CLASSES
    )
    powers = tl.exp(scores - tl.max(scores, 0)[None, :])
    softmax = powers * (1.0 / tl.sum(powers, 0))[None, :]
    upstream = tl.div_rn(tl.load(upstream_ptr), divisor(total_ptr, SMALLEST))
    scale = tl.load(weights_ptr + label, counted, 0.0) * upstream
    # weight * (softmax - one_hot(label))
    out = (softmax - tl.where(row == label[None, :], 1.0, 0.0)) * scale[None, :]
    out = tl.where(counted[None, :], out, 0.0)
    tl.store(out_ptr + pixel.to(tl.int64)[None, :] * C + row, out.to(out_ptr.dtype.element_ty), exists)


@triton.jit
def weight_sum_kernel(
    labels_ptr,
    weights_ptr,
    sum_ptr,
    parts_ptr,
    arrived_ptr,
    pixels,
    C,
    share,
    PIXELS: tl.constexpr,
    PARTS: tl.constexpr,
):
    weights = tl.zeros([PIXELS], tl.float32)
    first = tl.program_id(0).to(tl.int64) * share
    end = tl.minimum(first + share, pixels)
    for start in range(first, end, PIXELS):
        pixel = start + tl.arange(0, PIXELS)
        label = tl.load(labels_ptr + pixel, pixel < end, 255).to(tl.int32)
        weights += tl.load(weights_ptr + label, (label < C) & (pixel < end), 0.0)
    last, total = sum_of_parts(parts_ptr, arrived_ptr, tl.sum(weights, 0), PARTS)
    if last:
        tl.store(sum_ptr, total)


@functools.cache
def _summing(kernel: Any, pixels: int, height: int, multiprocessors: int, **options: Any) -> tuple[Any, int, int]:
    """The launcher of a sum over pixels, its programs, and the pixels of each."""
    programs, share = plan.sums(pixels, height, multiprocessors)
    options |= {"PIXELS": height, "PARTS": plan.SUMMED, "num_warps": plan.STREAM_WARPS}
    return functools.partial(kernel[(programs,)], **options), programs, share


@functools.cache
def _spreading(pixels: int, classes: int) -> Callable[..., None]:
    """The launcher of the gradient of scores."""
    height, width = plan.score_tile(classes)
    options = {"PIXELS": height, "CLASSES": width, "SMALLEST": SMALLEST, "num_warps": plan.STREAM_WARPS}
    return functools.partial(backward_kernel[(plan.cdiv(pixels, height),)], **options)


def weight_sum(labels: torch.Tensor, weights_C: torch.Tensor) -> torch.Tensor:
    """See `fastseg.kernels.cross_entropy.weight_sum`."""
    labels, weights_C = labels.contiguous(), weights_C.contiguous()
    pixels = labels.numel()
    launch, programs, share = _summing(weight_sum_kernel, pixels, plan.LABELS, plan.multiprocessors(labels.device))
    total = weights_C.new_empty((), dtype=torch.float32)
    launch(labels, weights_C, total, *scratch(labels.device, programs, 1), pixels, len(weights_C), share)
    return total


def cross_entropy(
    logits_BCHW: torch.Tensor, labels_BHW: torch.Tensor, weights_C: torch.Tensor, total: torch.Tensor
) -> torch.Tensor:
    """See `fastseg.kernels.cross_entropy.cross_entropy`."""
    logits_BCHW, labels_BHW, weights_C = channels_last(logits_BCHW), labels_BHW.contiguous(), weights_C.contiguous()
    pixels, classes = labels_BHW.numel(), logits_BCHW.shape[1]
    height, width = plan.score_tile(classes)
    many = plan.multiprocessors(logits_BCHW.device)
    launch, programs, share = _summing(forward_kernel, pixels, height, many, CLASSES=width, SMALLEST=SMALLEST)
    loss = total.new_empty(())
    parts = scratch(logits_BCHW.device, programs, 1)
    launch(logits_BCHW, labels_BHW, weights_C, total, loss, *parts, pixels, classes, 1, share)
    return loss


def cross_entropy_backward(
    logits_BCHW: torch.Tensor,
    labels_BHW: torch.Tensor,
    weights_C: torch.Tensor,
    total: torch.Tensor,
    gradient: torch.Tensor,
) -> torch.Tensor:
    """See `fastseg.kernels.cross_entropy.cross_entropy_backward`."""
    logits_BCHW, labels_BHW, weights_C = channels_last(logits_BCHW), labels_BHW.contiguous(), weights_C.contiguous()
    pixels, classes = labels_BHW.numel(), logits_BCHW.shape[1]
    out = torch.empty_like(logits_BCHW)
    _spreading(pixels, classes)(gradient, logits_BCHW, labels_BHW, weights_C, total, out, pixels, classes, 1)
    return out
