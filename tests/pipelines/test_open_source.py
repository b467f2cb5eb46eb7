"""`fastseg.pipelines.open_source` in a program that is not fastseg's, with a process group and settings of its own."""

import itertools
import json
import subprocess
import sys

import pytest
import torch

from fastseg.errors import UsageError
from fastseg.pipelines import open_source

HOW = {"size": (32, 48), "device": "cpu"}

# What a user's own script may look like, one of two processes.
SCRIPT = """
import itertools, json, sys
import torch, torch.distributed as dist
from fastseg.pipelines import open_source

folder, meeting, rank = sys.argv[1], sys.argv[2], int(sys.argv[3])
dist.init_process_group("gloo", init_method=f"file://{meeting}", rank=rank, world_size=2)
torch.set_num_threads(3)
how = {"size": (32, 48), "device": "cpu", "batch": 2, "rank": rank, "world": 2, "threads": 1}
steps = [b.indices.tolist() for b in itertools.islice(open_source(folder, seed=5, **how), 4)]
held = [i for b in open_source(folder, "val", **how) for i in b.indices.tolist()]
total = torch.tensor(len(held))
dist.all_reduce(total)  # the group is still ours
print(json.dumps({"steps": steps, "held": held, "total": int(total), "threads": torch.get_num_threads()}))
dist.destroy_process_group()
"""


def test_each_process_of_a_users_own_group_gets_its_share(street, tmp_path):
    processes = [
        subprocess.Popen(
            [sys.executable, "-c", SCRIPT, str(street), str(tmp_path / "meeting"), str(rank)],
            stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
        )
        for rank in range(2)
    ]  # fmt: skip
    ends = [process.communicate(timeout=120) for process in processes]
    assert [process.returncode for process in processes] == [0, 0], ends
    first, second = (json.loads(out) for out, _ in ends)
    assert (first["total"], first["threads"], second["threads"]) == (4, 3, 3)
    assert (first["held"], second["held"]) == ([0, 2], [1, 3])
    # 8 images are two steps of 2 x 2: of each step a process has every second sample of what one process would have.
    alone = open_source(street, seed=5, batch=4, **HOW)
    for mine, others in zip(first["steps"], second["steps"], strict=True):
        assert [x for pair in zip(mine, others, strict=True) for x in pair] == next(alone).indices.tolist()
    for two in (0, 2):
        epoch = first["steps"][two : two + 2] + second["steps"][two : two + 2]
        assert sorted(itertools.chain.from_iterable(epoch)) == list(range(8))


@pytest.mark.parametrize("split", ["train", "val"])
def test_nothing_of_the_process_is_touched(street, monkeypatch, split):
    def refuse(*_: object, **__: object) -> None:
        raise AssertionError("a setting of the process")

    next(open_source(street, split, batch=2, **HOW))  # what a library sets when it is first used is set by now
    for name in ("torch.distributed.init_process_group", "torch.cuda.set_device", "fastseg.distributed.keep_freed"):
        monkeypatch.setattr(name, refuse)
    before = torch.get_num_threads(), torch.backends.cudnn.benchmark
    monkeypatch.setenv("RANK", "0")
    monkeypatch.setenv("WORLD_SIZE", "2")  # a launcher's, which are the caller's to read
    assert len(next(open_source(street, split, batch=2, **HOW)).images) == 2
    assert (torch.get_num_threads(), torch.backends.cudnn.benchmark) == before


def test_more_processes_than_images_leave_some_without_any(street):
    assert [len(list(open_source(street, "val", batch=2, rank=rank, world=6, **HOW))) for rank in (3, 4)] == [1, 0]
    with pytest.raises(UsageError, match=r"^open_source: rank 2 of 2: from 0 to 1$"):
        open_source(street, rank=2, world=2, **HOW)
