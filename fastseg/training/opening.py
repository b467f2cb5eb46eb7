"""What a run says first: the start block on the terminal, and the start line of its log."""

from pathlib import Path
from typing import Any

import torch

from fastseg import network as networks
from fastseg.choice import Choice
from fastseg.training.gradients import traffic
from fastseg.training.optim import lr_scale
from fastseg.training.run import Run


def start_block(run: Run, folder: Path) -> dict[str, str]:
    """Always the same lines in the same order."""
    train = run.config.train
    absent = [
        name for name, weight in zip(run.spec.classes.names, run.step.weights.tolist(), strict=True) if not weight
    ]
    world = processes(run.world.size, run.world.threads)
    if run.before:
        world += f"; {run.before} before, so that sums are rounded otherwise from here on"
    steps = f"{run.total_steps} = {train.epochs} epochs x {run.plan.steps_per_epoch:g}"
    if run.total_steps == train.max_steps:
        steps = f"{run.total_steps}, as train.max_steps says"
    scale = lr_scale(train, run.plan.batch)
    scaled = f"x {scale:g} for a batch of {run.plan.batch} ({train.lr_scaling})" if scale != 1 else "not scaled"
    chosen = {name: str(choice) for name, choice in run.choices.items()}
    chosen["loader"] += f"; {decoding(run.choices['loader'])}"
    return {
        "run": str(folder),
        "data": files(run),
        "split": chosen.pop("split"),
        "model": network(run),
        "loss": f"cross-entropy, {train.weighting} weights" + (f", 0 for absent {', '.join(absent)}" if absent else ""),
        **chosen,
        "world": world,
        "batch": f"{run.plan.batch} = {run.world.size} x {run.step.micro_batch} x {train.accumulate} accumulated",
        "lr": f"{train.lr:g}, {train.schedule}, {scaled}" + (f"; {run.other_rate}" if run.other_rate else ""),
        "steps": steps + (f", from step {run.progress.step} on" if run.progress.step else ""),
    }


def files(run: Run) -> str:
    """What is read, and what is left out of it."""
    said = f"{run.config.data.path}, {len(run.spec.pairs)} to train, {len(run.val_spec.pairs)} to validate"
    turned = sum(len(header.turned) for spec in (run.spec, run.val_spec) for header in spec.headers)
    if run.left_out:
        said += f"; {run.left_out} files left out, see `fastseg data check`"
    if run.in_both:
        said += f"; {run.in_both} of those to validate are trained on too, see `fastseg data check`"
    if turned:
        said += f"; EXIF orientations ({turned}) are {'' if run.spec.upright else 'not '}applied"
    return said


def network(run: Run) -> str:
    """The network and the sizes that it sees."""
    size = run.config.data.size
    seen = ", ".join([f"input {size}", *(f"{phase.size} until step {phase.until}" for phase in run.phases[:-1])])
    if run.config.data.fit == "letterbox":
        seen += ", letterboxed"
    if run.spec.crop:
        seen = f"trains on {run.spec.crop} windows of {seen.removeprefix('input ')}"
    if run.spec.window:
        seen = (
            f"trains on {run.spec.window} windows of the files' own pixels, as {size}, not moved; "
            f"validates on whole images, {seen}"
        )
    begun = f" ({run.begun})" if run.begun else ""
    return f"{networks.describe(run.config.model, run.step.model)}{begun}, {seen}"


def decoding(loader: Choice) -> str:
    """ "decoding on 2 threads, 2 x 16 images ahead"."""
    threads, ahead = loader.facts["threads"], loader.facts["ahead"]
    return f"decoding on {threads} thread{'s' * (threads > 1)}, {ahead[0]} x {ahead[1]} images ahead"


def processes(number: int, threads: object) -> str:
    """ "2 processes, 1 thread each"."""
    return f"{number} process{'es' * (number > 1)}, {threads}"


def start_event(run: Run) -> dict[str, Any]:
    """The fields of the log's start line."""
    device, spec = run.spec.device, run.spec
    rows = zip(spec.classes.names, spec.classes.colors, run.step.weights.tolist(), run.pixels, strict=True)
    return {
        "data": run.config.data.path,
        "split": {"scheme": run.choices["split"].value, "train": len(spec.pairs), "val": len(run.val_spec.pairs)},
        "total_steps": run.total_steps,
        "epochs": run.config.train.epochs,
        "batch": run.plan.batch,
        "world": run.world.size,
        **traffic(run.step.wrapped),
        "device": torch.cuda.get_device_name(device) if device.type == "cuda" else "CPU",
        "dtype": run.choices["dtype"].value,
        "loader": spec.loader,
        "kernels": run.choices["kernels"].value,
        "optimizer": run.choices["optimizer"].value,
        "choices": {name: choice.as_dict() for name, choice in run.choices.items()},
        "classes": [{"name": n, "color": list(c), "weight": w, "pixels": p} for n, c, w, p in rows],
    }
