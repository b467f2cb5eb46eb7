"""The run report: one HTML file made of what a run folder holds, at any moment of the run.

`write` reads config.toml, environment.json, log.jsonl and overlays/*.png and needs no torch, so `fastseg report RUN`
answers at once and works on a machine without a GPU. The page loads nothing from outside itself and runs no script.
"""

import base64
import functools
import json
import math
import time
import tomllib
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import jinja2
import numpy as np

from fastseg.errors import FastsegError, UsageError
from fastseg.figures import MAX_POINTS, SERIES, Curve, one_curve_each, two_curves
from fastseg.runs import read_log, write_text
from fastseg.texts import pasted

DASH = "\N{EN DASH}"
# A run logs every few seconds, so one that is silent for so long was most likely killed.
SILENT_SECONDS = 600
# What must be the same for scores to be compared.
PROTOCOL = ("data.path", "data.unknown_colours")

Event = dict[str, Any]


def write(run: Path) -> Path:
    """Write RUN/report.html, whole or not at all, and return its path.

    Raises:
        UsageError: RUN has no log.jsonl or no readable config.toml. FastsegError: the disk is full, or fails.
    """
    events, config_text, config = _read(run)
    environment_path = run / "environment.json"
    environment = json.loads(environment_path.read_text(encoding="utf-8")) if environment_path.is_file() else {}

    html = _render(
        "report.html.j2",
        name=run.resolve().name,
        path=run,
        config_text=config_text,
        size=config.get("data", {}).get("size"),
        environment=environment,
        overlays=_overlays(run / "overlays"),
        samples=_embedded(run / "samples.png"),
        **_summary(events, _silent(run)),
    )
    path = run / "report.html"
    try:
        write_text(path, html)
    except OSError as error:
        raise FastsegError(
            f"{path} could not be written ({error.strerror or error}); the run is kept: "
            f"mend that, then fastseg report {pasted(run)}"
        ) from None
    return path


def compare(runs: Sequence[Path], out: Path) -> Path:
    """Write a page with several runs side by side, whole or not at all, and return its path.

    Raises:
        UsageError: a folder is no run, as `write`.
    """
    read = [_read(run) for run in runs]
    names = [run.resolve().name for run in runs]
    rows = []
    for number, (run, (events, _, _)) in enumerate(zip(runs, read, strict=True)):
        name = names[number] if names.count(names[number]) == 1 else f"{number + 1}: {run}"
        found = _summary(events, _silent(run))
        rows.append({**found, "path": run, "name": name, "color": SERIES[number % len(SERIES)]})
    configs = [{f"{s}.{k}": v for s, part in config.items() for k, v in part.items()} for _, _, config in read]
    settings = {key: [config.get(key) for config in configs] for key in dict.fromkeys(k for c in configs for k in c)}
    settings = {key: values for key, values in settings.items() if any(value != values[0] for value in values)}
    splits = [row["start"].get("split", {}) for row in rows]
    protocol = {"images": [f"{split.get('val')} to validate" for split in splits]}
    protocol["split"] = [split.get("scheme", DASH) for split in splits]
    protocol |= {key: [DASH if v is None else v for v in settings[key]] for key in PROTOCOL if key in settings}
    tables = [{c["name"]: c["iou"] for c in (row["table"] or {}).get("classes", [])} for row in rows]
    html = _render(
        "compare.html.j2",
        runs=rows,
        differ={name: values for name, values in protocol.items() if len(set(map(str, values))) > 1},
        svg=one_curve_each(
            {row["name"]: _over_time(events) for row, (events, _, _) in zip(rows, read, strict=True)},
            "training time (min)",
            "validation mIoU (%)",
        ),
        classes={name: [table.get(name) for table in tables] for name in dict.fromkeys(n for t in tables for n in t)},
        settings=settings,
    )
    write_text(out, html)
    return out


def _over_time(events: list[Event]) -> tuple[list[float], list[float]]:
    """Minutes of training and mIoU in per cent of each validation."""
    minutes, points, seconds = [], [], 0.0
    for event in events:
        if event["event"] == "train":
            seconds = event["seconds"]
        elif event["event"] == "val" and event["miou"] is not None:
            minutes.append(seconds / 60)
            points.append(100 * event["miou"])
    return minutes, points


def _read(run: Path) -> tuple[list[Event], str, dict[str, Any]]:
    """A run's events, and its configuration as text and as values."""
    if not (run / "log.jsonl").is_file():
        raise _not_a_run(run / "log.jsonl")
    events = read_log(run)
    try:
        config_text = (run / "config.toml").read_text(encoding="utf-8")
        config = tomllib.loads(config_text)
    except FileNotFoundError:
        raise _not_a_run(run / "config.toml") from None
    except ValueError as error:
        raise UsageError(f"{run / 'config.toml'} is not valid TOML ({error}): mend it by hand") from error
    return events, config_text, config


def _silent(run: Path) -> bool:
    return time.time() - (run / "log.jsonl").stat().st_mtime > SILENT_SECONDS


@functools.cache  # a run writes its page again and again, and keeps the templates as they are compiled
def _templates() -> jinja2.Environment:
    loader = jinja2.PackageLoader("fastseg")
    env = jinja2.Environment(loader=loader, autoescape=True, finalize=_dash, trim_blocks=True, lstrip_blocks=True)
    env.filters |= {"percent": _percent, "number": _number, "duration": _duration, "pasted": pasted}
    return env


def _render(template: str, /, **values: Any) -> str:
    return _templates().get_template(template).render(**values)


def _embedded(path: Path) -> str | None:
    """A picture as base64, or None where there is none yet."""
    return base64.b64encode(path.read_bytes()).decode() if path.is_file() else None


def _overlays(folder: Path) -> list[dict[str, Any]]:
    """The pictures that index.json names, with what it says of them."""
    index = folder / "index.json"
    rows = json.loads(index.read_text(encoding="utf-8")) if index.is_file() else []
    found = [{**row, "data": _embedded(folder / row["file"])} for row in rows]
    return [row for row in found if row["data"]]


def _confusion(event: Event | None) -> list[list[float | None]]:
    """Shares of each class's labelled pixels by prediction; None in the row of a class that was not labelled."""
    counts = (event or {}).get("confusion") or []
    return [[n / sum(row) if sum(row) else None for n in row] for row in counts]


def _ranges(events: list[Event]) -> list[dict[str, Any]]:
    """Milliseconds and share of each range of a step, over the interval that was timed; the rest is "other"."""
    if not events:
        return []
    event = events[-1]
    known = {name: seconds for name, seconds in event["seconds"].items() if seconds}  # a pass is replayed, or is not
    times = {**known, "other": max(0.0, event["total"] - sum(known.values()))}
    return [{"name": n, "ms": 1e3 * t / event["steps"], "share": t / event["total"]} for n, t in times.items()]


def _not_a_run(path: Path) -> UsageError:
    return UsageError(f"{path} is missing: give the folder of a run, as fastseg train writes it (runs/NAME)")


def _summary(events: list[Event], silent: bool) -> dict[str, Any]:
    """What the template shows of the log. `silent`: the log was not written for SILENT_SECONDS."""
    starts, train, val, ends = ([e for e in events if e["event"] == kind] for kind in ("start", "train", "val", "end"))
    start: Event = starts[-1] if starts else {}
    end: Event = ends[-1] if ends else {}
    scored = [event for event in val if event.get("miou") is not None]
    # max keeps the first of equals, as the trainer keeps the earlier checkpoint.
    best = max(scored, key=lambda event: event["miou"], default=None)
    step, total = max((event.get("step", 0) for event in events), default=0), start.get("total_steps")
    state = "silent" if silent else "running"
    if end:
        state = "finished" if total is None or step >= total else "stopped"
    stop = events[-1] if events and events[-1]["event"] == "stopped" else None
    if stop:
        state = "stopped"
    speeds = [event["img_per_s"] for event in train if event.get("img_per_s") is not None]
    return {
        "start": start,
        "first": starts[0] if starts else {},
        "end": end,
        "state": state,
        "stop": stop,
        "step": step,
        "resumes": max(len(starts) - 1, 0),
        "best": best,
        "last": val[-1] if val else {},
        "table": best or (val[-1] if val else None),
        "confusion": _confusion(best or (val[-1] if val else None)),
        "ranges": _ranges([event for event in events if event["event"] == "ranges"]),
        "facts": {item["name"]: item for item in start.get("classes", [])},
        "seconds": end.get("train_seconds", train[-1].get("seconds") if train else None),
        "img_per_s": end.get("img_per_s", float(np.median(speeds)) if speeds else None),
        "memory_mib": max((event.get("memory_mib") or 0 for event in train), default=0) or None,
        "lines_per_point": math.ceil(len(train) / MAX_POINTS),
        "loss_svg": two_curves(train, Curve("loss", "loss"), Curve("lr", "learning rate")),
        "scores_svg": two_curves(
            val, Curve("miou", "mIoU", "%"), Curve("global_accuracy", "global accuracy", "%"), best
        ),
        "speed_svg": two_curves(train, Curve("img_per_s", "throughput", "img/s"), Curve("data_wait", "data wait", "%")),
        "silent_minutes": SILENT_SECONDS // 60,
        "choices": {name: (choice["value"], choice["why"]) for name, choice in start.get("choices", {}).items()},
    }


def _known(value: Any) -> bool:
    return isinstance(value, int | float) and math.isfinite(value)


def _dash(value: Any) -> Any:
    """What the page shows of a value: a dash for one that is unknown."""
    return DASH if value is None or value == "" or isinstance(value, jinja2.Undefined) else value


def _percent(value: Any) -> str:
    """A share as per cent with one decimal."""
    return f"{value * 100:.1f} %" if _known(value) else DASH


def _number(value: Any, digits: int = 0) -> str:
    """Thousands apart by thin spaces, which do not break."""
    return f"{value:,.{digits}f}".replace(",", "\N{NARROW NO-BREAK SPACE}") if _known(value) else DASH


def _duration(seconds: Any) -> str:
    """Seconds as the two largest units: 42 s, 3 min 20 s, 2 h 05 min."""
    if not _known(seconds):
        return DASH
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    if hours:
        return f"{hours} h {minutes:02d} min"
    return f"{minutes} min {rest:02d} s" if minutes else f"{rest} s"
