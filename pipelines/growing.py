"""Progressive resizing: a run that begins with small images, of which a step costs a fraction, and ends with full ones.

Howard, "Training Imagenet in 3 hours for 25 minutes" (fast.ai, 2018). Batch norm's statistics settle at the last size,
which must be the one that is evaluated.
"""

import dataclasses
import itertools
from collections.abc import Iterator, Sequence
from typing import NamedTuple

from fastseg.config import Augment, Size, Train
from fastseg.pipelines.plan import Plan
from fastseg.pipelines.source import Batch, Spec, TrainSource, choose_loader


class Stage(NamedTuple):
    """Steps before `until` see images of `size` (height, width)."""

    until: int
    size: Size


def stages(train: Train, size: Size, total_steps: int) -> list[Stage]:
    """The sizes of a run: `train.grow_from` of `size`, halfway from there, each for half of the growth, and `size`."""
    found: list[Stage] = []
    for number, scale in enumerate((train.grow_from, (train.grow_from + 1) / 2), 1):
        until = round(total_steps * train.grow_share * number / 2)
        if scale < 1 and (found[-1].until if found else 0) < until < total_steps:
            found.append(Stage(until, Size(*(max(1, round(side * scale)) for side in size))))
    return [*found, Stage(total_steps, size)]


def work_left(parts: Sequence[Stage], step: int, size: Size | None = None) -> float:
    """How many steps at `size` (None: that of the next step) take as long as all that are left.

    A step's time goes with its pixels.
    """
    left, before = 0.0, step
    height, width = size or next((stage.size for stage in parts if step < stage.until), parts[-1].size)
    for stage in parts:
        if stage.until > before:
            left += (stage.until - before) * stage.size[0] * stage.size[1] / (height * width)
            before = stage.until
    return left


class GrowingSource:
    """`TrainSource`s one after the other, each with images of its stage's size.

    Args:
        spec: of the full size; a tier that keeps samples keeps them in each size, where there is room for that.
        augment: whose shifts follow the size.
    """

    def __init__(
        self, spec: Spec, plan: Plan, parts: Sequence[Stage], augment: Augment, start: int = 0, rank: int = 0,
        world: int = 1,
    ) -> None:  # fmt: skip
        self.spec, self.plan, self.parts, self.augment = spec, plan, parts, augment
        self.start, self.rank, self.world = start, rank, world
        self._sources: list[TrainSource] = []

    @property
    def decoded(self) -> int:
        """Images that this process has decoded so far."""
        return sum(source.decoded for source in self._sources)

    def __iter__(self) -> Iterator[Batch]:
        start = self.start
        for number, stage in enumerate(self.parts):
            last = number == len(self.parts) - 1
            if start >= stage.until and not last:
                continue
            spec, plan = self.spec, self.plan
            if stage.size != spec.size:
                spec = dataclasses.replace(spec, size=stage.size)
                plan = dataclasses.replace(plan, max_shift=self.augment.max_shift(stage.size))
                spec = choose_loader(spec.loader, spec)[0] if spec.tier.keeps else spec
            self._sources.append(TrainSource(spec, plan, start, self.rank, self.world))
            yield from itertools.islice(self._sources[-1], None if last else stage.until - start)
            start = stage.until

    def check(self) -> None:
        """See `TrainSource.check`."""
        for source in self._sources:
            source.check()
