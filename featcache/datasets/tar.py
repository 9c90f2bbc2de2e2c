"""Images inside ``.tar`` files, read in place: class folders, or shards as WebDataset has them.

In WebDataset's layout (https://github.com/webdataset/webdataset), files whose names are equal up
to the first dot are one sample: ``0001.jpg``, ``0001.cls``, ``0001.json``.
"""

from __future__ import annotations

import glob
import hashlib
import json
import os
import re
import shutil
import tarfile
from collections.abc import Iterable, Iterator, Sequence
from contextlib import closing
from dataclasses import replace
from fnmatch import fnmatchcase
from pathlib import Path
from typing import IO, Any

from ..errors import DatasetError, OutputError, TableError, one_line
from ..files import replaced_file
from ..progress import OnProgress, Progress, silent
from ..remote import RemotePlace, located
from ..tables.reading import read_table
from ..tables.target import read_target
from .decoding import MAX_FILE_BYTES, file_error, not_read
from .folders import ROLE_OF
from .images import FileImages, Files, images_among, is_hidden, shown_names
from .sources import Source, known_roles
from .urls import archive_bytes
from .zip import opened_once

_BLOCK = 512
_PACKED = {
    b"\x1f\x8b": ("gzip", "gunzip"),
    b"BZh": ("bzip2", "bunzip2"),
    b"\xfd7zXZ": ("xz", "unxz"),
    b"\x28\xb5\x2f\xfd": ("zstd", "unzstd"),
}
_DAMAGED = "the archive is damaged or cut short: copy or download it again"
_SIDECARS = ("cls", "txt", "json")
_MOST_TEXT = 1 << 20  # bytes of a label or caption
_PATTERN = re.compile(r"[*?\[{]")
_RANGE = re.compile(r"\{(\d+)\.\.(\d+)\}")
_CHOICE = re.compile(r"\{([^{}]*,[^{}]*)\}")
_MAX_SHARDS = 1 << 20


class TarShards(Files):
    """Files inside one or several ``.tar``; those behind URLs are fetched whole, once.

    They are kept in ``folder``. ``tops`` stand in front of the names of each: ``""``, or a
    folder.
    """

    notes: tuple[str, ...] = ()

    def __init__(
        self,
        shards: Sequence[Path | RemotePlace],
        tops: Sequence[str],
        folder: Path,
        on_progress: OnProgress = silent,
    ) -> None:
        self._given = tuple(shards), tuple(tops), folder
        self._paths = _fetched(shards, folder, on_progress)
        self._places: dict[str, tuple[int, int, int]] = {}
        self._order: list[str] = []
        skipped: list[str] = []
        for number, (path, top) in enumerate(zip(self._paths, tops, strict=True)):
            for name, start, size in _members(path, skipped):
                whole = top + name
                if whole in self._places:
                    raise DatasetError(
                        f"{path}!{one_line(name)}: expected each name once, found it again; pack "
                        "the archive again"
                    )
                self._places[whole] = number, start, size
                self._order.append(whole)
        if skipped:
            self.notes = (
                f"{self._paths[0].parent}: {len(skipped):,} links and special files in archives "
                f"ignored, {one_line(skipped[0])} the first",
            )

    def __reduce__(self) -> Any:
        shards, tops, folder = self._given
        shards = tuple(one.absolute() if isinstance(one, Path) else one for one in shards)
        return opened_once, (TarShards, shards, tops, folder)

    def names(self) -> list[str]:
        """List every file."""
        return sorted(self._order)

    def in_order(self) -> list[str]:
        """List every file as they follow each other."""
        return self._order

    def size_bytes(self, name: str) -> int:
        """Return how long a file is."""
        return self._places[name][2]

    def head(self, name: str) -> bytes:
        """Return the first bytes of a file; nothing where it cannot be read."""
        try:
            return self._read(name, _BLOCK)
        except DatasetError:
            return b""

    def read(self, name: str) -> bytes:
        """Return a file's bytes. Safe from several threads."""
        if self.size_bytes(name) > MAX_FILE_BYTES:
            why = f"{self.size_bytes(name)} bytes are more than an image has; remove it"
            raise not_read(self.where(name), why)
        return self._read(name, MAX_FILE_BYTES)

    def _read(self, name: str, most: int) -> bytes:
        number, start, size = self._places[name]
        length = min(size, most)
        try:
            with open(self._paths[number], "rb", buffering=0) as stream:
                stream.seek(start)
                data = stream.read(length)
        except OSError as error:
            raise not_read(self.where(name), f"{error.strerror}; restore the archive") from None
        if len(data) != length:
            raise not_read(self.where(name), f"it ends early; {_DAMAGED}")
        return data

    def where(self, name: str) -> str:
        """Say where a file is, for a message."""
        number = self._places[name][0]
        return f"{self._paths[number]}!{name.removeprefix(self._given[1][number])}"


class _Bounded:
    """A file for `tarfile`, which asks for as many bytes at once as a header says."""

    def __init__(self, stream: IO[bytes], size: int) -> None:
        self._stream, self._size = stream, size

    def read(self, n: int = -1) -> bytes:
        left = max(0, self._size - self._stream.tell())
        return self._stream.read(left if n < 0 else min(n, left))

    def seek(self, offset: int, whence: int = os.SEEK_SET) -> int:
        return self._stream.seek(offset, whence)

    def tell(self) -> int:
        return self._stream.tell()


def _members(path: Path, skipped: list[str]) -> Iterator[tuple[str, int, int]]:
    """Yield name, start and size of every file; links and the like are added to ``skipped``."""
    try:
        with open(path, "rb") as stream:
            size = os.fstat(stream.fileno()).st_size
            head = stream.read(8)
            stream.seek(0)
            for magic, (kind, program) in _PACKED.items():
                if head.startswith(magic):
                    raise DatasetError(
                        f"{path}: expected a plain .tar, found one packed by {kind}, of which no "
                        f"single image can be read; unpack it with {program}"
                    )
            yield from _walk(path, _Bounded(stream, size), size, skipped)
    except tarfile.TarError as error:
        raise DatasetError(
            f"{path}: expected a .tar archive, found a file that is none ({one_line(error)}); "
            f"{_DAMAGED}"
        ) from None
    except (OSError, ValueError, ArithmeticError, LookupError, EOFError, RecursionError) as error:
        why = getattr(error, "strerror", None) or one_line(error)
        raise DatasetError(f"{path}: cannot be read: {why}; {_DAMAGED}") from None


def _walk(
    path: Path, stream: _Bounded, size: int, skipped: list[str]
) -> Iterator[tuple[str, int, int]]:
    opened = tarfile.TarFile(fileobj=stream)  # type: ignore[arg-type]
    before = -1
    while (member := opened.next()) is not None:
        opened.members.clear()  # type: ignore[attr-defined]  # a million of them take a gigabyte
        where = f"{path}!{one_line(member.name)}"
        if opened.offset <= before or member.size < 0:
            raise DatasetError(f"{where}: expected a size of at least 0, found another; {_DAMAGED}")
        before = opened.offset
        if member.isdir():
            continue
        parts = member.name.split("/")
        if member.name.startswith("/") or ".." in parts:
            raise DatasetError(
                f"{where}: expected names inside the archive, found one that leads out of it; "
                "pack the archive again"
            )
        if not member.isreg() or member.issparse():
            skipped.append(member.name)
            continue
        if member.offset_data + member.size > size:
            raise DatasetError(
                f"{where}: expected {member.size:,} bytes, found that the file ends before; "
                f"{_DAMAGED}"
            )
        name = "/".join(part for part in parts if part not in ("", "."))
        yield name, member.offset_data, member.size
    stream.seek(opened.offset)
    end = stream.read(_BLOCK)
    if len(end) < _BLOCK or end.count(0) != _BLOCK:
        found = "none" if not end else "something else"
        raise DatasetError(f"{path}: expected the end mark of a .tar, found {found}; {_DAMAGED}")


def is_tar_pattern(text: str) -> bool:
    """Tell whether this names several shards: ``train-{000..012}.tar``, ``*.tar``."""
    return text.lower().endswith(".tar") and bool(_PATTERN.search(text))


def find_shards(text: str) -> list[Path | RemotePlace]:
    """Return the shards that a pattern names, in order; a range must be there whole."""
    found: list[Path | RemotePlace] = []
    if os.path.exists(text):
        return [Path(text)]
    for name in _expanded(text):
        place = located(name)
        if not re.search(r"[*?\[]", name):
            found.append(place)
        elif isinstance(place, Path):
            found += map(Path, sorted(glob.glob(str(place))))
        else:
            names = (one for one in place.parent.names() if fnmatchcase(one, place.name))
            found += [place.parent.within(one) for one in names]
    if not found:
        raise DatasetError(f"{text}: expected .tar shards, found none; check the pattern")
    for shard in found:
        if isinstance(shard, Path) and not shard.is_file():
            raise DatasetError(
                f"{shard}: expected the shard that {text} names, found none; restore it, or "
                "correct the pattern"
            )
    return found


def _expanded(text: str) -> list[str]:
    """Return the names that ``{000..012}`` and ``{a,b}`` stand for."""
    match = _RANGE.search(text) or _CHOICE.search(text)
    if match is None:
        return [text]
    if match.re is _CHOICE:
        words = match[1].split(",")
    else:
        first, last = int(match[1]), int(match[2])
        if not first <= last < first + _MAX_SHARDS:
            raise DatasetError(
                f"{one_line(text)}: expected a range such as {{000..012}}, found {match[0]}"
            )
        words = [str(number).zfill(len(match[1])) for number in range(first, last + 1)]
    return [
        name
        for word in words
        for name in _expanded(text[: match.start()] + word + text[match.end() :])
    ]


def open_shards(
    shards: Sequence[Path | RemotePlace], folder: Path, on_progress: OnProgress = silent
) -> tuple[TarShards, bool]:
    """Open shards; also tell whether their names are those of folders and not mere numbers."""
    if len(shards) == 1:
        return TarShards(shards, ("",), folder, on_progress), True
    names = [str(shard).replace(os.sep, "/") for shard in shards]
    # Shards may share a name in different folders, so what they share is cut off.
    common = os.path.commonpath([os.path.dirname(name) for name in names])
    tops = [re.sub(r"\.tar$", "", name[len(common) :].lstrip("/"), flags=re.I) for name in names]
    words = {re.sub(r"[\W_]*\d+$", "", top) for top in tops}
    opened = TarShards(shards, [f"{top}/" for top in tops], folder, on_progress)
    return opened, len(words) == len(tops)


def webdataset(files: TarShards, path: str, name: str, *, are_folders: bool) -> Source | None:
    """Return the samples of shards, or None where they hold class folders instead.

    Without labels beside the images, a flat archive, and shards that are numbered, are samples
    too.
    """
    in_order = [one for one in files.in_order() if not is_hidden(one)]
    images, others = images_among(files, in_order)
    is_labelled = any(one.endswith(".cls") for one in others)
    is_flat = len({one.rpartition("/")[0] for one in images}) == 1
    has_more = any(one.rpartition(".")[2].lower() in _SIDECARS for one in others)
    if not images or not (is_labelled or not are_folders or (is_flat and has_more)):
        return None
    samples: dict[str, dict[str, str]] = {}
    apart, before = [], None
    for one in in_order:
        top, slash, base = one.rpartition("/")
        stem, _, end = base.partition(".")
        key = top + slash + stem
        if key in samples and key != before:
            apart.append(key)
        samples.setdefault(key, {})[end.lower()] = one
        before = key
    known = set(images)
    pictures: dict[str, str] = {}  # key -> image
    several, without = [], []
    for key, files_of in samples.items():
        found = [end for end, one in files_of.items() if one in known]
        plain = [end for end in found if "." not in end] or found
        if not found:
            without.append(key)
            continue
        if len(plain) > 1:
            several.append(key)
        pictures[key] = files_of[plain[0]]
    notes = list(shown_names(files, path)[2])
    for keys, what in (
        (without, "samples without an image ignored"),
        (several, "samples with several images, of which the first is taken"),
        (apart, "samples whose files do not follow each other, joined by their key"),
    ):
        if keys:
            named = ", ".join(one_line(key) for key in keys[:3])
            notes.append(f"{path}: {len(keys):,} {what}: {named}" + " …" * (len(keys) > 3))
    keys = sorted(pictures, key=pictures.__getitem__)
    ids = tuple(pictures[key] for key in keys)
    columns = _columns(files, [samples[key] for key in keys], path, notes)
    roles, note = shard_roles([id_.rpartition("/")[0] for id_ in ids], path)
    notes += [note] if note else []
    table = replace(read_table(columns), source=path) if columns else None
    labelled: dict[str, Any] = {}
    if table is not None and "cls" in columns:
        n_missing = sum(value is None for value in columns["cls"])
        if n_missing:
            first = one_line(ids[columns["cls"].index(None)])
            notes.append(f"{path}: {n_missing:,} samples without .cls, {first} the first")
        try:
            target = read_target(table, ("cls",), task="classification")
            labelled = {"labels": target.values, "class_names": target.names}
        except TableError as error:
            notes.append(f"{error}; so the images have no labels")
    more = {"notes": tuple(notes), "roles": roles, "table": table, **labelled}
    return Source(name, FileImages(files, ids), ids, path, **more)


def shard_roles(folders: Iterable[str], path: str) -> tuple[list[str] | None, str]:
    """Return the role that the name of each image's shard tells, None unless all do; and a note."""
    role_of: dict[str, str | None] = {}
    roles = []
    for folder in folders:
        if folder not in role_of:
            words = re.split(r"[^a-z]+", folder.lower())
            found = {ROLE_OF[word] for word in words if word in ROLE_OF}
            role_of[folder] = found.pop() if len(found) == 1 else None
        roles.append(role_of[folder])
    return known_roles(roles, path)


def _columns(
    files: TarShards, samples: Sequence[dict[str, str]], path: str, notes: list[str]
) -> dict[str, list[Any]]:
    """Return what stands beside the images, as columns of N values."""
    columns: dict[str, list[Any]] = {}

    def put(name: str, row: int, value: Any) -> None:
        columns.setdefault(name, [None] * len(samples))[row] = value

    nested: set[str] = set()
    for row, sample in enumerate(samples):
        for end in _SIDECARS:
            if end not in sample:
                continue
            text = _text(files, sample[end])
            if end != "json":
                put(end, row, text.strip() or None)
                continue
            try:
                content = json.loads(text)
                if not isinstance(content, dict):
                    raise ValueError("it is no object")
            except (ValueError, RecursionError) as error:
                problem = f"expected a JSON object, found another text ({one_line(error)})"
                where = files.where(sample[end])
                raise file_error(where, f"{problem}; correct or remove it") from None
            for name, value in content.items():
                if isinstance(value, (dict, list)):
                    nested.add(name)
                elif name != "cls" or "cls" not in sample:
                    put(name, row, value)
    for name, values in columns.items():
        kinds = {type(value) for value in values} - {type(None)}
        if len(kinds - {int, float}) + bool(kinds & {int, float}) > 1:
            columns[name] = [None if value is None else str(value) for value in values]
    if nested:
        named = ", ".join(one_line(repr(name)) for name in sorted(nested)[:3])
        notes.append(f"{path}: lists and objects in .json are not kept: {named}")
    return {name: values for name, values in columns.items() if any(v is not None for v in values)}


def _text(files: TarShards, name: str) -> str:
    if files.size_bytes(name) > _MOST_TEXT:
        raise file_error(
            files.where(name),
            f"expected at most {_MOST_TEXT:,} bytes beside an image, found "
            f"{files.size_bytes(name):,}; remove it",
        )
    try:
        return files.read(name).decode("utf-8-sig")
    except UnicodeDecodeError:
        problem = "expected UTF-8, found other bytes; convert or remove it"
        raise file_error(files.where(name), problem) from None


def _fetched(
    shards: Sequence[Path | RemotePlace], folder: Path, on_progress: OnProgress
) -> list[Path]:
    """Return the files of the shards; those behind URLs are fetched unless they are there.

    Their headers are spread over the whole archive, so that reading these alone would take as
    many requests as there are images, and all bytes are needed later.
    """
    paths: list[Path] = []
    missing: list[tuple[RemotePlace, Path, int]] = []
    for shard in shards:
        if isinstance(shard, Path):
            paths.append(shard)
            continue
        found = shard.find()
        if found is None or found.is_folder:
            raise DatasetError(f"{shard}: expected a .tar, found nothing there; check the URL")
        size = archive_bytes(shard, found)
        version = hashlib.sha256(f"{size} {found.mark}".encode()).hexdigest()[:12]
        paths.append(folder / f"{shard.as_file_name()}-{version}.tar")
        if not paths[-1].exists():
            missing.append((shard, paths[-1], size))
    total, done = sum(size for *_, size in missing), 0
    try:
        if missing:
            folder.mkdir(parents=True, exist_ok=True)
            free = shutil.disk_usage(folder).free
            if free < total:
                raise OutputError(
                    f"{folder}: expected {total:,} bytes for the shards, found {free:,} free; make "
                    "room, or give another --data-root"
                )
        for shard, path, size in missing:
            with (
                replaced_file(path) as descriptor,
                open(descriptor, "wb", closefd=False) as stream,
                closing(shard.chunks(size)) as chunks,
            ):
                for chunk in chunks:
                    stream.write(chunk)
                    done += len(chunk)
                    on_progress(Progress("download shards", done, total, "B"))
    except OutputError:
        raise
    except OSError as error:
        raise OutputError(
            f"{folder}: cannot be written: {error.strerror}; give another --data-root"
        ) from None
    return paths
