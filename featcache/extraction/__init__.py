"""Run the backbone once: data set + preprocessing + weights + engine -> cache."""

from __future__ import annotations

import os
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from ..backbone import check_cuts, get_backbone
from ..cores import usable_cores
from ..datasets import Dataset, load_dataset
from ..decoding import OnError
from ..engines import build_engine, choose_engine
from ..errors import CacheMismatchError, OutputError, RecipeError
from ..files import check_writable
from ..pipeline import STAGES, Plan, bottleneck, run_split
from ..preprocess import VIEWS
from ..progress import OnNote, OnProgress, silent
from ..store import (
    DTYPES,
    PACK_LIMIT_BYTES,
    SHARD_ROWS,
    ShardWriter,
    discard_unfinished,
    load,
    shards_path,
    single_writer,
)
from ..weights import load_weights
from ._provenance import cache_path, ingredients, matching
from ._result import ExtractResult, result_of

__all__ = ["ExtractResult", "cache_path", "extract"]

CUT = "avgpool"
_MANY_IMAGES = 1 << 18  # from here on larger shards, lest the manifest grow with every one


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
    data_root: str | Path | None = None,
    on_progress: OnProgress = silent,
    on_note: OnNote = silent,
) -> ExtractResult:
    """Run a pretrained backbone once over a data set and cache its features.

    A run that was killed goes on where it was: the same call finds what is done.

    Parameters
    ----------
    dataset : str, Path or Dataset
        As `featcache.load_dataset` takes it.
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
        ``"auto"``, ``"oneflow"`` or ``"openvino"``.
    device : str
        ``"auto"``, ``"cpu"`` or ``"cuda"``.
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
        A ``.h5`` file, or the folder for one; ``cache/`` by default.
    pack : bool, optional
        One HDF5 file, or (False) a folder of shards beside it; by default shards above
        `PACK_LIMIT_BYTES`.
    force : bool
        Make the cache again even if it, or a part of it, is there.
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
    DatasetError, WeightsError, EngineUnavailableError, RecipeError, OutputError
        An ingredient is missing or unfit, before the long work begins.
    CacheMismatchError
        ``output`` is a cache of other ingredients; the message lists them.
    KeyboardInterrupt
        Ctrl-C; the text says how much is done and kept.
    """
    started = time.perf_counter()
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
    loaded = load_weights(weights, backbone, size=size, on_progress=on_progress)
    dataset.digest_with(on_progress, on_error)
    meta = {
        **ingredients(dataset, loaded, choice, VIEWS[views]),
        "cuts": list(cuts),
        "dtype": dtype,
    }
    path = cache_path(output, dataset.name, meta)
    on_note(choice.why)

    if output is not None and Path(output).suffix == ".shards" and pack is None:
        pack = False
    for existing in (path, shards_path(path)):
        if os.path.lexists(existing) and not force:
            cache = matching(existing, meta, on_error)
            discard_unfinished(path)
            if pack is (existing.suffix != ".h5"):
                on_note(f"{existing}: is there in this form; use --force to make the other")
            return result_of(cache, choice.why, reused=True, n_resumed=0, started=started)
    check_writable(path)
    with single_writer(path):
        writer = ShardWriter(path, meta, force=force)
        if writer.damaged:
            on_note(f"{path}: {writer.damaged} was damaged; going on before it")
        n_resumed = writer.n_done
        n_images = sum(len(split) for _, split in dataset.splits())
        if on_error == "fail" and writer.skipped():
            raise CacheMismatchError(
                f"{path}: expected every image of the data set, found an unfinished run that left "
                f"out {writer.skipped()} that did not decode; use --on-error skip to go on, or "
                "--force to start over"
            )
        if n_resumed:
            on_note(f"{path}: going on from {n_resumed:,} of {n_images:,} images")
        runner = build_engine(choice, loaded, cuts)
        plan = Plan(
            engine=runner,
            preprocess=loaded.preprocess,
            cuts=cuts,
            dtype=dtype,
            batch_size=batch_size or runner.batch_size,
            shard_rows=SHARD_ROWS if n_images <= _MANY_IMAGES else 4 * SHARD_ROWS,
            workers=usable_cores(),
            on_error=on_error,
        )
        try:
            for role, split in dataset.splits():
                taken = VIEWS[views] if role == "train" else VIEWS["none"]
                run_split(role, split, taken, plan, writer, on_progress, on_note)
        except KeyboardInterrupt:
            raise KeyboardInterrupt(_kept(writer, n_images)) from None
        except OutputError as error:
            raise OutputError(f"{error}; {_kept(writer, n_images)}") from None
        limit = {None: PACK_LIMIT_BYTES, True: 1 << 62, False: -1}[pack]
        made = writer.finish(_facts(writer), pack_limit=limit)
    cache = load(made)
    for (role, split), kept in zip(dataset.splits(), (cache.train, cache.test), strict=True):
        for label in np.setdiff1d(split.labels, kept.labels):
            on_note(f"{role}: every image of class {dataset.class_names[label]!r} was skipped")
    return result_of(cache, choice.why, reused=False, n_resumed=n_resumed, started=started)


def _kept(writer: ShardWriter, n_images: int) -> str:
    """Say what an interrupted run leaves to the next one."""
    if not writer.n_done:
        return "nothing was kept yet"
    return f"{writer.n_done:,} of {n_images:,} images are kept, and the same command goes on there"


def _facts(writer: ShardWriter) -> dict[str, Any]:
    """Return what the extraction took, all its runs together."""
    stages = {name: round(writer.total(name), 3) for name in STAGES}
    return {
        "wall_s": stages["wall_s"],
        "images_per_s": writer.total("passes") / max(writer.total("wall_s"), 1e-9),
        "bottleneck": bottleneck(stages),
        "stages_s": stages,
    }
