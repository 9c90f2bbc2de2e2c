"""Extraction on a Ray cluster: every shard a task, and this process the one that writes."""

from __future__ import annotations

import os
from pathlib import Path

from ..distribution import Made, Task, Work, connected, run_tasks
from ..errors import OutputError
from ..files import check_writable, user_path
from ..progress import OnNote, OnProgress, Progress
from ..store import ShardWriter, default_folder, encoded_ids, load, shards_path, single_writer
from ._jobs import agreement, provisional_meta
from ._packing import finish_jobs
from ._provenance import cache_path
from ._result import ExtractResult, result_of
from ._setting import Setting, check_skipped, kept, pack_limit

__all__ = ["extract_on_ray", "may_be_there"]


def may_be_there(setting: Setting) -> bool:
    """Tell whether there is a cache that could be the one that is wanted.

    Only then is it worth to hash every image before the work, as one machine does.
    """
    target = user_path(setting.output) if setting.output else default_folder()
    if target.suffix in (".h5", ".shards"):
        path = target.with_suffix(".h5")
        return os.path.lexists(path) or os.path.lexists(shards_path(path))
    meta = setting.meta("")
    stem = Path(cache_path(setting.output, setting.dataset.name, meta)).stem.rpartition("-")[0]
    return any(
        path.suffix in (".h5", ".shards") and path.name.startswith(f"{stem}-")
        for path in (target.iterdir() if target.is_dir() else ())
    )


def extract_on_ray(
    setting: Setting,
    command: str,
    address: str | None,
    workers: int | None,
    force: bool,
    on_progress: OnProgress,
    on_note: OnNote,
    *,
    started: float,
) -> ExtractResult:
    """Make a cache with the workers of a cluster, as `featcache.extract` does."""
    meta = provisional_meta(setting, on_progress)
    path = cache_path(setting.output, setting.dataset.name, meta)
    jobs = agreement(setting, 1, command)
    check_writable(path)
    with single_writer(path):
        writer = ShardWriter(path, meta, force=force, jobs=jobs, on_progress=on_progress)
        if writer.damaged:
            on_note(f"{path}: {writer.damaged} was damaged and is made again")
        check_skipped(writer, setting.on_error)
        n_resumed, n_images = writer.n_done, setting.n_images
        if n_resumed:
            on_note(f"{path}: going on from {n_resumed:,} of {n_images:,} images")
        try:
            _run(setting, writer, address, workers, on_progress, on_note)
        except KeyboardInterrupt:
            raise KeyboardInterrupt(kept(writer, n_images)) from None
        except OutputError as error:
            raise OutputError(f"{error}; {kept(writer, n_images)}") from None
        finally:
            if not writer.n_done:  # nothing to go on from
                writer.discard()
        limit = pack_limit(setting.pack)
        made, reused = finish_jobs(writer, meta, jobs, limit, force, on_note)
    why = setting.choice.why
    return result_of(load(made), why, reused=reused, n_resumed=n_resumed, started=started)


def _run(
    setting: Setting,
    writer: ShardWriter,
    address: str | None,
    workers: int | None,
    on_progress: OnProgress,
    on_note: OnNote,
) -> None:
    """Have the shards made that are missing, and commit them as they come back."""
    splits = dict(setting.dataset.splits())
    tasks = [
        Task(shard, splits[shard.role], tuple(setting.views_of(shard.role)))
        for shard in writer.missing(setting.shards())
    ]
    if not tasks:
        return
    ids = {role: encoded_ids(split.ids) for role, split in splits.items()}
    work = Work(
        weights=setting.weights,
        choice=setting.choice,
        cuts=setting.cuts,
        dtype=setting.dtype,
        batch_size=setting.batch_size,
        on_error=setting.on_error,
        n_passes=setting.n_passes,
    )

    def keep(task: Task, made: Made) -> None:
        shard, split, role = made.shard, task.split, task.shard.role
        writer.commit(
            role,
            shard.start,
            shard.stop,
            shard.arrays(split, ids[role]),
            shard.facts,
            hashes=made.hashes,
            left_out=shard.left_out(split),
        )
        on_progress(Progress("images", writer.n_done, setting.n_images))

    on_progress(Progress("images", writer.n_done, setting.n_images))
    with connected(address) as ray:
        run_tasks(ray, work, tasks, workers, keep, on_note)
