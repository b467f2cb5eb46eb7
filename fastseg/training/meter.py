"""The clocks and counters of a log interval, and how long the ranges of a step take, measured in passing over one."""

import contextlib
import time
from collections.abc import Iterator
from typing import Any, NamedTuple

import torch

from fastseg.pipelines.growing import GrowingSource
from fastseg.pipelines.source import Batch
from fastseg.ranges import annotate, shown_by

RANGES = ("data wait", "sum of weights", "forward", "loss", "backward", "replay", "exchange", "optimiser")
TIMED_LINE = 2  # the log line whose interval is timed range by range: the first has all that warms up


class Interval(NamedTuple):
    """What was measured since the log line before.

    Attributes:
        steps: that were taken.
        data_wait: the share of the seconds that went by waiting for batches.
        ranges: seconds of each of RANGES, where this interval was timed range by range.
    """

    seconds: float
    steps: int
    data_wait: float
    decoded_per_s: float
    ranges: dict[str, float] | None


class Meter:
    """Measures log intervals, as a context around the steps; one of them range by range.

    Args:
        source: whose batches are waited for.
        device: whose work the ranges hold.
        step: how many steps are done.
        ranges: False leaves them to a profiler, which names the same.
    """

    def __init__(self, source: GrowingSource, device: torch.device, step: int, *, ranges: bool) -> None:
        self.source, self._clock, self._timed = source, RangeClock(device), ranges
        self.first, self.lines = step, 0
        self.validation_seconds = 0.0  # of the last one
        self.warned = False  # of data that hold training back
        self.restart(step)

    def __enter__(self) -> "Meter":
        return self

    def __exit__(self, *_: object) -> None:
        self._clock.close()

    def restart(self, step: int) -> None:
        """Begin an interval after so many steps; what has gone by since the last one is no part of it."""
        self._start, self._step = time.perf_counter(), step
        self._waited, self._decoded = 0.0, self.source.decoded

    def next(self, batches: Iterator[Batch]) -> Batch:
        """The next batch; how long it took to come is noted."""
        before = time.perf_counter()
        with annotate("data wait"):
            batch = next(batches)
        self._waited += time.perf_counter() - before
        return batch

    def read(self, step: int) -> Interval:
        """The interval that ends after so many steps."""
        self.lines += 1
        seconds = time.perf_counter() - self._start
        decoded = self.source.decoded - self._decoded
        ranges = self._clock.end() if self._timed and self.lines == TIMED_LINE else None
        if self._timed and self.lines == TIMED_LINE - 1:
            self._clock.begin()
        return Interval(seconds, step - self._step, self._waited / seconds, decoded / seconds, ranges)


class RangeClock:
    """Sums the time of RANGES as `ranges.annotate` names them: of the GPU's work by events, on a CPU by the clock.

    From `begin` to `end` or `close`. Ranges inside ranges are not told apart. Nothing waits for the GPU before the end.
    """

    def __init__(self, device: torch.device) -> None:
        self._on_gpu = device.type == "cuda"
        self._marks: list[tuple[str, Any, Any]] = []
        self._open = contextlib.ExitStack()

    def close(self) -> None:
        """Stop, wherever it is."""
        self._open.close()

    def begin(self) -> None:
        """Time the ranges from now on."""
        self._open.enter_context(shown_by(self._show))

    def _now(self) -> Any:
        if not self._on_gpu:
            return time.perf_counter()
        event = torch.cuda.Event(enable_timing=True)
        event.record()
        return event

    @contextlib.contextmanager
    def _show(self, name: str) -> Iterator[None]:
        if name not in RANGES:
            yield
            return
        start = self._now()
        yield
        self._marks.append((name, start, self._now()))

    def end(self) -> dict[str, float]:
        """Stop, and give the seconds of each range, in the order of RANGES."""
        self._open.close()
        if self._on_gpu:
            torch.cuda.synchronize()
        times = dict.fromkeys(RANGES, 0.0)
        for name, start, end in self._marks:
            times[name] += start.elapsed_time(end) / 1e3 if self._on_gpu else end - start
        return times
