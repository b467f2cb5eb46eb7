"""The two sums of the weighted cross-entropy: against torch's in float64, by hand, and on labels that count nothing."""

import functools
import math

import pytest
import torch
import torch.nn.functional as F
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from fastseg.kernels import cross_entropy as module
from fastseg.kernels.cross_entropy import cross_entropy_backward, torch_weight_sum, weight_sum
from fastseg.kernels.launch import INTERPRETED

VOID, UNKNOWN = 255, 254
# What one rounding to the scores' dtype may cost; in the interpreter fp32 -> bf16 cuts off.
PRECISION = {torch.float32: 1e-5, torch.float16: 2**-10, torch.bfloat16: 2**-7}
# A tile holds 2048 elements, C rounded up to a power of two: 32 pixels of 64 classes, 128 of 11, 512 of 3.
CASES = [
    *[(classes, (2, 5, 7)) for classes in (1, 2, 3, 11, 32, 64)],
    (3, (1, 1, 1)),
    (3, (1, 45, 60)),
    (11, (1, 13, 17)),
    (64, (1, 4, 8)),
]
# `device` is the same for all examples of a property.
property_of = settings(max_examples=12, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])


@pytest.fixture(params=["torch_", ""], ids=["torch", "fused"])
def sums(request):
    """The sum over pixels of the losses and of the weights, PyTorch's and fastseg's."""
    entropy, weights = (getattr(module, request.param + name) for name in ("cross_entropy", "weight_sum"))
    return functools.partial(undivided, entropy), weights


def undivided(entropy, logits, labels, weights):
    """The sum of losses as it is: over a total of 1."""
    return entropy(logits, labels, weights, torch.ones((), device=logits.device))


cross_entropy_sum = functools.partial(undivided, module.cross_entropy)


def sample(classes, device, size=(2, 5, 7), ignored=0.3, dtype=torch.float32, seed=0):
    """Random scores, labels of which a share is void, unknown or the first value beyond the classes, and weights."""
    generator = torch.Generator().manual_seed(seed)
    logits = torch.randn(size[0], classes, *size[1:], generator=generator) * 3
    labels = torch.randint(0, classes, size, generator=generator, dtype=torch.uint8)
    dice = torch.rand(size, generator=generator)
    for share, value in ((1, VOID), (2, UNKNOWN), (3, classes)):
        labels[dice < ignored / share] = value
    weights = torch.rand(classes, generator=generator) + 0.1
    return logits.to(device, dtype), labels.to(device), weights.to(device)


def oracle(logits, labels, weights):
    """Loss and gradient in float64."""
    logits = logits.detach().double().requires_grad_()
    target = torch.where(labels < len(weights), labels.long(), -1)
    loss = F.cross_entropy(logits, target, weights.double(), ignore_index=-1, reduction="sum")
    return loss.detach(), torch.autograd.grad(loss, logits)[0]


@pytest.mark.parametrize("dtype", PRECISION)
@pytest.mark.parametrize(("classes", "size"), CASES)
def test_the_sum_and_its_gradient_equal_torch_in_float64(sums, device, classes, size, dtype):
    logits, labels, weights = sample(classes, device, size, dtype=dtype)
    logits.requires_grad_()
    loss = sums[0](logits, labels, weights)
    (gradient,) = torch.autograd.grad(loss * 3, logits)
    wanted_loss, wanted = oracle(logits, labels, weights)
    assert (loss.dtype, gradient.dtype) == (torch.float32, dtype)
    torch.testing.assert_close(loss.double(), wanted_loss, rtol=2e-6, atol=1e-6)
    torch.testing.assert_close(gradient.double(), 3 * wanted, rtol=PRECISION[dtype], atol=3e-6)


@pytest.mark.parametrize("classes", [2, 11])
def test_the_quotient_is_torchs_weighted_mean(sums, device, classes):
    logits, labels, weights = sample(classes, device)
    mine, theirs = logits.clone().requires_grad_(), logits.clone().requires_grad_()
    found = sums[0].args[0](mine, labels, weights, sums[1](labels, weights))
    wanted = F.cross_entropy(theirs, labels.long().masked_fill(labels >= classes, VOID), weights, ignore_index=VOID)
    torch.testing.assert_close(found, wanted, rtol=1e-5, atol=0)
    gradients = [torch.autograd.grad(loss, scores)[0] for loss, scores in ((found, mine), (wanted, theirs))]
    torch.testing.assert_close(*gradients, rtol=1e-5, atol=1e-7)


def test_one_pixel_of_two_equal_scores_costs_log_2_times_its_weight(sums, device):
    logits = torch.zeros(1, 2, 1, 1, device=device, requires_grad=True)
    labels, weights = torch.tensor([[[1]]], dtype=torch.uint8, device=device), torch.tensor([5.0, 3.0], device=device)
    loss = sums[0](logits, labels, weights)
    loss.backward()
    assert loss.item() == pytest.approx(3 * math.log(2), rel=1e-6)
    assert logits.grad.flatten().tolist() == pytest.approx([1.5, -1.5], rel=1e-6)
    assert sums[1](labels, weights).item() == 3


@pytest.mark.parametrize("value", [VOID, UNKNOWN, 11, 12])
def test_ignored_pixels_change_neither_sum_nor_gradient(sums, device, value):
    logits, labels, weights = sample(11, device, ignored=0)
    labels[:, 2:4] = value
    logits.requires_grad_()
    found = sums[0](logits, labels, weights)
    found.backward()
    rest = [0, 1, 4]
    wanted, gradient = oracle(logits[:, :, rest], labels[:, rest], weights)
    torch.testing.assert_close(found.double(), wanted, rtol=2e-6, atol=0)
    assert not logits.grad[:, :, 2:4].any()
    torch.testing.assert_close(logits.grad[:, :, rest].double(), gradient, rtol=1e-5, atol=1e-6)
    assert sums[1](labels, weights).item() == pytest.approx(weights[labels[:, rest].long()].sum().item(), rel=1e-6)


@pytest.mark.parametrize("dtype", PRECISION)
def test_a_batch_of_only_void_has_loss_0_and_zero_gradients(sums, device, dtype):
    logits, labels, weights = sample(3, device, dtype=dtype, ignored=1)
    assert (labels >= 3).all()
    logits.requires_grad_()
    total = sums[1](labels, weights)
    loss = sums[0].args[0](logits, labels, weights, total)
    loss.backward()
    assert (total.item(), loss.item()) == (0, 0)
    assert torch.equal(logits.grad, torch.zeros_like(logits))


@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
def test_scores_of_ignored_pixels_may_be_anything(device, bad):
    logits, labels, weights = sample(11, device)
    wanted, gradient = oracle(logits, labels, weights)
    ignored = (labels >= 11)[:, None]
    logits = logits.masked_fill(ignored, bad).requires_grad_()
    loss = cross_entropy_sum(logits, labels, weights)
    loss.backward()
    torch.testing.assert_close(loss.double(), wanted, rtol=2e-6, atol=0)
    assert not logits.grad.masked_select(ignored).any()
    torch.testing.assert_close(logits.grad.double(), gradient, rtol=1e-5, atol=1e-6)


def test_a_nan_in_a_counted_pixel_is_a_nan_loss(sums, device):
    logits, labels, weights = sample(11, device)
    image, row, column = (labels < 11).nonzero()[0].tolist()
    logits[image, (labels[image, row, column].item() + 1) % 11, row, column] = math.nan
    assert sums[0](logits, labels, weights).isnan()


def test_a_score_of_minus_infinity_is_a_probability_of_0(sums, device):
    logits = torch.tensor([0.0, -math.inf, 0.0], device=device).view(1, 3, 1, 1).requires_grad_()
    weights = torch.tensor([2.0, 1.0, 1.0], device=device)
    loss = sums[0](logits, torch.zeros(1, 1, 1, dtype=torch.uint8, device=device), weights)
    loss.backward()
    assert loss.item() == pytest.approx(2 * math.log(2), rel=1e-6)
    assert logits.grad.flatten().tolist() == pytest.approx([-1, 0, 1], rel=1e-6)
    assert sums[0](logits, torch.ones(1, 1, 1, dtype=torch.uint8, device=device), weights).item() == math.inf


@pytest.mark.parametrize("dtype", PRECISION)
def test_scores_of_10000_do_not_overflow(sums, device, dtype):
    logits, labels, weights = sample(3, device, dtype=dtype)
    logits = (logits.sign() * 1e4).requires_grad_()
    loss = sums[0](logits, labels, weights)
    loss.backward()
    wanted, gradient = oracle(logits, labels, weights)
    torch.testing.assert_close(loss.double(), wanted, rtol=2e-6, atol=0)
    torch.testing.assert_close(logits.grad.double(), gradient, rtol=PRECISION[dtype], atol=1e-6)


def test_scores_of_any_strides_give_channels_last_gradients(device):
    logits, labels, weights = sample(11, device)
    wanted, gradient = oracle(logits, labels, weights)
    spread = torch.zeros(2, 11, 10, 7, device=device)
    spread[:, :, ::2] = logits
    last = logits.contiguous(memory_format=torch.channels_last)
    for strided in (logits, last, spread[:, :, ::2], logits.transpose(2, 3).contiguous().transpose(2, 3)):
        strided.requires_grad_()
        loss = cross_entropy_sum(strided, labels.mT.contiguous().mT, weights)
        (found,) = torch.autograd.grad(loss, strided)
        torch.testing.assert_close(loss.double(), wanted, rtol=2e-6, atol=0)
        torch.testing.assert_close(found.double(), gradient, rtol=1e-5, atol=1e-6)
        assert found.is_contiguous(memory_format=torch.channels_last)


def test_weights_of_any_strides_are_read_as_they_are(sums, device):
    logits, labels, weights = sample(3, device)
    strided = torch.zeros(6, device=device)
    strided[::2] = weights
    for call, operands in ((sums[0], (logits, labels)), (sums[1], (labels,))):
        torch.testing.assert_close(call(*operands, strided[::2]), call(*operands, weights))


def test_parts_of_a_batch_add_up_to_the_whole(sums, device):
    logits, labels, weights = sample(11, device)
    loss = sum(sums[0](logits[i : i + 1], labels[i : i + 1], weights) for i in range(2))
    total = sum(sums[1](labels[i : i + 1], weights) for i in range(2))
    torch.testing.assert_close(loss, sums[0](logits, labels, weights), rtol=1e-6, atol=0)
    torch.testing.assert_close(total, sums[1](labels, weights), rtol=1e-6, atol=0)


@given(values=st.lists(st.integers(0, 255), min_size=1, max_size=30), weights=st.lists(st.integers(0, 9), min_size=1))
@settings(property_of, max_examples=30)
def test_the_weight_sum_is_that_of_a_loop(sums, device, values, weights):
    labels = torch.tensor(values, dtype=torch.uint8, device=device)
    wanted = sum(weights[v] for v in values if v < len(weights))
    assert sums[1](labels, torch.tensor(weights, dtype=torch.float32, device=device)).item() == wanted


def test_the_weight_sum_takes_many_labels_of_any_strides(sums, device):
    # 1024 labels in a tile: three and a bit. Whole weights, whose sum is exact in any order.
    labels = (torch.arange(62 * 53) % 31 % 5).to(torch.uint8).view(62, 53)
    wanted = [sum((7, 0, 2, 9)[v] for v in rows.flatten().tolist() if v < 4) for rows in (labels, labels[::2, 1::3])]
    labels, weights = labels.to(device), torch.tensor([7.0, 0, 2, 9], device=device)
    found = [sums[1](these, weights).item() for these in (labels, labels.T, labels[::2, 1::3])]
    assert found == [wanted[0], *wanted]


def test_the_weight_sum_of_a_million_pixels_is_as_exact_as_fp32(sums, device):
    # In the interpreter a program takes milliseconds.
    sevenths = 14_285 if INTERPRETED else 142_857
    labels = (torch.arange(7 * sevenths + 4) % 7 % 4).to(device, torch.uint8)
    weights = torch.tensor([0.1, 0.7, 3.3], device=device)
    # Of each 7 pixels 2 are class 0, 2 class 1, 2 class 2 and 1 ignored; one more of each among the last four.
    wanted = sum((2 * sevenths + 1) * weight for weight in weights.double().tolist())
    # Torch's is summed in float64 and rounded once.
    precision = 2**-24 if sums[1] is torch_weight_sum else 1e-6
    assert sums[1](labels, weights).item() == pytest.approx(wanted, rel=precision, abs=0)


@given(classes=st.integers(2, 12), shift=st.integers(-50, 50), seed=st.integers(0, 99))
@property_of
def test_only_differences_of_scores_matter(device, classes, shift, seed):
    logits, labels, weights = sample(classes, device, size=(1, 3, 5), seed=seed)
    shifts = shift * torch.rand(1, 1, 3, 5, generator=torch.Generator().manual_seed(seed)).to(device)
    moved = (logits + shifts).requires_grad_()
    loss = cross_entropy_sum(moved, labels, weights)
    (gradient,) = torch.autograd.grad(loss, moved)
    # A score near 64 is rounded by up to 4e-6: two of them in each of 15 pixels, at a weight of 1.1 at most.
    torch.testing.assert_close(loss, cross_entropy_sum(logits, labels, weights), rtol=0, atol=2e-4)
    torch.testing.assert_close(gradient.sum(1), torch.zeros_like(gradient[:, 0]), rtol=0, atol=2e-6)


def test_two_runs_give_the_same_bits(device):
    logits, labels, weights = sample(11, device, (1, 13, 17))
    total, upstream = torch.tensor(7.0, device=device), torch.tensor(0.3, device=device)
    for call, arguments in ((module.cross_entropy, (total,)), (cross_entropy_backward, (total, upstream))):
        assert torch.equal(*(call(logits, labels, weights, *arguments) for _ in range(2)))
    assert torch.equal(weight_sum(labels, weights), weight_sum(labels, weights))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_the_operators_keep_the_rules_of_custom_operators(device, dtype):
    logits, labels, weights = sample(3, device, dtype=dtype)
    operators = torch.ops.fastseg
    torch.library.opcheck(operators.weight_sum.default, (labels, weights))
    total, gradient = torch.tensor(7.0, device=device), torch.tensor(0.5, device=device)
    torch.library.opcheck(operators.cross_entropy.default, (logits, labels, weights, total))
    torch.library.opcheck(operators.cross_entropy_backward.default, (logits, labels, weights, total, gradient))


def test_compiled_gives_the_same_bits(device):
    logits, labels, weights = sample(3, device)

    def mean(scores):
        return module.cross_entropy(scores, labels, weights, weight_sum(labels, weights))

    results = []
    for call in (mean, torch.compile(mean, fullgraph=True, backend="aot_eager")):
        scores = logits.clone().requires_grad_()
        loss = call(scores)
        results.append((loss, torch.autograd.grad(loss, scores)[0]))
    assert all(torch.equal(*pair) for pair in zip(*results, strict=True))


def test_triton_runs_on_a_gpu_and_in_its_interpreter_only(device, monkeypatch):
    triton_path = pytest.importorskip("fastseg.kernels.cross_entropy_triton", exc_type=ImportError)
    calls = []
    for name in ("weight_sum", "cross_entropy", "cross_entropy_backward"):
        launcher = getattr(triton_path, name)
        monkeypatch.setattr(
            triton_path, name, lambda *args, name=name, launch=launcher: calls.append(name) or launch(*args)
        )
    logits, labels, weights = sample(3, device)
    loss = module.cross_entropy(logits.requires_grad_(), labels, weights, weight_sum(labels, weights))
    loss.backward()
    expected = ["weight_sum", "cross_entropy", "cross_entropy_backward"]
    assert calls == (expected if INTERPRETED or device.type == "cuda" else [])
