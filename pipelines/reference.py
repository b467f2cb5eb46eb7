"""The reference tier: readable code that the others are compared with, and the fallback where DALI has no wheel.

Pillow decodes (it gives palette and 16-bit labels as they are), `resize` resizes, torch mirrors and moves. A few
threads work ahead by some batches; decoding leaves Python's lock.
"""

import itertools
from collections import deque
from collections.abc import Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from typing import TYPE_CHECKING, ClassVar

import numpy as np
import torch
import torch.nn.functional as F

from fastseg.data.classes import VOID
from fastseg.data.decode import decode_image, decode_label
from fastseg.pipelines.plan import Plan
from fastseg.pipelines.resize import resize_image, resize_label
from fastseg.pipelines.source import DECODED_AHEAD, decoded_at_once, normalise
from fastseg.ranges import annotate

if TYPE_CHECKING:
    from fastseg.pipelines.source import Spec


def mirror_and_move(pixels: torch.Tensor, mirror: bool, shift: np.ndarray, fill: int) -> torch.Tensor:
    """[C, H, W] mirrored left-right, then moved by (dy, dx) whole pixels; what is uncovered becomes `fill`."""
    if mirror:
        pixels = pixels.flip(-1)
    dy, dx = (int(v) for v in shift)
    height, width = pixels.shape[-2:]
    padded = F.pad(pixels, (max(dx, 0), max(-dx, 0), max(dy, 0), max(-dy, 0)), value=fill)
    return window(padded, max(-dy, 0), max(-dx, 0), height, width)


def window(pixels: torch.Tensor, top: int, left: int, height: int, width: int) -> torch.Tensor:
    """Rows from `top` on and columns from `left` on of [C, H, W]."""
    return pixels[:, top : top + height, left : left + width]


class ReferenceTier:
    """See `fastseg.pipelines.source.Tier`."""

    keeps: ClassVar[bool] = False
    checks_labels: ClassVar[bool] = False

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
        cut = (*crop.tolist(), *(self.spec.crop or self.spec.size))
        return window(image_CHW, *cut).permute(1, 2, 0), window(label_1HW, *cut)[0]

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
                with annotate("copy"):
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
