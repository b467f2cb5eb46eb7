"""Class names as labelling tools write them: by colour, by value, or a name on each line."""

import csv
import io
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from fastseg.data.classes import Color
from fastseg.errors import FastsegError
from fastseg.texts import read_text, shown

IGNORED = "__ignore__"  # LabelMe's name for what counts nowhere
BACKGROUNDS = {"background", "_background_", "bg"}
LISTS = ("class_names.txt", "classes.txt")


@dataclass(frozen=True)
class ClassNames:
    """Names in the order of their file, each with a value 0..255, or each with a colour.

    Attributes:
        listed: the value is the number of the name's line, which another tool may count otherwise.
    """

    path: Path
    rows: tuple[tuple[str, int | Color], ...]
    listed: bool = False

    @property
    def by_color(self) -> bool:
        return isinstance(self.rows[0][1], tuple)


def find_names(folders: Sequence[Path]) -> ClassNames | None:
    """What the first file of class names says that lies in one of the folders; None where there is none.

    Raises:
        FastsegError: a file of such a name that holds something else, by name.
    """
    for name, read in _READERS.items():
        for folder in folders:
            path = folder / name
            if path.is_file():
                try:
                    rows = read(read_text(path))
                except (KeyError, TypeError, ValueError, AttributeError, csv.Error):
                    rows = []
                if not rows:
                    raise FastsegError(f"{shown(path)}: expected {_EXPECTED[name]}; correct it, or move it away")
                return ClassNames(path, tuple(rows), name in LISTS)
    return None


def _byte(text: str) -> int:
    if not 0 <= (value := int(text)) <= 255:
        raise ValueError(text)
    return value


def _labelmap(text: str) -> list:
    """CVAT's labelmap.txt: `name:r,g,b:parts:actions`."""
    rows = []
    for line in text.splitlines():
        if line.strip() and not line.startswith("#"):
            name, color, *_ = line.split(":")
            red, green, blue = color.split(",")
            rows.append((name.strip(), (_byte(red), _byte(green), _byte(blue))))
    return rows


def _table(text: str) -> list[dict[str, str]]:
    """Rows of a CSV file by its columns' names, in small letters."""
    head, *lines = [[cell.strip() for cell in line] for line in csv.reader(io.StringIO(text)) if line]
    return [dict(zip((cell.lower() for cell in head), line, strict=True)) for line in lines]


def _class_dict(text: str) -> list:
    """Kaggle's class_dict.csv: `name,r,g,b`."""
    return [(row["name"], (_byte(row["r"]), _byte(row["g"]), _byte(row["b"]))) for row in _table(text)]


def _roboflow(text: str) -> list:
    """Roboflow's _classes.csv: `Pixel Value, Class`."""
    return [(row["class"], _byte(row["pixel value"])) for row in _table(text)]


def _lines(text: str) -> list:
    """A name on each line, whose number from 0 is the value.

    LabelMe's labels.txt begins with `__ignore__`, which has -1, stored as 255; its export leaves that line out.
    """
    names = [line.strip() for line in text.splitlines() if line.strip()]
    if names and names[0] == IGNORED:
        return [*((name, _byte(str(value))) for value, name in enumerate(names[1:])), (IGNORED, 255)]
    return [(name, _byte(str(value))) for value, name in enumerate(names)]


_READERS = {"labelmap.txt": _labelmap, "class_dict.csv": _class_dict, "_classes.csv": _roboflow}
_READERS |= dict.fromkeys(LISTS, _lines)
_EXPECTED = {"labelmap.txt": "lines `name:r,g,b:parts:actions`", "class_dict.csv": "the columns name,r,g,b"}
_EXPECTED |= {"_classes.csv": "the columns `Pixel Value, Class`"}
_EXPECTED |= dict.fromkeys(LISTS, "a class name on each line, of 1 to 256")
