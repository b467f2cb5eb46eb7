"""torchvision's v2 transforms in torch's DataLoader, as its documentation shows them."""

from collections.abc import Sequence

import torch
from torchvision import tv_tensors
from torchvision.io import ImageReadMode, decode_image
from torchvision.transforms import v2

from fastseg.bench.peers import SHIFT, Batches, data_loader
from fastseg.data.classes import VOID
from fastseg.data.layouts import Pair


class Pairs(torch.utils.data.Dataset):
    """Decoded and transformed pairs.

    torchvision.io decodes a pair of CamVid in 5.3 ms where Pillow takes 5.8 (one thread of the build machine).
    torchvision 0.29 deprecates it in favour of TorchCodec.
    """

    def __init__(self, pairs: Sequence[Pair], size: tuple[int, int], augment: bool) -> None:
        self.pairs = pairs
        moves = [
            v2.RandomHorizontalFlip(0.5),
            # A crop of the padded image is a shift by whole pixels, at a twentieth of an affine warp's time.
            v2.RandomCrop(size, padding=SHIFT, fill={tv_tensors.Image: 0, tv_tensors.Mask: VOID}),
        ]
        self.transform = v2.Compose(
            [
                v2.Resize(size),  # leaves what has that size already
                *(moves if augment else ()),
                v2.ToDtype({tv_tensors.Image: torch.float32, "others": None}, scale=True),
                v2.Normalize(mean=[0.485, 0.456, 0.406], std=[0.229, 0.224, 0.225]),
            ]
        )

    def __getitem__(self, index: int) -> tuple[torch.Tensor, torch.Tensor]:
        pair = self.pairs[index]
        image = tv_tensors.Image(decode_image(pair.image, ImageReadMode.RGB))
        label = tv_tensors.Mask(decode_image(pair.label, ImageReadMode.UNCHANGED))
        image, label = self.transform(image, label)
        return image, label[0]


def batches(pairs: Sequence[Pair], size: tuple[int, int], batch: int, workers: int, augment: bool = True) -> Batches:
    """See `fastseg.bench.peers`."""
    return data_loader(Pairs(pairs, size, augment), len(pairs), batch, workers)
