"""What counts as an image, what is nobody's data, and which names are splits."""

import os

import numpy as np
import pytest
from PIL import Image

from fastseg.data.layouts import find
from fastseg.data.pairs import IMAGE_SUFFIXES, split_of
from fastseg.errors import FastsegError

# What is no photo: documents and drawings, films, icons, measurements, and formats that Pillow has no decoder of.
NO_PHOTO = {"PDF", "EPS", "WMF", "FLI", "MPEG", "ICO", "ICNS", "CUR", "FITS", "BUFR", "GRIB", "HDF5"}


def test_images_are_what_pillow_registers_less_what_is_no_photo():
    registered = Image.registered_extensions()
    assert {suffix for suffix, kind in registered.items() if kind not in NO_PHOTO} == IMAGE_SUFFIXES
    assert {".webp", ".avif", ".jp2", ".ppm", ".gif"} < IMAGE_SUFFIXES


@pytest.fixture
def touch(tmp_path):
    """touch("train/a.png", ...): 1x1 PNG files below a folder, which it returns."""

    def write(*names):
        for name in names:
            path = tmp_path / name
            path.parent.mkdir(parents=True, exist_ok=True)
            Image.fromarray(np.zeros((1, 1), np.uint8)).save(path, "PNG")
        return tmp_path

    return write


COMPANIONS = [
    ".a.png",
    "._a.png",
    "Thumbs.db",
    ".DS_Store",
    ".ipynb_checkpoints/a.png",
    "__MACOSX/a.png",
    "desktop.ini",
]
TOML = '[[classes]]\nname = "a"\nindex = 0\n[splits.train]\n'


@pytest.mark.parametrize(
    ("images", "labels", "toml"),
    [
        ("train", "trainannot", None),
        ("images", "masks", 'images = "images"\nlabels = "masks"'),
        ("images", "masks", 'images = "images/*.png"\nlabels = "masks/*.png"'),
        ("images", "masks", 'images = "images/*"\nlabels = "masks/*"'),
        ("d/images", "d/masks", 'images = "{d}/images/**"\nlabels = "{d}/masks/**"'),
        ("d/images", "e/masks", 'images = "d/**/images/*"\nlabels = "e/**/masks/*"'),
    ],
)
def test_companions_are_nobodys_data(touch, images, labels, toml):
    root = touch(*(f"{side}/{name}" for side in (images, labels) for name in ["a.png", *COMPANIONS]))
    for folder in (".hidden", "__MACOSX"):
        touch(f"{folder}/train/a.png", f"{folder}/images/b.png", f"{folder}/masks/b.png")
    if toml:
        (root / "dataset.toml").write_text(TOML + toml, encoding="utf-8")
    data = find(root)
    assert [(pair.image, pair.label) for pair in data.pool] == [(f"{root}/{images}/a.png", f"{root}/{labels}/a.png")]
    assert data.problems == ()


@pytest.mark.parametrize("suffix", [".webp", ".gif", ".JPEG", ".avif", ".ppm", ".jp2"])
def test_every_layout_takes_whatever_pillow_reads(touch, suffix):
    root = touch("segnet/train/a.png", "segnet/trainannot/a.png", "original/701_StillsRaw_full/a.png")
    touch("original/LabeledApproved_full/a_L.png", "fastai/images/a.png", "fastai/labels/a_P.png")
    for name, text in (("codes.txt", "road\n"), ("valid.txt", "a.png\n")):
        (root / "fastai" / name).write_text(text)
    for layout, folder in (("segnet", "train"), ("original", "701_StillsRaw_full"), ("fastai", "images")):
        image = root / layout / folder / "a.png"
        os.rename(image, image.with_suffix(suffix))
        data = find(root / layout)
        assert [os.path.basename(pair.image) for pair in data.pool] == [f"a{suffix}"]
        assert data.problems == ()


@pytest.mark.parametrize(
    ("name", "split"),
    [("valid", "val"), ("Valid", "val"), ("Val", "val"), ("validation", "val"), ("Train", "train"), ("Test", "test")],
)
def test_split_folders_go_by_several_names(touch, name, split):
    assert split_of(name) == split
    parts = {"train": "train", split: name}
    root = touch(*(f"{part}{side}/{part}_1.png" for part in parts.values() for side in ("", "annot")))
    data = find(root)
    assert data.layout == "segnet"
    assert {found: [pair.stem for pair in pairs] for found, pairs in data.splits.items()} == {
        found: [f"{part}_1"] for found, part in parts.items()
    }


def test_a_label_folder_may_have_another_of_the_splits_names(touch):
    data = find(touch("train/a.png", "trainannot/a.png", "valid/b.png", "ValAnnot/b.png"))
    assert [pair.stem for pair in data.splits["val"]] == ["b"]


def test_two_folders_for_one_split_are_refused(touch):
    root = touch("train/a.png", "trainannot/a.png", "val/b.png", "valannot/b.png", "valid/c.png")
    with pytest.raises(FastsegError, match=f"^{root}: val and valid are both for `val`: keep one of them$"):
        find(root)


def test_what_is_no_split_keeps_its_name():
    assert [split_of(name) for name in ("extra", "trainval", "Value")] == ["extra", "trainval", "Value"]
