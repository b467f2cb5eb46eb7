"""The switch between fastseg's operators and PyTorch's, and what the launchers share."""

import importlib.util
import os
import subprocess
import sys

import pytest
import torch

from fastseg.errors import UsageError
from fastseg.kernels.launch import CHOICES, INTERPRETED, channels_last, choose, empty, halved, on_triton, tile

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
from fastseg.kernels.cross_entropy import cross_entropy_sum, weight_sum
x = torch.randn(2, 3, 4, 5, requires_grad=True)
values, _ = bn_relu_pool(x, torch.nn.BatchNorm2d(3))
labels = torch.zeros(2, 2, 3, dtype=torch.uint8)
(cross_entropy_sum(values, labels, torch.ones(3)) / weight_sum(labels, torch.ones(3))).backward()
assert x.grad.isfinite().all()
"""
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    done = subprocess.run([sys.executable, "-c", script], env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
