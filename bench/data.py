"""`fastseg bench data`: from files to batches on the device, our tiers and what users would take instead, side by side.

Everyone reads the same files and makes the same tensors: normalised fp32 images in channels-last memory, mirrored and
moved by chance, and uint8 labels. A peer is measured with as many workers as there are cores, half as many and none,
and the best of them counts. Our tiers are measured on one thread, with larger batches, and with jittered scales and
colours too. Memory is that of a fresh process and its workers, each shared page counted once (PSS), beyond what Python
with torch takes.

It ends in a given time: what tells most comes first, and what was not reached is left out, and named.
"""

import contextlib
import dataclasses
import functools
import itertools
import multiprocessing
import os
import signal
import statistics
import sys
import time
from collections.abc import Callable, Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch

from fastseg.bench import peers
from fastseg.bench.harness import LEAST, NO_TIME, WARMUP, Found, Result, exact, ratio, result, turns_in_time
from fastseg.config import Size
from fastseg.data import draw_once
from fastseg.errors import FastsegError
from fastseg.pipelines.plan import Plan, in_order
from fastseg.pipelines.source import Spec, TrainSource, choose_loader, decoded_at_once, make_tier
from fastseg.specs import make_plan, open_specs

SECONDS = 1.0  # each measurement takes as many batches as last this long
MINUTES = 3.0  # that all of it takes, unless told otherwise
FILLING = 1 / 3  # of that time may go to decoding each image once, for the cache
LARGER = 4  # times the batch, as a second batch size
JITTERED = 2.0, 0.5  # scale and colour of the sample plan, as a case of its own
SETTLED = 16  # batches after which the memory of what keeps nothing does not grow
SLACK = 16 << 20  # bytes of /dev/shm that stay free for others

# The set of `--format jpeg`: photos as large as those of Cityscapes, and the network's input.
JPEG_COUNTS = {"train": 16, "val": 4}
JPEG_SIZE, JPEG_INPUT = (1024, 2048), "512x1024"

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


def memory_of(make: Callable[[], Batches], count: int, seconds: float | None = None) -> float | None:
    """MiB that `count` batches take in a process of their own, or None where the system does not say.

    Raises:
        FastsegError: the process failed, or took longer than `seconds`.
    """
    if not memory_kib():
        return None
    # Its workers are killed, see above; whoever cleans up after them need not say so.
    os.environ.setdefault("PYTHONWARNINGS", "ignore:resource_tracker")
    context = multiprocessing.get_context("spawn")
    answer = context.SimpleQueue()
    process = context.Process(target=_remember, args=(make, count, answer))
    process.start()
    process.join(seconds)
    if process.exitcode is None:
        process.kill()  # its workers see that it is gone, and end
        process.join()
        raise FastsegError(f"bench data: a process that measures memory had not ended after {seconds:.0f} s")
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


def numbers_of_workers(cores: int) -> list[int]:
    """Workers that peers are measured with; first the number that was best for them where we measured."""
    return sorted({cores, cores // 2, 0}, reverse=True)


def filled(spec: Spec, plan: Plan, end: float) -> bool:
    """Decode each image once into the cache; whether that was done by `end`, a time of `time.perf_counter`."""
    with contextlib.closing(training(spec, plan)) as filling:  # type: ignore[type-var]
        for _ in range(-(-len(spec.pairs) // plan.batch)):
            if time.perf_counter() > end:
                return False
            next(filling)
    return True


def without_room(size: Size, batch: int, numbers: list[int]) -> dict[int, str]:
    """The numbers of a DataLoader's workers for which /dev/shm is too small, where it would wait for ever, and why."""
    needs = {workers: peers.shared_bytes(size, batch, workers) for workers in numbers}
    memory = peers.shared_memory()
    if memory is None:
        return {}
    total, free = memory
    short = [workers for workers, need in needs.items() if need and need + SLACK > free]
    most = max((needs[workers] for workers in short), default=0) + SLACK
    why = (
        f"{peers.SHARED_MEMORY} has {free >> 20} MiB free, the batches of their workers take {-(-most >> 20)} MiB "
        f"(docker run --shm-size={-(-(total - free + most) >> 30)}g)"
    )
    return dict.fromkeys(short, why)


def memory_rows(cases: Mapping[str, Case], end: float, shown: str, left_out: dict[str, str]) -> list[Result]:
    """Rows of the memory of each case, as many as are measured by `end`; notes the others in `left_out`."""
    rows, longest = [], 0.0
    for name, case in cases.items():
        start = time.perf_counter()
        if start + longest > end:
            left_out[f"{name}, memory"] = NO_TIME
            continue
        try:
            mib = memory_of(case.make, case.settled, end - start)
        except FastsegError as error:  # all else has been measured, and is worth more
            left_out[f"{name}, memory"] = str(error).removeprefix("bench data: ")
            continue
        longest = max(longest, time.perf_counter() - start)
        rows += [exact(f"data {name} {shown}, memory", "MiB", mib)] if mib is not None else []
    return rows


def make_peers(
    spec: Spec, size: Size, batch: int, make: Callable[..., Case], left_out: dict[str, str]
) -> tuple[dict[str, Case], dict[str, Case]]:
    """Each peer with the number of workers that is most likely its best, and with the others.

    Args:
        make: a case of the function that gives batches and of what that is called with.
        left_out: gets those that /dev/shm has no room for.
    """
    numbers = numbers_of_workers(spec.threads)
    short = without_room(size, batch, numbers)
    likely: dict[str, Case] = {}
    others: dict[str, Case] = {}
    for name, batches in peers.available()[0].items():
        here = short if "DataLoader" in name else {}
        left_out |= {f"{name}, {workers} workers": why for workers, why in here.items()}
        possible = [workers for workers in numbers if workers not in here]
        for workers in possible:
            to = likely if workers == possible[0] else others
            to[f"{name}, {workers} workers"] = make(batches, spec.pairs, size, batch, workers)
    return likely, others


def compare(
    samples: Mapping[str, list[float]], tiers: Iterable[str], theirs: Iterable[str]
) -> tuple[list[Result], list[Result]]:
    """A row of the best peer, and ratios: our tiers beside the best peer and DataLoader, and beside one another."""
    rows: list[Result] = []
    ratios: list[Result] = []
    measured = {name: statistics.median(samples[name]) for name in theirs if name in samples}
    for kind, names in (("peer", list(measured)), ("dataloader", [name for name in measured if "DataLoader" in name])):
        if names:
            best = max(names, key=lambda name: measured[name])
            rows += [exact(f"data best peer: {best}", "img/s", measured[best])] if kind == "peer" else []
            ratios += [ratio(f"{tier}_vs_best_{kind}", samples[tier], samples[best]) for tier in tiers]
    pairs = [("dali", "reference"), ("cache", "copying"), *((f"{tier}, jittered", tier) for tier in tiers)]
    return rows, ratios + [
        ratio(f"data {a} / {b}", samples[a], samples[b]) for a, b in pairs if {a, b} <= samples.keys()
    ]


def measure(
    *,
    data: str,
    size: Size,
    batch: int,
    rounds: int,
    device: str,
    quick: bool,
    minutes: float = MINUTES,
    image_format: str | None = None,
) -> Found:
    """Rows per tier and peer, and how our tiers compare with the best peer.

    Args:
        minutes: that it may take, once the files are there. LEAST rounds of our tiers and of each peer are measured
            however long they take.
        image_format: of the drawn scenes that are read, with `data` synth: png, or jpeg for a set of large photos.
    """
    path = data
    if image_format == "jpeg":
        path = str(draw_once("synth-jpeg", counts=JPEG_COUNTS, size=JPEG_SIZE, image_format=image_format))
    config, specs = open_specs(path, splits=("train",), size=size, batch=batch, device=device)
    began = time.perf_counter()
    end = began + 60 * minutes
    spec = specs["train"]
    plan = make_plan(config, spec, 1)
    epoch = -(-len(spec.pairs) // batch)
    seconds = SECONDS / 5 if quick else SECONDS
    left_out: dict[str, str] = {}

    def case(batches: Callable[..., Batches], *given: Any, images: int = batch, keeps: bool = False) -> Case:
        return Case(functools.partial(batches, *given), images, seconds, settled=epoch if keeps else SETTLED)

    chosen = (choose_loader(loader, spec)[0] for loader in ("auto", "cache", "reference"))
    tiers = {read.loader: read for read in chosen}
    if "cache" in tiers and not filled(tiers["cache"], plan, began + FILLING * 60 * minutes):
        del tiers["cache"]
        left_out["cache"] = "to decode each image once takes too long"
    ours = {tier: case(training, read, plan, keeps=read.tier.keeps) for tier, read in tiers.items()}

    likely, others = make_peers(spec, size, batch, case, left_out)
    alone: dict[str, Case] = {}
    if "dali" in tiers:
        together = min(decoded_at_once(batch), len(spec.pairs))
        alone["dali, decoding alone"] = case(decoding, tiers["dali"], together, images=together)
    varied: dict[str, Case] = {}
    for tier, read in () if quick else tiers.items():
        one, more = dataclasses.replace(read, threads=1), dataclasses.replace(plan, batch=LARGER * batch)
        jittered = dataclasses.replace(plan, scale=JITTERED[0], colour=JITTERED[1])
        varied[f"{tier}, jittered"] = case(training, read, jittered, keeps=read.tier.keeps)
        varied[f"{tier}, 1 thread"] = case(training, one, plan, keeps=read.tier.keeps)
        varied[f"{tier}, batch {more.batch}"] = case(training, read, more, images=more.batch, keeps=read.tier.keeps)

    further: dict[str, Callable[[], float]] = {**alone, "copying": copy_bound(size, batch, seconds), **others, **varied}
    theirs = {**likely, **others}
    samples, late = turns_in_time({**ours, **likely}, further, rounds, end, may_fail=theirs)
    left_out |= late
    took = (time.perf_counter() - began) / 60
    cases = {name: c for name, c in {**ours, **likely, **alone, **others, **varied}.items() if name in samples}

    shown = str(size)
    rates = [result(f"data {name} {shown}", "img/s", figures) for name, figures in samples.items()]
    costs = [
        result(f"data {name} {shown}, CPU", "ms/img", [1e3 * s for s in c.cpu_seconds[WARMUP:]])
        for name, c in cases.items()
    ]
    costs += [] if quick else memory_rows(cases, end, shown, left_out)
    best, ratios = compare(samples, tiers, theirs)

    for why in dict.fromkeys(left_out.values()):
        without = "; ".join(name for name, reason in left_out.items() if reason == why)
        print(f"bench data: left out: {without}: {why}", file=sys.stderr)
    protocol: dict[str, Any] = {"minutes": minutes}
    if took > minutes and not samples.keys() & further.keys():
        protocol["took_minutes"] = round(took, 2)
        least = f"that is the least, {min(LEAST, rounds)} rounds of the first cases"
        print(f"bench data: took {took:.2f} minutes, not {minutes:g}: {least}", file=sys.stderr)
    if data == "synth":
        protocol["format"] = image_format or "png"
    return Found(rates + best + costs, ratios, protocol=protocol | ({"left_out": left_out} if left_out else {}))
