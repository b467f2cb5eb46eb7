"""Batch normalisation + ReLU, and the same + 2x2 max-pooling, as one operator each.

Ioffe and Szegedy, "Batch Normalization", 2015. PyTorch's two modules pass over a feature map 13 times per training step
(5 forward, 8 backward); these 8 times (3 forward, 5 backward), since ReLU costs no pass of its own and backward works
its mask out again from the input. The pooled variant writes no full-size map at all on the way forward.

Statistics are merged from means and squared deviations of parts (Chan, Golub, LeVeque 1979) in fp32 and a fixed order.
The operators return them; `bn_relu` and `bn_relu_pool` below move a module's running ones, as torch does. Comparing
for the pooled maximum happens after rounding to the map's dtype, so that ties are those of the unfused sequence.
"""

from typing import Any

import torch
import torch.nn.functional as F
from torch import nn

from fastseg.kernels.launch import empty, halved, on_triton
from fastseg.kernels.pool import pool, unpool

Tensor = torch.Tensor


def bn_relu(x_BCHW: Tensor, norm: nn.BatchNorm2d) -> Tensor:
    """relu(norm(x)), channels-last in x's dtype; in training mode `norm`'s running statistics move as torch moves them.

    Raises:
        ValueError: training on one value per channel, which has no variance.
    """
    y, mean, variance = bn_relu_op(x_BCHW, *_arguments(x_BCHW, norm))
    _move_running(x_BCHW, norm, mean, variance)
    return y


def bn_relu_pool(x_BCHW: Tensor, norm: nn.BatchNorm2d) -> tuple[Tensor, Tensor]:
    """`fastseg.kernels.pool.pool` of `bn_relu`: values and uint8 codes."""
    values, codes, mean, variance = bn_relu_pool_op(x_BCHW, *_arguments(x_BCHW, norm))
    _move_running(x_BCHW, norm, mean, variance)
    return values, codes


def _arguments(x_BCHW: Tensor, norm: nn.BatchNorm2d) -> tuple:
    if norm.running_mean is None or norm.momentum is None or norm.weight is None:
        raise ValueError("batch norm: only one with a scale, running statistics and a fixed momentum can be fused")
    if norm.training and x_BCHW.numel() == x_BCHW.shape[1]:
        raise ValueError(
            f"batch norm: one value per channel has no variance ({list(x_BCHW.shape)}); use a larger batch"
        )
    return norm.weight, norm.bias, norm.running_mean, norm.running_var, norm.training, norm.eps


def _move_running(x_BCHW: Tensor, norm: Any, mean_C: Tensor, variance_C: Tensor) -> None:
    # Any, since torch has these buffers as optional; `_arguments` has seen that they are there.
    if not norm.training:
        return
    values = x_BCHW.numel() // x_BCHW.shape[1]
    with torch.no_grad():
        norm.num_batches_tracked.add_(1)
        unbiased = variance_C * (values / (values - 1))
        norm.running_mean.lerp_(mean_C.to(norm.running_mean.dtype), norm.momentum)
        norm.running_var.lerp_(unbiased.to(norm.running_var.dtype), norm.momentum)


def _reference(x, weight, bias, mean, variance, eps):
    return F.batch_norm(x, mean, variance, weight.to(mean.dtype), bias.to(mean.dtype), False, 0.0, eps).relu_()


def _statistics(x, running_mean, running_var, training):
    if not training:
        return running_mean.clone(), running_var.clone()
    variance, mean = torch.var_mean(x.to(torch.promote_types(x.dtype, torch.float32)), (0, 2, 3), correction=0)
    return mean, variance


@torch.library.custom_op("fastseg::bn_relu", mutates_args=())
def bn_relu_op(
    x_BCHW: Tensor,
    weight: Tensor,
    bias: Tensor,
    running_mean: Tensor,
    running_var: Tensor,
    training: bool,
    eps: float,
) -> tuple[Tensor, Tensor, Tensor]:
    """relu((x - mean) / sqrt(variance + eps) * weight + bias), and that mean and (biased) variance.

    They are the batch's, over B, H and W, when training; the running ones when not.
    """
    if on_triton(x_BCHW):
        from fastseg.kernels import bn_relu_triton

        return bn_relu_triton.bn_relu(x_BCHW, weight, bias, running_mean, running_var, training, eps)
    mean, variance = _statistics(x_BCHW, running_mean, running_var, training)
    y = _reference(x_BCHW, weight, bias, mean, variance, eps)
    return y.contiguous(memory_format=torch.channels_last), mean, variance


@torch.library.custom_op("fastseg::bn_relu_pool", mutates_args=())
def bn_relu_pool_op(
    x_BCHW: Tensor,
    weight: Tensor,
    bias: Tensor,
    running_mean: Tensor,
    running_var: Tensor,
    training: bool,
    eps: float,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """As `bn_relu_op`, pooled: values, codes, mean, variance."""
    if on_triton(x_BCHW):
        from fastseg.kernels import bn_relu_triton

        return bn_relu_triton.bn_relu_pool(x_BCHW, weight, bias, running_mean, running_var, training, eps)
    mean, variance = _statistics(x_BCHW, running_mean, running_var, training)
    return (*pool(_reference(x_BCHW, weight, bias, mean, variance, eps)), mean, variance)


@torch.library.custom_op("fastseg::bn_relu_backward", mutates_args=())
def bn_relu_backward(
    gradient: Tensor,
    codes: Tensor | None,
    x_BCHW: Tensor,
    weight: Tensor,
    bias: Tensor,
    mean: Tensor,
    variance: Tensor,
    training: bool,
    eps: float,
) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients of x (channels-last, its dtype), weight and bias; with `codes`, `gradient` is that of pooled values."""
    if on_triton(x_BCHW):
        from fastseg.kernels import bn_relu_triton

        return bn_relu_triton.bn_relu_backward(gradient, codes, x_BCHW, weight, bias, mean, variance, training, eps)
    if codes is not None:
        gradient = unpool(gradient, codes, *x_BCHW.shape[-2:])

    def channels(vector):
        return vector[None, :, None, None]

    inverse = torch.rsqrt(variance + eps)
    normalised = (x_BCHW.to(mean.dtype) - channels(mean)) * channels(inverse)
    off = normalised * channels(weight) + channels(bias) <= 0
    gradient = torch.where(off, 0, gradient).to(mean.dtype)
    d_bias, d_weight = gradient.sum((0, 2, 3)), (gradient * normalised).sum((0, 2, 3))
    d_x = gradient
    if training:
        values = x_BCHW.numel() // x_BCHW.shape[1]
        d_x = gradient - (channels(d_bias) + normalised * channels(d_weight)) / values
    d_x = (d_x * channels(weight * inverse)).to(x_BCHW.dtype)
    return d_x.contiguous(memory_format=torch.channels_last), d_weight.to(weight.dtype), d_bias.to(bias.dtype)


@bn_relu_op.register_fake
def _(x_BCHW, weight, bias, running_mean, running_var, training, eps):
    mean, variance = _fake_statistics(x_BCHW, running_mean, training)
    return empty(tuple(x_BCHW.shape), x_BCHW), mean, variance


@bn_relu_pool_op.register_fake
def _(x_BCHW, weight, bias, running_mean, running_var, training, eps):
    shape = (*x_BCHW.shape[:2], halved(x_BCHW.shape[-2]), halved(x_BCHW.shape[-1]))
    mean, variance = _fake_statistics(x_BCHW, running_mean, training)
    return empty(shape, x_BCHW), empty(shape, x_BCHW, torch.uint8), mean, variance


def _fake_statistics(x, running_mean, training):
    dtype = torch.promote_types(x.dtype, torch.float32) if training else running_mean.dtype
    return running_mean.new_empty(x.shape[1], dtype=dtype), running_mean.new_empty(x.shape[1], dtype=dtype)


@bn_relu_backward.register_fake
def _(gradient, codes, x_BCHW, weight, bias, mean, variance, training, eps):
    return empty(tuple(x_BCHW.shape), x_BCHW), torch.empty_like(weight), torch.empty_like(bias)


def _save(ctx, inputs, output):
    x, weight, bias, _, _, ctx.training, ctx.eps = inputs
    *_, mean, variance = output
    ctx.mark_non_differentiable(mean, variance)
    ctx.save_for_backward(output[1] if len(output) == 4 else None, x, weight, bias, mean, variance)


def _backward(ctx, gradient, *_):
    gradients = bn_relu_backward(gradient, *ctx.saved_tensors, ctx.training, ctx.eps)
    return (*gradients, None, None, None, None)


bn_relu_op.register_autograd(_backward, setup_context=_save)
bn_relu_pool_op.register_autograd(_backward, setup_context=_save)
