"""Folders as tools and people make them, from `data init` to an evaluated network, with no edit in between."""

import json

import made_folders as made
import pytest

TINY = ("--recipe", "fast", "--size", "32x48", "--epochs", "1", "--batch", "2", "--device", "cpu")
TINY += ("--set", "model.depth=1", "--loader", "reference")
FOLDERS = (*made.FOLDERS, *made.POLYGONS)


@pytest.mark.slow
@pytest.mark.parametrize("make", FOLDERS, ids=lambda make: make.__name__)
def test_from_a_folder_to_an_evaluated_network(call, tmp_path, make):
    make(tmp_path / "own")
    if make in made.POLYGONS:
        (tmp_path / "own" / "photos" / "5.jpg").unlink(missing_ok=True)  # LabelMe's that nobody has annotated
        assert call("data", "rasterise", "own", "own/masks")[0] == 0
    assert call("data", "init", "own")[0] == 0
    code, out, _ = call("data", "check", "own", "--json")
    assert (code, json.loads(out)["errors"]) == (0, [])
    assert call("train", "--data", "own", *TINY, "--run", "run")[0] == 0
    code, out, _ = call("eval", "run/checkpoints/best.pt", "--device", "cpu", "--json")
    assert code == 0
    scored = json.loads(out)
    assert 0 <= scored["miou"] <= 1
    assert len(scored["classes"]) == (2 if make in (made.one_folder, made.no_split) else 3)
