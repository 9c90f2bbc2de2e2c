"""Extraction in progress: fixed ranges of rows, committed one by one, resumed, and packed.

Each shard is a handful of ``.npy`` files that are flushed and renamed before the
manifest names them, so that what the manifest names is there whatever happens. A
killed run goes on from the last shard whose bytes still hash to what was written.
"""

from __future__ import annotations

import io
import os
import shutil
from collections.abc import Mapping
from contextlib import suppress
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np

from ..errors import OutputError
from ..files import remove_leftovers, write_atomically
from ._format import StoredArray, seal
from ._index import MANIFEST, is_shards
from ._pack import complete_meta, pack
from ._sources import Source
from ._sums import Digests
from ._unfinished import shard_block, unfinished_folder, unharmed_commits
from ._walk import iterate_rows

__all__ = [
    "PACK_LIMIT_BYTES",
    "SHARD_ROWS",
    "ShardWriter",
    "shards_path",
]

SHARD_ROWS = 1024  # what a kill can cost: 20 s of ResNet-18 at 224 px on two cores
PACK_LIMIT_BYTES = 8 << 30  # packing doubles the space on the disk for a while


def shards_path(path: Path) -> Path:
    """Return the folder that stands for a cache too large to be packed into ``path``."""
    return path.with_suffix(".shards")


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

    Attributes
    ----------
    commits : list of dict
        What is committed: role, the data set's rows (start, stop), arrays, and facts.
    damaged : str
        The first shard of an unfinished run that was no longer what was written, and from
        which on everything is made again; empty where all were whole.

    Raises
    ------
    CacheMismatchError
        An unfinished run of other ingredients lies there.
    OutputError
        The folder cannot be made.
    """

    def __init__(self, path: Path, meta: Mapping[str, Any], *, force: bool = False) -> None:
        self.path = path
        self.folder = unfinished_folder(path)
        self._meta = complete_meta(meta)
        self._forced = force
        self.commits, self.damaged = unharmed_commits(path, self._meta, force=force)
        if force and not self.commits:
            self.discard()
        try:
            self.folder.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise OutputError(
                f"{self.folder}: cannot be made: {error.strerror}; name another output"
            ) from None
        self._sweep()

    def done(self, role: str) -> int:
        """Return how many of a split's images are behind us, counted from the first."""
        return max((commit["stop"] for commit in self.commits if commit["role"] == role), default=0)

    @property
    def n_done(self) -> int:
        """How many images are behind us, of both splits."""
        return sum(commit["stop"] - commit["start"] for commit in self.commits)

    def skipped(self) -> int:
        """Return how many images were left out so far, of both splits."""
        return sum(
            commit["stop"] - commit["start"] - commit["arrays"]["labels"]["block"][0]
            for commit in self.commits
        )

    def rows(self, role: str) -> int:
        """Return how many of these have features; the others were skipped."""
        return sum(
            commit["arrays"]["labels"]["block"][0]
            for commit in self.commits
            if commit["role"] == role
        )

    def commit(
        self,
        role: str,
        start: int,
        stop: int,
        arrays: Mapping[str, np.ndarray],
        facts: Mapping[str, float],
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

        Raises
        ------
        OutputError
            The disk is full, or the folder went away. Earlier shards stay.
        """
        described = {}
        for name, array in arrays.items():
            array = np.ascontiguousarray(array)
            header = io.BytesIO()
            np.lib.format.write_array_header_1_0(
                header, np.lib.format.header_data_from_array_1_0(array)
            )
            file = f"{role}-{start:012d}-{name.replace('/', '-')}.npy"
            data = array.reshape(-1).view(np.uint8).data
            digests = Digests()
            digests.update(data)
            write_atomically(self.folder / file, header.getvalue(), data)
            described[name] = {
                "dtype": array.dtype.str,
                "row_shape": list(array.shape[1:]),
                "block": [len(array), len(header.getvalue()), *digests.hexdigests(), file],
            }
        self.commits.append(
            {"role": role, "start": start, "stop": stop, "arrays": described, "facts": dict(facts)}
        )
        self._write_manifest(
            {
                "unfinished": True,
                "forced": self._forced,
                "meta": self._meta,
                "commits": self.commits,
            }
        )

    def total(self, fact: str) -> float:
        """Return the sum of a fact over all shards, of earlier runs too."""
        return sum(commit["facts"].get(fact, 0.0) for commit in self.commits)

    def finish(self, facts: Mapping[str, Any], *, pack_limit: int = PACK_LIMIT_BYTES) -> Path:
        """Turn the shards into a cache, and return its path.

        Parameters
        ----------
        facts : mapping
            Added to the provenance.
        pack_limit : int
            Bytes up to which shards are packed into one HDF5 file; above, the folder of
            shards becomes the cache, under the suffix ``.shards``.

        Raises
        ------
        OutputError
            The disk is full; the shards stay.
        CacheCorruptError
            A shard was damaged since it was written.
        """
        meta = {**self._meta, **facts}
        arrays = self._arrays()
        final, other = self.path, shards_path(self.path)
        if sum(array.size_bytes for array in arrays.values()) <= pack_limit:
            sources = {
                name: Source(array.dtype, array.shape, partial(iterate_rows, array))
                for name, array in arrays.items()
            }
            pack(final, sources, meta)
            self.discard()
        else:
            final, other = other, final
            self._write_manifest(
                {
                    # What a run needs that is killed before the next line, and must go on.
                    "commits": self.commits,
                    "meta": meta,
                    "arrays": {
                        name: {
                            "dtype": array.dtype.str,
                            "row_shape": list(array.row_shape),
                            "blocks": [
                                [
                                    block.n_rows,
                                    block.offset,
                                    block.sha256,
                                    block.sums,
                                    block.path.name,
                                ]
                                for block in array.blocks
                            ],
                        }
                        for name, array in arrays.items()
                    },
                }
            )
            _replace_folder(self.folder, final)
        # One of the two forms is the cache; what --force replaced may have been the other.
        if is_shards(other):
            shutil.rmtree(other)
        elif other.is_file():
            other.unlink()
        return final

    def discard(self) -> None:
        """Delete the folder of shards."""
        shutil.rmtree(self.folder, ignore_errors=True)

    def _arrays(self) -> dict[str, StoredArray]:
        """Return every array, its shards in the order of the rows."""
        found: dict[str, list[dict[str, Any]]] = {}
        for commit in self.commits:
            for name, spec in commit["arrays"].items():
                found.setdefault(f"{commit['role']}/{name}", []).append(spec)
        return {
            name: StoredArray(
                name,
                np.dtype(specs[0]["dtype"]),
                tuple(specs[0]["row_shape"]),
                tuple(shard_block(self.folder, spec) for spec in specs),
            )
            for name, specs in found.items()
        }

    def _sweep(self) -> None:
        """Delete what killed runs left: half-written files, and shards that are no longer named."""
        remove_leftovers(self.path)
        specs = [spec for commit in self.commits for spec in commit["arrays"].values()]
        named = {MANIFEST, *(spec["block"][-1] for spec in specs)}
        with suppress(OSError):
            for file in self.folder.iterdir():
                if file.name not in named:
                    file.unlink()

    def _write_manifest(self, content: Mapping[str, Any]) -> None:
        write_atomically(self.folder / MANIFEST, seal(content))


def _replace_folder(folder: Path, final: Path) -> None:
    """Give a folder its final name; one that is there goes when the new one is in place."""
    old = final.with_name(f".{final.name}.old")
    try:
        if final.exists():
            if not is_shards(final):
                raise FileExistsError(None, "something else has that name")
            shutil.rmtree(old, ignore_errors=True)
            os.rename(final, old)
        os.rename(folder, final)
    except OSError as error:
        raise OutputError(
            f"{final}: cannot be put in place: {error.strerror}; the shards are in {folder}"
        ) from None
    shutil.rmtree(old, ignore_errors=True)
