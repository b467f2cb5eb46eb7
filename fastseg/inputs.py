"""What `fastseg predict` is given: files, folders and globs, and which images of them it labels."""

import glob
import itertools
import os
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

import click

from fastseg.data.layouts import find
from fastseg.data.pairs import Dataset, data_folders, entries, is_companion, is_image, walk
from fastseg.errors import FastsegError, UsageError
from fastseg.texts import shown


class Job(NamedTuple):
    """An image file, and what its results are called: a relative path without suffix."""

    path: Path
    name: str


def find_images(inputs: Sequence[str]) -> list[Job]:
    """Files, all images below folders, and files of globs, in order; see `images_below` for what counts as one.

    Raises:
        UsageError: an input that gives none, or two files whose results would have the same name.
    """
    jobs: list[Job] = []
    for text in map(os.path.expanduser, inputs):
        path = Path(text)
        if path.is_dir():
            found = [Job(p, str(p.relative_to(path).with_suffix(""))) for p in images_below(path)]
        elif path.exists():
            found = [Job(path, path.stem)]
        else:
            matched = [Path(p) for p in sorted(glob.glob(text, recursive=True)) if Path(p).is_file()]
            found = [Job(p, p.stem) for p in matched if not _is_result(p, text)]
        if not found:
            raise UsageError(f"predict: {text}: no image there; give files, folders or globs in quotes")
        jobs += found
    names: dict[str, Path] = {}
    for job in jobs:
        if job.name in names:
            raise UsageError(
                f"predict: {names[job.name]} and {job.path} would both become {job.name}.png: predict them apart"
            )
        names[job.name] = job.path
    return jobs


def images_below(root: Path) -> list[Path]:
    """The images in a folder and in those below, in order: of a data set what it pairs with labels, and no labels.

    Companions of data, runs, and what `predict` has written are left out.

    Raises:
        UsageError: a dataset.toml that is no description, so that nobody knows which files are labels.
    """
    found: list[Path] = []
    for here, folders, names in walk(root):
        try:
            dataset = find(here)
        except FastsegError:
            if (here / "dataset.toml").is_file():
                raise
            found += [here / name for name in names if is_image(name) and not is_companion(name)]
            continue
        folders.clear()
        found += _unlabelled(dataset)
    return sorted(path for path in found if path.is_file())


def _unlabelled(dataset: Dataset) -> list[Path]:
    """The images of a data set, those without a label too; and a word that its labels are none of them."""
    labels = {Path(pair.label) for pair in dataset.pool}
    holders = {Path(pair.image).parent for pair in dataset.pool}
    found = [folder / e.name for folder in holders for e in entries(folder) if is_image(e.name)]
    images = [path for path in found if path not in labels]
    where = shown(dataset.root)
    click.echo(f"{where}: a data set ({dataset.layout} layout): its {len(images)} images, and no labels", err=True)
    return images


def _is_result(path: Path, pattern: str) -> bool:
    """Whether a file lies in what fastseg made, or in a companion of data, in folders that the pattern leaves open."""
    folder = Path(*itertools.takewhile(lambda part: not glob.has_magic(part), Path(pattern).parts))
    for part in path.relative_to(folder).parts[:-1]:
        if not data_folders(folder, [part]):
            return True
        folder /= part
    return False
