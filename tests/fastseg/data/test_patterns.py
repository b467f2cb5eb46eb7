"""dataset.toml's patterns: what they match, and what belongs together by them."""

import os

import pytest

from fastseg.data.layouts import find
from fastseg.errors import UsageError

CLASSES = '[[classes]]\nname = "a"\nindex = 0\n'


@pytest.fixture
def found(tmp_path):
    """found(images, labels, files) -> ({image: label}, problems), of empty files, by their paths below the folder."""

    def look(images, labels, files, **more):
        for name in files:
            path = tmp_path / name
            path.parent.mkdir(parents=True, exist_ok=True)
            path.touch()
        given = {"images": images, "labels": labels, **more}
        lines = "".join(f"{key} = '{value}'\n" for key, value in given.items())
        (tmp_path / "dataset.toml").write_text(f"{CLASSES}[splits.train]\n{lines}", encoding="utf-8")
        data = find(tmp_path)
        short = {os.path.relpath(p.image, tmp_path): os.path.relpath(p.label, tmp_path) for p in data.pool}
        return short, [(os.path.relpath(p.file, tmp_path), p.problem) for p in data.problems]

    return look


@pytest.mark.parametrize(
    ("images", "labels", "pairs"),
    [
        pytest.param("i/*.jpg", "l/*_m.png", {"i/a.jpg": "l/a_m.png", "i/b.jpg": "l/b_m.png"}, id="one star"),
        pytest.param("i/*_*.jpg", "l/*-*.png", {"i/a_1.jpg": "l/a-1.png", "i/a_b_2.jpg": "l/a_b-2.png"}, id="stars"),
        pytest.param(
            "*/rgb/*.jpg", "*/seg/*.png", {"s/rgb/1.jpg": "s/seg/1.png", "t/rgb/1.jpg": "t/seg/1.png"}, id="dir"
        ),
        pytest.param("*/rgb", "*/seg", {"s/rgb/1.jpg": "s/seg/1.png", "t/rgb/1.webp": "t/seg/1.png"}, id="folders"),
        pytest.param(
            "*/photo.jpg", "*/mask.png", {"s/photo.jpg": "s/mask.png", "t/photo.jpg": "t/mask.png"}, id="fixed"
        ),
        pytest.param("i/**/*.jpg", "l/**/*.png", {"i/1.jpg": "l/1.png", "i/s/t/1.jpg": "l/s/t/1.png"}, id="any depth"),
        pytest.param("i/**", "l/**", {"i/1.jpg": "l/1.png", "i/s/t/1.tif": "l/s/t/1.png"}, id="all below"),
        pytest.param(
            "i/{c}/{n}.jpg", "l/{n}_{c}.png", {"i/s/1.jpg": "l/1_s.png", "i/t/1.jpg": "l/1_t.png"}, id="named"
        ),
        pytest.param("i/{c}/{c}_{n}.jpg", "l/{c}_{n}.png", {"i/s/s_1.jpg": "l/s_1.png"}, id="named twice"),
        pytest.param("i [1]/*.jpg", "l{x/*(2).png", {"i [1]/a.jpg": "l{x/a(2).png"}, id="brackets"),
        pytest.param("./i//*.jpg", "l/../l/*.png", {"i/\u00fc b, c.d.jpg": "l/\u00fc b, c.d.png"}, id="dots"),
    ],
)
def test_what_is_starred_or_named_is_the_same_on_both_sides(found, images, labels, pairs):
    assert found(images, labels, [*pairs, *pairs.values()]) == (pairs, [])


def test_a_named_part_that_differs_makes_no_pair(found):
    files = ["i/s/t_1.jpg", "i/s/s_2.jpg", "l/s_1.png", "l/s_2.png"]
    pairs, problems = found("i/{c}/{c}_{n}.jpg", "l/{c}_{n}.png", files)
    assert pairs == {"i/s/s_2.jpg": "l/s_2.png"}
    assert problems == [("l/s_1.png", "no image of that name")]  # i/s/t_1.jpg is no image by this pattern


def test_a_star_may_be_nothing_and_a_name_may_not(found):
    assert found("i/*.jpg", "l/x*.png", ["i/.jpg", "i/a.jpg", "l/xa.png"])[0] == {"i/a.jpg": "l/xa.png"}
    pairs, problems = found("j/x*.jpg", "m/x*.png", ["j/x.jpg", "m/x.png"])
    assert (pairs, problems) == ({"j/x.jpg": "m/x.png"}, [])
    _, problems = found("k/x{a}.jpg", "n/x{a}.png", ["k/x.jpg", "n/x.png"])
    assert [problem for _, problem in problems] == [
        "splits.train.images = 'k/x{a}.jpg' matches no file",
        "splits.train.labels = 'n/x{a}.png' matches no file",
    ]


@pytest.mark.parametrize(
    ("images", "labels", "files", "pairs"),
    [
        pytest.param("*.jpg", "*_mask.png", ["a.jpg", "a_mask.png"], {"a.jpg": "a_mask.png"}, id="other suffix"),
        pytest.param("*.png", "*_mask.png", ["a.png", "a_mask.png"], {"a.png": "a_mask.png"}, id="masks among images"),
        pytest.param("*_img.png", "*.png", ["a.png", "a_img.png"], {"a_img.png": "a.png"}, id="images among masks"),
        pytest.param("d", "d/*_mask.png", ["d/a.webp", "d/a_mask.png"], {"d/a.webp": "d/a_mask.png"}, id="folder"),
        pytest.param("**/*.png", "**/*.seg.png", ["s/a.png", "s/a.seg.png"], {"s/a.png": "s/a.seg.png"}, id="deep"),
        pytest.param(  # Roboflow's export of masks
            "train/*.jpg", "train/*_mask.png", ["train/a.rf.1.jpg", "train/a.rf.1_mask.png"],
            {"train/a.rf.1.jpg": "train/a.rf.1_mask.png"}, id="roboflow",
        ),
    ],
)  # fmt: skip
def test_images_and_masks_may_lie_in_one_folder(found, images, labels, files, pairs):
    assert found(images, labels, files) == (pairs, [])


def test_a_mask_without_an_image_is_no_image_of_its_own(found):
    pairs, problems = found("*.png", "*_mask.png", ["a.png", "a_mask.png", "b_mask.png", "c.png"])
    assert pairs == {"a.png": "a_mask.png"}
    assert problems == [("b_mask.png", "no image of that name"), ("c.png", "no label of that name")]


def test_folders_inside_are_no_files_of_a_pattern(found):
    assert found("i/*", "l/*", ["i/a.png", "l/a.png", "i/deeper/b.txt"]) == ({"i/a.png": "l/a.png"}, [])


def test_any_depth_follows_links_but_not_for_ever(found, tmp_path):
    for side in "il":
        (tmp_path / side).mkdir()
        (tmp_path / side / "loop").symlink_to("..")
        (tmp_path / side / "more").symlink_to(f"../far_{side}")
    pairs, problems = found("i/**/*.png", "l/**/*.png", ["i/a.png", "l/a.png", "far_i/b.png", "far_l/b.png"])
    assert (pairs, problems) == ({"i/a.png": "l/a.png", "i/more/b.png": "l/more/b.png"}, [])


def test_paths_may_be_absolute_or_lead_out_of_the_folder(tmp_path):
    for name in ("i/a.png", "l/a.png"):
        (tmp_path / name).parent.mkdir()
        (tmp_path / name).touch()
    (tmp_path / "told").mkdir()
    path = tmp_path / "told" / "d.toml"
    path.write_text(f'{CLASSES}[splits.train]\nimages = "{tmp_path}/i/*.png"\nlabels = "../l/*.png"\n')
    (pair,) = find(path).pool
    assert (pair.image, pair.label) == (f"{tmp_path}/i/a.png", f"{tmp_path}/told/../l/a.png")


def test_keys_of_splits_go_by_several_names_and_by_one_at_a_time(tmp_path):
    for split in ("train", "Valid", "Test", "extra"):
        for side in "il":
            (tmp_path / side / split).mkdir(parents=True)
            (tmp_path / side / split / f"{split}.png").touch()
    part = "[splits.{0}]\nimages = 'i/{0}'\nlabels = 'l/{0}'\n"
    parts = "".join(part.format(split) for split in ("train", "Valid", "Test", "extra"))
    path = tmp_path / "dataset.toml"
    path.write_text(CLASSES + parts)
    splits = {split: [pair.stem for pair in pairs] for split, pairs in find(tmp_path).splits.items()}
    assert splits == {"train": ["train"], "val": ["Valid"], "test": ["Test"], "extra": ["extra"]}
    path.write_text(CLASSES + parts + "[splits.validation]\nimages = 'i/Valid'\nlabels = 'l/Valid'\n")
    with pytest.raises(UsageError, match=r"splits.validation: there is another split of that meaning, `val`: keep one"):
        find(tmp_path)


def test_an_empty_folder_is_a_problem_and_no_error(found, tmp_path):
    (tmp_path / "l").mkdir()
    assert found("i", "l", ["i/a.png"]) == (
        {}, [("i/a.png", "no label of that name"), ("dataset.toml", "splits.train.labels = 'l' matches no file")],
    )  # fmt: skip
