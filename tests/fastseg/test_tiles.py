"""Tiles: where they lie, what they weigh, and that their blend is that of a slow reference, pixel by pixel."""

import itertools
import math

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from fastseg.config import Size
from fastseg.errors import UsageError
from fastseg.tiles import Picture, Tiling, axis_weights, blended, tiling_of


class Edgy(nn.Module):
    """Scores of 3 classes that hang on a pixel's neighbours, and so on where the tile ends, in whole numbers."""

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        above, left = F.pad(images, (0, 0, 1, 0))[..., :-1, :], F.pad(images, (1, 0))[..., :-1]
        return images + 2 * above - 3 * left


def picture(pixels: np.ndarray, key: int = 0) -> Picture:
    return Picture.of(key, torch.from_numpy(pixels))


def together(pixels: np.ndarray, tiling: Tiling, network: nn.Module, batch: int = 3) -> np.ndarray:
    """All strips of an image, [C, H, W]; that they come in order, and leave nothing out, is looked at."""
    strips, at = [], 0
    for key, top, strip in blended([picture(pixels)], tiling, network, batch):
        assert (key, top) == (0, at)
        strips.append(strip.numpy().copy())
        at += strip.shape[1]
    return np.concatenate(strips, axis=1)


def slowly(pixels: np.ndarray, tile: tuple[int, int], overlap: tuple[int, int]) -> np.ndarray:
    """The blend by its definition, in float64: each pixel asks each tile that has it."""
    C, H, W = pixels.shape

    def begins(size: int, tile: int, overlap: int) -> list[int]:
        found, at = [], 0
        while at + tile < size:
            found.append(at)
            at += tile - overlap
        return [*found, max(0, size - tile)]

    def weight(place: int, tile: int) -> float:
        return math.exp(-0.5 * ((place - (tile - 1) / 2) / (tile / 8)) ** 2)

    def value(c: int, y: int, x: int, top: int, left: int) -> float:
        """`Edgy`, of a tile that begins at (top, left): beyond it is nothing."""
        above = pixels[c, y - 1, x] if y > top else 0
        before = pixels[c, y, x - 1] if x > left else 0
        return float(pixels[c, y, x]) + 2 * float(above) - 3 * float(before)

    out = np.zeros((C, H, W))
    height, width = min(tile[0], H), min(tile[1], W)
    for y in range(H):
        for x in range(W):
            total = 0.0
            for top in begins(H, tile[0], overlap[0]):
                for left in begins(W, tile[1], overlap[1]):
                    if top <= y < top + height and left <= x < left + width:
                        w = weight(y - top, height) * weight(x - left, width)
                        total += w
                        for c in range(C):
                            out[c, y, x] += w * value(c, y, x, top, left)
            out[:, y, x] /= total
    return out


@pytest.mark.parametrize(
    ("size", "tile", "overlap"),
    [
        ((1, 1), (4, 4), None),  # smaller than a tile
        ((8, 12), (8, 12), None),  # one tile
        ((9, 13), (8, 12), None),  # the last tiles are moved by 7 and 11
        ((31, 23), (8, 12), 3),
        ((17, 40), (16, 8), 7),  # an overlap of more than a half: three tiles meet
        ((20, 5), (8, 8), 0),  # none, and narrower than a tile
    ],
)
def test_the_blend_is_that_of_a_slow_reference(size, tile, overlap):
    pixels = np.random.default_rng(0).integers(-9, 10, (3, *size)).astype(np.float32)
    tiling = tiling_of(tile, overlap)
    found, wanted = together(pixels, tiling, Edgy()), slowly(pixels, tile, tiling.overlap)
    np.testing.assert_allclose(found, wanted, atol=1e-4)
    first, second = np.sort(wanted, axis=0)[:-3:-1]
    sure = first - second > 1e-3
    assert sure.mean() > 0.9
    assert np.array_equal(found.argmax(0)[sure], wanted.argmax(0)[sure])


def test_one_tile_is_the_networks_own_scores_to_the_bit():
    pixels = np.random.default_rng(0).normal(size=(3, 8, 12)).astype(np.float32)
    wanted = Edgy()(torch.from_numpy(pixels)[None])[0].numpy()
    assert np.array_equal(together(pixels, tiling_of("8x12"), Edgy()), wanted)
    # So is a smaller image, which sees zeros beyond its lower and right edges.
    small = np.ascontiguousarray(pixels[:, :5, :7])
    padded = np.zeros_like(pixels)
    padded[:, :5, :7] = small
    wanted = Edgy()(torch.from_numpy(padded)[None])[0].numpy()[:, :5, :7]
    assert np.array_equal(together(small, tiling_of("8x12"), Edgy()), wanted)


@settings(max_examples=200, deadline=None)
@given(size=st.integers(1, 400), tile=st.integers(1, 120), data=st.data())
def test_tiles_cover_an_axis_and_their_weights_add_up_to_one(size, tile, data):
    overlap = data.draw(st.integers(0, tile - 1))
    starts, _ = Tiling(Size(tile, tile), Size(overlap, overlap)).starts(Size(size, 1))
    length = min(tile, size)
    assert (starts[0], starts[-1] + length) == (0, size)
    assert all(a < b <= a + tile - overlap for a, b in itertools.pairwise(starts))
    weights = axis_weights(starts, tile, size)
    total = np.zeros(size)
    for start, weight in zip(starts, weights, strict=True):
        assert (weight > 0).all()
        total[start : start + length] += weight.numpy()
    np.testing.assert_allclose(total, 1, atol=1e-5)


def test_a_weight_falls_towards_the_tiles_edge():
    # Two tiles of 8 that share 4 pixels, whose distances from the middles are 0.5 to 3.5, and the other way around.
    first, second = axis_weights([0, 4], 8, 12)
    assert first[:4].tolist() == [1] * 4
    sigma = 1.0  # an eighth of 8 pixels
    for place, (here, there) in enumerate([(0.5, 3.5), (1.5, 2.5), (2.5, 1.5), (3.5, 0.5)]):
        share = 1 / (1 + math.exp((here**2 - there**2) / (2 * sigma**2)))
        assert first[4 + place] == pytest.approx(share)
        assert second[place] == pytest.approx(1 - share)


def test_tiles_of_several_images_share_batches_and_the_last_one_is_padded_where_asked():
    seen = []

    class Counting(Edgy):
        def forward(self, images):
            seen.append(tuple(images.shape))
            return super().forward(images)

    rng = np.random.default_rng(0)
    several = [rng.integers(-9, 10, (3, *size)).astype(np.float32) for size in ((6, 6), (4, 4), (4, 7))]
    tiling = tiling_of("4x4", 1)  # 4, 1 and 2 tiles
    for pad, batches in ((False, [3, 3, 1]), (True, [3, 3, 3])):
        seen.clear()
        found = {}
        for key, _, strip in blended(map(picture, several, range(3)), tiling, Counting(), 3, pad=pad):
            found.setdefault(key, []).append(strip.numpy().copy())
        assert [shape[0] for shape in seen] == batches
        for key, pixels in enumerate(several):
            assert np.array_equal(np.concatenate(found[key], axis=1), together(pixels, tiling, Edgy(), 1))


def test_scores_smaller_than_the_tile_are_enlarged():
    class Half(nn.Module):
        def forward(self, images):
            return images[..., ::2, ::2]

    pixels = np.random.default_rng(0).normal(size=(3, 8, 12)).astype(np.float32)
    small = torch.from_numpy(pixels)[None, :, ::2, ::2]
    wanted = F.interpolate(small, (8, 12), mode="bilinear", align_corners=False)[0].numpy()
    assert np.array_equal(together(pixels, tiling_of("8x12"), Half()), wanted)


@pytest.mark.parametrize(
    ("tile", "overlap", "message"),
    [
        ("40", None, "--tile: '40' is no size"),
        ("0x40", None, "--tile: '0x40' is no size"),
        ("40x60", 40, "--overlap 40: tiles of 40x60 overlap by 0 to 39 pixels"),
        ("40x60", -1, "--overlap -1: tiles of 40x60 overlap by 0 to 39 pixels"),
        (None, 8, "--overlap 8: is of tiles; give --tile HEIGHTxWIDTH too"),
    ],
)
def test_tiles_that_cannot_be_are_refused(tile, overlap, message):
    with pytest.raises(UsageError, match=f"^{message}"):
        tiling_of(tile, overlap)
    assert tiling_of(None) is None
    assert tiling_of("40x60") == ((40, 60), (10, 15))
