import io
import struct
import zlib

import numpy as np
import pytest
from PIL import Image

from fastseg.data.headers import Header, dali_obstacle, read_header, read_headers
from fastseg.data.layouts import Pair


@pytest.fixture
def pair(png):
    """pair("a", image pixels, label pixels): a written pair."""

    def write(stem, image, label):
        return Pair(stem, str(png(f"{stem}.png", image)), str(png(f"{stem}_L.png", label)))

    return write


def blank(height, width, *channels):
    return np.zeros((height, width, *channels), np.uint8)


def test_a_jpeg_is_known_by_its_signature(tmp_path, pair):
    image = Image.fromarray(blank(3, 5, 3))
    for kind in ("JPEG", "PNG"):
        found = pair("a", blank(3, 5, 3), blank(3, 5))
        image.save(found.image, format=kind)  # under the name of a PNG
        assert read_header(found).jpeg == (kind == "JPEG")


def test_a_header_has_heights_widths_and_modes(pair):
    assert read_header(pair("a", blank(3, 5, 3), blank(3, 5))) == Header((3, 5), (3, 5), "RGB", "L", (), None)
    assert read_header(pair("b", blank(2, 7), blank(2, 7, 3))) == Header((2, 7), (2, 7), "L", "RGB", (), None)
    assert read_header(pair("c", blank(2, 2, 4), np.zeros((2, 2), np.uint16))).image_mode == "RGBA"
    assert read_header(pair("c", blank(2, 2, 3), np.zeros((2, 2), np.uint16))).label_mode == "I;16"


def test_sizes_that_differ_are_a_problem_of_the_label(pair):
    made = pair("a", blank(3, 5, 3), blank(5, 3))
    problem = read_header(made).problem
    assert problem.file == made.label
    assert problem.problem == "image 5x3, label 3x5 (width x height): they must be equal"


def test_a_jpeg_label_is_a_problem_also_under_the_name_of_a_png(pair):
    made = pair("a", blank(8, 8, 3), blank(8, 8))
    Image.new("L", (8, 8)).save(made.label, format="JPEG")
    problem = read_header(made).problem
    assert problem.file == made.label
    assert "is a JPEG" in problem.problem
    # An image may be one.
    made = pair("b", blank(8, 8, 3), blank(8, 8))
    Image.new("RGB", (8, 8)).save(made.image, format="JPEG")
    assert read_header(made).problem is None


@pytest.mark.parametrize("side", ["image", "label"])
@pytest.mark.parametrize("content", [None, b"", b"no picture", b"\x89PNG\r\n\x1a\n\0\0\0"])
def test_a_file_that_cannot_be_read_is_named_not_raised(pair, tmp_path, side, content):
    made = pair("a", blank(2, 2, 3), blank(2, 2))
    path = tmp_path / getattr(made, side).rpartition("/")[2]
    path.unlink()
    if content is not None:
        path.write_bytes(content)
    problem = read_header(made).problem
    assert problem.file == str(path)
    assert problem.problem.startswith("cannot be read: ")
    assert "\n" not in problem.problem


def test_headers_come_in_the_order_of_the_pairs(pair):
    pairs = [pair(f"p{i}", blank(i + 1, 2, 3), blank(i + 1, 2)) for i in range(40)]
    assert [header.image_size for header in read_headers(pairs, 4)] == [(i + 1, 2) for i in range(40)]


@pytest.mark.parametrize(
    ("image", "label", "is_color", "named"),
    [
        ("RGB", "L", False, None),
        ("L", "L", False, None),
        ("RGB", "RGB", True, None),
        ("RGB", "P", False, "label"),
        ("RGB", "I;16", False, "label"),
        ("RGB", "RGB", False, "label"),
        ("RGB", "L", True, "label"),
        ("RGB", "RGBA", True, "label"),
        ("RGBA", "L", False, "image"),
        ("P", "RGB", True, "image"),
    ],
)
def test_dali_reads_rgb_and_grey_images_grey_indices_and_rgb_colours_only(image, label, is_color, named):
    fine = Header((1, 1), (1, 1), "RGB", "RGB" if is_color else "L")
    pairs = [Pair("ok", "ok.png", "ok_L.png"), Pair("x", "image.png", "label.png")]
    obstacle = dali_obstacle(pairs, [fine, Header((1, 1), (1, 1), image, label)], is_color)
    if named is None:
        assert obstacle is None
    else:
        assert f"{named}.png (mode {image if named == 'image' else label})" in obstacle


@pytest.mark.parametrize("side", [50_000, 9_500])
@pytest.mark.filterwarnings("ignore::PIL.Image.DecompressionBombWarning")
def test_a_header_that_claims_a_monstrous_size_is_a_problem_of_its_file(pair, tmp_path, side):
    """Pillow refuses the larger one as a decompression bomb, with an error that is no OSError, and loads the other."""
    made = pair("a", blank(2, 2, 3), blank(2, 2))
    data = bytearray((tmp_path / "a.png").read_bytes())
    data[16:24] = struct.pack(">II", side, side)  # IHDR's width and height
    data[29:33] = struct.pack(">I", zlib.crc32(data[12:29]))
    (tmp_path / "a.png").write_bytes(data)
    assert read_header(made).problem.file == made.image
    assert "pixels" in read_header(made).problem.problem


def test_a_tiff_that_is_to_be_turned_is_refused_as_pillow_would_turn_it(pair, tmp_path):
    made = pair("a", blank(3, 5, 3), blank(3, 5))
    picture = Image.open(made.image)
    for orientation, problem in ((0, None), (1, None), (6, "cannot be read: a TIFF that is to be turned")):
        exif = Image.Exif()
        exif[0x0112] = orientation
        picture.save(made.image, format="TIFF", exif=exif)
        found = read_header(made).problem
        assert found is None if problem is None else found.problem.startswith(problem)


PIXELS = np.random.default_rng(0).integers(0, 256, (24, 36, 3), np.uint8)


def kinds_of_image():
    """Name -> (the bytes of a picture, the tier that `auto` shall choose)."""
    image = Image.fromarray(PIXELS)
    ways = {
        **dict.fromkeys(("PNG", "JPEG", "BMP", "TIFF", "WEBP", "PPM", "MPO"), "dali"),
        **dict.fromkeys(("GIF", "AVIF", "JPEG2000", "TGA", "PCX", "SGI", "QOI", "DDS"), "reference"),
    }
    Image.init()
    for kind, loader in ways.items():
        if kind in Image.SAVE:  # Pillow may lack a library
            yield kind, saved(image, kind), loader
    yield "WEBP, lossless", saved(image, "WEBP", lossless=True), "dali"
    yield "WEBP, animated", saved(image, "WEBP", save_all=True, append_images=[Image.new("RGB", image.size)]), "dali"
    yield "TIFF, packed", saved(image, "TIFF", compression="tiff_lzw"), "dali"
    yield "PPM, in digits", f"P3\n36 24\n255\n{' '.join(map(str, PIXELS.ravel().tolist()))}".encode(), "reference"
    yield "PPM, 4 bits", b"P6\n36 24\n15\n" + (PIXELS >> 4).tobytes(), "reference"
    bits = np.arange(24 * 36, dtype="<u2")
    head = struct.pack(
        "<2sIHHIIiiHHIIiiII", b"BM", 54 + bits.nbytes, 0, 0, 54, 40, 36, 24, 1, 16, 0, bits.nbytes, 0, 0, 0, 0
    )
    yield "BMP, 15 bits", head + bits.tobytes(), "reference"


def saved(image, kind, **how):
    file = io.BytesIO()
    image.save(file, kind, **how)
    return file.getvalue()


@pytest.mark.parametrize(("data", "loader"), [pytest.param(*rest, id=name) for name, *rest in kinds_of_image()])
def test_a_format_goes_to_the_tier_that_reads_it(png, tmp_path, data, loader):
    pytest.importorskip("nvidia.dali")
    from fastseg.pipelines.source import choose_loader, make_tier
    from fastseg.specs import open_specs

    for name, pixels in (("train/a", PIXELS), ("train/b", PIXELS), ("trainannot/a", PIXELS[..., 0] % 11)):
        png(f"{name}.png", pixels)
    png("trainannot/b.png", PIXELS[..., 0] % 11)
    (tmp_path / "train" / "b.png").write_bytes(data)
    spec = open_specs(str(tmp_path), splits=("train",), size=(24, 36), threads=1)[1]["train"]
    spec, choice = choose_loader("auto", spec)
    assert choice.value == loader
    if loader == "reference":
        assert f"DALI would not read {tmp_path}/train/b.png to its values (it is a " in choice.why
    images, _ = next(make_tier(spec).decode([np.array([0, 1])], 2, resize_labels=False))
    with Image.open(tmp_path / "train" / "b.png") as image:
        wanted = np.array(image.convert("RGB"))
    np.testing.assert_array_equal(images[1].numpy(), wanted)
