"""The one definition of resizing that all tiers follow: DALI's.

Images: antialiased bilinear, that is a triangle filter of radius max(1, in/out) with half-pixel centres and replicated
edges. (torch's `antialias=True` and Pillow renormalise the weights at the edges instead, and differ there by up to 20
of 255.) Labels: nearest neighbour, defined in integers, so that no floating-point tie can decide a class.
"""

from functools import lru_cache

import numpy as np


def taps(size_in: int, size_out: int) -> int:
    """How many input pixels at most make an output pixel: the whole numbers in an open interval of 2 radii."""
    if size_in == size_out:
        return 1
    return max(2, -(-2 * size_in // size_out))


@lru_cache(maxsize=32)
def triangle(size_in: int, size_out: int) -> tuple[np.ndarray, np.ndarray]:
    """(int64, float32)[size_out, taps]: the input pixels that make each output pixel, and their weights, of sum 1.

    Output pixel o lies at ((2 o + 1) in - out) / (2 out); a pixel at distance d from there weighs 1 - d / radius. All
    of it is whole numbers once distances are multiplied by 2 out, as they are here and in `kernels/augment_triton.py`.
    """
    centre = (2 * np.arange(size_out) + 1) * size_in - size_out  # times 2 out, as all distances are
    radius = 2 * max(size_in, size_out)
    positions = ((centre - radius) // (2 * size_out) + 1)[:, None] + np.arange(taps(size_in, size_out))
    weights = np.maximum(0, radius - np.abs(2 * size_out * positions - centre[:, None]))
    return np.clip(positions, 0, size_in - 1), (weights / weights.sum(axis=1, keepdims=True)).astype(np.float32)


def triangle_weights(size_in: int, size_out: int) -> np.ndarray:
    """float32[size_out, size_in]: `triangle` as a matrix, whose row o weighs the input pixels of output pixel o."""
    positions, weights = triangle(size_in, size_out)
    matrix = np.zeros((size_out, size_in), np.float32)
    np.add.at(matrix, (np.arange(size_out)[:, None], positions), weights)
    return matrix


def _lines(pixels: np.ndarray, size_out: int) -> np.ndarray:
    """[H, L] -> float32[size_out, L]: each row a weighted sum of rows."""
    positions, weights = triangle(len(pixels), size_out)
    out = pixels[positions[:, 0]] * weights[:, :1]
    for tap in range(1, weights.shape[1]):
        out += pixels[positions[:, tap]] * weights[:, tap : tap + 1]
    return out


def resize_image(image: np.ndarray, size: tuple[int, int]) -> np.ndarray:
    """uint8[H, W, 3] -> uint8[h, w, 3]; fp32 in between, rounded once. On this thread alone."""
    if image.shape[:2] == size:
        return image
    (H, W), (height, width) = image.shape[:2], size
    narrow = _lines(image.reshape(H, W * 3), height).reshape(height, W, 3)
    # Columns are rows of the transposed image: sums over long lines are fast.
    out = _lines(narrow.transpose(1, 0, 2).reshape(W, height * 3), width)
    return np.rint(out).astype(np.uint8).reshape(width, height, 3).transpose(1, 0, 2)


def nearest_indices(size_in: int, size_out: int) -> np.ndarray:
    """int64[size_out]: the source pixel of each output pixel, floor((2 * out + 1) * size_in / (2 * size_out))."""
    return (2 * np.arange(size_out) + 1) * size_in // (2 * size_out)


def resize_label(label: np.ndarray, size: tuple[int, int]) -> np.ndarray:
    """[H, W] or [H, W, C] -> [h, w] or [h, w, C] of the same dtype."""
    if label.shape[:2] == size:
        return label
    rows, columns = nearest_indices(label.shape[0], size[0]), nearest_indices(label.shape[1], size[1])
    return label[rows[:, None], columns]
