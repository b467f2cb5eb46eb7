"""What travels between processes in a step, and when: the numbers that a model of scaling starts from."""

import time
from collections.abc import Iterable, Iterator
from typing import Any

import torch
from torch import nn
from torch.nn.parallel import DistributedDataParallel

from fastseg.distributed import World


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


def sum_gradients(parameters: Iterable[nn.Parameter], world: World, bucket_mib: int, compress: str) -> None:
    """Make each gradient the sum over processes, bucket by bucket, as DistributedDataParallel does during backward.

    Args:
        compress: "bf16" sends them in that precision.
    """
    for bucket in buckets([p.grad for p in parameters if p.grad is not None], bucket_mib * 2**20):
        maps = [_in_memory_order(gradient) for gradient in bucket]
        flat = torch.cat([gradient.reshape(-1) for gradient in maps])
        flat = world.sum(flat.bfloat16() if compress == "bf16" else flat).to(flat.dtype)
        sums = flat.split([gradient.numel() for gradient in maps])
        torch._foreach_copy_(maps, [part.view(gradient.shape) for part, gradient in zip(sums, maps, strict=True)])


def buckets(gradients: list[torch.Tensor], nbytes: int) -> Iterator[list[torch.Tensor]]:
    """The gradients in their order, in lists of at most so many bytes, or of one that is larger."""
    bucket: list[torch.Tensor] = []
    held = 0
    for gradient in gradients:
        size = gradient.numel() * gradient.element_size()
        if bucket and held + size > nbytes:
            yield bucket
            bucket, held = [], 0
        bucket.append(gradient)
        held += size
    if bucket:
        yield bucket


def _in_memory_order(gradient: torch.Tensor) -> torch.Tensor:
    """A view whose elements are neighbours as they lie in channels-last memory, the same way in all processes."""
    return gradient.permute(0, 2, 3, 1) if gradient.ndim == 4 else gradient


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
