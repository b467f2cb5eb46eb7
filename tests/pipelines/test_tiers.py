"""All tiers give the same pixels: DALI (here on the CPU), the cache, and the reference."""

import importlib.util
import itertools
import re
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
import torchvision
from PIL import Image, ImageOps

from fastseg.config import Size
from fastseg.data.classes import CAMVID_32, VOID, ClassMap, camvid_colored, camvid_indexed
from fastseg.data.headers import read_headers
from fastseg.data.layouts import Pair, find
from fastseg.data.scene import draw_scene
from fastseg.errors import FastsegError, UsageError
from fastseg.pipelines.fit import rooms_of
from fastseg.pipelines.plan import BatchPlan, Plan, Rooms
from fastseg.pipelines.resize import resize_image, resize_label
from fastseg.pipelines.source import (
    MEAN,
    STD,
    Spec,
    TrainSource,
    choose_loader,
    evaluation_batches,
    make_tier,
    normalise,
)

COLORS = np.array([color for color, _ in CAMVID_32.values()], np.uint8)


@pytest.fixture(params=["reference", "dali", "cache"])
def loader(request):
    if request.param == "dali":
        pytest.importorskip("nvidia.dali")
    return request.param


def make_spec(pairs, classes, size, **given) -> Spec:
    fixed = {"device": torch.device("cpu"), "dtype": torch.float32, "threads": 2}
    given = {"headers": read_headers(pairs, 2), **fixed, **given}
    return Spec(pairs=pairs, classes=classes, size=size, **given)


def make_pairs(folder: Path, sizes, colored=False, seed=0) -> list[Pair]:
    """Pairs of pure noise, the hardest content for a resize: one per (height, width)."""
    rng, pairs = np.random.default_rng(seed), []
    for i, size in enumerate(sizes):
        pair = Pair(f"v_{i:03}", str(folder / f"v_{i:03}.png"), str(folder / f"v_{i:03}_L.png"))
        Image.fromarray(rng.integers(0, 256, (*size, 3), np.uint8)).save(pair.image, compress_level=1)
        label = COLORS[rng.integers(0, 32, size)] if colored else rng.integers(0, 12, size, np.uint8)
        Image.fromarray(label).save(pair.label, compress_level=1)
        pairs.append(pair)
    return pairs


def make_plan(count, batch, **given) -> Plan:
    return Plan(**{"num_samples": count, "batch": batch, "seed": 1, "mirror": True, "max_shift": (10, 10), **given})


def take(loader, spec, plan, steps, start=0, rank=0, world=1):
    """The first batches as (uint8 images, labels), copied to NumPy."""
    stream = make_tier(replace(spec, loader=loader)).train(plan, start, rank, world)
    return [(pixels(images), labels.numpy().copy()) for images, labels in itertools.islice(stream, steps)]


def pixels(images_BCHW: torch.Tensor) -> np.ndarray:
    """uint8[B, H, W, 3] of normalised images."""
    found = images_BCHW.permute(0, 2, 3, 1).numpy() * np.array(STD) + np.array(MEAN)
    assert np.abs(found - np.rint(found)).max() < 0.01
    return np.rint(found).astype(np.uint8)


def assert_tiers_agree(spec, plan, steps):
    pytest.importorskip("nvidia.dali")
    for loader in ("dali", "cache"):
        for (images, labels), (other_images, other_labels) in zip(
            take(loader, spec, plan, steps), take("reference", spec, plan, steps), strict=True
        ):
            assert labels.dtype == other_labels.dtype == np.uint8
            assert images.shape == other_images.shape == (plan.batch, *(spec.crop or spec.size), 3)
            np.testing.assert_array_equal(labels, other_labels)
            assert np.abs(images.astype(int) - other_images).max() <= 1


@pytest.mark.parametrize("colored", [False, True], ids=["indexed", "colored"])
@pytest.mark.parametrize(
    ("files", "size"),
    [
        ([(48, 64)] * 6, (48, 64)),
        ([(48, 64)] * 6, (24, 32)),
        ([(48, 64)] * 6, (96, 128)),
        ([(48, 64)] * 6, (31, 45)),
        ([(48, 64)] * 6, (64, 31)),
        ([(45, 61)] * 6, (23, 31)),
        ([(48, 64), (45, 61), (24, 32), (24, 31), (23, 32), (90, 40)], (24, 32)),
    ],
)
def test_tiers_agree_on_noise(tmp_path, files, size, colored):
    spec = make_spec(make_pairs(tmp_path, files, colored), camvid_colored() if colored else camvid_indexed(), size)
    assert_tiers_agree(spec, make_plan(6, 4), steps=4)


@pytest.mark.parametrize("file", [(48, 64), (45, 61)])
def test_tiers_agree_on_crops(tmp_path, file):
    spec = make_spec(make_pairs(tmp_path, [file] * 6), camvid_indexed(), (48, 64), crop=(32, 24))
    assert_tiers_agree(spec, make_plan(6, 4, max_crop=(16, 40)), steps=4)


ENCODINGS = {
    "png": {"format": "PNG"},
    "jpeg": {"format": "JPEG", "quality": 90},  # 4:2:0: half of the columns and rows have colours of their own
    "4:2:2": {"format": "JPEG", "quality": 90, "subsampling": 1},
    "4:4:4": {"format": "JPEG", "quality": 90, "subsampling": 0},
    "progressive": {"format": "JPEG", "quality": 90, "progressive": True},
}


def encode(pairs, encoding, grey=False) -> list[Pair]:
    """The same pairs, their images in one of ENCODINGS, whatever their names."""
    for pair in pairs:
        image = Image.open(pair.image)
        (image.convert("L") if grey else image).save(pair.image, **ENCODINGS[encoding])
    return pairs


@pytest.mark.parametrize("colored", [False, True], ids=["indexed", "colored"])
@pytest.mark.parametrize("encoding", ENCODINGS)
@pytest.mark.parametrize(("file", "crop"), [((67, 101), (32, 24)), ((64, 96), (33, 47)), ((40, 40), (40, 8))])
def test_decoding_only_windows_gives_the_same_pixels(tmp_path, file, crop, encoding, colored):
    """Mirrored or not, at any place, and where a shift uncovers edges: the bits of whole images, cut."""
    pytest.importorskip("nvidia.dali")
    pairs = encode(make_pairs(tmp_path, [file] * 3, colored), encoding)
    spec = make_spec(pairs, camvid_colored() if colored else camvid_indexed(), file, crop=crop)
    room = (file[0] - crop[0], file[1] - crop[1])
    for shift in ((0, 0), (10, 10), (50, 60)):
        plan = make_plan(3, 32, max_shift=shift, max_crop=room)
        wanted, found = (take(loader, spec, plan, steps=2) for loader in ("reference", "dali"))
        for (images, labels), (wanted_images, wanted_labels) in zip(found, wanted, strict=True):
            np.testing.assert_array_equal(labels, wanted_labels)
            np.testing.assert_array_equal(images, wanted_images)


def test_grey_jpegs_are_decoded_in_windows_alike(tmp_path):
    pytest.importorskip("nvidia.dali")
    spec = make_spec(encode(make_pairs(tmp_path, [(67, 101)] * 3), "jpeg", grey=True), camvid_indexed(), (67, 101))
    plan = make_plan(3, 32, max_crop=(35, 77))
    wanted, found = (take(loader, replace(spec, crop=(32, 24)), plan, steps=2) for loader in ("reference", "dali"))
    np.testing.assert_array_equal(found[1][0], wanted[1][0])


@pytest.mark.parametrize(
    ("files", "size", "crop", "decoded"),
    [
        ([(48, 64)] * 3, (48, 64), (20, 30), (20, 30)),
        ([(48, 64)] * 3, (48, 64), None, (48, 64)),
        ([(48, 64)] * 3, (24, 32), (20, 30), (24, 32)),  # a resize looks at neighbours
        ([(48, 64), (48, 64), (40, 60)], (48, 64), (20, 30), (48, 64)),
    ],
)
def test_windows_are_decoded_where_nothing_is_resized(tmp_path, monkeypatch, files, size, crop, decoded):
    pytest.importorskip("nvidia.dali")
    tier = make_tier(make_spec(make_pairs(tmp_path, files), camvid_indexed(), size, crop=crop, loader="dali"))
    real, shapes = tier._pixels, []

    def watched(*args, **named):
        for lists in real(*args, **named):
            shapes.append([pixels.as_tensor().shape() for pixels in lists])
            yield lists

    monkeypatch.setattr(tier, "_pixels", watched)
    room = (size[0] - crop[0], size[1] - crop[1]) if crop else (0, 0)
    next(tier.train(make_plan(3, 16, max_crop=room), 0, 0, 1))
    assert shapes[0] == [[16, *decoded, 3], [16, *decoded, 1]]
    assert next(tier.decode([np.array([0])], 1, resize_labels=True))[0][0].shape == (*size, 3)  # whole


def rooms(spec) -> Rooms:
    return Rooms(rooms_of(spec.headers, spec.window, spec.size))


MIXED = [(48, 64), (45, 61), (24, 32), (24, 31), (23, 32), (90, 40)]


@pytest.mark.parametrize("colored", [False, True], ids=["indexed", "colored"])
@pytest.mark.parametrize(
    ("files", "size", "window"),
    [
        (MIXED, (20, 30), (20, 30)),  # of each file's own pixels
        (MIXED, (23, 31), (23, 31)),
        (MIXED, (32, 48), (32, 48)),  # most files are smaller
        (MIXED, (100, 100), (100, 100)),
        (MIXED, (10, 15), (20, 30)),
        (MIXED, (33, 47), (22, 31)),
        (MIXED, (21, 30), (32, 48)),
        (MIXED, (64, 99), (40, 62)),
    ],
)
def test_tiers_agree_on_windows_of_the_files_own_pixels(tmp_path, files, size, window, colored):
    classes = camvid_colored() if colored else camvid_indexed()
    spec = make_spec(make_pairs(tmp_path, files, colored), classes, Size(*size), window=Size(*window))
    assert_tiers_agree(spec, make_plan(len(files), 4, max_shift=(0, 0), max_crop=rooms(spec)), steps=6)


@pytest.mark.parametrize("encoding", ENCODINGS)
def test_windows_of_files_of_any_encoding_have_the_bits_of_whole_images(tmp_path, encoding):
    pytest.importorskip("nvidia.dali")
    pairs = encode(make_pairs(tmp_path, MIXED), encoding)
    spec = make_spec(pairs, camvid_indexed(), Size(30, 40), window=Size(30, 40))
    plan = make_plan(len(pairs), 32, max_shift=(0, 0), max_crop=rooms(spec))
    wanted, found = (take(loader, spec, plan, steps=2) for loader in ("reference", "dali"))
    for (images, labels), (wanted_images, wanted_labels) in zip(found, wanted, strict=True):
        np.testing.assert_array_equal(labels, wanted_labels)
        np.testing.assert_array_equal(images, wanted_images)


JITTER = {"scale": 2.5, "colour": 0.5}


def assert_tiers_agree_jittered(spec, plan, steps):
    """As `assert_tiers_agree`, of pixels that are no whole counts; a count off is twice that once it is recoloured."""
    pytest.importorskip("nvidia.dali")
    std = np.array(STD).reshape(3, 1, 1)
    first = {}
    for loader in ("reference", "dali", "cache"):
        stream = make_tier(replace(spec, loader=loader)).train(plan, 0, 0, 1)
        for step, (images, labels) in enumerate(itertools.islice(stream, steps)):
            images, labels = images.numpy() * std, labels.numpy().copy()
            assert images.shape == (plan.batch, 3, *(spec.crop or spec.size))
            wanted, wanted_labels = first.setdefault(step, (images, labels))
            np.testing.assert_array_equal(labels, wanted_labels)
            # Brightness and contrast multiply by up to 1.5 each, saturation and hue by less than 2 together.
            limit = 4.5 + 1e-3 if plan.colour else 1 + 1e-3
            assert np.abs(images - wanted).max() <= limit


@pytest.mark.parametrize(
    ("size", "how"),
    [
        ((24, 32), {}),
        ((50, 41), {"fit": "letterbox"}),
        ((48, 64), {"crop": Size(32, 24)}),
        ((50, 41), {"fit": "letterbox", "crop": Size(20, 30)}),
        ((21, 30), {"window": Size(32, 48)}),
        ((33, 47), {"window": Size(22, 31)}),
    ],
)
@pytest.mark.parametrize("colored", [False, True], ids=["indexed", "colored"])
@pytest.mark.parametrize("jitter", [{"scale": 2.5}, {"colour": 0.5}, JITTER], ids=str)
def test_tiers_agree_on_jittered_scales_and_colours(tmp_path, size, how, jitter, colored):
    classes = camvid_colored() if colored else camvid_indexed()
    spec = make_spec(make_pairs(tmp_path, MIXED, colored), classes, Size(*size), **how)
    given = {"max_shift": (0, 0), "max_crop": rooms(spec)} if spec.window else {}
    if spec.crop:
        given["max_crop"] = tuple(np.subtract(size, spec.crop).tolist())
    assert_tiers_agree_jittered(spec, make_plan(len(MIXED), 4, **given, **jitter), steps=4)


@pytest.mark.parametrize("fit", ["squeeze", "letterbox"])
def test_of_samples_that_are_kept_small_windows_are_cut_in_all_tiers_alike(tmp_path, fit):
    """Whether the reference resizes them anew or the cache kept them."""
    spec = make_spec(make_pairs(tmp_path, [(200, 160)] * 3 + [(45, 61)]), camvid_indexed(), Size(24, 32), fit=fit)
    spec = replace(spec, keep=spec.size)
    plan = make_plan(4, 4, **JITTER)
    for (images, labels), (wanted, wanted_labels) in zip(
        *(
            itertools.islice(make_tier(replace(spec, loader=loader)).train(plan, 0, 0, 1), 4)
            for loader in ("cache", "reference")
        ),
        strict=True,
    ):
        assert torch.equal(labels, wanted_labels)
        assert (images - wanted).abs().max() < 5 / 57


def test_jittered_samples_show_their_files_where_the_plan_says(loader, tmp_path):
    """Enlarged exactly twice or shrunk to a half, worked out with NumPy alone: by repeating and by taking means."""
    own, size = (24, 32), (24, 32)
    flat = [np.repeat(np.repeat(image, 2, 0), 2, 1) for image in np.random.default_rng(0).integers(0, 12, (3, 12, 16))]
    pairs = make_pairs(tmp_path, [own] * 3)
    for pair, label in zip(pairs, flat, strict=True):
        Image.fromarray(label.astype(np.uint8)).save(pair.label)
    spec = make_spec(pairs, camvid_indexed(), Size(*size))
    plan = Zoomed([(2.0, 0.5, 0.25), (0.5, 0.999, 0.0), (1.0, 0.3, 0.3)])
    ((_, labels),) = take(loader, spec, plan, steps=1)
    doubled = np.repeat(np.repeat(flat[0][6:18, 4:20], 2, 0), 2, 1)  # 13 x 17 places: 6 down, 4 to the right
    halved = np.full(size, 11)
    halved[12:, :16] = flat[1][1::2, 1::2]
    for label, wanted in zip(labels, (doubled, halved, flat[2]), strict=True):
        np.testing.assert_array_equal(label, np.where(wanted == 11, VOID, wanted))


class Zoomed:
    """A plan of one batch: a file each, at scales and places that are written out."""

    def __init__(self, zoom):
        self.num_samples, self.scale, self.colour = len(zoom), max(scale for scale, *_ in zoom), 0.0
        still = np.zeros((len(zoom), 2), np.int32)
        rows = np.arange(len(zoom)), np.zeros(len(zoom), bool), still, still, np.array(zoom)
        self.part = BatchPlan(*rows, np.empty((len(zoom), 0)))

    def shard(self, step, rank, world):
        return self.part


def test_windows_show_their_files_own_pixels_where_the_plan_says(loader, tmp_path):
    """By the file alone: cut out with NumPy, or, where it is smaller, put among black and void; mirrored by half."""
    pairs = make_pairs(tmp_path, MIXED)
    spec = make_spec(pairs, camvid_indexed(), Size(30, 40), window=Size(30, 40))
    plan = make_plan(len(pairs), 6, max_shift=(0, 0), max_crop=rooms(spec))
    places = set()
    for step, (images, labels) in enumerate(take(loader, spec, plan, steps=8)):
        part = plan.global_batch(step)
        for index, mirror, crop, image, label in zip(
            part.indices, part.mirror, part.crop.tolist(), images, labels, strict=True
        ):
            stored, raw = (np.array(Image.open(path)) for path in (pairs[index].image, pairs[index].label))
            raw = np.where(raw == 11, VOID, raw)
            cut, place = [], []
            for at, own, side in zip(crop, raw.shape, (30, 40), strict=True):
                assert at in range(abs(own - side) + 1)
                cut.append(slice(at, at + side) if own >= side else slice(None))
                place.append(slice(None) if own >= side else slice(at, at + own))
            wanted, wanted_label = np.zeros((30, 40, 3), np.uint8), np.full((30, 40), VOID, np.uint8)
            turn = (slice(None), slice(None, None, -1 if mirror else 1))
            wanted[*place], wanted_label[*place] = stored[*cut][turn], raw[*cut][turn]
            np.testing.assert_array_equal(image, wanted)
            np.testing.assert_array_equal(label, wanted_label)
            places.add((int(index), *crop))
    assert len(places) > 30  # of 48


def test_a_window_of_another_scale_is_resized_by_itself(loader, tmp_path):
    """As the definition of resizing has it for the window alone, without a look at what lies beside it."""
    pairs = make_pairs(tmp_path, MIXED[:2])
    spec = make_spec(pairs, camvid_indexed(), Size(20, 20), window=Size(40, 30))
    plan = make_plan(2, 6, mirror=False, max_shift=(0, 0), max_crop=rooms(spec))
    for step, (images, labels) in enumerate(take(loader, spec, plan, steps=4)):
        part = plan.global_batch(step)
        for index, (top, left), image, label in zip(part.indices, part.crop.tolist(), images, labels, strict=True):
            stored, raw = (np.array(Image.open(path)) for path in (pairs[index].image, pairs[index].label))
            cut = slice(top, top + 40), slice(left, left + 30)
            assert np.abs(image.astype(int) - resize_image(stored[cut], (20, 20))).max() <= 1
            wanted = resize_label(raw[cut], (20, 20))
            np.testing.assert_array_equal(label, np.where(wanted == 11, VOID, wanted))


@pytest.mark.parametrize("colored", [False, True], ids=["indexed", "colored"])
@pytest.mark.parametrize(
    ("size", "crop"), [((24, 32), None), ((50, 41), None), ((50, 41), (20, 30)), ((24, 32), (9, 9))]
)
def test_tiers_agree_on_letterboxed_images(tmp_path, size, crop, colored):
    classes = camvid_colored() if colored else camvid_indexed()
    spec = make_spec(make_pairs(tmp_path, MIXED, colored), classes, Size(*size), fit="letterbox")
    spec = replace(spec, crop=crop and Size(*crop))
    room = (size[0] - crop[0], size[1] - crop[1]) if crop else (0, 0)
    assert_tiers_agree(spec, make_plan(len(MIXED), 4, max_crop=room), steps=4)
    kept = replace(spec, keep=spec.size)
    for (images, labels), (other_images, other_labels) in zip(
        take("cache", kept, make_plan(len(MIXED), 4, max_crop=room), 4),
        take("reference", spec, make_plan(len(MIXED), 4, max_crop=room), 4),
        strict=True,
    ):
        np.testing.assert_array_equal(labels, other_labels)
        assert np.abs(images.astype(int) - other_images).max() <= 1


def test_letterboxed_images_lie_in_the_middle_of_black_and_void(loader, tmp_path):
    pairs = make_pairs(tmp_path, [(24, 32), (48, 32), (20, 80)])
    spec = make_spec(pairs, camvid_indexed(), Size(24, 32), fit="letterbox")
    # 24x16 of 24x32; 8x32 of 24x32
    boxes = [(slice(0, 24), slice(0, 32)), (slice(0, 24), slice(8, 24)), (slice(8, 16), slice(0, 32))]
    ((images, labels),) = take(loader, spec, make_plan(3, 3, mirror=False, max_shift=(0, 0)), steps=1)
    order = make_plan(3, 3).global_batch(0).indices
    for index, image, label in zip(order, images, labels, strict=True):
        stored, raw = (np.array(Image.open(path)) for path in (pairs[index].image, pairs[index].label))
        size = tuple(part.stop - part.start for part in boxes[index])
        wanted, wanted_label = np.zeros((24, 32, 3), int), np.full((24, 32), 11)
        wanted[boxes[index]], wanted_label[boxes[index]] = resize_image(stored, size), resize_label(raw, size)
        assert np.abs(image - wanted).max() <= 1
        np.testing.assert_array_equal(label, np.where(wanted_label == 11, VOID, wanted_label))
    chosen = replace(spec, loader=loader)
    (batch,) = evaluation_batches(chosen, 3, resize_labels=False)
    evaluated = pixels(batch.images)
    for index in range(3):
        np.testing.assert_array_equal(evaluated[index], images[order.tolist().index(index)])
    assert [label.shape for label in batch.labels] == [(24, 32), (48, 32), (20, 80)]
    (batch,) = evaluation_batches(chosen, 3, resize_labels=True)
    assert [label.shape for label in batch.labels] == [(24, 32), (24, 16), (8, 32)]


def turn(pairs, kind, **how) -> list[Pair]:
    """The same pairs, whose images, and every other label, are to be turned each in another way."""
    for number, pair in enumerate(pairs):
        exif = Image.Exif()
        exif[0x0112] = number % 8 + 1
        image = Image.open(pair.image)
        image.load()
        image.save(pair.image, format=kind, exif=exif, **how)
        with Image.open(pair.image) as again:
            size = ImageOps.exif_transpose(again).size
        label = Image.open(pair.label)
        label.load()
        if number % 2:
            label.save(pair.label, format="PNG", exif=exif)
        else:
            label.resize(size, Image.Resampling.NEAREST).save(pair.label, format="PNG")
    return pairs


@pytest.mark.parametrize("kind", [{"kind": "JPEG", "quality": 90}, {"kind": "PNG"}, {"kind": "WEBP"}])
@pytest.mark.parametrize(
    ("size", "how"),
    [
        ((45, 61), {}),
        ((24, 32), {"fit": "letterbox"}),
        ((20, 30), {"window": Size(20, 30)}),
        ((70, 8), {"window": Size(70, 8)}),
    ],
)
def test_tiers_agree_on_pictures_that_are_turned_upright(tmp_path, size, how, kind):
    pairs = turn(make_pairs(tmp_path, [(45, 61)] * 16), **kind)
    spec = make_spec(
        pairs, camvid_indexed(), Size(*size), upright=True, headers=read_headers(pairs, 2, upright=True), **how
    )
    assert {header.image_size for header in spec.headers} == {(45, 61), (61, 45)}
    assert [header.problem for header in spec.headers] == [None] * 16
    room = rooms(spec) if spec.window else (0, 0)
    assert_tiers_agree(spec, make_plan(16, 16, max_shift=(0, 0), max_crop=room), steps=2)
    assert_tiers_agree_jittered(spec, make_plan(16, 16, max_shift=(0, 0), max_crop=room, scale=2.0), steps=1)
    ((images, _),) = take(
        "reference",
        replace(spec, size=Size(61, 45), fit="squeeze", window=None),
        make_plan(16, 16, mirror=False, max_shift=(0, 0)),
        1,
    )
    order = make_plan(16, 16).global_batch(0).indices.tolist()
    for index in (4, 5, 6, 7, 12):  # of quarter turns, nothing is resized here
        with Image.open(pairs[index].image) as file:
            np.testing.assert_array_equal(images[order.index(index)], np.array(ImageOps.exif_transpose(file)))


@pytest.mark.gpu
@pytest.mark.parametrize("window", [None, Size(20, 30)])
def test_the_gpu_turns_pictures_as_the_reference_does(tmp_path, window):
    pytest.importorskip("nvidia.dali")
    pairs = turn(make_pairs(tmp_path, [(45, 61)] * 16), "PNG")
    headers, size = read_headers(pairs, 2, upright=True), window or Size(45, 61)
    spec = make_spec(pairs, camvid_indexed(), size, upright=True, headers=headers, window=window)
    plan = make_plan(16, 16, max_shift=(0, 0), max_crop=rooms(spec) if window else (0, 0))
    images, labels = next(make_tier(replace(spec, loader="dali", device=torch.device("cuda"))).train(plan, 0, 0, 1))
    ((wanted, wanted_labels),) = take("reference", spec, plan, steps=1)
    np.testing.assert_array_equal(labels.cpu().numpy(), wanted_labels)
    assert np.abs(pixels(images.cpu()).astype(int) - wanted).max() <= 1


@pytest.mark.gpu
@pytest.mark.parametrize(
    ("size", "how"),
    [
        ((20, 30), {"window": Size(20, 30)}),
        ((64, 99), {"window": Size(40, 62)}),
        ((100, 100), {"window": Size(100, 100)}),
        ((50, 41), {"fit": "letterbox"}),
    ],
)
@pytest.mark.parametrize("tier", ["dali", "cache"])
@pytest.mark.parametrize("scale", [1.0, 2.5])
def test_windows_and_letterboxed_images_on_the_gpu_agree_with_the_reference(tmp_path, tier, size, how, scale):
    if tier == "dali":
        pytest.importorskip("nvidia.dali")
    spec = make_spec(make_pairs(tmp_path, MIXED), camvid_indexed(), Size(*size), **how)
    plan = make_plan(6, 6, max_shift=(0, 0), max_crop=rooms(spec) if spec.window else (0, 0), scale=scale)
    batches = make_tier(replace(spec, loader=tier, device=torch.device("cuda"))).train(plan, 0, 0, 1)
    for (images, labels), (wanted, wanted_labels) in zip(batches, take("reference", spec, plan, steps=4), strict=False):
        np.testing.assert_array_equal(labels.cpu().numpy(), wanted_labels)
        assert np.abs(pixels(images.cpu()).astype(int) - wanted).max() <= 1


@pytest.mark.gpu
@pytest.mark.parametrize("tier", ["dali", "cache"])
def test_colours_on_the_gpu_are_those_of_the_reference(tmp_path, tier):
    if tier == "dali":
        pytest.importorskip("nvidia.dali")
    spec = make_spec(make_pairs(tmp_path, [(48, 64)] * 6), camvid_indexed(), Size(48, 64))
    plan = make_plan(6, 6, colour=0.5)
    found, wanted = (
        next(make_tier(replace(spec, loader=loader, device=torch.device(device))).train(plan, 0, 0, 1))
        for loader, device in ((tier, "cuda"), ("reference", "cpu"))
    )
    assert torch.equal(found[1].cpu(), wanted[1])
    assert (found[0].cpu() - wanted[0]).abs().max() < 1e-3 / min(STD)  # a GPU may add without a rounding in between


def test_the_number_of_threads_changes_no_pixel(loader, tmp_path):
    pairs = make_pairs(tmp_path, [(45, 61)] * 6)
    one, more = (
        take(loader, make_spec(pairs, camvid_indexed(), (24, 32), threads=threads), make_plan(6, 4), steps=5)
        for threads in (1, 3)
    )
    for found, wanted in zip(one, more, strict=True):
        np.testing.assert_array_equal(found[0], wanted[0])
        np.testing.assert_array_equal(found[1], wanted[1])


def test_tiers_agree_when_camvids_full_size_is_halved(tmp_path):
    spec = make_spec(make_pairs(tmp_path, [(720, 960)] * 2, colored=True), camvid_colored(), (360, 480))
    assert_tiers_agree(spec, make_plan(2, 2), steps=1)


@pytest.mark.parametrize(
    ("file", "size"),
    [
        ((360, 480), (300, 400)),
        ((360, 480), (263, 351)),
        ((360, 480), (375, 500)),
        # Many rows, few columns: sums of fp32 steps drift with the rows.
        ((720, 32), (540, 24)),
        ((960, 32), (720, 24)),
        ((32, 960), (24, 720)),
    ],
)
def test_tiers_agree_where_nearest_neighbours_tie(tmp_path, file, size):
    spec = make_spec(make_pairs(tmp_path, [file] * 2), camvid_indexed(), size)
    assert_tiers_agree(spec, make_plan(2, 2), steps=1)


def test_tiers_agree_on_grey_images_and_drawn_streets(tmp_path, street):
    pairs = make_pairs(tmp_path, [(48, 64)] * 2)
    for pair in pairs:
        Image.open(pair.image).convert("L").save(pair.image)
    assert_tiers_agree(make_spec(pairs, camvid_indexed(), (30, 40)), make_plan(2, 2), steps=2)
    data = find(street)
    spec = make_spec(data.splits["train"], data.classes, (64, 96))
    assert_tiers_agree(spec, make_plan(8, 8), steps=2)


@pytest.mark.camvid
@pytest.mark.parametrize("size", [(360, 480), (240, 320), (120, 160), (224, 299)])
def test_tiers_agree_on_camvid(camvid, size):
    data = find(camvid)
    pairs = data.splits["train"][::23][:16]
    assert len(pairs) == 16
    spec = make_spec(pairs, data.classes, size)
    assert spec.same_size == (size == (360, 480))
    assert_tiers_agree(spec, make_plan(16, 8), steps=2)


def no_jitter(count: int) -> tuple[np.ndarray, np.ndarray]:
    """A batch's rows of zooms and of colours where neither is jittered."""
    return np.empty((count, 0)), np.empty((count, 0))


class Given:
    """A plan of one batch that is written out: [(mirror, dy, dx), ...], all of file 0, cropped alike."""

    num_samples, scale = 1, 1.0

    def __init__(self, draws, crop=(0, 0)):
        self.part = BatchPlan(
            np.zeros(len(draws), int),
            np.array([mirror for mirror, _, _ in draws]),
            np.array([[dy, dx] for _, dy, dx in draws], np.int32),
            np.array([crop] * len(draws), np.int32),
            *no_jitter(len(draws)),
        )

    def shard(self, step, rank, world):
        return self.part


V = VOID
MOVES = [
    ((False, 0, 0), [[0, 1, 2, 3], [4, 5, 6, 7], [8, 9, 10, 11]]),
    ((True, 0, 0), [[3, 2, 1, 0], [7, 6, 5, 4], [11, 10, 9, 8]]),
    ((False, 1, 2), [[V, V, V, V], [V, V, 0, 1], [V, V, 4, 5]]),
    ((False, -1, -2), [[6, 7, V, V], [10, 11, V, V], [V, V, V, V]]),
    ((True, 1, -1), [[V, V, V, V], [2, 1, 0, V], [6, 5, 4, V]]),  # mirrored first, then moved left
    ((True, -2, 3), [[V, V, V, 11], [V, V, V, V], [V, V, V, V]]),
    ((False, 3, 0), [[V] * 4] * 3),
    ((True, -5, 9), [[V] * 4] * 3),
]


def test_shifts_move_down_and_right_after_mirroring_and_uncover_black_and_void_before_cropping(loader, tmp_path):
    numbers = np.arange(12, dtype=np.uint8).reshape(3, 4)
    pair = Pair("a", str(tmp_path / "a.png"), str(tmp_path / "l.png"))
    Image.fromarray(np.stack([numbers + 1, numbers + 101, numbers + 201], axis=2)).save(pair.image)
    Image.fromarray(numbers).save(pair.label)
    classes = ClassMap(tuple("abcdefghijkl"), ((0, 0, 0),) * 12, from_index={i: i for i in range(12)})
    moves = [move for move, _ in MOVES]
    for (top, left), size in (((0, 0), (3, 4)), ((1, 1), (2, 2)), ((0, 3), (3, 1)), ((2, 0), (1, 4))):
        spec = make_spec([pair], classes, (3, 4), crop=size)
        ((images, labels),) = take(loader, spec, Given(moves, (top, left)), steps=1)
        for image, label, (move, whole) in zip(images, labels, MOVES, strict=True):
            wanted = [row[left : left + size[1]] for row in whole[top : top + size[0]]]
            assert label.tolist() == wanted, move
            for channel, first in enumerate((1, 101, 201)):
                black = [[0 if value == V else first + value for value in row] for row in wanted]
                assert image[..., channel].tolist() == black, move


def test_a_bright_pixel_moves_by_its_shift_whatever_the_resize(loader, tmp_path):
    """Doubled in size, mirrored and moved by (3, -4): the shift counts pixels of the network's input."""
    pair = Pair("a", str(tmp_path / "a.png"), str(tmp_path / "l.png"))
    image, label = np.full((8, 10, 3), 50, np.uint8), np.ones((8, 10), np.uint8)
    image[2, 6], label[2, 6] = 250, 5
    Image.fromarray(image).save(pair.image)
    Image.fromarray(label).save(pair.label)
    spec = make_spec([pair], camvid_indexed(), (16, 20))
    ((images, labels),) = take(loader, spec, Given([(True, 3, -4)]), steps=1)
    # Rows 4, 5 and columns 12, 13 of 16x20; mirrored columns 6, 7; moved rows 7, 8 and columns 2, 3.
    assert np.argwhere(labels[0] == 5).tolist() == [[7, 2], [7, 3], [8, 2], [8, 3]]
    assert np.argwhere(images[0, ..., 1] > 150).tolist() == [[7, 2], [7, 3], [8, 2], [8, 3]]
    assert (labels[0] == VOID).sum() == 3 * 20 + 13 * 4
    assert (images[0] == 0).all(axis=2).sum() == 3 * 20 + 13 * 4


def test_dalis_buffers_become_tensors_without_a_copy(tmp_path, monkeypatch):
    pytest.importorskip("nvidia.dali")
    tier = make_tier(make_spec(make_pairs(tmp_path, [(6, 8)] * 2), camvid_indexed(), (6, 8), loader="dali"))
    real, places = tier._pixels, []

    def watched(*args, **named):
        for lists in real(*args, **named):
            places.append([pixels.as_tensor().data_ptr() for pixels in lists])
            yield lists

    monkeypatch.setattr(tier, "_pixels", watched)
    images, labels = next(tier.decode([np.array([1, 0])], 2, resize_labels=True))
    assert [images[0].data_ptr(), labels[0].data_ptr()] == places[0]
    assert [image.shape for image in images] == [(6, 8, 3)] * 2


def test_normalise_is_imagenets_and_channels_last():
    pixels = torch.from_numpy(np.random.default_rng(0).integers(0, 256, (2, 5, 7, 3), np.uint8))
    out = normalise(pixels, torch.float32)
    wanted = torchvision.transforms.functional.normalize(
        pixels.permute(0, 3, 1, 2) / 255, mean=[0.485, 0.456, 0.406], std=[0.229, 0.224, 0.225]
    )
    torch.testing.assert_close(out, wanted, atol=1e-5, rtol=1e-5)
    assert out.shape == (2, 3, 5, 7)
    assert out.is_contiguous(memory_format=torch.channels_last)
    half = normalise(pixels, torch.bfloat16)
    torch.testing.assert_close(half, wanted.bfloat16(), atol=0.02, rtol=0)
    assert half.is_contiguous(memory_format=torch.channels_last)


def test_batches_are_normalised_pixels_with_their_indices(loader, tmp_path):
    spec = make_spec(make_pairs(tmp_path, [(24, 32)] * 5), camvid_indexed(), (24, 32))
    plan = make_plan(5, 4, mirror=False, max_shift=(0, 0))
    batch = next(iter(TrainSource(replace(spec, loader=loader), plan)))
    assert batch.indices.tolist() == plan.global_batch(0).indices.tolist()
    stored = np.stack([np.array(Image.open(spec.pairs[i].image)) for i in batch.indices])
    wanted = (stored - np.array([123.675, 116.28, 103.53])) / np.array([58.395, 57.12, 57.375])
    np.testing.assert_allclose(batch.images.numpy(), wanted.transpose(0, 3, 1, 2), atol=1e-5)
    raw = np.stack([np.array(Image.open(spec.pairs[i].label)) for i in batch.indices])
    np.testing.assert_array_equal(batch.labels.numpy(), np.where(raw == 11, VOID, raw))


def test_starting_at_a_step_is_slicing_the_stream(loader, tmp_path):
    spec = make_spec(make_pairs(tmp_path, [(24, 32)] * 5), camvid_indexed(), (20, 30))
    whole = take(loader, spec, make_plan(5, 2), steps=7)
    later = take(loader, spec, make_plan(5, 2), steps=3, start=4)
    for one, other in zip(whole[4:], later, strict=True):
        np.testing.assert_array_equal(one[0], other[0])
        np.testing.assert_array_equal(one[1], other[1])


def test_ranks_interleave_to_the_batch_of_one_device(loader, tmp_path):
    spec = make_spec(make_pairs(tmp_path, [(24, 32)] * 6), camvid_indexed(), (20, 30))
    whole = take(loader, spec, make_plan(6, 4), steps=3)
    parts = [take(loader, spec, make_plan(6, 4), steps=3, rank=rank, world=2) for rank in range(2)]
    for step, (images, labels) in enumerate(whole):
        for rank in range(2):
            np.testing.assert_array_equal(images[rank::2], parts[rank][step][0])
            np.testing.assert_array_equal(labels[rank::2], parts[rank][step][1])


def test_a_batch_keeps_its_pixels_while_later_ones_are_made(loader, tmp_path):
    spec = make_spec(make_pairs(tmp_path, [(24, 32)] * 6), camvid_indexed(), (24, 32))
    stream = make_tier(replace(spec, loader=loader)).train(make_plan(6, 3), 0, 0, 1)
    kept = list(itertools.islice(stream, 8))
    for (images, labels), (copied, wanted) in zip(kept, take(loader, spec, make_plan(6, 3), steps=8), strict=True):
        np.testing.assert_array_equal(pixels(images), copied)
        np.testing.assert_array_equal(labels.numpy(), wanted)


SIZES = [(24, 32), (45, 61), (24, 32), (30, 20), (48, 64)]


def test_an_evaluation_yields_each_sample_once_in_order_with_labels_of_the_files_size(loader, tmp_path):
    spec = make_spec(make_pairs(tmp_path, SIZES, colored=True), camvid_colored(), (24, 32))
    chosen, choice = choose_loader(loader, spec, resize_labels=False)
    assert (choice.value, choice.facts) == (loader, {"obstacle": None})
    batches = list(evaluation_batches(chosen, 2, resize_labels=False))
    assert [batch.indices.tolist() for batch in batches] == [[0, 1], [2, 3], [4]]
    images = torch.cat([batch.images for batch in batches])
    stored = [np.array(Image.open(pair.image)) for pair in spec.pairs]
    wanted = normalise(torch.from_numpy(np.stack([resize_image(image, (24, 32)) for image in stored])), torch.float32)
    assert images.shape == wanted.shape == (5, 3, 24, 32)
    assert (images - wanted).abs().max() <= 1.001 / 57.12  # one count of 255
    labels = [label.numpy() for batch in batches for label in batch.labels]
    assert [label.shape for label in labels] == SIZES
    for label, pair in zip(labels, spec.pairs, strict=True):
        np.testing.assert_array_equal(label, spec.classes.to_classes(np.array(Image.open(pair.label))))


def test_an_evaluation_at_the_networks_size_resizes_labels(loader, tmp_path):
    spec = make_spec(make_pairs(tmp_path, SIZES), camvid_indexed(), (24, 32), loader=loader)
    labels = [label.numpy() for batch in evaluation_batches(spec, 3, resize_labels=True) for label in batch.labels]
    assert len(labels) == 5
    for label, pair in zip(labels, spec.pairs, strict=True):
        raw = resize_label(np.array(Image.open(pair.label)), (24, 32))
        np.testing.assert_array_equal(label, np.where(raw == 11, VOID, raw))


@pytest.mark.parametrize("side", ["image", "label"])
def test_a_truncated_png_is_named(loader, tmp_path, side):
    pairs = make_pairs(tmp_path, [(48, 64)] * 4)
    broken = Path(getattr(pairs[2], side))
    broken.write_bytes(broken.read_bytes()[: broken.stat().st_size // 2])
    spec = make_spec(pairs, camvid_indexed(), (24, 32))
    with pytest.raises(FastsegError, match=f"^{broken}: cannot be decoded"):
        take(loader, spec, make_plan(4, 2), steps=2)
    with pytest.raises(FastsegError, match=f"^{broken}: cannot be decoded"):
        list(evaluation_batches(replace(spec, loader=loader), 2, resize_labels=True))


def test_a_png_without_its_last_bytes_is_named_or_read(loader, tmp_path):
    """Pillow reads such a file, since all pixels are there; where a tier does not, it has to say which file it is."""
    pairs = make_pairs(tmp_path, [(48, 64)] * 2)
    broken = Path(pairs[1].image)
    broken.write_bytes(broken.read_bytes()[:-16])
    spec = make_spec(pairs, camvid_indexed(), (48, 64))
    try:
        ((images, _),) = take(loader, spec, make_plan(2, 2, mirror=False, max_shift=(0, 0)), steps=1)
    except FastsegError as error:
        assert str(broken) in str(error)  # noqa: PT017
    else:
        order = make_plan(2, 2).global_batch(0).indices.tolist()
        np.testing.assert_array_equal(images[order.index(1)], np.array(Image.open(broken)))


def unknown_label(pairs, colored):
    """Puts three pixels off the map into file 3."""
    label = np.array(Image.open(pairs[3].label))
    label[:, :5] = label[7, 9]
    label[10, 1:4] = (1, 2, 3) if colored else 77
    Image.fromarray(label).save(pairs[3].label)
    value = re.escape("colour (1, 2, 3)" if colored else "value 77")
    return f"^{re.escape(pairs[3].label)}: {value} is not in the class map: 3 pixels, the first at x=1 y=10"


@pytest.mark.parametrize("colored", [False, True], ids=["indexed", "colored"])
def test_a_label_value_off_the_map_is_named_after_training_and_evaluation(loader, tmp_path, colored):
    pairs = make_pairs(tmp_path, [(24, 32)] * 4, colored)
    message = unknown_label(pairs, colored)
    spec = make_spec(pairs, camvid_colored() if colored else camvid_indexed(), (24, 32))
    plan = make_plan(4, 2, max_shift=(0, 0))
    first = next(step for step in range(2) if 3 in plan.global_batch(step).indices)
    source = TrainSource(replace(spec, loader=loader), plan)
    batches = iter(source)
    for _ in range(first):
        next(batches)
        source.check()

    def step_and_check():
        next(batches)  # the cache tier looks as it decodes
        source.check()

    with pytest.raises(FastsegError, match=message):
        step_and_check()
    with pytest.raises(FastsegError, match=message):
        list(evaluation_batches(replace(spec, loader=loader), 3, resize_labels=False))


def test_values_off_the_map_can_be_void(loader, tmp_path):
    pairs = make_pairs(tmp_path, [(24, 32)] * 4)
    unknown_label(pairs, colored=False)
    spec = make_spec(pairs, camvid_indexed(), (24, 32), unknown_void=True, loader=loader)
    source = TrainSource(spec, make_plan(4, 4))
    next(iter(source))
    source.check()
    labels = [label for batch in evaluation_batches(spec, 4, resize_labels=False) for label in batch.labels]
    assert (labels[3][10, 1:4] == VOID).all()


def saved_as(mode, side, tmp_path, colored=False):
    pairs = make_pairs(tmp_path, [(24, 32)] * 3, colored)
    path = getattr(pairs[1], side)
    if mode == "I;16":
        Image.fromarray(np.full((24, 32), 3, np.uint16)).save(path)
    else:
        Image.open(path).convert(mode).save(path)
    return make_spec(pairs, camvid_colored() if colored else camvid_indexed(), (24, 32)), path


@pytest.mark.parametrize(
    ("mode", "side", "colored"),
    [
        ("P", "label", False),
        ("I;16", "label", False),
        ("RGB", "label", False),
        ("P", "label", True),
        ("L", "label", True),
        ("RGBA", "image", False),
        ("P", "image", False),
    ],
)
def test_files_that_dali_would_misread_go_through_the_reference(tmp_path, mode, side, colored):
    pytest.importorskip("nvidia.dali")
    spec, path = saved_as(mode, side, tmp_path, colored)
    chosen, choice = choose_loader("auto", spec)
    assert chosen == replace(spec, loader="reference")
    assert path in choice.why
    assert f"mode {mode}" in choice.why
    with pytest.raises(UsageError, match=f"^--loader dali: .*{re.escape(path)}.*; use --loader reference$"):
        choose_loader("dali", spec)
    chosen, choice = choose_loader("reference", spec)
    assert (chosen, str(choice)) == (replace(spec, loader="reference"), "reference: as asked")


def test_palette_labels_are_read_by_value_not_by_colour(tmp_path):
    pairs = make_pairs(tmp_path, [(24, 32)])
    raw = np.array(Image.open(pairs[0].label))
    palette = Image.fromarray(raw)
    palette.putpalette([255 - i // 3 for i in range(768)])
    assert palette.mode == "P"
    palette.save(pairs[0].label)
    spec = make_spec(pairs, camvid_indexed(), (24, 32))
    ((_, labels),) = take("reference", spec, make_plan(1, 1, mirror=False, max_shift=(0, 0)), steps=1)
    np.testing.assert_array_equal(labels[0], np.where(raw == 11, VOID, raw))


def test_plain_files_go_through_dali(tmp_path):
    pytest.importorskip("nvidia.dali")
    for mode in ("RGB", "L"):
        spec, _ = saved_as(mode, "image", tmp_path)
        for requested, why in (("auto", "DALI is installed and reads these files exactly"), ("dali", "as asked")):
            chosen, choice = choose_loader(requested, spec)
            assert (chosen, str(choice)) == (replace(spec, loader="dali"), f"dali: {why}")


def test_of_jpegs_on_a_gpu_nobody_is_told_that_dali_reads_them_exactly(tmp_path):
    pytest.importorskip("nvidia.dali")
    pairs = make_pairs(tmp_path, [(24, 32)] * 2)
    for encoding, device, exact in (("png", "cuda", True), ("jpeg", "cuda", False), ("jpeg", "cpu", True)):
        spec = make_spec(encode(pairs, encoding), camvid_indexed(), (24, 32), device=torch.device(device))
        chosen, choice = choose_loader("auto", spec)
        assert chosen.loader == "dali"
        assert ("exactly" in choice.why, "nvJPEG" in choice.why) == (exact, not exact)


def test_without_dali_auto_takes_the_reference_and_says_so(tmp_path, monkeypatch):
    real = importlib.util.find_spec
    monkeypatch.setattr(importlib.util, "find_spec", lambda name, *a: None if "nvidia" in name else real(name, *a))
    spec, _ = saved_as("RGB", "image", tmp_path)
    chosen, choice = choose_loader("auto", spec)
    assert (chosen, str(choice)) == (replace(spec, loader="reference"), "reference: DALI is not installed")
    with pytest.raises(UsageError, match=r"^--loader dali: DALI is not installed; .*pip install "):
        choose_loader("dali", spec)


def test_an_unknown_loader_is_refused_with_the_choices(tmp_path):
    with pytest.raises(UsageError, match=r"^--loader turbo: choose one of auto, dali, cache, reference$"):
        choose_loader("turbo", saved_as("RGB", "image", tmp_path)[0])


def fields(data: bytes) -> list[tuple[int, int | bytes]]:
    """(number, value) of each field of a protobuf message, which is what DALI serialises a graph to."""
    at, found = 0, []

    def varint() -> int:
        nonlocal at
        value = shift = 0
        while True:
            byte = data[at]
            at, value, shift = at + 1, value | (byte & 127) << shift, shift + 7
            if byte < 128:
                return value

    while at < len(data):
        number, kind = divmod(varint(), 8)
        if kind == 0:
            found.append((number, varint()))
            continue
        length = {1: 8, 5: 4}.get(kind) or varint()
        found.append((number, data[at : at + length]))
        at += length
    return found


def operators(spec, gpu, resized, windowed=False):
    """(name, device, inputs, other arguments) of each operator, and the devices of the outputs. Needs no device."""
    from fastseg.pipelines.dali import graph, work

    todo = work(spec, resize_labels=resized, training=windowed)
    pipe = graph(lambda: None, spec, todo, gpu=gpu, batch_size=2, num_threads=1, device_id=None)
    found = []
    for number, op in fields(pipe.serialize()):
        if number == 5:  # dali.proto: PipelineDef.op; OpDef.name = 1, input = 2, args = 4
            parts = fields(op)
            args = {dict(fields(arg))[1].decode(): fields(arg) for number, arg in parts if number == 4}
            device = dict(args.pop("device"))[5].decode()
            args = {name: arg for name, arg in args.items() if not name.startswith(("_origin", "_definition"))}
            inputs = [[v for n, v in fields(part) if n != 2] for number, part in parts if number == 2]
            found.append((dict(parts)[1].decode(), device, inputs, args))
    return found, [node.device for node in pipe._graph_outputs]


@pytest.mark.parametrize("colored", [False, True], ids=["indexed", "colored"])
@pytest.mark.parametrize("size", [(24, 32), (12, 16)])
@pytest.mark.parametrize("resized", [True, False])
def test_the_gpu_graph_is_the_cpu_graph_on_the_gpu(tmp_path, size, colored, resized):
    pytest.importorskip("nvidia.dali")
    spec = make_spec(make_pairs(tmp_path, [(24, 32)]), camvid_colored() if colored else camvid_indexed(), size)
    cpu, cpu_outputs = operators(spec, False, resized)
    gpu, gpu_outputs = operators(spec, True, resized)
    assert [(name, inputs, args) for name, _, inputs, args in gpu] == [(n, i, a) for n, _, i, a in cpu]
    assert {device for _, device, _, _ in cpu} == {"cpu"}
    assert cpu_outputs == ["cpu", "cpu"]
    assert gpu_outputs == ["gpu", "gpu"]
    devices = {}
    for name, device, _, _ in gpu:
        devices.setdefault(name, []).append(device)
    # Paths, draws and sizes come from the host; from the decoder on all pixels are the GPU's.
    assert set(devices.pop("ExternalSource")) == set(devices.pop("io__file__Read")) == {"cpu"}
    assert devices.pop("decoders__Image") == ["mixed", "mixed"]
    operators_on_pixels = ("Resize", "Reshape", "LookupTable")
    assert {device for name in operators_on_pixels for device in devices.get(name, [])} == {"gpu"}
    counts = {name: len(devices.get(name, [])) for name in operators_on_pixels}
    resizing = size != (24, 32)
    assert devices.get("Cast", []).count("cpu") == resizing * 2 * resized  # shapes; those of colours are the GPU's
    assert counts == {
        "Resize": resizing * (1 + 2 * resized),  # labels by columns, twice
        "Reshape": resizing * 2 * resized,
        "LookupTable": 1 + colored,
    }


def test_the_gpus_jpeg_engine_is_told_of_jpegs_alone_and_of_the_largest(tmp_path):
    pytest.importorskip("nvidia.dali")
    pairs = make_pairs(tmp_path, [(24, 32), (16, 40), (50, 60)])
    encode(pairs[:2], "jpeg")
    for chosen, largest in ((pairs, (24, 40)), (pairs[2:], (0, 0))):
        tier = make_tier(make_spec(chosen, camvid_indexed(), (12, 16), loader="dali"))
        image, label = (args for name, _, _, args in operators(tier.spec, True, True)[0] if name == "decoders__Image")
        # dali.proto: Argument.floats = 3, ints = 4
        assert tuple(dict(image[f"preallocate_{side}_hint"])[4] for side in ("height", "width")) == largest
        assert dict(image["hw_decoder_load"])[3] == np.float32(0.65).tobytes()
        assert not {"hw_decoder_load", "preallocate_height_hint"} & set(label)


def test_the_gpu_decodes_the_same_windows(tmp_path):
    pytest.importorskip("nvidia.dali")
    spec = make_spec(make_pairs(tmp_path, [(24, 32)]), camvid_indexed(), (24, 32), crop=(10, 20))
    cpu, gpu = (operators(spec, on_gpu, True, windowed=True)[0] for on_gpu in (False, True))
    assert [(name, inputs, args) for name, _, inputs, args in gpu] == [(n, i, a) for n, _, i, a in cpu]
    decoders = [device for name, device, _, _ in gpu if name == "decoders__ImageSlice"]
    assert decoders == ["mixed", "mixed"]
    assert not [name for name, *_ in gpu if name == "decoders__Image"]


@pytest.mark.skipif(torch.cuda.is_available(), reason="a CUDA device is there")
def test_without_a_device_the_gpu_graph_says_what_is_missing(tmp_path):
    pytest.importorskip("nvidia.dali")
    spec = make_spec(make_pairs(tmp_path, [(24, 32)] * 2), camvid_indexed(), (24, 32), device=torch.device("cuda"))
    with pytest.raises(RuntimeError, match=r"CUDA|GPU"):
        next(make_tier(replace(spec, loader="dali")).train(make_plan(2, 2), 0, 0, 1))


@pytest.mark.gpu
@pytest.mark.parametrize("colored", [False, True], ids=["indexed", "colored"])
@pytest.mark.parametrize(("file", "size"), [((48, 64), (48, 64)), ((360, 480), (300, 400)), ((48, 64), (96, 100))])
def test_dali_on_the_gpu_agrees_with_the_reference(tmp_path, file, size, colored):
    pytest.importorskip("nvidia.dali")
    spec = make_spec(make_pairs(tmp_path, [file] * 4, colored), camvid_colored() if colored else camvid_indexed(), size)
    tier = make_tier(replace(spec, loader="dali", device=torch.device("cuda")))
    images, labels = next(tier.train(make_plan(4, 4), 0, 0, 1))
    ((wanted, wanted_labels),) = take("reference", spec, make_plan(4, 4), steps=1)
    assert images.device.type == labels.device.type == "cuda"
    np.testing.assert_array_equal(labels.cpu().numpy(), wanted_labels)
    assert np.abs(pixels(images.cpu()).astype(int) - wanted).max() <= 1


@pytest.mark.gpu
@pytest.mark.parametrize("crop", [(48, 64), (33, 47)])
def test_the_gpus_windows_of_pngs_have_the_pixels_of_whole_images(tmp_path, crop):
    pytest.importorskip("nvidia.dali")
    file = (96, 130)
    spec = make_spec(make_pairs(tmp_path, [file] * 4), camvid_indexed(), file, crop=crop)
    plan = make_plan(4, 16, max_shift=(20, 90), max_crop=(file[0] - crop[0], file[1] - crop[1]))
    images, labels = next(make_tier(replace(spec, loader="dali", device=torch.device("cuda"))).train(plan, 0, 0, 1))
    ((wanted, wanted_labels),) = take("reference", spec, plan, steps=1)
    np.testing.assert_array_equal(labels.cpu().numpy(), wanted_labels)
    np.testing.assert_array_equal(pixels(images.cpu()), wanted)


def make_jpegs(folder, count, size) -> list[Pair]:
    """Drawn streets at quality 90 and their labels: noise is no photo, and all of it would be off by something."""
    pairs = make_pairs(folder, [size] * count)
    for index, pair in enumerate(pairs):
        image, label = draw_scene(0, index, size)
        Image.fromarray(image).save(pair.image)
        Image.fromarray(np.where(label == VOID, 11, label).astype(np.uint8)).save(pair.label)
    return encode(pairs, "jpeg")


@pytest.mark.gpu
@pytest.mark.parametrize("crop", [None, (180, 240), (151, 203)])
def test_jpegs_on_the_gpu_are_near_those_of_the_cpu(tmp_path, crop):
    """nvJPEG interpolates no colours. On an H200: 0.82 counts in the mean, 18 % of values off by more than 1."""
    pytest.importorskip("nvidia.dali")
    file = (360, 480)
    spec = make_spec(make_jpegs(tmp_path, 4, file), camvid_indexed(), file, crop=crop)
    plan = make_plan(4, 16, max_crop=(file[0] - crop[0], file[1] - crop[1]) if crop else (0, 0))
    images, labels = next(make_tier(replace(spec, loader="dali", device=torch.device("cuda"))).train(plan, 0, 0, 1))
    ((wanted, wanted_labels),) = take("reference", spec, plan, steps=1)
    np.testing.assert_array_equal(labels.cpu().numpy(), wanted_labels)
    off = np.abs(pixels(images.cpu()).astype(int) - wanted)
    assert off.mean() < 2
    assert (off > 1).mean() < 0.5


@pytest.mark.gpu
def test_a_jpegs_pixels_on_the_gpu_do_not_hang_on_its_place_in_the_batch(tmp_path):
    """Of a batch, the JPEG engine decodes some and CUDA the others: they have to agree, or no run could be repeated."""
    pytest.importorskip("nvidia.dali")
    spec = make_spec(make_jpegs(tmp_path, 1, (360, 480)), camvid_indexed(), (360, 480), device=torch.device("cuda"))
    tier = make_tier(replace(spec, loader="dali"))
    ((images, _),) = tier.decode([np.zeros(32, int)], 32, resize_labels=True)
    assert [index for index, image in enumerate(images) if not torch.equal(image, images[0])] == []
