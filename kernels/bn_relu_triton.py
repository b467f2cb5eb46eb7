"""Triton kernels of `fastseg.kernels.bn_relu`: a program holds tiles of pixels x channels, in fp32.

A reduction is one launch: each program leaves a part, and the last to arrive merges all of them, in the order of the
programs and not of their arrival, so that the bits are the same each time. `launch.scratch` holds parts and counters.
"""

import functools
from collections.abc import Callable
from typing import Any

import torch
import triton
import triton.language as tl

from fastseg.kernels import plan
from fastseg.kernels.launch import channels_last, empty, halved, over, scratch
from fastseg.kernels.pool_triton import corner, window
from fastseg.kernels.reduce_triton import is_last

Tensor = torch.Tensor


@triton.jit
def channel_range(C, CHANNELS: tl.constexpr):
    """This program's channels and which of them exist."""
    channel = tl.program_id(1) * CHANNELS + tl.arange(0, CHANNELS)
    return channel, channel < C


@triton.jit
def scaling(weight_ptr, bias_ptr, mean_ptr, variance_ptr, channel, exists, eps):
    """Per channel: mean, 1 / sqrt(variance + eps), that times the weight, bias."""
    mean = tl.load(mean_ptr + channel, exists, 0.0).to(tl.float32)
    inverse = 1.0 / tl.sqrt(tl.load(variance_ptr + channel, exists, 1.0).to(tl.float32) + eps)
    weight = tl.load(weight_ptr + channel, exists, 0.0).to(tl.float32)
    bias = tl.load(bias_ptr + channel, exists, 0.0).to(tl.float32)
    return mean, inverse, inverse * weight, bias


@triton.jit
def normalised(x, mean, scale, bias):
    """Batch norm's output, with the same roundings wherever it is worked out: ReLU's mask must be the same."""
    return (x - mean[None, :]) * scale[None, :] + bias[None, :]


@triton.jit
def load_tile(x_ptr, row, channel, exists, end, C):
    """fp32[rows, channels] (0 where there is nothing), its offsets and mask."""
    offset = row.to(tl.int64)[:, None] * C + channel[None, :]
    mask = (row < end)[:, None] & exists[None, :]
    return tl.load(x_ptr + offset, mask, 0.0).to(tl.float32), offset, mask


@triton.jit
def store_part(parts_ptr, first, second, channel, exists, C):
    """This program's two rows of [2, parts, C]."""
    offset = tl.program_id(0) * C + channel
    tl.store(parts_ptr + offset, first, exists)
    tl.store(parts_ptr + tl.num_programs(0) * C + offset, second, exists)


@triton.jit
def merge_parts(parts_ptr, channel, exists, C, PARTS: tl.constexpr):
    """The sums over all parts, read from where all programs see them."""
    first = tl.zeros([PARTS, channel.shape[0]], tl.float32)
    second = tl.zeros([PARTS, channel.shape[0]], tl.float32)
    for start in range(0, tl.num_programs(0), PARTS):
        part = start + tl.arange(0, PARTS)
        mask = (part < tl.num_programs(0))[:, None] & exists[None, :]
        offset = part[:, None] * C + channel[None, :]
        first += tl.load(parts_ptr + offset, mask, 0.0, cache_modifier=".cg")
        second += tl.load(parts_ptr + tl.num_programs(0) * C + offset, mask, 0.0, cache_modifier=".cg")
    return tl.sum(first, 0), tl.sum(second, 0)


@triton.jit
def move(running_ptr, channel, exists, value, momentum):
    """Move a running statistic towards a batch's, as torch's lerp does."""
    before = tl.load(running_ptr + channel, exists, 0.0).to(tl.float32)
    tl.store(running_ptr + channel, (before + momentum * (value - before)).to(running_ptr.dtype.element_ty), exists)


@triton.jit
def statistics_kernel(
    x_ptr,
    mean_ptr,
    variance_ptr,
    running_mean_ptr,
    running_var_ptr,
    batches_ptr,
    parts_ptr,
    arrived_ptr,
    rows,
    C,
    share,
    momentum,
    ROWS: tl.constexpr,
    CHANNELS: tl.constexpr,
    STAGES: tl.constexpr,
    PARTS: tl.constexpr,
):
    """The batch's mean and biased variance; the running ones, and the number of batches that they are of, move.

    Sums are of distances from the mean of a few pixels from all over the map, so that what cancels is not the mean but
    what that misses it by. `fastseg.kernels.bn_relu` states the error.
    """
    channel, exists = channel_range(C, CHANNELS)
    some = load_tile(x_ptr, tl.arange(0, ROWS) * (rows // ROWS), channel, exists, rows, C)[0]
    shift = tl.sum(some, 0) / ROWS
    first = tl.program_id(0) * share
    end = tl.minimum(first + share, rows)
    sums = tl.zeros([ROWS, CHANNELS], tl.float32)
    squares = tl.zeros([ROWS, CHANNELS], tl.float32)
    for start in tl.range(first, end, ROWS, num_stages=STAGES):
        x, _, mask = load_tile(x_ptr, start + tl.arange(0, ROWS), channel, exists, end, C)
        distance = tl.where(mask, x - shift[None, :], 0.0)
        sums += distance
        squares += distance * distance
    store_part(parts_ptr, tl.sum(sums, 0), tl.sum(squares, 0), channel, exists, C)
    if is_last(arrived_ptr):
        distances, squared = merge_parts(parts_ptr, channel, exists, C, PARTS)
        miss = distances / rows
        mean, variance = shift + miss, squared / rows - miss * miss
        # Not a maximum, which would lose NaN.
        variance = tl.where(variance < 0, 0.0, variance)
        tl.store(mean_ptr + channel, mean, exists)
        tl.store(variance_ptr + channel, variance, exists)
        move(running_mean_ptr, channel, exists, mean, momentum)
        unbiased = variance * (rows.to(tl.float32) / (rows - 1).to(tl.float32))
        move(running_var_ptr, channel, exists, unbiased, momentum)
        if tl.program_id(1) == 0:
            tl.store(batches_ptr, tl.load(batches_ptr) + 1)


@triton.jit
def apply_kernel(
    x_ptr,
    weight_ptr,
    bias_ptr,
    mean_ptr,
    variance_ptr,
    y_ptr,
    rows,
    C,
    eps,
    ROWS: tl.constexpr,
    CHANNELS: tl.constexpr,
):
    channel, exists = channel_range(C, CHANNELS)
    mean, _, scale, bias = scaling(weight_ptr, bias_ptr, mean_ptr, variance_ptr, channel, exists, eps)
    x, offset, mask = load_tile(x_ptr, tl.program_id(0) * ROWS + tl.arange(0, ROWS), channel, exists, rows, C)
    y = normalised(x, mean, scale, bias)
    # Not a maximum, which would lose NaN.
    tl.store(y_ptr + offset, tl.where(y <= 0, 0.0, y).to(y_ptr.dtype.element_ty), mask)


@triton.jit
def apply_pool_kernel(
    x_ptr,
    weight_ptr,
    bias_ptr,
    mean_ptr,
    variance_ptr,
    values_ptr,
    codes_ptr,
    pixels,
    C,
    H,
    W,
    h,
    w,
    eps,
    PIXELS: tl.constexpr,
    CHANNELS: tl.constexpr,
):
    image, row, column, channel, out, exists = window(tl.program_id(0) * PIXELS, pixels, C, h, w, PIXELS, CHANNELS)
    mean, _, scale, bias = scaling(weight_ptr, bias_ptr, mean_ptr, variance_ptr, channel, channel < C, eps)
    best = tl.full([PIXELS, CHANNELS], -float("inf"), tl.float32)
    best_code = tl.zeros([PIXELS, CHANNELS], tl.int32)
    for code in tl.static_range(4):
        offset, inside = corner(image, row, column, channel, exists, C, H, W, code)
        y = normalised(tl.load(x_ptr + offset, inside, 0.0).to(tl.float32), mean, scale, bias)
        y = tl.where(y <= 0, 0.0, y).to(values_ptr.dtype.element_ty).to(tl.float32)
        better = inside & ((y > best) | (y != y))
        best = tl.where(better, y, best)
        best_code = tl.where(better, code, best_code)
    tl.store(values_ptr + out, best.to(values_ptr.dtype.element_ty), exists)
    tl.store(codes_ptr + out, best_code.to(tl.uint8), exists)


@triton.jit
def through_relu(gradient, x, mean, scale, bias):
    """Gradient of batch norm's output: 0 where ReLU is off."""
    return tl.where(normalised(x, mean, scale, bias) <= 0, 0.0, gradient)


@triton.jit
def finish_sums(
    d_weight,
    d_bias,
    inverse,
    channel,
    exists,
    d_weight_ptr,
    d_bias_ptr,
    parts_ptr,
    arrived_ptr,
    C,
    PARTS: tl.constexpr,
):
    """Store this program's sums of gradient * (x - mean) and of gradient; the last one merges them to gradients."""
    store_part(parts_ptr, tl.sum(d_weight, 0), tl.sum(d_bias, 0), channel, exists, C)
    if is_last(arrived_ptr):
        products, gradients = merge_parts(parts_ptr, channel, exists, C, PARTS)
        tl.store(d_weight_ptr + channel, products * inverse, exists)
        tl.store(d_bias_ptr + channel, gradients, exists)


@triton.jit
def backward_sums_kernel(
    gradient_ptr,
    x_ptr,
    weight_ptr,
    bias_ptr,
    mean_ptr,
    variance_ptr,
    d_weight_ptr,
    d_bias_ptr,
    parts_ptr,
    arrived_ptr,
    rows,
    C,
    eps,
    share,
    ROWS: tl.constexpr,
    CHANNELS: tl.constexpr,
    STAGES: tl.constexpr,
    PARTS: tl.constexpr,
):
    """Gradients of weight and bias."""
    channel, exists = channel_range(C, CHANNELS)
    mean, inverse, scale, bias = scaling(weight_ptr, bias_ptr, mean_ptr, variance_ptr, channel, exists, eps)
    first = tl.program_id(0) * share
    end = tl.minimum(first + share, rows)
    d_weight = tl.zeros([ROWS, CHANNELS], tl.float32)
    d_bias = tl.zeros([ROWS, CHANNELS], tl.float32)
    for start in tl.range(first, end, ROWS, num_stages=STAGES):
        x, offset, mask = load_tile(x_ptr, start + tl.arange(0, ROWS), channel, exists, end, C)
        gradient = tl.load(gradient_ptr + offset, mask, 0.0).to(tl.float32)
        gradient = through_relu(gradient, x, mean, scale, bias)
        d_weight += tl.where(mask, gradient * (x - mean[None, :]), 0.0)
        d_bias += gradient
    finish_sums(d_weight, d_bias, inverse, channel, exists, d_weight_ptr, d_bias_ptr, parts_ptr, arrived_ptr, C, PARTS)


@triton.jit
def backward_sums_pool_kernel(
    gradient_ptr,
    codes_ptr,
    x_ptr,
    weight_ptr,
    bias_ptr,
    mean_ptr,
    variance_ptr,
    d_weight_ptr,
    d_bias_ptr,
    parts_ptr,
    arrived_ptr,
    pixels,
    C,
    H,
    W,
    h,
    w,
    eps,
    share,
    PIXELS: tl.constexpr,
    CHANNELS: tl.constexpr,
    STAGES: tl.constexpr,
    PARTS: tl.constexpr,
):
    """The same for the gradient of pooled values, which belongs to the pixels that the codes name."""
    channel, channels = channel_range(C, CHANNELS)
    mean, inverse, scale, bias = scaling(weight_ptr, bias_ptr, mean_ptr, variance_ptr, channel, channels, eps)
    first = tl.program_id(0) * share
    end = tl.minimum(first + share, pixels)
    d_weight = tl.zeros([PIXELS, CHANNELS], tl.float32)
    d_bias = tl.zeros([PIXELS, CHANNELS], tl.float32)
    for start in tl.range(first, end, PIXELS, num_stages=STAGES):
        image, row, column, _, pooled, exists = window(start, end, C, h, w, PIXELS, CHANNELS)
        gradient = tl.load(gradient_ptr + pooled, exists, 0.0).to(tl.float32)
        best_code = tl.load(codes_ptr + pooled, exists, 0)
        x = tl.zeros([PIXELS, CHANNELS], tl.float32)
        for code in tl.static_range(4):
            offset, inside = corner(image, row, column, channel, exists, C, H, W, code)
            x = tl.where(best_code == code, tl.load(x_ptr + offset, inside, 0.0).to(tl.float32), x)
        gradient = through_relu(gradient, x, mean, scale, bias)
        d_weight += tl.where(exists, gradient * (x - mean[None, :]), 0.0)
        d_bias += gradient
    finish_sums(
        d_weight, d_bias, inverse, channel, channels, d_weight_ptr, d_bias_ptr, parts_ptr, arrived_ptr, C, PARTS
    )


@triton.jit
def batch_terms(d_weight_ptr, d_bias_ptr, channel, exists, inverse, values, TRAINING: tl.constexpr):
    """What batch statistics, which depend on x too, take off each gradient: a number, and one times (x - mean) (Ioffe
    and Szegedy 2015, section 3)."""
    if TRAINING:
        slope = tl.load(d_weight_ptr + channel, exists, 0.0) * inverse / values
        level = tl.load(d_bias_ptr + channel, exists, 0.0) / values
    else:
        slope = tl.zeros(channel.shape, tl.float32)
        level = slope
    return level, slope


@triton.jit
def input_gradient(gradient, x, mean, scale, bias, level, slope):
    """Gradient of x, of that of ReLU's output."""
    taken = level[None, :] + (x - mean[None, :]) * slope[None, :]
    return (through_relu(gradient, x, mean, scale, bias) - taken) * scale[None, :]


@triton.jit
def backward_kernel(
    gradient_ptr,
    x_ptr,
    weight_ptr,
    bias_ptr,
    mean_ptr,
    variance_ptr,
    d_weight_ptr,
    d_bias_ptr,
    d_x_ptr,
    rows,
    C,
    eps,
    ROWS: tl.constexpr,
    CHANNELS: tl.constexpr,
    TRAINING: tl.constexpr,
):
    channel, exists = channel_range(C, CHANNELS)
    mean, inverse, scale, bias = scaling(weight_ptr, bias_ptr, mean_ptr, variance_ptr, channel, exists, eps)
    level, slope = batch_terms(d_weight_ptr, d_bias_ptr, channel, exists, inverse, rows, TRAINING)
    x, offset, mask = load_tile(x_ptr, tl.program_id(0) * ROWS + tl.arange(0, ROWS), channel, exists, rows, C)
    gradient = tl.load(gradient_ptr + offset, mask, 0.0).to(tl.float32)
    d_x = input_gradient(gradient, x, mean, scale, bias, level, slope)
    tl.store(d_x_ptr + offset, d_x.to(d_x_ptr.dtype.element_ty), mask)


@triton.jit
def backward_pool_kernel(
    gradient_ptr,
    codes_ptr,
    x_ptr,
    weight_ptr,
    bias_ptr,
    mean_ptr,
    variance_ptr,
    d_weight_ptr,
    d_bias_ptr,
    d_x_ptr,
    values,
    pixels,
    C,
    H,
    W,
    h,
    w,
    eps,
    PIXELS: tl.constexpr,
    CHANNELS: tl.constexpr,
    TRAINING: tl.constexpr,
):
    first = tl.program_id(0) * PIXELS
    image, row, column, channel, pooled, exists = window(first, pixels, C, h, w, PIXELS, CHANNELS)
    mean, inverse, scale, bias = scaling(weight_ptr, bias_ptr, mean_ptr, variance_ptr, channel, channel < C, eps)
    level, slope = batch_terms(d_weight_ptr, d_bias_ptr, channel, channel < C, inverse, values, TRAINING)
    best = tl.load(gradient_ptr + pooled, exists, 0.0).to(tl.float32)
    best_code = tl.load(codes_ptr + pooled, exists, 0)
    for code in tl.static_range(4):
        offset, inside = corner(image, row, column, channel, exists, C, H, W, code)
        x = tl.load(x_ptr + offset, inside, 0.0).to(tl.float32)
        gradient = tl.where(best_code == code, best, 0.0)
        d_x = input_gradient(gradient, x, mean, scale, bias, level, slope)
        tl.store(d_x_ptr + offset, d_x.to(d_x_ptr.dtype.element_ty), inside)


@functools.cache
def _reducing(
    kernel: Any, unit: str, rows: int, channels: int, value_bytes: int, element_bytes: int, multiprocessors: int
) -> tuple[Callable[..., None], plan.Reduction]:
    """The launcher of a reduction over rows, and how it divides them."""
    found = plan.reduction(rows, channels, value_bytes, element_bytes, multiprocessors)
    options = {unit: found.height, "CHANNELS": found.width, "STAGES": found.stages, "PARTS": plan.MERGED}
    return functools.partial(kernel[found.parts, found.blocks], **options, num_warps=plan.REDUCE_WARPS), found


def _statistics(
    x_BCHW: Tensor, running_mean: Tensor, running_var: Tensor, batches: Tensor, training: bool, momentum: float
) -> tuple[tuple[Tensor, Tensor], tuple[Tensor, Tensor]]:
    """Mean and biased variance to normalise with, and what is given back of them: the batch's, towards which the
    running ones move, or when frozen the running ones, and nothing."""
    mean = x_BCHW.new_empty(x_BCHW.shape[1] if training else 0, dtype=torch.float32)
    found = mean, torch.empty_like(mean)
    if not training:
        return (running_mean, running_var), found
    channels = x_BCHW.shape[1]
    rows = x_BCHW.numel() // channels
    size, many = x_BCHW.itemsize, plan.multiprocessors(x_BCHW.device)
    measure, by = _reducing(statistics_kernel, "ROWS", rows, channels, size, size, many)
    parts = scratch(x_BCHW.device, 2 * by.parts * channels, by.blocks)
    measure(x_BCHW, *found, running_mean, running_var, batches, *parts, rows, channels, by.share, momentum)
    # PyTorch does not see what a kernel writes to: autograd shall notice where a saved one has moved.
    torch.autograd.graph.increment_version((running_mean, running_var, batches))
    return found, found


def bn_relu(
    x_BCHW: Tensor,
    weight: Tensor,
    bias: Tensor,
    running_mean: Tensor,
    running_var: Tensor,
    num_batches_tracked: Tensor,
    training: bool,
    momentum: float,
    eps: float,
) -> tuple[Tensor, Tensor, Tensor]:
    """See `fastseg.kernels.bn_relu.bn_relu_op`."""
    x_BCHW, channels = channels_last(x_BCHW), x_BCHW.shape[1]
    rows = x_BCHW.numel() // channels
    used, found = _statistics(x_BCHW, running_mean, running_var, num_batches_tracked, training, momentum)
    y = torch.empty_like(x_BCHW)
    apply = over(apply_kernel, "ROWS", rows, channels, plan.STREAMED)
    apply(x_BCHW, weight, bias, *used, y, rows, channels, eps)
    return y, *found


def bn_relu_pool(
    x_BCHW: Tensor,
    weight: Tensor,
    bias: Tensor,
    running_mean: Tensor,
    running_var: Tensor,
    num_batches_tracked: Tensor,
    training: bool,
    momentum: float,
    eps: float,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """See `fastseg.kernels.bn_relu.bn_relu_pool_op`."""
    x_BCHW = channels_last(x_BCHW)
    batch, channels, *large = x_BCHW.shape
    used, found = _statistics(x_BCHW, running_mean, running_var, num_batches_tracked, training, momentum)
    small = [halved(size) for size in large]
    values = empty((batch, channels, *small), x_BCHW)
    codes = empty((batch, channels, *small), x_BCHW, torch.uint8)
    pixels = batch * small[0] * small[1]
    # Four pixels are met per pooled one.
    apply = over(apply_pool_kernel, "PIXELS", pixels, channels, plan.STREAMED // 2)
    apply(x_BCHW, weight, bias, *used, values, codes, pixels, channels, *large, *small, eps)
    return values, codes, *found


def bn_relu_backward(
    x_BCHW: Tensor,
    gradient: Tensor,
    codes: Tensor | None,
    weight: Tensor,
    bias: Tensor,
    mean: Tensor,
    variance: Tensor,
    training: bool,
    eps: float,
) -> tuple[Tensor, Tensor, Tensor]:
    """See `fastseg.kernels.bn_relu.bn_relu_backward`."""
    gradient, x_BCHW = channels_last(gradient), channels_last(x_BCHW)
    batch, channels, *large = x_BCHW.shape
    values = rows = batch * large[0] * large[1]
    given: tuple[Tensor, ...] = (gradient, x_BCHW, weight, bias, mean, variance)
    sizes: tuple[int, ...] = (channels,)
    size, many = x_BCHW.itemsize, plan.multiprocessors(x_BCHW.device)
    element_bytes = 2 * size
    sums_kernel, kernel, unit, elements = backward_sums_kernel, backward_kernel, "ROWS", plan.STREAMED
    if codes is not None:
        # One pooled pixel stands for its window of four.
        small = gradient.shape[-2:]
        rows = batch * small[0] * small[1]
        given = (gradient, channels_last(codes), *given[1:])
        sizes, element_bytes = (channels, *large, *small), 5 * size + 1
        sums_kernel, kernel, unit = backward_sums_pool_kernel, backward_pool_kernel, "PIXELS"
        elements = plan.STREAMED // 2

    add_up, by = _reducing(sums_kernel, unit, rows, channels, size, element_bytes, many)
    parts = scratch(x_BCHW.device, 2 * by.parts * channels, by.blocks)
    d_weight = x_BCHW.new_empty(channels, dtype=torch.float32)
    d_bias = torch.empty_like(d_weight)
    d_x = torch.empty_like(x_BCHW)
    add_up(*given, d_weight, d_bias, *parts, rows, *sizes, eps, by.share)
    counts = (rows,) if codes is None else (values, rows)
    spread = over(kernel, unit, rows, channels, elements)
    spread(*given, d_weight, d_bias, d_x, *counts, *sizes, eps, TRAINING=training)
    if weight.dtype != torch.float32:
        return d_x, d_weight.to(weight.dtype), d_bias.to(bias.dtype)
    return d_x, d_weight, d_bias
