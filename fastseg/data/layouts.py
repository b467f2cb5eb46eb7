"""Data sets on disk: recognise a folder's layout and pair its images with its labels.

Nothing here opens an image. Pairs are matched by name, never by position, and are ordered by stem, so that the same
data in two layouts gives the same samples.
"""

import csv
import fnmatch
import io
import os
import re
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path

from fastseg.data.classes import CAMVID_32, VOID, ClassMap, Color, camvid_coded, camvid_colored, camvid_indexed
from fastseg.errors import FastsegError, UsageError
from fastseg.texts import brief, is_plain, read_text, read_toml, shown

IMAGE_SUFFIXES = {".png", ".jpg", ".jpeg", ".bmp", ".tif", ".tiff"}
SPLITS = ("train", "val", "test")


@dataclass(frozen=True)
class Pair:
    """An image file and its label file; `stem` is the image's name without suffix."""

    stem: str
    image: str
    label: str


@dataclass(frozen=True)
class Problem:
    """Something wrong with one file of a data set.

    Attributes:
        kind: what `data check` counts together, of `fastseg.data.findings.KINDS`; without one, what begins alike.
        detail: what differs from file to file, where one line names several.
    """

    file: str
    problem: str
    kind: str = ""
    detail: str = ""


@dataclass(frozen=True)
class Dataset:
    """What was found in a folder: all its pairs as `pool`, and its own `splits` (none where it defines none)."""

    root: Path
    layout: str
    classes: ClassMap
    pool: tuple[Pair, ...]
    splits: dict[str, tuple[Pair, ...]] = field(default_factory=dict)
    problems: tuple[Problem, ...] = ()


# Key -> the files that claim it: one, unless names differ in nothing but what the key leaves out.
_Files = Mapping[str, list[os.DirEntry[str]]]


def _keyed(folder: Path, wanted: Callable[[str], bool], key: Callable[[str], str]) -> _Files:
    """A folder's entries of the wanted names, by key."""
    found: dict[str, list[os.DirEntry[str]]] = {}
    with os.scandir(folder) as entries:
        for entry in sorted(entries, key=lambda e: e.name):
            if wanted(entry.name):
                found.setdefault(key(entry.name), []).append(entry)
    return found


def _images(folder: Path, suffix: str = "") -> _Files:
    """A folder's images by stem, without the `suffix` that labels have."""
    return _keyed(
        folder,
        lambda name: Path(name).suffix.lower() in IMAGE_SUFFIXES,
        lambda name: Path(name).stem.removesuffix(suffix),
    )


def _fault(entry: os.DirEntry[str]) -> str | None:
    """Why an entry cannot be used as an image or label file, whatever it holds."""
    if not is_plain(entry.name):
        return "has a name that is not UTF-8, or has control characters: rename it"
    if entry.is_symlink() and not os.path.exists(entry.path):
        return f"is a broken link to {shown(os.readlink(entry.path))}: mend or remove it"
    if entry.is_dir():
        return "is a folder with the name of an image: rename or remove it"
    return None if entry.is_file() else "is a pipe or a device, no image: remove it"


def _listed(path: Path) -> list[str]:
    """Stems named by a list file: the first name of each line, whatever folder it claims to be in."""
    lines = read_text(path).splitlines()
    return [Path(line.split()[0].replace("\\", "/")).stem for line in lines if line.strip()]


def _pair(images: _Files, labels: _Files) -> tuple[tuple[Pair, ...], list[Problem]]:
    """Match images and labels by key; what cannot be used, or stands on one side only, is a problem.

    Where two files claim a key, nothing says which is meant, and neither is used.
    """
    problems, bad = [], set()
    for here, there, missing in ((images, labels, "no label of that name"), (labels, images, "no image of that name")):
        for key, (first, *others) in here.items():
            found = [(entry, fault) for entry in (first, *others) if (fault := _fault(entry))]
            if others and not found:
                names = ", ".join(entry.name for entry in others)
                found = [(first, f"stands for the same sample as {names} beside it: keep one of them")]
            elif key not in there and not found:
                found = [(first, missing)]
            if found:
                bad.add(key)
                problems += [Problem(shown(entry.path), fault) for entry, fault in found]
    both = [(images[key][0], labels[key][0]) for key in images.keys() & labels.keys() - bad]
    pairs = [Pair(Path(image.name).stem, image.path, label.path) for image, label in both]
    return tuple(sorted(pairs, key=_order)), sorted(problems, key=lambda p: p.file)


def _order(pair: Pair) -> tuple[bytes, str]:
    return pair.stem.encode(), pair.image


def _choose(pairs: tuple[Pair, ...], stems: Iterable[str], source: Path) -> tuple[tuple[Pair, ...], list[Problem]]:
    """The pairs a list file names, in stem order; names without a pair are problems."""
    wanted = set(stems)
    unknown = wanted - {p.stem for p in pairs}
    missing = [Problem(str(source), f"names {shown(stem)}, which has no image and label here") for stem in unknown]
    return tuple(p for p in pairs if p.stem in wanted), sorted(missing, key=lambda p: p.problem)


def _split_folders(root: Path, label_folder: str, label_suffix: str, classes: ClassMap, layout: str) -> Dataset:
    """Layouts with one image and one label folder per split, and perhaps a list file beside them."""
    splits, problems = {}, []
    for split in SPLITS:
        images, labels = root / split, root / label_folder.format(split)
        if not images.is_dir():
            continue
        if not labels.is_dir():
            raise FastsegError(f"{images} has no label folder: expected {labels}")
        pairs, found = _pair(_images(images), _images(labels, label_suffix))
        problems += found
        names = root / f"{split}.txt"
        if names.is_file():
            pairs, found = _choose(pairs, _listed(names), names)
            problems += found
        splits[split] = pairs
    pool = tuple(sorted((p for pairs in splits.values() for p in pairs), key=_order))
    return Dataset(root, layout, classes, pool, splits, tuple(problems))


def _segnet(root: Path) -> Dataset:
    return _split_folders(root, "{}annot", "", camvid_indexed(), "segnet")


def _kaggle(root: Path) -> Dataset:
    return _split_folders(root, "{}_labels", "_L", _class_dict(root / "class_dict.csv"), "kaggle")


def _class_dict(path: Path) -> ClassMap:
    """Kaggle's class_dict.csv: CamVid's 32 are grouped into 11, other classes stand each for itself."""
    text = read_text(path)
    try:
        rows = [(r["name"].strip(), (int(r["r"]), int(r["g"]), int(r["b"]))) for r in csv.DictReader(io.StringIO(text))]
    except (KeyError, TypeError, ValueError, AttributeError, csv.Error) as error:
        raise FastsegError(f"{path}: expected the columns name,r,g,b with whole numbers ({error!r})") from None
    if not rows:
        raise FastsegError(f"{path}: expected the columns name,r,g,b and a row for each class; it has no rows")
    of_color: dict[Color, str] = {}
    for name, color in rows:
        if not all(0 <= part <= 255 for part in color):
            raise FastsegError(f"{path}: {shown(name)} has the colour {brief(color)}: three numbers 0..255")
        if color in of_color:
            raise FastsegError(f"{path}: {shown(of_color[color])} and {shown(name)} have the same colour {color}")
        of_color[color] = name
    if all(name in CAMVID_32 and CAMVID_32[name][0] == color for name, color in rows):
        return camvid_colored()
    classes = [(name, color) for name, color in rows if name.lower() != "void"]
    names = [name for name, _ in classes]
    from_color = {color: names.index(name) if name in names else VOID for name, color in rows}
    return _class_map(path, names, [color for _, color in classes], from_color=from_color)


def _class_map(path: Path, names: list[str], colors: list[Color], **values: Mapping) -> ClassMap:
    """The class map that a file describes; what is wrong with it is said with the file's name."""
    for name in names:
        if not is_plain(name):
            raise UsageError(f"{path}: the class name {name!r} has control characters: rename it")
    try:
        return ClassMap(tuple(names), tuple(colors), **values)
    except UsageError as error:
        raise UsageError(f"{path}: {error}") from None


def _original(root: Path) -> Dataset:
    images, labels = root / "701_StillsRaw_full", root / "LabeledApproved_full"
    pool, problems = _pair(_images(images), _images(labels, "_L"))
    splits = {}
    for split in SPLITS:
        names = root / f"{split}.txt"
        if names.is_file():
            splits[split], found = _choose(pool, _listed(names), names)
            problems += found
    return Dataset(root, "original", camvid_colored(), pool, splits, tuple(problems))


def _fastai(root: Path) -> Dataset:
    path = root / "codes.txt"
    codes = [line.strip() for line in read_text(path).splitlines() if line.strip()]
    if not 0 < len(codes) <= 256:
        raise FastsegError(f"{path}: expected a class name on each line, of 1 to 256; it has {len(codes) or 'none'}")
    if all(name in CAMVID_32 for name in codes):
        classes = camvid_coded(codes)
    else:
        names = [name for name in codes if name.lower() != "void"]
        indices = {i: names.index(name) if name in names else VOID for i, name in enumerate(codes)}
        classes = _class_map(path, names, [_hue(i, len(names)) for i in range(len(names))], from_index=indices)
    pool, problems = _pair(_images(root / "images"), _images(root / "labels", "_P"))
    val, missing = _choose(pool, _listed(root / "valid.txt"), root / "valid.txt")
    held = set(val)
    splits = {"train": tuple(p for p in pool if p not in held), "val": val}
    return Dataset(root, "fastai", classes, pool, splits, (*problems, *missing))


def _hue(index: int, count: int) -> tuple[int, int, int]:
    """A display colour for a class that brings none."""
    import colorsys

    red, green, blue = colorsys.hsv_to_rgb(index / max(1, count), 0.7, 0.9)
    return int(255 * red), int(255 * green), int(255 * blue)


# Layout -> what must be there for a folder to be it, and its reader. The most telling signs come first.
LAYOUTS: dict[str, tuple[tuple[str, ...], Callable[[Path], Dataset]]] = {
    "original": (("701_StillsRaw_full", "LabeledApproved_full"), _original),
    "fastai": (("images", "labels", "codes.txt", "valid.txt"), _fastai),
    "kaggle": (("train", "train_labels", "class_dict.csv"), _kaggle),
    "segnet": (("train", "trainannot"), _segnet),
}


def find(path: Path) -> Dataset:
    """Recognise the layout of a folder, or read a TOML file that describes a data set.

    Raises:
        UsageError: nothing there, or no layout fits; it names what was looked for and what was found.
        FastsegError: a folder or file that cannot be read, or does not hold what its layout wants, by name.
    """
    if not is_plain(str(path)):
        raise UsageError(f"{shown(path)}: a path that is not UTF-8, or has control characters: rename it")
    try:
        return _find(path)
    except OSError as error:
        raise FastsegError(f"{shown(error.filename or path)}: cannot be read: {error.strerror}") from None


def _find(path: Path) -> Dataset:
    if path.is_file() and path.suffix == ".toml":
        return _described(path)
    if not path.is_dir():
        raise UsageError(f"{path}: no folder; give a data set's folder, a .toml file that describes one or `synth`")
    if (path / "dataset.toml").is_file():
        return _described(path / "dataset.toml")
    for signs, read in LAYOUTS.values():
        if all((path / sign).is_file() if Path(sign).suffix else (path / sign).is_dir() for sign in signs):
            return read(path)
    found = sorted(shown(p.name) + "/" * p.is_dir() for p in path.iterdir())
    listed = ", ".join(found[:8]) + (" and more" if len(found) > 8 else "") or "nothing"
    wanted = "; ".join(f"{name}: {' '.join(signs)}" for name, (signs, _) in LAYOUTS.items())
    raise UsageError(f"{path}: no layout fits. Looked for {wanted}; custom: dataset.toml. Found {listed}")


def _glob(base: Path, pattern: str, key: str) -> _Files:
    """Files of a folder or glob; the key is the part of the name that the one `*` stands for (the stem in a folder)."""
    if not is_plain(pattern):
        raise UsageError(f"{key} = {pattern!r}: has control characters")
    path = base / pattern
    name = path.name if "*" in pattern else ""
    if "*" in pattern and (
        name.count("*") != 1 or re.search(r"[*?\[]", f"{Path(pattern).parent}{name.replace('*', '')}")
    ):
        raise UsageError(f"{key} = {pattern!r}: use one `*`, in the file name, and no other pattern")
    folder = path.parent if name else path
    if not folder.is_dir():
        raise FastsegError(f"{key}: no folder {folder}")
    if not name:
        return _images(folder)
    before, after = name.split("*")
    return _keyed(
        folder,
        lambda file: fnmatch.fnmatchcase(file, name) and len(file) >= len(before) + len(after),
        lambda file: file[len(before) : len(file) - len(after)],
    )


_TOP = {"splits": dict, "classes": list}


def _described(path: Path) -> Dataset:
    """A data set as a TOML file tells: [splits.NAME] images, labels; [[classes]] name, index or color; void = [...]."""
    spec = read_toml(path)
    splits, problems = {}, []
    if spec.keys() - {"splits", "classes", "void"} or not all(isinstance(spec.get(k), t) for k, t in _TOP.items()):
        raise UsageError(f"{path}: wants [splits.train] images, labels; [[classes]] name, index or color; void = [...]")
    for split, part in spec["splits"].items():
        key = f"{path}: splits.{shown(split)}"
        sides = part if isinstance(part, dict) else {}
        if set(sides) != {"images", "labels"} or not all(isinstance(side, str) for side in sides.values()):
            raise UsageError(f"{key} wants exactly `images` and `labels`, each a folder or a glob")
        images, labels = (_glob(path.parent, sides[side], f"{key}.{side}") for side in ("images", "labels"))
        splits[split], found = _pair(images, labels)
        problems += found
    pool = tuple(sorted({p for pairs in splits.values() for p in pairs}, key=_order))
    return Dataset(path.parent, "toml", _described_classes(path, spec), pool, splits, tuple(problems))


def _described_classes(path: Path, spec: dict) -> ClassMap:
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
        colors.append(values[0] if kind == "color" else _hue(position, len(classes)))
    if maps["index"] and maps["color"]:
        raise UsageError(f"{path}: classes by index and by color cannot be mixed")
    kind = "color" if maps["color"] else "index"
    for value in _values(spec.get("void", []), kind, f"{path}: void"):
        if value in maps[kind]:
            raise UsageError(f"{path}: {kind} {value} is both void and a class")
        maps[kind][value] = VOID
    names = [entry["name"] for entry in classes]
    return _class_map(path, names, colors, **{f"from_{kind}": maps[kind]})


def _values(given: object, kind: str, key: str) -> list:
    """One value or a list of them: whole numbers 0..255, or colours of three such numbers."""

    def byte(value: object) -> bool:
        return isinstance(value, int) and not isinstance(value, bool) and 0 <= value <= 255

    def one(value: object) -> bool:
        if kind == "index":
            return byte(value)
        return isinstance(value, list) and len(value) == 3 and all(byte(v) for v in value)

    values = [given] if one(given) else given
    if not isinstance(values, list) or not all(one(v) for v in values):
        wanted = "a number 0..255" if kind == "index" else "a colour [r, g, b]"
        raise UsageError(f"{key} = {brief(given)}: wants {wanted} or a list of them")
    return [tuple(v) if isinstance(v, list) else v for v in values]
