"""`fastseg bench accuracy`: seconds of training to a useful mIoU, by recipe, and by a plain PyTorch loop.

Each contestant is validated after each of its epochs, as `fastseg eval` does it: labels at their own size. Training
time counts, validation does not. The plain loop is what a tutorial would write of the published recipe: fp32, NCHW,
torchvision's transforms in a DataLoader, SGD at 1e-3 with momentum 0.9 and weight decay 5e-4, weights by median
frequency, batches of 4. It trains until it has reached all targets or its time is up; what it did not reach is told,
and the ratio is a lower bound then.

What of a ratio is whose (`shares`): the same loop is given the recipe's hyperparameters, then its first weights too,
then mixed precision; each takes a share of the time, and the rest is the software's: data path, sizes that grow,
kernels, memory. And a U-Net in that last loop says what another network would do.
"""

import importlib.util
import itertools
import subprocess
import sys
import tempfile
from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np
import torch

from fastseg.bench.harness import Found, Result, exact, ratio, result
from fastseg.bench.peers import plain_loop
from fastseg.bench.peers.plain_loop import Loop, Point, UNet, begun_as
from fastseg.bench.peers.plain_step import PlainSegNet
from fastseg.config import Size, load_recipe
from fastseg.distributed import choose_dtype
from fastseg.environment import install
from fastseg.errors import FastsegError
from fastseg.pipelines.source import choose_loader
from fastseg.runs import read_log
from fastseg.specs import open_specs

RANDOM = ("none", "identity")  # values of model.init that know of no other images
PLAIN, UNET = "plain PyTorch loop", "U-Net, ResNet-34, in the loop before it"


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


def loops(recipe: str, device: str) -> dict[str, Loop]:
    """By what each has beyond the one before it: the plain loop, and its steps towards a recipe; a U-Net where it is.

    Where the recipe's precision is fp32, or fp16, which wants a scaler of gradients, there is no step of precision.
    """
    config = load_recipe(recipe)
    train, init = config.train, config.model.init if config.model.init in RANDOM else "none"
    found = {PLAIN: Loop(PlainSegNet, load_recipe("baseline").train)}
    found |= {"hyperparameters": Loop(PlainSegNet, train, ends=True)}
    found |= {"first weights": Loop(begun_as(init), train, ends=True)}
    dtype = choose_dtype(config.runtime.dtype, device).dtype
    if dtype == torch.bfloat16:
        found |= {"mixed precision": Loop(begun_as(init), train, dtype, ends=True)}
    if importlib.util.find_spec("segmentation_models_pytorch"):
        found |= {UNET: Loop(UNet, train, dtype if dtype == torch.bfloat16 else torch.float32, ends=True)}
    return found


def train_plainly(data: str, size: Size, device: str, loop: Loop, target: float, cap: float) -> list[Point]:
    """The curve of a plain loop on a data set: see `plain_loop.train`."""
    _, specs = open_specs(data, size=size, device=device)
    val, _ = choose_loader("auto", specs["val"], epochs=True, resize_labels=False)
    return plain_loop.train(loop, specs["train"], val, 0, target, cap)


def measure(
    *,
    data: str,
    size: Size,
    device: str,
    targets: Sequence[float],
    recipes: Sequence[str],
    seeds: int,
    cap: float,
    shares: bool,
) -> Found:
    """Seconds to each target, and ratios `time_to_T_vs_plain` of the first recipe.

    Args:
        targets: mIoU, 0 to 1.
        seeds: runs of each recipe, with seeds 0, 1, ...; plain loops run once.
        cap: seconds of training after which a plain loop ends.
        shares: what of these ratios is whose, too: see above.
    """
    plain = loops(recipes[0], device)
    curves = {
        recipe: [train_recipe(recipe, data, str(size), seed, device) for seed in range(seeds)] for recipe in recipes
    }
    taken = list(plain if shares else [PLAIN])
    plainly = {name: train_plainly(data, size, device, plain[name], max(targets), cap) for name in taken}
    steps = [name for name in plainly if name != UNET]
    shown = curves | {
        name if name in (PLAIN, UNET) else f"plain loop with {recipes[0]}'s {' and '.join(steps[1 : place + 1])}": [
            curve
        ]
        for place, (name, curve) in enumerate(plainly.items())
    }
    rows = [row for name, runs in shown.items() for row in _rows(name, runs, targets)]
    ratios = [
        found for target in sorted(targets) for found in _versus_plain(target, curves[recipes[0]], plainly[PLAIN])
    ]
    if shares:
        ladder = {name: [plainly[name]] for name in steps} | {"the rest": curves[recipes[0]]}
        ratios += [found for target in sorted(targets) for found in _shares(target, ladder)]
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
        for name, runs in shown.items()
        for seed, run in enumerate(runs)
    ]
    left_out = {"left_out": f"{UNET}: not installed: {install('peers')}"} if shares and UNET not in plainly else {}
    return Found(rows, ratios, series, left_out)


def _rows(name: str, runs: Sequence[Sequence[Point]], targets: Sequence[float]) -> list[Result]:
    rows = []
    for target in sorted(targets):
        times = _times(runs, target)
        if times:
            rows.append(result(f"{name}: training to mIoU {target:g}", "s", times))
        if len(times) < len(runs):
            ended = max(run[-1].seconds for run in runs)
            rows.append(exact(f"{name}: not at mIoU {target:g} after", "s", ended))
            rows.append(exact(f"{name}: runs that did not reach {target:g}", "runs", len(runs) - len(times)))
    best = [max(point.miou for point in run) for run in runs]
    rows.append(result(f"{name}: best mIoU", "%", [100 * value for value in best]))
    rows.append(result(f"{name}: whole run", "s", [run[-1].seconds for run in runs]))
    return rows


def _times(runs: Sequence[Sequence[Point]], target: float) -> list[float]:
    """Seconds to the target, of the runs that reached it."""
    return [seconds for run in runs if (seconds := time_to(run, target)) is not None]


def _versus_plain(target: float, mine: Sequence[Sequence[Point]], plain: Sequence[Point]) -> list[Result]:
    reached, theirs = _times(mine, target), time_to(plain, target)
    if not reached:
        return []
    bound = "" if theirs is not None else " (lower bound)"
    least = plain[-1].seconds if theirs is None else theirs
    return [ratio(f"time_to_{target:.2f}_vs_plain{bound}", [least] * len(reached), reached)]


def _shares(target: float, ladder: Mapping[str, Sequence[Sequence[Point]]]) -> list[Result]:
    """What each step of the ladder divides the seconds to a target by; none across one that did not get there."""
    found = []
    for (_, before), (name, after) in itertools.pairwise(ladder.items()):
        slower, faster = _times(before, target), _times(after, target)
        if slower and faster:
            found.append(ratio(f"time_to_{target:.2f}_by_{name.replace(' ', '_')}", slower * len(faster), faster))
    return found
