"""A fuzzer of all that reads what others have made: folders, lists, recipes, images, archives, checkpoints.

fuzz.py TARGET --seconds 600 --seed 1 [2>/dev/null]
fuzz.py TARGET --seed 1 --iteration 4711     one execution again

An execution gets a random generator, which SEED and its number make, and an empty folder. It may end well or with a
FastsegError that is one line of UTF-8. Anything else is a crash: another exception, a file written outside the folder,
five minutes without an end, or, at the end, a process that has grown by more than its LIMIT.
"""

import argparse
import contextlib
import dataclasses
import functools
import io
import os
import random
import resource
import shutil
import signal
import stat
import struct
import sys
import tempfile
import time
import traceback
import warnings
import zipfile
import zlib
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import tomli_w
from PIL import Image

from fastseg import config as configs
from fastseg.data.check import look
from fastseg.data.classes import CAMVID_32, UNKNOWN, camvid_colored, camvid_indexed
from fastseg.data.decode import decode_image, decode_label
from fastseg.data.download import FILES, MAX_MEMBER, download_camvid
from fastseg.data.headers import read_header
from fastseg.data.layouts import Pair, Problem, find
from fastseg.data.split import SCHEMES, apply, digest
from fastseg.errors import FastsegError

MEMORY = Path("/dev/shm")  # where folders come and go fast
LIMIT = 512 << 20  # bytes that the process may grow by
# 89 million pixels are opened, with up to 11 bytes each on their way to classes.
# A mutated checkpoint may rightly ask for the largest network, which is there twice while its layout changes.
LIMITS = {"labels": 5 << 28, "checkpoint": 1 << 30}
HANG = 300  # seconds that one execution may take


class ViolationError(AssertionError):
    """What was done is no exception, and still must not be."""


def one_line(text: str) -> None:
    """Raise where a message is not one line that any terminal and file takes."""
    if not text.strip() or len(text.splitlines()) != 1 or text.encode("utf-8", "replace").decode() != text:
        raise ViolationError(f"not one line of UTF-8: {text!r}")


def attempt(call: Callable[[], Any]) -> None:
    """Call what may be refused without the input as a whole being so."""
    try:
        call()
    except FastsegError as error:
        one_line(str(error))


# Bytes

INTEGERS = (0, 1, 0x7F, 0x80, 0xFF, 0x7FFF, 0x8000, 0xFFFF, 0x7FFFFFFF, 0x80000000, 0xFFFFFFFF, 2**63, 2**64 - 1)


def mutate(rng: random.Random, data: bytes, tokens: Sequence[bytes] = (b"",)) -> bytes:
    """`data` with one to sixteen random changes, in which `tokens` are put among its bytes."""
    body = bytearray(data)
    for _ in range(rng.choice((1, 1, 2, 4, 16))):
        at, length = rng.randrange(len(body) + 1), rng.choice((1, 2, 4, 16, 64, 256))
        chunk = body[at : at + length]
        other = rng.randrange(len(body) + 1)
        match rng.randrange(9):
            case 0 if at < len(body):
                body[at] ^= 1 << rng.randrange(8)
            case 1:
                body[at : at + 1] = rng.randbytes(1)
            case 2:
                del body[at + rng.randrange(length) :]
            case 3:
                del body[at : at + length]
            case 4:
                body[other:other] = chunk * rng.choice((1, 1, 2, 100))
            case 5:
                body[other : other + length] = chunk
            case 6:
                body[at:at] = rng.choice(tokens)
            case 7:
                token = rng.choice(tokens)
                body[at : at + len(token)] = token
            case 8:
                size = rng.choice((1, 2, 4, 8))
                value = rng.choice(INTEGERS) % 2 ** (8 * size)
                body[at : at + size] = value.to_bytes(size, rng.choice(("big", "little")))
    return bytes(body)


def maybe(rng: random.Random, data: bytes, tokens: Sequence[bytes] = (b"",)) -> bytes:
    """`data`, in one of two cases mutated."""
    return mutate(rng, data, tokens) if rng.random() < 0.5 else data


# Folders

STEMS = [b"a", b"b", b"a_L", b"a_P", b"0016E5_07959", b"0001TP_006690", b"s_1", "s_\u00fc".encode(), b"caf\xe9", b"x y"]
STEMS += [b"a\nb", b".a", b"._a", b"a" * 230, b"\x1b[31mred", b"a.b", b"\xff\xfe", "\u2028".encode(), b"*", b"[a]"]
SUFFIXES = [b".png"] * 6 + [b".jpg", b".PNG", b".tiff", b".bmp", b"", b".txt", b".png.png"]
TREES = {
    "segnet": (("train", "trainannot", "val", "valannot", "test", "testannot"), ("train.txt", "val.txt"), b""),
    "kaggle": (("train", "train_labels", "val", "val_labels"), ("class_dict.csv", "val.txt"), b"_L"),
    "original": (("701_StillsRaw_full", "LabeledApproved_full"), ("train.txt", "val.txt"), b"_L"),
    "fastai": (("images", "labels"), ("codes.txt", "valid.txt"), b"_P"),
    "voc": (
        ("JPEGImages", "SegmentationClass", "ImageSets/Segmentation"),
        ("ImageSets/Segmentation/train.txt", "ImageSets/Segmentation/val.txt"),
        b"",
    ),
    "cityscapes": (
        tuple(f"{side}/{split}/ulm" for split in ("train", "val", "test") for side in ("leftImg8bit", "gtFine")),
        (),
        b"_gtFine_labelIds",
    ),
}
LISTED = b"a.png\nx y, s_1.png\n/x/s_1.png /y/s_1.png\r\nC:\\b.png\n\nghost\n"
TEXTS = {
    "codes.txt": ("\n".join(CAMVID_32).encode(), b"road\nlake\nvoid\n", b"Void\n" * 300),
    "class_dict.csv": (
        b"name,r,g,b\n" + b"".join(b"%s,%d,%d,%d\n" % (n.encode(), *c) for n, (c, _) in CAMVID_32.items()),
        b'name,r,g,b\nroad,1,2,3\n"la,ke",4,5,6\nvoid,0,0,0\n',
    ),
}
WORDS = [b",", b'"', b"\n", b"\r", b"\0", b"\xff", b"\xef\xbb\xbf", b"\xff\xfe", b"void", b"-1", b"256", b"9" * 5000]
WORDS += [b"..", b"/", b"name,r,g,b\n", b"Sky\n", b"road", "\u2028".encode(), b"\x1b[2J", b"a" * 140_000, b" "]


@functools.cache
def pixel() -> bytes:
    """A PNG file of one pixel."""
    file = io.BytesIO()
    Image.new("L", (1, 1)).save(file, "PNG")
    return file.getvalue()


def is_label(folder: str) -> bool:
    """Whether a folder of a layout holds labels."""
    return any(word in folder.lower() for word in ("annot", "label", "gtfine"))


def place(rng: random.Random, path: bytes, content: bytes) -> None:
    """A file; rarely something else of its name."""
    if os.path.lexists(path):
        return
    match rng.randrange(60):
        case 0:
            os.mkdir(path)
        case 1:
            os.symlink(rng.choice((b"gone", b"../gone", b"caf\xe9", b"/gone\n", os.path.basename(path))), path)
        case 2:
            os.symlink(rng.choice((b"..", b"../../../sentinel", b"../../../sentinel/keep.png", b"/dev/zero")), path)
        case 3:
            os.mkfifo(path)
        case kind:
            with open(path, "wb") as file:
                file.write(content)
                if kind == 4:
                    file.truncate(1 << 40)  # takes no space on the disk


def grow(rng: random.Random, root: Path, layout: str) -> None:
    """A tree of a layout in `root`, with odd names, and with files that are missing or something else."""
    folders, texts, suffix = TREES[layout]
    stems = rng.choices(STEMS, k=rng.randrange(8))
    for folder in folders:
        if rng.random() < 0.02:
            (root / folder).parent.mkdir(parents=True, exist_ok=True)
            place(rng, os.fsencode(root / folder), b"")
            continue
        (root / folder).mkdir(parents=True)
        for stem in stems:
            for ending in rng.choices(SUFFIXES, k=rng.choice((0, 1, 1, 1, 1, 1, 1, 2))):
                name = stem + (suffix if is_label(folder) and rng.random() < 0.9 else b"") + ending
                place(rng, os.fsencode(root / folder) + b"/" + name, pixel())
    for text in texts:
        if rng.random() < 0.9 and (root / text).parent.is_dir():
            content = rng.choice(TEXTS.get(text, (LISTED,)))
            place(rng, os.fsencode(root / text), maybe(rng, content, WORDS))


def examine(path: Path) -> None:
    """Find a data set and ask of it all that needs no pixels."""
    data = find(path)
    for problem in data.problems:
        tell(problem)
    for pair in data.pool:
        one_line(pair.image + pair.label)
        if not (os.path.isfile(pair.image) and os.path.isfile(pair.label)):
            raise ViolationError(f"a pair that is no two files: {pair}")
    for split in data.splits:
        one_line(split or "empty")
    attempt(data.classes.index_table)
    attempt(data.classes.color_tables)
    for scheme in SCHEMES:
        attempt(lambda scheme=scheme: [digest(pairs) for pairs in apply(data, scheme, 1).values()])


def tell(problem: Problem | None) -> None:
    """Raise where what is said of a file is not one line."""
    if problem:
        one_line(problem.file)
        one_line(problem.problem)


# Targets


def layouts(rng: random.Random, folder: Path) -> None:
    """Folders of the layouts, with odd names and files."""
    root = folder / rng.choice(("data", "data", "data", "d\udcffta", "d\nta"))
    root.mkdir()
    grow(rng, root, rng.choice(list(TREES)))
    examine(root)


def lists(rng: random.Random, folder: Path) -> None:
    """List files and class files of odd bytes."""
    layout = rng.choice(list(TREES))
    folders, texts, suffix = TREES[layout]
    for name in folders:
        (folder / name).mkdir(parents=True)
        for stem in ("a", "b", "s_1"):
            (folder / name / f"{stem}{suffix.decode() if is_label(name) else ''}.png").write_bytes(pixel())
    for name in texts:
        (folder / name).write_bytes(mutate(rng, rng.choice(TEXTS.get(name, (LISTED,))), WORDS))
    examine(folder)


DESCRIBED = b"""void = [0, 255]
val = 0.5
group = "{group}*"
[splits.train]
images = "in/*.png"
labels = "out/*_gt.png"
[splits.test]
images = "**/{x}.png"
labels = '**/{x}_gt.png'
list = "list.txt"
[splits.extra]
list = "list.txt"
[[classes]]
name = "road"
index = [1, 7]
[[classes]]
name = "lake"
index = 2
"""
MARKS = [b"[", b"]", b"[" * 3000, b"{", b"=", b'"', b"\n", b"*", b"..", b"/", b"nan", b"inf", b"true", b"1e999", b"-1"]
MARKS += [b"0x" + b"f" * 5000, b"9" * 5000, b"1979-05-27", b"\\u0000", b"\\n", b"\xff", b"\0", b"x" * 300]
MARKS += [b"a." * 3000, b"a." * 90, b"color = [1, 2, 3]\n", b"index = 3\n", b"[[classes]]\n", b"[splits.'\\n']\n"]
MARKS += [b'["a\\nb"]\n', b"\xef\xbb\xbf", b"**", b"{x}", b"{group}", b"fold = '1/2'\n", b"?", b"*" * 9]
ODD: list[Any] = [None, True, -1, 0, 1, 256, 2**31, 2**63 - 1, 10**400, -0.5, float("nan"), float("inf"), 1e300]
ODD += ["", "a", "0x0", "1x1", "9" * 5000 + "x1", "\u0663x\u0663", "a\nb", "\u2028", "*", "../sentinel", "/", "x" * 300]
ODD += ["\0", [], {}, [1, 2, 3], [[1, 2, 3], [4, 5, 6]], [300, 0, 0], {"a": {"b": 1}}, [[[[[[[[1]]]]]]]], ["a"] * 300]


def scramble(rng: random.Random, tree: Any, odd: Sequence[Any] = ODD, rate: float | None = None) -> Any:
    """A copy of a tree of dicts and lists in which some values (`rate`) are odd ones, missing or stand twice."""
    rate = rng.choice((0.002, 0.02, 0.1)) if rate is None else rate
    if rng.random() < rate:
        return rng.choice(odd)
    if isinstance(tree, dict):
        new = {key: scramble(rng, value, odd, rate) for key, value in tree.items() if rng.random() > rate / 2}
        return {**new, rng.choice(("x", "a\nb", "", "lr.x")): rng.choice(odd)} if rng.random() < rate else new
    if isinstance(tree, list):
        times = [rng.choice((0, 2)) if rng.random() < rate else 1 for _ in tree]
        return [scramble(rng, value, odd, rate) for value, n in zip(tree, times, strict=True) for _ in range(n)]
    return tree


def _tomlable(value: Any) -> Any:
    """The same without what TOML has no words for."""
    if isinstance(value, dict):
        return {key: _tomlable(part) for key, part in value.items() if part is not None}
    return [_tomlable(part) for part in value if part is not None] if isinstance(value, list) else value


def document(rng: random.Random, seed: bytes) -> bytes:
    """A TOML document like `seed`: with odd values, or with odd bytes, or both."""
    if rng.random() < 0.5:
        tree = _tomlable(scramble(rng, configs.parse_toml(seed.decode())))
        if isinstance(tree, dict):
            with contextlib.suppress(ValueError):  # Python writes no number of 5000 digits
                return maybe(rng, tomli_w.dumps(tree).encode(), MARKS)
    return mutate(rng, seed, MARKS)


def toml(rng: random.Random, folder: Path) -> None:
    """Descriptions of a data set: dataset.toml."""
    for name in ("in/a.png", "in/b.png", "out/a_gt.png", "out/b_gt.png"):
        (folder / name).parent.mkdir(exist_ok=True)
        (folder / name).write_bytes(pixel())
    (folder / "list.txt").write_bytes(maybe(rng, b"a\nin/b.png,out/b_gt.png\n", WORDS))
    (folder / "dataset.toml").write_bytes(document(rng, DESCRIBED))
    examine(rng.choice((folder, folder / "dataset.toml")))


@functools.cache
def recipe() -> bytes:
    """A recipe with every key."""
    return configs.Config().dumps().encode()


def config(rng: random.Random, folder: Path) -> None:
    """Recipes, and `--set`."""
    path = folder / "mine.toml"
    path.write_bytes(document(rng, recipe()))
    found = configs.read(path)
    path.write_text(found.dumps(), encoding="utf-8")
    if configs.read(path) != found:
        raise ViolationError("it reads back as another configuration than it was written")
    key = f"train.{rng.choice(dataclasses.fields(configs.Train)).name}"
    text = rng.choice(MARKS).decode("utf-8", "replace")
    attempt(lambda: configs.override(found, configs.assignments((f"{key}={text}",))))


@functools.cache
def pictures() -> tuple[bytes, ...]:
    """Small images of the formats and modes that data sets have, and some that they should not."""
    indices = (np.arange(12 * 10, dtype=np.uint8) % 12).reshape(10, 12)
    grey = Image.fromarray(indices)
    palette = grey.convert("P")
    colors = Image.fromarray(np.array([c for c, _ in CAMVID_32.values()] * 4, np.uint8)[:120].reshape(10, 12, 3))
    modes = [grey, palette, colors, colors.convert("RGBA"), grey.convert("1"), grey.convert("LA"), grey.convert("I")]
    modes += [Image.fromarray(indices.astype(np.uint16)), colors.convert("CMYK"), grey.convert("F")]
    exif = Image.Exif()
    exif[0x0112] = 6
    options: list[tuple[str, dict[str, Any]]] = []
    options += [(kind, {}) for kind in ("PNG", "BMP", "TIFF", "JPEG", "GIF", "PPM", "WEBP", "TGA")]
    options += [("TIFF", {"compression": name}) for name in ("tiff_lzw", "tiff_deflate", "jpeg", "packbits", "group4")]
    options += [(kind, {"exif": exif}) for kind in ("PNG", "JPEG", "TIFF")]
    found = []
    for image in modes:
        for kind, option in options:
            file = io.BytesIO()
            with contextlib.suppress(OSError, ValueError):  # a format that does not have this mode
                image.save(file, kind, **option)
                found.append(file.getvalue())
    return tuple(found)


def chunked(rng: random.Random, data: bytes) -> bytes:
    """A PNG with one chunk mutated and its check sum made right, or with a claim of another size."""
    chunks, at = [], 8
    while at < len(data):
        (length,) = struct.unpack(">I", data[at : at + 4])
        chunks.append((data[at + 4 : at + 8], data[at + 8 : at + 8 + length]))
        at += length + 12
    if rng.random() < 0.3:
        sides = (0, 1, 12, 13_000, 60_000, 2**31 - 1, 2**32 - 1)
        head = struct.pack(">II", rng.choice(sides), rng.choice(sides)) + chunks[0][1][8:]
        chunks[0] = (b"IHDR", mutate(rng, head) if rng.random() < 0.2 else head)
    else:
        number = rng.randrange(len(chunks))
        name, body = chunks[number]
        body = zlib.compress(mutate(rng, zlib.decompress(body))) if name == b"IDAT" else mutate(rng, body)
        chunks[number] = (rng.choice((name, name, name, b"tRNS", b"eXIf", b"zTXt", b"iCCP", b"acTL", b"PLTE")), body)
        if rng.random() < 0.1:
            rng.shuffle(chunks)
    parts = (struct.pack(">I", len(b)) + n + b + struct.pack(">I", zlib.crc32(n + b)) for n, b in chunks)
    return data[:8] + b"".join(parts)


def labels(rng: random.Random, folder: Path) -> None:
    """An image and a label of odd bytes, or of sizes that they only claim."""
    paths = []
    for name in ("image.png", "label.png"):
        data = rng.choice(pictures())
        data = chunked(rng, data) if data.startswith(b"\x89PNG") and rng.random() < 0.5 else maybe(rng, data)
        (folder / name).write_bytes(data)
        paths.append(str(folder / name))
    pair = Pair("label", *paths)
    classes = rng.choice((camvid_indexed, camvid_colored))()
    header = read_header(pair)
    tell(header.problem)
    found = look(pair, header, classes)
    for problem in (*found.errors, *found.warnings):
        tell(problem)
    attempt(lambda: decode_image(pair.image))
    decode_label(pair.label, classes, UNKNOWN)


MEMBERS = ["a.png", "a.PNG", "x/c.png", "x/", "../up.png", "/abs.png", "x\\..\\..\\up.png", "C:\\d.png", "n.txt"]
MEMBERS += ["x/..", "../sentinel/keep.png", "a\nb.png", "l" * 300 + ".png", "\u00fc.png", "._a.png", ".png", "..png"]
MEMBERS += ["a.png/"]


@functools.cache
def bomb(claim: int | None = None) -> bytes:
    """A zip whose only member inflates to a byte more than it may; `claim` is what it says instead."""
    file = io.BytesIO()
    with zipfile.ZipFile(file, "w", zipfile.ZIP_DEFLATED) as archive:
        archive.writestr("a.png", bytes(MAX_MEMBER + 1))
    data = file.getvalue()
    return data if claim is None else data.replace(struct.pack("<I", MAX_MEMBER + 1), struct.pack("<I", claim))


def zipped(rng: random.Random) -> bytes:
    """A zip of images: most often as it should be, else with members and methods that mean harm or are unusual."""
    file = io.BytesIO()
    odd = rng.random() < 0.4
    with zipfile.ZipFile(file, "w") as archive, warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of names that stand twice
        for name in ["good.png", *(rng.choices(MEMBERS, k=rng.randrange(5)) if odd else ["b.png", "x/c.png", "n.txt"])]:
            info = zipfile.ZipInfo(name)
            kind = rng.choice((stat.S_IFREG,) * 12 + (stat.S_IFLNK, stat.S_IFDIR, stat.S_IFIFO, 0) * odd)
            info.external_attr = (kind | 0o644) << 16
            info.compress_type = rng.choice((zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED))
            if odd and rng.random() < 0.1:
                info.compress_type = rng.choice((zipfile.ZIP_BZIP2, zipfile.ZIP_LZMA))
            archive.writestr(info, b"../../sentinel/keep.png" if kind == stat.S_IFLNK else pixel())
    return file.getvalue()


def archive(rng: random.Random, folder: Path) -> None:
    """The two zips of a download."""
    source = folder / "source"
    source.mkdir()
    for name in FILES:
        data = rng.choice((bomb(), bomb(5), bomb(0))) if rng.random() < 0.02 else zipped(rng)
        if rng.random() < 0.5:
            last = data.rfind(b"PK\x01\x02") if rng.random() < 0.5 else 0  # what tells of the last member
            data = data[:last] + mutate(rng, data[last:], (b"PK\x01\x02", b"PK\x05\x06", b"../", b"\0", b"\n", b"\xff"))
        (source / f"{name}.zip").write_bytes(data)
    out = folder / "camvid"
    with contextlib.redirect_stderr(io.StringIO()):
        download_camvid(out, str(source))
    for path in out.rglob("*"):
        if path.is_symlink() or not (path.is_file() if path.parent.name in FILES else path.is_dir()):
            raise ViolationError(f"unpacked to {path}")


@functools.cache
def network_state() -> dict[str, Any]:
    """What a checkpoint of a network of depth 1 holds."""
    from fastseg.model import SegNet

    tree = configs.override(configs.Config(), {"model.depth": 1}).as_dict()
    # Zeros, so that the same mutation makes the same file again.
    weights = {name: value * 0 for name, value in SegNet(2, depth=1).state_dict().items()}
    texts = {"classes": ["road", "lake"], "colors": [[1, 2, 3], [4, 5, 6]], "mean": [0.0] * 3, "std": [1.0] * 3}
    texts |= {"trained_on": {"stems": ["a", "b"], "contents": ["0" * 16, "f" * 16]}}
    return {"schema": 2, "progress": {"step": 7}, "model": weights, "ema": None, "config": tree, **texts, "best": 0.5}


@functools.cache
def vgg_state() -> dict[str, Any]:
    """What of a torchvision VGG fits that network's encoder."""
    import torch

    shapes = {"0.weight": (64, 3, 3, 3), "0.bias": (64,), "2.weight": (64, 64, 3, 3), "2.bias": (64,)}
    return {f"features.{name}": torch.zeros(shape) for name, shape in shapes.items()}


def _saved(value: Any) -> bytes:
    import torch

    file = io.BytesIO()
    torch.save(value, file)
    return file.getvalue()


@functools.cache
def saved(kind: str) -> bytes:
    """A checkpoint, or a VGG's state dict, as it should be."""
    return _saved(network_state() if kind == "network" else vgg_state())


@functools.cache
def odd_weights() -> tuple[Any, ...]:
    """What may stand in a checkpoint instead of what should."""
    import torch

    shapes = [torch.zeros(0), torch.tensor(3), torch.zeros(64, dtype=torch.complex64), torch.zeros(2, 2).to_sparse()]
    shapes += [torch.zeros(1).expand(64, 64, 3, 3), torch.zeros(64, 3, 3, 3).bool(), torch.empty(64, device="meta")]
    return (*ODD, *shapes, 10**5000, ["c"] * 100_000, {1: 2}, (1, 2), b"x", "vgg19", 5)


def repacked(rng: random.Random, data: bytes) -> bytes:
    """A checkpoint's zip with its pickle mutated and all check sums right."""
    file = io.BytesIO()
    tokens = (b"N", b"K\x05", b"}", b"]", b".", b"cos\nsystem\n", b"ctorch\nload\n", b"R", b"h\x00", b"U\x01x")
    with zipfile.ZipFile(io.BytesIO(data)) as old, zipfile.ZipFile(file, "w") as new:
        for name in old.namelist():
            body = old.read(name)
            new.writestr(name, mutate(rng, body, tokens) if name.endswith("data.pkl") else body)
    return file.getvalue()


def checkpoint(rng: random.Random, folder: Path) -> None:
    """Checkpoints and `--init` files: of odd bytes, with an odd pickle inside, or with odd contents."""
    from fastseg import checkpoint as checkpoints
    from fastseg.model import SegNet, initialise
    from fastseg.overlays import colored

    kind = rng.choice(("network", "network", "vgg"))
    path = folder / "it.pt"
    way = rng.randrange(3)
    if way == 0:
        path.write_bytes(mutate(rng, saved(kind)))
    elif way == 1:
        path.write_bytes(repacked(rng, saved(kind)))
    else:
        path.write_bytes(_saved(scramble(rng, network_state() if kind == "network" else vgg_state(), odd_weights())))
    if kind == "vgg":
        initialise(SegNet(2, depth=1), str(path))
    else:
        state = checkpoints.read(path)
        checkpoints.build_model(state)
        colored(np.arange(len(state["classes"]), dtype=np.uint8)[None], [tuple(c) for c in state["colors"]])


TARGETS: dict[str, Callable[[random.Random, Path], None]] = {
    # Those that take the most memory last, since it is the most of the process so far that is compared.
    f.__name__: f
    for f in (layouts, toml, lists, archive, config, checkpoint, labels)
}


# Running them


@dataclasses.dataclass
class Outcome:
    """What a number of executions came to; `growth` in bytes of memory."""

    accepted: int = 0
    refused: int = 0
    seconds: float = 0.0
    growth: int = 0

    @property
    def executions(self) -> int:
        return self.accepted + self.refused


class CrashError(Exception):
    """An execution did what it may not; its folder is left in `kept`."""

    def __init__(self, target: str, seed: int, iteration: int, kept: Path) -> None:
        again = f"fuzz.py {target} --seed {seed} --iteration {iteration}"
        super().__init__(f"{target}, seed {seed}, iteration {iteration}: its folder is in {kept}, and again: {again}")


def _peak() -> int:
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024


def _hung(*_: Any) -> None:
    raise ViolationError(f"no end within {HANG} seconds")


@contextlib.contextmanager
def _guarded() -> Iterator[Path]:
    """A new folder with a `sentinel` that nothing may change, in which also relative paths would end."""
    with (
        tempfile.TemporaryDirectory(prefix="fuzz-", dir=MEMORY if MEMORY.is_dir() else None) as name,
        warnings.catch_warnings(),
    ):
        warnings.simplefilter("ignore")
        base = Path(os.path.realpath(name))
        (base / "sentinel").mkdir()
        (base / "sentinel" / "keep.png").write_bytes(pixel())
        old = signal.signal(signal.SIGALRM, _hung)
        try:
            with contextlib.chdir(base / "sentinel"):
                yield base
        finally:
            signal.alarm(0)
            signal.signal(signal.SIGALRM, old)


def _outside(base: Path) -> list[tuple[str, bytes]]:
    """All files and folders beside an execution's own."""
    found = [path for top in base.iterdir() if top.name != "own" for path in (top, *top.rglob("*"))]
    return sorted((str(path), path.read_bytes() if path.is_file() else b"") for path in found)


def execute(target: str, seed: int, iteration: int, base: Path) -> bool:
    """One execution in the folder `own` of `base`, which goes away if it may; whether the input was accepted.

    Raises:
        CrashError: from what was wrong.
    """
    own = base / "own"
    own.mkdir()
    before = _outside(base)
    signal.alarm(HANG)
    try:
        try:
            TARGETS[target](random.Random(f"{seed} {iteration}"), own)
            accepted = True
        except FastsegError as error:
            one_line(str(error))
            accepted = False
        if _outside(base) != before:
            raise ViolationError("it wrote outside its folder")
    except Exception as error:
        kept = Path(tempfile.mkdtemp(prefix=f"fuzz-{target}-{seed}-{iteration}-"))
        shutil.move(own, kept / "own")
        raise CrashError(target, seed, iteration, kept) from error
    finally:
        signal.alarm(0)
    shutil.rmtree(own)
    return accepted


def run(target: str, seed: int, *, executions: int | None = None, seconds: float | None = None) -> Outcome:
    """So many executions of a target, or as many as fit into the time.

    Raises:
        CrashError: the first that does what it may not. ViolationError: all together took too much memory.
    """
    outcome = Outcome()
    with _guarded() as base:
        start, floor = time.monotonic(), 0
        while executions is None or outcome.executions < executions:
            if execute(target, seed, outcome.executions, base):
                outcome.accepted += 1
            else:
                outcome.refused += 1
            floor = floor or _peak()  # after the first one: what is loaded once does not count as growth
            outcome.seconds = time.monotonic() - start
            if seconds is not None and outcome.seconds >= seconds:
                break
    outcome.growth = _peak() - floor
    if outcome.growth > LIMITS.get(target, LIMIT):
        raise ViolationError(
            f"{target}, seed {seed}: grew by {outcome.growth >> 20} MiB in {outcome.executions} executions"
        )
    return outcome


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("target", choices=list(TARGETS))
    parser.add_argument("--seconds", type=float, default=60)
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--iteration", type=int, help="this one alone")
    options = parser.parse_args()
    try:
        if options.iteration is not None:
            with _guarded() as base:
                accepted = execute(options.target, options.seed, options.iteration, base)
            print("accepted" if accepted else "refused")
            return
        outcome = run(options.target, options.seed, seconds=options.seconds)
    except (CrashError, ViolationError) as error:
        traceback.print_exception(error.__cause__ or error, file=sys.stdout)
        print(error)
        sys.exit(1)
    print(
        f"{options.target}, seed {options.seed}: {outcome.executions} executions in {outcome.seconds:.0f} s "
        f"({outcome.executions / outcome.seconds:.0f} a second), "
        f"{outcome.accepted} accepted, {outcome.refused} refused, memory grew by {outcome.growth >> 20} MiB"
    )


if __name__ == "__main__":
    main()
