"""`fastseg bench fill`: how fast the cache fills, beside decoding alone, and what another image size costs once it has.

All begin at nothing and end with the last file of the split. In `fill` nobody takes batches after the first one, as
where a GPU is busy with a step; in the first pass they are taken as fast as they come. What is kept needs memory, and
on a virtual machine fresh pages can take as long to come as a fifth of the decoding: a row says what they take here.
"""

import contextlib
import dataclasses
import time
from collections.abc import Callable

import numpy as np

from fastseg.bench.harness import Found, ratio, result, take_turns
from fastseg.config import Augment, Size
from fastseg.errors import UsageError
from fastseg.pipelines import cache
from fastseg.pipelines.growing import GrowingSource, Phase
from fastseg.pipelines.plan import Plan, in_order
from fastseg.pipelines.prepared import shape_of
from fastseg.pipelines.source import Spec, TrainSource, choose_loader, decoded_at_once, make_tier
from fastseg.specs import make_plan, open_specs


def decoding(spec: Spec, batch: int) -> float:
    """Images per second of the tier that fills the cache, decoding the split once and keeping nothing."""
    start = time.perf_counter()
    inner, at_once = make_tier(spec).inner, decoded_at_once(batch)  # type: ignore[attr-defined]  # the cache tier's
    for _ in inner.decode(in_order(len(spec.pairs), at_once), at_once, resize_labels=True):
        pass
    return len(spec.pairs) / (time.perf_counter() - start)


def fresh_memory(spec: Spec) -> float:
    """Images per second of writing zeros to as much memory as the split takes, which the process did not have yet."""
    nbytes, start = shape_of(spec, resize_labels=True).nbytes, time.perf_counter()
    np.empty(nbytes, np.uint8).fill(0)
    return len(spec.pairs) / (time.perf_counter() - start)


def filling(spec: Spec, plan: Plan) -> float:
    """Images per second until all are kept, while nobody takes more than a batch."""
    start = time.perf_counter()
    with contextlib.closing(iter(TrainSource(spec, plan))) as batches:
        next(batches)
        checks = cache.open_once(spec, resize_labels=True).checks
        while not checks.all():
            time.sleep(1e-3)
        seconds = time.perf_counter() - start
    cache.forget()
    return len(spec.pairs) / seconds


def first_pass(spec: Spec, plan: Plan) -> float:
    """Images per second of the first epoch's batches, taken as fast as they come."""
    steps, start = plan.total_steps(1), time.perf_counter()
    with contextlib.closing(iter(TrainSource(spec, plan))) as batches:
        for _ in range(steps):
            next(batches).images[0, 0, 0, 0].item()  # waits for a GPU to have made it
        seconds = time.perf_counter() - start
    cache.forget()
    return steps * plan.batch / seconds


def switching(spec: Spec, plan: Plan, smaller: Size) -> Callable[[], float]:
    """Milliseconds that the first batch of a larger size takes to come, once all samples are kept."""
    epoch = plan.total_steps(1) + 1
    source = GrowingSource(spec, plan, [Phase(epoch, smaller), Phase(10**9, spec.size)], Augment())

    def measure() -> float:
        with contextlib.closing(iter(source)) as batches:
            for _ in range(epoch):
                next(batches).images[0, 0, 0, 0].item()
            start = time.perf_counter()
            next(batches).images[0, 0, 0, 0].item()
            return 1e3 * (time.perf_counter() - start)

    return measure


def measure(*, data: str, size: Size, batch: int, rounds: int, device: str, quick: bool) -> Found:
    """Images per second of filling and of decoding, turn by turn; `quick` does not matter.

    Raises:
        UsageError: there is no room to keep the split.
    """
    config, specs = open_specs(data, splits=("train",), size=size, batch=batch, device=device)
    spec, choice = choose_loader("cache", specs["train"], grows=True)
    if spec.loader != "cache":
        raise UsageError(f"bench fill: {choice.why}")
    plan = dataclasses.replace(make_plan(config, spec, 1), drop_remainder=False)
    smaller = Size(*(max(1, side // 2) for side in size))
    samples = take_turns(
        {
            "decoding alone": lambda: decoding(spec, batch),
            "fresh memory": lambda: fresh_memory(spec),
            "fill": lambda: filling(spec, plan),
            "first pass": lambda: first_pass(spec, plan),
        },
        rounds,
    )
    names = {name: f"fill {size}, {name}" for name in samples}
    rows = [result(names[name], "img/s", figures) for name, figures in samples.items()]
    switches = take_turns({"switch": switching(spec, plan, smaller)}, rounds)["switch"]
    rows.append(result(f"fill {size}, first batch after {smaller}", "ms", switches))
    alone = samples["decoding alone"]
    both = [1 / (1 / a + 1 / b) for a, b in zip(alone, samples["fresh memory"], strict=True)]  # one after the other
    ratios = [
        ratio(f"{names[name]} / {what}", samples[name], bound)
        for name in ("fill", "first pass")
        for what, bound in (("decoding", alone), ("decoding and fresh memory", both))
    ]
    return Found(rows, ratios)
