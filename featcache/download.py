"""Files from the network, whole or not at all, by pooch.

pooch fetches into a temporary file, compares the checksum and gives the file its name. It has no
limits, so `_Fetch` reads the response: it bounds the bytes, the silence and the slowness of a
server, and refuses a redirect from https to http.
"""

from __future__ import annotations

import hashlib
import logging
import os
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from http.client import IncompleteRead
from pathlib import Path
from typing import Any
from urllib.parse import urljoin, urlsplit

from .errors import FeatcacheError
from .files import discard, refuse_links
from .progress import OnProgress, Progress, silent

_CHUNK_BYTES = 1 << 20
_TIMEOUT_S = 30.0  # to connect, and of silence
_SLOWEST_BYTES_PER_S = 10_000  # on average, once the grace is over
_GRACE_S = 60.0
_LOCK_WAIT_S = 600


class NetworkError(OSError):
    """The network or the server failed; the message is the reason alone."""


def download(
    url: str,
    destination: Path,
    *,
    error: type[FeatcacheError],
    max_bytes: int,
    sha256: str | None = None,
    md5: str | None = None,
    on_progress: OnProgress = silent,
    stage: str = "download",
) -> Path:
    """Fetch a file, or leave everything as it was.

    One process at a time writes to a destination; one that had to wait takes what the other one
    downloaded. The error has a `NetworkError` as its ``__cause__`` where the network failed,
    another `OSError` where the file could not be written, and none where the bytes were wrong.
    """
    if urlsplit(url).scheme not in ("http", "https"):
        raise error(f"{url}: expected an http:// or https:// address; nothing was fetched")
    algorithm, expected = ("md5", md5) if md5 else ("sha256", sha256)
    expected = expected.lower() if expected else None
    digest = hashlib.new(algorithm, usedforsecurity=False)
    fetch = _Fetch(digest, expected is not None, max_bytes, on_progress, stage)
    try:
        existed = destination.exists()
        destination.parent.mkdir(parents=True, exist_ok=True)
        with _only_writer(destination, error, on_progress, stage):
            arrived = destination.exists() and not existed
            if arrived and (not expected or file_digest(destination, algorithm) == expected):
                return destination
            _retrieve(url, destination, f"{algorithm}:{expected}" if expected else None, fetch)
    except ValueError:  # pooch's, for a checksum that differs
        raise error(
            f"{destination}: {url} sent other bytes: expected {algorithm} {expected}, found "
            f"{digest.hexdigest()}; nothing was kept; try again, or put the right file there "
            "by hand"
        ) from None
    except NetworkError as failure:
        raise error(
            f"{destination}: cannot fetch {url}: {failure}; nothing was kept; check the network "
            "and try again, or put the file there by hand"
        ) from failure
    except OSError as failure:
        raise error(
            f"{destination}: cannot be written ({failure.strerror or failure}); nothing was kept; "
            "make room there or choose another folder"
        ) from failure
    return destination


def file_digest(path: Path, algorithm: str = "sha256") -> str:
    """Return the hexadecimal digest of a file's bytes."""
    import pooch

    return str(pooch.file_hash(str(path), alg=algorithm))


def _retrieve(url: str, destination: Path, checksum: str | None, fetch: _Fetch) -> None:
    """Let pooch work in a folder of its own, which also holds what a killed download left."""
    import pooch

    folder = destination.with_name(f".{destination.name}.download")
    discard(folder)
    logger = pooch.get_logger()
    level = logger.level
    logger.setLevel(logging.WARNING)  # otherwise it prints to standard error
    try:
        pooch.retrieve(url, checksum, destination.name, folder, downloader=fetch)
        os.replace(folder / destination.name, destination)
    finally:  # on Ctrl-C too
        logger.setLevel(level)
        discard(folder)


@contextmanager
def _only_writer(
    destination: Path, error: type[FeatcacheError], on_progress: OnProgress, stage: str
) -> Iterator[None]:
    from filelock import FileLock, Timeout

    path = destination.with_name(f".{destination.name}.lock")
    refuse_links(path)
    lock = FileLock(path)
    try:
        lock.acquire(timeout=0)
    except Timeout:
        on_progress(Progress(stage, 0, None, "B", "waiting for another process to fetch it"))
        try:
            lock.acquire(timeout=_LOCK_WAIT_S)
        except Timeout:
            raise error(
                f"{destination}: another process has been fetching it for {_LOCK_WAIT_S} s (it "
                f"holds {path}); let it finish or stop it, then try again"
            ) from None
    try:
        yield
    finally:
        lock.release()


@dataclass(frozen=True, eq=False)
class _Fetch:
    """A downloader for `pooch.retrieve`; everything that the network does wrong is one error."""

    digest: Any
    has_checksum: bool
    max_bytes: int
    on_progress: OnProgress
    stage: str

    def __call__(self, url: str, output_file: str, _pooch: object) -> None:
        """Write the body of the response to a file, and flush it to the disk."""
        os.unlink(output_file)  # pooch's is private to its owner, which a download need not be
        with open(output_file, "xb") as file:
            for chunk in self._chunks(url):
                file.write(chunk)
                self.digest.update(chunk)
            file.flush()
            os.fsync(file.fileno())

    def _chunks(self, url: str) -> Iterator[bytes]:
        import requests
        from urllib3.exceptions import HTTPError

        began = time.monotonic()
        try:
            with requests.get(
                url,
                stream=True,
                timeout=_TIMEOUT_S,
                headers={"Accept-Encoding": "identity", "User-Agent": "featcache"},
                hooks={"response": _refuse_downgrade},
            ) as response:
                total = self._checked_total(response)
                done = 0
                # read1 returns what has arrived; read, all that urllib3 1 has, waits for a chunk.
                read = getattr(response.raw, "read1", response.raw.read)
                while chunk := read(_CHUNK_BYTES):
                    done += len(chunk)
                    if done > self.max_bytes:
                        raise NetworkError(f"it sends more than {self.max_bytes:,} bytes")
                    elapsed_s = time.monotonic() - began
                    if elapsed_s > _GRACE_S and done < elapsed_s * _SLOWEST_BYTES_PER_S:
                        raise NetworkError(f"it sent only {done:,} bytes in {elapsed_s:.0f} s")
                    self.on_progress(Progress(self.stage, done, total, "B"))
                    yield chunk
                if total is not None and done < total:
                    raise NetworkError(f"the connection closed after {done:,} of {total:,} bytes")
        except (requests.RequestException, HTTPError, ValueError) as failure:
            raise NetworkError(_reason(failure)) from failure

    def _checked_total(self, response: Any) -> int | None:
        """Return how many bytes will come, if the server says so."""
        if not response.ok:
            raise NetworkError(f"the server answers {response.status_code} {response.reason}")
        length = response.headers.get("Content-Length", "")
        if length.isdecimal():
            if int(length) > self.max_bytes:
                raise NetworkError(
                    f"expected at most {self.max_bytes:,} bytes, found {int(length):,}"
                )
            return int(length)
        if not self.has_checksum and response.headers.get("Transfer-Encoding") != "chunked":
            raise NetworkError("the server does not say how long it is, and no checksum is known")
        return None


def _refuse_downgrade(response: Any, **_: object) -> None:
    """Stop at a redirect from https to anything else; requests calls this before it follows."""
    target = urljoin(response.url, response.headers.get("Location", ""))
    if response.is_redirect and urlsplit(response.url).scheme == "https" != urlsplit(target).scheme:
        raise NetworkError(f"it redirects from https to {target}")


def _reason(failure: BaseException) -> str:
    """Return the innermost message: the outer ones repeat it among names of classes."""
    while inner := failure.__cause__ or failure.__context__:
        failure = inner
    if "timed out" in str(failure) or isinstance(failure, TimeoutError):
        return f"no answer for {_TIMEOUT_S:.0f} s"
    if isinstance(failure, IncompleteRead):
        return "the connection closed early"
    text = str(getattr(failure, "strerror", None) or failure) or type(failure).__name__
    return " ".join(text.split())
