"""The cache tier and what it keeps: whole samples, shared by processes, thrown away when a source changes."""

import dataclasses
import itertools
import json
import multiprocessing
import os
import re
import shutil
import signal
import subprocess
import sys
import threading
import time
from collections import Counter
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image

from fastseg.config import Size, parse_size
from fastseg.data.classes import VOID, camvid_indexed
from fastseg.data.decode import decode_image, decode_label
from fastseg.data.headers import read_headers
from fastseg.data.layouts import find
from fastseg.errors import FastsegError
from fastseg.kernels.augment import Move, augment_by_slices, torch_augment
from fastseg.pipelines import cache, prepared
from fastseg.pipelines.cache import Filling, first_uses, open_once, prepare
from fastseg.pipelines.fit import rooms_of
from fastseg.pipelines.gpu_copy import GpuCopy, copy_on_gpu
from fastseg.pipelines.plan import Plan, Rooms
from fastseg.pipelines.prepared import Shape, key_of, locate, open_store, shape_of
from fastseg.pipelines.source import Spec, TrainSource, choose_loader, evaluation_batches, make_tier, normalise

SIZE = (32, 48)


@pytest.fixture
def spec(street, tmp_path) -> Spec:
    """Eight samples whose store is kept in a folder of the test's own."""
    pairs = find(street).splits["train"]
    return Spec(
        pairs=pairs, headers=read_headers(pairs, 2), classes=find(street).classes, size=SIZE,
        device=torch.device("cpu"), dtype=torch.float32, threads=2, cache_dir=str(tmp_path / "cache"),
        loader="cache", keep=Size(*SIZE),
    )  # fmt: skip


def plan_of(spec: Spec, batch: int = 4) -> Plan:
    return Plan(num_samples=len(spec.pairs), batch=batch, seed=3, mirror=True, max_shift=(4, 6))


def fill(spec: Spec, *, verify: bool = False, done: Callable[[int], object] = lambda count: None) -> list[int]:
    """What `fastseg data prepare` does; the samples that had to be mended."""
    return prepare(spec, verify=verify, done=done)


def folder_of(spec: Spec) -> Path:
    return Path(spec.cache_dir) / key_of(spec, shape_of(spec, resize_labels=True))


@given(
    samples=st.lists(
        st.tuples(st.integers(0, 2), st.booleans(), st.integers(-9, 9), st.integers(-9, 9)), min_size=1, max_size=4
    ),
    dtype=st.sampled_from([torch.float32, torch.bfloat16]),
    size=st.tuples(st.integers(1, 6), st.integers(1, 7)),
    coloured=st.booleans(),
)
def test_slices_are_the_references_pixels_to_the_bit(samples, dtype, size, coloured):
    rng = np.random.default_rng(0)
    images, labels = rng.integers(0, 256, (3, 6, 7, 3), np.uint8), rng.integers(0, 12, (3, 6, 7), np.uint8)
    mean, std = np.array([[1, 2, 3], [4, 5, 7]], np.float32)
    order = [index for index, *_ in samples]
    moves = [Move(*move) for _, *move in samples]
    colours = (rng.uniform(-1, 1.5, (len(samples), 12)) * ([1, 1, 1, 50] * 3)).astype(np.float32) if coloured else None
    given = (lambda k: (images[order[k]], labels[order[k]])), moves, mean, std, dtype, *size
    found = augment_by_slices(*given, colours_B12=colours)
    places = torch.tensor([[126 * index, 42 * index, 6, 7, 7, 6, 7, *move] for index, *move in samples])
    given = *map(torch.from_numpy, (images, labels)), places, *map(torch.from_numpy, (mean, std))
    wanted = torch_augment(*given, dtype, *size, False, torch.from_numpy(colours) if coloured else None)
    assert torch.equal(found[0], wanted[0])
    assert torch.equal(found[1], wanted[1])
    assert found[0].stride() == wanted[0].stride()  # channels-last


def test_a_sample_is_decoded_once_whatever_the_epochs(spec, monkeypatch):
    decoded = []
    real = cache.CacheTier._fill

    def counting(tier, store, wanted, batch, *, resize_labels):
        inner = tier.inner.decode

        def decode(batches, most, *, resize_labels):
            return inner((decoded.extend(part.tolist()) or part for part in batches), most, resize_labels=resize_labels)

        monkeypatch.setattr(tier.inner, "decode", decode)
        return real(tier, store, wanted, batch, resize_labels=resize_labels)

    monkeypatch.setattr(cache.CacheTier, "_fill", counting)
    stream = iter(TrainSource(spec, plan_of(spec)))
    seen = [next(stream).indices for _ in range(10)]  # five epochs
    assert sorted(decoded) == list(range(8))
    assert decoded == [i for part in seen[:2] for i in part.tolist()]  # in the order of the plan
    assert Counter(np.concatenate(seen).tolist()) == dict.fromkeys(range(8), 5)


def test_a_second_run_decodes_nothing(spec, monkeypatch):
    fill(spec)
    cache._open.clear()
    source = TrainSource(spec, plan_of(spec))
    tier = make_tier(spec)
    monkeypatch.setattr(tier.inner, "decode", None)
    pixels = tier.train(plan_of(spec), 0, 0, 1)
    for _ in range(4):
        next(pixels)
    wanted = iter(TrainSource(dataclasses.replace(spec, loader="reference"), plan_of(spec)))
    got, expected = next(iter(source)), next(wanted)
    assert torch.equal(got.images, expected.images)
    assert torch.equal(got.labels, expected.labels)


def test_the_store_is_npy_files_that_numpy_reads(spec):
    assert fill(spec) == []
    folder = folder_of(spec)
    images, labels = np.load(folder / "images.npy"), np.load(folder / "labels.npy")
    assert (images.shape, labels.shape, images.dtype, labels.dtype) == ((8, 32, 48, 3), (8, 32, 48), "u1", "u1")
    assert json.loads((folder / "about.json").read_text())["complete"] is True
    pairs = [dataclasses.replace(pair) for pair in spec.pairs]
    own = dataclasses.replace(spec, keep=None)
    fill(own)
    kept = np.load(folder_of(own) / "images.npy"), np.load(folder_of(own) / "labels.npy")
    for index, pair in enumerate(pairs):
        np.testing.assert_array_equal(kept[0][index], decode_image(pair.image))
        np.testing.assert_array_equal(kept[1][index], decode_label(pair.label, spec.classes, VOID))


def test_anything_that_changes_the_contents_changes_the_key(spec, tmp_path):
    shape = shape_of(spec, resize_labels=True)
    copied = tmp_path / "one.png"
    copied.write_bytes(Path(spec.pairs[0].label).read_bytes())
    one = dataclasses.replace(spec, pairs=(dataclasses.replace(spec.pairs[0], label=str(copied)), *spec.pairs[1:]))
    classes = camvid_indexed()
    fewer = dataclasses.replace(classes, from_index={**classes.from_index, 10: VOID})
    keys = [
        key_of(spec, shape),
        key_of(spec, dataclasses.replace(shape, sizes=((32, 49),) * 8)),
        key_of(spec, dataclasses.replace(shape, label_sizes=((96, 144),) * 8)),
        key_of(dataclasses.replace(spec, unknown_void=True), shape),
        key_of(dataclasses.replace(spec, classes=fewer), shape),
        key_of(dataclasses.replace(spec, pairs=spec.pairs[::-1]), shape),
        key_of(one, shape),
    ]
    os.utime(copied, ns=(1, 1))
    keys.append(key_of(one, shape))
    assert len(set(keys)) == len(keys)
    assert key_of(dataclasses.replace(spec, device=torch.device("meta"), threads=1), shape) == keys[0]


def test_a_size_leaves_the_key_of_a_plain_pair(spec):
    plain = Shape(((32, 48),) * 8, ((32, 48),) * 8)
    assert key_of(spec, shape_of(spec, resize_labels=True)) == key_of(spec, plain)


def test_samples_of_their_files_own_size_serve_every_size(spec):
    own = dataclasses.replace(spec, keep=None)
    small = dataclasses.replace(own, size=Size(16, 24))
    wanted = key_of(own, Shape(((96, 144),) * 8, ((96, 144),) * 8))
    for mine, resize_labels in itertools.product((own, small), (True, False)):
        assert key_of(mine, shape_of(mine, resize_labels=resize_labels)) == wanted


def test_a_changed_source_is_decoded_anew(street, tmp_path, spec):
    shutil.copytree(street, tmp_path / "street")
    pairs = find(tmp_path / "street").splits["train"]
    mine = dataclasses.replace(spec, pairs=pairs)
    fill(mine)
    before = folder_of(mine)
    image = np.zeros((96, 144, 3), np.uint8)
    Image.fromarray(image).save(pairs[2].image)
    fill(mine)
    assert folder_of(mine) != before
    assert not np.load(folder_of(mine) / "images.npy")[2].any()
    assert np.load(before / "images.npy")[2].any()


def test_verify_finds_and_mends_what_is_not_as_it_was(spec):
    fill(spec)
    cache._open.clear()
    images = np.load(folder_of(spec) / "images.npy", mmap_mode="r+")
    good = images[5].copy()
    images[5, 0, 0] += 1
    images.flush()
    assert fill(spec) == []
    counted = []
    assert fill(spec, verify=True, done=counted.append) == [5]
    assert sum(counted) == 8
    np.testing.assert_array_equal(images[5], good)
    assert fill(spec, verify=True, done=counted.append) == []


def test_pixels_that_never_reached_the_disk_are_decoded_again(spec):
    # A store that is not complete: its check sums are looked at, in case the machine lost power.
    store = open_once(spec, resize_labels=True)
    store.put(1, np.ones((*SIZE, 3), np.uint8), np.ones(SIZE, np.uint8))
    store.put(2, np.ones((*SIZE, 3), np.uint8), np.ones(SIZE, np.uint8))
    store.images[2, 4, 4] = 9
    found = open_store(spec, shape_of(spec, resize_labels=True), store.folder)
    assert np.flatnonzero(found.checks).tolist() == [1]


def _fill_slowly(spec: Spec, pause: float) -> None:
    put = prepared.Store.put

    def slow(store, index, image, label):
        put(store, index, image, label)
        time.sleep(pause)

    prepared.Store.put = slow
    fill(spec)


def test_a_killed_build_leaves_whole_samples_and_two_builds_end_with_one_store(spec):
    context = multiprocessing.get_context("spawn")
    killed = context.Process(target=_fill_slowly, args=(spec, 0.3))
    killed.start()
    while not (folder_of(spec) / "checks.npy").is_file() or not np.load(folder_of(spec) / "checks.npy").any():
        assert killed.is_alive()
        time.sleep(0.01)
    os.kill(killed.pid, signal.SIGKILL)
    killed.join()
    left = np.load(folder_of(spec) / "checks.npy")
    assert 0 < np.count_nonzero(left) < 8
    assert json.loads((folder_of(spec) / "about.json").read_text())["complete"] is False
    both = [context.Process(target=_fill_slowly, args=(spec, 0.05)) for _ in range(2)]
    for process in both:
        process.start()
    for process in both:
        process.join()
    assert [process.exitcode for process in both] == [0, 0]
    assert [path.name for path in Path(spec.cache_dir).iterdir()] == [folder_of(spec).name]
    assert fill(spec, verify=True, done=lambda count: None) == []


@pytest.fixture
def worker(monkeypatch):
    """This process is one of several, which share their stores."""
    monkeypatch.setattr(prepared, "is_worker", lambda: True)


def test_a_store_that_nobody_shares_is_in_no_file(spec):
    mine = dataclasses.replace(spec, cache_dir="")
    folder, where = locate(mine, shape_of(mine, resize_labels=True), key_of(mine, shape_of(mine, resize_labels=True)))
    assert where.endswith(" MB in memory")
    before = set(prepared.SHARED_MEMORY.iterdir())
    next(iter(TrainSource(mine, plan_of(mine))))
    assert not folder.exists()
    assert set(prepared.SHARED_MEMORY.glob("fastseg-*")) <= before
    cache.forget()


def test_a_passing_store_loses_its_name_and_keeps_its_pixels(spec, worker):
    mine = dataclasses.replace(spec, cache_dir="")
    folder, where = locate(mine, shape_of(mine, resize_labels=True), key_of(mine, shape_of(mine, resize_labels=True)))
    assert "in shared memory" in where or "passing" in where
    stream = iter(TrainSource(mine, plan_of(mine)))
    next(stream)
    assert folder.is_dir()
    next(stream)
    assert not folder.exists()
    again = [next(stream) for _ in range(4)]
    wanted = iter(TrainSource(dataclasses.replace(mine, loader="reference"), plan_of(mine)))
    for step, expected in zip(range(6), wanted, strict=False):
        if step >= 2:
            assert torch.equal(again[step - 2].images, expected.images)


def test_a_passing_store_that_is_given_up_while_another_process_opens_it_is_made_anew(spec, monkeypatch, worker):
    mine = dataclasses.replace(spec, cache_dir="")
    shape = shape_of(mine, resize_labels=True)
    folder, _ = locate(mine, shape, key_of(mine, shape))
    first, load = open_store(mine, shape, folder), np.load

    def late(path, **given):
        if path.name == "labels.npy":
            monkeypatch.undo()
            first.release()
        return load(path, **given)

    monkeypatch.setattr(np, "load", late)
    second = open_store(mine, shape, folder)
    second.put(3, np.ones((*SIZE, 3), np.uint8), np.ones(shape.label_sizes[3], np.uint8))
    assert np.flatnonzero(np.load(folder / "checks.npy")).tolist() == [3]
    assert not first.checks.any()
    second.release()
    assert list(folder.parent.glob(f"*{folder.name}*")) == []


def test_a_run_that_ends_at_its_first_step_leaves_nothing_in_shared_memory(street, tmp_path):
    command = [sys.executable, "-m", "fastseg", "train", "--data", str(street), "--recipe", "fast", "--size", "32x48"]
    command += ["--batch", "8", "--epochs", "1", "--set", "model.depth=1", "--device", "cpu", "--loader", "cache"]
    environment = os.environ | {"FASTSEG_DATA": str(tmp_path / "home")}
    with subprocess.Popen([*command, "--run", str(tmp_path / "run")], stderr=subprocess.PIPE, env=environment) as run:
        said = run.communicate()[1].decode()
    assert run.returncode == 0, said
    assert "loader     cache: " in said
    assert "steps      1 = " in said
    bases = (prepared.SHARED_MEMORY, tmp_path / "home" / "passing")
    assert [path for base in bases for path in base.glob(f"*-{run.pid}-*")] == []


def test_what_dead_sessions_left_is_swept(tmp_path):
    mine = tmp_path / f"fastseg-{os.getuid()}-{os.getpid()}-a"
    dead = tmp_path / f"fastseg-{os.getuid()}-999999999-a"
    fresh, old = tmp_path / ".a.partial-x", tmp_path / ".a.partial-y"
    for folder in (mine, dead, fresh, old):
        folder.mkdir()
    os.utime(old, (1, 1))
    prepared._sweep(tmp_path)
    assert sorted(path.name for path in tmp_path.iterdir()) == sorted([mine.name, fresh.name])


def test_without_room_the_files_are_streamed_and_the_reason_is_said(spec, monkeypatch, tmp_path):
    monkeypatch.setattr(prepared, "available_memory", lambda: 1000)
    monkeypatch.setattr(prepared, "_free", lambda folder: 1000)
    chosen, choice = choose_loader("cache", dataclasses.replace(spec, cache_dir=""))
    assert chosen.loader in ("dali", "reference")
    assert choice.why.startswith("no cache, since neither memory nor ")
    assert choice.facts["obstacle"].startswith("neither memory nor ")
    chosen, choice = choose_loader("auto", spec)
    assert chosen.loader in ("dali", "reference")
    assert choice.why.startswith(f"no cache, since {tmp_path / 'cache'} has no room for 0 MB; ")


def test_a_split_read_once_is_streamed_and_one_read_often_is_cached(spec):
    mine = dataclasses.replace(spec, cache_dir="")
    assert choose_loader("auto", mine)[0].loader != "cache"
    chosen, choice = choose_loader("auto", mine, epochs=True)
    assert chosen == dataclasses.replace(mine, loader="cache")
    assert ", filled by " in choice.why
    assert choice.facts == {"obstacle": None}


def test_a_folder_that_may_not_be_written_is_named(spec, tmp_path):
    (tmp_path / "file").write_text("")
    wrong = dataclasses.replace(spec, cache_dir=str(tmp_path / "file" / "below"))
    with pytest.raises(FastsegError, match=r"below: Not a directory: .*; give another --cache-dir$"):
        open_store(wrong, Shape((SIZE,), (SIZE,)), tmp_path / "file" / "below" / "key")


def test_evaluation_reads_labels_of_the_files_size_from_the_store(spec):
    for _ in range(2):
        batches = list(evaluation_batches(spec, 3, resize_labels=False))
        assert [batch.indices.tolist() for batch in batches] == [[0, 1, 2], [3, 4, 5], [6, 7]]
        labels = [label for batch in batches for label in batch.labels]
        for pair, label in zip(spec.pairs, labels, strict=True):
            np.testing.assert_array_equal(label.numpy(), decode_label(pair.label, spec.classes, VOID))


def test_first_uses_are_those_of_the_rank_from_the_step_on():
    plan = Plan(num_samples=5, batch=2, seed=0, mirror=False, max_shift=(0, 0))
    wanted = list(dict.fromkeys(i for step in range(3, 40) for i in plan.shard(step, 1, 2).indices.tolist()))
    assert list(first_uses(plan, 3, 1, 2)) == wanted
    assert sorted(wanted) == list(range(5))


def test_samples_that_another_process_keeps_between_two_looks_are_taken(spec, monkeypatch):
    # All are missing when this process looks, and there when it begins to decode them.
    store = open_once(spec, resize_labels=True)
    ready = prepared.Store.ready

    def late(self, indices):
        found = ready(self, indices)
        if not found:
            fill(spec)
        return found

    monkeypatch.setattr(prepared.Store, "ready", late)
    batch = next(iter(TrainSource(spec, plan_of(spec))))
    assert batch.images.shape == (4, 3, *SIZE)
    monkeypatch.undo()
    store.checks[:] = 0
    with pytest.raises(FastsegError, match="samples were removed while they were read"):
        Filling(store, iter(())).wait_for(np.array([0]))


def test_filling_runs_ahead_of_who_reads_in_the_plans_order_and_stops_with_them(spec, monkeypatch):
    kept, most = [], threading.Event()
    put = prepared.Store.put

    def watched(store, index, image, label):
        put(store, index, image, label)
        kept.append(index)
        if len(kept) == 8:
            most.set()

    monkeypatch.setattr(prepared.Store, "put", watched)
    monkeypatch.setattr(cache, "decoded_at_once", lambda batch: batch)  # two images are a part
    batches = iter(TrainSource(spec, plan_of(spec, batch=2)))
    next(batches)
    assert most.wait(60)  # nobody asks for more
    assert kept == list(first_uses(plan_of(spec, batch=2), 0, 0, 1))
    batches.close()
    assert not [thread.name for thread in threading.enumerate() if thread.name.startswith("fastseg-fill")]


def test_no_decoder_is_made_where_nothing_is_missing(spec, monkeypatch):
    for _ in itertools.islice(TrainSource(spec, plan_of(spec)), 2):
        pass
    list(evaluation_batches(spec, 3, resize_labels=True))

    def decode(*_, **__):
        raise AssertionError("a decoder, whose making takes two seconds where there is a GPU")

    tier = make_tier(spec)
    monkeypatch.setattr(tier.inner, "decode", decode)
    assert len(list(itertools.islice(tier.train(plan_of(spec), 0, 0, 1), 3))) == 3
    assert len(list(tier.decode([np.arange(8)], 8, resize_labels=True))) == 1


def test_an_end_waits_for_one_part_and_no_more(spec):
    store, begun, go_on, parts = open_once(spec, resize_labels=True), threading.Event(), threading.Event(), []

    def work():
        while True:
            parts.append(1)
            begun.set()
            go_on.wait(60)
            yield

    filling = Filling(store, work())
    assert begun.wait(60)
    threading.Timer(0.2, go_on.set).start()
    filling.close()
    assert parts == [1]


def test_a_file_that_cannot_be_decoded_is_said_when_its_sample_is_wanted(spec, street, tmp_path):
    shutil.copytree(street, tmp_path / "street")
    pairs = find(tmp_path / "street").splits["train"]
    mine = dataclasses.replace(spec, pairs=pairs)
    last = plan_of(mine).shard(1, 0, 1).indices[-1]
    whole = Path(pairs[last].image).read_bytes()
    Path(pairs[last].image).write_bytes(whole[: len(whole) // 2])
    batches = iter(TrainSource(mine, plan_of(mine)))
    with pytest.raises(FastsegError, match=rf"^{re.escape(pairs[last].image)}: cannot be decoded"):
        list(itertools.islice(batches, 3))


@pytest.mark.parametrize("room", [True, False], ids=["whole", "batch by batch"])
def test_a_gpus_pixels_are_those_of_the_cpu_whether_its_memory_holds_them_or_not(spec, monkeypatch, room):
    # The operator's reference on a CPU stands for the kernel on a GPU.
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda device: (2**40 if room else 0, 2**40))
    for size, keep in ((SIZE, None), (SIZE, Size(*SIZE)), ((96, 144), None)):
        mine = dataclasses.replace(spec, size=Size(*size), keep=keep)
        list(evaluation_batches(mine, 3, resize_labels=False))
        for resize_labels in (False, True):
            store = open_once(mine, resize_labels=resize_labels)
            on_device = GpuCopy(store, mine.device)
            assert (on_device.copies is None) != room
            batches = itertools.islice(TrainSource(mine, plan_of(mine)), 3) if resize_labels else ()
            for step, batch in enumerate(batches):
                images, labels = on_device.batch(plan_of(mine).shard(step, 0, 1), mine)
                assert torch.equal(labels, batch.labels)
                assert torch.equal(images, batch.images)
            for batch in evaluation_batches(mine, 3, resize_labels=resize_labels):
                images, labels = on_device.pixels(batch.indices, mine, resize_labels=resize_labels)
                assert torch.equal(normalise(images, torch.float32), batch.images)
                assert all(torch.equal(a, b) for a, b in zip(labels, batch.labels, strict=True))


@pytest.mark.parametrize("room", [True, False], ids=["whole", "batch by batch"])
@pytest.mark.parametrize(
    ("size", "window", "keep"),
    [((30, 40), (30, 40), None), ((30, 40), (60, 70), None), ((120, 90), (120, 90), None), ((50, 48), None, None),
     ((50, 48), None, (50, 48))],
)  # fmt: skip
def test_windows_and_letterboxed_samples_on_a_gpu_are_those_of_the_cpu(spec, monkeypatch, room, size, window, keep):
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda device: (2**40 if room else 0, 2**40))
    mine = dataclasses.replace(
        spec, size=Size(*size), window=window and Size(*window), keep=keep and Size(*keep), fit="letterbox"
    )
    plan = plan_of(mine)
    if window:
        rooms = Rooms(rooms_of(mine.headers, mine.window, mine.size))
        plan = dataclasses.replace(plan, max_shift=(0, 0), max_crop=rooms)
    batches = list(itertools.islice(TrainSource(mine, plan), 3))
    on_device = GpuCopy(open_once(mine, resize_labels=True), mine.device)
    for step, batch in enumerate(batches):
        images, labels = on_device.batch(plan.shard(step, 0, 1), mine)
        assert torch.equal(labels, batch.labels)
        assert torch.equal(images, batch.images)
    for batch in evaluation_batches(mine, 3, resize_labels=True):
        images, labels = on_device.pixels(batch.indices, mine, resize_labels=True)
        assert torch.equal(normalise(images, torch.float32, size=mine.size), batch.images)
        assert all(torch.equal(a, b) for a, b in zip(labels, batch.labels, strict=True))


def test_upright_pictures_are_kept_apart_from_stored_ones(spec):
    turned = dataclasses.replace(spec, upright=True)
    keys = {key_of(each, shape_of(each, resize_labels=True)) for each in (spec, turned)}
    assert len(keys) == 2


def test_all_sizes_and_validations_share_one_copy_on_a_gpu(spec, monkeypatch):
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda device: (2**40, 2**40))
    store = open_once(spec, resize_labels=True)
    first = copy_on_gpu(store, torch.device("cpu"))
    assert copy_on_gpu(open_once(spec, resize_labels=True), torch.device("cpu")) is first
    cache.forget()
    assert copy_on_gpu(open_once(spec, resize_labels=True), torch.device("cpu")) is not first
    cache.forget()


@pytest.mark.parametrize(
    ("size", "device", "grows", "cache_dir", "keep", "why"),
    [
        ("96x144", "cpu", False, False, None, ""),
        ("96x144", "cuda", True, True, None, ""),
        ("48x72", "cpu", False, False, "48x72", ", at 48x72, the one size that is wanted"),
        ("48x72", "cpu", True, False, None, ", at their own size"),
        ("48x72", "cpu", False, True, None, ", at their own size"),
        ("48x72", "cuda", False, False, None, ", at their own size"),
        ("32x48", "cuda", True, True, "32x48", ", at 32x48, since files have 9 times the pixels"),
    ],
)
def test_what_size_is_kept_and_why(spec, size, device, grows, cache_dir, keep, why):
    mine = dataclasses.replace(
        spec,
        size=parse_size(size),
        device=torch.device(device),
        keep=None,
        cache_dir=spec.cache_dir if cache_dir else "",
    )
    found, where = cache.find_room(mine, grows=grows)
    assert found == dataclasses.replace(mine, keep=parse_size(keep) if keep else None)
    assert where.endswith(why)
    assert ("at their own size" in where or "at 3" in where or "at 4" in where) == bool(why)


def test_what_windows_are_cut_out_of_is_kept_at_its_own_size_however_large(spec, monkeypatch):
    mine = dataclasses.replace(spec, size=Size(16, 24), window=Size(16, 24), keep=None, cache_dir="")
    found, where = cache.find_room(mine)
    assert found == mine
    assert where.endswith("MB in memory, at their own size, of which windows are cut")
    monkeypatch.setattr(prepared, "available_memory", lambda: 8 * 4 * 16 * 24)
    monkeypatch.setattr(prepared, "_free", lambda folder: 8 * 4 * 16 * 24)
    assert cache.find_room(mine)[0] is None


def test_files_whose_own_sizes_have_no_room_are_kept_at_the_networks(spec, monkeypatch):
    mine = dataclasses.replace(spec, size=Size(48, 72), device=torch.device("cuda"), cache_dir="")
    own, small = 8 * 4 * 96 * 144, 8 * 4 * 48 * 72
    monkeypatch.setattr(prepared, "available_memory", lambda: own)
    monkeypatch.setattr(prepared, "_free", lambda folder: own)
    found, where = cache.find_room(mine)
    assert found.keep == (48, 72)
    assert where.endswith(", at 48x72, since their own sizes have no room")
    monkeypatch.setattr(prepared, "available_memory", lambda: small)
    monkeypatch.setattr(prepared, "_free", lambda folder: small)
    assert cache.find_room(mine)[0] is None


def test_a_store_that_is_put_in_place_while_another_sweeps_is_left(tmp_path, monkeypatch):
    partial = tmp_path / ".a.partial-x"
    partial.mkdir()
    glob = Path.glob

    def gone(self, pattern):
        found = list(glob(self, pattern))
        if partial.exists():
            partial.rename(tmp_path / "a")
        return found

    monkeypatch.setattr(Path, "glob", gone)
    prepared._sweep(tmp_path)
    assert [path.name for path in tmp_path.iterdir()] == ["a"]
