"""Extraction on this machine alone."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

from ..engines import Engine
from ..errors import OutputError
from ..pipeline import run_split
from ..progress import OnNote, OnProgress
from ..store import ShardWriter
from ._setting import Setting, check_rows, check_skipped, kept, pack_limit, took

__all__ = ["run_here"]


def run_here(
    setting: Setting,
    path: Path,
    meta: dict[str, Any],
    force: bool,
    build: Callable[[], Engine],
    on_progress: OnProgress,
    on_note: OnNote,
) -> tuple[Path, int]:
    """Make what is missing of a cache; return its path and the images that were there."""
    writer = ShardWriter(path, meta, force=force)
    try:
        return _run(writer, setting, build, on_progress, on_note)
    finally:
        if not writer.n_done:  # nothing to go on from
            writer.discard()


def _run(
    writer: ShardWriter,
    setting: Setting,
    build: Callable[[], Engine],
    on_progress: OnProgress,
    on_note: OnNote,
) -> tuple[Path, int]:
    path = writer.path
    if writer.damaged:
        on_note(f"{path}: {writer.damaged} was damaged and is made again")
    n_resumed, n_images = writer.n_done, setting.n_images
    check_skipped(writer, setting.on_error)
    if n_resumed:
        on_note(f"{path}: going on from {n_resumed:,} of {n_images:,} images")
    plan = setting.plan(build())
    try:
        for role, split in setting.dataset.splits():
            shards = [shard for shard in setting.shards() if shard.role == role]
            views = setting.views_of(role)
            run_split(role, split, views, plan, writer, shards, on_progress, on_note)
            check_rows(writer, role, len(split))
    except KeyboardInterrupt:
        raise KeyboardInterrupt(kept(writer, n_images)) from None
    except OutputError as error:
        raise OutputError(f"{error}; {kept(writer, n_images)}") from None
    return writer.finish(took(writer), pack_limit=pack_limit(setting.pack)), n_resumed
