"""The command line as users meet it: one line per mistake, strict JSON, exit codes, nothing heavy for --help."""

import itertools
import json
import re
import shutil
import subprocess
import sys
import zipfile
from pathlib import Path

import numpy as np
import pytest
import torch
from click.testing import CliRunner
from PIL import Image

from fastseg import config as configs
from fastseg.cli import main
from fastseg.data.classes import CAMVID_11

TINY = ["--recipe", "fast", "--size", "32x48", "--epochs", "1", "--batch", "2", "--set", "model.depth=1"]


def strict(text: str) -> dict:
    """The one JSON document on standard output; NaN and infinity are no JSON."""

    def refuse(name: str) -> None:
        raise AssertionError(f"{name} is no JSON")

    (line,) = text.splitlines()
    return json.loads(line, parse_constant=refuse)


@pytest.mark.parametrize(
    "arguments", [["--help"], ["train", "--help"], ["data", "--help"], ["eval", "--help"], ["--version"]]
)
def test_help_comes_without_torch_or_anything_as_heavy(arguments):
    code = (
        "import sys; from fastseg.cli import main\n"
        "try: main(sys.argv[1:])\n"
        "except SystemExit as end: assert end.code == 0\n"
        "heavy = {'torch', 'numpy', 'matplotlib', 'nvidia', 'rich', 'PIL'} & set(sys.modules)\n"
        "assert not heavy, heavy"
    )
    subprocess.run([sys.executable, "-c", code, *arguments], check=True, capture_output=True)


def test_looking_at_data_takes_no_torch(street):
    code = (
        "import sys; from fastseg.cli import main\n"
        "for words in (['data', 'check', sys.argv[1]], ['data', 'stats', sys.argv[1]]):\n"
        "    try: main(words)\n"
        "    except SystemExit as end: assert end.code == 0\n"
        "assert 'torch' not in sys.modules"
    )
    subprocess.run([sys.executable, "-c", code, str(street)], check=True, capture_output=True)


def test_train_eval_and_report_print_what_they_promise(call, street):
    code, out, err = call("train", "--data", street, *TINY, "--run", "r", "--json")
    document = strict(out)
    assert code == 0, err
    assert document.keys() == {"run", "best_miou", "steps", "train_seconds", "img_per_s"}
    assert (document["run"], document["steps"]) == ("r", 4)
    assert document["img_per_s"] == pytest.approx(8 / document["train_seconds"])

    code, out, _ = call("eval", "r/checkpoints/best.pt", "--json")
    scores = strict(out)
    assert code == 0
    assert {"miou", "global_accuracy", "mean_accuracy", "fw_iou", "classes", "confusion", "protocol"} <= scores.keys()
    assert scores["miou"] == document["best_miou"]
    assert scores["protocol"]["labels"] == "at their own resolution"

    on_train = ("eval", "r/checkpoints/best.pt", "--at", "network", "--split", "train", "--allow-overlap", "--json")
    code, out, _ = call(*on_train)
    assert strict(out)["protocol"]["trained_on"] == 8
    assert sum(map(sum, strict(out)["confusion"])) <= 8 * 32 * 48

    code, out, _ = call("eval", "r/checkpoints/best.pt")
    assert "Bicyclist" in out
    assert "the commonest class everywhere" in out
    assert call("report", "r")[1].strip() == "r/report.html"


def test_the_default_run_folder_is_named_after_data_recipe_and_time(call, street, tmp_path):
    code, out, _ = call("train", "--data", street, *TINY)
    (run,) = (tmp_path / "runs").iterdir()
    assert code == 0
    assert run.name.startswith("street-fast-20")
    assert out.split() == ["run", f"runs/{run.name}", "report", f"runs/{run.name}/report.html"]


def test_data_check_names_each_bad_file_and_fails(call, tmp_path):
    assert call("data", "synth", "d", "--train", "3", "--val", "1", "--size", "32x48")[0] == 0
    found = strict(call("data", "check", "d", "--json")[1])
    assert found.keys() == {"pairs", "splits", "errors", "warnings", "notes"}
    assert (found["pairs"], found["splits"], found["errors"]) == (4, {"train": 3, "val": 1}, [])
    bad = sorted((tmp_path / "d" / "train").iterdir())[1]
    bad.write_bytes(bad.read_bytes()[:-200])
    code, out, _ = call("data", "check", "d", "--json")
    assert code == 1
    assert [Path(e["file"]).name for e in strict(out)["errors"]] == [bad.name]
    code, out, _ = call("data", "check", "d")
    assert code == 1
    assert f"error: d/train/{bad.name}: cannot be decoded" in out
    assert "4 pairs (3 train, 1 val), 1 errors, " in out


@pytest.mark.parametrize("layout", ["segnet", "original", "kaggle", "fastai"])
def test_data_check_finds_nothing_wrong_with_scenes_in_jpeg(call, layout):
    counts = ("--train", "3", "--val", "2", "--size", "48x64")
    assert call("data", "synth", "d", "--format", "jpeg", "--layout", layout, *counts) == (0, "d\n", "")
    found = strict(call("data", "check", "d", "--json")[1])
    assert (found["pairs"], found["splits"], found["errors"]) == (5, {"train": 3, "val": 2}, [])
    assert [warning["file"] for warning in found["warnings"]] in ([], ["d"])  # of classes that no scene has, if any


def test_data_stats_prints_weights_whose_median_class_weighs_1(call):
    call("data", "synth", "d", "--train", "12", "--val", "1", "--size", "96x144")
    document = strict(call("data", "stats", "d", "--json")[1])
    assert document["images"] == 12
    assert sum(c["pixels"] for c in document["classes"]) + document["void_pixels"] == 12 * 96 * 144
    weights = [c["weight"] for c in document["classes"] if c["pixels"]]
    assert len(weights) == 11
    assert sorted(weights)[5] == pytest.approx(1)  # of eleven, the sixth is the median
    assert "SignSymbol" in call("data", "stats", "d")[1]


@pytest.mark.parametrize(
    ("arguments", "code", "message"),
    [
        (["train", "--data", "nowhere"], 2, "nowhere: no folder"),
        (["train", "--data", "."], 2, "no layout fits. Looked for original: 701_StillsRaw_full"),
        (["train", "--recipe", "fats"], 2, "--recipe fats: choose one of baseline, fast"),
        (["train", "--size", "360"], 2, "'360' is no size: write HEIGHTxWIDTH, such as 360x480"),
        (["train", "--set", "train.lrr=1"], 2, "unknown key train.lrr; did you mean train.lr?"),
        (["train", "--set", "train.lr"], 2, "--set train.lr: write KEY=VALUE"),
        (["train", "--dtype", "bf61"], 2, "choose one of auto, bf16, fp16, tf32, fp32 (did you mean bf16?)"),
        (["train", "--gpus", "2", "--nproc", "2"], 2, "--gpus and --nproc: give one of them"),
        (["train", "--nproc", "2"], 2, "give --device cpu too"),
        (["train", "--nnodes", "2", "--run", "r"], 2, "several machines need --rdzv-endpoint HOST:PORT, and --run"),
        (["train", "--nnodes", "2", "--rdzv-endpoint", "a:1"], 2, "--nnodes: several machines need"),
        (["train", "--checkpoint-every", "soon"], 2, "soon: write steps, such as 500, or minutes, such as 10m"),
        (["train", "--dry-run", "--find-lr"], 2, "--dry-run and --find-lr: give one of them"),
        (["train", "--nproc", "2", "--device", "cpu", "--find-lr"], 2, "--find-lr: tries rates in one process"),
        (["train", "--amp", "--dtype", "fp32"], 2, "--amp and --dtype fp32: contradict each other; give one of them"),
        (["train", "--no-amp", "--dtype", "bf16"], 2, "--no-amp and --dtype bf16: contradict each other"),
        (["train", "--find-lr", "lr.jpg"], 2, "--find-lr lr.jpg: a name that ends in .svg says what to write"),
        (["eval", "x.pt", "--csv", "x.txt"], 2, "--csv x.txt: a name that ends in .csv says what to write"),
        (["data", "preview", ".", "--out", "x.svg"], 2, "--out x.svg: a name that ends in .png or .jpg or"),
        (["bench", "stream", "--plot", "x.png"], 2, "--plot x.png: a name that ends in .svg says what to write"),
        (["bench", "accuracy", "--cap", "0"], 2, "0.0 is not in the range x>0"),
        (["bench", "accuracy", "--target", "30"], 2, "30: write shares with commas between them"),
        (["train", "--resume"], 2, "--resume needs --run; unfinished runs: none in runs/"),
        (["train", "--resume", "--run", "none"], 2, "none holds no run (no config.toml)"),
        (["eval", "none.pt"], 1, "none.pt: no such checkpoint"),
        (["report", "none"], 2, "none/log.jsonl is missing"),
        (["data", "synth", "x", "--layout", "voc"], 2, "--layout voc: choose one of segnet, original, kaggle, fastai"),
        (["data", "synth", "x", "--format", "webp"], 2, "--format webp: choose one of png, jpeg"),
        (["data", "synth", "x", "--size", "8x8"], 2, "--size 8x8: scenes need 32x32 or more"),
        (["data", "stats", ".", "--weighting", "x"], 2, "--weighting x: choose one of"),
        (["bench", "data", "--format", "jpg"], 2, "--format jpg: choose one of png, jpeg"),
        (["bench", "data", "--format", "jpeg", "--data", "d"], 2, "--format jpeg: is of bench data --data synth"),
        (["bench", "data", "--minutes", "0"], 2, "0.0 is not in the range x>0"),
        (["bench", "model", "--minutes", "2"], 2, "--minutes 2: more than 0, and of bench data or all, not of bench"),
        (["bench", "everything"], 2, "bench everything: choose one of ladder, data, fill, kernels, host, model,"),
        (["--sead"], 2, "No such option '--sead'"),
    ],
)  # fmt: skip
def test_a_mistake_gets_one_line_with_the_cure(call, arguments, code, message):
    got, out, err = call(*arguments)
    assert (got, out) == (code, "")
    assert message in err
    if not err.startswith("Usage:"):  # click's own errors begin with the usage
        assert err.startswith("fastseg: ")
        assert err.count("\n") == 1


def test_gpus_that_are_not_there_are_counted(call, street, monkeypatch):
    monkeypatch.setattr("torch.cuda.is_available", lambda: False)
    code, _, err = call("train", "--data", street, "--gpus", "8", "--amp")
    assert (code, err) == (2, "fastseg: --gpus 8: torch sees 0 usable NVIDIA GPUs here; use --device cpu\n")


def test_resume_lists_unfinished_runs_and_refuses_another_recipe(call, street, tmp_path):
    call("train", "--data", street, *TINY, "--run", "runs/a")
    log = tmp_path / "runs" / "a" / "log.jsonl"
    log.write_text("".join(line for line in log.read_text().splitlines(True) if '"end"' not in line))
    assert "unfinished runs: --run runs/a" in call("train", "--resume")[2]
    code, _, err = call("train", "--resume", "--run", "runs/a", "--lr", "0.5")
    assert code == 2
    assert "train.lr (0.03 to 0.5) cannot change in a run that has begun" in err


def test_a_bad_label_value_stops_training_and_is_named(call, street, tmp_path):
    import shutil

    import numpy as np
    from PIL import Image

    shutil.copytree(street, tmp_path / "bad")
    label = sorted((tmp_path / "bad" / "trainannot").iterdir())[2]
    pixels = np.array(Image.open(label))
    pixels[5, 7:10] = 77
    Image.fromarray(pixels).save(label)
    code, _, err = call("train", "--data", "bad", *TINY)
    assert code == 1
    assert f"{label}: value 77 is not in the class map: 3 pixels, the first at x=7 y=5" in err.splitlines()[-1]
    assert call("train", "--data", "bad", *TINY, "--unknown-colours", "void")[0] == 0


@pytest.mark.parametrize(
    "arguments",
    [
        ["train", "--find-lr", "there.svg"],
        ["eval", "x.pt", "--csv", "there.csv"],
        ["predict", "x.pt", "photo.png", "--out", "out", "--csv", "there.csv"],
        ["data", "preview", ".", "--out", "there.png"],
        ["bench", "scaling", "--plot", "there.svg"],
    ],
)
def test_a_file_that_is_there_stays(call, tmp_path, arguments):
    name = next(word for word in arguments if word.startswith("there"))
    (tmp_path / name).write_text("mine")
    code, _, err = call(*arguments)
    assert (code, f" {name} exists: give another name" in err) == (2, True)
    assert (tmp_path / name).read_text() == "mine"


def test_a_run_is_taken_for_its_best_checkpoint(call, street, tmp_path):
    assert call("train", "--data", street, *TINY, "--run", "r")[0] == 0
    told = "r: a run, of which checkpoints/best.pt is taken\n"
    code, out, err = call("eval", "r", "--json")
    assert (code, err) == (0, told)
    assert strict(out) == strict(call("eval", "r/checkpoints/best.pt", "--json")[1])
    photo = sorted((street / "val").iterdir())[0]
    code, _, err = call("predict", "r", photo, "--out", "labelled")
    assert (code, told in err) == (0, True)
    code, _, err = call("train", "--data", street, *TINY, "--init", "r", "--dry-run")
    assert code == 0, err
    code, _, err = call("eval", "r", "--set", "train.lr=1")
    assert (code, "eval --set train.lr: has no part in an evaluation; data.* and runtime.cache_dir, " in err) == (
        2,
        True,
    )


def test_debug_shows_the_traceback(tmp_path):
    from fastseg.errors import UsageError

    result = CliRunner().invoke(main, ["--debug", "data", "stats", str(tmp_path / "none")])
    assert isinstance(result.exception, UsageError)


def test_prepared_data_is_found_by_training_and_mended_by_verify(call, street, tmp_path):
    arguments = ("data", "prepare", street, "--size", "32x48", "--cache-dir", tmp_path / "cache", "--json")
    code, out, _ = call(*arguments)
    splits = {row["split"]: row for row in json.loads(out)["splits"]}
    assert (code, splits["train"]["pairs"], splits["val"]["pairs"]) == (0, 8, 4)
    assert splits["train"]["bytes"] == 8 * 32 * 48 * 4  # three bytes of colour and one of label
    kept = {path: path.stat().st_mtime_ns for path in (tmp_path / "cache").rglob("images.npy")}
    assert len(kept) == 2
    options = ("--size", "32x48", "--set", "model.depth=1", "--epochs", "1", "--cache-dir", tmp_path / "cache")
    code, _, err = call("train", "--data", street, "--recipe", "fast", *options, "--run", "run")
    assert code == 0, err
    kept_at = "at 32x48, since files have 9 times the pixels"
    assert f"cache: 0 MB in {tmp_path / 'cache'}, {kept_at}, filled by " in err
    # Validation wants labels of the files' own size: a store of its own. Training changed nothing.
    assert {path: path.stat().st_mtime_ns for path in kept} == kept
    images = np.load(splits["val"]["folder"] + "/images.npy", mmap_mode="r+")
    images[2] ^= 1
    images.flush()
    mended = [row["mended"] for row in json.loads(call(*arguments, "--verify")[1])["splits"]]
    assert [len(names) for names in mended] == [0, 1]
    assert "8 pairs, 0 MB" in call(*arguments[:-1])[1]


def test_a_run_of_before_goes_on_and_is_scored_under_its_tiers_new_name(call, street):
    says = "runtime.loader: torchvision is called reference now\n"
    configs._say_renamed.cache_clear()
    code, _, err = call("train", "--data", street, *TINY, "--loader", "torchvision", "--run", "r")
    assert (code, err.count(says)) == (0, 1)
    assert re.search(r"^loader +reference: as asked", err, re.MULTILINE)

    path, last = Path("r/config.toml"), Path("r/checkpoints/last.pt")
    text = path.read_text()
    assert 'loader = "reference"' in text
    path.write_text(text.replace('loader = "reference"', 'loader = "torchvision"'))
    state = torch.load(last, weights_only=True)
    state["config"]["runtime"]["loader"] = "torchvision"
    torch.save(state, last)
    configs._say_renamed.cache_clear()
    code, out, err = call("eval", last, "--json")
    assert (code, err.count(says), strict(out)["protocol"]["loader"]) == (0, 1, "reference")
    configs._say_renamed.cache_clear()
    code, _, err = call("train", "--resume", "--run", "r", "--epochs", 2)
    assert (code, err.count(says)) == (0, 1), err
    assert 'loader = "reference"' in path.read_text()


def test_parity_counts_what_differs_between_tiers(call, street):
    pytest.importorskip("nvidia.dali")
    code, out, _ = call("data", "parity", street, "--size", "48x72", "--json")
    document = json.loads(out)
    assert (code, document["reference"], document["images"]) == (0, "reference", 4)
    rows = [(row["tier"], row["operation"], row["labels_off"]) for row in document["rows"]]
    assert rows == [(tier, stage, 0) for tier in ("dali", "cache") for stage in ("decode", "resize", "augment")]
    assert all(row["image_difference"] <= 1.001 for row in document["rows"])
    assert [row["labels"] for row in document["rows"][:3]] == [4 * 96 * 144, 4 * 48 * 72, 4 * 48 * 72]
    assert "0 of 13,824 differ" in call("data", "parity", street, "--size", "48x72")[1]


@pytest.fixture
def jpegs(street, tmp_path) -> Path:
    """The drawn street with JPEG images, and labels as they were."""
    folder = tmp_path / "jpegs"
    shutil.copytree(street / "valannot", folder / "valannot")
    (folder / "val").mkdir()
    for image in sorted((street / "val").iterdir()):
        Image.open(image).save(folder / "val" / f"{image.stem}.jpg", quality=90)
    classes = "".join(f'{{ name = "{name}", index = {index} }},\n' for index, name in enumerate(CAMVID_11))
    lines = '[splits]\nval = { images = "val", labels = "valannot" }\n'
    (folder / "dataset.toml").write_text(f"void = [11]\nclasses = [\n{classes}]\n{lines}")
    return folder


def test_parity_reads_jpegs_whole_and_in_windows(call, jpegs):
    """On a CPU all tiers have the bits of libjpeg-turbo, which Pillow has too."""
    pytest.importorskip("nvidia.dali")
    words = ("data", "parity", jpegs, "--size", "96x144", "--crop", "40x50", "--device", "cpu")
    code, out, err = call(*words, "--json")
    assert code == 0, err
    rows = json.loads(out)["rows"]
    sizes = {"decode": 4 * 96 * 144, "resize": 4 * 96 * 144, "augment": 4 * 40 * 50}
    assert [(row["tier"], row["operation"]) for row in rows] == list(itertools.product(("dali", "cache"), sizes))
    for row in rows:
        assert (row["values"], row["labels"]) == (3 * sizes[row["operation"]], sizes[row["operation"]])
        assert (row["values_off"], row["values_off_by_more"], row["labels_off"]) == (0, 0, 0)
    _, head, *lines = call(*words)[1].splitlines()
    assert head.split("  ")[-1].strip() == "label pixels"
    assert "values off by more than 1" in head
    assert lines[2].split() == ["dali", "augment", "0.000", "0", "0", "24,000", "0", "of", "8,000", "differ"]


def test_parity_knows_windows_of_the_files_own_pixels_and_letterboxed_images(call, jpegs):
    pytest.importorskip("nvidia.dali")
    words = ("data", "parity", jpegs, "--size", "60x50", "--fit", "letterbox", "--exif", "apply", "--device", "cpu")
    # Resized to 33x50 of 60x50, with black around it. Windows may be resized, too.
    for scale, augmented in (("0", 60 * 50), ("1", 60 * 50), ("0.7", 60 * 50)):
        code, out, err = call(*words, "--scale", scale, "--json")
        assert code == 0, err
        rows = json.loads(out)["rows"]
        sizes = {"decode": 4 * 96 * 144, "resize": 4 * 33 * 50, "augment": 4 * augmented}
        assert [(row["tier"], row["operation"]) for row in rows] == list(itertools.product(("dali", "cache"), sizes))
        assert [row["labels"] for row in rows] == [*sizes.values()] * 2
        assert all((row["values_off_by_more"], row["labels_off"]) == (0, 0) for row in rows)


def test_parity_knows_jittered_scales_and_colours(call, street):
    pytest.importorskip("nvidia.dali")
    words = ("data", "parity", street, "--size", "96x144", "--device", "cpu", "--json")
    rows = [json.loads(call(*words, *jitter)[1])["rows"] for jitter in ((), ("--colour-jitter", "0.5"))]
    # Of the files' own size nothing is resized: the same bytes are recoloured alike, and nowhere are they the same.
    assert [row["image_difference"] < 1e-3 for row in rows[1]] == [True] * 6
    found = json.loads(call(*words, "--scale-jitter", "2")[1])["rows"]
    assert [row["labels_off"] for row in found] == [0] * 6
    assert all(row["image_difference"] < 1.001 for row in found)
    code, _, err = call(*words, "--scale-jitter", "0.5")
    assert (code, err.splitlines()[-1]) == (2, "fastseg: data: augment.scale = 0.5: 1 or more")
    code, _, err = call(*words, "--colour-jitter", "1.5")
    assert (code, err.splitlines()[-1]) == (2, "fastseg: data: augment.colour = 1.5: 1 or less")


def test_preview_shows_jittered_scales_and_colours(call, street):
    """The same samples: enlarged or with black around them, and in other colours at the same places."""
    words = ("data", "preview", street, "--size", "96x144", "--images", "4")
    jitters = {"plain": (), "scales": ("--scale-jitter", "3"), "colours": ("--colour-jitter", "1")}
    for name, jitter in jitters.items():
        assert call(*words, *jitter, "--out", f"{name}.png")[0] == 0
    plain, scales, colours = (np.asarray(Image.open(f"{name}.png")).astype(int) for name in jitters)
    assert plain.shape == scales.shape == colours.shape
    assert (scales != plain).mean() > 0.5
    assert (colours != plain).mean() > 0.5
    counted = (plain[96:] != plain[:96]).any(2)  # where a label is laid over the photo, as it is below it
    assert counted.mean() > 0.5
    laid_over = [(sheet[96:] - sheet[:96] // 2)[counted] for sheet in (plain, colours)]
    np.testing.assert_array_equal(*laid_over)


def test_preview_shows_windows_and_letterboxed_images(call, street):
    words = ("data", "preview", street, "--size", "60x50", "--images", "4")
    assert call(*words, "--scale", "1", "--out", "windows.png")[0] == 0
    assert call(*words, "--fit", "letterbox", "--out", "boxed.png")[0] == 0
    windows, boxed = (np.asarray(Image.open(f"{name}.png"))[:60, :50] for name in ("windows", "boxed"))
    assert windows.any(2).all(1).all()  # not moved, nothing is black
    # 33 rows of 60, moved by up to 2: below and above all is black.
    assert [boxed[rows].any() for rows in (slice(0, 11), slice(20, 40), slice(49, 60))] == [False, True, False]
    code, _, err = call(*words, "--scale", "1", "--crop", "20x20")
    assert code == 2
    assert "augment.crop: train.scale = 1 cuts windows out of the files already" in err


def test_preview_shows_samples_and_their_labels(call, street):
    code, out, _ = call("data", "preview", street, "--size", "48x72", "--images", "6", "--seed", "3")
    assert (code, out) == (0, "preview.png: the first 6 samples of a run with seed 3\n")
    with Image.open("preview.png") as sheet:
        assert sheet.size == (4 * 72, 2 * 2 * 48)  # four across, each a photo above its labels
        pixels = np.asarray(sheet)
    assert pixels[:48].any()
    assert not pixels[96:, 2 * 72 :].any()  # six of eight places


def test_download_takes_a_mirror(call, tmp_path):
    for name, member in (("701_StillsRaw_full", "a.png"), ("LabeledApproved_full", "a_L.png")):
        with zipfile.ZipFile(tmp_path / f"{name}.zip", "w") as archive:
            archive.writestr(member, member)
    code, out, _ = call("data", "download", "--out", tmp_path / "camvid", "--source", tmp_path)
    assert (code, out) == (0, f"{tmp_path / 'camvid'}\n")
    assert (tmp_path / "camvid" / "LabeledApproved_full" / "a_L.png").read_text() == "a_L.png"


def test_a_folder_of_runs_that_cannot_be_is_one_line(call, street, tmp_path):
    (tmp_path / "runs").symlink_to("gone")
    code, _, err = call("train", "--data", street, *TINY)
    assert (code, err) == (1, "fastseg: runs: File exists; something else has this name: move it away\n")


def test_the_home_folder_is_known_in_every_path(call, street, tmp_path, monkeypatch):
    monkeypatch.setenv("HOME", str(tmp_path))
    (tmp_path / "my.toml").write_text("[train]\nepochs = 1\nbatch = 2\n[model]\ndepth = 1\n")
    assert call("train", "--data", street, "--recipe=~/my.toml", "--size", "32x48", "--run=~/run")[0] == 0
    assert call("predict", "~/run/checkpoints/best.pt", str(next((street / "val").iterdir())), "--out=~/out")[0] == 0
    assert len(list((tmp_path / "out" / "index").iterdir())) == 1
    (tmp_path / "photos").mkdir()
    shutil.copy(next((street / "val").iterdir()), tmp_path / "photos")
    assert call("predict", "run/checkpoints/best.pt", "~/photos", "--out=~/more")[0] == 0
    code, out, _ = call("data", "prepare", street, "--cache-dir=~/kept", "--size", "32x48")
    assert code == 0
    assert f", {tmp_path}/kept/" in out
    assert "zips: no folder" in call("data", "download", "--source=~/zips", "--out", "x")[2]
    assert f"--source {tmp_path}/zips" in call("data", "download", "--source=~/zips", "--out", "x")[2]


def test_a_folder_instead_of_a_checkpoint_is_told_as_it_is(call, tmp_path):
    (tmp_path / "run").mkdir()
    told = "fastseg: run: a folder that holds no run (no config.toml); give a run's, or a checkpoint\n"
    assert call("eval", "run")[::2] == (2, told)
