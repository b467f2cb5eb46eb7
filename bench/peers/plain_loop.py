"""Training as a tutorial writes it: torchvision's transforms in a DataLoader, NCHW, a step in PyTorch's own operations.

The loop is one; what it is given differs: a recipe's hyperparameters, first weights, precision, or another network.
"""

import time
from collections.abc import Callable
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import nn

from fastseg.bench.peers.plain_step import PlainSegNet, take
from fastseg.bench.peers.torchvision_loader import batches
from fastseg.config import Train
from fastseg.data.classes import VOID
from fastseg.data.stats import class_weights, count
from fastseg.distributed import World
from fastseg.environment import cores
from fastseg.errors import UsageError
from fastseg.evaluation import score
from fastseg.model import SegNet, initialise
from fastseg.pipelines.source import Spec
from fastseg.training.optim import parameter_groups, schedule

BATCH = 4


class Point(NamedTuple):
    """A validation: seconds of training before it, and its mIoU."""

    seconds: float
    miou: float


class Loop(NamedTuple):
    """What a plain loop trains, and how.

    Attributes:
        network: gives a network for so many classes.
        train: the hyperparameters; batches are of 4.
        dtype: of autocast; fp32 is none.
        ends: after `train.epochs`; else it goes on until it has reached its target, or its time is up.
    """

    network: Callable[[int], nn.Module]
    train: Train
    dtype: torch.dtype = torch.float32
    ends: bool = False


def begun_as(init: str) -> Callable[[int], nn.Module]:
    """Makes plain SegNets that begin with the weights that `model.init` gives ours."""

    def network(classes: int) -> nn.Module:
        ours, plain = SegNet(classes), PlainSegNet(classes)
        initialise(ours, init)
        # The same layers in the same order, under other names.
        plain.load_state_dict(dict(zip(plain.state_dict(), ours.state_dict().values(), strict=True)))
        return plain

    return network


class UNet(nn.Module):
    """segmentation_models.pytorch's U-Net on a ResNet-34 (its defaults), without pretraining.

    It wants sides that are multiples of 32: images are padded below and to the right, and scores cut.
    """

    def __init__(self, classes: int) -> None:
        from segmentation_models_pytorch import Unet

        super().__init__()
        self.network = Unet(encoder_weights=None, classes=classes)

    def forward(self, images_BCHW: torch.Tensor) -> torch.Tensor:
        """[B, 3, H, W] -> [B, classes, H, W]."""
        height, width = images_BCHW.shape[-2:]
        return self.network(F.pad(images_BCHW, (0, -width % 32, 0, -height % 32)))[..., :height, :width]


def train(loop: Loop, spec: Spec, val: Spec, seed: int, target: float, cap: float) -> list[Point]:
    """The curve of a loop, validated after each epoch as `fastseg eval` does it, until `target` or after `cap` seconds.

    Raises:
        UsageError: labels of colours, which the loop's loader does not know.
    """
    if spec.classes.is_color:
        raise UsageError("bench accuracy: the data has labels of colours; the plain loop reads indices alone")
    device, train = spec.device, loop.train
    table = torch.from_numpy(spec.classes.index_table(VOID)).long().to(device)
    weights = class_weights(count(spec.pairs, spec.classes, spec.threads), train.weighting)
    torch.manual_seed(seed)
    model = loop.network(len(weights)).to(device)
    optimizer = torch.optim.SGD(
        parameter_groups(model, train), lr=train.lr, momentum=train.momentum, nesterov=train.nesterov
    )
    loss_of = nn.CrossEntropyLoss(weight=torch.tensor(weights, dtype=torch.float32, device=device), ignore_index=VOID)
    stream = batches(spec.pairs, spec.size, BATCH, workers=cores())
    per_epoch = max(1, len(spec.pairs) // BATCH)
    total = per_epoch * train.epochs
    rate = schedule(train, total, BATCH)
    step, seconds, curve = 0, 0.0, list[Point]()
    while seconds < cap and not any(point.miou >= target for point in curve) and not (loop.ends and step == total):
        start = time.perf_counter()
        for _ in range(per_epoch):
            for group in optimizer.param_groups:
                group["lr"] = rate(step)
            images, labels = next(stream)
            images, labels = images.to(device).contiguous(), table[labels.to(device).long()]
            loss = take(model, optimizer, loss_of, images, labels, loop.dtype)
            step += 1
        loss.item()  # waits for a GPU
        seconds += time.perf_counter() - start
        curve.append(Point(seconds, score(model, val, World(0, 1, device)).scores.miou))
    stream.close()  # type: ignore[attr-defined]
    return curve
