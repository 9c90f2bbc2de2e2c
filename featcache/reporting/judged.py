"""Which probe a report shows, and its head on the test images."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

import numpy as np

from ..errors import FeatcacheError
from ..metrics import Evaluation, evaluate_scores, softmax
from ..probes.head import Head, load_head
from ..probes.ingredients import feature_differences
from ..probes.question import own_test_images
from ..store.cache import Cache
from .selection import Group, Run

MISTAKES = 24
_ROWS = 8192


@dataclass(frozen=True)
class Probe:
    """A run of kind ``"probe"``, its head or why there is none, and how many others there are."""

    run: Run
    head: Head | None
    why: str
    n_others: int

    @property
    def calibrated(self) -> bool:
        """Whether the softmax of its scores is a probability."""
        return self.run.record.get("solver") != "ridge"


@dataclass(frozen=True)
class Mistake:
    """A misclassified test image: its row, name and classes, and the softmax of the prediction."""

    row: int
    id: str
    label: int
    predicted: int
    confidence: float


@dataclass(frozen=True, eq=False)
class Judged:
    """A head on the test split; ``correct``, float64 (M,), is 1 or 0, NaN without a label."""

    evaluation: Evaluation
    correct: np.ndarray
    mistakes: list[Mistake]
    n_wrong: int
    n_test: int

    def top1_without(self, rows: Iterable[int]) -> float | None:
        """Return the accuracy on the other test images; None where there are none."""
        kept = np.ones(len(self.correct), bool)
        kept[list(rows)] = False
        kept &= ~np.isnan(self.correct)
        return float(self.correct[kept].mean()) if kept.any() else None


def choose_probe(group: Group) -> Probe | None:
    """Return the newest probe of a group; those with a head that fits the cache come first.

    Of these, one on the very features of the cache comes before one on features that differ by
    rounding, and one that chose its C before one that was given it.
    """
    runs = [run for run in group.runs if run.record["kind"] == "probe"]
    if not runs:
        return None
    heads = {run.name: _head_of(run, group.cache) for run in runs}

    def rank(run: Run) -> tuple[bool, bool, bool, str]:
        head, _ = heads[run.name]
        same = head is not None and group.cache is not None
        same = same and head.fingerprint == group.cache.fingerprint  # type: ignore[union-attr]
        return head is not None, same, bool(run.record.get("sweep")), run.name

    run = max(runs, key=rank)
    return Probe(run, *heads[run.name], n_others=len(runs) - 1)


def _head_of(run: Run, cache: Cache | None) -> tuple[Head | None, str]:
    """Return the head of a run if it fits the cache, or why there is none."""
    if cache is None:
        return None, "there is no cache to evaluate its head on"
    if run.record.get("question"):
        return None, "it was asked another question than the cache's own labels and splits"
    path = run.saved("head")
    if path is None:
        return None, "the file of its head no longer exists"
    try:
        head = load_head(path)
        differing = feature_differences(head.ingredients, cache.meta)
        if head.task != "classes":
            return None, f"its head is one of {head.task}"
    except FeatcacheError as error:
        return None, str(error)
    if head.weight.shape[1] != cache.feature_dim or head.class_names != cache.class_names:
        differing = [*differing, "the length of features, or the classes"]
    if differing:
        return (
            None,
            f"its head was trained on features other than the cache's: {'; '.join(differing)}",
        )
    return head, ""


def judge(head: Head, cache: Cache, *, calibrated: bool) -> Judged | None:
    """Use a head on the labelled test images of a cache; None where it has none."""
    if not (cache.test.labels >= 0).any():
        return None
    test = own_test_images(cache)
    scores = head.scores(test.views[0])
    predicted, labels = scores.argmax(axis=1), test.labels
    confidence = np.concatenate(
        [softmax(scores[at : at + _ROWS]).max(axis=1) for at in range(0, len(scores), _ROWS)]
    )
    wrong = np.flatnonzero(predicted != labels)
    surest = wrong[np.argsort(-confidence[wrong], kind="stable")][:MISTAKES]
    rows = np.flatnonzero(cache.test.labels >= 0)
    correct = np.full(len(cache.test.labels), np.nan)
    correct[rows] = predicted == labels
    return Judged(
        evaluation=evaluate_scores(scores, labels, calibrated=calibrated),
        correct=correct,
        mistakes=[
            Mistake(
                int(rows[at]),
                cache.test.ids[rows[at]],
                int(labels[at]),
                int(predicted[at]),
                float(confidence[at]),
            )
            for at in surest.tolist()
        ],
        n_wrong=len(wrong),
        n_test=len(labels),
    )
