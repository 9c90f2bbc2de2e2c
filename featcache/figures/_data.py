"""Reading results: as the library returns them, or as a run's record holds them."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from itertools import groupby
from typing import Any

import numpy as np

from ..errors import FeatcacheError, ShapeMismatchError

__all__ = ["as_recalls", "by_dataset", "check_shape", "field", "metric_name", "percent"]

_MOST_DATASETS = 8
_METRICS = {"top1": "top-1", "balanced": "balanced accuracy", "f1": "macro F1"}


def field(item: Any, name: str, default: Any = None) -> Any:
    """Return what a dataclass, or the mapping that it became in a record, has under a name."""
    if isinstance(item, Mapping):
        return item.get(name, default)
    return getattr(item, name, default)


def percent(fraction: float, digits: int = 1) -> str:
    """Return ``76.9 %``, with a space that does not break."""
    return f"{100 * fraction:.{digits}f}\u00a0%"


def metric_name(metric: str) -> str:
    """Return what a person calls one of `featcache.metrics.METRICS`."""
    return _METRICS.get(metric, metric)


def by_dataset(records: Sequence[Mapping[str, Any]]) -> list[list[Mapping[str, Any]]]:
    """Return the records of each data set: accuracies on different data share no axes.

    Raises
    ------
    FeatcacheError
        More data sets than a figure has room for.
    """

    def key(record: Mapping[str, Any]) -> tuple[str, str]:
        return str(record.get("dataset", "")), str(record.get("dataset_digest", ""))

    groups = [list(group) for _, group in groupby(sorted(records, key=key), key=key)]
    if len(groups) > _MOST_DATASETS:
        raise FeatcacheError(
            f"figure: expected runs of at most {_MOST_DATASETS} data sets, found {len(groups)}; "
            "name one"
        )
    return groups


def as_recalls(recalls: Any, class_names: Sequence[str]) -> np.ndarray:
    """Return accuracies of classes as float64 (K,), NaN for None; or (0,) where there are none.

    Raises
    ------
    ShapeMismatchError
        There is another number of names.
    """
    values = np.array([np.nan if value is None else value for value in recalls], np.float64)
    if values.size:
        check_shape(values.shape, (len(class_names),), "per class")
    return values


def check_shape(found: tuple[int, ...], expected: tuple[int, ...], what: str) -> None:
    """Refuse an array that has not one place for each class name."""
    if found != expected:
        raise ShapeMismatchError(
            f"{what}: expected an array of shape {expected}, one place for each class name, found "
            f"{found}"
        )
