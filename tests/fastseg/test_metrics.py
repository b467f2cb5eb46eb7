"""Scores of one confusion matrix, against figures worked by hand and counts made by a loop."""

import json
import math

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from fastseg import metrics
from fastseg.metrics import Scores, bootstrap, compare, interval, miou_of, resampled

NAMES = ("a", "b", "c")


def scores(*rows: list[int]) -> Scores:
    return Scores(np.array(rows, np.int64))


def strictly_parsed(document: dict) -> dict:
    """The document as a JSON reader gets it that knows no NaN."""

    def refuse(constant):
        raise AssertionError(f"{constant} is no JSON")

    return json.loads(json.dumps(document), parse_constant=refuse)


def test_three_classes_worked_by_hand():
    #        predicted  a  b  c
    found = scores([50, 10, 0], [5, 30, 5], [0, 20, 80])
    assert found.pixels.tolist() == [60, 40, 100]
    iou = [50 / (60 + 55 - 50), 30 / (40 + 60 - 30), 80 / (100 + 85 - 80)]
    assert found.iou.tolist() == pytest.approx(iou)
    assert found.accuracy.tolist() == pytest.approx([50 / 60, 30 / 40, 80 / 100])
    assert found.miou == pytest.approx(sum(iou) / 3)
    assert found.mean_accuracy == pytest.approx((50 / 60 + 30 / 40 + 80 / 100) / 3)
    assert found.global_accuracy == pytest.approx(160 / 200)
    assert found.fw_iou == pytest.approx(0.3 * iou[0] + 0.2 * iou[1] + 0.5 * iou[2])
    assert found.absent(NAMES) == []


def test_a_class_in_neither_labels_nor_predictions_is_left_out():
    found = scores([6, 2, 0], [2, 10, 0], [0, 0, 0])
    assert math.isnan(found.iou[2])
    assert math.isnan(found.accuracy[2])
    assert found.miou == pytest.approx((6 / 10 + 10 / 14) / 2)
    assert found.mean_accuracy == pytest.approx((6 / 8 + 10 / 12) / 2)
    assert found.fw_iou == pytest.approx(0.4 * 6 / 10 + 0.6 * 10 / 14)
    summary = strictly_parsed(found.summary(NAMES))
    assert summary["absent"] == ["c"]
    assert summary["classes"][2] == {
        "name": "c",
        **dict.fromkeys(("iou", "accuracy", "precision", "dice")),
        "pixels": 0,
    }


def test_a_class_that_is_only_predicted_has_iou_0_and_no_accuracy():
    found = scores([6, 0, 2], [0, 8, 0], [0, 0, 0])
    assert found.iou.tolist() == pytest.approx([6 / 8, 1, 0])
    assert found.miou == pytest.approx((6 / 8 + 1 + 0) / 3)
    assert math.isnan(found.accuracy[2])
    assert found.mean_accuracy == pytest.approx((6 / 8 + 1) / 2)
    assert found.absent(NAMES) == []
    assert found.summary(NAMES)["classes"][2] == {
        "name": "c", "iou": 0, "accuracy": None, "precision": 0, "dice": 0, "pixels": 0,
    }  # fmt: skip


def test_a_class_that_is_never_found_has_iou_0_and_accuracy_0():
    found = scores([4, 0, 0], [0, 4, 0], [1, 1, 0])
    assert (found.iou[2], found.accuracy[2]) == (0, 0)


def test_no_pixel_gives_no_score():
    found = scores([0] * 3, [0] * 3, [0] * 3)
    summary = strictly_parsed(found.summary(NAMES))
    assert [summary[k] for k in ("miou", "global_accuracy", "mean_accuracy", "fw_iou")] == [None] * 4
    assert summary["absent"] == list(NAMES)
    nothing = {**dict.fromkeys(("iou", "accuracy", "precision", "dice")), "pixels": 0}
    assert summary["classes"] == [{"name": name, **nothing} for name in NAMES]


def test_a_summary_is_strict_json_and_holds_the_scores():
    found = scores([50, 10, 0], [5, 30, 5], [0, 20, 80])
    summary = strictly_parsed(found.summary(NAMES))
    assert list(summary) == ["miou", "global_accuracy", "mean_accuracy", "fw_iou", "absent", "classes"]
    assert summary["classes"][1] == {
        "name": "b", "iou": pytest.approx(3 / 7), "accuracy": 0.75, "precision": 0.5, "dice": pytest.approx(0.6),
        "pixels": 40,
    }  # fmt: skip


def test_counts_beyond_32_bits_stay_exact():
    # 2^40 pixels of each class, half of b's taken for a: 2/3 and 1/2.
    found = scores([2**40, 0, 0], [2**39, 2**39, 0], [0, 0, 0])
    assert found.iou[:2].tolist() == pytest.approx([2 / 3, 1 / 2])


@given(st.lists(st.integers(0, 50), min_size=9, max_size=9))
@settings(max_examples=50, deadline=None)
def test_scores_are_shares_and_iou_is_never_above_accuracy(counts):
    found = Scores(np.array(counts, np.int64).reshape(3, 3))
    for values in (found.iou, found.accuracy):
        assert all(math.isnan(v) or 0 <= v <= 1 for v in values)
    assert all(i <= a for i, a in zip(found.iou, found.accuracy, strict=True) if not math.isnan(a))
    perfect = Scores(np.diag(found.pixels))
    assert [perfect.miou, perfect.fw_iou] == pytest.approx([1, 1] if sum(counts) else [math.nan] * 2, nan_ok=True)


def test_scores_are_scikit_learns():
    sklearn = pytest.importorskip("sklearn.metrics")
    rng = np.random.default_rng(0)
    # Six of seven classes are labelled, another six predicted.
    label, prediction = rng.integers(0, 6, 5000), rng.integers(1, 7, 5000)
    counts = sklearn.confusion_matrix(label, prediction, labels=range(7))
    found = Scores(counts)
    precision, recall, f1, support = sklearn.precision_recall_fscore_support(label, prediction, labels=range(7))
    jaccard = sklearn.jaccard_score(label, prediction, labels=range(7), average=None)
    known = dict(zip(("precision", "accuracy", "dice", "iou"), (precision, recall, f1, jaccard), strict=True))
    for name, wanted in known.items():
        values = getattr(found, name)
        undefined = np.isnan(values)
        # scikit-learn says 0 where there is nothing to divide by.
        assert undefined.tolist() == [(name, c) in (("precision", 0), ("accuracy", 6)) for c in range(7)]
        np.testing.assert_allclose(values[~undefined], wanted[~undefined], atol=1e-12)
    assert found.pixels.tolist() == support.tolist()
    assert found.global_accuracy == pytest.approx(sklearn.accuracy_score(label, prediction))
    weighted = sklearn.jaccard_score(label, prediction, average="weighted", labels=range(7))
    assert found.fw_iou == pytest.approx(weighted)
    shares = sklearn.confusion_matrix(label, prediction, labels=range(7), normalize="true")
    np.testing.assert_allclose(found.normalised[:6], shares[:6], atol=1e-12)
    assert np.isnan(found.normalised[6]).all()


def test_the_score_of_each_image():
    found = miou_of(np.array([[[4, 0], [0, 0]], [[1, 1], [1, 1]], [[0, 0], [0, 0]]]))
    # One class alone and right; two, each 1 / 3; nothing labelled.
    assert found[:2].tolist() == pytest.approx([1, 1 / 3])
    assert math.isnan(found[2])


def test_samples_of_images_are_scored_as_if_they_were_the_split():
    rng = np.random.default_rng(1)
    counts = rng.integers(0, 50, (9, 3, 3))
    weights = np.random.default_rng(0).multinomial(9, np.full(9, 1 / 9), size=2000)
    assert np.array_equal(weights, np.concatenate(list(resampled(9))))  # the same ones for whatever is compared
    (samples,) = bootstrap(counts)
    for row in (0, 1, 77):
        chosen = np.repeat(np.arange(9), weights[row])
        assert samples[row] == pytest.approx(Scores(counts[chosen].sum(0)).miou)


@pytest.mark.parametrize("drawn", [1, 9 * 7, 9 * 2000])
def test_samples_are_drawn_a_few_at_a_time_and_stay_the_same(monkeypatch, drawn):
    counts = np.random.default_rng(1).integers(0, 50, (9, 3, 3))
    whole = np.random.default_rng(0).multinomial(9, np.full(9, 1 / 9), size=2000)
    wanted = miou_of((whole @ counts.reshape(9, 9)).reshape(-1, 3, 3))
    monkeypatch.setattr(metrics, "DRAWN", drawn)
    parts = list(resampled(9))
    assert max(part.size for part in parts) <= max(9, drawn)
    assert np.array_equal(np.concatenate(parts), whole)
    assert np.array_equal(bootstrap(counts, 2 * counts), [wanted, wanted])


def test_the_interval_holds_95_per_cent_of_the_samples():
    # Images of one class each, found or not: mIoU is then the mean of two shares, whose spread is known.
    assert interval(0.5, np.linspace(0, 1, 1001)) == pytest.approx((0.5, 0.025, 0.975))
    right, wrong = [[10, 0], [0, 10]], [[0, 10], [10, 0]]
    same = np.array([right] * 8)
    assert interval(1.0, bootstrap(same)[0]) == (1.0, 1.0, 1.0)
    spread = interval(0.0, bootstrap(np.array([right] * 4 + [wrong] * 4))[0])
    assert 0 < spread.low < 1 / 3 < spread.high < 1


def test_two_networks_on_the_same_images():
    rng = np.random.default_rng(2)
    a = rng.integers(1, 50, (40, 3, 3))
    better = a + 30 * np.eye(3, dtype=int)
    found = compare(a, better)
    assert found.difference.value == pytest.approx(Scores(better.sum(0)).miou - Scores(a.sum(0)).miou)
    assert 0 < found.difference.low < found.difference.value < found.difference.high
    assert (found.chance, found.better, found.worse) == (0.0, 40, 0)
    back = compare(better, a)
    assert back.difference.value == pytest.approx(-found.difference.value)
    assert (back.chance, back.better, back.worse) == (0.0, 0, 40)
    nothing = compare(a, a)
    assert (nothing.difference, nothing.chance) == ((0.0, 0.0, 0.0), 1.0)
    assert metrics.RESAMPLES >= 1000
