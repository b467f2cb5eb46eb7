"""From a configuration to what a source reads: the data set, its splits, and one `Spec` per split."""

import torch

from fastseg import config as configs
from fastseg import data
from fastseg.config import Config
from fastseg.data.headers import read_headers
from fastseg.data.layouts import Dataset, find
from fastseg.data.split import Splits, apply
from fastseg.distributed import join
from fastseg.errors import FastsegError
from fastseg.pipelines.source import Spec


def open_data(config: Config) -> tuple[Dataset, Splits]:
    """The data set that the configuration names, and its splits."""
    dataset = find(data.resolve(config.data.path))
    return dataset, apply(dataset, config.data.split_scheme, config.runtime.seed)


def make_spec(
    config: Config, dataset: Dataset, splits: Splits, split: str, *, device: torch.device, dtype: torch.dtype
) -> Spec:
    """What to read for one split, after a look at every file's header.

    Raises:
        FastsegError: the split does not exist, or a file is unreadable or does not match its partner, by name.
    """
    pairs = splits.get(split, ())
    if not pairs:
        have = ", ".join(f"{name} ({len(p)} pairs)" for name, p in splits.items()) or "none"
        raise FastsegError(f"{dataset.root}: no {split} split; it has {have}")
    threads = torch.get_num_threads()
    headers = read_headers(pairs, threads)
    problems = [header.problem for header in headers if header.problem]
    if problems:
        more = (
            f" (and {len(problems) - 1} more: `fastseg data check {dataset.root}` lists them)" if problems[1:] else ""
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
        unknown_void=config.data.unknown_colours == "void",
        cache_dir=config.runtime.cache_dir,
    )


def reading(
    path: str,
    *,
    size: str,
    splits: tuple[str, ...] = ("train", "val"),
    device: str = "cpu",
    split_scheme: str = "auto",
    seed: int = 0,
    unknown_colours: str = "error",
    cache_dir: str = "",
) -> dict[str, Spec]:
    """What to read of each split that is there, for commands that look at data and train nothing.

    Raises:
        FastsegError: no such data set or none of the splits, or a file that is unreadable.
    """
    changes = {"data.path": path, "data.size": size, "data.split_scheme": split_scheme, "runtime.seed": seed}
    changes |= {"data.unknown_colours": unknown_colours, "runtime.cache_dir": cache_dir, "runtime.device": device}
    config = configs.override(Config(), changes, "data")
    world, _ = join(config.runtime)
    dataset, found = open_data(config)
    wanted = [split for split in splits if found.get(split)] or list(splits)
    return {
        split: make_spec(config, dataset, found, split, device=world.device, dtype=torch.float32) for split in wanted
    }
