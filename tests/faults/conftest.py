"""Faults that users of such tools have met: each row of docs/faults.md is a test, and what fastseg says comes from it.

`FASTSEG_UPDATE_FAULTS=1 pytest tests/faults` writes the table anew; otherwise each test compares its row with it.
"""

import os
import re
import shutil
import struct
import zlib
from pathlib import Path

import numpy as np
import pytest

from fastseg.pipelines.plan import Plan
from fastseg.pipelines.source import TrainSource, choose_loader, evaluation_batches
from fastseg.specs import open_specs

TABLE = Path(__file__).parents[2] / "docs" / "faults.md"
HEAD = """# What fastseg says to faults

Each row is a test of `tests/faults`, and the table is written by `FASTSEG_UPDATE_FAULTS=1 pytest tests/faults`.
Numbers and names are those of the tests.

| fault | fastseg says, or does | cure |
|---|---|---|
"""
ROWS: dict[str, list[str]] = {}  # by test file, in the order of its tests


UPDATE = bool(os.environ.get("FASTSEG_UPDATE_FAULTS"))
LEFT_OUT: list[str] = []  # tests that were skipped or failed


def pytest_runtest_logreport(report):
    if report.skipped or report.failed:
        LEFT_OUT.append(report.nodeid)


def pytest_sessionfinish(session):
    """Where all tests of the folder ran, the table is theirs: written, or compared so that no old row stays."""
    files = {item.path for item in session.items}
    chosen = session.config.getoption("keyword") or session.config.getoption("markexpr")
    whole = files >= set(Path(__file__).parent.glob("test_*.py")) and not chosen
    ours = [nodeid for nodeid in LEFT_OUT if "tests/faults/" in nodeid]
    text = HEAD + "".join(line for file in sorted(ROWS) for line in ROWS[file])
    if UPDATE and (not whole or ours):
        print(f"\n{TABLE} is not written: it takes all tests of tests/faults, and these were left out: {ours}")
        session.exitstatus = 1
    elif UPDATE:
        TABLE.write_text(text, encoding="utf-8")
    elif whole and not ours and TABLE.read_text(encoding="utf-8") != text:
        print(f"\n{TABLE} has rows that no test makes: FASTSEG_UPDATE_FAULTS=1 pytest tests/faults writes it anew")
        session.exitstatus = 1


@pytest.fixture
def row(request, tmp_path):
    """row(fault, says, cure) states a row of the table; paths of the test's folder are shortened.

    `says` is a message as it came, from which what differs from run to run has been taken; or what was asserted.
    """

    def state(fault: str, says: str, cure: str = "-") -> None:
        says = says.strip().replace(f"{tmp_path}/", "")
        line = (
            "| "
            + " | ".join(re.sub(r"\s*\n\s*", " ", cell).replace("|", "\\|") for cell in (fault, says, cure))
            + " |\n"
        )
        ROWS.setdefault(str(request.path), []).append(line)
        if not UPDATE:
            assert line in TABLE.read_text(encoding="utf-8"), "FASTSEG_UPDATE_FAULTS=1 pytest tests/faults writes it"

    return state


@pytest.fixture
def copy_of(street, tmp_path):
    """copy_of("name") is a writable copy of the street scenes, and its training labels in order."""

    def copy(name: str) -> tuple[Path, list[Path]]:
        shutil.copytree(street, tmp_path / name)
        return tmp_path / name, sorted((tmp_path / name / "trainannot").iterdir())

    return copy


@pytest.fixture
def write_png():
    """write_png(path, pixels, bits) writes grey, grey + alpha, RGB or RGBA of 1 to 16 bits: Pillow cannot write all."""

    def chunk(kind: bytes, data: bytes) -> bytes:
        return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))

    def write(path: Path, pixels: np.ndarray, bits: int) -> Path:
        height, width, *channels = pixels.shape
        kind = {1: 0, 2: 4, 3: 2, 4: 6}[channels[0] if channels else 1]
        digits = (pixels.reshape(height, -1, 1) >> np.arange(bits)[::-1]) & 1
        rows = np.packbits(digits.reshape(height, -1).astype(np.uint8), axis=1)
        lines = b"".join(b"\0" + row.tobytes() for row in rows)
        head = struct.pack(">IIBBBBB", width, height, bits, kind, 0, 0, 0)
        parts = (chunk(b"IHDR", head), chunk(b"IDAT", zlib.compress(lines)), chunk(b"IEND", b""))
        path.write_bytes(b"\x89PNG\r\n\x1a\n" + b"".join(parts))
        return path

    return write


@pytest.fixture
def read_by():
    """read_by(folder, loader) -> (images, labels) of the training split, as evaluation and training read them.

    The labels of training are those of a first step without augmentation over the whole split, put in order.
    """

    def read(folder: Path, loader: str, size: str = "96x144") -> tuple[np.ndarray, np.ndarray]:
        _, specs = open_specs(str(folder), splits=("train",), size=size)
        spec, _ = choose_loader(loader, specs["train"])
        count = len(spec.pairs)
        evaluated = list(evaluation_batches(spec, count, resize_labels=True))
        plan = Plan(num_samples=count, batch=count, seed=0, mirror=False, max_shift=(0, 0))
        source = TrainSource(spec, plan)
        batch = next(iter(source))
        source.check()
        order = np.argsort(batch.indices)
        images, labels = batch.images.numpy()[order], batch.labels.numpy()[order]
        np.testing.assert_array_equal(images, np.concatenate([part.images.numpy() for part in evaluated]))
        np.testing.assert_array_equal(labels, np.stack([label.numpy() for part in evaluated for label in part.labels]))
        return images, labels

    return read
