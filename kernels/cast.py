"""Weights in the dtype of the maps: all of them in one launch or two, and their gradients likewise.

Autocast casts each convolution's weight when it meets it, and each gradient back: 52 launches in a step of 26
convolutions. PyTorch's own list operators do the work here.
"""

from collections.abc import Sequence
from typing import Any

import torch
from torch.autograd.function import once_differentiable


def cast(tensors: Sequence[torch.Tensor], dtype: torch.dtype) -> tuple[torch.Tensor, ...]:
    """Copies of tensors of one dtype in another, of the same strides; gradients come back in the first.

    They come back together, when the last of them is there. Where this is compiled, the compiler sees each copy: torch
    2.11's loses what a list operator writes, and none needs it to launch them together.
    """
    if torch.compiler.is_compiling():
        return tuple(tensor.to(dtype) for tensor in tensors)
    return _Cast.apply(dtype, *tensors)


def _copied(tensors: Sequence[torch.Tensor], dtype: torch.dtype) -> list[torch.Tensor]:
    copies = [torch.empty_like(tensor, dtype=dtype) for tensor in tensors]
    torch._foreach_copy_(copies, list(tensors))
    return copies


class _Cast(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, dtype: torch.dtype, *tensors: torch.Tensor) -> tuple[torch.Tensor, ...]:
        ctx.dtype = tensors[0].dtype
        return tuple(_copied(tensors, dtype))

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *gradients: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        return None, *_copied(gradients, ctx.dtype)
