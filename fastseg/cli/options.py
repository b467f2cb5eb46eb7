"""What several commands share: kinds of option values, groups of options, and how a document is printed."""

import functools
import json
from collections.abc import Callable
from typing import Any

import click

Command = Callable[..., Any]


def print_json(document: dict) -> None:
    """The one line that `--json` promises on standard output; NaN is refused, not printed."""
    click.echo(json.dumps(document, allow_nan=False))


as_json = click.option("--json", "as_json", is_flag=True, help="Print one JSON document on standard output, no more.")


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
