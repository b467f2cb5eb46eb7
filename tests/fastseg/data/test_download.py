import hashlib
import io
import json
import re
import stat
import threading
import zipfile
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

import pytest

from fastseg.data import download
from fastseg.data.download import FILES, download_camvid, locked
from fastseg.errors import FastsegError, UsageError

STILLS, APPROVED = FILES
IMAGES, LABELS = (f"/{FILES[folder]}" for folder in (STILLS, APPROVED))


@pytest.fixture(autouse=True)
def _short_backoffs(monkeypatch):
    monkeypatch.setattr(download, "BACKOFFS", (0.01, 0.01))


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
    LABELS: zipped(**{"a_L.png": "label a", "b_L.png": "label b", "Thumbs.db": "x", "__MACOSX/._a_L.png": "mac"}),
}
UNPACKED = {
    "camvid/701_StillsRaw_full/a.png": "image a",
    "camvid/701_StillsRaw_full/b.PNG": "b",
    "camvid/LabeledApproved_full/a_L.png": "label a",
    "camvid/LabeledApproved_full/b_L.png": "label b",
}
HALF = len(GOOD[IMAGES]) // 2


@contextmanager
def answering(handler):
    """A server of requests on a free port, which gives its URL."""
    server = ThreadingHTTPServer(("127.0.0.1", 0), handler)
    thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.02})
    thread.start()
    try:
        yield f"http://127.0.0.1:{server.server_port}"
    finally:
        server.shutdown()
        thread.join()
        server.server_close()


@contextmanager
def serving(pages, longer=(), raw=b"", *, cuts=(), statuses=(), ranges=True, validators=None, kind=None):
    """A server of {path: bytes}, which gives its URL and the requests that came, as (path, Range or None, status).

    A path in `longer` claims 100 bytes more than it sends; `raw` answers all that is not in `pages`. The first answers
    for the images end after so many bytes as `cuts` says, or with the `statuses`. `validators`: headers of each answer.
    """
    cuts, statuses, seen = list(cuts), list(statuses), []
    headers = {"ETag": '"one"'} if validators is None else validators

    class Handler(BaseHTTPRequestHandler):
        def do_GET(self):
            wanted = self.headers.get("Range")
            if raw and self.path not in pages:
                self.wfile.write(raw)
                return
            code = statuses.pop(0) if statuses and self.path == IMAGES else 200 if self.path in pages else 404
            if code != 200:
                seen.append((self.path, wanted, code))
                self.send_error(code)
                return
            body, first = pages[self.path], 0
            if wanted and ranges and self.headers["If-Range"] in headers.values():
                first = int(wanted.removeprefix("bytes=").removesuffix("-"))
                code = 206 if first < len(body) else 416
            seen.append((self.path, wanted, code))
            self.send_response(code)
            if code == 206:
                self.send_header("Content-Range", f"bytes {first}-{len(body) - 1}/{len(body)}")
            for name, value in headers.items():
                self.send_header(name, value)
            if kind:
                self.send_header("Content-Type", kind)
            sent = body[first:] if code != 416 else b""
            self.send_header("Content-Length", str(len(sent) + 100 * (self.path in longer)))
            self.end_headers()
            self.wfile.write(sent[: cuts.pop(0)] if cuts and self.path == IMAGES else sent)

        def log_message(self, *_):
            pass

    with answering(Handler) as base:
        yield base, seen


def contents(folder):
    return {str(p.relative_to(folder)): p.read_text() for p in folder.rglob("*") if p.is_file()}


def failure(out, base, **options):
    with pytest.raises(FastsegError) as error:
        download_camvid(out, base, **options)
    assert "\n" not in str(error.value)
    return str(error.value)


def test_both_zips_are_unpacked_flat_and_pngs_only(tmp_path, capsys):
    with serving(GOOD) as (base, seen):
        download_camvid(tmp_path / "camvid", base)
    assert contents(tmp_path) == UNPACKED
    assert [path.name for path in tmp_path.iterdir()] == ["camvid"]
    assert seen == [(IMAGES, None, 200), (LABELS, None, 200)]
    assert "research use" in capsys.readouterr().err


# What is there already


def test_what_is_there_whole_is_kept_and_nothing_asked_for(tmp_path, capsys):
    for name in FILES:
        (tmp_path / "camvid" / name).mkdir(parents=True)
    with serving(GOOD) as (base, seen):
        download_camvid(tmp_path / "camvid", base)
    assert seen == []
    assert capsys.readouterr().err == f"{tmp_path}/camvid is there already, nothing to download\n"
    assert [path.name for path in tmp_path.iterdir()] == ["camvid"]


def test_only_the_missing_folder_is_fetched(tmp_path):
    (tmp_path / "camvid" / STILLS).mkdir(parents=True)
    (tmp_path / "camvid" / STILLS / "mine.png").write_text("kept")
    with serving(GOOD) as (base, seen):
        download_camvid(tmp_path / "camvid", base)
    assert seen == [(LABELS, None, 200)]
    assert contents(tmp_path) == {
        "camvid/701_StillsRaw_full/mine.png": "kept",
        "camvid/LabeledApproved_full/a_L.png": "label a",
        "camvid/LabeledApproved_full/b_L.png": "label b",
    }
    assert [path.name for path in tmp_path.iterdir()] == ["camvid"]


def test_an_archive_unpacked_before_a_failure_is_not_fetched_again(tmp_path):
    with serving({IMAGES: GOOD[IMAGES]}) as (base, _):
        failure(tmp_path / "camvid", base)
    assert not (tmp_path / "camvid").exists()
    with serving(GOOD) as (base, seen):
        download_camvid(tmp_path / "camvid", base)
    assert seen == [(LABELS, None, 200)]
    assert contents(tmp_path) == UNPACKED


def test_an_existing_folder_of_something_else_is_refused_and_kept(tmp_path):
    (tmp_path / "mine.txt").write_text("kept")
    with pytest.raises(UsageError, match=f"^{tmp_path} exists: remove it, or train with --data {tmp_path}$"):
        download_camvid(tmp_path, "http://127.0.0.1:9")
    assert contents(tmp_path) == {"mine.txt": "kept"}
    assert not (tmp_path.parent / f".{tmp_path.name}.lock").exists()


def test_a_second_download_waits_says_so_and_finds_the_work_done(tmp_path, capsys):
    out = tmp_path / "camvid"
    with serving(GOOD) as (base, seen):
        second = threading.Thread(target=download_camvid, args=(out, base))
        with locked(tmp_path / ".camvid.lock") as waited:
            assert not waited
            second.start()
            said = ""
            while second.is_alive() and not said.endswith("\n"):
                said += capsys.readouterr().err
            assert seen == []
            for name in FILES:  # what the first one does meanwhile
                (out / name).mkdir(parents=True)
        second.join()
    assert seen == []
    assert said == f"waiting for another process that fetches the same data ({tmp_path}/.camvid.lock)\n"
    assert "nothing to download" in capsys.readouterr().err
    assert [path.name for path in tmp_path.iterdir()] == ["camvid"]


# Interruptions


def test_a_cut_connection_is_gone_on_with_at_the_byte_where_it_ended(tmp_path):
    with serving(GOOD, cuts=[HALF, 10]) as (base, seen):
        download_camvid(tmp_path / "camvid", base)
    assert seen == [
        (IMAGES, None, 200),
        (IMAGES, f"bytes={HALF}-", 206),
        (IMAGES, f"bytes={HALF + 10}-", 206),
        (LABELS, None, 200),
    ]
    assert contents(tmp_path) == UNPACKED


def test_tries_that_bring_bytes_do_not_count_as_failed_ones(tmp_path):
    with serving(GOOD, cuts=[10] * 12) as (base, seen):  # two back-offs would allow three tries
        download_camvid(tmp_path / "camvid", base)
    assert [wanted for path, wanted, _ in seen if path == IMAGES] == [None, *(f"bytes={n}0-" for n in range(1, 13))]
    assert contents(tmp_path) == UNPACKED


def test_faults_beyond_the_tries_are_one_line_and_the_next_call_goes_on_with_what_came(tmp_path):
    with serving(GOOD, cuts=[HALF, 0, 0]) as (base, seen):
        text = failure(tmp_path / "camvid", base)
    assert f"{base}{IMAGES}: {HALF} of {len(GOOD[IMAGES])} bytes came" in text
    assert "try again to go on" in text
    assert len(seen) == 3
    assert sorted(path.name for path in (tmp_path / ".camvid.partial").iterdir()) == [
        "701_StillsRaw_full.zip.json",
        "701_StillsRaw_full.zip.part",
    ]
    assert [path.name for path in tmp_path.iterdir()] == [".camvid.partial"]
    assert (tmp_path / ".camvid.partial/701_StillsRaw_full.zip.part").read_bytes() == GOOD[IMAGES][:HALF]
    # The other server is the same one at another port: the notes name the URL.
    state = tmp_path / ".camvid.partial/701_StillsRaw_full.zip.json"
    with serving(GOOD) as (base, seen):
        state.write_text(json.dumps(json.loads(state.read_text()) | {"url": base + IMAGES}))
        download_camvid(tmp_path / "camvid", base)
    assert seen == [(IMAGES, f"bytes={HALF}-", 206), (LABELS, None, 200)]
    assert contents(tmp_path) == UNPACKED
    assert [path.name for path in tmp_path.iterdir()] == ["camvid"]


def partly(tmp_path, base, body, **notes):
    """The folder as a process leaves it that is killed while it fetches the images."""
    partial = tmp_path / ".camvid.partial"
    partial.mkdir()
    (partial / f"{STILLS}.zip.part").write_bytes(body)
    notes = {"url": base + IMAGES, "validator": '"one"', "length": len(GOOD[IMAGES])} | notes
    (partial / f"{STILLS}.zip.json").write_text(json.dumps(notes))
    (partial / f".{STILLS}.unpacking").mkdir()
    (partial / f".{STILLS}.unpacking" / "half.png").write_text("ha")


OTHER = b"x" * 10  # begins no zip: it would show in the result


@pytest.mark.parametrize(
    ("body", "notes", "server", "asked"),
    [
        (GOOD[IMAGES][:HALF], {}, {}, [f"bytes={HALF}-"]),
        (GOOD[IMAGES], {}, {}, []),  # killed before it unpacked
        (OTHER, {}, {"ranges": False}, ["bytes=10-"]),
        (OTHER, {"validator": '"two"'}, {}, ["bytes=10-"]),  # the file has changed
        (GOOD[IMAGES][:HALF], {"validator": "Mon"}, {"validators": {"Last-Modified": "Mon"}}, [f"bytes={HALF}-"]),
        (OTHER, {"validator": None}, {}, [None]),
        (OTHER, {"url": "http://elsewhere"}, {}, [None]),
        (OTHER, {"length": 9}, {}, [None]),
        (OTHER * 99, {"length": 2000}, {}, ["bytes=990-", None]),  # beyond the file's end
        (OTHER, {"length": 2000}, {}, ["bytes=10-", None]),  # the same ETag, another length
        (b"", {}, {}, [None]),
    ],
)
def test_a_part_is_used_only_where_it_is_the_same_files(tmp_path, body, notes, server, asked):
    with serving(GOOD, **server) as (base, seen):
        partly(tmp_path, base, body, **notes)
        download_camvid(tmp_path / "camvid", base)
    assert [wanted for path, wanted, _ in seen if path == IMAGES] == asked
    assert contents(tmp_path) == UNPACKED


def test_a_weak_etag_is_no_ground_to_go_on(tmp_path):
    with serving(GOOD, cuts=[HALF], validators={"ETag": 'W/"one"'}) as (base, seen):
        download_camvid(tmp_path / "camvid", base)
    assert [wanted for path, wanted, _ in seen if path == IMAGES] == [None, None]
    assert contents(tmp_path) == UNPACKED


def test_a_login_page_does_not_take_the_place_of_what_came(tmp_path):
    with serving({IMAGES: b"<html>log in</html>"}, kind="text/html; charset=utf-8") as (base, _):
        partly(tmp_path, base, GOOD[IMAGES][:HALF], validator='"old"')
        text = failure(tmp_path / "camvid", base)
    assert "web page" in text
    assert (tmp_path / f".camvid.partial/{STILLS}.zip.part").read_bytes() == GOOD[IMAGES][:HALF]


@pytest.mark.parametrize("status", [500, 503, 429, 408])
def test_a_server_that_is_busy_is_asked_again(tmp_path, status):
    with serving(GOOD, statuses=[status, status]) as (base, seen):
        download_camvid(tmp_path / "camvid", base)
    assert [code for path, _, code in seen if path == IMAGES] == [status, status, 200]
    assert contents(tmp_path) == UNPACKED


@pytest.mark.parametrize(("status", "asked"), [(404, 1), (403, 1), (503, 3)])
def test_other_answers_are_final_and_so_is_the_last_try(tmp_path, status, asked):
    with serving(GOOD, statuses=[status] * asked) as (base, seen):
        failure(tmp_path / "camvid", base)
    assert len(seen) == asked
    assert list(tmp_path.iterdir()) == []


def test_a_server_that_stops_sending_is_asked_again(tmp_path, monkeypatch):
    monkeypatch.setattr(download, "TIMEOUT", 0.2)
    release, asked = threading.Event(), []

    class Handler(BaseHTTPRequestHandler):
        def do_GET(self):
            asked.append(self.path)
            if len(asked) == 1:
                release.wait()
                return
            self.send_response(200)
            self.send_header("Content-Length", str(len(GOOD[self.path])))
            self.end_headers()
            self.wfile.write(GOOD[self.path])

        def log_message(self, *_):
            pass

    with answering(Handler) as base:
        try:
            download_camvid(tmp_path / "camvid", base)
        finally:
            release.set()
    assert asked[:2] == [IMAGES, IMAGES]
    assert contents(tmp_path) == UNPACKED


def test_an_interrupted_download_keeps_its_part_and_frees_the_lock(tmp_path, monkeypatch):
    def interrupted(*_):
        raise KeyboardInterrupt

    with serving(GOOD, cuts=[HALF]) as (base, seen):
        with monkeypatch.context() as patch:
            patch.setattr(download.time, "sleep", interrupted)
            with pytest.raises(KeyboardInterrupt):
                download_camvid(tmp_path / "camvid", base)
        assert not (tmp_path / ".camvid.lock").exists()
        download_camvid(tmp_path / "camvid", base)
    assert [wanted for path, wanted, _ in seen if path == IMAGES] == [None, f"bytes={HALF}-"]
    assert contents(tmp_path) == UNPACKED


# Wrong answers


@pytest.mark.parametrize(
    ("change", "longer", "reason"),
    [
        ({IMAGES: b"<html>moved</html>"}, (), "no zip"),
        ({IMAGES: b""}, (), "no zip"),
        ({IMAGES: GOOD[IMAGES][:-30]}, (), "no zip"),
        ({IMAGES: zipped(**{"readme.txt": "x"})}, (), "holds no PNG"),
        ({IMAGES: None}, (), "Not Found|404"),
        ({}, (IMAGES,), "of [0-9]+ bytes"),
    ],
)
def test_a_bad_answer_is_one_line_with_the_cure_and_leaves_nothing_behind(tmp_path, change, longer, reason):
    pages = {path: body for path, body in {**GOOD, **change}.items() if body is not None}
    with serving(pages, longer, validators={}) as (base, _):
        text = failure(tmp_path / "camvid", base)
    assert re.search(reason, text)
    assert base in text
    assert "--data synth" in text
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("body", [b"", b"<html>", GOOD[LABELS][:-30]])
def test_a_bad_second_archive_leaves_only_the_first_ones_folder(tmp_path, body):
    with serving({**GOOD, LABELS: body}) as (base, _):
        assert "no zip" in failure(tmp_path / "camvid", base)
    assert contents(tmp_path) == {
        ".camvid.partial/701_StillsRaw_full/a.png": "image a",
        ".camvid.partial/701_StillsRaw_full/b.PNG": "b",
    }


@pytest.mark.parametrize("compression", [zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED], ids=["stored", "deflated"])
def test_a_zip_with_a_broken_member_is_one_line_and_leaves_nothing_behind(tmp_path, compression):
    content = bytes(range(256)) * 4
    body = bytearray(zipped(compression, **{"a.png": content}))
    start = body.index(b"a.png") + len("a.png")
    body[start : start + 8] = b"\xff" * 8  # no pixels with that CRC, and no block that deflate knows
    with serving({**GOOD, IMAGES: bytes(body)}) as (base, _):
        failure(tmp_path / "camvid", base)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    "raw",
    [b"SSH-2.0-nothing\r\n", b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n100\r\ncut off"],
    ids=["no-http", "cut-chunk"],
)
def test_an_answer_that_is_no_whole_http_is_one_line_and_leaves_nothing_behind(tmp_path, raw):
    with serving({}, raw=raw) as (base, _):
        failure(tmp_path / "camvid", base)
    assert list(tmp_path.iterdir()) == []


def test_no_server_is_one_line(tmp_path):
    with serving({}) as (base, _):
        pass
    assert failure(tmp_path / "camvid", base).startswith(f"CamVid could not be downloaded from {base} ")
    assert list(tmp_path.iterdir()) == []


def test_a_checksum_is_compared_where_one_is_given(tmp_path):
    right = hashlib.sha256(GOOD[IMAGES]).hexdigest()
    with serving(GOOD) as (base, _):
        text = failure(tmp_path / "camvid", base, checksums={STILLS: "0" * 64})
        assert f"{base}{IMAGES} has SHA-256 {right}, not {'0' * 64}" in text
        assert list(tmp_path.iterdir()) == []
        download_camvid(tmp_path / "camvid", base, {STILLS: right.upper()})
    assert contents(tmp_path) == UNPACKED


# Zips that mean harm


def member(name, content=b"x", mode=0, **attributes):
    info = zipfile.ZipInfo(name)
    info.external_attr = mode << 16
    for key, value in attributes.items():
        setattr(info, key, value)
    return info, content


HARM = {
    "parent": ([member("../../evil.png")], "'../../evil.png' points out of the folder"),
    "parent of no image": ([member("../notes.txt")], "points out of the folder"),
    "inner parent": ([member("a/../b.png")], "points out of the folder"),
    "absolute": ([member("/etc/evil.png")], "'/etc/evil.png' points out of the folder"),
    "backslashes": ([member("..\\evil.png")], "points out of the folder"),
    "drive": ([member("C:evil.png")], "points out of the folder"),
    "link": ([member("a.png", b"/etc/passwd", stat.S_IFLNK | 0o777)], "'a.png' is a link or a device"),
    "device": ([member("a.png", b"", stat.S_IFCHR | 0o666)], "'a.png' is a link or a device"),
    "folder": ([member("a.png", b"", stat.S_IFDIR | 0o777)], "a folder with the name of a file"),
    "twice": ([member("x/a.png"), member("y/A.png")], "it has 'A.png' twice"),
    "unusual": ([member("a.png", compress_type=zipfile.ZIP_BZIP2)], "compressed in an unusual way"),
    "large member": ([member("a.png", b"x" * 101)], "'a.png' unpacks to 101 bytes, more than 100"),
    "large total": (
        [member(f"{i}.png", b"x" * 76) for i in range(4)],
        "it unpacks to 305 bytes, more than 300",
    ),  # good.png has 1
    "many": ([member(f"{i}.txt", b"") for i in range(6)], "it has 6 members, more than 5"),
}


@pytest.mark.parametrize(("members", "reason"), HARM.values(), ids=HARM)
def test_a_zip_that_means_harm_is_refused_before_anything_is_written(tmp_path, monkeypatch, members, reason):
    monkeypatch.setattr(download, "MAX_MEMBER", 100)
    monkeypatch.setattr(download, "MAX_TOTAL", 300)
    monkeypatch.setattr(download, "MAX_COUNT", 5)
    monkeypatch.setattr(download.shutil, "copyfileobj", None)
    data = io.BytesIO()
    with zipfile.ZipFile(data, "w") as archive:
        for info, content in [member("good.png"), *members][-6:]:
            archive.writestr(info, content)
    with serving({**GOOD, IMAGES: data.getvalue()}) as (base, _):
        text = failure(tmp_path / "camvid", base)
    assert f"{base}{IMAGES} is refused: " in text
    assert reason in text
    assert list(tmp_path.iterdir()) == []


def test_a_member_without_a_name_is_left_out(tmp_path):
    body = zipped(**{"x": "y", "a.png": "image a"})
    at = body.index(b"PK\x01\x02") + 46  # zipfile ends a name at its first zero byte
    body = body[:at] + b"\0" + body[at + 1 :]
    with serving({**GOOD, IMAGES: body}) as (base, _):
        download_camvid(tmp_path / "camvid", base)
    assert contents(tmp_path / "camvid" / STILLS) == {"a.png": "image a"}


def test_an_encrypted_zip_is_refused(tmp_path):
    body = bytearray(zipped(**{"a.png": "x"}))
    body[body.index(b"PK\x01\x02") + 8] |= 1  # the flag in the central directory
    with serving({**GOOD, IMAGES: bytes(body)}) as (base, _):
        assert "encrypted" in failure(tmp_path / "camvid", base)


def test_limits_are_inclusive_and_leave_room_for_camvid(tmp_path, monkeypatch):
    assert download.MAX_MEMBER > 960 * 720 * 3
    assert download.MAX_TOTAL > 701 * 960 * 720 * 3
    assert download.MAX_COUNT > 2 * 701
    monkeypatch.setattr(download, "MAX_MEMBER", len("image a"))
    monkeypatch.setattr(download, "MAX_TOTAL", len("label alabel b"))
    monkeypatch.setattr(download, "MAX_COUNT", 4)
    with serving(GOOD) as (base, _):
        download_camvid(tmp_path / "camvid", base)
    assert contents(tmp_path) == UNPACKED


# Sources


@pytest.mark.parametrize("flat", [False, True])
@pytest.mark.parametrize("scheme", ["", "file://"])
def test_a_local_folder_is_a_source_and_keeps_its_zips(tmp_path, flat, scheme):
    mirror = tmp_path / "mirror"
    paths = [mirror / (f"{name}.zip" if flat else path) for name, path in FILES.items()]
    for path, body in zip(paths, GOOD.values(), strict=True):
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(body)
    download_camvid(tmp_path / "new" / "camvid", f"{scheme}{mirror}")
    assert contents(tmp_path / "new") == UNPACKED
    assert all(path.is_file() for path in paths)


def test_a_wrong_source_is_one_line(tmp_path):
    (tmp_path / "empty").mkdir()
    for source, reason in {
        f"{tmp_path}/none": "no folder; give a URL",
        f"{tmp_path}/empty": "no files/701_StillsRaw_full.zip and no 701_StillsRaw_full.zip there",
        "ftp://host/x": "give an http or https URL",
    }.items():
        with pytest.raises(UsageError, match=f"^--source {source}: {reason}"):
            download_camvid(tmp_path / "camvid", source)
    assert [path.name for path in tmp_path.iterdir()] == ["empty"]


def test_a_broken_zip_in_a_local_folder_is_kept(tmp_path):
    mirror = tmp_path / "mirror"
    mirror.mkdir()
    (mirror / f"{STILLS}.zip").write_bytes(b"<html>")
    assert "no zip" in failure(tmp_path / "camvid", str(mirror))
    assert contents(tmp_path) == {f"mirror/{STILLS}.zip": "<html>"}
    assert [path.name for path in tmp_path.iterdir()] == ["mirror"]
