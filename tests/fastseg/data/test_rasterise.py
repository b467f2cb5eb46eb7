import base64
import io
import json
from fractions import Fraction
from pathlib import Path

import made_folders as made
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

from fastseg.data import shapes
from fastseg.data.init import guess
from fastseg.data.rasterise import rasterise
from fastseg.errors import FastsegError, UsageError


def whole(region: shapes.Region, height: int, width: int) -> np.ndarray:
    """A region as bool[height, width]."""
    found = np.zeros((height, width), bool)
    h, w = region.inside.shape
    found[region.top : region.top + h, region.left : region.left + w] = region.inside
    return found


def by_rays(points: list[tuple[int, int]], height: int, width: int) -> np.ndarray:
    """The even-odd rule with fractions: a ray to the left from each pixel's centre, and the edges that it crosses."""
    found = np.zeros((height, width), bool)
    for row in range(height):
        y = Fraction(2 * row + 1, 2)
        crossings = [
            x0 + (y - y0) * Fraction(x1 - x0, y1 - y0)
            for (x0, y0), (x1, y1) in zip(points, points[1:] + points[:1], strict=True)
            if min(y0, y1) < y < max(y0, y1)  # no corner has a row's centre as its y
        ]
        for column in range(width):
            found[row, column] = sum(x <= Fraction(2 * column + 1, 2) for x in crossings) % 2
    return found


POINTS = st.tuples(st.integers(-4, 14), st.integers(-4, 11))


@settings(deadline=None)
@given(st.lists(POINTS, min_size=3, max_size=7))
def test_polygons_are_the_even_odd_rule_at_pixel_centres(points):
    # Thirds of a pixel more on x, so that no edge runs through a centre but by rounding.
    array = np.array(points, float) + np.array([1 / 3, 0])
    exact = [(x + Fraction(1, 3), Fraction(y)) for x, y in points]
    expected = by_rays(exact, 8, 10)
    nudged = [by_rays([(x + nudge, y) for x, y in exact], 8, 10) for nudge in (Fraction(1, 10**9), Fraction(-1, 10**9))]
    certain = (nudged[0] == expected) & (nudged[1] == expected)
    found = whole(shapes.polygon(array, 8, 10), 8, 10)
    np.testing.assert_array_equal(found[certain], expected[certain])


def test_polygons_that_share_an_edge_share_no_pixel():
    left = shapes.polygon(np.array([(0, 0), (5.5, 0), (3.5, 6), (0, 6)], float), 6, 9)
    right = shapes.polygon(np.array([(5.5, 0), (9, 0), (9, 6), (3.5, 6)], float), 6, 9)
    np.testing.assert_array_equal(whole(left, 6, 9) ^ whole(right, 6, 9), np.ones((6, 9), bool))
    assert not (whole(left, 6, 9) & whole(right, 6, 9)).any()


def test_a_box_holds_the_pixels_whose_centres_it_holds():
    assert whole(shapes.box(1, 1, 3, 2, 4, 5), 4, 5).astype(int).tolist() == [
        [0, 0, 0, 0, 0],
        [0, 1, 1, 0, 0],
        [0, 0, 0, 0, 0],
        [0, 0, 0, 0, 0],
    ]
    # Corners in any order; from 0.5 on the first centre is in, up to 2.5 the third is not.
    assert whole(shapes.box(2.5, 9, 0.5, -1, 2, 4), 2, 4).astype(int).tolist() == [[1, 1, 0, 0]] * 2


def test_a_circle_and_a_turned_ellipse():
    # Centres at most 1.5 from (2, 2): (+-0.5, +-0.5) and (+-0.5, +-1.5 -> 1.58) no.
    assert whole(shapes.ellipse(2, 2, 1.5, 1.5, 0, 4, 4), 4, 4).sum() == 4
    flat = whole(shapes.ellipse(5, 5, 4, 1, 0, 10, 10), 10, 10)
    turned = whole(shapes.ellipse(5, 5, 4, 1, 90, 10, 10), 10, 10)
    assert 8 <= flat.sum() <= 4 * np.pi + 4
    np.testing.assert_array_equal(turned, flat.T)


def test_a_turned_box_turns_clockwise():
    # The corner on the right, turned by a quarter as seen (y down), comes below.
    corners = shapes.turned_box(0, 2, 8, 4, 90)
    assert sorted(map(tuple, corners.round(9).tolist())) == [(3, -1), (3, 7), (5, -1), (5, 7)]
    assert corners[1].round(9).tolist() == [5, 7]


# Encoded by pycocotools 2.0.11: a 3x2 block and a pixel in 5x4, and a 40x40 block with a hole in 60x50.
SMALL = np.zeros((5, 4), bool)
SMALL[1:4, 1:3] = SMALL[0, 3] = True
LARGE = np.zeros((60, 50), bool)
LARGE[10:50, 5:45] = True
LARGE[20:25, 7:9] = False


@pytest.mark.parametrize(
    ("text", "expected"), [("6320ON3", SMALL), ("f9X1d000ROA??AA???" + "0" * 70 + "R9", LARGE)], ids=["small", "large"]
)
def test_cocos_compressed_runs(text, expected):
    found = shapes.runs(shapes.unpack_counts(text), *expected.shape, by_column=True)
    np.testing.assert_array_equal(found, expected)


def test_runs_are_of_rows_or_columns():
    assert shapes.runs([1, 2, 3], 2, 3, by_column=False).astype(int).tolist() == [[0, 1, 1], [0, 0, 0]]
    assert shapes.runs([1, 2, 3], 2, 3, by_column=True).astype(int).tolist() == [[0, 1, 0], [1, 0, 0]]
    with pytest.raises(ValueError, match="do not make up 3x2 pixels"):
        shapes.runs([1, 2], 2, 3, by_column=True)


@pytest.mark.parametrize("make", made.POLYGONS, ids=lambda make: make.__name__)
def test_each_tools_polygons_become_the_masks_that_were_drawn(call, tmp_path, make):
    root = tmp_path / "own"
    make(root)
    code, out, err = call("data", "rasterise", root, root / "masks")
    assert (code, err) == (0, "")
    masks = sorted((root / "masks").rglob("*.png"))
    assert len(masks) == (5 if make is made.labelme else 6)
    for path in masks:
        with Image.open(path) as file:
            assert file.mode == "L"  # DALI reads no palettes
            np.testing.assert_array_equal(np.array(file), made.indices())
    assert (root / "masks" / "classes.txt").read_text() == "background\ncar\nroad\n"
    # 4 x 4 pixels of each car lie under a road.
    covered = 16 * len(masks)
    assert f"overlaps: in {len(masks)} masks later shapes cover {covered} pixels of earlier ones" in out
    assert f"next: fastseg data init {root}" in out
    if make is made.labelme:
        assert "note: images without an annotation, which got no mask: 1\n" in out
        assert "note: shapes without an inside, left out: line: 5\n" in out
    # And what is there now is a data set to `data init`.
    found = guess(root, root, 2)
    assert [(row.name, row.values) for row in found.classes] == [("background", [0]), ("car", [1]), ("road", [2])]
    assert found.masks == len(masks)


def labelme_with(root: Path, *rows: dict, size: tuple[int, int] = (made.HEIGHT, made.WIDTH), name: str = "a") -> Path:
    made.save(root, f"{name}.png", made.photo(0))
    document = {"imagePath": f"{name}.png", "imageHeight": size[0], "imageWidth": size[1], "shapes": list(rows)}
    (root / f"{name}.json").write_text(json.dumps(document), encoding="utf-8")
    return root


def test_labelmes_own_names_and_shapes(tmp_path):
    bits = io.BytesIO()
    Image.fromarray(np.array([[255, 0], [255, 255]], np.uint8)).save(bits, format="PNG")
    root = labelme_with(
        tmp_path / "own",
        {"label": "cat", "points": [[0, 0], [10, 10]], "shape_type": "rectangle"},
        {"label": "_background_", "points": [[0, 0], [5, 5]], "shape_type": "rectangle"},
        {"label": "__ignore__", "points": [[8, 8], [10, 10]], "shape_type": "rectangle"},
        {"label": "ant", "points": [[20, 20], [20, 21.5]], "shape_type": "circle"},
        {
            "label": "bee",
            "points": [[30, 2], [31, 3]],
            "shape_type": "mask",
            "mask": base64.b64encode(bits.getvalue()).decode(),
        },
    )
    done = rasterise(root, root / "masks", 1)
    assert done.classes == ("background", "ant", "bee", "cat")  # LabelMe has no list: by name
    expected = np.zeros((made.HEIGHT, made.WIDTH), np.uint8)
    expected[:10, :10] = 3
    expected[:5, :5] = 0
    expected[8:10, 8:10] = 255
    expected[19:21, 19:21] = 1
    expected[2, 30] = expected[3, 30] = expected[3, 31] = 2
    np.testing.assert_array_equal(np.array(Image.open(root / "masks" / "a.png")), expected)
    assert (done.overlapping, done.covered) == (1, 25 + 4)


def test_cvats_mask_and_turned_box(tmp_path):
    made.save(tmp_path, "a.png", made.photo(0))
    (tmp_path / "a.xml").write_text(
        f'<annotations><image id="0" name="a.png" width="{made.WIDTH}" height="{made.HEIGHT}">'
        '<mask label="x" rle="1, 2, 3" left="5" top="7" width="3" height="2" z_order="0"></mask>'
        '<box label="y" xtl="20" ytl="10" xbr="28" ybr="12" rotation="90" z_order="0"/></image></annotations>'
    )
    rasterise(tmp_path, tmp_path / "masks", 1)
    expected = np.zeros((made.HEIGHT, made.WIDTH), np.uint8)
    expected[7, 6:8] = 1
    expected[7:15, 23:25] = 2
    np.testing.assert_array_equal(np.array(Image.open(tmp_path / "masks" / "a.png")), expected)


def box_of(label: str = "cat") -> dict:
    return {"label": label, "points": [[0, 0], [5, 5]], "shape_type": "rectangle"}


def test_images_are_found_by_their_names_end(tmp_path):
    for split in ("train", "test"):
        made.save(tmp_path, f"{split}/images/1.png", made.photo(0))
    annotations = tmp_path / "annotations"
    annotations.mkdir()
    for split in ("train", "test"):
        document = {
            "images": [{"id": 1, "file_name": f"{split}/images/1.png"}, {"id": 2, "file_name": "gone.png"}],
            "annotations": [{"image_id": 1, "category_id": 1, "segmentation": [[0, 0, 9, 0, 9, 9]]}],
            "categories": [{"id": 1, "name": split}],
        }
        (annotations / f"{split}.json").write_text(json.dumps(document))
    done = rasterise(tmp_path, tmp_path / "masks", 2)
    assert done.missing == ("gone.png", "gone.png")
    assert done.classes == ("background", "test", "train")
    assert np.array(Image.open(tmp_path / "masks" / "train" / "1.png")).max() == 2
    assert np.array(Image.open(tmp_path / "masks" / "test" / "1.png")).max() == 1


BOMB = '<!DOCTYPE a [<!ENTITY b "ha">]><annotations><image name="&b;"/></annotations>'


def coco_with(category: int, segmentation: object) -> str:
    """COCO's instances: one, in an image, of a file that knows category 1."""
    row = {"image_id": 1, "category_id": category, "segmentation": segmentation}
    images, categories = [{"id": 1, "file_name": "a.png"}], [{"id": 1, "name": "x"}]
    return json.dumps({"images": images, "categories": categories, "annotations": [row]})


REFUSED = {
    "half a JSON": (lambda root: (root / "b.json").write_text('{"shapes": ['), r"b\.json: no JSON, or not all of one"),
    "deep JSON": (lambda root: (root / "b.json").write_text("[" * 100_000), r"b\.json: (no JSON|brackets nested)"),
    "half an XML": (lambda root: (root / "b.xml").write_text("<annotations><i"), r"b\.xml: no XML, or not all of one"),
    "entities": (lambda root: (root / "b.xml").write_text(BOMB), r"b\.xml: has a <!DOCTYPE>, which no annotation has"),
    "two points": (
        lambda root: labelme_with(root, {"label": "x", "points": [[0, 0], [1, 1]], "shape_type": "polygon"}, name="b"),
        r"b\.json: not as LabelMe, COCO or CVAT write it \(ValueError: a polygon wants three points or more\)",
    ),
    "no numbers": (
        lambda root: (root / "b.json").write_text('{"imagePath": "b.png", "shapes": [{"points": [[NaN, 1], [1, 2]], '
                                                  '"label": "x", "shape_type": "rectangle"}]}'),
        r"b\.json: not as .* \(ValueError: coordinates must be numbers\)",
    ),
    "an unknown category": (
        lambda root: (root / "b.json").write_text(
            coco_with(2, [[0, 0, 9, 9, 9, 0]])
        ),
        r"b\.json: not as LabelMe, COCO or CVAT write it \(KeyError: 2\)",
    ),
    "runs of a huge image": (
        lambda root: (root / "b.json").write_text(
            coco_with(1, {"size": [10**6, 10**6], "counts": [10**12]})
        ),
        r"b\.json: not as .* \(ValueError: 1000000x1000000 are more than",
    ),
    "a number without end": (
        lambda root: (root / "b.json").write_text('{"imagePath": "b.png", "imageHeight": 1e999, "imageWidth": 1, '
                                                  '"shapes": []}'),
        r"b\.json: not as .* \(OverflowError",
    ),
    "another size": (
        lambda root: labelme_with(root, box_of(), size=(10, 20), name="b"),
        r"b\.png: is 48x32, and .*b\.json was drawn on 20x10 \(width x height\): give the image that was annotated",
    ),
    "two annotations": (
        lambda root: (root / "z.json").write_text((root / "a.json").read_text()),
        r"a\.png: has annotations in .*a\.json and .*z\.json: keep one",
    ),
    "two images of a mask": (
        lambda root: (labelme_with(root, box_of(), name="b"), made.save(root, "b.jpg", made.photo(0)),
                      (root / "c.json").write_text((root / "b.json").read_text().replace("b.png", "b.jpg"))),
        r"b\.png: would have the same mask as b\.jpg: rename one",
    ),
    "an image that is none": (
        lambda root: (labelme_with(root, box_of(), name="b"), (root / "b.png").write_bytes(b"x")),
        r"b\.png: cannot be read: it is no image",
    ),
}  # fmt: skip


@pytest.mark.parametrize("what", REFUSED)
def test_what_is_wrong_is_one_line_and_nothing_is_left(call, tmp_path, what):
    make, message = REFUSED[what]
    root = labelme_with(tmp_path / "own", box_of())
    make(root)
    with pytest.raises(FastsegError, match=message) as error:
        rasterise(root, root / "masks", 2)
    assert "\n" not in str(error.value)
    assert call("data", "rasterise", root, root / "masks")[0] == 1
    assert [path for path in root.iterdir() if path.is_dir()] == []


def test_a_photo_that_is_to_be_turned_is_named(tmp_path):
    root = labelme_with(tmp_path / "own", box_of(), size=(made.WIDTH, made.HEIGHT))
    tags = Image.Exif()
    tags[0x0112] = 6
    made.photo(0).save(root / "a.png", exif=tags)
    with pytest.raises(FastsegError, match="it has an EXIF orientation: save it upright"):
        rasterise(root, root / "masks", 1)


def test_wrong_use_is_told(call, tmp_path):
    root = tmp_path / "own"
    root.mkdir()
    assert "no annotations found: looked for LabelMe's and COCO's .json" in call("data", "rasterise", root, "masks")[2]
    labelme_with(root, box_of())
    (tmp_path / "there").mkdir()
    code, _, err = call("data", "rasterise", root, tmp_path / "there")
    assert (code, err) == (2, f"fastseg: {tmp_path}/there exists: give a new folder, or remove it\n")
    assert "no folder" in call("data", "rasterise", tmp_path / "gone", "masks")[2]
    (root / "a.png").unlink()
    code, _, err = call("data", "rasterise", root, "masks")
    assert (code, "none of the 1 annotated images is here, such as a.png" in err) == (1, True)
    with pytest.raises(UsageError):
        rasterise(root, tmp_path / "there", 1)


def test_a_disk_that_fails_leaves_nothing(tmp_path, monkeypatch):
    root = labelme_with(tmp_path / "own", box_of())

    def full(*_, **__):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(Image.Image, "save", full)
    with pytest.raises(FastsegError, match=r"could not be written \(No space left on device\); nothing is"):
        rasterise(root, root / "masks", 1)
    assert sorted(path.name for path in root.iterdir()) == ["a.json", "a.png"]


def test_the_document_says_what_was_done(call, tmp_path):
    root = labelme_with(tmp_path / "own", box_of())
    code, out, _ = call("data", "rasterise", root, tmp_path / "masks", "--json")
    assert code == 0
    document = json.loads(out)
    assert document["classes"] == ["background", "cat"]
    assert (document["masks"], document["tools"], document["covered"]) == (1, {"LabelMe": 1}, 0)
