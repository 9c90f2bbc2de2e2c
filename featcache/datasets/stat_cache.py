"""SHA-256 of local files, remembered by their sizes and times as git's index does.

To tell whether a cache is of these images then costs a `stat` per image and no read. One file per
data set lies beside the caches. It may be lost at any time: its files are hashed again then.
"""

from __future__ import annotations

import hashlib
import os
import stat
import struct
import time
from collections.abc import Iterable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import TYPE_CHECKING

from ..errors import OutputError
from ..files import refuse_links, write_atomically

if TYPE_CHECKING:
    from .images import Files

FOLDER = ".hashes"
_MAGIC = b"featcache hashes 1\n"
_COUNT = struct.Struct("<Q")
_STAMP = struct.Struct("<4Q")  # size, mtime and ctime in ns, inode
_LOW_BITS = (1 << 64) - 1
_HASH_BYTES = hashlib.sha256().digest_size
_RECORD_BYTES = _STAMP.size + _HASH_BYTES
_MAX_BYTES = 1 << 30  # some ten million files
# A file that is written twice within one tick of its file system's clock shows the same times
# twice. FAT's tick is the longest with 2 s, and so a younger file is hashed again next time
# (https://git-scm.com/docs/racy-git).
_RACY_NS = 2_000_000_000


class RememberedHashes:
    """What is remembered of one data set; `put` may be called from several threads."""

    def __init__(self, path: Path, *, verify: bool = False) -> None:
        """Read what is remembered in a file, or start anew where every file is to be hashed."""
        self._path = path
        self._records = {} if verify else _read(path)
        self._changed = False

    def known(self, files: Files, names: Iterable[str]) -> list[bytes | None]:
        """Return the hash of each file, None where it is not known to be the same as then."""
        hashes: list[bytes | None] = []
        get, status = self._records.get, files.status
        for name in names:
            record, known = get(name), None
            if record is not None:
                try:
                    if record.startswith(_stamp(status(name))):
                        known = record[_STAMP.size :]
                except OSError:
                    pass  # reading it says what is wrong
            hashes.append(known)
        return hashes

    def put(self, name: str, status: os.stat_result, at_ns: int, sha256: bytes) -> None:
        """Remember a hash; ``status`` was taken at ``at_ns``, before the file was read."""
        if max(status.st_mtime_ns, status.st_ctime_ns) + _RACY_NS < at_ns:
            self._records[name] = _stamp(status) + sha256
            self._changed = True
        elif self._records.pop(name, None):
            self._changed = True

    def save(self, names: Iterable[str]) -> None:
        """Write what is known of these files; where that fails, they are hashed again."""
        if not self._changed:
            return
        records = {name: self._records[name] for name in names if name in self._records}
        text = "\0".join(records).encode("utf-8", "surrogateescape")
        content = b"".join((_COUNT.pack(len(records)), *records.values(), text))
        with suppress(OutputError):
            refuse_links(self._path.parent)
            write_atomically(self._path, _MAGIC, hashlib.sha256(content).digest(), content)


def _read(path: Path) -> dict[str, bytes]:
    """Return what a file remembers; nothing where it is damaged, or no such file."""
    try:
        status = os.stat(path)
        if not stat.S_ISREG(status.st_mode) or status.st_size > _MAX_BYTES:
            return {}
        data = path.read_bytes()
    except OSError:
        return {}
    head = len(_MAGIC) + _HASH_BYTES
    content = data[head:]
    if data[:head] != _MAGIC + hashlib.sha256(content).digest() or len(content) < _COUNT.size:
        return {}
    (count,) = _COUNT.unpack_from(content)
    end = _COUNT.size + count * _RECORD_BYTES
    try:
        text = content[end:].decode("utf-8", "surrogateescape")
    except UnicodeDecodeError:
        return {}
    names = text.split("\0") if text else []
    if len(names) != count or end > len(content):
        return {}
    starts = range(_COUNT.size, end, _RECORD_BYTES)
    records = (content[start : start + _RECORD_BYTES] for start in starts)
    return dict(zip(names, records, strict=True))


def _stamp(status: os.stat_result) -> bytes:
    return _STAMP.pack(
        status.st_size,
        status.st_mtime_ns & _LOW_BITS,  # negative before 1970
        status.st_ctime_ns & _LOW_BITS,
        status.st_ino & _LOW_BITS,
    )


def read_and_hash(files: Files, name: str) -> tuple[bytes, bytes]:
    """Return a file's bytes and their SHA-256, which is remembered where files are local."""
    status, at_ns = None, time.time_ns()
    if files.memory:
        with suppress(OSError):  # reading it says what is wrong
            status = files.status(name)
    data = files.read(name)
    sha256 = hashlib.sha256(data).digest()
    if files.memory and status:
        files.memory.put(name, status, at_ns, sha256)
    return data, sha256


@contextmanager
def remembering(everything: Iterable[Files], folder: Path, *, verify: bool) -> Iterator[None]:
    """Use and complete what ``folder`` remembers of files, those of them that are local.

    With ``verify``, every file is hashed again.
    """
    distinct = {id(files): files for files in everything}.values()
    local = [files for files in distinct if hasattr(files, "path") and not files.remote]
    for files in local:
        place = hashlib.sha256(os.fsencode(os.path.realpath(files.path))).hexdigest()[:32]
        files.memory = RememberedHashes(folder / FOLDER / place, verify=verify)
    try:
        yield
    finally:
        for files in local:
            if files.memory:
                files.memory.save(files.names())
            files.memory = None
