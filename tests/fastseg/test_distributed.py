"""Devices and precision: what is chosen, and what is said of it."""

import pytest
import torch

from fastseg.distributed import check_gpus, choose_device, choose_dtype
from fastseg.errors import UsageError


@pytest.mark.parametrize(
    ("avx512", "amx", "kind", "why"),
    [
        (False, False, torch.float32, "this CPU has no bf16 instructions"),
        (True, False, torch.bfloat16, "this CPU has bf16 instructions"),
        (False, True, torch.bfloat16, "this CPU has bf16 instructions"),
    ],
)
def test_auto_takes_bf16_only_on_cpus_that_compute_it(monkeypatch, avx512, amx, kind, why):
    monkeypatch.setattr(torch.cpu, "_is_avx512_bf16_supported", lambda: avx512)
    monkeypatch.setattr(torch.cpu, "_is_amx_tile_supported", lambda: amx)
    assert choose_dtype("auto", "cpu") == (kind, why)


@pytest.mark.parametrize(
    ("capability", "kind"),
    [
        ((9, 0), torch.bfloat16),
        ((8, 0), torch.bfloat16),
        ((7, 5), torch.float16),
        ((7, 0), torch.float16),
        ((6, 1), torch.float32),
    ],
)
def test_auto_takes_what_the_gpus_generation_does_well(monkeypatch, capability, kind):
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda: capability)
    assert choose_dtype("auto", "cuda") == (kind, "the best of compute capability {}.{}".format(*capability))


def test_what_was_asked_for_is_taken(monkeypatch):
    assert choose_dtype("bf16", "cpu") == (torch.bfloat16, "as asked")
    assert choose_device("cpu") == ("cpu", "as asked")


def test_without_a_gpu_cuda_is_refused_and_auto_says_so(monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert choose_device("auto") == ("cpu", "no NVIDIA GPU is here")
    with pytest.raises(UsageError, match="--device cuda: torch sees no usable NVIDIA GPU here; use --device cpu"):
        choose_device("cuda")
    with pytest.raises(UsageError, match="--gpus 2: torch sees 0 usable NVIDIA GPUs here; use --device cpu"):
        check_gpus(2)


def test_too_few_gpus_are_counted(monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 4)
    check_gpus(4)
    with pytest.raises(UsageError, match="--gpus 8: torch sees 4 usable NVIDIA GPUs here; use --gpus 4"):
        check_gpus(8)
