"""`fastseg doctor` on this machine, and on machines that are made up: their GPUs, their packages, their limits."""

import json
import os
import platform
import re
import resource
import shutil
import subprocess
import sys
import textwrap
from pathlib import Path

import pytest
import torch

from fastseg import doctor, environment
from fastseg.doctor import NOTE, OK, PROBLEM, Row

GIB = 2**30


def rows_of(probe) -> dict[str, Row]:
    return {row.name: row for row in probe()}


@pytest.fixture
def no_gpu(monkeypatch, tmp_path):
    """Neither torch nor a program on the path knows of a GPU."""
    monkeypatch.setattr("torch.cuda.is_available", lambda: False)
    monkeypatch.setenv("PATH", str(tmp_path))
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)


@pytest.fixture
def volta(monkeypatch):
    """Torch sees a V100 with 32 GiB, 30 of them free, and was built for Turing and later."""
    monkeypatch.setattr("torch.cuda.is_available", lambda: True)
    monkeypatch.setattr("torch.cuda.device_count", lambda: 1)
    monkeypatch.setattr("torch.cuda.get_device_name", lambda index: "Tesla V100-SXM2-32GB")
    monkeypatch.setattr("torch.cuda.get_device_capability", lambda *_: (7, 0))
    monkeypatch.setattr("torch.cuda.mem_get_info", lambda index: (30 * GIB, 32 * GIB))
    monkeypatch.setattr("torch.cuda.get_arch_list", lambda: ["sm_75", "sm_80", "sm_90a", "sm_120", "compute_120"])


def program(path: Path, body: str) -> None:
    """A Python script that stands in for a program of another's."""
    path.write_text(f"#!{sys.executable}\n{textwrap.dedent(body)}")
    path.chmod(0o755)


def smi(folder: Path, *lines: str) -> None:
    """An nvidia-smi that prints these lines of CSV where it is asked for the six facts by their documented names."""
    facts = "index,name,driver_version,power.limit,persistence_mode,mig.mode.current"
    program(
        folder / "nvidia-smi",
        f"""\
        import sys
        assert sys.argv[1:] == ["--query-gpu={facts}", "--format=csv,noheader"]
        print({chr(10).join(lines)!r})
        """,
    )


H100 = "0, NVIDIA H100 80GB HBM3, 580.95.05, 700.00 W, Enabled, Disabled"


def test_the_machine_is_told_as_the_system_tells_it():
    cpu = next(doctor._cpu()).text
    assert f", {len(os.sched_getaffinity(0))} of {os.cpu_count()} cores" in cpu
    flags = re.search(r"^(flags|Features)\s*:(.*)", Path("/proc/cpuinfo").read_text(), re.MULTILINE)[2].split()
    assert ("avx512_bf16" in cpu) == ("avx512_bf16" in flags)
    total = int(re.search(r"MemTotal: +(\d+) kB", Path("/proc/meminfo").read_text())[1])
    assert next(doctor._memory()).text.startswith(f"{total / 2**20:.1f} GiB, ")
    soft, _ = resource.getrlimit(resource.RLIMIT_NOFILE)
    assert next(doctor._open_files()).text.startswith(f"{soft} (ulimit -n)")
    rows = rows_of(doctor._system)
    assert rows["Python"].text == f"{platform.python_version()}, {sys.executable}"
    assert Path(rows["fastseg"].text.partition(" in ")[2], "doctor.py").samefile(doctor.__file__)


def test_a_container_with_less_time_than_cores_is_said(monkeypatch):
    monkeypatch.setattr(environment, "core_limit", lambda: 1.5)
    monkeypatch.setattr(os, "sched_getaffinity", lambda pid: set(range(8)))
    (row,) = doctor._cpu()
    assert row.state == OK
    assert f", 2 of {os.cpu_count()} cores" in row.text  # a core and a half keep two threads busy
    assert row.text.endswith("; this container may take the time of 1.5")


def test_the_memory_that_a_container_may_take(monkeypatch):
    monkeypatch.setattr(environment, "memory_limit", lambda *_: 4 * GIB)
    assert next(doctor._memory()).text.endswith("of which this container may take 4.0 GiB")


def test_dockers_64_mib_of_shared_memory_are_too_small(monkeypatch):
    usage = shutil.disk_usage("/dev/shm")
    (row,) = doctor._shared_memory()
    assert row.text.startswith(f"{usage.total / GIB:.1f} GiB, ")
    monkeypatch.setattr(shutil, "disk_usage", lambda path: shutil._ntuple_diskusage(64 << 20, 0, 64 << 20))
    (row,) = doctor._shared_memory()
    assert row.state == NOTE
    assert "--shm-size" in row.cure


def test_a_low_limit_of_open_files_is_told_with_the_line_that_raises_it(monkeypatch):
    monkeypatch.setattr(resource, "getrlimit", lambda _: (256, resource.RLIM_INFINITY))
    (row,) = doctor._open_files()
    assert row == ("open files", NOTE, "256 (ulimit -n), at most no limit", "ulimit -n 1024")


def test_the_folders_of_data_and_runs_are_tried_and_left_as_they_were(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("FASTSEG_DATA", str(tmp_path / "not" / "there"))
    free = shutil.disk_usage(tmp_path).free
    rows = rows_of(doctor._folders)
    told = re.fullmatch(
        rf"{re.escape(str(tmp_path))}/not/there: ([0-9.]+) GiB free; one file of 64 MiB was written and synced at "
        r"\d+ MB/s, and read at \d+ MB/s \(the disk's own cache may have answered\)",
        rows["data folder"].text,
    )
    assert float(told[1]) == pytest.approx(free / GIB, abs=0.5)  # others write to this disk too
    assert rows["run folder"].text.startswith(f"{tmp_path}/runs: ")
    assert rows["run folder"].text.endswith("; the same disk")
    assert list(tmp_path.iterdir()) == []


def test_the_trial_writes_and_reads_what_it_says(tmp_path, monkeypatch):
    # A clock that moves by a second each time it is read.
    seconds = iter(range(100))
    monkeypatch.setattr(doctor.time, "perf_counter", lambda: next(seconds))
    synced = []
    monkeypatch.setattr(os, "fsync", lambda number: synced.append(os.fstat(number).st_size))
    assert doctor.disk_speed(tmp_path) == (64 * 2**20, 64 * 2**20)
    assert synced == [64 * 2**20]


def test_a_run_folder_that_cannot_be_written_to_is_a_problem_and_a_full_disk_a_note(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "runs").write_text("a file")
    monkeypatch.setenv("FASTSEG_DATA", str(tmp_path))
    monkeypatch.setattr(shutil, "disk_usage", lambda path: shutil._ntuple_diskusage(10 * GIB, 5 * GIB, 5 * GIB))
    rows = rows_of(doctor._folders)
    assert (rows["data folder"].state, rows["run folder"].state) == (OK, PROBLEM)
    assert rows["run folder"].text == f"{tmp_path}/runs: cannot be written to (Not a directory)"
    assert "--run DIR" in rows["run folder"].cure
    monkeypatch.setattr(shutil, "disk_usage", lambda path: shutil._ntuple_diskusage(10 * GIB, 9 * GIB, GIB))
    row = rows_of(doctor._folders)["data folder"]
    assert row.state == NOTE
    assert row.cure.startswith("make room, or: export FASTSEG_DATA=")


def test_a_machine_without_a_gpu_is_told_so_and_has_no_problem(no_gpu):
    (row,) = doctor._gpus()
    assert (row.name, row.state) == ("GPU", NOTE)
    assert row.text == "none: fastseg trains on the CPU"


def test_an_nvidia_smi_that_fails_is_a_note(no_gpu, tmp_path):
    program(tmp_path / "nvidia-smi", "import sys\nprint('Driver/library version mismatch')\nsys.exit(18)\n")
    assert rows_of(doctor._gpus)["nvidia-smi"].state == NOTE
    program(tmp_path / "nvidia-smi", "print('No devices were found')\n")
    assert rows_of(doctor._gpus)["nvidia-smi"].state == NOTE


def test_a_gpu_that_torch_does_not_see_is_a_problem_unless_somebody_hid_it(no_gpu, tmp_path, monkeypatch):
    smi(tmp_path, H100)

    def old_driver():
        import warnings

        warnings.warn("The NVIDIA driver is too old (found version 12040). Update at http://...", stacklevel=1)
        return False

    monkeypatch.setattr("torch.cuda.is_available", old_driver)
    rows = rows_of(doctor._gpus)
    assert rows["GPU"].state == PROBLEM
    assert rows["GPU"].text.endswith(
        "none of the 1 that nvidia-smi names: The NVIDIA driver is too old (found version 12040)"
    )
    assert "580" in rows["GPU"].cure
    monkeypatch.setattr("torch.version.cuda", None)
    assert rows_of(doctor._gpus)["GPU"].text.endswith("it is built without CUDA")
    monkeypatch.setattr("torch.version.cuda", "13.0")
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "")
    row = rows_of(doctor._gpus)["GPU"]
    assert (row.state, row.cure) == (NOTE, "unset CUDA_VISIBLE_DEVICES")


def test_gpus_are_told_by_torch_and_by_nvidia_smi(volta, tmp_path, monkeypatch):
    monkeypatch.setattr("torch.cuda.get_device_capability", lambda *_: (9, 0))
    monkeypatch.setenv("PATH", str(tmp_path))
    smi(tmp_path, H100, H100.replace("0, ", "1, ", 1).replace("Enabled, Disabled", "Disabled, Enabled"))
    gpu, first, second = doctor._gpus()
    assert gpu == ("GPU 0", OK, "Tesla V100-SXM2-32GB, 32.0 GiB, 30.0 GiB free, compute capability 9.0", None)
    assert (first.name, first.state, first.cure) == ("nvidia-smi 0", OK, None)
    assert first.text == (
        "NVIDIA H100 80GB HBM3, driver 580.95.05, power limit 700.00 W, persistence mode Enabled, MIG Disabled"
    )
    assert (second.name, second.state) == ("nvidia-smi 1", NOTE)
    assert "nvidia-smi -pm 1" in second.cure
    assert "nvidia-smi -mig 0" in second.cure


def test_volta_is_a_problem_that_names_the_cuda_12_6_build(volta, tmp_path, monkeypatch):
    monkeypatch.setenv("PATH", str(tmp_path))
    gpu, smi_row = doctor._gpus()
    assert gpu.state == PROBLEM
    assert gpu.text.endswith(f"7.0, for which torch {torch.__version__} has no kernels: they begin at 7.5")
    assert "CUDA 12.6 (cu126)" in gpu.cure
    assert (smi_row.name, smi_row.state) == ("nvidia-smi", NOTE)
    # What `auto` comes to follows from the GPU.
    rows = rows_of(doctor._choices)
    assert rows["auto device"].text == "cuda: a GPU is here"
    assert rows["auto dtype"].text == "float16: the best of compute capability 7.0"
    assert rows["auto kernels"].text.startswith("torch: Triton needs compute capability 8.0")
    assert rows["auto profiler"].text == "torch: no nsys on the path"


def test_a_gpu_that_fails_is_a_row_and_the_next_one_follows(volta, tmp_path, monkeypatch):
    monkeypatch.setenv("PATH", str(tmp_path))
    monkeypatch.setattr("torch.cuda.device_count", lambda: 2)

    def memory(index: int):
        if index == 0:
            raise RuntimeError("CUDA error: out of memory\nmore lines")
        return 30 * GIB, 32 * GIB

    monkeypatch.setattr("torch.cuda.mem_get_info", memory)
    first, second, _ = doctor._gpus()
    assert first == ("GPU 0", NOTE, "cannot be looked at (RuntimeError: CUDA error: out of memory)", None)
    assert second.name == "GPU 1"


@pytest.fixture
def apex(tmp_path, monkeypatch):
    """apex({file: text}) puts a package of that name on the path."""

    def forget():
        for name in [name for name in sys.modules if name.partition(".")[0] == "apex"]:
            del sys.modules[name]

    def install(files: dict[str, str]) -> None:
        for name, text in files.items():
            (tmp_path / "apex").mkdir(exist_ok=True)
            (tmp_path / "apex" / name).write_text(text)

    forget()
    monkeypatch.syspath_prepend(tmp_path)
    yield install
    forget()


NVIDIAS = {"__init__.py": "", "optimizers.py": "class FusedSGD: pass\n"}
APPLIER = "class multi_tensor_applier:\n    available = {}\n"


@pytest.mark.parametrize(
    ("files", "state", "text", "cure"),
    [
        ({}, NOTE, "not installed", "APEX_CUDA_EXT=1 pip install"),
        ({"__init__.py": ""}, NOTE, "the unrelated project of that name", "pip uninstall apex; then"),
        (NVIDIAS | {"multi_tensor_apply.py": APPLIER.format(False)}, NOTE, "NVIDIA's, of no use", "APEX_CUDA_EXT=1"),
        (NVIDIAS | {"multi_tensor_apply.py": APPLIER.format(True)}, OK, "NVIDIA's: apex with its CUDA part", None),
    ],
    ids=["none", "the index's", "without CUDA", "with CUDA"],
)
def test_apex_is_nvidias_or_it_is_not(apex, files, state, text, cure):
    apex(files)
    (row,) = doctor._apex()
    assert row.state == state
    assert row.text.startswith(text)
    assert row.cure is None if cure is None else cure in row.cure


def test_each_missing_package_comes_with_the_line_that_installs_it(monkeypatch, tmp_path):
    find = doctor.importlib.util.find_spec
    gone = {"nvidia.dali", "triton", "onnxscript", "s3fs"}
    monkeypatch.setattr(doctor.importlib.util, "find_spec", lambda name: None if name in gone else find(name))
    monkeypatch.setenv("PATH", str(tmp_path))
    rows = rows_of(doctor._packages)
    cures = {name: row.cure for name, row in rows.items() if row.state == NOTE and name != "apex"}
    assert cures == {
        "DALI": f"{environment.install('dali')} (Linux)",
        "Triton": "pip install triton",
        "nsys": "for GPUs: apt install nsight-systems-cli, from NVIDIA's repository",
        "extra onnx": environment.install("onnx"),
        "extra remote": environment.install("remote"),
    }
    assert rows["DALI"].text == "not installed: the reference tier decodes"
    assert rows["extra onnx"].text == "onnxscript not installed; for fastseg export --out NAME.onnx"
    program(tmp_path / "nsys", "print('NVIDIA Nsight Systems version 2026.1.1')\n")
    assert rows_of(doctor._packages)["nsys"] == ("nsys", OK, "NVIDIA Nsight Systems version 2026.1.1", None)


def test_the_other_project_of_our_name_is_told_where_it_is_installed_beside_ours(tmp_path, monkeypatch):
    assert "other fastseg" not in rows_of(doctor._system)
    info = tmp_path / "fastseg-0.1.2.dist-info"
    info.mkdir()
    (info / "METADATA").write_text("Metadata-Version: 2.1\nName: fastseg\nVersion: 0.1.2\n")
    monkeypatch.syspath_prepend(tmp_path)
    row = rows_of(doctor._system)["other fastseg"]
    assert row.state == NOTE
    assert row.text == "0.1.2 is installed beside fastseg-trainer: another project, with files in the same folder"
    assert row.cure == f"pip uninstall fastseg fastseg-trainer; then {environment.install('dali')}"


def test_a_torchvision_for_another_torch_keeps_nobody_from_decoding(tmp_path, monkeypatch):
    for name in [name for name in sys.modules if name.partition(".")[0] == "torchvision"]:
        monkeypatch.delitem(sys.modules, name)
    (tmp_path / "torchvision.py").write_text("raise RuntimeError('operator torchvision::nms does not exist')\n")
    monkeypatch.syspath_prepend(tmp_path)
    (row,) = doctor._torchvision()
    assert row.state == NOTE
    why = "RuntimeError: operator torchvision::nms does not exist"
    assert row.text == f"cannot be imported ({why}): no --init vgg16 and its like"
    code = "import sys; sys.modules['torchvision'] = None; import fastseg.pipelines.reference"
    subprocess.run([sys.executable, "-c", code], check=True, capture_output=True)


def test_without_torch_that_is_the_problem_and_the_rest_is_told(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("FASTSEG_DATA", str(tmp_path))
    monkeypatch.setitem(sys.modules, "torch", None)
    rows = {row.name: row for row in doctor.examine()}
    assert rows["torch"].state == PROBLEM
    assert rows["torch"].text.startswith("cannot be imported (ModuleNotFoundError: ")
    assert rows["GPU"].text.startswith("cannot be looked at (ModuleNotFoundError: ")
    assert rows["CPU"].state == OK


def test_torchs_libraries_by_their_own_versions():
    (row,) = doctor._torch()
    assert row.text.startswith(f"{torch.__version__}, CUDA {torch.version.cuda or '-'}, ")
    if torch.version.cuda:
        # The wheels of the libraries, and not what torch says of them.
        major = torch.version.cuda.partition(".")[0]
        cudnn, nccl = (environment.version_of(f"nvidia-{name}-cu{major}") for name in ("cudnn", "nccl"))
        if cudnn is None:
            pytest.skip("this torch's libraries are no packages")
        assert row.text.endswith(f"cuDNN {cudnn.rpartition('.')[0]}, NCCL {nccl}")


def test_auto_is_what_training_says_first(street, tmp_path, monkeypatch, no_gpu):
    from fastseg import config as configs
    from fastseg.training.setup import set_up

    monkeypatch.chdir(tmp_path)
    changes = {"data.path": str(street), "data.size": "32x48", "model.depth": 1, "runtime.dtype": "auto"}
    choices = set_up(configs.override(configs.Config(), changes), None).choices
    rows = rows_of(doctor._choices)
    for name in ("device", "dtype", "kernels", "optimizer"):
        assert rows[f"auto {name}"].text == str(choices[name])
    # 367 images of 360 x 480 pixels, three bytes each and one of its label: 253.7 MB.
    assert rows["auto loader"].text.startswith("cache: 254 MB in ")
    assert rows["auto loader"].text.partition(" filled by ")[2].split()[0] in str(choices["loader"])


def test_no_path_of_the_home_folder_leaves_the_machine(monkeypatch):
    monkeypatch.setenv("HOME", "/home/anna")
    said = "in /home/anna/x, '/home/anna': /home/annabel/x and /mnt/home/anna/x"
    assert doctor._without_home(said) == "in ~/x, '~': /home/annabel/x and /mnt/home/anna/x"
    monkeypatch.setenv("HOME", "/")
    assert doctor._without_home("/dev/shm") == "/dev/shm"


def test_lines_fit_the_terminal_and_cures_can_be_copied():
    rows = [Row("a", OK, "word " * 30), Row("apex", NOTE, "none", "pip --no-build-isolation " * 5)]
    for columns in (80, 120):
        lines = doctor.show(rows, columns).splitlines()
        assert max(map(len, lines)) <= columns
        assert sum(line.count("--no-build-isolation") for line in lines) == 5
        assert lines[-1] == "fastseg can train here"
    bad = doctor.show([*rows, Row("GPU 0", PROBLEM, "old"), Row("run folder", PROBLEM, "full")], 80)
    assert bad.splitlines()[-1] == "this keeps fastseg from training: GPU 0, run folder"


def test_the_command_prints_a_table_or_one_strict_document(call, monkeypatch):
    monkeypatch.setenv("COLUMNS", "80")
    code, out, _ = call("doctor")
    assert code == 0
    assert max(map(len, out.splitlines())) <= 80

    def refuse(name: str):
        raise AssertionError(name)

    code, out, err = call("doctor", "--json")
    document = json.loads(out, parse_constant=refuse)
    assert (code, err, document["problems"]) == (0, "", [])
    assert {tuple(sorted(row)) for row in document["rows"]} == {("cure", "name", "state", "text")}
    assert {row["state"] for row in document["rows"]} <= {OK, NOTE}
    assert all(row["cure"] for row in document["rows"] if row["state"] == NOTE)
    assert not [row["text"] for row in document["rows"] if "cannot be looked at" in row["text"]]


def test_a_problem_is_exit_code_1(call, monkeypatch):
    monkeypatch.setattr(doctor, "examine", lambda: [Row("GPU 0", PROBLEM, "old", "a new one")])
    assert call("doctor")[0] == 1
    code, out, _ = call("doctor", "--json")
    assert (code, json.loads(out)["problems"]) == (1, ["GPU 0"])


def test_a_run_and_a_bench_at_once_are_refused(call):
    code, _, err = call("doctor", "--run", "a", "--bench", "b")
    assert (code, err) == (2, "fastseg: doctor: give --run RUN or --bench FILE\n")
