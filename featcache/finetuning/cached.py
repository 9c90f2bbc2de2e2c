"""Training from a cache of features: whether it holds what the run would have computed."""

from __future__ import annotations

import shlex
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from ..backbones.choice import EngineChoice
from ..backbones.weights import WEIGHT_NAMES, Weights, load_weights
from ..datasets.dataset import Dataset
from ..datasets.loading import load_dataset
from ..errors import CacheMismatchError, CacheMissError, RecipeError, WeightsError
from ..probes.ingredients import feature_differences
from ..progress import OnNote, OnProgress
from ..store.cache import Cache, CachedSplit, load
from .batches import AUGMENT_VIEWS, CachedSource, Source
from .schedule import frozen_cut

if TYPE_CHECKING:
    from .ingredients import Request


# Up to so many bytes a cache is read whole, and verified by its checksums; above, it is mapped.
_READ_BYTES = 1 << 30


class CachedData:
    """Features where the frozen part of a network ends, and the weights that made them.

    Parameters
    ----------
    request : Request
        What was asked for.
    choice : EngineChoice
        What is going to train.
    on_progress : callable
        Hears of downloads.
    on_note : callable
        Hears what makes these features other than the run's own up to rounding.

    Raises
    ------
    RecipeError
        Nothing is frozen, or the augmentation cannot be cached.
    CacheError
        The cache has another cut, lacks views, or was made of other weights, another size or
        other data; the message has the command that makes the right one.
    WeightsError
        The weights cannot be had.
    """

    def __init__(
        self, request: Request, choice: EngineChoice, on_progress: OnProgress, on_note: OnNote
    ) -> None:
        cut = frozen_cut(request.recipe)
        if cut is None:
            raise RecipeError(
                f"cache: expected a run whose first layers stay as they are, found method "
                f"{request.method} that trains all; use --freeze-until layer3"
            )
        if request.recipe.augment == "crop-flip":
            raise RecipeError(
                "augment: expected tutorial, flip or none with a cache, found crop-flip, whose "
                "outcomes are too many to be cached; use --augment tutorial"
            )
        cache = load(request.cache or "")
        if cache.size_bytes > _READ_BYTES:
            cache = load(cache.path, mmap=True)
        self._cut = cut
        self.path: Path | None = cache.path
        self.fingerprint: str | None = cache.fingerprint
        self.features_wall_s = float(cache.meta.get("wall_s", 0.0))
        self.name = str(cache.meta.get("dataset", "unnamed"))
        self.class_names = cache.class_names
        self.digest = str(cache.meta["dataset_digest"])
        views = AUGMENT_VIEWS[request.recipe.augment]
        command = _extract_command(cache, request, cut)
        self._splits = {
            "train": (cache.train, _features(cache.train, cut, views, command)),
            "test": (cache.test, _features(cache.test, cut, ("identity",), command)),
        }
        self.weights = _weights(cache, request, command, on_progress)
        if request.dataset is not None:
            _check_dataset(cache, request.dataset, request.data_root, on_progress)
        rounding = _rounding(cache.meta, choice)
        if rounding:
            on_note(f"{cache.path}: expect rounding differences: {', '.join(rounding)}")

    def labels(self, role: str) -> np.ndarray:
        """Return the labels of a split: int64 (N,)."""
        return self._splits[role][0].labels

    def source(self, role: str, rows: np.ndarray) -> Source:
        """Return the inputs of these rows of a split."""
        split, views = self._splits[role]
        return CachedSource(views, split.labels, self._cut, rows)


def _features(
    split: CachedSplit, cut: str, views: tuple[str, ...], command: str
) -> dict[str, np.ndarray]:
    try:
        return {view: split.cut(cut, view) for view in views}
    except CacheMissError as error:
        found = str(error).rpartition("; ")[0]
        raise CacheMissError(f"{found}; make one with {command}") from None


def _weights(cache: Cache, request: Request, command: str, on_progress: OnProgress) -> Weights:
    """Load the weights that the cache was made with, at its size."""
    meta = cache.meta
    name: Any = request.weights or meta.get("weights")
    if request.weights is None and name not in WEIGHT_NAMES:
        raise WeightsError(
            f"{cache.path}: expected the checkpoint that made its features, {name!r:.80}, which is "
            f"not one of {', '.join(WEIGHT_NAMES)}; name it with --weights (its SHA-256 is "
            f"{meta['weights_sha256']!r:.80})"
        )
    size = request.size or meta["preprocess"]["size"]
    backbone = request.backbone or meta["backbone"]
    weights = load_weights(name, backbone, size=size, on_progress=on_progress)
    here = {
        **meta,
        "backbone": weights.backbone,
        "weights_sha256": weights.sha256,
        "preprocess": weights.preprocess.as_dict(),
    }
    differing = feature_differences(meta, here, "cache")
    if differing:
        raise CacheMismatchError(
            f"{cache.path}: expected the features of this run's frozen layers, found others: "
            f"{'; '.join(differing)}; make them with {command}"
        )
    return weights


def _check_dataset(
    cache: Cache,
    dataset: str | Path | Dataset,
    data_root: str | Path | None,
    on_progress: OnProgress,
) -> None:
    if not isinstance(dataset, Dataset):
        dataset = load_dataset(dataset, data_root=data_root, on_progress=on_progress)
    digest = dataset.digest_with(on_progress)
    if digest != cache.meta["dataset_digest"]:
        raise CacheMismatchError(
            f"{cache.path}: expected features of {dataset.name} (digest {digest[:8]}), found those "
            f"of {cache.meta.get('dataset')} (digest {cache.meta['dataset_digest'][:8]}); name the "
            "data set of the cache, or none"
        )


def _extract_command(cache: Cache, request: Request, cut: str) -> str:
    """Return the command that makes the cache that this run needs."""
    meta = cache.meta
    dataset = request.dataset if isinstance(request.dataset, (str, Path)) else meta.get("dataset")
    words = ["featcache", "extract", str(dataset or "DATASET")]
    words += ["--weights", str(request.weights or meta.get("weights", "WEIGHTS"))]
    words += ["--size", str(request.size or meta["preprocess"]["size"]), "--cut", cut]
    if request.recipe.augment != "none":
        words += ["--views", "flips"]
    return shlex.join(words)


def _rounding(meta: Mapping[str, Any], choice: EngineChoice) -> list[str]:
    """Say what computed these features otherwise than a run on the images would."""
    said = []
    if meta.get("engine") != choice.name:
        said.append(f"features by {meta.get('engine')} {meta.get('engine_version', '')}".rstrip())
    if meta.get("precision", "f32").replace("float32", "f32") != choice.precision:
        said.append(f"computed in {meta['precision']}")
    if meta.get("dtype", "float32") != "float32":
        said.append(f"kept as {meta['dtype']}")
    return said
