"""How much memory a training step takes, by the allocator's own account; and memory that steps use again."""

import ctypes
from collections.abc import Callable, Iterable

import torch

M_TRIM_THRESHOLD, M_MMAP_MAX, INT_MAX = -1, -4, 2**31 - 1  # malloc.h's and limits.h's


def peak_bytes(work: Callable[[], object], held: Iterable[torch.Tensor], device: torch.device) -> int:
    """The most bytes that tensors on the device took while `work` ran: those `held` all along, and what came on top.

    What libraries take for themselves (cuDNN's and oneDNN's workspaces in part, CUDA's context) is not seen.
    """
    return sum(tensor.nbytes for tensor in held) + _growth(work, device)


def momenta(optimizer: torch.optim.Optimizer) -> list[torch.Tensor]:
    """The tensors that an optimiser keeps, which it makes in its first step."""
    return [value for state in optimizer.state.values() for value in state.values() if isinstance(value, torch.Tensor)]


def keep_freed() -> None:
    """Let glibc keep memory that is freed, for the next step's tensors; other C libraries have no such switch.

    By default glibc maps large blocks anew each time and returns the top of its heap, so that a training step on a CPU
    writes to tens of thousands of fresh pages, each of which the kernel first clears: 10 to 20 % of a step from 120x160
    on (bench/LOG.md). The process then stays as large as it was at most (mallopt(3): M_TRIM_THRESHOLD, M_MMAP_MAX).
    """
    if mallopt := getattr(ctypes.CDLL(None), "mallopt", None):
        mallopt(M_TRIM_THRESHOLD, INT_MAX)
        mallopt(M_MMAP_MAX, 0)


def _growth(work: Callable[[], object], device: torch.device) -> int:
    if device.type == "cuda":
        torch.cuda.synchronize(device)
        before = torch.cuda.memory_allocated(device)
        torch.cuda.reset_peak_memory_stats(device)
        work()
        torch.cuda.synchronize(device)
        return torch.cuda.max_memory_allocated(device) - before
    # A CPU's allocator keeps no such count; the profiler is told of each of its actions.
    cpu = torch.profiler.ProfilerActivity.CPU
    with torch.profiler.profile(activities=[cpu], profile_memory=True) as profiler:
        work()
    kineto = profiler.profiler.kineto_results
    actions = sorted((e.start_ns(), e.nbytes()) for e in kineto.events() if e.name() == "[memory]")
    now = most = 0
    for _, nbytes in actions:
        now += nbytes
        most = max(most, now)
    return most
