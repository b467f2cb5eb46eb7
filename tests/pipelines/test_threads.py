"""Nothing on the way to a batch uses torch's own threads: those that decode have the cores."""

import itertools
from dataclasses import replace

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from fastseg.config import Augment, Size
from fastseg.pipelines import cache
from fastseg.pipelines.growing import GrowingSource, Phase
from fastseg.pipelines.plan import Plan
from fastseg.pipelines.source import TrainSource, choose_loader, evaluation_batches
from fastseg.specs import open_specs

# Operators that make, copy or look at tensors; all others compute, and share their work out from 32768 elements on.
MOVING = {"empty", "view", "detach", "slice", "select", "split", "unbind", "permute", "alias", "as_strided", "_to_copy"}
MOVING |= {"lift_fresh", "unsqueeze", "expand", "stack", "cat", "clone", "copy_", "_unsafe_view", "reshape", "zeros"}


class Computing(TorchDispatchMode):
    """Notes what is computed on tensors of the CPU."""

    def __init__(self) -> None:
        super().__init__()
        self.seen: list[str] = []

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        found = function(*args, **(kwargs or {}))
        tensors = [leaf for leaf in tree_leaves((args, found)) if isinstance(leaf, torch.Tensor)]
        name = function.overloadpacket.__name__
        if name not in MOVING and any(t.device.type == "cpu" and t.dim() for t in tensors):
            self.seen.append(name)
        return found


def test_the_mode_sees_what_computes():
    with Computing() as mode:
        pixels = torch.zeros(4, 4, dtype=torch.uint8)
        (pixels == 3).any()
        pixels[1:].float()
    assert mode.seen == ["eq", "any"]


@pytest.mark.parametrize("loader", ["dali", "cache", "reference"])
@pytest.mark.parametrize("size", ["96x144", "48x72"])
def test_no_source_computes_with_torch_on_the_cpu(street, loader, size, monkeypatch):
    if loader == "dali":
        pytest.importorskip("nvidia.dali")

    class Here(cache.Filling):
        """Fills on the thread that reads, where it is seen."""

        def __init__(self, store, work):
            super().__init__(store, iter(()))
            for _ in work:
                pass

    monkeypatch.setattr(cache, "Filling", Here)
    spec = replace(open_specs(str(street), splits=("train",), size=size)[1]["train"], threads=1)
    spec, _ = choose_loader(loader, spec, grows=True)
    plan = Plan(num_samples=8, batch=4, seed=0, mirror=True, max_shift=(5, 5))
    phases = [Phase(2, Size(24, 36)), Phase(4, spec.size)]
    with Computing() as mode:
        for batch in itertools.islice(GrowingSource(spec, plan, phases, Augment()), 4):
            assert len(batch.images) == 4
        source = TrainSource(spec, plan)
        next(iter(source))
        source.check()
        for resize_labels in (True, False):
            assert len(list(evaluation_batches(spec, 3, resize_labels=resize_labels))) == 3
    cache.forget()
    assert mode.seen == []
