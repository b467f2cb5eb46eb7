"""The optimiser: which SGD runs and why, the learning rate of each step, the averaged weights."""

import copy
import inspect
import math
from collections.abc import Callable
from typing import Any

import torch
from torch import nn

from fastseg.config import Train
from fastseg.errors import UsageError, first_line

# torch's OneCycleLR: the rate starts at peak / 25 and ends at that start / 10^4.
ONE_CYCLE_START, ONE_CYCLE_END = 25, 1e4


class SGD(torch.optim.SGD):
    """torch's, without what keeps torch's compiler out of these methods: it would import it, for 2 to 5 seconds."""

    add_param_group = inspect.unwrap(torch.optim.SGD.add_param_group)
    state_dict = inspect.unwrap(torch.optim.SGD.state_dict)
    load_state_dict = inspect.unwrap(torch.optim.SGD.load_state_dict)
    zero_grad = inspect.unwrap(torch.optim.SGD.zero_grad)
    step = torch.no_grad()(inspect.unwrap(torch.optim.SGD.step))


def parameter_groups(model: nn.Module, train: Train) -> list[dict]:
    """All parameters in one group, or norms and biases (one dimension) in a second, without decay."""
    parameters = list(model.parameters())
    if train.decay_norms:
        return [{"params": parameters, "weight_decay": train.weight_decay}]
    return [
        {"params": [p for p in parameters if p.ndim > 1], "weight_decay": train.weight_decay},
        {"params": [p for p in parameters if p.ndim <= 1], "weight_decay": 0.0},
    ]


def find_apex() -> tuple[Callable[..., torch.optim.Optimizer] | None, str]:
    """apex's FusedSGD where it is NVIDIA's apex with its CUDA part, and what was found.

    The package of that name on the index is another project, hence the look at what it holds.
    """
    try:
        from apex.multi_tensor_apply import multi_tensor_applier
        from apex.optimizers import FusedSGD
    except Exception as error:  # another project's code runs here, and may fail in any way
        return None, f"no apex of NVIDIA's ({first_line(error)})"
    if not multi_tensor_applier.available:
        return None, "apex was built without its CUDA part"
    return FusedSGD, "apex with its CUDA part is installed"


def make_optimizer(model: nn.Module, train: Train, device: torch.device) -> tuple[torch.optim.Optimizer, str, str]:
    """SGD over the model's parameters, its name, and why this one.

    Raises:
        UsageError: apex was asked for and cannot be had.
    """
    groups = parameter_groups(model, train)
    apex_sgd, found = find_apex() if train.optimizer != "torch" else (None, "as asked")
    options: dict[str, Any] = {"lr": train.lr, "momentum": train.momentum, "nesterov": train.nesterov}
    # apex's kernel knows fp16 and fp32 and skips bf16 parameters without a word; ours are fp32 masters under autocast.
    fits = device.type == "cuda" and all(p.dtype == torch.float32 for p in model.parameters())
    if apex_sgd is not None and fits:
        return apex_sgd(groups, **options), "apex FusedSGD", found
    why = found if apex_sgd is None else "apex's kernels need fp32 parameters on a GPU"
    if train.optimizer == "apex":
        raise UsageError(f"train.optimizer = apex: {why}; use --set train.optimizer=auto")
    try:
        optimizer = SGD(groups, **options, fused=True)
    except RuntimeError as error:  # torch refuses `fused` on devices that have no such kernel
        return SGD(groups, **options), "torch SGD", f"{why}; {error}"
    if train.momentum:
        # torch 2.14 makes these in its first step, and leaves them unset where the gradient scaler skips that one.
        for parameter in model.parameters():
            optimizer.state[parameter]["momentum_buffer"] = torch.zeros_like(parameter)
    return optimizer, "torch fused SGD", why


def lr_scale(train: Train, batch: int) -> float:
    """What a global batch multiplies train.lr by: "linear" as Goyal et al. 2017, "sqrt" as Krizhevsky 2014."""
    ratio = batch / train.lr_batch
    return {"none": 1.0, "linear": ratio, "sqrt": math.sqrt(ratio)}[train.lr_scaling]


def schedule(train: Train, total_steps: int, batch: int) -> Callable[[int], float]:
    """The learning rate of step 0 .. total_steps - 1, as a pure function of the step: nothing to save or restore.

    Where `lr_scaling` raises it for a global batch, it grows from train.lr within the first `lr_warmup_epochs` (Goyal
    et al. 2017, section 2.2); one-cycle begins low anyway.
    """
    scale, rate = lr_scale(train, batch), _unscaled(train, total_steps)
    warmup = 0.0 if train.schedule == "one-cycle" else total_steps * train.lr_warmup_epochs / train.epochs
    return lambda step: rate(step) * (1 + (scale - 1) * min(1.0, step / warmup if warmup else 1.0))


def _unscaled(train: Train, total_steps: int) -> Callable[[int], float]:
    if train.schedule == "step":
        # In whole numbers: a quotient of floats can fall just below the drop.
        drops = total_steps * train.step_epochs
        return lambda step: train.lr * train.step_factor ** (step * train.epochs // drops)
    if train.schedule == "poly":
        return lambda step: train.lr * (1 - step / total_steps) ** train.power
    if train.schedule == "one-cycle":
        return lambda step: one_cycle(step, total_steps, train.lr, train.warmup)
    return lambda step: train.lr


def one_cycle(step: int, total_steps: int, peak: float, warmup: float) -> float:
    """Cosine up to the peak, cosine down to almost nothing (Smith and Topin 2018), as torch's OneCycleLR has it."""
    start, end = peak / ONE_CYCLE_START, peak / ONE_CYCLE_START / ONE_CYCLE_END
    top = warmup * total_steps - 1
    if step <= top:
        low, high, share = start, peak, step / top if top > 0 else 1.0
    else:
        low, high, share = peak, end, (step - top) / max(1e-12, total_steps - 1 - top)
    return high + (low - high) / 2 * (1 + math.cos(math.pi * share))


class Average:
    """Exponential moving average of a model's weights: average += (1 - decay) * (weights - average) after each step.

    Batch norm's statistics are running averages already, and are copied.
    """

    def __init__(self, model: nn.Module, decay: float) -> None:
        self.model, self.decay = copy.deepcopy(model).requires_grad_(False), decay

    @torch.no_grad()
    def update(self, model: nn.Module) -> None:
        """Take in the weights after one more optimiser step."""
        torch._foreach_lerp_(list(self.model.parameters()), list(model.parameters()), 1 - self.decay)
        for mine, theirs in zip(self.model.buffers(), model.buffers(), strict=True):
            mine.copy_(theirs)
