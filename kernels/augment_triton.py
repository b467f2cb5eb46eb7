"""Triton kernel of `fastseg.kernels.augment`: a program makes a run of output pixels of one sample."""

import torch
import triton
import triton.language as tl

from fastseg.data.classes import VOID
from fastseg.kernels import plan
from fastseg.kernels.launch import empty


@triton.jit
def place(pixel, mirror, dy, dx, rows, columns, height, width):
    """Row and column of the resized image that an output pixel shows, and whether the image covers it."""
    y, x = pixel // width - dy, pixel % width - dx
    covered = (pixel < height * width) & (y >= 0) & (y < rows) & (x >= 0) & (x < columns)
    return y, tl.where(mirror > 0, columns - 1 - x, x), covered


@triton.jit
def taps(size_in, size_out):
    """How many input pixels at most make an output pixel: see `fastseg.pipelines.resize.taps`."""
    return tl.where(size_in == size_out, 1, tl.maximum(2, (2 * size_in + size_out - 1) // size_out))


@triton.jit
def triangle(out, tap, size_in, size_out):
    """Which input pixel the tap of an output pixel is, and its weight as a whole number.

    See `fastseg.pipelines.resize.triangle`. All numbers that are divided are positive: C rounds towards zero.
    """
    centre, radius = (2 * out + 1) * size_in - size_out, 2 * tl.maximum(size_in, size_out)
    beyond = 2 * size_in  # pixels, more than a radius
    first = (centre - radius + 2 * size_out * beyond) // (2 * size_out) - beyond + 1
    position = first + tap
    weight = tl.maximum(radius - tl.abs(2 * size_out * position - centre), 0)
    return tl.minimum(tl.maximum(position, 0), size_in - 1), weight.to(tl.float32)


@triton.jit
def value_of(images_ptr, y, x, channel, covered, H, W, pitch, rows, columns, RESIZE: tl.constexpr):
    """One channel of pixels of the resized image, in counts of 0..255; 0 where it does not cover."""
    if RESIZE:
        total = tl.zeros(y.shape, tl.float32)
        all_y = tl.zeros(y.shape, tl.float32)
        all_x = tl.zeros(y.shape, tl.float32)
        for tap_y in range(taps(H, rows)):
            source_y, weight_y = triangle(y, tap_y, H, rows)
            line_ptr = images_ptr + source_y * pitch * 3 + channel
            line = tl.zeros(y.shape, tl.float32)
            all_x = tl.zeros(y.shape, tl.float32)
            for tap_x in range(taps(W, columns)):
                source_x, weight_x = triangle(x, tap_x, W, columns)
                line += weight_x * tl.load(line_ptr + source_x * 3, covered, 0).to(tl.float32)
                all_x += weight_x
            total += weight_y * line
            all_y += weight_y
        value = tl.floor(tl.where(covered, total / (all_y * all_x), 0.0) + 0.5)
    else:
        value = tl.load(images_ptr + (y * pitch + x) * 3 + channel, covered, 0).to(tl.float32)
    return value


@triton.jit
def augment_kernel(
    images_ptr,
    labels_ptr,
    samples_ptr,
    mean_ptr,
    std_ptr,
    colours_ptr,
    out_ptr,
    labels_out_ptr,
    height,
    width,
    VOID: tl.constexpr,
    RESIZE: tl.constexpr,
    COLOUR: tl.constexpr,
    PIXELS: tl.constexpr,
):
    sample = tl.program_id(1).to(tl.int64)
    images_ptr += tl.load(samples_ptr + sample * 10)
    labels_ptr += tl.load(samples_ptr + sample * 10 + 1)
    H = tl.load(samples_ptr + sample * 10 + 2).to(tl.int32)
    W = tl.load(samples_ptr + sample * 10 + 3).to(tl.int32)
    pitch = tl.load(samples_ptr + sample * 10 + 4)
    rows = tl.load(samples_ptr + sample * 10 + 5).to(tl.int32)
    columns = tl.load(samples_ptr + sample * 10 + 6).to(tl.int32)
    mirror = tl.load(samples_ptr + sample * 10 + 7).to(tl.int32)
    dy = tl.load(samples_ptr + sample * 10 + 8).to(tl.int32)
    dx = tl.load(samples_ptr + sample * 10 + 9).to(tl.int32)

    pixel = tl.program_id(0) * PIXELS + tl.arange(0, PIXELS)
    y, x, covered = place(pixel, mirror, dy, dx, rows, columns, height, width)
    label_y, label_x = y, x
    if RESIZE:  # to the nearest pixel, by the integer rule
        label_y, label_x = (2 * y + 1) * H // (2 * rows), (2 * x + 1) * W // (2 * columns)
    label = tl.load(labels_ptr + label_y * pitch + label_x, covered, VOID)
    tl.store(labels_out_ptr + sample * height * width + pixel, label, pixel < height * width)
    out_ptr += sample * height * width * 3
    if COLOUR:  # a channel is made of all three: each is gathered once
        red = value_of(images_ptr, y, x, 0, covered, H, W, pitch, rows, columns, RESIZE)
        green = value_of(images_ptr, y, x, 1, covered, H, W, pitch, rows, columns, RESIZE)
        blue = value_of(images_ptr, y, x, 2, covered, H, W, pitch, rows, columns, RESIZE)
        for channel in tl.static_range(3):
            row_ptr = colours_ptr + sample * 12 + channel * 4
            value = red * tl.load(row_ptr) + green * tl.load(row_ptr + 1) + blue * tl.load(row_ptr + 2)
            value = tl.minimum(tl.maximum(value + tl.load(row_ptr + 3), 0.0), 255.0)
            value = tl.where(covered, value, 0.0) - tl.load(mean_ptr + channel)
            value = tl.div_rn(value, tl.load(std_ptr + channel)).to(out_ptr.dtype.element_ty)
            tl.store(out_ptr + pixel * 3 + channel, value, pixel < height * width)
    else:
        # The same pixels' channels as three runs of neighbours, so that stores are 16 bytes wide.
        for part in tl.static_range(3):
            element = (tl.program_id(0) * 3 + part) * PIXELS + tl.arange(0, PIXELS)
            channel = element % 3
            y, x, covered = place(element // 3, mirror, dy, dx, rows, columns, height, width)
            value = value_of(images_ptr, y, x, channel, covered, H, W, pitch, rows, columns, RESIZE)
            # Correctly rounded, as torch divides: the same batch from every tier.
            value = tl.div_rn(value - tl.load(mean_ptr + channel), tl.load(std_ptr + channel))
            inside = element < height * width * 3
            tl.store(out_ptr + element, value.to(out_ptr.dtype.element_ty), inside)


def augment(
    images: torch.Tensor,
    labels: torch.Tensor,
    samples_B10: torch.Tensor,
    mean_3: torch.Tensor,
    std_3: torch.Tensor,
    dtype: torch.dtype,
    height: int,
    width: int,
    resize: bool,
    colours_B12: torch.Tensor | None = None,
) -> tuple[torch.Tensor, torch.Tensor]:
    """See `fastseg.kernels.augment.augment`."""
    batch = len(samples_B10)
    out = empty((batch, 3, height, width), images, dtype)
    labels_out = labels.new_empty((batch, height, width))
    pixels = plan.RESIZED if resize else plan.AUGMENTED
    augment_kernel[(plan.cdiv(height * width, pixels), batch)](
        images.contiguous(),
        labels.contiguous(),
        samples_B10.contiguous(),
        mean_3.contiguous(),
        std_3.contiguous(),
        None if colours_B12 is None else colours_B12.contiguous(),
        out,
        labels_out,
        height,
        width,
        VOID=VOID,
        RESIZE=resize,
        COLOUR=colours_B12 is not None,
        PIXELS=pixels,
        num_warps=plan.STREAM_WARPS,
    )
    return out, labels_out
