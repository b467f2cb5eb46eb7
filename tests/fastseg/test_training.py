"""The training run: the objective, exact resume, what it writes, and what stops it."""

import json
import os
import shutil
import signal
import subprocess
import sys
import time
from dataclasses import asdict
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F

from fastseg import checkpoint, runs, training
from fastseg import config as configs
from fastseg.checkpoint import Writer, read
from fastseg.config import Config
from fastseg.data.synth import write
from fastseg.errors import FastsegError, StoppedError, UsageError
from fastseg.evaluation import Counted, evaluate
from fastseg.pipelines.source import TrainSource
from fastseg.training import train
from fastseg.training.run import Progress
from fastseg.training.setup import set_up
from fastseg.training.step import Step

TINY = {"data.size": "32x48", "model.depth": 1, "train.batch": 2, "train.epochs": 3, "train.grow_from": 1.0}
TINY |= {"runtime.log_every": 2}


def tiny(street: Path, **changes: object) -> Config:
    """A configuration that trains in seconds: keys are written section__field."""
    named = {key.replace("__", "."): value for key, value in changes.items()}
    return configs.override(configs.override(configs.load_recipe("fast"), TINY | {"data.path": str(street)}), named)


def same_bits(a: Path, b: Path) -> bool:
    """True where two checkpoints hold equal weights, momentum and averages."""
    old, new = read(a / "checkpoints" / "last.pt"), read(b / "checkpoints" / "last.pt")
    assert old["progress"]["step"] == new["progress"]["step"]
    groups = [(old["model"], new["model"]), (old["ema"] or {}, new["ema"] or {})]
    groups.append({k: v["momentum_buffer"] for k, v in s["optimizer"]["state"]["state"].items()} for s in (old, new))
    return all(torch.equal(x[key], y[key]) for x, y in groups for key in x | y)


def events(run: Path, kind: str) -> list[dict]:
    return [event for event in runs.read_log(run) if event["event"] == kind]


class Killed(BaseException):
    """As sudden as a signal: nothing in the trainer catches it."""


def test_without_a_folder_a_run_has_a_new_one_and_one_that_never_began_leaves_none(street, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    config = tiny(street, train__max_steps=1)
    (first, second) = [Path(train(config)["run"]) for _ in range(2)]
    assert first != second
    assert {path.parent for path in (first, second)} == {Path("runs")}
    assert (second / "checkpoints" / "last.pt").is_file()
    with pytest.raises(FastsegError, match="no folder"):
        train(configs.override(config, {"data.path": "nowhere"}))
    assert set(Path("runs").iterdir()) == {first, second}
    with pytest.raises(UsageError, match=r"^train: give the run folder; to go on takes it"):
        train(config, resume=True)


def test_a_run_begins_with_a_checkpoint_for_other_classes_and_remembers_what_that_was_trained_on(
    street, tmp_path, capsys
):
    train(tiny(street, train__epochs=1), tmp_path / "first")
    trained = tmp_path / "first" / "checkpoints" / "last.pt"
    folder = tmp_path / "two"  # other images, road and all else
    write(folder, counts={"train": 4, "val": 2}, size=(64, 96), seed=7)
    rest = sorted(set(range(11)) - {3})
    (folder / "dataset.toml").write_text(
        f'void = [11]\nclasses = [{{name = "Road", index = 3}}, {{name = "rest", index = {rest}}}]\n'
        '[splits]\ntrain = {images = "train/*.png", labels = "trainannot/*.png"}\n'
        'val = {images = "val/*.png", labels = "valannot/*.png"}\n'
    )
    second = tmp_path / "second"
    options = {"model__init": str(trained), "train__schedule": "constant"}
    train(tiny(folder, train__epochs=1, **options), second)
    model = next(line for line in capsys.readouterr().err.splitlines() if f"init {trained}" in line)
    assert "(its weights after 4 steps; for other classes, the last layer is new (decoder.0.3.weight, " in model
    train(runs.reopen(second, lambda old: configs.override(old, {"train.epochs": 2}))[0], second, resume=True)
    state = read(second / "checkpoints" / "last.pt")
    own = sorted(path.stem for path in (folder / "train").iterdir())
    assert sorted(state["trained_on"]["stems"]) == sorted(own + read(trained)["trained_on"]["stems"])
    # Its split is its own: what it goes on with, and what a repetition asks for.
    assert sorted(json.loads((second / "split.json").read_text())["train"]) == own


def test_two_epochs_and_two_more_give_the_bits_of_four(street, tmp_path):
    whole, parts = tmp_path / "whole", tmp_path / "parts"
    train(tiny(street, train__epochs=4, train__schedule="constant", train__ema=0.9), whole)
    train(tiny(street, train__epochs=2, train__schedule="constant", train__ema=0.9), parts)
    config, changed = runs.reopen(parts, lambda old: configs.override(old, {"train.epochs": 4}))
    train(config, parts, resume=True)
    assert changed == {"train.epochs": (2, 4)}
    assert same_bits(whole, parts)
    assert [e["miou"] for e in events(whole, "val")] == [e["miou"] for e in events(parts, "val")]


def test_a_run_goes_on_to_the_same_bits_where_its_data_is_moved(street, tmp_path):
    here, there, whole, parts = (tmp_path / name for name in ("here", "there", "whole", "parts"))
    shutil.copytree(street, here)
    longer = {"train.epochs": 3}
    train(tiny(here, train__schedule="constant", train__epochs=3), whole)
    train(tiny(here, train__schedule="constant", train__epochs=2), parts)
    scores = evaluate(parts / "checkpoints" / "last.pt")
    here.rename(there)
    moved = evaluate(parts / "checkpoints" / "last.pt", data=str(there))
    assert moved == scores | {"protocol": scores["protocol"] | {"data": str(there)}}
    with pytest.raises(FastsegError, match="here: no folder"):
        train(runs.reopen(parts, lambda old: configs.override(old, longer))[0], parts, resume=True)
    config, changed = runs.reopen(parts, lambda old: configs.override(old, longer | {"data.path": str(there)}))
    assert changed == {"data.path": (str(here), str(there)), "train.epochs": (2, 3)}
    train(config, parts, resume=True)
    assert same_bits(whole, parts)
    assert [e["loss"] for e in events(whole, "train")] == [e["loss"] for e in events(parts, "train")]
    # From here on the run remembers where its data is.
    assert configs.read(parts / "config.toml").data.path == str(there)


def test_other_data_than_the_runs_is_refused_with_what_differs(street, tmp_path):
    run, other = tmp_path / "run", tmp_path / "other"
    train(tiny(street, train__epochs=1), run)
    shutil.copytree(street, other)

    def going_on() -> None:
        train(runs.reopen(run, lambda old: configs.override(old, {"data.path": str(other)}))[0], run, resume=True)

    # An image of as many bytes with another one in it, a label that was saved anew, and one pair less to validate.
    images, labels = (sorted((other / name).iterdir()) for name in ("train", "trainannot"))
    data = images[2].read_bytes()
    images[2].write_bytes(data[:-20] + bytes([data[-20] ^ 1]) + data[-19:])
    labels[5].write_bytes(labels[5].read_bytes() + b"1")
    gone = sorted((other / "val").iterdir())[0]
    gone.unlink()
    (other / "valannot" / gone.name).unlink()
    names = other / "val.txt"  # which would be missed first
    names.write_text("".join(line for line in names.read_text().splitlines(True) if gone.stem not in line))
    two = f"{images[2].stem}, {labels[5].stem}"
    says = f"the files of {other} are not those that {run} began with: train differs by 2 of 8 ({two}); "
    with pytest.raises(FastsegError) as error:
        going_on()
    assert str(error.value) == f"--resume --data: {says}val differs by 1 of 4 ({gone.stem})"


@pytest.fixture(scope="module")
def uninterrupted(street, tmp_path_factory) -> Path:
    """A run of 12 steps."""
    run = tmp_path_factory.mktemp("uninterrupted") / "run"
    train(tiny(street), run)
    return run


@pytest.mark.parametrize("step", [0, 3, 4, 9])
def test_a_run_killed_at_any_step_goes_on_to_the_same_bits(street, tmp_path, monkeypatch, step, uninterrupted):
    # 8 images in batches of 2: epochs of 4 steps. A step before the first checkpoint, one inside an epoch, both edges.
    whole, killed = uninterrupted, tmp_path / "killed"
    calls, real = iter(range(100)), Step.step

    def dying(self, images, labels, lr):
        if next(calls) == step:
            raise Killed
        return real(self, images, labels, lr)

    with monkeypatch.context() as patch:
        patch.setattr(Step, "step", dying)
        with pytest.raises(Killed):
            train(tiny(street), killed)
    config, changed = runs.reopen(killed, lambda old: old)
    train(config, killed, resume=True)
    assert changed == {}
    assert same_bits(whole, killed)
    for kind in ("train", "val"):
        assert [(e["step"], e.get("loss"), e.get("miou")) for e in events(killed, kind)] == [
            (e["step"], e.get("loss"), e.get("miou")) for e in events(whole, kind)
        ]


GROWING = {"train__epochs": 4, "train__grow_from": 0.5, "train__checkpoint_steps": 1}


@pytest.fixture(scope="module")
def grown(street, tmp_path_factory) -> Path:
    """A run of 16 steps: 16x24 until step 5, 24x36 until step 10, then 32x48."""
    run = tmp_path_factory.mktemp("grown") / "run"
    train(tiny(street, **GROWING), run)
    return run


@pytest.mark.parametrize("step", [1, 5, 9])
def test_a_run_whose_images_grow_goes_on_with_the_size_of_its_step(street, tmp_path, monkeypatch, step, grown):
    whole, killed, calls, seen = grown, tmp_path / "killed", iter(range(100)), []
    config = tiny(street, **GROWING)

    real = Step.step

    def dying(self, images, labels, lr):
        if next(calls) == step:
            raise Killed
        return noting(self, images, labels, lr)

    def noting(self, images, labels, lr):
        seen.append(tuple(images.shape[2:]))
        return real(self, images, labels, lr)

    monkeypatch.setattr(Step, "step", dying)
    with pytest.raises(Killed):
        train(config, killed)
    monkeypatch.setattr(Step, "step", noting)
    train(config, killed, resume=True)
    assert seen == [(16, 24)] * 5 + [(24, 36)] * 5 + [(32, 48)] * 6
    assert same_bits(whole, killed)


def test_training_twice_gives_the_same_bits_on_two_threads(street, tmp_path):
    for name in ("a", "b"):
        train(tiny(street, model__depth=2, runtime__threads=2, train__epochs=2), tmp_path / name)
    assert same_bits(tmp_path / "a", tmp_path / "b")


def step_of(street: Path, **changes: object) -> Step:
    """A run's step whose batch norms keep their statistics, so that batches can be split without changing the network.

    In fp32, whatever the machine does well: these tests compare sums.
    """
    step = set_up(tiny(street, train__weight_decay=0.0, runtime__dtype="fp32", **changes), None).step
    step.model.eval()
    return step


def some_batch(void: float) -> tuple[torch.Tensor, torch.Tensor]:
    """4 images of noise and their labels, of whose rows that share is void, from the first image on."""
    generator = torch.Generator().manual_seed(1)
    labels = torch.randint(0, 11, (4, 32, 48), generator=generator, dtype=torch.uint8)
    labels.view(-1)[: int(void * labels.numel())] = 255
    return torch.randn(4, 3, 32, 48, generator=generator), labels


@pytest.mark.parametrize("void", [0.0, 0.3])
def test_the_loss_is_the_weighted_mean_over_the_batch(street, void):
    step, (images, labels) = step_of(street, train__batch=4), some_batch(void)
    target = labels.long().masked_fill(labels == 255, -100)
    expected = F.cross_entropy(step.model(images), target, step.weights)
    taken = step.step(images, labels, 0.0)
    torch.testing.assert_close(taken.loss, expected.detach(), rtol=1e-5, atol=0)
    assert (bool(taken.void), taken.skipped, taken.sound) == (False, False, True)


def test_accumulation_takes_the_step_of_the_whole_batch(street):
    # The first of two backward passes has far fewer labelled pixels: a mean of two means would differ.
    whole, halves = step_of(street, train__batch=4), step_of(street, train__batch=2, train__accumulate=2)
    for step in (whole, halves):
        step.step(*some_batch(0.45), 0.1)
    for a, b in zip(whole.model.parameters(), halves.model.parameters(), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-7)


def test_a_run_may_end_inside_an_epoch_and_is_saved_there(street, tmp_path, capsys):
    whole, part = tmp_path / "whole", tmp_path / "part"
    train(tiny(street, train__schedule="constant"), whole)
    found = train(tiny(street, train__schedule="constant", train__max_steps=6), part)  # an epoch is 4 steps
    assert found["steps"] == 6
    assert [event["step"] for event in events(part, "val")] == [4]
    assert read(part / "checkpoints" / "last.pt")["progress"]["step"] == 6
    losses = [[event["loss"] for event in events(run, "train")][:3] for run in (whole, part)]
    assert losses[0] == losses[1]
    assert "6, as train.max_steps says" in capsys.readouterr().err


def test_crops_are_trained_on_and_whole_images_validated(street, tmp_path, monkeypatch, capsys):
    seen, real = [], Step.step
    monkeypatch.setattr(Step, "step", lambda self, *given: seen.append(given) or real(self, *given))
    run = tmp_path / "run"
    train(tiny(street, augment__crop="16x20", train__epochs=1), run)
    assert {(*images.shape, *labels.shape) for images, labels, _ in seen} == {(2, 3, 16, 20, 2, 16, 20)}
    # Four validation images of 96x144, not of a crop's size.
    assert sum(row["pixels"] for row in events(run, "val")[-1]["classes"]) > 4 * 96 * 144 / 2
    assert "trains on 16x20 windows of 32x48" in capsys.readouterr().err


def test_windows_of_the_files_own_pixels_are_trained_on_and_whole_images_validated(
    street, tmp_path, monkeypatch, capsys
):
    """Twice as large, 16x24 pixels of a file of 96x144 are 32x48; half as large, most of it is."""
    seen, real = [], Step.step
    monkeypatch.setattr(Step, "step", lambda self, *given: seen.append(given) or real(self, *given))
    for scale, window in ((1, "32x48"), (2, "16x24"), (0.4, "80x120")):
        run = tmp_path / f"run-{scale}"
        train(tiny(street, train__scale=float(scale), train__epochs=1), run)
        assert {(*images.shape, *labels.shape) for images, labels, _ in seen} == {(2, 3, 32, 48, 2, 32, 48)}
        assert not any((labels == 255).all(2).any() for _, labels, _ in seen)  # no translation uncovers whole rows
        assert sum(row["pixels"] for row in events(run, "val")[-1]["classes"]) > 4 * 96 * 144 / 2
        says = f"trains on {window} windows of the files' own pixels, as 32x48, not moved; validates on whole images"
        assert says in " ".join(capsys.readouterr().err.split())


def test_letterboxed_images_are_trained_on_and_said(street, tmp_path, capsys):
    run = tmp_path / "run"
    train(tiny(street, data__fit="letterbox", data__size="32x96", train__epochs=1), run)
    # What surrounds images is no label: of files of 96x144 all pixels but their own void ones are scored.
    plain = tmp_path / "plain"
    train(tiny(street, data__size="32x96", train__epochs=1), plain)
    scored = [sum(row["pixels"] for row in events(path, "val")[-1]["classes"]) for path in (run, plain)]
    assert scored[0] == scored[1] > 0
    assert "input 32x96, letterboxed" in capsys.readouterr().err


def test_the_log_says_what_the_start_took_and_how_much_was_decoded(street, tmp_path, capsys):
    decoded = {}
    for loader in ("reference", "cache"):
        run = tmp_path / loader
        train(tiny(street, runtime__loader=loader), run)
        (startup,) = events(run, "startup")
        parts = ["processes and device", "data set", "classes", "network", "optimiser", "run folder"]
        parts += ["warm-up", "first batch"]
        assert (startup["step"], [*startup["parts"]]) == (0, [*parts, "rest"])
        assert sum(startup["parts"].values()) == pytest.approx(startup["seconds"])
        assert capsys.readouterr().err.count("first step after ") == 1
        # 8 images an epoch are 4 steps; a log line every 2 steps.
        decoded[loader] = [event["decoded_per_s"] > 0 for event in events(run, "train")]
    assert decoded["reference"] == [True] * 6
    assert decoded["cache"][2:] == [False] * 4


def test_a_second_run_on_the_same_data_counts_no_labels(street, tmp_path, monkeypatch):
    monkeypatch.setenv("FASTSEG_DATA", str(tmp_path / "home"))
    train(tiny(street, train__max_steps=1), tmp_path / "first")
    monkeypatch.setattr("fastseg.data.stats.count", None)
    train(tiny(street, train__max_steps=1), tmp_path / "second")
    first, second = (events(tmp_path / name, "start")[0] for name in ("first", "second"))
    assert first["classes"] == second["classes"]


def test_a_batch_of_only_void_pixels_has_loss_0_and_changes_nothing(street):
    step = step_of(street, train__batch=4)
    before = [p.clone() for p in step.model.parameters()]
    taken = step.step(*some_batch(1.0), 0.1)
    assert (float(taken.loss), bool(taken.void)) == (0, True)
    assert all(torch.equal(a, b) for a, b in zip(before, step.model.parameters(), strict=True))


def test_clipping_bounds_the_step(street):
    step = step_of(street, train__batch=4, train__clip=0.01, train__momentum=0.0, train__nesterov=False)
    before = [p.detach().clone() for p in step.model.parameters()]
    step.step(*some_batch(0.0), 1.0)
    moved = sum(float((a - b.detach()).square().sum()) for a, b in zip(before, step.model.parameters(), strict=True))
    assert moved**0.5 == pytest.approx(0.01, rel=1e-3)


def test_the_network_trains_in_training_mode_after_a_validation(street, tmp_path, monkeypatch):
    modes, real = [], Step.step
    monkeypatch.setattr(Step, "step", lambda self, *given: modes.append(self.model.training) or real(self, *given))
    train(tiny(street, train__epochs=2), tmp_path / "run")
    assert modes == [True] * 8


def scripted(monkeypatch, mious: list[float]) -> None:
    """Validations give these mIoUs, in turn: a confusion of one class with that share of hits and as many misses."""
    scores = iter(mious)

    def fake(*_, **__):
        hits = round(1000 * next(scores))
        return Counted(np.pad([[[hits, 1000 - hits], [0, 0]]], ((0, 0), (0, 9), (0, 9))), None, [])

    monkeypatch.setattr("fastseg.training.validation.score", fake)
    monkeypatch.setattr("fastseg.training.validation.examples", lambda run, found: [])


def test_patience_stops_after_validations_without_a_better_score(street, tmp_path, monkeypatch):
    scripted(monkeypatch, [0.2, 0.6, 0.4, 0.6, 0.9])
    result = train(tiny(street, train__epochs=9, train__patience=2), tmp_path / "run")
    assert [e["best"] for e in events(tmp_path / "run", "val")] == [True, True, False, False]
    assert (result["steps"], result["best_miou"]) == (16, pytest.approx(0.3))  # 0.6 for one class, 0 for the other
    assert read(tmp_path / "run" / "checkpoints" / "best.pt")["progress"]["step"] == 8


def test_the_best_score_is_kept_across_a_resume(street, tmp_path, monkeypatch):
    scripted(monkeypatch, [0.8, 0.4, 0.6])
    run = tmp_path / "run"
    train(tiny(street, train__epochs=1), run)
    config, _ = runs.reopen(run, lambda old: configs.override(old, {"train.epochs": 3}))
    assert train(config, run, resume=True)["best_miou"] == pytest.approx(0.4)
    assert read(run / "checkpoints" / "best.pt")["progress"]["step"] == 4


def test_a_run_folder_holds_what_it_promises(street, tmp_path, capsys):
    run = tmp_path / "run"
    result = train(tiny(street, train__keep_every=2), run)
    names = {str(p.relative_to(run)) for p in run.rglob("*") if p.is_file()}
    boards = {name for name in names if name.startswith("events.out.tfevents")}
    overlays = {name for name in names if name.startswith("overlays/")}
    checkpoints = {f"checkpoints/{name}.pt" for name in ("last", "best", "epoch-0002")}
    files = {"config.toml", "environment.json", "split.json", "log.jsonl", "report.html", "samples.png"}
    assert names == files | checkpoints | boards | overlays
    assert (len(boards), len(overlays)) == (1, 5)  # all four validation images, and index.json
    assert configs.read(run / "config.toml") == tiny(street, train__keep_every=2, train__global_batch=2)
    assert len(json.loads((run / "split.json").read_text())["train"]) == 8
    assert result["steps"] == 12 == events(run, "end")[0]["step"]
    assert [e["step"] for e in events(run, "train")] == [2, 4, 6, 8, 10, 12]
    assert all(
        e["img_per_s"] == e["img_per_s_per_device"] > 0 and 0 <= e["data_wait"] <= 1 for e in events(run, "train")
    )
    block = [line.split()[0] for line in capsys.readouterr().err.splitlines()[:15]]
    names = ["run", "data", "split", "model", "loss", "loader", "device", "dtype", "kernels", "capture", "optimizer"]
    names += ["world", "batch", "lr", "steps"]
    assert block == names


def test_evaluating_the_checkpoint_gives_the_logged_scores_exactly(street, tmp_path):
    run = tmp_path / "run"
    train(tiny(street, train__ema=0.5), run)
    for name, logged in (("last", events(run, "val")[-1]), ("best", [e for e in events(run, "val") if e["best"]][-1])):
        document = evaluate(run / "checkpoints" / f"{name}.pt")
        assert document["protocol"]["step"] == logged["step"]
        assert of_pixels(document) == logged["classes"]
        for key in ("miou", "global_accuracy", "mean_accuracy", "fw_iou", "absent", "confusion"):
            assert document[key] == logged[key]


def of_pixels(document: dict) -> list[dict]:
    """The scores of classes without those of contours, which no validation of a run takes the time for."""
    return [{key: value for key, value in row.items() if key != "boundary_f1"} for row in document["classes"]]


@pytest.mark.parametrize("loader", ["dali", "reference"])
def test_all_four_layouts_train_and_evaluate_to_identical_results(tmp_path, loader):
    from fastseg.data.synth import LAYOUTS, write

    if loader == "dali":
        pytest.importorskip("nvidia.dali")
    found = []
    for layout in LAYOUTS:
        write(tmp_path / layout, layout=layout, counts={"train": 4, "val": 2}, size=(64, 96))
        config = tiny(tmp_path / layout, runtime__loader=loader, train__epochs=2)
        train(config, tmp_path / f"run-{layout}")
        assert same_bits(tmp_path / f"run-{LAYOUTS[0]}", tmp_path / f"run-{layout}")
        found.append(evaluate(tmp_path / f"run-{layout}" / "checkpoints" / "last.pt")["confusion"])
    assert found == [found[0]] * 4
    assert np.sum(found[0]) > 0.9 * 2 * 64 * 96


@pytest.mark.slow
@pytest.mark.parametrize("kernels", ["torch", "fused"])
def test_two_processes_train_one_run_and_evaluate_as_one(street, tmp_path, kernels):
    run = tmp_path / "run"
    changes = TINY | {"runtime.kernels": kernels, "runtime.loader": "reference"}  # DALI's import takes seconds
    sets = [part for key, value in changes.items() for part in ("--set", f"{key}={value}")]
    command = [sys.executable, "-m", "fastseg", "train", "--data", str(street), "--recipe", "fast", *sets]
    environment = os.environ | {"OMP_NUM_THREADS": "1"}
    done = subprocess.run(
        [*command, "--device", "cpu", "--nproc", "2", "--run", str(run), "--json"],
        capture_output=True, text=True, env=environment, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    assert json.loads(done.stdout)["steps"] == 6  # 8 images x 3 epochs in batches of 2 x 2
    assert len(events(run, "start")) == 1
    assert events(run, "start")[0]["world"] == 2
    assert of_pixels(evaluate(run / "checkpoints" / "last.pt")) == events(run, "val")[-1]["classes"]


def test_the_fused_operators_train_and_evaluate_the_same_run(street, tmp_path):
    for kernels in ("torch", "fused"):
        train(tiny(street, runtime__kernels=kernels, runtime__dtype="fp32", model__depth=2), tmp_path / kernels)
    plain, fused = (events(tmp_path / kernels, "train") for kernels in ("torch", "fused"))
    assert [e["loss"] for e in fused] == pytest.approx([e["loss"] for e in plain], rel=1e-3)
    (start,) = events(tmp_path / "fused", "start")
    why = "as asked, their PyTorch reference on a CPU"
    assert start["choices"]["kernels"] == {"value": "fused", "why": why, "facts": {}}
    found = evaluate(tmp_path / "fused" / "checkpoints" / "last.pt")
    assert found["protocol"]["kernels"] == "fused"
    assert found["miou"] == events(tmp_path / "fused", "val")[-1]["miou"]


def test_a_finished_run_is_not_trained_further(street, tmp_path, monkeypatch):
    run = tmp_path / "run"
    first = train(tiny(street), run)
    monkeypatch.setattr(Step, "step", None)
    assert train(runs.reopen(run, lambda old: old)[0], run, resume=True) == first


def test_a_loss_that_is_no_number_stops_the_run_and_names_the_cure(street, tmp_path):
    with pytest.raises(FastsegError, match=r"the loss is .* at step \d+: lower train.lr \(1e\+12\)"):
        train(tiny(street, train__lr=1e12, train__schedule="constant"), tmp_path / "run")


def test_a_run_that_exists_is_never_overwritten(street, tmp_path):
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "notes.txt").write_text("mine")
    with pytest.raises(UsageError, match=r"exists: continue it with --resume"):
        train(tiny(street), tmp_path / "run")


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"runtime__dtype": "fp16", "runtime__device": "cpu"}, "--dtype fp16: a CPU has no fast fp16"),
        ({"train__drop_remainder": True, "train__batch": 9}, "9 images per step are more than the 8 training images"),
        ({"data__path": "/nowhere"}, "/nowhere: no folder"),
        ({"data__split_scheme": "segnet"}, "no name is in SegNet's published lists"),
        ({"augment__crop": "33x48"}, "augment.crop: 33x48 is larger than data.size, 32x48"),
        ({"augment__crop": "16x20", "train__grow_from": 0.5}, "do not grow; add --set train.grow_from=1, or leave out"),
        (
            {"augment__crop": "16x20", "train__scale": 1.0},
            r"augment.crop: train.scale = 1 cuts windows out of the files already, of data.size \(32x48\); leave out",
        ),
        ({"train__scale": 1.0, "train__grow_from": 0.5}, "add --set train.grow_from=1, or leave out train.scale"),
        (
            {"data__size": "16x16", "model__depth": 5, "train__batch": 1, "train__grow_from": 0.5},
            "1 image of 8x8, with which train.grow_from begins, the deepest maps are one pixel",
        ),
        ({"model__depth": 6}, "model.depth = 6: 5 or less"),
        ({"train__global_batch": 5, "train__accumulate": 2}, "train.global_batch: 5 images cannot be shared out to 1"),
        ({"runtime__sync_bn": True, "runtime__device": "cpu"}, "--sync-bn: torch synchronises batch norm between GPUs"),
    ],
)
def test_what_cannot_be_trained_is_refused_before_anything_is_written(street, tmp_path, changes, message):
    with pytest.raises(FastsegError, match=message):
        train(tiny(street, **changes), tmp_path / "run")
    assert not (tmp_path / "run").exists()


def test_changed_training_data_is_refused_on_resume(tmp_path):
    from fastseg.data.synth import write

    write(tmp_path / "data", counts={"train": 4, "val": 1}, size=(32, 48))
    train(tiny(tmp_path / "data", train__epochs=1), tmp_path / "run")
    image = next((tmp_path / "data" / "train").iterdir())
    image.write_bytes(image.read_bytes() + b"\0")
    config, _ = runs.reopen(tmp_path / "run", lambda old: configs.override(old, {"train.epochs": 2}))
    with pytest.raises(FastsegError, match=r"training images of .* have changed"):
        train(config, tmp_path / "run", resume=True)


def test_the_global_batch_sets_the_batch(street, tmp_path):
    train(tiny(street, train__global_batch=4, train__accumulate=2, train__epochs=1), tmp_path / "run")
    (start,) = events(tmp_path / "run", "start")
    assert (start["batch"], start["total_steps"]) == (4, 2)  # 8 images
    kept = (tmp_path / "run" / "config.toml").read_text().splitlines()
    assert {"batch = 0", "global_batch = 4"} <= set(kept)


def test_a_signal_between_two_log_lines_loses_no_loss(street, tmp_path):
    whole, parts = tmp_path / "whole", tmp_path / "parts"
    train(tiny(street, runtime__log_every=4), whole)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Step, "step", signalled(signal.SIGUSR1, at=2))
        with pytest.raises(StoppedError, match="SIGUSR1: saved after step 3; go on with: fastseg train --resume"):
            train(tiny(street, runtime__log_every=4), parts)
    assert signal.getsignal(signal.SIGUSR1) == signal.SIG_DFL
    assert [event["step"] for event in events(parts, "stopped")] == [3]
    config, _ = runs.reopen(parts, lambda old: old)
    train(config, parts, resume=True)
    assert same_bits(whole, parts)
    assert [(e["step"], e["loss"]) for e in events(parts, "train")] == [
        (e["step"], e["loss"]) for e in events(whole, "train")
    ]


def test_a_signal_before_the_first_step_does_not_wait_for_it(street, tmp_path, monkeypatch):
    config, run = tiny(street, train__epochs=1), tmp_path / "run"
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    with monkeypatch.context() as patch:
        patch.setattr("fastseg.training.loop.warm_up", lambda run: os.kill(os.getpid(), signal.SIGINT))
        with pytest.raises(KeyboardInterrupt):
            train(config, run)
    assert signal.signal(signal.SIGINT, before) is signal.default_int_handler
    assert [event["event"] for event in runs.read_log(run)] == ["start"]
    train(runs.reopen(run, lambda old: old)[0], run, resume=True)
    assert events(run, "end")


def signalled(number: int, at: int):
    """`Step.step` that gets a signal in step `at`, counted from 0, and a second one at once: they count as one."""
    calls, real = iter(range(100)), Step.step

    def step(self, images, labels, lr):
        if next(calls) == at:
            for _ in range(2):
                os.kill(os.getpid(), number)
        return real(self, images, labels, lr)

    return step


def test_a_checkpoint_inside_an_epoch_is_written_at_its_steps(street, tmp_path, monkeypatch):
    seen = []
    submit = Writer.submit

    def watched(writer, path, state):
        seen.append((path.name, state["progress"]["step"], state["progress"]["since"]))
        submit(writer, path, state)

    monkeypatch.setattr(Writer, "submit", watched)
    train(tiny(street, train__epochs=2, train__checkpoint_steps=3), tmp_path / "run")
    # 8 steps; a checkpoint is asked for after 3 and 6, and log lines stand at 2, 4, 6, 8.
    assert seen == [("last.pt", 3, 2), ("last.pt", 6, 6)]
    seen.clear()
    train(tiny(street, train__epochs=1, train__checkpoint_minutes=1e-9), tmp_path / "other")
    assert seen == [("last.pt", 1, 0), ("last.pt", 2, 2), ("last.pt", 3, 2)]


def test_a_checkpoint_that_cannot_be_written_stops_the_run(street, tmp_path, monkeypatch):
    def full(path, state):
        raise FastsegError(f"{path} could not be written (disk full)")

    monkeypatch.setattr(checkpoint, "save", full)
    with pytest.raises(FastsegError, match=r"last\.pt could not be written"):
        train(tiny(street, train__checkpoint_steps=1), tmp_path / "run")


@pytest.mark.parametrize(("loader", "warnings"), [("reference", 1), ("cache", 0)])
def test_a_run_that_waits_for_data_names_the_cure_once(street, tmp_path, monkeypatch, capsys, loader, warnings):
    class Slow(TrainSource):
        def __iter__(self):
            for batch in super().__iter__():
                time.sleep(0.1)  # several times a step
                yield batch

    monkeypatch.setattr("fastseg.pipelines.growing.TrainSource", Slow)
    train(tiny(street, runtime__loader=loader, runtime__log_every=1, train__epochs=2), tmp_path / "run")
    said = [line for line in capsys.readouterr().err.splitlines() if line.startswith("data holds training back: ")]
    assert len(said) == warnings
    assert all("--loader cache" in line for line in said)


def test_a_run_whose_last_checkpoint_fails_has_not_ended(street, tmp_path, monkeypatch):
    def full(path, state):
        raise FastsegError("the disk is full")

    left = []
    monkeypatch.setattr("fastseg.checkpoint.save", full)
    monkeypatch.setattr(training, "leave", lambda: left.append(True))
    with pytest.raises(FastsegError, match=r"^the disk is full$"):
        train(tiny(street, train__max_steps=3), tmp_path / "run")
    assert [event["event"] for event in runs.read_log(tmp_path / "run")][-1] == "checkpoint"
    assert left == [True]


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"digest": None}, "the training images of .* have changed"),
        ({"optimizer": None}, "holds weights alone"),
        ({"progress": {"step": 4}}, r"last\.pt is damaged"),
        ({"progress": asdict(Progress()) | {"stale": "x"}}, r"last\.pt is damaged"),
        ({"optimizer": {"state": {}}}, r"last\.pt is damaged"),
    ],
)
def test_a_checkpoint_without_what_a_run_needs_is_one_line(street, tmp_path, change, message):
    config = tiny(street, train__epochs=1)
    train(config, tmp_path / "run")
    path = tmp_path / "run" / "checkpoints" / "last.pt"
    state = {key: value for key, value in (read(path) | change).items() if value is not None}
    torch.save(state | {"ema": None}, path)
    with pytest.raises(FastsegError, match=f"^--resume: .*{message}") as error:
        train(tiny(street, train__epochs=2), tmp_path / "run", resume=True)
    assert "\n" not in str(error.value)


def test_a_report_that_cannot_be_written_does_not_stop_a_run_that_goes_on(street, tmp_path, monkeypatch, capsys):
    written = []

    def failing(run):
        written.append(run)
        if len(written) < 3:
            raise FastsegError("the report could not be written")

    monkeypatch.setattr("fastseg.training.loop.REPORT_SECONDS", 0.0)
    for module in ("loop", "__init__"):
        monkeypatch.setattr(f"fastseg.training.{module}.write_report".replace(".__init__", ""), failing)
    assert train(tiny(street, train__epochs=2), tmp_path / "run")["steps"] == 8
    assert capsys.readouterr().err.count("the report could not be written") == 2
