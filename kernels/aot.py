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
from typing import Any, NamedTuple

import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

from fastseg.data.classes import VOID
from fastseg.kernels import augment_triton, bn_relu_triton, confusion_triton, cross_entropy_triton, plan, pool_triton
from fastseg.kernels.cross_entropy import SMALLEST
from fastseg.kernels.launch import halved

ARCHITECTURES = (80, 90, 100)
DTYPES = {"fp32": 4, "fp16": 2, "bf16": 2}  # and the bytes of a value
BATCH, HEIGHT, WIDTH, CHANNELS, CLASSES = 4, 360, 480, 64, 11

# What each kernel's arguments point to; feature maps are of the training step's dtype.
MAPS = ("x_ptr", "y_ptr", "values_ptr", "out_ptr", "gradient_ptr", "d_x_ptr", "scores_ptr", "logits_ptr")
POINTERS = {
    **dict.fromkeys(MAPS, "*{dtype}"),
    **dict.fromkeys(("codes_ptr", "labels_ptr", "labels_out_ptr", "images_ptr", "predictions_ptr"), "*u8"),
    **dict.fromkeys(("weight_ptr", "weights_ptr", "bias_ptr", "mean_ptr", "variance_ptr", "std_ptr"), "*fp32"),
    **dict.fromkeys(("upstream_ptr", "parts_ptr", "d_weight_ptr", "d_bias_ptr", "colours_ptr"), "*fp32"),
    **dict.fromkeys(("sum_ptr", "total_ptr", "loss_ptr", "running_mean_ptr", "running_var_ptr"), "*fp32"),
    **dict.fromkeys(("counts_ptr", "batches_ptr", "samples_ptr"), "*i64"),
    "arrived_ptr": "*i32",
}
FLOATS = ("eps", "momentum", "scale_y", "scale_x")


class Case(NamedTuple):
    """A kernel in a training step.

    Attributes:
        values: what it is given that is a number.
        programs: that are launched.
    """

    kernel: Any
    values: dict[str, Any]
    warps: int
    programs: int


def streaming(kernel: Any, unit: str, pixels: int, channels: int, elements: int, **values: int) -> Case:
    """A kernel that is launched by `launch.over`."""
    height, width = plan.tile(channels, elements)
    numbers = {**values, unit.lower(): pixels, "C": channels, unit: height, "CHANNELS": width}
    return Case(kernel, numbers, plan.STREAM_WARPS, plan.cdiv(pixels, height) * plan.cdiv(channels, width))


def reducing(
    kernel: Any, unit: str, rows: int, channels: int, value_bytes: int, element_bytes: int, **values: int
) -> Case:
    """A kernel of batch norm that is launched as `plan.reduction` has it."""
    found = plan.reduction(rows, channels, value_bytes, element_bytes, plan.MULTIPROCESSORS)
    shape = {unit: found.height, "CHANNELS": found.width, "STAGES": found.stages, "PARTS": plan.MERGED}
    numbers = {**values, unit.lower(): rows, "C": channels, "share": found.share, **shape}
    return Case(kernel, numbers, plan.REDUCE_WARPS, found.parts * found.blocks)


def level(batch: int, height: int, width: int, channels: int, value_bytes: int) -> dict[str, Case]:
    """Kernels of feature maps of one size, and of their pooled halves."""
    h, w = halved(height), halved(width)
    pixels, pooled = batch * height * width, batch * h * w
    sizes = {"H": height, "W": width, "h": h, "w": w}

    def pool(kernel: Any, **values: int) -> Case:
        return streaming(kernel, "PIXELS", pooled, channels, plan.STREAMED // 2, **sizes, **values)

    def norm(kernel: Any, **values: int) -> Case:
        return streaming(kernel, "ROWS", pixels, channels, plan.STREAMED, **values)

    bn, s = bn_relu_triton, value_bytes
    sums = reducing(bn.backward_sums_pool_kernel, "PIXELS", pooled, channels, s, 5 * s + 1, **sizes)
    return {
        "pool": pool(pool_triton.pool_kernel),
        "unpool": pool(pool_triton.unpool_kernel),
        "take": pool(pool_triton.take_kernel),
        "bn_relu statistics": reducing(bn.statistics_kernel, "ROWS", pixels, channels, s, s),
        "bn_relu apply": norm(bn.apply_kernel),
        "bn_relu apply, pool": pool(bn.apply_pool_kernel),
        "bn_relu backward sums": reducing(bn.backward_sums_kernel, "ROWS", pixels, channels, s, 2 * s),
        "bn_relu backward sums, pool": sums,
        "bn_relu backward": norm(bn.backward_kernel, TRAINING=1),
        "bn_relu backward, pool": pool(bn.backward_pool_kernel, values=pixels, TRAINING=1),
    }


def loss(batch: int, height: int, width: int) -> dict[str, Case]:
    """Kernels of the loss."""
    pixels, (rows, columns) = batch * height * width, plan.score_tile(CLASSES)
    given = {"pixels": pixels, "C": CLASSES, "SMALLEST": SMALLEST, "PARTS": plan.SUMMED}
    scores = {**given, "step": 1, "PIXELS": rows, "CLASSES": columns}
    entropy, warps = cross_entropy_triton, plan.STREAM_WARPS
    summing, share = plan.sums(pixels, rows, plan.MULTIPROCESSORS)
    weighing, labels = plan.sums(pixels, plan.LABELS, plan.MULTIPROCESSORS)
    return {
        "cross_entropy forward": Case(entropy.forward_kernel, {**scores, "share": share}, warps, summing),
        "cross_entropy backward": Case(entropy.backward_kernel, scores, warps, plan.cdiv(pixels, rows)),
        "weight_sum": Case(
            entropy.weight_sum_kernel, {**given, "PIXELS": plan.LABELS, "share": labels}, warps, weighing
        ),
    }


def cases(dtype: str) -> dict[str, Case]:
    """All by name, for the largest feature maps, in one of DTYPES."""
    pixels, (rows, columns) = BATCH * HEIGHT * WIDTH, plan.score_tile(CLASSES)
    scores = {"pixels": pixels, "C": CLASSES, "PIXELS": rows, "CLASSES": columns, "H": HEIGHT, "W": WIDTH, "BINS": 128}
    whole = {**scores, "h": HEIGHT, "w": WIDTH, "RESIZE": 0, "KEEP": 0}
    resized = {**scores, "h": HEIGHT // 2, "w": WIDTH // 2, "RESIZE": 1, "KEEP": 1}
    plain = {"height": HEIGHT, "width": WIDTH, "VOID": VOID, "COLOUR": False}
    direct, shrunk = {"PIXELS": plan.AUGMENTED, "RESIZE": False}, {"PIXELS": plan.RESIZED, "RESIZE": True}
    coloured = {**plain, "COLOUR": True}
    count, warps, tiles = confusion_triton.confusion_kernel, plan.STREAM_WARPS, plan.cdiv(pixels, rows)
    augment = augment_triton.augment_kernel
    whole_tiles, small_tiles = (BATCH * plan.cdiv(HEIGHT * WIDTH, size) for size in (plan.AUGMENTED, plan.RESIZED))
    return {
        **level(BATCH, HEIGHT, WIDTH, CHANNELS, DTYPES[dtype]),
        **loss(BATCH, HEIGHT, WIDTH),
        "confusion": Case(count, whole, warps, tiles),
        "confusion, resized": Case(count, resized, warps, tiles),
        "augment": Case(augment, {**plain, **direct}, warps, whole_tiles),
        "augment, resized": Case(augment, {**plain, **shrunk}, warps, small_tiles),
        "augment, coloured": Case(augment, {**coloured, **direct}, warps, whole_tiles),
        "augment, resized, coloured": Case(augment, {**coloured, **shrunk}, warps, small_tiles),
    }


def stated(kernel: Any, name: str, table: Mapping[str, Any], where: str) -> Any:
    """What `table`, which stands at `where` in this module, says of a kernel's parameter.

    Raises:
        LookupError: nothing; it is not guessed, since a kernel of other types or shapes is another kernel.
    """
    if name not in table:
        raise LookupError(f"{kernel.__name__}: nothing says what {name} is; add it to {where} in kernels/aot.py")
    return table[name]


def build(case: Case, dtype: str, architecture: int) -> dict[str, Any]:
    """Compile to machine code; what it takes and how wide its memory accesses are.

    Raises:
        LookupError: a parameter that the case's values, POINTERS and FLOATS do not state.
    """
    kernel, values, warps, _ = case
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
    compiled = triton.compile(source, target=target, options={"num_warps": warps})
    code = machine_code(compiled.asm["cubin"])
    return {
        **resources(compiled.asm["cubin"]),
        "shared": compiled.metadata.shared,
        "v4": re.search(r"\b(ld|st)\.global[.\w:]*\.v4\.b32", compiled.asm["ptx"]) is not None,
        "load_bits": widths(compiled.asm["ptx"], "ld"),
        "copy_bits": copied(compiled.asm["ptx"]),
        "store_bits": widths(compiled.asm["ptx"], "st"),
        "instructions": sum(not line.startswith((".", "NOP")) for line in code),
        "in_loop": in_loop(code),
        "fenced": fenced(code),
    }


def widths(ptx: str, kind: str) -> list[int]:
    """The different widths in bits of a kernel's loads ("ld") or stores ("st") of global memory, ascending."""
    found = re.findall(rf"\b{kind}\.global[.\w:]*?(?:\.v(\d))?\.b(\d+)", ptx)
    return sorted({int(count or 1) * int(bits) for count, bits in found})


def copied(ptx: str) -> list[int]:
    """The same of copies to shared memory, which no thread waits for."""
    return sorted({8 * int(nbytes, 16) for nbytes in re.findall(r"\bcp\.async\.c[ag]\.[^;]*?, 0x(\w+)", ptx)})


def _run(tool: str, cubin: bytes, *options: str) -> str:
    """What one of NVIDIA's tools that come with Triton prints of machine code."""
    path = Path(triton.__file__).parent / "backends" / "nvidia" / "bin" / tool
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(cubin)
        file.flush()
        return subprocess.run([path, *options, file.name], capture_output=True, text=True, check=True).stdout


def resources(cubin: bytes) -> dict[str, int]:
    """Registers per thread and spilled bytes, as cuobjdump reads them from the machine code."""
    text = _run("cuobjdump", cubin, "-res-usage")
    (registers,) = re.findall(r"REG:(\d+)", text)
    (stack,) = re.findall(r"STACK:(\d+)", text)
    return {"registers": int(registers), "spilled": int(stack)}


def machine_code(cubin: bytes) -> list[str]:
    """Its instructions and labels ("NAME:"), one each, as nvdisasm prints them."""
    lines = _run("nvdisasm", cubin, "-c").splitlines()
    found = [re.match(r"(\.L_\w+:)|\s+/\*\w+\*/\s+(\S.*?) ;", line) for line in lines]
    return [match[1] or match[2] for match in found if match]


def in_loop(code: list[str]) -> int:
    """Instructions of the first loop, which is the one over tiles: from a label to where it is jumped back to."""
    labels = {line: place for place, line in enumerate(code) if line.startswith(".L")}
    for place, line in enumerate(code):
        target = re.search(r"\bBRA `\((\.L\w+)\)", line)
        if target and (start := labels[target[1] + ":"]) < place - 1:
            return place - start
    return 0


def fenced(code: list[str]) -> bool | None:
    """Whether all that a program has stored can be seen before it counts itself: after the last store before the atomic
    its threads meet, and one of them waits for memory. None: it does not count itself."""
    counts = [place for place, line in enumerate(code) if re.search(r"\bATOMG?\b", line)]
    if not counts:
        return None
    stores = [place for place, line in enumerate(code[: counts[0]]) if re.search(r"\bSTG\b", line)]
    between = "\n".join(code[stores[-1] : counts[0]])
    return re.search(r"\bBAR\.SYNC\b.*\bMEMBAR\b[^\n]*GPU", between, re.DOTALL) is not None


def build_all() -> list[dict[str, Any]]:
    """All kernels for all architectures and dtypes."""
    return [
        {
            "kernel": name,
            "function": case.kernel.__name__,
            "dtype": dtype,
            "sm": architecture,
            **build(case, dtype, architecture),
        }
        for dtype in DTYPES
        for name, case in cases(dtype).items()
        for architecture in ARCHITECTURES
    ]


if __name__ == "__main__":
    print(json.dumps(build_all()))
