"""Run the backbone once: data set + preprocessing + weights + engine -> cache."""

from __future__ import annotations

import os
import time
from collections.abc import Sequence
from dataclasses import replace
from datetime import datetime, timezone
from functools import cache
from pathlib import Path

import numpy as np

from ..backbones.architectures import BACKBONES
from ..backbones.choice import INT8, choose_engine, native_precisions
from ..backbones.engine import Engine, build_engine, settled
from ..backbones.loading import load_weights
from ..datasets.dataset import Dataset
from ..errors import RecipeError
from ..files import user_path
from ..options import with_options
from ..progress import OnNote, OnProgress, silent
from ..remote import RemotePlace, located
from ..store.shards import (
    SHARD_ROWS,
    ShardRange,
    ShardWriter,
    check_replaceable,
    discard_unfinished,
    shards_path,
)
from ..store.table_file import attach
from .destination import Destination, destination
from .jobs import Make, check_share, make_cache, run_share
from .options import ExtractOptions
from .pipeline import run_shards
from .plan import SUFFIXES, Plan, Work, known_rows, matching, remembered_hashes
from .precision import calibrated, with_int8, with_precision
from .result import ExtractResult, ShareResult, result_of

_MANY_IMAGES = 1 << 18  # larger shards from here on keep the manifest small
_LONG_S = 60.0  # of a run after which a faster precision is suggested
_MAX_SHARDS = 1 << 16  # of which a manifest has 35 MB, and a cache opens in seconds


@with_options(ExtractOptions)
def extract(
    dataset: str | Path | Dataset = "cifar10",
    *,
    options: ExtractOptions,
    force: bool = False,
    executor: str = "local",
    address: str | None = None,
    workers: int | None = None,
    on_progress: OnProgress = silent,
    on_note: OnNote = silent,
) -> ExtractResult:
    """Run a pretrained backbone once over a data set and cache its features.

    Every image is read once, and hashed as it is read. Where there is a cache already that may be
    of these images, they are hashed first, so that a changed image is noticed. The same call
    resumes a run that was killed.

    Parameters
    ----------
    dataset : str, Path or Dataset
        As `featcache.load_dataset` takes it.
    options : ExtractOptions
        What is made, and where; also field by field: ``extract("digits", size=64)``.
    force : bool
        Make the cache again even if it, or a part of it, is there, and compute every image.
    executor : str
        ``"local"``, or ``"ray"``: the workers of a Ray cluster make the shards. All of them
        must see the images under the same path.
    address : str, optional
        Address of the Ray cluster; by default ``RAY_ADDRESS``, or a cluster that is started on
        this machine for this call.
    workers : int, optional
        Processes with an engine each on the cluster, at least 1; by default one per machine, or
        per GPU.
    on_progress : callable
        Called with the progress of downloads and images.
    on_note : callable
        Receives one-line notes, such as which engine was chosen.

    Returns
    -------
    ExtractResult
        ``result.load()`` opens the cache.

    Raises
    ------
    DatasetError, WeightsError, EngineUnavailableError, RecipeError, RemoteError, OutputError
        An ingredient is missing or unfit, before the long work begins.
    CacheMismatchError
        ``output`` is a cache of other ingredients; the message lists them.
    KeyboardInterrupt
        Ctrl-C; the text says how much is done and kept.

    See Also
    --------
    extract_share : a part of it, for one of many jobs.
    """
    started = time.perf_counter()
    if executor not in ("local", "ray"):
        raise RecipeError(f"executor: expected local or ray, found {executor!r}")
    for name, value in (("address", address), ("workers", workers)):
        if value is not None and executor != "ray":
            raise RecipeError(f"{name}: belongs to --executor ray; use it with that executor")
    if workers is not None and workers < 1:
        raise RecipeError(f"workers: expected at least 1, found {workers}")
    if executor == "ray":
        from .ray import import_ray, on_ray

        import_ray()
    plan, there = _plan(dataset, options, on_progress, on_note)
    with remembered_hashes(plan.dataset, plan.options):
        if options.precision == "auto":
            plan = with_precision(plan, force, on_progress, on_note)
        elif options.precision == INT8:
            plan = with_int8(plan, force, on_progress, on_note)
        on_note(plan.work.choice.why)
        if force:
            _check_other_forms(plan)
        else:
            existing = _existing(plan, there, started, on_progress, on_note)
            if existing:
                _attach_table(plan.dataset, existing)
                return existing
        if there:
            there.check_writable()
        make = (
            _here(plan, options.reuse and not force, on_progress, on_note)
            if executor == "local"
            else on_ray(plan, address, workers, on_progress, on_note)
        )
        command = options.command(dataset)
        began = time.perf_counter()
        result = make_cache(plan, command, make, force, on_progress, on_note, started=started)
        took_s = time.perf_counter() - began
        is_f32 = options.precision == result.precision == "f32"
        if took_s > _LONG_S and is_f32 and "bf16" in native_precisions(plan.work.choice):
            on_note(
                f"this took {took_s / 60:.1f} minutes in f32, and bf16 is native here: --precision "
                "auto takes it where it is faster and changes none of your features by much"
            )
    if there:
        result = there.deliver(result, force, started, on_progress, on_note)
    _attach_table(plan.dataset, result)
    return result


@with_options(ExtractOptions)
def extract_share(
    dataset: str | Path | Dataset = "cifar10",
    *,
    share: tuple[int, int],
    options: ExtractOptions,
    on_progress: OnProgress = silent,
    on_note: OnNote = silent,
) -> ShareResult:
    """Do one of many jobs' part of an extraction; `featcache.pack` joins the parts.

    The jobs may run at the same time, on any machines that see the images and the output
    under the same paths or URLs. None reads an image of another's share. The same call resumes a
    job that was killed.

    Parameters
    ----------
    dataset : str, Path or Dataset
        As `featcache.load_dataset` takes it.
    share : (int, int)
        Which job this is, from 1, and of how many. Each takes a run of shards in the order of
        the rows; the shards themselves do not depend on the number of jobs.
    options : ExtractOptions
        The same for all jobs; also field by field, as in `featcache.extract`.
    on_progress, on_note : callable
        As in `featcache.extract`.

    Returns
    -------
    ShareResult

    Raises
    ------
    RecipeError
        No such share.
    CacheMismatchError
        Other jobs there make something else; the message lists the fields that differ.
    CacheError
        The same job is already running.
    FeatcacheError, KeyboardInterrupt
        As `featcache.extract`.
    """
    started = time.perf_counter()
    check_share(share)
    if options.precision == "auto":
        raise RecipeError(
            "precision: expected f32, bf16, f16 or int8 for one of many jobs, since all must "
            "compute in the same one, found auto; see what --precision auto takes for a small "
            "--train-limit"
        )
    plan, there = _plan(dataset, options, on_progress, on_note)
    on_note(plan.work.choice.why)
    if plan.dataset.table is not None:
        on_note("jobs attach no table: run featcache label CACHE TABLE after featcache pack")
    command = options.command(dataset)
    with remembered_hashes(plan.dataset, plan.options):
        if options.precision == INT8:
            plan, _, _ = calibrated(plan)
        make = _here(plan, options.reuse, on_progress, on_note)
        return run_share(
            plan, share, command, make, on_progress, on_note, there=there, started=started
        )


def _plan(
    dataset: str | Path | Dataset,
    options: ExtractOptions,
    on_progress: OnProgress,
    on_note: OnNote,
) -> tuple[Plan, Destination | None]:
    """Load the data set and the weights, and choose the engine, before the first image is read."""
    there = destination(options.output)
    precision = "f32" if options.precision == "auto" else options.precision
    if options.backbone in BACKBONES:  # said before anything is downloaded
        choose_engine(options.engine, options.device, precision)
    if not isinstance(dataset, Dataset):
        dataset = options.load_dataset(dataset, on_progress)
    for note in dataset.notes:
        on_note(note)
    options = replace(options, output=there.local) if there else options
    if dataset.undivided and (options.train_limit, options.test_limit) != (None, None):
        with remembered_hashes(dataset, options):
            dataset.digest_with(on_progress, options.on_error)  # which image is on which side
    dataset = dataset.limited(options.train_limit, options.test_limit)
    weights = load_weights(
        options.weights, options.backbone, **options.overrides, on_progress=on_progress
    )
    for note in weights.notes:
        on_note(note)
    choice = choose_engine(options.engine, options.device, precision, weights.engines)
    choice = settled(choice, weights, options.cuts)
    listed = dataset.listed()
    work = Work(
        options=options,
        weights=weights,
        choice=choice,
        n_passes=sum(
            len(split) * len(options.views_of("train" if split is listed[0] else "test"))
            for split in listed
        ),
    )
    return Plan(dataset, work, _shard_rows(sum(map(len, listed)))), there


def _shard_rows(n_images: int) -> int:
    rows = SHARD_ROWS if n_images <= _MANY_IMAGES else 4 * SHARD_ROWS
    while n_images > rows * _MAX_SHARDS:
        rows *= 4
    return rows


def _here(plan: Plan, reuse: bool, on_progress: OnProgress, on_note: OnNote) -> Make:
    """Return a function that makes shards on this machine."""

    def make(writer: ShardWriter, shards: Sequence[ShardRange]) -> None:
        work = plan.work
        known = known_rows(plan) if reuse else None

        @cache
        def engine() -> Engine:
            # It may compile for the whole data set, so that every job compiles the same.
            return build_engine(
                work.choice,
                work.weights,
                work.options.cuts,
                n_images=work.n_passes,
                on_note=on_note,
            )

        n_images = sum(map(len, writer.missing(shards)))
        run_shards(plan, engine, writer, shards, known, on_progress, on_note)
        if known is not None:
            for note in known.notes:
                on_note(note)
            if known.taken:
                paths = [str(path) for path in known.taken]
                places = " and ".join(paths) if len(paths) < 3 else f"{len(paths)} caches"
                on_note(
                    f"{known.taken.total():,} of {n_images:,} rows reused from {places}; "
                    "--no-reuse computes them again"
                )

    return make


def _check_other_forms(plan: Plan) -> None:
    """Refuse to replace, beside the name that --force is for, what is no cache of ours."""
    output = plan.options.output
    if output is None or Path(output).suffix not in SUFFIXES:
        return
    path = user_path(output).with_suffix(".h5")
    for form in (path, shards_path(path)):
        if form != user_path(output):
            check_replaceable(form, plan.dataset.name)


def _existing(
    plan: Plan,
    there: Destination | None,
    started: float,
    on_progress: OnProgress,
    on_note: OnNote,
) -> ExtractResult | None:
    """Return the cache that is there of the same images, which are hashed only if there may be."""
    if not plan.may_be_there() and not (there and there.may_be_there(plan)):
        return None
    on_error = plan.options.on_error
    meta = plan.meta(plan.dataset.digest_with(on_progress, on_error))
    path = plan.path(meta)
    existing = there.matching(path, meta, plan, started) if there else None
    if existing:
        return existing
    for form in (path, shards_path(path)):
        if os.path.lexists(form):
            found = matching(form, meta, on_error)
            discard_unfinished(plan.path(plan.meta_before_reading(on_progress)))
            if plan.options.packed is (form.suffix != ".h5"):
                on_note(f"{form}: is there in this form; use --force to make the other")
            why = plan.work.choice.why
            result = result_of(found, why, reused=True, started=started)
            return there.deliver(result, False, started, on_progress, on_note) if there else result
    return None


def _attach_table(dataset: Dataset, result: ExtractResult) -> None:
    """Attach a data set's table to the cache that was made of it, in the place of any before."""
    table = dataset.table
    if table is None:
        return
    cache = result.load()
    row_of = {id_: row for row, id_ in enumerate(dataset.table_ids)}
    ids = (id_ for _, split in cache.splits() for id_ in split.ids)
    rows = np.fromiter((row_of.get(id_, -1) for id_ in ids), np.int64)
    n_missing = int((rows < 0).sum())
    facts = {
        "source": table.source,
        "sha256": table.sha256,
        "created": datetime.now(timezone.utc).isoformat(timespec="seconds"),
        "key": "the images of the data set",
        "n_rows": len(table),
        "n_matched": len(rows) - n_missing,
        "n_missing": n_missing,
        "n_doubled": 0,
        "n_left_over": len(table) - (len(rows) - n_missing),
    }
    path = attach(cache.path, cache.fingerprint, table.take(rows), facts)
    place = located(result.cache)
    if isinstance(place, RemotePlace):
        place.parent.within(path.name).send(path, lambda done: None)
