"""Prediction: the same classes as evaluation, for every kind of image, and what becomes of files that are none."""

import csv
import json
import os
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from click.testing import CliRunner
from PIL import Image

import fastseg
from fastseg.cli import main
from fastseg.config import load_recipe, override
from fastseg.data.decode import decode_image
from fastseg.data.folders import files_below
from fastseg.data.layouts import find
from fastseg.data.synth import write
from fastseg.distributed import World
from fastseg.errors import FastsegError, UsageError
from fastseg.evaluation import score
from fastseg.inputs import find_images
from fastseg.results import KINDS, targets
from fastseg.specs import make_spec, open_data
from fastseg.training import train


@pytest.fixture(scope="module")
def trained(street, tmp_path_factory) -> Path:
    """A checkpoint of a small network that was trained for two epochs, at another size than the files have."""
    changes = {
        "data.path": str(street),
        "data.size": "48x64",
        "model.depth": 2,
        "train.epochs": 2,
        "runtime.device": "cpu",
    }
    run = tmp_path_factory.mktemp("predict") / "run"
    train(override(load_recipe("fast"), changes), run)
    return run / "checkpoints" / "best.pt"


@pytest.fixture(scope="module")
def model(trained):
    return fastseg.load(trained, device="cpu", dtype="fp32")


def test_masks_are_what_evaluation_scores(model, street):
    config = override(load_recipe("fast"), {"data.path": str(street), "data.size": "48x64"})
    dataset, splits = open_data(config)
    spec = make_spec(config, dataset, splits, "val", device=torch.device("cpu"), dtype=torch.float32, threads=2)
    found = score(model.network, spec, World(0, 1, torch.device("cpu")), keep=4)
    for index, prediction in found.kept:
        mask = model(spec.pairs[index].image)
        assert (mask.dtype, mask.shape) == (np.uint8, prediction.shape)
        assert (mask == prediction).mean() > 0.999  # another batch size rounds otherwise
    assert model.classes == dataset.classes.names


def test_a_checkpoint_says_how_images_are_turned_and_get_their_size(trained, street, tmp_path):
    """As evaluation has them, of a letterboxed network; a turned photo as the upright one."""
    state = torch.load(trained, weights_only=True)
    state["config"]["data"] |= {"fit": "letterbox", "exif": "apply", "size": "48x64"}
    torch.save(state, tmp_path / "own.pt")
    model = fastseg.load(tmp_path / "own.pt", device="cpu", dtype="fp32")
    config = override(load_recipe("fast"), {"data.path": str(street), "data.size": "48x64", "data.fit": "letterbox"})
    dataset, splits = open_data(config)
    spec = make_spec(config, dataset, splits, "val", device=torch.device("cpu"), dtype=torch.float32, threads=2)
    for index, prediction in score(model.network, spec, World(0, 1, torch.device("cpu")), keep=4).kept:
        assert (model(spec.pairs[index].image) == prediction).mean() > 0.999
    photo, exif = Image.open(spec.pairs[0].image), Image.Exif()
    exif[0x0112] = 6  # a quarter clockwise
    photo.transpose(Image.Transpose.ROTATE_90).save(tmp_path / "turned.png", exif=exif)
    for image in (tmp_path / "turned.png", Image.open(tmp_path / "turned.png")):
        assert np.array_equal(model(image), model(photo))
    assert fastseg.load(trained, device="cpu")(tmp_path / "turned.png").shape == (144, 96)  # as it is stored


def test_every_kind_of_image_gives_the_same_mask(model, street):
    path = sorted((street / "val").iterdir())[0]
    pixels = decode_image(str(path))
    wanted = model(path)
    assert len(np.unique(wanted)) > 1
    alpha = np.dstack([pixels, np.full(pixels.shape[:2], 128, np.uint8)])
    tensor = torch.from_numpy(pixels).permute(2, 0, 1)
    for image in (str(path), Image.open(path), pixels, pixels[::1], alpha, tensor):
        assert np.array_equal(model(image), wanted)
    grey = pixels[..., 0]
    assert np.array_equal(model(grey), model(np.dstack([grey] * 3)))


def test_what_is_no_image_is_refused(model):
    for image, error in (
        (np.zeros((4, 4, 3)), TypeError),
        (np.zeros((4, 4, 2), np.uint8), ValueError),
        (torch.zeros(4, 4, 3, dtype=torch.uint8), ValueError),
        (torch.zeros(3, 4, 4), TypeError),
        (7, TypeError),
        ("nowhere.png", FastsegError),
    ):
        with pytest.raises(error):
            model(image)


def invoke(*words: object) -> tuple[int, str, str]:
    result = CliRunner().invoke(main, ["predict", *map(str, words), "--device", "cpu", "--dtype", "fp32"])
    assert not isinstance(result.exception, Exception), result.exception
    return result.exit_code, result.stdout, result.stderr


def test_devices_and_dtypes_are_torchs_too(trained, model, street):
    image = sorted((street / "val").iterdir())[0]
    same = fastseg.load(trained, device=torch.device("cpu"), dtype=torch.float32)
    assert np.array_equal(same(image), fastseg.load(trained, device="cpu", dtype="fp32")(image))
    for wrong in ({"dtype": "fp8"}, {"dtype": torch.int8}, {"device": "tpu"}, {"device": "meta"}, {"device": 1.5}):
        with pytest.raises(FastsegError, match=rf"^{next(iter(wrong))} .*: auto, "):
            fastseg.load(trained, **wrong)


def test_no_images_have_no_masks_and_an_image_has_pixels(model):
    assert model.masks([]) == []
    with pytest.raises(ValueError, match=r"an image with pixels is wanted, this one is \[0, 7, 3\]"):
        model(np.zeros((0, 7, 3), np.uint8))


def test_a_folder_of_files_of_every_kind(trained, model, street, tmp_path):
    folder = tmp_path / "in"
    (folder / "below").mkdir(parents=True)
    photo = Image.open(sorted((street / "val").iterdir())[0])
    rng = np.random.default_rng(0)
    photo.save(folder / "good.png")
    photo.convert("RGBA").save(folder / "rgba.png")
    photo.convert("P").save(folder / "palette.png")
    photo.convert("CMYK").save(folder / "cmyk.jpg")
    photo.save(folder / "below" / "Straße mit Baum.png")
    exif = Image.Exif()
    exif[0x0112] = 6  # turn by 90 degrees to look at
    photo.save(folder / "turned.jpg", exif=exif)
    Image.fromarray(rng.integers(0, 65536, (20, 30), dtype=np.uint16)).save(folder / "deep.png")
    Image.fromarray(rng.integers(0, 256, (1, 1, 3), dtype=np.uint8)).save(folder / "dot.png")
    Image.fromarray(rng.integers(0, 256, (50, 10_000, 3), dtype=np.uint8)).save(folder / "long.png")
    (folder / "empty.png").write_bytes(b"")
    (folder / "text.png").write_text("no image")
    (folder / "cut.png").write_bytes((folder / "good.png").read_bytes()[:-500])
    (folder / "notes.txt").write_text("not asked for")
    code, out, err = invoke(trained, folder, "--out", tmp_path / "out", "--json")
    document = json.loads(out)
    bad = {Path(row["file"]).name for row in document["bad"]}
    assert (code, document["images"], bad) == (1, 9, {"cut.png", "empty.png", "text.png"})
    for name in bad:
        assert sum(name in line and "cannot be decoded" in line for line in err.splitlines()) == 1
    sizes = {"good": (144, 96), "rgba": (144, 96), "palette": (144, 96), "cmyk": (144, 96), "turned": (144, 96)}
    sizes |= {"below/Straße mit Baum": (144, 96), "deep": (30, 20), "dot": (1, 1), "long": (10_000, 50)}
    for kind in ("index", "color", "overlay"):
        files = {
            str(p.relative_to(tmp_path / "out" / kind).with_suffix("")): p
            for p in (tmp_path / "out" / kind).rglob("*.*")
        }
        assert {name: Image.open(path).size for name, path in files.items()} == sizes
    index, color = (Image.open(tmp_path / "out" / kind / "good.png") for kind in ("index", "color"))
    assert (index.mode, color.mode) == ("L", "P")
    mask = model(folder / "good.png")
    assert np.array_equal(np.asarray(index), mask)
    assert np.array_equal(np.asarray(color), mask)
    assert np.array_equal(np.asarray(color.convert("RGB")), np.array(model.colors, np.uint8)[mask])
    overlay = np.asarray(Image.open(tmp_path / "out" / "overlay" / "good.png"))
    assert overlay[5, 5].tolist() == (np.asarray(photo)[5, 5] // 2 + np.array(model.colors)[mask[5, 5]] // 2).tolist()
    # Stored as it is looked at, and alpha dropped.
    assert np.array_equal(np.asarray(Image.open(tmp_path / "out" / "index" / "rgba.png")), mask)


def test_nothing_is_overwritten_unless_asked(trained, street, tmp_path):
    words = [trained, street / "val", "--out", tmp_path / "out", "--write", "index"]
    assert invoke(*words)[0] == 0
    first = sorted((tmp_path / "out" / "index").iterdir())
    assert [path.stem for path in first] == sorted(path.stem for path in (street / "val").iterdir())
    assert not (tmp_path / "out" / "overlay").exists()
    first[0].write_bytes(b"mine")
    code, _, err = invoke(*words)
    assert (code, first[0].read_bytes()) == (2, b"mine")
    assert err.splitlines()[-1].endswith(f"{first[0]} exists, and 3 others: give another folder, or --overwrite")
    assert invoke(*words, "--overwrite")[0] == 0
    assert first[0].read_bytes() != b"mine"


def test_inputs_are_files_folders_and_globs(street, tmp_path):
    files = sorted((street / "val").iterdir())
    assert [job.path for job in find_images([str(street / "val" / "*.png")])] == files
    assert [(job.path, job.name) for job in find_images([str(files[1])])] == [(files[1], files[1].stem)]
    named = find_images([str(street)])
    assert {job.name.split("/")[0] for job in named} == {"train", "val"}  # and neither of the folders of labels
    assert len(named) == 12
    with pytest.raises(UsageError, match="no image there"):
        find_images([str(tmp_path / "*.png")])
    with pytest.raises(UsageError, match="would both become"):
        find_images([str(files[0]), str(street / "val")])


def test_results_are_no_inputs(trained, street, tmp_path, capsys):
    photos = tmp_path / "ph"
    shutil.copytree(street / "val", photos)
    names = sorted(path.stem for path in photos.iterdir())

    def found(*inputs: Path) -> list[str]:
        return [job.name for job in find_images([*map(str, inputs)])]

    for out in (photos / "x", photos / "y" / "z", photos):
        code, said, err = invoke(trained, photos, "--out", out, "--json", "--confidence")
        assert (code, json.loads(said)["images"]) == (0, 4), err
        assert found(photos) == names
        assert found(photos / "**" / "*.png") == names
    assert len(found(photos / "x" / "overlay")) == 4  # who names them means them
    assert len(found(photos / "x" / "overlay" / "*.png")) == 4
    code, _, err = invoke(trained, photos, "--out", photos)
    assert (code, err.count("exists")) == (2, 1)
    run = photos / "run"
    shutil.copytree(photos / "x", run / "overlays")
    (run / "config.toml").write_text("")
    (run / "log.jsonl").write_text("")
    assert found(photos) == names
    assert [str(path) for path in files_below(photos, [".png"])] == [f"{name}.png" for name in names]
    assert capsys.readouterr().err == ""


def test_links_to_folders_are_followed_but_not_round_in_circles(tmp_path):
    (tmp_path / "here" / "a").mkdir(parents=True)
    (tmp_path / "there").mkdir()
    for name in ("here/a/x.png", "there/y.png"):
        Image.fromarray(np.zeros((4, 4), np.uint8)).save(tmp_path / name)
    (tmp_path / "here" / "linked").symlink_to(tmp_path / "there")
    (tmp_path / "here" / "a" / "up").symlink_to(tmp_path / "here")
    (tmp_path / "there" / "back").symlink_to("../here/a")
    (tmp_path / "here" / "itself").symlink_to("itself")
    names = ["a/x", "linked/back/x", "linked/y"]
    assert [job.name for job in find_images([str(tmp_path / "here")])] == names
    assert [str(path.with_suffix("")) for path in files_below(tmp_path / "here", [".png"])] == names


@pytest.mark.parametrize("layout", ["segnet", "original", "kaggle", "fastai"])
def test_of_a_data_set_the_images_alone_are_taken(layout, tmp_path, capsys):
    folder = tmp_path / "in" / "set"
    write(folder, layout=layout, counts={"train": 3, "val": 2}, size=(32, 48))
    dataset = find(folder)
    images = sorted(pair.image for pair in dataset.pool)
    unlabelled = Path(images[0]).with_name("unlabelled.png")
    shutil.copy(images[0], unlabelled)
    for root in (folder, tmp_path / "in"):
        assert sorted(str(job.path) for job in find_images([str(root)])) == sorted([*images, str(unlabelled)])
        assert capsys.readouterr().err == f"{folder}: a data set ({layout} layout): its 6 images, and no labels\n"


def test_of_images_and_masks_in_one_folder_the_images_are_taken(tmp_path):
    folder = tmp_path / "own"
    folder.mkdir()
    for name in ("a.png", "a_mask.png", "b.png", "b_mask.png"):
        Image.fromarray(np.zeros((4, 4), np.uint8)).save(folder / name)
    text = '[splits.train]\nimages = "*.png"\nlabels = "*_mask.png"\n[[classes]]\nname = "x"\nindex = 0\n'
    (folder / "dataset.toml").write_text(text)
    assert [job.name for job in find_images([str(folder)])] == ["a", "b"]
    (folder / "dataset.toml").write_text("[splits")
    with pytest.raises(UsageError, match="not valid TOML"):
        find_images([str(folder)])


def test_a_folder_gives_what_pillow_reads_and_no_companions(tmp_path):
    for name in ("a.png", "sub/b.AVIF", "._a.png", ".hidden/c.png", ".ipynb_checkpoints/a-checkpoint.png", "notes.txt"):
        (tmp_path / ".data" / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / ".data" / name).write_bytes(b"")
    assert [job.name for job in find_images([str(tmp_path / ".data")])] == ["a", "sub/b"]


def test_scores_are_those_whose_highest_is_the_class(model, street):
    path = sorted((street / "val").iterdir())[0]
    scores = model.scores(path)
    assert (scores.dtype, scores.shape) == (np.float32, (11, 96, 144))
    assert np.array_equal(scores.argmax(0), model(path))
    assert model.scores(np.zeros((1, 1, 3), np.uint8)).shape == (11, 1, 1)


def test_an_image_of_one_tile_is_predicted_as_whole(trained, model, street):
    """Of the network's own size nothing is resized: the same scores, to the bit."""
    pixels = decode_image(str(sorted((street / "val").iterdir())[0]))[:48, :64]
    tiled = fastseg.load(trained, device="cpu", dtype="fp32", tile="48x64")
    assert np.array_equal(tiled.scores(pixels), model.scores(pixels))
    assert np.array_equal(tiled(pixels), model(pixels))
    with pytest.raises(UsageError, match="--overlap 48"):
        fastseg.load(trained, tile="48x64", tile_overlap=48)


def test_tiles_are_blended_over_an_image_of_any_size(trained, model, street):
    path = sorted((street / "val").iterdir())[0]  # 96x144
    tiled = fastseg.load(trained, device="cpu", dtype="fp32", tile="48x64", tile_overlap=0)
    found = tiled.scores(path)
    pixels = decode_image(str(path))
    # Two rows of two tiles that touch, and a third column that is moved inwards.
    for top in (0, 48):
        for left in (0, 64):
            alone = model.scores(pixels[top : top + 48, left : left + 64])
            clear = found[:, top : top + 48, left : min(left + 64, 80)]
            np.testing.assert_allclose(clear, alone[..., : clear.shape[2]], atol=1e-4)
    assert np.array_equal(tiled(path), found.argmax(0))
    assert np.array_equal(tiled.masks([pixels])[0], tiled(path))


def read_png(path) -> np.ndarray:
    image = Image.open(path)
    assert image.mode == "I;16"
    return np.asarray(image)


@pytest.mark.parametrize("tile", [[], ["--tile", "48x64"]])
def test_probabilities_confidence_and_counts(trained, street, tmp_path, tile):
    size = {"tile": tile[1]} if tile else {}
    one = fastseg.load(trained, device="cpu", dtype="fp32", **size)
    words = [trained, street / "val", "--out", tmp_path / "out", "--csv", tmp_path / "out" / "counts.csv", *tile]
    assert invoke(*words, "--write", "index", "--confidence", "--probabilities", "png")[0] == 0
    assert invoke(*words[: -2 - len(tile)], *tile, "--write", "color", "--probabilities", "npy")[0] == 0
    with (tmp_path / "out" / "counts.csv").open(newline="") as file:
        rows = list(csv.DictReader(file))
    assert [row["image"] for row in rows] == sorted(path.stem for path in (street / "val").iterdir())
    for row in rows:
        name = row["image"]
        scores = one.scores(street / "val" / f"{name}.png").astype(np.float64)
        wanted = np.exp(scores - scores.max(0))
        wanted /= wanted.sum(0)
        assert wanted.max() > 0.2
        array = np.load(tmp_path / "out" / "probabilities" / f"{name}.npy")
        assert (array.dtype, array.shape) == (np.float16, (11, 96, 144))
        # Another batch rounds otherwise: of this much, and of half a step of each format.
        rounding = 1e-4
        np.testing.assert_allclose(array, wanted, atol=rounding + 2**-12)
        for number, label in enumerate(one.classes):
            values = read_png(tmp_path / "out" / "probabilities" / f"{number:02}-{label}" / f"{name}.png")
            np.testing.assert_allclose(values / 65535, wanted[number], atol=rounding)
        confidence = read_png(tmp_path / "out" / "confidence" / f"{name}.png")
        np.testing.assert_allclose(confidence / 65535, wanted.max(0), atol=rounding)
        mask = np.asarray(Image.open(tmp_path / "out" / "index" / f"{name}.png"))
        assert [int(row[label]) for label in one.classes] == np.bincount(mask.ravel(), minlength=11).tolist()
        assert int(row["pixels"]) == 96 * 144


def test_a_folder_in_tiles_with_files_that_are_none(trained, street, tmp_path):
    folder = tmp_path / "in"
    folder.mkdir()
    photo = Image.open(sorted((street / "val").iterdir())[0])
    photo.save(folder / "b.png")
    photo.save(folder / "d.tif", compression="tiff_lzw")
    photo.crop((0, 0, 7, 5)).save(folder / "e.png")
    (folder / "a.png").write_bytes(b"")
    (folder / "c.png").write_bytes((folder / "b.png").read_bytes()[:-500])
    code, out, err = invoke(trained, folder, "--out", tmp_path / "out", "--tile", "48x64", "--overlap", 5, "--json")
    assert (code, json.loads(out)["images"]) == (1, 3)
    assert [sum(f"{name}.png: cannot be decoded" in line for line in err.splitlines()) for name in "ac"] == [1, 1]
    one = fastseg.load(trained, device="cpu", dtype="fp32", tile="48x64", tile_overlap=5)
    for name in ("b.png", "d.tif", "e.png"):
        mask = one(folder / name)
        results = [Image.open(tmp_path / "out" / kind / f"{name[0]}.png") for kind in ("index", "color", "overlay")]
        assert np.array_equal(np.asarray(results[0]), mask)
        assert np.array_equal(np.asarray(results[1].convert("RGB")), np.array(one.colors, np.uint8)[mask])
        colors = np.array(one.colors, np.uint8)[mask]
        assert np.array_equal(np.asarray(results[2]), decode_image(str(folder / name)) // 2 + colors // 2)
    assert not list((tmp_path / "out").rglob("*.partial"))


def test_a_large_tiff_is_predicted_piece_by_piece(trained, street, tmp_path, monkeypatch):
    photo = Image.open(sorted((street / "val").iterdir())[0])
    photo.save(tmp_path / "whole.tif")
    photo.save(tmp_path / "large.tif", compression="tiff_adobe_deflate", strip_size=6000)
    words = [trained, tmp_path / "whole.tif", "--out", tmp_path / "out", "--tile", "32x64", "--probabilities", "npy"]
    assert invoke(*words)[0] == 0
    monkeypatch.setattr("fastseg.data.tiff.MAX_PIXELS", 96 * 144 - 1)
    monkeypatch.setattr("fastseg.predict.decode_image", None)  # which is not called
    words[1] = tmp_path / "large.tif"
    assert invoke(*words)[0] == 0
    for pattern in ("index/{}.png", "color/{}.png", "overlay/{}.png", "probabilities/{}.npy"):
        files = [tmp_path / "out" / pattern.format(name) for name in ("whole", "large")]
        assert files[0].read_bytes() == files[1].read_bytes()
    # A piece that cannot be decoded is found on the way: nothing is left of the image, and the command goes on.
    last = Image.open(tmp_path / "large.tif").tag_v2[273][-1]  # where the last strip begins
    with (tmp_path / "large.tif").open("r+b") as file:
        file.seek(last)
        file.write(b"\xff" * 100)
    code, _, err = invoke(*words, "--overwrite")
    assert (code, "large.tif: cannot be decoded: " in err) == (1, True)
    assert not list((tmp_path / "out").rglob("*.partial"))


def test_results_take_no_images_place(trained, street, tmp_path):
    photo = Image.open(sorted((street / "val").iterdir())[0])
    (tmp_path / "index").mkdir()
    photo.save(tmp_path / "index" / "a.png")
    before = (tmp_path / "index" / "a.png").read_bytes()
    words = [trained, tmp_path / "index", "--write", "index", "--overwrite"]
    code, _, err = invoke(*words, "--out", tmp_path)
    assert (code, "index/a.png would be written over the image" in err) == (2, True)
    code, _, err = invoke(*words, "--out", tmp_path / "out", "--csv", tmp_path / "index" / "a.png")
    assert (code, "index/a.png: a name that ends in .csv says what to write" in err) == (2, True)
    assert (tmp_path / "index" / "a.png").read_bytes() == before
    (tmp_path / "counts.csv").write_text("mine")
    words = [trained, tmp_path / "index", "--out", tmp_path / "out", "--csv", tmp_path / "counts.csv"]
    code, _, err = invoke(*words)
    assert (code, "counts.csv exists: give another name, or --overwrite" in err) == (2, True)


def test_no_two_results_have_the_same_name():
    classes = ["a/b", "a b", "00-a", "..", "ä" * 200, ""]
    jobs = ["x", "x.0", "00-a_b/x", "png/x", "probabilities/x", "index/x"]
    kinds = [*KINDS, "confidence", "png", "npy"]
    paths = [path for job in jobs for path in targets(Path("out"), job, kinds, classes).values()]
    assert len({os.path.normpath(path).lower() for path in paths}) == len(paths) == 6 * (4 + len(classes) + 1)
    assert all(os.path.normpath(path).startswith("out/") and len(part) < 250 for path in paths for part in path.parts)
