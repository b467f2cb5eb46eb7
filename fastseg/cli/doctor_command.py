"""`fastseg doctor`."""

from pathlib import Path

import click

from fastseg.cli.options import FileType, as_json, print_json
from fastseg.errors import UsageError


@click.command()
@click.option("--run", type=FileType(), help="Folder of a run, which may be under way.")
@click.option("--bench", type=FileType(), help="A document of `fastseg bench all --json`.")
@as_json
def doctor(run: Path | None, bench: Path | None, as_json: bool) -> None:
    """Say in words what holds a run, or a machine that was measured, back, and what would help."""
    from fastseg import diagnosis

    if (run is None) == (bench is None):
        raise UsageError("doctor: give --run RUN or --bench FILE")
    if run:
        findings = diagnosis.of_run(run)
    else:
        from fastseg.bench.compare import read

        assert bench is not None
        findings = diagnosis.of_bench(read(bench)[-1])
    if as_json:
        print_json({"findings": [finding._asdict() for finding in findings]})
    else:
        click.echo(diagnosis.show(findings))
