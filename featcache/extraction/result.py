"""What an extraction, or one job's share of it, did."""

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
        Whether a cache of the same ingredients was there already.
    n_rows : int
        Images in it, all splits together.
    n_val : int
        Of these, images of the validation split; 0 where there is none.
    n_skipped : int
        Images that could not be decoded and were left out.
    n_resumed : int
        Images that an interrupted run had done before.
    computed : int
        Images that this call ran through the backbone.
    reused_rows : int
        Images whose features were in a cache already: this one, or others of the same
        ingredients.
    feature_dim : int
        Length D of a feature.
    engine, device, precision : str
        What ran the backbone.
    wall_s : float
        Duration of this call in seconds.
    images_per_s : float
        Forward passes per second, decoding included, when the cache was made.
    bottleneck : str
        The stage with most of the time: ``"engine"``, ``"decoding"`` or ``"writing"``.
    fingerprint : str
        SHA-256 (hex) of everything that changes a feature.
    why : str
        Why this engine and device.
    precision_evidence : dict or None
        With ``precision="auto"``: what was ``"chosen"`` and ``"why"``, by how many images
        (``"n_images"``), and what was measured of each precision (``"tried"``): images per second,
        the least cosine to f32's features, and the share of images whose neighbours vote alike.
    """

    cache: Path | str
    reused: bool
    n_rows: int
    n_val: int
    n_skipped: int
    n_resumed: int
    computed: int
    reused_rows: int
    feature_dim: int
    engine: str
    device: str
    precision: str
    wall_s: float
    images_per_s: float
    bottleneck: str
    fingerprint: str
    why: str
    precision_evidence: dict[str, Any] | None = None

    def load(self) -> Cache:
        """Open the cache."""
        return load(self.cache)


@dataclass(frozen=True)
class ShareResult(ShownAsTable):
    """What one of many jobs did.

    Parameters
    ----------
    output : Path or str
        The ``.h5`` file that the jobs make together, or its URL.
    folder : Path or str
        The hidden folder of their shards until then, or its URL.
    share : str
        ``"3/8"``.
    n_images : int
        Images of the share.
    n_resumed : int
        Of these, how many an earlier run had done.
    n_skipped : int
        Of these, how many could not be decoded and were left out.
    n_shards : int
        Shards of the share.
    n_shards_there, n_shards_wanted : int
        Shards of all jobs that are there when this one ends, and that there must be.
    wall_s : float
        Duration of this call in seconds.
    next_step : str
        The command that puts all shards together.
    """

    output: Path | str
    folder: Path | str
    share: str
    n_images: int
    n_resumed: int
    n_skipped: int
    n_shards: int
    n_shards_there: int
    n_shards_wanted: int
    wall_s: float
    next_step: str


def result_of(
    cache: Cache,
    why: str,
    *,
    reused: bool,
    started: float,
    n_resumed: int = 0,
    computed: int = 0,
    reused_rows: int | None = None,
) -> ExtractResult:
    """Describe a cache that was made or reused; by default, all its rows were there."""
    n_rows = sum(len(split) for _, split in cache.splits())
    return result_from(
        cache.meta,
        started,
        cache=cache.path,
        reused=reused,
        n_rows=n_rows,
        n_val=len(cache.val) if cache.val else 0,
        n_skipped=sum(len(split.skipped) for _, split in cache.splits()),
        n_resumed=n_resumed,
        computed=computed,
        reused_rows=n_rows if reused_rows is None else reused_rows,
        feature_dim=cache.feature_dim,
        why=why,
    )


def result_from(meta: Mapping[str, Any], started: float, **facts: Any) -> ExtractResult:
    """Return a result from the provenance and ``facts``, the fields that it lacks."""
    return ExtractResult(
        engine=meta["engine"],
        device=meta["device"],
        precision=meta["precision"],
        wall_s=time.perf_counter() - started,
        images_per_s=meta.get("images_per_s", 0.0),
        bottleneck=meta.get("bottleneck", ""),
        fingerprint=meta["fingerprint"],
        precision_evidence=meta.get("precision_evidence"),
        **facts,
    )
