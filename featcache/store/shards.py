"""Extraction in progress: fixed ranges of rows, committed one by one, resumed, and packed."""

from __future__ import annotations

import io
import os
import re
import shutil
import socket
from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np

from ..errors import CacheCorruptError, CacheError, CacheMismatchError, OutputError
from ..files import remove_leftovers, replace_folder, write_atomically
from ..progress import OnProgress, Progress, silent
from .checksums import Digests
from .format import Block, StoredArray, differences, seal
from .index import COMMITS, MANIFEST, is_shards, open_index, read_sealed
from .reader import iterate_rows, read_array
from .writer import Source, complete_meta, pack


@contextmanager
def single_writer(path: Path) -> Iterator[None]:
    """Let one process at a time make a cache.

    Raises
    ------
    CacheError
        Another one is at it; the message names the process and its machine.
    OutputError
        The lock cannot be written, or the file system knows none.
    """
    from filelock import FileLock, Timeout

    # The holder's name is beside the lock: on Windows a locked file cannot be read.
    lock, holder = (path.with_name(f".{path.name}.{end}") for end in ("lock", "holder"))
    held = FileLock(lock, timeout=0)
    try:
        held.acquire()
        holder.write_text(f"process {os.getpid()} on {socket.gethostname()}", "utf-8")
    except Timeout:
        raise CacheError(
            f"{path}: is being written by {_named_in(holder)}; wait for it, or name another "
            "--output"
        ) from None
    except (OSError, NotImplementedError) as error:
        held.release()
        raise OutputError(
            f"{lock}: cannot be locked: {getattr(error, 'strerror', None) or error}; free space, "
            "or name an --output on a local disk and copy the cache when it is done"
        ) from None
    try:
        yield
    finally:
        holder.unlink(missing_ok=True)
        held.release()


def _named_in(holder: Path) -> str:
    try:
        return holder.read_text(encoding="utf-8") or "another process"
    except (OSError, UnicodeDecodeError):  # it has just begun, or just ended
        return "another process"


INGREDIENTS = "ingredients.json"
_COMMIT = re.compile(r"(train|test)-([0-9]{12})\.json")


@dataclass(frozen=True)
class ShardRange:
    """The images of one shard.

    Parameters
    ----------
    role : str
        ``"train"`` or ``"test"``.
    start, stop : int
        The first image of the split, and the one behind the last.
    """

    role: str
    start: int
    stop: int

    def __len__(self) -> int:
        """Return the number of images."""
        return self.stop - self.start

    def __str__(self) -> str:
        """Name it as a person would."""
        return f"{self.role} images {self.start} to {self.stop - 1}"


def unfinished_folder(path: Path) -> Path:
    """Return the hidden folder in which a cache is put together."""
    return path.with_name(f".{path.name}.parts")


def discard_unfinished(path: Path) -> None:
    """Delete the shards of a cache that is complete, left by a run killed at its very end."""
    folder = unfinished_folder(path)
    if folder.exists():
        # Somebody else may be making it anew, and then the folder is theirs.
        with suppress(CacheError), single_writer(path):
            remove_unfinished(folder)


def remove_unfinished(folder: Path) -> None:
    """Delete a folder of shards; killed on the way, what is left is nobody's."""
    with suppress(OSError):
        (folder / COMMITS / INGREDIENTS).unlink()
    shutil.rmtree(folder, ignore_errors=True)


def read_ingredients(folder: Path) -> dict[str, Any] | None:
    """Return what is being made in a folder; None where nothing is, or nobody can tell.

    Returns
    -------
    dict or None
        ``meta``, the provenance; ``forced``; and ``jobs`` where many writers share the work.
    """
    try:
        content = read_sealed(folder / COMMITS / INGREDIENTS)
    except CacheError:
        return None
    meta = content.get("meta")
    return content if isinstance(meta, dict) and "fingerprint" in meta else None


def claim(folder: Path, content: Mapping[str, Any]) -> dict[str, Any]:
    """Put down what is to be made in a folder, unless somebody has; return what stands there.

    Of several at once one succeeds, and all get the same answer: a file is linked to its
    name whole, and never over another.

    Raises
    ------
    OutputError
        The folder cannot be written.
    """
    target = folder / COMMITS / INGREDIENTS
    mine = target.with_name(f".{os.urandom(8).hex()}.json")
    try:
        write_atomically(mine, seal(content))
        try:
            os.link(mine, target)
        except FileExistsError:
            pass
        except OSError:  # a file system without links
            if read_ingredients(folder) is None:
                os.replace(mine, target)
    except OSError as error:
        if isinstance(error, OutputError):
            raise
        raise OutputError(
            f"{target}: cannot be written: {error.strerror}; name another output"
        ) from None
    finally:
        mine.unlink(missing_ok=True)
    found = read_ingredients(folder)
    if found is None:
        raise OutputError(
            f"{target}: expected to read what was just written, found something else; remove "
            f"{folder}, or name another output"
        )
    return found


def check_same(
    path: Path, folder: Path, found: Mapping[str, Any], wanted: Mapping[str, Any], again: str
) -> None:
    """Refuse to write shards among those of other ingredients; ``again`` says how to start over.

    Raises
    ------
    CacheMismatchError
        The fields that differ are in the text.
    """
    differing = differences(found["meta"], wanted["meta"])
    there, here = (content.get("jobs", {}).get("agreed", {}) for content in (found, wanted))
    differing += differences(there, here, sorted({*there, *here}))
    if differing:
        raise CacheMismatchError(
            f"{path}: expected the rest of an unfinished run of these ingredients, found one of "
            f"others in {folder}: {'; '.join(differing)}; {again}, or name another --output"
        )


def commit_path(folder: Path, role: str, start: int) -> Path:
    """Return the file that says that a shard is there."""
    return folder / COMMITS / f"{role}-{start:012d}.json"


def committed(folder: Path) -> set[tuple[str, int]]:
    """Return (role, first image) of every shard that somebody says is there."""
    try:
        names = os.listdir(folder / COMMITS)
    except OSError:
        return set()
    found = (_COMMIT.fullmatch(name) for name in names)
    return {(match[1], int(match[2])) for match in found if match}


def read_commit(folder: Path, role: str, start: int, fingerprint: str) -> dict[str, Any] | None:
    """Return what was put down of a shard; None where nothing sound of these ingredients is."""
    try:
        commit = read_sealed(commit_path(folder, role, start))
        same = (commit["role"], commit["start"], commit["fingerprint"]) == (
            role,
            start,
            fingerprint,
        )
    except (CacheError, KeyError):
        return None
    return commit if same else None


def first_harmed(folder: Path, commit: Mapping[str, Any]) -> str:
    """Read a shard whole; return its first file that is not what was written, else ""."""
    for name in (*commit["arrays"], *(("hashes",) if "hashes" in commit else ())):
        array = commit_array(folder, commit, name)
        try:
            for _ in iterate_rows(array):
                pass
        except (CacheCorruptError, OSError):
            return array.blocks[0].path.name
    return ""


def commit_array(folder: Path, commit: Mapping[str, Any], name: str) -> StoredArray:
    """Return where an array of a shard, or its ``"hashes"``, lies."""
    spec = commit["hashes"] if name == "hashes" else commit["arrays"][name]
    dtype, row_shape = np.dtype(spec["dtype"]), tuple(spec["row_shape"])
    return StoredArray(name, dtype, row_shape, (shard_block(folder, spec),))


def shard_block(folder: Path, spec: Mapping[str, Any]) -> Block:
    """Return where the rows of one file of a shard lie."""
    n_rows, offset, sha256, sums, file = spec["block"]
    return Block(folder / file, offset, n_rows, sha256, sums)


PACK_LIMIT_BYTES = 8 << 30  # packing doubles the space on the disk for a while


def shards_path(path: Path) -> Path:
    """Return the folder that stands for a cache too large to be packed into ``path``."""
    return path.with_suffix(".shards")


def check_replaceable(path: Path, dataset: str | None) -> None:
    """Refuse to replace anything but a cache of the same data set.

    Raises
    ------
    OutputError
        Something else is there.
    """
    if not os.path.lexists(path):
        return
    try:
        name = open_index(path).meta.get("dataset")
        what = "" if name == dataset else f"a cache of {name}"
    except CacheError:
        what = "something that does not open as a cache"
    if what:
        raise OutputError(
            f"{path}: expected no file or folder, or a cache of {dataset} to replace, found "
            f"{what}; move it, or name another --output"
        )


def finish(
    folder: Path,
    commits: Sequence[Mapping[str, Any]],
    meta: Mapping[str, Any],
    path: Path,
    pack_limit: int,
) -> Path:
    """Turn shards into a cache, and return its path.

    Parameters
    ----------
    folder : Path
        Where they lie; it goes.
    commits : sequence of mapping
        As `ShardWriter.commits`.
    meta : mapping
        The whole provenance.
    path : Path
        The ``.h5`` file.
    pack_limit : int
        Bytes up to which shards are packed into one file.

    Raises
    ------
    OutputError
        The disk is full, or something else has the name of the other form; the shards stay.
    CacheCorruptError
        A shard was damaged since it was written.
    """
    arrays = _arrays(folder, commits)
    final, other = path, shards_path(path)
    packed = sum(array.size_bytes for array in arrays.values()) <= pack_limit
    if not packed:
        final, other = other, final
    check_replaceable(other, meta.get("dataset"))
    if packed:
        sources = {
            name: Source(array.dtype, array.shape, partial(iterate_rows, array))
            for name, array in arrays.items()
        }
        pack(final, sources, meta)
        remove_unfinished(folder)
    else:
        described = {name: _described(array) for name, array in arrays.items()}
        write_atomically(folder / MANIFEST, seal({"meta": meta, "arrays": described}))
        _replace_folder(folder, final)
        # Until here a killed run could go on from them.
        shutil.rmtree(final / COMMITS, ignore_errors=True)
    # One of the two forms is the cache; what --force replaced may have been the other.
    if is_shards(other):
        shutil.rmtree(other)
    elif other.is_file():
        other.unlink()
    return final


def _arrays(folder: Path, commits: Sequence[Mapping[str, Any]]) -> dict[str, StoredArray]:
    """Return every array, its shards in the order of the rows."""
    found: dict[str, list[dict[str, Any]]] = {}
    for commit in commits:
        for name, spec in commit["arrays"].items():
            found.setdefault(f"{commit['role']}/{name}", []).append(spec)
    return {
        name: StoredArray(
            name,
            np.dtype(specs[0]["dtype"]),
            tuple(specs[0]["row_shape"]),
            tuple(shard_block(folder, spec) for spec in specs),
        )
        for name, specs in found.items()
    }


def _described(array: StoredArray) -> dict[str, Any]:
    """Return what the manifest says of an array."""
    return {
        "dtype": array.dtype.str,
        "row_shape": list(array.row_shape),
        "blocks": [
            [block.n_rows, block.offset, block.sha256, block.sums, block.path.name]
            for block in array.blocks
        ],
    }


def _replace_folder(folder: Path, final: Path) -> None:
    try:
        if final.exists() and not is_shards(final):
            raise FileExistsError(None, "something else has that name")
        replace_folder(folder, final)
    except OSError as error:
        raise OutputError(
            f"{final}: cannot be put in place: {error.strerror}; the shards are in {folder}"
        ) from None


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
        # One of many jobs must not throw away the work of the others.
        again = "use --force" if self._share is None else f"remove {self.folder}"
        check_same(self.path, self.folder, found, wanted, f"{again} to start over")

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
