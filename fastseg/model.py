"""SegNet: VGG's convolutions as encoder, mirrored as decoder, pooling positions handed across.

Badrinarayanan, Kendall, Cipolla, "SegNet: A Deep Convolutional Encoder-Decoder Architecture for Image Segmentation",
IEEE TPAMI 2017. Every convolution is 3x3 and followed by batch normalisation and ReLU, but for the last, which gives
the class scores. Convolutions carry no bias, since batch normalisation subtracts it again.
"""

import contextlib
import os
import re
import sys
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import nn

from fastseg.errors import FastsegError, UsageError, first_line
from fastseg.kernels.bn_relu import bn_relu, bn_relu_pool
from fastseg.kernels.cast import cast
from fastseg.kernels.pool import torch_pool, torch_unpool, unpool
from fastseg.ranges import annotate
from fastseg.texts import shown

# Convolutions per stage (Simonyan and Zisserman 2015, configurations D and E) and channels per stage.
BACKBONES = {"vgg16": (2, 2, 3, 3, 3), "vgg19": (2, 2, 4, 4, 4)}
CHANNELS = (64, 128, 256, 512, 512)
IMAGE_CHANNELS = 3
VGGS = ("vgg16", "vgg16_bn", "vgg19", "vgg19_bn")  # ImageNet's weights, which torchvision has
FIRST_WEIGHTS = ("none", "identity", *VGGS)  # words of `model.init`
SHOWN = 5  # stray keys that are named

Convolve = Callable[[nn.Module, torch.Tensor], torch.Tensor]


def _conv(channels_in: int, channels_out: int) -> list[nn.Module]:
    conv = nn.Conv2d(channels_in, channels_out, 3, padding=1, bias=False)
    return [conv, nn.BatchNorm2d(channels_out), nn.ReLU(inplace=True)]


class SegNet(nn.Module):
    """Class scores for each pixel.

    Args:
        num_classes: C, channels of the output.
        backbone: "vgg16" or "vgg19".
        depth: 1 to 5 encoder stages, each with its decoder stage (MATLAB's segnetLayers offers the same).
        fused: run fastseg's operators between the convolutions instead of PyTorch's; the weights are the same.
        channels: of each stage; VGG's unless others are given.
    """

    def __init__(
        self,
        num_classes: int,
        backbone: str = "vgg16",
        depth: int = 5,
        fused: bool = False,
        channels: Sequence[int] = CHANNELS,
    ) -> None:
        super().__init__()
        self.fused = fused
        if backbone not in BACKBONES:
            raise UsageError(f"model.backbone {backbone}: choose one of {', '.join(BACKBONES)}")
        if not 1 <= depth <= len(channels):
            raise UsageError(f"model.depth {depth}: from 1 to {len(channels)}")
        self.encoder, self.decoder = nn.ModuleList(), nn.ModuleList()
        stages = list(zip(BACKBONES[backbone][:depth], channels[:depth], strict=True))
        width_before = IMAGE_CHANNELS
        for convs, width in stages:
            layers: list[nn.Module] = []
            for _ in range(convs):
                layers += _conv(width_before, width)
                width_before = width
            self.encoder.append(nn.Sequential(*layers))
        for number in reversed(range(depth)):
            convs, width = stages[number]
            layers = [layer for _ in range(convs - 1) for layer in _conv(width, width)]
            if number > 0:
                layers += _conv(width, channels[number - 1])
            else:
                layers += [nn.Conv2d(width, num_classes, 3, padding=1)]
            self.decoder.append(nn.Sequential(*layers))
        for module in self.modules():
            if isinstance(module, nn.Conv2d):
                # He et al. 2015, eq. 10, as SegNet's authors initialise: variance 2 / fan-in.
                nn.init.kaiming_normal_(module.weight, mode="fan_in", nonlinearity="relu")
                if module.bias is not None:
                    nn.init.zeros_(module.bias)

    def forward(self, images_BCHW: torch.Tensor) -> torch.Tensor:
        """[B, 3, H, W] -> scores [B, C, H, W], for any H and W."""
        x, skipped = images_BCHW, []
        convolve = self._convolving(images_BCHW.device.type) if self.fused else _as_it_is
        for number, layers in enumerate(self.encoder, 1):
            with annotate(f"encoder {number}"):
                size = (x.shape[-2], x.shape[-1])
                x, positions = _fused_encode(layers, x, convolve) if self.fused else torch_pool(layers(x))
                skipped.append((positions, size))
        for layers in self.decoder:
            with annotate(f"decoder {len(skipped)}"):
                positions, size = skipped.pop()
                if self.fused:
                    x = _fused_decode(layers, unpool(x, positions, *size), convolve)
                else:
                    x = layers(torch_unpool(x, positions, size))
        return x

    def _convolving(self, device_type: str) -> Convolve:
        """How convolutions are called: under autocast with weights that are all cast here, at once."""
        if not torch.is_autocast_enabled(device_type):
            return _as_it_is
        convs: list[Any] = [module for module in self.modules() if isinstance(module, nn.Conv2d)]
        *weights, bias = cast([conv.weight for conv in convs] + [convs[-1].bias], torch.get_autocast_dtype(device_type))
        of = dict(zip(convs, weights, strict=True))
        return lambda conv, x_BCHW: F.conv2d(x_BCHW, of[conv], bias if conv is convs[-1] else None, padding=1)


def _as_it_is(conv: nn.Module, x_BCHW: torch.Tensor) -> torch.Tensor:
    return conv(x_BCHW)


def _fused_encode(encoder: nn.Module, x_BCHW: torch.Tensor, convolve: Convolve) -> tuple[torch.Tensor, torch.Tensor]:
    """An encoder stage and its pooling with fastseg's operators: values and codes."""
    layers: list[Any] = list(encoder.children())
    *blocks, (conv, norm) = zip(layers[::3], layers[1::3], strict=True)
    for inner_conv, inner_norm in blocks:
        x_BCHW = bn_relu(convolve(inner_conv, x_BCHW), inner_norm)
    return bn_relu_pool(convolve(conv, x_BCHW), norm)


def _fused_decode(decoder: nn.Module, x_BCHW: torch.Tensor, convolve: Convolve) -> torch.Tensor:
    """A decoder stage with fastseg's operators; the last one ends with the convolution that gives the scores."""
    layers: list[Any] = list(decoder.children())
    for conv, norm in zip(layers[::3], layers[1::3], strict=False):
        x_BCHW = bn_relu(convolve(conv, x_BCHW), norm)
    return x_BCHW if isinstance(layers[-1], nn.ReLU) else convolve(layers[-1], x_BCHW)


def read_tensors(path: Path, source: str) -> Any:
    """What torch.save wrote: tensors, numbers, texts and containers of them, on the CPU; no other object is made.

    Raises:
        FileNotFoundError: no such file. FastsegError: anything else; it names `source`.
    """
    try:
        return torch.load(path, map_location="cpu", weights_only=True)
    except (FileNotFoundError, MemoryError):
        raise
    except OSError as error:
        raise FastsegError(f"{source}: cannot be read: {error.strerror or error}") from None
    except (RuntimeError, EOFError):
        raise FastsegError(f"{source}: not a file of torch.save, or damaged, or cut short; give another") from None
    except Exception:  # torch.load fails in many ways on a file that is none of its own, and proposes to trust it
        raise FastsegError(
            f"{source}: not a file of torch.save, or with objects in it, which are never made; give a state dict"
        ) from None


def _fits(value: Any, like: torch.Tensor) -> bool:
    """Whether it is a tensor that has all its numbers in memory, as many and of the kind of `like`."""
    is_plain = isinstance(value, torch.Tensor) and value.layout is torch.strided and not value.is_meta
    return is_plain and value.shape == like.shape and value.is_floating_point() == like.is_floating_point()


def plain_names(weights: Mapping[str, Any]) -> dict[str, Any]:
    """A state dict without what DistributedDataParallel (`module.`) and torch.compile (`_orig_mod.`) put before names.

    A name that would stand twice keeps what was before it.
    """
    plain: dict[str, Any] = {}
    for name, value in weights.items():
        short = re.sub(r"^(module\.|_orig_mod\.)+", "", name)
        plain[name if short in plain else short] = value
    return plain


def load_weights(network: nn.Module, weights: Mapping[str, Any], source: str) -> None:
    """Fill a network with a state dict that is exactly its own, but for `plain_names`.

    Raises:
        FastsegError: weights that are missing, left over, or of another shape; how many, and one by name.
    """
    wanted, given = network.state_dict(), plain_names(weights)

    wrong = {
        "missing": sorted(wanted.keys() - given.keys()),
        "left over": sorted(given.keys() - wanted.keys()),
        "of another shape or kind": sorted(
            name for name in wanted.keys() & given.keys() if not _fits(given[name], wanted[name])
        ),
    }
    told = [f"{len(names)} {how} ({shown(names[0])})" for how, names in wrong.items() if names]
    if told:
        raise FastsegError(f"{source}: not the weights of this network: {', '.join(told)} of {len(wanted)}")
    network.load_state_dict(given)


def _kind(tensor: torch.Tensor) -> str:
    return f"{tensor.type().removeprefix('torch.')}{list(tensor.shape)}"


def load_vgg(model: SegNet, state: dict[str, torch.Tensor], name: str) -> None:
    """Fill the encoder from a torchvision VGG's state dict (vgg16, vgg16_bn, vgg19, vgg19_bn).

    The classifier is dropped. A convolution's bias is folded into its batch normalisation: running_mean -= bias where
    the VGG has one, else scale 1, mean 0, variance 1 and shift = bias, so that the eval-mode features are equal.

    Raises:
        FastsegError: a key that is missing, left over or of another shape, by name.
    """
    if not isinstance(state, dict) or not all(
        isinstance(name, str) and isinstance(value, torch.Tensor) for name, value in state.items()
    ):
        raise FastsegError(f"{name}: not a state dict; give one that torch.save wrote of model.state_dict()")
    left = {k: v for k, v in plain_names(state).items() if not k.startswith("classifier.")}
    has_bn = any(k.endswith("running_mean") for k in left)

    def take(key: str, like: torch.Tensor) -> torch.Tensor:
        if key not in left:
            raise FastsegError(
                f"{name}: no key {key} among its {len(state)}; it is not a torchvision VGG that fits this encoder"
            )
        value = left.pop(key)
        if not _fits(value, like):
            raise FastsegError(f"{name}: {key} is {_kind(value)}, the encoder needs {_kind(like)}")
        return value

    position = 0  # index in torchvision's flat `features`, where pooling layers count too
    with torch.no_grad():
        for stage in model.encoder:
            convs = [layer for layer in stage.children() if isinstance(layer, nn.Conv2d)]
            norms = [layer for layer in stage.children() if isinstance(layer, nn.BatchNorm2d)]
            for conv, bn in zip(convs, norms, strict=True):
                conv.weight.copy_(take(f"features.{position}.weight", conv.weight))
                bias = take(f"features.{position}.bias", bn.bias)
                if has_bn:
                    norm = {key: take(f"features.{position + 1}.{key}", like) for key, like in bn.state_dict().items()}
                    norm["running_mean"] = norm["running_mean"] - bias
                else:
                    norm = {
                        "weight": torch.ones_like(bias),
                        "bias": bias,
                        "running_mean": torch.zeros_like(bias),
                        "running_var": torch.full_like(bias, 1 - bn.eps),
                        "num_batches_tracked": torch.tensor(0),
                    }
                bn.load_state_dict(norm)
                position += 3 if has_bn else 2
            position += 1
    # A shallower encoder leaves whole deeper stages over; anything else left over is a mistake.
    deeper = {k for k in left if k.startswith("features.") and k.split(".")[1].isdecimal()}
    stray = [k for k in left if k not in deeper or int(k.split(".")[1]) < position]
    if stray or (left and len(model.encoder) == len(CHANNELS)):
        stray = stray or list(left)
        more = f" and {len(stray) - SHOWN} more" if len(stray) > SHOWN else ""
        raise FastsegError(f"{name}: {len(stray)} keys that fit nowhere: {', '.join(map(shown, stray[:SHOWN]))}{more}")


def pass_on(model: SegNet) -> None:
    """Let convolutions between batch norms begin by passing their input on, channel by channel; all scores begin at 0.

    Filter i has a 1 at channel i and 0 elsewhere; where there are more filters than channels the others keep He's
    weights. So maps and gradients reach all layers from the first step on, without skip connections: "Dirac" weights,
    of Zagoruyko and Komodakis 2017 (arXiv:1706.00388), as Jordan 2024 (arXiv:2404.00498) begins with them.

    Unpooling leaves three of four pixels at 0. The convolution after it begins by filling them from their neighbours,
    with the weights of bilinear interpolation by two, as fully convolutional networks begin their deconvolutions
    (Long et al. 2015, section 4.2).
    """
    for module in model.modules():
        if isinstance(module, nn.Conv2d) and module.bias is None and module.in_channels > IMAGE_CHANNELS:
            nn.init.dirac_(module.weight[: module.in_channels])
    side = torch.tensor([0.5, 1.0, 0.5])
    for layers in model.decoder:
        after_unpooling, *_, last = (layer.weight for layer in layers.children() if isinstance(layer, nn.Conv2d))
        nn.init.zeros_(after_unpooling)
        after_unpooling.data.diagonal().copy_(torch.outer(side, side)[:, :, None])
    nn.init.zeros_(last)


def initialise(model: SegNet, init: str) -> None:
    """Set the first weights: "none" keeps He's, "identity" is `pass_on`, "vgg16" and the like are ImageNet's for the
    encoder, a download of torchvision's; anything else is a file of such weights.

    Raises:
        UsageError: no such file, or a download that fails, with the cure. FastsegError: a file that does not fit.
    """
    if init == "none":
        return
    if init == "identity":
        pass_on(model)
        return
    if init in VGGS:
        from torchvision.models import get_model_weights

        try:
            weights = get_model_weights(init).DEFAULT
            # Its name ends in the beginning of its digest, which `check_hash` compares.
            with contextlib.redirect_stdout(sys.stderr):  # torch.hub says there what it downloads
                state = weights.get_state_dict(progress=False, check_hash=True, weights_only=True)
        except Exception as error:  # no network, another digest, objects in it: each has errors of its own
            raise UsageError(
                f"--init {init}: its weights could not be had ({getattr(error, 'reason', first_line(error))}; "
                f"downloads are kept in {torch.hub.get_dir()}); "
                "use --init FILE of a torchvision state dict you have, or --init none to start from random weights"
            ) from None
    else:
        path = Path(os.path.expanduser(init))
        if not path.is_file():
            raise UsageError(f"--init {init}: no such file; give {', '.join(FIRST_WEIGHTS)} or a file")
        state = read_tensors(path, f"--init {init}")
    load_vgg(model, state, f"--init {init}")
