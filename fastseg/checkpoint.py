"""Checkpoints: one file that holds all it takes to go on or to predict, written whole or not at all.

Schema 1: schema, step, weights ("model"; batch-norm statistics included), averaged weights ("ema" or None), optimiser
kind and state, gradient scaler, best score and how many validations ago, training seconds, CPU threads, the resolved
config, class names and colours, mean and std of the input, the training split's digest, the number of processes, the
step of the last log line and each one's loss since. The file loads with `weights_only=True`. No random state is in it,
since nothing in a step draws a number: the sample plan is a function of seed and step, the learning rate of the step.
"""

import os
import threading
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch

from fastseg import config as configs
from fastseg.errors import FastsegError, first_line
from fastseg.model import SegNet
from fastseg.pipelines.source import MEAN, STD
from fastseg.runs import whole

SCHEMA = 1


def save(path: Path, state: Mapping[str, Any]) -> None:
    """Write a checkpoint, flush it to the disk, and only then put it in the place of the one before."""
    try:
        with whole(path) as partial, partial.open("wb") as file:
            torch.save({"schema": SCHEMA, "mean": list(MEAN), "std": list(STD), **state}, file)
            file.flush()
            os.fsync(file.fileno())
    except (OSError, RuntimeError) as error:
        # torch's zip writer puts a RuntimeError of its own over a full disk's OSError.
        reason = str(error.__context__ or error).splitlines()[0]
        raise FastsegError(f"{path} could not be written ({reason}); the checkpoint before it is kept") from None


class Writer:
    """Writes checkpoints in a thread of its own, one at a time, while training goes on.

    A plain file from one process, and not torch.distributed.checkpoint: under DistributedDataParallel every process
    holds all of the weights, so that there is nothing to gather, and one file is what `--resume` and users handle.
    """

    def __init__(self) -> None:
        self._thread: threading.Thread | None = None
        self._error: FastsegError | None = None

    def submit(self, path: Path, state: Mapping[str, Any]) -> None:
        """Copy `state` to memory of its own, and write it as soon as the one before is written."""
        self.join()
        self._thread = threading.Thread(target=self._write, args=(path, _copied(state)), name="checkpoint")
        self._thread.start()

    def _write(self, path: Path, state: Mapping[str, Any]) -> None:
        try:
            save(path, state)
        except FastsegError as error:
            self._error = error

    def join(self) -> None:
        """Wait until all is written.

        Raises:
            FastsegError: it could not be.
        """
        if self._thread is not None:
            self._thread.join()
            self._thread = None
        if self._error is not None:
            error, self._error = self._error, None
            raise error


def _copied(value: Any) -> Any:
    """The same tree with every tensor copied to the CPU."""
    if isinstance(value, torch.Tensor):
        return value.detach().to("cpu", copy=True)
    if isinstance(value, Mapping):
        return {key: _copied(part) for key, part in value.items()}
    if isinstance(value, (list, tuple)):
        return type(value)(_copied(part) for part in value)
    return value


def read(path: Path) -> dict[str, Any]:
    """A checkpoint's contents, on the CPU.

    Raises:
        FastsegError: no such file, not a checkpoint of fastseg, or of another schema.
    """
    try:
        state = torch.load(path, map_location="cpu", weights_only=True)
    except FileNotFoundError:
        raise FastsegError(f"{path}: no such checkpoint; a run keeps them in RUN/checkpoints/") from None
    except Exception as error:  # torch.load fails in many ways on a file that is none of its own
        raise FastsegError(f"{path}: not a readable checkpoint ({first_line(error)})") from None
    if not isinstance(state, dict) or "schema" not in state:
        raise FastsegError(f"{path}: not a checkpoint of fastseg (for a torchvision VGG's weights use --init FILE)")
    if state["schema"] != SCHEMA:
        raise FastsegError(f"{path}: checkpoint schema {state['schema']}, this fastseg reads {SCHEMA}")
    return state


def build_model(state: Mapping[str, Any]) -> SegNet:
    """The network of a checkpoint with its weights: the averaged ones where the run kept an average."""
    model = configs.from_dict(state["config"], "checkpoint").model
    network = SegNet(len(state["classes"]), model.backbone, model.depth)
    network.load_state_dict(state["ema"] or state["model"])
    return network.to(memory_format=torch.channels_last).eval()


def load_optimizer(optimizer: torch.optim.Optimizer, state: dict[str, Any]) -> None:
    """Restore an optimiser; momentum buffers get their parameters' strides, which the fused kernels rely on."""
    optimizer.load_state_dict(state)
    for parameter, values in optimizer.state.items():
        buffer = values.get("momentum_buffer")
        if isinstance(buffer, torch.Tensor) and buffer.stride() != parameter.stride():
            values["momentum_buffer"] = torch.empty_like(parameter).copy_(buffer)
