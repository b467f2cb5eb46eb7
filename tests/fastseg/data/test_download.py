import io
import threading
import zipfile
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

import pytest

from fastseg.data.download import FILES, download_camvid
from fastseg.errors import FastsegError, UsageError

IMAGES, LABELS = (f"/{FILES[folder]}" for folder in ("701_StillsRaw_full", "LabeledApproved_full"))


def zipped(compression=zipfile.ZIP_STORED, **members):
    data = io.BytesIO()
    with zipfile.ZipFile(data, "w", compression) as archive:
        for name, content in members.items():
            archive.writestr(name, content)
    return data.getvalue()


# As at Cambridge: one zip with a folder inside, one without.
GOOD = {
    IMAGES: zipped(
        **{"701_StillsRaw_full/": "", "701_StillsRaw_full/a.png": "image a", "701_StillsRaw_full/b.PNG": "b"}
    ),
    LABELS: zipped(**{"a_L.png": "label a", "b_L.png": "label b", "Thumbs.db": "x", "../../evil_L.png": "outside"}),
}


@contextmanager
def serving(pages, longer=(), raw=b""):
    """A server of {path: bytes}; a path in `longer` claims 100 bytes more than it sends, `raw` answers all else."""

    class Handler(BaseHTTPRequestHandler):
        def do_GET(self):
            if raw and self.path not in pages:
                self.wfile.write(raw)
                return
            if self.path not in pages:
                self.send_error(404)
                return
            body = pages[self.path]
            self.send_response(200)
            self.send_header("Content-Length", str(len(body) + 100 * (self.path in longer)))
            self.end_headers()
            self.wfile.write(body)

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


def contents(folder):
    return {str(p.relative_to(folder)): p.read_text() for p in folder.rglob("*") if p.is_file()}


def test_both_zips_are_unpacked_flat_pngs_only_and_nothing_lands_outside(tmp_path, capsys):
    out = tmp_path / "camvid"
    with serving(GOOD) as base:
        download_camvid(out, base)
    assert contents(tmp_path) == {
        "camvid/701_StillsRaw_full/a.png": "image a",
        "camvid/701_StillsRaw_full/b.PNG": "b",
        "camvid/LabeledApproved_full/a_L.png": "label a",
        "camvid/LabeledApproved_full/b_L.png": "label b",
        "camvid/LabeledApproved_full/evil_L.png": "outside",
    }
    assert [path.name for path in tmp_path.iterdir()] == ["camvid"]
    assert "research use" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("change", "longer", "reason"),
    [
        ({IMAGES: b"<html>moved</html>"}, (), "no zip"),
        ({LABELS: b""}, (), "no zip"),
        ({LABELS: GOOD[LABELS][:-30]}, (), "no zip"),
        ({IMAGES: None}, (), "Not Found|404"),
        ({LABELS: None}, (), "Not Found|404"),
        ({}, (IMAGES,), "of [0-9]+ bytes"),
        ({}, (LABELS,), "of [0-9]+ bytes"),
    ],
)
def test_a_bad_answer_is_one_line_with_the_cure_and_leaves_nothing_behind(tmp_path, change, longer, reason):
    pages = {path: body for path, body in {**GOOD, **change}.items() if body is not None}
    with serving(pages, longer) as base, pytest.raises(FastsegError, match=reason) as error:
        download_camvid(tmp_path / "camvid", base)
    text = str(error.value)
    assert "\n" not in text
    assert base in text
    assert "--data synth" in text
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("compression", [zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED], ids=["stored", "deflated"])
def test_a_zip_with_a_broken_member_is_one_line_and_leaves_nothing_behind(tmp_path, compression):
    content = bytes(range(256)) * 4
    body = bytearray(zipped(compression, **{"a.png": content}))
    start = body.index(b"a.png") + len("a.png")
    body[start : start + 8] = b"\xff" * 8  # no pixels with that CRC, and no block that deflate knows
    with serving({**GOOD, IMAGES: bytes(body)}) as base, pytest.raises(FastsegError) as error:
        download_camvid(tmp_path / "camvid", base)
    assert "\n" not in str(error.value)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    "raw",
    [b"SSH-2.0-nothing\r\n", b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n100\r\ncut off"],
    ids=["no-http", "cut-chunk"],
)
def test_an_answer_that_is_no_whole_http_is_one_line_and_leaves_nothing_behind(tmp_path, raw):
    with serving({IMAGES: GOOD[IMAGES]}, raw=raw) as base, pytest.raises(FastsegError) as error:
        download_camvid(tmp_path / "camvid", base)
    assert "\n" not in str(error.value)
    assert list(tmp_path.iterdir()) == []


def test_no_server_is_one_line(tmp_path):
    with serving({}) as base:
        pass
    with pytest.raises(FastsegError, match=f"^CamVid could not be downloaded from {base} "):
        download_camvid(tmp_path / "camvid", base)
    assert list(tmp_path.iterdir()) == []


def test_an_existing_folder_is_refused_and_kept(tmp_path):
    (tmp_path / "mine.txt").write_text("kept")
    with pytest.raises(UsageError, match=f"^{tmp_path} exists: remove it, or train with --data {tmp_path}$"):
        download_camvid(tmp_path, "http://127.0.0.1:9")
    assert contents(tmp_path) == {"mine.txt": "kept"}
