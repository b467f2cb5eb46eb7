"""Memory that one training step frees is there for the next."""

import platform
import subprocess
import sys

import pytest

STEPS = """
import resource, sys, torch
from fastseg.config import Runtime
from fastseg.distributed import join

if sys.argv[1] == "joined":
    join(Runtime(device="cpu"))

def step():
    kept = [torch.ones(3, 1024, 1024) for _ in range(8)]  # 12 MiB each, 96 MiB in all
    return torch.stack([tensor.sum() for tensor in kept]).sum()

for _ in range(2):
    step()
before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
for _ in range(4):
    step()
print((resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before) * resource.getpagesize() / 4)
"""


def fresh_bytes(how: str) -> float:
    """Bytes of pages that the kernel had to give to each step."""
    command = [sys.executable, "-c", STEPS, how]
    return float(subprocess.run(command, capture_output=True, text=True, check=True).stdout)


@pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="another C library than glibc")
def test_a_step_writes_to_pages_that_the_process_has():
    assert fresh_bytes("alone") > 48 * 2**20  # at least half of what it fills is new to it each time
    assert fresh_bytes("joined") < 2**20
