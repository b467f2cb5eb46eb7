"""Cityscapes and Pascal VOC as they are downloaded: small made-up copies."""

import numpy as np
import pytest
from PIL import Image

from fastseg.data import cityscapes, split, voc
from fastseg.data.classes import VOID
from fastseg.data.decode import decode_label
from fastseg.data.layouts import Problem, find
from fastseg.errors import FastsegError


def save(path, pixels, palette=None):
    path.parent.mkdir(parents=True, exist_ok=True)
    image = Image.fromarray(np.array(pixels, np.uint8))
    if palette:
        image.putpalette(palette)
    image.save(path)


def make_cityscapes(root, *, test_ids=((0, 3), (1, 2))):
    """Two cities to train, one to validate and one to test, with the other files of the download beside them."""
    frames = {
        "train/aachen": ["aachen_000000_000019", "aachen_000001_000019"],
        "train/ulm": ["ulm_000000_000019"],
        "val/lindau": ["lindau_000000_000019"],
        "test/bonn": ["bonn_000000_000019"],
    }
    for folder, names in frames.items():
        ids = test_ids if folder.startswith("test") else [[7, 33], [0, 18]]
        for name in names:
            save(root / "leftImg8bit" / folder / f"{name}_leftImg8bit.png", np.zeros((2, 2, 3)))
            if ids is None:
                continue
            for kind in ("labelIds", "instanceIds", "color"):
                save(root / "gtFine" / folder / f"{name}_gtFine_{kind}.png", ids)
            (root / "gtFine" / folder / f"{name}_gtFine_polygons.json").write_text("{}")
    for name in ("README", "license.txt"):
        (root / name).write_text("x")
    return root


def make_voc(root, *, test=False):
    """Two images to train, one to validate, and one that only other tasks use."""
    names = {"train": ["2007_000032", "2007_000039"], "val": ["2007_000033"]} | (
        {"test": ["2007_000068"]} if test else {}
    )
    for stem in [*(name for group in names.values() for name in group), "2012_000999"]:
        image = root / "JPEGImages" / f"{stem}.jpg"
        image.parent.mkdir(parents=True, exist_ok=True)
        Image.new("RGB", (2, 2)).save(image)
        if stem != "2012_000999":
            # A palette PNG of the classes background, aeroplane, tvmonitor and border.
            save(root / "SegmentationClass" / f"{stem}.png", [[0, 1], [20, 255]], [0] * 3 + [128, 0, 0] + [9] * 750)
            save(root / "SegmentationObject" / f"{stem}.png", [[0, 1], [2, 255]])
    for folder, stems in (("Segmentation", names), ("Main", {"train": ["2012_000999"]})):
        (root / "ImageSets" / folder).mkdir(parents=True)
        for part, listed in [*stems.items(), ("trainval", [stem for group in stems.values() for stem in group])]:
            (root / "ImageSets" / folder / f"{part}.txt").write_text("".join(f"{stem}\n" for stem in listed))
    (root / "Annotations").mkdir()
    return root


def stems(data):
    return {name: [pair.stem for pair in pairs] for name, pairs in data.splits.items()}


@pytest.mark.parametrize("test_ids", [((0, 3), (1, 2)), None])
def test_cityscapes_has_a_folder_per_city_and_no_public_test_labels(tmp_path, test_ids):
    data = find(make_cityscapes(tmp_path, test_ids=test_ids))
    assert data.layout == "cityscapes"
    assert stems(data) == {
        "train": [
            f"{name}_leftImg8bit" for name in ("aachen_000000_000019", "aachen_000001_000019", "ulm_000000_000019")
        ],
        "val": ["lindau_000000_000019_leftImg8bit"],
    }
    assert data.splits["val"][0].label == f"{tmp_path}/gtFine/val/lindau/lindau_000000_000019_gtFine_labelIds.png"
    assert data.problems == ()
    said = "the data set brings it; its test images, whose labels are not public, are left out"
    assert split.choose(data, "auto") == ("own", said)


def test_cityscapes_labels_of_test_that_somebody_has_are_used(tmp_path):
    data = find(make_cityscapes(tmp_path, test_ids=[[7, 0], [0, 0]]))
    assert stems(data)["test"] == ["bonn_000000_000019_leftImg8bit"]
    assert data.note == ""


def test_cityscapes_has_19_classes_and_all_other_ids_are_void(tmp_path):
    data = find(make_cityscapes(tmp_path))
    # By hand: 7 is road, the first; 33 is bicycle, the last; 18 is the group of poles, which counts nowhere.
    np.testing.assert_array_equal(decode_label(data.pool[0].label, data.classes, 254), [[0, 18], [VOID, VOID]])
    assert len(data.classes.names) == 19
    # From the paper (Cordts et al., 2016): the classes that its benchmark leaves out, by id.
    void = [0, 1, 2, 3, 4, 5, 6, 9, 10, 14, 15, 16, 18, 29, 30]
    assert [value for value in range(34) if data.classes.from_index[value] == VOID] == void
    assert data.classes.names[10:14] == ("sky", "person", "rider", "car")
    assert data.classes.colors[0] == (128, 64, 128)
    assert sorted(value for value, _ in cityscapes.CITYSCAPES_19.values()) == sorted(set(range(34)) - set(void))


def test_cityscapes_orphans_are_named_and_a_missing_label_folder_too(tmp_path):
    root = make_cityscapes(tmp_path)
    label = root / "gtFine/val/lindau/lindau_000000_000019_gtFine_labelIds.png"
    label.unlink()
    image = root / "leftImg8bit/val/lindau/lindau_000000_000019_leftImg8bit.png"
    assert find(root).problems == (Problem(str(image), "no label of that name"),)
    (root / "gtFine/val").rename(root / "gtFine/elsewhere")
    with pytest.raises(FastsegError, match=f"^{root}: no folder {root}/gtFine/val$"):
        find(root)


@pytest.mark.parametrize("folder", [".", "VOC2012", "VOCdevkit/VOC2012"])
def test_voc_pairs_by_its_lists_and_takes_images_of_other_tasks_for_nobodys(tmp_path, folder):
    root = make_voc(tmp_path / folder)
    data = find(root.parent if "VOC" in folder else root)
    assert (data.layout, data.root) == ("voc", root)
    assert stems(data) == {"train": ["2007_000032", "2007_000039"], "val": ["2007_000033"]}
    assert data.problems == ()
    np.testing.assert_array_equal(decode_label(data.pool[0].label, data.classes, 254), [[0, 1], [20, VOID]])


def test_voc_has_21_classes_in_its_colours(tmp_path):
    data = find(make_voc(tmp_path, test=True))
    assert "test" in data.splits
    assert len(data.classes.names) == 21
    assert data.classes.from_index == {**{value: value for value in range(21)}, 255: VOID}
    # The colours of the development kit's documentation, which other tools print: aeroplane, bicycle, bird, boat,
    # person, sofa, tvmonitor.
    colors = {1: (128, 0, 0), 2: (0, 128, 0), 3: (128, 128, 0), 4: (0, 0, 128), 15: (192, 128, 128)}
    colors |= {18: (0, 192, 0), 20: (0, 64, 128), 0: (0, 0, 0)}
    assert {index: data.classes.colors[index] for index in colors} == colors
    assert voc.VOC_21[15] == "person"


def test_a_devkit_of_several_years_and_a_tools_export_are_told_apart(tmp_path):
    for year in ("VOC2007", "VOC2012"):
        make_voc(tmp_path / year)
    with pytest.raises(FastsegError, match=rf"^{tmp_path}: holds VOC2007, VOC2012: give one of them, such as --data "):
        find(tmp_path)
    for name in ("labelmap.txt", "class_names.txt"):  # of CVAT, and of LabelMe: their classes are their own
        (tmp_path / "VOC2012" / name).write_text("x")
        with pytest.raises(FastsegError, match="no layout fits"):
            find(tmp_path / "VOC2012")
        (tmp_path / "VOC2012" / name).unlink()


def test_a_name_of_vocs_lists_without_a_mask_is_missing(tmp_path):
    root = make_voc(tmp_path)
    (root / "SegmentationClass" / "2007_000033.png").unlink()
    data = find(root)
    (problem,) = data.problems
    assert problem.problem == "names 2007_000033, which has no image and label here"
    assert split.missing(data, "auto") == (problem,)
    assert split.missing(data, "random:80-20") == ()


@pytest.mark.parametrize("make", [make_cityscapes, make_voc])
def test_downloads_train(tmp_path, make):
    from fastseg import Config, train
    from fastseg.config import override

    root = make(tmp_path / "data")
    for path in root.rglob("*.png"):
        with Image.open(path) as image:
            image.resize((48, 32), Image.Resampling.NEAREST).save(path)
    for path in root.rglob("*.jpg"):
        with Image.open(path) as image:
            image.resize((48, 32)).save(path)
    changes = {"data.path": str(root), "data.size": "32x48", "model.depth": 1, "train.epochs": 1, "train.batch": 2}
    result = train(override(Config(), changes | {"runtime.device": "cpu"}, "--set"), tmp_path / "run")
    assert result is not None
    assert (tmp_path / "run" / "checkpoints" / "last.pt").is_file()
