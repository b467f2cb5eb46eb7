"""`fastseg train --dry-run`: how long a run will take and which batches fit, from a few steps of it, before it begins.

Steps are measured with one image, with the batch that is configured, and with twice that; what others take lies on the
line through the two nearest of these. Nothing is written, and the steps train on noise at a learning rate of zero.
"""

import dataclasses
import math
import time
from pathlib import Path
from typing import Any, NamedTuple

import torch

from fastseg.config import Config, Size
from fastseg.environment import available_memory
from fastseg.errors import FastsegError
from fastseg.evaluation import BATCH, score
from fastseg.memory import momenta, peak_bytes
from fastseg.pipelines.growing import plan_phases, work_left
from fastseg.pipelines.source import Spec, TrainSource, choose_loader
from fastseg.runlog import duration
from fastseg.specs import make_plan
from fastseg.training.capture import WARMUP
from fastseg.training.opening import start_block
from fastseg.training.run import Run
from fastseg.training.setup import set_up
from fastseg.training.step import Step

TIMED = {"cpu": 1, "cuda": 10}  # steps, after one that is not
READ = 64  # images whose way from files is timed
MOST = 1024  # the largest batch that the table goes to
OWN = ("run", "world", "batch", "lr", "steps")  # lines of the start block that say what another run would


class Measured(NamedTuple):
    """A step with so many images per device and backward pass: seconds, and the most bytes that tensors take."""

    batch: int
    seconds: float
    memory: float
    measured: bool


def dry_run(config: Config, processes: int) -> dict[str, Any]:
    """What `fastseg train --dry-run --json` prints; figures are of one process that has the machine to itself.

    Raises:
        FastsegError: data or options that cannot be trained on, as a run's would be.
    """
    train, run = config.train, set_up(config, None)
    plan = make_plan(config, run.spec, processes)
    own = plan.batch // (processes * train.accumulate)
    available = free_bytes(run.spec.device)
    size = run.spec.crop or run.spec.size
    rows, largest = measure_all(run.step, size, train.accumulate, sorted({1, own, 2 * own}), available)
    shown = {own, largest} | {2**n for n in range(MOST.bit_length()) if 2**n <= max(largest, own)}
    table = [estimate(rows, batch) for batch in sorted(shown) if batch <= max(MOST, own)]
    mine = estimate(rows, own)

    steps = min(plan.total_steps(train.epochs), train.max_steps or math.inf)
    ends = plan.epoch_ends(train.epochs)
    validations = sum(n == steps or (n < steps and epoch % train.validate_every == 0) for n, epoch in ends.items())
    validation_seconds = validation(run) if validations else 0.0
    images = train.accumulate * processes
    work = work_left(plan_phases(train, run.spec.size, int(steps)), 0, run.spec.size)
    return {
        "start": {name: value for name, value in start_block(run, Path()).items() if name not in OWN},
        "processes": processes,
        "accumulate": train.accumulate,
        "steps": steps,
        "batch": own,
        "batches": [
            {
                "batch": row.batch,
                "step_ms": 1e3 * row.seconds,
                "img_per_s": images * row.batch / row.seconds,
                "memory_bytes": round(row.memory),
                "measured": row.measured,
                "fits": row.batch <= largest,
            }
            for row in table
        ],
        "largest_batch": largest,
        "available_bytes": available,
        "data_img_per_s": reading_speed(run),
        "validations": validations,
        "validation_seconds": validation_seconds,
        "total_seconds": work * mine.seconds + validations * validation_seconds,
    }


def measure_all(
    step: Step, size: Size, accumulate: int, batches: list[int], available: int
) -> tuple[list[Measured], int]:
    """A row for each batch, up to the first that does not fit; and the largest batch that fits.

    Raises:
        FastsegError: not even the first of them fits.
    """
    rows: list[Measured] = []
    for batch in batches:
        if len(rows) > 1 and estimate(rows, batch).memory > available:
            break
        try:
            rows.append(measure(step, size, accumulate, batch))
        except torch.OutOfMemoryError:
            if not rows:
                raise FastsegError(f"--size: the GPU has no room for one image of {size}; use a smaller one") from None
            step.optimizer.zero_grad(set_to_none=True)
            torch.cuda.empty_cache()
            return rows, min(batch - 1, largest_that_fits(rows, available))
    return rows, largest_that_fits(rows, available)


def measure(step: Step, size: Size, accumulate: int, batch: int) -> Measured:
    """A step with so many images per backward pass, timed after one that warms up and one whose memory is watched.

    Raises:
        torch.OutOfMemoryError: a GPU is too small for it.
    """
    device, count = step.world.device, batch * accumulate
    step = dataclasses.replace(step, micro_batch=batch)
    images = torch.randn(count, *size, 3, device=device).to(step.dtype).permute(0, 3, 1, 2)
    labels = torch.randint(len(step.weights), (count, *size), device=device, dtype=torch.uint8)

    def steps(number: int, step: Step = step) -> float:
        start = time.perf_counter()
        for _ in range(number):
            loss = step.step(images, labels, lr=0.0).loss
        loss.item()  # waits for the device
        return (time.perf_counter() - start) / number

    steps(WARMUP + 1 if step.passes else 1)
    held = [*step.model.parameters(), *step.model.buffers(), *momenta(step.optimizer), images, labels]
    if step.average:
        held += [*step.average.model.parameters(), *step.average.model.buffers()]
    # A graph's memory is its own, and as much as that of a step that is not captured.
    memory = peak_bytes(lambda: steps(1, dataclasses.replace(step, passes=None)), held, device)
    return Measured(batch, steps(TIMED[device.type]), memory, measured=True)


def estimate(rows: list[Measured], batch: int) -> Measured:
    """The row of a batch: the measured one, or one on the line through the two nearest; with one row, in proportion."""
    for row in rows:
        if row.batch == batch:
            return row
    if len(rows) == 1:
        return Measured(batch, rows[0].seconds * batch / rows[0].batch, rows[0].memory * batch / rows[0].batch, False)
    low, high = rows[:2] if batch < rows[1].batch else rows[-2:]
    along = (batch - low.batch) / (high.batch - low.batch)
    return Measured(
        batch,
        low.seconds + along * (high.seconds - low.seconds),
        low.memory + along * (high.memory - low.memory),
        measured=False,
    )


def largest_that_fits(rows: list[Measured], available: int) -> int:
    """The largest batch whose memory, by `estimate`, is available; 0 where not even one image fits."""
    low, high = 0, 1
    while high < 2**20 and estimate(rows, high).memory <= available:
        low, high = high, 2 * high
    while high - low > 1:
        middle = (low + high) // 2
        low, high = (middle, high) if estimate(rows, middle).memory <= available else (low, middle)
    return low


def free_bytes(device: torch.device) -> int:
    """What tensors may take: free now, or held by this process."""
    if device.type == "cuda":
        free, _ = torch.cuda.mem_get_info(device)
        return free + torch.cuda.memory_reserved(device)
    return available_memory()


def streamed(spec: Spec) -> Spec:
    """What to read, so that nothing is kept: as the cache tier reads in the first epoch."""
    return choose_loader("auto", dataclasses.replace(spec, cache_dir=""))[0] if spec.tier.keeps else spec


def reading_speed(run: Run) -> float:
    """Images per second of the data path alone, in the first epoch."""
    batches = iter(TrainSource(streamed(run.spec), run.plan))
    next(batches)  # starts threads
    count = max(1, READ // run.plan.batch)
    start = time.perf_counter()
    for _ in range(count):
        next(batches)
    return count * run.plan.batch / (time.perf_counter() - start)


def validation(run: Run) -> float:
    """Seconds of a validation, from one batch of it."""
    spec = streamed(run.val_spec)
    few = dataclasses.replace(spec, pairs=spec.pairs[:BATCH], headers=spec.headers[:BATCH])
    start = time.perf_counter()
    score(run.step.evaluated, few, run.world, fused=run.step.model.fused)
    return (time.perf_counter() - start) * math.ceil(len(run.val_spec.pairs) / BATCH)


def show(document: dict[str, Any]) -> str:
    """The document as text for a terminal."""
    lines = [f"{name:<10} {value}" for name, value in document["start"].items()]
    parts = [document[name] for name in ("processes", "batch", "accumulate")]
    lines.append(f"{'batch':<10} {math.prod(parts)} = {parts[0]} x {parts[1]} x {parts[2]} accumulated\n")
    if document["processes"] > 1:
        lines.append("One process alone, times their number; what they tell one another is left out:")
    lines.append(f"{'batch':>7} {'step':>11} {'img/s':>9} {'memory':>11}")
    for row in document["batches"]:
        notes = ["measured" if row["measured"] else "estimated"]
        notes += ["does not fit"] if not row["fits"] else []
        notes += ["configured"] if row["batch"] == document["batch"] else []
        step, memory = f"{row['step_ms']:.1f} ms", f"{row['memory_bytes'] / 2**20:.0f} MiB"
        lines.append(f"{row['batch']:>7} {step:>11} {row['img_per_s']:>9.1f} {memory:>11}  {', '.join(notes)}")
    lines.append(
        f"\nthe largest batch that fits into {document['available_bytes'] / 2**30:.1f} GiB: {document['largest_batch']}"
    )
    lines.append(f"data path, first epoch: {document['data_img_per_s']:.1f} img/s")
    lines.append(
        f"{document['steps']} steps and {document['validations']} validations of "
        f"{duration(document['validation_seconds'])}: {duration(document['total_seconds'])}, where data keep up"
    )
    return "\n".join(lines)
