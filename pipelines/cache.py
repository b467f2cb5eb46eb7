"""The cache tier: decode and resize each file once, then make batches from uint8 pixels in memory.

Training starts at once: samples that are not there yet are decoded in the order in which the plan wants them, and kept
for later epochs and for the other processes of the host. From pixels to batch it is one pass: on a GPU by the augment
kernel, from a copy in its memory where there is room; on a CPU by vectorised slices, sample by sample.
"""

import atexit
import dataclasses
import itertools
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING, ClassVar

import numpy as np
import torch

from fastseg.data.classes import UNKNOWN
from fastseg.errors import FastsegError
from fastseg.pipelines.plan import BatchPlan, Plan
from fastseg.pipelines.prepared import Store, check_of, key_of, locate, open_store, shape_of
from fastseg.pipelines.source import (
    AT_ONCE,
    augmented,
    choose_loader,
    decoded_at_once,
    make_tier,
    samples_of,
    unknown_values,
)
from fastseg.ranges import annotate

if TYPE_CHECKING:
    from fastseg.pipelines.source import Spec, Tier

# Share of a GPU's free memory that its copy of the data may take.
GPU_SHARE = 0.4


def find_room(spec: "Spec", *, resize_labels: bool = True) -> tuple[bool, str]:
    """Whether the split can be cached, and where or why not."""
    shape = shape_of(spec, resize_labels=resize_labels)
    if shape is None:
        return False, "labels of several sizes are not cached at their own size"
    folder, where = locate(spec, shape, key_of(spec, shape))
    return folder is not None, where


# Stores that this process has open, by folder: each validation comes back to the same one.
_open: dict[Path, Store] = {}


def open_once(spec: "Spec", *, resize_labels: bool) -> Store:
    """The store of a split, the same one each time.

    Raises:
        FastsegError: there is no room for it.
    """
    shape = shape_of(spec, resize_labels=resize_labels)
    if shape is None:
        raise FastsegError("--loader cache: labels of several sizes are not cached; use --at network")
    folder, where = locate(spec, shape, key_of(spec, shape), taken=tuple(_open))
    if folder is None:
        raise FastsegError(f"--loader cache: {where}")
    if folder not in _open:
        _open[folder] = open_store(spec, shape, folder)
        atexit.register(_open[folder].release)  # a run may end, or fail, before its second step
    return _open[folder]


class CacheTier:
    """See `fastseg.pipelines.source.Tier`.

    Attributes:
        inner: the tier that decodes what is not there yet, on the CPU.
    """

    keeps: ClassVar[bool] = True
    checks_labels: ClassVar[bool] = True

    def __init__(self, spec: "Spec") -> None:
        decoding = dataclasses.replace(spec, device=torch.device("cpu"), cache_dir="")
        self.spec, self.inner = spec, make_tier(choose_loader("auto", decoding)[0])

    @property
    def decoded(self) -> int:
        """See `Tier`."""
        return self.inner.decoded

    def _fill(self, store: Store, wanted: Iterator[int], batch: int, *, resize_labels: bool) -> Iterator[None]:
        """Decode `wanted` samples that are not there, `batch` at a time; one step of the iterator keeps that many."""
        asked: list[np.ndarray] = []

        def chunks() -> Iterator[np.ndarray]:
            missing = (index for index in wanted if not store.checks[index])
            while chunk := list(itertools.islice(missing, batch)):
                asked.append(np.array(chunk))
                yield asked[-1]

        for images, labels in self.inner.decode(chunks(), batch, resize_labels=resize_labels):
            for index, image, label in zip(asked.pop(0), images.numpy(), labels, strict=True):
                keep(store, int(index), image, label, self.spec)
            yield

    def train(self, plan: Plan, start: int, rank: int, world: int) -> Iterator[tuple[torch.Tensor, torch.Tensor]]:
        """Normalised images [B, 3, H, W] and labels, for step after step."""
        store = open_once(self.spec, resize_labels=True)
        parts = (plan.shard(step, rank, world) for step in itertools.count(start))
        together = decoded_at_once(len(plan.shard(start, rank, world).indices))
        filling = self._fill(store, first_uses(plan, start, rank, world), together, resize_labels=True)
        pixels = _OnDevice(store, self.spec)
        for position, part in enumerate(parts):
            wait_for(store, part.indices, filling)
            if position == 1:
                # A step has ended, in which all processes took part: they have it open, and its name may go.
                store.release()
            yield augmented(*pixels.holding(part), self.spec)

    def decode(
        self, batches: Iterable[np.ndarray], most: int, *, resize_labels: bool
    ) -> Iterator[tuple[torch.Tensor, list[torch.Tensor]]]:
        """Pixels as the inner tier gives them, out of the store where they are in it."""
        store = open_once(self.spec, resize_labels=resize_labels)
        store.release()  # an evaluation's share of the split is this process's own
        listed = list(batches)
        order = (int(index) for indices in listed for index in indices)
        filling = self._fill(store, order, most, resize_labels=resize_labels)
        for indices in listed:
            wait_for(store, indices, filling)
            images = torch.from_numpy(store.images[indices]).to(self.spec.device)
            yield images, [torch.from_numpy(store.labels[i]).to(self.spec.device) for i in indices]


def keep(store: Store, index: int, image: np.ndarray, label: torch.Tensor, spec: "Spec") -> None:
    """Put a decoded sample into the store.

    Raises:
        FastsegError: its label has a value outside the class map.
    """
    if (label == UNKNOWN).any():
        raise FastsegError(unknown_values(spec))
    store.put(index, image, label.numpy())


def wait_for(store: Store, indices: np.ndarray, filling: Iterator[None]) -> None:
    """Fill the store until these samples are there.

    Raises:
        FastsegError: they are not, although all have been decoded: somebody else wrote to the store.
    """
    while not store.ready(indices):
        # At its end another process may have kept the rest, between our two looks.
        if next(filling, "end") == "end" and not store.ready(indices):
            raise FastsegError(f"{store.folder}: samples were removed while they were read; delete the folder")


def first_uses(plan: Plan, start: int, rank: int, world: int) -> Iterator[int]:
    """Each sample once, in the order in which this process first wants it from step `start` on."""
    seen: set[int] = set()
    for step in itertools.count(start):
        for index in plan.shard(step, rank, world).indices.tolist():
            if index not in seen:
                seen.add(index)
                yield index
        if len(seen) == plan.num_samples:
            return


class _OnDevice:
    """A store's pixels where batches are made: themselves on a CPU; on a GPU a copy, whole where there is room."""

    def __init__(self, store: Store, spec: "Spec") -> None:
        self.device = spec.device
        self.kept = torch.from_numpy(store.images), torch.from_numpy(store.labels)
        self.copies: tuple[torch.Tensor, ...] | None = None
        if self.device.type == "cuda":
            free, _ = torch.cuda.mem_get_info(self.device)
            if store.images.nbytes + store.labels.nbytes < GPU_SHARE * free:
                self.copies = tuple(torch.empty_like(pixels, device=self.device) for pixels in self.kept)
                self.copied = np.zeros(len(store.checks), bool)

    def holding(self, part: BatchPlan) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """Images and labels that hold the samples of `part`, and where they are in them: see `augment`."""
        if self.device.type == "cpu":
            return *self.kept, samples_of(part)
        if self.copies is None:
            with annotate("copy"):
                images, labels = (pixels[part.indices].to(self.device) for pixels in self.kept)
            return images, labels, samples_of(part, np.arange(len(part.indices)))
        for index in part.indices[~self.copied[part.indices]]:
            with annotate("copy"):
                for copy, pixels in zip(self.copies, self.kept, strict=True):
                    copy[index].copy_(pixels[index])
            self.copied[index] = True
        images, labels = self.copies
        return images, labels, samples_of(part)


def prepare(spec: "Spec", inner: "Tier", *, verify: bool, done: Callable[[int], None]) -> list[int]:
    """Fill the split's store; returns the indices that were kept but wrong, which are decoded again.

    Args:
        verify: decode everything, and compare it with what is kept.
        done: called with a number of samples as they are ready.

    Raises:
        FastsegError: a file that cannot be decoded, or no room.
    """
    store = open_once(spec, resize_labels=True)
    everything, wrong = np.arange(len(spec.pairs)), []
    chunks = [everything[i : i + AT_ONCE] for i in range(0, len(everything), AT_ONCE)]
    asked = [chunk if verify else chunk[store.checks[chunk] == 0] for chunk in chunks]
    done(len(everything) - sum(map(len, asked)))
    asked = [chunk for chunk in asked if len(chunk)]
    for chunk, (images, labels) in zip(asked, inner.decode(asked, AT_ONCE, resize_labels=True), strict=True):
        for index, image, label in zip(chunk.tolist(), images.numpy(), labels, strict=True):
            kept = store.checks[index]
            if kept == check_of(image, label.numpy()) and not store.broken(np.array([index])):
                continue
            if kept:
                wrong.append(index)
            keep(store, index, image, label, spec)
        done(len(chunk))
    store.seal()
    return wrong
