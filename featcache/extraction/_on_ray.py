"""The shards of an extraction made on a Ray cluster; this process is the one that writes."""

from __future__ import annotations

from ..distribution import Made, Task, Work, connected, run_tasks
from ..progress import OnNote, OnProgress, Progress
from ..store import ShardWriter, encoded_ids
from ._once import Make
from ._setting import Setting

__all__ = ["on_ray"]


def on_ray(
    setting: Setting,
    address: str | None,
    workers: int | None,
    on_progress: OnProgress,
    on_note: OnNote,
) -> Make:
    """Return what has the shards made by the workers of a cluster."""

    def make(writer: ShardWriter) -> None:
        _run(setting, writer, address, workers, on_progress, on_note)

    return make


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
