"""The facts about a cache, for people: names in words, numbers rounded, no JSON."""

from __future__ import annotations

from collections.abc import Mapping
from datetime import datetime
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from ..store.cache import Cache

_NAMES = {
    "dataset": "data set",
    "dataset_digest": "digest of the data set",
    "dataset_path": "path of the data set",
    "dataset_source": "source of the data set",
    "featcache_version": "version of featcache",
    "feature_dim": "numbers per image",
    "images_per_s": "images per second",
    "in_words": "in words",
    "n_test": "test images",
    "n_train": "training images",
    "n_val": "validation images",
    "size_bytes": "size of the file",
    "skipped": "images left out",
    "stages_s": "time by stage",
    "wall_s": "extraction time",
    "weights_sha256": "SHA-256 of the weights",
}
_LISTED = 20  # of names: --json has all


def sizes(cache: Cache) -> dict[str, Any]:
    """Return what the file of a cache has, beside its metadata."""
    return {
        "cache": cache.path,
        "n_train": len(cache.train),
        **({} if cache.val is None else {"n_val": len(cache.val)}),
        "n_test": len(cache.test),
        "feature_dim": cache.feature_dim,
        "size_bytes": cache.size_bytes,
        "skipped": [name for _, split in cache.splits() for name in split.skipped],
    }


def in_words(name: str, value: Any) -> tuple[str, list[str]]:
    """Return a fact's name in words, and its value as texts, one or several."""
    return _NAMES.get(name, _words(name)), _texts(name, value)


def _words(name: str) -> str:
    return name.removesuffix("_s").replace("_", " ")


def _texts(name: str, value: Any) -> list[str]:
    if isinstance(value, Mapping):
        unit = "_s" * name.endswith("_s")
        parts = (
            f"{_words(key)} {', '.join(_texts(key.removesuffix(unit) + unit, one))}"
            for key, one in value.items()
        )
        return ["; ".join(parts) or "none"]
    if isinstance(value, (list, tuple)):
        texts = [text for one in value[:_LISTED] for text in _texts(name, one)]
        more = len(value) - _LISTED
        return [*texts, f"… and {more:,} more"] if more > 0 else texts or ["none"]
    return [_text(name, value)]


def _text(name: str, value: Any) -> str:
    if value is None or isinstance(value, bool):
        return {None: "none", True: "yes", False: "no"}[value]
    if isinstance(value, (int, float)):
        if name.endswith("_per_s"):
            return f"{value:,.{0 if value >= 10 else 2}f}"
        if name.endswith("_s"):
            return duration(value)
        if name.endswith("_bytes"):
            return f"{value / 1e6:,.1f}\u00a0MB"
        return f"{value:,}" if isinstance(value, int) or value >= 1e4 else f"{value:.4g}"
    if name == "created":
        try:
            moment = datetime.fromisoformat(value)
        except ValueError:
            return str(value)
        return f"{moment:%d %B %Y, %H:%M} {moment.tzname() or ''}".strip().lstrip("0")
    return str(value)


def duration(seconds: float) -> str:
    """Return seconds as milliseconds, seconds, minutes or hours."""
    if seconds < 0.95:
        return f"{1000 * seconds:.0f}\u00a0ms"
    if seconds < 100:
        return f"{seconds:.1f}\u00a0s"
    if seconds < 5400:
        return f"{seconds / 60:.0f}\u00a0min"
    return f"{seconds / 3600:.1f}\u00a0h"
