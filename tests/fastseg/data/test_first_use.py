"""`--data synth` on first use, by all processes of a run at once."""

import os
import subprocess
import sys

import pytest

from fastseg import data
from fastseg.data import synth
from fastseg.errors import FastsegError


def test_processes_that_draw_the_same_scenes_end_with_one_copy(tmp_path):
    code = "from fastseg import data; data.SYNTH_COUNTS |= {'train': 16, 'val': 4}; print(data.resolve('synth'))"
    environment = os.environ | {"FASTSEG_DATA": str(tmp_path)}
    runs = [
        subprocess.Popen([sys.executable, "-c", code], env=environment, stdout=subprocess.PIPE, stderr=subprocess.PIPE)
        for _ in range(3)
    ]
    said = [(run.communicate(), run.returncode) for run in runs]
    assert [code for _, code in said] == [0, 0, 0], said
    (folder,) = tmp_path.iterdir()
    assert {out.decode().strip() for (out, _), _ in said} == {str(folder)}
    assert len(list((folder / "train").iterdir())) == 16


def test_scenes_that_cannot_be_drawn_are_an_error(tmp_path, monkeypatch):
    def write(*_, **__):
        raise FastsegError("no room")

    monkeypatch.setenv("FASTSEG_DATA", str(tmp_path))
    monkeypatch.setattr(synth, "write", write)
    with pytest.raises(FastsegError, match="no room"):
        data.resolve("synth")
