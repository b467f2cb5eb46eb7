"""`fastseg bench scaling`: points, efficiencies and the expectation, worked by hand. The README's test runs it."""

import subprocess

import pytest

from fastseg import bench
from fastseg.bench import scaling
from fastseg.bench.harness import Found
from fastseg.errors import FastsegError, UsageError


def test_a_step_waits_for_what_does_not_fit_beside_the_backward_pass():
    # 8 processes send 2 * 7 / 8 = 1.75 of each byte. 100 bytes at 100 bytes/s: 1.75 s, of which 2/3 of a second fit.
    assert scaling.expected_step(1.0, 8, 100, 100.0, 25) == pytest.approx(1 + 1.75 - 2 / 3)
    # A link ten times faster: all fits but the last bucket, a quarter.
    assert scaling.expected_step(1.0, 8, 100, 1000.0, 25) == pytest.approx(1 + 0.25 * 0.175)
    assert scaling.expected_step(1.0, 2, 100, 1000.0, 200) == pytest.approx(1 + 0.1)  # a bucket holds all of it
    assert scaling.expected_step(1.0, 1, 100, 1.0, 25) == 1.0


def test_the_prediction_names_its_assumptions_and_is_below_the_ideal():
    *assumed, one, eight, efficiency, published = scaling.expectation((360, 480), 4)
    assert [(row["value"], row["unit"]) for row in assumed] == [(50, "%"), (450, "GB/s"), (4 * 29.441419, "MB")]
    assert all(row["name"].startswith("assumed for the prediction: ") for row in assumed)
    for row in (one, eight, efficiency):
        assert row["name"].startswith("PREDICTED: ")
        assert "H100" in row["name"]
    assert one["value"] < eight["value"] < 8 * one["value"]
    assert efficiency["value"] == pytest.approx(100 * eight["value"] / one["value"] / 8)
    # At least the 639.7 GFLOP of an image at half of 989 TFLOP/s.
    assert one["value"] < 0.5 * 989.4e12 / 639.7e9
    assert published["value"] == 3.25


def test_a_document_names_what_was_there_when_it_began(monkeypatch):
    commits = ["before"]
    monkeypatch.setattr(bench, "environment", lambda: {"commit": commits[-1]})
    monkeypatch.setattr(bench.bench_scaling, "measure", lambda **_: commits.append("meanwhile") or Found([], []))
    assert bench.run("scaling", data="x", size=(48, 72), batch=4, rounds=3, device="cpu")["environment"] == {
        "commit": "before"
    }


def test_points_are_measured_once_and_compared_with_one_process(monkeypatch):
    speeds = {(1, 4): [10.0, 12.0, 11.0], (2, 4): [20.0, 18.0, 19.0], (4, 4): None, (1, 16): None, (2, 8): [24.0, 26.0]}
    calls = []

    def train(options, steps, log_every):
        given = dict(zip(options[::2], options[1::2], strict=True))
        assert (given["--size"], given["--device"], steps, log_every) == ("48x72", "cpu", 2 + 3, 1)
        calls.append((int(given["--nproc"]), int(given["--batch"])))
        return speeds[calls[-1]]

    monkeypatch.setattr(scaling, "train", train)
    found = bench.run("scaling", data="x", size=(48, 72), batch=4, rounds=3, device="cpu", counts=(1, 2, 4))
    assert found["results"][0]["name"] == "all processes share these, which is no evidence for GPUs"
    assert calls == [(1, 4), (2, 4), (4, 4), (1, 16), (2, 8)]  # the last one of strong scaling is known
    rows = {row["name"]: row["value"] for row in found["results"] if row["name"].startswith("scaling")}
    assert rows == {
        "scaling weak 48x72, 1 x batch 4": 11.0,
        "scaling weak 48x72, 1 x batch 4, per process": 11.0,
        "scaling weak 48x72, 2 x batch 4": 19.0,
        "scaling weak 48x72, 2 x batch 4, per process": 9.5,
        "scaling weak 48x72, 2 x batch 4, efficiency": pytest.approx(100 * 19 / 22),
        "scaling weak 48x72, 4 x batch 4: out of memory": 0,
        "scaling strong 48x72, 1 x batch 16: out of memory": 0,
        "scaling strong 48x72, 2 x batch 8": 25.0,
        "scaling strong 48x72, 2 x batch 8, per process": 12.5,
        "scaling strong 48x72, 4 x batch 4: out of memory": 0,
    }
    assert [(curve["x"], curve["y"]) for curve in found["series"]] == [
        ({"processes": [1, 2]}, {"measured": [11.0, 19.0], "ideal": [11.0, 22.0]}),
        ({"processes": [2]}, {"measured": [25.0], "ideal": [25.0]}),
    ]


@pytest.mark.parametrize("counts", [(2, 4), (1, 1), (1, 4, 2)])
def test_numbers_of_processes_begin_with_one_and_ascend(counts):
    with pytest.raises(UsageError, match=r"^bench scaling: [\d,]+: give ascending numbers from 1 on: 1,2,4$"):
        bench.run("scaling", data="x", size=(48, 72), batch=4, rounds=3, device="cpu", counts=counts)


def test_a_run_that_fails_ends_the_bench_with_its_last_line():
    with pytest.raises(FastsegError, match=r"^bench scaling: --data /nowhere: /nowhere: no folder"):
        scaling.train(["--data", "/nowhere"], 3, 1)


def test_a_run_without_memory_is_a_point_without_a_figure(monkeypatch):
    ended = subprocess.CompletedProcess([], 1, "", "fastseg: OutOfMemoryError: CUDA out of memory. Tried to allocate\n")
    monkeypatch.setattr(scaling.subprocess, "run", lambda *_, **__: ended)
    assert scaling.train([], 3, 1) is None
