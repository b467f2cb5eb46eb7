"""Names of parts of a step: nothing at all while nobody looks."""

import contextlib

import pytest

from fastseg.ranges import shown_by, stage


def test_while_nobody_looks_each_name_is_the_same_nothing():
    assert stage("forward") is stage("backward")
    with stage("forward"), stage("encoder 1"):
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

    with pytest.raises(ZeroDivisionError), shown_by(show), stage("forward"), stage("encoder 1"):
        _ = 1 / 0
    with stage("loss"):
        pass
    assert seen == ["+forward", "+encoder 1", "-encoder 1", "-forward"]
