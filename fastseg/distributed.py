"""Processes and devices: who we are among how many, and on which device.

One process per device. Whatever starts them (`launcher`, torchrun, SLURM's srun) says so in the environment;
without that a run is one process. Gradients travel over NCCL between GPUs and gloo between CPUs; what else processes
tell one another between steps goes through gloo groups on the CPU, so that nobody waits for a GPU to hear it.
"""

import contextlib
import datetime
import os
import time
from collections.abc import Iterator
from dataclasses import dataclass
from typing import NamedTuple

import torch
import torch.distributed as dist
from torch import nn

from fastseg.config import Runtime
from fastseg.environment import Threads, share_threads
from fastseg.errors import FastsegError, LostError, UsageError, first_line
from fastseg.memory import keep_freed
from fastseg.texts import brief
from fastseg.workers import Worker, slurm_meeting_point, this_worker

TF32_CAPABILITY = (8, 0)
DTYPES = {"bf16": torch.bfloat16, "fp16": torch.float16, "fp32": torch.float32}
# Seconds for all that still live to notice a failure that one of them has noticed.
ROLL_CALL = 5.0


@dataclass(frozen=True)
class World:
    """This process among all: its rank, how many there are, its device.

    `side` is for what processes tell one another between steps, `store` for finding out who is missing.
    """

    rank: int
    size: int
    device: torch.device
    threads: Threads = Threads(1, 1)  # of this process
    side: dist.ProcessGroup | None = None
    store: dist.Store | None = None
    timeout: int = 600  # seconds that processes wait for one another

    @property
    def is_main(self) -> bool:
        """True in the one process that writes files and talks."""
        return self.rank == 0

    def sum(self, tensor: torch.Tensor) -> torch.Tensor:
        """The sum over all processes, in place."""
        if self.size > 1:
            dist.all_reduce(tensor)
        return tensor

    def gather(self, value: float) -> list[float]:
        """The value of each process, in the order of ranks."""
        if self.size == 1:
            return [value]
        found = [torch.zeros((), dtype=torch.float64) for _ in range(self.size)]
        dist.all_gather(found, torch.tensor(value, dtype=torch.float64), group=self.side)
        return [float(other) for other in found]

    def barrier(self) -> None:
        """Wait until all processes are here."""
        if self.size > 1:
            dist.barrier(group=self.side)

    def sync_buffers(self, model: nn.Module) -> None:
        """Rank 0's batch-norm statistics for all: each rank has its own, and one set is evaluated and saved."""
        if self.size > 1:
            for buffer in model.buffers():
                dist.broadcast(buffer, 0)

    def sync_weights(self, model: nn.Module) -> None:
        """Rank 0's weights for all, before the first step."""
        if self.size > 1:
            for parameter in model.parameters():
                dist.broadcast(parameter.detach(), 0)

    def wrap(self, model: nn.Module, accumulate: int, bucket_mib: int, compress: str) -> nn.Module:
        """The model under DistributedDataParallel, or as it is where there is one process."""
        if self.size == 1:
            return model
        wrapped = nn.parallel.DistributedDataParallel(
            model,
            device_ids=[self.device] if self.device.type == "cuda" else None,
            gradient_as_bucket_view=True,
            # torch makes the first bucket small (1 MiB) by itself, so that communication begins early.
            bucket_cap_mb=bucket_mib,
            # `no_sync` under a static graph trips an assertion in torch 2.14's reducer.
            static_graph=accumulate == 1,
            forward_sync_buffers=False,
        )
        if compress == "bf16":
            from torch.distributed.algorithms.ddp_comm_hooks.default_hooks import bf16_compress_hook

            wrapped.register_comm_hook(None, bf16_compress_hook)
        return wrapped

    def gradient_sync(self, wrapped: nn.Module, last: bool) -> contextlib.AbstractContextManager:
        """Around a backward pass: gradients meet those of the other processes in the `last` pass of a step only."""
        if last or not isinstance(wrapped, nn.parallel.DistributedDataParallel):
            return contextlib.nullcontext()
        return wrapped.no_sync()

    @contextlib.contextmanager
    def named_failures(self) -> Iterator[None]:
        """Around work with collectives: one that fails is one line that says which ranks were missing.

        Raises:
            LostError: a process is gone or was too late, or a GPU failed.
        """
        try:
            yield
        except torch.AcceleratorError as error:
            raise LostError(f"the GPU failed: {first_line(error)}") from error
        except RuntimeError as error:
            if self.size == 1 or not (isinstance(error, dist.DistError) or "gloo" in str(error)):
                raise
            absent = self.call_roll()
            missing = f"rank{'s' * (len(absent) > 1)} {', '.join(map(str, absent))}"
            if not absent:
                raise LostError(f"the connection between processes failed: {first_line(error)}") from error
            if "timed out" in str(error).lower():
                raise LostError(
                    f"waited {self.timeout} s in vain for {missing}; if it is only slow, set runtime.collective_timeout"
                ) from error
            raise LostError(f"lost the connection to {missing}") from error

    def call_roll(self) -> list[int]:
        """Ranks that have not found out, within a few seconds, that a collective failed: they are gone, or busy."""
        assert self.store is not None
        absent = list(range(self.size))
        end = time.monotonic() + ROLL_CALL
        try:
            self.store.set(f"roll/{self.rank}", "here")
            while absent and time.monotonic() < end:
                absent = [rank for rank in absent if not self.store.check([f"roll/{rank}"])]
                time.sleep(0.05)
        except (dist.DistError, RuntimeError):
            return [0]  # it keeps the store
        return absent


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


def device_of(device: str | torch.device) -> torch.device:
    """A device as users of Python name it: "auto", or a CPU or GPU as torch takes them.

    Raises:
        UsageError: it is not there, or nobody's name.
    """
    if device == "auto":
        return torch.device(choose_device("auto")[0])
    try:
        found = torch.device(device)
    except (RuntimeError, TypeError):
        found = None
    if found is None or found.type not in ("cpu", "cuda"):
        raise UsageError(f"device {brief(device)}: auto, cpu, cuda or cuda:0")
    choose_device(found.type)
    if found.type == "cuda" and (found.index or 0) >= torch.cuda.device_count():
        raise UsageError(f"device {device}: this machine has {torch.cuda.device_count()} GPUs, counted from 0")
    return found


class Precision(NamedTuple):
    """Of convolutions and activations: their dtype, its name ("tf32" is float32 in all but convolutions), and why."""

    dtype: torch.dtype
    name: str
    why: str


def choose_dtype(requested: str, device: str) -> Precision:
    """The precision of convolutions and activations, and why; weights are fp32 in any case.

    Raises:
        UsageError: fp16 on a CPU, which is some thirty times slower there than fp32.
    """
    if requested == "tf32":
        tf32 = device == "cuda" and torch.cuda.get_device_capability() >= TF32_CAPABILITY
        lacks = "a CPU" if device == "cpu" else "this GPU"
        why = "as asked: convolutions keep 10 bits of a number" if tf32 else f"{lacks} has no TF32"
        return Precision(torch.float32, "tf32" if tf32 else "float32", why)
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
    dtype = DTYPES[best]
    return Precision(dtype, str(dtype).removeprefix("torch."), why)


def dtype_name(dtype: str | torch.dtype) -> str:
    """What `choose_dtype` calls one of torch's dtypes; a name stays as it is.

    Raises:
        UsageError: a dtype that no network computes in.
    """
    if dtype in ("auto", "tf32", *DTYPES):
        return str(dtype)
    found = next((name for name, each in DTYPES.items() if each == dtype), None)
    if found is None:
        raise UsageError(f"dtype {brief(dtype)}: auto, bf16, fp16 or fp32, or torch's of these")
    return found


def join(runtime: Runtime) -> tuple[World, str]:
    """Take this process's place: process groups, device, CPU threads. Returns the world and why this device.

    Raises:
        UsageError: fewer GPUs than processes. FastsegError: no NCCL. LostError: the processes do not meet.
    """
    mine = this_worker() or Worker(0, 1, 0, 1)
    kind, why = choose_device(runtime.device)
    device = torch.device(kind)
    if kind == "cuda":
        found = torch.cuda.device_count()
        # SLURM may show each of its tasks a GPU of its own, and no other.
        device = torch.device(kind, 0 if found == 1 and mine.by_slurm else mine.local_rank)
        if device.index >= found:
            raise UsageError(f"{mine.local_size} processes on this machine, but {found} GPUs: use fewer")
        torch.cuda.set_device(device)
        torch.backends.cudnn.benchmark = not runtime.deterministic
        # Left alone, torch computes fp32 convolutions in TF32.
        torch.backends.cudnn.allow_tf32 = runtime.dtype == "tf32"
        if runtime.deterministic:
            os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")  # before cuBLAS is first used
            torch.use_deterministic_algorithms(True)
    else:
        keep_freed()
    threads = share_threads(runtime.threads, mine.local_size, gpu=kind == "cuda")
    torch.set_num_threads(threads.computing)
    if mine.size == 1:
        return World(0, 1, device, threads), why
    return _meet(mine, device, threads, runtime.collective_timeout), why


def _meet(mine: Worker, device: torch.device, threads: Threads, timeout: int) -> World:
    """The world of several processes, once all of them are there."""
    if device.type == "cuda" and not dist.is_nccl_available():
        raise FastsegError(
            "several GPUs need NCCL, and this torch was built without it: install one with, or use one GPU"
        )
    if mine.by_slurm:
        os.environ |= slurm_meeting_point()
    limit = datetime.timedelta(seconds=timeout)
    try:
        store, _, _ = next(dist.rendezvous("env://", mine.rank, mine.size, timeout=limit))
        # torchrun's store outlives a restart, with the addresses of the processes before. Machines count differently.
        one_machine = os.environ.get("GROUP_WORLD_SIZE") == "1"
        attempt = os.environ.get("TORCHELASTIC_RESTART_COUNT", "0") if one_machine else "any"
        store = dist.PrefixStore(f"attempt-{attempt}", store)
        dist.init_process_group(
            "nccl" if device.type == "cuda" else "gloo",
            store=store,
            rank=mine.rank,
            world_size=mine.size,
            # NCCL's own time-out ends the process without a word; the side group's comes first and names who was late.
            timeout=limit * (2 if device.type == "cuda" else 1),
            device_id=device if device.type == "cuda" else None,
        )
        side = dist.new_group(backend="gloo", timeout=limit)
        assert isinstance(side, dist.ProcessGroup)  # all ranks are members
    except (dist.DistError, RuntimeError, ValueError) as error:
        where = f"{os.environ.get('MASTER_ADDR')}:{os.environ.get('MASTER_PORT')}"
        raise LostError(f"{mine.size} processes could not meet at {where} ({first_line(error)})") from None
    return World(mine.rank, mine.size, device, threads, side, store, timeout)


def leave() -> None:
    """Leave the process group, if there is one."""
    if dist.is_initialized():
        dist.destroy_process_group()


def usable_gpus() -> int:
    """GPUs of this machine that torch can use."""
    return torch.cuda.device_count() if torch.cuda.is_available() else 0


def check_gpus(wanted: int) -> None:
    """Raise UsageError where there are fewer GPUs than that."""
    found = usable_gpus()
    if wanted > found:
        cure = f"use --gpus {found}" if found else "use --device cpu"
        raise UsageError(f"--gpus {wanted}: torch sees {found} usable NVIDIA GPUs here; {cure}")
