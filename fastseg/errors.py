"""Errors that a user can cause: one line each, which names the file or option and the cure.

The command line prints them without a traceback (`--debug` shows one) and exits with `exit_code`.
"""

import signal


class FastsegError(Exception):
    """Work that failed: bad data, a missing file, a run that cannot go on."""

    exit_code = 1


class UsageError(FastsegError):
    """Wrong use: an option, a recipe or a path that cannot be what was meant."""

    exit_code = 2


class LostError(FastsegError):
    """Other processes of the run are gone or too late; starting all of them again may help."""


class StoppedError(FastsegError):
    """A run that was asked to stop by a signal and has saved all it did.

    Args:
        number: the signal's.
    """

    exit_code = 75  # EX_TEMPFAIL of sysexits.h: come back later

    def __init__(self, message: str, number: int) -> None:
        super().__init__(message)
        self.number = number


class EndedError(FastsegError):
    """Work that a signal has ended, with nothing saved of it."""

    def __init__(self, number: int, more: str = "") -> None:
        said = "interrupted" if number == signal.SIGINT else f"{signal.Signals(number).name}: ended"
        super().__init__(said + more)
        self.exit_code = 128 + number


def first_line(error: BaseException) -> str:
    """Kind and first line of an error that is not ours, for one line of our own."""
    return f"{type(error).__name__}: {str(error).partition(chr(10))[0]}".removesuffix(": ")
