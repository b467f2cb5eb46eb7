"""`fastseg export`."""

from pathlib import Path

import click

from fastseg.cli.options import FileType, as_json, its_network, print_json


@click.command()
@click.argument("checkpoint", type=FileType())
@click.option("--out", type=FileType(), required=True, help="NAME.onnx, or NAME.pt2 for torch.export.")
@click.option("--opset", type=int, help="Of ONNX, 13 to 23.  [default: 13]")
@click.option("--overwrite", is_flag=True, help="Replace what is there.")
@its_network
@as_json
def export(checkpoint: Path, out: Path, opset: int | None, overwrite: bool, network: str | None, as_json: bool) -> None:
    """Write a network for other programs, and check that they compute the same.

    CHECKPOINT is a file, or a run's folder, whose best one is taken.
    The input is uint8[B, 3, H, W], the output float32 scores [B, C, H, W]; normalisation is inside. In ONNX
    a SegNet takes images of any size, and does best at the network's; other exports take that one alone.
    """
    from fastseg.export import export as run

    document = run(checkpoint, out, network=network or (), opset=opset, overwrite=overwrite)
    if as_json:
        print_json(document)
        return
    click.echo(
        f"{out}: {document['bytes'] / 1e6:.1f} MB, {document['agreement']:.4%} of the pixels as the network, "
        f"scores within {document['difference']:.2g} of their range, {document['speed_vs_network']:.2f} times its "
        f"speed; images of {'any size' if document['sizes'] == 'any' else document['sizes']}; batch norms "
        f"{document['batch_norms']}"
    )
