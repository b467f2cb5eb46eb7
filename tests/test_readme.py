"""The README's commands, run as they stand (but for smaller networks), and the Makefile's two."""

import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
README = (ROOT / "README.md").read_text(encoding="utf-8")
BLOCKS = re.findall(r"^```sh\n(.*?)^```", README, re.DOTALL | re.MULTILINE)
PYTHON = re.findall(r"^```python\n(.*?)^```", README, re.DOTALL | re.MULTILINE)
COMMANDS = [line for block in BLOCKS for line in block.splitlines() if line.startswith("fastseg ")]

LAUNCHED = [line for block in BLOCKS for line in block.splitlines() if line.startswith(("torchrun ", "srun "))]

# A stranger's GPUs are not here: what these commands end with instead.
NO_GPUS = (2, "torch sees 0 usable NVIDIA GPUs")
EXPECTED = {command: NO_GPUS for command in COMMANDS if "--gpus" in command}
EXPECTED["fastseg doctor --run runs/first"] = (1, "runs/first: too short to say anything")  # at the size of tests


def test_the_first_two_commands_are_make_demo_and_make_test():
    assert BLOCKS[0].split("\n") == ["make demo", "make test", ""]


@pytest.mark.parametrize("target", ["help", "demo", "test", "lint", "bench", "clean"])
def test_make_knows_each_target_and_help_names_it(target):
    subprocess.run(["make", "-n", target], cwd=ROOT, check=True, capture_output=True)
    listed = subprocess.run(["make", "-s", "help"], cwd=ROOT, check=True, capture_output=True, text=True).stdout
    assert re.search(rf"^{target}\s+\S", listed, re.MULTILINE)


@pytest.mark.slow
def test_every_fastseg_command_of_the_readme_runs_as_it_stands(tmp_path, as_written):
    assert len(COMMANDS) >= 10
    for command in COMMANDS:
        code, err = as_written(command)
        wanted, message = EXPECTED.get(command, (0, ""))
        assert code == wanted, f"{command}\n{err}"
        assert message in err
    shutil.copy(next((tmp_path / "CamVid" / "val").iterdir()), tmp_path / "photo.jpg")
    assert len(PYTHON) == 1
    for code in PYTHON:
        done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
        assert done.returncode == 0, done.stderr


@pytest.mark.slow
def test_the_readmes_launchers_train(street, tmp_path, smaller):
    # Two processes instead of eight GPUs, and of SLURM what it would tell one task.
    smaller = ["--data", str(street), "--recipe", "fast", "--device", "cpu", *smaller["train"]]
    slurm = {"SLURM_STEP_NUM_TASKS": "1", "SLURM_PROCID": "0", "SLURM_LOCALID": "0", "SLURM_NODEID": "0"}
    assert [command.split()[0] for command in LAUNCHED] == ["torchrun", "srun"]
    for command in LAUNCHED:
        launcher, fastseg, options = command.replace("per-node 8", "per-node 2").partition("fastseg ")
        run = ["-m", "torch.distributed.run", *launcher.split()[1:], fastseg.strip()]
        words = [*(run if launcher.startswith("torchrun") else ["-m", "fastseg"]), *options.split(), *smaller]
        done = subprocess.run(
            [sys.executable, *words], cwd=tmp_path, env=os.environ | slurm | {"OMP_NUM_THREADS": "1"},
            capture_output=True, text=True, check=False,
        )  # fmt: skip
        assert done.returncode == 0, done.stderr
    assert {path.name for path in (tmp_path / "runs").iterdir()} == {"third", "fourth"}


def test_every_option_that_the_readme_names_exists():
    from click.testing import CliRunner

    from fastseg.cli import data, main

    text = "".join(
        CliRunner().invoke(main, [*command, "--help"]).output
        for command in (
            [],
            ["train"],
            ["eval"],
            ["bench"],
            ["profile"],
            ["doctor"],
            ["predict"],
            ["export"],
            ["report"],
            ["repro"],
            *(["data", name] for name in data.commands),
        )
    )
    # Options of torchrun, SLURM, pip and Docker, and --run-path, which is torchrun's.
    others = {"--standalone", "--nproc-per-node", "--ntasks-per-node", "--run-path"}
    others |= {"--no-deps", "--wheel-dir", "--rm", "--shm-size"}
    for option in set(re.findall(r"--[a-z][a-z-]+", README)) - others:
        assert option in text
