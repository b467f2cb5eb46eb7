"""Names of parts of a step: nothing at all while nobody looks."""

import contextlib

import pytest

from fastseg.ranges import annotate, shown_by


def test_while_nobody_looks_each_name_is_the_same_nothing():
    assert annotate("forward") is annotate("backward")
    with annotate("forward"), annotate("encoder 1"):
        pass


def test_names_go_to_whoever_looks_until_he_leaves():
    seen = []

    @contextlib.contextmanager
    def show(name: str):
        seen.append(f"+{name}")
        try:
            yield
        finally:
            seen.append(f"-{name}")

    with pytest.raises(ZeroDivisionError), shown_by(show), annotate("forward"), annotate("encoder 1"):
        _ = 1 / 0
    with annotate("loss"):
        pass
    assert seen == ["+forward", "+encoder 1", "-encoder 1", "-forward"]
