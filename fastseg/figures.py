"""Curves as inline SVG, drawn by matplotlib and coloured by the page's style sheet."""

import contextlib
import io
import re
from dataclasses import dataclass
from typing import Any

import numpy as np
from markupsafe import Markup
from matplotlib import rc_context
from matplotlib.axes import Axes
from matplotlib.backends.backend_svg import FigureCanvasSVG
from matplotlib.figure import Figure
from matplotlib.lines import Line2D

# A curve is some 400 pixels wide: more points cannot be seen and make the file large.
MAX_POINTS = 240
# Placeholder colours: matplotlib knows no CSS, so they become style sheet colours afterwards (light and dark).
INK, LEFT, RIGHT = "#010101", "#010102", "#010103"
CSS_COLORS = {INK: "currentColor", LEFT: "var(--left)", RIGHT: "var(--right)"}
# Okabe and Ito's palette, which colour-blind readers can tell apart; black left out, for dark pages.
SERIES = ("#0072B2", "#E69F00", "#009E73", "#CC79A7", "#56B4E9", "#D55E00", "#F0E442")


@dataclass(frozen=True)
class Curve:
    """One value of the log lines over epochs. Shares (unit "%", 0 to 1 in the log) are drawn from 0 to 100."""

    key: str
    label: str
    unit: str = ""


def drawing(name: str) -> contextlib.AbstractContextManager:
    """matplotlib's settings for a figure that `inline` makes a part of a page."""
    style: Any = {"svg.fonttype": "none", "svg.hashsalt": name, "font.size": 9}
    style |= dict.fromkeys(("figure.facecolor", "figure.edgecolor", "axes.facecolor"), "none")
    style |= dict.fromkeys(("axes.edgecolor", "axes.labelcolor", "text.color", "xtick.color", "ytick.color"), INK)
    return rc_context(style)


def _series(events: list[dict[str, Any]], key: str) -> np.ndarray:
    """float64[<= MAX_POINTS]: `key` of each event, means over neighbours when there are too many, NaN where unknown."""
    values = np.array([event.get(key) for event in events], dtype=np.float64)
    known = [part[np.isfinite(part)] for part in np.array_split(values, min(len(values), MAX_POINTS))]
    return np.array([part.mean() if len(part) else np.nan for part in known])


def two_curves(
    events: list[dict[str, Any]], left: Curve, right: Curve, best: dict[str, Any] | None = None
) -> Markup | None:
    """Two curves over epochs as inline SVG; on one axis if both are shares, else on two. None without events."""
    if not events:
        return None
    with drawing(left.key):
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
        return inline(figure, left.key, f"{left.label} and {right.label} over epochs")


def _plot(axes: Axes, events: list[dict[str, Any]], curve: Curve, color: str, linestyle: str) -> Line2D:
    values = _series(events, curve.key) * (100 if curve.unit == "%" else 1)
    # A line needs two points: with few of them, each one is marked.
    marker = "o" if len(events) <= 40 else None
    (line,) = axes.plot(
        _series(events, "epoch"), values, color=color, ls=linestyle, lw=1.4, marker=marker, ms=3, label=curve.label
    )
    return line


def inline(figure: Figure, name: str, label: str) -> Markup:
    """A figure as SVG inside an HTML page: no header, no global style, its own ids, colours from CSS."""
    buffer = io.StringIO()
    nothing = dict.fromkeys(("Creator", "Date", "Format", "Type"))
    FigureCanvasSVG(figure).print_svg(buffer, metadata=nothing)  # `savefig` draws twice, the first time for the layout
    svg = buffer.getvalue()
    svg = svg[svg.index("<svg") :]
    svg = re.sub(r"<style.*?</style>", "", svg, flags=re.DOTALL)
    svg = re.sub(r'<svg [^>]*?(viewBox="[^"]*")[^>]*>', rf'<svg \1 role="img" aria-label="{label}">', svg, count=1)
    svg = re.sub(r'(id="|href="#|url\(#)', rf"\1{name}-", svg)
    # The page's own font, and the sizes that matplotlib laid out with.
    svg = re.sub(r'font: ([\d.]+px) [^;"]*', r"font-size: \1", svg)
    for placeholder, color in CSS_COLORS.items():
        svg = svg.replace(placeholder, color)
    return Markup(svg)


def one_curve_each(curves: dict[str, tuple[list[float], list[float]]], x: str, y: str) -> Markup | None:
    """A curve (x values, y values) for each name, in the colours of SERIES; None where there is no point."""
    if not any(points for points, _ in curves.values()):
        return None
    with drawing("runs"):
        figure = Figure(figsize=(6.4, 3.4), layout="constrained")
        axes = figure.subplots()
        for number, (name, (xs, ys)) in enumerate(curves.items()):
            axes.plot(xs, ys, color=SERIES[number % len(SERIES)], lw=1.6, marker="o", ms=3, label=name)
        axes.set(xlabel=x, ylabel=y, xlim=(0, None), ylim=(0, None))
        axes.spines[["top", "right"]].set_visible(False)
        axes.grid(color=INK, alpha=0.12, linewidth=0.6)
        return inline(figure, "runs", f"{y} over {x}, {len(curves)} runs")
