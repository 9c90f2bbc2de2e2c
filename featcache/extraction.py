"""Run the backbone once: data set + preprocessing + weights + engine -> cache."""

from __future__ import annotations

import os
import socket
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import datetime, timezone
from pathlib import Path
from typing import Any

import numpy as np

from . import __version__
from .datasets import Dataset, Split, load_dataset
from .engines import Engine, EngineChoice, build_engine, choose_engine
from .errors import CacheError, CacheMismatchError, FeatcacheError, OutputError, RecipeError
from .files import check_writable, user_path
from .preprocess import VIEWS, Preprocess, apply_view
from .progress import OnProgress, Progress, silent
from .store import (
    Cache,
    SplitArrays,
    default_folder,
    differences,
    fingerprint,
    load,
    write_cache,
)
from .weights import Weights, load_weights

__all__ = ["ExtractResult", "cache_path", "extract"]

CUT = "avgpool"
BATCH_SIZE = 64


@dataclass(frozen=True)
class ExtractResult:
    """What an extraction did.

    Parameters
    ----------
    cache : Path
        The file.
    reused : bool
        Whether it was there already, made of the same ingredients.
    n_rows : int
        Images in it, both splits together.
    feature_dim : int
        Length D of a feature.
    engine, device, precision : str
        What ran the backbone.
    wall_s : float
        Duration of this call.
    images_per_s : float
        Forward passes per second, decoding included, when the cache was made.
    fingerprint : str
        SHA-256 (hex) of everything that changes a feature.
    why : str
        Why this engine and device.
    """

    cache: Path
    reused: bool
    n_rows: int
    feature_dim: int
    engine: str
    device: str
    precision: str
    wall_s: float
    images_per_s: float
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
    device: str = "auto",
    batch_size: int = BATCH_SIZE,
    views: str = "none",
    output: str | Path | None = None,
    force: bool = False,
    data_root: str | Path | None = None,
    on_progress: OnProgress = silent,
) -> ExtractResult:
    """Run a pretrained backbone once over a data set and cache its features.

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
    device : str
        ``"auto"``, ``"cpu"`` or ``"cuda"``.
    batch_size : int
        Images per forward pass; it changes speed and memory, not features.
    views : str
        ``"none"``, or ``"flips"`` for the four flip views of every training image.
    output : str or Path, optional
        A ``.h5`` file, or the folder for one; ``cache/`` by default.
    force : bool
        Make the cache again even if it is there.
    data_root : str or Path, optional
        Where named data sets are kept.
    on_progress : callable
        Hears of downloads and images.

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
    """
    started = time.perf_counter()
    if batch_size < 1:
        raise RecipeError(f"batch size: expected at least 1, found {batch_size}")
    if views not in VIEWS:
        raise RecipeError(f"views: expected one of {', '.join(VIEWS)}, found {views!r}")
    choice = choose_engine(device)
    if not isinstance(dataset, Dataset):
        dataset = load_dataset(dataset, data_root=data_root, on_progress=on_progress)
    loaded = load_weights(weights, backbone, size=size, on_progress=on_progress)
    meta = _ingredients(dataset, loaded, choice, VIEWS[views])
    path = cache_path(output, dataset.name, meta)

    if os.path.lexists(path) and not force:
        cache = _matching(path, meta)
        return _result(cache, choice, reused=True, started=started)
    check_writable(path)
    with _single_writer(path):
        engine = build_engine(choice, loaded)
        begun = time.perf_counter()
        splits = {
            role: _extract_split(
                split,
                engine,
                loaded.preprocess,
                VIEWS[views] if role == "train" else VIEWS["none"],
                batch_size,
                lambda done, total, role=role: on_progress(Progress(f"{role} images", done, total)),
            )
            for role, split in dataset.splits()
        }
        spent = time.perf_counter() - begun
        passes = sum(len(split.labels) * (1 + len(split.views)) for split in splits.values())
        write_cache(path, splits, {**meta, "wall_s": spent, "images_per_s": passes / spent})
    return _result(load(path), choice, reused=False, started=started)


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
        "cut": CUT,
        "dataset": dataset.name,
        "dataset_digest": dataset.digest,
        "dataset_source": dataset.source,
        "device": choice.device,
        "dtype": "float32",
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


def _matching(path: Path, wanted: Mapping[str, Any]) -> Cache:
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
    return cache


def _extract_split(
    split: Split,
    engine: Engine,
    preprocess: Preprocess,
    views: tuple[str, ...],
    batch_size: int,
    on_batch: Any,
) -> SplitArrays:
    parts: dict[str, list[np.ndarray]] = {view: [] for view in views}
    on_batch(0, len(split))
    for start in range(0, len(split), batch_size):
        rows = range(start, min(start + batch_size, len(split)))
        pixels = preprocess.batch([split.images[row] for row in rows])
        for view in views:
            features = engine.extract(apply_view(pixels, view))
            if not np.isfinite(features).all():
                row = rows[int(np.flatnonzero(~np.isfinite(features).all(axis=1))[0])]
                raise FeatcacheError(
                    f"{split.ids[row]}: expected finite features, found NaN or infinity; the "
                    "weights do not suit these images, nothing was written"
                )
            parts[view].append(features)
        on_batch(rows.stop, len(split))
    arrays = {view: np.concatenate(batches) for view, batches in parts.items()}
    return SplitArrays(arrays.pop("identity"), split.labels, split.ids, arrays)


@contextmanager
def _single_writer(path: Path) -> Iterator[None]:
    """Let one process at a time make a cache, and tell the others who does."""
    from filelock import FileLock, Timeout

    # The holder's name is beside the lock: on Windows a locked file cannot be read.
    lock, holder = (path.with_name(f".{path.name}.{end}") for end in ("lock", "holder"))
    try:
        with FileLock(lock, timeout=0):
            try:
                holder.write_text(f"process {os.getpid()} on {socket.gethostname()}", "utf-8")
                yield
            finally:
                holder.unlink(missing_ok=True)
    except Timeout:
        who = holder.read_text(encoding="utf-8") if holder.exists() else "another process"
        raise CacheError(
            f"{path}: is being written by {who}; wait for it, or name another --output"
        ) from None
    except OSError as error:
        if isinstance(error, FeatcacheError):
            raise
        raise OutputError(f"{lock}: cannot be written: {error.strerror}; free space") from None


def _result(cache: Cache, choice: EngineChoice, *, reused: bool, started: float) -> ExtractResult:
    return ExtractResult(
        cache=cache.path,
        reused=reused,
        n_rows=len(cache.train) + len(cache.test),
        feature_dim=cache.feature_dim,
        engine=cache.meta["engine"],
        device=cache.meta["device"],
        precision=cache.meta["precision"],
        wall_s=time.perf_counter() - started,
        images_per_s=cache.meta["images_per_s"],
        fingerprint=cache.fingerprint,
        why=choice.why,
    )
