"""Annotations of LabelMe (JSON), COCO (JSON of instances) and CVAT (XML, "for images 1.1") as shapes of images."""

import base64
import io
import json
import math
from collections import Counter
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from xml.etree import ElementTree

import numpy as np
from PIL import Image

from fastseg.data import shapes
from fastseg.data.decode import READING_ERRORS
from fastseg.data.shapes import Region
from fastseg.errors import FastsegError, first_line
from fastseg.texts import read_text, shown

MAX_BYTES = 1 << 30  # COCO's instances of 118,287 images are 470 MB

Draw = Callable[[int, int], Iterable[Region]]  # (height, width) -> the parts of a shape


@dataclass(frozen=True)
class Shape:
    label: str
    draw: Draw


@dataclass
class Annotated:
    """An image as an annotation file names it, with its shapes: later ones lie on top.

    Attributes:
        source: the annotation file.
        size: (height, width) that the file claims, if it does.
    """

    name: str
    source: Path
    size: tuple[int, int] | None
    shapes: list[Shape] = field(default_factory=list)


@dataclass
class Annotations:
    """What some annotation files say.

    Attributes:
        labels: the names of classes, in the files' order, or sorted where they bring none.
        ignored: kinds of shapes that have no inside, and how many there were.
        tools: how many files there were of each tool.
    """

    images: list[Annotated] = field(default_factory=list)
    labels: list[str] = field(default_factory=list)
    ignored: Counter[str] = field(default_factory=Counter)
    tools: Counter[str] = field(default_factory=Counter)


def read(paths: Sequence[Path]) -> Annotations:
    """All annotations in some .json and .xml files; files that hold something else are none.

    Raises:
        FastsegError: a file that is no JSON or XML, or not as its tool writes it, by name.
    """
    found = Annotations()
    for path in paths:
        text = read_text(path, limit=MAX_BYTES)
        try:
            tool, document = _tool(path, text)
            if tool:
                _READERS[tool](document, path, found)
                found.tools[tool] += 1
        except ElementTree.ParseError as error:
            raise FastsegError(f"{shown(path)}: no XML, or not all of one ({error}): export it anew") from None
        except json.JSONDecodeError as error:
            raise FastsegError(f"{shown(path)}: no JSON, or not all of one ({error}): export it anew") from None
        except RecursionError:
            raise FastsegError(f"{shown(path)}: brackets nested too deep for an annotation") from None
        except (KeyError, TypeError, ValueError, IndexError, AttributeError, OverflowError) as error:
            raise FastsegError(
                f"{shown(path)}: not as LabelMe, COCO or CVAT write it ({first_line(error)}): export it anew"
            ) from None
    used = {shape.label for image in found.images for shape in image.shapes}
    found.labels = list(dict.fromkeys([*found.labels, *sorted(used)]))
    return found


def _tool(path: Path, text: str) -> tuple[str, object]:
    """Whose file it is, and its document; ("", ...) where it is nobody's."""
    if path.suffix.lower() == ".xml":
        # Neither tool writes one, and entities of it could grow to gigabytes.
        if "<!DOCTYPE" in text:
            raise FastsegError(f"{shown(path)}: has a <!DOCTYPE>, which no annotation has: remove it")
        root = ElementTree.fromstring(text)
        return "CVAT" * (root.tag == "annotations"), root
    document = json.loads(text)
    keys = document.keys() if isinstance(document, dict) else set()
    if {"shapes", "imagePath"} <= keys:
        return "LabelMe", document
    return "COCO" * ({"images", "annotations", "categories"} <= keys), document


def _polygon(points: object) -> Draw:
    array = np.asarray(points, float)
    if array.ndim != 2 or array.shape[1] != 2 or len(array) < 3 or not np.isfinite(array).all():
        raise ValueError("a polygon wants three points or more")
    return lambda height, width: [shapes.polygon(array, height, width)]


def _box(left: float, top: float, right: float, bottom: float) -> Draw:
    _numbers(left, top, right, bottom)
    return lambda height, width: [shapes.box(left, top, right, bottom, height, width)]


def _ellipse(x: float, y: float, radius_x: float, radius_y: float, degrees: float = 0.0) -> Draw:
    _numbers(x, y, radius_x, radius_y, degrees)
    return lambda height, width: [shapes.ellipse(x, y, radius_x, radius_y, degrees, height, width)]


def _numbers(*values: float) -> None:
    if not all(math.isfinite(value) for value in values):
        raise ValueError("coordinates must be numbers")


def _labelme(document: dict, path: Path, found: Annotations) -> None:
    size = (document.get("imageHeight"), document.get("imageWidth"))
    image = Annotated(document["imagePath"], path, (int(size[0]), int(size[1])) if size[0] and size[1] else None)
    for shape in document["shapes"]:
        kind, points = shape.get("shape_type") or "polygon", shape["points"]
        if kind == "polygon":
            draw = _polygon(points)
        elif kind == "rectangle":
            draw = _box(*points[0], *points[1])
        elif kind == "circle":
            (x, y), edge = points
            radius = math.dist((x, y), edge)
            draw = _ellipse(x, y, radius, radius)
        elif kind == "mask":
            draw = _labelme_mask(shape["mask"], points)
        else:
            found.ignored[kind] += 1
            continue
        image.shapes.append(Shape(str(shape["label"]), draw))
    found.images.append(image)


def _labelme_mask(text: str, points: Sequence[Sequence[float]]) -> Draw:
    """A PNG, as text, of what is inside a box."""
    left, top = (int(value) for value in points[0])
    try:
        with Image.open(io.BytesIO(base64.b64decode(text))) as file:
            bits = np.array(file.convert("L")) > 0
    except READING_ERRORS as error:  # text that is no base64 is a ValueError
        raise ValueError(f"a mask that is no PNG: {first_line(error)}") from None
    return lambda height, width: [shapes.place(bits, left, top, height, width)]


def _coco(document: dict, path: Path, found: Annotations) -> None:
    names = {category["id"]: str(category["name"]) for category in document["categories"]}
    images = {}
    for image in document["images"]:
        size = (int(image["height"]), int(image["width"])) if image.get("height") and image.get("width") else None
        images[image["id"]] = Annotated(image["file_name"], path, size)
    for annotation in document["annotations"]:
        outline = annotation.get("segmentation")
        if not outline:
            found.ignored["object without a segmentation"] += 1
            continue
        draw = _coco_runs(outline) if isinstance(outline, dict) else _coco_polygons(outline)
        images[annotation["image_id"]].shapes.append(Shape(names[annotation["category_id"]], draw))
    found.images += images.values()
    found.labels += names.values()


def _coco_polygons(outlines: Sequence[Sequence[float]]) -> Draw:
    arrays = [np.asarray(outline, float).reshape(-1, 2) for outline in outlines]
    draws = [_polygon(array) for array in arrays if len(array) > 2]  # of two points some files have a line
    return lambda height, width: [region for draw in draws for region in draw(height, width)]


def _coco_runs(outline: dict) -> Draw:
    height, width = (int(value) for value in outline["size"])
    counts = outline["counts"]
    lengths = shapes.unpack_counts(counts) if isinstance(counts, str) else counts
    bits = shapes.runs(lengths, height, width, by_column=True)
    packed = np.packbits(bits)  # a large file has many of them
    return lambda h, w: [
        shapes.place(np.unpackbits(packed, count=height * width).reshape(height, width).astype(bool), 0, 0, h, w)
    ]


def _cvat(root: ElementTree.Element, path: Path, found: Annotations) -> None:
    meta = root.find("meta")
    for label in meta.iter("label") if meta is not None else ():
        if name := label.findtext("name"):
            found.labels.append(name.strip())
    found.ignored["track of a video"] += len(root.findall("track"))
    for element in root.findall("image"):
        image = Annotated(element.attrib["name"], path, (int(element.attrib["height"]), int(element.attrib["width"])))
        placed = []
        for shape in element:
            if draw := _cvat_shape(shape):
                placed.append((int(shape.get("z_order", 0)), Shape(shape.attrib["label"], draw)))
            else:
                found.ignored[shape.tag] += 1
        image.shapes = [shape for _, shape in sorted(placed, key=lambda item: item[0])]
        found.images.append(image)
    found.ignored = +found.ignored


def _cvat_shape(shape: ElementTree.Element) -> Draw | None:
    def numbers(*names: str) -> list[float]:
        return [float(shape.attrib[name]) for name in names]

    (degrees,) = numbers("rotation") if "rotation" in shape.attrib else (0.0,)
    if shape.tag == "polygon":
        return _polygon([[float(v) for v in point.split(",")] for point in shape.attrib["points"].split(";")])
    if shape.tag == "box":
        left, top, right, bottom = numbers("xtl", "ytl", "xbr", "ybr")
        if degrees:
            return _polygon(shapes.turned_box(left, top, right, bottom, degrees))
        return _box(left, top, right, bottom)
    if shape.tag == "ellipse":
        x, y, radius_x, radius_y = numbers("cx", "cy", "rx", "ry")
        return _ellipse(x, y, radius_x, radius_y, degrees)
    if shape.tag == "mask":
        x_0, y_0, width, height = (int(shape.attrib[name]) for name in ("left", "top", "width", "height"))
        bits = shapes.runs([int(n) for n in shape.attrib["rle"].split(",")], height, width, by_column=False)
        return lambda h, w: [shapes.place(bits, x_0, y_0, h, w)]
    return None


_READERS: dict[str, Callable] = {"LabelMe": _labelme, "COCO": _coco, "CVAT": _cvat}
