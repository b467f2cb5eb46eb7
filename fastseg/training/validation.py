"""What happens after an epoch: scores on the validation split, the best weights, and pictures of what they say."""

import dataclasses
from pathlib import Path

import numpy as np

from fastseg import checkpoint as checkpoints
from fastseg.distributed import World
from fastseg.evaluation import Counted, score
from fastseg.metrics import Scores, miou_of, null_if_nan
from fastseg.overlays import Shown, write_strips
from fastseg.training.run import Run
from fastseg.training.state import state_of

STRIPS = 2  # images that are shown of each kind: the worst, the best, and others


def validate(run: Run, folder: Path) -> tuple[Scores, bool]:
    """Scores on the validation split and whether they are the best so far; the best are saved, with pictures."""
    step, progress = run.step, run.progress
    run.world.sync_buffers(step.model)
    if step.average:
        run.world.sync_buffers(step.average.model)
    found = score(step.evaluated, run.val_spec, run.world, fused=step.model.fused)
    scores = found.scores
    miou = null_if_nan(scores.miou)
    best = miou is not None and (progress.best_miou is None or miou > progress.best_miou) and run.sound
    progress.stale = 0 if best else progress.stale + 1
    if best:
        progress.best_miou = miou
        if run.world.is_main:
            checkpoints.save(folder / "checkpoints" / "best.pt", state_of(run, whole=False))
            write_strips(folder / "overlays", run.val_spec, examples(run, found))
    return scores, best


def examples(run: Run, found: Counted) -> list[Shown]:
    """Predictions for the report: of the images with the worst and the best mIoU, and of others, evenly spread."""
    mious, spec = miou_of(found.confusions), run.val_spec
    order = [int(i) for i in np.argsort(mious, kind="stable") if not np.isnan(mious[i])]
    chosen = dict.fromkeys(order[:STRIPS], "worst")
    chosen |= {i: "best" for i in reversed(order[-STRIPS:]) if i not in chosen}
    others = [i for i in order if i not in chosen]
    chosen |= dict.fromkeys(others[len(others) // (2 * STRIPS) :: max(1, -(-len(others) // STRIPS))][:STRIPS], "other")
    pairs, headers = [spec.pairs[i] for i in chosen], [spec.headers[i] for i in chosen]
    # By the tier that reads files one by one: a cache keeps whole splits.
    few = dataclasses.replace(spec, pairs=pairs, headers=headers, loader="reference")
    alone = World(0, 1, run.spec.device)
    again = score(run.step.evaluated, few, alone, keep=len(chosen), fused=run.step.model.fused)
    return [
        Shown(index, kind, float(mious[index]), prediction)
        for (index, kind), (_, prediction) in zip(chosen.items(), again.kept, strict=True)
    ]
