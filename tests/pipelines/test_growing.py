"""Progressive resizing: phases worked by hand, and batches that are those of sources of each size."""

import dataclasses
import itertools

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from fastseg.config import Augment, Train
from fastseg.pipelines.growing import GrowingSource, Phase, plan_phases, work_left
from fastseg.pipelines.plan import Plan
from fastseg.pipelines.source import STD, TrainSource
from fastseg.specs import open_specs


def test_half_the_size_then_three_quarters_then_all_of_it():
    found = plan_phases(Train(grow_from=0.5, grow_share=0.6), (120, 160), 100)
    assert found == [Phase(30, (60, 80)), Phase(60, (90, 120)), Phase(100, (120, 160))]


def test_without_growth_there_is_one_phase():
    assert plan_phases(Train(), (120, 160), 100) == [Phase(100, (120, 160))]
    assert plan_phases(Train(grow_from=0.5, grow_share=0.0), (120, 160), 100) == [Phase(100, (120, 160))]


@given(st.floats(0.01, 1), st.floats(0, 0.99), st.integers(1, 500), st.integers(1, 300))
def test_phases_follow_one_another_and_end_at_full_size(grow_from, share, total, side):
    found = plan_phases(Train(grow_from=grow_from, grow_share=share), (side, 2 * side), total)
    assert found[-1] == Phase(total, (side, 2 * side))
    ends = [phase.until for phase in found]
    assert ends == sorted(set(ends))
    areas = [phase.size[0] * phase.size[1] for phase in found]
    assert areas == sorted(areas)
    assert min(areas) >= 1


def test_the_work_left_is_counted_in_steps_of_the_present_size():
    phases = [Phase(30, (60, 80)), Phase(60, (90, 120)), Phase(100, (120, 160))]
    # A step of the second phase has 2.25, one of the last 4 times the pixels of one of the first.
    assert work_left(phases, 20) == pytest.approx(10 + 30 * 2.25 + 40 * 4)
    assert work_left(phases, 30) == pytest.approx(30 + 40 * 4 / 2.25)
    assert work_left(phases, 0, (120, 160)) == pytest.approx(30 / 4 + 30 * 2.25 / 4 + 40)
    assert work_left(phases, 95) == 5
    assert work_left(phases, 100) == 0


@pytest.mark.parametrize("loader", ["cache", "reference"])
@pytest.mark.parametrize("start", [0, 1, 2, 5])
@pytest.mark.parametrize("scale", [1.0, 2.0])
def test_batches_are_those_of_each_phases_own_source(street, loader, start, scale):
    _, specs = open_specs(str(street), splits=("train",), size="48x72")
    augment = Augment(translate=60)
    plan = Plan(num_samples=8, batch=2, seed=3, mirror=True, scale=scale, max_shift=augment.max_shift((48, 72)))
    phases = [Phase(2, (24, 36)), Phase(4, (36, 54)), Phase(6, (48, 72))]
    source = GrowingSource(dataclasses.replace(specs["train"], loader=loader), plan, phases, augment, start)
    found = list(itertools.islice(source, 7 - start))  # a source is endless
    source.check()
    for step, batch in enumerate(found, start):
        (size,) = [phase.size for phase in phases if step < phase.until][:1] or [(48, 72)]
        _, own = open_specs(str(street), splits=("train",), size=size)
        own_plan = Plan(num_samples=8, batch=2, seed=3, mirror=True, scale=scale, max_shift=augment.max_shift(size))
        wanted = next(iter(TrainSource(own["train"], own_plan, step)))
        assert batch.images.shape[2:] == size
        assert (batch.images - wanted.images).abs().max() < 1.01 / min(STD)  # DALI may fill the cache: see test_tiers
        assert torch.equal(batch.labels, wanted.labels)
        assert batch.indices.tolist() == wanted.indices.tolist()
    if loader == "reference":  # the cache may have been filled before
        assert source.decoded == 2 * len(found)
