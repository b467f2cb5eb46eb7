"""Meta's SPDL: threads instead of processes, around albumentations and OpenCV, which leave Python's lock to decode.

SPDL's own decoders (spdl-io) need an FFmpeg of the system, which pip does not install.
"""

from collections.abc import Sequence
from typing import Any

from spdl.pipeline import PipelineBuilder

from fastseg.bench.harness import STUCK
from fastseg.bench.peers import Batches, collate, shuffled
from fastseg.bench.peers.albumentations_loader import Pairs
from fastseg.data.layouts import Pair


def batches(pairs: Sequence[Pair], size: tuple[int, int], batch: int, workers: int, augment: bool = True) -> Batches:
    """See `fastseg.bench.peers`; `workers` are threads that make samples, at least one. Another makes batches."""
    threads = max(1, workers)
    builder: Any = PipelineBuilder()  # its types want each stage's to be spelled out
    pipeline = (
        builder.add_source(shuffled(len(pairs)))
        .pipe(Pairs(pairs, size, augment).__getitem__, concurrency=threads)
        .aggregate(batch)
        .pipe(collate)
        .add_sink(2)
        .build(num_threads=threads + 1, max_failures=0)  # by default it drops what cannot be read
    )
    with pipeline.auto_stop():
        yield from pipeline.get_iterator(timeout=STUCK)
