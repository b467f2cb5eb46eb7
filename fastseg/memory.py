"""How much memory a training step takes, by the allocator's own account."""

from collections.abc import Callable, Iterable

import torch


def peak_bytes(work: Callable[[], object], held: Iterable[torch.Tensor], device: torch.device) -> int:
    """The most bytes that tensors on the device took while `work` ran: those `held` all along, and what came on top.

    What libraries take for themselves (cuDNN's and oneDNN's workspaces in part, CUDA's context) is not seen.
    """
    return sum(tensor.nbytes for tensor in held) + _growth(work, device)


def momenta(optimizer: torch.optim.Optimizer) -> list[torch.Tensor]:
    """The tensors that an optimiser keeps, which it makes in its first step."""
    return [value for state in optimizer.state.values() for value in state.values() if isinstance(value, torch.Tensor)]


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
