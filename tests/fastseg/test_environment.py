"""The stamp of a record: what it says of this code and of a machine's GPUs."""

import json
import os
import subprocess
import sys
from pathlib import Path

import jsonschema
import pytest

from fastseg import environment
from fastseg.bench import kernels

ROOT = Path(environment.__file__).parents[1]


def test_the_commit_is_that_of_the_checkout(tmp_path):
    if not (ROOT / ".git").exists():
        pytest.skip("no checkout")
    head = subprocess.run(["git", "-C", ROOT, "rev-parse", "HEAD"], capture_output=True, text=True, check=True).stdout
    found = environment.environment()["commit"]
    assert head.startswith(found.removesuffix("-dirty"))
    assert len(found.removesuffix("-dirty")) >= 7


def test_code_that_is_no_checkout_has_no_commit(tmp_path, monkeypatch):
    monkeypatch.setattr(environment, "__file__", str(tmp_path / "environment.py"))
    assert environment._commit() is None
    # Installed beside somebody else's files.
    subprocess.run(["git", "init", "-q", tmp_path], check=True)
    (tmp_path / "environment.py").write_text("")
    assert environment._commit() is None


@pytest.fixture
def group(tmp_path, monkeypatch) -> Path:
    """The control group that this process is in, without limits; the one above it is its parent."""
    own = tmp_path / "groups" / "job" / "step"
    own.mkdir(parents=True)
    (tmp_path / "cgroup").write_text("0::/job/step\n")
    monkeypatch.setattr(environment, "GROUPS", tmp_path / "groups")
    monkeypatch.setattr(environment, "OWN_GROUP", tmp_path / "cgroup")
    monkeypatch.setattr(os, "sched_getaffinity", lambda pid: set(range(16)))
    return own


def test_memory_is_what_the_machine_or_the_container_leaves(group):
    assert environment._container_memory() == float("inf")
    for name, text in {
        "memory.max": "1000",
        "memory.current": "700",
        "memory.stat": "anon 500\ninactive_file 150",
    }.items():
        (group / name).write_text(text)
    assert environment.memory_limit() == 1000
    assert environment._container_memory() == 450  # 1000 - (700 - 150): what is only cached can go
    if Path("/proc/meminfo").exists():
        assert environment.available_memory() == 450
    (group / "memory.max").write_text("max")
    assert environment.memory_limit() is None
    assert environment._container_memory() == float("inf")


@pytest.mark.parametrize(
    ("step", "job", "limit", "cores"),
    [
        ("max 100000", None, None, 16),
        ("150000 100000", None, 1.5, 2),  # a core and a half keep two threads busy
        ("max 100000", "400000 100000", 4.0, 4),  # what holds for the job holds for its steps
        ("800000 100000", "50000 100000", 0.5, 1),
        ("9900000 100000", None, 99.0, 16),
    ],
)
def test_cores_are_those_of_the_affinity_and_of_the_containers_time(group, step, job, limit, cores):
    (group / "cpu.max").write_text(step)
    if job:
        (group.parent / "cpu.max").write_text(job)
    assert environment.core_limit() == limit
    assert environment.cores() == cores


@pytest.mark.parametrize(
    ("asked", "processes", "gpu", "decoding", "computing"),
    [
        (0, 1, False, 16, 16), (0, 1, True, 16, 2), (0, 8, True, 2, 2), (0, 8, False, 2, 2),
        (0, 32, True, 1, 1), (5, 2, True, 5, 2), (5, 2, False, 5, 5), (1, 1, True, 1, 1),
    ],
)  # fmt: skip
def test_processes_share_the_cores_and_torch_has_few_threads_beside_a_gpu(
    group, asked, processes, gpu, decoding, computing
):
    assert environment.share_threads(asked, processes, gpu=gpu) == (decoding, computing, "")


def test_far_more_threads_than_cores_are_warned_of(group):
    found = environment.share_threads(33, 1, gpu=False)
    assert found[:2] == (33, 33)
    assert found.warning.startswith("runtime.threads = 33: 33 threads on 16 cores wait for one another")
    assert " threads in each of 4 processes on 16 cores " in environment.share_threads(9, 4, gpu=True).warning
    assert not environment.share_threads(8, 4, gpu=True).warning


def test_a_processs_age_is_read_from_what_linux_says_of_it(tmp_path, monkeypatch):
    stat = tmp_path / "stat"
    # A name with brackets and blanks; state, 18 other fields, the start in ticks since boot, more.
    stat.write_text(f"7 (a) b (c) S {' '.join(['1'] * 18)} 400 5 6\n")
    monkeypatch.setattr(environment.time, "clock_gettime", lambda clock: 9.5)
    monkeypatch.setattr(environment.os, "sysconf", lambda name: 100)
    assert environment.process_age(stat) == 5.5
    stat.write_text("7 (a) S\n")
    assert environment.process_age(stat) == 0
    assert environment.process_age(tmp_path / "nowhere") == 0


def test_gpus_are_described_by_nvidia_smi_and_null_without_it(tmp_path, monkeypatch):
    monkeypatch.setenv("PATH", str(tmp_path))
    assert environment._gpu_facts() == {}
    line = "580.95.05, 700.00 W, 1980 MHz, 81559 MiB"
    script = tmp_path / "nvidia-smi"
    script.write_text(
        f"#!{sys.executable}\nimport sys\n"
        "assert sys.argv[1] == '--query-gpu=driver_version,power.limit,clocks.max.sm,memory.total'\n"
        f"print({line!r})\nprint({line.replace('700', '350')!r})\n"
    )
    script.chmod(0o755)
    assert environment._gpu_facts() == {
        "gpu_driver": "580.95.05, 580.95.05",
        "gpu_power_limits": "700.00 W, 350.00 W",
        "gpu_sm_clocks_max": "1980 MHz, 1980 MHz",
        "gpu_memory": "81559 MiB, 81559 MiB",
    }


def test_the_records_that_come_with_fastseg_follow_their_schema():
    folder = Path(kernels.__file__).with_name("records")
    schema = json.loads((folder / "schema.json").read_text())
    jsonschema.Draft202012Validator.check_schema(schema)
    records = sorted(set(folder.glob("*.json")) - {folder / "schema.json"} - set(folder.glob("*-aot.json")))
    assert len(records) >= 3
    for path in records:
        jsonschema.validate(json.loads(path.read_text()), schema)
