"""What users would take instead of our data path, doing the same work: from the same files to the same tensors.

Each peer is a function batches(pairs, size, batch, workers, augment=True) that yields for ever float32 images
[B, 3, H, W] in channels-last memory, normalised with ImageNet's mean and standard deviation, and uint8 labels
[B, H, W]; mirrored by chance and moved by up to 10 whole pixels, black and void where uncovered. Closing the generator
ends its workers. Label values are the files' own: peers know no class map.
"""

import importlib
import importlib.util
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import torch

from fastseg.bench.harness import STUCK
from fastseg.environment import install

SHIFT = 10
PREFETCH = 2  # batches that a worker of torch's DataLoader makes ahead of need: its default
SHARED_MEMORY = Path("/dev/shm")  # through which workers hand over their batches

Batches = Iterator[tuple[torch.Tensor, torch.Tensor]]

# Name of a peer -> its module here, and what it imports beyond our own dependencies (the extra `peers`).
PEERS: dict[str, tuple[str, tuple[str, ...]]] = {
    "torchvision DataLoader": ("torchvision_loader", ()),
    "albumentations DataLoader": ("albumentations_loader", ("albumentations", "cv2")),
    "SPDL": ("spdl_pipeline", ("albumentations", "cv2", "spdl")),
}


def available() -> tuple[dict[str, Callable[..., Batches]], dict[str, str]]:
    """The peers that are installed, and for each of the others what is missing."""
    found: dict[str, Callable[..., Batches]] = {}
    missing: dict[str, str] = {}
    for name, (module, packages) in PEERS.items():
        absent = [package for package in packages if importlib.util.find_spec(package) is None]
        if absent:
            missing[name] = f"{', '.join(absent)} not installed: {install('peers')}"
        else:
            found[name] = importlib.import_module(f"{__name__}.{module}").batches
    return found, missing


def shared_bytes(size: tuple[int, int], batch: int, workers: int) -> int:
    """What a DataLoader takes of SHARED_MEMORY: all batches that are made ahead, and the one in use."""
    height, width = size
    pixel = 3 * 4 + 1  # three channels in fp32, and a label
    return batch * height * width * pixel * (PREFETCH * workers + 1) if workers else 0


def shared_memory() -> tuple[int, int] | None:
    """Bytes of SHARED_MEMORY in all, and free; None where the system has none."""
    try:
        total, _, free = shutil.disk_usage(SHARED_MEMORY)
    except OSError:
        return None
    return total, free


def shuffled(count: int) -> Iterator[int]:
    """Epoch after epoch, each in a new order. Laid end to end as in our plan, so that no epoch's end drains workers."""
    rng = np.random.default_rng()
    while True:
        yield from rng.permutation(count).tolist()


def data_loader(
    dataset: torch.utils.data.Dataset,
    count: int,
    batch: int,
    workers: int,
    start: Callable[[int], None] | None = None,
) -> Batches:
    """Batches of `count` samples through torch's DataLoader; each worker calls `start` first."""
    loader = torch.utils.data.DataLoader(
        dataset,
        batch_size=batch,
        sampler=shuffled(count),
        num_workers=workers,
        collate_fn=collate,
        worker_init_fn=start,
        prefetch_factor=PREFETCH if workers else None,
        timeout=STUCK if workers else 0,
    )
    made = iter(loader)
    try:
        yield from made
    finally:
        if workers:
            # Left to the garbage collector, as after an error, which refers to the iterator, this takes 5 s a worker.
            made._shutdown_workers()  # type: ignore[attr-defined]


def collate(samples: list[tuple[torch.Tensor, torch.Tensor]]) -> tuple[torch.Tensor, torch.Tensor]:
    """Samples [3, H, W] and [H, W] as a batch. Stacked with channels last, so that pixels are copied once."""
    images, labels = zip(*samples, strict=True)
    return torch.stack([image.permute(1, 2, 0) for image in images]).permute(0, 3, 1, 2), torch.stack(labels)
