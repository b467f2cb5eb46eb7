"""Processes and devices: who we are among how many, on which device, and how a run's processes are started.

One process per device. Whatever starts them (fastseg itself, torchrun, SLURM's srun) says so in the environment;
without that a run is one process. Gradients travel over NCCL between GPUs and gloo between CPUs; what else processes
tell one another between steps goes through gloo groups on the CPU, so that nobody waits for a GPU to hear it.
"""

import contextlib
import datetime
import logging
import os
import shutil
import signal
import socket
import sys
import tempfile
import threading
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import click
import torch
import torch.distributed as dist
from torch import nn

from fastseg.config import Runtime
from fastseg.environment import cores
from fastseg.errors import FastsegError, LostError, UsageError, first_line
from fastseg.memory import keep_freed
from fastseg.place import LAUNCHER, PID, Place, place, slurm_meeting_point, verdicts

# torch's agent passes these on to the workers; by default it dies of the last two and leaves them behind.
SIGNALS_TO_WORKERS = "SIGTERM,SIGINT,SIGHUP,SIGQUIT,SIGUSR1,SIGUSR2"
RESTARTS = 3
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


def join(runtime: Runtime) -> tuple[World, str]:
    """Take this process's place: process groups, device, CPU threads. Returns the world and why this device.

    Raises:
        UsageError: fewer GPUs than processes. FastsegError: no NCCL. LostError: the processes do not meet.
    """
    mine = place() or Place(0, 1, 0, 1)
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
        if runtime.deterministic:
            os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")  # before cuBLAS is first used
            torch.use_deterministic_algorithms(True)
    else:
        keep_freed()
    torch.set_num_threads(runtime.threads or max(1, cores() // mine.local_size))
    if mine.size == 1:
        return World(0, 1, device), why
    return _meet(mine, device, runtime.collective_timeout), why


def _meet(mine: Place, device: torch.device, timeout: int) -> World:
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
    return World(mine.rank, mine.size, device, side, store, timeout)


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


def launch(
    processes: int,
    arguments: Sequence[str],
    *,
    nodes: int = 1,
    endpoint: str | None = None,
    timeout: int = 600,
    under: Sequence[str] = (),
) -> int:
    """Run `python -m fastseg ARGUMENTS` in that many processes on this machine, and wait for them.

    torch's elastic agent starts them, all of them again when one fails (at most RESTARTS times), and passes signals on.

    Args:
        nodes: machines that take part, each with its own launcher.
        endpoint: HOST:PORT where they meet; needed for several.
        timeout: seconds to wait for the other machines.
        under: a command, such as a profiler's, that runs each of them.

    Returns:
        0, or the exit code of the error that a worker has printed; 128 + N where signal N left no time to save.

    Raises:
        FastsegError: a process failed too often (it has said why), or the machines did not meet.
    """
    from torch.distributed.elastic.multiprocessing import DefaultLogsSpecs
    from torch.distributed.elastic.multiprocessing.api import SignalException
    from torch.distributed.elastic.multiprocessing.errors import ChildFailedError
    from torch.distributed.elastic.rendezvous.api import RendezvousError
    from torch.distributed.launcher.api import LaunchConfig, elastic_launch

    # Workers say what happened in a line of their own; the agent's tables of files and ranks would bury it.
    for name in logging.root.manager.loggerDict:
        if name.startswith("torch.distributed.elastic"):
            logging.getLogger(name).setLevel(logging.CRITICAL)
    os.environ.setdefault("TORCH_CPP_LOG_LEVEL", "ERROR")  # no C++ stack traces of connections that ended
    # torch's agents share one store among all starts of the workers, with the addresses of the processes before in it.
    os.environ["TORCH_DISABLE_SHARE_RDZV_TCP_STORE"] = "1"
    with tempfile.TemporaryDirectory(prefix="fastseg-") as folder, contextlib.ExitStack() as last_things:
        os.environ[LAUNCHER] = folder
        last_things.callback(os.environ.pop, LAUNCHER)  # what is said afterwards is not a worker's
        (Path(folder) / PID).write_text(str(os.getpid()))
        config = LaunchConfig(
            min_nodes=nodes,
            max_nodes=nodes,
            nproc_per_node=processes,
            run_id="fastseg",
            rdzv_backend="c10d",
            rdzv_endpoint=endpoint or "localhost:0",
            rdzv_configs={"join_timeout": timeout, "read_timeout": min(timeout, 60)},
            max_restarts=RESTARTS,
            monitor_interval=0.5,
            signals_to_handle=SIGNALS_TO_WORKERS,
            shutdown_timeout=60,
            logs_specs=DefaultLogsSpecs(log_dir=folder),
        )
        _end_at_the_second_signal(folder)
        if endpoint is not None:
            _refuse_foreign_server(endpoint)
            click.echo(f"waiting for {nodes} machines at {endpoint}, at most {timeout} s", err=True)
        try:
            command = [*under, sys.executable, "-m", "fastseg", *arguments]
            elastic_launch(config, command[0])(*command[1:])
        except (ChildFailedError, SignalException) as error:
            if found := verdicts(Path(folder)):
                return found[0][0]
            if isinstance(error, SignalException):
                click.echo(f"fastseg: {_ended(error.sigval)}", err=True)
                return 128 + error.sigval
            rank, failure = error.get_first_failure()
            raise FastsegError(
                f"process {rank} failed with exit code {failure.exitcode}, after {RESTARTS} restarts of all processes"
            ) from None
        except (RendezvousError, dist.DistError) as error:
            raise FastsegError(
                f"--rdzv-endpoint {endpoint}: {nodes} machines could not meet there ({first_line(error)}); "
                "give HOST:PORT of one of them, a port that is free there and open to the others"
            ) from None
    return 0


def _refuse_foreign_server(endpoint: str) -> None:
    """Raise FastsegError where another program has the port; torch would wait for ever for it to speak."""
    host, _, port = endpoint.rpartition(":")
    try:
        socket.create_connection((host, int(port)), timeout=5).close()
    except (OSError, ValueError):
        return  # nobody is there yet, or torch says what is wrong

    def connect() -> None:
        with contextlib.suppress(dist.DistError):
            dist.TCPStore(host, int(port), is_master=False, timeout=datetime.timedelta(seconds=5))

    attempt = threading.Thread(target=connect, daemon=True)
    attempt.start()
    attempt.join(10)
    if attempt.is_alive():
        raise FastsegError(f"--rdzv-endpoint {endpoint}: another program uses this port; give a free one")


def _ended(number: int) -> str:
    return f"{signal.Signals(number).name}: ended without saving; the last checkpoint counts, if there is one"


def _end_at_the_second_signal(folder: str) -> None:
    """Leave when a second signal comes, and with us the workers; torch's agent would wait for them again."""
    reader, writer = os.pipe()
    os.set_blocking(writer, False)
    signal.set_wakeup_fd(writer)

    def watch() -> None:
        asked = 0
        while asked < 2:
            number = os.read(reader, 1)[0]
            asked += number != signal.SIGUSR2  # a worker's
        click.echo(f"fastseg: {_ended(number)}", err=True)
        shutil.rmtree(folder, ignore_errors=True)
        os._exit(128 + number)

    threading.Thread(target=watch, daemon=True, name="signals").start()
