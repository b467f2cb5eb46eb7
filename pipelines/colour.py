"""Colour jitter: brightness, contrast, saturation and hue of a sample as one matrix.

All four are linear in a pixel's red, green and blue, so that one pass does them. Unlike those of torchvision and
mmsegmentation, contrast is around a grey that is the same for all images, since the sample plan sees no pixels, and hue
turns in YIQ instead of HSV, where it is no matrix.
"""

from collections.abc import Sequence

import numpy as np

# Red, green and blue to YIQ: Foley, van Dam, Feiner and Hughes, "Computer Graphics: Principles and Practice", 2nd ed.,
# section 13.3.3. Y, its first row, is the grey of ITU-R BT.601; I and Q of a grey are 0.
YIQ = np.array([[0.299, 0.587, 0.114], [0.596, -0.275, -0.321], [0.212, -0.523, 0.311]])


def colour_matrices(colours_B4: np.ndarray, mean: Sequence[float]) -> np.ndarray:
    """float32[B, 12]: the rows of a 3x4 matrix each, which makes a pixel's colours of (red, green, blue, 1) in 0..255.

    In this order: brightness multiplies; contrast multiplies distances from a grey, saturation those from the pixel's
    own grey; hue turns I and Q.

    Args:
        colours_B4: float64, three factors and an angle in degrees: see `EpochPlan.colour`.
        mean: red, green and blue of the colour whose grey contrast keeps.
    """
    brightness, contrast, saturation, degrees = colours_B4.T[..., None, None]
    cosine, sine = np.cos(np.radians(degrees)), np.sin(np.radians(degrees))
    grey, identity, turned = YIQ[0], np.eye(3), np.zeros((len(colours_B4), 3, 3))
    turned[:, 1:, 1:] = (cosine - 1) * np.eye(2) + sine * np.array([[0, -1], [1, 0]])  # less what was there
    hue = identity + np.linalg.inv(YIQ) @ turned @ YIQ
    saturate = saturation * identity + (1 - saturation) * grey
    linear = hue @ saturate * (contrast * brightness)
    # Of a grey both matrices make the same grey.
    constant = np.broadcast_to((1 - contrast) * (grey @ mean), (len(colours_B4), 3, 1))
    return np.concatenate([linear, constant], 2).reshape(-1, 12).astype(np.float32)
