"""A trained network on images of any kind and size: `fastseg.load`, and what `fastseg predict` writes."""

from collections import deque
from collections.abc import Collection, Iterator, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor, wait
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image

from fastseg import checkpoint as checkpoints
from fastseg import config as configs
from fastseg.config import Size
from fastseg.data.decode import decode_image, orientation, rgb_of, turned
from fastseg.data.tiff import TiffRows, is_large
from fastseg.distributed import choose_dtype, device_of, dtype_name
from fastseg.environment import cores
from fastseg.errors import FastsegError
from fastseg.inputs import Job
from fastseg.kernels import launch
from fastseg.pipelines.fit import covered, fitted
from fastseg.pipelines.resize import resize_image
from fastseg.pipelines.source import normalise
from fastseg.results import note_results, refuse_overwriting, strip_of, targets, write_counts, writing
from fastseg.runs import checkpoint_of, sole_writer
from fastseg.texts import user_path
from fastseg.tiles import Picture, blended, tiling_of

BATCH = 8  # images, or tiles, that the network sees at once


class Rows(Protocol):
    """An image of which rows can be had, uint8[bottom - top, W, 3]."""

    height: int
    width: int

    def read(self, top: int, bottom: int) -> np.ndarray: ...


class ArrayRows:
    """Rows of pixels uint8[H, W, 3] that are in memory."""

    def __init__(self, pixels: np.ndarray) -> None:
        self.pixels = pixels
        self.height, self.width = pixels.shape[:2]

    def read(self, top: int, bottom: int) -> np.ndarray:
        """See `Rows`."""
        return self.pixels[top:bottom]


def open_rows(path: str | Path, upright: bool = False) -> Rows:
    """An image file by rows: decoded whole, but for TIFFs too large for that, which are read piece by piece.

    Raises:
        FastsegError: it cannot be decoded.
    """
    path = user_path(path)
    return TiffRows(path) if is_large(path) else ArrayRows(decode_image(str(path), upright))


class Predictor:
    """A trained network with what it takes to use it: input size, normalisation, classes.

    Attributes:
        classes: names, by index.
        colors: (red, green, blue) of each class.
        network: `SegNet` or a network of the user's; [B, 3, H, W], normalised, to scores [B, C, H, W].
        tiling: how images are cut into tiles; None where they are resized to the network's size.
    """

    def __init__(
        self,
        state: Mapping[str, Any],
        *,
        device: str | torch.device = "auto",
        dtype: str | torch.dtype = "auto",
        source: str | Path = "checkpoint",
        network: str | Collection[str] = (),
        tile: str | tuple[int, int] | None = None,
        tile_overlap: int | None = None,
    ) -> None:
        self.tiling = tiling_of(tile, tile_overlap)
        self.classes: tuple[str, ...] = tuple(state["classes"])
        self.colors = tuple((red, green, blue) for red, green, blue in state["colors"])
        data = configs.from_dict(state["config"], str(source)).data
        self.size, self.fit, self.upright = data.size, data.fit, data.exif == "apply"
        self.device = device_of(device)
        self.dtype = choose_dtype(dtype_name(dtype), self.device.type).dtype
        self.network = checkpoints.build_model(state, source, network).to(self.device)
        self.network.fused = launch.choose("auto", self.device)[0] == "fused"

    def __call__(self, image: str | Path | Image.Image | np.ndarray | torch.Tensor) -> np.ndarray:
        """The class of each pixel, uint8[H, W] of the image's own size.

        Args:
            image: a file; a PIL image of any mode; an array uint8[H, W, 3], [H, W, 4] (alpha is dropped) or [H, W]
                (grey); or a tensor uint8[3, H, W], as torchvision has them.

        Raises:
            FastsegError: a file that cannot be decoded. TypeError, ValueError: anything else than those.
        """
        return np.concatenate([scores.argmax(0).to(torch.uint8).cpu().numpy() for _, scores in self._strips(image)])

    def scores(self, image: str | Path | Image.Image | np.ndarray | torch.Tensor) -> np.ndarray:
        """The score of each class at each pixel, float32[C, H, W] of the image's own size.

        The class with the highest score is the one that a call gives. Scores are logits: `torch.softmax(scores, 0)`
        makes probabilities of them.

        Args:
            image: as of a call.

        Raises:
            FastsegError, TypeError, ValueError: as of a call.
        """
        return np.concatenate([scores.cpu().numpy().copy() for _, scores in self._strips(image)], axis=1)

    def _strips(
        self, image: str | Path | Image.Image | np.ndarray | torch.Tensor
    ) -> Iterator[tuple[int, torch.Tensor]]:
        if self.tiling and isinstance(image, str | Path):
            return self.strips(open_rows(image, self.upright))
        pixels = pixels_of(image, self.upright)
        return self.strips(ArrayRows(pixels)) if self.tiling else zip([0], self.enlarged([pixels]), strict=True)

    def strips(self, image: Rows) -> Iterator[tuple[int, torch.Tensor]]:
        """(top, scores float32[C, h, W]) of an image in tiles, from top to bottom; see `fastseg.tiles.blended`."""
        assert self.tiling is not None

        def rows(top: int, bottom: int) -> torch.Tensor:
            return normalise([torch.tensor(image.read(top, bottom), device=self.device)], self.dtype)[0]

        picture = Picture(0, Size(image.height, image.width), rows)
        return ((top, scores) for _, top, scores in blended([picture], self.tiling, self._scored, BATCH))

    def _scored(self, images_BCHW: torch.Tensor) -> torch.Tensor:
        with torch.autocast(self.device.type, self.dtype, enabled=self.dtype != torch.float32):
            return self.network(images_BCHW)

    @torch.inference_mode()
    def enlarged(self, images: Sequence[np.ndarray]) -> Iterator[torch.Tensor]:
        """The scores float32[C, H, W] of images uint8[H, W, 3] of any sizes, at once, by way of the network's size.

        They are enlarged as evaluation does it: bilinearly, with half-pixel centres.
        """
        sizes = [Size(*image.shape[:2]) for image in images]
        within = [fitted(size, self.size, self.fit).size for size in sizes]
        resized = [
            torch.from_numpy(resize_image(image, size)).to(self.device)
            for image, size in zip(images, within, strict=True)
        ]
        batch = normalise(resized, self.dtype, size=self.size)
        for scores, size in zip(self._scored(batch), sizes, strict=True):
            image = covered(scores[None], size, self.size, self.fit)
            yield F.interpolate(image.float(), size=size, mode="bilinear", align_corners=False)[0]

    def masks(self, images: Sequence[np.ndarray]) -> list[np.ndarray]:
        """The classes uint8[H, W] of several images uint8[H, W, 3], which may differ in size; of none, none."""
        if self.tiling or not len(images):
            return [self(image) for image in images]
        return [scores.argmax(0).to(torch.uint8).cpu().numpy() for scores in self.enlarged(images)]


def pixels_of(image: str | Path | Image.Image | np.ndarray | torch.Tensor, upright: bool = False) -> np.ndarray:
    """uint8[H, W, 3] of what `Predictor` takes; files and PIL images upright, where that is asked for."""
    if isinstance(image, str | Path):
        return decode_image(str(user_path(image)), upright)
    if isinstance(image, Image.Image):
        pixels = rgb_of(image)
        return turned(pixels, orientation(image)) if upright else pixels
    if isinstance(image, torch.Tensor):
        if image.ndim != 3 or image.shape[0] != 3:
            raise ValueError(f"a tensor uint8[3, H, W] is wanted, this one is {list(image.shape)}")
        image = image.permute(1, 2, 0).cpu().numpy()
    if not isinstance(image, np.ndarray):
        raise TypeError(f"a path, a PIL image, an array or a tensor is wanted, not {type(image).__name__}")
    if image.dtype != np.uint8:
        raise TypeError(f"pixels are uint8, 0 to 255; these are {image.dtype}")
    if image.ndim == 2:
        image = np.repeat(image[..., None], 3, axis=2)
    if image.ndim != 3 or image.shape[2] not in (3, 4):
        raise ValueError(f"an array uint8[H, W, 3], [H, W, 4] or [H, W] is wanted, this one is {list(image.shape)}")
    if not image.size:
        raise ValueError(f"an image with pixels is wanted, this one is {list(image.shape)}")
    return np.ascontiguousarray(image[..., :3])


def load(
    path: str | Path,
    *,
    device: str | torch.device = "auto",
    dtype: str | torch.dtype = "auto",
    network: str | Collection[str] = (),
    tile: str | tuple[int, int] | None = None,
    tile_overlap: int | None = None,
) -> Predictor:
    """The trained network of a checkpoint file, ready for images.

    Args:
        device: "auto", "cpu", "cuda" or "cuda:1", or torch's.
        dtype: "auto", "bf16", "fp16" or "fp32", or torch's.
        network: of the checkpoint where that is not SegNet, "package.module:function", whose module is imported.
        tile: take images at their own size, in tiles of this size, such as "360x480".
        tile_overlap: pixels that tiles have in common; None: a quarter of their sides.

    Raises:
        UsageError: its network is not SegNet and not `network`; tiles that cannot be. FastsegError: no checkpoint.
    """
    path = checkpoint_of(user_path(path))
    how: dict[str, Any] = {"device": device, "dtype": dtype, "tile": tile, "tile_overlap": tile_overlap}
    return Predictor(checkpoints.read(path), source=path, network=network, **how)


# An image, and how many pixels of each class it has, or what is wrong with it.
Outcome = tuple[Job, np.ndarray | str]


def predict(
    model: Predictor,
    jobs: Sequence[Job],
    out: Path,
    kinds: Sequence[str],
    *,
    overwrite: bool,
    csv_path: Path | None = None,
) -> Iterator[tuple[Job, str | None]]:
    """Write the results of all images, and yield each with None, or with what was wrong with it.

    Files are decoded and results encoded on threads, while the network works.

    Args:
        kinds: of `fastseg.results.targets`.
        csv_path: where to write how many pixels of each class each image has.

    Raises:
        UsageError: results are there already, or would take the place of an image, or another process writes there.
    """
    files = [path for job in jobs for path in targets(out, job.name, kinds, model.classes).values()]
    files += [csv_path] if csv_path else []
    with sole_writer(out, "--out"):
        refuse_overwriting((job.path for job in jobs), files, overwrite=overwrite)
        note_results(out, [path.relative_to(out).parts[0] for path in files if path != csv_path])
        counts: list[tuple[str, np.ndarray]] = []
        for job, found in (_in_tiles if model.tiling else _resized)(model, jobs, out, kinds):
            if isinstance(found, str):
                yield job, found
            else:
                counts.append((job.name, found))
                yield job, None
        if csv_path:
            write_counts(csv_path, model.classes, counts)


def _resized(model: Predictor, jobs: Sequence[Job], out: Path, kinds: Sequence[str]) -> Iterator[Outcome]:
    """Images by way of the network's size, BATCH of them at once."""

    def save(job: Job, pixels: np.ndarray, strip: dict[str, np.ndarray]) -> np.ndarray:
        paths = targets(out, job.name, kinds, model.classes)
        with writing(paths, Size(*pixels.shape[:2]), model.colors) as write:
            write(strip, pixels)
        return _counted(strip, model)

    batches = [jobs[i : i + BATCH] for i in range(0, len(jobs), BATCH)]
    with ThreadPoolExecutor(min(BATCH, 2 * cores())) as pool:

        def begin(batch: Sequence[Job]) -> list[tuple[Job, Future]]:
            return [(job, pool.submit(decode_image, str(job.path), model.upright)) for job in batch]

        ahead = deque(begin(batch) for batch in batches[:2])
        saving: deque[tuple[Job, Future]] = deque()
        for number in range(len(batches)):
            good: list[tuple[Job, np.ndarray]] = []
            for job, decoded in ahead.popleft():
                try:
                    good.append((job, decoded.result()))
                except FastsegError as error:
                    yield job, str(error)
            if number + 2 < len(batches):
                ahead.append(begin(batches[number + 2]))
            scores = model.enlarged([pixels for _, pixels in good]) if good else ()
            for (job, pixels), each in zip(good, scores, strict=True):
                saving.append((job, pool.submit(save, job, pixels, strip_of(each, kinds))))
            while len(saving) > BATCH:
                yield _saved(saving.popleft())
        while saving:
            yield _saved(saving.popleft())


def _saved(item: tuple[Job, Future]) -> Outcome:
    job, done = item
    return job, done.result()  # a full disk ends the command


def _in_tiles(model: Predictor, jobs: Sequence[Job], out: Path, kinds: Sequence[str]) -> Iterator[Outcome]:
    """Images at their own size, one after another; the next one is decoded meanwhile."""
    with ThreadPoolExecutor(2) as pool:
        ahead = deque((job, pool.submit(open_rows, job.path, model.upright)) for job in jobs[:1])
        for number in range(len(jobs)):
            job, opened = ahead.popleft()
            if number + 1 < len(jobs):
                ahead.append((jobs[number + 1], pool.submit(open_rows, jobs[number + 1].path, model.upright)))
            try:
                yield job, _one_in_tiles(model, job, opened.result(), out, kinds, pool)
            except FastsegError as error:
                yield job, str(error)


def _one_in_tiles(
    model: Predictor, job: Job, image: Rows, out: Path, kinds: Sequence[str], pool: ThreadPoolExecutor
) -> np.ndarray:
    """Write an image's results strip by strip, each while the network works on the next, and count its pixels."""
    paths = targets(out, job.name, kinds, model.classes)
    # The tiles are ahead of the strips, and a TIFF's rows are read from top to bottom: the overlay has its own.
    photo = TiffRows(job.path) if isinstance(image, TiffRows) else image
    counts = np.zeros(len(model.classes), np.int64)
    with writing(paths, Size(image.height, image.width), model.colors) as write:

        def save(top: int, strip: dict[str, np.ndarray]) -> None:
            bottom = top + len(strip["index"])
            write(strip, photo.read(top, bottom) if "overlay" in kinds else None)

        before: list[Future] = []
        try:
            for top, scores in model.strips(image):
                strip = strip_of(scores, kinds)
                counts += _counted(strip, model)
                for done in before:
                    done.result()
                before = [pool.submit(save, top, strip)]
            for done in before:
                done.result()
        finally:
            wait(before)
    return counts


def _counted(strip: dict[str, np.ndarray], model: Predictor) -> np.ndarray:
    return np.bincount(strip["index"].ravel(), minlength=len(model.classes))
