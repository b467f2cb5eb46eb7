"""Faults that users of such tools have met: each row of docs/faults.md is a test, and what fastseg says comes from it.

`FASTSEG_UPDATE_FAULTS=1 pytest tests/faults` writes the table anew; otherwise each test compares its row with it.
"""

import os
import re
from pathlib import Path

import pytest

TABLE = Path(__file__).parents[2] / "docs" / "faults.md"
HEAD = """# What fastseg says to faults

Each row is a test of `tests/faults`, and the table is written by `FASTSEG_UPDATE_FAULTS=1 pytest tests/faults`.
Numbers and names are those of the tests.

| fault | fastseg says, or does | cure |
|---|---|---|
"""
ROWS: dict[str, list[str]] = {}  # by test file, in the order of its tests


UPDATE = bool(os.environ.get("FASTSEG_UPDATE_FAULTS"))


def pytest_sessionfinish():
    if UPDATE:
        TABLE.write_text(HEAD + "".join(line for file in sorted(ROWS) for line in ROWS[file]), encoding="utf-8")


@pytest.fixture
def row(request, tmp_path):
    """row(fault, says, cure) states a row of the table; paths of the test's folder are shortened.

    `says` is a message as it came, from which what differs from run to run has been taken; or what was asserted.
    """

    def state(fault: str, says: str, cure: str = "-") -> None:
        says = says.strip().replace(f"{tmp_path}/", "")
        line = "| " + " | ".join(re.sub(r"\s*\n\s*", " ", cell).replace("|", "\\|") for cell in (fault, says, cure)) + " |\n"
        if UPDATE:
            ROWS.setdefault(str(request.path), []).append(line)
        else:
            assert line in TABLE.read_text(encoding="utf-8"), "FASTSEG_UPDATE_FAULTS=1 pytest tests/faults writes it"

    return state
