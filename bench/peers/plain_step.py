"""A SegNet training step as a tutorial writes it: fp32, NCHW, PyTorch's pooling with indices, cross-entropy and SGD.

Under autocast it is a step as torchvision's references/segmentation/train.py takes it with --amp. Tuned it is what
PyTorch's own guide advises: channels-last maps, autocast, fused SGD, and torch.compile
(https://docs.pytorch.org/tutorials/recipes/recipes/tuning_guide.html).
"""

import itertools
import time
from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import nn

# Convolutions and channels of VGG-16's stages (Simonyan and Zisserman 2015, configuration D).
STAGES = ((2, 64), (2, 128), (3, 256), (3, 512), (3, 512))


def block(before: int, after: int) -> list[nn.Module]:
    """Convolution, batch norm, ReLU."""
    return [nn.Conv2d(before, after, 3, padding=1, bias=False), nn.BatchNorm2d(after), nn.ReLU(inplace=True)]


class PlainSegNet(nn.Module):
    """The network of `fastseg.model.SegNet`, in PyTorch's own operations."""

    def __init__(self, classes: int) -> None:
        super().__init__()
        self.down, self.up = nn.ModuleList(), nn.ModuleList()
        before = 3
        for number, (convs, channels) in enumerate(STAGES):
            widths = [before] + convs * [channels]
            down = [layer for pair in itertools.pairwise(widths) for layer in block(*pair)]
            up = [layer for _ in range(convs - 1) for layer in block(channels, channels)]
            up += block(channels, before) if number else [nn.Conv2d(channels, classes, 3, padding=1)]
            self.down.append(nn.Sequential(*down))
            self.up.insert(0, nn.Sequential(*up))
            before = channels

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """[B, 3, H, W] -> [B, classes, H, W]."""
        pooled = []
        for stage in self.down:
            x = stage(x)
            size = x.shape
            x, indices = F.max_pool2d(x, 2, 2, return_indices=True, ceil_mode=True)
            pooled.append((indices, size))
        for stage in self.up:
            indices, size = pooled.pop()
            x = stage(F.max_unpool2d(x, indices, (2, 2), (2, 2), output_size=size[-2:]))
        return x


def take(
    model: nn.Module,
    optimizer: torch.optim.Optimizer,
    loss_of: nn.Module,
    images: torch.Tensor,
    labels: torch.Tensor,
    dtype: torch.dtype = torch.float32,
) -> torch.Tensor:
    """One step on images [B, 3, H, W] and labels int64[B, H, W]; returns its loss."""
    optimizer.zero_grad()
    with torch.autocast(images.device.type, dtype, enabled=dtype != torch.float32):
        loss = loss_of(model(images), labels)
    loss.backward()
    optimizer.step()
    return loss


def images_per_second(
    device: torch.device,
    size: tuple[int, int],
    batch: int,
    classes: int,
    steps: int,
    dtype: torch.dtype = torch.float32,
    *,
    tuned: bool = False,
    mode: str | None = None,
) -> Callable[[], float]:
    """A measurement of so many steps on one random batch, under autocast to `dtype` where that is not fp32.

    Args:
        tuned: channels-last maps and fused SGD.
        mode: of torch.compile; None does not compile.
    """
    layout = torch.channels_last if tuned else torch.contiguous_format
    model = PlainSegNet(classes).to(device).to(memory_format=layout)
    optimizer = torch.optim.SGD(model.parameters(), lr=1e-3, momentum=0.9, weight_decay=5e-4, fused=tuned)
    loss_of = nn.CrossEntropyLoss(weight=torch.ones(classes, device=device), ignore_index=255)
    images = torch.randn(batch, 3, *size, device=device).contiguous(memory_format=layout)
    labels = torch.randint(0, classes, (batch, *size), device=device)

    network: nn.Module = torch.compile(model, mode=mode) if mode else model  # type: ignore[assignment]

    def measure() -> float:
        start = time.perf_counter()
        for _ in range(steps):
            take(network, optimizer, loss_of, images, labels, dtype).item()  # as it is printed; waits for a GPU
        return steps * batch / (time.perf_counter() - start)

    return measure
