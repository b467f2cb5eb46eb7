"""Triton kernels of `fastseg.kernels.bn_relu`: a program holds tiles of pixels x channels, in fp32.

Reductions run in two steps without atomics: at most PARTS programs leave one row each, and a second kernel merges them.
"""

import functools
from collections.abc import Callable

import torch
import triton
import triton.language as tl

from fastseg.kernels.launch import cdiv, channels_last, empty, halved, over, tile
from fastseg.kernels.pool_triton import corner, window

Tensor = torch.Tensor

ELEMENTS, WARPS = 2048, 4
# Enough programs to fill a large GPU (132 SMs, 4 each); more would only make the second step longer.
PARTS = 512


@triton.jit
def channel_range(C, CHANNELS: tl.constexpr):
    """This program's channels and which of them exist."""
    channel = tl.program_id(1) * CHANNELS + tl.arange(0, CHANNELS)
    return channel, channel < C


@triton.jit
def scaling(weight_ptr, bias_ptr, mean_ptr, variance_ptr, channel, exists, eps):
    """Per channel, as rows: mean, 1 / sqrt(variance + eps), weight, bias."""
    mean = tl.load(mean_ptr + channel, exists, 0.0).to(tl.float32)
    inverse = 1.0 / tl.sqrt(tl.load(variance_ptr + channel, exists, 1.0).to(tl.float32) + eps)
    weight = tl.load(weight_ptr + channel, exists, 0.0).to(tl.float32)
    bias = tl.load(bias_ptr + channel, exists, 0.0).to(tl.float32)
    return mean[None, :], inverse[None, :], weight[None, :], bias[None, :]


@triton.jit
def load_tile(x_ptr, row, channel, exists, rows, C):
    """fp32[rows, channels] (0 where there is nothing), its offsets and mask."""
    offset = row.to(tl.int64)[:, None] * C + channel[None, :]
    mask = (row < rows)[:, None] & exists[None, :]
    return tl.load(x_ptr + offset, mask, 0.0).to(tl.float32), offset, mask


@triton.jit
def moments_kernel(x_ptr, parts_ptr, rows, C, tiles, ROWS: tl.constexpr, CHANNELS: tl.constexpr):
    """Mean and sum of squared deviations of `tiles` tiles of ROWS rows, per channel -> [2, parts, C]."""
    channel, exists = channel_range(C, CHANNELS)
    first = tl.program_id(0) * tiles * ROWS
    mean = tl.zeros([CHANNELS], tl.float32)
    squares = tl.zeros([CHANNELS], tl.float32)
    for i in range(tiles):
        row = first + i * ROWS + tl.arange(0, ROWS)
        x, _, mask = load_tile(x_ptr, row, channel, exists, rows, C)
        before = tl.minimum(i * ROWS, tl.maximum(rows - first, 0)).to(tl.float32)
        count = tl.minimum(tl.maximum(rows - first - i * ROWS, 0), ROWS).to(tl.float32)
        here = tl.sum(x, 0) / tl.maximum(count, 1.0)
        deviation = tl.where(mask, x - here[None, :], 0.0)
        # Chan, Golub, LeVeque 1979, eq. 2.1: two sets' means and squared deviations to those of both.
        total = tl.maximum(before + count, 1.0)
        delta = here - mean
        squares += tl.sum(deviation * deviation, 0) + tl.where(count > 0, delta * delta * (before * count / total), 0.0)
        mean += tl.where(count > 0, delta * (count / total), 0.0)
    part = tl.program_id(0).to(tl.int64) * C + channel
    tl.store(parts_ptr + part, mean, exists)
    tl.store(parts_ptr + tl.num_programs(0) * C + part, squares, exists)


@triton.jit
def moments_of_parts(parts_ptr, channel, exists, parts, rows, C, part_rows, PARTS: tl.constexpr):
    """Mean and biased variance per channel, of the means and squared deviations of parts [2, parts, C]."""
    total = tl.zeros([PARTS, channel.shape[0]], tl.float32)
    for start in range(0, parts, PARTS):
        part = start + tl.arange(0, PARTS)
        count = tl.minimum(tl.maximum(rows - part * part_rows, 0), part_rows).to(tl.float32)
        mask = (part < parts)[:, None] & exists[None, :]
        total += tl.load(parts_ptr + part[:, None] * C + channel[None, :], mask, 0.0) * count[:, None]
    mean = tl.sum(total, 0) / rows
    squares = tl.zeros([PARTS, channel.shape[0]], tl.float32)
    for start in range(0, parts, PARTS):
        part = start + tl.arange(0, PARTS)
        count = tl.minimum(tl.maximum(rows - part * part_rows, 0), part_rows).to(tl.float32)
        mask = (part < parts)[:, None] & exists[None, :]
        offset = part[:, None] * C + channel[None, :]
        deviation = tl.load(parts_ptr + offset, mask, 0.0) - mean[None, :]
        inside = tl.load(parts_ptr + parts * C + offset, mask, 0.0)
        squares += tl.where(mask, inside + deviation * deviation * count[:, None], 0.0)
    return mean, tl.sum(squares, 0) / rows


@triton.jit
def move(running_ptr, channel, exists, value, momentum):
    """Move a running statistic towards a batch's, as torch's lerp does."""
    before = tl.load(running_ptr + channel, exists, 0.0).to(tl.float32)
    tl.store(running_ptr + channel, (before + momentum * (value - before)).to(running_ptr.dtype.element_ty), exists)


@triton.jit
def merge_kernel(
    parts_ptr,
    mean_ptr,
    variance_ptr,
    running_mean_ptr,
    running_var_ptr,
    batches_ptr,
    parts,
    rows,
    C,
    part_rows,
    momentum,
    PARTS: tl.constexpr,
    CHANNELS: tl.constexpr,
):
    """Merges the parts, and moves the running statistics and the number of batches that they are of."""
    channel = tl.program_id(0) * CHANNELS + tl.arange(0, CHANNELS)
    exists = channel < C
    mean, variance = moments_of_parts(parts_ptr, channel, exists, parts, rows, C, part_rows, PARTS)
    tl.store(mean_ptr + channel, mean, exists)
    tl.store(variance_ptr + channel, variance, exists)
    move(running_mean_ptr, channel, exists, mean, momentum)
    unbiased = variance * (rows.to(tl.float32) / (rows - 1).to(tl.float32))
    move(running_var_ptr, channel, exists, unbiased, momentum)
    if tl.program_id(0) == 0:
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
    mean, inverse, weight, bias = scaling(weight_ptr, bias_ptr, mean_ptr, variance_ptr, channel, exists, eps)
    x, offset, mask = load_tile(x_ptr, tl.program_id(0) * ROWS + tl.arange(0, ROWS), channel, exists, rows, C)
    y = (x - mean) * inverse * weight + bias
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
    image, row, column, channel, out, exists = window(tl.program_id(0), pixels, C, h, w, PIXELS, CHANNELS)
    mean, inverse, weight, bias = scaling(weight_ptr, bias_ptr, mean_ptr, variance_ptr, channel, channel < C, eps)
    best = tl.full([PIXELS, CHANNELS], -float("inf"), tl.float32)
    best_code = tl.zeros([PIXELS, CHANNELS], tl.int32)
    for code in tl.static_range(4):
        offset, inside = corner(image, row, column, channel, exists, C, H, W, code)
        y = (tl.load(x_ptr + offset, inside, 0.0).to(tl.float32) - mean) * inverse * weight + bias
        y = tl.where(y <= 0, 0.0, y).to(values_ptr.dtype.element_ty).to(tl.float32)
        better = inside & ((y > best) | (y != y))
        best = tl.where(better, y, best)
        best_code = tl.where(better, code, best_code)
    tl.store(values_ptr + out, best.to(values_ptr.dtype.element_ty), exists)
    tl.store(codes_ptr + out, best_code.to(tl.uint8), exists)


@triton.jit
def masked_gradient(gradient, x, scales):
    """Gradient of batch norm's output, 0 where ReLU is off, and the normalised input."""
    mean, inverse, weight, bias = scales
    normalised = (x - mean) * inverse
    return tl.where(normalised * weight + bias <= 0, 0.0, gradient), normalised


@triton.jit
def store_sums(parts_ptr, d_weight, d_bias, channel, exists, C):
    """This program's row of [2, parts, C]."""
    part = tl.program_id(0) * C + channel
    tl.store(parts_ptr + part, tl.sum(d_weight, 0), exists)
    tl.store(parts_ptr + tl.num_programs(0) * C + part, tl.sum(d_bias, 0), exists)


@triton.jit
def backward_sums_kernel(
    gradient_ptr,
    x_ptr,
    weight_ptr,
    bias_ptr,
    mean_ptr,
    variance_ptr,
    parts_ptr,
    rows,
    C,
    eps,
    tiles,
    ROWS: tl.constexpr,
    CHANNELS: tl.constexpr,
):
    """Sums of gradient * normalised input, and of gradient, over `tiles` tiles -> [2, parts, C]."""
    channel, exists = channel_range(C, CHANNELS)
    scales = scaling(weight_ptr, bias_ptr, mean_ptr, variance_ptr, channel, exists, eps)
    d_weight = tl.zeros([ROWS, CHANNELS], tl.float32)
    d_bias = tl.zeros([ROWS, CHANNELS], tl.float32)
    for i in range(tiles):
        row = (tl.program_id(0) * tiles + i) * ROWS + tl.arange(0, ROWS)
        x, offset, mask = load_tile(x_ptr, row, channel, exists, rows, C)
        gradient = tl.load(gradient_ptr + offset, mask, 0.0).to(tl.float32)
        gradient, normalised = masked_gradient(gradient, x, scales)
        d_weight += tl.where(mask, gradient * normalised, 0.0)
        d_bias += gradient
    store_sums(parts_ptr, d_weight, d_bias, channel, exists, C)


@triton.jit
def backward_sums_pool_kernel(
    gradient_ptr,
    codes_ptr,
    x_ptr,
    weight_ptr,
    bias_ptr,
    mean_ptr,
    variance_ptr,
    parts_ptr,
    pixels,
    C,
    H,
    W,
    h,
    w,
    eps,
    tiles,
    PIXELS: tl.constexpr,
    CHANNELS: tl.constexpr,
):
    """The same for the gradient of pooled values, which belongs to the pixels that the codes name."""
    channel, channels = channel_range(C, CHANNELS)
    scales = scaling(weight_ptr, bias_ptr, mean_ptr, variance_ptr, channel, channels, eps)
    d_weight = tl.zeros([PIXELS, CHANNELS], tl.float32)
    d_bias = tl.zeros([PIXELS, CHANNELS], tl.float32)
    for i in range(tiles):
        block = tl.program_id(0) * tiles + i
        image, row, column, _, pooled, exists = window(block, pixels, C, h, w, PIXELS, CHANNELS)
        gradient = tl.load(gradient_ptr + pooled, exists, 0.0).to(tl.float32)
        best_code = tl.load(codes_ptr + pooled, exists, 0)
        x = tl.zeros([PIXELS, CHANNELS], tl.float32)
        for code in tl.static_range(4):
            offset, inside = corner(image, row, column, channel, exists, C, H, W, code)
            x = tl.where(best_code == code, tl.load(x_ptr + offset, inside, 0.0).to(tl.float32), x)
        gradient, normalised = masked_gradient(gradient, x, scales)
        d_weight += tl.where(exists, gradient * normalised, 0.0)
        d_bias += gradient
    store_sums(parts_ptr, d_weight, d_bias, channel, channels, C)


@triton.jit
def merge_sums_kernel(parts_ptr, d_weight_ptr, d_bias_ptr, parts, C, PARTS: tl.constexpr, CHANNELS: tl.constexpr):
    """[2, parts, C] -> the sums over parts, in a fixed order."""
    channel = tl.program_id(0) * CHANNELS + tl.arange(0, CHANNELS)
    exists = channel < C
    d_weight = tl.zeros([PARTS, CHANNELS], tl.float32)
    d_bias = tl.zeros([PARTS, CHANNELS], tl.float32)
    for start in range(0, parts, PARTS):
        part = start + tl.arange(0, PARTS)
        mask = (part < parts)[:, None] & exists[None, :]
        offset = part[:, None] * C + channel[None, :]
        d_weight += tl.load(parts_ptr + offset, mask, 0.0)
        d_bias += tl.load(parts_ptr + parts * C + offset, mask, 0.0)
    tl.store(d_weight_ptr + channel, tl.sum(d_weight, 0), exists)
    tl.store(d_bias_ptr + channel, tl.sum(d_bias, 0), exists)


@triton.jit
def batch_terms(d_weight_ptr, d_bias_ptr, channel, exists, values, TRAINING: tl.constexpr):
    """What batch statistics, which depend on x too, take off each gradient (Ioffe and Szegedy 2015, section 3)."""
    if TRAINING:
        d_weight = tl.load(d_weight_ptr + channel, exists, 0.0) / values
        d_bias = tl.load(d_bias_ptr + channel, exists, 0.0) / values
    else:
        d_weight = tl.zeros(channel.shape, tl.float32)
        d_bias = d_weight
    return d_weight[None, :], d_bias[None, :]


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
    scales = scaling(weight_ptr, bias_ptr, mean_ptr, variance_ptr, channel, exists, eps)
    d_weight, d_bias = batch_terms(d_weight_ptr, d_bias_ptr, channel, exists, rows, TRAINING)
    x, offset, mask = load_tile(x_ptr, tl.program_id(0) * ROWS + tl.arange(0, ROWS), channel, exists, rows, C)
    gradient = tl.load(gradient_ptr + offset, mask, 0.0).to(tl.float32)
    gradient, normalised = masked_gradient(gradient, x, scales)
    d_x = (gradient - d_bias - normalised * d_weight) * (scales[2] * scales[1])
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
    image, row, column, channel, pooled, exists = window(tl.program_id(0), pixels, C, h, w, PIXELS, CHANNELS)
    scales = scaling(weight_ptr, bias_ptr, mean_ptr, variance_ptr, channel, channel < C, eps)
    d_weight, d_bias = batch_terms(d_weight_ptr, d_bias_ptr, channel, channel < C, values, TRAINING)
    best = tl.load(gradient_ptr + pooled, exists, 0.0).to(tl.float32)
    best_code = tl.load(codes_ptr + pooled, exists, 0)
    for code in tl.static_range(4):
        offset, inside = corner(image, row, column, channel, exists, C, H, W, code)
        x = tl.load(x_ptr + offset, inside, 0.0).to(tl.float32)
        gradient, normalised = masked_gradient(tl.where(best_code == code, best, 0.0), x, scales)
        d_x = (gradient - d_bias - normalised * d_weight) * (scales[2] * scales[1])
        tl.store(d_x_ptr + offset, d_x.to(d_x_ptr.dtype.element_ty), inside)


# Parts and channels of a program that merges parts.
MERGED = {"PARTS": 128, "CHANNELS": 8, "num_warps": WARPS}


@functools.cache
def _reduction(
    kernel, merging, unit: str, rows: int, channels: int, elements: int, most: int
) -> tuple[Callable[..., None], Callable[..., None], int, int, int]:
    """The launchers of a reduction over rows and of what merges its parts, at most `most`; their number; the tiles and
    the rows of one."""
    height, width = tile(channels, elements)
    blocks = cdiv(channels, width)
    tiles = cdiv(cdiv(rows, height) * blocks, most)
    parts = cdiv(rows, height * tiles)
    reduce = functools.partial(kernel[parts, blocks], CHANNELS=width, num_warps=WARPS, **{unit: height})
    merge = functools.partial(merging[(cdiv(channels, MERGED["CHANNELS"]),)], **MERGED)
    return reduce, merge, parts, tiles, tiles * height


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
    measure, merge, parts, tiles, part_rows = _reduction(
        moments_kernel, merge_kernel, "ROWS", rows, channels, ELEMENTS, PARTS
    )
    moments = x_BCHW.new_empty((2, parts, channels), dtype=torch.float32)
    measure(x_BCHW, moments, rows, channels, tiles)
    merge(moments, *found, running_mean, running_var, batches, parts, rows, channels, part_rows, momentum)
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
    apply = over(apply_kernel, "ROWS", rows, channels, ELEMENTS, WARPS)
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
    apply = over(apply_pool_kernel, "PIXELS", pixels, channels, ELEMENTS // 2, WARPS)
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
    sums_kernel, kernel, unit, elements = backward_sums_kernel, backward_kernel, "ROWS", ELEMENTS
    if codes is not None:
        # One pooled pixel stands for its window of four.
        small = gradient.shape[-2:]
        rows = batch * small[0] * small[1]
        given = (gradient, channels_last(codes), *given[1:])
        sizes = (channels, *large, *small)
        sums_kernel, kernel, unit = backward_sums_pool_kernel, backward_pool_kernel, "PIXELS"
        elements = ELEMENTS // 2

    add_up, merge, parts, tiles, _ = _reduction(sums_kernel, merge_sums_kernel, unit, rows, channels, elements, PARTS)
    sums = x_BCHW.new_empty((2, parts, channels), dtype=torch.float32)
    d_weight = x_BCHW.new_empty(channels, dtype=torch.float32)
    d_bias = torch.empty_like(d_weight)
    d_x = torch.empty_like(x_BCHW)
    add_up(*given, sums, rows, *sizes, eps, tiles)
    merge(sums, d_weight, d_bias, parts, channels)
    counts = (rows,) if codes is None else (values, rows)
    spread = over(kernel, unit, rows, channels, elements, WARPS)
    spread(*given, d_weight, d_bias, d_x, *counts, *sizes, eps, TRAINING=training)
    if weight.dtype != torch.float32:
        return d_x, d_weight.to(weight.dtype), d_bias.to(bias.dtype)
    return d_x, d_weight, d_bias
