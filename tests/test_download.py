"""Downloads from a real server on this machine: whole, checked, or without a trace."""

import hashlib
import os
import resource
import threading
from collections.abc import Iterator
from contextlib import nullcontext, suppress
from functools import partial
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import pytest
import requests

from featcache import download as module
from featcache.download import NetworkError, file_digest
from featcache.errors import DatasetError, WeightsError
from featcache.progress import Progress

BODY = bytes(range(256)) * 12_000  # 3 MB: several chunks
SHA256 = hashlib.sha256(BODY).hexdigest()
MD5 = hashlib.md5(BODY, usedforsecurity=False).hexdigest()
download = partial(module.download, max_bytes=len(BODY))


class Handler(BaseHTTPRequestHandler):
    """Answers well under /file, and in one particular wrong way under every other path."""

    def do_GET(self) -> None:
        self.server.requests.append(self.path)
        getattr(self, f"answer_{self.path[1:]}")()

    def answer(self, status: int, headers: dict[str, str], body: bytes = b"") -> None:
        self.send_response(status)
        for name, value in headers.items():
            self.send_header(name, value)
        self.end_headers()
        self.wfile.write(body)

    def answer_file(self) -> None:
        self.answer(200, {"Content-Length": str(len(BODY))}, BODY)

    def answer_slow(self) -> None:
        self.server.gate.wait(10)
        self.answer_file()

    def answer_short(self) -> None:
        self.answer(200, {"Content-Length": str(len(BODY))}, BODY[:1_500_000])

    def answer_unmeasured(self) -> None:
        self.answer(200, {}, BODY)

    def answer_chunked(self) -> None:
        self.protocol_version = "HTTP/1.1"
        body = b"%x\r\n%s\r\n0\r\n\r\n" % (len(BODY), BODY)
        self.answer(200, {"Transfer-Encoding": "chunked", "Connection": "close"}, body)

    def answer_torn(self) -> None:
        self.protocol_version = "HTTP/1.1"
        body = b"%x\r\n%s" % (len(BODY), BODY[:1000])
        self.answer(200, {"Transfer-Encoding": "chunked", "Connection": "close"}, body)

    def answer_gone(self) -> None:
        self.answer(404, {"Content-Length": "0"})

    def answer_broken(self) -> None:
        self.answer(500, {"Content-Length": "0"})

    def answer_large(self) -> None:
        self.answer(200, {"Content-Length": str(len(BODY) + 1)}, BODY + b"x")

    def answer_endless(self) -> None:
        self.protocol_version = "HTTP/1.1"
        self.answer(200, {"Transfer-Encoding": "chunked", "Connection": "close"})
        with suppress(OSError):  # the client hangs up
            while True:
                self.wfile.write(b"%x\r\n%s\r\n" % (1 << 16, bytes(1 << 16)))

    def answer_stalled(self) -> None:
        self.answer(200, {"Content-Length": str(len(BODY))}, BODY[:1000])
        self.wfile.flush()
        self.server.gate.wait(10)

    def answer_dripping(self) -> None:
        self.answer(200, {"Content-Length": str(len(BODY))})
        with suppress(OSError):
            while not self.server.gate.wait(0.01):
                self.wfile.write(b"x")

    def answer_moved(self) -> None:
        self.answer(302, {"Location": "/file", "Content-Length": "0"})

    def answer_ftp(self) -> None:
        self.answer(302, {"Location": "ftp://127.0.0.1/file", "Content-Length": "0"})

    def answer_local(self) -> None:
        self.answer(302, {"Location": "file:///etc/passwd", "Content-Length": "0"})

    def log_message(self, *_: object) -> None:
        """Say nothing."""


class Server(ThreadingHTTPServer):
    def __init__(self) -> None:
        super().__init__(("127.0.0.1", 0), Handler)
        self.requests: list[str] = []
        self.gate = threading.Event()

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.server_port}"

    def handle_error(self, *_: object) -> None:
        """A client that hangs up is what some tests are about."""


@pytest.fixture
def server(monkeypatch: pytest.MonkeyPatch) -> Iterator[Server]:
    monkeypatch.setenv("no_proxy", "*")
    with Server() as running:
        thread = threading.Thread(target=running.serve_forever, args=(0.02,))
        thread.start()
        yield running
        running.gate.set()
        running.shutdown()
        thread.join()


@pytest.fixture
def destination(tmp_path: Path) -> Path:
    return tmp_path / "new" / "file.bin"


def kept(destination: Path) -> list[str]:
    """What is in the folder, but for the lock, which stays."""
    return sorted(p.name for p in destination.parent.iterdir() if not p.name.endswith(".lock"))


def umask() -> int:
    mask = os.umask(0)
    os.umask(mask)
    return mask


def one_line(caught: pytest.ExceptionInfo[BaseException]) -> str:
    message = str(caught.value)
    assert "\n" not in message
    return message


@pytest.mark.parametrize("page", ["file", "moved", "chunked"])
@pytest.mark.parametrize("checksums", [{}, {"sha256": SHA256.upper()}, {"md5": MD5}])
def test_a_file_arrives_whole(
    server: Server, destination: Path, page: str, checksums: dict[str, str]
) -> None:
    heard: list[Progress] = []
    path = download(
        f"{server.url}/{page}",
        destination,
        error=DatasetError,
        on_progress=heard.append,
        stage="images",
        **checksums,
    )
    assert path == destination
    assert destination.read_bytes() == BODY
    assert kept(destination) == ["file.bin"]
    total = None if page == "chunked" else len(BODY)
    assert heard[-1] == Progress("images", len(BODY), total, "B")
    assert [each.done for each in heard] == sorted({each.done for each in heard})


@pytest.mark.parametrize("algorithm", ["sha256", "md5"])
def test_other_bytes_than_promised_are_not_kept(
    server: Server, destination: Path, algorithm: str
) -> None:
    destination.parent.mkdir()
    destination.write_bytes(b"earlier")
    wrong = hashlib.new(algorithm, b"other", usedforsecurity=False).hexdigest()
    with pytest.raises(WeightsError) as caught:
        download(f"{server.url}/file", destination, error=WeightsError, **{algorithm: wrong})
    message = one_line(caught)
    found = {"sha256": SHA256, "md5": MD5}[algorithm]
    for part in (str(destination), server.url, wrong, found, "nothing was kept"):
        assert part in message
    assert caught.value.__cause__ is None
    assert kept(destination) == ["file.bin"]
    assert destination.read_bytes() == b"earlier"


@pytest.mark.parametrize(
    ("page", "reason"),
    [
        ("short", "the connection closed early"),
        ("torn", "the connection closed early"),
        ("gone", "the server answers 404 Not Found"),
        ("broken", "the server answers 500 Internal Server Error"),
        ("ftp", "No connection adapters were found for 'ftp://127.0.0.1/file'"),
        ("local", "No connection adapters were found for 'file:///etc/passwd'"),
        ("large", "expected at most 3,072,000 bytes, found 3,072,001"),
        ("endless", "it sends more than 3,072,000 bytes"),
        ("unmeasured", "does not say how long it is"),
    ],
)
def test_a_failing_network_leaves_nothing(
    server: Server, destination: Path, page: str, reason: str
) -> None:
    with pytest.raises(DatasetError) as caught:
        download(f"{server.url}/{page}", destination, error=DatasetError)
    message = one_line(caught)
    for part in (str(destination), f"{server.url}/{page}", reason, "try again"):
        assert part in message
    assert isinstance(caught.value.__cause__, NetworkError)
    assert kept(destination) == []


def test_a_checksum_makes_up_for_an_unknown_length(server: Server, destination: Path) -> None:
    download(f"{server.url}/unmeasured", destination, error=WeightsError, sha256=SHA256)
    assert destination.read_bytes() == BODY


def test_no_network(server: Server, destination: Path) -> None:
    url = f"{server.url}/file"
    server.shutdown()
    server.server_close()
    with pytest.raises(WeightsError, match="Connection refused"):
        download(url, destination, error=WeightsError)
    assert kept(destination) == []


@pytest.mark.parametrize("url", ["file:///etc/passwd", "ftp://host/file", "file.bin", ""])
def test_only_http(destination: Path, url: str) -> None:
    with pytest.raises(WeightsError, match="expected an http:// or https:// address"):
        download(url, destination, error=WeightsError)
    assert not destination.parent.exists()


@pytest.mark.parametrize(
    ("page", "limit", "value", "reason"),
    [
        ("stalled", "_TIMEOUT_S", 0.2, "no answer for 0 s"),
        ("slow", "_TIMEOUT_S", 0.2, "no answer for 0 s"),
        ("dripping", "_GRACE_S", 0.2, r"it sent only [\d]+ bytes in 0 s"),
    ],
)
def test_a_server_that_stalls_is_left(
    server: Server,
    destination: Path,
    monkeypatch: pytest.MonkeyPatch,
    page: str,
    limit: str,
    value: float,
    reason: str,
) -> None:
    monkeypatch.setattr(module, limit, value)
    with pytest.raises(WeightsError, match=reason) as caught:
        download(f"{server.url}/{page}", destination, error=WeightsError)
    one_line(caught)
    assert isinstance(caught.value.__cause__, NetworkError)
    assert kept(destination) == []


@pytest.mark.parametrize(
    ("begin", "target", "refused"),
    [
        ("https://host/file", "http://other/file", True),
        ("https://host/file", "//other/file", False),
        ("http://host/file", "https://other/file", False),
    ],
)
def test_https_is_not_left_for_http(begin: str, target: str, refused: bool) -> None:
    response = requests.Response()
    response.url, response.status_code = begin, 302
    response.headers["Location"] = target
    with (
        pytest.raises(NetworkError, match="from https to http://other")
        if refused
        else nullcontext()
    ):
        module._refuse_downgrade(response)


def test_ctrl_c_leaves_nothing(server: Server, destination: Path) -> None:
    destination.parent.mkdir()
    destination.write_bytes(b"earlier")

    def interrupt(progress: Progress) -> None:
        if progress.done > len(BODY) // 2:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        download(f"{server.url}/file", destination, error=WeightsError, on_progress=interrupt)
    assert kept(destination) == ["file.bin"]
    assert destination.read_bytes() == b"earlier"


def test_what_a_killed_download_left_is_removed(server: Server, destination: Path) -> None:
    (destination.parent / ".file.bin.download").mkdir(parents=True)
    (destination.parent / ".file.bin.download" / "tmp1").write_bytes(b"half")
    download(f"{server.url}/file", destination, error=WeightsError)
    assert kept(destination) == ["file.bin"]
    assert destination.stat().st_mode & 0o777 == 0o666 & ~umask()


def test_links_with_the_names_of_hidden_files_are_not_followed(
    server: Server, destination: Path, tmp_path: Path
) -> None:
    precious = tmp_path / "precious"
    precious.mkdir()
    (precious / "file.bin").write_bytes(b"mine")
    destination.parent.mkdir(parents=True)
    (destination.parent / ".file.bin.download").symlink_to(precious)
    download(f"{server.url}/file", destination, error=WeightsError)
    assert destination.read_bytes() == BODY and kept(destination) == ["file.bin"]
    lock = destination.parent / ".file.bin.lock"
    lock.unlink(missing_ok=True)
    lock.symlink_to(precious / "file.bin")
    with pytest.raises(WeightsError, match="found a symbolic link"):
        download(f"{server.url}/file", destination, error=WeightsError)
    assert [(path.name, path.read_bytes()) for path in precious.iterdir()] == [
        ("file.bin", b"mine")
    ]


def test_of_two_at_once_one_downloads(server: Server, destination: Path) -> None:
    waiting = threading.Event()
    errors: list[BaseException] = []

    def hear(progress: Progress) -> None:
        if "waiting" in progress.note:
            waiting.set()

    def run() -> None:
        try:
            download(f"{server.url}/slow", destination, error=WeightsError, on_progress=hear)
        except BaseException as failure:
            errors.append(failure)

    threads = [threading.Thread(target=run) for _ in range(2)]
    for thread in threads:
        thread.start()
    assert waiting.wait(10)
    server.gate.set()
    for thread in threads:
        thread.join(10)
    assert errors == []
    assert server.requests == ["/slow"]
    assert destination.read_bytes() == BODY


def test_a_folder_that_cannot_be_made(server: Server, tmp_path: Path) -> None:
    (tmp_path / "file").write_bytes(b"")
    destination = tmp_path / "file" / "folder" / "file.bin"
    with pytest.raises(WeightsError, match="cannot be written") as caught:
        download(f"{server.url}/file", destination, error=WeightsError)
    assert str(destination) in one_line(caught)
    assert server.requests == []


def test_a_full_disk(server: Server, destination: Path) -> None:
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (1_000_000, hard))
    try:
        with pytest.raises(WeightsError, match="File too large") as caught:
            download(f"{server.url}/file", destination, error=WeightsError)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    assert "make room" in one_line(caught)
    assert kept(destination) == []


def test_file_digest(tmp_path: Path) -> None:
    path = tmp_path / "body"
    path.write_bytes(BODY)
    assert file_digest(path) == SHA256
    assert file_digest(path, "md5") == MD5
