"""`fastseg train`, and what follows from a run: `eval` and `report`."""

import functools
import sys
import time
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from fastseg.cli.options import (
    CURVES,
    FileType,
    IntervalType,
    as_json,
    changes_of,
    new_file,
    number_of_processes,
    print_json,
    run_options,
    starts_processes,
    tile_options,
    train_changes,
    train_options,
)
from fastseg.errors import EndedError, UsageError
from fastseg.signals import received
from fastseg.texts import pasted
from fastseg.workers import is_main, is_worker, restarts

if TYPE_CHECKING:
    from fastseg.config import Config, Size


@click.command()
@train_options
@click.option("--run", type=FileType(), help="Run folder.  [default: runs/DATA-RECIPE-TIME]")
@click.option("--resume", is_flag=True, help="Go on with the run in --run from its last checkpoint.")
@click.option("--dry-run", is_flag=True, help="Say how long the run will take and which batches fit, and end.")
@click.option(
    "--find-lr",
    type=FileType(),
    is_flag=False,
    flag_value=Path("find-lr.svg"),
    metavar="[FILE.svg]",
    help="Try learning rates from far too small to far too large, draw the loss, and end.",
)
@click.option("--checkpoint-every", type=IntervalType(), help="Time between checkpoints inside epochs: 500, or 10m.")
@click.option(
    "--nnodes", type=click.IntRange(1), default=1, show_default=True, help="Machines, each with this command."
)
@click.option("--rdzv-endpoint", metavar="HOST:PORT", help="Where several machines meet: one of them, a free port.")
@as_json
@click.pass_context
def train(
    ctx: click.Context,
    recipe: str,
    gpus: int | None,
    nproc: int | None,
    nnodes: int,
    rdzv_endpoint: str | None,
    run: Path | None,
    resume: bool,
    dry_run: bool,
    find_lr: Path | None,
    as_json: bool,
    checkpoint_every: dict[str, float] | None,
    **options: Any,
) -> None:
    """Train a network; the run folder keeps its configuration, log, checkpoints and report."""
    from fastseg import runs
    from fastseg.launcher import launch

    if nnodes > 1 and (rdzv_endpoint is None or run is None):
        raise UsageError("--nnodes: several machines need --rdzv-endpoint HOST:PORT, and --run in a folder they share")
    if rdzv_endpoint and nnodes == 1:
        raise UsageError("--rdzv-endpoint: where several machines meet; say how many with --nnodes")
    starts = starts_processes(gpus, nproc, nnodes)
    changes = train_changes(**options) | (checkpoint_every or {})
    if dry_run and find_lr:
        raise UsageError("--dry-run and --find-lr: give one of them")
    if find_lr:
        new_file(find_lr, "--find-lr", CURVES)
    before = "--dry-run" if dry_run else "--find-lr" if find_lr else None
    if before and (resume or is_worker()):
        raise UsageError(f"{before}: for a run that has not begun, in one process; leave --resume or the launcher out")
    changed: dict[str, tuple[Any, Any]] = {}
    if resume:
        run, config, changed = reopened(run, changes)
    else:
        run, config = begun(ctx, run, recipe, changes, needs_folder=before is None, starts=starts)
    earlier = processes_before(run, nnodes) if resume and run and starts and not (gpus or nproc) else 1
    processes = number_of_processes(gpus, nproc, config) or earlier
    if before:
        measure_before(config, processes * nnodes, find_lr, as_json)
        return
    assert run is not None
    if processes * nnodes > 1 and starts:
        # Another machine's launcher may have begun already.
        if not resume and nnodes == 1:
            runs.refuse_existing(run)
        arguments = [*sys.argv[1:], "--run", str(run)]
        timeout = config.runtime.collective_timeout
        ctx.exit(launch(processes, arguments, nodes=nnodes, endpoint=rdzv_endpoint, timeout=timeout))
    if changed and is_main():
        click.echo(f"resumed with {', '.join(f'{k} {b} instead of {a}' for k, (a, b) in changed.items())}", err=True)
    train_here(ctx, config, run, resume=resume or restarts() > 0, as_json=as_json)


def reopened(run: Path | None, changes: dict[str, Any]) -> tuple[Path, "Config", dict[str, tuple[Any, Any]]]:
    """The folder of a run that goes on, its configuration, and what this command changes there: {key: (old, new)}."""
    from fastseg import config as configs
    from fastseg import runs
    from fastseg.network import admit

    if run is None:
        found = ", ".join(f"--run {pasted(path)}" for path in runs.resumable()) or "none in runs/"
        raise UsageError(f"--resume needs --run; unfinished runs: {found}")

    def change(old: "Config") -> "Config":
        admit(old.model, changes.get("model.network", ()), f"--resume: {run}")
        return configs.override(old, changes, "train --resume")

    return run, *runs.reopen(run, change)


def begun(
    ctx: click.Context, run: Path | None, recipe: str, changes: dict[str, Any], *, needs_folder: bool, starts: bool
) -> tuple[Path | None, "Config"]:
    """The folder of a run that begins, and its configuration; after a restart what it has begun with.

    Args:
        needs_folder: it trains: a folder is found where the user has named none.
        starts: this command starts the run's processes, so that it can give them one folder.
    """
    from fastseg import config as configs
    from fastseg import runs
    from fastseg.network import admit

    config = configs.override(configs.load_recipe(recipe), changes, "train")
    if run is None and not starts:
        raise UsageError("--run: torchrun and srun need it, so that all processes, and a restart, have one folder")
    if run is None and needs_folder:
        run = runs.new_folder(config, recipe)
        ctx.call_on_close(functools.partial(runs.forget_unused, run))
    if run and restarts() and (run / "config.toml").is_file():
        begun_with = configs.read(run / "config.toml")
        admit(begun_with.model, config.model.network, str(run))
        config = begun_with
    return run, config


def measure_before(config: "Config", processes: int, find_lr: Path | None, as_json: bool) -> None:
    """What is asked of a run that has not begun: the best learning rate, or else how long it will take."""
    if find_lr is None:
        from fastseg.dry_run import dry_run, show

        document = dry_run(config, processes)
        print_json(document) if as_json else click.echo(show(document))
        return
    if processes > 1:
        raise UsageError(
            "--find-lr: tries rates in one process; give its batch as --batch, and leave --gpus or --nproc out"
        )
    from fastseg import find_lr as finding

    document = finding.find_lr(config)
    finding.plot(document, find_lr)
    print_json(document) if as_json else click.echo(f"lr      {document['suggested']:.2g}\nplot    {find_lr}")


def train_here(ctx: click.Context, config: "Config", run: Path, *, resume: bool, as_json: bool) -> None:
    """Train in this process, one of the run's, and say where its results are."""
    from fastseg.environment import process_age
    from fastseg.training import train as run_training

    began = time.perf_counter() - process_age()
    if restarts() and is_main():
        # A process of the group failed: go on from the last checkpoint, or from the beginning where there is none yet.
        click.echo(f"fastseg: all processes start again, from the last checkpoint (restart {restarts()})", err=True)
    try:
        document = run_training(config, run, resume=resume, began=began)
    except KeyboardInterrupt:
        begun = (run / "config.toml").is_file()
        cure = f"go on with: fastseg train --resume --run {pasted(run)}" if begun else "nothing was written"
        raise EndedError(received(), f"; {cure}") from None
    if not is_main():
        return
    if as_json:
        print_json(document)
    else:
        click.echo(f"run     {run}\nreport  {run / 'report.html'}")


def processes_before(run: Path, nodes: int) -> int:
    """How many processes a run that goes on had on each of so many machines.

    Raises:
        UsageError: this machine has not as many GPUs, or cores.
    """
    from fastseg import runs
    from fastseg.distributed import usable_gpus
    from fastseg.environment import cores

    start = runs.last_start(run)
    before = start.get("world", 1)
    if before == 1:
        return 1
    here, what = (cores(), "cores") if start["device"] == "CPU" else (usable_gpus(), "usable NVIDIA GPUs")
    if before % nodes or before // nodes > here:
        raise UsageError(
            f"--resume: {run} had {before} processes, and this machine has {here} {what}; say with --gpus N, or with "
            f"--device cpu --nproc N, how many take the {start['batch']} images of a step from here on"
        )
    click.echo(f"resumes with {before // nodes} processes{' on each machine' * (nodes > 1)}, as before", err=True)
    return before // nodes


@click.command(name="eval")
@click.argument("checkpoint", type=FileType())
@click.option("--data", "data_name", help="Another data set than the run's, or where that is now.")
@click.option("--split", default="val", show_default=True, help="val, test or train.")
@click.option(
    "--at", default="original", show_default=True, help="original: labels at their own size; network: resized."
)
@click.option("--tta", default="none", show_default=True, help="mirror: the mean with the mirrored image's scores.")
@tile_options
@click.option("--against", type=FileType(), help="Another checkpoint: what has it changed?")
@click.option("--mixed-protocols", "mixed", is_flag=True, help="Compare scores of different protocols all the same.")
@click.option("--allow-overlap", is_flag=True, help="Score images that the checkpoint was trained on all the same.")
@click.option("--csv", "csv_path", type=FileType(), help="Write the scores of each image.")
@click.option(
    "--network",
    multiple=True,
    help="PACKAGE.MODULE:FUNCTION of a checkpoint that is not SegNet's, --against's too; its code is imported and run.",
)
@run_options
@as_json
def evaluate(
    checkpoint: Path,
    data_name: str | None,
    split: str,
    at: str,
    tta: str,
    tile: "Size | None",
    overlap: int | None,
    against: Path | None,
    mixed: bool,
    allow_overlap: bool,
    csv_path: Path | None,
    network: tuple[str, ...],
    as_json: bool,
    sets: tuple[str, ...],
    **options: Any,
) -> None:
    """Print the scores of a checkpoint, with the protocol that gives them meaning.

    CHECKPOINT is a file, or a run's folder, whose best one is taken.
    With --against it says what the other checkpoint changed: the difference of mIoU with its 95 % interval, by a paired
    bootstrap over images.
    """
    from rich.console import Console

    from fastseg import evaluation
    from fastseg.distributed import leave
    from fastseg.runlog import class_table, comparison_table, percent

    if mixed and against is None:
        raise UsageError("--mixed-protocols: for --against another checkpoint")
    if csv_path:
        new_file(csv_path, "--csv", (".csv",))
    changes = changes_of(sets, {f"runtime.{name}": value for name, value in options.items()})
    how: dict[str, Any] = {"data": data_name, "split": split, "at": at, "tta": tta, "changes": changes}
    how |= {"allow_overlap": allow_overlap, "network": network, "tile": tile, "tile_overlap": overlap}
    if against:
        document = evaluation.evaluate_against(checkpoint, against, mixed=mixed, **how)
    else:
        document = evaluation.evaluate(checkpoint, **how)
    leave()
    if not is_main():
        return
    if csv_path:
        evaluation.write_csv(csv_path, document)
    if as_json:
        print_json(document)
        return
    console = Console(highlight=False, soft_wrap=True, emoji=False)
    if against:
        console.print(comparison_table(document, str(checkpoint), str(against)))
        return
    console.print(class_table(document, f"{checkpoint} on {split}"))
    low, high = document["miou_interval"]
    console.print(
        f"mIoU {percent(document['miou'])}, 95 % of samples of these images: {percent(low)} to {percent(high)}"
    )
    console.print(", ".join(f"{key} {value}" for key, value in document["protocol"].items()), markup=False)


@click.command()
@click.argument("runs", metavar="RUN...", nargs=-1, required=True, type=FileType())
@click.option("--out", type=FileType(), help="Of several runs.  [default: compare.html]")
def report(runs: tuple[Path, ...], out: Path | None) -> None:
    """Write RUN/report.html from the run's log, at any time of the run; or a page with several runs side by side."""
    from fastseg.report import compare, write

    if len(runs) == 1 and out:
        raise UsageError("report --out: for several runs; that of one is RUN/report.html")
    click.echo(write(runs[0]) if len(runs) == 1 else compare(runs, out or Path("compare.html")))
