"""When a run is saved, and how it ends early."""

import signal
import time
from pathlib import Path
from typing import NoReturn

from fastseg import checkpoint as checkpoints
from fastseg import runs
from fastseg.errors import StoppedError
from fastseg.runlog import RunLog, now
from fastseg.texts import pasted
from fastseg.training.run import Run
from fastseg.training.state import state_of


class Saver:
    """Writes a run's checkpoints into its folder, on the clock of this process."""

    def __init__(self, run: Run, folder: Path, log: RunLog) -> None:
        self.run, self.folder, self.log = run, folder, log
        self.saved = self.reported = time.perf_counter()

    def due(self) -> bool:
        """Whether it is time for a checkpoint inside an epoch.

        One process's clock decides, when it wishes and not when that is done: else the next step would wish again.
        """
        train, step = self.run.config.train, self.run.progress.step
        by_steps = train.checkpoint_steps > 0 and step % train.checkpoint_steps == 0
        by_time = 0 < 60 * train.checkpoint_minutes <= time.perf_counter() - self.saved
        due = self.run.world.is_main and self.run.sound and (by_steps or by_time)
        if due:
            self.saved = time.perf_counter()
        return due

    def checkpoint(self, epoch: int) -> None:
        """After a validation: last.pt, and a copy that stays every `keep_every` epochs.

        Not of weights that may be wrong: the last ones that worked are kept.
        """
        run, keep_every = self.run, self.run.config.train.keep_every
        if not run.sound:
            self.log.say(
                f"no checkpoint after step {run.progress.step}, whose loss is no number; the one before it is kept"
            )
        elif run.world.is_main:
            run.writer.join()
            state = state_of(run)
            checkpoints.save(runs.last_checkpoint(self.folder), state)
            if keep_every and epoch % keep_every == 0:
                checkpoints.save(self.folder / "checkpoints" / f"epoch-{epoch:04d}.pt", state)
        self.saved = time.perf_counter()

    def capture(self) -> None:
        """Between two validations: last.pt, while training goes on."""
        run = self.run
        run.world.sync_buffers(run.step.model)
        run.progress.losses = run.world.gather(float(run.loss))
        run.progress.void_steps = int(run.void)
        run.refuse_divergence(sum(run.progress.losses))
        if run.world.is_main:
            run.writer.submit(runs.last_checkpoint(self.folder), state_of(run))
        self.log.event("checkpoint", run.progress.step)

    def stop(self, number: int) -> NoReturn:
        """Save and end, as a signal asked."""
        run, step = self.run, self.run.progress.step
        name, saved = signal.Signals(number).name, f"saved after step {step}"
        if run.sound:
            self.capture()
        else:
            saved = f"not saved after step {step}, whose loss is no number; the checkpoint before it is kept"
        run.writer.join()
        self.log.event("stopped", step, time=now(), signal=name)
        run.world.barrier()  # a process that ends early would take the one that writes with it
        cure = f"go on with: fastseg train --resume --run {pasted(self.folder)}"
        raise StoppedError(f"{name}: {saved}; {cure}", number)


def write_report(folder: Path) -> None:
    """The run's page as its log is now; matplotlib is imported here, since nobody shall wait for it before a step."""
    from fastseg.report import write

    write(folder)
