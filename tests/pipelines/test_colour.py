"""Colour jitter as a matrix: by hand, by what must stay, and beside colorsys of Python's own library."""

import colorsys

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from fastseg.pipelines.colour import colour_matrices

MEAN = (123.675, 116.28, 103.53)
GREY = 0.299 * 123.675 + 0.587 * 116.28 + 0.114 * 103.53

factors = st.floats(0, 2)
degrees = st.floats(-36, 36)


def applied(pixel, brightness=1.0, contrast=1.0, saturation=1.0, hue=0.0) -> np.ndarray:
    """What becomes of (red, green, blue), before it is cut off."""
    (matrix,) = colour_matrices(np.array([[brightness, contrast, saturation, hue]], float), MEAN)
    assert matrix.dtype == np.float32
    rows = matrix.astype(float).reshape(3, 4)
    return rows[:, :3] @ np.array(pixel, float) + rows[:, 3]


@pytest.mark.parametrize(
    ("change", "wanted"),
    [
        ({}, (200, 100, 50)),
        ({"brightness": 1.5}, (300, 150, 75)),
        ({"contrast": 0.5}, (100 + GREY / 2, 50 + GREY / 2, 25 + GREY / 2)),
        ({"contrast": 2}, (400 - GREY, 200 - GREY, 100 - GREY)),
        # Its grey is 0.299 x 200 + 0.587 x 100 + 0.114 x 50 = 124.2.
        ({"saturation": 0}, (124.2, 124.2, 124.2)),
        ({"saturation": 1.5}, (237.9, 87.9, 12.9)),
        # Brightness before contrast, which keeps its grey whatever the brightness: (400 - GREY) / 2 + GREY, ...
        ({"brightness": 2, "contrast": 0.5}, (200 + GREY / 2, 100 + GREY / 2, 50 + GREY / 2)),
        ({"contrast": 0, "saturation": 2, "hue": 30}, (GREY, GREY, GREY)),
    ],
)
def test_a_pixel_worked_by_hand(change, wanted):
    np.testing.assert_allclose(applied((200, 100, 50), **change), wanted, atol=1e-4)


def test_a_hue_turns_as_in_yiq_by_hand():
    """Red of 100 has I = 59.6 and Q = 21.2; turned by 90 degrees I = -21.2 and Q = 59.6, at the same Y of 29.9."""
    red, green, blue = applied((100, 0, 0), hue=90)
    assert 0.299 * red + 0.587 * green + 0.114 * blue == pytest.approx(29.9, abs=1e-4)
    assert 0.596 * red - 0.275 * green - 0.321 * blue == pytest.approx(-21.2, abs=1e-4)
    assert 0.212 * red - 0.523 * green + 0.311 * blue == pytest.approx(59.6, abs=1e-4)


@given(pixel=st.tuples(*[st.floats(0, 255)] * 3), angle=degrees)
def test_hues_turn_by_the_angle_and_keep_grey_and_distance_from_it_in_pythons_yiq(pixel, angle):
    """colorsys has FCC's rounded definition, which is another matrix: what it says agrees to some percent."""
    before, after = (colorsys.rgb_to_yiq(*(value / 255 for value in rgb)) for rgb in (pixel, applied(pixel, hue=angle)))
    assert after[0] == pytest.approx(before[0], abs=0.02)
    turned = complex(*before[1:]) * np.exp(1j * np.radians(angle))
    assert abs(complex(*after[1:]) - turned) < 0.05


@given(grey=st.floats(0, 255), saturation=factors, angle=degrees)
def test_greys_stay_under_saturation_and_hue(grey, saturation, angle):
    np.testing.assert_allclose(applied((grey,) * 3, saturation=saturation, hue=angle), (grey,) * 3, atol=1e-3)


@given(pixel=st.tuples(*[st.floats(0, 255)] * 3), angle=degrees)
def test_the_opposite_hue_turns_back(pixel, angle):
    np.testing.assert_allclose(applied(applied(pixel, hue=angle), hue=-angle), pixel, atol=1e-3)


@given(brightness=factors, contrast=factors, saturation=factors, angle=degrees)
def test_all_at_once_are_one_after_the_other(brightness, contrast, saturation, angle):
    pixel = (200, 100, 50)
    for change in ({"brightness": brightness}, {"contrast": contrast}, {"saturation": saturation}, {"hue": angle}):
        pixel = applied(pixel, **change)
    np.testing.assert_allclose(applied((200, 100, 50), brightness, contrast, saturation, angle), pixel, atol=1e-2)


def test_no_change_is_the_identity_to_the_bit():
    (matrix,) = colour_matrices(np.array([[1.0, 1, 1, 0]]), MEAN)
    np.testing.assert_array_equal(matrix.reshape(3, 4), np.eye(3, 4))
