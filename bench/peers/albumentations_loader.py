"""albumentations and OpenCV in torch's DataLoader."""

import os
from collections.abc import Sequence
from typing import Any

import cv2
import torch

os.environ.setdefault("NO_ALBUMENTATIONS_UPDATE", "1")  # else its import asks the package index for a newer version
import albumentations as A
from albumentations.pytorch import ToTensorV2

from fastseg.bench.peers import SHIFT, Batches, data_loader
from fastseg.data.classes import VOID
from fastseg.data.layouts import Pair


class Pairs(torch.utils.data.Dataset):
    """Decoded and transformed pairs."""

    def __init__(self, pairs: Sequence[Pair], size: tuple[int, int], augment: bool) -> None:
        cv2.setNumThreads(0)  # as its users do: threads within an image only get in the way of the workers
        self.pairs = pairs
        moves = [
            A.HorizontalFlip(p=0.5),
            # A crop of the padded image is a shift by whole pixels, at a seventh of an affine warp's time.
            A.Pad(SHIFT, fill=0, fill_mask=VOID),
            A.RandomCrop(*size),
        ]
        self.transform = A.Compose(
            [
                # Leaves what has that size already.
                A.Resize(*size, interpolation=cv2.INTER_AREA, mask_interpolation=cv2.INTER_NEAREST_EXACT),
                *(moves if augment else ()),
                A.Normalize(),
                ToTensorV2(),
            ]
        )

    def __getitem__(self, index: int) -> tuple[torch.Tensor, torch.Tensor]:
        pair = self.pairs[index]
        image = cv2.imread(pair.image, cv2.IMREAD_COLOR_RGB)
        label = cv2.imread(pair.label, cv2.IMREAD_UNCHANGED)
        made = self.transform(image=image, mask=label)
        return made["image"], made["mask"]


def seed_worker(_: int) -> None:
    """Give a worker its own chance: a fork copies albumentations' generator, so that all would draw the same."""
    worker: Any = torch.utils.data.get_worker_info()
    worker.dataset.transform.set_random_seed(worker.seed % 2**32)


def batches(pairs: Sequence[Pair], size: tuple[int, int], batch: int, workers: int, augment: bool = True) -> Batches:
    """See `fastseg.bench.peers`."""
    return data_loader(Pairs(pairs, size, augment), len(pairs), batch, workers, seed_worker)
