"""Downloads from a real server on loopback that does everything a server can do wrong."""

import errno
import hashlib
import http.server
import io
import threading
from pathlib import Path

import numpy as np
import pytest

from base import download
from base.download import PUBLISHED, PublishedFile
from base.errors import UserError
from weights import pretrained

BODY = b"\x80\x04" + np.random.default_rng(0).bytes(1_000_000) + b"."
OTHER = b"\x80\x04" + np.random.default_rng(1).bytes(1_000_000) + b"."
UNKNOWN_HASH, KNOWN_HASH = "edm-cifar10-32x32-cond-vp", "known"
PART = 5 << 16  # where a transfer breaks off


class Server(http.server.ThreadingHTTPServer):
    daemon_threads = True
    body, content_type, tag, status = BODY, "application/octet-stream", '"1"', 200
    ranges = True          # whether Range is honoured
    if_range = True        # whether If-Range is
    cut = stall = None     # bytes of the answer after which the server hangs up, or sends no more
    length = True          # whether the length is told

    def __init__(self):
        super().__init__(("127.0.0.1", 0), Handler)
        self.asked, self.stop = [], threading.Event()

    def handle_error(self, request, client_address):
        pass


class Handler(http.server.BaseHTTPRequestHandler):
    def log_message(self, *args):
        pass

    def do_GET(self):
        server, body, status = self.server, self.server.body, self.server.status
        wanted, condition = self.headers.get("Range"), self.headers.get("If-Range")
        server.asked.append(wanted)
        start = 0
        current = condition in (None, server.tag) or not server.if_range
        if wanted and server.ranges and current:
            start = int(wanted.removeprefix("bytes=").removesuffix("-"))
            status = 206 if start < len(body) else 416
        self.send_response(status)
        self.send_header("Content-Type", server.content_type)
        if server.tag:
            self.send_header("ETag", server.tag)
        if status == 206:
            self.send_header("Content-Range", f"bytes {start}-{len(body) - 1}/{len(body)}")
        body = body[start:] if status < 400 else b""
        if server.length:
            self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        limit = server.cut if server.cut is not None else server.stall
        self.wfile.write(body[:limit])
        if server.stall is not None:
            self.wfile.flush()
            server.stop.wait(20)


@pytest.fixture
def server(monkeypatch):
    server = Server()
    threading.Thread(target=server.serve_forever, args=(0.01,), daemon=True).start()
    monkeypatch.setenv("PMDD_MIRROR", f"http://127.0.0.1:{server.server_port}/files/")
    monkeypatch.setenv("NO_PROXY", "127.0.0.1")
    monkeypatch.setattr(download, "TIMEOUT", 0.5)
    monkeypatch.setitem(PUBLISHED, KNOWN_HASH, PublishedFile(
        "known.pkl", ("https://example.invalid/known.pkl",), "free", size=len(BODY),
        sha256=hashlib.sha256(BODY).hexdigest()))
    yield server
    server.stop.set()
    server.shutdown()
    server.server_close()


def refused(name, cache, *said):
    """fetch fails with one line that has the address, the reason and the path; nothing is kept."""
    path = Path(cache) / PUBLISHED[name].name
    with pytest.raises(UserError) as caught:
        download.fetch(name, cache)
    message = str(caught.value)
    for part in ("http://127.0.0.1", f"/files/{path.name}", str(path), *said):
        assert part in message, message
    assert "\n" not in message and not path.exists()


def fetched(name, cache, body=BODY):
    path = download.fetch(name, cache)
    assert path.read_bytes() == body
    left = {p.name for p in path.parent.iterdir()} - {path.name}
    assert left <= {f"{path.name}.lock", f"{path.name}.sha256"}


def test_every_published_file_has_an_address_a_licence_and_its_own_place():
    assert len({entry.name for entry in PUBLISHED.values()}) == len(PUBLISHED) == 17
    for entry in PUBLISHED.values():
        assert entry.licence and all(url.startswith("https://") for url in entry.urls)


def test_cache_folder_is_the_flag_or_the_variable_or_the_default(monkeypatch):
    monkeypatch.setenv("PMDD_CACHE", "/somewhere")
    assert pretrained.cache_folder("/flag") == Path("/flag")
    assert pretrained.cache_folder() == Path("/somewhere")
    monkeypatch.delenv("PMDD_CACHE")
    assert pretrained.cache_folder() == Path.home() / ".cache/pmdd"


def test_unknown_name_lists_the_known_ones(tmp_path):
    with pytest.raises(UserError, match="edm-imagenet-64x64-cond-adm"):
        download.fetch("edm-imagenet", tmp_path)


def test_a_file_comes_where_nothing_can_be_locked(server, tmp_path, monkeypatch):
    def none(*args):
        raise OSError(errno.ENOLCK, "No locks available")

    monkeypatch.setattr("fcntl.flock", none)
    fetched(KNOWN_HASH, tmp_path)


@pytest.mark.parametrize("name", [UNKNOWN_HASH, KNOWN_HASH])
def test_download_comes_once_and_says_its_licence(server, tmp_path, capsys, name):
    fetched(name, tmp_path / "deep" / "cache")
    assert PUBLISHED[name].licence in capsys.readouterr().err
    fetched(name, tmp_path / "deep" / "cache")
    assert server.asked == [None] and not capsys.readouterr().err


@pytest.mark.parametrize("name", [UNKNOWN_HASH, KNOWN_HASH])
def test_bad_answers_are_refused(server, tmp_path, name):
    server.status = 404
    refused(name, tmp_path, "HTTP 404")
    server.status, server.body, server.content_type = 200, b"<html>log in", "text/html"
    refused(name, tmp_path, "HTML" if name == UNKNOWN_HASH else "HTML page")
    server.content_type = "application/octet-stream"
    refused(name, tmp_path, "HTML" if name == UNKNOWN_HASH else "bytes")
    server.body = b"Not a published file" * 100
    refused(name, tmp_path)
    server.body = BODY[:-1000]  # whole, says the server
    refused(name, tmp_path)
    server.body = b""
    refused(name, tmp_path)
    server.body = BODY
    fetched(name, tmp_path)


def test_a_wrong_file_of_the_right_size_is_refused_where_a_hash_is_published(server, tmp_path):
    server.body = OTHER
    refused(KNOWN_HASH, tmp_path, "sha256")
    server.body = BODY
    fetched(KNOWN_HASH, tmp_path)
    assert server.asked == [None, None]  # nothing of the wrong file was kept


def test_no_server_is_one_clear_line(server, tmp_path, monkeypatch):
    monkeypatch.setenv("PMDD_MIRROR", "http://127.0.0.1:9/files")
    refused(UNKNOWN_HASH, tmp_path, "onnection")


def test_both_mirrors_are_tried(server, tmp_path, monkeypatch):
    monkeypatch.delenv("PMDD_MIRROR")
    good = f"http://127.0.0.1:{server.server_port}/files/known.pkl"
    monkeypatch.setitem(PUBLISHED, KNOWN_HASH, PublishedFile(
        "known.pkl", ("http://127.0.0.1:9/known.pkl", good), "free",
        md5=hashlib.md5(BODY).hexdigest()))
    fetched(KNOWN_HASH, tmp_path)


@pytest.mark.parametrize("name", [UNKNOWN_HASH, KNOWN_HASH])
@pytest.mark.parametrize("fault", ["cut", "stall"])
def test_an_interrupted_download_is_resumed(server, tmp_path, name, fault):
    setattr(server, fault, PART)
    refused(name, tmp_path, "ended" if fault == "cut" else "0.5 s")
    setattr(server, fault, None)
    fetched(name, tmp_path)
    assert server.asked == [None, f"bytes={PART}-"]


@pytest.mark.parametrize("name", [UNKNOWN_HASH, KNOWN_HASH])
def test_a_server_that_ignores_range_sends_the_file_afresh(server, tmp_path, name):
    server.cut = PART
    refused(name, tmp_path)
    server.cut, server.ranges = None, False
    fetched(name, tmp_path)


@pytest.mark.parametrize("if_range", [True, False])
@pytest.mark.parametrize("tag", ['"2"', None])
def test_a_file_that_changed_between_two_parts_is_never_mixed(server, tmp_path, if_range, tag):
    server.body, server.cut, server.tag = OTHER, PART, tag and '"1"'
    refused(UNKNOWN_HASH, tmp_path)
    server.body, server.cut, server.tag, server.if_range = BODY, None, tag, if_range
    fetched(UNKNOWN_HASH, tmp_path)


def test_a_mixed_file_without_version_is_caught_by_its_hash(server, tmp_path):
    server.body, server.cut, server.tag = OTHER, PART, None
    refused(KNOWN_HASH, tmp_path)
    server.body, server.cut = BODY, None
    refused(KNOWN_HASH, tmp_path, "sha256")
    fetched(KNOWN_HASH, tmp_path)


def test_a_partial_file_that_is_whole_or_too_long_starts_afresh(server, tmp_path):
    for size in (len(BODY), len(BODY) + 5):
        (tmp_path / "known.pkl.partial").write_bytes(OTHER[:1] * size)
        (tmp_path / "known.pkl").unlink(missing_ok=True)
        fetched(KNOWN_HASH, tmp_path)


def test_a_body_of_unknown_length_must_be_whole(server, tmp_path):
    server.length, server.cut = False, PART
    refused(UNKNOWN_HASH, tmp_path, "how long")
    refused(KNOWN_HASH, tmp_path)
    server.body, server.cut = BODY + b"more.", None
    refused(KNOWN_HASH, tmp_path, "more than")


def test_a_file_put_there_by_hand_is_verified(server, tmp_path):
    path = tmp_path / "known.pkl"
    path.write_bytes(BODY)
    assert download.fetch(KNOWN_HASH, tmp_path) == path
    path.write_bytes(OTHER)
    with pytest.raises(UserError, match="sha256 begins .*moved to .*rejected.*known.pkl"):
        download.fetch(KNOWN_HASH, tmp_path)
    assert not path.exists() and not server.asked


def test_a_file_that_changed_since_its_first_use_is_refused(server, tmp_path):
    path = download.fetch(UNKNOWN_HASH, tmp_path)
    record = Path(f"{path}.sha256")
    assert record.read_text() == f"{hashlib.sha256(BODY).hexdigest()}  {path.name}\n"
    path.write_bytes(OTHER)
    with pytest.raises(UserError, match="at first use"):
        download.fetch(UNKNOWN_HASH, tmp_path)
    server.body = OTHER
    refused(UNKNOWN_HASH, tmp_path, "at first use", str(record))
    record.unlink()
    Path(f"{path}.rejected").unlink()
    fetched(UNKNOWN_HASH, tmp_path, OTHER)


def test_npz_files_must_be_whole(server, tmp_path):
    buffer = io.BytesIO()
    np.savez(buffer, mu=np.zeros(4), sigma=np.zeros((4, 4)))
    server.body = buffer.getvalue()[:-50]
    refused("fid-ffhq-64x64", tmp_path, "npz")
    server.body = buffer.getvalue()
    fetched("fid-ffhq-64x64", tmp_path, server.body)


def test_two_that_fetch_at_once_download_once(server, tmp_path):
    results = []
    threads = [threading.Thread(target=lambda: results.append(
        download.fetch(UNKNOWN_HASH, tmp_path).read_bytes())) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert results == [BODY] * 4 and server.asked == [None]


def test_a_cache_that_is_a_file_is_named(server, tmp_path):
    (tmp_path / "cache").write_text("")
    with pytest.raises(UserError, match="cache/edm-.*published at"):
        download.fetch(UNKNOWN_HASH, tmp_path / "cache")


def test_a_published_network_is_downloaded_converted_and_loaded_by_name(server, tmp_path):
    golden = Path(__file__).parent / "golden" / "ddpmpp-cond-8.pkl"
    server.body = golden.read_bytes()
    network = pretrained.load_network(UNKNOWN_HASH, tmp_path)
    assert network.config["img_resolution"] == 8 and len(list(tmp_path.glob("converted/*.pt"))) == 1
