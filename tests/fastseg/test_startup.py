"""The clock of a run's start."""

import pytest

from fastseg.training.startup import Startup, said


def test_parts_add_up_to_the_time_since_the_command_began():
    times = iter([3.0, 4.0, 6.0, 7.0, 7.5, 8.0, 8.25, 10.0])
    clock = Startup(began=1.0, now=lambda: next(times))
    with clock.part("data"):
        pass
    with pytest.raises(ZeroDivisionError), clock.part("network"):
        raise ZeroDivisionError
    with clock.part("data"):
        pass
    assert clock.read() == (9.0, {"imports": 2.0, "data": 2.25, "network": 0.5, "rest": 4.25})


def test_a_clock_that_nobody_tells_when_it_began_begins_now():
    times = iter([3.0, 5.0])
    assert Startup(now=lambda: next(times)).read() == (2.0, {"rest": 2.0})


def test_what_is_said_are_the_parts_that_show():
    parts = {"imports": 3.06, "data set": 0.04, "classes": 0.05, "network": 1.0, "rest": 0.05}
    assert said(4.2, parts) == "first step after 4.2 s: imports 3.1, classes 0.1, network 1.0"
    assert said(9.0, {"imports": 3.0, "rest": 6.0}) == "first step after 9.0 s: imports 3.0, rest 6.0"
