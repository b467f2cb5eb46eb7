"""Run folders: what is refused, what a resumed run may change, and what a killed one leaves behind."""

import datetime
import errno
import json
import os
import re
import socket
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest

from fastseg import config as configs
from fastseg import runs
from fastseg.config import Config
from fastseg.errors import UsageError


def begin(run: Path, log: str = "", **changes) -> Path:
    """A run folder with a configuration and a log."""
    run.mkdir(parents=True)
    config = configs.override(Config(), {key.replace("__", "."): value for key, value in changes.items()})
    (run / "config.toml").write_text(config.dumps())
    if log:
        (run / "log.jsonl").write_text(log)
    return run


def lines(*events: dict) -> str:
    return "".join(json.dumps(event) + "\n" for event in events)


def datetime_at(text: str) -> SimpleNamespace:
    """A `datetime` module in which it is always that time."""
    when = datetime.datetime.strptime(text, "%Y%m%d-%H%M%S")
    return SimpleNamespace(datetime=SimpleNamespace(now=lambda: when))


def event(kind: str, step: int) -> dict:
    return {"event": kind, "step": step}


def test_new_runs_are_named_by_data_recipe_and_time_and_each_has_its_own_folder(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(runs, "datetime", datetime_at("20261126-101112"))
    config = configs.override(Config(), {"data.path": str(tmp_path / "street")})
    for name in ("street-mine-20261126-101112", "street-mine-20261126-101112-2", "street-mine-20261126-101112-3"):
        assert runs.new_folder(config, "recipes/mine.toml") == Path("runs", name)
        assert not any(Path("runs", name).iterdir())
    assert runs.new_folder(config, "recipes/mine.toml", "profile").name == "street-mine-20261126-101112-profile"
    (Path("runs") / "street-mine-20261126-101112" / "config.toml").touch()
    for folder in Path("runs").iterdir():
        runs.forget_unused(folder)
    assert [folder.name for folder in Path("runs").iterdir()] == ["street-mine-20261126-101112"]


def test_a_run_does_not_write_into_what_is_there(tmp_path):
    runs.refuse_existing(tmp_path / "new")
    (tmp_path / "empty").mkdir()
    runs.refuse_existing(tmp_path / "empty")
    (tmp_path / "file").write_text("x")
    for path in (tmp_path, tmp_path / "file"):
        with pytest.raises(UsageError, match=rf"^--run {re.escape(str(path))} exists: .*--resume") as error:
            runs.refuse_existing(path)
        assert "\n" not in str(error.value)


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("train.epochs", 200),
        ("train.patience", 5),
        ("train.validate_every", 2),
        ("train.keep_every", 10),
        ("runtime.device", "cpu"),
        ("runtime.loader", "reference"),
        ("runtime.threads", 2),
        ("runtime.log_every", 1),
        ("train.accumulate", 2),
        ("train.checkpoint_steps", 10),
        ("runtime.collective_timeout", 9),
    ],
)
def test_a_run_that_goes_on_may_change_its_length_and_its_machine(tmp_path, key, value):
    run = begin(tmp_path / "run", train__lr=0.5)
    config, changed = runs.reopen(run, lambda old: configs.override(old, {key: value}))
    assert {key: new for key, (_, new) in changed.items()} == {key: value}
    assert config == configs.override(Config(), {"train.lr": 0.5, key: value})


def test_a_run_that_goes_on_takes_the_batch_that_its_devices_began_with(tmp_path):
    # 16 images per step: 4 on each of 2 devices, twice; later they went on with one.
    log = lines(event("start", 0) | {"world": 2}, event("start", 5) | {"world": 1})
    run = begin(tmp_path / "run", log, train__global_batch=16, train__accumulate=2)
    old = configs.read(run / "config.toml")
    assert runs.reopen(run, lambda old: configs.override(old, {"train.batch": 4})) == (old, {})
    for batch in (2, 8):
        with pytest.raises(UsageError, match=rf"^--resume: train\.batch \(4 to {batch}\) cannot change in a run"):
            runs.reopen(run, lambda old, batch=batch: configs.override(old, {"train.batch": batch}))


def test_where_no_log_says_what_a_device_had_no_batch_is_taken(tmp_path):
    run = begin(tmp_path / "run", train__global_batch=8)
    with pytest.raises(UsageError, match=r"^--resume: train\.batch \(0 to 4\), train\.global_batch \(8 to 0\) cannot"):
        runs.reopen(run, lambda old: configs.override(old, {"train.batch": 4}))


@pytest.mark.parametrize(
    ("changes", "named"),
    [
        ({"train.lr": 0.1}, "train.lr (0.001 to 0.1)"),
        ({"train.global_batch": 8}, "train.batch (4 to 0), train.global_batch (0 to 8)"),
        (
            {"runtime.seed": 1, "data.size": "32x48", "train.epochs": 2},
            "data.size (360x480 to 32x48), runtime.seed (0 to 1)",
        ),
        ({"model.depth": 3, "runtime.dtype": "bf16"}, "model.depth (5 to 3), runtime.dtype (fp32 to bf16)"),
    ],
)
def test_a_run_that_goes_on_keeps_what_makes_it_that_run(tmp_path, changes, named):
    run = begin(tmp_path / "run")
    with pytest.raises(UsageError, match=f"^--resume: {re.escape(named)} cannot change") as error:
        runs.reopen(run, lambda old: configs.override(old, changes))
    assert "train.epochs" in str(error.value).partition("change only")[2]
    assert "\n" not in str(error.value)


def test_going_on_without_a_change_changes_nothing(tmp_path):
    run = begin(tmp_path / "run", train__lr=0.5)
    assert runs.reopen(run, lambda old: old) == (configs.override(Config(), {"train.lr": 0.5}), {})


def test_there_is_no_going_on_without_a_run(tmp_path):
    with pytest.raises(UsageError, match=r"^--resume: .*nothing holds no run \(no config\.toml\)"):
        runs.reopen(tmp_path / "nothing", lambda old: old)


def test_the_runs_to_go_on_with_are_the_unfinished_ones_newest_first(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert runs.resumable() == []
    logs = {"old": lines(event("train", 2)), "ended": lines(event("train", 2), event("end", 4))}
    for name, age in {"old": 30, "ended": 20, "middle": 15, "new": 10}.items():
        run = begin(tmp_path / "runs" / name, logs.get(name, ""))
        os.utime(run / "config.toml", (1e9 - age, 1e9 - age))
    (tmp_path / "runs" / "no-config").mkdir()
    assert runs.resumable() == [Path("runs") / name for name in ("new", "middle", "old")]


def test_a_log_is_cut_back_to_a_step(tmp_path):
    kept = [event("start", 0), event("train", 2), event("val", 4)]
    later = [event("train", 6), event("val", 8), event("end", 8)]
    run = begin(tmp_path / "run", lines(*kept, *later) + '{"event": "train", "st')
    assert runs.read_log(run) == kept + later
    runs.cut_back(run, 4)
    assert (run / "log.jsonl").read_text() == lines(*kept)
    runs.cut_back(run, 4)
    assert runs.read_log(run) == kept


def test_a_run_goes_on_past_its_end(tmp_path):
    # More epochs than before: the end is no longer one, though it is not later than the last checkpoint.
    run = begin(tmp_path / "run", lines(event("val", 8), event("end", 8)))
    runs.cut_back(run, 8)
    assert runs.read_log(run) == [event("val", 8)]


def test_a_half_line_or_no_log_is_no_event(tmp_path):
    assert runs.read_log(tmp_path) == []
    (tmp_path / "log.jsonl").write_bytes(b'{"event": "train", "step": 1}\n\xff\xfe\n\n{"event')
    assert runs.read_log(tmp_path) == [event("train", 1)]
    runs.cut_back(tmp_path, 9)
    assert (tmp_path / "log.jsonl").read_text() == lines(event("train", 1))


def test_a_file_appears_whole(tmp_path):
    path = tmp_path / "a" / "b.txt"
    with runs.whole(path) as partial:
        partial.write_text("new")
        assert not path.exists()
        assert partial.parent == path.parent
    assert path.read_text() == "new"
    assert list(path.parent.iterdir()) == [path]


def test_two_processes_that_write_a_file_at_once_share_nothing(tmp_path, monkeypatch):
    path = tmp_path / "report.html"
    with runs.whole(path) as mine:
        mine.write_text("mine")
        monkeypatch.setattr(os, "getpid", lambda: 1)
        with runs.whole(path) as others:
            others.write_text("others")
        assert path.read_text() == "others"
    assert path.read_text() == "mine"
    assert list(tmp_path.iterdir()) == [path]


HALF = """
import os, sys, time
from pathlib import Path
from fastseg import runs
with runs.whole(Path(sys.argv[1])) as partial:
    partial.write_text("half")
    print("in", flush=True)
    time.sleep(60)
"""


def test_what_a_killed_process_left_goes_and_what_a_living_one_writes_stays(tmp_path):
    path = tmp_path / ("long" * 60 + ".html")  # 245 bytes: with a word more no file system takes it
    with subprocess.Popen([sys.executable, "-c", HALF, path], stdout=subprocess.PIPE, text=True) as other:
        assert other.stdout.readline() == "in\n"
        (half,) = tmp_path.iterdir()
        assert half.match(runs.PARTIAL)
        runs.cut_back(tmp_path, 0)
        assert half.exists()
        other.kill()
    runs.write_text(tmp_path / "next.txt", "")  # this process has swept the folder before
    assert half.exists()
    runs._sweep.cache_clear()
    runs.write_text(tmp_path / "next.txt", "")
    assert not half.exists()


@pytest.mark.parametrize("failure", [ValueError, KeyboardInterrupt])
def test_a_file_that_was_not_finished_leaves_nothing(tmp_path, failure):
    def half(path):
        with runs.whole(path) as partial:
            partial.write_text("half")
            raise failure

    (tmp_path / "old.txt").write_text("old")
    for name in ("old.txt", "new.txt"):
        with pytest.raises(failure):
            half(tmp_path / name)
    assert [(p.name, p.read_text()) for p in tmp_path.iterdir()] == [("old.txt", "old")]


def test_a_full_disk_names_the_file_that_was_to_be_written(tmp_path, monkeypatch):
    def full(*_):
        raise OSError(28, "No space left on device")  # the system's error for a write names no file

    monkeypatch.setattr(Path, "write_text", lambda self, *_, **__: full())
    with pytest.raises(OSError, match="No space left") as error:
        runs.write_text(tmp_path / "a.txt", "text")
    assert error.value.filename == str(tmp_path / "a.txt")


def test_an_error_about_another_file_keeps_its_name(tmp_path):
    with pytest.raises(FileNotFoundError) as error, runs.whole(tmp_path / "a.txt"):
        (tmp_path / "b.txt").read_text()
    assert error.value.filename == str(tmp_path / "b.txt")


def test_what_a_kill_left_unfinished_is_no_run_and_goes_when_a_run_goes_on(tmp_path):
    run = tmp_path / "run"
    run.mkdir()
    (run / ".config.toml.partial").write_text("half")
    runs.refuse_existing(run)
    begin(tmp_path / "other")
    for name in (".report.html.partial", "checkpoints/.last.pt.partial", "overlays/.0-worst-a.png.partial"):
        (tmp_path / "other" / name).parent.mkdir(exist_ok=True)
        (tmp_path / "other" / name).write_text("half")
    with pytest.raises(UsageError, match="exists"):
        runs.refuse_existing(tmp_path / "other")
    runs.cut_back(tmp_path / "other", 0)
    assert sorted(p.name for p in (tmp_path / "other").rglob("*") if p.is_file()) == ["config.toml", "log.jsonl"]


def test_json_is_strict(tmp_path):
    runs.write_json(tmp_path / "a.json", {"miou": None, "Straße": [1.5]})
    assert json.loads((tmp_path / "a.json").read_text(encoding="utf-8")) == {"miou": None, "Straße": [1.5]}
    with pytest.raises(ValueError, match="not JSON compliant"):
        runs.write_json(tmp_path / "a.json", {"miou": float("nan")})
    assert json.loads((tmp_path / "a.json").read_text())["miou"] is None
    assert [p.name for p in tmp_path.iterdir()] == ["a.json"]


HOLD = """
import sys, time
from pathlib import Path
from fastseg import runs
with runs.sole_writer(Path(sys.argv[1]), "--run"):
    print("in", flush=True)
    time.sleep(60)
"""
CONTEND = """
import os, sys
from pathlib import Path
from fastseg import runs
from fastseg.errors import UsageError
folder, times = Path(sys.argv[1]), 0
while times < 50:
    try:
        with runs.sole_writer(folder, "--run"):
            os.close(os.open(folder / "alone", os.O_CREAT | os.O_EXCL))  # fails where anybody else is in
            os.unlink(folder / "alone")
            times += 1
    except UsageError:
        pass
"""


def test_a_folder_has_one_writer_and_a_dead_one_keeps_nobody_out(tmp_path):
    folder = tmp_path / "run"
    with subprocess.Popen([sys.executable, "-c", HOLD, folder], stdout=subprocess.PIPE, text=True) as other:
        assert other.stdout.readline() == "in\n"
        says = f"--run {folder} is being written by process {other.pid} on {socket.gethostname()}: wait for its end"
        with pytest.raises(UsageError, match=re.escape(says)), runs.sole_writer(folder, "--run"):
            pass
        (folder / "config.toml").write_text("")
        with pytest.raises(UsageError, match=re.escape(says)):  # and not that it could be resumed
            runs.refuse_existing(folder)
        other.kill()
    (folder / "config.toml").unlink()
    runs.refuse_existing(folder)  # what it left is nothing
    with runs.sole_writer(folder, "--run"):
        assert (folder / runs.WRITER).read_text() == f"process {os.getpid()} on {socket.gethostname()}"
    assert list(folder.iterdir()) == []


def test_writers_that_contend_are_never_in_a_folder_together(tmp_path):
    contending = [subprocess.Popen([sys.executable, "-c", CONTEND, tmp_path / "run"]) for _ in range(4)]
    assert [process.wait() for process in contending] == [0] * 4
    assert list((tmp_path / "run").rglob("*")) == []


def test_a_file_system_without_locks_is_said_once(tmp_path, monkeypatch, capsys):
    def refuse(file, operation):
        raise OSError(errno.ENOLCK, "No locks available")

    monkeypatch.setattr("fcntl.flock", refuse)
    with runs.sole_writer(tmp_path, "--run"):
        pass
    says = f"{tmp_path}: its file system keeps no locks; see to it that nothing else writes there\n"
    assert capsys.readouterr().err == says


def test_a_run_is_its_best_checkpoint_and_says_so(tmp_path, capsys):
    run = tmp_path / "a"
    (run / "checkpoints").mkdir(parents=True)
    with pytest.raises(UsageError, match=r"a: a folder that holds no run \(no config\.toml\); give a run's"):
        runs.checkpoint_of(run)
    (run / "config.toml").touch()
    with pytest.raises(UsageError, match=r"a: this run has no best\.pt, which its first validation writes"):
        runs.checkpoint_of(run)
    best = run / "checkpoints" / "best.pt"
    best.touch()
    assert runs.checkpoint_of(run) == best
    assert capsys.readouterr().err == f"{run}: a run, of which checkpoints/best.pt is taken\n"
    assert runs.checkpoint_of(best) == best
    assert runs.checkpoint_of(tmp_path / "none.pt") == tmp_path / "none.pt"
    assert capsys.readouterr().err == ""
