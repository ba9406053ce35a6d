"""Downloads from a real server on this machine: resume, damage, no network, nothing half-done."""

from __future__ import annotations

import gzip
import hashlib
import os
import socket
import threading
import zipfile
from collections.abc import Iterator
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import pytest

from neural.data.fetch import File, Store
from neural.data.published import FILES
from nqm.errors import NQMError
from nqm.files import locked

CONTENT = bytes(range(256)) * 4000
MD5 = hashlib.md5(CONTENT).hexdigest()


@dataclass
class Server:
    """What the server does, and what it was asked."""

    url: str = ""
    content: bytes = CONTENT
    #: bytes after which connections break, one for each request; then none does
    cuts: list[int] = field(default_factory=list)
    ranges: bool = True
    chunked: bool = False
    status: int = 200
    #: where it points to instead of answering
    moved: list[str] = field(default_factory=list)
    asked: list[str | None] = field(default_factory=list)


@pytest.fixture
def server() -> Iterator[Server]:
    state = Server()

    class Handler(BaseHTTPRequestHandler):
        def log_message(self, *_: object) -> None:
            pass

        def do_GET(self) -> None:
            wanted = self.headers.get("Range")
            state.asked.append(wanted)
            if state.moved:
                self.send_response(302)
                self.send_header("Location", state.moved.pop(0))
                self.send_header("Content-Length", "0")
                self.end_headers()
                return
            if state.status != 200:
                self.send_error(state.status)
                return
            first = int(wanted.removeprefix("bytes=").rstrip("-")) if wanted and state.ranges else 0
            total = len(state.content)
            if first >= total:
                self.send_response(416)
                self.send_header("Content-Range", f"bytes */{total}")
                self.send_header("Content-Length", "0")
                self.end_headers()
                return
            self.send_response(206 if first else 200)
            if first:
                self.send_header("Content-Range", f"bytes {first}-{total - 1}/{total}")
            if not state.chunked:
                self.send_header("Content-Length", str(total - first))
            self.end_headers()
            cut = state.cuts.pop(0) if state.cuts else total
            self.wfile.write(state.content[first : first + cut])
            self.close_connection = True

    httpd = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    thread = threading.Thread(target=httpd.serve_forever, kwargs={"poll_interval": 0.01})
    thread.start()
    state.url = f"http://127.0.0.1:{httpd.server_address[1]}/data.bin"
    yield state
    httpd.shutdown()
    httpd.server_close()
    thread.join()


@pytest.fixture(autouse=True)
def _direct(monkeypatch: pytest.MonkeyPatch) -> None:
    """A proxy of the surroundings has no part in this."""
    monkeypatch.setenv("no_proxy", "*")


@pytest.fixture
def store(tmp_path: Path) -> Store:
    return Store(tmp_path / "root", "some_set")


def published(server: Server, **changes: object) -> File:
    return File(**{"name": "data.bin", "url": server.url, "md5": MD5, **changes})  # type: ignore[arg-type]


def listing(store: Store) -> list[str]:
    return sorted(p.name for p in store.root.rglob("*") if p.is_file())


def one_line(error: pytest.ExceptionInfo[NQMError]) -> str:
    assert "\n" not in str(error.value)
    return str(error.value)


def test_fetches_once_into_the_sets_own_folder(server, store):
    path = store.get(published(server))
    assert path == store.root / "some_set" / "data.bin"
    assert path.read_bytes() == CONTENT
    assert store.get(published(server)) == path
    assert server.asked == [None], "fetched again what was there"
    assert listing(store) == ["data.bin"]


def test_a_cut_connection_is_continued(server, store):
    server.cuts = [len(CONTENT) // 2, 1000]
    assert store.get(published(server)).read_bytes() == CONTENT
    half = len(CONTENT) // 2
    assert server.asked == [None, f"bytes={half}-", f"bytes={half + 1000}-"]


def test_a_later_run_goes_on_where_the_earlier_one_stopped(server, store):
    server.cuts = [300_000, 0]  # the second attempt brings nothing: give up
    with pytest.raises(NQMError, match="could not be fetched") as caught:
        store.get(published(server))
    assert f"connection closed after 300000 of {len(CONTENT)} bytes" in one_line(caught)
    assert listing(store) == ["data.bin.part"], "a half-written file under the final name"
    assert store.get(published(server)).read_bytes() == CONTENT
    assert server.asked[-1] == "bytes=300000-"
    assert listing(store) == ["data.bin"]


def test_a_server_without_ranges_starts_over(server, store):
    server.ranges, server.cuts = False, [300_000]
    assert store.get(published(server)).read_bytes() == CONTENT
    assert server.asked == [None, "bytes=300000-"]


def test_a_server_that_always_breaks_at_one_place_is_given_up(server, store):
    server.ranges, server.cuts = False, [300_000] * 50
    with pytest.raises(NQMError, match="300000 of"):
        store.get(published(server))
    assert len(server.asked) == 2


def test_a_server_that_tells_no_length(server, store):
    server.chunked = True
    assert store.get(published(server)).read_bytes() == CONTENT


def test_what_arrived_whole_is_not_fetched_again(server, store):
    store.home.mkdir(parents=True)
    (store.home / "data.bin.part").write_bytes(CONTENT)
    assert store.get(published(server)).read_bytes() == CONTENT
    assert server.asked == [f"bytes={len(CONTENT)}-"]


def test_a_part_that_is_too_long_is_dropped(server, store):
    store.home.mkdir(parents=True)
    (store.home / "data.bin.part").write_bytes(CONTENT + b"x")
    assert store.get(published(server)).read_bytes() == CONTENT


def test_a_wrong_checksum_leaves_nothing(server, store):
    server.content = CONTENT[:-1] + b"x"
    with pytest.raises(NQMError, match="another file than was published") as caught:
        store.get(published(server))
    found = hashlib.md5(server.content).hexdigest()
    assert f"expected md5 {MD5}, found {found}" in one_line(caught)
    assert listing(store) == []
    server.content = CONTENT
    assert store.get(published(server)).read_bytes() == CONTENT, "a second run starts anew"


def test_a_part_of_another_file_is_found_out(server, store):
    store.home.mkdir(parents=True)
    (store.home / "data.bin.part").write_bytes(b"not the beginning of it")
    with pytest.raises(NQMError, match="another file than was published"):
        store.get(published(server))
    assert store.get(published(server)).read_bytes() == CONTENT


def test_without_network_one_line_says_what_to_do(store):
    with socket.socket() as free:  # a port at which nobody listens
        free.bind(("127.0.0.1", 0))
        url = f"http://127.0.0.1:{free.getsockname()[1]}/data.bin"
    with pytest.raises(NQMError) as caught:
        store.get(File("data.bin", url, MD5))
    line = one_line(caught)
    assert all(part in line for part in ("data.bin", url, str(store.home), "refused"))


@pytest.mark.parametrize("chunked", [False, True])
@pytest.mark.parametrize("have", [0, 1000])
def test_a_file_that_is_too_large_is_given_up(server, store, chunked, have):
    server.chunked = chunked
    store.home.mkdir(parents=True)
    if have:
        (store.home / "data.bin.part").write_bytes(CONTENT[:have])
    limit = len(CONTENT) - 1
    with pytest.raises(NQMError, match=f"sends more than the {limit:,} bytes") as caught:
        store.get(published(server, limit=limit))
    assert server.url in one_line(caught)
    assert listing(store) == []
    assert store.get(published(server, limit=limit + 1)).read_bytes() == CONTENT


def test_an_answer_without_an_end_stops_at_the_limit(server, store):
    server.chunked, server.content = True, bytes(64 << 20)
    with pytest.raises(NQMError, match="sends more than"):
        store.get(published(server, limit=1 << 20))
    assert listing(store) == []


def test_a_server_may_point_elsewhere_on_the_web_only(server, store, tmp_path):
    server.moved = [server.url]
    assert store.get(published(server)).read_bytes() == CONTENT
    secret = tmp_path / "secret"
    secret.write_bytes(CONTENT)
    for url in (secret.as_uri(), f"FILE://{secret}", "ftp://127.0.0.1/x", "data:,x", "x:y"):
        server.moved = [url]
        with pytest.raises(NQMError, match="could not be fetched") as caught:
            Store(tmp_path / "other", "some_set").get(published(server))
        one_line(caught)
    assert not list((tmp_path / "other").rglob("data.bin"))
    for url in (secret.as_uri(), "ftp://127.0.0.1/x", "data:,x"):
        with pytest.raises(NQMError, match="could not be fetched"):
            Store(tmp_path / "other", "some_set").get(File("data.bin", url, MD5))


def test_every_published_file_has_a_size_of_its_own():
    for files in FILES.values():
        assert all(file.limit < File("x").limit for file in files if file.url)


def test_names_are_on_the_disk_before_a_set_is_read(server, store, monkeypatch):
    done = []
    sync, replace = os.fsync, os.replace
    monkeypatch.setattr(os, "fsync", lambda handle: (done.append("sync"), sync(handle)))
    monkeypatch.setattr(os, "replace", lambda a, b: (done.append("replace"), replace(a, b)))
    store.get(published(server))
    assert done == ["sync", "replace", "sync"]


def test_two_processes_do_not_fetch_one_file(server, store):
    with locked(store.home / "data.bin"), pytest.raises(NQMError, match="being written by process"):
        store.get(published(server))
    assert store.get(published(server)).read_bytes() == CONTENT
    assert listing(store) == ["data.bin"]


def test_a_missing_page_is_named(server, store):
    server.status = 404
    with pytest.raises(NQMError, match="HTTP Error 404") as caught:
        store.get(published(server))
    assert server.url in one_line(caught)


def test_no_download_without_leave(server, store):
    closed = Store(store.root, store.name, download=False)
    with pytest.raises(NQMError, match=r"data\.bin not found in") as caught:
        closed.get(published(server))
    assert server.url in one_line(caught)
    assert server.asked == []


def test_an_unpublished_file_has_its_own_line(store):
    with pytest.raises(NQMError, match=r"no public address.*NQM_DATA") as caught:
        store.get(File("pack.npz"))
    assert str(store.home) in one_line(caught)


# -- files that are there


@pytest.mark.parametrize("folder", [".", "some_set", "some-set", "Some/raw"])
def test_finds_a_copy_in_any_usual_place(tmp_path, folder):
    (tmp_path / folder).mkdir(parents=True, exist_ok=True)
    (tmp_path / folder / "data.bin").write_bytes(CONTENT)
    store = Store(tmp_path, "some_set", ("Some/raw",), download=False)
    assert store.get(File("data.bin", md5=MD5)).samefile(tmp_path / folder / "data.bin")


def test_a_damaged_copy_is_named_and_not_overwritten(server, store):
    store.home.mkdir(parents=True)
    path = store.home / "data.bin"
    path.write_bytes(CONTENT[:-5])
    with pytest.raises(NQMError, match="delete it and run again") as caught:
        store.get(published(server))
    found = hashlib.md5(CONTENT[:-5]).hexdigest()
    assert all(part in one_line(caught) for part in (str(path), MD5, found))
    assert path.read_bytes() == CONTENT[:-5]
    assert server.asked == []


def test_another_sets_file_of_the_same_name_is_passed_over(tmp_path):
    (tmp_path / "raw").mkdir()
    (tmp_path / "data.bin").write_bytes(CONTENT)
    (tmp_path / "raw" / "data.bin").write_bytes(b"of another set")
    found = Store(tmp_path, "some_set", ("raw",)).find(File("data.bin", md5=MD5))
    assert found is not None
    assert found.read_bytes() == CONTENT


@pytest.mark.parametrize("level", [1, 9])
def test_the_content_counts_however_it_is_compressed(tmp_path, level):
    packed = gzip.compress(CONTENT, compresslevel=level)
    (tmp_path / "a.gz").write_bytes(packed)
    with zipfile.ZipFile(tmp_path / "a.zip", "w", compresslevel=level) as archive:
        archive.writestr("a", CONTENT)
    store = Store(tmp_path, "some_set")
    for name in ("a.gz", "a.zip"):
        assert store.find(File(name, md5=MD5, unpacked=True)) == tmp_path / name
    (tmp_path / "a.gz").write_bytes(packed[: len(packed) // 2])
    (tmp_path / "a.zip").write_bytes(b"no archive")
    for name in ("a.gz", "a.zip"):
        with pytest.raises(NQMError, match=f"md5 of its content {MD5}, found unreadable"):
            store.find(File(name, md5=MD5, unpacked=True))


def test_a_download_is_checked_by_its_content_too(server, store):
    server.content = gzip.compress(CONTENT)
    file = published(server, name="data.gz", unpacked=True)
    assert gzip.decompress(store.get(file).read_bytes()) == CONTENT
    server.content = gzip.compress(CONTENT + b"x")
    with pytest.raises(NQMError, match="another file than was published"):
        Store(store.root / "elsewhere", "some_set").get(file)
    assert listing(store) == ["data.gz"]
