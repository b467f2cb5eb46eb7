"""kill -9 at random moments: the next run succeeds, and ends with the same bits as one that nobody disturbed.

`FASTSEG_MOMENTS=50 pytest -s tests/faults/test_kills.py` kills each work fifty times, of a longer training run.
"""

import contextlib
import io
import os
import random
import subprocess
import sys
import threading
import time
import zipfile
from collections.abc import Callable, Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import numpy as np
import pytest
import torch

from fastseg import runs
from fastseg.checkpoint import read
from fastseg.data.download import FILES
from fastseg.data.synth import write

pytestmark = pytest.mark.slow

MOMENTS = int(os.environ.get("FASTSEG_MOMENTS", "1"))
LONG = MOMENTS > 1
ENVIRONMENT = os.environ | {"OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""}


def fastseg(words: list[object]) -> subprocess.Popen:
    command = [sys.executable, "-m", "fastseg", *map(str, words)]
    return subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True, env=ENVIRONMENT)


def succeed(words: list[object]) -> None:
    process = fastseg(words)
    _, err = process.communicate()
    assert process.returncode == 0, err


def begun(process: subprocess.Popen, sign: Callable[[], bool]) -> float:
    """When the first sign of work was seen."""
    while not sign():
        assert process.poll() is None, process.communicate()[1]
        time.sleep(0.001)
    return time.monotonic()


def kill_at_moments(
    name: str,
    root: Path,
    words: Callable[[Path], list[object]],
    again: Callable[[Path], list[object]],
    found: Callable[[Path], str],
    compare: Callable[[Path, Path], None],
    sign: Callable[[Path], bool] = lambda folder: True,
) -> None:
    """Kill a command MOMENTS times, each in a folder of its own, then run `again`, and compare with an undisturbed one.

    Moments are spread evenly at random over the time from `sign` to the end of the undisturbed run.

    Args:
        words: the command for a folder. again: the one after the kill. found: what was there between the two.
        compare: asserts that two folders hold the same.
        sign: what there is to see of the work; before it, Python does nothing but start.
    """
    whole = root / "undisturbed"
    process = fastseg(words(whole))
    start = begun(process, lambda: sign(whole))
    _, err = process.communicate()
    assert process.returncode == 0, err
    duration = time.monotonic() - start
    draw, killed = random.Random(name), 0
    for number in range(MOMENTS):
        folder, moment = root / f"killed-{number}", draw.uniform(0, 0.9 * duration)
        process = fastseg(words(folder))
        start = begun(process, lambda folder=folder: sign(folder))
        with contextlib.suppress(subprocess.TimeoutExpired):
            process.wait(max(0, start + moment - time.monotonic()))
        ended = process.poll() is not None
        process.kill()
        process.communicate()
        killed += not ended
        what = "it had ended" if ended else found(folder)
        succeed(again(folder))
        compare(folder, whole)
        print(f"{name} {number}: killed after {moment:.2f} of {duration:.2f} s: {what}: ok")
    assert killed
    print(f"{name}: {killed} kills at {MOMENTS} moments, all went on to the same bits")


TRAIN = {"data.size": "32x48", "model.depth": 2, "train.batch": 2, "train.ema": 0.9, "train.validate_every": 4}
TRAIN |= {"train.epochs": 60 if LONG else 10, "runtime.log_every": 2, "runtime.threads": 1, "runtime.device": "cpu"}


def test_training_goes_on_after_a_kill(street, tmp_path):
    sets = [part for key, value in TRAIN.items() for part in ("--set", f"{key}={value}")]

    def words(run: Path) -> list[object]:
        return ["train", "--data", street, "--recipe", "fast", *sets, "--checkpoint-every", 3, "--run", run]

    def again(run: Path) -> list[object]:
        return ["train", "--resume", "--run", run] if (run / "config.toml").is_file() else words(run)

    def found(run: Path) -> str:
        steps = [event["step"] for event in runs.read_log(run)]
        last = runs.last_checkpoint(run)
        saved = f"a checkpoint of step {read(last)['progress']['step']}" if last.is_file() else "no checkpoint"
        half = "".join(f", half of {path.name[1:].rsplit('.', 2)[0]}" for path in run.rglob(runs.PARTIAL))
        return f"step {max(steps)}, {saved}{half}" if steps else f"no log{half}"

    kill_at_moments("training", tmp_path, words, again, found, same_run)


def same_run(killed: Path, whole: Path) -> None:
    """Weights, momentum, averages, best weights, losses and scores have the same bits; nothing is left unfinished."""
    for name in ("last.pt", "best.pt"):
        old, new = (tensors(read(run / "checkpoints" / name)) for run in (whole, killed))
        assert old.keys() == new.keys()
        assert all(torch.equal(old[key], new[key]) for key in old)
    for kind, value in (("train", "loss"), ("val", "miou")):
        logs = [[(e["step"], e[value]) for e in runs.read_log(run) if e["event"] == kind] for run in (whole, killed)]
        assert logs[0] == logs[1]
        assert logs[0]
    files = [{str(p.relative_to(run)) for p in run.rglob("*") if "tfevents" not in p.name} for run in (whole, killed)]
    assert files[0] == files[1]


def tensors(tree: object, name: str = "") -> dict[str, torch.Tensor]:
    """The tensors of a checkpoint by where they are in it."""
    if isinstance(tree, torch.Tensor):
        return {name: tree}
    parts = tree.items() if isinstance(tree, dict) else enumerate(tree) if isinstance(tree, list) else ()
    return {key: found for part, value in parts for key, found in tensors(value, f"{name}/{part}").items()}


def test_preparing_data_goes_on_after_a_kill(tmp_path):
    data = tmp_path / "street"
    write(data, counts={"train": 240, "val": 80} if LONG else {"train": 36, "val": 12}, size=(96, 144))

    def words(folder: Path) -> list[object]:
        return ["data", "prepare", data, "--cache-dir", folder, "--size", "360x480"]

    def found(folder: Path) -> str:
        checks = [np.load(path) for path in folder.glob("*/checks.npy")]
        kept = ", ".join(f"{np.count_nonzero(check)} of {len(check)} samples" for check in checks)
        return kept + "".join(f", half of {path.name}" for path in folder.rglob(".*.partial-*"))

    kill_at_moments("preparing", tmp_path, words, words, found, same_stores, lambda folder: folder.is_dir())


def same_stores(killed: Path, whole: Path) -> None:
    """Every store's files have the same bytes; what a kill left beside them is no store, and goes after an hour."""
    files = [
        {p.relative_to(f): p.read_bytes() for p in f.rglob("*") if p.is_file() and ".partial" not in str(p)}
        for f in (whole, killed)
    ]
    assert len(files[0]) == 8
    assert files[0] == files[1]


def zipped(names: str, draw: random.Random) -> bytes:
    """A zip of twenty files, 6 kB each, of random bytes."""
    data = io.BytesIO()
    with zipfile.ZipFile(data, "w") as archive:
        for number in range(20):
            archive.writestr(names.format(number), draw.randbytes(6000))
    return data.getvalue()


@contextlib.contextmanager
def slow_server(pages: dict[str, bytes], seconds: float) -> Iterator[str]:
    """A server of {path: bytes}, which takes so many seconds for each, and goes on in the middle where asked to."""

    class Handler(BaseHTTPRequestHandler):
        def do_GET(self):
            body, wanted = pages[self.path], self.headers.get("Range")
            first = int(wanted.removeprefix("bytes=").removesuffix("-")) if wanted else 0
            self.send_response(206 if wanted else 200)
            if wanted:
                self.send_header("Content-Range", f"bytes {first}-{len(body) - 1}/{len(body)}")
            self.send_header("ETag", '"one"')
            self.send_header("Content-Length", str(len(body) - first))
            self.end_headers()
            piece = len(body) // 50
            with contextlib.suppress(ConnectionError):  # the client was killed
                for begin in range(first, len(body), piece):
                    self.wfile.write(body[begin : begin + piece])
                    time.sleep(seconds / 50)

        def log_message(self, *_):
            pass

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.02})
    thread.start()
    try:
        yield f"http://127.0.0.1:{server.server_port}"
    finally:
        server.shutdown()
        thread.join()
        server.server_close()


def test_a_download_goes_on_after_a_kill(tmp_path):
    draw = random.Random(0)
    pages = {
        f"/{path}": zipped(names, draw)
        for path, names in zip(FILES.values(), ("701_StillsRaw_full/{}.png", "{}_L.png"), strict=True)
    }

    def found(folder: Path) -> str:
        partial = folder / ".camvid.partial"
        parts = [f"{path.name} of {path.stat().st_size} bytes" for path in sorted(partial.glob("*.part"))]
        return ", ".join([*parts, *(path.name for path in partial.glob("*_full"))]) or "nothing of it"

    with slow_server(pages, 1.0) as base:

        def words(folder: Path) -> list[object]:
            return ["data", "download", "--source", base, "--out", folder / "camvid"]

        kill_at_moments("download", tmp_path, words, words, found, same_files, lambda folder: folder.is_dir())


def same_files(killed: Path, whole: Path) -> None:
    """The same forty files, and nothing beside them."""
    files = [{p.relative_to(f): p.read_bytes() for p in f.rglob("*") if p.is_file()} for f in (whole, killed)]
    assert len(files[0]) == 40
    assert files[0] == files[1]
    assert [path.name for path in killed.iterdir()] == ["camvid"]
