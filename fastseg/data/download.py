"""Fetch CamVid as the published baseline does: two zip files of the University of Cambridge's data set."""

import http.client
import os
import shutil
import sys
import urllib.request
import zipfile
import zlib
from pathlib import Path

from fastseg.errors import FastsegError, UsageError

BASE = "http://web4.cs.ucl.ac.uk/staff/g.brostow/MotionSegRecData"
FILES = {"701_StillsRaw_full": "files/701_StillsRaw_full.zip", "LabeledApproved_full": "data/LabeledApproved_full.zip"}
LICENCE = "CamVid is for research use: see the data set's page before you use it for anything else."


def download_camvid(out: Path, base: str = BASE) -> None:
    """Fetch and unpack CamVid's 701 images and labels into `out` (about 600 MB), whole or not at all.

    Raises:
        UsageError: `out` exists. FastsegError: no network, or a file that is no zip.
    """
    if out.exists():
        raise UsageError(f"{out} exists: remove it, or train with --data {out}")
    partial = out.parent / f".{out.name}.partial-{os.getpid()}"
    print(LICENCE, file=sys.stderr)
    try:
        for folder, path in FILES.items():
            (partial / folder).mkdir(parents=True)
            archive = partial / "download.zip"
            _fetch(f"{base}/{path}", archive)
            _unpack(archive, partial / folder)
            archive.unlink()
        partial.rename(out)
    except (OSError, http.client.HTTPException) as error:  # URLError is an OSError
        reason = str(getattr(error, "reason", error)).strip().partition("\n")[0]
        raise FastsegError(
            f"CamVid could not be downloaded from {base} ({reason}): use --data synth, or --data PATH of your own copy"
        ) from None
    finally:
        shutil.rmtree(partial, ignore_errors=True)


def _fetch(url: str, target: Path) -> None:
    print(f"downloading {url}", file=sys.stderr)
    with urllib.request.urlopen(url, timeout=60) as answer, target.open("wb") as file:
        shutil.copyfileobj(answer, file, 1 << 20)
        length = answer.headers.get("Content-Length")
    if length and int(length) != target.stat().st_size:
        raise OSError(f"{url}: {target.stat().st_size} of {length} bytes came")


def _unpack(archive: Path, folder: Path) -> None:
    """The zip's PNG files, by name: one of CamVid's two zips has a folder inside, the other has none."""
    try:
        with zipfile.ZipFile(archive) as zipped:
            for member in zipped.infolist():
                name = Path(member.filename).name
                if name.lower().endswith(".png"):
                    with zipped.open(member) as source, (folder / name).open("wb") as target:
                        shutil.copyfileobj(source, target)
    except (zipfile.BadZipFile, zlib.error):
        raise OSError(f"{archive.name} for {folder.name} is no zip file, or not all of one") from None
