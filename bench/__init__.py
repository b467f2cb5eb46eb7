"""`fastseg bench`: throughput of the data path, the operators and the training step on this machine."""

import functools
from collections.abc import Callable, Sequence
from typing import Any

from fastseg.bench import data as bench_data
from fastseg.bench import kernels as bench_kernels
from fastseg.bench import ladder as bench_ladder
from fastseg.bench import model as bench_model
from fastseg.bench import scaling as bench_scaling
from fastseg.bench import stream as bench_stream
from fastseg.bench.harness import WARMUP, Found, document
from fastseg.distributed import choose_device
from fastseg.errors import UsageError

BENCHES = {
    "ladder": bench_ladder.measure,
    "data": bench_data.measure,
    "kernels": bench_kernels.measure,
    "model": bench_model.measure,
    "stream": bench_stream.measure,
}
IN_ALL = ("ladder", "data", "kernels", "model")


def run(
    what: str,
    *,
    data: str,
    size: tuple[int, int] | None,
    batch: int,
    rounds: int,
    device: str,
    quick: bool = False,
    counts: Sequence[int] = (1,),
) -> dict[str, Any]:
    """Measure and return the document that `fastseg bench --json` prints.

    Args:
        size: of the network's input; None takes the published 360x480 on a GPU, and 120x160 on a CPU.
        counts: numbers of processes, for `scaling`.
        quick: shorter measurements, three of each, and not of everything.

    Raises:
        UsageError: no such bench.
    """
    if what not in (*BENCHES, "scaling", "all"):
        raise UsageError(f"bench {what}: choose one of {', '.join(BENCHES)}, scaling, compare, all")
    kind, _ = choose_device(device)
    size = size or (bench_kernels.PUBLISHED if kind == "cuda" else (120, 160))
    rounds = 3 if quick else rounds
    benches: dict[str, Callable[..., Found]] = {
        **BENCHES,
        "scaling": functools.partial(bench_scaling.measure, counts=counts),
    }
    found = [
        bench(data=data, size=size, batch=batch, rounds=rounds, device=device, quick=quick)
        for name, bench in benches.items()
        if what == name or (what == "all" and name in IN_ALL)
    ]
    protocol = {"bench": what, "data": data, "size": "{}x{}".format(*size), "batch": batch, "device": kind}
    return document(found, protocol | {"rounds": rounds, "warmup_rounds": WARMUP, "quick": quick})
