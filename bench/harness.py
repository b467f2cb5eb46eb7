"""Measuring fairly on a noisy machine: cases take turns, and a ratio is made of neighbours in time."""

import itertools
import math
import operator
import statistics
import time
from collections.abc import Callable, Collection, Mapping, Sequence
from pathlib import Path
from types import MappingProxyType
from typing import Any, NamedTuple

from fastseg.errors import first_line

SCHEMA = 1

Result = dict[str, Any]


class Found(NamedTuple):
    """What a bench returns: rows of `result` or `exact`, of `ratio`, and curves.

    A curve is {"name", "x": {label: values}, "y": {label: values, ...}}. `protocol` is what this bench has to say of
    how it measured, beside what is said of all.
    """

    results: list[Result]
    ratios: list[Result]
    series: Sequence[dict[str, Any]] = ()
    protocol: Mapping[str, Any] = MappingProxyType({})


WARMUP = 1  # calls of each case before those that count
LEAST = 3  # rounds, where time is short
STUCK = 30.0  # seconds: what takes longer has hung, or would take the time of all others
NO_TIME = "no time was left"


def take_turns(cases: dict[str, Callable[[], float]], rounds: int, seconds: float = 0.0) -> dict[str, list[float]]:
    """The figure that each case returns, once per round; every second round runs in reverse order.

    Each case is called WARMUP times before, and that figure is dropped: caches fill, algorithms are chosen.

    Args:
        seconds: more rounds follow until so much time has passed.
    """
    for case in cases.values():
        for _ in range(WARMUP):
            case()
    samples: dict[str, list[float]] = {name: [] for name in cases}
    end = time.perf_counter() + seconds
    turn = 0
    while turn < rounds or time.perf_counter() < end:
        for name in list(cases)[:: -1 if turn % 2 else 1]:
            samples[name].append(cases[name]())
        turn += 1
    return samples


class _Cases:
    """Cases that are called as long as there is time, and what became of them.

    Attributes:
        samples: figures of each that takes part.
        left_out: why the others do not.
    """

    def __init__(self, cases: Mapping[str, Callable[[], float]], end: float, may_fail: Collection[str]) -> None:
        self._cases, self._end, self._may_fail = cases, end, may_fail
        self._cost: dict[str, float] = {}  # seconds of the last call
        self.samples: dict[str, list[float]] = {}
        self.left_out: dict[str, str] = {}

    def leave_out(self, name: str, why: str) -> None:
        self.left_out[name] = why
        self.samples.pop(name, None)
        self._cost.pop(name, None)

    def call(self, name: str) -> None:
        start = time.perf_counter()
        try:
            figure = self._cases[name]()
        except Exception as error:
            if name not in self._may_fail:
                raise
            self.leave_out(name, first_line(error))
            return
        self.samples[name].append(figure)
        self._cost[name] = time.perf_counter() - start
        if name in self._may_fail and self._cost[name] > STUCK:
            self.leave_out(name, f"one measurement takes more than {STUCK:.0f} s")

    def fit(self, rounds: int, *, one_more: bool = False) -> bool:
        """Whether so many rounds end in time; also with a case never called, taken to last as long as the others do."""
        guess = statistics.fmean(self._cost.values()) if one_more and self._cost else 0.0
        return time.perf_counter() + guess + rounds * (sum(self._cost.values()) + guess) <= self._end

    def make_room(self, rounds: int, of: Collection[str]) -> None:
        """Leave out the last of these until so many rounds fit."""
        for name in [name for name in self.samples if name in of][::-1]:
            if not self.fit(rounds):
                self.leave_out(name, NO_TIME)


def turns_in_time(
    first: Mapping[str, Callable[[], float]],
    more: Mapping[str, Callable[[], float]],
    rounds: int,
    end: float,
    *,
    may_fail: Collection[str] = (),
) -> tuple[dict[str, list[float]], dict[str, str]]:
    """As `take_turns`, with as many of the cases and rounds as fit in before `end`, a time of `time.perf_counter`.

    LEAST rounds of `first` are measured however long they take. Those of `more` join in their order, while LEAST rounds
    of all fit; whoever joins takes part in every round, so that all figures of a round are neighbours in time.

    Args:
        may_fail: cases that are left out where they raise, or take longer than STUCK; errors of others are raised.

    Returns:
        Figures of each case that was measured, as many of all; and of the others why they were left out.
    """
    cases = _Cases({**first, **more}, end, may_fail)
    least = min(LEAST, rounds)
    for name in (*first, *more):
        if name in more and not cases.fit(least, one_more=True):
            cases.leave_out(name, NO_TIME)
            continue
        cases.samples[name] = []
        for _ in range(WARMUP):
            if name in cases.samples:
                cases.call(name)
        cases.make_room(least, more)
    for figures in cases.samples.values():
        figures.clear()
    for turn in range(rounds):
        if turn >= least and not cases.fit(1):
            break
        cases.make_room(max(1, least - turn), more)
        for name in list(cases.samples)[:: -1 if turn % 2 else 1]:
            cases.call(name)
    return cases.samples, cases.left_out


def _spread(samples: Sequence[float]) -> dict[str, Any]:
    """Median, number, and the 20th and 80th percentile."""
    deciles = statistics.quantiles(samples, n=10, method="inclusive") if len(samples) > 1 else [samples[0]] * 9
    return {"value": statistics.median(samples), "n": len(samples), "p20": deciles[1], "p80": deciles[7]}


def result(name: str, unit: str, samples: Sequence[float]) -> Result:
    """A row of `results`."""
    return {"name": name, "unit": unit, **_spread(samples)}


def exact(name: str, unit: str, value: float) -> Result:
    """A row of `results` for what is counted, not measured."""
    return {"name": name, "unit": unit, "value": value, "n": 1, "p20": value, "p80": value}


def ratio(name: str, above: Sequence[float], below: Sequence[float], *, better: str = "higher") -> Result:
    """A row of `ratios`: round by round, so that what slows the machine slows both; `better` is "higher" or "lower"."""
    row = {"name": name, **_spread([a / b for a, b in zip(above, below, strict=True)])}
    return row if better == "higher" else row | {"better": better}


def document(found: Sequence[Found], protocol: dict[str, Any], measured_on: dict[str, Any]) -> dict[str, Any]:
    """Results with what they were measured on, which is `environment()` as it was when they began, and how."""
    parts = {name: [row for part in found for row in getattr(part, name)] for name in ("results", "ratios", "series")}
    for part in found:
        protocol = protocol | dict(part.protocol)
    return {"schema": SCHEMA, "environment": measured_on, "protocol": protocol, **parts}


def plot(found: dict[str, Any], path: Path) -> None:
    """Draw a document's curves, a panel for each name, into an SVG file. What is beside "measured" was not measured,
    and is dashed."""
    from matplotlib.figure import Figure

    panels = [list(curves) for _, curves in itertools.groupby(found["series"], operator.itemgetter("name"))]
    figure = Figure(figsize=(7, 2.4 * max(len(panels), 1.5)), layout="constrained")
    for axes, curves in zip(figure.subplots(len(panels), squeeze=False)[:, 0], panels, strict=True):
        for curve in curves:
            ((x_label, x),) = curve["x"].items()
            for label, y in curve["y"].items():
                dashed = "measured" in curve["y"] and label != "measured"
                axes.plot(x, y, "--" if dashed else "o-", markersize=3, label=label)
        highest = max(value for curve in curves for y in curve["y"].values() for value in y)
        axes.set(xlabel=x_label, xlim=(0, None), ylim=(0, 1.2 * highest))
        axes.set_title(curves[0]["name"], fontsize="medium")
        axes.grid(alpha=0.3)
        if len(axes.lines) > 1:
            axes.legend(fontsize="small")
    stamp = found["environment"]
    figure.suptitle(f"{stamp['gpus'] or stamp['processor']}, {stamp['threads']} CPU threads", fontsize="small")
    figure.savefig(path, format="svg", metadata={"Date": None})


def _four(value: float) -> str:
    """A figure with four significant digits, or all those before its point."""
    return f"{value:,.{max(0, 3 - math.floor(math.log10(value))) if value else 0}f}"


def show(found: dict[str, Any]) -> str:
    """The document as text for a terminal."""
    stamp = found["environment"]
    lines = [
        f"{stamp['gpus'] or stamp['processor']}, {stamp['threads']} CPU threads, torch {stamp['torch']}",
        ", ".join(f"{name} {value}" for name, value in found["protocol"].items() if name != "left_out"),
    ]
    width = max(len(row["name"]) for row in found["results"] + found["ratios"])
    for row in found["results"]:
        spread = f"  ({_four(row['p20'])} to {_four(row['p80'])}, n = {row['n']})" if row["n"] > 1 else ""
        lines.append(f"{row['name']:<{width}} {_four(row['value']):>12} {row['unit']}{spread}")
    for row in found["ratios"]:
        lines.append(
            f"{row['name']:<{width}} {row['value']:>12.2f} x  ({row['p20']:.2f} to {row['p80']:.2f}, n = {row['n']})"
        )
    if left_out := found["protocol"].get("left_out"):
        lines.append(f"left out: {'; '.join(left_out)}")
    return "\n".join(lines)
