"""Evaluation: a confusion matrix for each image of a split, their sum's scores, and the protocol that they mean
something by.
"""

import csv
import dataclasses
import itertools
import warnings
from collections.abc import Collection, Iterator, Mapping
from operator import itemgetter
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from torch import nn

from fastseg import checkpoint as checkpoints
from fastseg import config as configs
from fastseg.boundary import boundary_f1
from fastseg.config import Config
from fastseg.data.split import choose as choose_split
from fastseg.data.split import digest, overlap
from fastseg.data.stats import all_void
from fastseg.distributed import World, choose_dtype, join
from fastseg.errors import FastsegError, UsageError
from fastseg.kernels import launch
from fastseg.kernels.confusion import confusion, torch_confusion
from fastseg.metrics import Comparison, Scores, bootstrap, compare, interval, miou_of, null_if_nan
from fastseg.network import admit
from fastseg.pipelines.fit import covered
from fastseg.pipelines.source import Spec, choose_loader, evaluation_batches
from fastseg.runs import checkpoint_of, whole
from fastseg.specs import make_spec, open_data
from fastseg.texts import shown, user_path
from fastseg.tiles import Picture, Tiling, blended, tiling_of

# The network always sees batches of this shape, the last one padded: convolution kernels, and with them the last bits,
# change with the batch size, and the same images must give the same counts.
BATCH = 8

# What must be equal for two scores to be compared; a network's own input and precision may differ.
COMPARED = ("digest", "split", "split_scheme", "trained_on", "classes", "labels", "upsampling", "void", "tta")
# Beside those of the section `data`: what a run's configuration may have otherwise where its network is evaluated.
KEYS_THAT_COUNT = {
    f"runtime.{name}"
    for name in (
        "seed",
        "device",
        "dtype",
        "loader",
        "cache_dir",
        "kernels",
        "threads",
        "deterministic",
        "collective_timeout",
    )
}
TTA = ("none", "mirror")


class Counted(NamedTuple):
    """What an evaluation saw, image by image in the order of the split.

    Attributes:
        confusions: int64[N, C, C].
        boundaries: float64[N, C], boundary F1; None where that was not asked for.
        kept: (index, prediction uint8[h, w]) of the first images of this process.
    """

    confusions: np.ndarray
    boundaries: np.ndarray | None
    kept: list[tuple[int, np.ndarray]]

    @property
    def scores(self) -> Scores:
        """Of all images together."""
        return Scores(self.confusions.sum(0))


class Mirrored(nn.Module):
    """Test-time augmentation: the mean of a network's class probabilities for an image and for its mirror image."""

    def __init__(self, network: nn.Module) -> None:
        super().__init__()
        self.network = network

    def forward(self, images_BCHW: torch.Tensor) -> torch.Tensor:
        there = self.network(images_BCHW).float().softmax(1)
        back = self.network(images_BCHW.flip(-1).contiguous(memory_format=torch.channels_last))
        return (there + back.flip(-1).float().softmax(1)) / 2


@torch.inference_mode()
def outputs(
    network: nn.Module, spec: Spec, *, at: str, tiling: Tiling | None = None
) -> Iterator[tuple[int, torch.Tensor, torch.Tensor]]:
    """(index, scores [1, C, h, w], label uint8[1, H, W]) of each sample in order; the network is in evaluation mode.

    Args:
        at: "original" for the label file's own size, "network" for labels resized to the network's.
        tiling: take images at their own size, in tiles: each sample comes in strips, from top to bottom.
    """

    def scored(images: torch.Tensor) -> torch.Tensor:
        with torch.autocast(spec.device.type, spec.dtype, enabled=spec.dtype != torch.float32):
            return network(images)

    if tiling:
        labels: dict[int, torch.Tensor] = {}
        for index, top, strip in blended(_pictures(spec, labels), tiling, scored, BATCH, pad=True):
            bottom = top + strip.shape[1]
            yield index, strip[None], labels[index][None, top:bottom]
            if bottom == len(labels[index]):
                del labels[index]
        return
    for batch in evaluation_batches(spec, BATCH, resize_labels=at == "network"):
        missing = BATCH - len(batch.images)
        images = F.pad(batch.images, (0, 0, 0, 0, 0, 0, 0, missing)).contiguous(memory_format=torch.channels_last)
        for index, score, label in zip(batch.indices.tolist(), scored(images), batch.labels, strict=False):
            yield index, covered(score[None], spec.headers[index].image_size, spec.size, spec.fit), label[None]


def _pictures(spec: Spec, labels: dict[int, torch.Tensor]) -> Iterator[Picture]:
    """The images of a spec at their own sizes, one after another; each one's label is in `labels` by then."""
    for batch in evaluation_batches(dataclasses.replace(spec, resized=False), 1, resize_labels=False):
        index, image = int(batch.indices[0]), batch.images[0]
        labels[index] = batch.labels[0]
        yield Picture.of(index, image)


def score(
    network: nn.Module,
    spec: Spec,
    world: World,
    *,
    at: str = "original",
    keep: int = 0,
    fused: bool = False,
    boundaries: bool = False,
    tiling: Tiling | None = None,
) -> Counted:
    """The confusion matrix of each image, each process taking its share, and the first `keep` predictions of this one.

    A label pixel's prediction is the class whose score is highest there, after bilinear resizing (half-pixel centres).

    Args:
        boundaries: the boundary F1 score of each image too.
        tiling: images at their own size, in tiles of that, by a tier that keeps nothing.
    """
    num_classes, device = len(spec.classes.names), spec.device
    share = slice(world.rank, None, world.size)
    mine = dataclasses.replace(spec, pairs=spec.pairs[share], headers=spec.headers[share])
    counts = torch.zeros(len(spec.pairs), num_classes, num_classes, dtype=torch.int64, device=device)
    contours = torch.zeros(len(spec.pairs), num_classes, dtype=torch.float64, device=device)
    count = confusion if fused else torch_confusion
    kept, was_training = [], network.training
    network.eval()
    found = outputs(network, mine, at=at, tiling=tiling) if mine.pairs else ()
    for index, parts in itertools.groupby(found, key=itemgetter(0)):
        place = index * world.size + world.rank
        wanted: list[tuple[torch.Tensor, torch.Tensor]] = []  # label and prediction of each part
        for _, scores, label in parts:
            prediction = torch.empty_like(label) if boundaries or index < keep else None
            count(counts[place], scores, label, prediction)
            if prediction is not None:
                wanted.append((label[0], prediction[0]))
        if wanted:
            whole_label, whole_prediction = (torch.cat(rows) for rows in zip(*wanted, strict=True))
            if boundaries:
                contours[place] = boundary_f1(whole_label, whole_prediction, num_classes)
            if index < keep:
                kept.append((place, whole_prediction.cpu().numpy()))
    network.train(was_training)
    summed = world.sum(contours).cpu().numpy() if boundaries else None
    return Counted(world.sum(counts).cpu().numpy(), summed, kept)


def protocol(
    config: Config,
    spec: Spec,
    split: str,
    scheme: str,
    seen: int,
    kernels: str,
    at: str,
    tta: str,
    tiling: Tiling | None = None,
) -> dict:
    """What a score needs beside it to be compared with another.

    Args:
        seen: how many of the images the network was trained on.
    """
    return {
        "data": config.data.path,
        "split": split,
        "split_scheme": scheme,
        "images": len(spec.pairs),
        "trained_on": seen,
        "digest": digest(spec.pairs),
        "classes": len(spec.classes.names),
        "input": str(tiling.tile if tiling else spec.size),
        "tiles": f"{tiling.tile} of images at their own size, overlapping by {tiling.overlap}" if tiling else "none",
        "fit": "none" if tiling else spec.fit,
        "exif": "applied" if spec.upright else "ignored",
        "labels": "at their own resolution" if at == "original" else "resized to the input (nearest)",
        "upsampling": "none, scores blended by a Gaussian, then argmax" if tiling else "bilinear scores, then argmax",
        "void": "ignored",
        "tta": tta,
        "device": spec.device.type,
        "dtype": str(spec.dtype).removeprefix("torch."),
        "loader": spec.loader,
        "kernels": kernels,
    }


def evaluate(
    checkpoint: str | Path,
    *,
    data: str | None = None,
    split: str = "val",
    at: str = "original",
    tta: str = "none",
    allow_overlap: bool = False,
    changes: dict | None = None,
    network: str | Collection[str] = (),
    tile: str | tuple[int, int] | None = None,
    tile_overlap: int | None = None,
) -> dict:
    """Scores of a checkpoint on a split: the document that `fastseg eval --json` prints.

    Args:
        data: another data set than the run's.
        at: "original" or "network": the resolution of the labels.
        tta: "none", or "mirror": see `Mirrored`.
        allow_overlap: score images that the network was trained on, too; the protocol says how many.
        changes: {"section.field": value} laid over the run's configuration, such as runtime.device.
        network: of the checkpoint where that is not SegNet, "package.module:function", whose module is imported;
            several for `evaluate_against`.
        tile: take images at their own size, in tiles of this size, such as "360x480".
        tile_overlap: pixels that tiles have in common; None: a quarter of their sides.

    Raises:
        UsageError: the network was trained on some of the images, or is not SegNet and not `network`, or options that
            do not go together.
        FastsegError: the checkpoint cannot be read, or the data has other classes than the network.
    """
    how: dict[str, Any] = {"data": data, "split": split, "at": at, "tta": tta, "changes": changes, "network": network}
    how |= {"tile": tile, "tile_overlap": tile_overlap}
    return _evaluate(checkpoint, allow_overlap=allow_overlap, **how)[0]


def evaluate_against(checkpoint: str | Path, other: str | Path, *, mixed: bool = False, **how: Any) -> dict[str, Any]:
    """Two checkpoints on the same images: `evaluate` of each, and what `other` changed, as `fastseg eval --against`.

    Args:
        mixed: compare scores of different protocols too.
        how: what else `evaluate` takes.

    Raises:
        UsageError: the protocols differ. FastsegError: as `evaluate`.
    """
    a, found_a, world = _evaluate(checkpoint, **how)
    b, found_b, _ = _evaluate(other, **how, world=world)
    differ = [key for key in COMPARED if a["protocol"][key] != b["protocol"][key]]
    if found_a.confusions.shape != found_b.confusions.shape or (differ and not mixed):
        told = ", ".join(f"{key}: {a['protocol'][key]} and {b['protocol'][key]}" for key in differ)
        raise UsageError(
            f"eval --against: not the same protocol ({told}); --mixed-protocols compares them all the same"
        )
    rows = zip(a["classes"], b["classes"], strict=True)
    return {
        "a": a,
        "b": b,
        "comparison": _comparison(compare(found_a.confusions, found_b.confusions)),
        "classes": [
            {"name": x["name"], "difference": None if None in (x["iou"], y["iou"]) else y["iou"] - x["iou"]}
            for x, y in rows
        ],
    }


def refuse_idle(changes: Mapping[str, Any]) -> None:
    """Raise UsageError where one of {"section.field": value} plays no part in an evaluation."""
    idle = [key for key in changes if key not in KEYS_THAT_COUNT and not key.startswith("data.")]
    if idle:
        raise UsageError(
            f"eval --set {idle[0]}: has no part in an evaluation; data.* and {', '.join(sorted(KEYS_THAT_COUNT))} have"
        )


def _comparison(found: Comparison) -> dict[str, Any]:
    return {**found._asdict(), "difference": found.difference._asdict()}


def _evaluate(
    checkpoint: str | Path,
    data: str | None = None,
    split: str = "val",
    at: str = "original",
    tta: str = "none",
    allow_overlap: bool = False,
    changes: dict | None = None,
    network: str | Collection[str] = (),
    tile: str | tuple[int, int] | None = None,
    tile_overlap: int | None = None,
    world: World | None = None,
) -> tuple[dict[str, Any], Counted, World]:
    """The document, what it is made of, and the processes that took part: they meet once, for whatever follows."""
    if at not in ("original", "network"):
        raise UsageError(f"--at {at}: choose original or network")
    if tta not in TTA:
        raise UsageError(f"--tta {tta}: choose {' or '.join(TTA)}")
    tiling = tiling_of(tile, tile_overlap)
    if tiling and at == "network":
        raise UsageError("--at network: tiles are of images at their own size; leave it out, or --tile")
    checkpoint = checkpoint_of(user_path(checkpoint))
    state = checkpoints.read(checkpoint)
    refuse_idle(changes or {})
    changes = {**(changes or {}), **({} if data is None else {"data.path": data})}
    trained = configs.from_dict(state["config"], str(checkpoint))
    admit(trained.model, network, str(checkpoint))  # before files are read
    config = configs.override(trained, changes)
    if world is None:
        world, _ = join(config.runtime)
    dtype = choose_dtype(config.runtime.dtype, world.device.type).dtype
    dataset, splits = open_data(config)
    if list(dataset.classes.names) != state["classes"]:
        raise FastsegError(
            f"{dataset.root}: its classes ({', '.join(dataset.classes.names)}) are not those of {checkpoint} "
            f"({', '.join(state['classes'])})"
        )
    spec = make_spec(config, dataset, splits, split, device=world.device, dtype=dtype, threads=world.threads.decoding)
    seen = overlap(state["trained_on"], spec.pairs, dataset.pool, spec.threads)
    if seen and not allow_overlap:
        raise UsageError(
            f"--split {split}: {checkpoint} was trained on {len(seen)} of these {len(spec.pairs)} images, by name or "
            f"content ({seen[0].stem}{', ...' * (len(seen) > 1)}): give others, or --allow-overlap to score all of "
            "them, with that number in the protocol"
        )
    if tiling:
        if config.runtime.loader == "cache":
            raise UsageError("--loader cache: keeps resized images, and tiles are of whole ones; leave it out")
        spec = dataclasses.replace(spec, resized=False, cache_dir="")
    spec, _ = choose_loader(config.runtime.loader, spec, resize_labels=at == "network")
    kernels, _ = launch.choose(config.runtime.kernels, world.device)
    model = checkpoints.build_model(state, checkpoint, network).to(world.device)
    model.fused = kernels == "fused"
    with world.named_failures():
        evaluated = Mirrored(model) if tta == "mirror" else model
        found = score(evaluated, spec, world, at=at, fused=model.fused, boundaries=True, tiling=tiling)
    if not found.confusions.any():
        raise FastsegError(f"{shown(dataset.root)}: {all_void(split, len(spec.pairs), dataset.classes)}")
    scheme, _ = choose_split(dataset, config.data.split_scheme)
    told = protocol(config, spec, split, scheme, len(seen), kernels, at, tta, tiling)
    told |= {"network": trained.model.network, "init": config.model.init}
    told |= {"step": state["progress"]["step"], "averaged": bool(state["ema"])}
    return _document(found, spec) | {"protocol": told}, found, world


def _document(found: Counted, spec: Spec) -> dict[str, Any]:
    """Scores of all images together and of each; every mean leaves out what is undefined."""
    scores, names = found.scores, spec.classes.names
    assert found.boundaries is not None
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", RuntimeWarning)  # of a mean of nothing, which is NaN
        by_class, by_image = (np.nanmean(found.boundaries, axis=axis) for axis in (0, 1))
        mean = np.nanmean(by_image)
    summary = scores.summary(names)
    for row, value in zip(summary["classes"], by_class, strict=True):
        row["boundary_f1"] = null_if_nan(value)
    sure = interval(scores.miou, bootstrap(found.confusions)[0])
    images = zip(spec.pairs, miou_of(found.confusions), found.confusions, by_image, strict=True)
    return summary | {
        "miou_interval": [null_if_nan(sure.low), null_if_nan(sure.high)],
        "boundary_f1": null_if_nan(mean),
        "confusion": scores.confusion.tolist(),
        "images": [
            {
                "image": pair.stem,
                "miou": null_if_nan(miou),
                "global_accuracy": null_if_nan(Scores(counts).global_accuracy),
                "boundary_f1": null_if_nan(contour),
            }
            for pair, miou, counts, contour in images
        ],
    }


def write_csv(path: Path, document: dict[str, Any]) -> None:
    """The scores of each image, one line each; of both checkpoints where two were compared."""
    sides = (
        {name: document[name]["images"] for name in ("a", "b")}
        if "comparison" in document
        else {"": document["images"]}
    )
    with whole(path) as partial, partial.open("w", newline="", encoding="utf-8") as file:
        writer = csv.writer(file)
        keys = [key for key in next(iter(sides.values()))[0] if key != "image"]
        writer.writerow(["image", *(f"{key}_{side}".rstrip("_") for side in sides for key in keys)])
        for rows in zip(*sides.values(), strict=True):
            writer.writerow([rows[0]["image"], *(row[key] for row in rows for key in keys)])
