"""Faults of downloads: one line, and nothing of them in the folder."""

import io
import stat
import threading
import zipfile
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

import pytest

from fastseg.data import download
from fastseg.data.download import FILES

STILLS, APPROVED = FILES


def zipped(members: dict[str, bytes], compression=zipfile.ZIP_DEFLATED) -> bytes:
    data = io.BytesIO()
    with zipfile.ZipFile(data, "w", compression) as archive:
        for name, content in members.items():
            archive.writestr(name, content)
    return data.getvalue()


def linked() -> bytes:
    data, info = io.BytesIO(), zipfile.ZipInfo("a.png")
    info.external_attr = (stat.S_IFLNK | 0o777) << 16
    with zipfile.ZipFile(data, "w") as archive:
        archive.writestr(info, "/etc/passwd")
    return data.getvalue()


def bomb() -> bytes:
    """320 members of 32 MiB each: 10 GiB in 320 times 32 KiB, as each one's bytes are the same."""
    data = io.BytesIO()
    with zipfile.ZipFile(data, "w", zipfile.ZIP_DEFLATED) as archive:
        archive.writestr("0.png", bytes(download.MAX_MEMBER))
        first = archive.infolist()[0]
        for number in range(1, 320):
            again = zipfile.ZipInfo(f"{number}.png")
            for field in ("CRC", "compress_size", "file_size", "header_offset", "compress_type"):
                setattr(again, field, getattr(first, field))
            archive.filelist.append(again)
            archive.NameToInfo[again.filename] = again
    return data.getvalue()


@pytest.mark.parametrize(
    ("fault", "archive", "problem"),
    [
        ("zip cut in half", zipped({"a.png": bytes(range(256)) * 40})[:-60], "is no zip file, or not all of one"),
        ("HTML page saved as .zip", b"<!DOCTYPE html><title>log in</title>", "is no zip file, or not all of one"),
        ("zip with a member `../a.png`", zipped({"../a.png": b"x"}), "is refused: its member '../a.png' points out"),
        ("zip with a member `/tmp/a.png`", zipped({"/tmp/a.png": b"x"}), "is refused: its member '/tmp/a.png' points"),
        ("zip with a link", linked(), "is refused: its member 'a.png' is a link or a device"),
        ("zip of 10 GiB in 40 kB", bomb(), "is refused: it unpacks to 10737418240 bytes, more than 4294967296"),
    ],
)
def test_bad_archives(call, tmp_path, row, fault, archive, problem):
    assert len(archive) < 100_000
    (tmp_path / "zips").mkdir()
    (tmp_path / "zips" / f"{STILLS}.zip").write_bytes(archive)
    (tmp_path / "zips" / f"{APPROVED}.zip").write_bytes(zipped({"a_L.png": b"y"}))
    before = sorted(tmp_path.rglob("*"))
    code, out, err = call("data", "download", "--source", "zips", "--out", "camvid")
    says = err.splitlines()[-1].removeprefix("fastseg: ")
    assert (code, out) == (1, "")
    assert f"zips/{STILLS}.zip {problem}" in says
    assert sorted(tmp_path.rglob("*")) == before
    row(fault, says, "fetch the archive again; nothing of it was unpacked")


def test_a_download_that_is_cut_and_gone_on_with(call, tmp_path, monkeypatch, row):
    monkeypatch.setattr(download, "BACKOFFS", ())
    pages = {f"/{FILES[STILLS]}": zipped({"a.png": b"image" * 9}), f"/{FILES[APPROVED]}": zipped({"a_L.png": b"label"})}
    asked: list[str | None] = []

    class Handler(BaseHTTPRequestHandler):
        def do_GET(self):
            body, wanted = pages[self.path], self.headers.get("Range")
            asked.append(wanted)
            first = int(wanted.removeprefix("bytes=").removesuffix("-")) if wanted else 0
            self.send_response(206 if wanted else 200)
            self.send_header("ETag", '"one"')
            self.send_header("Content-Length", str(len(body) - first))
            if wanted:
                self.send_header("Content-Range", f"bytes {first}-{len(body) - 1}/{len(body)}")
            self.end_headers()
            self.wfile.write(body[first:] if wanted or len(asked) > 1 else body[:50])

        def log_message(self, *_):
            pass

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    base = f"http://127.0.0.1:{server.server_port}"
    try:
        code, _, err = call("data", "download", "--source", base, "--out", "camvid")
        assert code == 1
        assert not (tmp_path / "camvid").exists()
        assert call("data", "download", "--source", base, "--out", "camvid")[0] == 0
    finally:
        server.shutdown()
        server.server_close()
    assert asked == [None, "bytes=50-", None]
    assert (tmp_path / "camvid" / STILLS / "a.png").read_bytes() == b"image" * 9
    assert not list(tmp_path.glob(".camvid*"))
    says = err.splitlines()[-1].removeprefix("fastseg: ").replace(base, "http://host")
    row("download cut in half", says.replace(str(len(pages[f"/{FILES[STILLS]}"])), "N"), "the same command goes on")
