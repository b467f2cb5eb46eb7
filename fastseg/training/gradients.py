"""What travels between processes in a step, and when: the numbers that a model of scaling starts from."""

import time
from typing import Any

import torch
from torch import nn
from torch.nn.parallel import DistributedDataParallel


def traffic(wrapped: nn.Module) -> dict[str, Any]:
    """Bytes of gradients per step, and of each bucket that they are sent in; nothing where there is one process."""
    if not isinstance(wrapped, DistributedDataParallel):
        return {}
    found = wrapped._get_ddp_logging_data()
    # torch cuts its buckets anew after the first step, in the order in which gradients were ready.
    sizes = found.get("rebuilt_bucket_sizes") or found["bucket_sizes"]
    return {
        "gradient_bytes": found["total_parameter_size_bytes"],
        "bucket_bytes": [int(size) for size in str(sizes).split(",")],
    }


class BackwardClock:
    """Times one backward pass of a wrapped model, bucket by bucket, as a context around a whole optimiser step.

    A bucket is sent as soon as the last of its gradients is there. To be used after the first step, when torch has cut
    the buckets that it stays with.
    """

    def __init__(self, wrapped: nn.Module) -> None:
        self.wrapped = wrapped
        self._marks: list[tuple[int, Any]] = []  # bytes of the gradient that was ready then; 0 as backward begins
        self._device = next(wrapped.parameters()).device

    def _mark(self, nbytes: int) -> None:
        if self._device.type == "cuda":
            event = torch.cuda.Event(enable_timing=True)
            event.record()
            self._marks.append((nbytes, event))
        else:
            self._marks.append((nbytes, time.perf_counter()))

    def __enter__(self) -> "BackwardClock":
        self._hooks = [self.wrapped.register_forward_hook(lambda *_: self._mark(0))]
        self._hooks += [
            parameter.register_post_accumulate_grad_hook(lambda p: self._mark(p.numel() * p.element_size()))
            for parameter in self.wrapped.parameters()
            if parameter.requires_grad
        ]
        return self

    def __exit__(self, *_: object) -> None:
        for hook in self._hooks:
            hook.remove()

    def milliseconds(self) -> list[float]:
        """From the end of the last forward pass to the moment when each bucket was full, in the order of `traffic`."""
        begin = max(i for i, (nbytes, _) in enumerate(self._marks) if not nbytes)
        start, marks = self._marks[begin][1], self._marks[begin + 1 :]
        times, nbytes = [], 0
        ends = iter(traffic(self.wrapped)["bucket_bytes"])
        end = next(ends)
        for size, mark in marks:
            nbytes += size
            if nbytes == end:
                times.append(self._between(start, mark))
                nbytes, end = 0, next(ends, -1)
        return times

    def _between(self, start: Any, mark: Any) -> float:
        if self._device.type == "cpu":
            return 1e3 * (mark - start)
        mark.synchronize()
        return start.elapsed_time(mark)
