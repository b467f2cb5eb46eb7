"""`fastseg bench scaling`: training throughput per number of processes, beside what arithmetic makes one expect.

Each point is `fastseg train` itself, on its own data path, started as a user starts it; its figures are those of its
log, without the first lines. Weak scaling keeps the batch of each process, strong scaling that of all together.

The expectation, named as such and never called a measurement: a step takes as long as with one process, and as what
its gradients need on the link longer than there is time. A ring sends 2 (n - 1) / n of all gradient bytes through each
link (Patarasuk and Yuan, "Bandwidth optimal all-reduce algorithms for clusters of workstations", 2009). Buckets travel
while the backward pass goes on, so that only what does not fit beside it, and the last bucket, adds to the step.
"""

import functools
import statistics
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path

from fastseg.bench.harness import Found, Result, exact, result
from fastseg.bench.model import CLASSES
from fastseg.bench.roofline import GPUS, layers, seconds
from fastseg.config import Runtime, Size
from fastseg.distributed import choose_device
from fastseg.environment import cores
from fastseg.errors import FastsegError, UsageError
from fastseg.model import SegNet
from fastseg.runs import read_log

BEGINNING = 2  # log lines in which everything warms up
BACKWARD = 2 / 3  # of a step: two of a convolution's three products
PUBLISHED = 3.25  # the baseline's 8 V100 against one, in img/s

# The 8 x H100 that the expectation is printed for: NVLink 4 of an HGX board, one way, and how much of the roofline a
# step is taken to reach. Neither has been measured here.
LINK, LINK_NAME = 450e9, "NVLink 4, each way (NVIDIA H100 data sheet)"
REACHED = 0.5
CARD, CARDS = "NVIDIA H100 80GB HBM3", 8


def expected_step(step: float, processes: int, gradient_bytes: int, link: float, bucket_bytes: int) -> float:
    """Seconds of a step of so many processes, where one alone takes `step` seconds."""
    if processes == 1:
        return step
    share = 2 * (processes - 1) / processes / link  # seconds per byte
    beside = max(0.0, gradient_bytes * share - BACKWARD * step)
    return step + max(beside, min(bucket_bytes, gradient_bytes) * share)


def train(options: list[str], steps: int, log_every: int) -> list[float] | None:
    """Images per second of each log line of a run but the first ones; None where memory ran out.

    Raises:
        FastsegError: the run failed, with the line that it ended with.
    """
    with tempfile.TemporaryDirectory(prefix="fastseg-bench-") as folder:
        run = Path(folder) / "run"
        settings = {"train.max_steps": steps, "runtime.log_every": log_every}
        # Validations are not what is measured, nor are the recipe's smaller first images.
        settings |= {"train.epochs": 100_000, "train.validate_every": 100_000, "train.grow_from": 1}
        sets = [word for key, value in settings.items() for word in ("--set", f"{key}={value}")]
        command = [sys.executable, "-m", "fastseg", "train", *options, *sets, "--run", str(run)]
        done = subprocess.run(command, capture_output=True, text=True, check=False)
        if done.returncode:
            if "out of memory" in done.stderr.lower():
                return None
            last = (done.stderr.strip().splitlines() or ["nothing was said"])[-1]
            raise FastsegError(f"bench scaling: {' '.join(options)}: {last.removeprefix('fastseg: ')}")
        lines = [event for event in read_log(run) if event["event"] == "train"]
    return [line["img_per_s"] for line in lines[BEGINNING:]]


def expectation(size: Size, batch: int) -> list[Result]:
    """What CARDS times CARD might do, after what that assumes: a prediction, not a measurement."""
    parts = layers(size, batch, classes=CLASSES, value_bytes=2, fused=True)
    step = sum(time for time, _ in seconds(parts, GPUS[CARD], "bfloat16")) / REACHED
    gradients = 4 * sum(w.numel() for w in SegNet(CLASSES).parameters())
    bucket = Runtime().bucket_mib * 2**20
    together = expected_step(step, CARDS, gradients, LINK, bucket)
    name = f"{CARD}, bf16, batch {batch} each"
    return [
        exact(f"assumed for the prediction: {CARD}, share of its roofline", "%", 100 * REACHED),
        exact(f"assumed for the prediction: {LINK_NAME}", "GB/s", LINK / 1e9),
        exact("assumed for the prediction: gradients per step, ring all-reduce", "MB", gradients / 1e6),
        exact(f"PREDICTED: 1 x {name}", "img/s", batch / step),
        exact(f"PREDICTED: {CARDS} x {name}", "img/s", CARDS * batch / together),
        exact(f"PREDICTED: {CARDS} x {name}, efficiency", "%", 100 * step / together),
        exact("published: 8 V100 against one", "x", PUBLISHED),
    ]


def measure(
    *,
    data: str,
    size: Size,
    batch: int,
    rounds: int,
    device: str,
    counts: Sequence[int],
    quick: bool,
    network: str | None = None,
) -> Found:
    """Throughput and efficiency per number of processes, and what 8 H100 might do with SegNet.

    Args:
        network: as `model.network`; None: SegNet.

    Raises:
        UsageError: numbers of processes that do not begin with one and ascend.
    """
    if list(counts) != sorted(set(counts)) or counts[0] != 1:
        raise UsageError(f"bench scaling: {','.join(map(str, counts))}: give ascending numbers from 1 on: 1,2,4")
    on_gpu = choose_device(device)[0] == "cuda"
    log_every = 20 if on_gpu else 1
    steps = (BEGINNING + (3 if quick else rounds)) * log_every
    shown, most = str(size), counts[-1]

    @functools.cache  # weak and strong scaling share the last point
    def point(count: int, each: int) -> list[float] | None:
        processes = ["--gpus", str(count)] if on_gpu else ["--nproc", str(count), "--device", "cpu"]
        options = ["--data", data, "--recipe", "fast", "--size", shown, "--batch", str(each), *processes]
        options += ["--network", network] if network else []
        return train(options, steps, log_every)

    rows: list[Result] = []
    if not on_gpu and most > 1:
        rows.append(exact("all processes share these, which is no evidence for GPUs", "cores", cores()))
    curves = []
    for kind, batches in (
        ("weak", dict.fromkeys(counts, batch)),
        ("strong", {count: batch * most // count for count in counts if batch * most % count == 0}),
    ):
        speeds: dict[int, float] = {}
        for count, each in batches.items():
            figures, name = point(count, each), f"scaling {kind} {shown}, {count} x batch {each}"
            if figures is None:
                rows.append(exact(f"{name}: out of memory", "img/s", 0))
                continue
            speeds[count] = statistics.median(figures)
            rows.append(result(name, "img/s", figures))
            rows.append(exact(f"{name}, per process", "img/s", speeds[count] / count))
            if count > 1 and 1 in speeds:
                rows.append(exact(f"{name}, efficiency", "%", 100 * speeds[count] / speeds[1] / count))
        if speeds:
            first, speed = next(iter(speeds.items()))
            lines = {"measured": list(speeds.values()), "ideal": [speed / first * count for count in speeds]}
            if first == 1 and 8 in speeds:
                lines["V100, published for 1 and 8"] = [speed * (1 + (PUBLISHED - 1) / 7 * (n - 1)) for n in speeds]
            curves.append({"name": f"{kind} scaling {shown}, img/s", "x": {"processes": list(speeds)}, "y": lines})
    return Found([*rows, *([] if network else expectation(size, batch))], [], curves)
