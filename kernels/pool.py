"""2x2 max-pooling with positions, and the unpooling that puts values back where the maxima were.

SegNet's way up (Badrinarayanan, Kendall, Cipolla 2017, section 3). Odd sizes follow the published network: the last row
or column forms a window of its own (ceil mode), and unpooling restores exactly the size before.
"""

import torch
import torch.nn.functional as F


def pool(x_BCHW: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """[B, C, H, W] -> values and int64 positions, both [B, C, ceil(H/2), ceil(W/2)]; layout is kept."""
    return F.max_pool2d(x_BCHW, 2, 2, ceil_mode=True, return_indices=True)


def unpool(x_BCHW: torch.Tensor, positions: torch.Tensor, size: tuple[int, int]) -> torch.Tensor:
    """The inverse: [B, C, h, w] and its positions -> [B, C, *size], zero where no maximum was; channels-last.

    CUDA's kernel writes NCHW; one copy here keeps the next convolution and its backward on channels-last.
    """
    out = F.max_unpool2d(x_BCHW, positions, [2, 2], [2, 2], output_size=list(size))
    return out.contiguous(memory_format=torch.channels_last)
