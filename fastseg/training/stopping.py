"""Ending a run early without losing anything: signals that ask for it, agreed on by all processes after the same step.

Signals only set a flag; what was ignored before, as `nohup` has it, stays ignored. Between steps the processes tell one
another theirs through a group of its own, on the CPU, and look at the answer one step later, so that nobody waits for a
GPU: all stop after the same step and save. A second signal ends at once; so does the first one of a single process that
has not taken a step, since there is nothing to save and the first step may take minutes to come.
"""

import os
import signal
import threading
import time
from types import FrameType
from typing import Any

import torch
import torch.distributed as dist

from fastseg.distributed import World
from fastseg.signals import ONE_AND_THE_SAME, SIGNALS, let_go_of_a_closed_terminal


class Requests:
    """What any process wants to happen after a step, as a context around the steps: to stop, or to save.

    Args:
        world: the processes that have to agree.
    """

    def __init__(self, world: World) -> None:
        self.world = world
        self.signal: int = 0
        self._at = 0.0
        self._stepped = False
        self._before: dict[int, Any] = {}
        self._pending: tuple[dist.Work | None, torch.Tensor] | None = None

    def __enter__(self) -> "Requests":
        # Python allows handlers in the main thread alone; elsewhere (an API user's thread) signals stay whose they are.
        if threading.current_thread() is threading.main_thread():
            heard = [number for number in SIGNALS if signal.getsignal(number) is not signal.SIG_IGN]
            self._before = {number: signal.signal(number, self._note) for number in heard}
        return self

    def __exit__(self, *_: object) -> None:
        for number, handler in self._before.items():
            signal.signal(number, handler)

    def _note(self, number: int, frame: FrameType | None) -> None:
        if number == signal.SIGHUP:
            let_go_of_a_closed_terminal()
        nothing_to_save = self.world.size == 1 and not self._stepped
        if nothing_to_save or (self.signal and time.monotonic() - self._at > ONE_AND_THE_SAME):
            signal.signal(number, self._before[number])
            os.kill(os.getpid(), number)
        elif not self.signal:
            self.signal, self._at = number, time.monotonic()

    def after_step(self, save: bool) -> tuple[int, bool]:
        """(signal, save): the number of a signal that any process got, or 0, and whether any wants to save.

        With several processes both are those of the step before. To be called by all of them, after each step.
        """
        self._stepped = True
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
