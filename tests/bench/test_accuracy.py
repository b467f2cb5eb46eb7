"""`fastseg bench accuracy`: times to targets worked by hand, and a run of both contestants on street scenes."""

import json
import subprocess
from pathlib import Path

import jsonschema
import pytest

from fastseg import bench
from fastseg.bench import accuracy
from fastseg.bench.accuracy import Point, time_to
from fastseg.errors import FastsegError, UsageError

SCHEMA = json.loads((Path(__file__).parents[2] / "bench" / "records" / "schema.json").read_text())


def test_a_target_is_reached_at_the_first_validation_at_or_above_it():
    curve = [Point(10, 0.1), Point(20, 0.3), Point(30, 0.2), Point(40, 0.4)]
    assert [time_to(curve, target) for target in (0.1, 0.2, 0.3, 0.35, 0.5)] == [10, 20, 20, 40, None]


def test_seconds_are_those_of_training_before_each_validation(tmp_path):
    events = [("train", 1, {"seconds": 2.0}), ("train", 2, {"seconds": 4.0}), ("val", 2, {"miou": 0.25, "seconds": 9})]
    events += [("train", 3, {"seconds": 6.0}), ("val", 3, {"miou": None, "seconds": 9})]
    lines = [json.dumps({"event": kind, "step": step, **fields}) for kind, step, fields in events]
    (tmp_path / "log.jsonl").write_text("\n".join(lines) + "\n")
    assert accuracy.points(tmp_path) == [Point(4.0, 0.25), Point(6.0, 0.0)]


def test_ratios_are_bounds_where_the_plain_loop_did_not_get_there(monkeypatch):
    runs = {0: [Point(10, 0.2), Point(20, 0.45)], 1: [Point(10, 0.1), Point(20, 0.35)]}
    monkeypatch.setattr(accuracy, "train_recipe", lambda recipe, data, size, seed, device: runs[seed])
    monkeypatch.setattr(accuracy, "train_plainly", lambda *_: [Point(50, 0.05), Point(100, 0.2)])
    how = {"targets": (0.3, 0.1, 0.4), "recipes": ("fast",), "seeds": 2, "cap": 100.0}
    found = bench.run("accuracy", data="x", size=(24, 32), batch=4, rounds=5, device="cpu", accuracy=how)
    rows = {row["name"]: (row["value"], row["n"]) for row in found["results"]}
    assert rows["fast: training to mIoU 0.1"] == (10, 2)
    assert rows["fast: training to mIoU 0.3"] == (20, 2)
    assert rows["fast: training to mIoU 0.4"] == (20, 1)
    assert rows["fast: not at mIoU 0.4 after"] == (20, 1)
    assert rows["fast: runs that did not reach 0.4"] == (1, 1)
    assert rows["plain PyTorch loop: training to mIoU 0.1"] == (100, 1)
    assert rows["plain PyTorch loop: not at mIoU 0.3 after"] == (100, 1)
    assert rows["fast: best mIoU"] == (pytest.approx(40), 2)
    ratios = {row["name"]: (row["value"], row["n"]) for row in found["ratios"]}
    assert ratios == {
        "time_to_0.10_vs_plain": (10, 2),
        "time_to_0.30_vs_plain (lower bound)": (5, 2),
        "time_to_0.40_vs_plain (lower bound)": (5, 1),
    }
    assert {curve["name"] for curve in found["series"]} == {"validation mIoU"}  # one panel for all
    assert [next(iter(curve["y"])) for curve in found["series"]] == [
        "fast, seed 0",
        "fast, seed 1",
        "plain PyTorch loop",
    ]
    assert found["protocol"]["rounds"] == 2
    jsonschema.validate(found, SCHEMA)


@pytest.mark.slow
def test_both_contestants_train_and_are_validated(street, tmp_path):
    (tmp_path / "tiny.toml").write_text("[train]\nepochs = 2\nbatch = 4\nlr = 0.1\n[model]\ndepth = 1\n")
    how = {"targets": (0.001, 0.999), "recipes": (str(tmp_path / "tiny.toml"),), "seeds": 1, "cap": 1.0}
    found = bench.run("accuracy", data=str(street), size=(24, 32), batch=4, rounds=5, device="cpu", accuracy=how)
    values = {row["name"].rpartition("tiny.toml")[2]: row["value"] for row in found["results"]}
    assert values[": training to mIoU 0.001"] > 0
    assert values["plain PyTorch loop: not at mIoU 0.999 after"] >= 1.0
    assert next(len(curve["x"]["seconds of training"]) for curve in found["series"]) == 2
    assert all(
        curve["x"]["seconds of training"] == sorted(curve["x"]["seconds of training"]) for curve in found["series"]
    )
    jsonschema.validate(found, SCHEMA)


def test_a_recipe_that_fails_is_told_in_its_own_words(street, tmp_path):
    with pytest.raises(UsageError, match=r"^--recipe fats: choose one of baseline, fast"):
        accuracy.train_recipe("fats", str(street), "24x32", 0, "cpu")
    with pytest.raises(FastsegError, match=r"^bench accuracy: --recipe fast: .*/none: no folder; give"):
        accuracy.train_recipe("fast", str(tmp_path / "none"), "24x32", 0, "cpu")


@pytest.mark.parametrize(("init", "options"), [("vgg16", ["--init", "none"]), ("identity", []), ("none", [])])
def test_recipes_that_begin_with_other_images_begin_with_random_weights(tmp_path, monkeypatch, init, options):
    (tmp_path / "tiny.toml").write_text(f'[model]\ninit = "{init}"\n')
    seen: list[list[str]] = []

    def run(command, **_):
        seen.append(command)
        raise InterruptedError

    monkeypatch.setattr(subprocess, "run", run)
    with pytest.raises(InterruptedError):
        accuracy.train_recipe(str(tmp_path / "tiny.toml"), "street", "24x32", 0, "cpu")
    (command,) = seen
    assert [word for word in command if word in ("--init", "none")] == options


def test_labels_of_colours_are_not_for_the_plain_loop(tmp_path):
    from fastseg.data.synth import write

    write(tmp_path / "d", layout="kaggle", counts={"train": 2, "val": 1, "test": 0}, size=(32, 48))
    with pytest.raises(UsageError, match=r"has labels of colours; the plain loop reads indices alone$"):
        accuracy.train_plainly(str(tmp_path / "d"), (24, 32), 0, accuracy.torch.device("cpu"), 0.5, 1.0)
