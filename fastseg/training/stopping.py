"""Ending a run early without losing anything: signals that ask for it, agreed on by all processes after the same step.

SIGTERM, SIGINT, SIGHUP (the terminal closes) and SIGUSR1 (what clusters send before they take a node away) only set a
flag; what was ignored before, as `nohup` has it, stays ignored. Between steps the
processes tell one another theirs through a group of its own, on the CPU, and look at the answer one step later, so that
nobody waits for a GPU: all stop after the same step and save. A second signal ends at once.
"""

import os
import signal
import stat
import threading
import time
from types import FrameType

import torch
import torch.distributed as dist

from fastseg.distributed import World

SIGNALS = (signal.SIGTERM, signal.SIGINT, signal.SIGHUP, signal.SIGUSR1)
# Ctrl-C reaches a worker twice, from the terminal and from its launcher; SIGHUP any process, from its shell too.
ONE_AND_THE_SAME = 2.0


class Requests:
    """What any process wants to happen after a step, as a context around the steps: to stop, or to save.

    Args:
        world: the processes that have to agree.
    """

    def __init__(self, world: World) -> None:
        self.world = world
        self.signal: int = 0
        self._at = 0.0
        self._before: dict[int, object] = {}
        self._pending: tuple[dist.Work | None, torch.Tensor] | None = None

    def __enter__(self) -> "Requests":
        # Python allows handlers in the main thread alone; elsewhere (an API user's thread) signals stay whose they are.
        if threading.current_thread() is threading.main_thread():
            heard = [number for number in SIGNALS if signal.getsignal(number) is not signal.SIG_IGN]
            self._before = {number: signal.signal(number, self._note) for number in heard}
        return self

    def __exit__(self, *_: object) -> None:
        for number, handler in self._before.items():
            signal.signal(number, handler)  # type: ignore[arg-type]

    def _note(self, number: int, frame: FrameType | None) -> None:
        if number == signal.SIGHUP:
            _let_go_of_a_closed_terminal()
        if self.signal and time.monotonic() - self._at > ONE_AND_THE_SAME:
            signal.signal(number, signal.default_int_handler if number == signal.SIGINT else signal.SIG_DFL)
            os.kill(os.getpid(), number)
        elif not self.signal:
            self.signal, self._at = number, time.monotonic()

    def after_step(self, save: bool) -> tuple[int, bool]:
        """(signal, save): the number of a signal that any process got, or 0, and whether any wants to save.

        With several processes both are those of the step before. To be called by all of them, after each step.
        """
        mine = torch.tensor([self.signal, int(save)], dtype=torch.int32)
        if self.world.size == 1:
            return self.signal, save
        agreed = self.settle()
        work = dist.all_reduce(mine, dist.ReduceOp.MAX, group=self.world.side, async_op=True)
        self._pending = work, mine
        return agreed

    def settle(self) -> tuple[int, bool]:
        """Wait for what is still under way; its answer, or (0, False) where there is none."""
        if self._pending is None:
            return 0, False
        work, requests = self._pending
        self._pending = None
        if work is not None:
            work.wait()
        number, save = requests.tolist()
        return number, bool(save)


def _let_go_of_a_closed_terminal() -> None:
    """Write what would go there to nobody: an error of the first line would end the run before it saves."""
    for file in (1, 2):
        if stat.S_ISCHR(os.fstat(file).st_mode) and not os.isatty(file):
            with open(os.devnull, "w") as nobody:
                os.dup2(nobody.fileno(), file)
