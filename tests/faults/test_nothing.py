"""Nothing to do is a fault: labels without classes, empty texts, and numbers that are none."""

import dataclasses
from pathlib import Path

import click
import numpy as np
import pytest
from PIL import Image

from fastseg import config as configs
from fastseg.cli import main
from fastseg.errors import UsageError

TINY = ["--recipe", "fast", "--device", "cpu", "--size", "32x48", "--epochs", "1", "--set", "model.depth=1"]
COUNTED = (
    "--batch",
    "--global-batch",
    "--train",
    "--val",
    "--test",
    "--seed",
    "--nproc",
    "--gpus",
    "--epochs",
    "--images",
)
NO_NUMBERS = ("nan", "inf", "-inf", "-1", "1e999")
CLASS = '[[classes]]\nname = "{}"\nindex = {}\n'


def said(call, *arguments, code: int) -> str:
    """The one line that a command says before it has done anything."""
    got, out, err = call(*arguments)
    assert (got, out) == (code, ""), (arguments, out, err)
    return err.splitlines()[-1].removeprefix("fastseg: ").removeprefix("Error: ")


def make_void(folder: Path, split: str) -> None:
    for label in (folder / f"{split}annot").iterdir():
        Image.fromarray(np.full((96, 144), 11, np.uint8)).save(label)  # the layout's void


# Labels


@pytest.mark.parametrize(("split", "what"), [("train", "training"), ("val", "validation")])
def test_labels_that_are_all_void_end_a_run_before_the_first_step(call, copy_of, row, split, what):
    folder, _ = copy_of("void")
    make_void(folder, split)
    line = said(call, "train", "--data", folder, *TINY, "--run", "r", code=1)
    assert not Path("r").exists()
    assert said(call, "train", "--data", folder, *TINY, "--dry-run", code=1) == line
    code, out, _ = call("data", "check", folder)
    assert code == 1
    assert f"error: {line}" in out
    row(f"all {what} labels are void", line, "another class map (`void`, `index`), or other labels")


def test_one_pixel_of_a_class_is_enough_to_validate_on_and_none_is_not(call, copy_of, row):
    folder, _ = copy_of("nearly")
    make_void(folder, "val")
    last = sorted((folder / "valannot").iterdir())[-1]
    pixels = np.full((96, 144), 11, np.uint8)
    pixels[5, 7] = 3
    Image.fromarray(pixels).save(last)
    code, _, err = call("train", "--data", folder, *TINY, "--run", "r")
    assert code == 0, err
    make_void(folder, "val")
    line = said(call, "eval", "r/checkpoints/best.pt", code=1)
    assert "all pixels of the 4 labels of val are void" in line
    row("`eval` of labels that are all void", line, "another class map, or another split")


# Classes


@pytest.mark.parametrize("index", ["[]", "[[]]", "-1", "256", "nan"])
def test_a_class_without_a_value(call, copy_of, row, index):
    folder, _ = copy_of("own")
    splits = '[splits.train]\nimages = "train"\nlabels = "trainannot"\n'
    (folder / "dataset.toml").write_text(splits + CLASS.format("road", 0) + CLASS.format("car", index))
    line = said(call, "data", "check", folder, code=2)
    assert line.startswith(f"{folder}/dataset.toml: classes[1].index = ")
    assert line.endswith(": wants a number 0..255 or a list of them")
    if index == "[]":
        row("a class with `index = []`", line, "its values; one that no label has is left out")


@pytest.mark.parametrize("name", ["", " ", "\u3000"])
def test_a_class_without_a_name(call, copy_of, row, name):
    folder, _ = copy_of("own")
    splits = '[splits.train]\nimages = "train"\nlabels = "trainannot"\n'
    (folder / "dataset.toml").write_text(splits + CLASS.format("road", 0) + CLASS.format(name, 1), encoding="utf-8")
    line = said(call, "data", "check", folder, code=2)
    assert line == f"{folder}/dataset.toml: class 1 has no name: give it one"
    if not name:
        row("a class without a name", line, "a name")


# Empty texts


def commands(command: click.Command = main, name: tuple[str, ...] = ()):
    """Every command of the command line with its words."""
    if isinstance(command, click.Group):
        for word, each in command.commands.items():
            yield from commands(each, (*name, word))
    else:
        yield name, command


def texts():
    """(command, words that lead to it, with one text left to give) of every option and argument that takes any text."""
    for name, command in commands():
        positions = [p for p in command.params if isinstance(p, click.Argument)]
        before = [word for p in positions for word in ["x"] * (p.required and max(p.nargs, 1))]
        for parameter in command.params:
            if isinstance(parameter.type, click.Choice) or getattr(parameter, "is_flag", False):
                continue
            if isinstance(parameter, click.Option):
                yield [*name, *before, parameter.opts[0]]
        for index in range(len(positions)):
            yield [*name, *["x"] * index]


@pytest.mark.parametrize("words", list(texts()), ids=" ".join)
def test_an_empty_text_is_refused_before_anything_is_done(call, tmp_path, words):
    code, out, err = call(*words, "")
    assert (code, out, list(tmp_path.iterdir())) == (2, "", []), err
    assert "Traceback" not in err


def test_an_empty_variable_trains_on_nothing(call, row):
    line = said(call, "train", "--data", "", *TINY, code=2)
    row('`--data ""`, `--run ""`, or another empty text (a variable of a script that is not set)', line, "a value")


# Numbers


def numbers():
    """Words that give every option which takes a number one that is none, or too large where that cannot be counted."""
    kinds = (click.types.IntParamType, click.types.FloatParamType, click.IntRange, click.FloatRange)
    own = ("PERCENT", "X,X,...", "N,N,...", "STEPS|MINUTESm", "HxW", "integer")
    for name, command in commands():
        before = [w for p in command.params if isinstance(p, click.Argument) and p.required for w in ["x"]]
        for parameter in command.params:
            takes_one = isinstance(parameter.type, kinds) or parameter.type.name in own
            for value in NO_NUMBERS if takes_one and isinstance(parameter, click.Option) else ():
                yield [*name, *before, parameter.opts[0], value]
            if takes_one and parameter.opts[0] in COUNTED:
                yield [*name, *before, parameter.opts[0], "9" * 40]


@pytest.mark.parametrize("words", list(numbers()), ids=" ".join)
def test_a_number_that_is_none_is_refused_before_anything_is_done(call, tmp_path, words):
    code, out, err = call(*words)
    written = [path for path in tmp_path.rglob("*") if path.name != "runs"]  # where a new run's folder was tried
    assert (code, out, written) == (2, "", []), err
    assert "Traceback" not in err


def fields():
    for section, kind in configs.SECTIONS.items():
        for each in dataclasses.fields(kind):
            if each.type in (int, float, "int", "float"):
                yield f"{section}.{each.name}", each.type in (int, "int")


@pytest.mark.parametrize(("key", "whole"), list(fields()))
def test_a_key_takes_no_number_that_is_none(key, whole):
    for value in NO_NUMBERS:
        with pytest.raises(UsageError, match=key.replace(".", r"\.") + "|" + key.partition(".")[2]):
            configs.override(configs.Config(), configs.assignments((f"{key}={value}",)))
    if whole:
        with pytest.raises(UsageError, match=r"wants a (whole number|number of at most 64 bits)"):
            configs.override(configs.Config(), configs.assignments((f"{key}={'9' * 40}",)))


@pytest.mark.parametrize(
    "key",
    [
        "train.batch",
        "train.global_batch",
        "train.accumulate",
        "model.depth",
        "train.epochs",
        "augment.translate",
        "runtime.threads",
        "runtime.bucket_mib",
        "runtime.collective_timeout",
    ],
)
def test_numbers_too_large_to_count_with_are_refused(key):
    with pytest.raises(UsageError, match="or less"):
        configs.override(configs.Config(), {key: 2**62})


def test_a_limit_that_nothing_can_be_above_is_refused(call, row):
    line = said(call, "bench", "compare", "a", "b", "--fail-over", "nan", code=2)
    assert line == "Invalid value for '--fail-over': nan: write per cent, 0 or more, such as 5%"
    row("`bench compare --fail-over nan`, which nothing could be above", line, "a number; `inf` and -1 are none either")


def test_a_seed_below_0(call, row):
    line = said(call, "data", "synth", "d", "--seed", "-1", code=2)
    row("`--seed -1`", line, "0 or more")
