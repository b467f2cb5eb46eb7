"""Scores of one confusion matrix, against figures worked by hand and counts made by a loop."""

import json
import math

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from fastseg.metrics import Scores

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
    assert summary["classes"][2] == {"name": "c", "iou": None, "accuracy": None, "pixels": 0}


def test_a_class_that_is_only_predicted_has_iou_0_and_no_accuracy():
    found = scores([6, 0, 2], [0, 8, 0], [0, 0, 0])
    assert found.iou.tolist() == pytest.approx([6 / 8, 1, 0])
    assert found.miou == pytest.approx((6 / 8 + 1 + 0) / 3)
    assert math.isnan(found.accuracy[2])
    assert found.mean_accuracy == pytest.approx((6 / 8 + 1) / 2)
    assert found.absent(NAMES) == []
    assert found.summary(NAMES)["classes"][2] == {"name": "c", "iou": 0, "accuracy": None, "pixels": 0}


def test_a_class_that_is_never_found_has_iou_0_and_accuracy_0():
    found = scores([4, 0, 0], [0, 4, 0], [1, 1, 0])
    assert (found.iou[2], found.accuracy[2]) == (0, 0)


def test_no_pixel_gives_no_score():
    found = scores([0] * 3, [0] * 3, [0] * 3)
    summary = strictly_parsed(found.summary(NAMES))
    assert [summary[k] for k in ("miou", "global_accuracy", "mean_accuracy", "fw_iou")] == [None] * 4
    assert summary["absent"] == list(NAMES)
    assert all(row == {"name": row["name"], "iou": None, "accuracy": None, "pixels": 0} for row in summary["classes"])


def test_a_summary_is_strict_json_and_holds_the_scores():
    found = scores([50, 10, 0], [5, 30, 5], [0, 20, 80])
    summary = strictly_parsed(found.summary(NAMES))
    assert list(summary) == ["miou", "global_accuracy", "mean_accuracy", "fw_iou", "absent", "classes"]
    assert summary["classes"][1] == {"name": "b", "iou": pytest.approx(3 / 7), "accuracy": 0.75, "pixels": 40}


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
