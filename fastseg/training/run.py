"""What a training run is: data, plan, network and choices, and how far it has come."""

import dataclasses
import functools
import math
from collections.abc import Callable, Generator, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch

from fastseg.checkpoint import Writer
from fastseg.choice import Choice
from fastseg.config import Config
from fastseg.distributed import World
from fastseg.errors import FastsegError
from fastseg.pipelines.growing import GrowingSource, Phase
from fastseg.pipelines.plan import Plan
from fastseg.pipelines.source import Batch, Spec
from fastseg.training.optim import schedule
from fastseg.training.step import Step

LOGGED = {"logged": True}  # fields of `Progress` that stand in each log line


@dataclass
class Progress:
    """How far a run is: exactly what its checkpoints keep of that. A new counter is a field here."""

    step: int = 0
    since: int = 0  # the step of the last log line
    seconds: float = field(default=0.0, metadata=LOGGED)  # of training
    void_steps: int = field(default=0, metadata=LOGGED)  # whose labels were all void, when they were last counted
    skipped_steps: int = field(default=0, metadata=LOGGED)  # that the gradient scaler left out
    best_miou: float | None = None
    stale: int = 0  # validations since the best one
    losses: list[float] = field(default_factory=lambda: [0.0])  # each process's, summed since the last log line

    def logged(self) -> dict[str, float]:
        """The fields that a log line has."""
        return {f.name: getattr(self, f.name) for f in dataclasses.fields(self) if f.metadata}

    @classmethod
    def from_dict(cls, values: dict[str, Any]) -> "Progress":
        """What a checkpoint has kept.

        Raises:
            KeyError, TypeError, ValueError: it is not what was kept.
        """
        kept = {f.name: values[f.name] for f in dataclasses.fields(cls)}
        for f in dataclasses.fields(cls):
            if f.type in (int, float):
                kept[f.name] = f.type(kept[f.name])
        best, losses = kept["best_miou"], kept["losses"]
        return cls(**kept | {"best_miou": best if best is None else float(best), "losses": [float(x) for x in losses]})


def last_step(config: Config, plan: Plan) -> int:
    """Optimiser steps of a whole run."""
    steps = plan.total_steps(config.train.epochs)
    return min(steps, config.train.max_steps or steps)


@dataclass
class Run:
    """Everything that training needs beside its folder.

    Attributes:
        batches: of the source, from the next step on, where it reads already.
        pixels: labelled in the training images, by class.
        choices: what fastseg chose, by the name of its line in the start block.
        trained_on: "stems" and "contents" of the training images; of rank 0 alone.
        seen: the same, with the images that its first weights were trained on.
        begun: what a run that begins with a checkpoint's weights took of it, in words.
        left_out: files of the data set that have no partner.
        in_both: images that are both trained on and validated, as far as that is cheap to tell; of rank 0 alone.
        loss: this process's, summed since the last log line, on the device.
        void: steps whose labels were all void, int64 on the device.
        skipped_in_a_row: steps that the gradient scaler left out since the last that it let pass.
        sound: the last loss was a number: nothing says that the weights are wrong.
        before: what a resumed run ran on before, where that is not what it runs on now.
        other_rate: how a resumed run's learning rate jumps, where it does.
    """

    config: Config
    world: World
    spec: Spec
    val_spec: Spec
    plan: Plan
    source: GrowingSource
    batches: Generator[Batch] | None
    step: Step
    pixels: list[int]
    choices: dict[str, Choice]
    trained_on: dict[str, list[str]]
    seen: dict[str, list[str]]
    begun: str
    left_out: int
    in_both: int
    loss: torch.Tensor
    void: torch.Tensor
    progress: Progress = field(default_factory=Progress)
    skipped_in_a_row: int = 0
    sound: bool = True
    before: str = ""
    other_rate: str = ""
    writer: Writer = field(default_factory=Writer)

    @property
    def total_steps(self) -> int:
        """Optimiser steps of the whole run."""
        return last_step(self.config, self.plan)

    @property
    def phases(self) -> Sequence[Phase]:
        """The sizes that training images have, step after step."""
        return self.source.phases

    @property
    def rate(self) -> Callable[[int], float]:
        """The learning rate of a step."""
        return schedule(self.config.train, self.total_steps, self.plan.batch)

    @property
    def finished(self) -> bool:
        """All steps are done, or patience has run out."""
        patience = self.config.train.patience
        return self.progress.step >= self.total_steps or 0 < patience <= self.progress.stale

    @functools.cached_property
    def epoch_ends(self) -> dict[int, int]:
        """See `Plan.epoch_ends`."""
        return self.plan.epoch_ends(self.config.train.epochs)

    def refuse_divergence(self, loss: float) -> None:
        """Raise FastsegError where the loss is no number any more; under fp16 such steps are skipped, and counted."""
        if not math.isfinite(loss) and not self.step.scaler.is_enabled():
            raise FastsegError(
                f"the loss is {loss} at step {self.progress.step}: lower train.lr ({self.config.train.lr:g}) or set "
                "train.clip; best.pt has the best weights so far"
            )

    def validates(self, epoch: int | None) -> bool:
        """Whether the run is validated now that `epoch` has ended; None inside of one."""
        return epoch is not None and (
            epoch % self.config.train.validate_every == 0 or self.progress.step == self.total_steps
        )
