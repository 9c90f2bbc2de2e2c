"""Extraction in progress: fixed ranges of rows, committed one by one, resumed, and packed.

Each shard is a handful of ``.npy`` files that are flushed and renamed before a file of
its own says that it is there, so that what is said to be there is there whatever happens.
A killed run goes on with the shards that are missing, or whose bytes no longer hash to
what was written.
"""

from __future__ import annotations

import io
from collections.abc import Collection, Iterable, Mapping, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any

import numpy as np

from ..files import remove_leftovers, write_atomically
from ..progress import OnProgress, Progress, silent
from ._arrays import read_array
from ._finishing import PACK_LIMIT_BYTES, finish
from ._format import seal
from ._index import COMMITS
from ._pack import complete_meta
from ._sums import Digests
from ._unfinished import (
    ShardRange,
    check_same,
    claim,
    commit_array,
    commit_path,
    committed,
    first_harmed,
    read_commit,
    read_ingredients,
    remove_unfinished,
    unfinished_folder,
)

__all__ = ["SHARD_ROWS", "ShardWriter"]

SHARD_ROWS = 1024  # what a kill can cost: 20 s of ResNet-18 at 224 px on two cores
_ROLES = ("train", "test")  # as they lie in a cache


class ShardWriter:
    """Collects the rows of a cache in a hidden folder beside it.

    Parameters
    ----------
    path : Path
        The ``.h5`` file that it shall become.
    meta : mapping
        The provenance; an unfinished folder of another fingerprint is refused.
    force : bool
        Throw away what an unfinished run left, unless that one was forced too: then this is
        the command that goes on with it.
    jobs : mapping, optional
        What all the jobs must agree on that write into this folder at the same time, and what
        puts their shards together; none of it is the cache's.
    share : collection of ShardRange, optional
        The shards that are this writer's, where others write too: it looks at no other.
    on_progress : callable
        Hears of the shards that are looked at.

    Attributes
    ----------
    commits : list of dict
        What is committed: role, the data set's rows (start, stop), arrays, and facts.
    damaged : str
        The first shard of an unfinished run that was no longer what was written and is to be
        made again; empty where all were whole.

    Raises
    ------
    CacheMismatchError
        An unfinished run of other ingredients lies there.
    OutputError
        The folder cannot be made.
    """

    def __init__(
        self,
        path: Path,
        meta: Mapping[str, Any],
        *,
        force: bool = False,
        jobs: Mapping[str, Any] | None = None,
        share: Collection[ShardRange] | None = None,
        on_progress: OnProgress = silent,
    ) -> None:
        self.path = path
        self.folder = unfinished_folder(path)
        self._meta = complete_meta(meta)
        self._share = None if share is None else {(one.role, one.start) for one in share}
        self._begin(jobs, force)
        self.damaged = ""
        self._commits = self._unharmed(on_progress)
        self._sweep()

    @property
    def commits(self) -> list[dict[str, Any]]:
        """What is committed, in the order of the rows."""
        order = sorted(self._commits, key=lambda key: (_ROLES.index(key[0]), key[1]))
        return [self._commits[key] for key in order]

    def missing(self, shards: Iterable[ShardRange]) -> list[ShardRange]:
        """Return those of these shards that have yet to be made."""
        return [shard for shard in shards if not self._has(shard)]

    def done(self, role: str) -> int:
        """Return how many of a split's images are behind us, from the first without a gap."""
        at = 0
        while (role, at) in self._commits:
            at = self._commits[role, at]["stop"]
        return at

    @property
    def n_done(self) -> int:
        """How many images are behind us, of both splits."""
        return sum(commit["stop"] - commit["start"] for commit in self._commits.values())

    def skipped(self) -> int:
        """Return how many images were left out so far, of both splits."""
        return sum(
            commit["stop"] - commit["start"] - commit["arrays"]["labels"]["block"][0]
            for commit in self._commits.values()
        )

    def rows(self, role: str) -> int:
        """Return how many of these have features; the others were skipped."""
        return sum(
            commit["arrays"]["labels"]["block"][0]
            for commit in self._commits.values()
            if commit["role"] == role
        )

    def commit(
        self,
        role: str,
        start: int,
        stop: int,
        arrays: Mapping[str, np.ndarray],
        facts: Mapping[str, float],
        *,
        hashes: np.ndarray | None = None,
        left_out: Sequence[tuple[int, int]] = (),
    ) -> None:
        """Put one shard on the disk; once this returns, no kill can lose it.

        Parameters
        ----------
        role : str
            ``"train"`` or ``"test"``.
        start, stop : int
            The images of the split that it covers; the next shard begins at ``stop``.
        arrays : mapping of str to numpy.ndarray
            By name inside the split. Fewer rows than images where some were skipped.
        facts : mapping of str to float
            What it took; added up in `total`.
        hashes : numpy.ndarray, optional
            uint8 (stop - start, 32): SHA-256 of the images' files, where nobody had them
            before; kept until the digest of the data set is made of them.
        left_out : sequence of (int, int)
            With hashes: row and label of each image that was skipped.

        Raises
        ------
        OutputError
            The disk is full, or the folder went away. Earlier shards stay.
        """
        stem = f"{role}-{start:012d}"
        described = {
            name: self._write(f"{stem}-{name.replace('/', '-')}.npy", array)
            for name, array in arrays.items()
        }
        commit: dict[str, Any] = {
            "role": role,
            "start": start,
            "stop": stop,
            "fingerprint": self._meta["fingerprint"],
            "arrays": described,
            "facts": dict(facts),
        }
        if hashes is not None:
            commit["hashes"] = self._write(f"{COMMITS}/{stem}-hashes.npy", hashes)
            commit["left_out"] = [list(image) for image in left_out]
        write_atomically(commit_path(self.folder, role, start), seal(commit))
        self._commits[role, start] = commit

    def read(self, commit: Mapping[str, Any], name: str) -> np.ndarray:
        """Return an array of a shard, or its ``"hashes"``, whole and verified.

        Raises
        ------
        CacheCorruptError
            It was damaged since it was written.
        """
        return read_array(commit_array(self.folder, commit, name))

    def total(self, fact: str) -> float:
        """Return the sum of a fact over all shards, of earlier runs too."""
        return sum(commit["facts"].get(fact, 0.0) for commit in self.commits)

    def finish(
        self,
        facts: Mapping[str, Any],
        *,
        pack_limit: int = PACK_LIMIT_BYTES,
        path: Path | None = None,
    ) -> Path:
        """Turn the shards into a cache, and return its path.

        Parameters
        ----------
        facts : mapping
            Added to the provenance, or in the place of a field of it.
        pack_limit : int
            Bytes up to which shards are packed into one HDF5 file; above, the folder of
            shards becomes the cache, under the suffix ``.shards``.
        path : Path, optional
            Another name for the cache, where the right one was not known before.

        Raises
        ------
        OutputError
            The disk is full; the shards stay.
        CacheCorruptError
            A shard was damaged since it was written.
        """
        meta = complete_meta({**self._meta, **facts})
        return finish(self.folder, self.commits, meta, path or self.path, pack_limit)

    def discard(self) -> None:
        """Delete the folder of shards."""
        remove_unfinished(self.folder)

    def _begin(self, jobs: Mapping[str, Any] | None, force: bool) -> None:
        """Find out whether the folder is ours to write into, and make it so where it is new."""
        found = read_ingredients(self.folder)
        if found and force and not (found.get("forced") and self._is_of(found)):
            found = None
        if found is None and self._share is None:
            self.discard()
        wanted = {"meta": self._meta, "forced": force, **({"jobs": dict(jobs)} if jobs else {})}
        found = found or claim(self.folder, wanted)
        check_same(self.path, self.folder, found, wanted)

    def _is_of(self, found: Mapping[str, Any]) -> bool:
        return bool(found["meta"]["fingerprint"] == self._meta["fingerprint"])

    def _unharmed(self, on_progress: OnProgress) -> dict[tuple[str, int], dict[str, Any]]:
        """Return what is committed and still what was written; forget the rest."""
        there = committed(self.folder)
        if self._share is not None:
            there &= self._share
        unharmed = {}
        for number, (role, start) in enumerate(sorted(there, reverse=True), start=1):
            commit = read_commit(self.folder, role, start, self._meta["fingerprint"])
            harmed = first_harmed(self.folder, commit) if commit else ""
            if commit and not harmed:
                unharmed[role, start] = commit
            else:
                self.damaged = harmed or self.damaged
                with suppress(OSError):
                    commit_path(self.folder, role, start).unlink()
            on_progress(Progress("checking shards", number, len(there), "shard"))
        return unharmed

    def _has(self, shard: ShardRange) -> bool:
        commit = self._commits.get((shard.role, shard.start))
        return commit is not None and commit["stop"] == shard.stop

    def _write(self, file: str, array: np.ndarray) -> dict[str, Any]:
        """Write one ``.npy`` file of the folder, and say what is in it."""
        array = np.ascontiguousarray(array)
        header = io.BytesIO()
        np.lib.format.write_array_header_1_0(
            header, np.lib.format.header_data_from_array_1_0(array)
        )
        data = array.reshape(-1).view(np.uint8).data
        digests = Digests()
        digests.update(data)
        write_atomically(self.folder / file, header.getvalue(), data)
        return {
            "dtype": array.dtype.str,
            "row_shape": list(array.shape[1:]),
            "block": [len(array), len(header.getvalue()), *digests.hexdigests(), file],
        }

    def _sweep(self) -> None:
        """Delete what killed runs left: half-written files, and shards that are not committed."""
        if self._share is None:
            remove_leftovers(self.path)
        specs = [spec for commit in self._commits.values() for spec in commit["arrays"].values()]
        named = {COMMITS, *(spec["block"][-1] for spec in specs)}
        with suppress(OSError):
            for file in self.folder.iterdir():
                if file.name not in named and self._is_mine(file.name):
                    file.unlink()

    def _is_mine(self, file: str) -> bool:
        """Tell whether a file of the folder is nobody else's."""
        if self._share is None:
            return True
        role, _, rest = file.lstrip(".").partition("-")
        start = rest.partition("-")[0]
        return start.isdigit() and (role, int(start)) in self._share
