"""`fastseg data check`: read every pair of a data set and name each file that is missing, unreadable or off the map."""

from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor

import numpy as np

from fastseg.data.classes import UNKNOWN, VOID, ClassMap
from fastseg.data.decode import decode_image, decode_label, read_label
from fastseg.data.headers import read_header
from fastseg.data.layouts import Dataset, Pair, Problem
from fastseg.errors import FastsegError

SHOWN = 5  # further values off the map that are named


def off_map(path: str, classes: ClassMap) -> str | None:
    """The commonest value or colour of a label file that is not in the class map, with its pixel count, or None."""
    raw = read_label(path, classes)
    bad = classes.to_classes(raw) == UNKNOWN
    if not bad.any():
        return None
    values, counts = np.unique(raw[bad], axis=0, return_counts=True)
    commonest = values[counts.argmax()]
    y, x = np.argwhere((np.atleast_3d(raw) == commonest).all(axis=2))[0].tolist()
    kind = "colour" if classes.is_color else "value"
    named = [str(tuple(v) if classes.is_color else v) for v in values.tolist()]
    value = named.pop(int(counts.argmax()))
    more = f"; also {', '.join(named[:SHOWN])}{', ...' * (len(named) > SHOWN)}" if named else ""
    count = int(counts.max())
    return (
        f"{kind} {value} is not in the class map: {count} pixel{'s' * (count > 1)}, the first at x={x} y={y}{more}; "
        f"allowed are {classes.allowed}; correct the file, or --unknown-colours void to ignore such pixels"
    )


def check_pair(pair: Pair, classes: ClassMap, upright: bool = False) -> tuple[list[Problem], list[Problem]]:
    """(errors, warnings) of one pair."""
    header = read_header(pair, upright)
    if header.problem:
        return [header.problem], []
    errors = []
    ignored = () if upright else header.turned
    warnings = [Problem(file, "has an EXIF orientation, which is not applied: see --exif") for file in ignored]
    try:
        decode_image(pair.image)
    except FastsegError as error:
        errors.append(Problem(pair.image, str(error).removeprefix(f"{pair.image}: ")))
    try:
        label = decode_label(pair.label, classes, UNKNOWN)
        # Read again for its colours only where something is wrong.
        if (label == UNKNOWN).any() and (found := off_map(pair.label, classes)):
            errors.append(Problem(pair.label, found))
        elif (label == VOID).all():
            warnings.append(Problem(pair.label, "all pixels are void"))
    except FastsegError as error:
        errors.append(Problem(pair.label, str(error).removeprefix(f"{pair.label}: ")))
    return errors, warnings


def check(dataset: Dataset, threads: int, upright: bool = False) -> tuple[Sequence[Problem], Sequence[Problem]]:
    """(errors, warnings) of the whole data set: orphans first, then the pairs in order.

    Args:
        upright: pictures are turned as their EXIF orientation says.
    """
    errors, warnings = list(dataset.problems), []
    with ThreadPoolExecutor(threads) as pool:
        for wrong, odd in pool.map(lambda p: check_pair(p, dataset.classes, upright), dataset.pool):
            errors += wrong
            warnings += odd
    return errors, warnings
