"""The run report: right at any moment of a run, safe with any text, whole or not there.

The numbers that the page must show are worked out by hand beside each log.
"""

import base64
import html
import json
import os
import re
import subprocess
import sys
import time
from html.parser import HTMLParser
from pathlib import Path

import pytest
from PIL import Image

from fastseg import report
from fastseg.errors import FastsegError, UsageError

DASH = "\N{EN DASH}"
CONFIG = '[data]\nsize = "360x480"\nname = "<i>&"\n'
START = {
    "event": "start", "time": "2026-01-02T03:04:05+00:00", "step": 0, "data": "synth",
    "split": {"scheme": "own", "train": 16, "val": 4},
    "total_steps": 40, "epochs": 10, "batch": 4, "world": 1, "device": "cpu", "dtype": "bf16", "loader": "cache",
    "optimizer": "sgd",
    "choices": {"loader": {"value": "cache", "why": "11 MB: it fits"}, "dtype": {"value": "bf16", "why": ""}},
    "classes": [
        {"name": "<b>&", "color": [128, 64, 0], "weight": 0.5, "pixels": 7654321},
        {"name": "Pole", "color": [1, 2, 3], "weight": None, "pixels": 0},
    ],
}  # fmt: skip


def train(step: int, **values: object) -> dict:
    line = {"step": step, "epoch": step / 4, "loss": 2.0, "lr": 0.01, "img_per_s": 50.0, "img_per_s_per_device": 50.0}
    return {
        "event": "train",
        **line,
        "data_wait": 0.02,
        "memory_mib": 900,
        "loss_scale": None,
        "seconds": step,
    } | values


def val(step: int, miou: float | None, accuracy: float | None = 0.75) -> dict:
    classes = [
        {"name": "<b>&", "iou": miou, "accuracy": 0.625, "precision": 0.75, "dice": 0.6, "pixels": 1234567},
        {"name": "Pole", "iou": None, "accuracy": None, "precision": None, "dice": None, "pixels": 0},
    ]
    scores = {"miou": miou, "global_accuracy": accuracy, "mean_accuracy": 0.625, "fw_iou": miou, "best": True}
    return {
        "event": "val",
        "step": step,
        "epoch": step / 4,
        **scores,
        "absent": ["Pole"],
        "classes": classes,
        "seconds": 1,
    }


def end(step: int) -> dict:
    times = {"time": "2026-01-02T04:04:05+00:00", "train_seconds": 3725.4, "img_per_s": 51.26}
    return {"event": "end", "step": step, **times, "best_miou": 0.5}


@pytest.fixture
def run(tmp_path: Path) -> Path:
    folder = tmp_path / "my-run"
    folder.mkdir()
    (folder / "config.toml").write_text(CONFIG)
    (folder / "environment.json").write_text(json.dumps({"gpu": "<none>", "driver": None}))
    return folder


def page(run: Path, *events: dict, rest: str = "") -> str:
    """The report of a run whose log holds `events` and then the half line `rest`."""
    (run / "log.jsonl").write_text("".join(json.dumps(event) + "\n" for event in events) + rest)
    return report.write(run).read_text(encoding="utf-8")


def words(text: str) -> str:
    """The page as a reader sees it: without style, tags and line breaks."""
    text = re.sub(r"<style>.*?</style>|<svg.*?</svg>|<title>.*?</title>", " ", text, flags=re.DOTALL)
    return " ".join(html.unescape(re.sub(r"<[^>]*>", " ", text)).split())


def row(text: str, name: str) -> list[str]:
    """The cells of the table row that starts with `name` (escaped)."""
    found = re.search(rf"<tr><th scope=\"row\">(?:<span[^>]*></span>)?{name}.*?</tr>", text, flags=re.DOTALL)
    assert found, name
    return [words(cell) for cell in re.findall(r"<td.*?</td>", found[0], flags=re.DOTALL)]


def test_read_log_leaves_out_half_lines(run: Path) -> None:
    half = '{"event": "train", "st'
    (run / "log.jsonl").write_text(f'{json.dumps(START)}\n{half}\n{{"event": "val", "miou": null}}\n{half}')
    assert report.read_log(run) == [START, {"event": "val", "miou": None}]


def test_read_log_takes_a_cut_multibyte_character(run: Path) -> None:
    (run / "log.jsonl").write_bytes(json.dumps(START).encode() + b'\n{"event": "tr\xc3')
    assert report.read_log(run) == [START]


@pytest.mark.parametrize("events", [(), (START,)], ids=["empty log", "start only"])
def test_just_started(run: Path, events: tuple[dict, ...]) -> None:
    text = words(page(run, *events))
    assert f"Running at step 0 of {40 if events else DASH}" in text
    assert f"Best mIoU {DASH} no score yet" in text
    assert text.count("Nothing logged yet.") == 3


def test_running(run: Path) -> None:
    speeds = [train(10, img_per_s=10.0), train(12, img_per_s=30.0), train(14, img_per_s=20.0)]
    text = page(run, START, *speeds, val(12, 0.25), rest='{"event": "train", "step": 39')
    seen = words(text)
    assert "Running at step 14 of 40" in seen
    assert "<title>my-run: Running at step 14 of 40</title>" in text
    assert "Training time 14 s" in seen
    assert "Throughput 20.0 img/s median" in seen  # the middle one of 10, 20, 30
    assert text.count("<svg") == 3
    for fact in ("Data synth", "360x480", "Device cpu", "Precision bf16", "16 train, 4 val", "900 MiB"):
        assert fact in seen


def test_finished(run: Path) -> None:
    seen = words(page(run, START, train(40), val(40, 0.5), end(40)))
    assert "Finished at step 40" in seen
    assert "Training time 1 h 02 min" in seen  # 3725.4 s = 62 min 5.4 s
    assert "Throughput 51.3 img/s whole training" in seen
    assert "Started 2026-01-02 03:04:05+00:00, ended 2026-01-02 04:04:05+00:00" in seen


def test_stopped_early(run: Path) -> None:
    assert "Stopped at step 20 of 40" in words(page(run, START, train(20), end(20)))


def test_stopped_by_a_signal(run: Path) -> None:
    stopped = {"event": "stopped", "step": 22, "time": "2026-01-02T04:00:00+00:00", "signal": "SIGUSR1"}
    seen = words(page(run, START, train(20), stopped))
    assert "Stopped at step 22 of 40" in seen
    assert "SIGUSR1 ended it, all is saved" in seen
    resumed = START | {"step": 22, "time": "2026-01-03T00:00:00+00:00"}
    assert "Running at step 24 of 40" in words(page(run, START, train(20), stopped, resumed, train(24)))


def test_a_killed_run_is_not_called_running(run: Path) -> None:
    page(run, START, train(20))
    long_ago = time.time() - 3600
    os.utime(run / "log.jsonl", (long_ago, long_ago))
    seen = words(report.write(run).read_text(encoding="utf-8"))
    assert "Stopped at step 20 of 40" in seen
    assert "probably killed" in seen


def test_best_epoch_is_the_first_of_the_highest_miou(run: Path) -> None:
    log = [val(8, 0.25), val(16, 0.5), val(24, None), val(32, 0.5), val(40, 0.375, accuracy=0.8125)]
    text = page(run, START, *log)
    seen = words(text)
    assert "Best mIoU 50.0 % at epoch 4 " in seen  # step 16 of 4 steps an epoch
    assert "Global accuracy 81.2 % last validation, epoch 10" in seen
    assert "Best validation: epoch 4, step 16." in seen
    assert row(text, "&lt;b&gt;&amp;")[1] == "50.0 %"


def test_resumed_run_says_so(run: Path) -> None:
    resumed = START | {"step": 16, "time": "2026-01-03T00:00:00+00:00", "device": "cuda"}
    seen = words(page(run, START, train(16), val(16, 0.25), resumed, train(20)))
    assert "Running at step 20 of 40" in seen
    assert "resumed 1 time, last 2026-01-03 00:00:00+00:00 from step 16" in seen
    assert "Best mIoU 25.0 % at epoch 4 " in seen
    assert "Device cuda" in seen


def test_unknown_scores_are_dashes(run: Path) -> None:
    nothing = train(4, loss=None, img_per_s=None, data_wait=None, memory_mib=None)
    text = page(run, START, nothing, val(4, None, accuracy=None))
    assert "nan" not in words(text).lower()
    assert "None" not in words(text)
    assert row(text, "Pole") == [DASH] * 5 + ["0", "0"]
    assert row(text, "Mean over classes") == ["", DASH, "62.5 %", "", "", "", ""]
    assert "Pole (absent)" in words(text)
    assert f"Best mIoU {DASH} no score yet" in words(text)


def test_class_table(run: Path) -> None:
    text = page(run, START, val(4, 0.4375))
    scores = ["43.8 %", "62.5 %", "75.0 %", "60.0 %"]
    assert row(text, "&lt;b&gt;&amp;") == ["0.500", *scores, "7 654 321", "1 234 567"]
    assert "background: rgb(128, 64, 0)" in text
    assert "width: 43.8%" in text


def test_text_from_data_is_escaped(run: Path) -> None:
    strips(run, ('"><u>', "worst", 0.1))
    text = page(run, START | {"data": "<s>"}, val(4, 0.5))
    for tag in ("<b>", "<i>&", "<none>", "<s>", "<u>"):
        assert tag not in text
    assert "&lt;b&gt;&amp;" in text


def test_configuration_is_verbatim(run: Path) -> None:
    found = re.search(r"<pre>(.*?)</pre>", page(run, START), flags=re.DOTALL)
    assert found
    assert html.unescape(found[1]).strip() == CONFIG.strip()


def test_choices_come_with_their_reasons(run: Path) -> None:
    text = page(run, START)
    assert row(text, "loader") == ["cache", "11 MB: it fits"]
    assert row(text, "dtype") == ["bf16", DASH]


def strips(run: Path, *items: tuple[str, str, float]) -> list[Path]:
    """Pictures of validation images (stem, kind, mIoU), as training writes them."""
    (run / "overlays").mkdir()
    rows, paths = [], []
    for place, (stem, kind, miou) in enumerate(items):
        path = run / "overlays" / f"{place}-{kind}-{stem}.png"
        Image.new("RGB", (6, 2), (place, 0, 0)).save(path)
        rows.append({"file": path.name, "image": stem, "kind": kind, "miou": miou})
        paths.append(path)
    (run / "overlays" / "index.json").write_text(json.dumps(rows))
    return paths


def test_pictures_are_embedded_with_what_they_are_and_a_legend(run: Path) -> None:
    paths = strips(run, ("a", "worst", 0.125), ("b", "best", 0.75), ("c", "other", 0.5))
    Image.new("RGB", (6, 2)).save(run / "overlays" / "9-best-left-over.png")
    Image.new("RGB", (9, 9)).save(run / "samples.png")
    text = page(run, START)
    images = re.findall(r'<img src="data:image/png;base64,([^"]*)" alt="([^"]*)">', text)
    assert [base64.b64decode(data) for data, _ in images] == [p.read_bytes() for p in (*paths, run / "samples.png")]
    assert [alt for _, alt in images[:2]] == [
        f"Validation image {stem}: photo, label, prediction and where they disagree, side by side" for stem in "ab"
    ]
    for said in ("Among the worst: a, mIoU 12.5 %.", "Among the best: b, mIoU 75.0 %.", "Another: c, mIoU 50.0 %."):
        assert said in words(text)
    assert "<b>& Pole void wrong" in words(text)


def test_the_confusion_matrix_has_the_share_of_each_row(run: Path) -> None:
    text = page(run, START, val(4, 0.5) | {"confusion": [[30, 10], [0, 0]]})
    cells = re.findall(r'<td class="n" style="--share: ([^"]*)">([^<]*)</td>', text)
    assert cells == [("0.75", "75"), ("0.25", "25"), ("0.00", DASH), ("0.00", DASH)]


def test_the_time_of_a_step_adds_up(run: Path) -> None:
    timed = {"event": "ranges", "step": 20, "steps": 10, "total": 5.0, "seconds": {"forward": 1.0, "backward": 3.0}}
    text = page(run, START, train(20), timed)
    assert row(text, "forward") == ["100.0", "20.0 %"]
    assert row(text, "backward") == ["300.0", "60.0 %"]
    assert row(text, "other") == ["100.0", "20.0 %"]
    assert "Not timed yet" in page(run, START)


def two(run: Path, scheme: str | None = None) -> list[Path]:
    """The run, and another one with another learning rate, and perhaps another split."""
    page(run, START, train(4, seconds=60.0), val(4, 0.25), train(8, seconds=120.0), val(8, 0.5), end(8))
    other = run.with_name("other-run")
    other.mkdir()
    (other / "config.toml").write_text(f"{CONFIG}[train]\nlr = 0.5\n")
    start = START | {"split": START["split"] | ({"scheme": scheme} if scheme else {})}
    page(other, start, train(4, seconds=30.0), val(4, 0.75))
    return [run, other]


def test_runs_side_by_side(run: Path, tmp_path: Path) -> None:
    path = report.compare(two(run), tmp_path / "compare.html")
    text = path.read_text(encoding="utf-8")
    assert row(text, "my-run")[:3] == ["50.0 %", "2", "1 h 02 min"]
    assert row(text, "other-run")[:3] == ["75.0 %", "1", "30 s"]
    assert row(text, "&lt;b&gt;&amp;") == ["50.0 %", "75.0 %"]
    assert row(text, "train.lr") == [DASH, "0.5"]
    assert "Not the same protocol" not in text
    assert "data.size" not in text  # the same in both
    assert report._over_time(report._read(run)[0]) == ([1.0, 2.0], [25.0, 50.0])


def test_runs_of_one_name_are_told_apart_by_their_paths(run: Path, tmp_path: Path) -> None:
    first, _ = two(run)
    again = tmp_path / "elsewhere" / first.name
    again.mkdir(parents=True)
    for name in ("config.toml", "log.jsonl"):
        (again / name).write_bytes((first / name).read_bytes())
    text = report.compare([first, again], tmp_path / "compare.html").read_text(encoding="utf-8")
    assert f"1: {first}" in words(text)
    assert f"2: {again}" in words(text)


def test_runs_of_other_protocols_are_told_apart(run: Path, tmp_path: Path) -> None:
    path = report.compare(two(run, scheme="video"), tmp_path / "compare.html")
    said = "Not the same protocol: these scores say nothing about one another. split: own, video."
    assert said in words(path.read_text(encoding="utf-8"))


class _Tags(HTMLParser):
    """Collects every tag's attributes and checks that tags close in the order in which they opened."""

    VOID = frozenset({"meta", "img"})

    def __init__(self) -> None:
        super().__init__()
        self.open: list[str] = []
        self.tags: list[tuple[str, dict[str, str | None]]] = []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, dict(attrs)))
        if tag not in self.VOID:
            self.open.append(tag)

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, dict(attrs)))

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag


def test_page_is_whole_and_refers_to_nothing_outside(run: Path) -> None:
    strips(run, ("stem", "worst", 0.1))
    text = page(run, START, *(train(step) for step in range(1, 40)), val(8, 0.25), val(40, 0.5), end(40))
    parser = _Tags()
    parser.feed(text)
    assert parser.open == []
    assert not {tag for tag, _ in parser.tags} & {"script", "link", "iframe", "object"}
    references = [attrs[key] or "" for _, attrs in parser.tags for key in ("src", "href", "xlink:href") if key in attrs]
    assert references
    assert all(reference.startswith(("#", "data:image/png;base64,")) for reference in references)
    ids = [attrs["id"] for _, attrs in parser.tags if "id" in attrs]
    assert len(ids) == len(set(ids))
    assert {reference[1:] for reference in references if reference[0] == "#"} <= set(ids)
    assert set(re.findall(r"url\(#([^)]*)\)", text)) <= set(ids)
    assert "@import" not in text
    assert not re.search(r"url\((?!#)", text)
    assert not re.search(r"https?://", text)
    assert all(tag != "th" or "scope" in attrs for tag, attrs in parser.tags)
    headings = [int(tag[1]) for tag, _ in parser.tags if re.fullmatch(r"h[1-6]", tag)]
    assert headings[0] == 1
    assert set(headings[1:]) == {2}


def test_long_logs_stay_small(run: Path) -> None:
    # A value that jumps from line to line, so that matplotlib cannot drop points itself.
    noisy = (train(step, loss=step % 7, img_per_s=step % 11, data_wait=step % 5 / 5) for step in range(1, 5000))
    text = page(run, START, *noisy)
    assert len(text) < 150_000
    assert "mean of up to 21 log lines" in text  # 4999 lines over 240 points


def test_written_whole_or_not_at_all(run: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    before = page(run, START)
    assert sorted(path.name for path in run.iterdir()) == [
        "config.toml", "environment.json", "log.jsonl", "report.html",
    ]  # fmt: skip

    def no_replace(*_: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("os.replace", no_replace)
    said = r"report\.html could not be written \(No space left on device\); the run is kept: .* fastseg report "
    with pytest.raises(FastsegError, match=said):
        page(run, START, end(40))
    assert (run / "report.html").read_text(encoding="utf-8") == before
    assert not list(run.glob(".report*"))


@pytest.mark.parametrize("missing", ["config.toml", "log.jsonl"])
def test_not_a_run_folder(run: Path, missing: str) -> None:
    page(run, START)
    (run / missing).unlink()
    with pytest.raises(UsageError) as caught:
        report.write(run)
    assert str(run / missing) in str(caught.value)
    assert "fastseg train" in str(caught.value)
    assert "\n" not in str(caught.value)


def test_broken_configuration_is_one_line(run: Path) -> None:
    (run / "config.toml").write_text("size = [1,\n")
    with pytest.raises(UsageError, match=r"config\.toml is not valid TOML") as caught:
        page(run, START)
    assert "\n" not in str(caught.value)


def test_needs_no_torch_and_no_pyplot(run: Path) -> None:
    page(run, START)
    code = (
        "import sys; from pathlib import Path; from fastseg import report; report.write(Path(sys.argv[1]));"
        "assert 'torch' not in sys.modules; assert 'matplotlib.pyplot' not in sys.modules"
    )
    subprocess.run([sys.executable, "-c", code, run], check=True)
