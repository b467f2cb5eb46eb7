"""Run folders: what is refused, what a resumed run may change, and what a killed one leaves behind."""

import json
import os
import re
from pathlib import Path

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


def event(kind: str, step: int) -> dict:
    return {"event": kind, "step": step}


def test_a_new_run_is_named_by_data_recipe_and_time(tmp_path):
    config = configs.override(Config(), {"data.path": str(tmp_path / "street")})
    name = runs.new_folder(config, "recipes/mine.toml")
    assert name.parent == Path("runs")
    assert re.fullmatch(r"street-mine-\d{8}-\d{6}", name.name)
    assert not name.exists()


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
        ("runtime.loader", "torchvision"),
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
    assert changed == [key]
    assert config == configs.override(Config(), {"train.lr": 0.5, key: value})


@pytest.mark.parametrize(
    ("changes", "named"),
    [
        ({"train.lr": 0.1}, ["train.lr"]),
        ({"train.batch": 8, "train.global_batch": 8}, ["train.batch", "train.global_batch"]),
        ({"runtime.seed": 1, "data.size": "32x48", "train.epochs": 2}, ["data.size", "runtime.seed"]),
        ({"model.depth": 3, "runtime.dtype": "bf16"}, ["model.depth", "runtime.dtype"]),
    ],
)
def test_a_run_that_goes_on_keeps_what_makes_it_that_run(tmp_path, changes, named):
    run = begin(tmp_path / "run")
    with pytest.raises(UsageError, match=f"^--resume: {', '.join(named)} cannot change") as error:
        runs.reopen(run, lambda old: configs.override(old, changes))
    assert "train.epochs" in str(error.value).partition("change only")[2]
    assert "\n" not in str(error.value)


def test_going_on_without_a_change_changes_nothing(tmp_path):
    run = begin(tmp_path / "run", train__lr=0.5)
    assert runs.reopen(run, lambda old: old) == (configs.override(Config(), {"train.lr": 0.5}), [])


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


def test_json_is_strict(tmp_path):
    runs.write_json(tmp_path / "a.json", {"miou": None, "Straße": [1.5]})
    assert json.loads((tmp_path / "a.json").read_text(encoding="utf-8")) == {"miou": None, "Straße": [1.5]}
    with pytest.raises(ValueError, match="not JSON compliant"):
        runs.write_json(tmp_path / "a.json", {"miou": float("nan")})
    assert json.loads((tmp_path / "a.json").read_text())["miou"] is None
    assert [p.name for p in tmp_path.iterdir()] == ["a.json"]
