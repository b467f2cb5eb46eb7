"""The training run: one optimiser step, and the loop around it.

The loss of a step is sum(weight * cross-entropy) / sum(weight) over the global batch: all processes and all backward
passes of the step together, so that neither their number nor accumulation changes the objective.
"""

import contextlib
import math
import resource
import signal
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import nn

from fastseg import checkpoint as checkpoints
from fastseg import runs
from fastseg.config import Config, Train
from fastseg.distributed import leave
from fastseg.environment import environment
from fastseg.errors import FastsegError, StoppedError, UsageError
from fastseg.gradients import BackwardClock, traffic
from fastseg.job import Job, set_up, start_block, start_event, state_of
from fastseg.kernels.cross_entropy import (
    cross_entropy_sum,
    torch_cross_entropy_sum,
    torch_weight_sum,
    weight_sum,
)
from fastseg.optim import schedule
from fastseg.overlays import PANEL_WIDTH, write_sheet
from fastseg.parts import PartsClock
from fastseg.pipelines.growing import GrowingSource, work_left
from fastseg.pipelines.source import Batch
from fastseg.place import place
from fastseg.ranges import stage
from fastseg.runlog import RunLog, now
from fastseg.stopping import Wishes
from fastseg.validation import validate

SAMPLES = 4  # training images that are shown as the network sees them
REPORT_SECONDS = 60.0  # at least, between two reports of a run that goes on
TIMED_LINE = 2  # the log line whose interval is timed part by part: the first has all that warms up
SKIPPED_IN_A_ROW = 20  # steps left out by the gradient scaler that end a run, once its scale is below 1
DATA_BOUND = 0.2  # share of the time waited for data, from which on the log names the cure


def train(
    config: Config,
    run: str | Path | None = None,
    *,
    resume: bool = False,
    after_step: Callable[[int], None] | None = None,
) -> dict[str, Any]:
    """Train until the configured epochs are done or patience ends; returns what `fastseg train --json` prints.

    Args:
        config: the whole configuration.
        run: the run folder; a new one in runs/ where none is given, or with `resume` one that `runs.reopen` gave
            `config` for.
        after_step: called between steps with the number of those that are done; the next batch is there then.

    Raises:
        StoppedError: a signal asked for an end; everything is saved.
        FastsegError: anything about data, options, a diverging loss or lost processes that stops the run.
    """
    began = time.perf_counter()
    if run is None and (resume or place()):
        raise UsageError("train: give the run folder; to go on takes it, and several processes share one")
    with contextlib.ExitStack() as last_things:  # each of them happens, whatever becomes of those before
        if run is None:
            run = runs.new_folder(config, "python")
            last_things.callback(runs.forget_unused, run)
        run = Path(run)
        last = runs.last_checkpoint(run)
        if not resume:
            runs.refuse_existing(run)
        state = checkpoints.read(last) if resume and last.is_file() else None
        job = set_up(config, state)
        last_things.callback(leave)
        log = prepare_log(job, run)
        last_things.callback(log.close)
        last_things.callback(job.writer.join)
        if not finished(job):
            with job.world.named_failures(), Wishes(job.world) as wishes, PartsClock(job.spec.device) as parts:
                job.world.barrier()  # from the start line on, a signal to any of them saves
                log.start(job.step, start_block(job, run), **start_event(job))
                loop(job, run, log, wishes, began, parts, after_step)
        img_per_s = job.step * job.plan.batch / job.train_seconds if job.train_seconds else None
        figures = {"best_miou": job.best_miou, "train_seconds": job.train_seconds, "img_per_s": img_per_s}
        if not job.sound:
            raise FastsegError(
                f"the loss of the last step is no number: lower train.lr ({config.train.lr:g}) or set train.clip; "
                f"{run}/checkpoints has what was saved before"
            )
        job.writer.join()  # a run whose last checkpoint is not written has not ended
        log.end(job.step, **figures)
        if job.world.is_main:
            write_report(run)
    return {"run": str(run), "steps": job.step, **figures}


def write_report(run: Path) -> None:
    """The run's page as its log is now; matplotlib is imported here, since nobody shall wait for it before a step."""
    from fastseg.report import write

    write(run)


def prepare_log(job: Job, run: Path) -> RunLog:
    """Write what a run begins with, or cut its log back to the step it goes on from."""
    if job.world.is_main:
        run.mkdir(parents=True, exist_ok=True)
        runs.write_text(run / "config.toml", job.config.dumps())
        runs.write_json(run / "environment.json", environment())
        stems = {"train": job.trained_on["stems"], "val": [pair.stem for pair in job.val_spec.pairs]}
        split = {"scheme": job.scheme, "seed": job.config.runtime.seed, **stems}
        runs.write_json(run / "split.json", split | {"train_contents": job.trained_on["contents"]})
        runs.cut_back(run, job.step)
    return RunLog(run, job.step, active=job.world.is_main)


def finished(job: Job) -> bool:
    """All steps are done, or patience has run out."""
    patience = job.config.train.patience
    return job.step >= job.total_steps or 0 < patience <= job.stale


def loop(
    job: Job,
    run: Path,
    log: RunLog,
    wishes: Wishes,
    began: float,
    parts: PartsClock,
    after_step: Callable[[int], None] | None,
) -> None:
    """Steps until `finished`, with a log line every few of them, a validation and a checkpoint every few epochs.

    Args:
        began: when the command began to set up, by `time.perf_counter`.
        parts: times one interval, unless `after_step` looks on: a profiler names the same parts.
    """
    train, plan, world = job.config.train, job.plan, job.world
    total, rate = job.total_steps, schedule(train, job.total_steps, plan.batch)
    epoch_ends = {plan.total_steps(epoch): epoch for epoch in range(1, train.epochs + 1)}
    source = GrowingSource(job.spec, plan, job.loader, job.stages, job.config.augment, job.step, world.rank, world.size)
    batches = iter(source)
    batch = next(batches)
    log.event("first_batch", job.step, seconds=time.perf_counter() - began)
    if world.is_main and not job.step:
        few = Batch(batch.images[:SAMPLES], batch.labels[:SAMPLES], batch.indices[:SAMPLES])
        write_sheet(run / "samples.png", few, job.spec, columns=SAMPLES, width=PANEL_WIDTH)
    first, lines, timed_from, waited, started, decoded = job.step, 0, job.step, 0.0, time.perf_counter(), source.decoded
    validation_seconds, saved, warned, reported = 0.0, started, job.loader == "cache", started
    while True:
        lr = rate(job.step - job.skipped)
        # By its second step torch has cut the buckets in which gradients travel from then on.
        clock = BackwardClock(job.wrapped) if world.size > 1 and job.step == first + 1 else None
        with clock or contextlib.nullcontext():
            job.loss += optimise(job, batch, lr)
        job.step += 1
        if clock:
            log.event("buckets", job.step, **traffic(job.wrapped), ready_ms=clock.milliseconds())
        epoch = epoch_ends.get(job.step)

        # The only place where the host waits for the device, but for `take_step` under fp16.
        if epoch or job.step % job.config.runtime.log_every == 0:
            with stage("wait for the device"):
                mean_loss = float(world.sum(job.loss)) / (job.step - job.since)
            seconds = time.perf_counter() - started
            job.train_seconds += seconds
            source.check()
            refuse_divergence(job, mean_loss)
            void = int(job.void)
            images_per_s = (job.step - timed_from) * plan.batch / seconds
            validations = (total - job.step) / plan.steps_per_epoch / train.validate_every
            log.train(
                job.step,
                total=total,
                epochs=train.epochs,
                left=work_left(job.stages, job.step) * plan.batch / images_per_s + validations * validation_seconds,
                epoch=job.step / plan.steps_per_epoch,
                loss=mean_loss if math.isfinite(mean_loss) else None,
                lr=lr,
                img_per_s=images_per_s,
                img_per_s_per_device=images_per_s / world.size,
                data_wait=waited / seconds,
                decoded_per_s=(source.decoded - decoded) / seconds,
                memory_mib=memory_mib(job.spec.device),
                loss_scale=job.scaler.get_scale() if job.scaler.is_enabled() else None,
                void_steps=void,
                skipped_steps=job.skipped,
                seconds=job.train_seconds,
            )
            # The first lines are those in which everything warms up.
            if not warned and job.step - first > 2 * job.config.runtime.log_every and waited / seconds > DATA_BOUND:
                warned = True
                log.say(
                    f"data holds training back: {waited / seconds:.0%} of the time went by waiting for it; "
                    "try --loader cache, `fastseg data prepare` and --cache-dir, or more runtime.threads"
                )
            lines += 1
            if lines == TIMED_LINE - 1 and after_step is None:
                parts.begin()
            elif lines == TIMED_LINE and after_step is None:
                log.event("parts", job.step, steps=job.step - timed_from, total=seconds, seconds=parts.end())
            job.loss.zero_()
            job.since = timed_from = job.step
            waited, started, decoded = 0.0, time.perf_counter(), source.decoded

        if epoch and (epoch % train.validate_every == 0 or job.step == total):
            with stage("validation"):
                scores, best = validate(job, run)
            validation_seconds = time.perf_counter() - started
            summary = scores.summary(job.spec.classes.names)
            summary["confusion"] = scores.confusion.tolist()
            log.val(job.step, epochs=train.epochs, epoch=epoch, best=best, seconds=validation_seconds, **summary)
            with stage("checkpoint"):
                checkpoint(job, run, epoch, log)
            if world.is_main and time.perf_counter() - reported > REPORT_SECONDS:
                try:
                    write_report(run)
                except FastsegError as error:  # training can go on without its page
                    log.say(str(error))
                reported = time.perf_counter()
            started = saved = time.perf_counter()

        if finished(job):
            if not epoch and job.sound:  # max_steps lies inside an epoch
                capture(job, run, log)
            wishes.settle()
            return
        # One clock decides, when it wishes and not when that is done: else the next step would wish for it again.
        due = world.is_main and job.sound and checkpoint_due(train, job.step, time.perf_counter() - saved)
        if due:
            saved = time.perf_counter()
        asked, save = wishes.after_step(due)
        if asked:
            stop(job, run, log, asked)
        if save and job.sound:
            capture(job, run, log)
        before = time.perf_counter()
        with stage("data wait"):
            batch = next(batches)
        waited += time.perf_counter() - before
        if after_step:
            after_step(job.step)


def checkpoint_due(train: Train, step: int, seconds: float) -> bool:
    """Whether it is time for a checkpoint inside an epoch, `seconds` after the one before."""
    steps, minutes = train.checkpoint_steps, train.checkpoint_minutes
    return (steps > 0 and step % steps == 0) or 0 < 60 * minutes <= seconds


def capture(job: Job, run: Path, log: RunLog) -> None:
    """Write last.pt between two validations, while training goes on."""
    job.world.sync_buffers(job.model)
    losses = job.world.gather(float(job.loss))
    refuse_divergence(job, sum(losses))
    if job.world.is_main:
        job.writer.submit(runs.last_checkpoint(run), state_of(job, losses=losses))
    log.event("checkpoint", job.step)


def stop(job: Job, run: Path, log: RunLog, number: int) -> None:
    """Save and end, as a signal asked."""
    name = signal.Signals(number).name
    saved = f"saved after step {job.step}"
    if job.sound:
        capture(job, run, log)
    else:
        saved = f"not saved after step {job.step}, whose loss is no number; the checkpoint before it is kept"
    job.writer.join()
    log.event("stopped", job.step, time=now(), signal=name)
    job.world.barrier()  # a process that ends early would take the one that writes with it
    raise StoppedError(f"{name}: {saved}; go on with: fastseg train --resume --run {run}")


def optimise(job: Job, batch: Batch, lr: float) -> torch.Tensor:
    """One optimiser step on this process's share of the global batch; returns that share's part of the loss."""
    train, fused = job.config.train, job.model.fused
    sum_weights, sum_losses = (weight_sum, cross_entropy_sum) if fused else (torch_weight_sum, torch_cross_entropy_sum)
    with stage("sum of weights"):
        # A batch of only void pixels has weight 0 and cross-entropy 0: its loss is 0, not 0 / 0.
        total = job.world.sum(sum_weights(batch.labels, job.weights))
        job.void += total == 0
        total = total.clamp(min=1e-12)
    statistics = [buffer.clone() for buffer in job.model.buffers()] if job.scaler.is_enabled() else []
    loss = torch.zeros((), device=job.spec.device)
    parts = list(zip(batch.images.split(job.batch), batch.labels.split(job.batch), strict=True))
    for position, (images, labels) in enumerate(parts):
        last = position == len(parts) - 1
        with job.world.gradient_sync(job.wrapped, last):
            autocast = torch.autocast(job.spec.device.type, job.spec.dtype, enabled=job.spec.dtype != torch.float32)
            with stage("forward"), autocast:
                logits = job.wrapped(images)
            with stage("loss"):
                part = sum_losses(logits, labels, job.weights) / total
            with stage("backward"):
                # DistributedDataParallel takes the mean over processes; the parts of the loss are to be summed.
                job.scaler.scale(part * job.world.size).backward()
        loss += part.detach()
    with stage("optimiser"):
        if train.clip:
            job.scaler.unscale_(job.optimizer)
            nn.utils.clip_grad_norm_(job.model.parameters(), train.clip)
        for group in job.optimizer.param_groups:
            group["lr"] = lr
        if take_step(job, loss, statistics) and job.average:
            job.average.update(job.model)
    return loss


def take_step(job: Job, loss: torch.Tensor, statistics: list[torch.Tensor]) -> bool:
    """Let the optimiser make its step; False where the gradient scaler skips it, since gradients were not finite.

    A skipped step leaves no trace: batch norm gets the `statistics` back that it had before, which one infinite value
    would spoil for good. Too large a scale makes gradients infinite, and passes. Where the loss is no number either,
    the weights may be wrong.

    Raises:
        FastsegError: too many in a row: it is not the scale that is wrong.
    """
    job.scaler.step(job.optimizer)
    job.scaler.update()
    job.optimizer.zero_grad(set_to_none=True)
    if not job.scaler.is_enabled():
        return True
    # This waits for the device: whether the step was taken decides the next one's learning rate.
    before, job.scale = job.scale, job.scaler.get_scale()
    job.sound = job.scale >= before or math.isfinite(job.world.sum(loss.clone()))
    if job.scale >= before:
        job.skipped_in_a_row = 0
        return True
    for buffer, kept in zip(job.model.buffers(), statistics, strict=True):
        buffer.copy_(kept)
    job.skipped += 1
    job.skipped_in_a_row += 1
    if job.skipped_in_a_row >= SKIPPED_IN_A_ROW and job.scale < 1:
        raise FastsegError(
            f"{job.skipped_in_a_row} steps in a row had no finite gradients in fp16, whatever the loss scale (now "
            f"{job.scale:g}): lower train.lr ({job.config.train.lr:g}), set train.clip, or use --dtype bf16 or fp32; "
            "best.pt has the best weights so far"
        )
    return False


def checkpoint(job: Job, run: Path, epoch: int, log: RunLog) -> None:
    """Write last.pt, and a copy that stays every `keep_every` epochs.

    Not of weights that may be wrong: the last ones that worked are kept.
    """
    if not job.sound:
        log.say(f"no checkpoint after step {job.step}, whose loss is no number; the one before it is kept")
    elif job.world.is_main:
        job.writer.join()
        state = state_of(job)
        checkpoints.save(runs.last_checkpoint(run), state)
        if job.config.train.keep_every and epoch % job.config.train.keep_every == 0:
            checkpoints.save(run / "checkpoints" / f"epoch-{epoch:04d}.pt", state)


def refuse_divergence(job: Job, loss: float) -> None:
    """Stop a run whose loss is no number any more; under fp16 such steps are skipped, and counted in `optimise`."""
    if math.isfinite(loss) or job.scaler.is_enabled():
        return
    raise FastsegError(
        f"the loss is {loss} at step {job.step}: lower train.lr ({job.config.train.lr:g}) or set train.clip; "
        "best.pt has the best weights so far"
    )


def memory_mib(device: torch.device) -> float:
    """The most memory used so far, in MiB: the device's on a GPU, else this process's."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device) / 2**20
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak / 2**20 if sys.platform == "darwin" else peak / 2**10
