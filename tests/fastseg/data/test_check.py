from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from fastseg.data.check import check, look, off_map
from fastseg.data.classes import camvid_colored, camvid_indexed
from fastseg.data.headers import read_header
from fastseg.data.layouts import Pair, find

GREY = np.arange(48, dtype=np.uint8).reshape(6, 8) % 12
PHOTO = np.random.default_rng(0).integers(0, 256, (6, 8, 3), np.uint8)


@pytest.fixture
def pair(png):
    def write(stem="a", image=PHOTO, label=GREY):
        return Pair(stem, str(png(f"train/{stem}.png", image)), str(png(f"trainannot/{stem}.png", label)))

    return write


def check_pair(pair, classes):
    found = look(pair, read_header(pair), classes)
    return list(found.errors), list(found.warnings)


def cut(path):
    data = Path(path).read_bytes()
    Path(path).write_bytes(data[: len(data) - 30])


def test_a_sound_pair_has_neither_errors_nor_warnings(pair):
    assert check_pair(pair(), camvid_indexed()) == ([], [])


@pytest.mark.parametrize("side", ["image", "label"])
def test_a_truncated_file_is_an_error(pair, side):
    noise = np.random.default_rng(1).integers(0, 12, (60, 80), np.uint8)
    made = pair(image=np.stack([noise] * 3, axis=2), label=noise)
    cut(getattr(made, side))
    (error,), warnings = check_pair(made, camvid_indexed())
    assert warnings == []
    assert error.file == getattr(made, side)
    assert error.problem.startswith("cannot be decoded: ")
    assert error.file not in error.problem


@pytest.mark.parametrize("side", ["image", "label"])
def test_a_missing_file_is_an_error(pair, side):
    made = pair()
    Path(getattr(made, side)).unlink()
    (error,), _ = check_pair(made, camvid_indexed())
    assert error.file == getattr(made, side)


def test_sizes_that_differ_are_an_error(pair):
    (error,), _ = check_pair(pair(label=GREY.T), camvid_indexed())
    assert error.problem == "image 8x6, label 6x8 (width x height): they must be equal"


def test_a_jpeg_label_is_an_error(pair):
    made = pair()
    Image.fromarray(GREY).save(made.label, format="JPEG")
    (error,), _ = check_pair(made, camvid_indexed())
    assert error.file == made.label
    assert "is a JPEG" in error.problem


def test_a_value_off_the_map_is_named_with_its_count_and_first_place(pair):
    label = GREY.copy()
    label[2, 3:6], label[5, 0] = 99, 12
    (error,), _ = check_pair(pair(label=label), camvid_indexed())
    assert error.problem.startswith(
        "value 99 is not in the class map: 3 pixels, the first at x=3 y=2; also 12; allowed are 0 to 11; "
    )
    assert off_map(error.file, camvid_indexed()) == error.problem


def test_a_colour_off_the_map_is_named_with_its_count_and_first_place(pair):
    label = np.full((6, 8, 3), 128, np.uint8)
    label[4, 7] = label[5, 7] = (128, 128, 129)
    (error,), _ = check_pair(pair(label=label), camvid_colored())
    assert error.problem.startswith("colour (128, 128, 129) is not in the class map: 2 pixels, the first at x=7 y=4; ")


def test_a_16_bit_value_off_the_map_is_named_as_it_is(pair):
    label = GREY.astype(np.uint16)
    label[0, 1] = 256 + 3
    (error,), _ = check_pair(pair(label=label), camvid_indexed())
    assert error.problem.startswith("value 259 is not in the class map: 1 pixel")


def test_a_label_of_the_wrong_kind_is_an_error(pair):
    made = pair(label=PHOTO)
    (error,), _ = check_pair(made, camvid_indexed())
    assert error.file == made.label
    assert "an index label must be a grey or palette image" in error.problem


@pytest.mark.parametrize(
    ("label", "classes"),
    [(np.full((6, 8), 11), camvid_indexed()), (np.zeros((6, 8, 3)), camvid_colored())],
    ids=["indexed", "colored"],
)
def test_a_label_of_void_only_is_a_warning(pair, label, classes):
    made = pair(label=label)
    errors, (warning,) = check_pair(made, classes)
    assert errors == []
    assert (warning.file, warning.problem) == (made.label, "all pixels are void")


def test_both_files_of_a_pair_are_checked(pair):
    noise = np.random.default_rng(1).integers(0, 256, (60, 80, 3), np.uint8)
    made = pair(image=noise, label=np.full((60, 80), 77))
    cut(made.image)
    errors, _ = check_pair(made, camvid_indexed())
    assert [error.file for error in errors] == [made.image, made.label]


def test_a_data_set_is_checked_whole_orphans_first_then_the_pairs_in_order(pair, png, tmp_path):
    bad, sound, empty, worse = (
        pair(stem, label=label) for stem, label in (("b", GREY + 50), ("c", GREY), ("d", GREY * 0 + 11), ("e", GREY.T))
    )
    orphan = png("train/z.png", PHOTO)
    lonely = png("trainannot/a.png", GREY)
    report = check(find(tmp_path), threads=3)
    no_val, *errors = report.errors
    assert no_val.problem.startswith("has no images to validate on; `val = 0.2` in dataset.toml ")
    assert [error.file for error in errors] == [str(orphan), str(lonely), bad.label, worse.label]
    assert report.warnings[0].file == empty.label
    assert sound.label not in {problem.file for problem in (*errors, *report.warnings)}


def test_a_drawn_data_set_is_sound(street):
    report = check(find(street), threads=2)
    assert (report.errors, report.warnings, report.notes) == ([], [], [])
    assert {split: len(pairs) for split, pairs in report.splits.items()} == {"train": 8, "val": 4}


@pytest.mark.camvid
def test_camvids_validation_images_are_sound(camvid):
    data = find(camvid)
    assert data.problems == ()
    assert [check_pair(made, data.classes) for made in data.splits["val"][::10]] == [([], [])] * 11
