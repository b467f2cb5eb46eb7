import os
import shutil
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from fastseg.data import check as checks
from fastseg.data.check import check, look, off_map
from fastseg.data.classes import camvid_colored, camvid_indexed
from fastseg.data.decode import decode_image
from fastseg.data.headers import read_header
from fastseg.data.layouts import Pair, find
from fastseg.errors import UsageError

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


# Between files


@pytest.fixture
def folder(png, tmp_path):
    """folder({"train": {name: (image, label)}, ...}) is a data set of these, in the segnet layout."""

    def write(splits):
        for name in ("train", "trainannot"):  # by which the layout is known
            (tmp_path / name).mkdir()
        for split, pairs in splits.items():
            for name, (image, label) in pairs.items():
                png(f"{split}/{name}.png", image)
                png(f"{split}annot/{name}.png", label)
        return find(tmp_path)

    return write


def noise(seed, *size):
    return np.random.default_rng(seed).integers(0, 256, (*(size or (6, 8)), 3), np.uint8)


def sound(*names):
    """Pairs of these names, each with its own picture and with all classes."""
    return {name: (noise([*name.encode()]), GREY) for name in names}


def told(problems):
    return [problem.problem for problem in problems]


def test_a_set_without_pairs_is_an_error(png, tmp_path):
    png("train/a.png", PHOTO)
    png("trainannot/b.png", GREY)
    first, *others = check(find(tmp_path), threads=1).errors
    assert first.problem.startswith("has no pair of an image and its label")
    assert len(others) == 2


@pytest.mark.parametrize(
    ("splits", "lacks"),
    [
        (("train",), "to validate on"),
        (("val",), "to train on"),
        (("test",), "to train on and none to validate on"),
    ],
)
def test_a_set_without_images_to_train_or_validate_on_is_an_error_with_its_cure(folder, splits, lacks):
    (error,) = check(folder({split: sound("a", "b") for split in splits}), threads=1).errors
    assert error.problem.startswith(f"has no images {lacks}; `val = 0.2` in dataset.toml ")
    assert "--split-scheme random:80-20" in error.problem


def test_the_cures_cure(folder, tmp_path):
    # As the pool of a set without splits of its own: `auto` finds none of SegNet's names.
    found = folder({"train": sound(*"abcdefghij")})
    report = check(found, threads=1, scheme="random:80-20", seed=3)
    assert report.errors == []
    assert {split: len(pairs) for split, pairs in report.splits.items()} == {"train": 8, "val": 2}
    classes = "".join(f'[[classes]]\nname = "c{i}"\nindex = {i}\n' for i in range(12))
    text = f'val = 0.2\n[splits.train]\nimages = "train"\nlabels = "trainannot"\n{classes}'
    (tmp_path / "dataset.toml").write_text(text, encoding="utf-8")
    report = check(find(tmp_path), threads=1)
    assert (report.errors, len(report.splits["val"])) == ([], 2)


def test_a_set_without_splits_says_how_to_divide_it(png, tmp_path):
    for folder_name in ("701_StillsRaw_full", "LabeledApproved_full"):
        for stem in ("a", "b"):
            name = f"{stem}_L" if folder_name.startswith("Label") else stem
            png(f"{folder_name}/{name}.png", np.full((6, 8, 3), 128))
    (error,) = check(find(tmp_path), threads=1).errors
    assert error.problem.startswith("has no images to train on and none to validate on; `val = 0.2`")
    (error,) = check(find(tmp_path), threads=1, scheme="segnet").errors
    assert "SegNet's published lists" in error.problem


def test_the_same_picture_in_two_splits_is_an_error_by_its_decoded_content(folder, tmp_path):
    found = folder({"train": sound("a", "b"), "val": sound("c", "d")})
    assert check(found, threads=1).errors == []
    Image.open(tmp_path / "train/b.png").save(tmp_path / "val/c.png", compress_level=0)
    assert (tmp_path / "train/b.png").read_bytes() != (tmp_path / "val/c.png").read_bytes()
    (error,) = check(found, threads=1).errors
    assert (error.kind, error.file) == ("twice", str(tmp_path / "val/c.png"))
    assert str(tmp_path / "train/b.png") in error.problem


def test_classes_that_no_image_to_train_or_to_validate_on_has_are_warned_of(folder):
    few = GREY % 3  # sky, building and pole; the others of 11 are in no training image
    less = np.minimum(GREY, 9)  # no bicyclist
    found = folder({"train": {"a": (noise(1), few)}, "val": {"b": (noise(2), less)}})
    assert told(check(found, threads=1).warnings) == [
        "no image of train has Road, Pavement, Tree, SignSymbol, Fence and 3 more: the loss weight is 0",
        "no image of val has Bicyclist: how well that is learnt is not measured",
    ]


def test_other_aspect_ratios_are_warned_of(folder):
    wide, tall, near = (np.resize(GREY, size) for size in ((60, 80), (80, 60), (60, 82)))
    images = {str(i): (noise(i, 60, 80), wide) for i in range(3)}
    images |= {"t": (noise(4, 80, 60), tall), "n": (noise(5, 60, 82), near)}
    found = folder({"train": images, "val": {"v": (noise(6, 60, 80), wide)}})
    (warning,) = check(found, threads=1).warnings
    assert warning.file.endswith("train/t.png")
    assert warning.detail == "60x80, 0.75 where the middle one has 1.33"
    assert "data.fit = letterbox" in warning.problem


def test_sequences_on_both_sides_of_a_draw_are_noted_once(folder):
    names = [f"{video}_{frame:05d}" for video in ("0001TP", "Seq05VD") for frame in range(10)]
    found = folder({"train": sound(*names[:5], *names[10:15]), "val": sound(*names[5:10], *names[15:])})
    assert check(found, threads=1).notes == []  # as somebody has divided them
    (note,) = check(found, threads=1, scheme="random-60-40").notes
    assert note.problem.startswith("2 of 2 sequences have images on both sides of the split (0001TP: ")
    assert "--split-scheme video" in note.problem
    assert check(found, threads=1, scheme="video").notes == []


@pytest.mark.parametrize("name", ["img_{:05d}", "{:05d}", "2007_{:06d}", "photo {}"])
def test_names_that_need_not_be_those_of_videos_are_not_noted(folder, name):
    found = folder({"train": sound(*map(name.format, range(8))), "val": sound(*map(name.format, range(8, 10)))})
    assert check(found, threads=1, scheme="random-60-40").notes == []


def test_values_off_the_map_are_summed_and_ignored_where_asked(folder):
    bad = GREY.copy()
    bad[0, :2], bad[1, 0] = 77, 99
    found = folder({"train": {"a": (noise(1), bad), "b": (noise(2), bad)}, "val": sound("c")})
    report = check(found, threads=1)
    assert [error.detail for error in report.errors] == ["value 77, 2 pixels, ..."] * 2
    (note,) = report.notes
    assert note.problem.endswith(": 77 (4 pixels in 2 labels), 99 (2 pixels in 2 labels)")
    ignored = check(found, threads=1, unknown_colours="void")
    assert ignored.errors == []
    assert [note.kind for note in ignored.notes] == ["ignored", "ignored", ""]
    with pytest.raises(UsageError, match="--unknown-colours odd: choose error or void"):
        check(found, threads=1, unknown_colours="odd")


# Large sets


@pytest.fixture
def large(folder, monkeypatch):
    """Ten pairs, where more than four are many."""
    monkeypatch.setattr(checks, "ALL", 4)
    return folder({"train": sound(*"abcdefgh"), "val": sound(*"ij")})


def test_of_a_large_set_all_headers_and_an_even_sample_are_looked_at(large, tmp_path):
    for name in "abcdefghij":
        path = next(tmp_path.glob(f"*/{name}.png"))
        path.write_bytes(path.read_bytes()[:-30])  # its header is whole
    (tmp_path / "train/b.png").write_bytes(b"")
    report = check(large, threads=2)
    # Of 0..9 at even distances: 0, 3, 6 and 9.
    bad = [(Path(error.file).stem, error.kind) for error in report.errors]
    assert bad == [("a", "undecodable"), ("b", "unreadable"), *((name, "undecodable") for name in "dgj")]
    assert told(report.notes)[0].startswith("decoded 4 of 10 pairs, evenly drawn; ")
    assert len(check(large, threads=2, every=True).errors) == 10


def test_fewer_of_larger_images_are_decoded(large, monkeypatch):
    monkeypatch.setattr(checks, "SAMPLED_PIXELS", 6 * 8 * 2 * 2)  # of two pairs
    assert told(check(large, threads=1).notes)[0].startswith("decoded 2 of 10 pairs, evenly drawn; ")


def test_in_a_large_set_files_are_compared_by_their_bytes(large, tmp_path):
    shutil.copy(tmp_path / "train/b.png", tmp_path / "val/j.png")
    Image.open(tmp_path / "train/c.png").save(tmp_path / "val/i.png", compress_level=0)
    assert [Path(error.file).stem for error in check(large, threads=1).errors] == ["j"]
    assert [Path(error.file).stem for error in check(large, threads=1, every=True).errors] == ["i", "j"]


def test_what_was_decoded_before_is_remembered(large, tmp_path, monkeypatch):
    monkeypatch.setenv("FASTSEG_DATA", str(tmp_path / "home"))
    first = check(large, threads=1, every=True)
    decoded = []
    monkeypatch.setattr(checks, "decode_image", lambda path: decoded.append(path) or decode_image(path))
    path = tmp_path / "train/d.png"
    os.utime(path, ns=(0, 0))
    again = check(large, threads=1, every=True)
    assert decoded == [str(path)]
    assert (first.notes, again.errors) == ([], [])
    (note,) = again.notes
    assert note.problem.startswith("9 images are as they were when they were decoded before")
