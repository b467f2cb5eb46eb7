"""Names for the parts of a training step, shown to whoever profiles it. While nobody does, they cost nothing."""

import contextlib
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager

_NOTHING = contextlib.nullcontext()
_show: Callable[[str], AbstractContextManager] | None = None


def annotate(name: str) -> AbstractContextManager:
    """A context for a part of a step; parts may lie in one another."""
    return _NOTHING if _show is None else _show(name)


@contextlib.contextmanager
def shown_by(show: Callable[[str], AbstractContextManager]) -> Iterator[None]:
    """Within this context `annotate` gives what `show` makes of a name."""
    global _show
    before, _show = _show, show
    try:
        yield
    finally:
        _show = before
