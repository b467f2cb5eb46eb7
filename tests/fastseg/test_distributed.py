"""Devices and precision: what is chosen, and what is said of it."""

import json
import os
from pathlib import Path

import pytest
import torch

from fastseg import distributed
from fastseg.cli.options import starts_processes
from fastseg.cli.train_commands import processes_before
from fastseg.config import Runtime
from fastseg.distributed import check_gpus, choose_device, choose_dtype, join
from fastseg.errors import FastsegError, UsageError
from fastseg.workers import slurm_meeting_point, this_worker


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
    found = choose_dtype("auto", "cpu")
    assert (found.dtype, found.name, found.why) == (kind, str(kind).removeprefix("torch."), why)


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
    found = choose_dtype("auto", "cuda")
    assert (found.dtype, found.why) == (kind, "the best of compute capability {}.{}".format(*capability))


@pytest.mark.parametrize(
    ("device", "capability", "name", "why"),
    [
        ("cuda", (8, 0), "tf32", "as asked: convolutions keep 10 bits of a number"),
        ("cuda", (7, 5), "float32", "this GPU has no TF32"),
        ("cpu", None, "float32", "a CPU has no TF32"),
    ],
)
def test_tf32_is_a_choice_of_its_own(monkeypatch, device, capability, name, why):
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda: capability)
    assert choose_dtype("tf32", device) == (torch.float32, name, why)
    assert choose_dtype("fp32", device) == (torch.float32, "float32", "as asked")


@pytest.mark.parametrize(("dtype", "allowed"), [("fp32", False), ("bf16", False), ("tf32", True)])
def test_fp32_convolutions_are_fp32_unless_tf32_was_asked_for(monkeypatch, dtype, allowed):
    before = torch.backends.cudnn.allow_tf32
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 1)
    monkeypatch.setattr(torch.cuda, "set_device", lambda device: None)
    try:
        join(Runtime(device="cuda", dtype=dtype))
        assert torch.backends.cudnn.allow_tf32 == allowed
    finally:
        torch.backends.cudnn.allow_tf32 = before
        torch.backends.cudnn.benchmark = False


def test_what_was_asked_for_is_taken(monkeypatch):
    assert choose_dtype("bf16", "cpu") == (torch.bfloat16, "bfloat16", "as asked")
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


SRUN = {"SLURM_STEP_NUM_TASKS": "8", "SLURM_PROCID": "5", "SLURM_LOCALID": "1", "SLURM_NODEID": "2"}
SRUN |= {"SLURM_STEP_TASKS_PER_NODE": "2(x3),1(x2)", "SLURM_STEP_NODELIST": "gpu[07-09,12],big1", "SLURM_JOB_ID": "421"}


@pytest.fixture
def environment(monkeypatch):
    """environment({...}) replaces what launchers say in the environment."""

    def replace(variables: dict[str, str]) -> None:
        for name in list(os.environ):
            if name.startswith(("SLURM", "MASTER", "TORCHELASTIC")) or name in (
                "RANK", "WORLD_SIZE", "LOCAL_RANK", "LOCAL_WORLD_SIZE", "FASTSEG_LAUNCHER",
            ):  # fmt: skip
                monkeypatch.delenv(name)
        for name, value in variables.items():
            monkeypatch.setenv(name, value)

    return replace


@pytest.mark.parametrize(
    ("variables", "expected"),
    [
        ({}, None),
        ({"RANK": "3", "WORLD_SIZE": "4", "LOCAL_RANK": "1", "LOCAL_WORLD_SIZE": "2"}, (3, 4, 1, 2, False)),
        (SRUN, (5, 8, 1, 2, True)),
        (SRUN | {"SLURM_PROCID": "7", "SLURM_LOCALID": "0", "SLURM_NODEID": "4"}, (7, 8, 0, 1, True)),
        # One task, and a batch script of eight, which no srun has started.
        (SRUN | {"SLURM_STEP_NUM_TASKS": "1"}, None),
        ({"SLURM_NTASKS": "8", "SLURM_PROCID": "0", "SLURM_JOB_ID": "421"}, None),
        # torchrun within a task knows better.
        (SRUN | {"RANK": "0", "WORLD_SIZE": "2", "LOCAL_RANK": "0", "LOCAL_WORLD_SIZE": "2"}, (0, 2, 0, 2, False)),
    ],
)
def test_the_launchers_variables_give_the_place(environment, variables, expected):
    environment(variables)
    assert this_worker() == expected


LONE = {"RANK": "0", "WORLD_SIZE": "1"}
TORCHRUN = {"RANK": "3", "WORLD_SIZE": "4", "LOCAL_RANK": "1", "LOCAL_WORLD_SIZE": "2"}
NODES = {"SLURM_STEP_NUM_TASKS": "2", "SLURM_PROCID": "1", "SLURM_LOCALID": "0", "SLURM_NODEID": "1"}
NODES |= {"SLURM_STEP_TASKS_PER_NODE": "1(x2)", "SLURM_STEP_NODELIST": "n[1-2]", "SLURM_JOB_ID": "421"}
TASKS = NODES | {"SLURM_STEP_NUM_TASKS": "16", "SLURM_STEP_TASKS_PER_NODE": "8(x2)"}


@pytest.mark.parametrize(
    ("variables", "asked", "starts"),
    [
        ({}, (None, 2, 1), True),
        ({"RANK": "0"}, (None, 2, 1), True),  # alone it is no launcher's
        (LONE, (None, None, 1), False),
        (LONE, (None, 1, 1), False),
        (LONE | {"FASTSEG_LAUNCHER": "/tmp/x"}, (None, 2, 1), False),
        (TORCHRUN, (None, None, 1), False),
        (TORCHRUN, (2, None, 1), False),
        (TORCHRUN, (2, None, 2), False),
        (TASKS, (None, None, 1), False),
        (TASKS, (8, None, 2), False),
        # One task per node: each of them starts those of its node.
        (NODES, (8, None, 2), True),
        (NODES, (None, None, 2), True),
        (NODES, (None, None, 1), False),
    ],
)
def test_processes_are_started_by_the_command_or_by_the_launcher_around_it(environment, variables, asked, starts):
    environment(variables)
    assert starts_processes(*asked) is starts


@pytest.mark.parametrize(
    ("variables", "asked", "said"),
    [
        (
            LONE,
            (None, 2, 1),
            "--nproc 2: by RANK and WORLD_SIZE a launcher has started 1 in all, 1 on this machine; let it start them "
            "(torchrun --nproc-per-node 2) and leave --nproc 2 out, or unset these variables and run plain "
            "`fastseg train --nproc 2`",
        ),
        (
            TORCHRUN,
            (8, None, 1),
            "--gpus 8: by RANK and WORLD_SIZE a launcher has started 4 in all, 2 on this machine; ",
        ),
        (TORCHRUN, (None, None, 3), "--nnodes 3: by RANK and WORLD_SIZE a launcher has started 4 in all, 2 on this "),
        (
            NODES,
            (8, None, 1),
            "--gpus 8: by SLURM_PROCID and SLURM_STEP_NUM_TASKS a launcher has started 2 in all, 1 on this machine; "
            "let it start them (srun --ntasks-per-node 8) and leave --gpus 8 out, or unset these variables and run "
            "plain `fastseg train --gpus 8`",
        ),
        (
            NODES,
            (8, None, 4),
            "--gpus 8 --nnodes 4: by SLURM_PROCID and SLURM_STEP_NUM_TASKS a launcher has started 2 in ",
        ),
        (
            TASKS,
            (4, None, 2),
            "--gpus 4 --nnodes 2: by SLURM_PROCID and SLURM_STEP_NUM_TASKS a launcher has started 16 ",
        ),
    ],
)
def test_flags_that_a_launcher_contradicts_are_refused_with_both_ways_to_ask(environment, variables, asked, said):
    environment(variables)
    with pytest.raises(UsageError) as error:
        starts_processes(*asked)
    assert str(error.value).startswith(said)
    assert "\n" not in str(error.value)


def begun(run: Path, **start: object) -> Path:
    """The log of a run that began twice, last with these facts."""
    run.mkdir()
    lines = [{"event": "start", "step": 0, "world": 1, "device": "CPU"}, {"event": "start", "step": 4, **start}]
    (run / "log.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    return run


@pytest.mark.parametrize(
    ("start", "nodes", "gpus", "cores", "processes"),
    [
        ({"world": 8, "device": "NVIDIA H200"}, 1, 8, 2, 8),
        ({"world": 16, "device": "NVIDIA H200"}, 2, 8, 2, 8),
        ({"world": 2, "device": "CPU"}, 1, 0, 2, 2),
        ({"world": 1, "device": "NVIDIA H200"}, 1, 0, 2, 1),
    ],
)
def test_a_run_goes_on_with_its_own_number_of_processes(tmp_path, monkeypatch, start, nodes, gpus, cores, processes):
    monkeypatch.setattr(distributed, "usable_gpus", lambda: gpus)
    monkeypatch.setattr("fastseg.environment.cores", lambda: cores)
    assert processes_before(begun(tmp_path / "run", batch=32, **start), nodes) == processes


@pytest.mark.parametrize(
    ("start", "nodes", "gpus", "here"),
    [
        ({"world": 8, "device": "NVIDIA H200"}, 1, 1, "1 usable NVIDIA GPUs"),
        ({"world": 8, "device": "NVIDIA H200"}, 3, 8, "8 usable NVIDIA GPUs"),
        ({"world": 4, "device": "CPU"}, 1, 8, "2 cores"),
    ],
)
def test_a_machine_with_fewer_is_asked_for_a_number(tmp_path, monkeypatch, start, nodes, gpus, here):
    monkeypatch.setattr(distributed, "usable_gpus", lambda: gpus)
    monkeypatch.setattr("fastseg.environment.cores", lambda: 2)
    run = begun(tmp_path / "run", batch=32, **start)
    with pytest.raises(UsageError) as error:
        processes_before(run, nodes)
    assert str(error.value) == (
        f"--resume: {run} had {start['world']} processes, and this machine has {here}; say with --gpus N, or with "
        "--device cpu --nproc N, how many take the 32 images of a step from here on"
    )


@pytest.mark.parametrize(
    ("nodes", "first"), [("gpu[07-09,12],big1", "gpu07"), ("n1", "n1"), ("a-b-3,c", "a-b-3"), ("x[1,3]", "x1")]
)
def test_slurm_tasks_meet_on_the_first_node(environment, nodes, first):
    environment(SRUN | {"SLURM_STEP_NODELIST": nodes})
    found = slurm_meeting_point()
    assert found["MASTER_ADDR"] == first
    assert 20000 <= int(found["MASTER_PORT"]) < 40000
    environment(SRUN | {"MASTER_ADDR": "here", "MASTER_PORT": "1"})
    assert slurm_meeting_point() == {}


def test_a_slurm_task_that_sees_one_gpu_uses_it(environment, monkeypatch):
    environment(SRUN)
    seen = []
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 1)
    monkeypatch.setattr(torch.cuda, "set_device", seen.append)
    monkeypatch.setattr(distributed, "_meet", lambda mine, device, threads, timeout: (mine.rank, device, timeout))
    world, _ = distributed.join(Runtime(collective_timeout=7))
    assert world == (5, torch.device("cuda:0"), 7)
    assert seen == [torch.device("cuda:0")]
    environment({"RANK": "1", "WORLD_SIZE": "2", "LOCAL_RANK": "1", "LOCAL_WORLD_SIZE": "2"})
    with pytest.raises(UsageError, match="2 processes on this machine, but 1 GPUs: use fewer"):
        distributed.join(Runtime())


def test_several_gpus_without_nccl_are_refused_in_one_line(environment, monkeypatch):
    environment({"RANK": "0", "WORLD_SIZE": "2", "LOCAL_RANK": "0", "LOCAL_WORLD_SIZE": "2"})
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    monkeypatch.setattr(torch.cuda, "set_device", lambda device: None)
    monkeypatch.setattr(torch.distributed, "is_nccl_available", lambda: False)
    with pytest.raises(FastsegError, match=r"^several GPUs need NCCL, and this torch was built without it: ") as error:
        distributed.join(Runtime())
    assert "\n" not in str(error.value)
