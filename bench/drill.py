"""Training's own step on random images, for benches that time it or parts of it."""

import dataclasses
import time
from collections.abc import Sequence

import torch

from fastseg.config import Config, Model, Size, Train
from fastseg.distributed import World
from fastseg.kernels import launch
from fastseg.memory import momenta, peak_bytes
from fastseg.model import CHANNELS, SegNet
from fastseg.network import Network, build, rehearse
from fastseg.training.setup import capture_passes, choose_capture, make_step
from fastseg.training.step import Step

CLASSES = 11
RATE = 1e-3  # learning rate of steps on noise


def calls_of(device: torch.device) -> int:
    """Steps per measurement: one on a CPU, 20 on a GPU, where one is too short to time."""
    return 20 if device.type == "cuda" else 1


class Drill:
    """Training's own step, with the operators that `auto` chooses, on one random batch unless others are given.

    Args:
        capture: passes are captured where `auto` captures them.
        network: as `model.network`.

    Raises:
        UsageError: the network cannot be trained.
    """

    def __init__(
        self,
        device: torch.device,
        dtype: torch.dtype,
        size: Size,
        batch: int,
        *,
        capture: bool = True,
        network: str = Model.network,
    ) -> None:
        torch.manual_seed(0)
        model = build(Model(network=network), CLASSES, size, fused=launch.choose("auto", device)[0] == "fused")
        model = model.to(device).to(memory_format=torch.channels_last)
        rehearse(model, [size], batch, device, dtype)
        self.step = step_of(model, device, dtype, batch)
        if capture and choose_capture(Config(), device).value == "on":
            capture_passes(self.step, must=False)
        self.images, self.labels = random_batch(device, dtype, size, batch)

    def __call__(self, images: torch.Tensor, labels: torch.Tensor) -> None:
        self.step.step(images, labels, RATE)

    def images_per_second(self) -> float:
        """Over `calls_of` steps."""
        steps = calls_of(self.images.device)
        self.wait()
        start = time.perf_counter()
        for _ in range(steps):
            self(self.images, self.labels)
        self.wait()
        return steps * len(self.images) / (time.perf_counter() - start)

    def peak_memory(self) -> int:
        """The most bytes that tensors take in a step; a graph's memory is its own, and as much."""
        model, momentum = self.step.model, momenta(self.step.optimizer)
        held = [*model.parameters(), *model.buffers(), *momentum, self.images, self.labels]
        step = dataclasses.replace(self.step, passes=None)
        return peak_bytes(lambda: step.step(self.images, self.labels, RATE), held, self.images.device)

    def wait(self) -> None:
        """Until the device has done what it was told."""
        if self.images.device.type == "cuda":
            torch.cuda.synchronize()


def step_on(
    device: torch.device, dtype: torch.dtype, batch: int, *, fused: bool, channels: Sequence[int] = CHANNELS
) -> Step:
    """A step of SegNet in one process, with equal weights of classes."""
    model = SegNet(CLASSES, fused=fused, channels=channels).to(device).to(memory_format=torch.channels_last)
    return step_of(model, device, dtype, batch)


def step_of(model: Network, device: torch.device, dtype: torch.dtype, batch: int) -> Step:
    """A step of a network that is on the device, in one process, with equal weights of classes."""
    return make_step(model, Train(), World(0, 1, device), dtype, torch.ones(CLASSES, device=device), batch)[0]


def random_batch(device: torch.device, dtype: torch.dtype, size: Size, batch: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Images [B, 3, H, W], channels-last, and labels uint8[B, H, W]."""
    images = torch.randn(batch, 3, *size, device=device, dtype=dtype).contiguous(memory_format=torch.channels_last)
    return images, torch.randint(0, CLASSES, (batch, *size), device=device, dtype=torch.uint8)
