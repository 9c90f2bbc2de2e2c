"""Multi-label probes: every label of an image by itself, with its own C and threshold.

C and threshold of a label are chosen on a holdout: the val images, or a part of the training
images. The head at that C is then fitted to all training images. The test images are read once.
"""

from __future__ import annotations

import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import TYPE_CHECKING, Any

import numpy as np

from ..errors import TableError
from ..metrics import (
    AveragePrecision,
    Interval,
    average_precision,
    average_precisions,
    f1_threshold,
    sigmoid,
)
from ..notebook import ShownAsTable
from ..progress import OnProgress, Progress, silent
from ..tables.table import listed
from .blocks import Features, Rows, loaded, one_blas_thread
from .cross_check import MAX_ITERATIONS, UNDER_TRAINED, timed_fit
from .head import Head, reached
from .label_heads import LabelHeads, label_objective, label_totals, train_labels
from .scaling import Scaling, moments_of_some
from .sweep import C_GRID, HOLDOUT_SHARE

if TYPE_CHECKING:
    from .question import Part

_RANKING_TOLERANCE = 1e-3  # enough to rank the values of C
_FEW = 5  # positives on the holdout: the average precision of fewer is mostly chance
_CHECKED = 3  # labels that scikit-learn fits too
_LISTED = 5
_listed = partial(listed, most=_LISTED)


@dataclass(frozen=True)
class LabelScore:
    """One label: how its head was chosen, and how good it is on the test split.

    Parameters
    ----------
    name : str
        The label.
    n_train, n_test : int
        Images for which it is known.
    n_train_positive, n_test_positive : int
        Images that have it.
    C : float or None
        scikit-learn's: 1 / (N * lambda); None for a label that was not trained, since all its
        training images have it or none has.
    threshold : float or None
        The least probability at which it is predicted: that of the highest F1 on the holdout.
    average_precision : float or None
        On the test split; None without positives there.
    average_precision_interval : tuple of 2 floats or None
        95 %, over resamples of test images, or of their groups.
    f1 : float or None
        At the threshold, on the test split; None where nothing is positive or predicted.
    """

    name: str
    n_train: int
    n_train_positive: int
    n_test: int
    n_test_positive: int
    C: float | None = None
    threshold: float | None = None
    average_precision: float | None = None
    average_precision_interval: Interval | None = None
    f1: float | None = None


@dataclass(frozen=True)
class LabelsCheck:
    """scikit-learn's LogisticRegression on some of the labels, with the same objective.

    Parameters
    ----------
    labels : tuple of str
        Those with the most, the median and the fewest positives.
    wall_s : float
        Duration of its fits.
    objective_gap : float
        The largest of (head's objective - its objective) / its objective; below 0 where the head's
        is lower.
    average_precision_difference : float or None
        The largest absolute difference on the test split.
    converged : bool
        Whether it stopped by its own tolerance.
    """

    labels: tuple[str, ...]
    wall_s: float
    objective_gap: float
    average_precision_difference: float | None
    converged: bool

    @property
    def under_trained(self) -> bool:
        """Whether a head's objective is clearly above scikit-learn's."""
        return self.objective_gap > UNDER_TRAINED


@dataclass(frozen=True)
class MultilabelScores(ShownAsTable):
    """Heads of several labels an image, and how good they are.

    Parameters
    ----------
    macro_ap, micro_ap : float or None
        Average precision on the test split: the mean over labels, and that of all pairs of image
        and label in one ranking. None without positives.
    macro_ap_interval, micro_ap_interval : tuple of 2 floats or None
        95 %, over resamples of test images, or of their groups.
    macro_f1, micro_f1 : float or None
        At the thresholds: the mean over labels, and that of all pairs.
    n_train, n_test, n_holdout : int
        Images. The holdout is the val split where there is one, else a part of the training images.
    labels : tuple of LabelScore
        One for each label.
    scale : str
        ``"none"``, ``"standardize"`` or ``"l2"``.
    seed : int
        Of the holdout.
    passes : int
        Over the training features, for the last fit.
    converged : bool
        Whether every head reached its tolerance.
    wall_s : float
        Duration of choice and training, without the check.
    check : LabelsCheck or None
        What scikit-learn reaches; None where it was switched off.
    notes : tuple of str
        Labels that were not trained, or chosen in another way.
    """

    macro_ap: float | None
    macro_ap_interval: Interval | None
    micro_ap: float | None
    micro_ap_interval: Interval | None
    macro_f1: float | None
    micro_f1: float | None
    n_train: int
    n_test: int
    n_holdout: int
    labels: tuple[LabelScore, ...]
    scale: str
    seed: int
    passes: int
    converged: bool
    wall_s: float
    check: LabelsCheck | None
    notes: tuple[str, ...]


def probe_labels(
    train: Part,
    val: Part | None,
    test: Part,
    names: Sequence[str],
    *,
    C: float | None = None,
    weight_decay: float | None = None,
    scale: str = "none",
    seed: int = 0,
    check: bool = True,
    fingerprint: str = "",
    ingredients: Mapping[str, Any] | None = None,
    on_progress: OnProgress = silent,
) -> tuple[MultilabelScores, Head]:
    """Choose C and threshold of each label, train the heads, test them and check them.

    Targets are int8 (n, L): 1, 0, or -1 where not known. Without ``val`` a part of ``train`` is
    held out, which keeps groups together. The head lacks labels that could not be trained; raises
    TableError where these are all.
    """
    targets = train.labels
    trained = np.flatnonzero(_has_both(targets, train.weights))
    if not len(trained):
        raise TableError(
            f"{_listed(names)}: expected a label that some training images have and some have not, "
            "found none; choose other columns or rows"
        )
    scaling = Scaling(scale, train.views)
    views = [loaded(scaling.lazily(features)) for features in train.views]
    totals = label_totals(targets[:, trained], train.weights, len(views))
    grid = [np.full(len(trained), value) for value in (C_GRID if C is None else (C,))]
    if weight_decay is not None:
        grid = [1 / (weight_decay * totals)]

    started = time.perf_counter()
    with one_blas_thread():
        fit_views, fit_targets, weights = views, targets[:, trained], train.weights
        if val is None:
            held = holdout_rows(fit_targets, seed, train.groups)
            kept = np.setdiff1d(np.arange(len(targets)), held)
            chosen_on: tuple[Features, np.ndarray] = Rows(views[0], held), fit_targets[held]
            fit_views, fit_targets = [Rows(features, kept) for features in views], fit_targets[kept]
            weights = None if weights is None else weights[kept]
        else:
            chosen_on = scaling.lazily(val.views[0]), val.labels[:, trained]
        choice = _choose(fit_views, fit_targets, weights, *chosen_on, grid, on_progress)
        heads = train_labels(
            views,
            targets[:, trained],
            1 / (choice.C * totals),
            weights=train.weights,
            start=choice.heads,
            on_progress=on_progress,
        )
    wall_s = time.perf_counter() - started

    head = Head(
        *scaling.fold(heads.weight, heads.bias),
        tuple(names[label] for label in trained),
        fingerprint,
        "l2" if scale == "l2" else "none",
        ingredients or {},
        "labels",
        choice.thresholds.astype(np.float32),
    )
    measured = label_measures(head, test.views[0], test.labels[:, trained], test.groups)
    notes = (*_left_out(names, trained, targets), *choice.notes(head.class_names, len(grid)))
    checked: LabelsCheck | None = None
    if check:
        checked = _check(
            views, targets[:, trained], train.weights, heads, 1 / (choice.C * totals),
            head.class_names, scaling.lazily(test.views[0]), test.labels[:, trained],
        )  # fmt: skip
    scores = MultilabelScores(
        macro_ap=measured.ranked.macro,
        macro_ap_interval=measured.ranked.macro_interval,
        micro_ap=measured.ranked.micro,
        micro_ap_interval=measured.ranked.micro_interval,
        macro_f1=measured.macro_f1,
        micro_f1=measured.micro_f1,
        n_train=len(targets),
        n_test=len(test.labels),
        n_holdout=len(chosen_on[1]),
        labels=_label_scores(names, trained, targets, test.labels, choice, measured),
        scale=scale,
        seed=seed,
        passes=heads.passes,
        converged=bool(heads.converged.all()),
        wall_s=wall_s,
        check=checked,
        notes=notes,
    )
    return scores, head


@dataclass(frozen=True)
class LabelMeasures:
    """How good a head of L labels is: average precision, and F1 at its thresholds."""

    ranked: AveragePrecision
    macro_f1: float | None
    micro_f1: float | None
    f1: tuple[float | None, ...]


def label_measures(
    head: Head, features: Features, targets: np.ndarray, groups: np.ndarray | None = None
) -> LabelMeasures:
    """Measure a head of L labels on features (M, D) and targets int8 (M, L), -1 not known."""
    scores = head.scores(features)
    assert head.thresholds is not None
    predicted, known = reached(sigmoid(scores), head.thresholds), targets >= 0
    hits = (predicted & (targets == 1)).sum(axis=0)
    both = (predicted & known).sum(axis=0) + (targets == 1).sum(axis=0)  # 2 TP + FP + FN
    f1 = [float(2 * hit / n) if n else None for hit, n in zip(hits, both, strict=True)]
    defined = [value for value in f1 if value is not None]
    return LabelMeasures(
        average_precisions(scores, targets, groups),
        float(np.mean(defined)) if defined else None,
        float(2 * hits.sum() / both.sum()) if both.sum() else None,
        tuple(f1),
    )


def holdout_rows(targets: np.ndarray, seed: int, groups: np.ndarray | None = None) -> np.ndarray:
    """Draw a fifth of the images, sorted, with about a fifth of the positives of every label.

    Rare labels are divided first, so a label with two positives has one on each side. Images of a
    group, int64 (N,), stay together. Sechidis, Tsoumakas and Vlahavas, "On the stratification of
    multi-label data", ECML PKDD 2011.
    """
    unit, positive = np.arange(len(targets)), targets == 1
    if groups is not None:
        unit = np.unique(groups, return_inverse=True)[1].reshape(-1)
        positive = np.zeros((int(unit.max()) + 1, targets.shape[1]), bool)
        np.logical_or.at(positive, unit, targets == 1)
    order = np.random.default_rng(seed).permutation(len(positive))
    counts = positive.sum(axis=0)
    held, free = np.zeros(len(positive), bool), np.ones(len(positive), bool)

    def take(units: np.ndarray, wanted: float) -> None:
        chosen = units[: max(0, round(wanted))]
        held[chosen] = True
        free[units] = False

    for label in np.argsort(counts, kind="stable"):
        if counts[label] > 1:
            share = max(1, round(HOLDOUT_SHARE * counts[label]))
            among = positive[:, label]
            take(order[(free & among)[order]], share - (held & among).sum())
    take(order[free[order]], HOLDOUT_SHARE * len(positive) - held.sum())
    if not held.any() or held.all():  # one image or group
        return np.arange(len(targets))[: len(targets) // 5]
    return np.flatnonzero(held[unit])


@dataclass(frozen=True, eq=False)
class _Choice:
    """C and threshold (L,) of each label, the heads at this C, and how it was chosen."""

    C: np.ndarray
    thresholds: np.ndarray
    heads: LabelHeads
    by_loss: np.ndarray  # bool (L,)
    unheard: np.ndarray  # bool (L,): no holdout image for which the label is known
    at_edge: np.ndarray  # bool (L,)

    def notes(self, names: Sequence[str], n_values: int) -> tuple[str, ...]:
        """Return what is unusual about it, one line each."""
        found = []
        if n_values > 1 and (rare := np.flatnonzero(self.by_loss & ~self.unheard)).size:
            found.append(
                f"C of {_listed([names[label] for label in rare])} chosen by log loss: fewer than "
                f"{_FEW} positives (or negatives) on the holdout"
            )
        if (unheard := np.flatnonzero(self.unheard)).size:
            found.append(
                f"not known for any holdout image: {_listed([names[label] for label in unheard])}; "
                "the threshold is 0.5, and C the median of the others unless given"
            )
        if n_values > 1 and (edge := np.flatnonzero(self.at_edge)).size:
            found.append(
                f"C of {_listed([names[label] for label in edge])} is at the end of the grid: a "
                "better one may lie outside"
            )
        return tuple(found)


def _choose(
    views: Sequence[Features],
    targets: np.ndarray,
    weights: np.ndarray | None,
    held: Features,
    held_targets: np.ndarray,
    grid: Sequence[np.ndarray],
    on_progress: OnProgress,
) -> _Choice:
    """Fit every label at every C (L,) of the grid, and keep the best on the held features (H, D).

    A label whose fitted images are all alike is trained all the same: its head is the penalty's
    alone, and it has no score that a holdout could tell from another.
    """
    known = held_targets >= 0
    positives, negatives = (held_targets == 1).sum(axis=0), (held_targets == 0).sum(axis=0)
    by_loss = (positives < _FEW) | (negatives < _FEW)
    totals = np.maximum(label_totals(targets, weights, len(views)), 1e-12)
    coordinates = moments_of_some(views)
    best = np.full(targets.shape[1], -np.inf)
    C, thresholds = np.empty(len(best)), np.full(len(best), 0.5)
    kept_scores = np.empty((len(held), len(best)), np.float32)
    heads: LabelHeads | None = None
    weight = np.empty((len(best), views[0].shape[1]), np.float32)
    bias, place = np.empty(len(best), np.float32), np.zeros(len(best), np.int64)
    for done, value in enumerate(grid):
        on_progress(Progress("sweep", done, len(grid), "value"))
        heads = train_labels(
            views,
            targets,
            1 / (value * totals),
            weights=weights,
            start=heads,
            coordinates=coordinates,
            tolerance=_RANKING_TOLERANCE,
        )
        scores = Head(heads.weight, heads.bias, ("",) * len(best), "").scores(held)
        scored = np.array(
            [
                _score(scores[known[:, label], label], held_targets[known[:, label], label], loss)
                for label, loss in enumerate(by_loss)
            ]
        )
        better = scored > best
        best[better], C[better], place[better] = scored[better], value[better], done
        kept_scores[:, better] = scores[:, better]
        weight[better], bias[better] = heads.weight[better], heads.bias[better]
    on_progress(Progress("sweep", len(grid), len(grid), "value"))
    assert heads is not None
    unheard = ~known.any(axis=0)
    if len(grid) > 1 and unheard.any():
        C[unheard] = np.median(grid if unheard.all() else C[~unheard])
    probabilities = sigmoid(kept_scores)
    for label in np.flatnonzero(~unheard):
        rows = known[:, label]
        thresholds[label] = f1_threshold(probabilities[rows, label], held_targets[rows, label])
    edge = (place == 0) | (place == len(grid) - 1)
    chosen = replace(heads, weight=weight, bias=bias)
    return _Choice(C, thresholds, chosen, by_loss, unheard, edge & ~unheard)


def _score(scores: np.ndarray, targets: np.ndarray, by_loss: bool) -> float:
    """Return the average precision, or minus the log loss, of one label on the holdout."""
    if not by_loss:
        return average_precision(scores, targets)
    if not len(targets):
        return 0.0
    return -float(np.logaddexp(0, np.where(targets == 1, -scores, scores), dtype=float).mean())


def _has_both(targets: np.ndarray, weights: np.ndarray | None) -> np.ndarray:
    """Return for each label whether images that count have it and have it not: bool (L,)."""
    counted = targets if weights is None else targets[weights > 0]
    both: np.ndarray = (counted == 1).any(axis=0) & (counted == 0).any(axis=0)
    return both


def _left_out(names: Sequence[str], trained: np.ndarray, targets: np.ndarray) -> list[str]:
    left = np.setdiff1d(np.arange(len(names)), trained)
    if not len(left):
        return []
    counts = ", ".join(f"{int((targets[:, label] == 1).sum()):,}" for label in left[:_LISTED])
    return [
        f"not trained, since all training images or none have it: "
        f"{_listed([names[label] for label in left])} (positives: {counts})"
    ]


def _label_scores(
    names: Sequence[str],
    trained: np.ndarray,
    targets: np.ndarray,
    test_targets: np.ndarray,
    choice: _Choice,
    measured: LabelMeasures,
) -> tuple[LabelScore, ...]:
    rows = []
    for label, name in enumerate(names):
        own, tested = targets[:, label], test_targets[:, label]
        fitted: dict[str, Any] = {}
        for at in np.flatnonzero(trained == label):
            fitted = {
                "C": float(choice.C[at]),
                "threshold": float(choice.thresholds[at]),
                "average_precision": measured.ranked.per_label[at],
                "average_precision_interval": measured.ranked.per_label_interval[at],
                "f1": measured.f1[at],
            }
        rows.append(
            LabelScore(
                name,
                int((own >= 0).sum()),
                int((own == 1).sum()),
                int((tested >= 0).sum()),
                int((tested == 1).sum()),
                **fitted,
            )
        )
    return tuple(rows)


def _check(
    views: Sequence[Features],
    targets: np.ndarray,
    weights: np.ndarray | None,
    heads: LabelHeads,
    decay: np.ndarray,
    names: Sequence[str],
    test_features: Features,
    test_targets: np.ndarray,
) -> LabelsCheck:
    """Fit LogisticRegression to the labels with the most, the median and the fewest positives.

    It minimises ``C * sum(v * loss) + ||w||^2 / 2``, for two classes with one w: our objective at
    ``C = 1 / (lambda * sum(v))``.
    """
    from sklearn.linear_model import LogisticRegression

    order = np.argsort((targets == 1).sum(axis=0), kind="stable")
    chosen = np.unique(order[np.linspace(0, len(order) - 1, _CHECKED).round().astype(int)])
    x = np.concatenate([np.asarray(features[:], np.float32) for features in views])
    mean = x.mean(axis=0, dtype=np.float64).astype(np.float32)
    x -= mean  # a free bias absorbs it; halves the iterations
    tested = np.asarray(test_features[:], np.float32)
    gaps, differences, wall_s, converged = [], [], 0.0, True
    for label in chosen:
        columns = np.ascontiguousarray(targets[:, [label]].T)
        y = np.tile(targets[:, label], len(views))
        known = y >= 0
        total = label_totals(targets[:, [label]], weights, len(views))[0]
        model = LogisticRegression(C=1 / (decay[label] * total), max_iter=MAX_ITERATIONS)
        share = None if weights is None else np.tile(weights, len(views))[known]
        seconds, ended = timed_fit(model, x[known], y[known], share)
        wall_s, converged = wall_s + seconds, converged and ended
        weight = model.coef_.astype(np.float64)
        bias = model.intercept_ - weight @ mean

        def value(
            w: np.ndarray, b: np.ndarray, label: Any = label, columns: Any = columns
        ) -> float:
            own = decay[[label]]
            return float(label_objective(w, b, views, columns, own, weights).value[0])

        theirs = value(weight, bias)
        gaps.append((value(heads.weight[[label]], heads.bias[[label]]) - theirs) / theirs)
        rows = test_targets[:, label] >= 0
        both = [
            average_precision((tested[rows] @ w)[:, 0], test_targets[rows, label])
            for w in (weight.T.astype(np.float32), heads.weight[[label]].T)
        ]
        differences.append(abs(both[0] - both[1]))
    finite = [value for value in differences if np.isfinite(value)]
    return LabelsCheck(
        tuple(names[label] for label in chosen),
        wall_s,
        max(gaps),
        max(finite) if finite else None,
        converged,
    )
