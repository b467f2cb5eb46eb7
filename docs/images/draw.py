"""Draws the pictures of docs/dataset.md, from drawn scenes, into a folder: python docs/images/draw.py OUT"""

import sys
from pathlib import Path

import numpy as np
from PIL import Image, ImageDraw

from fastseg.data.classes import CAMVID_11, VOID
from fastseg.data.scene import draw_scene
from fastseg.data.shapes import polygon

GAP = 6
OUTLINE = (255, 255, 255)
SCENE, SIZE = 3, (144, 216)


def beside(panels: list[np.ndarray]) -> Image.Image:
    """Pictures of one size in a row, with white between them."""
    gap = np.full((panels[0].shape[0], GAP, 3), 255, np.uint8)
    return Image.fromarray(np.concatenate([part for panel in panels for part in (panel, gap)][:-1], axis=1))


def masks() -> Image.Image:
    """A photo, its mask as values, and the same mask in colours."""
    photo, label = draw_scene(0, SCENE, SIZE)
    colors = np.zeros((256, 3), np.uint8)
    colors[: len(CAMVID_11)] = list(CAMVID_11.values())
    values = np.repeat(np.where(label == VOID, 255, label)[..., None], 3, axis=2).astype(np.uint8)
    return beside([photo, values, colors[label]])


def polygons() -> Image.Image:
    """Road and car of a photo, as somebody would outline them with a mouse, and the mask that they become."""
    photo, _ = draw_scene(0, SCENE, SIZE)
    outlines = {
        (128, 64, 128): [(0, 143), (0, 120), (66, 82), (90, 72), (124, 72), (158, 92), (215, 108), (215, 143)],
        (64, 0, 128): [(66, 81), (65, 66), (70, 56), (83, 55), (88, 64), (88, 80)],
    }
    traced, mask = Image.fromarray(photo), np.zeros_like(photo)
    for color, points in outlines.items():
        ImageDraw.Draw(traced).polygon(points, outline=OUTLINE)
        region = polygon(np.array(points, float), *SIZE)
        height, width = region.inside.shape
        mask[region.top : region.top + height, region.left : region.left + width][region.inside] = color
    return beside([np.asarray(traced), mask])


def draw(out: Path) -> None:
    """Write both pictures."""
    out.mkdir(parents=True, exist_ok=True)
    for name, picture in (("masks", masks()), ("polygons", polygons())):
        picture.save(out / f"{name}.png", optimize=True)


if __name__ == "__main__":
    draw(Path(sys.argv[1]))
