"""Gathered, mirrored, moved and normalised in one pass: by hand, against the reference tier, and by its own laws."""

import itertools
import math
from fractions import Fraction

import numpy as np
import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from fastseg.data.classes import VOID
from fastseg.kernels.augment import augment, torch_augment
from fastseg.kernels.launch import INTERPRETED
from fastseg.pipelines.reference import mirror_and_move
from fastseg.pipelines.source import MEAN, STD, normalise

# On a CPU the operator runs its reference, so that the two differ in the interpreter and on a GPU alone.
makers = pytest.mark.parametrize("make", [augment, torch_augment], ids=["operator", "reference"])
dtypes = pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])


def store(count: int, height: int, width: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Random images uint8[N, H, W, 3] and labels uint8[N, H, W], which need not be classes."""
    generator = torch.Generator().manual_seed(height)
    images = torch.randint(0, 256, (count, height, width, 3), generator=generator, dtype=torch.uint8)
    return images, torch.randint(0, 256, (count, height, width), generator=generator, dtype=torch.uint8)


def places(samples, height: int, width: int, resized=None) -> torch.Tensor:
    """int64[B, 10] of samples (index, mirror, dy, dx) of a store whose images have all one size, resized to another."""
    pixels, own = height * width, (height, width, width)
    return torch.tensor([[3 * pixels * i, pixels * i, *own, *(resized or own[:2]), *move] for i, *move in samples])


def run(
    make,
    images,
    labels,
    samples,
    device,
    dtype=torch.float32,
    mean=MEAN,
    std=STD,
    size=None,
    resized=None,
    colours=None,
):
    """A batch of a store; `colours` is a matrix of 12 numbers for each sample."""
    own = labels.shape[1:]
    operands = images, labels, places(samples, *own, resized), torch.tensor(mean), torch.tensor(std)
    resized = resized or own
    matrices = None if colours is None else torch.tensor(colours, dtype=torch.float32, device=device)
    given = *(t.to(device) for t in operands), dtype, *(size or resized), resized != own, matrices
    return tuple(t.cpu() for t in make(*given))


def moved(images: torch.Tensor, labels: torch.Tensor, sample: tuple[int, int, int], device: torch.device):
    """Each image and label of a store mirrored and moved alike; with no normalisation, so that it is a store again."""
    samples = [(index, *sample) for index in range(len(images))]
    found, labels = run(augment, images, labels, samples, device, mean=(0.0, 0.0, 0.0), std=(1.0, 1.0, 1.0))
    return found.permute(0, 2, 3, 1).to(torch.uint8).contiguous(), labels


@dtypes
@makers
def test_a_2x3_image_worked_by_hand(device, make, dtype):
    v = VOID
    cases = {  # mirror, dy, dx: labels
        (0, 0, 0): [[0, 1, 2], [3, 4, 5]],
        (1, 0, 0): [[2, 1, 0], [5, 4, 3]],
        (0, 1, 0): [[v, v, v], [0, 1, 2]],
        (0, -1, 0): [[3, 4, 5], [v, v, v]],
        (0, 0, 1): [[v, 0, 1], [v, 3, 4]],
        (0, 0, -2): [[2, v, v], [5, v, v]],
        (1, 1, -1): [[v, v, v], [1, 0, v]],
        (1, -1, 2): [[v, v, 5], [v, v, v]],
        (0, 2, 0): [[v, v, v], [v, v, v]],
        (1, 0, -3): [[v, v, v], [v, v, v]],
        (0, -90, 90): [[v, v, v], [v, v, v]],
    }
    labels = torch.tensor([[[0, 1, 2], [3, 4, 5]]], dtype=torch.uint8)
    images = torch.stack([10 + 10 * labels, 70 + 10 * labels, 130 + 10 * labels], 3)
    found, found_labels = run(
        make,
        images,
        labels,
        [(0, *case) for case in cases],
        device,
        dtype,
        mean=(60.0, 20.0, 30.0),
        std=(2.0, 4.0, 8.0),
    )
    wanted = torch.tensor(list(cases.values()))
    assert found_labels.tolist() == wanted.tolist()
    # (10 + 10 l - 60) / 2 and so on; black is not zero. Few enough bits that every dtype holds them.
    red, green, blue = 5.0 * wanted - 25, 2.5 * wanted + 12.5, 1.25 * wanted + 12.5
    black = torch.tensor([-30.0, -5.0, -3.75])[:, None, None]
    assert torch.equal(found.float(), torch.where(wanted[:, None] == v, black, torch.stack([red, green, blue], 1)))


# One pixel, one row, exactly one program's 1024 pixels, and a second program that is part empty.
@pytest.mark.parametrize("size", [(1, 1), (1, 9), (32, 32), (37, 41)])
@dtypes
@makers
def test_batches_equal_those_of_the_reference_tier(device, make, dtype, size):
    images, labels = store(3, *size)
    # Each of the store, some twice and out of order; each way to move, and beyond an edge.
    samples = [(2, 0, 0, 0), (0, 1, 3, -4), (2, 1, -5, 7), (1, 0, -2, -3), (1, 1, 4, 1), (0, 0, 36, -40), (2, 0, 0, 41)]
    found, found_labels = run(make, images, labels, samples, device, dtype)
    pixels, wanted_labels = [], []
    for index, mirror, *shift in samples:
        pixels.append(torch.from_numpy(mirror_and_move(images[index].numpy(), bool(mirror), shift, 0).copy()))
        label = mirror_and_move(labels[index, ..., None].numpy(), bool(mirror), shift, VOID)
        wanted_labels.append(torch.from_numpy(label[..., 0].copy()))
    assert torch.equal(found_labels, torch.stack(wanted_labels))
    # The interpreter cuts bf16 off where a GPU rounds.
    tolerance = 2**-7 if INTERPRETED and dtype is torch.bfloat16 else 0
    torch.testing.assert_close(found, normalise(pixels, dtype), rtol=tolerance, atol=0)


@dtypes
@makers
def test_a_batch_may_be_smaller_than_its_images(device, make, dtype):
    v = VOID
    labels = torch.tensor([[[0, 1, 2, 3], [4, 5, 6, 7], [8, 9, 10, 11]]], dtype=torch.uint8)
    cases = {  # mirror, dy, dx: labels of the top left 2x3
        (0, 0, 0): [[0, 1, 2], [4, 5, 6]],
        (0, -1, -1): [[5, 6, 7], [9, 10, 11]],
        (1, 0, 0): [[3, 2, 1], [7, 6, 5]],
        (1, -1, -1): [[6, 5, 4], [10, 9, 8]],
        (1, -2, -2): [[9, 8, v], [v, v, v]],
        (0, 1, -2): [[v, v, v], [2, 3, v]],
        (1, 1, 2): [[v, v, v], [v, v, 3]],
        (0, -3, 0): [[v, v, v], [v, v, v]],
    }
    images = labels[..., None].expand(*labels.shape, 3).contiguous()
    plain = {"mean": (0.0, 0.0, 0.0), "std": (1.0, 1.0, 1.0), "size": (2, 3)}
    found, found_labels = run(make, images, labels, [(0, *case) for case in cases], device, dtype, **plain)
    wanted = torch.tensor(list(cases.values()))
    assert found_labels.tolist() == wanted.tolist()
    assert torch.equal(found.float(), torch.where(wanted == v, 0.0, wanted.float())[:, None].expand(-1, 3, -1, -1))


def by_hand(image: np.ndarray, size: tuple[int, int]) -> np.ndarray:
    """float64 [h, w, 3]: each output pixel by the formula, in fractions of whole numbers."""

    def weights(size_in: int, size_out: int) -> np.ndarray:
        scale = Fraction(size_in, size_out)
        radius = max(Fraction(1), scale)
        matrix = np.zeros((size_out, size_in))
        for o in range(size_out):
            centre = (o + Fraction(1, 2)) * scale - Fraction(1, 2)
            near = range(math.floor(centre - radius), math.ceil(centre + radius) + 1)
            each = {p: max(Fraction(0), 1 - abs(p - centre) / radius) for p in near}
            for p, weight in each.items():
                matrix[o, min(max(p, 0), size_in - 1)] += float(weight / sum(each.values()))
        return matrix

    rows, columns = weights(image.shape[0], size[0]), weights(image.shape[1], size[1])
    return np.einsum("yi,xj,ijc->yxc", rows, columns, image)


@pytest.mark.parametrize(
    ("own", "size"),
    [((8, 12), (4, 6)), ((7, 9), (5, 4)), ((5, 6), (11, 7)), ((3, 40), (3, 7)), ((1, 2), (2, 1)), ((23, 31), (2, 2))],
)
@makers
def test_images_are_resized_by_the_formula_and_labels_by_the_integer_rule(device, make, own, size):
    images, labels = store(2, *own)
    plain = {"mean": (0.0, 0.0, 0.0), "std": (1.0, 1.0, 1.0), "resized": size}
    found, found_labels = run(make, images, labels, [(1, 0, 0, 0), (0, 0, 0, 0)], device, **plain)
    for number, index in enumerate((1, 0)):
        wanted = by_hand(images[index].numpy(), size)
        # Rounded to whole counts, and the sum's last bits may decide a tie.
        assert np.abs(found[number].permute(1, 2, 0).numpy() - wanted).max() < 0.5 + 1e-3
        assert torch.equal(found[number], found[number].round())
        for y, x in itertools.product(range(size[0]), range(size[1])):
            source = (2 * y + 1) * own[0] // (2 * size[0]), (2 * x + 1) * own[1] // (2 * size[1])
            assert found_labels[number, y, x] == labels[index][source]


@makers
def test_what_is_resized_is_mirrored_moved_and_cut_afterwards(device, make):
    images, labels = store(3, 10, 14)
    options = {"mean": (0.0, 0.0, 0.0), "std": (1.0, 1.0, 1.0)}
    whole, whole_labels = run(make, images, labels, [(2, 0, 0, 0)], device, **options, resized=(6, 7))
    pixels = whole.permute(0, 2, 3, 1).to(torch.uint8).contiguous()
    for move in ((1, 2, -3), (0, -4, 1), (1, 0, 0), (0, 9, 9)):
        found = run(make, images, labels, [(2, *move)], device, **options, resized=(6, 7), size=(4, 5))
        wanted = run(torch_augment, pixels, whole_labels, [(0, *move)], device, **options, size=(4, 5))
        assert all(torch.equal(a, b) for a, b in zip(found, wanted, strict=True))


@makers
def test_samples_of_several_sizes_lie_anywhere_in_the_bytes(device, make):
    # A 2x3 and a 4x2 image in one buffer, their labels before and after them, and bytes that belong to nobody.
    generator = torch.Generator().manual_seed(0)
    buffer = torch.randint(0, 256, (70,), generator=generator, dtype=torch.uint8)
    samples = torch.tensor([[9, 3, 2, 3, 3, 4, 6, 0, 0, 0], [31, 57, 4, 2, 2, 4, 6, 1, 0, 0]])
    given = (t.to(device) for t in (buffer, buffer, samples, torch.zeros(3), torch.ones(3)))
    images, labels = make(*given, torch.float32, 4, 6, True)
    first, second = buffer[9:27].view(2, 3, 3), buffer[31:55].view(4, 2, 3)
    assert np.abs(images[0].permute(1, 2, 0).cpu().numpy() - by_hand(first.numpy(), (4, 6))).max() < 0.501
    assert np.abs(images[1].flip(2).permute(1, 2, 0).cpu().numpy() - by_hand(second.numpy(), (4, 6))).max() < 0.501
    assert labels[0].cpu().tolist() == buffer[3:9].view(2, 3).repeat_interleave(2, 0).repeat_interleave(2, 1).tolist()
    assert labels[1].cpu().tolist() == buffer[57:65].view(4, 2).flip(1).repeat_interleave(3, 1).tolist()


@makers
def test_windows_are_cut_out_of_larger_images_and_made_sizes_of_their_own(device, make):
    """Each is what its window would be by itself: nothing beside it is looked at, and each lies where it is moved."""
    images, labels = store(2, 9, 12)
    options = {"mean": (0.0, 0.0, 0.0), "std": (1.0, 1.0, 1.0)}
    cases = [  # image, top, left, height, width; rows, columns; mirror, dy, dx
        (1, (2, 3, 5, 7), (5, 7), (0, 0, 0)),
        (0, (4, 0, 5, 4), (8, 3), (1, -1, 2)),
        (1, (0, 5, 9, 7), (4, 5), (0, 2, 1)),
        (0, (8, 11, 1, 1), (2, 2), (1, 3, 5)),
    ]
    samples = []
    for index, (top, left, height, width), size, move in cases:
        at = (index * 9 + top) * 12 + left
        samples.append([3 * at, at, height, width, 12, *size, *move])
    operands = images, labels, torch.tensor(samples), torch.zeros(3), torch.ones(3)
    found, found_labels = make(*(t.to(device) for t in operands), torch.float32, 6, 8, True)
    for number, (index, (top, left, height, width), size, move) in enumerate(cases):
        part = slice(top, top + height), slice(left, left + width)
        alone = images[index][part][None].contiguous(), labels[index][part][None].contiguous()
        wanted = run(make, *alone, [(0, *move)], device, **options, resized=size, size=(6, 8))
        assert torch.equal(found[number].cpu(), wanted[0][0])
        assert torch.equal(found_labels[number].cpu(), wanted[1][0])


IDENTITY = [1.0, 0, 0, 0, 0, 1, 0, 0, 0, 0, 1, 0]
PLAIN = {"mean": (0.0, 0.0, 0.0), "std": (1.0, 1.0, 1.0)}


@dtypes
@makers
def test_recoloured_pixels_of_a_2x3_image_worked_by_hand(device, make, dtype):
    """red' = red + green / 2 - 8; green' = -blue + 100; blue' = 4 red + 10, each cut off at 0 and 255."""
    matrix = [1, 0.5, 0, -8, 0, 0, -1, 100, 4, 0, 0, 10]
    images = torch.tensor(
        [[[[0, 0, 0], [10, 20, 30], [0, 8, 101]], [[60, 4, 99], [62, 0, 100], [255, 255, 255]]]], dtype=torch.uint8
    )
    top = [[0, 100, 10], [12, 70, 50], [0, 0, 10]]  # -8 and -4 are 0, -1 is 0
    bottom = [[54, 1, 250], [54, 0, 255], [255, 0, 255]]  # 258, 374.5 and 1030 are 255
    black = [0, 0, 0]  # what is uncovered is not recoloured
    cases = {  # mirror, dy, dx: pixels
        (0, 0, 0): [top, bottom],
        (1, 0, 0): [top[::-1], bottom[::-1]],
        (0, 1, 0): [[black] * 3, top],
        (1, 0, -2): [[top[0], black, black], [bottom[0], black, black]],
        (0, 5, 0): [[black] * 3] * 2,
    }
    labels = torch.tensor([[[0, 1, 2], [3, 4, 5]]], dtype=torch.uint8)
    samples = [(0, *case) for case in cases]
    found, found_labels = run(make, images, labels, samples, device, dtype, **PLAIN, colours=[matrix] * len(cases))
    assert found.permute(0, 2, 3, 1).float().tolist() == [*cases.values()]
    assert torch.equal(found_labels, run(make, images, labels, samples, device, dtype)[1])
    normalised, _ = run(
        make, images, labels, samples[:3], device, dtype, mean=(2.0, 4, 8), std=(2.0, 1, 4), colours=[matrix] * 3
    )
    assert normalised[2, :, 0, 0].tolist() == [-1, -4, -2]  # black
    assert normalised[2, :, 1, 1].tolist() == [5, 66, 10.5]  # (12, 70, 50)


@makers
def test_each_sample_has_colours_of_its_own_and_they_are_not_rounded(device, make):
    images = torch.tensor([[[[100, 50, 10]]]], dtype=torch.uint8)
    halved = [0.5, 0, 0, 0, 0, 0.25, 0, 0, 0, 0, 0.125, 0.5]
    found, _ = run(make, images, images[..., 0], [(0, 0, 0, 0)] * 2, device, **PLAIN, colours=[IDENTITY, halved])
    assert found[:, :, 0, 0].tolist() == [[100, 50, 10], [50, 12.5, 1.75]]


# More rows than are recoloured at once, and a part of a program.
@pytest.mark.parametrize("size", [(1, 1), (37, 41), (70, 3)])
@pytest.mark.parametrize("resized", [None, (9, 13)])
@dtypes
@makers
def test_the_matrix_of_no_change_gives_the_bits_of_none(device, make, dtype, size, resized):
    images, labels = store(2, *size)
    samples = [(1, 0, 0, 0), (0, 1, 3, -4), (1, 1, -5, 7)]
    wanted = run(make, images, labels, samples, device, dtype, resized=resized)
    found = run(make, images, labels, samples, device, dtype, resized=resized, colours=[IDENTITY] * 3)
    assert all(torch.equal(a, b) for a, b in zip(found, wanted, strict=True))


@makers
def test_pixels_are_resized_first_and_recoloured_then(device, make):
    images, labels = store(1, 12, 10)
    rng = np.random.default_rng(0)
    matrices = rng.uniform(-1, 1, (3, 3, 4)) * [1, 1, 1, 100]
    samples = [(0, 0, 0, 0), (0, 1, 1, -2), (0, 1, -3, 0)]
    resized, wanted_labels = run(make, images, labels, samples, device, **PLAIN, resized=(7, 6))
    found, found_labels = run(
        make, images, labels, samples, device, **PLAIN, resized=(7, 6), colours=matrices.reshape(3, 12)
    )
    wanted = np.einsum("bij,bjyx->biyx", matrices[..., :3], resized.double().numpy()) + matrices[..., 3:, None]
    covered = (wanted_labels != VOID).numpy()[:, None] | (resized != 0).any(1, keepdim=True).numpy()
    # Four roundings of fp32 at up to 1000.
    assert np.abs(found.numpy() - np.where(covered, wanted.clip(0, 255), 0)).max() < 1e-3
    assert torch.equal(found_labels, wanted_labels)


@dtypes
@makers
def test_images_are_channels_last_and_labels_bytes(device, make, dtype):
    images, labels = run(make, *store(2, 5, 7), [(1, 0, 0, 0), (0, 1, 1, 1), (1, 1, 0, 2)], device, dtype)
    assert (images.dtype, images.shape) == (dtype, (3, 3, 5, 7))
    assert images.is_contiguous(memory_format=torch.channels_last)
    assert (labels.dtype, labels.shape) == (torch.uint8, (3, 5, 7))
    assert labels.is_contiguous()


shifts = st.tuples(st.integers(-8, 8), st.integers(-8, 8))
# The fixture only names a device.
few = settings(max_examples=15, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])


@given(shift=shifts)
@few
def test_mirrored_moved_and_mirrored_again_is_moved_the_other_way(device, shift):
    dy, dx = shift
    for size in ((5, 7), (6, 4)):
        there = moved(*store(2, *size), (1, dy, dx), device)
        for found, wanted in zip(
            moved(*there, (1, 0, 0), device), moved(*store(2, *size), (0, dy, -dx), device), strict=True
        ):
            assert torch.equal(found, wanted)


@given(first=shifts, second=shifts)
@few
def test_two_moves_the_same_way_are_one_by_their_sum(device, first, second):
    # Opposite ways would lose the pixels that left the image in between.
    second = tuple(abs(b) if a > 0 else -abs(b) for a, b in zip(first, second, strict=True))
    sums = tuple(a + b for a, b in zip(first, second, strict=True))
    twice = moved(*moved(*store(2, 5, 7), (0, *first), device), (0, *second), device)
    for found, wanted in zip(twice, moved(*store(2, 5, 7), (0, *sums), device), strict=True):
        assert torch.equal(found, wanted)


@dtypes
def test_torch_accepts_the_operator_as_its_own(device, dtype):
    operands = *store(2, 5, 7), places([(1, 0, 0, 0), (0, 1, 2, -3)], 5, 7), torch.tensor(MEAN), torch.tensor(STD)
    given = *(t.to(device) for t in operands), dtype, 4, 6, False
    for colours in ((), (torch.tensor([IDENTITY] * 2, device=device),)):
        torch.library.opcheck(torch.ops.fastseg.augment.default, (*given, *colours))


def test_the_triton_kernel_runs_on_a_gpu_and_in_the_interpreter_alone(device, monkeypatch):
    launchers = pytest.importorskip("fastseg.kernels.augment_triton")
    launched, launch = [], launchers.augment
    monkeypatch.setattr(launchers, "augment", lambda *args: launched.append(1) or launch(*args))
    run(augment, *store(1, 1, 1), [(0, 0, 0, 0)], device)
    assert launched == ([1] if INTERPRETED or device.type == "cuda" else [])
