"""A long run leaks no memory, files or threads: sampled from outside, while it validates and saves all the time.

`FASTSEG_SOAK_SECONDS=900 pytest -s tests/faults/test_soak.py` looks for a quarter of an hour.
"""

import os
import subprocess
import sys
import time
from pathlib import Path
from statistics import median
from typing import NamedTuple

import pytest

from fastseg import runs

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(not Path("/proc/self/fd").is_dir(), reason="no /proc to look at processes with"),
]

SECONDS = float(os.environ.get("FASTSEG_SOAK_SECONDS", "12"))
WARM = 0.3  # share of the time after which everything has been done once
# An allocator's arenas settle within minutes, and a report, once a minute, reads a log that grows.
GROWTH = 0.10 if SECONDS < 300 else 0.05

# Epochs of four steps: a validation with its checkpoint after every second one, and a checkpoint every second step.
CONFIG = {"data.size": "32x48", "model.depth": 2, "train.batch": 2, "train.ema": 0.9, "train.validate_every": 2}
CONFIG |= {"train.epochs": 100_000, "train.checkpoint_steps": 2, "train.keep_every": 0, "runtime.log_every": 2}
CONFIG |= {"train.grow_from": 1.0, "runtime.threads": 1, "runtime.device": "cpu"}


class Sample(NamedTuple):
    """Memory in MiB, open files and threads of a process."""

    seconds: float
    mib: float
    files: int
    threads: int


def sample(pid: int, seconds: float) -> Sample:
    process = Path(f"/proc/{pid}")
    pages = int((process / "statm").read_text().split()[1])
    mib = pages * os.sysconf("SC_PAGE_SIZE") / 2**20
    return Sample(seconds, mib, len(list((process / "fd").iterdir())), len(list((process / "task").iterdir())))


def test_the_sampler_sees_files_threads_and_memory():
    script = (
        "import sys, threading\n"
        "files = [open('/dev/null') for _ in range(int(sys.argv[1]))]\n"
        "memory = bytearray(b'x') * (int(sys.argv[1]) << 20)\n"
        "for _ in files: threading.Thread(target=threading.Event().wait, daemon=True).start()\n"
        "print('ready', flush=True); sys.stdin.read()"
    )
    found = []
    for count in (0, 30):
        command = [sys.executable, "-c", script, str(count)]
        with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as process:
            assert process.stdout.readline() == "ready\n"
            found.append(sample(process.pid, 0.0))
            process.stdin.close()
    none, many = found
    assert (many.files - none.files, many.threads - none.threads) == (30, 30)
    assert 30 <= many.mib - none.mib < 40


def validations(run: Path) -> int:
    return sum(event["event"] == "val" for event in runs.read_log(run))


def test_a_long_run_does_not_grow(street, tmp_path):
    run = tmp_path / "run"
    sets = [part for key, value in CONFIG.items() for part in ("--set", f"{key}={value}")]
    command = [sys.executable, "-m", "fastseg", "train", "--data", street, "--recipe", "fast", *sets, "--run", run]
    environment = os.environ | {"OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""}
    samples: list[Sample] = []
    with (tmp_path / "err").open("w") as err, subprocess.Popen(command, stderr=err, env=environment) as process:
        try:
            while not validations(run):
                assert process.poll() is None, (tmp_path / "err").read_text()
                time.sleep(0.1)
            start = time.monotonic()
            while (seconds := time.monotonic() - start) < SECONDS or validations(run) < 6:
                samples.append(sample(process.pid, seconds))
                time.sleep(min(1.0, SECONDS / 60))
            assert process.poll() is None, (tmp_path / "err").read_text()
        finally:
            process.kill()
    events = runs.read_log(run)
    counts = {kind: sum(event["event"] == kind for event in events) for kind in ("train", "val", "checkpoint")}
    warm = [found for found in samples if found.seconds > WARM * samples[-1].seconds]
    third = len(warm) // 3
    first, last = warm[:third], warm[-third:]
    grown = median(s.mib for s in last) / median(s.mib for s in first) - 1
    print(f"{SECONDS:.0f} s, {counts}, {len(samples)} samples; after {WARM:.0%} of the time:")
    for name in ("mib", "files", "threads"):
        values = [[getattr(found, name) for found in part] for part in (first, warm, last)]
        low, high = min(values[1]), max(values[1])
        print(f"  {name}: median {median(values[0]):g} first, {median(values[2]):g} last; {low:g} to {high:g}")
    print(f"  memory grew by {grown:.1%}")
    assert grown < GROWTH
    # A checkpoint's thread and file come and go between samples; a leak would add one with every checkpoint.
    for name in ("files", "threads"):
        values = [[getattr(found, name) for found in part] for part in (first, last)]
        assert min(values[1]) <= min(values[0]) + 1
        assert max(values[1]) <= max(values[0]) + 1
