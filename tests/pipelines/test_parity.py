import numpy as np
import pytest

from fastseg.pipelines import parity
from fastseg.specs import make_plan, open_specs


def test_parity_counts_values_that_are_off_and_by_how_much(monkeypatch, street):
    """Of a tier that is wrong in known places: 1 off in 5 values, 7 off in 3, 2 labels, in the first batch alone."""
    pytest.importorskip("nvidia.dali")
    real = parity.batches

    def wrong(spec, plan, operation):
        for number, (images, labels) in enumerate(real(spec, plan, operation)):
            if (spec.loader, operation, number) == ("dali", "decode", 0):
                images[0, 0, 0, :5] += 1
                images[1, 2, 7, :3] -= 7
                labels[0] = np.array(labels[0])
                labels[0][3, :2] ^= 1
            yield images, labels

    monkeypatch.setattr(parity, "batches", wrong)
    config, specs = open_specs(str(street), splits=("train",), size="96x144", batch=parity.BATCH)
    rows = parity.parity(specs["train"], make_plan(config, specs["train"], 1))
    assert [(row["tier"], row["operation"]) for row in rows[:2]] == [("dali", "decode"), ("dali", "resize")]
    counts = {"values_off": 8, "values_off_by_more": 3, "values": 8 * 96 * 144 * 3}
    labels = {"labels_off": 2, "labels": 8 * 96 * 144}
    found = dict(rows[0])
    assert found.pop("image_difference") == pytest.approx(7, abs=1e-3)
    assert found == {"tier": "dali", "operation": "decode", **counts, **labels}
    assert (rows[1]["values_off"], rows[1]["labels_off"]) == (0, 0)
