"""What a training step must compute and move, layer by layer, and how fast a machine's peaks would let it.

The roofline model (Williams, Waterman, Patterson, "Roofline: an insightful visual performance model for multicore
architectures", CACM 2009): a layer takes at least its operations over the peak rate, and at least its bytes over the
memory's bandwidth; the larger one binds it. A step is the sum of its layers, since each waits for the one before.

Operations count a multiply-add as two. Bytes are those of maps that are read and written whole, once each: caches may
save some of them, so that a share of the bandwidth above 100 % is possible where maps are small.
"""

import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass

import torch
import torch.nn.functional as F

from fastseg.bench.kernels import (
    bn_relu_bytes,
    bn_relu_pool_bytes,
    cross_entropy_bytes,
    pool_bytes,
    unpool_bytes,
)
from fastseg.kernels.launch import halved
from fastseg.model import BACKBONES, CHANNELS

COPIED = 2**25  # fp32 values, more than caches hold


@dataclass(frozen=True)
class Layer:
    """Forward and backward of one layer for one batch.

    Attributes:
        flops: operations of convolutions; what lies between them is bound by memory on any machine.
        nbytes: to and from memory.
    """

    name: str
    flops: int
    nbytes: int


@dataclass(frozen=True)
class Peaks:
    """What a machine can do at most.

    Attributes:
        flops: operations per second by precision ("bfloat16", "float16", "tf32", "float32"), dense.
        bandwidth: bytes per second to and from memory.
        source: where the figures are from.
    """

    flops: dict[str, float]
    bandwidth: float
    source: str


def _card(mixed: float, fp32: float, bandwidth: float, source: str, *, has_bf16: bool = True) -> Peaks:
    """Peaks of a GPU in TFLOP/s and GB/s."""
    flops = {"float16": mixed * 1e12, "float32": fp32 * 1e12}
    if has_bf16:
        # From Ampere on; TF32 runs at half the rate.
        flops |= {"bfloat16": mixed * 1e12, "tf32": mixed * 1e12 / 2}
    return Peaks(flops, bandwidth * 1e9, source)


# The name by which CUDA knows a card -> NVIDIA's published figures: Tensor Cores without sparsity, fp32 accumulation;
# fp32 is IEEE's, without Tensor Cores. Another card has no peaks here: no share is shown rather than a wrong one.
_V100 = _card(125, 15.7, 900, "NVIDIA V100 data sheet, January 2020", has_bf16=False)
GPUS: dict[str, Peaks] = {
    "Tesla V100-SXM2-16GB": _V100,
    "Tesla V100-SXM2-32GB": _V100,
    "NVIDIA A100-SXM4-80GB": _card(312, 19.5, 2039, "NVIDIA A100 data sheet, June 2021"),
    "NVIDIA A100-SXM4-40GB": _card(312, 19.5, 1555, "NVIDIA A100 data sheet, June 2021"),
    "NVIDIA H100 80GB HBM3": _card(989.4, 66.9, 3350, "NVIDIA H100 Tensor Core GPU data sheet (SXM)"),
    "NVIDIA H200": _card(989.4, 66.9, 4800, "NVIDIA H200 Tensor Core GPU data sheet (SXM)"),
    "NVIDIA B200": _card(2250, 80, 8000, "NVIDIA DGX B200 data sheet, per GPU"),
    "NVIDIA L4": _card(121, 30.3, 300, "NVIDIA L4 data sheet"),
    "NVIDIA GeForce RTX 4090": _card(165.2, 82.6, 1008, "NVIDIA Ada GPU architecture whitepaper, appendix A"),
}


def layers(
    size: tuple[int, int],
    batch: int,
    *,
    classes: int,
    value_bytes: int,
    fused: bool,
    backbone: str = "vgg16",
    depth: int = 5,
) -> list[Layer]:
    """The layers of a training step of SegNet in the order of its forward pass, the loss, and the optimiser.

    Args:
        value_bytes: of a value of the maps: 2 under mixed precision, else 4.
        fused: with fastseg's operators between the convolutions, else PyTorch's.
    """
    s, kind = value_bytes, 0 if fused else 1
    mixed = s < 4
    parameters = 0

    def conv(name: str, before: int, after: int, pixels: int, *, first: bool = False) -> Layer:
        nonlocal parameters
        weights, products = 9 * before * after, 9 * before * after * pixels * batch
        parameters += weights
        # Forward, gradient of the weights, and of the input but for the images.
        flops = 2 * products * (2 if first else 3)
        maps = batch * pixels * (before * (2 if first else 3) + after * (2 if first else 3))
        # Read forward and for the input's gradient, and a gradient written; under autocast cast from and to fp32 too.
        return Layer(name, flops, s * maps + weights * (3 * s + (2 * (4 + s) if mixed else 0)))

    def norm(name: str, channels: int, pixels: int) -> Layer:
        nonlocal parameters
        parameters += 2 * channels
        return Layer(name, 0, bn_relu_bytes(batch * channels * pixels, 0, s)[kind])

    found: list[Layer] = []
    height, width = size
    stages = []
    channels = 3
    for number, (convs, after) in enumerate(zip(BACKBONES[backbone][:depth], CHANNELS[:depth], strict=True), 1):
        pixels, pooled = height * width, halved(height) * halved(width)
        stages.append((number, convs, after, pixels, pooled))
        for place in range(1, convs + 1):
            name = f"encoder {number} conv {place}"
            found.append(conv(name, channels, after, pixels, first=number == place == 1))
            channels = after
            if place < convs or not fused:
                found.append(norm(f"{name} norm", after, pixels))
        full, small = batch * after * pixels, batch * after * pooled
        if fused:
            parameters += 2 * after
            found.append(Layer(f"encoder {number} norm, pool", 0, bn_relu_pool_bytes(full, small, s)[0]))
        else:
            found.append(Layer(f"encoder {number} pool", 0, pool_bytes(full, small, s)[1]))
        height, width = halved(height), halved(width)
    for number, convs, before, pixels, pooled in reversed(stages):
        found.append(
            Layer(
                f"decoder {number} unpool", 0, unpool_bytes(batch * before * pixels, batch * before * pooled, s)[kind]
            )
        )
        for place in range(1, convs + 1):
            last = place == convs
            after = (CHANNELS[number - 2] if number > 1 else classes) if last else before
            name = f"decoder {number} conv {place}"
            found.append(conv(name, before, after, pixels))
            if last and number == 1:
                parameters += classes
            else:
                found.append(norm(f"{name} norm", after, pixels))
    pixels = batch * size[0] * size[1]
    found.append(Layer("loss", 0, cross_entropy_bytes(classes * pixels, pixels, s)[kind]))
    # SGD with momentum reads weight, gradient and momentum, and writes weight and momentum, in fp32.
    found.append(Layer("optimiser", 0, 5 * 4 * parameters))
    return found


def seconds(found: list[Layer], peaks: Peaks, dtype: str) -> Iterator[tuple[float, str]]:
    """For each layer the least time it takes, and what binds it: "compute" or "memory"."""
    for layer in found:
        compute, memory = layer.flops / peaks.flops[dtype], layer.nbytes / peaks.bandwidth
        yield max(compute, memory), "compute" if compute > memory else "memory"


# Convolutions of the network's middle as (batch, channels, height, width), of which one or another is a CPU's fastest.
MIDDLE = ((2, 128, 90, 120), (4, 256, 45, 60), (8, 512, 22, 30))


def _convolution(dtype: torch.dtype, shape: tuple[int, int, int, int]) -> Callable[[], float]:
    """Operations per second of one convolution, forward and backward."""
    batch, channels, height, width = shape

    def made(*sizes: int) -> torch.Tensor:
        return torch.randn(*sizes, dtype=dtype).to(memory_format=torch.channels_last).requires_grad_()

    images, weights = made(*shape), made(channels, channels, 3, 3)
    upstream = torch.ones_like(images)

    def measure() -> float:
        start = time.perf_counter()
        F.conv2d(images, weights, padding=1).backward(upstream)
        return 3 * 2 * 9 * batch * channels**2 * height * width / (time.perf_counter() - start)

    return measure


def measured_peaks(dtypes: list[torch.dtype], trials: int) -> Peaks:
    """This CPU's peaks by so many trials of each: the best that a convolution reached, and a copy.

    What oneDNN gets out of the cores at best stands for what they can do: no data sheet says it, since clocks depend on
    instructions and neighbours.
    """
    rates = {}
    for dtype in dtypes:
        reached = [measure() for shape in MIDDLE for measure in [_convolution(dtype, shape)] * trials]
        rates[str(dtype).removeprefix("torch.")] = max(reached)
    source, copy = torch.ones(COPIED), torch.ones(COPIED)

    def copied() -> float:
        start = time.perf_counter()
        copy.copy_(source)
        return 2 * source.nbytes / (time.perf_counter() - start)

    return Peaks(rates, max(copied() for _ in range(trials)), "measured")
