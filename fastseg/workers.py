"""Where a launcher put this process among others, read from the environment; no torch, so that any command may ask.

torchrun and fastseg's own launcher set RANK and so on. In a SLURM step (`srun`, one task per GPU) SLURM's variables say
the same; a job's batch script, which has no SLURM_STEP_NUM_TASKS, is on its own.
"""

import contextlib
import ctypes
import functools
import os
import re
import signal
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

from fastseg.errors import UsageError
from fastseg.texts import brief

# Names the folder in which the workers of fastseg's launcher leave word for it and for those that come after them.
LAUNCHER = "FASTSEG_LAUNCHER"
PID = "pid"  # a file there: the launcher's


class Worker(NamedTuple):
    """A process's number among all and among those of its machine."""

    rank: int
    size: int
    local_rank: int
    local_size: int
    by_slurm: bool = False


_alone = False


@contextlib.contextmanager
def alone() -> Iterator[None]:
    """In here no launcher put this process anywhere: for work of one process, whatever others' variables say."""
    global _alone
    before, _alone = _alone, True
    try:
        yield
    finally:
        _alone = before


def this_worker() -> Worker | None:
    """Where the launcher put this process, or None where there is no launcher.

    Raises:
        UsageError: variables that no launcher sets so.
    """
    env = os.environ
    if _alone:
        return None
    if "RANK" in env and "WORLD_SIZE" in env:
        rank, size = _number("RANK"), _number("WORLD_SIZE")
        mine = Worker(rank, size, _number("LOCAL_RANK", 0), _number("LOCAL_WORLD_SIZE", size))
        return _possible(mine, "RANK, WORLD_SIZE, LOCAL_RANK, LOCAL_WORLD_SIZE")
    if "SLURM_PROCID" not in env or (size := _number("SLURM_STEP_NUM_TASKS", 1)) == 1:
        return None
    # "2(x3),1": tasks on each node, in the order of the nodes.
    tasks = [
        int(count)
        for count, times in re.findall(r"(\d{1,6})(?:\(x(\d{1,6})\))?", env.get("SLURM_STEP_TASKS_PER_NODE", ""))
        for _ in range(int(times or 1))
    ]
    node = _number("SLURM_NODEID")
    here = tasks[node] if node < len(tasks) else 0
    mine = Worker(_number("SLURM_PROCID"), size, _number("SLURM_LOCALID"), here, True)
    return _possible(mine, "SLURM_PROCID, SLURM_STEP_NUM_TASKS, SLURM_LOCALID, SLURM_NODEID, SLURM_STEP_TASKS_PER_NODE")


def _number(name: str, default: int | None = None) -> int:
    """The whole number of a variable that a launcher sets."""
    text = os.environ.get(name)
    if text is None and default is not None:
        return default
    if text is None or not re.fullmatch("[0-9]{1,9}", text):
        raise UsageError(_contradiction(name))
    return int(text)


def _possible(mine: Worker, names: str) -> Worker:
    if not mine.rank < mine.size or not mine.local_rank < mine.local_size <= mine.size:
        raise UsageError(_contradiction(names))
    return mine


def _contradiction(names: str) -> str:
    told = ", ".join(f"{name}={brief(os.environ[name])}" for name in names.split(", ") if name in os.environ)
    told = told or f"{names} is not set"
    return f"{told}: no launcher says so; start all anew, or unset its variables to be one process"


def slurm_meeting_point() -> dict[str, str]:
    """MASTER_ADDR, the step's first node, and MASTER_PORT, which follows from the job's number as others have others.

    What the user has set stands.
    """
    env = os.environ
    if "MASTER_ADDR" in env and "MASTER_PORT" in env:
        return {}
    if not env.get("SLURM_STEP_NODELIST"):
        raise UsageError(_contradiction("SLURM_STEP_NODELIST"))
    # "gpu[07-09,12],login": the first node is gpu07.
    first = re.match(r"([^\[,]+)(?:\[([^\],-]+))?", env["SLURM_STEP_NODELIST"])
    host = (first[1] + (first[2] or "")) if first else env["SLURM_STEP_NODELIST"]
    port = 20000 + (_number("SLURM_JOB_ID") * 16 + _number("SLURM_STEP_ID", 0) % 16) % 20000
    return {"MASTER_ADDR": host, "MASTER_PORT": str(port)}


def is_worker() -> bool:
    """True in a process that a launcher has started as one of several."""
    return this_worker() is not None


def is_main() -> bool:
    """True in a run's one process, or in the first of several: the one that talks."""
    mine = this_worker()
    return mine is None or mine.rank == 0


@functools.cache
def restarts() -> int:
    """How often this worker's group has been started again after one of them failed."""
    count = _number("TORCHELASTIC_RESTART_COUNT", 0)
    if LAUNCHER not in os.environ:
        return count
    # That count stands still where it was another machine's worker that failed.
    starts = Path(os.environ[LAUNCHER]) / f"starts-{os.environ['LOCAL_RANK']}"
    with starts.open("a") as file:
        file.write(".")
    return max(count, starts.stat().st_size - 1)


def die_with_launcher() -> None:
    """Let this worker be killed when fastseg's launcher goes, however that happens: nothing is left running."""
    if LAUNCHER in os.environ and sys.platform == "linux":
        set_parent_death_signal = 1  # PR_SET_PDEATHSIG of prctl(2)
        ctypes.CDLL(None).prctl(set_parent_death_signal, signal.SIGKILL)


def decide(exit_code: int, message: str) -> tuple[bool, bool]:
    """Tell fastseg's launcher why the run ends; whether that is the first reason, and whether it is a new one.

    Without such a launcher every reason is both.
    """
    if LAUNCHER not in os.environ:
        return True, True
    import fcntl  # not on Windows, where torch has no launcher either

    folder = Path(os.environ[LAUNCHER])
    with (folder / "verdicts").open("a", encoding="utf-8") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        before = verdicts(folder)
        new = (exit_code, message.partition("\n")[0]) not in before
        if new:
            file.write(f"{exit_code} {message.partition(chr(10))[0]}\n")
    return not before, new


def decided() -> int | None:
    """The exit code that a worker of this machine gave for the run's end, if one has."""
    found = verdicts(Path(os.environ[LAUNCHER])) if LAUNCHER in os.environ else []
    return found[0][0] if found else None


def verdicts(folder: Path) -> list[tuple[int, str]]:
    """(exit code, message) of what the workers of a launcher's folder decided, the first one first."""
    path = folder / "verdicts"
    lines = path.read_text(encoding="utf-8").splitlines() if path.is_file() else []
    return [(int(code), message) for code, _, message in (line.partition(" ") for line in lines)]


def end_launcher() -> None:
    """Stop fastseg's launcher, and with it all workers: it would start them again otherwise, to fail again."""
    if LAUNCHER in os.environ:
        time.sleep(1)  # other workers may have something of their own to say
        # Not the parent: that may be a profiler's command between the two.
        os.kill(int((Path(os.environ[LAUNCHER]) / PID).read_text()), signal.SIGUSR2)
