"""fastseg: trains SegNet on CamVid-like data as fast as the machine allows.

The API is `load_recipe` and `override` (which make a `Config`), `train`, `evaluate`, `load` and
`fastseg.pipelines.open_source`; torch is imported when one of the last four is first used.

    >>> from pathlib import Path
    >>> import fastseg
    >>> from fastseg.data.synth import write
    >>> write(Path("street"), counts={"train": 4, "val": 2}, size=(64, 96))
    >>> changes = {"data.path": "street", "data.size": "32x48", "model.depth": 2, "train.epochs": 1}
    >>> config = fastseg.override(fastseg.load_recipe("fast"), changes)
    >>> done = fastseg.train(config)
    >>> done["steps"]
    1
    >>> best = f"{done['run']}/checkpoints/best.pt"
    >>> scores = fastseg.evaluate(best)
    >>> len(scores["classes"]), len(scores["images"])
    (11, 2)
    >>> model = fastseg.load(best)
    >>> photo = next(Path("street/val").iterdir())
    >>> model(photo).shape
    (64, 96)
    >>> batch = next(fastseg.pipelines.open_source("street", "val", size=(32, 48), batch=2))
    >>> list(batch.images.shape), list(batch.labels.shape)
    ([2, 3, 32, 48], [2, 32, 48])
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from fastseg import pipelines
    from fastseg.config import Config, load_recipe, override
    from fastseg.evaluation import evaluate
    from fastseg.predict import load
    from fastseg.training import train

__version__ = "0.1.0"
__all__ = ["Config", "evaluate", "load", "load_recipe", "override", "pipelines", "train"]

_HOMES = dict.fromkeys(("Config", "load_recipe", "override"), "fastseg.config")
_HOMES |= {"train": "fastseg.training", "evaluate": "fastseg.evaluation", "load": "fastseg.predict"}


def __getattr__(name: str) -> Any:
    if name == "pipelines":
        return import_module("fastseg.pipelines")
    if name in _HOMES:
        return getattr(import_module(_HOMES[name]), name)
    raise AttributeError(f"module 'fastseg' has no attribute {name!r}")
