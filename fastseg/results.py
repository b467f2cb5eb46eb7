"""What `fastseg predict` writes of an image: pictures and arrays that grow from top to bottom, whole or not at all."""

import contextlib
import csv
import os
import re
import struct
import zlib
from collections.abc import Callable, Iterable, Iterator, Sequence
from pathlib import Path
from typing import IO, Any

import numpy as np
import torch

from fastseg.config import Size
from fastseg.data.pairs import RESULTS
from fastseg.errors import UsageError
from fastseg.overlays import colored
from fastseg.runs import whole, write_text
from fastseg.texts import shown

KINDS = ("index", "color", "overlay")
PROBABILITIES = ("png", "npy")
FULL = 65535  # stands for a probability of 1 in a PNG

Colors = tuple[tuple[int, int, int], ...]


def targets(out: Path, name: str, kinds: Iterable[str], classes: Sequence[str]) -> dict[str, Path]:
    """The files of one image, by what is in them.

    OUT/KIND/NAME.png; of the kind `npy` OUT/probabilities/NAME.npy, of `png` OUT/probabilities/NUMBER-CLASS/NAME.png.
    """
    found = {}
    for kind in kinds:
        if kind == "npy":
            found[kind] = out / "probabilities" / f"{name}.npy"
        elif kind == "png":
            for number, each in enumerate(classes):
                readable = re.sub(r"[^\w-]+", "_", each)[:80]
                found[f"png {number}"] = out / "probabilities" / f"{number:02}-{readable}" / f"{name}.png"
        else:
            found[kind] = out / kind / f"{name}.png"
    return found


def refuse_overwriting(inputs: Iterable[Path], outputs: Iterable[Path], *, overwrite: bool) -> None:
    """Raise UsageError where a file to write is one of those to read, or is there already and is to stay."""
    read = {os.path.realpath(path): path for path in inputs}
    there = []
    for path in outputs:
        if mine := read.get(os.path.realpath(path)):
            raise UsageError(f"{shown(path)} would be written over the image {shown(mine)}: give another folder")
        if path.exists():
            there.append(path)
    if there and not overwrite:
        others = f", and {len(there) - 1} others" if there[1:] else ""
        raise UsageError(f"predict: {shown(there[0])} exists{others}: give another folder, or --overwrite")


def note_results(out: Path, folders: Iterable[str]) -> None:
    """Note in an output folder which folders in it hold results, so that nobody takes these for data."""
    path = out / RESULTS
    before = path.read_text(encoding="utf-8", errors="replace").splitlines() if path.is_file() else []
    if more := sorted(set(folders) - set(before)):
        write_text(path, "".join(f"{name}\n" for name in [*before, *more]))


def strip_of(scores_CHW: torch.Tensor, kinds: Iterable[str]) -> dict[str, np.ndarray]:
    """What is to be written of some rows of scores: `index`, uint8[H, W], and of these what `kinds` names.

    `confidence`: uint16[H, W], the probability of the best class times 65535. `png`: uint16[C, H, W], of each class.
    `npy`: float16[C, H, W].
    """
    found = {"index": scores_CHW.argmax(0).to(torch.uint8).cpu().numpy()}
    if {"confidence", *PROBABILITIES} & set(kinds):
        probabilities = scores_CHW.softmax(0)
        if "npy" in kinds:
            found["npy"] = probabilities.half().cpu().numpy()
        for kind, values in (("confidence", probabilities.amax(0)), ("png", probabilities)):
            if kind in kinds:
                found[kind] = (values * FULL).round().to(torch.int32).cpu().numpy().astype(np.uint16)
    return found


class PngWriter:
    """A PNG that is written by rows (Pillow takes a whole picture): grey uint8 or uint16, RGB, or indices of a palette.

    See the PNG specification, sections 5 and 9: signature, IHDR, PLTE, IDAT, IEND; a filter's number before each row.
    """

    def __init__(self, file: IO[bytes], size: Size, dtype: Any = np.uint8, palette: Colors = (), rgb: bool = False):
        self.file, self.dtype = file, np.dtype(dtype).newbyteorder(">")
        self.step = self.dtype.itemsize * (3 if rgb else 1)  # bytes of a pixel
        self.packer = zlib.compressobj(1)
        file.write(b"\x89PNG\r\n\x1a\n")
        kind = 3 if palette else 2 if rgb else 0
        self._chunk(b"IHDR", struct.pack(">IIBBBBB", size.width, size.height, 8 * self.dtype.itemsize, kind, 0, 0, 0))
        if palette:
            self._chunk(b"PLTE", bytes(value for color in palette for value in color))

    def _chunk(self, kind: bytes, data: bytes) -> None:
        self.file.write(struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data)))

    def write(self, rows: np.ndarray) -> None:
        """The next rows, [h, W] or [h, W, 3]."""
        height = len(rows)
        pixels = np.ascontiguousarray(rows, self.dtype).view(np.uint8).reshape(height, -1)
        lines = np.zeros((height, 1 + pixels.shape[1]), np.uint8)
        lines[:, 1:] = pixels
        if self.step > 1:  # differences pack better where values change gradually
            lines[:, 0] = 1
            lines[:, 1 + self.step :] -= pixels[:, : -self.step]
        if data := self.packer.compress(lines.data):
            self._chunk(b"IDAT", data)

    def close(self) -> None:
        """Write what is left."""
        self._chunk(b"IDAT", self.packer.flush())
        self._chunk(b"IEND", b"")


class NpyWriter:
    """A float16 array [C, H, W] in NumPy's format, written by rows of all classes."""

    def __init__(self, file: IO[bytes], size: Size, classes: int) -> None:
        self.file, self.size, self.top = file, size, 0
        header = {"descr": "<f2", "fortran_order": False, "shape": (classes, *size)}
        np.lib.format.write_array_header_1_0(file, header)
        self.start = file.tell()

    def write(self, rows: np.ndarray) -> None:
        """The next rows, [C, h, W]."""
        for number, plane in enumerate(rows):
            self.file.seek(self.start + 2 * self.size.width * (number * self.size.height + self.top))
            self.file.write(np.ascontiguousarray(plane, "<f2").data)
        self.top += rows.shape[1]

    def close(self) -> None:
        """Nothing is left."""


@contextlib.contextmanager
def writing(
    paths: dict[str, Path], size: Size, colors: Colors
) -> Iterator[Callable[[dict[str, np.ndarray], np.ndarray | None], None]]:
    """A function that writes the next rows: of `strip_of`, and for an overlay the photo's, uint8[h, W, 3].

    The files are in place once all went well, and none of them where not.
    """
    with contextlib.ExitStack() as files:
        writers: dict[str, PngWriter | NpyWriter] = {}
        for kind, path in paths.items():
            file = files.enter_context(files.enter_context(whole(path)).open("wb"))
            if kind == "npy":
                writers[kind] = NpyWriter(file, size, len(colors))
            else:
                dtype = np.uint8 if kind in KINDS else np.uint16
                palette = colors if kind == "color" else ()
                writers[kind] = PngWriter(file, size, dtype, palette, rgb=kind == "overlay")

        def write(strip: dict[str, np.ndarray], photo: np.ndarray | None) -> None:
            for kind, writer in writers.items():
                if kind == "overlay":
                    assert photo is not None
                    writer.write(photo // 2 + colored(strip["index"], colors) // 2)
                elif kind.startswith("png "):
                    writer.write(strip["png"][int(kind.removeprefix("png "))])
                else:
                    writer.write(strip["index" if kind == "color" else kind])

        yield write
        for writer in writers.values():
            writer.close()


def write_counts(path: Path, classes: Sequence[str], counts: Iterable[tuple[str, np.ndarray]]) -> None:
    """A CSV of how many pixels each image has, and how many of each class."""
    with whole(path) as partial, partial.open("w", newline="", encoding="utf-8") as file:
        writer = csv.writer(file)
        writer.writerow(["image", "pixels", *classes])
        for name, pixels in counts:
            writer.writerow([shown(name), int(pixels.sum()), *pixels.tolist()])
