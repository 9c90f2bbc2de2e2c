"""What a linear head minimises, whoever minimises it.

The objective, over N features x of D numbers, labels y and K classes, is ::

    f(W, b) = 1/N * sum_i -log softmax(W x_i + b)[y_i]  +  lambda/2 * ||W||^2

With V flip views the mean runs over all V * N of them: SGD draws one view per
image and epoch, which has that mean as its expectation.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from ..recipe import ProbeRecipe

__all__ = ["Objective", "objective"]

_ROWS_AT_ONCE = 8192


@dataclass(frozen=True)
class Objective:
    """The objective at one head.

    Parameters
    ----------
    value : float
        f(W, b).
    weight_gradient, bias_gradient : numpy.ndarray
        float64 (K, D) and (K,).
    curvature : float
        p (1 - p), averaged over features and classes: how much the softmax curves here.
    """

    value: float
    weight_gradient: np.ndarray
    bias_gradient: np.ndarray
    curvature: float

    @property
    def gradient_norm(self) -> float:
        """Euclidean norm of the gradient with respect to W and b."""
        parts = self.weight_gradient, self.bias_gradient
        return math.sqrt(sum(float(np.square(part).sum()) for part in parts))


def objective(
    weight: np.ndarray,
    bias: np.ndarray,
    views: Sequence[np.ndarray],
    labels: np.ndarray,
    recipe: ProbeRecipe,
) -> Objective:
    """Return the value of f, its gradient and mean curvature, summed in float64.

    Parameters
    ----------
    weight, bias : numpy.ndarray
        (K, D) and (K,).
    views : sequence of numpy.ndarray
        Features (N, D) of each view.
    labels : numpy.ndarray
        int64 (N,).
    recipe : ProbeRecipe
        Gives lambda, and whether the bias is penalised too.

    Returns
    -------
    Objective
    """
    total = len(views) * len(labels)
    loss = curvature = 0.0
    weight_gradient = np.zeros(weight.shape)
    bias_gradient = np.zeros(bias.shape)
    for features in views:
        for start in range(0, len(labels), _ROWS_AT_ONCE):
            x = features[start : start + _ROWS_AT_ONCE]
            y = labels[start : start + _ROWS_AT_ONCE]
            logits = (x @ weight.T + bias).astype(np.float64)
            logits -= logits.max(axis=1, keepdims=True)
            picked = np.arange(len(y)), y
            residual = np.exp(logits)
            norm = residual.sum(axis=1, keepdims=True)
            loss += float((np.log(norm[:, 0]) - logits[picked]).sum())
            residual /= norm
            curvature += float((residual * (1 - residual)).sum())
            residual[picked] -= 1
            weight_gradient += residual.astype(x.dtype).T @ x
            bias_gradient += residual.sum(axis=0)
    decay = recipe.weight_decay
    value = loss / total + decay / 2 * float(np.square(weight, dtype=np.float64).sum())
    weight_gradient = weight_gradient / total + decay * weight
    bias_gradient = bias_gradient / total
    if recipe.decay_bias:
        value += decay / 2 * float(np.square(bias, dtype=np.float64).sum())
        bias_gradient += decay * bias
    return Objective(value, weight_gradient, bias_gradient, curvature / (total * len(bias)))
