"""Images inside a ``.zip``, read in place: nothing is ever extracted.

The standard library reads the directory of the archive. The files themselves are read here,
since its ``ZipFile`` has one position for all threads and spends more time per small file
than the decoder does. No archive is trusted: sizes, places and names are checked
before they are used.

The layout is that of PKWARE's APPNOTE 6.3, sections 4.3.7 and 4.4:
https://pkware.cachefly.net/webdocs/casestudies/APPNOTE.TXT
"""

from __future__ import annotations

import os
import struct
import threading
import weakref
import zipfile
import zlib
from collections.abc import Callable
from functools import lru_cache
from operator import attrgetter
from pathlib import Path
from typing import IO, Any

import numpy as np

from ..errors import DatasetError
from ..remote import RemotePlace
from .decoding import HEAD_BYTES, MAX_FILE_BYTES, is_image, not_read
from .images import Files

# Before a file's data stands its local header: a signature, version, flags, method, time,
# date, CRC, two sizes, the lengths of name and extra field; then these two.
_HEADER = struct.Struct("<4s5H3I2H")
_SIGNATURE = b"PK\x03\x04"
_MAX_EXTRA = 0xFFFF
_LARGE = 1 << 24  # bytes from which on a file that is no image is not unpacked
_STORED, _DEFLATED = zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED
_ENCRYPTED = 0x1 | 0x40 | 0x2000  # the password itself, strong encryption, a masked directory
_UTF8 = 0x800

# What the directory says of a file; "room" is how far it is to whatever comes next.
_MEMBER = np.dtype(
    [(name, np.int64) for name in ("start", "packed", "size", "crc", "flags", "method", "room")]
)
_FIELDS = attrgetter(
    "header_offset", "compress_size", "file_size", "CRC", "flag_bits", "compress_type"
)
# What a damaged directory makes zipfile and this module raise.
_DAMAGE_ERRORS = (
    zipfile.BadZipFile,
    OSError,
    ValueError,
    ArithmeticError,
    LookupError,
    EOFError,
    NotImplementedError,
    struct.error,
)
_DAMAGED = "the archive is damaged: download it again"

_TURN = threading.Lock()


def _read_at(file: int, length: int, start: int) -> bytes:
    """Read at a place; one thread at a time where a file has one position for all (Windows)."""
    if hasattr(os, "pread"):
        return os.pread(file, length, start)
    with _TURN:
        os.lseek(file, start, os.SEEK_SET)
        return os.read(file, length)


class _UnfitError(Exception):
    """Why a file cannot be read, and what to do."""


class ZipArchive(Files):
    """Files inside a ``.zip``."""

    def __init__(self, path: Path) -> None:
        self.path: Path | RemotePlace = path
        try:
            self._file = os.open(path, os.O_RDONLY | getattr(os, "O_BINARY", 0))
        except OSError as error:
            raise DatasetError(
                f"{path}: cannot be read: {error.strerror}; make it readable or name another"
            ) from None
        weakref.finalize(self, os.close, self._file)
        with open(self._file, "rb", closefd=False) as stream:
            self._look_through(stream)

    def _look_through(self, stream: IO[bytes]) -> None:
        """Read the archive's directory."""
        try:
            names, self._spelled, self._members = _directory(stream)
        except _DAMAGE_ERRORS as error:
            raise DatasetError(
                f"{self.path}: expected a folder or a .zip of class folders, found a file that is "
                f"not a readable zip archive ({error}); give the folder itself, or download it "
                "again"
            ) from None
        self._rows = {name: row for row, name in enumerate(names)}
        self._names = sorted(name for name in names if not name.endswith("/"))
        self._folders = sorted(name.rstrip("/") for name in names if name.endswith("/"))

    def __reduce__(self) -> Any:
        assert isinstance(self.path, Path)
        return opened_once, (ZipArchive, self.path.absolute())

    def names(self) -> list[str]:
        """List every file inside; one that is there twice, twice."""
        return self._names

    def folders(self) -> list[str]:
        """List the folders that have an entry of their own."""
        return self._folders

    def read(self, name: str) -> bytes:
        """Return a file's bytes; its CRC is checked.

        Safe from several threads: every call reads at its own place in the archive.
        """
        try:
            return self._read(name)
        except _UnfitError as error:
            raise not_read(self.where(name), error) from None
        except (OSError, zlib.error) as error:
            raise not_read(self.where(name), f"{error}; {_DAMAGED}") from None

    def status(self, name: str) -> os.stat_result:
        """Return the size and times of the whole archive: no file in it changes without it."""
        return os.fstat(self._file)

    def where(self, name: str) -> str:
        """Say where a file is, for a message."""
        return f"{self.path}!{name}"

    def _read_at(self, length: int, start: int) -> bytes:
        return _read_at(self._file, length, start)

    def _read(self, name: str) -> bytes:
        start, packed, size, crc, flags, method, room = self._members[self._rows[name]].item()
        if flags & _ENCRYPTED:
            raise _UnfitError("it is encrypted; pack the archive again without a password")
        if method not in (_STORED, _DEFLATED):
            raise _UnfitError(
                f"expected it stored or deflated, found compression method {method}; pack the "
                "archive again as a plain zip"
            )
        if max(size, packed) > MAX_FILE_BYTES:
            raise _UnfitError(
                f"expected at most {MAX_FILE_BYTES} bytes, found {max(size, packed)}; no image is "
                "so large, remove it"
            )
        spelled = self._spelled.get(name, name).encode("utf-8" if flags & _UTF8 else "cp437")
        longest = _HEADER.size + len(spelled) + _MAX_EXTRA + packed
        block = self._read_at(min(room, longest), start)
        if len(block) < _HEADER.size:
            raise _UnfitError(f"its entry overlaps another one; {_DAMAGED}")
        signature, _, _, local_method, *_, name_bytes, extra_bytes = _HEADER.unpack_from(block)
        begin = _HEADER.size + name_bytes
        if (signature, local_method, block[_HEADER.size : begin]) != (_SIGNATURE, method, spelled):
            raise _UnfitError(f"another file stands where the directory says it is; {_DAMAGED}")
        begin += extra_bytes
        if begin + packed > len(block):
            raise _UnfitError(f"it ends early or overlaps another entry; {_DAMAGED}")
        data = block[begin : begin + packed]
        if method == _DEFLATED:
            if size > _LARGE:
                head = zlib.decompressobj(-zlib.MAX_WBITS).decompress(data, HEAD_BYTES)
                if not is_image(head):
                    raise _UnfitError(f"{size} bytes that do not begin as an image; remove it")
            # One byte more than announced is enough to find out that there are more.
            data = zlib.decompressobj(-zlib.MAX_WBITS).decompress(data, size + 1)
        if len(data) != size or zlib.crc32(data) != crc:
            raise _UnfitError(f"its size or its CRC is not what was packed; {_DAMAGED}")
        return data


@lru_cache(maxsize=4)
def opened_once(kind: Callable[..., Any], *given: Any) -> Any:
    """Open in another process what a pickle names; several pickles share the same one."""
    return kind(*given)


def _directory(stream: IO[bytes]) -> tuple[list[str], dict[str, str], np.ndarray]:
    """Return an archive's names, those that are spelled otherwise in it, and its `_table`.

    A million entries take 400 MB as zipfile keeps them, and a tenth of that as a table.
    """
    with zipfile.ZipFile(stream) as opened:
        members, end = opened.infolist(), opened.start_dir
    # zipfile makes separators and endings its own; in front of the data the name is as it was.
    spelled = {
        member.filename: member.orig_filename
        for member in members
        if member.filename != member.orig_filename
    }
    return [member.filename for member in members], spelled, _table(members, end)


def _table(members: list[zipfile.ZipInfo], end: int) -> np.ndarray:
    """Return a row of `_MEMBER` for every entry of the directory, which begins at ``end``.

    Entries may not overlap: two that share their data would each look whole, and a few million
    of them make an archive of petabytes (https://www.bamsoftware.com/hacks/zipbomb/).
    """
    rows = ((*_FIELDS(member), 0) for member in members)
    table = np.fromiter(rows, _MEMBER, len(members))
    order = np.argsort(table["start"], kind="stable")
    starts = np.append(table["start"][order], end)
    table["room"][order] = np.maximum(np.diff(starts), 0)
    return table
