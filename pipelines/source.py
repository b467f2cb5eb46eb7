"""Batches: the one interface of the data path, and the choice between its tiers.

    for batch in TrainSource(spec, plan): batch.images, batch.labels, batch.indices

Whatever the tier, pixels stay uint8 until the last step, which `normalise` below defines for all tiers: in fp32, cast
once, on the training device. (DALI could normalise in its graph, but has no bf16, and uint8 is a quarter of the bytes
to move.)
"""

import dataclasses
import importlib.util
from collections.abc import Callable, Generator, Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from functools import lru_cache
from typing import Any, ClassVar, NamedTuple, Protocol

import numpy as np
import torch

from fastseg.choice import Choice
from fastseg.config import Size
from fastseg.data.classes import UNKNOWN, VOID, ClassMap
from fastseg.data.headers import Header, dali_obstacle
from fastseg.data.layouts import Pair
from fastseg.environment import install
from fastseg.errors import FastsegError, UsageError
from fastseg.kernels.augment import augment, augment_by_slices, normalise_in_place
from fastseg.pipelines.colour import colour_matrices
from fastseg.pipelines.fit import View, centred
from fastseg.pipelines.plan import Plan, in_order
from fastseg.ranges import annotate

LOADERS = ("auto", "dali", "cache", "reference")
AT_ONCE, DECODED_AHEAD = 16, 2  # images that are decoded together, at least, and how often that is done ahead of need

# ImageNet's mean and standard deviation in 0..255, as torchvision's VGG weights expect their input.
MEAN = (123.675, 116.28, 103.53)
STD = (58.395, 57.12, 57.375)
MEAN_AND_STD = np.array((MEAN, STD), np.float32)


class Batch(NamedTuple):
    """To train on: images [B, 3, H, W] channels-last, normalised; labels uint8[B, H, W]; indices into the split."""

    images: torch.Tensor
    labels: torch.Tensor
    indices: np.ndarray


class EvaluationBatch(NamedTuple):
    """To evaluate: as `Batch`, but labels are a list of uint8[H, W], each of its file's own size."""

    images: torch.Tensor
    labels: list[torch.Tensor]
    indices: np.ndarray


@dataclass(frozen=True, kw_only=True)
class Spec:
    """What a source reads and what it makes of it.

    Attributes:
        size: (height, width) that files are resized to.
        crop: (height, width) of training batches where they are windows of that; their places are the plan's.
        window: (height, width) of what a training sample shows of its file's own pixels, which is resized to `size`;
            None: all of the file. Its place is the plan's.
        fit: how files become `size`: see `fastseg.pipelines.fit`.
        upright: images and labels are turned as their EXIF orientation says.
        threads: that decode.
        loader: the tier that reads: dali, cache or reference. `choose_loader` chooses.
        resized: False leaves images and labels at their files' own sizes.
        keep: (height, width) at which a cache keeps samples; None: their files' own. `choose_loader` chooses.
    """

    pairs: Sequence[Pair]
    headers: Sequence[Header]
    classes: ClassMap
    size: Size
    device: torch.device
    dtype: torch.dtype
    threads: int
    crop: Size | None = None
    window: Size | None = None
    fit: str = "squeeze"
    upright: bool = False
    unknown_void: bool = False
    cache_dir: str = ""
    loader: str = "reference"
    resized: bool = True
    keep: Size | None = None

    @property
    def tier(self) -> type["Tier"]:
        """The tier of that name; DALI is imported only where it is used."""
        if self.loader == "dali":
            from fastseg.pipelines.dali import DaliTier

            return DaliTier
        if self.loader == "cache":
            from fastseg.pipelines.cache import CacheTier

            return CacheTier
        from fastseg.pipelines.reference import ReferenceTier

        return ReferenceTier

    @property
    def unknown(self) -> int:
        """What a label value outside the class map becomes."""
        return VOID if self.unknown_void else UNKNOWN

    @property
    def same_size(self) -> bool:
        """True where no tier needs to resize: all files have the network's size already, or keep their own."""
        return not self.resized or all(h.image_size == self.size for h in self.headers)


def decoded_at_once(batch: int) -> int:
    """Images that are decoded together where batches of that size are wanted: whole batches."""
    return -(-AT_ONCE // batch) * batch


class Tier(Protocol):
    """A way to get pixels onto the device.

    Attributes:
        keeps: what is decoded once is there for later epochs.
        checks_labels: decoding raises where a label has a value outside the class map.
    """

    keeps: ClassVar[bool]
    checks_labels: ClassVar[bool]

    def __init__(self, spec: Spec) -> None: ...

    @property
    def decoded(self) -> int:
        """Images that it has decoded so far, and given out or kept."""

    def train(self, plan: Plan, start: int, rank: int, world: int) -> Iterator[tuple[torch.Tensor, torch.Tensor]]:
        """Normalised images [B, 3, H, W], mirrored and moved, and labels uint8[B, H, W], for step after step."""

    def decode(
        self, batches: Iterable[np.ndarray], most: int, *, resize_labels: bool
    ) -> Iterator[tuple[list[torch.Tensor], list[torch.Tensor]]]:
        """Images uint8[H, W, 3] and labels uint8[h, w] of samples by index, at most `most` at a time."""


def choose_loader(
    requested: str, spec: Spec, *, epochs: bool = False, resize_labels: bool = True, grows: bool = False
) -> tuple[Spec, Choice]:
    """The spec with the tier that shall read it, and why that one.

    Args:
        epochs: the split is read many times, so that keeping it pays.
        resize_labels: labels are wanted at the network's size.
        grows: the run wants images in several sizes, or at several scales.

    Returns:
        A fact of the choice is `obstacle`: why nothing is kept where that was wanted, or None.

    Raises:
        UsageError: the requested tier does not exist or cannot read these files.
    """
    if requested not in LOADERS:
        raise UsageError(f"--loader {requested}: choose one of {', '.join(LOADERS)}")
    if requested == "cache" or (requested == "auto" and (epochs or spec.cache_dir)):
        from fastseg.pipelines.cache import find_room

        kept, where = find_room(spec, resize_labels=resize_labels, grows=grows)
        _, inner = choose_loader("auto", dataclasses.replace(spec, cache_dir=""))
        if kept:
            return _chosen(kept, "cache", f"{where}, filled by {inner.value}")
        return _chosen(spec, inner.value, f"no cache, since {where}; {inner.why}", obstacle=where)
    if requested == "reference":
        return _chosen(spec, requested, "as asked")
    missing = importlib.util.find_spec("nvidia.dali") is None if importlib.util.find_spec("nvidia") else True
    obstacle = "DALI is not installed" if missing else dali_obstacle(spec.pairs, spec.headers, spec.classes.is_color)
    if obstacle is None:
        nearly = spec.device.type == "cuda" and any(header.jpeg for header in spec.headers)
        how = "(JPEGs by nvJPEG, whose pixels differ a little)" if nearly else "exactly"
        why = "as asked" if requested == "dali" else f"DALI is installed and reads these files {how}"
        return _chosen(spec, "dali", why)
    if requested == "dali":
        cure = f"{install('dali')} (Linux)" if missing else "use --loader reference"
        raise UsageError(f"--loader dali: {obstacle}; {cure}")
    return _chosen(spec, "reference", obstacle)


def _chosen(spec: Spec, loader: str, why: str, obstacle: str | None = None) -> tuple[Spec, Choice]:
    return dataclasses.replace(spec, loader=loader), Choice(loader, why, {"obstacle": obstacle})


def make_tier(spec: Spec) -> Tier:
    """The tier that reads it."""
    return spec.tier(spec)


@lru_cache
def mean_and_std(device: torch.device) -> tuple[torch.Tensor, torch.Tensor]:
    """MEAN and STD as float32[3] on a device."""
    mean, std = torch.from_numpy(MEAN_AND_STD).to(device)
    return mean, std


@lru_cache
def runs_on(threads: int) -> Callable[..., Iterable[Any]]:
    """`map`, on so many threads that work on pixels; they sleep where there are none."""
    return ThreadPoolExecutor(threads, "fastseg-pixels").map if threads > 1 else map


def normalise(
    images: Sequence[torch.Tensor], dtype: torch.dtype, threads: int = 1, size: Size | None = None
) -> torch.Tensor:
    """uint8[H, W, 3], of one size -> (x - MEAN) / STD as `dtype` [B, 3, H, W] in channels-last memory.

    Args:
        threads: that do it, on a CPU.
        size: (height, width) of the batch, in whose middle images lie that are smaller, with black around them.
    """
    size = size or Size(*images[0].shape[:2])
    whole = all(image.shape[:2] == size for image in images)
    if images[0].device.type == "cpu":
        out = torch.empty(len(images), *size, 3)

        def one(number: int) -> None:
            pixels, image = out[number].numpy(), images[number].numpy()
            if image.shape[:2] != size:
                pixels.fill(0)
            pixels[centred(image.shape, size).slices] = image
            normalise_in_place(pixels, *MEAN_AND_STD)

        for _ in runs_on(threads)(one, range(len(images))):
            pass
    else:
        mean, std = mean_and_std(images[0].device)
        stacked = torch.stack(list(images)) if whole else images[0].new_zeros(len(images), *size, 3)
        for pixels, image in zip(stacked, images, strict=True) if not whole else ():
            pixels[centred(image.shape, size).slices] = image
        out = stacked.to(torch.float32).sub_(mean).div_(std)
    return out.to(dtype).permute(0, 3, 1, 2)


def unknown_in(labels: torch.Tensor) -> torch.Tensor | int:
    """How many pixels are UNKNOWN, on the labels' device."""
    if labels.device.type == "cpu":
        # NumPy counts on this thread alone; torch's threads would compete with those that decode.
        return int(np.count_nonzero(labels.numpy() == UNKNOWN))
    return (labels == UNKNOWN).sum()


def colours_of(views: Sequence[View]) -> np.ndarray | None:
    """float32[B, 12]: what becomes of the colours of each view, see `colour_matrices`; None where they stay."""
    colours = [view.colour for view in views if view.colour is not None]
    return colour_matrices(np.array(colours), MEAN) if colours else None


def on_cpu(
    sample: Callable[[int], tuple[np.ndarray, np.ndarray]], views: Sequence[View], spec: Spec
) -> tuple[torch.Tensor, torch.Tensor]:
    """A training batch on the CPU, each sample on one of the spec's threads: see `augment_by_slices`.

    Args:
        sample: gives image and label by number, of the view's size.
    """
    moves = [view.move for view in views]
    with annotate("augment"):
        mean, std = MEAN_AND_STD
        height, width = spec.crop or spec.size
        given = sample, moves, mean, std, spec.dtype, height, width, runs_on(spec.threads)
        return augment_by_slices(*given, colours_of(views))


def on_gpu(
    images: torch.Tensor, labels: torch.Tensor, places_B3: np.ndarray, views: Sequence[View], spec: Spec
) -> tuple[torch.Tensor, torch.Tensor]:
    """A training batch on the GPU, in one pass of one kernel: see `augment`.

    Args:
        images, labels: uint8, the bytes in which samples lie.
        places_B3: int64[B, 3]: where the window of each sample's image begins in them, and of its label; the width of
            what it is a window of.
    """
    sizes, targets, moves = (
        np.array(each, np.int64) for each in zip(*((v.window.size, v.size, v.move) for v in views), strict=True)
    )
    colours = colours_of(views)
    samples = torch.from_numpy(np.column_stack([places_B3[:, :2], sizes, places_B3[:, 2], targets, moves]))
    mean, std = mean_and_std(spec.device)
    with annotate("augment"):
        given = images, labels, to_device(samples, spec.device), mean, std, spec.dtype
        matrices = None if colours is None else to_device(torch.from_numpy(colours), spec.device)
        return augment(*given, *(spec.crop or spec.size), bool((sizes != targets).any()), matrices)


def to_device(tensor: torch.Tensor, device: torch.device) -> torch.Tensor:
    """A copy on a GPU that nobody waits for: from pinned memory, which PyTorch keeps until it is done."""
    return tensor if device.type == "cpu" else tensor.pin_memory().to(device, non_blocking=True)


def make_batch(
    images_BHWC: torch.Tensor, labels_BHW: torch.Tensor, views: Sequence[View], spec: Spec
) -> tuple[torch.Tensor, torch.Tensor]:
    """A training batch of uint8 pixels on the device, in the order of the plan; none is resized any more.

    Args:
        images_BHWC, labels_BHW: a view's pixels are the top left ones, of its size.
    """
    if spec.device.type == "cpu":
        images, labels = images_BHWC.numpy(), labels_BHW.numpy()

        def sample(number: int) -> tuple[np.ndarray, np.ndarray]:
            height, width = views[number].size
            return images[number, :height, :width], labels[number, :height, :width]

        return on_cpu(sample, views, spec)
    batch, height, width = labels_BHW.shape
    number = np.arange(batch) * height * width
    places = np.column_stack([3 * number, number, np.full(batch, width)])
    return on_gpu(images_BHWC, labels_BHW, places, [view.resized() for view in views], spec)


@dataclass
class TrainSource:
    """Endless training batches from step `start` on, for shard `rank` of `world`.

    Counts label pixels outside the class map on the device; `check` reads the count, which waits for the device.
    """

    spec: Spec
    plan: Plan
    start: int = 0
    rank: int = 0
    world: int = 1
    _tier: Tier = field(init=False)
    _unknown: torch.Tensor | int = field(init=False, default=0)

    def __post_init__(self) -> None:
        self._tier = make_tier(self.spec)

    @property
    def decoded(self) -> int:
        """Images that this process has decoded so far."""
        return self._tier.decoded

    def __iter__(self) -> Generator[Batch]:
        pixels = self._tier.train(self.plan, self.start, self.rank, self.world)
        for step, (images, labels) in enumerate(pixels, self.start):
            if not self._tier.checks_labels:
                self._unknown = self._unknown + unknown_in(labels)
            yield Batch(images, labels, self.plan.shard(step, self.rank, self.world).indices)

    def check(self) -> None:
        """Raise FastsegError, naming the files, if a label so far held a value outside the class map."""
        if int(self._unknown):
            raise FastsegError(unknown_values(self.spec))


def evaluation_batches(spec: Spec, batch: int, *, resize_labels: bool) -> Iterator[EvaluationBatch]:
    """Each sample once, in order; the last batch may be short. Labels keep their own size unless `resize_labels`."""
    batches = in_order(len(spec.pairs), batch)
    pixels = make_tier(spec).decode(batches, batch, resize_labels=resize_labels)
    unknown: torch.Tensor | int = 0
    for indices, (images, labels) in zip(batches, pixels, strict=True):
        unknown = unknown + sum(map(unknown_in, labels))
        size = spec.size if spec.resized else None
        yield EvaluationBatch(normalise(images, spec.dtype, spec.threads, size), labels, indices)
    if int(unknown):
        raise FastsegError(unknown_values(spec))


def unknown_values(spec: Spec) -> str:
    """One line that names the first label file with a value outside the class map, the value and its pixel count."""
    from fastseg.data.check import off_map

    for pair in spec.pairs:
        found = off_map(pair.label, spec.classes)
        if found:
            return f"{pair.label}: {found}"
    return "labels changed while they were read: values outside the class map were seen and are gone"
