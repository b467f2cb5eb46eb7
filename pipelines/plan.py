"""The sample plan: everything random about the data, as a pure function of seed and epoch.

Which file is the k-th sample of an epoch, whether it is mirrored, its two shifts, its crop, its scale and its colours
come from here and from nowhere else. The plan knows nothing of workers, threads, GPUs or cache tiers, so shards are
slices, resuming is "start at step s", and all tiers can be compared pixel by pixel.
"""

from dataclasses import dataclass
from functools import lru_cache

import numpy as np

# One counter range of the Philox generator for each quantity, so that a new one never shifts the draws of the others.
MOVES = ("order", "mirror", "shift_y", "shift_x", "crop_y", "crop_x")
ZOOM, COLOURS = ("scale", "place_y", "place_x"), ("brightness", "contrast", "saturation", "hue")
STREAMS = {name: number for number, name in enumerate((*MOVES, *ZOOM, *COLOURS))}
HUE = 36.0  # degrees that a whole share turns hues by


def draw(seed: int, epoch: int, stream: str, count: int) -> np.ndarray:
    """uint64[count] raw words of Philox-4x64 (Salmon et al., "Parallel random numbers: as easy as 1, 2, 3", 2011)."""
    counter = [0, 0, 0, STREAMS[stream]]
    return np.random.Philox(key=np.array([seed, epoch], np.uint64), counter=counter).random_raw(count)


@dataclass(frozen=True)
class EpochPlan:
    """One epoch, a field per quantity, whose row k belongs to its k-th sample, that is to file `order[k]`.

    A sample is mirrored first, then moved, and cropped.

    Attributes:
        order: int64[N].
        mirror: bool[N].
        shift: int32[N, 2], (dy, dx) in pixels; positive values move the content down and to the right.
        crop: int32[N, 2], (y, x) of the top left corner of a window.
        zoom: float64[N, 3]: how many times as large it is shown, and in what part of the room that is left, from 0 to
            below 1, downwards and to the right; [N, 0] where scales are not jittered.
        colour: float64[N, 4]: what brightness, contrast and saturation are multiplied by, and degrees that hues are
            turned by; [N, 0] where colours are not jittered.
    """

    order: np.ndarray
    mirror: np.ndarray
    shift: np.ndarray
    crop: np.ndarray
    zoom: np.ndarray
    colour: np.ndarray


@dataclass(frozen=True, eq=False)
class Rooms:
    """How far a crop may be from the top left corner, for each file: int64[N, 2] (rows, columns).

    One is equal to itself alone, so that nobody compares thousands of files to look up a plan.
    """

    of_files: np.ndarray


@lru_cache(maxsize=4)
def epoch_plan(
    seed: int,
    epoch: int,
    num_samples: int,
    mirror: bool,
    max_shift: tuple[int, int],
    max_crop: tuple[int, int] | Rooms,
    scale: float = 1.0,
    colour: float = 0.0,
) -> EpochPlan:
    """The plan of one epoch; shifts are uniform in -max_shift .. max_shift (rows, columns), crops in 0 .. max_crop.

    Logarithms of scales are uniform between those of 1 / scale and scale, the factors of colours in 1 - colour ..
    1 + colour, and turns of hues in HUE times -colour .. colour.

    The order sorts raw words rather than calling NumPy's `permutation`, whose result NumPy may change (NEP 19).
    """
    order = np.argsort(draw(seed, epoch, "order", num_samples), kind="stable")
    flips = (draw(seed, epoch, "mirror", num_samples) >> np.uint64(63)).astype(bool) & mirror

    def between(stream: str, least: int, most: int | np.ndarray) -> np.ndarray:
        words = draw(seed, epoch, stream, num_samples)
        return (words % np.asarray(most - least + 1, np.uint64)).astype(np.int32) + np.int32(least)

    rooms = max_crop.of_files[order].T if isinstance(max_crop, Rooms) else max_crop
    shift = np.stack([between(f"shift_{axis}", -most, most) for axis, most in zip("yx", max_shift, strict=True)], 1)
    crop = np.stack([between(f"crop_{axis}", 0, most) for axis, most in zip("yx", rooms, strict=True)], 1)
    zoom, colours = np.empty((num_samples, 0)), np.empty((num_samples, 0))

    def uniform(stream: str) -> np.ndarray:
        """In 0 .. 1, without 1: the 53 highest bits."""
        return (draw(seed, epoch, stream, num_samples) >> np.uint64(11)) * 2.0**-53

    if scale != 1:
        factor, *places = map(uniform, ZOOM)
        zoom = np.stack([scale ** (2 * factor - 1), *places], 1)
    if colour:
        each = np.stack([uniform(stream) for stream in COLOURS], 1)
        colours = (1, 1, 1, 0) + colour * (2 * each - 1) * (1, 1, 1, HUE)
    return EpochPlan(order, flips, shift, crop, zoom, colours)


@dataclass(frozen=True)
class BatchPlan:
    """The samples of one batch: indices int64[B] into the split, and what `EpochPlan` says of each of them."""

    indices: np.ndarray
    mirror: np.ndarray
    shift: np.ndarray
    crop: np.ndarray
    zoom: np.ndarray
    colour: np.ndarray


@dataclass(frozen=True, kw_only=True)
class Plan:
    """The endless sequence of batches of one training run.

    Step s takes positions s*B .. s*B+B-1 of the epochs laid end to end (B is the batch of all devices together), so
    batches are always full and none of the images is left out; with `drop_remainder` each epoch ends with its last
    full batch, as in the published baseline. `max_crop` is by how much images are larger than their crops; `scale` and
    `colour` are those of `epoch_plan`.
    """

    num_samples: int
    batch: int
    seed: int
    mirror: bool
    max_shift: tuple[int, int]
    max_crop: tuple[int, int] | Rooms = (0, 0)
    scale: float = 1.0
    colour: float = 0.0
    drop_remainder: bool = False

    @property
    def steps_per_epoch(self) -> float:
        if self.drop_remainder:
            return self.num_samples // self.batch
        return self.num_samples / self.batch

    def total_steps(self, epochs: float) -> int:
        """Batches in that many epochs, at least one."""
        return max(1, round(self.steps_per_epoch * epochs))

    def epoch_ends(self, epochs: int) -> dict[int, int]:
        """{number of steps: epoch that has ended with them}, of so many epochs."""
        return {self.total_steps(epoch): epoch for epoch in range(1, epochs + 1)}

    def global_batch(self, step: int) -> BatchPlan:
        """The whole batch of step `step`, in order."""
        per_epoch = self.num_samples // self.batch * self.batch if self.drop_remainder else self.num_samples
        positions = np.arange(step * self.batch, (step + 1) * self.batch)
        epochs, offsets = np.divmod(positions, per_epoch)
        limits = self.mirror, self.max_shift, self.max_crop, self.scale, self.colour
        parts = []
        for epoch in np.unique(epochs):
            plan = epoch_plan(self.seed, int(epoch), self.num_samples, *limits)
            take = offsets[epochs == epoch]
            parts.append([values[take] for values in vars(plan).values()])
        return BatchPlan(*(np.concatenate(pieces) for pieces in zip(*parts, strict=True)))

    def shard(self, step: int, rank: int, world: int) -> BatchPlan:
        """Rank `rank`'s part of the batch: every `world`-th sample, so shards never overlap or differ in length."""
        return BatchPlan(*(values[rank::world] for values in vars(self.global_batch(step)).values()))


def in_order(num_samples: int, batch: int) -> list[np.ndarray]:
    """Indices for an evaluation: each sample once, in order; the last batch may be short."""
    return [np.arange(start, min(start + batch, num_samples)) for start in range(0, num_samples, batch)]
