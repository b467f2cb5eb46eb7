"""Shapes: which part of a file a sample shows, what size it is made, and where that lies in the network's input.

`squeeze` resizes all of a file to the network's input, whatever its shape. `letterbox` keeps its shape: it is resized
by the smaller of the two ratios and lies in the middle, with black and void around it. Windows of a file's own pixels
(`train.scale`) show a part of it at a time. At a scale of its own (`augment.scale`) a sample shows a part of its file
too, or lies smaller in black and void. Whatever it is, it is resized, mirrored, and then moved to its place.
"""

import math
from collections.abc import Sequence
from typing import TYPE_CHECKING, NamedTuple

import numpy as np
import torch
import torch.nn.functional as F

from fastseg.kernels.augment import Move

if TYPE_CHECKING:
    from fastseg.pipelines.plan import BatchPlan
    from fastseg.pipelines.source import Spec

Shape = tuple[int, int]  # (height, width)


class Box(NamedTuple):
    """A part of an image, in pixels."""

    top: int
    left: int
    height: int
    width: int

    @property
    def size(self) -> Shape:
        """(height, width)."""
        return self.height, self.width

    @property
    def slices(self) -> tuple[slice, slice]:
        """Of rows and columns."""
        return slice(self.top, self.top + self.height), slice(self.left, self.left + self.width)


def nearest_whole(numerator: int, denominator: int) -> int:
    """A quotient as a whole number, halves up, at least 1."""
    return max(1, (2 * numerator + denominator) // (2 * denominator))


def centred(size: Sequence[int], into: Shape) -> Box:
    """Where an image of `size` lies in the middle of one of size `into`, rounded up and to the left."""
    height, width = size[:2]
    return Box((into[0] - height) // 2, (into[1] - width) // 2, height, width)


def fitted(size: Shape, into: Shape, fit: str) -> Box:
    """Where an image of `size` lies in a network's input of size `into`.

    Under `letterbox` the side that limits fills the input; the other is rounded to whole pixels, halves up, and is at
    least 1; where what is left is odd, the larger part is below, or to the right.
    """
    (height, width), (rows, columns) = size, into
    if fit == "letterbox":
        if rows * width <= columns * height:
            columns = nearest_whole(width * rows, height)
        else:
            rows = nearest_whole(height * columns, width)
    return centred((rows, columns), into)


class View(NamedTuple):
    """What a training sample shows: a window of its file, resized to `size`, then moved in the batch.

    `colour` is its row of `EpochPlan.colour`, or None.
    """

    window: Box
    size: Shape
    move: Move
    colour: np.ndarray | None = None

    def resized(self) -> "View":
        """The same of pixels that are cut out and resized already, and lie by themselves."""
        return self._replace(window=Box(0, 0, *self.size))


def views_of(part: "BatchPlan", spec: "Spec", *, kept: bool = False) -> list[View]:
    """The views of a batch.

    Args:
        kept: they are of what has the network's size already, as a cache keeps it.
    """
    found = _zoomed(part, spec, kept) if part.zoom.size else _whole(part, spec, kept)
    if not part.colour.size:
        return found
    return [view._replace(colour=colour) for view, colour in zip(found, part.colour, strict=True)]


def kept_views(part: "BatchPlan", spec: "Spec") -> list[View]:
    """The views of a batch, of what a cache keeps: files' own pixels, or what they have been resized to."""
    return views_of(part, spec, kept=spec.keep is not None)


def _own(index: int, spec: "Spec", kept: bool) -> Shape:
    """(height, width) of what there is of a file."""
    own = spec.headers[index].image_size
    return fitted(own, spec.size, spec.fit).size if kept else own


def zoomed(own: int, box: float, into: int, scale: float, place: float) -> tuple[int, int, int, int]:
    """Along one axis: where what is taken of a file's side begins, its pixels, what they become, and where that lies.

    All of the file would be scale x `box` pixels. Where that is no more than `into`, it is, somewhere in there; else it
    is as much of the file as `into` pixels show.

    Args:
        own: pixels of the file.
        box: that all of it becomes at a scale of 1.
        into: of the input.
        place: from 0 to below 1, among all that are possible.
    """
    full = max(1, math.floor(scale * box + 0.5))
    if full <= into:
        return 0, own, full, math.floor(place * (into - full + 1))
    taken = nearest_whole(own * into, full)
    return math.floor(place * (own - taken + 1)), taken, into, 0


def _zoomed(part: "BatchPlan", spec: "Spec", kept: bool) -> list[View]:
    """Where scales are jittered: see `zoomed`. Crops are part of that."""
    found, into = [], spec.crop or spec.size
    draws = part.indices.tolist(), part.mirror.tolist(), part.shift.tolist(), part.zoom.tolist()
    for index, mirror, shift, (scale, *places) in zip(*draws, strict=True):
        own = _own(index, spec, kept)
        box: Sequence[float] = fitted(own, spec.size, spec.fit).size
        if spec.window is not None:
            box = [o * i / w for o, i, w in zip(own, into, spec.window, strict=True)]
        axes = (zoomed(o, b, i, scale, place) for o, b, i, place in zip(own, box, into, places, strict=True))
        (top, height, rows, down), (left, width, columns, right) = axes
        move = Move(mirror, shift[0] + down, shift[1] + right)
        found.append(View(Box(top, left, height, width), (rows, columns), move))
    return found


def _whole(part: "BatchPlan", spec: "Spec", kept: bool) -> list[View]:
    """Where all are shown at one scale.

    To crop the network's input is to move up and left, and to end sooner. Where `spec.window` is taken from a file that
    is larger, the crop is the window's place; from a smaller one all is taken, and the crop is its place in the input.
    """
    found = []
    moves = zip(part.indices.tolist(), part.mirror.tolist(), part.shift.tolist(), part.crop.tolist(), strict=True)
    for index, mirror, (dy, dx), (y, x) in moves:
        own = _own(index, spec, kept)
        if spec.window is None:
            box = fitted(own, spec.size, spec.fit)
            found.append(View(Box(0, 0, *own), box.size, Move(mirror, box.top + dy - y, box.left + dx - x)))
            continue
        taken, size = window_of(own, spec.window, spec.size)
        (top, down), (left, right) = (
            (at, 0) if side >= wanted else (0, at) for at, side, wanted in zip((y, x), own, spec.window, strict=True)
        )
        found.append(View(Box(top, left, *taken), size, Move(mirror, dy + down, dx + right)))
    return found


def seen(view: View, crop: Shape) -> View:
    """The view of what alone a batch of `crop` shows of a view that is not resized, and is no smaller.

    A window stays within the image, whatever a move uncovers.
    """
    (height, width), (mirror, dy, dx) = view.size, view.move
    room_y, room_x = height - crop[0], width - crop[1]
    y, x = min(max(-dy, 0), room_y), min(max(-dx, 0), room_x)
    window = Box(y, room_x - x if mirror else x, *crop)
    return View(window, crop, Move(mirror, dy + y, dx + x), view.colour)


def window_of(own: Shape, window: Shape, into: Shape) -> tuple[Shape, Shape]:
    """(height, width) of a window in a file of size `own`, which may be smaller, and what it is resized to."""
    taken = min(own[0], window[0]), min(own[1], window[1])
    rows, columns = (nearest_whole(t * i, w) for t, i, w in zip(taken, into, window, strict=True))
    return taken, (rows, columns)


def rooms_of(headers: Sequence, window: Shape, into: Shape) -> np.ndarray:
    """int64[N, 2]: how many places there are, less one, for each file's window, or for a smaller file in the input."""
    own = np.array([header.image_size for header in headers], np.int64)
    sizes = np.array([window_of(header.image_size, window, into)[1] for header in headers], np.int64)
    return np.where(own >= window, own - window, np.subtract(into, sizes))


def covered(scores_BChw: torch.Tensor, image: Shape, size: Shape, fit: str) -> torch.Tensor:
    """Of a network's scores of its input of `size`, those of what an image of size `image` covers: all, if squeezed.

    Where a part is cut out, scores of another size than the input's are resized to it first (bilinear, half-pixel
    centres).
    """
    box = fitted(image, size, fit)
    if box.size == tuple(size):
        return scores_BChw
    if scores_BChw.shape[-2:] != tuple(size):
        scores_BChw = F.interpolate(scores_BChw.float(), size=tuple(size), mode="bilinear", align_corners=False)
    return scores_BChw[..., *box.slices]
