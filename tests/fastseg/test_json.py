"""`--json`: one document on standard output and nothing else, of every command that has it."""

import json
from pathlib import Path

import click
import made_folders
import pytest

from fastseg.cli import main

TINY = ["--recipe", "fast", "--device", "cpu", "--size", "32x48", "--epochs", "1", "--set", "model.depth=1"]
BEST = "r/checkpoints/best.pt"
COMMANDS = {
    "train": ["train", "--data", "d", *TINY, "--batch", "1", "--set", "runtime.log_every=1", "--run", "r"],
    "train --dry-run": ["train", "--data", "d", *TINY, "--dry-run"],
    "eval": ["eval", BEST],
    "eval --against": ["eval", BEST, "--against", BEST],
    "predict": ["predict", BEST, "d", "--out", "out"],
    "export": ["export", BEST, "--out", "net.pt2"],
    "repro": ["repro", "r", "--steps", "2"],
    "data check": ["data", "check", "d"],
    "data stats": ["data", "stats", "d"],
    "data prepare": ["data", "prepare", "d", "--size", "32x48", "--cache-dir", "kept"],
    "data parity": ["data", "parity", "d", "--size", "32x48"],
    "data init": ["data", "init", "field"],
    "data rasterise": ["data", "rasterise", "traced", "masks"],
    "doctor": ["doctor"],
    "doctor --run": ["doctor", "--run", "r"],
    "bench": ["bench", "kernels", "--plan"],
}
SLOW = {"bench", "profile"}  # of which a part is asked here, and all by tests of their own


def with_json(command: click.Command, name: str = "") -> list[str]:
    if isinstance(command, click.Group):
        return [found for word, each in command.commands.items() for found in with_json(each, f"{name} {word}".strip())]
    return [name] if any("--json" in parameter.opts for parameter in command.params) else []


def test_every_command_that_has_it_is_asked():
    assert set(with_json(main)) - SLOW == {name.partition(" --")[0] for name in COMMANDS} - SLOW


@pytest.mark.slow
def test_json_is_one_document_and_nothing_else(call, street, capfd):
    Path("d").symlink_to(street)
    made_folders.rgba(Path("field"))
    made_folders.labelme(Path("traced"))
    for name, words in COMMANDS.items():
        code, out, err = call(*words, "--json")
        assert code == 0, (name, err)
        assert isinstance(json.loads(out), dict), name
        assert out.count("\n") == 1, name
        assert capfd.readouterr().out == "", name  # of libraries in C, and of processes
