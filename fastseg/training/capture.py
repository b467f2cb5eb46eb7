"""Forward, loss and backward of a micro-batch, captured once in a CUDA graph and replayed.

At small batches the host takes longer to ask for a step's kernels than the GPU to run them. A graph asks for all of
them at once: https://docs.pytorch.org/docs/stable/notes/cuda.html#cuda-graphs

What a graph holds is the kernels with their addresses. So its inputs are copied to where they were, its gradients are
always in the same memory, and nothing in it may hang on a number that Python has, or wait for the device. What changes
from step to step stays outside: the sum of weights, which all processes share, the gradient scaler's decision,
clipping, the learning rate, the optimiser, averaged weights.
"""

import contextlib
import gc
import time
from collections.abc import Callable, Iterator
from typing import NamedTuple, Protocol

import torch

from fastseg.errors import FastsegError, first_line
from fastseg.ranges import annotate, shown_by

# Passes of a shape that run as they are, before it is captured: cuDNN searches, Triton compiles, memory is found.
WARMUP = 3

Pass = Callable[[torch.Tensor, torch.Tensor, torch.Tensor], torch.Tensor]


class Graph(Protocol):
    """What a device can do again without being asked for each part of it."""

    def run(self, work: Callable[[], torch.Tensor]) -> torch.Tensor:
        """Run ordinary work where it can be captured later."""

    def capture(self, work: Callable[[], torch.Tensor]) -> torch.Tensor:
        """Remember what `work` asks of the device, which does nothing of it yet; where its result will be."""

    def replay(self) -> None:
        """Let the device do all of it, with what its inputs hold now."""

    def release(self) -> None:
        """Give its memory back."""


class CudaGraph:
    """A `Graph` of a GPU. Warming up, capturing and what autograd remembers of streams share one side stream."""

    def __init__(self) -> None:
        self._graph, self._stream = torch.cuda.CUDAGraph(), torch.cuda.Stream()

    def run(self, work: Callable[[], torch.Tensor]) -> torch.Tensor:
        """See `Graph`."""
        self._stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(self._stream):
            found = work()
        torch.cuda.current_stream().wait_stream(self._stream)
        return found

    def capture(self, work: Callable[[], torch.Tensor]) -> torch.Tensor:
        """See `Graph`. Other threads (DALI's, a checkpoint's) may use the GPU meanwhile: thread_local."""
        with (
            no_collector(),
            torch.cuda.graph(self._graph, stream=self._stream, capture_error_mode="thread_local"),
        ):
            return work()

    def replay(self) -> None:
        """See `Graph`."""
        self._graph.replay()

    def release(self) -> None:
        """See `Graph`."""
        torch.cuda.synchronize()
        self._graph.reset()


class Captured(NamedTuple):
    """What capturing took: for which shape of images, how many seconds, and the bytes that the graph holds."""

    shape: tuple[int, ...]
    seconds: float
    nbytes: int


class Passes:
    """Takes micro-batches' passes: as they are at first, then from a graph of their shape.

    There is one graph at a time. Another shape, as growing images have it, begins anew, and where its graph will be
    was that of the shape before.

    Args:
        work: one pass of images, labels and sum of weights; gives its part of the loss, and adds to the parameters'
            gradients. Nothing but the numbers in these tensors may differ from pass to pass of a shape.
        parameters: whose gradients it makes.
        must: whether a failure to capture is an error; else passes run as they are from then on.
    """

    def __init__(self, work: Pass, parameters: list[torch.nn.Parameter], *, must: bool) -> None:
        self._work, self._parameters, self._must = work, parameters, must
        self._captured: list[Captured] = []
        self._failure, self._told = "", False
        self._shape: tuple[int, ...] = ()
        self._count = 0  # of passes of that shape, one after the other
        self._graph = make_graph()
        self._inputs: list[torch.Tensor] = []
        self._gradients: list[torch.Tensor] = []  # none before the capture

    def __call__(
        self, images: torch.Tensor, labels: torch.Tensor, total: torch.Tensor, *, single: bool
    ) -> torch.Tensor:
        """A pass; its part of the loss.

        Args:
            single: it is the only one of its step: gradients need not outlive the next pass.
        """
        shape = tuple(images.shape)
        if shape != self._shape:
            self.release()
            self._shape, self._count, self._graph = shape, 0, make_graph()
        # Whoever watches operators wants to see them.
        if self._failure or torch._C._len_torch_dispatch_stack():
            return self._work(images, labels, total)
        self._count += 1
        if self._count <= WARMUP:
            return self._graph.run(lambda: self._work(images, labels, total))
        if not self._gradients and not self._capture(images, labels, total):
            return self._work(images, labels, total)
        with annotate("replay"):
            for kept, given in zip(self._inputs, (images, labels, total), strict=True):
                kept.copy_(given)
            self._graph.replay()
            self._hand_over(single)
        return self._part.clone()

    def warm_up(self, images: torch.Tensor, labels: torch.Tensor, total: torch.Tensor) -> torch.Tensor:
        """A pass as it is, of any shape, before the first that counts, where warm-up passes run."""
        return self._graph.run(lambda: self._work(images, labels, total))

    def _capture(self, images: torch.Tensor, labels: torch.Tensor, total: torch.Tensor) -> bool:
        """Capture a pass of this shape; False where that fails, and is not to be tried again.

        Raises:
            FastsegError: it failed, and must not.
        """
        start, before = time.perf_counter(), _reserved(images.device)
        kept = [parameter.grad for parameter in self._parameters]
        self._inputs = [torch.empty_like(given) for given in (images, labels, total)]
        for parameter in self._parameters:
            parameter.grad = None  # so that backward makes gradients in the graph's memory, and overwrites them there
        try:
            # Nobody times the parts of a pass that is captured: the clock's events would become parts of the graph.
            with shown_by(lambda name: contextlib.nullcontext()):
                self._part = self._graph.capture(lambda: self._work(*self._inputs))
            self._gradients = [p.grad for p in self._parameters if p.grad is not None]
            self._captured.append(
                Captured(tuple(images.shape), time.perf_counter() - start, _reserved(images.device) - before)
            )
        except RuntimeError as error:  # as CUDA's and PyTorch's errors are; kernels were compiled in warm-up passes
            # To end a capture that has failed fails too; what failed first says more.
            first = error.__context__ if isinstance(error.__context__, RuntimeError) else error
            self._failure = first_line(first)
            self.release()
            if self._must:
                cure = "use --set runtime.capture=auto"
                raise FastsegError(
                    f"runtime.capture = on: a pass cannot be captured ({self._failure}); {cure}"
                ) from None
        finally:
            for parameter, gradient in zip(self._parameters, kept, strict=True):
                parameter.grad = gradient
        return not self._failure

    def _hand_over(self, single: bool) -> None:
        """Give the parameters the gradients of the pass that was replayed, or add them to those of passes before."""
        if single:
            for parameter, gradient in zip(self._parameters, self._gradients, strict=True):
                parameter.grad = gradient
            return
        sums = [parameter.grad for parameter in self._parameters if parameter.grad is not None]
        if sums:
            torch._foreach_add_(sums, self._gradients)
            return
        sums = [torch.empty_like(gradient) for gradient in self._gradients]
        torch._foreach_copy_(sums, self._gradients)
        for parameter, gradient in zip(self._parameters, sums, strict=True):
            parameter.grad = gradient

    def news(self) -> tuple[list[Captured], str]:
        """What was captured since this was last asked, and why nothing is any more: "" where that is not new."""
        captured, failure = self._captured, "" if self._told else self._failure
        self._captured, self._told = [], bool(self._failure)
        return captured, failure

    def release(self) -> None:
        """Give the graph's memory back."""
        self._graph.release()
        self._inputs, self._gradients = [], []


@contextlib.contextmanager
def no_collector() -> Iterator[None]:
    """Within this context Python's garbage stays.

    An earlier graph that is garbage would else be given back at any moment, which is not allowed while another one is
    captured, and spoils that. To collect it before would take a third of a second, each time.
    """
    was_on = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if was_on:
            gc.enable()


def make_graph() -> Graph:
    """A graph of the current device."""
    return CudaGraph()


def _reserved(device: torch.device) -> int:
    """Bytes of a GPU that this process holds, without what it only keeps for later: capturing gives that back."""
    if device.type != "cuda":
        return 0
    torch.cuda.empty_cache()
    return torch.cuda.memory_reserved(device)
