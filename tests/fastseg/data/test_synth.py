"""Drawn street scenes: the same for a seed, the same in every layout, whole or not at all, and not told by colour."""

import numpy as np
import pytest
from PIL import Image

from fastseg.data import synth
from fastseg.data.classes import UNKNOWN, VOID
from fastseg.data.decode import decode_image, decode_label
from fastseg.data.layouts import find
from fastseg.data.scene import draw_scene
from fastseg.data.split import apply, sequence
from fastseg.data.synth import LAYOUTS, write
from fastseg.errors import FastsegError, UsageError

COUNTS = {"train": 9, "val": 3, "test": 2}
CLASSES = 11


def contents(folder) -> dict[str, list[tuple]]:
    """By split what fastseg reads: name, pixels and classes of each pair."""
    dataset = find(folder)
    assert dataset.problems == ()
    return {
        split: [(p.stem, decode_image(p.image), decode_label(p.label, dataset.classes, UNKNOWN)) for p in pairs]
        for split, pairs in apply(dataset, "auto").items()
    }


def assert_same(found: list[tuple], wanted: list[tuple]) -> None:
    assert [stem for stem, *_ in found] == [stem for stem, *_ in wanted]
    for (_, *mine), (_, *theirs) in zip(found, wanted, strict=True):
        assert all(np.array_equal(a, b) for a, b in zip(mine, theirs, strict=True))


@pytest.fixture(scope="module")
def layouts(tmp_path_factory):
    """The same data set in all four layouts."""
    root = tmp_path_factory.mktemp("layouts")
    for layout in LAYOUTS:
        write(root / layout, layout=layout, counts=COUNTS, size=(32, 48), seed=3)
    return root


@pytest.mark.parametrize("layout", LAYOUTS)
def test_every_layout_holds_the_scenes_that_were_drawn(layouts, layout):
    assert find(layouts / layout).layout == layout
    found, first = contents(layouts / layout), 0
    wanted = {split: n for split, n in COUNTS.items() if (split, layout) != ("test", "fastai")}
    assert {split: len(pairs) for split, pairs in found.items()} == wanted
    for split, count in wanted.items():
        stems = [stem for stem, *_ in contents(layouts / "segnet")[split]]
        drawn = [draw_scene(3, first + i, (32, 48)) for i in range(count)]
        assert_same(found[split], [(stem, *scene) for stem, scene in zip(stems, drawn, strict=True)])
        first += count


def test_a_seed_gives_the_same_files_and_another_seed_others(layouts, tmp_path):
    for seed in (3, 4):
        write(tmp_path / str(seed), counts=COUNTS, size=(32, 48), seed=seed)
    names = sorted(p.relative_to(layouts / "segnet") for p in (layouts / "segnet").rglob("*") if p.is_file())
    assert len(names) == 2 * sum(COUNTS.values()) + 3  # images, labels, one list per split
    same, other = (
        [(tmp_path / seed / name).read_bytes() == (layouts / "segnet" / name).read_bytes() for name in names]
        for seed in ("3", "4")
    )
    assert all(same)
    assert [n.suffix for n, equal in zip(names, other, strict=True) if equal] == [".txt"] * 3


@pytest.mark.parametrize("layout", LAYOUTS)
def test_a_jpeg_set_has_nearly_the_pixels_and_the_very_labels_of_the_png_set(layouts, tmp_path, layout):
    write(tmp_path / "jpeg", layout=layout, counts=COUNTS, size=(32, 48), seed=3, image_format="jpeg")
    found, wanted = contents(tmp_path / "jpeg"), contents(layouts / layout)
    assert found.keys() == wanted.keys()
    for split in wanted:
        for (stem, image, label), (name, pixels, labels) in zip(found[split], wanted[split], strict=True):
            assert stem == name
            assert np.array_equal(label, labels)
            error = np.abs(image.astype(int) - pixels).mean()
            assert 0 < error < 12  # of 255; two scenes differ by 28 and more
    for pair in find(tmp_path / "jpeg").pool:
        with Image.open(pair.image) as image, Image.open(pair.label) as label:
            assert (image.format, label.format) == ("JPEG", "PNG")
            assert pair.image.endswith(".jpg")
            assert [part[1:3] for part in image.layer] == [(2, 2), (1, 1), (1, 1)]  # 4:2:0
    # Files name others as they are called.
    for listed in [*tmp_path.glob("jpeg/train.txt"), *tmp_path.glob("jpeg/valid.txt")]:
        for line in listed.read_text().splitlines():
            for name in line.split():
                assert list((tmp_path / "jpeg").rglob(name.rpartition("/")[2]))


def test_a_scene_is_the_same_world_at_twice_the_size():
    for index in range(4):
        small, large = (draw_scene(0, index, size)[1] for size in ((96, 144), (192, 288)))
        assert np.mean(small == large[::2, ::2]) > 0.85


def test_sequences_stay_within_a_split(layouts):
    splits = apply(find(layouts / "original"), "auto")
    sequences = {split: {sequence(p.stem) for p in pairs} for split, pairs in splits.items()}
    assert len(set.union(*sequences.values())) == sum(len(names) for names in sequences.values())
    assert {split: len(names) for split, names in sequences.items()} == {"train": 3, "val": 3, "test": 2}
    held = apply(find(layouts / "original"), "video")
    assert {sequence(p.stem) for p in held["train"]}.isdisjoint(sequence(p.stem) for p in held["val"])


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"layout": "cityscapes"}, "--layout cityscapes: choose one of segnet, original, kaggle, fastai"),
        ({"image_format": "gif"}, "--format gif: choose one of png, jpeg"),
        ({"counts": {"train": 0, "val": 1}}, "at least one image to train and one to validate"),
        ({"counts": {"train": 1}}, "at least one image to train and one to validate"),
        ({"counts": {"train": 1, "val": 1, "test": -1}}, "at least one image"),
        ({"size": (31, 48)}, "--size 31x48: scenes need 32x32 or more"),
        ({"size": (48, 0)}, "--size 48x0: scenes need 32x32 or more"),
    ],
)
def test_what_makes_no_data_set_is_refused_and_leaves_nothing(tmp_path, options, message):
    with pytest.raises(UsageError, match=message) as error:
        write(tmp_path / "street", **{"counts": COUNTS, "size": (32, 48)} | options)
    assert "\n" not in str(error.value)
    assert list(tmp_path.iterdir()) == []


def test_a_folder_that_exists_is_left_alone(tmp_path):
    (tmp_path / "mine.txt").write_text("mine")
    with pytest.raises(UsageError, match=r"exists: give a new folder, or remove it$"):
        write(tmp_path, counts=COUNTS, size=(32, 48))
    assert [p.name for p in tmp_path.iterdir()] == ["mine.txt"]


def test_a_disk_that_fills_leaves_nothing(tmp_path, monkeypatch):
    def full(seed, index, size):
        if index == 2:
            raise OSError(28, "No space left on device")
        return draw_scene(seed, index, size)

    monkeypatch.setattr(synth, "draw_scene", full)
    with pytest.raises(FastsegError, match=r"street could not be written \(No space left on device\); nothing is left"):
        write(tmp_path / "street", counts=COUNTS, size=(32, 48))
    assert list(tmp_path.iterdir()) == []


@pytest.fixture(scope="module")
def scenes() -> tuple[np.ndarray, np.ndarray]:
    """64 scenes: images [N, H, W, 3] and labels [N, H, W]."""
    images, labels = zip(*(draw_scene(0, i, (96, 144)) for i in range(64)), strict=True)
    return np.stack(images), np.stack(labels)


def test_every_class_is_in_64_scenes(scenes):
    assert np.unique(scenes[1]).tolist() == [*range(CLASSES), VOID]


def test_every_class_is_in_64_small_scenes():
    assert np.unique([draw_scene(0, i, (48, 72))[1] for i in range(64)]).tolist() == [*range(CLASSES), VOID]


def mean_iou(predicted: np.ndarray, labelled: np.ndarray) -> float:
    """Over the classes, intersection over union of pixels that are not void."""
    predicted, labelled = predicted[labelled != VOID], labelled[labelled != VOID]
    ious = [
        np.sum((predicted == c) & (labelled == c)) / np.sum((predicted == c) | (labelled == c)) for c in range(CLASSES)
    ]
    return float(np.mean(ious))


def nearest_mean(images, labels, others) -> np.ndarray:
    """The class whose mean colour is nearest."""
    means = np.stack([images[labels == c].mean(axis=0) for c in range(CLASSES)])
    # |x - m|^2 without |x|^2, which is the same for all classes
    return np.argmin((means**2).sum(axis=1) - 2 * others.astype(np.float32) @ means.T, axis=-1)


def colour_votes(images, labels, others) -> np.ndarray:
    """The commonest class of the pixel's colour, in a table of 16 x 16 x 16 colours."""

    def colour(pixels):
        return (pixels // 16).astype(np.int64) @ [256, 16, 1]

    known = labels != VOID
    votes = np.bincount(colour(images[known]) * CLASSES + labels[known], minlength=16**3 * CLASSES)
    return votes.reshape(-1, CLASSES).argmax(axis=1)[colour(others)]


@pytest.mark.parametrize("classifier", [nearest_mean, colour_votes])
def test_colour_alone_labels_little(scenes, classifier):
    images, labels = scenes
    found = mean_iou(classifier(images[:40], labels[:40], images[40:60]), labels[40:60])
    commonest = np.bincount(labels[:40][labels[:40] != VOID]).argmax()
    assert found < 0.35
    assert found > mean_iou(np.full_like(labels[40:60], commonest), labels[40:60])
