"""SegNet's training step with fastseg's operators and with PyTorch's: the same losses, and the same compiled."""

import copy
import math
import shutil

import pytest
import torch
import torch.nn.functional as F

from fastseg import model as models
from fastseg.kernels.cross_entropy import cross_entropy, torch_cross_entropy, torch_weight_sum, weight_sum
from fastseg.kernels.launch import INTERPRETED
from fastseg.kernels.pool import pool
from fastseg.model import SegNet

CLASSES = 5
# Odd at both poolings, and at the one that the slow interpreter is given.
DEPTH, SIZE = (1, (5, 6)) if INTERPRETED else (2, (45, 60))
STEPS = 20


def losses(device: torch.device, *, fused: bool, fused_loss: bool, lr: float = 2e-3) -> list[float]:
    """Of 20 steps of SGD with momentum on random images and labels, a sixth of them void."""
    torch.manual_seed(0)
    network = SegNet(CLASSES, depth=DEPTH, fused=fused).to(device).to(memory_format=torch.channels_last)
    optimizer = torch.optim.SGD(network.parameters(), lr=lr, momentum=0.9)
    generator = torch.Generator().manual_seed(1)
    weights = torch.linspace(0.5, 2.0, CLASSES).to(device)
    weigh, entropy = (weight_sum, cross_entropy) if fused_loss else (torch_weight_sum, torch_cross_entropy)
    found = []
    for _ in range(STEPS):
        images = torch.randn(2, 3, *SIZE, generator=generator).to(device, memory_format=torch.channels_last)
        labels = torch.randint(0, CLASSES + 1, (2, *SIZE), generator=generator, dtype=torch.uint8).to(device)
        loss = entropy(network(images), labels, weights, weigh(labels, weights))
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        found.append(loss.item())
    return found


def test_twenty_steps_with_one_byte_pooling_give_the_same_losses_bit_for_bit(device, monkeypatch):
    wanted = losses(device, fused=False, fused_loss=False)
    monkeypatch.setattr(models, "bn_relu", lambda x, norm: F.relu(norm(x)))
    monkeypatch.setattr(models, "bn_relu_pool", lambda x, norm: pool(F.relu(norm(x))))
    assert losses(device, fused=True, fused_loss=False) == wanted


def first_scores(device: torch.device) -> tuple[float, int]:
    """Of `losses`' first step: how long a pixel's scores are, as a root mean square, and how many norms made them."""
    torch.manual_seed(0)
    network = SegNet(CLASSES, depth=DEPTH).to(device)
    images = torch.randn(2, 3, *SIZE, generator=torch.Generator().manual_seed(1)).to(device)
    with torch.no_grad():
        scores = network(images)
    norms = sum(isinstance(module, torch.nn.BatchNorm2d) for module in network.modules())
    return scores.square().sum(1).mean().sqrt().item(), norms


def test_twenty_steps_with_all_operators_give_the_same_losses(device, monkeypatch):
    # TF32, a GPU's default, would make of a last bit of what a convolution gets a bit of 10 in what it gives.
    monkeypatch.setattr(torch.backends.cudnn, "allow_tf32", False)
    wanted = losses(device, fused=False, fused_loss=False)
    found = losses(device, fused=True, fused_loss=True)
    # Either way a batch norm's output is rounded three times, each by 2^-24 at most, which convolutions pass on: the
    # two ways' scores are sqrt(2 * 3 * norms) * 2^-24 of their length apart. The loss' gradient by a pixel's scores is
    # sqrt(2) long at most. The loss' own arithmetic adds some 8 roundings.
    length, norms = first_scores(device)
    bound = 2**-24 * (math.sqrt(2 * 2 * 3 * norms) * length + 8 * wanted[0])
    assert found[0] == pytest.approx(wanted[0], rel=0, abs=bound)
    # Sums in another order differ in the last bit, and each step enlarges that.
    assert found == pytest.approx(wanted, rel=1e-3)


def gradients(network: SegNet, run, device: torch.device) -> list[torch.Tensor]:
    """The scores and all gradients of one step."""
    images = torch.randn(2, 3, *SIZE, generator=torch.Generator().manual_seed(2)).to(device)
    labels = torch.full((2, *SIZE), 1, dtype=torch.uint8, device=device)
    scores = run(images.contiguous(memory_format=torch.channels_last))
    cross_entropy(scores, labels, torch.ones(CLASSES, device=device), torch.ones((), device=device)).backward()
    return [scores.detach(), *(p.grad for p in network.parameters()), *(b.clone() for b in network.buffers())]


@pytest.mark.parametrize("backend", ["aot_eager", pytest.param("inductor", marks=pytest.mark.slow)])
def test_a_compiled_network_computes_the_same(device, backend):
    if backend == "inductor" and not shutil.which("g++"):
        pytest.skip("inductor compiles with g++, which is not installed")
    torch.manual_seed(0)
    network = SegNet(CLASSES, depth=1, fused=True).to(device).to(memory_format=torch.channels_last)
    compiled = copy.deepcopy(network)
    wanted = gradients(network, network, device)
    found = gradients(compiled, torch.compile(compiled, backend=backend, fullgraph=True), device)
    for mine, theirs in zip(found, wanted, strict=True):
        torch.testing.assert_close(mine, theirs, rtol=1e-5, atol=1e-5)
    torch._dynamo.reset()
