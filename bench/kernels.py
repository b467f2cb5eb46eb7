"""`fastseg bench kernels`: each fused operator against PyTorch's, in bytes by arithmetic and in time as measured.

Bytes: what an operator must move to and from memory for one image, in all places of the network, in the fused form and
in eager channels-last PyTorch on CUDA; reads and writes of whole maps only (per-channel vectors are nothing beside
them), each scattered access counted as its own bytes, so that PyTorch's figures are lower bounds.

Time: one call, forward and backward, on the network's largest map; "step" is the whole network's and the loss's.
"""

import importlib.util
import sys
import time
from collections.abc import Callable, Mapping
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import nn

from fastseg.bench.drill import CLASSES, random_batch, step_on
from fastseg.bench.harness import Found, exact, ratio, result, take_turns
from fastseg.config import Size
from fastseg.distributed import choose_device, choose_dtype
from fastseg.environment import install
from fastseg.kernels.augment import augment, torch_augment
from fastseg.kernels.bn_relu import bn_relu, bn_relu_pool
from fastseg.kernels.confusion import confusion, torch_confusion
from fastseg.kernels.cross_entropy import cross_entropy, torch_cross_entropy
from fastseg.kernels.launch import halved
from fastseg.kernels.pool import pool, torch_pool, torch_unpool, unpool
from fastseg.model import BACKBONES, CHANNELS, IMAGE_CHANNELS
from fastseg.pipelines.source import MEAN, STD

PUBLISHED = Size(360, 480)
Bytes = tuple[int, int]


def pool_bytes(full: int, pooled: int, s: int) -> Bytes:
    """(fused, PyTorch) for `full` elements of `s` bytes and `pooled` ones: forward and backward."""
    # Forward reads the map and writes values and codes; backward is an unpooling.
    fused = s * full + (s + 1) * pooled + (s + 1) * pooled + s * full
    # int64 positions; backward clears the map before it writes it.
    return fused, s * full + (s + 8) * pooled + (s + 8) * pooled + 2 * s * full


def unpool_bytes(full: int, pooled: int, s: int) -> Bytes:
    """As `pool_bytes`, for unpooling: backward reads the map's gradient and the codes and writes the pooled one."""
    fused = (s + 1) * pooled + s * full + s * full + (s + 1) * pooled
    # Forward: values and positions copied to NCHW, the map cleared, values scattered, the map copied to channels-last.
    forward = 2 * (s + 8) * pooled + s * full + (2 * s + 8) * pooled + 2 * s * full
    # Backward: the map's gradient copied to NCHW, gathered by positions, and the result copied to channels-last.
    return fused, forward + 2 * s * full + s * full + (s + 8) * pooled + 2 * s * pooled


def bn_relu_bytes(full: int, pooled: int, s: int) -> Bytes:
    """Statistics, normalisation, ReLU: 3 + 5 passes against 5 + 8."""
    return 8 * s * full, 13 * s * full


def bn_relu_pool_bytes(full: int, pooled: int, s: int) -> Bytes:
    """The same and pooling: statistics and values forward, sums and gradient backward, each with the pooled maps."""
    fused = s * full + s * full + (s + 1) * pooled + s * full + (s + 1) * pooled + 2 * s * full + (s + 1) * pooled
    return fused, bn_relu_bytes(full, pooled, s)[1] + pool_bytes(full, pooled, s)[1]


def cross_entropy_bytes(scores: int, pixels: int, s: int) -> Bytes:
    """Forward reads scores and labels, backward too and writes the gradient."""
    fused = s * scores + pixels + 2 * s * scores + pixels
    # Scores to fp32; log-softmax; its gradient cleared and filled; log-softmax backward; the gradient to `s` bytes.
    logits = (s + 4) + 8 + 4 + 12 + (4 + s)
    # Labels to int64, compared, masked, and read forward and backward.
    return fused, logits * scores + (9 + 9 + 17 + 16) * pixels


def confusion_bytes(scores: int, pixels: int, s: int) -> Bytes:
    """Forward only. PyTorch: argmax, then labels compared, to int64, times C, plus argmax, masked, counted."""
    return s * scores + pixels, s * scores + 8 * pixels + (2 + 9 + 16 + 24 + 17 + 8) * pixels


def augment_bytes(values: int, pixels: int, s: int) -> Bytes:
    """Image and label. PyTorch: zeros, windows in fp32, minus, divided, to `s` bytes; half are mirrored first."""
    return (1 + s) * values + 2 * pixels, (4 + 5 + 8 + 8 + 4 + s) * values + 3 * pixels + (values + pixels)


def network_maps(size: tuple[int, int]) -> tuple[list[int], list[tuple[int, int]]]:
    """Elements of each map behind batch norm + ReLU but for the pooled ones, and (full, pooled) of the pooled ones."""
    inner, pooled = [], []
    height, width = size
    for stage, (convs, channels) in enumerate(zip(BACKBONES["vgg16"], CHANNELS, strict=True)):
        pixels = height * width
        height, width = halved(height), halved(width)
        pooled.append((channels * pixels, channels * height * width))
        # The decoder's stage has as many convolutions; its last one narrows, or gives the scores.
        inner += [channels * pixels] * (convs - 1) + [channels * pixels] * (convs - 1)
        inner += [CHANNELS[stage - 1] * pixels] if stage else []
    return inner, pooled


def bytes_per_image(size: tuple[int, int], s: int = 2) -> dict[str, Bytes]:
    """Bytes of each operator in all its places of one training step: (fused, PyTorch)."""
    inner, stages = network_maps(size)
    pixels = size[0] * size[1]
    full, pooled = (sum(column) for column in zip(*stages, strict=True))
    found = {
        "pool": pool_bytes(full, pooled, s),
        "unpool": unpool_bytes(full, pooled, s),
        "bn_relu": bn_relu_bytes(sum(inner), 0, s),
        "bn_relu_pool": bn_relu_pool_bytes(full, pooled, s),
        "cross_entropy": cross_entropy_bytes(CLASSES * pixels, pixels, s),
        "confusion": confusion_bytes(CLASSES * pixels, pixels, s),
        "augment": augment_bytes(3 * pixels, pixels, s),
    }
    # Those between the convolutions of a training step; pooling on its own is part of bn_relu_pool there.
    step = [found[name] for name in ("unpool", "bn_relu", "bn_relu_pool", "cross_entropy")]
    return {**found, "step": (sum(fused for fused, _ in step), sum(plain for _, plain in step))}


class Operator(NamedTuple):
    """Both ways to run one operator on one input, the bytes that it must move (None: not bound by them), and what else
    computes the same."""

    fused: Callable[[], object]
    plain: Callable[[], object]
    minimum: int | None
    others: Mapping[str, Callable[[], object]] = {}


def cases(
    device: torch.device, dtype: torch.dtype, size: tuple[int, int], batch: int, channels: int = CHANNELS[0]
) -> dict[str, Operator]:
    """Forward and backward of each operator on the network's largest map, in memory."""
    generator = torch.Generator().manual_seed(0)

    def noise(*shape: int) -> torch.Tensor:
        return torch.randn(shape, generator=generator).to(device, dtype, memory_format=torch.channels_last)

    (height, width), s = size, dtype.itemsize
    small = halved(height), halved(width)
    x, top = noise(batch, channels, height, width).requires_grad_(), noise(batch, channels, *small).requires_grad_()
    down, up = noise(batch, channels, *small), noise(batch, channels, height, width)
    codes, positions = pool(x.detach())[1], torch_pool(x.detach())[1]
    norm = nn.BatchNorm2d(channels).to(device)
    scores = noise(batch, CLASSES, height, width).requires_grad_()
    labels = torch.randint(0, CLASSES, (batch, height, width), generator=generator, dtype=torch.uint8).to(device)
    weights, counts = (
        torch.ones(CLASSES, device=device),
        torch.zeros(CLASSES, CLASSES, dtype=torch.int64, device=device),
    )
    total = torch.tensor(float(labels.numel()), device=device)
    images = torch.randint(0, 256, (batch, height, width, 3), generator=generator, dtype=torch.uint8).to(device)
    at = height * width  # bytes of a label, and a third of an image's
    own = [height, width, width, height, width]  # whole images, not resized
    samples = [[3 * at * i, at * i, *own, i % 2, i % 21 - 10, 10 - i % 21] for i in range(batch)]
    places = torch.tensor(samples, device=device)
    mean, std = torch.tensor(MEAN, device=device), torch.tensor(STD, device=device)

    def both(forward: Callable, operand: torch.Tensor, gradient: torch.Tensor | None) -> Callable[[], object]:
        def call() -> torch.Tensor | None:
            operand.grad = norm.weight.grad = norm.bias.grad = None
            forward(operand).backward(gradient)
            return operand.grad

        return call

    full, pooled, pixels = x.numel(), top.numel(), labels.numel()
    count = (counts, scores.detach(), labels)
    aug = (images, labels, places, mean, std, dtype, *size, False)
    return {
        "pool": Operator(
            both(lambda t: pool(t)[0], x, down),
            both(lambda t: torch_pool(t)[0], x, down),
            pool_bytes(full, pooled, s)[0],
        ),
        "unpool": Operator(
            both(lambda t: unpool(t, codes, height, width), top, up),
            both(lambda t: torch_unpool(t, positions, size), top, up),
            unpool_bytes(full, pooled, s)[0],
        ),
        "bn_relu": Operator(
            both(lambda t: bn_relu(t, norm), x, up),
            both(lambda t: F.relu(norm(t), inplace=True), x, up),
            bn_relu_bytes(full, pooled, s)[0],
            cudnn_peer(x, up, norm),
        ),
        "bn_relu_pool": Operator(
            both(lambda t: bn_relu_pool(t, norm)[0], x, down),
            both(lambda t: torch_pool(F.relu(norm(t), inplace=True))[0], x, down),
            bn_relu_pool_bytes(full, pooled, s)[0],
        ),
        "cross_entropy": Operator(
            both(lambda t: cross_entropy(t, labels, weights, total), scores, None),
            both(lambda t: torch_cross_entropy(t, labels, weights, total), scores, None),
            cross_entropy_bytes(scores.numel(), pixels, s)[0],
        ),
        "confusion": Operator(
            lambda: confusion(*count),
            lambda: torch_confusion(*count),
            confusion_bytes(scores.numel(), pixels, s)[0],
        ),
        "augment": Operator(
            lambda: augment(*aug),
            lambda: torch_augment(*aug),
            augment_bytes(3 * pixels, pixels, s)[0],
        ),
    }


def cudnn_peer(x: torch.Tensor, gradient: torch.Tensor, norm: nn.BatchNorm2d) -> dict[str, Callable[[], object]]:
    """cuDNN's own batch norm + ReLU, where there is a GPU, maps are of 16 bits, and its package is installed."""
    if not x.is_cuda or x.dtype == torch.float32:
        return {}
    if importlib.util.find_spec("cudnn") is None:
        print(f"bench kernels: without cuDNN's batch norm, which is not installed: {install('cudnn')}", file=sys.stderr)
        return {}
    from fastseg.bench.peers.cudnn_norm import norm_relu

    return {"cuDNN": norm_relu(x.detach(), gradient, norm)}


# The network's outer convolutions, whose channels no 16-byte access divides, and as they would be with zeros beside.
PADDED = {"first convolution": ((IMAGE_CHANNELS, 64), (8, 64)), "last convolution": ((64, CLASSES), (64, 16))}


def convolutions(
    device: torch.device, dtype: torch.dtype, size: tuple[int, int], batch: int
) -> dict[str, dict[str, Callable[[], object]]]:
    """Forward and backward of each of PADDED, with its own channels and with padded ones."""

    def made(channels_in: int, channels_out: int, *, first: bool) -> Callable[[], object]:
        x = torch.randn(batch, channels_in, *size, device=device, dtype=dtype)
        x = x.contiguous(memory_format=torch.channels_last).requires_grad_(not first)
        conv = nn.Conv2d(channels_in, channels_out, 3, padding=1, bias=False, device=device, dtype=dtype)
        conv.to(memory_format=torch.channels_last)
        upstream = torch.ones_like(conv(x))

        def call() -> None:
            x.grad = conv.weight.grad = None
            conv(x).backward(upstream)

        return call

    return {
        name: {
            way: made(*channels, first=name.startswith("first"))
            for way, channels in zip(("as it is", "padded"), both, strict=True)
        }
        for name, both in PADDED.items()
    }


def whole_step(device: torch.device, dtype: torch.dtype, size: Size, batch: int) -> Operator:
    """Forward, loss and backward of the whole network on random images, with either kind of operators."""
    images, labels = random_batch(device, dtype, size, batch)

    def passes(fused: bool) -> Callable[[], object]:
        step = step_on(device, dtype, batch, fused=fused)

        def call() -> None:
            step.backward(images, labels)
            step.model.zero_grad()

        return call

    return Operator(passes(True), passes(False), None)


def _milliseconds(call: Callable[[], object], device: torch.device) -> Callable[[], float]:
    on_gpu = device.type == "cuda"
    calls = 20 if on_gpu else 1

    def measure() -> float:
        if on_gpu:
            torch.cuda.synchronize()
        start = time.perf_counter()
        for _ in range(calls):
            call()
        if on_gpu:
            torch.cuda.synchronize()
        return (time.perf_counter() - start) / calls * 1e3

    return measure


def peak_bandwidth(device: torch.device) -> float:
    """A GPU's memory bandwidth in GB/s as its clock and bus width have it, two transfers per clock."""
    properties = torch.cuda.get_device_properties(device)
    return 2 * properties.memory_clock_rate * 1e3 * properties.memory_bus_width / 8 / 1e9


def peak_mib(call: Callable[[], object], device: torch.device) -> float:
    """The most GPU memory that a call takes, beside what is kept between calls."""
    kept = torch.cuda.memory_allocated(device)
    torch.cuda.reset_peak_memory_stats(device)
    call()
    return (torch.cuda.max_memory_allocated(device) - kept) / 2**20


def measure(*, data: str, size: Size, batch: int, rounds: int, device: str, quick: bool) -> Found:
    """Bytes per image of each operator at 360x480, and how much faster than PyTorch's it is on this machine."""
    where = torch.device(choose_device(device)[0])
    dtype = choose_dtype("auto", where.type).dtype
    on_gpu = where.type == "cuda"
    results, ratios = [], []
    for operator, (fused, plain) in bytes_per_image(PUBLISHED).items():
        results.append(exact(f"{operator}, fused, must move", "MB/img", fused / 1e6))
        results.append(exact(f"{operator}, torch, moves", "MB/img", plain / 1e6))
    measured = {**cases(where, dtype, size, batch), "step": whole_step(where, dtype, size, batch)}
    for operator, case in measured.items():
        ways = {"fused": case.fused, "torch": case.plain, **case.others}
        if on_gpu:
            ways["compiled torch"] = torch.compile(case.plain)
        samples = take_turns({way: _milliseconds(call, where) for way, call in ways.items()}, rounds)
        results += [result(f"{operator}, {way}", "ms", figures) for way, figures in samples.items()]
        if on_gpu:
            results += [exact(f"{operator}, {way}, peak", "MiB", peak_mib(call, where)) for way, call in ways.items()]
        if on_gpu and case.minimum:
            peak = peak_bandwidth(where)
            share = [100 * case.minimum / 1e6 / figure / peak for figure in samples["fused"]]
            results.append(result(f"{operator}, fused, of {peak:.0f} GB/s", "%", share))
        ratios += [
            ratio(f"{operator}, speed of fused over {way}", samples[way], samples["fused"])
            for way in ways
            if way != "fused"
        ]
    for name, made in convolutions(where, dtype, size, batch).items():
        samples = take_turns({way: _milliseconds(call, where) for way, call in made.items()}, rounds)
        results += [result(f"{name}, {way}", "ms", figures) for way, figures in samples.items()]
        ratios.append(ratio(f"{name}, speed of padded over as it is", samples["as it is"], samples["padded"]))
    if on_gpu:
        from fastseg.bench import levels  # compiles kernels' plans with Triton, which a CPU may lack

        results += levels.measure(where, dtype, size, batch)
    return Found(results, ratios)
