"""How long the parts of a training step take, measured in passing over one log interval of a run."""

import contextlib
import time
from collections.abc import Iterator
from typing import Any

import torch

PARTS = ("data wait", "sum of weights", "forward", "loss", "backward", "optimiser")


class PartsClock:
    """Sums the time of PARTS as `ranges.stage` names them: of the GPU's work by events, on a CPU by the clock.

    Parts inside parts are not told apart. Nothing waits for the GPU until `seconds` is asked for.
    """

    def __init__(self, device: torch.device) -> None:
        self._on_gpu = device.type == "cuda"
        self._marks: list[tuple[str, Any, Any]] = []

    def _now(self) -> Any:
        if not self._on_gpu:
            return time.perf_counter()
        event = torch.cuda.Event(enable_timing=True)
        event.record()
        return event

    @contextlib.contextmanager
    def show(self, name: str) -> Iterator[None]:
        """Around a part; see `ranges.shown_by`."""
        if name not in PARTS:
            yield
            return
        start = self._now()
        yield
        self._marks.append((name, start, self._now()))

    def seconds(self) -> dict[str, float]:
        """By part, in the order of PARTS."""
        if self._on_gpu:
            torch.cuda.synchronize()
        times = dict.fromkeys(PARTS, 0.0)
        for name, start, end in self._marks:
            times[name] += start.elapsed_time(end) / 1e3 if self._on_gpu else end - start
        return times
