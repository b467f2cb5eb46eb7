"""`fastseg bench ladder`: from files to trained-on images, a rung at a time, all in images per second.

The data path's rungs hold what the ones before them do, and so do the network's, which work on images in memory;
"together" is training as it is: the data path that `auto` chooses, and the whole step. What holds training back is the
lower of the two sides, and a faster one could give at most what the other allows.
"""

import dataclasses
import functools
import itertools
import statistics
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from fastseg.bench.data import SECONDS, Case, decoding, full_batches
from fastseg.bench.drill import Drill
from fastseg.bench.harness import Found, exact, ratio, result, take_turns
from fastseg.config import Model, Size
from fastseg.distributed import choose_dtype
from fastseg.pipelines.plan import Plan
from fastseg.pipelines.source import Spec, TrainSource, choose_loader, decoded_at_once
from fastseg.specs import make_plan, open_specs


def _files(spec: Spec, batch: int) -> Iterator[object]:
    """Reading the bytes of images and labels, and nothing else."""
    with ThreadPoolExecutor(spec.threads) as pool:
        for indices in full_batches(spec, batch):
            pairs = [spec.pairs[i] for i in indices]
            yield list(pool.map(lambda path: Path(path).read_bytes(), [p for x in pairs for p in (x.image, x.label)]))


def _training(spec: Spec, plan: Plan, step: Drill, waits: list[list[float]]) -> Iterator[object]:
    """Training on batches of the data path; waits for them are noted in a new list, as shares of their steps."""
    batches = iter(TrainSource(spec, plan))
    noted: list[float] = []
    waits.append(noted)
    while True:
        start = time.perf_counter()
        batch = next(batches)
        waited = time.perf_counter() - start
        step(batch.images, batch.labels)
        step.wait()
        noted.append(waited / (time.perf_counter() - start))
        yield None


def _calls(call: Callable[[], object]) -> Iterator[object]:
    while True:
        yield call()


def measure(
    *, data: str, size: Size, batch: int, rounds: int, device: str, quick: bool, network: str = Model.network
) -> Found:
    """Each rung's throughput, what binds, and how much a faster data path or network could give.

    Args:
        network: as `model.network`.
    """
    shown = str(size)
    config, specs = open_specs(data, splits=("train",), size=shown, batch=batch, device=device)
    spec = specs["train"]
    dtype = choose_dtype("auto", spec.device.type).dtype
    spec = dataclasses.replace(spec, dtype=dtype)
    plan = make_plan(config, spec, 1)
    streaming, chosen = choose_loader("auto", spec)[0], choose_loader("auto", spec, epochs=True)[0]
    together = min(decoded_at_once(batch), len(spec.pairs))
    own = {header.image_size for header in spec.headers}
    step = Drill(spec.device, dtype, size, batch, network=network)
    waits: list[list[float]] = []

    def source(read: Spec) -> Iterator[object]:
        return iter(TrainSource(read, plan))

    makers: dict[str, tuple[Callable[[], Iterator[object]], int]] = {
        "read files": (functools.partial(_files, spec, together), together)
    }
    if len(own) == 1 and own != {size}:
        as_it_is = dataclasses.replace(streaming, size=Size(*own.pop()))
        makers["+ decode"] = (functools.partial(decoding, as_it_is, together), together)
    makers["+ decode, resize"] = (functools.partial(decoding, streaming, together), together)
    makers["+ augment"] = (functools.partial(source, streaming), batch)
    if chosen.tier.keeps:
        makers["the same from the cache"] = (functools.partial(source, chosen), batch)
        for _ in itertools.islice(source(chosen), -(-len(spec.pairs) // batch)):
            pass  # fills it
    makers["forward"] = (lambda: _calls(lambda: step.step.forward(step.images)), batch)
    makers["+ backward"] = (lambda: _calls(lambda: step.step.backward(step.images, step.labels)), batch)
    makers["+ optimiser"] = (lambda: _calls(lambda: step(step.images, step.labels)), batch)
    makers["together"] = (lambda: _training(chosen, plan, step, waits), batch)
    seconds = SECONDS / 5 if quick else SECONDS
    rungs: dict[str, Callable[[], float]] = {
        name: Case(make, images, seconds, wait=lambda _: step.wait()) for name, (make, images) in makers.items()
    }
    samples = take_turns(rungs, rounds)

    rows = [result(f"ladder {name} {shown}", "img/s", figures) for name, figures in samples.items()]
    feeding = "the same from the cache" if chosen.tier.keeps else "+ augment"
    # Of all measurements but the one that take_turns drops, and all steps but those that begin.
    shares = [100 * statistics.mean(noted[1:]) for noted in waits[1:]]
    rows.append(result(f"ladder data wait {shown}", "%", shares))
    medians = {name: statistics.median(samples[name]) for name in (feeding, "+ optimiser")}
    lowest = min(medians, key=lambda name: medians[name])
    rows.append(exact(f"ladder lowest: {lowest}", "img/s", medians[lowest]))
    # On a GPU the two sides work side by side, and the slower one binds; on a CPU they share the cores.
    pairs = list(zip(samples[feeding], samples["+ optimiser"], strict=True))
    alone = [min(a, b) if spec.device.type == "cuda" else 1 / (1 / a + 1 / b) for a, b in pairs]
    return Found(
        rows,
        [
            ratio("a faster data path: at most", samples["+ optimiser"], samples["together"]),
            ratio("a faster network: at most", samples[feeding], samples["together"]),
            ratio("together / explained by its parts", samples["together"], alone),
        ],
    )
