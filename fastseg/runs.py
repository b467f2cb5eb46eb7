"""Run folders: how they are named, begun, resumed and read. Nothing here needs torch.

RUN/config.toml environment.json split.json log.jsonl events.out.tfevents.* checkpoints/ overlays/ report.html
"""

import contextlib
import datetime
import errno
import functools
import hashlib
import json
import os
import re
import socket
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import IO, Any

import click

from fastseg import config as configs
from fastseg.config import Config
from fastseg.errors import UsageError
from fastseg.texts import shown
from fastseg.workers import is_main

ROOT = Path("runs")
PARTIAL = ".*.partial"  # files that `whole` has not put in place yet
WRITER = ".writer"  # names the process that writes into a folder, which holds a lock on it meanwhile
NO_LOCKS = {errno.ENOLCK, errno.EOPNOTSUPP, errno.ENOSYS, errno.EINVAL}  # where a file system has none

# What a resumed run may do otherwise than it began; anything else would make it another run. The number of processes
# may change too: config.toml holds the global batch, which stays. Data may have moved: `train` looks whether it is the
# same.
CHANGEABLE = {"train.epochs", "train.patience", "train.validate_every", "train.keep_every", "train.accumulate"}
CHANGEABLE |= {"train.checkpoint_steps", "train.checkpoint_minutes", "data.path"}
CHANGEABLE |= {
    f"runtime.{name}"
    for name in (
        "device",
        "kernels",
        "capture",
        "loader",
        "cache_dir",
        "threads",
        "log_every",
        "bucket_mib",
        "collective_timeout",
    )
}


def new_folder(config: Config, recipe: str, kind: str = "") -> Path:
    """runs/DATA-RECIPE-YYYYmmdd-HHMMSS, made here, so that runs that begin in the same second have each their own.

    Args:
        kind: what else the name ends in.
    """
    now = f"{datetime.datetime.now():%Y%m%d-%H%M%S}"
    base = "-".join([Path(config.data.path).resolve().stem, Path(recipe).stem, now, *([kind] if kind else [])])
    ROOT.mkdir(exist_ok=True)
    run, number = ROOT / base, 1
    while True:
        try:
            run.mkdir()
            return run
        except FileExistsError:
            number += 1
            run = ROOT / f"{base}-{number}"


def forget_unused(run: Path) -> None:
    """Remove the folder of a run that never began."""
    with contextlib.suppress(OSError):  # it did begin: it is not empty
        run.rmdir()


def resumable() -> list[Path]:
    """Runs that have a configuration and no end, newest first."""
    runs = [path.parent for path in ROOT.glob("*/config.toml")]
    unfinished = [run for run in runs if not any(event["event"] == "end" for event in read_log(run))]
    return sorted(unfinished, key=lambda run: (run / "config.toml").stat().st_mtime, reverse=True)


def last_checkpoint(run: Path) -> Path:
    return run / "checkpoints" / "last.pt"


def checkpoint_of(path: Path) -> Path:
    """The checkpoint that a path names: of a run's folder its best, which is said; any other path is one itself.

    Raises:
        UsageError: a folder that holds no run, or a run that has no best checkpoint yet.
    """
    if not path.is_dir():
        return path
    if not (path / "config.toml").is_file():
        raise UsageError(f"{shown(path)}: a folder that holds no run (no config.toml); give a run's, or a checkpoint")
    best = path / "checkpoints" / "best.pt"
    if not best.is_file():
        raise UsageError(
            f"{shown(path)}: this run has no best.pt, which its first validation writes; give a checkpoint"
        )
    if is_main():
        click.echo(f"{shown(path)}: a run, of which checkpoints/best.pt is taken", err=True)
    return best


def last_start(run: Path) -> dict[str, Any]:
    """What the log says of the run's last start; nothing where there was none."""
    return next((event for event in reversed(read_log(run)) if event["event"] == "start"), {})


def refuse_existing(run: Path, option: str = "--run") -> None:
    """Raise UsageError where a new run would write into something that is there already.

    What a process that was killed had not finished is nothing: a new run writes it again.
    """
    left_over = (WRITER, PARTIAL)
    if run.exists() and (not run.is_dir() or any(not any(map(path.match, left_over)) for path in run.iterdir())):
        if run.is_dir() and (run / WRITER).is_file():
            with sole_writer(run, option):  # which says who it is
                pass
        cure = "continue it with --resume, or give another folder" if option == "--run" else "give another folder"
        raise UsageError(f"{option} {run} exists: {cure}")


def reopen(run: Path, change: Callable[[Config], Config]) -> tuple[Config, dict[str, tuple[Any, Any]]]:
    """The configuration of a run that goes on, and what it does otherwise now: {key: (old, new)}.

    Raises:
        UsageError: no such run, or `change` touches what may not change.
    """
    if not (run / "config.toml").is_file():
        raise UsageError(f"--resume: {run} holds no run (no config.toml); leave --resume out to begin it")
    old = configs.read(run / "config.toml")
    new = change(old)
    per_device = bool(new.train.batch and old.train.global_batch)  # is asked for, where the run has one of all devices
    before = _per_device(old, run) if per_device else old
    changed = configs.differences(before, new)
    wrong = [f"{key} ({a} to {b})" for key, (a, b) in changed.items() if key not in CHANGEABLE]
    if wrong:
        raise UsageError(
            f"--resume: {', '.join(wrong)} cannot change in a run that has begun; begin another run, "
            f"or change only {', '.join(sorted(CHANGEABLE))}"
        )
    if per_device:
        new = configs.override(new, {"train.global_batch": old.train.global_batch})
    return new, changed


def _per_device(config: Config, run: Path) -> Config:
    """A run's configuration with the batch that each device began with, so that the same --batch is no change.

    Where the log says nothing of the run's processes yet, it stays as it is.
    """
    started = next((event for event in read_log(run) if event["event"] == "start"), None)
    if started is None:
        return config
    batch = config.train.global_batch // (started["world"] * config.train.accumulate)
    return configs.override(config, {"train.batch": batch}) if batch else config


@contextlib.contextmanager
def sole_writer(folder: Path, option: str) -> Iterator[None]:
    """Be the one process that writes into a folder, which is made where it is not there.

    The system keeps the lock for as long as this process lives: one that was killed keeps nobody out. It holds between
    machines too, where the folder is on NFS, or on Lustre or GPFS mounted with locks for all of them (`flock`); where a
    file system has none, that is said, and nobody is kept out.

    Raises:
        UsageError: another process writes there; it names `option`, the process and its machine.
    """
    path = folder / WRITER
    with contextlib.ExitStack() as held:
        if not folder.exists():
            held.callback(forget_unused, folder)
        try:
            file = held.enter_context(_locked(path))
        except BlockingIOError:
            who = ""
            with contextlib.suppress(FileNotFoundError):  # it has just ended
                who = path.read_text(encoding="utf-8", errors="replace")
            raise UsageError(
                f"{option} {folder} is being written by {who or 'another process'}: wait for its end, or give another "
                "folder"
            ) from None
        except OSError as error:
            if error.errno not in NO_LOCKS:
                raise
            click.echo(f"{folder}: its file system keeps no locks; see to it that nothing else writes there", err=True)
        else:
            held.callback(path.unlink, missing_ok=True)
            try:
                os.write(file.fileno(), f"process {os.getpid()} on {socket.gethostname()}".encode())
            except OSError as error:  # the system names no file where a disk is full
                error.filename = str(path)
                raise
        yield


def _locked(path: Path) -> IO[str]:
    """The file, new or there already, with this process's lock on it; it is empty.

    Raises:
        BlockingIOError: another process has it. OSError: there can be none, see `NO_LOCKS`.
    """
    try:
        import fcntl
    except ImportError:  # Windows
        raise OSError(errno.ENOSYS, "no locks", str(path)) from None
    while True:
        path.parent.mkdir(parents=True, exist_ok=True)
        try:
            file = path.open("a+", encoding="utf-8")
        except FileNotFoundError:  # another has just removed its folder
            continue
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            # Who had it may have removed it since it was opened: then this lock keeps nobody out.
            with contextlib.suppress(FileNotFoundError):
                if os.path.samestat(os.fstat(file.fileno()), path.stat()):
                    file.truncate(0)
                    return file
        except BaseException:
            file.close()
            raise
        file.close()


@contextlib.contextmanager
def whole(path: Path) -> Iterator[Path]:
    """A file beside `path` to write to, which takes its place when all went well and goes away when not.

    Each process has its own: of two that write `path` at once the one that ends last has written it. An OSError from
    writing it names `path`; the system's own names none (a full disk), or the file beside it.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    _sweep(path.parent)
    partial = _partial(path)
    try:
        yield partial
        partial.replace(path)
    except BaseException as error:
        with contextlib.suppress(OSError):  # the first error counts; `_sweep` removes what stays
            partial.unlink(missing_ok=True)
        if isinstance(error, OSError) and error.filename in (None, str(partial), partial):
            error.filename, error.filename2 = str(path), None
        raise


def _partial(path: Path) -> Path:
    """.NAME.PROCESS-MACHINE.partial, of a name that is cut where a file system takes no longer ones."""
    name = path.name
    if len(os.fsencode(name)) > 200:
        name = hashlib.sha256(os.fsencode(name)).hexdigest()
    return path.with_name(f".{name}.{os.getpid()}-{_machine()}.partial")


def _machine() -> str:
    return hashlib.sha256(socket.gethostname().encode()).hexdigest()[:8]


def _lives(partial: Path, elsewhere: bool) -> bool:
    """Whether the process that writes a partial file lives; `elsewhere` where that is on another machine."""
    owner = re.search(r"\.(\d+)-([0-9a-f]{8})\.partial$", partial.name)
    if owner is None or owner[2] != _machine() or not Path("/proc").is_dir():
        return elsewhere
    return Path("/proc", owner[1]).exists()


@functools.cache
def _sweep(folder: Path) -> None:
    """Remove, once, what killed processes of this machine have left unfinished in a folder."""
    for partial in folder.glob(PARTIAL):
        if not _lives(partial, elsewhere=True):
            partial.unlink(missing_ok=True)


def write_text(path: Path, text: str) -> None:
    """Write a file whole or not at all."""
    with whole(path) as partial:
        partial.write_text(text, encoding="utf-8")


def write_json(path: Path, document: Any) -> None:
    """Write strictly valid JSON, whole or not at all."""
    write_text(path, json.dumps(document, indent=1, allow_nan=False) + "\n")


def read_log(run: Path) -> list[dict]:
    """The events of log.jsonl in order; no file is no event.

    A half line, which a killed run leaves behind, is left out.
    """
    path = run / "log.jsonl"
    events = []
    for line in path.read_text(encoding="utf-8", errors="replace").splitlines() if path.is_file() else ():
        try:
            events.append(json.loads(line))
        except ValueError:
            continue
    return events


def cut_back(run: Path, step: int) -> None:
    """Drop what log.jsonl says of steps after `step`, which are made again now, and files that a kill has cut off."""
    for partial in run.rglob(PARTIAL):
        if not _lives(partial, elsewhere=False):  # else it is `fastseg report`'s
            partial.unlink(missing_ok=True)
    kept = [event for event in read_log(run) if event["step"] <= step and event["event"] != "end"]
    write_text(run / "log.jsonl", "".join(json.dumps(event) + "\n" for event in kept))
