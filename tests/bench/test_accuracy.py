"""`fastseg bench accuracy`: times to targets worked by hand, and a run of both contestants on street scenes."""

import json
import subprocess
from pathlib import Path

import jsonschema
import pytest
import torch

from fastseg import bench
from fastseg.bench import accuracy
from fastseg.bench.accuracy import Point, time_to
from fastseg.config import load_recipe
from fastseg.errors import FastsegError, UsageError
from fastseg.model import SegNet, initialise

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
    how = {"targets": (0.3, 0.1, 0.4), "recipes": ("fast",), "seeds": 2, "cap": 100.0, "shares": False}
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


def test_the_shares_of_a_ratio_are_of_one_step_each_and_multiply_to_it(monkeypatch):
    seconds = {"plain PyTorch loop": 96, "hyperparameters": 48, "first weights": 16, "mixed precision": 8}
    seconds[accuracy.UNET] = 12
    monkeypatch.setattr(accuracy, "loops", lambda *_: seconds)
    monkeypatch.setattr(accuracy, "train_plainly", lambda data, size, device, loop, *_: [Point(loop, 0.2)])
    monkeypatch.setattr(accuracy, "train_recipe", lambda *_: [Point(2, 0.1), Point(4, 0.2)])
    how = {"targets": (0.2, 0.5), "recipes": ("fast",), "seeds": 1, "cap": 100.0, "shares": True}
    found = bench.run("accuracy", data="x", size=(24, 32), batch=4, rounds=5, device="cpu", accuracy=how)
    assert {row["name"]: row["value"] for row in found["ratios"]} == {
        "time_to_0.20_vs_plain": 24,
        "time_to_0.20_by_hyperparameters": 2,
        "time_to_0.20_by_first_weights": 3,
        "time_to_0.20_by_mixed_precision": 2,
        "time_to_0.20_by_the_rest": 2,
    }
    rows = {row["name"]: row["value"] for row in found["results"]}
    assert rows["plain loop with fast's hyperparameters and first weights: training to mIoU 0.2"] == 16
    assert rows["U-Net, ResNet-34, in the loop before it: not at mIoU 0.5 after"] == 12
    jsonschema.validate(found, SCHEMA)


def test_a_step_that_did_not_get_there_has_no_share():
    ladder = {"plain": [[Point(9, 0.1)]], "one": [[Point(8, 0.3)]], "two": [[Point(2, 0.3)], [Point(4, 0.3)]]}
    (only,) = accuracy._shares(0.3, ladder)
    assert (only["name"], only["n"]) == ("time_to_0.30_by_two", 2)
    assert only["value"] == pytest.approx(3)  # 8 / 2 and 8 / 4


def test_the_steps_differ_by_what_they_are_named_after():
    found = accuracy.loops("fast", "cpu")
    plain, hyper, first = (found[name] for name in ("plain PyTorch loop", "hyperparameters", "first weights"))
    assert (plain.train.lr, plain.train.schedule, plain.train.weighting, plain.ends) == (
        1e-3, "constant", "median-frequency", False,
    )  # fmt: skip
    assert (hyper.train.nesterov, hyper.train.schedule, hyper.dtype) == (True, "one-cycle", torch.float32)
    assert hyper.train == first.train == load_recipe("fast").train
    torch.manual_seed(0)
    network = first.network(5)
    torch.manual_seed(0)
    ours = SegNet(5)
    initialise(ours, "identity")
    # All scores begin at 0 there, so look at what the last layer is given.
    for last in (network.up[-1][-1], ours.decoder[-1][-1]):
        torch.nn.init.constant_(last.weight, 0.1)
    images = torch.randn(2, 3, 24, 32)
    torch.testing.assert_close(network(images), ours(images), rtol=1e-4, atol=1e-4)


def test_the_unet_takes_any_size():
    pytest.importorskip("segmentation_models_pytorch", reason="not installed: pip install '.[peers]'")
    network = accuracy.loops("fast", "cpu")[accuracy.UNET].network(5).eval()
    with torch.inference_mode():
        small, padded = torch.randn(1, 3, 24, 40), torch.zeros(1, 3, 32, 64)
        padded[..., :24, :40] = small
        assert torch.equal(network(small), network(padded)[..., :24, :40])


@pytest.mark.slow
def test_both_contestants_train_and_are_validated(street, tmp_path):
    (tmp_path / "tiny.toml").write_text("[train]\nepochs = 2\nbatch = 4\nlr = 0.1\n[model]\ndepth = 1\n")
    how = {"targets": (0.001, 0.999), "recipes": (str(tmp_path / "tiny.toml"),), "seeds": 1, "cap": 1.0, "shares": True}
    found = bench.run("accuracy", data=str(street), size=(24, 32), batch=4, rounds=5, device="cpu", accuracy=how)
    values = {row["name"].rpartition("tiny.toml")[2]: row["value"] for row in found["results"]}
    assert values[": training to mIoU 0.001"] > 0
    assert values["plain PyTorch loop: not at mIoU 0.999 after"] >= 1.0
    assert next(len(curve["x"]["seconds of training"]) for curve in found["series"]) == 2
    named = f"plain loop with {tmp_path / 'tiny.toml'}'s hyperparameters"
    assert {f"{name}: whole run" for name in (named, f"{named} and first weights")} <= {
        row["name"] for row in found["results"]
    }
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
        accuracy.train_plainly(
            str(tmp_path / "d"), (24, 32), "cpu", accuracy.loops("fast", "cpu")[accuracy.PLAIN], 0.5, 1
        )
