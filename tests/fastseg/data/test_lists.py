"""Lists: of names, and of two columns, with names as people give them."""

import os

import pytest

from fastseg.data.layouts import find
from fastseg.errors import FastsegError, UsageError

CLASSES = '[[classes]]\nname = "a"\nindex = 0\n'
FOLDERS = "images = 'i'\nlabels = 'l/*_m.png'\n"


@pytest.fixture
def listed(tmp_path):
    """listed(lines, files, part) -> (image names, problems) of a split with the list x.txt, of empty files."""

    def look(lines, files, part=FOLDERS, split="train"):
        for name in files:
            path = tmp_path / name
            path.parent.mkdir(parents=True, exist_ok=True)
            path.touch()
        (tmp_path / "x.txt").write_text(lines, encoding="utf-8")
        (tmp_path / "dataset.toml").write_text(f"{CLASSES}[splits.{split}]\n{part}list = 'x.txt'\n", encoding="utf-8")
        data = find(tmp_path)
        pairs = [(os.path.relpath(p.image, tmp_path), os.path.relpath(p.label, tmp_path)) for p in data.splits[split]]
        assert data.missing.get(split, ()) == data.problems
        assert {problem.file for problem in data.problems} <= {f"{tmp_path}/x.txt"}
        return pairs, [problem.problem for problem in data.problems]

    return look


NAMES = ["a", "my photo", "a, b", "v1.2.3", "frame.0001", "[x] (1)", "\u00fcber", "a b", "c,d e"]


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize(
    "line",
    [
        "{0}", "{0}.jpg", "{0}.png", "i/{0}", "i/{0}.jpg", "./i/{0}.jpg", "/home/me/data/i/{0}.jpg",
        "C:\\data\\i\\{0}.jpg", "{0}.jpg\t{0}_m.png", "i/{0}.jpg l/{0}_m.png", "i/{0}.jpg, l/{0}_m.png",
        "i/{0}.jpg,l/{0}_m.png", "{0} {0}_m", "/far/i/{0}.jpg /far/l/{0}_m.png",
    ],
)  # fmt: skip
def test_a_line_is_a_name_or_two_whatever_the_names_hold(listed, name, line):
    files = [file for each in NAMES for file in (f"i/{each}.jpg", f"l/{each}_m.png")]
    assert listed(f"\n{line.format(name)}\r\n", files) == ([(f"i/{name}.jpg", f"l/{name}_m.png")], [])


@pytest.mark.parametrize("line", ["b", "a b", "x/a.jpg", "i/a.jpg l/b_m.png", "a.jpg 1", "l/a_m.png"])
def test_a_name_that_is_not_here_is_a_problem_of_the_list(listed, line):
    files = ["i/a.jpg", "l/a_m.png", "i/c.jpg", "l/b_m.png"]
    pairs, problems = listed(f"a\n{line}\n", files)
    assert pairs == [("i/a.jpg", "l/a_m.png")]
    assert problems == [f"names {line}, which has no image and label here"]


def test_what_a_list_leaves_out_may_lack_a_partner(listed):
    assert listed("a\n", ["i/a.jpg", "l/a_m.png", "i/no_label.jpg", "l/no_image_m.png"])[1] == []


def test_a_name_of_several_images_wants_its_folder(listed):
    part = "images = 'i/{c}/{n}_rgb.jpg'\nlabels = 'l/{c}/{n}.png'\n"
    files = [file for city in "st" for file in (f"i/{city}/1_rgb.jpg", f"l/{city}/1.png")]
    assert listed("1\n1_rgb.jpg\n", files, part) == (
        [],
        [f"names {name}, which stands for 2 images here: write more of its path" for name in ("1", "1_rgb.jpg")],
    )
    for line in ("s/1", "s/1_rgb", "s/1_rgb.jpg", "i/s/1_rgb.jpg", "i/s/1_rgb.jpg l/s/1.png"):
        assert listed(line, files, part) == ([("i/s/1_rgb.jpg", "l/s/1.png")], [])
    # A city that is not here is not another one.
    assert listed("u/1\n", files, part)[0] == []


COLUMNS = ["p/a.jpg", "q/one.png", "p/b c.jpg", "q/two, 2.png", "p/d.x.jpg", "q/3.png"]


@pytest.mark.parametrize("cut", ["\t", " ", ",", ", ", "  "])
@pytest.mark.parametrize("start", ["", "/home/me/set/", "./"])
def test_two_columns_need_no_pattern(listed, cut, start):
    wanted = list(zip(COLUMNS[::2], COLUMNS[1::2], strict=True))
    lines = "".join(f"{start}{image}{cut}{start}{label}\n" for image, label in wanted)
    assert listed(lines, COLUMNS, part="") == (wanted, [])


def test_one_column_alone_is_no_pair(listed):
    pairs, problems = listed("p/a.jpg\np/a.jpg q/gone.png\np/a.jpg q/one.png\n", COLUMNS, part="")
    assert pairs == [("p/a.jpg", "q/one.png")]
    said = [f"has the line {line}, which is no image and label here" for line in ("p/a.jpg", "p/a.jpg q/gone.png")]
    assert problems == said


def test_columns_count_from_the_lists_own_folder_too(tmp_path):
    for name in ("set/a.jpg", "set/a.png"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).touch()
    (tmp_path / "set" / "x.txt").write_text("a.jpg a.png\n")
    (tmp_path / "dataset.toml").write_text(f"{CLASSES}[splits.train]\nlist = 'set/x.txt'\n")
    (pair,) = find(tmp_path).pool
    assert (pair.stem, pair.image, pair.label) == ("a", f"{tmp_path}/set/a.jpg", f"{tmp_path}/set/a.png")


def test_a_list_that_is_not_there_is_named(listed, tmp_path):
    path = tmp_path / "dataset.toml"
    path.write_text(f"{CLASSES}[splits.train]\nlist = 'gone.txt'\n")
    with pytest.raises(FastsegError, match=f"^{tmp_path}/gone.txt: cannot be read"):
        find(tmp_path)
    path.write_text(f"{CLASSES}[splits.train]\nimages = 'i'\nlist = 'x.txt'\n")
    with pytest.raises(UsageError, match=r"splits\.train wants exactly `images` and `labels`.*or `list` alone"):
        find(tmp_path)


def test_a_line_of_a_million_slashes_or_commas_takes_no_time(listed):
    pairs, problems = listed("/x" * 500_000 + "\n" + "a, " * 500_000 + "\n", ["i/a.jpg", "l/a_m.png"])
    assert pairs == []
    assert [len(problem) < 300 for problem in problems] == [True, True]
    pairs, problems = listed("/x" * 500_000 + "\n" + "a, " * 500_000 + "\n", [], part="")
    assert [len(problem) < 300 for problem in problems] == [True, True]


def test_names_of_a_layouts_list_may_hold_blanks_and_dots(tmp_path):
    names = ["my photo.1", "b, c", "[d]"]
    for name in names:
        for folder in ("train", "trainannot"):
            (tmp_path / folder).mkdir(exist_ok=True)
            (tmp_path / folder / f"{name}.png").touch()
    (tmp_path / "train.txt").write_text("my photo.1\nb, c.png\n/x/train/[d].png /x/trainannot/[d].png\n")
    data = find(tmp_path)
    assert [pair.stem for pair in data.pool] == sorted(names)
    assert data.problems == ()
