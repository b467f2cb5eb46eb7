"""Where images lie, and what samples show of them: by hand, by fractions, and pixel by pixel from the definitions."""

from fractions import Fraction
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from fastseg.config import Size
from fastseg.data.headers import Header
from fastseg.kernels.augment import Move
from fastseg.pipelines.fit import Box, View, covered, fitted, rooms_of, seen, views_of, window_of
from fastseg.pipelines.plan import BatchPlan

sides = st.integers(1, 40)
sizes = st.tuples(sides, sides)


@pytest.mark.parametrize(
    ("size", "into", "box"),
    [
        ((720, 960), (360, 480), (0, 0, 360, 480)),
        ((960, 720), (360, 480), (0, 105, 360, 270)),
        ((480, 960), (360, 480), (60, 0, 240, 480)),
        ((100, 3), (50, 60), (0, 29, 50, 2)),  # 1.5 columns are 2
        ((1000, 1), (50, 60), (0, 29, 50, 1)),  # and none are 1
        ((5, 7), (20, 20), (3, 0, 14, 20)),  # 14.3 rows; of 6 that are left, half above
        ((6, 7), (20, 20), (1, 0, 17, 20)),  # of 3, the larger part below
    ],
)
def test_letterboxed_images_keep_their_shape_in_the_middle(size, into, box):
    assert fitted(size, into, "letterbox") == box
    assert fitted(size, into, "squeeze") == (0, 0, *into)


@settings(max_examples=200, deadline=None)
@given(size=sizes, into=sizes)
def test_a_letterboxed_image_fills_one_side_and_is_in_the_other_as_its_ratio_says(size, into):
    top, left, height, width = fitted(size, into, "letterbox")
    ratio = min(Fraction(into[0], size[0]), Fraction(into[1], size[1]))
    for found, own, side, before in zip((height, width), size, into, (top, left), strict=True):
        assert abs(found - own * ratio) <= Fraction(1, 2) or found == 1
        assert 0 <= side - found - 2 * before <= 1
    assert height == into[0] or width == into[1]


def test_scores_of_what_an_image_covers_are_cut_out_and_small_ones_made_the_inputs_size_first():
    letterboxed = (6, 8), "letterbox"
    scores = torch.arange(2 * 6 * 8.0).view(1, 2, 6, 8)
    assert torch.equal(covered(scores, (12, 16), *letterboxed), scores)
    assert torch.equal(covered(scores, (6, 4), *letterboxed), scores[..., 2:6])
    assert torch.equal(covered(scores, (2, 8), *letterboxed), scores[..., 2:4, :])
    small = torch.tensor([[[[1.0, 2.0, 3.0, 4.0]] * 3]])
    # Halfway between pixels of twice the width: 1.25 = 1 + (2 - 1) / 4, ...
    assert torch.equal(covered(small, (6, 4), *letterboxed), torch.tensor([[[[1.75, 2.25, 2.75, 3.25]] * 6]]))
    assert torch.equal(covered(small, (6, 4), (6, 8), "squeeze"), small)


def spec_of(*sizes, size, window=None, fit="squeeze"):
    headers = [Header(image_size=own, label_size=own) for own in sizes]
    return SimpleNamespace(headers=headers, size=Size(*size), window=window and Size(*window), fit=fit)


def part_of(*rows):
    """A batch of (index, mirror, shift, crop)."""
    return BatchPlan(*(np.array(values) for values in zip(*rows, strict=True)), *np.empty((2, len(rows), 0)))


def test_windows_lie_at_their_crops_and_small_files_at_theirs_in_the_input():
    spec = spec_of((100, 90), (20, 90), (20, 30), size=(40, 50), window=(40, 50))
    assert rooms_of(spec.headers, spec.window, spec.size).tolist() == [[60, 40], [20, 40], [20, 20]]
    still = (0, 0)
    part = part_of((0, True, still, (60, 3)), (1, False, still, (7, 40)), (2, True, still, (20, 19)))
    assert views_of(part, spec) == [
        (Box(60, 3, 40, 50), (40, 50), (True, 0, 0), None),
        (Box(0, 40, 20, 50), (20, 50), (False, 7, 0), None),
        (Box(0, 0, 20, 30), (20, 30), (True, 20, 19), None),
    ]


def test_windows_of_another_scale_become_the_networks_size_and_small_files_as_much_smaller():
    spec = spec_of((100, 90), (100, 63), size=(20, 25), window=(40, 80))
    assert window_of((100, 90), (40, 80), (20, 25)) == ((40, 80), (20, 25))
    # 63 of 80 columns become 63 x 25 / 80 = 19.7 of 25, which leaves 6 places.
    assert rooms_of(spec.headers, spec.window, spec.size).tolist() == [[60, 10], [60, 5]]
    part = part_of((0, False, (0, 0), (1, 2)), (1, False, (0, 0), (1, 2)))
    assert views_of(part, spec) == [
        (Box(1, 2, 40, 80), (20, 25), (False, 0, 0), None),
        (Box(1, 0, 40, 63), (20, 20), (False, 0, 2), None),
    ]


def test_letterboxed_samples_are_moved_from_the_middle_and_cropped():
    spec = spec_of((30, 10), (20, 40), size=(20, 20), fit="letterbox")
    part = part_of((0, True, (3, -2), (0, 0)), (1, False, (-1, 0), (4, 9)))
    assert views_of(part, spec) == [
        (Box(0, 0, 30, 10), (20, 7), (True, 3, 4), None),
        (Box(0, 0, 20, 40), (10, 20), (False, 0, -9), None),
    ]


def shown(image, mirror, shift, size):
    """What a batch of `size` shows, pixel by pixel, from the definition: mirrored, then moved; -1 is uncovered."""
    height, width = image.shape
    found = np.full(size, -1)
    for i, j in np.ndindex(size):
        y, x = i - shift[0], j - shift[1]
        if 0 <= y < height and 0 <= x < width:
            found[i, j] = image[y, width - 1 - x if mirror else x]
    return found


@settings(max_examples=300, deadline=None)
@given(st.data())
def test_what_a_crop_shows_of_a_view_is_all_that_is_decoded_of_it(data):
    height, width = size = data.draw(st.tuples(*[st.integers(1, 9)] * 2), "size")
    crop = data.draw(st.tuples(st.integers(1, height), st.integers(1, width)), "crop")
    shift = data.draw(st.tuples(*[st.integers(-12, 12)] * 2), "shift")
    mirror = data.draw(st.booleans(), "mirror")
    image = np.arange(height * width).reshape(size)
    window, cut, move, _ = seen(View(Box(0, 0, *size), size, Move(mirror, *shift)), crop)
    assert min(window.top, window.left) >= 0
    assert image[window.slices].shape == cut == crop  # within the image
    found = shown(image[window.slices], move.mirror, move[1:], crop)
    np.testing.assert_array_equal(found, shown(image, mirror, shift, crop))
