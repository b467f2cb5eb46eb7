"""All weights cast at once: the same numbers as autocast gives one by one, forward and backward."""

import copy

import pytest
import torch

from fastseg.kernels.cast import cast
from fastseg.model import SegNet

CLASSES = 5


def test_copies_have_the_strides_of_what_they_are_copies_of_and_gradients_its_dtype(device):
    weights = [
        torch.randn(4, 3, 3, 3, device=device).to(memory_format=torch.channels_last).requires_grad_(),
        torch.randn(7, device=device, requires_grad=True),
    ]
    copies = cast(weights, torch.bfloat16)
    for mine, theirs in zip(copies, weights, strict=True):
        assert torch.equal(mine, theirs.bfloat16())
        assert mine.stride() == theirs.stride()
    (copies[0] * 3 + copies[1].sum()).sum().backward()
    assert [(weight.grad.dtype, weight.grad.unique().tolist()) for weight in weights] == [
        (torch.float32, [3.0]),
        (torch.float32, [108.0]),
    ]
    assert weights[0].grad.is_contiguous(memory_format=torch.channels_last)


@pytest.mark.parametrize("compiled", [False, True], ids=["", "compiled"])
def test_a_network_under_autocast_computes_what_modules_one_by_one_do(device, monkeypatch, compiled):
    torch.manual_seed(0)
    network = SegNet(CLASSES, depth=1, fused=True).to(device).to(memory_format=torch.channels_last)
    twin = copy.deepcopy(network)
    monkeypatch.setattr(twin, "_convolving", lambda device_type: lambda conv, x: conv(x), raising=False)
    images = torch.randn(2, 3, 6, 9, device=device).to(memory_format=torch.channels_last)
    results = []
    for module in (torch.compile(network, backend="aot_eager", fullgraph=True) if compiled else network, twin):
        with torch.autocast(device.type, torch.bfloat16, cache_enabled=False):
            scores = module(images)
        assert scores.dtype == torch.bfloat16
        scores.float().square().mean().backward()
        results.append(scores)
    assert torch.equal(*results)
    for mine, theirs in zip(network.parameters(), twin.parameters(), strict=True):
        assert mine.grad.dtype == torch.float32
        assert mine.grad.stride() == theirs.grad.stride()
        assert torch.equal(mine.grad, theirs.grad)
