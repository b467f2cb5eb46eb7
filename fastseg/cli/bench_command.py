"""`fastseg bench`."""

from pathlib import Path
from typing import Any

import click

from fastseg.cli.options import (
    CURVES,
    CountsType,
    FileType,
    FiniteType,
    PercentType,
    SharesType,
    SizeType,
    as_json,
    new_file,
    print_json,
)
from fastseg.errors import UsageError


@click.command()
@click.argument("what", required=False)
@click.argument("records", nargs=-1, type=FileType())
@click.option(
    "--data", "data_name", default="synth", show_default=True, help="camvid, synth, a folder, or a .toml file."
)
@click.option(
    "--size",
    type=SizeType(),
    help="The network's input.  [default: 360x480 on a GPU, else 120x160; 512x1024 with --format jpeg]",
)
@click.option("--batch", type=click.IntRange(1), default=4, show_default=True)
@click.option("--rounds", type=click.IntRange(3), default=5, show_default=True, help="Measurements of each figure.")
@click.option("--device", type=click.Choice(["auto", "cpu", "cuda"]), default="auto", show_default=True)
@click.option("--quick", is_flag=True, help="Shorter and fewer measurements: less sure, but done in minutes.")
@click.option("--gpus", type=CountsType(), help="scaling: numbers of GPUs, such as 1,2,4,8.")
@click.option("--nproc", type=CountsType(), help="scaling: numbers of processes without GPUs, such as 1,2.")
@click.option(
    "--target", "targets", type=SharesType(), default="0.15,0.30,0.40", show_default=True, help="accuracy: mIoU."
)
@click.option(
    "--recipe", "recipes", multiple=True, default=("fast",), show_default=True, help="accuracy: may be given again."
)
@click.option("--seeds", type=click.IntRange(1), default=2, show_default=True, help="accuracy: runs of each recipe.")
@click.option(
    "--cap",
    type=FiniteType(),
    default=2700.0,
    show_default=True,
    help="accuracy: seconds that the plain loop trains.",
)
@click.option("--shares", is_flag=True, help="accuracy: what of the ratio is the recipe's, and what the software's.")
@click.option("--minutes", type=FiniteType(), help="data: that measuring may take.  [default: 3]")
@click.option(
    "--format", "image_format", help="data: of the scenes, png, or jpeg of 1024x2048, drawn once.  [default: png]"
)
@click.option("--network", help="ladder and scaling: PACKAGE.MODULE:FUNCTION of your own, in place of SegNet.")
@click.option("--plan", is_flag=True, help="kernels: how they fill a GPU, worked out without one.")
@click.option("--plot", "plot_path", type=FileType(), help="Save curves as SVG: stream, scaling and accuracy.")
@click.option("--fail-over", type=PercentType(), default="5%", show_default=True, help="compare: slower by more fails.")
@as_json
@click.pass_context
def bench(
    ctx: click.Context,
    what: str | None,
    records: tuple[Path, ...],
    data_name: str,
    gpus: tuple[int, ...] | None,
    nproc: tuple[int, ...] | None,
    targets: tuple[float, ...],
    recipes: tuple[str, ...],
    seeds: int,
    cap: float,
    shares: bool,
    plan: bool,
    plot_path: Path | None,
    fail_over: float,
    as_json: bool,
    **options: Any,
) -> None:
    """Measure this machine: WHAT is ladder, data, fill, kernels, host, model, scaling, or all.

    By default ladder and scaling. scaling trains on 1, 2, 4 ... of the GPUs that are there. Or stream: an epoch that is
    not kept. Or compare, with two RECORDS that --json wrote, or added to: has anything become slower? Or accuracy:
    seconds of training to a useful mIoU, recipe against recipe and against a plain PyTorch loop.
    """
    from fastseg.bench import run as run_bench
    from fastseg.bench.harness import plot, show

    what = what or ""
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
    if plan:
        if what != "kernels":
            raise UsageError(f"--plan: is of bench kernels, not of bench {what or 'alone'}")
        from fastseg.bench import plan as planning
        from fastseg.bench.kernels import PUBLISHED

        found = planning.document(options["size"] or PUBLISHED, options["batch"])
        if as_json:
            print_json(found)
        else:
            click.echo(planning.show(found))
        return
    if plot_path:
        if what not in ("stream", "scaling", "accuracy"):
            raise UsageError(f"--plot {plot_path}: bench {what} has no curves; stream, scaling and accuracy have")
        new_file(plot_path, "--plot", CURVES)
    if gpus or nproc:
        from fastseg.distributed import check_gpus

        if what != "scaling" or (gpus and nproc):
            raise UsageError(f"bench {what}: --gpus or --nproc, one of them, is for scaling")
        if gpus:
            check_gpus(max(gpus))
        options |= {"counts": gpus or nproc, "device": "cuda" if gpus else "cpu"}
    if what == "accuracy":
        options["accuracy"] = {"targets": targets, "recipes": recipes, "seeds": seeds, "cap": cap, "shares": shares}
    document = run_bench(what, data=data_name, **options)
    if plot_path:
        plot(document, plot_path)
    if as_json:
        print_json(document)
    else:
        click.echo(show(document))
