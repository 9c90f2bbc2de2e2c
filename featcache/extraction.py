"""Run the backbone once: data set + preprocessing + weights + engine -> cache."""

from __future__ import annotations

import os
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from datetime import datetime, timezone
from pathlib import Path
from typing import Any

from . import __version__
from .backbone import check_cuts, get_backbone
from .cores import usable_cores
from .datasets import Dataset, load_dataset
from .decoding import OnError
from .engines import EngineChoice, build_engine, choose_engine
from .errors import CacheError, CacheMismatchError, RecipeError
from .files import check_writable, user_path
from .pipeline import STAGES, Plan, bottleneck, run_split
from .preprocess import VIEWS
from .progress import OnProgress, silent
from .store import (
    DTYPES,
    PACK_LIMIT_BYTES,
    SHARD_ROWS,
    Cache,
    ShardWriter,
    default_folder,
    differences,
    discard_unfinished,
    fingerprint,
    load,
    shards_path,
    single_writer,
)
from .weights import Weights, load_weights

__all__ = ["ExtractResult", "cache_path", "extract"]

CUT = "avgpool"


@dataclass(frozen=True)
class ExtractResult:
    """What an extraction did.

    Parameters
    ----------
    cache : Path
        The file, or the folder of shards.
    reused : bool
        Whether it was there already, made of the same ingredients.
    n_rows : int
        Images in it, both splits together.
    n_skipped : int
        Images that could not be decoded and were left out.
    n_resumed : int
        Images that an interrupted run had done before.
    feature_dim : int
        Length D of a feature.
    engine, device, precision : str
        What ran the backbone.
    wall_s : float
        Duration of this call.
    images_per_s : float
        Forward passes per second, decoding included, when the cache was made.
    bottleneck : str
        What the rest waited for then: ``"engine"``, ``"decoding"`` or ``"writing"``.
    fingerprint : str
        SHA-256 (hex) of everything that changes a feature.
    why : str
        Why this engine and device.
    """

    cache: Path
    reused: bool
    n_rows: int
    n_skipped: int
    n_resumed: int
    feature_dim: int
    engine: str
    device: str
    precision: str
    wall_s: float
    images_per_s: float
    bottleneck: str
    fingerprint: str
    why: str

    def load(self) -> Cache:
        """Open the cache."""
        return load(self.cache)


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
    output: str | Path | None = None,
    pack: bool | None = None,
    force: bool = False,
    data_root: str | Path | None = None,
    on_progress: OnProgress = silent,
    on_note: Callable[[str], None] = lambda note: None,
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
    cuts = check_cuts(cut.split(",") if isinstance(cut, str) else cut)
    for what, value, known in (
        ("views", views, tuple(VIEWS)),
        ("dtype", dtype, tuple(DTYPES)),
        ("on error", on_error, ("fail", "skip")),
    ):
        if value not in known:
            raise RecipeError(f"{what}: expected one of {', '.join(known)}, found {value!r}")
    if batch_size is not None and batch_size < 1:
        raise RecipeError(f"batch size: expected at least 1, found {batch_size}")
    get_backbone(backbone)
    choice = choose_engine(engine, device, precision)
    if not isinstance(dataset, Dataset):
        dataset = load_dataset(dataset, data_root=data_root, on_progress=on_progress)
    loaded = load_weights(weights, backbone, size=size, on_progress=on_progress)
    dataset.digest_with(on_progress)
    meta = {
        **_ingredients(dataset, loaded, choice, VIEWS[views]),
        "cuts": list(cuts),
        "dtype": dtype,
    }
    path = cache_path(output, dataset.name, meta)
    on_note(choice.why)

    for existing in (path, shards_path(path)):
        if os.path.lexists(existing) and not force:
            cache = _matching(existing, meta, on_error)
            discard_unfinished(path)
            return _result(cache, choice.why, reused=True, n_resumed=0, started=started)
    check_writable(path)
    with single_writer(path):
        writer = ShardWriter(path, meta, restart=force)
        n_resumed = sum(writer.done(role) for role, _ in dataset.splits())
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
            shard_rows=SHARD_ROWS,
            workers=usable_cores(),
            on_error=on_error,
        )
        try:
            for role, split in dataset.splits():
                taken = VIEWS[views] if role == "train" else VIEWS["none"]
                run_split(role, split, taken, plan, writer, on_progress)
        except KeyboardInterrupt:
            n_done = sum(writer.done(role) for role, _ in dataset.splits())
            raise KeyboardInterrupt(
                f"{n_done:,} of {n_images:,} images are kept, and the same command goes on there"
            ) from None
        limit = {None: PACK_LIMIT_BYTES, True: 1 << 62, False: -1}[pack]
        made = writer.finish(_facts(writer), pack_limit=limit)
    return _result(load(made), choice.why, reused=False, n_resumed=n_resumed, started=started)


def cache_path(output: str | Path | None, dataset: str, meta: Mapping[str, Any]) -> Path:
    """Return where a cache goes: ``<dataset>-<backbone>-<weights>-<size>-<fingerprint8>.h5``."""
    target = user_path(output) if output else default_folder()
    if target.suffix == ".h5":
        return target
    name = "-".join(
        (
            dataset,
            meta["backbone"],
            meta["weights"],
            str(meta["preprocess"]["size"]),
            fingerprint(meta)[:8],
        )
    )
    return target / f"{name}.h5"


def _ingredients(
    dataset: Dataset, weights: Weights, choice: EngineChoice, views: tuple[str, ...]
) -> dict[str, Any]:
    return {
        "backbone": weights.backbone,
        "class_names": list(dataset.class_names),
        "created": datetime.now(timezone.utc).isoformat(timespec="seconds"),
        "dataset": dataset.name,
        "dataset_digest": dataset.digest,
        "dataset_source": dataset.source,
        "device": choice.device,
        "engine": choice.name,
        "engine_version": choice.version,
        "featcache_version": __version__,
        "precision": choice.precision,
        "preprocess": weights.preprocess.as_dict(),
        "views": list(views),
        "weights": weights.name,
        "weights_sha256": weights.sha256,
        "weights_source": weights.source,
    }


def _facts(writer: ShardWriter) -> dict[str, Any]:
    """Return what the extraction took, all its runs together."""
    stages = {name: round(writer.total(name), 3) for name in STAGES}
    return {
        "wall_s": stages["wall_s"],
        "images_per_s": writer.total("passes") / max(writer.total("wall_s"), 1e-9),
        "bottleneck": bottleneck(stages),
        "stages_s": stages,
    }


def _matching(path: Path, wanted: Mapping[str, Any], on_error: str) -> Cache:
    """Open the cache that is there; never take one of other ingredients for it."""
    again = "use --force to make it again, or name another --output"
    try:
        cache = load(path)
    except CacheError as error:
        raise type(error)(f"{error} ({again})") from None
    if cache.fingerprint != fingerprint(wanted):
        raise CacheMismatchError(
            f"{path}: expected a cache of these ingredients, found one of others: "
            f"{'; '.join(differences(cache.meta, wanted))}; {again}"
        )
    n_skipped = len(cache.train.skipped) + len(cache.test.skipped)
    if n_skipped and on_error == "fail":
        first = (cache.train.skipped + cache.test.skipped)[0]
        raise CacheMismatchError(
            f"{path}: expected every image of the data set, found a cache without {n_skipped} that "
            f"did not decode ({first} …); use --on-error skip to take it as it is, or {again}"
        )
    return cache


def _result(
    cache: Cache, why: str, *, reused: bool, n_resumed: int, started: float
) -> ExtractResult:
    return ExtractResult(
        cache=cache.path,
        reused=reused,
        n_rows=len(cache.train) + len(cache.test),
        n_skipped=len(cache.train.skipped) + len(cache.test.skipped),
        n_resumed=n_resumed,
        feature_dim=cache.feature_dim,
        engine=cache.meta["engine"],
        device=cache.meta["device"],
        precision=cache.meta["precision"],
        wall_s=time.perf_counter() - started,
        images_per_s=cache.meta.get("images_per_s", 0.0),
        bottleneck=cache.meta.get("bottleneck", ""),
        fingerprint=cache.fingerprint,
        why=why,
    )
