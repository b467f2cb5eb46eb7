"""The confusion matrix made from scores: against a loop, torch's own operations, and pixels worked by hand."""

import itertools
import math

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from fastseg.kernels.confusion import confusion, torch_confusion
from fastseg.kernels.launch import INTERPRETED

VOID, UNKNOWN = 255, 254
NAN, INF = math.nan, math.inf
# The interpreter's NumPy says this of 0 * inf, between channels beyond the last class.
pytestmark = pytest.mark.filterwarnings("ignore:invalid value encountered:RuntimeWarning")

# On a CPU the operator runs its reference, so that the two differ in the interpreter and on a GPU alone.
counters = pytest.mark.parametrize("count", [confusion, torch_confusion], ids=["operator", "reference"])
dtypes = pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])


def highest(scores) -> int:
    """The class of the first highest score; NaN is higher than any number."""
    best = 0
    for index, score in enumerate(scores):
        if math.isnan(scores[best]):
            break
        if math.isnan(score) or score > scores[best]:
            best = index
    return best


def neighbours(position: int, size: int, wanted: int) -> tuple[int, int, float]:
    """Both input positions that an output position lies between, and the share of the second; half-pixel centres."""
    place = max((position + 0.5) * size / wanted - 0.5, 0.0)
    return int(place), min(int(place) + 1, size - 1), place - int(place)


def scores_at(scores_Chw: np.ndarray, y: int, x: int, size: tuple[int, int]) -> np.ndarray:
    """The scores of one label pixel, bilinear where the sizes differ."""
    h, w = scores_Chw.shape[1:]
    if (h, w) == size:
        return scores_Chw[:, y, x]
    (top, bottom, down), (left, right, across) = neighbours(y, h, size[0]), neighbours(x, w, size[1])
    above, below = (
        (1 - across) * scores_Chw[:, row, left] + across * scores_Chw[:, row, right] for row in (top, bottom)
    )
    found = (1 - down) * above + down * below
    gap = np.diff(np.sort(found)[-2:])
    assert not ((gap > 0) & (gap < 1e-5)).any(), "fp32 might see these two scores the other way round"
    return found


def loop(scores_BChw: torch.Tensor, labels_BHW: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Counts and predictions, pixel by pixel in float64."""
    scores, labels, classes = scores_BChw.double().numpy(), labels_BHW.numpy(), scores_BChw.shape[1]
    counts, predictions = np.zeros((classes, classes), np.int64), np.zeros_like(labels)
    for b, y, x in itertools.product(*map(range, labels.shape)):
        predictions[b, y, x] = highest(scores_at(scores[b], y, x, labels.shape[1:]))
        if labels[b, y, x] < classes:
            counts[labels[b, y, x], predictions[b, y, x]] += 1
    return torch.from_numpy(counts), torch.from_numpy(predictions)


def run(count, scores: torch.Tensor, labels: torch.Tensor, device: torch.device) -> tuple[torch.Tensor, torch.Tensor]:
    """Counts and predictions, which hold something else before."""
    counts = torch.zeros(scores.shape[1], scores.shape[1], dtype=torch.int64, device=device)
    predictions = torch.full_like(labels, 77, device=device, memory_format=torch.contiguous_format)
    assert count(counts, scores.to(device), labels.to(device), predictions) is None
    return counts.cpu(), predictions.cpu()


def random_labels(classes: int, shape: tuple[int, int, int], ignored: float = 0.3) -> torch.Tensor:
    """Of which a share is void, unknown, or the first value that is no class."""
    generator = torch.Generator().manual_seed(classes)
    labels = torch.randint(0, classes, shape, generator=generator, dtype=torch.uint8)
    dice = torch.rand(shape, generator=generator)
    for share, value in ((1, VOID), (2 / 3, UNKNOWN), (1 / 3, classes)):
        labels[dice < ignored * share] = value
    return labels


def random_scores(classes: int, batch: int, size: tuple[int, int]) -> torch.Tensor:
    return torch.randn(batch, classes, *size, generator=torch.Generator().manual_seed(1000 + classes))


def image(*pixels) -> torch.Tensor:
    """Scores [1, C, 1, pixels], given pixel by pixel."""
    return torch.tensor(pixels).T[None, :, None]


@counters
def test_three_classes_worked_by_hand(device, count):
    scores = image([3.0, 1, 2], [0, 5, 1], [0, 1, 9], [4, 4, 1], [0, 2, 2], [1, 0, 2], [0, 3, 1]).view(1, 3, 1, 7)
    labels = torch.tensor([[[0, 0, 2, 1, VOID, 1, UNKNOWN]]], dtype=torch.uint8)
    counts, predictions = run(count, scores, labels, device)
    assert predictions.tolist() == [[[0, 1, 2, 0, 1, 2, 1]]]
    #                           predicted  a  b  c
    assert counts.tolist() == [[1, 1, 0], [1, 0, 1], [0, 0, 1]]


@counters
def test_only_labels_below_the_number_of_classes_count(device, count):
    labels = torch.arange(256, dtype=torch.uint8).view(1, 16, 16)
    scores = torch.zeros(1, 11, 16, 16)
    scores[:, 4] = 1
    counts, predictions = run(count, scores, labels, device)
    wanted = torch.zeros(11, 11, dtype=torch.int64)
    wanted[:, 4] = 1  # the other ten are never predicted
    assert torch.equal(counts, wanted)
    assert torch.equal(predictions, torch.full_like(labels, 4))


@pytest.mark.parametrize("classes", [3, 70])
@counters
def test_counts_are_added_to_those_of_before_beyond_32_bits_too(device, count, classes):
    scores, labels = random_scores(classes, 2, (3, 5)), random_labels(classes, (2, 3, 5))
    before = 2**40 + torch.arange(classes**2).view(classes, classes)
    counts = before.to(device, copy=True)
    for _ in range(2):
        count(counts, scores.to(device), labels.to(device))
    assert torch.equal(counts.cpu() - before, 2 * loop(scores, labels)[0])


@pytest.mark.parametrize("classes", [3, 70])
@counters
def test_pixels_that_do_not_count_leave_the_counts_and_get_a_class(device, count, classes):
    labels = torch.tensor([VOID, UNKNOWN, classes, 200] * 5, dtype=torch.uint8).view(2, 2, 5)
    scores = random_scores(classes, 2, (2, 5))
    counts, predictions = run(count, scores, labels, device)
    assert not counts.any()
    assert torch.equal(predictions, loop(scores, labels)[1])


@dtypes
@counters
def test_the_first_of_equal_scores_wins_and_nan_is_the_highest(device, count, dtype):
    cases = [
        ((1, 1, 1), 0),
        ((0, 1, 1), 1),
        ((-1, -2, -1), 0),
        ((0.0, -0.0, 0.0), 0),
        ((-0.0, 0.0, -1), 0),
        ((-INF, -INF, -INF), 0),
        ((-INF, -INF, -9), 2),
        ((1, INF, INF), 1),
        ((1, 2, NAN), 2),
        ((INF, NAN, NAN), 1),
        ((NAN, INF, NAN), 0),
        ((NAN, NAN, NAN), 0),
    ]
    scores = image(*(scores for scores, _ in cases)).to(dtype)
    labels = torch.full((1, 1, len(cases)), 2, dtype=torch.uint8)
    counts, predictions = run(count, scores, labels, device)
    assert predictions.flatten().tolist() == [best for _, best in cases]
    assert torch.equal(predictions.long(), scores.argmax(1))  # torch's own rule
    assert counts.tolist() == [[0, 0, 0], [0, 0, 0], [7, 3, 2]]


# Powers of two and not; 64 is the last that a histogram serves, and most pairs of 70 or 253 classes never occur.
@pytest.mark.parametrize("classes", [1, 2, 11, 32, 64, 70, 253])
@counters
def test_counts_and_predictions_are_those_of_a_loop(device, count, classes):
    # More pixels than one program takes, but for 2048 of one class, and a last program that is part empty.
    scores, labels = random_scores(classes, 2, (13, 17)), random_labels(classes, (2, 13, 17))
    for found, wanted in zip(run(count, scores, labels, device), loop(scores, labels), strict=True):
        assert torch.equal(found, wanted)


@dtypes
@counters
def test_scores_of_few_bits_tie_often_and_count_as_in_a_loop(device, count, dtype):
    scores, labels = (random_scores(11, 2, (13, 17)) * 2).round().to(dtype), random_labels(11, (2, 13, 17))
    for found, wanted in zip(run(count, scores, labels, device), loop(scores, labels), strict=True):
        assert torch.equal(found, wanted)


@pytest.mark.parametrize(
    ("small", "large"),
    [
        ((4, 5), (9, 13)),
        ((3, 5), (3, 11)),
        ((7, 4), (10, 4)),
        ((1, 1), (5, 3)),
        ((11, 13), (7, 5)),
        ((9, 3), (4, 7)),
    ],
    ids=["larger", "wider", "higher", "from one pixel", "smaller", "shorter and wider"],
)
@pytest.mark.parametrize("classes", [11, 70])
@counters
def test_scores_of_another_size_are_resized_bilinearly(device, count, classes, small, large):
    scores, labels = random_scores(classes, 2, small), random_labels(classes, (2, *large))
    counts, predictions = run(count, scores, labels, device)
    wanted, wanted_predictions = loop(scores, labels)
    assert torch.equal(predictions, wanted_predictions)
    assert torch.equal(counts, wanted)
    resized = F.interpolate(scores, large, mode="bilinear", align_corners=False)
    assert torch.equal(predictions.long(), resized.argmax(1))


@dtypes
@pytest.mark.parametrize(("small", "large"), [((3, 5), (6, 10)), ((6, 10), (3, 5)), ((2, 3), (8, 12))])
@counters
def test_equal_resized_scores_go_to_the_first_class_and_nan_wins(device, count, small, large, dtype):
    # Small integers and ratios that are powers of two: every way to sum them is exact, and many are equal.
    scores, labels = random_scores(5, 2, small).round().to(dtype), random_labels(5, (2, *large))
    scores[1, 3, 1, 2] = NAN  # also where its share is zero
    for found, wanted in zip(run(count, scores, labels, device), loop(scores, labels), strict=True):
        assert torch.equal(found, wanted)


@counters
def test_half_precision_scores_are_resized_in_fp32(device, count):
    # Between 1 and 1 + 2^-10, fp16 holds nothing: at the third of four pixels class 1 is ahead by a half of that.
    scores = torch.tensor([[[[1.0, 1.0]], [[1.0 - 2**-10, 1.0 + 2**-10]]]]).half()
    labels = torch.zeros(1, 1, 4, dtype=torch.uint8)
    assert run(count, scores, labels, device)[1].tolist() == [[[0, 0, 1, 1]]]


@counters
def test_any_layout_of_scores_and_labels_counts_the_same(device, count):
    scores, labels = random_scores(11, 2, (6, 7)), random_labels(11, (2, 6, 7))
    wanted = loop(scores, labels)
    views = [
        scores.contiguous(memory_format=torch.channels_last),
        scores.mT.contiguous().mT,
        F.pad(scores, (1, 2, 0, 1))[..., :6, 1:8],
    ]
    for view in views:
        for stored in (labels, labels.mT.contiguous().mT, F.pad(labels, (2, 1, 1, 0))[:, 1:, 2:9]):
            for found, expected in zip(run(count, view, stored, device), wanted, strict=True):
                assert torch.equal(found, expected)


pixels = st.lists(
    st.tuples(
        st.lists(st.sampled_from([-INF, -1.0, 0.0, 1.0, INF, NAN]), min_size=3, max_size=3),
        st.sampled_from([0, 1, 2, 3, UNKNOWN, VOID]),
    ),
    min_size=1,
    max_size=40,
)


@given(pixels)
# The fixture only names a device.
@settings(max_examples=25, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
def test_any_pixels_count_as_in_a_loop(device, pairs):
    scores, labels = image(*(scores for scores, _ in pairs)), torch.tensor([[[v for _, v in pairs]]], dtype=torch.uint8)
    for found, wanted in zip(run(confusion, scores, labels, device), loop(scores, labels), strict=True):
        assert torch.equal(found, wanted)


@pytest.mark.parametrize("small", [(4, 6), (3, 5)])
def test_torch_accepts_the_operator_as_its_own(device, small):
    scores, labels = random_scores(3, 2, small).to(device), random_labels(3, (2, 4, 6)).to(device)
    counts = torch.zeros(3, 3, dtype=torch.int64, device=device)
    torch.library.opcheck(torch.ops.fastseg.confusion.default, (counts, scores, labels))
    predictions = torch.zeros_like(labels)
    torch.library.opcheck(torch.ops.fastseg.confusion.default, (counts, scores, labels, predictions))


def test_the_triton_kernel_runs_on_a_gpu_and_in_the_interpreter_alone(device, monkeypatch):
    launchers = pytest.importorskip("fastseg.kernels.confusion_triton")
    launched, launch = [], launchers.confusion
    monkeypatch.setattr(launchers, "confusion", lambda *args: launched.append(1) or launch(*args))
    run(confusion, torch.zeros(1, 2, 1, 1), torch.zeros(1, 1, 1, dtype=torch.uint8), device)
    assert launched == ([1] if INTERPRETED or device.type == "cuda" else [])
