"""Shares, folds and groups: which images dataset.toml holds out of `train`, and the laws of it."""

from fractions import Fraction
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from fastseg.data import split
from fastseg.data.classes import camvid_indexed
from fastseg.data.layouts import Dataset, Pair, find
from fastseg.data.pairs import HoldOut
from fastseg.errors import FastsegError, UsageError

SEEDS = st.integers(0, 2**63 - 1)
# Images of each group; their names are made of their numbers.
SIZES = st.lists(st.integers(1, 12), min_size=2, max_size=12)


def dataset(sizes, part, names=None):
    """Groups of so many images; `names`: of the groups."""
    names = names or [f"g{number}" for number in range(len(sizes))]
    groups = {f"/d/{name}_{i}.png": name for name, size in zip(names, sizes, strict=True) for i in range(size)}
    pairs = tuple(Pair(Path(image).stem, image, f"{image}_L") for image in sorted(groups))
    return Dataset(Path("/d"), "toml", camvid_indexed(), pairs, {"train": pairs}, hold_out=part, groups=groups)


def share(text):
    return HoldOut(f"val={text}", Fraction(0), Fraction(text))


def fold(number, count):
    return HoldOut(f"fold={number}/{count}", Fraction(number - 1, count), Fraction(number, count))


def held(sizes, part, seed, **more):
    data = dataset(sizes, part, **more)
    parts = split.apply(data, "auto", seed)
    assert sorted(p.image for pairs in parts.values() for p in pairs) == [p.image for p in data.pool]
    return {pair.image for pair in parts["val"]}


@settings(max_examples=60, deadline=None)
@given(sizes=SIZES, seed=SEEDS, percent=st.integers(1, 99))
def test_groups_are_never_divided_and_both_sides_have_one(sizes, seed, percent):
    data = dataset(sizes, share(f"0.{percent:02}"))
    parts = split.apply(data, "auto", seed)
    train, val = ({data.groups[pair.image] for pair in parts[name]} for name in ("train", "val"))
    assert train
    assert val
    assert not train & val
    # No other cut between two groups is nearer to the share than half a group.
    assert abs(len(parts["val"]) - percent * sum(sizes) / 100) <= max(sizes) / 2 or 1 in (len(train), len(val))


@settings(max_examples=60, deadline=None)
@given(sizes=SIZES, seed=SEEDS, count=st.integers(2, 10))
def test_folds_are_all_images_each_once_and_the_first_is_the_share_of_that_size(sizes, seed, count):
    folds = []
    for number in range(1, count + 1):
        try:
            folds.append(held(sizes, fold(number, count), seed))
        except FastsegError as error:
            assert "no group is left for this fold; give fewer folds" in str(error)  # noqa: PT017
    assert sum(map(len, folds)) == sum(sizes)
    assert set().union(*folds) == {pair.image for pair in dataset(sizes, None).pool}
    if count in (2, 4, 5, 8, 10):  # whose inverse can be written out
        assert folds[0] == held(sizes, share(str(1 / count)), seed)


def test_five_folds_of_twenty_images_hold_four_each():
    folds = [held([1] * 20, fold(number, 5), 0) for number in range(1, 6)]
    assert [len(images) for images in folds] == [4] * 5


@settings(max_examples=40, deadline=None)
@given(count=st.integers(10, 60), added=st.integers(1, 5), seed=SEEDS)
def test_added_images_move_no_more_of_the_others_than_they_are(count, added, seed):
    before = held([1] * count, share("0.2"), seed)
    after = held([1] * (count + added), share("0.2"), seed)
    old = {f"/d/g{number}_0.png" for number in range(count)}
    assert len(before ^ (after & old)) <= added


@settings(max_examples=40, deadline=None)
@given(sizes=st.lists(st.integers(1, 6), min_size=10, max_size=25), extra=st.integers(1, 6), seed=SEEDS)
def test_an_added_group_moves_few_of_the_others(sizes, extra, seed):
    before, after = held(sizes, share("0.25"), seed), held([*sizes, extra], share("0.25"), seed)
    old = {pair.image for pair in dataset(sizes, None).pool}
    # A cut is half a group at most from where it is wanted, before and after, which moves by less than the new group;
    # one group is held at least.
    assert len(before ^ (after & old)) <= 2 * 6 + extra


def test_sides_are_the_seeds_and_no_matter_of_folders_suffixes_or_other_splits(tmp_path):
    stems = [f"a{number}" for number in range(12)]
    for folder, suffix in (("one", ".jpg"), ("two", ".png")):
        for stem in stems:
            for name in (f"i/{stem}{suffix}", f"l/{stem}.png", "i/test/t.png", "l/test/t.png"):
                (tmp_path / folder / name).parent.mkdir(parents=True, exist_ok=True)
                (tmp_path / folder / name).touch()
        (tmp_path / folder / "dataset.toml").write_text(
            "val = 0.25\n[splits.train]\nimages = 'i'\nlabels = 'l'\n[splits.test]\nimages = 'i/test'\n"
            "labels = 'l/test'\n[[classes]]\nname = 'a'\nindex = 0\n"
        )
    data = find(tmp_path / "one")
    assert split.choose(data, "auto") == split.choose(data, "tutorial")
    assert split.choose(data, "auto")[0] == "val=0.25"
    drawn = [split.apply(data, "auto", seed) for seed in range(8)]
    assert {len(parts["val"]) for parts in drawn} == {3}
    assert len({parts["val"] for parts in drawn}) > 4
    assert all([pair.stem for pair in parts["test"]] == ["t"] for parts in drawn)
    other = split.apply(find(tmp_path / "two"), "auto", 3)
    assert [pair.stem for pair in other["val"]] == [pair.stem for pair in drawn[3]["val"]]


def described(tmp_path, head, names, pattern="i/*.png"):
    for name in names:
        for side in "il":
            (tmp_path / side / name).parent.mkdir(parents=True, exist_ok=True)
            (tmp_path / side / f"{name}.png").touch()
    text = f"{head}\n[splits.train]\nimages = '{pattern}'\nlabels = '{pattern.replace('i/', 'l/')}'\n"
    (tmp_path / "dataset.toml").write_text(f"{text}[[classes]]\nname = 'a'\nindex = 0\n", encoding="utf-8")
    return find(tmp_path)


@pytest.mark.parametrize(
    ("group", "pattern", "names", "groups"),
    [
        ("{group}_*", "i/*.png", ["0016E5_07959", "Seq05VD_f00000", "a_b_1"], ["0016E5", "Seq05VD", "a_b"]),
        ("{group}_*_*", "i/*.png", ["aachen_000001_000019", "ulm_000002_000019"], ["aachen", "ulm"]),
        ("{group}/*", "i/**", ["s/1", "s/2", "t/u/1"], ["s", "s", "t/u"]),
        ("{group}/*", "i/{city}/*.png", ["s/1", "t/1"], ["s", "t"]),
        ("frame {group}(*", "i/*.png", ["frame 1(a", "frame 2(b"], ["1", "2"]),
    ],
)
def test_a_group_is_named_by_a_part_of_what_the_patterns_stand_for(tmp_path, group, pattern, names, groups):
    data = described(tmp_path, f"group = '{group}'", names, pattern)
    assert data.groups == {f"{tmp_path}/i/{name}.png": of for name, of in zip(names, groups, strict=True)}


@pytest.mark.parametrize("scheme", ["video", "random:50-50", "random-60-40"])
def test_schemes_that_draw_keep_groups_together_too(tmp_path, scheme):
    names = [f"{letter}-{number}" for letter in "abcd" for number in range(4)]
    data = described(tmp_path, 'group = "{group}-*"', names)
    for seed in range(5):
        parts = split.apply(data, scheme, seed)
        sides = [{pair.stem[0] for pair in parts[name]} for name in ("train", "val")]
        assert not sides[0] & sides[1]
        assert len(sides[1]) == (1 if scheme == "video" else 2)


@pytest.mark.parametrize(
    ("head", "message"),
    [
        ("val = 1.0", r"val = 1\.0: wants a share of the images between 0 and 1, such as 0\.2"),
        ("val = 0", "val = 0: wants a share"),
        ("val = nan", "val = nan: wants a share"),
        ("val = '20%'", "val = '20%': wants a share"),
        ("val = true", "val = True: wants a share"),
        ("fold = 1", 'fold = 1: wants a fold and their number, such as "1/5"'),
        ("fold = '0/5'", "fold = '0/5': wants a fold"),
        ("fold = '6/5'", "fold = '6/5': wants a fold"),
        ("fold = '1/1'", "fold = '1/1': wants a fold"),
        ("fold = '1/5'\nval = 0.2", r"it has val, fold, \[splits.train\]: keep one that validates"),
        ("group = 'a_*'", r"group = 'a_\*': wants \{group\} once"),
        ("group = 3", r"group = 3: wants \{group\} once"),
        ("group = 'x{group}'", "group = 'x{group}': does not match a and 1 more: every image needs a group"),
    ],
)
def test_what_holds_nothing_out_is_refused(tmp_path, head, message):
    with pytest.raises(FastsegError, match=f"^{tmp_path}/dataset.toml: .*{message}") as error:
        described(tmp_path, head, ["a", "b"])
    assert "\n" not in str(error.value)


def test_a_share_and_a_validation_split_exclude_each_other(tmp_path):
    head = "val = 0.5\n[splits.valid]\nimages = 'i'\nlabels = 'l'"
    with pytest.raises(UsageError, match=r"it has val, \[splits.train\], \[splits.val\]: keep one that validates$"):
        described(tmp_path, head, ["a", "b"])


@pytest.mark.parametrize(
    ("head", "what"),
    [
        ("val = 0.2", "two images or more to divide, here is 1"),
        ("fold = '2/3'\ngroup = '{group}'", "two groups or more"),
    ],
)
def test_one_group_cannot_be_divided(tmp_path, head, what):
    with pytest.raises(FastsegError, match=f"^{tmp_path}: .* needs {what}"):
        split.apply(described(tmp_path, head, ["a"]))


@pytest.mark.parametrize("seed", range(4))
def test_random_60_40_is_one_of_many(seed):
    data = dataset([1] * 21, None)
    plain = Dataset(data.root, "toml", data.classes, data.pool)
    assert split.apply(plain, "random:60-40", seed) == split.apply(plain, "random-60-40", seed)
    for scheme, count in (("random:80-20", 17), ("random:50-50", 10), ("random:99.5-0.5", 20), ("random:1-99", 1)):
        parts = split.apply(plain, scheme, seed)
        assert len(parts["train"]) == count  # 16.8; 10.5, to the even one; 20.9 and 0.2, but one is left at least
        assert len(parts["val"]) == 21 - count
        assert split.choose(plain, scheme) == (scheme, "as asked")


@pytest.mark.parametrize("scheme", ["random:80-30", "random:100-0", "random:1..5-98.5", "random:0-100"])
def test_shares_that_make_no_whole_are_refused(scheme):
    from fastseg.config import Config, override

    with pytest.raises(UsageError, match=f"^--split-scheme {scheme}: wants two numbers that make 100 together"):
        split.choose(dataset([1, 1], None), scheme)
    with pytest.raises(UsageError, match=r"data\.split_scheme = .*: wants two numbers that make 100 together"):
        override(Config(), {"data.split_scheme": scheme}, "--set")
    assert override(Config(), {"data.split_scheme": "random:70-30"}, "--set").data.split_scheme == "random:70-30"
