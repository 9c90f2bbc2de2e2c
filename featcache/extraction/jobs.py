"""From a plan to shards, and from shards to a cache: here, on Ray, or by many jobs at once.

The names and labels stand for the digest of the data set until its images have been read: every
image is read once and hashed as it is read, and each shard keeps the hashes of its images. A job
makes its own run of shards in a folder that all jobs share; `pack` joins the shards of all jobs,
and an extraction in one process joins its own.
"""

from __future__ import annotations

import os
import shlex
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any

import numpy as np

from ..datasets.dataset import dataset_digest, split_digest
from ..errors import (
    CacheCorruptError,
    CacheError,
    CacheMismatchError,
    CacheMissError,
    DatasetError,
    OutputError,
    RecipeError,
    RemoteError,
)
from ..files import check_writable, refuse_links, user_path
from ..progress import OnNote, OnProgress, silent
from ..store.cache import Cache, load
from ..store.copies import hash_numbers, n_copied
from ..store.format import ROLES, UNLABELLED, decode_id
from ..store.index import COMMITS, default_folder
from ..store.remote_caches import MirroredWriter
from ..store.shards import (
    LISTED,
    UNDIVIDED,
    ShardRange,
    ShardWriter,
    committed,
    read_ingredients,
    shards_path,
    single_writer,
    unfinished_folder,
)
from .destination import Destination, destination, result_of_remote
from .options import pack_limit
from .pipeline import REUSED, STAGES, bottleneck, sides_of
from .plan import NAMES, SUFFIXES, Plan, cache_path, matching, shard_ranges
from .result import ExtractResult, ShareResult, result_of

# Makes the shards that a writer lacks, and commits them with the hashes of their images.
Make = Callable[[ShardWriter, Sequence[ShardRange]], None]

_NAMED = 3  # missing shards and shares, in a message


def agreement(plan: Plan, n_jobs: int, command: str) -> dict[str, Any]:
    """Return what jobs must agree on, and what `pack` needs to join their shards."""
    output = plan.options.output
    return {
        "agreed": {"shard_rows": plan.shard_rows, **plan.n_listed},
        "command": command,
        "n_jobs": n_jobs,
        "named": output is not None and Path(output).suffix in SUFFIXES,
        "pack": plan.options.packed,
    }


def complete(
    plan: Plan,
    writer: ShardWriter,
    shards: Sequence[ShardRange],
    make: Make,
    on_note: OnNote,
    of: str = "images",
) -> int:
    """Make those of these shards that are missing; return how many images earlier runs did."""
    if writer.damaged:
        on_note(f"{writer.path}: {writer.damaged} was damaged and is made again")
    if plan.options.on_error == "fail" and writer.skipped():
        raise CacheMismatchError(
            f"{writer.path}: expected every image of the data set, found an unfinished run that "
            f"left out {writer.skipped()} that did not decode; use --on-error skip to resume it, "
            "or --force to start over"
        )
    n_resumed, n_images = writer.n_done, sum(map(len, shards))
    if n_resumed:
        on_note(f"{writer.path}: resuming after {n_resumed:,} of {n_images:,} {of}")
    try:
        if writer.missing(shards):
            make(writer, shards)
    except KeyboardInterrupt:
        raise KeyboardInterrupt(_kept(writer, n_images)) from None
    except (OutputError, RemoteError) as error:
        raise type(error)(f"{error}; {_kept(writer, n_images)}") from None
    return n_resumed


def _kept(writer: ShardWriter, n_images: int) -> str:
    if not writer.n_done:
        return "nothing was kept yet"
    return f"{writer.n_done:,} of {n_images:,} images are kept, and the same command resumes there"


def make_cache(
    plan: Plan,
    command: str,
    make: Make,
    force: bool,
    on_progress: OnProgress,
    on_note: OnNote,
    *,
    started: float,
) -> ExtractResult:
    """Make every shard that is missing, and join them, in one process that alone writes."""
    meta = plan.meta_before_reading(on_progress)
    path = plan.path(meta)
    check_writable(path)
    jobs = agreement(plan, 1, command)
    with single_writer(path):
        writer = ShardWriter(path, meta, force=force, jobs=jobs, on_progress=on_progress)
        n_rows, n_reused = _rows_and_reused(writer)
        try:
            n_resumed = complete(plan, writer, plan.shards(), make, on_note)
        finally:
            if not writer.n_done:  # nothing to resume
                writer.discard()
        n_rows, n_reused = np.subtract(_rows_and_reused(writer), (n_rows, n_reused)).tolist()
        limit = pack_limit(plan.options.packed)
        made, reused = join(writer, meta, jobs, limit, force, on_note, again="use --force")
    return result_of(
        load(made),
        plan.work.choice.why,
        reused=reused,
        n_resumed=n_resumed,
        computed=n_rows - n_reused,
        reused_rows=n_reused,
        started=started,
    )


def _rows_and_reused(writer: ShardWriter) -> tuple[int, int]:
    """Return how many images have features, and of how many these are from other caches."""
    return sum(map(writer.rows, ROLES)), int(writer.total(REUSED))


def join(
    writer: ShardWriter,
    meta: Mapping[str, Any],
    jobs: Mapping[str, Any],
    limit: int,
    force: bool,
    on_note: OnNote,
    *,
    again: str,
) -> tuple[Path, bool]:
    """Turn all shards into a cache; return its path, and whether it was there already."""
    for role in LISTED:
        n_listed = jobs["agreed"].get(f"n_{role}", 0)
        if n_listed and not sum(map(writer.rows, ROLES if role == UNDIVIDED else (role,))):
            raise DatasetError(
                f"{'images' if role == UNDIVIDED else role}: expected at least one image that "
                f"decodes, found none among {n_listed:,}; replace them, and {again} to start over"
            )
    digest = _digest(writer, meta, jobs, on_note)
    meta = {**meta, "dataset_digest": digest}
    final = writer.path if jobs["named"] else cache_path(writer.path.parent, meta)
    for existing in (final, shards_path(final)):
        if os.path.lexists(existing) and not force:
            matching(existing, meta, "skip" if writer.skipped() else "fail")
            writer.discard()
            return existing, True
    facts = {"dataset_digest": digest, **_measured(writer)}
    made = writer.finish(facts, pack_limit=limit, path=final)
    _note_copies(load(made), on_note)
    for role, split in load(made, mmap=True).splits():
        _note_dead(role, split.features, on_note)
    return made, False


def _note_copies(cache: Cache, on_note: OnNote) -> None:
    """Say how many test images stand in train, which a given split may have."""
    train, test = cache.train.content_hashes, cache.test.content_hashes
    if train is None or test is None:
        return
    n_copies = n_copied(hash_numbers(test), hash_numbers(train))
    if n_copies:
        on_note(
            f"{n_copies:,} of {len(test):,} test images are also in train (same bytes): results "
            "would be too good; featcache audit lists them"
        )


_ROWS_AT_ONCE = 4096
_FEW = 0.9  # of the columns: on digits, half the units of a ReLU network answer to no image


def _note_dead(role: str, features: np.ndarray, on_note: OnNote) -> None:
    """Say that features of a split (N, D) are 0, or the same in all images."""
    if features.ndim != 2 or len(features) < 2:
        return
    constant = np.ones(features.shape[1], bool)
    n_zero = 0
    for start in range(0, len(features), _ROWS_AT_ONCE):
        rows = features[start : start + _ROWS_AT_ONCE]
        if constant.any():
            constant &= (rows == features[0]).all(axis=0)
        n_zero += int((~rows.any(axis=1)).sum())
    found = []
    if constant.mean() >= _FEW:
        found.append(f"{constant.sum():,} of {constant.size:,} features are the same in all images")
    if n_zero:
        found.append(f"all features of {n_zero:,} of {len(features):,} images are 0")
    if found:
        on_note(
            f"warning: {role}: {'; '.join(found)}: the weights or the preprocessing may not suit "
            "these images, or many are blank"
        )


def _measured(writer: ShardWriter) -> dict[str, Any]:
    """Return what the extraction took, all its runs and machines together."""
    stages = {name: round(writer.total(name), 3) for name in STAGES}
    n_reused = int(writer.total(REUSED))
    return {
        **({REUSED: n_reused} if n_reused else {}),
        "wall_s": stages["wall_s"],
        "images_per_s": writer.total("passes") / max(writer.total("wall_s"), 1e-9),
        "bottleneck": bottleneck(stages),
        "stages_s": stages,
    }


def check_share(share: tuple[int, int]) -> None:
    """Refuse a share that is not (number, total) with a number from 1 to the total."""
    number, total = share
    if not 1 <= number <= total:
        raise RecipeError(
            f"share: expected I/N with I from 1 to N, found {number}/{total}; the first of "
            f"{max(total, 1)} is 1/{max(total, 1)}"
        )


def share_of(shards: list[ShardRange], number: int, total: int) -> list[ShardRange]:
    """Return the run of shards of job ``number`` (from 1) of ``total``; none where few."""
    return shards[(number - 1) * len(shards) // total : number * len(shards) // total]


def run_share(
    plan: Plan,
    share: tuple[int, int],
    command: str,
    make: Make,
    on_progress: OnProgress,
    on_note: OnNote,
    *,
    there: Destination | None,
    started: float,
) -> ShareResult:
    """Make the shards of one job, as `featcache.extract_share`."""
    meta = plan.meta_before_reading(on_progress)
    path = plan.path(meta)
    taken: list[object] = [form for form in (path, shards_path(path)) if os.path.lexists(form)]
    if there and not taken and (existing := there.existing(path)):
        taken.append(existing.place)
    if taken:
        raise OutputError(
            f"{taken[0]}: expected a name for a new cache, found that it is there already; "
            "remove it to make it again, or name another --output"
        )
    if there:
        there.check_writable()
    check_writable(path)
    everything = plan.shards()
    mine = share_of(everything, *share)
    jobs = agreement(plan, share[1], command)
    label = f"{share[0]}/{share[1]}"
    with _same_job(path, share, on_note):
        parts = there.parts(path) if there else None
        writer = (
            MirroredWriter(path, meta, parts, jobs=jobs, share=mine, on_progress=on_progress)
            if parts
            else ShardWriter(path, meta, jobs=jobs, share=mine, on_progress=on_progress)
        )
        if not mine:
            on_note(f"share {label}: nothing to do, there are {len(everything)} shards")
        n_resumed = complete(plan, writer, mine, make, on_note, of="images of this share")
    packed = there.place if there else path if jobs["named"] else path.parent
    return ShareResult(
        output=str(there.of(path)) if there else path,
        folder=str(parts.place) if parts else writer.folder,
        share=label,
        n_images=sum(map(len, mine)),
        n_resumed=n_resumed,
        n_skipped=writer.skipped(),
        n_shards=len(mine),
        n_shards_there=len(parts.committed() if parts else committed(writer.folder)),
        n_shards_wanted=len(everything),
        wall_s=time.perf_counter() - started,
        next_step=shlex.join(["featcache", "pack", str(packed)]),
    )


@contextmanager
def _same_job(path: Path, share: tuple[int, int], on_note: OnNote) -> Iterator[None]:
    """Keep a job from running twice at once, where the file system supports locks.

    Two of them would waste time and do no harm: one writes the same bytes over the other's, and
    the checksum shows it otherwise.
    """
    folder = unfinished_folder(path) / COMMITS  # the locks in it are deleted with the shards
    with ExitStack() as stack:
        try:
            refuse_links(folder.parent, folder)
            folder.mkdir(parents=True, exist_ok=True)
            name = f"share-{share[0]}-of-{share[1]}"
            stack.enter_context(single_writer(folder / name))
        except OSError as error:  # an OutputError is one
            on_note(f"{path}: {error}; continuing without a lock")
        except CacheError as error:
            raise CacheError(f"share {share[0]}/{share[1]}: {error}") from None
        yield


def pack(
    output: str | Path | None = None,
    *,
    shards: bool | None = None,
    force: bool = False,
    on_progress: OnProgress = silent,
    on_note: OnNote = silent,
) -> ExtractResult:
    """Join the shards of `featcache.extract_share`'s jobs, or of an interrupted extraction.

    The cache is the one that `featcache.extract` makes on one machine with the same engine:
    the same bytes in every array, the same digest and fingerprint, under the same name.

    Parameters
    ----------
    output : str or Path, optional
        The jobs' own output: a ``.h5`` file, or the folder for one, which may hold the shards of
        one cache only; ``cache/`` by default. From a URL the shards are fetched, and the cache is
        uploaded there.
    shards : bool, optional
        A folder of shards (True), or one HDF5 file (False); as the jobs were told by default.
    force : bool
        Replace another cache of that name.
    on_progress : callable
        Called with the progress of checking the shards.
    on_note : callable
        Receives one-line notes, such as which shard was damaged.

    Returns
    -------
    ExtractResult

    Raises
    ------
    CacheMissError
        There are no shards, or some are missing: the message has the command that makes them.
    CacheMismatchError
        Another cache has that name.
    CacheCorruptError
        The shards are not those of the images that were listed.
    CacheError
        Another process is writing the cache.
    DatasetError
        Not one image of a split could be decoded.
    OutputError
        The cache cannot be written; the shards stay.
    """
    started = time.perf_counter()
    there = destination(output)
    if there:
        return _pack_remote(there, shards, force, on_progress, on_note, started)
    done = _finished(output)
    if done is not None:
        on_note(f"{done}: is complete, and no job is making it again")
        return result_of(load(done), "it was there", reused=True, started=started)
    path, content = _unfinished(output)
    meta, jobs = content["meta"], content["jobs"]
    check_writable(path)
    with single_writer(path):
        writer = ShardWriter(
            path, meta, force=bool(content.get("forced")), jobs=jobs, on_progress=on_progress
        )
        if writer.damaged:
            on_note(f"{path}: {writer.damaged} was damaged and must be made again")
        _check_complete(writer, jobs)
        limit = pack_limit(jobs["pack"] if shards is None else not shards)
        again = f"remove {writer.folder}"
        made, reused = join(writer, meta, jobs, limit, force, on_note, again=again)
    why = f"put together from {len(writer.commits)} shards"
    return result_of(load(made), why, reused=reused, reused_rows=0, started=started)


def _pack_remote(
    there: Destination,
    shards: bool | None,
    force: bool,
    on_progress: OnProgress,
    on_note: OnNote,
    started: float,
) -> ExtractResult:
    """Fetch the shards that jobs uploaded, join them, and upload the cache."""
    paths = [path for path in there.unfinished() if there.parts(path).committed()]
    if len(paths) > 1:
        raise _several(there.place, [there.of(path) for path in paths])
    if not paths:
        for path in there.unfinished():
            done = there.existing(path)
            if done:
                on_note(f"{done.place}: is complete, and no job is making it again")
                return result_of_remote(done, "it was there", started)
        raise _none(there.place)
    parts = there.parts(paths[0])
    parts.fetch(None, on_progress)
    made = pack(paths[0], shards=shards, force=force, on_progress=on_progress, on_note=on_note)
    result = there.deliver(made, force, started, on_progress, on_note)
    parts.remove()
    return result


def _several(where: object, caches: Sequence[object]) -> CacheMissError:
    commands = ", or ".join(f"featcache pack {cache}" for cache in caches[:_NAMED])
    return CacheMissError(
        f"{where}: expected the shards of one cache, found those of {len(caches)}; run {commands}"
    )


def _none(where: object) -> CacheMissError:
    return CacheMissError(
        f"{where}: expected the shards of jobs, found none; make them with featcache extract "
        "DATASET --shard 1/N, or name the jobs' --output"
    )


def _finished(output: str | Path | None) -> Path | None:
    """Return the cache of that name, if no shards are there that could replace it."""
    if output is None or user_path(output).suffix not in SUFFIXES:
        return None
    path = user_path(output).with_suffix(".h5")
    if read_ingredients(unfinished_folder(path)):
        return None
    return next((form for form in (path, shards_path(path)) if os.path.lexists(form)), None)


def _unfinished(output: str | Path | None) -> tuple[Path, dict[str, Any]]:
    """Return the file that jobs make together, and what their folder says about it."""
    target = user_path(output) if output else default_folder()
    if target.suffix == ".parts":
        target = target.with_name(target.name.lstrip(".")).with_suffix("")
    if target.suffix in SUFFIXES:
        paths = [target.with_suffix(".h5")]
    else:
        parts = sorted(target.glob(".*.h5.parts"))
        paths = [folder.with_name(folder.name[1 : -len(".parts")]) for folder in parts]
    contents = [(path, read_ingredients(unfinished_folder(path))) for path in paths]
    by_jobs = [(path, content) for path, content in contents if content and "jobs" in content]
    if len(by_jobs) > 1:
        raise _several(target, [path for path, _ in by_jobs])
    if not by_jobs:
        raise _none(target)
    return by_jobs[0]


def _check_complete(writer: ShardWriter, jobs: Mapping[str, Any]) -> None:
    """Refuse to join shards of which some are missing; name the command that makes them."""
    expected = shard_ranges(**jobs["agreed"])
    missing = writer.missing(expected)
    if not missing:
        return
    total = jobs["n_jobs"]
    shares = [
        number
        for number in range(1, total + 1)
        if set(missing) & set(share_of(expected, number, total))
    ]
    more = f" and {len(missing) - _NAMED} more" if len(missing) > _NAMED else ""
    others = ", ".join(f"{number}/{total}" for number in shares[1 : 1 + _NAMED])
    if len(shares) > 1 + _NAMED:
        others += f" and {len(shares) - 1 - _NAMED} more"
    raise CacheMissError(
        f"{writer.path}: expected {len(expected)} shards in {writer.folder}, found "
        f"{len(expected) - len(missing)}; missing are {', '.join(map(str, missing[:_NAMED]))}"
        f"{more}; run {jobs['command']} --shard {shares[0]}/{total}"
        + (f", and shares {others}" if others else "")
    )


def _digest(
    writer: ShardWriter, meta: Mapping[str, Any], jobs: Mapping[str, Any], on_note: OnNote
) -> str:
    """Return the digest of the data set, from the hashes made while its images were read."""
    provisional = str(meta["dataset_digest"])
    if not provisional.startswith(NAMES):
        return provisional
    names, digests, split_shards = [], [], {}
    try:
        for listed in LISTED:
            if f"n_{listed}" not in jobs["agreed"]:
                continue
            shards = [commit for commit in writer.commits if commit["role"] == listed]
            names.append(_split_digest(writer, meta["class_names"], shards, None))
            for role in ("train", "test") if listed == UNDIVIDED else (listed,):
                digests.append(_split_digest(writer, meta["class_names"], shards, role))
                split_shards[role] = shards
    except (KeyError, ValueError):  # arrays that do not fit the shard's hashes
        names = []
    if NAMES + dataset_digest(*names) != provisional:
        raise CacheCorruptError(
            f"{writer.path}: expected the shards of the images that were listed, found others in "
            f"{writer.folder}; remove it and start over"
        )
    for role, shards in split_shards.items():
        _note_classes(writer, meta["class_names"], shards, role, on_note)
    return dataset_digest(*digests)


def _note_classes(
    writer: ShardWriter,
    class_names: Sequence[str],
    shards: Sequence[Mapping[str, Any]],
    role: str,
    on_note: OnNote,
) -> None:
    """Say which classes have no image in a split, of those that should."""
    kept: set[int] = set()
    for commit in shards:
        if f"{role}/labels" in commit["arrays"]:
            kept |= set(np.unique(writer.read(commit, f"{role}/labels")).tolist())
    if shards and shards[0]["role"] == UNDIVIDED:
        absent = [repr(name) for label, name in enumerate(class_names) if label not in kept]
        if absent or not kept:
            more = ", …" * (len(absent) > _NAMED)
            of_classes = f" of {', '.join(absent[:_NAMED])}{more}" * bool(kept)
            on_note(
                f"{role}: no image{of_classes}: the content of an image decides its side; add "
                "images, or give train/ and test/ folders"
            )
        return
    left_out = {label for commit in shards for _, label in commit["left_out"]} - {UNLABELLED}
    for label in sorted(left_out - kept):
        on_note(f"{role}: every image of class {class_names[label]!r} was skipped")


def _split_digest(
    writer: ShardWriter,
    class_names: Sequence[str],
    shards: Sequence[Mapping[str, Any]],
    role: str | None,
) -> str:
    """Return the digest of the images of a role; where it is None, of all, without hashes."""

    def parts(name: str) -> Iterator[np.ndarray]:
        for commit in shards:
            whole = _whole(writer, commit, name)
            yield whole if role is None else whole[_sides(writer, commit)[role]]

    ids = (decode_id(name) for part in parts("ids") for name in part.tolist())
    hashes = () if role is None else parts("hashes")
    return split_digest(class_names, ids, parts("labels"), hashes)


def _sides(writer: ShardWriter, commit: Mapping[str, Any]) -> dict[str, np.ndarray]:
    hashes = writer.read(commit, "hashes") if commit["role"] == UNDIVIDED else None
    return sides_of(commit["role"], commit["stop"] - commit["start"], hashes)


def _whole(writer: ShardWriter, commit: Mapping[str, Any], name: str) -> np.ndarray:
    """Return ids, labels or hashes of all images of a shard, skipped or not, in their order."""
    if name == "hashes":
        return writer.read(commit, "hashes")
    is_skipped = np.zeros(commit["stop"] - commit["start"], bool)
    labels = np.full(len(is_skipped), UNLABELLED)
    for row, label in commit["left_out"]:
        is_skipped[row - commit["start"]], labels[row - commit["start"]] = True, label
    rows, values = [], []
    for role, of_role in _sides(writer, commit).items():
        for wanted, array in ((of_role & ~is_skipped, name), (of_role & is_skipped, "skipped")):
            if not wanted.any():
                continue
            rows.append(np.flatnonzero(wanted))
            if array == "skipped" and name == "labels":
                values.append(labels[wanted])
            else:
                values.append(writer.read(commit, f"{role}/{array}"))
    joined = np.concatenate(values)
    whole = np.empty(len(is_skipped), joined.dtype)
    whole[np.concatenate(rows)] = joined
    return whole
