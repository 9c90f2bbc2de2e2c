"""Run the backbone once: data set + preprocessing + weights + engine -> cache."""

from __future__ import annotations

import inspect
import os
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from ..backbones.architectures import check_cuts, get_backbone
from ..backbones.choice import choose_engine
from ..backbones.engine import Engine, build_engine
from ..backbones.weights import load_weights
from ..datasets.dataset import Dataset
from ..datasets.images import OnError
from ..datasets.loading import load_dataset
from ..errors import OutputError, RecipeError
from ..files import check_writable
from ..preprocess import VIEWS
from ..progress import OnNote, OnProgress, silent
from ..store.cache import Cache, load
from ..store.format import DTYPES
from ..store.shards import SHARD_ROWS, ShardWriter, discard_unfinished, shards_path, single_writer
from .destination import Destination, destination
from .jobs import ShareResult, check_share, run_share
from .once import Make, extract_once, here, may_be_there
from .pipeline import run_split
from .provenance import cache_path, matching
from .ray import import_ray
from .result import ExtractResult, result_of
from .setting import Setting, check_rows, check_skipped, command_line, kept, pack_limit, took

CUT = "avgpool"
_MANY_IMAGES = 1 << 18  # from here on larger shards, lest the manifest grow with every one
_MAX_SHARDS = 1 << 16  # of which a manifest has 35 MB, and a cache opens in seconds


def extract(
    dataset: str | Path | Dataset = "cifar10",
    *,
    backbone: str = "resnet18",
    weights: str | Path = "imagenet",
    size: int | None = None,
    cut: str | Sequence[str] = CUT,
    engine: str = "auto",
    device: str = "auto",
    precision: str = "f32",
    dtype: str = "float32",
    batch_size: int | None = None,
    views: str = "none",
    on_error: OnError = "fail",
    train_limit: int | None = None,
    test_limit: int | None = None,
    output: str | Path | None = None,
    pack: bool | None = None,
    force: bool = False,
    executor: str = "local",
    address: str | None = None,
    workers: int | None = None,
    data_root: str | Path | None = None,
    on_progress: OnProgress = silent,
    on_note: OnNote = silent,
) -> ExtractResult:
    """Run a pretrained backbone once over a data set and cache its features.

    A run that was killed goes on where it was: the same call finds what is done.

    Parameters
    ----------
    dataset : str, Path or Dataset
        As `featcache.load_dataset` takes it. Images behind a URL are read once, and hashed on
        the way, unless there is a cache that may be of them.
    backbone : str
        ``"resnet18"``, ``"resnet34"`` or ``"resnet50"``.
    weights : str or Path
        ``"imagenet"``, ``"tinyimagenet32"``, or a checkpoint's path.
    size : int, optional
        Side of the input in pixels; the weights' own by default.
    cut : str or sequence of str
        Where features are taken: ``"avgpool"`` (N, D), ``"layer1"`` to ``"layer4"``
        (N, C, H, W); several in one pass, also as ``"avgpool,layer3"``.
    engine : str
        ``"auto"``, ``"oneflow"``, ``"openvino"`` or ``"torch"``.
    device : str
        ``"auto"``, ``"cpu"``, ``"cuda"`` or ``"mps"``.
    precision : str
        What the engine computes in: ``"f32"``, ``"bf16"`` or ``"f16"``.
    dtype : str
        What features are kept as: ``"float32"``, or ``"float16"`` at half the size.
    batch_size : int, optional
        Images per forward pass, the engine's own choice by default; it changes speed and
        memory, features by rounding at most.
    views : str
        ``"none"``, or ``"flips"`` for the four flip views of every training image.
    on_error : str
        ``"fail"`` at an image that does not decode, or ``"skip"`` it: the cache lists it.
    train_limit, test_limit : int, optional
        Only a stratified draw of so many images, always the same: the one that
        `featcache.probe` and `featcache.finetune` take.
    output : str or Path, optional
        A ``.h5`` file, or the folder for one; ``cache/`` by default. Where it is a URL, the cache
        is made in ``remote/`` in the cache folder, and put there when it is whole.
    pack : bool, optional
        One HDF5 file, or (False) a folder of shards beside it; by default shards above
        `PACK_LIMIT_BYTES`.
    force : bool
        Make the cache again even if it, or a part of it, is there.
    executor : str
        ``"local"``, or ``"ray"``: the shards are made by the workers of a Ray cluster, which
        must all see the images under the same path.
    address : str, optional
        Of the Ray cluster; by default that of ``RAY_ADDRESS``, or one that is started on this
        machine for the time being.
    workers : int, optional
        Processes with an engine each on the cluster: by default one per machine, or per GPU.
    data_root : str or Path, optional
        Where named data sets are kept.
    on_progress : callable
        Hears of downloads and images.
    on_note : callable
        Told, in a sentence each, which engine was chosen, and what was found to go on from.

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
    for what, value in (("address", address), ("workers", workers)):
        if value is not None and executor != "ray":
            raise RecipeError(f"{what}: is of the executor ray alone; use --executor ray with it")
    if workers is not None and workers < 1:
        raise RecipeError(f"workers: expected at least 1, found {workers}")
    if executor == "ray":
        import_ray()
    options: dict[str, Any] = {
        "backbone": backbone,
        "weights": weights,
        "size": size,
        "cut": cut,
        "engine": engine,
        "device": device,
        "precision": precision,
        "dtype": dtype,
        "batch_size": batch_size,
        "views": views,
        "on_error": on_error,
        "train_limit": train_limit,
        "test_limit": test_limit,
        "output": output,
        "pack": pack,
        "data_root": data_root,
    }
    command = command_line(dataset, options, _DEFAULTS)
    there = destination(output)
    if there:
        options["output"] = there.local
    setting = _setting(dataset, **options, on_progress=on_progress, on_note=on_note)

    on_note(setting.choice.why)
    make = None
    if executor == "ray":
        from .ray import on_ray

        make = on_ray(setting, address, workers, on_progress, on_note)
    return Run(
        setting=setting,
        destination=there,
        command=command,
        force=force,
        build=lambda: _engine(setting, on_note),
        make=make,
        on_progress=on_progress,
        on_note=on_note,
        started=started,
    ).extract()


_OF_THE_CALL = ("dataset", "force", "executor", "address", "workers", "on_progress", "on_note")
# Of the options that say what is made and where, for whoever is given only some of them.
_DEFAULTS = {
    name: parameter.default
    for name, parameter in inspect.signature(extract).parameters.items()
    if name not in _OF_THE_CALL
}


def extract_share(
    dataset: str | Path | Dataset = "cifar10",
    *,
    share: tuple[int, int],
    on_progress: OnProgress = silent,
    on_note: OnNote = silent,
    **options: Any,
) -> ShareResult:
    """Do one of many jobs' part of an extraction; `featcache.pack` puts the parts together.

    The jobs may run at the same time, on any machines that see the images and the output
    under the same paths or URLs. None reads an image of another's share. A job that was killed goes
    on where it was: the same call finds what is done.

    Parameters
    ----------
    dataset : str, Path or Dataset
        As `featcache.load_dataset` takes it.
    share : (int, int)
        Which job this is, from 1, and of how many. Each takes a run of shards in the order of
        the rows, so that which shards there are does not depend on the number of jobs.
    on_progress, on_note : callable
        As in `featcache.extract`.
    **options
        Those of `featcache.extract` that say what is made and where: not ``force``,
        ``executor``, ``address`` and ``workers``.

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
        The same job is already at work.
    FeatcacheError, KeyboardInterrupt
        As `featcache.extract`.
    """
    started = time.perf_counter()
    check_share(share)
    unknown = sorted(options.keys() - _DEFAULTS)
    if unknown:
        raise TypeError(f"extract_share: expected options of extract, found {', '.join(unknown)}")
    command = command_line(dataset, options, _DEFAULTS)
    options = {**_DEFAULTS, **options}
    there = destination(options["output"])
    if there:
        options["output"] = there.local
    setting = _setting(dataset, **options, on_progress=on_progress, on_note=on_note)
    on_note(setting.choice.why)
    return run_share(
        setting,
        share,
        command,
        lambda: _engine(setting, on_note),
        on_progress,
        on_note,
        destination=there,
        started=started,
    )


def _setting(
    dataset: str | Path | Dataset,
    *,
    backbone: str,
    weights: str | Path,
    size: int | None,
    cut: str | Sequence[str],
    engine: str,
    device: str,
    precision: str,
    dtype: str,
    batch_size: int | None,
    views: str,
    on_error: OnError,
    train_limit: int | None,
    test_limit: int | None,
    output: str | Path | None,
    pack: bool | None,
    data_root: str | Path | None,
    on_progress: OnProgress,
    on_note: OnNote,
) -> Setting:
    """Check every option, and load what is needed before the first image is read."""
    wanted = [name.strip() for name in cut.split(",")] if isinstance(cut, str) else cut
    # Vectors come first where there are any: they are what a probe takes.
    cuts = tuple(sorted(check_cuts(wanted), key=lambda name: name != CUT))
    for what, value, known in (
        ("views", views, tuple(VIEWS)),
        ("dtype", dtype, tuple(DTYPES)),
        ("on error", on_error, ("fail", "skip")),
        ("pack", pack, (None, True, False)),
    ):
        if value not in known:
            raise RecipeError(
                f"{what}: expected one of {', '.join(map(str, known))}, found {value!r}"
            )
    if batch_size is not None and batch_size < 1:
        raise RecipeError(f"batch size: expected at least 1, found {batch_size}")
    get_backbone(backbone)
    choice = choose_engine(engine, device, precision)
    if not isinstance(dataset, Dataset):
        dataset = load_dataset(dataset, data_root=data_root, on_progress=on_progress)
    for note in dataset.notes:
        on_note(note)
    dataset = dataset.limited(train_limit, test_limit)
    if output is not None and Path(output).suffix == ".shards" and pack is None:
        pack = False
    return Setting(
        dataset=dataset,
        weights=load_weights(weights, backbone, size=size, on_progress=on_progress),
        choice=choice,
        cuts=cuts,
        dtype=dtype,
        views=views,
        batch_size=batch_size,
        on_error=on_error,
        shard_rows=_shard_rows(len(dataset.train) + len(dataset.test)),
        output=output,
        pack=pack,
    )


def _shard_rows(n_images: int) -> int:
    rows = SHARD_ROWS if n_images <= _MANY_IMAGES else 4 * SHARD_ROWS
    while n_images > rows * _MAX_SHARDS:
        rows *= 4
    return rows


def _engine(setting: Setting, on_note: OnNote) -> Engine:
    # What it may compile is told of the whole data set, so that every job compiles the same.
    n_images, loaded = setting.n_passes, setting.weights
    return build_engine(setting.choice, loaded, setting.cuts, n_images=n_images, on_note=on_note)


@dataclass(frozen=True)
class Run:
    """One extraction, all of whose ingredients are known.

    Parameters
    ----------
    setting : Setting
        What is made.
    destination : Destination or None
        Where the cache goes behind a URL.
    command : str
        The command that asks for it.
    force : bool
        As in `featcache.extract`.
    build : callable
        Builds the engine.
    make : callable or None
        Has the shards made elsewhere; None is this machine.
    on_progress, on_note : callable
        As in `featcache.extract`.
    started : float
        When the call began.
    """

    setting: Setting
    destination: Destination | None
    command: str
    force: bool
    build: Callable[[], Engine]
    make: Make | None
    on_progress: OnProgress
    on_note: OnNote
    started: float

    def extract(self) -> ExtractResult:
        """Find the cache, or make it; and put it where it was asked for."""
        setting, there = self.setting, self.destination
        # Elsewhere each machine hashes its own images; of a store, each read is a request.
        reads_once = self.make is not None or setting.reads_once
        if reads_once and (self.force or not self._may_be_there()):
            return self._made_once()
        meta = setting.meta(setting.dataset.digest_with(self.on_progress, setting.on_error))
        path = cache_path(setting.output, setting.dataset.name, meta)
        if there and not self.force:
            same = there.found(path, meta, setting, self.started)
            if same:
                return same
        for existing in (path, shards_path(path)):
            if os.path.lexists(existing) and not self.force:
                cache = matching(existing, meta, setting.on_error)
                discard_unfinished(path)
                if setting.pack is (existing.suffix != ".h5"):
                    self.on_note(
                        f"{existing}: is there in this form; use --force to make the other"
                    )
                return self._delivered(self._result(cache, reused=True))
        if reads_once:
            return self._made_once()
        self._check_destination()
        check_writable(path)
        with single_writer(path):
            made, n_resumed = run_here(
                setting, path, meta, self.force, self.build, self.on_progress, self.on_note
            )
        cache = load(made)
        self._tell_of_skipped_classes(cache)
        return self._delivered(self._result(cache, reused=False, n_resumed=n_resumed))

    def _may_be_there(self) -> bool:
        there = self.destination
        return may_be_there(self.setting) or (there is not None and there.may_be(self.setting))

    def _made_once(self) -> ExtractResult:
        self._check_destination()
        make = self.make or here(self.setting, self.build, self.on_progress, self.on_note)
        return self._delivered(
            extract_once(
                self.setting,
                self.command,
                make,
                self.force,
                self.on_progress,
                self.on_note,
                started=self.started,
            )
        )

    def _check_destination(self) -> None:
        if self.destination:
            self.destination.check_writable()

    def _delivered(self, result: ExtractResult) -> ExtractResult:
        if self.destination is None:
            return result
        return self.destination.deliver(
            result, self.force, self.started, self.on_progress, self.on_note
        )

    def _result(self, cache: Cache, *, reused: bool, n_resumed: int = 0) -> ExtractResult:
        why = self.setting.choice.why
        return result_of(cache, why, reused=reused, n_resumed=n_resumed, started=self.started)

    def _tell_of_skipped_classes(self, cache: Cache) -> None:
        dataset = self.setting.dataset
        for (role, split), found in zip(dataset.splits(), (cache.train, cache.test), strict=True):
            for label in np.setdiff1d(split.labels, found.labels):
                name = dataset.class_names[label]
                self.on_note(f"{role}: every image of class {name!r} was skipped")


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
