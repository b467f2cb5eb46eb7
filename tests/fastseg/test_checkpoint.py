"""Checkpoints: whole or not at all, refused by name, and a step after loading that has the bits of one without."""

import copy
import resource

import pytest
import torch
from torch import nn

from fastseg.checkpoint import Writer, begin_with, build_model, first_weights, load_optimizer, read, save
from fastseg.config import Config, Train, override
from fastseg.errors import FastsegError, UsageError
from fastseg.model import SegNet
from fastseg.training.optim import make_optimizer


def channels_last_segnet(seed: int = 0) -> SegNet:
    torch.manual_seed(seed)
    return SegNet(3, depth=1).to(memory_format=torch.channels_last)


def state_of(model: SegNet, **changes) -> dict:
    config = override(Config(), {"model.depth": 1}).as_dict()
    classes = {"classes": ["a", "b", "c"], "colors": [[0, 0, 0], [9, 9, 9], [255, 0, 1]]}
    images = {"trained_on": {"stems": ["x"], "contents": ["ba7816bf8f01cfea"]}}
    return {
        "progress": {"step": 7},
        "model": model.state_dict(),
        "ema": None,
        "config": config,
        **classes,
        **images,
    } | changes


def equal_states(a: dict, b: dict) -> bool:
    return a.keys() == b.keys() and all(torch.equal(a[key], b[key]) for key in a)


def test_what_was_saved_is_read(tmp_path):
    model, path = channels_last_segnet(), tmp_path / "run" / "checkpoints" / "last.pt"
    save(path, state_of(model, best_miou=0.5))
    found = torch.load(path, weights_only=True)
    assert equal_states(found["model"], model.state_dict())
    assert {key: found[key] for key in ("schema", "progress", "ema", "best_miou")} == {
        "schema": 2,
        "progress": {"step": 7},
        "ema": None,
        "best_miou": 0.5,
    }
    # ImageNet's statistics, which torchvision writes as shares of 255.
    assert found["mean"] == pytest.approx([0.485 * 255, 0.456 * 255, 0.406 * 255])
    assert found["std"] == pytest.approx([0.229 * 255, 0.224 * 255, 0.225 * 255])
    again = read(path)
    assert again.keys() == found.keys()
    assert equal_states(again["model"], found["model"])
    assert [p.name for p in path.parent.iterdir()] == ["last.pt"]


@pytest.mark.parametrize("failure", [OSError(28, "No space left on device"), KeyboardInterrupt()])
def test_a_save_that_fails_keeps_the_checkpoint_before_it(tmp_path, monkeypatch, failure):
    path = tmp_path / "last.pt"
    save(path, state_of(channels_last_segnet(), progress={"step": 1}))
    before = path.read_bytes()

    def half(_, file):
        file.write(b"half")
        raise failure

    monkeypatch.setattr(torch, "save", half)
    with pytest.raises(FastsegError if isinstance(failure, OSError) else type(failure)) as error:
        save(path, state_of(channels_last_segnet(), step=2))
    if isinstance(failure, OSError):
        assert str(path) in str(error.value)
        assert "No space left on device" in str(error.value)
        assert "\n" not in str(error.value)
    assert path.read_bytes() == before
    assert list(tmp_path.iterdir()) == [path]


def test_a_full_disk_is_one_line_and_keeps_the_checkpoint_before_it(tmp_path):
    path, state = tmp_path / "last.pt", state_of(channels_last_segnet(), progress={"step": 1})
    save(path, state)
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (2**20, limits[1]))  # what the system refuses as it does a full disk
    try:
        with pytest.raises(FastsegError, match=r"last\.pt could not be written") as error:
            save(path, state | {"step": 2, "model": {"weight": torch.zeros(2**20)}})
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert "\n" not in str(error.value)
    assert read(path)["progress"]["step"] == 1
    assert list(tmp_path.iterdir()) == [path]


def test_what_goes_wrong_in_the_thread_that_writes_is_raised_by_the_one_that_waits(tmp_path, monkeypatch):
    def bug(*_):
        raise ZeroDivisionError("a bug")

    monkeypatch.setattr(torch, "save", bug)
    writer = Writer()
    writer.submit(tmp_path / "last.pt", {"step": 1})
    with pytest.raises(ZeroDivisionError, match="a bug"):
        writer.join()
    writer.join()  # once
    assert list(tmp_path.iterdir()) == []


def test_a_missing_checkpoint_says_where_runs_keep_them(tmp_path):
    with pytest.raises(FastsegError, match=r"best\.pt: no such checkpoint; .*RUN/checkpoints/"):
        read(tmp_path / "best.pt")


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"", "not a file of torch.save, or damaged"),
        (b"junk", "not a file of torch.save, or with objects"),
        (nn.Conv2d(1, 1, 1), "not a file of torch.save, or with objects"),
        ({"features.0.weight": torch.zeros(1)}, "not a checkpoint of fastseg .*use --init FILE"),
        (torch.zeros(3), "not a checkpoint of fastseg"),
        (state_of(SegNet(3, depth=1), colors=[[1, 2, 3]]) | {"schema": 2}, "damaged, .* no color for each class as"),
        ({"schema": 99}, "checkpoint schema 99, this fastseg reads 2"),
        (
            {"schema": 2, "progress": {"step": "7"}},
            "damaged, or not written by fastseg: no progress, model, ema, config, classes, colors, trained_on as",
        ),
    ],
)
def test_a_foreign_file_is_one_line(tmp_path, content, message):
    path = tmp_path / "best.pt"
    path.write_bytes(content) if isinstance(content, bytes) else torch.save(content, path)
    with pytest.raises(FastsegError, match=rf"best\.pt: {message}") as error:
        read(path)
    assert "\n" not in str(error.value)


def test_a_truncated_or_nameless_checkpoint_is_one_line(tmp_path):
    save(tmp_path / "last.pt", state_of(channels_last_segnet()))
    (tmp_path / "half.pt").write_bytes((tmp_path / "last.pt").read_bytes()[:3000])
    for path, message in (
        (tmp_path / "half.pt", r"not a file of torch\.save"),
        (tmp_path, "cannot be read: Is a directory"),
    ):
        with pytest.raises(FastsegError, match=message) as error:
            read(path)
        assert "\n" not in str(error.value)


def step(model: SegNet, optimizer: torch.optim.Optimizer, seed: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    images = torch.randn(2, 3, 16, 16, generator=generator).contiguous(memory_format=torch.channels_last)
    labels = torch.randint(0, 3, (2, 16, 16), generator=generator)
    optimizer.zero_grad()
    nn.functional.cross_entropy(model(images), labels).backward()
    optimizer.step()


@pytest.mark.parametrize("contiguous", [False, True])
def test_training_goes_on_to_the_same_bits(tmp_path, contiguous):
    model = channels_last_segnet()
    optimizer, name, _ = make_optimizer(model, Train(lr=0.1, optimizer="torch"), torch.device("cpu"))
    assert name == "torch fused SGD"
    step(model, optimizer, 0)
    state = copy.deepcopy(optimizer.state_dict())
    if contiguous:  # as a device without channels-last would have left them
        for values in state["state"].values():
            values["momentum_buffer"] = values["momentum_buffer"].contiguous()
    save(tmp_path / "last.pt", state_of(model, optimizer=state))
    step(model, optimizer, 1)

    found, other = read(tmp_path / "last.pt"), channels_last_segnet(seed=1)
    other.load_state_dict(found["model"])
    resumed, _, _ = make_optimizer(other, Train(lr=0.1, optimizer="torch"), torch.device("cpu"))
    load_optimizer(resumed, found["optimizer"])
    for key, parameter in enumerate(other.parameters()):
        buffer = resumed.state[parameter]["momentum_buffer"]
        assert buffer.stride() == parameter.stride()
        assert torch.equal(buffer, state["state"][key]["momentum_buffer"])
    assert any(not p.is_contiguous() for p in other.parameters())
    step(other, resumed, 1)
    assert equal_states(other.state_dict(), model.state_dict())
    for a, b in zip(model.parameters(), other.parameters(), strict=True):
        assert torch.equal(optimizer.state[a]["momentum_buffer"], resumed.state[b]["momentum_buffer"])


def test_an_optimizer_that_has_made_no_step_is_restored_too():
    model = channels_last_segnet()
    fresh, again = (make_optimizer(model, Train(optimizer="torch"), torch.device("cpu"))[0] for _ in range(2))
    load_optimizer(again, fresh.state_dict())
    assert all(not values["momentum_buffer"].any() for values in again.state.values())


@pytest.mark.parametrize("averaged", [False, True])
def test_the_averaged_weights_predict_where_there_are_any(tmp_path, averaged):
    model, average = channels_last_segnet(0), channels_last_segnet(1)
    ema = average.state_dict() if averaged else None
    save(tmp_path / "best.pt", state_of(model, ema=ema))
    wanted = (average if averaged else model).eval()
    for network in (build_model(read(tmp_path / "best.pt")), build_model(state_of(model, ema=ema))):
        assert not network.training
        assert equal_states(network.state_dict(), wanted.state_dict())
        assert network.encoder[0][0].weight.is_contiguous(memory_format=torch.channels_last)
        images = torch.randn(1, 3, 8, 8)
        assert torch.equal(network(images), wanted(images))


# A run that begins with a checkpoint's weights


def begun_with(model: SegNet, state: dict, classes: list[str], **changes) -> str:
    config = override(Config(), {"model.depth": 1, "model.init": "best.pt", **changes})
    return begin_with(model, config, classes, state)


def test_a_run_of_the_same_classes_begins_with_all_weights_the_averaged_ones_where_there_are_any():
    trained, averaged, model = (channels_last_segnet(seed) for seed in (1, 2, 3))
    assert begun_with(model, state_of(trained), ["a", "b", "c"]) == "its weights after 7 steps"
    assert equal_states(model.state_dict(), trained.state_dict())
    begun_with(model, state_of(trained, ema=averaged.state_dict()), ["a", "b", "c"])
    assert equal_states(model.state_dict(), averaged.state_dict())


@pytest.mark.parametrize("classes", [["a", "b", "d"], ["a", "c", "b"], ["a", "b"], ["a", "b", "c", "d"]])
def test_for_other_classes_the_last_layer_is_new_and_said(classes):
    trained = channels_last_segnet(1)
    torch.manual_seed(5)
    model = SegNet(len(classes), depth=1)
    own = {key: value.clone() for key, value in model.state_dict().items()}
    told = begun_with(model, state_of(trained), classes)
    assert told == (
        "its weights after 7 steps; for other classes, the last layer is new (decoder.0.3.weight, decoder.0.3.bias)"
    )
    for key, value in model.state_dict().items():
        assert torch.equal(value, own[key] if key.startswith("decoder.0.3") else trained.state_dict()[key])


@pytest.mark.parametrize(
    ("changes", "told"),
    [
        ({"model.depth": 2}, r"^--init best\.pt: its model\.depth is 1, this run's is 2; add --set model\.depth=1$"),
        ({"model.backbone": "vgg19"}, r"its model\.backbone is vgg16, this run's is vgg19"),
        ({"model.network": "own:build"}, r"its model\.network is segnet, this run's is own:build"),
    ],
)
def test_a_run_of_another_network_says_what_differs(changes, told):
    with pytest.raises(UsageError, match=told):
        begun_with(channels_last_segnet(), state_of(channels_last_segnet()), ["a", "b", "c"], **changes)


def test_what_init_names_is_a_checkpoint_by_what_it_holds(tmp_path):
    model = channels_last_segnet()
    save(tmp_path / "ours.pth", state_of(model))
    torch.save(model.state_dict(), tmp_path / "plain.pt")
    assert equal_states(first_weights(str(tmp_path / "ours.pth"))["model"], model.state_dict())
    assert first_weights(str(tmp_path / "plain.pt")) is None
    assert first_weights("identity") is None
    torch.save({"schema": 1}, tmp_path / "old.pt")
    with pytest.raises(FastsegError, match=r"^--init .*old\.pt: checkpoint schema 1, this fastseg reads 2"):
        first_weights(str(tmp_path / "old.pt"))
