"""Which values or colours masks hold, and how much of each."""

from collections import Counter
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass

import numpy as np
from PIL import Image

from fastseg.data.classes import ClassMap, Color
from fastseg.data.decode import opened, read_label
from fastseg.data.headers import Header, read_header
from fastseg.data.pairs import Pair
from fastseg.errors import FastsegError
from fastseg.texts import shown

Value = int | Color

MAX_COLORS = 1 << 16  # in one mask; what has more is a photo
BY_VALUE = ClassMap(("any",), ((0, 0, 0),), from_index={})
BY_COLOR = ClassMap(("any",), ((0, 0, 0),), from_color={})
_INDEXED = {"1", "L", "P", "I"}  # modes, without their number of bits


@dataclass(frozen=True)
class Values:
    """What some masks hold.

    Attributes:
        is_color: whether these are colours, or the values of grey and palette images.
        pixels, images: how many pixels, and how many masks, have each.
        counted: masks.
        palette: the colours of the values, where the masks have palettes and all of them the same.
        notes: what is odd about the files, a line each.
    """

    is_color: bool
    pixels: Counter[Value]
    images: Counter[Value]
    counted: int
    palette: tuple[Color, ...] = ()
    notes: tuple[str, ...] = ()


def count_values(paths: Sequence[str], threads: int) -> Values:
    """Count the values or colours of masks; those that cannot be read are left out, with a note.

    Raises:
        FastsegError: a mask is a JPEG, holds a value beyond a byte, or the colours of a photo.
    """
    pixels: Counter[Value] = Counter()
    images: Counter[Value] = Counter()
    with ThreadPoolExecutor(threads) as pool:
        headers = list(pool.map(lambda path: read_header(Pair("", path, path)), paths))
        good, notes = _readable(paths, headers), []
        modes = {header.label_mode for header in headers if not header.problem}
        palettes = set(pool.map(_palette, [path for path, h in good if h.label_mode == "P"]))
        is_color = any(mode.split(";")[0] not in _INDEXED for mode in modes)
        shared = max(palettes, key=len, default=())
        if not is_color and any(shared[: len(palette)] != palette for palette in palettes):
            is_color = True
            notes.append("the palettes of the masks differ, so that an index means nothing; they are read by colour")
        elif is_color and {mode.split(";")[0] in _INDEXED for mode in modes} == {False, True}:
            notes.append(f"masks are of several kinds ({', '.join(sorted(modes))}); all are read by colour")
        if any(mode.startswith(("RGBA", "LA")) for mode in modes):
            notes.append("masks have an alpha channel, which is dropped; colours are counted as they are stored")
        counts = list(pool.map(lambda item: _count(item[0], is_color), good))
    for found in counts:
        pixels.update(found)
        images.update(found.keys())
    counted = sum(map(bool, counts))
    if counted < len(paths):
        notes.append(f"masks that cannot be read: {len(paths) - counted}; `fastseg data check` names them")
    return Values(is_color, pixels, images, counted, () if is_color else shared, tuple(notes))


def _readable(paths: Sequence[str], headers: Sequence[Header]) -> list[tuple[str, Header]]:
    """The masks that can be read."""
    bad = [header for header in headers if header.problem]
    # A header that is there, with a problem: compression that changes values.
    if lossy := [header.problem for header in bad if header.label_mode and header.problem]:
        more = f" (and {len(lossy) - 1} more)" if lossy[1:] else ""
        raise FastsegError(
            f"{shown(lossy[0].file)}: {lossy[0].problem}{more}: export the masks anew as PNG; what compression has "
            "mixed up cannot be counted"
        )
    return [(path, header) for path, header in zip(paths, headers, strict=True) if not header.problem]


def _palette(path: str) -> tuple[Color, ...]:
    with opened(path) as file:
        numbers = file.getpalette("RGB") or []
    return tuple((numbers[i], numbers[i + 1], numbers[i + 2]) for i in range(0, len(numbers), 3))


def _count(path: str, is_color: bool) -> dict[Value, int]:
    """{value or colour: pixels} of a mask; empty where its pixels cannot be read."""
    try:
        raw = read_label(path, BY_COLOR if is_color else BY_VALUE)
    except FastsegError:
        return {}
    if is_color:
        counts = Image.fromarray(raw).getcolors(MAX_COLORS)
        if counts is None:
            raise FastsegError(f"{shown(path)}: has more than {MAX_COLORS} colours: it is a photo, no mask")
        return {(color[0], color[1], color[2]): count for count, color in counts if isinstance(color, tuple)}
    lowest, highest = int(raw.min()), int(raw.max())
    if lowest < 0 or highest > 255:
        raise FastsegError(
            f"{shown(path)}: holds the value {highest if highest > 255 else lowest}, and a class is a value "
            "0 to 255: give each class (not each object) one of them, and save the masks anew"
        )
    numbers = np.bincount(raw.ravel(), minlength=256)
    return {int(value): int(numbers[value]) for value in np.flatnonzero(numbers)}
