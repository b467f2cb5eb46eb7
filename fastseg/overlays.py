"""Pictures of predictions: photo, label, prediction and where they disagree, side by side."""

from pathlib import Path
from typing import NamedTuple

import numpy as np
from PIL import Image

from fastseg.data.classes import VOID
from fastseg.data.decode import decode_image, decode_label
from fastseg.pipelines.source import MEAN, STD, Batch, Spec
from fastseg.runs import whole, write_json

PANEL_WIDTH = 240
WRONG = (213, 94, 0)  # vermilion of Okabe and Ito's palette, which colour-blind readers can tell from grey


class Shown(NamedTuple):
    """A prediction uint8[H, W] that the report shows, and why: the worst, the best, or another one."""

    sample: int
    kind: str
    miou: float
    prediction: np.ndarray


def colored(classes_HW: np.ndarray, colors: tuple[tuple[int, int, int], ...]) -> np.ndarray:
    """uint8[H, W, 3]: each class in its colour, everything else black."""
    table = np.zeros((256, 3), np.uint8)
    table[: len(colors)] = colors
    return table[classes_HW]


def disagreement(photo_HW3: np.ndarray, label_HW: np.ndarray, prediction_HW: np.ndarray, classes: int) -> np.ndarray:
    """uint8[H, W, 3]: the photo in dark grey, and in WRONG where a labelled pixel got another class."""
    grey = np.asarray(Image.fromarray(photo_HW3).convert("L"), np.uint8) // 2
    wrong = (label_HW < classes) & (label_HW != prediction_HW)
    return np.where(wrong[..., None], np.array(WRONG, np.uint8), grey[..., None])


def write_strip(path: Path, spec: Spec, index: int, prediction: np.ndarray) -> None:
    """Save photo | label | prediction | disagreement of one sample as a PNG, put in place whole."""
    pair, colors = spec.pairs[index], spec.classes.colors
    photo = decode_image(pair.image, spec.upright)
    label = decode_label(pair.label, spec.classes, VOID, spec.upright)
    panels = []
    for pixels, how in (
        (photo, Image.Resampling.BILINEAR),
        (colored(label, colors), Image.Resampling.NEAREST),
        (colored(prediction, colors), Image.Resampling.NEAREST),
        (disagreement(photo, label, prediction, len(colors)), Image.Resampling.NEAREST),
    ):
        height = round(PANEL_WIDTH * label.shape[0] / label.shape[1])
        panels.append(np.asarray(Image.fromarray(pixels).resize((PANEL_WIDTH, height), how)))
    with whole(path) as partial:
        Image.fromarray(np.concatenate(panels, axis=1)).save(partial, format="PNG")


def write_strips(folder: Path, spec: Spec, shown: list[Shown]) -> None:
    """A strip for each, and index.json, which says what they are; what was there before goes."""
    rows = []
    for place, item in enumerate(shown):
        name = f"{place}-{item.kind}-{spec.pairs[item.sample].stem}.png"
        write_strip(folder / name, spec, item.sample, item.prediction)
        rows.append({"file": name, "image": spec.pairs[item.sample].stem, "kind": item.kind, "miou": item.miou})
    write_json(folder / "index.json", rows)
    for path in folder.glob("*.png"):
        if path.name not in {row["file"] for row in rows}:
            path.unlink()


def write_sheet(path: Path, batch: Batch, spec: Spec, columns: int, width: int | None = None) -> None:
    """Save a batch as the network sees it, `columns` samples wide: each photo, and below it with its label laid over.

    Void pixels keep the photo's colour. Samples that are wider than `width` are made smaller, for a page.
    """
    images = batch.images.permute(0, 2, 3, 1).float().cpu().numpy() * np.array(STD) + np.array(MEAN)
    photos, labels = np.rint(images).clip(0, 255).astype(np.uint8), batch.labels.cpu().numpy()
    counted = (labels < len(spec.classes.names))[..., None]
    mixed = np.where(counted, photos // 2 + colored(labels, spec.classes.colors) // 2, photos)
    panels = list(np.concatenate([photos, mixed], axis=1))
    height_in, width_in = panels[0].shape[:2]
    if width and width_in > width:
        smaller = width, round(height_in * width / width_in)
        panels = [np.asarray(Image.fromarray(panel).resize(smaller)) for panel in panels]
    panels += [np.zeros_like(panels[0])] * (-len(panels) % columns)
    lines = [np.concatenate(panels[i : i + columns], axis=1) for i in range(0, len(panels), columns)]
    with whole(path) as partial:
        Image.fromarray(np.concatenate(lines)).save(partial, format="PNG")
