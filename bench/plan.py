"""`fastseg bench kernels --plan`: how kernels fill a GPU, and how long that must take, worked out without one.

What a training step launches between its convolutions, kernel by kernel and map by map, compiled for the GPU ahead of
time: programs, registers, widths of accesses, instructions. ASSUMED says what is assumed of the machine; the time of a
kernel is then what it cannot be faster than:

- a launch after the one before, and the first bytes' latency;
- whatever binds it: memory (bytes over the bandwidth of a copy), latency (Little's law: bytes over bytes in flight per
  latency), or issue (instructions over what the schedulers take);
- where it reduces: the way of its parts to the last program, and their merging.

A loop that copies its tiles ahead is bound by one of them; one that waits for its own loads, by latency and issue one
after the other. It knows nothing of barriers, bank conflicts or caches: times are the least. Where a measurement
disagrees, ASSUMED is what to mend.
"""

import dataclasses
import functools
import importlib.util
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch

from fastseg.bench.drill import CLASSES
from fastseg.bench.launches import step_launches
from fastseg.config import Size
from fastseg.errors import UsageError
from fastseg.kernels import plan
from fastseg.kernels.launch import INTERPRETED, halved
from fastseg.model import BACKBONES, CHANNELS, SegNet

DTYPE, VALUE = "bf16", 2  # and its bytes
# A launch of PyTorch's list operators takes at most so many chunks of so many values.
CHUNKS, CHUNK = 320, 65536


@dataclass(frozen=True)
class Assumed:
    """A GPU.

    Attributes:
        architecture: that kernels are compiled for.
        bandwidth: of a copy, read and written, in bytes per second.
        latency, loaded, near: seconds until a load is answered: by memory, by busy memory, and by the cache that all
            multiprocessors share.
        launch: seconds from a kernel's end to the first instruction of the next, in a graph.
        clock: instructions per second of a scheduler; a multiprocessor has four.
        threads, registers, shared: of a multiprocessor; shared memory in bytes.
    """

    name: str
    architecture: int
    multiprocessors: int
    bandwidth: float
    latency: float
    loaded: float
    near: float
    launch: float
    clock: float
    threads: int = 2048
    registers: int = 65536
    shared: int = 227 << 10


# Bandwidth as copied on the card. `loaded` is mended by a measurement there: turns of a loop of `backward_sums` that
# waited for its own loads took 1.8 us, of which their instructions explain 0.7. The rest are common figures for Hopper.
ASSUMED = Assumed("NVIDIA H200", 90, 132, 4.3e12, 600e-9, 1.1e-6, 300e-9, 1e-6, 1.755e9)


class Row(NamedTuple):
    """One kernel on one map.

    Attributes:
        place: the map, "HEIGHTxWIDTH, CHANNELS".
        calls: per training step.
        waves: of programs on all multiprocessors, as many at a time as fit.
        in_flight: bytes of a multiprocessor that are on their way.
        bits: widest load or copy.
        nbytes: read and written.
        bound: what binds it.
        seconds: of one call.
    """

    kernel: str
    place: str
    calls: int
    programs: int
    waves: float
    registers: int
    in_flight: float
    bits: int
    nbytes: int
    bound: str
    seconds: float


def moved(full: int, pooled: int, s: int = VALUE) -> dict[str, tuple[int, int]]:
    """Kernel -> bytes read and written, for a map of so many elements of `s` bytes and its pooled half."""
    return {
        "unpool": ((s + 1) * pooled, s * full),
        "take": (s * full + pooled, s * pooled),
        "bn_relu statistics": (s * full, 0),
        "bn_relu apply": (s * full, s * full),
        "bn_relu apply, pool": (s * full, (s + 1) * pooled),
        "bn_relu backward sums": (2 * s * full, 0),
        "bn_relu backward sums, pool": (s * full + (s + 1) * pooled, 0),
        "bn_relu backward": (2 * s * full, s * full),
        "bn_relu backward, pool": (s * full + (s + 1) * pooled, s * full),
    }


def places(size: Size) -> dict[tuple[int, int, int], dict[str, int]]:
    """(height, width, channels) of each map of the network, and how often a step calls each kernel on it."""
    found: dict[tuple[int, int, int], dict[str, int]] = {}

    def add(place: tuple[int, int, int], times: int, *kernels: str) -> None:
        calls = found.setdefault(place, {})
        for kernel in kernels:
            calls[kernel] = calls.get(kernel, 0) + times

    height, width = size
    for stage, (convs, channels) in enumerate(zip(BACKBONES["vgg16"], CHANNELS, strict=True)):
        names = [f"bn_relu {name}" for name in ("statistics", "apply", "backward sums", "backward")]
        add((height, width, channels), 2 * (convs - 1), *names)
        if stage:  # the decoder's last convolution narrows
            add((height, width, CHANNELS[stage - 1]), 1, *names)
        pooling = ["bn_relu statistics", *(f"bn_relu {name}, pool" for name in ("apply", "backward sums", "backward"))]
        add((height, width, channels), 1, *pooling, "unpool", "take")
        height, width = halved(height), halved(width)
    return found


@functools.cache
def _built(kernel: Any, numbers: tuple, warps: int) -> dict[str, Any]:
    from fastseg.kernels import aot

    return aot.build(aot.Case(kernel, dict(numbers), warps, 0), DTYPE, ASSUMED.architecture)


def _compiled(case: Any) -> dict[str, Any]:
    """What it is compiled to: of its numbers only those that are compiled in matter, and whether 16 divides others."""
    constants = {parameter.name for parameter in case.kernel.params if parameter.is_constexpr}
    numbers = {name: n if name in constants else 16 if n % 16 == 0 else 17 for name, n in case.values.items()}
    return _built(case.kernel, tuple(numbers.items()), case.warps)


def row(name: str, place: str, calls: int, case: Any, read: int, written: int) -> Row:
    """A kernel's row.

    Args:
        case: `aot.Case`.
    """
    built, gpu, values = _compiled(case), ASSUMED, case.values
    threads = 32 * case.warps
    fit = min(
        gpu.threads // threads,
        gpu.registers // (plan.cdiv(built["registers"], 8) * 8 * threads),
        gpu.shared // max(1, built["shared"]),
    )
    resident = min(fit, plan.cdiv(case.programs, gpu.multiprocessors))
    turns = plan.cdiv(values["share"], values.get("ROWS") or values["PIXELS"]) if "share" in values else 1
    instructions = built["in_loop"] * turns if "share" in values else built["instructions"]
    ahead = min(turns, values.get("STAGES", 2) - 1)
    in_flight = resident * read / case.programs * ahead / turns
    # A last round of programs that are fewer than multiprocessors, or the only one, leaves some of these idle.
    rounds = plan.cdiv(case.programs, gpu.multiprocessors)
    at_once = case.programs / rounds
    bounds = {
        "memory": (read + written) / gpu.bandwidth,
        "latency": read * gpu.loaded / (in_flight * at_once),
        "issue": instructions * case.warps * case.programs / (4 * gpu.clock * at_once),
    }
    if turns > 1 and "STAGES" not in values:
        bounds["latency"] += bounds["issue"]
    bound = max(bounds, key=lambda name: bounds[name])
    seconds = gpu.launch + gpu.latency + bounds[bound]
    if "share" in values:
        seconds += 3 * gpu.near  # parts are written, programs counted, parts read
    if "statistics" in name:
        seconds += gpu.latency  # of the pixels that the shift is made of
    waves, bits = case.programs / (gpu.multiprocessors * fit), max(built["load_bits"] + built["copy_bits"])
    return Row(
        name, place, calls, case.programs, waves, built["registers"], in_flight, bits, read + written, bound, seconds
    )


def rows(size: Size, batch: int) -> list[Row]:
    """All of ours that a training step launches, from the largest maps to the smallest, and the loss."""
    from fastseg.kernels import aot

    found = []
    for (height, width, channels), calls in places(size).items():
        cases = aot.level(batch, height, width, channels, VALUE)
        elements, pooled = (batch * channels * n for n in (height * width, halved(height) * halved(width)))
        of = moved(elements, pooled)
        place = f"{height}x{width}, {channels}"
        found += [row(name, place, times, cases[name], *of[name]) for name, times in calls.items()]
    pixels = batch * size[0] * size[1]
    scores = VALUE * CLASSES * pixels
    losses = {
        "cross_entropy forward": (scores + pixels, 0),
        "cross_entropy backward": (scores + pixels, scores),
        "weight_sum": (pixels, 0),
    }
    cases = aot.loss(batch, *size)
    return found + [row(name, f"{size}, {CLASSES}", 1, cases[name], *of) for name, of in losses.items()]


def lists() -> list[tuple[str, int, int, float]]:
    """PyTorch's list operators of a step: launches, bytes and seconds of weights to 16 bits, gradients back, and the
    optimiser, which reads weight, gradient and momentum and writes weight and momentum."""
    with torch.device("meta"):
        values = sum(parameter.numel() for parameter in SegNet(CLASSES).parameters())
    launches = plan.cdiv(plan.cdiv(values, CHUNK), CHUNKS)
    nbytes = {"weights to bf16": 4 + VALUE, "gradients to fp32": 4 + VALUE, "optimiser": 5 * 4}
    return [
        (name, launches, n * values, launches * (ASSUMED.launch + ASSUMED.latency) + n * values / ASSUMED.bandwidth)
        for name, n in nbytes.items()
    ]


def document(size: Size, batch: int) -> dict[str, Any]:
    """What `fastseg bench kernels --plan --json` prints: times in seconds, sizes in bytes.

    Raises:
        UsageError: Triton is not installed, or interprets kernels instead of compiling them.
    """
    if importlib.util.find_spec("triton") is None:
        raise UsageError("bench kernels --plan: compiles kernels with Triton, which is not here: pip install triton")
    if INTERPRETED:
        raise UsageError("bench kernels --plan: TRITON_INTERPRET=1 compiles nothing; unset it")
    table, more = rows(size, batch), lists()
    ours, theirs = sum(r.calls * r.seconds for r in table), sum(seconds for *_, seconds in more)
    launches = step_launches()
    return {
        "size": str(size),
        "batch": batch,
        "dtype": DTYPE,
        "assumed": dataclasses.asdict(ASSUMED),
        "needed_in_flight": ASSUMED.bandwidth * ASSUMED.loaded / ASSUMED.multiprocessors,
        "kernels": [r._asdict() for r in table],
        "lists": [dict(zip(("name", "launches", "nbytes", "seconds"), each, strict=True)) for each in more],
        "ours": ours,
        "theirs": theirs,
        "copying": sum(r.calls * r.nbytes for r in table) / ASSUMED.bandwidth,
        "launches": {name: {"calls": calls, "launches": count} for name, (calls, count) in launches.items()},
    }


def show(found: dict[str, Any]) -> str:
    """A document as text."""
    head = (
        f"{'kernel':28}{'map':14}{'calls':>6}{'programs':>9}{'waves':>7}{'registers':>10}{'in flight':>11}{'bits':>5}"
    )
    lines = [
        f"{found['size']}, batch {found['batch']}, {found['dtype']}, for one {found['assumed']['name']}. In flight: kB "
        f"of a multiprocessor; {found['needed_in_flight'] / 1e3:.1f} keep memory busy.",
        f"{head}{'MB':>8}{'us':>7}  bound by",
    ]
    for r in found["kernels"]:
        lines.append(
            f"{r['kernel']:28}{r['place']:14}{r['calls']:6}{r['programs']:9}{r['waves']:7.1f}{r['registers']:10}"
            f"{r['in_flight'] / 1e3:11.1f}{r['bits']:5}{r['nbytes'] / 1e6:8.1f}{r['seconds'] * 1e6:7.1f}  {r['bound']}"
        )
    for each in found["lists"]:
        lines.append(
            f"{each['name']:42}{each['launches']:6}{each['nbytes'] / 1e6:50.1f}{each['seconds'] * 1e6:7.1f}  memory"
        )
    calls, launches = (sum(each[key] for each in found["launches"].values()) for key in ("calls", "launches"))
    several = [f"{name} {each['launches']}" for name, each in found["launches"].items()]
    return "\n".join(
        [
            *lines,
            f"Between the convolutions {(found['ours'] + found['theirs']) * 1e3:.2f} ms: ours "
            f"{found['ours'] * 1e3:.2f}, of which copying {found['copying'] * 1e3:.2f}; PyTorch's lists "
            f"{found['theirs'] * 1e3:.2f}.",
            f"A step calls {calls} operators and kernels, which is {launches} launches: {', '.join(several)}.",
        ]
    )
