"""Pictures of predictions: photo, label and prediction side by side."""

from pathlib import Path

import numpy as np
from PIL import Image

from fastseg.data.classes import VOID
from fastseg.data.decode import decode_image, decode_label
from fastseg.pipelines.source import MEAN, STD, Batch, Spec
from fastseg.runs import whole

PANEL_WIDTH = 320


def colored(classes_HW: np.ndarray, colors: tuple[tuple[int, int, int], ...]) -> np.ndarray:
    """uint8[H, W, 3]: each class in its colour, everything else black."""
    table = np.zeros((256, 3), np.uint8)
    table[: len(colors)] = colors
    return table[classes_HW]


def write_strip(path: Path, spec: Spec, index: int, prediction: np.ndarray) -> None:
    """Save photo | label | prediction of one sample as a PNG, put in place whole."""
    pair = spec.pairs[index]
    label = decode_label(pair.label, spec.classes, VOID)
    panels = []
    for pixels, how in (
        (decode_image(pair.image), Image.Resampling.BILINEAR),
        (colored(label, spec.classes.colors), Image.Resampling.NEAREST),
        (colored(prediction, spec.classes.colors), Image.Resampling.NEAREST),
    ):
        height = round(PANEL_WIDTH * label.shape[0] / label.shape[1])
        panels.append(np.asarray(Image.fromarray(pixels).resize((PANEL_WIDTH, height), how)))
    with whole(path) as partial:
        Image.fromarray(np.concatenate(panels, axis=1)).save(partial, format="PNG")


def write_strips(folder: Path, spec: Spec, predictions: list[tuple[int, np.ndarray]]) -> None:
    """One strip per (index, prediction uint8[H, W]), named by its place in the split and the image's stem."""
    for index, prediction in predictions:
        write_strip(folder / f"{index:02d}-{spec.pairs[index].stem}.png", spec, index, prediction)


def write_sheet(path: Path, batch: Batch, spec: Spec, columns: int) -> None:
    """Save a batch as the network sees it, `columns` samples wide: each photo, and below it with its label laid over.

    Void pixels keep the photo's colour.
    """
    images = batch.images.permute(0, 2, 3, 1).float().cpu().numpy() * np.array(STD) + np.array(MEAN)
    photos, labels = np.rint(images).clip(0, 255).astype(np.uint8), batch.labels.cpu().numpy()
    counted = (labels < len(spec.classes.names))[..., None]
    mixed = np.where(counted, photos // 2 + colored(labels, spec.classes.colors) // 2, photos)
    panels = list(np.concatenate([photos, mixed], axis=1))
    panels += [np.zeros_like(panels[0])] * (-len(panels) % columns)
    lines = [np.concatenate(panels[i : i + columns], axis=1) for i in range(0, len(panels), columns)]
    with whole(path) as partial:
        Image.fromarray(np.concatenate(lines)).save(partial, format="PNG")
