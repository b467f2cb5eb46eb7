"""`fastseg bench compare`: what counts as slower, worked by hand, and what is not compared."""

import json
import math

import numpy as np
import pytest
from click.testing import CliRunner

from fastseg.bench import compare as comparing
from fastseg.bench.harness import Found, document, ratio
from fastseg.cli import main
from fastseg.environment import environment
from fastseg.errors import UsageError


def record(samples: list[float], name: str = "a / b") -> dict:
    return document(
        [Found([], [ratio(name, samples, [1.0] * len(samples))])], {"size": "32x48", "batch": 4}, environment()
    )


def test_a_change_and_its_error_worked_by_hand():
    # 0.9 .. 1.1 in steps of 0.05: median 1, 20th percentile 0.94, 80th 1.06.
    samples = [0.9, 0.95, 1.0, 1.05, 1.1]
    (row,) = comparing.compare([record(samples)], [record([0.8 * x for x in samples])], 0.05)
    error = 0.12 / 1.6832 * math.sqrt(math.pi / 2) / math.sqrt(5)
    assert row["change"] == pytest.approx(-0.2)
    assert row["error"] == pytest.approx(0.8 * math.hypot(error, error), rel=1e-3)
    assert row["worse"]
    # The same change is no chance with so small an error, and allowed with a higher limit.
    assert not comparing.compare([record(samples)], [record([0.8 * x for x in samples])], 0.25)[0]["worse"]


def test_documents_of_before_are_of_png():
    old, png, jpeg = (record([1.0, 1.1, 1.2]) for _ in range(3))
    png["protocol"]["format"], jpeg["protocol"]["format"] = "png", "jpeg"
    assert [row["change"] for row in comparing.compare([old], [png], 0.05)] == [0]
    with pytest.raises(UsageError, match=r"different protocol \(format: png; jpeg\)"):
        comparing.compare([old], [jpeg], 0.05)


def test_a_tenth_slower_is_found_and_a_new_run_of_the_same_is_not():
    rng = np.random.default_rng(0)

    def run(speed: float) -> dict:
        return record((speed * rng.normal(1, 0.03, 15)).tolist())

    found = [[comparing.compare([run(1)], [run(speed)], 0.05)[0]["worse"] for _ in range(50)] for speed in (1.0, 0.9)]
    assert [sum(worse) for worse in found] == [0, 50]


def test_several_documents_are_surer_than_one_and_their_differences_count():
    samples = [0.9, 0.95, 1.0, 1.05, 1.1]
    inside = 0.12 / 1.6832 * math.sqrt(math.pi / 2) / math.sqrt(5)
    rows = [record(samples)["ratios"][0]] * 4
    assert comparing.together(rows) == pytest.approx((1.0, inside / 2), rel=1e-3)
    # 1 and 1.4: mean 1.2, standard deviation 0.2828, of the mean 0.2.
    apart = [rows[0], record([x + 0.4 for x in samples])["ratios"][0]]
    assert comparing.together(apart) == pytest.approx((1.2, 0.2))
    # 7 % slower: one document each leaves it to chance, nine do not.
    old, new = record(samples), record([0.93 * x for x in samples])
    assert [comparing.compare([old] * n, [new] * n, 0.05)[0]["worse"] for n in (1, 9)] == [False, True]


def test_a_file_may_hold_a_document_or_a_line_for_each(tmp_path):
    one, two = record([1.0, 2.0]), record([1.0, 3.0])
    path = tmp_path / "a.json"
    path.write_text(json.dumps(one, indent=1))
    assert comparing.read(path) == [one]
    path.write_text(f"{json.dumps(one)}\n{json.dumps(two)}\n")
    assert comparing.read(path) == [one, two]


def test_a_ratio_that_is_better_the_lower_it_is_gets_worse_by_rising():
    low, high = ([x * factor for x in (0.98, 0.99, 1.0, 1.01, 1.02)] for factor in (1, 1.2))
    before, after = (
        document([Found([], [ratio("host", samples, [1.0] * 5, better="lower")])], {}, environment())
        for samples in (low, high)
    )
    assert comparing.compare([before], [after], 0.05)[0]["worse"]
    assert not comparing.compare([after], [before], 0.05)[0]["worse"]


def test_what_is_faster_is_never_worse():
    assert not comparing.compare([record([1.0, 1.1, 1.2])], [record([2.0, 2.1, 2.2])], 0.0)[0]["worse"]


def test_other_hardware_and_other_benches_are_refused():
    here, there = record([1.0, 1.1]), record([1.0, 1.1])
    there["environment"] = {**there["environment"], "cores": 128}
    with pytest.raises(comparing.UsageError, match=r"measured with different hardware \(cores: \d+; 128\)$"):
        comparing.compare([here], [here, there], 0.05)
    with pytest.raises(comparing.UsageError, match=r"measured with different protocol \(batch: 4; 8\)$"):
        comparing.compare([here], [here | {"protocol": {"size": "32x48", "batch": 8}}], 0.05)
    with pytest.raises(comparing.UsageError, match="no ratio in common"):
        comparing.compare([here], [record([1.0, 1.1], "c / d")], 0.05)


def test_ratios_that_one_side_alone_has_are_left_out():
    def both(reference: str) -> dict:
        names = (f"{reference}_vs_best_peer", "cache_vs_best_peer")
        ratios = [ratio(name, [2.0, 2.1, 2.2], [1.0] * 3) for name in names]
        return document([Found([], ratios)], {"size": "32x48", "batch": 4}, environment())

    (row,) = comparing.compare([both("torchvision")], [both("reference")], 0.05)
    assert (row["name"], row["change"]) == ("cache_vs_best_peer", 0.0)


@pytest.mark.parametrize(
    ("text", "message"),
    [("{", "no JSON"), ("[]", "no record"), ("{}", "no record"), (json.dumps(record([1.0, 2.0]) | {"schema": 9}), "9")],
)
def test_a_file_that_is_no_record_is_named(tmp_path, text, message):
    path = tmp_path / "a.json"
    path.write_text(text)
    with pytest.raises(comparing.UsageError, match=rf"^{path}: .*{message}"):
        comparing.read(path)


def test_the_command_ends_with_1_where_something_is_worse(tmp_path):
    old, new = tmp_path / "old.json", tmp_path / "new.json"
    old.write_text(json.dumps(record([1.0, 1.01, 1.02])))
    new.write_text(json.dumps(record([0.8, 0.81, 0.82])))
    run = CliRunner().invoke
    same = run(main, ["bench", "compare", str(old), str(old)])
    assert (same.exit_code, "WORSE" in same.stdout) == (0, False)
    slower = run(main, ["bench", "compare", str(old), str(new), "--fail-over", "5%"])
    assert (slower.exit_code, slower.stdout.count("WORSE")) == (1, 1)
    assert run(main, ["bench", "compare", str(old), str(new), "--fail-over", "30%"]).exit_code == 0
    assert json.loads(run(main, ["bench", "compare", str(old), str(new), "--json"]).stdout)["rows"][0]["worse"]
    for words in (["compare", str(old)], ["model", str(old)], ["compare", str(old), str(new), "--fail-over", "five"]):
        wrong = run(main, ["bench", *words])
        assert wrong.exit_code == 2, words
