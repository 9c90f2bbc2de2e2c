"""A linear head and its file: safetensors, with JSON under ``featcache.head`` in the metadata.

A head carries the `ingredients` of its cache, so that it is used only on features made alike.
"""

from __future__ import annotations

import json
from collections.abc import Collection, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

import numpy as np

from ..errors import RecipeError, ShapeMismatchError, WeightsError
from ..files import Tensor, parse_safetensors, write_atomically
from ..metrics import sigmoid, softmax
from ..schema import count, list_of, number, object_of, optional, text, wrong_fields
from ..store.reader import check_whole
from .blocks import Features
from .ingredients import INGREDIENTS
from .scaling import unit_length

_SCALINGS = ("none", "l2")
TASKS = ("classes", "labels", "numbers")
_ROWS_AT_ONCE = 2048  # 4 MiB of ResNet-18 features
_KEY = "featcache.head"
_VERSION = 1
_MAX_BYTES = 1 << 30
_MAX_LEVELS = 3  # of lists and objects in the ingredients
_MAX_INGREDIENTS = 10_000  # characters; messages repeat them
_MAX_FIELDS = 32  # of the preprocessing, of which messages name each
_FACTS = {
    "class_names": list_of(text),
    "fingerprint": text,
    "scaling": text,
    "ingredients": object_of({}),
}


def _few_plain(values: Collection[Any]) -> bool:
    """Return whether these are a few texts, numbers and lists of numbers."""
    plain = optional(lambda one: text(one) or number()(one) or list_of(number())(one))
    return len(values) <= _MAX_FIELDS and all(map(plain, values))


_TEXTS = [name for name in INGREDIENTS if name not in ("cuts", "views", "preprocess")]
_INGREDIENTS = {
    **dict.fromkeys(_TEXTS, optional(text)),
    **dict.fromkeys(("cuts", "views", "head_cuts"), list_of(text)),
    "format_version": count(),
    "preprocess": lambda value: object_of({})(value) and _few_plain(value.values()),
}


@dataclass(frozen=True, eq=False)
class Head:
    """Scores of classes, labels or numbers from features: ``features @ weight.T + bias``.

    Parameters
    ----------
    weight : numpy.ndarray
        float32 (K, D).
    bias : numpy.ndarray
        float32 (K,).
    class_names : tuple of str
        K names, in the order of the weight's rows: of classes, labels or numeric targets.
    fingerprint : str
        The fingerprint of the cache it was trained on.
    scaling : str
        ``"l2"``: each feature is first divided by its Euclidean norm; a zero feature stays zero.
        ``"none"``: features are used as they are; standardising is already in weight and bias.
    ingredients : mapping of str to Any
        What made the features, from the cache's ``meta``.
    task : str
        ``"classes"``: one of K for each image, by softmax. ``"labels"``: any of K, a sigmoid each.
        ``"numbers"``: the scores are the values themselves.
    thresholds : numpy.ndarray or None
        float32 (K,) in [0, 1], only of labels: the least probability of each at which it is
        predicted.

    Raises
    ------
    ShapeMismatchError
        Arrays of another dtype, shapes that do not fit, or another number of names.
    RecipeError
        An unknown scaling or task.
    """

    weight: np.ndarray
    bias: np.ndarray
    class_names: tuple[str, ...]
    fingerprint: str
    scaling: Literal["none", "l2"] = "none"
    ingredients: Mapping[str, Any] = field(default_factory=dict)
    task: Literal["classes", "labels", "numbers"] = "classes"
    thresholds: np.ndarray | None = None

    def __post_init__(self) -> None:
        dtypes = {self.weight.dtype, self.bias.dtype}
        fits = self.weight.ndim == 2 and self.bias.shape == (len(self.weight),)
        if dtypes != {np.dtype(np.float32)} or not fits or not self.weight.size:
            raise ShapeMismatchError(
                "head: expected a weight of float32 (K, D) and a bias of float32 (K,), found "
                f"{self.weight.dtype} {self.weight.shape} and {self.bias.dtype} {self.bias.shape}"
            )
        if len(self.class_names) != len(self.weight):
            raise ShapeMismatchError(
                f"head: expected {len(self.weight)} class names, one for each row of its weight, "
                f"found {len(self.class_names)}"
            )
        if self.scaling not in _SCALINGS:
            raise RecipeError(
                f"head: expected the scaling {' or '.join(_SCALINGS)}, found {self.scaling!r:.80}"
            )
        if self.task not in TASKS:
            raise RecipeError(
                f"head: expected the task {', '.join(TASKS)}, found {self.task!r:.80}"
            )
        if (self.task == "labels") != (self.thresholds is not None):
            raise ShapeMismatchError(
                f"head: expected thresholds for labels and for nothing else, found the task "
                f"{self.task} {'without' if self.thresholds is None else 'with'} thresholds"
            )
        if self.thresholds is not None:
            _check_thresholds(self.thresholds, len(self.weight))

    def scores(self, features: Features) -> np.ndarray:
        """Return the score of every class or label, or every number.

        Parameters
        ----------
        features : numpy.ndarray or Rows
            (N, D), any type of floating point.

        Returns
        -------
        numpy.ndarray
            float32 (N, K).

        Raises
        ------
        ShapeMismatchError
            Features of another length than D.
        WeightsError
            Scores that are not finite.
        """
        if len(features.shape) != 2 or features.shape[1] != self.weight.shape[1]:
            raise ShapeMismatchError(
                f"features: expected (N, {self.weight.shape[1]}), found {features.shape}; this "
                "head belongs to another backbone"
            )
        scores = np.empty((len(features), len(self.weight)), np.float32)
        for start in range(0, len(features), _ROWS_AT_ONCE):
            rows = slice(start, start + _ROWS_AT_ONCE)
            check_whole(features)
            x = np.asarray(features[rows], np.float32)
            scaled = unit_length(x) if self.scaling == "l2" else x
            with np.errstate(all="ignore"):
                np.matmul(scaled, self.weight.T, out=scores[rows])
                scores[rows] += self.bias
            if not np.isfinite(scores[rows]).all():
                raise WeightsError(
                    "head: expected finite scores, found NaN or infinity: its weights are too "
                    f"large (up to {np.abs(self.weight).max():.3g}), or the features are not "
                    "finite; train another head"
                )
        return scores

    def probabilities(self, features: Features) -> np.ndarray:
        """Return the probability of every class or label: float64 (N, K).

        Rows of classes sum to 1. Raises RecipeError for a head of numbers, which has none.
        """
        if self.task == "numbers":
            raise RecipeError("head: expected classes or labels, found numbers; use scores")
        scores = self.scores(features)
        return softmax(scores) if self.task == "classes" else sigmoid(scores)

    def predict(self, features: Features) -> np.ndarray:
        """Return what is predicted for each feature.

        The class with the highest score, int64 (N,); which labels reach their thresholds,
        bool (N, K); or the numbers, float32 (N, K).
        """
        if self.thresholds is not None:
            return reached(self.probabilities(features), self.thresholds)
        scores = self.scores(features)
        predicted: np.ndarray = scores.argmax(axis=1) if self.task == "classes" else scores
        return predicted


def reached(probabilities: np.ndarray, thresholds: np.ndarray) -> np.ndarray:
    """Return which probabilities (N, L) reach the thresholds float32 (L,): bool (N, L)."""
    above: np.ndarray = probabilities >= np.asarray(thresholds, np.float64)
    return above


def _check_thresholds(thresholds: np.ndarray, n_labels: int) -> None:
    fits = thresholds.dtype == np.float32 and thresholds.shape == (n_labels,)
    if not fits or not ((thresholds >= 0) & (thresholds <= 1)).all():  # False for NaN too
        raise ShapeMismatchError(
            f"head: expected thresholds of float32 ({n_labels},) in [0, 1], found "
            f"{thresholds.dtype} {thresholds.shape}, or others"
        )


def save_head(path: Path, head: Head, provenance: Mapping[str, Any]) -> None:
    """Write a head, and as JSON how it was trained."""
    from safetensors.numpy import save

    facts = {
        **provenance,
        "version": _VERSION,
        "class_names": list(head.class_names),
        "fingerprint": head.fingerprint,
        "scaling": head.scaling,
        "ingredients": dict(head.ingredients),
    }
    # safetensors writes an array's memory as it is, transposed or not.
    arrays = {"weight": np.ascontiguousarray(head.weight), "bias": np.ascontiguousarray(head.bias)}
    if head.task != "classes":
        facts["task"] = head.task
    if head.thresholds is not None:
        arrays["thresholds"] = np.ascontiguousarray(head.thresholds)
    write_atomically(path, save(arrays, {_KEY: json.dumps(facts)}))


def load_head(path: str | Path) -> Head:
    """Read a head's file; no code in it is run.

    Parameters
    ----------
    path : str or Path
        As `featcache.probe` saved it.

    Raises
    ------
    WeightsError
        No such file, not a head, or one that contradicts itself.
    """
    path = Path(path)
    try:
        if path.exists() and not path.is_file():
            raise ValueError("something that is not a file")
        if path.stat().st_size > _MAX_BYTES:
            raise ValueError(f"{path.stat().st_size:,} bytes, more than any head has")
        return _parse(path.read_bytes())
    except (OSError, ValueError, RecursionError) as error:
        reason = getattr(error, "strerror", None) or error
        raise WeightsError(
            f"{path}: expected a head that featcache probe --save-head wrote, found: {reason}"
        ) from None


def _parse(data: bytes) -> Head:
    """Parse an untrusted file; raise ValueError with what is wrong with it."""
    entries, metadata = parse_safetensors(data)
    described = metadata.get(_KEY)
    if described is None:
        raise ValueError(f"a safetensors file without {_KEY} in its metadata")
    facts = json.loads(described)
    if not isinstance(facts, dict) or facts.get("version") != _VERSION:
        raise ValueError(f"{_KEY} of another version than {_VERSION}")
    wrong = wrong_fields(facts, _FACTS, {"task": text})
    if wrong:
        raise ValueError(f"no {wrong[0]}, or one of another kind than a head has")
    ingredients = facts["ingredients"]
    wrong = wrong_fields(ingredients, {}, _INGREDIENTS)
    if wrong:
        raise ValueError(f"ingredients whose {wrong[0]} is of another kind than a cache has")
    if not _shallow(ingredients, _MAX_LEVELS):
        raise ValueError("ingredients that are nested too deeply")
    if len(json.dumps(ingredients)) > _MAX_INGREDIENTS:
        raise ValueError("ingredients that fill pages")
    task = facts.get("task", "classes")
    return Head(
        _array(entries, "weight"),
        _array(entries, "bias"),
        tuple(facts["class_names"]),
        facts["fingerprint"],
        facts["scaling"],
        ingredients,
        task,
        _array(entries, "thresholds") if task == "labels" else None,
    )


def _array(entries: Mapping[str, Tensor], name: str) -> np.ndarray:
    entry = entries.get(name)
    if entry is None or entry.dtype != "F32":
        raise ValueError(f"no float32 tensor called {name!r}")
    array = np.frombuffer(entry.data, "<f4").reshape(entry.shape)
    if not np.isfinite(array).all():
        raise ValueError(f"NaN or infinity in {name!r}: its training diverged")
    return array


def _shallow(value: object, levels: int) -> bool:
    """Return whether lists and objects are nested at most ``levels`` deep."""
    if isinstance(value, (dict, list)):
        inside = value.values() if isinstance(value, dict) else value
        return levels > 0 and all(_shallow(item, levels - 1) for item in inside)
    return True
