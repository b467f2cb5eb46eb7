"""From decoded uint8 images and labels to a training batch, in one pass: gather, mirror, shift, normalise, cast.

Images and labels move together: a sample is image `index` of the store, mirrored left-right where `mirror`, then moved
by (dy, dx) whole pixels; uncovered pixels are 0 (black, before normalisation) and VOID.
"""

import torch

from fastseg.data.classes import VOID
from fastseg.kernels.launch import empty, on_triton


def torch_augment(
    images_NHWC: torch.Tensor,
    labels_NHW: torch.Tensor,
    samples_B4: torch.Tensor,
    mean_3: torch.Tensor,
    std_3: torch.Tensor,
    dtype: torch.dtype,
) -> tuple[torch.Tensor, torch.Tensor]:
    """With PyTorch's operations: as `augment`."""
    index, mirror, dy, dx = (column[:, None, None] for column in samples_B4.long().unbind(1))
    height, width = labels_NHW.shape[-2:]
    y = torch.arange(height, device=dy.device)[None, :, None] - dy
    x = torch.arange(width, device=dx.device)[None, None, :] - dx
    covered = (y >= 0) & (y < height) & (x >= 0) & (x < width)
    y, x = y.clamp(0, height - 1), x.clamp(0, width - 1)
    x = torch.where(mirror > 0, width - 1 - x, x)
    images = torch.where(covered[..., None], images_NHWC[index, y, x], 0)
    labels = torch.where(covered, labels_NHW[index, y, x], VOID)
    return ((images.float() - mean_3) / std_3).to(dtype).permute(0, 3, 1, 2), labels


def augment_by_slices(
    images_NHWC: torch.Tensor,
    labels_NHW: torch.Tensor,
    samples_B4: torch.Tensor,
    mean_3: torch.Tensor,
    std_3: torch.Tensor,
    dtype: torch.dtype,
) -> tuple[torch.Tensor, torch.Tensor]:
    """As `augment`, on a CPU: sample by sample, with whole windows instead of a gather per pixel.

    Pixels are read once as uint8 and turned into fp32 where they are to stay; rows of 3 W values keep the inner loops
    long, where 3 channels would make them short.
    """
    batch, (height, width) = len(samples_B4), labels_NHW.shape[1:]
    images = torch.empty(batch, height, 3 * width, dtype=dtype)
    labels = torch.empty(batch, height, width, dtype=torch.uint8)
    scratch = None if dtype == torch.float32 else torch.empty(height, 3 * width)
    mean, std = mean_3.repeat(width), std_3.repeat(width)
    black = (0 - mean).div_(std)
    for position, (index, mirror, dy, dx) in enumerate(samples_B4.tolist()):
        image, label = images_NHWC[index], labels_NHW[index]
        if mirror:
            image, label = image.flip(1), label.flip(1)
        out, moved = images[position] if scratch is None else scratch, labels[position]
        top, bottom, left, right = max(dy, 0), height + min(dy, 0), max(dx, 0), width + min(dx, 0)
        if (top, bottom, left, right) != (0, height, 0, width):
            out.copy_(black)
            moved.fill_(VOID)
        if top < bottom and left < right:
            columns = slice(3 * left, 3 * right)
            source = image.view(height, 3 * width)[top - dy : bottom - dy, 3 * (left - dx) : 3 * (right - dx)]
            out[top:bottom, columns].copy_(source).sub_(mean[columns]).div_(std[columns])
            moved[top:bottom, left:right] = label[top - dy : bottom - dy, left - dx : right - dx]
        if scratch is not None:
            images[position].copy_(scratch)
    return images.view(batch, height, width, 3).permute(0, 3, 1, 2), labels


@torch.library.custom_op("fastseg::augment", mutates_args=())
def augment(
    images_NHWC: torch.Tensor,
    labels_NHW: torch.Tensor,
    samples_B4: torch.Tensor,
    mean_3: torch.Tensor,
    std_3: torch.Tensor,
    dtype: torch.dtype,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Images `dtype`[B, 3, H, W], channels-last, and labels uint8[B, H, W].

    Args:
        images_NHWC: uint8[N, H, W, 3].
        labels_NHW: uint8[N, H, W].
        samples_B4: int32[B, 4]: index, mirror (0 or 1), dy, dx.
        mean_3, std_3: fp32, in 0..255.
        dtype: of the images.
    """
    if on_triton(images_NHWC):
        from fastseg.kernels import augment_triton

        return augment_triton.augment(images_NHWC, labels_NHW, samples_B4, mean_3, std_3, dtype)
    return torch_augment(images_NHWC, labels_NHW, samples_B4, mean_3, std_3, dtype)


@augment.register_fake
def _(images_NHWC, labels_NHW, samples_B4, mean_3, std_3, dtype):
    batch, size = samples_B4.shape[0], labels_NHW.shape[1:]
    return empty((batch, 3, *size), images_NHWC, dtype), labels_NHW.new_empty((batch, *size))
