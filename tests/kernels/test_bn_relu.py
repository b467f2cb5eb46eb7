"""Batch norm + ReLU (+ pooling): against torch's modules in float64, worked by hand, and where both are delicate."""

import copy
import math
from functools import partial

import pytest
import torch
import torch.nn.functional as F
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from torch import nn

from fastseg.kernels.bn_relu import bn_relu, bn_relu_op, bn_relu_pool
from fastseg.kernels.launch import INTERPRETED
from fastseg.kernels.plan import REDUCED_BYTES, tile
from fastseg.kernels.pool import pool

# What one rounding to the map's dtype may cost; in the interpreter fp32 -> bf16 cuts off.
PRECISION = {torch.float32: 0, torch.float16: 2**-10, torch.bfloat16: 2**-7}
# A reduction's tile is 64 rows of 64 channels, or 1024 of 3; the 70 channels' second tile is mostly empty.
SHAPES = [(1, 3, 1, 2), (2, 3, 1, 1), (1, 3, 45, 60), (2, 11, 7, 13), (2, 64, 8, 6), (3, 70, 5, 3), (1, 512, 3, 5)]
poolings = pytest.mark.parametrize("pooled", [False, True], ids=["", "pool"])
# Zeros must be zeros; a GPU's square root may be off by a bit.
exactly = partial(pytest.approx, rel=1e-6, abs=0)
trainings = pytest.mark.parametrize("training", [True, False], ids=["train", "frozen"])


def sample(shape, device, dtype=torch.float32, training=True, seed=0):
    """A map whose values differ (in fp32), and a module with a negative, a zero and positive weights."""
    generator = torch.Generator().manual_seed(seed)
    numbers, channels = math.prod(shape), shape[1]
    x = (torch.randperm(numbers, generator=generator) * (4 / numbers) - 1.5).view(shape)
    norm = nn.BatchNorm2d(channels).train(training)
    with torch.no_grad():
        for vector, least in (
            (norm.weight, 0.5),
            (norm.bias, -0.5),
            (norm.running_mean, -0.5),
            (norm.running_var, 0.5),
        ):
            vector.copy_(torch.rand(channels, generator=generator) + least)
        norm.weight[::2] *= -1
        norm.weight[1:2] = 0
        norm.bias[1:2] = 0.5
    return x.to(device, dtype), norm.to(device)


def vectors(norm):
    """What the operators take of a module, but for its numbers."""
    tensors = norm.weight, norm.bias, norm.running_mean, norm.running_var, norm.num_batches_tracked
    return [tensor.detach() for tensor in tensors]


def fused(x, norm, pooled):
    """Output and codes (None unless pooled)."""
    return bn_relu_pool(x, norm) if pooled else (bn_relu(x, norm), None)


def plain(x, norm, pooled):
    """The same by torch's modules, and where the output is not a rounding away from ReLU's other side."""
    z = norm(x)
    y, codes = F.relu(z), None
    if pooled:
        y, positions = F.max_pool2d(y, 2, 2, ceil_mode=True, return_indices=True)
        codes = (positions // x.shape[-1] % 2 * 2 + positions % x.shape[-1] % 2).to(torch.uint8)
        z = F.max_pool2d(z, 2, 2, ceil_mode=True)
    return y, codes, z.abs() > 1e-3


def gradients(y, x, norm, where=True):
    """Of x, weight and bias, for a gradient of y that is random, or 0 but for `where`; bf16 can hold it."""
    upstream = torch.randn(y.shape, generator=torch.Generator().manual_seed(0)).bfloat16().to(y.device, y.dtype)
    return torch.autograd.grad(y, (x, norm.weight, norm.bias), upstream * where)


def assert_close(found, wanted):
    """Equal to one rounding to the dtype of `found`, and to 1e-5 of the largest value or of 1 on the way there."""
    size = max(1.0, wanted.abs().max().item())
    torch.testing.assert_close(found.double(), wanted.double(), rtol=PRECISION[found.dtype], atol=1e-5 * size)


def assert_equals_torch(x, norm, pooled):
    """Outputs, codes, gradients and running statistics are those of torch's modules in float64."""
    twin, mine, theirs = copy.deepcopy(norm).double(), x.clone().requires_grad_(), x.double().requires_grad_()
    (y, codes), (wanted, wanted_codes, clear) = fused(mine, norm, pooled), plain(theirs, twin, pooled)
    assert y.dtype == x.dtype
    assert_close(y, wanted)
    assert codes is None or torch.equal(codes, wanted_codes)
    for found, expected in zip(gradients(y, mine, norm, clear), gradients(wanted, theirs, twin, clear), strict=True):
        assert_close(found, expected)
    assert_close(norm.running_mean, twin.running_mean)
    assert_close(norm.running_var, twin.running_var)
    assert norm.num_batches_tracked == twin.num_batches_tracked


@pytest.fixture
def few_parts(device, monkeypatch):
    """At most 3 programs per reduction, so that each has several tiles; the reference has no such thing."""
    if INTERPRETED or device.type == "cuda":
        from fastseg.kernels import plan

        monkeypatch.setattr(plan, "multiprocessors", lambda device: 3)


@trainings
@poolings
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_fp32_equals_torch_in_float64(device, shape, training, pooled):
    assert_equals_torch(*sample(shape, device, training=training), pooled)


@trainings
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_precision_rounds_only_what_it_stores(device, dtype, training):
    assert_equals_torch(*sample((2, 11, 5, 7), device, dtype, training), pooled=False)


@trainings
@pytest.mark.parametrize("dtype", PRECISION)
@pytest.mark.parametrize("shape", [(1, 3, 27, 31), (2, 11, 5, 7)], ids=str)
def test_pooling_in_one_pass_is_pooling_after(device, shape, dtype, training):
    x, norm = sample(shape, device, dtype, training)
    # Near 16 half precision makes ties: the first of the equal rounded values must win, as in the sequence.
    norm.bias.data[::2] += 16
    x.requires_grad_()
    twin = copy.deepcopy(norm)
    y = bn_relu(x, twin)
    (values, codes), (wanted, wanted_codes) = bn_relu_pool(x, norm), pool(y)
    assert torch.equal(values, F.max_pool2d(y, 2, 2, ceil_mode=True))
    assert torch.equal(values, wanted)
    assert torch.equal(codes, wanted_codes)
    for found, expected in zip(gradients(values, x, norm), gradients(wanted, x, twin), strict=True):
        assert_close(found, expected)
    assert torch.equal(norm.running_var, twin.running_var)


@poolings
@pytest.mark.parametrize(
    "shape",
    [
        (3, 64, 1, 73),  # 3 programs of 73 rows: a tile of 64 and one of 9
        (1, 70, 1, 73),  # 2 blocks of channels, with one program for each
        (3, 3, 1193, 1),  # 3 programs of a tile of 1024 rows and one of 169
        (1, 64, 2, 193),  # pooled, 97 windows: 3 programs of a tile of 32 and one of 1, or none
    ],
    ids=str,
)
def test_programs_of_several_tiles_leave_nothing_out(device, few_parts, shape, pooled):
    assert_equals_torch(*sample(shape, device), pooled)


def test_more_parts_than_are_merged_at_once(device):
    # 132 programs of 63 rows, the last of 62; the last to arrive loads 128 parts at a time.
    x, norm = sample((1, 64, 83, 100), device)
    twin = copy.deepcopy(norm).double()
    assert_close(bn_relu(x, norm), plain(x.double(), twin, False)[0])
    assert_close(norm.running_mean, twin.running_mean)
    assert_close(norm.running_var, twin.running_var)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@poolings
def test_running_statistics_after_three_steps_are_torchs(device, dtype, pooled):
    _, norm = sample((2, 11, 5, 7), device)
    norm.momentum = 0.25
    twin = copy.deepcopy(norm).double()
    for step in range(3):
        x = sample((2, 11, 5, 7 - step), device, dtype, seed=step)[0] * (step + 1)
        fused(x, norm, pooled)
        twin(x.double())
    torch.testing.assert_close(norm.running_mean.double(), twin.running_mean, rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(norm.running_var.double(), twin.running_var, rtol=1e-5, atol=0)
    assert norm.num_batches_tracked.item() == 3


def test_two_values_worked_by_hand(device):
    # Mean 0, variance 1 (2 unbiased), eps 3: normalised values are half of x, which is where eps counts.
    x = torch.tensor([-1.0, 1.0], device=device).view(1, 1, 1, 2).requires_grad_()
    norm = nn.BatchNorm2d(1, eps=3, momentum=0.5).to(device)
    y = bn_relu(x, norm)
    y.sum().backward()
    assert y.flatten().tolist() == exactly([0, 0.5])
    # ReLU passes [0, 1], of which 1/2 is the mean, and 0.5 * 1/2 the mean product with the normalised [-0.5, 0.5].
    assert x.grad.flatten().tolist() == exactly([0.5 * (0 - 0.5 + 0.5 * 0.25), 0.5 * (1 - 0.5 - 0.5 * 0.25)])
    assert (norm.weight.grad.item(), norm.bias.grad.item()) == exactly((0.5, 1))
    assert (norm.running_mean.item(), norm.running_var.item()) == exactly((0, 1.5))


def test_relu_is_off_exactly_where_the_output_is_0(device):
    x = torch.tensor([-1.0, 0, 2, -0.0], device=device).view(1, 1, 2, 2).requires_grad_()
    norm = nn.BatchNorm2d(1, eps=3).to(device).eval()
    y = bn_relu(x, norm)
    y.sum().backward()
    assert y.flatten().tolist() == exactly([0, 0, 1, 0])
    assert x.grad.flatten().tolist() == exactly([0, 0, 0.5, 0])
    assert (norm.weight.grad.item(), norm.bias.grad.item()) == exactly((1, 1))


def test_the_gradient_of_frozen_statistics_is_that_of_an_affine_map(device):
    x, norm = sample((2, 70, 5, 7), device, training=False)
    y = bn_relu(x.requires_grad_(), norm)
    upstream = torch.randn(y.shape, generator=torch.Generator().manual_seed(0)).to(device)
    scale = norm.weight / (norm.running_var + norm.eps).sqrt()
    wanted = torch.where(y > 0, upstream * scale[:, None, None], 0)
    torch.testing.assert_close(torch.autograd.grad(y, x, upstream)[0], wanted, rtol=2e-6, atol=0)


def spread_pixels(x):
    """The pixels whose mean the statistics are shifted by: as many as a tile has rows, from all over the map."""
    height, _ = tile(x.shape[1], REDUCED_BYTES // x.itemsize)
    rows = x.movedim(1, -1).flatten(0, 2).double()
    return rows[torch.arange(height, device=x.device) * (len(rows) // height)]


@pytest.mark.parametrize("mean", [0, 3, 1000, -1000])
@pytest.mark.parametrize("shape", [(1, 3, 45, 60), (2, 70, 9, 7), (1, 64, 41, 100)], ids=str)
def test_the_error_of_the_statistics_is_bounded_as_stated(device, few_parts, shape, mean):
    # The difference of the mean square and the squared mean, 1,000,001 - 1,000,000, would keep one or two digits.
    x = torch.randn(shape, generator=torch.Generator().manual_seed(0)).to(device) + mean
    norm = nn.BatchNorm2d(shape[1]).to(device)
    twin = copy.deepcopy(norm).double()
    y, found_mean, variance = bn_relu_op(x, *vectors(norm), True, norm.momentum, norm.eps)
    wanted, wanted_mean = torch.var_mean(x.double(), (0, 2, 3), correction=0)
    # Additions one after the other for a value: 3 programs' turns of 64 rows or more, in a tile, over parts.
    additions = x.numel() / shape[1] / 3 / 64 + 10 + 3
    miss = (spread_pixels(x).mean(0) - wanted_mean) / wanted.sqrt()
    assert ((variance - wanted).abs() <= 3 * (additions + 4) * 2**-24 * (1 + miss**2) * wanted).all()
    assert ((found_mean - wanted_mean).abs() <= 2**-24 * (wanted_mean.abs() + (additions + 4) * wanted.sqrt())).all()
    # What half a bit of the mean, and in the reference another of its product, do to (x - mean) / deviation.
    atol = (2 * 2**-24 * wanted_mean.abs() / wanted.sqrt()).max().item() + 1e-5
    torch.testing.assert_close(y.double(), F.relu(twin(x.double())), rtol=0, atol=atol)


@pytest.mark.skipif(not INTERPRETED, reason="only the interpreter can be told in which order programs run")
@poolings
def test_who_arrives_last_changes_no_bit(device, few_parts, pooled, monkeypatch):
    from triton.runtime import interpreter

    builder = interpreter.interpreter_builder
    forward = builder.set_grid_idx
    x, norm = sample((3, 70, 5, 17), device)
    results = []
    for order in (lambda n, count: n, lambda n, count: count - 1 - n, lambda n, count: (n + 1) % count):
        monkeypatch.setattr(
            builder,
            "set_grid_idx",
            lambda *place, order=order: forward(
                *(order(n, count) for n, count in zip(place, builder.grid_dim, strict=True))
            ),
        )
        module = copy.deepcopy(norm)
        y, _ = fused(x.requires_grad_(), module, pooled)
        results.append((y, *gradients(y, x, module), *module.buffers()))
    for others in results[1:]:
        assert all(torch.equal(*pair) for pair in zip(results[0], others, strict=True))


def test_a_constant_channel_becomes_its_bias(device):
    x, norm = sample((2, 3, 4, 6), device)
    # 1 / 16, since the mean of 48 times 0.1 is off by a bit, which 1 / sqrt(0 + eps) makes 316 times as large.
    x[:, 0], norm.bias.data[0] = 1 / 16, 0.5
    for pooled in (False, True):
        y, _ = fused(x, copy.deepcopy(norm), pooled)
        torch.testing.assert_close(y[:, 0], torch.full_like(y[:, 0], 0.5), rtol=0, atol=1e-5)
    # Not pooled: which of equal values is the maximum is a matter of rounding.
    assert_equals_torch(x, norm, pooled=False)


@poolings
def test_a_nan_spoils_its_channel_only(device, pooled):
    x, norm = sample((2, 70, 5, 7), device)
    results = []
    for value in (0, math.nan):
        x[1, 66, 2, 3] = value
        operand, module = x.clone().requires_grad_(), copy.deepcopy(norm)
        y, _ = fused(operand, module, pooled)
        d_x, *_ = gradients(y, operand, module)
        results.append((y, d_x, module.running_mean[None], module.running_var[None]))
    rest = torch.arange(70) != 66
    for wanted, found in zip(*results, strict=True):
        assert found[:, 66].isnan().all()
        assert torch.equal(found[:, rest], wanted[:, rest])


@poolings
def test_one_value_per_channel_is_refused_in_training_only(device, pooled):
    x, norm = sample((1, 3, 1, 1), device)
    with pytest.raises(ValueError, match="one value per channel has no variance"):
        fused(x, norm, pooled)
    assert norm.num_batches_tracked == 0
    norm.eval()
    assert_equals_torch(x, norm, pooled)


@poolings
def test_maps_are_channels_last_whatever_the_operands_strides(device, pooled):
    x, norm = sample((2, 11, 5, 7), device)
    results = []
    for operand in (x, x.contiguous(memory_format=torch.channels_last), x.mT.contiguous().mT):
        module = copy.deepcopy(norm)
        y, codes = fused(operand.requires_grad_(), module, pooled)
        d_x, d_weight, d_bias = gradients(y, operand, module)
        assert all(t.is_contiguous(memory_format=torch.channels_last) for t in (y, d_x, *([codes] if pooled else [])))
        results.append((y, d_x, d_weight, d_bias))
    for result in results[1:]:
        for found, wanted in zip(result, results[0], strict=True):
            assert_close(found, wanted)


@poolings
def test_neither_codes_nor_statistics_carry_a_gradient(device, pooled):
    x, norm = sample((2, 3, 4, 6), device)
    y, codes = fused(x.requires_grad_(), norm, pooled)
    assert y.requires_grad
    assert not any(tensor.requires_grad for tensor in (codes, *norm.buffers()) if tensor is not None)


@pytest.mark.parametrize("name", ["weight", "bias", "running_mean", "running_var"])
def test_vectors_with_gaps_are_refused(device, name):
    # The kernels would read the gaps.
    x, norm = sample((2, 3, 4, 6), device)
    vector = getattr(norm, name)
    vector.data = torch.stack((vector.data, vector.data + 1), 1)[:, 0]
    with pytest.raises(ValueError, match="have to be contiguous"):
        bn_relu(x, norm)


@poolings
def test_statistics_that_moved_since_are_noticed_in_backward(device, pooled):
    # Frozen statistics are kept for backward as they are, and not copied.
    x, norm = sample((2, 3, 4, 6), device, training=False)
    y, _ = fused(x.requires_grad_(), norm, pooled)
    fused(x, norm.train(), pooled)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        y.sum().backward()


@poolings
def test_frozen_statistics_serve_several_passes_before_backward(device, pooled):
    # Nothing moves them, so that nothing spoils what the first pass has kept.
    x, norm = sample((2, 3, 4, 6), device, training=False)
    first, _ = fused(x.requires_grad_(), norm, pooled)
    (alone,) = torch.autograd.grad(first.sum(), x)
    first, second = (fused(x, norm, pooled)[0] for _ in range(2))
    (together,) = torch.autograd.grad(first.sum() + second.sum(), x)
    assert torch.equal(together, 2 * alone)


@poolings
def test_a_second_derivative_is_refused(device, pooled):
    x, norm = sample((2, 3, 4, 6), device)
    y, _ = fused(x.requires_grad_(), norm, pooled)
    (gradient,) = torch.autograd.grad(y.square().sum(), x, create_graph=True)
    with pytest.raises(RuntimeError, match="once_differentiable"):
        gradient.sum().backward()


@given(
    shape=st.tuples(*(st.integers(1, most) for most in (3, 70, 9, 9))),
    training=st.booleans(),
    pooled=st.booleans(),
    seed=st.integers(0, 99),
)
@settings(max_examples=12, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
def test_any_shape_equals_torch(device, shape, training, pooled, seed):
    # A variance of few values may be tiny: normalising then magnifies the roundings of any fp32 arithmetic.
    training = training and math.prod(shape) >= 8 * shape[1]
    assert_equals_torch(*sample(shape, device, training=training, seed=seed), pooled)


@poolings
def test_two_runs_give_the_same_bits(device, few_parts, pooled):
    x, norm = sample((3, 64, 5, 7), device)
    results = []
    for _ in range(2):
        module = copy.deepcopy(norm)
        y, _ = fused(x.requires_grad_(), module, pooled)
        results.append((y, *gradients(y, x, module), module.running_mean, module.running_var))
    assert all(torch.equal(*pair) for pair in zip(*results, strict=True))


@trainings
@poolings
def test_the_operators_keep_the_rules_of_custom_operators(device, training, pooled):
    x, norm = sample((2, 3, 3, 4), device)
    operators = torch.ops.fastseg
    operator = (operators.bn_relu_pool if pooled else operators.bn_relu).default
    operands = (x, *vectors(norm), training, 0.1, 1e-5)
    torch.library.opcheck(operator, operands)
    y, *rest = operator(*operands)
    weight, bias, *statistics, _ = vectors(norm)
    codes = rest[0] if pooled else None
    operands = (x, torch.ones_like(y), codes, weight, bias, *statistics, training, 1e-5)
    torch.library.opcheck(operators.bn_relu_backward.default, operands)


@trainings
@poolings
def test_compiled_gives_the_same_bits(device, training, pooled):
    x, norm = sample((2, 3, 4, 5), device, training=training)
    results = []
    for call in (fused, torch.compile(fused, fullgraph=True, backend="aot_eager")):
        module = copy.deepcopy(norm)
        y, _ = call(x.requires_grad_(), module, pooled)
        results.append((y, *gradients(y, x, module), *module.buffers()))
    assert all(torch.equal(*pair) for pair in zip(*results, strict=True))


def test_triton_runs_on_a_gpu_and_in_its_interpreter_only(device, monkeypatch):
    triton_path = pytest.importorskip("fastseg.kernels.bn_relu_triton", exc_type=ImportError)
    calls = []
    for name in ("bn_relu", "bn_relu_pool", "bn_relu_backward"):
        launcher = getattr(triton_path, name)
        monkeypatch.setattr(
            triton_path, name, lambda *args, name=name, launch=launcher: calls.append(name) or launch(*args)
        )
    x, norm = sample((2, 3, 4, 6), device)
    for pooled in (False, True):
        fused(x.requires_grad_(), norm, pooled)[0].sum().backward()
    expected = ["bn_relu", "bn_relu_backward", "bn_relu_pool", "bn_relu_backward"]
    assert calls == (expected if INTERPRETED or device.type == "cuda" else [])


def test_a_norm_in_bf16_trains_as_well(device):
    x, norm = sample((2, 3, 4, 6), device)
    wanted = bn_relu(x, copy.deepcopy(norm))
    found = bn_relu(x.bfloat16(), norm.bfloat16())
    assert found.dtype == torch.bfloat16
    # The input, the scale, the shift and the result are each rounded to 8 bits.
    torch.testing.assert_close(found.float(), wanted, rtol=2**-6, atol=2**-5)


@pytest.mark.parametrize("option", [{"momentum": None}, {"track_running_stats": False}, {"affine": False}])
def test_a_norm_that_cannot_be_fused_is_refused(device, option):
    norm = torch.nn.BatchNorm2d(3, **option).to(device)
    with pytest.raises(ValueError, match="only one with a scale, running statistics and a fixed momentum"):
        bn_relu(torch.ones(2, 3, 4, 4, device=device), norm)
