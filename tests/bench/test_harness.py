"""The measuring harness: turns in a fair order, figures with their spread, documents that JSON can hold."""

import json
import statistics

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from fastseg.bench import harness
from fastseg.bench.harness import Found, document, exact, ratio, result, show, take_turns, turns_in_time
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


class Clock:
    """Time that passes only while a case is called: each takes as long as it says, the last value again and again."""

    def __init__(self, monkeypatch) -> None:
        self.now, self.called = 100.0, ""
        monkeypatch.setattr(harness.time, "perf_counter", lambda: self.now)

    def case(self, name: str, *seconds: float):
        last = iter(seconds)

        def measure() -> float:
            nonlocal seconds
            self.called += name
            measure.seconds = next(last, measure.seconds)
            self.now += measure.seconds
            return float(len(self.called))

        measure.seconds = 0.0
        return measure

    def cases(self, **seconds: float):
        return {name: self.case(name, took) for name, took in seconds.items()}


def test_with_time_enough_all_cases_take_turns(monkeypatch):
    clock = Clock(monkeypatch)
    samples, left_out = turns_in_time(clock.cases(a=1, b=1), clock.cases(c=1), 4, 1000.0)
    assert clock.called == "abc" + "abc" + "cba" + "abc" + "cba"
    assert samples == {"a": [4, 9, 10, 15], "b": [5, 8, 11, 14], "c": [6, 7, 12, 13]}
    assert left_out == {}


def test_rounds_end_with_the_time(monkeypatch):
    # A call of each takes 3 s, and so does each round: at 12 s there have been 3 of them, and at 15 s 4.
    for seconds, rounds in ((14, 3), (15, 4), (18, 5), (99, 5)):
        clock = Clock(monkeypatch)
        samples, left_out = turns_in_time(clock.cases(a=1, b=2), {}, 5, 100.0 + seconds)
        assert {name: len(figures) for name, figures in samples.items()} == {"a": rounds, "b": rounds}
        assert left_out == {}


def test_the_first_cases_are_measured_however_little_time_there_is_and_no_others(monkeypatch):
    clock = Clock(monkeypatch)
    samples, left_out = turns_in_time(clock.cases(a=5, b=5), clock.cases(c=0.1), 5, 100.1)
    assert clock.called == "ab" + "ab" + "ba" + "ab"
    assert samples == {"a": [3, 6, 7], "b": [4, 5, 8]}
    assert left_out == {"c": "no time was left"}


def test_others_join_in_their_order_while_three_rounds_of_all_fit(monkeypatch):
    # a and b: 1 s each. c is guessed at 1 s and takes 1 s: 3 + 3 * 3 = 12 s. d takes 4: 7 + 3 * 7 = 28 s are too many,
    # and what it has taken is gone. e is guessed at 1 s: 7 + 1 + 3 * 4 = 20 s.
    clock = Clock(monkeypatch)
    samples, left_out = turns_in_time(clock.cases(a=1, b=1), clock.cases(c=1, d=4, e=1), 3, 120.0)
    assert clock.called == "abcde" + "abce" + "ecba" + "abce"
    assert list(samples) == ["a", "b", "c", "e"]
    assert left_out == {"d": "no time was left"}


def test_when_all_become_slower_the_last_ones_go(monkeypatch):
    # Two calls of 1 s, then a takes 10: after the first round 2 + 10 + 1 = 13 s are gone, and 2 * (10 + 1) too many.
    clock = Clock(monkeypatch)
    cases = {"a": clock.case("a", 1, 10), "b": clock.case("b", 1)}
    samples, left_out = turns_in_time({"a": cases["a"]}, {"b": cases["b"]}, 3, 130.0)
    assert clock.called == "ab" + "ab" + "a" + "a"
    assert samples == {"a": [3, 5, 6]}
    assert left_out == {"b": "no time was left"}


def test_a_case_that_may_fail_is_left_out_and_another_is_an_error(monkeypatch):
    def broken() -> float:
        raise RuntimeError("DataLoader timed out after 30 seconds\nand more")

    clock = Clock(monkeypatch)
    # The first measurement of "later" is the one that warms up, the next one counts, and in the third it fails.
    calls = iter([1.0, 1.0])
    cases = {"a": clock.case("a", 1), "hangs": broken, "later": lambda: next(calls), "slow": clock.case("s", 1, 31)}
    samples, left_out = turns_in_time(cases, {}, 3, 1000.0, may_fail=("hangs", "later", "slow"))
    assert samples == {"a": [3, 5, 6]}
    assert left_out == {
        "hangs": "RuntimeError: DataLoader timed out after 30 seconds",
        "later": "StopIteration",
        "slow": "one measurement takes more than 30 s",
    }
    with pytest.raises(RuntimeError, match="timed out"):
        turns_in_time(cases, {}, 3, 1000.0)


def test_what_a_bench_says_of_its_protocol_is_in_the_document_and_what_it_left_out_in_the_table():
    rows = [result("step", "img/s", [1.0, 2.0, 3.0])]
    part = Found(rows, [], protocol={"minutes": 3.0, "left_out": {"b": "no time was left", "c": "no time was left"}})
    found = document([part], {"batch": 4}, environment())
    assert list(found) == ["schema", "environment", "protocol", "results", "ratios", "series"]
    assert found["protocol"] == {"batch": 4, **part.protocol}
    assert json.loads(json.dumps(found, allow_nan=False)) == found
    table = show(found).splitlines()
    assert (table[1], table[-1]) == ("batch 4, minutes 3.0", "left out: b; c")


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
