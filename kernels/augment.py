"""From decoded uint8 images and labels to a training batch, in one pass: gather, mirror, shift, normalise, cast.

Images and labels move together: a sample is image `index` of the store, mirrored left-right where `mirror`, then moved
by (dy, dx) whole pixels, of which the top left `height` x `width` are kept; uncovered pixels are 0 (black, before
normalisation) and VOID.
"""

import torch

from fastseg.data.classes import VOID
from fastseg.kernels.launch import empty, operator


def torch_augment(
    images_NHWC: torch.Tensor,
    labels_NHW: torch.Tensor,
    samples_B4: torch.Tensor,
    mean_3: torch.Tensor,
    std_3: torch.Tensor,
    dtype: torch.dtype,
    height: int,
    width: int,
) -> tuple[torch.Tensor, torch.Tensor]:
    """With PyTorch's operations: as `augment`."""
    index, mirror, dy, dx = (column[:, None, None] for column in samples_B4.long().unbind(1))
    H, W = labels_NHW.shape[-2:]
    y = torch.arange(height, device=dy.device)[None, :, None] - dy
    x = torch.arange(width, device=dx.device)[None, None, :] - dx
    covered = (y >= 0) & (y < H) & (x >= 0) & (x < W)
    y, x = y.clamp(0, H - 1), x.clamp(0, W - 1)
    x = torch.where(mirror > 0, W - 1 - x, x)
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
    height: int,
    width: int,
) -> tuple[torch.Tensor, torch.Tensor]:
    """As `augment`, on a CPU: whole windows instead of a gather per pixel, then one pass of arithmetic over the batch.

    Pixels are read once as uint8 and become fp32 where they are to stay; rows of 3 W values keep the inner loops long,
    where 3 channels would make them short.
    """
    batch, (H, W) = len(samples_B4), labels_NHW.shape[1:]
    images = torch.empty(batch, height, 3 * width)
    labels = torch.empty(batch, height, width, dtype=torch.uint8)
    for out, moved, (index, mirror, dy, dx) in zip(images, labels, samples_B4.tolist(), strict=True):
        top, bottom, left, right = max(dy, 0), min(height, H + dy), max(dx, 0), min(width, W + dx)
        if (top, bottom, left, right) != (0, height, 0, width):
            out.zero_()
            moved.fill_(VOID)
        if top < bottom and left < right:
            rows, columns = slice(top - dy, bottom - dy), slice(left - dx, right - dx)
            if mirror:
                columns = slice(W - columns.stop, W - columns.start)
            image, label = images_NHWC[index, rows, columns], labels_NHW[index, rows, columns]
            if mirror:
                image, label = image.flip(1), label.flip(1)
            out[top:bottom, 3 * left : 3 * right] = image.flatten(1)
            moved[top:bottom, left:right] = label
    images = images.sub_(mean_3.expand(width, 3).flatten()).div_(std_3.expand(width, 3).flatten()).to(dtype)
    return images.view(batch, height, width, 3).permute(0, 3, 1, 2), labels


def _fake_augment(images_NHWC, labels_NHW, samples_B4, mean_3, std_3, dtype, height, width):
    batch = samples_B4.shape[0]
    return empty((batch, 3, height, width), images_NHWC, dtype), labels_NHW.new_empty((batch, height, width))


@operator(
    "augment(Tensor images, Tensor labels, Tensor samples, Tensor mean, Tensor std, ScalarType dtype, SymInt height, "
    "SymInt width) -> (Tensor, Tensor)",
    fake=_fake_augment,
)
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
    """Images `dtype`[B, 3, H, W], channels-last, and labels uint8[B, H, W].

    Args:
        images_NHWC: uint8[N, H, W, 3].
        labels_NHW: uint8[N, H, W].
        samples_B4: int32[B, 4]: index, mirror (0 or 1), dy, dx.
        mean_3, std_3: fp32, in 0..255.
        dtype: of the images.
        height, width: of the batch.
    """
    return torch_augment(images_NHWC, labels_NHW, samples_B4, mean_3, std_3, dtype, height, width)
