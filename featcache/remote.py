"""Files and folders behind a URL, by fsspec, and URLs without their secrets."""

from __future__ import annotations

import hashlib
import importlib
import os
import re
from collections.abc import Callable, Generator, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from functools import cached_property
from importlib.util import find_spec
from pathlib import Path
from typing import Any
from urllib.parse import unquote, urlsplit

from .errors import FeatcacheError, RemoteError, one_line
from .files import user_path
from .process import Stop, new_threads_ignore_ctrl_c, work_ahead

_URL = re.compile(r"([A-Za-z][A-Za-z0-9+.-]+)://")  # two letters at least: C: is a drive
_CUT_SHORT = re.compile(r"[a-z][a-z0-9+.-]+:/[^/]")  # what pathlib makes of a URL
_IN_TEXT = re.compile(r"([A-Za-z][A-Za-z0-9+.-]+://)(?:[^\s/'\"]*@)?([^\s/?#'\")]*)[^\s'\")]*")
_WEB = ("http", "https")


def is_url(text: object) -> bool:
    """Tell whether this is a URL, ``file://`` too, and no path."""
    return isinstance(text, str) and bool(_URL.match(text))


def located(text: str | Path) -> Path | RemotePlace:
    """Return a path, or the place behind a URL; ``file://`` is a path."""
    if isinstance(text, Path) or not is_url(text):
        path = user_path(text)
        if isinstance(text, Path) and _CUT_SHORT.match(str(text)) and not path.exists():
            raise RemoteError(
                f"{text}: expected a URL as text, found a pathlib.Path, which makes one slash of "
                "two; give it as a str"
            )
        return path
    parts = urlsplit(text)
    if parts.scheme.lower() == "file":
        return Path(unquote(parts.path))
    return RemotePlace(text)


def _check_no_secret(url: str) -> None:
    """Refuse a URL with a password: it would stay in histories, records and logs."""
    protocol = url.partition("://")[0].lower()
    if _secret(url):
        names = (
            "AWS_ACCESS_KEY_ID and AWS_SECRET_ACCESS_KEY, or AWS_PROFILE"
            if protocol in ("s3", "s3a")
            else f"FSSPEC_{protocol.upper()}_USERNAME and FSSPEC_{protocol.upper()}_PASSWORD"
        )
        raise RemoteError(
            f"{shown(url)}: expected a URL without credentials, found a password or a token in "
            f"it, which would end up in histories and logs; set {names} instead"
        )


def _secret(url: str) -> bool:
    """Tell whether a password stands before the host, or in a web address anything does."""
    who, at, _ = _host(url).rpartition("@")
    return bool(at) and (":" in who or url.partition("://")[0].lower() in _WEB)


def shown(url: str | Path) -> str:
    """Return a URL as it may be printed and stored; a path as it is.

    Without a password before the host, and without the query of a web address, which is where
    signed ones have their signature.
    """
    if not isinstance(url, str) or not is_url(url):
        return str(url)
    protocol, _, rest = url.partition("://")
    if _secret(url):
        host = _host(url)
        rest = host.rpartition("@")[2] + rest[len(host) :]
    if protocol.lower() in _WEB:
        rest = re.split(r"[?#]", rest, maxsplit=1)[0]
    return f"{protocol}://{rest}"


def without_secrets(text: str) -> str:
    """Return a message of a library with every URL in it cut to its host."""
    return _IN_TEXT.sub(r"\1\2", text)


def _host(url: str) -> str:
    return re.split(r"[/?#]", url.partition("://")[2], maxsplit=1)[0]


# An S3 client keeps 10 connections; one thread each is what reading images waits for.
_CONNECTIONS = 64
# What stores call the mark that changes with a file's content, the best first.
_MARKS = (
    "ETag",
    "etag",
    "content_md5",
    "md5Hash",
    "LastModified",
    "last_modified",
    "mtime",
    "created",
)
_CHUNK_BYTES = 16 << 20
_MAX_PAGE_BYTES = 64 << 20  # of a folder's listing on a web server


@dataclass(frozen=True)
class Found:
    """What a store says of a file without sending it."""

    is_folder: bool  # if so, the rest means nothing
    size_bytes: int | None  # None where the store does not say
    # Changes with the content: an ETag or the time of the last change; empty where unknown.
    mark: str


@dataclass(frozen=True, repr=False)
class RemotePlace:
    """A file or a folder behind a URL. Safe to use from several threads."""

    url: str

    def __post_init__(self) -> None:
        """Refuse a URL with a password, or without a bucket."""
        _check_no_secret(self.url)
        if self.protocol in AWS and not self.url.partition("://")[2].partition("/")[0]:
            raise RemoteError(f"{self.url}: expected a bucket, found none; try s3://BUCKET/FOLDER")

    def __reduce__(self) -> Any:
        """Pickle the URL alone: another machine has credentials of its own."""
        return RemotePlace, (self.url,)

    def __str__(self) -> str:
        """Return the URL without its secrets."""
        return shown(self.url)

    def __repr__(self) -> str:
        """Name it."""
        return f"<RemotePlace {self}>"

    @property
    def protocol(self) -> str:
        """The part before ``://``, lower case."""
        return self.url.partition("://")[0].lower()

    @property
    def name(self) -> str:
        """The last part of its path."""
        return str(self).partition("://")[2].rstrip("/").rpartition("/")[2]

    @property
    def suffix(self) -> str:
        """The end of its name, lower case: ``".zip"``."""
        return os.path.splitext(self.name)[1].lower()

    @property
    def is_read_only(self) -> bool:
        """Whether nothing can be put there: a web server."""
        return self.protocol in _WEB

    def within(self, name: str) -> RemotePlace:
        """Return the place of a file inside this folder."""
        path, query = self._split_query()
        place = RemotePlace(f"{path.rstrip('/')}/{name}{query}")
        if "_system" in self.__dict__:
            place.__dict__["_system"] = self._system  # one connection is enough
        return place

    @property
    def parent(self) -> RemotePlace:
        """The folder that it is in."""
        path, query = self._split_query()
        return RemotePlace(path.rstrip("/").rpartition("/")[0] + query)

    def _split_query(self) -> tuple[str, str]:
        """Return the URL up to the query of a web address, and the query, which may sign it."""
        start = re.search(r"[?#]", self.url) if self.is_read_only else None
        return (self.url[: start.start()], self.url[start.start() :]) if start else (self.url, "")

    def find(self) -> Found | None:
        """Return what the store says of it; None where there is nothing."""
        try:
            with translated(str(self), self.protocol, "read"):
                info = self._system.info(self._path)
        except FileNotFoundError:
            return None
        marks = (str(info[name]) for name in _MARKS if info.get(name) is not None)
        size = info.get("size")
        return Found(
            info.get("type") == "directory", None if size is None else int(size), next(marks, "")
        )

    def names(self) -> list[str]:
        """Return what is directly inside a folder; nothing where there is none."""
        try:
            with translated(str(self), self.protocol, "listed"):
                paths = self._system.ls(self._path, detail=False)
        except FileNotFoundError:
            return []
        return sorted(name.rstrip("/").rpartition("/")[2] for name in paths)

    def list_files(self) -> tuple[dict[str, int | None], list[str]]:
        """List everything below a folder, in as few requests as the store's pages allow."""
        root = self._path.rstrip("/")
        files: dict[str, int | None] = {}
        folders: list[str] = []
        with translated(str(self), self.protocol, "listed"):
            for key, size, is_folder in _below(self._system, self.protocol, root):
                if key.rstrip("/") == root:
                    if not is_folder:
                        files[""] = size
                elif key.startswith(f"{root}/"):
                    inside = key[len(root) + 1 :]
                    if is_folder:
                        folders.append(inside.rstrip("/"))
                    else:
                        files[inside] = size
        return files, folders

    def read(self, name: str, most: int) -> bytes:
        """Return at most ``most`` bytes of a file inside this folder, in one request.

        Always a range request: without a range, s3fs first asks for the file's length.
        """
        web = self.is_read_only
        path = self.within(name)._path if web else f"{self._path.rstrip('/')}/{name}"
        with translated(f"{str(self).rstrip('/')}/{name}", self.protocol, "read"):
            try:
                data: bytes = self._system.cat_file(path, start=0, end=most)
            except OSError as error:
                if _codes(error) & _BEYOND_THE_END:  # of an empty file
                    return b""
                raise
        return data[:most]

    def read_range(self, start: int, length: int) -> bytes:
        """Return so many bytes of this file from ``start`` on, fewer at its end."""
        with translated(str(self), self.protocol, "read"):
            data: bytes = self._system.cat_file(self._path, start=start, end=start + length)
        if len(data) > length:
            raise RemoteError(
                f"{self}: expected a server that sends parts of a file, found one that sends all "
                "of it; download it first and name the file"
            )
        return data

    def chunks(self, size_bytes: int, threads: int = 4) -> Generator[bytes, None, None]:
        """Yield the bytes of this file in order, read ahead by threads; close it to end them."""
        starts = range(0, size_bytes, _CHUNK_BYTES)

        def read(start: int, stop: Stop) -> bytes:
            length = min(_CHUNK_BYTES, size_bytes - start)
            data = b"" if stop.is_set() else self.read_range(start, length)
            if len(data) < length and not stop.is_set():
                raise RemoteError(
                    f"{self}: expected {size_bytes} bytes, found that it ends early: it changed "
                    "meanwhile; run it again"
                )
            return data

        if threads > 1:
            yield from work_ahead(read, starts, workers=threads, ahead=threads)
        else:
            yield from (read(start, Stop()) for start in starts)

    def send(self, path: Path, on_bytes: Callable[[int], None]) -> None:
        """Upload a file to this place; call ``on_bytes`` with the bytes so far."""
        with translated(str(self), self.protocol, "written"):
            callbacks = importlib.import_module("fsspec.callbacks")
            hooks = {"bytes": lambda size, value, **_: on_bytes(value or 0)}
            self._system.put_file(str(path), self._path, callback=callbacks.Callback(hooks=hooks))

    def remove(self) -> None:
        """Remove this file, if it is there."""
        with (
            suppress(FileNotFoundError),
            translated(str(self), self.protocol, "removed"),
        ):
            self._system.rm_file(self._path)

    def check_writable(self) -> None:
        """Fail before hours of work if this place cannot be written."""
        if self.is_read_only:
            raise RemoteError(
                f"{self}: expected a place that can be written, found a web server; name a path, "
                "or an object store such as s3://"
            )
        trial = self.parent.within(f".{self.name}.test")
        try:
            with translated(str(self), self.protocol, "written"):
                self._system.pipe_file(trial._path, b"")
        except FileNotFoundError:
            raise RemoteError(
                f"{self}: cannot be written: expected the folder {self.parent}, found none; make "
                "it or name another"
            ) from None
        with suppress(RemoteError):  # who may write need not be allowed to remove
            trial.remove()

    def as_file_name(self) -> str:
        """Return a readable, unique name for a local folder."""
        text = str(self).rstrip("/")
        plain = re.sub(r"[^A-Za-z0-9_-]+", "-", text).strip("-")
        digest = hashlib.sha256(text.encode()).hexdigest()
        return f"{plain[-60:].lstrip('-')}-{digest[:12]}"

    @cached_property
    def _system(self) -> Any:
        """Fsspec's object for the store."""
        kind = system_class(self.protocol, str(self))
        with translated(str(self), self.protocol, "opened"):
            options = dict(kind._get_kwargs_from_urls(self.url))
            if self.protocol in AWS:
                given = importlib.import_module("fsspec.config").conf.get("s3", {})
                options["config_kwargs"] = {
                    "max_pool_connections": _CONNECTIONS,
                    **given.get("config_kwargs", {}),
                }
            if self.is_read_only:
                options["client_kwargs"] = _web_client()
            with new_threads_ignore_ctrl_c():
                # A list that is kept would hide what is put there while this process lives.
                return kind(use_listings_cache=False, **options)

    @cached_property
    def _path(self) -> str:
        """The path as fsspec's object knows it."""
        return str(self._system._strip_protocol(self.url))


def _web_client() -> dict[str, Any]:
    """Return limits for aiohttp: on silence, and to the bytes that were asked for."""
    aiohttp = importlib.import_module("aiohttp")

    class Bounded(aiohttp.ClientResponse):  # type: ignore[name-defined]
        _body: bytes | None = None

        async def read(self) -> bytes:
            if self._body is None:
                asked = re.fullmatch(
                    r"bytes=(\d+)-(\d+)", self.request_info.headers.get("Range", "")
                )
                most = int(asked[2]) - int(asked[1]) + 1 if asked else _MAX_PAGE_BYTES
                parts, done = [], 0
                async for part in self.content.iter_chunked(1 << 20):
                    parts.append(part)
                    done += len(part)
                    if done > most:
                        self.close()
                        raise RemoteError(
                            f"{shown(str(self.url))}: expected a server that sends parts of a "
                            f"file, at most {most:,} bytes of it, found one that sends more; "
                            "download it first and name the file"
                        )
                self._body = b"".join(parts)
            return self._body

    timeout = aiohttp.ClientTimeout(None, sock_connect=_CONNECT_S, sock_read=_SILENCE_S)
    return {"timeout": timeout, "response_class": Bounded}


AWS = ("s3", "s3a")


def _below(system: Any, protocol: str, root: str) -> Iterator[tuple[str, int | None, bool]]:
    """Yield path, size and whether it is a folder of everything below a folder.

    fsspec returns a dict for each file, 1.7 kB of them together, so that a million would take 2
    GB. An S3 client is asked for one page of names after the other instead.
    """
    if protocol not in AWS:
        for key, info in system.find(root, withdirs=True, detail=True).items():
            yield key, info.get("size"), info.get("type") == "directory" or key.endswith("/")
        return
    bucket, _, prefix = root.partition("/")
    asked = {"Bucket": bucket, "Prefix": f"{prefix}/" if prefix else ""}
    nothing = True
    while True:
        page = system.call_s3("list_objects_v2", **asked)
        for item in page.get("Contents", ()):
            nothing = False
            key = item["Key"]
            yield f"{bucket}/{key}", item["Size"], key.endswith("/")
        if not page.get("IsTruncated"):
            break
        asked["ContinuationToken"] = page["NextContinuationToken"]
    if nothing and prefix:
        info = system.info(root)
        if info["type"] != "directory":
            yield root, info["size"], False


_PACKAGES = {
    "abfs": "adlfs",
    "abfss": "adlfs",
    "az": "adlfs",
    "gcs": "gcsfs",
    "gs": "gcsfs",
    "hf": "huggingface_hub",
    "http": "aiohttp",
    "https": "aiohttp",
    "sftp": "paramiko",
    "ssh": "paramiko",
}
# By name, since the packages that define them need not be installed.
_NO_CREDENTIALS = frozenset(
    (
        "ClientAuthenticationError",
        "CredentialRetrievalError",
        "DefaultCredentialsError",
        "NoAuthTokenError",
        "NoCredentialsError",
        "PartialCredentialsError",
        "ProfileNotFound",
        "SSOTokenLoadError",
        "TokenRetrievalError",
        "UnauthorizedSSOTokenError",
    )
)
_REFUSED = frozenset(
    (
        "401",
        "403",
        "AccessDenied",
        "AllAccessDisabled",
        "ExpiredToken",
        "Forbidden",
        "InvalidAccessKeyId",
        "InvalidToken",
        "SignatureDoesNotMatch",
        "Unauthorized",
    )
)
_ABSENT = {"404", "410"}
_BEYOND_THE_END = {"416", "InvalidRange"}
_MAX_REASON = 200
_CONNECT_S, _SILENCE_S = 30, 60  # of a web server; fsspec's own limit is on a whole transfer


def system_class(protocol: str, where: str) -> Any:
    """Return fsspec's class for a protocol."""
    is_aws = protocol in AWS
    try:
        fsspec = importlib.import_module("fsspec")
        return fsspec.get_filesystem_class(protocol)
    except ImportError as error:
        otherwise = _PACKAGES.get(protocol, "the package that fsspec names for it")
        missing = "'featcache[s3]'" if is_aws else otherwise
        also = "" if is_aws or find_spec("fsspec") else "fsspec "
        raise RemoteError(
            f"{where}: cannot be opened: {_reason(error)}; run pip install {also}{missing}"
        ) from None
    except ValueError:
        raise RemoteError(
            f"{where}: expected a URL of a protocol that fsspec knows (s3, gs, az, https, sftp, …),"
            f" found {protocol!r}; correct it, or name a path"
        ) from None


@contextmanager
def translated(where: str, protocol: str, done: str) -> Iterator[None]:
    """Turn any error of a request into one line.

    ``FileNotFoundError`` passes, so that callers can name what they expected; a missing bucket
    is a `RemoteError`.
    """
    try:
        yield
    except FeatcacheError:
        raise
    except Exception as error:  # every package raises errors of its own
        causes, codes = _causes(error), _codes(error)
        if "NoSuchBucket" in codes or "bucket does not exist" in str(error):
            advice = f"check its name{_endpoint(protocol)}"
            raise RemoteError(
                f"{where}: cannot be {done}: expected a bucket of that name, found none; {advice}"
            ) from None
        # fsspec names every failure of a web server so, and keeps the server's own as its cause.
        failed = [cause for cause in causes if not isinstance(cause, FileNotFoundError)]
        if isinstance(error, FileNotFoundError) and (
            protocol not in _WEB or not failed or codes & _ABSENT
        ):
            raise FileNotFoundError(where) from None
        reason = _reason(failed[0] if isinstance(error, FileNotFoundError) else error)
        kinds = {type(cause).__name__ for cause in causes}
        if kinds & _NO_CREDENTIALS:
            raise RemoteError(
                f"{where}: cannot be {done}: expected credentials, found none that can be used "
                f"({reason}); {_how_to_log_in(protocol)}"
            ) from None
        if codes & _REFUSED or isinstance(error, PermissionError):
            raise RemoteError(
                f"{where}: cannot be {done}: expected the right to do so, found that the server "
                f"refuses it ({reason}); {_how_to_log_in(protocol)}"
            ) from None
        raise RemoteError(
            f"{where}: cannot be {done}: {reason}; check the URL and the network"
            f"{_endpoint(protocol)}, and run it again"
        ) from None


def _how_to_log_in(protocol: str) -> str:
    if protocol in AWS:
        return (
            "set AWS_PROFILE, or AWS_ACCESS_KEY_ID and AWS_SECRET_ACCESS_KEY (FSSPEC_S3_ANON=true "
            "for a public bucket), and AWS_ENDPOINT_URL for another store than Amazon's"
        )
    return (
        "log in the way its package wants it, or set its options as "
        f"FSSPEC_{protocol.upper()}_OPTION=value"
    )


def _endpoint(protocol: str) -> str:
    return ", or AWS_ENDPOINT_URL for another store than Amazon's" if protocol in AWS else ""


def _causes(error: BaseException | None) -> list[BaseException]:
    causes: list[BaseException] = []
    while error is not None and error not in causes:
        causes.append(error)
        error = error.__cause__ or error.__context__
    return causes


def _codes(error: BaseException) -> set[str]:
    """Return what a server called it: botocore keeps it in a response, aiohttp in a status."""
    codes = set()
    for cause in _causes(error):
        response = getattr(cause, "response", None)
        if isinstance(response, dict):
            codes.add(str(response.get("Error", {}).get("Code", "")))
        else:
            codes.add(str(getattr(cause, "status", "")))
    return codes


def _reason(error: BaseException) -> str:
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    message = without_secrets(lines[0]) if lines else ""
    name = type(error).__name__
    status = getattr(error, "status", None)
    if status:  # aiohttp's own text repeats the address
        return one_line(f"{status} {getattr(error, 'message', '')}").strip()
    if "timeout" in name.lower() and not message:
        message = f"no answer for {_SILENCE_S} s"
    text = message if isinstance(error, (OSError, ImportError)) else ""
    text = text or f"{name}: {message}"
    return text[:_MAX_REASON].rstrip(" .:")
