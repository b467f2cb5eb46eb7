"""What a training step asks a GPU for, counted on any machine: PyTorch's operators and Triton's kernels, none launched.

A step of the whole network runs on a CPU, narrow and on small images, with each of PyTorch's operators seen on its way
and Triton's launches stubbed. Operators that only make a tensor, or another view of one, launch nothing. Of the others
each is one launch, but for a convolution's backward, which is one for each gradient; PyTorch may cut a list operator
(`_foreach_copy_`, `_fused_sgd_`) into a few launches, and cuDNN a convolution.
"""

import collections
import importlib
from typing import Any
from unittest import mock

import torch
from torch.utils._python_dispatch import TorchDispatchMode

from fastseg.bench.drill import RATE, random_batch, step_on
from fastseg.bench.host import CHANNELS, CPU, STEP, launches_stubbed, one_thread

# What asks a device for nothing, beside views.
IDLE = {"empty", "empty_like", "empty_strided", "new_empty", "new_empty_strided", "lift_fresh", "detach"}
IDLE |= {"_record_function_enter_new", "_record_function_exit"}
LAUNCHERS = ("bn_relu", "pool", "cross_entropy")


class Launches(TorchDispatchMode):
    """Counts, while it is on, what would be launched: `found` has (calls, launches) by operator or Triton kernel."""

    def __init__(self) -> None:
        super().__init__()
        self.found: dict[str, tuple[int, int]] = collections.defaultdict(lambda: (0, 0))

    def count(self, name: str, launches: int = 1) -> None:
        """A call, and its launches."""
        calls, before = self.found[name]
        self.found[name] = calls + 1, before + launches

    def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        name = function.overloadpacket.__name__
        if function.namespace == "fastseg":
            modules = [importlib.import_module(f"fastseg.kernels.{module}_triton") for module in LAUNCHERS]
            (launcher,) = [getattr(module, name) for module in modules if hasattr(module, name)]
            with self:  # so that copies inside of it are seen
                return launcher(*args)
        with self:  # operators that are made of others, as `contiguous` is
            result = function.decompose(*args, **(kwargs or {}))
        if result is not NotImplemented:
            return result
        if name == "convolution_backward":
            self.count(name, sum(args[-1]))
        elif not function.is_view and name not in IDLE:
            self.count(name)
        return function(*args, **(kwargs or {}))


def step_launches() -> dict[str, tuple[int, int]]:
    """(calls, launches) by operator and kernel of a step of the published network in bf16, the most first."""
    import triton

    step = step_on(CPU, torch.bfloat16, 1, fused=True, channels=(CHANNELS,) * 5)
    images, labels = random_batch(CPU, torch.bfloat16, STEP, 1)
    counting = Launches()

    def launch(kernel: Any, *arguments: Any, **options: Any) -> None:
        counting.count(f"{kernel.fn.__module__.rpartition('.')[2]}.{kernel.fn.__name__}")

    with one_thread(), launches_stubbed():
        step.step(images, labels, RATE)  # scratch is made once
        with counting, mock.patch.object(triton.JITFunction, "run", new=launch):
            step.step(images, labels, RATE)
    return dict(sorted(counting.found.items(), key=lambda item: (-item[1][1], item[0])))
