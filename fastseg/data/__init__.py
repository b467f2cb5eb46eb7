"""Data sets: class maps, layouts, splits, checks, statistics, synthetic scenes."""

import hashlib
import os
import re
from pathlib import Path
from typing import Any

from fastseg.errors import FastsegError, UsageError
from fastseg.texts import user_path

# What `--data synth` and `make demo` train on: three times the default training size, so that resizing has work to do.
SYNTH_COUNTS = {"train": 256, "val": 64, "test": 0}
SYNTH_SIZE = (144, 216)


def home() -> Path:
    """The folder of data sets: $FASTSEG_DATA where set, else the user's cache folder.

    Raises:
        UsageError: the user has no home folder (a container's, without HOME and an entry in /etc/passwd).
    """
    if os.environ.get("FASTSEG_DATA"):
        return user_path(os.environ["FASTSEG_DATA"])
    cache = user_path(os.environ.get("XDG_CACHE_HOME") or "~/.cache")
    if cache.parts[:1] == ("~",):
        raise UsageError("there is no home folder to keep data in (HOME is not set): set FASTSEG_DATA to a folder")
    return cache / "fastseg"


def is_url(name: str) -> bool:
    """Whether `--data` names a data set elsewhere (`s3://bucket/camvid`) and no path."""
    return re.match(r"[A-Za-z][A-Za-z0-9+.-]*://", name) is not None


def resolve(name: str) -> Path:
    """The folder behind `--data`: `camvid` (downloaded on first use), `synth` (drawn on first use), or a path.

    A URL stands for its copy in `home()`, which is brought up to date with every call.
    """
    if name == "synth":
        return draw_once(name, counts=SYNTH_COUNTS, size=SYNTH_SIZE)
    if name == "camvid":
        from fastseg.data.download import download_camvid

        folder = home() / "camvid"
        if not folder.exists():
            download_camvid(folder)
        return folder
    if is_url(name):
        from fastseg.data.remote import fetch

        folder = home() / "remote" / hashlib.sha256(name.rstrip("/").encode()).hexdigest()[:16]
        fetch(name, folder)
        return folder
    if not name:
        raise UsageError("--data is empty: give `camvid`, `synth`, a path or a URL")
    return user_path(name)


def draw_once(name: str, **how: Any) -> Path:
    """The folder NAME-VERSION in `home()`, of scenes that are drawn on first use.

    Args:
        how: as `fastseg.data.synth.write` takes it.
    """
    from fastseg.data.synth import VERSION, write

    folder = home() / f"{name}-{VERSION}"
    if not folder.exists():
        folder.parent.mkdir(parents=True, exist_ok=True)
        try:
            write(folder, **how)
        except FastsegError:
            if not folder.exists():  # else another process of the run was faster: the scenes are the same
                raise
    return folder
