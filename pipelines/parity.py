"""Do the tiers of this machine see the same? Their pixels and labels side by side, operation by operation."""

import dataclasses
from collections import Counter
from collections.abc import Iterator

import numpy as np
import torch

from fastseg.config import Size
from fastseg.errors import UsageError
from fastseg.pipelines.plan import Plan
from fastseg.pipelines.source import STD, Spec, TrainSource, choose_loader, evaluation_batches

REFERENCE = "reference"
TIERS = ("dali", "cache")
BATCH = 4

Pixels = tuple[np.ndarray, list[np.ndarray]]


def parity(spec: Spec, plan: Plan) -> list[dict]:
    """One row per tier and operation: how far it is from the reference tier, in counts of 255 and in label pixels.

    `decode` is compared at the files' own size, `resize` at the network's, `augment` as in training, by the same plan:
    windows of `spec.crop`, where it has one.

    Returns:
        Rows have, of all image `values` (three a pixel), the largest `image_difference`, how many are `values_off` at
        all and `values_off_by_more` than 1, and how many of the `labels` are `labels_off`; or why a tier is `skipped`.
    """
    rows: list[dict] = []
    own = {header.image_size for header in spec.headers}
    for tier in TIERS:
        try:
            found, choice = choose_loader(tier, spec, grows=plan.scale != 1)
        except UsageError as error:
            rows.append({"tier": tier, "skipped": str(error)})
            continue
        if found.loader != tier:
            rows.append({"tier": tier, "skipped": choice.why})
            continue
        for operation in ("decode", "resize", "augment"):
            if operation == "decode" and len(own) > 1:
                continue
            seen = (
                dataclasses.replace(found, size=Size(*next(iter(own))), keep=None) if operation == "decode" else found
            )
            wanted = dataclasses.replace(seen, loader=REFERENCE)
            pairs = zip(batches(seen, plan, operation), batches(wanted, plan, operation), strict=True)
            counts: Counter[str] = Counter()
            largest = 0.0
            for (image, label), (wanted_image, wanted_label) in pairs:
                difference = np.abs(image - wanted_image)
                largest = max(largest, float(difference.max()))
                # Values were normalised: whole counts but for rounding.
                counts["values_off"] += int((difference > 0.5).sum())
                counts["values_off_by_more"] += int((difference > 1.5).sum())
                counts["values"] += difference.size
                counts["labels_off"] += sum(int((a != b).sum()) for a, b in zip(label, wanted_label, strict=True))
                counts["labels"] += sum(part.size for part in label)
            rows.append({"tier": tier, "operation": operation, "image_difference": largest, **counts})
    return rows


def batches(spec: Spec, plan: Plan, operation: str) -> Iterator[Pixels]:
    """Images in counts of 255, whatever the mean, and labels: the whole split once."""
    scale = torch.tensor(STD, device=spec.device).view(1, 3, 1, 1)
    if operation == "augment":
        source = iter(TrainSource(spec, plan))
        for _ in range(-(-plan.num_samples // plan.batch)):
            batch = next(source)
            yield (batch.images.float() * scale).cpu().numpy(), list(batch.labels.cpu().numpy())
        return
    for part in evaluation_batches(spec, BATCH, resize_labels=True):
        yield (part.images.float() * scale).cpu().numpy(), [label.cpu().numpy() for label in part.labels]
