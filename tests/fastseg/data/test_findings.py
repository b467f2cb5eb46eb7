from pathlib import Path

from fastseg.data.findings import KINDS, lines
from fastseg.data.pairs import Problem


def test_one_file_is_told_in_full():
    assert lines([Problem("d/a.png", "is odd: mend it", "sizes", "odd")], Path("d")) == ["d/a.png: is odd: mend it"]


def test_each_kind_is_one_line_with_its_number_three_files_and_the_cure():
    found = [Problem(f"d/{i}.png", f"told {i}", "unlisted", f"value {i}") for i in range(1217)]
    others = [Problem("d/x.png", "t", "void"), Problem("d/y.png", "t", "void")]
    first, second = lines([*found[:2], *others, *found[2:]], Path("d"))
    assert first == (
        "1,217 labels have values outside the class map (0.png: value 0; 1.png: value 1; 2.png: value 2; and 1,214 "
        "more): correct them, or --unknown-colours void to ignore such pixels"
    )
    assert second == "2 labels are all void (x.png; y.png)"


def test_problems_without_a_kind_go_by_how_they_begin():
    links = [Problem(f"d/{n}", f"is a broken link to {n}.png") for n in "ab"]
    orphans = [Problem(f"d/{n}", "no label of that name") for n in "cdef"]
    assert lines([*links, *orphans], Path("d")) == [
        "2 files (a: is a broken link to a.png; b: is a broken link to b.png)",
        "4 files: no label of that name (c; d; e; and 1 more)",
    ]


def test_every_kind_that_is_used_is_known():
    folder = Path(__file__).parents[3] / "fastseg" / "data"
    text = "".join(path.read_text(encoding="utf-8") for path in folder.glob("*.py") if path.name != "findings.py")
    assert {kind for kind in KINDS if f'"{kind}"' not in text} == set()
