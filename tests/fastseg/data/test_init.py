import json
import re
import subprocess
import sys
import tomllib
from pathlib import Path

import made_folders as made
import numpy as np
import pytest
from PIL import Image, ImageFilter

from fastseg.data import init as module
from fastseg.data.folders import affixes, by_words, left_of
from fastseg.data.init import guess
from fastseg.data.layouts import find
from fastseg.data.names import find_names

# Of 32 x 48 pixels: a box of 16 x 20 less the 4 x 4 that lie under the other, and one of 14 x 24.
SHARES = {1: (16 * 20 - 4 * 4) / (32 * 48), 2: 14 * 24 / (32 * 48)}


def pairs_of(root, images, masks, ending=".png"):
    """Six photos and masks of these folders; `masks` is called with a number."""
    for seed in range(6):
        made.save(root, f"{images}/{seed}.jpg", made.photo(seed))
        made.save(root, f"masks/{seed}{ending}", masks(seed))
    return root


@pytest.mark.parametrize("make", made.FOLDERS, ids=lambda make: make.__name__)
def test_the_guess_is_what_a_person_would_write(make, tmp_path):
    expected = make(tmp_path)
    found = module.init(tmp_path, tmp_path / "dataset.toml", 2)
    assert tomllib.loads((tmp_path / "dataset.toml").read_text("utf-8")) == expected
    data = find(tmp_path)
    assert data.problems == ()
    assert len(data.pool) == found.masks == sum(split.count for split in found.splits.values())
    assert list(data.splits) == list(expected["splits"])
    assert data.classes.names == tuple(entry["name"] for entry in expected["classes"])


def test_shares_are_counted(tmp_path):
    made.with_void(tmp_path)
    found = guess(tmp_path, tmp_path, 2)
    shares = [row.share for row in (*found.classes, *found.void)]
    assert shares == pytest.approx([1 - SHARES[1] - SHARES[2] - 4 / 1536, SHARES[1], SHARES[2], 4 / 1536])
    assert [row.images for row in (*found.classes, *found.void)] == [7] * 4
    assert found.counted == found.masks == 7


def test_of_many_masks_some_are_counted_and_it_is_said(call, tmp_path, monkeypatch):
    monkeypatch.setattr(module, "COUNTED", 3)
    root = pairs_of(tmp_path / "own", "images", lambda seed: np.full((32, 48), seed, np.uint8))
    code, out, _ = call("data", "init", root)
    assert code == 0
    assert "counted 3 of 6 masks" in out
    # Evenly, from the first to the last.
    assert [c["index"] for c in tomllib.loads((root / "dataset.toml").read_text("utf-8"))["classes"]] == [0, 2, 5]
    assert "from 3 of 6 masks" in (root / "dataset.toml").read_text("utf-8")


def test_a_table_and_three_commands_are_printed(call, tmp_path):
    root = tmp_path / "my data"
    made.rgba(root)
    code, out, err = call("data", "init", root)
    assert (code, err) == (0, "")
    lines = out.splitlines()
    table = [line.split() for line in lines]
    assert ["road", "0", "255", "0", "21.88%", "6"] in table
    assert ["car", "255", "0", "0", "19.79%", "6"] in table
    assert "note: masks have an alpha channel, which is dropped; colours are counted as they are stored" in lines
    assert f"names are those of {root}/labelmap.txt" in lines
    assert lines[-3:] == [
        f"  fastseg data check '{root}'",
        f"  fastseg data preview '{root}' --out preview.png",
        f"  fastseg train --data '{root}' --recipe fast --run runs/first",
    ]


def test_the_documentation_shows_what_is_printed(call, tmp_path):
    made.rgba(tmp_path / "field")
    out = re.sub(r"(?<![\w/])field", "/data/field", call("data", "init", "field")[1])
    page = Path(__file__).parents[3] / "docs" / "dataset.md"
    assert f"```text\n{out}```" in page.read_text("utf-8")


def test_the_documentations_pictures_are_those_that_its_script_draws(tmp_path):
    images = Path(__file__).parents[3] / "docs" / "images"
    subprocess.run([sys.executable, images / "draw.py", tmp_path], check=True)
    for name in ("masks.png", "polygons.png"):
        with Image.open(images / name) as kept, Image.open(tmp_path / name) as drawn:
            np.testing.assert_array_equal(np.array(kept), np.array(drawn))


def test_json_is_one_document(call, tmp_path):
    made.with_void(tmp_path / "own")
    code, out, _ = call("data", "init", tmp_path / "own", "--json")
    document = json.loads(out)
    assert code == 0
    assert document["splits"]["val"] == {"images": "val/img/*.png", "labels": "val/ann/*.png", "pairs": 2}
    assert [row["values"] for row in document["classes"]] == [[0], [1], [2]]
    assert [row["values"] for row in document["void"]] == [[255]]
    assert document["file"] == f"{tmp_path}/own/dataset.toml"


def test_a_file_that_is_there_stays_unless_forced(call, tmp_path):
    made.no_split(tmp_path / "own")
    file = tmp_path / "own" / "dataset.toml"
    file.write_text("mine")
    code, _, err = call("data", "init", tmp_path / "own")
    assert (code, err) == (2, f"fastseg: {file} exists: --force writes it anew, --out FILE writes another\n")
    assert file.read_text() == "mine"
    assert call("data", "init", tmp_path / "own", "--force")[0] == 0
    assert "[splits.train]" in file.read_text()


def test_a_file_elsewhere_tells_paths_from_where_it_is(call, tmp_path):
    made.no_split(tmp_path / "own")
    file = tmp_path / "descriptions" / "own.toml"
    code, out, _ = call("data", "init", tmp_path / "own", "--out", file)
    assert code == 0
    assert f"fastseg data check {file}" in out
    assert tomllib.loads(file.read_text())["splits"]["train"]["labels"] == "../own/masks/*.png"
    assert len(find(file).pool) == 8


def test_a_folder_with_a_layout_needs_no_file(call, street):
    code, out, _ = call("data", "init", street)
    assert code == 0
    assert f"{street}: has the layout segnet, with 12 pairs and the classes Sky, Building" in out
    assert "no file is needed" in out
    assert not (street / "dataset.toml").exists()


def test_a_layouts_folders_with_other_values_get_a_file(call, tmp_path):
    for split in ("train", "val"):
        for seed in range(3):
            made.save(tmp_path / "own", f"{split}/{seed}.png", made.photo(seed))
            made.save(tmp_path / "own", f"{split}annot/{seed}.png", made.indices() * 40)
    code, _, _ = call("data", "init", tmp_path / "own")
    assert code == 0
    assert find(tmp_path / "own").classes.from_index == {0: 0, 40: 1, 80: 2}


def test_names_like_frames_get_a_group_to_switch_on(tmp_path):
    made.no_split(tmp_path)
    file = tmp_path / "dataset.toml"
    module.init(tmp_path, file, 2)
    assert '\n# group = "{group}_*"\n' in file.read_text()
    file.write_text(file.read_text().replace('# group = "', 'group = "'))
    assert set(find(tmp_path).groups.values()) == {"east", "west"}


def test_folders_of_sequences_are_groups(tmp_path):
    for sequence in ("a", "b", "c"):
        for frame in range(3):
            made.save(tmp_path, f"{sequence}/rgb/{frame:03}.png", made.photo(frame))
            made.save(tmp_path, f"{sequence}/seg/{frame:03}.png", made.indices())
    file = tmp_path / "dataset.toml"
    module.init(tmp_path, file, 2)
    sides = {"images": "{folder}/rgb/{id}.png", "labels": "{folder}/seg/{id}.png"}
    assert tomllib.loads(file.read_text())["splits"] == {"train": sides}
    file.write_text(file.read_text().replace("# group", "group"))
    data = find(tmp_path)
    assert len(data.pool) == 9
    assert set(data.groups.values()) == {"a", "b", "c"}


def test_folders_that_no_word_names_are_told_apart_by_what_they_hold(tmp_path):
    for seed in range(4):
        made.save(tmp_path, f"feld/{seed}.png", made.indices())
        made.save(tmp_path, f"wald/{seed}.png", made.photo(seed))
    split = guess(tmp_path, tmp_path, 2).splits["train"]
    assert (split.images, split.labels) == ("wald/*.png", "feld/*.png")


def test_grey_photos_are_told_from_masks(tmp_path):
    for seed in range(4):
        made.save(tmp_path, f"a/{seed}.png", made.photo(seed).convert("L"))
        made.save(tmp_path, f"b/{seed}.png", made.indices())
    assert guess(tmp_path, tmp_path, 2).splits["train"].labels == "b/*.png"


def test_images_of_several_kinds_of_files_are_a_folder(tmp_path):
    for seed in range(4):
        made.save(tmp_path, f"images/{seed}.{'png' if seed % 2 else 'jpg'}", made.photo(seed))
        made.save(tmp_path, f"masks/{seed}_mask.png", made.indices())
    module.init(tmp_path, tmp_path / "dataset.toml", 2)
    sides = tomllib.loads((tmp_path / "dataset.toml").read_text())["splits"]["train"]
    assert sides == {"images": "images", "labels": "masks/*_mask.png"}
    assert len(find(tmp_path).pool) == 4


def test_hidden_files_and_notebooks_leftovers_are_nobodys(tmp_path):
    pairs_of(tmp_path, "images", lambda seed: made.indices())
    made.save(tmp_path, "images/.ipynb_checkpoints/0-checkpoint.png", made.photo(0))
    (tmp_path / "images" / "._0.jpg").write_bytes(b"")
    found = guess(tmp_path, tmp_path, 2)
    assert (found.masks, found.notes) == (6, [])


def test_values_of_16_bits_that_fit_a_byte_are_values(tmp_path):
    pairs_of(tmp_path, "images", lambda seed: made.indices().astype(np.uint16))
    assert [row.values for row in guess(tmp_path, tmp_path, 2).classes] == [[0], [1], [2]]


def test_palettes_that_differ_are_read_by_colour(tmp_path):
    def mask(seed):  # as a program does that sorts colours anew for each picture
        colors = [(0, 0, 0), made.RED, made.GREEN]
        turn = seed % 3
        picture = Image.fromarray((made.indices() + turn) % 3)
        picture.putpalette([part for color in colors[-turn:] + colors[:-turn] for part in color])
        return picture

    pairs_of(tmp_path, "images", mask)
    found = guess(tmp_path, tmp_path, 2)
    assert [row.values for row in found.classes] == [[(0, 0, 0)], [made.GREEN], [made.RED]]
    assert [row.share for row in found.classes[1:]] == pytest.approx([SHARES[2], SHARES[1]])
    assert found.notes[0].startswith("the palettes of the masks differ")


def test_a_palette_translates_names_of_colours(tmp_path):
    def mask(seed):
        picture = Image.fromarray(made.indices())
        picture.putpalette([0, 0, 0, *made.RED, *made.GREEN])
        return picture

    pairs_of(tmp_path, "images", mask)
    (tmp_path / "class_dict.csv").write_text("name,r,g,b\nroad,0,255,0\ncar,255,0,0\nnothing,0,0,0\n")
    found = guess(tmp_path, tmp_path, 2)
    assert {row.name: row.values for row in found.classes} == {"nothing": [0], "car": [1], "road": [2]}
    assert found.classes[0].name == "nothing"  # 0 first


def test_blurred_masks_are_said_to_be(tmp_path):
    for seed in range(6):  # of 240x360: edges are few pixels
        made.save(tmp_path, f"images/{seed}.jpg", made.photo(seed).resize((360, 240)))
        large = Image.fromarray(made.colored((0, 0, 0), (240, 30, 10), (20, 220, 130))).resize((360, 240), 0)
        made.save(tmp_path, f"masks/{seed}.png", large.filter(ImageFilter.GaussianBlur(1)))
    found = guess(tmp_path, tmp_path, 2)
    assert [row.values[0] for row in found.classes[:3]] == [(0, 0, 0), (20, 220, 130), (240, 30, 10)]
    assert any("are not listed, since blurred edges look so" in note for note in found.notes)


REFUSED = {
    "JPEG masks": (
        lambda root: pairs_of(root, "images", lambda seed: made.indices() * 100, ".jpg"),
        1,
        "masks/0.jpg: is a JPEG, which need not keep values as they are (it holds ",
    ),
    "objects": (
        lambda root: pairs_of(root, "images", lambda seed: made.indices().astype(np.uint16) * 1000),
        1,
        "masks/0.png: holds the value 2000, and a class is a value 0 to 255",
    ),
    "nothing": (lambda root: root.mkdir(), 2, "no pictures here"),
    "photos alone": (
        lambda root: made.save(root, "images/0.png", made.photo(0)),
        2,
        "no images with masks found: looked for two kinds of the same names",
    ),
    "polygons": (made.labelme, 2, "annotations in .json or .xml become masks by `fastseg data rasterise"),
    "broken masks": (
        lambda root: [p.write_bytes(b"") for p in pairs_of(root, "images", lambda s: made.indices()).glob("masks/*")],
        2,
        "no images with masks found",
    ),
    "broken names": (
        lambda root: (made.rgba(root), (root / "labelmap.txt").write_text("road;1;2;3\n")),
        1,
        "labelmap.txt: expected lines `name:r,g,b:parts:actions`; correct it, or move it away",
    ),
    "a star in a name": (
        lambda root: (
            made.save(root, "a*b/img/0.png", made.photo(0)),
            made.save(root, "a*b/ann/0.png", made.indices()),
        ),
        2,
        "a pattern cannot have * { } in a folder's name: rename it",
    ),
}  # fmt: skip


@pytest.mark.parametrize("what", REFUSED)
def test_what_cannot_be_guessed_is_one_line_with_a_cure(call, tmp_path, what):
    make, wanted, message = REFUSED[what]
    make(tmp_path / "own")
    code, out, err = call("data", "init", tmp_path / "own")
    assert (code, out, err.count("\n")) == (wanted, "", 1)
    assert message in err
    assert f"{tmp_path}/own" in err
    assert not (tmp_path / "own" / "dataset.toml").exists()


def test_a_mask_that_cannot_be_read_is_left_to_the_check(tmp_path):
    pairs_of(tmp_path, "images", lambda seed: made.indices())
    (tmp_path / "masks" / "3.png").write_bytes(b"")
    half = (tmp_path / "masks" / "4.png").read_bytes()
    (tmp_path / "masks" / "4.png").write_bytes(half[: len(half) // 2])
    found = guess(tmp_path, tmp_path, 2)
    assert found.counted == 4
    assert "masks that cannot be read: 2; `fastseg data check` names them" in found.notes


@pytest.mark.parametrize(
    ("file", "text", "rows"),
    [
        ("labelmap.txt", "# label:color_rgb\ncar:1,2,3::\na b:4,5,6:p,q:r\n", [("car", (1, 2, 3)), ("a b", (4, 5, 6))]),
        ("class_dict.csv", "\ufeffname, r, g, b\ncar, 1, 2, 3\n", [("car", (1, 2, 3))]),
        ("_classes.csv", "Pixel Value, Class\n0, background\n7, car\n", [("background", 0), ("car", 7)]),
        # labelme2voc.py: the first line of its labels.txt has -1, which a byte stores as 255; its export begins with 0.
        ("class_names.txt", "__ignore__\n_background_\ncar\n", [("_background_", 0), ("car", 1), ("__ignore__", 255)]),
        ("class_names.txt", "_background_\ncar", [("_background_", 0), ("car", 1)]),
        ("classes.txt", "car\n\nroad\n", [("car", 0), ("road", 1)]),
    ],
)  # fmt: skip
def test_names_are_read_as_tools_write_them(tmp_path, file, text, rows):
    (tmp_path / file).write_text(text, encoding="utf-8")
    assert list(find_names([tmp_path]).rows) == rows


@pytest.mark.parametrize(
    ("stem", "parts"),
    [
        ("a", ("", "a", "")),
        ("a_mask", ("", "a", "_mask")),
        ("0016E5_07959_L", ("", "0016E5_07959", "_L")),
        ("mask_12", ("mask_", "12", "")),
        ("img12", ("img", "12", "")),
        ("ulm_0_gtFine_labelIds", ("", "ulm_0", "_gtFine_labelIds")),
        ("a.jpg", ("", "a", ".jpg")),
        ("mask", ("", "mask", "")),
        ("L", ("", "L", "")),
    ],
)
def test_a_names_words_are_taken_away(stem, parts):
    assert affixes(stem) == parts
    assert "".join(parts) == stem


@pytest.mark.parametrize(
    ("folders", "left"),
    [
        (("images",), ()),
        (("JPEGImages", "train"), ("train",)),
        (("train_masks",), ("train",)),
        (("trainannot",), ("train",)),
        (("gtFine", "val", "ulm"), ("val", "ulm")),
        (("my photos",), ("my",)),
    ],
)
def test_a_folders_words_are_taken_away(folders, left):
    assert left_of(by_words(folders)) == left
