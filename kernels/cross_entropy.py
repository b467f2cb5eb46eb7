"""Weighted pixel cross-entropy as a numerator and a denominator.

PyTorch's weighted mean divides by the sum of the weights of the pixels at hand. Over several ranks or micro-batches the
mean of such means is another objective, so the two sums are kept apart and divided once, over the global batch.

The fused operators read scores and uint8 labels once forward and once backward (where the softmax is computed again),
in fp32 registers: no int64 labels, no fp32 scores, no log-softmax in memory. Labels >= C (void, unknown) cost nothing
and get zero gradients, whatever their scores. Sums are made of per-program parts in a fixed order: same bits each time.
"""

import torch
import torch.nn.functional as F

from fastseg.kernels.launch import empty, on_triton

IGNORED = -100


def torch_weight_sum(labels: torch.Tensor, weights_C: torch.Tensor) -> torch.Tensor:
    """PyTorch's: sum of the class weights over all labels (uint8, any shape); values >= C count nothing; fp32."""
    table = torch.zeros(256, dtype=torch.float32, device=weights_C.device)
    table[: len(weights_C)] = weights_C
    # A look-up and not torch.bincount, which waits for a GPU to learn the highest value. float64: millions of pixels.
    return table[labels.long()].sum(dtype=torch.float64).float()


def torch_cross_entropy_sum(
    logits_BCHW: torch.Tensor, labels_BHW: torch.Tensor, weights_C: torch.Tensor
) -> torch.Tensor:
    """PyTorch's: sum over pixels of weight[label] * -log softmax(logits)[label], in fp32; labels >= C are ignored."""
    target = labels_BHW.long()
    target = torch.where(target < len(weights_C), target, IGNORED)
    return F.cross_entropy(logits_BCHW.float(), target, weights_C, ignore_index=IGNORED, reduction="sum")


@torch.library.custom_op("fastseg::weight_sum", mutates_args=())
def weight_sum(labels: torch.Tensor, weights_C: torch.Tensor) -> torch.Tensor:
    """As `torch_weight_sum`."""
    if on_triton(labels):
        from fastseg.kernels import cross_entropy_triton

        return cross_entropy_triton.weight_sum(labels, weights_C)
    return torch_weight_sum(labels, weights_C)


@torch.library.custom_op("fastseg::cross_entropy_sum", mutates_args=())
def cross_entropy_sum(logits_BCHW: torch.Tensor, labels_BHW: torch.Tensor, weights_C: torch.Tensor) -> torch.Tensor:
    """As `torch_cross_entropy_sum`; differentiable once, in the scores."""
    if on_triton(logits_BCHW):
        from fastseg.kernels import cross_entropy_triton

        return cross_entropy_triton.cross_entropy_sum(logits_BCHW, labels_BHW, weights_C)
    return torch_cross_entropy_sum(logits_BCHW, labels_BHW, weights_C)


@torch.library.custom_op("fastseg::cross_entropy_backward", mutates_args=())
def cross_entropy_backward(
    gradient: torch.Tensor, logits_BCHW: torch.Tensor, labels_BHW: torch.Tensor, weights_C: torch.Tensor
) -> torch.Tensor:
    """gradient * weight[label] * (softmax(logits) - one_hot(label)), channels-last in the scores' dtype."""
    if on_triton(logits_BCHW):
        from fastseg.kernels import cross_entropy_triton

        return cross_entropy_triton.cross_entropy_backward(gradient, logits_BCHW, labels_BHW, weights_C)
    target = labels_BHW.long()
    counted = target < len(weights_C)
    target = torch.where(counted, target, 0)
    scale = torch.where(counted, weights_C[target] * gradient, 0)[:, None]
    out = logits_BCHW.float().softmax(1)
    out = torch.where(counted[:, None], (out - F.one_hot(target, len(weights_C)).movedim(-1, 1)) * scale, 0)
    return out.to(logits_BCHW.dtype).contiguous(memory_format=torch.channels_last)


@weight_sum.register_fake
def _(labels, weights_C):
    return weights_C.new_empty(())


@cross_entropy_sum.register_fake
def _(logits_BCHW, labels_BHW, weights_C):
    return weights_C.new_empty(())


@cross_entropy_backward.register_fake
def _(gradient, logits_BCHW, labels_BHW, weights_C):
    return empty(tuple(logits_BCHW.shape), logits_BCHW)


def _save(ctx, inputs, output):
    ctx.save_for_backward(*inputs)


def _backward(ctx, gradient):
    return cross_entropy_backward(gradient, *ctx.saved_tensors), None, None


cross_entropy_sum.register_autograd(_backward, setup_context=_save)
