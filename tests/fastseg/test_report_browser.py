"""The report of a real run in Chromium: narrow and wide, light and dark, with nothing to complain about."""

import html
import json
import re
import shutil
import subprocess
from pathlib import Path

import pytest

from fastseg import report
from fastseg.config import load_recipe, override
from fastseg.runs import read_log
from fastseg.training import train

CHROMIUM = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")
pytestmark = [pytest.mark.slow, pytest.mark.skipif(CHROMIUM is None, reason="no Chromium on the path")]

# Chromium makes no window narrower than 500 pixels; a frame may be.
FRAME = """<!DOCTYPE html><style>body {{ margin: 0 }} iframe {{ border: 0 }}</style>
<iframe width="{width}" height="900" srcdoc="{page}"></iframe>
<script>
onload = () => {{
  const inside = document.querySelector("iframe").contentDocument;
  const root = inside.documentElement;
  document.title = JSON.stringify({{
    scroll: root.scrollWidth, width: root.clientWidth, text: inside.body.innerText,
    background: getComputedStyle(inside.body).backgroundColor,
    curves: [...inside.querySelectorAll("figure.curve svg")].map(svg => svg.getBoundingClientRect().width),
    pictures: [...inside.images].map(image => image.naturalWidth),
  }});
}};
</script>"""


@pytest.fixture(scope="module")
def run(street, tmp_path_factory) -> Path:
    changes = {"data.path": str(street), "data.size": "32x48", "model.depth": 1, "train.batch": 2, "train.epochs": 3}
    folder = tmp_path_factory.mktemp("browser") / "a-run"
    train(override(load_recipe("fast"), changes | {"runtime.device": "cpu", "runtime.log_every": 2}), folder)
    return folder


def browse(page: Path, folder: Path, width: int, *, dark: bool) -> tuple[dict, str]:
    """What a page's frame of that width looks like, and what the browser said of it; no name can be resolved."""
    frame = folder / f"frame-{width}-{dark}.html"
    frame.write_text(FRAME.format(width=width, page=html.escape(page.read_text(encoding="utf-8"))), encoding="utf-8")
    options = [
        "--headless",
        "--no-sandbox",
        "--disable-gpu",
        "--enable-logging=stderr",
        f"--user-data-dir={folder}/home",
    ]
    options += [f"--window-size={max(width, 500)},900", "--host-resolver-rules=MAP * ~NOTFOUND"]
    options += [f"--blink-settings=preferredColorScheme={0 if dark else 1}", "--dump-dom"]
    done = subprocess.run(
        [str(CHROMIUM), *options, frame.as_uri()], capture_output=True, text=True, check=True, timeout=120
    )
    title = re.search(r"<title>(.*?)</title>", done.stdout, flags=re.DOTALL)
    assert title, done.stdout[:2000]
    return json.loads(html.unescape(title[1])), "\n".join(x for x in done.stderr.splitlines() if "CONSOLE" in x)


@pytest.mark.parametrize("dark", [False, True])
@pytest.mark.parametrize("width", [390, 1400])
def test_the_page_fits_and_shows_what_the_log_says(run, tmp_path, width, dark):
    seen, console = browse(run / "report.html", tmp_path, width, dark=dark)
    assert console == ""
    assert seen["scroll"] <= seen["width"] <= width  # no horizontal scrolling, beside a vertical scroll bar
    assert seen["background"] == ("rgb(20, 24, 28)" if dark else "rgb(255, 255, 255)")
    assert len(seen["curves"]) == 3
    assert all(0 < curve <= width for curve in seen["curves"])
    assert len(seen["pictures"]) == 5  # four validation images, and the training samples
    assert all(seen["pictures"])
    events = read_log(run)
    best = max((e for e in events if e["event"] == "val"), key=lambda e: e["miou"])
    words = " ".join(seen["text"].split())
    assert f"Best mIoU {100 * best['miou']:.1f} %" in words
    for row in best["classes"]:
        if row["pixels"] and row["iou"] is not None:
            assert f"{100 * row['iou']:.1f} %" in words
    (ranges,) = [e for e in events if e["event"] == "ranges"]
    assert f"backward {1e3 * ranges['seconds']['backward'] / ranges['steps']:.1f}" in words
    assert (run / "report.html").stat().st_size < 3e6


def test_runs_side_by_side_fit_too(run, tmp_path):
    page = report.compare([run, run], tmp_path / "compare.html")
    for width in (390, 1400):
        seen, console = browse(page, tmp_path, width, dark=False)
        assert console == ""
        assert seen["scroll"] <= seen["width"] <= width
