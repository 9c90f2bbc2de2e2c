"""The shards of many jobs, put together: all there, all sound, all of one data set."""

from __future__ import annotations

import os
import time
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from ..datasets.dataset import dataset_digest, split_digest
from ..errors import CacheCorruptError, CacheMissError
from ..files import check_writable, user_path
from ..progress import OnNote, OnProgress, silent
from ..store.cache import load
from ..store.format import decode_id
from ..store.index import default_folder
from ..store.shards import (
    ShardRange,
    ShardWriter,
    read_ingredients,
    shards_path,
    single_writer,
    unfinished_folder,
)
from .destination import Destination, destination
from .jobs import JOBS_FIELDS, NAMES, share_of
from .provenance import cache_path, matching
from .result import ExtractResult, result_of
from .setting import check_rows, pack_limit, took

_ROLES = ("train", "test")
_NAMED = 3  # missing shards and shares, in a message


def pack(
    output: str | Path | None = None,
    *,
    shards: bool | None = None,
    force: bool = False,
    on_progress: OnProgress = silent,
    on_note: OnNote = silent,
) -> ExtractResult:
    """Put the shards of `featcache.extract_share`'s jobs together.

    The cache is the one that `featcache.extract` makes on one machine with the same engine:
    the same bytes in every array, the same digest and fingerprint, under the same name.

    Parameters
    ----------
    output : str or Path, optional
        The jobs' own output: a ``.h5`` file, or the folder for one, in which there may be
        the shards of one cache alone; ``cache/`` by default. Of a URL, they are fetched, and the
        cache is put there.
    shards : bool, optional
        A folder of shards (True), or one HDF5 file (False); as the jobs were told by default.
    force : bool
        Replace another cache of that name.
    on_progress : callable
        Hears of the shards that are checked.
    on_note : callable
        Told of shards that were damaged, and of classes that were skipped.

    Raises
    ------
    CacheMissError
        There is nothing to be put together, or shards are missing: the message has the
        command that makes them.
    CacheMismatchError
        Another cache has that name.
    CacheCorruptError
        The shards are not those of the images that were listed.
    CacheError
        Another process is at it.
    DatasetError
        Not one image of a split could be decoded.
    OutputError
        The cache cannot be written; the shards stay.
    """
    started = time.perf_counter()
    there = destination(output)
    if there:
        return _pack_behind(there, shards, force, on_progress, on_note, started)
    done = _finished(output)
    if done is not None:
        on_note(f"{done}: is complete, and no job is making it anew")
        return result_of(load(done), "it was there", reused=True, n_resumed=0, started=started)
    path, content = _unfinished(output)
    meta, jobs = content["meta"], content["jobs"]
    check_writable(path)
    with single_writer(path):
        writer = ShardWriter(
            path, meta, force=bool(content.get("forced")), jobs=jobs, on_progress=on_progress
        )
        if writer.damaged:
            on_note(f"{path}: {writer.damaged} was damaged and must be made again")
        check_complete(writer, jobs)
        limit = pack_limit(jobs["pack"] if shards is None else not shards)
        made, reused = finish_jobs(writer, meta, jobs, limit, force, on_note)
    why = f"put together from {len(writer.commits)} shards"
    return result_of(load(made), why, reused=reused, n_resumed=0, started=started)


def _pack_behind(
    there: Destination,
    shards: bool | None,
    force: bool,
    on_progress: OnProgress,
    on_note: OnNote,
    started: float,
) -> ExtractResult:
    """Fetch the shards that jobs put behind a URL, put them together, and the cache there."""
    found = [path for path in there.unfinished() if there.parts(path).committed()]
    if len(found) > 1:
        raise CacheMissError(
            f"{there.place}: expected the shards of one cache, found those of {len(found)}; run "
            + ", or ".join(f"featcache pack {there.of(path)}" for path in found[:_NAMED])
        )
    if not found:
        for path in there.unfinished():
            done = there.any_form(path, "it was there", started)
            if done:
                on_note(f"{done.cache}: is complete, and no job is making it anew")
                return done
        raise CacheMissError(
            f"{there.place}: expected the shards of jobs, found none; make them with featcache "
            "extract DATASET --shard 1/N, or name the jobs' --output"
        )
    parts = there.parts(found[0])
    parts.fetch(None, on_progress)
    made = pack(found[0], shards=shards, force=force, on_progress=on_progress, on_note=on_note)
    result = there.deliver(made, force, started, on_progress, on_note)
    parts.remove()
    return result


def finish_jobs(
    writer: ShardWriter,
    meta: Mapping[str, Any],
    jobs: Mapping[str, Any],
    limit: int,
    force: bool,
    on_note: OnNote,
) -> tuple[Path, bool]:
    """Turn the shards of jobs, all of which are there, into a cache.

    Parameters
    ----------
    writer : ShardWriter
        Has them.
    meta : mapping
        The jobs' provenance.
    jobs : mapping
        As `agreement` made it.
    limit : int
        Bytes up to which they are packed into one file.
    force : bool
        Replace another cache of that name.
    on_note : callable
        Told of classes that were skipped.

    Returns
    -------
    path : Path
        The cache.
    reused : bool
        Whether it was there already, made of the same ingredients; the shards are gone then.

    Raises
    ------
    CacheMismatchError, CacheCorruptError, DatasetError, OutputError
        As `pack`.
    """
    for role in _ROLES:
        again = f"remove {writer.folder}"
        check_rows(writer, role, jobs["agreed"][f"n_{role}"], again)
    digest = _digest(writer, meta, on_note)
    meta = {**meta, "dataset_digest": digest}
    final = writer.path
    if not jobs["named"]:
        final = cache_path(final.parent, meta["dataset"], meta)
    for existing in (final, shards_path(final)):
        if os.path.lexists(existing) and not force:
            matching(existing, meta, "skip" if writer.skipped() else "fail")
            writer.discard()
            return existing, True
    facts = {"dataset_digest": digest, **took(writer)}
    return writer.finish(facts, pack_limit=limit, path=final), False


def check_complete(writer: ShardWriter, jobs: Mapping[str, Any]) -> None:
    """Refuse to put together what is not all there.

    Raises
    ------
    CacheMissError
        Names what is missing, and the command that makes it.
    """
    wanted = wanted_shards(jobs)
    missing = writer.missing(wanted)
    if not missing:
        return
    total = jobs["n_jobs"]
    shares = [
        number
        for number in range(1, total + 1)
        if set(missing) & set(share_of(wanted, number, total))
    ]
    more = f" and {len(missing) - _NAMED} more" if len(missing) > _NAMED else ""
    others = ", ".join(f"{number}/{total}" for number in shares[1 : 1 + _NAMED])
    if len(shares) > 1 + _NAMED:
        others += f" and {len(shares) - 1 - _NAMED} more"
    raise CacheMissError(
        f"{writer.path}: expected {len(wanted)} shards in {writer.folder}, found "
        f"{len(wanted) - len(missing)}; missing are {', '.join(map(str, missing[:_NAMED]))}{more}; "
        f"run {jobs['command']} --shard {shares[0]}/{total}"
        + (f", and shares {others}" if others else "")
    )


def wanted_shards(jobs: Mapping[str, Any]) -> list[ShardRange]:
    """Return all shards that the jobs make together, in the order of the rows."""
    agreed = jobs["agreed"]
    return [
        ShardRange(role, start, min(start + agreed["shard_rows"], agreed[f"n_{role}"]))
        for role in _ROLES
        for start in range(0, agreed[f"n_{role}"], agreed["shard_rows"])
    ]


def _finished(output: str | Path | None) -> Path | None:
    """Return the cache of that name, if jobs have nothing there that could become one."""
    if output is None or user_path(output).suffix not in (".h5", ".shards"):
        return None
    path = user_path(output).with_suffix(".h5")
    if read_ingredients(unfinished_folder(path)):
        return None
    return next((form for form in (path, shards_path(path)) if os.path.lexists(form)), None)


def _unfinished(output: str | Path | None) -> tuple[Path, dict[str, Any]]:
    """Return the file that jobs make together, and what they put down about it."""
    target = user_path(output) if output else default_folder()
    if target.suffix == ".parts":
        target = target.with_name(target.name.lstrip(".")).with_suffix("")
    if target.suffix in (".h5", ".shards"):
        found = [target.with_suffix(".h5")]
    else:
        parts = sorted(target.glob(".*.h5.parts"))
        found = [folder.with_name(folder.name[1 : -len(".parts")]) for folder in parts]
    contents = [(path, read_ingredients(unfinished_folder(path))) for path in found]
    by_jobs = [
        (path, content)
        for path, content in contents
        if content and content.get("jobs", {}).keys() >= JOBS_FIELDS
    ]
    if len(by_jobs) > 1:
        raise CacheMissError(
            f"{target}: expected the shards of one cache, found those of {len(by_jobs)}; run "
            + ", or ".join(f"featcache pack {path}" for path, _ in by_jobs[:_NAMED])
        )
    if by_jobs:
        path, content = by_jobs[0]
        assert content is not None
        return path, content
    if any(content for _, content in contents):
        raise CacheMissError(
            f"{target}: expected the shards of jobs, found an unfinished run on one machine; run "
            "the same featcache extract again"
        )
    raise CacheMissError(
        f"{target}: expected the shards of jobs, found none; make them with featcache extract "
        "DATASET --shard 1/N, or name the jobs' --output"
    )


def _digest(writer: ShardWriter, meta: Mapping[str, Any], on_note: OnNote) -> str:
    """Return the data set's digest, of the hashes that were made while its images were read."""
    provisional = str(meta["dataset_digest"])
    if not provisional.startswith(NAMES):
        return provisional
    names, digests = [], []
    for role in _ROLES:
        shards = [commit for commit in writer.commits if commit["role"] == role]
        names.append(_split_digest(writer, meta["class_names"], shards, with_hashes=False))
        digests.append(_split_digest(writer, meta["class_names"], shards, with_hashes=True))
        kept: set[int] = set()
        for commit in shards:
            kept |= set(np.unique(writer.read(commit, "labels")).tolist())
        left_out = {label for commit in shards for _, label in commit["left_out"]}
        for label in sorted(left_out - kept):
            name = meta["class_names"][label]
            on_note(f"{role}: every image of class {name!r} was skipped")
    if NAMES + dataset_digest(*names) != provisional:
        raise CacheCorruptError(
            f"{writer.path}: expected the shards of the images that were listed, found others in "
            f"{writer.folder}; remove it and start over"
        )
    return dataset_digest(*digests)


def _split_digest(
    writer: ShardWriter,
    class_names: Sequence[str],
    shards: Sequence[Mapping[str, Any]],
    *,
    with_hashes: bool,
) -> str:
    hashes = (writer.read(commit, "hashes") for commit in shards) if with_hashes else ()
    labels = (_labels(writer, commit) for commit in shards)
    return split_digest(class_names, _ids(writer, shards), labels, hashes)


def _ids(writer: ShardWriter, shards: Sequence[Mapping[str, Any]]) -> Iterator[str]:
    """Yield the ids of all images, skipped or not, in their order."""
    for commit in shards:
        ids = writer.read(commit, "ids")
        if commit["left_out"]:
            ids = _whole(commit, ids, writer.read(commit, "skipped"))
        yield from map(decode_id, ids.tolist())


def _labels(writer: ShardWriter, commit: Mapping[str, Any]) -> np.ndarray:
    labels = writer.read(commit, "labels")
    left_out = np.array([label for _, label in commit["left_out"]], np.int64)
    return _whole(commit, labels, left_out) if len(left_out) else labels


def _whole(commit: Mapping[str, Any], kept: np.ndarray, left_out: np.ndarray) -> np.ndarray:
    """Return what belongs to each image of a shard, from that of those kept and left out."""
    rows = np.array([row for row, _ in commit["left_out"]], np.int64) - commit["start"]
    whole = np.empty(commit["stop"] - commit["start"], kept.dtype)
    is_left_out = np.zeros(len(whole), bool)
    is_left_out[rows] = True
    whole[is_left_out], whole[~is_left_out] = left_out, kept
    return whole
