"""`fastseg bench kernels` on a GPU: each kernel of a step on each of its maps, timed, beside a copy of as many bytes.

Times are the device's own, of a profile: launches and gaps between kernels are no part of them.
"""

import collections
import time
from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import nn

from fastseg.bench.harness import Result, exact
from fastseg.bench.plan import moved, places
from fastseg.config import Size
from fastseg.kernels import aot
from fastseg.kernels.bn_relu import bn_relu, bn_relu_pool
from fastseg.kernels.launch import halved
from fastseg.kernels.pool import unpool

POOLED = {"unpool", "take", "bn_relu apply, pool", "bn_relu backward sums, pool", "bn_relu backward, pool"}
CALLS = 20
COPIED = 2**28  # bytes, more than caches hold


def device_seconds(events: Iterable[Any]) -> dict[str, float]:
    """Mean seconds of each kernel, by the name of its function.

    Args:
        events: of `torch.profiler.profile.events`, times in microseconds.
    """
    found = collections.defaultdict(list)
    for event in events:
        if event.device_type == torch.autograd.DeviceType.CUDA:
            found[event.name].append(event.time_range.elapsed_us() * 1e-6)
    return {name: sum(times) / len(times) for name, times in found.items()}


def profiled(call: Callable[[], object]) -> dict[str, float]:
    """`device_seconds` of CALLS calls, after as many that are not looked at."""
    for _ in range(CALLS):
        call()
    torch.cuda.synchronize()
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CUDA]) as profile:
        for _ in range(CALLS):
            call()
        torch.cuda.synchronize()
    return device_seconds(profile.events())


def copy_bandwidth(device: torch.device) -> float:
    """Bytes per second of a copy, read and written."""
    source = torch.ones(COPIED, dtype=torch.uint8, device=device)
    copy = torch.empty_like(source)
    copy.copy_(source)
    torch.cuda.synchronize()
    start = time.perf_counter()
    for _ in range(CALLS):
        copy.copy_(source)
    torch.cuda.synchronize()
    return CALLS * 2 * COPIED / (time.perf_counter() - start)


def operators(x: torch.Tensor, *, pooled: bool) -> Callable[[], object]:
    """Forward and backward of batch norm + ReLU on a map; where it is pooled, of the variant with pooling, and of
    unpooling too."""
    norm, upstream = nn.BatchNorm2d(x.shape[1]).to(x.device), torch.ones_like(x)

    def inner() -> None:
        x.grad = None
        bn_relu(x, norm).backward(upstream)

    def windows() -> None:
        x.grad = None
        values, codes = bn_relu_pool(x, norm)
        unpool(values, codes, *x.shape[-2:]).backward(upstream)

    return windows if pooled else inner


def measure(device: torch.device, dtype: torch.dtype, size: Size, batch: int) -> list[Result]:
    """Microseconds of each kernel on each map, and its share of the bandwidth of a copy."""
    bandwidth = copy_bandwidth(device)
    found = [exact("copy", "GB/s", bandwidth / 1e9)]
    taken: dict[str, float] = collections.defaultdict(float)
    floor: dict[str, float] = collections.defaultdict(float)
    for (height, width, channels), calls in places(size).items():
        x = torch.randn(batch, channels, height, width, device=device).to(dtype, memory_format=torch.channels_last)
        x.requires_grad_()
        cases = aot.level(batch, height, width, channels, dtype.itemsize)
        nbytes = moved(x.numel(), batch * channels * halved(height) * halved(width), dtype.itemsize)
        for pooled in (False, True):
            names = [name for name in calls if name in cases and (name in POOLED) == pooled]
            if not names:
                continue
            seconds = profiled(operators(x, pooled=pooled))
            for name in names:
                took, must = seconds[cases[name].kernel.__name__], sum(nbytes[name]) / bandwidth
                where = f"{name} {height}x{width}, {channels}"
                found.append(exact(where, "us", took * 1e6))
                found.append(exact(f"{where}, of a copy's bandwidth", "%", 100 * must / took))
                taken[name] += calls[name] * took
                floor[name] += calls[name] * must
    for name, took in taken.items():
        found.append(exact(f"{name}, whole network", "us", took * 1e6))
        found.append(exact(f"{name}, whole network, of a copy's bandwidth", "%", 100 * floor[name] / took))
    return found
