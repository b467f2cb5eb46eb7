"""Triton kernel of `fastseg.kernels.augment`: a program makes a run of output pixels, each from one input pixel."""

import torch
import triton
import triton.language as tl

from fastseg.data.classes import VOID
from fastseg.kernels import plan
from fastseg.kernels.launch import empty


@triton.jit
def source(pixel, index, mirror, dy, dx, H, W, height, width):
    """The pixel of the store that an output pixel comes from, and whether the image covers it."""
    y, x = pixel // width - dy, pixel % width - dx
    covered = (pixel < height * width) & (y >= 0) & (y < H) & (x >= 0) & (x < W)
    return index * H * W + y * W + tl.where(mirror > 0, W - 1 - x, x), covered


@triton.jit
def augment_kernel(
    images_ptr,
    labels_ptr,
    samples_ptr,
    mean_ptr,
    std_ptr,
    out_ptr,
    labels_out_ptr,
    H,
    W,
    height,
    width,
    VOID: tl.constexpr,
    PIXELS: tl.constexpr,
):
    sample = tl.program_id(1).to(tl.int64)
    index = tl.load(samples_ptr + sample * 4).to(tl.int64)
    mirror = tl.load(samples_ptr + sample * 4 + 1)
    dy = tl.load(samples_ptr + sample * 4 + 2)
    dx = tl.load(samples_ptr + sample * 4 + 3)

    pixel = tl.program_id(0) * PIXELS + tl.arange(0, PIXELS)
    place, covered = source(pixel, index, mirror, dy, dx, H, W, height, width)
    label = tl.load(labels_ptr + place, covered, VOID)
    tl.store(labels_out_ptr + sample * height * width + pixel, label, pixel < height * width)
    # The same pixels' channels as three runs of neighbours, so that stores are 16 bytes wide.
    for part in tl.static_range(3):
        element = (tl.program_id(0) * 3 + part) * PIXELS + tl.arange(0, PIXELS)
        channel = element % 3
        place, covered = source(element // 3, index, mirror, dy, dx, H, W, height, width)
        value = tl.load(images_ptr + place * 3 + channel, covered, 0).to(tl.float32)
        # Correctly rounded, as torch divides: the same batch from every tier.
        value = tl.div_rn(value - tl.load(mean_ptr + channel), tl.load(std_ptr + channel))
        inside = element < height * width * 3
        tl.store(out_ptr + sample * height * width * 3 + element, value.to(out_ptr.dtype.element_ty), inside)


def augment(
    images_NHWC: torch.Tensor,
    labels_NHW: torch.Tensor,
    samples_B4: torch.Tensor,
    mean_3: torch.Tensor,
    std_3: torch.Tensor,
    dtype: torch.dtype,
    height: int,
    width: int,
) -> tuple[torch.Tensor, torch.Tensor]:
    """See `fastseg.kernels.augment.augment`."""
    images_NHWC, labels_NHW, samples_B4 = images_NHWC.contiguous(), labels_NHW.contiguous(), samples_B4.contiguous()
    (H, W), batch = labels_NHW.shape[1:], len(samples_B4)
    out = empty((batch, 3, height, width), images_NHWC, dtype)
    labels_out = labels_NHW.new_empty((batch, height, width))
    grid = (plan.cdiv(height * width, plan.AUGMENTED), batch)
    augment_kernel[grid](
        images_NHWC,
        labels_NHW,
        samples_B4,
        mean_3.contiguous(),
        std_3.contiguous(),
        out,
        labels_out,
        H,
        W,
        height,
        width,
        VOID=VOID,
        PIXELS=plan.AUGMENTED,
        num_warps=plan.STREAM_WARPS,
    )
    return out, labels_out
