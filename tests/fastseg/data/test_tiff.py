"""TIFFs by rows: the pixels that Pillow gives of the whole file, however it is stored; and what has no parts."""

import struct
import zlib
from pathlib import Path

import numpy as np
import pytest
from PIL import Image, TiffImagePlugin

from fastseg.data import tiff
from fastseg.data.decode import decode_image
from fastseg.data.tiff import TiffRows, is_large
from fastseg.errors import FastsegError

SIZE = (150, 70)


def blocks(*shape: int) -> np.ndarray:
    """Noise in blocks of 10, so that every compression has work to do."""
    coarse = np.random.default_rng(0).integers(0, 256, (SIZE[0] // 10, SIZE[1] // 10, *shape), np.uint8)
    return coarse.repeat(10, axis=0).repeat(10, axis=1)


def by_rows(path: Path, step: int = 40, overlap: int = 10) -> np.ndarray:
    """The whole image, read as tiles are: bands that overlap, from top to bottom."""
    rows = TiffRows(path)
    out = np.zeros((rows.height, rows.width, 3), np.uint8)
    for top in range(0, rows.height, step):
        bottom = min(top + step + overlap, rows.height)
        out[top:bottom] = rows.read(top, bottom)
    return out


@pytest.mark.parametrize(
    ("mode", "compression"),
    [
        *[("RGB", how) for how in ("raw", "tiff_lzw", "tiff_adobe_deflate", "packbits", "jpeg")],
        *[(mode, "tiff_lzw") for mode in ("L", "P", "CMYK", "RGBA", "LA")],
        *[("1", "raw"), ("1", "group4"), ("I;16", "raw"), ("I;16", "tiff_lzw")],
    ],
)
@pytest.mark.parametrize("big", [False, True])
def test_strips_of_each_kind(tmp_path, monkeypatch, mode, compression, big):
    monkeypatch.setattr(TiffImagePlugin, "STRIP_SIZE", 3600)
    path = tmp_path / "a.tif"
    if mode == "I;16":
        image = Image.fromarray(np.random.default_rng(0).integers(0, 65536, SIZE, np.uint16))
    else:
        image = Image.fromarray(blocks(3)).convert(mode)
    image.save(path, compression=compression, big_tiff=big)
    assert np.array_equal(by_rows(path), decode_image(str(path)))


def write_tiff(path: Path, pixels: np.ndarray, order: str, tile: tuple[int, int] | None, planar: bool) -> None:
    """RGB uint8 or uint16 [H, W, 3], packed by zlib: one strip, or tiles; of pixels, or of planes one after another."""
    H, W = pixels.shape[:2]
    height, width = tile or (H, W)
    padded = np.pad(pixels, ((0, -H % height), (0, -W % width), (0, 0)))
    planes = [padded[..., i : i + 1] for i in range(3)] if planar else [padded]
    pieces = [
        zlib.compress(plane[y : y + height, x : x + width].astype(pixels.dtype.newbyteorder(order)).tobytes())
        for plane in planes
        for y in range(0, H, height)
        for x in range(0, W, width)
    ]
    ends = np.cumsum([8, *map(len, pieces)]).tolist()
    bits = 8 * pixels.itemsize
    tags: dict[int, list[int]] = {256: [W], 257: [H], 258: [bits] * 3, 259: [8], 262: [2], 277: [3]}
    tags[284] = [2 if planar else 1]
    names = (324, 325) if tile else (273, 279)
    tags |= {names[0]: ends[:-1], names[1]: [*map(len, pieces)]}
    tags |= {322: [width], 323: [height]} if tile else {278: [H]}
    directory, beyond = struct.pack(order + "H", len(tags)), b""
    after = ends[-1] + 2 + 12 * len(tags) + 4
    for tag, values in sorted(tags.items()):
        packed = struct.pack(f"{order}{len(values)}I", *values)
        if len(values) > 1:
            packed, beyond = struct.pack(order + "I", after + len(beyond)), beyond + packed
        directory += struct.pack(order + "HHI", tag, 4, len(values)) + packed
    mark = b"II*\0" if order == "<" else b"MM\0*"
    path.write_bytes(mark + struct.pack(order + "I", ends[-1]) + b"".join(pieces) + directory + bytes(4) + beyond)


@pytest.mark.parametrize("tile", [None, (32, 48), (160, 80)])
@pytest.mark.parametrize(
    ("order", "dtype", "planar"),
    [("<", np.uint8, False), ("<", np.uint8, True), ("<", np.uint16, False), (">", np.uint16, False)],
)
def test_tiles_planes_and_orders_of_bytes(tmp_path, tile, order, dtype, planar):
    pixels = np.random.default_rng(0).integers(0, np.iinfo(dtype).max, (*SIZE, 3), dtype, endpoint=True)
    path = tmp_path / "a.tif"
    write_tiff(path, pixels, order, tile, planar)
    wanted = pixels if dtype == np.uint8 else (pixels >> 8).astype(np.uint8)
    assert np.array_equal(by_rows(path), wanted)


def test_only_what_holds_the_rows_is_read_and_nothing_twice(tmp_path, monkeypatch):
    path = tmp_path / "a.tif"
    write_tiff(path, blocks(3), "<", (32, 48), planar=False)
    read = []
    monkeypatch.setattr(TiffRows, "_row", lambda self, row, real=TiffRows._row: read.append(row) or real(self, row))
    rows = TiffRows(path)
    rows.read(40, 90)
    assert read == [1, 2]
    rows.read(64, 140)
    assert read == [1, 2, 3, 4]
    assert sorted(rows._decoded) == [2, 3, 4]


def test_what_cannot_be_read_in_parts_is_refused_by_name(tmp_path, monkeypatch):
    path = tmp_path / "a.tif"
    write_tiff(path, blocks(3), "<", None, planar=False)
    assert not is_large(path)
    monkeypatch.setattr(tiff, "MAX_PIXELS", 150 * 70 - 1)
    assert is_large(path)
    with pytest.raises(FastsegError, match=r"a\.tif: cannot be decoded: 70x150 in strips of 150 rows, which cannot be"):
        TiffRows(path)
    write_tiff(path, blocks(3), "<", (32, 48), planar=False)
    path.write_bytes(path.read_bytes()[:8] + b"\xff" * 50 + path.read_bytes()[58:])
    rows = TiffRows(path)
    with pytest.raises(FastsegError, match=r"a\.tif: cannot be decoded: "):
        rows.read(0, 10)
    for data in (b"", b"II*\0", b"II*\0" + bytes(40), b"text"):
        path.write_bytes(data)
        assert not is_large(path)
        with pytest.raises(FastsegError, match=r"a\.tif: cannot be decoded: "):
            TiffRows(path)
    assert not is_large(tmp_path / "none.tif")
