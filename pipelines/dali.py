"""The DALI tier: decode, resize and index in one graph, on the GPU or on the CPU's threads.

Paths enter through `external_source`; nothing in Python touches a pixel. `device="gpu"` decodes with the mixed decoder
and does everything after it on the GPU; `device="cpu"` is the same graph without one. Where training shows windows of
a file's own pixels, or crops files that need no resize, only the window is decoded: of a JPEG the rest is not
transformed, of a PNG it is not converted, looked up and kept. Mirror, shift, normalisation and cast are one pass over
DALI's buffers, by `make_batch`: DALI's slice with out-of-bounds padding takes 3.6 ms of CPU per 360x480 image, and a
normalisation in torch as much again, where that pass takes 0.4.
"""

import itertools
from collections import deque
from collections.abc import Iterable, Iterator
from typing import TYPE_CHECKING, Any, ClassVar, NamedTuple

import numpy as np
import torch
from nvidia.dali import fn, pipeline_def, types
from nvidia.dali.pipeline import DataNode, Pipeline
from PIL import Image

from fastseg.config import Size
from fastseg.data.classes import ClassMap
from fastseg.data.decode import READING_ERRORS, decode_image, reason
from fastseg.errors import FastsegError
from fastseg.pipelines.fit import View, fitted, seen, views_of
from fastseg.pipelines.plan import Plan
from fastseg.pipelines.source import DECODED_AHEAD, decoded_at_once, make_batch

if TYPE_CHECKING:
    from fastseg.pipelines.source import Spec


def to_classes(raw_HWC: DataNode, classes: ClassMap, unknown: int) -> DataNode:
    """Decoded label -> class indices uint8[H, W, 1], by exact lookups (two for a colour: see ClassMap.color_tables)."""

    def look_up(keys: DataNode, table: np.ndarray, default: int) -> DataNode:
        (used,) = np.nonzero(table != default)
        return fn.lookup_table(
            keys, keys=used.tolist(), values=table[used].tolist(), default_value=default, dtype=types.UINT8
        )

    if not classes.is_color:
        return look_up(raw_HWC[:, :, 0:1], classes.index_table(unknown), unknown)
    first, second = classes.color_tables(unknown)
    red, green, blue = (fn.cast(raw_HWC[:, :, c : c + 1], dtype=types.INT32) for c in range(3))
    ids = fn.cast(look_up(red * 256 + green, first, 0), dtype=types.INT32)
    return look_up(ids * 256 + blue, second, unknown)


def bilinear(images: DataNode, size: tuple[int, int] | DataNode) -> DataNode:
    """Antialiased bilinear: the definition that `fastseg.pipelines.resize` restates."""
    return fn.resize(images, size=size, interp_type=types.INTERP_LINEAR, antialias=True)


def nearest(labels_HWC: DataNode, size: tuple[int, int] | DataNode, source_size: DataNode, channels: int) -> DataNode:
    """Nearest neighbour by the integer rule of `fastseg.pipelines.resize`, whatever the sizes.

    A size is of all samples, or of each its own.

    The region is nudged by a quarter of 1/size, so that floating point decides no tie. Columns only, twice: DALI's CPU
    operator multiplies to find a column, but adds up its way down the rows, in fp32, and is a row off after some
    hundred of them (720 -> 540). Rows are columns of one line of pixels that have a channel for each column.
    """

    def columns_only(pixels: DataNode, width: int | DataNode, rows: DataNode | float, columns: DataNode) -> DataNode:
        nudge = 1 / (4 * width)
        origin = fn.stack(0.0, nudge) if isinstance(nudge, DataNode) else (0.0, nudge)
        return fn.resize(
            pixels,
            resize_x=width,
            mode="stretch",
            interp_type=types.INTERP_NN,
            roi_start=origin,
            roi_end=fn.stack(rows, columns + nudge),
        )

    height, width = source_size[0], source_size[1]
    line = fn.reshape(
        labels_HWC, shape=fn.cast(fn.stack(1.0, height, width * channels), dtype=types.INT32), layout="HWC"
    )
    rows = size[0] if isinstance(size, DataNode) else types.Constant(float(size[0]))
    short = columns_only(line, size[0], types.Constant(1.0), height)
    whole = fn.cast(fn.stack(rows, width, float(channels)), dtype=types.INT32)
    return columns_only(fn.reshape(short, shape=whole, layout="HWC"), size[1], rows, width)


# How much of a batch of JPEGs the GPU's own JPEG engine decodes, of whole images and of windows; a GPU without one, and
# other formats, know nothing of it. Images/s on an H200 with 16 threads, 2048x1024, 630 kB each, in batches of 32, of
# whole images and of windows of a quarter: 2874 and 1375 at 0, 5215 and 3033 at 0.65, 4352 and 4368 at 0.9, 4353 and
# 4357 at 1; of DALI's decoder on the CPU 734 and 1294 (bench/records/2026-11-27-h200-jpeg.txt).
JPEG_ENGINE, JPEG_ENGINE_WINDOWED = 0.65, 0.9


class Wanted(NamedTuple):
    """Files to decode together.

    Attributes:
        indices: into the split.
        windows: int32[B, 4], of which alone of each file: top, left, height, width; None: all of it.
        sizes: float32[B, 2], the (height, width) that each is resized to, where it has one of its own.
    """

    indices: np.ndarray
    windows: np.ndarray | None = None
    sizes: np.ndarray | None = None


class Work(NamedTuple):
    """What a graph does.

    Attributes:
        windowed: decodes windows of files.
        resize: resizes images. resize_labels: labels too.
        each: to a size of each one's own, instead of the network's.
        padded: (height, width) of what all are put into the top left of, where they may be smaller.
    """

    windowed: bool
    resize: bool
    resize_labels: bool
    each: bool
    padded: Size | None

    @property
    def columns(self) -> list[str]:
        """What the graph is fed: paths, and what else decides a sample."""
        wanted = {"size": self.resize_labels, "start": self.windowed, "shape": self.windowed, "target": self.each}
        return ["image", "label", *(name for name, fed in wanted.items() if fed)]


def work(spec: "Spec", *, resize_labels: bool = True, training: bool = False, zooms: bool = False) -> Work:
    """What there is to do for samples of a spec: for batches to train on, or for samples by themselves.

    Args:
        zooms: samples are shown each at a scale of its own.
    """
    if zooms:
        return Work(True, resize=True, resize_labels=True, each=True, padded=spec.crop or spec.size)
    if training and spec.window is not None:
        # A file may be smaller than a window, and what is made of it smaller than the network's input.
        smaller = any(side < least for h in spec.headers for side, least in zip(h.image_size, spec.window, strict=True))
        resize = spec.window != spec.size
        return Work(True, resize, resize, each=resize and smaller, padded=spec.size if smaller else None)
    resize, each = not spec.same_size, spec.fit == "letterbox" and not spec.same_size
    # What a sample does not show is not decoded, unless a resize comes between.
    windowed = training and spec.crop is not None and not resize
    return Work(windowed, resize, resize and resize_labels, each, padded=spec.size if each and training else None)


@pipeline_def
def graph(source: Any, spec: "Spec", todo: Work, *, gpu: bool) -> tuple[DataNode, ...]:
    """The graph of both devices. `source` yields what `todo.columns` names, in that order."""
    names = todo.columns
    fed = dict(zip(names, fn.external_source(source=source, num_outputs=len(names)), strict=True))

    # The engine's memory is reserved once, for the largest: 0 where no file is for it.
    height, width = np.max([(0, 0), *(header.image_size for header in spec.headers if header.jpeg)], axis=0).tolist()
    load = JPEG_ENGINE_WINDOWED if todo.windowed else JPEG_ENGINE
    engine = {"hw_decoder_load": load, "preallocate_height_hint": height, "preallocate_width_hint": width}
    given = {"device": "mixed" if gpu else "cpu", "adjust_orientation": spec.upright}

    def decoded(name: str, **how: Any) -> DataNode:
        file, how = fn.io.file.read(fed[name]), {**given, **how}
        if todo.windowed:
            return fn.decoders.image_slice(file, start=fed["start"], shape=fed["shape"], axis_names="HW", **how)
        return fn.decoders.image(file, **how)

    images = decoded("image", output_type=types.RGB, **engine)
    labels = decoded("label", output_type=types.RGB if spec.classes.is_color else types.ANY_DATA)
    size = fed["target"] if todo.each else spec.size
    if todo.resize:
        images = bilinear(images, size)
    if todo.resize_labels:
        labels = nearest(labels, size, fed["size"], 3 if spec.classes.is_color else 1)
    labels = to_classes(labels, spec.classes, spec.unknown)
    if todo.padded:
        images, labels = (fn.pad(pixels, axis_names="HW", shape=todo.padded) for pixels in (images, labels))
    return images, labels


def _reason(error: Exception) -> str:
    """The line that matters of one of DALI's errors, which show the whole pipeline first."""
    before, _, after = str(error).partition("encountered:")
    return (after or before).strip().partition("\n")[0]


def _fault(path: str) -> str | None:
    """What is wrong with a file, by Pillow's word: it cannot be decoded, or does not end as it should."""
    try:
        decode_image(path)
        with Image.open(path) as file:
            file.verify()
    except FastsegError as error:
        return str(error)
    except READING_ERRORS as error:
        return f"{path}: cannot be decoded: {reason(path, error)}"
    return None


class DaliTier:
    """See `fastseg.pipelines.source.Tier`."""

    keeps: ClassVar[bool] = False
    checks_labels: ClassVar[bool] = False

    def __init__(self, spec: "Spec") -> None:
        self.spec, self.decoded = spec, 0

    def _feeds(self, batches: Iterable[Wanted], names: list[str]) -> Iterator[tuple[Any, ...]]:
        for indices, windows, sizes in batches:
            pairs = [self.spec.pairs[i] for i in indices]
            feed: dict[str, Any] = {
                "image": [np.frombuffer(p.image.encode(), np.uint8) for p in pairs],
                "label": [np.frombuffer(p.label.encode(), np.uint8) for p in pairs],
                "size": np.array([self.spec.headers[i].label_size for i in indices], np.float32),
                "target": sizes,
            }
            if windows is not None:
                start, shape = np.ascontiguousarray(windows[:, :2]), np.ascontiguousarray(windows[:, 2:])
                feed |= {"start": start, "shape": shape, "size": shape.astype(np.float32)}
            yield tuple(feed[name] for name in names)

    def build(self, batches: Iterable[Wanted], most: int, todo: Work) -> Pipeline:
        """The pipeline over `batches`, of at most `most` samples each."""
        gpu = self.spec.device.type == "cuda"
        pipe = graph(
            self._feeds(batches, todo.columns),
            self.spec,
            todo,
            gpu=gpu,
            batch_size=most,
            num_threads=self.spec.threads,
            device_id=(self.spec.device.index or 0) if gpu else None,
            prefetch_queue_depth=DECODED_AHEAD,
            # All chance is in the plan; a fixed seed keeps DALI's own from mattering.
            seed=0,
        )
        pipe.build()
        return pipe

    def _run(self, pipe: Pipeline, in_flight: Iterable[np.ndarray]) -> tuple[Any, Any]:
        """One batch; DALI's error names no file, so the files of the batches in flight are opened again to find it."""
        try:
            return pipe.run()
        except (RuntimeError, ValueError) as error:
            pairs = [self.spec.pairs[i] for i in dict.fromkeys(int(i) for part in in_flight for i in part)]
            faults = [fault for pair in pairs for fault in (_fault(pair.image), _fault(pair.label)) if fault]
            stems = ", ".join(pair.stem for pair in pairs)
            alone = f"DALI fails on one of {stems} ({_reason(error)}); try --loader reference"
            raise FastsegError("; ".join(faults) or alone) from error

    def _pixels(self, batches: Iterable[Wanted], most: int, todo: Work) -> Iterator[tuple[Any, Any]]:
        """DALI's own lists of images and labels, for batch after batch."""
        in_flight: deque[np.ndarray] = deque()

        def noted() -> Iterator[Wanted]:
            for wanted in batches:
                in_flight.append(wanted.indices)
                yield wanted

        pipe = self.build(noted(), most, todo)
        while True:
            try:
                pixels = self._run(pipe, in_flight)
            except StopIteration:
                return
            self.decoded += len(in_flight.popleft())
            yield pixels

    def train(self, plan: Plan, start: int, rank: int, world: int) -> Iterator[tuple[torch.Tensor, torch.Tensor]]:
        local = len(plan.shard(start, rank, world).indices)
        # DALI's threads wait for one another at the end of each batch, so that small ones are decoded together.
        together = decoded_at_once(local) // local
        ahead: deque[list[View]] = deque()
        todo = work(self.spec, training=True, zooms=plan.scale != 1)

        def wanted() -> Iterator[Wanted]:
            for first in itertools.count(start, together):
                shards = [plan.shard(step, rank, world) for step in range(first, first + together)]
                views = [view for part in shards for view in views_of(part, self.spec)]
                if todo.windowed and self.spec.crop and not todo.resize:
                    views = [seen(view, self.spec.crop) for view in views]
                ahead.append(views)
                indices = np.concatenate([part.indices for part in shards])
                windows = np.array([view.window for view in views], np.int32) if todo.windowed else None
                yield Wanted(indices, windows, np.array([view.size for view in views], np.float32))

        reading: deque[tuple[Any, torch.cuda.Event]] = deque()
        for lists in self._pixels(wanted(), together * local, todo):
            images, labels = (torch.from_dlpack(pixels.as_tensor()) for pixels in lists)
            views = ahead.popleft()
            parts = [views[at : at + local] for at in range(0, len(views), local)]
            for part, some_images, some_labels in zip(
                parts, images.split(local), labels[..., 0].split(local), strict=True
            ):
                yield make_batch(some_images, some_labels, part, self.spec)
            if self.spec.device.type == "cuda":
                # DALI takes its memory back as soon as nobody holds it, whether or not the GPU has read it yet.
                reading.append(((images, labels), torch.cuda.current_stream().record_event()))
                if len(reading) > DECODED_AHEAD:
                    reading.popleft()[1].synchronize()

    def decode(
        self, batches: Iterable[np.ndarray], most: int, *, resize_labels: bool
    ) -> Iterator[tuple[list[torch.Tensor], list[torch.Tensor]]]:
        def wanted() -> Iterator[Wanted]:
            for indices in batches:
                sizes = (fitted(self.spec.headers[i].image_size, self.spec.size, self.spec.fit).size for i in indices)
                yield Wanted(indices, sizes=np.array(list(sizes), np.float32))

        for images, labels in self._pixels(wanted(), most, work(self.spec, resize_labels=resize_labels)):
            yield [torch.from_dlpack(image) for image in images], [torch.from_dlpack(label)[..., 0] for label in labels]
