import json
import os
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from fastseg.data import stats
from fastseg.data.classes import VOID, ClassMap, camvid_colored, camvid_indexed
from fastseg.data.layouts import Pair, find
from fastseg.data.stats import Counts, class_weights, count, count_once
from fastseg.errors import FastsegError, UsageError

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


@pytest.fixture
def decoded(tmp_path, monkeypatch) -> list[str]:
    """Names of the labels that are decoded, while counts are kept in tmp_path / "home" / "counts"."""
    monkeypatch.setenv("FASTSEG_DATA", str(tmp_path / "home"))
    names, decode = [], stats.decode_label

    def decode_label(path, *how):
        names.append(Path(path).name)
        return decode(path, *how)

    monkeypatch.setattr(stats, "decode_label", decode_label)
    return names


def kept(tmp_path) -> list[Path]:
    return sorted((tmp_path / "home" / "counts").iterdir())


def as_worked_by_hand(counts: Counts) -> bool:
    found = (counts.images, counts.pixels.tolist(), counts.image_pixels.tolist(), counts.void_pixels)
    return found == (2, [8, 3, 1, 0], [14, 8, 6, 0], 2) and counts.pixels.dtype == np.int64


def test_what_was_counted_is_not_counted_again(pairs, decoded, tmp_path):
    two = pairs(FIRST, SECOND)
    assert as_worked_by_hand(count_once(two, FOUR, threads=1))
    assert decoded == ["0.png", "1.png"]
    assert as_worked_by_hand(count_once(two, FOUR, threads=1))
    assert len(decoded) == 2
    assert [path.suffix for path in kept(tmp_path)] == [".json"]


def test_another_file_another_map_or_another_rule_is_counted(pairs, decoded, png, monkeypatch, tmp_path):
    two = pairs(FIRST, SECOND)
    count_once(two, FOUR, threads=1)
    before = os.stat(two[1].label)
    png("1.png", np.array(SECOND)[:, ::-1])  # as many bytes, maybe, but later
    os.utime(two[1].label, ns=(before.st_atime_ns, before.st_mtime_ns + 1))
    count_once(two, FOUR, threads=1)
    png("1.png", np.zeros((2, 3)))
    os.utime(two[1].label, ns=(before.st_atime_ns, before.st_mtime_ns))
    assert count_once(two, FOUR, threads=1).pixels.tolist() == [9, 3, 0, 0]  # another size of the file
    assert len(decoded) == 6
    others = ClassMap(tuple("abcd"), ((0, 0, 0),) * 4, from_index={0: 1, 1: 0, 2: 2, 3: 3, 11: VOID})
    assert count_once(two, others, threads=1).pixels.tolist() == [3, 9, 0, 0]
    assert count_once(two[:1], FOUR, threads=1).pixels.tolist() == [3, 3, 0, 0]
    count_once(two, FOUR, threads=1, unknown=VOID)
    assert len(decoded) == 11


@pytest.mark.parametrize(
    "damage",
    [
        lambda document: "",
        lambda document: "{",
        lambda document: "[" * 10**5,
        lambda document: "[1]",
        lambda document: json.dumps(document | {"images": 3}),
        lambda document: json.dumps(document | {"pixels": [1, 2, 3]}),
        lambda document: json.dumps(document | {"pixels": [1, 2, 3, -4]}),
        lambda document: json.dumps(document | {"pixels": [1, 2, 3, 2**63]}),
        lambda document: json.dumps(document | {"pixels": [1, 2, 3, "4"]}),
        lambda document: json.dumps(document | {"pixels": 4}),
        lambda document: json.dumps({key: value for key, value in document.items() if key != "void_pixels"}),
    ],
)
def test_what_cannot_be_counts_is_counted_again_without_a_word(pairs, decoded, tmp_path, capsys, damage):
    two = pairs(FIRST, SECOND)
    count_once(two, FOUR, threads=1)
    (path,) = kept(tmp_path)
    path.write_text(damage(json.loads(path.read_text())))
    assert as_worked_by_hand(count_once(two, FOUR, threads=1))
    assert as_worked_by_hand(count_once(two, FOUR, threads=1))
    assert len(decoded) == 4
    assert capsys.readouterr() == ("", "")


def test_a_home_that_cannot_be_written_to_is_no_error(pairs, decoded, tmp_path):
    (tmp_path / "home").write_text("a file")
    two = pairs(FIRST, SECOND)
    assert all(as_worked_by_hand(count_once(two, FOUR, threads=1)) for _ in range(2))
    assert len(decoded) == 4


def test_a_user_without_a_home_is_no_error(pairs, decoded, monkeypatch):
    def homeless():
        raise UsageError("no home folder")

    monkeypatch.setattr(stats, "home", homeless)
    assert as_worked_by_hand(count_once(pairs(FIRST, SECOND), FOUR, threads=1))


def test_what_is_off_the_map_is_an_error_each_time(pairs, decoded):
    for _ in range(2):
        with pytest.raises(FastsegError, match=r"0\.png"):
            count_once(pairs([[0, 77]]), FOUR, threads=1)


def test_a_label_that_is_gone_is_counts_error(pairs, decoded):
    two = pairs(FIRST, SECOND)
    os.unlink(two[0].label)
    with pytest.raises((OSError, FastsegError), match=r"0\.png"):
        count_once(two, FOUR, threads=1)


def test_what_was_not_used_for_the_longest_time_is_forgotten(pairs, decoded, tmp_path, monkeypatch):
    monkeypatch.setattr(stats, "REMEMBERED", 2)
    splits = [pairs(FIRST, SECOND), [], []]
    splits[1:] = [splits[0][:1], splits[0][1:]]
    for number, split in enumerate(splits[:2]):
        count_once(split, FOUR, threads=1)
        for path in kept(tmp_path):
            os.utime(path, (number, number))
    (partial := tmp_path / "home" / "counts" / ".x.json.partial").touch()  # a kill left it behind
    os.utime(partial, (0, 0))
    first = decoded.copy()
    count_once(splits[0], FOUR, threads=1)
    assert decoded == first
    count_once(splits[2], FOUR, threads=1)
    assert len(kept(tmp_path)) == 2
    count_once(splits[0], FOUR, threads=1)
    assert decoded == [*first, "1.png"]
