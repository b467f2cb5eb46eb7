"""The cache tier: decode each file once, then make batches from uint8 pixels in memory.

Samples are kept at their files' own size, so that a size is made of them where a batch is made, and another size, as
growing images have it, costs a resize and no decoding. A thread of its own decodes them, at the decoder's speed and in
the order in which the plan wants them, whatever a step takes; training starts as soon as its first batch is there.
From pixels to batch it is one pass: on a GPU one kernel, from a copy in its memory where there is room; on a CPU
vectorised slices, sample by sample.
"""

import atexit
import contextlib
import dataclasses
import functools
import itertools
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import TYPE_CHECKING, ClassVar

import numpy as np
import torch

from fastseg.data.classes import UNKNOWN
from fastseg.errors import FastsegError
from fastseg.pipelines.fit import View, kept_views
from fastseg.pipelines.gpu_copy import copy_on_gpu, forget_copies, target
from fastseg.pipelines.plan import BatchPlan, Plan
from fastseg.pipelines.prepared import Store, check_of, key_of, locate, open_store, shape_of
from fastseg.pipelines.resize import resize_image, resize_label
from fastseg.pipelines.source import (
    AT_ONCE,
    choose_loader,
    decoded_at_once,
    make_tier,
    on_cpu,
    runs_on,
    unknown_values,
)

if TYPE_CHECKING:
    from fastseg.pipelines.source import Spec

# Files of more than so many times the network's pixels are kept at the network's size, whatever resizes: memory holds
# less of the data set otherwise, and a CPU takes longer to resize than a step should wait.
LARGEST = 4.5


def find_room(spec: "Spec", *, resize_labels: bool = True, grows: bool = False) -> tuple["Spec | None", str]:
    """The spec with the size that its samples can be kept at, and where; or None, and why not.

    At their own size they serve every size of a run, and of the runs that follow. Where all batches have one size that
    files do not have, a CPU would resize a sample each time that it is read: 14 ms from 720x960 to 360x480, where it
    takes half a millisecond to make a batch of it. It keeps what is resized.

    Args:
        grows: the run wants images in several sizes, or at several scales.
    """
    times = sum(h * w for h, w in (header.image_size for header in spec.headers)) / (
        len(spec.headers) * spec.size[0] * spec.size[1]
    )
    own, at_size = dataclasses.replace(spec, keep=None), dataclasses.replace(spec, keep=spec.size)
    if spec.window is not None:
        wishes = [(own, ", at their own size, of which windows are cut")]
    elif spec.same_size:
        wishes = [(own, "")]
    elif times > LARGEST:
        wishes = [(at_size, f", at {spec.size}, since files have {times:.0f} times the pixels")]
    elif not (spec.device.type == "cuda" or grows or spec.cache_dir):
        wishes = [(at_size, f", at {spec.size}, the one size that is wanted")]
    else:
        wishes = [(own, ", at their own size"), (at_size, f", at {spec.size}, since their own sizes have no room")]
    where = ""
    for wish, why in wishes:
        shape = shape_of(wish, resize_labels=resize_labels)
        folder, where = locate(wish, shape, key_of(wish, shape))
        if folder is not None:
            return wish, where + why
    return None, where


# Stores that this process has open, by folder: each validation, and each size, comes back to the same one.
_open: dict[Path, Store] = {}


def open_once(spec: "Spec", *, resize_labels: bool) -> Store:
    """The store of a split, the same one each time.

    Raises:
        FastsegError: there is no room for it.
    """
    shape = shape_of(spec, resize_labels=resize_labels)
    folder, where = locate(spec, shape, key_of(spec, shape), taken=tuple(_open))
    if folder is None:
        raise FastsegError(f"--loader cache: {where}")
    if folder not in _open:
        _open[folder] = open_store(spec, shape, folder)
        atexit.register(_open[folder].release)  # a run may end, or fail, before its second step
    return _open[folder]


def forget() -> None:
    """Give up all stores that this process has open: what is wanted of them again is decoded again, if it passes."""
    forget_copies()
    while _open:
        _open.popitem()[1].release()


class CacheTier:
    """See `fastseg.pipelines.source.Tier`.

    Attributes:
        inner: the tier that decodes what is not there yet, on the CPU, at the size at which it is kept.
    """

    keeps: ClassVar[bool] = True
    checks_labels: ClassVar[bool] = True

    def __init__(self, spec: "Spec") -> None:
        decoding = dataclasses.replace(spec, device=torch.device("cpu"), cache_dir="", crop=None)
        decoding = dataclasses.replace(decoding, size=spec.keep or spec.size, resized=spec.keep is not None)
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

        found = chunks()
        first = next(found, None)
        if first is None:
            return  # and no decoder is made, which on a machine with a GPU takes seconds
        for images, labels in self.inner.decode(itertools.chain([first], found), batch, resize_labels=resize_labels):
            for index, image, label in zip(asked.pop(0), images, labels, strict=True):
                keep(store, int(index), image.numpy(), label.numpy(), self.spec)
            yield

    def train(self, plan: Plan, start: int, rank: int, world: int) -> Iterator[tuple[torch.Tensor, torch.Tensor]]:
        """Normalised images [B, 3, H, W] and labels, for step after step; filling has begun when this returns."""
        store = open_once(self.spec, resize_labels=True)
        together = decoded_at_once(len(plan.shard(start, rank, world).indices))
        uses = first_uses(plan, start, rank, world)
        filling = Filling(store, self._fill(store, uses, together, resize_labels=True))
        parts = (plan.shard(step, rank, world) for step in itertools.count(start))
        return self._batches(store, filling, parts)

    def _batches(
        self, store: Store, filling: "Filling", parts: Iterator[BatchPlan]
    ) -> Iterator[tuple[torch.Tensor, torch.Tensor]]:
        kept = copy_on_gpu(store, self.spec.device) if self.spec.device.type == "cuda" else None
        with contextlib.closing(filling):
            for position, part in enumerate(parts):
                filling.wait_for(part.indices)
                if position == 1:
                    # A step has ended, in which all processes took part: they have it open, and its name may go.
                    store.release()
                if kept:
                    yield kept.batch(part, self.spec)
                else:
                    views = kept_views(part, self.spec)
                    yield on_cpu(functools.partial(_seen, store, part.indices, views), views, self.spec)

    def decode(
        self, batches: Iterable[np.ndarray], most: int, *, resize_labels: bool
    ) -> Iterator[tuple[list[torch.Tensor], list[torch.Tensor]]]:
        """Pixels as the inner tier gives them, out of the store where they are in it."""
        store = open_once(self.spec, resize_labels=resize_labels)
        store.release()  # an evaluation's share of the split is this process's own
        kept = copy_on_gpu(store, self.spec.device) if self.spec.device.type == "cuda" else None
        listed = list(batches)
        order = (int(index) for indices in listed for index in indices)
        with contextlib.closing(Filling(store, self._fill(store, order, most, resize_labels=resize_labels))) as filling:
            for indices in listed:
                filling.wait_for(indices)
                if kept:
                    yield kept.pixels(indices, self.spec, resize_labels=resize_labels)
                else:
                    made = functools.partial(_made, store, self.spec, indices, resize_labels=resize_labels)
                    pairs = runs_on(self.spec.threads)(made, range(len(indices)))
                    images, labels = zip(*pairs, strict=True)
                    yield [_tensor(image) for image in images], [_tensor(label) for label in labels]


def _tensor(pixels: np.ndarray) -> torch.Tensor:
    return torch.from_numpy(np.ascontiguousarray(pixels))


def keep(store: Store, index: int, image: np.ndarray, label: np.ndarray, spec: "Spec") -> None:
    """Put a decoded sample into the store.

    Raises:
        FastsegError: its label has a value outside the class map.
    """
    # NumPy compares on this thread alone, where those that decode have the others.
    if (label == UNKNOWN).any():
        raise FastsegError(unknown_values(spec))
    store.put(index, image, label)


def _made(
    store: Store, spec: "Spec", indices: np.ndarray, number: int, *, resize_labels: bool
) -> tuple[np.ndarray, np.ndarray]:
    """Image and label of a kept sample, as batches want them on a CPU."""
    index = indices[number]
    image, label = store.image(index), store.label(index)
    size = target(spec, index)
    return resize_image(image, size), resize_label(label, size) if resize_labels else label


def _seen(store: Store, indices: np.ndarray, views: Sequence[View], number: int) -> tuple[np.ndarray, np.ndarray]:
    """Image and label of a view of a kept sample, as training wants them on a CPU."""
    view, index = views[number], indices[number]
    image, label = (pixels[view.window.slices] for pixels in (store.image(index), store.label(index)))
    return resize_image(image, view.size), resize_label(label, view.size)


class Filling:
    """Fills a store in the background, ahead of those who read it.

    One thread does it, part by part, each part a task that hands in the next: an interpreter that ends, and `close`,
    wait for one of them.

    Args:
        work: keeps some samples with each step of it.
    """

    def __init__(self, store: Store, work: Iterator[None]) -> None:
        self._store, self._work = store, work
        self._pool = ThreadPoolExecutor(1, "fastseg-fill")
        self._part = self._pool.submit(self._advance)

    def _advance(self) -> bool:
        """Keep some samples; whether there may be more."""
        if next(self._work, "end") == "end":
            return False
        with contextlib.suppress(RuntimeError):  # nobody reads any more, or the interpreter ends
            self._part = self._pool.submit(self._advance)
        return True

    def wait_for(self, indices: np.ndarray) -> None:
        """Until these samples are there.

        Raises:
            FastsegError: one cannot be decoded, or they are not there although all have been: somebody else wrote to
                the store.
        """
        while not self._store.ready(indices):
            # At its end another process may have kept the rest, between our two looks.
            if not self._part.result() and not self._store.ready(indices):
                raise FastsegError(
                    f"{self._store.folder}: samples were removed while they were read; delete the folder"
                )

    def close(self) -> None:
        """Stop; samples that are there stay."""
        self._pool.shutdown(cancel_futures=True)


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


def prepare(spec: "Spec", *, verify: bool, done: Callable[[int], None]) -> list[int]:
    """Fill the split's store; returns the indices that were kept but wrong, which are decoded again.

    Args:
        verify: decode everything, and compare it with what is kept.
        done: called with a number of samples as they are ready.

    Raises:
        FastsegError: a file that cannot be decoded, or no room.
    """
    store, inner = open_once(spec, resize_labels=True), CacheTier(spec).inner
    everything, wrong = np.arange(len(spec.pairs)), []
    chunks = [everything[i : i + AT_ONCE] for i in range(0, len(everything), AT_ONCE)]
    asked = [chunk if verify else chunk[store.checks[chunk] == 0] for chunk in chunks]
    done(len(everything) - sum(map(len, asked)))
    asked = [chunk for chunk in asked if len(chunk)]
    for chunk, (images, labels) in zip(asked, inner.decode(asked, AT_ONCE, resize_labels=True), strict=True):
        for index, image, label in zip(chunk.tolist(), images, labels, strict=True):
            pixels = image.numpy(), label.numpy()
            kept = store.checks[index]
            if kept == check_of(*pixels) and not store.broken(np.array([index])):
                continue
            if kept:
                wrong.append(index)
            keep(store, index, *pixels, spec)
        done(len(chunk))
    store.seal()
    return wrong
