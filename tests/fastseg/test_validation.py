"""What a run keeps of its validations: which images are shown, and how."""

import json
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from PIL import Image

from fastseg.config import load_recipe, override
from fastseg.evaluation import Counted
from fastseg.overlays import PANEL_WIDTH, WRONG, Shown, disagreement, write_sheet, write_strips
from fastseg.pipelines.source import Batch
from fastseg.ranges import annotate
from fastseg.specs import make_spec, open_data
from fastseg.training import validation
from fastseg.training.meter import RANGES, RangeClock


@pytest.fixture
def spec(street):
    config = override(load_recipe("fast"), {"data.path": str(street), "data.size": "32x48"})
    dataset, splits = open_data(config)
    return make_spec(config, dataset, splits, "train", device=torch.device("cpu"), dtype=torch.float32, threads=2)


def right(*shares: float | None) -> np.ndarray:
    """Confusions of images of one class each, with these shares of right pixels; None: nothing is labelled."""
    return np.array(
        [[[0, 0], [0, 0]] if s is None else [[round(100 * s), 100 - round(100 * s)], [0, 0]] for s in shares]
    )


@pytest.mark.parametrize(
    ("shares", "wanted"),
    [
        (
            (0.5, 0.9, 0.1, None, 0.7, 0.3, 0.8, 0.6),
            [(2, "worst"), (5, "worst"), (1, "best"), (6, "best"), (0, "other"), (4, "other")],
        ),
        ((0.5, 0.9), [(0, "worst"), (1, "worst")]),
        ((None,), []),
    ],
)
def test_the_worst_the_best_and_others_are_shown(spec, monkeypatch, shares, wanted):
    confusions = right(*shares)
    asked = []

    def score(network, few, world, *, keep, fused):
        assert few.loader == "reference"
        asked.extend(pair.stem for pair in few.pairs)
        return Counted(confusions, None, [(n, np.full((2, 2), n)) for n in range(keep)])

    monkeypatch.setattr(validation, "score", score)
    step = SimpleNamespace(evaluated=None, model=SimpleNamespace(fused=False))
    run = SimpleNamespace(val_spec=spec, spec=spec, step=step)
    found = validation.examples(run, Counted(confusions, None, []))
    assert [(item.sample, item.kind) for item in found] == wanted
    assert asked == [spec.pairs[index].stem for index, _ in wanted]
    assert [item.prediction[0, 0] for item in found] == list(range(len(wanted)))
    # One class alone, of which so many pixels are right, and another that was predicted: IoU s and 0.
    assert all(item.miou == pytest.approx(shares[item.sample] / 2) for item in found)


def test_what_is_wrong_is_marked_and_void_is_not():
    photo = np.full((1, 4, 3), 200, np.uint8)
    label = np.array([[0, 1, 255, 1]], np.uint8)
    prediction = np.array([[0, 0, 0, 1]], np.uint8)
    assert disagreement(photo, label, prediction, 2).tolist() == [[[100] * 3, list(WRONG), [100] * 3, [100] * 3]]


def test_strips_replace_those_of_the_validation_before(spec, tmp_path):
    prediction = np.zeros((96, 144), np.uint8)
    write_strips(tmp_path, spec, [Shown(3, "worst", 0.25, prediction), Shown(1, "best", 0.5, prediction)])
    write_strips(tmp_path, spec, [Shown(2, "worst", 0.3, prediction)])
    stem = spec.pairs[2].stem
    assert sorted(path.name for path in tmp_path.iterdir()) == [f"0-worst-{stem}.png", "index.json"]
    rows = json.loads((tmp_path / "index.json").read_text())
    assert rows == [{"file": f"0-worst-{stem}.png", "image": stem, "kind": "worst", "miou": 0.3}]
    assert Image.open(tmp_path / rows[0]["file"]).size == (4 * PANEL_WIDTH, PANEL_WIDTH * 96 // 144)


def test_samples_for_a_page_are_made_smaller_and_small_ones_are_left(spec, tmp_path):
    images = torch.zeros(3, 3, 96, 144)
    batch = Batch(images, torch.zeros(3, 96, 144, dtype=torch.uint8), np.arange(3))
    for width, size in ((None, (2 * 144, 2 * 192)), (48, (2 * 48, 2 * 64)), (200, (2 * 144, 2 * 192))):
        write_sheet(tmp_path / "sheet.png", batch, spec, columns=2, width=width)
        assert Image.open(tmp_path / "sheet.png").size == size


def test_the_time_of_parts_is_summed_and_what_lies_inside_is_theirs(monkeypatch):
    clock = iter([1.0, 4.0, 10.0, 11.0, 20.0, 22.5])
    monkeypatch.setattr("fastseg.training.meter.time.perf_counter", lambda: next(clock))
    ranges = RangeClock(torch.device("cpu"))
    ranges.begin()
    with annotate("forward"), annotate("encoder 1"):
        pass
    with annotate("validation"):
        pass
    with annotate("loss"):
        pass
    with annotate("forward"):
        pass
    assert ranges.end() == dict.fromkeys(RANGES, 0.0) | {"forward": 5.5, "loss": 1.0}
    with annotate("forward"):  # nobody looks any more
        pass
    ranges.begin()
    ranges.close()
    assert annotate("forward") is annotate("loss")  # a run that ends before its second log line
