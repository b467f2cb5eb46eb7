"""Every kernel builds for every architecture without a GPU, with wide memory accesses and without spills."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import triton
import triton.language as tl

import fastseg.kernels
from fastseg.kernels import aot
from fastseg.kernels.launch import INTERPRETED

pytestmark = pytest.mark.skipif(INTERPRETED, reason="builds the same machine code in the run without TRITON_INTERPRET")

# All accesses to feature maps are 16 bytes wide; what else these kernels touch is per channel, or a byte per element.
# What reduces copies maps to shared memory, codes with them.
COPIES = {
    "bn_relu statistics": {128},
    "bn_relu backward sums": {128},
    "bn_relu backward sums, pool": {64, 128},
}
MAPS = {
    "pool": ({128}, {64, 128}),
    "unpool": ({64, 128}, {128}),
    "take": ({64, 128}, {128}),
    "bn_relu apply": ({128}, {128}),
    "bn_relu apply, pool": ({128}, {64, 128}),
    "bn_relu backward": ({128}, {128}),
    "bn_relu backward, pool": ({64, 128}, {128}),
}


@pytest.fixture(scope="module")
def built() -> list[dict]:
    """In a process of its own: a kernel is either compiled or interpreted, and only one is possible per process."""
    environment = {key: value for key, value in os.environ.items() if key != "TRITON_INTERPRET"}
    command = [sys.executable, "-m", "fastseg.kernels.aot"]
    done = subprocess.run(command, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout.splitlines()[-1])


@triton.jit
def shift_kernel(x_ptr, shift_ptr, pixels, factor, PIXELS: tl.constexpr):
    pixel = tl.program_id(0) * PIXELS + tl.arange(0, PIXELS)
    value = tl.load(x_ptr + pixel, pixel < pixels, 0.0) * factor + tl.load(shift_ptr)
    tl.store(x_ptr + pixel, value, pixel < pixels)


@pytest.mark.parametrize(
    ("values", "name", "where"),
    [
        ({"pixels": 64, "factor": 2, "PIXELS": 16}, "shift_ptr", "POINTERS"),
        ({"pixels": 64, "PIXELS": 16}, "factor", r"its case in cases\(\), or to FLOATS,"),
        ({"pixels": 64, "factor": 2}, "PIXELS", r"its case in cases\(\), or to FLOATS,"),
    ],
)
def test_what_nothing_says_of_a_kernel_is_not_guessed(monkeypatch, values, name, where):
    if name != "shift_ptr":
        monkeypatch.setitem(aot.POINTERS, "shift_ptr", "*fp32")
    message = f"^shift_kernel: nothing says what {name} is; add it to {where} in kernels/aot.py$"
    with pytest.raises(LookupError, match=message):
        aot.build(aot.Case(shift_kernel, values, 4, 1), "fp32", 90)


def test_every_pointer_in_the_table_is_a_kernels():
    kernels = [case.kernel for case in aot.cases("fp32").values()]
    names = {name for kernel in kernels for name in kernel.arg_names if name.endswith("_ptr")}
    assert set(aot.POINTERS) == names


@pytest.mark.slow
def test_all_kernels_build_for_all_architectures_and_dtypes(built):
    sources = Path(fastseg.kernels.__file__).parent.glob("*_triton.py")
    kernels = [line for path in sources for line in path.read_text().splitlines() if line.startswith("def ")]
    names = {line.removeprefix("def ").partition("(")[0] for line in kernels if "_kernel(" in line}
    assert {row["function"] for row in built} == names
    for name in {row["kernel"] for row in built}:
        rows = {(row["sm"], row["dtype"]) for row in built if row["kernel"] == name}
        assert rows == {(sm, dtype) for sm in (80, 90, 100) for dtype in ("fp32", "fp16", "bf16")}, name


@pytest.mark.slow
def test_no_kernel_spills_or_asks_for_more_shared_memory_than_any_such_gpu_has(built):
    # The least are compute capability 8.6 and 8.9, with 99 KiB for a block (CUDA C++ Programming Guide, table 30).
    assert [row for row in built if row["spilled"] or row["shared"] > 99 * 1024] == []


@pytest.mark.slow
@pytest.mark.parametrize("kernel", MAPS)
@pytest.mark.parametrize("dtype", ["fp16", "bf16"])
def test_feature_maps_are_read_and_written_16_bytes_at_a_time(built, kernel, dtype):
    rows = [row for row in built if (row["kernel"], row["dtype"]) == (kernel, dtype)]
    assert [(set(row["load_bits"]), set(row["store_bits"])) for row in rows] == [MAPS[kernel]] * 3
    assert all(row["v4"] for row in rows)


@pytest.mark.slow
@pytest.mark.parametrize("kernel", COPIES)
@pytest.mark.parametrize("dtype", ["fp16", "bf16"])
def test_what_reduces_feature_maps_copies_16_bytes_at_a_time(built, kernel, dtype):
    rows = [row for row in built if (row["kernel"], row["dtype"]) == (kernel, dtype)]
    assert [set(row["copy_bits"]) for row in rows] == [COPIES[kernel]] * 3


@pytest.mark.slow
def test_a_program_counts_itself_once_its_part_can_be_seen(built):
    reducing = {*COPIES, "cross_entropy forward", "weight_sum"}
    found = {(row["kernel"], row["fenced"]) for row in built}
    assert {kernel for kernel, fenced in found if fenced is not None} == reducing
    assert {fenced for kernel, fenced in found if kernel in reducing} == {True}


BARRIER, FENCE, ATOMIC = "BAR.SYNC.DEFER_BLOCKING 0x0", "@P1 MEMBAR.ALL.GPU", "@P1 ATOMG.E.ADD.STRONG.GPU PT, R3, R3"
STORE, LOAD = "@P0 STG.E.128 desc[UR4][R2.64], R4", "LDG.E R4, desc[UR4][R2.64]"


@pytest.mark.parametrize(
    ("code", "wanted"),
    [
        ([LOAD, STORE], None),
        ([STORE, BARRIER, FENCE, ATOMIC, STORE], True),
        ([STORE, FENCE, BARRIER, ATOMIC], False),
        ([BARRIER, FENCE, STORE, ATOMIC], False),
        ([STORE, BARRIER, ATOMIC], False),
    ],
)
def test_a_store_is_seen_after_a_barrier_and_a_fence(code, wanted):
    assert aot.fenced(code) is wanted


def test_the_loop_over_tiles_is_the_first_that_is_jumped_back_to():
    code = [LOAD, "@P0 BRA `(.L_x_2)", ".L_x_1:", LOAD, STORE, "@P1 BRA `(.L_x_1)", ".L_x_2:", "BRA `(.L_x_2)"]
    assert aot.in_loop(code) == 3  # a load, a store, and the jump
    assert aot.in_loop([LOAD, ".L_x_0:", "BRA `(.L_x_0)"]) == 0  # the trap at the end of every kernel


@pytest.mark.slow
@pytest.mark.parametrize("dtype", ["fp32", "fp16", "bf16"])
def test_augmented_images_are_written_16_bytes_at_a_time(built, dtype):
    rows = [row for row in built if (row["kernel"], row["dtype"]) == ("augment", dtype)]
    assert len(rows) == 3
    assert all(max(row["store_bits"]) == 128 for row in rows)
