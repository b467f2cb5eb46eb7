"""Changes of memory layout in a step, seen as PyTorch's operators pass by: the goal is none.

Convolutions are fastest on channels-last maps, and so are the operators between them if all stay there. What a library
reorders inside an operator (oneDNN's blocked layouts) is not seen here; on a GPU the profile counts cuDNN's kernels.
"""

import contextlib
from collections import Counter
from collections.abc import Iterator
from typing import Any

import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from torch.utils.module_tracker import ModuleTracker

from fastseg.ranges import shown_by


def layout_of(value: Any) -> str | None:
    """ "NCHW" or "NHWC" of a dense feature map [B, C, H, W]; None where it is none, or is both (C or H x W is 1)."""
    if not isinstance(value, torch.Tensor) or value.ndim != 4:
        return None
    contiguous = value.is_contiguous()
    channels_last = value.is_contiguous(memory_format=torch.channels_last)
    return None if contiguous == channels_last else "NHWC" if channels_last else "NCHW"


class LayoutAudit(TorchDispatchMode):
    """While active, counts operators that read a map in one layout and write a map of its shape in the other.

    `counts` has ("where", "operator", "NHWC -> NCHW") -> calls; where is a layer, or else the part of the step.
    """

    def __init__(self) -> None:
        super().__init__()
        self.counts: Counter[tuple[str, str, str]] = Counter()
        self._ranges: list[str] = []
        self._modules = ModuleTracker()

    def __enter__(self) -> "LayoutAudit":
        self._named = contextlib.ExitStack()
        self._named.enter_context(shown_by(self._annotate))
        self._named.enter_context(self._modules)
        return super().__enter__()

    def __exit__(self, *error: Any) -> None:
        super().__exit__(*error)
        self._named.close()

    @contextlib.contextmanager
    def _annotate(self, name: str) -> Iterator[None]:
        self._ranges.append(name)
        yield
        self._ranges.pop()

    def _where(self) -> str:
        # The tracker knows the network itself as its class and "Global" for all else; layers below have longer names.
        named = [name for name in self._modules.parents if "." in name]
        layer = max(named, key=len, default="")
        inside = self._ranges[-1] if self._ranges else "step"
        return f"{layer.partition('.')[2]} ({inside})" if layer else inside

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        before = {layout_of(value) for value in tree_leaves(args)} - {None}
        written = next((value for value in tree_leaves(result) if isinstance(value, torch.Tensor)), None)
        after = layout_of(written)
        if func.name().startswith("aten::copy_"):
            before = {layout_of(args[1])}
        if after and len(before) == 1 and before != {after} and before != {None} and not func.is_view:
            (was,) = before
            self.counts[self._where(), func.name(), f"{was} -> {after}"] += 1
        return result
