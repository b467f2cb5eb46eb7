"""Recording steps of a real run, with whichever profiler is there."""

import json
import os
import shutil
from contextlib import AbstractContextManager, ExitStack
from pathlib import Path
from typing import Any

import torch

from fastseg import runs
from fastseg.config import Config
from fastseg.errors import EndedError, FastsegError, StoppedError, UsageError
from fastseg.profiling.layout import LayoutAudit
from fastseg.profiling.summary import summarise
from fastseg.profiling.timeline import PREFIX, STEP, from_chrome, from_nsys
from fastseg.ranges import shown_by
from fastseg.workers import this_worker

# Set in processes that run under Nsight Systems.
UNDER_NSYS = "FASTSEG_UNDER_NSYS"
# One more step is watched for changes of layout, and one ends the run.
AFTERWARDS = 2


def choose_profiler(requested: str, device: str) -> tuple[str, str]:
    """ "nsys" or "torch", and why.

    Raises:
        UsageError: Nsight Systems was asked for and is not here.
    """
    here = shutil.which("nsys") is not None
    if requested == "nsys" and not here:
        raise UsageError("--profiler nsys: no nsys on the path; install Nsight Systems, or use --profiler torch")
    if requested != "auto":
        return requested, "as asked"
    if device != "cuda":
        return "torch", "there is no GPU to look into"
    return ("nsys", "Nsight Systems is here") if here else ("torch", "no nsys on the path")


def nsys_command(folder: Path, processes: int) -> list[str]:
    """What to put before the command of a process: one report for each, of what lies between start and stop."""
    rank = "%q{RANK}" if processes > 1 else "0"
    options = {
        "trace": "cuda,nvtx,osrt,cudnn,cublas",
        "sample": "none",
        "capture-range": "cudaProfilerApi",
        "capture-range-end": "stop",
        "cuda-graph-trace": "node",
        "export": "sqlite",
        "force-overwrite": "true",
        "output": f"{folder}/rank{rank}",
    }
    return ["nsys", "profile", *(f"--{name}={value}" for name, value in options.items())]


class Session:
    """Records steps `warmup` + 1 to `warmup` + `steps` of a run, as the `after_step` of `training.train`.

    The profiler is on a step earlier, which is not named: its own start-up is no part of what it shows.
    """

    def __init__(self, folder: Path, warmup: int, steps: int, *, device: str) -> None:
        mine = this_worker()
        self.path = folder / f"rank{mine.rank if mine else 0}"
        self.first, self.last = warmup, warmup + steps
        self.nsys = UNDER_NSYS in os.environ
        self.on_gpu = device == "cuda"
        self.audit = LayoutAudit()
        self.profiler: Any = None
        self._step: AbstractContextManager | None = None

    def __enter__(self) -> "Session":
        self._open = ExitStack()
        self._open.enter_context(shown_by(self._show))
        return self

    def __exit__(self, *_: object) -> None:
        self._open.close()

    def _show(self, name: str) -> AbstractContextManager:
        if self.nsys:
            return torch.cuda.nvtx.range(PREFIX + name)
        return torch.profiler.record_function(PREFIX + name)

    def __call__(self, done: int) -> None:
        if self._step:
            self._step.__exit__(None, None, None)
            self._step = None
        if done == self.first - 1:
            self._start()
        if self.first <= done < self.last:
            self._step = self._show(f"{STEP}{done + 1}")
            self._step.__enter__()
        if done == self.last:
            self._stop()
            self._open.enter_context(self.audit)
        if done == self.last + 1:
            self._open.close()
            rows = [
                {"where": where, "operator": operator, "change": change, "calls": calls}
                for (where, operator, change), calls in self.audit.counts.items()
            ]
            runs.write_json(self.path.with_suffix(".layout.json"), rows)

    def _start(self) -> None:
        if self.nsys:
            if self.on_gpu:
                torch.cuda.profiler.start()
            return
        kinds = [torch.profiler.ProfilerActivity.CPU]
        if self.on_gpu:
            kinds.append(torch.profiler.ProfilerActivity.CUDA)
        self.profiler = torch.profiler.profile(activities=kinds)
        self.profiler.start()

    def _stop(self) -> None:
        if self.on_gpu:
            torch.cuda.synchronize()
        if self.nsys:
            if self.on_gpu:
                torch.cuda.profiler.stop()
            return
        self.profiler.stop()
        self.profiler.export_chrome_trace(str(self.path.with_suffix(".json")))


def record(config: Config, folder: Path, warmup: int, steps: int) -> None:
    """Train so many steps and write what was seen of them into `folder`; the run itself leaves nothing behind.

    Raises:
        EndedError: a signal came. FastsegError: as `fastseg.training.train`.
    """
    from fastseg.distributed import choose_device
    from fastseg.training import train

    device, _ = choose_device(config.runtime.device)
    run = folder / "run"
    with Session(folder, warmup, steps, device=device) as session:
        try:
            train(config, run, after_step=session)
        except StoppedError as error:  # it names a folder that goes away
            raise EndedError(error.number) from None


def read(folder: Path) -> list[dict[str, Any]]:
    """A summary for each rank whose record is in `folder`, with its layout audit.

    Raises:
        FastsegError: there is none.
    """
    found = []
    for audit in sorted(folder.glob("rank*.layout.json"), key=lambda p: int(p.name[4:].partition(".")[0])):
        rank = audit.name.partition(".")[0]
        report, trace = folder / f"{rank}.sqlite", folder / f"{rank}.json"
        if not (report.is_file() or trace.is_file()):
            raise FastsegError(f"{folder}: the profiler wrote nothing for {rank}; use --profiler torch")
        timeline = from_nsys(report) if report.is_file() else from_chrome(trace)
        layout = json.loads(audit.read_text(encoding="utf-8"))
        found.append({"rank": int(rank[4:]), **summarise(timeline), "layout_changes": layout})
    if not found:
        raise FastsegError(f"{folder}: nothing was recorded there")
    return found
