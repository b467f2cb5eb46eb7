import os
import shutil
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

from fastseg.data import duplicates
from fastseg.data.decode import decode_image
from fastseg.data.duplicates import Remembered, byte_keys, in_two_splits, pixel_digest, validated_too
from fastseg.data.pairs import Pair
from fastseg.data.split import contents

RNG = np.random.default_rng(0)
GREY = np.zeros((6, 8))


def photo():
    return RNG.integers(0, 256, (6, 8, 3), np.uint8)


@pytest.fixture
def pair(png):
    def write(name, image=None, label=None):
        path = png(f"{name}.png", photo() if image is None else image)
        return Pair(path.stem, str(path), label or str(png(f"{name}_label.png", GREY)))

    return write


def digests(*pairs):
    return {pair.image: pixel_digest(decode_image(pair.image)) for pair in pairs}


def told(errors, warnings):
    return [(e.kind, e.file, e.detail) for e in errors], [(w.kind, w.file, w.detail) for w in warnings]


def test_a_picture_and_its_copy_in_another_format_have_one_digest_and_others_have_not(tmp_path):
    pixels = photo()
    for name in ("a.png", "a.bmp", "a.tif"):
        Image.fromarray(pixels).save(tmp_path / name)
    found = {pixel_digest(decode_image(str(path))) for path in tmp_path.iterdir()}
    assert len(found) == 1
    assert pixel_digest(pixels.reshape(8, 6, 3)) not in found
    pixels[5, 7, 2] ^= 1
    assert pixel_digest(pixels) not in found


def test_the_same_content_in_two_splits_is_an_error(pair, png):
    one = pair("train/a")
    other = pair("val/b", image=decode_image(one.image))
    assert told(*in_two_splits({"train": (one,), "val": (other, pair("val/c"))}, digests(one, other))) == (
        [("twice", other.image, f"train has the same content, {one.image}")], [],
    )  # fmt: skip


def test_one_folder_given_twice_and_links_are_the_same_files(pair, tmp_path):
    one, two = pair("train/a"), pair("train/b")
    linked = tmp_path / "val" / "c.png"
    linked.parent.mkdir()
    linked.symlink_to(two.image)
    link = Pair("c", str(linked), "other")
    errors, warnings = told(*in_two_splits({"train": (one, two), "val": (one, link)}, {}))
    same = "train has the same file"
    assert errors == [("twice", one.image, same), ("twice", link.image, f"{same}, {two.image}")]
    assert warnings == []


def test_one_label_for_two_photos_and_one_name_in_one_folder_are_the_same_picture(pair, tmp_path):
    one, two = pair("train/a"), pair("all/b")
    Image.fromarray(photo()).save(tmp_path / "all" / "b.jpg")
    labelled = pair("val/x", label=one.label)
    named = Pair("b", str(tmp_path / "all" / "b.jpg"), "other")
    errors, _ = told(*in_two_splits({"train": (one, two), "val": (labelled, named)}, {}))
    assert errors == [
        ("twice", labelled.image, f"train has the same label, {one.image}"),
        ("twice", named.image, f"train has the same name in its folder, {two.image}"),
    ]


def test_linked_labels_of_nothing_but_background_are_no_fault(pair, tmp_path):
    one, other = pair("train/a"), pair("val/b")
    Path(other.label).unlink()
    os.link(one.label, other.label)
    assert in_two_splits({"train": (one,), "val": (other,)}, digests(one, other)) == ([], [])


def test_names_that_begin_anew_in_each_folder_are_no_fault(pair):
    train, val = ([pair(f"{split}/{i}") for i in range(4)] for split in ("train", "val"))
    assert in_two_splits({"train": tuple(train), "val": tuple(val)}, digests(*train, *val)) == ([], [])


def test_a_name_that_two_splits_have_where_others_differ_is_a_warning(pair):
    train, val = ([pair(f"{split}/{split}{i}") for i in range(4)] for split in ("train", "val"))
    first, again = pair("train/0016E5_00390"), pair("val/0016E5_00390")
    splits = {"train": (*train, first), "val": (*val, again)}
    assert told(*in_two_splits(splits, digests(*splits["train"], *splits["val"]))) == (
        [], [("namesakes", again.image, f"train has {first.image}")],
    )  # fmt: skip


@settings(max_examples=30, deadline=None)
@given(st.lists(st.integers(0, 3), min_size=1, max_size=8), st.sampled_from([1, 4096, 9000]))
def test_files_have_equal_keys_where_their_bytes_are_equal(tmp_path_factory, kinds, size):
    folder = tmp_path_factory.mktemp("files")
    made = [bytes(size), bytes(size - 1) + b"x", b"x" + bytes(size - 1), b"longer" + bytes(size)]
    files = [folder / str(i) for i in range(len(kinds))]
    for file, kind in zip(files, kinds, strict=True):
        file.write_bytes(made[kind])
    keys = byte_keys([str(file) for file in files], threads=2)
    for a in files:
        for b in files:
            if a != b:
                equal = a.read_bytes() == b.read_bytes()
                assert (str(a) in keys and keys[str(a)] == keys.get(str(b))) == equal


def test_a_file_that_is_gone_is_like_no_other(tmp_path):
    (tmp_path / "a").write_bytes(b"")
    assert byte_keys([str(tmp_path / "a"), str(tmp_path / "b")], threads=1) == {}


def test_digests_are_remembered_while_files_are_as_they_were(pair, tmp_path, monkeypatch):
    monkeypatch.setenv("FASTSEG_DATA", str(tmp_path / "home"))
    one, other = pair("train/a"), pair("train/b")
    Remembered(tmp_path).keep({one.image: "1" * 16, other.image: "2" * 16})
    os.utime(other.image, ns=(0, 0))
    known = Remembered(tmp_path)
    assert [known.of(one.image), known.of(other.image), known.of("gone")] == ["1" * 16, "", ""]
    assert known.used == 1
    assert Remembered(tmp_path / "train").of(one.image) == ""  # another data set


@pytest.mark.parametrize("text", ["", "[]", "{", '{"PATH": 1}', '{"PATH": [1, 2, {}]}', "null", "\ud800"])
def test_what_cannot_be_digests_is_not_remembered(pair, tmp_path, monkeypatch, text):
    monkeypatch.setenv("FASTSEG_DATA", str(tmp_path / "home"))
    one = pair("train/a")
    Remembered(tmp_path).keep({one.image: "1" * 16})
    (file,) = (tmp_path / "home" / "digests").iterdir()
    file.write_bytes(text.replace("PATH", one.image).encode("utf-8", "surrogatepass"))
    assert Remembered(tmp_path).of(one.image) == ""


def test_a_home_that_cannot_be_written_to_is_no_fault(pair, tmp_path, monkeypatch):
    (tmp_path / "file").touch()
    monkeypatch.setenv("FASTSEG_DATA", str(tmp_path / "file"))
    one = pair("train/a")
    Remembered(tmp_path).keep({one.image: "1" * 16})
    assert Remembered(tmp_path).of(one.image) == ""


def test_a_run_counts_files_bytes_and_remembered_contents_that_it_trains_on(pair, tmp_path, monkeypatch):
    monkeypatch.setenv("FASTSEG_DATA", str(tmp_path / "home"))
    train = [pair(f"train/{i}") for i in range(3)]
    copied, saved, other = pair("val/a"), pair("val/b"), pair("val/c")
    shutil.copy(train[0].image, copied.image)
    Image.fromarray(decode_image(train[1].image)).save(saved.image, compress_level=0)
    found = contents(train, 1)
    val = [copied, saved, other, train[2]]
    assert validated_too(tmp_path, train, found, val, 2) == 2  # the copy, and the very file
    Remembered(tmp_path).keep(digests(*train, saved, other))
    assert validated_too(tmp_path, train, found, val, 2) == 3


def test_a_run_reads_no_file_of_a_size_that_it_does_not_train_on(pair, tmp_path, monkeypatch):
    train, val = [pair("train/a")], [pair("val/a", image=RNG.integers(0, 256, (20, 30, 3), np.uint8))]
    read = []
    monkeypatch.setattr(duplicates, "contents", lambda pairs, threads: read.extend(pairs) or [])
    assert validated_too(tmp_path, train, ["1" * 16], val, 1) == 0
    assert read == []
