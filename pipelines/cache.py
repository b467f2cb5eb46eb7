"""The cache tier: decode and resize each file once, then make batches from uint8 pixels in memory.

Training starts at once: samples that are not there yet are decoded in the order in which the plan wants them, and kept
for later epochs and for the other processes of the host. From pixels to batch it is one pass: on a GPU by the augment
kernel, from a copy in its memory where there is room; on a CPU by vectorised slices, sample by sample.
"""

import itertools
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import torch

from fastseg.data.classes import UNKNOWN
from fastseg.errors import FastsegError
from fastseg.kernels.augment import augment, augment_by_slices
from fastseg.pipelines.plan import BatchPlan, Plan
from fastseg.pipelines.prepared import Store, check_of, key_of, locate, open_store, shape_of
from fastseg.pipelines.source import mean_and_std, unknown_values

if TYPE_CHECKING:
    from fastseg.pipelines.source import Spec, Tier

# Share of a GPU's free memory that its copy of the data may take.
GPU_SHARE = 0.4
PREPARED_AT_ONCE = 8


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
    return _open[folder]


class CacheTier:
    """See `fastseg.pipelines.source.Tier`.

    Args:
        spec: what to read and what to make of it.
        inner: the tier that decodes what is not there yet, on the CPU.
    """

    def __init__(self, spec: "Spec", inner: "Tier") -> None:
        self.spec, self.inner = spec, inner

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
                if (label == UNKNOWN).any():
                    raise FastsegError(unknown_values(self.spec))
                store.put(int(index), image, label.numpy())
            yield

    def train(self, plan: Plan, start: int, rank: int, world: int) -> Iterator[tuple[torch.Tensor, torch.Tensor]]:
        """Normalised images [B, 3, H, W] and labels, for step after step."""
        store = open_once(self.spec, resize_labels=True)
        parts = (plan.shard(step, rank, world) for step in itertools.count(start))
        batch = len(plan.shard(start, rank, world).indices)
        filling = self._fill(store, first_uses(plan, start, rank, world), batch, resize_labels=True)
        make = _OnGpu(store, self.spec) if self.spec.device.type == "cuda" else _OnCpu(store, self.spec)
        for position, part in enumerate(parts):
            while not store.ready(part.indices):
                next(filling)
            if position == 1:
                # A step has ended, in which all processes took part: they have it open, and its name may go.
                store.release()
            yield make(part)

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
            while not store.ready(indices):
                next(filling)
            images = torch.from_numpy(store.images[indices]).to(self.spec.device)
            yield images, [torch.from_numpy(store.labels[i]).to(self.spec.device) for i in indices]


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


def rows(part: BatchPlan) -> torch.Tensor:
    """int32[B, 4] of a batch's plan, as `augment` takes it: index, mirror, dy, dx."""
    return torch.from_numpy(np.column_stack([part.indices, part.mirror, part.shift]).astype(np.int32))


class _OnCpu:
    """Batches from a store, on the CPU."""

    def __init__(self, store: Store, spec: "Spec") -> None:
        self.images, self.labels = torch.from_numpy(store.images), torch.from_numpy(store.labels)
        self.mean, self.std = mean_and_std(spec.device)
        self.dtype = spec.dtype

    def __call__(self, part: BatchPlan) -> tuple[torch.Tensor, torch.Tensor]:
        return augment_by_slices(self.images, self.labels, rows(part), self.mean, self.std, self.dtype)


class _OnGpu:
    """Batches from a store, on a GPU: from a copy in its memory where there is room, else copied batch by batch."""

    def __init__(self, store: Store, spec: "Spec") -> None:
        self.store, self.spec = store, spec
        self.mean, self.std = mean_and_std(spec.device)
        free, _ = torch.cuda.mem_get_info(spec.device)
        self.copied: np.ndarray | None = None
        if store.images.nbytes + store.labels.nbytes < GPU_SHARE * free:
            self.copied = np.zeros(len(store.checks), bool)
            self.images = torch.empty(store.images.shape, dtype=torch.uint8, device=spec.device)
            self.labels = torch.empty(store.labels.shape, dtype=torch.uint8, device=spec.device)

    def __call__(self, part: BatchPlan) -> tuple[torch.Tensor, torch.Tensor]:
        samples, device = rows(part), self.spec.device
        if self.copied is None:
            images = torch.from_numpy(self.store.images[part.indices]).to(device)
            labels = torch.from_numpy(self.store.labels[part.indices]).to(device)
            samples[:, 0] = torch.arange(len(samples))
        else:
            images, labels = self.images, self.labels
            for index in part.indices[~self.copied[part.indices]]:
                images[index].copy_(torch.from_numpy(self.store.images[index]))
                labels[index].copy_(torch.from_numpy(self.store.labels[index]))
                self.copied[index] = True
        return augment(images, labels, samples.to(device), self.mean, self.std, self.spec.dtype)


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
    chunks = [everything[i : i + PREPARED_AT_ONCE] for i in range(0, len(everything), PREPARED_AT_ONCE)]
    asked = [chunk if verify else chunk[store.checks[chunk] == 0] for chunk in chunks]
    done(len(everything) - sum(map(len, asked)))
    asked = [chunk for chunk in asked if len(chunk)]
    for chunk, (images, labels) in zip(asked, inner.decode(asked, PREPARED_AT_ONCE, resize_labels=True), strict=True):
        for index, image, label in zip(chunk.tolist(), images.numpy(), labels, strict=True):
            if (label == UNKNOWN).any():
                raise FastsegError(unknown_values(spec))
            fresh = check_of(image, label.numpy())
            if store.checks[index] and (store.checks[index] != fresh or store.broken(np.array([index]))):
                wrong.append(index)
            if store.checks[index] == 0 or index in wrong[-1:]:
                store.put(index, image, label.numpy())
        done(len(chunk))
    store.seal()
    return wrong
