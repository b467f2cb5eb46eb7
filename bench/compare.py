"""`fastseg bench compare OLD.json NEW.json`: has anything become slower?

What is compared are the ratios of a document: each was measured against something else of the same run, turn by turn,
so that a machine that is slower today slows both sides. A ratio counts as worse where it fell by more than the limit
and its change differs from none by more than chance gives in 19 of 20 cases.
"""

import json
import math
from pathlib import Path
from typing import Any

from fastseg.bench.harness import SCHEMA, Result
from fastseg.errors import UsageError

# What must be the same for two documents to be comparable.
HARDWARE = ("processor", "cores", "threads", "gpus", "system")
PROTOCOL = ("data", "size", "batch", "device", "quick")
# For samples of a normal distribution: its standard deviation from the distance of the 20th and 80th percentile, and
# how much less sure a median is than a mean. https://en.wikipedia.org/wiki/Median#Efficiency
SPREAD, MEDIAN = 2 * 0.8416, math.sqrt(math.pi / 2)
CONFIDENCE = 1.96


def read(path: Path) -> dict[str, Any]:
    """A document that `fastseg bench --json` wrote.

    Raises:
        UsageError: it is none.
    """
    try:
        document = json.loads(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise UsageError(f"{path}: cannot be read: {error.strerror}") from None
    except ValueError:
        raise UsageError(f"{path}: no JSON; write one with fastseg bench --json") from None
    if not isinstance(document, dict) or not {"schema", "environment", "results", "ratios"} <= document.keys():
        raise UsageError(f"{path}: no record of a bench; write one with fastseg bench --json")
    if document["schema"] != SCHEMA:
        raise UsageError(f"{path}: schema {document['schema']}, this version of fastseg reads {SCHEMA}")
    return document


def error_of(row: Result) -> float:
    """Standard error of a row's median."""
    return (row["p80"] - row["p20"]) / SPREAD * MEDIAN / math.sqrt(row["n"])


def compare(old: dict[str, Any], new: dict[str, Any], limit: float) -> list[dict[str, Any]]:
    """A row per ratio of both documents: its change as a share, the error of that, and whether it is worse.

    Args:
        limit: a fall by more than this share is worse, if it is no chance.

    Raises:
        UsageError: other hardware, another protocol, or nothing in common.
    """
    for what, part, names in (("hardware", "environment", HARDWARE), ("protocol", "protocol", PROTOCOL)):
        for name in names:
            before, now = (document.get(part, {}).get(name) for document in (old, new))
            if before != now:
                raise UsageError(f"bench compare: measured with different {what} ({name}: {before}; {now})")
    known, rows = {row["name"]: row for row in old["ratios"]}, []
    for row in new["ratios"]:
        if row["name"] not in known:
            continue
        before = known[row["name"]]
        change = row["value"] / before["value"] - 1
        error = (1 + change) * math.hypot(error_of(row) / row["value"], error_of(before) / before["value"])
        worse = change < -limit and change + CONFIDENCE * error < 0
        rows.append({"name": row["name"], "change": change, "error": error, "worse": worse})
    if not rows:
        raise UsageError(
            "bench compare: the two records have no ratio in common: give the same WHAT, --size and --batch"
        )
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
