"""Where the time until a run's first step goes."""

import contextlib
import time
from collections.abc import Callable, Iterator


class Startup:
    """A clock of named parts, which do not lie in one another.

    Args:
        began: when the command began, by `now`; None: now.
        now: seconds.
    """

    def __init__(self, began: float | None = None, now: Callable[[], float] = time.perf_counter) -> None:
        self._now, start = now, now()
        self._began = start if began is None else began
        self._seconds = {} if began is None else {"imports": start - began}

    @contextlib.contextmanager
    def part(self, name: str) -> Iterator[None]:
        """Around a part, or more of it."""
        start = self._now()
        try:
            yield
        finally:
            self._seconds[name] = self._seconds.get(name, 0.0) + self._now() - start

    def read(self) -> tuple[float, dict[str, float]]:
        """Seconds since the command began, and of each part, which add up to it: the last one is "rest"."""
        total = self._now() - self._began
        return total, self._seconds | {"rest": total - sum(self._seconds.values())}


def said(total: float, parts: dict[str, float]) -> str:
    """ "first step after 5.3 s: imports 3.1, network 0.4, rest 1.8": the parts that show, in their order."""
    shown = {name: f"{seconds:.1f}" for name, seconds in parts.items() if name != "rest"}
    shown = {name: text for name, text in shown.items() if text != "0.0"}
    rest = total - sum(map(float, shown.values()))
    shown |= {"rest": f"{rest:.1f}"} if rest >= 0.05 else {}
    return f"first step after {total:.1f} s: " + ", ".join(f"{name} {text}" for name, text in shown.items())
