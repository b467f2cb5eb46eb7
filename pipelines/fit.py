"""Shapes: which part of a file a sample shows, what size it is made, and where that lies in the network's input.

`squeeze` resizes all of a file to the network's input, whatever its shape. `letterbox` keeps its shape: it is resized
by the smaller of the two ratios and lies in the middle, with black and void around it. Windows of a file's own pixels
(`train.scale`) show a part of it at a time. Whatever it is, it is resized, mirrored, and then moved to its place.
"""

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
    """What a training sample shows: a window of its file, resized to `size`, then moved in the batch."""

    window: Box
    size: Shape
    move: Move

    def resized(self) -> "View":
        """The same of pixels that are cut out and resized already, and lie by themselves."""
        return View(Box(0, 0, *self.size), self.size, self.move)


def views_of(part: "BatchPlan", spec: "Spec") -> list[View]:
    """The views of a batch.

    To crop the network's input is to move up and left, and to end sooner. Where `spec.window` is taken from a file that
    is larger, the crop is the window's place; from a smaller one all is taken, and the crop is its place in the input.
    """
    found = []
    moves = zip(part.indices.tolist(), part.mirror.tolist(), part.shift.tolist(), part.crop.tolist(), strict=True)
    for index, mirror, (dy, dx), (y, x) in moves:
        own = spec.headers[index].image_size
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
    _, (height, width), (mirror, dy, dx) = view
    room_y, room_x = height - crop[0], width - crop[1]
    y, x = min(max(-dy, 0), room_y), min(max(-dx, 0), room_x)
    window = Box(y, room_x - x if mirror else x, *crop)
    return View(window, crop, Move(mirror, dy + y, dx + x))


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
