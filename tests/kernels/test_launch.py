"""The switch between fastseg's operators and PyTorch's, and what the launchers share."""

import importlib.util
import os
import subprocess
import sys

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch._subclasses.fake_tensor import FakeTensorMode

from fastseg.errors import UsageError
from fastseg.kernels import launch, plan
from fastseg.kernels.bn_relu import bn_relu, bn_relu_pool
from fastseg.kernels.cross_entropy import cross_entropy, weight_sum
from fastseg.kernels.launch import CHOICES, INTERPRETED, channels_last, choose, empty, halved, on_triton
from fastseg.kernels.plan import tile

CPU, CUDA = torch.device("cpu"), torch.device("cuda")
TORCHS_OWN = "as asked, PyTorch's own operations"
TOO_OLD = "Triton needs compute capability 8.0 or later, this GPU has 7.5"


@pytest.fixture
def gpu(monkeypatch):
    """gpu(triton, capability) makes this machine look like one with such a GPU, with Triton or without."""

    def pretend(triton: bool, capability: tuple[int, int]) -> None:
        find = importlib.util.find_spec
        absent = () if triton else ("triton",)
        present = find("torch")  # any spec will do where this machine has no Triton
        monkeypatch.setattr(
            importlib.util,
            "find_spec",
            lambda name, package=None: None if name in absent else present if name == "triton" else find(name, package),
        )
        monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device=None: capability)

    return pretend


@pytest.mark.parametrize("requested", ["auto", "torch"])
def test_a_cpu_runs_pytorchs_operations_unless_asked_otherwise(requested):
    found, reason = choose(requested, CPU)
    assert found == "torch"
    assert reason == {"auto": "PyTorch's own operations are the fastest on a CPU", "torch": TORCHS_OWN}[requested]


def test_fused_on_a_cpu_says_which_of_the_two_ways_runs():
    way = "Triton's interpreter" if INTERPRETED else "their PyTorch reference on a CPU"
    assert choose("fused", CPU) == ("fused", f"as asked, {way}")


@pytest.mark.parametrize("capability", [(8, 0), (8, 9), (9, 0), (12, 1)])
def test_a_gpu_that_triton_serves_runs_the_kernels(gpu, capability):
    gpu(True, capability)
    assert choose("auto", CUDA) == ("fused", "Triton kernels")
    assert choose("fused", CUDA) == ("fused", "as asked, Triton kernels")
    assert choose("torch", CUDA) == ("torch", TORCHS_OWN)


@pytest.mark.parametrize(
    ("triton", "capability", "obstacle"),
    [(False, (8, 0), "Triton is not installed"), (True, (7, 5), TOO_OLD), (False, (7, 5), "Triton is not installed")],
)
def test_on_a_gpu_without_triton_auto_falls_back_and_fused_refuses(gpu, triton, capability, obstacle):
    gpu(triton, capability)
    assert choose("auto", CUDA) == ("torch", obstacle)
    assert choose("torch", CUDA) == ("torch", TORCHS_OWN)
    with pytest.raises(UsageError) as caught:
        choose("fused", CUDA)
    assert str(caught.value) == f"runtime.kernels fused: {obstacle}; use torch"


@pytest.mark.parametrize("requested", ["triton", "", "Fused"])
def test_an_unknown_choice_names_the_option_and_the_choices(requested):
    with pytest.raises(UsageError) as caught:
        choose(requested, CPU)
    message = str(caught.value)
    assert message.startswith(f"runtime.kernels {requested}: ")
    assert "\n" not in message
    assert all(choice in message for choice in CHOICES)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16, torch.uint8])
def test_the_kernels_serve_gpus_and_the_interpreter(device, dtype):
    assert on_triton(torch.zeros(1, dtype=dtype, device=device)) is (INTERPRETED or device.type == "cuda")


def test_a_float64_is_refused_where_a_kernel_would_serve_it(device):
    tensor = torch.zeros(1, dtype=torch.float64, device=device)
    if INTERPRETED or device.type == "cuda":
        with pytest.raises(TypeError, match=r"float64.*float32, float16 and bfloat16"):
            on_triton(tensor)
    else:
        assert on_triton(tensor) is False


@pytest.mark.parametrize(
    ("channels", "elements", "wanted"),
    [
        (1, 2048, (2048, 1)),
        (2, 2048, (1024, 2)),
        (3, 2048, (512, 4)),
        (4, 2048, (512, 4)),
        (5, 1024, (128, 8)),
        (11, 1024, (64, 16)),
        (33, 2048, (32, 64)),
        (64, 2048, (32, 64)),
        (65, 1024, (16, 64)),
        (512, 2048, (32, 64)),
    ],
)
def test_a_tile_is_as_wide_as_the_channels_up_to_64(channels, elements, wanted):
    assert tile(channels, elements) == wanted


def test_halving_rounds_up():
    assert [halved(size) for size in (1, 2, 3, 4, 45, 360)] == [1, 1, 2, 2, 23, 180]


def test_new_tensors_are_channels_last_and_such_ones_are_not_copied(device):
    made = empty((2, 3, 4, 5), torch.zeros(1, dtype=torch.bfloat16, device=device))
    assert (made.dtype, made.device.type) == (torch.bfloat16, device.type)
    assert made.stride() == (60, 1, 15, 3)  # of a pixel's neighbours in b, c, y and x
    assert channels_last(made) is made
    assert empty((2, 3, 4, 5), made, torch.uint8).dtype == torch.uint8
    strided = torch.arange(120.0, device=device).view(2, 3, 4, 5)
    assert channels_last(strided).stride() == made.stride()
    assert torch.equal(channels_last(strided), strided)


def test_the_operators_run_on_a_cpu_without_triton():
    # None in sys.modules makes any import of triton fail, as where it is not installed.
    script = """
import importlib, pkgutil, sys
sys.modules["triton"] = None
import torch, fastseg.kernels
names = {module.name for module in pkgutil.iter_modules(fastseg.kernels.__path__)}
kernels = {name for name in names if name.endswith("_triton")}
assert len(kernels) > 3, names
for name in sorted(names - kernels - {"aot"}):
    importlib.import_module("fastseg.kernels." + name)
assert not {"fastseg.kernels." + name for name in kernels} & set(sys.modules)
from fastseg.kernels.bn_relu import bn_relu_pool
from fastseg.kernels.cross_entropy import cross_entropy, weight_sum
x = torch.randn(2, 3, 4, 5, requires_grad=True)
values, _ = bn_relu_pool(x, torch.nn.BatchNorm2d(3))
labels = torch.zeros(2, 2, 3, dtype=torch.uint8)
cross_entropy(values, labels, torch.ones(3), weight_sum(labels, torch.ones(3))).backward()
assert x.grad.isfinite().all()
"""
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    done = subprocess.run([sys.executable, "-c", script], env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr


@pytest.fixture
def fake_gpu(monkeypatch):
    """Tensors without values on a GPU that is not there, on a stream of any number; `capturing` is whether it is."""
    state = {"stream": 1, "capturing": False}
    monkeypatch.setattr(launch, "_SCRATCH", {})
    monkeypatch.setattr(torch._C, "_cuda_getCurrentRawStream", lambda index: state["stream"], raising=False)
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: state["capturing"])
    with FakeTensorMode():
        yield state


def test_scratch_is_kept_for_each_stream_and_grows(fake_gpu):
    device = torch.device("cuda:0")
    parts, counters = launch.scratch(device, 1000, 3)
    assert (parts.dtype, counters.dtype) == (torch.float32, torch.int32)
    assert len(parts) >= 1000
    assert len(counters) >= 3
    assert launch.scratch(device, 7, 1)[0] is parts
    fake_gpu["stream"] = 2
    assert launch.scratch(device, 7, 1)[0] is not parts
    fake_gpu["stream"] = 1
    for numbers, blocks in ((len(parts) + 1, 1), (1, len(counters) + 1)):
        larger, more = launch.scratch(device, numbers, blocks)
        assert len(larger) >= numbers
        assert len(more) >= blocks
        assert launch.scratch(device, numbers, blocks)[0] is larger
    # Neither has become less with the other, and a graph that was captured with the first may still write to it.
    assert len(launch.scratch(device, 1, 1)[0]) > len(parts)
    assert len(launch.scratch(device, 1, 1)[1]) > len(counters)
    assert any(kept is parts for all_of_one in launch._SCRATCH.values() for kept, _ in all_of_one)


def test_scratch_that_a_graph_brings_is_the_graphs_alone(fake_gpu):
    # Its zeros are not written before the graph is replayed, and lost when the graph is.
    fake_gpu["capturing"] = True
    graphs, _ = launch.scratch(torch.device("cuda:0"), 7, 1)
    fake_gpu["capturing"] = False
    assert launch.scratch(torch.device("cuda:0"), 7, 1)[0] is not graphs


def test_counters_are_back_at_zero_after_every_kernel():
    if not INTERPRETED:
        pytest.skip("without Triton's interpreter a CPU needs no counters")
    norm = torch.nn.BatchNorm2d(70)
    x = torch.randn(2, 70, 5, 7, requires_grad=True)
    values, _ = bn_relu_pool(bn_relu(x, norm), norm)
    labels = torch.zeros(2, 3, 4, dtype=torch.uint8)
    cross_entropy(values, labels, torch.ones(70), weight_sum(labels, torch.ones(70))).backward()
    (kept,) = launch._SCRATCH.values()
    assert not any(counters.any() for _, counters in kept)


@pytest.mark.gpu
def test_two_streams_at_once_do_not_share_scratch():
    x = torch.randn(8, 64, 180, 240, device="cuda").to(memory_format=torch.channels_last)
    norm = torch.nn.BatchNorm2d(64).cuda()
    wanted = bn_relu(x, norm)
    streams, found = [torch.cuda.Stream() for _ in range(2)], []
    for stream in streams:
        stream.wait_stream(torch.cuda.current_stream())
    for number in range(40):
        with torch.cuda.stream(streams[number % 2]):
            found.append(bn_relu(x, norm))
    torch.cuda.synchronize()
    assert all(torch.equal(y, wanted) for y in found)


# By hand: 132 programs, or fewer where a tile would be left for none; all rows are somebody's.
@pytest.mark.parametrize(
    ("rows", "channels", "value_bytes", "values", "parts", "blocks", "share", "tile_of"),
    [
        (691200, 64, 2, 1, 132, 1, 5237, (128, 64)),
        (2640, 512, 2, 1, 16, 8, 165, (128, 64)),
        (2640, 512, 2, 5.5, 16, 8, 165, (64, 64)),  # of windows: half the tile
        (43200, 256, 4, 2, 33, 4, 1310, (64, 64)),
        (100, 64, 4, 1, 2, 1, 50, (64, 64)),
        (1, 3, 4, 1, 1, 1, 1, (1024, 4)),
        (5, 64 * 200, 2, 1, 1, 200, 5, (128, 64)),  # more blocks than multiprocessors
    ],
)
def test_a_reduction_is_divided_evenly_among_multiprocessors(
    rows, channels, value_bytes, values, parts, blocks, share, tile_of
):
    found = plan.reduction(rows, channels, value_bytes, int(values * value_bytes), 132)
    assert (found.parts, found.blocks, found.share, (found.height, found.width)) == (parts, blocks, share, tile_of)
    assert (found.parts - 1) * found.share < rows <= found.parts * found.share


@given(rows=st.integers(1, 10**7), channels=st.integers(1, 2000), count=st.integers(1, 300), size=st.integers(1, 40))
def test_no_program_of_a_reduction_is_without_rows_and_its_stages_fit(rows, channels, count, size):
    found = plan.reduction(rows, channels, 2, size, count)
    assert (found.parts - 1) * found.share < rows <= found.parts * found.share
    assert found.parts <= max(1, count // found.blocks)
    assert found.blocks * found.width >= channels
    in_flight = (found.stages - 1) * found.height * found.width * size
    assert found.stages == 2 or in_flight <= plan.IN_FLIGHT


@given(pixels=st.integers(1, 10**7), height=st.sampled_from([32, 128, 1024]), count=st.integers(1, 300))
def test_a_sum_over_pixels_has_whole_tiles_and_no_program_without_pixels(pixels, height, count):
    programs, share = plan.sums(pixels, height, count)
    assert share % height == 0
    assert (programs - 1) * share < pixels <= programs * share
    assert programs <= plan.SUMMING * count
