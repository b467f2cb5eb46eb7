"""Weighted pixel cross-entropy, and the sum of weights that it is divided by.

PyTorch's weighted mean divides by the sum of the weights of the pixels at hand. Over several ranks or micro-batches the
mean of such means is another objective, so that sum is asked for apart, and given back for the global batch.

The fused operators read scores and uint8 labels once forward and once backward (where the softmax is computed again),
in fp32 registers: no int64 labels, no fp32 scores, no log-softmax in memory. Labels >= C (void, unknown) cost nothing
and get zero gradients, whatever their scores. Sums are made of per-program parts in a fixed order: same bits each time.
"""

from typing import Any

import torch
import torch.nn.functional as F
from torch.autograd.function import once_differentiable

from fastseg.kernels.launch import empty, operator

IGNORED = -100
# A batch of only void pixels has weight 0 and cross-entropy 0: its loss is 0, not 0 / 0.
SMALLEST = 1e-12


def torch_weight_sum(labels: torch.Tensor, weights_C: torch.Tensor) -> torch.Tensor:
    """PyTorch's: sum of the class weights over all labels (uint8, any shape); values >= C count nothing; fp32."""
    table = torch.zeros(256, dtype=torch.float32, device=weights_C.device)
    table[: len(weights_C)] = weights_C
    # A look-up and not torch.bincount, which waits for a GPU to learn the highest value. float64: millions of pixels.
    return table[labels.long()].sum(dtype=torch.float64).float()


def torch_cross_entropy(
    logits_BCHW: torch.Tensor, labels_BHW: torch.Tensor, weights_C: torch.Tensor, total: torch.Tensor
) -> torch.Tensor:
    """PyTorch's: sum over pixels of weight[label] * -log softmax(logits)[label], over `total`; labels >= C are ignored.

    Args:
        total: fp32 scalar, the sum of weights of all labels whose losses are to be added up.
    """
    target = labels_BHW.long()
    target = torch.where(target < len(weights_C), target, IGNORED)
    losses = F.cross_entropy(logits_BCHW.float(), target, weights_C, ignore_index=IGNORED, reduction="sum")
    return losses / total.clamp(min=SMALLEST)


def cross_entropy(
    logits_BCHW: torch.Tensor, labels_BHW: torch.Tensor, weights_C: torch.Tensor, total: torch.Tensor
) -> torch.Tensor:
    """As `torch_cross_entropy`; differentiable once, in the scores."""
    return _CrossEntropy.apply(logits_BCHW, labels_BHW, weights_C, total)


def _fake_sum(values, *_):
    return values.new_empty((), dtype=torch.float32)


@operator("weight_sum(Tensor labels, Tensor weights) -> Tensor", fake=_fake_sum)
def weight_sum(labels: torch.Tensor, weights_C: torch.Tensor) -> torch.Tensor:
    """As `torch_weight_sum`."""
    return torch_weight_sum(labels, weights_C)


@operator("cross_entropy(Tensor logits, Tensor labels, Tensor weights, Tensor total) -> Tensor", fake=_fake_sum)
def cross_entropy_op(
    logits_BCHW: torch.Tensor, labels_BHW: torch.Tensor, weights_C: torch.Tensor, total: torch.Tensor
) -> torch.Tensor:
    """`cross_entropy`, without a gradient."""
    return torch_cross_entropy(logits_BCHW, labels_BHW, weights_C, total)


def _fake_backward(logits_BCHW, labels_BHW, weights_C, total, gradient):
    return empty(tuple(logits_BCHW.shape), logits_BCHW)


@operator(
    "cross_entropy_backward(Tensor logits, Tensor labels, Tensor weights, Tensor total, Tensor gradient) -> Tensor",
    fake=_fake_backward,
)
def cross_entropy_backward(
    logits_BCHW: torch.Tensor,
    labels_BHW: torch.Tensor,
    weights_C: torch.Tensor,
    total: torch.Tensor,
    gradient: torch.Tensor,
) -> torch.Tensor:
    """gradient / total * weight[label] * (softmax(logits) - one_hot(label)), channels-last in the scores' dtype."""
    target = labels_BHW.long()
    counted = target < len(weights_C)
    target = torch.where(counted, target, 0)
    scale = torch.where(counted, weights_C[target] * (gradient / total.clamp(min=SMALLEST)), 0)[:, None]
    out = logits_BCHW.float().softmax(1)
    out = torch.where(counted[:, None], (out - F.one_hot(target, len(weights_C)).movedim(-1, 1)) * scale, 0)
    return out.to(logits_BCHW.dtype).contiguous(memory_format=torch.channels_last)


class _CrossEntropy(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, *operands: torch.Tensor) -> torch.Tensor:
        ctx.save_for_backward(*operands)
        return cross_entropy_op(*operands)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, gradient: torch.Tensor) -> tuple[torch.Tensor, None, None, None]:
        logits, labels, weights, total = ctx.saved_tensors
        return cross_entropy_backward(logits, labels, weights, total, gradient), None, None, None
