"""The command line: each command parses, calls one function and prints. Heavy imports happen inside commands."""

import dataclasses
import functools
import json
import sys
import traceback
from collections.abc import Callable
from pathlib import Path
from typing import Any

import click

from fastseg import __version__
from fastseg.errors import FastsegError, LostError, StoppedError, UsageError, first_line
from fastseg.place import decide, decided, die_with_launcher, end_launcher, is_main, is_worker, place, restarts

Command = Callable[..., Any]


class Group(click.Group):
    """Prints what a user can cause as one line, without a traceback unless --debug is given."""

    def invoke(self, ctx: click.Context) -> Any:
        die_with_launcher()
        if (code := decided()) is not None:  # started again, although the run has ended
            ctx.exit(code)
        try:
            return super().invoke(ctx)
        except FastsegError as error:
            if ctx.params.get("debug"):
                raise
            report_error(error)
            ctx.exit(error.exit_code)
        except BrokenPipeError:  # the reader of our output has gone
            sys.stderr.close()
            ctx.exit(1)
        except OSError as error:
            # A file that cannot be written or read is the user's to mend; anything else is ours, with its traceback.
            if ctx.params.get("debug") or error.filename is None:
                raise
            report_error(FastsegError(f"{error.filename}: {error.strerror}"))
            ctx.exit(1)
        except Exception as error:
            mine = place()
            if mine is None or isinstance(error, (click.ClickException, click.exceptions.Exit, click.Abort)):
                raise
            report_error(FastsegError(f"{first_line(error)}\n{traceback.format_exc()}"))
            ctx.exit(1)


def report_error(error: FastsegError) -> None:
    """Print an error; among several processes with the rank, once, and so that the others end too."""
    mine = place()
    if mine is None:
        click.echo(f"fastseg: {error}", err=True)
    elif isinstance(error, LostError):
        if decided() is None:  # else it only follows from what another process has said
            click.echo(f"fastseg: rank {mine.rank}: {error}", err=True)
    else:
        first, new = decide(error.exit_code, str(error))
        stopped = isinstance(error, StoppedError)  # all of them, at the same step
        if new:
            click.echo(f"fastseg: {'' if stopped else f'rank {mine.rank}: '}{error}", err=True)
        if first and not stopped:
            end_launcher()


def print_json(document: dict) -> None:
    """The one line that `--json` promises on standard output; NaN is refused, not printed."""
    click.echo(json.dumps(document, allow_nan=False))


as_json = click.option("--json", "as_json", is_flag=True, help="Print one JSON document on standard output, no more.")
data_path = click.argument("path")


class SizeType(click.ParamType):
    """HEIGHTxWIDTH -> (height, width)."""

    name = "HxW"

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> tuple[int, int]:
        from fastseg.config import parse_size

        if isinstance(value, tuple):
            return value
        try:
            return parse_size(value)
        except ValueError as error:
            self.fail(str(error), param, ctx)


@click.group(cls=Group, context_settings={"help_option_names": ["-h", "--help"], "max_content_width": 120})
@click.version_option(__version__, prog_name="fastseg")
@click.option("--debug", is_flag=True, help="Show the traceback of an error.")
def main(debug: bool) -> None:
    """Train SegNet on CamVid-like data as fast as the machine allows.

    First steps: `fastseg train --data synth --recipe fast --size 48x72`, then `fastseg report RUN`.
    Exit codes: 0 done, 1 failed, 2 wrong use, 75 saved and stopped by a signal, 128 + N ended at once by signal N.
    """


# Data


@main.group()
def data() -> None:
    """Fetch, draw, check and count data sets."""


@data.command()
@click.option("--out", type=click.Path(path_type=Path), help="Folder; default: where --data camvid looks.")
@click.option("--source", help="A mirror: a URL, or a folder with the two zips.  [default: the published address]")
def download(out: Path | None, source: str | None) -> None:
    """Fetch CamVid (701 images, about 600 MB; for research use); goes on where an earlier download stopped."""
    from fastseg.data import home
    from fastseg.data.download import BASE, download_camvid

    out = out or home() / "camvid"
    download_camvid(out, source or BASE)
    click.echo(out)


@data.command()
@click.argument("out", type=click.Path(path_type=Path))
@click.option("--layout", default="segnet", show_default=True, help="segnet, original, kaggle or fastai.")
@click.option("--train", "train_count", default=256, show_default=True, help="Images to train.")
@click.option("--val", "val_count", default=64, show_default=True, help="Images to validate.")
@click.option("--test", "test_count", default=0, show_default=True, help="Images to test.")
@click.option("--size", type=SizeType(), default="144x216", show_default=True, help="Of the images.")
@click.option("--seed", default=0, show_default=True)
def synth(
    out: Path, layout: str, train_count: int, val_count: int, test_count: int, size: tuple[int, int], seed: int
) -> None:
    """Draw a data set of synthetic street scenes with CamVid's 11 classes into the new folder OUT."""
    from fastseg.data.synth import write

    counts = {"train": train_count, "val": val_count, "test": test_count}
    write(out, layout=layout, counts=counts, size=size, seed=seed)
    click.echo(out)


@data.command()
@data_path
@as_json
@click.pass_context
def check(ctx: click.Context, path: str, as_json: bool) -> None:
    """Read every pair of the data set at PATH and name each file that is missing, unreadable or off the class map."""
    from dataclasses import asdict

    from fastseg.data import resolve
    from fastseg.data.check import check as check_files
    from fastseg.data.layouts import find
    from fastseg.environment import cores

    dataset = find(resolve(path))
    errors, warnings = check_files(dataset, cores())
    if as_json:
        found = {"errors": [asdict(p) for p in errors], "warnings": [asdict(p) for p in warnings]}
        print_json({"pairs": len(dataset.pool), **found})
    else:
        for kind, problems in (("error", errors), ("warning", warnings)):
            for problem in problems:
                click.echo(f"{kind}: {problem.file}: {problem.problem}")
        sizes = ", ".join(f"{len(pairs)} {name}" for name, pairs in dataset.splits.items())
        click.echo(
            f"{dataset.root}: {dataset.layout} layout, {len(dataset.pool)} pairs{f' ({sizes})' if sizes else ''}, "
            f"{len(errors)} errors, {len(warnings)} warnings"
        )
    ctx.exit(1 if errors else 0)


@data.command()
@data_path
@click.option("--split", "split_name", default="train", show_default=True)
@click.option("--split-scheme", default="auto", show_default=True, help="auto, segnet, random-60-40 or video.")
@click.option("--weighting", default="median-frequency", show_default=True, help="Or sqrt-median-frequency, none.")
@click.option("--seed", default=0, show_default=True, help="Of the split.")
@as_json
def stats(path: str, split_name: str, split_scheme: str, weighting: str, seed: int, as_json: bool) -> None:
    """Count the pixels of each class in the data set at PATH, and print the loss weights that follow."""
    from fastseg.data import resolve
    from fastseg.data.layouts import find
    from fastseg.data.split import apply
    from fastseg.data.stats import WEIGHTINGS, class_weights, count
    from fastseg.environment import cores

    if weighting not in WEIGHTINGS:
        raise UsageError(f"--weighting {weighting}: choose one of {', '.join(WEIGHTINGS)}")
    dataset = find(resolve(path))
    splits = apply(dataset, split_scheme, seed)
    if split_name not in splits:
        raise UsageError(f"--split {split_name}: this data set has {', '.join(splits)}")
    counts = count(splits[split_name], dataset.classes, cores())
    columns = (counts.pixels, counts.image_pixels, counts.frequency, class_weights(counts, weighting))
    rows = [
        {"name": n, "pixels": int(p), "image_pixels": int(i), "frequency": float(f), "weight": float(w)}
        for n, p, i, f, w in zip(dataset.classes.names, *columns, strict=True)
    ]
    if as_json:
        print_json({"images": counts.images, "void_pixels": counts.void_pixels, "classes": rows})
        return
    click.echo(f"{counts.images} images of {split_name}, {counts.void_pixels:,} void pixels, weights {weighting}")
    width = max(len(name) for name in dataset.classes.names)
    click.echo(f"{'class':<{width}} {'pixels':>14} {'of images with':>16} {'frequency':>10} {'weight':>8}")
    for row in rows:
        click.echo(
            f"{row['name']:<{width}} {row['pixels']:>14,} {row['image_pixels']:>16,} "
            f"{row['frequency']:>10.5f} {row['weight']:>8.4f}"
        )


@data.command()
@data_path
@click.option("--cache-dir", required=True, help="Folder for the decoded data; `fastseg train --cache-dir` finds it.")
@click.option("--size", default="360x480", show_default=True, help="The network's input, HEIGHTxWIDTH.")
@click.option("--split-scheme", default="auto", show_default=True, help="auto, segnet, random-60-40 or video.")
@click.option("--seed", default=0, show_default=True, help="Of the split.")
@click.option("--unknown-colours", default="error", show_default=True, help="error or void.")
@click.option("--verify", is_flag=True, help="Decode what is there too, and compare.")
@as_json
def prepare(path: str, cache_dir: str, verify: bool, as_json: bool, **options: Any) -> None:
    """Decode and resize the train and val splits of the data set at PATH once, for all runs that follow."""
    from rich.console import Console
    from rich.progress import Progress

    from fastseg.inputs import reading
    from fastseg.pipelines.cache import prepare as prepare_split
    from fastseg.pipelines.prepared import key_of, shape_of
    from fastseg.pipelines.source import choose_loader, make_tier

    rows: list[dict[str, Any]] = []
    with Progress(console=Console(stderr=True)) as progress:
        for split, spec in reading(path, cache_dir=cache_dir, **options)[1].items():
            shape = shape_of(spec, resize_labels=True)
            assert shape is not None  # labels of one size
            advance = functools.partial(progress.advance, progress.add_task(split, total=len(spec.pairs)))
            inner, _ = choose_loader("auto", dataclasses.replace(spec, cache_dir=""))
            wrong = prepare_split(spec, make_tier(inner, spec), verify=verify, done=advance)
            folder = Path(cache_dir) / key_of(spec, shape)
            mended = [spec.pairs[index].stem for index in wrong]
            counts = {"pairs": len(spec.pairs), "bytes": shape.nbytes}
            rows.append({"split": split, **counts, "folder": str(folder), "mended": mended})
    if as_json:
        print_json({"splits": rows})
        return
    for row in rows:
        note = f"; wrong, and mended: {', '.join(row['mended'])}" if row["mended"] else ""
        click.echo(f"{row['split']:<6} {row['pairs']} pairs, {row['bytes'] / 1e6:.0f} MB, {row['folder']}{note}")


@data.command()
@data_path
@click.option("--size", default="360x480", show_default=True, help="The network's input, HEIGHTxWIDTH.")
@click.option("--split", default="val", show_default=True)
@click.option("--device", default="auto", show_default=True, help="auto, cpu or cuda.")
@as_json
def parity(path: str, split: str, as_json: bool, **options: Any) -> None:
    """Compare what this machine's tiers make of the data set at PATH, stage by stage, with the torchvision tier."""
    from fastseg.inputs import make_plan, reading
    from fastseg.pipelines.parity import BATCH, parity

    config, specs = reading(path, splits=(split,), batch=BATCH, **options)
    spec = specs[split]
    rows = parity(spec, make_plan(config, len(spec.pairs), 1))
    if as_json:
        print_json({"reference": "torchvision", "images": len(spec.pairs), "rows": rows})
        return
    click.echo(f"{len(spec.pairs)} images of {split}, against torchvision:")
    click.echo(f"{'tier':<6} {'stage':<8} {'image, of 255':>14} {'label pixels':>24}")
    for row in rows:
        if "skipped" in row:
            click.echo(f"{row['tier']:<6} not here: {row['skipped']}")
        else:
            labels = f"{row['labels_off']:,} of {row['labels']:,} differ"
            click.echo(f"{row['tier']:<6} {row['stage']:<8} {row['image_difference']:>14.3f} {labels:>24}")


@data.command()
@data_path
@click.option("--out", type=click.Path(path_type=Path), default="preview.png", show_default=True)
@click.option("--size", default="360x480", show_default=True, help="The network's input, HEIGHTxWIDTH.")
@click.option("--crop", default="0x0", help="As of augment.crop: windows, HEIGHTxWIDTH.  [default: whole images]")
@click.option("--images", type=click.IntRange(1), default=16, show_default=True)
@click.option("--seed", default=0, show_default=True, help="Of the sample plan.")
def preview(path: str, out: Path, images: int, seed: int, **options: Any) -> None:
    """Save a sheet of training samples of the data set at PATH as the network sees them, with their labels."""
    from fastseg.inputs import make_plan, reading
    from fastseg.overlays import write_sheet
    from fastseg.pipelines.source import TrainSource, choose_loader

    config, specs = reading(path, splits=("train",), seed=seed, batch=images, **options)
    spec = specs["train"]
    source = TrainSource(spec, make_plan(config, len(spec.pairs), 1), choose_loader("auto", spec)[0])
    batch = next(iter(source))
    source.check()
    write_sheet(out, batch, spec, columns=min(4, images))
    click.echo(f"{out}: the first {images} samples of a run with seed {seed}")


# Training and what follows from it


def run_options(command: Command) -> Command:
    """Options that say where and how a command computes."""
    options = (
        click.option("--device", help="auto, cpu or cuda."),
        click.option("--dtype", help="auto, bf16, fp16 or fp32."),
        click.option("--loader", help="auto, dali, cache or torchvision."),
        click.option("--cache-dir", help="Folder that keeps decoded data from run to run."),
        click.option(
            "--set", "sets", multiple=True, metavar="KEY=VALUE", help="Any configuration key, such as train.clip=5."
        ),
    )
    return functools.reduce(lambda decorated, option: option(decorated), reversed(options), command)


def changes_of(sets: tuple[str, ...], options: dict[str, Any]) -> dict[str, Any]:
    """{"section.field": value} of --set and of the flags that were given; flags win."""
    from fastseg.config import assignments

    return assignments(sets) | {key: value for key, value in options.items() if value is not None}


class IntervalType(click.ParamType):
    """500 or 10m -> the configuration keys of a checkpoint every so many steps or minutes."""

    name = "STEPS|MINUTESm"

    def convert(self, value: str, param: click.Parameter | None, ctx: click.Context | None) -> dict[str, float]:
        try:
            if value.endswith("m"):
                return {"train.checkpoint_minutes": float(value[:-1]), "train.checkpoint_steps": 0}
            return {"train.checkpoint_steps": int(value), "train.checkpoint_minutes": 0.0}
        except ValueError:
            self.fail(f"{value}: write steps, such as 500, or minutes, such as 10m", param, ctx)


@main.command()
@click.option("--data", "data_name", help="camvid, synth, a folder, a URL, or a .toml file.  [default: camvid]")
@click.option("--recipe", default="baseline", show_default=True, help="baseline, fast, or a .toml file.")
@click.option("--gpus", type=click.IntRange(1), help="GPUs of this machine, one process each.  [default: 1]")
@click.option("--nproc", type=click.IntRange(1), help="Processes with --device cpu.  [default: 1]")
@click.option(
    "--nnodes", type=click.IntRange(1), default=1, show_default=True, help="Machines, each with this command."
)
@click.option("--rdzv-endpoint", metavar="HOST:PORT", help="Where several machines meet: one of them, a free port.")
@click.option(
    "--amp/--no-amp", default=None, help="Mixed precision where the device does it well.  [default: the recipe's]"
)
@click.option("--size", help="The network's input, HEIGHTxWIDTH.")
@click.option("--epochs", type=int, help="Passes over the training images.")
@click.option("--batch", type=int, help="Images per device and backward pass.")
@click.option("--global-batch", type=int, help="Images per step of all devices together, instead of --batch.")
@click.option("--lr", type=float, help="Learning rate; the highest of the schedule.")
@click.option("--init", help="The encoder's start: none, vgg16, vgg16_bn, vgg19, vgg19_bn, or a file.")
@click.option("--split-scheme", help="auto, segnet, random-60-40 or video.")
@click.option("--unknown-colours", help="error or void: label values outside the class map.")
@click.option("--seed", type=int, help="Of the sample plan, the split and the initial weights.")
@click.option("--checkpoint-every", type=IntervalType(), help="Time between checkpoints inside epochs: 500, or 10m.")
@click.option("--sync-bn", is_flag=True, default=None, help="Batch norm over the batches of all GPUs together.")
@click.option("--deterministic", is_flag=True, default=None, help="The same bits from run to run on a GPU too.")
@run_options
@click.option("--run", type=click.Path(path_type=Path), help="Run folder.  [default: runs/DATA-RECIPE-TIME]")
@click.option("--resume", is_flag=True, help="Go on with the run in --run from its last checkpoint.")
@as_json
@click.pass_context
def train(
    ctx: click.Context,
    recipe: str,
    gpus: int | None,
    nproc: int | None,
    nnodes: int,
    rdzv_endpoint: str | None,
    amp: bool | None,
    run: Path | None,
    resume: bool,
    as_json: bool,
    sets: tuple[str, ...],
    data_name: str | None,
    checkpoint_every: dict[str, float] | None,
    **options: Any,
) -> None:
    """Train a network; the run folder keeps its configuration, log, checkpoints and report."""
    from fastseg import config as configs
    from fastseg import runs
    from fastseg.data import is_url
    from fastseg.distributed import check_gpus, launch

    sections = {"size": "data", "split_scheme": "data", "unknown_colours": "data", "init": "model"}
    sections |= dict.fromkeys(("epochs", "batch", "global_batch", "lr"), "train")
    sections |= dict.fromkeys(("seed", "device", "dtype", "loader", "cache_dir"), "runtime")
    sections |= dict.fromkeys(("sync_bn", "deterministic"), "runtime")
    flags = {f"{sections[name]}.{name}": value for name, value in options.items()}
    if amp is not None and options["dtype"] is None:
        flags["runtime.dtype"] = "auto" if amp else "fp32"
    if data_name is not None:
        # A run is resumed from any folder.
        named = data_name in ("camvid", "synth") or is_url(data_name)
        flags["data.path"] = data_name if named else str(Path(data_name).resolve())
    if options["batch"] is not None and options["global_batch"] is None and not resume:
        flags["train.global_batch"] = 0  # a recipe's would override it
    if gpus and nproc:
        raise UsageError("--gpus and --nproc: give one of them")
    if nnodes > 1 and (rdzv_endpoint is None or run is None):
        raise UsageError("--nnodes: several machines need --rdzv-endpoint HOST:PORT, and --run in a folder they share")
    changes = changes_of(sets, flags) | (checkpoint_every or {})

    changed: list[str] = []
    if resume:
        if run is None:
            found = ", ".join(f"--run {path}" for path in runs.resumable()) or "none in runs/"
            raise UsageError(f"--resume needs --run; unfinished runs: {found}")
        config, changed = runs.reopen(run, lambda old: configs.override(old, changes, "train --resume"))
    else:
        config = configs.override(configs.load_recipe(recipe), changes, "train")
        run = run or runs.new_folder(config, recipe)
        if restarts() and (run / "config.toml").is_file():
            config = configs.read(run / "config.toml")
    if restarts():
        # A process of the group failed: go on from the last checkpoint, or from the beginning where there is none yet.
        resume = True
        if is_main():
            click.echo(f"fastseg: all processes start again, from the last checkpoint (restart {restarts()})", err=True)
    if nproc and config.runtime.device != "cpu":
        raise UsageError("--nproc: processes without GPUs; give --device cpu too, or --gpus")

    if gpus:
        check_gpus(gpus)
    processes = gpus or nproc or 1
    if processes * nnodes > 1 and not is_worker():
        # Another machine's launcher may have begun already.
        if not resume and nnodes == 1:
            runs.refuse_existing(run)
        arguments = [*sys.argv[1:], "--run", str(run)]
        timeout = config.runtime.collective_timeout
        ctx.exit(launch(processes, arguments, nodes=nnodes, endpoint=rdzv_endpoint, timeout=timeout))
    from fastseg.training import train as run_training

    if changed and is_main():
        click.echo(f"resumed with other {', '.join(changed)}", err=True)
    try:
        document = run_training(config, run, resume=resume)
    except KeyboardInterrupt:
        begun = (run / "config.toml").is_file()
        cure = f"go on with: fastseg train --resume --run {run}" if begun else "nothing was written"
        click.echo(f"fastseg: interrupted; {cure}", err=True)
        ctx.exit(130)
    if not is_main():
        return
    if as_json:
        print_json(document)
    else:
        click.echo(f"run     {run}\nreport  {run / 'report.html'}")


@main.command(name="eval")
@click.argument("checkpoint", type=click.Path(path_type=Path))
@click.option("--data", "data_name", help="Another data set than the run's, as of train.")
@click.option("--split", default="val", show_default=True, help="val, test or train.")
@click.option(
    "--at", default="original", show_default=True, help="original: labels at their own size; network: resized."
)
@run_options
@as_json
def evaluate(
    checkpoint: Path,
    data_name: str | None,
    split: str,
    at: str,
    sets: tuple[str, ...],
    as_json: bool,
    **options: Any,
) -> None:
    """Score a checkpoint on a split: one confusion matrix over all its pixels."""
    from rich.console import Console

    from fastseg.distributed import leave
    from fastseg.evaluation import evaluate as run_evaluation
    from fastseg.runlog import class_table

    changes = changes_of(sets, {f"runtime.{name}": value for name, value in options.items()})
    document = run_evaluation(checkpoint, data=data_name, split=split, at=at, changes=changes)
    leave()
    if not is_main():
        return
    if as_json:
        print_json(document)
        return
    console = Console(highlight=False, soft_wrap=True)
    console.print(class_table(document, f"{checkpoint} on {split}"))
    console.print(", ".join(f"{key} {value}" for key, value in document["protocol"].items()), markup=False)


@main.command()
@click.argument("run", type=click.Path(path_type=Path))
def report(run: Path) -> None:
    """Write RUN/report.html from the run's log, at any time of the run."""
    from fastseg.report import write

    click.echo(write(run))


class PercentType(click.ParamType):
    """5% -> 0.05."""

    name = "PERCENT"

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> float:
        if isinstance(value, float):
            return value
        try:
            return float(value.removesuffix("%")) / 100
        except ValueError:
            self.fail(f"{value}: write per cent, such as 5%", param, ctx)


class CountsType(click.ParamType):
    """1,2,4 -> (1, 2, 4)."""

    name = "N,N,..."

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> tuple[int, ...]:
        try:
            return tuple(int(count) for count in value.split(","))
        except ValueError:
            self.fail(f"{value}: write numbers with commas between them, such as 1,2,4", param, ctx)


@main.command()
@click.argument("what", default="all")
@click.argument("records", nargs=-1, type=click.Path(path_type=Path))
@click.option(
    "--data", "data_name", default="synth", show_default=True, help="camvid, synth, a folder, or a .toml file."
)
@click.option("--size", type=SizeType(), help="The network's input.  [default: 360x480 on a GPU, else 120x160]")
@click.option("--batch", type=click.IntRange(1), default=4, show_default=True)
@click.option("--rounds", type=click.IntRange(3), default=5, show_default=True, help="Measurements of each figure.")
@click.option("--device", default="auto", show_default=True, help="auto, cpu or cuda.")
@click.option("--quick", is_flag=True, help="Shorter and fewer measurements: less sure, but done in minutes.")
@click.option("--gpus", type=CountsType(), help="scaling: numbers of GPUs, such as 1,2,4,8.")
@click.option("--nproc", type=CountsType(), help="scaling: numbers of processes without GPUs, such as 1,2.")
@click.option("--plot", "plot_path", type=click.Path(path_type=Path), help="Save curves as SVG: stream and scaling.")
@click.option("--fail-over", type=PercentType(), default="5%", show_default=True, help="compare: slower by more fails.")
@as_json
@click.pass_context
def bench(
    ctx: click.Context,
    what: str,
    records: tuple[Path, ...],
    data_name: str,
    gpus: tuple[int, ...] | None,
    nproc: tuple[int, ...] | None,
    plot_path: Path | None,
    fail_over: float,
    as_json: bool,
    **options: Any,
) -> None:
    """Measure this machine: WHAT is ladder, data, kernels, model, or all of them.

    Or scaling: training on several numbers of GPUs. Or stream: an epoch that is not kept. Or compare, with two RECORDS
    that --json wrote: has anything become slower?
    """
    from fastseg.bench import run as run_bench
    from fastseg.bench.harness import plot, show

    if what == "compare":
        from fastseg.bench import compare as comparing

        if len(records) != 2:
            raise UsageError("bench compare: give two records, the older one first")
        old, new = map(comparing.read, records)
        rows = comparing.compare(old, new, fail_over)
        if as_json:
            print_json({"rows": rows})
        else:
            click.echo(comparing.show(rows))
        ctx.exit(1 if any(row["worse"] for row in rows) else 0)
    if records:
        raise UsageError(f"bench {what}: takes no records; `fastseg bench compare` does")
    if plot_path and what not in ("stream", "scaling"):
        raise UsageError(f"--plot {plot_path}: bench {what} has no curves; stream and scaling have")
    if what == "scaling":
        from fastseg.distributed import check_gpus

        if (gpus is None) == (nproc is None):
            raise UsageError("bench scaling: give --gpus 1,2,4,8, or --nproc 1,2 without GPUs")
        if gpus:
            check_gpus(max(gpus))
        options |= {"counts": gpus or nproc, "device": "cuda" if gpus else "cpu"}
    elif gpus or nproc:
        raise UsageError(f"bench {what}: --gpus and --nproc are for scaling")
    document = run_bench(what, data=data_name, **options)
    if plot_path:
        plot(document, plot_path)
    if as_json:
        print_json(document)
    else:
        click.echo(show(document))
