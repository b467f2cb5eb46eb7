"""A training run's parts, put together from its configuration or from a checkpoint."""

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import nn

from fastseg import checkpoint as checkpoints
from fastseg.config import Config
from fastseg.data.split import digest
from fastseg.data.stats import class_weights, count
from fastseg.distributed import World, choose_dtype, join
from fastseg.errors import FastsegError, UsageError
from fastseg.inputs import make_spec, open_data
from fastseg.model import SegNet, initialise
from fastseg.optim import Average, make_optimizer
from fastseg.pipelines.plan import Plan
from fastseg.pipelines.source import Spec, choose_loader


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
    model: SegNet
    wrapped: nn.Module  # the model, under DistributedDataParallel where there are several processes
    optimizer: torch.optim.Optimizer
    scaler: torch.amp.GradScaler
    average: Average | None
    step: int = 0
    best_miou: float | None = None
    stale: int = 0  # validations since the best one
    train_seconds: float = 0.0

    @property
    def evaluated(self) -> SegNet:
        """The network that is evaluated: the averaged weights where there are any."""
        return self.average.model if self.average else self.model  # type: ignore[return-value]


def set_up(config: Config, run: Path, state: dict[str, Any] | None) -> tuple[Job, dict[str, str], dict[str, Any]]:
    """A job, at the step of checkpoint `state` if there is one; the start block; the fields of the start event."""
    world, device_why = join(config.runtime.device, config.runtime.threads)
    device, threads = world.device, torch.get_num_threads()
    dtype, dtype_why = choose_dtype(config.runtime.dtype, device.type)
    dataset, splits = open_data(config)
    spec, val_spec = (make_spec(config, dataset, splits, s, device=device, dtype=dtype) for s in ("train", "val"))
    loader, loader_why = choose_loader(config.runtime.loader, spec)
    counts = count(spec.pairs, spec.classes, threads, unknown=spec.unknown)
    weights = class_weights(counts, config.train.weighting)
    plan = make_plan(config, len(spec.pairs), world.size)

    torch.manual_seed(config.runtime.seed)
    model = SegNet(len(spec.classes.names), config.model.backbone, config.model.depth)
    if state is None:
        initialise(model, config.model.init)
    model = model.to(device, memory_format=torch.channels_last)
    average = Average(model, config.train.ema) if config.train.ema else None
    optimizer, optimizer_name, optimizer_why = make_optimizer(model, config.train, device)
    scaler = torch.amp.GradScaler(device.type, enabled=dtype == torch.float16)
    job = Job(
        config=config,
        world=world,
        spec=spec,
        loader=loader,
        val_spec=val_spec,
        val_loader=choose_loader(config.runtime.loader, val_spec)[0],
        plan=plan,
        weights=torch.tensor(weights, dtype=torch.float32, device=device),
        model=model,
        wrapped=model,
        optimizer=optimizer,
        scaler=scaler,
        average=average,
    )
    if state is not None:
        restore(job, state)
    job.wrapped = world.wrap(model, config.train.accumulate)

    kind, name = (
        str(dtype).removeprefix("torch."),
        torch.cuda.get_device_name(device) if device.type == "cuda" else "CPU",
    )
    total, per_step = plan.total_steps(config.train.epochs), plan.batch
    absent = [n for n, w in zip(spec.classes.names, weights, strict=True) if w == 0]
    choices = {
        "loader": f"{loader}: {loader_why}",
        "device": f"{device.type}: {device_why} ({name}, {world.size} process{'es' * (world.size > 1)}, {threads} threads)",
        "dtype": f"{kind}: {dtype_why}",
        "optimizer": f"{optimizer_name}: {optimizer_why}",
    }
    block = {
        "run": f"{run}",
        "data": f"{config.data.path} ({dataset.layout}), {len(spec.pairs)} to train, {len(val_spec.pairs)} to validate"
        + (f", {len(dataset.problems)} files left out (see `fastseg data check`)" if dataset.problems else ""),
        "split": config.data.split_scheme,
        **choices,
        "model": f"SegNet, {config.model.backbone}, depth {config.model.depth}, init {config.model.init}",
        "loss": f"cross-entropy, weights {config.train.weighting}"
        + (f", 0 for absent {', '.join(absent)}" * bool(absent)),
        "batch": f"{per_step} = {world.size} x {config.train.batch}"
        + (f" x {config.train.accumulate} accumulated" if config.train.accumulate > 1 else ""),
        "steps": f"{total} ({config.train.epochs} epochs of {plan.steps_per_epoch:g})"
        + (f", from step {job.step} on" if job.step else ""),
    }
    rows = zip(spec.classes.names, spec.classes.colors, weights.tolist(), strict=True)
    event = {
        "data": config.data.path,
        "split": {"train": len(spec.pairs), "val": len(val_spec.pairs)},
        "total_steps": total,
        "epochs": config.train.epochs,
        "batch": per_step,
        "world": world.size,
        "device": name,
        "dtype": kind,
        "loader": loader,
        "optimizer": optimizer_name,
        "choices": choices,
        "classes": [{"name": n, "color": list(c), "weight": w} for n, c, w in rows],
    }
    return job, block, event


def make_plan(config: Config, num_samples: int, world: int) -> Plan:
    """The sample plan of a run.

    Raises:
        UsageError: with `drop_remainder`, a batch that is never full.
    """
    batch = config.train.batch * config.train.accumulate * world
    if config.train.drop_remainder and batch > num_samples:
        raise UsageError(
            f"train.batch: {batch} images per step are more than the {num_samples} training images, and "
            "train.drop_remainder drops batches that are not full: use a smaller --batch"
        )
    return Plan(
        num_samples=num_samples,
        batch=batch,
        seed=config.runtime.seed,
        mirror=config.augment.mirror,
        max_shift=config.augment.max_shift(config.data.size),
        drop_remainder=config.train.drop_remainder,
    )


def save(job: Job, path: Path, *, whole: bool = True) -> None:
    """Write a checkpoint: all it takes to go on, or (not `whole`) just the evaluated weights."""
    checkpoints.save(
        path,
        {
            "step": job.step,
            "model": job.model.state_dict() if whole else job.evaluated.state_dict(),
            "ema": job.average.model.state_dict() if whole and job.average else None,
            "optimizer": {"kind": type(job.optimizer).__name__, "state": job.optimizer.state_dict()} if whole else None,
            "scaler": job.scaler.state_dict() if whole else None,
            "best_miou": job.best_miou,
            "stale": job.stale,
            "train_seconds": job.train_seconds,
            "threads": torch.get_num_threads(),
            "config": job.config.as_dict(),
            "classes": list(job.spec.classes.names),
            "colors": [list(color) for color in job.spec.classes.colors],
            "digest": digest(job.spec.pairs),
        },
    )


def restore(job: Job, state: dict[str, Any]) -> None:
    """Put a job where the checkpoint left it.

    Raises:
        FastsegError: the training data is not what it was, or the file holds weights alone.
    """
    if state["optimizer"] is None:
        raise FastsegError("--resume: the checkpoint holds weights alone; resume from last.pt")
    if state["digest"] != digest(job.spec.pairs):
        raise FastsegError(f"--resume: the training images of {job.config.data.path} have changed since this run began")
    job.model.load_state_dict(state["model"])
    if job.average:
        job.average.model.load_state_dict(state["ema"])
    checkpoints.load_optimizer(job.optimizer, state["optimizer"]["state"])
    job.scaler.load_state_dict(state["scaler"])
    job.step, job.best_miou, job.stale = state["step"], state["best_miou"], state["stale"]
    job.train_seconds = state["train_seconds"]
