"""Pooling with positions and its inverse: against loops, torch's own operations, and windows worked by hand."""

import pytest
import torch
import torch.nn.functional as F
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from torch.autograd import gradcheck, gradgradcheck

from fastseg.kernels.launch import INTERPRETED
from fastseg.kernels.pool import pool, take, torch_pool, torch_unpool, unpool

# Both edges odd, both even, mixed, one row or column, and 45: the size that a 360-row image has at the third pooling.
SIZES = [(1, 1), (1, 8), (7, 1), (4, 6), (5, 7), (6, 3), (45, 60)]
# [B, C, H, W] for the operators, whose programs hold 1024 elements of at most 64 channels.
SHAPES = {
    "one pixel": (1, 1, 1, 1),
    "one row": (2, 3, 1, 8),
    "one column": (2, 3, 7, 1),
    "even": (2, 64, 4, 6),
    "odd": (2, 11, 5, 7),
    "even by odd": (2, 2, 6, 3),
    "prime": (3, 3, 13, 17),
    "several programs, the last one part empty": (1, 3, 45, 60),
    "two channel tiles, the second part empty": (2, 70, 6, 5),
    "the deepest layer": (1, 512, 3, 5),
}
shapes = pytest.mark.parametrize("shape", SHAPES.values(), ids=SHAPES)
dtypes = pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
NAN, INF = float("nan"), float("inf")


def distinct(*shape: int) -> torch.Tensor:
    """Values that all differ, so that each window has one maximum."""
    return torch.randperm(torch.Size(shape).numel(), generator=torch.Generator().manual_seed(0)).view(shape).double()


def normal(shape, dtype: torch.dtype, seed: int = 0) -> torch.Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed)).to(dtype)


def windows(height: int, width: int):
    """Slices of the 2x2 windows, those at an odd edge cut short."""
    for top in range(0, height, 2):
        for left in range(0, width, 2):
            yield (top // 2, left // 2), (slice(top, min(top + 2, height)), slice(left, min(left + 2, width)))


def torchs(x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """F.max_pool2d's values and positions on the CPU, in fp32 (which holds every value of the others), and codes."""
    values, positions = F.max_pool2d(x.float(), 2, 2, ceil_mode=True, return_indices=True)
    width, (rows, columns) = x.shape[-1], positions.shape[-2:]
    dy = positions // width - 2 * torch.arange(rows)[:, None]
    dx = positions % width - 2 * torch.arange(columns)
    return values, positions, (2 * dy + dx).to(torch.uint8)


def assert_equal(found: torch.Tensor, wanted: torch.Tensor, dtype: torch.dtype) -> None:
    """Each element, NaN too, after the exact way back from fp32."""
    torch.testing.assert_close(found.detach().cpu(), wanted.detach().to(dtype), rtol=0, atol=0, equal_nan=True)


def leaf(x: torch.Tensor, device: torch.device | str = "cpu") -> torch.Tensor:
    return x.detach().to(device, copy=True).requires_grad_()


def test_a_3x3_worked_by_hand(device):
    x = torch.tensor([[[[1.0, 9, 3], [4, 2, 8], [7, 5, 6]]]], device=device)
    values, positions = torch_pool(x)
    found, codes = pool(x)
    assert values.tolist() == found.tolist() == [[[[9, 8], [7, 6]]]]
    assert positions.tolist() == [[[[1, 5], [6, 8]]]]  # row * 3 + column
    assert codes.tolist() == [[[[1, 2], [0, 0]]]]  # 2 * row + column in the window
    for back in (torch_unpool(values, positions, (3, 3)), unpool(found, codes, 3, 3)):
        assert back.tolist() == [[[[0, 9, 0], [0, 0, 8], [7, 0, 6]]]]
    assert take(10 * x, codes).tolist() == [[[[90, 80], [70, 60]]]]


@pytest.mark.parametrize("size", SIZES)
def test_pooling_and_unpooling_equal_torch(size):
    x = distinct(2, 3, *size).requires_grad_()
    values, positions = torch_pool(x)
    wanted, indices = F.max_pool2d(x, 2, stride=2, ceil_mode=True, return_indices=True)
    assert torch.equal(values, wanted)
    assert torch.equal(positions, indices)
    back = torch_unpool(values, positions, size)
    assert torch.equal(back, F.max_unpool2d(wanted, indices, 2, stride=2, output_size=size))
    # Each maximum went one way and came back: the gradient of the sum of squares is twice the value there, else zero.
    back.square().sum().backward()
    assert torch.equal(x.grad, 2 * back)


def test_45_rows_become_23_and_45_again(device):
    values, positions = torch_pool(distinct(1, 2, 45, 60))
    assert values.shape == positions.shape == (1, 2, 23, 30)
    assert torch_unpool(values, positions, (45, 60)).shape == (1, 2, 45, 60)
    values, codes = pool(distinct(1, 2, 45, 60).to(device, torch.float32))
    assert values.shape == codes.shape == take(unpool(values, codes, 45, 60), codes).shape == (1, 2, 23, 30)
    assert unpool(values, codes, 45, 60).shape == (1, 2, 45, 60)


@given(height=st.integers(1, 9), width=st.integers(1, 9))
@settings(max_examples=40, deadline=None)
def test_each_window_keeps_its_maximum_in_its_place(height, width):
    x = distinct(1, 1, height, width) + 1
    values, positions = torch_pool(x)
    assert values.shape == (1, 1, -(-height // 2), -(-width // 2))
    wanted = torch.zeros(height, width, dtype=x.dtype)
    for (row, column), window in windows(height, width):
        maximum = x[0, 0][window].max()
        assert values[0, 0, row, column] == maximum
        wanted[window] = torch.where(x[0, 0][window] == maximum, maximum, 0.0)
    assert torch.equal(torch_unpool(values, positions, (height, width))[0, 0], wanted)


@pytest.mark.parametrize("size", [(4, 4), (3, 5)])
def test_gradients_are_those_of_finite_differences(size):
    x = distinct(1, 2, *size).requires_grad_()
    assert gradcheck(lambda t: torch_pool(t)[0], x)
    values, positions = (t.detach() for t in torch_pool(x))
    assert gradcheck(lambda t: torch_unpool(t, positions, size), values.requires_grad_())


def test_channels_last_is_kept():
    x = distinct(2, 3, 6, 7).contiguous(memory_format=torch.channels_last)
    values, positions = torch_pool(x)
    back = torch_unpool(values, positions, (6, 7))
    for tensor in (values, positions, back):
        assert tensor.is_contiguous(memory_format=torch.channels_last)
        assert not tensor.is_contiguous()
    assert torch_unpool(values.contiguous(), positions.contiguous(), (6, 7)).stride() == back.stride()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_low_precision_moves_values_without_changing_them(dtype):
    x = normal((1, 4, 5, 6), dtype)
    values, positions = torch_pool(x)
    assert values.dtype == dtype
    assert torch.equal(values, torch_pool(x.double())[0].to(dtype))
    assert set(torch_unpool(values, positions, (5, 6)).unique().tolist()) <= {0.0, *x.unique().tolist()}


def assert_as_torch(mine, theirs, operand: torch.Tensor, device: torch.device) -> None:
    """Both functions' results of an operand, and the gradients that they turn the same random one into."""
    x, y = leaf(operand, device), leaf(operand.float())
    found, wanted = mine(x), theirs(y)
    assert_equal(found, wanted, operand.dtype)
    gradient = normal(wanted.shape, operand.dtype, 2)
    found.backward(gradient.to(device))
    wanted.backward(gradient.float())
    assert_equal(x.grad, y.grad, operand.dtype)


@dtypes
@shapes
def test_pool_and_its_gradient_equal_torch(device, shape, dtype):
    x = normal(shape, dtype)
    assert_as_torch(lambda t: pool(t)[0], lambda t: torchs(t)[0], x, device)
    assert_equal(pool(x.to(device))[1], torchs(x)[2], torch.uint8)


@dtypes
@shapes
def test_unpool_and_its_gradient_equal_torch(device, shape, dtype):
    values, positions, codes = torchs(normal(shape, dtype))
    codes = codes.to(device)
    assert_as_torch(
        lambda t: unpool(t, codes, *shape[2:]),
        lambda t: F.max_unpool2d(t, positions, 2, output_size=shape[2:]),
        # Not the pooled values: what comes up from the layer below is another tensor.
        normal(values.shape, dtype, 1),
        device,
    )


@dtypes
@shapes
def test_take_and_its_gradient_equal_torchs_gather(device, shape, dtype):
    _, positions, codes = torchs(normal(shape, dtype))
    codes = codes.to(device)
    assert_as_torch(
        lambda t: take(t, codes),
        lambda t: t.flatten(2).gather(2, positions.flatten(2)).view(positions.shape),
        normal(shape, dtype, 1),
        device,
    )


@dtypes
def test_the_first_of_equal_maxima_wins_as_in_torch(device, dtype):
    x = torch.randint(-1, 2, (2, 70, 9, 7), generator=torch.Generator().manual_seed(0)).to(dtype)
    values, codes = pool(x.to(device))
    wanted, _, wanted_codes = torchs(x)
    assert_equal(values, wanted, dtype)
    assert_equal(codes, wanted_codes, torch.uint8)


@dtypes
def test_windows_of_ties_infinities_and_nan_worked_by_hand(device, dtype):
    cases = {  # window, row by row: code of what it keeps
        (5, 5, 5, 5): 0,
        (1, 5, 5, 2): 1,
        (1, 2, 5, 5): 2,
        (-INF, -INF, -INF, -INF): 0,
        (-INF, -INF, -INF, -9): 3,
        (1, INF, INF, 2): 1,
        (NAN, 1, 2, 3): 0,
        (NAN, NAN, 3, 4): 1,
        (NAN, 1, NAN, INF): 2,
        (INF, 1, 2, NAN): 3,
        (NAN, NAN, NAN, NAN): 3,
    }
    x = torch.tensor(list(cases), dtype=dtype).view(-1, 1, 2, 2)
    values, codes = pool(x.to(device))
    assert codes.flatten().tolist() == list(cases.values())
    kept = torch.tensor([window[code] for window, code in cases.items()]).view(-1, 1, 1, 1)
    assert_equal(values, kept, dtype)
    for found, wanted in zip((values, codes), torchs(x)[::2], strict=True):
        assert_equal(found, wanted, found.dtype)
    # No 0 * inf on the way up: the others of a window are zero.
    wanted = torch.where(torch.arange(4).view(2, 2) == codes.cpu(), kept, 0.0)
    assert_equal(unpool(values, codes, 2, 2), wanted, dtype)
    assert_equal(take(x.to(device), codes), kept, dtype)


@pytest.mark.parametrize(
    ("value", "codes"), [(-INF, [[0, 0], [0, 0]]), (INF, [[0, 0], [0, 0]]), (NAN, [[3, 2], [1, 0]])]
)
def test_windows_cut_short_at_an_edge_keep_a_pixel_that_exists(device, value, codes):
    values, found = pool(torch.full((1, 1, 3, 3), value, device=device))
    assert_equal(values, torch.full((1, 1, 2, 2), value), torch.float32)
    assert found.tolist() == [[codes]]


def test_any_layout_goes_in_and_channels_last_comes_out(device):
    x = leaf(normal((2, 3, 6, 7), torch.float32), device)
    values, positions, codes = torchs(x.detach().cpu())
    up, ones = (F.max_unpool2d(t, positions, 2, output_size=(6, 7)) for t in (values, torch.ones_like(values)))
    for view in (x, x.mT.contiguous().mT, F.pad(x, (1, 2, 0, 1))[..., :6, 1:8]):
        pooled, found = pool(view)
        back, taken = unpool(pooled.contiguous(), found.contiguous(), 6, 7), take(view, found.contiguous())
        for tensor, wanted in ((pooled, values), (found, codes), (back, up), (taken, values)):
            assert tensor.is_contiguous(memory_format=torch.channels_last)
            assert_equal(tensor, wanted, wanted.dtype)
        # Gradients of a sum have stride 0.
        for tensor in (pooled, taken):
            assert_equal(*torch.autograd.grad(tensor.sum(), x), ones, torch.float32)


@given(shape=st.tuples(st.integers(1, 3), st.integers(1, 5), st.integers(1, 9), st.integers(1, 9)))
# The fixture only names a device.
@settings(max_examples=15, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
def test_what_goes_down_comes_up_where_it_was(device, shape):
    x = (distinct(*shape) + 1).to(device, torch.float32)
    values, codes = pool(x)
    assert torch.equal(take(x, codes), values)
    back = unpool(values, codes, *shape[2:])
    assert torch.equal(take(back, codes), values)
    assert torch.equal(back, torch.where(torch.isin(x, values.flatten()), x, 0))
    for (row, column), window in windows(*shape[2:]):
        assert torch.equal(values[..., row, column], x[..., window[0], window[1]].amax((2, 3)))


@pytest.mark.skipif(INTERPRETED, reason="the kernels take no float64")
@pytest.mark.parametrize("size", [(4, 4), (3, 5)])
def test_gradients_of_the_operators_are_those_of_finite_differences(size):
    x = distinct(1, 2, *size)
    values, codes = pool(x)
    cases = [(lambda t: pool(t)[0], x), (lambda t: unpool(t, codes, *size), values), (lambda t: take(t, codes), x)]
    for function, operand in cases:
        assert gradcheck(function, leaf(operand))
        assert gradgradcheck(function, leaf(operand))


def test_the_kernels_refuse_float64_and_say_what_they_take(device):
    if device.type == "cpu" and not INTERPRETED:
        pytest.skip("the reference takes float64")
    x, codes = (t.to(device) for t in (distinct(1, 1, 2, 2), torch.zeros(1, 1, 1, 1, dtype=torch.uint8)))
    for call in (lambda: pool(x), lambda: unpool(x[..., :1, :1], codes, 2, 2), lambda: take(x, codes)):
        with pytest.raises(TypeError, match=r"float64: .* float32, float16 and bfloat16"):
            call()


def test_the_operators_work_where_only_deterministic_ones_may(device):
    x = normal((2, 3, 5, 7), torch.float32)
    wanted, positions, _ = torchs(x)
    back = F.max_unpool2d(wanted, positions, 2, output_size=(5, 7))
    before = torch.are_deterministic_algorithms_enabled()
    try:
        torch.use_deterministic_algorithms(True)
        with pytest.raises(RuntimeError, match="deterministic"):
            F.max_unpool2d(wanted.to(device), positions.to(device), 2, output_size=(5, 7))
        mine = leaf(x, device)
        # Memory that nothing has written yet holds NaN in this mode: each element must be written.
        found = unpool(*pool(mine), 5, 7)
        found.square().sum().backward()
    finally:
        torch.use_deterministic_algorithms(before)
    assert_equal(found, back, torch.float32)
    assert_equal(mine.grad, 2 * back, torch.float32)


def test_torch_accepts_the_operators_as_its_own(device):
    x = normal((2, 3, 5, 7), torch.float32).to(device)
    values, codes = pool(x)
    operators = torch.ops.fastseg
    torch.library.opcheck(operators.pool.default, (x,))
    torch.library.opcheck(operators.unpool.default, (values, codes, 5, 7))
    torch.library.opcheck(operators.take.default, (x, codes))


def test_a_compiled_way_down_and_up_equals_the_eager_one(device):
    def down_and_up(x):
        values, codes = pool(x)
        return unpool(values.square(), codes, *x.shape[-2:])

    x = normal((2, 3, 5, 7), torch.float32)
    results = []
    for function in (down_and_up, torch.compile(down_and_up, fullgraph=True, backend="aot_eager")):
        mine = leaf(x, device)
        out = function(mine)
        out.sum().backward()
        results.append((out, mine.grad))
    for eager, compiled in zip(*results, strict=True):
        assert torch.equal(eager, compiled)


@pytest.mark.parametrize("name", ["pool", "unpool", "take"])
def test_a_triton_kernel_runs_on_a_gpu_and_in_the_interpreter_alone(device, name, monkeypatch):
    launchers = pytest.importorskip("fastseg.kernels.pool_triton")
    launched, launch = [], getattr(launchers, name)
    monkeypatch.setattr(launchers, name, lambda *args: launched.append(name) or launch(*args))
    x, codes = torch.ones(1, 1, 1, 1, device=device), torch.zeros(1, 1, 1, 1, dtype=torch.uint8, device=device)
    {"pool": lambda: pool(x), "unpool": lambda: unpool(x, codes, 1, 1), "take": lambda: take(x, codes)}[name]()
    assert launched == ([name] if INTERPRETED or device.type == "cuda" else [])
