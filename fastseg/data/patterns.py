"""Patterns of paths, which say where images and labels lie and which belong together.

`images/**/{city}/*_leftImg8bit.png`: `*` stands for any text in a name, `{name}` for some text, which is the same
wherever the name comes again, and `**` for any folders, none too. Nothing else is special: brackets are brackets. A
pattern that ends in a folder, or in `**`, means the images in there, whose stem counts as a `*`.
"""

import os
import re
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

from fastseg.data.pairs import Files, entries, is_image
from fastseg.errors import FastsegError, UsageError
from fastseg.texts import is_plain

_WILD = re.compile(r"\*|\{([A-Za-z_]\w*)\}")
MOST = 4  # wildcards in a name: matching takes time that grows with length ** number


@dataclass(frozen=True)
class Pattern:
    """A pattern of file paths.

    Attributes:
        folder: what stands before the first wildcard.
        parts: names with wildcards below it.
        slots: what is named or starred, in order: "city", "*1", "**".
        regex: of a path below `folder`, with a group for each slot.
        images_only: the last part is any image.
        literal: how many characters are written out.
    """

    folder: Path
    parts: tuple[str, ...]
    slots: tuple[str, ...]
    regex: re.Pattern[str]
    images_only: bool
    literal: int

    def find(self, slots: tuple[str, ...]) -> Files:
        """The files that match, by the values of `slots`.

        Raises:
            OSError: a folder that cannot be read.
        """
        found: Files = {}
        numbers = [self.slots.index(slot) + 1 for slot in slots]
        for path, entry in _walk(str(self.folder), "", self.parts):
            if (self.images_only and not is_image(entry.name)) or not (match := self.regex.fullmatch(path)):
                continue
            found.setdefault(tuple(match[number] or "" for number in numbers), []).append(entry)
        return found


def parse(base: Path, text: str, key: str) -> Pattern:
    """The pattern that a text means, below the folder `base`.

    Args:
        key: what messages call it.

    Raises:
        UsageError: it is no pattern. FastsegError: there is no such folder.
    """
    said = f"{key} = {text!r}"
    if not is_plain(text):
        raise UsageError(f"{said}: has control characters")
    given = Path(text).parts
    if any("**" in part and part != "**" for part in given) or given.count("**") > 1:
        raise UsageError(f"{said}: `**` stands for folders: write it once, between slashes")
    if any(len(_WILD.findall(part)) > MOST for part in given if part != "**"):
        raise UsageError(f"{said}: has more than {MOST} of `*` and {{name}} in a name: write out more of it")
    first = next((number for number, part in enumerate(given) if _WILD.search(part)), len(given))
    folder, parts = base.joinpath(*given[:first]), given[first:]
    if not folder.is_dir():
        raise FastsegError(f"{key}: no folder {folder}")
    images_only = not parts or parts[-1] == "**" or not (_WILD.search(parts[-1]) or is_image(parts[-1]))
    slots, regex = _regex((*parts, "*") if images_only else parts, images_only)
    return Pattern(folder, (*parts, "*") if images_only else parts, slots, regex, images_only, len(_WILD.sub("", text)))


def _regex(parts: tuple[str, ...], images_only: bool) -> tuple[tuple[str, ...], re.Pattern[str]]:
    """The slots of some names with wildcards, and what matches their path."""
    slots: list[str] = []

    def group(wild: str, name: str | None) -> str:
        slot = name or f"*{sum(other[:1] == '*' and other != '**' for other in slots) + 1}"
        if slot in slots:
            return f"(?P=s{slots.index(slot)})"
        slots.append(slot)
        return f"(?P<s{len(slots) - 1}>[^/]{'+' if name else wild})"

    text = ""
    for number, part in enumerate(parts):
        last = number == len(parts) - 1
        if part == "**":
            slots.append("**")
            text += f"(?:(?P<s{len(slots) - 1}>.+)/)?"
            continue
        at = 0
        for wild in _WILD.finditer(part):
            text += re.escape(part[at : wild.start()]) + group("*", wild[1])
            at = wild.end()
        text += re.escape(part[at:]) + ("" if last else "/")
    return tuple(slots), re.compile(text + r"\.[^./]*" * images_only, re.DOTALL)


def _matcher(part: str) -> Callable[[str], object]:
    """Whether a name may match a part, whatever its wildcards stand for elsewhere."""
    if not _WILD.search(part):
        return part.__eq__
    pieces = _WILD.split(part)[::2]  # what stands between the wildcards, without their names
    return re.compile(".*".join(map(re.escape, pieces)), re.DOTALL).fullmatch


def _walk(folder: str, below: str, parts: tuple[str, ...]) -> Iterator[tuple[str, os.DirEntry[str]]]:
    """(path below the first folder, entry) of files that may match; folders of an image's name, too."""
    part, rest = parts[0], parts[1:]
    inside = entries(folder)
    if part == "**":
        yield from _walk(folder, below, rest)
        for entry in inside:
            if entry.is_dir() and not _leads_back(entry):
                yield from _walk(entry.path, f"{below}{entry.name}/", parts)
        return
    matches = _matcher(part)
    for entry in inside:
        if not matches(entry.name):
            continue
        if not rest:
            if is_image(entry.name) or not entry.is_dir():
                yield below + entry.name, entry
        elif entry.is_dir():
            yield from _walk(entry.path, f"{below}{entry.name}/", rest)


def _leads_back(entry: os.DirEntry[str]) -> bool:
    """Whether a folder is a link to one that it lies in, which `**` would walk for ever."""
    if not entry.is_symlink():
        return False
    target = os.path.realpath(entry.path)
    return os.path.commonpath([target, os.path.realpath(os.path.dirname(entry.path))]) == target


def counterpart(images: Pattern, labels: Pattern, key: str) -> None:
    """Check that two patterns name the same.

    Raises:
        UsageError: one has a name or a star that the other has not.
    """
    if set(images.slots) != set(labels.slots):
        image, label = (", ".join(_shown(slot) for slot in side.slots) for side in (images, labels))
        raise UsageError(
            f"{key}: images has {image} and labels has {label}: both must have the same, since what they stand for "
            "says which belong together (a folder has the * of its files' names)"
        )


def _shown(slot: str) -> str:
    return slot if slot == "**" else "*" if slot.startswith("*") else f"{{{slot}}}"
