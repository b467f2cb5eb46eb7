"""What happens after an epoch: scores on the validation split, the best weights, and pictures of what they say."""

import dataclasses
from pathlib import Path

import numpy as np

from fastseg import checkpoint as checkpoints
from fastseg.distributed import World
from fastseg.evaluation import Found, score
from fastseg.job import Job, state_of
from fastseg.metrics import Scores, miou_of, null_if_nan
from fastseg.overlays import Shown, write_strips

STRIPS = 2  # images that are shown of each kind: the worst, the best, and others


def validate(job: Job, run: Path) -> tuple[Scores, bool]:
    """Scores on the validation split and whether they are the best so far; the best are saved, with pictures."""
    job.world.sync_buffers(job.model)
    if job.average:
        job.world.sync_buffers(job.average.model)
    found = score(job.evaluated, job.val_spec, job.val_loader, job.world, fused=job.model.fused)
    scores = found.scores
    miou = null_if_nan(scores.miou)
    best = miou is not None and (job.best_miou is None or miou > job.best_miou) and job.sound
    job.stale = 0 if best else job.stale + 1
    if best:
        job.best_miou = miou
        if job.world.is_main:
            checkpoints.save(run / "checkpoints" / "best.pt", state_of(job, whole=False))
            write_strips(run / "overlays", job.val_spec, shown(job, found))
    return scores, best


def shown(job: Job, found: Found) -> list[Shown]:
    """Predictions for the report: of the images with the worst and the best mIoU, and of others, evenly spread."""
    mious = miou_of(found.confusions)
    order = [int(i) for i in np.argsort(mious, kind="stable") if not np.isnan(mious[i])]
    chosen = dict.fromkeys(order[:STRIPS], "worst")
    chosen |= {i: "best" for i in reversed(order[-STRIPS:]) if i not in chosen}
    others = [i for i in order if i not in chosen]
    chosen |= dict.fromkeys(others[len(others) // (2 * STRIPS) :: max(1, -(-len(others) // STRIPS))][:STRIPS], "other")
    few = dataclasses.replace(
        job.val_spec, pairs=[job.val_spec.pairs[i] for i in chosen], headers=[job.val_spec.headers[i] for i in chosen]
    )
    # By the tier that reads files one by one: a cache keeps whole splits.
    alone = World(0, 1, job.spec.device)
    again = score(job.evaluated, few, "torchvision", alone, keep=len(chosen), fused=job.model.fused)
    return [
        Shown(index, kind, float(mious[index]), prediction)
        for (index, kind), (_, prediction) in zip(chosen.items(), again.kept, strict=True)
    ]
