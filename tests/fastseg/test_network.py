"""Networks of the user's own: the contract, whose code runs when, and a whole life of each in the one loop."""

import ast
import json
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from PIL import Image
from recorded import RecordedGraph
from torch import nn

import fastseg
from fastseg import network as networks
from fastseg.checkpoint import build_model, read
from fastseg.config import Config, Model, Size, Train, load_recipe, override
from fastseg.distributed import World
from fastseg.errors import FastsegError, UsageError
from fastseg.model import SegNet
from fastseg.network import Adapter, begin, build, rehearse
from fastseg.pipelines.resize import resize_image
from fastseg.pipelines.source import MEAN, STD
from fastseg.training import capture, setup

ROOT = Path(__file__).parents[2]
EXAMPLES = ROOT / "docs" / "examples"
CPU = torch.device("cpu")

TINY = """
import pathlib
import torch
from torch import nn

pathlib.Path("imported").touch()


def build(num_classes, size):
    assert size == (32, 48)
    return nn.Sequential(nn.Conv2d(3, 8, 3, 2, 1), nn.BatchNorm2d(8), nn.ReLU(), nn.Conv2d(8, num_classes, 1))


number = 7


def fails(num_classes, size):
    raise KeyError("weights")


def nothing(num_classes, size):
    return None
"""


@pytest.fixture
def module(tmp_path, monkeypatch):
    """module("name", text) writes NAME.py into the current folder, an empty one; afterwards Python has forgotten it."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", sys.path[:])
    before = set(sys.modules)

    def write(name: str, text: str = TINY) -> None:
        (tmp_path / f"{name}.py").write_text(text)

    yield write
    for name in set(sys.modules) - before:
        if getattr(sys.modules[name], "__file__", None) and str(tmp_path) in str(sys.modules[name].__file__):
            del sys.modules[name]


def tiny_run(street, tmp_path, name: str = "own:build") -> dict:
    settings = {"data.path": str(street), "data.size": "32x48", "train.epochs": 1, "model.network": name}
    return fastseg.train(override(load_recipe("fast"), settings | {"runtime.device": "cpu"}), tmp_path / "run")


# What a network gives


class Gives(nn.Module):
    """Gives what it was made with."""

    def __init__(self, found) -> None:
        super().__init__()
        self.found = found

    def forward(self, _):
        return self.found


def adapted(found, classes: int = 2) -> Adapter:
    return Adapter(Gives(found), "own:build", classes, fused=False)


def test_smaller_scores_are_resized_bilinearly_between_half_pixels():
    scores = torch.tensor([0.0, 4.0]).expand(1, 2, 1, 2)
    # Centres of 4 pixels among 2: at -1/4, 1/4, 3/4, 5/4 of the way from the first to the second, held at the ends.
    wanted = torch.tensor([0.0, 1.0, 3.0, 4.0]).expand(1, 2, 2, 4)
    assert torch.equal(adapted(scores)(torch.zeros(1, 3, 2, 4)), wanted)
    assert torch.equal(adapted({"out": scores, "aux": None})(torch.zeros(1, 3, 2, 4)), wanted)
    whole = torch.randn(1, 2, 2, 4)
    assert adapted(whole)(torch.zeros(1, 3, 2, 4)) is whole


@pytest.mark.parametrize("size", [(23, 30), (22, 30), (360, 480), (180, 240), (1, 1)])
def test_whole_fractions_are_rounded_either_way(size):
    # 360 / 16 = 22.5, which padded strides make 23 and pooling 22; 360 / 480 is less than one.
    assert adapted(torch.zeros(1, 2, *size))(torch.zeros(1, 3, 360, 480)).shape == (1, 2, 360, 480)


@pytest.mark.parametrize(
    ("found", "told"),
    [
        (torch.zeros(1, 3, 4, 6), "it gives 3 channels for 2 classes; the function is called with num_classes"),
        (torch.zeros(1, 2, 3, 6), "it gives scores of 3x6 for images of 4x6; their size is wanted, or a whole"),
        (torch.zeros(1, 2, 8, 12), "it gives scores of 8x12 for images of 4x6"),
        (torch.zeros(2, 4, 6), r"it gives torch\.float32\[2, 4, 6\]; scores \[B, C, h, w\] are wanted"),
        (torch.zeros(1, 2, 4, 6, dtype=torch.int64), r"it gives torch\.int64\[1, 2, 4, 6\]"),
        ((torch.zeros(1, 2, 4, 6),), "it gives tuple"),
        ({"logits": torch.zeros(1, 2, 4, 6)}, 'it gives dict; .* or a dict with them as "out"'),
    ],
)
def test_anything_but_scores_is_told(found, told):
    with pytest.raises(UsageError, match=f"^--network own:build: {told}"):
        adapted(found)(torch.zeros(1, 3, 4, 6))


# Names


@pytest.mark.parametrize(
    ("name", "told"),
    [
        ("SegNet", r"--network 'SegNet': write segnet, or PACKAGE\.MODULE:FUNCTION"),
        ("own:build()", r"write segnet, or PACKAGE\.MODULE:FUNCTION"),
        ("absent:build", "no module absent in .*, which is searched first"),
        ("own.deeper:build", "no module own.deeper|own' is not a package"),
        ("own:biuld", "own has nothing of that name; did you mean build"),
        ("own:number", "own has int of that name"),
        ("own:fails", r"called with num_classes=2, size=\(32, 48\) it raises KeyError: 'weights'"),
        ("own:nothing", r"it gives NoneType, a torch\.nn\.Module is wanted"),
        ("broken:build", "importing broken raises ZeroDivisionError: division by zero"),
        ("leaves:build", "importing leaves raises SystemExit: 3"),
        ("needs:build", "importing needs raises ModuleNotFoundError: No module named 'absent'"),
    ],
)
def test_a_name_that_gives_no_network_is_told(module, name, told):
    module("own")
    module("broken", "1 / 0")
    module("leaves", "raise SystemExit(3)")
    module("needs", "import absent")
    with pytest.raises(UsageError, match=told) as raised:
        build(Model(network=name), 2, Size(32, 48))
    assert "\n" not in str(raised.value)


def test_the_current_folder_is_searched_first(module):
    module("colorsys", "from torch import nn\ndef build(num_classes, size):\n    return nn.Conv2d(3, num_classes, 1)")
    known = sys.modules.pop("colorsys", None)
    assert isinstance(build(Model(network="colorsys:build"), 4, Size(8, 8)).network, nn.Conv2d)
    del sys.modules["colorsys"]
    if known:
        sys.modules["colorsys"] = known


def test_options_of_segnet_are_refused_and_those_of_a_recipe_do_not_count(module):
    module("own")
    for option, value in (("depth", 3), ("backbone", "vgg19")):
        model = override(Config(), {"model.network": "own:build", f"model.{option}": value}).model
        with pytest.raises(UsageError, match=f"model.{option} = {value}: is SegNet's, and the network is own:build"):
            build(model, 2, Size(32, 48))
    mine = override(load_recipe("baseline"), {"model.network": "own:build"})
    assert mine.model == Model(network="own:build")
    assert mine.train == load_recipe("baseline").train
    # The same name again, as on --resume, changes nothing.
    begun = override(mine, {"model.init": "weights.pt"})
    assert override(begun, {"model.network": "own:build"}) == begun
    assert override(begun, {"model.network": "segnet", "model.depth": 2}).model == Model(depth=2)


def test_first_weights_are_its_own_or_a_whole_file(module, tmp_path):
    module("own")
    network = build(Model(network="own:build"), 2, Size(32, 48))
    before = {name: value.clone() for name, value in network.network.state_dict().items()}
    begin(network, "none")
    assert all(torch.equal(value, before[name]) for name, value in network.network.state_dict().items())
    given = {name: value + 1 for name, value in before.items()}
    torch.save(given, tmp_path / "given.pt")
    begin(network, "given.pt")
    assert all(torch.equal(value, given[name]) for name, value in network.network.state_dict().items())
    with pytest.raises(UsageError, match="--init identity: no such file; own:build begins with its own weights"):
        begin(network, "identity")
    torch.save({**given, "3.bias": torch.zeros(5)}, tmp_path / "wide.pt")
    with pytest.raises(FastsegError, match=r"--init wide.pt: not the weights of this network: 1 of another shape"):
        begin(network, "wide.pt")
    torch.save([1], tmp_path / "list.pt")
    with pytest.raises(FastsegError, match=r"--init list.pt: not a state dict"):
        begin(network, "list.pt")


# The trial before a run


class Odd(nn.Module):
    """Batch norm, dropout, a head that no score depends on, and a weight that its maker has frozen."""

    def __init__(self) -> None:
        super().__init__()
        self.body = nn.Sequential(nn.Conv2d(3, 4, 3, 2, 1), nn.BatchNorm2d(4), nn.Dropout(0.5))
        self.head, self.aux = nn.Conv2d(4, 2, 1), nn.Conv2d(4, 2, 1)
        self.head.bias.requires_grad_(False)

    def forward(self, x):
        x = self.body(x)
        return {"out": self.head(x), "aux": self.aux(x)}


def test_a_trial_leaves_no_trace_but_frozen_weights_that_no_score_depends_on():
    torch.manual_seed(0)
    network = Adapter(Odd(), "own:build", 2, fused=False)
    before = {name: value.clone() for name, value in network.state_dict().items()}
    random = torch.get_rng_state()
    rehearse(network, [Size(8, 8), Size(16, 8), Size(8, 8)], 4, CPU, torch.bfloat16)
    assert torch.equal(torch.get_rng_state(), random)
    assert all(torch.equal(value, before[name]) for name, value in network.state_dict().items())
    assert all(parameter.grad is None for parameter in network.parameters())
    frozen = {name for name, parameter in network.network.named_parameters() if not parameter.requires_grad}
    assert frozen == {"aux.weight", "aux.bias", "head.bias"}
    told = networks.describe(Model(network="own:build"), network)
    assert told == "own:build (not SegNet), init its own, 2 tensors of weights that no score depends on"


def test_a_trial_finds_what_only_some_sizes_and_training_show():
    class Pools(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.conv, self.norm = nn.Conv2d(3, 2, 1), nn.BatchNorm2d(2)

        def forward(self, x):
            if x.shape[-1] % 8:
                raise RuntimeError("the width is no multiple of 8\nand more")
            return self.conv(x) + self.norm(F.adaptive_avg_pool2d(self.conv(x), 1))

    network = Adapter(Pools(), "own:build", 2, fused=False)
    rehearse(network, [Size(8, 8)], 2, CPU, torch.float32)
    with pytest.raises(UsageError, match="of 2 images of 8x12, evaluating, it raises RuntimeError: the width is no mu"):
        rehearse(network, [Size(8, 8), Size(8, 12)], 4, CPU, torch.float32)
    with pytest.raises(UsageError, match="of 1 image of 8x8, training, it raises ValueError: Expected more than 1 val"):
        rehearse(network, [Size(8, 8)], 1, CPU, torch.float32)
    network.requires_grad_(False)
    with pytest.raises(UsageError, match="it has no weights to train"):
        rehearse(network, [Size(8, 8)], 2, CPU, torch.float32)


def odd_step(*, captured: bool):
    torch.manual_seed(0)
    network = Adapter(Odd(), "own:build", 2, fused=True).to(memory_format=torch.channels_last)
    network.network.body[2].p = 0.0  # a recording draws no new numbers
    rehearse(network, [Size(8, 8)], 2, CPU, torch.float32)
    step, _ = setup.make_step(network, Train(), World(0, 1, CPU), torch.float32, torch.ones(2), 2)
    if captured:
        setup.capture_passes(step, must=True)
    return step


def test_replayed_steps_are_those_of_a_network_with_weights_that_get_no_gradient(monkeypatch):
    monkeypatch.setattr(capture, "make_graph", RecordedGraph)
    steps = [odd_step(captured=captured) for captured in (False, True)]
    generator = torch.Generator().manual_seed(1)
    for _ in range(capture.WARMUP + 3):
        images = torch.randn(2, 3, 8, 8, generator=generator).contiguous(memory_format=torch.channels_last)
        labels = torch.randint(0, 2, (2, 8, 8), generator=generator, dtype=torch.uint8)
        losses = [float(step.step(images, labels, 0.1).loss) for step in steps]
        assert losses[0] == losses[1]
    plain, replayed = (step.model.state_dict() for step in steps)
    assert all(torch.equal(plain[name], replayed[name]) for name in plain)
    assert steps[1].passes.news()[0]


# Whose code runs when


def test_a_checkpoint_that_names_a_module_imports_it_only_where_it_is_named(module, street, tmp_path, call):
    module("own")
    imported = tmp_path / "imported"
    tiny_run(street, tmp_path)
    best = tmp_path / "run" / "checkpoints" / "best.pt"
    assert read(best)["config"]["model"]["network"] == "own:build"
    photo = next((street / "val").iterdir())
    commands = {
        ("eval", best, "--device", "cpu"): 0,
        ("predict", best, photo, "--out", "out", "--device", "cpu"): 0,
        ("export", best, "--out", "own.pt2"): 0,
        ("train", "--resume", "--run", "run"): 0,
    }
    del sys.modules["own"]
    for other in ((), ("--network", "other:build")):
        imported.unlink(missing_ok=True)
        for command in (*commands, ("repro", "run", "--steps", "1")):
            code, _, err = call(*command, *other)
            (line,) = err.splitlines()
            assert (code, line.startswith("fastseg: ")) == (2, True), line
            assert "its network is own:build" in line
            assert "give --network own:build (in Python network=), which imports its module" in line
        with pytest.raises(UsageError, match="its network is own:build; give --network own:build"):
            fastseg.load(best)
        with pytest.raises(UsageError, match="its network is own:build, not other:build"):
            fastseg.evaluate(best, network="other:build")
        with pytest.raises(UsageError, match="its network is own:build, not own:build and more"):
            fastseg.load(best, network="own:build and more")  # a text is one name, not letters
        assert "own" not in sys.modules
        assert not imported.exists()
    for command, wanted in commands.items():
        code, _, err = call(*command, "--network", "own:build")
        assert code == wanted, err
    assert imported.exists()


def test_a_checkpoint_of_before_is_segnets(street, tmp_path):
    settings = {"data.path": str(street), "data.size": "32x48", "model.depth": 1, "train.epochs": 1}
    fastseg.train(override(load_recipe("fast"), settings | {"runtime.device": "cpu"}), tmp_path / "run")
    state = read(tmp_path / "run" / "checkpoints" / "best.pt")
    del state["config"]["model"]["network"]
    assert isinstance(build_model(state), SegNet)
    assert isinstance(build_model(state, network="own:build"), SegNet)


# A whole life


LIBRARIES = ["mynet:build", "libraries:lraspp", "libraries:deeplab", "libraries:unet"]


@pytest.mark.slow
@pytest.mark.parametrize("name", LIBRARIES)
def test_a_network_is_trained_resumed_evaluated_predicted_with_and_exported(name, module, street, tmp_path, call):
    if name == "libraries:unet":
        pytest.importorskip("segmentation_models_pytorch", reason="not installed: pip install '.[dev]'")
    for file in ("mynet.py", "libraries.py"):
        module(Path(file).stem, (EXAMPLES / file).read_text())
    mine, here = ("--network", name), ("--device", "cpu")
    options = ("--data", street, "--recipe", "fast", "--size", "32x64", "--batch", 4, "--epochs", 1, "--run", "run")
    code, _, err = call("train", *options, *mine, *here)
    assert code == 0, err
    assert f"{name} (not SegNet), init its own, input 32x64" in err
    assert "of the loss and of counts alone: the network is not SegNet" in err
    code, said, err = call("train", "--resume", "--run", "run", *mine, "--epochs", 2, "--json")
    assert (code, json.loads(said)["steps"]) == (0, 4), err
    assert (tmp_path / "run" / "report.html").is_file()

    # By hand: the library's own network with the weights, and the scores resized to the photo.
    best = tmp_path / "run" / "checkpoints" / "best.pt"
    state = torch.load(best, weights_only=True)
    network = networks.find(name)(num_classes=11, size=(32, 64)).eval()
    network.load_state_dict({key.removeprefix("network."): value for key, value in state["model"].items()})
    photos = sorted((street / "val").iterdir())
    mean, std = (torch.tensor(values).view(3, 1, 1) for values in (MEAN, STD))
    masks = []
    for photo in photos:
        pixels = torch.from_numpy(resize_image(np.asarray(Image.open(photo).convert("RGB")), Size(32, 64)))
        with torch.inference_mode():
            found = network(((pixels.permute(2, 0, 1).float() - mean) / std)[None])
        scores = found["out"] if isinstance(found, dict) else found
        for size in ((32, 64), (96, 144)):
            scores = F.interpolate(scores, size=size, mode="bilinear", align_corners=False)
        masks.append(scores[0].argmax(0).numpy())

    code, _, err = call("predict", best, street / "val", "--out", "out", "--write", "index", *mine, *here)
    assert code == 0, err
    predicted = [np.asarray(Image.open(tmp_path / "out" / "index" / f"{photo.stem}.png")) for photo in photos]
    same = np.mean([np.mean(a == b) for a, b in zip(masks, predicted, strict=True)])
    assert same > 0.999  # other strides of memory, other sums
    code, said, err = call("eval", best, *mine, *here, "--json")
    assert code == 0, err
    document = json.loads(said)
    assert (document["protocol"]["network"], document["protocol"]["images"]) == (name, 4)
    labels = [np.asarray(Image.open(street / "valannot" / photo.name)) for photo in photos]
    right = sum(int((mask == label).sum()) for mask, label in zip(masks, labels, strict=True))
    counted = sum(int((label < 11).sum()) for label in labels)
    assert document["global_accuracy"] == pytest.approx(right / counted, abs=0.002)
    code, said, err = call("export", best, "--out", "network.pt2", *mine, "--json")
    assert code == 0, err
    assert json.loads(said)["batch_norms"] == "as they are, not SegNet's"
    if name == "mynet:build":
        pytest.importorskip("onnxruntime")
        code, _, err = call("export", best, "--out", "network.onnx", *mine)
        assert code == 0, err


@pytest.mark.slow
def test_two_processes_train_it_in_mixed_precision(module, street, tmp_path):
    import subprocess

    module("own")
    options = ["--data", str(street), "--recipe", "fast", "--size", "32x48", "--epochs", "1", "--batch", "1"]
    options += ["--device", "cpu", "--nproc", "2", "--dtype", "bf16", "--set", "train.accumulate=2", "--run", "run"]
    command = [sys.executable, "-m", "fastseg", "train", *options, "--network", "own:build"]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert "own:build (not SegNet)" in done.stderr
    assert (tmp_path / "run" / "checkpoints" / "last.pt").is_file()


def test_what_torch_cannot_export_is_one_line(module, street, tmp_path, call):
    text = "    return nn.Sequential(nn.Conv2d(3, num_classes, 1), Looks())\n"
    forward = "def forward(self, x):\n        return x if x.detach().sum().item() > 0 else -x\n"
    looks = f"class Looks(nn.Module):\n    {forward}"
    module("looks", f"from torch import nn\n\n\n{looks}\n\ndef build(num_classes, size):\n{text}")
    tiny_run(street, tmp_path, "looks:build")
    code, _, err = call("export", "run/checkpoints/best.pt", "--out", "looks.pt2", "--network", "looks:build")
    (line,) = [line for line in err.splitlines() if line.startswith("fastseg: ")]
    assert code == 1
    assert "export: torch cannot export this network to .pt2 (" in line
    assert not (tmp_path / "looks.pt2").exists()


# One module


def branches_on_a_network(text: str) -> list[int]:
    """Lines that compare a network's name, or ask whether a network is SegNet."""
    found = []
    for node in ast.walk(ast.parse(text)):
        if isinstance(node, ast.Compare):
            sides = [node.left, *node.comparators]
            named = any(isinstance(side, ast.Attribute) and side.attr == "network" for side in sides)
            fixed = any(isinstance(side, ast.Constant) or ast.unparse(side).endswith("SEGNET") for side in sides)
            if named and fixed:
                found.append(node.lineno)
        elif isinstance(node, ast.Match) and ast.unparse(node.subject).endswith(".network"):
            found.append(node.lineno)
        elif isinstance(node, ast.Call) and ast.unparse(node.func) in ("isinstance", "issubclass"):
            found += [node.lineno] * any(kind in ast.unparse(node.args[1]) for kind in ("SegNet", "Adapter"))
    return found


def test_one_module_looks_at_a_networks_name():
    example = 'if model.network == "segnet": pass\nif "segnet" != config.model.network: pass\n'
    example += "x = isinstance(n, (nn.Module, SegNet))\nif model.network in (SEGNET,): pass\n"
    assert branches_on_a_network(example.replace("(SEGNET,)", "SEGNET")) == [1, 2, 3, 4]
    found = {
        path.relative_to(ROOT).as_posix()
        for folder in ("fastseg", "bench", "pipelines", "kernels")
        for path in (ROOT / folder).rglob("*.py")
        if branches_on_a_network(path.read_text("utf-8")) or "SEGNET" in path.read_text("utf-8")
    }
    assert found == {"fastseg/network.py"}
