"""`fastseg bench data`: images per second of each tier of the data path, from files to batches on the device."""

import time
from collections.abc import Callable, Iterator

from fastseg import config as configs
from fastseg.bench.harness import Result, ratio, result, take_turns
from fastseg.distributed import choose_dtype, join
from fastseg.errors import UsageError
from fastseg.inputs import make_spec, open_data
from fastseg.job import make_plan
from fastseg.pipelines.source import Batch, TrainSource, choose_loader

SECONDS = 1.0  # each measurement takes as many batches as last this long


def _images_per_second(batches: Iterator[Batch], batch: int) -> Callable[[], float]:
    def measure() -> float:
        done, start = 0, time.perf_counter()
        while (elapsed := time.perf_counter() - start) < SECONDS:
            next(batches).images.flatten()[0].item()  # waits for a GPU to have made the batch
            done += batch
        return done / elapsed

    return measure


def measure(
    *, data: str, size: tuple[int, int], batch: int, rounds: int, device: str
) -> tuple[list[Result], list[Result]]:
    """Rows per tier, and how much faster DALI is than torchvision where both can read the data."""
    changes = {"data.path": data, "data.size": "{}x{}".format(*size), "train.batch": batch, "runtime.device": device}
    config = configs.override(configs.load_recipe("fast"), changes, "bench")
    world, _ = join(config.runtime)
    dtype, _ = choose_dtype("auto", world.device.type)
    dataset, splits = open_data(config)
    spec = make_spec(config, dataset, splits, "train", device=world.device, dtype=dtype)
    plan = make_plan(config, len(spec.pairs), 1)
    tiers = {}
    for loader in ("dali", "torchvision"):
        try:
            choose_loader(loader, spec)
        except UsageError:
            continue
        tiers[loader] = _images_per_second(iter(TrainSource(spec, plan, loader)), batch)
    samples = take_turns(tiers, rounds)
    name = f"{size[0]}x{size[1]}"
    results = [result(f"data {loader} {name}", "img/s", figures) for loader, figures in samples.items()]
    ratios = [ratio("data dali / torchvision", samples["dali"], samples["torchvision"])] if len(samples) > 1 else []
    return results, ratios
