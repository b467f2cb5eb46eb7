"""`fastseg data init`: guess how a folder's images and masks lie and what the masks hold, and write dataset.toml."""

import json
import os
import re
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path

from fastseg.data.check import off_map
from fastseg.data.classes import Color
from fastseg.data.folders import FEW, SPLIT_WORDS, Place, Sides, affixes, evenly, find_sides
from fastseg.data.layouts import Dataset, find
from fastseg.data.names import BACKGROUNDS, IGNORED, ClassNames, find_names
from fastseg.data.split import sequence
from fastseg.data.values import Value, Values, count_values
from fastseg.errors import FastsegError, UsageError
from fastseg.runs import write_text
from fastseg.texts import read_text, shown

COUNTED = 500  # masks, at most
MAX_CLASSES = 253  # of a label byte
HELD_OUT = 0.2
VOIDS = {IGNORED, "void", "ignore", "ignored", "unlabeled", "unlabelled"}
BOUNDARY: Color = (224, 224, 192)  # Pascal VOC's colour of object boundaries, which count nowhere


@dataclass
class Split:
    """A split as dataset.toml has it; `count` pairs were found for it."""

    images: str
    labels: str
    count: int
    names: str = ""  # a list file


@dataclass
class Class:
    """A class, or what is void: the values or colours that mean it, and how much of them was counted."""

    name: str
    values: list[Value]
    share: float = 0.0  # of all pixels
    images: int = 0


@dataclass
class Guess:
    """What `data init` makes of a folder.

    Attributes:
        counted, masks: masks that were counted, of so many.
        names_from: the file that the names come from.
        group: a pattern of names that look like sequences.
        notes: what a user should know, a line each.
    """

    splits: dict[str, Split]
    classes: list[Class]
    void: list[Class]
    counted: int
    masks: int
    names_from: Path | None = None
    group: str = ""
    notes: list[str] = field(default_factory=list)

    @property
    def held_out(self) -> float:
        """The share of the training images to validate with, where the folder has no validation of its own."""
        return HELD_OUT if "train" in self.splits and "val" not in self.splits else 0.0


def recognised(root: Path) -> Dataset | None:
    """The data set, where a layout fits this folder and a few of its masks; such a folder needs no file."""
    try:
        dataset = find(root)
    except UsageError:
        return None
    labels = [Path(pair.label) for pair in dataset.pool]
    try:
        fits = not any(off_map(str(path), dataset.classes) for path in evenly(labels, 8))
    except FastsegError:
        fits = False
    return dataset if fits and labels else None


def guess(root: Path, beside: Path, threads: int) -> Guess:
    """What dataset.toml in the folder `beside` should say of the data set in `root`.

    Raises:
        UsageError: no images with masks are found. FastsegError: masks that no class map fits.
    """
    sides = find_sides(root)
    places = sides.places
    masks = [sides.masks[place] for place in places]
    values = count_values([str(root / path) for path in evenly(masks, COUNTED)], threads)
    around = {parent for place in places[:1] for side in (sides.masks, sides.images) for parent in side[place].parents}
    names = find_names([root / folder for folder in sorted(around, key=lambda f: (len(f.parts), f))])
    notes = list(values.notes)
    classes, void = make_classes(root, values, names, notes)
    splits = _splits(root, sides, Path(os.path.relpath(root, beside)), notes)
    found = Guess(splits, classes, void, values.counted, len(masks), names.path if names else None, "", notes)
    if found.held_out:
        found.group = _group(splits["train"], [key for _, key in places])
    if sides.rivals:
        notes.append(f"{shown(sides.rivals[0])} and others like it fit as well; {shown(masks[0])} was taken for a mask")
    if sides.left_out:
        some = ", ".join(shown(path) for path in sides.left_out[:3]) + ", ..." * (len(sides.left_out) > 3)
        notes.append(f"left out, as neither images nor masks: {len(sides.left_out)} pictures ({some})")
    if alone := sides.images.keys() - sides.masks.keys():
        notes.append(
            f"images without a mask: {len(alone)} ({shown(sides.images[min(alone)])}{', ...' * (len(alone) > 1)})"
        )
    return found


# ---- classes ----


def make_classes(
    root: Path, values: Values, names: ClassNames | None, notes: list[str]
) -> tuple[list[Class], list[Class]]:
    """The classes, background first, and what is void, of the values that were counted and the names of a file.

    Raises:
        FastsegError: more values than a label byte has classes.
    """
    named = _named(values, names, notes)
    kept = _without_blur(values, named, notes)
    void_values = _guess_void(values, kept, named)
    rows: dict[str, list[Value]] = {}
    for value, name in named.items():
        rows.setdefault(name, []).append(value)
    for value in kept:
        if value not in named:
            parts = value if isinstance(value, tuple) else (value,)
            rows.setdefault("void" if value in void_values else "_".join(map(str, ("class", *parts))), []).append(value)
    total = max(1, values.pixels.total())
    classes: list[Class] = []
    void: list[Class] = []
    for name, its in rows.items():
        share = sum(values.pixels[value] for value in its) / total
        row = Class(name, its, share, max(values.images[value] for value in its))
        (void if name.lower() in VOIDS else classes).append(row)
    if not 0 < len(classes) <= MAX_CLASSES:
        raise FastsegError(
            f"{shown(root)}: the masks hold {len(kept)} {'colours' if values.is_color else 'values'}, which makes "
            f"{len(classes)} classes, and 1 to {MAX_CLASSES} can be told apart: give each class (not each object) a "
            "value, and save masks without blur"
        )
    black: Value = (0, 0, 0) if values.is_color else 0
    classes.sort(key=lambda row: row.name.lower() not in BACKGROUNDS)
    if classes[0].name.lower() not in BACKGROUNDS:
        classes.sort(key=lambda row: black not in row.values)
    if len(classes) == 1:
        notes.append(f"the masks hold one class alone, {classes[0].name}: there is nothing to tell apart")
    return classes, void


def _named(values: Values, names: ClassNames | None, notes: list[str]) -> dict[Value, str]:
    """The name of each value or colour that a file of names gives one."""
    if names is None:
        return {}
    rows = {value: name for name, value in names.rows}
    if names.by_color == values.is_color:
        highest = max((v for v in values.pixels if isinstance(v, int) and v < 255), default=0)
        first = names.rows[0][0].lower()
        if names.listed and not values.is_color and highest == len(rows) and first not in BACKGROUNDS | VOIDS:
            notes.append(
                f"{shown(names.path.name)} has {len(rows)} names for the values 1 to {highest}: 0 is background"
            )
            return dict(enumerate(["background", *(name for name, _ in names.rows)]))
        return rows
    if values.is_color:
        return {(value, value, value): name for value, name in rows.items() if isinstance(value, int)}
    if values.palette:
        of_color = {color: i for i, color in reversed(list(enumerate(values.palette)))}
        return {of_color[color]: name for color, name in rows.items() if color in of_color and isinstance(color, tuple)}
    notes.append(f"{shown(names.path.name)} names colours and the masks hold values: the number of a line was taken")
    return {i: name for i, (name, _) in enumerate(names.rows)}


def _without_blur(values: Values, named: dict[Value, str], notes: list[str]) -> list[Value]:
    """The values that may be classes, in order: not those that blurred edges have put between them."""
    found, total = values.pixels, max(1, values.pixels.total())
    order = sorted(found) if not values.is_color else [value for value, _ in sorted(found.items(), key=_most_first)]
    if len(order) <= FEW or (not values.is_color and (found[0] + found[255]) / total < 0.9):
        return order
    kept = [value for value in order if value in named or found[value] / total >= 0.001]
    rest = sum(count for value, count in found.items() if value not in kept) / total
    notes.append(
        f"{len(order) - len(kept)} further {'colours' if values.is_color else 'values'} ({_percent(rest)} of the "
        "pixels) are not listed, since blurred edges look so: list those that are classes, save the masks without "
        "blur, or train with --unknown-colours void"
    )
    return kept


def _most_first(item: tuple[Value, int]) -> tuple[int, Value]:
    return -item[1], item[0]


def _guess_void(values: Values, kept: Sequence[Value], named: dict[Value, str]) -> set[Value]:
    """255 beside small values that are more than one, and the boundary of Pascal VOC's colours."""
    others = [value for value in kept if isinstance(value, int) and value != 255]
    void: set[Value] = {BOUNDARY} if values.is_color else {255} if len(others) > 1 and max(others) < 128 else set()
    return void - named.keys()


# ---- where files lie ----


def _splits(root: Path, sides: Sides, prefix: Path, notes: list[str]) -> dict[str, Split]:
    by_split: dict[str, list[Place]] = {}
    for place in sides.places:
        name = next((SPLIT_WORDS[part.lower()] for part in place[0] if part.lower() in SPLIT_WORDS), "")
        by_split.setdefault(name, []).append(place)
    loose = by_split.pop("", [])
    if not by_split:
        everything = _split(root, sides, loose, prefix, notes)
        lists = _lists(root, {sides.images[place].stem for place in loose})
        named = {
            name: replace(everything, count=count, names=(prefix / path).as_posix()) for name, path, count in lists
        }
        return named or {"train": everything}
    if loose:
        notes.append(
            f"{len(loose)} pairs lie in no folder of a split, such as {shown(sides.images[loose[0]])}: left out"
        )
    if "train" not in by_split:
        notes.append("no folder of training images: add [splits.train]")
    order = sorted(by_split, key=("train", "val", "test").index)
    return {name: _split(root, sides, by_split[name], prefix, notes) for name in order}


def _split(root: Path, sides: Sides, places: list[Place], prefix: Path, notes: list[str]) -> Split:
    images, masks = ([side[place] for place in places] for side in (sides.images, sides.masks))
    depth = {len(folders) for folders, _ in places}
    varied = [i for i in range(max(depth)) if len({folders[i] for folders, _ in places if i < len(folders)}) > 1]
    shared = not {path.parent for path in images}.isdisjoint(path.parent for path in masks)
    found = []
    for side, paths in (("images", images), ("masks", masks)):
        folders = {_folder(sides, path, varied) for path in paths}
        if len(folders) > 1 or len(depth) > 1:
            some = ", ".join(sorted({f"{shown(path.parent)}/" for path in paths})[:3])
            raise UsageError(
                f"{shown(root)}: {side} lie in folders that no one pattern fits ({some}): move them into one, or write "
                "dataset.toml by hand, with a split for each"
            )
        found.append(_pattern(root, folders.pop(), paths, bool(varied), shared, notes))
    return Split((prefix / found[0]).as_posix(), (prefix / found[1]).as_posix(), len(places))


def _folder(sides: Sides, path: Path, varied: list[int]) -> Path:
    """A picture's folder, with a placeholder for each part that differs among the pictures of its split."""
    parts, place = [], 0
    for folder, (rest, _) in zip(path.parts[:-1], sides.parts_of(path.parts[:-1]), strict=True):
        name = folder
        if rest:
            if place in varied:
                number = varied.index(place)
                name = folder.replace(rest, "{folder}" if number == 0 else f"{{folder{number + 1}}}")
            place += 1
        parts.append(name)
    return Path(*parts)


def _pattern(root: Path, folder: Path, paths: list[Path], varied: bool, shared: bool, notes: list[str]) -> Path:
    literal = re.sub(r"\{folder\d*\}", "", str(folder))
    if re.search(r"[*{}]", literal):
        raise UsageError(f"{shown(root / folder)}: a pattern cannot have * {{ }} in a folder's name: rename it")
    before, _, after = affixes(paths[0].stem)
    endings = Counter(path.suffix for path in paths).most_common()
    if len(endings) > 1 and not (before or after or varied or shared):
        return folder
    for ending, count in endings[1:]:
        notes.append(f"{count} pictures of {shown(folder)}/ end in {ending} and not in {endings[0][0]}: left out")
    return folder / f"{before}{'{id}' if varied else '*'}{after}{endings[0][0]}"


def _lists(root: Path, stems: set[str]) -> list[tuple[str, Path, int]]:
    """(split, list file, how many of `stems` it names) of the lists that lie where Pascal VOC or others have them."""
    found = {}
    for folder in (root / "ImageSets" / "Segmentation", root / "splits", root):
        for path in sorted(folder.glob("*.txt")):
            name = SPLIT_WORDS.get(path.stem.lower())
            if name and name not in found:
                lines = {Path(line.strip()).name for line in read_text(path).splitlines()} - {""}
                known = len(stems & {form for line in lines for form in (line, Path(line).stem, line.split()[0])})
                if lines and 2 * known >= len(lines):
                    found[name] = (name, path.relative_to(root), known)
    return [found[name] for name in ("train", "val", "test") if name in found] if "train" in found else []


def _group(train: Split, keys: list[str]) -> str:
    """A pattern of groups, where names look like frames of a few sequences; "" where they do not."""
    if "{folder}" in train.images:
        return "{group}/*"
    sequences = Counter(sequence(key) for key in keys if "_" in key)
    return "{group}_*" if len(sequences) > 1 and sequences.total() == len(keys) >= 3 * len(sequences) else ""


# ---- dataset.toml ----


def _percent(share: float) -> str:
    return f"{100 * share:.1f} %" if share >= 0.0005 or share == 0 else "<0.1 %"


def _toml(value: object) -> str:
    """A text, number, colour or list of them as TOML has it, which for these is as JSON has it."""
    return json.dumps(value, ensure_ascii=False)


def to_toml(found: Guess, root: Path) -> str:
    """What is guessed as dataset.toml, with comments that say what to look at."""
    void = [value for row in found.void for value in row.values]
    lines = [
        f"# What `fastseg data init` made of {shown(root)}, from {found.counted} of {found.masks} masks.",
        "# Look it over and edit it: above all the names of the classes. `fastseg data check` says whether it fits.",
        "",
        "# Values or colours that count nowhere, neither in the loss nor in a score.",
        f"void = {_toml(void)}" if void else "# void = [255]",
        "",
    ]
    if found.held_out:
        lines += [
            "# No images to validate with were found, so this share of the training images is held out.",
            f"val = {found.held_out}",
        ]
        if found.group:
            lines += [
                "# Names look like sequences. If they are frames of videos or parts of a picture, remove the # below:",
                "# neighbours are alike, and must not lie on both sides.",
                f"# group = {_toml(found.group)}",
            ]
        lines.append("")
    lines.append("# Paths count from this file. What * and {name} stand for is the same in an image and its label.")
    for name, split in found.splits.items():
        lines += [f"[splits.{name}]", f"images = {_toml(split.images)}", f"labels = {_toml(split.labels)}"]
        lines += [f"list = {_toml(split.names)}"] if split.names else []
        lines.append("")
    source = f", named by {shown(found.names_from.name)}" if found.names_from else ""
    lines.append(f"# The classes in the order of the network's outputs{source}. Two may become one: [3, 7] of both.")
    for row in found.classes:
        kind = "color" if isinstance(row.values[0], tuple) else "index"
        lines += [
            f"# {_percent(row.share)} of the pixels, in {row.images} masks",
            "[[classes]]",
            f"name = {_toml(row.name)}",
            f"{kind} = {_toml(row.values[0] if len(row.values) == 1 else row.values)}",
            "",
        ]
    return "\n".join(lines)


def init(root: Path, out: Path, threads: int, *, force: bool = False) -> Guess:
    """Guess, and write dataset.toml as `out`.

    Raises:
        UsageError: as `guess`, or `out` exists and `force` is not given. FastsegError: as `guess`.
    """
    if out.exists() and not force:
        raise UsageError(f"{shown(out)} exists: --force writes it anew, --out FILE writes another")
    found = guess(root, out.parent, threads)
    write_text(out, to_toml(found, root))
    return found
