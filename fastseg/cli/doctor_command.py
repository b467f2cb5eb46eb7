"""`fastseg doctor`."""

import shutil
from pathlib import Path

import click

from fastseg.cli.options import FileType, as_json, print_json
from fastseg.errors import UsageError


@click.command()
@click.option("--run", type=FileType(), help="Folder of a run, which may be under way.")
@click.option("--bench", type=FileType(), help="A document of `fastseg bench all --json`.")
@as_json
@click.pass_context
def doctor(ctx: click.Context, run: Path | None, bench: Path | None, as_json: bool) -> None:
    """Say what this machine has for fastseg, what is missing and how to mend it; put --json into a bug report.

    Exit code 1 where something keeps fastseg from training. With --run or --bench: what holds that run, or the machine
    that was measured, back, and what would help.
    """
    if run and bench:
        raise UsageError("doctor: give --run RUN or --bench FILE")
    if run or bench:
        _diagnose(run, bench, as_json)
        return
    from fastseg.doctor import examine, problems, show

    rows = examine()
    bad = problems(rows)
    if as_json:
        print_json({"problems": bad, "rows": [row._asdict() for row in rows]})
    else:
        click.echo(show(rows, shutil.get_terminal_size().columns))
    ctx.exit(1 if bad else 0)


def _diagnose(run: Path | None, bench: Path | None, as_json: bool) -> None:
    from fastseg import diagnosis

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
