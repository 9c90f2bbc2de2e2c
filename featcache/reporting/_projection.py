"""Features in two dimensions: principal components at once, or UMAP where it is installed."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np

from ..errors import EngineUnavailableError
from ..probes.moments import moments
from ..progress import OnProgress, Progress

__all__ = ["MAPS", "Projection", "project", "require_map"]

MAPS = ("pca", "umap")

_REDUCED = 50  # dimensions that UMAP searches its neighbours in: as exact, and many times faster
_NEIGHBOURS = 15  # umap-learn's own choice
_SEED = 0


@dataclass(frozen=True)
class Projection:
    """Where each image lies on the map.

    Parameters
    ----------
    places : numpy.ndarray
        float32 (N, 2).
    axes : tuple of 2 str
        What the two directions are, for a person.
    said : str
        How the map was made, in a sentence.
    """

    places: np.ndarray
    axes: tuple[str, str]
    said: str


def require_map(how: str) -> None:
    """Find out before the long work that there is something to make the map with.

    Raises
    ------
    EngineUnavailableError
        UMAP was asked for, and umap-learn is not installed.
    """
    if how == "umap":
        _import_umap()


def project(features: np.ndarray, how: str, on_progress: OnProgress) -> Projection:
    """Lay features (N, D) out in the plane; the same features always lie the same.

    Parameters
    ----------
    features : numpy.ndarray
        (N, D), finite.
    how : str
        ``"pca"``: the two directions of largest variance, each signed so that its largest
        weight is positive. ``"umap"``: of the first 50 of them, by cosine, with seed 0.
    on_progress : callable
        Hears of rows.

    References
    ----------
    McInnes, Healy and Melville, "UMAP: uniform manifold approximation and projection for
    dimension reduction" (2018), arXiv:1802.03426.
    """
    n = len(features)
    on_progress(Progress(f"map ({how})", 0, n))
    shares, components = _components(features, 2 if how == "pca" else _REDUCED)
    if how == "pca":
        axes = [
            f"component {number}, {100 * share:.1f} %" for number, share in enumerate(shares, 1)
        ]
        found = Projection(
            components,
            (axes[0], axes[1]),
            f"The two directions in which the features vary most: {100 * sum(shares):.0f} % of "
            "their variance. Distances on the map leave the rest out; the nearest neighbours do "
            "not.",
        )
    else:
        found = _umap(components)
    on_progress(Progress(f"map ({how})", n, n))
    return found


def _components(features: np.ndarray, count: int) -> tuple[list[float], np.ndarray]:
    """Return shares of the variance, and float32 (N, count): at least two, though empty ones."""
    measured = moments([features])
    count = max(2, min(count, features.shape[1]))
    directions = np.zeros((features.shape[1], count))
    variances = np.zeros(count)
    kept = min(count, features.shape[1])
    directions[:, :kept] = measured.directions[:, ::-1][:, :kept]
    variances[:kept] = measured.variances[::-1][:kept]
    largest = np.abs(directions).argmax(axis=0)
    directions *= np.where(directions[largest, np.arange(count)] < 0, -1, 1)
    weights = directions.astype(np.float32)
    shift = (measured.mean @ directions).astype(np.float32)
    total = float(measured.variances.sum())
    places = np.asarray(features, np.float32) @ weights - shift
    return [float(value) / total if total else 0.0 for value in variances], places


def _umap(components: np.ndarray) -> Projection:
    n = len(components)
    if n <= _NEIGHBOURS:  # fewer than its graph needs
        places = np.ascontiguousarray(components[:, :2])
    else:
        reducer = _import_umap().UMAP(
            n_neighbors=_NEIGHBOURS, metric="cosine", random_state=_SEED, n_jobs=1
        )
        places = np.asarray(reducer.fit_transform(components), np.float32)
    return Projection(
        places,
        ("UMAP 1", "UMAP 2"),
        "UMAP of the features: what is near stays near. The sizes of clusters and the gaps "
        "between them mean little.",
    )


def _import_umap() -> Any:
    try:
        import umap
    except ImportError as error:
        raise EngineUnavailableError(
            f"--map umap: expected the package umap-learn, found: {error}; type: pip install "
            "'featcache[umap]', or take --map pca"
        ) from None
    return umap
