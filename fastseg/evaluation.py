"""Evaluation: one confusion matrix over a whole split, and the protocol that makes its scores mean something."""

import dataclasses
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from torch import nn

from fastseg import checkpoint as checkpoints
from fastseg import config as configs
from fastseg.config import Config
from fastseg.data.split import digest
from fastseg.distributed import World, choose_dtype, join
from fastseg.errors import FastsegError, UsageError
from fastseg.inputs import make_spec, open_data
from fastseg.kernels import launch
from fastseg.kernels.confusion import confusion, torch_confusion
from fastseg.metrics import Scores
from fastseg.pipelines.source import Spec, choose_loader, evaluation_batches

# The network always sees batches of this shape, the last one padded: convolution kernels, and with them the last bits,
# change with the batch size, and the same images must give the same counts.
BATCH = 8


@torch.inference_mode()
def outputs(
    network: nn.Module, spec: Spec, loader: str, *, at: str
) -> Iterator[tuple[int, torch.Tensor, torch.Tensor]]:
    """(index, scores [1, C, h, w], label uint8[1, H, W]) of each sample in order; the network is in evaluation mode.

    Args:
        at: "original" for the label file's own size, "network" for labels resized to the network's.
    """
    for batch in evaluation_batches(spec, loader, BATCH, resize_labels=at == "network"):
        missing = BATCH - len(batch.images)
        images = F.pad(batch.images, (0, 0, 0, 0, 0, 0, 0, missing)).contiguous(memory_format=torch.channels_last)
        with torch.autocast(spec.device.type, spec.dtype, enabled=spec.dtype != torch.float32):
            logits = network(images)
        for index, score, label in zip(batch.indices.tolist(), logits, batch.labels, strict=False):
            yield index, score[None], label[None]


def score(
    network: nn.Module,
    spec: Spec,
    loader: str,
    world: World,
    *,
    at: str = "original",
    keep: int = 0,
    fused: bool = False,
) -> tuple[Scores, list[tuple[int, np.ndarray]]]:
    """Scores over the split, each process taking its share, and the first `keep` predictions of this process.

    A label pixel's prediction is the class whose score is highest there, after bilinear resizing (half-pixel centres).
    """
    num_classes = len(spec.classes.names)
    share = slice(world.rank, None, world.size)
    mine = dataclasses.replace(spec, pairs=spec.pairs[share], headers=spec.headers[share])
    counts = torch.zeros(num_classes, num_classes, dtype=torch.int64, device=spec.device)
    count = confusion if fused else torch_confusion
    kept, was_training = [], network.training
    network.eval()
    for index, scores, label in outputs(network, mine, loader, at=at) if mine.pairs else ():
        prediction = torch.empty_like(label) if index < keep else None
        count(counts, scores, label, prediction)
        if prediction is not None:
            kept.append((index * world.size + world.rank, prediction[0].cpu().numpy()))
    network.train(was_training)
    return Scores(world.sum(counts).cpu().numpy()), kept


def protocol(config: Config, spec: Spec, split: str, loader: str, kernels: str, at: str) -> dict:
    """What a score needs beside it to be compared with another."""
    return {
        "data": config.data.path,
        "split": split,
        "split_scheme": config.data.split_scheme,
        "images": len(spec.pairs),
        "digest": digest(spec.pairs),
        "classes": len(spec.classes.names),
        "input": "{}x{}".format(*spec.size),
        "labels": "at their own resolution" if at == "original" else "resized to the input (nearest)",
        "upsampling": "bilinear scores, then argmax",
        "void": "ignored",
        "device": spec.device.type,
        "dtype": str(spec.dtype).removeprefix("torch."),
        "loader": loader,
        "kernels": kernels,
    }


def evaluate(
    checkpoint: str | Path,
    *,
    data: str | None = None,
    split: str = "val",
    at: str = "original",
    changes: dict | None = None,
) -> dict:
    """Scores of a checkpoint on a split: the document that `fastseg eval --json` prints.

    Args:
        data: another data set than the run's.
        at: "original" or "network": the resolution of the labels.
        changes: {"section.field": value} laid over the run's configuration, such as runtime.device.

    Raises:
        FastsegError: the checkpoint cannot be read, or the data has other classes than the network.
    """
    if at not in ("original", "network"):
        raise UsageError(f"--at {at}: choose original or network")
    state = checkpoints.read(Path(checkpoint))
    changes = {**(changes or {}), **({"data.path": data} if data else {})}
    config = configs.override(configs.from_dict(state["config"], str(checkpoint)), changes)
    world, _ = join(config.runtime)
    dtype, _ = choose_dtype(config.runtime.dtype, world.device.type)
    dataset, splits = open_data(config)
    if list(dataset.classes.names) != state["classes"]:
        raise FastsegError(
            f"{dataset.root}: its classes ({', '.join(dataset.classes.names)}) are not those of {checkpoint} "
            f"({', '.join(state['classes'])})"
        )
    spec = make_spec(config, dataset, splits, split, device=world.device, dtype=dtype)
    loader, _ = choose_loader(config.runtime.loader, spec, resize_labels=at == "network")
    kernels, _ = launch.choose(config.runtime.kernels, world.device)
    network = checkpoints.build_model(state).to(world.device)
    network.fused = kernels == "fused"
    with world.named_failures():
        scores, _ = score(network, spec, loader, world, at=at, fused=network.fused)
    return {
        **scores.summary(dataset.classes.names),
        "confusion": scores.confusion.tolist(),
        "protocol": protocol(config, spec, split, loader, kernels, at)
        | {"step": state["step"], "averaged": bool(state["ema"])},
    }
