"""The stamp of a record: what it says of this code and of a machine's GPUs."""

import json
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


def test_memory_is_what_the_machine_or_the_container_leaves(tmp_path, monkeypatch):
    assert environment._container_memory(tmp_path) == float("inf")  # no control group
    for name, text in {
        "memory.max": "1000",
        "memory.current": "700",
        "memory.stat": "anon 500\ninactive_file 150",
    }.items():
        (tmp_path / name).write_text(f"{text}\n")
    # 700 are used, of which 150 are only cached.
    assert environment._container_memory(tmp_path) == 450
    (tmp_path / "memory.max").write_text("max\n")
    assert environment._container_memory(tmp_path) == float("inf")
    if Path("/proc/meminfo").exists():
        monkeypatch.setattr(environment, "_container_memory", lambda: 450)
        assert environment.available_memory() == 450


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
