"""`fastseg repro`: the same losses again, or the first step that differs."""

import json
from pathlib import Path

import pytest
from click.testing import CliRunner

from fastseg.cli import main
from fastseg.config import load_recipe, override
from fastseg.training import train

CHANGES = {"data.size": "32x48", "model.depth": 1, "train.batch": 2, "train.epochs": 3, "runtime.device": "cpu"}
CHANGES |= {"runtime.log_every": 2, "train.schedule": "one-cycle"}


@pytest.fixture(scope="module")
def finished(street, tmp_path_factory) -> Path:
    run = tmp_path_factory.mktemp("repro") / "run"
    train(override(load_recipe("fast"), CHANGES | {"data.path": str(street)}), run)
    return run


def copy_of(run: Path, to: Path, change=lambda event: event) -> Path:
    """The run's folder without its checkpoints, with a log that `change` has been at."""
    to.mkdir()
    for name in ("config.toml", "split.json", "environment.json"):
        (to / name).write_text((run / name).read_text())
    events = [json.loads(line) for line in (run / "log.jsonl").read_text().splitlines()]
    (to / "log.jsonl").write_text("".join(json.dumps(change(event)) + "\n" for event in events))
    return to


def invoke(*words: object) -> tuple[int, str, str]:
    result = CliRunner().invoke(main, ["repro", *map(str, words)])
    assert not isinstance(result.exception, Exception), result.exception
    return result.exit_code, result.stdout, result.stderr


def test_a_run_is_trained_again_to_the_same_bits_whole_or_in_part(finished):
    # 8 images in batches of 2: 12 steps, a log line every two.
    code, out, _ = invoke(finished, "--json")
    document = json.loads(out)
    assert (code, document["verdict"], document["first_difference"]) == (0, "the same", None)
    assert (document["steps"], document["compared"], document["changed"]) == (12, 6, {})
    # The schedule is that of the whole run.
    code, out, _ = invoke(finished, "--steps", 5)
    assert (code, out) == (0, "the same: 2 log lines up to step 4\n")


@pytest.mark.parametrize(("factor", "code", "verdict"), [(1.001, 0, "within spread"), (1.1, 1, "different")])
def test_the_first_step_that_differs_is_named(finished, tmp_path, factor, code, verdict):
    def change(event: dict) -> dict:
        return event | {"loss": factor * event["loss"]} if event["event"] == "train" and event["step"] >= 4 else event

    run = copy_of(finished, tmp_path / "run", change)
    environment = json.loads((run / "environment.json").read_text())
    (run / "environment.json").write_text(json.dumps(environment | {"torch": "1.0"}))
    found, out, _ = invoke(run, "--steps", 6)
    lines = out.splitlines()
    assert (found, lines[0]) == (code, f"{verdict}: 3 log lines up to step 6")
    assert lines[1] == f"first difference at step 4, at most {1 - 1 / factor:.2%} of the loss"
    assert lines[2].startswith("torch was 1.0, is ")


def test_a_run_of_several_processes_is_told(finished, tmp_path):
    run = copy_of(finished, tmp_path / "run", lambda e: e | {"world": 2} if e["event"] == "start" else e)
    assert "processes was 2, is 1" in invoke(run, "--steps", 2)[1].splitlines()


def test_what_cannot_be_trained_again_is_told(finished, tmp_path):
    assert invoke(tmp_path)[0] == 2
    assert "give --steps 2 or more" in invoke(finished, "--steps", 1)[2]
    resumed = copy_of(finished, tmp_path / "a", lambda e: e | {"step": 3} if e["event"] == "start" else e)
    assert "was resumed" in invoke(resumed)[2]
    other = copy_of(finished, tmp_path / "b")
    (other / "split.json").write_text(json.dumps({"train": ["another"], "train_contents": ["0" * 16], "val": []}))
    code, _, err = invoke(other)
    assert (code, "are not those that" in err) == (1, True)
    assert "train differs by 8 of 1 (Synth00_f00000, Synth00_f00001, Synth01_f00000, ...); val differs by 4 of 0" in err


def test_data_that_was_moved_is_said_where_it_is(finished, street, tmp_path):
    moved = copy_of(finished, tmp_path / "run")
    text = (moved / "config.toml").read_text()
    assert str(street) in text
    (moved / "config.toml").write_text(text.replace(str(street), str(tmp_path / "before")))
    assert "before: no folder" in invoke(moved)[2]
    code, out, _ = invoke(moved, "--steps", 2, "--data", street)
    assert (code, out) == (0, "the same: 1 log lines up to step 2\n")
