"""Folders as tools and people make them, made up: photos of rectangles on noise, and masks of these rectangles.

Each function makes a folder and returns what `fastseg data init` should write of it, said by hand: [splits], void, the
classes' names with their values, and the share of images that is held out.
"""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

HEIGHT, WIDTH = 32, 48
RED, GREEN, BLUE = (255, 0, 0), (0, 255, 0), (0, 0, 255)
BOXES = {1: (slice(4, 20), slice(4, 24)), 2: (slice(16, 30), slice(20, 44))}  # class -> rows and columns


def photo(seed: int) -> Image.Image:
    """Noise around a tone for each class."""
    noise = np.random.default_rng(seed).integers(0, 60, (HEIGHT, WIDTH, 3))
    for value, box in BOXES.items():
        noise[box] += [[0, 0, 0], [150, 0, 0], [0, 150, 0]][value]
    return Image.fromarray(noise.astype(np.uint8))


def indices(void: bool = False) -> np.ndarray:
    """uint8[H, W]: 0, the boxes' classes, and 255 in one corner where there is void."""
    label = np.zeros((HEIGHT, WIDTH), np.uint8)
    for value, box in BOXES.items():
        label[box] = value
    label[:2, :2] = 255 if void else 0
    return label


def colored(*colors: tuple[int, ...]) -> np.ndarray:
    """`indices` as colours: one for each of 0, 1 and 2."""
    return np.array(colors, np.uint8)[indices()]


def save(root: Path, name: str, picture: Image.Image | np.ndarray, **how: Any) -> None:
    path = root / name
    path.parent.mkdir(parents=True, exist_ok=True)
    (picture if isinstance(picture, Image.Image) else Image.fromarray(picture)).save(path, **how)


def expected(
    splits: dict[str, tuple[str, ...]], classes: dict[str, Any], void: tuple = (), val: float | None = None
) -> dict[str, Any]:
    """What tomllib should read: {split: (images, labels[, list])}, {class: index or colour}."""
    keys = ("images", "labels", "list")
    kind = "color" if isinstance(next(iter(classes.values())), list) else "index"
    found: dict[str, Any] = {
        "splits": {name: dict(zip(keys, sides, strict=False)) for name, sides in splits.items()},
        "classes": [{"name": name, kind: value} for name, value in classes.items()],
    }
    return found | ({"void": list(void)} if void else {}) | ({"val": val} if val else {})


def labelme_voc(root: Path) -> dict[str, Any]:
    """LabelMe's VOC export: palette masks, and pictures of them beside."""
    for seed in range(6):
        save(root, f"JPEGImages/{seed:04}.jpg", photo(seed))
        picture = Image.fromarray(indices())
        picture.putpalette([0, 0, 0, 128, 0, 0, 0, 128, 0])
        save(root, f"SegmentationClass/{seed:04}.png", picture)
        save(root, f"SegmentationClassVisualization/{seed:04}.jpg", photo(seed + 50))
    (root / "class_names.txt").write_text("_background_\ncar\nroad", encoding="utf-8")
    sides = ("JPEGImages/*.jpg", "SegmentationClass/*.png")
    return expected({"train": sides}, {"_background_": 0, "car": 1, "road": 2}, val=0.2)


def rgba(root: Path) -> dict[str, Any]:
    """CVAT's labelmap.txt beside RGBA masks."""
    for seed in range(6):
        save(root, f"photos/shot{seed}.jpg", photo(seed))
        save(root, f"labels/shot{seed}.png", colored((0, 0, 0, 0), (*RED, 255), (*GREEN, 255)))
    text = "# label:color_rgb:parts:actions\nroad:0,255,0::\nbackground:0,0,0::\ncar:255,0,0:wheel:\n"
    (root / "labelmap.txt").write_text(text, encoding="utf-8")
    classes = {"background": [0, 0, 0], "road": [0, 255, 0], "car": [255, 0, 0]}
    return expected({"train": ("photos/*.jpg", "labels/*.png")}, classes, val=0.2)


def with_void(root: Path) -> dict[str, Any]:
    """Index masks with 255, in img/ and ann/ of each split."""
    for split, seeds in (("train", range(4)), ("val", range(4, 6)), ("test", range(6, 7))):
        for seed in seeds:
            save(root, f"{split}/img/{seed}.png", photo(seed))
            save(root, f"{split}/ann/{seed}.png", indices(void=True))
    splits = {split: (f"{split}/img/*.png", f"{split}/ann/*.png") for split in ("train", "val", "test")}
    return expected(splits, {"class_0": 0, "class_1": 1, "class_2": 2}, void=(255,))


def cities(root: Path) -> dict[str, Any]:
    """Folders like those of Cityscapes, which no layout knows."""
    for split, towns in (("train", ("bonn", "ulm")), ("val", ("jena", "kiel"))):
        for town in towns:
            for seed in range(2):
                save(root, f"leftImg8bit/{split}/{town}/{town}_{seed}_leftImg8bit.png", photo(seed + 10 * ord(town[0])))
                for kind, label in (("labelIds", indices()), ("color", colored((0, 0, 0), RED, GREEN))):
                    save(root, f"gtCoarse/{split}/{town}/{town}_{seed}_gtCoarse_{kind}.png", label)
    splits = {
        split: (
            f"leftImg8bit/{split}/{{folder}}/{{id}}_leftImg8bit.png",
            f"gtCoarse/{split}/{{folder}}/{{id}}_gtCoarse_labelIds.png",
        )
        for split in ("train", "val")
    }
    return expected(splits, {"class_0": 0, "class_1": 1, "class_2": 2})


def voc_lists(root: Path) -> dict[str, Any]:
    """Folders like those of Pascal VOC, with lists, whose masks have colours, and white boundaries."""
    for seed in range(6):
        save(root, f"pictures/2007_{seed:06}.jpg", photo(seed))
        label = colored((0, 0, 0), (128, 0, 0), (0, 128, 0))
        label[16, 20:44] = (224, 224, 192)
        save(root, f"masks/2007_{seed:06}.png", label)
    (root / "ImageSets" / "Segmentation").mkdir(parents=True)
    for name, seeds in (("train", range(4)), ("val", range(4, 6)), ("trainval", range(6))):
        text = "".join(f"2007_{seed:06}\n" for seed in seeds)
        (root / "ImageSets" / "Segmentation" / f"{name}.txt").write_text(text, encoding="utf-8")
    sides = ("pictures/*.jpg", "masks/*.png")
    # By pixels: 16 x 20 less 4 x 4 under the other; and 14 x 24 less the boundary's 24.
    classes = {"class_0_0_0": [0, 0, 0], "class_0_128_0": [0, 128, 0], "class_128_0_0": [128, 0, 0]}
    splits = {name: (*sides, f"ImageSets/Segmentation/{name}.txt") for name in ("train", "val")}
    return expected(splits, classes, void=([224, 224, 192],))


def roboflow(root: Path) -> dict[str, Any]:
    """Roboflow's semantic export: images and masks in one folder, `valid`, a table of classes."""
    for split, seeds in (("train", range(4)), ("valid", range(4, 6)), ("test", range(6, 7))):
        for seed in seeds:
            save(root, f"{split}/a{seed}_jpg.rf.{seed:032x}.jpg", photo(seed))
            save(root, f"{split}/a{seed}_jpg.rf.{seed:032x}_mask.png", indices())
        (root / split / "_classes.csv").write_text("Pixel Value, Class\n0, background\n1, car\n2, road\n")
    splits = {("val" if s == "valid" else s): (f"{s}/*.jpg", f"{s}/*_mask.png") for s in ("train", "valid", "test")}
    return expected(splits, {"background": 0, "car": 1, "road": 2})


def one_folder(root: Path) -> dict[str, Any]:
    """Images and masks in one folder, both PNG: a.png and a_label.png; Kaggle's class_dict.csv."""
    for name in ("ape", "bee", "cat", "dog", "eel", "fox"):
        save(root, f"{name}.png", photo(ord(name[0])))
        save(root, f"{name}_label.png", colored((0, 0, 0), RED, BLUE))
    (root / "class_dict.csv").write_text(
        "name, r, g, b\nunlabeled,0,0,0\nsea,0,0,255\nroof,255,0,0\n", encoding="utf-8"
    )
    classes = {"sea": [0, 0, 255], "roof": [255, 0, 0]}
    return expected({"train": ("*.png", "*_label.png")}, classes, void=([0, 0, 0],), val=0.2)


def no_split(root: Path) -> dict[str, Any]:
    """Binary masks of 0 and 255 under the images' names, which look like frames of two videos; no split."""
    for video in ("east", "west"):
        for frame in range(4):
            save(root, f"images/{video}_{frame:03}.png", photo(frame + 10 * (video == "west")))
            save(root, f"masks/{video}_{frame:03}.png", (indices() > 0).astype(np.uint8) * 255)
    return expected({"train": ("images/*.png", "masks/*.png")}, {"class_0": 0, "class_255": 255}, val=0.2)


def exif(root: Path) -> dict[str, Any]:
    """Photos of a camera, with an orientation, and masks of what is stored; a.jpg and a.png in one folder."""
    for seed in range(6):
        tags = Image.Exif()
        tags[0x0112], tags[0x010F] = 6, "Camera"
        save(root, f"IMG_{seed:04}.JPG", photo(seed), exif=tags)
        save(root, f"IMG_{seed:04}.png", indices())
    (root / "classes.txt").write_text("car\nroad\n", encoding="utf-8")  # without the background
    sides = ("IMG_*.JPG", "IMG_*.png")
    return expected({"train": sides}, {"background": 0, "car": 1, "road": 2}, val=0.2)


def odd_names(root: Path) -> dict[str, Any]:
    """Names with blanks, umlauts, dots, commas and brackets, in folders with a number in each."""
    for split, seeds in (("Training", range(4)), ("Validation", range(4, 6))):
        for seed in seeds:
            save(root, f"Große Straße/{split}/my photos/Zug nach Köln, {seed} (v1.2) [x].jpeg", photo(seed))
            save(root, f"Große Straße/{split}/my masks/Zug nach Köln, {seed} (v1.2) [x].png", indices())
    splits = {
        name: (f"Große Straße/{split}/my photos/*.jpeg", f"Große Straße/{split}/my masks/*.png")
        for name, split in (("train", "Training"), ("val", "Validation"))
    }
    return expected(splits, {"class_0": 0, "class_1": 1, "class_2": 2})


FOLDERS: tuple[Callable[[Path], dict[str, Any]], ...] = (
    labelme_voc, rgba, with_void, cities, voc_lists, roboflow, one_folder, no_split, exif, odd_names
)  # fmt: skip


# ---- polygons: class 1 is the box of `BOXES`, class 2 the other one on top of it ----

CORNERS = {1: ((4, 4), (24, 20)), 2: ((20, 16), (44, 30))}  # (x, y) of the first and last corner
NAMES = {1: "car", 2: "road"}


def _outline(value: int) -> list[list[float]]:
    (left, top), (right, bottom) = CORNERS[value]
    return [[left, top], [right, top], [right, bottom], [left, bottom]]


def labelme(root: Path) -> None:
    """LabelMe's JSON beside the photos, as written on Windows for some of them; one photo has none."""
    for seed in range(6):
        save(root, f"photos/{seed}.jpg", photo(seed))
        shapes = [
            {"label": "car", "points": _outline(1), "shape_type": "polygon"},
            {"label": "road", "points": CORNERS[2], "shape_type": "rectangle"},
            {"label": "road", "points": [[1, 1], [2, 2]], "shape_type": "line"},
        ]
        document = {
            "imagePath": f"..\\photos\\{seed}.jpg",
            "imageHeight": HEIGHT,
            "imageWidth": WIDTH,
            "shapes": shapes,
        }
        if seed < 5:
            (root / "photos" / f"{seed}.json").write_text(json.dumps(document), encoding="utf-8")


def coco(root: Path) -> None:
    """COCO's instances: polygons, and runs as they are and compressed, of images in folders of each split."""
    road = np.zeros((HEIGHT, WIDTH), bool)
    road[BOXES[2]] = True
    flat = road.T.ravel()
    counts = np.diff([0, *(np.flatnonzero(np.diff(flat)) + 1), flat.size]).tolist()
    for split, seeds in (("train", range(4)), ("val", range(4, 6))):
        images, annotations = [], []
        for seed in seeds:
            save(root, f"{split}/{seed}.jpg", photo(seed))
            images.append({"id": seed, "file_name": f"{seed}.jpg", "height": HEIGHT, "width": WIDTH})
            polygon = [[float(v) for point in _outline(1) for v in point]]
            runs = {"size": [HEIGHT, WIDTH], "counts": counts}
            for category, shape in ((3, polygon), (17, runs)):
                annotations.append({"image_id": seed, "category_id": category, "segmentation": shape})
        categories = [{"id": 3, "name": "car"}, {"id": 17, "name": "road"}]
        document = {"images": images, "annotations": annotations, "categories": categories}
        (root / split / "_annotations.coco.json").write_text(json.dumps(document), encoding="utf-8")


def cvat(root: Path) -> None:
    """CVAT for images 1.1: a box, and a polygon that z_order puts on top although it comes first."""
    rows = []
    for seed in range(6):
        save(root, f"images/{seed}.png", photo(seed))
        points = ";".join(f"{x:.2f},{y:.2f}" for x, y in _outline(2))
        (left, top), (right, bottom) = CORNERS[1]
        rows.append(
            f'<image id="{seed}" name="{seed}.png" width="{WIDTH}" height="{HEIGHT}">'
            f'<polygon label="road" points="{points}" z_order="1"></polygon>'
            f'<box label="car" xtl="{left}.0" ytl="{top}.0" xbr="{right}.0" ybr="{bottom}.0" z_order="0"></box>'
            '<polyline label="car" points="1.0,1.0;2.0,2.0" z_order="0"></polyline></image>'
        )
    labels = "".join(f"<label><name>{name}</name></label>" for name in NAMES.values())
    text = f'<?xml version="1.0" encoding="utf-8"?>\n<annotations><version>1.1</version><meta><task><labels>{labels}'
    text += f"</labels></task></meta>{''.join(rows)}</annotations>\n"
    (root / "annotations.xml").write_text(text, encoding="utf-8")


POLYGONS: tuple[Callable[[Path], None], ...] = (labelme, coco, cvat)
