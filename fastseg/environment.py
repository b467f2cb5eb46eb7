"""What a figure was measured on: versions, processor, GPUs, command."""

import os
import platform
import sys
from importlib.metadata import PackageNotFoundError, version

import fastseg

PACKAGES = ("torch", "torchvision", "nvidia-dali-cuda130", "nvidia-dali-cuda120", "triton", "numpy", "pillow")


def cores() -> int:
    """CPU cores that this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def _processor() -> str:
    try:
        with open("/proc/cpuinfo", encoding="utf-8") as file:
            return next(line.split(":", 1)[1].strip() for line in file if line.startswith("model name"))
    except (OSError, StopIteration):
        return platform.processor() or platform.machine()


def environment() -> dict[str, str | int | None]:
    """A flat record; packages that are not installed are null."""

    import torch  # here, so that `cores` costs nothing

    def installed(package: str) -> str | None:
        try:
            return version(package)
        except PackageNotFoundError:
            return None

    gpus = (
        [torch.cuda.get_device_name(i) for i in range(torch.cuda.device_count())] if torch.cuda.is_available() else []
    )
    return {
        "fastseg": fastseg.__version__,
        "command": " ".join(sys.argv),
        "python": platform.python_version(),
        **{package: installed(package) for package in PACKAGES},
        "cuda": torch.version.cuda if gpus else None,
        "cudnn": torch.backends.cudnn.version() if gpus else None,
        "gpus": ", ".join(gpus) or None,
        "system": platform.platform(),
        "processor": _processor(),
        "cores": cores(),
        "threads": torch.get_num_threads(),
    }
