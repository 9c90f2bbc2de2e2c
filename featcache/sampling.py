"""Every random draw that training makes, the same for a cached and an end-to-end run.

A probe on cached features and a frozen fine-tune on images agree to float
tolerance only if both see the same images, in the same order, in the same flip
views, from the same starting head. So both ask here, and nothing else draws.
"""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np

from .errors import DatasetError

# A limited run draws its images with this seed, whatever its own: the same images for a probe
# and every fine-tune, so that they can be compared.
LIMIT_SEED = 0


def epoch_plan(n: int, n_views: int, seed: int, epoch: int) -> tuple[np.ndarray, np.ndarray]:
    """Draw the order of the images of one epoch, and the view of each.

    Returns
    -------
    rows : numpy.ndarray
        int64 (n,), a permutation.
    views : numpy.ndarray
        int64 (n,), in [0, n_views), independent and uniform; ``views[i]`` goes
        with ``rows[i]``.
    """
    generator = np.random.default_rng((seed, epoch))
    rows = generator.permutation(n)
    views = generator.integers(n_views, size=n) if n_views > 1 else np.zeros(n, np.int64)
    return rows, views


def row_batches(n: int, batch_size: int) -> Iterator[slice]:
    """Cut n positions into batches; a last single one joins the batch before it.

    Batch normalisation has no variance over one value, and OneFlow then
    returns zeros instead of an error.
    """
    start = 0
    while start < n:
        stop = min(start + batch_size, n)
        if n - stop == 1:
            stop = n
        yield slice(start, stop)
        start = stop


def initial_head(n_classes: int, feature_dim: int, seed: int) -> tuple[np.ndarray, np.ndarray]:
    """Draw a head as ``nn.Linear`` does: uniform within 1/sqrt(D).

    Returns
    -------
    weight : numpy.ndarray
        float32 (n_classes, feature_dim).
    bias : numpy.ndarray
        float32 (n_classes,).
    """
    generator = np.random.default_rng((seed, n_classes, feature_dim))
    bound = 1 / np.sqrt(feature_dim)
    weight = generator.uniform(-bound, bound, (n_classes, feature_dim)).astype(np.float32)
    bias = generator.uniform(-bound, bound, n_classes).astype(np.float32)
    return weight, bias


def stratified_rows(labels: np.ndarray, limit: int, seed: int, what: str) -> np.ndarray:
    """Draw ``limit`` rows with the class proportions of all.

    Parameters
    ----------
    labels : numpy.ndarray
        int64 (N,).
    limit : int
        How many rows; N or more returns all.
    seed : int
        Of the draw.
    what : str
        Whose rows, for the message.

    Returns
    -------
    numpy.ndarray
        int64, sorted.

    Raises
    ------
    DatasetError
        Fewer rows than classes were asked for, or a class is too small to divide.
    """
    if limit >= len(labels):
        return np.arange(len(labels))
    classes, counts = np.unique(labels, return_counts=True)
    wanted = f"{what}: expected to draw {limit:,} of {len(labels):,} images, every class on both"
    if counts.min() < 2:
        raise DatasetError(
            f"{wanted} sides, found a single image of class {classes[counts.argmin()]}; add one, "
            "or leave that class out"
        )
    least, most = len(classes), len(labels) - len(classes)
    if not least <= limit <= most:
        allowed = f"{least:,} to {most:,}, or all" if least < most else "all"
        raise DatasetError(f"{wanted} sides, found {least:,} classes; ask for {allowed} of them")
    from sklearn.model_selection import train_test_split

    rows, _ = train_test_split(
        np.arange(len(labels)), train_size=limit, stratify=labels, random_state=seed
    )
    return np.sort(rows)


def validation_rows(labels: np.ndarray, fraction: float, seed: int) -> np.ndarray:
    """Draw the training images that are held out to choose by.

    Whoever asks with the same labels, fraction and seed has the same ones, so that a probe
    and a fine-tune can be chosen between.

    Parameters
    ----------
    labels : numpy.ndarray
        int64 (N,).
    fraction : float
        Of all images; at least one of each class is held out.
    seed : int
        Of the draw.

    Returns
    -------
    numpy.ndarray
        int64, sorted.

    Raises
    ------
    DatasetError
        As `stratified_rows`.
    """
    held = max(round(fraction * len(labels)), len(np.unique(labels)))
    held = min(held, len(labels) - 1)  # of all, none would be left to train on
    return stratified_rows(labels, held, seed, "validation split")
