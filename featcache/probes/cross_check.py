"""The independent check: scikit-learn on the same features and objective.

Its LogisticRegression minimises ``C * sum(loss) + ||W||^2 / 2``. Divided by ``C * N`` that is our
`objective` at ``C = 1 / (N * lambda)``; a comparison at another C would check nothing. Weights
of images are its ``sample_weight``, and their sum takes the place of N.
"""

from __future__ import annotations

import time
import warnings
from collections.abc import Sequence
from contextlib import nullcontext
from dataclasses import dataclass
from typing import Any, TypeAlias

import numpy as np

from ..metrics import top1
from .blocks import one_blas_thread
from .objective import Penalty, objective
from .ridge import ridge_objective
from .weights import total_weight

MAX_ITERATIONS = 2000
# Up to here LogisticRegression takes half the time in one BLAS thread: its products are narrow.
_MANY_CLASSES = 300
_NEVER = -1e4  # a score whose probability rounds to 0 next to any other
UNDER_TRAINED = 1e-4  # a larger relative gap means that the head is not at its optimum


@dataclass(frozen=True)
class CheckResult:
    """The result of scikit-learn.

    Parameters
    ----------
    top1 : float
        Its accuracy on the test split.
    agreement : float
        Fraction of test images on which it predicts the same class as the head.
    wall_s : float
        Duration of its fit.
    C : float
        1 / (N * lambda), with the sum of the weights in place of N; twice that for logistic
        regression of two classes.
    objective : float
        Value of the shared objective at its solution.
    objective_gap : float
        (head's objective - its objective) / its objective; below 0 where the head's is lower.
    iterations : int
        Of its L-BFGS; 0 for a closed form.
    converged : bool
        Whether it stopped by its own tolerance.
    """

    top1: float
    agreement: float
    wall_s: float
    C: float
    objective: float
    objective_gap: float
    iterations: int
    converged: bool

    @property
    def under_trained(self) -> bool:
        """Whether the head's objective is clearly above scikit-learn's."""
        return self.objective_gap > UNDER_TRAINED


def check_with_sklearn(
    views: Sequence[np.ndarray],
    labels: np.ndarray,
    n_classes: int,
    test_features: np.ndarray,
    test_labels: np.ndarray,
    penalty: Penalty,
    *,
    head_objective: float,
    head_predicted: np.ndarray,
    weights: np.ndarray | None = None,
    ridge: bool = False,
) -> CheckResult:
    """Fit LogisticRegression to views (N, D), or ``ridge`` regression, and compare it with a head.

    ``head_objective`` and ``head_predicted`` int64 (M,) are the head's loss with penalty, and its
    predictions for the test features (M, D). ``weights`` float64 (N,) are of the training images.
    """
    fit = _fit_ridge if ridge else _fit_logistic
    weight, bias, ended = fit(views, labels, n_classes, penalty, weights)
    if ridge:
        value = ridge_objective(weight, bias, views, labels, penalty.weight_decay, weights)
    else:
        value = objective(weight, bias, views, labels, penalty, weights).value
    predicted = (test_features @ weight.T + bias).argmax(axis=1)
    return CheckResult(
        top1=top1(predicted, test_labels),
        agreement=top1(predicted, head_predicted),
        objective=value,
        objective_gap=(head_objective - value) / value,
        **ended,
    )


_Fit: TypeAlias = "tuple[np.ndarray, np.ndarray, dict[str, Any]]"  # weight, bias and how it ended


def _fit_logistic(
    views: Sequence[np.ndarray],
    labels: np.ndarray,
    n_classes: int,
    penalty: Penalty,
    weights: np.ndarray | None,
) -> _Fit:
    from sklearn.linear_model import LogisticRegression

    x, y, each = _stacked(views, labels, weights)
    n, mean = len(x), np.zeros(x.shape[1], x.dtype)
    classes = np.unique(labels)
    if penalty.decay_bias:
        # A penalised bias is the weight of a feature that is always 1. Every class has a finite
        # optimum then, also one without images: scikit-learn gets a row of weight 0 for each.
        missing = np.setdiff1d(np.arange(n_classes), classes)
        x = np.pad(np.column_stack([x, np.ones(n, x.dtype)]), ((0, len(missing)), (0, 0)))
        each = np.ones(n) if each is None else each
        y, each = np.append(y, missing), np.pad(each, (0, len(missing)))
        classes = np.arange(n_classes)
    else:
        # A free bias absorbs any shift of the features: centring does not change the objective
        # and halves the iterations.
        mean = x.mean(axis=0, dtype=np.float64).astype(x.dtype)
        x = x - mean
    # With two classes scikit-learn fits the difference w of their weights. W = (-w, w) / 2 has
    # ||W||^2 = ||w||^2 / 2: half the penalty, so twice the C.
    total = total_weight(views, weights)
    C = (2 if len(classes) == 2 else 1) / (total * penalty.weight_decay)
    model = LogisticRegression(C=C, fit_intercept=not penalty.decay_bias, max_iter=MAX_ITERATIONS)
    wall_s, converged = timed_fit(model, x, y, each)
    weight, bias = _every_class(*_both_classes(model.coef_, model.intercept_), classes)
    if penalty.decay_bias:
        weight, bias = weight[:, :-1], weight[:, -1]
    ended = {"iterations": int(np.max(model.n_iter_)), "converged": converged}
    return weight, bias - weight @ mean, {"wall_s": wall_s, "C": C, **ended}


def _fit_ridge(
    views: Sequence[np.ndarray],
    labels: np.ndarray,
    n_classes: int,
    penalty: Penalty,
    weights: np.ndarray | None,
) -> _Fit:
    """Minimise ``||Y - X W^T - b||^2 + alpha ||W||^2``: ours at ``alpha = N * lambda``."""
    from sklearn.linear_model import Ridge

    x, y, each = _stacked(views, labels, weights)
    alpha = total_weight(views, weights) * penalty.weight_decay
    model = Ridge(alpha=alpha)
    wall_s, _ = timed_fit(model, x, np.eye(n_classes, dtype=x.dtype)[y], each)
    ended = {"wall_s": wall_s, "C": 1 / alpha, "iterations": 0, "converged": True}
    return model.coef_, model.intercept_, ended


def timed_fit(
    model: Any, x: np.ndarray, y: np.ndarray, weights: np.ndarray | None
) -> tuple[float, bool]:
    """Fit a model of scikit-learn, silently; return the seconds, and whether it converged."""
    from sklearn.exceptions import ConvergenceWarning

    is_small = y.dtype.kind in "biu" and y.max(initial=0) < _MANY_CLASSES
    started = time.perf_counter()
    with (
        one_blas_thread() if is_small else nullcontext(),
        warnings.catch_warnings(record=True) as caught,
    ):
        warnings.simplefilter("always")
        model.fit(x, y, weights)
    wall_s = time.perf_counter() - started
    return wall_s, not any(issubclass(item.category, ConvergenceWarning) for item in caught)


def _stacked(
    views: Sequence[np.ndarray], labels: np.ndarray, weights: np.ndarray | None
) -> tuple[np.ndarray, np.ndarray, np.ndarray | None]:
    """Return the rows of all views that have a weight: features, labels and weights."""
    x = np.concatenate(views) if len(views) > 1 else views[0]
    y = np.tile(labels, len(views))
    if weights is None:
        return x, y, None
    each = np.tile(weights, len(views))
    kept = each > 0
    return (x, y, each) if kept.all() else (x[kept], y[kept], each[kept])


def _both_classes(weight: np.ndarray, bias: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Give both classes a row where scikit-learn keeps one for two."""
    if len(weight) > 1:
        return weight, bias
    return np.concatenate([-weight, weight]) / 2, np.concatenate([-bias, bias]) / 2


def _every_class(
    weight: np.ndarray, bias: np.ndarray, present: np.ndarray
) -> tuple[np.ndarray, np.ndarray]:
    """Give every class up to the last a row; one without images gets a probability of 0."""
    if len(present) == present[-1] + 1:
        return weight, bias
    every = np.zeros((present[-1] + 1, weight.shape[1]), weight.dtype)
    offsets = np.full(len(every), _NEVER, bias.dtype)
    every[present], offsets[present] = weight, bias
    return every, offsets
