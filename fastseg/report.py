"""The run report: one HTML file made of what a run folder holds, at any moment of the run.

`write` reads config.toml, environment.json, log.jsonl and overlays/*.png and needs no torch, so `fastseg report RUN`
answers at once and works on a machine without a GPU. The page loads nothing from outside itself and runs no script.
"""

import base64
import io
import json
import math
import re
import time
import tomllib
from dataclasses import dataclass
from importlib import resources
from pathlib import Path
from typing import Any

import jinja2
import numpy as np
from markupsafe import Markup
from matplotlib import rc_context
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.lines import Line2D

from fastseg.errors import UsageError
from fastseg.runs import read_log, write_text

DASH = "\N{EN DASH}"
# A run logs every few seconds, so one that is silent for so long was most likely killed.
SILENT_SECONDS = 600
# A curve is some 400 pixels wide: more points cannot be seen and make the file large.
MAX_POINTS = 240
# Placeholder colours: matplotlib knows no CSS, so they become style sheet colours afterwards (light and dark).
INK, LEFT, RIGHT = "#010101", "#010102", "#010103"
CSS_COLORS = {INK: "currentColor", LEFT: "var(--left)", RIGHT: "var(--right)"}

Event = dict[str, Any]


@dataclass(frozen=True)
class Curve:
    """One value of the log lines over epochs. Shares (unit "%", 0 to 1 in the log) are drawn from 0 to 100."""

    key: str
    label: str
    unit: str = ""


def write(run: Path) -> Path:
    """Write RUN/report.html, whole or not at all, and return its path.

    Raises:
        UsageError: RUN has no log.jsonl or no readable config.toml.
    """
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
    environment_path = run / "environment.json"
    environment = json.loads(environment_path.read_text(encoding="utf-8")) if environment_path.is_file() else {}

    env = jinja2.Environment(autoescape=True, finalize=_dash, trim_blocks=True, lstrip_blocks=True)
    env.filters |= {"percent": _percent, "number": _number, "duration": _duration}
    template = env.from_string(
        (resources.files("fastseg") / "templates" / "report.html.j2").read_text(encoding="utf-8")
    )
    silent = time.time() - (run / "log.jsonl").stat().st_mtime > SILENT_SECONDS
    html = template.render(
        name=run.resolve().name,
        config_text=config_text,
        size=config.get("data", {}).get("size"),
        environment=environment,
        # NN-STEM.png: the number only orders them
        overlays=[
            (path.stem.split("-", 1)[-1], base64.b64encode(path.read_bytes()).decode())
            for path in sorted((run / "overlays").glob("*.png"))
        ],
        **_summary(events, silent),
    )
    write_text(run / "report.html", html)
    return run / "report.html"


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
        "facts": {item["name"]: item for item in start.get("classes", [])},
        "seconds": end.get("train_seconds", train[-1].get("seconds") if train else None),
        "img_per_s": end.get("img_per_s", float(np.median(speeds)) if speeds else None),
        "memory_mib": max((event.get("memory_mib") or 0 for event in train), default=0) or None,
        "lines_per_point": math.ceil(len(train) / MAX_POINTS),
        "loss_svg": _figure(train, Curve("loss", "loss"), Curve("lr", "learning rate")),
        "scores_svg": _figure(val, Curve("miou", "mIoU", "%"), Curve("global_accuracy", "global accuracy", "%"), best),
        "speed_svg": _figure(train, Curve("img_per_s", "throughput", "img/s"), Curve("data_wait", "data wait", "%")),
        "silent_minutes": SILENT_SECONDS // 60,
        # "value: why" -> (value, why)
        "choices": {name: text.partition(": ")[::2] for name, text in start.get("choices", {}).items()},
    }


def _series(events: list[Event], key: str) -> np.ndarray:
    """float64[<= MAX_POINTS]: `key` of each event, means over neighbours when there are too many, NaN where unknown."""
    values = np.array([event.get(key) for event in events], dtype=np.float64)
    known = [part[np.isfinite(part)] for part in np.array_split(values, min(len(values), MAX_POINTS))]
    return np.array([part.mean() if len(part) else np.nan for part in known])


def _figure(events: list[Event], left: Curve, right: Curve, best: Event | None = None) -> Markup | None:
    """Two curves over epochs as inline SVG; on one axis if both are shares, else on two. None without events."""
    if not events:
        return None
    style: Any = {"svg.fonttype": "none", "svg.hashsalt": left.key, "font.size": 9}
    style |= dict.fromkeys(("axes.edgecolor", "axes.labelcolor", "text.color", "xtick.color", "ytick.color"), INK)
    with rc_context(style):
        figure = Figure(figsize=(4.4, 2.9), layout="constrained")
        axes = figure.subplots()
        shared = left.unit == right.unit == "%"
        other = axes if shared else axes.twinx()
        lines = [_plot(axes, events, left, LEFT, "-"), _plot(other, events, right, RIGHT, "--")]
        if best:
            ring: dict[str, Any] = {"marker": "o", "fillstyle": "none", "markersize": 8, "linestyle": "none"}
            lines += axes.plot(best["epoch"], best["miou"] * 100, color=LEFT, label="best mIoU", **ring)
        for side, curve in ((axes, left), (other, right)):
            side.set_ylabel(curve.unit if shared else f"{curve.label} ({curve.unit})" if curve.unit else curve.label)
            side.set_ylim(0, 100 if curve.unit == "%" else None)
            side.spines[["top", *(["right"] if shared else [])]].set_visible(False)
        axes.set_xlabel("epoch")
        axes.set_xlim(left=0)
        axes.grid(color=INK, alpha=0.12, linewidth=0.6)
        figure.legend(handles=lines, loc="outside upper center", ncols=3, frameon=False)
        buffer = io.StringIO()
        nothing = dict.fromkeys(("Creator", "Date", "Format", "Type"))
        figure.savefig(buffer, format="svg", transparent=True, metadata=nothing)
    return _inline(buffer.getvalue(), left.key, f"{left.label} and {right.label} over epochs")


def _plot(axes: Axes, events: list[Event], curve: Curve, color: str, linestyle: str) -> Line2D:
    values = _series(events, curve.key) * (100 if curve.unit == "%" else 1)
    # A line needs two points: with few of them, each one is marked.
    marker = "o" if len(events) <= 40 else None
    (line,) = axes.plot(
        _series(events, "epoch"), values, color=color, ls=linestyle, lw=1.4, marker=marker, ms=3, label=curve.label
    )
    return line


def _inline(svg: str, name: str, label: str) -> Markup:
    """matplotlib's SVG file as a part of an HTML page: no header, no global style, its own ids, colours from CSS."""
    svg = svg[svg.index("<svg") :]
    svg = re.sub(r"<style.*?</style>", "", svg, flags=re.DOTALL)
    svg = re.sub(r'<svg [^>]*?(viewBox="[^"]*")[^>]*>', rf'<svg \1 role="img" aria-label="{label}">', svg, count=1)
    svg = re.sub(r'(id="|href="#|url\(#)', rf"\1{name}-", svg)
    # The page's own font, and the sizes that matplotlib laid out with.
    svg = re.sub(r'font: ([\d.]+px) [^;"]*', r"font-size: \1", svg)
    for placeholder, color in CSS_COLORS.items():
        svg = svg.replace(placeholder, color)
    return Markup(svg)


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
