"""`fastseg data`: fetch, draw, check, count, prepare and look at data sets."""

import functools
import os
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import click

from fastseg.cli.options import FileType, SeedType, SizeType, as_json, print_figures, print_json
from fastseg.errors import FastsegError, UsageError

data_path = click.argument("path")
split_scheme = click.option(
    "--split-scheme", default="auto", show_default=True, help="auto, tutorial, segnet, video, random-60-40, random:A-B."
)
exif = click.option(
    "--exif",
    type=click.Choice(["ignore", "apply"]),
    default="ignore",
    show_default=True,
    help="Turn images and labels as their EXIF orientation says.",
)
fit = click.option(
    "--fit",
    type=click.Choice(["squeeze", "letterbox"]),
    default="squeeze",
    show_default=True,
    help="As of data.fit: how images of another shape get the size.",
)
crop = click.option("--crop", default="0x0", help="As of augment.crop: windows, HEIGHTxWIDTH.  [default: whole images]")
scale = click.option(
    "--scale", default=0.0, help="As of train.scale: windows of the files' own pixels.  [default: none]"
)
scale_jitter = click.option(
    "--scale-jitter", default=1.0, help="As of augment.scale: up to so many times as large, or as small.  [default: 1]"
)
colour_jitter = click.option(
    "--colour-jitter", default=0.0, help="As of augment.colour: by up to this share each way.  [default: 0]"
)


@click.group()
def data() -> None:
    """Fetch, draw, check and count data sets."""


@data.command()
@click.option("--out", type=FileType(), help="Folder; default: where --data camvid looks.")
@click.option("--source", help="A mirror: a URL, or a folder with the two zips.  [default: the published address]")
def download(out: Path | None, source: str | None) -> None:
    """Fetch CamVid (701 images, about 600 MB; for research use); goes on where an earlier download stopped."""
    from fastseg.data import home
    from fastseg.data.download import BASE, download_camvid

    out = out or home() / "camvid"
    download_camvid(out, os.path.expanduser(source or BASE))
    click.echo(out)


@data.command()
@click.argument("out", type=FileType())
@click.option("--layout", default="segnet", show_default=True, help="segnet, original, kaggle or fastai.")
@click.option("--train", "train_count", default=256, show_default=True, help="Images to train.")
@click.option("--val", "val_count", default=64, show_default=True, help="Images to validate.")
@click.option("--test", "test_count", default=0, show_default=True, help="Images to test.")
@click.option("--size", type=SizeType(), default="144x216", show_default=True, help="Of the images.")
@click.option("--seed", type=SeedType(), default=0, show_default=True)
@click.option(
    "--format", "image_format", default="png", show_default=True, help="Of the images: png or jpeg; labels are PNG."
)
def synth(
    out: Path,
    layout: str,
    train_count: int,
    val_count: int,
    test_count: int,
    size: tuple[int, int],
    seed: int,
    image_format: str,
) -> None:
    """Draw a data set of synthetic street scenes with CamVid's 11 classes into the new folder OUT."""
    from fastseg.data.synth import write

    counts = {"train": train_count, "val": val_count, "test": test_count}
    write(out, layout=layout, counts=counts, size=size, seed=seed, image_format=image_format)
    click.echo(out)


@data.command()
@data_path
@split_scheme
@click.option("--seed", type=SeedType(), default=0, show_default=True, help="Of the split.")
@click.option("--unknown-colours", default="error", show_default=True, help="error or void.")
@exif
@click.option("--all", "every", is_flag=True, help="Decode every file of a set of more than 2000 pairs too.")
@as_json
@click.pass_context
def check(ctx: click.Context, path: str, as_json: bool, split_scheme: str, exif: str, **options: Any) -> None:
    """Look for what is wrong with the data set at PATH: its files, its classes and its splits."""
    from rich.console import Console
    from rich.progress import track

    from fastseg.data import resolve
    from fastseg.data.check import check as check_files
    from fastseg.data.findings import lines
    from fastseg.data.layouts import find
    from fastseg.environment import cores

    def watch(looks: Iterable[Any], total: int) -> Iterable[Any]:
        return track(looks, "decoding", total, console=Console(stderr=True), transient=True)

    dataset = find(resolve(path))
    report = check_files(dataset, cores(), scheme=split_scheme, upright=exif == "apply", watch=watch, **options)
    found = {"errors": report.errors, "warnings": report.warnings, "notes": report.notes}
    if as_json:
        told = {
            what: [{"kind": p.kind, "file": p.file, "problem": p.problem} for p in problems]
            for what, problems in found.items()
        }
        splits = {split: len(pairs) for split, pairs in report.splits.items()}
        print_json({"pairs": len(dataset.pool), "splits": splits, **told})
    else:
        for what, problems in found.items():
            for line in lines(problems, dataset.root):
                click.echo(f"{what.removesuffix('s')}: {line}")
        sizes = ", ".join(f"{len(pairs)} {name}" for name, pairs in report.splits.items())
        click.echo(
            f"{dataset.root}: {dataset.layout} layout, {len(dataset.pool)} pairs{f' ({sizes})' if sizes else ''}, "
            f"{len(report.errors)} errors, {len(report.warnings)} warnings"
        )
    ctx.exit(1 if report.errors else 0)


@data.command()
@data_path
@click.option("--split", "split_name", default="train", show_default=True)
@split_scheme
@click.option("--weighting", default="median-frequency", show_default=True, help="Or sqrt-median-frequency, none.")
@click.option("--seed", type=SeedType(), default=0, show_default=True, help="Of the split.")
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
    figures = [
        (
            str(row["name"]),
            f"{row['pixels']:,}",
            f"{row['image_pixels']:,}",
            f"{row['frequency']:.5f}",
            f"{row['weight']:.4f}",
        )
        for row in rows
    ]
    print_figures(("class", "pixels", "of images with", "frequency", "weight"), (0, 14, 16, 10, 8), figures)


@data.command()
@data_path
@click.option("--cache-dir", required=True, help="Folder for the decoded data; `fastseg train --cache-dir` finds it.")
@click.option("--size", default="360x480", show_default=True, help="The network's input, HEIGHTxWIDTH.")
@split_scheme
@click.option("--seed", type=SeedType(), default=0, show_default=True, help="Of the split.")
@click.option("--unknown-colours", default="error", show_default=True, help="error or void.")
@exif
@fit
@click.option("--verify", is_flag=True, help="Decode what is there too, and compare.")
@as_json
def prepare(path: str, cache_dir: str, verify: bool, as_json: bool, **options: Any) -> None:
    """Decode and resize the train and val splits of the data set at PATH once, for all runs that follow."""
    from rich.console import Console
    from rich.progress import Progress

    from fastseg.pipelines.cache import prepare as prepare_split
    from fastseg.pipelines.prepared import key_of, shape_of
    from fastseg.pipelines.source import choose_loader
    from fastseg.specs import open_specs

    rows: list[dict[str, Any]] = []
    with Progress(console=Console(stderr=True)) as progress:
        for split, spec in open_specs(path, cache_dir=cache_dir, **options)[1].items():
            spec, choice = choose_loader("cache", spec)
            if spec.loader != "cache":
                raise FastsegError(f"data prepare: {choice.facts['obstacle']}")
            shape = shape_of(spec, resize_labels=True)
            advance = functools.partial(progress.advance, progress.add_task(split, total=len(spec.pairs)))
            wrong = prepare_split(spec, verify=verify, done=advance)
            folder = Path(spec.cache_dir) / key_of(spec, shape)
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
@crop
@scale
@scale_jitter
@colour_jitter
@exif
@fit
@click.option("--split", default="val", show_default=True)
@click.option("--device", default="auto", show_default=True, help="auto, cpu or cuda.")
@as_json
def parity(path: str, split: str, as_json: bool, **options: Any) -> None:
    """Compare this machine's tiers, on the data set at PATH, with the reference: decoded, resized, augmented."""
    from fastseg.pipelines.parity import BATCH, parity
    from fastseg.specs import make_plan, open_specs

    config, specs = open_specs(path, splits=(split,), batch=BATCH, **options)
    spec = specs[split]
    rows = parity(spec, make_plan(config, spec, 1))
    if as_json:
        print_json({"reference": "reference", "images": len(spec.pairs), "rows": rows})
        return
    click.echo(f"{len(spec.pairs)} images of {split}, against the reference:")
    values = "".join(f" {head:>14}" for head in ("image, of 255", "values off", "by more than 1", "of"))
    click.echo(f"{'tier':<6} {'operation':<9}{values} {'label pixels':>24}")
    for row in rows:
        if "skipped" in row:
            click.echo(f"{row['tier']:<6} not here: {row['skipped']}")
        else:
            counts = "".join(f" {row[name]:>14,}" for name in ("values_off", "values_off_by_more", "values"))
            labels = f"{row['labels_off']:,} of {row['labels']:,} differ"
            click.echo(f"{row['tier']:<6} {row['operation']:<9} {row['image_difference']:>14.3f}{counts} {labels:>24}")


@data.command()
@data_path
@click.option("--out", type=FileType(), default="preview.png", show_default=True)
@click.option("--size", default="360x480", show_default=True, help="The network's input, HEIGHTxWIDTH.")
@crop
@scale
@scale_jitter
@colour_jitter
@exif
@fit
@click.option("--images", type=click.IntRange(1), default=16, show_default=True)
@click.option("--seed", type=SeedType(), default=0, show_default=True, help="Of the sample plan.")
def preview(path: str, out: Path, images: int, seed: int, **options: Any) -> None:
    """Save a sheet of training samples of the data set at PATH as the network sees them, with their labels."""
    from fastseg.overlays import write_sheet
    from fastseg.pipelines.source import TrainSource, choose_loader
    from fastseg.specs import make_plan, open_specs

    config, specs = open_specs(path, splits=("train",), seed=seed, batch=images, **options)
    spec, _ = choose_loader("auto", specs["train"])
    source = TrainSource(spec, make_plan(config, spec, 1))
    batch = next(iter(source))
    source.check()
    write_sheet(out, batch, spec, columns=min(4, images))
    click.echo(f"{out}: the first {images} samples of a run with seed {seed}")
