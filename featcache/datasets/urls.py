"""Data sets behind a URL: a folder in an object store, or a ``.zip``, read in place by ranges.

A folder is listed once and each image is one request; of an archive, its directory is read
first, and then each image by its own range. Nothing is kept on this machine.
"""

from __future__ import annotations

import io
from functools import cached_property
from typing import IO, Any, cast

from ..errors import DatasetError, RemoteError, one_line
from ..remote import Found, RemotePlace
from .decoding import HEAD_BYTES, MAX_FILE_BYTES, not_read
from .images import Files
from .zip import ZipArchive, opened_once

# The end of an archive: its directory's own end, of up to 65,557 bytes with a comment, what
# ZIP64 has in front of it, and of a small archive the whole directory.
_TAIL_BYTES = 1 << 17
_LAYOUT = "expected a folder of class folders or a .zip of one"


class RemoteFolder(Files):
    """Files below a folder of an object store."""

    remote = True

    def __init__(self, place: RemotePlace, too_large: dict[str, int] | None = None) -> None:
        self.place = place
        self._too_large = too_large or {}  # than an image is; nothing is known before the listing

    def __reduce__(self) -> Any:
        """Pickle the URL and the files that are too large, not the listing."""
        return RemoteFolder, (self.place, self._too_large)

    def names(self) -> list[str]:
        """List every file below."""
        return self._listing[0]

    def folders(self) -> list[str]:
        """List the folders that the store knows of; raises as `names` does."""
        return self._listing[1]

    @cached_property
    def _listing(self) -> tuple[list[str], list[str]]:
        try:
            files, folders = self.place.list_files()
        except FileNotFoundError:
            files, folders = {}, []
        if not files and not folders:
            raise DatasetError(
                f"{self.place}: {_LAYOUT}, found nothing there; check the URL, or try featcache "
                "extract digits"
            )
        for name in files:
            if name.startswith("/") or "//" in name:
                raise DatasetError(
                    f"{self.place}: expected names with something between two slashes, found "
                    f"{one_line(repr(name))}; rename or remove it"
                )
        self._too_large = {
            name: size for name, size in files.items() if size and size > MAX_FILE_BYTES
        }
        return sorted(files), sorted(folders)

    def head(self, name: str) -> bytes:
        """Return the first bytes of a file, in one request."""
        try:
            return self.place.read(name, HEAD_BYTES)
        except FileNotFoundError:
            return b""

    def read(self, name: str) -> bytes:
        """Return a file's bytes, in one request."""
        size = self._too_large.get(name)
        if size:
            why = f"{size} bytes are more than an image has; remove it"
            raise not_read(self.where(name), why)
        try:
            return self.place.read(name, MAX_FILE_BYTES)
        except FileNotFoundError:
            why = "it is not there any more; restore it, or run it again"
            raise not_read(self.where(name), why) from None

    def where(self, name: str) -> str:
        """Return where a file is, for a message."""
        return f"{str(self.place).rstrip('/')}/{name}"


class RemoteZip(ZipArchive):
    """Files inside a ``.zip`` behind a URL; no more of it is read than is asked for."""

    remote = True

    def __init__(self, place: RemotePlace) -> None:
        self.path = self._place = place
        file = place.find()
        if file is None:
            raise DatasetError(f"{place}: {_LAYOUT}, found nothing there; check the URL")
        self._size = archive_bytes(place, file)
        self._look_through(cast(IO[bytes], _Ranges(place, self._size)))

    def __reduce__(self) -> Any:
        return opened_once, (RemoteZip, self._place)

    def _read_at(self, length: int, start: int) -> bytes:
        length = min(length, self._size - start)
        try:
            return self._place.read_range(start, length) if length > 0 else b""
        except FileNotFoundError:
            raise DatasetError(
                f"{self._place}: cannot be read: it is not there any more; restore it"
            ) from None


def archive_bytes(place: RemotePlace, file: Found) -> int:
    """Return how long an archive behind a URL is."""
    if file.size_bytes is None:
        raise RemoteError(
            f"{place}: expected a server that says how long the archive is, found one that does "
            "not; download it first and name the file"
        )
    return file.size_bytes


class _Ranges(io.RawIOBase):
    """A file behind a URL, for zipfile: its end is read once, the rest by range requests."""

    def __init__(self, place: RemotePlace, size: int) -> None:
        super().__init__()
        self._place = place
        self._size = size
        self._at = 0
        self._tail_start = max(0, size - _TAIL_BYTES)
        self._tail = place.read_range(self._tail_start, size - self._tail_start) if size else b""

    def readable(self) -> bool:
        return True

    def seekable(self) -> bool:
        return True

    def seek(self, offset: int, whence: int = io.SEEK_SET) -> int:
        base = {io.SEEK_SET: 0, io.SEEK_CUR: self._at, io.SEEK_END: self._size}[whence]
        if base + offset < 0:
            raise OSError(None, "it is too short")
        self._at = base + offset
        return self._at

    def tell(self) -> int:
        return self._at

    def read(self, size: int = -1) -> bytes:
        left = max(0, self._size - self._at)
        length = left if size is None or size < 0 else min(size, left)
        if self._at >= self._tail_start:
            begin = self._at - self._tail_start
            data = self._tail[begin : begin + length]
        else:
            data = self._place.read_range(self._at, length) if length else b""
        self._at += len(data)
        return data


def open_url(place: RemotePlace) -> tuple[Files, bool]:
    """Return what is behind a URL, and whether it is a folder rather than an archive."""
    if place.suffix == ".zip":
        entry = place.find()
        if entry is None or not entry.is_folder:
            return RemoteZip(place), False
    folder = RemoteFolder(place)
    if folder.names() == [""]:  # a file, whatever it is called
        return RemoteZip(place), False
    return folder, True
