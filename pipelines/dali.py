"""The DALI tier: decode, resize, index, mirror and move in one graph, on the GPU or on the CPU's threads.

The plan enters through `external_source`; nothing in Python touches a pixel. `device="gpu"` decodes with the mixed
decoder and everything after it on the GPU; `device="cpu"` is the same graph without one.
"""

import itertools
from collections import deque
from collections.abc import Iterable, Iterator
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from nvidia.dali import fn, pipeline_def, types
from nvidia.dali.pipeline import DataNode, Pipeline
from PIL import Image

from fastseg.data.classes import VOID, ClassMap
from fastseg.data.decode import decode_image
from fastseg.errors import FastsegError
from fastseg.pipelines.plan import BatchPlan, Plan
from fastseg.pipelines.source import normalise

if TYPE_CHECKING:
    from fastseg.pipelines.source import Spec

PREFETCH = 2


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


def resize_images(images: DataNode, size: tuple[int, int]) -> DataNode:
    """Antialiased bilinear: the definition that `fastseg.pipelines.resize` restates."""
    return fn.resize(images, size=size, interp_type=types.INTERP_LINEAR, antialias=True)


def resize_labels(labels: DataNode, size: tuple[int, int], source_size: DataNode) -> DataNode:
    """Nearest neighbour by the integer rule of `fastseg.pipelines.resize`, whatever the sizes.

    The region is nudged by a quarter of 1/size, so that floating point decides no tie. Columns only, twice, between
    transpositions: DALI's CPU operator multiplies to find a column, but adds up its way down the rows, in fp32, and
    is a row off after some hundred of them (720 -> 540).
    """

    def columns_only(pixels: DataNode, width: int, rows: DataNode, columns: DataNode) -> DataNode:
        nudge = 1 / (4 * width)
        return fn.resize(
            pixels,
            resize_x=width,
            mode="stretch",
            interp_type=types.INTERP_NN,
            roi_start=(0.0, nudge),
            roi_end=fn.stack(rows, columns + nudge),
        )

    def transposed(pixels: DataNode) -> DataNode:
        return fn.transpose(pixels, perm=(1, 0, 2), transpose_layout=False, output_layout="HWC")

    height, width = source_size[0], source_size[1]
    narrow = transposed(columns_only(labels, size[1], height, width))
    return transposed(columns_only(narrow, size[0], types.Constant(float(size[1])), height))


def mirror_and_move(pixels: DataNode, mirror: DataNode, start: DataNode, size: tuple[int, int], fill: int) -> DataNode:
    """Mirror left-right, then cut a window at `start` = -shift; what lies outside becomes `fill`."""
    mirrored = fn.flip(pixels, horizontal=mirror)
    return fn.slice(mirrored, start=start, shape=size, axes=(0, 1), out_of_bounds_policy="pad", fill_values=float(fill))


def columns(spec: "Spec", *, augment: bool, with_resized_labels: bool) -> list[str]:
    """What a graph is fed: file paths, the label files' sizes where they decide a resize, and the plan's draws."""
    resizing = with_resized_labels and not spec.same_size
    return ["image", "label", *(["size"] if resizing else []), *(["mirror", "start"] if augment else [])]


@pipeline_def
def graph(source: Any, spec: "Spec", *, gpu: bool, augment: bool, with_resized_labels: bool) -> tuple[DataNode, ...]:
    """The graph of both devices. `source` yields what `columns` names, in that order."""
    names = columns(spec, augment=augment, with_resized_labels=with_resized_labels)
    fed = dict(zip(names, fn.external_source(source=source, num_outputs=len(names)), strict=True))
    decoder = "mixed" if gpu else "cpu"
    images = fn.decoders.image(
        fn.io.file.read(fed["image"]), device=decoder, output_type=types.RGB, adjust_orientation=False
    )
    labels = fn.decoders.image(
        fn.io.file.read(fed["label"]),
        device=decoder,
        output_type=types.RGB if spec.classes.is_color else types.ANY_DATA,
        adjust_orientation=False,
    )
    if not spec.same_size:
        images = resize_images(images, spec.size)
        if with_resized_labels:
            labels = resize_labels(labels, spec.size, fed["size"])
    # Colours become indices before anything moves: the fill of an uncovered edge is a class index, not a colour.
    labels = to_classes(labels, spec.classes, spec.unknown)
    if augment:
        images = mirror_and_move(images, fed["mirror"], fed["start"], spec.size, 0)
        labels = mirror_and_move(labels, fed["mirror"], fed["start"], spec.size, VOID)
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
    except (OSError, SyntaxError, ValueError, EOFError) as error:
        return f"{path}: cannot be decoded: {error or 'it ends too soon'}"
    return None


class DaliTier:
    """See `fastseg.pipelines.source.Tier`."""

    def __init__(self, spec: "Spec") -> None:
        self.spec = spec

    def _feeds(self, parts: Iterable[BatchPlan], names: list[str]) -> Iterator[tuple[Any, ...]]:
        for part in parts:
            pairs = [self.spec.pairs[i] for i in part.indices]
            feed = {
                "image": [np.frombuffer(p.image.encode(), np.uint8) for p in pairs],
                "label": [np.frombuffer(p.label.encode(), np.uint8) for p in pairs],
                "size": np.array([self.spec.headers[i].label_size for i in part.indices], np.float32),
                "mirror": part.mirror.astype(np.int32),
                "start": -part.shift.astype(np.int32),
            }
            yield tuple(feed[name] for name in names)

    def build(self, parts: Iterable[BatchPlan], batch: int, **kind: bool) -> Pipeline:
        """The pipeline over `parts`, at most `batch` samples each; `kind` is augment and with_resized_labels."""
        gpu = self.spec.device.type == "cuda"
        pipe = graph(
            self._feeds(parts, columns(self.spec, **kind)),
            self.spec,
            gpu=gpu,
            batch_size=batch,
            num_threads=self.spec.threads,
            device_id=(self.spec.device.index or 0) if gpu else None,
            prefetch_queue_depth=PREFETCH,
            # All chance is in the plan; a fixed seed keeps DALI's own from mattering.
            seed=0,
            **kind,
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
            named = (
                "; ".join(faults) or f"DALI fails on one of {', '.join(pair.stem for pair in pairs)} ({_reason(error)})"
            )
            raise FastsegError(f"{named}; mend the file, or try --loader torchvision") from error

    def train(self, plan: Plan, start: int, rank: int, world: int) -> Iterator[tuple[torch.Tensor, torch.Tensor]]:
        parts = (plan.shard(step, rank, world) for step in itertools.count(start))
        local = len(plan.shard(start, rank, world).indices)
        pipe = self.build(parts, local, augment=True, with_resized_labels=True)
        for step in itertools.count(start):
            near = (plan.shard(s, rank, world).indices for s in range(step, step + PREFETCH + 2))
            images, labels = self._run(pipe, near)
            pixels = torch.from_dlpack(images.as_tensor())
            yield normalise(pixels, self.spec.dtype), torch.from_dlpack(labels.as_tensor())[..., 0]

    def decode(
        self, batches: Iterable[np.ndarray], most: int, *, resize_labels: bool
    ) -> Iterator[tuple[torch.Tensor, list[torch.Tensor]]]:
        in_flight: deque[np.ndarray] = deque()

        def parts() -> Iterator[BatchPlan]:
            for indices in batches:
                in_flight.append(indices)
                yield BatchPlan(indices, np.zeros(len(indices), bool), np.zeros((len(indices), 2), np.int32))

        pipe = self.build(parts(), most, augment=False, with_resized_labels=resize_labels)
        while True:
            try:
                images, labels = self._run(pipe, in_flight)
            except StopIteration:
                return
            in_flight.popleft()
            yield torch.from_dlpack(images.as_tensor()), [torch.from_dlpack(label)[..., 0] for label in labels]
