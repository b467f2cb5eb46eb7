"""Shapes that tools annotate with, as pixels.

A pixel belongs to a shape when its centre lies in it; pixel (0, 0) covers 0 to 1 on both axes, as in COCO and CVAT.
Pillow's ImageDraw cuts coordinates down to whole numbers and draws the outline too: shapes grow by up to a pixel.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from fastseg.data.decode import MAX_PIXELS


@dataclass(frozen=True)
class Region:
    """Pixels of an image: bool[h, w] whose first one is at (top, left)."""

    top: int
    left: int
    inside: np.ndarray


def _range(low: float, high: float, size: int) -> tuple[int, int]:
    """The pixels of 0..size whose centres are in [low, high)."""
    if not math.isfinite(low + high):
        raise ValueError("coordinates must be numbers")
    first, last = (min(max(math.ceil(edge - 0.5), 0), size) for edge in (low, high))
    return first, max(first, last)


def polygon(points: np.ndarray, height: int, width: int) -> Region:
    """The inside of a polygon of points (x, y), float[N, 2], by the even-odd rule.

    Raises:
        ValueError: fewer than three points, or others than numbers.
    """
    if points.ndim != 2 or points.shape[1] != 2 or len(points) < 3:
        raise ValueError("a polygon has three points or more")
    x, y = points.T
    top, bottom = _range(y.min(), y.max(), height)
    left, right = _range(x.min(), x.max(), width)
    other_x, other_y = np.roll(x, -1), np.roll(y, -1)
    # Each edge from its upper end, so that two shapes with a common edge agree on it to the last bit.
    down = y <= other_y
    x_0, x_1 = np.where(down, x, other_x), np.where(down, other_x, x)
    y_0, y_1 = np.where(down, y, other_y), np.where(down, other_y, y)
    # It crosses the rows whose centre is between its ends.
    first, last = (np.clip(np.ceil(end - 0.5), top, bottom).astype(int) for end in (y_0, y_1))
    counts = last - first
    edge = np.repeat(np.arange(len(x)), counts)
    row = first[edge] + np.arange(len(edge)) - np.repeat(np.cumsum(counts) - counts, counts)
    crossing = x_0[edge] + (row + 0.5 - y_0[edge]) * (x_1 - x_0)[edge] / (y_1 - y_0)[edge]
    column = np.clip(np.ceil(crossing - 0.5), left, right).astype(int)
    turns = np.zeros((bottom - top, right - left + 1), bool)
    np.logical_xor.at(turns, (row - top, column - left), True)
    return Region(top, left, np.logical_xor.accumulate(turns, axis=1)[:, :-1])


def box(left: float, top: float, right: float, bottom: float, height: int, width: int) -> Region:
    """A rectangle between two corners, in any order."""
    rows = _range(min(top, bottom), max(top, bottom), height)
    columns = _range(min(left, right), max(left, right), width)
    return Region(rows[0], columns[0], np.ones((rows[1] - rows[0], columns[1] - columns[0]), bool))


def turned_box(left: float, top: float, right: float, bottom: float, degrees: float) -> np.ndarray:
    """The corners float[4, 2] of a rectangle that is turned clockwise, as seen, around its middle."""
    middle = np.array([(left + right) / 2, (top + bottom) / 2])
    corners = np.array([(left, top), (right, top), (right, bottom), (left, bottom)], float) - middle
    cosine, sine = math.cos(math.radians(degrees)), math.sin(math.radians(degrees))
    return corners @ np.array([[cosine, sine], [-sine, cosine]]) + middle


def ellipse(x: float, y: float, radius_x: float, radius_y: float, degrees: float, height: int, width: int) -> Region:
    """An ellipse around (x, y), turned clockwise, as seen."""
    reach = max(radius_x, radius_y)
    rows, columns = _range(y - reach, y + reach, height), _range(x - reach, x + reach, width)
    down, right = np.mgrid[rows[0] : rows[1], columns[0] : columns[1]] + 0.5 - np.array([y, x])[:, None, None]
    cosine, sine = math.cos(math.radians(degrees)), math.sin(math.radians(degrees))
    along, across = right * cosine + down * sine, down * cosine - right * sine
    inside = (along * radius_y) ** 2 + (across * radius_x) ** 2 <= (radius_x * radius_y) ** 2
    return Region(rows[0], columns[0], inside)


def runs(counts: Sequence[int], height: int, width: int, *, by_column: bool) -> np.ndarray:
    """bool[height, width] of the lengths of runs of 0, 1, 0, ..., row after row or column after column.

    Raises:
        ValueError: the lengths do not make up the size, or it is that of no image.
    """
    if height * width > MAX_PIXELS:
        raise ValueError(f"{width}x{height} are more than {MAX_PIXELS} pixels")
    lengths = np.asarray(counts, np.int64)
    if lengths.ndim != 1 or (lengths < 0).any() or lengths.sum() != height * width:
        raise ValueError(f"run lengths do not make up {width}x{height} pixels")
    bits = np.repeat(np.arange(len(lengths)) % 2 == 1, lengths)
    return bits.reshape(width, height).T if by_column else bits.reshape(height, width)


def unpack_counts(text: str) -> list[int]:
    """The run lengths in COCO's compressed text: six bits a letter, five of them digits, differences from the third on.

    As `rleFrString` of pycocotools has it.
    """
    counts: list[int] = []
    value, shift = 0, 0
    for letter in text:
        digit = ord(letter) - 48
        value |= (digit & 31) << shift
        shift += 5
        if not digit & 32:
            if digit & 16:
                value -= 1 << shift
            counts.append(value + (counts[-2] if len(counts) > 2 else 0))
            value, shift = 0, 0
    return counts


def place(bits: np.ndarray, left: int, top: int, height: int, width: int) -> Region:
    """Those of bool[h, w] pixels at (left, top) that are in the image."""
    skip_y, skip_x = max(0, -top), max(0, -left)
    return Region(top + skip_y, left + skip_x, bits[skip_y : height - top, skip_x : width - left])
