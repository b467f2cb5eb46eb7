"""The log's views: what a terminal and TensorBoard show of an event."""

import json

import pytest
from PIL import Image
from rich.cells import cell_len
from rich.console import Console

from fastseg.config import Config
from fastseg.runlog import RunLog, class_table, duration, percent

TRAIN = {
    "epoch": 1.5, "loss": 0.25, "lr": 0.01, "img_per_s": 40.0, "img_per_s_per_device": 20.0, "data_wait": 0.031,
    "decoded_per_s": 0.0,
    "memory_mib": 900.0, "loss_scale": None, "void_steps": 0, "skipped_steps": 0, "seconds": 9.0,
}  # fmt: skip


@pytest.mark.parametrize(("seconds", "text"), [(0, "0:00"), (59.6, "1:00"), (125, "2:05"), (3725, "1:02:05")])
def test_duration(seconds, text):
    assert duration(seconds) == text


@pytest.mark.parametrize(("value", "text"), [(None, "-"), (0.0, "0.0 %"), (0.12345, "12.3 %"), (1.0, "100.0 %")])
def test_percent(value, text):
    assert percent(value) == text


def test_a_log_line_has_every_figure(tmp_path, capsys):
    log = RunLog(tmp_path, 0, active=True)
    log.train(15, total=100, epochs=10, left=125, **TRAIN)
    log.train(16, total=100, epochs=10, left=125, **TRAIN | {"loss": None, "loss_scale": 1024.0, "decoded_per_s": 12.5})
    log.close()
    first, second = capsys.readouterr().err.splitlines()
    assert first == (
        "epoch 1.50/10  step 15/100  loss 0.2500  lr 1.00e-02  40.0 img/s (20.0 per device)  data wait 3.1 %  "
        "900 MiB  2:05 left"
    )
    assert "loss -" in second
    assert "decoding 12.5 img/s" in second
    assert "loss scale 1024" in second


def test_tensorboard_holds_the_figures_and_forgets_the_steps_that_are_made_again(tmp_path):
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    for start, loss in ((0, 1.0), (1, 2.0)):  # the second begins after step 1: steps 2 and 3 are made again
        log = RunLog(tmp_path, start, active=True)
        for step in range(start + 1, 4):
            log.train(step, total=3, epochs=1, left=0, **TRAIN | {"loss": loss})
        log.close()
    board = EventAccumulator(str(tmp_path))
    board.Reload()
    assert [(e.step, e.value) for e in board.Scalars("train/loss")] == [(1, 1.0), (2, 2.0), (3, 2.0)]


def test_tensorboard_holds_pictures_and_hyper_parameters(tmp_path):
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
    from tensorboard.plugins.hparams.plugin_data_pb2 import HParamsPluginData

    (tmp_path / "config.toml").write_text(Config().dumps())
    (tmp_path / "overlays").mkdir()
    Image.new("RGB", (6, 2)).save(tmp_path / "overlays" / "0-worst-any.png")
    log = RunLog(tmp_path, 0, active=True)
    scores = {"miou": 0.5, "global_accuracy": 0.5, "mean_accuracy": 0.5, "fw_iou": 0.5, "absent": [], "classes": []}
    log.val(1, epochs=1, epoch=1, best=True, seconds=1.0, **scores)
    log.hyper_parameters(0.5)
    log.board.close()
    board = EventAccumulator(str(tmp_path))
    board.Reload()
    assert [(e.step, e.width, e.height) for e in board.Images("val/0-worst")] == [(1, 6, 2)]
    content = board.SummaryMetadata("_hparams_/session_start_info").plugin_data.content
    values = HParamsPluginData.FromString(content).session_start_info.hparams
    assert values["train.lr"].number_value == Config().train.lr
    assert values["data.size"].string_value == "360x480"


def test_all_but_the_main_process_are_silent(tmp_path, capsys):
    log = RunLog(tmp_path, 0, active=False)
    log.start(0, {"run": "r"}, total_steps=1)
    log.train(1, total=1, epochs=1, left=0, **TRAIN)
    log.end(1)
    assert capsys.readouterr() == ("", "")
    assert list(tmp_path.iterdir()) == []


def test_the_class_table_compares_with_the_commonest_class_and_names_the_absent():
    rows = [("a", 0.5, 0.6, 0.7, 0.65, 75), ("b", 0.0, 0.0, 0.0, 0.0, 25), ("c", None, None, None, None, 0)]
    columns = ("name", "iou", "accuracy", "precision", "dice", "pixels")
    scores = {
        "miou": 0.25, "mean_accuracy": 0.3, "global_accuracy": 0.45, "fw_iou": 0.375, "absent": ["c"],
        "classes": [dict(zip(columns, row, strict=True)) for row in rows],
    }  # fmt: skip
    console = Console(width=100, record=True, file=open("/dev/null", "w"))  # noqa: SIM115
    console.print(class_table(scores, "title"))
    text = console.export_text()
    assert "the commonest class everywhere gives mIoU 37.5 %" in text  # IoU 75 / 100 for it, 0 for the other
    assert "left out of means: c" in text
    assert "25.0 %" in text


@pytest.mark.parametrize("name", ["Sky", "lane [solid] " + "x" * 60, "\N{CJK UNIFIED IDEOGRAPH-9053}" * 30])
def test_names_give_way_on_a_narrow_terminal_and_figures_do_not(name):
    keys = ("iou", "accuracy", "precision", "dice", "boundary_f1")
    row = {key: 0.1 + place / 1000 for place, key in enumerate(keys)} | {"name": name, "pixels": 123456789}
    means = {"miou": 0.201, "mean_accuracy": 0.202, "boundary_f1": 0.203, "global_accuracy": 0.3, "fw_iou": 0.4}
    scores = means | {"absent": [], "classes": [row, row | {"name": "b", "iou": None, "pixels": 7}]}
    for width in (20, 40, 60, 71, 80, 81, 100, 130):
        console = Console(width=width, soft_wrap=True, record=True, file=open("/dev/null", "w"))  # noqa: SIM115
        console.print(class_table(scores, "best.pt on val"))
        table = console.export_text().partition("global accuracy")[0]
        for figure in (
            "10.0 %",
            "10.1 %",
            "10.2 %",
            "10.3 %",
            "10.4 %",
            "123,456,789",
            "20.1 %",
            "20.3 %",
            "123,456,796",
        ):
            assert figure in table, width
        lines = [line for line in table.splitlines() if line.strip() != name]  # which stands alone where it must
        assert max(map(cell_len, lines)) <= width


@pytest.mark.parametrize("columns", [20, 60, 200])
def test_counts_of_classes_fit_a_narrow_terminal(call, street, monkeypatch, columns):
    monkeypatch.setenv("COLUMNS", str(columns))
    code, out, _ = call("data", "stats", street)
    assert code == 0
    lines = out.splitlines()[1:]
    assert max(map(cell_len, lines)) <= columns
    classes = json.loads(call("data", "stats", street, "--json")[1])["classes"]
    for row in classes:
        assert row["name"][:8] in out
        for figure in (f"{row['pixels']:,}", f"{row['image_pixels']:,}", f"{row['frequency']:.5f}"):
            assert any(figure in line for line in lines)
