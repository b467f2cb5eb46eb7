"""From a configuration, or from a checkpoint, to a run."""

import dataclasses
import functools
import math
from typing import Any

import numpy as np
import torch
from torch import nn

from fastseg import checkpoint as checkpoints
from fastseg import network as networks
from fastseg.choice import Choice
from fastseg.config import Config, Train
from fastseg.data.duplicates import validated_too
from fastseg.data.pairs import Dataset
from fastseg.data.split import choose as choose_split
from fastseg.data.split import contents
from fastseg.data.stats import Counts, all_void, class_weights, count_once, has_classes
from fastseg.distributed import World, choose_dtype, join
from fastseg.errors import FastsegError, UsageError
from fastseg.kernels import launch
from fastseg.network import Network
from fastseg.pipelines.growing import GrowingSource, plan_phases
from fastseg.pipelines.source import DECODED_AHEAD, Spec, choose_loader, decoded_at_once
from fastseg.specs import make_plan, make_spec, open_data
from fastseg.texts import shown
from fastseg.training.capture import Passes
from fastseg.training.gradients import sum_gradients
from fastseg.training.optim import Average, make_optimizer
from fastseg.training.run import Run, last_step
from fastseg.training.startup import Startup
from fastseg.training.state import progress_of, restore
from fastseg.training.step import Step

# Where the first pass of a size takes longer than others; a CPU's would only compute.
WARMED_UP = ("cuda",)


def set_up(
    config: Config, state: dict[str, Any] | None, startup: Startup | None = None, *, reading: bool = False
) -> Run:
    """The run of a configuration: new, or where checkpoint `state` left it.

    Args:
        startup: takes the time of its parts.
        reading: the run's first batch is made meanwhile.

    Raises:
        FastsegError: data or options that cannot be trained on, by name.
    """
    startup = startup or Startup()
    with startup.part("processes and device"):
        world, device_why = join(config.runtime)
    with world.named_failures():
        return _assemble(config, state, world, device_why, startup, reading)


def _assemble(
    config: Config, state: dict[str, Any] | None, world: World, device_why: str, startup: Startup, reading: bool
) -> Run:
    runtime, device, train = config.runtime, world.device, config.train
    dtype, dtype_name, dtype_why = choose_dtype(runtime.dtype, device.type)
    networks.find(config.model.network)  # a name that is wrong is told before files are read
    with startup.part("data set"):
        dataset, splits = open_data(config)
        spec, val_spec = (
            make_spec(config, dataset, splits, s, device=device, dtype=dtype, threads=world.threads.decoding)
            for s in ("train", "val")
        )
        spec, loader = choose_loader(
            runtime.loader, spec, epochs=True, grows=train.grow_from < 1 or config.augment.scale > 1
        )
        val_spec = dataclasses.replace(val_spec, window=None)  # validation sees whole images
        val_spec, _ = choose_loader(runtime.loader, val_spec, epochs=True, resize_labels=False)
    plan = make_plan(config, spec, world.size)
    # What was batch x processes becomes a number: the run keeps its batches when it goes on with other processes.
    config = dataclasses.replace(config, train=dataclasses.replace(train, batch=0, global_batch=plan.batch))
    begun = progress_of(state).step
    phases = plan_phases(train, spec.size, last_step(config, plan))
    source = GrowingSource(spec, plan, phases, config.augment, begun, world.rank, world.size)
    # Decoding has threads of its own, which need none of what follows.
    batches = source.begin() if reading and begun < phases[-1].until else None
    kernels, kernels_why = choose_kernels(config, device)
    capture = choose_capture(config, device)
    with startup.part("classes"):
        counts = count_together(spec, world)
        refuse_void(dataset, spec, val_spec, counts)
    with startup.part("network"):
        first = checkpoints.first_weights(config.model.init) if state is None else None
        model, taken = _network(config, spec, first, fused=kernels == "fused", new=state is None)
        micro_batch = plan.batch // (world.size * train.accumulate)
        sizes = [spec.crop or spec.size, *(phase.size for phase in phases), spec.size]
        networks.rehearse(model, sizes, micro_batch, device, dtype)
    weights = torch.tensor(class_weights(counts, train.weighting), dtype=torch.float32, device=device)
    with startup.part("optimiser"):
        step, optimizer = make_step(model, train, world, dtype, weights, micro_batch)
    ahead = [DECODED_AHEAD, decoded_at_once(plan.batch // world.size)]
    facts = loader.facts | {"threads": spec.threads, "ahead": ahead, "keeps": spec.tier.keeps}
    trained, seen, in_both = {}, {}, 0
    if world.is_main:
        trained = trained_on(spec)
        seen = joined(trained, (state or first or {}).get("trained_on", trained))
        in_both = validated_too(dataset.root, spec.pairs, trained["contents"], val_spec.pairs, spec.threads)
    run = Run(
        config=config,
        world=world,
        spec=spec,
        val_spec=val_spec,
        plan=plan,
        source=source,
        batches=batches,
        step=step,
        pixels=counts.pixels.tolist(),
        choices={
            "split": Choice(*choose_split(dataset, config.data.split_scheme)),
            "loader": dataclasses.replace(loader, facts=facts),
            "device": Choice(device.type, device_why),
            "dtype": Choice(dtype_name, dtype_why),
            "kernels": Choice(kernels, networks.kernels_reason(config.model, kernels_why)),
            "capture": capture,
            "optimizer": optimizer,
        },
        trained_on=trained,
        seen=seen,
        begun=taken,
        left_out=len(dataset.problems),
        in_both=in_both,
        loss=torch.zeros((), device=device),
        void=torch.zeros((), dtype=torch.int64, device=device),
    )
    if state is not None:
        restore(run, state)
    if len(steps := set(world.gather(run.progress.step))) > 1:
        raise FastsegError(
            f"processes see checkpoints of different steps ({', '.join(f'{step:g}' for step in sorted(steps))}): "
            "give --run in a folder that all machines share"
        )
    _let_gradients_meet(step, config, capture)
    return run


def _let_gradients_meet(step: Step, config: Config, capture: Choice) -> None:
    """Have the processes' gradients summed: during the backward pass, or after it where passes are replayed."""
    world, runtime = step.world, config.runtime
    if capture.value == "off":
        step.wrapped = world.wrap(step.model, config.train.accumulate, runtime.bucket_mib, runtime.compress)
        return
    capture_passes(step, must=capture.facts["must"])
    if world.size > 1:
        # DistributedDataParallel's hooks run on the host: they and a graph go together in some versions only.
        world.sync_weights(step.model)
        parameters = learning(step.model)
        step.exchange = functools.partial(sum_gradients, parameters, world, runtime.bucket_mib, runtime.compress)


def warm_up(run: Run, *, later: bool = False) -> int:
    """Let passes find and compile their kernels, so that no step has to wait for that; of how many sizes.

    DistributedDataParallel would send gradients: there steps wait.

    Args:
        later: of the sizes after the next step's, the largest first, whose memory then serves the others.
    """
    if run.world.device.type not in WARMED_UP or run.step.wrapped is not run.step.model:
        return 0
    sizes = [phase.size for phase in run.phases if phase.until > run.progress.step]
    chosen = sorted(sizes[1:], key=math.prod, reverse=True) if later else [run.spec.crop or sizes[0]]
    if chosen:
        run.step.warm_up(chosen)
    return len(chosen)


def capture_passes(step: Step, *, must: bool) -> None:
    """Let a step replay its passes from now on; its weights and optimiser are in the memory that they stay in."""
    step.passes = Passes(step.one_pass, learning(step.model), must=must)


def learning(model: nn.Module) -> list[nn.Parameter]:
    """The parameters that get gradients."""
    return [parameter for parameter in model.parameters() if parameter.requires_grad]


def _network(
    config: Config, spec: Spec, first: dict[str, Any] | None, *, fused: bool, new: bool
) -> tuple[Network, str]:
    """The network on its device, with the first weights of its seed; those of a file only where it is new.

    Args:
        first: the checkpoint whose weights a new network begins with.

    Returns:
        The network, and what of the checkpoint it began with.
    """
    torch.manual_seed(config.runtime.seed)
    model, begun = networks.build(config.model, len(spec.classes.names), config.data.size, fused=fused), ""
    if new and first:
        begun = checkpoints.begin_with(model, config, spec.classes.names, first)
    elif new:
        networks.begin(model, config.model.init)
    if config.runtime.sync_bn:
        model = nn.SyncBatchNorm.convert_sync_batchnorm(model)
    return model.to(spec.device).to(memory_format=torch.channels_last), begun


def make_step(
    model: Network, train: Train, world: World, dtype: torch.dtype, weights: torch.Tensor, micro_batch: int
) -> tuple[Step, Choice]:
    """The step of a network as `train` wants it, in this one process, and the optimiser that was chosen for it."""
    optimizer, name, why = make_optimizer(model, train, world.device)
    step = Step(
        model=model,
        wrapped=model,
        optimizer=optimizer,
        scaler=torch.amp.GradScaler(world.device.type, enabled=dtype == torch.float16),
        average=Average(model, train.ema) if train.ema else None,
        weights=weights,
        world=world,
        dtype=dtype,
        micro_batch=micro_batch,
        clip=train.clip,
    )
    return step, Choice(name, why)


def trained_on(spec: Spec) -> dict[str, list[str]]:
    """The names of a split's images and what is in their files: `overlap` finds them again, wherever they are."""
    return {"stems": [pair.stem for pair in spec.pairs], "contents": contents(spec.pairs, spec.threads)}


def joined(*parts: dict[str, list[str]]) -> dict[str, list[str]]:
    """Several of what `trained_on` gives as one, each image once."""
    rows = dict.fromkeys(row for part in parts for row in zip(part["stems"], part["contents"], strict=True))
    return {"stems": [stem for stem, _ in rows], "contents": [content for _, content in rows]}


def refuse_void(dataset: Dataset, spec: Spec, val_spec: Spec, counts: Counts) -> None:
    """Raise FastsegError where no label to train on, or none to validate on, has a pixel of any class."""
    void = None if counts.pixels.any() else "train"
    if void is None and not has_classes(val_spec.pairs, spec.classes, unknown=spec.unknown):
        void = "val"
    if void:
        images = len((spec if void == "train" else val_spec).pairs)
        raise FastsegError(f"{shown(dataset.root)}: {all_void(void, images, spec.classes)}")


def count_together(spec: Spec, world: World) -> Counts:
    """`count_once` of a split, each process taking its share of the labels."""
    mine = count_once(spec.pairs[world.rank :: world.size], spec.classes, spec.threads, unknown=spec.unknown)
    packed = np.array([mine.images, mine.void_pixels, *mine.pixels, *mine.image_pixels])
    images, void, *rest = world.sum(torch.from_numpy(packed).to(spec.device)).tolist()
    pixels, image_pixels = np.array(rest).reshape(2, -1)
    return Counts(images, pixels, image_pixels, void)


def choose_kernels(config: Config, device: torch.device) -> tuple[str, str]:
    """ "fused" or "torch", and why.

    Raises:
        UsageError: what was asked for does not go together.
    """
    runtime = config.runtime
    if runtime.sync_bn and device.type != "cuda":
        raise UsageError("--sync-bn: torch synchronises batch norm between GPUs only; leave it out with --device cpu")
    if runtime.sync_bn:
        if runtime.kernels == "fused":
            raise UsageError("--sync-bn: the fused batch norm is each GPU's own; use --set runtime.kernels=torch")
        kernels, why = "torch", "PyTorch's batch norm can be synchronised"
    else:
        kernels, why = launch.choose(runtime.kernels, device)
    if runtime.deterministic and device.type == "cuda" and kernels == "torch":
        raise UsageError("--deterministic: PyTorch's unpooling and loss on a GPU are not; use runtime.kernels = fused")
    return kernels, why


def choose_capture(config: Config, device: torch.device) -> Choice:
    """Whether passes are captured: "on" or "off", and why. A fact is `must`: on was asked for, not chosen.

    Raises:
        UsageError: it was asked for and cannot be.
    """
    asked = config.runtime.capture
    if asked == "off":
        return Choice("off", "as asked, the host asks for each kernel", {"must": False})
    obstacle = None
    if device.type != "cuda":
        obstacle = "CUDA graphs need an NVIDIA GPU"
    elif config.runtime.sync_bn:
        obstacle = "synchronised batch norm talks to other GPUs inside of a pass"
    if obstacle is None:
        why = "as asked" if asked == "on" else "the host need not ask for each kernel"
        return Choice("on", f"{why}: passes are replayed from a CUDA graph", {"must": asked == "on"})
    if asked == "on":
        raise UsageError(f"runtime.capture = on: {obstacle}; use --set runtime.capture=auto")
    return Choice("off", obstacle, {"must": False})
