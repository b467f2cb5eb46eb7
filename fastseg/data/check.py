"""`fastseg data check`: what is wrong with a data set's files, classes and splits, before anything is trained on it."""

import dataclasses
import math
import re
from collections import Counter, defaultdict
from collections.abc import Callable, Hashable, Iterable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field

import numpy as np

from fastseg.data.classes import UNKNOWN, VOID, ClassMap
from fastseg.data.decode import decode_image, read_label
from fastseg.data.duplicates import Remembered, byte_keys, in_two_splits, pixel_digest
from fastseg.data.headers import Header, read_headers
from fastseg.data.pairs import Dataset, Pair, Problem
from fastseg.data.split import Splits, apply, choose, sequence
from fastseg.data.stats import all_void
from fastseg.data.unlisted import Histogram, Tally, channels, histogram, named, summary
from fastseg.errors import FastsegError, UsageError

SHOWN = 5  # further values off the map, classes and sequences that are named
# Larger sets are decoded in part: so many pairs, or as many as have so many pixels, images and labels together.
ALL, SAMPLED_PIXELS = 2000, 400_000_000
ASPECT = 1.05  # aspect ratios that differ by less are taken for one
DIVIDE = "`val = 0.2` in dataset.toml holds a fifth of the images out, or --split-scheme random:80-20"


@dataclass(frozen=True)
class Look:
    """What one pair's files hold.

    Attributes:
        digest: of the decoded image; "" where it was not decoded.
        pixels: int64[256], of each class, VOID and UNKNOWN in the label; None where that was not decoded.
        off_map: the values or colours that are not in the class map, if any.
    """

    errors: Sequence[Problem] = ()
    warnings: Sequence[Problem] = ()
    digest: str = ""
    pixels: np.ndarray | None = None
    off_map: Histogram | None = None


@dataclass(frozen=True)
class Report:
    """What `check` found: errors stop training or spoil its scores, warnings do not, notes are to be known."""

    splits: Splits
    errors: Sequence[Problem]
    warnings: Sequence[Problem]
    notes: Sequence[Problem]


def off_map(path: str, classes: ClassMap) -> str | None:
    """The commonest value or colour of a label file that is not in the class map, with its pixel count, or None."""
    raw = read_label(path, classes)
    found = histogram(raw, classes.to_classes(raw) == UNKNOWN)
    return _off_map(path, raw, found, classes).problem if len(found[0]) else None


def _off_map(path: str, raw: np.ndarray, found: Histogram, classes: ClassMap) -> Problem:
    values, counts = found
    at = int(counts.argmax())
    commonest = channels(values)[at] if classes.is_color else values[at]
    y, x = np.argwhere((np.atleast_3d(raw) == commonest).all(axis=2))[0].tolist()
    value = f"{'colour' if classes.is_color else 'value'} {named(int(values[at]), classes)}"
    pixels = f"{counts[at]} pixel{'s' * int(counts[at] > 1)}"
    others = [named(other, classes) for other in np.delete(values, at)[:SHOWN].tolist()]
    more = f"; also {', '.join(others)}{', ...' * (len(values) > SHOWN + 1)}" if others else ""
    told = f"{value} is not in the class map: {pixels}, the first at x={x} y={y}{more}; allowed are {classes.allowed}"
    cure = "correct the file, or --unknown-colours void to ignore such pixels"
    return Problem(path, f"{told}; {cure}", "unlisted", f"{value}, {pixels}" + ", ..." * bool(others))


def look(pair: Pair, header: Header, classes: ClassMap, digest: str = "") -> Look:
    """Decode a pair.

    Args:
        digest: of the image, where it need not be decoded since it has been before.
    """
    if header.problem:
        return Look([header.problem])
    errors, warnings = [], _turned(header)
    try:
        digest = digest or pixel_digest(decode_image(pair.image))
    except FastsegError as error:
        errors.append(_undecodable(pair.image, error))
    try:
        raw = read_label(pair.label, classes)
    except FastsegError as error:
        return Look([*errors, _undecodable(pair.label, error)], warnings, digest)
    label = classes.to_classes(raw)
    pixels, found = np.bincount(label.ravel(), minlength=256), None
    if pixels[UNKNOWN]:
        found = histogram(raw, label == UNKNOWN)
        errors.append(_off_map(pair.label, raw, found, classes))
    elif pixels[VOID] == label.size:
        warnings.append(Problem(pair.label, "all pixels are void", "void"))
    return Look(errors, warnings, digest, pixels, found)


def _turned(header: Header) -> list[Problem]:
    told = "has an EXIF orientation, which is not applied: --exif apply turns it, or save it and its label upright"
    return [Problem(file, told, "turned") for file in header.turned]


def _undecodable(path: str, error: FastsegError) -> Problem:
    told = str(error).removeprefix(f"{path}: ")
    return Problem(path, told, "undecodable", told.removeprefix("cannot be decoded: "))


@dataclass
class _Sum:
    """What all looks together say."""

    pixels: dict[str, np.ndarray]  # int64[256] of each split
    errors: list[Problem] = field(default_factory=list)
    warnings: list[Problem] = field(default_factory=list)
    digests: dict[str, str] = field(default_factory=dict)  # of images that can be decoded
    off_map: Tally = field(default_factory=Tally)

    def add(self, pair: Pair, found: Look, splits: Iterable[str]) -> None:
        """One more pair's, which is in these splits."""
        self.errors += found.errors
        self.warnings += found.warnings
        if found.digest:
            self.digests[pair.image] = found.digest
        if found.off_map:
            self.off_map.add(found.off_map)
        for split in splits if found.pixels is not None else ():
            self.pixels[split] += found.pixels


def check(
    dataset: Dataset,
    threads: int,
    *,
    scheme: str = "auto",
    seed: int = 0,
    unknown_colours: str = "error",
    upright: bool = False,
    every: bool = False,
    watch: Callable[[Iterable[Look], int], Iterable[Look]] = lambda looks, total: looks,
) -> Report:
    """Look at the whole data set: its splits and orphans, the pairs in order, then what lies between them.

    Of more than `ALL` pairs every header is read, but only an even sample is decoded, unless `every` is set.

    Args:
        scheme, seed: of the splits, as `apply` takes them.
        unknown_colours: "error", or "void" where values outside the class map are to be ignored.
        upright: pictures are turned as their EXIF orientation says, which is no fault then.
        watch: is given the pairs that are decoded, as they come, and their number; it passes them on.

    Raises:
        UsageError: an unknown scheme, or another word for `unknown_colours`.
    """
    if unknown_colours not in ("error", "void"):
        raise UsageError(f"--unknown-colours {unknown_colours}: choose error or void")
    splits, errors = _divide(dataset, scheme, seed)
    headers = read_headers(dataset.pool, threads, upright)
    if upright:
        headers = [dataclasses.replace(header, turned=()) for header in headers]
    chosen = set(range(len(headers))) if every else _sample(headers)
    known = Remembered(dataset.root)
    seen = _see(dataset, splits, headers, chosen, known, threads, watch)
    errors += [*dataset.problems, *seen.errors]
    warnings, notes = [*seen.warnings, *_aspects(dataset.pool, headers)], _sequences(dataset, scheme, splits)

    content: Mapping[str, Hashable] = seen.digests
    part = ""
    if len(chosen) < len(headers):
        content = byte_keys([pair.image for pairs in splits.values() for pair in pairs], threads)
        part = f"decoded {len(chosen):,} of {len(headers):,} pairs, evenly drawn"
        told = f"{part}; images are compared by their files' bytes, unless --all decodes every file"
        notes.append(Problem(str(dataset.root), told))
    else:
        known.keep(seen.digests)
        if known.used:
            told = f"{known.used:,} images are as they were when they were decoded before, and were not decoded again"
            notes.append(Problem(str(dataset.root), f"{told} ({known.path} remembers them)"))
    twice, namesakes = in_two_splits(splits, content)
    void = [] if part else _void(dataset, splits, seen.pixels, unknown_colours)
    errors += [*twice, *void]
    warnings += namesakes
    if not void:
        warnings += _absent(dataset, seen.pixels, " that was decoded" if part else "")

    if seen.off_map.labels:
        notes.append(Problem(str(dataset.root), summary(seen.off_map, dataset.classes)))
    if unknown_colours == "void":
        ignored = [problem for problem in errors if problem.kind == "unlisted"]
        errors = [problem for problem in errors if problem.kind != "unlisted"]
        notes = [*(dataclasses.replace(p, problem=f"{p.detail}: ignored", kind="ignored") for p in ignored), *notes]
    return Report(splits, errors, warnings, notes)


def _see(
    dataset: Dataset,
    splits: Splits,
    headers: Sequence[Header],
    chosen: set[int],
    known: Remembered,
    threads: int,
    watch: Callable[[Iterable[Look], int], Iterable[Look]],
) -> _Sum:
    """Look at all pairs, and decode those chosen."""
    pool, order = dataset.pool, sorted(chosen)
    # A set that is soon decoded is looked at as it is now.
    before = [known.of(pool[index].image) if len(pool) > ALL else "" for index in order]

    def one(index: int, digest: str) -> Look:
        return look(pool[index], headers[index], dataset.classes, digest)

    homes = defaultdict(list)
    for split, pairs in splits.items():
        for pair in pairs:
            homes[pair].append(split)
    seen = _Sum({split: np.zeros(256, np.int64) for split in splits})
    with ThreadPoolExecutor(threads) as workers:
        looks = iter(watch(workers.map(one, order, before), len(order)))
        for index, (pair, header) in enumerate(zip(pool, headers, strict=True)):
            undecoded = Look([header.problem] if header.problem else [], _turned(header))
            seen.add(pair, next(looks) if index in chosen else undecoded, homes[pair])
    return seen


def _sample(headers: Sequence[Header]) -> set[int]:
    """The pairs to decode: all of a small set, else some at even distances."""
    if len(headers) <= ALL:
        return set(range(len(headers)))
    pixels = sum(math.prod(header.image_size) + math.prod(header.label_size) for header in headers)
    number = min(ALL, max(1, len(headers) * SAMPLED_PIXELS // max(1, pixels)))
    return set(np.linspace(0, len(headers) - 1, number).round().astype(int).tolist())


def _divide(dataset: Dataset, scheme: str, seed: int) -> tuple[Splits, list[Problem]]:
    """The splits as a run would have them, and what they lack."""
    root = str(dataset.root)
    if not dataset.pool:
        return {}, [Problem(root, "has no pair of an image and its label: their names must be equal")]
    try:
        splits = apply(dataset, scheme, seed)
    except UsageError:
        raise
    except FastsegError as error:
        if scheme != "auto" or dataset.splits:
            return {}, [Problem(root, str(error).removeprefix(f"{root}: "))]
        splits = {}
    lacks = [does for split, does in (("train", "train on"), ("val", "validate on")) if not splits.get(split)]
    return splits, [Problem(root, f"has no images to {' and none to '.join(lacks)}; {DIVIDE}")] if lacks else []


def _void(dataset: Dataset, splits: Splits, pixels: dict[str, np.ndarray], unknown_colours: str) -> list[Problem]:
    """Splits to train or to validate on of which no pixel has a class."""
    ignored = [VOID, UNKNOWN] if unknown_colours == "void" else [VOID]
    found = []
    for split in ("train", "val"):
        counts = pixels.get(split, np.zeros(1))
        if counts.any() and not np.delete(counts, ignored).any():
            told = all_void(split, len(splits[split]), dataset.classes)
            found.append(Problem(str(dataset.root), told, f"void {split}"))
    return found


def _absent(dataset: Dataset, pixels: dict[str, np.ndarray], part: str) -> list[Problem]:
    """Classes that no image to train on, or none to validate on, has.

    Args:
        part: which images were looked at, if not all.
    """
    meant = {"train": "the loss weight is 0", "val": "how well that is learnt is not measured"}
    found = []
    for split, follows in meant.items():
        if pixels.get(split, np.zeros(1)).any():
            names = [name for name, count in zip(dataset.classes.names, pixels[split], strict=False) if not count]
            more = f" and {len(names) - SHOWN} more" if len(names) > SHOWN else ""
            told = f"no image of {split}{part} has {', '.join(names[:SHOWN])}{more}: {follows}"
            found += [Problem(str(dataset.root), told)] if names else []
    return found


def _aspects(pool: Sequence[Pair], headers: Sequence[Header]) -> list[Problem]:
    """Images whose aspect ratio is not about that of the middle one."""
    sizes = [(pair.image, *header.image_size) for pair, header in zip(pool, headers, strict=True) if not header.problem]
    middle = float(np.median([width / height for _, height, width in sizes])) if sizes else 1.0
    found = []
    for image, height, width in sizes:
        if not 1 / ASPECT < width / height / middle < ASPECT:
            detail = f"{width}x{height}, {width / height:.2f} where the middle one has {middle:.2f}"
            told = f"has another aspect ratio than the middle one ({detail}): --size squeezes all images into one shape"
            found.append(Problem(image, f"{told}; data.fit = letterbox keeps theirs", "aspects", detail))
    return found


def _sequences(dataset: Dataset, scheme: str, splits: Splits) -> list[Problem]:
    """Videos of which a draw has put frames on both sides, as far as names tell: NAME_NUMBER, of several NAMEs."""
    if not splits or choose(dataset, scheme)[0] in ("own", "segnet", "video"):
        return []
    sides = [
        Counter(sequence(pair.stem) for pair in splits[split] if re.search(r"[^\d_].*_[a-z]?\d+$", pair.stem))
        for split in ("train", "val")
    ]
    names = sorted(sides[0] + sides[1])
    both = [name for name in names if sides[0][name] and sides[1][name]]
    if len(names) < 2 or not both:
        return []
    said = [f"{name}: {sides[0][name]} to train, {sides[1][name]} to validate" for name in both[:SHOWN]]
    more = f"; and {len(both) - SHOWN:,} more" if len(both) > SHOWN else ""
    told = (
        f"{len(both):,} of {len(names):,} sequences have images on both sides of the split ({'; '.join(said)}{more}): "
        "if they are frames of videos, neighbours are almost one picture, and scores flatter; --split-scheme video, or "
        "`group` in dataset.toml, keeps sequences whole"
    )
    return [Problem(str(dataset.root), told)]
