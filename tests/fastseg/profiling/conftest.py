"""A report of Nsight Systems, made up by its documented schema: the tool itself cannot be had on every machine."""

import sqlite3
from pathlib import Path

import pytest

# https://docs.nvidia.com/nsight-systems/2021.5/nsys-exporter/exported_data.html, with the columns that matter.
SCHEMA = """
CREATE TABLE StringIds (id INTEGER PRIMARY KEY, value TEXT NOT NULL);
CREATE TABLE NVTX_EVENTS (start INTEGER NOT NULL, end INTEGER, eventType INTEGER NOT NULL, rangeId INTEGER,
    category INTEGER, color INTEGER, text TEXT, globalTid INTEGER, endGlobalTid INTEGER, textId INTEGER,
    domainId INTEGER);
CREATE TABLE CUPTI_ACTIVITY_KIND_RUNTIME (start INTEGER NOT NULL, end INTEGER NOT NULL, eventClass INTEGER NOT NULL,
    globalTid INTEGER, correlationId INTEGER, nameId INTEGER NOT NULL, returnValue INTEGER NOT NULL);
CREATE TABLE CUPTI_ACTIVITY_KIND_KERNEL (start INTEGER NOT NULL, end INTEGER NOT NULL, deviceId INTEGER NOT NULL,
    contextId INTEGER NOT NULL, streamId INTEGER NOT NULL, correlationId INTEGER, globalPid INTEGER,
    demangledName INTEGER NOT NULL, shortName INTEGER NOT NULL);
CREATE TABLE CUPTI_ACTIVITY_KIND_MEMCPY (start INTEGER NOT NULL, end INTEGER NOT NULL, deviceId INTEGER NOT NULL,
    contextId INTEGER NOT NULL, streamId INTEGER NOT NULL, correlationId INTEGER, globalPid INTEGER,
    bytes INTEGER NOT NULL, copyKind INTEGER NOT NULL);
"""
PROCESS = 7 << 24  # globalPid; a globalTid adds the thread to it


@pytest.fixture
def nsys_report(tmp_path) -> Path:
    """Two steps of 10 ms: a copy, a kernel of the forward pass, one of NCCL beside another, an idle end."""
    ms, path = 1_000_000, tmp_path / "made-up.sqlite"
    database = sqlite3.connect(path)
    database.executescript(SCHEMA)
    names = [
        "fastseg/backward",
        "sm80_xmma_fprop_implicit_gemm_tensor16x8x16",
        "ncclDevKernel_AllReduce_Sum_f32_RING_LL",
    ]
    names += ["void cudnn::ops::nchwToNhwcKernel<float>", "cudaLaunchKernel", "sgd_kernel"]
    database.executemany("INSERT INTO StringIds VALUES (?, ?)", enumerate(names, 1))

    def nvtx(start: int, end: int | None, text: str | None, text_id: int | None = None, kind: int = 59) -> None:
        row = (start, end, kind, None, None, None, text, PROCESS + 1, None, text_id, 0)
        database.execute("INSERT INTO NVTX_EVENTS VALUES (?, ?, ?, ?, ?, ?, ?, ?, ?, ?, ?)", row)

    def launch(correlation: int, at: int, process: int = PROCESS, thread: int = 1) -> None:
        row = (at, at + 1000, 0, process + thread, correlation, 5, 0)
        database.execute("INSERT INTO CUPTI_ACTIVITY_KIND_RUNTIME VALUES (?, ?, ?, ?, ?, ?, ?)", row)

    def kernel(correlation: int, start: int, end: int, name: int, stream: int = 7) -> None:
        row = (start, end, 0, 1, stream, correlation, PROCESS, name, name)
        database.execute("INSERT INTO CUPTI_ACTIVITY_KIND_KERNEL VALUES (?, ?, ?, ?, ?, ?, ?, ?, ?)", row)

    for step in range(2):
        t, c = step * 10 * ms, 100 * step
        nvtx(t, t + 10 * ms, f"fastseg/step {step + 6}")
        nvtx(t, t + 2 * ms, "fastseg/forward")
        nvtx(t, t + ms, "fastseg/encoder 1")
        nvtx(t + 2 * ms, t + 5 * ms, None, text_id=1)
        nvtx(t + 5 * ms, t + 9 * ms, "fastseg/data wait")
        nvtx(t, t + 3 * ms, "somebody else's")
        nvtx(t + ms, None, "fastseg/a mark", kind=34)
        row = (t, t + ms, 0, 1, 7, c + 1, PROCESS, 4_000_000, 1)
        launch(c + 1, t)
        database.execute("INSERT INTO CUPTI_ACTIVITY_KIND_MEMCPY VALUES (?, ?, ?, ?, ?, ?, ?, ?, ?)", row)
        launch(c + 2, t + ms // 2)
        kernel(c + 2, t + ms, t + 4 * ms, name=2)
        # Backward: launched by autograd's own thread.
        launch(c + 3, t + 3 * ms, thread=2)
        kernel(c + 3, t + 4 * ms, t + 5 * ms, name=4)
        launch(c + 4, t + 3 * ms + 1, thread=2)
        kernel(c + 4, t + 4 * ms, t + 6 * ms, name=3, stream=20)
    # Another process has the same correlation numbers.
    launch(2, 9 * ms, process=8 << 24)
    database.commit()
    database.close()
    return path
