"""Export: other programs compute what the network does."""

import itertools
import json

import numpy as np
import pytest
import torch
from click.testing import CliRunner

from fastseg import export as exporting
from fastseg.cli import main
from fastseg.config import load_recipe, override
from fastseg.environment import install
from fastseg.errors import FastsegError, UsageError
from fastseg.export import Exportable, fold, gathered
from fastseg.kernels.pool import torch_pool, torch_unpool
from fastseg.model import SegNet
from fastseg.pipelines.source import MEAN, STD
from fastseg.training import train


@pytest.fixture(scope="module")
def trained(street, tmp_path_factory):
    changes = {
        "data.path": str(street),
        "data.size": "44x62",
        "model.depth": 3,
        "train.epochs": 1,
        "runtime.device": "cpu",
    }
    run = tmp_path_factory.mktemp("export") / "run"
    train(override(load_recipe("fast"), changes), run)
    return run / "checkpoints" / "best.pt"


@pytest.mark.parametrize("size", [(4, 6), (5, 7), (1, 2), (45, 60)])
def test_unpooling_by_a_gather_is_pytorchs(size):
    x = torch.randn(2, 3, *size, generator=torch.Generator().manual_seed(0))
    values, positions = torch_pool(x)
    assert torch.equal(gathered(values, positions, size), torch_unpool(values, positions, size))


def test_folded_batch_norms_change_nothing_but_rounding():
    network = SegNet(5, depth=2)
    generator = torch.Generator().manual_seed(0)
    for module in network.modules():
        if isinstance(module, torch.nn.BatchNorm2d):
            module.running_mean.normal_(generator=generator)
            module.running_var.uniform_(0.5, 2, generator=generator)
    network.eval()
    images = torch.randn(2, 3, 12, 18, generator=generator)
    folded = fold(network)
    assert not any(isinstance(module, torch.nn.BatchNorm2d) for module in folded.modules())
    torch.testing.assert_close(folded(images), network(images), rtol=1e-4, atol=1e-4)
    pixels = torch.randint(256, (1, 3, 12, 18), dtype=torch.uint8, generator=generator)
    mean, std = (torch.tensor(values).view(1, 3, 1, 1) for values in (MEAN, STD))
    torch.testing.assert_close(Exportable(network)(pixels), network((pixels - mean) / std), rtol=1e-4, atol=1e-4)


def invoke(*words: object) -> tuple[int, str, str]:
    result = CliRunner().invoke(main, ["export", *map(str, words)])
    assert not isinstance(result.exception, Exception), result.exception
    return result.exit_code, result.stdout, result.stderr


@pytest.mark.slow
@pytest.mark.parametrize("suffix", [".onnx", ".pt2"])
def test_an_exported_file_computes_the_networks_classes_for_any_batch(trained, tmp_path, suffix):
    out = tmp_path / f"network{suffix}"
    if suffix == ".onnx":
        pytest.importorskip("onnxruntime")
    code, said, err = invoke(trained, "--out", out, "--json")
    assert code == 0, err
    document = json.loads(said)
    assert (document["format"], document["bytes"]) == ("onnx" if suffix == ".onnx" else "torch", out.stat().st_size)
    assert document["agreement"] >= 0.9999
    assert document["difference"] < 1e-3
    assert document["sizes"] == ("any" if suffix == ".onnx" else "44x62")
    # Independently: the file alone, another batch than it was made with, at its size and two others.
    sizes = [(44, 62), (45, 71), (9, 16)] if suffix == ".onnx" else [(44, 62)]
    images = [np.random.default_rng(3).integers(0, 256, (2, 3, *size), dtype=np.uint8) for size in sizes]
    if suffix == ".onnx":
        import onnxruntime

        session = onnxruntime.InferenceSession(out, providers=["CPUExecutionProvider"])
        scores = [session.run(None, {"images": each})[0] for each in images]
        facts = session.get_modelmeta().custom_metadata_map
        assert json.loads(facts["classes"])[:2] == ["Sky", "Building"]
        assert json.loads(facts["colors"])[0] == [128, 128, 128]
        assert facts["size"] == "44x62"
        import onnx

        assert [(part.domain, part.version) for part in onnx.load(out).opset_import] == [("", 13)]
    else:
        loaded = torch.export.load(out).module()
        scores = [loaded(torch.from_numpy(each)).detach().numpy() for each in images]
    state = torch.load(trained, weights_only=True)
    network = SegNet(11, depth=3).eval()
    network.load_state_dict(state["ema"] or state["model"])
    mean, std = (torch.tensor(values).view(1, 3, 1, 1) for values in (MEAN, STD))
    for size, each, found in zip(sizes, images, scores, strict=True):
        with torch.inference_mode():
            wanted = network((torch.from_numpy(each) - mean) / std).numpy()
        assert found.shape == (2, 11, *size)
        np.testing.assert_allclose(found, wanted, atol=1e-3 * np.abs(wanted).max())
    code, _, err = invoke(trained, "--out", out)
    assert (code, err) == (2, f"fastseg: --out {out} exists: give another name, or --overwrite\n")


def test_older_operators_say_the_same(tmp_path):
    pytest.importorskip("onnxruntime")
    import onnxruntime
    from onnx import TensorProto, helper

    # The last two sides of an image as a shape, times the first: `Shape` with ends, `Reshape` with its attribute.
    nodes = [
        helper.make_node("Shape", ["x"], ["sides"], start=-2),
        helper.make_node("Shape", ["x"], ["first"], end=1),
        helper.make_node("ReduceProd", ["sides"], ["product"], keepdims=1),
        helper.make_node("Concat", ["first", "product"], ["flat"], axis=0),
        helper.make_node("Reshape", ["x", "flat"], ["y"], allowzero=1),
    ]
    x = helper.make_tensor_value_info("x", TensorProto.FLOAT, ["a", "b", "c"])
    y = helper.make_tensor_value_info("y", TensorProto.FLOAT, ["a", "d"])
    model = helper.make_model(helper.make_graph(nodes, "g", [x], [y]), opset_imports=[helper.make_opsetid("", 17)])
    lower = exporting.lowered(model, 13)
    assert [part.version for part in lower.opset_import] == [13]
    session = onnxruntime.InferenceSession(lower.SerializeToString(), providers=["CPUExecutionProvider"])
    values = np.arange(24, dtype=np.float32).reshape(2, 3, 4)
    assert session.run(None, {"x": values})[0].tolist() == values.reshape(2, 12).tolist()
    nodes = [helper.make_node("GroupNormalization", ["x", "s", "s"], ["y"], num_groups=1)]  # of 18
    s = helper.make_tensor_value_info("s", TensorProto.FLOAT, [3])
    newer = helper.make_model(helper.make_graph(nodes, "g", [x, s], [y]), opset_imports=[helper.make_opsetid("", 18)])
    with pytest.raises(UsageError, match=r"^--opset 13: this network wants a newer one \("):
        exporting.lowered(newer, 13)


def test_a_program_that_computes_something_else_is_not_kept(trained, tmp_path, monkeypatch):
    def broken(module, example, facts, path):
        path.write_bytes(b"a program")
        return lambda images: torch.zeros(len(images), 11, *images.shape[2:])

    monkeypatch.setattr(exporting, "_torch", broken)
    with pytest.raises(FastsegError, match=r"% of the pixels agree .* nothing was written"):
        exporting.export(trained, tmp_path / "network.pt2")
    assert list(tmp_path.iterdir()) == []


def test_names_and_libraries_that_are_missing_are_told(trained, tmp_path, monkeypatch):
    code, _, err = invoke(trained, "--out", tmp_path / "network.bin")
    assert (code, "a name that ends in .onnx or .pt2" in err) == (2, True)
    monkeypatch.setitem(__import__("sys").modules, "onnxruntime", None)
    code, _, err = invoke(trained, "--out", tmp_path / "network.onnx")
    assert (code, install("onnx") in err) == (2, True)
    assert list(itertools.chain(tmp_path.iterdir())) == []
