"""`fastseg bench host`: how long the host takes to ask for an operator or a step, which holds back a GPU on small maps.

Kernels are not launched: what is left is Python and PyTorch around them. Maps are so small that PyTorch's own
operators, which do compute, take hardly longer than their calls. All of it runs on a CPU, on one thread, so that any
machine can measure it; a launch itself, some microseconds more on a GPU's machine, is in neither side.
"""

import contextlib
import time
from collections.abc import Callable, Iterator
from unittest import mock

import torch

from fastseg.bench.drill import RATE, random_batch, step_on
from fastseg.bench.harness import Found, ratio, result, take_turns
from fastseg.bench.kernels import cases
from fastseg.config import Size
from fastseg.kernels import launch

CPU = torch.device("cpu")
SMALL, CHANNELS = Size(4, 4), 8  # an operator's map
STEP = Size(32, 32)  # of the whole step's images: the deepest maps are 2x2
CALLS, STEPS = 200, 4  # per measurement, of an operator and of the step
WHOLE = "step"


def _always(tensor: torch.Tensor) -> bool:
    return True


def _nothing(*arguments: object, **options: object) -> None:
    return None


@contextlib.contextmanager
def launches_stubbed() -> Iterator[None]:
    """Within this context operators take their way to Triton's kernels, and none is launched."""
    import triton

    with (
        mock.patch.object(launch, "on_triton", new=_always),
        mock.patch.object(triton.JITFunction, "run", new=_nothing),
    ):
        yield


@contextlib.contextmanager
def one_thread() -> Iterator[None]:
    """Torch computes on the calling thread alone; numbers too small for the processor's fast path become 0."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    torch.set_flush_denormal(True)  # maps that no kernel has written hold anything
    try:
        yield
    finally:
        torch.set_flush_denormal(False)
        torch.set_num_threads(before)


def timed(call: Callable[[], object], calls: int, *, stubbed: bool) -> Callable[[], float]:
    """Measures microseconds per call."""

    def measure() -> float:
        with launches_stubbed() if stubbed else contextlib.nullcontext():
            start = time.perf_counter()
            for _ in range(calls):
                call()
            return (time.perf_counter() - start) / calls * 1e6

    return measure


def whole_step(*, fused: bool) -> Callable[[], object]:
    """A whole training step of a network as deep as the published one, but narrow: as many calls, less to compute."""
    step = step_on(CPU, torch.float32, 1, fused=fused, channels=(CHANNELS,) * 5)
    images, labels = random_batch(CPU, torch.float32, STEP, 1)
    return lambda: step.step(images, labels, RATE)


def measure(*, data: str, size: Size, batch: int, rounds: int, device: str, quick: bool) -> Found:
    """Microseconds of the host per call, and how many times those of PyTorch's own operators: less is better."""
    ways: dict[str, tuple[Callable[[], object], Callable[[], object], int]] = {
        name: (case.fused, case.plain, CALLS)
        for name, case in cases(CPU, torch.float32, SMALL, 1, channels=CHANNELS).items()
    }
    ways[WHOLE] = whole_step(fused=True), whole_step(fused=False), STEPS
    results, ratios = [], []
    with one_thread():
        for name, (fused, plain, calls) in ways.items():
            turns = {"fused": timed(fused, calls, stubbed=True), "torch": timed(plain, calls, stubbed=False)}
            samples = take_turns(turns, rounds)
            results += [result(f"host {name}, {way}", "us", figures) for way, figures in samples.items()]
            ratios.append(ratio(f"host_{name}_vs_torch", samples["fused"], samples["torch"], better="lower"))
    return Found(results, ratios)
