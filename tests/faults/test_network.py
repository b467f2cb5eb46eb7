"""Faults of a network of one's own, and of a checkpoint that names one."""

import sys

import pytest

OWN = """
from torch import nn

def build(num_classes, size):
    return nn.Sequential(nn.Conv2d(3, 8, 3, 2, 1), nn.BatchNorm2d(8), nn.Conv2d(8, num_classes, 1))

def of_cityscapes(num_classes, size):
    return nn.Conv2d(3, 19, 1)

def cropped(num_classes, size):
    return nn.Conv2d(3, num_classes, 3)

def pooled(num_classes, size):
    return nn.Sequential(nn.AdaptiveAvgPool2d(1), nn.Conv2d(3, num_classes, 1), nn.BatchNorm2d(num_classes))
"""
TINY = ["--recipe", "fast", "--size", "32x48", "--epochs", "1", "--device", "cpu"]


@pytest.fixture
def own(tmp_path, call, monkeypatch):
    """own.py in the current folder."""
    monkeypatch.setattr(sys, "path", sys.path[:])
    (tmp_path / "own.py").write_text(OWN)
    yield call
    sys.modules.pop("own", None)


@pytest.mark.parametrize(
    ("fault", "options", "cure"),
    [
        ("--network of a module that is nowhere", ["--network", "absent:build"], "write its name as Python imports it"),
        ("--network of a function that is not there", ["--network", "own:biuld"], "name a function of the module"),
        ("a network with 19 channels for 11 classes", ["--network", "own:of_cityscapes"], "use num_classes"),
        (
            "a network whose scores are two pixels smaller",
            ["--network", "own:cropped"],
            "pad, or resize in the network",
        ),
        (
            "a network that cannot train on one image",
            ["--network", "own:pooled", "--batch", "1"],
            "a larger batch",
        ),
        (
            "an option of SegNet with another network",
            ["--network", "own:build", "--set", "model.depth=3"],
            "leave it out",
        ),
    ],
)
def test_a_network_that_cannot_be_trained(own, street, tmp_path, row, fault, options, cure):
    code, _, err = own("train", "--data", street, *TINY, *options, "--run", "run")
    (line,) = err.splitlines()
    assert code == 2
    assert line.startswith("fastseg: ")
    assert not (tmp_path / "run").exists()
    row(fault, line.removeprefix("fastseg: ").replace(str(tmp_path), "."), cure)


def test_a_checkpoint_that_names_a_module(own, street, row):
    code, _, err = own("train", "--data", street, *TINY, "--network", "own:build", "--run", "run")
    assert code == 0, err
    del sys.modules["own"]
    code, _, err = own("eval", "run/checkpoints/best.pt")
    assert (code, "own" in sys.modules) == (2, False)
    row("a checkpoint that names a module", err.strip().removeprefix("fastseg: "), "`--network`, where you trust it")
    code, _, err = own("train", "--resume", "--run", "run", "--network", "own:cropped")
    assert (code, "own" in sys.modules) == (2, False)
    row("--resume with another network", err.strip().removeprefix("fastseg: "), "the run's own")
