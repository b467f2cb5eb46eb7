"""`fastseg bench`: what it measures, row by row, on inputs that take no time. No figure here is a speed."""

import importlib.util
import json
from types import SimpleNamespace

import pytest
import torch

from fastseg import bench
from fastseg.bench import data as bench_data
from fastseg.bench import model as bench_model
from fastseg.errors import UsageError
from fastseg.model import SegNet

KEYS = {"name", "unit", "value", "n", "p20", "p80"}


@pytest.fixture
def threads():
    """A bench sets torch's threads; other tests keep theirs."""
    before = torch.get_num_threads()
    yield
    torch.set_num_threads(before)


def check(document: dict, rounds: int) -> None:
    """What holds for every bench's document."""
    assert list(document) == ["schema", "environment", "results", "ratios"]
    assert json.loads(json.dumps(document, allow_nan=False)) == document
    for row in document["results"]:
        assert row.keys() == KEYS
        assert row["n"] in (1, rounds)
    for row in document["ratios"]:
        assert row.keys() == KEYS - {"unit"}
        assert row["n"] == rounds
    for row in document["results"] + document["ratios"]:
        assert 0 < row["p20"] <= row["value"] <= row["p80"]


def test_a_bench_that_does_not_exist_is_refused():
    with pytest.raises(UsageError, match=r"^bench kernels: choose one of data, model, all$"):
        bench.run("kernels", data="synth", size=(32, 48), batch=2, rounds=3, device="cpu")


@pytest.mark.parametrize("loaders", [("dali", "torchvision"), ("torchvision",)])
def test_the_data_path_is_measured_tier_by_tier(street, monkeypatch, threads, loaders):
    if "dali" in loaders:
        pytest.importorskip("nvidia.dali")
    else:
        monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    monkeypatch.setattr(bench_data, "SECONDS", 0.05)
    found = bench.run("data", data=str(street), size=(32, 48), batch=2, rounds=3, device="cpu")
    check(found, 3)
    assert [(r["name"], r["unit"], r["n"]) for r in found["results"]] == [
        (f"data {loader} 32x48", "img/s", 3) for loader in loaders
    ]
    assert [r["name"] for r in found["ratios"]] == ["data dali / torchvision"] * (len(loaders) - 1)


def test_a_measurement_counts_whole_batches(monkeypatch):
    # A clock that moves by 0.4 s a look, against 1 s: looks at 0 (start), 0.4, 0.8, 1.2; two batches of 4 in 1.2 s.
    clock = iter(range(100))
    monkeypatch.setattr(bench_data.time, "perf_counter", lambda: next(clock) * 0.4)
    monkeypatch.setattr(bench_data, "SECONDS", 1.0)
    batch = bench_data.Batch(torch.zeros(4, 3, 2, 2), torch.zeros(4, 2, 2), None)
    assert bench_data._images_per_second(iter([batch] * 9), 4)() == pytest.approx(8 / 1.2)


def test_the_step_is_measured_in_both_precisions(monkeypatch, threads):
    # bf16 is emulated on many CPUs: slow, but it shows the second precision and the ratio.
    monkeypatch.setattr(bench_model, "choose_dtype", lambda *_: (torch.bfloat16, "as asked"))
    monkeypatch.setattr(bench_model, "SegNet", lambda classes: SegNet(classes, depth=1))
    found = bench.run("model", data="", size=(32, 32), batch=2, rounds=3, device="cpu")
    check(found, 3)
    # Convolutions 3-64-64 down, 64-64-11 up; three batch norms and 11 biases. Per image and convolution 6 * 9 * in *
    # out * pixels, less the gradient for the image.
    weights = 3 * 64 + 2 * 64 * 64 + 64 * 11
    work = (54 * weights - 18 * 3 * 64) * 32**2 / 1e9
    assert [(r["name"], r["unit"], r["value"]) for r in found["results"] if r["n"] == 1] == [
        ("model parameters", "", 9 * weights + 3 * 2 * 64 + 11),
        ("model work 32x32, forward+backward", "GFLOP/img", pytest.approx(work, rel=1e-12)),
    ]
    measured = {(r["name"], r["unit"]): r["value"] for r in found["results"] if r["n"] == 3}
    names = [f"train step {dtype} 32x32 batch 2" for dtype in ("float32", "bfloat16")]
    assert measured.keys() == {(name, unit) for name in names for unit in ("img/s", "GFLOP/s")}
    for name in names:
        assert measured[name, "GFLOP/s"] == pytest.approx(measured[name, "img/s"] * work, rel=1e-6)
    assert [r["name"] for r in found["ratios"]] == ["train step bfloat16 / float32"]


def test_the_whole_network_is_counted_at_its_published_size_and_work(monkeypatch, threads):
    # Steps that claim 2 images per second, so that nothing is computed.
    monkeypatch.setattr(bench_model, "_Step", lambda *_: SimpleNamespace(images_per_second=lambda: 2.0))
    monkeypatch.setattr(bench_model, "choose_dtype", lambda *_: (torch.float32, "as asked"))
    found = bench.run("model", data="", size=(360, 480), batch=1, rounds=3, device="cpu")
    check(found, 3)
    assert [(r["unit"], r["value"]) for r in found["results"]] == [
        ("", 29_441_419),
        ("GFLOP/img", pytest.approx(639.7, rel=1e-3)),
        ("img/s", 2.0),
        ("GFLOP/s", pytest.approx(2 * 639.7, rel=1e-3)),
    ]
    assert found["ratios"] == []
