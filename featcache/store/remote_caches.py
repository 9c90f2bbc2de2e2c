"""Caches behind a URL: read through a local copy, and uploaded whole or not at all.

The copy is made once, and again when the store has another file: so a cache is always read,
verified and mapped as a local file. A cache that was made here for a URL is its own copy.
"""

from __future__ import annotations

import json
import math
import os
import re
import shutil
import threading
from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from contextlib import ExitStack, closing, suppress
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, TypeVar

from ..errors import CacheCorruptError, CacheError, CacheMissError, OutputError, RemoteError
from ..files import (
    check_writable,
    refuse_links,
    remove_leftovers,
    replace_folder,
    replaced_file,
    told_if_unwritable,
    write_all,
    write_atomically,
)
from ..process import Stop, work_ahead
from ..progress import OnNote, OnProgress, Progress, silent
from ..remote import Found, RemotePlace, located
from .format import FORMAT, roles_of
from .index import (
    AGAIN,
    COMMITS,
    HDF5_SIGNATURE,
    MANIFEST,
    NOT_MEANT,
    default_folder,
    is_shards,
    sealed_content,
)
from .provenance import check_provenance
from .shards import (
    INGREDIENTS,
    LISTED,
    UNDIVIDED,
    ShardRange,
    ShardWriter,
    commit_path,
    single_writer,
)
from .table_file import table_path

T = TypeVar("T")
_THREADS = 8  # they wait for the store
_BEGINNINGS = (FORMAT.encode(), HDF5_SIGNATURE)


@dataclass(frozen=True)
class RemoteCache:
    """What the index of a cache behind a URL says; numbers of images are of all splits."""

    place: RemotePlace
    meta: dict[str, Any]
    n_rows: int
    n_val: int
    skipped: int
    feature_dim: int


def cache_file(
    path: str | Path, on_progress: OnProgress = silent, on_note: OnNote = silent
) -> Path:
    """Return a path where a cache can be read: its own, or that of a copy of a URL."""
    place = located(path)
    if isinstance(place, Path):
        return place
    found, is_folder = _find(place)
    if found is None:
        raise CacheMissError(
            f"{place}: expected a feature cache, found nothing there; make one with featcache "
            f"extract DATASET --output {place}"
        )
    copy = copies_folder(place.parent) / place.name
    _fetch_table(place, copy)
    if _is_copy(copy, place, found):
        return copy
    check_writable(_source_file(copy))
    with ExitStack() as stack:
        # Two at once do the same work twice, without harm.
        with suppress(CacheError, OutputError):
            stack.enter_context(single_writer(copy))
            remove_leftovers(copy)
        fetch = _fetch_folder if is_folder else _fetch_file
        fetch(place, found, copy, on_progress)
    on_note(f"{place}: copied to {copy}, and read there until the store has another file")
    return copy


def _fetch_table(place: RemotePlace, copy: Path) -> None:
    """Make the table beside a copy that of the store; both have none in most cases."""
    local = table_path(copy)
    there = place.parent.within(table_path(Path(place.name)).name)
    try:
        found = there.find()
    except RemoteError:  # some stores refuse what is not there, and a signature is for one file
        return
    if found is None or found.is_folder:
        local.unlink(missing_ok=True)
    elif not _is_copy(local, there, found):
        _fetch_file(there, found, local, silent)


def original(copy: Path) -> RemotePlace | None:
    """Return the place that a local copy is of; None for any other cache."""
    try:
        url = json.loads(_source_file(copy).read_text(encoding="utf-8"))["url"]
    except (OSError, ValueError, KeyError, TypeError):
        return None
    place = located(url)
    return place if isinstance(place, RemotePlace) else None


def copies_folder(place: RemotePlace) -> Path:
    """Return the local folder for copies of a folder of a store."""
    return default_folder() / "remote" / place.as_file_name()


def find_remote_cache(place: RemotePlace) -> RemoteCache | None:
    """Read the index of a cache behind a URL, in a few requests; return None without a cache."""
    found, is_folder = _find(place)
    if found is None:
        return None
    described = place.within(MANIFEST) if is_folder else place
    content = sealed_content(described.read_range, found.size_bytes or 0, place)
    try:
        meta, arrays = check_provenance(content["meta"]), content["arrays"]
        if not is_folder and content["size_bytes"] != found.size_bytes:
            raise ValueError(
                f"{content['size_bytes']:,} bytes in its index and {found.size_bytes:,} there"
            )
        n_rows = {role: _rows(arrays[f"{role}/labels"]) for role in roles_of(arrays)}
        skipped = [array for name, array in arrays.items() if name.endswith("/skipped")]
        return RemoteCache(
            place,
            meta,
            n_rows=sum(n_rows.values()),
            n_val=n_rows.get("val", 0),
            skipped=sum(map(_rows, skipped)),
            feature_dim=math.prod(arrays["train/features"]["row_shape"]),
        )
    except NOT_MEANT as error:
        why = f"none of {error}" if isinstance(error, KeyError) else str(error)
        raise CacheCorruptError(f"{place}: expected a whole cache, found {why}; {AGAIN}") from None


def send_cache(path: Path, place: RemotePlace, on_progress: OnProgress) -> None:
    """Upload a cache so that nobody ever sees half of it.

    A file appears when it is complete. In a folder of shards, the old manifest is deleted first
    and the new one sent last.
    """
    files = sorted(path.glob("*.npy")) if is_shards(path) else [path]
    total = sum(file.stat().st_size for file in files)
    sent_bytes = _added_up("upload", total, on_progress)
    if is_shards(path):
        place.within(MANIFEST).remove()

        def send(file: Path, stop: Stop) -> None:
            if not stop.is_set():
                place.within(file.name).send(file, partial(sent_bytes, file.name))

        _for_each(send, files)
        place.within(MANIFEST).send(path / MANIFEST, silent)
    else:
        place.send(path, partial(sent_bytes, path.name))
    if (table := table_path(path)).is_file():
        place.parent.within(table_path(Path(place.name)).name).send(table, silent)
    on_progress(Progress("upload", total, total, "B"))
    found, _ = _find(place)
    wanted = (path / MANIFEST if is_shards(path) else path).stat().st_size
    if found is None or found.size_bytes != wanted:
        arrived = "nothing" if found is None else f"{found.size_bytes} bytes"
        raise OutputError(
            f"{place}: expected the {wanted} bytes that were sent, found {arrived}; run it again"
        )
    if path.parent == copies_folder(place.parent):
        _note_source(path, place, found)


def _for_each(
    work: Callable[[T, Stop], None], items: Sequence[T], on_done: Callable[[int], None] = silent
) -> None:
    """Do some work for every item, in threads; call ``on_done`` with the number that are done."""
    with closing(work_ahead(work, items, workers=_THREADS, ahead=_THREADS)) as done:
        for number, _ in enumerate(done, start=1):
            on_done(number)


def _added_up(stage: str, total: int, on_progress: OnProgress) -> Callable[[str, int], None]:
    """Return a function for several threads, to be called with the bytes of a file so far."""
    done: dict[str, int] = {}
    lock = threading.Lock()

    def copied(name: str, size_bytes: int) -> None:
        with lock:
            done[name] = size_bytes
            on_progress(Progress(stage, sum(done.values()), total, "B"))

    return copied


def _find(place: RemotePlace) -> tuple[Found | None, bool]:
    """Return what the store knows about a cache's file or manifest; and whether it is a folder."""
    found = place.find()
    if found is None or not found.is_folder:
        return found, False
    return place.within(MANIFEST).find(), True


def _rows(array: Mapping[str, Any]) -> int:
    return sum(int(block[0]) for block in array["blocks"])


def _source_file(copy: Path) -> Path:
    return copy.with_name(f".{copy.name}.source")


def _is_copy(copy: Path, place: RemotePlace, found: Found) -> bool:
    """Tell whether a copy is of the file that the store has now."""
    try:
        source = json.loads(_source_file(copy).read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return False
    return bool(found.mark) and copy.exists() and source == _source(place, found)


def _source(place: RemotePlace, found: Found) -> dict[str, Any]:
    return {"url": str(place), "size_bytes": found.size_bytes, "mark": found.mark}


def _note_source(copy: Path, place: RemotePlace, found: Found) -> None:
    write_atomically(_source_file(copy), json.dumps(_source(place, found)).encode())


def _fetch_file(place: RemotePlace, found: Found, copy: Path, on_progress: OnProgress) -> None:
    size, done = found.size_bytes or 0, 0
    on_progress(Progress("download", 0, size, "B"))
    _source_file(copy).unlink(missing_ok=True)
    with replaced_file(copy) as descriptor, closing(place.chunks(size)) as chunks:
        for chunk in chunks:
            if not done and not chunk.startswith(_BEGINNINGS):
                raise CacheCorruptError(
                    f"{place}: expected a file that featcache extract wrote, found no featcache "
                    "index at its start; name another"
                )
            write_all(descriptor, chunk)
            done += len(chunk)
            on_progress(Progress("download", done, size, "B"))
    _note_source(copy, place, found)


def _fetch_part(
    place: RemotePlace, size_bytes: int | None, target: Path, on_bytes: Callable[[int], None]
) -> None:
    """Fetch one of many files; call ``on_bytes`` with the bytes so far."""
    done = 0
    with replaced_file(target) as descriptor:
        for chunk in place.chunks(size_bytes or 0, threads=1):
            write_all(descriptor, chunk)
            done += len(chunk)
            on_bytes(done)


def _fetch_folder(place: RemotePlace, found: Found, copy: Path, on_progress: OnProgress) -> None:
    listed, _ = place.list_files()
    names = [name for name in listed if name == MANIFEST or name.endswith(".npy")]
    names = [name for name in names if "/" not in name]
    copied = _added_up("download", sum(listed[name] or 0 for name in names), on_progress)
    half = copy.with_name(f".{copy.name}.{os.urandom(4).hex()}.part")

    def fetch(name: str, stop: Stop) -> None:
        def on_bytes(done: int) -> None:
            if stop.is_set():
                raise InterruptedError  # nobody asks for the result any more
            copied(name, done)

        _fetch_part(place.within(name), listed[name], half / name, on_bytes)

    try:
        with told_if_unwritable(copy, "free space or set FEATCACHE_DIR"):
            _for_each(fetch, names)
            _source_file(copy).unlink(missing_ok=True)
            replace_folder(half, copy)
    finally:
        shutil.rmtree(half, ignore_errors=True)
    _note_source(copy, place, found)


_Key = tuple[str, int]

_PLAN = f"{COMMITS}/{INGREDIENTS}"
_SHARD = rf"({'|'.join(LISTED)})-([0-9]{{12}})"
_ARRAY = re.compile(rf"(?:{re.escape(COMMITS)}/)?{_SHARD}-[a-z0-9-]+\.npy")
_COMMIT = re.compile(rf"{re.escape(COMMITS)}/{_SHARD}\.json")


def _by_shard(names: Iterable[str], pattern: re.Pattern[str]) -> dict[_Key, list[str]]:
    """Return the names that match, by the role and start of their shard."""
    found: dict[_Key, list[str]] = {}
    for name in names:
        if match := pattern.fullmatch(name):
            found.setdefault((match[1], int(match[2])), []).append(name)
    return found


class RemoteParts:
    """The unfinished shards of a cache in a hidden folder of a store, and the local folder."""

    def __init__(self, place: RemotePlace, folder: Path) -> None:
        self.place = place
        self.folder = folder

    def committed(self) -> set[_Key]:
        """Return role and start of each complete shard in the store."""
        return {*_by_shard(self._list(), _COMMIT)}

    def fetch(self, share: Collection[_Key] | None, on_progress: OnProgress) -> bool:
        """Fetch the shards of a share, or all, that are not here; return False without any plan."""
        listed = self._list()
        if _PLAN not in listed:
            return False
        refuse_links(self.folder, self.folder / COMMITS)
        self._fetch(_PLAN, listed)
        arrays, commits = _by_shard(listed, _ARRAY), _by_shard(listed, _COMMIT)
        wanted = [
            key
            for key in sorted(commits)
            if (share is None or key in share) and not commit_path(self.folder, *key).exists()
        ]

        def fetch(key: _Key, stop: Stop) -> None:
            roles = LISTED if key[0] == UNDIVIDED else key[:1]
            names = [name for role in roles for name in arrays.get((role, key[1]), ())]
            for name in names + commits[key]:
                if stop.is_set():
                    return
                self._fetch(name, listed)

        def fetched(number: int) -> None:
            on_progress(Progress("download shards", number, len(wanted), "shard"))

        _for_each(fetch, wanted, fetched)
        return True

    def send_ingredients(self) -> None:
        """Upload the plan file."""
        self._send(_PLAN)

    def send(self, commit: Mapping[str, Any]) -> None:
        """Upload a shard, and then the file that marks it as complete."""
        specs = [*commit["arrays"].values(), *([commit["hashes"]] if "hashes" in commit else [])]
        for spec in specs:
            self._send(spec["block"][-1])
        path = commit_path(self.folder, commit["role"], commit["start"])
        self._send(path.relative_to(self.folder).as_posix())

    def remove(self) -> None:
        """Delete everything in the store, the plan file first."""
        for name in sorted(self._list(), key=lambda name: (name != _PLAN, name)):
            if name == _PLAN or _COMMIT.fullmatch(name) or _ARRAY.fullmatch(name):
                self.place.within(name).remove()

    def _list(self) -> dict[str, int | None]:
        try:
            return self.place.list_files()[0]
        except FileNotFoundError:
            return {}

    def _send(self, name: str) -> None:
        self.place.within(name).send(self.folder / name, silent)

    def _fetch(self, name: str, listed: Mapping[str, int | None]) -> None:
        _fetch_part(self.place.within(name), listed[name], self.folder / name, silent)


class MirroredWriter(ShardWriter):
    """A `ShardWriter` of a share that uploads its shards too, to ``parts``."""

    def __init__(
        self,
        path: Path,
        meta: Mapping[str, Any],
        parts: RemoteParts,
        *,
        jobs: Mapping[str, Any],
        share: Collection[ShardRange],
        on_progress: OnProgress,
    ) -> None:
        parts.fetch({(one.role, one.start) for one in share}, on_progress)
        super().__init__(path, meta, jobs=jobs, share=share, on_progress=on_progress)
        self._parts = parts
        parts.send_ingredients()
        there = parts.committed()
        for commit in self.commits:  # written before, and not sent
            if (commit["role"], commit["start"]) not in there:
                parts.send(commit)

    def commit(self, role: str, start: int, stop: int, *arguments: Any, **options: Any) -> None:
        """Write one shard, and upload it; if that fails it stays on the disk."""
        super().commit(role, start, stop, *arguments, **options)
        self._parts.send(self._commits[role, start])
