"""Faults of label files: the right classes, or one line with the file, in all tiers and before the first step."""

import json
import re

import numpy as np
import pytest
from PIL import Image

LOADERS = ("auto", "reference", "cache")  # dali refuses what it would misread: see the rows
TINY = ["--recipe", "fast", "--size", "32x48", "--epochs", "1", "--batch", "2", "--set", "model.depth=1"]


def values(path) -> np.ndarray:
    return np.array(Image.open(path))


def refused(call, folder, code=1) -> str:
    """The one line by which training refuses a data set, before it has begun."""
    got, out, err = call("train", "--data", folder, *TINY, "--run", "run")
    assert (got, out) == (code, "")
    assert err.startswith("fastseg: ")
    assert err.count("\n") == 1
    assert not (folder.parent / "run").exists()
    return err.removeprefix("fastseg: ")


def errors_of_check(call, folder) -> list[str]:
    code, out, _ = call("data", "check", folder, "--json")
    found = [f"{e['file']}: {e['problem']}" for e in json.loads(out)["errors"]]
    assert code == (1 if found else 0)
    return found


def test_palette_labels(copy_of, read_by, call, row, street):
    folder, labels = copy_of("palette")
    palette = np.random.default_rng(0).integers(0, 256, 768).tolist()
    for path in labels:
        picture = Image.fromarray(values(path))
        picture.putpalette(palette)
        picture.save(path)
        assert Image.open(path).mode == "P"
    for loader in LOADERS:
        for a, b in zip(read_by(folder, loader), read_by(street, loader), strict=True):
            np.testing.assert_array_equal(a, b)
    assert errors_of_check(call, folder) == []
    says = call("train", "--data", folder, *TINY, "--loader", "dali")[2]
    assert f"DALI would misread {labels[0]} (mode P)" in says
    row("label PNG in palette mode (index = class)", "reads the index, whatever the palette, in all tiers", "-")


def test_16_bit_labels(copy_of, read_by, call, row, street):
    folder, labels = copy_of("deep")
    for path in labels:
        Image.fromarray(values(path).astype(np.uint16)).save(path)
        assert Image.open(path).mode == "I;16"
    for loader in LOADERS:
        np.testing.assert_array_equal(read_by(folder, loader)[1], read_by(street, loader)[1])
    assert errors_of_check(call, folder) == []
    row("16-bit grey label PNG", "reads the same ids in all tiers", "-")


@pytest.mark.parametrize("bits", [1, 2, 4])
def test_labels_of_less_than_8_bits(copy_of, read_by, call, row, street, write_png, bits):
    folder, labels = copy_of("shallow")
    same, same_labels = copy_of("same")
    for path, plain in zip(labels, same_labels, strict=True):
        few = values(path) % 2**bits
        write_png(path, few, bits)
        Image.fromarray(few).save(plain)
    for loader in LOADERS:
        np.testing.assert_array_equal(read_by(folder, loader)[1], read_by(same, loader)[1])
    assert errors_of_check(call, folder) == []
    row(f"{bits}-bit grey label PNG (Pillow and DALI stretch it to 0 to 255)", "reads the ids as they are", "-")


def save_as_pgm(path, pixels, head: str) -> None:
    """By hand: Pillow writes no other range than 0 to 255. P2 is in digits, P5 in bytes."""
    height, width = pixels.shape
    words = f"{head[:2]} {width} {height} {head[2:]}\n".encode()
    digits = "\n".join(" ".join(map(str, line)) for line in pixels.tolist()).encode()
    wide = pixels.astype(">u2") if int(head[2:]) > 255 else pixels.astype(np.uint8)
    path.write_bytes(words + (digits if head.startswith("P2") else wide.tobytes()))


LOSSLESS = {
    "tif": [{}, *({"compression": how} for how in ("tiff_lzw", "tiff_adobe_deflate", "packbits"))],
    "bmp": [{}],
    "gif": [{"optimize": False}],
    "webp": [{"lossless": True, "exact": True}],
    "tga": [{}, {"compression": "tga_rle"}],
    "pcx": [{}],
    "sgi": [{}],
    "qoi": [{}],
    "pgm": ["P5 255", "P5 11", "P5 12", "P5 200", "P5 1000", "P5 65535", "P2 255", "P2 11", "P2 1000"],
}


@pytest.mark.parametrize("suffix", LOSSLESS)
def test_labels_in_other_lossless_formats(copy_of, read_by, call, row, street, suffix):
    folder, labels = copy_of("other")
    for number, path in enumerate(labels):
        how, pixels = LOSSLESS[suffix][number % len(LOSSLESS[suffix])], values(path)
        if isinstance(how, str):
            save_as_pgm(path.with_suffix(".pgm"), pixels, how)
        else:
            picture = Image.fromarray(pixels)
            (picture.convert("RGB") if suffix in ("webp", "qoi") else picture).save(
                path.with_suffix(f".{suffix}"), **how
            )
        path.unlink()
    for loader in LOADERS:
        for a, b in zip(read_by(folder, loader), read_by(street, loader), strict=True):
            np.testing.assert_array_equal(a, b)
    assert errors_of_check(call, folder) == []
    if suffix == "pgm":
        row(
            "labels as TIFF, BMP, GIF, lossless WebP, TGA, PCX, SGI, QOI or PGM (whose largest value may be 11)",
            "reads the ids as they are, in all tiers",
        )


def test_labels_in_formats_that_keep_no_values(copy_of, call, row):
    folder, labels = copy_of("lossy")
    ways = [("jp2", {}), ("webp", {"quality": 90}), ("avif", {}), ("tif", {"compression": "jpeg"}), ("jpg", {})]
    for path, (suffix, how) in zip(labels, ways, strict=False):
        Image.fromarray(values(path)).convert("RGB").save(path.with_suffix(f".{suffix}"), **how)
        path.unlink()
    found = errors_of_check(call, folder)
    assert len(found) == len(ways)
    assert all("need not keep values as they are" in line and line.endswith("; save labels as PNG") for line in found)
    row(
        "labels as lossy WebP, JPEG 2000, AVIF, or TIFF with JPEG inside",
        re.sub("[0-9]+ grey values: [^)]*", "N grey values: ...", next(line for line in found if ".webp" in line)),
        "save labels as PNG",
    )


def test_jpeg_labels(copy_of, call, row):
    folder, labels = copy_of("jpeg")
    Image.fromarray(values(labels[2])).save(labels[2], format="JPEG", quality=90)
    says = refused(call, folder)
    assert says.startswith(f"{labels[2]}: is a JPEG, which need not keep values as they are (it holds ")
    assert errors_of_check(call, folder) == [says.strip()]
    row("label saved as JPEG, under the name of a PNG", says.replace(str(folder), "street"), "save labels as PNG")


def test_a_pixel_of_an_unknown_colour(call, row, tmp_path):
    call("data", "synth", "kaggle", "--layout", "kaggle", "--train", 4, "--val", 2, "--size", "48x64")
    folder = tmp_path / "kaggle"
    label = sorted((folder / "train_labels").iterdir())[1]
    pixels = values(label)
    pixels[7, 30] = (1, 2, 3)
    Image.fromarray(pixels).save(label)
    says = refused(call, folder)
    assert says.startswith(f"{label}: colour (1, 2, 3) is not in the class map: 1 pixel, the first at x=30 y=7; ")
    assert errors_of_check(call, folder) == [says.strip()]
    assert call("train", "--data", folder, *TINY, "--unknown-colours", "void")[0] == 0
    row("colour label with one pixel of an unknown colour", says, "mend the label, or `--unknown-colours void`")


def test_values_beyond_the_map(copy_of, call, row):
    folder, labels = copy_of("values")
    pixels = values(labels[3])
    pixels[5, 7:10], pixels[6, 1], pixels[6, 2] = 12, 200, 255
    Image.fromarray(pixels).save(labels[3])
    says = refused(call, folder)
    assert says.startswith(
        f"{labels[3]}: value 12 is not in the class map: 3 pixels, the first at x=7 y=5; also 200, 255; "
        "allowed are 0 to 11; "
    )
    assert errors_of_check(call, folder) == [says.strip()]
    row("label values 12, 200, 255 where the map ends at 11", says, "mend the label, or map the values in dataset.toml")


def test_a_label_smaller_than_its_image(copy_of, call, row):
    folder, labels = copy_of("small")
    for path in labels[:2]:
        Image.fromarray(values(path)[:-2, :-2]).save(path)
    says = refused(call, folder)
    assert says.startswith(f"{labels[0]}: image 144x96, label 142x94 (width x height): they must be equal (and 1 more")
    pairs = [f"{path}: image 144x96, label 142x94 (width x height): they must be equal" for path in labels[:2]]
    assert errors_of_check(call, folder) == pairs
    row("label 2 pixels smaller than its image", says, "`fastseg data check` lists all of them")


def test_an_orphan_on_each_side(copy_of, call, row):
    folder, labels = copy_of("orphans")
    image, label = folder / "train" / labels[0].name, labels[5]
    label.rename(label.with_name("other.png"))
    image.rename(image.with_name("another.png"))
    found = errors_of_check(call, folder)
    orphans = [f"{file}: no label of that name" for file in (image.parent / label.name, image.parent / "another.png")]
    orphans += [f"{file}: no image of that name" for file in (labels[0], label.parent / "other.png")]
    assert [error for error in found if not error.startswith(f"{folder}/train.txt: names ")] == sorted(orphans)
    code, _, err = call("train", "--data", folder, *TINY)
    assert code == 0
    assert "6 to train, 4 to validate; 6 files left out, see `fastseg data check`" in err
    row("as many labels as images, one of each without partner", found[0], "pairs are made by name, never by place")


def cut(data: bytes) -> bytes:
    return data[: len(data) // 2]


@pytest.mark.parametrize(
    ("fault", "problem", "broken"),
    [
        ("truncated PNG", "cannot be decoded: image file is truncated", cut),
        ("empty file", "cannot be read: it is empty", lambda data: b""),
        ("text as .png", "cannot be read: it is no image", lambda data: b"not found\n" * 20),
    ],
)
@pytest.mark.parametrize("side", ["train", "trainannot"])
def test_one_unreadable_file(copy_of, call, row, fault, problem, broken, side):
    folder, labels = copy_of("broken")
    path = folder / side / labels[6].name
    path.write_bytes(broken(path.read_bytes()))
    code, _, err = call("train", "--data", folder, *TINY)
    says = err.splitlines()[-1].removeprefix("fastseg: ")
    assert code == 1
    assert says == f"{path}: {problem}"
    assert errors_of_check(call, folder) == [says]
    kind = "image" if side == "train" else "label"
    row(f"{fault}, as {kind}", says, "`fastseg data check` lists all of them in one run")


def test_a_void_label_in_a_batch_of_its_own(copy_of, call, row, tmp_path):
    folder, labels = copy_of("void")
    for path in labels[2:]:
        path.unlink()
    Image.fromarray(np.full_like(values(labels[0]), 11)).save(labels[0])
    changes = ["--batch", "1", "--set", "runtime.log_every=1"]
    code, _, err = call("train", "--data", folder, *TINY, *changes, "--run", "run")
    assert code == 0, err
    events = [json.loads(line) for line in (tmp_path / "run" / "log.jsonl").read_text().splitlines()]
    lines = [event for event in events if event["event"] == "train"]
    assert sorted(line["loss"] > 0 for line in lines) == [False, True]  # an epoch, in whatever order
    assert [line["void_steps"] for line in lines] in ([0, 1], [1, 1])
    assert "  1 step all void  " in err
    row("label entirely void, alone in its batch", "loss 0, no gradient; the log counts `1 step all void`", "-")


def test_a_class_that_no_training_label_has(copy_of, call, row, tmp_path):
    folder, labels = copy_of("absent")
    for path in labels:
        pixels = values(path)
        pixels[pixels == 8] = 3  # cars become road
        Image.fromarray(pixels).save(path)
    code, _, err = call("train", "--data", folder, *TINY, "--run", "run")
    assert code == 0
    (says,) = (line for line in err.splitlines() if line.startswith("loss "))
    assert says.endswith(", 0 for absent Car")
    start = json.loads((tmp_path / "run" / "log.jsonl").read_text().splitlines()[0])
    assert [entry["weight"] for entry in start["classes"] if entry["name"] == "Car"] == [0.0]
    row("class absent from the training labels", says, "its weight is 0; `fastseg data stats` shows all weights")
