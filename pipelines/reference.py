"""The torchvision tier: the readable reference, and the fallback where DALI has no wheel.

Pillow decodes (it gives palette and 16-bit labels as they are), `resize` resizes, torchvision mirrors and moves. A few
threads work ahead by some batches; decoding leaves Python's lock.
"""

import itertools
from collections import deque
from collections.abc import Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from typing import TYPE_CHECKING

import numpy as np
import torch
from torchvision.transforms.v2 import functional as tvf

from fastseg.data.classes import VOID
from fastseg.data.decode import decode_image, decode_label
from fastseg.pipelines.plan import Plan
from fastseg.pipelines.resize import resize_image, resize_label
from fastseg.pipelines.source import DECODED_AHEAD, decoded_at_once, normalise
from fastseg.ranges import stage

if TYPE_CHECKING:
    from fastseg.pipelines.source import Spec


def mirror_and_move(pixels: torch.Tensor, mirror: bool, shift: np.ndarray, fill: int) -> torch.Tensor:
    """[C, H, W] mirrored left-right, then moved by (dy, dx) whole pixels; what is uncovered becomes `fill`."""
    if mirror:
        pixels = tvf.horizontal_flip(pixels)
    dy, dx = (int(v) for v in shift)
    height, width = pixels.shape[-2:]
    padded = tvf.pad(pixels, [max(dx, 0), max(dy, 0), max(-dx, 0), max(-dy, 0)], fill=fill)
    return tvf.crop(padded, max(-dy, 0), max(-dx, 0), height, width)


class TorchvisionTier:
    """See `fastseg.pipelines.source.Tier`."""

    def __init__(self, spec: "Spec") -> None:
        self.spec, self.decoded = spec, 0

    def _sample(self, index: int, resize_labels: bool) -> tuple[np.ndarray, np.ndarray]:
        pair = self.spec.pairs[index]
        image = resize_image(decode_image(pair.image), self.spec.size)
        label = decode_label(pair.label, self.spec.classes, self.spec.unknown)
        return image, resize_label(label, self.spec.size) if resize_labels else label

    def _augmented(
        self, index: int, mirror: bool, shift: np.ndarray, crop: np.ndarray
    ) -> tuple[torch.Tensor, torch.Tensor]:
        image, label = self._sample(index, resize_labels=True)
        image_CHW = mirror_and_move(torch.from_numpy(image).permute(2, 0, 1), mirror, shift, 0)
        label_1HW = mirror_and_move(torch.from_numpy(label)[None], mirror, shift, VOID)
        window = (*crop.tolist(), *(self.spec.crop or self.spec.size))
        return tvf.crop(image_CHW, *window).permute(1, 2, 0), tvf.crop(label_1HW, *window)[0]

    def train(self, plan: Plan, start: int, rank: int, world: int) -> Iterator[tuple[torch.Tensor, torch.Tensor]]:
        device, local = self.spec.device, len(plan.shard(start, rank, world).indices)
        most = DECODED_AHEAD * decoded_at_once(local) // local
        with ThreadPoolExecutor(self.spec.threads) as pool:
            ahead: deque[list[Future]] = deque()
            step = start
            while True:
                while len(ahead) <= most:
                    part = plan.shard(step, rank, world)
                    ahead.append([pool.submit(self._augmented, *s) for s in zip(*vars(part).values(), strict=True)])
                    step += 1
                images, labels = zip(*(future.result() for future in ahead.popleft()), strict=True)
                self.decoded += len(images)
                with stage("copy"):
                    copied = torch.stack(images).to(device), torch.stack(labels).to(device)
                yield normalise(copied[0], self.spec.dtype), copied[1]

    def decode(
        self, batches: Iterable[np.ndarray], most: int, *, resize_labels: bool
    ) -> Iterator[tuple[torch.Tensor, list[torch.Tensor]]]:
        device = self.spec.device
        with ThreadPoolExecutor(self.spec.threads) as pool:
            ahead: deque[list[Future]] = deque()
            for indices in itertools.chain(batches, [np.array([], int)] * DECODED_AHEAD):
                ahead.append([pool.submit(self._sample, int(i), resize_labels) for i in indices])
                if len(ahead) > DECODED_AHEAD:
                    images, labels = zip(*(future.result() for future in ahead.popleft()), strict=True)
                    self.decoded += len(images)
                    stacked = torch.from_numpy(np.stack(images)).to(device)
                    yield stacked, [torch.from_numpy(label).to(device) for label in labels]
