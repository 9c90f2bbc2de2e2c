"""Images on demand: from arrays in memory, or decoded from files and archives."""

from __future__ import annotations

import hashlib
import os
import stat
from collections import Counter
from collections.abc import Callable, Sequence
from contextlib import closing
from dataclasses import dataclass, field
from functools import cached_property, lru_cache, reduce
from itertools import chain
from operator import or_
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, NoReturn, Protocol, cast

import numpy as np

from ..cores import usable_cores
from ..errors import DatasetChangedError, DatasetError, shown_place
from ..options import MAX_PIXELS
from ..preprocess import Preprocess
from ..process import Stop, work_ahead
from ..progress import silent
from .decoding import (
    HEAD_BYTES,
    MAX_FILE_BYTES,
    OTHER_IMAGES,
    decode_image,
    image_suffixes,
    is_image,
    not_read,
)
from .stat_cache import RememberedHashes, read_and_hash

if TYPE_CHECKING:
    from PIL import Image


OnHashed = Callable[[int], None]  # called with the number of images hashed so far
OnError = Literal["fail", "skip"]  # what to do about an image that cannot be read or decoded

_TASK_FILES = 64  # per task of hashing: handing it to a thread then costs nothing beside it
HASH_BYTES = hashlib.sha256().digest_size
# Threads that wait for a store, rather than compute: of a core, and at the least. An image
# takes a store some 30 ms, and a core 2.
_WAITING, _LEAST_WAITING = 4, 8


class ReadableImages(Protocol):
    """N images that are decoded one at a time."""

    def __len__(self) -> int:
        """Return N."""

    def read(self, index: int, preprocess: Preprocess | None = None) -> Image.Image:
        """Return one image, or its canonical pixels where making these at once is faster."""


class Images(ReadableImages, Protocol):
    """Those of a split."""

    def __getitem__(self, index: int) -> Image.Image:
        """Return one image, upright, mode RGB."""

    def take(self, rows: np.ndarray) -> Images:
        """Return the images of these rows, in this order."""

    def update_digest(
        self, digest: hashlib._Hash, on_hashed: OnHashed = ..., on_error: OnError = ...
    ) -> None:
        """Feed everything that the pixels follow from to a hash; "skip" what cannot be read."""


@dataclass(frozen=True)
class ArrayImages:
    """Images of one size in memory."""

    array: np.ndarray  # uint8 (N, H, W, 3)

    def __post_init__(self) -> None:
        if self.array.dtype != np.uint8 or self.array.ndim != 4 or self.array.shape[3] != 3:
            raise DatasetError(
                "images: expected an array of uint8 (N, H, W, 3), found "
                f"{self.array.dtype} {self.array.shape}"
            )

    def __len__(self) -> int:
        return len(self.array)

    def __getitem__(self, index: int) -> Image.Image:
        return self.read(index)

    def read(self, index: int, preprocess: Preprocess | None = None) -> Image.Image:
        """Return one image; there is nothing to decode, and so nothing to hasten."""
        from PIL import Image

        return Image.fromarray(self.array[index])

    def take(self, rows: np.ndarray) -> ArrayImages:
        """Return the images of these rows, in this order."""
        return ArrayImages(self.array[rows])

    def update_digest(
        self, digest: hashlib._Hash, on_hashed: OnHashed = silent, on_error: OnError = "fail"
    ) -> None:
        """Feed shape and pixels."""
        digest.update(str(self.array.shape).encode())
        digest.update(np.ascontiguousarray(self.array).data)
        on_hashed(len(self))


@dataclass(frozen=True)
class FileImages:
    """Images in files of a folder or archive.

    Once `update_digest` has seen the files, every one that is read must still be the same:
    features of another image would be kept under the old digest for good.
    """

    files: Files  # where they are
    names: Sequence[str]  # N names inside it
    # SHA-256 of each file, 32 bytes; empty until `update_digest`.
    hashes: bytearray = field(default_factory=bytearray, repr=False, compare=False)

    @property
    def remote(self) -> bool:
        """Whether each read waits for a network, and is paid for."""
        return self.files.remote

    def __len__(self) -> int:
        return len(self.names)

    def __getitem__(self, index: int) -> Image.Image:
        return self.read(index)

    def read(self, index: int, preprocess: Preprocess | None = None) -> Image.Image:
        """Read and decode one image, as `decode_image` does."""
        return self.decode(index, self.content(index), preprocess)

    def where(self, index: int) -> str:
        """Say where an image is, for a message."""
        return self.files.where(self.names[index])

    def decode(
        self,
        index: int,
        data: bytes,
        preprocess: Preprocess | None = None,
        max_pixels: int = MAX_PIXELS,
    ) -> Image.Image:
        """Decode what `content` returned."""
        return decode_image(data, self.where(index), preprocess, max_pixels)

    def take(self, rows: np.ndarray) -> FileImages:
        """Return the images of these rows, in this order."""
        hashes = bytearray()
        if self.hashes:
            hashes += np.frombuffer(self.hashes, np.uint8).reshape(-1, HASH_BYTES)[rows].tobytes()
        return FileImages(self.files, [self.names[row] for row in rows], hashes)

    def update_digest(
        self, digest: hashlib._Hash, on_hashed: OnHashed = silent, on_error: OnError = "fail"
    ) -> None:
        """Feed every file's own SHA-256, so that the same files count the same anywhere.

        A file that cannot be read is an error, or counts by its name where it is to be
        skipped. What was hashed before is not read again.
        """
        if self.hashes:
            digest.update(self.hashes)
            on_hashed(len(self))
            return

        def hash_files(rows: Sequence[int], stop: Stop) -> list[bytes]:
            made = []
            for row in rows:
                if stop.is_set():
                    break
                name = self.names[row]
                try:
                    made.append(read_and_hash(self.files, name)[1])
                except DatasetError:
                    if on_error == "fail":
                        raise
                    made.append(unreadable_hash(name))
            return made

        hashes = self.known_hashes(range(len(self)))
        unknown = [row for row, known in enumerate(hashes) if known is None]
        done = len(hashes) - len(unknown)
        if done:
            on_hashed(done)
        starts = range(0, len(unknown), _TASK_FILES)
        tasks = [unknown[start : start + _TASK_FILES] for start in starts]
        workers = reading_threads(self)
        with closing(work_ahead(hash_files, tasks, workers=workers, ahead=2 * workers)) as hashed:
            for rows, made in zip(tasks, hashed, strict=True):
                for row, sha256 in zip(rows, made, strict=True):
                    hashes[row] = sha256
                done += len(rows)
                on_hashed(done)
        self.hashes[:] = b"".join(cast(list[bytes], hashes))
        digest.update(self.hashes)

    def content(self, index: int) -> bytes:
        """Return a file's bytes, if they are those that were hashed before."""
        return self.hashed_content(index)[0]

    def hashed_content(self, index: int) -> tuple[bytes, bytes]:
        """Return a file's bytes, as `content` does, and their SHA-256."""
        name, expected = self.names[index], self.hash_of(index)
        try:
            data, sha256 = read_and_hash(self.files, name)
        except DatasetError as error:
            if expected in (None, unreadable_hash(name)):
                raise
            raise DatasetChangedError(f"{error}; it was readable a moment ago") from None
        if expected not in (None, sha256):
            raise DatasetChangedError(
                f"{shown_place(self.where(index))}: expected the file as it was when the data set "
                "was hashed, found that it changed while it was being read; run it again"
            )
        return data, sha256

    def hash_of(self, index: int) -> bytes | None:
        """Return the SHA-256 of a file, None before `update_digest`."""
        start = range(len(self))[index] * HASH_BYTES
        return bytes(self.hashes[start : start + HASH_BYTES]) or None

    def known_hashes(self, rows: Sequence[int]) -> list[bytes | None]:
        """Return the SHA-256 of files as far as they are known without reading one."""
        if self.hashes:
            return [self.hash_of(row) for row in rows]
        names, memory = [self.names[row] for row in rows], self.files.memory
        return memory.known(self.files, names) if memory else [None] * len(names)


def is_remote(images: ReadableImages) -> bool:
    """Tell whether each read of an image waits for a network, and is paid for."""
    return getattr(images, "remote", False)


def reading_threads(images: ReadableImages) -> int:
    """Return how many threads should read and decode images: more than cores for a store."""
    cores = usable_cores()
    return max(_LEAST_WAITING, _WAITING * cores) if is_remote(images) else cores


def unreadable_hash(name: str) -> bytes:
    """Return what stands for the hash of a file that cannot be read."""
    text = f"featcache: cannot be read\0{name}"
    return hashlib.sha256(text.encode("utf-8", "surrogateescape")).digest()


# Files and folders that systems and programs put beside images, lower case. Their thumbnails are
# copies of images, and their folders are no classes.
# fmt: off
_SYSTEMS_OWN = frozenset((
    "#recycle", "#snapshot", "$recycle.bin", "@eadir", "@recycle", "__macosx", "desktop.ini",
    "ehthumbs.db", "lost+found", "system volume information", "thumbs.db",
))
# fmt: on


def is_hidden(name: str) -> bool:
    """Tell whether a file or a folder that it is in is left out."""
    folder, _, last = name.rpartition("/")
    return _is_left_out(last) or _in_hidden(folder)


def _is_left_out(part: str) -> bool:
    return part[:1] == "." or part.lower() in _SYSTEMS_OWN


@lru_cache(1024)  # a million names have few folders
def _in_hidden(folder: str) -> bool:
    return any(map(_is_left_out, folder.split("/")))


def _systems_own(name: str) -> str:
    """Return the path up to the first part that a system put there; "" where there is none."""
    parts = name.split("/")
    ends = (end for end, part in enumerate(parts, 1) if part.lower() in _SYSTEMS_OWN)
    return "/".join(parts[: next(ends, 0)])


def shown_names(files: Files, where: object) -> tuple[list[str], list[str], tuple[str, ...]]:
    """Return the files and folders that are not hidden, and the notes on what is not listed.

    A note counts what a system put there, but for names that begin with a dot.
    """
    every = files.names(), files.folders()
    names, folders = ([one for one in listed if not is_hidden(one)] for listed in every)
    if (len(names), len(folders)) == (len(every[0]), len(every[1])):
        return names, folders, files.notes
    tops = {_systems_own(one) for one in chain(*every)}
    found = Counter(top.rpartition("/")[2] for top in tops if top)
    if not found:
        return names, folders, files.notes
    counts = ", ".join(f"{part} {count}" for part, count in sorted(found.items()))
    note = f"{where}: files and folders of operating systems ignored: {counts}"
    return names, folders, (*files.notes, note)


class Files:
    """Files that are known by paths with ``/``; reading is safe from several threads."""

    remote = False  # whether every read waits for a network, and is paid for
    memory: RememberedHashes | None = None  # of a folder or an archive on this machine

    @property
    def notes(self) -> tuple[str, ...]:
        """One sentence each on what is not listed."""
        return ()

    def names(self) -> list[str]:
        """List every file, in order of the names."""
        raise NotImplementedError

    def folders(self) -> list[str]:
        """List the folders, so that an empty one can be reported."""
        return []

    def head(self, name: str) -> bytes:
        """Return at least the first `HEAD_BYTES` of a file; nothing where it cannot be read."""
        try:
            return self.read(name)
        except DatasetError:
            return b""

    def read(self, name: str) -> bytes:
        """Return a file's bytes, or raise `DatasetError`."""
        raise NotImplementedError

    def status(self, name: str) -> os.stat_result:
        """Return the size and times that change when a file's bytes do, or raise OSError."""
        raise OSError

    def where(self, name: str) -> str:
        """Say where a file is, for a message."""
        return name


def images_among(files: Files, names: Sequence[str]) -> tuple[list[str], list[str]]:
    """Return which files are images, and the others, each in the given order.

    By the ends of their names; a name without an end, or with one that begins as an image's does
    (``.jpg_large``), is looked into.
    """
    suffixes = tuple(image_suffixes())
    found = [name.lower().endswith(suffixes) for name in names]
    bare = [row for row, name in enumerate(names) if not found[row] and _may_be_image(name)]

    def look(row: int, stop: Stop) -> bool:
        return not stop.is_set() and is_image(files.head(names[row]))

    workers = _LEAST_WAITING if files.remote else 1
    with closing(work_ahead(look, bare, workers=workers, ahead=4 * workers)) as looked:
        for row, seen in zip(bare, looked, strict=True):
            found[row] = seen
    images = [name for name, seen in zip(names, found, strict=True) if seen]
    return images, [name for name, seen in zip(names, found, strict=True) if not seen]


def _may_be_image(name: str) -> bool:
    end = os.path.splitext(name)[1].lower()
    return not end or (end.startswith(tuple(image_suffixes())) and end not in OTHER_IMAGES)


_OPEN_AT_ONCE = reduce(
    or_, (getattr(os, f"O_{name}", 0) for name in ("NONBLOCK", "NOCTTY", "BINARY"))
)


class Folder(Files):
    """Files below a folder, which is listed when the names are first asked for."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self._prefix = os.path.join(path, "")

    def __reduce__(self) -> Any:
        return Folder, (self.path.absolute(),)

    def names(self) -> list[str]:
        """List every file below, but for those in hidden folders."""
        return self._listing[0]

    def folders(self) -> list[str]:
        """List every folder below that is not hidden; raises as `names` does."""
        return self._listing[1]

    @property
    def notes(self) -> tuple[str, ...]:
        """Name the links that lead back to a folder above them; raises as `names` does."""
        return self._listing[2]

    @cached_property
    def _listing(self) -> tuple[list[str], list[str], tuple[str, ...]]:
        root = str(self.path)
        names: list[str] = []
        folders: list[str] = []
        circles: list[str] = []
        hidden: list[str] = []  # by what `shown_names` counts, and not looked into
        # A link to a folder means what its path says, as for a person: it is followed wherever it
        # stands, unless it leads back to a folder above it.
        above = {root: frozenset((_identity(root),))}
        for folder, below, files in os.walk(root, onerror=_cannot_be_listed, followlinks=True):
            inside = os.path.relpath(folder, root).replace(os.sep, "/")
            prefix = "" if folder == root else f"{inside}/"
            parents = above.pop(folder)
            followed = []
            for name in below:
                path = os.path.join(folder, name)
                identity = _identity(path)
                if is_hidden(name):
                    if name[0] != ".":
                        hidden.append(prefix + name)
                    continue
                if identity in parents:
                    circles.append(prefix + name)
                else:
                    above[path] = parents | {identity}
                    followed.append(name)
            below[:] = followed
            folders += [prefix + name for name in below]
            names += [prefix + name for name in files]
        note = (
            f"{root}: {len(circles)} links to a folder above them are not followed, "
            f"{min(circles)!r} the first"
            if circles
            else ""
        )
        return sorted(names), sorted(folders + hidden), (note,) if note else ()

    def head(self, name: str) -> bytes:
        """Return the first bytes of a file; nothing where it cannot be read."""
        try:
            return self._read(name, HEAD_BYTES)
        except OSError:
            return b""

    def read(self, name: str) -> bytes:
        """Return a file's bytes."""
        try:
            return self._read(name, None)
        except OSError as error:
            raise not_read(self.where(name), f"{error.strerror}; restore or remove it") from None

    def _read(self, name: str, most: int | None) -> bytes:
        """Read a file up to the size that it says it has: a device or /proc has no end."""
        with open(os.open(self.where(name), os.O_RDONLY | _OPEN_AT_ONCE), "rb", 0) as stream:
            status = os.fstat(stream.fileno())
            if not stat.S_ISREG(status.st_mode):
                raise OSError(None, "it is a pipe or a device")
            if most is None and status.st_size > MAX_FILE_BYTES:
                raise OSError(None, f"{status.st_size} bytes are more than an image has")
            # None where a file of /proc would have us wait.
            return stream.read(status.st_size if most is None else min(most, status.st_size)) or b""

    def status(self, name: str) -> os.stat_result:
        """Return a file's size and times, or raise OSError."""
        return os.stat(self._prefix + name)

    def where(self, name: str) -> str:
        """Say where a file is, for a message."""
        return os.path.join(self.path, name)


def _identity(path: str) -> object:
    """Return what two paths share that lead to the same folder."""
    try:
        status = os.stat(path)
    except OSError:  # `os.walk` says what is wrong with it
        return path
    return status.st_dev, status.st_ino


def _cannot_be_listed(error: OSError) -> NoReturn:
    """Raise, where `os.walk` would silently leave a folder out."""
    raise DatasetError(
        f"{error.filename}: cannot be listed: {error.strerror}; make it readable (chmod u+rx) or "
        "take it out of the data set"
    ) from None
