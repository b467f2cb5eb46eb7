"""Figures of a timeline, worked by hand; and what must hold for any."""

import itertools

import pytest
from hypothesis import given
from hypothesis import strategies as st

from fastseg.profiling import text
from fastseg.profiling.summary import summarise
from fastseg.profiling.timeline import Span, Timeline, Work, from_nsys


def test_the_hosts_time_by_part_and_operator():
    found = Timeline(
        steps=[Span("step 6", 0, 100), Span("step 7", 100, 220)],
        ranges=[
            Span("forward", 0, 40),
            Span("encoder 1", 0, 30),
            Span("forward", 100, 150),
            Span("encoder 1", 100, 120),
            Span("loss", 150, 160),
        ],
        operators=[
            (1, Span("aten::conv2d", 0, 20)),
            (1, Span("aten::mkldnn_convolution", 2, 17)),
            (2, Span("aten::conv2d", 5, 10)),  # on another thread: not inside the first
        ],
    )
    document = summarise(found)
    assert (document["steps"], document["step_ms"], document["device"]) == (2, 0.11, None)
    forward, loss, other = document["ranges"]
    assert (forward["name"], forward["ms"], forward["share"]) == ("forward", 0.045, pytest.approx(90 / 220))
    assert [(row["name"], row["ms"]) for row in forward["ranges"]] == [("encoder 1", 0.025)]
    assert (loss["name"], loss["share"]) == ("loss", pytest.approx(10 / 220))
    assert (other["name"], other["share"]) == ("other", pytest.approx(120 / 220))
    # 20 + 5 less the 15 inside.
    assert [(row["name"], row["ms"], row["calls"]) for row in document["operators"]] == [
        ("aten::mkldnn_convolution", 0.0075, 0.5),
        ("aten::conv2d", 0.005, 1),
    ]


def test_the_devices_side_of_a_made_up_report(nsys_report):
    document = summarise(from_nsys(nsys_report))
    device = document["device"]
    # Per step of 10 ms: a copy 0-1, a convolution 1-4, a conversion 4-5 beside NCCL 4-6.
    assert device["busy"] == pytest.approx(0.6)
    assert [(row["name"], row["ms"]) for row in device["idle"]] == [("data wait", pytest.approx(4))]
    assert {row["name"]: row["ms"] for row in device["ranges"]} == {"forward": 4, "backward": pytest.approx(3)}
    assert [(row["ms"], row["calls"]) for row in device["kernels"]] == [(3, 1), (2, 1), (1, 1)]
    assert device["tensor_core_share"] == pytest.approx(3 / 4)
    assert device["communication"]["ms"] == 2
    assert device["communication"]["hidden"] == pytest.approx(0.5)
    copies = device["copies_to_device"]
    assert (copies["ms"], copies["calls"], copies["megabytes"]) == (1, 1, 4)
    assert device["layout_conversions"] == [{"name": "backward", "calls": 1}]
    shown = text.show({"ranks": [{"rank": 0, **document, "layout_changes": []}]})
    assert "GPU busy 60.0 % of the time" in shown
    assert "layout conversion kernels: 1 per step (backward 1)" in shown
    assert "NCCL: 2.00 ms per step, 50.0 % of it beside computation" in shown


@pytest.mark.parametrize(
    ("name", "uses"),
    [
        ("volta_fp16_s884cudnn_fp16_256x64_ldg8_relu_exp_small_nhwc_tn_v1", True),
        ("sm80_xmma_wgrad_implicit_gemm_bf16bf16_bf16f32_f32_nhwckrsc_nhwc_tilesize128x128x32_g1_tensor16x8x16", True),
        ("cutlass__5x_cudnn::Kernel<cutlass_tensorop_bf16_s16816fprop_optimized_bf16_128x64>", True),
        ("sm90_xmma_fprop_implicit_gemm_bf16bf16_bf16f32_f32_nhwckrsc_nhwc_warpgroupsize1x1x1", True),
        ("sm80_xmma_fprop_implicit_gemm_f32f32_f32f32_f32_nhwckrsc_nhwc_tilesize128x32x8_stage3_ffma", False),
        ("void at::native::vectorized_elementwise_kernel<4, at::native::CUDAFunctor_add>", False),
        ("bn_relu_pool_kernel", False),
    ],
)
def test_tensor_cores_are_known_by_names(name, uses):
    found = Timeline([Span("step 1", 0, 10)], work=[Work(name, 0, 5, 0)])
    assert summarise(found)["device"]["tensor_core_share"] == float(uses)


@st.composite
def timelines(draw):
    """Steps that touch, cut into parts at random, with work anywhere, before and after too."""
    cuts = draw(st.lists(st.integers(1, 1000), min_size=2, max_size=12, unique=True).map(sorted))
    names = st.sampled_from(["forward", "backward", "data wait"])
    steps = [Span(f"step {i}", a, b) for i, (a, b) in enumerate(itertools.pairwise(cuts))]
    stages = []
    for step in steps:
        middle = draw(st.integers(int(step.start), int(step.end)))
        if draw(st.booleans()):
            stages.append(Span(draw(names), step.start, middle))
        if draw(st.booleans()) and middle < step.end:
            stages.append(Span(draw(names), middle, step.end))
    work = draw(st.lists(st.tuples(st.integers(0, 1100), st.integers(1, 300)), min_size=1, max_size=8))
    done = [Work("k", start, start + length, start) for start, length in sorted(work)]
    return Timeline(steps, [s for s in stages if s.start < s.end], done).within_steps()


@given(timelines())
def test_shares_add_up_to_the_step_and_the_device_is_busy_or_idle(found):
    document = summarise(found)
    assert sum(row["share"] for row in document["ranges"]) == pytest.approx(1)
    assert all(row["share"] >= -1e-12 for row in document["ranges"])
    if document["device"]:
        idle = sum(row["share"] for row in document["device"]["idle"])
        assert document["device"]["busy"] + idle == pytest.approx(1)
