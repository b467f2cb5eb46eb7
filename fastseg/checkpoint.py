"""Checkpoints: one file that holds all it takes to go on or to predict, written whole or not at all.

Schema 2: schema, how far the run is (`training.run.Progress`), weights ("model"; batch-norm statistics included),
averaged weights ("ema" or None), optimiser kind and state, gradient scaler, CPU threads and number of processes, the
resolved config, class names and colours, mean and std of the input, the training split's digest, names and contents of
its images. The file loads with `weights_only=True`. No random state is in it, since nothing in a step draws a number:
the sample plan is a function of seed and step, the learning rate of the step.
"""

import errno
import os
import shutil
import threading
from collections.abc import Callable, Collection, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch

from fastseg import config as configs
from fastseg.config import Config
from fastseg.data.classes import UNKNOWN
from fastseg.errors import FastsegError, UsageError, first_line
from fastseg.model import FIRST_WEIGHTS, load_weights, plain_names, read_tensors
from fastseg.network import Network, admit, build, weights_of_scores
from fastseg.pipelines.source import MEAN, STD
from fastseg.runs import checkpoint_of, whole
from fastseg.texts import brief, user_path

SCHEMA = 2


def save(path: Path, state: Mapping[str, Any]) -> None:
    """Write a checkpoint, flush it to the disk, and only then put it in the place of the one before.

    Raises:
        FastsegError: the disk is full, or fails; the checkpoint before it is still there.
    """
    try:
        with whole(path) as partial, partial.open("wb") as file:
            torch.save({"schema": SCHEMA, "mean": list(MEAN), "std": list(STD), **state}, file)
            file.flush()
            os.fsync(file.fileno())
    except (OSError, RuntimeError) as error:
        # torch's zip writer puts a RuntimeError of its own over a full disk's OSError.
        cause = error if isinstance(error, OSError) else error.__context__
        reason = (isinstance(cause, OSError) and cause.strerror) or first_line(error)
        if isinstance(cause, OSError) and cause.errno == errno.ENOSPC:
            free = shutil.disk_usage(next(folder for folder in path.parents if folder.exists())).free
            reason = f"{reason}; it needs {_megabytes(_nbytes(state))}, {_megabytes(free)} are free"
        raise FastsegError(
            f"{path} could not be written ({reason}); the checkpoint before it is kept: mend that, then go on with "
            "fastseg train --resume"
        ) from None


def _nbytes(state: Any) -> int:
    """Bytes of the tensors in a tree, which are all but some kilobytes of its checkpoint."""
    if isinstance(state, torch.Tensor):
        return state.nbytes
    parts = state.values() if isinstance(state, Mapping) else state if isinstance(state, (list, tuple)) else ()
    return sum(map(_nbytes, parts))


def _megabytes(nbytes: int) -> str:
    return f"{nbytes / 1e6:.{1 if nbytes < 1e7 else 0}f} MB"


class Writer:
    """Writes checkpoints in a thread of its own, one at a time, while training goes on.

    A plain file from one process, and not torch.distributed.checkpoint: under DistributedDataParallel every process
    holds all of the weights, so that there is nothing to gather, and one file is what `--resume` and users handle.
    """

    def __init__(self) -> None:
        self._thread: threading.Thread | None = None
        self._error: BaseException | None = None

    def submit(self, path: Path, state: Mapping[str, Any]) -> None:
        """Copy `state` to memory of its own, and write it as soon as the one before is written."""
        self.join()
        self._thread = threading.Thread(target=self._write, args=(path, _copied(state)), name="checkpoint")
        self._thread.start()

    def _write(self, path: Path, state: Mapping[str, Any]) -> None:
        try:
            save(path, state)
        except BaseException as error:  # `join` raises it, where it can end the run
            self._error = error

    def join(self) -> None:
        """Wait until all is written.

        Raises:
            FastsegError: it could not be. Anything else that `save` raised is raised here too.
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
        state = read_tensors(path, str(path))
    except FileNotFoundError:
        raise FastsegError(f"{path}: no such checkpoint; a run keeps them in RUN/checkpoints/") from None
    if not _is_checkpoint(state):
        raise FastsegError(f"{path}: not a checkpoint of fastseg (for a torchvision VGG's weights use --init FILE)")
    return _checked(state, str(path))


def _is_checkpoint(state: Any) -> bool:
    return isinstance(state, dict) and "schema" in state


def _checked(state: dict[str, Any], path: str) -> dict[str, Any]:
    """A checkpoint that holds what each use of one relies on."""
    if type(state["schema"]) is not int or state["schema"] != SCHEMA:
        raise FastsegError(f"{path}: checkpoint schema {brief(state['schema'])}, this fastseg reads {SCHEMA}")
    wrong = [key for key, fits in _CONTENTS.items() if key not in state or not fits(state[key])]
    if wrong or len(state["colors"]) != len(state["classes"]):
        wrong = wrong or ["color for each class"]
        raise FastsegError(f"{path}: damaged, or not written by fastseg: no {', '.join(wrong)} as it should be in it")
    return state


def _is_weights(value: Any) -> bool:
    return isinstance(value, dict) and all(isinstance(name, str) for name in value)


# What each use of a checkpoint relies on; `training.state.restore` looks at what else it takes to go on with a run.
_CONTENTS: dict[str, Callable[[Any], bool]] = {
    "progress": lambda value: isinstance(value, dict) and type(value.get("step")) is int and value["step"] >= 0,
    "model": _is_weights,
    "ema": lambda value: value is None or _is_weights(value),
    "config": lambda value: _is_weights(value) and all(map(_is_weights, value.values())),
    "classes": lambda value: isinstance(value, list) and 0 < len(value) < UNKNOWN and all(map(_is_text, value)),
    "colors": lambda value: isinstance(value, list) and all(map(_is_color, value)),
    "trained_on": lambda value: isinstance(value, dict) and _are_images(value),
}


def _is_text(value: Any) -> bool:
    return isinstance(value, str)


def _is_color(value: Any) -> bool:
    return isinstance(value, list) and len(value) == 3 and all(type(v) is int and 0 <= v < 256 for v in value)


def _are_images(value: dict) -> bool:
    stems, contents = value.get("stems"), value.get("contents")
    columns = [column for column in (stems, contents) if isinstance(column, list) and all(map(_is_text, column))]
    return len(columns) == 2 and len(columns[0]) == len(columns[1])


def build_model(
    state: Mapping[str, Any], source: str | Path = "checkpoint", network: str | Collection[str] = ()
) -> Network:
    """The network of a checkpoint with its weights: the averaged ones where the run kept an average.

    Args:
        network: the name of what it may be beside SegNet, or several names; the module is then imported.

    Raises:
        UsageError: a network that is not among them, or cannot be made. FastsegError: weights of another network.
            They name `source`.
    """
    config = configs.from_dict(state["config"], str(source))
    admit(config.model, network, str(source))
    built = build(config.model, len(state["classes"]), config.data.size)
    load_weights(built, state["ema"] or state["model"], str(source))
    return built.to(memory_format=torch.channels_last).eval()


def first_weights(init: str) -> dict[str, Any] | None:
    """The checkpoint that `--init` names, for a new run to begin with; None where it names something else.

    Raises:
        FastsegError: it is damaged, or of another schema.
    """
    if init in FIRST_WEIGHTS:
        return None
    path = checkpoint_of(user_path(init))
    state = read_tensors(path, f"--init {init}") if path.is_file() else None
    return _checked(state, f"--init {init}") if state is not None and _is_checkpoint(state) else None


def begin_with(network: Network, config: Config, classes: Sequence[str], state: Mapping[str, Any]) -> str:
    """Give a new run's network a checkpoint's weights, the averaged ones where it has them; which, in words.

    Where the classes are others, what makes their scores keeps its first weights.

    Args:
        config: of the new run, whose `model.init` names the checkpoint.

    Raises:
        UsageError: the checkpoint is of another network. FastsegError: its weights are not its network's.
    """
    source = f"--init {config.model.init}"
    before = configs.from_dict(state["config"], source).model
    for key in ("network", "backbone", "depth"):
        old, new = getattr(before, key), getattr(config.model, key)
        if old != new:
            raise UsageError(f"{source}: its model.{key} is {old}, this run's is {new}; add --set model.{key}={old}")
    weights = plain_names(state["ema"] or state["model"])
    steps = f"its weights after {state['progress']['step']} steps"
    if state["classes"] == list(classes):
        load_weights(network, weights, source)
        return steps
    own, new = network.state_dict(), weights_of_scores(network, weights)
    load_weights(network, weights | {name: own[name] for name in new}, source)
    begins = f"the last layer is new ({', '.join(new)})" if new else "all of them, since there are as many"
    return f"{steps}; for other classes, {begins}"


def load_optimizer(optimizer: torch.optim.Optimizer, state: dict[str, Any]) -> None:
    """Restore an optimiser; momentum buffers get their parameters' strides, which the fused kernels rely on.

    Raises:
        ValueError, KeyError: the state is another optimiser's.
    """
    optimizer.load_state_dict(state)
    for parameter, values in optimizer.state.items():
        buffer = values.get("momentum_buffer")
        if not isinstance(buffer, torch.Tensor):
            continue
        if buffer.shape != parameter.shape:
            raise ValueError(f"momentum of {tuple(buffer.shape)} for weights of {tuple(parameter.shape)}")
        if buffer.stride() != parameter.stride():
            values["momentum_buffer"] = torch.empty_like(parameter).copy_(buffer)
