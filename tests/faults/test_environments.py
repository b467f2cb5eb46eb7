"""The environment is others' too: variables of launchers, and users without a home."""

import pwd
from pathlib import Path

import pytest

import fastseg
from fastseg.data import home
from fastseg.data.layouts import find
from fastseg.errors import UsageError
from fastseg.pipelines import open_source
from fastseg.predict import open_rows, pixels_of
from fastseg.workers import Worker, alone, this_worker

TINY = ["--recipe", "fast", "--device", "cpu", "--size", "32x48", "--epochs", "1", "--set", "model.depth=1"]
TORCHRUN = {"RANK": "1", "WORLD_SIZE": "2", "LOCAL_RANK": "1", "LOCAL_WORLD_SIZE": "2"}
SRUN = {"SLURM_STEP_NUM_TASKS": "2", "SLURM_PROCID": "1", "SLURM_LOCALID": "1", "SLURM_NODEID": "0"}
SRUN |= {"SLURM_STEP_TASKS_PER_NODE": "2", "SLURM_STEP_NODELIST": "n1", "SLURM_JOB_ID": "7"}
# What is wrong -> the variables, and which of them the message names.
WRONG = {
    "RANK is no number": (TORCHRUN | {"RANK": "x"}, "RANK"),
    "RANK is empty": (TORCHRUN | {"RANK": ""}, "RANK"),
    "RANK is negative": (TORCHRUN | {"RANK": "-1"}, "RANK"),
    "RANK is not below WORLD_SIZE": (TORCHRUN | {"RANK": "2"}, "WORLD_SIZE"),
    "WORLD_SIZE is no number": (TORCHRUN | {"WORLD_SIZE": "two"}, "WORLD_SIZE"),
    "WORLD_SIZE is 0": (TORCHRUN | {"WORLD_SIZE": "0"}, "WORLD_SIZE"),
    "LOCAL_RANK is no number": (TORCHRUN | {"LOCAL_RANK": "1.5"}, "LOCAL_RANK"),
    "LOCAL_RANK is not below LOCAL_WORLD_SIZE": (TORCHRUN | {"LOCAL_RANK": "2"}, "LOCAL_RANK"),
    "more on this machine than in all": (TORCHRUN | {"LOCAL_WORLD_SIZE": "4"}, "LOCAL_WORLD_SIZE"),
    "SLURM_PROCID is no number": (SRUN | {"SLURM_PROCID": "x"}, "SLURM_PROCID"),
    "SLURM's number of tasks is none": (SRUN | {"SLURM_STEP_NUM_TASKS": "2(x3)"}, "SLURM_STEP_NUM_TASKS"),
    "SLURM's node is none of the step's": (SRUN | {"SLURM_NODEID": "1"}, "SLURM_NODEID"),
    "SLURM's tasks of each node are not told": (SRUN | {"SLURM_STEP_TASKS_PER_NODE": ""}, "SLURM_STEP_TASKS_PER_NODE"),
}
WRONG |= {
    f"{name} is missing": ({k: v for k, v in SRUN.items() if k != name}, name)
    for name in ("SLURM_LOCALID", "SLURM_NODEID")
}


@pytest.fixture
def says(monkeypatch):
    """says({...}) puts variables of a launcher into the environment, which has no others."""
    for name in (*TORCHRUN, *SRUN, "FASTSEG_LAUNCHER", "MASTER_ADDR", "MASTER_PORT", "TORCHELASTIC_RESTART_COUNT"):
        monkeypatch.delenv(name, raising=False)
    return lambda variables: [monkeypatch.setenv(*each) for each in variables.items()]


@pytest.mark.parametrize("fault", WRONG)
def test_variables_that_no_launcher_sets_so_are_told_to_who_trains(call, says, street, row, fault):
    variables, name = WRONG[fault]
    says(variables)
    for command in (["train", "--data", street, *TINY, "--run", "r"], ["profile", "--data", street, *TINY]):
        code, out, err = call(*command)
        assert (code, out) == (2, "")
        assert err.startswith("fastseg: ")
        assert err.count("\n") == 1
        assert f"{name}=" in err or f"{name} is not set" in err
        assert not Path("r").exists()
    if fault in ("RANK is no number", "RANK is not below WORLD_SIZE", "SLURM_LOCALID is missing"):
        row(
            f"`train` where {fault.replace('RANK', '`RANK`', 1)}",
            err.removeprefix("fastseg: "),
            "unset it, or start all",
        )


@pytest.mark.parametrize("variables", [*(variables for variables, _ in WRONG.values()), TORCHRUN, SRUN, {"RANK": "0"}])
def test_commands_that_join_nobody_take_no_notice_of_launchers(call, says, street, variables):
    says(variables)
    assert call("data", "stats", street)[0] == 0
    code, _, err = call("data", "stats", "nowhere")
    assert code in (1, 2)
    assert err.startswith("fastseg: nowhere")  # no rank
    assert call("report", "nowhere")[0] == 2


def test_one_variable_of_two_is_nobody_s(says):
    says({"RANK": "x"})
    assert this_worker() is None
    says({"WORLD_SIZE": "2", "RANK": "1"})
    assert this_worker() == Worker(1, 2, 0, 2)
    with alone():
        assert this_worker() is None
    assert this_worker() == Worker(1, 2, 0, 2)


@pytest.fixture
def homeless(monkeypatch):
    """As a user of a container, by number, who has neither HOME nor an entry in /etc/passwd."""

    def nobody(uid: int) -> None:
        raise KeyError(f"getpwuid(): uid not found: {uid}")

    for name in ("HOME", "FASTSEG_DATA", "XDG_CACHE_HOME", "USER", "LOGNAME", "USERNAME", "LNAME"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setattr(pwd, "getpwuid", nobody)


def test_who_has_no_home_trains_on_data_of_their_own(call, street, row, homeless):
    code, _, err = call("train", "--data", street, *TINY, "--run", "r")
    assert code == 0, err
    assert not Path("~").exists()
    code, out, _ = call("doctor")
    assert "fastseg can train here" in out
    assert "there is no home folder to keep data in" in out
    for command in (["train", "--data", "synth", *TINY], ["data", "check", "camvid"], ["data", "download"]):
        code, out, err = call(*command)
        assert (code, out) == (2, "")
        assert err.count("\n") == 1
    row(
        "no HOME, and a user without an entry in /etc/passwd (a container's), with `--data synth`",
        err.removeprefix("fastseg: "),
        "FASTSEG_DATA, or data of your own",
    )


# ~ in Python, where no shell has put the home folder in its place


@pytest.fixture
def at_home(monkeypatch, street, tmp_path):
    """The home folder, with the street scenes as `~/street`."""
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.chdir("/")
    (tmp_path / "street").symlink_to(street)
    return tmp_path


def test_the_home_folder_in_paths_of_python(at_home, street):
    image = sorted((street / "val").iterdir())[0]
    changes = {"data.path": "~/street", "data.size": "32x48", "model.depth": 1, "train.epochs": 1}
    changes |= {"runtime.device": "cpu", "runtime.cache_dir": "~/kept", "runtime.loader": "cache"}
    config = fastseg.override(fastseg.load_recipe("fast"), changes)
    done = fastseg.train(config, "~/run")
    assert done["run"] == str(at_home / "run")
    assert list((at_home / "kept").iterdir())
    assert fastseg.evaluate("~/run/checkpoints/best.pt")["miou"] == done["best_miou"]
    predictor = fastseg.load("~/run/checkpoints/best.pt", device="cpu")
    there, named = predictor(image), f"~/street/val/{image.name}"
    assert (predictor(named) == there).all()
    assert (predictor(Path(named)) == there).all()
    assert (pixels_of(named) == open_rows(named).read(0, 96)).all()
    assert next(open_source("~/street", "val", size=(32, 48), device="cpu")).images.shape == (4, 3, 32, 48)


def test_the_home_folder_in_a_variable(at_home, monkeypatch):
    monkeypatch.setenv("FASTSEG_DATA", "~/data")
    assert home() == at_home / "data"
    monkeypatch.delenv("FASTSEG_DATA")
    monkeypatch.setenv("XDG_CACHE_HOME", "~/cache")
    assert home() == at_home / "cache" / "fastseg"


def test_a_folder_that_is_nobody_s_home_is_told_by_its_name(at_home):
    with pytest.raises(UsageError, match="~nobody-here/street"):
        find(fastseg.data.resolve("~nobody-here/street"))
