"""File headers: what each image and label file is, read once before anything is decoded.

Costs about 0.2 ms a file (Pillow reads no pixels). What follows from it: label and image sizes that differ are found
before the first step, resizing to the same size is skipped, and files which DALI would decode to something else than
their values (palette or 16-bit labels) go through the reference tier.
"""

import os
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import partial

import numpy as np
from PIL import Image

from fastseg.data.decode import READING_ERRORS, opened, orientation, raw_mode, reason
from fastseg.data.layouts import Pair, Problem

# Modes (see `raw_mode`) that DALI's decoders turn into the same bytes as we do: images as RGB, labels as they are.
_DALI_IMAGES = {"RGB", "L"}
_DALI_INDEX_LABELS, _DALI_COLOR_LABELS = {"L"}, {"RGB"}
# Kinds of file (see `_kind`) whose first picture DALI 2.4 decodes to the very pixels of Pillow, by its decoders on
# the CPU (nvJPEG's pixels differ a little, as its choice says). GIF, AVIF, TGA, PCX, SGI, QOI and DDS it does not read
# at all. JPEG 2000 is equal too, but a GPU has another decoder for it, which nobody has compared.
_DALI_KINDS = {"PNG", "JPEG", "MPO", "BMP", "TIFF", "WEBP", "PPM"}
# Formats of labels: those that keep values, but for what TIFF holds in the way of others. Of WebP see `_keeps_values`;
# AVIF and JPEG 2000 do not say whether they are lossless.
_LOSSLESS = {"PNG", "BMP", "TIFF", "GIF", "PPM", "TGA", "PCX", "SGI", "QOI"}
_LOSSY_TIFF = {"jpeg", "tiff_jpeg", "webp", "tiff_sgilog", "tiff_sgilog24"}
_JPEG = {"JPEG", "MPO"}  # the second is several JPEGs in a file, of which the first counts


@dataclass(frozen=True)
class Header:
    """One pair's sizes as (height, width), of upright pictures where those are asked for, and modes (see `raw_mode`).

    Attributes:
        turned: the files that have an EXIF orientation.
        problem: what is wrong with the pair, if anything.
        jpeg: the image is a JPEG, by its signature.
        kinds: of the image file and the label file, see `_kind`.
    """

    image_size: tuple[int, int] = (0, 0)
    label_size: tuple[int, int] = (0, 0)
    image_mode: str = ""
    label_mode: str = ""
    turned: tuple[str, ...] = ()
    problem: Problem | None = None
    jpeg: bool = False
    kinds: tuple[str, str] = ("PNG", "PNG")


def _look(path: str, is_label: bool, upright: bool) -> tuple[tuple[int, int], str, bool, str | None, str]:
    """(height, width), mode, whether the file is to be turned, what is wrong with it as a label, its kind."""
    with opened(path) as file:
        kind = _kind(file)  # before its pixels are read
        size, turn = (file.height, file.width), orientation(file)
        if upright and turn >= 5:
            size = size[::-1]
        lossy = _lossy(file, path) if is_label else None
        return size, raw_mode(file), turn > 1, lossy, kind


def _kind(file: Image.Image) -> str:
    """An open file's format by its signature, as Pillow names it, and what is unusual about how it stores pixels.

    "PPM;plain" is written in digits, "PPM;scaled" has another range than 0..255, "BMP;BGR;15" five bits a colour.
    """
    kind, tiles = file.format or "", getattr(file, "tile", None)
    if kind == "PPM" and tiles and tiles[0].codec_name != "raw":
        return "PPM;plain" if tiles[0].codec_name == "ppm_plain" else "PPM;scaled"
    raw = str(tiles[0].args[0]) if kind == "BMP" and tiles else ""
    return f"BMP;{raw}" if raw.startswith("BGR;") else kind


def _keeps_values(file: Image.Image, path: str) -> bool:
    """Whether a file's format is lossless; of WebP, whose two kinds Pillow does not tell apart, by its first picture.

    See RFC 9649, section 2: chunks of four letters, a size, and as many bytes, made even.
    """
    if file.format == "TIFF":
        return file.info.get("compression") not in _LOSSY_TIFF
    if file.format != "WEBP":
        return file.format in _LOSSLESS
    with open(path, "rb") as chunks:
        chunks.seek(12)  # RIFF, a size, WEBP
        while len(head := chunks.read(8)) == 8:
            if head[:4] in (b"VP8 ", b"VP8L"):
                return head[:4] == b"VP8L"
            size = int.from_bytes(head[4:], "little")
            chunks.seek(size + size % 2, os.SEEK_CUR)
    return False  # frames of a film


def _lossy(file: Image.Image, path: str) -> str | None:
    """What is wrong with a label by its signature, whatever its name: compression that changes values."""
    if _keeps_values(file, path):
        return None
    values = np.unique(np.array(file.convert("L"))).tolist()
    seen = f"it holds {len(values)} grey values: {', '.join(map(str, values[:6]))}{', ...' * (len(values) > 6)}"
    return f"is a {file.format}, which need not keep values as they are ({seen}); save labels as PNG"


def read_header(pair: Pair, upright: bool = False) -> Header:
    """Header of a pair, of pictures as they are stored or upright.

    An unreadable file or two sizes that differ are reported in `problem`, not raised.
    """
    found = []
    for path, is_label in ((pair.image, False), (pair.label, True)):
        try:
            found.append(_look(path, is_label, upright))
        except READING_ERRORS as error:
            why = reason(path, error)
            return Header(problem=Problem(path, f"cannot be read: {why}", "unreadable", why))
    (image_size, image_mode, image_turned, _, image_kind), (label_size, label_mode, label_turned, lossy, kind) = found
    turned = (*[pair.image] * image_turned, *[pair.label] * label_turned)
    problem = Problem(pair.label, lossy, "lossy") if lossy else None
    if not lossy and image_size != label_size:
        image, label = (f"{w}x{h}" for h, w in (image_size, label_size))
        sizes = f"image {image}, label {label}"
        ignored = turned and not upright
        cure = "; an EXIF orientation is not applied: --exif apply, or save both upright" if ignored else ""
        problem = Problem(pair.label, f"{sizes} (width x height): they must be equal{cure}", "sizes", sizes)
    return Header(
        image_size, label_size, image_mode, label_mode, turned, problem, image_kind in _JPEG, (image_kind, kind)
    )


def read_headers(pairs: Sequence[Pair], threads: int, upright: bool = False) -> list[Header]:
    """Headers of all pairs, in order: see `read_header`."""
    with ThreadPoolExecutor(threads) as pool:
        return list(pool.map(partial(read_header, upright=upright), pairs, chunksize=16))


def dali_obstacle(pairs: Sequence[Pair], headers: Sequence[Header], is_color: bool) -> str | None:
    """Why DALI cannot decode these files to the right values, or None where it can."""
    labels = _DALI_COLOR_LABELS if is_color else _DALI_INDEX_LABELS
    for pair, header in zip(pairs, headers, strict=True):
        for path, kind in zip((pair.image, pair.label), header.kinds, strict=True):
            if kind not in _DALI_KINDS:
                return f"DALI would not read {path} to its values (it is a {kind})"
        if header.label_mode not in labels:
            return f"DALI would misread {pair.label} (mode {header.label_mode})"
        if header.image_mode not in _DALI_IMAGES:
            return f"DALI would misread {pair.image} (mode {header.image_mode})"
    return None
