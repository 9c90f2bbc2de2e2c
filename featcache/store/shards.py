"""An extraction in progress: shards of fixed ranges of rows, committed, resumed and packed."""

from __future__ import annotations

import io
import os
import re
import socket
from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np

from ..errors import CacheCorruptError, CacheError, CacheMismatchError, OutputError
from ..files import (
    discard,
    own_folder,
    refuse_links,
    remove_leftovers,
    replace_folder,
    told_if_unwritable,
    write_atomically,
)
from ..progress import OnProgress, Progress, silent
from ..schema import count, flag, object_of, optional, text, wrong_fields
from .format import ROLES, Block, Checksums, StoredArray, array_name, differences, seal
from .index import (
    COMMITS,
    MANIFEST,
    NOT_MEANT,
    checked_commit,
    is_shards,
    open_index,
    read_sealed,
)
from .provenance import check_provenance
from .reader import iterate_rows, read_array
from .writer import Source, complete_meta, pack


@contextmanager
def single_writer(path: Path) -> Iterator[None]:
    """Let one process at a time write a cache; the error names the process that does."""
    from filelock import FileLock, Timeout

    # The lock file stays. Where a network file system renames an open file that is deleted, its
    # next holder would not see that the name is free, and two processes would hold two locks.
    # The holder's name is in a file of its own: Windows does not let others read a locked one.
    lock, holder = (path.with_name(f".{path.name}.{end}") for end in ("lock", "holder"))
    refuse_links(lock)
    held = FileLock(lock, timeout=0)
    try:
        held.acquire()
        discard(holder)
        with holder.open("x", encoding="utf-8") as stream:
            stream.write(f"process {os.getpid()} on {socket.gethostname()}")
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
    except (OSError, UnicodeDecodeError):  # it has just started, or just ended
        return "another process"


INGREDIENTS = "ingredients.json"
# Takes the place of a role where images are read before it is known which split each is of. A
# shard of it has files of several splits.
UNDIVIDED = "all"
LISTED = (UNDIVIDED, *ROLES)  # what a shard may range over, in order
_COMMIT = re.compile(rf"({'|'.join(LISTED)})-([0-9]{{12}})\.json")


@dataclass(frozen=True)
class ShardRange:
    """The images of one shard: from ``start`` up to but without ``stop``, of the split ``role``.

    ``role`` is `UNDIVIDED` for images whose split is known once they were read.
    """

    role: str
    start: int
    stop: int

    def __len__(self) -> int:
        """Return the number of images."""
        return self.stop - self.start

    def __str__(self) -> str:
        """Name it for a message."""
        return f"{self.role} images {self.start} to {self.stop - 1}".removeprefix(f"{UNDIVIDED} ")


def unfinished_folder(path: Path) -> Path:
    """Return the hidden folder that holds the shards of an unfinished cache."""
    return path.with_name(f".{path.name}.parts")


def discard_unfinished(path: Path) -> None:
    """Delete the shards that a run left which was killed after it had completed the cache."""
    folder = unfinished_folder(path)
    if folder.is_dir():
        # Another process may be writing the cache again: then the folder is in use.
        with suppress(CacheError), single_writer(path):
            remove_unfinished(folder)


def remove_unfinished(folder: Path) -> None:
    """Delete a folder of shards, first the file without which nobody resumes from it."""
    with suppress(OSError), own_folder(folder, COMMITS) as commits:
        os.unlink(INGREDIENTS, dir_fd=commits)
    discard(folder)


# What jobs name a cache by.
_NAMED = object_of({"weights": text, "preprocess": object_of({"size": count(1)})})
_JOBS = object_of(
    {
        "agreed": object_of(
            {"shard_rows": count(1)}, {f"n_{role}": count(0, 10**12) for role in LISTED}
        ),
        "command": text,
        "n_jobs": count(1, 10**6),
        "named": flag,
        "pack": optional(flag),
    }
)
_MOST_SHARDS = 10**6


def _jobs(value: Any) -> bool:
    """Check what jobs agreed on: the sizes of the splits and of a shard, and no more."""
    if not _JOBS(value):
        return False
    sizes = dict(value["agreed"])
    shard_rows = sizes.pop("shard_rows")
    known = sizes.keys() <= {f"n_{role}" for role in LISTED}
    return known and sum(sizes.values()) // shard_rows < _MOST_SHARDS


def read_ingredients(folder: Path) -> dict[str, Any] | None:
    """Return the plan file of a folder (``meta``, ``forced``, maybe ``jobs``), None without one."""
    try:
        content = read_sealed(folder / COMMITS / INGREDIENTS)
        check_provenance(content["meta"])
    except (CacheError, *NOT_MEANT):
        return None
    by_jobs = {"jobs": _jobs, "meta": _NAMED} if "jobs" in content else {}
    return None if wrong_fields(content, by_jobs, {}) else content


def claim(folder: Path, content: Mapping[str, Any]) -> dict[str, Any]:
    """Create the plan file unless it exists; return its content, the same for all writers.

    The file is written under another name and then linked, which fails where the name is taken.
    """
    target = folder / COMMITS / INGREDIENTS
    mine = target.with_name(f".{os.urandom(8).hex()}.json")
    try:
        with told_if_unwritable(target, "name another output"):
            write_atomically(mine, seal(content))
            try:
                os.link(mine, target)
            except FileExistsError:
                pass
            except OSError:  # a file system without links
                if read_ingredients(folder) is None:
                    os.replace(mine, target)
    finally:
        mine.unlink(missing_ok=True)
    written = read_ingredients(folder)
    if written is None:
        raise OutputError(
            f"{target}: expected the plan that was just written, found something else; remove "
            f"{folder}, or name another output"
        )
    return written


def check_same(
    path: Path, folder: Path, found: Mapping[str, Any], wanted: Mapping[str, Any], again: str
) -> None:
    """Refuse to write shards among those of other ingredients; ``again`` says how to start over."""
    differing = differences(found["meta"], wanted["meta"])
    there, here = (content.get("jobs", {}).get("agreed", {}) for content in (found, wanted))
    differing += differences(there, here, sorted({*there, *here}))
    if differing:
        raise CacheMismatchError(
            f"{path}: expected an unfinished run with the same ingredients, found one with others "
            f"in {folder}: {'; '.join(differing)}; {again}, or name another --output"
        )


def commit_path(folder: Path, role: str, start: int) -> Path:
    """Return the file that marks a shard as complete."""
    return folder / COMMITS / f"{role}-{start:012d}.json"


def committed(folder: Path) -> set[tuple[str, int]]:
    """Return (role, first image) of every shard that is marked as complete."""
    try:
        names = os.listdir(folder / COMMITS)
    except OSError:
        return set()
    matches = (_COMMIT.fullmatch(name) for name in names)
    return {(match[1], int(match[2])) for match in matches if match}


def read_commit(folder: Path, role: str, start: int, fingerprint: str) -> dict[str, Any] | None:
    """Return a shard's commit; None where there is no sound one with this fingerprint."""
    try:
        commit = checked_commit(read_sealed(commit_path(folder, role, start)), folder)
    except (CacheError, *NOT_MEANT):
        return None
    named = (commit["role"], commit["start"], commit["fingerprint"])
    return commit if named == (role, start, fingerprint) else None


def first_harmed(folder: Path, commit: Mapping[str, Any]) -> str:
    """Verify a whole shard; return the name of its first damaged file, or ""."""
    for name in (*commit["arrays"], *(("hashes",) if "hashes" in commit else ())):
        array = commit_array(folder, commit, name)
        try:
            for _ in iterate_rows(array):
                pass
        except (CacheCorruptError, OSError):
            return array.blocks[0].path.name
    return ""


def commit_array(folder: Path, commit: Mapping[str, Any], name: str) -> StoredArray:
    """Return where an array of a shard (``"train/ids"``), or its ``"hashes"``, is stored."""
    spec = commit["hashes"] if name == "hashes" else commit["arrays"][name]
    return _stored(folder, name, [spec])


def _stored(folder: Path, name: str, specs: Sequence[Mapping[str, Any]]) -> StoredArray:
    """Return an array whose blocks are the files of some shards."""
    blocks = []
    for spec in specs:
        n_rows, offset, sha256, xxh3, file = spec["block"]
        blocks.append(Block(folder / file, offset, n_rows, sha256, xxh3))
    dtype, row_shape = np.dtype(specs[0]["dtype"]), tuple(specs[0]["row_shape"])
    return StoredArray(name, dtype, row_shape, tuple(blocks))


PACK_LIMIT_BYTES = 8 << 30  # packing needs twice the space until it is done


def shards_path(path: Path) -> Path:
    """Return the folder that takes the place of ``path`` for a cache too large to be packed."""
    return path.with_suffix(".shards")


def check_replaceable(path: Path, dataset: str | None) -> None:
    """Refuse to replace anything but a cache of the same data set."""
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


def _arrays(
    folder: Path, commits: Sequence[Mapping[str, Any]], meta: Mapping[str, Any]
) -> dict[str, StoredArray]:
    """Return every array, its shards in the order of the rows; empty ones of an empty split."""
    specs_of: dict[str, list[dict[str, Any]]] = {}
    for commit in commits:
        for name, spec in commit["arrays"].items():
            specs_of.setdefault(name, []).append(spec)
    arrays = {name: _stored(folder, name, specs) for name, specs in specs_of.items()}
    for role, other in (("train", "test"), ("test", "train")):
        if f"{role}/features" in arrays:
            continue
        alike = {name: name for name in ("labels", "ids", "content_hashes")}
        for cut in meta["cuts"]:
            identity = array_name(cut, "identity", meta["cuts"][0])
            for view in meta["views"] if role == "train" else ("identity",):
                alike[array_name(cut, view, meta["cuts"][0])] = identity
        for name, like in alike.items():
            if found := arrays.get(f"{other}/{like}"):
                name = f"{role}/{name}"
                arrays.setdefault(name, StoredArray(name, found.dtype, found.row_shape, ()))
    return arrays


def _described(array: StoredArray) -> dict[str, Any]:
    """Return an array's entry in the manifest."""
    return {
        "dtype": array.dtype.str,
        "row_shape": list(array.row_shape),
        "blocks": [
            [block.n_rows, block.offset, block.sha256, block.xxh3, block.path.name]
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


SHARD_ROWS = 1024  # at most this is lost to a kill: 20 s of ResNet-18 at 224 px on two cores


class ShardWriter:
    """Collects the shards of the cache ``path`` in a hidden folder beside it.

    An unfinished folder with another fingerprint is refused. ``force`` deletes an unfinished run,
    unless it was forced too: then this is the same command, which resumes it. ``jobs`` is what
    all jobs that write into the folder must agree on, ``share`` the shards of this writer: it
    reads no others. ``damaged`` names the first damaged shard of an unfinished run, or is "".
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
        refuse_links(self.folder, self.folder / COMMITS)
        self._share = None if share is None else {(one.role, one.start) for one in share}
        self._begin(jobs, force)
        self.damaged = ""
        self._commits = self._sound_commits(on_progress)
        self._sweep()

    @property
    def commits(self) -> list[dict[str, Any]]:
        """The committed shards, in the order of the rows."""
        order = sorted(self._commits, key=lambda key: (LISTED.index(key[0]), key[1]))
        return [self._commits[key] for key in order]

    def missing(self, shards: Iterable[ShardRange]) -> list[ShardRange]:
        """Return those of these shards that are not committed yet."""
        stops = {key: commit["stop"] for key, commit in self._commits.items()}
        return [shard for shard in shards if stops.get((shard.role, shard.start)) != shard.stop]

    def done(self, role: str) -> int:
        """Return how many images of a split are committed, from the first without a gap."""
        at = 0
        while (role, at) in self._commits:
            at = self._commits[role, at]["stop"]
        return at

    @property
    def n_done(self) -> int:
        """Number of committed images, of all splits."""
        return sum(commit["stop"] - commit["start"] for commit in self._commits.values())

    def skipped(self) -> int:
        """Return how many images were skipped so far, of all splits."""
        return self.n_done - sum(map(self.rows, ROLES))

    def rows(self, role: str) -> int:
        """Return how many committed images of a split have features; the rest was skipped."""
        labels = (commit["arrays"].get(f"{role}/labels") for commit in self._commits.values())
        return sum(spec["block"][0] for spec in labels if spec)

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
        """Write one shard; once this returns, no kill can lose it.

        ``arrays`` are named as inside the split, those of an undivided shard with the split's
        role in front; they have fewer rows than images where some were skipped. ``hashes``,
        uint8 (stop - start, 32), are the SHA-256 of the images' files. ``left_out`` has row and
        label of each skipped image. ``facts`` are added up by `total`.
        """
        if role != UNDIVIDED:
            arrays = {f"{role}/{name}": array for name, array in arrays.items()}
        refuse_links(self.folder, self.folder / COMMITS)
        described = {name: self._write(_file(name, start), array) for name, array in arrays.items()}
        commit: dict[str, Any] = {
            "role": role,
            "start": start,
            "stop": stop,
            "fingerprint": self._meta["fingerprint"],
            "arrays": described,
            "facts": dict(facts),
        }
        if hashes is not None:
            commit["hashes"] = self._write(f"{COMMITS}/{_file(f'{role}/hashes', start)}", hashes)
            commit["left_out"] = [list(image) for image in left_out]
        write_atomically(commit_path(self.folder, role, start), seal(commit))
        self._commits[role, start] = commit

    def read(self, commit: Mapping[str, Any], name: str) -> np.ndarray:
        """Return an array of a shard (``"train/ids"``), or its ``"hashes"``, whole and verified."""
        return read_array(commit_array(self.folder, commit, name))

    def total(self, fact: str) -> float:
        """Return the sum of a fact over all shards, also those of earlier runs."""
        return sum(commit["facts"].get(fact, 0.0) for commit in self.commits)

    def finish(
        self,
        facts: Mapping[str, Any],
        *,
        pack_limit: int = PACK_LIMIT_BYTES,
        path: Path | None = None,
    ) -> Path:
        """Turn the shards into a cache and return its path.

        ``facts`` are added to the provenance or replace its fields. Above ``pack_limit`` bytes
        the folder itself becomes the cache, with the suffix ``.shards``. ``path`` renames it.
        """
        refuse_links(self.folder, self.folder / COMMITS)
        meta = complete_meta({**self._meta, **facts})
        arrays = _arrays(self.folder, self.commits, meta)
        final = path or self.path
        other = shards_path(final)
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
            remove_unfinished(self.folder)
        else:
            described = {name: _described(array) for name, array in arrays.items()}
            manifest = seal({"meta": meta, "arrays": described})
            write_atomically(self.folder / MANIFEST, manifest)
            _replace_folder(self.folder, final)
            # Until here a killed run could resume from them.
            discard(final / COMMITS)
        # Only one of the two forms may stay; --force may have replaced the other.
        if is_shards(other) or other.is_file():
            discard(other)
        return final

    def discard(self) -> None:
        """Delete the folder of shards."""
        remove_unfinished(self.folder)

    def _begin(self, jobs: Mapping[str, Any] | None, force: bool) -> None:
        """Create the plan file, or check that the one that exists has our ingredients."""
        plan = read_ingredients(self.folder)
        if plan and force:
            same = plan["meta"]["fingerprint"] == self._meta["fingerprint"]
            plan = plan if plan.get("forced") and same else None
        if plan is None and self._share is None:
            self.discard()
        ours = {"meta": self._meta, "forced": force, **({"jobs": dict(jobs)} if jobs else {})}
        # One of many jobs must not delete the work of the others.
        again = "use --force" if self._share is None else f"remove {self.folder}"
        plan = plan or claim(self.folder, ours)
        check_same(self.path, self.folder, plan, ours, f"{again} to start over")

    def _sound_commits(self, on_progress: OnProgress) -> dict[tuple[str, int], dict[str, Any]]:
        """Return the committed shards that are sound; delete the commits of the others."""
        keys = committed(self.folder)
        if self._share is not None:
            keys &= self._share
        sound = {}
        for number, (role, start) in enumerate(sorted(keys, reverse=True), start=1):
            commit = read_commit(self.folder, role, start, self._meta["fingerprint"])
            harmed = first_harmed(self.folder, commit) if commit else ""
            if commit and not harmed:
                sound[role, start] = commit
            else:
                self.damaged = harmed or self.damaged
                with suppress(OSError), own_folder(self.folder, COMMITS) as commits:
                    os.unlink(commit_path(self.folder, role, start).name, dir_fd=commits)
            on_progress(Progress("checking shards", number, len(keys), "shard"))
        return sound

    def _write(self, file: str, array: np.ndarray) -> dict[str, Any]:
        """Write one ``.npy`` file of the folder and return its description."""
        array = np.ascontiguousarray(array)
        header = io.BytesIO()
        np.lib.format.write_array_header_1_0(
            header, np.lib.format.header_data_from_array_1_0(array)
        )
        data = array.reshape(-1).view(np.uint8).data
        checksums = Checksums()
        checksums.update(data)
        write_atomically(self.folder / file, header.getvalue(), data)
        return {
            "dtype": array.dtype.str,
            "row_shape": list(array.shape[1:]),
            "block": [len(array), len(header.getvalue()), *checksums.hexdigests(), file],
        }

    def _sweep(self) -> None:
        """Delete what killed runs left: half-written files and shards without a commit."""
        if self._share is None:
            remove_leftovers(self.path)
        specs = [spec for commit in self._commits.values() for spec in commit["arrays"].values()]
        named = {COMMITS, *(spec["block"][-1] for spec in specs)}
        with suppress(OSError), own_folder(self.folder) as folder:
            for name in os.listdir(folder):
                if name not in named and (self._share is None or self._is_of_share(name)):
                    os.unlink(name, dir_fd=folder)

    def _is_of_share(self, file: str) -> bool:
        role, _, rest = file.lstrip(".").partition("-")
        start = rest.partition("-")[0]
        return start.isdigit() and any(
            (listed, int(start)) in (self._share or ()) for listed in (role, UNDIVIDED)
        )


def _file(array: str, start: int) -> str:
    """Return the name of a shard's file: ``train/ids`` from 0 on is ``train-000000000000-ids``."""
    role, _, name = array.partition("/")
    return f"{role}-{start:012d}-{re.sub('[/_]', '-', name)}.npy"
