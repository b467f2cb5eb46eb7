"""Starts a run's processes on this machine, and says what becomes of them."""

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
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click
import torch.distributed as dist

from fastseg.errors import FastsegError, first_line
from fastseg.workers import LAUNCHER, PID, verdicts

if TYPE_CHECKING:
    from torch.distributed.launcher.api import LaunchConfig

# torch's agent passes these on to the workers; by default it dies of the last two and leaves them behind.
SIGNALS_TO_WORKERS = ("SIGTERM", "SIGINT", "SIGHUP", "SIGQUIT", "SIGUSR1", "SIGUSR2")
RESTARTS = 3


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
    from torch.distributed.elastic.multiprocessing.api import SignalException
    from torch.distributed.elastic.multiprocessing.errors import ChildFailedError
    from torch.distributed.elastic.rendezvous.api import RendezvousError
    from torch.distributed.launcher.api import elastic_launch

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
        config = _configured(processes, nodes, endpoint, timeout, folder)
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


def _configured(processes: int, nodes: int, endpoint: str | None, timeout: int, folder: str) -> "LaunchConfig":
    """What torch's agent is told; its arguments are those of `launch`."""
    from torch.distributed.elastic.multiprocessing import DefaultLogsSpecs
    from torch.distributed.launcher.api import LaunchConfig

    # Seconds that workers have to save after a signal; torch 2.11 knows no such thing, and waits for half as long.
    patience: dict[str, Any] = (
        {"shutdown_timeout": 60} if "shutdown_timeout" in LaunchConfig.__dataclass_fields__ else {}
    )
    # What is ignored, such as SIGHUP under `nohup`, stays so: the agent would end of it.
    heard = [name for name in SIGNALS_TO_WORKERS if signal.getsignal(signal.Signals[name]) is not signal.SIG_IGN]
    return LaunchConfig(
        min_nodes=nodes,
        max_nodes=nodes,
        nproc_per_node=processes,
        run_id="fastseg",
        rdzv_backend="c10d",
        rdzv_endpoint=endpoint or "localhost:0",
        rdzv_configs={"join_timeout": timeout, "read_timeout": min(timeout, 60)},
        max_restarts=RESTARTS,
        monitor_interval=0.5,
        signals_to_handle=",".join(heard),
        logs_specs=DefaultLogsSpecs(log_dir=folder),
        **patience,
    )


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
        asked: list[int] = []
        while len(asked) < 2:
            number = os.read(reader, 1)[0]
            # SIGUSR2 is a worker's; a terminal that closes sends SIGHUP, and so does its shell.
            if number != signal.SIGUSR2 and not (number == signal.SIGHUP and number in asked):
                asked.append(number)
        click.echo(f"fastseg: {_ended(number)}", err=True)
        shutil.rmtree(folder, ignore_errors=True)
        os._exit(128 + number)

    threading.Thread(target=watch, daemon=True, name="signals").start()
