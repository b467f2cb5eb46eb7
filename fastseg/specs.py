"""From a configuration to what a source reads: the data set, its splits, a `Spec` per split, and the sample plan."""

import dataclasses
import json
import re
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch

from fastseg import config as configs
from fastseg import data, network
from fastseg.config import Config, Data, Runtime, Size, Train
from fastseg.data.headers import read_headers
from fastseg.data.layouts import Dataset, find
from fastseg.data.split import Splits, apply, contents, missing, sizes
from fastseg.distributed import choose_device
from fastseg.environment import cores
from fastseg.errors import FastsegError, UsageError
from fastseg.pipelines.fit import rooms_of
from fastseg.pipelines.plan import Plan, Rooms
from fastseg.pipelines.source import Batch, Spec, TrainSource, choose_loader, evaluation_batches
from fastseg.texts import pasted, shown, user_path

# Options of commands that look at data -> the keys that they set.
KEYS = {
    **{name: f"data.{name}" for name in ("size", "split_scheme", "unknown_colours")},
    **{name: f"runtime.{name}" for name in ("seed", "device", "loader", "cache_dir")},
    "crop": "augment.crop",
    "batch": "train.batch",
    "exif": "data.exif",
    "fit": "data.fit",
    "scale": "train.scale",
    "scale_jitter": "augment.scale",
    "colour_jitter": "augment.colour",
}


def open_data(config: Config) -> tuple[Dataset, Splits]:
    """The data set that the configuration names, and its splits.

    Raises:
        FastsegError: no such data set or split, or a list of images to score names some that are not there.
    """
    dataset = find(data.resolve(config.data.path))
    if lost := missing(dataset, config.data.split_scheme):
        more = (
            f" (and {len(lost) - 1} more: `fastseg data check {pasted(dataset.root)}` lists them)" if lost[1:] else ""
        )
        raise FastsegError(f"{lost[0].file}: {lost[0].problem}{more}; add the files, or take the name out of the list")
    return dataset, apply(dataset, config.data.split_scheme, config.runtime.seed)


def refuse_other_data(run: Path, config: Config, option: str) -> None:
    """Raise FastsegError where the data that `config` names is not what a run began with, wherever that was.

    It is the same where names and sizes of all files are, and what is in the images that are trained on.

    Args:
        option: to name in the message.
    """
    dataset, splits = open_data(config)
    kept = json.loads((run / "split.json").read_text(encoding="utf-8"))
    numbers = r"(/\d+/\d+)?( [0-9a-f]{16})?$"  # behind a name: sizes of its files, contents of its image
    differ = []
    for split in ("train", "val"):
        pairs = splits.get(split, ())
        # Runs of before kept names, and no sizes.
        now = sizes(pairs) if "sizes" in kept else [pair.stem for pair in pairs]
        before = kept.get("sizes", kept)[split]
        if split == "train":
            now = [" ".join(both) for both in zip(now, contents(pairs, cores()), strict=True)]
            before = [" ".join(both) for both in zip(before, kept["train_contents"], strict=True)]
        came, went = Counter(now) - Counter(before), Counter(before) - Counter(now)
        if number := max(came.total(), went.total()):
            names = sorted({shown(re.sub(numbers, "", line)) for line in came + went})
            listed = ", ".join(names[:3]) + ", ..." * (len(names) > 3)
            differ.append(f"{split} differs by {number} of {len(before)} ({listed})")
    if differ:
        raise FastsegError(
            f"{option}: the files of {shown(dataset.root)} are not those that {shown(run)} began with: "
            f"{'; '.join(differ)}"
        )


def make_spec(
    config: Config,
    dataset: Dataset,
    splits: Splits,
    split: str,
    *,
    device: torch.device,
    dtype: torch.dtype,
    threads: int,
) -> Spec:
    """What to read for one split, after a look at every file's header.

    Args:
        threads: that decode.

    Raises:
        FastsegError: the split does not exist, or a file is unreadable or does not match its partner, by name.
    """
    pairs = splits.get(split, ())
    if not pairs:
        have = ", ".join(f"{name} ({len(p)} pairs)" for name, p in splits.items()) or "none"
        cure = "; --split-scheme video or random:80-20 draws one" if split != "test" and dataset.pool else ""
        if cure and dataset.layout == "toml":
            cure = f"; `val = 0.2` at the top of dataset.toml holds a fifth of `train` out, or{cure[1:]}"
        raise FastsegError(f"{dataset.root}: no {split} split; it has {have}{cure}")
    upright = config.data.exif == "apply"
    headers = read_headers(pairs, threads, upright)
    problems = [header.problem for header in headers if header.problem]
    if problems:
        more = (
            f" (and {len(problems) - 1} more: `fastseg data check {pasted(dataset.root)}` lists them)"
            if problems[1:]
            else ""
        )
        raise FastsegError(f"{problems[0].file}: {problems[0].problem}{more}")
    return Spec(
        pairs=pairs,
        headers=headers,
        classes=dataset.classes,
        size=config.data.size,
        device=device,
        dtype=dtype,
        threads=threads,
        crop=config.augment.crop if any(config.augment.crop) else None,
        window=window_size(config.data.size, config.train.scale) if config.train.scale else None,
        fit=config.data.fit,
        upright=upright,
        unknown_void=config.data.unknown_colours == "void",
        cache_dir=str(user_path(config.runtime.cache_dir)) if config.runtime.cache_dir else "",
    )


def make_plan(config: Config, spec: Spec, world: int) -> Plan:
    """The sample plan of a run on a spec's samples.

    Raises:
        UsageError: with `drop_remainder`, a batch that is never full; a crop that is larger than the images, or of
            windows of the files' own pixels.
    """
    size, crop, num_samples = config.data.size, config.augment.crop, len(spec.pairs)
    if spec.window and any(crop):
        raise UsageError(
            f"augment.crop: train.scale = {config.train.scale:g} cuts windows out of the files already, of data.size "
            f"({size}); leave out augment.crop, and give the size that the network shall train on as --size"
        )
    if any(c > s for c, s in zip(crop, size, strict=True)):
        raise UsageError(f"augment.crop: {crop} is larger than data.size, {size}")
    parts = config.train.accumulate * world
    batch = config.train.global_batch or config.train.batch * parts
    if batch % parts:
        raise UsageError(
            f"train.global_batch: {batch} images cannot be shared out to {world} processes x "
            f"{config.train.accumulate} accumulated; use a multiple of {parts}"
        )
    if (any(crop) or spec.window) and config.train.grow_from < 1:
        raise UsageError(
            "train.grow_from: images that are cropped do not grow; "
            f"add --set train.grow_from=1, or leave out {'train.scale' if spec.window else 'augment.crop'}"
        )
    height, width = crop if any(crop) else size
    height, width = (max(1, round(side * config.train.grow_from)) for side in (height, width))
    scale = network.deepest_scale(config.model)
    # Synchronised batch norm takes those of all processes together.
    together = batch // config.train.accumulate if config.runtime.sync_bn else batch // parts
    first = ", with which train.grow_from begins," if config.train.grow_from < 1 else ""
    if scale and together * -(-height // scale) * -(-width // scale) < 2:
        raise UsageError(
            f"train.batch: of 1 image of {height}x{width}{first} the deepest maps are one pixel, which batch norm "
            "cannot train on; use a larger --batch or --size, or a smaller model.depth"
        )
    if config.train.drop_remainder and batch > num_samples:
        raise UsageError(
            f"train.batch: {batch} images per step are more than the {num_samples} training images, and "
            "train.drop_remainder drops batches that are not full: use a smaller --batch"
        )
    max_crop: tuple[int, int] | Rooms = (size[0] - crop[0], size[1] - crop[1]) if any(crop) else (0, 0)
    if spec.window:
        max_crop = Rooms(rooms_of(spec.headers, spec.window, size))
    return Plan(
        num_samples=num_samples,
        batch=batch,
        seed=config.runtime.seed,
        mirror=config.augment.mirror,
        max_shift=(0, 0) if spec.window else config.augment.max_shift(size),
        max_crop=max_crop,
        scale=config.augment.scale,
        colour=config.augment.colour,
        drop_remainder=config.train.drop_remainder,
    )


def window_size(size: Size, scale: float) -> Size:
    """What a window of `size` at `scale` takes of a file's own pixels: size / scale, rounded."""
    return Size(*(max(1, round(side / scale)) for side in size))


def open_specs(
    path: str, *, splits: tuple[str, ...] = ("train", "val"), threads: int = 0, **options: Any
) -> tuple[Config, dict[str, Spec]]:
    """What to read of each split that is there, for those who look at data and train nothing.

    The process is left as it is: it joins no others, and neither torch nor the allocator is told anything.

    Args:
        threads: that decode; 0 for all cores that this process may use.
        options: values of the keys that `KEYS` names; the device is the CPU unless given.

    Raises:
        FastsegError: no such data set or none of the splits, or a file that is unreadable.
    """
    changes = {KEYS[name]: value for name, value in {"device": "cpu", **options}.items()}
    config = configs.override(Config(), {"data.path": path, **changes}, "data")
    kind, _ = choose_device(config.runtime.device)
    device = torch.device(kind, torch.cuda.current_device()) if kind == "cuda" else torch.device(kind)
    dataset, found = open_data(config)
    wanted = [split for split in splits if found.get(split)] or list(splits)
    return config, {
        split: make_spec(config, dataset, found, split, device=device, dtype=torch.float32, threads=threads or cores())
        for split in wanted
    }


def open_source(
    path: str | Path,
    split: str = "train",
    *,
    size: str | tuple[int, int] = Data.size,
    batch: int = Train.batch,
    seed: int = Runtime.seed,
    device: str = Runtime.device,
    loader: str = Runtime.loader,
    rank: int = 0,
    world: int = 1,
    threads: int = 0,
) -> Iterator[Batch]:
    """Batches of a data set, as fastseg trains on them and validates: `fastseg.pipelines.open_source`.

    Those of the train split never end: shuffled, mirrored and moved by the sample plan of `seed`. Of any other split
    each sample comes once, in order and unchanged; the last batch may be short. Nothing else of the process is touched:
    process groups, torch's threads and settings stay the caller's.

    Args:
        path: what `fastseg train --data` takes.
        size: (height, width) that images and labels are resized to, in pixels, or text such as "360x480".
        device: "auto", "cpu" or "cuda": where batches are wanted.
        batch: images of a batch, in each process.
        loader: "auto", "dali", "cache" or "reference".
        rank, world: which of how many processes this is: each gets its own share of the samples, of the train split
            every `world`-th of each step.
        threads: that decode; 0 for this process's share of the cores, where all `world` of them are on this machine.

    Returns:
        `Batch`es: images float32[B, 3, H, W], labels uint8[B, H, W] (255 is void), indices int64[B] into the split.

    Raises:
        FastsegError: no such data set or split, or a file that is unreadable; while batches are taken, also a label
            value outside the class map.
    """
    if not 0 <= rank < world:
        raise UsageError(f"open_source: rank {rank} of {world}: from 0 to {world - 1}")
    options: dict[str, Any] = {"size": size, "batch": batch, "seed": seed, "device": device, "loader": loader}
    config, specs = open_specs(str(path), splits=(split,), threads=threads or max(1, cores() // world), **options)
    spec, asked = specs[split], config.runtime.loader
    if split == "train":
        spec, _ = choose_loader(asked, spec, epochs=True)
        return _training(TrainSource(spec, make_plan(config, spec, world), 0, rank, world))
    share = dataclasses.replace(spec, pairs=spec.pairs[rank::world], headers=spec.headers[rank::world])
    if not share.pairs:
        return iter(())
    found = evaluation_batches(choose_loader(asked, share)[0], batch, resize_labels=True)
    return (Batch(images, torch.stack(labels), rank + world * indices) for images, labels, indices in found)


def _training(source: TrainSource) -> Iterator[Batch]:
    epoch = source.plan.total_steps(1)
    for step, batch in enumerate(source, 1):
        if step % epoch == 0:  # to check waits for the device
            source.check()
        yield batch
