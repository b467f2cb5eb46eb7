from fractions import Fraction

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from fastseg.pipelines.resize import nearest_indices, resize_image, resize_label, triangle_weights

sizes = st.integers(1, 70)


def noise(height, width, seed=0):
    return np.random.default_rng(seed).integers(0, 256, (height, width, 3), np.uint8)


def exact_weights(size_in, size_out):
    """The triangle filter in fractions, with the edge pixels standing for all pixels outside."""
    scale = Fraction(size_in, size_out)
    radius = max(Fraction(1), scale)
    matrix = [[Fraction(0)] * size_in for _ in range(size_out)]
    for out, row in enumerate(matrix):
        centre = (out + Fraction(1, 2)) * scale - Fraction(1, 2)
        taps = range(int(centre - radius) - 2, int(centre + radius) + 3)
        weights = {tap: max(Fraction(0), 1 - abs(tap - centre) / radius) for tap in taps}
        for tap, weight in weights.items():
            row[min(max(tap, 0), size_in - 1)] += weight / sum(weights.values())
    return np.array(matrix, dtype=float)


@settings(max_examples=40, deadline=None)
@given(size_in=sizes, size_out=sizes)
def test_weights_are_the_triangle_filter_and_their_rows_sum_to_one(size_in, size_out):
    matrix = triangle_weights(size_in, size_out)
    assert matrix.shape == (size_out, size_in)
    assert matrix.min() >= 0
    np.testing.assert_allclose(matrix.sum(axis=1), 1, atol=1e-6)
    np.testing.assert_allclose(matrix, exact_weights(size_in, size_out), atol=1e-6)


@pytest.mark.parametrize(
    ("size_in", "size_out", "rows"),
    [
        # 2:1, radius 2: taps at distances 1.5, 0.5, 0.5, 1.5 weigh 1/8, 3/8, 3/8, 1/8; the edge takes what falls out.
        (6, 3, [[4 / 8, 3 / 8, 1 / 8, 0, 0, 0], [0, 1 / 8, 3 / 8, 3 / 8, 1 / 8, 0], [0, 0, 0, 1 / 8, 3 / 8, 4 / 8]]),
        # 1:2, radius 1: plain bilinear, centres at -1/4, 1/4, 3/4, 5/4.
        (2, 4, [[1, 0], [3 / 4, 1 / 4], [1 / 4, 3 / 4], [0, 1]]),
        # 3:1, radius 3: 1/9 2/9 3/9 2/9 1/9 around the middle pixel, of which two fall outside.
        (3, 1, [[3 / 9, 3 / 9, 3 / 9]]),
        (3, 3, np.eye(3)),
    ],
)
def test_weights_worked_by_hand(size_in, size_out, rows):
    np.testing.assert_allclose(triangle_weights(size_in, size_out), rows, atol=1e-7)


def test_a_2_to_1_downscale_worked_by_hand():
    row = np.array([10, 50, 90, 200, 0, 255])
    # 4/8 10 + 3/8 50 + 1/8 90 = 35; 1/8 50 + 3/8 90 + 3/8 200 + 1/8 0 = 115; 1/8 200 + 3/8 0 + 4/8 255 = 152.5
    image = np.tile(row[None, :, None], (4, 1, 3)).astype(np.uint8)
    out = resize_image(image, (2, 3))
    assert out.dtype == np.uint8
    assert out.shape == (2, 3, 3)
    assert (out[:, :2] == np.array([35, 115])[None, :, None]).all()
    assert np.isin(out[:, 2], [152, 153]).all()
    # The same along the rows.
    assert np.array_equal(resize_image(image.transpose(1, 0, 2), (3, 2)), out.transpose(1, 0, 2))


@settings(max_examples=20, deadline=None)
@given(height=sizes, width=sizes, out=st.tuples(sizes, sizes), value=st.integers(0, 255))
def test_a_constant_image_stays_constant(height, width, out, value):
    resized = resize_image(np.full((height, width, 3), value, np.uint8), out)
    assert resized.shape == (*out, 3)
    assert (resized == value).all()


def test_the_same_size_changes_nothing():
    image = noise(17, 23)
    assert np.array_equal(resize_image(image, (17, 23)), image)
    assert np.array_equal(resize_label(image[..., 0], (17, 23)), image[..., 0])


@pytest.mark.parametrize(
    ("size_in", "size_out"),
    [((72, 96), (36, 48)), ((72, 96), (31, 50)), ((45, 60), (23, 41)), ((36, 48), (72, 96)), ((60, 40), (30, 80))],
)
def test_inside_the_edges_it_is_torchs_antialiased_bilinear(size_in, size_out):
    image = noise(*size_in)
    planes = torch.from_numpy(image).permute(2, 0, 1)[None].float()
    wanted = torch.nn.functional.interpolate(
        planes, size=size_out, mode="bilinear", antialias=True, align_corners=False
    )
    wanted = wanted[0].permute(1, 2, 0).numpy()
    inside = []
    for n_in, n_out in zip(size_in, size_out, strict=True):
        scale = n_in / n_out
        centres, radius = (np.arange(n_out) + 0.5) * scale - 0.5, max(1.0, scale)
        inside.append((centres - radius >= -1) & (centres + radius <= n_in))
    difference = np.abs(resize_image(image, size_out) - wanted)[inside[0]][:, inside[1]]
    assert difference.size > 0.7 * wanted.size
    assert difference.max() < 0.51


@pytest.mark.parametrize(
    ("size_in", "size_out", "indices"),
    [
        (4, 2, [1, 3]),  # centres 1.0 and 3.0: the tie goes to the later pixel
        (2, 4, [0, 0, 1, 1]),
        (3, 2, [0, 2]),  # 0.75, 2.25
        (5, 3, [0, 2, 4]),  # 0.83, 2.5, 4.17
        (45, 23, [0, 2, 4, 6, 8, 10, 12, 14, 16, 18, 20, 22, 24, 26, 28, 30, 32, 34, 36, 38, 40, 42, 44]),
        (6, 5, [0, 1, 3, 4, 5]),  # 0.6, 1.8, 3.0, 4.2, 5.4: the exact 3 that fp32 sums miss
    ],
)
def test_nearest_indices_worked_by_hand(size_in, size_out, indices):
    assert nearest_indices(size_in, size_out).tolist() == indices


@settings(max_examples=100, deadline=None)
@given(size_in=st.integers(1, 3000), size_out=st.integers(1, 300))
def test_nearest_indices_are_exact_fractions(size_in, size_out):
    exact = [int((out + Fraction(1, 2)) * Fraction(size_in, size_out)) for out in range(size_out)]
    assert nearest_indices(size_in, size_out).tolist() == exact


@pytest.mark.parametrize("dtype", [np.uint8, np.uint16])
def test_labels_keep_their_values_channels_and_type(dtype):
    label = np.arange(24).reshape(4, 6).astype(dtype)
    out = resize_label(label, (2, 3))
    assert out.dtype == dtype
    assert out.tolist() == [[7, 9, 11], [19, 21, 23]]
    colors = np.stack([label, label + 1, label + 2], axis=2)
    assert resize_label(colors, (2, 3))[..., 1].tolist() == [[8, 10, 12], [20, 22, 24]]
