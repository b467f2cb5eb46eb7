"""Data sets elsewhere (`s3://`, `gs://`, `https://`, whatever fsspec can list): a copy that is kept up to date.

Beside the copy FOLDER lie `.FOLDER.json`, which tells what is in it, and while it changes `.FOLDER.new`, where files
come to lie under a digest of their name, size and fingerprint. They move into FOLDER only when all of them are there:
until then an older copy stays whole, and a fetch that was stopped goes on with the files that it lacks.
"""

import hashlib
import http.client
import json
import re
import shutil
import socket
import sys
import threading
import urllib.parse
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor, as_completed
from dataclasses import dataclass, field
from pathlib import Path, PurePosixPath
from typing import Any

from fastseg.data.download import again, locked, transfer_bar
from fastseg.environment import install
from fastseg.errors import FastsegError, UsageError, first_line
from fastseg.runs import write_json

THREADS = 8  # files under way; more of them help only where files are tiny
TIMEOUT = 30.0  # seconds without a byte

# What tells that a file has changed, the best first. A file system that has none of these tells it by sizes alone.
FINGERPRINTS = ["ETag", "etag", "md5Hash", "Content-MD5", "mtime", "LastModified", "last_modified", "Last-Modified"]
FINGERPRINTS += ["updated", "modified", "created"]

# Errors of botocore, aiohttp and fsspec that may pass, by name: none of these packages has to be installed.
PASSING = {"HTTPClientError", "ResponseParserError", "ResponseStreamingError", "IncompleteReadError"}
PASSING |= {"FlexibleChecksumError", "ConnectionError", "ClientConnectionError", "ClientPayloadError", "FSTimeoutError"}
REFUSED = {"PermissionError", "NoCredentialsError", "PartialCredentialsError", "CredentialRetrievalError"}


@dataclass(frozen=True)
class _File:
    """A remote file; `name` is its path below the URL, `path` what the file system calls it."""

    name: str
    path: str
    size: int
    fingerprint: str

    @property
    def entry(self) -> list:
        """What the manifest keeps of it."""
        return [self.size, self.fingerprint]

    @property
    def digest(self) -> str:
        """The name under which it waits until all are there."""
        return _digest(self.name, self.entry)


def _digest(name: str, entry: list) -> str:
    return hashlib.sha256(json.dumps([name, *entry]).encode()).hexdigest()[:40]


class _DamagedError(Exception):
    """A file came, but not as the listing has it."""


class _StoppedError(Exception):
    """Another file failed: do not go on with this one."""


def fetch(url: str, folder: Path) -> None:
    """Make `folder` a copy of all files below `url`: what is new or changed is fetched, what is gone is removed.

    Without a network a whole copy stays as it is, and a line on standard error says so.

    Raises:
        UsageError: a URL that fsspec does not know, or `folder` holds something else. FastsegError: a package is not
        installed, the URL cannot be listed, or a file of it cannot be fetched; what came is kept for the next call.
    """
    url = re.sub("(?<![:/])/+$", "", url)
    shown = re.sub("//[^/@]*@", "//", url)  # no password in a message or a file
    mirror = _Mirror(shown, folder)
    with locked(folder.with_name(f".{folder.name}.lock")) as waited:
        mirror.recover()
        if waited and mirror.whole():
            return  # as another process of this run has just left it
        try:
            source = _Source(url, shown)
            files = source.files()
        except _UnreachableError as error:
            if not mirror.whole():
                raise FastsegError(f"{error}; check the network, or give --data PATH of a copy") from None
            print(f"fastseg: {error}; going on with the copy in {folder}", file=sys.stderr)
            return
        mirror.update(files, source)


class _UnreachableError(Exception):
    """The listing failed as it does without a network."""


# The file system at the other end


class _Source:
    """A URL's file system, and how it fails."""

    def __init__(self, url: str, shown: str) -> None:
        self.shown, self.protocol = shown, url.partition("://")[0].lower()
        if urllib.parse.urlsplit(url).query or "::" in url:
            raise UsageError(f"--data {shown}: give the URL of a folder, without `?` and `::`")
        try:
            from fsspec.core import url_to_fs  # type: ignore[import-untyped]

            # An instance of its own: one that fsspec keeps would remember old listings and endpoints.
            self.fs, root = url_to_fs(url, skip_instance_cache=True, **self._options())
        except ImportError as error:
            ours = self.protocol in ("s3", "s3a", "http", "https") or (error.name or "").partition(".")[0] == "fsspec"
            cure = install("remote") if ours else "install it with pip"
            raise FastsegError(f"--data {shown}: a package is missing ({first_line(error)}): {cure}") from None
        except ValueError as error:
            raise UsageError(f"--data {shown}: {first_line(error)}") from None
        except Exception as error:  # some file systems ask for credentials at once
            raise self._unlisted(error) from None
        self.root = self.fs._strip_protocol(root).rstrip("/")
        if hasattr(self.fs, "retries"):
            self.fs.retries = 1  # s3fs: the tries are ours

    def _options(self) -> dict[str, Any]:
        """Time limits, and no tries but our own, where we know how to ask; fsspec's configuration overrides."""
        from fsspec.config import conf  # type: ignore[import-untyped]

        options: dict[str, Any] = {}
        if self.protocol in ("s3", "s3a"):
            config = {"connect_timeout": TIMEOUT, "read_timeout": TIMEOUT, "max_pool_connections": 2 * THREADS}
            # One connection a file; s3fs would open ten for a large one.
            options = {"config_kwargs": config | {"retries": {"total_max_attempts": 1}}, "max_concurrency": 1}
        elif self.protocol in ("http", "https"):
            import aiohttp

            limits = aiohttp.ClientTimeout(total=None, sock_connect=TIMEOUT, sock_read=TIMEOUT)
            options = {"client_kwargs": {"timeout": limits}}
        given = conf.get(self.protocol, {})
        for key, value in options.items():
            if key in given:
                both = isinstance(value, dict) and isinstance(given[key], dict)
                options[key] = value | given[key] if both else given[key]
        return options

    def failed(self, name: str, error: BaseException) -> FastsegError:
        """One line for an error while the listing (no `name`) or a file was fetched."""
        what = f"{self.shown}/{name}" if name else self.shown
        reason = first_line(error) if isinstance(error, Exception) else type(error).__name__
        kinds = {kind.__name__ for link in _chain(error) for kind in type(link).__mro__}
        if kinds & REFUSED:
            cure = "check the credentials"
            if self.protocol in ("s3", "s3a"):
                cure += " (AWS_PROFILE or AWS_ACCESS_KEY_ID; FSSPEC_S3_ANON=true for a public bucket)"
            return FastsegError(f"{what} is refused ({reason}): {cure}")
        if isinstance(error, FileNotFoundError):
            return FastsegError(f"{what} does not exist ({reason}): check --data, or try again if it has just changed")
        if not name:
            return FastsegError(f"{what} cannot be listed ({reason}): check --data")
        return FastsegError(f"{what} cannot be fetched ({reason}): what came is kept, try again to go on")

    def files(self) -> list[_File]:
        """All files below the URL.

        Raises:
            _UnreachableError: as without a network. FastsegError: anything else, and where there is nothing.
        """
        try:
            found = again(self._find, _transient)
            return self._checked(found)
        except FastsegError:
            raise
        except Exception as error:
            raise self._unlisted(error) from None

    def _unlisted(self, error: Exception) -> Exception:
        if _transient(error):
            return _UnreachableError(f"{self.shown} cannot be reached ({first_line(error)})")
        return self.failed("", error)

    def _find(self) -> dict[str, dict]:
        from fsspec.asyn import AsyncFileSystem  # type: ignore[import-untyped]
        from fsspec.spec import AbstractFileSystem  # type: ignore[import-untyped]

        kind = type(self.fs)
        if isinstance(self.fs, AsyncFileSystem):
            walks = kind._find is AsyncFileSystem._find
        else:
            walks = kind.find is AbstractFileSystem.find
        # fsspec's own walk leaves out folders that it cannot list: their files would count as gone.
        return self._walk() if walks else self.fs.find(self.root, detail=True)

    def _walk(self) -> dict[str, dict]:
        found, folders, seen = {}, [self.root], {self.root}
        while folders:
            for info in self.fs.ls(folders.pop(), detail=True):
                path = info["name"].rstrip("/")
                if info["type"] != "directory":
                    found[info["name"]] = info
                elif path not in seen:  # some list a folder in itself
                    seen.add(path)
                    folders.append(info["name"])
        return found

    def _checked(self, found: dict[str, dict]) -> list[_File]:
        web = self.protocol in ("http", "https")
        listed = {path: info for path, info in found.items() if not path.endswith("/")}  # folders that are objects
        if web:
            # A page's links to itself in another order are no files.
            listed = {path: info for path, info in listed.items() if "?" not in path and "#" not in path}
        if self.root in listed:
            raise UsageError(f"--data {self.shown} is a file: give the URL of the folder that holds the data set")
        if not listed:
            hint = " (http needs a page that links to them: an index)" if web else ""
            raise FastsegError(f"--data {self.shown}: no files there{hint}")
        names = {path: self._name(path, web) for path in listed}
        # Symbolic links have another type, and http no sizes: ask for those files one by one.
        unclear = [p for p, info in listed.items() if info.get("type") != "file" or info.get("size") is None]
        with ThreadPoolExecutor(THREADS) as pool:
            listed |= zip(unclear, pool.map(lambda p: again(lambda: self.fs.info(p), _transient), unclear), strict=True)
        files = []
        for path, info in sorted(listed.items()):
            if info.get("type") != "file" or info.get("size") is None:
                raise FastsegError(f"--data {self.shown}: {names[path]} is no plain file of known size")
            prints = [str(info[key]) for key in FINGERPRINTS if info.get(key) is not None]
            files.append(_File(names[path], path, int(info["size"]), prints[0] if prints else ""))
        folders = {str(above) for file in files for above in PurePosixPath(file.name).parents}
        taken = folders | {file.name for file in files}
        if len(taken) != len(folders) + len(files):  # S3 does not mind
            raise FastsegError(f"--data {self.shown}: a file there has the name of another one, or of a folder")
        return files

    def _name(self, path: str, web: bool) -> str:
        """The path below the URL, which must not lead out of the copy."""
        name = path.removeprefix(self.root + "/")
        if web:
            name = urllib.parse.unquote(name)
        parts = name.split("/")
        if name == path or {"", ".", ".."} & set(parts) or "\\" in name or "\0" in name:
            raise FastsegError(f"--data {self.shown}: the file {name!r} there has no name that a folder can hold")
        return name

    def get(self, file: _File, part: Path, count: Callable[[int], None]) -> None:
        """Download one file, whole and right, into `part`; `count` is told of bytes as they come."""
        from fsspec.callbacks import Callback  # type: ignore[import-untyped]

        class Counter(Callback):
            done = 0

            def relative_update(self, inc: int = 1) -> None:
                self.done += inc
                count(inc)

        def work() -> None:
            counter = Counter()
            try:
                self.fs.get_file(file.path, str(part), callback=counter)
                size = part.stat().st_size
                if size != file.size:
                    raise _DamagedError(f"{size} of {file.size} bytes came")
                self._compare(file, part)
            except BaseException:
                count(-counter.done)  # they come again
                raise
            count(file.size - counter.done)  # some file systems do not count

        again(work, _transient)

    def _compare(self, file: _File, part: Path) -> None:
        """Compare with the ETag, which S3 makes an MD5 of files that came there in one piece and are not encrypted."""
        tag = file.fingerprint.strip('"')
        if self.protocol not in ("s3", "s3a") or not re.fullmatch("[0-9a-f]{32}", tag):
            return
        with part.open("rb") as content:
            found = hashlib.file_digest(content, lambda: hashlib.md5(usedforsecurity=False)).hexdigest()
        if found == tag:
            return
        bucket, _, key = file.path.partition("/")
        head = self.fs.call_s3("head_object", Bucket=bucket, Key=key)
        if "SSECustomerAlgorithm" in head or str(head.get("ServerSideEncryption", "")).startswith("aws:kms"):
            return
        raise _DamagedError(f"its MD5 is {found}, not {tag}")


def _chain(error: BaseException | None) -> Iterator[BaseException]:
    while error is not None:
        yield error
        error = error.__cause__


def _transient(error: BaseException) -> bool:
    """Whether the same request may well succeed a moment later."""
    for link in _chain(error):
        status = getattr(link, "status", None)  # aiohttp's
        response = getattr(link, "response", None)  # botocore's
        if isinstance(response, dict):
            status = response.get("ResponseMetadata", {}).get("HTTPStatusCode")
        if isinstance(status, int):
            return status >= 500 or status in (http.client.REQUEST_TIMEOUT, http.client.TOO_MANY_REQUESTS)
        if isinstance(link, (_DamagedError, TimeoutError, ConnectionError, http.client.HTTPException, socket.gaierror)):
            return True
        if PASSING & {kind.__name__ for kind in type(link).__mro__}:
            return True
    return False


# The copy here


@dataclass
class _Mirror:
    """The copy of one URL, and the notes beside it. Its caller holds the lock."""

    shown: str
    folder: Path
    known: dict[str, list] = field(default_factory=dict)  # name -> [size, fingerprint] of what `folder` holds

    def __post_init__(self) -> None:
        self.manifest = self.folder.with_name(f".{self.folder.name}.json")
        self.new = self.folder.with_name(f".{self.folder.name}.new")

    def recover(self) -> None:
        """Read the manifest, and finish what a process was doing when it was killed."""
        try:
            notes = json.loads(self.manifest.read_text(encoding="utf-8"))
        except FileNotFoundError:
            notes = {"url": self.shown, "files": {}}
            if self.folder.exists():
                raise UsageError(f"{self.folder} exists but is no copy of {self.shown}: remove it") from None
        except ValueError:
            notes = {}
        if not isinstance(notes, dict) or notes.get("url") != self.shown or not isinstance(notes.get("files"), dict):
            raise UsageError(f"{self.manifest} does not describe a copy of {self.shown}: remove it and {self.folder}")
        self.known = notes["files"]
        if "gone" in notes:
            self._move(notes["gone"])

    def _holds(self, name: str, entry: list) -> bool:
        path = self.folder / name
        return self.known.get(name) == entry and path.is_file() and path.stat().st_size == entry[0]

    def whole(self) -> bool:
        """Whether the copy is as it was when it was made."""
        return bool(self.known) and all(self._holds(name, entry) for name, entry in self.known.items())

    def update(self, files: list[_File], source: _Source) -> None:
        """Bring the copy to what was listed."""
        wanted = [file for file in files if not self._holds(file.name, file.entry)]
        gone = sorted(self.known.keys() - {file.name for file in files})
        if not wanted and not gone:
            shutil.rmtree(self.new, ignore_errors=True)
            return
        self._stage(wanted, source)
        self.known = {file.name: file.entry for file in files}
        # From here on a process that is killed has its work finished by the next one, network or not.
        write_json(self.manifest, {"url": self.shown, "files": self.known, "gone": gone})
        self._move(gone)

    def _stage(self, wanted: list[_File], source: _Source) -> None:
        """Fetch the files that do not wait in `new` already."""
        self.new.mkdir(parents=True, exist_ok=True)
        digests = {file.digest for file in wanted}
        for path in self.new.iterdir():
            if path.name not in digests:
                path.unlink()  # half a file, or one that has changed since
        missing = [file for file in wanted if not (self.new / file.digest).exists()]
        size, free = sum(file.size for file in missing), shutil.disk_usage(self.new).free
        if size > free:
            raise FastsegError(f"{self.shown} has {size} bytes to fetch, and {self.new.parent} room for {free}")
        stop = threading.Event()
        with transfer_bar() as bar, ThreadPoolExecutor(THREADS) as pool:
            task = bar.add_task(self.shown, total=size)

            def count(bytes_: int) -> None:
                if stop.is_set() and bytes_ >= 0:
                    raise _StoppedError
                bar.advance(task, bytes_)

            def get(file: _File) -> None:
                part = self.new / f"{file.digest}.part"
                try:
                    source.get(file, part, count)
                    part.replace(self.new / file.digest)
                finally:
                    part.unlink(missing_ok=True)

            jobs = {pool.submit(get, file): file for file in missing}
            try:
                for job in as_completed(jobs):
                    error = job.exception()
                    if error is not None:
                        raise source.failed(jobs[job].name, error) from None
            finally:
                stop.set()
                pool.shutdown(cancel_futures=True)

    def _move(self, gone: list[str]) -> None:
        """Remove what is gone, and put the waiting files in their places. Done twice, it does the same."""
        for name in gone:
            path = self.folder / name
            path.unlink(missing_ok=True)
            for above in path.relative_to(self.folder).parents[:-1]:
                if not (self.folder / above).is_dir() or any((self.folder / above).iterdir()):
                    break
                (self.folder / above).rmdir()
        for name, entry in self.known.items():
            waiting = self.new / _digest(name, entry)
            if waiting.exists():
                (self.folder / name).parent.mkdir(parents=True, exist_ok=True)
                waiting.replace(self.folder / name)
        write_json(self.manifest, {"url": self.shown, "files": self.known})
        shutil.rmtree(self.new, ignore_errors=True)
