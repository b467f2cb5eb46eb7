"""`fastseg bench`: throughput of the data path, the operators and the training step on this machine."""

import functools
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch

from fastseg.bench import accuracy as bench_accuracy
from fastseg.bench import data as bench_data
from fastseg.bench import fill as bench_fill
from fastseg.bench import host as bench_host
from fastseg.bench import kernels as bench_kernels
from fastseg.bench import ladder as bench_ladder
from fastseg.bench import model as bench_model
from fastseg.bench import scaling as bench_scaling
from fastseg.bench import stream as bench_stream
from fastseg.bench.harness import WARMUP, Found, document
from fastseg.config import Runtime, parse_size
from fastseg.data.synth import FORMATS
from fastseg.distributed import choose_device, join
from fastseg.environment import environment
from fastseg.errors import UsageError

BENCHES: dict[str, Callable[..., Found]] = {
    "ladder": bench_ladder.measure,
    "data": bench_data.measure,
    "fill": bench_fill.measure,
    "kernels": bench_kernels.measure,
    "host": bench_host.measure,
    "model": bench_model.measure,
    "stream": bench_stream.measure,
}
# What stands for several of them; "" is `fastseg bench` alone.
SEVERAL = {"": ("ladder", "scaling"), "all": ("ladder", "data", "kernels", "host", "model", "scaling")}
# The others measure SegNet's operators and layers, or no network.
OF_ANY_NETWORK = ("", "ladder", "scaling")


def default_counts(device: str) -> tuple[int, ...]:
    """1, 2, 4 ... of the GPUs that are there; one process without."""
    gpus = torch.cuda.device_count() if device == "cuda" else 1
    return tuple(2**n for n in range(gpus.bit_length()))


def run(
    what: str,
    *,
    data: str,
    size: str | tuple[int, int] | None,
    batch: int,
    rounds: int,
    device: str,
    quick: bool = False,
    counts: Sequence[int] | None = None,
    accuracy: Mapping[str, Any] | None = None,
    minutes: float | None = None,
    image_format: str | None = None,
    network: str | None = None,
) -> dict[str, Any]:
    """Measure and return the document that `fastseg bench --json` prints.

    Args:
        size: of the network's input, as (height, width) or text; None takes the published 360x480 on a GPU, and 120x160
            on a CPU.
        counts: numbers of processes, for `scaling`; None takes 1, 2, 4 ... of the GPUs that are there, or one process.
        accuracy: what else `bench.accuracy.measure` takes.
        quick: shorter measurements, three of each, and not of everything.
        minutes: that `data` may take; None for 3.
        image_format: "png" or "jpeg", of the scenes that `data` reads as "synth"; those in JPEG are larger, and so is
            their size where none is given. None for "png".
        network: as `model.network`, of `ladder` and `scaling`; None: SegNet.

    Raises:
        UsageError: no such bench, or one that has no such option.
    """
    if what not in (*BENCHES, "scaling", "accuracy", *SEVERAL):
        raise UsageError(f"bench {what}: choose one of {', '.join(BENCHES)}, scaling, accuracy, compare, all")
    if minutes is not None and (what not in ("data", "all") or minutes <= 0):
        raise UsageError(
            f"--minutes {minutes:g}: more than 0, and of bench data or all, not of bench {what or 'alone'}"
        )
    if image_format is not None:
        if image_format not in FORMATS:
            raise UsageError(f"--format {image_format}: choose one of {', '.join(FORMATS)}")
        if what != "data" or data != "synth":
            raise UsageError(f"--format {image_format}: is of bench data --data synth; other files are what they are")
    if network is not None and what not in OF_ANY_NETWORK:
        raise UsageError(
            f"--network {network}: bench {what} measures SegNet; ladder and scaling, which are bench alone, take others"
        )
    kind, _ = choose_device(device)
    counts = counts or default_counts(kind)
    size = size or (bench_data.JPEG_INPUT if image_format == "jpeg" else None)
    size = parse_size(size or (bench_kernels.PUBLISHED if kind == "cuda" else "120x160"))
    rounds = accuracy["seeds"] if accuracy else 3 if quick else rounds
    benches: dict[str, Callable[..., Found]] = {
        **BENCHES,
        "data": functools.partial(BENCHES["data"], minutes=minutes or bench_data.MINUTES, image_format=image_format),
        "scaling": functools.partial(bench_scaling.measure, counts=counts, network=network),
        "accuracy": lambda *, data, size, **_: bench_accuracy.measure(
            data=data, size=size, device=kind, **(accuracy or {})
        ),
    }
    if network is not None:
        benches["ladder"] = functools.partial(BENCHES["ladder"], network=network)
    # Steps and batches as training has them: its threads, cuDNN's search, memory kept; single precision as `baseline`.
    join(Runtime(device=device, dtype="tf32"))
    measured_on = environment()  # a commit made meanwhile is not what is measured
    found = [
        bench(data=data, size=size, batch=batch, rounds=rounds, device=device, quick=quick)
        for name, bench in benches.items()
        if what == name or name in SEVERAL.get(what, ())
    ]
    protocol = {
        "bench": what or "ladder, scaling",
        "data": data,
        "size": str(size),
        "batch": batch,
        "device": kind,
        **({"network": network} if network else {}),
    }
    return document(found, protocol | {"rounds": rounds, "warmup_rounds": WARMUP, "quick": quick}, measured_on)
