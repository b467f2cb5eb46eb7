"""`fastseg data synth`: data sets of drawn street scenes, in any of CamVid's four layouts."""

import math
import os
import shutil
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from fastseg.data.classes import CAMVID_11, CAMVID_32, VOID
from fastseg.data.layouts import SPLITS
from fastseg.data.scene import draw_scene
from fastseg.errors import FastsegError, UsageError

VERSION = 1  # counts up when the pixels of a (seed, index, size) change
MOST = 1_000_000  # images of a split
LAYOUTS = ("segnet", "original", "kaggle", "fastai")
# Format of the images -> their suffix, and how Pillow saves them. Labels are PNG: JPEG keeps no class.
FORMATS: dict[str, tuple[str, dict[str, Any]]] = {
    "png": (".png", {"compress_level": 1}),
    "jpeg": (".jpg", {"quality": 90}),
}
SEQUENCES = 4  # per split, so that splits by sequence have something to hold out

# In the layouts of 32 classes each of our 11 is drawn with one member: its own name where the 32 have it.
_MEMBERS = {name: {"Pole": "Column_Pole", "Pavement": "Sidewalk"}.get(name, name) for name in CAMVID_11}
_CODES = tuple(CAMVID_32)


def _folders(layout: str, split: str) -> tuple[str, str, str]:
    """(image folder, label folder, what is added to a label's stem) of a split."""
    return {
        "segnet": (split, f"{split}annot", ""),
        "original": ("701_StillsRaw_full", "LabeledApproved_full", "_L"),
        "kaggle": (split, f"{split}_labels", "_L"),
        "fastai": ("images", "labels", "_P"),
    }[layout]


def _encode(label: np.ndarray, layout: str) -> np.ndarray:
    """A label as this layout's files hold it: indices with void 11, colours, or indices of the 32."""
    if layout == "segnet":
        return np.where(label == VOID, len(CAMVID_11), label).astype(np.uint8)
    table: np.ndarray
    if layout == "fastai":
        table = np.full(256, _CODES.index("Void"), np.uint8)
        table[: len(_MEMBERS)] = [_CODES.index(member) for member in _MEMBERS.values()]
    else:
        table = np.zeros((256, 3), np.uint8)
        table[: len(_MEMBERS)] = [CAMVID_32[member][0] for member in _MEMBERS.values()]
    return table[label]


def _stems(counts: dict[str, int]) -> dict[str, list[str]]:
    """Names such as Synth5_f00012: four sequences per split, none of them in two splits."""
    stems, first = {}, 0
    for split in SPLITS:
        count = counts.get(split, 0)
        share = math.ceil(count / SEQUENCES)
        stems[split] = [f"Synth{first + i // share:02d}_f{i % share:05d}" for i in range(count)]
        first += SEQUENCES
    return stems


def _write_lists(root: Path, layout: str, stems: dict[str, list[str]], ending: str) -> None:
    """The files beside the folders, by which each layout says what its splits and its classes are.

    Args:
        ending: of the images' names.
    """
    if layout == "fastai":
        (root / "codes.txt").write_text("".join(f"{code}\n" for code in _CODES), encoding="utf-8")
        (root / "valid.txt").write_text("".join(f"{stem}{ending}\n" for stem in stems["val"]), encoding="utf-8")
        return
    if layout == "kaggle":
        rows = [f"{name},{r},{g},{b}\n" for name, ((r, g, b), _) in CAMVID_32.items()]
        (root / "class_dict.csv").write_text("name,r,g,b\n" + "".join(rows), encoding="utf-8")
        return
    for split, names in stems.items():
        images, labels, suffix = _folders(layout, split)
        lines = [f"/SegNet/CamVid/{images}/{s}{ending} /SegNet/CamVid/{labels}/{s}{suffix}.png\n" for s in names]
        if lines:
            (root / f"{split}.txt").write_text("".join(lines), encoding="utf-8")


def write(
    out: Path,
    *,
    layout: str = "segnet",
    counts: dict[str, int],
    size: tuple[int, int],
    seed: int = 0,
    image_format: str = "png",
) -> None:
    """Draw a data set into the new folder `out`, whole or not at all.

    All layouts hold the same pairs under the same names (fastai's has no place for a test split and leaves it out).

    Args:
        layout: one of LAYOUTS.
        counts: images per split ("train", "val", "test").
        size: (height, width) in pixels.
        image_format: one of FORMATS; labels are the same files in all of them.

    Raises:
        UsageError: an unknown layout or format, counts that make no data set, a size too small, or `out` exists.
    """
    if layout not in LAYOUTS:
        raise UsageError(f"--layout {layout}: choose one of {', '.join(LAYOUTS)}")
    if image_format not in FORMATS:
        raise UsageError(f"--format {image_format}: choose one of {', '.join(FORMATS)}")
    if min(counts.get("train", 0), counts.get("val", 0)) < 1 or counts.get("test", 0) < 0:
        raise UsageError("a data set needs at least one image to train and one to validate")
    if max(counts.values()) > MOST:
        raise UsageError(f"{max(counts.values())} images: a split is drawn of at most {MOST}")
    if out.exists():
        raise UsageError(f"{out} exists: give a new folder, or remove it")
    draw_scene(seed, 0, size)  # refuses a size before anything is written
    ending, how = FORMATS[image_format]
    stems = _stems({**counts, "test": 0} if layout == "fastai" else counts)
    # Scenes count on through the splits, so that each keeps its pixels whatever the layout leaves out.
    jobs = [(split, stem) for split in SPLITS for stem in stems[split]]
    partial_out = out.with_name(f".{out.name}.partial-{os.getpid()}")

    def one(job: tuple[int, tuple[str, str]]) -> None:
        index, (split, stem) = job
        images, labels, suffix = _folders(layout, split)
        image, label = draw_scene(seed, index, size)
        Image.fromarray(image).save(partial_out / images / f"{stem}{ending}", **how)
        Image.fromarray(_encode(label, layout)).save(partial_out / labels / f"{stem}{suffix}.png")

    try:
        for split in SPLITS:
            for folder in _folders(layout, split)[:2] if stems[split] else ():
                (partial_out / folder).mkdir(parents=True, exist_ok=True)
        _write_lists(partial_out, layout, stems, ending)
        with ThreadPoolExecutor(os.cpu_count()) as pool:
            try:
                list(pool.map(one, enumerate(jobs)))
            except BaseException:  # Ctrl-C too, which comes while most scenes still wait
                pool.shutdown(cancel_futures=True)
                raise
        partial_out.rename(out)
    except OSError as error:
        raise FastsegError(
            f"{out} could not be written ({error.strerror or error}); nothing is left of it: "
            "mend that, or give another folder"
        ) from None
    finally:
        shutil.rmtree(partial_out, ignore_errors=True)
