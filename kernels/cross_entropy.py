"""Weighted pixel cross-entropy as a numerator and a denominator.

PyTorch's weighted mean divides by the sum of the weights of the pixels at hand. Over several ranks or micro-batches the
mean of such means is another objective, so the two sums are kept apart and divided once, over the global batch.
"""

import torch
import torch.nn.functional as F


def weight_sum(labels: torch.Tensor, weights_C: torch.Tensor) -> torch.Tensor:
    """Sum of the class weights over all labels (uint8, any shape); values >= C (void, unknown) count nothing."""
    table = torch.zeros(256, dtype=torch.float32, device=weights_C.device)
    table[: len(weights_C)] = weights_C
    # A look-up and not torch.bincount, which waits for a GPU to learn the highest value. float64: millions of pixels.
    return table[labels.long()].sum(dtype=torch.float64).float()


def cross_entropy_sum(logits_BCHW: torch.Tensor, labels_BHW: torch.Tensor, weights_C: torch.Tensor) -> torch.Tensor:
    """Sum over pixels of weight[label] * -log softmax(logits)[label], in fp32; labels >= C are ignored."""
    ignore = -100
    target = labels_BHW.long()
    target = torch.where(target < len(weights_C), target, ignore)
    return F.cross_entropy(logits_BCHW.float(), target, weights_C, ignore_index=ignore, reduction="sum")
