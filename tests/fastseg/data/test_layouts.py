import os
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from fastseg.data.classes import CAMVID_32, VOID
from fastseg.data.layouts import Pair, Problem, find
from fastseg.errors import FastsegError, UsageError

CLASS_DICT = "name,r,g,b\n" + "".join(f"{n},{r},{g},{b}\n" for n, ((r, g, b), _) in CAMVID_32.items())


@pytest.fixture
def make(tmp_path):
    """make("train/a.png", ..., {"train.txt": text}): 1x1 images and text files in a folder, which it returns."""

    def write(*names, texts=None):
        for name in names:
            path = tmp_path / name
            path.parent.mkdir(parents=True, exist_ok=True)
            Image.fromarray(np.zeros((1, 1), np.uint8)).save(path)
        for name, text in (texts or {}).items():
            (tmp_path / name).write_text(text, encoding="utf-8")
        return tmp_path

    return write


def stems(pairs):
    return [pair.stem for pair in pairs]


def segnet(*names, val=()):
    both = [(split, name) for split, group in (("train", names), ("val", val)) for name in group]
    return [f"{split}{side}/{name}.png" for split, name in both for side in ("", "annot")]


def test_segnet_pairs_by_name_in_the_order_of_the_stems(make):
    root = make(*segnet("b_2", "a_10", "a_9", val=("c_1",)))
    data = find(root)
    assert data.layout == "segnet"
    assert stems(data.splits["train"]) == ["a_10", "a_9", "b_2"]
    assert data.splits["train"][0] == Pair("a_10", f"{root}/train/a_10.png", f"{root}/trainannot/a_10.png")
    assert stems(data.splits["val"]) == ["c_1"]
    assert stems(data.pool) == ["a_10", "a_9", "b_2", "c_1"]
    assert data.splits.keys() == {"train", "val"}
    assert data.classes.from_index[11] == VOID
    assert data.problems == ()


@pytest.mark.parametrize(
    "lines",
    [
        "/SegNet/CamVid/train/a.png /SegNet/CamVid/trainannot/a.png\n/gone/c.png /gone/x/c.png\n",
        "C:\\data\\a.png C:\\data\\l\\a.png\r\n\r\nc.png\r\n",
        "a\nc",
    ],
)
def test_list_files_choose_by_name_whatever_folder_they_claim(make, lines):
    data = find(make(*segnet("a", "b", "c"), texts={"train.txt": lines}))
    assert stems(data.splits["train"]) == ["a", "c"]
    assert data.problems == ()


def test_a_listed_name_without_files_is_a_problem_of_the_list(make):
    root = make(*segnet("a"), texts={"train.txt": "a.png\nghost.png\n"})
    data = find(root)
    assert stems(data.splits["train"]) == ["a"]
    assert data.problems == (
        Problem(f"{root}/train.txt", "names ghost.png, which has no image and label here", "listed"),
    )


def test_orphans_are_reported_by_name_and_left_out(make):
    root = make(*segnet("a", "b"), "train/only_image.png", "trainannot/only_label.png")
    data = find(root)
    assert stems(data.pool) == ["a", "b"]
    assert set(data.problems) == {
        Problem(f"{root}/train/only_image.png", "no label of that name"),
        Problem(f"{root}/trainannot/only_label.png", "no image of that name"),
    }


def test_a_split_without_its_label_folder_is_an_error(make):
    root = make(*segnet("a"), "val/b.png")
    with pytest.raises(FastsegError, match=f"^{root}/val has no label folder: expected {root}/valannot$"):
        find(root)


def test_original_pairs_by_the_suffix_and_has_no_split_of_its_own(make):
    names = ["0016E5_07959", "0001TP_006690"]
    root = make(*(f"701_StillsRaw_full/{n}.png" for n in names), *(f"LabeledApproved_full/{n}_L.png" for n in names))
    data = find(root)
    assert data.layout == "original"
    assert stems(data.pool) == ["0001TP_006690", "0016E5_07959"]
    assert data.pool[0].label == f"{root}/LabeledApproved_full/0001TP_006690_L.png"
    assert data.splits == {}
    assert data.classes.from_color[(0, 128, 192)] == 10
    # A list file beside the folders makes splits.
    (root / "val.txt").write_text("0016E5_07959.png\n", encoding="utf-8")
    assert {split: stems(pairs) for split, pairs in find(root).splits.items()} == {"val": ["0016E5_07959"]}


def test_kaggle_reads_its_class_file_and_three_splits(make):
    parts = [f"{s}{side}" for s in ("train", "val", "test") for side in (f"/{s}_1.png", f"_labels/{s}_1_L.png")]
    root = make(*parts, texts={"class_dict.csv": CLASS_DICT})
    data = find(root)
    assert data.layout == "kaggle"
    assert {split: stems(pairs) for split, pairs in data.splits.items()} == {
        s: [f"{s}_1"] for s in ("train", "val", "test")
    }
    assert len(data.classes.names) == 11
    assert data.classes.from_color[(192, 0, 192)] == 10
    assert data.classes.from_color[(0, 0, 0)] == VOID


def test_kaggles_other_classes_stand_each_for_itself(make):
    texts = {"class_dict.csv": "\ufeffname,r,g,b\nroad,128,64,128\nvoid,0,0,0\nlake, 1, 2, 3\n"}
    classes = find(make("train/a.png", "train_labels/a_L.png", texts=texts)).classes
    assert classes.names == ("road", "lake")
    assert classes.colors == ((128, 64, 128), (1, 2, 3))
    assert classes.from_color == {(128, 64, 128): 0, (0, 0, 0): VOID, (1, 2, 3): 1}


@pytest.mark.parametrize(
    "text", ["name,r,g\nroad,1,2\n", "road,1,2,3\nsky,4,5,6\n", "name,r,g,b\nroad,1,2,x\n", "name,r,g,b\nroad,1\n"]
)
def test_a_broken_class_file_is_named_in_one_line(make, text):
    root = make("train/a.png", "train_labels/a_L.png", texts={"class_dict.csv": text})
    with pytest.raises(FastsegError, match=f"^{root}/class_dict.csv: expected the columns name,r,g,b") as error:
        find(root)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize("text", ["", "road,1,2,3\n"])
def test_a_class_file_without_rows_is_no_class_map(make, text):
    """It must not pass for CamVid's, of which it names no colour."""
    root = make("train/a.png", "train_labels/a_L.png", texts={"class_dict.csv": text})
    with pytest.raises(FastsegError, match=f"^{root}/class_dict.csv"):
        find(root)


def test_an_empty_codes_file_is_no_class_map(make):
    root = make("images/a.png", "labels/a_P.png", texts={"codes.txt": "\n", "valid.txt": "a.png\n"})
    with pytest.raises(FastsegError, match=f"^{root}/codes.txt: expected a class name on each line"):
        find(root)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("name,r,g,b\nroad,300,0,0\n", r"road has the colour \(300, 0, 0\): three numbers 0..255"),
        ("name,r,g,b\nroad,-1,0,0\n", r"road has the colour \(-1, 0, 0\): three numbers 0..255"),
        ("name,r,g,b\nroad,1,2,3\nlake,1,2,3\n", r"road and lake have the same colour \(1, 2, 3\)"),
        ("name,r,g,b\nroad,1,2,3\nroad,4,5,6\n", "class names must differ"),
        ("name,r,g,b\nvoid,0,0,0\n", "0 classes"),
        ('name,r,g,b\n"ro\nad",1,2,3\n', r"the class name 'ro\\nad' has control characters"),
        ("name,r,g,b\n" + "x" * 140_000 + ",1,2,3\n", "expected the columns name,r,g,b"),
    ],
)
def test_a_class_file_that_is_no_class_map_is_named_in_one_line(make, text, message):
    root = make("train/a.png", "train_labels/a_L.png", texts={"class_dict.csv": text})
    with pytest.raises(FastsegError, match=f"^{root}/class_dict.csv: {message}") as error:
        find(root)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize(
    ("codes", "message"),
    [
        ("Void\n" * 257, "expected a class name on each line, of 1 to 256; it has 257"),
        ("road\nroad\n", "class names must differ: road, road"),
        ("".join(f"c{i}\n" for i in range(254)), "254 classes: a label byte holds 1 to 253"),
    ],
)
def test_codes_that_no_label_byte_holds_are_named(make, codes, message):
    root = make("images/a.png", "labels/a_P.png", texts={"codes.txt": codes, "valid.txt": "a.png\n"})
    with pytest.raises(FastsegError, match=f"^{root}/codes.txt: {message}"):
        find(root)


@pytest.mark.parametrize("codes", [list(CAMVID_32), ["void", "road", "lake"]])
def test_fastai_takes_valid_txt_for_its_validation_and_codes_for_its_values(make, codes):
    names = ["a_1", "a_2", "b_1"]
    texts = {"codes.txt": "\n".join(codes) + "\n", "valid.txt": "a_2.png\n"}
    data = find(make(*(f"images/{n}.png" for n in names), *(f"labels/{n}_P.png" for n in names), texts=texts))
    assert data.layout == "fastai"
    assert {split: stems(pairs) for split, pairs in data.splits.items()} == {"train": ["a_1", "b_1"], "val": ["a_2"]}
    if len(codes) == 3:
        assert data.classes.names == ("road", "lake")
        assert data.classes.from_index == {0: VOID, 1: 0, 2: 1}
    else:
        assert data.classes.from_index[codes.index("Void")] == VOID
        assert data.classes.from_index[codes.index("Truck_Bus")] == 8


def test_suffixes_and_other_files_do_not_confuse_pairing(make):
    root = make("train/a.PNG", "train/b.jpg", "trainannot/a.png", "trainannot/b.png", texts={"train/notes.md": "x"})
    data = find(root)
    assert stems(data.pool) == ["a", "b"]
    assert data.problems == ()


INIT = "To have a dataset.toml written: fastseg data init"


def test_an_unrecognised_folder_names_what_was_looked_for_and_found(make):
    root = make("pictures/a.png", "masks/a.png", texts={"readme.txt": "x"})
    with pytest.raises(UsageError) as error:
        find(root)
    text = str(error.value)
    assert text.startswith(f"{root}: no layout fits.")
    wanted = ["701_StillsRaw_full", "LabeledApproved_full", "codes.txt", "train_labels", "class_dict.csv", "trainannot"]
    assert [name for name in [*wanted, "dataset.toml"] if name not in text] == []
    assert text.endswith(f"Found masks/, pictures/, readme.txt. {INIT} {root}")


def test_an_empty_folder_a_missing_one_and_a_full_one_are_told_apart(make, tmp_path):
    (tmp_path / "empty").mkdir()
    with pytest.raises(UsageError, match=rf"Found nothing\. {INIT} {tmp_path}/empty$"):
        find(tmp_path / "empty")
    with pytest.raises(UsageError, match=f"^{tmp_path}/gone: no folder; give a data set's folder"):
        find(tmp_path / "gone")
    make(*(f"full/{i}.png" for i in range(10)))
    with pytest.raises(UsageError, match=r"Found 0.png, 1.png, .*7.png and more\. "):
        find(tmp_path / "full")


SPLIT = '[splits.train]\nimages = "in/*.png"\nlabels = "out/*_gt.png"\n'
INDEXED = """void = [0, 255]
[[classes]]
name = "road"
index = [1, 7]
[[classes]]
name = "lake"
index = 2
"""
COLORED = """void = [0, 0, 0]
[[classes]]
name = "road"
color = [128, 64, 128]
[[classes]]
name = "lake"
color = [[1, 2, 3], [4, 5, 6]]
"""


def described(make, head, tail=SPLIT):
    return make("in/a.png", "in/b.png", "out/b_gt.png", "out/a_gt.png", texts={"dataset.toml": head + tail})


@pytest.mark.parametrize("by_file", [True, False])
def test_a_toml_file_describes_any_other_folder(make, by_file):
    root = described(make, INDEXED)
    data = find(root / "dataset.toml" if by_file else root)
    assert data.layout == "toml"
    assert data.root == root
    pairs = [Pair(n, f"{root}/in/{n}.png", f"{root}/out/{n}_gt.png") for n in "ab"]
    assert [*data.splits["train"]] == [*data.pool] == pairs
    assert data.classes.names == ("road", "lake")
    assert data.classes.from_index == {0: VOID, 255: VOID, 1: 0, 7: 0, 2: 1}
    assert data.problems == ()


def test_a_toml_file_may_name_colours(make):
    classes = find(described(make, COLORED)).classes
    assert classes.from_color == {(0, 0, 0): VOID, (128, 64, 128): 0, (1, 2, 3): 1, (4, 5, 6): 1}
    assert classes.colors == ((128, 64, 128), (1, 2, 3))


def test_a_toml_file_may_name_plain_folders_and_reports_orphans(make):
    root = make("in/a.png", "in/b.png", "out/a.png")
    (root / "d.toml").write_text(INDEXED + '[splits.val]\nimages = "in"\nlabels = "out"\n', encoding="utf-8")
    data = find(root / "d.toml")
    assert stems(data.splits["val"]) == ["a"]
    assert data.problems == (Problem(f"{root}/in/b.png", "no label of that name"),)


ONE = '[[classes]]\nname = "a"\n'


@pytest.mark.parametrize(
    ("head", "tail", "message"),
    [
        ("void = [", "", "not valid TOML"),
        (INDEXED, "", r"wants \[splits.train\]"),
        ("", SPLIT, r"wants \[splits.train\].*\[\[classes\]\]"),
        (INDEXED, SPLIT + "[extra]\n", "wants"),
        (INDEXED, '[splits.train]\nimages = "in"\n', "splits.train wants exactly `images` and `labels`"),
        (
            INDEXED,
            SPLIT.replace("in/*", "in/*_*"),
            r"splits.train: images has \*, \* and labels has \*: both must have",
        ),
        (
            INDEXED,
            SPLIT.replace("in/*", "**/*"),
            r"splits.train: images has \*\*, \* and labels has \*: both must have",
        ),
        (INDEXED, SPLIT.replace("in/*", "in/{a}"), r"splits.train: images has \{a\} and labels has \*: both must have"),
        (INDEXED, SPLIT.replace("in/*", "in**/*"), r"splits.train.images = 'in\*\*/\*.png': `\*\*` stands for folders"),
        (
            INDEXED,
            SPLIT.replace("in/*", "**/a/**/*"),
            r"splits.train.images = .*: `\*\*` stands for folders: write it once",
        ),
        (
            INDEXED,
            SPLIT.replace("in/*", "*a" * 5),
            r"splits.train.images = .*: has more than 4 of `\*` and \{name\} in a na",
        ),
        (INDEXED, SPLIT.replace("out/*_gt", "in/*"), r"splits.train: .*/in/a.png matches images and labels: write out"),
        (INDEXED, SPLIT.replace("in/*.png", "gone"), "splits.train.images: no folder .*gone"),
        (ONE + "index = 3\n[[classes]]\nname = 'b'\nindex = 3\n", SPLIT, "index 3 belongs to two classes"),
        (ONE + "color = [1, 2, 3]\n[[classes]]\nname = 'b'\nindex = 3\n", SPLIT, "cannot be mixed"),
        (ONE, SPLIT, r"classes\[0\] wants `name` and one of `index` and `color`"),
        (ONE + "index = 1\ncolor = [1, 2, 3]\n", SPLIT, r"classes\[0\] wants `name` and one of"),
        ("[[classes]]\nindex = 1\n", SPLIT, r"classes\[0\] wants `name`"),
        (ONE + "index = 256\n", SPLIT, r"classes\[0\].index = 256: wants a number 0..255"),
        (ONE + "index = true\n", SPLIT, r"classes\[0\].index = True: wants a number"),
        (ONE + "color = [1, 2]\n", SPLIT, r"classes\[0\].color = \[1, 2\]: wants a colour"),
        ("void = -1\n" + ONE + "index = 1\n", SPLIT, "void = -1: wants a number"),
    ],
)
def test_a_fault_in_a_toml_file_is_one_line_that_names_it(make, head, tail, message):
    root = described(make, head, tail)
    with pytest.raises(FastsegError, match=f"^{root}/dataset.toml: .*{message}") as error:
        find(root)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize(
    "text",
    [
        pytest.param("void = [1]\n" + ONE + "index = 1\n" + SPLIT, id="void-and-class"),
        pytest.param("splits = 3\n" + ONE + "index = 1\n", id="splits-number"),
        pytest.param(ONE + 'index = 1\n[splits]\ntrain = "in"\n', id="split-string"),
        pytest.param(ONE + "index = 1\n[splits.train]\nimages = 1\nlabels = 2\n", id="folder-number"),
        pytest.param("classes = 3\n" + SPLIT, id="classes-number"),
        pytest.param("classes = [3]\n" + SPLIT, id="class-number"),
        pytest.param("[[classes]]\nname = 3\nindex = 1\n" + SPLIT, id="name-number"),
        pytest.param("classes = []\n" + SPLIT, id="no-classes"),
    ],
)
def test_a_toml_file_of_wrong_types_is_refused_not_misread(make, text):
    with pytest.raises(FastsegError) as error:
        find(described(make, text, ""))
    assert "\n" not in str(error.value)


# Files that are not what their names say


def test_two_images_of_one_stem_are_a_problem_and_neither_is_used(make):
    root = make(*segnet("a", "b"), "train/a.jpg", "train/a.PNG")
    data = find(root)
    assert stems(data.pool) == ["b"]
    fault = "stands for the same sample as a.jpg, a.png beside it: keep one of them"
    assert data.problems == (Problem(f"{root}/train/a.PNG", fault),)


def test_two_labels_of_one_key_are_a_problem_and_neither_is_used(make):
    root = make(
        *("701_StillsRaw_full/a.png", "701_StillsRaw_full/b.png"),
        *("LabeledApproved_full/a.png", "LabeledApproved_full/a_L.png", "LabeledApproved_full/b_L.png"),
    )
    data = find(root)
    assert stems(data.pool) == ["b"]
    fault = "stands for the same sample as a_L.png beside it: keep one of them"
    assert data.problems == (Problem(f"{root}/LabeledApproved_full/a.png", fault),)


def test_a_toml_folder_with_one_stem_twice_is_a_problem_too(make):
    root = make("in/a.png", "in/a.jpg", "in/b.png", "out/a_gt.png", "out/b_gt.png")
    (root / "dataset.toml").write_text(INDEXED + SPLIT.replace("in/*.png", "in"), encoding="utf-8")
    data = find(root)
    assert stems(data.pool) == ["b"]
    assert data.problems == (
        Problem(f"{root}/in/a.jpg", "stands for the same sample as a.png beside it: keep one of them"),
    )


@pytest.mark.parametrize("pattern", ["in/*[12].png", "in/*?.png"])
def test_what_other_globs_know_stands_for_itself_and_a_pattern_without_files_is_said(make, pattern):
    root = make("in/a1.png", "in/a2.png", "out/_gt.png")
    (root / "dataset.toml").write_text(INDEXED + SPLIT.replace("in/*.png", pattern))
    said = f"splits.train.images = '{pattern}' matches no file (`?` and brackets stand for themselves)"
    assert Problem(f"{root}/dataset.toml", said) in find(root).problems


RENAME = "has a name that is not UTF-8, or has control characters: rename it"


@pytest.mark.parametrize("name", [b"caf\xe9.png", b"new\nline.png", b"\x1b[31m.png", "\u2028.png".encode()])
def test_a_name_that_no_line_of_text_holds_is_a_problem(make, name):
    root = make(*segnet("a"))
    for folder in ("train", "trainannot"):
        Path(os.fsdecode(os.fsencode(root / folder) + b"/" + name)).write_bytes(b"")
    data = find(root)
    assert stems(data.pool) == ["a"]
    paths = [repr(f"{root}/{folder}/{os.fsdecode(name)}") for folder in ("train", "trainannot")]
    assert [(p.file, p.problem) for p in data.problems] == [(path, RENAME) for path in paths]
    for path in paths:
        path.encode()  # it can be written


@pytest.mark.parametrize("name", ["caf\udce9", "new\nline"])
def test_a_data_folder_of_such_a_name_is_refused(tmp_path, name):
    (tmp_path / name).mkdir()
    with pytest.raises(UsageError, match=r"not UTF-8, or has control characters: rename it$") as error:
        find(tmp_path / name)
    str(error.value).encode()
    assert "\n" not in str(error.value)


def test_names_with_letters_of_all_kinds_are_used(make):
    names = ["\u00fc ber_1", "\u8857_2", "\U0001f697_3", "no\u00a0break_4"]
    data = find(make(*segnet(*names)))
    assert set(stems(data.pool)) == set(names)
    assert data.problems == ()


def test_links_to_images_are_used_and_what_is_no_file_is_named(make):
    root = make(*segnet("a", "b", "c", "d", "e", "f"), "elsewhere/x.png")
    for name in "abcde":
        (root / "train" / f"{name}.png").unlink()
    (root / "train/a.png").symlink_to("../elsewhere/x.png")
    (root / "train/b.png").symlink_to("../elsewhere/gone.png")
    (root / "train/c.png").symlink_to("c.png")
    (root / "train/d.png").mkdir()
    os.mkfifo(root / "train/e.png")
    data = find(root)
    assert stems(data.pool) == ["a", "f"]
    assert data.problems == (
        Problem(f"{root}/train/b.png", "is a broken link to ../elsewhere/gone.png: mend or remove it"),
        Problem(f"{root}/train/c.png", "is a broken link to c.png: mend or remove it"),
        Problem(f"{root}/train/d.png", "is a folder with the name of an image: rename or remove it"),
        Problem(f"{root}/train/e.png", "is a pipe or a device, no image: remove it"),
    )


TEXT_FILES = {
    "train.txt": segnet("a"),
    "class_dict.csv": ["train/a.png", "train_labels/a_L.png"],
    "codes.txt": ["images/a.png", "labels/a_P.png"],
    "valid.txt": ["images/a.png", "labels/a_P.png"],
}


@pytest.mark.parametrize("name", TEXT_FILES)
@pytest.mark.parametrize(
    ("body", "message"),
    [(b"caf\xe9", r"not UTF-8 text \(byte 3\); save it as UTF-8"), ("\ufeffa".encode("utf-16-le"), "not UTF-8 text")],
)
def test_a_text_file_that_is_not_utf_8_is_named(make, name, body, message):
    root = make(*TEXT_FILES[name], texts={other: "a\n" for other in ("codes.txt", "valid.txt") if "valid" in name})
    if name == "codes.txt":
        (root / "valid.txt").write_text("a\n")
    (root / name).write_bytes(body)
    with pytest.raises(FastsegError, match=f"^{root}/{name}: {message}"):
        find(root)


def test_a_byte_order_mark_is_no_part_of_the_first_name(make):
    data = find(make(*segnet("a", "b"), texts={"train.txt": "\ufeffa.png\nb.png\n"}))
    assert stems(data.pool) == ["a", "b"]
    assert data.problems == ()


def test_a_listed_name_with_control_characters_is_quoted(make):
    root = make(*segnet("a"), texts={"train.txt": "a\n\x1b[2Jghost\n"})
    assert find(root).problems == (
        Problem(f"{root}/train.txt", r"names '\x1b[2Jghost', which has no image and label here", "listed"),
    )


def test_a_list_of_endless_size_is_not_read(make):
    root = make(*segnet("a"), texts={"train.txt": "a\n"})
    os.truncate(root / "train.txt", 1 << 40)
    with pytest.raises(FastsegError, match=f"^{root}/train.txt: has 1099511627776 bytes, a text file here has at most"):
        find(root)


def test_signs_of_a_layout_are_folders_and_files(make):
    root = make("train_labels/a_L.png", "trainannot/a.png", texts={"train": "x", "class_dict.csv": CLASS_DICT})
    with pytest.raises(UsageError, match=r"Found class_dict\.csv, train, train_labels/, trainannot/\. "):
        find(root)


@pytest.mark.parametrize(
    ("old", "new", "message"),
    [
        ("in/*.png", "gone/*.png", "splits.train.images: no folder .*/gone$"),
        ("in/*.png", "in\\u0000/*.png", r"splits.train.images = 'in\\x00/\*.png': has control characters"),
        ("in/*.png", "x" * 300, "cannot be read: File name too long"),
        ("splits.train", 'splits."a\\nb".x', r"splits.'a\\nb' wants exactly"),
        ('"road"', '"ro\\nad"', r"the class name 'ro\\nad' has control characters"),
        ("index = 2", "index = 0x" + "f" * 5000, "not valid TOML: a whole number of more than 64 bits"),
        ("void = [0, 255]", "void." + "a." * 90 + "a = 1", r"void = {'a': .*\.\.\..*: wants a number"),
        ("index = 2", "index = " + "[" * 3000, "not valid TOML: brackets nested too deep"),
        ('"lake"', '"road"', "class names must differ: road, road"),
    ],
)
def test_whatever_a_toml_file_holds_is_answered_in_one_line(make, old, new, message):
    root = described(make, (INDEXED + SPLIT).replace(old, new), "")
    with pytest.raises(FastsegError, match=message) as error:
        find(root)
    assert str(error.value).startswith(f"{root}/")
    assert "\n" not in str(error.value)
