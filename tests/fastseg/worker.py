"""A worker that something is wrong with, or that says more than others; test_processes.py runs it under torchrun.

worker.py frozen|late|bug|captured|ordinary DATA RUN [ACCUMULATE]
"""

import hashlib
import itertools
import json
import os
import sys
import time

from recorded import RecordedGraph
from torch import nn

from fastseg import cli, training
from fastseg.choice import Choice
from fastseg.training import capture, setup
from fastseg.training.step import Step

RANK, WORLD = int(os.environ["RANK"]), int(os.environ["WORLD_SIZE"])
WHAT, DATA, RUN = sys.argv[1:4]

samples: list[list[str]] = []
changes = {"data.size": "32x48", "model.depth": 1, "train.epochs": 10, "train.validate_every": 10}
changes |= {"runtime.log_every": 1, "runtime.device": "cpu", "train.global_batch": 4, "train.schedule": "constant"}
changes |= {"train.grow_from": 1.0}
set_up, step, steps = training.set_up, Step.step, itertools.count()


def frozen(*arguments, **named):
    """A run whose batch norms never use a batch's statistics."""
    run = set_up(*arguments, **named)
    for module in run.step.model.modules():
        if isinstance(module, nn.BatchNorm2d):
            module.eval().train = lambda mode=True, same=module: same
    return run


def observed(self, images, labels, lr):
    samples.append([hashlib.sha256(label.numpy().tobytes()).hexdigest() for label in labels])
    return step(self, images, labels, lr)


def late(self, images, labels, lr):
    if RANK == 1 and next(steps) == 3:
        time.sleep(60)
    return step(self, images, labels, lr)


def bug(self, images, labels, lr):
    raise ZeroDivisionError("a bug")


if WHAT == "frozen":
    training.set_up, Step.step = frozen, observed
    # In fp32 on machines that do bf16 well, too: bf16 would hide whether sums are equal.
    changes |= {"train.accumulate": sys.argv[4], "train.lr": 1e-4, "runtime.dtype": "fp32"}
else:
    changes |= {"runtime.loader": "reference"}  # to import DALI takes each process seconds
if WHAT in ("captured", "ordinary"):
    changes |= {"train.ema": 0.9, "train.clip": 1.0, "runtime.dtype": "fp32"}
    if WHAT == "captured":
        capture.make_graph = RecordedGraph
        setup.choose_capture = lambda config, device: Choice("on", "a recording", {"must": True})
elif WHAT == "late":
    Step.step = late
    changes |= {"runtime.collective_timeout": 10}
elif WHAT == "bug":
    Step.step = bug

settings = [part for key, value in changes.items() for part in ("--set", f"{key}={value}")]
try:
    cli.main(["train", "--data", DATA, "--recipe", "fast", *settings, "--run", RUN, "--json"])
finally:
    if WHAT == "frozen":
        os.write(1, (json.dumps({"rank": RANK, "samples": samples}) + "\n").encode())
