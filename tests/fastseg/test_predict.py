"""Prediction: the same classes as evaluation, for every kind of image, and what becomes of files that are none."""

import json
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
from fastseg.distributed import World
from fastseg.errors import FastsegError, UsageError
from fastseg.evaluation import score
from fastseg.predict import find_images
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
    assert {job.name.split("/")[0] for job in named} >= {"train", "val"}
    with pytest.raises(UsageError, match="no image there"):
        find_images([str(tmp_path / "*.png")])
    with pytest.raises(UsageError, match="would both become"):
        find_images([str(files[0]), str(street / "val")])
