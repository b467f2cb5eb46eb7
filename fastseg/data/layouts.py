"""Data sets on disk: recognise a folder's layout and pair its images with its labels.

Nothing here opens an image. Pairs are matched by name, never by position, and are ordered by stem, so that the same
data in two layouts gives the same samples.
"""

import csv
import tomllib
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from pathlib import Path

from fastseg.data.classes import CAMVID_32, VOID, ClassMap, camvid_coded, camvid_colored, camvid_indexed
from fastseg.errors import FastsegError, UsageError

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
    """Something wrong with one file of a data set."""

    file: str
    problem: str


@dataclass(frozen=True)
class Dataset:
    """What was found in a folder: all its pairs as `pool`, and its own `splits` (none where it defines none)."""

    root: Path
    layout: str
    classes: ClassMap
    pool: tuple[Pair, ...]
    splits: dict[str, tuple[Pair, ...]] = field(default_factory=dict)
    problems: tuple[Problem, ...] = ()


def _images(folder: Path) -> dict[str, Path]:
    return {p.stem: p for p in sorted(folder.iterdir()) if p.suffix.lower() in IMAGE_SUFFIXES}


def _listed(path: Path) -> list[str]:
    """Stems named by a list file: the first name of each line, whatever folder it claims to be in."""
    lines = path.read_text(encoding="utf-8").splitlines()
    return [Path(line.split()[0].replace("\\", "/")).stem for line in lines if line.strip()]


def _pair(images: dict[str, Path], labels: dict[str, Path]) -> tuple[tuple[Pair, ...], list[Problem]]:
    """Match two {key: file} tables by key; what stands on one side only is a problem."""
    problems = [Problem(str(images[k]), "no label of that name") for k in images.keys() - labels.keys()]
    problems += [Problem(str(labels[k]), "no image of that name") for k in labels.keys() - images.keys()]
    both = sorted(images.keys() & labels.keys(), key=lambda k: images[k].stem.encode())
    pairs = tuple(Pair(images[k].stem, str(images[k]), str(labels[k])) for k in both)
    return pairs, sorted(problems, key=lambda p: p.file)


def _without(labels: dict[str, Path], suffix: str) -> dict[str, Path]:
    return {stem.removesuffix(suffix): path for stem, path in labels.items()}


def _choose(pairs: tuple[Pair, ...], stems: Iterable[str], source: Path) -> tuple[tuple[Pair, ...], list[Problem]]:
    """The pairs a list file names, in stem order; names without a pair are problems."""
    wanted, known = set(stems), {p.stem for p in pairs}
    missing = [Problem(str(source), f"names {stem}, which has no image and label here") for stem in wanted - known]
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
        pairs, found = _pair(_images(images), _without(_images(labels), label_suffix))
        problems += found
        names = root / f"{split}.txt"
        if names.is_file():
            pairs, found = _choose(pairs, _listed(names), names)
            problems += found
        splits[split] = pairs
    pool = tuple(sorted((p for pairs in splits.values() for p in pairs), key=lambda p: p.stem.encode()))
    return Dataset(root, layout, classes, pool, splits, tuple(problems))


def _segnet(root: Path) -> Dataset:
    return _split_folders(root, "{}annot", "", camvid_indexed(), "segnet")


def _kaggle(root: Path) -> Dataset:
    return _split_folders(root, "{}_labels", "_L", _class_dict(root / "class_dict.csv"), "kaggle")


def _class_dict(path: Path) -> ClassMap:
    """Kaggle's class_dict.csv: CamVid's 32 are grouped into 11, other classes stand each for itself."""
    try:
        with path.open(newline="", encoding="utf-8-sig") as file:
            rows = {r["name"].strip(): (int(r["r"]), int(r["g"]), int(r["b"])) for r in csv.DictReader(file)}
    except (KeyError, TypeError, ValueError, AttributeError) as error:
        raise FastsegError(f"{path}: expected the columns name,r,g,b with whole numbers ({error!r})") from None
    if not rows:
        raise FastsegError(f"{path}: expected the columns name,r,g,b and a row for each class; it has no rows")
    if all(name in CAMVID_32 and CAMVID_32[name][0] == color for name, color in rows.items()):
        return camvid_colored()
    names = [name for name in rows if name.lower() != "void"]
    from_color = {color: names.index(name) if name in names else VOID for name, color in rows.items()}
    return ClassMap(tuple(names), tuple(rows[n] for n in names), from_color=from_color)


def _original(root: Path) -> Dataset:
    images, labels = root / "701_StillsRaw_full", root / "LabeledApproved_full"
    pool, problems = _pair(_images(images), _without(_images(labels), "_L"))
    splits = {}
    for split in SPLITS:
        names = root / f"{split}.txt"
        if names.is_file():
            splits[split], found = _choose(pool, _listed(names), names)
            problems += found
    return Dataset(root, "original", camvid_colored(), pool, splits, tuple(problems))


def _fastai(root: Path) -> Dataset:
    codes = [line.strip() for line in (root / "codes.txt").read_text(encoding="utf-8").splitlines() if line.strip()]
    if not codes:
        raise FastsegError(f"{root / 'codes.txt'}: expected a class name on each line; it has none")
    if all(name in CAMVID_32 for name in codes):
        classes = camvid_coded(codes)
    else:
        names = [name for name in codes if name.lower() != "void"]
        indices = {i: names.index(name) if name in names else VOID for i, name in enumerate(codes)}
        classes = ClassMap(tuple(names), tuple(_hue(i, len(names)) for i in range(len(names))), from_index=indices)
    pool, problems = _pair(_images(root / "images"), _without(_images(root / "labels"), "_P"))
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
    """
    if path.is_file() and path.suffix == ".toml":
        return _described(path)
    if not path.is_dir():
        raise UsageError(f"{path}: no folder; give a data set's folder, a .toml file that describes one or `synth`")
    if (path / "dataset.toml").is_file():
        return _described(path / "dataset.toml")
    for signs, read in LAYOUTS.values():
        if all((path / sign).exists() for sign in signs):
            return read(path)
    found = sorted(p.name + "/" * p.is_dir() for p in path.iterdir())
    shown = ", ".join(found[:8]) + (" and more" if len(found) > 8 else "") or "nothing"
    wanted = "; ".join(f"{name}: {' '.join(signs)}" for name, (signs, _) in LAYOUTS.items())
    raise UsageError(f"{path}: no layout fits. Looked for {wanted}; custom: dataset.toml. Found {shown}")


def _glob(base: Path, pattern: str, key: str) -> dict[str, Path]:
    """Files of a folder or glob; the key is the part of the name that the one `*` stands for (the stem in a folder)."""
    if "*" not in pattern:
        folder = base / pattern
        if not folder.is_dir():
            raise FastsegError(f"{key}: no folder {folder}")
        return _images(folder)
    name = Path(pattern).name
    if name.count("*") != 1 or "*" in str(Path(pattern).parent):
        raise UsageError(f"{key} = {pattern!r}: use one `*`, in the file name")
    before, after = name.split("*")
    paths = sorted((base / pattern).parent.glob(name))
    return {p.name[len(before) : len(p.name) - len(after)]: p for p in paths}


_TOP = {"splits": dict, "classes": list}


def _described(path: Path) -> Dataset:
    """A data set as a TOML file tells: [splits.NAME] images, labels; [[classes]] name, index or color; void = [...]."""
    try:
        spec = tomllib.loads(path.read_text(encoding="utf-8"))
    except (tomllib.TOMLDecodeError, UnicodeDecodeError) as error:
        raise UsageError(f"{path}: not valid TOML: {error}") from None
    splits, problems = {}, []
    if spec.keys() - {"splits", "classes", "void"} or not all(isinstance(spec.get(k), t) for k, t in _TOP.items()):
        raise UsageError(f"{path}: wants [splits.train] images, labels; [[classes]] name, index or color; void = [...]")
    for split, part in spec["splits"].items():
        sides = part if isinstance(part, dict) else {}
        if set(sides) != {"images", "labels"} or not all(isinstance(side, str) for side in sides.values()):
            raise UsageError(f"{path}: splits.{split} wants exactly `images` and `labels`, each a folder or a glob")
        key = f"{path}: splits.{split}"
        images, labels = (_glob(path.parent, sides[side], f"{key}.{side}") for side in ("images", "labels"))
        splits[split], found = _pair(images, labels)
        problems += found
    pool = tuple(sorted({p for pairs in splits.values() for p in pairs}, key=lambda p: p.stem.encode()))
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
    names = tuple(entry["name"] for entry in classes)
    if kind == "color":
        return ClassMap(names, tuple(colors), from_color=maps["color"])
    return ClassMap(names, tuple(colors), from_index=maps["index"])


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
        raise UsageError(f"{key} = {given!r}: wants {wanted} or a list of them")
    return [tuple(v) if isinstance(v, list) else v for v in values]
