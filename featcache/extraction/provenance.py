"""What a cache is made of: the fields of its provenance, its name, and whether one fits."""

from __future__ import annotations

import os
from collections.abc import Mapping
from datetime import datetime, timezone
from pathlib import Path
from typing import Any

from ..backbones.choice import EngineChoice
from ..backbones.engine import computed_by
from ..backbones.weights import Weights
from ..datasets.dataset import Dataset
from ..errors import CacheError, CacheMismatchError, OutputError
from ..files import user_path
from ..store.cache import Cache, load
from ..store.format import differences, fingerprint
from ..store.index import default_folder
from ..version import __version__


def cache_path(output: str | Path | None, dataset: str, meta: Mapping[str, Any]) -> Path:
    """Return where a cache goes: ``<dataset>-<backbone>-<weights>-<size>-<fingerprint8>.h5``."""
    target = user_path(output) if output else default_folder()
    if target.suffix in (".h5", ".shards"):
        return target.with_suffix(".h5")
    if target.suffix and not target.is_dir() and not str(output).endswith(os.sep):
        raise OutputError(
            f"{target}: expected a name that ends in .h5, or a folder (with {os.sep} at its end "
            f"where it is not there yet), found {target.suffix!r}; rename it"
        )
    return target / f"{name_stem(dataset, meta)}-{fingerprint(meta)[:8]}.h5"


def name_stem(dataset: str, meta: Mapping[str, Any]) -> str:
    """Return how a cache's name begins: all but the fingerprint."""
    size = str(meta["preprocess"]["size"])
    return "-".join((dataset, meta["backbone"], meta["weights"], size))


def ingredients(
    dataset: Dataset, digest: str, weights: Weights, choice: EngineChoice, views: tuple[str, ...]
) -> dict[str, Any]:
    """Return the provenance, the cuts and the type of the numbers left out."""
    fields = {
        **computed_by(choice, weights),
        "class_names": list(dataset.class_names),
        "created": datetime.now(timezone.utc).isoformat(timespec="seconds"),
        "dataset": dataset.name,
        "dataset_digest": digest,
        "dataset_source": dataset.source,
        "featcache_version": __version__,
        "views": list(views),
        "weights": weights.name,
        "weights_source": weights.source,
    }
    return dict(sorted(fields.items()))


def may_be_of(found: Mapping[str, Any], wanted: Mapping[str, Any]) -> bool:
    """Tell whether a cache is the one that is wanted, if its images are."""
    same_images = {**wanted, "dataset_digest": found["dataset_digest"]}
    return bool(fingerprint(same_images) == found["fingerprint"])


def matching(path: Path, wanted: Mapping[str, Any], on_error: str) -> Cache:
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
    skipped = cache.train.skipped + cache.test.skipped
    check_skipped_by(path, len(skipped), on_error, again, f" ({skipped[0]} …)" if skipped else "")
    return cache


def check_skipped_by(
    path: object, n_skipped: int, on_error: str, again: str, such_as: str = ""
) -> None:
    """Refuse a cache without the images that did not decode, where none may be left out.

    Raises
    ------
    CacheMismatchError
        There are such images.
    """
    if n_skipped and on_error == "fail":
        raise CacheMismatchError(
            f"{path}: expected every image of the data set, found a cache without {n_skipped} that "
            f"did not decode{such_as}; use --on-error skip to take it as it is, or {again}"
        )
