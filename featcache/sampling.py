"""All random draws of training, shared by cached and end-to-end runs.

A probe on cached features and a frozen fine-tune on images agree to float tolerance because both
use the same images, in the same order and flip views, from the same initial head.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterator, Sequence

import numpy as np

from .errors import DatasetError, RecipeError

# The seed for limits, whatever the seed of the run: a probe and every fine-tune get the same
# images, so they can be compared.
LIMIT_SEED = 0

# Of the images of a data set without a given split, the share that is kept for testing.
TEST_SHARE = 0.2


def drawn_sides(hashes: np.ndarray) -> np.ndarray:
    """Draw the side of each image from its content alone; bool (N,), True on the test side.

    ``hashes`` are SHA-256, uint8 (N, 32), taken as uniform numbers in [0, 1). So no other image
    changes the side of one, and copies have the same.
    """
    first = np.ascontiguousarray(hashes[:, :8]).view(">u8").reshape(-1)
    return first < np.uint64(int(TEST_SHARE * 2**64))


def text_hashes(values: Sequence[str]) -> np.ndarray:
    """Return SHA-256 of each text in UTF-8, uint8 (N, 32): for `drawn_sides` of groups."""
    encoded = (value.encode("utf-8", "surrogateescape") for value in values)
    digests = b"".join(hashlib.sha256(text).digest() for text in encoded)
    return np.frombuffer(digests, np.uint8).reshape(-1, 32)


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
    classes, strata, counts = np.unique(labels, return_inverse=True, return_counts=True)
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
    generator = np.random.RandomState(seed)
    shares = _shares(counts, limit, generator)
    # The other side's: scikit-learn draws them from the same stream, before any row.
    _shares(counts - shares, len(labels) - limit, generator)
    members = np.split(np.argsort(strata, kind="stable"), np.cumsum(counts)[:-1])
    rows = [
        of_class[generator.permutation(len(of_class))[:share]]
        for of_class, share in zip(members, shares, strict=True)
    ]
    return np.sort(np.concatenate(rows))


def _shares(counts: np.ndarray, limit: int, generator: np.random.RandomState) -> np.ndarray:
    """Return how many of ``limit`` rows each class gets, int64 (K,); ties are drawn.

    With `stratified_rows` the same draw as scikit-learn's ``train_test_split(stratify=labels)``,
    whose import takes 2 seconds: longer than the first answer of a probe.
    """
    exact = counts / counts.sum() * limit
    shares = np.floor(exact)
    remainders, left = exact - shares, int(limit - shares.sum())
    for remainder in np.unique(remainders)[::-1]:
        if not left:
            break
        (tied,) = np.nonzero(remainders == remainder)
        chosen = generator.choice(tied, min(len(tied), left), replace=False)
        shares[chosen] += 1
        left -= len(chosen)
    return shares.astype(np.int64)


def validation_rows(labels: np.ndarray, fraction: float, seed: int) -> np.ndarray:
    """Draw the training images of the validation split, at least one of each class.

    The same labels, fraction and seed give the same images, so a probe and a fine-tune can be
    compared on them.
    """
    held = max(round(fraction * len(labels)), len(np.unique(labels)))
    held = min(held, len(labels) - 1)  # at least one is left to train on
    return stratified_rows(labels, held, seed, "validation split")


def folds(
    labels: np.ndarray, n_folds: int, seed: int, groups: np.ndarray | None = None
) -> np.ndarray:
    """Divide rows into folds of about equal size and class proportions: int64 (N,), fold numbers.

    Labels that are no classes, int64 (N,), are divided without regard to their values. Rows of
    the same one of ``groups``, (N,), are in the same fold. Classes are then balanced as well as
    the groups allow: from the group with the most uneven classes to the most even one, each
    goes to the fold where it adds least to the variance of the class counts over the folds.

    Raises DatasetError for more folds than rows, than groups, or, without groups, than rows of
    a class; RecipeError for fewer than 2 folds.
    """
    if n_folds < 2:
        raise RecipeError(f"folds: expected 2 or more, found {n_folds}")
    stratified = labels.ndim == 1 and np.issubdtype(labels.dtype, np.integer)
    strata = labels if stratified else np.zeros(len(labels), np.int64)
    if groups is not None:
        return _group_folds(strata, n_folds, seed, groups)
    classes, counts = np.unique(strata, return_counts=True)
    least = int(counts.min(initial=len(labels)))
    if least < n_folds:
        of_class = f" of class {classes[counts.argmin()]}" if stratified and least else ""
        raise DatasetError(
            f"folds: expected {n_folds} images or more of every class, one for each fold, found "
            f"{least}{of_class}; ask for fewer folds, or leave that class out"
        )
    from sklearn.model_selection import StratifiedKFold

    numbers = np.empty(len(labels), np.int64)
    division = StratifiedKFold(n_folds, shuffle=True, random_state=seed)
    for number, (_, held) in enumerate(division.split(strata, strata)):
        numbers[held] = number
    return numbers


def _group_folds(strata: np.ndarray, n_folds: int, seed: int, groups: np.ndarray) -> np.ndarray:
    """Assign whole groups to folds, as scikit-learn's StratifiedGroupKFold does.

    That one takes a second for 2,000 groups, and one image may be a group of its own. With the
    variance in place of the standard deviation the sums over folds need one product a group.
    """
    _, strata = np.unique(strata, return_inverse=True)
    names, members = np.unique(groups, return_inverse=True)
    if len(names) < n_folds:
        raise DatasetError(
            f"folds: expected {n_folds} groups or more, one for each fold, found {len(names)}; "
            "ask for fewer folds"
        )
    n_classes = int(strata.max()) + 1
    cells = np.bincount(members * n_classes + strata, minlength=len(names) * n_classes)
    counts = cells.reshape(len(names), n_classes).astype(np.float64)  # of each group
    order = np.random.default_rng(seed).permutation(len(names))
    shuffled = counts[order]
    order = order[np.lexsort((-shuffled.sum(axis=1), -shuffled.std(axis=1)))]
    scale = 1 / np.square(counts.sum(axis=0))
    sums = np.zeros((n_folds, n_classes))
    fold_of = np.empty(len(names), np.int64)
    for group in order.tolist():
        added = sums @ (counts[group] * scale)
        fold = int(np.lexsort((sums.sum(axis=1), added))[0])  # among equals the smallest fold
        sums[fold] += counts[group]
        fold_of[group] = fold
    return fold_of[members]
