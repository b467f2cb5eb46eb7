"""The learning-rate range test: the steepest fall worked by hand, and a test of a tiny network."""

import itertools
import json

import pytest

from fastseg.errors import FastsegError
from fastseg.find_lr import steepest


def test_the_steepest_fall_is_that_of_the_smoothed_loss_before_its_lowest_point():
    rates = [1e-4, 1e-3, 1e-2, 1e-1, 1.0, 10.0]
    # Over two steps: -0.2, -0.8, -0.9, and then the lowest point is behind it.
    assert steepest(rates, [3.0, 2.9, 2.8, 2.1, 1.9, 9.0]) == 1e-1
    assert steepest(rates, [3.0, 2.9, 2.2, 2.1, 2.0, 0.1]) == 1.0


@pytest.mark.parametrize("smooth", [[2.0, 3.0, 4.0], [2.0, 1.9, 4.0], [2.0], []])
def test_a_loss_that_never_falls_has_no_rate(smooth):
    with pytest.raises(FastsegError, match=r"^--find-lr: the loss falls at no rate"):
        steepest([1.0] * len(smooth), smooth)


def test_a_small_network_has_a_rate_at_which_it_learns(call, street, tmp_path):
    options = ["--recipe", "fast", "--size", "32x48", "--batch", "4", "--set", "model.depth=1"]
    code, out, _ = call("train", "--data", street, *options, "--find-lr", "lr.svg", "--json")
    found = json.loads(out)
    assert code == 0
    assert 1e-3 < found["suggested"] < 1
    rates = found["rates"]
    assert rates[0] == 1e-5
    assert all(b / a == pytest.approx(1e6 ** (1 / 99)) for a, b in itertools.pairwise(rates))
    assert len(found["losses"]) == len(found["smooth"]) == len(rates)
    assert found["smooth"][0] == pytest.approx(found["losses"][0])
    assert found["smooth"][1] == pytest.approx((0.9 * found["losses"][0] + found["losses"][1]) / 1.9)
    assert (tmp_path / "lr.svg").read_text().lstrip().startswith("<?xml")
    assert not (tmp_path / "runs").exists()
    assert call("train", "--data", street, *options, "--find-lr")[1].endswith("plot    find-lr.svg\n")
