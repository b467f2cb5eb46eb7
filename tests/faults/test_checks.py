"""Faults of a data set as a whole, which `fastseg data check` names before anything is trained on it."""

import shutil

import numpy as np
import pytest
from PIL import Image

TINY = ["--recipe", "fast", "--size", "32x48", "--epochs", "1", "--batch", "2", "--set", "model.depth=1"]


@pytest.fixture
def checked(call):
    """checked(kind, start, FOLDER, ...) is the one line of `data check` of this kind that has `start` in it."""

    def check(kind: str, start: str, *arguments: object) -> str:
        code, out, _ = call("data", "check", *arguments)
        (line,) = (line for line in out.splitlines() if line.startswith(f"{kind}: ") and start in line)
        assert code == (1 if "\nerror: " in f"\n{out}" else 0)
        return line

    return check


def photos(folder, split):
    return sorted((folder / split).iterdir())


def test_a_set_without_validation(copy_of, checked, call, row):
    folder, _ = copy_of("undivided")
    for name in ("val", "valannot"):
        shutil.rmtree(folder / name)
    (folder / "val.txt").unlink()
    says = checked("error", "to validate on", folder)
    assert says == (
        f"error: {folder}: has no images to validate on; `val = 0.2` in dataset.toml holds a fifth of the images out, "
        "or --split-scheme random:80-20"
    )
    assert call("data", "check", folder, "--split-scheme", "random:80-20")[0] == 0
    assert call("train", "--data", folder, *TINY)[0] == 1
    row("no images to validate on", says, "`val = 0.2` in dataset.toml, or `--split-scheme random:80-20`")


def test_a_picture_in_two_splits(copy_of, checked, call, row):
    folder, _ = copy_of("twice")
    shutil.copy(photos(folder, "train")[0], photos(folder, "val")[1])
    says = checked("error", "is in the split", folder)
    assert "is in the split val, and train has the same content, " in says
    start = call("train", "--data", folder, *TINY)[2]
    assert "; 1 of those to validate are trained on too, see `fastseg data check`" in start
    row("one photo to train and to validate", says, "take it out of one; a run says at its start how many it knows of")


def test_one_folder_for_two_splits(copy_of, checked, call, row):
    folder, _ = copy_of("folder")
    classes = "".join(f'[[classes]]\nname = "c{i}"\nindex = {i}\n' for i in range(12))
    side = 'images = "train"\nlabels = "trainannot"\n'
    (folder / "dataset.toml").write_text(f"[splits.train]\n{side}[splits.val]\n{side}{classes}", encoding="utf-8")
    says = checked("error", "in two splits", folder)
    assert says.startswith("error: 8 images are in two splits (train/Synth00_f00000.png: train has the same file; ")
    assert "; 8 of those to validate are trained on too" in call("train", "--data", folder, *TINY)[2]
    row("one folder given to two splits", says, "give each split files of its own")


def test_many_labels_off_the_map(copy_of, checked, row):
    folder, labels = copy_of("values")
    for path in labels:
        pixels = np.array(Image.open(path))
        pixels[2, 3:5] = 77
        Image.fromarray(pixels).save(path)
    says = checked("error", "labels have", folder)
    assert says == (
        "error: 8 labels have values outside the class map (trainannot/Synth00_f00000.png: value 77, 2 pixels; "
        "trainannot/Synth00_f00001.png: value 77, 2 pixels; trainannot/Synth01_f00000.png: value 77, 2 pixels; and 5 "
        "more): correct them, or --unknown-colours void to ignore such pixels"
    )
    assert ": 77 (16 pixels in 8 labels)" in checked("note", "the commonest first", folder)
    assert "8 labels have" in checked("note", "are ignored", folder, "--unknown-colours", "void")
    row("a value outside the class map in many labels", says, "`--json` names all of them")


def test_colour_masks_that_were_jpegs(call, checked, row, tmp_path):
    call("data", "synth", "kaggle", "--layout", "kaggle", "--train", 4, "--val", 2, "--size", "48x64")
    for path in (tmp_path / "kaggle" / "train_labels").iterdir():
        Image.open(path).save(tmp_path / "spoilt.jpg", quality=85)
        Image.open(tmp_path / "spoilt.jpg").save(path)
    says = checked("note", "the commonest first", "kaggle")
    assert "of these pixels are within 12 of a listed colour: the masks were resized or drawn with smoothing" in says
    guess = says[says.index("the masks were") :]
    row("colour masks that were resized with smoothing, or saved as JPEG", guess, "save them again from their source")


def test_frames_of_a_video_on_both_sides(copy_of, checked, row):
    folder, _ = copy_of("videos")
    says = checked("note", "both sides", folder, "--split-scheme", "random:50-50")
    assert says.count("to validate") <= 5
    about = says[says.index("if they are") :]
    row("frames of one video on both sides of a random split", about, "`--split-scheme video`, or `group`")


def test_a_class_that_no_validation_label_has(copy_of, checked, row):
    folder, _ = copy_of("unseen")
    for path in photos(folder, "valannot"):
        pixels = np.array(Image.open(path))
        pixels[pixels == 8] = 3  # cars become road
        Image.fromarray(pixels).save(path)
    says = checked("warning", "no image of val", folder)
    assert says == f"warning: {folder}: no image of val has Car: how well that is learnt is not measured"
    row("class absent from the validation labels", says, "divide the images otherwise, such as `--seed` of a draw")


def test_mixed_aspect_ratios(copy_of, checked, row):
    folder, labels = copy_of("mixed")
    for path in labels[:2]:
        for file in (path, folder / "train" / path.name):
            Image.open(file).transpose(Image.Transpose.ROTATE_90).save(file)
    says = checked("warning", "aspect ratio", folder)
    assert says.startswith(
        "warning: 2 images have another aspect ratio than the middle one (train/Synth00_f00000.png: "
    )
    row("photos of another aspect ratio among others", says, "letterbox, or crop them first")
