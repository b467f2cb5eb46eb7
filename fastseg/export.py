"""`fastseg export`: a trained network for other programs, as ONNX or as a torch.export program, checked as it is made.

What goes in are pixels, uint8[B, 3, H, W]; what comes out are scores, float32[B, C, H, W]. The normalisation is inside;
SegNet's batch norms are folded into the convolutions before them, and its unpooling is a gather in standard operators.
As ONNX it takes images of any size; another network, and torch.export's programs, take those of the network's own size.
All of it is fp32.
"""

import copy
import functools
import io
import itertools
import json
import time
from collections.abc import Callable, Collection
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import nn
from torch.nn.utils.fusion import fuse_conv_bn_eval

from fastseg import checkpoint as checkpoints
from fastseg import config as configs
from fastseg.config import Size
from fastseg.environment import install
from fastseg.errors import FastsegError, UsageError, first_line
from fastseg.kernels.pool import torch_pool
from fastseg.model import SegNet
from fastseg.network import Network, for_export
from fastseg.pipelines.source import MEAN, STD
from fastseg.runs import checkpoint_of, whole

FORMATS = {".onnx": "onnx", ".pt2": "torch"}
OPSETS = 13, 23  # of ONNX: the lowest that has the operators, and the highest that torch writes
WRITTEN = 18  # the lowest that torch writes; lower ones are made of it
SHAPES = 15  # the first whose `Shape` and `Reshape` are as torch writes them
# Of the exported program against the network: equal classes, and scores as fp32 allows in another order of sums.
AGREEMENT, TOLERANCE = 0.9999, 1e-3
CHECKED = (1, 3)  # images of noise in a batch
TURNS = 5


class Exportable(nn.Module):
    """uint8[B, 3, H, W] -> scores float32[B, C, H, W] of a trained network."""

    mean: torch.Tensor
    std: torch.Tensor

    def __init__(self, network: Network) -> None:
        super().__init__()
        self.network, self.batch_norms = for_export(network, Folded)
        self.register_buffer("mean", torch.tensor(MEAN).view(1, 3, 1, 1))
        self.register_buffer("std", torch.tensor(STD).view(1, 3, 1, 1))

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        return self.network((images.float() - self.mean) / self.std)


class Folded(nn.Module):
    """SegNet with nothing but standard operators, and without batch norms."""

    def __init__(self, network: SegNet) -> None:
        super().__init__()
        folded = fold(network)
        self.encoder, self.decoder = folded.encoder, folded.decoder

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        skipped = []
        for layers in self.encoder:
            x = layers(x)
            size = (x.shape[-2], x.shape[-1])
            x, positions = torch_pool(x)
            skipped.append((positions, size))
        for layers in self.decoder:
            positions, size = skipped.pop()
            x = layers(gathered(x, positions, size))
        return x


def gathered(x_BCHW: torch.Tensor, positions: torch.Tensor, size: tuple[int, int]) -> torch.Tensor:
    """Unpooling without a scatter: each pixel takes its window's value where it was the maximum, else 0."""
    height, width = size

    def spread(small: torch.Tensor) -> torch.Tensor:
        return small.repeat_interleave(2, -2).repeat_interleave(2, -1)[..., :height, :width]

    places = torch.arange(height * width, device=x_BCHW.device).view(height, width)
    return torch.where(spread(positions) == places, spread(x_BCHW), 0.0)


def fold(network: SegNet) -> SegNet:
    """A copy in evaluation mode whose batch norms are part of the convolutions before them."""
    network = copy.deepcopy(network).float().eval()
    for stage in itertools.chain(network.encoder, network.decoder):
        assert isinstance(stage, nn.Sequential)
        for place, (layer, following) in enumerate(itertools.pairwise(list(stage))):
            if isinstance(layer, nn.Conv2d) and isinstance(following, nn.BatchNorm2d):
                stage[place], stage[place + 1] = fuse_conv_bn_eval(layer, following), nn.Identity()
    return network


def export(
    checkpoint: Path,
    out: Path,
    *,
    network: str | Collection[str] = (),
    opset: int | None = None,
    overwrite: bool = False,
) -> dict[str, Any]:
    """Write a checkpoint's network as OUT.onnx or OUT.pt2, run it, and return what `fastseg export --json` prints.

    The file has the names of the classes and their colours as JSON, and the size that the network was trained on.

    Args:
        network: of the checkpoint where that is not SegNet, "package.module:function", whose module is imported.
        opset: of ONNX; None: 13, which most programs read.
        overwrite: replace what is there.

    Raises:
        UsageError: another suffix, or a file that is there; an opset that cannot be had; a network that is not SegNet
            and not `network`, or that torch cannot export. FastsegError: what was exported computes something else.
            Nothing is left then.
    """
    if out.suffix not in FORMATS:
        raise UsageError(f"--out {out}: a name that ends in {' or '.join(FORMATS)} says what to write")
    if out.exists() and not overwrite:
        raise UsageError(f"--out {out} exists: give another name, or --overwrite")
    if opset is not None and (out.suffix != ".onnx" or not OPSETS[0] <= opset <= OPSETS[1]):
        raise UsageError(f"--opset {opset}: from {OPSETS[0]} to {OPSETS[1]}, and of ONNX alone")
    checkpoint = checkpoint_of(checkpoint)
    state = checkpoints.read(checkpoint)
    size = configs.from_dict(state["config"], str(checkpoint)).data.size
    model = checkpoints.build_model(state, checkpoint, network).to(memory_format=torch.contiguous_format)
    module = Exportable(model).eval()
    any_size = FORMATS[out.suffix] == "onnx" and isinstance(module.network, Folded)
    other = Size(size[0] // 2 + 1, size[1] + 3)
    generator = torch.Generator().manual_seed(0)
    batches = [
        torch.randint(256, (number, 3, *each), dtype=torch.uint8, generator=generator)
        for each in ([size, other] if any_size else [size])
        for number in CHECKED
    ]
    facts = {name: json.dumps(state[name]) for name in ("classes", "colors")} | {"size": str(size)}
    write = functools.partial(_onnx, opset=opset or OPSETS[0], any_size=any_size) if out.suffix == ".onnx" else _torch
    with whole(out) as partial:
        try:
            run = write(module, batches[1], facts, partial)
        except (FastsegError, OSError):
            raise
        except Exception as error:  # torch's exporters fail in many ways on what a network of the user's may do
            raise FastsegError(
                f"export: torch cannot export this network to {out.suffix} ({first_line(error)}); try "
                f"{' or '.join(FORMATS.keys() - {out.suffix})}, or mend it (fastseg --debug shows where)"
            ) from error
        checked = check(model, run, batches)
        if checked["agreement"] < AGREEMENT or checked["difference"] > TOLERANCE:
            raise FastsegError(
                f"export: {checked['agreement']:.4%} of the pixels agree with the network, scores differ by "
                f"{checked['difference']:.2g} of their range: nothing was written"
            )
        nbytes = partial.stat().st_size
    sizes = "any" if any_size else str(size)
    made = {"out": str(out), "format": FORMATS[out.suffix], "bytes": nbytes, "sizes": sizes}
    return made | {"batch_norms": module.batch_norms} | checked


def check(
    network: nn.Module, run: Callable[[torch.Tensor], torch.Tensor], batches: list[torch.Tensor]
) -> dict[str, Any]:
    """How an exported program differs from the network in fp32, and how fast it is beside it on this CPU.

    `difference` is the largest of the scores, as a share of the largest score.
    """
    mean, std = (torch.tensor(values).view(1, 3, 1, 1) for values in (MEAN, STD))

    def plain(images: torch.Tensor) -> torch.Tensor:
        with torch.inference_mode():
            return network((images.float() - mean) / std)

    pairs = [(plain(images), run(images)) for images in batches]
    equal = [(a.argmax(1) == b.argmax(1)).flatten() for a, b in pairs]
    difference = max(float((a - b).abs().max() / a.abs().max()) for a, b in pairs)
    seconds: dict[str, list[float]] = {"network": [], "exported": []}
    for _ in range(TURNS):
        for name, call in (("network", plain), ("exported", run)):
            start = time.perf_counter()
            call(batches[0])
            seconds[name].append(time.perf_counter() - start)
    ratio = float(np.median([a / b for a, b in zip(seconds["network"], seconds["exported"], strict=True)]))
    return {"agreement": float(torch.cat(equal).float().mean()), "difference": difference, "speed_vs_network": ratio}


def _onnx(
    module: Exportable, example: torch.Tensor, facts: dict[str, str], path: Path, *, opset: int, any_size: bool
) -> Callable:
    """Write ONNX; returns what runs it in ONNX Runtime on the CPU."""
    try:
        import onnx
        import onnxruntime
        import onnxscript  # noqa: F401  torch's exporter needs it
    except ImportError as error:
        raise UsageError(
            f"export to ONNX needs onnx, onnxscript and onnxruntime ({error}): {install('onnx')}"
        ) from None
    names = {0: "batch"} | ({2: "height", 3: "width"} if any_size else {})
    dimensions = {place: torch.export.Dim(name, min=1) for place, name in names.items()}
    program = torch.onnx.export(
        module, (example,), dynamo=True, input_names=["images"], output_names=["scores"],
        opset_version=max(WRITTEN, opset), dynamic_shapes=(dimensions,), verbose=False,
    )  # fmt: skip
    assert program is not None
    model = lowered(program.model_proto, opset)
    onnx.helper.set_model_props(model, facts)
    onnx.save(model, path)
    session = onnxruntime.InferenceSession(model.SerializeToString(), providers=["CPUExecutionProvider"])
    return lambda images: torch.from_numpy(session.run(None, {"images": images.numpy()})[0])


def lowered(model: Any, opset: int) -> Any:
    """An ONNX model with the operators of an older set.

    ONNX's own converter goes down to 15. There `Shape` may give a part of a shape, which before was a `Slice` of it,
    and `Reshape` may keep a 0, which no image here has.

    Raises:
        UsageError: it has operators that are not in that set.
    """
    import onnx
    from onnx import version_converter

    try:
        if opset < WRITTEN:
            model = version_converter.convert_version(model, max(SHAPES, opset))
        if opset < SHAPES:
            _without_newer_attributes(model.graph)
            model.opset_import[0].version = opset
        onnx.checker.check_model(model, full_check=True)
    except (RuntimeError, onnx.checker.ValidationError) as error:
        raise UsageError(f"--opset {opset}: this network wants a newer one ({first_line(error)})") from None
    return model


def _without_newer_attributes(graph: Any) -> None:
    from onnx import helper, numpy_helper

    nodes = list(graph.node)
    del graph.node[:]
    for number, node in enumerate(nodes):
        given = {attribute.name: helper.get_attribute_value(attribute) for attribute in node.attribute}
        if node.op_type == "Reshape":
            del node.attribute[:]
        if node.op_type != "Shape" or not given:
            graph.node.append(node)
            continue
        whole_shape, ends = f"shape_{number}", [f"shape_{number}_{side}" for side in ("start", "end")]
        for name, value in zip(ends, (given.get("start", 0), given.get("end", np.iinfo(np.int64).max)), strict=True):
            graph.initializer.append(numpy_helper.from_array(np.array([value], np.int64), name))
        graph.node.append(helper.make_node("Shape", list(node.input), [whole_shape]))
        graph.node.append(helper.make_node("Slice", [whole_shape, *ends], list(node.output)))


def _torch(module: Exportable, example: torch.Tensor, facts: dict[str, str], path: Path) -> Callable:
    """Write a torch.export program; returns what runs the file."""
    program = torch.export.export(module, (example,), dynamic_shapes=({0: torch.export.Dim("batch", min=1)},))
    # By way of memory: torch wants names that end in .pt2, and this one gets its name when it has been checked.
    buffer = io.BytesIO()
    torch.export.save(program, buffer, extra_files={"facts.json": json.dumps(facts)})
    path.write_bytes(buffer.getvalue())
    loaded = torch.export.load(io.BytesIO(path.read_bytes())).module()

    def run(images: torch.Tensor) -> torch.Tensor:
        with torch.inference_mode():
            return loaded(images)

    return run
