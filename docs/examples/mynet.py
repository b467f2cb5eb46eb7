"""A network of one's own: three strided convolutions, and scores of an eighth of the input's size."""

from torch import nn


def build(num_classes: int, size: tuple[int, int]) -> nn.Module:
    """[B, 3, H, W] -> scores [B, num_classes, H / 8, W / 8], for images of `size` (height, width)."""
    layers: list[nn.Module] = []
    for before, after in ((3, 32), (32, 64), (64, 128)):
        layers += [nn.Conv2d(before, after, 3, stride=2, padding=1, bias=False), nn.BatchNorm2d(after), nn.ReLU()]
    return nn.Sequential(*layers, nn.Conv2d(128, num_classes, 1))
