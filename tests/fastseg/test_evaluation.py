"""Evaluation: what is counted, at which resolution, and that neither padding nor sharing changes it."""

import dataclasses
import json
import shutil

import numpy as np
import pytest
import torch
from click.testing import CliRunner
from PIL import Image
from torch import nn

from fastseg.cli import main
from fastseg.config import load_recipe, override
from fastseg.distributed import World
from fastseg.errors import FastsegError
from fastseg.evaluation import BATCH, Mirrored, evaluate, score
from fastseg.specs import make_spec, open_data
from fastseg.tiles import tiling_of


class RedOrNot(nn.Module):
    """Class 0 where red is above ImageNet's mean of 123.675, class 1 elsewhere."""

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        red = images[:, :1]
        return torch.cat([red, -red, *[torch.full_like(red, -9)] * 9], dim=1)


def world(rank: int = 0, size: int = 1) -> World:
    """A world without a process group: `sum` is called with size 1 only."""
    return World(rank, size, torch.device("cpu"))


@pytest.fixture
def reds(png, tmp_path):
    """make(reds, labels, size): a data set whose images have these red values, as val; returns its spec."""

    def make(images: list, labels: list, size: str):
        for i, (red, label) in enumerate(zip(images, labels, strict=True)):
            pixels = np.zeros((*np.shape(red), 3))
            pixels[..., 0] = red
            for split in ("train", "val"):
                png(f"d/{split}/s{i:03d}.png", pixels)
                png(f"d/{split}annot/s{i:03d}.png", label)
        config = override(load_recipe("fast"), {"data.path": str(tmp_path / "d"), "data.size": size})
        dataset, splits = open_data(config)
        return make_spec(config, dataset, splits, "val", device=torch.device("cpu"), dtype=torch.float32, threads=2)

    return make


def test_scores_of_what_surrounds_letterboxed_images_count_nowhere(reds):
    """Of 8x4 pixels in an input of 4x4 two columns on each side are black; nothing is smeared in from there."""
    wide, tall = np.full((4, 8), 201), np.full((8, 4), 201)
    wide[:, 4:] = tall[4:] = 83
    labels = [np.where(red == 201, 0, 1) for red in (wide, tall)]
    spec = dataclasses.replace(reds([wide, tall], labels, "4x4"), fit="letterbox")
    found = score(RedOrNot(), spec, world(), keep=2)
    assert found.scores.confusion.sum() == 64
    for (_, prediction), label in zip(found.kept, labels, strict=True):
        # Halved with the triangle filter only the pixels beside the border are mixed, and bilinear scores find it.
        np.testing.assert_array_equal(prediction, label)
    at_network = score(RedOrNot(), spec, world(), at="network")
    assert at_network.scores.confusion.sum() == 2 * 4 * 2


@pytest.mark.parametrize(
    ("high", "low", "row", "confusion"),
    [
        # Halved with the triangle filter (7/8 and 1/8), reds are 208 and 115: 84 above the mean and 9 below. Enlarged
        # with half-pixel centres the third pixel is 84 / 4 - 3 * 9 / 4 > 0; nearest would give it the fourth's class.
        (223, 100, [0, 0, 0, 1], [[8, 0], [4, 4]]),
        # 186 and 98: 62 above and 26 below. The third pixel is 62 / 4 - 3 * 26 / 4 < 0; with aligned corners it would
        # be 62 / 3 - 2 * 26 / 3 > 0.
        (201, 83, [0, 0, 1, 1], [[4, 4], [4, 4]]),
    ],
)
def test_scores_are_enlarged_bilinearly_to_the_labels_size_before_the_highest_wins(reds, high, low, row, confusion):
    spec = reds([[[high, high, low, low]] * 4], [[[0, 1, 0, 1]] * 4], "2x2")
    found = score(RedOrNot(), spec, world(), keep=6)
    scores, ((index, prediction),) = found.scores, found.kept
    assert (index, prediction.tolist()) == (0, [row] * 4)
    assert scores.confusion[:2, :2].tolist() == confusion
    assert scores.confusion.sum() == 16


def test_labels_at_the_networks_size_are_resized_instead(reds):
    spec = reds([[[250, 250, 0, 0]] * 4], [[[0, 1, 11, 1]] * 4], "2x2")
    # The nearest rule takes pixel floor((2 * o + 1) * 4 / 4) = 1 and 3 of four.
    scores = score(RedOrNot(), spec, world(), at="network").scores
    assert scores.confusion[:2, :2].tolist() == [[0, 0], [2, 2]]


@pytest.mark.parametrize("count", [1, BATCH - 1, BATCH, BATCH + 1])
def test_padding_of_the_last_batch_is_not_counted(reds, count):
    spec = reds([[[200, 0]] * 2] * count, [[[0, 1]] * 2] * count, "2x2")
    found = score(RedOrNot(), spec, world(), keep=3)
    assert found.confusions.sum((1, 2)).tolist() == [4] * count
    assert found.scores.miou == 1
    assert [index for index, _ in found.kept] == list(range(min(3, count)))


def test_processes_share_a_split_without_overlap(reds):
    images = [[[200, 0]] * 2, [[0, 200]] * 2, [[200, 200]] * 2, [[0, 0]] * 2, [[200, 0]] * 2]
    spec = reds(images, [[[0, 1]] * 2] * 5, "2x2")
    whole = score(RedOrNot(), spec, world(), boundaries=True)
    parts = []
    for rank in range(7):  # more processes than images: some have none

        class Alone(World):
            def sum(self, tensor):
                return tensor

        parts.append(score(RedOrNot(), spec, Alone(rank, 7, torch.device("cpu")), boundaries=True))
    assert np.array_equal(sum(part.confusions for part in parts), whole.confusions)
    assert [int(part.confusions.sum()) for part in parts] == [4] * 5 + [0, 0]
    # The first image is right; the second has its contour, and the classes on the wrong sides of it.
    np.testing.assert_array_equal(sum(part.boundaries for part in parts), whole.boundaries)
    assert whole.boundaries[:, :2].tolist()[:2] == [[1, 1], [0, 0]]
    assert np.isnan(whole.boundaries[:, 2:]).all()


def test_the_network_is_left_in_the_mode_it_came_in(reds):
    spec = reds([[[200, 0]] * 2], [[[0, 1]] * 2], "2x2")
    for training in (True, False):
        network = RedOrNot().train(training)
        score(network, spec, world())
        assert network.training is training


def test_other_classes_than_the_networks_are_refused(tmp_path, png, street):
    from fastseg.training import train

    config = override(load_recipe("fast"), {"data.path": str(street), "data.size": "32x48", "model.depth": 1})
    train(override(config, {"train.epochs": 1}), tmp_path / "run")
    png("other/image/a.png", np.zeros((4, 4, 3)))
    png("other/label/a.png", np.zeros((4, 4)))
    splits = "".join(f'[splits.{s}]\nimages = "image"\nlabels = "label"\n' for s in ("train", "val"))
    (tmp_path / "other" / "dataset.toml").write_text(splits + '[[classes]]\nname = "cat"\nindex = 0\n')
    with pytest.raises(FastsegError, match=r"its classes \(cat\) are not those of .* \(Sky, Building"):
        evaluate(tmp_path / "run" / "checkpoints" / "last.pt", data=str(tmp_path / "other"))


@pytest.fixture(scope="module")
def two(street, tmp_path_factory):
    """Checkpoints of a run after its first and its last epoch."""
    from fastseg.training import train

    changes = {"data.path": str(street), "data.size": "32x48", "model.depth": 1, "train.epochs": 4}
    changes |= {"train.keep_every": 1, "train.ema": 0.0, "runtime.dtype": "fp32", "runtime.device": "cpu"}
    run = tmp_path_factory.mktemp("two") / "run"
    train(override(load_recipe("fast"), changes), run)
    return [run / "checkpoints" / f"epoch-000{n}.pt" for n in (1, 4)]


def invoke(*words: object) -> tuple[int, str, str]:
    result = CliRunner().invoke(main, ["eval", *map(str, words)])
    assert not isinstance(result.exception, Exception), result.exception
    return result.exit_code, result.stdout, result.stderr


def test_the_document_says_what_each_image_is_worth_and_how_sure_the_mean_is(two):
    document = evaluate(two[1])
    low, high = document["miou_interval"]
    assert low <= document["miou"] <= high
    assert len(document["images"]) == 4
    assert sum(map(sum, document["confusion"])) == sum(row["pixels"] for row in document["classes"])
    contours = [image["boundary_f1"] for image in document["images"]]
    assert document["boundary_f1"] == pytest.approx(np.mean(contours))
    assert all(0 <= image["miou"] <= 1 for image in document["images"])


def test_two_checkpoints_are_compared_image_by_image(two, tmp_path):
    code, out, err = invoke(two[0], "--against", two[1], "--json", "--csv", tmp_path / "both.csv")
    assert code == 0, err
    document = json.loads(out)
    a, b = evaluate(two[0]), evaluate(two[1])
    assert (document["a"], document["b"]) == (a, b)
    found = document["comparison"]
    assert found["difference"]["value"] == pytest.approx(b["miou"] - a["miou"])
    assert found["difference"]["low"] <= found["difference"]["value"] <= found["difference"]["high"]
    pairs = [(x["miou"], y["miou"]) for x, y in zip(a["images"], b["images"], strict=True)]
    assert found["better"] == sum(y > x for x, y in pairs)
    assert document["classes"][0]["difference"] == pytest.approx(b["classes"][0]["iou"] - a["classes"][0]["iou"])
    lines = (tmp_path / "both.csv").read_text().splitlines()
    assert lines[0] == "image,miou_a,global_accuracy_a,boundary_f1_a,miou_b,global_accuracy_b,boundary_f1_b"
    assert [float(line.split(",")[4]) for line in lines[1:]] == [y for _, y in pairs]
    code, out, _ = invoke(two[0], "--against", two[1])
    assert "95 % interval" in out
    assert invoke(two[0], "--csv", tmp_path / "one.csv")[0] == 0
    assert (tmp_path / "one.csv").read_text().splitlines()[0] == "image,miou,global_accuracy,boundary_f1"


class LeftOfRed(nn.Module):
    """Class 1 in the left half of red images, whatever is in them: its mirror image is labelled on the other side."""

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        scores = torch.zeros(len(images), 2, *images.shape[-2:])
        scores[:, 1, :, : images.shape[-1] // 2] = 2.0
        return scores


def test_mirrored_scores_are_the_mean_of_probabilities(two):
    found = Mirrored(LeftOfRed())(torch.zeros(1, 3, 2, 4))
    # Each column is in one left half of the two: (softmax(0, 2) + softmax(0, 0)) / 2.
    one = (np.exp(2) / (1 + np.exp(2)) + 0.5) / 2
    assert found[0, 1].flatten().tolist() == pytest.approx([one] * 8)
    assert found.sum(1).flatten().tolist() == pytest.approx([1.0] * 8)
    document = evaluate(two[1], tta="mirror")
    assert document["protocol"]["tta"] == "mirror"
    assert document["confusion"] != evaluate(two[1])["confusion"]
    assert invoke(two[1], "--tta", "scales")[0] == 2


def test_other_protocols_are_not_compared_unless_asked(two, tmp_path):
    state = torch.load(two[1], weights_only=True)
    state["config"]["data"]["split_scheme"] = "video"
    torch.save(state, tmp_path / "other.pt")
    code, _, err = invoke(two[0], "--against", tmp_path / "other.pt", "--allow-overlap")
    assert code == 2
    assert "not the same protocol" in err
    assert "split_scheme: own and video" in err
    assert (
        "trained_on: 0 and 4)" in err
    )  # two sequences of two images, of those that were trained on, are a fifth of 12
    assert invoke(two[0], "--mixed-protocols")[0] == 2


@pytest.mark.parametrize("against", [False, True])
def test_images_that_the_network_was_trained_on_are_refused_by_content_or_name_unless_admitted(
    two, street, tmp_path, against
):
    other = tmp_path / "other"
    shutil.copytree(street, other)
    for old, new in (("train", "test"), ("trainannot", "testannot")):
        (other / old).rename(other / new)
        (other / old).mkdir()  # empty
    (other / "train.txt").unlink()
    # Of eight images that were trained on two get another name, one is stored anew, and five become others.
    images = sorted((other / "test").iterdir())
    for number, path in enumerate(images):
        if number >= 3:
            Image.fromarray(np.full((96, 144, 3), number, np.uint8)).save(path)
        if number == 2:
            Image.open(path).save(path, compress_level=1)
        else:
            (other / "testannot" / path.name).rename(other / "testannot" / f"new{number}.png")
            path.rename(path.with_name(f"new{number}.png"))
    words = [two[0], *(["--against", two[1]] if against else []), "--data", other, "--split", "test"]
    code, out, err = invoke(*words, "--json")
    assert (code, out) == (2, "")
    assert f"--split test: {two[0]} was trained on 3 of these 8 images, by name or content (" in err
    code, out, err = invoke(*words, "--json", "--allow-overlap")
    assert code == 0, err
    document = json.loads(out)
    assert (document["a"] if against else document)["protocol"]["trained_on"] == 3


def test_tiles_of_the_networks_size_score_as_whole_images_do(two, street):
    """The images are 96x144: one tile of that is the whole image, which the network then sees at its own size."""
    whole = evaluate(two[1], changes={"data.size": "96x144"})
    tiled = evaluate(two[1], tile="96x144")
    told = {"input": "96x144", "tiles": "96x144 of images at their own size, overlapping by 24x36"}
    assert {name: tiled["protocol"][name] for name in told} == told
    assert (whole["protocol"]["input"], whole["protocol"]["tiles"]) == ("96x144", "none")
    assert {**tiled, "protocol": 0} == {**whole, "protocol": 0}
    found = evaluate(two[1], tile="40x56", tile_overlap=8)
    assert found["confusion"] != whole["confusion"]
    assert sum(map(sum, found["confusion"])) == sum(map(sum, whole["confusion"]))


def test_tiles_are_scored_at_the_labels_own_size_strip_by_strip(reds):
    # Red or not is seen in each pixel alone: whatever the tiles, and the images' sizes, nothing is wrong.
    rng = np.random.default_rng(0)
    images = [rng.choice([0, 250], size) for size in ((9, 13), (4, 6), (17, 5), (1, 1))]
    spec = reds(images, [(image == 0).astype(int) for image in images], "2x2")
    found = score(RedOrNot(), spec, world(), tiling=tiling_of("4x6", 1), boundaries=True, keep=2)
    assert found.scores.miou == 1
    assert found.confusions.sum((1, 2)).tolist() == [9 * 13, 4 * 6, 17 * 5, 1]
    assert [(index, mask.tolist()) for index, mask in found.kept] == [
        (index, (images[index] == 0).astype(int).tolist()) for index in (0, 1)
    ]


def test_tiles_from_the_command_line(two):
    code, out, err = invoke(two[1], "--tile", "40x56", "--overlap", 8, "--json")
    assert (code, json.loads(out)) == (0, evaluate(two[1], tile="40x56", tile_overlap=8)), err
    for words, message in (
        (["--tile", "40x56", "--at", "network"], "--at network: tiles are of images at their own size"),
        (["--tile", "40x56", "--loader", "cache"], "--loader cache: keeps resized images"),
        (["--overlap", "8"], "--overlap 8: is of tiles; give --tile HEIGHTxWIDTH too"),
    ):
        code, _, err = invoke(two[1], *words)
        assert (code, message in err) == (2, True), err
