"""The command line: each command parses, calls one function and prints. Heavy imports happen inside commands."""

import errno
import os
import sys
import traceback
from signal import SIGTERM
from typing import Any

import click

from fastseg import __version__, signals
from fastseg.cli.bench_command import bench
from fastseg.cli.data_commands import data
from fastseg.cli.doctor_command import doctor
from fastseg.cli.export_command import export
from fastseg.cli.init_command import init, rasterise
from fastseg.cli.options import refuse_empty
from fastseg.cli.predict_command import predict
from fastseg.cli.profile_command import profile
from fastseg.cli.repro_command import repro
from fastseg.cli.train_commands import evaluate, report, train
from fastseg.errors import EndedError, FastsegError, LostError, StoppedError, UsageError, first_line
from fastseg.workers import Worker, alone, decide, decided, die_with_launcher, end_launcher, this_worker

PERMISSIONS = "change the permissions of the file or its folder, or give another"

# What a disk or a system may refuse at any time, even without a file's name (`fastseg --debug` shows where).
CURES = {
    errno.ENOSPC: "the disk is full: make room, or write elsewhere",
    errno.EDQUOT: "your quota is used up: make room, or write elsewhere",
    errno.EFBIG: "files may not be so large here (ulimit -f): raise the limit, or write elsewhere",
    errno.EIO: "the disk fails (the system's log says more): write elsewhere, or read from another copy",
    errno.EACCES: PERMISSIONS,
    errno.EPERM: PERMISSIONS,
    errno.EEXIST: "something else has this name: move it away",
    errno.EROFS: "the disk can only be read: write elsewhere",
    errno.EMFILE: "too few files may be open at once (ulimit -n): raise the limit",
}


# Commands whose processes a launcher may have started; the others are one process, wherever they run.
JOINING = ("train", "eval", "profile")


class Group(click.Group):
    """Prints what a user can cause as one line, without a traceback unless --debug is given."""

    def resolve_command(self, ctx: click.Context, args: list[str]) -> Any:
        found = super().resolve_command(ctx, args)
        if found[0] not in JOINING:
            ctx.with_resource(alone())
        return found

    def invoke(self, ctx: click.Context) -> Any:
        die_with_launcher()
        if (code := decided()) is not None:  # started again, although the run has ended
            ctx.exit(code)
        # A launcher ends its processes by SIGTERM where one has died, to start all again: that is no end to tell of.
        ctx.with_resource(signals.raised(but=[SIGTERM] if known_worker() else []))
        try:
            return super().invoke(ctx)
        except FastsegError as error:
            if ctx.params.get("debug"):
                raise
            report_error(error)
            ctx.exit(error.exit_code)
        except KeyboardInterrupt:
            report_error(ended := EndedError(signals.received()))
            ctx.exit(ended.exit_code)
        except BrokenPipeError:  # the reader of our output has gone
            sys.stderr.close()
            ctx.exit(1)
        except OSError as error:
            # A file that cannot be written or read is the user's to mend; anything else is ours, with its traceback.
            cure = CURES.get(error.errno or 0)
            if ctx.params.get("debug") or (error.filename is None and cure in (None, PERMISSIONS)):
                raise
            where = f"{error.filename}: " if error.filename is not None else ""
            report_error(FastsegError(f"{where}{error.strerror or error}" + (f"; {cure}" if cure else "")))
            ctx.exit(1)
        except Exception as error:
            if known_worker() is None or isinstance(error, (click.ClickException, click.exceptions.Exit, click.Abort)):
                raise
            report_error(FastsegError(f"{first_line(error)}\n{traceback.format_exc()}"))
            ctx.exit(1)


def known_worker() -> Worker | None:
    """This process's place among several; None also where a launcher's variables cannot be, which is told elsewhere."""
    try:
        return this_worker()
    except UsageError:
        return None


def report_error(error: FastsegError) -> None:
    """Print an error; among several processes with the rank, once, and so that the others end too."""
    mine = known_worker()
    if mine is None:
        click.echo(f"fastseg: {error}", err=True)
    elif isinstance(error, LostError):
        if decided() is None:  # else it only follows from what another process has said
            click.echo(f"fastseg: rank {mine.rank}: {error}", err=True)
    else:
        first, new = decide(error.exit_code, str(error))
        stopped = isinstance(error, (StoppedError, EndedError))  # all of them, by the same signal
        if first if stopped else new:
            click.echo(f"fastseg: {'' if stopped else f'rank {mine.rank}: '}{error}", err=True)
        if first and not stopped:
            end_launcher()


@click.group(cls=Group, context_settings={"help_option_names": ["-h", "--help"], "max_content_width": 120})
@click.version_option(__version__, prog_name="fastseg")
@click.option("--debug", is_flag=True, help="Show the traceback of an error.")
def main(debug: bool) -> None:
    """Train SegNet on CamVid-like data as fast as the machine allows.

    First steps: `fastseg train --data synth --recipe fast --size 48x72`, then `fastseg report RUN`.
    Exit codes: 0 done, 1 failed, 2 wrong use, 75 saved and stopped by a signal, 128 + N ended at once by signal N.
    """
    # torch's profiler reads it when torch is imported; it would report as an error that a machine has no GPU.
    os.environ.setdefault("KINETO_LOG_LEVEL", "99")
    # So does OpenMP, whose threads would spin for milliseconds at each of a step's meetings, on cores that others want.
    if "OMP_WAIT_POLICY" not in os.environ:
        os.environ.setdefault("GOMP_SPINCOUNT", "1000")


for command in (data, train, evaluate, report, predict, export, repro, bench, profile, doctor):
    main.add_command(command)
for command in (init, rasterise):
    data.add_command(command)
refuse_empty(main)
