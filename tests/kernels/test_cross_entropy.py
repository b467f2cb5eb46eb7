"""The two sums of the weighted cross-entropy: against torch's own, by hand, and on labels that count nothing."""

import math

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st

from fastseg.kernels.cross_entropy import cross_entropy_sum, weight_sum

VOID, UNKNOWN = 255, 254


def sample(classes: int, size: tuple[int, int] = (5, 7), ignored: float = 0.3):
    """Random scores, labels of which a share is void or unknown, and weights."""
    generator = torch.Generator().manual_seed(classes)
    logits = torch.randn(2, classes, *size, generator=generator) * 3
    labels = torch.randint(0, classes, (2, *size), generator=generator, dtype=torch.uint8)
    dice = torch.rand(2, *size, generator=generator)
    labels[dice < ignored], labels[dice < ignored / 2] = VOID, UNKNOWN
    return logits, labels, torch.rand(classes, generator=generator) + 0.1


def masked(labels: torch.Tensor) -> torch.Tensor:
    """Labels as F.cross_entropy wants them: int64, with one value that is ignored."""
    return labels.long().masked_fill(labels >= UNKNOWN, VOID)


@pytest.mark.parametrize("classes", [1, 2, 11, 32])
def test_the_sum_and_its_gradient_equal_torch(classes):
    logits, labels, weights = sample(classes)
    mine, theirs = logits.clone().requires_grad_(), logits.clone().requires_grad_()
    found = cross_entropy_sum(mine, labels, weights)
    wanted = F.cross_entropy(theirs, masked(labels), weights, ignore_index=VOID, reduction="sum")
    torch.testing.assert_close(found, wanted, rtol=1e-6, atol=1e-6)
    found.backward()
    wanted.backward()
    torch.testing.assert_close(mine.grad, theirs.grad, rtol=1e-6, atol=1e-7)


@pytest.mark.parametrize("classes", [2, 11])
def test_the_quotient_is_torchs_weighted_mean(classes):
    logits, labels, weights = sample(classes)
    found = cross_entropy_sum(logits, labels, weights) / weight_sum(labels, weights)
    wanted = F.cross_entropy(logits, masked(labels), weights, ignore_index=VOID, reduction="mean")
    torch.testing.assert_close(found, wanted, rtol=1e-5, atol=0)


def test_one_pixel_of_two_equal_scores_costs_log_2_times_its_weight():
    logits, labels = torch.zeros(1, 2, 1, 1), torch.tensor([[[1]]], dtype=torch.uint8)
    weights = torch.tensor([5.0, 3.0])
    assert cross_entropy_sum(logits, labels, weights).item() == pytest.approx(3 * math.log(2), rel=1e-6)
    assert weight_sum(labels, weights).item() == 3


@pytest.mark.parametrize("value", [VOID, UNKNOWN, 11])
def test_ignored_pixels_change_neither_sum_nor_gradient(value):
    logits, labels, weights = sample(11, ignored=0)
    labels[:, 2:4] = value
    logits.requires_grad_()
    found = cross_entropy_sum(logits, labels, weights)
    found.backward()
    rest = torch.tensor([0, 1, 4])
    wanted = F.cross_entropy(logits[:, :, rest], labels[:, rest].long(), weights, reduction="sum")
    torch.testing.assert_close(found, wanted, rtol=1e-5, atol=0)
    assert not logits.grad[:, :, 2:4].any()
    assert logits.grad[:, :, rest].any()
    assert weight_sum(labels, weights).item() == pytest.approx(weights[labels[:, rest].long()].sum().item(), rel=1e-6)


def test_a_batch_of_only_void_has_loss_0_and_zero_gradients():
    logits = torch.randn(1, 3, 4, 4, requires_grad=True)
    labels, weights = torch.full((1, 4, 4), VOID, dtype=torch.uint8), torch.ones(3)
    total = weight_sum(labels, weights)
    loss = cross_entropy_sum(logits, labels, weights) / total.clamp(min=1e-12)
    loss.backward()
    assert (total.item(), loss.item()) == (0, 0)
    assert torch.equal(logits.grad, torch.zeros_like(logits))


def test_parts_of_a_batch_add_up_to_the_whole():
    logits, labels, weights = sample(11)
    loss = cross_entropy_sum(logits[:1], labels[:1], weights) + cross_entropy_sum(logits[1:], labels[1:], weights)
    total = weight_sum(labels[:1], weights) + weight_sum(labels[1:], weights)
    torch.testing.assert_close(loss, cross_entropy_sum(logits, labels, weights), rtol=1e-6, atol=0)
    torch.testing.assert_close(total, weight_sum(labels, weights), rtol=1e-6, atol=0)


@given(values=st.lists(st.integers(0, 255), min_size=1, max_size=30), weights=st.lists(st.integers(0, 9), min_size=1))
@settings(max_examples=30, deadline=None)
def test_the_weight_sum_is_that_of_a_loop(values, weights):
    labels = torch.tensor(values, dtype=torch.uint8)
    wanted = sum(weights[v] for v in values if v < len(weights))
    assert weight_sum(labels, torch.tensor(weights, dtype=torch.float32)).item() == wanted


def test_the_weight_sum_of_a_million_pixels_is_rounded_once():
    labels, weights = (torch.arange(1_000_003) % 7 % 4).to(torch.uint8), torch.tensor([0.1, 0.7, 3.3])
    # Of each 7 pixels 2 are class 0, 2 class 1, 2 class 2 and 1 ignored; 1,000,003 = 7 * 142,857 + 4, one more of each.
    wanted = sum((2 * 142_857 + 1) * weight for weight in weights.double().tolist())
    assert weight_sum(labels, weights).item() == torch.tensor(wanted, dtype=torch.float64).float().item()


def test_bf16_scores_are_summed_in_fp32():
    logits, labels, weights = sample(11)
    found = cross_entropy_sum(logits.bfloat16(), labels, weights)
    assert found.dtype == torch.float32
    torch.testing.assert_close(found, cross_entropy_sum(logits.bfloat16().float(), labels, weights), rtol=0, atol=0)
