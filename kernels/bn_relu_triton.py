"""Triton kernels of `fastseg.kernels.bn_relu`: a program holds tiles of pixels x channels, in fp32.

Reductions run in two steps without atomics: at most PARTS programs leave one row each, and a second kernel merges them.
"""

import torch
import triton
import triton.language as tl

from fastseg.kernels.launch import channels_last, empty, halved, tile
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
def moments_kernel(x_ptr, means_ptr, squares_ptr, rows, C, tiles, ROWS: tl.constexpr, CHANNELS: tl.constexpr):
    """Mean and sum of squared deviations of `tiles` tiles of ROWS rows, per channel -> [parts, C]."""
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
    tl.store(means_ptr + part, mean, exists)
    tl.store(squares_ptr + part, squares, exists)


@triton.jit
def merge_kernel(
    means_ptr,
    squares_ptr,
    mean_ptr,
    variance_ptr,
    parts,
    rows,
    C,
    part_rows,
    PARTS: tl.constexpr,
    CHANNELS: tl.constexpr,
):
    """Means and squared deviations of parts -> mean and biased variance per channel."""
    channel = tl.program_id(0) * CHANNELS + tl.arange(0, CHANNELS)
    exists = channel < C
    total = tl.zeros([PARTS, CHANNELS], tl.float32)
    for start in range(0, parts, PARTS):
        part = start + tl.arange(0, PARTS)
        count = tl.minimum(tl.maximum(rows - part * part_rows, 0), part_rows).to(tl.float32)
        mask = (part < parts)[:, None] & exists[None, :]
        total += tl.load(means_ptr + part[:, None] * C + channel[None, :], mask, 0.0) * count[:, None]
    mean = tl.sum(total, 0) / rows
    squares = tl.zeros([PARTS, CHANNELS], tl.float32)
    for start in range(0, parts, PARTS):
        part = start + tl.arange(0, PARTS)
        count = tl.minimum(tl.maximum(rows - part * part_rows, 0), part_rows).to(tl.float32)
        mask = (part < parts)[:, None] & exists[None, :]
        offset = part[:, None] * C + channel[None, :]
        deviation = tl.load(means_ptr + offset, mask, 0.0) - mean[None, :]
        squares += tl.where(
            mask, tl.load(squares_ptr + offset, mask, 0.0) + deviation * deviation * count[:, None], 0.0
        )
    tl.store(mean_ptr + channel, mean, exists)
    tl.store(variance_ptr + channel, tl.sum(squares, 0) / rows, exists)


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


def _rows(x_BCHW: Tensor) -> int:
    return x_BCHW.numel() // x_BCHW.shape[1]


def _reduction(rows: int, channels: int, elements: int) -> tuple[tuple[int, int], int, int, tuple[int, int]]:
    """Grid, tiles per program, parts and tile of a reduction over rows."""
    height, width = tile(channels, elements)
    blocks = triton.cdiv(channels, width)
    tiles = triton.cdiv(triton.cdiv(rows, height) * blocks, PARTS)
    parts = triton.cdiv(rows, height * tiles)
    return (parts, blocks), tiles, parts, (height, width)


def _statistics(x_BCHW: Tensor, running_mean: Tensor, running_var: Tensor, training: bool) -> tuple[Tensor, Tensor]:
    if not training:
        copied = torch.contiguous_format
        return running_mean.clone(memory_format=copied), running_var.clone(memory_format=copied)
    rows, channels = _rows(x_BCHW), x_BCHW.shape[1]
    grid, tiles, parts, (height, width) = _reduction(rows, channels, ELEMENTS)
    means, squares = x_BCHW.new_empty((2, parts, channels), dtype=torch.float32)
    moments_kernel[grid](x_BCHW, means, squares, rows, channels, tiles, ROWS=height, CHANNELS=width, num_warps=WARPS)
    mean, variance = (x_BCHW.new_empty(channels, dtype=torch.float32) for _ in range(2))
    merge_kernel[(triton.cdiv(channels, 8),)](
        means, squares, mean, variance, parts, rows, channels, tiles * height, PARTS=128, CHANNELS=8, num_warps=WARPS
    )
    return mean, variance


def bn_relu(
    x_BCHW: Tensor, weight: Tensor, bias: Tensor, running_mean: Tensor, running_var: Tensor, training: bool, eps: float
) -> tuple[Tensor, Tensor, Tensor]:
    """See `fastseg.kernels.bn_relu.bn_relu_op`."""
    x_BCHW, weight, bias = channels_last(x_BCHW), weight.contiguous(), bias.contiguous()
    mean, variance = _statistics(x_BCHW, running_mean, running_var, training)
    rows, channels = _rows(x_BCHW), x_BCHW.shape[1]
    height, width = tile(channels, ELEMENTS)
    y = empty(tuple(x_BCHW.shape), x_BCHW)
    grid = (triton.cdiv(rows, height), triton.cdiv(channels, width))
    apply_kernel[grid](
        x_BCHW, weight, bias, mean, variance, y, rows, channels, eps, ROWS=height, CHANNELS=width, num_warps=WARPS
    )
    return y, mean, variance


def bn_relu_pool(
    x_BCHW: Tensor, weight: Tensor, bias: Tensor, running_mean: Tensor, running_var: Tensor, training: bool, eps: float
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """See `fastseg.kernels.bn_relu.bn_relu_pool_op`."""
    x_BCHW, weight, bias = channels_last(x_BCHW), weight.contiguous(), bias.contiguous()
    mean, variance = _statistics(x_BCHW, running_mean, running_var, training)
    batch, channels, *large = x_BCHW.shape
    small = [halved(size) for size in large]
    values = empty((batch, channels, *small), x_BCHW)
    codes = empty((batch, channels, *small), x_BCHW, torch.uint8)
    pixels = batch * small[0] * small[1]
    # Four pixels are met per pooled one.
    rows, width = tile(channels, ELEMENTS // 2)
    apply_pool_kernel[(triton.cdiv(pixels, rows), triton.cdiv(channels, width))](
        x_BCHW,
        weight,
        bias,
        mean,
        variance,
        values,
        codes,
        pixels,
        channels,
        *large,
        *small,
        eps,
        PIXELS=rows,
        CHANNELS=width,
        num_warps=WARPS,
    )
    return values, codes, mean, variance


def bn_relu_backward(
    gradient: Tensor,
    codes: Tensor | None,
    x_BCHW: Tensor,
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
    values = rows = _rows(x_BCHW)
    vectors = [vector.contiguous() for vector in (weight, bias, mean, variance)]
    given: tuple[Tensor, ...] = (gradient, x_BCHW, *vectors)
    sizes: tuple[int, ...] = (channels,)
    sums_kernel, kernel, unit = backward_sums_kernel, backward_kernel, "ROWS"
    if codes is not None:
        # One pooled pixel stands for its window of four.
        small = gradient.shape[-2:]
        rows = batch * small[0] * small[1]
        given = (gradient, channels_last(codes), *given[1:])
        sizes = (channels, *large, *small)
        sums_kernel, kernel, unit = backward_sums_pool_kernel, backward_pool_kernel, "PIXELS"

    grid, tiles, parts, (height, width) = _reduction(rows, channels, ELEMENTS if codes is None else ELEMENTS // 2)
    shape = {unit: height, "CHANNELS": width, "num_warps": WARPS}
    sums = x_BCHW.new_empty((2, parts, channels), dtype=torch.float32)
    sums_kernel[grid](*given, sums, rows, *sizes, eps, tiles, **shape)
    d_weight, d_bias = sums[0].sum(0), sums[1].sum(0)
    d_x = empty(tuple(x_BCHW.shape), x_BCHW)
    grid = (triton.cdiv(rows, height), triton.cdiv(channels, width))
    counts = (rows,) if codes is None else (values, rows)
    kernel[grid](*given, d_weight, d_bias, d_x, *counts, *sizes, eps, TRAINING=training, **shape)
    return d_x, d_weight.to(weight.dtype), d_bias.to(bias.dtype)
