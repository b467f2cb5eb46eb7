"""What several commands share: kinds of option values, groups of options, and how a document is printed."""

import functools
import json
import math
import os
import shutil
import sys
from collections.abc import Callable, Collection, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from fastseg.errors import UsageError
from fastseg.texts import shown
from fastseg.workers import LAUNCHER, this_worker

if TYPE_CHECKING:
    from fastseg.config import Size

Command = Callable[..., Any]

CURVES = (".svg",)  # what plots are written as
SHEETS = (".png", ".jpg", ".jpeg", ".webp")  # and pictures
MOST_PROCESSES = 64  # without GPUs, however few cores there are


def print_json(document: dict) -> None:
    """The one line that `--json` promises on standard output; NaN is refused, not printed."""
    click.echo(json.dumps(document, allow_nan=False))


def print_figures(heads: Sequence[str], widths: Sequence[int], rows: Sequence[Sequence[str]]) -> None:
    """Print names, each with its figures, in columns at least so wide; none is cut by a terminal narrower than that."""
    names = max(len(row[0]) for row in (heads, *rows))
    lines = [" ".join([f"{name:<{names}}", *map(str.rjust, figures, widths[1:])]) for name, *figures in (heads, *rows)]
    # What is no terminal takes any line.
    columns = shutil.get_terminal_size((sys.maxsize, 0)).columns
    if max(map(len, lines)) <= columns:
        click.echo("\n".join(lines))
        return
    from rich.console import Console

    from fastseg.runlog import Figures

    stripped = [[cell.strip() for cell in row] for row in (heads, *rows)]
    Console(highlight=False, soft_wrap=True, emoji=False).print(Figures("", stripped[0], stripped[1:]))


its_network = click.option(
    "--network", help="PACKAGE.MODULE:FUNCTION of a checkpoint that is not SegNet's; its code is imported and run."
)
as_json = click.option("--json", "as_json", is_flag=True, help="Print one JSON document on standard output, no more.")


class TextType(click.types.StringParamType):
    """A text that is not empty: mostly that is a variable of a script which is not set."""

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> Any:
        if value == "":
            self.fail("it is empty: give a value, or leave it out", param, ctx)
        return value if isinstance(value, Path) else super().convert(value, param, ctx)


def refuse_empty(command: click.Command) -> None:
    """Let no text that a command takes, or one of its group, be empty."""
    for parameter in command.params:
        if parameter.type is click.STRING:
            parameter.type = TextType()
    for each in command.commands.values() if isinstance(command, click.Group) else ():
        refuse_empty(each)


class SeedType(click.ParamType):
    """A whole number of 0 or more and below 2^63, as of runtime.seed."""

    name = "integer"

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> int:
        seed = click.INT.convert(value, param, ctx)
        if not 0 <= seed < 2**63:
            self.fail(f"{value}: 0 or more, and at most 64 bits", param, ctx)
        return seed


class FiniteType(click.FloatRange):
    """A number above 0, and neither infinite nor NaN."""

    def __init__(self) -> None:
        super().__init__(0, min_open=True)

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> float:
        number = super().convert(value, param, ctx)
        if not math.isfinite(number):
            self.fail(f"{value}: give a finite number", param, ctx)
        return number


class FileType(click.Path):
    """A path; ~ is the home folder, also where the shell has left it alone (as in --run=~/first)."""

    def __init__(self) -> None:
        super().__init__(path_type=Path)

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> Any:
        return super().convert(os.path.expanduser(TextType().convert(value, param, ctx)), param, ctx)


class SizeType(click.ParamType):
    """HEIGHTxWIDTH -> Size(height, width)."""

    name = "HxW"

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> "Size":
        from fastseg.config import parse_size

        try:
            return parse_size(value)
        except ValueError as error:
            self.fail(str(error), param, ctx)


def new_file(path: Path, option: str, suffixes: Collection[str], *, overwrite: bool | None = None) -> None:
    """See that a file can be written before anything is done for it; its suffix says in which format.

    Args:
        overwrite: whether it may replace one that is there; None: the command has no such option.

    Raises:
        UsageError: another suffix, or a file that is there.
    """
    if path.suffix.lower() not in suffixes:
        raise UsageError(f"{option} {shown(path)}: a name that ends in {' or '.join(suffixes)} says what to write")
    cure = "remove it" if overwrite is None else "--overwrite"
    if path.exists() and not overwrite:
        raise UsageError(f"{option} {shown(path)} exists: give another name, or {cure}")


def run_options(command: Command) -> Command:
    """Options that say where and how a command computes."""
    options = (
        click.option("--device", help="auto, cpu or cuda."),
        click.option("--dtype", help="auto, bf16, fp16, tf32 or fp32."),
        click.option("--loader", help="auto, dali, cache or reference."),
        click.option("--cache-dir", help="Folder that keeps decoded data from run to run."),
        click.option(
            "--set", "sets", multiple=True, metavar="KEY=VALUE", help="Any configuration key, such as train.clip=5."
        ),
    )
    return functools.reduce(lambda decorated, option: option(decorated), reversed(options), command)


def tile_options(command: Command) -> Command:
    """Options that take images at their own size, in tiles."""
    options = (
        click.option("--tile", type=SizeType(), help="Take images at their own size, in tiles of HEIGHTxWIDTH."),
        click.option("--overlap", type=int, help="Pixels that tiles have in common.  [default: a quarter of a tile]"),
    )
    return functools.reduce(lambda decorated, option: option(decorated), reversed(options), command)


def train_options(command: Command) -> Command:
    """Options that make a training run what it is, as `train_changes` takes them, and of how many processes."""
    options = (
        click.option("--data", "data_name", help="camvid, synth, a folder, a URL, or a .toml file.  [default: camvid]"),
        click.option("--recipe", default="baseline", show_default=True, help="baseline, fast, or a .toml file."),
        click.option("--gpus", type=click.IntRange(1), help="GPUs of this machine, one process each.  [default: 1]"),
        click.option("--nproc", type=click.IntRange(1), help="Processes with --device cpu.  [default: 1]"),
        click.option(
            "--amp/--no-amp",
            default=None,
            help="Mixed precision where the device does it well.  [default: the recipe's]",
        ),
        click.option("--size", help="The network's input, HEIGHTxWIDTH."),
        click.option("--epochs", type=int, help="Passes over the training images."),
        click.option("--batch", type=int, help="Images per device and backward pass."),
        click.option("--global-batch", type=int, help="Images per step of all devices together, instead of --batch."),
        click.option("--lr", type=float, help="Learning rate; the highest of the schedule."),
        click.option("--network", help="segnet, or PACKAGE.MODULE:FUNCTION of your own.  [default: segnet]"),
        click.option(
            "--init",
            help="First weights: none, identity, vgg16, vgg16_bn, vgg19, vgg19_bn, a checkpoint, or a file.",
        ),
        click.option("--split-scheme", help="auto, tutorial, segnet, video, random-60-40, random:A-B."),
        click.option("--unknown-colours", help="error or void: label values outside the class map."),
        click.option("--exif", help="ignore or apply: EXIF orientations of images and labels."),
        click.option("--seed", type=int, help="Of the sample plan, the split and the initial weights."),
        click.option("--sync-bn", is_flag=True, default=None, help="Batch norm over the batches of all GPUs together."),
        click.option("--deterministic", is_flag=True, default=None, help="The same bits from run to run on a GPU too."),
    )
    return functools.reduce(lambda decorated, option: option(decorated), reversed(options), run_options(command))


def train_changes(*, data_name: str | None, amp: bool | None, sets: tuple[str, ...], **options: Any) -> dict[str, Any]:
    """{"section.field": value} of the options that `train_options` adds."""
    from fastseg.data import is_url

    sections = dict.fromkeys(("size", "split_scheme", "unknown_colours", "exif"), "data")
    sections |= dict.fromkeys(("network", "init"), "model")
    sections |= dict.fromkeys(("epochs", "batch", "global_batch", "lr"), "train")
    sections |= dict.fromkeys(("seed", "device", "dtype", "loader", "cache_dir"), "runtime")
    sections |= dict.fromkeys(("sync_bn", "deterministic"), "runtime")
    flags = {f"{sections[name]}.{name}": value for name, value in options.items()}
    if amp is not None:
        given, single = options["dtype"], ("fp32", "tf32")
        if given is not None and amp == (given in single):
            raise UsageError(
                f"--{'' if amp else 'no-'}amp and --dtype {given}: contradict each other; give one of them"
            )
        flags["runtime.dtype"] = given or ("auto" if amp else "fp32")
    if data_name is not None:
        # A run is resumed from any folder.
        named = data_name in ("camvid", "synth") or is_url(data_name)
        flags["data.path"] = data_name if named else str(Path(os.path.expanduser(data_name)).resolve())
    return changes_of(sets, flags)


def number_of_processes(gpus: int | None, nproc: int | None, config: Any) -> int | None:
    """How many --gpus and --nproc ask for on this machine; None where neither is given.

    Raises:
        UsageError: both, or not that many GPUs, or processes that would share one, or far more than cores.
    """
    from fastseg.distributed import check_gpus
    from fastseg.environment import cores

    if gpus and nproc:
        raise UsageError("--gpus and --nproc: give one of them")
    if nproc and config.runtime.device != "cpu":
        raise UsageError("--nproc: processes without GPUs; give --device cpu too, or --gpus")
    if nproc and nproc > (most := max(MOST_PROCESSES, 4 * cores())):
        raise UsageError(f"--nproc {nproc}: this machine has {cores()} cores; give {most} or less")
    if gpus:
        check_gpus(gpus)
    return gpus or nproc


def starts_processes(gpus: int | None, nproc: int | None, nodes: int) -> bool:
    """Whether starting this machine's processes is this command's own work, and not that of a launcher around it.

    A SLURM task that is alone on its node starts them where --nnodes says that there is one on each.

    Raises:
        UsageError: a launcher has started another number than --gpus, --nproc and --nnodes ask for.
    """
    mine = this_worker()
    if mine is None:
        return True
    if LAUNCHER in os.environ:  # our own, whose workers have the arguments that it has
        return False
    if mine.by_slurm and mine.local_size == 1 and mine.size == nodes > 1:
        return True
    asked = gpus or nproc or mine.local_size
    if asked == mine.local_size and nodes in (1, -(-mine.size // mine.local_size)):
        return False
    given = {"--gpus": gpus, "--nproc": nproc, "--nnodes": nodes if nodes > 1 else None}
    options = " ".join(f"{name} {value}" for name, value in given.items() if value)
    variables, way = "RANK and WORLD_SIZE", "torchrun --nproc-per-node"
    if mine.by_slurm:
        variables, way = "SLURM_PROCID and SLURM_STEP_NUM_TASKS", "srun --ntasks-per-node"
    raise UsageError(
        f"{options}: by {variables} a launcher has started {mine.size} in all, {mine.local_size} on this machine; "
        f"let it start them ({way} {asked}) and leave {options} out, or unset these variables and run plain "
        f"`fastseg train {options}`"
    )


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


class PercentType(click.ParamType):
    """5% -> 0.05."""

    name = "PERCENT"

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> float:
        if isinstance(value, float):
            return value
        try:
            share = float(value.removesuffix("%")) / 100
        except ValueError:
            share = math.nan
        if not 0 <= share < math.inf:  # NaN, above all: nothing is slower by more than that
            self.fail(f"{value}: write per cent, 0 or more, such as 5%", param, ctx)
        return share


class SharesType(click.ParamType):
    """0.15,0.30 -> (0.15, 0.3)."""

    name = "X,X,..."

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> tuple[float, ...]:
        if isinstance(value, tuple):
            return value
        try:
            shares = tuple(float(share) for share in value.split(","))
        except ValueError:
            shares = ()
        if not shares or not all(0 < share <= 1 for share in shares):
            self.fail(f"{value}: write shares with commas between them, such as 0.15,0.30", param, ctx)
        return shares


class CountsType(click.ParamType):
    """1,2,4 -> (1, 2, 4)."""

    name = "N,N,..."

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> tuple[int, ...]:
        try:
            counts = tuple(int(count) for count in value.split(","))
        except ValueError:
            counts = ()
        if not counts or min(counts) < 1:
            self.fail(f"{value}: write numbers with commas between them, such as 1,2,4", param, ctx)
        return counts
