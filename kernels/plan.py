"""How kernels divide a map among programs: all block sizes, in one place. `fastseg bench kernels --plan` shows them.

A map is rows (pixels) of C neighbours. Two kinds of kernel pass over it:

- A *streaming* kernel writes what it reads. Each program has one small tile, there are many of them, and whichever
  multiprocessor is free takes the next: nothing to balance, and many loads in flight.
- A *reducing* kernel leaves a few numbers per channel. It has a program for each multiprocessor, with an equal share of
  the rows: all work to the end, and few parts are left to merge. What must be in flight to keep memory busy is that one
  program's: by Little's law 4.3 TB/s times the 1.1 us that busy memory takes to answer, or 36 kB for each of 132
  multiprocessors. So it copies tiles to come to shared memory while it works on one (`tl.range` with `num_stages`).
"""

import functools
from typing import NamedTuple

import torch

# An H100's or H200's, where there is no GPU to ask.
MULTIPROCESSORS = 132
WIDEST = 64  # channels of a tile: 128 bytes of 16-bit values, a line of the cache

# A streaming program's tile: two 16-byte loads for each of its 128 threads.
STREAMED, STREAM_WARPS = 2048, 4
AUGMENTED, RESIZED = 1024, 256  # pixels of a tile of images that are augmented, and where they are resized too
# A reducing program's tile: two 16-byte loads for each of its 512 threads, or one where each element means reading more
# than MUCH values. One program has a multiprocessor for itself: it may fill much of its shared memory.
REDUCED_BYTES, REDUCE_WARPS, MUCH = 16 << 10, 16, 2
IN_FLIGHT = 64 << 10  # bytes of tiles to come
MERGED = 128  # parts that are merged at once

# A sum over pixels: labels of a tile, parts that are merged at once, and programs of a multiprocessor.
LABELS, SUMMED, SUMMING = 1024, 1024, 16


class Reduction(NamedTuple):
    """How a reducing kernel divides its rows among programs.

    Attributes:
        parts: programs along the rows; each leaves a part.
        blocks: programs along the channels.
        share: rows of a part; the last may have fewer, but never none.
        height, width: rows and channels of a tile.
        stages: tiles at a time: the one that is worked on, and those on their way.
    """

    parts: int
    blocks: int
    share: int
    height: int
    width: int
    stages: int


def cdiv(a: int, b: int) -> int:
    """a / b, rounded up. Triton's own, called from Python, goes through a wrapper that takes microseconds."""
    return -(-a // b)


def tile(channels: int, elements: int) -> tuple[int, int]:
    """(pixels, channels) of a program's tile: powers of two, at most WIDEST channels, `elements` in all."""
    width = min(WIDEST, 1 << (channels - 1).bit_length())
    return elements // width, width


def reduction(rows: int, channels: int, value_bytes: int, element_bytes: int, multiprocessors: int) -> Reduction:
    """A program for each multiprocessor, unless that leaves less than a tile for each.

    Args:
        value_bytes: of a value of the map.
        element_bytes: what is read per row and channel: of several maps, or of several pixels.
    """
    elements = REDUCED_BYTES // value_bytes // (1 if element_bytes <= MUCH * value_bytes else 2)
    height, width = tile(channels, elements)
    blocks = cdiv(channels, width)
    share = cdiv(rows, min(max(1, multiprocessors // blocks), cdiv(rows, height)))
    stages = 1 + max(1, IN_FLIGHT // (elements * element_bytes))
    return Reduction(cdiv(rows, share), blocks, share, height, width, stages)


def score_tile(classes: int) -> tuple[int, int]:
    """(pixels, classes) of a tile that holds all classes of its pixels: powers of two."""
    width = 1 << (classes - 1).bit_length()
    return max(1, STREAMED // width), width


def sums(pixels: int, height: int, multiprocessors: int) -> tuple[int, int]:
    """Programs of a sum over all pixels in tiles of so many, and the pixels of each, which are whole tiles."""
    share = cdiv(cdiv(pixels, height), SUMMING * multiprocessors) * height
    return cdiv(pixels, share), share


@functools.cache
def multiprocessors(device: torch.device) -> int:
    """Of a GPU; MULTIPROCESSORS where a kernel is interpreted."""
    return torch.cuda.get_device_properties(device).multi_processor_count if device.type == "cuda" else MULTIPROCESSORS
