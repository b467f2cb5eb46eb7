"""`fastseg repro`."""

from pathlib import Path

import click

from fastseg.cli.options import FileType, as_json, its_network, print_json


@click.command()
@click.argument("run", type=FileType())
@click.option("--steps", type=click.IntRange(1), help="Of the run's beginning.  [default: all that its log has]")
@click.option("--data", "data_name", help="Where the run's data is now, if it was moved.")
@its_network
@as_json
@click.pass_context
def repro(
    ctx: click.Context, run: Path, steps: int | None, data_name: str | None, network: str | None, as_json: bool
) -> None:
    """Train a run again from what its folder holds, and say whether the losses are the same.

    The exit code is 1 where they differ by more than rounding explains.
    """
    from fastseg.repro import repro as again

    document = again(run, steps, data=data_name, network=network or ())
    if as_json:
        print_json(document)
    else:
        at = document["first_difference"]
        click.echo(f"{document['verdict']}: {document['compared']} log lines up to step {document['steps']}")
        if at is not None:
            click.echo(f"first difference at step {at}, at most {document['largest_difference']:.2%} of the loss")
        for name, (before, now) in document["changed"].items():
            click.echo(f"{name} was {before}, is {now}")
    ctx.exit(1 if document["verdict"] == "different" else 0)
