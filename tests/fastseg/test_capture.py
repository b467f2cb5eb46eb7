"""Captured passes: N replayed steps leave the very bits of N ordinary ones, and what cannot be captured is noticed."""

import contextlib
import gc
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from recorded import READING, RecordedGraph, counted
from torch import nn

from fastseg import config as configs
from fastseg import runs
from fastseg.checkpoint import read
from fastseg.choice import Choice
from fastseg.config import Config, Train
from fastseg.distributed import World
from fastseg.errors import FastsegError, UsageError
from fastseg.model import SegNet
from fastseg.training import capture, setup, train
from fastseg.training.capture import WARMUP
from fastseg.training.gradients import buckets, sum_gradients
from fastseg.training.setup import choose_capture
from fastseg.training.step import Step

WORKER = Path(__file__).parent / "worker.py"

CPU = torch.device("cpu")
CLASSES, BATCH, STEPS = 5, 2, WARMUP + 4
SIZES = [(12, 16)] * STEPS
RATES = [0.01 * (number + 1) for number in range(STEPS)]


@pytest.fixture(autouse=True)
def recorded(monkeypatch, request):
    """Graphs of a GPU are recordings of a CPU, but in tests that have a GPU."""
    if not request.node.get_closest_marker("gpu"):
        monkeypatch.setattr(capture, "make_graph", RecordedGraph)


def a_step(
    dtype=torch.float32, *, fused=True, micro_batch=BATCH, captured=False, device=CPU, channels=(8, 16), **options
) -> Step:
    torch.manual_seed(0)
    model = SegNet(CLASSES, depth=2, fused=fused, channels=channels).to(device, memory_format=torch.channels_last)
    weights = torch.linspace(0.5, 2.0, CLASSES).to(device)
    step, _ = setup.make_step(model, Train(**options), World(0, 1, device), dtype, weights, micro_batch)
    if captured:
        setup.capture_passes(step, must=True)
    return step


def batches(sizes, batch=BATCH, dtype=torch.float32, device=CPU):
    """Other images and labels each time; one batch has no labelled pixel."""
    generator = torch.Generator().manual_seed(1)
    for number, size in enumerate(sizes):
        images = torch.randn(batch, 3, *size, generator=generator).to(dtype, memory_format=torch.channels_last)
        labels = torch.randint(0, CLASSES + 1, (batch, *size), generator=generator, dtype=torch.uint8)
        yield images.to(device), (labels.fill_(255) if number == STEPS - 2 else labels).to(device)


def taken(step: Step, sizes=SIZES, batch=BATCH, dtype=torch.float32) -> list:
    return [step.step(*given, lr) for given, lr in zip(batches(sizes, batch, dtype), RATES, strict=False)]


def state(step: Step) -> list[torch.Tensor]:
    """All that a step changes."""
    modules = [step.model, *([step.average.model] if step.average else [])]
    found = [tensor for module in modules for tensor in module.state_dict().values()]
    found += [values["momentum_buffer"] for values in step.optimizer.state.values()]
    return [tensor.clone() for tensor in found]


def assert_same(step: Step, twin: Step, results: list, wanted: list) -> None:
    assert all(torch.equal(a, b) for a, b in zip(state(step), state(twin), strict=True))
    for mine, theirs in zip(results, wanted, strict=True):
        assert torch.equal(mine.loss, theirs.loss)
        assert torch.equal(mine.void, theirs.void)
        assert (mine.skipped, mine.sound) == (theirs.skipped, theirs.sound)
    assert step.scaler.state_dict() == twin.scaler.state_dict()


@pytest.mark.parametrize("fused", [True, False], ids=["fused", "torch"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["fp32", "bf16"])
@pytest.mark.parametrize(
    "options",
    [{}, {"clip": 0.1, "ema": 0.9, "nesterov": True, "decay_norms": False}],
    ids=["plain", "clip, average, nesterov"],
)
def test_replayed_steps_leave_the_bits_of_ordinary_ones(fused, dtype, options):
    step, twin = (a_step(dtype, fused=fused, captured=captured, **options) for captured in (True, False))
    with counted() as replays:
        results = taken(step, dtype=dtype)
    assert replays() == STEPS - WARMUP
    assert_same(step, twin, results, taken(twin, dtype=dtype))


@pytest.mark.parametrize("micro_batch", [1, 2])
def test_passes_of_one_step_add_up(micro_batch):
    step, twin = (a_step(micro_batch=micro_batch, captured=captured) for captured in (True, False))
    with counted() as replays:
        results = taken(step, batch=4)
    passes = 4 // micro_batch
    assert replays() == STEPS * passes - WARMUP
    assert_same(step, twin, results, taken(twin, batch=4))


def test_a_new_shape_takes_the_place_of_the_one_before():
    sizes = [(6, 8)] * (WARMUP + 1) + [(12, 16)] * (WARMUP + 2) + [(6, 8)] * (WARMUP + 3)
    step, twin = (a_step(captured=captured) for captured in (True, False))
    given = list(batches(sizes))
    with counted() as replays:
        results = [step.step(*batch, 0.01) for batch in given]
    assert replays() == 1 + 2 + 3
    captured, failure = step.passes.news()
    assert [c.shape for c in captured] == [(BATCH, 3, 6, 8), (BATCH, 3, 12, 16), (BATCH, 3, 6, 8)]
    assert failure == ""
    assert step.passes.news() == ([], "")
    assert_same(step, twin, results, [twin.step(*batch, 0.01) for batch in given])


def test_a_step_that_the_scaler_skips_leaves_no_trace():
    steps = []
    for captured in (True, False):
        step = a_step(torch.float16, captured=captured)
        # Gradients are infinite in fp16 at first: the scale halves until they are not, in replayed steps too.
        step.scaler = torch.amp.GradScaler("cpu", init_scale=2.0**30, growth_interval=2)
        step.scale = step.scaler.get_scale()
        steps.append(step)
    step, twin = steps
    sizes = SIZES * 3
    given = list(batches(sizes, dtype=torch.float16))
    results, wanted = ([each.step(*batch, 0.01) for batch in given] for each in (step, twin))
    assert_same(step, twin, results, wanted)
    skipped = [taken.skipped for taken in results]
    assert all(skipped[: WARMUP + 2])
    assert not all(skipped)


def test_whoever_watches_operators_sees_them_and_changes_nothing():
    class Watch(torch.utils._python_dispatch.TorchDispatchMode):
        seen = 0

        def __torch_dispatch__(self, function, types, args=(), kwargs=None):
            Watch.seen += "convolution" in function.name()
            return function(*args, **(kwargs or {}))

    step, twin = (a_step(captured=captured) for captured in (True, False))
    results = []
    with counted() as replays:
        for number, (given, lr) in enumerate(zip(batches(SIZES), RATES, strict=True)):
            with Watch() if number == WARMUP + 1 else torch.no_grad() if False else torch.enable_grad():
                results.append(step.step(*given, lr))
    assert replays() == STEPS - WARMUP - 1
    assert Watch.seen > 0
    assert_same(step, twin, results, taken(twin))


def traces(step: Step) -> list:
    """All that a pass may leave behind."""
    gradients = [parameter.grad for parameter in step.model.parameters()]
    return [state(step), gradients, step.scaler.state_dict(), step.scale, step.model.training, torch.get_rng_state()]


def assert_no_trace_of_warming_up(dtype, sizes, **how):
    step, twin = (a_step(dtype, **how, ema=0.9) for _ in range(2))
    given = list(batches(sizes, 4, dtype, how.get("device", CPU)))
    results, wanted = [], []
    for number, batch in enumerate(given):
        if number in (0, 3):  # before all steps, and when there is momentum
            before = traces(step)
            step.warm_up([(22, 30), *dict.fromkeys(sizes)])
            after = traces(step)
            assert all(torch.equal(a, b) for a, b in zip(before.pop(0), after.pop(0), strict=True))
            assert torch.equal(before.pop(), after.pop())
            assert before == after
            assert {*after[0]} == {None}
        results.append(step.step(*batch, 0.01))
        wanted.append(twin.step(*batch, 0.01))
    assert_same(step, twin, results, wanted)


@pytest.mark.parametrize("captured", [True, False], ids=["captured", "ordinary"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=["fp32", "bf16", "fp16"])
@pytest.mark.parametrize("fused", [True, False], ids=["fused", "torch"])
def test_warming_up_leaves_no_trace(captured, dtype, fused):
    sizes = [(6, 8)] * (WARMUP + 3) + [(12, 16)] * (WARMUP + 3)
    with counted() as replays:
        assert_no_trace_of_warming_up(dtype, sizes, captured=captured, fused=fused)
    # Of both steps, with two passes each.
    assert replays() == (2 * (2 * len(sizes) - 2 * WARMUP) if captured else 0)


@pytest.mark.parametrize("captured", [True, False])
def test_gradients_that_were_there_before_warming_up_stay(captured):
    step = a_step(captured=captured)
    gradients = [torch.ones_like(parameter) for parameter in step.model.parameters()]
    for parameter, gradient in zip(step.model.parameters(), gradients, strict=True):
        parameter.grad = gradient
    step.warm_up([(12, 16)])
    for parameter, gradient in zip(step.model.parameters(), gradients, strict=True):
        assert parameter.grad is gradient
        assert bool((gradient == 1).all())


PLANTED = {
    "a number": lambda x: x * float(x.max()),
    "an item": lambda x: x * x.max().item(),
    "a truth": lambda x: x if x.sum() > 0 else x * 1,
    "a list": lambda x: x + torch.tensor(x[0, 0, 0].tolist()).sum() * 0,
    "NumPy": lambda x: x + float(x.numpy().max()) * 0,
    "the CPU": lambda x: x + x.cpu().sum() * 0,
    "to the CPU": lambda x: x + x.to("cpu").sum() * 0,
    "where": lambda x: x + torch.nonzero(x).sum() * 0,
    "a mask": lambda x: x + x[x > 0].sum() * 0,
    "a mask that is written by": lambda x: x.clone().index_put_((x > 0,), torch.zeros(())),
    "a selection": lambda x: x + x.masked_select(x > 0).sum() * 0,
    "unique": lambda x: x + x.unique().sum() * 0,
    "repeat": lambda x: x.repeat_interleave(torch.tensor([1] * len(x)), 0),
    "equality": lambda x: x if torch.equal(x, x) else x * 1,
    "an index": lambda x: x + range(9)[x.long().abs().max() % 2] * 0,
}


@pytest.mark.parametrize("planted", PLANTED)
def test_what_waits_for_the_device_is_caught(planted):
    step = a_step(captured=True)
    forward, wait = step.model.forward, PLANTED[planted]
    step.model.forward = lambda images: forward(wait(images))
    with pytest.raises(
        FastsegError, match=r"^runtime.capture = on: a pass cannot be captured \(.*waits for the device"
    ):
        taken(step)


def test_what_waits_in_backward_is_caught():
    step = a_step(captured=True)
    next(step.model.parameters()).register_hook(lambda gradient: gradient * float(gradient.sum() * 0 + 1))
    with pytest.raises(FastsegError, match="waits for the device"):
        taken(step)


def test_where_it_need_not_be_captured_a_failure_is_told_once_and_changes_nothing():
    step, twin = a_step(), a_step()
    setup.capture_passes(step, must=False)
    for each in (step, twin):
        forward = each.model.forward
        each.model.forward = lambda images, forward=forward: forward(images + float(images.max()) * 0)
    with counted() as replays:
        results = taken(step)
    assert replays() == 0
    captured, failure = step.passes.news()
    assert (captured, "waits for the device" in failure) == ([], True)
    assert step.passes.news() == ([], "")
    assert_same(step, twin, results, taken(twin))


def test_what_python_decides_in_a_pass_would_show():
    # The stand-in must be able to fail: a number that changes from step to step stays as it was when it was captured.
    step, twin = (a_step(captured=captured) for captured in (True, False))
    for each in (step, twin):
        forward, numbers = each.model.forward, iter(range(100))
        each.model.forward = lambda images, forward=forward, numbers=numbers: forward(images * (1 + next(numbers)))
    taken(step), taken(twin)
    assert not all(torch.equal(a, b) for a, b in zip(state(step), state(twin), strict=True))


def test_reading_names_what_torch_has():
    assert all(callable(function) for function in READING)


def test_a_gpus_graph_warms_up_and_captures_on_one_side_stream_beside_other_threads(monkeypatch):
    said = []

    class Stream:
        def __init__(self, name="side"):
            self.name = name

        def wait_stream(self, other):
            said.append(f"{self.name} waits for {other.name}")

    class Recording:
        def replay(self):
            said.append("replay")

        def reset(self):
            said.append("reset")

    def on(what, stream, **options):
        said.append((what, stream.name, options))
        return contextlib.nullcontext()

    main = Stream("main")
    monkeypatch.setattr(torch.cuda, "CUDAGraph", Recording)
    monkeypatch.setattr(torch.cuda, "Stream", Stream)
    monkeypatch.setattr(torch.cuda, "current_stream", lambda: main)
    monkeypatch.setattr(torch.cuda, "stream", lambda stream: on("run", stream))
    monkeypatch.setattr(torch.cuda, "graph", lambda graph, stream, **options: on("capture", stream, **options))
    monkeypatch.setattr(torch.cuda, "synchronize", lambda: said.append("synchronise"))
    graph = capture.CudaGraph()
    assert graph.run(lambda: "warm") == "warm"
    assert graph.capture(lambda: "captured") == "captured"
    graph.replay()
    graph.release()
    assert said == [
        "side waits for main", ("run", "side", {}), "main waits for side",
        ("capture", "side", {"capture_error_mode": "thread_local"}), "replay", "synchronise", "reset",
    ]  # fmt: skip


@pytest.mark.parametrize("enabled", [True, False])
def test_garbage_is_not_given_back_within_a_capture(monkeypatch, enabled):
    class Ring:
        """Garbage that only the collector finds, as an earlier graph whose closure holds it."""

        def __init__(self):
            self.me = self

        def __del__(self):
            given_back.append(True)

    def work():
        Ring()
        kept.extend([] for _ in range(2 * gc.get_threshold()[0]))  # wakes the collector, where there is one
        return list(given_back)

    given_back, kept = [], []
    monkeypatch.setattr(torch.cuda, "CUDAGraph", lambda: None)
    monkeypatch.setattr(torch.cuda, "Stream", lambda: None)
    monkeypatch.setattr(torch.cuda, "graph", lambda graph, **options: contextlib.nullcontext())
    (gc.enable if enabled else gc.disable)()
    try:
        assert capture.CudaGraph().capture(work) == []
        assert gc.isenabled() == enabled
    finally:
        gc.enable()
    gc.collect()
    assert given_back == [True]


def test_what_failed_first_is_told_and_not_what_failed_because_of_it(monkeypatch):
    class Failing(RecordedGraph):
        def capture(self, work):
            try:
                raise RuntimeError("operation not permitted when stream is capturing")
            finally:
                raise RuntimeError("operation failed due to a previous error during capture")

    monkeypatch.setattr(capture, "make_graph", Failing)
    step = a_step()
    setup.capture_passes(step, must=False)
    taken(step)
    assert "not permitted when stream is capturing" in step.passes.news()[1]


def config(**changes) -> Config:
    return configs.override(Config(), {f"runtime.{key}": value for key, value in changes.items()})


@pytest.mark.parametrize(
    ("changes", "device", "value", "why"),
    [
        ({}, "cpu", "off", "CUDA graphs need an NVIDIA GPU"),
        ({}, "cuda", "on", "the host need not ask for each kernel: passes are replayed from a CUDA graph"),
        ({"capture": "on"}, "cuda", "on", "as asked: passes are replayed from a CUDA graph"),
        ({"capture": "off"}, "cuda", "off", "as asked, the host asks for each kernel"),
        ({"sync_bn": True}, "cuda", "off", "synchronised batch norm talks to other GPUs inside of a pass"),
        (
            {"deterministic": True},
            "cuda",
            "on",
            "the host need not ask for each kernel: passes are replayed from a CUDA graph",
        ),
    ],
)
def test_auto_captures_on_a_gpu_where_nothing_is_in_the_way(changes, device, value, why):
    chosen = choose_capture(config(**changes), torch.device(device))
    assert (chosen.value, chosen.why) == (value, why)
    assert chosen.facts == {"must": changes.get("capture") == "on"}


@pytest.mark.parametrize(("changes", "device"), [({}, "cpu"), ({"sync_bn": True}, "cuda")])
def test_what_cannot_be_captured_and_must_is_refused(changes, device):
    with pytest.raises(UsageError, match=r"^runtime.capture = on: .*; use --set runtime.capture=auto$"):
        choose_capture(config(capture="on", **changes), torch.device(device))


@pytest.fixture
def on_a_cpu(monkeypatch):
    """Runs capture on a CPU too."""
    monkeypatch.setattr(setup, "choose_capture", lambda config, device: Choice("on", "a recording", {"must": True}))


def tiny(data: Path, **changes) -> Config:
    base = {"data.path": str(data), "data.size": "32x48", "model.depth": 2, "train.batch": 2, "runtime.device": "cpu"}
    base |= {"runtime.dtype": "fp32", "runtime.log_every": 1, "train.grow_from": 0.5, "train.ema": 0.9}
    return configs.override(configs.load_recipe("fast"), base | changes)


def lines(run: Path) -> list[tuple]:
    return [(e["step"], e["loss"], e["lr"]) for e in runs.read_log(run) if e["event"] == "train"]


def weights(run: Path) -> list[torch.Tensor]:
    found = read(run / "checkpoints" / "last.pt")
    momenta = [value["momentum_buffer"] for value in found["optimizer"]["state"]["state"].values()]
    return [*found["model"].values(), *found["ema"].values(), *momenta]


def test_shapes_that_take_turns_are_not_captured_again_and_again():
    step, twin = (a_step(captured=captured) for captured in (True, False))
    given = list(batches([(6, 8), (12, 16)] * (WARMUP + 2)))
    with counted() as replays:
        results = [step.step(*batch, 0.01) for batch in given]
    assert replays() == 0
    assert step.passes.news() == ([], "")
    assert_same(step, twin, results, [twin.step(*batch, 0.01) for batch in given])


class Killed(BaseException):
    """As sudden as a signal: nothing in the trainer catches it."""


def killed(after: int):
    def after_step(step: int) -> None:
        if step == after:
            raise Killed

    return after_step


def test_a_run_of_growing_images_that_is_killed_and_resumed_is_the_same_captured(
    street, tmp_path, on_a_cpu, monkeypatch
):
    changed = tiny(street, **{"train.epochs": 10, "train.checkpoint_steps": 6, "train.validate_every": 10})
    with counted() as replays, pytest.raises(Killed):
        train(changed, tmp_path / "captured", after_step=killed(after=6))
    again, _ = runs.reopen(tmp_path / "captured", lambda old: old)
    train(again, tmp_path / "captured", resume=True)
    # 40 steps of three sizes, each warmed up first, the smallest again after the kill.
    assert replays() == 40 - 4 * WARMUP
    found = runs.read_log(tmp_path / "captured")
    captured = [(e["size"], e["batch"]) for e in found if e["event"] == "captured"]
    assert captured == [("16x24", 2), ("16x24", 2), ("24x36", 2), ("32x48", 2)]
    start = next(e for e in found if e["event"] == "start")
    assert start["choices"]["capture"]["value"] == "on"
    monkeypatch.undo()
    train(changed, tmp_path / "ordinary")
    assert lines(tmp_path / "captured") == lines(tmp_path / "ordinary")
    assert all(
        torch.equal(*pair) for pair in zip(weights(tmp_path / "captured"), weights(tmp_path / "ordinary"), strict=True)
    )


@pytest.fixture
def warmed_up(monkeypatch) -> list:
    """The (height, width) that steps have warmed up, which they do on a CPU too."""
    sizes, real = [], Step.warm_up
    monkeypatch.setattr(setup, "WARMED_UP", ("cpu",))
    monkeypatch.setattr(Step, "warm_up", lambda step, given: sizes.append(given) or real(step, given))
    return sizes


@pytest.mark.parametrize("captured", [True, False], ids=["captured", "ordinary"])
def test_a_run_warms_up_the_sizes_to_come_and_its_losses_are_the_same(
    street, tmp_path, warmed_up, monkeypatch, captured
):
    if captured:
        monkeypatch.setattr(setup, "choose_capture", lambda config, device: Choice("on", "a test", {"must": True}))
    # 20 steps: 16x24 until step 6, 24x36 until step 12, then 32x48.
    changed = tiny(street, **{"train.epochs": 5, "train.checkpoint_steps": 6, "train.validate_every": 5})
    with pytest.raises(Killed):
        train(changed, tmp_path / "warm", after_step=killed(after=6))
    train(runs.reopen(tmp_path / "warm", lambda old: old)[0], tmp_path / "warm", resume=True)
    # The next step's size before it, the others after it, the largest first; then those that a resumed run still has.
    assert warmed_up == [[(16, 24)], [(32, 48), (24, 36)], [(24, 36)], [(32, 48)]]
    monkeypatch.undo()
    train(changed, tmp_path / "cold")
    said = [json.loads(line) for line in (tmp_path / "warm" / "log.jsonl").read_text().splitlines()]
    assert [(e["step"], e["sizes"]) for e in said if e["event"] == "warmed_up"] == [(1, 2), (7, 1)]
    assert lines(tmp_path / "warm") == lines(tmp_path / "cold")
    assert all(torch.equal(*pair) for pair in zip(weights(tmp_path / "warm"), weights(tmp_path / "cold"), strict=True))


def test_a_run_of_windows_warms_up_their_size(street, tmp_path, warmed_up):
    train(tiny(street, **{"augment.crop": "16x20", "train.grow_from": 1.0, "train.max_steps": 1}), tmp_path / "run")
    assert warmed_up == [[(16, 20)]]


def test_a_cpu_is_not_warmed_up_nor_what_sends_gradients(street, tmp_path, warmed_up, monkeypatch):
    with monkeypatch.context() as patch:
        patch.setattr(setup, "WARMED_UP", ("cuda",))
        setup.warm_up(run := setup.set_up(tiny(street), None))
    assert warmed_up == []
    setup.warm_up(run)
    assert len(warmed_up) == 1
    run.step.wrapped = nn.Sequential(run.step.model)
    setup.warm_up(run)
    assert len(warmed_up) == 1


@pytest.mark.slow
def test_two_processes_that_replay_and_exchange_afterwards_are_the_same(street, tmp_path):
    for what in ("captured", "ordinary"):
        script = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2", str(WORKER)]
        command = [*script, what, str(street), str(tmp_path / what)]
        environment = os.environ | {"OMP_NUM_THREADS": "1"}
        done = subprocess.run(command, capture_output=True, text=True, check=False, env=environment, timeout=300)
        assert done.returncode == 0, done.stderr
    found = runs.read_log(tmp_path / "captured")
    assert [e["size"] for e in found if e["event"] == "captured"] == ["32x48"]
    assert not [e for e in found if e["event"] == "buckets"]
    assert lines(tmp_path / "captured") == lines(tmp_path / "ordinary")
    assert all(
        torch.equal(*pair) for pair in zip(weights(tmp_path / "captured"), weights(tmp_path / "ordinary"), strict=True)
    )


def test_gradients_travel_in_buckets_of_a_size():
    gradients = [torch.zeros(n) for n in (3, 2, 1, 7, 1)]  # 4 bytes each
    found = [[len(gradient) for gradient in bucket] for bucket in buckets(gradients, 20)]
    assert found == [[3, 2], [1], [7], [1]]


def test_gradients_of_any_layout_are_summed_in_place():
    class Doubled:
        def sum(self, flat):
            assert flat.dtype == torch.float32
            return flat.mul_(2)

    convolution, bias = (nn.Parameter(torch.zeros(shape)) for shape in ((2, 3, 3, 3), (5,)))
    for layout in (torch.contiguous_format, torch.channels_last):
        value = torch.arange(54.0).view(2, 3, 3, 3)
        convolution.grad, bias.grad = value.clone(memory_format=layout), torch.arange(5.0)
        kept = convolution.grad
        sum_gradients([convolution, bias], Doubled(), bucket_mib=1, compress="none")
        assert convolution.grad is kept
        assert torch.equal(kept, 2 * value)
        assert torch.equal(bias.grad, 2 * torch.arange(5.0))


def test_compressed_gradients_travel_in_bf16():
    class Seen:
        def sum(self, flat):
            assert flat.dtype == torch.bfloat16
            return flat

    bias = nn.Parameter(torch.zeros(1))
    bias.grad = torch.tensor([1 + 2.0**-10])
    sum_gradients([bias], Seen(), bucket_mib=1, compress="bf16")
    assert bias.grad.tolist() == [1.0]


@pytest.fixture
def deterministic():
    """Operators of a GPU give the same bits each time, as --deterministic has them."""
    before = torch.backends.cudnn.benchmark
    os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
    torch.backends.cudnn.benchmark = False
    torch.use_deterministic_algorithms(True)
    yield
    torch.use_deterministic_algorithms(False)
    torch.backends.cudnn.benchmark = before


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=["fp32", "bf16", "fp16"])
@pytest.mark.parametrize("options", [{}, {"clip": 0.1, "ema": 0.9, "nesterov": True}], ids=["plain", "clip, average"])
@pytest.mark.parametrize("passes", [1, 2])
def test_a_gpu_replays_the_bits_of_fifty_ordinary_steps(deterministic, dtype, options, passes):
    device = torch.device("cuda", 0)
    how = {"device": device, "channels": (64, 128), "micro_batch": 4 // passes} | options
    # Two sizes, as growing images have them; odd heights, as pooling has them. Each micro-batch begins on 16 bytes, as
    # copies do: where it does not (2 labels of 45x60), PyTorch takes other kernels than a graph, which has copies.
    given = list(batches([(45, 64)] * 25 + [(91, 128)] * 25, 4, dtype, device))
    results, steps = [], []
    for captured in (True, False):
        step = a_step(dtype, captured=captured, **how)
        if dtype == torch.float16:
            step.scaler = torch.amp.GradScaler("cuda", init_scale=2.0**26, growth_interval=9)
            step.scale = step.scaler.get_scale()
        results.append([step.step(*batch, 0.01) for batch in given])
        steps.append(step)
    captures, failure = steps[0].passes.news()
    assert (len(captures), failure) == (2, "")
    assert_same(*steps, *results)
    steps[0].passes.release()


@pytest.mark.gpu
@pytest.mark.parametrize("captured", [True, False], ids=["captured", "ordinary"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["fp32", "bf16"])
def test_warming_up_a_gpu_leaves_no_trace(deterministic, dtype, captured):
    sizes = [(45, 64)] * (WARMUP + 3) + [(91, 128)] * (WARMUP + 3)
    how = {"device": torch.device("cuda", 0), "channels": (64, 128), "micro_batch": 4}
    assert_no_trace_of_warming_up(dtype, sizes, captured=captured, **how)


@pytest.mark.gpu
def test_what_waits_for_a_gpu_cannot_be_captured_and_the_run_goes_on():
    device = torch.device("cuda", 0)
    step = a_step(device=device)
    setup.capture_passes(step, must=False)
    forward = step.model.forward
    step.model.forward = lambda images: forward(images + float(images.max()) * 0)
    results = taken_on(step, device)
    captures, failure = step.passes.news()
    assert captures == []
    assert failure
    assert all(torch.isfinite(taken.loss) for taken in results)


def taken_on(step: Step, device: torch.device) -> list:
    return [step.step(*given, 0.01) for given in batches(SIZES, device=device)]


@pytest.mark.gpu
def test_gradients_of_a_graph_travel_by_nccl_in_a_world_of_one(tmp_path):
    device = torch.device("cuda", 0)
    torch.distributed.init_process_group("nccl", f"file://{tmp_path}/meeting", rank=0, world_size=1, device_id=device)
    try:
        step, twin = (a_step(captured=captured, device=device) for captured in (True, False))

        class One:
            def sum(self, flat):
                torch.distributed.all_reduce(flat)
                return flat

        step.exchange = lambda: sum_gradients(step.model.parameters(), One(), bucket_mib=1, compress="none")
        results = taken_on(step, device)
        assert len(step.passes.news()[0]) == 1
        for mine, theirs in zip(results, taken_on(twin, device), strict=True):
            torch.testing.assert_close(mine.loss, theirs.loss)
        step.passes.release()
    finally:
        torch.distributed.destroy_process_group()
