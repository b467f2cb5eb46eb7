"""A name is a name, whatever it holds: on the terminal, in pages, and in commands that are printed to be pasted."""

import html
import json
import shlex
import sys
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st
from rich.console import Console

from fastseg import model as models
from fastseg import report
from fastseg.errors import UsageError
from fastseg.metrics import Scores
from fastseg.runlog import class_table, comparison_table
from fastseg.texts import is_plain, pasted

# Of what rich, shells and HTML make something else, and letters that terminals join or turn round.
SPECIAL = st.sampled_from(
    [*"[]/:;, '\"%$&<>|*?~`\\#!{}()-", "\u0301", "\u202e", "é", "语", ":car:", "[/main]", "[red]"]
)
NAMES = st.lists(SPECIAL | st.characters(codec="utf-8"), min_size=1, max_size=12).map("".join)
NAMES = NAMES.filter(lambda name: name.strip() and is_plain(name))


def scores(name: str) -> dict:
    return Scores(np.array([[3, 1], [0, 4]])).summary((name, "other"))


def printed(what: object) -> str:
    console = Console(width=4000, highlight=False, soft_wrap=True, no_color=True)
    with console.capture() as found:
        console.print(what)
    return found.get()


@given(NAMES, NAMES)
@example("road [/main]", "lane [solid] 0")
@example(":car:", "[bold]")
@settings(max_examples=60, deadline=None)
def test_tables_show_names_as_they_are(name, title):
    text = printed(class_table(scores(name), title))
    assert name.strip() in text
    assert title.strip() in text
    sides = {side: scores(name) for side in "ab"}
    rows = [{"name": name, "difference": 0.0}, {"name": "other", "difference": None}]
    found = {"difference": {"value": 0.0, "low": 0.0, "high": 0.0}, "chance": 1.0, "better": 0, "worse": 0}
    text = printed(comparison_table(sides | {"classes": rows, "comparison": found}, title, "b"))
    assert name.strip() in text
    assert f"b against {title}".strip() in text


def test_a_class_with_brackets_reaches_the_end(row):
    assert "road [/main]" in printed(class_table(scores("road [/main]"), "best"))
    row("a class named `road [/main]`", "is shown as it is, on the terminal and in pages")


@given(NAMES)
@example("-run")
@example("--out")
@example("my run's; rm -rf $HOME")
@settings(max_examples=200, deadline=None)
def test_a_printed_command_gives_the_path_back(name):
    words = shlex.split(f"fastseg report {pasted(name)}")
    assert len(words) == 3
    assert Path(words[2]) == Path(name)
    assert not words[2].startswith("-")


def test_a_path_that_begins_with_a_dash_is_no_option():
    assert pasted("-x") == "./-x"


@given(NAMES.filter(lambda name: "/" not in name and name not in (".", "..")))
@settings(max_examples=15, deadline=None)
def test_a_report_names_run_and_classes_as_they_are(tmp_path_factory, name):
    folder = tmp_path_factory.mktemp("runs") / f"r{name}"
    folder.mkdir()
    (folder / "config.toml").write_text('[data]\nsize = "32x48"\npath = "d"\n')
    rows = [{"name": n, "color": [1, 2, 3], "weight": 1.0, "pixels": 4} for n in (name, "other")]
    start = {"event": "start", "step": 0, "time": "2026-01-01T00:00:00+00:00", "classes": rows}
    (folder / "log.jsonl").write_text(json.dumps(start) + "\n")
    page = html.unescape(report.write(folder).read_text(encoding="utf-8"))
    assert f"r{name}".strip() in page
    assert pasted(folder / "checkpoints" / "best.pt") in page or "best.pt" not in page


def test_what_torch_says_of_a_download_is_not_on_standard_output(monkeypatch, capsys):
    def get_state_dict(**how: object) -> dict:
        sys.stdout.write('Downloading: "https://..." to ...\n')
        raise OSError("no network")

    weights = SimpleNamespace(DEFAULT=SimpleNamespace(get_state_dict=get_state_dict))
    monkeypatch.setattr("torchvision.models.get_model_weights", lambda name: weights)
    network = models.SegNet(2, depth=1)
    with pytest.raises(UsageError, match="no network"):
        models.initialise(network, "vgg16")
    found = capsys.readouterr()
    assert found.out == ""
    assert found.err.startswith("Downloading: ")
