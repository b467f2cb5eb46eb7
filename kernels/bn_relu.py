"""Batch normalisation + ReLU, and the same + 2x2 max-pooling, as one operator each.

Ioffe and Szegedy, "Batch Normalization", 2015. PyTorch's two modules pass over a feature map 13 times per training step
(5 forward, 8 backward); these 8 times (3 forward, 5 backward), since ReLU costs no pass of its own and backward works
its mask out again from the input. The pooled variant writes no full-size map at all on the way forward.

Statistics are sums, in fp32 and a fixed order, of distances from a shift: the mean of a few pixels from all over the
map ("shifted data", Chan, Golub, LeVeque 1983). The variance's relative error is at most 3 n u (1 + d^2): u = 2^-24, n
the additions one after the other of which a sum is made (some 100 at 360x480), d by how many deviations the shift
misses the mean, which is a fraction of one unless very few pixels decide over the map. The mean itself, however many
deviations it is, does not matter. Who adds up last moves a module's running statistics too, as torch does.

Comparing for the pooled maximum happens after rounding to the map's dtype, so that ties are those of the unfused
sequence.
"""

from typing import Any

import torch
import torch.nn.functional as F
from torch import nn
from torch.autograd.function import once_differentiable

from fastseg.kernels.launch import empty, halved, operator
from fastseg.kernels.pool import pool, unpool

Tensor = torch.Tensor

ARGUMENTS = (
    "Tensor x, Tensor weight, Tensor bias, Tensor(a!) running_mean, Tensor(b!) running_var, "
    "Tensor(c!) num_batches_tracked, bool training, float momentum, float eps"
)


def bn_relu(x_BCHW: Tensor, norm: nn.BatchNorm2d) -> Tensor:
    """relu(norm(x)), channels-last in x's dtype; in training mode `norm`'s running statistics move as torch moves them.

    Raises:
        ValueError: training on one value per channel, which has no variance.
    """
    return _BnRelu.apply(x_BCHW, *_arguments(x_BCHW, norm))


def bn_relu_pool(x_BCHW: Tensor, norm: nn.BatchNorm2d) -> tuple[Tensor, Tensor]:
    """`fastseg.kernels.pool.pool` of `bn_relu`: values and uint8 codes."""
    return _BnReluPool.apply(x_BCHW, *_arguments(x_BCHW, norm))


def _arguments(x_BCHW: Tensor, norm: nn.BatchNorm2d) -> tuple:
    if norm.running_mean is None or norm.momentum is None or norm.weight is None:
        raise ValueError("batch norm: only one with a scale, running statistics and a fixed momentum can be fused")
    training = norm.training
    if training and x_BCHW.numel() == x_BCHW.shape[1]:
        raise ValueError(
            f"batch norm: one value per channel has no variance ({list(x_BCHW.shape)}); use a larger batch"
        )
    vectors = norm.weight, norm.bias, norm.running_mean, norm.running_var
    if not all(vector.is_contiguous() for vector in vectors):  # type: ignore[union-attr]
        raise ValueError("batch norm: scale, shift and running statistics have to be contiguous")
    return *vectors, norm.num_batches_tracked, training, norm.momentum, norm.eps


def _reference(x, weight, bias, mean, variance, eps):
    return F.batch_norm(x, mean, variance, weight.to(mean.dtype), bias.to(mean.dtype), False, 0.0, eps).relu_()


def _statistics(x, running_mean, running_var, num_batches_tracked, momentum):
    """The batch's mean and biased variance; the running ones move towards them."""
    variance, mean = torch.var_mean(x.to(torch.promote_types(x.dtype, torch.float32)), (0, 2, 3), correction=0)
    values = x.numel() // x.shape[1]
    num_batches_tracked.add_(1)
    unbiased = variance * (values / (values - 1))
    running_mean.lerp_(mean.to(running_mean.dtype), momentum)
    running_var.lerp_(unbiased.to(running_var.dtype), momentum)
    return mean, variance


def _unfilled_statistics(x, training):
    channels = x.shape[1] if training else 0
    return tuple(x.new_empty(channels, dtype=torch.promote_types(x.dtype, torch.float32)) for _ in range(2))


def _fake_bn_relu(x_BCHW, weight, bias, running_mean, running_var, num_batches_tracked, training, momentum, eps):
    return empty(tuple(x_BCHW.shape), x_BCHW), *_unfilled_statistics(x_BCHW, training)


@operator(f"bn_relu({ARGUMENTS}) -> (Tensor, Tensor, Tensor)", fake=_fake_bn_relu)
def bn_relu_op(
    x_BCHW: Tensor,
    weight: Tensor,
    bias: Tensor,
    running_mean: Tensor,
    running_var: Tensor,
    num_batches_tracked: Tensor,
    training: bool,
    momentum: float,
    eps: float,
) -> tuple[Tensor, Tensor, Tensor]:
    """relu((x - mean) / sqrt(variance + eps) * weight + bias), and that mean and (biased) variance.

    They are the batch's, over B, H and W, when training, which also moves the running ones; else the running ones,
    which are not given back: the second and third result have no elements.
    """
    if not training:
        y = _reference(x_BCHW, weight, bias, running_mean, running_var, eps)
        return y.contiguous(memory_format=torch.channels_last), *_unfilled_statistics(x_BCHW, training)
    mean, variance = _statistics(x_BCHW, running_mean, running_var, num_batches_tracked, momentum)
    y = _reference(x_BCHW, weight, bias, mean, variance, eps)
    return y.contiguous(memory_format=torch.channels_last), mean, variance


def _fake_bn_relu_pool(x_BCHW, weight, bias, running_mean, running_var, num_batches_tracked, training, momentum, eps):
    shape = (*x_BCHW.shape[:2], halved(x_BCHW.shape[-2]), halved(x_BCHW.shape[-1]))
    return empty(shape, x_BCHW), empty(shape, x_BCHW, torch.uint8), *_unfilled_statistics(x_BCHW, training)


@operator(f"bn_relu_pool({ARGUMENTS}) -> (Tensor, Tensor, Tensor, Tensor)", fake=_fake_bn_relu_pool)
def bn_relu_pool_op(
    x_BCHW: Tensor,
    weight: Tensor,
    bias: Tensor,
    running_mean: Tensor,
    running_var: Tensor,
    num_batches_tracked: Tensor,
    training: bool,
    momentum: float,
    eps: float,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """As `bn_relu_op`, pooled: values, codes, mean, variance."""
    if not training:
        pooled = pool(_reference(x_BCHW, weight, bias, running_mean, running_var, eps))
        return *pooled, *_unfilled_statistics(x_BCHW, training)
    mean, variance = _statistics(x_BCHW, running_mean, running_var, num_batches_tracked, momentum)
    return *pool(_reference(x_BCHW, weight, bias, mean, variance, eps)), mean, variance


def _fake_backward(x_BCHW, gradient, codes, weight, bias, mean, variance, training, eps):
    return empty(tuple(x_BCHW.shape), x_BCHW), torch.empty_like(weight), torch.empty_like(bias)


@operator(
    "bn_relu_backward(Tensor x, Tensor gradient, Tensor? codes, Tensor weight, Tensor bias, Tensor mean, "
    "Tensor variance, bool training, float eps) -> (Tensor, Tensor, Tensor)",
    fake=_fake_backward,
)
def bn_relu_backward(
    x_BCHW: Tensor,
    gradient: Tensor,
    codes: Tensor | None,
    weight: Tensor,
    bias: Tensor,
    mean: Tensor,
    variance: Tensor,
    training: bool,
    eps: float,
) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients of x (channels-last, its dtype), weight and bias; with `codes`, `gradient` is that of pooled values."""
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


def _save(ctx: Any, codes: Tensor | None, arguments: tuple, statistics: list[Tensor]) -> None:
    x, weight, bias, running_mean, running_var, _, ctx.training, _, ctx.eps = arguments
    mean, variance = statistics if ctx.training else (running_mean, running_var)
    ctx.save_for_backward(x, codes, weight, bias, mean, variance)


def _gradients(ctx: Any, gradient: Tensor | None) -> tuple:
    if gradient is None:
        return (None,) * 9
    x, codes, *vectors = ctx.saved_tensors
    found = bn_relu_backward(x, gradient, codes, *vectors, ctx.training, ctx.eps)  # type: ignore[call-arg]
    return *found, None, None, None, None, None, None


class _BnRelu(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, *arguments: Any) -> Tensor:
        y, *statistics = bn_relu_op(*arguments)
        _save(ctx, None, arguments, statistics)
        return y

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, gradient: Tensor) -> tuple:
        return _gradients(ctx, gradient)


class _BnReluPool(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, *arguments: Any) -> tuple[Tensor, Tensor]:
        values, codes, *statistics = bn_relu_pool_op(*arguments)
        ctx.mark_non_differentiable(codes)
        ctx.set_materialize_grads(False)  # no zeros are filled in for codes
        _save(ctx, codes, arguments, statistics)
        return values, codes

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, gradient: Tensor | None, _codes: Tensor | None) -> tuple:
        return _gradients(ctx, gradient)
