"""The loop: a step, a log line now and then, a validation and checkpoints, and what processes wish for in between."""

import contextlib
import math
import resource
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import torch

from fastseg.config import Size
from fastseg.errors import FastsegError
from fastseg.overlays import PANEL_WIDTH, write_sheet
from fastseg.pipelines.growing import work_left
from fastseg.pipelines.source import Batch
from fastseg.ranges import annotate
from fastseg.runlog import RunLog
from fastseg.training.gradients import BackwardClock, traffic
from fastseg.training.meter import Meter
from fastseg.training.run import Run
from fastseg.training.saving import Saver, write_report
from fastseg.training.setup import warm_up
from fastseg.training.startup import Startup, said
from fastseg.training.stopping import Requests
from fastseg.training.validation import validate

SAMPLES = 4  # training images that are shown as the network sees them
REPORT_SECONDS = 60.0  # at least, between two reports of a run that goes on
SKIPPED_IN_A_ROW = 20  # steps left out by the gradient scaler that end a run, once its scale is below 1
DATA_BOUND = 0.2  # share of the time waited for data, from which on the log names the cure


def train_loop(
    run: Run, folder: Path, log: RunLog, requests: Requests, startup: Startup, after_step: Callable[[int], None] | None
) -> None:
    """Steps until the run is finished, with log lines, validations and checkpoints in between.

    Args:
        startup: what has come before.
        after_step: called between steps with the number of those that are done; the next batch is there then.
    """
    progress, first = run.progress, run.progress.step
    assert run.batches is not None  # the run is not finished
    with startup.part("warm-up"):
        warm_up(run)
    with startup.part("first batch"):
        batch = next(run.batches)
    with startup.part("run folder"):
        show_samples(run, folder, batch)
    saver, rate = Saver(run, folder, log), run.rate
    tell_startup(run, log, startup)
    with Meter(run.source, run.spec.device, first, ranges=after_step is None) as meter:
        while True:
            lr = rate(progress.step - progress.skipped_steps)
            with gradients_timed(run, log) if progress.step == first + 1 else contextlib.nullcontext():
                advance(run, batch, lr)
            tell_captures(run, log)
            if progress.step == first + 1:
                warm_up_later(run, log)

            epoch = run.epoch_ends.get(progress.step)
            # The only place where the host waits for the device, but for a step under fp16.
            if epoch or progress.step % run.config.runtime.log_every == 0:
                log_interval(run, log, meter, lr)
            if epoch and run.validates(epoch):
                end_epoch(run, folder, log, meter, saver, epoch)

            if run.finished:
                if not epoch and run.sound:  # max_steps lies inside an epoch
                    saver.capture()
                requests.settle()
                return
            signal, save = requests.after_step(saver.due())
            if signal:
                saver.stop(signal)
            if save and run.sound:
                saver.capture()
            batch = meter.next(run.batches)
            if after_step:
                after_step(progress.step)


def tell_startup(run: Run, log: RunLog, startup: Startup) -> None:
    """Log and say what the time until the first step went to."""
    total, parts = startup.read()
    log.event("startup", run.progress.step, seconds=total, parts=parts)
    log.say(said(total, parts))


def show_samples(run: Run, folder: Path, batch: Batch) -> None:
    """A picture of the first training images as the network sees them, where the run is new."""
    if run.world.is_main and not run.progress.step:
        few = Batch(batch.images[:SAMPLES], batch.labels[:SAMPLES], batch.indices[:SAMPLES])
        write_sheet(folder / "samples.png", few, run.spec, columns=SAMPLES, width=PANEL_WIDTH)


@contextlib.contextmanager
def gradients_timed(run: Run, log: RunLog) -> Iterator[None]:
    """Log, where gradients travel during backward, when each bucket of them is full in this step.

    It must not be the first of the process: torch has cut the buckets that it stays with by the second.
    """
    if not traffic(run.step.wrapped):
        yield
        return
    with BackwardClock(run.step.wrapped) as clock:
        yield
    log.event("buckets", run.progress.step, **traffic(run.step.wrapped), ready_ms=clock.milliseconds())


def advance(run: Run, batch: Batch, lr: float) -> None:
    """Take a step, and count it.

    Raises:
        FastsegError: too many steps in a row were skipped: it is not the loss scale that is wrong.
    """
    taken, progress = run.step.step(batch.images, batch.labels, lr), run.progress
    run.loss += taken.loss
    run.void += taken.void
    run.sound = taken.sound
    run.skipped_in_a_row = run.skipped_in_a_row + 1 if taken.skipped else 0
    progress.skipped_steps += taken.skipped
    if run.skipped_in_a_row >= SKIPPED_IN_A_ROW and run.step.scale < 1:
        raise FastsegError(
            f"{run.skipped_in_a_row} steps in a row had no finite gradients in fp16, whatever the loss scale (now "
            f"{run.step.scale:g}): lower train.lr ({run.config.train.lr:g}), set train.clip, or use --dtype bf16 or "
            "fp32; best.pt has the best weights so far"
        )
    progress.step += 1


def warm_up_later(run: Run, log: RunLog) -> None:
    """Warm up the sizes to come, once the first step has shown that all is well, and say how long that took."""
    start = time.perf_counter()
    sizes = warm_up(run, later=True)
    if sizes:
        seconds = time.perf_counter() - start
        log.event("warmed_up", run.progress.step, sizes=sizes, seconds=seconds)
        log.say(f"passes of {sizes} image size{'s' * (sizes > 1)} to come warmed up in {seconds:.1f} s")


def tell_captures(run: Run, log: RunLog) -> None:
    """Log what was captured in this step, and say where that is over."""
    if run.step.passes is None:
        return
    captured, failure = run.step.passes.news()
    for shape, seconds, nbytes in captured:
        batch, _, height, width = shape
        facts = {"size": str(Size(height, width)), "batch": batch, "seconds": seconds, "memory_mib": nbytes / 2**20}
        log.event("captured", run.progress.step, **facts)
    if failure:
        log.event("not_captured", run.progress.step, why=failure)
        log.say(f"the step cannot be captured ({failure}): the host asks for each kernel from here on")


def log_interval(run: Run, log: RunLog, meter: Meter, lr: float) -> None:
    """A log line of the interval that ends here, and the beginning of the next one.

    Raises:
        FastsegError: a label holds what it must not, or the loss is no number.
    """
    world, progress, train = run.world, run.progress, run.config.train
    with annotate("wait for the device"):
        loss = float(world.sum(run.loss)) / (progress.step - progress.since)
    interval = meter.read(progress.step)
    progress.seconds += interval.seconds
    meter.source.check()
    run.refuse_divergence(loss)
    progress.void_steps = int(run.void)
    images_per_s = interval.steps * run.plan.batch / interval.seconds
    validations = (run.total_steps - progress.step) / run.plan.steps_per_epoch / train.validate_every
    training_left = work_left(run.phases, progress.step) * run.plan.batch / images_per_s
    scaler = run.step.scaler
    log.train(
        progress.step,
        total=run.total_steps,
        epochs=train.epochs,
        left=training_left + validations * meter.validation_seconds,
        epoch=progress.step / run.plan.steps_per_epoch,
        loss=loss if math.isfinite(loss) else None,
        lr=lr,
        img_per_s=images_per_s,
        img_per_s_per_device=images_per_s / world.size,
        data_wait=interval.data_wait,
        decoded_per_s=interval.decoded_per_s,
        memory_mib=memory_mib(run.spec.device),
        loss_scale=scaler.get_scale() if scaler.is_enabled() else None,
        **progress.logged(),
    )
    if interval.ranges:
        log.event("ranges", progress.step, steps=interval.steps, total=interval.seconds, seconds=interval.ranges)
    # The first lines are those in which everything warms up; a cache waits in its first epoch alone.
    warm = progress.step - meter.first > 2 * run.config.runtime.log_every
    if warm and not meter.warned and not run.spec.tier.keeps and interval.data_wait > DATA_BOUND:
        meter.warned = True
        log.say(
            f"data holds training back: {interval.data_wait:.0%} of the time went by waiting for it; "
            "try --loader cache, `fastseg data prepare` and --cache-dir, or more runtime.threads"
        )
    run.loss.zero_()
    progress.since, progress.losses = progress.step, [0.0]
    meter.restart(progress.step)


def end_epoch(run: Run, folder: Path, log: RunLog, meter: Meter, saver: Saver, epoch: int) -> None:
    """Validation, its line, a checkpoint, and the report now and then."""
    start = time.perf_counter()
    with annotate("validation"):
        scores, best = validate(run, folder)
    meter.validation_seconds = time.perf_counter() - start
    summary = scores.summary(run.spec.classes.names) | {"confusion": scores.confusion.tolist()}
    seconds, epochs = meter.validation_seconds, run.config.train.epochs
    log.val(run.progress.step, epochs=epochs, epoch=epoch, best=best, seconds=seconds, **summary)
    with annotate("checkpoint"):
        saver.checkpoint(epoch)
    if run.world.is_main and time.perf_counter() - saver.reported > REPORT_SECONDS:
        try:
            write_report(folder)
        except FastsegError as error:  # training can go on without its page
            log.say(str(error))
        saver.reported = time.perf_counter()
    meter.restart(run.progress.step)


def memory_mib(device: torch.device) -> float:
    """The most memory used so far, in MiB: the device's on a GPU, else this process's."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device) / 2**20
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak / 2**20 if sys.platform == "darwin" else peak / 2**10
