"""fastseg: trains SegNet on CamVid-like data as fast as the machine allows.

The API is `train`, `evaluate` and `load`; torch is imported when one of them is first used.
"""

from importlib import import_module
from typing import Any

__version__ = "0.1.0"
__all__ = ["evaluate", "load", "train"]

_HOMES = {"train": "fastseg.training", "evaluate": "fastseg.evaluation", "load": "fastseg.predict"}


def __getattr__(name: str) -> Any:
    if name in _HOMES:
        return getattr(import_module(_HOMES[name]), name)
    raise AttributeError(f"module 'fastseg' has no attribute {name!r}")
