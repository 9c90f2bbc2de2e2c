"""The independent check: scikit-learn's LogisticRegression on the same objective.

scikit-learn minimises ``C * sum(loss) + ||W||^2 / 2``; dividing by ``C * N`` gives
our `objective` at ``C = 1 / (N * lambda)``. Comparing at
any other C would check nothing.
"""

from __future__ import annotations

import time
import warnings
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from ..metrics import agreement, top1
from .objective import Penalty, objective
from .ridge import ridge_objective

MAX_ITERATIONS = 2000
_NEVER = -1e4  # a score whose probability is 0 beside any that occurs
UNDER_TRAINED = 1e-4  # a relative gap above this means that the head is not at its optimum


@dataclass(frozen=True)
class CheckResult:
    """What scikit-learn found.

    Parameters
    ----------
    top1 : float
        Its accuracy on the test split.
    agreement : float
        Fraction of test images on which it predicts what the head predicts.
    wall_s : float
        Duration of its fit.
    C : float
        1 / (N * lambda), twice that for the logistic regression of two classes.
    objective : float
        Value of the shared objective at its solution.
    objective_gap : float
        (head's objective - its objective) / its objective; below 0 where the head's is better.
    iterations : int
        Of lbfgs; 0 for a closed form.
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
    test_features: np.ndarray,
    test_labels: np.ndarray,
    penalty: Penalty,
    *,
    head_objective: float,
    head_predicted: np.ndarray,
) -> CheckResult:
    """Fit scikit-learn's LogisticRegression to the same features and objective.

    Parameters
    ----------
    views : sequence of numpy.ndarray
        float32 (N, D) each: what the head was trained on.
    labels : numpy.ndarray
        int64 (N,).
    test_features, test_labels : numpy.ndarray
        float32 (M, D) and int64 (M,).
    penalty : ProbeRecipe or ExactRecipe
        Gives lambda, and whether the bias is penalised.
    head_objective : float
        f of the head under check.
    head_predicted : numpy.ndarray
        int64 (M,), its predictions.
    """
    from sklearn.exceptions import ConvergenceWarning
    from sklearn.linear_model import LogisticRegression

    x = np.concatenate(views) if len(views) > 1 else views[0]
    y = np.tile(labels, len(views))
    # A free intercept absorbs any shift of the features, so that centring changes nothing in
    # the objective and spares lbfgs half of its iterations. A penalised bias is the weight of
    # a feature that is always 1, and then nothing may be shifted.
    if penalty.decay_bias:
        mean = np.zeros(x.shape[1], x.dtype)
        x = np.column_stack([x, np.ones(len(x), x.dtype)])
    else:
        mean = x.mean(axis=0, dtype=np.float64).astype(x.dtype)
        x = x - mean
    # Of two classes scikit-learn fits the difference w of their weights. W = (-w, w) / 2 has
    # ||W||^2 = ||w||^2 / 2: half the penalty, so twice the C.
    present = np.unique(labels)
    inverse_penalty = (2 if len(present) == 2 else 1) / (len(x) * penalty.weight_decay)
    model = LogisticRegression(
        C=inverse_penalty, fit_intercept=not penalty.decay_bias, max_iter=MAX_ITERATIONS
    )
    started = time.perf_counter()
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        model.fit(x, y)
    spent = time.perf_counter() - started

    weight, bias = _every_class(*_both_sides(model.coef_, model.intercept_), present)
    if penalty.decay_bias:
        weight, bias = weight[:, :-1], weight[:, -1]
    bias = bias - weight @ mean
    value = objective(weight, bias, views, labels, penalty).value
    predicted = (test_features @ weight.T + bias).argmax(axis=1)
    return CheckResult(
        top1=top1(predicted, test_labels),
        agreement=agreement(predicted, head_predicted),
        wall_s=spent,
        C=inverse_penalty,
        objective=value,
        objective_gap=(head_objective - value) / value,
        iterations=int(np.max(model.n_iter_)),
        converged=not any(issubclass(item.category, ConvergenceWarning) for item in caught),
    )


def check_ridge(
    views: Sequence[np.ndarray],
    labels: np.ndarray,
    test_features: np.ndarray,
    test_labels: np.ndarray,
    weight_decay: float,
    *,
    head_objective: float,
    head_predicted: np.ndarray,
) -> CheckResult:
    """Fit scikit-learn's Ridge to the same features and one-hot labels; as `check_with_sklearn`.

    It minimises ``||Y - X W^T - b||^2 + alpha ||W||^2``: ours at ``alpha = N * lambda``.
    """
    from sklearn.linear_model import Ridge as SklearnRidge

    x = np.concatenate(views) if len(views) > 1 else views[0]
    y = np.tile(labels, len(views))
    targets = np.eye(int(labels.max()) + 1, dtype=x.dtype)[y]
    model = SklearnRidge(alpha=len(x) * weight_decay)
    started = time.perf_counter()
    model.fit(x, targets)
    spent = time.perf_counter() - started
    value = ridge_objective(model.coef_, model.intercept_, views, labels, weight_decay)
    predicted = (test_features @ model.coef_.T + model.intercept_).argmax(axis=1)
    return CheckResult(
        top1=top1(predicted, test_labels),
        agreement=agreement(predicted, head_predicted),
        wall_s=spent,
        C=1 / (len(x) * weight_decay),
        objective=value,
        objective_gap=(head_objective - value) / value,
        iterations=0,
        converged=True,
    )


def _both_sides(weight: np.ndarray, bias: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Give both classes a row where scikit-learn keeps one for two."""
    if len(weight) > 1:
        return weight, bias
    return np.concatenate([-weight, weight]) / 2, np.concatenate([-bias, bias]) / 2


def _every_class(
    weight: np.ndarray, bias: np.ndarray, present: np.ndarray
) -> tuple[np.ndarray, np.ndarray]:
    """Give every class up to the last a row: one without images is never likely."""
    if len(present) == present[-1] + 1:
        return weight, bias
    every = np.zeros((present[-1] + 1, weight.shape[1]), weight.dtype)
    offsets = np.full(len(every), _NEVER, bias.dtype)
    every[present], offsets[present] = weight, bias
    return every, offsets
