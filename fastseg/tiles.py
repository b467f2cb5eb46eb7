"""Tiled prediction: an image at its own size, cut into overlapping tiles whose scores are blended into one another.

Scores (logits) are summed and not probabilities, as in nnU-Net and MMSegmentation: where the image is one tile, what
comes out is the network's own scores, to the bit. A tile's weight is nnU-Net's: a Gaussian around its middle, of an
eighth of the tile's side as its deviation (Isensee et al., Nature Methods 18, 2021), so that pixels near a tile's edge,
of which the network has seen one side alone, hardly count. It is a product of one factor by row and one by column, and
so is the sum of all tiles' weights: divided by it beforehand, weights add up to 1 at each pixel.

Work goes from top to bottom, and holds one row of tiles: memory grows with the image's width, not with its height.
"""

import itertools
from collections.abc import Callable, Iterable, Iterator
from typing import NamedTuple

import numpy as np
import torch
import torch.nn.functional as F

from fastseg.config import Size, parse_size
from fastseg.errors import UsageError

DEVIATION = 1 / 8  # of the Gaussian, in sides of a tile


class Tiling(NamedTuple):
    """How an image is cut: the tiles' size, and by how many pixels (down, across) neighbours overlap at least."""

    tile: Size
    overlap: Size

    def starts(self, size: Size) -> tuple[list[int], list[int]]:
        """The first row of each row of tiles, and the first column of each column, in an image of `size`."""
        down, across = (_starts(*sides) for sides in zip(size, self.tile, self.overlap, strict=True))
        return down, across


def tiling_of(tile: str | tuple[int, int] | None, overlap: int | None = None) -> Tiling | None:
    """Tiles of a size, such as "360x480", that overlap by so many pixels; None where images are taken whole.

    Args:
        overlap: None for a quarter of each side.

    Raises:
        UsageError: no size, an overlap without one, or one that leaves no step between two tiles.
    """
    if tile is None:
        if overlap is not None:
            raise UsageError(f"--overlap {overlap}: is of tiles; give --tile HEIGHTxWIDTH too")
        return None
    try:
        size = parse_size(tile)
    except ValueError as error:
        raise UsageError(f"--tile: {error}") from None
    if overlap is None:
        return Tiling(size, Size(size.height // 4, size.width // 4))
    if not 0 <= overlap < min(size):
        raise UsageError(f"--overlap {overlap}: tiles of {size} overlap by 0 to {min(size) - 1} pixels")
    return Tiling(size, Size(overlap, overlap))


def _starts(size: int, tile: int, overlap: int) -> list[int]:
    """Where tiles begin along one axis: the last one is moved inwards, until it ends with the image."""
    return [*range(0, max(size - tile, 0), tile - overlap), max(size - tile, 0)]


def axis_weights(starts: list[int], tile: int, size: int) -> list[torch.Tensor]:
    """float32[min(tile, size)] for each tile along an axis: what its pixels count; at each pixel all sum to 1."""
    length = min(tile, size)
    places = (np.arange(length) - (length - 1) / 2) / (DEVIATION * length)
    gaussian = np.exp(-(places**2) / 2)  # 0.0003 at the edges, never 0
    total = np.zeros(size)
    for start in starts:
        total[start : start + length] += gaussian
    return [torch.from_numpy((gaussian / total[start : start + length]).astype(np.float32)) for start in starts]


class Picture(NamedTuple):
    """An image to predict: `rows(top, bottom)` are those of its pixels, normalised, [3, bottom - top, W]."""

    key: int
    size: Size
    rows: Callable[[int, int], torch.Tensor]

    @classmethod
    def of(cls, key: int, image_CHW: torch.Tensor) -> "Picture":
        """An image that is in memory, [3, H, W]."""
        return cls(key, Size(*image_CHW.shape[1:]), lambda top, bottom: image_CHW[:, top:bottom])


class _Tile(NamedTuple):
    picture: Picture
    row: int
    column: int
    pixels: torch.Tensor


def _cut(pictures: Iterable[Picture], tiling: Tiling) -> Iterator[_Tile]:
    """All tiles, row by row; those of a smaller image are as small as that."""
    height, width = tiling.tile
    for picture in pictures:
        tops, lefts = tiling.starts(picture.size)
        for row, top in enumerate(tops):
            band = picture.rows(top, min(top + height, picture.size.height))
            for column, left in enumerate(lefts):
                yield _Tile(picture, row, column, band[..., left : left + width])


def _scored(
    tiles: Iterable[_Tile], size: Size, network: Callable[[torch.Tensor], torch.Tensor], batch: int, *, pad: bool
) -> Iterator[tuple[_Tile, torch.Tensor]]:
    """Each tile and its scores [C, h, w], of the size of tiles; `batch` tiles go through the network at once.

    A smaller tile is padded below and to the right by zeros, the mean colour.
    """
    tiles = iter(tiles)
    while group := list(itertools.islice(tiles, batch)):
        shape = (batch if pad else len(group), 3, *size)
        first = group[0].pixels
        images = torch.empty(shape, dtype=first.dtype, device=first.device, memory_format=torch.channels_last).zero_()
        for image, tile in zip(images, group, strict=False):
            _, height, width = tile.pixels.shape
            image[:, :height, :width] = tile.pixels
        scores = network(images)[: len(group)].float()
        if scores.shape[-2:] != size:
            scores = F.interpolate(scores, size=size, mode="bilinear", align_corners=False)
        yield from zip(group, scores, strict=True)


class _Canvas:
    """The weighted sums of an image's scores, in the rows of one row of tiles."""

    def __init__(self, size: Size, tiling: Tiling) -> None:
        self.size, self.starts = size, tiling.starts(size)
        self.weights = [axis_weights(*along) for along in zip(self.starts, tiling.tile, size, strict=True)]
        self.sums: torch.Tensor | None = None

    def add(self, row: int, column: int, scores_CHW: torch.Tensor) -> Iterator[tuple[int, torch.Tensor]]:
        """Blend in a tile's scores; after the last one of a row, what no other tile touches: (top, [C, h, W])."""
        down, across = (weights[place] for weights, place in zip(self.weights, (row, column), strict=True))
        if self.sums is None:
            # A pixel's scores lie side by side: the best of them is found in a fraction of the time.
            self.sums = scores_CHW.new_zeros(len(down), self.size.width, len(scores_CHW)).permute(2, 0, 1)
        left = self.starts[1][column]
        weight = (down[:, None] * across).to(scores_CHW.device)
        self.sums[..., left : left + len(across)].addcmul_(scores_CHW[:, : len(down), : len(across)], weight)
        if column == len(self.starts[1]) - 1:
            top, *following = self.starts[0][row : row + 2]
            done = (following or [self.size.height])[0] - top
            yield top, self.sums[:, :done]
            kept = self.sums[:, done:].clone()
            self.sums[:, : kept.shape[1]] = kept
            self.sums[:, kept.shape[1] :] = 0


@torch.inference_mode()
def blended(
    pictures: Iterable[Picture],
    tiling: Tiling,
    network: Callable[[torch.Tensor], torch.Tensor],
    batch: int,
    *,
    pad: bool = False,
) -> Iterator[tuple[int, int, torch.Tensor]]:
    """(key, top, scores float32[C, h, W]) of one strip of an image after another, from top to bottom.

    A strip's memory is used again for the next one.

    Args:
        network: normalised images [B, 3, H, W] of the tiles' size -> scores [B, C, h, w], enlarged where smaller.
        batch: tiles of a batch; those of several images meet in one.
        pad: the last batch too has this very shape, so that an image's last bits are the same in any company.
    """
    canvas = None
    for tile, scores in _scored(_cut(pictures, tiling), tiling.tile, network, batch, pad=pad):
        if canvas is None or tile.row == tile.column == 0:
            canvas = _Canvas(tile.picture.size, tiling)
        for top, strip in canvas.add(tile.row, tile.column, scores):
            yield tile.picture.key, top, strip
