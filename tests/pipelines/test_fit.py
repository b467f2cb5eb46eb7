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
from fastseg.pipelines.fit import Box, View, covered, fitted, kept_views, rooms_of, seen, views_of, window_of, zoomed
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


def spec_of(*sizes, size, window=None, fit="squeeze", crop=None, keep=None):
    headers = [Header(image_size=own, label_size=own) for own in sizes]
    given = {"crop": crop and Size(*crop), "keep": keep and Size(*keep), "fit": fit}
    return SimpleNamespace(headers=headers, size=Size(*size), window=window and Size(*window), **given)


def part_of(*rows, zoom=None, colour=None):
    """A batch of (index, mirror, shift, crop), and rows of (scale, place down, place to the right) and of colours."""
    jitter = (np.array(drawn or np.empty((len(rows), 0))) for drawn in (zoom, colour))
    return BatchPlan(*(np.array(values) for values in zip(*rows, strict=True)), *jitter)


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


STILL = (0, 0), (0, 0)


@pytest.mark.parametrize(
    ("own", "how", "zoom", "shift", "view"),
    [
        # Halved, it has 20 + 1 places down and 40 + 1 to the right.
        ((40, 80), {}, (0.5, 0.5, 0.999), (0, 0), ((0, 0, 40, 80), (20, 40), (False, 10, 40))),
        ((40, 80), {}, (0.5, 0.0, 0.0), (-3, 2), ((0, 0, 40, 80), (20, 40), (False, -3, 2))),
        # As it is: one place.
        ((40, 80), {}, (1.0, 0.999, 0.999), (0, 0), ((0, 0, 40, 80), (40, 80), (False, 0, 0))),
        # Doubled, a quarter of it is seen, at one of 21 x 41 places.
        ((40, 80), {}, (2.0, 0.0, 0.0), (0, 0), ((0, 0, 20, 40), (40, 80), (False, 0, 0))),
        ((40, 80), {}, (2.0, 0.999, 0.5), (1, 1), ((20, 20, 20, 40), (40, 80), (False, 1, 1))),
        # Of a file of twice the size as much is seen, in twice the pixels; 1.6 x 40 = 64, and 80 x 40 / 64 = 50.
        ((80, 160), {}, (1.6, 0.999, 0.0), (0, 0), ((30, 0, 50, 100), (40, 80), (False, 0, 0))),
        # 1.5 x 40 = 60 rows of a small file's 20: 20 x 40 / 60 = 13.3.
        ((20, 160), {}, (1.5, 0.0, 0.0), (0, 0), ((0, 0, 13, 107), (40, 80), (False, 0, 0))),
        # 0.51 x 40 = 20.4, and 0.51 x 80 = 40.8.
        ((40, 80), {}, (0.51, 0.0, 0.0), (0, 0), ((0, 0, 40, 80), (20, 41), (False, 0, 0))),
        # A crop of 20x20 sees as large a part as it would of 40x80 pixels: a half and a quarter.
        ((80, 160), {"crop": (20, 20)}, (1.0, 0.0, 0.999), (0, 0), ((0, 120, 40, 40), (20, 20), (False, 0, 0))),
        ((80, 160), {"crop": (20, 20)}, (0.25, 0.5, 0.0), (0, 0), ((0, 0, 80, 160), (10, 20), (False, 5, 0))),
        # Letterboxed it is 40x40; made 1.5 times as large 60x60, of which 40 rows are seen, and 60 columns lie in 80.
        ((80, 80), {"fit": "letterbox"}, (1.5, 0.0, 0.5), (0, 0), ((0, 0, 53, 80), (40, 60), (False, 0, 10))),
        # train.scale: a window of 20x40 becomes 40x80, so that 60x60 become 120x120, or 60x60 at a half.
        ((60, 60), {"window": (20, 40)}, (1.0, 0.5, 0.5), (0, 0), ((20, 10, 20, 40), (40, 80), (False, 0, 0))),
        ((60, 60), {"window": (20, 40)}, (0.5, 0.0, 0.5), (0, 0), ((0, 0, 40, 60), (40, 60), (False, 0, 10))),
        # What a cache keeps at 40x80 is as good as a file of that size.
        ((80, 160), {"keep": (40, 80)}, (2.0, 0.999, 0.5), (0, 0), ((20, 20, 20, 40), (40, 80), (False, 0, 0))),
        (
            (80, 80),
            {"keep": (40, 80), "fit": "letterbox"},
            (1.5, 0.0, 0.5),
            (0, 0),
            ((0, 0, 27, 40), (40, 60), (False, 0, 10)),
        ),
        # Never less than a pixel, of the file or of the input.
        ((3, 3), {}, (100.0, 0.999, 0.0), (0, 0), ((2, 0, 1, 1), (40, 80), (False, 0, 0))),
        ((3, 3), {}, (0.001, 0.0, 0.999), (0, 0), ((0, 0, 3, 3), (1, 1), (False, 0, 79))),
    ],
)
def test_at_a_scale_of_its_own_a_sample_shows_a_part_or_lies_in_the_room(own, how, zoom, shift, view):
    part = part_of((0, False, shift, (0, 0)), zoom=[zoom])
    box, *rest = view
    assert kept_views(part, spec_of(own, size=(40, 80), **how)) == [(Box(*box), *rest, None)]


@settings(max_examples=300, deadline=None)
@given(st.data())
def test_a_jittered_sample_fills_the_input_or_all_of_it_is_within(data):
    """Whatever is drawn: a window within its file, as many pixels as it has room for, of that ratio, to a pixel."""
    own, box, into = (data.draw(st.integers(1, 60), name) for name in ("own", "box", "into"))
    scale, place = data.draw(st.floats(1 / 64, 64), "scale"), data.draw(st.floats(0, 1, exclude_max=True), "place")
    first, taken, made, at = zoomed(own, box, into, scale, place)
    assert 0 <= first <= first + taken <= own
    assert 0 <= at <= at + made <= into
    assert taken >= 1
    assert made >= 1
    assert taken == own or made == into
    full = max(1.0, scale * box)
    if taken == own and made < into:
        assert abs(made - full) <= 0.5
    elif made == into and full > into + 1:
        assert abs(taken - own * into / full) <= 0.5 + own * into / full**2 or taken == 1


def test_all_places_of_a_window_come_alike():
    """In tenths of place: of 10 rows a window of 1 may lie in 10 places, and 1 row of 10 too."""
    places = [(tenth + 0.5) / 10 for tenth in range(10)]
    assert [zoomed(10, 10, 1, 1.0, place) for place in places] == [(first, 1, 1, 0) for first in range(10)]
    assert [zoomed(10, 10, 10, 0.1, place) for place in places] == [(0, 10, 1, at) for at in range(10)]


def test_a_sample_has_its_own_row_of_colours_and_a_cut_keeps_it():
    spec = spec_of((4, 6), (4, 6), size=(4, 6))
    first, second = views_of(part_of((1, False, *STILL), (0, True, *STILL), colour=[[1, 2, 3, 4], [5, 6, 7, 8]]), spec)
    assert (first.colour.tolist(), second.colour.tolist()) == ([1, 2, 3, 4], [5, 6, 7, 8])
    assert seen(second, (2, 3)).colour is second.resized().colour is second.colour


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
