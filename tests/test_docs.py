"""The pages in docs/: they build without a warning, and what they say to type runs.

What cannot run on any machine has a comment before its fence that says why: `<!-- not run: needs two GPUs -->`.
"""

import doctest
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
DOCS = ROOT / "docs"
PAGES = {path.name: path.read_text(encoding="utf-8") for path in sorted(DOCS.glob("*.md"))}
FENCE = re.compile(r"^(?:<!-- not run: ([^\n]+) -->\n)?```([^\n]*)\n(.*?)^```$", re.DOTALL | re.MULTILINE)
FENCES = [(name, *match.groups()) for name, text in PAGES.items() for match in FENCE.finditer(text)]
COMMANDS = [line for _, reason, kind, text in FENCES if kind == "sh" and not reason for line in text.splitlines()]
# `tests/test_readme.py` runs these.
IN_README = set((ROOT / "README.md").read_text(encoding="utf-8").splitlines())
# The run that other commands, and Python, go on from.
FIRST = "fastseg train --data /data/CamVid --recipe fast --run runs/first"
# Options of torchrun, its --run-path, and Docker's.
OTHERS = {"--standalone", "--nproc-per-node", "--max-restarts", "--run-path", "--shm-size"}


def test_the_pages_build_without_a_warning_and_all_references_resolve(tmp_path):
    for module in ("sphinx", "myst_parser", "furo", "sphinx_click"):
        pytest.importorskip(module, reason=f"{module} is not installed: pip install '.[docs]'")
    command = [sys.executable, "-m", "sphinx", "-W", "--keep-going", "-q", "-d", "trees", "-b", "html", DOCS, "html"]
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    built = {path.stem: path.read_text(encoding="utf-8") for path in (tmp_path / "html").glob("*.html")}
    assert {name.removesuffix(".md") for name in PAGES} - {"faults"} <= built.keys()
    for name in ("train", "data-synth", "bench", "doctor"):
        assert f'id="fastseg-{name}"' in built["cli"]
    for name in ("train", "evaluate", "load", "config.Train", "pipelines.open_source"):
        assert f"fastseg.{name}" in re.sub("<[^>]+>", "", built["api"])
    assert "passes over the training images" in built["api"]  # the meaning of train.epochs
    assert 'href="readme.html#install"' in built["tutorial"]
    assert "make demo" in re.sub("<[^>]+>", "", built["readme"])
    assert not list((tmp_path / "html").glob("_downloads/**/*.md"))  # a link to a file that is a page as well
    assert "zip cut in half" in built["troubleshooting"]  # docs/faults.md
    assert "#SBATCH --requeue" in re.sub("<[^>]+>", "", built["distributed"])


def test_fences_are_of_kinds_that_these_tests_know():
    directives = ("{toctree}", "{literalinclude}", "{include}", "{raw}", "{eval-rst}")
    for name, reason, kind, text in FENCES:
        assert kind in ("sh", "python", "text") or kind.startswith(directives), f"{name}: {kind}"
        assert not reason or kind == "sh", f"{name}: only commands may be left out"
        for line in text.splitlines() if kind == "sh" and not reason else ():
            assert line.startswith("fastseg "), f"{name}: {line!r} is neither run nor marked as not run"
        if kind == "python":
            assert text.startswith(">>> "), f"{name}: no doctest"
    # Every opening fence was seen, and a mark stands for a fence.
    assert sum(text.count("```") for text in PAGES.values()) == 2 * len(FENCES)
    assert sum(text.count("<!-- not run") for text in PAGES.values()) == sum(bool(reason) for _, reason, *_ in FENCES)


def test_every_option_that_the_pages_name_exists():
    from fastseg.cli import data, main

    commands = [main, *main.commands.values(), *data.commands.values()]
    known = {option for command in commands for p in command.params for option in (*p.opts, *p.secondary_opts)}
    for name, text in PAGES.items():
        assert set(re.findall(r"(?<![\w-])--[a-z][a-z-]+", text)) <= known | OTHERS, name


@pytest.mark.slow
def test_what_the_pages_say_to_type_runs(tmp_path, as_written):
    assert FIRST in COMMANDS
    shutil.copy(DOCS / "examples" / "mynet.py", tmp_path)
    assert len(COMMANDS) >= 20
    for command in (FIRST, *(command for command in COMMANDS if command not in IN_README)):
        code, err = as_written(command)
        assert code == 0, f"{command}\n{err}"
        if command.startswith("fastseg data synth /data/own"):
            shutil.copy(DOCS / "examples" / "dataset.toml", tmp_path / "own")
    shutil.copy(next((tmp_path / "CamVid" / "val").iterdir()), tmp_path / "photo.jpg")
    runner = doctest.DocTestRunner(verbose=False)
    for name, _, kind, text in FENCES:
        if kind == "python":
            test = doctest.DocTestParser().get_doctest(text, {}, name, str(DOCS / name), 0)
            said: list[str] = []
            runner.run(test, out=said.append)
            assert not said, "".join(said)
    assert runner.summarize(verbose=False).attempted >= 10

    from fastseg import load

    assert load(tmp_path / "runs" / "own" / "checkpoints" / "best.pt").classes == ("sky", "ground", "fixed", "moving")


@pytest.mark.parametrize(("begun", "code"), [(False, 0), (True, 1), (True, 75)])
def test_the_batch_file_goes_on_with_a_run_and_asks_for_more_time(tmp_path, begun, code):
    # Programs of SLURM's names, which note how they are called.
    for name, status in (("srun", code), ("scontrol", 0)):
        path = tmp_path / name
        path.write_text(f'#!/bin/bash\necho "{name} $*" >> {tmp_path}/calls\nexit {status}\n')
        path.chmod(0o755)
    run = tmp_path / "run"
    run.mkdir()
    if begun:
        (run / "config.toml").touch()
    text = (DOCS / "examples" / "train.sbatch").read_text(encoding="utf-8")
    assert text.count("/shared/runs/first") == 1
    done = subprocess.run(
        ["bash", "-c", text.replace("/shared/runs/first", str(run))],
        env=os.environ | {"PATH": f"{tmp_path}:{os.environ['PATH']}", "SLURM_JOB_ID": "7"}, check=False,
    )  # fmt: skip
    assert done.returncode == code
    options = "--resume" if begun else "--data /shared/CamVid --recipe fast"
    calls = [f"srun fastseg train {options} --run {run}"] + ["scontrol requeue 7"] * (code == 75)
    assert (tmp_path / "calls").read_text().splitlines() == calls
