"""Signals that ask a command to end: SIGTERM, SIGINT (Ctrl-C), SIGHUP (the terminal closes) and SIGUSR1 (what clusters
send before they take a node away).

The first one raises KeyboardInterrupt, so that what is unfinished is removed on the way out; the command says its name
and exits with 128 + N. A second one ends at once. Training has handlers of its own around its steps.
"""

import contextlib
import os
import signal
import stat
import threading
import time
from collections.abc import Collection, Iterator
from types import FrameType

SIGNALS = (signal.SIGTERM, signal.SIGINT, signal.SIGHUP, signal.SIGUSR1)
# Ctrl-C reaches a worker twice, from the terminal and from its launcher; SIGHUP any process, from its shell too.
ONE_AND_THE_SAME = 2.0

_first: tuple[int, float] | None = None  # the first one's number, and when it came


@contextlib.contextmanager
def raised(*, but: Collection[int] = ()) -> Iterator[None]:
    """In here signals raise KeyboardInterrupt, but for those that are ignored or somebody else's, and for `but`.

    Once one has come its handlers stay: another must not cut the end of the interpreter short with a traceback.
    """
    ours: dict[int, object] = {}
    # Python allows handlers in the main thread alone; elsewhere signals stay whose they are.
    if threading.current_thread() is threading.main_thread():
        for number in SIGNALS:
            before = signal.getsignal(number)
            if number not in but and before in (signal.SIG_DFL, signal.default_int_handler):
                ours[number] = before
                signal.signal(number, _raise)
    try:
        yield
    finally:
        for taken, handler in () if _first else ours.items():
            signal.signal(taken, handler)  # type: ignore[arg-type]


def _raise(number: int, frame: FrameType | None) -> None:
    global _first
    if number == signal.SIGHUP:
        let_go_of_a_closed_terminal()
    if _first is None:
        _first = number, time.monotonic()
        raise KeyboardInterrupt
    if time.monotonic() - _first[1] > ONE_AND_THE_SAME:
        os.write(2, f"fastseg: {signal.Signals(number).name}: ended at once\n".encode())
        os._exit(128 + number)


def received() -> int:
    """The signal that KeyboardInterrupt stands for."""
    return _first[0] if _first else signal.SIGINT


def let_go_of_a_closed_terminal() -> None:
    """Write what would go there to nobody: an error of the first line would end a run before it saves."""
    for file in (1, 2):
        if stat.S_ISCHR(os.fstat(file).st_mode) and not os.isatty(file):
            with open(os.devnull, "w") as nobody:
                os.dup2(nobody.fileno(), file)
