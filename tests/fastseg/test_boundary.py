"""The boundary F1 score on shapes worked by hand."""

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from fastseg.boundary import boundary_f1, contours, near


def square(top: int, left: int, side: int, size: tuple[int, int] = (100, 100)) -> torch.Tensor:
    """Class 1 on a square of class 0."""
    label = torch.zeros(size, dtype=torch.uint8)
    label[top : top + side, left : left + side] = 1
    return label


def test_contours_are_pixels_beside_another_class_but_not_the_images_edge_or_void():
    label = torch.tensor([[0, 0, 1], [0, 0, 1], [255, 0, 0]], dtype=torch.uint8)
    zero, one = contours(label, 2).int().tolist()
    assert zero == [[0, 1, 0], [0, 1, 0], [0, 0, 1]]
    assert one == [[0, 0, 1], [0, 0, 1], [0, 0, 0]]


def test_what_is_near_is_within_the_radius_from_centre_to_centre():
    point = torch.zeros(1, 7, 7, dtype=torch.bool)
    point[0, 3, 3] = True
    assert near(point, 0.9).sum() == 1
    assert near(point, 1.0).sum() == 5
    assert near(point, 1.5).sum() == 9  # diagonals are 1.414 away
    assert near(point, 2.0).sum() == 13


def test_a_square_that_is_moved():
    # 100 x 100: the diagonal is 141.4, the tolerance 1.06 pixels. The contour of a square of 20 has 76 pixels.
    label = square(20, 20, 20)
    assert contours(label, 2)[1].sum() == 76
    assert boundary_f1(label, label, 2).tolist() == [1, 1]
    assert boundary_f1(label, square(20, 21, 20), 2)[1] == 1
    # Moved by two, 16 pixels of its left side and the 20 of its right side are too far, in both directions.
    assert boundary_f1(label, square(20, 22, 20), 2)[1] == pytest.approx(40 / 76)


def test_a_class_that_is_missed_has_0_and_one_that_is_nowhere_none():
    label, nothing = square(20, 20, 20), torch.zeros(100, 100, dtype=torch.uint8)
    missed = boundary_f1(label, nothing, 3)
    assert missed[:2].tolist() == [0, 0]  # the contour of class 0 is missed too
    assert math.isnan(missed[2])
    assert boundary_f1(label, square(70, 70, 20), 2).tolist() == [0, 0]
    assert boundary_f1(nothing, nothing, 2).isnan().all()  # no contour anywhere


def test_what_is_predicted_on_void_does_not_count():
    label, prediction = square(20, 20, 20), square(20, 20, 20)
    label[60:] = 255
    prediction[70:80, 70:80] = 1
    assert boundary_f1(label, prediction, 2).tolist() == [1, 1]


@settings(deadline=None)  # the first call takes longer
@given(st.lists(st.integers(0, 2), min_size=60, max_size=60), st.lists(st.integers(0, 2), min_size=60, max_size=60))
def test_without_void_label_and_prediction_may_change_places(a, b):
    one, two = (torch.tensor(values, dtype=torch.uint8).view(6, 10) for values in (a, b))
    torch.testing.assert_close(boundary_f1(one, two, 3), boundary_f1(two, one, 3), equal_nan=True)
    same = boundary_f1(one, one, 3)
    assert ((same == 1) | same.isnan()).all()
