"""Triton kernels of `fastseg.kernels.pool`.

A program holds a tile of pooled pixels x channels and meets each of the four pixels of their windows once. Values pass
through fp32, which changes none of them: in Triton's interpreter bf16 compares as raw bits.
"""

import torch
import triton
import triton.language as tl

from fastseg.kernels import plan
from fastseg.kernels.launch import channels_last, empty, halved, over


@triton.jit
def window(first, end, C, h, w, PIXELS: tl.constexpr, CHANNELS: tl.constexpr):
    """Pooled pixels from the first on (image, row, column), channels, offsets [PIXELS, CHANNELS] and which are before
    the end."""
    pixel = first + tl.arange(0, PIXELS)
    channel = tl.program_id(1) * CHANNELS + tl.arange(0, CHANNELS)
    exists = (pixel < end)[:, None] & (channel < C)[None, :]
    # 64 bits: 195 images of 64 channels at 360x480 have more than 2^31 elements.
    offset = pixel.to(tl.int64)[:, None] * C + channel[None, :]
    return pixel // w // h, pixel // w % h, pixel % w, channel, offset, exists


@triton.jit
def corner(image, row, column, channel, exists, C, H, W, CODE: tl.constexpr):
    """Offsets of the pixel that CODE = 2 * dy + dx names in each window, and which of them exist."""
    y, x = 2 * row + CODE // 2, 2 * column + CODE % 2
    offset = ((image * H + y) * W + x).to(tl.int64)[:, None] * C + channel[None, :]
    return offset, exists & ((y < H) & (x < W))[:, None]


@triton.jit
def pool_kernel(x_ptr, values_ptr, codes_ptr, pixels, C, H, W, h, w, PIXELS: tl.constexpr, CHANNELS: tl.constexpr):
    image, row, column, channel, out, exists = window(tl.program_id(0) * PIXELS, pixels, C, h, w, PIXELS, CHANNELS)
    best = tl.full([PIXELS, CHANNELS], -float("inf"), tl.float32)
    best_code = tl.zeros([PIXELS, CHANNELS], tl.int32)
    for code in tl.static_range(4):
        offset, inside = corner(image, row, column, channel, exists, C, H, W, code)
        value = tl.load(x_ptr + offset, inside, -float("inf")).to(tl.float32)
        better = (value > best) | (value != value)
        best = tl.where(better, value, best)
        best_code = tl.where(better, code, best_code)
    tl.store(values_ptr + out, best.to(values_ptr.dtype.element_ty), exists)
    tl.store(codes_ptr + out, best_code.to(tl.uint8), exists)


@triton.jit
def unpool_kernel(x_ptr, codes_ptr, out_ptr, pixels, C, H, W, h, w, PIXELS: tl.constexpr, CHANNELS: tl.constexpr):
    image, row, column, channel, pooled, exists = window(tl.program_id(0) * PIXELS, pixels, C, h, w, PIXELS, CHANNELS)
    value = tl.load(x_ptr + pooled, exists, 0.0).to(tl.float32)
    best_code = tl.load(codes_ptr + pooled, exists, 0)
    for code in tl.static_range(4):
        offset, inside = corner(image, row, column, channel, exists, C, H, W, code)
        tl.store(out_ptr + offset, tl.where(best_code == code, value, 0.0).to(out_ptr.dtype.element_ty), inside)


@triton.jit
def take_kernel(x_ptr, codes_ptr, out_ptr, pixels, C, H, W, h, w, PIXELS: tl.constexpr, CHANNELS: tl.constexpr):
    image, row, column, channel, out, exists = window(tl.program_id(0) * PIXELS, pixels, C, h, w, PIXELS, CHANNELS)
    best_code = tl.load(codes_ptr + out, exists, 0)
    found = tl.zeros([PIXELS, CHANNELS], tl.float32)
    # All four are read: loads that follow the codes could not be 16 bytes wide, and touch nearly all sectors anyway.
    for code in tl.static_range(4):
        offset, inside = corner(image, row, column, channel, exists, C, H, W, code)
        value = tl.load(x_ptr + offset, inside, 0.0).to(tl.float32)
        found = tl.where(best_code == code, value, found)
    tl.store(out_ptr + out, found.to(out_ptr.dtype.element_ty), exists)


def _launch(kernel, *maps: torch.Tensor, large: torch.Tensor, small: torch.Tensor) -> None:
    """Run a kernel over the pooled pixels of `small`, whose windows lie in `large`."""
    batch, channels, h, w = small.shape
    pixels = batch * h * w
    launch = over(kernel, "PIXELS", pixels, channels, plan.STREAMED // 2)
    launch(*maps, pixels, channels, *large.shape[-2:], h, w)


def pool(x_BCHW: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """See `fastseg.kernels.pool.pool`."""
    x_BCHW = channels_last(x_BCHW)
    shape = (*x_BCHW.shape[:2], halved(x_BCHW.shape[-2]), halved(x_BCHW.shape[-1]))
    values, codes = empty(shape, x_BCHW), empty(shape, x_BCHW, torch.uint8)
    _launch(pool_kernel, x_BCHW, values, codes, large=x_BCHW, small=values)
    return values, codes


def unpool(x_BCHW: torch.Tensor, codes: torch.Tensor, height: int, width: int) -> torch.Tensor:
    """See `fastseg.kernels.pool.unpool`."""
    x_BCHW, codes = channels_last(x_BCHW), channels_last(codes)
    out = empty((*x_BCHW.shape[:2], height, width), x_BCHW)
    _launch(unpool_kernel, x_BCHW, codes, out, large=out, small=x_BCHW)
    return out


def take(x_BCHW: torch.Tensor, codes: torch.Tensor) -> torch.Tensor:
    """See `fastseg.kernels.pool.take`."""
    x_BCHW, codes = channels_last(x_BCHW), channels_last(codes)
    out = torch.empty_like(codes, dtype=x_BCHW.dtype)
    _launch(take_kernel, x_BCHW, codes, out, large=x_BCHW, small=codes)
    return out
