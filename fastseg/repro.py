"""`fastseg repro RUN`: train a run's first steps again, in one process, from its folder, and compare loss by loss.

A run is its configuration, its data and this code: on one process, and on two, the same machine gives the same bits.
"""

import contextlib
import json
import tempfile
from collections.abc import Collection
from pathlib import Path
from typing import Any

from fastseg import config as configs
from fastseg.environment import environment
from fastseg.errors import UsageError
from fastseg.network import admit
from fastseg.runs import read_log
from fastseg.specs import refuse_other_data

# Relative difference of the loss over a log interval that sums rounded in another order explain.
SPREAD = 0.01
# Of environment.json: what may change the last bits.
MATTERS = ("fastseg", "commit", "torch", "processor", "gpus", "threads", "cuda", "cudnn", "processes")


class _EnoughError(Exception):
    """All the steps that were asked for are done."""


def repro(
    run: Path, steps: int | None, *, data: str | None = None, network: str | Collection[str] = ()
) -> dict[str, Any]:
    """Train `steps` steps of a run again (None: all that its log has) and return what `fastseg repro --json` prints.

    `verdict` is "the same", "within spread" or "different"; `first_difference` is the step of the first log line whose
    loss is not the same to the last bit.

    Args:
        data: where the run's data is now; None: where it was.
        network: of the run where that is not SegNet, "package.module:function", whose module is imported.

    Raises:
        UsageError: no run, fewer steps than a log line takes, or another network. FastsegError: other data than the run
            had.
    """
    from fastseg.training import train

    if not (run / "config.toml").is_file():
        raise UsageError(f"repro: {run} holds no run (no config.toml)")
    config = configs.read(run / "config.toml")
    admit(config.model, network, f"repro: {run}")
    config = configs.override(config, {} if data is None else {"data.path": data})
    events = read_log(run)
    old = {event["step"]: event["loss"] for event in events if event["event"] == "train" and event["loss"] is not None}
    if any(event["event"] == "start" and event["step"] for event in events):
        raise UsageError(f"repro: {run} was resumed; what it ran on in between is not in its folder")
    last = min(steps or max(old, default=0), max(old, default=0))
    if not [step for step in old if step <= last]:
        raise UsageError(f"repro: {run}: no log line up to step {last}; give --steps {min(old, default=0)} or more")
    refuse_other_data(run, config, "repro" if data is None else "repro --data")
    end = max(step for step in old if step <= last)

    def enough(step: int) -> None:
        # Not train.max_steps, which would shorten the learning rate's schedule too.
        if step == end:
            raise _EnoughError

    with tempfile.TemporaryDirectory(prefix="fastseg-repro-") as folder:
        with contextlib.suppress(_EnoughError):
            train(config, Path(folder) / "run", after_step=enough)
        lines = [event for event in read_log(Path(folder) / "run") if event["event"] == "train"]
    new = {event["step"]: event["loss"] for event in lines}
    compared = [(step, old[step], new[step]) for step in sorted(old) if step <= end and step in new]
    differ = [(step, abs(a - b) / max(abs(a), 1e-12)) for step, a, b in compared if a != b]
    worst = max((share for _, share in differ), default=0.0)
    before = json.loads((run / "environment.json").read_text(encoding="utf-8"))
    # Batch norm sees each process's images alone: another number of processes is another run.
    before["processes"] = next(event["world"] for event in events if event["event"] == "start")
    now = environment() | {"processes": 1}
    return {
        "run": str(run),
        "steps": end,
        "compared": len(compared),
        "verdict": "the same" if not differ else "within spread" if worst <= SPREAD else "different",
        "first_difference": differ[0][0] if differ else None,
        "largest_difference": worst,
        "changed": {name: [before.get(name), now[name]] for name in MATTERS if before.get(name) != now[name]},
    }
