"""The reference tier: readable code that the others are compared with, and the fallback where DALI has no wheel.

Pillow decodes (it gives palette and 16-bit labels as they are), `resize` resizes, NumPy cuts, mirrors and moves. A few
threads work ahead by some batches; decoding leaves Python's lock.
"""

import itertools
from collections import deque
from collections.abc import Iterable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from typing import TYPE_CHECKING, ClassVar

import numpy as np
import torch

from fastseg.data.classes import VOID
from fastseg.data.decode import decode_image, decode_label
from fastseg.kernels.augment import recoloured
from fastseg.pipelines.fit import View, fitted, kept_views
from fastseg.pipelines.plan import Plan
from fastseg.pipelines.resize import resize_image, resize_label
from fastseg.pipelines.source import DECODED_AHEAD, MEAN_AND_STD, colours_of, decoded_at_once
from fastseg.ranges import annotate

if TYPE_CHECKING:
    from fastseg.pipelines.source import Spec


def mirror_and_move(
    pixels_HWC: np.ndarray, mirror: bool, shift: Sequence[int], fill: int, size: tuple[int, int] | None = None
) -> np.ndarray:
    """Mirrored left-right, then moved by (dy, dx) whole pixels; what is uncovered becomes `fill`.

    Args:
        size: (height, width) of what is given back, that of the pixels unless given.
    """
    if mirror:
        pixels_HWC = pixels_HWC[:, ::-1]
    dy, dx = (int(v) for v in shift)
    (H, W), (height, width) = pixels_HWC.shape[:2], size or pixels_HWC.shape[:2]
    around = ((max(dy, 0), max(height - H - dy, 0)), (max(dx, 0), max(width - W - dx, 0)), (0, 0))
    padded = np.pad(pixels_HWC, around, constant_values=fill)
    return padded[max(-dy, 0) :, max(-dx, 0) :][:height, :width]


class ReferenceTier:
    """See `fastseg.pipelines.source.Tier`."""

    keeps: ClassVar[bool] = False
    checks_labels: ClassVar[bool] = False

    def __init__(self, spec: "Spec") -> None:
        self.spec, self.decoded = spec, 0

    def _decoded(self, index: int) -> tuple[np.ndarray, np.ndarray]:
        pair, spec = self.spec.pairs[index], self.spec
        image = decode_image(pair.image, spec.upright)
        return image, decode_label(pair.label, spec.classes, spec.unknown, spec.upright)

    def _sample(self, index: int, resize_labels: bool) -> tuple[np.ndarray, np.ndarray]:
        (image, label), spec = self._decoded(index), self.spec
        if not spec.resized:
            return image, label
        size = fitted(image.shape[:2], spec.size, spec.fit).size
        return resize_image(image, size), resize_label(label, size) if resize_labels else label

    def _augmented(self, index: int, view: View) -> tuple[np.ndarray, np.ndarray]:
        # Of samples that a cache keeps resized, with which this is compared, views are of what it keeps.
        whole = self._decoded(index) if self.spec.keep is None else self._sample(index, True)
        image, label = (pixels[view.window.slices] for pixels in whole)
        image, label = resize_image(image, view.size), resize_label(label, view.size)
        (mirror, *shift), size = view.move, self.spec.crop or self.spec.size
        if (colours := colours_of([view])) is not None:
            image = recoloured(image, colours[0])
        image = mirror_and_move(image, mirror, shift, 0, size)
        label = mirror_and_move(label[..., None], mirror, shift, VOID, size)
        mean, std = MEAN_AND_STD
        return (image.astype(np.float32) - mean) / std, label[..., 0]

    def train(self, plan: Plan, start: int, rank: int, world: int) -> Iterator[tuple[torch.Tensor, torch.Tensor]]:
        device, local = self.spec.device, len(plan.shard(start, rank, world).indices)
        most = DECODED_AHEAD * decoded_at_once(local) // local
        with ThreadPoolExecutor(self.spec.threads) as pool:
            ahead: deque[list[Future]] = deque()
            step = start
            while True:
                while len(ahead) <= most:
                    part = plan.shard(step, rank, world)
                    samples = zip(part.indices.tolist(), kept_views(part, self.spec), strict=True)
                    ahead.append([pool.submit(self._augmented, *sample) for sample in samples])
                    step += 1
                pixels = zip(*(future.result() for future in ahead.popleft()), strict=True)
                images, labels = (torch.from_numpy(np.stack(of_samples)) for of_samples in pixels)
                self.decoded += len(images)
                with annotate("copy"):
                    copied = images.to(device), labels.to(device)
                yield copied[0].to(self.spec.dtype).permute(0, 3, 1, 2), copied[1]

    def decode(
        self, batches: Iterable[np.ndarray], most: int, *, resize_labels: bool
    ) -> Iterator[tuple[list[torch.Tensor], list[torch.Tensor]]]:
        device = self.spec.device
        with ThreadPoolExecutor(self.spec.threads) as pool:
            ahead: deque[list[Future]] = deque()
            for indices in itertools.chain(batches, [np.array([], int)] * DECODED_AHEAD):
                ahead.append([pool.submit(self._sample, int(i), resize_labels) for i in indices])
                if len(ahead) > DECODED_AHEAD:
                    pixels = zip(*(future.result() for future in ahead.popleft()), strict=True)
                    images, labels = (
                        [torch.from_numpy(np.ascontiguousarray(p)).to(device) for p in of] for of in pixels
                    )
                    self.decoded += len(images)
                    yield images, labels
