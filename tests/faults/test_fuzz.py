"""A little of the fuzzer in each test run: the same executions every time. `fuzz.py TARGET` goes on for longer."""

import importlib.util
import os
from pathlib import Path

import pytest

from fastseg.errors import FastsegError

SPEC = importlib.util.spec_from_file_location("fuzz", Path(__file__).with_name("fuzz.py"))
fuzz = importlib.util.module_from_spec(SPEC)
SPEC.loader.exec_module(fuzz)

EXECUTIONS = {
    "layouts": 300,
    "toml": 400,
    "lists": 300,
    "labels": 500,
    "archive": 300,
    "checkpoint": 150,
    "config": 500,
}


@pytest.mark.parametrize("target", fuzz.TARGETS)
def test_nothing_but_one_line_comes_of_bad_input(target):
    outcome = fuzz.run(target, seed=8, executions=EXECUTIONS[target])
    assert outcome.executions == EXECUTIONS[target]
    assert outcome.accepted > 0  # else it would all end at the first check
    assert outcome.refused > 0


def two_lines(rng, folder):
    raise FastsegError("two\nlines")


def outside(rng, folder):
    (folder.parent / "sentinel" / "new").touch()


def link(rng, folder):
    os.symlink(folder.parent / "sentinel", folder / "a")
    (folder / "a" / "keep.png").write_bytes(b"")


def relative(rng, folder):
    Path("new").touch()


def fault(rng, folder):
    raise KeyError(f"x{rng.random()}")


@pytest.mark.parametrize("target", [two_lines, outside, link, relative, fault])
def test_the_fuzzer_sees_what_may_not_be_and_keeps_it(monkeypatch, tmp_path, target):
    monkeypatch.setitem(fuzz.TARGETS, "it", target)
    monkeypatch.setattr(fuzz.tempfile, "tempdir", str(tmp_path))
    with pytest.raises(fuzz.CrashError, match=r"^it, seed 3, iteration 0: .* fuzz.py it --seed 3 --iteration 0$"):
        fuzz.run("it", seed=3, executions=1)
    assert [path for path in tmp_path.glob("fuzz-it-3-0-*/own") if path.is_dir()]


def test_the_fuzzer_sees_memory_that_grows(monkeypatch):
    monkeypatch.setitem(fuzz.TARGETS, "it", lambda rng, folder: None)
    peaks = iter([100 << 20, 612 << 20, 100 << 20, (612 << 20) + 1])
    monkeypatch.setattr(fuzz, "_peak", lambda: next(peaks))
    assert fuzz.run("it", seed=3, executions=1).growth == 512 << 20
    with pytest.raises(fuzz.ViolationError, match=r"^it, seed 3: grew by 512 MiB in 1 executions$"):
        fuzz.run("it", seed=3, executions=1)


def test_the_same_seed_and_iteration_make_the_same_mutation():
    first, second = (fuzz.mutate(fuzz.random.Random("1 2"), bytes(1000)) for _ in range(2))
    assert first == second != bytes(1000)
