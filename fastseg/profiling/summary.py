"""Figures of a timeline: what a step's time goes to, and what the device does meanwhile."""

import bisect
import re
from collections import defaultdict
from collections.abc import Iterable, Sequence
from statistics import median
from typing import Any

from fastseg.profiling.timeline import Span, Timeline, Work

TOP = 10
OTHER = "other"
# Kernels that use Tensor Cores, by their names: the list of NVIDIA's PyProf (pyprof/prof/tc.py), and after it what came
# later: CUTLASS's and cuDNN's names of instruction shapes, Hopper's warp groups, Blackwell's fifth generation.
TENSOR_CORE = re.compile(
    "[hs]884|[hsc]1688|hmma|i8816|16816|dgrad_1x1_stride_2x2|first_layer_wgrad_kernel|conv1x1|conv2d_c1_k1|direct_group|"
    "xmma_(warp_specialized_implicit_|implicit_|sparse_)?gemm|xmma_sparse_conv|"
    "tensorop|tensor16x8|gmma|warpgroupsize|nvjet|tcgen05"
)
# cuDNN's, from one memory layout to the other: nchwToNhwcKernel, nhwcToNchwKernel, and those with folded channels.
CONVERSION = re.compile("nchwto(folded)?nhwc|nhwcto(folded)?nchw|foldednhwctonchw", re.IGNORECASE)
COMMUNICATION = "nccl"

Intervals = list[tuple[float, float]]


def summarise(found: Timeline) -> dict[str, Any]:
    """What `fastseg profile --json` says of one process. Times are milliseconds per step, shares are of the step.

    The ranges and "other" add up to the step. `device` is null where none was recorded.
    """
    steps, total = len(found.steps), sum(s.end - s.start for s in found.steps)

    def row(name: str, microseconds: float, **more: Any) -> dict[str, Any]:
        return {"name": name, "ms": microseconds / 1e3 / steps, "share": microseconds / total, **more}

    outer = _outermost(found.ranges)
    times, inner = _durations(outer), defaultdict[str, list[Span]](list)
    for span in found.ranges:
        holder = _holding(outer, span.start)
        if holder is not None and span is not holder:
            inner[holder.name].append(span)
    ranges = [
        row(name, spent, ranges=[row(*item) for item in _durations(_outermost(inner[name])).items()])
        for name, spent in times.items()
    ]
    own = _self_times(found.operators)
    operators = sorted(own.items(), key=lambda item: -item[1][0])[:TOP]
    return {
        "steps": steps,
        "step_ms": median(s.end - s.start for s in found.steps) / 1e3,
        "ranges": [*ranges, row(OTHER, total - sum(times.values()), ranges=[])],
        "operators": [row(name, spent, calls=calls / steps) for name, (spent, calls) in operators],
        "device": _device(found, outer, total) if found.work else None,
    }


def _device(found: Timeline, outer: Sequence[Span], total: float) -> dict[str, Any]:
    """The device's side; `total` is the duration of all steps in microseconds."""
    steps, spans = len(found.steps), [(s.start, s.end) for s in found.steps]

    def row(name: str, microseconds: float, **more: Any) -> dict[str, Any]:
        return {"name": name, "ms": microseconds / 1e3 / steps, "share": microseconds / total, **more}

    kernels = [w for w in found.work if not w.copy]
    talking = [w for w in kernels if COMMUNICATION in w.name.lower()]
    computing = [w for w in kernels if COMMUNICATION not in w.name.lower()]
    busy = _common(_union(found.work), spans)
    idle: dict[str, float] = defaultdict(float)
    for gap in _rest(busy, spans):
        idle[_cause(gap, outer)] += gap[1] - gap[0]
    by_range: dict[str, float] = defaultdict(float)
    for work in found.work:
        holder = _holding(outer, work.launched)
        by_range[holder.name if holder else OTHER] += work.end - work.start
    conversions: dict[str, int] = defaultdict(int)
    for work in kernels:
        if CONVERSION.search(work.name):
            conversions[_innermost(found.ranges, work.launched)] += 1
    computed, talked = _length(_union(computing)), _length(_union(talking))
    hidden = _length(_common(_union(talking), _union(computing)))
    on_tensor_cores = sum(w.end - w.start for w in computing if TENSOR_CORE.search(w.name))
    spent: dict[str, list[float]] = defaultdict(list)
    for work in kernels:
        spent[work.name].append(work.end - work.start)
    top = sorted(spent.items(), key=lambda item: -sum(item[1]))[:TOP]
    to_device = [w for w in found.work if w.copy == "HtoD"]
    return {
        "busy": _length(busy) / total,
        "ranges": [row(*item) for item in by_range.items()],
        "idle": [row(*item) for item in sorted(idle.items(), key=lambda item: -item[1])],
        "kernels": [row(name, sum(each), calls=len(each) / steps) for name, each in top],
        "tensor_core_share": on_tensor_cores / computed if computed else None,
        "communication": row(COMMUNICATION, talked, hidden=hidden / talked) if talked else None,
        "copies_to_device": row(
            "HtoD",
            sum(w.end - w.start for w in to_device),
            calls=len(to_device) / steps,
            megabytes=sum(w.nbytes for w in to_device) / 1e6 / steps,
        ),
        "layout_conversions": [{"name": n, "calls": count / steps} for n, count in conversions.items()],
    }


def _outermost(spans: Sequence[Span]) -> list[Span]:
    """Those that lie in no other; sorted by start, longer first."""
    kept: list[Span] = []
    for span in spans:
        if not kept or span.start >= kept[-1].end:
            kept.append(span)
    return kept


def _durations(spans: Iterable[Span]) -> dict[str, float]:
    """Microseconds by name, in the order of first appearance."""
    times: dict[str, float] = {}
    for span in spans:
        times[span.name] = times.get(span.name, 0.0) + span.end - span.start
    return times


def _holding(apart: Sequence[Span], moment: float) -> Span | None:
    """Which of spans that do not overlap, in order, a moment lies in."""
    place = bisect.bisect_right(apart, moment, key=lambda s: s.start) - 1
    return apart[place] if place >= 0 and moment < apart[place].end else None


def _innermost(spans: Sequence[Span], moment: float) -> str:
    """The shortest part that was under way."""
    holding = [s for s in spans if s.start <= moment < s.end]
    return min(holding, key=lambda s: s.end - s.start).name if holding else OTHER


def _cause(gap: tuple[float, float], outer: Sequence[Span]) -> str:
    """The part of the step in which the host spent most of a time in which the device had nothing to do."""
    overlaps: dict[str, float] = defaultdict(float)
    overlaps[OTHER] = gap[1] - gap[0]
    for span in outer:
        overlap = min(gap[1], span.end) - max(gap[0], span.start)
        if overlap > 0:
            overlaps[span.name] += overlap
            overlaps[OTHER] -= overlap
    return max(overlaps, key=lambda name: overlaps[name])


def _self_times(operators: Iterable[tuple[int, Span]]) -> dict[str, tuple[float, int]]:
    """Microseconds and calls by operator; what an operator calls in turn is not its own time."""
    own: dict[str, list[float]] = defaultdict(lambda: [0.0, 0])
    open_on: dict[int, list[Span]] = defaultdict(list)
    for thread, span in sorted(operators, key=lambda item: (item[1].start, -item[1].end)):
        holders = open_on[thread]
        while holders and span.start >= holders[-1].end:
            holders.pop()
        own[span.name][0] += span.end - span.start
        own[span.name][1] += 1
        if holders:
            own[holders[-1].name][0] -= span.end - span.start
        holders.append(span)
    return {name: (spent, int(calls)) for name, (spent, calls) in own.items()}


def _union(work: Sequence[Work]) -> Intervals:
    """Intervals in which at least one of them ran; they come in order of their starts."""
    joined: Intervals = []
    for piece in work:
        if joined and piece.start <= joined[-1][1]:
            joined[-1] = joined[-1][0], max(joined[-1][1], piece.end)
        else:
            joined.append((piece.start, piece.end))
    return joined


def _common(some: Intervals, others: Intervals) -> Intervals:
    """Intervals that lie in both; each list is in order and does not overlap itself."""
    found: Intervals = []
    i = j = 0
    while i < len(some) and j < len(others):
        start, end = max(some[i][0], others[j][0]), min(some[i][1], others[j][1])
        if start < end:
            found.append((start, end))
        if some[i][1] < others[j][1]:
            i += 1
        else:
            j += 1
    return found


def _rest(busy: Intervals, spans: Intervals) -> Intervals:
    """What of the spans is not busy."""
    gaps: Intervals = []
    for start, end in spans:
        at = start
        for begin, done in _common(busy, [(start, end)]):
            if begin > at:
                gaps.append((at, begin))
            at = done
        if at < end:
            gaps.append((at, end))
    return gaps


def _length(intervals: Intervals) -> float:
    return sum(end - start for start, end in intervals)
