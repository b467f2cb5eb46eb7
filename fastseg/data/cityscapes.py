"""Cityscapes as it is downloaded: `leftImg8bit/SPLIT/CITY/*.png` and `gtFine/SPLIT/CITY/*_labelIds.png`."""

from pathlib import Path

from fastseg.data.classes import VOID, ClassMap, Color
from fastseg.data.pairs import Dataset, Problem, fault, named_splits, pair_up, pooled
from fastseg.data.patterns import parse
from fastseg.errors import FastsegError

# The 19 classes that are trained and scored, in the order of their trainId, with their id in the label files and their
# colour: cityscapesScripts, cityscapesscripts/helpers/labels.py (github.com/mcordts/cityscapesScripts). All other ids
# have the trainId 255 or -1 there: they count nowhere.
CITYSCAPES_19: dict[str, tuple[int, Color]] = {
    "road": (7, (128, 64, 128)),
    "sidewalk": (8, (244, 35, 232)),
    "building": (11, (70, 70, 70)),
    "wall": (12, (102, 102, 156)),
    "fence": (13, (190, 153, 153)),
    "pole": (17, (153, 153, 153)),
    "traffic light": (19, (250, 170, 30)),
    "traffic sign": (20, (220, 220, 0)),
    "vegetation": (21, (107, 142, 35)),
    "terrain": (22, (152, 251, 152)),
    "sky": (23, (70, 130, 180)),
    "person": (24, (220, 20, 60)),
    "rider": (25, (255, 0, 0)),
    "car": (26, (0, 0, 142)),
    "truck": (27, (0, 0, 70)),
    "bus": (28, (0, 60, 100)),
    "train": (31, (0, 80, 100)),
    "motorcycle": (32, (0, 0, 230)),
    "bicycle": (33, (119, 11, 32)),
}
NO_TEST = "its test images, whose labels are not public, are left out"


def classes() -> ClassMap:
    """The 19 classes; every other id is void."""
    indices = dict.fromkeys(range(256), VOID)
    indices |= {value: number for number, (value, _) in enumerate(CITYSCAPES_19.values())}
    return ClassMap(tuple(CITYSCAPES_19), tuple(color for _, color in CITYSCAPES_19.values()), from_index=indices)


def read(root: Path) -> Dataset:
    """The data set in `root`. Its test images are left out where they have no labels, or labels that are all void.

    Raises:
        FastsegError: a split has no folder of labels.
    """
    splits, problems, note = {}, list[Problem](), ""
    for split, folder in named_splits(root / "leftImg8bit").items():
        if split == "test" and not _is_public(root / "gtFine" / folder):
            note = NO_TEST
            continue
        images = parse(root, f"leftImg8bit/{folder}/{{city}}/{{id}}_leftImg8bit.png", str(root))
        labels = parse(root, f"gtFine/{folder}/{{city}}/{{id}}_gtFine_labelIds.png", str(root))
        pairs, found = pair_up(images.find(images.slots), labels.find(images.slots))
        splits[split] = tuple(pairs.values())
        problems += found
    return Dataset(root, "cityscapes", classes(), pooled(splits), splits, tuple(problems), note=note)


def _is_public(folder: Path) -> bool:
    """Whether a folder's first label has a pixel of a class; those of the download's test split have none."""
    from fastseg.data.decode import decode_label  # here, since it brings Pillow

    if not folder.is_dir():
        return False
    found = parse(folder, "*/*_gtFine_labelIds.png", str(folder)).find(("*1", "*2")).values()
    labels = [entry.path for files in found for entry in files if not fault(entry)]
    if not labels:
        return False
    try:
        return bool((decode_label(min(labels), classes(), VOID) != VOID).any())
    except FastsegError:
        return True  # `data check` names the file
