"""How fastseg's operators are made known to PyTorch, where they run, and what their launchers share.

`choose` is the one switch: "fused" trains with fastseg's own operators, "torch" with PyTorch's. A fused operator runs
its Triton kernel on a GPU (and anywhere under TRITON_INTERPRET=1), its PyTorch reference on a CPU.

Tensors are channels-last: element (b, c, y, x) of [B, C, H, W] lies at ((b * H + y) * W + x) * C + c, so that a pixel
is a row of C neighbours, which a thread loads 16 bytes at a time.
"""

import functools
import importlib
import importlib.util
import os
from collections.abc import Callable
from typing import Any, TypeVar

import torch

from fastseg.errors import UsageError
from fastseg.kernels import plan

Reference = TypeVar("Reference", bound=Callable[..., Any])

LIBRARY = torch.library.Library("fastseg", "DEF")

CHOICES = ("auto", "fused", "torch")
DTYPES = (torch.float32, torch.float16, torch.bfloat16)
# Triton takes this variable when a kernel is defined.
INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"
# What Triton 3 supports; Turing and Volta are left to PyTorch.
LEAST_CAPABILITY = (8, 0)


def choose(requested: str, device: torch.device) -> tuple[str, str]:
    """ "fused" or "torch", and why.

    Raises:
        UsageError: "fused" on a GPU that Triton cannot serve, or no such choice.
    """
    if requested not in CHOICES:
        raise UsageError(f"runtime.kernels {requested}: choose one of {', '.join(CHOICES)}")
    if requested == "torch":
        return requested, "as asked, PyTorch's own operations"
    if device.type != "cuda":
        if requested == "auto":
            return "torch", "PyTorch's own operations are the fastest on a CPU"
        return "fused", "as asked, " + ("Triton's interpreter" if INTERPRETED else "their PyTorch reference on a CPU")
    obstacle = _obstacle(device)
    if obstacle is None:
        return "fused", "Triton kernels" if requested == "auto" else "as asked, Triton kernels"
    if requested == "fused":
        raise UsageError(f"runtime.kernels fused: {obstacle}; use torch")
    return "torch", obstacle


def _obstacle(device: torch.device) -> str | None:
    if importlib.util.find_spec("triton") is None:
        return "Triton is not installed"
    capability = torch.cuda.get_device_capability(device)
    if capability < LEAST_CAPABILITY:
        return "Triton needs compute capability {}.{} or later, this GPU has {}.{}".format(
            *LEAST_CAPABILITY, *capability
        )
    return None


def operator(schema: str, *, fake: Callable[..., Any], leading: int = 0) -> Callable[[Reference], Reference]:
    """Make a function fastseg::NAME of PyTorch's; it is the reference, which runs where no Triton kernel does.

    Its launcher bears the operator's name in the module MODULE_triton beside the function's. The operator has no
    gradient of its own: a `torch.autograd.Function` around it has. Together that costs a third of the host time of
    `torch.library.custom_op` with `register_autograd`; `fastseg bench host` measures it.

    Args:
        schema: NAME(arguments) -> results, in PyTorch's notation.
        fake: gives results of the right shapes, dtypes and strides for arguments without values.
        leading: which argument decides by its device and dtype where the operator runs.
    """
    name = schema.partition("(")[0]

    def register(reference: Reference) -> Reference:
        launchers = f"{reference.__module__}_triton"

        @functools.cache
        def launching() -> Any:
            return importlib.import_module(launchers)  # where there is Triton, that is

        def serve(*arguments: Any) -> Any:
            run = getattr(launching(), name) if on_triton(arguments[leading]) else reference
            return run(*arguments)

        LIBRARY.define(schema, tags=torch.Tag.pt2_compliant_tag)
        LIBRARY.impl(name, serve, "CompositeExplicitAutograd")
        torch.library.register_fake(f"fastseg::{name}", fake, lib=LIBRARY)
        overload = getattr(torch.ops.fastseg, name).default

        @functools.wraps(reference)
        def call(*arguments: Any) -> Any:
            return overload(*arguments)

        return call  # type: ignore[return-value]

    return register


def on_triton(tensor: torch.Tensor) -> bool:
    """True where an operator's Triton kernel serves this tensor, False where its reference does.

    Raises:
        TypeError: a kernel would serve it but not in this dtype.
    """
    if not (tensor.is_cuda or INTERPRETED):
        return False
    if tensor.is_floating_point() and tensor.dtype not in DTYPES:
        raise TypeError(f"{tensor.dtype}: fastseg's kernels take float32, float16 and bfloat16")
    return True


def channels_last(x_BCHW: torch.Tensor) -> torch.Tensor:
    """The tensor itself where it is channels-last already, else a copy that is."""
    return x_BCHW.contiguous(memory_format=torch.channels_last)


def empty(shape: tuple[int, ...], like: torch.Tensor, dtype: torch.dtype | None = None) -> torch.Tensor:
    """An unfilled channels-last [B, C, H, W] on the device of `like`, of its dtype unless another is given."""
    return torch.empty(shape, dtype=dtype or like.dtype, device=like.device, memory_format=torch.channels_last)


def halved(size: int) -> int:
    """Windows of two along an axis, the last one cut short where the size is odd (ceil mode)."""
    return (size + 1) // 2


@functools.cache
def over(kernel: Any, unit: str, pixels: int, channels: int, elements: int) -> Callable[..., None]:
    """A streaming kernel's launcher over tiles of `elements` pixels x channels; `unit` is its name for a tile's pixels.

    Worked out once per shape: what a launch costs on the host decides how fast small maps are.
    """
    height, width = plan.tile(channels, elements)
    grid = (plan.cdiv(pixels, height), plan.cdiv(channels, width))
    return functools.partial(kernel[grid], CHANNELS=width, num_warps=plan.STREAM_WARPS, **{unit: height})


# The last of each stream's is the largest. Smaller ones are kept: a graph may still write to them.
_SCRATCH: dict[tuple[torch.device, int], list[tuple[torch.Tensor, torch.Tensor]]] = {}


def scratch(device: torch.device, numbers: int, counters: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Memory that a reduction uses while it runs, kept for the next: fp32 values of any content, and int32 zeros.

    Who counts in the zeros sets them back to zero. On a GPU work on a stream is done in order, hence one scratch for
    each stream; a graph has that of the stream that it was captured on.
    """
    on_gpu = device.type == "cuda"
    key = device, torch._C._cuda_getCurrentRawStream(device.index) if on_gpu else 0
    kept = _SCRATCH.setdefault(key, [])
    have = (len(kept[-1][0]), len(kept[-1][1])) if kept else (0, 0)
    if kept and numbers <= have[0] and counters <= have[1]:
        return kept[-1]
    sizes = max(1 << numbers.bit_length(), have[0]), max(1 << counters.bit_length(), have[1])
    made = (
        torch.empty(sizes[0], dtype=torch.float32, device=device),
        torch.zeros(sizes[1], dtype=torch.int32, device=device),
    )
    # What is made during a capture is the graph's alone: its zeros are first written when it is replayed.
    if not (on_gpu and torch.cuda.is_current_stream_capturing()):
        kept.append(made)
    return made
