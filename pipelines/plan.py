"""The sample plan: everything random about the data, as a pure function of seed and epoch.

Which file is the k-th sample of an epoch, whether it is mirrored, and its two shifts come from here and from nowhere
else. The plan knows nothing of workers, threads, GPUs or cache tiers, so shards are slices, resuming is "start at step
s", and all tiers can be compared pixel by pixel.
"""

from dataclasses import dataclass
from functools import lru_cache

import numpy as np

# One counter range of the Philox generator for each quantity, so that a new one never shifts the draws of the others.
STREAMS = {"order": 0, "mirror": 1, "shift_y": 2, "shift_x": 3}


def draw(seed: int, epoch: int, stream: str, count: int) -> np.ndarray:
    """uint64[count] raw words of Philox-4x64 (Salmon et al., "Parallel random numbers: as easy as 1, 2, 3", 2011)."""
    counter = [0, 0, 0, STREAMS[stream]]
    return np.random.Philox(key=np.array([seed, epoch], np.uint64), counter=counter).random_raw(count)


@dataclass(frozen=True)
class EpochPlan:
    """One epoch, a field per quantity: order int64[N], mirror bool[N], shift int32[N, 2].

    `mirror[k]` and `shift[k]` belong to the k-th sample of the epoch, that is file `order[k]`. A sample is mirrored
    first and then moved by shift = (dy, dx) pixels; positive values move the content down and to the right.
    """

    order: np.ndarray
    mirror: np.ndarray
    shift: np.ndarray


@lru_cache(maxsize=4)
def epoch_plan(seed: int, epoch: int, num_samples: int, mirror: bool, max_shift: tuple[int, int]) -> EpochPlan:
    """The plan of one epoch; shifts are uniform in -max_shift .. max_shift pixels (rows, columns).

    The order sorts raw words rather than calling NumPy's `permutation`, whose result NumPy may change (NEP 19).
    """
    order = np.argsort(draw(seed, epoch, "order", num_samples), kind="stable")
    flips = (draw(seed, epoch, "mirror", num_samples) >> np.uint64(63)).astype(bool) & mirror
    shifts = [
        (draw(seed, epoch, stream, num_samples) % np.uint64(2 * most + 1)).astype(np.int32) - most
        for stream, most in (("shift_y", max_shift[0]), ("shift_x", max_shift[1]))
    ]
    return EpochPlan(order, flips, np.stack(shifts, axis=1).astype(np.int32))


@dataclass(frozen=True)
class BatchPlan:
    """The samples of one batch: indices int64[B] into the split, mirror bool[B], shift int32[B, 2] as (dy, dx)."""

    indices: np.ndarray
    mirror: np.ndarray
    shift: np.ndarray


@dataclass(frozen=True, kw_only=True)
class Plan:
    """The endless sequence of batches of one training run.

    Step s takes positions s*B .. s*B+B-1 of the epochs laid end to end (B is the batch of all devices together), so
    batches are always full and none of the images is left out; with `drop_remainder` each epoch ends with its last
    full batch, as in the published baseline.
    """

    num_samples: int
    batch: int
    seed: int
    mirror: bool
    max_shift: tuple[int, int]
    drop_remainder: bool = False

    @property
    def steps_per_epoch(self) -> float:
        if self.drop_remainder:
            return self.num_samples // self.batch
        return self.num_samples / self.batch

    def total_steps(self, epochs: float) -> int:
        """Batches in that many epochs, at least one."""
        return max(1, round(self.steps_per_epoch * epochs))

    def global_batch(self, step: int) -> BatchPlan:
        """The whole batch of step `step`, in order."""
        per_epoch = self.num_samples // self.batch * self.batch if self.drop_remainder else self.num_samples
        positions = np.arange(step * self.batch, (step + 1) * self.batch)
        epochs, offsets = np.divmod(positions, per_epoch)
        indices, mirror, shift = [], [], []
        for epoch in np.unique(epochs):
            part = epoch_plan(self.seed, int(epoch), self.num_samples, self.mirror, self.max_shift)
            take = offsets[epochs == epoch]
            indices.append(part.order[take])
            mirror.append(part.mirror[take])
            shift.append(part.shift[take])
        return BatchPlan(np.concatenate(indices), np.concatenate(mirror), np.concatenate(shift))

    def shard(self, step: int, rank: int, world: int) -> BatchPlan:
        """Rank `rank`'s part of the batch: every `world`-th sample, so shards never overlap or differ in length."""
        whole = self.global_batch(step)
        return BatchPlan(whole.indices[rank::world], whole.mirror[rank::world], whole.shift[rank::world])


def in_order(num_samples: int, batch: int) -> list[np.ndarray]:
    """Indices for an evaluation: each sample once, in order; the last batch may be short."""
    return [np.arange(start, min(start + batch, num_samples)) for start in range(0, num_samples, batch)]
