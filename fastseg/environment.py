"""What a figure was measured on: versions, processor, GPUs, command; and where fastseg was installed from."""

import contextlib
import json
import math
import os
import platform
import shlex
import subprocess
import sys
import time
import urllib.parse
import urllib.request
from importlib.metadata import PackageNotFoundError, distributions, version
from pathlib import Path
from typing import NamedTuple

import fastseg

DISTRIBUTION = "fastseg-trainer"  # what is installed; `fastseg` on the package index is another project

PACKAGES = ("torch", "torchvision", "nvidia-dali-cuda130", "nvidia-dali-cuda120", "triton", "numpy", "pillow")

# What nvidia-smi says of each GPU; names as in `nvidia-smi --help-query-gpu`.
GPU_FACTS = {
    "gpu_driver": "driver_version",
    "gpu_power_limits": "power.limit",
    "gpu_sm_clocks_max": "clocks.max.sm",
    "gpu_memory": "memory.total",
}

# Where control groups (version 2) lie, and which of them this process is in.
GROUPS, OWN_GROUP = Path("/sys/fs/cgroup"), Path("/proc/self/cgroup")

COMPUTING = 2  # threads of torch on the CPU where a GPU computes
TOO_MANY = 2  # threads per core, from which on they wait for one another


def version_of(package: str) -> str | None:
    """The version of an installed package, or None where it is not installed."""
    try:
        return version(package)
    except PackageNotFoundError:
        return None


def origin() -> tuple[Path, bool] | None:
    """The clone or wheel that fastseg was installed from, where that is still there, and whether in editable mode."""
    # In a clone its own fastseg_trainer.egg-info may come first, which has no note of pip's (PEP 610).
    notes = (found.read_text("direct_url.json") for found in distributions(name=DISTRIBUTION))
    for note in map(json.loads, filter(None, notes)):
        url = urllib.parse.urlsplit(note["url"])
        path = Path(urllib.request.url2pathname(url.path))
        if url.scheme == "file" and path.exists():
            return path, note.get("dir_info", {}).get("editable", False)
    return None


def install(extra: str) -> str:
    """What to type to get an extra of fastseg, which no package index has."""
    found = origin()
    if found is None:
        return f"in a clone of fastseg: pip install '.[{extra}]'"
    path, editable = found
    return f"pip install {'-e ' * editable}{shlex.quote(f'{path}[{extra}]')}"


def cores() -> int:
    """CPU cores that this process may use: by its affinity, and by the time that its container may take."""
    allowed = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    return max(1, min(allowed, math.ceil(core_limit() or allowed)))


class Threads(NamedTuple):
    """How many threads a process has on the CPU, to decode and of torch; and what is wrong with that."""

    decoding: int
    computing: int
    warning: str = ""

    def __str__(self) -> str:
        each = f"{self.decoding} thread{'s' * (self.decoding > 1)} each"
        return each if self.computing == self.decoding else f"{each} to decode, {self.computing} of torch"


def share_threads(asked: int, processes: int, *, gpu: bool) -> Threads:
    """The threads of each of so many processes on this machine.

    Decoding takes a process's share of the cores. Where a GPU computes, torch has next to nothing to do on the CPU, and
    its threads would take turns with those that decode.

    Args:
        asked: threads that the user wants; 0 for a share of the cores.
    """
    allowed = cores()
    mine = asked or max(1, allowed // processes)
    warning = ""
    if mine * processes > TOO_MANY * max(allowed, processes):
        each = f" in each of {processes} processes" * (processes > 1)
        warning = (
            f"runtime.threads = {mine}: {mine} threads{each} on {allowed} core{'s' * (allowed > 1)} wait for one "
            "another, and can be ten times slower; leave runtime.threads out, which shares the cores"
        )
    return Threads(mine, min(mine, COMPUTING) if gpu else mine, warning)


def process_age(stat: Path = Path("/proc/self/stat")) -> float:
    """Seconds since this process was started, to a hundredth; 0 where the system does not say."""
    try:
        # proc_pid_stat(5): the second field may hold anything, in brackets; the 22nd is the start, in ticks since boot.
        ticks = int(stat.read_text("utf-8", errors="replace").rpartition(")")[2].split()[19])
        return max(0.0, time.clock_gettime(time.CLOCK_BOOTTIME) - ticks / os.sysconf("SC_CLK_TCK"))
    except (OSError, ValueError, IndexError, AttributeError):
        return 0.0


def available_memory() -> int:
    """Bytes that new data may take before this machine swaps, or its container is ended; 0 where nobody says."""
    with contextlib.suppress(OSError):
        facts = dict(line.split(":") for line in Path("/proc/meminfo").read_text().splitlines())
        return int(min(1024 * int(facts["MemAvailable"].split()[0]), _container_memory()))
    return 0


def own_groups() -> list[Path]:
    """The control group of this process, and those that it lies in: of a container the one that it sees as the root."""
    with contextlib.suppress(OSError):
        for line in OWN_GROUP.read_text().splitlines():
            if line.startswith("0::"):
                own = GROUPS / line.removeprefix("0::").lstrip("/")
                return [group for group in (own, *own.parents) if group.is_relative_to(GROUPS)]
    return [GROUPS]


def core_limit() -> float | None:
    """How many cores' time this process may use, whatever number it sees; None without a limit."""
    limits = []
    for group in own_groups():
        with contextlib.suppress(OSError, ValueError):  # no such file, or "max"
            quota, period = (group / "cpu.max").read_text().split()
            limits.append(int(quota) / int(period))
    return min(limits, default=None)


def memory_limit() -> int | None:
    """Bytes of memory that this process may take; None without a limit."""
    limits = []
    for group in own_groups():
        with contextlib.suppress(OSError, ValueError):
            limits.append(int((group / "memory.max").read_text()))
    return min(limits, default=None)


def _container_memory() -> float:
    """What a container's limits leave; files that are only cached can go. Infinite without one."""
    left = math.inf
    for group in own_groups():
        with contextlib.suppress(OSError, ValueError):
            facts = dict(line.split() for line in (group / "memory.stat").read_text().splitlines())
            used = int((group / "memory.current").read_text()) - int(facts.get("inactive_file", 0))
            left = min(left, max(0, int((group / "memory.max").read_text()) - used))
    return left


def processor() -> str:
    """The model of the CPU, or what kind it is."""
    try:
        with open("/proc/cpuinfo", encoding="utf-8") as file:
            return next(line.split(":", 1)[1].strip() for line in file if line.startswith("model name"))
    except (OSError, StopIteration):
        return platform.processor() or platform.machine()


def said(*command: str) -> str | None:
    """What a command prints, or None where it fails or does not exist."""
    try:
        done = subprocess.run(command, capture_output=True, text=True, check=True, timeout=20)
    except (OSError, subprocess.SubprocessError):
        return None
    return done.stdout.strip() or None


def query_gpus(*facts: str) -> list[list[str]]:
    """What nvidia-smi says of each GPU, by its own names of the facts; none without nvidia-smi, or where it fails."""
    text = said("nvidia-smi", f"--query-gpu={','.join(facts)}", "--format=csv,noheader")
    rows = [[cell.strip() for cell in line.split(",")] for line in (text or "").splitlines()]
    return [row for row in rows if len(row) == len(facts)]  # and not "No devices were found"


def _gpu_facts() -> dict[str, str | None]:
    """A value of GPU_FACTS per GPU, joined by commas; nothing without nvidia-smi."""
    rows = query_gpus(*GPU_FACTS.values())
    if not rows:
        return {}
    return {name: ", ".join(column) for name, column in zip(GPU_FACTS, zip(*rows, strict=True), strict=True)}


def _commit() -> str | None:
    """The commit of this very code, with "-dirty" where it was changed since; None where it is no checkout."""
    folder = os.path.dirname(__file__)
    if said("git", "-C", folder, "ls-files", "environment.py") is None:  # installed inside somebody's repository
        return None
    return said("git", "-C", folder, "describe", "--always", "--exclude=*", "--dirty", "--abbrev=12")


def environment() -> dict[str, str | int | None]:
    """A flat record; packages that are not installed are null."""

    import torch  # here, so that `cores` costs nothing

    gpus = (
        [torch.cuda.get_device_name(i) for i in range(torch.cuda.device_count())] if torch.cuda.is_available() else []
    )
    return {
        "fastseg": fastseg.__version__,
        "commit": _commit(),
        "command": " ".join(sys.argv),
        "python": platform.python_version(),
        **{package: version_of(package) for package in PACKAGES},
        "cuda": torch.version.cuda if gpus else None,
        "cudnn": torch.backends.cudnn.version() if gpus else None,
        "gpus": ", ".join(gpus) or None,
        **dict.fromkeys(GPU_FACTS),
        **(_gpu_facts() if gpus else {}),
        "system": platform.platform(),
        "processor": processor(),
        "cores": cores(),
        "threads": torch.get_num_threads(),
    }
