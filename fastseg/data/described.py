"""dataset.toml: a data set as a TOML file tells, where its files lie, what they mean and what validates.

void = [255]
val = 0.2                   # or fold = "1/5": a part of `train` validates, where there is no [splits.val]
group = "{group}_*"         # images that stay on one side
[splits.train]
images = "images/*.jpg"     # folders or patterns, see `fastseg.data.patterns`
labels = "masks/*_mask.png"
list = "train.txt"          # only what it names, or, without patterns, its two columns
[[classes]]
name = "road"
index = 7                   # or color = [128, 64, 128]; or a list of either
"""

import re
from collections.abc import Mapping
from fractions import Fraction
from pathlib import Path

from fastseg.data import lists
from fastseg.data.classes import VOID, ClassMap, hue, map_of
from fastseg.data.pairs import (
    NO_IMAGE,
    NO_LABEL,
    Dataset,
    Files,
    HoldOut,
    Key,
    Pair,
    Problem,
    key_text,
    pair_up,
    pooled,
    split_of,
)
from fastseg.data.patterns import MOST, Pattern, counterpart, parse
from fastseg.errors import FastsegError, UsageError
from fastseg.texts import brief, is_plain, read_toml, shown

_TOP = {"splits": dict, "classes": list}
_KNOWN = {*_TOP, "void", "val", "fold", "group"}
_SIDES = ("images", "labels")


def read(path: Path) -> Dataset:
    """The data set that a TOML file describes.

    Raises:
        UsageError: the file is no description. FastsegError: a folder or list of it is not there.
    """
    spec = read_toml(path)
    if spec.keys() - _KNOWN or not all(isinstance(spec.get(key), kind) for key, kind in _TOP.items()):
        raise UsageError(
            f"{path}: wants [splits.train] images, labels; [[classes]] name, index or color; void = [...]; and may "
            "have val, fold and group"
        )
    splits: dict[str, tuple[Pair, ...]] = {}
    keys: dict[Pair, Key] = {}
    problems: list[Problem] = []
    missing: dict[str, tuple[Problem, ...]] = {}
    for name, part in spec["splits"].items():
        split, key = split_of(name), f"{path}: splits.{shown(name)}"
        if split in splits:
            raise UsageError(f"{key}: there is another split of that meaning, `{split}`: keep one of them")
        pairs, found, unnamed = _split(path, part, key)
        splits[split], missing[split] = tuple(pairs), tuple(unnamed)
        keys |= pairs
        problems += [*found, *unnamed]
    return Dataset(
        path.parent,
        "toml",
        _classes(path, spec),
        pooled(splits),
        splits,
        tuple(problems),
        missing,
        _hold_out(path, spec, splits),
        _groups(path, spec["group"], keys) if "group" in spec else {},
    )


def _split(path: Path, part: object, key: str) -> tuple[dict[Pair, Key], list[Problem], list[Problem]]:
    """(pairs of a split with what their names stand for, what is wrong with files, what its list names in vain)."""
    given = part if isinstance(part, dict) else {}
    if set(given) not in ({*_SIDES}, {*_SIDES, "list"}, {"list"}) or not all(
        isinstance(v, str) for v in given.values()
    ):
        raise UsageError(
            f"{key} wants exactly `images` and `labels`, each a folder or a pattern, and perhaps `list`; or `list` "
            "alone, a file of two columns"
        )
    if not is_plain(given.get("list", "")):
        raise UsageError(f"{key}.list = {given['list']!r}: has control characters")
    if "images" not in given:
        pairs, unnamed = lists.pairs_in(path.parent / given["list"], path.parent)
        return {pair: name for name, pair in pairs.items()}, [], unnamed
    images, labels = (parse(path.parent, given[side], f"{key}.{side}") for side in _SIDES)
    files = _apart(images, labels, key)
    pairs, problems = pair_up(*files)
    for side, found in zip(_SIDES, files, strict=True):
        if not found:
            name = f"{key.removeprefix(f'{path}: ')}.{side}"
            problems.append(Problem(str(path), f"{name} = {given[side]!r} matches no file{_literally(given[side])}"))
    names, unnamed = {pair: name for name, pair in pairs.items()}, []
    if "list" in given:
        chosen, unnamed = lists.choose(pairs, path.parent / given["list"], path.parent, anywhere=False)
        names = {pair: names[pair] for pair in chosen}
        problems = [problem for problem in problems if problem.problem not in (NO_LABEL, NO_IMAGE)]
    return names, problems, unnamed


def _literally(text: str) -> str:
    return " (`?` and brackets stand for themselves)" if set(text) & set("?[") else ""


def _apart(images: Pattern, labels: Pattern, key: str) -> tuple[Files, Files]:
    """The images and the labels. A file that both patterns match is what the one says that writes out more of it.

    So `*.png` beside `*_mask.png` takes no mask for an image.
    """
    counterpart(images, labels, key)
    found = images.find(images.slots), labels.find(images.slots)
    paths = [{entry.path for files in side.values() for entry in files} for side in found]
    both = paths[0] & paths[1]
    if both and images.literal == labels.literal:
        raise UsageError(f"{key}: {shown(min(both))} matches images and labels: write out what tells them apart")
    loser = found[images.literal > labels.literal]
    for name in [name for name, files in loser.items() if any(entry.path in both for entry in files)]:
        loser[name] = [entry for entry in loser[name] if entry.path not in both]
        if not loser[name]:
            del loser[name]
    return found


def _hold_out(path: Path, spec: dict, splits: Mapping[str, object]) -> HoldOut | None:
    """What part of the training images validates, if the file says so."""
    given = [key for key in ("val", "fold") if key in spec]
    if not given:
        return None
    if len(given) > 1 or "val" in splits or "train" not in splits:
        have = ", ".join([*given, *(f"[splits.{split}]" for split in ("train", "val") if split in splits)])
        raise UsageError(
            f"{path}: val or fold holds images of [splits.train] out; it has {have}: keep one that validates"
        )
    key, value = given[0], spec[given[0]]
    if key == "val":
        if not isinstance(value, float) or not 0 < value < 1:
            raise UsageError(f"{path}: val = {brief(value)}: wants a share of the images between 0 and 1, such as 0.2")
        return HoldOut(f"val={value}", Fraction(0), Fraction(str(value)))
    match = re.fullmatch(r"([0-9]{1,4})/([0-9]{1,4})", value) if isinstance(value, str) else None
    number, count = map(int, match.groups()) if match else (0, 0)
    if not 1 <= number <= count or count < 2:
        raise UsageError(f'{path}: fold = {brief(value)}: wants a fold and their number, such as "1/5"')
    return HoldOut(f"fold={number}/{count}", Fraction(number - 1, count), Fraction(number, count))


def _groups(path: Path, pattern: object, keys: Mapping[Pair, Key]) -> dict[str, str]:
    """Image file -> its group: what `{group}` stands for in what the split's patterns stand for, parts joined by /."""
    said = f"{path}: group = {brief(pattern)}"
    if not isinstance(pattern, str) or pattern.count("{group}") != 1 or pattern.count("*") > MOST:
        raise UsageError(f'{said}: wants {{group}} once and up to {MOST} *, such as "{{group}}_*"')
    text = re.escape(pattern).replace(re.escape("{group}"), "(.+)").replace(re.escape("*"), ".*")
    matches = {pair: re.fullmatch(text, key_text(key), re.DOTALL) for pair, key in keys.items()}
    others = sorted(key_text(keys[pair]) for pair, match in matches.items() if not match)
    if others:
        more = f" and {len(others) - 1} more" * (len(others) > 1)
        raise FastsegError(f"{said}: does not match {shown(others[0])}{more}: every image needs a group")
    return {pair.image: match[1] for pair, match in matches.items() if match}


def _classes(path: Path, spec: dict) -> ClassMap:
    classes, colors = spec["classes"], []
    maps: dict[str, dict] = {"index": {}, "color": {}}
    for position, entry in enumerate(classes):
        kinds = entry.keys() & maps.keys() if isinstance(entry, dict) else set()
        if len(kinds) != 1 or len(entry) != 2 or not isinstance(entry.get("name"), str):
            raise UsageError(f"{path}: classes[{position}] wants `name` and one of `index` and `color`")
        kind = kinds.pop()
        values = _values(entry[kind], kind, f"{path}: classes[{position}].{kind}")
        for value in values:
            if value in maps[kind]:
                raise UsageError(f"{path}: {kind} {value} belongs to two classes")
            maps[kind][value] = position
        colors.append(values[0] if kind == "color" else hue(position, len(classes)))
    if maps["index"] and maps["color"]:
        raise UsageError(f"{path}: classes by index and by color cannot be mixed")
    kind = "color" if maps["color"] else "index"
    for value in _values(spec.get("void", []), kind, f"{path}: void", may_be_empty=True):
        if value in maps[kind]:
            raise UsageError(f"{path}: {kind} {value} is both void and a class")
        maps[kind][value] = VOID
    names = [entry["name"] for entry in classes]
    return map_of(path, names, colors, **{f"from_{kind}": maps[kind]})


def _values(given: object, kind: str, key: str, *, may_be_empty: bool = False) -> list:
    """One value or a list of them: whole numbers 0..255, or colours of three such numbers."""

    def byte(value: object) -> bool:
        return isinstance(value, int) and not isinstance(value, bool) and 0 <= value <= 255

    def one(value: object) -> bool:
        if kind == "index":
            return byte(value)
        return isinstance(value, list) and len(value) == 3 and all(byte(v) for v in value)

    values = [given] if one(given) else given
    if not isinstance(values, list) or not all(one(v) for v in values) or (not values and not may_be_empty):
        wanted = "a number 0..255" if kind == "index" else "a colour [r, g, b]"
        raise UsageError(f"{key} = {brief(given)}: wants {wanted} or a list of them")
    return [tuple(v) if isinstance(v, list) else v for v in values]
