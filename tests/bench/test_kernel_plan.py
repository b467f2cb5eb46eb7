"""What a step asks a GPU for, and how its kernels fill one: counted and worked out by hand."""

from types import SimpleNamespace

import pytest
import torch

from fastseg.bench import host, launches, levels
from fastseg.bench import kernels as bench_kernels
from fastseg.bench import plan as planning
from fastseg.config import Size
from fastseg.environment import install
from fastseg.errors import UsageError
from fastseg.kernels import launch

pytest.importorskip("triton", exc_type=ImportError)

NORMS, POOLED, CONVOLUTIONS = 25, 5, 26  # of SegNet on VGG-16


@pytest.fixture
def counted():
    return launches.step_launches()


def test_a_step_launches_two_kernels_per_norm_and_way_and_casts_all_weights_at_once(counted):
    norm, pool, loss = "bn_relu_triton", "pool_triton", "cross_entropy_triton"
    once = [f"{loss}.{name}_kernel" for name in ("weight_sum", "forward", "backward")]
    assert counted == {
        "convolution": (CONVOLUTIONS, CONVOLUTIONS),
        # Of all weights, of all inputs but the images, and of the last one's bias.
        "convolution_backward": (CONVOLUTIONS, CONVOLUTIONS + CONVOLUTIONS - 1 + 1),
        f"{norm}.statistics_kernel": (NORMS, NORMS),
        **{f"{norm}.{name}_kernel": (NORMS - POOLED,) * 2 for name in ("apply", "backward_sums", "backward")},
        **{f"{norm}.{name}_pool_kernel": (POOLED, POOLED) for name in ("apply", "backward_sums", "backward")},
        f"{pool}.unpool_kernel": (POOLED, POOLED),
        f"{pool}.take_kernel": (POOLED, POOLED),
        **dict.fromkeys(once, (1, 1)),
        "_foreach_copy_": (2, 2),  # weights to 16 bits, gradients back
        "_fused_sgd_": (1, 1),
        "eq": (1, 1),  # whether there was a labelled pixel
    }
    assert sum(calls for calls, _ in counted.values()) <= 170


def test_copies_inside_of_an_operator_are_counted(monkeypatch):
    from fastseg.kernels.pool import unpool

    counting = launches.Launches()
    x, codes = torch.zeros(1, 8, 2, 2), torch.zeros(1, 8, 2, 2, dtype=torch.uint8)
    with host.launches_stubbed(), counting:
        unpool(x, codes, 4, 4)  # neither is channels-last
    assert counting.found == {"clone": (2, 2)}


def test_the_planned_kernels_move_what_the_operators_must():
    batch, size = 3, Size(45, 60)
    total = 0
    for (height, width, channels), calls in planning.places(size).items():
        pooled = channels * ((height + 1) // 2) * ((width + 1) // 2)
        of = planning.moved(batch * channels * height * width, batch * pooled)
        total += sum(times * sum(of[name]) for name, times in calls.items())
    must = bench_kernels.bytes_per_image(size)
    assert total == batch * sum(must[name][0] for name in ("unpool", "bn_relu", "bn_relu_pool"))


# 132 multiprocessors x 2048 threads; a copy of 4.3 TB/s; 1.1 us until busy memory answers; a launch and 600 ns before.
FIXED = 1e-6 + 600e-9


def case(programs, warps=4, **values):
    return SimpleNamespace(kernel=None, warps=warps, programs=programs, values=values)


def planned(monkeypatch, case, read, written, name="k", **built):
    built = {"registers": 32, "shared": 0, "load_bits": [128], "copy_bits": [], "in_loop": 0, "instructions": 1} | built
    monkeypatch.setattr(planning, "_compiled", lambda case: built)
    return planning.row(name, "", 1, case, read, written)


def test_a_kernel_of_many_small_programs_is_bound_by_memory(monkeypatch):
    found = planned(monkeypatch, case(132 * 160), 132 * 160 * 4096, 0, copy_bits=[64])
    assert (found.bound, found.waves, found.bits) == ("memory", 10, 128)
    assert found.in_flight == 16 * 4096  # 2048 threads are 16 programs
    assert found.seconds == pytest.approx(FIXED + 132 * 160 * 4096 / 4.3e12)


def test_few_bytes_in_flight_are_bound_by_latency(monkeypatch):
    # 255 registers: 2 programs at a time, 8 kB of a multiprocessor in flight.
    found = planned(monkeypatch, case(132 * 160), 132 * 160 * 4096, 0, registers=255)
    assert (found.bound, found.in_flight, found.waves) == ("latency", 2 * 4096, 80)
    assert found.seconds == pytest.approx(FIXED + 80 * 1.1e-6)


def test_a_last_round_that_is_hardly_filled_costs_a_whole_one(monkeypatch):
    # 133 programs: two rounds of multiprocessors, in each 66.5 at work.
    found = planned(monkeypatch, case(133), 133 * 1000, 0, instructions=10_000)
    assert found.bound == "issue"
    assert found.seconds == pytest.approx(FIXED + 10_000 * 4 * 133 / (4 * 1.755e9 * 66.5))


def test_a_loop_that_waits_for_its_own_loads_adds_latency_to_issue(monkeypatch):
    # 10 turns of 128 rows, each of 100 instructions of 4 warps that share 4 schedulers; then the last one merges.
    given = {"share": 1280, "PIXELS": 128, "PARTS": 64}
    found = planned(monkeypatch, case(132, **given), 132 * 1280 * 64, 0, in_loop=100)
    assert (found.bound, found.in_flight) == ("latency", 128 * 64)
    assert found.seconds == pytest.approx(FIXED + 10 * (1.1e-6 + 100 / 1.755e9) + 3 * 300e-9)


def test_a_loop_that_copies_ahead_has_more_in_flight(monkeypatch):
    given = {"share": 1280, "ROWS": 128, "PARTS": 64, "STAGES": 5}
    found = planned(monkeypatch, case(132, 16, **given), 132 * 1280 * 128, 0, name="bn_relu statistics", in_loop=10)
    assert (found.bound, found.in_flight) == ("memory", 4 * 128 * 128)
    assert found.seconds == pytest.approx(FIXED + 132 * 1280 * 128 / 4.3e12 + 3 * 300e-9 + 600e-9)
    # No more is on its way than there is.
    short = planned(monkeypatch, case(132, 16, **given | {"share": 200}), 132 * 200 * 128, 0)
    assert short.in_flight == 200 * 128


def test_lists_move_all_weights():
    (_, launched, nbytes, seconds), back, optimiser = planning.lists()
    parameters = 29_441_419  # VGG-16's convolutions twice, norms and 11 classes
    assert (nbytes, back[2], optimiser[2]) == (6 * parameters, 6 * parameters, 20 * parameters)
    assert launched == 2  # 450 chunks of 65536, 320 in a launch
    assert seconds == pytest.approx(2 * FIXED + 6 * parameters / 4.3e12)


@pytest.mark.slow
@pytest.mark.skipif(launch.INTERPRETED, reason="compiles nothing under TRITON_INTERPRET")
def test_the_plan_of_the_published_step(counted):
    found = planning.document(Size(360, 480), 4)
    assert found["copying"] == pytest.approx(4 * 1288e6 / 4.3e12, rel=1e-3)
    assert all(row["bits"] == 128 for row in found["kernels"] if row["kernel"].startswith("bn_relu"))
    # What keeps memory busy is on its way wherever a map is larger than that.
    needed = found["needed_in_flight"]
    big = [row for row in found["kernels"] if row["kernel"].startswith("bn_relu") and row["nbytes"] > 40e6]
    assert len(big) > 10
    assert all(row["in_flight"] >= needed for row in big)
    text = planning.show(found)
    assert "\nbn_relu statistics          360x480, 64        3      132 " in text
    assert f"A step calls {sum(calls for calls, _ in counted.values())} operators and kernels, " in text


def test_a_plan_needs_a_compiler(monkeypatch):
    monkeypatch.setattr(planning, "INTERPRETED", True)
    with pytest.raises(UsageError, match="--plan: TRITON_INTERPRET=1 compiles nothing; unset it"):
        planning.document(Size(9, 10), 1)
    monkeypatch.setattr(planning.importlib.util, "find_spec", lambda name: None)
    with pytest.raises(
        UsageError, match=r"--plan: compiles kernels with Triton, which is not here: pip install triton"
    ):
        planning.document(Size(9, 10), 1)


def test_times_of_a_profile_are_of_the_devices_kernels():
    def event(name, device, microseconds):
        return SimpleNamespace(
            name=name, device_type=device, time_range=SimpleNamespace(elapsed_us=lambda: microseconds)
        )

    gpu, cpu = torch.autograd.DeviceType.CUDA, torch.autograd.DeviceType.CPU
    events = [event("a_kernel", gpu, 2.0), event("a_kernel", gpu, 4.0), event("launch", cpu, 9.0), event("b", gpu, 1.0)]
    assert levels.device_seconds(events) == pytest.approx({"a_kernel": 3e-6, "b": 1e-6})


@pytest.mark.parametrize("pooled", [False, True])
def test_what_is_profiled_runs_every_kernel_of_a_map(pooled):
    counting = launches.Launches()
    x = torch.randn(1, 8, 4, 6).to(memory_format=torch.channels_last).requires_grad_()
    names = {name for calls in planning.places(Size(4, 6)).values() for name in calls}
    assert {name for name in names if (name in levels.POOLED) == pooled}
    call = levels.operators(x, pooled=pooled)
    run: list[str] = []
    with host.launches_stubbed(), counting, pytest.MonkeyPatch.context() as patch:
        import triton

        patch.setattr(triton.JITFunction, "run", lambda kernel, *args, **options: run.append(kernel.fn.__name__))
        call()
    from fastseg.kernels import aot

    cases = aot.level(1, 4, 6, 8, 4)
    wanted = {cases[name].kernel.__name__ for name in names if (name in levels.POOLED) == pooled}
    assert wanted <= set(run)


@pytest.mark.gpu
def test_every_kernel_is_timed_on_every_map():
    found = levels.measure(torch.device("cuda"), torch.bfloat16, Size(45, 60), 2)
    places = planning.places(Size(45, 60))
    timed = [row for row in found if row["unit"] == "us" and "whole" not in row["name"]]
    assert len(timed) == sum(len(calls) for calls in places.values())
    assert all(row["value"] > 0 for row in found)


def test_cudnns_norm_is_a_peer_on_a_gpu_where_it_is_installed(monkeypatch, capsys):
    here = SimpleNamespace(is_cuda=True, dtype=torch.bfloat16)
    assert bench_kernels.cudnn_peer(torch.ones(1), None, None) == {}
    assert capsys.readouterr().err == ""
    monkeypatch.setattr(bench_kernels.importlib.util, "find_spec", lambda name: None)
    assert bench_kernels.cudnn_peer(here, None, None) == {}
    assert f"without cuDNN's batch norm, which is not installed: {install('cudnn')}\n" in capsys.readouterr().err


@pytest.mark.gpu
def test_cudnns_norm_computes_the_same_as_torchs():
    pytest.importorskip("cudnn")
    from fastseg.bench.peers.cudnn_norm import norm_relu

    x = torch.randn(2, 64, 24, 32, device="cuda").to(torch.bfloat16, memory_format=torch.channels_last)
    gradient, norm = torch.randn_like(x), torch.nn.BatchNorm2d(64).cuda()
    twin, theirs = torch.nn.BatchNorm2d(64).cuda().double(), x.double().requires_grad_()
    y, (d_x, d_weight, d_bias) = norm_relu(x, gradient, norm)()
    wanted = torch.relu(twin(theirs))
    wanted.backward(gradient.double())
    torch.testing.assert_close(y.double(), wanted, rtol=2**-7, atol=1e-2)
    torch.testing.assert_close(d_x.double(), theirs.grad, rtol=2**-6, atol=2e-2)
    torch.testing.assert_close(d_weight.flatten().double(), twin.weight.grad, rtol=1e-2, atol=1e-1)
    torch.testing.assert_close(d_bias.flatten().double(), twin.bias.grad, rtol=1e-2, atol=1e-1)
    torch.testing.assert_close(norm.running_var.double(), twin.running_var, rtol=1e-3, atol=1e-4)
