"""Batches: the one interface of the data path, and the choice between its tiers.

    for batch in TrainSource(spec, plan): batch.images, batch.labels, batch.indices

Whatever the tier, pixels stay uint8 until the last step, which `normalise` below defines for all tiers: in fp32, cast
once, on the training device. (DALI could normalise in its graph, but has no bf16, and uint8 is a quarter of the bytes
to move.)
"""

import dataclasses
import importlib.util
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from functools import lru_cache
from typing import ClassVar, NamedTuple, Protocol

import numpy as np
import torch

from fastseg.choice import Choice
from fastseg.config import Size
from fastseg.data.classes import UNKNOWN, VOID, ClassMap
from fastseg.data.headers import Header, dali_obstacle
from fastseg.data.layouts import Pair
from fastseg.environment import install
from fastseg.errors import FastsegError, UsageError
from fastseg.kernels.augment import augment, augment_by_slices
from fastseg.pipelines.plan import BatchPlan, Plan, in_order
from fastseg.ranges import annotate

LOADERS = ("auto", "dali", "cache", "reference")
AT_ONCE, DECODED_AHEAD = 16, 2  # images that are decoded together, at least, and how often that is done ahead of need

# ImageNet's mean and standard deviation in 0..255, as torchvision's VGG weights expect their input.
MEAN = (123.675, 116.28, 103.53)
STD = (58.395, 57.12, 57.375)


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
        threads: that decode.
        loader: the tier that reads: dali, cache or reference. `choose_loader` chooses.
    """

    pairs: Sequence[Pair]
    headers: Sequence[Header]
    classes: ClassMap
    size: Size
    device: torch.device
    dtype: torch.dtype
    threads: int
    crop: Size | None = None
    unknown_void: bool = False
    cache_dir: str = ""
    loader: str = "reference"

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
        """True where all files have the network's size already, so that no tier needs to resize."""
        return all(h.image_size == self.size for h in self.headers)


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
    ) -> Iterator[tuple[torch.Tensor, list[torch.Tensor]]]:
        """uint8 images [B, H, W, 3] and labels uint8[h, w] of samples by index, at most `most` at a time."""


def choose_loader(
    requested: str, spec: Spec, *, epochs: bool = False, resize_labels: bool = True
) -> tuple[Spec, Choice]:
    """The spec with the tier that shall read it, and why that one.

    Args:
        epochs: the split is read many times, so that keeping it pays.
        resize_labels: labels are wanted at the network's size.

    Returns:
        A fact of the choice is `obstacle`: why nothing is kept where that was wanted, or None.

    Raises:
        UsageError: the requested tier does not exist or cannot read these files.
    """
    if requested not in LOADERS:
        raise UsageError(f"--loader {requested}: choose one of {', '.join(LOADERS)}")
    if requested == "cache" or (requested == "auto" and (epochs or spec.cache_dir)):
        from fastseg.pipelines.cache import find_room

        fits, where = find_room(spec, resize_labels=resize_labels)
        _, inner = choose_loader("auto", dataclasses.replace(spec, cache_dir=""))
        if fits:
            return _chosen(spec, "cache", f"{where}, filled by {inner.value}")
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
    return torch.tensor(MEAN, device=device), torch.tensor(STD, device=device)


def normalise(images_BHWC: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    """uint8 [B, H, W, 3] -> (x - MEAN) / STD as `dtype` [B, 3, H, W] in channels-last memory."""
    batch, height, width, _ = images_BHWC.shape
    # Rows of 3 W values: over 3 channels alone the inner loops would be too short to be fast.
    mean, std = (constant.repeat(width) for constant in mean_and_std(images_BHWC.device))
    out = images_BHWC.reshape(batch, height, 3 * width).to(torch.float32).sub_(mean).div_(std).to(dtype)
    return out.view(batch, height, width, 3).permute(0, 3, 1, 2)


def unknown_in(labels: torch.Tensor) -> torch.Tensor | int:
    """How many pixels are UNKNOWN, on the labels' device."""
    if labels.device.type == "cpu":
        # NumPy counts on this thread alone; torch's threads would compete with those that decode.
        return int(np.count_nonzero(labels.numpy() == UNKNOWN))
    return (labels == UNKNOWN).sum()


def samples_of(part: BatchPlan, index: np.ndarray | None = None) -> torch.Tensor:
    """int32[B, 4] of a batch's plan, as `augment` takes it: index (by default into the split), mirror, dy, dx."""
    index = part.indices if index is None else index
    # To crop is to move up and left, and to end sooner.
    return torch.from_numpy(np.column_stack([index, part.mirror, part.shift - part.crop]).astype(np.int32))


def augmented(
    images_NHWC: torch.Tensor, labels_NHW: torch.Tensor, samples_B4: torch.Tensor, spec: Spec
) -> tuple[torch.Tensor, torch.Tensor]:
    """A training batch of uint8 pixels on the device: all that changes pixels or their places, in one pass."""
    mean, std = mean_and_std(spec.device)
    work = augment if spec.device.type == "cuda" else augment_by_slices
    with annotate("augment"):
        samples_B4 = samples_B4.to(spec.device)
        return work(images_NHWC, labels_NHW, samples_B4, mean, std, spec.dtype, *(spec.crop or spec.size))


def make_batch(
    images_BHWC: torch.Tensor, labels_BHW: torch.Tensor, part: BatchPlan, spec: Spec
) -> tuple[torch.Tensor, torch.Tensor]:
    """`augmented`, of pixels that are in the order of the plan."""
    return augmented(images_BHWC, labels_BHW, samples_of(part, np.arange(len(part.indices))), spec)


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
    _unknown: torch.Tensor = field(init=False)

    def __post_init__(self) -> None:
        self._tier = make_tier(self.spec)
        self._unknown = torch.zeros((), dtype=torch.int64, device=self.spec.device)

    @property
    def decoded(self) -> int:
        """Images that this process has decoded so far."""
        return self._tier.decoded

    def __iter__(self) -> Iterator[Batch]:
        pixels = self._tier.train(self.plan, self.start, self.rank, self.world)
        for step, (images, labels) in enumerate(pixels, self.start):
            if not self._tier.checks_labels:
                self._unknown += unknown_in(labels)
            yield Batch(images, labels, self.plan.shard(step, self.rank, self.world).indices)

    def check(self) -> None:
        """Raise FastsegError, naming the files, if a label so far held a value outside the class map."""
        if int(self._unknown):
            raise FastsegError(unknown_values(self.spec))


def evaluation_batches(spec: Spec, batch: int, *, resize_labels: bool) -> Iterator[EvaluationBatch]:
    """Each sample once, in order; the last batch may be short. Labels keep their own size unless `resize_labels`."""
    batches = in_order(len(spec.pairs), batch)
    pixels = make_tier(spec).decode(batches, batch, resize_labels=resize_labels)
    unknown = torch.zeros((), dtype=torch.int64, device=spec.device)
    for indices, (images, labels) in zip(batches, pixels, strict=True):
        for label in labels:
            unknown += (label == UNKNOWN).sum()
        yield EvaluationBatch(normalise(images, spec.dtype), labels, indices)
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
