"""`fastseg predict`."""

from pathlib import Path

import click

from fastseg.cli.options import FileType, as_json, its_network, new_file, print_json, tile_options


@click.command()
@click.argument("checkpoint", type=FileType())
@click.argument("inputs", nargs=-1, required=True)
@click.option("--out", type=FileType(), required=True, help="Folder for the results.")
@click.option(
    "--write",
    "kinds",
    multiple=True,
    type=click.Choice(["index", "color", "overlay"]),
    help="What to write, several times for several.  [default: all three]",
)
@click.option("--confidence", is_flag=True, help="Write the best class's probability too: 16-bit grey, 65535 is 1.")
@click.option(
    "--probabilities",
    type=click.Choice(["png", "npy"]),
    help="Write each class's probability too: png as of --confidence, or npy: float16[classes, height, width].",
)
@click.option("--csv", "csv_path", type=FileType(), help="Write how many pixels of each class each image has.")
@tile_options
@click.option("--overwrite", is_flag=True, help="Replace results that are there.")
@click.option("--device", default="auto", show_default=True, help="auto, cpu or cuda.")
@click.option("--dtype", default="auto", show_default=True, help="auto, bf16, fp16 or fp32.")
@its_network
@as_json
@click.pass_context
def predict(
    ctx: click.Context,
    checkpoint: Path,
    inputs: tuple[str, ...],
    out: Path,
    kinds: tuple[str, ...],
    confidence: bool,
    probabilities: str | None,
    csv_path: Path | None,
    tile: tuple[int, int] | None,
    overlap: int | None,
    overwrite: bool,
    device: str,
    dtype: str,
    network: str | None,
    as_json: bool,
) -> None:
    """Label images: INPUTS are files, folders, or globs in quotes.

    CHECKPOINT is a file, or a run's folder, whose best one is taken.
    OUT/index has the class of each pixel as its grey value, OUT/color the same with a palette, OUT/overlay the photo
    with the classes over it; all in the photo's own size. On the way photos are resized to the network's size, unless
    --tile cuts them. A file that cannot be read is named and left out, and the exit code is 1.
    """
    import time

    from rich.console import Console
    from rich.progress import track

    from fastseg.inputs import find_images
    from fastseg.predict import load
    from fastseg.predict import predict as run
    from fastseg.results import KINDS

    if csv_path:
        new_file(csv_path, "--csv", (".csv",), overwrite=overwrite)
    jobs = find_images(inputs)
    model = load(checkpoint, device=device, dtype=dtype, network=network or (), tile=tile, tile_overlap=overlap)
    console = Console(stderr=True, highlight=False, soft_wrap=True, emoji=False)
    start, bad = time.perf_counter(), []
    wanted = [*(kinds or KINDS), *["confidence"] * confidence, *([probabilities] if probabilities else [])]
    results = run(model, jobs, out, wanted, overwrite=overwrite, csv_path=csv_path)
    for job, problem in track(results, total=len(jobs), description="predict", console=console, transient=True):
        if problem:
            bad.append({"file": str(job.path), "problem": problem})
            console.print(f"fastseg: {problem}", markup=False)
    seconds = time.perf_counter() - start
    written = len(jobs) - len(bad)
    if as_json:
        print_json({"out": str(out), "images": written, "bad": bad, "img_per_s": written / seconds})
    else:
        click.echo(
            f"{written} images to {out}, {written / seconds:.1f} img/s" + (f"; {len(bad)} left out" if bad else "")
        )
    ctx.exit(1 if bad else 0)
