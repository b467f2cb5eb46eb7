"""How long the parts of a training step take, measured in passing over one log interval of a run."""

import contextlib
import time
from collections.abc import Iterator
from typing import Any

import torch

from fastseg.ranges import shown_by

PARTS = ("data wait", "sum of weights", "forward", "loss", "backward", "optimiser")


class PartsClock:
    """Sums the time of PARTS as `ranges.stage` names them: of the GPU's work by events, on a CPU by the clock.

    From `begin` to `end`, and no longer than the context of this clock. Parts inside parts are not told apart. Nothing
    waits for the GPU before the end.
    """

    def __init__(self, device: torch.device) -> None:
        self._on_gpu = device.type == "cuda"
        self._marks: list[tuple[str, Any, Any]] = []
        self._open = contextlib.ExitStack()

    def __enter__(self) -> "PartsClock":
        return self

    def __exit__(self, *_: object) -> None:
        self._open.close()

    def begin(self) -> None:
        """Time the parts from now on."""
        self._open.enter_context(shown_by(self._show))

    def _now(self) -> Any:
        if not self._on_gpu:
            return time.perf_counter()
        event = torch.cuda.Event(enable_timing=True)
        event.record()
        return event

    @contextlib.contextmanager
    def _show(self, name: str) -> Iterator[None]:
        if name not in PARTS:
            yield
            return
        start = self._now()
        yield
        self._marks.append((name, start, self._now()))

    def end(self) -> dict[str, float]:
        """Stop, and give the seconds of each part, in the order of PARTS."""
        self._open.close()
        if self._on_gpu:
            torch.cuda.synchronize()
        times = dict.fromkeys(PARTS, 0.0)
        for name, start, end in self._marks:
            times[name] += start.elapsed_time(end) / 1e3 if self._on_gpu else end - start
        return times
