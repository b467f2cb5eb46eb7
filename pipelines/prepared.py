"""Prepared data: the decoded samples of a split in memory-mapped files that all processes of a host share.

A store is a folder of three .npy files: NumPy alone reads and maps them, whoever made them, and the page cache holds
them once however many processes look. Its name is a digest of all that decides its contents, so that a source file
that changes makes another store. Each sample is there or not by its own mark, written after its pixels: a process that
is killed while it fills a store leaves whole samples, and those that come later go on from there; two that fill it at
once write the same bytes. Where a store is to stay, the mark is a check sum. A process that shares a store with nobody,
and keeps it for no run to come, has the same arrays in its own memory: pages of shared memory take a millisecond per
360x480 image to be made and given back, a seventh of what decoding takes.
"""

import contextlib
import functools
import hashlib
import json
import os
import shutil
import tempfile
import time
import zlib
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from fastseg.data import home
from fastseg.environment import available_memory
from fastseg.errors import FastsegError
from fastseg.pipelines.fit import fitted
from fastseg.workers import is_worker

if TYPE_CHECKING:
    from fastseg.pipelines.source import Spec

FORMAT = 2
SHARED_MEMORY = Path("/dev/shm")
MEMORY = Path("memory")  # in place of a folder's parent: no file holds the store
ABANDONED = 3600  # seconds after which a store that was never put in place belongs to nobody


@dataclass(frozen=True)
class Shape:
    """What a store holds: the (height, width) of each sample's image and of its label."""

    sizes: tuple[tuple[int, int], ...]
    label_sizes: tuple[tuple[int, int], ...]

    @property
    def nbytes(self) -> int:
        """Bytes of all pixels."""
        return int(self.offsets[-1] + self.label_offsets[-1])

    @functools.cached_property
    def offsets(self) -> np.ndarray:
        """int64[N + 1]: where each image's bytes begin among those of all images, and where the last one's end."""
        return _ends(self.sizes, 3)

    @functools.cached_property
    def label_offsets(self) -> np.ndarray:
        """The same of labels."""
        return _ends(self.label_sizes, 1)


def _ends(sizes: Sequence[tuple[int, int]], channels: int) -> np.ndarray:
    return np.cumsum([0, *(channels * height * width for height, width in sizes)], dtype=np.int64)


class Store:
    """A folder of prepared samples, open for reading and filling.

    Attributes:
        images: the bytes of all images, uint8, [N, H, W, 3] where they have one size. labels: those of class indices,
            [N, h, w] where they have one size. Both memory maps.
        checks: uint32[N], 0 where a sample is not there yet; else the CRC-32 of its pixels, or 1 in a passing store,
            whose pixels nothing can change between its processes.
    """

    def __init__(self, folder: Path, shape: Shape, *, passing: bool) -> None:
        self.folder, self.shape, self.passing = folder, shape, passing
        if folder.parent == MEMORY:
            images, labels, checks = _arrays(shape)
            self.images: np.ndarray = np.empty(*images)
            self.labels: np.ndarray = np.empty(*labels)
            self.checks: np.ndarray = np.zeros(*checks)
        else:
            self.images, self.labels, self.checks = (np.load(folder / name, mmap_mode="r+") for name in FILES)
        self._images, self._labels = self.images.reshape(-1), self.labels.reshape(-1)

    def image(self, index: int) -> np.ndarray:
        """uint8[H, W, 3], a view."""
        start, end = self.shape.offsets[index : index + 2]
        return self._images[start:end].reshape(*self.shape.sizes[index], 3)

    def label(self, index: int) -> np.ndarray:
        """uint8[h, w], a view."""
        start, end = self.shape.label_offsets[index : index + 2]
        return self._labels[start:end].reshape(self.shape.label_sizes[index])

    def ready(self, indices: np.ndarray) -> bool:
        """True where all these samples are there."""
        return bool(self.checks[indices].all())

    def put(self, index: int, image: np.ndarray, label: np.ndarray) -> None:
        """Keep a sample: uint8[H, W, 3] and uint8[h, w]."""
        self.image(index)[:], self.label(index)[:] = image, label
        self.checks[index] = 1 if self.passing else check_of(image, label)

    def broken(self, indices: np.ndarray) -> list[int]:
        """Those of these samples whose pixels are not what was kept."""
        return [int(i) for i in indices if self.checks[i] != check_of(self.image(i), self.label(i))]

    def seal(self) -> None:
        """Once all samples are there: write everything to the disk, and remember that it is complete.

        Raises:
            FastsegError: the disk is full, or fails; the samples are kept.
        """
        partial = self.folder / f".{ABOUT}.partial-{os.getpid()}"
        try:
            for array in (self.images, self.labels, self.checks):
                if isinstance(array, np.memmap):
                    array.flush()
            about = json.loads((self.folder / ABOUT).read_text())
            if not about["complete"]:
                partial.write_text(json.dumps({**about, "complete": True}, indent=1) + "\n")
                partial.replace(self.folder / ABOUT)
        except OSError as error:
            with contextlib.suppress(OSError):  # the first error counts
                partial.unlink(missing_ok=True)
            raise FastsegError(
                f"{self.folder}: {error.strerror}: the samples are kept, but not known to have reached the disk; "
                "mend that and prepare again"
            ) from None

    def release(self) -> None:
        """Give up the name of a passing store; its memory lasts as long as the processes that have it open."""
        if self.passing and self.folder.parent != MEMORY:
            gone = self.folder.with_name(f".{self.folder.name}.partial-{os.getpid()}")
            with contextlib.suppress(OSError):  # another process has given it up
                self.folder.rename(gone)  # at once: a folder of that name is whole
            shutil.rmtree(gone, ignore_errors=True)


FILES = ("images.npy", "labels.npy", "checks.npy")
ABOUT = "about.json"


def check_of(image: np.ndarray, label: np.ndarray) -> int:
    """CRC-32 of a sample's pixels; never 0, which means that there are none."""
    return zlib.crc32(np.ascontiguousarray(label).data, zlib.crc32(np.ascontiguousarray(image).data)) or 1


def shape_of(spec: "Spec", *, resize_labels: bool) -> Shape:
    """What a store of this split holds: samples of their files' own size, or of that which `spec.keep` says.

    Args:
        resize_labels: labels are kept at that size too.
    """
    own = tuple(header.image_size for header in spec.headers), tuple(header.label_size for header in spec.headers)
    if spec.keep is None:
        return Shape(*own)
    sizes = tuple(fitted(size, spec.keep, spec.fit).size for size in own[0])
    return Shape(sizes, sizes if resize_labels else own[1])


def key_of(spec: "Spec", shape: Shape) -> str:
    """Digest of what decides a store's contents: format, sizes, class map, each file's path, size and time, and whether
    pictures are turned upright.
    """
    classes = spec.classes
    tables = classes.color_tables(spec.unknown) if classes.is_color else (classes.index_table(spec.unknown),)
    # Where stored pixels are kept the key is what it was before there was a choice.
    digest = hashlib.sha256(repr((FORMAT, shape, classes.is_color, *["upright"] * spec.upright)).encode())
    for table in tables:
        digest.update(table.data)
    for pair in spec.pairs:
        for path in (pair.image, pair.label):
            state = os.stat(path)
            digest.update(f"{os.path.realpath(path)}\0{state.st_size}\0{state.st_mtime_ns}\n".encode())
    return digest.hexdigest()[:20]


def locate(spec: "Spec", shape: Shape, key: str, taken: Sequence[Path] = ()) -> tuple[Path | None, str]:
    """The folder for a store and where that is, or None and why there is no room for one.

    --cache-dir where it was given; else memory, which processes share, or a file in fastseg's cache folder, that go
    with the run.

    Args:
        taken: folders of stores that are open already, even if they have lost their names.
    """
    megabytes = f"{shape.nbytes / 1e6:.0f} MB"
    if spec.cache_dir:
        folder = Path(spec.cache_dir) / key
        if folder.is_dir() or _free(folder) > shape.nbytes:
            return folder, f"{megabytes} in {spec.cache_dir}"
        return None, f"{spec.cache_dir} has no room for {megabytes}"
    alone = not is_worker()
    if alone and (MEMORY / key in taken or 2 * shape.nbytes < available_memory()):
        return MEMORY / key, f"{megabytes} in memory"
    # All workers of a host have one parent, and so find one store.
    session = os.getpid() if alone else os.getppid()
    for base, limit in ((SHARED_MEMORY, available_memory()), (home() / "passing", shape.nbytes * 4)):
        folder = base / f"fastseg-{os.getuid()}-{session}-{key}"
        if base == SHARED_MEMORY and (alone or not base.is_dir()):
            continue
        if folder in taken or folder.is_dir() or 2 * shape.nbytes < min(_free(folder), limit):
            return folder, f"{megabytes} in {'shared memory' if base == SHARED_MEMORY else base}"
    return None, f"neither memory nor {home()} has twice the {megabytes} that it takes"


def open_store(spec: "Spec", shape: Shape, folder: Path) -> Store:
    """The store in `folder`, made where it is not there yet.

    Raises:
        FastsegError: the disk is full, or may not be written to.
    """
    if folder.parent == MEMORY:
        return Store(folder, shape, passing=True)
    _sweep(folder.parent)
    if not folder.is_dir():
        try:
            _create(shape, folder)
        except OSError as error:
            cure = "give another --cache-dir" if spec.cache_dir else "give a --cache-dir, or --loader dali"
            raise FastsegError(
                f"{folder.parent}: {error.strerror}: decoded data cannot be kept there; {cure}"
            ) from None
    try:
        store, about = Store(folder, shape, passing=not spec.cache_dir), json.loads((folder / ABOUT).read_text())
    except FileNotFoundError:
        if folder.is_dir():
            raise
        return open_store(spec, shape, folder)  # another process has just given it up
    if not store.passing and not about["complete"]:
        # A machine that lost power may have kept check sums whose pixels never reached the disk.
        present = np.flatnonzero(store.checks)
        store.checks[store.broken(present)] = 0
    return store


def _create(shape: Shape, folder: Path) -> None:
    """A store without samples, put in place at once; the first of several processes wins."""
    folder.parent.mkdir(parents=True, exist_ok=True)
    partial = Path(tempfile.mkdtemp(dir=folder.parent, prefix=f".{folder.name}.partial-"))
    try:
        for name, (wanted, dtype) in zip(FILES, _arrays(shape), strict=True):
            np.lib.format.open_memmap(partial / name, mode="w+", dtype=dtype, shape=wanted)
            with (partial / name).open("r+b") as file:
                # A full disk is an error here, where a mapped page without a place behind it would kill the process.
                os.posix_fallocate(file.fileno(), 0, (partial / name).stat().st_size)
        (partial / ABOUT).write_text(json.dumps({"format": FORMAT, "complete": False}) + "\n")
        partial.chmod(0o755)  # mkdtemp's is for its owner alone
        try:
            partial.rename(folder)
        except OSError:
            if not folder.is_dir():  # else another process was first
                raise
    finally:
        shutil.rmtree(partial, ignore_errors=True)


def _arrays(shape: Shape) -> list[tuple[tuple[int, ...], type]]:
    """Shape and dtype of a store's images, labels and checks."""
    images, labels = _array(shape.sizes, shape.offsets, 3), _array(shape.label_sizes, shape.label_offsets)
    return [(images, np.uint8), (labels, np.uint8), ((len(shape.sizes),), np.uint32)]


def _array(sizes: Sequence[tuple[int, int]], offsets: np.ndarray, *channels: int) -> tuple[int, ...]:
    """The shape of the array that holds samples of these sizes: of bytes alone where they differ."""
    return (len(sizes), *sizes[0], *channels) if len(set(sizes)) == 1 else (int(offsets[-1]),)


def _sweep(base: Path) -> None:
    """Remove what killed processes left: stores never put in place, and passing stores whose session has ended."""
    for path in base.glob(".*.partial-*") if base.is_dir() else ():
        with contextlib.suppress(FileNotFoundError):  # its owner has just put it in place
            if path.stat().st_mtime < time.time() - ABANDONED:
                shutil.rmtree(path, ignore_errors=True)
    for path in base.glob(f"fastseg-{os.getuid()}-*-*"):
        session = path.name.split("-")[2]
        if not Path(f"/proc/{session}").exists() and Path("/proc").is_dir():
            shutil.rmtree(path, ignore_errors=True)


def _free(folder: Path) -> int:
    """Bytes free where `folder` is or would be."""
    while not folder.exists():
        folder = folder.parent
    return shutil.disk_usage(folder).free
