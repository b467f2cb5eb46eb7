"""`fastseg bench stream`: one epoch read from the files, none of it kept: does speed last, and does memory stay flat?

Training batches are windows of half the images' height and width, as one trains on images too large for a network.
"""

import os
import time
from pathlib import Path

from fastseg.bench.harness import Found, exact, ratio, result
from fastseg.config import Size
from fastseg.errors import UsageError
from fastseg.pipelines.source import TrainSource, choose_loader
from fastseg.specs import make_plan, open_specs

POINTS = 20  # measurements per epoch


def resident_mib() -> float:
    """Memory of this process, in MiB.

    Raises:
        UsageError: the system does not say.
    """
    try:
        pages = int(Path("/proc/self/statm").read_text().split()[1])
    except OSError:
        raise UsageError("bench stream: reads the memory of a process from /proc, which only Linux has") from None
    return pages * os.sysconf("SC_PAGE_SIZE") / 2**20


def measure(*, data: str, size: Size, batch: int, rounds: int, device: str, quick: bool) -> Found:
    """Speed and memory over an epoch, at POINTS points or after each batch; `rounds` and `quick` do not matter."""
    crop = Size(*(max(1, side // 2) for side in size))
    config, specs = open_specs(data, splits=("train",), size=size, crop=crop, batch=batch, device=device)
    spec, _ = choose_loader("auto", specs["train"])
    plan = make_plan(config, spec, 1)
    batches = iter(TrainSource(spec, plan))
    next(batches)
    steps = max(4, len(spec.pairs) // batch)
    each = max(1, steps // POINTS)
    images, rates, sizes = [], [], []
    for point in range(1, steps // each + 1):
        start = time.perf_counter()
        for _ in range(each):
            next(batches)[0][0, 0, 0, 0].item()  # waits for a GPU to have made the batch
        rates.append(each * batch / (time.perf_counter() - start))
        images.append(point * each * batch)
        sizes.append(resident_mib())
    name, half = f"stream {spec.loader} {size}", len(rates) // 2
    rows = [exact(f"{name}, RSS after {n} images", "MiB", mib) for n, mib in zip(images, sizes, strict=True)]
    return Found(
        [result(name, "img/s", rates), *rows],
        [ratio(f"{name}, second half / first half", rates[-half:], rates[:half])],
        [
            {"name": f"{name}, img/s", "x": {"images": images}, "y": {"measured": rates}},
            {"name": f"{name}, RSS in MiB", "x": {"images": images}, "y": {"measured": sizes}},
        ],
    )
