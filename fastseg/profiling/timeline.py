"""What happened when in the recorded steps of one process, read from either profiler's file."""

import contextlib
import json
import sqlite3
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple

from fastseg.errors import FastsegError

# Before our names in both profilers, which know names of others too.
PREFIX = "fastseg/"
STEP = "step "

# CUpti_ActivityMemcpyKind, https://docs.nvidia.com/cupti/api/group__CUPTI__ACTIVITY__API.html
COPY_KINDS = {1: "HtoD", 2: "DtoH", 8: "DtoD", 10: "PtoP"}
PUSH_POP = 59  # NVTX_EVENTS.eventType of a range that was pushed and popped


class Span(NamedTuple):
    """Something on the host: a step, a part of it, an operator. Times in microseconds."""

    name: str
    start: float
    end: float


class Work(NamedTuple):
    """Something on the device: a kernel, or a copy ("HtoD", ...) of so many bytes. Times in microseconds.

    `launched` is when the host asked for it, which is what tells the part of the step that it belongs to.
    """

    name: str
    start: float
    end: float
    launched: float
    copy: str = ""
    nbytes: int = 0


@dataclass
class Timeline:
    """The recorded steps; `work` is empty where no device was recorded, `operators` where only a device was."""

    steps: list[Span] = field(default_factory=list)
    ranges: list[Span] = field(default_factory=list)
    work: list[Work] = field(default_factory=list)
    operators: list[tuple[int, Span]] = field(default_factory=list)  # with the thread that each ran on

    def add_range(self, name: str, start: float, end: float) -> None:
        """Take a range of either profiler: a step, a part of one, or somebody else's."""
        if name.startswith(PREFIX):
            ours = name.removeprefix(PREFIX)
            (self.steps if ours.startswith(STEP) else self.ranges).append(Span(ours, start, end))

    def within_steps(self) -> "Timeline":
        """Only what belongs to the steps, in the order of time.

        Raises:
            FastsegError: there is no step.
        """
        if not self.steps:
            raise FastsegError("profile: no step was recorded; give fewer --warmup steps, or more of --steps")
        first, last = min(s.start for s in self.steps), max(s.end for s in self.steps)
        return Timeline(
            sorted(self.steps, key=lambda s: s.start),
            # Longer first where two begin at once: the one that holds the other.
            sorted((s for s in self.ranges if first <= s.start < last), key=lambda s: (s.start, -s.end)),
            sorted((w for w in self.work if w.start < last and w.end > first), key=lambda w: w.start),
            [(thread, s) for thread, s in self.operators if first <= s.start < last],
        )


def from_chrome(path: Path) -> Timeline:
    """A trace that `torch.profiler` exported for Chrome and Perfetto (Trace Event Format, times in microseconds)."""
    events = [e for e in json.loads(path.read_text(encoding="utf-8"))["traceEvents"] if e.get("ph") == "X"]
    found = Timeline()
    launches = {
        e["args"]["correlation"]: e["ts"]
        for e in events
        if e.get("cat") in ("cuda_runtime", "cuda_driver") and "correlation" in e.get("args", {})
    }
    for event in events:
        name, start, kind, facts = event["name"], event["ts"], event.get("cat"), event.get("args", {})
        end = start + event["dur"]
        if kind == "user_annotation":
            found.add_range(name, start, end)
        elif kind == "cpu_op":
            found.operators.append((event["tid"], Span(name, start, end)))
        elif kind in ("kernel", "gpu_memcpy", "gpu_memset"):
            # "Memcpy HtoD (Pageable -> Device)"
            copy = name.split()[1] if kind == "gpu_memcpy" else ""
            launched = launches.get(facts.get("correlation"), start)
            found.work.append(Work(name, start, end, launched, copy, facts.get("bytes", 0)))
    return found.within_steps()


def from_nsys(path: Path) -> Timeline:
    """A report of Nsight Systems, exported as SQLite (times in nanoseconds).

    The schema: https://docs.nvidia.com/nsight-systems/2021.5/nsys-exporter/exported_data.html. Tables exist where there
    is something to put into them. The upper bits of globalTid are globalPid's; the lowest 24 are the thread.
    """
    found = Timeline()
    # Of a report that is still being written, or of something else, SQLite says so when it is first read.
    try:
        with contextlib.closing(sqlite3.connect(f"file:{path}?mode=ro", uri=True)) as database:
            for name, start, end in _rows(
                database,
                "NVTX_EVENTS",
                "SELECT coalesce(text, value), start, end FROM NVTX_EVENTS LEFT JOIN StringIds ON id = textId"
                f" WHERE eventType = {PUSH_POP} AND end > start",
            ):
                found.add_range(name or "", start / 1e3, end / 1e3)
            launch = (
                " LEFT JOIN CUPTI_ACTIVITY_KIND_RUNTIME r ON r.correlationId = w.correlationId"
                " AND r.globalTid / 0x1000000 = w.globalPid / 0x1000000"
            )
            for name, start, end, launched in _rows(
                database,
                "CUPTI_ACTIVITY_KIND_KERNEL",
                "SELECT value, w.start, w.end, coalesce(r.start, w.start) FROM CUPTI_ACTIVITY_KIND_KERNEL w"
                f" JOIN StringIds ON id = w.demangledName{launch}",
            ):
                found.work.append(Work(name, start / 1e3, end / 1e3, launched / 1e3))
            for kind, nbytes, start, end, launched in _rows(
                database,
                "CUPTI_ACTIVITY_KIND_MEMCPY",
                "SELECT copyKind, bytes, w.start, w.end, coalesce(r.start, w.start)"
                f" FROM CUPTI_ACTIVITY_KIND_MEMCPY w{launch}",
            ):
                copy = COPY_KINDS.get(kind, "other")
                found.work.append(Work(f"Memcpy {copy}", start / 1e3, end / 1e3, launched / 1e3, copy, nbytes))
    except sqlite3.DatabaseError as error:
        raise FastsegError(f"{path}: no SQLite export of Nsight Systems ({error})") from None
    return found.within_steps()


def _rows(database: sqlite3.Connection, table: str, query: str) -> Iterator[tuple[Any, ...]]:
    """The rows of a query, or none where its table does not exist."""
    if database.execute("SELECT 1 FROM sqlite_master WHERE name = ?", (table,)).fetchone():
        yield from database.execute(query)
