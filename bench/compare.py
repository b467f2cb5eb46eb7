"""`fastseg bench compare OLD.json NEW.json`: has anything become slower?

What is compared are the ratios of a document: each was measured against something else of the same run, turn by turn,
so that a machine that is slower today slows both sides. A ratio counts as worse where it fell (or rose, where lower is
better) by more than the limit and its change differs from none by more than chance gives in 19 of 20 cases.

A file may hold several documents, a line each. On a machine that others use too, one is not enough to see a change of
ten per cent: write a few of the old version and of the new one, turn by turn.
"""

import json
import math
import statistics
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from fastseg.bench.harness import SCHEMA, Result
from fastseg.errors import UsageError

# What must be the same for two documents to be comparable.
HARDWARE = ("processor", "cores", "threads", "gpus", "system")
PROTOCOL = ("data", "format", "size", "batch", "device", "network", "quick")
UNSAID = {"format": "png"}  # what documents of before do not say
# For samples of a normal distribution: its standard deviation from the distance of the 20th and 80th percentile, and
# how much less sure a median is than a mean. https://en.wikipedia.org/wiki/Median#Efficiency
SPREAD, MEDIAN = 2 * 0.8416, math.sqrt(math.pi / 2)
CONFIDENCE = 1.96


def read(path: Path) -> list[dict[str, Any]]:
    """The documents in a file that `fastseg bench --json` wrote, or added to.

    Raises:
        UsageError: there is none, or something else.
    """
    try:
        text = path.read_text(encoding="utf-8")
    except OSError as error:
        raise UsageError(f"{path}: cannot be read: {error.strerror}") from None
    try:
        documents = [json.loads(text)]
    except ValueError:
        try:
            documents = [json.loads(line) for line in text.splitlines() if line.strip()]
        except ValueError:
            documents = []
    if not documents:
        raise UsageError(f"{path}: no JSON; write one with fastseg bench --json")
    for document in documents:
        if not isinstance(document, dict) or not {"schema", "environment", "results", "ratios"} <= document.keys():
            raise UsageError(f"{path}: no record of a bench; write one with fastseg bench --json")
        if document["schema"] != SCHEMA:
            raise UsageError(f"{path}: schema {document['schema']}, this version of fastseg reads {SCHEMA}")
    return documents


def error_of(row: Result) -> float:
    """Standard error of a row's median."""
    return (row["p80"] - row["p20"]) / SPREAD * MEDIAN / math.sqrt(row["n"])


def together(rows: Sequence[Result]) -> tuple[float, float]:
    """A ratio of several documents: its mean, and the standard error of that.

    The error is the larger one of what the documents say of themselves, and of what their differences say.
    """
    values = [row["value"] for row in rows]
    inside = math.hypot(*map(error_of, rows)) / len(rows)
    between = statistics.stdev(values) / math.sqrt(len(rows)) if len(rows) > 1 else 0.0
    return statistics.mean(values), max(inside, between)


def compare(old: Sequence[dict[str, Any]], new: Sequence[dict[str, Any]], limit: float) -> list[dict[str, Any]]:
    """A row per ratio of all documents: its change as a share, the error of that, and whether it is worse.

    Args:
        limit: a fall by more than this share is worse, if it is no chance; a rise where a ratio is better lower.

    Raises:
        UsageError: other hardware, another protocol, or nothing in common.
    """
    for what, part, names in (("hardware", "environment", HARDWARE), ("protocol", "protocol", PROTOCOL)):
        for name in names:
            before, *others = (document.get(part, {}).get(name, UNSAID.get(name)) for document in (*old, *new))
            if other := [value for value in others if value != before]:
                raise UsageError(f"bench compare: measured with different {what} ({name}: {before}; {other[0]})")
    sides = [[{row["name"]: row for row in document["ratios"]} for document in side] for side in (old, new)]
    rows = []
    for name in sides[0][0]:
        if not all(name in ratios for side in sides for ratios in side):
            continue
        (before, error_before), (now, error_now) = (together([ratios[name] for ratios in side]) for side in sides)
        change = now / before - 1
        error = (1 + change) * math.hypot(error_now / now, error_before / before)
        gain = -change if sides[0][0][name].get("better") == "lower" else change
        worse = gain < -limit and gain + CONFIDENCE * error < 0
        rows.append({"name": name, "change": change, "error": error, "worse": worse})
    if not rows:
        raise UsageError("bench compare: the records have no ratio in common: give the same WHAT, --size and --batch")
    return rows


def show(rows: list[dict[str, Any]]) -> str:
    """The rows as text for a terminal."""
    width = max(len(row["name"]) for row in rows)
    lines = (
        f"{row['name']:<{width}} {100 * row['change']:>+7.1f} %  +- {100 * CONFIDENCE * row['error']:.1f}"
        f"{'  WORSE' if row['worse'] else ''}"
        for row in rows
    )
    return "\n".join(lines)
