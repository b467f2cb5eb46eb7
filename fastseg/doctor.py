"""What this machine has for fastseg, what is missing, and the line that mends it: `fastseg doctor`.

Each part is looked at on its own: one that cannot be looked at becomes a row that says so, and the others follow. What
`auto` comes to is asked of the functions that choose in training.
"""

import functools
import importlib.util
import os
import platform
import re
import shutil
import sys
import tempfile
import textwrap
import time
import warnings
from collections.abc import Callable, Iterable, Iterator, Sequence
from operator import attrgetter
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

import fastseg
from fastseg import environment
from fastseg.environment import cores, query_gpus, version_of
from fastseg.errors import UsageError, first_line

if TYPE_CHECKING:
    import torch  # else it is imported by those who look at it, since it may be what is missing

    from fastseg.config import Size

OK, NOTE, PROBLEM = "ok", "note", "problem"

TRIAL = 64 << 20  # bytes that are written and read to see how fast a disk is
ROOM = 2 << 30  # bytes: CamVid's download has 0.6 GB and is unpacked beside itself; a checkpoint has 0.24
SHARED = 1 << 30  # bytes: CamVid decoded to 360x480 takes a third of that, at most half of what is free
OPEN_FILES = 1024  # what Linux allows by default
CAMVID = 367  # training images

CPU_FLAGS = ("avx2", "avx512f", "avx512_bf16", "amx_bf16", "bf16")  # the last is Arm's
BUILD_APEX = "in a clone of NVIDIA/apex: APEX_CPP_EXT=1 APEX_CUDA_EXT=1 pip install --no-build-isolation ."


class Row(NamedTuple):
    """One thing that was looked at.

    Attributes:
        state: "ok"; "note", where something is missing or slow; "problem", which keeps fastseg from training.
        cure: what to type or to do.
    """

    name: str
    state: str
    text: str
    cure: str | None = None


def examine() -> list[Row]:
    """All that can be said of this machine, in a fixed order."""
    probes: dict[str, Callable[[], Iterable[Row]]] = {
        "system": _system,
        "CPU": _cpu,
        "memory": _memory,
        "/dev/shm": _shared_memory,
        "open files": _open_files,
        "folders": _folders,
        "torch": _torch,
        "GPU": _gpus,
        "packages": _packages,
        "auto": _choices,
    }
    rows = [row for name, probe in probes.items() for row in _looked(name, probe)]
    return [Row(row.name, row.state, _without_home(row.text), row.cure) for row in rows]


def problems(rows: Sequence[Row]) -> list[str]:
    """Names of what keeps fastseg from training."""
    return [row.name for row in rows if row.state == PROBLEM]


def show(rows: Sequence[Row], columns: int) -> str:
    """The rows as text for a terminal of so many columns, 60 or more; options are not torn at their hyphens."""
    width = max(len(row.name) for row in rows)
    indent = " " * (len(PROBLEM) + width + 2)
    fill = functools.partial(textwrap.fill, width=max(60, columns), subsequent_indent=indent, break_on_hyphens=False)
    lines = []
    for row in rows:
        lines.append(fill(row.text, initial_indent=f"{row.state:<{len(PROBLEM)}} {row.name:<{width}} "))
        lines += [fill(row.cure, initial_indent=f"{indent}-> ")] if row.cure else []
    bad = ", ".join(problems(rows))
    return "\n".join([*lines, "", f"this keeps fastseg from training: {bad}" if bad else "fastseg can train here"])


def _looked(name: str, probe: Callable[[], Iterable[Row]]) -> Iterator[Row]:
    """The rows of a probe; an error ends it with a row of its own."""
    try:
        yield from probe()
    except Exception as error:  # drivers and packages of others fail in any way, which is what is to be found out
        yield Row(name, NOTE, f"cannot be looked at ({first_line(error)})")


def _without_home(text: str) -> str:
    """The text with ~ for the home folder: it may end up in a bug report."""
    home = os.path.expanduser("~")
    return re.sub(rf"(?<![\w./-]){re.escape(home)}(?![\w.-])", "~", text) if len(home) > 1 else text


def _gib(number: float) -> str:
    return f"{number / 2**30:.1f} GiB"


# The machine


def _system() -> Iterator[Row]:
    yield Row("fastseg", OK, f"{fastseg.__version__} in {Path(fastseg.__file__).parent}")
    if other := version_of("fastseg"):
        text = f"{other} is installed beside {environment.DISTRIBUTION}: another project, with files in the same folder"
        cure = f"pip uninstall fastseg {environment.DISTRIBUTION}; then {environment.install('dali')}"
        yield Row("other fastseg", NOTE, text, cure)
    if sys.platform == "linux":
        yield Row("system", OK, platform.platform())
    else:
        yield Row("system", NOTE, f"{platform.platform()}: CPU only, untested", "use Linux")
    yield Row("Python", OK, f"{platform.python_version()}, {sys.executable}")


def _cpu() -> Iterator[Row]:
    facts = Path("/proc/cpuinfo")
    lines = facts.read_text(encoding="utf-8").splitlines() if facts.is_file() else []
    flags = next((line.split() for line in lines if line.startswith(("flags", "Features"))), [])
    known, limit = [flag for flag in CPU_FLAGS if flag in flags], environment.core_limit()
    text = ", ".join([environment.processor(), f"{cores()} of {os.cpu_count()} cores", *known])
    yield Row("CPU", OK, text if limit is None else f"{text}; this container may take the time of {limit:g}")


def _memory() -> Iterator[Row]:
    text, limit = _gib(os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGESIZE")), environment.memory_limit()
    if available := environment.available_memory():
        text += f", {_gib(available)} available"
    text += ", no limit by a container" if limit is None else f", of which this container may take {_gib(limit)}"
    yield Row("memory", OK, text)


def _shared_memory() -> Iterator[Row]:
    from fastseg.pipelines.prepared import SHARED_MEMORY

    total, _, free = shutil.disk_usage(SHARED_MEMORY)
    text = f"{_gib(total)}, {_gib(free)} free"
    if free < SHARED:
        text += ": decoded data that do not fit go to a file; NCCL needs some of it between GPUs"
        yield Row("/dev/shm", NOTE, text, "in Docker: --shm-size=2g; elsewhere: remove what nobody needs there")
    else:
        yield Row("/dev/shm", OK, text)


def _open_files() -> Iterator[Row]:
    import resource  # not on Windows

    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    few = soft != resource.RLIM_INFINITY and soft < OPEN_FILES
    shown = ["no limit" if limit == resource.RLIM_INFINITY else str(limit) for limit in (soft, hard)]
    text = f"{shown[0]} (ulimit -n), at most {shown[1]}"
    yield Row("open files", NOTE if few else OK, text, f"ulimit -n {OPEN_FILES}" if few else None)


def _folders() -> Iterator[Row]:
    from fastseg.data import home

    tried: set[int] = set()
    export = "export FASTSEG_DATA=DIR, with a folder that you may write to"
    try:
        rows = [("data folder", home(), NOTE, export)]
    except UsageError as error:
        rows = []
        yield Row("data folder", NOTE, str(error).partition(":")[0], f"{export}; or give --data PATH of your own")
    for name, folder, state, cure in (
        *rows,
        ("run folder", Path("runs").absolute(), PROBLEM, "work in a folder that you may write to, or give --run DIR"),
    ):
        there = next(path for path in (folder, *folder.parents) if path.exists())
        disk = there.stat().st_dev
        try:
            tempfile.TemporaryFile(dir=there).close()
            speed = "the same disk" if disk in tried else _speed(there)
        except OSError as error:
            yield Row(name, state, f"{folder}: cannot be written to ({error.strerror})", cure)
            continue
        tried.add(disk)
        free = shutil.disk_usage(there).free
        low = free < ROOM
        text = f"{folder}: {_gib(free)} free; {speed}"
        yield Row(name, NOTE if low else OK, text, "make room, or: " + cure if low else None)


def _speed(folder: Path) -> str:
    written, read = disk_speed(folder)
    return (
        f"one file of {TRIAL >> 20} MiB was written and synced at {written / 1e6:.0f} MB/s, and read at "
        f"{read / 1e6:.0f} MB/s (the disk's own cache may have answered)"
    )


def disk_speed(folder: Path) -> tuple[float, float]:
    """Bytes per second of one new file of TRIAL bytes in `folder`: written until the disk has it, then read back.

    In between the system is asked to forget it, so that its page cache does not answer. Nothing is left behind.

    Raises:
        OSError: the folder cannot be written to, or is full.
    """
    block = os.urandom(1 << 20)  # nothing that a file system could compress
    with tempfile.TemporaryFile(dir=folder) as file:
        start = time.perf_counter()
        for _ in range(TRIAL // len(block)):
            file.write(block)
        file.flush()
        os.fsync(file.fileno())
        written = time.perf_counter() - start
        if hasattr(os, "posix_fadvise"):
            os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)
        file.seek(0)
        start = time.perf_counter()
        while file.read(len(block)):
            pass
        return TRIAL / written, TRIAL / (time.perf_counter() - start)


# What computes


def _torch() -> Iterator[Row]:
    try:
        import torch
        import torch.distributed as dist
    except (ImportError, OSError) as error:  # OSError: a library that it brings cannot be loaded
        cure = "pip install --force-reinstall torch torchvision"
        yield Row("torch", PROBLEM, f"cannot be imported ({first_line(error)})", cure)
        return
    cudnn = torch.backends.cudnn.version()
    parts = [torch.__version__, f"CUDA {torch.version.cuda or '-'}"]
    parts.append(f"cuDNN {cudnn // 10000}.{cudnn // 100 % 100}.{cudnn % 100}" if cudnn else "cuDNN -")
    nccl = dist.is_available() and dist.is_nccl_available()
    parts.append(f"NCCL {'.'.join(map(str, torch.cuda.nccl.version()))}" if nccl else "NCCL -")
    yield Row("torch", OK, ", ".join(parts))


def _gpus() -> Iterator[Row]:
    import torch

    with warnings.catch_warnings(record=True) as caught:  # what torch has against a driver or a GPU
        warnings.simplefilter("always")
        count = torch.cuda.device_count() if torch.cuda.is_available() else 0
        for index in range(count):
            yield from _looked(f"GPU {index}", functools.partial(_gpu, index))
    seen = query_gpus("index", "name", "driver_version", "power.limit", "persistence_mode", "mig.mode.current")
    if not count:
        yield _no_gpu(len(seen), [str(warning.message).partition(". ")[0] for warning in caught])
    if not seen and (count or shutil.which("nvidia-smi")):
        cure = "run nvidia-smi and see what it says; after an update of the driver, reboot"
        yield Row("nvidia-smi", NOTE, "not on the path, or it names no GPU", cure)
    for number, name, driver, power, persistence, mig in seen:
        cures = []
        if persistence == "Disabled":
            cures.append("sudo nvidia-smi -pm 1, so that the driver stays loaded between runs")
        if mig == "Enabled":
            cures.append("sudo nvidia-smi -mig 0, to train on the whole GPU and not on an instance")
        text = f"{name}, driver {driver}, power limit {power}, persistence mode {persistence}, MIG {mig}"
        yield Row(f"nvidia-smi {number}", NOTE if cures else OK, text, "; ".join(cures) or None)


def _gpu(index: int) -> Iterator[Row]:
    """A GPU that torch sees, and whether torch has kernels for it."""
    import torch

    capability = torch.cuda.get_device_capability(index)
    free, total = torch.cuda.mem_get_info(index)
    text = f"{torch.cuda.get_device_name(index)}, {_gib(total)}, {_gib(free)} free, compute capability "
    text += "{}.{}".format(*capability)
    numbers = re.findall(r"_(\d+)", " ".join(torch.cuda.get_arch_list()))  # of "sm_75", "sm_90a"
    least = min((divmod(int(number), 10) for number in numbers), default=(0, 0))
    if capability >= least:
        yield Row(f"GPU {index}", OK, text)
        return
    text += ", for which torch {} has no kernels: they begin at {}.{}".format(torch.__version__, *least)
    cure = (
        "torch's CUDA 13 wheels leave Volta and older GPUs out: install torch built for CUDA 12.6 (cu126), and "
        "nvidia-dali-cuda120 in place of nvidia-dali-cuda130; or train with --device cpu"
    )
    yield Row(f"GPU {index}", PROBLEM, text, cure)


def _no_gpu(seen: int, warned: Sequence[str]) -> Row:
    """Why torch sees no GPU, where nvidia-smi sees so many."""
    import torch

    if not seen:
        cure = "with an NVIDIA GPU: install NVIDIA's driver; in Docker: --gpus all"
        return Row("GPU", NOTE, "; ".join(["none: fastseg trains on the CPU", *warned]), cure)
    text = f"torch sees none of the {seen} that nvidia-smi names"
    if torch.version.cuda is None:
        return Row("GPU", PROBLEM, f"{text}: it is built without CUDA", "install torch built for CUDA")
    if "CUDA_VISIBLE_DEVICES" in os.environ:
        value = os.environ["CUDA_VISIBLE_DEVICES"]
        return Row("GPU", NOTE, f"{text}: CUDA_VISIBLE_DEVICES is {value!r}", "unset CUDA_VISIBLE_DEVICES")
    text = ": ".join([text, *warned])
    return Row("GPU", PROBLEM, text, "update NVIDIA's driver: CUDA 13 wants 580 or later; or train with --device cpu")


# Packages and programs


def _packages() -> Iterator[Row]:
    has_dali = bool(importlib.util.find_spec("nvidia") and importlib.util.find_spec("nvidia.dali"))
    yield from _torchvision()
    yield Row("NumPy", OK, f"{version_of('numpy')}, Pillow {version_of('pillow')}")
    if has_dali:
        dali = [f"{version_of(name)} ({name})" for name in environment.PACKAGES if "dali" in name and version_of(name)]
        yield Row("DALI", OK, ", ".join(dali) or "installed")
    else:
        yield Row("DALI", NOTE, "not installed: the reference tier decodes", f"{environment.install('dali')} (Linux)")
    if importlib.util.find_spec("triton"):
        yield Row("Triton", OK, version_of("triton") or "installed")
    else:
        yield Row("Triton", NOTE, "not installed: a GPU uses PyTorch's operators", "pip install triton")
    yield from _looked("apex", _apex)
    if shutil.which("nsys"):
        yield Row("nsys", OK, environment.said("nsys", "--version") or "on the path, but it does not tell its version")
    else:
        cure = "for GPUs: apt install nsight-systems-cli, from NVIDIA's repository"
        yield Row("nsys", NOTE, "not on the path: fastseg profile uses torch's profiler", cure)
    for extra, modules, use in (
        ("onnx", ("onnx", "onnxruntime", "onnxscript"), "fastseg export --out NAME.onnx"),
        ("remote", ("fsspec", "s3fs"), "--data s3://..."),
    ):
        missing = [name for name in modules if importlib.util.find_spec(name) is None]
        if missing:
            text = f"{', '.join(missing)} not installed; for {use}"
            yield Row(f"extra {extra}", NOTE, text, environment.install(extra))
        else:
            yield Row(f"extra {extra}", OK, ", ".join(f"{name} {version_of(name)}" for name in modules))


def _torchvision() -> Iterator[Row]:
    try:
        import torchvision
    except Exception as error:  # one that is built for another torch fails in ways of its own
        cure = "pip install --force-reinstall torch torchvision, so that they fit"
        text = f"cannot be imported ({first_line(error)}): no --init vgg16 and its like"
        yield Row("torchvision", NOTE, text, cure)
        return
    yield Row("torchvision", OK, torchvision.__version__)


def _apex() -> Iterator[Row]:
    from fastseg.training.optim import find_apex

    sgd, found = find_apex()
    if sgd is not None:
        yield Row("apex", OK, f"NVIDIA's: {found}")
    elif importlib.util.find_spec("apex") is None:
        yield Row("apex", NOTE, "not installed: torch's fused SGD takes its place", f"for GPUs, {BUILD_APEX}")
    elif "apex.multi_tensor_apply" in sys.modules:
        yield Row("apex", NOTE, f"NVIDIA's, of no use: {found}", BUILD_APEX)
    else:
        text = f"the unrelated project of that name, version {version_of('apex')}: {found}"
        yield Row("apex", NOTE, text, f"pip uninstall apex; then {BUILD_APEX}")


# What `auto` comes to


def _choices() -> Iterator[Row]:
    import torch

    from fastseg.config import Config
    from fastseg.distributed import choose_device, choose_dtype
    from fastseg.profiling.session import choose_profiler
    from fastseg.training.optim import make_optimizer
    from fastseg.training.setup import choose_capture, choose_kernels

    config = Config()
    kind, why = choose_device("auto")
    device = torch.device(kind)
    yield Row("auto device", OK, f"{kind}: {why}")

    choices: dict[str, Callable[[], tuple[str, str]]] = {
        "dtype": lambda: choose_dtype("auto", kind)[1:],
        "loader": lambda: _loader(config.data.size, device),
        "kernels": lambda: choose_kernels(config, device),
        "capture": lambda: attrgetter("value", "why")(choose_capture(config, device)),
        "optimizer": lambda: make_optimizer(torch.nn.Linear(1, 1).to(device), config.train, device)[1:],
        "profiler": lambda: choose_profiler("auto", kind),
    }
    for name, choose in choices.items():
        yield from _looked(f"auto {name}", functools.partial(_choice, f"auto {name}", choose))


def _choice(name: str, choose: Callable[[], tuple[str, str]]) -> Iterator[Row]:
    chosen, why = choose()
    yield Row(name, OK, f"{chosen}: {why}")


def _loader(size: "Size", device: "torch.device") -> tuple[str, str]:
    """The data path for a data set like CamVid: as many files of that (height, width), none of which is opened."""
    import torch

    from fastseg.data.classes import camvid_indexed
    from fastseg.data.headers import Header
    from fastseg.data.layouts import Pair
    from fastseg.pipelines.source import Spec, choose_loader

    spec = Spec(
        pairs=[Pair("", __file__, __file__)] * CAMVID,
        headers=[Header(size, size, "RGB", "L")] * CAMVID,
        classes=camvid_indexed(),
        size=size,
        device=device,
        dtype=torch.float32,
        threads=1,
    )
    _, chosen = choose_loader("auto", spec, epochs=True)
    return chosen.value, f"{chosen.why} (for data like CamVid's)"
