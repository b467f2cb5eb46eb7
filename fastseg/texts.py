"""Text that users write: small files, read whole as UTF-8 or refused in one line, and names that fit into that line."""

import os
import re
import reprlib
import shlex
import stat
import tomllib
from pathlib import Path
from typing import Any

from fastseg.errors import FastsegError, UsageError

MAX_TEXT = 16 << 20  # bytes: lists of a few 100,000 names
MAX_TOML = 1 << 20
MAX_DOTS = 100  # in a line of TOML

_SHORT = reprlib.Repr()
_SHORT.maxstring = _SHORT.maxother = 80


def is_plain(name: str) -> bool:
    """Whether a name can stand in a line of UTF-8: no line break or other control character, no undecodable byte."""
    return re.search("[\x00-\x1f\x7f-\x9f\u2028\u2029\ud800-\udfff]", name) is None


def shown(name: object) -> str:
    """A name or path for a message: as it is where it is plain, else quoted with escapes."""
    text = str(name)
    return text if is_plain(text) else repr(text)


def user_path(path: str | os.PathLike) -> Path:
    """A path as users write it: ~ is the home folder, in Python too, where no shell has put that in its place."""
    return Path(os.path.expanduser(path))


def pasted(path: str | os.PathLike) -> str:
    """A path as a shell takes it, for a command that is printed: quoted where it must be, and never an option."""
    text = str(path)
    return shlex.quote(f"./{text}" if text.startswith("-") else text)


def brief(value: object) -> str:
    """`repr` for a message: on one line, shortened where it is long or deep."""
    try:
        return _SHORT.repr(value).replace("\n", " ")
    except ValueError:  # Python writes no whole number of more than 4300 digits
        return "a number of thousands of digits"


def read_text(path: Path, kind: type[FastsegError] = FastsegError, limit: int = MAX_TEXT) -> str:
    """The text of a UTF-8 file of at most `limit` bytes, without its byte order mark.

    Raises:
        FastsegError: (or its `kind`) no such file, too large, or other bytes than UTF-8, by name.
    """
    try:
        found = path.stat()
        if not stat.S_ISREG(found.st_mode):  # before it is opened: a pipe would be waited for
            what = "a folder" if stat.S_ISDIR(found.st_mode) else "a pipe or a device"
            raise kind(f"{shown(path)}: cannot be read: it is {what}, no file")
        if found.st_size > limit:
            raise kind(f"{shown(path)}: has {found.st_size} bytes, a text file here has at most {limit}")
        return path.read_text(encoding="utf-8-sig")
    except UnicodeDecodeError as error:
        raise kind(f"{shown(path)}: not UTF-8 text (byte {error.start}); save it as UTF-8") from None
    except OSError as error:
        raise kind(f"{shown(path)}: cannot be read: {error.strerror}") from None


def parse_toml(text: str) -> dict[str, Any]:
    """A TOML document.

    Raises:
        ValueError: not TOML, nested too deep, or with a whole number of more than 64 bits, which is TOML's limit.
    """
    # tomllib keeps every beginning of a key a.b.c: its memory grows with the square of their number.
    if any(line.count(".") > MAX_DOTS for line in text.splitlines() if not line.lstrip().startswith("#")):
        raise ValueError(f"a line with more than {MAX_DOTS} dots")
    try:
        tree = tomllib.loads(text)
    except tomllib.TOMLDecodeError:
        raise
    except (RecursionError, ValueError):  # ValueError: Python reads no whole number of more than 4300 digits
        raise ValueError("brackets nested too deep, or a number too long") from None
    left: list[Any] = [tree]
    while left:
        value = left.pop()
        if isinstance(value, dict | list):
            left += value.values() if isinstance(value, dict) else value
        elif isinstance(value, int) and not -(2**63) <= value < 2**63:
            raise ValueError("a whole number of more than 64 bits")
    return tree


def read_toml(path: Path) -> dict[str, Any]:
    """The TOML document in a file.

    Raises:
        UsageError: no such file, or `parse_toml` refuses it; by name.
    """
    try:
        return parse_toml(read_text(path, UsageError, MAX_TOML))
    except ValueError as error:
        raise UsageError(f"{shown(path)}: not valid TOML: {error}") from None
