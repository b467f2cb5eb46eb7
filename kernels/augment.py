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
