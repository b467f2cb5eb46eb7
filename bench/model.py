"""`fastseg bench model`: the network's size and work, and images per second of a training step without a data path."""

import functools
from collections.abc import Callable
from typing import Any

import torch
from torch.utils.flop_counter import FlopCounterMode

from fastseg.bench.drill import CLASSES, Drill, calls_of
from fastseg.bench.harness import Found, exact, ratio, result, take_turns
from fastseg.bench.peers import plain_step
from fastseg.bench.roofline import GPUS, Peaks, layers, measured_peaks, seconds
from fastseg.config import Size
from fastseg.distributed import choose_device, choose_dtype
from fastseg.model import SegNet

QUICK_SECONDS = 8.0  # of a quick measurement, which makes many short rounds of it where steps are short


def count_flops(size: Size) -> int:
    """Floating-point operations of forward and backward for one image, a multiply-add as two; nothing is computed."""
    with torch.device("meta"):
        model = SegNet(CLASSES)
        images = torch.empty(1, 3, *size)
    with FlopCounterMode(display=False) as counter:
        torch.autograd.grad(model(images).sum(), list(model.parameters()))
    return counter.get_total_flops()


def peaks_here(device: torch.device, dtypes: list[torch.dtype], trials: int) -> Peaks | None:
    """What this machine can do at most: a known GPU's data sheet, a CPU's measured figures, else None."""
    if device.type == "cuda":
        return GPUS.get(torch.cuda.get_device_name(device))
    return measured_peaks(dtypes, trials)


def peers(dtype: torch.dtype, device: torch.device) -> dict[str, dict[str, Any]]:
    """The loops that a user would take instead, by name, with what makes them so: see `plain_step`.

    Compiled ones on a GPU alone: on a CPU it takes a compiler of C++, and minutes.
    """
    found: dict[str, dict[str, Any]] = {"tuned": {"tuned": True}}
    if dtype != torch.float32:
        found["autocast"] = {}
    if device.type == "cuda":
        found["compiled"] = {"tuned": True, "mode": "default"}
        found["compiled reduce-overhead"] = {"tuned": True, "mode": "reduce-overhead"}
    return found


def of_capture(drill: Drill) -> list[tuple[str, str, float]]:
    """What capturing its passes took, or why they were not captured; nothing where it was not tried."""
    if drill.step.passes is None:
        return []
    captured, failure = drill.step.passes.news()
    if failure:
        return [(f"not captured ({failure}), graphs", "", 0)]
    seconds, nbytes = (sum(column) for column in list(zip(*captured, strict=True))[1:])
    return [("graphs", "", len(captured)), ("capturing took", "s", seconds), ("graphs hold", "MB", nbytes / 1e6)]


def measure(*, data: str, size: Size, batch: int, rounds: int, device: str, quick: bool) -> Found:
    """Parameters, FLOPs, and the step's throughput in fp32 and in the device's mixed precision beside its roofline."""
    where = torch.device(choose_device(device)[0])
    single, best = choose_dtype("tf32", where.type), choose_dtype("auto", where.type)
    mixed = best.name
    dtypes = {found.name: found.dtype for found in ((best,) if quick else (single, best))}
    steps = {kind: Drill(where, dtype, size, batch) for kind, dtype in dtypes.items()}
    cases: dict[str, Callable[[], float]] = {kind: step.images_per_second for kind, step in steps.items()}
    plain = functools.partial(plain_step.images_per_second, where, size, batch, CLASSES, calls_of(where))
    cases["plain"] = plain()
    if not quick:
        cases |= {name: plain(best.dtype, **options) for name, options in peers(best.dtype, where).items()}
    if steps[mixed].step.passes and not quick:
        cases["eager"] = Drill(where, best.dtype, size, batch, capture=False).images_per_second
    samples = take_turns(cases, rounds, QUICK_SECONDS if quick else 0.0)
    name, flops = str(size), count_flops(size)
    results = [
        exact("model parameters", "", sum(p.numel() for p in SegNet(CLASSES).parameters())),
        exact(f"model work {name}, forward+backward", "GFLOP/img", flops / 1e9),
    ]
    ratios, series = [], []
    peaks = peaks_here(where, list(dtypes.values()), trials=4 if quick else 10)
    for kind, dtype in dtypes.items():
        figures, row = samples[kind], f"train step {kind} {name} batch {batch}"
        results.append(result(row, "img/s", figures))
        results += [exact(f"{row}, {what}", unit, value) for what, unit, value in of_capture(steps[kind])]
        results.append(exact(f"{row}, peak memory", "MB", steps[kind].peak_memory() / 1e6))
        results.append(result(row, "GFLOP/s", [f * flops / 1e9 for f in figures]))
        if peaks is None:
            continue
        fused = steps[kind].step.model.fused
        parts = layers(size, batch, classes=CLASSES, value_bytes=dtype.itemsize, fused=fused)
        times = list(seconds(parts, peaks, kind))
        total = sum(least for least, _ in times)
        by_compute = sum(least for least, bound in times if bound == "compute")
        results += [
            exact(f"{row}, peak of compute ({peaks.source})", "GFLOP/s", peaks.flops[kind] / 1e9),
            exact(f"{row}, peak of memory ({peaks.source})", "GB/s", peaks.bandwidth / 1e9),
            exact(f"{row}, roofline", "img/s", batch / total),
            result(f"{row}, share of the roofline", "%", [100 * figure * total / batch for figure in figures]),
            result(f"{row}, share of compute (MFU)", "%", [100 * f * flops / peaks.flops[kind] for f in figures]),
            exact(f"{row}, roofline's time bound by compute", "%", 100 * by_compute / total),
        ]
        curves = {"GFLOP": [p.flops / 1e9 for p in parts], "MB": [p.nbytes / 1e6 for p in parts]}
        curves["ms at least"] = [1e3 * least for least, _ in times]
        series.append({"name": f"{row}, by layer", "x": {"layer": [part.name for part in parts]}, "y": curves})
    results.append(result(f"plain PyTorch loop {single.name} {name} batch {batch}", "img/s", samples["plain"]))
    # The plain loop is the same work in every version: what slows the machine slows it too.
    ratios.append(ratio("train_step_vs_plain", samples[mixed], samples["plain"]))
    others = [case for case in samples if case not in dtypes and case != "plain"]
    for other in others:
        whose = "train step" if other == "eager" else "plain PyTorch loop"
        results.append(result(f"{whose} {mixed} {name} batch {batch}, {other}", "img/s", samples[other]))
        ratios.append(ratio(f"train_step_vs_{other.replace(' ', '_')}", samples[mixed], samples[other]))
    if len(dtypes) > 1:
        ratios.append(ratio(f"train step {mixed} / {single.name}", samples[mixed], samples[single.name]))
    return Found(results, ratios, series)
