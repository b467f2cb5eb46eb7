"""The measuring harness: turns in a fair order, figures with their spread, documents that JSON can hold."""

import json
import statistics

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from fastseg.bench import harness
from fastseg.bench.harness import Found, document, exact, ratio, result, show, take_turns
from fastseg.environment import environment

figures = st.lists(st.floats(0.1, 1000), min_size=2, max_size=20)


def test_a_result_worked_by_hand():
    # Sorted 1 2 4 7 9 13: the median lies between 4 and 7, the 20th percentile on place 0.2 * 5 = 1, the 80th on 4.
    row = result("step", "img/s", [4.0, 13.0, 1.0, 9.0, 2.0, 7.0])
    assert row == {"name": "step", "unit": "img/s", "value": 5.5, "n": 6, "p20": 2.0, "p80": 9.0}


@given(figures)
@settings(max_examples=30, deadline=None)
def test_the_spread_is_numpys(samples):
    row = result("step", "img/s", samples)
    p20, value, p80 = np.percentile(samples, [20, 50, 80], method="linear")
    assert [row["p20"], row["value"], row["p80"]] == pytest.approx([p20, value, p80], rel=1e-9)
    assert row["n"] == len(samples)


def test_what_is_counted_has_no_spread():
    row = exact("parameters", "", 29_441_419)
    assert row == {"name": "parameters", "unit": "", "value": 29_441_419, "n": 1, "p20": 29_441_419, "p80": 29_441_419}


def test_cases_take_turns_in_alternating_order_after_a_call_that_is_dropped():
    called = []

    def case(name: str):
        figures = iter(range(100))

        def measure() -> float:
            called.append(name)
            return next(figures) + (0.5 if name == "b" else 0)

        return measure

    samples = take_turns({"a": case("a"), "b": case("b"), "c": case("c")}, 3)
    assert "".join(called) == "abc" + "abc" + "cba" + "abc"
    assert samples == {"a": [1, 2, 3], "b": [1.5, 2.5, 3.5], "c": [1, 2, 3]}


def test_rounds_go_on_until_the_time_is_up(monkeypatch):
    clock = iter(range(100))
    monkeypatch.setattr(harness.time, "perf_counter", lambda: float(next(clock)))
    # The clock is asked once at the start and, after the least number of rounds, before each further one.
    assert len(take_turns({"a": lambda: 1.0}, 2, seconds=4.0)["a"]) == 2 + 3
    assert len(take_turns({"a": lambda: 1.0}, 2)["a"]) == 2


def test_a_ratio_is_that_of_neighbours():
    # The machine is ten times slower in the second round; each round still says 2, 2.5 or 3.
    above, below = [100.0, 12.5, 90.0], [50.0, 5.0, 30.0]
    row = ratio("dali / reference", above, below)
    assert {key: row[key] for key in ("name", "value", "n")} == {"name": "dali / reference", "value": 2.5, "n": 3}
    assert [row["p20"], row["p80"]] == pytest.approx([2.2, 2.8])
    assert statistics.median(above) / statistics.median(below) == 3  # what a ratio of medians would have said
    with pytest.raises(ValueError, match="shorter"):
        ratio("a / b", [1.0, 2.0], [1.0])


def test_a_document_is_strict_json_and_its_table_names_every_row():
    rows = [result("step", "img/s", [1.0, 2.0, 3.0]), exact("work", "GFLOP/img", 639.7)]
    found = document(
        [Found(rows, [ratio("a / b", [1.0, 2.0], [2.0, 2.0])])], {"batch": 4, "warmup_rounds": 1}, environment()
    )
    assert list(found) == ["schema", "environment", "protocol", "results", "ratios", "series"]
    assert found["schema"] == 1
    assert {"fastseg", "torch", "processor", "gpus", "threads", "command"} <= found["environment"].keys()
    assert json.loads(json.dumps(found, allow_nan=False)) == found
    table = show(found).splitlines()
    assert len(table) == 5
    assert table[1] == "batch 4, warmup_rounds 1"
    assert [line.split()[0] for line in table[2:]] == ["step", "work", "a"]
    assert "2.000 img/s  (1.400 to 2.600, n = 3)" in table[2]
    assert "639.7 GFLOP/img" in table[3]
    assert "0.75 x" in table[4]
