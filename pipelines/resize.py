"""The one definition of resizing that all tiers follow: DALI's.

Images: antialiased bilinear, that is a triangle filter of radius max(1, in/out) with half-pixel centres and replicated
edges. (torch's `antialias=True` and Pillow renormalise the weights at the edges instead, and differ there by up to 20
of 255.) Labels: nearest neighbour, defined in integers, so that no floating-point tie can decide a class.
"""

from functools import lru_cache

import numpy as np


@lru_cache(maxsize=32)
def triangle_weights(size_in: int, size_out: int) -> np.ndarray:
    """float32[size_out, size_in]: row o weighs the input pixels that make output pixel o; rows sum to 1."""
    scale = size_in / size_out
    radius = max(1.0, scale)
    centres = (np.arange(size_out) + 0.5) * scale - 0.5
    taps = np.arange(int(np.ceil(2 * radius)) + 1)
    positions = np.floor(centres - radius).astype(int)[:, None] + 1 + taps
    weights = np.maximum(0.0, 1.0 - np.abs(positions - centres[:, None]) / radius)
    weights /= weights.sum(axis=1, keepdims=True)
    matrix = np.zeros((size_out, size_in))
    np.add.at(matrix, (np.arange(size_out)[:, None], np.clip(positions, 0, size_in - 1)), weights)
    return matrix.astype(np.float32)


def resize_image(image: np.ndarray, size: tuple[int, int]) -> np.ndarray:
    """uint8[H, W, 3] -> uint8[h, w, 3]; fp32 in between, rounded once."""
    if image.shape[:2] == size:
        return image
    rows, columns = triangle_weights(image.shape[0], size[0]), triangle_weights(image.shape[1], size[1])
    # Columns first, as DALI does; one matrix product per axis, over all rows and channels at once.
    height, width, channels = image.shape
    lines = image.transpose(0, 2, 1).astype(np.float32).reshape(height * channels, width)
    out = rows @ (lines @ columns.T).reshape(height, channels * size[1])
    return np.clip(np.rint(out), 0, 255).astype(np.uint8).reshape(size[0], channels, size[1]).transpose(0, 2, 1)


def nearest_indices(size_in: int, size_out: int) -> np.ndarray:
    """int64[size_out]: the source pixel of each output pixel, floor((2 * out + 1) * size_in / (2 * size_out))."""
    return (2 * np.arange(size_out) + 1) * size_in // (2 * size_out)


def resize_label(label: np.ndarray, size: tuple[int, int]) -> np.ndarray:
    """[H, W] or [H, W, C] -> [h, w] or [h, w, C] of the same dtype."""
    if label.shape[:2] == size:
        return label
    rows, columns = nearest_indices(label.shape[0], size[0]), nearest_indices(label.shape[1], size[1])
    return label[rows[:, None], columns]
