"""What holds a run or a machine back, in words, and what would help: `fastseg doctor`.

Each finding is read from figures that were measured; what it expects of a cure is what those figures allow at most.
"""

import json
import re
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from fastseg.errors import FastsegError, UsageError
from fastseg.runlog import percent
from fastseg.runs import read_log

BEGINNING = 2  # log lines in which everything warms up
MATTERS = 0.05  # a share of the time that is worth a change
ROOMY = 0.5  # a GPU's memory is half empty
FAR = 0.6  # of the roofline: less is far from what the machine allows


class Finding(NamedTuple):
    """A sentence; how many times faster the cure could make it, at most, where figures say so; and what to type."""

    text: str
    expected: float | None = None
    cure: str | None = None


def of_run(run: Path) -> list[Finding]:
    """What the log of a run tells of its speed.

    Raises:
        UsageError: no run there. FastsegError: too short a run to say anything.
    """
    events = read_log(run)
    starts = [event for event in events if event["event"] == "start"]
    if not starts:
        raise UsageError(f"--run {run}: no run there (no log.jsonl with a start); give a run folder of fastseg train")
    lines = [event for event in events if event["event"] == "train"]
    if len(lines) <= BEGINNING:
        raise FastsegError(f"--run {run}: too short to say anything; {BEGINNING + 1} log lines are needed")
    environment = run / "environment.json"
    machine = json.loads(environment.read_text(encoding="utf-8")) if environment.is_file() else {}
    return [
        *_data(starts[-1], lines, machine),
        *_compute(starts[-1], lines, machine),
        *_capture(starts[-1], events),
        *_validation(events, lines),
    ]


def _data(start: dict[str, Any], lines: Sequence[dict[str, Any]], machine: dict[str, Any]) -> Iterator[Finding]:
    """How long training waits for data, and why it does."""
    facts = start["choices"]["loader"]["facts"]
    used, there = facts["threads"] * start["world"], machine.get("cores", 0)
    later = [line for line in lines[BEGINNING:] if line["epoch"] > 1]
    wait = _wait(lines[BEGINNING:])
    decoded = max(line["decoded_per_s"] for line in lines)
    if wait < MATTERS:
        yield Finding(
            f"training waits {percent(wait)} of the time for data: a faster data path could give "
            f"{1 / (1 - wait):.3f} times the speed at most"
        )
        return
    at_most = 1 / (1 - wait)
    said = f"training waits {percent(wait)} of the time for data; decoding uses {used} of {there} threads"
    if decoded:
        said += f" for {decoded:.0f} img/s"
    if facts["keeps"] and later and _wait(later) < MATTERS:
        cure = "fastseg data prepare DATA --cache-dir DIR, then train with --cache-dir DIR"
        yield Finding(f"{said}; only the first epoch does, which fills the cache", at_most, cure)
    elif facts["keeps"]:
        yield Finding(f"{said}, although the data are cached: the CPU is busy with something else", at_most)
    elif facts["obstacle"]:
        yield Finding(
            f"{said}; nothing is kept, since {facts['obstacle']}",
            at_most,
            "--cache-dir on a disk with room, or more --set runtime.threads",
        )
    else:
        yield Finding(f"{said}; nothing is kept, as asked", at_most, "--loader auto")


def _wait(lines: Sequence[dict[str, Any]]) -> float:
    """The share of the time of these log lines that went by waiting for data."""
    # img/s of lines with equal numbers of images: their times are as its reciprocals.
    times = [1 / line["img_per_s"] for line in lines]
    return sum(t * line["data_wait"] for t, line in zip(times, lines, strict=True)) / sum(times)


def _compute(start: dict[str, Any], lines: Sequence[dict[str, Any]], machine: dict[str, Any]) -> Iterator[Finding]:
    """What of precision, operators and batch is left to gain."""
    speed = f"{start['device']} in {start['dtype']}"
    if start["dtype"] in ("float32", "tf32"):
        yield Finding(f"the network runs on {speed}; `fastseg bench model` measures what less gives", None, "--amp")
    if start["device"] != "CPU" and start["kernels"] == "torch":
        yield Finding("PyTorch's operators run between the convolutions", None, "--set runtime.kernels=auto")
    total = re.match(r"\d+", machine.get("gpu_memory") or "")
    peak = max(line["memory_mib"] for line in lines)
    if start["device"] != "CPU" and total and peak < ROOMY * int(total[0]):
        yield Finding(
            f"{peak / 1024:.1f} of {int(total[0]) / 1024:.1f} GiB of the GPU are used: a larger batch fits",
            None,
            "fastseg train --dry-run shows which batches fit, and how fast they are",
        )


def _capture(start: dict[str, Any], events: Sequence[dict[str, Any]]) -> Iterator[Finding]:
    """Whether the host asks for a step's kernels one by one, and what it took to capture them."""
    if start["device"] == "CPU":
        return
    failures = [event["why"] for event in events if event["event"] == "not_captured"]
    captured = [event for event in events if event["event"] == "captured"]
    chosen = start["choices"]["capture"]
    if failures or chosen["value"] == "off":
        why = failures[-1] if failures else chosen["why"]
        yield Finding(
            f"the host asks for each kernel of a step ({why}), which holds a GPU back where batches are small",
            None,
            "fastseg bench model measures a step both ways; --set runtime.capture=auto",
        )
    elif captured:
        seconds = sum(event["seconds"] for event in captured)
        yield Finding(
            f"steps are replayed from CUDA graphs: {len(captured)} captured in {seconds:.1f} s, of which the last "
            f"holds {captured[-1]['memory_mib']:.0f} MiB"
        )


def _validation(events: Sequence[dict[str, Any]], lines: Sequence[dict[str, Any]]) -> Iterator[Finding]:
    """How much of a run goes into validation."""
    validating = sum(event["seconds"] for event in events if event["event"] == "val")
    training = lines[-1]["seconds"]
    share = validating / (training + validating)
    if share > 4 * MATTERS:
        yield Finding(
            f"{percent(share)} of the run is validation",
            1 / (1 - 0.8 * share),
            "--set train.validate_every=5",
        )


def of_bench(document: dict[str, Any]) -> list[Finding]:
    """What a document of `fastseg bench ladder` or `model`, or both, tells.

    Raises:
        UsageError: it has rows of neither.
    """
    results = {row["name"]: row["value"] for row in document["results"]}
    ratios = {row["name"]: row["value"] for row in document["ratios"]}
    found = [*_ladder(results, ratios), *_model(results, ratios)]
    if not found:
        raise UsageError("--bench: no ladder and no model in it; write it with fastseg bench all --json")
    return found


def _ladder(results: dict[str, float], ratios: dict[str, float]) -> Iterator[Finding]:
    data, network = ratios.get("a faster data path: at most"), ratios.get("a faster network: at most")
    if data is None or network is None:
        return
    wait = next(value for name, value in results.items() if name.startswith("ladder data wait"))
    lowest = next(name for name in results if name.startswith("ladder lowest: ")).removeprefix("ladder lowest: ")
    together = next(value for name, value in results.items() if name.startswith("ladder together"))
    yield Finding(f"{together:.1f} img/s together; training waits {wait:.1f} % of the time for data")
    if lowest == "+ optimiser":
        yield Finding(
            f"the network binds: a faster data path could give {data:.2f} times the speed at most; "
            f"data come fast enough for a network {network:.1f} times as fast"
        )
    else:
        yield Finding(
            f"the data path binds ({lowest}): a faster one could give {data:.2f} times the speed at most",
            data,
            "--loader cache, where the data fit",
        )


def _model(results: dict[str, float], ratios: dict[str, float]) -> Iterator[Finding]:
    for name, value in ratios.items():
        if match := re.fullmatch(r"train step (\w+) / (float32|tf32)", name):
            yield Finding(f"{match[1]} trains {value:.2f} times as fast as {match[2]}", value, "--amp")
    for name, value in results.items():
        if name.endswith("share of the roofline"):
            said = f"{name.partition(',')[0]}: {value:.0f} % of what its roofline allows"
            yield Finding(said, 100 / value, "fastseg profile") if value < 100 * FAR else Finding(said)


def show(findings: Sequence[Finding]) -> str:
    """A line for each finding, with what to do about it."""
    lines = []
    for finding in findings:
        expected = f"expected: at most x{finding.expected:.2f}" if finding.expected else ""
        advice = ": ".join(part for part in (expected, finding.cure) if part)
        lines.append(finding.text + (f"\n    {advice}" if advice else ""))
    return "\n".join(lines)
