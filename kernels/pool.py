"""2x2 max-pooling with positions, and the unpooling that puts values back where the maxima were.

SegNet's way up (Badrinarayanan, Kendall, Cipolla 2017, section 3). Odd sizes follow the published network: the last row
or column forms a window of its own (ceil mode), and unpooling restores exactly the size before.

A position is one byte, the code 2 * dy + dx of the maximum in its window; torch's are int64. Each output pixel is
written once, by a gather: no memset, no atomics, so the same bits each time. The first of equal maxima wins, the last
of several NaN, as in torch. `unpool` is also the gradient of `pool`, and `take` that of `unpool`.
"""

import torch
import torch.nn.functional as F

from fastseg.kernels.launch import empty, halved, on_triton


def torch_pool(x_BCHW: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """PyTorch's: values and int64 positions, both [B, C, ceil(H/2), ceil(W/2)]; layout is kept."""
    return F.max_pool2d(x_BCHW, 2, 2, ceil_mode=True, return_indices=True)


def torch_unpool(x_BCHW: torch.Tensor, positions: torch.Tensor, size: tuple[int, int]) -> torch.Tensor:
    """PyTorch's: [B, C, h, w] and its positions -> [B, C, *size], zero where no maximum was; channels-last.

    CUDA's kernel writes NCHW; one copy here keeps the next convolution and its backward on channels-last.
    """
    out = F.max_unpool2d(x_BCHW, positions, [2, 2], [2, 2], output_size=list(size))
    return out.contiguous(memory_format=torch.channels_last)


@torch.library.custom_op("fastseg::pool", mutates_args=())
def pool(x_BCHW: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """[B, C, H, W] -> values and uint8 codes, both [B, C, ceil(H/2), ceil(W/2)], channels-last."""
    if on_triton(x_BCHW):
        from fastseg.kernels import pool_triton

        return pool_triton.pool(x_BCHW)
    values, positions = torch_pool(x_BCHW.contiguous(memory_format=torch.channels_last))
    width = x_BCHW.shape[-1]
    return values, (positions // width % 2 * 2 + positions % width % 2).to(torch.uint8)


@torch.library.custom_op("fastseg::unpool", mutates_args=())
def unpool(x_BCHW: torch.Tensor, codes: torch.Tensor, height: int, width: int) -> torch.Tensor:
    """[B, C, h, w] and its codes -> channels-last [B, C, height, width], zero where no maximum was."""
    if on_triton(x_BCHW):
        from fastseg.kernels import pool_triton

        return pool_triton.unpool(x_BCHW, codes, height, width)
    out = empty((*x_BCHW.shape[:2], height, width), x_BCHW)
    for code in range(4):
        part = out[..., code // 2 :: 2, code % 2 :: 2]
        rows, columns = part.shape[-2:]
        part.copy_(torch.where(codes == code, x_BCHW, 0)[..., :rows, :columns])
    return out


@torch.library.custom_op("fastseg::take", mutates_args=())
def take(x_BCHW: torch.Tensor, codes: torch.Tensor) -> torch.Tensor:
    """The value of [B, C, H, W] at each window's code -> channels-last, shaped as the codes."""
    if on_triton(x_BCHW):
        from fastseg.kernels import pool_triton

        return pool_triton.take(x_BCHW, codes)
    height, width = codes.shape[-2:]
    padded = F.pad(x_BCHW, (0, 2 * width - x_BCHW.shape[-1], 0, 2 * height - x_BCHW.shape[-2]))
    out = empty(tuple(codes.shape), x_BCHW).zero_()
    for code in range(4):
        out = torch.where(codes == code, padded[..., code // 2 :: 2, code % 2 :: 2], out)
    return out.contiguous(memory_format=torch.channels_last)


@pool.register_fake
def _(x_BCHW):
    shape = (*x_BCHW.shape[:2], halved(x_BCHW.shape[-2]), halved(x_BCHW.shape[-1]))
    return empty(shape, x_BCHW), empty(shape, x_BCHW, torch.uint8)


@unpool.register_fake
def _(x_BCHW, codes, height, width):
    return empty((*x_BCHW.shape[:2], height, width), x_BCHW)


@take.register_fake
def _(x_BCHW, codes):
    return empty(tuple(codes.shape), x_BCHW)


def _save_codes(ctx, inputs, output):
    ctx.size = inputs[0].shape[-2:]
    ctx.save_for_backward(output[1] if isinstance(output, tuple) else inputs[1])


def _pool_backward(ctx, gradient, _codes):
    return unpool(gradient, *ctx.saved_tensors, *ctx.size)


def _unpool_backward(ctx, gradient):
    return take(gradient, *ctx.saved_tensors), None, None, None


def _take_backward(ctx, gradient):
    return unpool(gradient, *ctx.saved_tensors, *ctx.size), None


pool.register_autograd(_pool_backward, setup_context=_save_codes)
unpool.register_autograd(_unpool_backward, setup_context=_save_codes)
take.register_autograd(_take_backward, setup_context=_save_codes)
