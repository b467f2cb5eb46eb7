"""Faults of options, of what a run goes on from, and of the machine that it runs on."""

import dataclasses
import json
import os
import re
import shutil
import signal
import socket
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from fastseg import config as configs
from fastseg import runs
from fastseg.checkpoint import build_model, read
from fastseg.distributed import World
from fastseg.errors import FastsegError, StoppedError
from fastseg.evaluation import score
from fastseg.metrics import Scores
from fastseg.pipelines.source import TrainSource
from fastseg.runs import read_log
from fastseg.specs import open_specs
from fastseg.training import train
from fastseg.training.loop import advance
from fastseg.training.optim import one_cycle
from fastseg.training.setup import set_up

TINY = ["--recipe", "fast", "--size", "32x48", "--epochs", "1", "--batch", "2", "--set", "model.depth=1"]


def said(call, *arguments, code: int) -> str:
    """The last line that a command says on standard error, and that it is an error of that exit code."""
    got, _, err = call(*arguments)
    assert got == code
    line = err.splitlines()[-1]
    assert line.startswith("fastseg: ")
    return line.removeprefix("fastseg: ")


def lines(run: Path, kind: str) -> list[dict]:
    return [event for event in read_log(run) if event["event"] == kind]


# Scores


def test_a_perfect_prediction_of_3_of_11_classes(row):
    confusion = np.zeros((11, 11), np.int64)
    confusion[[0, 3, 7], [0, 3, 7]] = 50, 30, 20
    assert Scores(confusion).miou == 1
    confusion[3, 5] += 1  # one pixel of road is called tree
    assert Scores(confusion).miou == pytest.approx((1 + 30 / 31 + 1 + 0) / 4)
    text = json.dumps(Scores(confusion).summary(tuple("abcdefghijk")), allow_nan=False)
    assert json.loads(text)["absent"] == ["b", "c", "e", "g", "i", "j", "k"]
    row("perfect prediction of images with 3 of 11 classes", "mIoU 1, over these 3; the absent ones are named")
    row("the same with one false pixel of a fourth class", "that class counts with IoU 0; in JSON null, never NaN")


class Share(World):
    """One of several processes, whose sums are not taken."""

    def sum(self, tensor):
        return tensor


def test_counts_depend_on_neither_batch_nor_processes(street, row):
    torch.manual_seed(0)
    from fastseg.model import SegNet

    network = SegNet(11, depth=2).to(memory_format=torch.channels_last)
    _, specs = open_specs(str(street), splits=("train",), size="33x47")
    spec, alone = specs["train"], World(0, 1, torch.device("cpu"))
    whole = score(network, spec, alone).confusions
    assert whole.sum(axis=(1, 2)).min() > 0
    for few in (1, 2, 5):
        parts = [
            score(
                network,
                dataclasses.replace(spec, pairs=spec.pairs[i : i + few], headers=spec.headers[i : i + few]),
                alone,
            ).confusions
            for i in range(0, len(spec.pairs), few)
        ]
        np.testing.assert_array_equal(np.concatenate(parts), whole)
    shares = [score(network, spec, Share(rank, 2, torch.device("cpu"))).confusions for rank in (0, 1)]
    np.testing.assert_array_equal(sum(shares), whole)
    row("evaluation of 1, 2, 5 or 8 images at a time, by 1 or 2 processes", "equal counts: one internal batch shape")


# fp16


@pytest.fixture
def half(monkeypatch):
    """Training in fp16 with its gradient scaler, on the CPU, where fastseg would refuse it as slow."""
    monkeypatch.setattr("fastseg.training.setup.choose_dtype", lambda *_: (torch.float16, "float16", "for a test"))


def tiny(street, **changes):
    named = {key.replace("__", "."): value for key, value in changes.items()}
    fixed = {"data.path": str(street), "data.size": "32x48", "model.depth": 1, "train.batch": 2, "train.ema": 0.0}
    fixed |= {"runtime.device": "cpu", "runtime.log_every": 1, "train.epochs": 2}
    return configs.override(configs.load_recipe("fast"), fixed | named)


def test_fp16_with_a_learning_rate_of_a_million(street, tmp_path, half, capfd, row):
    # 8 images in batches of 2: the rate rises from 0.01 to 10^6 after the first epoch of 4 steps.
    steps = {
        "train__schedule": "step",
        "train__step_epochs": 1,
        "train__step_factor": 1e8,
        "train__lr": 0.01,
        "data__size": "16x24",
    }
    with pytest.raises(FastsegError, match=r"^20 steps in a row had no finite gradients in fp16") as error:
        train(tiny(street, **steps, train__epochs=40), tmp_path / "run")
    said = capfd.readouterr().err.splitlines()
    assert "no checkpoint after step 8, whose loss is no number; the one before it is kept" in said
    kept = read(tmp_path / "run" / "checkpoints" / "last.pt")
    assert kept["progress"]["step"] == 4
    assert all(torch.isfinite(value).all() for value in kept["model"].values())
    assert lines(tmp_path / "run", "train")[-1]["skipped_steps"] == 19
    row("fp16 with learning rate 10^6", str(error.value), "lower train.lr")


@pytest.mark.parametrize("number", [signal.SIGTERM, 0])
def test_an_end_among_steps_whose_loss_is_no_number(street, tmp_path, half, monkeypatch, number):
    """By a signal, or by the last step: what was saved before stays, and the run says that it has not ended well."""

    def spoil(step: int) -> None:
        if step == 5:
            with torch.no_grad():
                next(parameters).fill_(torch.inf)
        if step == 6 and number:
            os.kill(os.getpid(), number)

    def remember(*arguments, **named):
        nonlocal parameters
        made = set_up(*arguments, **named)
        parameters = made.step.model.parameters()
        return made

    parameters: Iterator[torch.Tensor] = iter(())
    monkeypatch.setattr("fastseg.training.set_up", remember)
    config = tiny(street, train__epochs=2, data__size="16x24")
    with pytest.raises(StoppedError if number else FastsegError) as error:
        train(config, tmp_path / "run", after_step=spoil)
    assert read(tmp_path / "run" / "checkpoints" / "last.pt")["progress"]["step"] == 4
    assert not lines(tmp_path / "run", "end")
    if number:
        assert str(error.value).startswith(
            "SIGTERM: not saved after step 7, whose loss is no number; the checkpoint before"
        )
        assert "--resume" in str(error.value)
    else:
        assert str(error.value).startswith("the loss of the last step is no number: lower train.lr")


def test_a_skipped_step_leaves_batch_norm_as_it_was(street, half, monkeypatch):
    scaler = torch.amp.GradScaler
    monkeypatch.setattr("torch.amp.GradScaler", lambda device, enabled: scaler(device, 2.0**40, enabled=enabled))
    run = set_up(tiny(street, data__size="16x24", train__ema=0.9), None)
    batch = next(iter(TrainSource(dataclasses.replace(run.spec, loader="reference"), run.plan)))
    before = {name: value.clone() for name, value in run.step.model.state_dict().items()}
    batch.images[0, 0, 0, 0] = torch.inf
    advance(run, batch, lr=0.1)
    assert (run.progress.skipped_steps, run.skipped_in_a_row, run.sound) == (1, 1, False)
    for state in (run.step.model.state_dict(), run.step.average.model.state_dict()):
        assert all(torch.equal(state[name], before[name]) for name in before)
    batch.images[0, 0, 0, 0] = 0.0
    advance(run, batch, lr=0.1)
    assert (run.progress.skipped_steps, run.sound) == (2, True)  # the scale alone was too large


def test_steps_that_fp16_skips_do_not_move_the_schedule(street, tmp_path, half, monkeypatch, row):
    scaler = torch.amp.GradScaler
    monkeypatch.setattr("torch.amp.GradScaler", lambda device, enabled: scaler(device, 2.0**20, enabled=enabled))
    train(tiny(street, train__epochs=5, train__lr=0.05, data__size="16x24"), tmp_path / "run")
    found, skipped = lines(tmp_path / "run", "train"), 0
    assert found[-1]["skipped_steps"] > 0
    assert len(found) == 20
    for line in found:
        assert line["lr"] == one_cycle(line["step"] - 1 - skipped, 20, 0.05, configs.load_recipe("fast").train.warmup)
        skipped = line["skipped_steps"]
    assert read(tmp_path / "run" / "checkpoints" / "last.pt")["progress"]["skipped_steps"] == skipped
    row("fp16 whose first loss scale is too large", "skipped steps are counted in the log, the learning rate waits")


# Going on


@pytest.fixture
def begun(call, street, tmp_path):
    """A run of two epochs in `run`."""
    assert call("train", "--data", street, *TINY, "--epochs", "2", "--run", "run")[0] == 0
    return tmp_path / "run"


def test_going_on_with_another_length(call, begun, row):
    code, _, err = call("train", "--resume", "--run", begun, "--epochs", "4")
    assert code == 0
    announced, *block = err.splitlines()
    assert announced == "resumed with train.epochs 4 instead of 2"
    (rate,) = (line for line in block if line.startswith("lr "))
    recipe = configs.load_recipe("fast").train
    now, then = (one_cycle(step, of, recipe.lr, recipe.warmup) for step, of in ((8, 16), (7, 8)))
    assert rate.endswith(f"{now:.2e} from here, where the schedule of 8 steps was at {then:.2e}")
    row("--resume with another number of epochs", f"{announced}; {rate}", "leave --epochs out")


def test_going_on_with_another_batch(call, begun, row):
    says = said(call, "train", "--resume", "--run", begun, "--batch", "4", code=2)
    assert says.startswith("--resume: train.batch (2 to 4) cannot change in a run that has begun")
    row("--resume with another batch", says, "begin another run")


def test_going_on_with_other_data(call, begun, street, tmp_path, row):
    shutil.copytree(street, tmp_path / "moved")
    assert call("train", "--resume", "--run", begun, "--data", "moved")[0] == 0
    row("--resume of a run whose data was moved", "goes on where --data says that it is now")
    for image in sorted((tmp_path / "moved" / "train").iterdir())[:5]:
        image.write_bytes(image.read_bytes() + b"1")
    (tmp_path / "moved").rename(tmp_path / "changed")
    says = said(call, "train", "--resume", "--run", begun, "--data", "changed", code=1)
    assert "train differs by 5 of 8" in says
    row("--resume --data with files that are not the run's", says, "give the run's data, or begin another run")


def test_prefixes_of_wrapped_networks(call, begun, row):
    wanted = json.loads(call("eval", begun / "checkpoints" / "last.pt", "--json")[1])["confusion"]
    for prefix in ("module.", "_orig_mod.", "module._orig_mod."):
        state = torch.load(begun / "checkpoints" / "last.pt", weights_only=True)
        for kind in ("model", "ema"):
            if state[kind]:
                state[kind] = {prefix + name: value for name, value in state[kind].items()}
        torch.save(state, begun / "wrapped.pt")
        assert json.loads(call("eval", begun / "wrapped.pt", "--json")[1])["confusion"] == wanted
    row("checkpoint with keys that begin with `module.` or `_orig_mod.`", "the same scores as without")


def test_weights_that_are_missing_or_left_over(call, begun, row, tmp_path):
    state = torch.load(begun / "checkpoints" / "last.pt", weights_only=True)
    for kind in ("model", "ema"):
        if state[kind]:
            del state[kind]["encoder.0.0.weight"]
            state[kind]["head.weight"] = torch.zeros(1)
    torch.save(state, tmp_path / "other.pt")
    count = len(state["model"])
    for command in (["eval"], ["predict", "--out", "o", begun], ["export", "--out", "x.pt2"]):
        says = said(call, command[0], "other.pt", *command[1:], code=1)
        assert says == (
            "other.pt: not the weights of this network: 1 missing (encoder.0.0.weight), 1 left over (head.weight) "
            f"of {count}"
        )
    row("checkpoint with missing and with unexpected keys", says, "give the checkpoint of another run")


def test_files_that_are_no_checkpoints(call, begun, row, tmp_path):
    whole = (begun / "checkpoints" / "last.pt").read_bytes()
    (tmp_path / "half.pt").write_bytes(whole[: len(whole) // 2])
    (tmp_path / "text.pt").write_text("weights\n")
    torch.save(torch.nn.Conv2d(1, 1, 1), tmp_path / "pickle.pt")
    for name, fault in (
        ("half.pt", "truncated checkpoint"),
        ("text.pt", "text instead of a checkpoint"),
        ("pickle.pt", "whole pickled module instead of a checkpoint"),
    ):
        says = said(call, "eval", name, code=1)
        assert says.startswith(f"{name}: not a file of torch.save, or ")
        row(fault, says, "RUN/checkpoints/best.pt, or a checkpoint of another run")


# The machine


@pytest.mark.parametrize(
    ("fault", "files", "why"),
    [
        ("another project's `apex`", {"__init__.py": ""}, "No module named 'apex.multi_tensor_apply'"),
        ("an `apex` that fails as it is imported", {"__init__.py": "1 / 0"}, "ZeroDivisionError: division by zero"),
        (
            "an `apex` without its CUDA part",
            {
                "__init__.py": "",
                "multi_tensor_apply.py": "class multi_tensor_applier:\n    available = False\n",
                "optimizers.py": "FusedSGD = None\n",
            },
            "apex was built without its CUDA part",
        ),
    ],
)
def test_a_foreign_apex(call, street, tmp_path, monkeypatch, row, fault, files, why):
    (tmp_path / "site" / "apex").mkdir(parents=True)
    for name, text in files.items():
        (tmp_path / "site" / "apex" / name).write_text(text)
    monkeypatch.syspath_prepend(tmp_path / "site")
    for name in [name for name in sys.modules if name.partition(".")[0] == "apex"]:
        monkeypatch.delitem(sys.modules, name)
    code, _, err = call("train", "--data", street, *TINY, "--run", "run")
    for name in [name for name in sys.modules if name.partition(".")[0] == "apex"]:
        del sys.modules[name]
    assert code == 0
    (says,) = (line for line in err.splitlines() if line.startswith("optimizer "))
    assert "torch fused SGD" in says
    assert why in says
    start = lines(tmp_path / "run", "start")[0]
    assert start["optimizer"] == "torch fused SGD"
    assert why in start["choices"]["optimizer"]["why"]
    row(fault, says, "install NVIDIA's apex with its CUDA part, or leave it")


def test_no_dali(call, street, monkeypatch, row):
    import importlib.util

    real = importlib.util.find_spec
    monkeypatch.setattr(importlib.util, "find_spec", lambda name, *a: None if "nvidia" in name else real(name, *a))
    monkeypatch.setattr("fastseg.environment.origin", lambda: None)  # it would name this folder
    code, _, err = call("train", "--data", street, *TINY, "--run", "run")
    assert code == 0
    assert "filled by reference" in err
    says = said(call, "train", "--data", street, *TINY, "--loader", "dali", "--run", "r", code=2)
    assert says.endswith("DALI is not installed; in a clone of fastseg: pip install '.[dali]' (Linux)")
    row("DALI is not installed", f"everything works but --loader dali: {says}", "pip install '.[dali]'")


@pytest.mark.slow
def test_two_launchers_at_once_a_void_label_and_a_file_that_stops_all_ranks(copy_of, tmp_path, row):
    folder, labels = copy_of("broken")
    path = folder / "train" / labels[5].name
    path.write_bytes(path.read_bytes()[:300])
    partly, labels = copy_of("partly")
    Image.fromarray(np.full((96, 144), 11, np.uint8)).save(labels[0])

    def begin(data, run):
        command = [sys.executable, "-m", "fastseg", "train", "--data", data, *TINY, "--device", "cpu", "--nproc", "2"]
        command += ["--batch", "1", "--set", "runtime.log_every=1", "--run", tmp_path / run]
        return subprocess.Popen(command, stderr=subprocess.PIPE, text=True)

    both = [begin(partly, "good"), begin(folder, "bad")]
    good, bad = (process.communicate(timeout=120)[1] for process in both)
    assert [process.returncode for process in both] == [0, 1], (good, bad)
    (says,) = (line for line in bad.splitlines() if line.startswith("fastseg: "))
    assert says.partition(": ")[2].partition(": ")[2] == f"{path}: cannot be decoded: image file is truncated"
    row("two runs of several processes at once", "each has a free port of its own")
    # Of 4 steps with an image for each process one is of the void label and another.
    found = lines(tmp_path / "good", "train")
    assert len(found) == 4
    assert all(line["loss"] > 0 and line["void_steps"] == 0 for line in found)  # 0 / 0 would be no number, for ever
    row("label entirely void, alone on one of two processes", "the loss stays a number")
    says = re.sub(r"rank \d", "rank N", says)
    row("a truncated file among those of several processes", says, "all of them end, the file is named once")


# Paths


def test_paths_of_all_kinds(street, copy_of, call, read_by, tmp_path, monkeypatch, row):
    wanted = read_by(street, "dali")
    folder, _ = copy_of("a b'é(日本)")
    (tmp_path / "link").symlink_to(folder)
    linked, targets = copy_of("linked")
    for path in (linked / "train").iterdir():
        path.rename(tmp_path / path.name)
        path.symlink_to(tmp_path / path.name)
    monkeypatch.setenv("HOME", str(tmp_path))
    for name in (folder, folder.name, f"./{folder.name}/../{folder.name}", f"~/{folder.name}", "link", "linked"):
        for loader in ("dali", "cache"):
            for a, b in zip(read_by(name, loader), wanted, strict=True):
                np.testing.assert_array_equal(a, b)
    code, _, err = call("train", f"--data=~/{folder.name}", *TINY, "--run=~/my runs/ü", "--cache-dir=~/kept")
    assert code == 0, err
    assert (tmp_path / "my runs" / "ü" / "checkpoints" / "best.pt").is_file()
    assert list((tmp_path / "kept").iterdir())
    row("paths with blanks, quotes, other letters, `~`, `..`, linked folders and files", "the same as a plain path")
    (tmp_path / targets[0].name).unlink()
    code, out, _ = call("data", "check", "linked")
    (says,) = (line for line in out.splitlines() if "broken link" in line)
    assert code == 1
    assert says.startswith(f"error: linked/train/{targets[0].name}: is a broken link")
    assert "7 to train, 4 to validate; 2 files left out" in call("train", "--data", "linked", *TINY, "--run", "r")[2]
    row("broken link among the images", says, "mend the link; training leaves such pairs out and says so")


# Writers


def test_a_run_folder_has_one_writer(call, street, row):
    assert call("train", "--data", street, *TINY, "--run", "r")[0] == 0
    with runs.sole_writer(Path("r"), "--run"):
        for begun in (["--data", street, *TINY], ["--resume"]):
            says = said(call, "train", *begun, "--run", "r", code=2)
            assert f" r is being written by process {os.getpid()} on {socket.gethostname()}: " in says
    assert call("train", "--resume", "--run", "r")[0] == 0
    says = re.sub("process .* on .*:", "process N on HOST:", says)
    row(
        "two trainings in one folder, or `--resume` of a run that lives",
        says,
        "the second ends; a dead one's lock is nobody's",
    )


def test_a_folder_of_results_has_one_writer(call, street, row):
    assert call("train", "--data", street, *TINY, "--run", "r")[0] == 0
    words = ["predict", "r/checkpoints/best.pt", next((street / "val").iterdir()), "--out", "out"]
    with runs.sole_writer(Path("out"), "--out"):
        says = said(call, *words, "--overwrite", code=2)
        assert f"--out out is being written by process {os.getpid()} on {socket.gethostname()}: " in says
        assert [path.name for path in Path("out").iterdir()] == [runs.WRITER]
    assert call(*words)[0] == 0
    says = re.sub("process .* on .*:", "process N on HOST:", says)
    row("two `predict` into one folder", says, "another --out; two `report` of a run each write all of its page")


# Sizes


@pytest.mark.parametrize("size", ["16x16", "33x47", "45x60", "1x1"])
def test_small_and_odd_networks(call, street, size):
    code, _, err = call("train", "--data", street, "--recipe", "fast", "--size", size, "--epochs", "1", "--batch", "4")
    assert code == 0, err


def test_sizes_that_fit_nowhere(call, copy_of, row):
    row("network of 16x16, 33x47 or 45x60 pixels (depth 5 halves 5 times)", "works; odd sizes are pooled upwards")
    folder, labels = copy_of("few")
    fast = ["train", "--data", folder, "--recipe", "fast", "--epochs", "2", "--set", "model.depth=1"]
    for path in labels[1:]:
        path.unlink()
    assert call(*fast, "--size", "32x48", "--batch", "2")[0] == 0
    row("training set of 1 image, batch of 2", "works: batches go on across epochs")
    baseline = ["train", "--data", folder, "--size", "32x48", "--init", "none", "--set", "model.depth=1"]
    baseline += ["--split-scheme", "random-60-40"]
    says = said(call, *baseline, "--batch", "4", code=2)
    assert says.startswith("train.batch: 4 images per step are more than the 3 training images")  # 60 % of 5
    row("batch larger than the set, with `drop_remainder`", says, "a smaller --batch")
    says = said(call, "train", "--data", folder, "--size", "16x16", "--batch", "1", "--init", "none", code=2)
    assert says.startswith("train.batch: of 1 image of 16x16 the deepest maps are one pixel")
    row("batch of 1 where the deepest maps are 1x1", says, "a larger --batch")
    says = said(call, "train", "--data", folder, "--batch", "4", "--global-batch", "8", code=2)
    assert says == "train: train.batch = 4 and train.global_batch = 8: give one of them, the other is 0"
    row("a batch per device and one of all devices", says, "--batch or --global-batch")
    says = said(call, "train", "--data", "nowhere", "--size", "99999x99999", code=2)
    assert says.endswith("data.size: 99999x99999: at most 16384 pixels a side; of larger images take windows or tiles")
    row("`--size 99999x99999`", says, "augment.crop, train.scale, or `predict --tile`")


# Options


@pytest.mark.parametrize(
    ("fault", "text", "says"),
    [
        ("unknown key in a recipe", "[train]\nepochz = 3\n", "unknown key train.epochz; did you mean train.epochs?"),
        ("wrong type in a recipe", '[train]\nepochs = "3"\n', "train.epochs = '3': wants a whole number"),
        ("negative batch in a recipe", "[train]\nbatch = -4\n", "train.batch = -4: 0 or more"),
        ("unreadable TOML", "[train]\nbatch = 4\nlr = = 3\n", "not valid TOML: Invalid value (at line 3, column 6)"),
    ],
)
def test_recipes_with_faults(call, tmp_path, row, fault, text, says):
    (tmp_path / "my.toml").write_text(text)
    assert said(call, "train", "--recipe", "my.toml", code=2) == f"my.toml: {says}"
    row(fault, f"my.toml: {says}".replace("Invalid value ", "... "), "-")  # tomllib's own word


def test_build_model_names_its_source(tmp_path):
    state = {"config": configs.Config().as_dict() | {"model": {"depth": 1}}, "classes": ["a"], "ema": None, "model": {}}
    # Two convolutions with batch norm, and a third of the other three with one; 5 tensors each, and a bias at the end.
    with pytest.raises(FastsegError, match=r"^some\.pt: not the weights of this network: 20 missing"):
        build_model(state, "some.pt")
