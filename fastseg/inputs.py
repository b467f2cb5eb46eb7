"""From a configuration to what a source reads: the data set, its splits, and one `Spec` per split."""

import torch

from fastseg import data
from fastseg.config import Config
from fastseg.data.headers import read_headers
from fastseg.data.layouts import Dataset, find
from fastseg.data.split import Splits, apply
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
    )
