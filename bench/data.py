"""`fastseg bench data`: from files to batches on the device, our tiers and what users would take instead, side by side.

Everyone reads the same files and makes the same tensors: normalised fp32 images in channels-last memory, mirrored and
moved by chance, and uint8 labels. A DataLoader is measured with 0, 1 and 2 workers, and the best of them counts. Our
tiers are measured on one thread and with larger batches too. Memory is that of a fresh process and its workers, each
shared page counted once (PSS), beyond what Python with torch takes.
"""

import contextlib
import dataclasses
import functools
import itertools
import multiprocessing
import os
import signal
import statistics
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import torch

from fastseg.bench import peers
from fastseg.bench.harness import Found, Result, exact, ratio, result, take_turns
from fastseg.config import Size
from fastseg.errors import FastsegError
from fastseg.pipelines.plan import Plan, in_order
from fastseg.pipelines.source import Spec, TrainSource, choose_loader, decoded_at_once, make_tier
from fastseg.specs import make_plan, open_specs

SECONDS = 1.0  # each measurement takes as many batches as last this long
WORKERS = (0, 1, 2)
LARGER = 4  # times the batch, as a second batch size
SETTLED = 16  # batches after which the memory of what keeps nothing does not grow

Batches = Iterator[tuple[torch.Tensor, torch.Tensor]]


class Case:
    """One way to get batches, and what they cost.

    Each measurement begins anew: what one case prefetches, or its idle threads, shall not slow the next one.
    """

    def __init__(
        self,
        make: Callable[[], Iterator[Any]],
        batch: int,
        seconds: float,
        wait: Callable[[Any], object] = lambda batch: batch[0][0, 0, 0, 0].item(),
        settled: int = SETTLED,
    ) -> None:
        self.make, self.batch, self.seconds, self.settled = make, batch, seconds, settled
        self.wait = wait  # until a GPU has made what it is given
        self.cpu_seconds: list[float] = []  # per image, a value per measurement

    def __call__(self) -> float:
        """Images per second, over that many seconds or one call, after a third of them to begin."""
        with contextlib.closing(self.make()) as batches:  # type: ignore[type-var]
            start = time.perf_counter()
            while time.perf_counter() - start < self.seconds / 3:
                self.wait(next(batches))
            done, start, cpu = 0, time.perf_counter(), cpu_seconds()
            while (elapsed := time.perf_counter() - start) < self.seconds or not done:
                self.wait(next(batches))
                done += self.batch
            self.cpu_seconds.append((cpu_seconds() - cpu) / done)
        return done / elapsed


def cpu_seconds() -> float:
    """CPU time of this process and of its children, so far."""
    total = time.process_time()
    for child in children():
        with contextlib.suppress(OSError):  # it has just ended
            fields = Path(f"/proc/{child}/stat").read_text().rpartition(")")[2].split()
            total += (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK")
    return total


def children() -> list[int]:
    """Processes that this one has started; none where the system does not say."""
    try:
        return [
            int(pid) for task in Path("/proc/self/task").iterdir() for pid in (task / "children").read_text().split()
        ]
    except OSError:
        return []


def memory_kib() -> int:
    """Memory of this process and its children, what several share counted once; 0 where the system does not say."""
    total = 0
    for pid in ("self", *children()):
        with contextlib.suppress(OSError):
            text = Path(f"/proc/{pid}/smaps_rollup").read_text()
            total += sum(int(line.split()[1]) for line in text.splitlines() if line.startswith("Pss:"))
    return total


def _remember(make: Callable[[], Batches], count: int, answer: Any) -> None:
    """What a fresh process does to find out what `count` of `make`'s batches take."""
    before, batches = memory_kib(), make()
    for _ in range(count):
        next(batches)
    answer.put(memory_kib() - before)
    # No orderly end: threads of the libraries that peers use do not always survive it.
    for child in children():
        os.kill(child, signal.SIGKILL)
    os._exit(0)


def memory_of(make: Callable[[], Batches], count: int) -> float | None:
    """MiB that `count` batches take in a process of their own, or None where the system does not say."""
    if not memory_kib():
        return None
    # Its workers are killed, see above; whoever cleans up after them need not say so.
    os.environ.setdefault("PYTHONWARNINGS", "ignore:resource_tracker")
    context = multiprocessing.get_context("spawn")
    answer = context.SimpleQueue()
    process = context.Process(target=_remember, args=(make, count, answer))
    process.start()
    process.join()
    if process.exitcode:
        raise FastsegError(f"bench data: a process that measures memory ended with code {process.exitcode}")
    return answer.get() / 1024


def training(spec: Spec, plan: Plan) -> Batches:
    """Batches as training gets them, on the spec's number of threads."""
    before = torch.get_num_threads()
    torch.set_num_threads(spec.threads)
    try:
        for batch in TrainSource(spec, plan):
            yield batch.images, batch.labels
    finally:
        torch.set_num_threads(before)


def full_batches(spec: Spec, batch: int) -> Iterator[np.ndarray]:
    """Indices in order, again and again, without the rest of the split that fills no batch."""
    return itertools.cycle(in_order(len(spec.pairs), batch)[: len(spec.pairs) // batch])


def decoding(spec: Spec, batch: int) -> Batches:
    """A streaming tier without what makes a training batch of its pixels: that part's share of the time."""
    for images, labels in make_tier(spec).decode(full_batches(spec, batch), batch, resize_labels=True):
        yield images[0][None], labels[0]


def copy_bound(size: Size, batch: int, seconds: float) -> Callable[[], float]:
    """Images per second of writing batches of that size and nothing else: what memory allows."""
    pixels, out = (torch.zeros(batch, *size, 3) for _ in range(2))

    def measure() -> float:
        done, start = 0, time.perf_counter()
        while (elapsed := time.perf_counter() - start) < seconds / 4:
            out.copy_(pixels)
            done += batch
        return done / elapsed

    return measure


def measure(*, data: str, size: Size, batch: int, rounds: int, device: str, quick: bool) -> Found:
    """Rows per tier and peer, and how our tiers compare with the best peer."""
    config, specs = open_specs(data, splits=("train",), size=size, batch=batch, device=device)
    spec = specs["train"]
    plan = make_plan(config, len(spec.pairs), 1)
    cases: dict[str, Case] = {}
    seconds = SECONDS / 5 if quick else SECONDS

    epoch = -(-len(spec.pairs) // batch)

    def case(batches: Callable[..., Batches], *given: Any, images: int = batch, keeps: bool = False) -> Case:
        return Case(functools.partial(batches, *given), images, seconds, settled=epoch if keeps else SETTLED)

    chosen = (choose_loader(loader, spec)[0] for loader in ("auto", "cache", "reference"))
    tiers = {read.loader: read for read in chosen}
    for tier, read in tiers.items():
        cases[tier] = case(training, read, plan, keeps=read.tier.keeps)
    for tier, read in () if quick else tiers.items():
        alone, more = dataclasses.replace(read, threads=1), dataclasses.replace(plan, batch=LARGER * batch)
        cases[f"{tier}, 1 thread"] = case(training, alone, plan, keeps=read.tier.keeps)
        cases[f"{tier}, batch {more.batch}"] = case(training, read, more, images=more.batch, keeps=read.tier.keeps)
    if "dali" in cases:
        together = min(decoded_at_once(batch), len(spec.pairs))
        cases["dali, decoding alone"] = case(decoding, tiers["dali"], together, images=together)
    for name, batches in peers.available()[0].items():
        for workers in WORKERS:
            cases[f"{name}, {workers} workers"] = case(batches, spec.pairs, size, batch, workers)
    if "cache" in cases:
        filling = training(tiers["cache"], plan)
        for _ in range(epoch):
            next(filling)
    samples = take_turns({**cases, "copying": copy_bound(size, batch, seconds)}, rounds)
    shown = str(size)
    rates = [result(f"data {name} {shown}", "img/s", figures) for name, figures in samples.items()]
    costs = [
        result(f"data {name} {shown}, CPU", "ms/img", [1e3 * s for s in c.cpu_seconds[1:]]) for name, c in cases.items()
    ]
    for name, measured in () if quick else cases.items():
        mib = memory_of(measured.make, measured.settled)
        costs += [exact(f"data {name} {shown}, memory", "MiB", mib)] if mib is not None else []
    ratios: list[Result] = []
    others = [name for name in cases if name.startswith(tuple(peers.PEERS))]
    best = max(others, key=lambda name: statistics.median(samples[name]))
    rates.append(exact(f"data best peer: {best}", "img/s", statistics.median(samples[best])))
    ratios += [ratio(f"{tier}_vs_best_peer", samples[tier], samples[best]) for tier in tiers]
    loaders = [name for name in others if "DataLoader" in name]
    loader = max(loaders, key=lambda name: statistics.median(samples[name]))
    ratios += [ratio(f"{tier}_vs_best_dataloader", samples[tier], samples[loader]) for tier in tiers]
    if "dali" in cases:
        ratios.append(ratio("data dali / reference", samples["dali"], samples["reference"]))
    if "cache" in cases:
        ratios.append(ratio("data cache / copying", samples["cache"], samples["copying"]))
    return Found(rates + costs, ratios)
