"""The exact linear probe as a scikit-learn estimator: for pipelines, searches, cross-validation.

``C * sum(loss) + ||W||^2 / 2`` is C * N times our `objective` at ``lambda = 1 / (C * N)``, with
the sum of the weights in place of N. For two
classes scikit-learn keeps one row, the difference w of their weights. At the optimum the two rows
are ``(-w, w) / 2`` with ``||W||^2 = ||w||^2 / 2``, so lambda is doubled to penalise w equally.
"""

from __future__ import annotations

import math
import warnings
from collections.abc import Mapping
from typing import Any

import numpy as np
from sklearn.base import BaseEstimator, ClassifierMixin
from sklearn.exceptions import ConvergenceWarning
from sklearn.preprocessing import StandardScaler
from sklearn.utils.multiclass import check_classification_targets
from sklearn.utils.validation import check_is_fitted

from ..errors import RecipeError
from ..options import check_choice
from .lbfgs import train_lbfgs
from .recipes import ExactRecipe
from .scaling import SCALINGS
from .weights import sample_weights, total_weight

try:
    from sklearn.utils.validation import validate_data
except ImportError:  # scikit-learn before 1.6
    validate_data = BaseEstimator._validate_data


_PRECISIONS = (np.float64, np.float32)  # anything else becomes the first


class LinearProbe(ClassifierMixin, BaseEstimator):
    """Multinomial logistic regression on features, solved to its optimum.

    Minimises what scikit-learn's ``LogisticRegression`` of the same C minimises:
    ``C * sum(loss) + ||W||^2 / 2``, with a bias that is not penalised.

    Parameters
    ----------
    C : float
        Inverse strength of the penalty, above 0.
    scale : str
        Scaling of the features. ``"none"``; ``"standardize"``: each column minus its mean,
        divided by its standard deviation over the training rows unless 0, both weighted by
        ``sample_weight`` and not by ``class_weight``; ``"l2"``: each row divided by its Euclidean
        length unless 0. C applies to scaled features.
    tolerance : float
        Stop when the estimated gap of the objective to its optimum is at most this fraction.
    max_iterations : int
        Stop after this many at the latest, with a ``ConvergenceWarning``.
    class_weight : "balanced", mapping or None
        ``"balanced"``: every class gets the same total weight. A mapping gives the weight of
        labels, 1 for those that it leaves out. As in scikit-learn.

    Attributes
    ----------
    classes_ : numpy.ndarray
        (K,): the labels, sorted.
    coef_ : numpy.ndarray
        (K, D), or (1, D) for two classes: weights, in the features' precision, for features as
        given to `fit`, divided by their length where ``scale`` is ``"l2"``.
    intercept_ : numpy.ndarray
        (K,), or (1,) for two classes.
    n_features_in_ : int
        D.
    feature_names_in_ : numpy.ndarray
        (D,): names of the columns, where `fit` was given a data frame.
    n_iter_ : int
        Iterations of the solver.
    converged_ : bool
        Whether it reached the tolerance.
    objective_ : float
        Mean cross-entropy plus penalty at the solution: scikit-learn's objective / (C * N), with
        the sum of the weights in place of N.
    """

    def __init__(
        self,
        C: float = 1.0,
        scale: str = "none",
        tolerance: float = 1e-6,
        max_iterations: int = 500,
        class_weight: str | Mapping[Any, float] | None = None,
    ) -> None:
        self.C = C
        self.scale = scale
        self.tolerance = tolerance
        self.max_iterations = max_iterations
        self.class_weight = class_weight

    def fit(self, X: Any, y: Any, sample_weight: Any = None) -> LinearProbe:
        """Train the head.

        Parameters
        ----------
        X : array-like
            (N, D) features: float32 or float64; others are converted to float64.
        y : array-like
            (N,) labels of two classes or more: numbers or strings.
        sample_weight : array-like, optional
            (N,) weights, not negative: a row of weight 2 counts as two, one of weight 0 as none.

        Returns
        -------
        LinearProbe
            Itself.

        Raises
        ------
        RecipeError
            A parameter outside its range, or weights that are.
        ValueError
            Features that are not finite or not a matrix, or labels of a single class.
        TypeError
            Sparse features.
        """
        if not (math.isfinite(self.C) and self.C > 0):
            raise RecipeError(f"C: expected a positive number, found {self.C}")
        check_choice("scale", self.scale, SCALINGS)
        _check_dense(X)
        features, given = validate_data(self, X, y, dtype=_PRECISIONS)
        check_classification_targets(given)
        if sample_weight is not None:
            sample_weight = sample_weights(given, 0, None, sample_weight)
            kept = sample_weight > 0
            features, given, sample_weight = features[kept], given[kept], sample_weight[kept]
        self.classes_, labels = np.unique(given, return_inverse=True)
        n_classes = len(self.classes_)
        if n_classes < 2:
            raise ValueError(
                f"y: expected two classes or more, found one class: {self.classes_[0]}"
            )

        labels = labels.astype(np.int64)
        weights = sample_weights(
            labels, n_classes, self.class_weight, sample_weight, self.classes_.tolist()
        )
        total = total_weight([features], weights)
        recipe = ExactRecipe(
            weight_decay=(2 if n_classes == 2 else 1) / (self.C * total),
            tolerance=self.tolerance,
            max_iterations=self.max_iterations,
        )
        scaler = None
        if self.scale == "standardize":
            scaler = StandardScaler().fit(features, sample_weight=sample_weight)
        inputs = scaler.transform(features) if scaler is not None else self._rescaled(features)
        solution = train_lbfgs([inputs], labels, n_classes, recipe, weights=weights)

        weight, bias = solution.weight.astype(np.float64), solution.bias.astype(np.float64)
        if n_classes == 2:
            weight, bias = np.diff(weight, axis=0), np.diff(bias)
        else:
            bias -= bias.mean()  # the same bias on every class changes nothing: keep none
        if scaler is not None:
            weight = weight / scaler.scale_
            bias = bias - weight @ scaler.mean_
        self.coef_ = weight.astype(features.dtype)
        self.intercept_ = bias.astype(features.dtype)
        self.n_iter_ = solution.steps
        self.converged_ = bool(solution.converged)
        self.objective_ = solution.objective
        if not self.converged_:
            ended = self.n_iter_ >= self.max_iterations
            limit = "max_iterations" if ended else "the precision of floating point"
            warnings.warn(
                f"LinearProbe: {limit} ended the search after {self.n_iter_} iterations, short "
                f"of tolerance={self.tolerance}; scaling the features may help",
                ConvergenceWarning,
                stacklevel=2,
            )
        return self

    def decision_function(self, X: Any) -> np.ndarray:
        """Return the scores of (M, D) features.

        Returns
        -------
        numpy.ndarray
            (M, K); for two classes (M,), above 0 for the second.
        """
        check_is_fitted(self)
        _check_dense(X)
        features = self._rescaled(validate_data(self, X, dtype=_PRECISIONS, reset=False))
        scores: np.ndarray = features @ self.coef_.T + self.intercept_
        return scores[:, 0] if len(self.classes_) == 2 else scores

    def predict(self, X: Any) -> np.ndarray:
        """Return the most likely class of each of (M, D) features: (M,), of ``classes_``."""
        scores = self.decision_function(X)
        best = scores > 0 if scores.ndim == 1 else scores.argmax(axis=1)
        labels: np.ndarray = self.classes_[best.astype(np.intp)]
        return labels

    def predict_log_proba(self, X: Any) -> np.ndarray:
        """Return the logarithm of `predict_proba`, exact where it rounds to 0: (M, K)."""
        scores = self.decision_function(X)
        if scores.ndim == 1:
            scores = np.column_stack([np.zeros_like(scores), scores])
        scores = scores - scores.max(axis=1, keepdims=True)
        logarithms: np.ndarray = scores - np.log(np.exp(scores).sum(axis=1, keepdims=True))
        return logarithms

    def predict_proba(self, X: Any) -> np.ndarray:
        """Return the probability of each class, in the order of ``classes_``: (M, K)."""
        probabilities: np.ndarray = np.exp(self.predict_log_proba(X))
        return probabilities

    def _rescaled(self, features: np.ndarray) -> np.ndarray:
        """Return the rows divided by their lengths where ``scale`` is ``"l2"``, else unchanged."""
        if self.scale != "l2":
            return features
        lengths = np.linalg.norm(features, axis=1, keepdims=True)
        lengths[lengths == 0] = 1
        return features / lengths


def _check_dense(features: Any) -> None:
    """Raise TypeError for sparse features, of which the solver would need all zeros too."""
    from scipy.sparse import issparse

    if issparse(features):
        raise TypeError(
            f"X: expected dense features, found a sparse {type(features).__name__}; use X.toarray()"
        )
