"""One of many jobs that make a cache together, and what they must know of each other.

Every job makes its own run of shards, in a folder that all of them share, and reads the
images of these alone. So nobody knows the digest of the data set before all are done: until
then the names and labels stand for it, and each shard keeps the hashes of its images.
"""

from __future__ import annotations

import os
import shlex
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ..backbones.engine import Engine
from ..datasets.dataset import Split, listing_digest, recording
from ..errors import CacheError, OutputError, RecipeError, RemoteError
from ..files import check_writable
from ..notebook import ShownAsTable
from ..progress import OnNote, OnProgress
from ..store.index import COMMITS
from ..store.remote_caches import MirroredWriter
from ..store.shards import (
    ShardRange,
    ShardWriter,
    committed,
    shards_path,
    single_writer,
    unfinished_folder,
)
from .destination import Destination
from .pipeline import run_split
from .provenance import cache_path
from .setting import Setting, check_skipped, kept

JOBS_FIELDS = {"agreed", "command", "n_jobs", "named", "pack"}  # of `agreement`
NAMES = "names:"  # in front of what stands for the digest of a data set while nobody knows it


@dataclass(frozen=True)
class ShareResult(ShownAsTable):
    """What one of many jobs did.

    Parameters
    ----------
    output : Path or str
        The ``.h5`` file that the jobs make together, or its URL.
    folder : Path or str
        The hidden folder where their shards are until then, or its URL.
    share : str
        ``"3/8"``.
    n_images : int
        Images of the share.
    n_resumed : int
        Of these, how many an earlier run had done.
    n_skipped : int
        Of these, how many could not be decoded and were left out.
    n_shards : int
        Shards of the share.
    n_shards_there, n_shards_wanted : int
        Shards of all jobs that are there when this one ends, and that there must be.
    wall_s : float
        Duration of this call.
    next_step : str
        The command that puts all shards together.
    """

    output: Path | str
    folder: Path | str
    share: str
    n_images: int
    n_resumed: int
    n_skipped: int
    n_shards: int
    n_shards_there: int
    n_shards_wanted: int
    wall_s: float
    next_step: str


def check_share(share: tuple[int, int]) -> None:
    """Refuse a share that cannot be.

    Raises
    ------
    RecipeError
        Not (which, of how many), from 1.
    """
    number, total = share
    if not 1 <= number <= total:
        raise RecipeError(
            f"share: expected I/N with I from 1 to N, found {number}/{total}; the first of "
            f"{max(total, 1)} is 1/{max(total, 1)}"
        )


def share_of(shards: list[ShardRange], number: int, total: int) -> list[ShardRange]:
    """Return the shards of job ``number`` (from 1) of ``total``: a run of them, none where few."""
    return shards[(number - 1) * len(shards) // total : number * len(shards) // total]


def provisional_meta(setting: Setting, on_progress: OnProgress) -> dict[str, Any]:
    """Return the provenance while no image has been read.

    Its ``dataset_digest`` is one of the names, or the real one of images that are no files.
    """
    if None in recorded_splits(setting).values():
        return setting.meta(setting.dataset.digest_with(on_progress, setting.on_error))
    return setting.meta(NAMES + listing_digest(setting.dataset))


def recorded_splits(setting: Setting) -> dict[str, Split | None]:
    """Return the splits that record hashes, by role; None where a split is no files."""
    return {role: recording(split) for role, split in setting.dataset.splits()}


def agreement(setting: Setting, n_jobs: int, command: str) -> dict[str, Any]:
    """Return what jobs must agree on, and what whoever packs their shards has to know."""
    return {
        "agreed": {
            "shard_rows": setting.shard_rows,
            "n_train": len(setting.dataset.train),
            "n_test": len(setting.dataset.test),
        },
        "command": command,
        "n_jobs": n_jobs,
        "named": setting.output is not None and Path(setting.output).suffix in (".h5", ".shards"),
        "pack": setting.pack,
    }


def pack_command(path: Path, jobs: Mapping[str, Any]) -> str:
    """Return the command that puts the shards together."""
    return shlex.join(["featcache", "pack", str(path if jobs["named"] else path.parent)])


def run_share(
    setting: Setting,
    share: tuple[int, int],
    command: str,
    build: Callable[[], Engine],
    on_progress: OnProgress,
    on_note: OnNote,
    *,
    destination: Destination | None = None,
    started: float,
) -> ShareResult:
    """Make the shards of one job, as `featcache.extract_share`."""
    meta = provisional_meta(setting, on_progress)
    # Where the digest is known already, nobody asks for hashes.
    by_names = str(meta["dataset_digest"]).startswith(NAMES)
    recorded = recorded_splits(setting) if by_names else {}
    path = cache_path(setting.output, setting.dataset.name, meta)
    _check_free(path)
    if destination:
        destination.check_free(path)
        destination.check_writable()
    check_writable(path)
    everything = setting.shards()
    mine = share_of(everything, *share)
    jobs = agreement(setting, share[1], command)
    with _same_job(path, share, on_note):
        parts = None if destination is None else destination.parts(path)
        writer = (
            ShardWriter(path, meta, jobs=jobs, share=mine, on_progress=on_progress)
            if parts is None
            else MirroredWriter(path, meta, parts, jobs=jobs, share=mine, on_progress=on_progress)
        )
        if writer.damaged:
            on_note(f"{path}: {writer.damaged} was damaged and is made again")
        check_skipped(writer, setting.on_error)
        n_resumed, n_mine = writer.n_done, sum(map(len, mine))
        if n_resumed:
            on_note(f"{path}: going on from {n_resumed:,} of {n_mine:,} images of this share")
        if not mine:
            on_note(
                f"share {share[0]}/{share[1]}: nothing to do, there are {len(everything)} shards"
            )
        if writer.missing(mine):
            try:
                run_shards(setting, mine, recorded, writer, build, on_progress, on_note)
            except KeyboardInterrupt:
                raise KeyboardInterrupt(kept(writer, n_mine)) from None
            except (OutputError, RemoteError) as error:
                raise type(error)(f"{error}; {kept(writer, n_mine)}") from None
    return ShareResult(
        output=path if destination is None else str(destination.of(path)),
        folder=writer.folder if parts is None else str(parts.place),
        share=f"{share[0]}/{share[1]}",
        n_images=n_mine,
        n_resumed=n_resumed,
        n_skipped=writer.skipped(),
        n_shards=len(mine),
        n_shards_there=len(committed(writer.folder) if parts is None else parts.committed()),
        n_shards_wanted=len(everything),
        wall_s=time.perf_counter() - started,
        next_step=(
            pack_command(path, jobs)
            if destination is None
            else shlex.join(["featcache", "pack", str(destination.place)])
        ),
    )


def run_shards(
    setting: Setting,
    shards: Sequence[ShardRange],
    recorded: Mapping[str, Split | None],
    writer: ShardWriter,
    build: Callable[[], Engine],
    on_progress: OnProgress,
    on_note: OnNote,
) -> None:
    """Make those of these shards that are missing, on this machine; ``recorded`` is by role."""
    plan = setting.plan(build())
    for role, split in setting.dataset.splits():
        own = [shard for shard in shards if shard.role == role]
        if own:
            views = setting.views_of(role)
            run_split(
                role,
                split,
                views,
                plan,
                writer,
                own,
                on_progress,
                on_note,
                recorded=recorded.get(role),
            )


def _check_free(path: Path) -> None:
    for existing in (path, shards_path(path)):
        if os.path.lexists(existing):
            raise OutputError(
                f"{existing}: expected a name for a new cache, found that it is there already; "
                "remove it to make it again, or name another --output"
            )


@contextmanager
def _same_job(path: Path, share: tuple[int, int], on_note: OnNote) -> Iterator[None]:
    """Keep a job from running twice at once, where the file system knows locks.

    Two of them would waste time and do no harm: what one writes over the other's is the same
    bytes, or is found out by its checksum.
    """
    folder = unfinished_folder(path) / COMMITS  # it goes, and the locks in it, with the shards
    with ExitStack() as stack:
        try:
            folder.mkdir(parents=True, exist_ok=True)
            name = f"share-{share[0]}-of-{share[1]}"
            stack.enter_context(single_writer(folder / name))
        except OSError as error:  # an OutputError is one
            on_note(f"{path}: {error}; going on without a lock")
        except CacheError as error:
            raise CacheError(f"share {share[0]}/{share[1]}: {error}") from None
        yield
