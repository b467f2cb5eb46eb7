"""The cache tier's pixels on a GPU: a copy of a store in its memory where there is room, else of what a batch shows."""

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import torch

from fastseg.kernels.augment import augment
from fastseg.pipelines.fit import Box, fitted, kept_views
from fastseg.pipelines.plan import BatchPlan
from fastseg.pipelines.prepared import Store
from fastseg.pipelines.source import on_gpu, to_device
from fastseg.ranges import annotate

if TYPE_CHECKING:
    from fastseg.pipelines.source import Spec

# Share of a GPU's free memory that its copy of the data may take.
GPU_SHARE = 0.4


def target(spec: "Spec", index: int) -> tuple[int, int]:
    """(height, width) that a sample is resized to."""
    return fitted(spec.headers[index].image_size, spec.size, spec.fit).size


class GpuCopy:
    """A store's pixels in a GPU's memory: whole where there is room, else those of each batch."""

    def __init__(self, store: Store, device: torch.device) -> None:
        self.store, self.device = store, device
        self.copies: tuple[torch.Tensor, torch.Tensor] | None = None
        free, _ = torch.cuda.mem_get_info(device)
        if store.shape.nbytes < GPU_SHARE * free:
            ends = store.shape.offsets[-1], store.shape.label_offsets[-1]
            images, labels = (torch.empty(int(end), dtype=torch.uint8, device=device) for end in ends)
            self.copies = images, labels
            self.copied = np.zeros(len(store.checks), bool)

    def _holding(
        self, indices: np.ndarray, windows: Sequence[Box] | None = None
    ) -> tuple[torch.Tensor, torch.Tensor, np.ndarray]:
        """The bytes that hold these images, and labels, and int64[B, 3] where: see `on_gpu`.

        Args:
            windows: what is wanted of each; None: all of it.
        """
        if self.copies is None:
            return self._cut(indices, windows)
        shape = self.store.shape
        with annotate("copy"):
            for index in indices[~self.copied[indices]]:
                for copy, kept, ends in (
                    (self.copies[0], self.store.image(index), shape.offsets),
                    (self.copies[1], self.store.label(index), shape.label_offsets),
                ):
                    copy[ends[index] : ends[index + 1]] = to_device(torch.from_numpy(kept.ravel()), self.device)
                self.copied[index] = True
        widths = np.array([shape.sizes[i][1] for i in indices], np.int64)
        first = 0 * widths  # pixel of each window
        if windows is not None:
            first = np.array([box.top for box in windows]) * widths + np.array([box.left for box in windows])
        places = np.column_stack([shape.offsets[indices] + 3 * first, shape.label_offsets[indices] + first, widths])
        return self.copies[0], self.copies[1], places

    def _cut(self, indices: np.ndarray, windows: Sequence[Box] | None) -> tuple[torch.Tensor, torch.Tensor, np.ndarray]:
        """As `_holding`, of copies of these windows alone."""
        parts = [box.slices for box in windows] if windows else [(slice(None), slice(None))] * len(indices)
        images, labels = (
            [kept(index)[part] for index, part in zip(indices, parts, strict=True)]
            for kept in (self.store.image, self.store.label)
        )
        with annotate("copy"):
            copies = [
                to_device(torch.from_numpy(np.concatenate([pixels.ravel() for pixels in cut])), self.device)
                for cut in (images, labels)
            ]
        ends = [np.cumsum([0, *(pixels.size for pixels in cut)])[:-1] for cut in (images, labels)]
        return copies[0], copies[1], np.column_stack([*ends, [image.shape[1] for image in images]])

    def batch(self, part: BatchPlan, spec: "Spec") -> tuple[torch.Tensor, torch.Tensor]:
        """A training batch."""
        views = kept_views(part, spec)
        return on_gpu(*self._holding(part.indices, [view.window for view in views]), views, spec)

    def pixels(
        self, indices: np.ndarray, spec: "Spec", *, resize_labels: bool
    ) -> tuple[list[torch.Tensor], list[torch.Tensor]]:
        """See `Tier.decode`."""
        images, labels, places = self._holding(indices)
        label_sizes = [self.store.shape.label_sizes[i] for i in indices]
        own = [
            labels[at : at + h * w].view(h, w) for at, (h, w) in zip(places[:, 1].tolist(), label_sizes, strict=True)
        ]
        sizes, targets = [self.store.shape.sizes[i] for i in indices], [target(spec, i) for i in indices]
        if sizes == targets:
            placed = zip(places[:, 0].tolist(), sizes, strict=True)
            return [images[at : at + 3 * h * w].view(h, w, 3) for at, (h, w) in placed], own
        if not resize_labels:
            labels, places[:, 1] = images, places[:, 0]  # they may have another size: whatever is read, nobody looks
        samples = np.column_stack([places[:, :2], sizes, places[:, 2], targets])
        samples = np.pad(samples, ((0, 0), (0, 3)))  # neither mirrored nor moved
        mean, std = torch.zeros(3, device=images.device), torch.ones(3, device=images.device)
        given = images, labels, to_device(torch.from_numpy(samples), images.device), mean, std, torch.uint8
        made, made_labels = augment(*given, *spec.size, True)
        whole = [image[:h, :w] for image, (h, w) in zip(made.permute(0, 2, 3, 1), targets, strict=True)]
        if not resize_labels:
            return whole, own
        return whole, [label[:h, :w] for label, (h, w) in zip(made_labels, targets, strict=True)]


# The pixels of stores on a GPU, by folder and GPU: each size, and each validation, comes back to the same ones.
_copies: dict[tuple[Path, torch.device], GpuCopy] = {}


def copy_on_gpu(store: Store, device: torch.device) -> GpuCopy:
    """A store's pixels on a GPU, the same each time."""
    key = store.folder, device
    if key not in _copies:
        _copies[key] = GpuCopy(store, device)
    return _copies[key]


def forget_copies() -> None:
    """Give their memory back: the next batch makes them anew."""
    _copies.clear()
