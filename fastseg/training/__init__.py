"""The training run: `train` sets it up, goes through its steps and ends it, whatever happens in between."""

import contextlib
from collections.abc import Callable
from pathlib import Path
from typing import Any

from fastseg import checkpoint as checkpoints
from fastseg import config as configs
from fastseg import runs
from fastseg.config import Config
from fastseg.data.split import digest, sizes
from fastseg.distributed import leave
from fastseg.environment import environment
from fastseg.errors import FastsegError, UsageError
from fastseg.runlog import RunLog
from fastseg.specs import refuse_other_data
from fastseg.texts import user_path
from fastseg.training.loop import train_loop
from fastseg.training.opening import start_block, start_event
from fastseg.training.run import Run
from fastseg.training.saving import write_report
from fastseg.training.setup import set_up
from fastseg.training.startup import Startup
from fastseg.training.stopping import Requests
from fastseg.workers import is_main, this_worker


def train(
    config: Config,
    run: str | Path | None = None,
    *,
    resume: bool = False,
    after_step: Callable[[int], None] | None = None,
    began: float | None = None,
) -> dict[str, Any]:
    """Train until the configured epochs are done or patience ends; returns what `fastseg train --json` prints.

    Args:
        config: the whole configuration.
        run: the run folder; a new one in runs/ where none is given, or with `resume` one that `runs.reopen` gave
            `config` for.
        after_step: called between steps with the number of those that are done; the next batch is there then.
        began: when the command began, by `time.perf_counter`, for the log; None: now.

    Raises:
        StoppedError: a signal asked for an end; everything is saved.
        FastsegError: anything about data, options, a diverging loss or lost processes that stops the run.
    """
    startup = Startup(began)
    if run is None and (resume or this_worker()):
        raise UsageError("train: give the run folder; to go on takes it, and several processes share one")
    with contextlib.ExitStack() as last_things:  # each of them happens, whatever becomes of those before
        if run is None:
            run = runs.new_folder(config, "python")
            last_things.callback(runs.forget_unused, run)
        folder = user_path(run)
        last = runs.last_checkpoint(folder)
        if not resume:
            runs.refuse_existing(folder)
        if is_main():
            last_things.enter_context(runs.sole_writer(folder, "--resume: --run" if resume else "--run"))
            if not resume:
                runs.refuse_existing(folder)  # another may have come and gone since
        begun = resume and (folder / "split.json").is_file()
        if begun and configs.read(folder / "config.toml").data.path != config.data.path:
            refuse_other_data(folder, config, "--resume --data")
        state = checkpoints.read(last) if resume and last.is_file() else None
        training = set_up(config, state, startup, reading=True)
        world, progress = training.world, training.progress
        last_things.callback(leave)
        if training.batches:
            last_things.callback(training.batches.close)
        with startup.part("run folder"):
            log = prepare_log(training, folder)
        last_things.callback(log.close)
        last_things.callback(training.writer.join)
        if training.step.passes:
            last_things.callback(training.step.passes.release)
        if not training.finished:
            with world.named_failures(), Requests(world) as requests:
                world.barrier()  # from the start line on, a signal to any of them saves
                log.start(progress.step, start_block(training, folder), **start_event(training))
                if world.threads.warning:
                    log.say(world.threads.warning)
                train_loop(training, folder, log, requests, startup, after_step)
        if not training.sound:
            raise FastsegError(
                f"the loss of the last step is no number: lower train.lr ({config.train.lr:g}) or set train.clip; "
                f"{folder}/checkpoints has what was saved before"
            )
        training.writer.join()  # a run whose last checkpoint is not written has not ended
        img_per_s = progress.step * training.plan.batch / progress.seconds if progress.seconds else None
        figures = {"best_miou": progress.best_miou, "train_seconds": progress.seconds, "img_per_s": img_per_s}
        log.end(progress.step, **figures)
        if world.is_main:
            write_report(folder)
    return {"run": str(folder), "steps": progress.step, **figures}


def prepare_log(run: Run, folder: Path) -> RunLog:
    """Write what a run begins with, or cut its log back to the step it goes on from."""
    if run.world.is_main:
        folder.mkdir(parents=True, exist_ok=True)
        runs.write_text(folder / "config.toml", run.config.dumps())
        runs.write_json(folder / "environment.json", environment())
        split = {"scheme": run.choices["split"].value, "seed": run.config.runtime.seed}
        split |= {"train": run.trained_on["stems"], "val": [pair.stem for pair in run.val_spec.pairs]}
        split |= {"train_contents": run.trained_on["contents"], "digest": digest(run.spec.pairs)}
        split["sizes"] = {"train": sizes(run.spec.pairs), "val": sizes(run.val_spec.pairs)}
        runs.write_json(folder / "split.json", split)
        runs.cut_back(folder, run.progress.step)
    return RunLog(folder, run.progress.step, active=run.world.is_main)
