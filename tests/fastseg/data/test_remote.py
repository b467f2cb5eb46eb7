import hashlib
import http.client
import json
import socket
import sys
import threading
import time
import urllib.parse
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, SimpleHTTPRequestHandler, ThreadingHTTPServer

import pytest
import torch

from fastseg.data import download, home, is_url, remote, resolve
from fastseg.data.download import locked
from fastseg.data.remote import fetch
from fastseg.environment import install
from fastseg.errors import FastsegError, UsageError

boto3 = pytest.importorskip("boto3")
fsspec = pytest.importorskip("fsspec")
pytest.importorskip("s3fs")
pytest.importorskip("moto.server")


@pytest.fixture(autouse=True)
def _short_backoffs(monkeypatch):
    monkeypatch.setattr(download, "BACKOFFS", (0.01, 0.01))


@contextmanager
def serving(handler):
    """A server of requests on a free port, which gives its port."""
    server = ThreadingHTTPServer(("127.0.0.1", 0), handler)
    thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.02})
    thread.start()
    try:
        yield server.server_port
    finally:
        server.shutdown()
        thread.join()
        server.server_close()


class Proxy:
    """Passes requests on to moto, but for the faults of a script: {key, or "" for the listing: [fault, ...]}.

    A fault is a status, "hang up", "silence", "cut" (half of the body), "shorter" (half of it, with a length that says
    so), "wrong byte" (as "shorter" without S3's checksums: sizes and ETags have to tell), or a function of the body.
    Only GETs fail; `seen` has the key of each request.
    """

    def __init__(self, port):
        self.moto, self.script, self.seen = port, {}, []
        self.release = threading.Event()

    def handler(proxy):  # noqa: N805  self is the request's
        class Handler(BaseHTTPRequestHandler):
            def do_GET(self):
                _, _, key = urllib.parse.unquote(self.path.partition("?")[0]).lstrip("/").partition("/")
                proxy.seen.append(key)
                scripted = proxy.script.get(key) if self.command == "GET" else None
                fault = scripted.pop(0) if scripted else None
                if fault == "hang up":
                    self.close_connection = True
                    return
                if fault == "silence":
                    proxy.release.wait()
                    self.close_connection = True
                    return
                if isinstance(fault, int):
                    self.send_error(fault)
                    return
                upstream = http.client.HTTPConnection("127.0.0.1", proxy.moto)
                upstream.request(self.command, self.path, headers=dict(self.headers))
                answer = upstream.getresponse()
                body = answer.read()
                length = answer.headers["Content-Length"] if self.command == "HEAD" else None
                if callable(fault):
                    body = fault(body)
                if fault == "wrong byte":
                    body = body[:-1] + b"!"
                half = body[: len(body) // 2]
                self.send_response(answer.status)
                left_out = {"content-length", "transfer-encoding", "connection", "date", "server"}
                if fault in ("shorter", "wrong byte"):
                    left_out |= {name.lower() for name in answer.headers if name.lower().startswith("x-amz-checksum")}
                for name, value in answer.getheaders():
                    if name.lower() not in left_out:
                        self.send_header(name, value)
                self.send_header("Content-Length", length or str(len(half if fault == "shorter" else body)))
                self.end_headers()
                if self.command != "HEAD":
                    self.wfile.write(half if fault in ("cut", "shorter") else body)
                if fault == "cut":
                    self.close_connection = True
                upstream.close()

            do_HEAD = do_GET  # noqa: N815

            def log_message(self, *_):
                pass

        return Handler


@pytest.fixture(scope="module")
def moto():
    from moto.server import ThreadedMotoServer

    server = ThreadedMotoServer("127.0.0.1", 0, verbose=False)
    server.start()
    yield server.get_host_and_port()[1]
    server.stop()


KEYS = {"AWS_ACCESS_KEY_ID": "testing", "AWS_SECRET_ACCESS_KEY": "testing", "AWS_DEFAULT_REGION": "us-east-1"}


@pytest.fixture
def s3(moto, monkeypatch):
    """An empty bucket `data`: its client, and a proxy in front of it that AWS_ENDPOINT_URL names."""
    for name, value in KEYS.items():
        monkeypatch.setenv(name, value)
    monkeypatch.setenv("AWS_CONFIG_FILE", "/nonexistent")
    monkeypatch.setenv("AWS_EC2_METADATA_DISABLED", "true")
    client = boto3.client("s3", endpoint_url=f"http://127.0.0.1:{moto}")
    client.create_bucket(Bucket="data")
    proxy = Proxy(moto)
    with serving(proxy.handler()) as port:
        monkeypatch.setenv("AWS_ENDPOINT_URL", f"http://127.0.0.1:{port}")
        yield client, proxy
        proxy.release.set()
    for item in client.list_objects_v2(Bucket="data").get("Contents", []):
        client.delete_object(Bucket="data", Key=item["Key"])
    client.delete_bucket(Bucket="data")


TREE = {"train/a.png": b"image a", "train/b c+é.png": bytes(range(256)) * 500, "trainannot/a.png": b"", "val.txt": b"a"}


def put(client, tree, prefix="set/"):
    for name, body in tree.items():
        client.put_object(Bucket="data", Key=prefix + name, Body=body)


def contents(folder):
    return {p.relative_to(folder).as_posix(): p.read_bytes() for p in folder.rglob("*") if p.is_file()}


def beside(folder):
    return sorted(p.name for p in folder.parent.iterdir())


def failure(url, folder, kind=FastsegError):
    with pytest.raises(kind) as error:
        fetch(url, folder)
    assert "\n" not in str(error.value)
    return str(error.value)


# S3


def test_every_file_below_the_url_is_copied_and_no_other(s3, tmp_path):
    client, proxy = s3
    put(client, TREE)
    put(client, {"other.txt": b"x"}, "")
    put(client, {"other.txt": b"x"}, "set2/")
    put(client, {"": b"", "empty/": b""})  # folders that a console makes
    fetch("s3://data/set/", tmp_path / "copy")
    assert contents(tmp_path / "copy") == TREE
    assert beside(tmp_path / "copy") == [".copy.json", "copy"]
    assert sorted(proxy.seen) == ["", *sorted(f"set/{name}" for name in TREE)]


def test_a_second_fetch_brings_what_is_new_or_changed_and_removes_what_is_gone(s3, tmp_path):
    client, proxy = s3
    copy = tmp_path / "copy"
    put(client, TREE)
    fetch("s3://data/set", copy)
    proxy.seen.clear()
    fetch("s3://data/set", copy)
    assert proxy.seen == [""]
    # As long as before, a new one, one less, and a file where a folder was.
    put(client, {"train/a.png": b"IMAGE A", "new/deep/c.png": b"c", "trainannot": b"file"})
    client.delete_object(Bucket="data", Key="set/trainannot/a.png")
    proxy.seen.clear()
    fetch("s3://data/set", copy)
    changed = {"train/a.png": b"IMAGE A", "new/deep/c.png": b"c", "trainannot": b"file"}
    assert contents(copy) == {name: body for name, body in TREE.items() if name != "trainannot/a.png"} | changed
    assert sorted(proxy.seen) == ["", "set/new/deep/c.png", "set/train/a.png", "set/trainannot"]
    # A file that was damaged here comes again; one that is not ours stays.
    (copy / "val.txt").write_bytes(b"longer")
    (copy / "mine.txt").write_bytes(b"mine")
    proxy.seen.clear()
    fetch("s3://data/set", copy)
    assert proxy.seen == ["", "set/val.txt"]
    assert (copy / "val.txt").read_bytes() == b"a"
    assert (copy / "mine.txt").read_bytes() == b"mine"


@pytest.mark.parametrize("fault", [500, 503, 429, "hang up", "cut", "shorter", "wrong byte", lambda body: body[::-1]])
def test_every_byte_arrives_right_through_faults(s3, tmp_path, fault):
    client, proxy = s3
    put(client, TREE)
    proxy.script = {"set/train/a.png": [fault], "set/train/b c+é.png": [fault, fault]}
    fetch("s3://data/set", tmp_path / "copy")
    assert contents(tmp_path / "copy") == TREE
    gets = [key for key in proxy.seen if key.startswith("set/train/b")]
    assert len(gets) == 3 + 2 * (fault == "wrong byte")  # and a HEAD for each, which asks what kind of ETag it is


@pytest.mark.parametrize("fault", [500, 503, "hang up", "cut"])
def test_a_listing_is_tried_again_too(s3, tmp_path, fault):
    client, proxy = s3
    put(client, TREE)
    proxy.script = {"": [fault, fault]}
    fetch("s3://data/set", tmp_path / "copy")
    assert contents(tmp_path / "copy") == TREE


def test_a_server_that_falls_silent_is_asked_again(s3, tmp_path, monkeypatch):
    client, proxy = s3
    put(client, {"a.txt": b"a"})
    proxy.script = {"set/a.txt": ["silence"]}
    monkeypatch.setattr(remote, "TIMEOUT", 1.0)
    fetch("s3://data/set", tmp_path / "copy")
    assert contents(tmp_path / "copy") == {"a.txt": b"a"}
    assert proxy.seen.count("set/a.txt") >= 2


@pytest.mark.parametrize("fault", [503, "hang up", "cut", "shorter", "wrong byte"])
def test_faults_beyond_the_tries_name_the_url_and_keep_the_other_files(s3, tmp_path, fault):
    client, proxy = s3
    put(client, TREE)
    proxy.script = {"set/train/b c+é.png": [fault] * 6}
    # One thread, so that the files before the one that fails have come.
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(remote, "THREADS", 1)
        text = failure("s3://data/set", tmp_path / "copy")
    assert text.startswith("s3://data/set/train/b c+é.png cannot be fetched (")
    assert text.endswith("what came is kept, try again to go on")
    assert beside(tmp_path / "copy") == [".copy.new"]
    assert not list((tmp_path / ".copy.new").glob("*.part"))
    proxy.script, before = {}, set(proxy.seen)
    proxy.seen.clear()
    fetch("s3://data/set", tmp_path / "copy")
    assert contents(tmp_path / "copy") == TREE
    assert "set/train/a.png" in before
    assert "set/train/a.png" not in proxy.seen


def test_an_update_that_fails_leaves_the_older_copy_whole(s3, tmp_path, capsys):
    client, proxy = s3
    copy = tmp_path / "copy"
    put(client, {"a.txt": b"old a", "b.txt": b"old b"})
    fetch("s3://data/set", copy)
    put(client, {"a.txt": b"new a", "b.txt": b"new b"})
    proxy.script = {"set/b.txt": [500] * 3}
    assert failure("s3://data/set", copy).startswith("s3://data/set/b.txt cannot be fetched (")
    assert contents(copy) == {"a.txt": b"old a", "b.txt": b"old b"}
    proxy.script = {"": [500] * 3}
    fetch("s3://data/set", copy)
    line = capsys.readouterr().err
    assert line.startswith("fastseg: s3://data/set cannot be reached (")
    assert line.endswith(f"); going on with the copy in {copy}\n")
    assert line.count("\n") == 1
    fetch("s3://data/set", copy)
    assert contents(copy) == {"a.txt": b"new a", "b.txt": b"new b"}


def test_without_a_network_a_whole_copy_is_used_and_a_damaged_one_is_not(s3, tmp_path, monkeypatch, capsys):
    client, _ = s3
    copy = tmp_path / "copy"
    put(client, TREE)
    with serving(BaseHTTPRequestHandler) as port:
        pass
    fetch("s3://data/set", copy)
    monkeypatch.setenv("AWS_ENDPOINT_URL", f"http://127.0.0.1:{port}")
    fetch("s3://data/set", copy)
    assert "going on with the copy" in capsys.readouterr().err
    assert contents(copy) == TREE
    (copy / "val.txt").unlink()
    text = failure("s3://data/set", copy)
    assert text.startswith("s3://data/set cannot be reached (")
    assert text.endswith("check the network, or give --data PATH of a copy")
    assert failure("s3://data/other", tmp_path / "other").startswith("s3://data/other cannot be reached (")


@pytest.mark.parametrize("stop", ["before the moves", "between the moves"])
def test_what_a_killed_process_was_doing_is_finished_without_a_network(s3, tmp_path, monkeypatch, stop):
    client, proxy = s3
    copy = tmp_path / "copy"
    put(client, {"a.txt": b"old a", "b.txt": b"old b", "gone/c.txt": b"c"})
    fetch("s3://data/set", copy)
    put(client, {"a.txt": b"new a", "b.txt": b"new b"})
    client.delete_object(Bucket="data", Key="set/gone/c.txt")
    replace, moves = remote.Path.replace, []

    def killed(path, target):
        if path.parent.name == ".copy.new" and path.suffix != ".part":
            moves.append(target)
            if len(moves) > (stop == "between the moves"):
                raise KeyboardInterrupt
        return replace(path, target)

    with monkeypatch.context() as patch:
        patch.setattr(remote.Path, "replace", killed)
        with pytest.raises(KeyboardInterrupt):
            fetch("s3://data/set", copy)
    proxy.script = {"": [500] * 3}
    fetch("s3://data/set", copy)
    assert contents(copy) == {"a.txt": b"new a", "b.txt": b"new b"}
    assert not (copy / "gone").exists()
    assert beside(copy) == [".copy.json", "copy"]


def test_an_etag_of_an_encrypted_file_or_of_several_parts_is_no_md5(s3, tmp_path):
    client, proxy = s3
    client.put_object(Bucket="data", Key="set/k.txt", Body=b"secret", ServerSideEncryption="aws:kms")
    upload = client.create_multipart_upload(Bucket="data", Key="set/m.txt")["UploadId"]
    where = {"Bucket": "data", "Key": "set/m.txt", "UploadId": upload}
    part = client.upload_part(**where, PartNumber=1, Body=b"parts")
    client.complete_multipart_upload(**where, MultipartUpload={"Parts": [{"PartNumber": 1, "ETag": part["ETag"]}]})
    md5 = hashlib.md5(b"secret").hexdigest().encode()
    proxy.script = {"": [lambda listing: listing.replace(md5, b"0" * 32)]}
    fetch("s3://data/set", tmp_path / "copy")
    assert contents(tmp_path / "copy") == {"k.txt": b"secret", "m.txt": b"parts"}
    assert sorted(proxy.seen) == ["", "set/k.txt", "set/k.txt", "set/m.txt"]


@pytest.mark.parametrize("name", ["../evil.txt", "a/../../evil.txt", "a//b.txt", "./a.txt", "a\\b.txt"])
def test_a_name_that_leads_out_of_the_copy_is_refused_before_anything_is_written(s3, tmp_path, name):
    client, proxy = s3
    put(client, {"good.txt": b"x", "KEY": b"x"})
    proxy.script = {"": [lambda listing: listing.replace(b"set/KEY", f"set/{name}".encode())]}
    assert f"the file {name!r} there has no name that a folder can hold" in failure("s3://data/set", tmp_path / "copy")
    assert list(tmp_path.iterdir()) == []


def test_a_file_with_the_name_of_a_folder_is_refused(s3, tmp_path):
    put(s3[0], {"a": b"file", "a/b.txt": b"x"})
    assert "has the name of another one, or of a folder" in failure("s3://data/set", tmp_path / "copy")
    assert list(tmp_path.iterdir()) == []


def test_what_cannot_be_a_data_set_is_one_line_and_keeps_the_copy(s3, tmp_path, monkeypatch):
    client, proxy = s3
    copy = tmp_path / "copy"
    put(client, {"a.txt": b"a"})
    fetch("s3://data/set", copy)
    client.delete_object(Bucket="data", Key="set/a.txt")
    assert failure("s3://data/set", copy) == "--data s3://data/set: no files there"
    assert "does not exist" in failure("s3://nobody/set", tmp_path / "none")
    put(client, {"a.zip": b"zip"})
    assert "is a file: give the URL of the folder" in failure("s3://data/set/a.zip", tmp_path / "zip", UsageError)
    proxy.script = {"": [403]}
    text = failure("s3://data/set", copy)
    assert text.startswith("s3://data/set is refused (PermissionError")
    assert "check the credentials (AWS_PROFILE" in text
    for name in KEYS:
        monkeypatch.delenv(name)
    monkeypatch.setenv("AWS_SHARED_CREDENTIALS_FILE", "/nonexistent")
    assert "is refused (NoCredentialsError" in failure("s3://data/set", copy)
    assert contents(copy) == {"a.txt": b"a"}


# Other file systems


@pytest.fixture
def memory():
    files = fsspec.filesystem("memory")
    yield files
    files.rm("/set", recursive=True)


def test_memory_and_file_and_http_are_copied_alike(memory, tmp_path):
    tree = {"train/a b.png": b"a", "train/deep/c.png": b"c" * 100, "val.txt": b"v"}
    memory.pipe({f"/set/{name}": body for name, body in tree.items()})
    for name, body in tree.items():
        (tmp_path / "source" / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / "source" / name).write_bytes(body)

    class Index(SimpleHTTPRequestHandler):
        def __init__(self, *args):
            super().__init__(*args, directory=tmp_path)

        def log_message(self, *_):
            pass

    fetch("memory://set", tmp_path / "memory")
    fetch(f"file://{tmp_path}/source", tmp_path / "file")
    with serving(Index) as port:
        fetch(f"http://127.0.0.1:{port}/source", tmp_path / "http")
        text = failure(f"http://127.0.0.1:{port}/source/val.txt", tmp_path / "none")
        assert text.endswith("no files there (http needs a page that links to them: an index)")
        missing = failure(f"http://127.0.0.1:{port}/nowhere", tmp_path / "none")
        assert missing.startswith(f"http://127.0.0.1:{port}/nowhere does not exist")
    for name in ("memory", "file", "http"):
        assert contents(tmp_path / name) == tree


def test_links_are_followed_to_files_and_refused_to_folders(tmp_path):
    source = tmp_path / "source"
    (source / "sub").mkdir(parents=True)
    (source / "sub" / "a.txt").write_bytes(b"a")
    (source / "link.txt").symlink_to("sub/a.txt")
    fetch(f"file://{source}", tmp_path / "copy")
    assert contents(tmp_path / "copy") == {"sub/a.txt": b"a", "link.txt": b"a"}
    assert not (tmp_path / "copy" / "link.txt").is_symlink()
    (source / "other").symlink_to("sub")
    assert "other is no plain file of known size" in failure(f"file://{source}", tmp_path / "copy")


def test_a_folder_that_cannot_be_listed_does_not_count_as_gone(tmp_path, monkeypatch):
    for name in ("a.txt", "sub/b.txt"):
        (tmp_path / "set" / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / "set" / name).write_bytes(b"x")
    url, local = f"file://{tmp_path}/set", fsspec.get_filesystem_class("file")
    fetch(url, tmp_path / "copy")
    listed = local.ls

    def ls(self, path, *args, **options):
        if path.endswith("sub"):
            raise ConnectionResetError("gone")
        return listed(self, path, *args, **options)

    monkeypatch.setattr(local, "ls", ls)
    fetch(url, tmp_path / "copy")
    assert contents(tmp_path / "copy") == {"a.txt": b"x", "sub/b.txt": b"x"}
    assert failure(url, tmp_path / "other").startswith(f"{url} cannot be reached (ConnectionResetError: gone)")


@pytest.mark.parametrize(
    ("url", "package", "cure"),
    [
        ("memory://set", "fsspec.core", "[remote]"),
        ("s3://data/set", "s3fs", "[remote]"),
        ("gs://b/x", "gcsfs", "gcsfs"),
    ],
)
def test_a_missing_package_is_one_line_with_what_to_install(tmp_path, monkeypatch, url, package, cure):
    monkeypatch.setitem(sys.modules, package, None)
    monkeypatch.delitem(sys.modules["fsspec.registry"]._registry, "s3", raising=False)
    text = failure(url, tmp_path / "copy")
    assert text.startswith(f"--data {url}: a package is missing (")
    assert cure in text
    assert (install("remote") in text) == (cure == "[remote]")
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("url", ["nothing://x", "s3://data/set?versionId=1", "zip::s3://data/a.zip"])
def test_other_urls_are_wrong_use(tmp_path, url):
    assert failure(url, tmp_path / "copy", UsageError).startswith(f"--data {url}: ")


def test_a_password_is_neither_shown_nor_written(memory, tmp_path):
    memory.pipe({"/set/a.txt": b"a"})
    assert "secret" not in failure("ftp://me:secret@127.0.0.1:9/x", tmp_path / "copy")
    text = failure("nothing://me:secret@host/x", tmp_path / "copy", UsageError)
    assert "//host/x" in text
    assert "secret" not in text


def test_a_folder_that_is_no_copy_of_the_url_is_kept(memory, tmp_path):
    memory.pipe({"/set/a.txt": b"a"})
    copy = tmp_path / "copy"
    copy.mkdir()
    (copy / "mine.txt").write_bytes(b"mine")
    assert failure("memory://set", copy, UsageError) == f"{copy} exists but is no copy of memory://set: remove it"
    for notes in ("{", "[]", json.dumps({"url": "s3://other", "files": {}})):
        (tmp_path / ".copy.json").write_text(notes)
        assert "does not describe a copy of memory://set" in failure("memory://set", copy, UsageError)
    assert contents(copy) == {"mine.txt": b"mine"}


def test_too_little_room_is_told_before_the_first_file(memory, tmp_path, monkeypatch):
    memory.pipe({"/set/a.txt": b"four"})
    usage = remote.shutil.disk_usage(tmp_path)
    monkeypatch.setattr(remote.shutil, "disk_usage", lambda _: usage._replace(free=3))
    assert failure("memory://set", tmp_path / "copy") == f"memory://set has 4 bytes to fetch, and {tmp_path} room for 3"


def test_a_process_that_waited_takes_what_the_other_one_fetched(memory, tmp_path, monkeypatch, capsys):
    memory.pipe({"/set/a.txt": b"a"})
    fetch("memory://set", tmp_path / "copy")
    memory.pipe({"/set/a.txt": b"changed since"})
    second = threading.Thread(target=fetch, args=("memory://set", tmp_path / "copy"))
    with locked(tmp_path / ".copy.lock"):
        second.start()
        said = ""
        while second.is_alive() and not said.endswith("\n"):
            said += capsys.readouterr().err
            time.sleep(0.01)
    second.join()
    assert contents(tmp_path / "copy") == {"a.txt": b"a"}


def test_resolve_takes_a_url_and_keeps_its_copy_under_home(memory, tmp_path, monkeypatch):
    monkeypatch.setenv("FASTSEG_DATA", str(tmp_path))
    memory.pipe({"/set/a.txt": b"a"})
    folder = resolve("memory://set")
    # printf memory://set | sha256sum | cut -c1-16
    assert folder == home() / "remote" / "7e2f3230be5cc9d3"
    assert resolve("memory://set/") == folder
    assert contents(folder) == {"a.txt": b"a"}


def test_paths_are_no_urls():
    assert is_url("s3://bucket/camvid")
    assert is_url("memory://x")
    for name in ("camvid", "synth", "/data/x", "./s3:/x", "data//x", "C:\\data", ""):
        assert not is_url(name)


# Training


def test_an_epoch_from_a_failing_server_gives_the_bits_of_one_from_the_disk(s3, street, tmp_path, monkeypatch):
    from fastseg import checkpoint, config, training

    def weights(data: str) -> dict:
        changes = {
            "data.path": data,
            "data.size": "32x48",
            "model.depth": 1,
            "train.epochs": 1,
            "runtime.device": "cpu",
        }
        run = tmp_path / ("disk" if data == str(street) else "s3")
        training.train(config.override(config.load_recipe("fast"), changes), run)
        return checkpoint.read(run / "checkpoints" / "last.pt")["model"]

    monkeypatch.setenv("FASTSEG_DATA", str(tmp_path / "home"))
    client, proxy = s3
    put(client, contents(street))
    names = [f"set/{path.relative_to(street)}" for path in sorted(street.rglob("*.png"))]
    faults = [[500, "cut"], ["hang up"], ["shorter"], [503, 503], ["wrong byte"], ["cut", "hang up"]]
    proxy.script = {"": [500], **dict(zip(names, faults, strict=False))}
    found, wanted = weights("s3://data/set"), weights(str(street))
    assert not any(proxy.script.values())  # all the faults have been met
    assert contents(resolve("s3://data/set")) == contents(street)
    assert all(torch.equal(found[name], wanted[name]) for name in found | wanted)


def test_without_a_network_training_ends_with_one_line(tmp_path, monkeypatch):
    from click.testing import CliRunner

    from fastseg.cli import main

    for name, value in {**KEYS, "AWS_CONFIG_FILE": "/nonexistent", "AWS_EC2_METADATA_DISABLED": "true"}.items():
        monkeypatch.setenv(name, value)
    monkeypatch.setenv("FASTSEG_DATA", str(tmp_path / "home"))
    with socket.socket() as closed:  # a port where nobody listens
        closed.bind(("127.0.0.1", 0))
        monkeypatch.setenv("AWS_ENDPOINT_URL", f"http://127.0.0.1:{closed.getsockname()[1]}")
        run = tmp_path / "run"
        found = CliRunner().invoke(main, ["train", "--data", "s3://data/set", "--recipe", "fast", "--run", str(run)])
    (line,) = found.stderr.splitlines()
    assert found.exit_code == 1
    assert line.startswith("fastseg: s3://data/set cannot be reached (")
    assert not run.exists()
