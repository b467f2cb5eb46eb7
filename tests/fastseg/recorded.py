"""A stand-in for a CUDA graph on a CPU: the operators of a pass, recorded with their very tensors, and run again.

As a graph it asks Python nothing when it replays, it writes its results to where they were first, and capturing has no
effect of its own. So whatever Python decides from step to step shows as a wrong result, and what waits for the device,
or cannot be captured, is an error.
"""

import contextlib
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

# Operators that give Python a number of the device, or tensors whose size hangs on one.
WAITING = {"_local_scalar_dense", "nonzero", "masked_select", "_unique2", "unique_dim", "repeat_interleave", "equal"}
# What reads a tensor's values on the way into Python, or elsewhere, without an operator that could be seen on a CPU.
READING = {torch.Tensor.item, torch.Tensor.tolist, torch.Tensor.numpy, torch.Tensor.cpu, torch.Tensor.__bool__}
READING |= {torch.Tensor.__float__, torch.Tensor.__int__, torch.Tensor.__index__, torch.Tensor.__array__}
# Written in place, although their schemas do not say so.
UNSAID = {"running_mean", "running_var"}


def tensors(tree: Any) -> list[torch.Tensor]:
    return [leaf for leaf in tree_leaves(tree) if isinstance(leaf, torch.Tensor)]


def storages(tree: Any) -> set[int]:
    """Which memory the tensors lie in."""
    return {tensor.untyped_storage()._cdata for tensor in tensors(tree)}


def refuse(name: str) -> None:
    """As CUDA does: "operation not permitted when stream is capturing"."""
    raise RuntimeError(f"{name}: not permitted while a pass is captured, since it waits for the device")


class NoReading(TorchFunctionMode):
    """Refuses what reads a tensor's values."""

    def __torch_function__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if function in READING:
            refuse(function.__name__)
        # By its name: a tensor's own device is the CPU here, and on a GPU it would not be.
        if function is torch.Tensor.to and "cpu" in [
            v for v in (*args[1:], *(kwargs or {}).values()) if type(v) is str
        ]:
            refuse("to")
        return function(*args, **(kwargs or {}))


class Recorder(TorchDispatchMode):
    """Keeps each call with its tensors, and what tensors that it did not make held before they were written to."""

    def __init__(self) -> None:
        super().__init__()
        self.calls: list[tuple[Any, tuple, dict, Any]] = []
        self.before: dict[int, tuple[torch.Tensor, torch.Tensor]] = {}
        self.made: set[int] = set()

    def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs, name = kwargs or {}, function.overloadpacket.__name__
        if name in WAITING:
            refuse(name)
        if name in ("index", "index_put_", "index_put") and any(t.dtype == torch.bool for t in tensors(args[1])):
            refuse(f"{name} by a mask")
        for argument, value in zip(function._schema.arguments, args, strict=False):
            if (argument.alias_info and argument.alias_info.is_write) or argument.name in UNSAID:
                self._keep(value)
        result = function(*args, **kwargs)
        self.made |= storages(result) - storages((args, kwargs))
        self.calls.append((function, args, kwargs, result))
        return result

    def _keep(self, written: Any) -> None:
        for storage in storages(written) - self.made - self.before.keys():
            self.before[storage] = written, written.clone()


class RecordedGraph:
    """See `fastseg.training.capture.Graph`. `made` counts replays, of all of them."""

    replays = 0

    def __init__(self) -> None:
        self._calls: list[tuple[Any, tuple, dict, Any]] = []

    def run(self, work: Callable[[], torch.Tensor]) -> torch.Tensor:
        return work()

    def capture(self, work: Callable[[], torch.Tensor]) -> torch.Tensor:
        with NoReading(), Recorder() as recorder:
            found = work()
        for tensor, value in recorder.before.values():
            tensor.data.copy_(value)
        self._calls = recorder.calls
        # Nothing is computed yet: whoever uses results before a replay shall see that.
        for result in tensors([call[-1] for call in self._calls]):
            if storages(result) <= recorder.made and result.is_floating_point():
                result.data.fill_(float("nan"))
        return found

    def replay(self) -> None:
        RecordedGraph.replays += 1
        with torch.no_grad():
            for function, args, kwargs, kept in self._calls:
                for old, new in zip(tree_leaves(kept), tree_leaves(function(*args, **kwargs)), strict=True):
                    if isinstance(old, torch.Tensor) and old.data_ptr() != new.data_ptr():
                        old.detach().copy_(new)

    def release(self) -> None:
        self._calls = []


@contextlib.contextmanager
def counted() -> Iterator[Callable[[], int]]:
    """How many replays there were within this context."""
    before = RecordedGraph.replays
    yield lambda: RecordedGraph.replays - before
