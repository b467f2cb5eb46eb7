"""The data path: from a sample plan to a batch on the device.

`open_source` opens it by the path of a data set. It begins with a configuration, so it stands in `fastseg.specs`,
above this package, and is looked up when it is used.
"""

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from fastseg.specs import open_source

__all__ = ["open_source"]


def __getattr__(name: str) -> Any:
    if name == "open_source":
        from fastseg.specs import open_source

        return open_source
    raise AttributeError(f"module 'fastseg.pipelines' has no attribute {name!r}")
