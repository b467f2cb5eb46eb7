"""`fastseg profile`."""

import functools
import os
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import click

from fastseg.cli.options import FileType, as_json, number_of_processes, print_json, train_changes, train_options
from fastseg.errors import FastsegError, UsageError
from fastseg.workers import LAUNCHER, is_worker


@click.command()
@train_options
@click.option("--steps", type=click.IntRange(1), default=10, show_default=True, help="Steps that are recorded.")
@click.option("--warmup", type=click.IntRange(2), default=5, show_default=True, help="Steps before those.")
@click.option(
    "--profiler",
    type=click.Choice(["auto", "nsys", "torch"]),
    default="auto",
    show_default=True,
    help="auto: Nsight Systems on a GPU where it is installed, else torch's.",
)
@click.option("--out", type=FileType(), help="Folder.  [default: runs/DATA-RECIPE-TIME-profile]")
@as_json
@click.pass_context
def profile(
    ctx: click.Context,
    recipe: str,
    gpus: int | None,
    nproc: int | None,
    steps: int,
    warmup: int,
    profiler: str,
    out: Path | None,
    as_json: bool,
    **options: Any,
) -> None:
    """Train a few steps and say what their time goes to; takes the options of `fastseg train`.

    The folder keeps summary.json and, for each process, a trace for Chrome or https://ui.perfetto.dev, or a report for
    Nsight Systems.
    """
    from fastseg import config as configs
    from fastseg import runs
    from fastseg.distributed import choose_device
    from fastseg.launcher import launch
    from fastseg.profiling import session, text

    config = configs.override(configs.load_recipe(recipe), train_changes(**options), "profile")
    # Few images have too few steps in a recipe's epochs; an epoch has at least one. A validation between steps would be
    # counted as a part of one, and a recipe's smaller first images would be most of a run as short as this.
    needed = warmup + steps + session.AFTERWARDS
    changes = dict.fromkeys(("train.max_steps", "train.epochs", "train.validate_every"), needed)
    config = configs.override(config, changes | {"train.grow_from": 1.0})
    processes = number_of_processes(gpus, nproc, config) or 1
    if is_worker() and LAUNCHER not in os.environ:
        raise UsageError("profile: it starts its processes itself; leave torchrun or srun out, and use --gpus")
    if is_worker() or session.UNDER_NSYS in os.environ:
        assert out is not None
        session.record(config, out, warmup, steps)
        return
    chosen, why = session.choose_profiler(profiler, choose_device(config.runtime.device)[0])
    click.echo(f"profiler   {chosen}: {why}", err=True)
    if out is None:
        out = runs.new_folder(config, recipe, "profile")
        ctx.call_on_close(functools.partial(runs.forget_unused, out))
    runs.refuse_existing(out, option="--out")
    out.mkdir(parents=True, exist_ok=True)
    under = session.nsys_command(out, processes) if chosen == "nsys" else []
    arguments = [*sys.argv[1:], "--out", str(out)]
    if under:
        os.environ[session.UNDER_NSYS] = "1"
    try:
        if processes > 1:
            code = launch(processes, arguments, timeout=config.runtime.collective_timeout, under=under)
        elif under:
            code = subprocess.run([*under, sys.executable, "-m", "fastseg", *arguments], check=False).returncode
        else:
            session.record(config, out, warmup, steps)
            code = 0
    finally:
        shutil.rmtree(out / "run", ignore_errors=True)
    if code:
        raise FastsegError(f"profile: the run failed (exit code {code}); it has said why")
    document = {"profiler": chosen, "ranks": session.read(out)}
    runs.write_json(out / "summary.json", document)
    if as_json:
        print_json(document)
    else:
        click.echo(text.show(document))
        click.echo(f"profile    {out}")
