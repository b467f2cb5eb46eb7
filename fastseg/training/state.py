"""A run to and from a checkpoint."""

import contextlib
from collections.abc import Iterator
from dataclasses import asdict
from typing import Any

import torch

from fastseg import checkpoint as checkpoints
from fastseg import config as configs
from fastseg.config import Config
from fastseg.data.split import digest
from fastseg.errors import FastsegError, first_line
from fastseg.model import load_weights
from fastseg.training.opening import processes
from fastseg.training.optim import schedule
from fastseg.training.run import Progress, Run, last_step


def state_of(run: Run, *, whole: bool = True) -> dict[str, Any]:
    """What a checkpoint holds: all it takes to go on, or (not `whole`) just the evaluated weights."""
    step = run.step
    optimizer = {"kind": type(step.optimizer).__name__, "state": step.optimizer.state_dict()}
    return {
        "progress": asdict(run.progress),
        "model": step.model.state_dict() if whole else step.evaluated.state_dict(),
        "ema": step.average.model.state_dict() if whole and step.average else None,
        "optimizer": optimizer if whole else None,
        "scaler": step.scaler.state_dict() if whole else None,
        "threads": run.world.threads.decoding,
        "world": run.world.size,
        "config": run.config.as_dict(),
        "classes": list(run.spec.classes.names),
        "colors": [list(color) for color in run.spec.classes.colors],
        "digest": digest(run.spec.pairs),
        "trained_on": run.seen,
    }


@contextlib.contextmanager
def whole_state() -> Iterator[None]:
    """Around what reads a checkpoint's state: where that is not what was kept, it is one line."""
    try:
        yield
    except (torch.OutOfMemoryError, torch.AcceleratorError):  # they are RuntimeErrors, and the GPU's
        raise
    except (KeyError, ValueError, TypeError, AttributeError, RuntimeError) as error:
        raise FastsegError(
            f"--resume: last.pt is damaged, or of another fastseg ({first_line(error)}); begin another run"
        ) from None


def progress_of(state: dict[str, Any] | None) -> Progress:
    """How far a checkpoint's run is; a new run's without one.

    Raises:
        FastsegError: the checkpoint is damaged.
    """
    with whole_state():
        return Progress.from_dict(state["progress"]) if state else Progress()


def restore(run: Run, state: dict[str, Any]) -> None:
    """Put a run where the checkpoint left it.

    Raises:
        FastsegError: the training data is not what it was, or the file holds weights alone.
    """
    step, world = run.step, run.world
    if state.get("optimizer") is None:
        raise FastsegError("--resume: the checkpoint holds weights alone; resume from last.pt")
    if state.get("digest") != digest(run.spec.pairs):
        raise FastsegError(f"--resume: the training images of {run.config.data.path} have changed since this run began")
    load_weights(step.model, state["model"], "--resume")
    if step.average:
        load_weights(step.average.model, state["ema"] or {}, "--resume, averaged weights")
    with whole_state():
        checkpoints.load_optimizer(step.optimizer, state["optimizer"]["state"])
        step.scaler.load_state_dict(state["scaler"])
        step.scale = step.scaler.get_scale()
        run.progress = progress_of(state)
        losses = run.progress.losses
        if len(losses) != world.size:
            losses = [sum(losses)] + [0.0] * (world.size - 1)  # their sum is what is logged
        run.loss.fill_(losses[world.rank])
        run.void.fill_(run.progress.void_steps)
        before = state["world"], state["threads"]
    if before != (world.size, world.threads.decoding):
        run.before = processes(before[0], f"{before[1]} thread{'s' * (before[1] > 1)} each")
    run.other_rate = other_rate(run, configs.from_dict(state["config"], "--resume"))


def other_rate(run: Run, old: Config) -> str:
    """How the next step's learning rate differs from what the run's old configuration would have given; "" if not."""
    steps = last_step(old, run.plan)
    at = run.progress.step - run.progress.skipped_steps
    new, before = (
        schedule(train, total, run.plan.batch)(min(at, total - 1))
        for train, total in ((run.config.train, run.total_steps), (old.train, steps))
    )
    return "" if new == before else f"{new:.2e} from here, where the schedule of {steps} steps was at {before:.2e}"
