"""Data sets on disk: recognise a folder's layout and pair its images with its labels.

Nothing here opens an image. Pairs are matched by name, never by position, and are ordered by stem, so that the same
data in two layouts gives the same samples.
"""

import csv
import io
from collections.abc import Callable
from pathlib import Path

from fastseg.data import cityscapes, described, lists, voc
from fastseg.data.classes import (
    CAMVID_32,
    VOID,
    ClassMap,
    Color,
    camvid_coded,
    camvid_colored,
    camvid_indexed,
    hue,
    map_of,
)
from fastseg.data.pairs import (
    IMAGE_SUFFIXES,
    SPLIT_NAMES,
    SPLITS,
    Dataset,
    Pair,
    Problem,
    entries,
    images_in,
    named_splits,
    pair_up,
    pooled,
)
from fastseg.errors import FastsegError, UsageError
from fastseg.texts import brief, is_plain, pasted, read_text, shown

# What a data set is made of, for those who have one from here.
__all__ = ["IMAGE_SUFFIXES", "LAYOUTS", "SPLITS", "Dataset", "Pair", "Problem", "find"]


def _split_folders(root: Path, label_folder: str, label_suffix: str, classes: ClassMap, layout: str) -> Dataset:
    """Layouts with one image and one label folder per split, and perhaps a list file beside them."""
    splits, problems, missing = {}, [], {}
    names, below = named_splits(root, ".txt"), {entry.name.lower(): entry.name for entry in entries(root)}
    for split, folder in named_splits(root).items():
        wanted = [label_folder.format(name).lower() for name in (folder, *SPLIT_NAMES[split])]
        images, labels = root / folder, next((root / below[name] for name in wanted if name in below), None)
        if labels is None or not labels.is_dir():
            raise FastsegError(f"{images} has no label folder: expected {root / label_folder.format(folder)}")
        pairs, found = pair_up(images_in(images), images_in(labels, label_suffix))
        splits[split] = tuple(pairs.values())
        problems += found
        if split in names:
            chosen, unnamed = lists.choose(pairs, root / names[split], root, anywhere=True)
            splits[split], missing[split] = tuple(chosen), tuple(unnamed)
            problems += unnamed
    splits = {split: splits[split] for split in SPLITS if split in splits}
    return Dataset(root, layout, classes, pooled(splits), splits, tuple(problems), missing)


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
    return map_of(path, names, [color for _, color in classes], from_color=from_color)


def _original(root: Path) -> Dataset:
    images, labels = images_in(root / "701_StillsRaw_full"), images_in(root / "LabeledApproved_full", "_L")
    pairs, problems = pair_up(images, labels)
    splits, missing = {}, {}
    for split, name in named_splits(root, ".txt").items():
        chosen, unnamed = lists.choose(pairs, root / name, root, anywhere=True)
        splits[split], missing[split] = tuple(chosen), tuple(unnamed)
        problems += unnamed
    return Dataset(root, "original", camvid_colored(), tuple(pairs.values()), splits, tuple(problems), missing)


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
        classes = map_of(path, names, [hue(i, len(names)) for i in range(len(names))], from_index=indices)
    pairs, problems = pair_up(images_in(root / "images"), images_in(root / "labels", "_P"))
    val, missing = lists.choose(pairs, root / "valid.txt", root, anywhere=True)
    held, pool = set(val), tuple(pairs.values())
    splits = {"train": tuple(p for p in pool if p not in held), "val": tuple(val)}
    return Dataset(root, "fastai", classes, pool, splits, (*problems, *missing), {"val": tuple(missing)})


# Layout -> what must be there for a folder to be it, and its reader. The most telling signs come first.
LAYOUTS: dict[str, tuple[tuple[str, ...], Callable[[Path], Dataset]]] = {
    "original": (("701_StillsRaw_full", "LabeledApproved_full"), _original),
    "fastai": (("images", "labels", "codes.txt", "valid.txt"), _fastai),
    "kaggle": (("train", "train_labels", "class_dict.csv"), _kaggle),
    "segnet": (("train", "trainannot"), _segnet),
    "cityscapes": (("leftImg8bit", "gtFine"), cityscapes.read),
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
        return described.read(path)
    if not path.is_dir():
        raise UsageError(f"{path}: no folder; give a data set's folder, a .toml file that describes one or `synth`")
    if (path / "dataset.toml").is_file():
        return described.read(path / "dataset.toml")
    inside = {entry.name: entry.is_dir() for entry in entries(path)}
    # Folders of splits are known in any case: Train, train.
    inside |= {name.lower(): is_dir for name, is_dir in inside.items() if name.lower().startswith("train")}
    for signs, read in LAYOUTS.values():
        if all(inside.get(sign) is not bool(Path(sign).suffix) and sign in inside for sign in signs):
            return read(path)
    if folder := voc.folder_of(path):
        return voc.read(folder)
    found = sorted(shown(p.name) + "/" * p.is_dir() for p in path.iterdir())
    listed = ", ".join(found[:8]) + (" and more" if len(found) > 8 else "") or "nothing"
    wanted = "; ".join(f"{name}: {' '.join(signs)}" for name, (signs, _) in LAYOUTS.items())
    raise UsageError(
        f"{path}: no layout fits. Looked for {wanted}; voc: JPEGImages SegmentationClass {voc.LISTS}; custom: "
        f"dataset.toml. Found {listed}. To have a dataset.toml written: fastseg data init {pasted(path)}"
    )
