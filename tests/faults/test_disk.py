"""Disks that are full or fail: one line, what was there before is kept, nothing stays half-written, the next try works.

A fault is the n-th operation on files inside a folder, which fails as the system would have it, for n = 1, 2, ... until
the work runs through untouched; or a limit of bytes by the system itself: on the size of files, or of a disk.
"""

import contextlib
import errno
import itertools
import json
import os
import re
import resource
import shutil
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import pytest
import torch

from fastseg import runs
from fastseg.checkpoint import Writer, read, save
from fastseg.config import Config
from fastseg.errors import FastsegError
from fastseg.pipelines import cache
from fastseg.runlog import RunLog

# A thread that dies of an error prints a traceback, which nobody can do anything about.
pytestmark = [
    pytest.mark.slow,
    pytest.mark.filterwarnings("error::pytest.PytestUnhandledThreadExceptionWarning"),
]

# All faults take ten minutes: FASTSEG_MOMENTS=2 pytest tests/faults/test_disk.py
FULL = int(os.environ.get("FASTSEG_MOMENTS", "1")) > 1

ERRORS = (errno.ENOSPC, errno.EIO, errno.EACCES)
OPERATIONS = {"open", "os.chmod", "os.listdir", "os.mkdir", "os.remove", "os.rename", "os.rmdir", "os.scandir"}
OPERATIONS |= {"os.truncate", "os.utime", "os.link", "os.symlink"}


class Fault:
    """A context in which the n-th operation on files inside `folder` fails, once; `hit` names it if it came to that."""

    active: "Fault | None" = None
    hooked = False

    def __init__(self, folder: Path, n: int, number: int) -> None:
        self.folder, self.left, self.number = str(folder), n, number
        self.hit, self.lock = "", threading.Lock()

    def __enter__(self) -> "Fault":
        if not Fault.hooked:  # a hook stays as long as the process
            sys.addaudithook(Fault.audit)
            Fault.hooked = True
        Fault.active = self
        return self

    def __exit__(self, *_: object) -> None:
        Fault.active = None

    @staticmethod
    def audit(event: str, arguments: tuple) -> None:
        fault = Fault.active
        if fault is None or event not in OPERATIONS or not isinstance(arguments[0], str | bytes | os.PathLike):
            return
        path = os.path.abspath(os.fsdecode(arguments[0]))
        if path != fault.folder and not path.startswith(f"{fault.folder}/"):
            return
        with fault.lock:
            fault.left -= 1
            if fault.left:
                return
            fault.hit = f"{event} {os.path.relpath(path, fault.folder)}"
        raise OSError(fault.number, os.strerror(fault.number), path)


def test_the_nth_operation_inside_the_folder_fails_and_no_other(tmp_path):
    inside, outside = tmp_path / "inside", tmp_path / "inside-not"
    inside.mkdir()
    with Fault(inside, 3, errno.EIO) as fault:
        (inside / "a").write_text("a")
        outside.write_text("b")
        (inside / "a").rename(inside / "b")
        with pytest.raises(OSError, match="Input/output error") as error:
            (inside / "c").mkdir()
        assert (error.value.errno, error.value.filename) == (errno.EIO, f"{inside}/c")
        (inside / "c").mkdir()
    assert fault.hit == "os.mkdir c"
    with Fault(inside, 1, errno.ENOSPC) as fault:
        outside.read_text()
    (inside / "d").mkdir()
    assert fault.hit == ""


class Work:
    """What is done in a folder of its own, under faults; `call` runs the command line."""

    def __init__(self, call: Callable) -> None:
        self.call = call

    def before(self, folder: Path) -> None:
        """Make what is there before."""

    def run(self, folder: Path) -> tuple[int, str]:
        """Exit code and standard error."""
        raise NotImplementedError

    def intact(self, folder: Path) -> None:
        """Assert that what was there before a failure is still there."""

    def done(self, folder: Path) -> None:
        """Assert that the result is what it is without a fault."""
        raise NotImplementedError


def state(step: int) -> dict:
    """A checkpoint of 0.8 MB."""
    about = {"config": Config().as_dict(), "classes": ["a"], "colors": [[0, 0, 0]], "ema": None}
    about |= {"trained_on": {"stems": [], "contents": []}}
    return about | {"progress": {"step": step}, "model": {"weight": torch.full((200, 1000), float(step))}}


class Save(Work):
    def before(self, folder):
        save(folder / "last.pt", state(1))

    def run(self, folder):
        return self.line(lambda: save(folder / "last.pt", state(2)))

    @staticmethod
    def line(work: Callable[[], None]) -> tuple[int, str]:
        try:
            work()
        except FastsegError as error:
            return 1, f"fastseg: {error}\n"
        return 0, ""

    def intact(self, folder):
        assert self.holds(folder, 1)

    def done(self, folder):
        assert self.holds(folder, 2)

    @staticmethod
    def holds(folder: Path, step: int) -> bool:
        found = read(folder / "last.pt")
        return found["progress"]["step"] == step and torch.equal(
            found["model"]["weight"], state(step)["model"]["weight"]
        )


class Submit(Save):
    """The same by the thread that writes while training goes on."""

    def run(self, folder):
        def work() -> None:
            writer = Writer()
            writer.submit(folder / "last.pt", state(2))
            writer.join()

        return self.line(work)


class Report(Work):
    def __init__(self, call, finished):
        super().__init__(call)
        self.finished = finished

    def before(self, folder):
        shutil.copytree(self.finished, folder / "run")
        (folder / "run" / "report.html").write_text("the report before")

    def run(self, folder):
        code, _, err = self.call("report", folder / "run")
        return code, err

    def intact(self, folder):
        assert (folder / "run" / "report.html").read_text() == "the report before"

    def done(self, folder):
        assert (folder / "run" / "report.html").read_text().rstrip().endswith("</html>")


class Predict(Work):
    def __init__(self, call, street, finished):
        super().__init__(call)
        self.photos, self.checkpoint = sorted((street / "val").iterdir())[:2], finished / "checkpoints" / "last.pt"
        self.wanted = finished.parent / "predicted"
        if not self.wanted.is_dir():
            assert self.command(self.wanted)[0] == 0

    def command(self, out: Path) -> tuple[int, str]:
        code, _, err = self.call("predict", self.checkpoint, *self.photos, "--out", out, "--overwrite")
        return code, err

    def before(self, folder):
        for name in self.files(self.wanted):
            (folder / "out" / name).parent.mkdir(parents=True, exist_ok=True)
            (folder / "out" / name).write_bytes(b"the picture before")

    def run(self, folder):
        return self.command(folder / "out")

    @staticmethod
    def files(folder: Path) -> dict[str, bytes]:
        seen = (p for p in folder.rglob("*") if p.is_file() and not p.name.startswith("."))
        return {str(p.relative_to(folder)): p.read_bytes() for p in seen}

    def intact(self, folder):
        found, wanted = self.files(folder / "out"), self.files(self.wanted)
        assert found.keys() == wanted.keys()
        assert all(found[name] in (b"the picture before", wanted[name]) for name in wanted)

    def done(self, folder):
        assert self.files(folder / "out") == self.files(self.wanted)


class Synth(Work):
    def run(self, folder):
        counts = ("--train", 2, "--val", 1, "--size", "32x48")
        code, _, err = self.call("data", "synth", folder / "street", *counts)
        return code, err

    def intact(self, folder):
        assert list(folder.iterdir()) == []

    def done(self, folder):
        files = [p for p in (folder / "street").rglob("*") if p.is_file()]
        assert sorted(p.suffix for p in files) == [".png"] * 6 + [".txt"] * 2
        assert all(p.stat().st_size for p in files)


class Prepare(Work):
    """A cache of decoded data, whose files' names are the same in any --cache-dir."""

    def __init__(self, call, street, finished):
        super().__init__(call)
        self.street, self.wanted = street, finished.parent / "prepared"
        if not self.wanted.is_dir():
            assert self.command(self.wanted)[0] == 0

    def command(self, folder: Path) -> tuple[int, str]:
        cache._open.clear()  # as in a process of its own
        code, _, err = self.call("data", "prepare", self.street, "--cache-dir", folder, "--size", "32x48")
        return code, err

    def run(self, folder):
        return self.command(folder / "cache")

    def stores(self, folder: Path) -> Iterator[tuple[list, list, dict]]:
        """Images, labels and check sums of each store, as they are and as they should be; and its own description."""
        for store in sorted(folder.iterdir()) if folder.is_dir() else ():
            arrays = [
                [np.load(f / store.name / f"{name}.npy") for name in ("images", "labels", "checks")]
                for f in (folder, self.wanted)
            ]
            yield *arrays, json.loads((store / "about.json").read_text())

    def intact(self, folder):
        for (images, labels, checks), wanted, about in self.stores(folder / "cache"):
            there = checks != 0
            assert there.all() or not about["complete"]
            for found, right in zip((images, labels, checks), wanted, strict=True):
                assert np.array_equal(found[there], right[there])

    def done(self, folder):
        found = list(self.stores(folder / "cache"))
        assert [about["complete"] for *_, about in found] == [True, True]
        assert sorted(len(images) for (images, *_), _, _ in found) == [4, 8]
        for arrays, wanted, _ in found:
            assert all(np.array_equal(a, b) for a, b in zip(arrays, wanted, strict=True))


TINY = {"data.size": "32x48", "model.depth": 1, "train.batch": 4, "train.epochs": 2, "train.validate_every": 2}
TINY |= {"train.grow_from": 1.0, "train.checkpoint_steps": 2, "runtime.log_every": 2, "runtime.threads": 1}
TINY |= {"runtime.device": "cpu"}


class Train(Work):
    """Four steps with the cache of decoded data beside the run; goes on with --resume where there is something."""

    def __init__(self, call, street, finished):
        super().__init__(call)
        self.street, self.finished = street, finished

    def run(self, folder):
        cache._open.clear()  # as in a process of its own
        if (folder / "run" / "config.toml").is_file():
            return self.call("train", "--resume", "--run", folder / "run")[::2]
        return self.call(*train_words(self.street, folder / "run"), "--cache-dir", folder / "cache")[::2]

    def intact(self, folder):
        for path in (folder / "run" / "checkpoints").glob("*"):
            read(path)

    def done(self, folder):
        assert same_run(folder / "run", self.finished)
        assert "</html>" in (folder / "run" / "report.html").read_text()


def train_words(street: Path, run: Path) -> list[object]:
    sets = [part for key, value in TINY.items() for part in ("--set", f"{key}={value}")]
    return ["train", "--data", street, "--recipe", "fast", *sets, "--run", run]


def same_run(a: Path, b: Path) -> bool:
    """True where two runs' last checkpoints and losses have the same bits."""
    old, new = (read(run / "checkpoints" / "last.pt") for run in (a, b))
    losses = [[(e["step"], e["loss"]) for e in runs.read_log(run) if e["event"] == "train"] for run in (a, b)]
    weights = all(torch.equal(old["model"][key], new["model"][key]) for key in old["model"] | new["model"])
    return weights and old["progress"]["step"] == new["progress"]["step"] and losses[0] == losses[1]


@pytest.fixture(scope="module")
def finished(street, tmp_path_factory) -> Path:
    """The training run without a fault."""
    from click.testing import CliRunner

    from fastseg.cli import main

    run = tmp_path_factory.mktemp("disk") / "run"
    assert CliRunner().invoke(main, [str(word) for word in train_words(street, run)]).exit_code == 0
    return run


@pytest.fixture
def work(request, call, street, finished) -> Work:
    kind = request.param
    needs = {Report: (finished,), Predict: (street, finished), Prepare: (street, finished), Train: (street, finished)}
    return kind(call, *needs.get(kind, ()))


def check(work: Work, folder: Path, code: int, err: str) -> None:
    """After a fault: done, or one line that says why not and all as before; in neither case anything half-written."""
    lines = [line for line in err.splitlines() if line.startswith("fastseg: ")]
    assert "Traceback" not in err
    if code == 0:
        assert lines == []
        work.done(folder)
    else:
        assert code in (1, 2), err  # 2: it is the configuration that cannot be read
        assert len(lines) == 1, err
        assert err.splitlines()[-1] == lines[0]
        assert str(folder) in lines[0]
        assert re.search("No space left|Input/output error|Permission denied|File too large|no room", lines[0])
        work.intact(folder)
    assert [path for path in folder.rglob("*") if ".partial" in path.name] == []


# By work: of how many operations one fails, where it is not all of them.
STRIDES = {Save: 1, Submit: 1, Report: 3, Predict: 2, Synth: 1, Prepare: 3, Train: 23}


@pytest.mark.parametrize("work", STRIDES, indirect=True)
@pytest.mark.parametrize("shift", range(len(ERRORS) if FULL else 1))
def test_any_operation_may_fail(work, tmp_path, shift):
    stride, points = 1 if FULL else STRIDES[type(work)], 0
    for n in itertools.count(1, stride):
        number = ERRORS[(n + shift) % len(ERRORS)]
        folder = tmp_path / f"fault-{n}"
        folder.mkdir()
        work.before(folder)
        with Fault(folder, n, number) as fault:
            code, err = work.run(folder)
        print(f"{type(work).__name__} {n}: {errno.errorcode[number]} {fault.hit or '-'}: {err.splitlines()[-1:]}")
        check(work, folder, code, err)
        if not fault.hit:
            assert code == 0
            break
        points += 1
        again(work, folder, code)
        shutil.rmtree(folder)
    assert points
    print(f"{type(work).__name__}: {points} of {n - 1} operations failed")


def again(work: Work, folder: Path, code: int) -> None:
    """The next try succeeds, where one is needed."""
    if code:
        code, err = work.run(folder)
        assert code == 0, err
        work.done(folder)


@contextlib.contextmanager
def file_limit(folder: Path, nbytes: int) -> Iterator[None]:
    """No file may grow beyond so many bytes (Python ignores the signal and gets the error instead)."""
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (nbytes, limits[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)


@pytest.fixture
def disk(tmp_path) -> Path:
    """The folder of a disk of its own, of 16 MiB."""
    folder = tmp_path / "disk"
    folder.mkdir()
    done = subprocess.run(["mount", "-t", "tmpfs", "-o", "size=16m", "tmpfs", folder], capture_output=True, text=True)
    if done.returncode:
        pytest.skip(f"no disk of its own for this test: {done.stderr.strip()}")
    yield folder
    subprocess.run(["umount", "--lazy", folder], check=True)


@contextlib.contextmanager
def room(folder: Path, nbytes: int) -> Iterator[None]:
    """A disk with so many bytes free, since a file takes up the rest."""
    ballast = folder.parent / "ballast"
    with ballast.open("wb") as file:
        os.posix_fallocate(file.fileno(), 0, shutil.disk_usage(folder).free - nbytes)
    try:
        yield
    finally:
        ballast.unlink()


# By work: bytes, from far too few to almost enough.
SIZES = [
    (Save, (0, 4096, 400_000, 790_000)),
    (Submit, (400_000,)),
    (Report, (0, 100_000) if FULL else (100_000,)),
    (Predict, (0, 4096)),
    (Synth, (0, 4096, 20_000)),
    (Prepare, (0, 20_000, 60_000)),
    (Train, (0, 8192, 30_000, 100_000, 300_000, 600_000, 900_000, 1_500_000) if FULL else (30_000, 600_000)),
]


@pytest.mark.parametrize(("work", "sizes"), SIZES, indirect=["work"])
def test_files_that_may_not_grow(work, sizes, tmp_path):
    small(work, sizes, tmp_path, file_limit)


@pytest.mark.parametrize(("work", "sizes"), SIZES, indirect=["work"])
def test_a_disk_that_is_full(work, sizes, disk):
    small(work, sizes, disk, room)


def small(work: Work, sizes: tuple[int, ...], root: Path, limit: Callable) -> None:
    """Do the work in folders with too few bytes, and then with enough."""
    for nbytes in sizes:
        folder = root / str(nbytes)
        folder.mkdir()
        work.before(folder)
        with limit(folder, nbytes):
            code, err = work.run(folder)
        print(f"{type(work).__name__} {nbytes}: {err.splitlines()[-1:]}")
        check(work, folder, code, err)
        again(work, folder, code)
        shutil.rmtree(folder)


def test_a_full_disk_says_how_much_a_checkpoint_needs(disk, row):
    run = disk / "run" / "checkpoints"
    run.mkdir(parents=True)
    save(run / "last.pt", {**state(1), "ema": {"weight": torch.zeros(3_000_000)}})  # 0.8 MB + 12 MB
    with room(disk / "run", 1_500_000), pytest.raises(FastsegError) as error:
        save(run / "last.pt", {**state(2), "ema": {"weight": torch.zeros(3_000_000)}})
    said = str(error.value)
    needs = "No space left on device; it needs 13 MB, 1.5 MB are free"
    kept = "the checkpoint before it is kept: mend that, then go on with fastseg train --resume"
    assert said == f"{run}/last.pt could not be written ({needs}); {kept}"
    assert Save.holds(run, 1)
    assert [path.name for path in run.iterdir()] == ["last.pt"]
    row(
        "the disk is full while a checkpoint is saved",
        re.sub(r"\d+(\.\d+)?", "N", said.replace(f"{disk.parent}/", "")),
        "make room, then `fastseg train --resume --run RUN`",
    )


ENDLESS = """
import sys, torch
from pathlib import Path
from fastseg.checkpoint import save
from fastseg.config import Config
about = {"config": Config().as_dict(), "classes": ["a"], "colors": [[0, 0, 0]], "ema": None}
about |= {"trained_on": {"stems": [], "contents": []}}
for step in range(1, 10**9):
    weights = {"weight": torch.full((200, 1000), float(step))}
    save(Path(sys.argv[1]), about | {"progress": {"step": step}, "model": weights})
"""


def test_kill_9_while_saving_keeps_a_whole_checkpoint(tmp_path, row):
    run = tmp_path / "run"
    path = run / "checkpoints" / "last.pt"
    for _ in range(100):
        process = subprocess.Popen([sys.executable, "-c", ENDLESS, path])
        while not path.is_file() or not list(path.parent.glob(runs.PARTIAL)):
            assert process.poll() is None
        process.kill()
        process.wait()
        if list(path.parent.glob(runs.PARTIAL)):
            break  # else the save had ended before the kill
    else:
        raise AssertionError("no kill came while a checkpoint was being saved")
    step = read(path)["progress"]["step"]
    assert Save.holds(path.parent, step)
    path.with_name(".best.pt.partial").write_bytes(b"half of another one")
    runs.cut_back(run, step)  # as --resume does
    assert [p.name for p in path.parent.iterdir()] == ["last.pt"]
    save(path, state(step + 1))
    assert Save.holds(path.parent, step + 1)
    row(
        "kill -9 while a checkpoint is saved",
        "the checkpoint before it is whole; `--resume` goes on from it, and removes what the kill left unfinished",
    )


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="no /dev/full")
def test_output_that_nobody_can_take_is_one_line(street):
    with open("/dev/full", "w") as full:
        command = [sys.executable, "-m", "fastseg", "data", "stats", street, "--json"]
        done = subprocess.run(command, stdout=full, stderr=subprocess.PIPE, text=True)
    said = "fastseg: No space left on device; the disk is full: make room, or write elsewhere\n"
    assert (done.returncode, done.stderr) == (1, said)


def test_a_log_on_a_full_disk_is_one_line_and_no_thread_dies(disk):
    # Neither the log nor TensorBoard's file have a buffer that closing them would have to write.
    run = disk / "run"
    run.mkdir()
    log = RunLog(run, 0, active=True)
    log.event("val", 1, miou=0.5)
    before = runs.read_log(run)
    said = rf"^{run}/\S+ could not be written \(No space left on device\); .* fastseg train --resume --run {run}$"
    with room(run, 0):
        with pytest.raises(FastsegError, match=said):
            log_until_full(log)
        log.close()
    found = runs.read_log(run)
    assert found[:1] == before
    assert [event["step"] for event in found] == list(range(1, len(found) + 1))


def log_until_full(log: RunLog) -> None:
    for step in range(2, 10_000):
        log.event("val", step, miou=0.5, text="x" * 100)
