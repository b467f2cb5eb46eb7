"""A trained network on images of any kind and size: `fastseg.load`, and what `fastseg predict` writes."""

import glob
import os
from collections import deque
from collections.abc import Iterable, Iterator, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image

from fastseg import checkpoint as checkpoints
from fastseg import config as configs
from fastseg.data.decode import decode_image, orientation, rgb_of, turned
from fastseg.distributed import choose_device, choose_dtype
from fastseg.errors import FastsegError, UsageError
from fastseg.kernels import launch
from fastseg.overlays import colored
from fastseg.pipelines.fit import covered, fitted
from fastseg.pipelines.resize import resize_image
from fastseg.pipelines.source import normalise
from fastseg.runs import whole

BATCH = 8
SUFFIXES = {".png", ".jpg", ".jpeg", ".bmp", ".tif", ".tiff", ".webp", ".ppm"}  # of files that a folder gives
KINDS = ("index", "color", "overlay")


class Predictor:
    """A trained network with what it takes to use it: input size, normalisation, classes.

    Attributes:
        classes: names, by index.
        colors: (red, green, blue) of each class.
        network: the `SegNet`; [B, 3, H, W], normalised, to scores [B, C, H, W].
    """

    def __init__(
        self, state: Mapping[str, Any], *, device: str = "auto", dtype: str = "auto", source: str | Path = "checkpoint"
    ) -> None:
        self.classes: tuple[str, ...] = tuple(state["classes"])
        self.colors = tuple((red, green, blue) for red, green, blue in state["colors"])
        data = configs.from_dict(state["config"], str(source)).data
        self.size, self.fit, self.upright = data.size, data.fit, data.exif == "apply"
        self.device = torch.device(choose_device(device)[0])
        self.dtype = choose_dtype(dtype, self.device.type).dtype
        self.network = checkpoints.build_model(state, source).to(self.device)
        self.network.fused = launch.choose("auto", self.device)[0] == "fused"

    def __call__(self, image: str | Path | Image.Image | np.ndarray | torch.Tensor) -> np.ndarray:
        """The class of each pixel, uint8[H, W] of the image's own size.

        Args:
            image: a file; a PIL image of any mode; an array uint8[H, W, 3], [H, W, 4] (alpha is dropped) or [H, W]
                (grey); or a tensor uint8[3, H, W], as torchvision has them.

        Raises:
            FastsegError: a file that cannot be decoded. TypeError, ValueError: anything else than those.
        """
        return self.masks([pixels_of(image, self.upright)])[0]

    @torch.inference_mode()
    def masks(self, images: Sequence[np.ndarray]) -> list[np.ndarray]:
        """The same for several images uint8[H, W, 3], which may differ in size, at once."""
        sizes = [fitted(image.shape[:2], self.size, self.fit).size for image in images]
        resized = [
            torch.from_numpy(resize_image(image, size)).to(self.device)
            for image, size in zip(images, sizes, strict=True)
        ]
        batch = normalise(resized, self.dtype, size=self.size)
        with torch.autocast(self.device.type, self.dtype, enabled=self.dtype != torch.float32):
            scores = self.network(batch)
        shapes = [image.shape[:2] for image in images]
        return [
            _mask(covered(score[None], shape, self.size, self.fit), shape)
            for score, shape in zip(scores, shapes, strict=True)
        ]


def _mask(scores_1CHW: torch.Tensor, size: tuple[int, ...]) -> np.ndarray:
    """The best class of each pixel at another size, as evaluation has it: bilinear scores, then argmax."""
    scores = F.interpolate(scores_1CHW.float(), size=size, mode="bilinear", align_corners=False)
    return scores[0].argmax(0).to(torch.uint8).cpu().numpy()


def pixels_of(image: str | Path | Image.Image | np.ndarray | torch.Tensor, upright: bool = False) -> np.ndarray:
    """uint8[H, W, 3] of what `Predictor` takes; files and PIL images upright, where that is asked for."""
    if isinstance(image, str | Path):
        return decode_image(str(image), upright)
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
    return np.ascontiguousarray(image[..., :3])


def load(path: str | Path, *, device: str = "auto", dtype: str = "auto") -> Predictor:
    """The trained network of a checkpoint file, ready for images.

    Args:
        device: "auto", "cpu" or "cuda".
        dtype: "auto", "bf16", "fp16" or "fp32".

    Raises:
        FastsegError: no checkpoint.
    """
    path = Path(os.path.expanduser(path))
    return Predictor(checkpoints.read(path), device=device, dtype=dtype, source=path)


class Job(NamedTuple):
    """An image file, and what its results are called: a relative path without suffix."""

    path: Path
    name: str


def find_images(inputs: Sequence[str]) -> list[Job]:
    """Files, all images below folders, and files of globs, in order.

    Raises:
        UsageError: an input that gives none, or two files whose results would have the same name.
    """
    jobs: list[Job] = []
    for text in map(os.path.expanduser, inputs):
        path = Path(text)
        if path.is_dir():
            files = sorted(p for p in path.rglob("*") if p.suffix.lower() in SUFFIXES and p.is_file())
            found = [Job(p, str(p.relative_to(path).with_suffix(""))) for p in files]
        elif path.exists():
            found = [Job(path, path.stem)]
        else:
            found = [Job(Path(p), Path(p).stem) for p in sorted(glob.glob(text, recursive=True)) if Path(p).is_file()]
        if not found:
            raise UsageError(f"predict: {text}: no image there; give files, folders or globs in quotes")
        jobs += found
    names: dict[str, Path] = {}
    for job in jobs:
        if job.name in names:
            raise UsageError(
                f"predict: {names[job.name]} and {job.path} would both become {job.name}.png: predict them apart"
            )
        names[job.name] = job.path
    return jobs


def targets(out: Path, job: Job, kinds: Iterable[str]) -> dict[str, Path]:
    """OUT/KIND/NAME.png for each kind."""
    return {kind: out / kind / f"{job.name}.png" for kind in kinds}


def save(out: Path, job: Job, kinds: Iterable[str], pixels: np.ndarray, mask: np.ndarray, model: Predictor) -> None:
    """Write the results of an image: class indices, the same with a palette, and the photo with the classes over it."""
    for kind, path in targets(out, job, kinds).items():
        picture = Image.fromarray(mask)
        if kind == "color":
            picture.putpalette([value for color in model.colors for value in color])
        elif kind == "overlay":
            picture = Image.fromarray(pixels // 2 + colored(mask, model.colors) // 2)
        with whole(path) as partial:
            picture.save(partial, format="PNG", compress_level=1)


def predict(
    model: Predictor, jobs: Sequence[Job], out: Path, kinds: Sequence[str], *, overwrite: bool
) -> Iterator[tuple[Job, str | None]]:
    """Write the results of all images, and yield each with None, or with what was wrong with it.

    Files are decoded and results encoded on threads, while the network works.

    Raises:
        UsageError: results are there already.
    """
    there = [path for job in jobs for path in targets(out, job, kinds).values() if path.exists()]
    if there and not overwrite:
        raise UsageError(
            f"--out {out}: {there[0]} exists, and {len(there) - 1} others: give another folder, or --overwrite"
        )
    batches = [jobs[i : i + BATCH] for i in range(0, len(jobs), BATCH)]
    with ThreadPoolExecutor(min(BATCH, 2 * (os.cpu_count() or 1))) as pool:

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
            masks = model.masks([pixels for _, pixels in good]) if good else []
            for (job, pixels), mask in zip(good, masks, strict=True):
                saving.append((job, pool.submit(save, out, job, kinds, pixels, mask, model)))
            while len(saving) > BATCH:
                yield _saved(saving.popleft())
        while saving:
            yield _saved(saving.popleft())


def _saved(item: tuple[Job, Future]) -> tuple[Job, None]:
    job, done = item
    done.result()  # a full disk ends the command
    return job, None
