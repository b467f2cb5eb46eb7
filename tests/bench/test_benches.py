"""`fastseg bench`: what it measures, row by row, on inputs that take no time. No figure here is a speed."""

import functools
import importlib.util
import itertools
import json
import os
import re
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import jsonschema
import pytest
import torch

from fastseg import bench
from fastseg.bench import data as bench_data
from fastseg.bench import drill, harness, peers, roofline
from fastseg.bench import host as bench_host
from fastseg.bench import kernels as bench_kernels
from fastseg.bench import ladder as bench_ladder
from fastseg.bench import model as bench_model
from fastseg.bench.peers import plain_step
from fastseg.config import Model
from fastseg.data.layouts import find
from fastseg.data.split import apply
from fastseg.data.synth import write
from fastseg.distributed import Precision, choose_dtype
from fastseg.errors import FastsegError, UsageError
from fastseg.model import SegNet
from fastseg.network import build

KEYS = {"name", "unit", "value", "n", "p20", "p80"}
SCHEMA = json.loads((Path(bench.__file__).parent / "records" / "schema.json").read_text())


@pytest.fixture
def threads():
    """A bench sets torch's threads; other tests keep theirs."""
    before = torch.get_num_threads()
    yield
    torch.set_num_threads(before)


def check(document: dict, rounds: int) -> None:
    """What holds for every bench's document."""
    assert list(document) == ["schema", "environment", "protocol", "results", "ratios", "series"]
    assert json.loads(json.dumps(document, allow_nan=False)) == document
    jsonschema.validate(document, SCHEMA)
    for row in document["results"]:
        assert row.keys() == KEYS
        assert row["n"] in (1, rounds)
    for row in document["ratios"]:
        assert row.keys() - {"better"} == KEYS - {"unit"}
        assert row["n"] == rounds
    for row in document["results"] + document["ratios"]:
        assert 0 < row["p20"] <= row["value"] <= row["p80"]


def test_a_bench_that_does_not_exist_is_refused():
    with pytest.raises(UsageError, match=r"^bench gpu: choose one of ladder, data, .*, compare, all$"):
        bench.run("gpu", data="synth", size=(32, 48), batch=2, rounds=3, device="cpu")


@pytest.mark.parametrize("with_dali", [True, False])
def test_the_data_path_is_measured_tier_by_tier_and_against_peers(street, monkeypatch, threads, with_dali):
    if with_dali:
        pytest.importorskip("nvidia.dali")
    else:
        monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    monkeypatch.setattr(bench_data, "SECONDS", 0.05)
    monkeypatch.setattr(bench_data, "numbers_of_workers", lambda cores: [0])
    taken: list[int] = []
    monkeypatch.setattr(bench_data, "memory_of", lambda make, count, seconds: taken.append(count) or 12.5)
    found = bench.run("data", data=str(street), size=(96, 144), batch=2, rounds=3, device="cpu")
    check(found, 3)
    others = [f"{name}, 0 workers" for name in peers.available()[0]]
    tiers = ["dali", "cache", "reference", "dali, decoding alone"] if with_dali else ["reference", "cache"]
    rates = [row["name"] for row in found["results"] if row["unit"] == "img/s" and "best" not in row["name"]]
    ours = [tier for tier in tiers if "alone" not in tier]
    varied = [f"{tier}, {variant}" for tier in ours for variant in ("jittered", "1 thread", "batch 8")]
    decoding = [tier for tier in tiers if tier not in ours]
    assert rates == [f"data {name} 96x144" for name in [*ours, *others, *decoding, "copying", *varied]]
    rates.remove("data copying 96x144")
    costs = [row["name"] for row in found["results"] if row["unit"] == "ms/img"]
    assert costs == [f"{name}, CPU" for name in rates]
    memory = {row["name"]: row["value"] for row in found["results"] if row["unit"] == "MiB"}
    assert memory == {f"{name}, memory": 12.5 for name in rates}
    # 8 images of the training split in batches of 2, where they are all kept.
    assert taken == [4 if "cache" in name else bench_data.SETTLED for name in rates]
    assert found["protocol"]["minutes"] == 3
    assert found["protocol"].keys().isdisjoint({"left_out", "format", "took_minutes"})
    (best,) = [row for row in found["results"] if row["name"].startswith("data best peer: ")]
    assert best["value"] == max(row["value"] for row in found["results"] if row["name"].endswith("0 workers 96x144"))
    ratios = [f"{tier}_vs_best_{other}" for other in ("peer", "dataloader") for tier in ours]
    ratios += ["data dali / reference"] * with_dali + ["data cache / copying"]
    ratios += [f"data {tier}, jittered / {tier}" for tier in ours]
    assert [row["name"] for row in found["ratios"]] == ratios


@pytest.fixture
def brief(monkeypatch):
    """brief(**options) -> the document of `bench data` on 8 small images, with short measurements."""
    monkeypatch.setattr(bench_data, "SECONDS", 0.02)

    def run(data, **options) -> dict:
        return bench.run("data", data=str(data), size="96x144", batch=2, rounds=3, device="cpu", **options)

    return run


def names(found: dict, unit: str) -> list[str]:
    """Of the rows with that unit, without what all names have."""
    rows = [row["name"] for row in found["results"] if row["unit"] == unit and "best" not in row["name"]]
    return [name.removeprefix("data ").replace(" 96x144", "") for name in rows]


def test_without_time_there_are_three_rounds_of_what_tells_most_and_the_rest_is_named(
    street, monkeypatch, threads, brief, capsys
):
    monkeypatch.setattr(bench_data, "numbers_of_workers", lambda cores: [1, 0])
    monkeypatch.setattr(bench_data, "FILLING", 1e6)
    found = brief(street, minutes=0.001)
    check(found, 3)
    likely = [f"{name}, 1 workers" for name in peers.available()[0]]
    tiers = [name for name in names(found, "img/s") if "," not in name]
    assert set(tiers) in ({"dali", "cache", "reference"}, {"cache", "reference"})
    assert names(found, "img/s") == [*tiers, *likely]
    left_out = found["protocol"]["left_out"]
    assert set(left_out.values()) == {"no time was left"}
    assert {"copying", "torchvision DataLoader, 0 workers", "cache, 1 thread", "cache, batch 8"} <= left_out.keys()
    assert {f"{name}, memory" for name in [*tiers, *likely]} <= left_out.keys()
    assert not left_out.keys() & set(names(found, "img/s"))
    assert [row["name"] for row in found["ratios"] if " / " in row["name"]] == ["data dali / reference"] * (
        "dali" in tiers
    )
    assert found["protocol"]["took_minutes"] >= found["protocol"]["minutes"] == 0.001
    said = capsys.readouterr().err.splitlines()
    assert said[0] == f"bench data: left out: {'; '.join(left_out)}: no time was left"
    assert re.fullmatch(r"bench data: took [0-9.]+ minutes, not 0.001: .* 3 rounds of the first cases", said[1])


def test_a_cache_that_takes_too_long_to_fill_is_left_out(street, monkeypatch, threads, brief):
    monkeypatch.setattr(bench_data, "numbers_of_workers", lambda cores: [0])
    monkeypatch.setattr(bench_data, "FILLING", 0.0)
    found = brief(street, quick=True)
    assert found["protocol"]["left_out"] == {"cache": "to decode each image once takes too long"}
    assert not [row for row in found["results"] + found["ratios"] if "cache" in row["name"]]


def test_a_peer_that_fails_is_left_out_and_gives_no_ratio(street, monkeypatch, threads, brief, capsys):
    def stuck(pairs, size, batch, workers):
        raise RuntimeError("DataLoader timed out after 30 seconds")
        yield

    monkeypatch.setattr(bench_data, "numbers_of_workers", lambda cores: [0])
    monkeypatch.setattr(peers, "available", lambda: ({"torchvision DataLoader": stuck}, {}))
    found = brief(street, quick=True)
    why = "RuntimeError: DataLoader timed out after 30 seconds"
    assert found["protocol"]["left_out"] == {"torchvision DataLoader, 0 workers": why}
    assert capsys.readouterr().err == f"bench data: left out: torchvision DataLoader, 0 workers: {why}\n"
    assert not [row for row in found["results"] + found["ratios"] if "best" in row["name"]]
    assert "cache" in names(found, "img/s")


def test_workers_whose_batches_do_not_fit_into_shared_memory_are_left_out(street, monkeypatch, threads, brief, capsys):
    # A batch: 2 images of 96 x 144 pixels, 13 bytes each, makes 359,424. Two workers make 2 * 2 + 1 of them, 1.7 MiB,
    # and one worker 3, 1.03 MiB; 16 MiB more are to stay free.
    monkeypatch.setattr(bench_data, "numbers_of_workers", lambda cores: [2, 1, 0])
    monkeypatch.setattr(peers, "shared_memory", lambda: (64 << 20, int(17.5 * 2**20)))
    found = brief(street, quick=True)
    loaders = [name for name in peers.available()[0] if "DataLoader" in name]
    left_out = found["protocol"]["left_out"]
    assert list(left_out) == [f"{name}, 2 workers" for name in loaders]
    measured = names(found, "img/s")
    assert {f"{name}, {workers} workers" for name in loaders for workers in (0, 1)} <= set(measured)
    assert ("SPDL, 2 workers" in measured) == ("SPDL" in peers.available()[0])  # its workers are threads
    why = "/dev/shm has 17 MiB free, the batches of their workers take 18 MiB (docker run --shm-size=1g)"
    assert capsys.readouterr().err == f"bench data: left out: {'; '.join(left_out)}: {why}\n"


def test_what_workers_take_of_shared_memory_is_reckoned_by_the_most_of_them(monkeypatch):
    # 4 images of 512 x 1024 pixels, 13 bytes each, are 26 MiB; 16 workers make 2 * 16 + 1: 858 MiB, and 16 more.
    monkeypatch.setattr(peers, "shared_memory", lambda: (1 << 30, 100 << 20))
    short = bench_data.without_room((512, 1024), 4, [16, 8, 1, 0])
    assert list(short) == [16, 8]  # one worker needs 3 * 26 + 16 MiB
    assert set(short.values()) == {
        # 924 MiB of the GiB are taken: with 874 more that makes 1.76 GiB.
        "/dev/shm has 100 MiB free, the batches of their workers take 874 MiB (docker run --shm-size=2g)"
    }
    monkeypatch.setattr(peers, "shared_memory", lambda: None)
    assert bench_data.without_room((512, 1024), 4, [16, 8, 1, 0]) == {}


def test_peers_have_as_many_workers_as_there_are_cores_half_as_many_and_none():
    assert [bench_data.numbers_of_workers(cores) for cores in (1, 2, 16)] == [[1, 0], [2, 1, 0], [16, 8, 0]]


def test_photos_in_jpeg_are_drawn_once_and_measured_at_their_own_size(tmp_path, monkeypatch, threads, capsys):
    monkeypatch.setenv("FASTSEG_DATA", str(tmp_path))
    monkeypatch.setattr(bench_data, "SECONDS", 0.02)
    monkeypatch.setattr(bench_data, "numbers_of_workers", lambda cores: [0])
    monkeypatch.setattr(bench_data, "JPEG_COUNTS", {"train": 3, "val": 1})
    monkeypatch.setattr(bench_data, "JPEG_SIZE", (192, 288))
    monkeypatch.setattr(bench_data, "JPEG_INPUT", "96x144")
    options = {"data": "synth", "size": None, "batch": 2, "rounds": 3, "device": "cpu", "quick": True}
    found = bench.run("data", image_format="jpeg", **options)
    check(found, 3)
    assert {key: found["protocol"][key] for key in ("data", "format", "size")} == {
        "data": "synth", "format": "jpeg", "size": "96x144",
    }  # fmt: skip
    tiers = {"cache", "reference"} | ({"dali"} if "dali" in names(found, "img/s") else set())
    assert tiers | {f"{name}, 0 workers" for name in peers.available()[0]} <= set(names(found, "img/s"))
    (folder,) = tmp_path.iterdir()
    (first, *_) = drawn = sorted(folder.rglob("*.jpg"))
    assert len(drawn) == 4
    before = first.stat().st_mtime_ns
    bench.run("data", image_format="jpeg", **options)
    assert first.stat().st_mtime_ns == before


@pytest.mark.parametrize(
    ("what", "options", "message"),
    [
        ("data", {"image_format": "gif"}, "--format gif: choose one of png, jpeg"),
        ("data", {"image_format": "png", "data": "camvid"}, "--format png: is of bench data --data synth"),
        ("model", {"image_format": "jpeg"}, "--format jpeg: is of bench data --data synth"),
        ("model", {"minutes": 2.0}, "--minutes 2: more than 0, and of bench data or all, not of bench model"),
        ("", {"minutes": 2.5}, "--minutes 2.5: more than 0, and of bench data or all, not of bench alone"),
        ("data", {"minutes": 0.0}, "--minutes 0: more than 0, and of bench data or all"),
    ],
)
def test_options_of_the_data_bench_are_refused_elsewhere(what, options, message):
    with pytest.raises(UsageError, match=f"^{re.escape(message)}"):
        bench.run(what, **{"data": "synth", "size": (32, 48), "batch": 2, "rounds": 3, "device": "cpu"} | options)


def hoard(mib: int):
    """Batches of nothing, from somebody who keeps that much memory and a child process with as much."""
    code = f"kept = bytearray(b'1' * ({mib} << 20)); print(flush=True); input()"
    with subprocess.Popen([sys.executable, "-c", code], stdin=subprocess.PIPE, stdout=subprocess.PIPE) as child:
        kept = bytearray(b"1" * (mib << 20))
        child.stdout.readline()
        try:
            while True:
                yield kept, kept
        finally:
            child.communicate(b"\n")


def test_the_plain_loops_network_is_ours():
    plain, ours = plain_step.PlainSegNet(11), SegNet(11)
    weights = list(ours.state_dict().values())
    assert [w.shape for w in plain.state_dict().values()] == [w.shape for w in weights]
    plain.load_state_dict(dict(zip(plain.state_dict(), weights, strict=True)))
    images = torch.randn(1, 3, 45, 62)
    torch.testing.assert_close(plain.eval()(images), ours.eval()(images), rtol=1e-4, atol=1e-4)


@pytest.mark.skipif(sys.platform != "linux", reason="/proc")
def test_memory_is_that_of_a_fresh_process_and_its_workers():
    found = bench_data.memory_of(functools.partial(hoard, 64), 2)
    assert 2 * 64 < found < 2 * 64 + 32  # and the child's interpreter


def test_memory_that_cannot_be_measured_is_an_error():
    with pytest.raises(FastsegError, match=r"^bench data: a process that measures memory ended with code 1$"):
        bench_data.memory_of(functools.partial(hoard, "no number"), 2)


@pytest.mark.skipif(sys.platform != "linux", reason="/proc")
def test_a_process_that_measures_memory_and_does_not_end_is_killed_and_costs_one_row(monkeypatch):
    with pytest.raises(FastsegError, match=r"^bench data: a process that measures memory had not ended after 0 s$"):
        bench_data.memory_of(functools.partial(hoard, 1), 10**9, 0.1)
    asked = []

    def memory_of(make, count, seconds):
        asked.append(make)
        if make == "hangs":
            raise FastsegError("bench data: it had not ended")
        return 2.5

    monkeypatch.setattr(bench_data, "memory_of", memory_of)
    cases = {name: bench_data.Case(name, 1, 1.0) for name in ("hangs", "a")}
    left_out: dict[str, str] = {}
    rows = bench_data.memory_rows(cases, bench_data.time.perf_counter() + 100, "8x8", left_out)
    assert [(row["name"], row["value"]) for row in rows] == [("data a 8x8, memory", 2.5)]
    assert left_out == {"hangs, memory": "it had not ended"}
    assert bench_data.memory_rows(cases, bench_data.time.perf_counter() - 1, "8x8", left_out) == []
    assert left_out == dict.fromkeys(("hangs, memory", "a, memory"), "no time was left")
    assert asked == ["hangs", "a"]


def test_a_streamed_epoch_is_measured_from_end_to_end(street, threads):
    found = bench.run("stream", data=str(street), size="96x144", batch=1, rounds=3, device="cpu")
    rate, *sizes = found["results"]
    assert (rate["n"], rate["unit"]) == (8, "img/s")
    name = rate["name"]
    assert name in ("stream dali 96x144", "stream reference 96x144")  # and never the cache
    assert [row["name"] for row in sizes] == [f"{name}, RSS after {n} images" for n in range(1, 9)]
    assert all(row["value"] > 50 for row in sizes)  # MiB: torch alone takes more
    assert [(row["name"], row["n"]) for row in found["ratios"]] == [(f"{name}, second half / first half", 4)]
    assert [curve["x"] for curve in found["series"]] == [{"images": list(range(1, 9))}] * 2
    assert [len(curve["y"]["measured"]) for curve in found["series"]] == [8, 8]


@pytest.mark.skipif(sys.platform != "linux", reason="/proc")
def test_a_streamed_epoch_takes_the_same_memory_at_its_end_as_at_its_middle(tmp_path):
    few, many = tmp_path / "few", tmp_path / "many"
    write(few, counts={"train": 8, "val": 1}, size=(256, 512))
    for folder in ("train", "trainannot"):
        (many / folder).mkdir(parents=True)
        for i in range(960):
            os.link(few / folder / f"Synth{i % 4:02}_f{i // 4 % 2:05}.png", many / folder / f"v_{i:03}.png")
    command = [sys.executable, "-m", "fastseg", "bench", "stream", "--data", str(many), "--size", "256x512", "--json"]
    plot = tmp_path / "stream.svg"
    found = json.loads(subprocess.run([*command, "--plot", plot], stdout=subprocess.PIPE, check=True).stdout)
    _, curve = found["series"]
    sizes = dict(zip(curve["x"]["images"], curve["y"]["measured"], strict=True))
    assert sizes[960] - sizes[480] < 80  # 240 MiB have been decoded in between
    assert plot.read_text().startswith("<?xml")


def test_curves_are_drawn_from_zero_with_their_names(tmp_path):
    one = {"name": "stream", "x": {"images": [4, 8, 12]}, "y": {"measured": [10.0, 11.0, 10.5]}}
    two = {"name": "weak", "x": {"processes": [1, 2]}, "y": {"measured": [9.0, 16.0], "ideal": [9.0, 18.0]}}
    path = tmp_path / "curves.svg"
    harness.plot(
        {**harness.document([], {}, {"gpus": None, "processor": "p", "threads": 2}), "series": [one, two]}, path
    )
    svg = path.read_text()
    assert "stroke-dasharray" in svg  # what is ideal
    assert all(f"<!-- {word} -->" in svg for word in ("stream", "images", "weak", "processes", "ideal"))
    assert svg.count("<!-- measured -->") == 1  # a legend where there is more than one line
    assert len(re.findall(r"<!-- 0(\.0+)? -->", svg)) == 4  # both axes of both panels


def test_curves_of_one_name_share_a_panel(tmp_path):
    one = {"name": "mIoU", "x": {"seconds": [4, 8]}, "y": {"fast": [0.25, 0.5]}}
    two = {"name": "mIoU", "x": {"seconds": [40, 80, 90]}, "y": {"plain": [0.125, 0.25, 0.25]}}
    path = tmp_path / "curves.svg"
    harness.plot(
        {**harness.document([], {}, {"gpus": None, "processor": "p", "threads": 2}), "series": [one, two]}, path
    )
    svg = path.read_text()
    assert [svg.count(f"<!-- {word} -->") for word in ("mIoU", "seconds", "fast", "plain")] == [1, 1, 1, 1]
    assert "stroke-dasharray: 5" not in svg  # both were measured


def test_a_measurement_counts_whole_batches_after_a_start_and_ends_what_it_began(monkeypatch):
    # A clock that moves by 0.4 s a look. To begin, 0.9 s: looks at 0 and 0.4, 0.8, 1.2 (two batches); then from 1.6 on
    # 2.7 s: looks at 2.0 .. 4.0, 4.4: six batches of 4 in 2.8 s.
    clock = iter(range(100))
    monkeypatch.setattr(bench_data.time, "perf_counter", lambda: next(clock) * 0.4)
    monkeypatch.setattr(bench_data, "cpu_seconds", iter([5.0, 17.0]).__next__)
    ended = []

    def batches():
        try:
            for _ in range(9):
                yield torch.zeros(4, 3, 2, 2), torch.zeros(4, 2, 2)
        finally:
            ended.append(True)

    case = bench_data.Case(batches, 4, 2.7)
    assert case() == pytest.approx(24 / 2.8)
    assert case.cpu_seconds == [12 / 24]
    assert ended == [True]


def test_the_cpu_time_of_child_processes_counts():
    before = bench_data.cpu_seconds()
    code = "import time\nwhile time.process_time() < 0.4: pass\nprint('spent', flush=True)\ninput()"
    with subprocess.Popen([sys.executable, "-c", code], stdin=subprocess.PIPE, stdout=subprocess.PIPE) as child:
        assert child.stdout.readline() == b"spent\n"
        assert child.pid in bench_data.children()
        assert bench_data.cpu_seconds() - before >= 0.35
        child.communicate(b"\n")


def precision(requested: str, device: str) -> Precision:
    """bf16 as the fastest, whatever this CPU does well."""
    return choose_dtype("bf16" if requested == "auto" else requested, device)


def small(monkeypatch) -> None:
    """Networks of one stage, and bf16 as the second precision: slow on many CPUs, but it shows the ratio."""
    for module in (bench_model, bench_ladder):
        monkeypatch.setattr(module, "choose_dtype", precision)
    for module in (bench_model, drill):
        monkeypatch.setattr(module, "SegNet", lambda classes, **options: SegNet(classes, depth=1, **options))
    monkeypatch.setattr(drill, "build", lambda model, *size, **options: build(Model(depth=1), *size, **options))
    monkeypatch.setattr(bench_model, "layers", functools.partial(roofline.layers, depth=1))


def test_several_benches_by_one_word(monkeypatch):
    ran = []
    for name in ("data", "host", "kernels", "ladder", "model", "scaling", "stream"):
        found = harness.Found([harness.exact(name, "", 1.0)], [])
        monkeypatch.setitem(bench.BENCHES, name, lambda found=found, **options: ran.append(options) or found)
    monkeypatch.setattr(bench.bench_scaling, "measure", bench.BENCHES["scaling"])
    for what, names in (
        ("", ["ladder", "scaling"]),
        ("all", ["ladder", "data", "kernels", "host", "model", "scaling"]),
    ):
        document = bench.run(what, data="synth", size=(8, 8), batch=1, rounds=5, device="cpu")
        assert [row["name"] for row in document["results"]] == names
    assert ran[1]["counts"] == (1,)


def test_processes_are_doubled_up_to_the_gpus_that_are_there(monkeypatch):
    for there, counts in ((1, (1,)), (2, (1, 2)), (6, (1, 2, 4)), (8, (1, 2, 4, 8))):
        monkeypatch.setattr(torch.cuda, "device_count", lambda there=there: there)
        assert bench.default_counts("cuda") == counts
    assert bench.default_counts("cpu") == (1,)


def test_host_time_is_of_the_way_to_a_kernel_that_is_not_launched(monkeypatch, threads):
    import triton

    from fastseg.kernels import launch

    monkeypatch.setattr(bench_host, "CALLS", 2)
    monkeypatch.setattr(bench_host, "STEPS", 1)
    before, way = triton.JITFunction.run, launch.on_triton
    launched = []
    monkeypatch.setattr(bench_host, "_nothing", lambda kernel, *_, **options: launched.append(kernel.fn.__name__))
    found = bench.run("host", data="", size=(8, 8), batch=1, rounds=3, device="cpu")
    check(found, 3)
    operators = [*bench_kernels.cases(bench_host.CPU, torch.float32, (4, 4), 1), "step"]
    assert [row["name"] for row in found["ratios"]] == [f"host_{name}_vs_torch" for name in operators]
    assert {row["better"] for row in found["ratios"]} == {"lower"}
    # Of the first operator that training takes: two launches forward, two backward.
    names = ["statistics", "apply", "backward_sums", "backward"]
    first = launched.index("statistics_kernel")
    assert launched[first : first + 4] == [f"{name}_kernel" for name in names]
    assert (triton.JITFunction.run, launch.on_triton) == (before, way)


def test_the_ladder_has_a_rung_for_each_part_and_names_the_lowest(street, monkeypatch, threads):
    small(monkeypatch)
    monkeypatch.setattr(bench_ladder, "SECONDS", 0.05)
    found = bench.run("ladder", data=str(street), size=(48, 72), batch=2, rounds=3, device="cpu")
    check(found, 3)
    rates = {row["name"].removeprefix("ladder "): row["value"] for row in found["results"] if row["unit"] == "img/s"}
    data = ["read files", "+ decode", "+ decode, resize", "+ augment", "the same from the cache"]
    names = [f"{name} 48x72" for name in [*data, "forward", "+ backward", "+ optimiser", "together"]]
    assert list(rates)[:-1] == names
    (lowest,) = [name for name in rates if name.startswith("lowest: ")]
    sides = ("the same from the cache", "+ optimiser")
    assert rates[lowest] == min(rates[f"{side} 48x72"] for side in sides)
    assert lowest == f"lowest: {min(sides, key=lambda side: rates[f'{side} 48x72'])}"
    (wait,) = [row for row in found["results"] if row["unit"] == "%"]
    assert 0 < wait["value"] < 100
    assert [row["name"] for row in found["ratios"]] == [
        "a faster data path: at most",
        "a faster network: at most",
        "together / explained by its parts",
    ]


def test_a_call_longer_than_the_measurement_counts_and_the_device_is_waited_for(monkeypatch):
    # A clock that moves by 5 s a look. To begin, 6.7 s: looks at 0, 5 (a call) and 10. From 15 on, 20 s: looks at 20,
    # 25 and 30 (a call each) and 35.
    clock, waited, ended = iter(range(100)), [], []
    monkeypatch.setattr(bench_data.time, "perf_counter", lambda: next(clock) * 5)
    monkeypatch.setattr(bench_data, "cpu_seconds", iter([0.0, 6.0]).__next__)

    def work():
        try:
            yield from itertools.count()
        finally:
            ended.append(True)

    case = bench_data.Case(work, 3, 20.0, wait=waited.append)
    assert case() == 9 / 20
    assert waited == [0, 1, 2, 3]
    assert case.cpu_seconds == [6 / 9]
    assert ended == [True]
    clock = iter(range(100))
    monkeypatch.setattr(bench_data, "cpu_seconds", iter([0.0, 6.0]).__next__)
    # 2 s from 10 on: the look at 15 is late, but nothing has been measured; at 20 one call has.
    assert bench_data.Case(work, 3, 2.0, wait=waited.append)() == 3 / 10


def test_the_step_is_measured_in_both_precisions(monkeypatch, threads):
    small(monkeypatch)
    peaks = roofline.Peaks({"float32": 1e9, "bfloat16": 2e9}, 3e8, "by hand")
    monkeypatch.setattr(bench_model, "measured_peaks", lambda *_: peaks)
    found = bench.run("model", data="", size=(32, 32), batch=2, rounds=3, device="cpu")
    check(found, 3)
    # Convolutions 3-64-64 down, 64-64-11 up; three batch norms and 11 biases. Per image and convolution 6 * 9 * in *
    # out * pixels, less the gradient for the image.
    weights = 3 * 64 + 2 * 64 * 64 + 64 * 11
    work = (54 * weights - 18 * 3 * 64) * 32**2 / 1e9
    rows = {(r["name"], r["unit"]): r["value"] for r in found["results"]}
    assert rows.pop(("model parameters", "")) == 9 * weights + 3 * 2 * 64 + 11
    assert rows.pop(("model work 32x32, forward+backward", "GFLOP/img")) == pytest.approx(work, rel=1e-12)
    for dtype, peak, value_bytes in (("float32", 1e9, 4), ("bfloat16", 2e9, 2)):
        name = f"train step {dtype} 32x32 batch 2"
        speed = rows.pop((name, "img/s"))
        assert rows.pop((name, "GFLOP/s")) == pytest.approx(speed * work, rel=1e-6)
        # Weights, momentum and images at least, in fp32 but for the images.
        held = 2 * 4 * (9 * weights + 3 * 2 * 64 + 11) + value_bytes * 2 * 3 * 32**2
        assert rows.pop((f"{name}, peak memory", "MB")) > held / 1e6
        parts = roofline.layers((32, 32), 2, classes=11, value_bytes=value_bytes, fused=False, depth=1)
        least = sum(max(part.flops / peak, part.nbytes / 3e8) for part in parts)
        compute = sum(part.flops / peak for part in parts if part.flops / peak > part.nbytes / 3e8)
        assert rows.pop((f"{name}, peak of compute (by hand)", "GFLOP/s")) == peak / 1e9
        assert rows.pop((f"{name}, peak of memory (by hand)", "GB/s")) == 0.3
        assert rows.pop((f"{name}, roofline", "img/s")) == pytest.approx(2 / least)
        assert rows.pop((f"{name}, share of the roofline", "%")) == pytest.approx(100 * speed * least / 2)
        assert rows.pop((f"{name}, share of compute (MFU)", "%")) == pytest.approx(100 * speed * work * 1e9 / peak)
        assert rows.pop((f"{name}, roofline's time bound by compute", "%")) == pytest.approx(100 * compute / least)
    loops = {f"plain PyTorch loop {kind}" for kind in ("float32 {}", "bfloat16 {}, tuned", "bfloat16 {}, autocast")}
    assert rows.keys() == {(loop.format("32x32 batch 2"), "img/s") for loop in loops}
    assert [r["name"] for r in found["ratios"]] == [
        "train_step_vs_plain",
        "train_step_vs_tuned",
        "train_step_vs_autocast",
        "train step bfloat16 / float32",
    ]
    assert [curve["x"]["layer"] for curve in found["series"]] == [[part.name for part in parts]] * 2


def test_a_quick_measurement_makes_many_rounds_of_the_best_precision_and_the_plain_loop(monkeypatch, threads):
    small(monkeypatch)
    peaks = roofline.Peaks({"bfloat16": 2e9}, 3e8, "by hand")
    monkeypatch.setattr(
        bench_model, "measured_peaks", lambda dtypes, trials: peaks if dtypes == [torch.bfloat16] else None
    )
    asked = []

    def turns(cases, rounds, seconds):
        asked.append((rounds, seconds))
        return harness.take_turns(cases, rounds)

    monkeypatch.setattr(bench_model, "take_turns", turns)
    found = bench.run("model", data="", size=(8, 8), batch=2, rounds=5, device="cpu", quick=True)
    assert found["protocol"] == {
        "bench": "model", "data": "", "size": "8x8", "batch": 2, "device": "cpu", "rounds": 3, "warmup_rounds": 1,
        "quick": True,
    }  # fmt: skip
    (row,) = found["ratios"]
    assert (row["name"], row["n"]) == ("train_step_vs_plain", 3)
    assert asked == [(3, bench_model.QUICK_SECONDS)]  # at least 3, and more until that time has passed
    assert not [row for row in found["results"] if "train step float32" in row["name"]]


def test_the_whole_network_is_counted_and_unknown_peaks_give_no_share(monkeypatch, threads):
    # Steps that claim 2 images per second, so that nothing is computed.
    step = SimpleNamespace(model=SimpleNamespace(fused=True), passes=None)
    made = SimpleNamespace(images_per_second=lambda: 2.0, peak_memory=lambda: 5_000_000, step=step)
    monkeypatch.setattr(bench_model, "Drill", lambda *_: made)
    monkeypatch.setattr(bench_model.plain_step, "images_per_second", lambda *_, **options: lambda: 0.5)
    monkeypatch.setattr(bench_model, "choose_dtype", lambda *_: Precision(torch.float32, "float32", "as asked"))
    monkeypatch.setattr(bench_model, "peaks_here", lambda *_, trials: None)
    found = bench.run("model", data="", size=(360, 480), batch=1, rounds=3, device="cpu")
    check(found, 3)
    assert [(r["unit"], r["value"]) for r in found["results"]] == [
        ("", 29_441_419),
        ("GFLOP/img", pytest.approx(639.7, rel=1e-3)),
        ("img/s", 2.0),
        ("MB", 5.0),
        ("GFLOP/s", pytest.approx(2 * 639.7, rel=1e-3)),
        ("img/s", 0.5),
        ("img/s", 0.5),
    ]
    assert [(r["name"], r["value"]) for r in found["ratios"]] == [
        ("train_step_vs_plain", 4.0),
        ("train_step_vs_tuned", 4.0),
    ]
    assert found["series"] == []


def test_the_network_has_the_maps_that_its_published_layers_give():
    inner, pooled = bench_kernels.network_maps((360, 480))
    # Pixels per stage: 45 rows become 23 (ceil mode), 23 become 12.
    pixels = [360 * 480, 180 * 240, 90 * 120, 45 * 60, 23 * 30]
    full = [c * p for c, p in zip((64, 128, 256, 512, 512), pixels, strict=True)]
    assert pooled == list(zip(full, [f // 4 for f in full[:3]] + [512 * 23 * 30, 512 * 12 * 15], strict=True))
    # Encoder convolutions that no pooling follows, and the decoder's (its last gives scores and has no batch norm).
    down = [64, 128, 256, 256, 512, 512, 512, 512]
    up = [64, 128, 64, 256, 256, 128, 512, 512, 256, 512, 512, 512]
    places = [0, 1, 2, 2, 3, 3, 4, 4, 0, 1, 1, 2, 2, 2, 3, 3, 3, 4, 4, 4]
    assert sorted(inner) == sorted(c * pixels[p] for c, p in zip(down + up, places, strict=True))


def test_bytes_are_those_of_a_count_by_hand():
    # A map of 16 values of 2 bytes and its 4 pooled ones, with codes of 1 byte or positions of 8.
    assert bench_kernels.pool_bytes(16, 4, 2) == (32 + 8 + 4 + 8 + 4 + 32, 32 + 8 + 32 + 8 + 32 + 32 + 32)
    copies = (8 + 8) + (32 + 32)  # values and positions, each read and written
    forward = copies + 32 + (8 + 32 + 8) + (32 + 32)  # cleared, scattered, copied
    backward = (32 + 32) + (32 + 32 + 8) + (8 + 8)  # copied, gathered, copied
    assert bench_kernels.unpool_bytes(16, 4, 2) == (8 + 4 + 32 + 32 + 4 + 8, forward + backward)
    assert bench_kernels.bn_relu_bytes(16, 0, 2) == (8 * 32, 13 * 32)
    # Read twice and pooled; read again with the pooled gradient; and once more, to write the map's.
    assert bench_kernels.bn_relu_pool_bytes(16, 4, 2)[0] == (32 + 32 + 12) + (32 + 12) + (32 + 12 + 32)
    # One pixel of 11 scores of 2 bytes.
    assert bench_kernels.cross_entropy_bytes(11, 1, 2)[0] == (22 + 1) + (22 + 1 + 22)
    assert bench_kernels.confusion_bytes(11, 1, 2)[0] == 22 + 1
    assert bench_kernels.augment_bytes(3, 1, 2)[0] == (3 + 6) + (1 + 1)


def test_pooling_and_unpooling_move_what_the_issue_reckoned():
    found = bench_kernels.bytes_per_image((360, 480))
    assert (found["pool"][0] + found["unpool"][0]) / 1e6 == pytest.approx(232, abs=0.5)
    # 26 passes of 2 bytes over 77.46 million values, less those of the maps that are pooled too.
    plain = found["bn_relu"][1] + found["bn_relu_pool"][1] - found["pool"][1]
    assert plain / 1e6 == pytest.approx(26 * 77.46, rel=1e-4)


def test_every_operator_is_measured_both_ways(monkeypatch, threads):
    monkeypatch.setattr(drill, "SegNet", lambda classes, **options: SegNet(classes, depth=1, **options))
    found = bench.run("kernels", data="", size=(9, 10), batch=2, rounds=3, device="cpu")
    check(found, 3)
    operators = ["pool", "unpool", "bn_relu", "bn_relu_pool", "cross_entropy", "confusion", "augment", "step"]
    counted = [f"{name}, {does}" for name in operators for does in ("fused, must move", "torch, moves")]
    assert [r["name"] for r in found["results"] if r["unit"] == "MB/img"] == counted
    timed = [f"{name}, {way}" for name in operators for way in ("fused", "torch")]
    outer = ["first convolution", "last convolution"]
    timed += [f"{name}, {way}" for name in outer for way in ("as it is", "padded")]
    assert [r["name"] for r in found["results"] if r["unit"] == "ms"] == timed
    ratios = [f"{name}, speed of fused over torch" for name in operators]
    assert [r["name"] for r in found["ratios"]] == ratios + [f"{name}, speed of padded over as it is" for name in outer]


def test_both_ways_of_an_operator_compute_the_same():
    cases = bench_kernels.cases(torch.device("cpu"), torch.float32, (9, 10), 2)
    assert cases.pop("confusion").fused() is None  # it counts in place
    for name, case in cases.items():
        found, wanted = case.fused(), case.plain()
        assert found is not None
        torch.testing.assert_close(found, wanted, rtol=1e-4, atol=1e-5, msg=lambda text, name=name: f"{name}: {text}")


def test_the_script_for_a_gpu_machine_runs_every_part_in_the_order_of_its_worth():
    script = Path(bench_kernels.__file__).with_name("device.sh")
    command = [script, "--dry-run", "--data", "/data/CamVid", "/tmp/found"]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    steps = dict(line.split(", at most ", 1) for line in done.stdout.splitlines())
    order = [
        "install",
        "cudnn",
        "tests",
        "model-batch-4",
        "model-batch-16",
        "model-batch-8",
        "model-batch-32",
        "run",
        "dev",
        "long-plain",
        "long-scale",
        "long-colour",
        "profile",
    ]
    order += ["kernels-batch-4", "kernels-batch-16", "parity", "pipelines", "fill", "start", "jpeg", "data"]
    order += ["eager", "fp16", "resume"]
    assert list(steps)[: len(order)] == order
    assert "-m gpu tests/kernels tests/fastseg" in steps["tests"]
    assert "'s#CAMVID#/data/CamVid#' bench/camvid-dev.toml > '/tmp/found/dev.toml'" in steps["dev"]
    for what, batches in (("kernels", (4, 16)), ("model", (4, 8, 16, 32)), ("ladder", (4, 16))):
        for batch in batches:
            line = steps[f"{what}-batch-{batch}"]
            assert f"bench {what} " in line
            assert f"--batch {batch} " in line
            assert line.endswith(f"--json > '/tmp/found/{what}-batch-{batch}.json'")
    assert all("/data/CamVid" in steps[name] for name in ("run", "profile", "parity", "fill", "start", "data", "fp16"))


@pytest.mark.camvid
def test_the_split_for_choosing_a_recipe_is_of_training_images_alone_and_keeps_a_sequence(camvid, tmp_path):
    text = Path(bench_kernels.__file__).with_name("camvid-dev.toml").read_text()
    (tmp_path / "dev.toml").write_text(text.replace("CAMVID", str(camvid)))
    dataset = find(tmp_path / "dev.toml")
    parts = apply(dataset, "auto", 0)
    assert {name: len(pairs) for name, pairs in parts.items()} == {"train": 266, "val": 101}
    assert {Path(pair.image).parent for pairs in parts.values() for pair in pairs} == {camvid / "train"}
    assert {pair.stem.split("_")[0] for pair in parts["val"]} == {"0006R0"}
    assert dataset.classes.names == find(camvid).classes.names


def test_the_script_for_a_gpu_machine_goes_on_after_a_failure_and_ends_in_time(tmp_path):
    root = Path(bench_kernels.__file__).parents[1]
    (tmp_path / "bench").mkdir()
    script = tmp_path / "bench" / "device.sh"
    script.write_text((root / "bench" / "device.sh").read_text())
    # python3 of this machine makes a "virtual environment" whose programs say what they are asked, and fail.
    programs = tmp_path / "bin"
    programs.mkdir()
    fake = '#!/bin/sh\nmkdir -p "$4/bin"\nfor name in pip python fastseg; do\n'
    fake += 'printf \'#!/bin/sh\\necho asked: "$@"\\nexit 3\\n\' > "$4/bin/$name"; chmod +x "$4/bin/$name"; done\n'
    (programs / "python3").write_text(fake)
    (programs / "python3").chmod(0o755)
    environment = os.environ | {"PATH": f"{programs}:{os.environ['PATH']}"}
    command = ["bash", script, "--minutes", "1", tmp_path / "out"]
    done = subprocess.run(command, capture_output=True, text=True, check=False, env=environment)
    assert done.returncode == 0, done.stderr
    summary = (tmp_path / "out" / "summary.md").read_text()
    rows = [[cell.strip() for cell in line.split("|")[1:-1]] for line in summary.splitlines() if line.startswith("| ")]
    outcomes = {name: outcome for name, _, outcome, _ in rows[1:]}
    assert set(outcomes.values()) == {"FAILED (3)"}
    assert len(outcomes) == 23
    assert rows[3][3].startswith("asked: -m pytest -m gpu")
    assert (tmp_path / "out" / "model-batch-4.json").read_text().startswith("asked: bench model ")


def test_a_network_of_ones_own_has_a_ladder_and_nothing_of_segnets(street, tmp_path, monkeypatch, threads):
    (tmp_path / "ladder_net.py").write_text(
        "from torch import nn\n\n\ndef build(num_classes, size):\n    return nn.Conv2d(3, num_classes, 3, 2, 1)\n"
    )
    monkeypatch.syspath_prepend(tmp_path)
    how = {"data": str(street), "size": (32, 48), "batch": 2, "rounds": 3, "device": "cpu", "quick": True}
    monkeypatch.setattr(bench_ladder, "SECONDS", 0.05)
    document = bench.run("ladder", network="ladder_net:build", **how)
    assert document["protocol"]["network"] == "ladder_net:build"
    assert [row["value"] > 0 for row in document["results"] if row["name"] == "ladder + optimiser 32x48"] == [True]
    with pytest.raises(
        UsageError, match=r"--network ladder_net:build: bench model measures SegNet; ladder and scaling"
    ):
        bench.run("model", network="ladder_net:build", **how)
