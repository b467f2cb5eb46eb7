import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from fastseg.data import unlisted
from fastseg.data.classes import VOID, ClassMap, camvid_indexed
from fastseg.data.unlisted import Tally, histogram, summary

RED, BLACK = (200, 0, 0), (0, 0, 0)
COLOURS = ClassMap(("car",), (RED,), from_color={RED: 0, BLACK: VOID})


def tally(*labels) -> Tally:
    """Of labels none of whose pixels is in the class map."""
    made = Tally()
    for label in labels:
        made.add(histogram(label, np.ones(label.shape[:2], bool)))
    return made


def test_a_histogram_counts_what_is_marked_and_keeps_colours_apart():
    label = np.array([[(0, 0, 1), (0, 1, 0)], [(1, 0, 0), (0, 0, 1)]], np.uint8)
    values, counts = histogram(label, np.array([[True, True], [False, True]]))
    assert (values.tolist(), counts.tolist()) == ([1, 256], [2, 1])  # blue counts 1, green 256
    values, counts = histogram(np.array([[300, 7], [7, 9]], np.uint16), np.array([[True, True], [True, False]]))
    assert (values.tolist(), counts.tolist()) == ([7, 300], [2, 1])


@settings(max_examples=50, deadline=None)
@given(st.lists(st.lists(st.integers(0, 5), min_size=1, max_size=8), min_size=1, max_size=6), st.integers(1, 10))
def test_sums_are_those_of_all_labels_whenever_they_are_made(labels, pending):
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(unlisted, "PENDING", pending)
        values, pixels, images = tally(*(np.array([label], np.uint8) for label in labels)).sums()
    together = [value for label in labels for value in label]
    assert values.tolist() == sorted(set(together))
    assert pixels.tolist() == [together.count(value) for value in sorted(set(together))]
    assert images.tolist() == [sum(value in label for label in labels) for value in sorted(set(together))]


def test_the_commonest_values_come_first_with_their_pixels_and_labels():
    found = tally(np.array([[12, 12, 99]], np.uint8), np.array([[12, 300, 20]], np.uint16), np.arange(13, 17)[None])
    said = summary(found, camvid_indexed())
    assert said.startswith("values outside the class map, the commonest first: 12 (3 pixels in 2 labels), ")
    assert said.endswith(" and 3 more")  # of 8 values, five are named


def test_255_alone_is_most_likely_void():
    assert summary(tally(np.array([[255, 255]], np.uint8)), camvid_indexed()).endswith("`void = [255]` in dataset.toml")
    assert "void" not in summary(tally(np.array([[255, 77]], np.uint8)), camvid_indexed())


def test_a_few_colours_are_told_with_the_class_whose_colour_is_close():
    said = summary(tally(np.array([[(200, 12, 0), (200, 13, 0), (3, 3, 3)]], np.uint8)), COLOURS)
    assert "(200, 12, 0) (1 pixel in 1 label, close to car's (200, 0, 0))" in said
    assert "(200, 13, 0) (1 pixel in 1 label)" in said
    assert "(3, 3, 3) (1 pixel in 1 label, close to void's (0, 0, 0))" in said
    assert "JPEG" not in said


def test_many_colours_are_taken_for_smoothing_with_the_share_that_is_close_to_a_class():
    near = [(200 - i % 10, i // 10, 0) for i in range(70)]  # at most 9 and 6 away from red
    far = [(0, 100, 200 + i) for i in range(10)]
    said = summary(tally(np.array([near * 2 + far * 6], np.uint8)), COLOURS)
    assert "; 70% of these pixels are within 12 of a listed colour: the masks were resized" in said  # 140 of 200
    assert "close to" not in said


def test_many_values_are_no_classes():
    said = summary(tally(np.arange(100, 200, dtype=np.uint8)[None]), camvid_indexed())
    assert "; 100 different values are no classes: the masks were resized or drawn with smoothing" in said
