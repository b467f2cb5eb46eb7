"""Reading what profilers wrote: a report of Nsight Systems made by its documented schema, a trace of torch's format."""

import json
import sqlite3

import pytest

from fastseg.errors import FastsegError
from fastseg.profiling.timeline import Span, Work, from_chrome, from_nsys


def test_a_report_of_nsight_systems(nsys_report):
    found = from_nsys(nsys_report)
    assert found.steps == [Span("step 6", 0, 10_000), Span("step 7", 10_000, 20_000)]
    first = [span for span in found.ranges if span.start < 10_000]
    assert first == [
        Span("forward", 0, 2000),
        Span("encoder 1", 0, 1000),
        Span("backward", 2000, 5000),
        Span("data wait", 5000, 9000),
    ]
    assert found.work[0] == Work("Memcpy HtoD", 0, 1000, 0, "HtoD", 4_000_000)
    assert found.work[1] == Work("sm80_xmma_fprop_implicit_gemm_tensor16x8x16", 1000, 4000, 500)
    assert {work.name for work in found.work[2:4]} == {
        "void cudnn::ops::nchwToNhwcKernel<float>",
        "ncclDevKernel_AllReduce_Sum_f32_RING_LL",
    }
    assert len(found.work) == 8
    assert found.operators == []


def test_a_report_without_a_gpu_has_no_such_tables(nsys_report):
    with sqlite3.connect(nsys_report) as database:
        for table in ("RUNTIME", "KERNEL", "MEMCPY"):
            database.execute(f"DROP TABLE CUPTI_ACTIVITY_KIND_{table}")
    found = from_nsys(nsys_report)
    assert ([step.name for step in found.steps], found.work) == (["step 6", "step 7"], [])


def test_what_is_no_report_or_has_no_step_is_named(nsys_report, tmp_path):
    path = tmp_path / "rank0.sqlite"
    path.write_bytes(b"not a database" * 100)
    with pytest.raises(FastsegError, match=rf"^{path}: no SQLite export of Nsight Systems"):
        from_nsys(path)
    with sqlite3.connect(nsys_report) as database:
        database.execute("DELETE FROM NVTX_EVENTS")
    with pytest.raises(FastsegError, match="no step was recorded"):
        from_nsys(nsys_report)


def test_a_trace_of_torchs_profiler(tmp_path):
    def event(cat: str, name: str, ts: float, dur: float, **args: object) -> dict:
        return {"ph": "X", "cat": cat, "name": name, "pid": 1, "tid": 1, "ts": ts, "dur": dur, "args": args}

    events = [
        {"ph": "M", "name": "process_name", "pid": 1},
        event("user_annotation", "fastseg/step 6", 100.5, 50),
        event("user_annotation", "fastseg/forward", 101, 20),
        event("user_annotation", "Optimizer.step#SGD.step", 130, 5),
        event("cpu_op", "aten::conv2d", 102, 10),
        event("cpu_op", "aten::relu", 200, 10),  # after the step
        event("cuda_runtime", "cudaLaunchKernel", 103, 1, correlation=5),
        event("kernel", "sgd_kernel", 110, 8, correlation=5),
        event("gpu_memcpy", "Memcpy HtoD (Pageable -> Device)", 104, 4, correlation=6, bytes=1000),
        event("gpu_user_annotation", "fastseg/forward", 110, 8),
    ]
    path = tmp_path / "rank0.json"
    path.write_text(json.dumps({"traceEvents": events}))
    found = from_chrome(path)
    assert found.steps == [Span("step 6", 100.5, 150.5)]
    assert found.ranges == [Span("forward", 101, 121)]
    assert found.operators == [(1, Span("aten::conv2d", 102, 112))]
    copy = Work("Memcpy HtoD (Pageable -> Device)", 104, 108, 104, "HtoD", 1000)
    assert found.work == [copy, Work("sgd_kernel", 110, 118, 103)]
