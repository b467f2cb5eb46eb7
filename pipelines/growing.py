"""Progressive resizing: a run that begins with small images, of which a step costs a fraction, and ends with full ones.

Howard, "Training Imagenet in 3 hours for 25 minutes" (fast.ai, 2018). Batch norm's statistics settle at the last size,
which must be the one that is evaluated.
"""

import contextlib
import dataclasses
import itertools
from collections.abc import Generator, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import NamedTuple

import torch

from fastseg.config import Augment, Size, Train
from fastseg.pipelines.plan import Plan
from fastseg.pipelines.source import Batch, Spec, TrainSource, choose_loader


class Phase(NamedTuple):
    """Steps before `until` see images of `size` (height, width)."""

    until: int
    size: Size


def plan_phases(train: Train, size: Size, total_steps: int) -> list[Phase]:
    """The sizes of a run: `train.grow_from` of `size`, halfway from there, each for half of the growth, and `size`."""
    found: list[Phase] = []
    for number, scale in enumerate((train.grow_from, (train.grow_from + 1) / 2), 1):
        until = round(total_steps * train.grow_share * number / 2)
        if scale < 1 and (found[-1].until if found else 0) < until < total_steps:
            found.append(Phase(until, Size(*(max(1, round(side * scale)) for side in size))))
    return [*found, Phase(total_steps, size)]


def work_left(phases: Sequence[Phase], step: int, size: Size | None = None) -> float:
    """How many steps at `size` (None: that of the next step) take as long as all that are left.

    A step's time goes with its pixels.
    """
    left, before = 0.0, step
    height, width = size or next((phase.size for phase in phases if step < phase.until), phases[-1].size)
    for phase in phases:
        if phase.until > before:
            left += (phase.until - before) * phase.size[0] * phase.size[1] / (height * width)
            before = phase.until
    return left


class GrowingSource:
    """`TrainSource`s one after the other, each with images of its phase's size.

    Args:
        spec: of the full size; where a cache keeps resized samples, it keeps those of each size that has room.
        augment: whose shifts follow the size.
    """

    def __init__(
        self, spec: Spec, plan: Plan, phases: Sequence[Phase], augment: Augment, start: int = 0, rank: int = 0,
        world: int = 1,
    ) -> None:  # fmt: skip
        self.spec, self.plan, self.phases, self.augment = spec, plan, phases, augment
        self.start, self.rank, self.world = start, rank, world
        self._sources: list[TrainSource] = []

    def begin(self) -> Generator[Batch]:
        """The batches, of which the first is being made from now on, on a thread of its own."""
        batches = iter(self)

        def first() -> Batch:
            if self.spec.device.type == "cuda":
                torch.cuda.set_device(self.spec.device)  # each thread has a GPU of its own, the first one unless told
            return next(batches)

        pool = ThreadPoolExecutor(1, "fastseg-first")
        begun = pool.submit(first)
        pool.shutdown(wait=False)

        def taken() -> Generator[Batch]:
            with contextlib.closing(batches):
                yield begun.result()
                yield from batches

        return taken()

    @property
    def decoded(self) -> int:
        """Images that this process has decoded so far."""
        return sum(source.decoded for source in self._sources)

    def __iter__(self) -> Generator[Batch]:
        start = self.start
        for number, phase in enumerate(self.phases):
            last = number == len(self.phases) - 1
            if start >= phase.until and not last:
                continue
            spec, plan = self.spec, self.plan
            if phase.size != spec.size:
                spec = dataclasses.replace(spec, size=phase.size)
                plan = dataclasses.replace(plan, max_shift=self.augment.max_shift(phase.size))
                if spec.keep is not None:  # else one store serves all sizes
                    spec = choose_loader(spec.loader, spec)[0]
            self._sources.append(TrainSource(spec, plan, start, self.rank, self.world))
            yield from itertools.islice(self._sources[-1], None if last else phase.until - start)
            start = phase.until

    def check(self) -> None:
        """See `TrainSource.check`."""
        for source in self._sources:
            source.check()
