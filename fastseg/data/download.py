"""Fetch CamVid as the published baseline does: two zip files of the University of Cambridge's data set.

While OUT is being made, `.OUT.partial` beside it holds what came so far: `FOLDER.zip.part` and `FOLDER.zip.json`, which
tells how to go on with it, and each archive's folder once it is unpacked whole. `.OUT.lock` keeps a second one out.
"""

import contextlib
import hashlib
import http.client
import json
import os
import re
import shutil
import socket
import ssl
import stat
import sys
import time
import urllib.error
import urllib.parse
import urllib.request
import zipfile
import zlib
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path, PurePosixPath
from typing import TYPE_CHECKING, TypeVar

from fastseg.errors import FastsegError, UsageError
from fastseg.runs import write_json

if TYPE_CHECKING:
    from rich.progress import Progress

T = TypeVar("T")

BASE = "http://web4.cs.ucl.ac.uk/staff/g.brostow/MotionSegRecData"
FILES = {"701_StillsRaw_full": "files/701_StillsRaw_full.zip", "LabeledApproved_full": "data/LabeledApproved_full.zip"}
LICENCE = "CamVid is for research use: see the data set's page before you use it for anything else."

# Archive's folder -> SHA-256 of its zip. None is known: the data set's page gives none, and mirrors pack their own.
CHECKSUMS: dict[str, str] = {}

TIMEOUT = 60.0  # seconds without a byte
BACKOFFS = (0.5, 2.0, 4.0)  # seconds before each further try

# What an archive may unpack to. CamVid's are 701 PNG files of 960x720 pixels, which are 2.1 MB each uncompressed and
# 560 MB together; there is room for larger scans, and none for a bomb that fills the disk.
MAX_MEMBER = 32 << 20
MAX_TOTAL = 4 << 30
MAX_COUNT = 10_000


def download_camvid(out: Path, base: str = BASE, checksums: Mapping[str, str] = CHECKSUMS) -> None:
    """Make `out` hold CamVid's 701 images and labels (about 600 MB): fetch and unpack what is not there yet.

    Args:
        base: URL of a server with the two zips, at the paths of FILES; or a local folder that has them.
        checksums: archive's folder -> SHA-256 of its zip, in hexadecimal; others are not compared.

    Raises:
        UsageError: `out` is something else, or `base` cannot be a source. FastsegError: no network, or a file that is
        no zip of PNG files; nothing is left then but what a further call goes on with.
    """
    if base.startswith("file://"):
        base = urllib.request.url2pathname(urllib.parse.urlsplit(base).path)
    _check_source(base)
    _missing(out)  # refuses what is no CamVid before anything is written
    place = Path(os.path.abspath(out))
    partial = place.with_name(f".{place.name}.partial")
    with locked(place.with_name(f".{place.name}.lock")):
        missing = _missing(out)
        if not missing:
            print(f"{out} is there already, nothing to download", file=sys.stderr)
            return
        print(LICENCE, file=sys.stderr)
        partial.mkdir(exist_ok=True)
        try:
            for folder in missing:
                if not (partial / folder).exists():
                    _archive(partial, folder, base, checksums.get(folder))
            if out.exists():
                for folder in missing:
                    (partial / folder).rename(out / folder)
            else:
                partial.rename(out)
        except (OSError, http.client.HTTPException) as error:  # URLError is an OSError
            kept = "; what came is kept, try again to go on" if any(partial.glob("*.part")) else ""
            raise FastsegError(
                f"CamVid could not be downloaded from {base} ({_reason(error)}{kept}): use --data synth, "
                "or --data PATH of your own copy"
            ) from None
        finally:
            if partial.exists() and not any(partial.iterdir()):
                partial.rmdir()


def _check_source(base: str) -> None:
    scheme, separator, _ = base.partition("://")
    if separator and scheme.lower() not in ("http", "https"):
        raise UsageError(f"--source {base}: give an http or https URL, or a folder that holds the two zip files")
    if not separator and not Path(base).is_dir():
        raise UsageError(f"--source {base}: no folder; give a URL, or a folder that holds the two zip files")


def _missing(out: Path) -> list[str]:
    """The archives' folders that `out` lacks. They appear whole, so one that is there is complete."""
    missing = [folder for folder in FILES if not (out / folder).is_dir()]
    if out.exists() and missing == list(FILES):
        raise UsageError(f"{out} exists: remove it, or train with --data {out}")
    return missing


def _reason(error: Exception) -> str:
    text = str(getattr(error, "reason", error)) or type(error).__name__
    return text.strip().partition("\n")[0]


# What data sets from elsewhere have in common: remote.py uses it too.


@contextlib.contextmanager
def locked(path: Path) -> Iterator[bool]:
    """Hold the lock file `path`, so that two processes do not write the same data; yields whether it had to wait.

    The system lets go of the lock of a process that dies. The file goes away with the lock.
    """
    import fcntl  # not on Windows

    path.parent.mkdir(parents=True, exist_ok=True)
    waited = False
    while True:
        file = os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o666)
        try:
            try:
                fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                if not waited:
                    print(f"waiting for another process that fetches the same data ({path})", file=sys.stderr)
                waited = True
                fcntl.flock(file, fcntl.LOCK_EX)
            if not _is_at(file, path):
                continue  # its last holder has removed it, and somebody may hold a new one
            try:
                yield waited
            finally:
                path.unlink(missing_ok=True)
            return
        finally:
            os.close(file)


def _is_at(file: int, path: Path) -> bool:
    try:
        return os.path.samestat(os.fstat(file), path.stat())
    except FileNotFoundError:
        return False


def again(
    work: Callable[[], T], transient: Callable[[BaseException], bool], gained: Callable[[], int] = lambda: 0
) -> T:
    """`work()`, and again after each of BACKOFFS while it fails with what may pass.

    Where `gained()` (bytes) has grown beyond what it ever was, the back-offs start anew: a bad line takes its time.
    """
    most, waits = gained(), iter(BACKOFFS)
    while True:
        try:
            return work()
        except Exception as error:
            if not transient(error):
                raise
            if gained() > most:
                most, waits = gained(), iter(BACKOFFS)
            wait = next(waits, None)
            if wait is None:
                raise
            time.sleep(wait)


def transfer_bar() -> "Progress":
    """Bytes, rate and time left on standard error; nothing where that is no terminal."""
    from rich.console import Console
    from rich.progress import BarColumn, DownloadColumn, Progress, TextColumn, TimeRemainingColumn, TransferSpeedColumn

    console = Console(stderr=True)
    columns = (TextColumn("{task.description}", markup=False), BarColumn(), DownloadColumn(), TransferSpeedColumn())
    return Progress(*columns, TimeRemainingColumn(), console=console, transient=True, disable=not console.is_terminal)


# One archive


def _archive(partial: Path, folder: str, base: str, checksum: str | None) -> None:
    """Bring one archive's folder into `partial`, whole. Its zip goes away once it is unpacked, or turns out wrong."""
    if "://" not in base:
        archive = next((p for p in (Path(base) / FILES[folder], Path(base) / f"{folder}.zip") if p.is_file()), None)
        if archive is None:
            raise UsageError(f"--source {base}: no {FILES[folder]} and no {folder}.zip there")
        _check_sum(archive, str(archive), checksum)
        _unpack(archive, str(archive), partial / folder)
        return
    url = f"{base.rstrip('/')}/{FILES[folder]}"
    part, state = partial / f"{folder}.zip.part", partial / f"{folder}.zip.json"
    try:
        _fetch(url, part, state)
        _check_sum(part, url, checksum)
        _unpack(part, url, partial / folder)
    except _WrongArchiveError:
        part.unlink()
        state.unlink(missing_ok=True)
        raise
    except (OSError, http.client.HTTPException):
        if not _resumable(url, part, state):
            part.unlink(missing_ok=True)
            state.unlink(missing_ok=True)
        raise
    part.unlink()
    state.unlink(missing_ok=True)


class _WrongArchiveError(OSError):
    """All of the archive came, and it cannot be used."""


class _CutError(OSError):
    """The connection ended before the file did."""


def _fetch(url: str, part: Path, state: Path) -> None:
    """Download into `part`, going on where an earlier try stopped."""
    print(f"downloading {url}", file=sys.stderr)
    with transfer_bar() as bar:
        task = bar.add_task(url.rpartition("/")[2], total=None)

        def show(length: int | None) -> None:
            bar.update(task, completed=_size(part), total=length)

        again(lambda: _try(url, part, state, show), _transient, lambda: _size(part))


def _size(path: Path) -> int:
    return path.stat().st_size if path.exists() else 0


def _resumable(url: str, part: Path, state: Path) -> dict:
    """What is known of the file that `part` is the beginning of; empty where one cannot go on with it."""
    try:
        known = json.loads(state.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return {}
    if not isinstance(known, dict) or known.get("url") != url or not known.get("validator"):
        return {}
    return known if 0 < _size(part) <= (known.get("length") or sys.maxsize) else {}


def _try(url: str, part: Path, state: Path, show: Callable[[int | None], None]) -> None:
    known = _resumable(url, part, state)
    have = _size(part) if known else 0
    if have and have == known["length"]:
        return  # stopped between download and unpacking
    headers = {"Range": f"bytes={have}-", "If-Range": known["validator"]} if have else {}
    try:
        answer = urllib.request.urlopen(urllib.request.Request(url, headers=headers), timeout=TIMEOUT)
    except urllib.error.HTTPError as error:
        error.close()
        if error.code != http.client.REQUESTED_RANGE_NOT_SATISFIABLE or not have:
            raise
        part.unlink()  # longer than the file is now
        raise _CutError(f"{url} is not what it was") from None
    with answer:
        if answer.headers.get_content_type() == "text/html":
            raise OSError(f"{url} answers with a web page, no zip file")  # before it takes the place of what came
        length = answer.length
        if answer.status == http.client.PARTIAL_CONTENT:
            first, length = _range(answer.headers.get("Content-Range", ""))
            if first != have or known["length"] not in (None, length):
                part.unlink()
                raise _CutError(f"{url} sends another part than was asked for")
        else:
            have = 0
            part.unlink(missing_ok=True)  # first, so that the new description never stands beside the old bytes
            known = {"url": url, "validator": _validator(answer.headers), "length": length}
            write_json(state, known)
        with part.open("ab") as file:
            show(length)
            while block := answer.read(1 << 16):
                file.write(block)
                file.flush()
                show(length)
    if length is not None and _size(part) != length:
        message = f"{url}: {_size(part)} of {length} bytes came"
        if _size(part) > length:
            part.unlink()
        raise _CutError(message)


def _validator(headers: http.client.HTTPMessage) -> str | None:
    """What tells a server that the file is still the same: a strong ETag, or else its date."""
    tag = headers.get("ETag", "")
    return tag if tag and not tag.startswith("W/") else headers.get("Last-Modified")


def _range(header: str) -> tuple[int | None, int | None]:
    """First byte and length of the whole file in `bytes 100-199/200`."""
    match = re.fullmatch(r"bytes (\d+)-\d+/(\d+|\*)", header.strip())
    if match is None:
        return None, None
    return int(match[1]), None if match[2] == "*" else int(match[2])


def _transient(error: BaseException) -> bool:
    """Whether the same request may well succeed a moment later."""
    if isinstance(error, urllib.error.HTTPError):
        return error.code >= 500 or error.code in (http.client.REQUEST_TIMEOUT, http.client.TOO_MANY_REQUESTS)
    if isinstance(error, urllib.error.URLError) and isinstance(error.reason, Exception):
        error = error.reason
    if isinstance(error, socket.gaierror):
        return error.errno == socket.EAI_AGAIN
    passing = (_CutError, TimeoutError, ConnectionError, ssl.SSLEOFError, http.client.IncompleteRead)
    return isinstance(error, passing)


def _check_sum(archive: Path, name: str, expected: str | None) -> None:
    if expected is None:
        return
    with archive.open("rb") as file:
        found = hashlib.file_digest(file, "sha256").hexdigest()
    if found != expected.lower():
        raise _WrongArchiveError(f"{name} has SHA-256 {found}, not {expected.lower()}")


def _unpack(archive: Path, name: str, folder: Path) -> None:
    """Make the new folder with the zip's PNG files, whole or not at all.

    They lie in it by base name: one of CamVid's two zips has a folder inside, the other has none.
    """
    fresh = folder.with_name(f".{folder.name}.unpacking")
    shutil.rmtree(fresh, ignore_errors=True)  # of a process that was killed
    try:
        with zipfile.ZipFile(archive) as zipped:
            members = _members(zipped, name)
            fresh.mkdir()
            for base_name, member in members.items():
                with zipped.open(member) as source, (fresh / base_name).open("wb") as target:
                    shutil.copyfileobj(source, target, 1 << 20)
        fresh.rename(folder)
    # NotImplementedError: a later version of the format; ValueError: names that are not in their own encoding.
    except (zipfile.BadZipFile, zlib.error, EOFError, NotImplementedError, ValueError) as error:
        raise _WrongArchiveError(f"{name} is no zip file, or not all of one: {_reason(error)}") from None
    finally:
        shutil.rmtree(fresh, ignore_errors=True)


def _members(zipped: zipfile.ZipFile, name: str) -> dict[str, zipfile.ZipInfo]:
    """Base name -> member of the PNG files; all else is left out, or refused where somebody must have meant harm.

    The sizes that a zip claims can be trusted as limits: zipfile reads no more of a member than that.
    """
    found: dict[str, zipfile.ZipInfo] = {}
    seen: set[str] = set()
    infos = zipped.infolist()

    def refuse(why: str) -> _WrongArchiveError:
        return _WrongArchiveError(f"{name} is refused: {why}")

    if len(infos) > MAX_COUNT:
        raise refuse(f"it has {len(infos)} members, more than {MAX_COUNT}")
    for info in infos:
        path = PurePosixPath(info.filename.replace("\\", "/"))
        if path.is_absolute() or re.match("[A-Za-z]:", info.filename) or ".." in path.parts:
            raise refuse(f"its member {info.filename!r} points out of the folder")
        kind = stat.S_IFMT(info.external_attr >> 16)
        if kind not in (0, stat.S_IFREG, stat.S_IFDIR):
            raise refuse(f"its member {info.filename!r} is a link or a device")
        # ._NAME is what a Mac adds to a zip for each file. The suffix first: of an empty name, is_dir() would fail.
        if path.suffix.lower() != ".png" or info.is_dir() or path.name.startswith("._"):
            continue
        if kind == stat.S_IFDIR:
            raise refuse(f"its member {info.filename!r} is a folder with the name of a file")
        if info.flag_bits & 1 or info.compress_type not in (zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED):
            raise refuse(f"its member {info.filename!r} is encrypted, or compressed in an unusual way")
        if info.file_size > MAX_MEMBER:
            raise refuse(f"its member {info.filename!r} unpacks to {info.file_size} bytes, more than {MAX_MEMBER}")
        if path.name.lower() in seen:  # lower: not every disk tells them apart
            raise refuse(f"it has {path.name!r} twice")
        seen.add(path.name.lower())
        found[path.name] = info
    if not found:
        raise refuse("it holds no PNG files")
    total = sum(info.file_size for info in found.values())
    if total > MAX_TOTAL:
        raise refuse(f"it unpacks to {total} bytes, more than {MAX_TOTAL}")
    return found
