"""Files from the network, whole or not at all.

A download is written beside its destination, measured and hashed on the way,
pushed to the disk, and only then given its name, in one step. Whatever goes
wrong before that step (a closed connection, a full disk, Ctrl-C, other bytes
than promised) leaves no trace, and an earlier file of that name as it was.
"""

from __future__ import annotations

import glob
import hashlib
import os
from collections.abc import Generator, Iterator
from contextlib import closing, contextmanager
from http.client import HTTPException, IncompleteRead
from pathlib import Path
from typing import IO, Any, BinaryIO
from urllib.error import HTTPError, URLError
from urllib.parse import urlsplit
from urllib.request import (
    HTTPDefaultErrorHandler,
    HTTPErrorProcessor,
    HTTPHandler,
    HTTPRedirectHandler,
    HTTPSHandler,
    OpenerDirector,
    ProxyHandler,
    Request,
    UnknownHandler,
)

from .errors import FeatcacheError
from .progress import OnProgress, Progress, silent

_CHUNK_BYTES = 1 << 20
_TIMEOUT_S = 30  # of silence, not of the whole download
_LOCK_WAIT_S = 600


def download(
    url: str,
    destination: Path,
    *,
    error: type[FeatcacheError],
    sha256: str | None = None,
    md5: str | None = None,
    on_progress: OnProgress = silent,
    stage: str = "download",
) -> Path:
    """Fetch a file, or leave everything as it was.

    One process at a time writes to a destination. Who had to wait, and finds
    that the other one has meanwhile brought the right file, takes that.

    Parameters
    ----------
    url : str
        An http or https address; https is never left for http on the way.
    destination : Path
        Where the file goes; its folder is made if need be.
    error : type of FeatcacheError
        What to raise: `WeightsError` or `DatasetError`.
    sha256, md5 : str, optional
        Hexadecimal digests that the file must have.
    on_progress : callable
        Hears of the bytes so far, in the unit ``"B"``.
    stage : str
        What is being fetched, for a person.

    Returns
    -------
    Path
        ``destination``.

    Raises
    ------
    error
        With a `urllib.error.URLError` as its ``__cause__`` where the network
        failed, an `OSError` where the file could not be written, and none
        where bytes came but not the right ones.
    """
    if urlsplit(url).scheme not in ("http", "https"):
        raise error(f"{url}: expected an http:// or https:// address; nothing was fetched")
    checksums = {
        algorithm: digest.lower()
        for algorithm, digest in (("sha256", sha256), ("md5", md5))
        if digest is not None
    }
    try:
        was_there = destination.exists()
        destination.parent.mkdir(parents=True, exist_ok=True)
        with _only_writer(destination, error, on_progress, stage):
            arrived = destination.exists() and not was_there
            if arrived and all(file_digest(destination, a) == d for a, d in checksums.items()):
                return destination
            _sweep(destination)
            with _replacing(destination) as file:
                hashes = {algorithm: _new_hash(algorithm) for algorithm in checksums}
                with closing(_chunks(url, bool(checksums), on_progress, stage)) as chunks:
                    for chunk in chunks:
                        file.write(chunk)
                        for each in hashes.values():
                            each.update(chunk)
                for algorithm, digest in checksums.items():
                    found = hashes[algorithm].hexdigest()
                    if found != digest:
                        raise error(
                            f"{destination}: {url} sent other bytes: expected {algorithm} "
                            f"{digest}, found {found}; nothing was kept; try again, or put the "
                            "right file there by hand"
                        )
    except error:
        raise
    except URLError as failure:
        raise error(
            f"{destination}: cannot fetch {url}: {failure.reason}; nothing was kept; check the "
            "network and try again, or put the file there by hand"
        ) from failure
    except OSError as failure:
        raise error(
            f"{destination}: cannot be written ({failure.strerror or failure}); nothing was kept; "
            "make room there or choose another folder"
        ) from failure
    return destination


def file_digest(path: Path, algorithm: str = "sha256") -> str:
    """Return the hexadecimal digest of a file's bytes, read in pieces.

    Raises
    ------
    OSError
        The file cannot be read.
    """
    digest = _new_hash(algorithm)
    with path.open("rb") as file:
        while chunk := file.read(_CHUNK_BYTES):
            digest.update(chunk)
    return str(digest.hexdigest())


@contextmanager
def _replacing(destination: Path) -> Iterator[BinaryIO]:
    """Open a file that is on the disk, and then ``destination``, if the block ends well."""
    part = destination.with_name(f"{destination.name}.part-{os.getpid()}")
    try:
        with part.open("wb") as file:
            yield file
            file.flush()
            os.fsync(file.fileno())
        os.replace(part, destination)
    finally:  # on Ctrl-C too
        part.unlink(missing_ok=True)


def _new_hash(algorithm: str) -> Any:
    # MD5 compares here, it does not protect: say so, or hardened Pythons refuse it.
    return hashlib.new(algorithm, usedforsecurity=algorithm != "md5")


def _sweep(destination: Path) -> None:
    """Remove what a killed download left; the caller is the only writer."""
    for part in destination.parent.glob(f"{glob.escape(destination.name)}.part-*"):
        part.unlink(missing_ok=True)


@contextmanager
def _only_writer(
    destination: Path, error: type[FeatcacheError], on_progress: OnProgress, stage: str
) -> Iterator[None]:
    from filelock import FileLock, Timeout

    path = destination.with_name(f".{destination.name}.lock")
    lock = FileLock(path)
    try:
        lock.acquire(timeout=0)
    except Timeout:
        on_progress(Progress(stage, 0, None, "B", "another process is fetching it: waiting"))
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


def _chunks(
    url: str, checked: bool, on_progress: OnProgress, stage: str
) -> Generator[bytes, None, None]:
    """Yield the body of a response; whatever the network does wrong is a URLError."""
    request = Request(url, headers={"User-Agent": "featcache"})
    try:
        with _opener().open(request, timeout=_TIMEOUT_S) as response:
            total = response.length
            if total is None and not response.chunked and not checked:
                raise URLError("the server does not say how long it is, and no checksum is known")
            done = 0
            while chunk := response.read(_CHUNK_BYTES):
                done += len(chunk)
                on_progress(Progress(stage, done, total, "B"))
                yield chunk
            # http.client takes a connection that closes early for the end of the body.
            if total is not None and done < total:
                raise URLError(f"the connection closed after {done:,} of {total:,} bytes")
    except HTTPError as failure:
        failure.close()
        raise URLError(f"the server answers {failure.code} {failure.reason}") from failure
    except URLError:
        raise
    except IncompleteRead as failure:
        raise URLError("the connection closed early") from failure
    except (OSError, HTTPException, ValueError) as failure:
        raise URLError(str(failure) or type(failure).__name__) from failure


def _opener() -> OpenerDirector:
    # urllib's own opener also knows file: and ftp:, to which a redirect may lead.
    opener = OpenerDirector()
    for handler in (
        ProxyHandler(),
        HTTPHandler(),
        HTTPSHandler(),
        _NeverDowngrade(),
        HTTPErrorProcessor(),
        HTTPDefaultErrorHandler(),
        UnknownHandler(),
    ):
        opener.add_handler(handler)
    return opener


class _NeverDowngrade(HTTPRedirectHandler):
    """Follow redirects, but not from https to http."""

    def redirect_request(
        self, req: Request, fp: IO[bytes], code: int, msg: str, headers: Any, newurl: str
    ) -> Request | None:
        """Return the request to follow with."""
        if req.type == "https" and urlsplit(newurl).scheme != "https":
            raise URLError(f"it redirects from https to {newurl}")
        return super().redirect_request(req, fp, code, msg, headers, newurl)
