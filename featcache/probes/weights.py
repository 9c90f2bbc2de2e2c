"""The weights of training images: how much each counts in the objective.

The objective is the weighted mean ``sum_i w_i loss_i / sum_i w_i``, so only ratios of weights
matter at a given lambda. An image of weight 2 counts as two images, and one of weight 0 as none:
scikit-learn's C is ``1 / (lambda * sum_i w_i)``.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from numbers import Real
from typing import Any

import numpy as np

from ..errors import RecipeError
from .blocks import Features, Rows


def sample_weights(
    labels: np.ndarray,
    n_classes: int,
    class_weight: str | Mapping[Any, Any] | None,
    weights: np.ndarray | None,
    class_names: Sequence[Any] | None = None,
) -> np.ndarray | None:
    """Return the weight of each training image, float64 (N,), or None where all count the same.

    ``"balanced"``: every one of the K classes that has images gets the same total weight, as in
    scikit-learn. A mapping gives the weight of classes, by ``class_names`` or else their numbers,
    1 for those that it leaves out. ``weights`` (N,) of the images are multiplied with it. Raises
    RecipeError for weights that are negative, not finite, all 0 or not N, or an unknown class.
    """
    if class_weight is None and weights is None:
        return None
    own = np.ones(len(labels)) if weights is None else _checked(weights, len(labels))
    if class_weight is None:
        return own
    if isinstance(class_weight, Mapping):
        by_class = _of_mapping(
            class_weight, range(n_classes) if class_names is None else class_names
        )
    elif class_weight == "balanced":
        total = np.bincount(labels, own, minlength=n_classes)
        present = total > 0
        by_class = np.divide(
            total.sum() / present.sum(), total, out=np.zeros(n_classes), where=present
        )
    else:
        raise RecipeError(
            f"class weight: expected balanced or a weight for each class, found {class_weight!r}"
        )
    return _checked(own * by_class[labels], len(labels))


def total_weight(views: Sequence[Features], weights: np.ndarray | None) -> float:
    """Return the sum of the weights over all views: C is 1 / (lambda * this)."""
    return len(views) * (len(views[0]) if weights is None else float(weights.sum()))


def mean_1(weights: np.ndarray) -> np.ndarray:
    """Return weights in the same ratios whose mean is 1: float32 sums then stay in range."""
    scaled: np.ndarray = weights / weights.mean()
    return scaled


def counted(
    views: Sequence[Features], labels: np.ndarray, weights: np.ndarray | None
) -> tuple[Sequence[Features], np.ndarray, np.ndarray | None]:
    """Return the images whose weight is not 0: features, labels and weights."""
    if weights is None or weights.all():
        return views, labels, weights
    kept = np.flatnonzero(weights)
    return [Rows(features, kept) for features in views], labels[kept], weights[kept]


def _checked(weights: Any, n: int) -> np.ndarray:
    """Return weights as float64 (N,); raise RecipeError where no objective can use them."""
    try:
        found = np.asarray(weights, np.float64)
    except (TypeError, ValueError):
        raise RecipeError("weights: expected numbers, found something else") from None
    if found.shape != (n,):
        raise RecipeError(
            f"weights: expected one for each of {n:,} images, found shape {found.shape}"
        )
    wrong = ~(np.isfinite(found) & (found >= 0))
    if wrong.any():
        row = int(wrong.argmax())
        raise RecipeError(
            f"weights: expected 0 or positive numbers, found {found[row]} at image {row} "
            f"({int(wrong.sum()):,} such images); correct them, or leave these images out"
        )
    if not found.any():
        raise RecipeError("weights: expected at least one above zero, found only zeros")
    return found


def _of_mapping(class_weight: Mapping[Any, Any], names: Sequence[Any]) -> np.ndarray:
    numbers = {name: number for number, name in enumerate(names)}
    by_class = np.ones(len(numbers))
    for name, weight in class_weight.items():
        if name not in numbers:
            known = ", ".join(repr(known) for known in list(numbers)[:10])
            more = ", …" if len(numbers) > 10 else ""
            raise RecipeError(f"class weight: expected a class of {known}{more}, found {name!r}")
        if not isinstance(weight, Real):
            raise RecipeError(f"class weight of {name!r}: expected a number, found {weight!r}")
        by_class[numbers[name]] = weight
    return by_class
