"""A training run's parts, put together from its configuration or from a checkpoint."""

import dataclasses
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import nn

from fastseg import checkpoint as checkpoints
from fastseg import config as configs
from fastseg.config import Config
from fastseg.data.split import choose as choose_split
from fastseg.data.split import contents, digest
from fastseg.data.stats import Counts, class_weights, count
from fastseg.distributed import World, choose_dtype, join
from fastseg.errors import FastsegError, UsageError, first_line
from fastseg.gradients import traffic
from fastseg.inputs import make_plan, make_spec, open_data
from fastseg.kernels import launch
from fastseg.model import SegNet, initialise, load_weights
from fastseg.optim import Average, lr_scale, make_optimizer, schedule
from fastseg.pipelines.growing import Stage, stages
from fastseg.pipelines.plan import Plan
from fastseg.pipelines.source import DECODED_AHEAD, Spec, choose_loader, decoded_at_once


@dataclass
class Job:
    """Everything that a step needs, and the few things that change from step to step."""

    config: Config
    world: World
    spec: Spec
    loader: str
    val_spec: Spec
    val_loader: str
    plan: Plan
    weights: torch.Tensor  # float32[C]
    pixels: list[int]  # labelled in the training images, by class
    model: SegNet
    wrapped: nn.Module  # the model, under DistributedDataParallel where there are several processes
    optimizer: torch.optim.Optimizer
    scaler: torch.amp.GradScaler
    average: Average | None
    choices: dict[str, str]  # what fastseg chose: "value: why"
    trained_on: dict[str, list[str]]  # "stems" and "contents" of the training images; of rank 0 alone
    left_out: int  # files of the data set without a partner
    loss: torch.Tensor  # this process's, summed since the last log line
    void: torch.Tensor  # int64: steps so far whose labels were all void
    step: int = 0
    best_miou: float | None = None
    stale: int = 0  # validations since the best one
    train_seconds: float = 0.0
    since: int = 0  # the step of the last log line
    skipped: int = 0  # steps so far that the gradient scaler left out
    skipped_in_a_row: int = 0
    scale: float = 1.0  # of the loss, after the last step
    sound: bool = True  # the last loss was a number: nothing says that the weights are wrong
    before: str = ""  # what a resumed run ran on before, where that is not what it runs on now
    other_rate: str = ""  # how a resumed run's learning rate jumps, where it does
    writer: checkpoints.Writer = field(default_factory=checkpoints.Writer)

    @property
    def batch(self) -> int:
        """Images per device and backward pass."""
        return self.plan.batch // (self.world.size * self.config.train.accumulate)

    @property
    def scheme(self) -> str:
        """How the data set was split: "own", or the scheme that drew."""
        return self.choices["split"].partition(":")[0]

    @property
    def total_steps(self) -> int:
        """Optimiser steps of the whole run."""
        steps = self.plan.total_steps(self.config.train.epochs)
        return min(steps, self.config.train.max_steps or steps)

    @property
    def stages(self) -> list[Stage]:
        """The sizes that training images have, step after step."""
        return stages(self.config.train, self.spec.size, self.total_steps)

    @property
    def evaluated(self) -> SegNet:
        """The network that is evaluated: the averaged weights where there are any."""
        return self.average.model if self.average else self.model  # type: ignore[return-value]


def set_up(config: Config, state: dict[str, Any] | None) -> Job:
    """The job of a configuration: new, or where checkpoint `state` left it.

    Raises:
        FastsegError: data or options that cannot be trained on, by name.
    """
    world, device_why = join(config.runtime)
    with world.named_failures():
        return _assemble(config, state, world, device_why)


def _assemble(config: Config, state: dict[str, Any] | None, world: World, device_why: str) -> Job:
    runtime, device = config.runtime, world.device
    dtype, dtype_why = choose_dtype(runtime.dtype, device.type)
    dataset, splits = open_data(config)
    spec, val_spec = (make_spec(config, dataset, splits, s, device=device, dtype=dtype) for s in ("train", "val"))
    loader, loader_why = choose_loader(runtime.loader, spec, epochs=True)
    plan = make_plan(config, len(spec.pairs), world.size)
    # What was batch x processes becomes a number: the run keeps its batches when it goes on with other processes.
    config = dataclasses.replace(config, train=dataclasses.replace(config.train, global_batch=plan.batch))
    kernels, kernels_why = choose_kernels(config, device)
    counts = count_together(spec, world)
    weights = class_weights(counts, config.train.weighting)

    torch.manual_seed(runtime.seed)
    model = SegNet(len(spec.classes.names), config.model.backbone, config.model.depth, fused=kernels == "fused")
    if state is None:
        initialise(model, config.model.init)
    if runtime.sync_bn:
        model = nn.SyncBatchNorm.convert_sync_batchnorm(model)
    model = model.to(device).to(memory_format=torch.channels_last)
    optimizer, optimizer_name, optimizer_why = make_optimizer(model, config.train, device)
    job = Job(
        config=config,
        world=world,
        spec=spec,
        loader=loader,
        val_spec=val_spec,
        val_loader=choose_loader(runtime.loader, val_spec, epochs=True, resize_labels=False)[0],
        plan=plan,
        weights=torch.tensor(weights, dtype=torch.float32, device=device),
        pixels=counts.pixels.tolist(),
        model=model,
        wrapped=model,
        optimizer=optimizer,
        scaler=torch.amp.GradScaler(device.type, enabled=dtype == torch.float16),
        average=Average(model, config.train.ema) if config.train.ema else None,
        choices={
            "split": ": ".join(choose_split(dataset, config.data.split_scheme)),
            "loader": f"{loader}: {loader_why}; {decoding(spec, plan.batch // world.size)}",
            "device": f"{device.type}: {device_why}",
            "dtype": f"{str(dtype).removeprefix('torch.')}: {dtype_why}",
            "kernels": f"{kernels}: {kernels_why}",
            "optimizer": f"{optimizer_name}: {optimizer_why}",
        },
        trained_on=trained_on(spec) if world.is_main else {},
        left_out=len(dataset.problems),
        loss=torch.zeros((), device=device),
        void=torch.zeros((), dtype=torch.int64, device=device),
    )
    if state is not None:
        restore(job, state)
    job.scale = job.scaler.get_scale()
    if len(steps := set(world.gather(job.step))) > 1:
        raise FastsegError(
            f"processes see checkpoints of different steps ({', '.join(f'{step:g}' for step in sorted(steps))}): "
            "give --run in a folder that all machines share"
        )
    job.wrapped = world.wrap(model, config.train.accumulate, runtime.bucket_mib, runtime.compress)
    return job


def trained_on(spec: Spec) -> dict[str, list[str]]:
    """The names of a split's images and what is in their files: `overlap` finds them again, wherever they are."""
    return {"stems": [pair.stem for pair in spec.pairs], "contents": contents(spec.pairs, spec.threads)}


def count_together(spec: Spec, world: World) -> Counts:
    """`count` of a split, each process taking its share of the labels."""
    mine = count(spec.pairs[world.rank :: world.size], spec.classes, spec.threads, unknown=spec.unknown)
    packed = np.array([mine.images, mine.void_pixels, *mine.pixels, *mine.image_pixels])
    images, void, *rest = world.sum(torch.from_numpy(packed).to(spec.device)).tolist()
    pixels, image_pixels = np.array(rest).reshape(2, -1)
    return Counts(images, pixels, image_pixels, void)


def choose_kernels(config: Config, device: torch.device) -> tuple[str, str]:
    """ "fused" or "torch", and why.

    Raises:
        UsageError: what was asked for does not go together.
    """
    runtime = config.runtime
    if runtime.sync_bn and device.type != "cuda":
        raise UsageError("--sync-bn: torch synchronises batch norm between GPUs only; leave it out with --device cpu")
    if runtime.sync_bn:
        if runtime.kernels == "fused":
            raise UsageError("--sync-bn: the fused batch norm is each GPU's own; use --set runtime.kernels=torch")
        kernels, why = "torch", "PyTorch's batch norm can be synchronised"
    else:
        kernels, why = launch.choose(runtime.kernels, device)
    if runtime.deterministic and device.type == "cuda" and kernels == "torch":
        raise UsageError("--deterministic: PyTorch's unpooling and loss on a GPU are not; use runtime.kernels = fused")
    return kernels, why


def decoding(spec: Spec, batch: int) -> str:
    """ "decoding on 2 threads, 2 x 16 images ahead", for a process that takes `batch` images per step."""
    threads = f"{spec.threads} thread{'s' * (spec.threads > 1)}"
    return f"decoding on {threads}, {DECODED_AHEAD} x {decoded_at_once(batch)} images ahead"


def start_block(job: Job, run: Path) -> dict[str, str]:
    """What a run says first: always the same lines in the same order."""
    data, train, model = job.config.data, job.config.train, job.config.model
    files = f"{data.path}, {len(job.spec.pairs)} to train, {len(job.val_spec.pairs)} to validate"
    absent = [name for name, weight in zip(job.spec.classes.names, job.weights.tolist(), strict=True) if weight == 0]
    world = processes(job.world.size, torch.get_num_threads())
    if job.before:
        world += f"; {job.before} before, so that sums are rounded otherwise from here on"
    steps = f"{job.total_steps} = {train.epochs} epochs x {job.plan.steps_per_epoch:g}"
    if job.total_steps == train.max_steps:
        steps = f"{job.total_steps}, as train.max_steps says"
    resumed = f", from step {job.step} on" if job.step else ""
    turned = sum(len(header.turned) for spec in (job.spec, job.val_spec) for header in spec.headers)
    if job.left_out:
        files += f"; {job.left_out} files left out, see `fastseg data check`"
    if turned:
        files += f"; EXIF orientations ({turned}) are not applied"
    scale = lr_scale(train, job.plan.batch)
    scaled = f"x {scale:g} for a batch of {job.plan.batch} ({train.lr_scaling})" if scale != 1 else "not scaled"
    network = f"SegNet, {model.backbone}, depth {model.depth}, init {model.init}"
    seen = "input {}x{}".format(*data.size)
    if len(job.stages) > 1:
        seen = "input {}x{}, ".format(*data.size) + ", ".join(
            "{}x{}".format(*s.size) + f" until step {s.until}" for s in job.stages[:-1]
        )
    if job.spec.crop:
        seen = "trains on {}x{} windows of {}x{}".format(*job.spec.crop, *data.size)
    return {
        "run": str(run),
        "data": files,
        "split": job.choices["split"],
        "model": f"{network}, {seen}",
        "loss": f"cross-entropy, {train.weighting} weights" + (f", 0 for absent {', '.join(absent)}" if absent else ""),
        **job.choices,
        "world": world,
        "batch": f"{job.plan.batch} = {job.world.size} x {job.batch} x {train.accumulate} accumulated",
        "lr": f"{train.lr:g}, {train.schedule}, {scaled}" + (f"; {job.other_rate}" if job.other_rate else ""),
        "steps": f"{steps}{resumed}",
    }


def processes(number: int, threads: int) -> str:
    """ "2 processes, 1 thread each"."""
    return f"{number} process{'es' * (number > 1)}, {threads} thread{'s' * (threads > 1)} each"


def start_event(job: Job) -> dict[str, Any]:
    """The fields of the log's start line."""
    device = job.spec.device
    rows = zip(job.spec.classes.names, job.spec.classes.colors, job.weights.tolist(), job.pixels, strict=True)
    return {
        "data": job.config.data.path,
        "split": {"scheme": job.scheme, "train": len(job.spec.pairs), "val": len(job.val_spec.pairs)},
        "total_steps": job.total_steps,
        "epochs": job.config.train.epochs,
        "batch": job.plan.batch,
        "world": job.world.size,
        **traffic(job.wrapped),
        "device": torch.cuda.get_device_name(device) if device.type == "cuda" else "CPU",
        "dtype": str(job.spec.dtype).removeprefix("torch."),
        "loader": job.loader,
        "kernels": job.choices["kernels"].partition(":")[0],
        "optimizer": job.choices["optimizer"].partition(":")[0],
        "choices": job.choices,
        "classes": [{"name": n, "color": list(c), "weight": w, "pixels": p} for n, c, w, p in rows],
    }


def state_of(job: Job, *, whole: bool = True, losses: Sequence[float] = (0.0,)) -> dict[str, Any]:
    """What a checkpoint holds: all it takes to go on, or (not `whole`) just the evaluated weights.

    Args:
        losses: each process's, summed since the last log line.
    """
    return {
        "step": job.step,
        "model": job.model.state_dict() if whole else job.evaluated.state_dict(),
        "ema": job.average.model.state_dict() if whole and job.average else None,
        "optimizer": {"kind": type(job.optimizer).__name__, "state": job.optimizer.state_dict()} if whole else None,
        "scaler": job.scaler.state_dict() if whole else None,
        "best_miou": job.best_miou,
        "stale": job.stale,
        "train_seconds": job.train_seconds,
        "losses": list(losses),
        "void": int(job.void),
        "skipped": job.skipped,
        "since": job.since,
        "threads": torch.get_num_threads(),
        "world": job.world.size,
        "config": job.config.as_dict(),
        "classes": list(job.spec.classes.names),
        "colors": [list(color) for color in job.spec.classes.colors],
        "digest": digest(job.spec.pairs),
        "trained_on": job.trained_on,
    }


def restore(job: Job, state: dict[str, Any]) -> None:
    """Put a job where the checkpoint left it.

    Raises:
        FastsegError: the training data is not what it was, or the file holds weights alone.
    """
    if state.get("optimizer") is None:
        raise FastsegError("--resume: the checkpoint holds weights alone; resume from last.pt")
    if state.get("digest") != digest(job.spec.pairs):
        raise FastsegError(f"--resume: the training images of {job.config.data.path} have changed since this run began")
    load_weights(job.model, state["model"], "--resume")
    if job.average:
        load_weights(job.average.model, state["ema"] or {}, "--resume, averaged weights")
    try:
        checkpoints.load_optimizer(job.optimizer, state["optimizer"]["state"])
        job.scaler.load_state_dict(state["scaler"])
        best, losses = state["best_miou"], state["losses"]
        job.step, job.best_miou, job.stale = state["step"], best if best is None else float(best), int(state["stale"])
        job.train_seconds, job.since = float(state["train_seconds"]), int(state["since"])
        job.skipped = int(state.get("skipped", 0))  # checkpoints of before 0.1 have neither
        if len(losses) != job.world.size:
            losses = [sum(losses)] + [0.0] * (job.world.size - 1)  # their sum is what is logged
        job.loss.fill_(losses[job.world.rank])
        job.void.fill_(state.get("void", 0))
        before = processes(state["world"], state["threads"])
    except (torch.OutOfMemoryError, torch.AcceleratorError):  # they are RuntimeErrors, and the GPU's
        raise
    except (KeyError, ValueError, TypeError, AttributeError, RuntimeError) as error:
        raise FastsegError(
            f"--resume: last.pt is damaged, or of another fastseg ({first_line(error)}); begin another run"
        ) from None
    if before != processes(job.world.size, torch.get_num_threads()):
        job.before = before
    job.other_rate = other_rate(job, configs.from_dict(state["config"], "--resume"))


def other_rate(job: Job, old: Config) -> str:
    """How the next step's learning rate differs from what the run's old configuration would have given; "" if not."""
    steps = job.plan.total_steps(old.train.epochs)
    steps = min(steps, old.train.max_steps or steps)
    at = job.step - job.skipped
    new, before = (
        schedule(train, total, job.plan.batch)(min(at, total - 1))
        for train, total in ((job.config.train, job.total_steps), (old.train, steps))
    )
    return "" if new == before else f"{new:.2e} from here, where the schedule of {steps} steps was at {before:.2e}"
