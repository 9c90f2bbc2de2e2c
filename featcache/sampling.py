"""All random draws of training, shared by cached and end-to-end runs.

A probe on cached features and a frozen fine-tune on images agree to float tolerance because both
use the same images, in the same order and flip views, from the same initial head.
"""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np

from .errors import DatasetError

# The seed for limits, whatever the seed of the run: a probe and every fine-tune get the same
# images, so they can be compared.
LIMIT_SEED = 0


def epoch_plan(n: int, n_views: int, seed: int, epoch: int) -> tuple[np.ndarray, np.ndarray]:
    """Draw the order of one epoch's images, int64 (n,), and the view of each, in [0, n_views)."""
    generator = np.random.default_rng((seed, epoch))
    rows = generator.permutation(n)
    views = generator.integers(n_views, size=n) if n_views > 1 else np.zeros(n, np.int64)
    return rows, views


def row_batches(n: int, batch_size: int) -> Iterator[slice]:
    """Cut n positions into batches; a single last position joins the batch before it.

    Batch normalisation of a single value has no variance, and OneFlow returns zeros, not an error.
    """
    start = 0
    while start < n:
        stop = min(start + batch_size, n)
        if n - stop == 1:
            stop = n
        yield slice(start, stop)
        start = stop


def initial_head(n_classes: int, feature_dim: int, seed: int) -> tuple[np.ndarray, np.ndarray]:
    """Draw float32 weight (K, D) and bias (K,) as ``nn.Linear`` does: uniform in ±1/sqrt(D)."""
    generator = np.random.default_rng((seed, n_classes, feature_dim))
    bound = 1 / np.sqrt(feature_dim)
    weight = generator.uniform(-bound, bound, (n_classes, feature_dim)).astype(np.float32)
    bias = generator.uniform(-bound, bound, n_classes).astype(np.float32)
    return weight, bias


def stratified_rows(labels: np.ndarray, limit: int, seed: int, what: str) -> np.ndarray:
    """Draw ``limit`` rows with the class proportions of all labels; all rows if it is N or more.

    Rows are sorted; ``what`` names them in a message. Raises DatasetError for fewer rows than
    classes, or a class that is too small to divide.
    """
    if limit >= len(labels):
        return np.arange(len(labels))
    classes, counts = np.unique(labels, return_counts=True)
    where = f"{what}: expected to draw {limit:,} of {len(labels):,} images, every class on both"
    if counts.min() < 2:
        raise DatasetError(
            f"{where} sides, found a single image of class {classes[counts.argmin()]}; add one, "
            "or leave that class out"
        )
    least, most = len(classes), len(labels) - len(classes)
    if not least <= limit <= most:
        allowed = f"{least:,} to {most:,}, or all" if least < most else "all"
        raise DatasetError(f"{where} sides, found {least:,} classes; ask for {allowed} of them")
    from sklearn.model_selection import train_test_split

    rows, _ = train_test_split(
        np.arange(len(labels)), train_size=limit, stratify=labels, random_state=seed
    )
    return np.sort(rows)


def validation_rows(labels: np.ndarray, fraction: float, seed: int) -> np.ndarray:
    """Draw the training images of the validation split, at least one of each class.

    The same labels, fraction and seed give the same images, so a probe and a fine-tune can be
    compared on them.
    """
    held = max(round(fraction * len(labels)), len(np.unique(labels)))
    held = min(held, len(labels) - 1)  # at least one is left to train on
    return stratified_rows(labels, held, seed, "validation split")
