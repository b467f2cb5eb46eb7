"""`fastseg bench`: throughput of the data path and of the training step on this machine."""

from typing import Any

from fastseg.bench import data as bench_data
from fastseg.bench import model as bench_model
from fastseg.bench.harness import document
from fastseg.errors import UsageError

BENCHES = {"data": bench_data.measure, "model": bench_model.measure}


def run(what: str, *, data: str, size: tuple[int, int], batch: int, rounds: int, device: str) -> dict[str, Any]:
    """Measure and return the document that `fastseg bench --json` prints.

    Raises:
        UsageError: no such bench.
    """
    if what not in (*BENCHES, "all"):
        raise UsageError(f"bench {what}: choose one of {', '.join(BENCHES)}, all")
    found = [
        measure(data=data, size=size, batch=batch, rounds=rounds, device=device)
        for name, measure in BENCHES.items()
        if what in (name, "all")
    ]
    return document([r for results, _ in found for r in results], [r for _, ratios in found for r in ratios])
