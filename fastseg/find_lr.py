"""`fastseg train --find-lr`: a learning-rate range test, before a run.

Smith, "Cyclical Learning Rates for Training Neural Networks", WACV 2017, section 3.3; the rate grows geometrically, as
fastai has it. The network trains while the rate rises from far too small to far too large; where its loss falls the
fastest is a good peak for a schedule.
"""

import math
from pathlib import Path
from typing import Any

from fastseg.config import Config
from fastseg.errors import FastsegError
from fastseg.pipelines.source import TrainSource
from fastseg.training.setup import set_up

FROM, TO, STEPS = 1e-5, 10.0, 100
SMOOTHING = 0.9  # of the loss, an exponential average, as single batches differ
TOO_MUCH = 2.0  # times the lowest smoothed loss: the end of the test


def find_lr(config: Config) -> dict[str, Any]:
    """What `fastseg train --find-lr --json` prints: rates, their losses, and the rate of the steepest fall.

    Raises:
        FastsegError: data or options that cannot be trained on, or a loss that never falls.
    """
    run = set_up(config, None)
    batches = iter(TrainSource(run.spec, run.plan))
    rates, losses, smooth, mean = [], [], [], 0.0
    for step in range(STEPS):
        rate = FROM * (TO / FROM) ** (step / (STEPS - 1))
        batch = next(batches)
        loss = float(run.step.step(batch.images, batch.labels, rate).loss)
        if not math.isfinite(loss):
            break
        mean = SMOOTHING * mean + (1 - SMOOTHING) * loss
        rates.append(rate)
        losses.append(loss)
        smooth.append(mean / (1 - SMOOTHING ** (step + 1)))  # without the zero that it began with
        if smooth[-1] > TOO_MUCH * min(smooth):
            break
    return {"rates": rates, "losses": losses, "smooth": smooth, "suggested": steepest(rates, smooth)}


def steepest(rates: list[float], smooth: list[float]) -> float:
    """The rate at which the smoothed loss falls the fastest over the logarithm of the rate, before its lowest point.

    Raises:
        FastsegError: it never falls.
    """
    lowest = min(range(len(smooth)), key=smooth.__getitem__, default=0)
    if lowest < 2:
        raise FastsegError("--find-lr: the loss falls at no rate; look at the data with `fastseg data preview`")
    return rates[min(range(1, lowest), key=lambda i: smooth[i + 1] - smooth[i - 1])]


def plot(found: dict[str, Any], path: Path) -> None:
    """Draw loss over rate into an SVG file."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(7, 3.5), layout="constrained")
    axes = figure.subplots()
    axes.plot(found["rates"], found["losses"], ".", color="0.7", label="loss")
    axes.plot(found["rates"], found["smooth"], label="smoothed")
    axes.axvline(found["suggested"], linestyle="--", color="0.3", label=f"{found['suggested']:.2g}")
    axes.set(xscale="log", xlabel="learning rate", ylabel="loss", ylim=(0, 1.1 * max(found["smooth"])))
    axes.legend()
    axes.grid(alpha=0.3)
    figure.savefig(path, format="svg", metadata={"Date": None})
