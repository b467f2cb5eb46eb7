from collections import Counter
from dataclasses import replace
from fractions import Fraction

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from fastseg.pipelines.plan import STREAMS, Plan, Rooms, draw, epoch_plan, in_order

MASK = 2**64 - 1


def philox(counter, key):
    """One block of Philox-4x64-10, from the definition in Salmon et al. 2011, section 3.4 and table 2's constants."""
    c0, c1, c2, c3 = counter
    k0, k1 = key
    for _ in range(10):
        left, right = 0xD2E7470EE14C6C93 * c0, 0xCA5A826395121157 * c2
        c0, c1, c2, c3 = (right >> 64) ^ c1 ^ k0, right & MASK, (left >> 64) ^ c3 ^ k1, left & MASK
        k0, k1 = (k0 + 0x9E3779B97F4A7C15) & MASK, (k1 + 0xBB67AE8584CAA73B) & MASK
    return [c0, c1, c2, c3]


def words(seed, epoch, stream, count):
    """NumPy counts up before each block, so the first block's counter is 1."""
    blocks = (philox((1 + i, 0, 0, stream), (seed, epoch)) for i in range((count + 3) // 4))
    return [word for block in blocks for word in block][:count]


def make(**given) -> Plan:
    return Plan(**{"num_samples": 10, "batch": 4, "seed": 3, "mirror": True, "max_shift": (10, 10), **given})


def batches(plan, count):
    return [plan.global_batch(step) for step in range(count)]


@pytest.mark.parametrize(
    ("counter", "key", "block"),
    [
        ([0] * 4, [0] * 2, "16554d9eca36314c db20fe9d672d0fdc d7e772cee186176b 7e68b68aec7ba23b"),
        ([MASK] * 4, [MASK] * 2, "87b092c3013fe90b 438c3c67be8d0224 9cc7d7c69cd777b6 a09caebf594f0ba0"),
    ],
)
def test_the_reference_gives_random123s_known_answers(counter, key, block):
    assert philox(counter, key) == [int(word, 16) for word in block.split()]


NUMBERS = {
    "order": 0, "mirror": 1, "shift_y": 2, "shift_x": 3, "crop_y": 4, "crop_x": 5, "scale": 6, "place_y": 7,
    "place_x": 8, "brightness": 9, "contrast": 10, "saturation": 11, "hue": 12,
}  # fmt: skip


@pytest.mark.parametrize(("stream", "number"), NUMBERS.items())
@pytest.mark.parametrize(("seed", "epoch"), [(0, 0), (7, 2), (2**62 + 5, 1_000)])
def test_raw_words_are_philox_of_seed_epoch_and_stream(seed, epoch, stream, number):
    assert STREAMS == NUMBERS
    assert draw(seed, epoch, stream, 11).tolist() == words(seed, epoch, number, 11)


def test_large_seeds_are_used_to_the_last_bit():
    assert draw(2**63 + 5, 1, "order", 4).tolist() == words(2**63 + 5, 1, 0, 4)


def test_an_epoch_follows_from_the_words_by_sorting_top_bit_and_remainder():
    plan = epoch_plan(5, 1, 13, True, (2, 10), (6, 0))
    order, mirror, dy, dx, top, _ = (words(5, 1, stream, 13) for stream in range(6))
    assert plan.order.tolist() == sorted(range(13), key=order.__getitem__)
    assert plan.mirror.tolist() == [word >= 2**63 for word in mirror]
    assert plan.shift.tolist() == [[y % 5 - 2, x % 21 - 10] for y, x in zip(dy, dx, strict=True)]
    assert plan.crop.tolist() == [[y % 7, 0] for y in top]


def test_each_file_has_its_own_room_for_crops_and_the_same_words_decide():
    """As from the words by remainder, of the room of the file that a sample is; other draws are as they were."""
    rooms = np.array([[i % 4, 3 * i] for i in range(13)])
    plan, same = (epoch_plan(5, 1, 13, True, (2, 10), room) for room in (Rooms(rooms), (6, 0)))
    top, left = (words(5, 1, stream, 13) for stream in (4, 5))
    files = plan.order.tolist()
    assert plan.crop.tolist() == [[y % (i % 4 + 1), x % (3 * i + 1)] for i, y, x in zip(files, top, left, strict=True)]
    assert plan.crop.dtype == np.int32
    for name in ("order", "mirror", "shift"):
        np.testing.assert_array_equal(getattr(plan, name), getattr(same, name))


def test_a_plan_of_many_files_is_looked_up_without_a_look_at_each():
    plan = make(num_samples=10, max_crop=Rooms(np.zeros((10, 2), int)))
    before = epoch_plan.cache_info()
    batches(plan, 2)
    batches(plan, 2)
    after = epoch_plan.cache_info()
    assert (after.misses - before.misses, after.hits - before.hits) == (1, 3)


@settings(max_examples=25, deadline=None)
@given(seed=st.integers(0, 2**63 - 1), epoch=st.integers(0, 10_000), count=st.integers(1, 400))
def test_the_order_is_a_permutation(seed, epoch, count):
    assert sorted(epoch_plan(seed, epoch, count, True, (0, 0), (0, 0)).order.tolist()) == list(range(count))


@settings(max_examples=25, deadline=None)
@given(count=st.integers(1, 40), batch=st.integers(1, 90), epochs=st.integers(1, 4), seed=st.integers(0, 9))
def test_over_k_epochs_every_image_comes_k_times(count, batch, epochs, seed):
    steps = -(-epochs * count // batch)
    whole = batches(make(num_samples=count, batch=batch, seed=seed), steps)
    assert all(len(part.indices) == len(part.mirror) == len(part.shift) == batch for part in whole)
    stream = np.concatenate([part.indices for part in whole])[: epochs * count]
    assert Counter(stream.tolist()) == dict.fromkeys(range(count), epochs)


@settings(max_examples=25, deadline=None)
@given(batch=st.integers(1, 12), full=st.integers(1, 6), rest=st.integers(0, 11), epochs=st.integers(1, 3))
def test_with_drop_remainder_no_image_comes_twice_in_an_epoch(batch, full, rest, epochs):
    plan = make(num_samples=batch * full + rest % batch, batch=batch, drop_remainder=True)
    assert plan.steps_per_epoch == full
    assert plan.total_steps(epochs) == full * epochs
    whole = batches(plan, full * epochs)
    for epoch in range(epochs):
        seen = np.concatenate([part.indices for part in whole[epoch * full : (epoch + 1) * full]])
        assert len(set(seen.tolist())) == batch * full
        own = epoch_plan(plan.seed, epoch, plan.num_samples, True, (10, 10), (0, 0)).order
        assert seen.tolist() == own[: batch * full].tolist()


@settings(max_examples=25, deadline=None)
@given(world=st.integers(1, 8), local=st.integers(1, 5), step=st.integers(0, 50), count=st.integers(1, 60))
def test_shards_interleave_back_to_the_whole_batch(world, local, step, count):
    plan = make(num_samples=count, batch=world * local, scale=2.0, colour=0.5)
    whole, shards = plan.global_batch(step), [plan.shard(step, rank, world) for rank in range(world)]
    for name in ("indices", "mirror", "shift", "crop", "zoom", "colour"):
        parts = [getattr(shard, name) for shard in shards]
        assert {len(part) for part in parts} == {local}
        np.testing.assert_array_equal(np.stack(parts, axis=1).reshape(getattr(whole, name).shape), getattr(whole, name))


@pytest.mark.parametrize("world", [2, 3, 4, 6])
def test_shards_of_one_epoch_share_no_image(world):
    plan = make(num_samples=24, batch=12)
    shards = [set(plan.shard(1, rank, world).indices.tolist()) for rank in range(world)]
    assert sum(map(len, shards)) == len(set().union(*shards)) == 12


def test_a_batch_that_crosses_epochs_ends_one_and_begins_the_next():
    plan = make(max_crop=(0, 5))  # 10 images, batches of 4: step 2 takes positions 8, 9 of epoch 0 and 0, 1 of epoch 1
    first, second = (epoch_plan(3, epoch, 10, True, (10, 10), (0, 5)) for epoch in (0, 1))
    part = plan.global_batch(2)
    for name in ("order", "mirror", "shift", "crop"):
        wanted = [*getattr(first, name)[8:].tolist(), *getattr(second, name)[:2].tolist()]
        assert getattr(part, "indices" if name == "order" else name).tolist() == wanted


def test_shifts_and_crops_are_uniform_within_their_bounds_and_mirror_is_half():
    plan = epoch_plan(0, 0, 21_000, True, (10, 3), (4, 17))
    ranges = ((plan.shift, 0, -10, 10), (plan.shift, 1, -3, 3), (plan.crop, 0, 0, 4), (plan.crop, 1, 0, 17))
    for drawn, axis, least, most in ranges:
        values, counts = np.unique(drawn[:, axis], return_counts=True)
        assert values.tolist() == list(range(least, most + 1))
        share = 1 / len(values)
        assert abs(counts - 21_000 * share).max() < 5 * (21_000 * share * (1 - share)) ** 0.5
    assert abs(plan.mirror.mean() - 0.5) < 5 * 0.5 / 21_000**0.5
    assert plan.shift.dtype == plan.crop.dtype == np.int32


@pytest.mark.parametrize(
    ("change", "kept"),
    [
        ({"max_shift": (4, 10)}, ["indices", "mirror", "dx", "top", "left", "scale", "places", "colour"]),
        ({"max_shift": (10, 4)}, ["indices", "mirror", "dy", "top", "left", "scale", "places", "colour"]),
        ({"mirror": False}, ["indices", "dy", "dx", "top", "left", "scale", "places", "colour"]),
        ({"max_crop": (8, 5)}, ["indices", "mirror", "dy", "dx", "left", "scale", "places", "colour"]),
        ({"max_crop": (9, 0)}, ["indices", "mirror", "dy", "dx", "top", "scale", "places", "colour"]),
        ({"scale": 1.5}, ["indices", "mirror", "dy", "dx", "top", "left", "places", "colour"]),
        ({"scale": 1.0}, ["indices", "mirror", "dy", "dx", "top", "left", "colour"]),
        ({"colour": 0.25}, ["indices", "mirror", "dy", "dx", "top", "left", "scale", "places"]),
        ({"colour": 0.0}, ["indices", "mirror", "dy", "dx", "top", "left", "scale", "places"]),
    ],
)
def test_changing_one_augmentation_leaves_all_other_draws_alone(change, kept):
    plan = make(num_samples=50, batch=20, max_crop=(9, 5), scale=2.0, colour=0.5)
    for one, other in zip(batches(plan, 6), batches(replace(plan, **change), 6), strict=True):
        fields = [
            {
                "indices": part.indices,
                "mirror": part.mirror,
                **dict(zip(("dy", "dx", "top", "left"), np.hstack([part.shift, part.crop]).T, strict=True)),
                "scale": part.zoom[:, :1],
                "places": part.zoom[:, 1:],
                "colour": part.colour,
            }
            for part in (one, other)
        ]
        same = [name for name in fields[0] if np.array_equal(fields[0][name], fields[1][name])]
        assert same == kept


def test_a_jittered_epoch_follows_from_the_53_highest_bits_of_its_words():
    plan = epoch_plan(5, 1, 13, True, (2, 10), (0, 0), 2.0, 0.25)
    scale, *rest = ([Fraction(word >> 11, 2**53) for word in words(5, 1, stream, 13)] for stream in range(6, 13))
    (top, left), colours = rest[:2], rest[2:]
    np.testing.assert_allclose(plan.zoom[:, 0], [2 ** float(2 * u - 1) for u in scale], rtol=1e-15)
    assert plan.zoom[:, 1:].tolist() == [[float(y), float(x)] for y, x in zip(top, left, strict=True)]
    wanted = [[1 + (u - Fraction(1, 2)) / 2 for u in factor] for factor in colours[:3]]
    wanted.append([18 * u - 9 for u in colours[3]])
    np.testing.assert_allclose(plan.colour, np.array(wanted, float).T, rtol=1e-15, atol=1e-14)
    assert plan.zoom.dtype == plan.colour.dtype == np.float64


def test_without_jitter_there_is_none():
    part = make(num_samples=50, batch=20).global_batch(2)
    assert (part.zoom.shape, part.colour.shape) == ((20, 0), (20, 0))


def test_scales_are_log_uniform_alike_in_both_directions_and_places_and_colours_uniform():
    plan = epoch_plan(0, 0, 21_000, True, (0, 0), (0, 0), 3.0, 0.4)
    logs = np.log(plan.zoom[:, 0]) / np.log(3)
    for drawn, least, most in (
        (logs, -1, 1),
        *((place, 0, 1) for place in plan.zoom[:, 1:].T),
        *((factor, 0.6, 1.4) for factor in plan.colour[:, :3].T),
        (plan.colour[:, 3], -14.4, 14.4),
    ):
        assert least <= drawn.min() < drawn.max() < most
        counts, _ = np.histogram(drawn, 10, (least, most))
        assert abs(counts - 2100).max() < 5 * (2100 * 0.9) ** 0.5
    # Half of them shrink; the streams have nothing to do with one another.
    everything = np.corrcoef(np.column_stack([plan.zoom, plan.colour]).T)
    assert abs(everything - np.eye(7)).max() < 5 / 21_000**0.5


def test_without_mirror_and_shift_nothing_is_mirrored_or_moved():
    part = make(num_samples=50, batch=50, mirror=False, max_shift=(0, 0)).global_batch(0)
    assert not part.mirror.any()
    assert not part.shift.any()


def test_epochs_and_seeds_give_different_orders():
    orders = {tuple(epoch_plan(seed, epoch, 30, True, (1, 1), (0, 0)).order) for seed in range(3) for epoch in range(3)}
    assert len(orders) == 9


@pytest.mark.parametrize(
    ("drop", "epochs", "steps"),
    # 367 / 8 * 6 = 275.25; 45 full batches an epoch; 45.875; a hundredth of an epoch is no batch, but one is made
    [(False, 6, 275), (True, 6, 270), (False, 1, 46), (False, 0.01, 1)],
)
def test_total_steps_of_367_images_in_batches_of_8(drop, epochs, steps):
    assert make(num_samples=367, batch=8, drop_remainder=drop).total_steps(epochs) == steps


@pytest.mark.parametrize(("count", "batch", "lengths"), [(10, 4, [4, 4, 2]), (8, 4, [4, 4]), (3, 9, [3])])
def test_an_evaluation_takes_each_sample_once_in_order(count, batch, lengths):
    parts = in_order(count, batch)
    assert [len(part) for part in parts] == lengths
    assert np.concatenate(parts).tolist() == list(range(count))
