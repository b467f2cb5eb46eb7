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
from fastseg.errors import FastsegError
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
    # Independently: the file alone, another batch than it was made with.
    images = np.random.default_rng(3).integers(0, 256, (2, 3, 44, 62), dtype=np.uint8)
    if suffix == ".onnx":
        import onnxruntime

        session = onnxruntime.InferenceSession(out, providers=["CPUExecutionProvider"])
        scores = session.run(None, {"images": images})[0]
        facts = session.get_modelmeta().custom_metadata_map
        assert facts["classes"].split(",")[:2] == ["Sky", "Building"]
        assert facts["size"] == "44x62"
    else:
        scores = torch.export.load(out).module()(torch.from_numpy(images)).detach().numpy()
    state = torch.load(trained, weights_only=True)
    network = SegNet(11, depth=3).eval()
    network.load_state_dict(state["ema"] or state["model"])
    mean, std = (torch.tensor(values).view(1, 3, 1, 1) for values in (MEAN, STD))
    with torch.inference_mode():
        wanted = network((torch.from_numpy(images) - mean) / std).numpy()
    assert scores.shape == (2, 11, 44, 62)
    np.testing.assert_allclose(scores, wanted, atol=1e-3 * np.abs(wanted).max())
    code, _, err = invoke(trained, "--out", out)
    assert (code, err) == (2, f"fastseg: --out {out} exists: give another name\n")


def test_a_program_that_computes_something_else_is_not_kept(trained, tmp_path, monkeypatch):
    def broken(module, example, facts, path):
        path.write_bytes(b"a program")
        return lambda images: torch.zeros(len(images), 11, 44, 62)

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
