"""`fastseg data init` and `fastseg data rasterise`: from what tools and people leave in a folder to a data set."""

from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from fastseg.cli.options import FileType, as_json, print_figures, print_json
from fastseg.errors import UsageError
from fastseg.texts import pasted, shown

if TYPE_CHECKING:
    from fastseg.data.init import Class, Guess


@click.command()
@click.argument("folder", type=FileType())
@click.option("--out", type=FileType(), help="File to write.  [default: FOLDER/dataset.toml]")
@click.option("--force", is_flag=True, help="Write it although a file is there, or a layout fits without one.")
@as_json
def init(folder: Path, out: Path | None, force: bool, as_json: bool) -> None:
    """Look at the images and masks in FOLDER, and write a dataset.toml that describes them, to be looked over."""
    from fastseg.data.init import init as write
    from fastseg.data.init import recognised
    from fastseg.environment import cores

    if not folder.is_dir():
        raise UsageError(f"{shown(folder)}: no folder; give the one that holds images and masks")
    out = out or folder / "dataset.toml"
    if not force and not (folder / "dataset.toml").exists() and (known := recognised(folder)):
        if as_json:
            print_json({"layout": known.layout, "file": None, "classes": [{"name": n} for n in known.classes.names]})
            return
        click.echo(
            f"{shown(folder)}: has the layout {known.layout}, with {len(known.pool)} pairs and the classes "
            f"{', '.join(known.classes.names)}: no file is needed (--force writes one all the same)"
        )
        _print_next(folder)
        return
    found = write(folder, out, cores(), force=force)
    if as_json:
        print_json(_document(found, out))
        return
    _print_guess(folder, found)
    click.echo(f"{shown(out)}: written; look it over, above all the names of the classes. Then:")
    _print_next(folder if out == folder / "dataset.toml" else out)


def _document(found: "Guess", out: Path) -> dict[str, Any]:
    def row(its: "Class") -> dict[str, Any]:
        return {"name": its.name, "values": its.values, "share": its.share, "images": its.images}

    return {
        "layout": None,
        "file": str(out),
        "splits": {n: {"images": s.images, "labels": s.labels, "pairs": s.count} for n, s in found.splits.items()},
        "val": found.held_out,
        "masks": found.masks,
        "counted": found.counted,
        "classes": [row(its) for its in found.classes],
        "void": [row(its) for its in found.void],
        "notes": found.notes,
    }


def _print_guess(folder: Path, found: "Guess") -> None:
    click.echo(f"{shown(folder)}: {found.masks} images with masks")
    for name, split in found.splits.items():
        listed = f", of {split.names}" if split.names else ""
        click.echo(f"{name:<6} {split.count} pairs: images {shown(split.images)}, labels {shown(split.labels)}{listed}")
    if found.held_out:
        click.echo(f"val    {100 * found.held_out:.0f} % of train: no images to validate with were found")
    click.echo(f"counted {found.counted} of {found.masks} masks:")
    rows = [(its, its.name) for its in found.classes] + [(its, "(void)") for its in found.void]
    texts = [
        ", ".join("{} {} {}".format(*v) if isinstance(v, tuple) else str(v) for v in its.values) for its, _ in rows
    ]
    values = max(map(len, ["value", *texts]))
    figures = [
        (name, f" {text:<{values}}", f"{its.share:.2%}", str(its.images))
        for (its, name), text in zip(rows, texts, strict=True)
    ]
    print_figures(("class", f" {'value':<{values}}", "of pixels", "in masks"), (0, 0, 10, 9), figures)
    if found.names_from:
        click.echo(f"names are those of {shown(found.names_from)}")
    for note in found.notes:
        click.echo(f"note: {note}")


def _print_next(data: Path) -> None:
    path = pasted(data)
    click.echo(f"  fastseg data check {path}")
    click.echo(f"  fastseg data preview {path} --out preview.png")
    click.echo(f"  fastseg train --data {path} --recipe fast --run runs/first")


@click.command()
@click.argument("folder", type=FileType())
@click.argument("out", type=FileType())
@as_json
def rasterise(folder: Path, out: Path, as_json: bool) -> None:
    """Draw masks from the polygons of LabelMe, COCO or CVAT in FOLDER into the new folder OUT."""
    from dataclasses import asdict

    from fastseg.data.rasterise import rasterise as draw
    from fastseg.environment import cores

    if not folder.is_dir():
        raise UsageError(f"{shown(folder)}: no folder; give the one that holds images and their annotations")
    found = draw(folder, out, cores())
    if as_json:
        print_json({"out": str(out)} | asdict(found))
        return
    files = ", ".join(f"{count} of {tool}" for tool, count in found.tools.items())
    click.echo(f"{shown(out)}: {found.masks} masks of {len(found.classes)} classes, from {files}")
    click.echo(f"classes, by value from 0: {', '.join(map(shown, found.classes))}")
    if found.covered:
        click.echo(
            f"overlaps: in {found.overlapping} masks later shapes cover {found.covered} pixels of earlier ones of "
            "other classes (by the file's order; CVAT's by z_order)"
        )
    missing = ", ".join(map(shown, found.missing[:3])) + ", ..." * (len(found.missing) > 3)
    for what, count in (
        ("images without an annotation, which got no mask", found.unannotated),
        ("images whose annotation has no shape, which got no mask", found.empty),
        (f"images that are annotated and not here ({missing})", len(found.missing)),
        *((f"shapes without an inside, left out: {shown(kind)}", count) for kind, count in found.ignored.items()),
    ):
        if count:
            click.echo(f"note: {what}: {count}")
    if folder.resolve() in out.resolve().parents:
        click.echo(f"next: fastseg data init {pasted(folder)}")
    else:
        click.echo("next: put images and masks into one folder, and give that to `fastseg data init`")
