"""`fastseg profile`: what it records of a run, with torch's profiler and with a stand-in for Nsight Systems."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
from click.testing import CliRunner

from fastseg.cli import main
from fastseg.config import load_recipe
from fastseg.errors import FastsegError, UsageError
from fastseg.pipelines.growing import Phase, plan_phases
from fastseg.profiling import session

TINY = ["--recipe", "fast", "--size", "32x48", "--batch", "2", "--set", "model.depth=1", "--device", "cpu"]
TINY += ["--loader", "reference"]  # to import DALI takes each process seconds


def test_steps_after_the_warm_up_are_recorded_and_their_parts_add_up(street, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    words = ["profile", "--data", str(street), *TINY, "--steps", "3", "--warmup", "2", "--out", "p", "--json"]
    done = CliRunner().invoke(main, words)
    assert done.exit_code == 0, done.output
    document = json.loads(done.stdout)
    assert document == json.loads(Path("p/summary.json").read_text())
    assert document["profiler"] == "torch"
    (rank,) = document["ranks"]
    assert (rank["rank"], rank["steps"], rank["device"]) == (0, 3, None)
    shares = {row["name"]: row["share"] for row in rank["ranges"]}
    assert {"data wait", "sum of weights", "forward", "loss", "backward", "optimiser", "other"} <= shares.keys()
    assert sum(shares.values()) == pytest.approx(1)
    (forward,) = [row for row in rank["ranges"] if row["name"] == "forward"]
    assert [row["name"] for row in forward["ranges"]] == ["encoder 1", "decoder 1"]
    assert sum(row["ms"] for row in forward["ranges"]) <= forward["ms"]
    # The names of the steps are those of the run, and the trace is Chrome's.
    events = json.loads(Path("p/rank0.json").read_text())["traceEvents"]
    names = [e["name"] for e in events if e.get("cat") == "user_annotation"]
    assert [n for n in names if "/step" in n] == ["fastseg/step 3", "fastseg/step 4", "fastseg/step 5"]
    # PyTorch's loss turns the scores around on a CPU; nothing else does.
    assert {row["where"] for row in rank["layout_changes"]} == {"loss"}
    assert not Path("p/run").exists()
    again = CliRunner().invoke(main, words)
    assert again.exit_code == 2
    assert again.stderr.splitlines()[-1] == "fastseg: --out p exists: give another folder"


def test_a_data_set_of_one_batch_is_profiled_for_as_many_steps(street, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert load_recipe("fast").train.epochs < 2 + 3
    few = ["--batch", "8", "--steps", "3", "--warmup", "2", "--json"]
    done = CliRunner().invoke(main, ["profile", "--data", str(street), *TINY, *few])
    assert done.exit_code == 0, done.output
    assert json.loads(done.stdout)["ranks"][0]["steps"] == 3
    assert done.stderr.count("validation  mIoU") == 1  # at the end: none between the recorded steps


def test_a_profile_is_of_the_full_size_whatever_a_recipe_begins_with(street, tmp_path, monkeypatch):
    assert load_recipe("fast").train.grow_from < 1
    monkeypatch.setenv(session.UNDER_NSYS, "1")
    seen = []
    monkeypatch.setattr(session, "record", lambda config, *_: seen.append(config))
    done = CliRunner().invoke(main, ["profile", "--data", str(street), *TINY, "--out", str(tmp_path / "p")])
    assert done.exit_code == 0, done.output
    (config,) = seen
    steps = config.train.max_steps
    assert plan_phases(config.train, config.data.size, steps) == [Phase(steps, (32, 48))]


@pytest.mark.slow
def test_each_process_runs_under_nsight_systems_and_their_exports_are_read(street, tmp_path, nsys_report):
    # In the place of nsys: a script that runs the command and leaves a made-up export where it was told to.
    nsys = tmp_path / "bin" / "nsys"
    nsys.parent.mkdir()
    nsys.write_text(
        f"#!{sys.executable}\nimport os, shutil, subprocess, sys\n"
        "options = dict(word[2:].split('=', 1) for word in sys.argv[2:sys.argv.index(sys.executable)])\n"
        "assert sys.argv[1] == 'profile' and options['capture-range'] == 'cudaProfilerApi', sys.argv\n"
        "code = subprocess.call(sys.argv[sys.argv.index(sys.executable):])\n"
        "output = options['output'].replace('%q{RANK}', os.environ.get('RANK', '?'))\n"
        f"shutil.copy({str(nsys_report)!r}, output + '.sqlite')\n"
        "sys.exit(code)\n"
    )
    nsys.chmod(0o755)
    environment = os.environ | {"PATH": f"{nsys.parent}:{os.environ['PATH']}", "OMP_NUM_THREADS": "1"}
    words = ["profile", "--data", street, *TINY, "--steps", "1", "--warmup", "2", "--profiler", "nsys", "--json"]
    for processes in (1, 2):
        more = ["--out", tmp_path / f"p{processes}", *(["--nproc", 2] if processes == 2 else [])]
        command = [sys.executable, "-m", "fastseg", *map(str, [*words, *more])]
        done = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
        assert done.returncode == 0, done.stderr
        assert "profiler   nsys: as asked" in done.stderr
        document = json.loads(done.stdout)
        assert [rank["rank"] for rank in document["ranks"]] == list(range(processes))
        assert all(rank["device"]["busy"] == pytest.approx(0.6) for rank in document["ranks"])


def test_the_profiler_is_nsight_systems_on_a_gpu_where_it_is_installed(tmp_path, monkeypatch):
    monkeypatch.setenv("PATH", str(tmp_path))
    assert session.choose_profiler("auto", "cuda") == ("torch", "no nsys on the path")
    with pytest.raises(UsageError, match="--profiler nsys: no nsys on the path"):
        session.choose_profiler("nsys", "cuda")
    (tmp_path / "nsys").write_text("#!/bin/sh\n")
    (tmp_path / "nsys").chmod(0o755)
    assert session.choose_profiler("auto", "cuda") == ("nsys", "Nsight Systems is here")
    assert session.choose_profiler("auto", "cpu") == ("torch", "there is no GPU to look into")


def test_a_profiler_that_wrote_nothing_is_named(tmp_path):
    with pytest.raises(FastsegError, match="nothing was recorded there"):
        session.read(tmp_path)
    (tmp_path / "rank0.layout.json").write_text("[]")
    with pytest.raises(FastsegError, match="the profiler wrote nothing for rank0"):
        session.read(tmp_path)


def test_it_starts_its_processes_itself(monkeypatch):
    for name, value in {"RANK": "0", "WORLD_SIZE": "2", "LOCAL_RANK": "0"}.items():
        monkeypatch.setenv(name, value)
    done = CliRunner().invoke(main, ["profile", "--data", "synth", *TINY])
    assert (done.exit_code, "it starts its processes itself" in done.stderr) == (2, True)


def test_a_run_that_fails_is_an_error_and_leaves_no_summary(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    done = CliRunner().invoke(main, ["profile", "--data", "nowhere", *TINY, "--out", "p"])
    assert (done.exit_code, "nowhere" in done.stderr) == (2, True)
    assert not Path("p/summary.json").exists()
