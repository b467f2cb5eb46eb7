"""One optimiser step: what learns in it, and how it is taken. Training, benches and tools all take this one.

The loss of a step is sum(weight * cross-entropy) / sum(weight) over the global batch: all processes and all backward
passes of the step together, so that neither their number nor accumulation changes the objective.
"""

import functools
import math
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from typing import NamedTuple

import torch
from torch import nn

from fastseg.distributed import World
from fastseg.kernels.cross_entropy import cross_entropy, torch_cross_entropy, torch_weight_sum, weight_sum
from fastseg.network import Network
from fastseg.ranges import annotate
from fastseg.training.capture import Passes
from fastseg.training.optim import Average


class Taken(NamedTuple):
    """What a step did.

    Attributes:
        loss: this process's part of the loss, a scalar on the device.
        void: whether the global batch had no labelled pixel, a bool on the device.
        skipped: the gradient scaler left the step out, since gradients were not finite.
        sound: False where the loss was no number either, so that the weights may be wrong; it is looked at only where a
            step was skipped.
    """

    loss: torch.Tensor
    void: torch.Tensor
    skipped: bool = False
    sound: bool = True


@dataclass
class Step:
    """What learns, and how one optimiser step of it is taken.

    Attributes:
        model: the network, on the world's device in channels-last memory.
        wrapped: the same under DistributedDataParallel, where there are several processes.
        scaler: of the loss under fp16; else it is not enabled.
        average: of the weights, or None.
        weights: float32[C], of the classes in the loss.
        dtype: of convolutions and activations; weights are fp32.
        micro_batch: images per backward pass; a process's share of a batch is cut into passes of so many.
        clip: the largest norm of the gradient; 0 leaves it alone.
        passes: replays passes from a graph; None: they run as they are.
        exchange: makes the sum over processes of the parameters' gradients; None where `wrapped` has done that.
        scale: of the loss, after the last step.
        one: 1.0, on the device.
    """

    model: Network
    wrapped: nn.Module
    optimizer: torch.optim.Optimizer
    scaler: torch.amp.GradScaler
    average: Average | None
    weights: torch.Tensor
    world: World
    dtype: torch.dtype
    micro_batch: int
    clip: float = 0.0
    passes: Passes | None = None
    exchange: Callable[[], None] | None = None
    scale: float = field(init=False)
    one: torch.Tensor = field(init=False)

    def __post_init__(self) -> None:
        self.scale = self.scaler.get_scale()
        self.one = torch.ones((), device=self.world.device)

    @property
    def evaluated(self) -> Network:
        """The network that is evaluated: the averaged weights where there are any."""
        return self.average.model if self.average else self.model  # type: ignore[return-value]

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        """Scores [B, C, H, W] of images [B, 3, H, W], as training gets them."""
        mixed = self.dtype != torch.float32
        # Each weight is met once: there is nothing to keep, and what is kept cannot be captured.
        with torch.autocast(self.world.device.type, self.dtype, enabled=mixed, cache_enabled=False):
            return self.wrapped(images)

    def backward(self, images: torch.Tensor, labels: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Forward, loss and backward on this process's share of the global batch; gradients are added up, and scaled.

        Args:
            images: [B, 3, H, W], channels-last.
            labels: uint8[B, H, W].

        Returns:
            `loss` and `void`, as `Taken` has them.
        """
        sum_weights = weight_sum if self.model.fused else torch_weight_sum
        with annotate("sum of weights"):
            total = self.world.sum(sum_weights(labels, self.weights))
        losses = []
        parts = list(zip(images.split(self.micro_batch), labels.split(self.micro_batch), strict=True))
        for position, (some_images, some_labels) in enumerate(parts):
            with self.world.gradient_sync(self.wrapped, position == len(parts) - 1):
                if self.passes:
                    losses.append(self.passes(some_images, some_labels, total, single=len(parts) == 1))
                else:
                    losses.append(self.one_pass(some_images, some_labels, total))
        if self.exchange:
            with annotate("exchange"):
                self.exchange()
        return functools.reduce(torch.add, losses), total == 0

    def one_pass(self, images: torch.Tensor, labels: torch.Tensor, total: torch.Tensor) -> torch.Tensor:
        """Forward, loss and backward of a micro-batch, whose part of the loss is returned.

        Nothing here waits for the device or hangs on a number that changes: it is what a graph replays.

        Args:
            total: sum of the weights of the global batch's labels, a scalar on the device.
        """
        find_loss = cross_entropy if self.model.fused else torch_cross_entropy
        with annotate("forward"):
            logits = self.forward(images)
        with annotate("loss"):
            part = find_loss(logits, labels, self.weights, total)
        with annotate("backward"):
            # DistributedDataParallel takes the mean over processes; the parts of the loss are to be summed.
            times = 1 if self.exchange else self.world.size
            # The gradient's scale is where it begins: to multiply the loss would be two launches more.
            (part * times if times > 1 else part).backward(self.scaler.scale(self.one))
        return part.detach()

    def warm_up(self, sizes: Iterable[tuple[int, int]]) -> None:
        """Take a pass of an empty micro-batch of each size (height, width), so that its kernels are found and compiled.

        No trace of it is left, and no other process hears of it: `wrapped` must be the model itself.
        """
        parameters, buffers = list(self.model.parameters()), list(self.model.buffers())
        gradients, statistics = [p.grad for p in parameters], [buffer.clone() for buffer in buffers]
        one_pass = self.passes.warm_up if self.passes else self.one_pass
        sum_weights = weight_sum if self.model.fused else torch_weight_sum
        for size in sizes:
            for parameter in parameters:
                parameter.grad = None
            images = torch.zeros(self.micro_batch, *size, 3, dtype=self.dtype, device=self.world.device)
            labels = torch.zeros(self.micro_batch, *size, dtype=torch.uint8, device=self.world.device)
            one_pass(images.permute(0, 3, 1, 2), labels, sum_weights(labels, self.weights))
        for parameter, gradient in zip(parameters, gradients, strict=True):
            parameter.grad = gradient
        for buffer, kept in zip(buffers, statistics, strict=True):
            buffer.copy_(kept)

    def step(self, images: torch.Tensor, labels: torch.Tensor, lr: float) -> Taken:
        """One optimiser step on this process's share of the global batch, as `backward` takes it.

        A step that the gradient scaler skips leaves no trace: batch norm gets back the statistics that it had before,
        which one infinite value would spoil for good. Too large a scale makes gradients infinite, and passes.
        """
        statistics = [buffer.clone() for buffer in self.model.buffers()] if self.scaler.is_enabled() else []
        loss, void = self.backward(images, labels)
        with annotate("optimiser"):
            if self.clip:
                self.scaler.unscale_(self.optimizer)
                nn.utils.clip_grad_norm_(self.model.parameters(), self.clip)
            for group in self.optimizer.param_groups:
                group["lr"] = lr
            self.scaler.step(self.optimizer)
            self.scaler.update()
            self.optimizer.zero_grad(set_to_none=True)
            taken = self._judged(loss, void)
            if taken.skipped:
                for buffer, kept in zip(self.model.buffers(), statistics, strict=True):
                    buffer.copy_(kept)
            elif self.average:
                self.average.update(self.model)
        return taken

    def _judged(self, loss: torch.Tensor, void: torch.Tensor) -> Taken:
        """Whether the scaler skipped the step; fp16 waits for the device, since the next rate hangs on it."""
        if not self.scaler.is_enabled():
            return Taken(loss, void)
        before, self.scale = self.scale, self.scaler.get_scale()
        skipped = self.scale < before
        return Taken(loss, void, skipped, not skipped or math.isfinite(self.world.sum(loss.clone())))
