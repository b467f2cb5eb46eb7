"""2x2 max-pooling with positions, and the unpooling that puts values back where the maxima were.

SegNet's way up (Badrinarayanan, Kendall, Cipolla 2017, section 3). Odd sizes follow the published network: the last row
or column forms a window of its own (ceil mode), and unpooling restores exactly the size before.

A position is one byte, the code 2 * dy + dx of the maximum in its window; torch's are int64. Each output pixel is
written once, by a gather: no memset, no atomics, so the same bits each time. The first of equal maxima wins, the last
of several NaN, as in torch. `unpool` is also the gradient of `pool`, and `take` that of `unpool`.
"""

from typing import Any

import torch
import torch.nn.functional as F

from fastseg.kernels.launch import empty, halved, operator


def torch_pool(x_BCHW: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """PyTorch's: values and int64 positions, both [B, C, ceil(H/2), ceil(W/2)]; layout is kept."""
    return F.max_pool2d(x_BCHW, 2, 2, ceil_mode=True, return_indices=True)


def torch_unpool(x_BCHW: torch.Tensor, positions: torch.Tensor, size: tuple[int, int]) -> torch.Tensor:
    """PyTorch's: [B, C, h, w] and its positions -> [B, C, *size], zero where no maximum was; channels-last.

    CUDA's kernel writes NCHW; one copy here keeps the next convolution and its backward on channels-last.
    """
    out = F.max_unpool2d(x_BCHW, positions, [2, 2], [2, 2], output_size=list(size))
    return out.contiguous(memory_format=torch.channels_last)


def pool(x_BCHW: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """[B, C, H, W] -> values and uint8 codes, both [B, C, ceil(H/2), ceil(W/2)], channels-last."""
    return _Pool.apply(x_BCHW)


def unpool(x_BCHW: torch.Tensor, codes: torch.Tensor, height: int, width: int) -> torch.Tensor:
    """[B, C, h, w] and its codes -> channels-last [B, C, height, width], zero where no maximum was."""
    return _Unpool.apply(x_BCHW, codes, height, width)


def take(x_BCHW: torch.Tensor, codes: torch.Tensor) -> torch.Tensor:
    """The value of [B, C, H, W] at each window's code -> channels-last, shaped as the codes."""
    return _Take.apply(x_BCHW, codes)


def _fake_pool(x_BCHW):
    shape = (*x_BCHW.shape[:2], halved(x_BCHW.shape[-2]), halved(x_BCHW.shape[-1]))
    return empty(shape, x_BCHW), empty(shape, x_BCHW, torch.uint8)


@operator("pool(Tensor x) -> (Tensor, Tensor)", fake=_fake_pool)
def pool_op(x_BCHW: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """`pool`, without a gradient."""
    values, positions = torch_pool(x_BCHW.contiguous(memory_format=torch.channels_last))
    width = x_BCHW.shape[-1]
    return values, (positions // width % 2 * 2 + positions % width % 2).to(torch.uint8)


def _fake_unpool(x_BCHW, codes, height, width):
    return empty((*x_BCHW.shape[:2], height, width), x_BCHW)


@operator("unpool(Tensor x, Tensor codes, SymInt height, SymInt width) -> Tensor", fake=_fake_unpool)
def unpool_op(x_BCHW: torch.Tensor, codes: torch.Tensor, height: int, width: int) -> torch.Tensor:
    """`unpool`, without a gradient."""
    out = empty((*x_BCHW.shape[:2], height, width), x_BCHW)
    for code in range(4):
        part = out[..., code // 2 :: 2, code % 2 :: 2]
        rows, columns = part.shape[-2:]
        part.copy_(torch.where(codes == code, x_BCHW, 0)[..., :rows, :columns])
    return out


def _fake_take(x_BCHW, codes):
    return empty(tuple(codes.shape), x_BCHW)


@operator("take(Tensor x, Tensor codes) -> Tensor", fake=_fake_take)
def take_op(x_BCHW: torch.Tensor, codes: torch.Tensor) -> torch.Tensor:
    """`take`, without a gradient."""
    height, width = codes.shape[-2:]
    padded = F.pad(x_BCHW, (0, 2 * width - x_BCHW.shape[-1], 0, 2 * height - x_BCHW.shape[-2]))
    out = empty(tuple(codes.shape), x_BCHW).zero_()
    for code in range(4):
        out = torch.where(codes == code, padded[..., code // 2 :: 2, code % 2 :: 2], out)
    return out.contiguous(memory_format=torch.channels_last)


class _Pool(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x_BCHW: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        values, codes = pool_op(x_BCHW)
        ctx.size = x_BCHW.shape[-2:]
        ctx.save_for_backward(codes)
        ctx.mark_non_differentiable(codes)
        ctx.set_materialize_grads(False)  # no zeros are filled in for codes
        return values, codes

    @staticmethod
    def backward(ctx: Any, gradient: torch.Tensor | None, _codes: torch.Tensor | None) -> torch.Tensor | None:
        if gradient is None:
            return None
        return unpool(gradient, *ctx.saved_tensors, *ctx.size)


class _Unpool(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x_BCHW: torch.Tensor, codes: torch.Tensor, height: int, width: int) -> torch.Tensor:
        ctx.save_for_backward(codes)
        return unpool_op(x_BCHW, codes, height, width)

    @staticmethod
    def backward(ctx: Any, gradient: torch.Tensor) -> tuple[torch.Tensor, None, None, None]:
        return take(gradient, *ctx.saved_tensors), None, None, None


class _Take(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x_BCHW: torch.Tensor, codes: torch.Tensor) -> torch.Tensor:
        ctx.size = x_BCHW.shape[-2:]
        ctx.save_for_backward(codes)
        return take_op(x_BCHW, codes)

    @staticmethod
    def backward(ctx: Any, gradient: torch.Tensor) -> tuple[torch.Tensor, None]:
        return unpool(gradient, *ctx.saved_tensors, *ctx.size), None
