from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from fastseg.data.classes import VOID, ClassMap, camvid_colored, camvid_indexed
from fastseg.data.layouts import Pair, find
from fastseg.data.stats import class_weights, count
from fastseg.errors import FastsegError

FOUR = ClassMap(tuple("abcd"), ((0, 0, 0),) * 4, from_index={0: 0, 1: 1, 2: 2, 3: 3, 11: VOID})
FIRST = [[0, 0, 1, 1], [1, 11, 11, 0]]  # a 3, b 3, void 2 of 8
SECOND = [[0, 0, 0], [2, 0, 0]]  # a 5, c 1 of 6; d is nowhere


@pytest.fixture
def pairs(png):
    def write(*labels):
        return [Pair(str(i), "", str(png(f"{i}.png", label))) for i, label in enumerate(labels)]

    return write


def test_counts_worked_by_hand(pairs):
    counts = count(pairs(FIRST, SECOND), FOUR, threads=2)
    assert counts.images == 2
    assert counts.pixels.tolist() == [8, 3, 1, 0]
    assert counts.image_pixels.tolist() == [14, 8, 6, 0]  # all pixels, void too, of the images that have the class
    assert counts.void_pixels == 2
    np.testing.assert_allclose(counts.frequency, [8 / 14, 3 / 8, 1 / 6, 0])


@pytest.mark.parametrize(
    ("labels", "weights"),
    [
        # The median of 4/7, 3/8, 1/6 is 3/8; the absent class stays out of it.
        ([FIRST, SECOND], [21 / 32, 1, 9 / 4, 0]),
        # The median of 5/6 and 1/6 is 1/2.
        ([SECOND], [3 / 5, 0, 3, 0]),
        ([[[11, 11]]], [0, 0, 0, 0]),
    ],
)
def test_weights_worked_by_hand(pairs, labels, weights):
    counts = count(pairs(*labels), FOUR, threads=1)
    np.testing.assert_allclose(class_weights(counts, "median-frequency"), weights, rtol=1e-12)
    np.testing.assert_allclose(class_weights(counts, "sqrt-median-frequency"), np.sqrt(weights), rtol=1e-12)
    assert class_weights(counts, "none").tolist() == [float(weight > 0) for weight in weights]


def test_colours_are_counted_by_their_groups(pairs):
    car, truck, void, sky = (64, 0, 128), (192, 128, 192), (0, 0, 0), (128, 128, 128)
    counts = count(pairs([[car, truck, void], [sky, sky, truck]]), camvid_colored(), threads=1)
    assert dict(enumerate(counts.pixels.tolist())) == {**dict.fromkeys(range(11), 0), 0: 2, 8: 3}
    assert counts.void_pixels == 1


def test_a_value_off_the_map_is_an_error_unless_it_counts_as_void(pairs):
    made = pairs(FIRST, [[0, 9, 9]])
    with pytest.raises(FastsegError, match=f"^{made[1].label}: value 9 is not in the class map: 2 pixels"):
        count(made, FOUR, threads=2)
    counts = count(made, FOUR, threads=2, unknown=VOID)
    assert counts.void_pixels == 4
    assert counts.pixels.tolist() == [4, 3, 0, 0]


@pytest.fixture(scope="module")
def train(camvid):
    data = find(camvid)
    return data.splits["train"], count(data.splits["train"], data.classes, threads=2)


@pytest.mark.camvid
def test_camvids_train_pixels_are_the_published_counts(train):
    pixels = [10682767, 14750079, 623349, 20076880, 2845085, 6166762, 743859, 714595, 3719877, 405385, 184967]
    pairs, counts = train
    assert len(pairs) == counts.images == 367
    assert counts.pixels.tolist() == pixels
    assert counts.void_pixels == 2503995
    assert counts.pixels.sum() + counts.void_pixels == 367 * 360 * 480


@pytest.mark.camvid
def test_camvids_weights_follow_the_segnet_papers_definition(camvid, train):
    of_class, of_images = np.zeros(11), np.zeros(11)
    for path in sorted((camvid / "trainannot").glob("*.png")):
        label = np.array(Image.open(path))
        for index in range(11):
            here = (label == index).sum()
            of_class[index] += here
            of_images[index] += label.size if here else 0
    frequency = of_class / of_images
    np.testing.assert_allclose(class_weights(train[1], "median-frequency"), np.median(frequency) / frequency, rtol=5e-5)


def test_a_drawn_data_sets_counts_are_those_of_its_files(street):
    data = find(street)
    labels = [np.array(Image.open(pair.label)) for pair in data.splits["train"]]
    counts = count(data.splits["train"], camvid_indexed(), threads=2)
    assert counts.pixels.tolist() == [sum(int((label == index).sum()) for label in labels) for index in range(11)]
    assert counts.pixels.sum() + counts.void_pixels == len(labels) * 96 * 144
    assert Path(data.splits["train"][0].label).parent.name == "trainannot"
