"""Processes and devices: who we are among how many, on which device, and how a run's processes are started.

One process per device. Whatever starts them (fastseg itself, torchrun, a cluster) sets RANK, WORLD_SIZE and LOCAL_RANK,
as torch.distributed reads them; without these a run is one process.
"""

import contextlib
import os
import sys
from collections.abc import Sequence
from dataclasses import dataclass

import torch
import torch.distributed as dist
from torch import nn

from fastseg.environment import cores
from fastseg.errors import FastsegError, UsageError


@dataclass(frozen=True)
class World:
    """This process among all: its rank, how many there are, and its device."""

    rank: int
    size: int
    device: torch.device

    @property
    def is_main(self) -> bool:
        """True in the one process that writes files and talks."""
        return self.rank == 0

    def sum(self, tensor: torch.Tensor) -> torch.Tensor:
        """The sum over all processes, in place."""
        if self.size > 1:
            dist.all_reduce(tensor)
        return tensor

    def sync_buffers(self, model: nn.Module) -> None:
        """Rank 0's batch-norm statistics for all: each rank has its own, and one set is evaluated and saved."""
        if self.size > 1:
            for buffer in model.buffers():
                dist.broadcast(buffer, 0)

    def wrap(self, model: nn.Module, accumulate: int) -> nn.Module:
        """The model under DistributedDataParallel, or as it is where there is one process."""
        if self.size == 1:
            return model
        return nn.parallel.DistributedDataParallel(
            model,
            device_ids=[self.device] if self.device.type == "cuda" else None,
            gradient_as_bucket_view=True,
            # `no_sync` under a static graph trips an assertion in torch 2.14's reducer.
            static_graph=accumulate == 1,
            forward_sync_buffers=False,
        )

    def gradient_sync(self, wrapped: nn.Module, last: bool) -> contextlib.AbstractContextManager:
        """Around a backward pass: gradients meet those of the other processes in the `last` pass of a step only."""
        if last or not isinstance(wrapped, nn.parallel.DistributedDataParallel):
            return contextlib.nullcontext()
        return wrapped.no_sync()


def choose_device(requested: str) -> tuple[str, str]:
    """ "cpu" or "cuda", and why.

    Raises:
        UsageError: a GPU was asked for and none can be used.
    """
    usable = torch.cuda.is_available()
    if requested == "cuda" and not usable:
        raise UsageError("--device cuda: torch sees no usable NVIDIA GPU here; use --device cpu")
    if requested != "auto":
        return requested, "as asked"
    return ("cuda", "a GPU is here") if usable else ("cpu", "no NVIDIA GPU is here")


def choose_dtype(requested: str, device: str) -> tuple[torch.dtype, str]:
    """The precision of convolutions and activations, and why; weights are fp32 in any case.

    Raises:
        UsageError: fp16 on a CPU, which is some thirty times slower there than fp32.
    """
    if device == "cpu":
        if requested == "fp16":
            raise UsageError("--dtype fp16: a CPU has no fast fp16; use --dtype auto, bf16 or fp32")
        # Without these instructions bf16 is emulated: 12 times slower than fp32 on an AVX2 machine.
        fast = torch.cpu._is_avx512_bf16_supported() or torch.cpu._is_amx_tile_supported()
        best, why = (
            ("bf16", "this CPU has bf16 instructions") if fast else ("fp32", "this CPU has no bf16 instructions")
        )
    else:
        major, minor = torch.cuda.get_device_capability()
        best = "bf16" if major >= 8 else "fp16" if major >= 7 else "fp32"
        why = f"the best of compute capability {major}.{minor}"
    if requested != "auto":
        best, why = requested, "as asked"
    return {"bf16": torch.bfloat16, "fp16": torch.float16, "fp32": torch.float32}[best], why


def join(requested_device: str, threads: int) -> tuple[World, str]:
    """Take this process's place: process group, device, CPU threads. Returns the world and why this device."""
    rank, size = int(os.environ.get("RANK", 0)), int(os.environ.get("WORLD_SIZE", 1))
    local_rank, local_size = int(os.environ.get("LOCAL_RANK", 0)), int(os.environ.get("LOCAL_WORLD_SIZE", size))
    kind, why = choose_device(requested_device)
    if kind == "cuda":
        if local_rank >= torch.cuda.device_count():
            raise UsageError(f"{local_size} processes on this machine, but {torch.cuda.device_count()} GPUs: use fewer")
        torch.cuda.set_device(local_rank)
        torch.backends.cudnn.benchmark = True
    torch.set_num_threads(threads or max(1, cores() // local_size))
    if size > 1 and not dist.is_initialized():
        dist.init_process_group("nccl" if kind == "cuda" else "gloo")
    device = torch.device(kind, local_rank) if kind == "cuda" else torch.device(kind)
    return World(rank, size, device), why


def leave() -> None:
    """Leave the process group, if there is one."""
    if dist.is_initialized():
        dist.destroy_process_group()


def is_worker() -> bool:
    """True in a process that a launcher has started as one of several."""
    return "RANK" in os.environ


def is_main() -> bool:
    """True in a run's one process, or in the first of several: the one that talks."""
    return os.environ.get("RANK", "0") == "0"


def check_gpus(wanted: int) -> None:
    """Raise UsageError where there are fewer GPUs than that."""
    found = torch.cuda.device_count() if torch.cuda.is_available() else 0
    if wanted > found:
        cure = f"use --gpus {found}" if found else "use --device cpu"
        raise UsageError(f"--gpus {wanted}: torch sees {found} usable NVIDIA GPUs here; {cure}")


def launch(processes: int, arguments: Sequence[str]) -> None:
    """Run `python -m fastseg ARGUMENTS` in that many processes on this machine, and wait for them.

    Raises:
        FastsegError: one of them failed (it has said why).
    """
    from torch.distributed.elastic.multiprocessing.api import SignalException
    from torch.distributed.elastic.multiprocessing.errors import ChildFailedError
    from torch.distributed.launcher.api import LaunchConfig, elastic_launch

    config = LaunchConfig(
        min_nodes=1,
        max_nodes=1,
        nproc_per_node=processes,
        rdzv_backend="c10d",
        rdzv_endpoint="localhost:0",
        max_restarts=0,
    )
    try:
        elastic_launch(config, sys.executable)("-m", "fastseg", *arguments)
    except ChildFailedError as error:
        rank, failure = error.get_first_failure()
        raise FastsegError(f"process {rank} of {processes} failed with exit code {failure.exitcode}") from None
    except SignalException as error:
        raise FastsegError(f"stopped by {error.sigval.name}; go on with --resume and --run") from None
