"""Faults of how a data set is divided: lists, shares and groups that cannot be what was meant."""

import pytest

from fastseg.data.synth import write

TINY = ["--recipe", "fast", "--size", "32x48", "--epochs", "1", "--batch", "2", "--set", "model.depth=1"]
TOML = """{head}
[splits.train]
images = "train"
labels = "trainannot"
[[classes]]
name = "all"
index = [0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11]
"""


@pytest.fixture
def train(call, tmp_path):
    """train("data") -> what `fastseg train` says to it, in a line, before it has written anything."""

    def run(data):
        code, _, err = call("train", "--data", data, "--run", "run", "--device", "cpu", *TINY)
        assert code in (1, 2)
        assert len(err.strip().splitlines()) == 1
        assert not (tmp_path / "run").exists()
        return err

    return run


@pytest.mark.parametrize("layout", ["fastai", "segnet"])
def test_a_validation_list_that_names_what_is_not_there(tmp_path, call, train, row, layout):
    write(tmp_path / "data", layout=layout, counts={"train": 4, "val": 2}, size=(32, 48))
    path = tmp_path / "data" / ("valid.txt" if layout == "fastai" else "val.txt")
    path.write_text(f"{path.read_text()}Synth04_f0001.png\n")  # a digit was lost
    says = train("data")
    assert f"data/{path.name}: names Synth04_f0001.png, which has no image and label here; add the files" in says
    assert call("data", "check", "data")[0] == 1
    row(f"a name in {path.name} ({layout}) that is not there", says, "correct the name")
    # A scheme that does not ask the list does not mind.
    code, _, err = call("train", "--data", "data", "--run", "run", "--device", "cpu", *TINY, "--split-scheme", "video")
    assert code == 0, err


def described(tmp_path, head):
    write(tmp_path / "data", counts={"train": 4, "val": 1}, size=(32, 48))
    (tmp_path / "data" / "dataset.toml").write_text(TOML.format(head=head), encoding="utf-8")


@pytest.mark.parametrize(
    ("fault", "head", "words", "cure"),
    [
        (
            "dataset.toml without validation images",
            "",
            "no val split; it has train (4 pairs); `val = 0.2` at",
            "`val = 0.2`",
        ),
        (
            "val = 0.2 of a single group",
            "val = 0.2\ngroup = '{group}th*'",
            "two groups or more to divide",
            "another `group`, or none",
        ),
        (
            "group that an image does not fit",
            "group = '{group}-*'",
            "does not match Synth00_f00000 and 3 more",
            "another `group`",
        ),
        ("val = 20", "val = 20", "wants a share of the images between 0 and 1, such as 0.2", "`val = 0.2`"),
        (
            "fold of more folds than groups",
            "fold = '2/9'",
            "no group is left for this fold; give fewer folds",
            "fewer folds",
        ),
    ],
)
def test_a_description_that_holds_nothing_out(tmp_path, train, row, fault, head, words, cure):
    described(tmp_path, head)
    says = train("data")
    assert words in says
    row(fault, says, cure)


def test_what_is_held_out_is_said_and_recorded(tmp_path, call):
    described(tmp_path, 'val = 0.25\ngroup = "{group}_*"')
    code, _, err = call("train", "--data", "data", "--run", "run", "--device", "cpu", *TINY)
    assert code == 0
    assert "val=0.25: the data set's description holds that out of `train`, whole groups by the seed" in err
    code, out, _ = call("eval", "run/checkpoints/last.pt", "--json")
    assert code == 0
    assert '"split_scheme": "val=0.25"' in out
