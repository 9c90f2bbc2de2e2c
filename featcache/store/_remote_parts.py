"""The shards of jobs that share nothing but a store: each job keeps its own there too.

What lies in the hidden folder of an extraction lies behind a URL under the same names, and a
shard is there, as on a disk, when the file that says so is. So a job that begins again on
another machine fetches what it has done, and whoever packs the shards fetches all of them.
"""

from __future__ import annotations

import re
from collections.abc import Collection, Mapping
from contextlib import closing
from pathlib import Path
from typing import Any

from ..files import replaced_file
from ..lookahead import Stop, work_ahead
from ..progress import OnProgress, Progress
from ..remote import RemotePlace
from ._index import COMMITS
from ._remote import write_chunk
from ._shards import ShardWriter
from ._unfinished import INGREDIENTS, ShardRange, commit_path

__all__ = ["MirroredWriter", "RemoteParts"]

_Key = tuple[str, int]

_THREADS = 8  # that wait for the store
_ARRAY = re.compile(rf"(?:{re.escape(COMMITS)}/)?(train|test)-([0-9]{{12}})-[a-z0-9-]+\.npy")
_COMMIT = re.compile(rf"{re.escape(COMMITS)}/(train|test)-([0-9]{{12}})\.json")


class RemoteParts:
    """The unfinished shards of a cache behind a URL, and where they lie on this machine.

    Parameters
    ----------
    place : RemotePlace
        The hidden folder in the store.
    folder : Path
        The one on this machine.
    """

    def __init__(self, place: RemotePlace, folder: Path) -> None:
        self.place = place
        self.folder = folder

    def committed(self) -> set[_Key]:
        """Return role and start of each shard that is there.

        Raises
        ------
        RemoteError
            The store cannot be reached, or refuses.
        """
        found = (_COMMIT.fullmatch(name) for name in self._list())
        return {(match[1], int(match[2])) for match in found if match}

    def fetch(self, share: Collection[_Key] | None, on_progress: OnProgress) -> bool:
        """Fetch what is there of a share, or of all, and is not here; tell whether anything is.

        Parameters
        ----------
        share : collection of (str, int), optional
            Role and start of each shard that is wanted.
        on_progress : callable
            Hears of the shards.

        Raises
        ------
        RemoteError, OutputError
            It cannot be read, or not be written here.
        """
        listed = self._list()
        ingredients = f"{COMMITS}/{INGREDIENTS}"
        if ingredients not in listed:
            return False
        self._fetch(ingredients, listed)
        arrays: dict[_Key, list[str]] = {}
        for name in listed:
            if match := _ARRAY.fullmatch(name):
                arrays.setdefault((match[1], int(match[2])), []).append(name)
        there = [(match[1], int(match[2])) for match in map(_COMMIT.fullmatch, listed) if match]
        wanted = [
            key
            for key in sorted(there)
            if (share is None or key in share) and not commit_path(self.folder, *key).exists()
        ]

        def fetch(key: _Key, stop: Stop) -> None:
            commit = commit_path(self.folder, *key).relative_to(self.folder).as_posix()
            for name in (*arrays.get(key, ()), commit):
                if stop.is_set():
                    return
                self._fetch(name, listed)

        with closing(work_ahead(fetch, wanted, workers=_THREADS, ahead=_THREADS)) as fetched:
            for number, _ in enumerate(fetched, start=1):
                on_progress(Progress("download shards", number, len(wanted), "shard"))
        return True

    def send_ingredients(self) -> None:
        """Say in the store what is being made."""
        self._send(f"{COMMITS}/{INGREDIENTS}")

    def send(self, commit: Mapping[str, Any]) -> None:
        """Put a shard into the store, and then what says that it is there."""
        specs = [*commit["arrays"].values(), *([commit["hashes"]] if "hashes" in commit else [])]
        for spec in specs:
            self._send(spec["block"][-1])
        path = commit_path(self.folder, commit["role"], commit["start"])
        self._send(path.relative_to(self.folder).as_posix())

    def remove(self) -> None:
        """Delete what is there, first of all what says that something is."""
        listed = self._list()
        ingredients = f"{COMMITS}/{INGREDIENTS}"
        for name in sorted(listed, key=lambda name: (name != ingredients, name)):
            if name == ingredients or _COMMIT.fullmatch(name) or _ARRAY.fullmatch(name):
                self.place.within(name).remove()

    def _list(self) -> dict[str, int | None]:
        try:
            return self.place.list_files()[0]
        except FileNotFoundError:
            return {}

    def _send(self, name: str) -> None:
        self.place.within(name).send(self.folder / name, lambda done: None)

    def _fetch(self, name: str, listed: Mapping[str, int | None]) -> None:
        with replaced_file(self.folder / name) as descriptor:
            for chunk in self.place.within(name).chunks(listed[name] or 0, threads=1):
                write_chunk(descriptor, chunk)


class MirroredWriter(ShardWriter):
    """A `ShardWriter` of a share, whose shards lie in a store too.

    Parameters
    ----------
    path, meta, jobs, share, on_progress
        As `ShardWriter` takes them.
    parts : RemoteParts
        Where in the store.
    """

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
        for commit in self.commits:  # made before, and not sent
            if (commit["role"], commit["start"]) not in there:
                parts.send(commit)

    def commit(self, role: str, start: int, stop: int, *arguments: Any, **options: Any) -> None:
        """Put one shard on the disk, and then into the store.

        Raises
        ------
        OutputError
            As `ShardWriter.commit`.
        RemoteError
            It cannot be sent; it stays on the disk.
        """
        super().commit(role, start, stop, *arguments, **options)
        self._parts.send(self._commits[role, start])
