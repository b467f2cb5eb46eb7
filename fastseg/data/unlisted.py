"""Label values and colours that no class has: which occur, how often, and where they are most likely from."""

import numpy as np

from fastseg.data.classes import ClassMap

SHOWN = 5  # values or colours that are named
NEAR = 12  # of 255, in each channel: how far JPEG and smoothing move most of a mask's colours
MANY = 64  # so many different ones are no classes that somebody forgot
PENDING = 1 << 20  # entries of `Tally` that are kept before they are summed

# Label values, or colours as one number each, ascending; and the pixels of each.
Histogram = tuple[np.ndarray, np.ndarray]


def histogram(raw: np.ndarray, bad: np.ndarray) -> Histogram:
    """Those pixels of a label as its file has it (`read_label`) where `bad`, bool[H, W], is set: int64[N], int64[N]."""
    if raw.ndim == 3:
        red, green, blue = (raw[..., c][bad].astype(np.int64) for c in range(3))
        return np.unique(red << 16 | green << 8 | blue, return_counts=True)
    return np.unique(raw[bad].astype(np.int64), return_counts=True)


def channels(colours: np.ndarray) -> np.ndarray:
    """int64[N, 3] of colours that are one number each."""
    return np.stack([colours >> 16, colours >> 8 & 255, colours & 255], axis=1)


def named(value: int, classes: ClassMap) -> str:
    """A value as a message has it: `12`, or `(128, 0, 3)`."""
    return str((value >> 16, value >> 8 & 255, value & 255)) if classes.is_color else str(value)


class Tally:
    """Sums the histograms of many labels, of which each may have thousands of colours."""

    def __init__(self) -> None:
        self.labels = 0
        self._parts: list[tuple[np.ndarray, np.ndarray, np.ndarray]] = []
        self._pending = 0

    def add(self, found: Histogram) -> None:
        """One more label's."""
        values, pixels = found
        self.labels += 1
        self._parts.append((values, pixels, np.ones_like(pixels)))
        self._pending += len(values)
        if self._pending > PENDING:
            self._parts, self._pending = [self.sums()], 0

    def sums(self) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """int64[N] each: the values in ascending order, and the pixels and the labels that have each."""
        parts = [np.concatenate(part) for part in zip(*self._parts, strict=True)] or [np.zeros(0, np.int64)] * 3
        values, at = np.unique(parts[0], return_inverse=True)
        pixels, labels = np.zeros((2, len(values)), np.int64)
        np.add.at(pixels, at, parts[1])
        np.add.at(labels, at, parts[2])
        return values, pixels, labels


def summary(tally: Tally, classes: ClassMap) -> str:
    """The commonest values or colours with their pixels and labels, and what they are likely to come from."""
    values, pixels, labels = tally.sums()
    distances, nearest = _nearest(values, classes)
    commonest = np.argsort(-pixels, kind="stable")[:SHOWN]
    said = []
    for i in commonest.tolist():
        near = f", close to {nearest[i]}" if len(values) <= MANY and distances[i] <= NEAR else ""
        said.append(
            f"{named(int(values[i]), classes)} ({_many(pixels[i], 'pixel')} in {_many(labels[i], 'label')}{near})"
        )
    more = f" and {len(values) - SHOWN:,} more" if len(values) > SHOWN else ""
    kind = "colours" if classes.is_color else "values"
    text = f"{kind} outside the class map, the commonest first: {', '.join(said)}{more}"
    if len(values) > MANY:
        share = pixels[distances <= NEAR].sum() / pixels.sum()
        near = f"{share:.0%} of these pixels are within {NEAR} of a listed colour" if classes.is_color else ""
        guess = "the masks were resized or drawn with smoothing, or saved as JPEG: save them without, as PNG"
        text += f"; {near or f'{len(values)} different values are no classes'}: {guess}"
    elif not classes.is_color and values.tolist() == [255]:
        text += "; 255 most often marks pixels that count nowhere: `void = [255]` in dataset.toml"
    return text


def _many(count: int, noun: str) -> str:
    return f"{count:,} {noun}{'s' * int(count != 1)}"


def _nearest(values: np.ndarray, classes: ClassMap) -> tuple[np.ndarray, list[str]]:
    """How far each colour is from the nearest that is listed, in its worst channel, and whose that is.

    Indices have no neighbours: each is further away than a colour can be.
    """
    distances, owners = np.full(len(values), 256), np.zeros(len(values), np.int64)
    listed = list((classes.from_color or {}).items())
    colours = channels(values)
    for number, (colour, _) in enumerate(listed):
        far = np.abs(colours - colour).max(axis=1, initial=0)
        owners[far < distances] = number
        distances = np.minimum(distances, far)
    names = [f"{classes.names[c] if c < len(classes.names) else 'void'}'s {colour}" for colour, c in listed]
    return distances, [names[owner] if names else "" for owner in owners.tolist()]
