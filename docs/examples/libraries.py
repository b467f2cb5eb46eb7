"""Networks of libraries, as fastseg calls them; none downloads weights."""

from torch import nn


def lraspp(num_classes: int, size: tuple[int, int]) -> nn.Module:
    from torchvision.models.segmentation import lraspp_mobilenet_v3_large

    return lraspp_mobilenet_v3_large(weights=None, weights_backbone=None, num_classes=num_classes)


def deeplab(num_classes: int, size: tuple[int, int]) -> nn.Module:
    from torchvision.models.segmentation import deeplabv3_mobilenet_v3_large

    return deeplabv3_mobilenet_v3_large(weights=None, weights_backbone=None, num_classes=num_classes)


def unet(num_classes: int, size: tuple[int, int]) -> nn.Module:
    import segmentation_models_pytorch

    return segmentation_models_pytorch.Unet("mobilenet_v2", encoder_weights=None, classes=num_classes)
