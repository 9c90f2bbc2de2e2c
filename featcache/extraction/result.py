"""What an extraction did."""

from __future__ import annotations

import time
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ..notebook import ShownAsTable
from ..store.cache import Cache, load


@dataclass(frozen=True)
class ExtractResult(ShownAsTable):
    """What an extraction did.

    Parameters
    ----------
    cache : Path or str
        The file, the folder of shards, or the URL of either.
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

    cache: Path | str
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


def result_of(
    cache: Cache, why: str, *, reused: bool, n_resumed: int, started: float
) -> ExtractResult:
    """Return what is to be said of a cache that was made or found."""
    return result_from(
        cache.meta,
        started,
        cache=cache.path,
        reused=reused,
        n_rows=len(cache.train) + len(cache.test),
        n_skipped=len(cache.train.skipped) + len(cache.test.skipped),
        n_resumed=n_resumed,
        feature_dim=cache.feature_dim,
        why=why,
    )


def result_from(meta: Mapping[str, Any], started: float, **facts: Any) -> ExtractResult:
    """Return a result: what the provenance says, and ``facts``, the fields that it does not."""
    return ExtractResult(
        engine=meta["engine"],
        device=meta["device"],
        precision=meta["precision"],
        wall_s=time.perf_counter() - started,
        images_per_s=meta.get("images_per_s", 0.0),
        bottleneck=meta.get("bottleneck", ""),
        fingerprint=meta["fingerprint"],
        **facts,
    )
