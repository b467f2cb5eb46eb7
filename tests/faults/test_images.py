"""Faults of image files and of what is done with them: one rule for all tiers, and for `predict`."""

import json
import zlib

import numpy as np
import pytest
from PIL import Image

from fastseg.data.classes import VOID
from fastseg.data.decode import decode_image
from fastseg.data.layouts import find
from fastseg.pipelines.plan import Plan
from fastseg.pipelines.resize import resize_image, resize_label
from fastseg.pipelines.source import MEAN, STD, choose_loader, make_tier
from fastseg.specs import open_specs

TINY = ["--recipe", "fast", "--size", "32x48", "--epochs", "1", "--batch", "2", "--set", "model.depth=1"]
SIZE = (96, 144)
RNG = np.random.default_rng(0)


def noise(*shape: int, bits: int = 8) -> np.ndarray:
    return RNG.integers(0, 2**bits, (*SIZE, *shape), np.uint16 if bits > 8 else np.uint8)


def read_alike(folder, read_by, wanted) -> None:
    """All tiers that take the data set, and `predict`, read its first image as `wanted`."""
    image = find(folder).splits["train"][0].image
    np.testing.assert_array_equal(decode_image(image), wanted)
    for loader in ("auto", "reference", "cache"):
        pixels = read_by(folder, loader)[0][0].transpose(1, 2, 0) * np.array(STD) + np.array(MEAN)
        np.testing.assert_allclose(pixels, wanted, atol=0.01)


@pytest.mark.parametrize(
    ("kind", "pixels", "bits", "wanted"),
    [
        ("16-bit RGB", noise(3, bits=16), 16, lambda p: p >> 8),
        ("16-bit grey", noise(bits=16), 16, lambda p: np.stack([p >> 8] * 3, axis=2)),
        ("16-bit grey + alpha", noise(2, bits=16), 16, lambda p: np.stack([p[..., 0] >> 8] * 3, axis=2)),
        ("16-bit RGBA", noise(4, bits=16), 16, lambda p: p[..., :3] >> 8),
        ("8-bit grey", noise(), 8, lambda p: np.stack([p] * 3, axis=2)),
        ("8-bit grey + alpha", noise(2), 8, lambda p: np.stack([p[..., 0]] * 3, axis=2)),
        ("8-bit RGBA", noise(4), 8, lambda p: p[..., :3]),
        ("4-bit grey", noise() >> 4, 4, lambda p: np.stack([p * 17] * 3, axis=2)),
    ],
)
def test_kinds_of_png(copy_of, read_by, row, write_png, kind, pixels, bits, wanted):
    folder, labels = copy_of("kinds")
    write_png(folder / "train" / labels[0].name, pixels, bits)
    read_alike(folder, read_by, wanted(pixels))
    rule = "the upper 8 bits" if bits == 16 else "the same picture"
    row(f"{kind} PNG as image", f"{rule} as RGB, alpha dropped, equal in all tiers and in `predict`")


@pytest.mark.parametrize("mode", ["CMYK", "L"])
def test_kinds_of_jpeg(copy_of, read_by, row, mode):
    folder, labels = copy_of("kinds")
    path = folder / "train" / labels[0].name
    Image.fromarray(noise(3)).convert(mode).save(path, format="JPEG", quality=90)
    read_alike(folder, read_by, np.array(Image.open(path).convert("RGB")))
    row(f"{mode} JPEG as image", "converted to RGB, equal in all tiers and in `predict`")


def test_pixels_of_32_bits(copy_of, call, row):
    folder, labels = copy_of("float")
    path = folder / "train" / labels[0].name
    Image.fromarray(noise().astype(np.float32)).save(path, format="TIFF")
    says = f"{path}: cannot be decoded: pixels of 32 bits (mode F): save it with 8 or 16"
    code, _, err = call("train", "--data", folder, *TINY)
    assert (code, err.splitlines()[-1]) == (1, f"fastseg: {says}")
    assert f"error: {says}" in call("data", "check", folder)[1]
    row("image of 32-bit numbers", says, "save it with 8 or 16 bits")


@pytest.mark.filterwarnings("ignore::PIL.Image.DecompressionBombWarning")
def test_pictures_that_are_too_large(copy_of, call, row, write_png):
    folder, labels = copy_of("large")
    path = write_png(folder / "train" / labels[0].name, np.zeros((1, 1), np.uint8), 8)
    data = bytearray(path.read_bytes())
    data[16:24] = (12_000).to_bytes(4, "big") + (9_000).to_bytes(4, "big")  # what the header claims
    data[29:33] = zlib.crc32(data[12:29]).to_bytes(4, "big")
    path.write_bytes(data)
    says = f"{path}: cannot be read: 12000x9000 are more than 89478485 pixels: cut it into parts"
    assert call("train", "--data", folder, *TINY)[::2] == (1, f"fastseg: {says}\n")
    assert f"error: {says}" in call("data", "check", folder)[1]
    row("image of 108 million pixels, or a small file that claims so", says, "cut it into parts")


def turned(path, size: tuple[int, int]) -> None:
    picture = Image.fromarray(RNG.integers(0, 256, (*size, 3), np.uint8))
    exif = picture.getexif()
    exif[0x0112] = 6  # to be shown a quarter turn clockwise
    picture.save(path, format="JPEG", exif=exif)


def test_exif_orientation(copy_of, call, read_by, row):
    folder, labels = copy_of("turned")
    path = folder / "train" / labels[0].name
    turned(path, SIZE)
    read_alike(folder, read_by, np.array(Image.open(path)))  # Pillow turns nothing
    code, out, _ = call("data", "check", folder)
    says = f"{path}: has an EXIF orientation, which is not applied"
    assert code == 0
    assert f"warning: {says}: --exif apply turns it, or save it and its label upright\n" in out
    assert "; EXIF orientations (1) are not applied" in call("train", "--data", folder, *TINY)[2]
    cure = "label what is stored; or label what viewers show, and give `--exif apply`; or save the picture upright"
    row("JPEG with EXIF orientation", says, cure)


def test_exif_orientation_whose_label_was_turned(copy_of, call, row):
    folder, labels = copy_of("turned")
    turned(folder / "train" / labels[0].name, SIZE[::-1])
    says = (
        f"{labels[0]}: image 96x144, label 144x96 (width x height): they must be equal; an EXIF orientation is not "
        "applied: --exif apply, or save both upright"
    )
    assert call("train", "--data", folder, *TINY)[::2] == (1, f"fastseg: {says}\n")
    assert f"error: {says}\n" in call("data", "check", folder)[1]
    assert "0 errors, 0 warnings" in call("data", "check", folder, "--exif", "apply")[1]
    assert "; EXIF orientations (1) are applied" in call("train", "--data", folder, "--exif", "apply", *TINY)[2]
    row("JPEG with EXIF orientation, its label drawn after turning", says, "`--exif apply`, or save both upright")


def test_translation_uncovers_void(copy_of, row):
    folder, labels = copy_of("five")
    for path in labels:
        Image.fromarray(np.full(SIZE, 5, np.uint8)).save(path)
    _, specs = open_specs(str(folder), splits=("train",), size="96x144")
    plan = Plan(num_samples=8, batch=8, seed=0, mirror=True, max_shift=(8, 8))
    for loader in ("dali", "reference", "cache"):
        _, found = next(iter(make_tier(choose_loader(loader, specs["train"])[0]).train(plan, 0, 0, 1)))
        assert set(np.unique(found.numpy())) == {5, VOID}
    row("an all-Tree label is moved by up to 8 pixels", "Tree and void, in all tiers, never class 0")


def test_resizing_makes_no_classes_and_moves_no_edge(row):
    for edge in range(20, 117):
        label = np.full((10, 137), 3, np.uint8)
        label[:, edge:] = 9
        small = resize_label(label, (10, 100))  # 137 / 100 = 1.37
        assert set(np.unique(small)) == {3, 9}
        image = np.repeat(np.where(label == 3, 0, 255).astype(np.uint8)[..., None], 3, axis=2)
        # Where brightness crosses one half, between the centres of pixels, and where the label changes.
        line = resize_image(image, (10, 100))[0, :, 0].astype(float)
        at = int(np.argmax(line >= 127.5))
        crossing = at - (line[at] - 127.5) / (line[at] - line[at - 1]) + 0.5
        assert abs(int(np.argmax(small[0] == 9)) - crossing) <= 0.5 + 1e-6
    row("a two-class label resized by 1.37", "the same two classes, edges within half a pixel of the image's")


def test_predict_names_what_it_cannot_read(copy_of, call, row, tmp_path):
    folder, _ = copy_of("street")
    assert call("train", "--data", folder, *TINY, "--run", "run")[0] == 0
    images = sorted((folder / "val").iterdir())
    images[1].write_bytes(images[1].read_bytes()[:500])
    code, _, err = call("predict", "run/checkpoints/best.pt", folder / "val", "--out", "out", "--json")
    says = f"{images[1]}: cannot be decoded: image file is truncated"
    assert code == 1
    assert says in err
    assert len(list((tmp_path / "out" / "index").iterdir())) == len(images) - 1
    row("one truncated file among those to predict", says, "the others are written; exit code 1")
    assert json.loads(call("data", "check", folder, "--json")[1])["errors"][0]["file"] == str(images[1])


def test_predictions_in_place_of_their_images(copy_of, call, row):
    folder, _ = copy_of("street")
    assert call("train", "--data", folder, *TINY, "--run", "run")[0] == 0
    (folder / "train").rename(folder / "index")
    code, _, err = call("predict", "run/checkpoints/best.pt", folder / "index", "--out", folder, "--overwrite")
    says = err.strip().removeprefix("fastseg: ")
    assert (code, "would be written over the image" in says) == (2, True)
    row("predict with an --out that would replace its images", says, "another --out")
