"""`fastseg data rasterise`: masks from the polygons of LabelMe, COCO and CVAT."""

import itertools
import os
import shutil
from collections import defaultdict
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path, PureWindowsPath

import numpy as np
from PIL import Image

from fastseg.data import annotations
from fastseg.data.annotations import Annotated, Annotations
from fastseg.data.classes import VOID
from fastseg.data.decode import READING_ERRORS, opened, orientation, reason
from fastseg.data.folders import by_words, files_below, left_of
from fastseg.data.names import BACKGROUNDS, IGNORED
from fastseg.data.pairs import IMAGE_SUFFIXES
from fastseg.errors import FastsegError, UsageError
from fastseg.texts import is_plain, shown

MAX_LABELS = 252  # besides the background, of a label byte


@dataclass(frozen=True)
class Rasterised:
    """What became of some annotations.

    Attributes:
        masks: files that were written.
        classes: their names; the value of each is its place.
        tools: how many annotation files there were of each tool.
        empty: images whose annotation has no shapes, and that got no mask.
        unannotated: images that no annotation names, and that got no mask.
        missing: images that are named and not there.
        overlapping, covered: in how many masks how many pixels of a shape were covered by a later one of another class.
        ignored: kinds of shapes that have no inside, and how many there were.
    """

    masks: int
    classes: tuple[str, ...]
    tools: dict[str, int]
    empty: int
    unannotated: int
    missing: tuple[str, ...]
    overlapping: int
    covered: int
    ignored: dict[str, int]


def rasterise(folder: Path, out: Path, threads: int) -> Rasterised:
    """Draw a mask for each annotated image of `folder` into the new folder `out`, whole or not at all.

    A mask holds the place of its class in `out`/classes.txt, 0 where nothing is, and 255 where LabelMe's `__ignore__`
    is. It lies below `out` as its image below `folder`, but for folders that are called after what they hold (images/).

    Raises:
        UsageError: `out` exists, or there are no annotations. FastsegError: an annotation file or an image that is not
            what it should be, by name; two annotations of one image; `out` cannot be written.
    """
    if out.exists():
        raise UsageError(f"{shown(out)} exists: give a new folder, or remove it")
    found = annotations.read([folder / path for path in files_below(folder, (".json", ".xml"))])
    if not found.images:
        raise UsageError(
            f"{shown(folder)}: no annotations found: looked for LabelMe's and COCO's .json (instances) and CVAT's .xml "
            "(`CVAT for images 1.1`), also in folders below"
        )
    values = _values(folder, found)
    images = files_below(folder, IMAGE_SUFFIXES)
    jobs, missing = _find_images(folder, found.images, images)
    if not jobs:
        raise FastsegError(
            f"{shown(folder)}: none of the {len(missing)} annotated images is here, such as {shown(missing[0])}: put "
            "them into the folder, under the names that the annotations have"
        )
    drawn = {path: image for path, image in jobs.items() if image.shapes}
    masks = _mask_names(folder, sorted(drawn))
    partial_out = out.with_name(f".{out.name}.partial-{os.getpid()}")

    def one(path: Path) -> int:
        pixels, covered = _paint(drawn[path], _size(folder / path, drawn[path]), values)
        target = partial_out / masks[path]
        target.parent.mkdir(parents=True, exist_ok=True)
        # Plain grey: DALI would read a palette's colours.
        Image.fromarray(pixels).save(target)
        return covered

    try:
        partial_out.mkdir(parents=True)
        with ThreadPoolExecutor(threads) as pool:
            covered = list(pool.map(one, masks))
        classes = [name for name, value in values.items() if value not in (0, VOID)]
        (partial_out / "classes.txt").write_text("".join(f"{n}\n" for n in ("background", *classes)), encoding="utf-8")
        partial_out.rename(out)
    except OSError as error:
        raise FastsegError(
            f"{shown(out)} could not be written ({error.strerror or error}); nothing is left of it: "
            "mend that, or give another folder"
        ) from None
    finally:
        shutil.rmtree(partial_out, ignore_errors=True)
    return Rasterised(
        masks=len(masks),
        classes=("background", *classes),
        tools=dict(found.tools),
        empty=len(jobs) - len(drawn),
        unannotated=len(images) - len(jobs),
        missing=tuple(missing),
        overlapping=sum(count > 0 for count in covered),
        covered=sum(covered),
        ignored=dict(found.ignored),
    )


def _values(folder: Path, found: Annotations) -> dict[str, int]:
    """The value of each label: 1, 2, ... in order, 0 for names of the background, 255 for `__ignore__`."""
    values = {name: VOID if name == IGNORED else 0 for name in found.labels if name.lower() in {*BACKGROUNDS, IGNORED}}
    others = [name for name in found.labels if name not in values]
    if bad := [name for name in others if not is_plain(name) or not name.strip()]:
        raise FastsegError(f"{shown(folder)}: the label {bad[0]!r} is empty or has control characters: rename it")
    if len(others) > MAX_LABELS:
        raise FastsegError(f"{shown(folder)}: {len(others)} labels, and a mask holds {MAX_LABELS} and the background")
    return values | {name: value for value, name in enumerate(others, 1)}


def _find_images(
    folder: Path, named: Sequence[Annotated], images: Sequence[Path]
) -> tuple[dict[Path, Annotated], list[str]]:
    """The images, relative to `folder`, that annotations name; and the names that are nowhere.

    A name counts from its annotation file or from `folder`, or else by its end: of the images that are called so, the
    one whose folders agree best.

    Raises:
        FastsegError: a name that several images have, or an image that has several annotations.
    """
    known, by_name = set(images), defaultdict(list)
    for path in images:
        by_name[path.name].append(path)
    found: dict[Path, Annotated] = {}
    missing = []
    for image in named:
        name = Path(PureWindowsPath(image.name).as_posix())  # LabelMe writes \ on Windows
        beside = Path(os.path.normpath(image.source.parent.relative_to(folder) / name))
        paths = [path for path in (beside, name) if path in known][:1] or by_name[name.name]
        if len(paths) > 1:
            # Of those the ones with the longest end in common.
            same = [_same_end(path, name) for path in paths]
            paths = [path for path, end in zip(paths, same, strict=True) if end == max(same)]
        if not paths:
            missing.append(image.name)
            continue
        if len(paths) > 1:
            raise FastsegError(
                f"{shown(image.source)}: {shown(image.name)} may be {shown(paths[0])} or {shown(paths[1])}: give a "
                "folder that holds one of them"
            )
        if (other := found.setdefault(paths[0], image)) is not image:
            raise FastsegError(
                f"{shown(paths[0])}: has annotations in {shown(other.source)} and {shown(image.source)}: keep one"
            )
    return found, missing


def _same_end(path: Path, other: Path) -> int:
    """How many parts two paths have in common, from their ends on."""
    pairs = zip(reversed(path.parts), reversed(other.parts), strict=False)
    return sum(1 for _ in itertools.takewhile(lambda pair: pair[0] == pair[1], pairs))


def _mask_names(folder: Path, paths: Sequence[Path]) -> dict[Path, Path]:
    """{image: mask}, both relative: as the image lies, less the words of folders such as images/.

    Raises:
        FastsegError: two images would have the same mask.
    """
    masks: dict[Path, Path] = {}
    taken: dict[Path, Path] = {}
    for path in paths:
        mask = Path(*left_of(by_words(path.parts[:-1])), f"{path.stem}.png")
        if mask in taken:
            raise FastsegError(
                f"{shown(folder / path)}: would have the same mask as {shown(taken[mask])}: rename one of them"
            )
        taken[mask] = path
        masks[path] = mask
    return masks


def _size(path: Path, image: Annotated) -> tuple[int, int]:
    """(height, width) of an image file, which its annotation must agree with."""
    try:
        with opened(str(path)) as file:
            size, turned = (file.height, file.width), orientation(file) > 1
    except READING_ERRORS as error:
        raise FastsegError(f"{shown(path)}: cannot be read: {reason(str(path), error)}") from None
    if image.size not in (None, size):
        cure = (
            "it has an EXIF orientation: save it upright"
            if turned and image.size == size[::-1]
            else "give the image that was annotated"
        )
        height, width = image.size or size
        raise FastsegError(
            f"{shown(path)}: is {size[1]}x{size[0]}, and {shown(image.source)} was drawn on {width}x{height} "
            f"(width x height): {cure}"
        )
    return size


def _paint(image: Annotated, size: tuple[int, int], values: dict[str, int]) -> tuple[np.ndarray, int]:
    """A mask uint8[H, W], and how many of its pixels were covered by a later shape of another class."""
    pixels, drawn = np.zeros(size, np.uint8), np.zeros(size, bool)
    covered = 0
    for shape in image.shapes:
        value = values[shape.label]
        for region in shape.draw(*size):
            height, width = region.inside.shape
            part = np.s_[region.top : region.top + height, region.left : region.left + width]
            covered += int(np.count_nonzero(region.inside & drawn[part] & (pixels[part] != value)))
            pixels[part][region.inside] = value
            drawn[part] |= region.inside
    return pixels, covered
