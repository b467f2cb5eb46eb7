"""Configurations: the published recipe, files and options that read back as written, faults in one line."""

import dataclasses
import math
import os
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from fastseg import config as configs
from fastseg.config import Augment, Config, Data, Size, Train, assignments, from_dict, override, parse_size
from fastseg.errors import UsageError

# The published baseline: SegNet on CamVid as in MATLAB's semantic segmentation example.
PUBLISHED = {
    "data.size": (360, 480),
    "data.split_scheme": "tutorial",  # random-60-40 where a data set brings no split
    "augment.mirror": True,
    "augment.translate": 10,
    "augment.crop": (0, 0),
    "augment.scale": 1.0,
    "augment.colour": 0.0,
    "model.backbone": "vgg16",
    "model.depth": 5,
    "model.init": "vgg16",
    "train.epochs": 100,
    "train.max_steps": 0,
    "train.batch": 4,
    "train.accumulate": 1,
    "train.drop_remainder": True,
    "train.weighting": "median-frequency",
    "train.lr": 1e-3,
    "train.momentum": 0.9,
    "train.weight_decay": 5e-4,
    "train.decay_norms": True,
    "train.schedule": "constant",
    "train.clip": 0,
    "train.ema": 0,
    "train.patience": 0,
    "runtime.dtype": "tf32",  # single precision as PyTorch has it by default
}


def value(config: Config, key: str):
    section, name = key.split(".")
    return getattr(getattr(config, section), name)


def test_the_baseline_is_the_published_recipe():
    config = configs.load_recipe("baseline")
    assert {key: value(config, key) for key in PUBLISHED} == PUBLISHED


def test_there_are_two_recipes_and_any_file(tmp_path):
    assert configs.recipes() == ["baseline", "fast"]
    path = tmp_path / "mine.toml"
    path.write_text('[train]\nlr = 1\n[data]\nsize = "32x48"\n')
    config = configs.load_recipe(str(path))
    assert (config.train.lr, type(config.train.lr), config.data.size) == (1.0, float, (32, 48))
    assert config == override(Config(), {"train.lr": 1.0, "data.size": "32x48"})
    with pytest.raises(UsageError, match=r"^--recipe slow: choose one of baseline, fast, or give a \.toml file$"):
        configs.load_recipe("slow")


@pytest.mark.parametrize("recipe", ["baseline", "fast"])
def test_a_recipe_reads_back_as_it_was_written(recipe, tmp_path):
    config = configs.load_recipe(recipe)
    (tmp_path / "config.toml").write_text(config.dumps(), encoding="utf-8")
    assert configs.read(tmp_path / "config.toml") == config
    assert configs.from_dict(config.as_dict(), "checkpoint") == config


@given(
    path=st.text(st.characters(codec="utf-8"), max_size=12),
    lr=st.floats(0, allow_nan=False, allow_infinity=False),
    size=st.tuples(st.integers(1, 9999), st.integers(1, 9999)),
    mirror=st.booleans(),
)
@settings(max_examples=30, deadline=None)
def test_any_config_reads_back_as_it_was_written(tmp_path_factory, path, lr, size, mirror):
    changes = {"data.path": path, "train.lr": lr, "data.size": size, "augment.mirror": mirror}
    changes["augment.crop"] = size if mirror else "0x0"
    config = override(Config(), changes)
    assert (config.data.path, config.train.lr, config.data.size, config.augment.mirror) == (path, lr, size, mirror)
    file = tmp_path_factory.mktemp("config") / "config.toml"
    file.write_text(config.dumps(), encoding="utf-8")
    assert configs.read(file) == config


def test_a_tiers_old_name_is_taken_for_its_new_one_and_told_once(tmp_path, capsys, monkeypatch):
    path = tmp_path / "config.toml"
    path.write_text('[runtime]\nloader = "torchvision"\n', encoding="utf-8")
    ways = (
        lambda: configs.read(path),
        lambda: configs.from_dict({"runtime": {"loader": "torchvision"}}, "last.pt"),
        lambda: override(Config(), assignments(("runtime.loader=torchvision",))),
    )
    for read in ways:
        configs._say_renamed.cache_clear()
        assert [read().runtime.loader for _ in range(2)] == ["reference"] * 2
        assert capsys.readouterr().err == "runtime.loader: torchvision is called reference now\n"
    # Of several processes one talks; what fastseg's own launcher starts, not even that: the launcher has.
    for variables in ({"RANK": "1", "WORLD_SIZE": "2"}, {"RANK": "0", "WORLD_SIZE": "2", "FASTSEG_LAUNCHER": "/"}):
        for name, value in variables.items():
            monkeypatch.setenv(name, value)
        configs._say_renamed.cache_clear()
        assert configs.read(path).runtime.loader == "reference"
        assert capsys.readouterr().err == ""


@pytest.mark.parametrize(
    ("translate", "size", "shift"),
    [(10, (360, 480), 10), (10, (120, 160), 3), (10, (48, 72), 1), (10, (720, 960), 20), (0, (360, 480), 0)],
)
def test_the_largest_shift_scales_with_the_height(translate, size, shift):
    assert Augment(translate=translate).max_shift(size) == (shift, shift)


@pytest.mark.parametrize(("text", "size"), [("360x480", (360, 480)), ("1X2", (1, 2))])
def test_a_size_is_height_by_width(text, size):
    assert parse_size(text) == size
    assert (parse_size(text).height, parse_size(text).width) == size


def test_a_size_is_printed_as_it_is_written():
    assert [str(Size(360, 480)), f"{Size(5, 7)}"] == ["360x480", "5x7"]
    assert Size(360, 480) == (360, 480)


@pytest.mark.parametrize("size", ["32x48", (32, 48), Size(32, 48)])
def test_a_size_may_be_given_as_text_or_as_numbers(size):
    config = override(Config(), {"data.size": size, "augment.crop": size})
    for found in (config.data.size, config.augment.crop, Data(size=size).size):
        assert (type(found), found) == (Size, (32, 48))
    assert config.as_dict()["data"]["size"] == config.as_dict()["augment"]["crop"] == "32x48"
    assert all(type(config.as_dict()[section][key]) is str for section, key in (("data", "size"), ("augment", "crop")))


@pytest.mark.parametrize("size", [(0, 5), (5,), (1, 2, 3), (-1, 2), (1.5, 2), ("36", "48"), (True, 2), (10**5000, 2)])
def test_numbers_that_are_no_size_are_refused_as_their_text_is(size):
    with pytest.raises(UsageError, match=r"^--set: data\.size: .* is no size: write HEIGHTxWIDTH, such as 360x480$"):
        override(Config(), {"data.size": size})


@pytest.mark.parametrize(
    "text", ["", "360", "x", "0x5", "5x0", "axb", "1x2x3", "-1x2", "1.5x2", "36 x48", "100000x5", "9" * 5000 + "x1"]
)
def test_what_is_no_size_is_refused(text):
    with pytest.raises(ValueError, match="write HEIGHTxWIDTH"):
        parse_size(text)
    with pytest.raises(UsageError, match=r"^--set: data\.size: .*write HEIGHTxWIDTH, such as 360x480$"):
        override(Config(), {"data.size": text})


@pytest.mark.parametrize(
    ("key", "new", "message"),
    [
        ("train.learning_rate", 1, "unknown key train.learning_rate"),
        ("train.epoch", 1, "unknown key train.epoch; did you mean train.epochs?"),
        ("trian.lr", 1, "unknown key trian.lr; did you mean train.lr?"),
        ("zzz", 1, "unknown key zzz; sections are data, augment, model, train, runtime"),
        ("train", 1, "unknown key train"),
        ("train.schedule", "onecycle", "train.schedule = 'onecycle': choose one of constant, step, poly, one-cycle"),
        ("train.schedule", "onecycle", "(did you mean one-cycle?)"),
        ("runtime.dtype", "bfloat16", "runtime.dtype = 'bfloat16': choose one of auto, bf16, fp16, tf32, fp32"),
        ("train.lr", math.nan, "train.lr = nan: 0 or more"),
        ("train.lr", -1, "train.lr = -1.0: 0 or more"),
        ("train.epochs", 0, "train.epochs = 0: 1 or more"),
        ("train.lr", math.inf, "train.lr = inf: a finite number"),
        ("train.lr", 10**400, "train.lr: wants a number of at most 64 bits"),
        ("train.epochs", 2**63, "train.epochs: wants a number of at most 64 bits"),
        ("train.epochs", [10**5000], "train.epochs = a number of thousands of digits: wants a whole number"),
        ("data.path", {"a": [["x\ny" * 99]]}, "data.path = {'a': [['x"),
        ("train.l\nr", 1, r"unknown key 'train.l\nr'"),
        ("train.ema", 1, "ema"),
        ("train.momentum", math.nan, "momentum"),
        ("train.warmup", 1.5, "warmup"),
        ("train.epochs", 2.5, "train.epochs = 2.5: wants a whole number"),
        ("train.epochs", True, "train.epochs = True: wants a whole number"),
        ("train.lr", True, "train.lr = True: wants a number"),
        ("train.lr", "fast", "train.lr = 'fast': wants a number"),
        ("augment.mirror", 1, "augment.mirror = 1: wants true or false"),
        ("augment.crop", "0x5", "augment.crop = 0x5: two positive numbers, or 0x0 for whole images"),
        ("augment.crop", "5", "write HEIGHTxWIDTH"),
        ("augment.crop", True, "augment.crop = True: wants a size such as 360x480"),
        ("data.path", 3, "data.path = 3: wants a text"),
        ("data.size", [360, 480], "data.size = [360, 480]: wants a size such as 360x480"),
    ],
)
@pytest.mark.parametrize("source", ["--set", "some.toml"])
def test_a_fault_is_one_line_with_source_and_key(key, new, message, source):
    with pytest.raises(UsageError) as error:
        override(Config(), {key: new}, source)
    text = str(error.value)
    assert text.startswith(f"{source}: ")
    assert message in text
    assert "\n" not in text


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("[train]\nlr = = 1\n", "not valid TOML: .*line 2"),
        ("lr = 1\n", "lr is no section; sections are data, augment, model, train, runtime"),
        ("[train]\nlearning = 1\n", "unknown key train.learning"),
        ("[model]\ndept = 3\n", "unknown key model.dept; did you mean model.depth?"),
        ("[train.lr]\nx = 1\n", "train.lr = {'x': 1}: wants a number"),
        ("[train]\nlr = nan\n", "train.lr = nan: 0 or more"),
        (b"[data]\npath = '\xff'\n", r"not UTF-8 text \(byte 15\); save it as UTF-8"),
        (None, "cannot be read: No such file or directory"),
        ("v = " + "[" * 3000, "not valid TOML: brackets nested too deep"),
        ("[train]\nepochs = " + "9" * 5000, "not valid TOML: .*a number too long"),
        ("[train]\nlr = 0x" + "f" * 5000, "not valid TOML: a whole number of more than 64 bits"),
        ("train.lr." + "a." * 90 + "a = 1", r"train.lr = {'a': .*\.\.\..*: wants a number"),
        ("train.lr." + "a." * 99 + "a = 1", "not valid TOML: a line with more than 100 dots"),
        ('["da\\nta"]\nsize = 1\n', r"unknown key 'da\\nta.size'"),
        ('"da\\nta" = 1\n', r"'da\\nta' is no section"),
    ],
)
def test_a_faulty_file_is_named(tmp_path, text, message):
    path = tmp_path / "mine.toml"
    if text is not None:
        path.write_bytes(text if isinstance(text, bytes) else text.encode())
    with pytest.raises(UsageError, match=f"mine.toml: {message}".replace("?", r"\?")) as error:
        configs.load_recipe(str(path))
    assert str(error.value).startswith(str(path))
    assert "\n" not in str(error.value)


@pytest.mark.parametrize(
    ("pair", "key", "wanted"),
    [
        ("train.lr=0.01", "train.lr", 0.01),
        ("train.lr=1e-3", "train.lr", 0.001),
        ("train.batch=8", "train.batch", 8),
        ("train.batch = 8", "train.batch", 8),
        ("augment.mirror=false", "augment.mirror", False),
        ("data.size=32x48", "data.size", "32x48"),
        ("model.init=vgg16", "model.init", "vgg16"),
        ('model.init="none"', "model.init", "none"),
        ("data.path=/a=b/c d", "data.path", "/a=b/c d"),
        ("data.path=C:\\data", "data.path", "C:\\data"),
        ("train.lr=", "train.lr", ""),
    ],
)
def test_an_assignment_is_toml_or_else_text(pair, key, wanted):
    (found,) = assignments((pair,)).items()
    assert found == (key, wanted)
    assert type(found[1]) is type(wanted)


@pytest.mark.parametrize("text", ["[" * 3000, "9" * 5000, "0x" + "f" * 5000])
def test_an_assignment_that_toml_cannot_hold_is_text(text):
    assert assignments((f"train.lr={text}",)) == {"train.lr": text}


def test_a_byte_order_mark_is_no_part_of_a_recipe(tmp_path):
    (tmp_path / "mine.toml").write_bytes(b"\xef\xbb\xbf[train]\nepochs = 3\n")
    assert configs.load_recipe(str(tmp_path / "mine.toml")).train.epochs == 3


def test_a_recipe_that_is_a_folder_a_pipe_or_endless_is_not_read(tmp_path):
    (tmp_path / "folder.toml").mkdir()
    os.mkfifo(tmp_path / "pipe.toml")
    with (tmp_path / "large.toml").open("wb") as file:
        file.truncate(1 << 40)
    for name, why in {
        "folder": "cannot be read: it is a folder, no file",
        "pipe": "cannot be read: it is a pipe or a device, no file",
        "large": "has 1099511627776 bytes, a text file here has at most 1048576",
    }.items():
        with pytest.raises(UsageError, match=f"^{tmp_path}/{name}.toml: {why}$"):
            configs.read(tmp_path / f"{name}.toml")


@pytest.mark.parametrize("tree", [None, [], "x", 3])
def test_what_is_no_tree_is_no_configuration(tree):
    with pytest.raises(UsageError, match=r"^checkpoint: holds no configuration; sections are data, "):
        configs.from_dict(tree, "checkpoint")


def test_assignments_come_in_order_and_need_an_equals_sign():
    assert assignments(("train.lr=1", "train.batch=2", "train.lr=3")) == {"train.lr": 3, "train.batch": 2}
    with pytest.raises(UsageError, match=r"^--set train\.lr: write KEY=VALUE, such as train\.lr=0\.01$"):
        assignments(("train.lr",))


@pytest.mark.parametrize(
    ("changes", "found"),
    [
        ([{}], (4, 0)),
        ([{"train.batch": 2}], (2, 0)),
        ([{"train.global_batch": 32}], (0, 32)),
        ([{"train.global_batch": 32}, {"train.batch": 2}], (2, 0)),
        ([{"train.global_batch": 32}, {"train.batch": 2}, {"train.global_batch": 8}], (0, 8)),
        ([{"train.global_batch": 32, "train.batch": 0}], (0, 32)),
        ([{"train.global_batch": 0}], (4, 0)),
        ([{"train.global_batch": 32}, {"train.lr": 0.5}], (0, 32)),
    ],
)
def test_the_batch_is_per_device_or_of_all_as_was_asked_last(changes, found):
    config = Config()
    for change in changes:
        config = override(config, change)
    assert (config.train.batch, config.train.global_batch) == found


@pytest.mark.parametrize("batch", [0, 4])
def test_a_config_has_one_batch(batch):
    message = rf"^batch = {batch} and train\.global_batch = {8 * batch}: give one of them, the other is 0$"
    with pytest.raises(ValueError, match=message):
        Train(batch=batch, global_batch=8 * batch)
    with pytest.raises(UsageError, match=rf"^--set: train\.{message[1:]}"):
        override(Config(), {"train.batch": batch, "train.global_batch": 8 * batch})


def test_of_an_old_runs_two_batches_the_global_one_counts(tmp_path):
    (tmp_path / "config.toml").write_text("[train]\nbatch = 4\nglobal_batch = 32\n")
    old = Config().as_dict()
    old["train"] |= {"batch": 4, "global_batch": 32}
    for config in (configs.read(tmp_path / "config.toml"), configs.from_dict(old, "checkpoint")):
        assert config == override(Config(), {"train.global_batch": 32})
    with pytest.raises(UsageError, match=r"^checkpoint: train\.batch = -4: 0 or more$"):
        configs.from_dict({"train": {"batch": -4, "global_batch": 32}}, "checkpoint")


def test_checkpoints_are_kept_at_validations():
    override(Config(), {"train.keep_every": 4, "train.validate_every": 2})
    with pytest.raises(UsageError, match=r"^--set: train\.keep_every = 3: a multiple of validate_every"):
        override(Config(), {"train.keep_every": 3, "train.validate_every": 2})


def test_differences_are_named_by_key():
    new = override(Config(), {"train.lr": 0.5, "data.size": "32x48", "train.batch": Config().train.batch})
    assert configs.differences(Config(), new) == {"data.size": ("360x480", "32x48"), "train.lr": (0.001, 0.5)}
    assert configs.differences(Config(), Config()) == {}


def test_a_config_does_not_change_in_place():
    with pytest.raises(dataclasses.FrozenInstanceError):
        Train().lr = 1.0  # type: ignore[misc]


def test_every_option_says_what_it_means():
    for section, cls in configs.SECTIONS.items():
        for field in dataclasses.fields(cls):
            assert field.metadata["help"], f"{section}.{field.name}"


def test_values_may_be_numpys_and_paths():
    changes = {"train.lr": np.float32(0.5), "train.epochs": np.int64(3), "augment.mirror": np.bool_(False)}
    changes |= {"data.path": Path("/data/CamVid"), "data.size": np.array([24, 32]), "augment.crop": (np.int32(8), 16)}
    found = override(Config(), changes)
    assert (found.train.lr, found.train.epochs, found.augment.mirror) == (0.5, 3, False)
    assert (found.data.path, found.data.size, found.augment.crop) == ("/data/CamVid", Size(24, 32), Size(8, 16))
    assert override(Config(), {"data.size": Size(24, 32)}).data.size == Size(24, 32)
    assert from_dict(found.as_dict(), "again") == found
    for wrong in (np.float32(0.5), (1,), ("a", "b"), np.array([1.5, 2]), np.array([1, 2, 3])):
        with pytest.raises(UsageError, match=r"^--set: data\.size"):
            override(Config(), {"data.size": wrong})


def test_a_size_that_nothing_could_train_on_is_refused():
    assert parse_size("16384x16384") == Size(16384, 16384)
    with pytest.raises(
        UsageError, match=r"data\.size: 99999x99999: at most 16384 pixels a side; of larger images take"
    ):
        override(Config(), {"data.size": "99999x99999"}, "train")
