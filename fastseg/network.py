"""The network of a configuration: SegNet, or what a function of the user's own gives.

This is the one module that looks at a network's name, or asks whether it is SegNet (`tests/test_house.py` sees to
that): all others take a `Network` as it is, or ask here. docs/network.md says what such a function is given and gives.
"""

import difflib
import importlib
import os
import sys
from collections.abc import Callable, Collection, Mapping, Sequence
from pathlib import Path
from typing import TypeAlias

import torch
import torch.nn.functional as F
from torch import nn

from fastseg.config import Model, Size
from fastseg.errors import FastsegError, UsageError, first_line
from fastseg.model import SegNet, initialise, load_weights, read_tensors
from fastseg.texts import brief, shown

SEGNET = "segnet"
TRIED = 2  # images of a trial pass: batch norm sees more than one, and more of them show nothing else


class Adapter(nn.Module):
    """A network of the user's own as fastseg takes SegNet: [B, 3, H, W] -> scores [B, C, H, W].

    Args:
        network: gives scores [B, C, h, w], h and w those of its input or a whole fraction of them, or a dict with them
            as "out", as torchvision's segmentation networks do; what else is in it is left alone.
        name: "package.module:function", for messages.
        classes: C.

    Attributes:
        fused: run fastseg's operators around the network: the loss, and the counts of an evaluation.
        unused: tensors of weights that the scores do not depend on, such as an auxiliary head's, as `rehearse` found.
    """

    def __init__(self, network: nn.Module, name: str, classes: int, *, fused: bool) -> None:
        super().__init__()
        self.network, self.name, self.classes, self.fused, self.unused = network, name, classes, fused, 0

    def forward(self, images_BCHW: torch.Tensor) -> torch.Tensor:
        """Scores of the images' size, resized bilinearly (half-pixel centres) where the network's are smaller.

        Raises:
            UsageError: the network gives something else.
        """
        found = self.network(images_BCHW)
        scores = found.get("out") if isinstance(found, Mapping) else found
        size = (images_BCHW.shape[-2], images_BCHW.shape[-1])
        if not isinstance(scores, torch.Tensor) or scores.ndim != 4 or not scores.is_floating_point():
            told = f"{scores.dtype}{list(scores.shape)}" if isinstance(scores, torch.Tensor) else type(found).__name__
            raise UsageError(
                f'--network {self.name}: it gives {told}; scores [B, C, h, w] are wanted, or a dict with them as "out"'
            )
        if scores.shape[1] != self.classes:
            raise UsageError(
                f"--network {self.name}: it gives {scores.shape[1]} channels for {self.classes} classes; the function "
                "is called with num_classes, which its last layer should have"
            )
        given = (scores.shape[2], scores.shape[3])
        if given == size:
            return scores
        if not _is_whole_fraction(given, size):
            raise UsageError(
                f"--network {self.name}: it gives scores of {Size(*given)} for images of {Size(*size)}; their size "
                "is wanted, or a whole fraction of it"
            )
        return F.interpolate(scores, size=size, mode="bilinear", align_corners=False)


Network: TypeAlias = SegNet | Adapter


def _is_whole_fraction(small: tuple[int, int], size: tuple[int, int]) -> bool:
    """Whether both sides are those of `size` over one whole number, rounded up (as strided convolutions do) or down."""
    return any(
        all(s in (side // k, -(-side // k)) for s, side in zip(small, size, strict=True)) for k in range(1, max(size))
    )


def admit(model: Model, given: str | Collection[str], source: str) -> None:
    """See that a network which a file names is one that its user has named: to import a module is to run it.

    Args:
        model: what a checkpoint, or a run's folder, remembers.
        given: the name, or names, that the user has given; SegNet needs none.
        source: the file, for the message.

    Raises:
        UsageError: the user has named no network, or another one.
    """
    given = (given,) if isinstance(given, str) else given
    if model.network == SEGNET or model.network in given:
        return
    kept = shown(brief(model.network).strip("'"))
    other = f", not {' or '.join(given)}" if given else ""
    raise UsageError(
        f"{source}: its network is {kept}{other}; give --network {kept} (in Python network=), which imports its module "
        "and runs the code there"
    )


def find(name: str) -> Callable[..., object] | None:
    """The function that a network's name stands for; None for SegNet. Its module is imported, the current folder first.

    Raises:
        UsageError: no such name, module or function, or a module that cannot be imported.
    """
    if name == SEGNET:
        return None
    module_name, _, function_name = name.partition(":")
    if not all(part.isidentifier() for part in (*module_name.split("."), function_name)):
        raise UsageError(f"--network {shown(brief(name))}: write {SEGNET}, or PACKAGE.MODULE:FUNCTION")
    if sys.path[:1] not in ([""], [os.getcwd()]):  # as `python -m` has it, and so the processes of fastseg's launcher
        sys.path.insert(0, os.getcwd())
    importlib.invalidate_caches()  # the file may be new
    try:
        module = importlib.import_module(module_name)
    except (Exception, SystemExit) as error:  # the user's code runs here, and may fail in any way
        if isinstance(error, ModuleNotFoundError) and f"{module_name}.".startswith(f"{error.name}."):
            raise UsageError(
                f"--network {name}: no module {error.name} in {shown(os.getcwd())}, which is searched first, or where "
                "else Python looks (PYTHONPATH)"
            ) from None
        raise UsageError(f"--network {name}: importing {module_name} raises {first_line(error)}") from error
    function = getattr(module, function_name, None)
    if not callable(function):
        near = difflib.get_close_matches(function_name, [n for n, v in vars(module).items() if callable(v)], 1)
        what = "nothing" if function is None else type(function).__name__
        hint = f"; did you mean {near[0]}?" if near else ""
        raise UsageError(f"--network {name}: a function is wanted, and {module_name} has {what} of that name{hint}")
    return function


def build(model: Model, classes: int, size: Size, *, fused: bool = False) -> Network:
    """The network of a configuration, with first weights of its own; SegNet's are He's.

    Args:
        size: (height, width) of the input in pixels, which a function of the user's is told.
        fused: see `SegNet` and `Adapter`.

    Raises:
        UsageError: as `find`; an option that is SegNet's with another network; a function that gives no network.
    """
    function = find(model.network)
    if function is None:
        return SegNet(classes, model.backbone, model.depth, fused=fused)
    for option in ("backbone", "depth"):
        if (value := getattr(model, option)) != getattr(Model, option):
            raise UsageError(f"model.{option} = {value}: is SegNet's, and the network is {model.network}: leave it out")
    try:
        network = function(num_classes=classes, size=tuple(size))
    except Exception as error:  # the user's code, as above
        raise UsageError(
            f"--network {model.network}: called with num_classes={classes}, size={tuple(size)} it raises "
            f"{first_line(error)}"
        ) from error
    if not isinstance(network, nn.Module):
        raise UsageError(f"--network {model.network}: it gives {type(network).__name__}, a torch.nn.Module is wanted")
    return Adapter(network, model.network, classes, fused=fused)


def begin(network: Network, init: str) -> None:
    """Set a new run's first weights: SegNet's as `initialise` does; another network's own, or of a file of all of them.

    Raises:
        UsageError: no such file, or weights that are SegNet's. FastsegError: a file that does not fit.
    """
    if isinstance(network, SegNet):
        initialise(network, init)
        return
    if init == "none":
        return
    path = Path(os.path.expanduser(init))
    if not path.is_file():
        raise UsageError(
            f"--init {init}: no such file; {network.name} begins with its own weights (none), or with a file that "
            "torch.save wrote of its state_dict(); other values are SegNet's"
        )
    weights = read_tensors(path, f"--init {init}")
    if not isinstance(weights, dict) or not all(isinstance(key, str) for key in weights):
        raise FastsegError(f"--init {init}: not a state dict; give one that torch.save wrote of model.state_dict()")
    load_weights(network.network, weights, f"--init {init}")


def weights_of_scores(network: Network, before: Mapping[str, torch.Tensor]) -> list[str]:
    """The names of the tensors that make the scores of classes: SegNet's last layer's.

    Of another network nobody knows which they are; they show where its tensors and those of `before`, which are of
    another number of classes, differ in their first dimension alone.
    """
    if isinstance(network, SegNet):
        stages = list(network.decoder.children())
        last = f"decoder.{len(stages) - 1}.{len(list(stages[-1].children())) - 1}"
        return [name for name in network.state_dict() if name.startswith(f"{last}.")]
    return [
        name
        for name, own in network.state_dict().items()
        if name in before and own.shape[1:] == before[name].shape[1:] and own.shape[:1] != before[name].shape[:1]
    ]


def rehearse(network: Network, sizes: Sequence[Size], batch: int, device: torch.device, dtype: torch.dtype) -> None:
    """Try a user's network on empty images of a run's sizes, validating and training, before anything depends on it.

    Weights that its scores do not depend on are frozen: they get no gradient, which DistributedDataParallel and a CUDA
    graph would wait for. Buffers and torch's random numbers are then what they were. SegNet needs no trial.

    Args:
        sizes: that the run trains on and evaluates.
        batch: images of a backward pass.
        dtype: of the run's convolutions.

    Raises:
        UsageError: it raises an error, or gives something else than scores, with the size.
    """
    if isinstance(network, SegNet):
        return
    learning = [parameter for parameter in network.parameters() if parameter.requires_grad]
    if not learning:
        raise UsageError(f"--network {network.name}: it has no weights to train (requires_grad)")
    kept = [buffer.clone() for buffer in network.buffers()]
    batch = min(batch, TRIED)
    with torch.random.fork_rng([device] if device.type == "cuda" else []):
        for number, size in enumerate(dict.fromkeys(sizes)):
            images = torch.zeros(batch, *size, 3, device=device).permute(0, 3, 1, 2)
            for training in (False, True):
                # In evaluation mode no part is left out at random: what gets no gradient there never does.
                wanted = number == 0 and not training
                how = f"of {batch} image{'s' * (batch > 1)} of {size}, {'training' if training else 'evaluating'}"
                try:
                    network.train(training)
                    with (
                        torch.set_grad_enabled(wanted),
                        torch.autocast(device.type, dtype, enabled=dtype != torch.float32, cache_enabled=False),
                    ):
                        scores = network(images)
                    if wanted:
                        gradients = torch.autograd.grad(scores.float().sum(), learning, allow_unused=True)
                except (FastsegError, torch.OutOfMemoryError, torch.AcceleratorError):
                    raise
                except Exception as error:  # the user's code, as above
                    raise UsageError(
                        f"--network {network.name}: {how}, it raises {first_line(error)}; change --size, --batch or "
                        "train.grow_from, or mend it (fastseg --debug shows where)"
                    ) from error
    for buffer, before in zip(network.buffers(), kept, strict=True):
        buffer.copy_(before)
    unused = [parameter for parameter, gradient in zip(learning, gradients, strict=True) if gradient is None]
    for parameter in unused:
        parameter.requires_grad_(False)
    network.unused = len(unused)


def describe(model: Model, network: Network) -> str:
    """The network for the start block."""
    if isinstance(network, SegNet):
        return f"SegNet, {model.backbone}, depth {model.depth}, init {model.init}"
    unused = f", {network.unused} tensors of weights that no score depends on" if network.unused else ""
    return f"{network.name} (not SegNet), init {'its own' if model.init == 'none' else model.init}{unused}"


def kernels_reason(model: Model, why: str) -> str:
    """Why a run has these kernels, and of what: fastseg's operators between convolutions are SegNet's."""
    return why if model.network == SEGNET else f"{why}; of the loss and of counts alone: the network is not SegNet"


def deepest_scale(model: Model) -> int | None:
    """By what the deepest maps that batch norm sees are smaller than the input; None where nobody knows."""
    return 2 ** (model.depth - 1) if model.network == SEGNET else None


def for_export(network: Network, folded: Callable[[SegNet], nn.Module]) -> tuple[nn.Module, str]:
    """What is exported, SegNet as `folded` makes it and any other network as it is, and what became of batch norms."""
    return (folded(network), "folded") if isinstance(network, SegNet) else (network, "as they are, not SegNet's")
