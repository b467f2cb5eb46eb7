"""Pascal VOC as it is downloaded: `JPEGImages`, palette PNGs in `SegmentationClass`, and `ImageSets/Segmentation`."""

from pathlib import Path

from fastseg.data import lists
from fastseg.data.classes import VOID, ClassMap, Color
from fastseg.data.pairs import NO_LABEL, Dataset, Problem, entries, images_in, named_splits, pair_up
from fastseg.errors import FastsegError

# The order of VOC2012's development kit (VOCinit.m), after the background; 255 is the border of objects, and what was
# too difficult to mark, and counts nowhere (devkit_doc, section "Segmentation").
VOC_21 = (
    *("background", "aeroplane", "bicycle", "bird", "boat", "bottle", "bus", "car", "cat", "chair", "cow"),
    *("diningtable", "dog", "horse", "motorbike", "person", "pottedplant", "sheep", "sofa", "train", "tvmonitor"),
)
LISTS = "ImageSets/Segmentation"


def color(index: int) -> Color:
    """The colour of a class, by the development kit's VOClabelcolormap.m: of three bits of the index one each."""
    parts = [0, 0, 0]
    for bit in range(8):
        parts[bit % 3] |= (index >> bit & 1) << (7 - bit // 3)
    return parts[0], parts[1], parts[2]


def classes() -> ClassMap:
    """The 21 classes by palette index, and 255 for void."""
    count = len(VOC_21)
    return ClassMap(VOC_21, tuple(map(color, range(count))), from_index={**{i: i for i in range(count)}, 255: VOID})


def folder_of(path: Path) -> Path | None:
    """The folder of VOC's kind that `path` is, or that it holds as VOCdevkit does (VOC2012).

    A labelling tool's export of the same folders brings its own classes, and a file that names them: it is no VOC.

    Raises:
        FastsegError: it holds several years.
    """

    def is_voc(folder: Path) -> bool:
        named = any((folder / name).is_file() for name in ("labelmap.txt", "class_names.txt"))
        divided = any((folder / LISTS / f"{split}.txt").is_file() for split in ("train", "val"))
        return divided and not named and all((folder / name).is_dir() for name in ("JPEGImages", "SegmentationClass"))

    if is_voc(path):
        return path
    found = [entry for entry in entries(path) if entry.name.startswith("VOC") and entry.is_dir()]
    years = [Path(entry.path) for entry in found if is_voc(Path(entry.path))]
    if len(years) > 1:
        names = ", ".join(year.name for year in years)
        raise FastsegError(f"{path}: holds {names}: give one of them, such as --data {years[-1]}")
    return years[0] if years else None


def read(root: Path) -> Dataset:
    """The data set in VOC's folder `root`. Images that no mask belongs to are for other tasks, and nobody's here."""
    pairs, problems = pair_up(images_in(root / "JPEGImages"), images_in(root / "SegmentationClass"))
    problems = [problem for problem in problems if problem.problem != NO_LABEL]
    splits, missing = {}, dict[str, tuple[Problem, ...]]()
    for split, name in named_splits(root / LISTS, ".txt").items():
        chosen, unnamed = lists.choose(pairs, root / LISTS / name, root, anywhere=True)
        splits[split], missing[split] = tuple(chosen), tuple(unnamed)
        problems += unnamed
    return Dataset(root, "voc", classes(), tuple(pairs.values()), splits, tuple(problems), missing)
