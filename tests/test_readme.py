"""The README's commands, run as they stand (but for smaller networks), and the Makefile's two."""

import os
import re
import shlex
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
README = (ROOT / "README.md").read_text(encoding="utf-8")
BLOCKS = re.findall(r"^```sh\n(.*?)^```", README, re.DOTALL | re.MULTILINE)
COMMANDS = [line for block in BLOCKS for line in block.splitlines() if line.startswith("fastseg ")]

# A stranger's GPU and network are not here: what these commands end with instead.
EXPECTED = {"fastseg train --gpus 8 --amp": (2, "torch sees 0 usable NVIDIA GPUs")}
SMALLER = {
    "train": ["--size", "32x48", "--epochs", "1", "--set", "model.depth=1"],
    "bench": ["--size", "32x48", "--batch", "1", "--rounds", "3"],
}


def test_the_first_two_commands_are_make_demo_and_make_test():
    assert BLOCKS[0].split("\n") == ["make demo", "make test", ""]


@pytest.mark.parametrize("target", ["help", "demo", "test", "lint", "bench", "clean"])
def test_make_knows_each_target_and_help_names_it(target):
    subprocess.run(["make", "-n", target], cwd=ROOT, check=True, capture_output=True)
    listed = subprocess.run(["make", "-s", "help"], cwd=ROOT, check=True, capture_output=True, text=True).stdout
    assert re.search(rf"^{target}\s+\S", listed, re.MULTILINE)


@pytest.mark.slow
def test_every_fastseg_command_of_the_readme_runs_as_it_stands(tmp_path):
    from fastseg.data.synth import write

    assert len(COMMANDS) >= 10
    small = {"counts": {"train": 4, "val": 2}, "size": (64, 96)}
    write(tmp_path / "CamVid", **small)
    write(tmp_path / "home" / "camvid", **small, layout="original")
    write(tmp_path / "home" / "synth-1", **small)
    environment = os.environ | {"FASTSEG_DATA": str(tmp_path / "home"), "CUDA_VISIBLE_DEVICES": ""}
    for command in COMMANDS:
        _, *words = shlex.split(command.replace("/data/CamVid", "CamVid").replace("/tmp/street", "street"))
        if "--resume" not in words:
            words += SMALLER.get(words[0], [])
        done = subprocess.run(
            [sys.executable, "-m", "fastseg", *words], cwd=tmp_path, env=environment, capture_output=True, text=True,
            check=False,
        )  # fmt: skip
        code, message = EXPECTED.get(command, (0, ""))
        assert done.returncode == code, f"{command}\n{done.stderr}"
        assert message in done.stderr


def test_every_option_that_the_readme_names_exists():
    from click.testing import CliRunner

    from fastseg.cli import main

    text = "".join(
        CliRunner().invoke(main, [*command, "--help"]).output
        for command in ([], ["train"], ["eval"], ["bench"], ["data", "synth"], ["data", "check"], ["data", "stats"])
    )
    for option in set(re.findall(r"--[a-z][a-z-]+", README)):
        assert option in text
