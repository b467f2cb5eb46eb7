"""Every Triton kernel compiled ahead of time, without a GPU: python -m fastseg.kernels.aot

One JSON document: per kernel, dtype and architecture its registers, spilled bytes, shared memory and the widths of its
loads and stores in bits, as at a batch of 4 at 360x480. Not to be run in Triton's interpreter, which compiles nothing.
"""

import json
import re
import subprocess
import tempfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

from fastseg.data.classes import VOID
from fastseg.kernels import augment_triton, bn_relu_triton, confusion_triton, cross_entropy_triton, pool_triton
from fastseg.kernels.launch import tile

ARCHITECTURES = (80, 90, 100)
DTYPES = ("fp32", "fp16", "bf16")
BATCH, HEIGHT, WIDTH, CHANNELS, CLASSES = 4, 360, 480, 64, 11

# What each kernel's arguments point to; feature maps are of the training step's dtype.
MAPS = ("x_ptr", "y_ptr", "values_ptr", "out_ptr", "gradient_ptr", "d_x_ptr", "scores_ptr", "logits_ptr")
POINTERS = {
    **dict.fromkeys(MAPS, "*{dtype}"),
    **dict.fromkeys(("codes_ptr", "labels_ptr", "labels_out_ptr", "images_ptr", "predictions_ptr"), "*u8"),
    **dict.fromkeys(("weight_ptr", "weights_ptr", "bias_ptr", "mean_ptr", "variance_ptr", "std_ptr"), "*fp32"),
    **dict.fromkeys(("upstream_ptr", "parts_ptr", "d_weight_ptr", "d_bias_ptr"), "*fp32"),
    **dict.fromkeys(("sum_ptr", "running_mean_ptr", "running_var_ptr"), "*fp32"),
    **dict.fromkeys(("counts_ptr", "batches_ptr"), "*i64"),
    "samples_ptr": "*i32",
}
FLOATS = ("eps", "momentum", "scale_y", "scale_x")


def cases() -> dict[str, tuple[Any, dict[str, int]]]:
    """Name -> kernel, and its whole-number arguments in a training step."""
    large = {"H": HEIGHT, "W": WIDTH, "h": HEIGHT // 2, "w": WIDTH // 2, "C": CHANNELS}
    out = {"height": HEIGHT, "width": WIDTH}
    pixels = BATCH * HEIGHT * WIDTH

    def maps(elements: int, pixel: str) -> dict[str, int]:
        return dict(zip((pixel, "CHANNELS"), tile(CHANNELS, elements), strict=True))

    def scores(elements: int) -> dict[str, int]:
        width = triton.next_power_of_2(CLASSES)
        return {"pixels": pixels, "C": CLASSES, "PIXELS": elements // width, "CLASSES": width}

    pooling = {**large, "pixels": pixels // 4, **maps(pool_triton.ELEMENTS, "PIXELS")}
    norm = {**large, "rows": pixels, "tiles": 20, **maps(bn_relu_triton.ELEMENTS, "ROWS")}
    fused = {
        **large,
        "pixels": pixels // 4,
        "values": pixels,
        "tiles": 20,
        **maps(bn_relu_triton.ELEMENTS // 2, "PIXELS"),
    }
    shape = {name: bn_relu_triton.MERGED[name] for name in ("PARTS", "CHANNELS")}
    merge = {"parts": 512, "rows": pixels, "part_rows": 640, "C": CHANNELS, **shape}
    counted = {**large, **scores(confusion_triton.ELEMENTS), "h": HEIGHT, "w": WIDTH, "BINS": 128}
    bn, entropy = bn_relu_triton, cross_entropy_triton
    found: dict[str, tuple[Any, dict[str, int]]] = {
        "pool": (pool_triton.pool_kernel, pooling),
        "unpool": (pool_triton.unpool_kernel, pooling),
        "take": (pool_triton.take_kernel, pooling),
        "bn_relu moments": (bn.moments_kernel, norm),
        "bn_relu merge": (bn.merge_kernel, merge),
        "bn_relu apply": (bn.apply_kernel, norm),
        "bn_relu apply, pool": (bn.apply_pool_kernel, fused),
        "bn_relu backward sums": (bn.backward_sums_kernel, norm),
        "bn_relu backward sums, pool": (bn.backward_sums_pool_kernel, fused),
        "bn_relu backward": (bn.backward_kernel, {**norm, "TRAINING": 1}),
        "bn_relu backward, pool": (bn.backward_pool_kernel, {**fused, "TRAINING": 1}),
        "bn_relu merge sums": (bn.merge_sums_kernel, merge),
        "cross_entropy forward": (entropy.forward_kernel, scores(entropy.ELEMENTS)),
        "cross_entropy backward": (entropy.backward_kernel, scores(entropy.ELEMENTS)),
        "weight_sum": (entropy.weight_sum_kernel, {"pixels": pixels, "C": CLASSES, "PIXELS": entropy.LABELS}),
        "sum of parts": (entropy.sum_kernel, {"parts": 5400, "PARTS": entropy.PARTS}),
        "confusion": (confusion_triton.confusion_kernel, {**counted, "RESIZE": 0, "KEEP": 0}),
        "confusion, resized": (
            confusion_triton.confusion_kernel,
            {**counted, "h": HEIGHT // 2, "w": WIDTH // 2, "RESIZE": 1, "KEEP": 1},
        ),
        "augment": (augment_triton.augment_kernel, {**large, **out, "PIXELS": augment_triton.PIXELS, "VOID": VOID}),
    }
    return found


def stated(kernel: Any, name: str, table: Mapping[str, Any], where: str) -> Any:
    """What `table`, which stands at `where` in this module, says of a kernel's parameter.

    Raises:
        LookupError: nothing; it is not guessed, since a kernel of other types or shapes is another kernel.
    """
    if name not in table:
        raise LookupError(f"{kernel.__name__}: nothing says what {name} is; add it to {where} in kernels/aot.py")
    return table[name]


def build(kernel: Any, values: dict[str, int], dtype: str, architecture: int) -> dict[str, Any]:
    """Compile to machine code; what it takes and how wide its memory accesses are.

    Args:
        values: the kernel's whole-number arguments.

    Raises:
        LookupError: a parameter that `values`, POINTERS and FLOATS do not state.
    """
    numbers = "its case in cases(), or to FLOATS,"
    constants = {p.name: stated(kernel, p.name, values, numbers) for p in kernel.params if p.is_constexpr}
    signature, attributes = {}, {}
    for position, name in enumerate(kernel.arg_names):
        if name in constants:
            signature[name] = "constexpr"
        elif name.endswith("_ptr"):
            signature[name] = stated(kernel, name, POINTERS, "POINTERS").format(dtype=dtype)
        else:
            signature[name] = "fp32" if name in FLOATS else "i32"
        # What Triton's launcher finds out by itself: allocations begin at multiples of 16 bytes.
        if name.endswith("_ptr") or (signature[name] == "i32" and stated(kernel, name, values, numbers) % 16 == 0):
            attributes[(position,)] = [["tt.divisibility", 16]]
    source = ASTSource(fn=kernel, signature=signature, constexprs=constants, attrs=attributes)
    target = GPUTarget("cuda", architecture, 32)
    compiled = triton.compile(source, target=target, options={"num_warps": 4})
    return {
        **resources(compiled.asm["cubin"]),
        "shared": compiled.metadata.shared,
        "v4": re.search(r"\b(ld|st)\.global[.\w:]*\.v4\.b32", compiled.asm["ptx"]) is not None,
        "load_bits": widths(compiled.asm["ptx"], "ld"),
        "store_bits": widths(compiled.asm["ptx"], "st"),
    }


def widths(ptx: str, kind: str) -> list[int]:
    """The different widths in bits of a kernel's loads ("ld") or stores ("st") of global memory, ascending."""
    found = re.findall(rf"\b{kind}\.global[.\w:]*?(?:\.v(\d))?\.b(\d+)", ptx)
    return sorted({int(count or 1) * int(bits) for count, bits in found})


def resources(cubin: bytes) -> dict[str, int]:
    """Registers per thread and spilled bytes, as NVIDIA's cuobjdump reads them from the machine code."""
    tool = Path(triton.__file__).parent / "backends" / "nvidia" / "bin" / "cuobjdump"
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(cubin)
        file.flush()
        text = subprocess.run([tool, "-res-usage", file.name], capture_output=True, text=True, check=True).stdout
    (registers,) = re.findall(r"REG:(\d+)", text)
    (stack,) = re.findall(r"STACK:(\d+)", text)
    return {"registers": int(registers), "spilled": int(stack)}


def build_all() -> list[dict[str, Any]]:
    """All kernels for all architectures and dtypes."""
    return [
        {
            "kernel": name,
            "function": kernel.__name__,
            "dtype": dtype,
            "sm": architecture,
            **build(kernel, values, dtype, architecture),
        }
        for name, (kernel, values) in cases().items()
        for dtype in DTYPES
        for architecture in ARCHITECTURES
    ]


if __name__ == "__main__":
    print(json.dumps(build_all()))
