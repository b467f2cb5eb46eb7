"""Pooling with positions and its inverse: against loops, torch's own operations, and a window worked by hand."""

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st

from fastseg.kernels.pool import pool, unpool

# Both edges odd, both even, mixed, one row or column, and 45: the size that a 360-row image has at the third pooling.
SIZES = [(1, 1), (1, 8), (7, 1), (4, 6), (5, 7), (6, 3), (45, 60)]


def distinct(*shape: int) -> torch.Tensor:
    """Values that all differ, so that each window has one maximum."""
    return torch.randperm(torch.Size(shape).numel(), generator=torch.Generator().manual_seed(0)).view(shape).double()


def windows(height: int, width: int):
    """Slices of the 2x2 windows, those at an odd edge cut short."""
    for top in range(0, height, 2):
        for left in range(0, width, 2):
            yield (top // 2, left // 2), (slice(top, min(top + 2, height)), slice(left, min(left + 2, width)))


def test_a_3x3_worked_by_hand():
    x = torch.tensor([[[[1.0, 9, 3], [4, 2, 8], [7, 5, 6]]]])
    values, positions = pool(x)
    assert values.tolist() == [[[[9, 8], [7, 6]]]]
    assert positions.tolist() == [[[[1, 5], [6, 8]]]]  # row * 3 + column
    assert unpool(values, positions, (3, 3)).tolist() == [[[[0, 9, 0], [0, 0, 8], [7, 0, 6]]]]


@pytest.mark.parametrize("size", SIZES)
def test_pooling_and_unpooling_equal_torch(size):
    x = distinct(2, 3, *size).requires_grad_()
    values, positions = pool(x)
    wanted, indices = F.max_pool2d(x, 2, stride=2, ceil_mode=True, return_indices=True)
    assert torch.equal(values, wanted)
    assert torch.equal(positions, indices)
    back = unpool(values, positions, size)
    assert torch.equal(back, F.max_unpool2d(wanted, indices, 2, stride=2, output_size=size))
    # Each maximum went one way and came back: the gradient of the sum of squares is twice the value there, else zero.
    back.square().sum().backward()
    assert torch.equal(x.grad, 2 * back)


def test_45_rows_become_23_and_45_again():
    values, positions = pool(distinct(1, 2, 45, 60))
    assert values.shape == positions.shape == (1, 2, 23, 30)
    assert unpool(values, positions, (45, 60)).shape == (1, 2, 45, 60)


@given(height=st.integers(1, 9), width=st.integers(1, 9))
@settings(max_examples=40, deadline=None)
def test_each_window_keeps_its_maximum_in_its_place(height, width):
    x = distinct(1, 1, height, width) + 1
    values, positions = pool(x)
    assert values.shape == (1, 1, -(-height // 2), -(-width // 2))
    wanted = torch.zeros(height, width, dtype=x.dtype)
    for (row, column), window in windows(height, width):
        maximum = x[0, 0][window].max()
        assert values[0, 0, row, column] == maximum
        wanted[window] = torch.where(x[0, 0][window] == maximum, maximum, 0.0)
    assert torch.equal(unpool(values, positions, (height, width))[0, 0], wanted)


@pytest.mark.parametrize("size", [(4, 4), (3, 5)])
def test_gradients_are_those_of_finite_differences(size):
    x = distinct(1, 2, *size).requires_grad_()
    assert torch.autograd.gradcheck(lambda t: pool(t)[0], x)
    values, positions = (t.detach() for t in pool(x))
    assert torch.autograd.gradcheck(lambda t: unpool(t, positions, size), values.requires_grad_())


def test_channels_last_is_kept():
    x = distinct(2, 3, 6, 7).contiguous(memory_format=torch.channels_last)
    values, positions = pool(x)
    back = unpool(values, positions, (6, 7))
    for tensor in (values, positions, back):
        assert tensor.is_contiguous(memory_format=torch.channels_last)
        assert not tensor.is_contiguous()
    assert unpool(values.contiguous(), positions.contiguous(), (6, 7)).stride() == back.stride()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_low_precision_moves_values_without_changing_them(dtype):
    x = torch.randn(1, 4, 5, 6, generator=torch.Generator().manual_seed(0)).to(dtype)
    values, positions = pool(x)
    assert values.dtype == dtype
    assert torch.equal(values, pool(x.double())[0].to(dtype))
    assert set(unpool(values, positions, (5, 6)).unique().tolist()) <= {0.0, *x.unique().tolist()}
