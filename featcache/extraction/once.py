"""Extraction that reads every image once, as jobs do: its hash is made on the way to the decoder.

On one machine with its own disk, images are hashed before the work, so that a cache that is
there is known at once. Where every read is a request to a store, or the images are spread over
the machines of a cluster, that would cost as much again.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from ..backbones.engine import Engine
from ..errors import CacheError, OutputError
from ..files import check_writable, user_path
from ..progress import OnNote, OnProgress
from ..store.cache import load
from ..store.index import default_folder
from ..store.shards import ShardWriter, shards_path, single_writer
from .jobs import agreement, provisional_meta, recorded_splits, run_shards
from .packing import finish_jobs
from .provenance import cache_path, may_be_of, name_stem
from .result import ExtractResult, result_of
from .setting import Setting, check_skipped, kept, pack_limit

Make = Callable[[ShardWriter], None]


def may_be_there(setting: Setting) -> bool:
    """Tell whether there is a cache that could be the one that is wanted.

    Only then is it worth to hash every image before the work, as one machine does. Of a cache
    under the very name that was asked for, whatever is in it has to be told.
    """
    target = user_path(setting.output) if setting.output else default_folder()
    if target.suffix in (".h5", ".shards"):
        path = target.with_suffix(".h5")
        return os.path.lexists(path) or os.path.lexists(shards_path(path))
    meta = setting.meta("")
    stem = name_stem(setting.dataset.name, meta)
    return any(
        path.suffix in (".h5", ".shards") and path.name.startswith(f"{stem}-") and _fits(path, meta)
        for path in (target.iterdir() if target.is_dir() else ())
    )


def _fits(path: Path, meta: Mapping[str, Any]) -> bool:
    try:
        return may_be_of(load(path).meta, meta)
    except CacheError:
        return True  # whoever looks closer will say what is wrong with it


def extract_once(
    setting: Setting,
    command: str,
    make: Make,
    force: bool,
    on_progress: OnProgress,
    on_note: OnNote,
    *,
    started: float,
) -> ExtractResult:
    """Make a cache as `featcache.extract` does.

    Parameters
    ----------
    setting : Setting
        What is made.
    command : str
        The command that asks for it.
    make : callable
        Makes the shards that a writer does not have yet, and commits them with their hashes.
    force : bool
        As in `featcache.extract`.
    on_progress, on_note : callable
        As in `featcache.extract`.
    started : float
        When the call began.
    """
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
            if writer.missing(setting.shards()):
                make(writer)
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


def here(
    setting: Setting, build: Callable[[], Engine], on_progress: OnProgress, on_note: OnNote
) -> Make:
    """Return what makes the shards on this machine."""

    def make(writer: ShardWriter) -> None:
        recorded = recorded_splits(setting)
        run_shards(setting, setting.shards(), recorded, writer, build, on_progress, on_note)

    return make
