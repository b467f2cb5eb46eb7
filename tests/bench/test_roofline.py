"""The roofline: operations, bytes and parameters per layer, worked by hand and counted by torch."""

import pytest
import torch

from fastseg.bench.model import count_flops
from fastseg.bench.roofline import Layer, Peaks, layers, seconds
from fastseg.model import SegNet


def test_a_network_of_one_stage_worked_by_hand():
    # 4x6 pixels, batch 2, bf16, PyTorch's operators: 3-64-64 down, 64-64-11 up.
    found = {layer.name: layer for layer in layers((4, 6), 2, classes=11, value_bytes=2, fused=False, depth=1)}
    pixels = 2 * 24
    # Forward and the weights' gradient, 2 operations per product; no gradient of the images. The maps: read forward
    # and backward, written and their gradient read. Weights: three times as bf16, cast from and to fp32.
    assert found["encoder 1 conv 1"] == Layer(
        "encoder 1 conv 1", 2 * 2 * 27 * 64 * pixels, 2 * 2 * pixels * (3 + 64) + 27 * 64 * (3 * 2 + 2 * 6)
    )
    # With one, maps are passed over three times each: values, gradients twice; its gradient is written.
    assert found["encoder 1 conv 2"] == Layer(
        "encoder 1 conv 2", 3 * 2 * 576 * 64 * pixels, 2 * 3 * pixels * (64 + 64) + 576 * 64 * 18
    )
    assert found["encoder 1 conv 1 norm"] == Layer("encoder 1 conv 1 norm", 0, 13 * 2 * 64 * pixels)
    assert found["decoder 1 conv 2"].flops == 3 * 2 * 576 * 11 * pixels
    parameters = sum(p.numel() for p in SegNet(11, depth=1).parameters())
    assert found["optimiser"] == Layer("optimiser", 0, 5 * 4 * parameters)
    assert "decoder 1 conv 2 norm" not in found


@pytest.mark.parametrize("fused", [False, True])
@pytest.mark.parametrize(("backbone", "depth"), [("vgg16", 5), ("vgg19", 5), ("vgg16", 3)])
def test_parameters_are_the_networks(backbone, depth, fused):
    *_, last = layers((64, 96), 1, classes=11, value_bytes=4, fused=fused, backbone=backbone, depth=depth)
    with torch.device("meta"):
        assert last.nbytes == 20 * sum(p.numel() for p in SegNet(11, backbone, depth).parameters())


@pytest.mark.parametrize("size", [(360, 480), (120, 160), (45, 61)])
def test_operations_are_those_that_torch_counts(size):
    found = layers(size, 3, classes=11, value_bytes=2, fused=True)
    assert sum(layer.flops for layer in found) == 3 * count_flops(size)
    if size == (360, 480):
        assert sum(layer.flops for layer in found) / 3 / 1e9 == pytest.approx(639.7, rel=1e-4)


def test_fused_operators_move_fewer_bytes_and_compute_the_same():
    plain, fused = (layers((360, 480), 1, classes=11, value_bytes=2, fused=f) for f in (False, True))
    assert sum(x.flops for x in plain) == sum(x.flops for x in fused)
    # 2.8 and 1.3 GB between the convolutions: see bench/kernels.py.
    assert sum(x.nbytes for x in plain) - sum(x.nbytes for x in fused) == pytest.approx(1.5e9, rel=0.05)


def test_the_larger_of_two_times_binds():
    machine = Peaks({"bfloat16": 100.0, "float32": 10.0}, 20.0, "by hand")
    found = [Layer("conv", 300, 40), Layer("norm", 0, 40), Layer("small", 100, 30)]
    assert list(seconds(found, machine, "bfloat16")) == [(3.0, "compute"), (2.0, "memory"), (1.5, "memory")]
    assert list(seconds(found, machine, "float32"))[2] == (10.0, "compute")
