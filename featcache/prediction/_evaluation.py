"""A saved head on a cache: does it fit, and how good is it there."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import numpy as np

from ..errors import CacheMismatchError, WeightsError
from ..labelled import labelled
from ..metrics import top1, wilson_interval
from ..probes import (
    Head,
    class_differences,
    feature_differences,
    load_head,
    rounding_differences,
)
from ..store import Cache, fingerprint, fingerprint_fields, load

__all__ = ["HeadResult", "checked_head", "evaluate_head"]

_AGAIN = "train it again with featcache probe --save-head"


@dataclass(frozen=True, eq=False)
class HeadResult:
    """How good a saved head is on the test split of a cache.

    Parameters
    ----------
    top1 : float
        Accuracy, in [0, 1].
    top1_interval : tuple of 2 floats
        Wilson's 95 % interval.
    n_test : int
        Images that have a label.
    predicted : numpy.ndarray
        int64 (n_test,), the class of each.
    cache : Path
        The features.
    own_cache : bool
        Whether this is the cache whose training split the head was trained on.
    notes : tuple of str
        What computed these features differs from what computed the head's.
    """

    top1: float
    top1_interval: tuple[float, float]
    n_test: int
    predicted: np.ndarray
    cache: Path
    own_cache: bool
    notes: tuple[str, ...]


def evaluate_head(head: str | Path | Head, cache: str | Path | Cache) -> HeadResult:
    """Measure a saved head on the test split of a cache.

    Parameters
    ----------
    head : str, Path or Head
        The head, or its file.
    cache : str, Path or Cache
        The features; not necessarily those that the head was trained on.

    Raises
    ------
    WeightsError
        Not a head, or one that does not say what made its features.
    CacheMismatchError
        Features made otherwise or of another length, other classes or another order of
        them, no test images; the message says which.
    CacheError
        A cache that cannot be read.
    """
    head, where = checked_head(head)
    if not isinstance(cache, Cache):
        cache = load(cache)
    cache.check_vectors()
    differing = feature_differences(head.ingredients, cache.meta)
    if head.weight.shape[1] != cache.feature_dim:
        differing.append(f"length: head {head.weight.shape[1]}, here {cache.feature_dim}")
    differing += class_differences(head.class_names, cache.class_names)
    if differing or not len(cache.test):
        raise CacheMismatchError(
            f"{cache.path}: expected test images with the features and classes of {where}, found "
            f"{'; '.join(differing) or 'no test images'}; name the cache that the head was "
            "trained on, or one made alike"
        )
    test = labelled(cache, "test")
    predicted = head.predict(test.views[0])
    accuracy = top1(predicted, test.labels)
    return HeadResult(
        top1=accuracy,
        top1_interval=wilson_interval(accuracy, len(predicted)),
        n_test=len(predicted),
        predicted=predicted,
        cache=cache.path,
        own_cache=head.fingerprint == cache.fingerprint,
        notes=tuple(rounding_differences(head.ingredients, cache.meta)),
    )


def checked_head(head: str | Path | Head) -> tuple[Head, str]:
    """Return a head that says what its features are made of, and its name for messages."""
    where = "head" if isinstance(head, Head) else str(head)
    if not isinstance(head, Head):
        head = load_head(head)
    missing = [
        name for name in fingerprint_fields(head.ingredients) if name not in head.ingredients
    ]
    if missing:
        raise WeightsError(
            f"{where}: expected a head that says what made its features, found no "
            f"{', '.join(missing)}; {_AGAIN}"
        )
    if fingerprint(head.ingredients) != head.fingerprint:
        raise WeightsError(
            f"{where}: expected ingredients that hash to its fingerprint "
            f"{head.fingerprint[:8]!r}, found others: someone edited them; {_AGAIN}"
        )
    return head, where
