"""`fastseg bench accuracy`: seconds of training to a useful mIoU, by recipe, and by a plain PyTorch loop.

Each contestant is validated after each of its epochs, as `fastseg eval` does it: labels at their own size. Training
time counts, validation does not. The plain loop is what a tutorial would write of the published recipe: fp32, NCHW,
torchvision's transforms in a DataLoader, SGD at 1e-3 with momentum 0.9 and weight decay 5e-4, weights by median
frequency, batches of 4. It trains until it has reached all targets or its time is up; what it did not reach is told,
and the ratio is a lower bound then.
"""

import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from torch import nn

from fastseg.bench.harness import Found, Result, exact, ratio, result
from fastseg.bench.peers.plain_step import PlainSegNet, take
from fastseg.bench.peers.torchvision_loader import batches
from fastseg.config import Size, load_recipe
from fastseg.data.classes import VOID
from fastseg.data.stats import class_weights, count
from fastseg.distributed import World
from fastseg.environment import cores
from fastseg.errors import FastsegError, UsageError
from fastseg.evaluation import score
from fastseg.pipelines.source import choose_loader
from fastseg.runs import read_log
from fastseg.specs import open_specs

BATCH = 4  # of the plain loop
RANDOM = ("none", "identity")  # values of model.init that know of no other images


class Point(NamedTuple):
    """A validation: seconds of training before it, and its mIoU."""

    seconds: float
    miou: float


def points(run: Path) -> list[Point]:
    """The validations of a run's log."""
    found, seconds = [], 0.0
    for event in read_log(run):
        if event["event"] == "train":
            seconds = event["seconds"]
        elif event["event"] == "val":
            found.append(Point(seconds, event["miou"] or 0.0))
    return found


def time_to(curve: Sequence[Point], target: float) -> float | None:
    """Seconds of training until a validation first reached the target; None where none did."""
    return next((point.seconds for point in curve if point.miou >= target), None)


def train_recipe(recipe: str, data: str, size: str, seed: int, device: str) -> list[Point]:
    """The curve of `fastseg train` with a recipe, as a user starts it, but from random weights in any case.

    Raises:
        FastsegError: the run failed, with the line that it ended with.
    """
    with tempfile.TemporaryDirectory(prefix="fastseg-bench-") as folder:
        run = Path(folder) / "run"
        options = ["--data", data, "--recipe", recipe, "--size", size, "--seed", str(seed), "--device", device]
        if load_recipe(recipe).model.init not in RANDOM:
            options += ["--init", "none"]
        command = [sys.executable, "-m", "fastseg", "train", *options, "--run", str(run)]
        done = subprocess.run(command, capture_output=True, text=True, check=False)
        if done.returncode:
            last = (done.stderr.strip().splitlines() or ["nothing was said"])[-1]
            raise FastsegError(f"bench accuracy: --recipe {recipe}: {last.removeprefix('fastseg: ')}")
        return points(run)


def train_plainly(data: str, size: Size, seed: int, device: torch.device, target: float, cap: float) -> list[Point]:
    """The curve of the plain loop, until it reaches the target or has trained for `cap` seconds.

    Raises:
        UsageError: labels of colours, which the plain loop's loader does not know.
    """
    _, specs = open_specs(data, size=size, device=device.type)
    spec, (val, _) = specs["train"], choose_loader("auto", specs["val"], epochs=True, resize_labels=False)
    if spec.classes.is_color:
        raise UsageError(f"bench accuracy: {data} has labels of colours; the plain loop reads indices alone")
    table = torch.from_numpy(spec.classes.index_table(VOID)).long().to(device)
    weights = class_weights(count(spec.pairs, spec.classes, spec.threads), "median-frequency")
    torch.manual_seed(seed)
    model = PlainSegNet(len(weights)).to(device)
    optimizer = torch.optim.SGD(model.parameters(), lr=1e-3, momentum=0.9, weight_decay=5e-4)
    loss_of = nn.CrossEntropyLoss(weight=torch.tensor(weights, dtype=torch.float32, device=device), ignore_index=VOID)
    alone = World(0, 1, device)
    stream = batches(spec.pairs, size, BATCH, workers=cores())
    steps, seconds, curve = max(1, len(spec.pairs) // BATCH), 0.0, list[Point]()
    while seconds < cap and not any(point.miou >= target for point in curve):
        start = time.perf_counter()
        for _ in range(steps):
            images, labels = next(stream)
            images, labels = images.to(device).contiguous(), table[labels.to(device).long()]
            loss = take(model, optimizer, loss_of, images, labels)
        loss.item()  # waits for a GPU
        seconds += time.perf_counter() - start
        curve.append(Point(seconds, score(model, val, alone).scores.miou))
    stream.close()  # type: ignore[attr-defined]
    return curve


def measure(
    *,
    data: str,
    size: Size,
    device: str,
    targets: Sequence[float],
    recipes: Sequence[str],
    seeds: int,
    cap: float,
) -> Found:
    """Seconds to each target, and ratios `time_to_T_vs_plain` of the first recipe.

    Args:
        targets: mIoU, 0 to 1.
        seeds: runs of each recipe, with seeds 0, 1, ...; the plain loop runs once.
        cap: seconds of training after which the plain loop ends.
    """
    shown = str(size)
    curves = {recipe: [train_recipe(recipe, data, shown, seed, device) for seed in range(seeds)] for recipe in recipes}
    plain = train_plainly(data, size, 0, torch.device(device), max(targets), cap)
    rows: list[Result] = []
    for name, runs in (*curves.items(), ("plain PyTorch loop", [plain])):
        for target in sorted(targets):
            times = [seconds for run in runs if (seconds := time_to(run, target)) is not None]
            if times:
                rows.append(result(f"{name}: training to mIoU {target:g}", "s", times))
            if len(times) < len(runs):
                ended = max(run[-1].seconds for run in runs)
                rows.append(exact(f"{name}: not at mIoU {target:g} after", "s", ended))
                rows.append(exact(f"{name}: runs that did not reach {target:g}", "runs", len(runs) - len(times)))
        best = [max(point.miou for point in run) for run in runs]
        rows.append(result(f"{name}: best mIoU", "%", [100 * value for value in best]))
        rows.append(result(f"{name}: whole run", "s", [run[-1].seconds for run in runs]))
    ratios = []
    for target in sorted(targets):
        mine = [time_to(run, target) for run in curves[recipes[0]]]
        reached = [seconds for seconds in mine if seconds is not None]
        theirs = time_to(plain, target)
        if reached:
            bound = "" if theirs is not None else " (lower bound)"
            least = plain[-1].seconds if theirs is None else theirs
            ratios.append(ratio(f"time_to_{target:.2f}_vs_plain{bound}", [least] * len(reached), reached))
    series = [
        {
            "name": "validation mIoU",
            "x": {"seconds of training": [point.seconds for point in run]},
            "y": {
                f"{name}{f', seed {seed}' if len(runs) > 1 else ''}": [
                    float(np.nan_to_num(point.miou)) for point in run
                ]
            },
        }
        for name, runs in (*curves.items(), ("plain PyTorch loop", [plain]))
        for seed, run in enumerate(runs)
    ]
    return Found(rows, ratios, series)
