"""A file or a folder behind a URL: listed, read whole or by ranges, fetched and sent."""

from __future__ import annotations

import hashlib
import importlib
import os
import re
from collections.abc import Callable, Generator
from contextlib import suppress
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

from ..errors import RemoteError
from ..lookahead import Stop, work_ahead
from ._errors import is_beyond_the_end, system_class, translated
from ._listing import AWS, below
from ._urls import check_no_secret, shown

__all__ = ["Found", "RemotePlace"]

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
_WEB = ("http", "https")


@dataclass(frozen=True)
class Found:
    """What a store says of a file without sending it.

    Parameters
    ----------
    is_folder : bool
        It is a folder, and the rest means nothing.
    size_bytes : int or None
        Its length, where the store says so.
    mark : str
        What tells it from another file that takes its place: an ETag, or when it was changed;
        empty where the store says neither.
    """

    is_folder: bool
    size_bytes: int | None
    mark: str


class RemotePlace:
    """A file or a folder behind a URL. Safe to use from several threads.

    Parameters
    ----------
    url : str
        As fsspec takes it, but for chains of protocols; ``located`` refuses passwords in it.

    Raises
    ------
    RemoteError
        From every method: no package for the protocol, no such bucket, no credentials, no
        permission, no answer.
    FileNotFoundError
        From every method that reads: nothing of that name.
    """

    def __init__(self, url: str) -> None:
        check_no_secret(url)
        self.url = url
        self.protocol = url.partition("://")[0].lower()
        if self.protocol in AWS and not url.partition("://")[2].partition("/")[0]:
            raise RemoteError(f"{url}: expected a bucket, found none; try s3://BUCKET/FOLDER")

    def __reduce__(self) -> Any:
        """Go to another machine by name alone: that one has credentials of its own."""
        return RemotePlace, (self.url,)

    def __eq__(self, other: object) -> bool:
        """Two are the same whose URLs are."""
        return isinstance(other, RemotePlace) and self.url == other.url

    def __hash__(self) -> int:
        """Go with equality."""
        return hash(self.url)

    def __str__(self) -> str:
        """Return the URL without its secrets."""
        return shown(self.url)

    def __repr__(self) -> str:
        """Name it."""
        return f"<RemotePlace {self}>"

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
        place = RemotePlace(f"{self.url.rstrip('/')}/{name}")
        if "_system" in self.__dict__:
            place.__dict__["_system"] = self._system  # one connection is enough
        return place

    @property
    def parent(self) -> RemotePlace:
        """The folder that it is in."""
        return RemotePlace(str(self).rstrip("/").rpartition("/")[0])

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
                found = self._system.ls(self._path, detail=False)
        except FileNotFoundError:
            return []
        return sorted(name.rstrip("/").rpartition("/")[2] for name in found)

    def list_files(self) -> tuple[dict[str, int | None], list[str]]:
        """List everything below a folder, in as few requests as the store's pages allow.

        Returns
        -------
        files : dict of str to int or None
            Path inside it, with ``/`` -> size in bytes. A file that is no folder is listed
            under the empty name.
        folders : list of str
            Paths of the folders inside, as far as the store knows any.
        """
        root = self._path.rstrip("/")
        files: dict[str, int | None] = {}
        folders: list[str] = []
        with translated(str(self), self.protocol, "listed"):
            for key, size, is_folder in below(self._system, self.protocol, root):
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
        """Return the bytes of a file inside this folder, but no more than ``most``, in one request.

        A range is asked for, whatever the file's length: without one, s3fs asks for that first.
        """
        path = f"{self._path.rstrip('/')}/{name}"
        with translated(f"{str(self).rstrip('/')}/{name}", self.protocol, "read"):
            try:
                data: bytes = self._system.cat_file(path, start=0, end=most)
            except OSError as error:
                if is_beyond_the_end(error):
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
        """Put a file here, in the place of what is here; ``on_bytes`` hears how far that is."""
        with translated(str(self), self.protocol, "written"):
            self._system.put_file(str(path), self._path, callback=_heard_by(on_bytes))

    def remove(self) -> None:
        """Remove this file, if it is there."""
        with (
            suppress(FileNotFoundError),
            translated(str(self), self.protocol, "removed"),
        ):
            self._system.rm_file(self._path)

    def check_writable(self) -> None:
        """Find out before hours of work, not after, that nothing can be put here.

        Raises
        ------
        RemoteError
            As said above, or a protocol that only reads.
        """
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
        """Return a name for a local folder that a person knows again and nothing else has."""
        text = str(self).rstrip("/")
        plain = re.sub(r"[^A-Za-z0-9_-]+", "-", text).strip("-")
        digest = hashlib.sha256(text.encode()).hexdigest()
        return f"{plain[-60:].lstrip('-')}-{digest[:12]}"

    @cached_property
    def _system(self) -> Any:
        """Fsspec's object for the store."""
        from ..frameworks import deaf_threads  # takes a tenth of the time that --help may take

        kind = system_class(self.protocol, str(self))
        with translated(str(self), self.protocol, "opened"):
            options = dict(kind._get_kwargs_from_urls(self.url))
            if self.protocol in AWS:
                given = importlib.import_module("fsspec.config").conf.get("s3", {})
                options["config_kwargs"] = {
                    "max_pool_connections": _CONNECTIONS,
                    **given.get("config_kwargs", {}),
                }
            with deaf_threads():
                # A list that is kept would hide what is put there while this process lives.
                return kind(use_listings_cache=False, **options)

    @cached_property
    def _path(self) -> str:
        """The path as fsspec's object knows it."""
        return str(self._system._strip_protocol(self.url))


def _heard_by(on_bytes: Callable[[int], None]) -> Any:
    callbacks = importlib.import_module("fsspec.callbacks")
    return callbacks.Callback(hooks={"bytes": lambda size, value, **_: on_bytes(value or 0)})
